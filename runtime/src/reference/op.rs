//! One op on values.
//!
//! Enters: an op kind and its inputs. Leaves: its results, typed by the op's shape rule.
//! Invariant: every kind is matched in full; collectives are refused here.

mod attention;
mod contract;
mod elementwise;
mod index;
mod moe;
mod rows;
mod shape;

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::op::OpKind;

use super::{ReferenceError, Result, Value};

pub(super) use elementwise::reduce_pair;
pub(super) use shape::concat;

/// The results of an op that is no collective.
///
/// # Errors
/// The op does not fit its inputs, or is a collective.
pub fn evaluate_op(kind: &OpKind, inputs: &[&Value]) -> Result<Vec<Value>> {
    if kind.group().is_some() {
        return Err(ReferenceError::Invalid(format!(
            "{} takes part of several ranks: evaluate their graphs together",
            kind.name()
        )));
    }
    let input_types: Vec<&TensorType> = inputs.iter().map(|input| input.ty()).collect();
    let types = kind.infer(&input_types)?;
    let Some(ty) = types.first().cloned() else {
        return Err(ReferenceError::Internal("an op has no results".into()));
    };
    let one = |value: Value| Ok(vec![value]);
    match (kind, inputs) {
        (OpKind::Gather { dim, offset }, [x, idx]) => one(index::gather(dim, *offset, x, idx, ty)),
        (OpKind::ScatterAdd { dim, offset, .. }, [idx, y]) => {
            one(index::scatter_add(dim, *offset, idx, y, ty))
        }
        (OpKind::Contract { .. }, [a, b]) => one(contract::contract(a, b, ty)),
        (OpKind::Unary(function), [x]) => one(elementwise::unary(*function, x)),
        (OpKind::Binary(function), [a, b]) => one(elementwise::binary(*function, a, b, ty)),
        (OpKind::Reduce { kind, .. }, [x]) => one(elementwise::reduce(*kind, x, ty)),
        (OpKind::Expand { .. } | OpKind::Transpose { .. }, [x]) => one(shape::spread_over(x, ty)),
        (OpKind::RmsNorm { dim, eps }, [x, weight]) => Ok(rows::rms_norm(dim, eps.0, x, weight)),
        (OpKind::RmsNormGrad { dim }, [x, weight, rstd, dy]) => {
            Ok(rows::rms_norm_grad(dim, x, weight, rstd, dy))
        }
        (OpKind::LayerNorm { dim, eps }, [x, weight, bias]) => {
            Ok(rows::layer_norm(dim, eps.0, x, weight, bias))
        }
        (OpKind::LayerNormGrad { dim }, [x, weight, mean, rstd, dy]) => {
            Ok(rows::layer_norm_grad(dim, x, weight, mean, rstd, dy))
        }
        (OpKind::Softmax { dim }, [x]) => one(rows::softmax(dim, x)),
        (OpKind::SoftmaxGrad { dim }, [y, dy]) => one(rows::softmax_grad(dim, y, dy)),
        (OpKind::Rope { dim, inverse }, [x, cos, sin]) => {
            let sign = if *inverse { -1.0 } else { 1.0 };
            one(rows::rope(dim, sign, x, cos, sin))
        }
        (OpKind::Attention(dims), [q, k, v, seen @ ..]) => {
            let types = exact(&types)?;
            let seen = seen.first().copied();
            Ok(attention::attention(dims, [q, k, v], seen, types))
        }
        (OpKind::AttentionGrad(dims), [q, k, v, o, lse, do_]) => {
            Ok(attention::attention_grad(dims, [q, k, v, o, lse, do_]))
        }
        (OpKind::Pick { dim, offset }, [x, idx]) => one(index::pick(dim, *offset, x, idx, ty)),
        (OpKind::CrossEntropyGrad { dim, offset }, [logits, lse, target, dloss]) => one(
            index::cross_entropy_grad(dim, *offset, logits, lse, target, dloss),
        ),
        (OpKind::Rename { .. } | OpKind::Split { .. } | OpKind::Merge { .. }, [x]) => {
            one((*x).clone().with_type(ty)?)
        }
        (OpKind::Slice { dim, start, .. }, [x]) => one(shape::slice(dim, *start, x, ty)),
        (OpKind::Concat { dim }, inputs) => one(concat(dim, inputs)?),
        (OpKind::TopK { dim, k, .. }, [x]) => {
            let [values_ty, indices_ty] = exact(&types)?;
            Ok(index::top_k(dim, *k, x, values_ty, indices_ty))
        }
        (OpKind::TopKGrad { dim, choice, .. }, [dvalues, indices]) => {
            one(index::top_k_grad(dim, choice, dvalues, indices, ty))
        }
        (
            OpKind::MoeSlots {
                seq,
                choice,
                n_experts,
                capacity,
            },
            [expert],
        ) => one(moe::slots(seq, choice, *n_experts, *capacity, expert)),
        (OpKind::MoePlaces(places), [expert, slot, turns]) => {
            one(moe::places(places, expert, slot, turns))
        }
        (OpKind::MoeDispatch(dims), [x, expert, slot]) => {
            one(moe::dispatch(dims, x, expert, slot, None, ty))
        }
        (OpKind::MoeDispatch(dims), [x, expert, slot, gate]) => {
            one(moe::dispatch(dims, x, expert, slot, Some(gate), ty))
        }
        (OpKind::MoeCombine(dims), [y, expert, slot]) => {
            one(moe::combine(dims, y, expert, slot, None, ty))
        }
        (OpKind::MoeCombine(dims), [y, expert, slot, gate]) => {
            one(moe::combine(dims, y, expert, slot, Some(gate), ty))
        }
        (OpKind::MoeGateGrad(dims), [y, dout, expert, slot]) => {
            one(moe::gate_grad(dims, y, dout, expert, slot, ty))
        }
        (OpKind::MoeCounts(dims), [expert, slot]) => one(moe::counts(dims, expert, slot, ty)),
        (OpKind::MoeMove(moved), [y, routes @ ..]) => one(moe::moved(moved, y, routes, ty)?),
        (
            OpKind::Adamw {
                lr,
                beta1,
                beta2,
                eps,
                decay,
            },
            [p, g, m, v, step],
        ) => {
            let rates = elementwise::AdamwRates {
                lr: lr.0,
                beta1: beta1.0,
                beta2: beta2.0,
                eps: eps.0,
                decay: decay.0,
            };
            Ok(elementwise::adamw(&rates, [p, g, m, v], step.item()))
        }
        (OpKind::Sgd { lr }, [p, g]) => one(elementwise::sgd(lr.0, p, g)),
        (
            OpKind::Gather { .. }
            | OpKind::ScatterAdd { .. }
            | OpKind::Contract { .. }
            | OpKind::Unary(_)
            | OpKind::Binary(_)
            | OpKind::Reduce { .. }
            | OpKind::Expand { .. }
            | OpKind::RmsNorm { .. }
            | OpKind::RmsNormGrad { .. }
            | OpKind::LayerNorm { .. }
            | OpKind::LayerNormGrad { .. }
            | OpKind::Softmax { .. }
            | OpKind::SoftmaxGrad { .. }
            | OpKind::Rope { .. }
            | OpKind::Attention(_)
            | OpKind::AttentionGrad(_)
            | OpKind::Pick { .. }
            | OpKind::CrossEntropyGrad { .. }
            | OpKind::Transpose { .. }
            | OpKind::Rename { .. }
            | OpKind::Split { .. }
            | OpKind::Merge { .. }
            | OpKind::Slice { .. }
            | OpKind::TopK { .. }
            | OpKind::TopKGrad { .. }
            | OpKind::MoeSlots { .. }
            | OpKind::MoePlaces(_)
            | OpKind::MoeDispatch(_)
            | OpKind::MoeCombine(_)
            | OpKind::MoeGateGrad(_)
            | OpKind::MoeCounts(_)
            | OpKind::MoeMove(_)
            | OpKind::Adamw { .. }
            | OpKind::Sgd { .. }
            | OpKind::AllGather { .. }
            | OpKind::AllReduce { .. }
            | OpKind::ReduceScatter { .. }
            | OpKind::AllToAll { .. }
            | OpKind::CollectivePermute { .. }
            | OpKind::Broadcast { .. },
            _,
        ) => Err(ReferenceError::Internal(format!(
            "{} passed its shape rule with {} inputs",
            kind.name(),
            inputs.len()
        ))),
    }
}

fn exact<const N: usize>(types: &[TensorType]) -> Result<[TensorType; N]> {
    <[TensorType; N]>::try_from(types.to_vec())
        .map_err(|types| ReferenceError::Internal(format!("an op has {} results", types.len())))
}

/// The element that a reduction leaves unchanged.
fn neutral(kind: ReduceKind) -> f64 {
    match kind {
        ReduceKind::Sum => 0.0,
        ReduceKind::Max | ReduceKind::Lse => f64::NEG_INFINITY,
    }
}
