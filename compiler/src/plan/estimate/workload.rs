//! What is run: a model, the sizes of a step, and how the program that runs it is written.
//!
//! Enters: a decoder's config. Leaves: sizes, parameters and operations that prices are made of.
//! Invariant: operations are those of the model, whatever the mapping computes again or pads.

use std::ops::Range;

use super::memory::Framework;
use crate::model::DecoderConfig;

/// What a step does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// Forward, backward and the optimizer's update.
    Train,
    /// Forward over whole prompts; keys and values are kept.
    Prefill,
    /// One token a sequence, after so many tokens in the cache.
    Decode { context: usize },
}

/// How attention is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionKernel {
    /// Scores, mask, softmax and the product with the values each through memory.
    Unfused,
    /// Scores in a fused softmax kernel between two products (Megatron's fused softmax).
    FusedSoftmax,
    /// Scores stay on chip (FlashAttention 1).
    Flash1,
    /// Scores stay on chip, whole warps on parts of the queries (FlashAttention 2, PyTorch's own).
    Flash2,
    /// Scores stay on chip; the fastest kernel of the device (on Hopper FlashAttention 3, cuDNN).
    Flash,
}

/// How the program is written, as far as it changes the price of the same mapping.
///
/// The default is Megatron-Core of 2024 and later with its recommended options.
#[derive(Clone, Debug, PartialEq)]
pub struct Software {
    pub attention: AttentionKernel,
    /// A norm is one kernel.
    pub fused_norm: bool,
    /// Rotations and activation functions are one kernel each.
    pub fused_elementwise: bool,
    /// Contractions add the gradients of weights to the f32 sum themselves.
    pub fused_accumulation: bool,
    /// The loss reads its logits once a pass.
    pub fused_loss: bool,
    /// Collectives of `tp` run under the contractions next to them (TransformerEngine's userbuffers).
    pub overlap_tp: bool,
    /// All_reduces of input gradients a dense layer: one a column-parallel product (query, key and value
    /// in one, gate and up in one or apart).
    pub input_gradients: f64,
    /// In the backward pass, collectives of `tp` run under the contraction of the other gradient.
    pub overlap_tp_backward: bool,
    /// ZeRO-1 reduces whole gradients, in f32, and not only each rank's part.
    pub reduces_whole: bool,
    /// Gradients are reduced under the backward, parameters gathered under the forward pass.
    pub overlap_dp: bool,
    /// `all_to_all` of the experts runs under another microbatch.
    pub overlap_ep: bool,
    /// A token goes to a node once, however many of its experts are there (DeepEP, HybridEP).
    pub dispatch_once_a_node: bool,
    /// Ranks of a pipeline begin a step before the others have ended the last one, and check afterwards
    /// (Qi et al., arXiv 2401.10241, §4).
    pub post_validates: bool,
    /// The host waits for every message of the pipeline.
    pub blocking_p2p: bool,
    /// Collectives that gather the weights of a layer under ZeRO-3: 1 of a flat parameter, or one a
    /// tensor.
    pub gathers_a_layer: f64,
    /// Part of the bandwidth that they reach: less than 1 where tensors are copied in and out of lists.
    pub gather_part: f64,
    /// Seconds of the host a piece where ZeRO-1 divides every tensor over all ranks one by one, instead
    /// of one flat buffer.
    pub piece_s: f64,
    /// Seconds of the host a kernel that is launched one by one; 0 with recorded graphs.
    pub launch_s: f64,
    /// The same over it where pipeline ranks hand on one microbatch at a time: blocks of the pipeline
    /// are autograd graphs of their own, with metadata that the host waits for.
    pub pipelined_launches: f64,
    /// What the program holds in memory beyond what the mapping says.
    pub framework: Framework,
}

impl Default for Software {
    fn default() -> Self {
        Self {
            attention: AttentionKernel::Flash,
            fused_norm: true,
            fused_elementwise: true,
            fused_accumulation: true,
            fused_loss: false,
            overlap_tp: false,
            input_gradients: 2.0,
            overlap_tp_backward: true,
            reduces_whole: false,
            overlap_dp: true,
            overlap_ep: false,
            dispatch_once_a_node: false,
            post_validates: false,
            blocking_p2p: false,
            gathers_a_layer: 1.0,
            gather_part: 1.0,
            piece_s: 0.0,
            launch_s: EAGER_LAUNCH_S,
            pipelined_launches: 1.0,
            framework: Framework::MEGATRON,
        }
    }
}

