//! The architecture of a decoder, as plain data.

use std::collections::BTreeSet;

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::RopeTable;
use serde::{Deserialize, Serialize};

use super::ModelError;

/// A decoder-only transformer with norms before each block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecoderConfig {
    pub name: String,
    /// Of weights and activations.
    pub dtype: DType,
    pub n_layers: usize,
    /// Width of the residual stream.
    pub embed: usize,
    pub vocab: usize,
    pub norm: Norm,
    pub positions: Positions,
    pub attention: AttentionConfig,
    /// The feed-forward part of layers without experts.
    pub ffn: FfnConfig,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe: Option<MoeConfig>,
    /// The output head is the embedding's transpose.
    pub tied: bool,
}

/// A norm over the width.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Norm {
    pub kind: NormKind,
    pub eps: f64,
}

/// Root mean square, or mean and variance with a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    Rms,
    Layer,
}

/// How positions enter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// q and k are rotated; the table's `rotary_dim` is the whole head (for MLA: its rope part).
    Rope(RopeTable),
    /// A table added to the embedding.
    Learned { n_positions: usize },
}

/// Attention: multi-head, grouped-query, or with latent keys and values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionConfig {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; `heads / kv_heads` queries share one.
    pub kv_heads: usize,
    /// Width of a head; with MLA the sum of its nope and rope parts.
    pub head: usize,
    #[serde(default)]
    pub bias: AttentionBias,
    /// RMS norm of every head of q and k before the rotation (Qwen3).
    #[serde(default)]
    pub qk_norm: bool,
    /// Factor on q kᵀ; 1/√head when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// A token sees at most this many, itself included; sequences that exceed it are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mla: Option<Mla>,
}

/// Which projections of the attention have biases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionBias {
    pub q: bool,
    pub k: bool,
    pub v: bool,
    pub o: bool,
}

/// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mla {
    /// Width of the queries' latent; `None` projects them directly.
    pub q_rank: Option<usize>,
    /// Width of the latent of keys and values.
    pub kv_rank: usize,
    /// Part of a head without positions.
    pub nope: usize,
    /// Rotated part of a head, its key shared by all heads.
    pub rope: usize,
    /// Width of a value.
    pub value: usize,
    /// Of the norms of the latents.
    pub eps: f64,
}

/// A feed-forward block: `(act(x wg) ⊙ (x wu)) wd` when gated, else `act(x wu) wd`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FfnConfig {
    pub width: usize,
    pub activation: Activation,
    pub gated: bool,
    #[serde(default)]
    pub bias: bool,
}

/// The nonlinearity of a feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    Silu,
    /// With the error function.
    Gelu,
    /// The tanh form (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    Relu,
}

/// Mixture of experts; experts have the activation and gating of the model's `ffn`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoeConfig {
    pub n_experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Width of one expert.
    pub ffn: usize,
    /// Slots per expert and sequence: ceil(factor · top_k · seq / n_experts); 0 never drops.
    #[serde(default)]
    pub capacity_factor: f64,
    /// Equal parts of a sequence that have slots of their own: 1 drops by full sequences, as many as
    /// ranks share a sequence drops by what each of them sees (MoE Parallel Folding, arXiv 2504.14960,
    /// §3.3). Without drops it changes nothing but from where tokens may be dispatched.
    #[serde(default = "one")]
    pub subsequences: usize,
    pub router: Router,
    #[serde(default)]
    pub losses: RouterLosses,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared: Option<SharedExperts>,
    /// Layers with the plain `ffn` instead.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub dense_layers: BTreeSet<usize>,
}

/// How experts are chosen and weighed. In all forms the gates are finally multiplied by `scale`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Router {
    /// The greatest softmax probabilities, divided by their sum when `normalize`.
    ///
    /// With `groups`: (number of groups, groups kept); a group counts by its best expert (DeepSeek-V2).
    Softmax {
        normalize: bool,
        scale: f64,
        groups: Option<(usize, usize)>,
    },
    /// Sigmoid scores, chosen with a bias that takes no gradient, weighed without it (DeepSeek-V3).
    ///
    /// With `groups`: a group counts by the sum of its two best experts.
    Sigmoid {
        normalize: bool,
        scale: f64,
        groups: Option<(usize, usize)>,
    },
}

/// What every layer with experts adds to the loss of training, by its weights; 0 adds nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterLosses {
    /// On E Σᵢ fᵢ Pᵢ, the mean over sequences: fᵢ is the part of a sequence's assignments that expert i
    /// gets, Pᵢ its mean probability (Switch Transformers, arXiv 2101.03961, equations 4 to 6; by
    /// sequence, with sigmoid scores divided by their sum, DeepSeek-V3, arXiv 2412.19437, equations 17
    /// to 20).
    #[serde(default)]
    pub balance: f64,
    /// On the mean square of the logits' logsumexp (ST-MoE, arXiv 2202.08906, equation 5).
    #[serde(default)]
    pub z: f64,
    /// How far the bias of a sigmoid router goes in a step, down for experts with more than the mean
    /// load of the batch, up for those with less (DeepSeek-V3, arXiv 2412.19437, §2.1.2, γ). Adds
    /// nothing to the loss.
    #[serde(default)]
    pub bias_rate: f64,
}

/// Experts that see every token: one dense block next to the routed ones.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedExperts {
    /// Width of the block.
    pub ffn: usize,
    /// Its output times sigmoid(x · w) (Qwen2-MoE).
    #[serde(default)]
    pub gated: bool,
}

