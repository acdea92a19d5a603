//! The closed set of ops.
//!
//! Enters: an [`OpKind`] and the types of its inputs. Leaves: the types of its results ([`shape`]),
//! how it may be sharded ([`sharding`]) and what it costs ([`cost`]).
//! Invariant: every rule matches every kind in full, so that a new op cannot be forgotten anywhere.
//!
//! The same kinds stand in global graphs (the model) and in local ones (one rank's part of it).
//! Collectives occur only in local graphs; the `offset` fields are 0 in global graphs (save where
//! attention is of a slice of a sequence) and the start of the rank's shard in local ones.

mod cost;
mod shape;
mod sharding;

use serde::{Deserialize, Serialize};

pub use cost::ATTENTION_BLOCK_ROWS;
pub use shape::OpError;
pub use sharding::{Factor, PARTIAL_FACTOR, Spread};

use crate::dtype::{DType, Scalar};
use crate::layout::{Interval, ReduceKind};
use crate::name::{Axis, Dim};

/// A function of one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnaryFn {
    Neg,
    Exp,
    Log,
    Sqrt,
    Rsqrt,
    Square,
    Reciprocal,
    Tanh,
    Sigmoid,
    Silu,
    Relu,
    /// x Φ(x), with the error function.
    Gelu,
    /// The tanh form of GELU (`gelu_new`).
    GeluTanh,
    /// c · x.
    Scale(Scalar),
    /// x + c.
    Shift(Scalar),
    /// x as another type of floats, rounded to the nearest (ties to even).
    Cast(DType),
}

/// A function of two elements.
///
/// The `…Grad` functions take (x, dy) and give dy · f'(x).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BinaryFn {
    Add,
    Sub,
    Mul,
    Div,
    Max,
    /// 1 where equal, else 0.
    Equal,
    TanhGrad,
    SigmoidGrad,
    SiluGrad,
    ReluGrad,
    GeluGrad,
    GeluTanhGrad,
}

/// The ranks that take part in a collective, in the order of their shards.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Group {
    /// The mesh axes the group runs along, for people and for pricing.
    pub axes: Vec<Axis>,
    pub ranks: Vec<usize>,
}

