//! Memory of the ranks of one pipeline rank.
//!
//! Enters: a workload, a mapping, a pipeline rank. Leaves: bytes by what they hold at the peak of a step,
//! whether they fit a device, and how often such a prediction was exceeded.
//! Invariant: what `zero`, `tp`, `cp`, `ep` and `pp` divide is divided here; activations are the sum of
//! the tensors in [`activations`], replayed through the schedule's peak in [`schedules`].

pub mod activations;
pub mod framework;
pub mod schedules;

#[cfg(test)]
mod tests;

use std::borrow::Cow;

use meshweave_dsl::cluster::{Cluster, Device};
use meshweave_dsl::mapping::{Mapping, Recompute};
use meshweave_dsl::units::Bytes;

use super::stages::Stages;
use super::workload::{Job, Parameters, Workload};
use activations::LayerSizes;
pub use framework::{Framework, Loss};

/// Part of what lives and dies within a step that an allocator of variable blocks cannot reuse.
///
/// PyTorch's allocator rounds blocks above 1 MiB to 2 MiB and splits none above a configured size; in
/// published pairs of allocated and reserved peaks of runs without pinned tensors the gap is 0 to 7 %.
pub const UNUSABLE: f64 = 0.04;

/// The CUDA context with the modules of a training program, in bytes (`nvidia-smi` of an idle process
/// that has loaded PyTorch, cuBLAS and cuDNN on an H100 or A100: 0.5 to 0.8 GiB).
pub const CONTEXT_BYTES: f64 = 0.7e9;

/// Buffers of one NCCL communicator: up to 16 channels, each with a buffer of 4 MiB
/// (`NCCL_BUFFSIZE`) and the smaller ones of LL and LL128 to send and to receive.
pub const COMMUNICATOR_BYTES: f64 = 0.2e9;

/// Measured over predicted bytes at the tenths of the rows of `data/published/memory.csv`, from the lowest
/// to the highest; a test holds them against the table.
pub const MEASURED_OVER_PREDICTED: [f64; 11] = [
    0.73, 0.91, 0.94, 0.97, 1.00, 1.01, 1.03, 1.05, 1.07, 1.12, 1.53,
];

/// Bytes of a rank at the peak of a step; what is not live then counts as nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryEstimate {
    pub parameters: Bytes,
    pub gradients: Bytes,
    pub optimizer: Bytes,
    /// Kept for the backward pass.
    pub activations: Bytes,
    /// The working set of the layer in work, or copies that an update makes.
    pub temporaries: Bytes,
    /// Buffers of collectives, and parameters gathered from their shards.
    pub communication: Bytes,
    pub logits: Bytes,
    /// Keys and values of the tokens before.
    pub cache: Bytes,
    /// What an allocator holds and cannot use.
    pub fragmentation: Bytes,
    /// Context, libraries, communicators.
    pub framework: Bytes,
}

impl MemoryEstimate {
    /// What the program's tensors take: PyTorch's `max_memory_allocated`.
    pub fn allocated(&self) -> Bytes {
        let parts = [
            self.parameters,
            self.gradients,
            self.optimizer,
            self.activations,
            self.temporaries,
            self.communication,
            self.logits,
            self.cache,
        ];
        parts.into_iter().fold(Bytes(0), Bytes::saturating_add)
    }

    /// What its allocator takes from the device: PyTorch's `max_memory_reserved`.
    pub fn reserved(&self) -> Bytes {
        self.allocated().saturating_add(self.fragmentation)
    }

    /// What the process takes.
    pub fn total(&self) -> Bytes {
        self.reserved().saturating_add(self.framework)
    }

    /// Whether the process fits a device of which a part, 0 to 1, stays free.
    pub fn fits(&self, device: &Device, headroom: f64) -> bool {
        self.total().0 as f64 <= device.memory_bytes as f64 * (1.0 - headroom)
    }

