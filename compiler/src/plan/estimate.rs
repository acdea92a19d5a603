//! Estimates: the step time and the memory of a [`Mapping`] of a decoder on a cluster, in closed form.
//!
//! Enters: a [`Workload`], a mapping, a cluster. Leaves: an [`Estimate`]: seconds by cause, the costs of
//! every stage, the memory of the worst rank.
//! Invariant: pure and deterministic, and cheap enough to be called for every mapping of a search;
//! prices are those of [`super::cost`].

pub mod capacity;
pub mod layer;
pub mod memory;
pub mod pipeline;
pub mod sites;
pub mod stages;
pub mod sync;
pub mod workload;

use std::borrow::Cow;

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::mapping::{Mapping, Recompute};

pub use capacity::{Bound, Capacity, Target, max_batch};
pub use memory::{Framework, Memories, MemoryEstimate, memory};
pub use workload::{AttentionKernel, Job, Parameters, Software, Workload};

use super::cost::efficiency::Efficiency;
use crate::schedule::{Builtin, Shape};
use layer::{LayerCost, Pricer};
use pipeline::{PipelineShape, PipelineTime, RankWork, round_wait_s};
use sites::Sites;
use stages::Stages;
use sync::{Cover, Held, data_parallel_s, optimizer_s};

/// Why a mapping has no price.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unpriced {
    /// The mapping contradicts itself, the model or the batch.
    #[error("{0}")]
    Invalid(String),
    /// Meaningful, and not modeled.
    #[error("{0}")]
    Unsupported(String),
}

/// What a mapping is predicted to take.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// Predicted seconds of a step.
    pub step_s: f64,
    /// Where they go; the parts add up to the step.
    pub parts: Parts,
    /// Per pipeline stage in model order.
    pub stages: Vec<StageEstimate>,
    /// Of the rank that needs most.
    pub memory: MemoryEstimate,
    /// Operations of the model in a step; see [`Workload::model_flops`].
    pub model_flops: f64,
    /// Model operations over the dense bf16 peak: causal half, nothing counted twice.
    pub mfu: f64,
    pub tokens_per_s: f64,
}

/// Seconds of a step by cause, on the pipeline rank that sets the pace; only exposed time counts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Parts {
    pub compute: f64,
    pub recompute: f64,
    pub tp: f64,
    pub cp: f64,
    pub ep: f64,
    pub p2p: f64,
    pub bubble: f64,
    pub dp: f64,
    pub optimizer: f64,
    pub offload: f64,
}

impl Parts {
    /// The step.
    pub fn total(&self) -> f64 {
        self.compute
            + self.recompute
            + self.tp
            + self.cp
            + self.ep
            + self.p2p
            + self.bubble
            + self.dp
            + self.optimizer
            + self.offload
    }
}

/// Costs of a stage for one microbatch, exposed communication included.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StageEstimate {
    pub n_layers: usize,
    pub forward_s: f64,
    pub backward_input_s: f64,
    pub backward_weight_s: f64,
    /// Recomputation, before the backward pass.
    pub recompute_s: f64,
    /// Of the forward, and of the backward with its recomputation, the exchange between experts.
    pub forward_exchange_s: f64,
    pub backward_exchange_s: f64,
    /// Sending the stage's output to the next one.
    pub p2p_s: f64,
    /// Of the pipeline rank that holds the stage.
    pub memory: MemoryEstimate,
}

/// Prices a mapping.
///
/// # Errors
/// `Invalid` where degrees, layers or batch do not fit each other; `Unsupported` for what has no model.
pub fn estimate(
    workload: &Workload,
    mapping: &Mapping,
    cluster: &Cluster,
) -> Result<Estimate, Unpriced> {
    Ok(Passes::new(workload, mapping, cluster)?.estimate(mapping))
}

/// The passes of a step through its pipeline: all of it but what happens once a step, which is what ZeRO
/// and offloading change.
pub struct Passes<'a> {
    workload: &'a Workload,
    cluster: &'a Cluster,
    stages: Stages,
    sites: Sites<'a>,
    /// Of every stage.
    costs: Vec<LayerCost>,
    /// Of every pipeline rank.
    ranks: Vec<RankWork>,
    /// The rank that sets the pace.
    pace: usize,
    /// Of a message to the next pipeline rank.
    sends_s: Vec<f64>,
    parts: Parts,
    /// Whether gradients of ZeRO 2 and 3 are added up in passes of their own.
    is_apart: bool,
}

