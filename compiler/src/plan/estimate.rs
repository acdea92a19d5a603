//! Estimates: the step time and the memory of a [`Mapping`] of a decoder on a cluster, in closed form.
//!
//! Enters: a [`Workload`], a mapping, a cluster. Leaves: an [`Estimate`]: seconds by cause, the costs of
//! every stage, the memory of the worst rank.
//! Invariant: pure and deterministic, and cheap enough to be called for every mapping of a search;
//! prices are those of [`super::cost`].

pub mod memory;
pub mod stages;
pub mod workload;

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::mapping::{GridAxis, Mapping, Recompute};

pub use memory::{Framework, MemoryEstimate, memory};
pub use workload::{AttentionKernel, Job, Parameters, Software, Workload};

use super::cost::{GroupShape, Traffic, contract_seconds, fragment_seconds, traffic_seconds};
use stages::Stages;

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
    check(workload, mapping, cluster)?;
    let model = &workload.model;
    let parameters = workload.parameters();
    let stages = Stages::new(workload, mapping);
    let tokens = mapping.micro_batch as f64 * workload.seq as f64 / mapping.cp as f64;
    let n_microbatches = mapping.n_microbatches(workload.batch).max(1) as f64;
    let (tp, embed) = (mapping.tp as f64, model.embed as f64);
    let group = |axis: GridAxis| GroupShape::of(&mapping.groups(axis).of(0), cluster);
    let value = model
        .attention
        .mla
        .as_ref()
        .map_or(model.attention.head, |mla| mla.value);
    // The two boundaries of tensor parallelism of a layer, each a gather and a scatter of activations.
    let tp_layer_s = 2.0
        * traffic_seconds(
            Traffic::AllReduce,
            2.0 * tokens * embed,
            group(GridAxis::Tp),
            cluster,
        );
    let kept_s = |n_flops: f64| contract_seconds(n_flops, 0.0, DType::Bf16, cluster);
    let layer = |layer_idx: usize| {
        let is_moe = workload.is_moe(layer_idx);
        let keys = workload.mean_keys(workload.window_of(layer_idx));
        let n_flops = 2.0 * tokens * parameters.active(is_moe) / tp
            + 2.0 * tokens * keys * (model.attention.heads * (model.attention.head + value)) as f64
                / tp;
        let elementwise_s = fragment_seconds(0.0, 40.0 * tokens * embed / tp, cluster);
        let ep_s = if is_moe {
            let routed = 2.0 * tokens / tp * embed * parameters.top_k;
            2.0 * traffic_seconds(Traffic::AllToAll, routed, group(GridAxis::Ep), cluster)
        } else {
            0.0
        };
        (kept_s(n_flops) + elementwise_s, tp_layer_s, ep_s)
    };
    let mut stage_estimates = Vec::with_capacity(stages.all().len());
    let mut worst = Parts::default();
    let mut worst_memory = MemoryEstimate::default();
    let full = matches!(mapping.recompute, Recompute::Full);
    for pipeline_rank in 0..mapping.pp {
        let mut parts = Parts::default();
        let held = memory(workload, mapping, cluster, pipeline_rank);
        if held.total() > worst_memory.total() {
            worst_memory = held;
        }
        for chunk in 0..mapping.pipeline.chunks {
            let stage = stages.get(stages.stage_of(pipeline_rank, chunk));
            let mut one = StageEstimate {
                n_layers: stage.layers.len(),
                memory: held,
                ..StageEstimate::default()
            };
            for layer_idx in stage.layers.clone() {
                let (compute_s, tp_s, ep_s) = layer(layer_idx);
                let again = if full { 1.0 } else { 0.0 };
                let forward_s = compute_s + tp_s + ep_s;
                one.forward_s += forward_s;
                one.backward_input_s += compute_s + tp_s + ep_s;
                one.backward_weight_s += compute_s;
                one.recompute_s += again * forward_s;
                parts.compute += 3.0 * compute_s;
                parts.recompute += again * forward_s;
                parts.tp += 2.0 * tp_s;
                parts.ep += 2.0 * ep_s;
            }
            if stage.predicts {
                let logits_s = kept_s(2.0 * tokens * embed * model.vocab as f64 / tp);
                one.forward_s += logits_s;
                one.backward_input_s += logits_s;
                one.backward_weight_s += logits_s;
                parts.compute += 3.0 * logits_s;
            }
            stage_estimates.push(one);
        }
        if parts.total() > worst.total() {
            worst = parts;
        }
    }
    if workload.job != Job::Train {
        worst.compute /= 3.0;
        worst.tp /= 2.0;
        worst.ep /= 2.0;
        worst.recompute = 0.0;
    }
    let per_microbatch = worst.total();
    for part in [
        &mut worst.compute,
        &mut worst.recompute,
        &mut worst.tp,
        &mut worst.ep,
    ] {
        *part *= n_microbatches;
    }
    worst.bubble = per_microbatch * (mapping.pp - 1) as f64 / mapping.pipeline.chunks as f64;
    if workload.job == Job::Train {
        let held = parameters.total() / (tp * mapping.pp as f64);
        worst.dp = traffic_seconds(Traffic::AllReduce, 2.0 * held, group(GridAxis::Dp), cluster);
        let shard = if mapping.zero.stage > 0 {
            mapping.dp as f64
        } else {
            1.0
        };
        worst.optimizer = fragment_seconds(0.0, 30.0 * held / shard, cluster);
    }
    let step_s = worst.total();
    let model_flops = workload.model_flops();
    let peak = cluster.device.matmul_peak(DType::Bf16) * mapping.n_ranks() as f64;
    Ok(Estimate {
        step_s,
        parts: worst,
        stages: stage_estimates,
        memory: worst_memory,
        model_flops,
        mfu: model_flops / (step_s * peak),
        tokens_per_s: workload.tokens() / step_s,
    })
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
    if mapping.n_ranks() > cluster.n_devices() {
        return invalid(format!(
            "the mapping has {} ranks and the cluster {} devices",
            mapping.n_ranks(),
            cluster.n_devices()
        ));
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
