//! Decoder-only transformers as graphs: dense and mixture-of-experts, with the attention of the Llama,
//! GPT-2 and DeepSeek families.
//!
//! Enters: a [`DecoderConfig`] and the sizes of a step. Leaves: a forward [`Graph`] that ends in the
//! loss (mean cross entropy over all positions) or in the logits.
//! Invariant: weights are stored `[in, out]`, heads as dims of their own, so that every contraction
//! reads and writes its operands in their memory order, without a transpose.
//!
//! Names: `embed.wte`, `layers[0].attn.{norm, wq, wk, wv, wo}`, `layers[0].mlp.{norm, wg, wu, wd}`,
//! `layers[0].moe.{norm, router}`, `layers[0].moe.experts.{wg, wu, wd}`, `layers[0].moe.shared.{wg, wu, wd}`,
//! `final.{norm, head}`; a bias is named like its weight with `b` for `w`, the bias of a norm `norm_bias`.

mod attention;
mod coherent;
mod config;
mod ffn;
mod golden;

use meshweave_dsl::build::GraphBuilder;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{ConstInit, Graph, Init, TensorId};
use meshweave_dsl::op::OpError;

pub use config::{
    Activation, AttentionBias, AttentionConfig, DecoderConfig, FfnConfig, Mla, MoeConfig, Norm,
    NormKind, Positions, Router, RouterLosses, SharedExperts,
};
pub use golden::GoldenSize;

use coherent::Stand;
use golden::Stream;

/// What the graph computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Output `loss`: f32[], the mean cross entropy over all positions; inputs `tokens` and `targets`.
    Training,
    /// Output `logits[batch, seq, vocab]`; input `tokens`.
    Logits,
    /// The same, with tokens that stay with their experts from layer to layer: one exchange of tokens a
    /// layer instead of two, and keys and values everywhere.
    CoherentLogits,
}

/// Why a model cannot be built.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ModelError {
    /// The config contradicts itself or the sizes of the step.
    #[error("{0}")]
    Invalid(String),
    /// A meaningful config that no op expresses yet.
    #[error("{0}")]
    Unsupported(String),
    /// A graph that its own shape rules refuse.
    #[error("internal error in the model's graph: {0}")]
    Internal(#[from] OpError),
}

/// The forward graph of `config` for `batch` sequences of `seq` tokens.
///
/// Inputs: `tokens: i32[batch, seq]` and, for [`Goal::Training`], `targets: i32[batch, seq]`.
///
/// # Errors
/// [`ModelError::Invalid`] when sizes of the config do not fit each other, or `seq` exceeds the
/// learned positions.
pub fn build_decoder(
    config: &DecoderConfig,
    batch: usize,
    seq: usize,
    goal: Goal,
) -> Result<Graph, ModelError> {
    config.check()?;
    if batch == 0 || seq == 0 {
        return Err(ModelError::Invalid(format!(
            "a step of {batch} sequences of {seq} tokens is empty: give at least 1 of each"
        )));
    }
    if let Some(window) = config.attention.window.filter(|window| seq > *window) {
        return Err(ModelError::Unsupported(format!(
            "model `{}` attends to a sliding window of {window} tokens, which is not implemented for a sequence of {seq}: lower `seq` to {window}",
            config.name
        )));
    }
    if let Some(moe) = &config.moe
        && !seq.is_multiple_of(moe.subsequences)
    {
        return Err(ModelError::Invalid(format!(
            "model `{}` routes by {} `subsequences`, which do not divide {seq} tokens: choose a number that does",
            config.name, moe.subsequences
        )));
    }
    if goal == Goal::CoherentLogits {
        coherent::check(config)?;
    }
    let mut b = GraphBuilder::new(&config.name);
    let b = &mut b;
    let tokens = b.input("tokens", DType::I32, [("batch", batch), ("seq", seq)])?;
    let targets = match goal {
        Goal::Training => Some(b.input("targets", DType::I32, [("batch", batch), ("seq", seq)])?),
        Goal::Logits | Goal::CoherentLogits => None,
    };
    let rope = rope_tables(b, config, seq)?;
    let model = Model { config, seq, rope };
    let (wte, mut h) = b.within("embed", |b| model.embed(b, tokens))?;
    let mut router_losses = Vec::new();
    let mut stand = Stand::home(rope);
    for layer_idx in 0..config.n_layers {
        h = b.within(format!("layers[{layer_idx}]"), |b| {
            let h = b.within("attn", |b| model.attention(b, layer_idx, h, &stand))?;
            match &config.moe {
                Some(moe) if !moe.dense_layers.contains(&layer_idx) => b.within("moe", |b| {
                    if goal == Goal::CoherentLogits {
                        let moved = model.moe_where_experts_are(b, layer_idx, moe, h, &stand)?;
                        stand = moved.1;
                        return Ok(moved.0);
                    }
                    let (h, scores) = model.moe(b, layer_idx, moe, h)?;
                    if goal == Goal::Training {
                        router_losses.extend(model.router_losses(b, moe, &scores)?);
                        model.bias_step(b, moe, &scores)?;
                    }
                    Ok(h)
                }),
                _ => b.within("mlp", |b| model.mlp(b, layer_idx, h, &stand)),
            }
        })?;
    }
    let logits = b.within("final", |b| {
        let h = match stand.seats {
            None => h,
            Some(seats) => model.at_home(b, "home", h, seats)?,
        };
        model.logits(b, wte, h)
    })?;
    let output = match targets {
        None => logits,
        Some(targets) => {
            let losses = b.cross_entropy("loss.tokens", logits, targets, "vocab")?;
            match router_losses.as_slice() {
                [] => b.mean("loss", losses, ["batch", "seq"])?,
                [others @ .., last] => {
                    let mut sum = b.mean("loss.cross_entropy", losses, ["batch", "seq"])?;
                    for (idx, part) in others.iter().enumerate() {
                        sum = b.add(&format!("loss.sum{idx}"), sum, *part)?;
                    }
                    b.add("loss", sum, *last)?
                }
            }
        }
    };
    b.output(output);
    Ok(std::mem::take(b).finish())
}