impl<'a> Passes<'a> {
    /// The passes of a mapping.
    ///
    /// # Errors
    /// See [`estimate`].
    pub fn new(
        workload: &'a Workload,
        mapping: &Mapping,
        cluster: &'a Cluster,
    ) -> Result<Self, Unpriced> {
        check(workload, mapping, cluster)?;
        let stages = Stages::new(workload, mapping);
        let sites = Sites::new(cluster, mapping);
        let mut costs = stage_costs(workload, mapping, &sites, &stages);
        if workload.job != Job::Train {
            for cost in &mut costs {
                *cost = LayerCost {
                    forward: cost.forward,
                    ..LayerCost::default()
                };
            }
        }
        let boundary_bytes = Pricer::new(workload, mapping, sites.of(0)).boundary_bytes();
        let sends_s = sites.send_seconds(mapping, boundary_bytes);
        let n_microbatches = mapping.n_microbatches(workload.batch).max(1) as f64;
        let work: Vec<RankWork> = costs.iter().map(work_of).collect();
        let pipeline = pipeline(workload, mapping, &sites, &stages);
        let ranks = pipeline.ranks(&work);
        let PipelineTime {
            pace,
            hidden_s,
            wait_s,
        } = match workload.job {
            _ if mapping.pp == 1 => PipelineTime::default(),
            Job::Train | Job::Prefill => pipeline.time(&work),
            Job::Decode { .. } => round_wait_s(n_microbatches, &ranks),
        };
        let sum = stages
            .on(pace)
            .fold(LayerCost::default(), |sum, (stage, part)| {
                sum.then(costs[stage].times(part))
            });
        let passes = sum
            .forward
            .then(sum.backward_input)
            .then(sum.backward_weight)
            .times(n_microbatches);
        let again = sum.recompute.times(n_microbatches);
        let parts = Parts {
            compute: passes.compute,
            recompute: again.seconds(),
            tp: passes.tp,
            cp: passes.cp,
            ep: passes.ep - n_microbatches * hidden_s,
            p2p: p2p_s(workload, mapping, &sends_s, n_microbatches),
            bubble: wait_s,
            ..Parts::default()
        };
        Ok(Self {
            workload,
            cluster,
            stages,
            sites,
            costs,
            ranks,
            pace,
            sends_s,
            parts,
            is_apart: mapping.zero.stage > 1,
        })
    }

    /// Whether these are the passes of a mapping that differs in ZeRO and offloading alone, too.
    pub fn hold_for(&self, mapping: &Mapping) -> bool {
        self.workload.software.fused_accumulation || self.is_apart == (mapping.zero.stage > 1)
    }

    /// Seconds that a step takes at least, however state is divided and offloaded.
    pub fn seconds(&self) -> f64 {
        self.parts.total()
    }

    /// The parts of a step of a mapping that [has](Self::hold_for) these passes.
    ///
    /// # Errors
    /// See [`estimate`].
    pub fn parts(&self, mapping: &Mapping) -> Result<Parts, Unpriced> {
        check(self.workload, mapping, self.cluster)?;
        Ok(self.whole(mapping, &self.memories(mapping)))
    }

    /// The memory of such a mapping's ranks.
    pub fn memories<'b>(&'b self, mapping: &'b Mapping) -> Memories<'b> {
        Memories::with_stages(self.workload, mapping, Cow::Borrowed(&self.stages))
    }

    fn whole(&self, mapping: &Mapping, memories: &Memories<'_>) -> Parts {
        let (workload, sites) = (self.workload, &self.sites);
        let mut parts = self.parts;
        if workload.job != Job::Train {
            return parts;
        }
        let n_microbatches = mapping.n_microbatches(workload.batch).max(1) as f64;
        let once = |rank: usize| {
            let held = held(workload, mapping, &self.stages, rank);
            let work = &self.ranks[rank];
            let cover = Cover {
                forward_s: work.forward_s,
                backward_s: work.backward_input_s + work.backward_weight_s,
                n_microbatches,
            };
            let site = sites.of(rank);
            let dp_s = data_parallel_s(workload, mapping, site, held, cover);
            let (optimizer_s, offload_s) = optimizer_s(mapping, site, held);
            (dp_s, optimizer_s, offload_s)
        };
        (parts.dp, parts.optimizer, parts.offload) = once(self.pace);
        if !sites.are_alike() {
            // The step ends with the last rank's update.
            for rank in 0..mapping.pp {
                let (dp_s, optimizer_s, offload_s) = once(rank);
                parts.dp = parts.dp.max(dp_s);
                parts.optimizer = parts.optimizer.max(optimizer_s);
                parts.offload = parts.offload.max(offload_s);
            }
        }
        let moved = (0..mapping.pp)
            .map(|rank| activations_s(memories, mapping, sites.of(rank), rank, &self.ranks[rank]));
        parts.offload += n_microbatches * moved.fold(0.0, f64::max);
        parts
    }

