//! The numbers behind the page's interactive pictures, as compact arrays.
//!
//! Enters: timelines and the program. Leaves: JSON that the page's script reads.
//! Invariant: names stand once each; times are whole nanoseconds, every start relative to the end
//! of the event before it in its lane, so that a step of a thousand instructions takes some 30 KB.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use meshweave_dsl::program::RankProgram;
use meshweave_dsl::timeline::{Basis, Event, Timeline};

use super::ReportInput;
use super::format::CATEGORIES;

pub(super) fn data(input: &ReportInput) -> String {
    let mut names = Names::default();
    let timelines: Vec<Value> = [&input.predicted, &input.measured]
        .into_iter()
        .flatten()
        .map(|timeline| timeline_data(timeline, &mut names))
        .collect();
    let memory: Vec<Value> = input.program.as_ref().map_or(Vec::new(), |program| {
        program
            .ranks
            .iter()
            .map(|rank| memory_data(rank, &mut names))
            .collect()
    });
    json!({
        "timelines": timelines,
        "memory": memory,
        "losses": input.losses,
        "names": names.texts,
    })
    .to_string()
}

#[derive(Default)]
struct Names {
    texts: Vec<String>,
    ids: BTreeMap<String, usize>,
}

impl Names {
    fn id(&mut self, name: &str) -> usize {
        if let Some(id) = self.ids.get(name) {
            return *id;
        }
        self.texts.push(name.into());
        self.ids.insert(name.into(), self.texts.len() - 1);
        self.texts.len() - 1
    }
}

/// Lanes of `[name, category, instruction, gap, duration, wait, flops, bytes]` in flat columns.
fn timeline_data(timeline: &Timeline, names: &mut Names) -> Value {
    let mut lanes: Vec<Vec<&Event>> = vec![Vec::new(); timeline.n_ranks];
    for event in &timeline.events {
        if let Some(lane) = lanes.get_mut(event.rank) {
            lane.push(event);
        }
    }
    let lanes: Vec<Value> = lanes
        .into_iter()
        .map(|mut lane| {
            lane.sort_by(|a, b| a.start_s.total_cmp(&b.start_s));
            let mut end_ns = 0;
            let mut columns: [Vec<i64>; 6] = Default::default();
            let mut flops = Vec::with_capacity(lane.len());
            let mut moved = Vec::with_capacity(lane.len());
            for event in lane {
                let category = CATEGORIES
                    .iter()
                    .position(|category| *category == event.category)
                    .unwrap_or(0);
                let start_ns = nanos(event.start_s);
                let next_ns = nanos(event.start_s + event.duration_s);
                let row = [
                    names.id(&event.name) as i64,
                    category as i64,
                    event.instruction as i64,
                    start_ns - end_ns,
                    next_ns - start_ns,
                    nanos(event.wait_s),
                ];
                for (column, number) in columns.iter_mut().zip(row) {
                    column.push(number);
                }
                flops.push(event.n_flops as u64);
                moved.push(event.n_bytes as u64);
                end_ns = next_ns;
            }
            let [name, category, instruction, gap, duration, wait] = columns;
            json!({
                "name": name, "category": category, "instruction": instruction, "gap": gap,
                "duration": duration, "wait": wait, "flops": flops, "bytes": moved,
            })
        })
        .collect();
    json!({
        "basis": match timeline.basis {
            Basis::Predicted => "predicted",
            Basis::Measured => "measured",
        },
        "step": nanos(timeline.step_s()),
        "lanes": lanes,
    })
}

fn memory_data(rank: &RankProgram, names: &mut Names) -> Value {
    let live: Vec<usize> = rank
        .instructions
        .iter()
        .map(|instruction| instruction.live_bytes)
        .collect();
    let ids: Vec<usize> = rank
        .instructions
        .iter()
        .map(|instruction| names.id(&instruction.name))
        .collect();
    json!({ "arena": rank.arena_bytes, "live": live, "name": ids })
}

fn nanos(seconds: f64) -> i64 {
    (seconds * 1e9).round() as i64
}
