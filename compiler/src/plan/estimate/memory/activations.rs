//! The tensors that a layer keeps for its backward pass, one by one.
//!
//! Enters: a workload and a mapping. Leaves: every saved tensor of a layer with its owner and its bytes
//! on one rank for one microbatch, and the largest working set of the backward pass.
//! Invariant: with learned positions, dropout and unfused attention the tensors add up to
//! `s·b·h (34 + 5·a·s/h)` bytes (Korthikanti et al. 2022, arXiv 2205.05198, eq. 1), and divided by `tp`
//! to their eq. 2 to 4.

use meshweave_dsl::mapping::{Compute, Context, Mapping, Module, Recompute};

use crate::model::Positions;
use crate::plan::estimate::workload::{AttentionKernel, Job, Workload};

/// What recomputation drops a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The layer's input: kept by every choice.
    Input,
    /// Dropped with the whole layer only.
    Layer,
    /// Dropped with a part of the layer.
    Part(Module),
}

/// The sizes of one layer's tensors on one rank, for one microbatch.
#[derive(Clone, Copy, Debug)]
pub struct LayerSizes<'a> {
    workload: &'a Workload,
    mapping: &'a Mapping,
    /// Tokens of the rank's part of the sequences.
    tokens: f64,
    /// Tokens between the blocks: divided by `tp` with sequence parallelism.
    outside: f64,
    tp: f64,
    embed: f64,
    /// Bytes of an activation.
    half: f64,
    /// Bytes of a kept operand of a contraction.
    operand: f64,
    /// Widths of all query heads, and of all key heads.
    queries: f64,
    keys: f64,
    values: f64,
}

impl<'a> LayerSizes<'a> {
    pub fn new(workload: &'a Workload, mapping: &'a Mapping) -> Self {
        let attention = &workload.model.attention;
        let tp = mapping.tp as f64;
        let per_sequence = match workload.job {
            Job::Train | Job::Prefill => workload.seq as f64 / mapping.cp as f64,
            Job::Decode { .. } => 1.0,
        };
        let tokens = mapping.micro_batch as f64 * per_sequence;
        let value = attention
            .mla
            .as_ref()
            .map_or(attention.head, |mla| mla.value);
        let half = match mapping.precision.compute {
            Compute::F32 | Compute::Tf32 => 4.0,
            _ => 2.0,
        };
        let operand = match mapping.precision.compute {
            // One byte and a scale every 32 elements or fewer; half a byte and one every 16.
            Compute::Fp8 | Compute::MxFp8 => 1.0,
            Compute::NvFp4 => 0.5625,
            _ => half,
        };
        Self {
            workload,
            mapping,
            tokens,
            outside: tokens / if mapping.sequence_parallel { tp } else { 1.0 },
            tp,
            embed: workload.model.embed as f64,
            half,
            operand,
            queries: (attention.heads * attention.head) as f64,
            keys: (attention.kv_heads * attention.head) as f64,
            values: (attention.kv_heads * value) as f64,
        }
    }

