//! Traces in the Chrome trace event format, as <https://ui.perfetto.dev> opens them.
//!
//! Enters: timelines. Leaves: JSON with one process per timeline and one thread per rank.
//! Invariant: times are microseconds; waiting is a slice of its own inside the one that waits.
//!
//! Source of the format: "Trace Event Format", complete (`X`) and metadata (`M`) events.

use serde_json::{Value, json};

use meshweave_dsl::program::Program;
use meshweave_dsl::timeline::{Basis, Timeline};

use super::format;

/// The trace of all timelines, each a process of its own; where the program runs a schedule, its
/// actions have a thread of their own under each rank's. Linear in the number of events.
pub fn perfetto(timelines: &[Timeline], program: Option<&Program>) -> Value {
    let mut events = Vec::new();
    for (timeline_idx, timeline) in timelines.iter().enumerate() {
        let pid = timeline_idx + 1;
        let process = match timeline.basis {
            Basis::Predicted => "predicted",
            Basis::Measured => "measured",
        };
        events.push(json!({
            "ph": "M", "pid": pid, "name": "process_name", "args": { "name": process }
        }));
        events.push(json!({
            "ph": "M", "pid": pid, "name": "process_sort_index", "args": { "sort_index": timeline_idx }
        }));
        for rank in 0..timeline.n_ranks {
            events.push(json!({
                "ph": "M", "pid": pid, "tid": rank, "name": "thread_name",
                "args": { "name": format!("rank {rank}") }
            }));
        }
        let actions = program.map_or_else(Vec::new, |program| timeline.actions(program));
        for rank in 0..timeline.n_ranks {
            if actions.iter().any(|action| action.rank == rank) {
                events.push(json!({
                    "ph": "M", "pid": pid, "tid": timeline.n_ranks + rank, "name": "thread_name",
                    "args": { "name": format!("rank {rank}, actions") }
                }));
            }
        }
        events.extend(actions.iter().map(|action| {
            json!({
                "ph": "X",
                "pid": pid,
                "tid": timeline.n_ranks + action.rank,
                "name": action.label,
                "cat": "action",
                "ts": micros(action.start_s),
                "dur": micros(action.end_s - action.start_s),
                "args": { "busy_us": micros(action.busy_s) }
            })
        }));
        for event in &timeline.events {
            events.push(json!({
                "ph": "X",
                "pid": pid,
                "tid": event.rank,
                "name": event.name,
                "cat": format::category(event.category).0,
                "ts": micros(event.start_s),
                "dur": micros(event.duration_s),
                "args": {
                    "instruction": event.instruction,
                    "flops": event.n_flops,
                    "bytes": event.n_bytes,
                    "wait_us": micros(event.wait_s),
                }
            }));
            if event.wait_s > 0.0 {
                events.push(json!({
                    "ph": "X",
                    "pid": pid,
                    "tid": event.rank,
                    "name": "waiting",
                    "cat": "wait",
                    "ts": micros(event.start_s),
                    "dur": micros(event.wait_s.min(event.duration_s)),
                }));
            }
        }
    }
    json!({ "displayTimeUnit": "ms", "traceEvents": events })
}

/// Microseconds, rounded to nanoseconds so that texts stay short and equal on every machine.
fn micros(seconds: f64) -> f64 {
    (seconds * 1e9).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use meshweave_dsl::timeline::{Category, Event};

    #[test]
    fn trace_of_two_ranks() {
        let event =
            |rank: usize, instruction: usize, name: &str, category, start_s, wait_s| Event {
                rank,
                instruction,
                name: name.into(),
                category,
                start_s,
                duration_s: 0.00025,
                wait_s,
                n_flops: 1e6,
                n_bytes: 4096.0,
                received_bytes: None,
            };
        let timeline = |basis| Timeline {
            basis,
            n_ranks: 2,
            events: vec![
                event(0, 0, "layers[0].mlp.wu", Category::Contract, 0.0, 0.0),
                event(
                    1,
                    1,
                    "layers[0].mlp.\"down\"",
                    Category::Collective,
                    0.00025,
                    0.0001,
                ),
            ],
        };
        let timelines = [timeline(Basis::Predicted), timeline(Basis::Measured)];
        let trace = perfetto(&timelines, None);
        let text = serde_json::to_string_pretty(&trace).unwrap();
        insta::assert_snapshot!(text);
    }
}