fn one() -> usize {
    1
}

impl DecoderConfig {
    /// Whether the sizes fit each other.
    ///
    /// # Errors
    /// [`ModelError::Invalid`], naming the fields and both numbers.
    pub fn check(&self) -> Result<(), ModelError> {
        let invalid = |what: String| {
            Err(ModelError::Invalid(format!(
                "model `{}`: {what}",
                self.name
            )))
        };
        let attention = &self.attention;
        let sizes = [
            ("n_layers", self.n_layers),
            ("embed", self.embed),
            ("vocab", self.vocab),
            ("attention.heads", attention.heads),
            ("attention.kv_heads", attention.kv_heads),
            ("attention.head", attention.head),
            ("ffn.width", self.ffn.width),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return invalid(format!("`{name}` is 0, but must be at least 1"));
        }
        if !self.dtype.is_float() {
            return invalid(format!("`dtype` is {}, but weights are floats", self.dtype));
        }
        if !attention.heads.is_multiple_of(attention.kv_heads) {
            return invalid(format!(
                "{} query heads cannot share {} key heads evenly: make the first a multiple of the second",
                attention.heads, attention.kv_heads
            ));
        }
        let rotated = match &attention.mla {
            None => attention.head,
            Some(mla) => {
                if mla.nope + mla.rope != attention.head {
                    return invalid(format!(
                        "a head of {} is not {} + {} (nope + rope)",
                        attention.head, mla.nope, mla.rope
                    ));
                }
                if attention.kv_heads != attention.heads {
                    return invalid(format!(
                        "latent attention has as many key heads as query heads, not {} and {}",
                        attention.kv_heads, attention.heads
                    ));
                }
                if attention.qk_norm || attention.bias != AttentionBias::default() {
                    return Err(ModelError::Unsupported(format!(
                        "model `{}`: latent attention with biases or norms of the heads is not implemented",
                        self.name
                    )));
                }
                mla.rope
            }
        };
        match &self.positions {
            Positions::Rope(table) if table.rotary_dim != rotated => {
                return invalid(format!(
                    "the rotation covers {} of {rotated} elements of a head; it must cover all",
                    table.rotary_dim
                ));
            }
            Positions::Rope(table) if table.rotary_dim % 2 == 1 => {
                return invalid(format!("the rotated width {rotated} is odd"));
            }
            Positions::Learned { .. } if attention.mla.is_some() => {
                return invalid("latent attention needs rotary positions".into());
            }
            Positions::Rope(_) | Positions::Learned { .. } => {}
        }
        self.moe.as_ref().map_or(Ok(()), |moe| self.check_moe(moe))
    }

    fn check_moe(&self, moe: &MoeConfig) -> Result<(), ModelError> {
        let invalid = |what: String| {
            Err(ModelError::Invalid(format!(
                "model `{}`: {what}",
                self.name
            )))
        };
        let MoeConfig {
            n_experts, top_k, ..
        } = *moe;
        if top_k == 0 || top_k > n_experts {
            return invalid(format!(
                "a token cannot go to {top_k} of {n_experts} experts"
            ));
        }
        if moe.ffn == 0 || moe.shared.as_ref().is_some_and(|shared| shared.ffn == 0) {
            return invalid("an expert of width 0".into());
        }
        if moe.subsequences == 0 {
            return invalid("a sequence cannot be divided into 0 `subsequences`".into());
        }
        if !(moe.capacity_factor >= 0.0 && moe.capacity_factor.is_finite()) {
            return invalid(format!(
                "`capacity_factor` is {}, but must be 0 (never drop) or positive",
                moe.capacity_factor
            ));
        }
        if moe.losses.bias_rate > 0.0 && !matches!(moe.router, Router::Sigmoid { .. }) {
            return invalid(
                "`bias_rate` moves the bias of a sigmoid router, and this one is a softmax: choose `router sigmoid`, or leave it out".into(),
            );
        }
        let weights = [
            ("balance", moe.losses.balance),
            ("z", moe.losses.z),
            ("bias_rate", moe.losses.bias_rate),
        ];
        for (name, weight) in weights {
            if !(weight >= 0.0 && weight.is_finite()) {
                return invalid(format!(
                    "the weight `{name}` of a router's loss is {weight}, but must be 0 (none) or positive"
                ));
            }
        }
        if self.ffn.bias {
            return Err(ModelError::Unsupported(format!(
                "model `{}`: experts with biases are not implemented",
                self.name
            )));
        }
        if let Some(layer) = moe.dense_layers.iter().find(|l| **l >= self.n_layers) {
            return invalid(format!(
                "layer {layer} is said to be dense, but there are {} layers",
                self.n_layers
            ));
        }
        let (Router::Softmax { groups, .. } | Router::Sigmoid { groups, .. }) = &moe.router;
        if let Some((n_groups, kept)) = groups {
            let fits = *n_groups > 0
                && n_experts.is_multiple_of(*n_groups)
                && (1..=*n_groups).contains(kept)
                && top_k <= n_experts / n_groups * kept;
            if !fits {
                return invalid(format!(
                    "{top_k} of {n_experts} experts cannot be chosen from {kept} of {n_groups} groups"
                ));
            }
            if matches!(moe.router, Router::Sigmoid { .. }) && n_experts / n_groups < 2 {
                return invalid(format!(
                    "{n_groups} groups of {n_experts} experts have fewer than the 2 experts a group is judged by"
                ));
            }
        }
        Ok(())
    }
}
