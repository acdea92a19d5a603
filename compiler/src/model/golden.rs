//! Weights without a random generator: the golden model, and the same scheme for all others.
//!
//! Enters: sizes and tensor numbers. Leaves: configs and inits that other frameworks reproduce
//! from 32-bit integers alone.
//! Invariant: for the golden architecture, numbers and scales are those that are published with it;
//! tensors it does not have take numbers above all of its own.

use std::collections::BTreeSet;

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{Init, RopeScaling, RopeTable};
use serde::{Deserialize, Serialize};

use super::{
    Activation, AttentionBias, AttentionConfig, DecoderConfig, FfnConfig, MoeConfig, Norm,
    NormKind, Positions, Router, RouterLosses,
};

/// The sizes of a golden model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GoldenSize {
    pub n_layers: usize,
    pub embed: usize,
    pub heads: usize,
    pub ffn: usize,
    pub vocab: usize,
    /// Tokens per sequence, and sequences per step.
    pub seq: usize,
    pub batch: usize,
}

impl GoldenSize {
    /// A named size: `tiny`, `small` or `gpt2`.
    pub fn named(name: &str) -> Option<Self> {
        let (n_layers, embed, heads, ffn, vocab, seq, batch) = match name {
            "tiny" => (2, 128, 4, 512, 512, 64, 8),
            "small" => (4, 512, 8, 1408, 8192, 256, 8),
            "gpt2" => (12, 768, 12, 2048, 50304, 512, 4),
            _ => return None,
        };
        Some(Self {
            n_layers,
            embed,
            heads,
            ffn,
            vocab,
            seq,
            batch,
        })
    }
}

impl DecoderConfig {
    /// The golden model of a size: with top-2 of 8 experts of half the width when a capacity factor
    /// is given (0 never drops), and an untied head; set `tied` for the other.
    pub fn golden(size: &GoldenSize, capacity_factor: Option<f64>) -> Self {
        let head = size.embed / size.heads.max(1);
        Self {
            name: "golden".into(),
            dtype: DType::F32,
            n_layers: size.n_layers,
            embed: size.embed,
            vocab: size.vocab,
            norm: Norm {
                kind: NormKind::Rms,
                eps: 1e-5,
            },
            positions: Positions::Rope(RopeTable {
                theta: 10000.0,
                rotary_dim: head,
                scaling: RopeScaling::None,
            }),
            attention: AttentionConfig {
                heads: size.heads,
                kv_heads: size.heads,
                head,
                bias: AttentionBias::default(),
                qk_norm: false,
                scale: None,
                window: None,
                mla: None,
            },
            ffn: FfnConfig {
                width: size.ffn,
                activation: Activation::Silu,
                gated: true,
                bias: false,
            },
            moe: capacity_factor.map(|capacity_factor| MoeConfig {
                n_experts: 8,
                top_k: 2,
                ffn: size.ffn / 2,
                capacity_factor,
                subsequences: 1,
                router: Router::Softmax {
                    normalize: true,
                    scale: 1.0,
                    groups: None,
                },
                losses: RouterLosses::default(),
                shared: None,
                dense_layers: BTreeSet::new(),
            }),
            tied: false,
        }
    }
}

/// The number of a tensor, from which its start values follow.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stream(u32);

impl Stream {
    pub const WTE: Self = Self(0);
    pub const HEAD: Self = Self(2);
    // 3 is the stream of the golden tokens.
    pub const WPE: Self = Self(4);

    /// Weight `part` of a layer.
    pub fn layer(layer_idx: usize, part: Part) -> Self {
        // The golden model has 16 numbers per layer; parts that it lacks start above all layers.
        let (page, place) = (part as u32 / 16, part as u32 % 16);
        Self((page << 24) + 16 * (layer_idx as u32 + 1) + place)
    }

    /// Uniform in ±√(3 / fan_in): variance 1 / fan_in.
    pub fn init(self, fan_in: usize) -> Init {
        self.scaled((3.0 / fan_in as f64).sqrt())
    }

    /// The same for projections back into the residual stream: divided by √(2 · layers).
    pub fn residual(self, fan_in: usize, n_layers: usize) -> Init {
        self.scaled((3.0 / fan_in as f64).sqrt() / (2.0 * n_layers as f64).sqrt())
    }

    pub fn scaled(self, scale: f64) -> Init {
        Init::Hash {
            stream: self.0,
            scale: scale as f32,
        }
    }
}

/// The weights of a layer by their numbers (norms and biases are constant and have none).
#[derive(Clone, Copy, Debug)]
pub(super) enum Part {
    Wq = 1,
    Wk = 2,
    Wv = 3,
    Wo = 4,
    Wg = 6,
    Wu = 7,
    Wd = 8,
    Router = 9,
    ExpertsWg = 10,
    ExpertsWu = 11,
    ExpertsWd = 12,
    SharedWg = 16,
    SharedWu,
    SharedWd,
    SharedGate,
    WqA,
    WqNope,
    WqRope,
    WkvA,
    WkRope,
    WkNope,
    WvB,
}
