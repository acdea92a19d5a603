//! Rules of collectives, in local graphs.
//!
//! A rule that depends on what *other* members of a group do looks at their views of the same op.

use std::collections::BTreeSet;

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::name::{Axis, Dim};
use meshweave_dsl::op::{BinaryFn, Group, OpKind, UnaryFn};

use super::super::egraph::View;
use super::super::joint::Term;
use super::relabel::is_relabel;

fn resized(ty: &TensorType, dim: &Dim, size: usize) -> TensorType {
    let mut ty = ty.clone();
    for (name, old) in &mut ty.shape {
        if name == dim {
            *old = size;
        }
    }
    ty
}

/// The chunks of `dim` that the members of `group` slice off with this op, when they tile the dim
/// in the order of the members.
fn chunks(slice: View<'_>, group: &Group, size: usize) -> Option<Vec<usize>> {
    let mut next = 0;
    let mut counts = Vec::with_capacity(group.ranks.len());
    for member in &group.ranks {
        if *member >= slice.n_ranks() {
            return None;
        }
        let OpKind::Slice { start, len, .. } = slice.at(*member).kind() else {
            return None;
        };
        if *start != next {
            return None;
        }
        next += len;
        counts.push(*len);
    }
    (next == size).then_some(counts)
}

pub(super) fn scatter_reduction(view: View<'_>) -> Vec<Term> {
    let (OpKind::Slice { dim, len, .. }, [x]) = (view.kind(), view.inputs()) else {
        return Vec::new();
    };
    let size = view.ty(*x).size_of(dim).unwrap_or(0);
    view.ops(*x)
        .filter_map(|inner| {
            let OpKind::AllReduce { kind, group } = inner.kind() else {
                return None;
            };
            let counts = chunks(view, group, size)?;
            let op = OpKind::ReduceScatter {
                kind: *kind,
                dim: dim.clone(),
                counts,
                group: group.clone(),
            };
            let ty = resized(view.ty(*x), dim, *len);
            Some(Term::typed(op, inner.inputs()[0].into(), ty))
        })
        .collect()
}

pub(super) fn keep_shard(view: View<'_>) -> Vec<Term> {
    let (OpKind::Slice { dim, start, len }, [x]) = (view.kind(), view.inputs()) else {
        return Vec::new();
    };
    view.ops(*x)
        .filter_map(|inner| {
            let OpKind::AllGather {
                dim: other,
                counts,
                group,
            } = inner.kind()
            else {
                return None;
            };
            let position = group.ranks.iter().position(|rank| *rank == view.rank())?;
            let begin: usize = counts.iter().take(position).sum();
            let own = *counts.get(position)?;
            (other == dim && begin == *start && own == *len).then(|| Term::Class(inner.inputs()[0]))
        })
        .collect()
}

/// Whether a sum of reduced values is the reduction of the sums.
fn distributes(function: BinaryFn, kind: ReduceKind) -> bool {
    match kind {
        ReduceKind::Sum => matches!(function, BinaryFn::Add | BinaryFn::Sub),
        ReduceKind::Max => function == BinaryFn::Max,
        ReduceKind::Lse => false,
    }
}

pub(super) fn merge_reductions(view: View<'_>) -> Vec<Term> {
    let (OpKind::Binary(function), [a, b]) = (view.kind(), view.inputs()) else {
        return Vec::new();
    };
    let mut terms = Vec::new();
    for left in view.ops(*a) {
        let kind = match left.kind() {
            OpKind::AllReduce { kind, .. } | OpKind::ReduceScatter { kind, .. } => *kind,
            _ => continue,
        };
        for right in view.ops(*b) {
            let (x, y) = (left.inputs()[0], right.inputs().first().copied());
            let Some(y) = y else { continue };
            let fits = left.kind() == right.kind()
                && distributes(*function, kind)
                && view.ty(x).shape == view.ty(y).shape;
            if !fits {
                continue;
            }
            let inner = Term::op(view.kind().clone(), [x.into(), y.into()]);
            terms.push(match left.kind() {
                OpKind::ReduceScatter { .. } => {
                    Term::typed(left.kind().clone(), inner, view.ty(*a).clone())
                }
                _ => Term::op(left.kind().clone(), [inner]),
            });
        }
    }
    terms
}

