//! What a layer costs one rank, for one microbatch.
//!
//! Enters: a workload, a mapping, a cluster. Leaves: seconds of the passes of a layer, with the exposed
//! communication apart.
//! Invariant: a pass is at least as long as the host takes to launch its kernels.
//!
//! Legend of sizes: T tokens of a rank (microbatch · sequence / cp), D width of the residual stream,
//! F width of a feed-forward block. A *pass* over a tensor reads or writes it once in 16 bits.

mod pass;

use meshweave_dsl::cluster::{Cluster, Device};
use meshweave_dsl::mapping::{Compute, Context, GridAxis, Mapping, Module, Recompute};

pub use pass::{LayerCost, Pass};

use super::workload::{AttentionKernel, Job, Software, Workload};
use crate::model::{MoeConfig, NormKind};
use crate::plan::cost::compute::{MatmulShape, attention_part, matmul_seconds, stream_seconds};
use crate::plan::cost::efficiency::Efficiency;
use crate::plan::cost::links::{GroupShape, Traffic, traffic_seconds};

/// Part of a collective that runs under a contraction which is lost all the same: both share the
/// units and the memory.
const CONTENTION: f64 = 0.2;
/// Part of a collective that is cut into pieces under its contraction and stays exposed: the first
/// piece and the last.
const PIECES_EXPOSED: f64 = 0.25;
/// Part of an overlapped `all_to_all` that stays exposed where the schedule has no pairs that are priced
/// one by one.
const EXCHANGE_EXPOSED: f64 = 0.4;

/// What a random number for dropout costs, in passes: Philox is bound by arithmetic (Table 6 of arXiv
/// 2401.10241: forward passes of stages with and without as many scores).
const RANDOM_PASSES: f64 = 4.5;

/// Prices layers of one workload under one mapping.
pub struct Pricer<'a> {
    workload: &'a Workload,
    mapping: &'a Mapping,
    cluster: &'a Cluster,
    device: &'a Device,
    efficiency: Efficiency,
    software: &'a Software,
    /// The schedule runs forwards beside backwards; the pipeline's price says what that hides.
    has_pairs: bool,
    /// T, D.
    tokens: f64,
    embed: f64,
    tp: f64,
    /// Tokens of a rank between the blocks of `tp`.
    tokens_between: f64,
    tp_group: GroupShape,
    cp_group: GroupShape,
    ep_group: GroupShape,
    etp_group: GroupShape,
}

/// Seconds of a block forward and backward.
#[derive(Clone, Copy, Debug, Default)]
struct Block {
    forward: f64,
    backward_input: f64,
    backward_weight: f64,
    forward_kernels: f64,
    backward_kernels: f64,
}

impl Block {
    fn add(&mut self, other: Self) {
        self.forward += other.forward;
        self.backward_input += other.backward_input;
        self.backward_weight += other.backward_weight;
        self.forward_kernels += other.forward_kernels;
        self.backward_kernels += other.backward_kernels;
    }
}

impl<'a> Pricer<'a> {
    /// A pricer of the mapping.
    pub fn new(workload: &'a Workload, mapping: &'a Mapping, cluster: &'a Cluster) -> Self {
        let group = |axis| GroupShape::of_axis(mapping.groups(axis), cluster);
        let tokens = match workload.job {
            Job::Train | Job::Prefill => {
                mapping.micro_batch as f64 * workload.seq as f64 / mapping.cp as f64
            }
            Job::Decode { .. } => mapping.micro_batch as f64,
        };
        let tp = mapping.tp as f64;
        Self {
            workload,
            mapping,
            cluster,
            device: &cluster.device,
            efficiency: Efficiency::of(cluster.device.arch),
            software: &workload.software,
            has_pairs: super::family(mapping).has_pairs(),
            tokens,
            embed: workload.model.embed as f64,
            tp,
            tokens_between: if mapping.sequence_parallel {
                tokens / tp
            } else {
                tokens
            },
            tp_group: group(GridAxis::Tp),
            cp_group: group(GridAxis::Cp),
            ep_group: group(GridAxis::Ep),
            etp_group: group(GridAxis::Etp),
        }
    }