    /// What such a mapping is predicted to take.
    pub fn estimate(&self, mapping: &Mapping) -> Estimate {
        let workload = self.workload;
        let memories = self.memories(mapping);
        let parts = self.whole(mapping, &memories);
        let held_by_rank: Vec<MemoryEstimate> = (0..mapping.pp)
            .map(|rank| memories.of(rank, self.sites.of(rank)))
            .collect();
        let step_s = parts.total();
        let model_flops = workload.model_flops();
        let peak = self.sites.peak(mapping);
        let stages = &self.stages;
        let stage_estimates = self
            .costs
            .iter()
            .zip(stages.all())
            .enumerate()
            .map(|(stage_idx, (cost, stage))| StageEstimate {
                n_layers: stage.layers.len(),
                forward_s: cost.forward.seconds(),
                backward_input_s: cost.backward_input.seconds(),
                backward_weight_s: cost.backward_weight.seconds(),
                recompute_s: cost.recompute.seconds(),
                forward_exchange_s: cost.forward.ep,
                backward_exchange_s: backward_exchange_s(cost),
                // What the last one of a round sends goes to the first one again.
                p2p_s: match self.sends_s.as_slice() {
                    [] => 0.0,
                    sends_s => sends_s[stages.rank_of(stage_idx).min(sends_s.len() - 1)],
                },
                memory: held_by_rank[stages.rank_of(stage_idx)],
            })
            .collect();
        Estimate {
            step_s,
            parts,
            stages: stage_estimates,
            memory: held_by_rank
                .into_iter()
                .max_by_key(MemoryEstimate::total)
                .unwrap_or_default(),
            model_flops,
            mfu: model_flops / (step_s * peak),
            tokens_per_s: workload.tokens() / step_s,
        }
    }
}

/// The work of a stage on a microbatch.
fn work_of(cost: &LayerCost) -> RankWork {
    RankWork {
        forward_s: cost.forward.seconds(),
        backward_input_s: cost.backward_input.seconds() + cost.recompute.seconds(),
        backward_weight_s: cost.backward_weight.seconds(),
        exchange_s: cost.forward.ep + backward_exchange_s(cost),
    }
}

/// The exchange between experts of a backward pass with its recomputation.
fn backward_exchange_s(cost: &LayerCost) -> f64 {
    cost.backward_input.ep + cost.backward_weight.ep + cost.recompute.ep
}

/// The pipeline of a mapping; a schedule that is not built in counts as 1F1B.
fn pipeline<'a>(
    workload: &Workload,
    mapping: &Mapping,
    sites: &Sites<'_>,
    stages: &'a Stages,
) -> PipelineShape<'a> {
    PipelineShape {
        family: family(mapping),
        stages,
        n_microbatches: mapping.n_microbatches(workload.batch).max(1),
        slowdown: sites.distinct().map(pair_slowdown).fold(1.0, f64::max),
        post_validates: workload.software.post_validates,
    }
}

/// The family of a mapping's schedule.
pub(crate) fn family(mapping: &Mapping) -> Builtin {
    Builtin::find(&mapping.pipeline.schedule).unwrap_or(Builtin::OneFOneB)
}

/// What a pair's work takes longer because some units send and receive: 20 of the 132 of an H800
/// (DeepSeek-V3, arXiv 2412.19437, §3.2.2), as many on other devices.
pub(crate) fn pair_slowdown(cluster: &Cluster) -> f64 {
    let n_units = Efficiency::of(cluster.device.arch).n_units as f64;
    if n_units <= 2.0 * EXCHANGE_UNITS {
        return 1.0;
    }
    n_units / (n_units - EXCHANGE_UNITS)
}

/// Units of a device that drive the exchange of experts beside computation.
const EXCHANGE_UNITS: f64 = 20.0;

