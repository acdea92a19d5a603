//! Collectives, from the values of all members of the group.
//!
//! Invariant: reductions combine the members in the order of the group, so all get the same bits.

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::layout::{Interval, ReduceKind};
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{OpKind, Shares};

use super::op::{concat, evaluate_op, reduce_pair};
use super::{ReferenceError, Result, Value};

/// What the member of this position in the group receives; `inputs` are in the group's order, and
/// `routes` what its op reads besides.
///
/// # Errors
/// The counts do not fit the inputs, or a permutation's partners disagree.
pub(super) fn exchange(
    kind: &OpKind,
    member_idx: usize,
    inputs: &[&Value],
    routes: &[&Value],
) -> Result<Value> {
    match kind {
        OpKind::MoeMove(moved) => {
            let Some(Shares { counts, .. }) = moved.over.as_deref() else {
                return Err(ReferenceError::Internal("a move that stays".into()));
            };
            let expert = &moved.dims.expert;
            check_counts(expert, counts, inputs)?;
            let rows = concat(expert, inputs)?;
            let inputs: Vec<&Value> = std::iter::once(&rows)
                .chain(routes.iter().copied())
                .collect();
            let whole = evaluate_op(&OpKind::MoeMove(moved.whole()), &inputs)?;
            let whole = whole.first();
            let whole =
                whole.ok_or_else(|| ReferenceError::Internal("a move to nowhere".into()))?;
            piece(whole, expert, counts, member_idx)
        }
        OpKind::AllGather { dim, counts, .. } => {
            check_counts(dim, counts, inputs)?;
            concat(dim, inputs)
        }
        OpKind::AllReduce { kind, .. } => reduce_all(*kind, inputs),
        OpKind::ReduceScatter {
            kind, dim, counts, ..
        } => piece(&reduce_all(*kind, inputs)?, dim, counts, member_idx),
        OpKind::AllToAll {
            split,
            split_counts,
            concat: along,
            concat_counts,
            ..
        } => {
            check_counts(along, concat_counts, inputs)?;
            let pieces = inputs
                .iter()
                .map(|input| piece(input, split, split_counts, member_idx))
                .collect::<Result<Vec<_>>>()?;
            concat(along, &pieces.iter().collect::<Vec<_>>())
        }
        OpKind::CollectivePermute { from, group, .. } => {
            let source = group.ranks.iter().position(|rank| rank == from);
            source
                .and_then(|source| inputs.get(source))
                .map(|input| (*input).clone())
                .ok_or_else(|| {
                    ReferenceError::Invalid(format!(
                        "receives from rank {from}, which is not in the group {:?}",
                        group.ranks
                    ))
                })
        }
        OpKind::Broadcast { .. } => inputs
            .first()
            .map(|input| (*input).clone())
            .ok_or_else(|| ReferenceError::Internal("a group has no ranks".into())),
        other => Err(ReferenceError::Internal(format!(
            "{} is not a collective",
            other.name()
        ))),
    }
}

fn reduce_all(kind: ReduceKind, inputs: &[&Value]) -> Result<Value> {
    let Some((first, others)) = inputs.split_first() else {
        return Err(ReferenceError::Internal("a group has no ranks".into()));
    };
    let mut total = (*first).clone();
    for other in others {
        if other.ty() != first.ty() {
            return Err(ReferenceError::Invalid(format!(
                "reduces {} with {}",
                first.ty(),
                other.ty()
            )));
        }
        for (sum, element) in total.data_mut().iter_mut().zip(other.data()) {
            *sum = reduce_pair(kind, *sum, *element);
        }
    }
    Ok(total)
}

/// The `idx`-th of the pieces that `counts` cut `dim` into.
fn piece(value: &Value, dim: &Dim, counts: &[usize], idx: usize) -> Result<Value> {
    let total: usize = counts.iter().sum();
    let (Some(position), Some(len)) = (value.ty().position(dim), counts.get(idx)) else {
        return Err(ReferenceError::Invalid(format!(
            "{} cannot be cut along `{dim}` into {counts:?}",
            value.ty()
        )));
    };
    if value.ty().shape[position].1 != total {
        return Err(ReferenceError::Invalid(format!(
            "the counts {counts:?} add up to {total}, {} has another `{dim}`",
            value.ty()
        )));
    }
    let mut region = whole(value.ty());
    region[position] = Interval {
        start: counts[..idx].iter().sum(),
        len: *len,
    };
    value.part(&region)
}

fn whole(ty: &TensorType) -> Vec<Interval> {
    ty.shape
        .iter()
        .map(|(_, size)| Interval {
            start: 0,
            len: *size,
        })
        .collect()
}

fn check_counts(dim: &Dim, counts: &[usize], inputs: &[&Value]) -> Result<()> {
    let sizes: Vec<usize> = inputs
        .iter()
        .map(|input| input.ty().size_of(dim).unwrap_or(0))
        .collect();
    if sizes == counts {
        Ok(())
    } else {
        Err(ReferenceError::Invalid(format!(
            "the members have {sizes:?} elements of `{dim}`, the counts say {counts:?}"
        )))
    }
}