    /// The cost of a layer.
    pub fn layer(&self, layer_idx: usize) -> LayerCost {
        let moe = self.workload.model.moe.as_ref();
        let window = self.workload.window_of(layer_idx);
        match moe.filter(|_| self.workload.is_moe(layer_idx)) {
            Some(moe) => self.whole(window, Some(moe)),
            None => self.whole(window, None),
        }
    }

    fn whole(&self, window: Option<usize>, moe: Option<&MoeConfig>) -> LayerCost {
        let projections = self.projections();
        let up = self.latent_up();
        let core = self.core_attention(window);
        let norms = self.norms();
        let between = self.between();
        let (mlp, exchange) = match moe {
            None => (self.mlp(self.workload.model.ffn.width as f64), 0.0),
            Some(moe) => (self.experts(moe), self.exchange(moe)),
        };
        let activation = moe.map_or(0.0, |moe| {
            let width = (moe.top_k * moe.ffn) as f64 / self.mapping.etp as f64;
            self.stream(self.activation_passes().0 * self.expert_tokens() * width)
        });
        let mut all = Block::default();
        for part in [projections, up, core, norms, between, mlp] {
            all.add(part);
        }
        let (tp_forward, tp_backward) = self.tp_exposed(moe.is_some(), all);
        let cp = self.cp_exposed(core);
        let ep = exchange
            * if self.software.overlap_ep && !self.has_pairs {
                EXCHANGE_EXPOSED
            } else {
                1.0
            };
        let launch_s = self.launch_s();
        let forward = Pass {
            compute: all.forward,
            tp: tp_forward,
            cp: cp[0],
            ep,
            kernels: all.forward_kernels,
        };
        let again = |compute: f64, kernels: f64| Pass {
            compute,
            kernels,
            ..Pass::default()
        };
        let recompute = match &self.mapping.recompute {
            Recompute::None => Pass::default(),
            // Of the layers that are: how many those are is the rank's.
            Recompute::Full | Recompute::Layers(_) | Recompute::LayersByRank(_) => forward,
            Recompute::Modules(modules) => {
                let mut sum = Pass::default();
                for module in modules {
                    sum = sum.then(match module {
                        Module::CoreAttention => again(core.forward, core.forward_kernels),
                        Module::MlaUp => again(up.forward, up.forward_kernels),
                        Module::Norm => again(norms.forward, norms.forward_kernels),
                        Module::Mlp if moe.is_none() => again(mlp.forward, mlp.forward_kernels),
                        Module::Mlp => Pass::default(),
                        Module::Moe if moe.is_some() => Pass {
                            ep,
                            ..again(mlp.forward, mlp.forward_kernels)
                        },
                        Module::Moe => Pass::default(),
                        Module::MoeActivation => again(activation, 1.0),
                    });
                }
                sum
            }
        };
        // The backward kernels are launched by one thread, whichever gradient they make.
        let half = 0.5 * all.backward_kernels;
        LayerCost {
            forward: forward.launched(launch_s),
            backward_input: Pass {
                compute: all.backward_input,
                tp: tp_backward,
                cp: cp[1],
                ep,
                kernels: half,
            }
            .launched(launch_s),
            backward_weight: Pass {
                compute: all.backward_weight,
                kernels: half,
                ..Pass::default()
            }
            .launched(launch_s),
            recompute: recompute.launched(launch_s),
        }
    }

    /// Seconds of the host a kernel. Every collective of `tp` waits for the slowest of its hosts, and
    /// delays of so many hosts grow like those of a random walk.
    fn launch_s(&self) -> f64 {
        let pipelined = if self.mapping.pp > 1 {
            self.software.pipelined_launches
        } else {
            1.0
        };
        self.software.launch_s * pipelined * self.tp.sqrt()
    }