/// What an op computes. Inputs and results are listed as `(inputs) -> results`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OpKind {
    /// `(x[dim, rest..], idx[i..]) -> [i.., rest..]`: rows of x by index (embedding).
    /// Indices outside `[offset, offset + |dim|)` give zeros.
    Gather {
        dim: Dim,
        #[serde(default)]
        offset: usize,
    },
    /// `(idx[i..], y[i.., rest..]) -> [dim:size, rest..]`: sums rows by index (embedding gradient).
    /// Indices outside `[offset, offset + size)` are left out.
    ScatterAdd {
        dim: Dim,
        size: usize,
        #[serde(default)]
        offset: usize,
    },
    /// `(a, b) -> [out..]`: the einsum of a and b by dim names; dims absent from `out` are summed.
    Contract { out: Vec<Dim> },
    /// `(x) -> x`.
    Unary(UnaryFn),
    /// `(a, b) -> a or b`: the dims of one input contain those of the other, which is broadcast.
    Binary(BinaryFn),
    /// `(x) -> x without dims`.
    Reduce { kind: ReduceKind, dims: Vec<Dim> },
    /// `(x[x..]) -> [dims..]`: repeats x along the dims it lacks; `dims` is the whole result shape.
    Expand { dims: Vec<(Dim, usize)> },
    /// `(x, weight[dim]) -> (y, rstd)`: y = x · rstd · weight, rstd = (mean x² + eps)^−½.
    RmsNorm { dim: Dim, eps: Scalar },
    /// `(x, weight, rstd, dy) -> (dx, dweight)`.
    RmsNormGrad { dim: Dim },
    /// `(x, weight[dim], bias[dim]) -> (y, mean, rstd)`.
    LayerNorm { dim: Dim, eps: Scalar },
    /// `(x, weight, mean, rstd, dy) -> (dx, dweight, dbias)`.
    LayerNormGrad { dim: Dim },
    /// `(x) -> x`, normalized over `dim`.
    Softmax { dim: Dim },
    /// `(y, dy) -> dx`, y being the softmax.
    SoftmaxGrad { dim: Dim },
    /// `(x[.., dim], cos[.., half], sin[.., half]) -> x`: rotary embedding of the half-split form,
    /// out = concat(x1 cos − x2 sin, x2 cos + x1 sin). `inverse` negates the angle (the gradient).
    Rope { dim: Dim, inverse: bool },
    /// `(q[b.., seq, g.., head], k[b.., kv_seq, head], v[b.., kv_seq, value]) -> (o, lse)`:
    /// softmax(scale · q kᵀ) v, causal when said: query i sees keys 0..=i + offset.
    /// Dims of q that k lacks (besides `seq`) share the keys (grouped-query attention).
    /// With a fourth input `seen: i32[.., seq]`, over dims of q, a query sees its first `seen` keys
    /// instead; queries that see none stand behind all others, and what comes of them is 0.
    /// o has the dims of q with `value` in place of `head`; lse has those of q without `head`.
    Attention(AttentionDims),
    /// `(q, k, v, o, lse, do) -> (dq, dk, dv)`.
    AttentionGrad(AttentionDims),
    /// `(x[.., dim], idx[..]) -> [..]`: the element of each row at its index; 0 where the index is
    /// outside `[offset, offset + |dim|)`.
    Pick {
        dim: Dim,
        #[serde(default)]
        offset: usize,
    },
    /// `(logits[.., dim], lse[..], target[..], dloss[..]) -> dlogits`:
    /// (exp(logits − lse) − [i + offset = target]) · dloss, the gradient of lse − picked logit.
    CrossEntropyGrad {
        dim: Dim,
        #[serde(default)]
        offset: usize,
    },
    /// `(x) -> x` with its dims in another memory order.
    Transpose { dims: Vec<Dim> },
    /// `(x[.., from, ..]) -> [.., to, ..]`.
    Rename { from: Dim, to: Dim },
    /// `(x[.., dim, ..]) -> [.., into.., ..]`, first of `into` major.
    Split { dim: Dim, into: Vec<(Dim, usize)> },
    /// `(x[.., dims.., ..]) -> [.., into, ..]`; `dims` are adjacent in this order.
    Merge { dims: Vec<Dim>, into: Dim },
    /// `(x) -> x` with `[start, start + len)` of `dim`.
    Slice { dim: Dim, start: usize, len: usize },
    /// `(x, y, ..) -> ` one after the other along `dim`.
    Concat { dim: Dim },
    /// `(x[.., dim]) -> (values[.., choice:k], indices[.., choice:k])`: the k greatest, greatest first;
    /// among equals the lowest index first.
    TopK { dim: Dim, choice: Dim, k: usize },
    /// `(dvalues[.., choice], indices[.., choice]) -> dx[.., dim:size]`.
    TopKGrad { dim: Dim, choice: Dim, size: usize },
    /// `(expert[b.., seq, choice]) -> slot[b.., seq, choice]`: rank of each assignment within its
    /// expert, counted within `b..` in (token, choice) order; −1 where it is ≥ `capacity`.
    MoeSlots {
        seq: Dim,
        choice: Dim,
        n_experts: usize,
        capacity: usize,
    },
    /// `(expert[b.., seq, choice], slot, turns[expert, turn]) -> place[b.., seq, choice]`: which of an
    /// expert's replicas takes an assignment. Replicas take turns, by the slot of the assignment and the
    /// token with which its expert began in `b..`; −1 where the slot is −1.
    MoePlaces(MoePlaces),
    /// `(x[b.., seq, d], expert, slot[, gate]) -> [expert:n_experts, b.., slot:capacity, d]`:
    /// tokens into their experts' slots (times their gate, when given); empty slots are 0.
    MoeDispatch(MoeDims),
    /// `(y[expert, b.., slot, d], expert, slot[, gate]) -> [b.., seq, d]`: the sum over a token's
    /// choices of its experts' outputs (times their gate, when given).
    MoeCombine(MoeDims),
    /// `(y[expert, b.., slot, d], dout[b.., seq, d], expert, slot) -> dgate[b.., seq, choice]`.
    MoeGateGrad(MoeDims),
    /// `(expert[b.., seq, choice], slot) -> [expert:n_experts, b..]`: how many of an expert's slots are
    /// taken. Whole sequences: the slots taken are the first ones.
    MoeCounts(MoeDims),
    /// `(y[expert, b.., slot, d], expert[b.., seq, from], slot, expert'[b.., seq, choice], slot'[, gate])
    /// -> [expert:n_experts, b.., slot:capacity, d]`: tokens from the slots where they stand into those
    /// that they are sent to: a combination (by the gates `[b.., seq, from]`, when given) and a
    /// dispatch in one, in which only rows whose device changes travel.
    MoeMove(MoeMove),
    /// `(p, g, m, v, step[]) -> (p, m, v)`; step counts from 1. Bias-corrected, decoupled decay:
    /// p −= lr (m̂ / (√v̂ + eps) + decay p).
    Adamw {
        lr: Scalar,
        beta1: Scalar,
        beta2: Scalar,
        eps: Scalar,
        decay: Scalar,
    },
    /// `(p, g) -> p − lr g`.
    Sgd { lr: Scalar },

    /// Local: every rank receives all shards of `dim`, `counts[i]` elements from the i-th member.
    AllGather {
        dim: Dim,
        counts: Vec<usize>,
        group: Group,
    },
    /// Local: reduction over the group, the same bits on every member.
    AllReduce { kind: ReduceKind, group: Group },
    /// Local: reduction over the group, of which the i-th member keeps the i-th `counts` of `dim`.
    ReduceScatter {
        kind: ReduceKind,
        dim: Dim,
        counts: Vec<usize>,
        group: Group,
    },
    /// Local: member i sends the j-th `split_counts` of `split` to member j, and lays what it
    /// receives one after the other along `concat` (`concat_counts[j]` elements from member j).
    AllToAll {
        split: Dim,
        split_counts: Vec<usize>,
        concat: Dim,
        concat_counts: Vec<usize>,
        group: Group,
    },
    /// Local: this rank sends its tensor to `to` and receives one of the result's type from `from`.
    CollectivePermute {
        to: usize,
        from: usize,
        group: Group,
    },
    /// Local: every rank receives the tensor of the group's first member.
    Broadcast { group: Group },
}

