//! The choice among families of schedules.
//!
//! Enters: the best mappings of a search. Leaves: what every family takes, in closed form and, for
//! those that come near, with its schedule run action by action; and why it is not the one.
//! Invariant: everything but the pipeline's own time is the estimate's; families are compared at the
//! best mapping that the search priced for them, or at the chosen one's degrees.

use meshweave_dsl::mapping::Mapping;
use meshweave_dsl::units::Bytes;
use serde::{Deserialize, Serialize};

use super::Problem;
use super::bound::Layers;
use super::expand::{pipelines_of, worst_bytes};
use super::grids::{grid_of, key_of};
use super::search::Priced;
use crate::parallel::in_parallel;
use crate::plan::estimate::{Estimate, Job, Workload, estimate, family, pair_slowdown};
use crate::schedule::{Builtin, Costs, Shape, StageCosts, simulate, unchecked};

/// What a family of schedules takes; all figures are predicted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FamilyRow {
    pub family: String,
    /// The mapping with it, in words.
    pub mapping: Option<String>,
    /// In closed form.
    pub predicted_s: Option<f64>,
    /// Of the schedule, run with the stages' own costs.
    pub simulated_s: Option<f64>,
    /// Of the rank that holds most.
    pub peak_bytes: Option<u64>,
    /// Why it is, or is not, the plan's.
    pub why: String,
}

/// What was compared, and what came out.
#[derive(Debug, Default)]
pub(super) struct Choice {
    pub rows: Vec<FamilyRow>,
    /// The mapping that is fastest when simulated, and its seconds, where the schedule has any.
    pub first: Option<(Priced, Option<f64>)>,
}

/// Part of a step by which a mapping may be slower in closed form and still be simulated.
const CLOSE: f64 = 0.05;
/// Mappings that are simulated.
const MOST_SIMULATED: usize = 8;

/// A family with the mapping that speaks for it, or why it has none.
struct Candidate {
    family: Builtin,
    priced: Result<Priced, String>,
    peak_bytes: Option<u64>,
    simulated_s: Option<f64>,
}

/// Compares the families at the best mappings, `best` fastest first, `of_family` the best of each.
pub(super) fn choose(
    problem: &Problem<'_>,
    layers: &Layers,
    threads: usize,
    best: &[Priced],
    of_family: &[Priced],
) -> Choice {
    let Some(first) = best.first() else {
        return Choice::default();
    };
    // Of several batches, the best one's.
    let workload = Workload {
        batch: first.batch,
        ..problem.workload.clone()
    };
    let problem = &Problem {
        workload: &workload,
        ..*problem
    };
    if let Job::Decode { .. } = workload.job {
        // Steps follow each other without a wait: there is nothing to simulate.
        return Choice {
            rows: Vec::new(),
            first: Some((first.clone(), None)),
        };
    }
    let is_training = workload.job == Job::Train;
    let mut candidates: Vec<Candidate> = Vec::new();
    if first.mapping.pp > 1 && is_training {
        let families: Vec<Builtin> = Builtin::families().collect();
        candidates = in_parallel(families.len(), threads, |idx| {
            candidate(problem, layers, families[idx], first, of_family)
        });
    }
    let limit_s = first.estimate.step_s * (1.0 + CLOSE);
    let mut order: Vec<(usize, f64)> = candidates
        .iter()
        .enumerate()
        .filter_map(|(idx, candidate)| {
            let priced = candidate.priced.as_ref().ok()?;
            Some((idx, priced.estimate.step_s))
        })
        .filter(|(_, seconds)| *seconds <= limit_s)
        .collect();
    order.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
    order.truncate(MOST_SIMULATED);
    let near: Vec<&Priced> = order
        .iter()
        .filter_map(|(idx, _)| candidates[*idx].priced.as_ref().ok())
        .collect();
    let simulated = simulated_s_of(problem, threads, &near);
    for ((idx, _), seconds) in order.into_iter().zip(simulated) {
        candidates[idx].simulated_s = seconds;
    }
    // Other grids, which the families' own mappings need not cover.
    let mut all: Vec<(Priced, Option<f64>)> = candidates
        .iter()
        .filter_map(|candidate| Some((candidate.priced.clone().ok()?, candidate.simulated_s)))
        .filter(|(priced, simulated)| simulated.is_some() || priced.mapping == first.mapping)
        .collect();
    let of_batch = best.iter().filter(|priced| priced.batch == first.batch);
    let others: Vec<&Priced> = of_batch
        .take(N_GRIDS)
        .filter(|priced| all.iter().all(|(known, _)| known.mapping != priced.mapping))
        .filter(|priced| priced.estimate.step_s <= first.estimate.step_s * (1.0 + CLOSE_GRID))
        .collect();
    let simulated = simulated_s_of(problem, threads, &others);
    all.extend(others.into_iter().cloned().zip(simulated));
    let seconds = |(priced, simulated): &(Priced, Option<f64>)| {
        simulated.unwrap_or(priced.estimate.step_s) * weight(problem, &priced.mapping)
    };
    let chosen = all
        .into_iter()
        .min_by(|a, b| seconds(a).total_cmp(&seconds(b)));
    let rows = match &chosen {
        Some((priced, simulated_s)) if first.mapping.pp > 1 => {
            rows(problem, candidates, priced, *simulated_s)
        }
        _ => Vec::new(),
    };
    Choice {
        rows,
        first: chosen,
    }
}

