//! What a run measured, and how it is printed.
//!
//! Enters: losses, times, memory, the program they belong to. Leaves: lines for people or one JSON value.
//! Invariant: predicted and measured figures stand side by side, each called what it is.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use meshweave_compiler::resolve::Request;
use meshweave_dsl::program::Program;
use meshweave_dsl::timeline::Timeline;
use meshweave_runtime::executor::GpuUse;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Format;
use super::calibrate::Calibrated;
use super::experts::{Placed, Settled};
use super::render::{bytes, seconds, sparkline};
use crate::cli::output::{out, outln};
use crate::report::predicted_timeline;

/// What a run measured. What is not skipped goes from the processes of a job to the one that started it.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct Outcome {
    pub(super) losses: Vec<f64>,
    /// Wall seconds of every step.
    pub(super) step_s: Vec<f64>,
    pub(super) timeline: Option<Timeline>,
    /// Bytes of tokens that every step dispatched to experts of other devices and brought back.
    pub(super) dispatched_bytes: Vec<u64>,
    /// Bytes of keys, values and routes that every step gave to all devices, where tokens stand with
    /// their experts.
    pub(super) context_bytes: Vec<u64>,
    /// Bytes of weights that every step gave to replicas of experts, and of gradients that came back.
    pub(super) copied_bytes: Vec<u64>,
    /// What became of the experts.
    pub(super) experts: Settled,
    /// A signal ended the run before its last step.
    pub(super) ended_early: bool,
    /// Bytes allocated for each rank's arena.
    pub(super) arena_bytes: Vec<usize>,
    /// How the GPU was used, where the ranks were on one.
    #[serde(skip)]
    pub(super) gpu: Option<GpuUse>,
    /// Errors of the first step against the serial interpreter, by tensor, where it was asked for.
    #[serde(skip)]
    pub(super) errors: Option<BTreeMap<String, f64>>,
    /// What that timeline says of the cluster, where it was asked for.
    #[serde(skip)]
    pub(super) calibrated: Option<Calibrated>,
}

/// Files that a run wrote.
#[derive(Default)]
pub(super) struct Written<'a> {
    pub(super) report: Option<&'a PathBuf>,
    pub(super) trace: Option<&'a PathBuf>,
    pub(super) save: Option<&'a PathBuf>,
    pub(super) calibrate: Option<&'a PathBuf>,
}

