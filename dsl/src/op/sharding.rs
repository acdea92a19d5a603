//! Sharding rules: along which *factors* an op may be divided over a mesh axis.
//!
//! Enters: an op and the types of its inputs and results.
//! Leaves: its factors. A mesh axis is given to at most one factor of an op; an axis given to none
//! is replicated: every rank of it computes the same.
//! Invariant: computing the parts and combining the results as the factor says gives the whole op
//! (in the style of einsum: a dim kept is split in the result, a dim summed leaves a partial sum).
//!
//! Source of the formulation: Shardy's op sharding rules (factors per dimension), extended by
//! partial values, so that sums of partial gradients are reduced once.

use serde::{Deserialize, Serialize};

use super::{BinaryFn, MoeDims, MoeMove, OpKind, UnaryFn};
use crate::graph::TensorType;
use crate::layout::ReduceKind;
use crate::name::Dim;

/// What one operand or result is along a factor.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spread {
    /// Every rank has (or needs) all of it.
    Whole,
    /// Split along this dim.
    Split(Dim),
    /// Every rank has an unreduced value.
    Partial(ReduceKind),
}

/// One way to divide an op over a mesh axis.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Factor {
    /// Unique within the op: the dim it splits, or `+sum` for partial operands carried through.
    pub name: Dim,
    /// Elements along the factor: the number of ranks may not exceed it.
    pub size: usize,
    /// Only degrees that divide `size` are legal (reshapes).
    pub even: bool,
    pub inputs: Vec<Spread>,
    pub results: Vec<Spread>,
}

impl Factor {
    /// Whether the op may be divided by this factor over `degree` ranks.
    pub fn admits(&self, degree: usize) -> bool {
        degree <= self.size && (!self.even || self.size.is_multiple_of(degree))
    }
}

/// The name of the factor that carries partial sums through a linear op.
pub const PARTIAL_FACTOR: &str = "+sum";

impl OpKind {
    /// The factors of this op on inputs and results of the given types, in the order of the dims.
    ///
    /// Collectives have none: they are made by partitioning and never partitioned again.
    pub fn factors(&self, inputs: &[&TensorType], results: &[&TensorType]) -> Vec<Factor> {
        let rule = Rule { inputs, results };
        let mut factors = match self {
            Self::Gather { dim, .. } => {
                let mut factors = rule.dims_except(&[dim]);
                factors.extend(rule.dim(dim, Spread::Partial(ReduceKind::Sum)));
                factors
            }
            Self::ScatterAdd { .. }
            | Self::Contract { .. }
            | Self::Unary(_)
            | Self::Binary(_)
            | Self::Expand { .. }
            | Self::CrossEntropyGrad { .. }
            | Self::Pick { .. }
            | Self::Transpose { .. }
            | Self::Adamw { .. }
            | Self::Sgd { .. } => rule.dims_except(&[]),
            Self::Reduce { kind, dims } => {
                let mut factors = rule.dims_except(&dims.iter().collect::<Vec<_>>());
                factors.extend(
                    dims.iter()
                        .filter_map(|dim| rule.dim(dim, Spread::Partial(*kind))),
                );
                factors
            }
            Self::RmsNorm { dim, .. }
            | Self::RmsNormGrad { dim }
            | Self::LayerNorm { dim, .. }
            | Self::LayerNormGrad { dim }
            | Self::Softmax { dim }
            | Self::SoftmaxGrad { dim }
            | Self::Slice { dim, .. }
            | Self::Concat { dim } => rule.dims_except(&[dim]),
            Self::Rope { dim, .. } => {
                let half = inputs.get(1).and_then(|cos| cos.dims().last());
                rule.dims_except(&[Some(dim), half].into_iter().flatten().collect::<Vec<_>>())
            }
            Self::Attention(dims) | Self::AttentionGrad(dims) => {
                rule.dims_except(&[&dims.kv_seq, &dims.head, &dims.value])
            }
            Self::Rename { from, to } => {
                let mut factors = rule.dims_except(&[from, to]);
                factors.extend(rule.relabel(from, to, false));
                factors
            }
            Self::Split { dim, into } => {
                let mut except: Vec<&Dim> = into.iter().map(|(dim, _)| dim).collect();
                except.push(dim);
                let mut factors = rule.dims_except(&except);
                factors.extend(
                    into.first()
                        .and_then(|(major, _)| rule.relabel(dim, major, true)),
                );
                factors
            }
            Self::Merge { dims, into } => {
                let mut except: Vec<&Dim> = dims.iter().collect();
                except.push(into);
                let mut factors = rule.dims_except(&except);
                factors.extend(
                    dims.first()
                        .and_then(|major| rule.relabel(major, into, true)),
                );
                factors
            }
            Self::TopK { dim, choice, .. } | Self::TopKGrad { dim, choice, .. } => {
                rule.dims_except(&[dim, choice])
            }
            Self::MoeSlots { seq, choice, .. } => rule.dims_except(&[seq, choice]),
            Self::MoePlaces(places) => {
                rule.dims_except(&[&places.seq, &places.choice, &places.expert, &places.turn])
            }
            Self::MoeDispatch(dims) | Self::MoeCombine(dims) | Self::MoeGateGrad(dims) => {
                // Slots are ranks within whole sequences, so a part of a sequence fills its own slots
                // (the others are 0 and summed) and reads its own outputs.
                let MoeDims { choice, slot, .. } = dims;
                let mut factors = rule.dims_except(&[choice, slot]);
                // There are no sums of indices.
                let is_index = results.first().is_some_and(|ty| !ty.dtype.is_float());
                let is_sum = |factor: &Factor| {
                    let mut results = factor.results.iter();
                    results.any(|spread| matches!(spread, Spread::Partial(_)))
                };
                factors.retain(|factor| !(is_index && is_sum(factor)));
                factors
            }
            // Along the experts, rows are exchanged within the op.
            Self::MoeMove(MoeMove {
                dims,
                from,
                weights,
                ..
            }) => {
                let mut factors = rule.dims_except(&[&dims.choice, from, &dims.seq, &dims.slot]);
                // Sums of gradients may come home before they are complete.
                if *weights {
                    let mut spreads = vec![Spread::Whole; inputs.len()];
                    if let Some(rows) = spreads.first_mut() {
                        *rows = Spread::Partial(ReduceKind::Sum);
                    }
                    factors.push(Factor {
                        name: PARTIAL_FACTOR.into(),
                        size: usize::MAX,
                        even: false,
                        inputs: spreads,
                        results: vec![Spread::Partial(ReduceKind::Sum); results.len()],
                    });
                }
                factors
            }
            Self::MoeCounts(dims) => rule.dims_except(&[&dims.seq, &dims.choice]),
            Self::AllGather { .. }
            | Self::AllReduce { .. }
            | Self::ReduceScatter { .. }
            | Self::AllToAll { .. }
            | Self::CollectivePermute { .. }
            | Self::Broadcast { .. } => Vec::new(),
        };
        if self.is_linear() {
            factors.push(Factor {
                name: PARTIAL_FACTOR.into(),
                size: usize::MAX,
                even: false,
                inputs: vec![Spread::Partial(ReduceKind::Sum); inputs.len()],
                results: vec![Spread::Partial(ReduceKind::Sum); results.len()],
            });
        }
        factors
    }

