//! The outer planner: which mapping a decoder takes on a cluster.
//!
//! Enters: a workload, a cluster, a [`Space`] of what is left open. Leaves: the fastest mapping that
//! fits the memory, with a certificate, and its runners-up.
//! Invariant: seconds and bytes are those of [`super::estimate`]; the lower bound holds for every
//! mapping of the space, pruned ones included; the same input gives the same mapping.
//!
//! Grids are enumerated in closed form, bounded by the prices of their layers, and priced best first
//! (branch and bound); stages are cut by dynamic programming.

mod space;
mod grids;
mod bound;
mod stages;
mod saving;
mod expand;
mod search;
mod serving;
mod only;
mod digest;
mod families;
mod arrange;
pub mod conflict;
pub mod compare;

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::mapping::{Mapping, Precision};
use meshweave_dsl::units::{Bytes, Seconds};
use serde::{Deserialize, Serialize};

use super::estimate::{Job, Memories, Workload};
use crate::parallel::available;
use crate::schedule::Builtin;

pub use digest::Digests;
pub use families::FamilyRow;
pub use only::the_only;
pub use search::{Counts, Priced};
pub use space::{Allowed, Cuts, Preference, ShardGroup, Space, Whole, largest_memory};

/// Why there is no mapping.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum OuterError {
    /// No degrees are legal.
    #[error("{message}")]
    Invalid {
        message: String,
        reasons: Vec<String>,
    },
    /// Nothing fits the memory, or meets the target.
    #[error("{message}")]
    Infeasible { message: String, least_bytes: u64 },
    /// Legal mappings, none of which has a price.
    #[error("{0}")]
    Unsupported(String),
    /// Our bug.
    #[error("internal error in planning: {0}")]
    Internal(String),
}

/// When to stop.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Distance from the bound, as a part of the price.
    pub gap: f64,
    /// Seconds after which the best so far is taken.
    pub within_s: f64,
    /// A mapping to begin with, such as that of an earlier plan.
    pub warm_start: Option<Mapping>,
    /// Seconds that only faster mappings are of interest below.
    pub better_than_s: Option<f64>,
    /// Threads, at least 1; what is found does not depend on them.
    pub threads: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            gap: 0.0,
            within_s: 60.0,
            warm_start: None,
            better_than_s: None,
            threads: available(),
        }
    }
}

/// What is searched.
#[derive(Clone, Copy)]
pub(crate) struct Problem<'a> {
    pub workload: &'a Workload,
    pub cluster: &'a Cluster,
    pub space: &'a Space,
}

/// A mapping, and how good it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    pub best: Priced,
    /// The best mappings of other grids that were priced, fastest first.
    pub runners_up: Vec<Priced>,
    pub certificate: Certificate,
    /// The cluster with its nodes in the order in which ranks take them; those left out are idle.
    pub placed: Cluster,
    /// Wall-clock seconds of the search.
    pub solve_s: f64,
}

/// What is known of a mapping: predicted figures, the bound, and what was searched.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    pub predicted_s: f64,
    /// The step with its schedule simulated action by action, where it has one.
    pub simulated_s: Option<f64>,
    /// What the families of schedules take, the chosen one first; empty without a pipeline.
    pub schedules: Vec<FamilyRow>,
    /// No mapping of the space is faster under these prices; of several batches: no step that makes as
    /// many tokens a second as the best one could take less.
    pub lower_bound_s: f64,
    /// How far the step is above the bound, as a part of it: the simulated one where there is one.
    pub gap: f64,
    pub tokens_per_s: f64,
    /// No mapping and no batch of the space makes more tokens a second under these prices.
    pub most_tokens_per_s: f64,
    /// Sequences a step.
    pub batch: usize,
    /// Where tokens are generated: seconds in which an idle replica reads a prompt and says the first.
    pub first_token_s: Option<f64>,
    /// Model operations over the dense bf16 peak: causal half of attention, nothing counted twice.
    pub mfu: f64,
    /// Bytes of every pipeline rank.
    pub memory_bytes: Vec<u64>,
    pub budget_bytes: u64,
    pub n_devices: usize,
    pub n_idle: usize,
    pub counts: Counts,
    pub not_searched: Vec<String>,
}