/// Other grids that are simulated, and the part of a step by which they may be slower.
const N_GRIDS: usize = 4;
const CLOSE_GRID: f64 = 0.02;

fn weight(problem: &Problem<'_>, mapping: &Mapping) -> f64 {
    let preferences = problem.space.preferences.iter();
    preferences.map(|one| one.factor(mapping)).product()
}

/// The best mapping of a family that fits: one that the search priced, or the best one's with its
/// schedule.
fn candidate(
    problem: &Problem<'_>,
    layers: &Layers,
    family: Builtin,
    first: &Priced,
    of_family: &[Priced],
) -> Candidate {
    let mut found = Candidate {
        family,
        priced: Err(String::new()),
        peak_bytes: None,
        simulated_s: None,
    };
    if !problem
        .space
        .schedules
        .iter()
        .any(|name| name == family.name())
    {
        found.priced = Err("not among the schedules that may be chosen".into());
        return found;
    }
    let known = of_family
        .iter()
        .filter(|priced| priced.batch == first.batch)
        .find(|priced| priced.mapping.pipeline.schedule == family.name());
    let mut best: Option<Priced> = known.cloned();
    let mut least: Option<u64> = None;
    let mut reason = None;
    for mapping in with_family(problem, layers, family, &first.mapping) {
        let bytes = worst_bytes(problem, &mapping);
        if bytes > problem.space.budget_bytes {
            least = Some(least.map_or(bytes, |known: u64| known.min(bytes)));
            continue;
        }
        match estimate(problem.workload, &mapping, problem.cluster) {
            Ok(estimate) => {
                let is_better = best
                    .as_ref()
                    .is_none_or(|best| estimate.step_s < best.estimate.step_s);
                if is_better {
                    let batch = first.batch;
                    best = Some(Priced {
                        mapping,
                        batch,
                        estimate,
                    });
                }
            }
            Err(error) => reason = Some(error.to_string()),
        }
    }
    found.peak_bytes = best
        .as_ref()
        .map(|priced| worst_bytes(problem, &priced.mapping))
        .or(least);
    found.priced = best.ok_or_else(|| match (least, reason) {
        (Some(bytes), _) => format!(
            "needs {} at these degrees, {} are allowed",
            Bytes(bytes),
            Bytes(problem.space.budget_bytes)
        ),
        (None, Some(reason)) => reason,
        (None, None) => why_undefined(problem, family, &first.mapping),
    });
    found
}

/// A mapping with the schedules of another family, in all numbers of chunks and cuts of the space.
fn with_family(
    problem: &Problem<'_>,
    layers: &Layers,
    family: Builtin,
    mapping: &Mapping,
) -> Vec<Mapping> {
    let (grid, key) = (grid_of(mapping), key_of(mapping));
    pipelines_of(problem, layers, family, grid, &key)
        .into_iter()
        .map(|pipeline| Mapping {
            pipeline,
            ..mapping.clone()
        })
        .collect()
}

/// Why a family has no schedule for a pipeline.
fn why_undefined(problem: &Problem<'_>, family: Builtin, mapping: &Mapping) -> String {
    let n_microbatches = mapping.n_microbatches(problem.workload.batch);
    let n_layers = problem.workload.model.n_layers;
    let pp = mapping.pp;
    let shape = family.fit(Shape::new(pp, n_microbatches).chunks(2));
    if let Err(error) = family.fits(&shape) {
        return error.to_string();
    }
    if n_layers < pp * shape.n_chunks {
        return format!(
            "{n_layers} layers are fewer than its {} stages",
            pp * shape.n_chunks
        );
    }
    if family.fixed_chunks().is_none() && !n_microbatches.is_multiple_of(pp) {
        return format!("{n_microbatches} microbatches are no rounds of {pp} ranks");
    }
    "the chunks or cuts that are asked for are not its own".into()
}