/// The cost of every stage, in model order; layers of a kind are priced once.
fn stage_costs(
    workload: &Workload,
    mapping: &Mapping,
    sites: &Sites<'_>,
    stages: &Stages,
) -> Vec<LayerCost> {
    let pricers: Vec<Pricer<'_>> = sites
        .distinct()
        .map(|site| Pricer::new(workload, mapping, site))
        .collect();
    let mut kinds: Vec<((bool, bool, usize), LayerCost)> = Vec::with_capacity(4);
    let mut layer = |layer_idx: usize, site_idx: usize| {
        let pricer = &pricers[site_idx];
        let kind = (
            workload.is_moe(layer_idx),
            workload.window_of(layer_idx).is_some(),
            site_idx,
        );
        match kinds.iter().find(|(known, _)| *known == kind) {
            Some((_, cost)) => *cost,
            None => {
                let cost = pricer.layer(layer_idx);
                kinds.push((kind, cost));
                cost
            }
        }
    };
    let mut costs = Vec::with_capacity(stages.all().len());
    for (stage_idx, stage) in stages.all().iter().enumerate() {
        let site_idx = sites.idx_of(stages.rank_of(stage_idx));
        let pricer = &pricers[site_idx];
        let mut cost = LayerCost::default();
        for layer_idx in stage.layers.clone() {
            cost = cost.then(layer(layer_idx, site_idx));
        }
        if stage.embeds {
            cost = cost.then(pricer.embedding());
        }
        if stage.predicts {
            let head = pricer.head();
            cost = cost.then(head);
            for prediction in 0..workload.prediction_layers {
                cost = cost
                    .then(layer(workload.model.n_layers + prediction, site_idx))
                    .then(head);
            }
        }
        let rank = stages.rank_of(stage_idx);
        let n_again = match &mapping.recompute {
            Recompute::None | Recompute::Modules(_) | Recompute::Full => None,
            Recompute::Layers(count) => Some(*count),
            Recompute::LayersByRank(counts) => counts.get(rank).copied(),
        };
        if let Some(n_again) = n_again {
            let held = stages.n_layers_of(rank, workload).max(1) as f64;
            cost.recompute = cost.recompute.times((n_again as f64 / held).min(1.0));
        }
        costs.push(cost);
    }
    costs
}

/// Seconds of a microbatch in which a rank waits for kept activations on their way to the host and back.
///
/// Both ways have their own half of the link, and copies take none of the device's units: what leaves
/// runs under the forward pass, what returns under the backward pass (Mist, EuroSys'25, §4.2). The first
/// layer that returns has nothing to run under.
fn activations_s(
    memories: &Memories<'_>,
    mapping: &Mapping,
    cluster: &Cluster,
    rank: usize,
    work: &RankWork,
) -> f64 {
    if mapping.offload.activations == 0.0 {
        return 0.0;
    }
    let (kept, n_layers) = memories.kept_of_microbatch(rank);
    let one_way_s = mapping.offload.activations * kept / cluster.device.host_bytes_per_s;
    let backward_s = work.backward_input_s + work.backward_weight_s;
    (one_way_s - work.forward_s).max(0.0)
        + (one_way_s - backward_s).max(0.0)
        + one_way_s / n_layers.max(1.0)
}

/// Messages of the pipeline that nothing hides: those that fill and drain it, and in its steady state
/// those for which the host waits.
///
/// Filling and draining takes the messages of all boundaries; the steady state keeps the pace of the
/// slowest one.
fn p2p_s(workload: &Workload, mapping: &Mapping, sends_s: &[f64], n_microbatches: f64) -> f64 {
    if mapping.pp < 2 {
        return 0.0;
    }
    let directions = if workload.job == Job::Train { 2.0 } else { 1.0 };
    let send_s = sends_s.iter().copied().fold(0.0, f64::max);
    let is_alike = sends_s.iter().all(|one| *one == send_s);
    let fill = directions
        * match is_alike {
            true => (mapping.pp - 1) as f64 * send_s,
            false => sends_s.iter().sum(),
        };
    let chunks = mapping.pipeline.chunks as f64;
    let is_split = family(mapping).splits_backward();
    let exposed_s = if workload.software.blocking_p2p && !is_split {
        send_s + BLOCKING_S
    } else if chunks > 1.0 || is_split {
        0.0
    } else {
        send_s
    };
    fill + directions * chunks * n_microbatches * exposed_s
}

/// Seconds in which the device idles when the host waits for a message before it launches on.
const BLOCKING_S: f64 = 800e-6;