    /// Calls `keep` with the owner, the name and the bytes of every saved tensor.
    pub fn saved(&self, is_moe: bool, keep: &mut impl FnMut(Owner, &'static str, f64)) {
        let software = &self.workload.software;
        keep(Owner::Input, "input", self.outside * self.embed * self.half);
        self.saved_norm(keep);
        if self.workload.model.attention.mla.is_some() {
            self.saved_latents(keep);
        } else {
            self.saved_projections(keep);
        }
        self.saved_core(keep);
        if software.framework.dropout {
            keep(
                Owner::Layer,
                "mask after attention",
                self.outside * self.embed,
            );
        }
        keep(
            Owner::Layer,
            "input of the second block",
            self.outside * self.embed * self.half,
        );
        self.saved_norm(keep);
        if is_moe {
            self.saved_experts(keep);
        } else {
            let width = self.workload.model.ffn.width as f64;
            self.saved_ffn(Module::Mlp, width, keep);
        }
        if software.framework.dropout {
            keep(
                Owner::Layer,
                "mask after the second block",
                self.outside * self.embed,
            );
        }
    }

    fn saved_norm(&self, keep: &mut impl FnMut(Owner, &'static str, f64)) {
        let owner = Owner::Part(Module::Norm);
        let elements = self.outside * self.embed;
        keep(owner, "norm", elements * self.operand);
        if !self.workload.software.fused_norm {
            // Written out in the library: the f32 copy that is squared, and the normalized half copy
            // that the scale multiplies.
            keep(owner, "f32 copy of the norm", elements * 4.0);
            keep(owner, "unscaled norm", elements * self.half);
        }
    }

    /// Queries, keys and values as projected; rotated queries and keys beside them.
    fn saved_projections(&self, keep: &mut impl FnMut(Owner, &'static str, f64)) {
        let per_element = self.tokens * self.half / self.tp;
        let projected = self.queries + self.keys + self.values;
        keep(
            Owner::Layer,
            "queries, keys, values",
            projected * per_element,
        );
        if matches!(self.workload.model.positions, Positions::Rope(_)) {
            let rotated = self.queries + self.keys;
            keep(
                Owner::Layer,
                "rotated queries and keys",
                rotated * per_element,
            );
        }
    }

    /// Multi-head latent attention: latents are kept whole, what is projected up from them is divided.
    fn saved_latents(&self, keep: &mut impl FnMut(Owner, &'static str, f64)) {
        let attention = &self.workload.model.attention;
        let Some(mla) = &attention.mla else { return };
        let latents = (mla.q_rank.map_or(0, |rank| 2 * rank) + 2 * mla.kv_rank + mla.rope) as f64;
        keep(Owner::Layer, "latents", self.outside * latents * self.half);
        let per_element = self.tokens * self.half / self.tp;
        let up = Owner::Part(Module::MlaUp);
        let heads = attention.heads as f64;
        let projected = self.queries + heads * (mla.nope + mla.value) as f64;
        keep(up, "queries, keys, values", projected * per_element);
        // The shared rotated key is copied into every head.
        keep(
            up,
            "rotated queries and keys",
            2.0 * self.queries * per_element,
        );
    }

    fn saved_core(&self, keep: &mut impl FnMut(Owner, &'static str, f64)) {
        let software = &self.workload.software;
        let core = Owner::Part(Module::CoreAttention);
        let heads = self.workload.model.attention.heads as f64;
        let scores = self.tokens * self.workload.seq as f64 * heads / self.tp;
        let dropped = if software.framework.dropout {
            1.0 + self.half
        } else {
            0.0
        };
        match software.attention {
            AttentionKernel::Flash | AttentionKernel::Flash1 | AttentionKernel::Flash2 => {
                keep(
                    core,
                    "log-sums of the scores",
                    self.tokens * heads * 4.0 / self.tp,
                );
            }
            AttentionKernel::FusedSoftmax => {
                keep(core, "probabilities", scores * (self.half + dropped));
            }
            AttentionKernel::Unfused => {
                // The softmax in f32, then its half copy for the product.
                let in_f32 = if self.half < 4.0 { 4.0 } else { 0.0 };
                keep(
                    core,
                    "probabilities",
                    scores * (in_f32 + self.half + dropped),
                );
            }
        }
        let value_heads = self.values * heads / self.workload.model.attention.kv_heads as f64;
        let context = self.tokens * value_heads / self.tp;
        keep(Owner::Layer, "output of attention", context * self.half);
    }

    fn saved_ffn(
        &self,
        owner: Module,
        width: f64,
        keep: &mut impl FnMut(Owner, &'static str, f64),
    ) {
        if self.workload.software.framework.tiles_ffn {
            return;
        }
        let elements = self.tokens * width / self.tp;
        let gated = self.workload.model.ffn.gated;
        let owner = Owner::Part(owner);
        keep(
            owner,
            "up projections",
            elements * self.half * if gated { 2.0 } else { 1.0 },
        );
        if gated && !self.workload.software.fused_elementwise {
            keep(owner, "activated gate", elements * self.half);
        }
        keep(
            owner,
            "operand of the down projection",
            elements * self.operand,
        );
    }

    /// Tokens that the experts of a rank receive, over all of its experts, as if they were balanced.
    fn routed(&self) -> f64 {
        let Some(moe) = &self.workload.model.moe else {
            return 0.0;
        };
        let slots = if moe.capacity_factor > 0.0 {
            moe.capacity_factor
        } else {
            1.0
        };
        // Tokens are divided over `tp` before they are sent, and gathered over `etp` after.
        self.tokens / self.tp * moe.top_k as f64 * slots * self.mapping.etp as f64
    }

    fn saved_experts(&self, keep: &mut impl FnMut(Owner, &'static str, f64)) {
        let Some(moe) = &self.workload.model.moe else {
            return;
        };
        let owner = Owner::Part(Module::Moe);
        let gated = self.workload.model.ffn.gated;
        let (routed, width) = (self.routed(), (moe.ffn / self.mapping.etp) as f64);
        keep(owner, "router", self.outside * moe.n_experts as f64 * 8.0);
        keep(owner, "routed tokens", routed * self.embed * self.operand);
        keep(
            owner,
            "up projections of experts",
            routed * width * self.half * if gated { 2.0 } else { 1.0 },
        );
        keep(
            Owner::Part(Module::MoeActivation),
            "operand of the experts' down projections",
            routed * width * self.operand,
        );
        if let Some(shared) = &moe.shared {
            self.saved_ffn(Module::Moe, shared.ffn as f64, keep);
        }
    }

    /// Bytes that a layer keeps under a choice of what is computed again.
    pub fn kept(&self, is_moe: bool, recompute: &Recompute) -> f64 {
        let mut bytes = 0.0;
        self.saved(is_moe, &mut |owner, _, tensor| {
            let is_kept = match (recompute, owner) {
                (_, Owner::Input) => true,
                (Recompute::None | Recompute::Layers(_) | Recompute::LayersByRank(_), _) => true,
                (Recompute::Full, _) => false,
                (Recompute::Modules(_), Owner::Layer) => true,
                (Recompute::Modules(parts), Owner::Part(part)) => {
                    !(parts.contains(&part)
                        || part == Module::MoeActivation && parts.contains(&Module::Moe))
                }
            };
            if is_kept {
                bytes += tensor;
            }
        });
        bytes
    }

    /// The largest working set of a layer's backward pass: gradients of the block in work, and what
    /// the block computes again.
    pub fn working_set(&self, is_moe: bool, recompute: &Recompute) -> f64 {
        let per_element = self.tokens * self.half / self.tp;
        let matrices = if self.workload.model.ffn.gated {
            3.0
        } else {
            2.0
        };
        let ffn = match &self.workload.model.moe {
            Some(moe) if is_moe => {
                let shared = moe.shared.as_ref().map_or(0, |shared| shared.ffn) as f64;
                let width = (moe.ffn / self.mapping.etp) as f64;
                self.routed() * (matrices * width + self.embed) * self.half
                    + matrices * shared * per_element
            }
            _ if self.workload.software.framework.tiles_ffn => 0.0,
            _ => matrices * self.workload.model.ffn.width as f64 * per_element,
        };
        let heads = self.workload.model.attention.heads as f64;
        let projected = (self.queries + self.keys + self.values) * per_element;
        let attention = match self.workload.software.attention {
            // FlashAttention-2 (arXiv 2307.08691) sums the gradients of the queries in f32.
            AttentionKernel::Flash | AttentionKernel::Flash1 | AttentionKernel::Flash2 => {
                projected + self.tokens * self.queries * 4.0 / self.tp
            }
            AttentionKernel::FusedSoftmax | AttentionKernel::Unfused => {
                let scores = self.tokens * self.workload.seq as f64 * heads / self.tp;
                projected + 2.0 * scores * self.half
            }
        };
        let whole = self.kept(is_moe, &Recompute::None);
        let again = match recompute {
            Recompute::None => 0.0,
            Recompute::Full | Recompute::Layers(_) | Recompute::LayersByRank(_) => {
                whole - self.kept(is_moe, &Recompute::Full)
            }
            Recompute::Modules(_) => whole - self.kept(is_moe, recompute),
        };
        ffn.max(attention) + again
    }

    /// Bytes of one residual stream of the rank's tokens, not divided by `tp`.
    pub fn stream(&self) -> f64 {
        self.tokens * self.embed * self.half
    }

    /// Buffers of the collectives of `tp`, `cp`, `ep` and `pp` while a layer runs.
    pub fn buffers(&self, is_moe: bool) -> f64 {
        let mapping = self.mapping;
        let mut bytes = 0.0;
        if mapping.tp > 1 {
            // With sequence parallelism: the gathered input, the gathered gradient of the output, and
            // the sum that is scattered; without: the sum.
            bytes += self.stream() * if mapping.sequence_parallel { 3.0 } else { 1.0 };
        }
        if mapping.cp > 1 {
            let per_element = self.tokens * self.half / self.tp;
            bytes += match mapping.context {
                Context::Ring => 2.0 * (self.keys + self.values) * per_element,
                Context::AllGather => (self.keys + self.values) * per_element * mapping.cp as f64,
                Context::Ulysses => (self.queries + self.keys + self.values) * per_element,
            };
        }
        if is_moe && mapping.ep > 1 {
            // What is sent and what is received.
            bytes += 2.0 * self.routed() * self.embed * self.half;
        }
        if mapping.pp > 1 {
            bytes += 2.0 * self.outside * self.embed * self.half;
        }
        bytes
    }

    /// Bytes at the head while the loss is computed, and bytes that a waiting loss keeps.
    pub fn logits(&self) -> (f64, f64) {
        use super::framework::Loss;
        let logits = self.tokens * self.workload.model.vocab as f64;
        let n_heads = 1.0 + self.workload.prediction_layers as f64;
        let (peak, waiting) = match self.workload.software.framework.loss {
            Loss::Sliced => (logits * (self.half + 8.0) / self.tp, logits * 4.0 / self.tp),
            // The gradient of the head's operand; a tile is as long as the stream is wide (Liger).
            Loss::Tiled => {
                let tile = self.embed.min(self.tokens) * self.workload.model.vocab as f64;
                (self.stream() + tile * (self.half + 4.0) / self.tp, 0.0)
            }
            Loss::Gathered => {
                let gathered = if self.mapping.tp > 1 {
                    self.half / self.tp
                } else {
                    0.0
                };
                (logits * (self.half + 12.0 + gathered), logits * 4.0)
            }
        };
        // The head's operand: the normed output of the last layer, gathered.
        (n_heads * peak + self.stream(), n_heads * waiting)
    }

    /// Bytes that a forward pass holds at once: its input and output, and the largest block's tensors.
    pub fn forward_set(&self, is_moe: bool) -> f64 {
        let mut block = 0.0_f64;
        let mut largest = 0.0_f64;
        self.saved(is_moe, &mut |owner, _, tensor| {
            // The layer's input and the second block's stay; within a block all are live at worst.
            match owner {
                Owner::Input => block = 0.0,
                Owner::Part(Module::Norm) => block = tensor,
                _ => block += tensor,
            }
            largest = largest.max(block);
        });
        largest + 2.0 * self.outside * self.embed * self.half
    }

    /// Bytes of one token's keys and values in one layer on one rank of `tp`.
    ///
    /// With latent attention one latent and one rotated key serve all heads (arXiv 2405.04434, §2.1.2),
    /// and every rank of `tp` holds them; else each rank holds its heads, at least one.
    pub fn cached_token(&self) -> f64 {
        let attention = &self.workload.model.attention;
        match &attention.mla {
            Some(mla) => (mla.kv_rank + mla.rope) as f64 * self.half,
            None => {
                let n_heads = attention.kv_heads.div_ceil(self.mapping.tp);
                (2 * n_heads * attention.head) as f64 * self.half
            }
        }
    }

    /// Bytes of the logits of the last token of every sequence in work, and their f32 copy.
    pub fn last_logits(&self) -> f64 {
        let sequences = self.mapping.micro_batch as f64;
        sequences * self.workload.model.vocab as f64 / self.tp * (self.half + 4.0)
    }
}