    /// The head and the loss: logits of T tokens, cross entropy over a divided vocabulary.
    pub fn head(&self) -> LayerCost {
        let vocab = self.workload.model.vocab as f64 / self.tp;
        let mut block = self.matmul(MatmulShape::new(self.tokens, vocab, self.embed));
        // Bytes a logit: bf16 read and f32 written, maximum, exponentials and sum; the gradient.
        let (forward, backward) = if self.software.fused_loss {
            (6.0, 6.0)
        } else {
            (24.0, 14.0)
        };
        block.forward += stream_seconds(forward * self.tokens * vocab, self.device);
        block.backward_input += stream_seconds(backward * self.tokens * vocab, self.device);
        let tp_s = if self.mapping.sequence_parallel {
            self.collective(
                Traffic::AllGather,
                2.0 * self.tokens * self.embed,
                self.tp_group,
            )
        } else {
            0.0
        };
        LayerCost {
            forward: Pass {
                compute: block.forward,
                tp: tp_s,
                kernels: 10.0,
                ..Pass::default()
            },
            backward_input: Pass {
                compute: block.backward_input,
                tp: tp_s,
                kernels: 10.0,
                ..Pass::default()
            },
            backward_weight: Pass {
                compute: block.backward_weight,
                kernels: 2.0,
                ..Pass::default()
            },
            recompute: Pass::default(),
        }
    }

    /// The embedding: a gather of rows forward, a scattered sum backward, a collective over `tp`.
    pub fn embedding(&self) -> LayerCost {
        let rows = self.tokens * self.embed;
        let tp_s = self.collective(Traffic::ReduceScatter, 2.0 * rows, self.tp_group);
        let pass = |n_bytes: f64| Pass {
            compute: stream_seconds(n_bytes * rows, self.device),
            tp: tp_s,
            kernels: 6.0,
            ..Pass::default()
        };
        LayerCost {
            forward: pass(6.0),
            backward_weight: pass(12.0),
            ..LayerCost::default()
        }
    }

    /// Bytes that a stage sends to the next one, a rank and microbatch.
    pub fn boundary_bytes(&self) -> f64 {
        // Without sequence parallelism Megatron scatters before and gathers after (SC 2021, §4.1).
        2.0 * self.tokens * self.embed / self.tp
    }

    /// Seconds of so many passes' elements.
    fn stream(&self, elements: f64) -> f64 {
        stream_seconds(2.0 * elements, self.device)
    }

    fn collective(&self, traffic: Traffic, n_bytes: f64, group: GroupShape) -> f64 {
        traffic_seconds(traffic, n_bytes, group, self.cluster)
    }

    /// A contraction of T rows with its two gradients, and the passes that quantize its operands.
    fn matmul(&self, shape: MatmulShape) -> Block {
        let compute = self.mapping.precision.compute;
        let MatmulShape { m, n, k, groups } = shape;
        let operand = match compute {
            Compute::F32 | Compute::Tf32 => 4.0,
            Compute::F16 | Compute::Bf16 => 2.0,
            Compute::Fp8 | Compute::MxFp8 => 1.0,
            Compute::NvFp4 => 0.5,
        };
        let bytes = |a: f64, b: f64, result: f64| groups * (operand * (a + b) + result);
        let run =
            |shape: MatmulShape, n_bytes: f64| matmul_seconds(shape, n_bytes, compute, self.device);
        // The gradient of the weight is summed up in f32, by the contraction or after it.
        let gradient = f64::from(self.mapping.precision.gradient_bytes);
        let (sum, apart) = match self.software.fused_accumulation || self.mapping.zero.stage > 1 {
            true => (2.0 * gradient, 0.0),
            false => (2.0, 2.0 + 2.0 * gradient),
        };
        let (rows, columns) = (groups * m * k, groups * m * n);
        // Read once in 16 bits, written twice: as rows and as columns of the products to come.
        let (quantize_forward, quantize_backward, cast_kernels) = match compute {
            Compute::F32 | Compute::Tf32 | Compute::F16 | Compute::Bf16 => (0.0, 0.0, 0.0),
            Compute::Fp8 | Compute::MxFp8 | Compute::NvFp4 => {
                let written = 2.0 * operand;
                (
                    stream_seconds((2.0 + written) * rows, self.device),
                    stream_seconds((2.0 + written) * columns, self.device),
                    // Blocks' scales are laid out for the tensor cores by kernels of their own.
                    if compute == Compute::Fp8 { 2.0 } else { 4.0 },
                )
            }
        };
        let (w, x, y) = (k * n, m * k, m * n);
        // Every group is a call of the library, with its split and its scales.
        let launches = if groups > 1.0 { 2.0 * groups } else { 1.0 };
        Block {
            forward: run(shape, bytes(x, w, 2.0 * y)) + quantize_forward,
            backward_input: run(
                MatmulShape {
                    m,
                    n: k,
                    k: n,
                    groups,
                },
                bytes(y, w, 2.0 * x),
            ) + quantize_backward,
            backward_weight: run(
                MatmulShape {
                    m: k,
                    n,
                    k: m,
                    groups,
                },
                bytes(x, y, sum * w),
            ) + stream_seconds(apart * groups * w, self.device),
            forward_kernels: launches * (1.0 + cast_kernels),
            backward_kernels: launches * (2.0 + 1.5 * cast_kernels),
        }
    }

