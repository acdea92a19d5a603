//! What serving adds to a search: batches that are chosen, and the time of a first token.
//!
//! Enters: a problem whose batch may be open. Leaves: the batches that are tried, and what their
//! searches found together.
//! Invariant: batches are compared by seconds a sequence, which is tokens a second the other way
//! round; the bound of all of them is the least of their bounds.

use meshweave_dsl::mapping::Mapping;

use super::grids::{Grid, LayerKey, grid_of};
use super::search::{N_RUNNERS_UP, Outcome, Priced};
use super::space::{Allowed, Space};
use super::{Counts, Problem};
use crate::plan::estimate::{Job, Software, Workload, estimate, memory};

/// Steps of the ladder of batches from one power of two to the next.
pub(super) const STEPS_A_DOUBLING: usize = 16;

/// The batches that are tried, greatest first: it makes most of what is read once a step, so that the
/// others are often pruned by it.
pub(super) fn batches(problem: &Problem<'_>) -> Vec<usize> {
    let mut found = match &problem.space.batches {
        Allowed::Among(batches) => batches.clone(),
        Allowed::Any => ladder(problem),
    };
    found.sort_unstable_by(|a, b| b.cmp(a));
    found.dedup();
    found
}

/// Batches in steps of a sixteenth of a power of two, and such multiples of the odd part of the number
/// of devices, up to what all devices together can hold.
fn ladder(problem: &Problem<'_>) -> Vec<usize> {
    let most = most_sequences(problem);
    let mut odd = problem.cluster.n_devices().max(1);
    while odd.is_multiple_of(2) {
        odd /= 2;
    }
    let mut found = Vec::new();
    for unit in [1, odd] {
        let mut doubled = 1;
        while doubled * unit <= most {
            let step = (doubled / STEPS_A_DOUBLING).max(1);
            let rungs = (doubled..2 * doubled).step_by(step).map(|rung| rung * unit);
            found.extend(rungs.filter(|batch| *batch <= most));
            doubled *= 2;
        }
    }
    found
}

/// Sequences whose keys and values fit all devices beside one copy of the weights, if they were divided
/// without a rest.
fn most_sequences(problem: &Problem<'_>) -> usize {
    let one = Workload {
        batch: 1,
        ..problem.workload.clone()
    };
    let budget = problem.space.budget_bytes as f64 * problem.cluster.n_devices() as f64;
    let of = |precision| {
        let mapping = Mapping::data_parallel(1, 1, precision);
        let held = memory(&one, &mapping, problem.cluster, 0);
        let left = budget - held.parameters.0 as f64;
        (left / held.cache.0.max(1) as f64).max(1.0) as usize
    };
    let precisions = problem.space.precisions.iter();
    precisions
        .map(|precision| of(*precision))
        .max()
        .unwrap_or(1)
}

/// Seconds until a replica of this grid has read a prompt and said its first token, alone; `None` where
/// nothing is generated.
pub(super) fn first_token_s(problem: &Problem<'_>, grid: Grid, key: &LayerKey) -> Option<f64> {
    let Job::Decode { .. } = problem.workload.job else {
        return None;
    };
    prefill_s(problem, &grid.mapping(key))
}

/// The same of a mapping.
pub(super) fn prefill_s(problem: &Problem<'_>, mapping: &Mapping) -> Option<f64> {
    let workload = Workload {
        software: Software {
            // Prompts differ in length: nothing is recorded.
            launch_s: Software::default().launch_s,
            ..problem.workload.software.clone()
        },
        batch: mapping.dp,
        job: Job::Prefill,
        ..problem.workload.clone()
    };
    let one = Mapping {
        micro_batch: 1,
        ..mapping.clone()
    };
    let found = estimate(&workload, &one, problem.cluster).ok()?;
    Some(found.step_s)
}

/// Seconds a sequence, weighed by preferences.
fn cost(space: &Space, priced: &Priced) -> f64 {
    let factors = space
        .preferences
        .iter()
        .map(|one| one.factor(&priced.mapping));
    factors.product::<f64>() * priced.estimate.step_s / priced.batch as f64
}

/// What the searches of several batches found.
#[derive(Default)]
pub(super) struct Sweep {
    outcome: Option<Outcome>,
    /// Seconds a sequence that nothing beats.
    least_cost: f64,
    best_cost: Option<f64>,
}

impl Sweep {
    /// Seconds a step of so many sequences must take less than to be of interest.
    pub fn better_than_s(&self, batch: usize) -> Option<f64> {
        Some(self.best_cost? * batch as f64)
    }

    /// Adds what the search of a batch found.
    pub fn add(&mut self, space: &Space, batch: usize, found: Outcome) {
        let bound = found.seen.lower_bound_s / batch as f64;
        let Some(known) = &mut self.outcome else {
            self.least_cost = bound;
            self.best_cost = found.best.first().map(|best| cost(space, best));
            self.outcome = Some(found);
            return;
        };
        self.least_cost = self.least_cost.min(bound);
        known.seen.counts = known.seen.counts.and(found.seen.counts);
        known.is_out_of_time |= found.is_out_of_time;
        known.best.extend(found.best);
        known.of_family.extend(found.of_family);
        known.best.sort_by(|a, b| {
            let (a, b) = (cost(space, a), cost(space, b));
            a.total_cmp(&b)
        });
        // Of a grid its best batch.
        let mut seen = Vec::new();
        known.best.retain(|priced| {
            let grid = grid_of(&priced.mapping);
            let is_new = !seen.contains(&grid);
            seen.push(grid);
            is_new
        });
        known.best.truncate(1 + N_RUNNERS_UP);
        self.best_cost = known.best.first().map(|best| cost(space, best));
        // What stood in the way of the least batch says most.
        known.objections = found.objections;
        known.seen.closest = found.seen.closest.or(known.seen.closest.take());
        known.seen.unpriced = found.seen.unpriced;
        known.seen.fastest_s = known.seen.fastest_s.min(found.seen.fastest_s);
        known.seen.fastest_first_s = known.seen.fastest_first_s.min(found.seen.fastest_first_s);
    }

    /// Everything, with the bound in seconds of a step of the best batch.
    pub fn finish(self) -> Option<Outcome> {
        let mut outcome = self.outcome?;
        if let Some(best) = outcome.best.first() {
            outcome.seen.lower_bound_s =
                (self.least_cost * best.batch as f64).min(best.estimate.step_s);
        }
        Some(outcome)
    }

    /// How much was looked at.
    pub fn counts(&self) -> Counts {
        self.outcome
            .as_ref()
            .map_or_else(Counts::default, |outcome| outcome.seen.counts)
    }
}
