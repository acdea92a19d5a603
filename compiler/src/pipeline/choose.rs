//! The choice of a pipeline: degree, schedule, chunks and microbatches.
//!
//! Enters: candidates, the model's forward graph for any microbatch, a cluster. Leaves: all of them
//! with their prices, the best of those that were simulated first.
//! Invariant: closed forms only decide which candidates are simulated; what is compared in the end are
//! simulations of the checked schedules with the costs of their own stages.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::graph::Graph;
use meshweave_dsl::schedule::Schedule;
use serde::{Deserialize, Serialize};

use super::costs::{Rate, stage_costs};
use super::slices::{Sliced, slice_sequences};
use super::stages::{Empty, assign, cut_before, cut_evenly};
use super::{PipelineError, Result, scale_loss};
use crate::differentiate::{Optimizer, Origin, differentiate_traced};
use crate::plan::HEADROOM;
use crate::plan::cost::{GroupShape, Traffic, traffic_seconds};
use crate::schedule::{
    Costs, Placement, RankCosts, SearchOptions, Shape, StageCosts, Stages, closed_form, search,
    simulate,
};

/// Candidates that are simulated, besides those that no closed form prices.
const N_SIMULATED: usize = 16;
/// Weights, gradients and two moments of adamw.
const COPIES_OF_WEIGHTS: f64 = 4.0;

/// What a candidate is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// Of the schedule.
    pub name: String,
    pub shape: Shape,
    /// Where stages may lie while an order for them is searched for; none for schedules that exist.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub placements: Vec<Placement>,
}

/// What a candidate costs; all figures are predicted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PricedCandidate {
    /// Its place in the list that was given.
    pub nth: usize,
    pub candidate: Candidate,
    /// By formula at equal stages; none for schedules of the user.
    pub closed_form_s: Option<f64>,
    /// Of those that were simulated.
    pub simulated_s: Option<f64>,
    /// Activations, weights, gradients and moments of the fullest rank's device, simulated.
    pub peak_bytes: Option<f64>,
    /// Why it is out of the question.
    pub refused: Option<String>,
    /// The order that was found, where one was searched for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found: Option<Schedule>,
}

/// The model and where it is to run.
pub struct Setting<'a> {
    /// The forward graph of so many sequences.
    pub forward: &'a dyn Fn(usize) -> Result<Graph>,
    pub optimizer: &'a Optimizer,
    /// Sequences a step.
    pub batch: usize,
    /// Where stages begin; even stages where there are none.
    pub cuts: &'a [String],
    pub empty: Empty,
    pub cluster: &'a Cluster,
}