    /// The projections before and after attention.
    fn projections(&self) -> Block {
        let attention = &self.workload.model.attention;
        let heads = (attention.heads * attention.head) as f64 / self.tp;
        let (t, d) = (self.tokens, self.embed);
        let mut block = Block::default();
        match &attention.mla {
            None => {
                let kv_heads = (attention.kv_heads * attention.head) as f64 / self.tp;
                block.add(self.matmul(MatmulShape::new(t, heads + 2.0 * kv_heads, d)));
                block.add(self.matmul(MatmulShape::new(t, d, heads)));
            }
            Some(mla) => {
                // The downward projections are not divided over tp, but run on its share of tokens.
                let own = self.tokens_between;
                if let Some(q_rank) = mla.q_rank {
                    block.add(self.matmul(MatmulShape::new(own, q_rank as f64, d)));
                } else {
                    block.add(self.matmul(MatmulShape::new(t, heads, d)));
                }
                block.add(self.matmul(MatmulShape::new(own, (mla.kv_rank + mla.rope) as f64, d)));
                let values = (attention.heads * mla.value) as f64 / self.tp;
                block.add(self.matmul(MatmulShape::new(t, d, values)));
            }
        }
        block
    }

    /// The upward projections of latent attention.
    fn latent_up(&self) -> Block {
        let attention = &self.workload.model.attention;
        let mut block = Block::default();
        if let Some(mla) = &attention.mla {
            let heads = attention.heads as f64 / self.tp;
            if let Some(q_rank) = mla.q_rank {
                let width = heads * attention.head as f64;
                block.add(self.matmul(MatmulShape::new(self.tokens, width, q_rank as f64)));
            }
            let width = heads * (mla.nope + mla.value) as f64;
            block.add(self.matmul(MatmulShape::new(self.tokens, width, mla.kv_rank as f64)));
            // Heads are put together from their parts, forward and backward.
            let joined =
                self.stream(2.0 * self.tokens * heads * (2 * attention.head + mla.value) as f64);
            block.forward += joined;
            block.backward_input += joined;
            block.forward_kernels += 8.0;
            block.backward_kernels += 8.0;
        }
        block
    }

