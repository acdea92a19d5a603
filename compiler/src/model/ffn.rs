//! The feed-forward blocks: dense, and mixture of experts with its routers.
//!
//! Invariant: an expert's rows are grouped by sequence (`[expert, batch, slot, embed]`), or by equal
//! parts of sequences (`[expert, batch, part, slot, embed]`), so what is dropped does not depend on the
//! mesh.

use meshweave_dsl::build::GraphBuilder;
use meshweave_dsl::dtype::Scalar;
use meshweave_dsl::graph::{ConstInit, Init, TensorId};
use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::op::{MoeDims, OpKind, UnaryFn};

use super::coherent::Stand;
use super::golden::{Part, Stream};
use super::{Activation, Built, Model, ModelError, MoeConfig, Router, SharedExperts};

/// Put under the scores of experts in groups that are not chosen.
const EXCLUDED: f64 = 1e9;

/// The parts of a gated block: gate, up, down.
pub(super) type Parts = [Part; 3];

/// What a router computes on the way to its choices.
pub(super) struct Scores {
    /// `[batch, seq, expert]`, before softmax or sigmoid.
    logits: TensorId,
    /// `[batch, seq, expert]`, after it, without bias and limits.
    probs: TensorId,
    /// `[batch, seq, choice]`.
    expert: TensorId,
    /// Of a sigmoid router, `[expert]`.
    bias: Option<TensorId>,
}

/// Makes of any difference of loads that is not 0 an argument whose tanh is ±1 in f32: loads are whole
/// numbers, so they differ from their mean by at least one part in the number of experts.
const STEEP: f64 = 1e6;