/// Prints what a run of a program measured.
pub(super) fn print(
    program: &Program,
    outcome: &Outcome,
    request: Option<&Request>,
    written: &Written<'_>,
    format: Format,
) {
    let predicted = predicted_timeline(program);
    let predicted_s = predicted.step_s();
    let mut sorted = outcome.step_s.clone();
    sorted.sort_by(f64::total_cmp);
    let median_s = sorted.get(sorted.len() / 2).copied();
    let arena_bytes = &outcome.arena_bytes;
    let peak_bytes = arena_bytes.iter().copied().max().unwrap_or(0);
    let planned_bytes = program
        .ranks
        .iter()
        .map(|rank| rank.arena_bytes)
        .max()
        .unwrap_or(0);
    if format == Format::Json {
        outln!(
            "{}",
            json!({
                "losses": outcome.losses,
                "ended_early": outcome.ended_early,
                "step_s": {"predicted": predicted_s, "measured_median": median_s, "measured": outcome.step_s},
                "memory_bytes": {"predicted": planned_bytes, "measured": arena_bytes},
                "dispatched_bytes": {"measured": outcome.dispatched_bytes},
                "context_bytes": {"measured": outcome.context_bytes},
                "token_exchanges": program.n_token_exchanges(),
                "copied_bytes": {"measured": outcome.copied_bytes},
                "placed": outcome.experts.placed.as_ref().map(placed_json),
                "rebalanced": outcome.experts.rebalanced.as_ref().map(|done| json!({
                    "moved": done.moved,
                    "moved_bytes": {"measured": done.moved_bytes},
                    "balancedness": {"measured": done.balancedness},
                })),
                "idle_part": {"predicted": predicted.idle_part(), "measured": outcome.timeline.as_ref().map(Timeline::idle_part)},
                "actions": {
                    "predicted": predicted.actions(program),
                    "measured": outcome.timeline.as_ref().map(|timeline| timeline.actions(program)),
                },
                "gpu": outcome.gpu.as_ref().map(|gpu| json!({
                    "name": gpu.name,
                    "contractions": {"library": gpu.n_by_library, "generated": gpu.n_generated},
                    "other_bytes": gpu.other_bytes,
                    "host_bytes": gpu.host_bytes,
                })),
                "errors": outcome.errors,
                "report": written.report,
                "trace": written.trace,
                "calibrated": outcome.calibrated.as_ref().map(Calibrated::json),
            })
        );
        return;
    }
    if let Some(gpu) = &outcome.gpu {
        outln!(
            "device     {}: {} contractions by cuBLASLt, {} by generated kernels",
            gpu.name,
            gpu.n_by_library,
            gpu.n_generated
        );
    }
    if let Some(errors) = &outcome.errors {
        let worst = errors.iter().max_by(|a, b| a.1.total_cmp(b.1));
        if let Some((name, error)) = worst {
            outln!(
                "verified   {} tensors against the serial f64 model; greatest relative error {error:.1e} ({name})",
                errors.len()
            );
        }
    }
    if let Some(median_s) = median_s {
        outln!(
            "step time  {} predicted, {} measured (median of {})",
            seconds(predicted_s),
            seconds(median_s),
            sorted.len()
        );
    }
    if let Some(pipeline) = request.and_then(|request| request.pipeline.as_ref()) {
        let schedule = &pipeline.schedule;
        let measured = outcome
            .timeline
            .as_ref()
            .map(|timeline| format!(", {:.0} % measured", 100.0 * timeline.idle_part()));
        outln!(
            "pipeline   {}: {} stages on {} ranks, {} microbatches; idle {:.0} % predicted{}",
            schedule.name,
            schedule.n_stages,
            schedule.n_ranks,
            schedule.n_microbatches,
            100.0 * predicted.idle_part(),
            measured.unwrap_or_default()
        );
    }
    outln!(
        "memory     {} a device predicted, {} allocated",
        bytes(planned_bytes as f64),
        bytes(peak_bytes as f64)
    );
    let n_dispatches = outcome.dispatched_bytes.len();
    if n_dispatches > 0 {
        let total: u64 = outcome.dispatched_bytes.iter().sum();
        outln!(
            "dispatch   {} of tokens a step between devices{} (measured, mean of {n_dispatches}), in {} exchanges",
            bytes(total as f64 / n_dispatches as f64),
            if outcome.context_bytes.is_empty() {
                ", there and back"
            } else {
                ", from expert to expert"
            },
            program.n_token_exchanges()
        );
    }
    let n_contexts = outcome.context_bytes.len();
    if n_contexts > 0 {
        let total: u64 = outcome.context_bytes.iter().sum();
        outln!(
            "context    {} of keys, values and routes a step between devices (measured, mean of {n_contexts})",
            bytes(total as f64 / n_contexts as f64)
        );
    }
    if let Some(n_tokens) = outcome.experts.recorded {
        eprintln!("recorded   the experts of {n_tokens} tokens (measured)");
    }
    if let Some(placed) = &outcome.experts.placed {
        out!("{}", placed_text(placed, &outcome.copied_bytes));
    }
    if let Some(done) = &outcome.experts.rebalanced
        && let Some((before, after)) = done.balancedness.last()
    {
        outln!(
            "rebalanced {} times, {} experts moved with {} of weights and moments; balancedness {before:.3} → {after:.3} the last time (measured loads)",
            done.moved.len(),
            done.moved.iter().sum::<usize>(),
            bytes(done.moved_bytes as f64),
        );
    }
    if let (Some(first), Some(last)) = (outcome.losses.first(), outcome.losses.last()) {
        outln!(
            "loss       {first:.6} → {last:.6}  {}",
            sparkline(&outcome.losses, 48)
        );
    }
    if outcome.losses.len() <= 10 && !outcome.losses.is_empty() {
        let losses: Vec<String> = outcome
            .losses
            .iter()
            .map(|loss| format!("{loss:.6}"))
            .collect();
        outln!("losses     {}", losses.join(" "));
    }
    if let Some(calibrated) = &outcome.calibrated {
        outln!("{}", calibrated.text());
    }
    if outcome.ended_early {
        outln!(
            "ended      by a signal, after {} steps of this run",
            outcome.step_s.len()
        );
    }
    for path in [
        written.report,
        written.trace,
        written.save,
        written.calibrate,
    ]
    .into_iter()
    .flatten()
    {
        outln!("wrote      {}", absolute(path));
    }
}

fn placed_json(placed: &Placed) -> serde_json::Value {
    let tallied = placed.tallied.as_ref();
    json!({
        "moved": {"measured": placed.moved.experts},
        "moved_bytes": {"measured": placed.moved.bytes},
        "experts": placed.of,
        "copies": placed.n_copies,
        "greatest_load": {"measured": tallied.map(|tallied| tallied.greatest_load)},
        "kept": {"measured": tallied.and_then(|tallied| tallied.kept)},
    })
}

/// What a placement moved and did; `copied` are bytes a step.
fn placed_text(placed: &Placed, copied: &[u64]) -> String {
    let mut text = String::new();
    // Writing into a string cannot fail.
    if placed.is_placed {
        let _ = write!(
            text,
            "placed     {} of {} experts moved with {} of weights and moments (measured)",
            placed.moved.experts,
            placed.of,
            bytes(placed.moved.bytes as f64)
        );
    }
    if placed.n_copies > 0 {
        let _ = write!(text, "; {} copies beside", placed.n_copies);
        if !copied.is_empty() {
            let mean = copied.iter().sum::<u64>() as f64 / copied.len() as f64;
            let _ = write!(
                text,
                ", {} a step between devices (measured, mean of {})",
                bytes(mean),
                copied.len()
            );
        }
    }
    if placed.is_placed {
        text.push('\n');
    }
    if let Some(tallied) = &placed.tallied {
        let (before, after) = tallied.greatest_load;
        let _ = write!(
            text,
            "loads      the busiest device has {before:.3} times the mean with experts in order, {after:.3} as placed"
        );
        if let Some((before, after)) = tallied.kept {
            let _ = write!(
                text,
                "; {before:.3} and {after:.3} of transitions stay on a device"
            );
        }
        text.push_str(" (measured)\n");
    }
    text
}

fn absolute(path: &Path) -> String {
    std::path::absolute(path)
        .unwrap_or_else(|_| path.to_path_buf())
        .display()
        .to_string()
}
