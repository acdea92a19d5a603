//! Rules of the ops that move no values: transpose, rename, split, merge.

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::OpKind;

use super::super::egraph::View;
use super::super::joint::Term;

pub(super) fn is_relabel(kind: &OpKind) -> bool {
    matches!(
        kind,
        OpKind::Transpose { .. }
            | OpKind::Rename { .. }
            | OpKind::Split { .. }
            | OpKind::Merge { .. }
    )
}

/// The dims that a relabeling makes; empty for a transpose.
fn made_dims(kind: &OpKind) -> Vec<&Dim> {
    match kind {
        OpKind::Rename { to, .. } => vec![to],
        OpKind::Split { into, .. } => into.iter().map(|(dim, _)| dim).collect(),
        OpKind::Merge { into, .. } => vec![into],
        _ => Vec::new(),
    }
}

/// Whether the dims of `narrow` stand in the order in which `wide` has them.
pub(super) fn in_order(narrow: &TensorType, wide: &TensorType) -> bool {
    let positions: Option<Vec<usize>> = narrow.dims().map(|dim| wide.position(dim)).collect();
    positions.is_some_and(|positions| positions.is_sorted())
}

pub(super) fn compose(view: View<'_>) -> Vec<Term> {
    let [x] = view.inputs() else {
        return Vec::new();
    };
    let mut terms = Vec::new();
    match view.kind() {
        OpKind::Transpose { dims } => {
            if view.ty(*x).dims().eq(dims) {
                terms.push(Term::Class(*x));
            }
            for inner in view.ops(*x) {
                if let OpKind::Transpose { .. } = inner.kind() {
                    terms.push(Term::op(
                        view.kind().clone(),
                        [Term::Class(inner.inputs()[0])],
                    ));
                }
            }
        }
        OpKind::Rename { from, to } => {
            if from == to {
                terms.push(Term::Class(*x));
            }
            for inner in view.ops(*x) {
                if let OpKind::Rename {
                    from: first,
                    to: second,
                } = inner.kind()
                    && second == from
                {
                    let y = Term::Class(inner.inputs()[0]);
                    terms.push(if first == to {
                        y
                    } else {
                        let from = first.clone();
                        let to = to.clone();
                        Term::op(OpKind::Rename { from, to }, [y])
                    });
                }
            }
        }
        OpKind::Split { dim, into } => {
            for inner in view.ops(*x) {
                if let OpKind::Merge { dims, into: merged } = inner.kind()
                    && merged == dim
                    && dims
                        .iter()
                        .map(|dim| (dim, view.ty(inner.inputs()[0]).size_of(dim)))
                        .eq(into.iter().map(|(dim, size)| (dim, Some(*size))))
                {
                    terms.push(Term::Class(inner.inputs()[0]));
                }
            }
        }
        OpKind::Merge { dims, into } => {
            for inner in view.ops(*x) {
                if let OpKind::Split { dim, into: parts } = inner.kind()
                    && parts.iter().map(|(dim, _)| dim).eq(dims)
                {
                    let y = Term::Class(inner.inputs()[0]);
                    terms.push(if dim == into {
                        y
                    } else {
                        let from = dim.clone();
                        let to = into.clone();
                        Term::op(OpKind::Rename { from, to }, [y])
                    });
                }
            }
        }
        _ => {}
    }
    terms
}

pub(super) fn lift(view: View<'_>) -> Vec<Term> {
    let kind = view.kind().clone();
    let relabeled = |id| view.ops(id).filter(|op| is_relabel(op.kind()));
    match (view.kind(), view.inputs()) {
        (OpKind::Unary(_), [x]) => relabeled(*x)
            .map(|inner| {
                let y = Term::op(kind.clone(), [inner.inputs()[0].into()]);
                Term::op(inner.kind().clone(), [y])
            })
            .collect(),
        (OpKind::Binary(_), [a, b]) => {
            let mut terms = Vec::new();
            for left in relabeled(*a) {
                for right in relabeled(*b) {
                    let (x, y) = (left.inputs()[0], right.inputs()[0]);
                    if left.kind() == right.kind() && view.ty(x).shape == view.ty(y).shape {
                        let inner = Term::op(kind.clone(), [x.into(), y.into()]);
                        terms.push(Term::op(left.kind().clone(), [inner]));
                    }
                }
                let x = left.inputs()[0];
                if may_pass(view, left.kind(), x, *b) {
                    let inner = Term::op(kind.clone(), [x.into(), (*b).into()]);
                    terms.push(Term::op(left.kind().clone(), [inner]));
                }
            }
            for right in relabeled(*b) {
                let y = right.inputs()[0];
                if may_pass(view, right.kind(), y, *a) {
                    let inner = Term::op(kind.clone(), [(*a).into(), y.into()]);
                    terms.push(Term::op(right.kind().clone(), [inner]));
                }
            }
            terms
        }
        _ => Vec::new(),
    }
}