impl Model<'_> {
    /// h + ffn(norm(h)), `[batch, seq, embed]`.
    pub(super) fn mlp(
        &self,
        b: &mut GraphBuilder,
        layer_idx: usize,
        h: TensorId,
        stand: &Stand,
    ) -> Built {
        let x = self.norm(b, "norm", "input", h)?;
        let parts = [Part::Wg, Part::Wu, Part::Wd];
        let width = self.config.ffn.width;
        let out = self.block(b, layer_idx, parts, width, x, None, stand)?;
        Ok(b.add("residual", h, out)?)
    }

    /// The block over `embed` in the scope in force; with `experts`, one per expert over their slots.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn block(
        &self,
        b: &mut GraphBuilder,
        layer_idx: usize,
        parts: Parts,
        width: usize,
        x: TensorId,
        experts: Option<&MoeConfig>,
        stand: &Stand,
    ) -> Built {
        let (config, ffn) = (self.config, &self.config.ffn);
        let rows: &[&'static str] = match experts {
            None => stand.dims,
            Some(moe) if moe.subsequences == 1 => &["expert", "batch", "slot"],
            Some(_) => &["expert", "batch", "part", "slot"],
        };
        let expert_dim = experts.map(|moe| ("expert", moe.n_experts));
        let result = |last| rows.iter().copied().chain([last]);
        let has_bias = ffn.bias;
        let mut up = |part, weight: &str, bias: &str, name: &str| -> Built {
            let shape: Vec<_> = expert_dim
                .into_iter()
                .chain([("embed", config.embed), ("ffn", width)])
                .collect();
            let init = Stream::layer(layer_idx, part).init(config.embed);
            let weight = b.param(weight, config.dtype, shape, init)?;
            let y = b.contract(name, x, weight, result("ffn"))?;
            self.biased(b, has_bias, bias, &format!("{name}.biased"), y, &["ffn"])
        };
        let [gate_part, up_part, down_part] = parts;
        let hidden = if ffn.gated {
            let gate = up(gate_part, "wg", "bg", "gate")?;
            let value = up(up_part, "wu", "bu", "up")?;
            let active = b.unary("act", activation(ffn.activation), gate)?;
            b.mul("hidden", active, value)?
        } else {
            let value = up(up_part, "wu", "bu", "up")?;
            b.unary("hidden", activation(ffn.activation), value)?
        };
        let shape: Vec<_> = expert_dim
            .into_iter()
            .chain([("ffn", width), ("embed", config.embed)])
            .collect();
        let init = Stream::layer(layer_idx, down_part).residual(width, config.n_layers);
        let wd = b.param("wd", config.dtype, shape, init)?;
        let out = b.contract("out", hidden, wd, result("embed"))?;
        self.biased(b, has_bias, "bd", "out.biased", out, &["embed"])
    }

    /// h + moe(norm(h)), `[batch, seq, embed]`.
    pub(super) fn moe(
        &self,
        b: &mut GraphBuilder,
        layer_idx: usize,
        moe: &MoeConfig,
        h: TensorId,
    ) -> Result<(TensorId, Scores), ModelError> {
        let stand = &Stand::home(self.rope);
        let x = self.norm(b, "norm", "input", h)?;
        let (expert, gate, scores) = self.route(b, layer_idx, moe, x, stand)?;
        let capacity = capacity(moe, self.seq / moe.subsequences);
        let [tokens, expert, gate] = if moe.subsequences == 1 {
            [x, expert, gate]
        } else {
            // Slots are numbered within each part, so parts may be dispatched from where they are.
            let parts = [
                ("part", moe.subsequences),
                ("row", self.seq / moe.subsequences),
            ];
            let mut part = |name: &str, of| b.split(name, of, "seq", parts);
            [
                part("input.parts", x)?,
                part("chosen.parts", expert)?,
                part("gates.parts", gate)?,
            ]
        };
        let seq = if moe.subsequences == 1 { "seq" } else { "row" };
        let slots = OpKind::MoeSlots {
            seq: seq.into(),
            choice: "choice".into(),
            n_experts: moe.n_experts,
            capacity,
        };
        let slot = b.apply("slots", slots, &[expert])?;
        let dims = MoeDims {
            seq: seq.into(),
            choice: "choice".into(),
            expert: "expert".into(),
            slot: "slot".into(),
            n_experts: moe.n_experts,
            capacity,
            offset: 0,
        };
        let dispatch = OpKind::MoeDispatch(dims.clone());
        let rows = b.apply("dispatched", dispatch, &[tokens, expert, slot])?;
        let parts = [Part::ExpertsWg, Part::ExpertsWu, Part::ExpertsWd];
        let out = b.within("experts", |b| {
            self.block(b, layer_idx, parts, moe.ffn, rows, Some(moe), stand)
        })?;
        let combine = OpKind::MoeCombine(dims);
        let mut out = if moe.subsequences == 1 {
            b.apply("combined", combine, &[out, expert, slot, gate])?
        } else {
            let parts = b.apply("combined.parts", combine, &[out, expert, slot, gate])?;
            b.merge("combined", parts, ["part", "row"], "seq")?
        };
        if let Some(shared) = &moe.shared {
            let dense = self.shared(b, layer_idx, shared, x, stand)?;
            out = b.add("out", out, dense)?;
        }
        Ok((b.add("residual", h, out)?, scores))
    }

    /// The block beside the experts, of their input.
    pub(super) fn shared(
        &self,
        b: &mut GraphBuilder,
        layer_idx: usize,
        shared: &SharedExperts,
        x: TensorId,
        stand: &Stand,
    ) -> Built {
        let parts = [Part::SharedWg, Part::SharedWu, Part::SharedWd];
        b.within("shared", |b| {
            let y = self.block(b, layer_idx, parts, shared.ffn, x, None, stand)?;
            if !shared.gated {
                return Ok(y);
            }
            let part = Part::SharedGate;
            let score = self.projection(b, layer_idx, part, "s", x, "embed", &[], stand)?;
            let gate = b.unary("sigmoid", UnaryFn::Sigmoid, score)?;
            Ok::<_, ModelError>(b.mul("gated", y, gate)?)
        })
    }

    /// What a layer adds to the loss: a scalar each.
    pub(super) fn router_losses(
        &self,
        b: &mut GraphBuilder,
        moe: &MoeConfig,
        scores: &Scores,
    ) -> Result<Vec<TensorId>, ModelError> {
        let dtype = self.config.dtype;
        let mut losses = Vec::new();
        if moe.losses.balance > 0.0 {
            let probs = match moe.router {
                Router::Softmax { .. } => scores.probs,
                Router::Sigmoid { .. } => {
                    let sum = b.reduce("balance.sum", ReduceKind::Sum, scores.probs, ["expert"])?;
                    b.div("balance.probs", scores.probs, sum)?
                }
            };
            let shape = b.ty(scores.expert).shape.clone();
            let ones = b.constant("balance.ones", dtype, shape, ConstInit::Fill(Scalar(1.0)))?;
            let scatter = OpKind::TopKGrad {
                dim: "expert".into(),
                choice: "choice".into(),
                size: moe.n_experts,
            };
            let chosen = b.apply("balance.chosen", scatter, &[ones, scores.expert])?;
            let counts = b.reduce("balance.counts", ReduceKind::Sum, chosen, ["seq"])?;
            let total = b.reduce("balance.total", ReduceKind::Sum, probs, ["seq"])?;
            let both = b.mul("balance.both", counts, total)?;
            let sum = b.reduce("balance.loss", ReduceKind::Sum, both, ["batch", "expert"])?;
            let (batch, seq) = (b.size_of(scores.expert, "batch")?, self.seq as f64);
            let share = moe.n_experts as f64 / (moe.top_k as f64 * seq * seq * batch as f64);
            losses.push(b.scale("balance", sum, moe.losses.balance * share)?);
        }
        if moe.losses.z > 0.0 {
            let lse = b.reduce("z.lse", ReduceKind::Lse, scores.logits, ["expert"])?;
            let square = b.unary("z.square", UnaryFn::Square, lse)?;
            let mean = b.mean("z.mean", square, ["batch", "seq"])?;
            losses.push(b.scale("z", mean, moe.losses.z)?);
        }
        Ok(losses)
    }

    /// Makes the step of a router's bias its given gradient: γ sign(load − mean load), over the batch.
    pub(super) fn bias_step(
        &self,
        b: &mut GraphBuilder,
        moe: &MoeConfig,
        scores: &Scores,
    ) -> Result<(), ModelError> {
        let rate = moe.losses.bias_rate;
        let Some(bias) = scores.bias.filter(|_| rate > 0.0) else {
            return Ok(());
        };
        let shape = b.ty(scores.expert).shape.clone();
        let n_assigned: usize = shape.iter().map(|(_, size)| size).product();
        let one = ConstInit::Fill(Scalar(1.0));
        let ones = b.constant("bias.ones", self.config.dtype, shape, one)?;
        let scatter = OpKind::TopKGrad {
            dim: "expert".into(),
            choice: "choice".into(),
            size: moe.n_experts,
        };
        let chosen = b.apply("bias.chosen", scatter, &[ones, scores.expert])?;
        let load = b.reduce("bias.load", ReduceKind::Sum, chosen, ["batch", "seq"])?;
        let mean = n_assigned as f64 / moe.n_experts as f64;
        let error = b.shift("bias.error", load, -mean)?;
        let steep = b.scale("bias.steep", error, STEEP)?;
        let sign = b.unary("bias.sign", UnaryFn::Tanh, steep)?;
        let step = b.scale("bias.step", sign, rate)?;
        b.graph_mut().gradients.insert(bias, step);
        Ok(())
    }

    /// (expert, gate), both `[batch, seq, choice]` or rows of choices, and the scores behind them.
    pub(super) fn route(
        &self,
        b: &mut GraphBuilder,
        layer_idx: usize,
        moe: &MoeConfig,
        x: TensorId,
        stand: &Stand,
    ) -> Result<(TensorId, TensorId, Scores), ModelError> {
        let config = self.config;
        let shape = [("embed", config.embed), ("expert", moe.n_experts)];
        let init = Stream::layer(layer_idx, Part::Router).init(config.embed);
        let router = b.param("router", config.dtype, shape, init)?;
        // Where tokens stand by their experts, those that they choose from have another name.
        let dim = stand.choices;
        let named = |b: &mut GraphBuilder, name: &str, of: TensorId| -> Built {
            match dim {
                "expert" => Ok(of),
                dim => Ok(b.rename(name, of, "expert", dim)?),
            }
        };
        let router = named(b, "router.target", router)?;
        let rows = stand.dims.iter().copied().chain([dim]);
        let scores = b.contract("scores", x, router, rows)?;
        let (normalize, scale) = match &moe.router {
            Router::Softmax {
                normalize, scale, ..
            }
            | Router::Sigmoid {
                normalize, scale, ..
            } => (*normalize, *scale),
        };
        let mut router_bias = None;
        let (expert, mut gate, probs) = match &moe.router {
            Router::Softmax { groups, .. } => {
                let probs = b.softmax("probs", scores, dim)?;
                let (values, expert) = match groups {
                    None => b.top_k("chosen", probs, dim, "choice", moe.top_k)?,
                    Some(groups) => {
                        // A group counts by its best expert; the rest of the others' is set to 0.
                        let mask = self.group_mask(b, moe, *groups, 1, probs, dim)?;
                        let masked = b.mul("probs.masked", probs, mask)?;
                        b.top_k("chosen", masked, dim, "choice", moe.top_k)?
                    }
                };
                (expert, values, probs)
            }
            Router::Sigmoid { groups, .. } => {
                let probs = b.unary("probs", UnaryFn::Sigmoid, scores)?;
                let shape = [("expert", moe.n_experts)];
                let bias = b.param("router_bias", config.dtype, shape, Init::Zeros)?;
                router_bias = Some(bias);
                let bias = named(b, "router_bias.target", bias)?;
                let mut biased = b.add("probs.biased", probs, bias)?;
                if let Some(groups) = groups {
                    let mask = self.group_mask(b, moe, *groups, 2, biased, dim)?;
                    let kept = b.mul("probs.kept", biased, mask)?;
                    let floor = b.scale("mask.scaled", mask, EXCLUDED)?;
                    let floor = b.shift("mask.floor", floor, -EXCLUDED)?;
                    biased = b.add("probs.masked", kept, floor)?;
                }
                let (_, expert) = b.top_k("chosen", biased, dim, "choice", moe.top_k)?;
                // The gate is the score without the bias, which therefore takes no gradient.
                let mut shape = b.ty(expert).shape.clone();
                shape.push((dim.into(), moe.n_experts));
                let wide = b.expand("probs.wide", probs, shape)?;
                let gate = b.pick("gates.chosen", wide, expert, dim)?;
                (expert, gate, probs)
            }
        };
        if normalize {
            let sum = b.reduce("gates.sum", ReduceKind::Sum, gate, ["choice"])?;
            gate = b.div("gates", gate, sum)?;
        }
        if scale != 1.0 {
            gate = b.scale("gates.scaled", gate, scale)?;
        }
        let scores = Scores {
            logits: scores,
            probs,
            expert,
            bias: router_bias,
        };
        Ok((expert, gate, scores))
    }

    /// 1 for the experts of the chosen groups, else 0: `[batch, seq, expert]`.
    ///
    /// A group is judged by the sum of its `n_best` greatest scores.
    fn group_mask(
        &self,
        b: &mut GraphBuilder,
        moe: &MoeConfig,
        (n_groups, kept): (usize, usize),
        n_best: usize,
        scores: TensorId,
        dim: &str,
    ) -> Built {
        let members = [
            ("expert_group", n_groups),
            ("member", moe.n_experts / n_groups),
        ];
        let grouped = b.split("groups.scores", scores, dim, members)?;
        let (best, _) = b.top_k("groups.best", grouped, "member", "best", n_best)?;
        let score = b.reduce("groups.score", ReduceKind::Sum, best, ["best"])?;
        let (_, index) = b.top_k("groups.chosen", score, "expert_group", "best", kept)?;
        let ones = ConstInit::Fill(Scalar(1.0));
        let shape = b.ty(index).shape.clone();
        let ones = b.constant("groups.ones", self.config.dtype, shape, ones)?;
        let scatter = OpKind::TopKGrad {
            dim: "expert_group".into(),
            choice: "best".into(),
            size: n_groups,
        };
        let mask = b.apply("groups.mask", scatter, &[ones, index])?;
        let shape = b.ty(grouped).shape.clone();
        let mask = b.expand("groups.mask.wide", mask, shape)?;
        Ok(b.merge("mask", mask, ["expert_group", "member"], dim)?)
    }
}

/// Slots of an expert for `seq` tokens, a sequence or a part of one; more are never used.
fn capacity(moe: &MoeConfig, seq: usize) -> usize {
    if moe.capacity_factor == 0.0 {
        return seq;
    }
    let share = moe.capacity_factor * (moe.top_k * seq) as f64 / moe.n_experts as f64;
    (share.ceil() as usize).clamp(1, seq)
}

fn activation(activation: Activation) -> UnaryFn {
    match activation {
        Activation::Silu => UnaryFn::Silu,
        Activation::Gelu => UnaryFn::Gelu,
        Activation::GeluTanh => UnaryFn::GeluTanh,
        Activation::Relu => UnaryFn::Relu,
    }
}