    /// Scores, softmax and the product with the values.
    fn core_attention(&self, window: Option<usize>) -> Block {
        let attention = &self.workload.model.attention;
        let value = attention
            .mla
            .as_ref()
            .map_or(attention.head, |mla| mla.value);
        let heads = attention.heads as f64 / self.tp;
        let t = self.tokens;
        let peak = self.device.matmul_peak(meshweave_dsl::dtype::DType::Bf16);
        let seq = self.workload.seq as f64;
        let flops = |keys: f64| 2.0 * t * keys * heads * (attention.head + value) as f64;
        let flash = |parts: [f64; 2]| {
            let keys = self.workload.mean_keys(window);
            let span = window.map_or(seq, |window| seq.min(2.0 * window as f64));
            let part = attention_part(span, attention.head as f64);
            Block {
                forward: flops(keys) / (peak * parts[0] * part),
                backward_input: 2.5 * flops(keys) / (peak * parts[1] * part),
                backward_weight: 0.0,
                forward_kernels: 1.0,
                backward_kernels: 3.0,
            }
        };
        // Through memory: every score is written and read by both products and by the softmax, whole,
        // not only its causal half (Megatron's fused kernel skips nothing either).
        let unfused = |passes: [f64; 2]| {
            let keys = seq;
            let scores = t * keys * heads;
            let matmul_s = flops(keys) / (peak * self.efficiency.batched);
            let dropout = if self.software.framework.dropout {
                [2.5 + RANDOM_PASSES, 2.5]
            } else {
                [0.0, 0.0]
            };
            Block {
                forward: matmul_s + self.stream((passes[0] + dropout[0]) * scores),
                backward_input: 2.0 * matmul_s + self.stream((passes[1] + dropout[1]) * scores),
                backward_weight: 0.0,
                forward_kernels: 4.0,
                backward_kernels: 7.0,
            }
        };
        if let Job::Decode { .. } = self.workload.job {
            let keys = self.workload.mean_keys(window);
            let kept = attention.mla.as_ref().map_or_else(
                || (attention.kv_heads * 2 * attention.head) as f64 / self.tp,
                |mla| (mla.kv_rank + mla.rope) as f64,
            );
            return Block {
                forward: self.stream(t * keys * kept).max(flops(keys) / (peak * 0.3)),
                forward_kernels: 2.0,
                ..Block::default()
            };
        }
        match self.software.attention {
            AttentionKernel::Flash => flash(self.efficiency.attention),
            AttentionKernel::Flash2 => flash(self.efficiency.attention2),
            AttentionKernel::Flash1 => flash(self.efficiency.attention1),
            AttentionKernel::FusedSoftmax => unfused([4.0, 7.0]),
            AttentionKernel::Unfused => unfused([12.0, 14.0]),
        }
    }

    /// Both norms of a layer.
    fn norms(&self) -> Block {
        let elements = 2.0 * self.tokens_between * self.embed;
        let is_rms = self.workload.model.norm.kind == NormKind::Rms;
        // RMS norm op by op goes through f32: cast, square, mean, scale, cast, weight.
        let (forward, backward, kernels) = match (self.software.fused_norm, is_rms) {
            (true, _) => (2.0, 3.0, 1.0),
            (false, false) => (2.0, 4.0, 2.0),
            (false, true) => (18.0, 36.0, 6.0),
        };
        Block {
            forward: self.stream(forward * elements),
            backward_input: self.stream(backward * elements),
            backward_weight: 0.0,
            forward_kernels: 2.0 * kernels,
            backward_kernels: 4.0 * kernels,
        }
    }

    /// Residual sums, rotations and what else stands between contractions.
    fn between(&self) -> Block {
        let attention = &self.workload.model.attention;
        let residual = 2.0 * self.tokens_between * self.embed;
        let rotated = self.tokens
            * ((attention.heads + attention.kv_heads) * attention.head) as f64
            / self.tp;
        let is_rope = matches!(
            self.workload.model.positions,
            crate::model::Positions::Rope(_)
        );
        let rotation = match (is_rope, self.software.fused_elementwise) {
            (false, _) => 0.0,
            (true, true) => 2.0,
            (true, false) => 10.0,
        };
        let dropout = if self.software.framework.dropout {
            1.0
        } else {
            0.0
        };
        // The projected queries, keys and values are laid out for attention.
        let laid_out = self.tokens
            * ((attention.heads + 2 * attention.kv_heads) * attention.head) as f64
            / self.tp;
        // One by one: dropout and sum, each with its copy.
        let sum = if self.software.fused_elementwise {
            3.0
        } else {
            12.0
        };
        let elements = (sum + dropout * (1.0 + RANDOM_PASSES)) * residual
            + rotation * rotated
            + 2.0 * laid_out;
        let backward = (sum + dropout) * residual + rotation * rotated + 2.0 * laid_out;
        // Collectives with the copies before and after them.
        let tp_kernels = if self.mapping.tp > 1 { 12.0 } else { 0.0 };
        Block {
            forward: self.stream(elements),
            backward_input: self.stream(backward),
            backward_weight: 0.0,
            forward_kernels: 20.0 + tp_kernels,
            backward_kernels: 30.0 + 2.0 * tp_kernels,
        }
    }

