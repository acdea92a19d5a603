//! What a schedule means for memory: microbatches that a rank holds at once, stages that it works for by turns.
//!
//! Enters: the name of a schedule and its sizes. Leaves: microbatches of all layers of one rank, turns.
//! Invariant: never more than there are microbatches, never less than one.

use crate::schedule::{Builtin, RankCosts, Shape, closed_form};

/// The peak of kept activations on a pipeline rank, in microbatches of all of its chunks.
///
/// 1F1B holds `pp − rank` (PipeDream-Flush, arXiv 2006.09503); interleaved, `2 (pp − rank − 1) +
/// (chunks − 1) pp + 1` chunks (Megatron-LM SC21, arXiv 2104.04473); the others what
/// [`closed_form`] says for the rank that holds most. A schedule of another name counts as 1F1B.
pub fn in_flight(
    schedule: &str,
    pp: usize,
    chunks: usize,
    pipeline_rank: usize,
    n_microbatches: usize,
) -> f64 {
    let (n_ranks, n_chunks) = (pp as f64, chunks.max(1) as f64);
    let behind = (pp - 1 - pipeline_rank.min(pp - 1)) as f64;
    let peak = match Builtin::find(schedule) {
        _ if pp == 1 => 1.0,
        Some(Builtin::Interleaved) => (2.0 * behind + (n_chunks - 1.0) * n_ranks + 1.0) / n_chunks,
        None | Some(Builtin::OneFOneB) => behind + 1.0,
        Some(family) => {
            let shape = Shape::new(pp, n_microbatches.max(1)).chunks(chunks.max(1));
            let formula = closed_form(family.name(), &shape, &RankCosts::new(1.0, 1.0, 1.0));
            formula.map_or(behind + 1.0, |formula| formula.peak_microbatches)
        }
    };
    peak.min(n_microbatches.max(1) as f64).max(1.0)
}

/// Whether the losses of all microbatches wait for the first backward pass.
pub fn keeps_losses(schedule: &str) -> bool {
    matches!(schedule, "gpipe" | "looped-bfs")
}

/// Stages of one pipeline rank, whose gradients it adds up by turns.
pub fn stages_of_rank(schedule: &str, chunks: usize) -> usize {
    chunks.max(1) * Builtin::find(schedule).map_or(1, Builtin::n_copies)
}

/// Backward passes that follow each other in one stage of a rank before it turns to another: runs a step
/// and stage.
///
/// One, where the rank has one stage or takes all microbatches through a chunk (Lamy-Poirier 2023, arXiv
/// 2211.05953); `microbatches / pp`, where chunks take turns every `pp` microbatches (Megatron-LM SC21,
/// arXiv 2104.04473); at most every microbatch, where two stages alternate.
pub fn runs_of_backward(schedule: &str, pp: usize, chunks: usize, n_microbatches: usize) -> usize {
    let n_microbatches = n_microbatches.max(1);
    match Builtin::find(schedule) {
        _ if stages_of_rank(schedule, chunks) == 1 => 1,
        Some(Builtin::LoopedBfs) => 1,
        Some(Builtin::Interleaved | Builtin::InterleavedZb) => (n_microbatches / pp.max(1)).max(1),
        family => n_microbatches.div_ceil(family.map_or(1, Builtin::n_copies)),
    }
}
