//! Finds a schedule for given stages under a memory limit.
//!
//! Enters: stages with costs, in one or more placements. Leaves: the best schedule found, with the
//! best built-in one beside it.
//! Invariant: the result is never slower than a built-in schedule of these placements that fits the
//! limit, since those are candidates; the search is deterministic and bounded by the number of
//! actions it simulates.
//!
//! Three steps: built-in schedules, also backfilled; greedy list schedules under several policies
//! ([`super::greedy`]); then swaps of neighbors on the critical path of the best ones (the
//! neighborhood of van Laarhoven, Aarts and Lenstra 1992 for job shops). [`super::exact`] proves
//! optima at small sizes.

use meshweave_dsl::schedule::{Schedule, Updates};
use serde::{Deserialize, Serialize};

use super::PipelineError;
use super::backfill::{backfill, hasten_drain};
use super::builtin::{Builtin, Placement, Shape, build};
use super::check::check;
use super::greedy::{POLICIES, greedy};
use super::memory::{amount, replay};
use super::simulate::{Costs, Simulation, simulate};

/// Stages in one placement.
#[derive(Clone, Debug, PartialEq)]
pub struct Stages {
    pub placement: Placement,
    pub n_chunks: usize,
    /// One entry of costs a stage.
    pub costs: Costs,
}

/// What to search within.
#[derive(Clone, Debug, PartialEq)]
pub struct SearchOptions {
    pub n_ranks: usize,
    pub n_microbatches: usize,
    /// Bytes of activations that a rank may hold.
    pub memory_limit_bytes: Option<f64>,
    /// Actions to simulate at most, over all candidates.
    pub max_actions: usize,
}

impl SearchOptions {
    /// A budget of some seconds.
    pub fn new(n_ranks: usize, n_microbatches: usize) -> Self {
        Self {
            n_ranks,
            n_microbatches,
            memory_limit_bytes: None,
            max_actions: 20_000_000,
        }
    }
}

/// What a search found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Found {
    pub schedule: Schedule,
    /// Predicted.
    pub simulation: Simulation,
    /// Built-in schedules that fit: name, chunks, predicted step, peak; the fastest first.
    pub builtins: Vec<Candidate>,
    /// Schedules that were simulated.
    pub n_simulated: usize,
}

/// A built-in schedule with its prediction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    pub name: String,
    pub n_chunks: usize,
    pub step_s: f64,
    pub peak_bytes: f64,
}

/// How many of the best candidates are improved by swaps.
const N_IMPROVED: usize = 4;

struct Search<'a> {
    options: &'a SearchOptions,
    n_actions_left: usize,
    n_simulated: usize,
    /// Fastest first: step, index of its stages, schedule.
    best: Vec<(f64, usize, Schedule)>,
}

/// Searches schedules for `stages`, which all divide the same model. Time is bounded by
/// `max_actions`.
///
/// # Errors
/// [`PipelineError::Infeasible`] with the least peak found when nothing fits the limit;
/// [`PipelineError::Invalid`] when costs do not fit their placement.
pub fn search(stages: &[Stages], options: &SearchOptions) -> Result<Found, PipelineError> {
    let mut search = Search {
        options,
        n_actions_left: options.max_actions,
        n_simulated: 0,
        best: Vec::new(),
    };
    let mut builtins = Vec::new();
    let mut least_peak_bytes = f64::INFINITY;
    for (stages_idx, stages) in stages.iter().enumerate() {
        let costs = search.limited(&stages.costs);
        for schedule in candidates(stages, options, &costs)? {
            let simulation = simulate(&schedule, &costs)?;
            least_peak_bytes = least_peak_bytes.min(simulation.peak());
            if search.fits(&simulation) {
                builtins.push(Candidate {
                    name: schedule.name.clone(),
                    n_chunks: stages.n_chunks,
                    step_s: simulation.step_s,
                    peak_bytes: simulation.peak(),
                });
                let filled = backfill(&hasten_drain(&schedule), &costs)?;
                search.offer(stages_idx, schedule, &costs)?;
                search.offer(stages_idx, filled, &costs)?;
            }
        }
        for policy in POLICIES {
            if search.n_actions_left == 0 {
                break;
            }
            // A policy may run into its limit on some placements: then it gives nothing.
            if let Some(schedule) = greedy(stages, options, policy) {
                let filled = backfill(&schedule, &costs)?;
                search.offer(stages_idx, schedule, &costs)?;
                search.offer(stages_idx, filled, &costs)?;
            }
        }
    }
    builtins.sort_by(|a, b| a.step_s.total_cmp(&b.step_s));
    for nth in 0..N_IMPROVED.min(search.best.len()) {
        let (_, stages_idx, schedule) = search.best[nth].clone();
        let costs = search.limited(&stages[stages_idx].costs);
        let improved = search.improve(schedule, &costs)?;
        search.offer(stages_idx, improved, &costs)?;
    }
    let Some((_, stages_idx, schedule)) = search.best.first().cloned() else {
        return Err(PipelineError::Infeasible(format!(
            "no schedule found holds at most {} of activations a rank; the least is {}; recompute, \
             offload, or take more ranks",
            amount(options.memory_limit_bytes.unwrap_or(f64::INFINITY)),
            amount(least_peak_bytes)
        )));
    };
    check(&schedule).map_err(|error| {
        PipelineError::Internal(format!("the schedule found is wrong: {error}"))
    })?;
    let costs = search.limited(&stages[stages_idx].costs);
    Ok(Found {
        simulation: simulate(&schedule, &costs)?,
        schedule,
        builtins,
        n_simulated: search.n_simulated,
    })
}

