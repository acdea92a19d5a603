//! Cuts of the layers into stages.
//!
//! Enters: what each layer takes, and both ends of the model. Leaves: how many layers each stage has.
//! Invariant: the slowest stage is as fast as any cut within the slack can make it.

use super::bound::{LayerCosts, SLACK};

/// The cut whose slowest stage is fastest, by dynamic programming over layers × stages; `None` where
/// the even cut is as good. O(stages · layers · slack).
///
/// Among cuts of equal slowest stages the first ones are fuller, as in the even cut.
pub(super) fn balanced(costs: &LayerCosts, n_stages: usize) -> Option<Vec<usize>> {
    let n_layers = costs.layers.len();
    let mut sums = vec![0.0];
    for cost in &costs.layers {
        let before = sums.last().copied().unwrap_or(0.0);
        sums.push(before + cost);
    }
    let stage_s = |stage: usize, first: usize, end: usize| {
        let mut seconds = sums[end] - sums[first];
        if stage == 0 {
            seconds += costs.first;
        }
        if stage + 1 == n_stages {
            seconds += costs.last;
        }
        seconds
    };
    let even = |stage: usize| n_layers / n_stages + usize::from(stage < n_layers % n_stages);
    let fewest = (n_layers / n_stages).saturating_sub(SLACK).max(1);
    let most = n_layers.div_ceil(n_stages) + SLACK;
    // best[end]: (slowest stage so far, sum of squares, layers of the last stage).
    let mut best: Vec<Vec<Option<(f64, f64, usize)>>> =
        vec![vec![None; n_layers + 1]; n_stages + 1];
    best[0][0] = Some((0.0, 0.0, 0));
    for stage in 0..n_stages {
        for first in (0..=n_layers).rev() {
            let Some((slowest, squares, _)) = best[stage][first] else {
                continue;
            };
            for count in (fewest..=most)
                .rev()
                .filter(|count| first + count <= n_layers)
            {
                let end = first + count;
                let seconds = stage_s(stage, first, end);
                let with = (slowest.max(seconds), squares + seconds * seconds, count);
                let is_better = best[stage + 1][end].is_none_or(|(known, known_squares, _)| {
                    with.0 < known || with.0 == known && with.1 < known_squares
                });
                if is_better {
                    best[stage + 1][end] = Some(with);
                }
            }
        }
    }
    let (slowest, _, _) = best[n_stages][n_layers]?;
    let mut counts = vec![0; n_stages];
    let mut end = n_layers;
    for stage in (0..n_stages).rev() {
        let (_, _, count) = best[stage + 1][end]?;
        counts[stage] = count;
        end -= count;
    }
    let mut first = 0;
    let mut evenly = 0.0_f64;
    for stage in 0..n_stages {
        evenly = evenly.max(stage_s(stage, first, first + even(stage)));
        first += even(stage);
    }
    (slowest < evenly * (1.0 - 1e-9)).then_some(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heavy_head_takes_layers_off_the_last_stage() {
        let costs = LayerCosts {
            layers: vec![1.0; 16],
            first: 0.0,
            last: 1.5,
        };
        assert_eq!(balanced(&costs, 4), Some(vec![5, 4, 4, 3]));
        let level = LayerCosts { last: 0.0, ..costs };
        assert_eq!(balanced(&level, 4), None);
    }
}
