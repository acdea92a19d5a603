//! How many microbatches' activations a pipeline rank holds at once.
//!
//! Enters: the name of a schedule and its sizes. Leaves: microbatches of all layers of one rank.
//! Invariant: never more than there are microbatches, never less than one.

/// The peak of kept activations on a pipeline rank, in microbatches of all of its chunks.
///
/// 1F1B holds `pp − rank` (PipeDream-Flush, arXiv 2006.09503); interleaved, `2 (pp − rank − 1) +
/// (chunks − 1) pp + 1` chunks (Megatron-LM SC21, arXiv 2104.04473); zero-bubble orders `pp` or `2 pp`
/// (arXiv 2401.10241, Table 1); V schedules as in arXiv 2405.15362, Table 1; DualPipe `pp + 1`
/// (arXiv 2412.19437, Table 2). A schedule of another name counts as 1F1B.
pub fn in_flight(
    schedule: &str,
    pp: usize,
    chunks: usize,
    pipeline_rank: usize,
    n_microbatches: usize,
) -> f64 {
    let (n_ranks, n_chunks) = (pp as f64, chunks.max(1) as f64);
    let behind = (pp - 1 - pipeline_rank.min(pp - 1)) as f64;
    let peak = match schedule {
        "gpipe" | "looped-bfs" => n_microbatches as f64,
        "zb-h1" | "zb-1p" | "zb-v" | "interleaved-zb" | "zb-interleaved" => n_ranks,
        "zb-h2" | "zb-2p" => 2.0 * n_ranks,
        "v-half" => (n_ranks + 2.0) / 2.0,
        "v-min" => (n_ranks + 4.0) / 3.0,
        "dualpipe" => n_ranks + 1.0,
        "dualpipe-v" | "dualpipev" => n_ranks + 0.5,
        "chimera" => n_ranks / 2.0 + 1.0,
        _ if chunks > 1 && pp > 1 => (2.0 * behind + (n_chunks - 1.0) * n_ranks + 1.0) / n_chunks,
        _ => behind + 1.0,
    };
    peak.min(n_microbatches.max(1) as f64).max(1.0)
}

/// Whether every rank holds the weights of two pipelines that run against each other.
pub fn weight_copies(schedule: &str) -> f64 {
    match schedule {
        "dualpipe" | "chimera" => 2.0,
        _ => 1.0,
    }
}

/// Whether the losses of all microbatches wait for the first backward pass.
pub fn keeps_losses(schedule: &str) -> bool {
    matches!(schedule, "gpipe" | "looped-bfs")
}
