//! Memory of the ranks of one pipeline rank.
//!
//! Enters: a workload, a mapping, a pipeline rank. Leaves: bytes by what they hold.
//! Invariant: what `zero`, `tp`, `ep` and `pp` divide is divided here.

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::mapping::{Mapping, Recompute};
use meshweave_dsl::units::Bytes;

use super::stages::Stages;
use super::workload::{Job, Workload};

/// Bytes of a rank at the peak of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryEstimate {
    pub parameters: Bytes,
    pub gradients: Bytes,
    pub optimizer: Bytes,
    pub activations: Bytes,
    /// Operands and results of the op that has most of them.
    pub temporaries: Bytes,
    pub communication: Bytes,
    pub logits: Bytes,
    /// Context, libraries, and what an allocator cannot use.
    pub framework: Bytes,
}

impl MemoryEstimate {
    /// All of it.
    pub fn total(&self) -> Bytes {
        let parts = [
            self.parameters,
            self.gradients,
            self.optimizer,
            self.activations,
            self.temporaries,
            self.communication,
            self.logits,
            self.framework,
        ];
        parts.into_iter().fold(Bytes(0), Bytes::saturating_add)
    }
}

/// Memory of the ranks of a pipeline rank.
pub fn memory(
    workload: &Workload,
    mapping: &Mapping,
    _cluster: &Cluster,
    pipeline_rank: usize,
) -> MemoryEstimate {
    let parameters = workload.parameters();
    let stages = Stages::new(workload, mapping);
    let (tp, precision) = (mapping.tp as f64, mapping.precision);
    let (mut dense, mut experts, mut n_layers) = (0.0, 0.0, 0.0);
    for chunk in 0..mapping.pipeline.chunks {
        let stage = stages.get(stages.stage_of(pipeline_rank, chunk));
        for layer_idx in stage.layers.clone() {
            n_layers += 1.0;
            let is_moe = workload.is_moe(layer_idx);
            dense += (parameters.active(is_moe)
                - f64::from(u8::from(is_moe)) * parameters.top_k * parameters.expert)
                / tp;
            if is_moe {
                experts +=
                    parameters.n_experts * parameters.expert / (mapping.etp * mapping.ep) as f64;
            }
        }
        if stage.embeds {
            dense += parameters.embedding / tp;
        }
        if stage.predicts {
            dense += (if parameters.head > 0.0 {
                parameters.head
            } else {
                parameters.embedding
            }) / tp;
        }
    }
    let shard = |stage: u8, group: usize| {
        if mapping.zero.stage >= stage {
            group.max(1) as f64
        } else {
            1.0
        }
    };
    let (dp, edp) = (mapping.dp * mapping.cp, mapping.edp());
    let held = |bytes: u8, stage: u8| {
        f64::from(bytes) * (dense / shard(stage, dp) + experts / shard(stage, edp))
    };
    let tokens = mapping.micro_batch as f64 * workload.seq as f64 / mapping.cp as f64;
    let embed = workload.model.embed as f64;
    let in_flight = (mapping.pp - pipeline_rank)
        .min(mapping.n_microbatches(workload.batch))
        .max(1) as f64;
    // Korthikanti et al. 2022, table 2: 34 bytes an element without the scores, 2 with full recomputation.
    let per_layer = match (&mapping.recompute, workload.job) {
        (_, Job::Prefill | Job::Decode { .. }) => 0.0,
        (Recompute::Full, Job::Train) => 2.0,
        (_, Job::Train) if mapping.sequence_parallel || tp < 2.0 => 34.0 / tp,
        (_, Job::Train) => 10.0 + 24.0 / tp,
    };
    let is_training = workload.job == Job::Train;
    let training = |bytes: f64| Bytes(if is_training { bytes as u64 } else { 0 });
    MemoryEstimate {
        parameters: Bytes(held(precision.parameter_bytes, 3) as u64),
        gradients: training(held(precision.gradient_bytes, 2)),
        optimizer: training(held(precision.optimizer_bytes, 1)),
        activations: training(per_layer * tokens * embed * n_layers * in_flight),
        temporaries: Bytes(0),
        communication: Bytes(0),
        logits: training(if pipeline_rank + 1 == mapping.pp {
            8.0 * tokens * workload.model.vocab as f64 / tp
        } else {
            0.0
        }),
        framework: Bytes(3_000_000_000),
    }
}