/// The groups of `outer`'s members in `inner`, one after the other, when they are disjoint and all
/// members of the union see the same list.
fn joined(outer: View<'_>, inner: View<'_>, of: fn(&OpKind) -> Option<&Group>) -> Option<Group> {
    let members_of = |rank: usize| {
        let first = of(outer.at(rank).kind())?;
        let mut ranks = Vec::new();
        for member in &first.ranks {
            if *member >= outer.n_ranks() {
                return None;
            }
            ranks.extend(of(inner.at(*member).kind())?.ranks.iter().copied());
        }
        Some(ranks)
    };
    let ranks = members_of(outer.rank())?;
    let distinct: BTreeSet<usize> = ranks.iter().copied().collect();
    let agree = ranks
        .iter()
        .all(|rank| *rank < outer.n_ranks() && members_of(*rank).as_ref() == Some(&ranks));
    if distinct.len() != ranks.len() || !agree {
        return None;
    }
    let mut axes: Vec<Axis> = of(outer.kind())?.axes.clone();
    axes.extend(of(inner.kind())?.axes.iter().cloned());
    Some(Group { axes, ranks })
}

pub(super) fn join_groups(view: View<'_>) -> Vec<Term> {
    let [x] = view.inputs() else {
        return Vec::new();
    };
    let mut terms = Vec::new();
    for inner in view.ops(*x) {
        match (view.kind(), inner.kind()) {
            (OpKind::AllReduce { kind, .. }, OpKind::AllReduce { kind: other, .. })
                if kind == other =>
            {
                if let Some(group) = joined(view, inner, OpKind::group) {
                    let kind = *kind;
                    let op = OpKind::AllReduce { kind, group };
                    terms.push(Term::op(op, [inner.inputs()[0].into()]));
                }
            }
            (OpKind::AllGather { dim, group, .. }, OpKind::AllGather { dim: other, .. })
                if dim == other =>
            {
                let mut counts = Vec::new();
                for member in &group.ranks {
                    if *member < view.n_ranks()
                        && let OpKind::AllGather { counts: chunk, .. } = inner.at(*member).kind()
                    {
                        counts.extend(chunk.iter().copied());
                    }
                }
                if let Some(group) = joined(view, inner, OpKind::group)
                    && counts.len() == group.ranks.len()
                {
                    let dim = dim.clone();
                    let op = OpKind::AllGather { dim, counts, group };
                    terms.push(Term::op(op, [inner.inputs()[0].into()]));
                }
            }
            _ => {}
        }
    }
    terms
}

pub(super) fn gather_scattered(view: View<'_>) -> Vec<Term> {
    let (OpKind::AllGather { dim, counts, group }, [x]) = (view.kind(), view.inputs()) else {
        return Vec::new();
    };
    view.ops(*x)
        .filter_map(|inner| match inner.kind() {
            OpKind::ReduceScatter {
                kind,
                dim: other,
                counts: chunks,
                group: members,
            } if other == dim && chunks == counts && members == group => {
                let group = group.clone();
                let op = OpKind::AllReduce { kind: *kind, group };
                Some(Term::op(op, [inner.inputs()[0].into()]))
            }
            _ => None,
        })
        .collect()
}