    /// Passes over the width of a feed-forward block that the activation takes, forward and backward.
    fn activation_passes(&self) -> (f64, f64) {
        match (
            self.workload.model.ffn.gated,
            self.software.fused_elementwise,
        ) {
            (true, true) => (3.0, 5.0),
            (true, false) => (5.0, 8.0),
            (false, _) => (2.0, 3.0),
        }
    }

    /// A dense feed-forward block.
    fn mlp(&self, width: f64) -> Block {
        let width = width / self.tp;
        let ups = if self.workload.model.ffn.gated {
            2.0
        } else {
            1.0
        };
        let (t, d) = (self.tokens, self.embed);
        let mut block = self.matmul(MatmulShape::new(t, ups * width, d));
        block.add(self.matmul(MatmulShape::new(t, d, width)));
        let (forward, backward) = self.activation_passes();
        block.forward += self.stream(forward * t * width);
        block.backward_input += self.stream(backward * t * width);
        block.forward_kernels += 2.0;
        block.backward_kernels += 2.0;
        block
    }

    /// Tokens whose experts' work a rank does, each counted once: those of the ranks it exchanges with
    /// share by share.
    fn expert_tokens(&self) -> f64 {
        self.tokens / self.tp * self.mapping.etp as f64
    }

    /// Router, permutations, experts, shared experts.
    fn experts(&self, moe: &MoeConfig) -> Block {
        let (d, e) = (self.embed, moe.n_experts as f64);
        let own = self.tokens / self.tp;
        let mut block = Block::default();
        // The router works in f32.
        let scores = own * e;
        let router_s = stream_seconds(4.0 * own * d + 24.0 * scores, self.device);
        block.add(Block {
            forward: router_s,
            backward_input: 1.5 * router_s,
            backward_weight: 0.0,
            forward_kernels: 25.0,
            backward_kernels: 35.0,
        });
        // Permutation into the order of experts and back, each read once and written top_k times, or
        // the other way round; once more in the order of local experts after the exchange.
        let routed = self.expert_tokens() * moe.top_k as f64;
        let n_local = e / self.mapping.ep as f64;
        let is_sorted = self.mapping.ep > 1 && n_local > 1.0 && !self.software.dispatch_once_a_node;
        let sorted = if is_sorted { 4.0 * routed } else { 0.0 };
        let permuted = self.stream((2.0 * (own + own * moe.top_k as f64) + sorted) * d);
        block.add(Block {
            forward: permuted,
            backward_input: permuted,
            backward_weight: 0.0,
            forward_kernels: 40.0,
            backward_kernels: 55.0,
        });
        let width = moe.ffn as f64 / self.mapping.etp as f64;
        let ups = if self.workload.model.ffn.gated {
            2.0
        } else {
            1.0
        };
        let rows = routed / n_local;
        let grouped = |n: f64, k: f64| MatmulShape {
            m: rows,
            n,
            k,
            groups: n_local,
        };
        block.add(self.matmul(grouped(ups * width, d)));
        block.add(self.matmul(grouped(d, width)));
        let (forward, backward) = self.activation_passes();
        block.forward += self.stream(forward * routed * width);
        block.backward_input += self.stream(backward * routed * width);
        block.forward_kernels += 4.0;
        block.backward_kernels += 4.0;
        if let Some(shared) = &moe.shared {
            block.add(self.mlp(shared.ffn as f64));
        }
        block
    }