    /// How often a prediction like this one was exceeded by so much that the device would overflow: the
    /// part of the published rows whose measured bytes over predicted ones lie above the room there is.
    pub fn risk(&self, device: &Device) -> f64 {
        let room = device.memory_bytes as f64 - self.framework.0 as f64;
        let ratio = room / (self.reserved().0 as f64).max(1.0);
        let table = &MEASURED_OVER_PREDICTED;
        let n_steps = table.len() - 1;
        let above = table.iter().filter(|quantile| **quantile <= ratio).count();
        if above == 0 {
            return 1.0;
        }
        if above > n_steps {
            return 0.0;
        }
        let (low, high) = (table[above - 1], table[above]);
        let within = (ratio - low) / (high - low);
        1.0 - (above as f64 - 1.0 + within) / n_steps as f64
    }
}

/// The parameters of one pipeline rank, per rank of `tp` and of `etp × ep`.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    dense: f64,
    experts: f64,
    /// Of the largest layer.
    layer: f64,
    /// Of the output head.
    head: f64,
    n_dense_layers: f64,
    n_moe_layers: f64,
    predicts: bool,
    /// Ranks of a pipeline that hold a weight; layers are counted once, weights on each.
    n_copies: usize,
}

impl Held {
    /// The greater price of the kinds of layers there are.
    fn either(&self, price: &dyn Fn(bool) -> f64) -> f64 {
        let kinds = [(self.n_dense_layers, false), (self.n_moe_layers, true)];
        let present = kinds.into_iter().filter(|(n_layers, _)| *n_layers > 0.0);
        present.map(|(_, is_moe)| price(is_moe)).fold(0.0, f64::max)
    }

    /// Bytes that a microbatch leaves in all layers.
    fn kept(&self, sizes: &LayerSizes<'_>, recompute: &Recompute) -> f64 {
        let of = |recompute: &Recompute| {
            let mut layers = 0.0;
            for (n_layers, is_moe) in [(self.n_dense_layers, false), (self.n_moe_layers, true)] {
                if n_layers > 0.0 {
                    layers += n_layers * sizes.kept(is_moe, recompute);
                }
            }
            layers
        };
        match recompute {
            Recompute::Layers(whole) => {
                let n_layers = self.n_dense_layers + self.n_moe_layers;
                let part = (*whole as f64 / n_layers.max(1.0)).min(1.0);
                part * of(&Recompute::Full) + (1.0 - part) * of(&Recompute::None)
            }
            other => of(other),
        }
    }
}

/// The memory of a mapping's pipeline ranks. What they have in common is computed once.
pub struct Memories<'a> {
    workload: &'a Workload,
    mapping: &'a Mapping,
    parameters: Parameters,
    stages: Cow<'a, Stages>,
    sizes: LayerSizes<'a>,
}

impl<'a> Memories<'a> {
    pub fn new(workload: &'a Workload, mapping: &'a Mapping) -> Self {
        Self::with_stages(
            workload,
            mapping,
            Cow::Owned(Stages::new(workload, mapping)),
        )
    }

    /// The same, with the mapping's stages.
    pub fn with_stages(
        workload: &'a Workload,
        mapping: &'a Mapping,
        stages: Cow<'a, Stages>,
    ) -> Self {
        Self {
            workload,
            mapping,
            parameters: workload.parameters(),
            stages,
            sizes: LayerSizes::new(workload, mapping),
        }
    }

    /// Bytes at the peak of a step, of the ranks of a pipeline rank that are on this cluster.
    pub fn of(&self, pipeline_rank: usize, cluster: &Cluster) -> MemoryEstimate {
        let held = self.held(pipeline_rank);
        let mut estimate = match self.workload.job {
            Job::Train => self.training(&held, pipeline_rank),
            Job::Prefill | Job::Decode { .. } => self.inference(&held, pipeline_rank),
        };
        if cluster.device.kind == meshweave_dsl::cluster::DeviceKind::Gpu {
            let communicators = COMMUNICATOR_BYTES * n_communicators(self.mapping);
            estimate.framework = bytes(CONTEXT_BYTES + communicators);
        }
        estimate
    }

    /// Bytes of activations that a microbatch leaves for its backward pass on a pipeline rank, none of
    /// them offloaded, and the layers that they are of.
    pub fn kept_of_microbatch(&self, pipeline_rank: usize) -> (f64, f64) {
        let held = self.held(pipeline_rank);
        let recompute = self.mapping.recompute.of_rank(pipeline_rank);
        let n_layers = held.n_dense_layers + held.n_moe_layers;
        (held.kept(&self.sizes, &recompute), n_layers)
    }