/// The built-in schedules of a placement: one copy of the model, whole sequences, one update.
fn candidates(
    stages: &Stages,
    options: &SearchOptions,
    costs: &Costs,
) -> Result<Vec<Schedule>, PipelineError> {
    let shape = Shape::new(options.n_ranks, options.n_microbatches).chunks(stages.n_chunks);
    let mut schedules = Vec::new();
    for builtin in Builtin::ALL {
        let fits = builtin.placement() == stages.placement
            && builtin.fixed_chunks().unwrap_or(stages.n_chunks) == stages.n_chunks
            && !builtin.is_sliced();
        if !fits {
            continue;
        }
        match build(builtin, &shape, Some(costs)) {
            Ok(schedule) if schedule.updates == Updates::Flush => schedules.push(schedule),
            Ok(_) | Err(PipelineError::Invalid(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(schedules)
}

impl Search<'_> {
    fn limited(&self, costs: &Costs) -> Costs {
        Costs {
            memory_limit_bytes: self.options.memory_limit_bytes,
            ..costs.clone()
        }
    }

    fn fits(&self, simulation: &Simulation) -> bool {
        let limit_bytes = self.options.memory_limit_bytes.unwrap_or(f64::INFINITY);
        simulation.peak() <= limit_bytes * (1.0 + 1e-9)
    }

    fn simulate(&mut self, schedule: &Schedule, costs: &Costs) -> Option<Simulation> {
        self.n_actions_left = self.n_actions_left.saturating_sub(schedule.n_actions());
        self.n_simulated += 1;
        simulate(schedule, costs).ok()
    }

    /// Keeps a schedule that fits, in order.
    fn offer(
        &mut self,
        stages_idx: usize,
        schedule: Schedule,
        costs: &Costs,
    ) -> Result<(), PipelineError> {
        let Some(simulation) = self.simulate(&schedule, costs) else {
            return Ok(());
        };
        if !self.fits(&simulation) {
            return Ok(());
        }
        let at = self
            .best
            .partition_point(|(step_s, _, _)| *step_s <= simulation.step_s);
        let is_known = self.best[..at]
            .iter()
            .any(|(_, _, other)| other.rows == schedule.rows);
        if !is_known {
            self.best
                .insert(at, (simulation.step_s, stages_idx, schedule));
            self.best.truncate(2 * N_IMPROVED);
        }
        Ok(())
    }

    /// Swaps neighbors on the critical path while that shortens the step.
    fn improve(
        &mut self,
        mut schedule: Schedule,
        costs: &Costs,
    ) -> Result<Schedule, PipelineError> {
        let limit_bytes = self.options.memory_limit_bytes.unwrap_or(f64::INFINITY) * (1.0 + 1e-9);
        schedule.name = "searched".into();
        let Some(mut simulation) = self.simulate(&schedule, costs) else {
            return Ok(schedule);
        };
        let budget = self.n_actions_left / N_IMPROVED;
        let until = self.n_actions_left - budget;
        'again: while self.n_actions_left > until {
            let path = simulation.critical_path.clone();
            for pair in path.windows(2) {
                let [(rank, first), (other, second)] = pair else {
                    continue;
                };
                let is_paired = !schedule.pairs[*rank].is_empty();
                if rank != other || first + 1 != *second || is_paired {
                    continue;
                }
                if self.n_actions_left <= until {
                    break 'again;
                }
                schedule.rows[*rank].swap(*first, *second);
                // Both halves of one microbatch in the wrong order simulate to an error.
                if let Some(swapped) = self.simulate(&schedule, costs) {
                    let is_better = swapped.step_s < simulation.step_s * (1.0 - 1e-9);
                    if is_better && replay(&schedule, costs)[*rank].peak_bytes <= limit_bytes {
                        simulation = swapped;
                        continue 'again;
                    }
                }
                schedule.rows[*rank].swap(*first, *second);
            }
            break;
        }
        backfill(&schedule, costs)
    }
}