fn rope_tables(
    b: &mut GraphBuilder,
    config: &DecoderConfig,
    seq: usize,
) -> Result<Option<(TensorId, TensorId)>, ModelError> {
    match &config.positions {
        Positions::Rope(table) => {
            let shape = [("seq", seq), ("half", table.rotary_dim / 2)];
            let (cos, sin) = (
                ConstInit::RopeCos(table.clone()),
                ConstInit::RopeSin(table.clone()),
            );
            let cos = b.constant("rope.cos", config.dtype, shape, cos)?;
            let sin = b.constant("rope.sin", config.dtype, shape, sin)?;
            Ok(Some((cos, sin)))
        }
        Positions::Learned { n_positions } if seq > *n_positions => {
            Err(ModelError::Invalid(format!(
                "a sequence of {seq} tokens exceeds the {n_positions} learned positions of model `{}`: lower `seq`",
                config.name
            )))
        }
        Positions::Learned { .. } => Ok(None),
    }
}

/// What all parts of the model share.
struct Model<'a> {
    config: &'a DecoderConfig,
    seq: usize,
    /// (cos, sin)
    rope: Option<(TensorId, TensorId)>,
}

type Built = Result<TensorId, ModelError>;

/// The parameters of a norm.
#[derive(Clone, Copy, Debug)]
struct NormWeights {
    weight: TensorId,
    bias: Option<TensorId>,
}

impl Model<'_> {
    /// (table, h[batch, seq, embed]).
    fn embed(
        &self,
        b: &mut GraphBuilder,
        tokens: TensorId,
    ) -> Result<(TensorId, TensorId), ModelError> {
        let config = self.config;
        let init = if config.tied {
            Stream::WTE.init(config.embed)
        } else {
            Stream::WTE.scaled(1.0)
        };
        let shape = [("vocab", config.vocab), ("embed", config.embed)];
        let wte = b.param("wte", config.dtype, shape, init)?;
        let h = b.embedding("tokens", wte, "vocab", tokens)?;
        let Positions::Learned { n_positions } = &config.positions else {
            return Ok((wte, h));
        };
        let shape = [("position", *n_positions), ("embed", config.embed)];
        let wpe = b.param("wpe", config.dtype, shape, Stream::WPE.init(config.embed))?;
        let iota = ConstInit::Iota { dim: "seq".into() };
        let index = b.constant("index", DType::I32, [("seq", self.seq)], iota)?;
        let positions = b.embedding("positions", wpe, "position", index)?;
        Ok((wte, b.add("sum", h, positions)?))
    }

    /// The norm `name` (with its weights) of h over `embed`, as `result`.
    fn norm(&self, b: &mut GraphBuilder, name: &str, result: &str, h: TensorId) -> Built {
        let weights = self.norm_weights(b, name)?;
        self.normed(b, result, h, weights)
    }

    fn norm_weights(&self, b: &mut GraphBuilder, name: &str) -> Result<NormWeights, ModelError> {
        let (dtype, shape) = (self.config.dtype, [("embed", self.config.embed)]);
        let weight = b.param(name, dtype, shape, Init::Ones)?;
        let bias = match self.config.norm.kind {
            NormKind::Rms => None,
            NormKind::Layer => Some(b.param(&format!("{name}_bias"), dtype, shape, Init::Zeros)?),
        };
        Ok(NormWeights { weight, bias })
    }

    fn normed(
        &self,
        b: &mut GraphBuilder,
        result: &str,
        h: TensorId,
        NormWeights { weight, bias }: NormWeights,
    ) -> Built {
        let eps = self.config.norm.eps;
        Ok(match bias {
            None => b.rms_norm(result, h, weight, "embed", eps)?,
            Some(bias) => b.layer_norm(result, h, weight, bias, "embed", eps)?,
        })
    }

    fn logits(&self, b: &mut GraphBuilder, wte: TensorId, h: TensorId) -> Built {
        let config = self.config;
        let x = self.norm(b, "norm", "input", h)?;
        let head = if config.tied {
            wte
        } else {
            let shape = [("embed", config.embed), ("vocab", config.vocab)];
            b.param("head", config.dtype, shape, Stream::HEAD.init(config.embed))?
        };
        Ok(b.contract("logits", x, head, ["batch", "seq", "vocab"])?)
    }

    /// `x + bias` under `name`, when there is a bias; the bias is a parameter of the given dims.
    fn biased(
        &self,
        b: &mut GraphBuilder,
        has_bias: bool,
        bias: &str,
        name: &str,
        x: TensorId,
        dims: &[&str],
    ) -> Built {
        if !has_bias {
            return Ok(x);
        }
        let shape = dims
            .iter()
            .map(|dim| Ok((*dim, b.size_of(x, *dim)?)))
            .collect::<Result<Vec<_>, OpError>>()?;
        let bias = b.param(bias, self.config.dtype, shape, Init::Zeros)?;
        Ok(b.add(name, x, bias)?)
    }
}

#[cfg(test)]
mod tests;
