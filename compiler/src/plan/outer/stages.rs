//! Cuts of the layers into stages.
//!
//! Enters: what each layer takes, and both ends of the model; for memory also a mapping and its budget.
//! Leaves: how many layers each stage has, and how many of them are computed again.
//! Invariant: the slowest stage is as fast as any cut within the slack can make it; where devices
//! differ, as any cut can make it that the memory allows.

use std::collections::BTreeMap;

use meshweave_dsl::mapping::{Mapping, Offload, Pipeline, Recompute, Zero};

use super::Problem;
use super::bound::{LayerCosts, SLACK, groups_of_ranks};
use super::expand::{required, zero_stages};
use super::grids::{Grid, LayerKey};
use super::saving::{by_rank, fewest_of_rank};
use super::space::Whole;
use crate::plan::estimate::memory;
use crate::plan::estimate::sites::Sites;
use crate::plan::estimate::stages::Stages;

/// The cut whose slowest stage is fastest; `None` where the even cut is as good.
/// O(stages · layers · slack).
///
/// Among cuts of equal slowest stages the first ones are fuller, as in the even cut.
pub(super) fn balanced(costs: &LayerCosts, n_stages: usize) -> Option<Vec<usize>> {
    let n_layers = costs.layers.len();
    let sums = Sums::of(costs, n_stages);
    let even = |stage: usize| n_layers / n_stages + usize::from(stage < n_layers % n_stages);
    let mut first = 0;
    let mut evenly = 0.0_f64;
    for stage in 0..n_stages {
        evenly = evenly.max(sums.stage_s(stage, first, first + even(stage)));
        first += even(stage);
    }
    let limit_s = evenly * (1.0 - 1e-9);
    // So many of the cheapest layers are as slow: all stages have fewer.
    let cheapest = costs.layers.iter().copied().fold(f64::INFINITY, f64::min);
    let most = ((limit_s / cheapest) as usize).min(n_layers.div_ceil(n_stages) + SLACK);
    if most * n_stages < n_layers {
        return None;
    }
    let (_, counts) = fastest_cut(n_layers, n_stages, most, |stage, first, end| {
        Some(sums.stage_s(stage, first, end)).filter(|seconds| *seconds < limit_s)
    })?;
    Some(counts)
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
    let most = n_layers.div_ceil(n_stages) + SLACK;
    let (_, layers) = fastest_cut(n_layers, n_stages, most, |stage, first, end| {
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

/// The slowest stage's seconds and the layers of each stage, at most `most`, such that the former are
/// least, by dynamic programming over layers × stages. A stage without seconds is not possible.
fn fastest_cut(
    n_layers: usize,
    n_stages: usize,
    most: usize,
    mut stage_s: impl FnMut(usize, usize, usize) -> Option<f64>,
) -> Option<(f64, Vec<usize>)> {
    let fewest = (n_layers / n_stages).saturating_sub(SLACK).max(1);
    // best[end]: (slowest stage so far, sum of squares, layers of the last stage).
    let mut best: Vec<Vec<Option<(f64, f64, usize)>>> =
        vec![vec![None; n_layers + 1]; n_stages + 1];
    best[0][0] = Some((0.0, 0.0, 0));
    for stage in 0..n_stages {
        // What the stages behind this one can hold.
        let n_behind = n_stages - stage - 1;
        let ends =
            n_layers.saturating_sub(n_behind * most)..=n_layers.saturating_sub(n_behind * fewest);
        for first in (0..=n_layers).rev() {
            let Some((slowest, squares, _)) = best[stage][first] else {
                continue;
            };
            for count in (fewest..=most).rev() {
                let end = first + count;
                if !ends.contains(&end) {
                    continue;
                }
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

/// Seconds of a stage with the layers from `first` to before `end`, both ends of the model included.
fn stage_seconds(costs: &[&LayerCosts], stage: usize, first: usize, end: usize) -> f64 {
    let own = costs[stage];
    let mut seconds: f64 = own.layers[first..end].iter().sum();
    if stage == 0 {
        seconds += own.first;
    }
    if stage + 1 == costs.len() {
        seconds += own.last;
    }
    seconds
}

/// The cut whose slowest stage is fastest where stages are on different devices: each stage has its
/// own costs, at least one layer, and at most so many as its memory holds; `None` where there is no such
/// cut. Dynamic programming over stages × layers, O(stages · layers²).
///
/// Among cuts of equal slowest stages that with the least sum of squares wins: stages idle alike.
pub(super) fn uneven(costs: &[&LayerCosts], most: &[usize]) -> Option<Vec<usize>> {
    let n_layers = costs.first()?.layers.len();
    let n_stages = costs.len();
    // best[end]: (slowest stage so far, sum of squares).
    let mut best: Vec<Option<(f64, f64)>> = vec![None; n_layers + 1];
    best[0] = Some((0.0, 0.0));
    let mut counts: Vec<Vec<usize>> = Vec::with_capacity(n_stages);
    for stage in 0..n_stages {
        let mut next: Vec<Option<(f64, f64)>> = vec![None; n_layers + 1];
        let mut last_count = vec![0; n_layers + 1];
        let own = costs[stage];
        for (first, known) in best.iter().enumerate() {
            let Some((slowest, squares)) = known else {
                continue;
            };
            let mut seconds = stage_seconds(costs, stage, first, first);
            for end in first + 1..=n_layers.min(first + most[stage]) {
                seconds += own.layers[end - 1];
                let with = (slowest.max(seconds), squares + seconds * seconds);
                let is_better = next[end].is_none_or(|(known, known_squares)| {
                    with.0 < known || with.0 == known && with.1 < known_squares
                });
                if is_better {
                    next[end] = Some(with);
                    last_count[end] = end - first;
                }
            }
        }
        best = next;
        counts.push(last_count);
    }
    best[n_layers]?;
    let mut cut = vec![0; n_stages];
    let mut end = n_layers;
    for stage in (0..n_stages).rev() {
        cut[stage] = counts[stage][end];
        end -= cut[stage];
    }
    Some(cut)
}

/// Cuts for stages on different devices: the fastest one, and the fastest ones whose stages fit with
/// nothing saved, and with everything saved that may be.
pub(super) fn cuts_by_device(
    problem: &Problem<'_>,
    grid: Grid,
    key: &LayerKey,
    pipeline: &Pipeline,
    costs: &LayerCosts,
) -> Vec<Vec<usize>> {
    let space = problem.space;
    let n_layers = problem.workload.model.n_layers;
    let plain = Mapping {
        pipeline: pipeline.clone(),
        recompute: required(&space.again),
        ..grid.mapping(key)
    };
    let stages = Stages::new(problem.workload, &plain);
    let groups = groups_of_ranks(problem, &plain);
    let n_stages = plain.n_stages();
    let of_stages: Vec<&LayerCosts> = (0..n_stages)
        .map(|stage| costs.of_group(groups[stages.rank_of(stage)]))
        .collect();
    let zero = |stage: u8| Zero { stage, group: None };
    let zero_stages = zero_stages(space, grid);
    let saving = Mapping {
        zero: zero(zero_stages.iter().copied().max().unwrap_or(0)),
        offload: Offload {
            optimizer: space.offload_optimizer.contains(&true),
            activations: space
                .offload_activations
                .iter()
                .copied()
                .fold(0.0, f64::max),
        },
        recompute: match space.whole.iter().any(|whole| *whole != Whole::None) {
            true => Recompute::Full,
            false => required(&(&space.again | &space.maybe_again)),
        },
        ..plain.clone()
    };
    let keeping = Mapping {
        zero: zero(zero_stages.first().copied().unwrap_or(0)),
        ..plain.clone()
    };
    let mut found: Vec<Vec<usize>> = Vec::new();
    let limits = [
        Some(vec![n_layers; n_stages]),
        most_layers(problem, &keeping, &stages),
        most_layers(problem, &saving, &stages),
    ];
    for most in limits.into_iter().flatten() {
        let cut = uneven(&of_stages, &most);
        found.extend(cut.filter(|cut| !found.contains(cut)));
    }
    found
}

/// How many layers each stage holds at most with this way of saving memory; `None` where one holds none.
/// The chunks of a rank hold as many each.
fn most_layers(problem: &Problem<'_>, mapping: &Mapping, stages: &Stages) -> Option<Vec<usize>> {
    let n_layers = problem.workload.model.n_layers;
    let n_stages = mapping.n_stages();
    let chunks = mapping.pipeline.chunks;
    let sites = Sites::new(problem.cluster, mapping);
    let of_rank = |rank: usize| {
        let budget = problem.space.budget_of(sites.of(rank), problem.cluster);
        let n_others = n_stages - chunks;
        let most = match n_others {
            0 => n_layers.div_ceil(chunks),
            _ => n_layers.saturating_sub(n_others) / chunks,
        };
        let fits = |count: usize| {
            let mut left = n_layers.saturating_sub(count * chunks);
            let mut others = n_others;
            let layers = (0..n_stages)
                .map(|stage| {
                    if stages.rank_of(stage) == rank {
                        return count;
                    }
                    let own = left.div_ceil(others.max(1));
                    left -= own;
                    others = others.saturating_sub(1);
                    own
                })
                .collect();
            let mut with = mapping.clone();
            with.pipeline.layers = Some(layers);
            memory(problem.workload, &with, problem.cluster, rank)
                .total()
                .0
                <= budget
        };
        if most == 0 || !fits(1) {
            return None;
        }
        let (mut enough, mut too_many) = (1, most + 1);
        while too_many - enough > 1 {
            let middle = enough.midpoint(too_many);
            if fits(middle) {
                enough = middle;
            } else {
                too_many = middle;
            }
        }
        Some(enough)
    };
    let of_ranks: Option<Vec<usize>> = (0..mapping.pp).map(of_rank).collect();
    let of_ranks = of_ranks?;
    Some(
        (0..n_stages)
            .map(|stage| of_ranks[stages.rank_of(stage)])
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Costs of like devices, forwards a third of them.
    fn alike(layers: Vec<f64>, first: f64, last: f64) -> LayerCosts {
        LayerCosts {
            again: vec![0.0; layers.len()],
            paired: layers.clone(),
            forwards: layers.iter().map(|seconds| seconds / 3.0).collect(),
            layers,
            first,
            first_forward: first / 3.0,
            last,
            last_paired: last,
            of_groups: Vec::new(),
            drag: 1.0,
        }
    }

    #[test]
    fn a_heavy_head_takes_layers_off_the_last_stage() {
        let costs = |last| alike(vec![1.0; 16], 0.0, last);
        assert_eq!(balanced(&costs(1.5), 4), Some(vec![5, 4, 4, 3]));
        assert_eq!(balanced(&costs(0.0), 4), None);
    }

    #[test]
    fn slow_stages_and_small_ones_get_fewer_layers() {
        let (fast, slow) = (
            alike(vec![1.0; 12], 0.0, 0.0),
            alike(vec![2.0; 12], 0.0, 0.0),
        );
        let stages = [&fast, &slow, &fast];
        assert_eq!(uneven(&stages, &[12; 3]), Some(vec![5, 2, 5]));
        assert_eq!(uneven(&stages, &[12, 12, 3]), Some(vec![6, 3, 3]));
        assert_eq!(uneven(&stages, &[3, 3, 3]), None);
    }

    /// The least time of the slowest stage over all cuts, by listing them.
    fn listed(stages: &[&LayerCosts], most: &[usize]) -> Option<f64> {
        fn go(stages: &[&LayerCosts], most: &[usize], stage: usize, first: usize) -> Option<f64> {
            let n_layers = stages[0].layers.len();
            if stage == stages.len() {
                return (first == n_layers).then_some(0.0);
            }
            (1..=most[stage].min(n_layers - first))
                .filter_map(|count| {
                    let rest = go(stages, most, stage + 1, first + count)?;
                    Some(rest.max(stage_seconds(stages, stage, first, first + count)))
                })
                .min_by(f64::total_cmp)
        }
        go(stages, most, 0, 0)
    }

    proptest::proptest! {
        #[test]
        fn no_cut_has_a_faster_slowest_stage(
            layers in proptest::collection::vec(1u32..9, 1..9),
            speeds in proptest::collection::vec((1u32..5, 1usize..6), 1..5),
            ends in (0u32..5, 0u32..9),
        ) {
            let costs: Vec<LayerCosts> = speeds
                .iter()
                .map(|(speed, _)| {
                    let of = |seconds: u32| f64::from(seconds * speed);
                    let layers = layers.iter().map(|layer| of(*layer)).collect();
                    alike(layers, of(ends.0), of(ends.1))
                })
                .collect();
            let stages: Vec<&LayerCosts> = costs.iter().collect();
            let most: Vec<usize> = speeds.iter().map(|(_, most)| *most).collect();
            let found = uneven(&stages, &most);
            let slowest = found.map(|cut| {
                assert!(cut.iter().zip(&most).all(|(count, most)| (1..=*most).contains(count)));
                let mut first = 0;
                let mut slowest = 0.0_f64;
                for (stage, count) in cut.iter().enumerate() {
                    slowest = slowest.max(stage_seconds(&stages, stage, first, first + count));
                    first += count;
                }
                assert_eq!(first, layers.len());
                slowest
            });
            assert_eq!(slowest, listed(&stages, &most));
        }
    }
}