    /// Seconds of the exchanges of one pass: to the experts and back.
    fn exchange(&self, moe: &MoeConfig) -> f64 {
        let own = self.tokens / self.tp;
        let top_k = moe.top_k as f64;
        let mut sent = 2.0 * own * self.embed * top_k;
        let group = self.ep_group;
        if self.software.dispatch_once_a_node && group.n_nodes > 1 {
            // Expected nodes that hold any of a token's experts.
            let m = group.n_nodes as f64;
            let nodes = m * (1.0 - (1.0 - 1.0 / m).powf(top_k));
            sent *= nodes / top_k;
        }
        let dispatch = self.collective(Traffic::AllToAll, sent, group);
        let gathered = 2.0 * own * self.embed * top_k * self.mapping.etp as f64;
        let within = self.collective(Traffic::AllGather, gathered, self.etp_group);
        2.0 * (dispatch + within)
    }

    /// Exposed collectives of `tp` of a layer, forward and backward.
    ///
    /// With sequence parallelism a block gathers before and scatters after; without, it reduces. The
    /// backward pass does the same in reverse and gathers the block's input again (Korthikanti et al.
    /// 2022, §4.2.2).
    fn tp_exposed(&self, has_experts: bool, all: Block) -> (f64, f64) {
        if self.mapping.tp < 2 {
            return (0.0, 0.0);
        }
        let n_bytes = 2.0 * self.tokens * self.embed;
        let n_blocks = if has_experts { 1.0 } else { 2.0 };
        let (whole, again) = if self.mapping.sequence_parallel {
            let gather = self.collective(Traffic::AllGather, n_bytes, self.tp_group);
            let scatter = self.collective(Traffic::ReduceScatter, n_bytes, self.tp_group);
            (gather + scatter, gather)
        } else {
            (
                self.collective(Traffic::AllReduce, n_bytes, self.tp_group),
                0.0,
            )
        };
        let inputs = match has_experts {
            true => n_blocks,
            false => self.software.input_gradients,
        };
        let forward = n_blocks * whole;
        let backward = if self.mapping.sequence_parallel {
            n_blocks * (whole + again)
        } else {
            inputs * whole
        };
        let hide = |seconds: f64, under: f64, part: f64| {
            let hidden = (seconds * part).min(under);
            seconds - hidden + CONTENTION * hidden
        };
        if self.software.overlap_tp && !has_experts {
            let part = 1.0 - PIECES_EXPOSED;
            return (
                hide(forward, 0.8 * all.forward, part),
                hide(
                    backward,
                    0.8 * (all.backward_input + all.backward_weight),
                    part,
                ),
            );
        }
        let backward = if !self.software.overlap_tp_backward {
            backward
        } else if self.mapping.sequence_parallel && again > 0.0 {
            // The scatter and the second gather run under contractions, the first gather does not.
            let exposed = n_blocks * again;
            exposed + hide(backward - exposed, all.backward_weight, 1.0)
        } else {
            hide(backward, all.backward_weight, 1.0)
        };
        (forward, backward)
    }

    /// Exposed exchange of keys and values, forward and backward.
    fn cp_exposed(&self, core: Block) -> [f64; 2] {
        if self.mapping.cp < 2 {
            return [0.0, 0.0];
        }
        let attention = &self.workload.model.attention;
        let kept = attention
            .mla
            .as_ref()
            .map_or(2 * attention.kv_heads * attention.head, |mla| {
                attention.heads * (mla.nope + mla.rope + mla.value)
            }) as f64
            / self.tp;
        let cp = self.mapping.cp as f64;
        let gathered = 2.0 * self.tokens * cp * kept;
        let ring = self.collective(Traffic::AllGather, gathered, self.cp_group);
        match self.mapping.context {
            // Steps of the ring run under the attention of the keys at hand; backward, gradients too.
            Context::Ring => [
                (ring - core.forward * (cp - 1.0) / cp).max(CONTENTION * ring),
                (2.0 * ring - core.backward_input * (cp - 1.0) / cp).max(CONTENTION * 2.0 * ring),
            ],
            Context::AllGather => [ring, 2.0 * ring],
            Context::Ulysses => {
                let heads = (attention.heads * attention.head) as f64 / self.tp;
                let n_bytes = 2.0 * self.tokens * (2.0 * heads + kept);
                let exchange = self.collective(Traffic::AllToAll, n_bytes, self.cp_group);
                [exchange, exchange]
            }
        }
    }
}