/// Seconds of the host a kernel in PyTorch's eager mode, with the Python around it.
const EAGER_LAUNCH_S: f64 = 10.0e-6;

impl Software {
    /// Megatron-LM of 2021: a fused softmax, nothing overlapped (Narayanan et al., SC 2021).
    pub fn megatron_2021() -> Self {
        Self {
            attention: AttentionKernel::FusedSoftmax,
            framework: Framework::MEGATRON_GPT,
            overlap_tp_backward: false,
            overlap_dp: false,
            blocking_p2p: true,
            ..Self::default()
        }
    }

    /// Programs that generate tokens: the kernels of a step are recorded once and replayed (CUDA graphs,
    /// as vLLM and TensorRT-LLM decode).
    pub fn generating() -> Self {
        Self {
            launch_s: 0.0,
            ..Self::default()
        }
    }

    /// PyTorch's FSDP: parameters are prefetched, elementwise ops are kernels of their own.
    pub fn fsdp() -> Self {
        Self {
            attention: AttentionKernel::Flash2,
            fused_norm: false,
            fused_elementwise: false,
            fused_accumulation: false,
            framework: Framework::PYTORCH,
            ..Self::default()
        }
    }
}

/// A model, the sizes of a step, and how the program is written.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    pub model: DecoderConfig,
    /// Sequences a step.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seq: usize,
    pub job: Job,
    /// Layers behind the last one that predict further tokens, each with its own logits (multi-token
    /// prediction, DeepSeek-V3).
    pub prediction_layers: usize,
    /// Every how many layers the model's attention window holds (1: in all; GPT-OSS: 2).
    pub window_every: usize,
    pub software: Software,
}

impl Workload {
    /// A workload of the model with today's software.
    pub fn new(model: DecoderConfig, batch: usize, seq: usize, job: Job) -> Self {
        Self {
            model,
            batch,
            seq,
            job,
            prediction_layers: 0,
            window_every: 1,
            software: match job {
                Job::Train | Job::Prefill => Software::default(),
                Job::Decode { .. } => Software::generating(),
            },
        }
    }

    /// Tokens a step produces or trains on.
    pub fn tokens(&self) -> f64 {
        match self.job {
            Job::Train | Job::Prefill => self.batch as f64 * self.seq as f64,
            Job::Decode { .. } => self.batch as f64,
        }
    }

    /// Keys that a query sees, on average over a causal sequence: half of it, or the window.
    pub fn mean_keys(&self, window: Option<usize>) -> f64 {
        let seen = |keys: usize| match window {
            Some(window) if window < keys => window as f64,
            _ => keys as f64,
        };
        match self.job {
            Job::Decode { context } => seen(context + 1),
            Job::Train | Job::Prefill => {
                let seq = self.seq as f64;
                let window = seen(self.seq);
                // The first `window` queries see 1, 2, …; the others `window` keys.
                window * (1.0 - (window - 1.0) / (2.0 * seq))
            }
        }
    }

    /// Whether the window holds in a layer.
    pub fn window_of(&self, layer_idx: usize) -> Option<usize> {
        let holds = layer_idx.is_multiple_of(self.window_every.max(1));
        self.model.attention.window.filter(|_| holds)
    }

    /// Weights of the model, by where they live.
    pub fn parameters(&self) -> Parameters {
        Parameters::of(&self.model, self.prediction_layers)
    }

    /// Operations of the model in a step: two a multiply-add, the causal half of attention, nothing
    /// computed twice. Training takes three times the forward pass.
    pub fn model_flops(&self) -> f64 {
        let model = &self.model;
        let attention = &model.attention;
        let parameters = self.parameters();
        let value = attention
            .mla
            .as_ref()
            .map_or(attention.head, |mla| mla.value);
        let mut per_token = 0.0;
        for layer_idx in 0..model.n_layers + self.prediction_layers {
            per_token += 2.0 * parameters.active(self.is_moe(layer_idx));
            let keys = self.mean_keys(self.window_of(layer_idx));
            per_token += 2.0 * keys * (attention.heads * (attention.head + value)) as f64;
        }
        let n_logits = 1 + self.prediction_layers;
        per_token += 2.0 * (n_logits * model.embed * model.vocab) as f64;
        per_token += 2.0 * (self.prediction_layers * 2 * model.embed * model.embed) as f64;
        let passes = if self.job == Job::Train { 3.0 } else { 1.0 };
        passes * per_token * self.tokens()
    }

