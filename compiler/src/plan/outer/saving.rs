//! Ways to save memory within a layer, the worthwhile ones.
//!
//! Enters: the choices of a layer, a mapping. Leaves: what may be computed again, without what costs
//! more time and saves no more memory than something else (the Pareto front of Mist, EuroSys'25).
//! Invariant: the front is of one layer's seconds and bytes, which are additive over layers.

use std::collections::BTreeSet;

use meshweave_dsl::mapping::{Mapping, Module, Recompute};

use super::Problem;
use super::bound::Layers;
use super::expand::budget_of_rank;
use super::grids::LayerKey;
use super::space::Whole;
use crate::plan::estimate::memory;
use crate::plan::estimate::stages::Stages;

/// What may be computed again in this mapping, least first, its own recomputation included; with the
/// seconds that it takes at least.
pub(super) fn savings(
    problem: &Problem<'_>,
    layers: &Layers,
    key: &LayerKey,
    base: &Mapping,
) -> Vec<(f64, Recompute)> {
    let space = problem.space;
    let mut found = Vec::new();
    if space.whole.contains(&Whole::None) {
        let sets = layers.module_sets(problem, key);
        // What the required parts take is in the price of the point already.
        let least_s = sets.first().map_or(0.0, |(seconds, _)| *seconds);
        // The slowest rank computes its fair share again, in every microbatch.
        let share = base.n_microbatches(problem.workload.batch) as f64 / base.pp as f64;
        found.extend(sets.iter().map(|(seconds, set)| {
            // Where devices differ, the seconds are those of some, not of the slowest rank.
            let at_least_s = match problem.cluster.is_mixed() {
                true => 0.0,
                false => share * (seconds - least_s),
            };
            let recompute = match set.is_empty() {
                true => Recompute::None,
                false => Recompute::Modules(set.clone()),
            };
            (at_least_s, recompute)
        }));
    }
    for whole in &space.whole {
        match whole {
            Whole::None => {}
            Whole::Full => found.push((0.0, Recompute::Full)),
            Whole::First(Some(count)) => found.push((0.0, Recompute::Layers(*count))),
            // Beside offloading, more than the fewest could be faster: that is not searched.
            Whole::First(None) if space.again.is_empty() && base.offload.activations == 0.0 => {
                found.extend(fewest_layers(problem, base).map(|fewest| (0.0, fewest)));
            }
            Whole::First(None) => {}
            Whole::Ranks(counts) if counts.len() == base.pp => {
                found.push((0.0, Recompute::LayersByRank(counts.clone())));
            }
            Whole::Ranks(_) => {}
        }
    }
    found
}

/// The fewest whole layers of each rank that must be computed again to fit: ranks do not share memory,
/// and no rank is faster for what another one computes again.
fn fewest_layers(problem: &Problem<'_>, base: &Mapping) -> Option<Recompute> {
    let stages = Stages::new(problem.workload, base);
    let counts: Option<Vec<usize>> = (0..base.pp)
        .map(|rank| {
            let most = stages.n_layers_of(rank, problem.workload);
            fewest_of_rank(problem, base, rank, most)
        })
        .collect();
    counts.map(by_rank)
}

/// So many layers of each rank, in the shortest words.
pub(super) fn by_rank(counts: Vec<usize>) -> Recompute {
    match counts.as_slice() {
        [first, others @ ..] if others.iter().all(|count| count == first) => match first {
            0 => Recompute::None,
            count => Recompute::Layers(*count),
        },
        _ => Recompute::LayersByRank(counts),
    }
}

/// The fewest of a rank's `most` layers that must be computed again for it to fit, by bisection: memory
/// falls with their number. Nothing computed again may take less than one layer, whose buffers count.
pub(super) fn fewest_of_rank(
    problem: &Problem<'_>,
    base: &Mapping,
    rank: usize,
    most: usize,
) -> Option<usize> {
    let budget = budget_of_rank(problem, base, rank);
    let fits = |count: usize| {
        let mut counts = vec![0; base.pp];
        counts[rank] = count;
        let mapping = Mapping {
            recompute: Recompute::LayersByRank(counts),
            ..base.clone()
        };
        let held = memory(problem.workload, &mapping, problem.cluster, rank);
        held.total().0 <= budget
    };
    if fits(0) {
        return Some(0);
    }
    if most == 0 || !fits(most) {
        return None;
    }
    let (mut too_few, mut enough) = (0, most);
    while enough - too_few > 1 {
        let middle = too_few.midpoint(enough);
        if fits(middle) {
            enough = middle;
        } else {
            too_few = middle;
        }
    }
    Some(enough)
}

/// All sets of parts that hold the required ones, each with (seconds, bytes saved) of a microbatch,
/// without the dominated ones; by seconds.
pub(super) fn front(
    again: &BTreeSet<Module>,
    worth: &[(Module, f64, f64)],
) -> Vec<(f64, BTreeSet<Module>)> {
    let optional: Vec<&(Module, f64, f64)> = worth
        .iter()
        .filter(|(module, _, bytes)| !again.contains(module) && *bytes > 0.0)
        .collect();
    let mut sets: Vec<(f64, f64, BTreeSet<Module>)> = Vec::new();
    for chosen in 0..1u32 << optional.len() {
        let mut set = again.clone();
        let (mut seconds, mut bytes) = (0.0, 0.0);
        for (idx, (module, own_s, own_bytes)) in optional.iter().enumerate() {
            if chosen & (1 << idx) != 0 {
                set.insert(*module);
                seconds += own_s;
                bytes += own_bytes;
            }
        }
        // The experts are computed again with their activation.
        let is_nested = set.contains(&Module::Moe) && set.contains(&Module::MoeActivation);
        if !is_nested || again.contains(&Module::MoeActivation) {
            sets.push((seconds, bytes, set));
        }
    }
    sets.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)));
    let mut most_saved = f64::NEG_INFINITY;
    sets.into_iter()
        .filter(|(_, bytes, _)| {
            let is_worthwhile = *bytes > most_saved;
            most_saved = most_saved.max(*bytes);
            is_worthwhile
        })
        .map(|(seconds, _, set)| (seconds, set))
        .collect()
}