/// Prices candidates by closed form, simulates the best few, and sorts: simulated ones first, the
/// fastest first; those that are out of the question last.
///
/// # Errors
/// `Invalid` where no candidate can be built, cut or held, with the first one's reason.
pub fn choose(
    candidates: Vec<Candidate>,
    schedule: &dyn Fn(usize) -> Result<Schedule>,
    setting: &Setting,
) -> Result<Vec<PricedCandidate>> {
    let mut models: BTreeMap<(usize, usize), Microbatch> = BTreeMap::new();
    let mut priced = Vec::with_capacity(candidates.len());
    for (nth, candidate) in candidates.into_iter().enumerate() {
        let model = match models.entry(parts_of(&candidate.shape)) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Microbatch::new(&candidate.shape, setting)?),
        };
        priced.push(PricedCandidate {
            nth,
            closed_form_s: model.closed_form_s(&candidate, setting),
            candidate,
            simulated_s: None,
            peak_bytes: None,
            refused: None,
            found: None,
        });
    }
    priced.sort_by(|a, b| {
        let key = |one: &PricedCandidate| one.closed_form_s.unwrap_or(0.0);
        key(a).total_cmp(&key(b)).then(a.nth.cmp(&b.nth))
    });
    let mut n_simulated = 0;
    for one in &mut priced {
        if n_simulated >= N_SIMULATED && one.closed_form_s.is_some() {
            break;
        }
        let model = &models[&parts_of(&one.candidate.shape)];
        if !one.candidate.placements.is_empty() {
            match model.search(&one.candidate, setting) {
                Ok(found) => one.found = Some(found),
                Err(PipelineError::Internal(message)) => {
                    return Err(PipelineError::Internal(message));
                }
                Err(error) => {
                    one.refused = Some(error.to_string());
                    continue;
                }
            }
        }
        let made = match &one.found {
            Some(found) => Ok(found.clone()),
            None => schedule(one.nth),
        };
        let simulated = made.and_then(|schedule| model.simulate(&schedule, setting));
        match simulated {
            Ok((step_s, peak_bytes)) => {
                let budget = budget_bytes(setting);
                if peak_bytes > budget {
                    one.refused = Some(format!(
                        "a device needs {:.1} GiB of {:.1} GiB (predicted)",
                        peak_bytes / GIB,
                        budget / GIB
                    ));
                } else {
                    n_simulated += 1;
                }
                one.simulated_s = Some(step_s);
                one.peak_bytes = Some(peak_bytes);
            }
            Err(PipelineError::Internal(message)) => return Err(PipelineError::Internal(message)),
            Err(error) => one.refused = Some(error.to_string()),
        }
    }
    priced.sort_by(|a, b| {
        let rank = |one: &PricedCandidate| match (&one.refused, one.simulated_s) {
            (None, Some(step_s)) => (0, step_s, one.peak_bytes.unwrap_or(0.0)),
            (None, None) => (1, one.closed_form_s.unwrap_or(0.0), 0.0),
            (Some(_), _) => (2, one.closed_form_s.unwrap_or(0.0), 0.0),
        };
        let ((a_class, a_s, a_bytes), (b_class, b_s, b_bytes)) = (rank(a), rank(b));
        a_class
            .cmp(&b_class)
            .then(a_s.total_cmp(&b_s))
            .then(a_bytes.total_cmp(&b_bytes))
            .then(a.nth.cmp(&b.nth))
    });
    match priced.first() {
        Some(best) if best.refused.is_none() => Ok(priced),
        Some(best) => Err(PipelineError::Invalid(format!(
            "none of {} pipelines can be: {} over {} ranks with {} microbatches: {}",
            priced.len(),
            best.candidate.name,
            best.candidate.shape.n_ranks,
            best.candidate.shape.n_microbatches,
            best.refused.as_deref().unwrap_or_default()
        ))),
        None => Err(PipelineError::Invalid(
            "the pipeline's choices admit nothing: the cuts, the chunks and the degree of its axis \
             do not fit each other"
                .into(),
        )),
    }
}

/// Bytes of weights and what belongs to them on a device, of stages that `n_devices` share: parameters
/// are held whole under data parallelism.
fn held_weights(bytes: f64, n_devices: usize) -> f64 {
    COPIES_OF_WEIGHTS * bytes * n_devices as f64
}

/// What the graph of a microbatch depends on.
fn parts_of(shape: &Shape) -> (usize, usize) {
    (shape.n_microbatches, shape.n_slices)
}

const GIB: f64 = (1u64 << 30) as f64;

/// What a device may hold.
fn budget_bytes(setting: &Setting) -> f64 {
    setting.cluster.device.memory_bytes as f64 * (1.0 - HEADROOM)
}

/// The graph of a microbatch, forward and whole.
struct Microbatch {
    forward: Graph,
    sliced: Sliced,
    graph: Graph,
    origins: Vec<Origin>,
    /// Bytes of all parameters.
    weight_bytes: f64,
}

impl Microbatch {
    fn new(shape: &Shape, setting: &Setting) -> Result<Self> {
        let forward = (setting.forward)(setting.batch / shape.n_microbatches)?;
        let forward = scale_loss(&forward, shape.n_microbatches)?;
        let sliced = slice_sequences(&forward, shape.n_slices)?;
        let (graph, origins) = differentiate_traced(&sliced.graph, setting.optimizer)
            .map_err(|error| PipelineError::Unsupported(error.to_string()))?;
        let weight_bytes = graph.params().map(|id| graph.ty(id).n_bytes() as f64);
        Ok(Self {
            weight_bytes: weight_bytes.sum(),
            forward,
            sliced,
            graph,
            origins,
        })
    }

    fn closed_form_s(&self, candidate: &Candidate, setting: &Setting) -> Option<f64> {
        let n_ranks = candidate.shape.n_ranks;
        let one = vec![0; self.forward.ops.len()];
        let whole = self.costs(&one, 1, n_ranks, setting).ok()?;
        let [whole] = whole.as_slice() else {
            return None;
        };
        let share = 1.0 / n_ranks as f64;
        let costs = RankCosts::new(
            whole.forward_s * share,
            whole.backward_input_s * share,
            whole.backward_weight_s * share,
        );
        let form = closed_form(&candidate.name, &candidate.shape, &costs)?;
        let reduction_s = self.reduction_s(n_ranks, form.n_weight_copies, setting);
        Some(form.step_s(&candidate.shape, &costs) + reduction_s)
    }