    /// Layers of a range that have experts.
    pub fn n_moe(&self, layers: &Range<usize>) -> usize {
        self.model.moe.as_ref().map_or(0, |moe| {
            layers.len() - moe.dense_layers.range(layers.clone()).count()
        })
    }

    /// Whether a layer has experts; prediction layers are like the last one.
    pub fn is_moe(&self, layer_idx: usize) -> bool {
        let layer_idx = layer_idx.min(self.model.n_layers - 1);
        let moe = self.model.moe.as_ref();
        moe.is_some_and(|moe| !moe.dense_layers.contains(&layer_idx))
    }
}

/// Weights of a decoder, counted by part; norms and biases are in their blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Parameters {
    /// Of one layer's attention with its norm.
    pub attention: f64,
    /// Of one dense feed-forward block with its norm.
    pub mlp: f64,
    /// Of one expert.
    pub expert: f64,
    /// Of the router, shared experts and norm of one layer with experts.
    pub moe_dense: f64,
    /// Experts a layer.
    pub n_experts: f64,
    /// Experts a token goes to.
    pub top_k: f64,
    /// Input embedding, with learned positions.
    pub embedding: f64,
    /// Output head; 0 where it is tied to the embedding.
    pub head: f64,
    pub n_dense_layers: f64,
    pub n_moe_layers: f64,
    /// Norms and projections before the prediction layers.
    pub prediction: f64,
}

impl Parameters {
    /// Counts the weights of a model with so many prediction layers.
    pub fn of(model: &DecoderConfig, prediction_layers: usize) -> Self {
        let attention = &model.attention;
        let embed = model.embed as f64;
        let heads = (attention.heads * attention.head) as f64;
        let norm = embed;
        let weights = match &attention.mla {
            None => {
                let kv_heads = (attention.kv_heads * attention.head) as f64;
                embed * (2.0 * heads + 2.0 * kv_heads)
            }
            Some(mla) => {
                let n_heads = attention.heads as f64;
                let (rank, nope, rope) = (mla.kv_rank as f64, mla.nope as f64, mla.rope as f64);
                let value = mla.value as f64;
                let queries = mla
                    .q_rank
                    .map_or(embed * heads, |q_rank| q_rank as f64 * (embed + heads));
                queries
                    + embed * (rank + rope)
                    + rank * n_heads * (nope + value)
                    + n_heads * value * embed
            }
        };
        let matrices = if model.ffn.gated { 3.0 } else { 2.0 };
        let block = |width: usize| matrices * embed * width as f64;
        let n_moe_layers = model
            .moe
            .as_ref()
            .map_or(0, |moe| model.n_layers - moe.dense_layers.len());
        let moe = model.moe.as_ref();
        let extra_moe = if moe.is_some() { prediction_layers } else { 0 };
        let learned = match model.positions {
            crate::model::Positions::Learned { n_positions } => n_positions as f64 * embed,
            crate::model::Positions::Rope(_) => 0.0,
        };
        Self {
            attention: weights + norm,
            mlp: block(model.ffn.width) + norm,
            expert: moe.map_or(0.0, |moe| block(moe.ffn)),
            moe_dense: moe.map_or(0.0, |moe| {
                let shared = moe.shared.as_ref().map_or(0.0, |shared| block(shared.ffn));
                embed * moe.n_experts as f64 + shared + norm
            }),
            n_experts: moe.map_or(0.0, |moe| moe.n_experts as f64),
            top_k: moe.map_or(0.0, |moe| moe.top_k as f64),
            embedding: embed * model.vocab as f64 + learned,
            head: if model.tied {
                0.0
            } else {
                embed * model.vocab as f64
            },
            n_dense_layers: (model.n_layers - n_moe_layers + prediction_layers - extra_moe) as f64,
            n_moe_layers: (n_moe_layers + extra_moe) as f64,
            prediction: prediction_layers as f64 * 2.0 * embed * embed,
        }
    }

    /// Weights of one layer that a token meets.
    pub fn active(&self, is_moe: bool) -> f64 {
        self.attention
            + if is_moe {
                self.moe_dense + self.top_k * self.expert
            } else {
                self.mlp
            }
    }

    /// Weights of one layer.
    pub fn layer(&self, is_moe: bool) -> f64 {
        self.attention
            + if is_moe {
                self.moe_dense + self.n_experts * self.expert
            } else {
                self.mlp
            }
    }

    /// All weights.
    pub fn total(&self) -> f64 {
        self.n_dense_layers * self.layer(false)
            + self.n_moe_layers * self.layer(true)
            + self.embedding
            + self.head
            + self.prediction
    }
}