/// The dims of an attention op by their parts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttentionDims {
    pub seq: Dim,
    pub kv_seq: Dim,
    pub head: Dim,
    pub value: Dim,
    pub scale: Scalar,
    pub causal: bool,
    /// Position of the first query among the keys: of this rank's part, and of the slice of a
    /// sequence that the op works on.
    #[serde(default)]
    pub offset: usize,
}

/// The dims of a mixture-of-experts dispatch or combine by their parts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MoeDims {
    pub seq: Dim,
    pub choice: Dim,
    pub expert: Dim,
    pub slot: Dim,
    /// Experts of this rank; all of them in a global graph.
    pub n_experts: usize,
    pub capacity: usize,
    /// First expert of this rank.
    #[serde(default)]
    pub offset: usize,
}

/// The dims of a choice among replicas by their parts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MoePlaces {
    pub seq: Dim,
    pub choice: Dim,
    pub expert: Dim,
    pub turn: Dim,
}

/// A move of tokens from slots to slots.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MoeMove {
    /// Where tokens go. Both sides have the same experts.
    #[serde(flatten)]
    pub dims: MoeDims,
    /// The dim of the choices that tokens come from, in place of `choice`.
    pub from: Dim,
    /// No token leaves its expert, or at least its expert's rank: nothing is exchanged.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stays: bool,
    /// The rows are weights of experts on their way to replicas, or gradients on their way back; the
    /// `expert` is the device, `slot` an expert's place on it, and `seq` counts the experts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub weights: bool,
    /// Local: the ranks that divide the experts among them; none where all of a token is here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub over: Option<Box<Shares>>,
}