    fn costs(
        &self,
        stages: &[usize],
        n_stages: usize,
        n_ranks: usize,
        setting: &Setting,
    ) -> Result<Vec<StageCosts>> {
        let stages = self.sliced.stages(stages);
        let slices = &self.sliced.slice_of;
        let parts = assign(&self.graph, &self.origins, &stages, slices)?;
        Ok(stage_costs(
            &self.graph,
            &parts,
            n_stages,
            setting.cluster.n_devices() / n_ranks.max(1),
            setting.cluster,
            Rate::Priced,
        ))
    }

    /// The reduction of a rank's gradients over the devices of its stages, as data parallelism does,
    /// and over the copies of the model.
    fn reduction_s(&self, n_ranks: usize, n_copies: usize, setting: &Setting) -> f64 {
        let n_devices = setting.cluster.n_devices() / n_ranks.max(1) * n_copies;
        if n_devices < 2 {
            return 0.0;
        }
        let group = GroupShape::of(&(0..n_devices).collect::<Vec<_>>(), setting.cluster);
        let n_bytes = self.weight_bytes * n_copies as f64 / n_ranks as f64;
        traffic_seconds(Traffic::AllReduce, n_bytes, group, setting.cluster)
    }

    /// The costs of stages, as the document cuts them.
    fn stage_costs(
        &self,
        n_stages: usize,
        n_ranks: usize,
        setting: &Setting,
    ) -> Result<Vec<StageCosts>> {
        let stages = if setting.cuts.is_empty() {
            cut_evenly(&self.forward, n_stages, setting.cluster)?
        } else {
            cut_before(&self.forward, setting.cuts, setting.empty)?
        };
        self.costs(&stages, n_stages, n_ranks, setting)
    }

    /// The fastest order found for the stages of a candidate, in the memory that its weights leave.
    fn search(&self, candidate: &Candidate, setting: &Setting) -> Result<Schedule> {
        let shape = &candidate.shape;
        let n_stages = shape.n_ranks * shape.n_chunks;
        let stages = self.stage_costs(n_stages, shape.n_ranks, setting)?;
        let n_devices = (setting.cluster.n_devices() / shape.n_ranks.max(1)).max(1);
        let mut best: Option<(f64, Schedule)> = None;
        let mut why_not = None;
        for placement in &candidate.placements {
            let mut weights = vec![0.0; shape.n_ranks];
            for (stage, rank) in placement.stage_rank(shape).into_iter().enumerate() {
                weights[rank] += held_weights(stages[stage].weight_bytes, n_devices);
            }
            let left = budget_bytes(setting) - weights.into_iter().fold(0.0, f64::max);
            let options = SearchOptions {
                memory_limit_bytes: Some(left.max(0.0)),
                ..SearchOptions::new(shape.n_ranks, shape.n_microbatches)
            };
            let placed = Stages {
                placement: placement.clone(),
                n_chunks: shape.n_chunks,
                costs: Costs::of(stages.clone()),
            };
            match search(&[placed], &options) {
                Ok(found) => {
                    let step_s = found.simulation.step_s;
                    if best.as_ref().is_none_or(|(best_s, _)| step_s < *best_s) {
                        best = Some((step_s, found.schedule));
                    }
                }
                Err(error) => why_not = Some(error.to_string()),
            }
        }
        match (best, why_not) {
            (Some((_, schedule)), _) => Ok(schedule),
            (None, Some(why_not)) => Err(PipelineError::Invalid(why_not)),
            (None, None) => Err(PipelineError::Internal(
                "a search for an order without a placement".into(),
            )),
        }
    }

    /// Seconds of a step, and bytes of the fullest device.
    fn simulate(&self, schedule: &Schedule, setting: &Setting) -> Result<(f64, f64)> {
        let stages = self.stage_costs(schedule.n_stages, schedule.n_ranks, setting)?;
        let n_devices = (setting.cluster.n_devices() / schedule.n_ranks.max(1)).max(1);
        let weights = |rank: usize| {
            let own = schedule.stages_of(rank);
            let bytes = own.map(|stage| stages[schedule.model_stage(stage)].weight_bytes);
            held_weights(bytes.sum(), n_devices)
        };
        let weights: Vec<f64> = (0..schedule.n_ranks).map(weights).collect();
        let simulation = simulate(schedule, &Costs::of(stages))
            .map_err(|error| PipelineError::Invalid(error.to_string()))?;
        let held = simulation.peak_bytes.iter().zip(weights);
        let peak_bytes = held.map(|(held, weights)| held + weights);
        Ok((
            simulation.step_s + self.reduction_s(schedule.n_ranks, schedule.n_copies, setting),
            peak_bytes.fold(0.0, f64::max),
        ))
    }
}