/// Whether the narrow operand means the same to `wide` as to its relabeling.
fn may_pass(view: View<'_>, relabel: &OpKind, wide: egg::Id, narrow: egg::Id) -> bool {
    let (wide, narrow) = (view.ty(wide), view.ty(narrow));
    narrow.shape.len() < wide.shape.len()
        && in_order(narrow, wide)
        && made_dims(relabel).iter().all(|dim| !narrow.has(dim))
}

pub(super) fn reduce(view: View<'_>) -> Vec<Term> {
    let (OpKind::Reduce { kind, dims }, [x]) = (view.kind(), view.inputs()) else {
        return Vec::new();
    };
    let mut terms = Vec::new();
    for inner in view.ops(*x) {
        let y = inner.inputs().first().copied();
        match inner.kind() {
            OpKind::Transpose { dims: order } => {
                let rest: Vec<Dim> = order
                    .iter()
                    .filter(|dim| !dims.contains(dim))
                    .cloned()
                    .collect();
                let reduced = Term::op(view.kind().clone(), y.map(Term::Class));
                terms.push(Term::op(
                    OpKind::Transpose { dims: rest },
                    [reduced.clone()],
                ));
                terms.push(reduced);
            }
            OpKind::Rename { from, to } => {
                let dims: Vec<Dim> = dims
                    .iter()
                    .map(|dim| if dim == to { from } else { dim })
                    .cloned()
                    .collect();
                let is_reduced = dims.contains(from);
                let reduced = Term::op(OpKind::Reduce { kind: *kind, dims }, y.map(Term::Class));
                terms.push(if is_reduced {
                    reduced
                } else {
                    Term::op(inner.kind().clone(), [reduced])
                });
            }
            OpKind::Split { dim, into } => {
                let n_reduced = into.iter().filter(|(dim, _)| dims.contains(dim)).count();
                if n_reduced == into.len() {
                    let mut dims: Vec<Dim> = dims
                        .iter()
                        .filter(|name| !into.iter().any(|(dim, _)| dim == *name))
                        .cloned()
                        .collect();
                    dims.push(dim.clone());
                    terms.push(Term::op(
                        OpKind::Reduce { kind: *kind, dims },
                        y.map(Term::Class),
                    ));
                } else if n_reduced == 0 {
                    let reduced = Term::op(view.kind().clone(), y.map(Term::Class));
                    terms.push(Term::op(inner.kind().clone(), [reduced]));
                }
            }
            OpKind::Merge { dims: merged, into } => {
                if dims.contains(into) {
                    let mut dims: Vec<Dim> =
                        dims.iter().filter(|dim| *dim != into).cloned().collect();
                    dims.extend(merged.iter().cloned());
                    terms.push(Term::op(
                        OpKind::Reduce { kind: *kind, dims },
                        y.map(Term::Class),
                    ));
                } else {
                    let reduced = Term::op(view.kind().clone(), y.map(Term::Class));
                    terms.push(Term::op(inner.kind().clone(), [reduced]));
                }
            }
            _ => {}
        }
    }
    terms
}

pub(super) fn contract(view: View<'_>) -> Vec<Term> {
    let mut terms = Vec::new();
    match (view.kind(), view.inputs()) {
        (OpKind::Contract { .. }, [a, b]) => {
            let transposed = |id| {
                view.ops(id)
                    .filter(|op| matches!(op.kind(), OpKind::Transpose { .. }))
                    .map(|op| op.inputs()[0])
            };
            terms.extend(
                transposed(*a).map(|x| Term::op(view.kind().clone(), [x.into(), (*b).into()])),
            );
            terms.extend(
                transposed(*b).map(|y| Term::op(view.kind().clone(), [(*a).into(), y.into()])),
            );
        }
        (OpKind::Transpose { dims }, [x]) => {
            for inner in view.ops(*x) {
                if let OpKind::Contract { .. } = inner.kind() {
                    terms.push(Term::op(
                        OpKind::Contract { out: dims.clone() },
                        inner.inputs().iter().copied().map(Term::Class),
                    ));
                }
            }
        }
        _ => {}
    }
    terms
}