/// The members of a group and how many experts each of them has, in their order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Shares {
    pub counts: Vec<usize>,
    pub group: Group,
}

impl MoeMove {
    /// The move of all members together: the same for each of them.
    #[must_use]
    pub fn whole(&self) -> Self {
        let mut whole = self.clone();
        if let Some(shares) = whole.over.take() {
            whole.dims.n_experts = shares.counts.iter().sum();
            whole.dims.offset = 0;
        }
        whole
    }
}

impl OpKind {
    /// The name in text forms.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Gather { .. } => "gather",
            Self::ScatterAdd { .. } => "scatter_add",
            Self::Contract { .. } => "contract",
            Self::Unary(function) => match function {
                UnaryFn::Neg => "neg",
                UnaryFn::Exp => "exp",
                UnaryFn::Log => "log",
                UnaryFn::Sqrt => "sqrt",
                UnaryFn::Rsqrt => "rsqrt",
                UnaryFn::Square => "square",
                UnaryFn::Reciprocal => "reciprocal",
                UnaryFn::Tanh => "tanh",
                UnaryFn::Sigmoid => "sigmoid",
                UnaryFn::Silu => "silu",
                UnaryFn::Relu => "relu",
                UnaryFn::Gelu => "gelu",
                UnaryFn::GeluTanh => "gelu_tanh",
                UnaryFn::Scale(_) => "scale",
                UnaryFn::Shift(_) => "shift",
                UnaryFn::Cast(_) => "cast",
            },
            Self::Binary(function) => match function {
                BinaryFn::Add => "add",
                BinaryFn::Sub => "sub",
                BinaryFn::Mul => "mul",
                BinaryFn::Div => "div",
                BinaryFn::Max => "max",
                BinaryFn::Equal => "equal",
                BinaryFn::TanhGrad => "tanh_grad",
                BinaryFn::SigmoidGrad => "sigmoid_grad",
                BinaryFn::SiluGrad => "silu_grad",
                BinaryFn::ReluGrad => "relu_grad",
                BinaryFn::GeluGrad => "gelu_grad",
                BinaryFn::GeluTanhGrad => "gelu_tanh_grad",
            },
            Self::Reduce {
                kind: ReduceKind::Sum,
                ..
            } => "reduce_sum",
            Self::Reduce {
                kind: ReduceKind::Max,
                ..
            } => "reduce_max",
            Self::Reduce {
                kind: ReduceKind::Lse,
                ..
            } => "logsumexp",
            Self::Expand { .. } => "expand",
            Self::RmsNorm { .. } => "rms_norm",
            Self::RmsNormGrad { .. } => "rms_norm_grad",
            Self::LayerNorm { .. } => "layer_norm",
            Self::LayerNormGrad { .. } => "layer_norm_grad",
            Self::Softmax { .. } => "softmax",
            Self::SoftmaxGrad { .. } => "softmax_grad",
            Self::Rope { .. } => "rope",
            Self::Attention(_) => "attention",
            Self::AttentionGrad(_) => "attention_grad",
            Self::Pick { .. } => "pick",
            Self::CrossEntropyGrad { .. } => "cross_entropy_grad",
            Self::Transpose { .. } => "transpose",
            Self::Rename { .. } => "rename",
            Self::Split { .. } => "split",
            Self::Merge { .. } => "merge",
            Self::Slice { .. } => "slice",
            Self::Concat { .. } => "concat",
            Self::TopK { .. } => "top_k",
            Self::TopKGrad { .. } => "top_k_grad",
            Self::MoeSlots { .. } => "moe_slots",
            Self::MoePlaces(_) => "moe_places",
            Self::MoeDispatch(_) => "moe_dispatch",
            Self::MoeCombine(_) => "moe_combine",
            Self::MoeGateGrad(_) => "moe_gate_grad",
            Self::MoeCounts(_) => "moe_counts",
            Self::MoeMove(_) => "moe_move",
            Self::Adamw { .. } => "adamw",
            Self::Sgd { .. } => "sgd",
            Self::AllGather { .. } => "all_gather",
            Self::AllReduce { .. } => "all_reduce",
            Self::ReduceScatter { .. } => "reduce_scatter",
            Self::AllToAll { .. } => "all_to_all",
            Self::CollectivePermute { .. } => "collective_permute",
            Self::Broadcast { .. } => "broadcast",
        }
    }

    /// The group of a collective; `None` for every other op.
    pub fn group(&self) -> Option<&Group> {
        match self {
            Self::AllGather { group, .. }
            | Self::AllReduce { group, .. }
            | Self::ReduceScatter { group, .. }
            | Self::AllToAll { group, .. }
            | Self::CollectivePermute { group, .. }
            | Self::Broadcast { group } => Some(group),
            Self::MoeMove(moved) => moved.over.as_ref().map(|shares| &shares.group),
            _ => None,
        }
    }

    /// A collective among other ranks: each rank it names is replaced by `rank` of it. Every other op
    /// stays as it is.
    #[must_use]
    pub fn at_ranks(&self, rank: impl Fn(usize) -> usize) -> Self {
        let mut moved = self.clone();
        match &mut moved {
            Self::CollectivePermute { to, from, group } => {
                (*to, *from) = (rank(*to), rank(*from));
                group.ranks.iter_mut().for_each(|one| *one = rank(*one));
            }
            Self::AllGather { group, .. }
            | Self::AllReduce { group, .. }
            | Self::ReduceScatter { group, .. }
            | Self::AllToAll { group, .. }
            | Self::Broadcast { group } => {
                group.ranks.iter_mut().for_each(|one| *one = rank(*one));
            }
            Self::MoeMove(moved) => {
                if let Some(Shares { group, .. }) = moved.over.as_deref_mut() {
                    group.ranks.iter_mut().for_each(|one| *one = rank(*one));
                }
            }
            _ => {}
        }
        moved
    }

    /// Whether two members of one group come to one and the same collective.
    pub fn meets(&self, other: &Self) -> bool {
        match (self, other) {
            // Each member has its own partners.
            (Self::CollectivePermute { .. }, Self::CollectivePermute { .. }) => true,
            // And its own experts.
            (Self::MoeMove(a), Self::MoeMove(b)) => a.over == b.over && a.whole() == b.whole(),
            _ => self == other,
        }
    }

    /// Results that may be written over an input: pairs (result, input).
    pub fn in_place(&self) -> &'static [(usize, usize)] {
        match self {
            Self::Adamw { .. } => &[(0, 0), (1, 2), (2, 3)],
            Self::Sgd { .. } => &[(0, 0)],
            _ => &[],
        }
    }

    /// This op on a part of its iteration space: `interval` gives the part of each dim of the op.
    ///
    /// Sizes and offsets inside the op are set to the part; everything else stays.
    pub fn localize(&self, interval: impl Fn(&Dim, usize) -> Interval) -> Self {
        let mut local = self.clone();
        match &mut local {
            Self::Gather { dim, offset }
            | Self::Pick { dim, offset }
            | Self::CrossEntropyGrad { dim, offset } => {
                *offset = interval(dim, 0).start;
            }
            Self::ScatterAdd { dim, size, offset } => {
                let part = interval(dim, *size);
                (*size, *offset) = (part.len, part.start);
            }
            Self::Expand { dims } => {
                for (dim, size) in dims {
                    *size = interval(dim, *size).len;
                }
            }
            Self::Split { into, .. } => {
                for (dim, size) in into {
                    *size = interval(dim, *size).len;
                }
            }
            Self::Attention(dims) | Self::AttentionGrad(dims) => {
                dims.offset += interval(&dims.seq, 0).start;
            }
            Self::MoeDispatch(dims)
            | Self::MoeCombine(dims)
            | Self::MoeGateGrad(dims)
            | Self::MoeCounts(dims) => {
                let part = interval(&dims.expert, dims.n_experts);
                (dims.n_experts, dims.offset) = (part.len, part.start);
            }
            Self::MoeMove(MoeMove { dims, .. }) => {
                let part = interval(&dims.expert, dims.n_experts);
                (dims.n_experts, dims.offset) = (part.len, part.start);
            }
            _ => {}
        }
        local
    }
}
