//! Cuts of the layers into stages.
//!
//! Enters: what each layer takes, and both ends of the model; for memory also a mapping and its budget.
//! Leaves: how many layers each stage has, and how many of them are computed again.
//! Invariant: the slowest stage is as fast as any cut within the slack can make it.

use std::collections::BTreeMap;

use meshweave_dsl::mapping::{Mapping, Pipeline};

use super::Problem;
use super::bound::{LayerCosts, SLACK};
use super::saving::{by_rank, fewest_of_rank};

/// The cut whose slowest stage is fastest; `None` where the even cut is as good.
/// O(stages · layers · slack).
///
/// Among cuts of equal slowest stages the first ones are fuller, as in the even cut.
pub(super) fn balanced(costs: &LayerCosts, n_stages: usize) -> Option<Vec<usize>> {
    let n_layers = costs.layers.len();
    let sums = Sums::of(costs, n_stages);
    let (slowest, counts) = fastest_cut(n_layers, n_stages, |stage, first, end| {
        Some(sums.stage_s(stage, first, end))
    })?;
    let even = |stage: usize| n_layers / n_stages + usize::from(stage < n_layers % n_stages);
    let mut first = 0;
    let mut evenly = 0.0_f64;
    for stage in 0..n_stages {
        evenly = evenly.max(sums.stage_s(stage, first, first + even(stage)));
        first += even(stage);
    }
    (slowest < evenly * (1.0 - 1e-9)).then_some(counts)
}

/// The cut whose slowest stage is fastest when each computes as few of its layers again as fit the
/// budget, for one stage a rank: a mapping with these stages and layers. `None` where no cut fits.
///
/// Stages that keep many microbatches get fewer layers, or compute more of them again: the first ones.
pub(super) fn balanced_in_memory(
    problem: &Problem<'_>,
    costs: &LayerCosts,
    base: &Mapping,
) -> Option<Mapping> {
    let (n_stages, n_layers) = (base.pp, costs.layers.len());
    let sums = Sums::of(costs, n_stages);
    // Memory knows kinds of layers, not which they are.
    let mut known: BTreeMap<(usize, usize, usize), Option<usize>> = BTreeMap::new();
    let mut fewest = |stage: usize, first: usize, end: usize| {
        let n_experts = (first..end)
            .filter(|layer| problem.workload.is_moe(*layer))
            .count();
        *known
            .entry((stage, end - first, n_experts))
            .or_insert_with(|| {
                let mut layers = vec![0; n_stages];
                layers[0] = first;
                layers[stage] = end - first;
                let mapping = Mapping {
                    pipeline: Pipeline {
                        layers: Some(layers),
                        ..base.pipeline.clone()
                    },
                    ..base.clone()
                };
                let ahead = match stage + 1 == n_stages {
                    true => problem.workload.prediction_layers,
                    false => 0,
                };
                fewest_of_rank(problem, &mapping, stage, end - first + ahead)
            })
    };
    let (_, layers) = fastest_cut(n_layers, n_stages, |stage, first, end| {
        // The last stage takes all that is left.
        if stage + 1 == n_stages && end != n_layers || stage == 0 && first != 0 {
            return None;
        }
        let count = fewest(stage, first, end)?;
        let again = count as f64 / (end - first).max(1) as f64;
        Some(sums.stage_s(stage, first, end) + again.min(1.0) * sums.again_s(first, end))
    })?;
    let mut first = 0;
    let mut counts = Vec::with_capacity(n_stages);
    for (stage, n_own) in layers.iter().enumerate() {
        counts.push(fewest(stage, first, first + n_own)?);
        first += n_own;
    }
    Some(Mapping {
        pipeline: Pipeline {
            layers: Some(layers),
            ..base.pipeline.clone()
        },
        recompute: by_rank(counts),
        ..base.clone()
    })
}

/// Seconds of the layers before each.
struct Sums {
    passes: Vec<f64>,
    again: Vec<f64>,
    first: f64,
    last: f64,
    n_stages: usize,
}

impl Sums {
    fn of(costs: &LayerCosts, n_stages: usize) -> Self {
        let sums = |layers: &[f64]| {
            let mut sums = vec![0.0];
            for cost in layers {
                let before = sums.last().copied().unwrap_or(0.0);
                sums.push(before + cost);
            }
            sums
        };
        Self {
            passes: sums(&costs.layers),
            again: sums(&costs.again),
            first: costs.first,
            last: costs.last,
            n_stages,
        }
    }

    fn stage_s(&self, stage: usize, first: usize, end: usize) -> f64 {
        let mut seconds = self.passes[end] - self.passes[first];
        if stage == 0 {
            seconds += self.first;
        }
        if stage + 1 == self.n_stages {
            seconds += self.last;
        }
        seconds
    }

    /// Of computing all of these layers again.
    fn again_s(&self, first: usize, end: usize) -> f64 {
        self.again[end] - self.again[first]
    }
}

/// The slowest stage's seconds and the layers of each stage, such that the former are least, by dynamic
/// programming over layers × stages. A stage without seconds is not possible.
fn fastest_cut(
    n_layers: usize,
    n_stages: usize,
    mut stage_s: impl FnMut(usize, usize, usize) -> Option<f64>,
) -> Option<(f64, Vec<usize>)> {
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
                let Some(seconds) = stage_s(stage, first, end) else {
                    continue;
                };
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
    Some((slowest, counts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heavy_head_takes_layers_off_the_last_stage() {
        let costs = LayerCosts {
            layers: vec![1.0; 16],
            again: vec![0.0; 16],
            paired: vec![1.0; 16],
            forwards: vec![0.3; 16],
            first: 0.0,
            first_forward: 0.0,
            last: 1.5,
            last_paired: 1.5,
        };
        assert_eq!(balanced(&costs, 4), Some(vec![5, 4, 4, 3]));
        let level = LayerCosts { last: 0.0, ..costs };
        assert_eq!(balanced(&level, 4), None);
    }
}