    /// Whether op(Σ x) = Σ op(x), all inputs taken together.
    fn is_linear(&self) -> bool {
        match self {
            Self::Unary(function) => matches!(function, UnaryFn::Neg | UnaryFn::Scale(_)),
            Self::Binary(function) => matches!(function, BinaryFn::Add | BinaryFn::Sub),
            Self::Reduce { kind, .. } => *kind == ReduceKind::Sum,
            Self::Expand { .. }
            | Self::Transpose { .. }
            | Self::Rename { .. }
            | Self::Split { .. }
            | Self::Merge { .. }
            | Self::Slice { .. }
            | Self::Concat { .. } => true,
            _ => false,
        }
    }
}

/// The operands and results of the op at hand.
struct Rule<'a> {
    inputs: &'a [&'a TensorType],
    results: &'a [&'a TensorType],
}

impl Rule<'_> {
    /// One factor for every dim but those named: split where present, whole in inputs without it,
    /// a partial sum in results without it.
    fn dims_except(&self, except: &[&Dim]) -> Vec<Factor> {
        let mut dims: Vec<&Dim> = Vec::new();
        for ty in self.results.iter().chain(self.inputs) {
            for dim in ty.dims() {
                if !dims.contains(&dim) && !except.contains(&dim) {
                    dims.push(dim);
                }
            }
        }
        dims.into_iter()
            .filter_map(|dim| self.dim(dim, Spread::Partial(ReduceKind::Sum)))
            .collect()
    }

    fn dim(&self, dim: &Dim, absent_result: Spread) -> Option<Factor> {
        let size = self
            .inputs
            .iter()
            .chain(self.results)
            .find_map(|ty| ty.size_of(dim))?;
        let spread = |ty: &&TensorType, absent: &Spread| {
            if ty.has(dim) {
                Spread::Split(dim.clone())
            } else {
                absent.clone()
            }
        };
        Some(Factor {
            name: dim.clone(),
            size,
            even: false,
            inputs: self
                .inputs
                .iter()
                .map(|ty| spread(ty, &Spread::Whole))
                .collect(),
            results: self
                .results
                .iter()
                .map(|ty| spread(ty, &absent_result))
                .collect(),
        })
    }

    /// The factor of a dim that is called `from` in the only input and `to` in the only result.
    fn relabel(&self, from: &Dim, to: &Dim, even: bool) -> Option<Factor> {
        let from_size = self.inputs.first()?.size_of(from)?;
        let to_size = self.results.first()?.size_of(to)?;
        Some(Factor {
            name: to.clone(),
            size: from_size.min(to_size),
            even,
            inputs: vec![Spread::Split(from.clone())],
            results: vec![Spread::Split(to.clone())],
        })
    }
}