    /// Bytes of a device's share of its host that offloading takes: optimizer state, and the activations
    /// of all microbatches in flight.
    pub fn on_host(&self, pipeline_rank: usize) -> Bytes {
        let mapping = self.mapping;
        let offload = mapping.offload;
        let mut held_there = 0.0;
        if offload.optimizer {
            let held = self.held(pipeline_rank);
            let shard = |replicas: usize| match mapping.zero.stage {
                0 => 1.0,
                _ => mapping.zero.group.unwrap_or(replicas).min(replicas).max(1) as f64,
            };
            let dense = held.dense / shard(mapping.dp * mapping.cp);
            let experts = held.experts / shard(mapping.edp());
            held_there += f64::from(mapping.precision.optimizer_bytes) * (dense + experts);
        }
        if offload.activations > 0.0 {
            let (kept, _) = self.kept_of_microbatch(pipeline_rank);
            held_there += offload.activations * kept * self.in_flight(pipeline_rank);
        }
        bytes(held_there)
    }

    /// Microbatches whose activations a pipeline rank holds at once.
    fn in_flight(&self, pipeline_rank: usize) -> f64 {
        let mapping = self.mapping;
        schedules::in_flight(
            &mapping.pipeline.schedule,
            mapping.pp,
            mapping.pipeline.chunks,
            pipeline_rank,
            mapping.n_microbatches(self.workload.batch).max(1),
        )
    }

    fn held(&self, pipeline_rank: usize) -> Held {
        let (workload, mapping, parameters) = (self.workload, self.mapping, &self.parameters);
        let (tp, within) = (mapping.tp as f64, (mapping.etp * mapping.ep) as f64);
        let experts = parameters.n_experts * parameters.expert / within;
        let mut held = Held {
            n_copies: self.stages.n_copies(),
            ..Held::default()
        };
        let mut embeds = false;
        for (stage, _) in self.stages.on(pipeline_rank) {
            let stage = self.stages.get(stage);
            let n_moe = workload.n_moe(&stage.layers);
            held.n_moe_layers += n_moe as f64;
            held.n_dense_layers += (stage.layers.len() - n_moe) as f64;
            embeds |= stage.embeds;
            held.predicts |= stage.predicts;
        }
        if held.predicts {
            let ahead = workload.prediction_layers as f64;
            match workload.is_moe(workload.model.n_layers) {
                true => held.n_moe_layers += ahead,
                false => held.n_dense_layers += ahead,
            }
            held.dense += parameters.prediction / tp;
            held.head = (workload.model.embed * workload.model.vocab) as f64 / tp;
        }
        let of_dense = parameters.active(false) / tp;
        let of_moe = (parameters.active(true) - parameters.top_k * parameters.expert) / tp;
        held.dense += held.n_dense_layers * of_dense + held.n_moe_layers * of_moe;
        held.experts += held.n_moe_layers * experts;
        held.layer = held.either(&|is_moe| if is_moe { of_moe + experts } else { of_dense });
        if embeds {
            held.dense += parameters.embedding / tp;
        }
        if held.predicts && parameters.head > 0.0 {
            held.dense += parameters.head / tp;
        } else if held.predicts && !embeds {
            // A tied head on another rank than the embedding is a second copy of it.
            held.dense += held.head;
        }
        held.n_dense_layers /= held.n_copies as f64;
        held.n_moe_layers /= held.n_copies as f64;
        held
    }

