//! How long a pipeline takes, in closed form.
//!
//! Enters: the passes of every pipeline rank for one microbatch, a schedule's name. Leaves: seconds in
//! which the rank that sets the pace waits.
//! Invariant: never below the work of the busiest rank.

/// Seconds of a pipeline rank for one microbatch, all its chunks together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RankWork {
    pub forward_s: f64,
    /// Recomputation included.
    pub backward_input_s: f64,
    pub backward_weight_s: f64,
}

impl RankWork {
    /// All of it.
    pub fn seconds(&self) -> f64 {
        self.forward_s + self.backward_input_s + self.backward_weight_s
    }
}

/// The rank that sets the pace, and the seconds that it waits for others.
///
/// - `1f1b` and `gpipe`: Σ over the other ranks of a microbatch (Narayanan et al., SC 2021, §2.2.1,
///   with stages of unequal length); interleaved: that over the number of chunks (§2.2.2).
/// - `zb-1p` (ZB-H1): (p − 1)(F + B − W); `zb-2p` (ZB-H2): (p − 1)(F + B − 2 W), at least 0 (Qi et al.,
///   arXiv 2401.10241, Table 1).
/// - `zb-v`, `dualpipe`: weight gradients fill the wait: (p − 1)(F + B − 2 W), at least 0; DualPipe
///   (p/2 − 1)(F + B − 3 W) (DeepSeek-V3, arXiv 2412.19437, Table 2), in which B is the whole backward.
pub fn wait_s(schedule: &str, chunks: usize, ranks: &[RankWork]) -> (usize, f64) {
    let pace = (0..ranks.len())
        .max_by(|a, b| ranks[*a].seconds().total_cmp(&ranks[*b].seconds()))
        .unwrap_or(0);
    let sum = |of: fn(&RankWork) -> f64| -> f64 {
        let others = ranks.iter().enumerate().filter(|(rank, _)| *rank != pace);
        others.map(|(_, work)| of(work)).sum()
    };
    let forward = sum(|work| work.forward_s);
    let input = sum(|work| work.backward_input_s);
    let weight = sum(|work| work.backward_weight_s);
    let chunks = chunks.max(1) as f64;
    let wait = match schedule {
        "zb-1p" | "zb-h1" => (forward + input - weight).max(0.0),
        "zb-2p" | "zb-h2" => (forward + input - 2.0 * weight).max(0.0),
        "zb-v" => (forward + input - 2.0 * weight).max(0.0) / chunks,
        "v-half" => (forward + input).max(0.0) / chunks,
        "v-min" => (forward + input + weight) / chunks,
        "dualpipe" | "dualpipe-v" => 0.5 * (forward + input - 2.0 * weight).max(0.0),
        _ => (forward + input + weight) / chunks,
    };
    (pace, wait)
}

/// The same where tokens are generated: a microbatch's next token begins when its last one is there,
/// and nothing drains in between. A round takes as long as the slowest rank's work, or as a microbatch
/// takes through all ranks if there are too few of them to fill the pipeline.
pub fn round_wait_s(n_microbatches: f64, ranks: &[RankWork]) -> (usize, f64) {
    let slowest = |a: &usize, b: &usize| ranks[*a].seconds().total_cmp(&ranks[*b].seconds());
    let pace = (0..ranks.len()).max_by(slowest).unwrap_or(0);
    let through: f64 = ranks.iter().map(RankWork::seconds).sum();
    let work = ranks.get(pace).map_or(0.0, RankWork::seconds);
    (pace, (through - n_microbatches * work).max(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bubbles_of_the_papers() {
        let work = RankWork {
            forward_s: 1.0,
            backward_input_s: 1.0,
            backward_weight_s: 1.0,
        };
        let ranks = [work; 4];
        assert_eq!(wait_s("1f1b", 1, &ranks).1, 9.0);
        assert_eq!(wait_s("interleaved", 3, &ranks).1, 3.0);
        assert_eq!(wait_s("zb-1p", 1, &ranks).1, 3.0);
        assert_eq!(wait_s("zb-2p", 1, &ranks).1, 0.0);
        // Tokens of four microbatches fill four ranks; those of one leave three of them idle.
        assert_eq!(round_wait_s(4.0, &ranks).1, 0.0);
        assert_eq!(round_wait_s(1.0, &ranks).1, 9.0);
    }
}