/// Finds the fastest mapping of the space; of several batches, the mapping and the batch with the most
/// tokens a second.
///
/// Every device takes part, unless no such mapping is legal: then as many as give the fastest step.
///
/// # Errors
/// `Invalid` where no degrees are legal, `Infeasible` where nothing fits the budget or meets the target,
/// `Unsupported` where nothing that is legal has a price.
pub fn search(
    workload: &Workload,
    cluster: &Cluster,
    space: &Space,
    options: &Options,
) -> Result<Found, OuterError> {
    let start = std::time::Instant::now();
    let problem = Problem {
        workload,
        cluster,
        space,
    };
    let n_devices = cluster.n_devices();
    let layers = bound::Layers::default();
    let (outcome, placed) = match cluster.is_flat() {
        true => (
            search_in_order(&problem, options, start, &layers)?,
            cluster.clone(),
        ),
        false => arrange::search(&problem, options, start)?,
    };
    let problem = Problem {
        cluster: &placed,
        ..problem
    };
    if outcome.best.is_empty() {
        return Err(why_nothing(&problem, &outcome));
    }
    let not_searched = not_searched(&problem, &outcome);
    let mut best = outcome.best;
    let choice = families::choose(
        &problem,
        &layers,
        options.threads,
        &best,
        &outcome.of_family,
    );
    let (first, simulated_s) = choice
        .first
        .ok_or_else(|| OuterError::Internal("nothing found".into()))?;
    let workload = Workload {
        batch: first.batch,
        ..workload.clone()
    };
    best.retain(|other| other.mapping != first.mapping);
    // A schedule of uneven stages may take less than its closed form says.
    let lower_bound_s = outcome
        .seen
        .lower_bound_s
        .min(simulated_s.unwrap_or(f64::INFINITY));
    let memories = Memories::new(&workload, &first.mapping);
    let memory_bytes = (0..first.mapping.pp)
        .map(|rank| memories.of(rank, &placed).total().0)
        .collect();
    let first_token_s = match workload.job {
        Job::Decode { .. } => serving::prefill_s(&problem, &first.mapping),
        Job::Train | Job::Prefill => None,
    };
    let certificate = Certificate {
        predicted_s: first.estimate.step_s,
        simulated_s,
        lower_bound_s,
        gap: (simulated_s.unwrap_or(first.estimate.step_s) / lower_bound_s - 1.0).max(0.0),
        schedules: choice.rows,
        tokens_per_s: first.estimate.tokens_per_s,
        most_tokens_per_s: workload.tokens() / lower_bound_s,
        batch: first.batch,
        first_token_s,
        mfu: first.estimate.mfu,
        memory_bytes,
        budget_bytes: space.budget_bytes,
        n_devices,
        n_idle: n_devices - first.mapping.n_ranks(),
        counts: outcome.seen.counts,
        not_searched,
    };
    Ok(Found {
        best: first,
        runners_up: best,
        certificate,
        placed,
        solve_s: start.elapsed().as_secs_f64(),
    })
}

/// The best outcome for the nodes in their order: on all devices, or where no mapping takes all of them
/// on as many as give the fastest step.
fn search_in_order(
    problem: &Problem<'_>,
    options: &Options,
    start: std::time::Instant,
    layers: &bound::Layers,
) -> Result<search::Outcome, OuterError> {
    let n_devices = problem.cluster.n_devices();
    let mut sweep = sweep(problem, options, start, |problem, options| {
        search::search(problem, options, n_devices, layers)
    });
    // Where nodes are not alike, other orders leave some of them out.
    if sweep.counts().n_nodes == 0 && problem.cluster.is_flat() {
        sweep = self::sweep(problem, options, start, |problem, options| {
            let none = search::search(problem, options, n_devices, layers);
            with_idle_devices(problem, options, none, layers)
        });
    }
    let outcome = sweep.finish();
    outcome.ok_or_else(|| OuterError::Internal("no batch was searched".into()))
}

