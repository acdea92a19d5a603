//! How many microbatches' activations a pipeline rank holds at once.
//!
//! Enters: the name of a schedule and its sizes. Leaves: microbatches of all layers of one rank.
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