fn rows(
    problem: &Problem<'_>,
    candidates: Vec<Candidate>,
    chosen: &Priced,
    chosen_simulated_s: Option<f64>,
) -> Vec<FamilyRow> {
    let chosen_s = chosen_simulated_s.unwrap_or(chosen.estimate.step_s);
    let mut rows: Vec<(f64, FamilyRow)> = Vec::new();
    for candidate in candidates {
        let own = family(&chosen.mapping) == candidate.family && chosen.mapping.pp > 1;
        let row = FamilyRow {
            family: candidate.family.name().into(),
            mapping: None,
            predicted_s: None,
            simulated_s: candidate.simulated_s,
            peak_bytes: candidate.peak_bytes,
            why: String::new(),
        };
        rows.push(match candidate.priced {
            _ if own => (
                0.0,
                FamilyRow {
                    mapping: Some(chosen.mapping.to_string()),
                    predicted_s: Some(chosen.estimate.step_s),
                    simulated_s: chosen_simulated_s,
                    peak_bytes: Some(worst_bytes(problem, &chosen.mapping)),
                    why: "chosen".into(),
                    ..row
                },
            ),
            Ok(priced) => {
                let seconds = candidate.simulated_s.unwrap_or(priced.estimate.step_s);
                let slower = 100.0 * (seconds / chosen_s - 1.0);
                let how = match candidate.simulated_s {
                    Some(_) => "simulated",
                    None => "in closed form",
                };
                let why = if slower < 0.05 {
                    format!("as fast {how}, and later in the order of families")
                } else {
                    format!("{slower:.1} % slower {how}")
                };
                (
                    seconds,
                    FamilyRow {
                        mapping: Some(priced.mapping.to_string()),
                        predicted_s: Some(priced.estimate.step_s),
                        why,
                        ..row
                    },
                )
            }
            Err(why) => (f64::INFINITY, FamilyRow { why, ..row }),
        });
    }
    rows.sort_by(|a, b| a.0.total_cmp(&b.0));
    rows.into_iter().map(|(_, row)| row).collect()
}

/// Actions beyond which two shorter schedules are simulated instead of the whole one.
const MOST_ACTIONS: usize = 60_000;
/// Rounds of all ranks in those two: filled and drained, with some of the steady state between.
const ROUNDS: [usize; 2] = [4, 6];

/// The same of several mappings.
fn simulated_s_of(problem: &Problem<'_>, threads: usize, mappings: &[&Priced]) -> Vec<Option<f64>> {
    in_parallel(mappings.len(), threads, |idx| {
        simulated_s(problem, mappings[idx])
    })
}

/// Seconds of a step with its schedule run action by action; `None` where there is no pipeline.
///
/// A long schedule is simulated with four and with six microbatches a rank: between them lies what
/// further microbatches of the steady state take.
pub(super) fn simulated_s(problem: &Problem<'_>, priced: &Priced) -> Option<f64> {
    let Priced {
        mapping, estimate, ..
    } = priced;
    if mapping.pp < 2 {
        return None;
    }
    let pipeline_s = pipeline_seconds(problem, mapping, estimate)?;
    let parts = &estimate.parts;
    let own_s = parts.compute + parts.recompute + parts.tp + parts.cp + parts.ep + parts.bubble;
    Some(estimate.step_s - own_s + pipeline_s)
}

fn pipeline_seconds(problem: &Problem<'_>, mapping: &Mapping, estimate: &Estimate) -> Option<f64> {
    let (workload, pp): (&Workload, usize) = (problem.workload, mapping.pp);
    let n_microbatches = mapping.n_microbatches(workload.batch);
    let family = Builtin::find(&mapping.pipeline.schedule)?;
    let stages: Vec<StageCosts> = estimate
        .stages
        .iter()
        .map(|stage| StageCosts {
            forward_s: stage.forward_s,
            // Recomputation precedes the gradient of the input on the same rank.
            backward_input_s: stage.backward_input_s + stage.recompute_s,
            backward_weight_s: stage.backward_weight_s,
            forward_exchange_s: stage.forward_exchange_s,
            backward_exchange_s: stage.backward_exchange_s,
            ..StageCosts::default()
        })
        .collect();
    let costs = Costs {
        pair_slowdown: pair_slowdown(problem.cluster),
        ..Costs::of(stages)
    };
    let run = |n_microbatches: usize| {
        let shape = Shape::new(pp, n_microbatches).chunks(mapping.pipeline.chunks);
        let schedule = unchecked(family, &shape, Some(&costs)).ok()?;
        Some(simulate(&schedule, &costs).ok()?.step_s)
    };
    let n_actions = 3 * n_microbatches * mapping.n_stages();
    let [short, long] = ROUNDS.map(|rounds| rounds * pp);
    if n_actions <= MOST_ACTIONS || n_microbatches <= long {
        return run(n_microbatches);
    }
    let (short_s, long_s) = (run(short)?, run(long)?);
    let each_s = (long_s - short_s) / (long - short) as f64;
    Some(long_s + each_s * (n_microbatches - long) as f64)
}