/// Weights of a pipeline rank.
fn held(workload: &Workload, mapping: &Mapping, stages: &Stages, pipeline_rank: usize) -> Held {
    let parameters = workload.parameters();
    let tp = mapping.tp as f64;
    let mut held = Held {
        n_copies: stages.n_copies() as f64,
        ..Held::default()
    };
    let (mut n_moe, mut embeds, mut predicts) = (0, false, false);
    let mut n_layers = 0;
    for (stage, _) in stages.on(pipeline_rank) {
        let stage = stages.get(stage);
        n_layers += stage.layers.len();
        n_moe += workload.n_moe(&stage.layers);
        embeds |= stage.embeds;
        predicts |= stage.predicts;
    }
    if predicts {
        n_layers += workload.prediction_layers;
        n_moe += match workload.model.moe {
            Some(_) => workload.prediction_layers,
            None => 0,
        };
    }
    held.n_layers = n_layers as f64;
    let (n_moe, n_dense) = (n_moe as f64, (n_layers - n_moe) as f64);
    let moe_layer = parameters.attention + parameters.moe_dense;
    held.dense = (n_dense * (parameters.attention + parameters.mlp) + n_moe * moe_layer) / tp;
    let experts = parameters.n_experts * parameters.expert;
    held.experts = n_moe * experts / (mapping.etp * mapping.ep) as f64;
    if embeds {
        held.dense += parameters.embedding / tp;
    }
    if predicts && (parameters.head > 0.0 || !embeds) {
        held.dense += parameters.head.max(parameters.embedding) / tp;
    }
    held
}

/// Checks that the schedule is one that trains on whole sequences and the same weights, and is defined
/// for the pipeline.
fn fits(workload: &Workload, mapping: &Mapping) -> Result<(), Unpriced> {
    let name = &mapping.pipeline.schedule;
    let Some(family) = Builtin::families().find(|family| family.name() == name) else {
        return Err(match Builtin::find(name) {
            Some(_) => Unpriced::Unsupported(format!(
                "schedule `{name}` has no price in a plan: it divides sequences or trains on stale weights; \
                 `meshweave schedule show {name}` simulates it"
            )),
            None => Unpriced::Invalid(format!(
                "there is no schedule `{name}`; there are {}",
                names_of_families()
            )),
        });
    };
    let n_microbatches = mapping.n_microbatches(workload.batch).max(1);
    let shape = Shape::new(mapping.pp, n_microbatches).chunks(mapping.pipeline.chunks);
    family
        .fits(&shape)
        .map_err(|error| Unpriced::Invalid(error.to_string()))
}

/// The schedules that plans choose among, in words.
pub fn names_of_families() -> String {
    let names: Vec<&str> = Builtin::families().map(Builtin::name).collect();
    names.join(", ")
}

/// What must hold before anything is priced.
fn check(workload: &Workload, mapping: &Mapping, cluster: &Cluster) -> Result<(), Unpriced> {
    let invalid = |message: String| Err(Unpriced::Invalid(message));
    mapping
        .check()
        .map_err(|error| Unpriced::Invalid(error.to_string()))?;
    if workload.batch == 0 || workload.seq == 0 || workload.model.n_layers == 0 {
        return invalid("a step without sequences, tokens or layers has no price".into());
    }
    if cluster.is_mixed() && mapping.pp > 1 && family(mapping).n_copies() > 1 {
        return Err(Unpriced::Unsupported(format!(
            "schedule `{}` has every stage on two pipeline ranks, and cluster `{}` has devices of several types",
            mapping.pipeline.schedule, cluster.name
        )));
    }
    if mapping.n_ranks() > cluster.n_devices() {
        return invalid(format!(
            "the mapping has {} ranks and the cluster {} devices",
            mapping.n_ranks(),
            cluster.n_devices()
        ));
    }
    if mapping.pp > 1 && workload.job == Job::Train {
        fits(workload, mapping)?;
    }
    let offload = mapping.offload;
    if (offload.optimizer || offload.activations > 0.0) && cluster.device.host_bytes_per_s <= 0.0 {
        return Err(Unpriced::Unsupported(format!(
            "device `{}` has no link to its host; give it one, as in `host_bandwidth 25 GB/s`, or offload nothing",
            cluster.device.name
        )));
    }
    let n_layers = workload.model.n_layers;
    match &mapping.pipeline.layers {
        Some(layers) if layers.iter().sum::<usize>() != n_layers => invalid(format!(
            "the stages hold {} layers and the model has {n_layers}",
            layers.iter().sum::<usize>()
        )),
        None if mapping.n_stages() > n_layers + 2 => invalid(format!(
            "{} stages share {n_layers} layers; lower pp or chunks",
            mapping.n_stages()
        )),
        _ => Ok(()),
    }
}