/// Searches every batch of the space, with the time that is left.
fn sweep(
    problem: &Problem<'_>,
    options: &Options,
    start: std::time::Instant,
    mut search: impl FnMut(&Problem<'_>, &Options) -> search::Outcome,
) -> serving::Sweep {
    let mut sweep = serving::Sweep::default();
    for batch in serving::batches(problem) {
        let workload = Workload {
            batch,
            ..problem.workload.clone()
        };
        let of_batch = Problem {
            workload: &workload,
            ..*problem
        };
        let options = Options {
            within_s: (options.within_s - start.elapsed().as_secs_f64()).max(0.0),
            better_than_s: sweep.better_than_s(batch).or(options.better_than_s),
            warm_start: options
                .warm_start
                .clone()
                .filter(|_| batch == problem.workload.batch),
            ..*options
        };
        let found = search(&of_batch, &options);
        sweep.add(problem.space, batch, found);
    }
    sweep
}

/// The best outcome on fewer devices, whole nodes of them and more than half; `none` if there is none.
fn with_idle_devices(
    problem: &Problem<'_>,
    options: &Options,
    none: search::Outcome,
    layers: &bound::Layers,
) -> search::Outcome {
    let node = problem.cluster.devices_per_node.max(1);
    let n_devices = problem.cluster.n_devices();
    let mut best = none;
    let sizes = (1..n_devices).rev().filter(|n_ranks| {
        let is_whole = n_ranks.is_multiple_of(node) || n_devices <= node;
        is_whole && 2 * n_ranks > n_devices
    });
    for n_ranks in sizes {
        let known_s = best.best.first().map(|priced| priced.estimate.step_s);
        let with_bound = Options {
            better_than_s: known_s.or(options.better_than_s),
            ..options.clone()
        };
        let mut found = search::search(problem, &with_bound, n_ranks, layers);
        let counts = best.seen.counts.and(found.seen.counts);
        if found.best.is_empty() && !best.best.is_empty() {
            best.seen.lower_bound_s = best.seen.lower_bound_s.min(found.seen.lower_bound_s);
            best.seen.counts = counts;
        } else if !found.best.is_empty() || found.seen.counts.n_nodes > 0 {
            found.seen.lower_bound_s = found.seen.lower_bound_s.min(best.seen.lower_bound_s);
            found.seen.counts = counts;
            best = found;
        }
    }
    best
}

/// Why there is no mapping.
fn why_nothing(problem: &Problem<'_>, outcome: &search::Outcome) -> OuterError {
    let cluster = problem.cluster;
    let n_devices = cluster.n_devices();
    if outcome.seen.counts.n_nodes == 0 {
        let reasons = outcome.objections.most_frequent();
        return OuterError::Invalid {
            message: format!(
                "no degrees lay model `{}` out on {n_devices} devices",
                problem.workload.model.name
            ),
            reasons: reasons
                .into_iter()
                .take(3)
                .map(|(why, count)| format!("{why} ({count} of the layouts tried)"))
                .collect(),
        };
    }
    if let Some(most_first_s) = problem.space.most_first_s
        && outcome.seen.fastest_first_s.is_finite()
        && outcome.seen.fastest_first_s > most_first_s
    {
        return OuterError::Infeasible {
            message: format!(
                "the first token of a prompt of {} takes {} at least (predicted), and {} are allowed; \
                 allow more, or take more or faster devices",
                problem.workload.seq,
                Seconds(outcome.seen.fastest_first_s),
                Seconds(most_first_s)
            ),
            least_bytes: 0,
        };
    }
    if outcome.seen.fastest_s.is_finite() {
        let most_s = problem.space.most_s.unwrap_or(0.0);
        return OuterError::Infeasible {
            message: format!(
                "the fastest step takes {} (predicted), and {} are allowed; allow more, lower the batch, \
                 or take more or faster devices",
                Seconds(outcome.seen.fastest_s),
                Seconds(most_s)
            ),
            least_bytes: 0,
        };
    }
    if let Some((least, _)) = &outcome.seen.closest {
        let state = state_bytes(problem) / n_devices as f64;
        return OuterError::Infeasible {
            message: format!(
                "no mapping fits: with all that may be saved a device needs at least {} and may use {}; \
                 the model's training state alone is {} a device",
                Bytes(*least),
                Bytes(problem.space.budget_bytes),
                Bytes(state as u64)
            ),
            least_bytes: *least,
        };
    }
    let reason = outcome
        .seen
        .unpriced
        .iter()
        .max_by_key(|(_, count)| **count)
        .map_or("no mapping of the space has a schedule", |(why, _)| why);
    OuterError::Unsupported(format!("none of the legal mappings has a price: {reason}"))
}

/// Bytes of parameters, gradients and optimizer state of the whole model.
fn state_bytes(problem: &Problem<'_>) -> f64 {
    let precision = problem.space.precisions.first();
    let precision = precision.copied().unwrap_or(Precision::MIXED_BF16);
    let bytes = match problem.workload.job {
        Job::Train => {
            precision.parameter_bytes + precision.gradient_bytes + precision.optimizer_bytes
        }
        Job::Prefill | Job::Decode { .. } => precision.parameter_bytes,
    };
    f64::from(bytes) * problem.workload.parameters().total()
}

/// What a search leaves out, in words.
fn not_searched(problem: &Problem<'_>, outcome: &search::Outcome) -> Vec<String> {
    let space = problem.space;
    let mut list = Vec::new();
    if space.batches == Allowed::Any {
        list.push(format!(
            "batches other than those of a ladder of {} steps a doubling",
            serving::STEPS_A_DOUBLING
        ));
    }
    if outcome.is_out_of_time {
        list.push("what was left when the time was over; the bound holds for it".to_owned());
    }
    if space.cp == Allowed::Any && problem.workload.seq >= 2 * grids::LEAST_TOKENS {
        list.push(format!(
            "cp that leaves a rank fewer than {} tokens",
            grids::LEAST_TOKENS
        ));
    }
    if !problem.cluster.is_flat() {
        list.push(
            "degrees that differ between stages, and orders of nodes other than by group, with slow ones first, last or idle"
                .into(),
        );
    }
    if space.tp == Allowed::Any {
        list.push(format!(
            "tp and etp over more than {} nodes",
            grids::MOST_NODES
        ));
    }
    if problem.workload.job == Job::Train {
        if space.pp != Allowed::only(1) {
            list.push(if space.schedules.len() == Builtin::families().count() {
                "schedules of one's own, and those that divide sequences or train on stale weights"
                    .into()
            } else {
                format!("schedules other than {}", space.schedules.join(", "))
            });
            if space.cuts == Cuts::Any {
                list.push(
                    "cuts other than the even one and those of the fastest slowest stage, with and \
                     without what must be computed again"
                        .into(),
                );
            }
        }
        if space.whole.len() > 1 {
            list.push(
                "recomputation of parts that differs between ranks, or of parts and whole layers together"
                    .into(),
            );
        }
        if space.offload_activations.len() > 1 && space.whole.contains(&Whole::First(None)) {
            list.push(
                "offloading of activations together with recomputation of some whole layers".into(),
            );
        }
        if !space.zero_stages.contains(&2) && space.zero_stages.len() > 1 {
            list.push("ZeRO 2".into());
        }
        if space.offload_activations == [0.0] {
            list.push(
                "offloading of activations (opened by `offload activations = auto{none, host 50 %, host}`)"
                    .into(),
            );
        }
        if space.shard_groups.len() > 1 {
            list.push("ZeRO groups other than all ranks and those of a node".into());
        }
    }
    list
}

#[cfg(test)]
mod tests;