    fn training(&self, held: &Held, pipeline_rank: usize) -> MemoryEstimate {
        let (workload, mapping, sizes) = (self.workload, self.mapping, &self.sizes);
        let framework = &workload.software.framework;
        let (precision, zero) = (mapping.precision, mapping.zero);
        let replicas = mapping.dp * mapping.cp;
        let n_copies = held.n_copies.max(1);
        // Bytes of something of every parameter that is divided from a stage of ZeRO on (Rajbhandari et al.
        // 2020, arXiv 1910.02054, Figure 1); experts have their own replicas, and each copy of the model in
        // a pipeline of two directions has as many.
        let divided = |per_parameter: f64, from_stage: u8| {
            let shard = |replicas: usize| match zero.stage >= from_stage {
                true => zero.group.unwrap_or(replicas).min(replicas).max(1) as f64,
                false => 1.0,
            };
            let (dense, experts) = (replicas * n_copies, mapping.edp() * n_copies);
            per_parameter * (held.dense / shard(dense) + held.experts / shard(experts))
        };
        let whole_parameters = held.dense + held.experts;
        let is_replicated = replicas * n_copies > 1;
        let parameters = divided(f64::from(precision.parameter_bytes), 3);
        // Host optimizers of ZeRO-2 and up take the gradients with them (ZeRO-Offload, arXiv 2101.06840).
        let gradients_leave = mapping.offload.optimizer && zero.stage >= 2;
        let gradient_bytes = f64::from(precision.gradient_bytes);
        // The part that stage 2 adds up whole: a layer's gradients are reduced when its backward pass ends,
        // a stage's when its rank turns to another.
        let whole_part = match zero.stage == 2 && mapping.pp > 1 {
            true => {
                let chunks = mapping.pipeline.chunks;
                1.0 / schedules::stages_of_rank(&mapping.pipeline.schedule, chunks) as f64
            }
            false => 0.0,
        };
        let shards = match gradients_leave {
            true => 0.0,
            false => (1.0 - whole_part) * divided(gradient_bytes, 2),
        };
        let accumulated = shards + whole_part * gradient_bytes * whole_parameters;
        let buckets = if is_replicated {
            f64::from(framework.bucket_bytes) * whole_parameters
        } else {
            0.0
        };
        let optimizer = match mapping.offload.optimizer {
            true => 0.0,
            false => divided(f64::from(precision.optimizer_bytes), 1),
        };

        let n_microbatches = mapping.n_microbatches(workload.batch).max(1);
        let schedule = &mapping.pipeline.schedule;
        let in_flight = self.in_flight(pipeline_rank);
        let recompute = &mapping.recompute.of_rank(pipeline_rank);
        let n_layers = held.n_dense_layers + held.n_moe_layers;
        let per_microbatch = held.kept(sizes, recompute);
        let activations =
            per_microbatch * in_flight * (1.0 - mapping.offload.activations.clamp(0.0, 1.0));

        let either = |price: &dyn Fn(bool) -> f64| held.either(price);
        let working_set = either(&|is_moe| sizes.working_set(is_moe, recompute));
        let staging = if mapping.offload.activations > 0.0 {
            // One layer on its way out or in while the next one computes.
            2.0 * per_microbatch / n_layers.max(1.0)
        } else {
            0.0
        };
        let gathered = if zero.stage >= 3 && is_replicated {
            // The layer in work and the one fetched ahead, or the head; and gradients before they are reduced.
            let live = (2.0 * held.layer)
                .max(held.head)
                .max(framework.gathered_elements);
            let unreduced = held.layer.max(held.head).max(framework.gathered_elements);
            compute_bytes(mapping) * (live.min(whole_parameters) + unreduced.min(whole_parameters))
        } else if whole_part == 0.0 && (gradients_leave || (zero.stage == 2 && is_replicated)) {
            let unreduced = held.layer.max(framework.gathered_elements);
            gradient_bytes * unreduced.min(whole_parameters)
        } else {
            0.0
        };
        let communication = either(&|is_moe| sizes.buffers(is_moe)) + gathered;
        let (at_loss, waiting) = if held.predicts {
            sizes.logits()
        } else {
            (0.0, 0.0)
        };
        let waiting = if schedules::keeps_losses(schedule) {
            waiting * (n_microbatches as f64 - 1.0)
        } else {
            0.0
        };
        let logits = at_loss + waiting;
        // The loss is computed before the backward pass of the layers below begins.
        let layers_work = working_set + staging;
        let (temporaries, logits) = if logits > layers_work + waiting {
            (0.0, logits)
        } else {
            (layers_work, waiting)
        };

        let pinned = if framework.pins_sequences && mapping.tp > 1 {
            // The host meets the device at every boundary of a pipeline: then one of the two tensors that a
            // layer's backward pass leaves behind is free again.
            let per_layer = if mapping.pp > 1 { 1.0 } else { 2.0 };
            per_layer * n_layers * sizes.stream()
        } else {
            0.0
        };
        let fragmentation =
            UNUSABLE * (activations + temporaries + logits + communication) + pinned;
        let update = if framework.gathers_at_once && zero.stage >= 1 && is_replicated {
            f64::from(precision.parameter_bytes) * whole_parameters
                + divided(f64::from(precision.parameter_bytes), 1)
        } else {
            0.0
        };
        let state = MemoryEstimate {
            parameters: bytes(parameters),
            gradients: bytes(accumulated + buckets),
            optimizer: bytes(optimizer),
            ..MemoryEstimate::default()
        };
        if update > activations + temporaries + logits + communication + fragmentation {
            return MemoryEstimate {
                temporaries: bytes(update),
                ..state
            };
        }
        MemoryEstimate {
            activations: bytes(activations),
            temporaries: bytes(temporaries),
            communication: bytes(communication),
            logits: bytes(logits),
            fragmentation: bytes(fragmentation),
            ..state
        }
    }