pub(super) fn lift_reductions(view: View<'_>) -> Vec<Term> {
    let [x] = view.inputs() else {
        return Vec::new();
    };
    let is_linear = match view.kind() {
        OpKind::Unary(function) => matches!(function, UnaryFn::Neg | UnaryFn::Scale(_)),
        OpKind::Reduce { kind, .. } => *kind == ReduceKind::Sum,
        OpKind::Expand { .. } => false,
        kind => is_relabel(kind),
    };
    if !is_linear {
        return Vec::new();
    }
    view.ops(*x)
        .filter_map(|inner| match inner.kind() {
            OpKind::AllReduce {
                kind: ReduceKind::Sum,
                ..
            } => {
                let y = Term::op(view.kind().clone(), [inner.inputs()[0].into()]);
                Some(Term::op(inner.kind().clone(), [y]))
            }
            _ => None,
        })
        .collect()
}

pub(super) fn lift_gathers(view: View<'_>) -> Vec<Term> {
    let gathers = |id| {
        view.ops(id)
            .filter(|op| matches!(op.kind(), OpKind::AllGather { .. }))
    };
    match (view.kind(), view.inputs()) {
        (OpKind::Unary(_), [x]) => gathers(*x)
            .map(|inner| {
                let y = Term::op(view.kind().clone(), [inner.inputs()[0].into()]);
                Term::op(inner.kind().clone(), [y])
            })
            .collect(),
        (OpKind::Binary(_), [a, b]) => {
            let mut terms = Vec::new();
            for left in gathers(*a) {
                for right in gathers(*b) {
                    let (x, y) = (left.inputs()[0], right.inputs()[0]);
                    if left.kind() == right.kind() && view.ty(x).shape == view.ty(y).shape {
                        let inner = Term::op(view.kind().clone(), [x.into(), y.into()]);
                        terms.push(Term::op(left.kind().clone(), [inner]));
                    }
                }
            }
            terms
        }
        (OpKind::Transpose { .. }, [x]) => gathers(*x)
            .map(|inner| {
                let y = Term::op(view.kind().clone(), [inner.inputs()[0].into()]);
                Term::op(inner.kind().clone(), [y])
            })
            .collect(),
        (OpKind::Rename { from, to }, [x]) => gathers(*x)
            .filter_map(|inner| {
                let OpKind::AllGather { dim, counts, group } = inner.kind() else {
                    return None;
                };
                let dim = if dim == from { to } else { dim }.clone();
                let (counts, group) = (counts.clone(), group.clone());
                let y = Term::op(view.kind().clone(), [inner.inputs()[0].into()]);
                Some(Term::op(OpKind::AllGather { dim, counts, group }, [y]))
            })
            .collect(),
        _ => Vec::new(),
    }
}

pub(super) fn reduce_gathered(view: View<'_>) -> Vec<Term> {
    let (OpKind::Reduce { kind, dims }, [x]) = (view.kind(), view.inputs()) else {
        return Vec::new();
    };
    view.ops(*x)
        .filter_map(|inner| {
            let OpKind::AllGather { dim, group, .. } = inner.kind() else {
                return None;
            };
            if !dims.contains(dim) {
                return None;
            }
            let y = Term::op(view.kind().clone(), [inner.inputs()[0].into()]);
            let (kind, group) = (*kind, group.clone());
            Some(Term::op(OpKind::AllReduce { kind, group }, [y]))
        })
        .collect()
}

pub(super) fn undo_exchange(view: View<'_>) -> Vec<Term> {
    let (
        OpKind::AllToAll {
            split,
            split_counts,
            concat,
            concat_counts,
            group,
        },
        [x],
    ) = (view.kind(), view.inputs())
    else {
        return Vec::new();
    };
    view.ops(*x)
        .filter_map(|inner| match inner.kind() {
            OpKind::AllToAll {
                split: first_split,
                split_counts: first_split_counts,
                concat: first_concat,
                concat_counts: first_concat_counts,
                group: first_group,
            } if first_split == concat
                && first_concat == split
                && first_split_counts == concat_counts
                && first_concat_counts == split_counts
                && first_group == group =>
            {
                Some(Term::Class(inner.inputs()[0]))
            }
            _ => None,
        })
        .collect()
}