    fn inference(&self, held: &Held, pipeline_rank: usize) -> MemoryEstimate {
        let (workload, mapping, sizes) = (self.workload, self.mapping, &self.sizes);
        let parameters = f64::from(mapping.precision.parameter_bytes) * (held.dense + held.experts);
        let either = |price: &dyn Fn(bool) -> f64| held.either(price);
        // A replica's sequences are all in the caches of its pipeline ranks, each for its own layers.
        let sequences = (workload.batch as f64 / mapping.dp as f64).max(1.0);
        let n_tokens = match workload.job {
            Job::Decode { context } => context + 1,
            Job::Train | Job::Prefill => workload.seq,
        };
        let mut layer_tokens = 0.0;
        for (stage, _) in self.stages.on(pipeline_rank) {
            let stage = self.stages.get(stage);
            for layer_idx in stage.layers.clone() {
                let window = workload.window_of(layer_idx).unwrap_or(n_tokens);
                layer_tokens += window.min(n_tokens) as f64 / mapping.cp as f64;
            }
        }
        let cache = sequences * layer_tokens * sizes.cached_token();
        let working_set = either(&|is_moe| sizes.forward_set(is_moe));
        let communication = either(&|is_moe| sizes.buffers(is_moe));
        let logits = if held.predicts {
            sizes.last_logits()
        } else {
            0.0
        };
        MemoryEstimate {
            parameters: bytes(parameters),
            cache: bytes(cache),
            temporaries: bytes(working_set),
            communication: bytes(communication),
            logits: bytes(logits),
            fragmentation: bytes(UNUSABLE * (working_set + communication + logits)),
            ..MemoryEstimate::default()
        }
    }
}

/// Memory of the ranks of a pipeline rank, in bytes at the peak of a step.
pub fn memory(
    workload: &Workload,
    mapping: &Mapping,
    cluster: &Cluster,
    pipeline_rank: usize,
) -> MemoryEstimate {
    Memories::new(workload, mapping).of(pipeline_rank, cluster)
}

fn bytes(value: f64) -> Bytes {
    Bytes(value.max(0.0).round() as u64)
}

/// Axes with more than one rank: each has its communicator.
fn n_communicators(mapping: &Mapping) -> f64 {
    let degrees = [
        mapping.tp,
        mapping.cp,
        mapping.dp,
        mapping.pp,
        mapping.ep,
        mapping.etp,
        mapping.edp(),
    ];
    let has_experts = mapping.ep * mapping.etp > 1;
    let used = degrees.iter().enumerate();
    used.filter(|(idx, degree)| **degree > 1 && (*idx < 4 || has_experts))
        .count() as f64
}

/// Bytes of a parameter as contractions read it.
fn compute_bytes(mapping: &Mapping) -> f64 {
    use meshweave_dsl::mapping::Compute;
    match mapping.precision.compute {
        Compute::F32 | Compute::Tf32 => 4.0,
        _ => 2.0,
    }
}
