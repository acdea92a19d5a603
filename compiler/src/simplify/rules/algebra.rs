//! Rules of elementwise ops, broadcasts and reductions.

use egg::Id;

use meshweave_dsl::dtype::Scalar;
use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{BinaryFn, OpKind, UnaryFn};

use super::super::egraph::View;
use super::super::joint::Term;
use super::relabel::in_order;

fn unary(function: UnaryFn, x: impl Into<Term>) -> Term {
    Term::op(OpKind::Unary(function), [x.into()])
}

fn scaled(factor: f64, x: impl Into<Term>) -> Term {
    if factor == 1.0 {
        x.into()
    } else {
        unary(UnaryFn::Scale(Scalar(factor)), x)
    }
}

pub(super) fn binary(function: BinaryFn, a: impl Into<Term>, b: impl Into<Term>) -> Term {
    Term::op(OpKind::Binary(function), [a.into(), b.into()])
}

/// Operands of the unary ops of this class that `pick` accepts.
fn unary_of<'a, T: 'a>(
    view: View<'a>,
    id: Id,
    pick: impl Fn(UnaryFn) -> Option<T> + 'a,
) -> impl Iterator<Item = (T, Id)> + 'a {
    view.ops(id).filter_map(move |op| match op.kind() {
        OpKind::Unary(function) => Some((pick(*function)?, op.inputs()[0])),
        _ => None,
    })
}

fn scales_of(view: View<'_>, id: Id) -> impl Iterator<Item = (f64, Id)> + '_ {
    unary_of(view, id, |function| match function {
        UnaryFn::Scale(factor) => Some(factor.0),
        UnaryFn::Neg => Some(-1.0),
        _ => None,
    })
}

fn negs_of(view: View<'_>, id: Id) -> impl Iterator<Item = Id> + '_ {
    unary_of(view, id, |function| {
        (function == UnaryFn::Neg).then_some(())
    })
    .map(|((), x)| x)
}

pub(super) fn fold_scalars(view: View<'_>) -> Vec<Term> {
    let (OpKind::Unary(function), [x]) = (view.kind(), view.inputs()) else {
        return Vec::new();
    };
    match function {
        UnaryFn::Scale(Scalar(1.0)) | UnaryFn::Shift(Scalar(0.0)) => vec![Term::Class(*x)],
        UnaryFn::Scale(factor) => scales_of(view, *x)
            .map(|(inner, y)| scaled(factor.0 * inner, y))
            .collect(),
        UnaryFn::Neg => scales_of(view, *x)
            .map(|(inner, y)| scaled(-inner, y))
            .collect(),
        UnaryFn::Shift(by) => unary_of(view, *x, |function| match function {
            UnaryFn::Shift(inner) => Some(inner.0),
            _ => None,
        })
        .map(|(inner, y)| {
            let sum = by.0 + inner;
            if sum == 0.0 {
                Term::Class(y)
            } else {
                unary(UnaryFn::Shift(Scalar(sum)), y)
            }
        })
        .collect(),
        _ => Vec::new(),
    }
}

pub(super) fn fold_constants(view: View<'_>) -> Vec<Term> {
    let (OpKind::Binary(function), [a, b]) = (view.kind(), view.inputs()) else {
        return Vec::new();
    };
    let mut terms = Vec::new();
    let mut fold = |x: Id, number: Scalar, is_second: bool| {
        let c = number.0;
        terms.extend(match function {
            BinaryFn::Mul => Some(scaled(c, x)),
            BinaryFn::Add if c == 0.0 => Some(Term::Class(x)),
            BinaryFn::Add => Some(unary(UnaryFn::Shift(number), x)),
            BinaryFn::Sub if is_second && c == 0.0 => Some(Term::Class(x)),
            BinaryFn::Sub if is_second => Some(unary(UnaryFn::Shift(Scalar(-c)), x)),
            BinaryFn::Div if is_second && c == 1.0 => Some(Term::Class(x)),
            _ => None,
        });
    };
    if let Some(number) = view.fill(*b) {
        fold(*a, number, true);
    }
    if let Some(number) = view.fill(*a) {
        fold(*b, number, false);
    }
    terms
}

pub(super) fn signs(view: View<'_>) -> Vec<Term> {
    let (OpKind::Binary(function), [a, b]) = (view.kind(), view.inputs()) else {
        return Vec::new();
    };
    match function {
        BinaryFn::Add => negs_of(view, *b)
            .map(|y| binary(BinaryFn::Sub, *a, y))
            .chain(negs_of(view, *a).map(|x| binary(BinaryFn::Sub, *b, x)))
            .collect(),
        BinaryFn::Sub => negs_of(view, *b)
            .map(|y| binary(BinaryFn::Add, *a, y))
            .collect(),
        BinaryFn::Mul => negs_of(view, *a)
            .flat_map(|x| negs_of(view, *b).map(move |y| binary(BinaryFn::Mul, x, y)))
            .collect(),
        _ => Vec::new(),
    }
}

pub(super) fn lift_scale(view: View<'_>) -> Vec<Term> {
    let mut terms = Vec::new();
    let kind = view.kind();
    match (kind, view.inputs()) {
        (OpKind::Contract { .. } | OpKind::Binary(BinaryFn::Mul), [a, b]) => {
            for (factor, x) in scales_of(view, *a) {
                terms.push(scaled(
                    factor,
                    Term::op(kind.clone(), [x.into(), (*b).into()]),
                ));
            }
            for (factor, y) in scales_of(view, *b) {
                terms.push(scaled(
                    factor,
                    Term::op(kind.clone(), [(*a).into(), y.into()]),
                ));
            }
        }
        (OpKind::Binary(BinaryFn::Div), [a, b]) => {
            for (factor, x) in scales_of(view, *a) {
                terms.push(scaled(
                    factor,
                    Term::op(kind.clone(), [x.into(), (*b).into()]),
                ));
            }
        }
        (OpKind::Binary(BinaryFn::Add | BinaryFn::Sub), [a, b]) => {
            for (factor, x) in scales_of(view, *a) {
                for (other, y) in scales_of(view, *b) {
                    if factor == other {
                        let inner = Term::op(kind.clone(), [x.into(), y.into()]);
                        terms.push(scaled(factor, inner));
                    }
                }
            }
        }
        (
            OpKind::Reduce {
                kind: ReduceKind::Sum,
                ..
            },
            [x],
        ) => {
            for (factor, y) in scales_of(view, *x) {
                terms.push(scaled(factor, Term::op(kind.clone(), [y.into()])));
            }
        }
        // The other way, into the smaller operand only, so that it costs less.
        (OpKind::Unary(UnaryFn::Scale(factor)), [x]) => {
            let size = view.ty(*x).n_elements();
            for inner in view.ops(*x) {
                let (OpKind::Contract { .. } | OpKind::Binary(BinaryFn::Mul), [a, b]) =
                    (inner.kind(), inner.inputs())
                else {
                    continue;
                };
                if view.ty(*a).n_elements() < size {
                    let a = unary(UnaryFn::Scale(*factor), *a);
                    terms.push(Term::op(inner.kind().clone(), [a, (*b).into()]));
                }
                if view.ty(*b).n_elements() < size {
                    let b = unary(UnaryFn::Scale(*factor), *b);
                    terms.push(Term::op(inner.kind().clone(), [(*a).into(), b]));
                }
            }
        }
        _ => {}
    }
    terms
}

fn expands_of<'a>(view: View<'a>, id: Id) -> impl Iterator<Item = (&'a OpKind, Id)> + 'a {
    view.ops(id)
        .filter(|op| matches!(op.kind(), OpKind::Expand { .. }))
        .map(|op| (op.kind(), op.inputs()[0]))
}

pub(super) fn drop_expand(view: View<'_>) -> Vec<Term> {
    let kind = view.kind();
    let mut terms = Vec::new();
    match (kind, view.inputs()) {
        (OpKind::Binary(function), [a, b]) => {
            // Both operands have all dims; the one that stays decides the result's order.
            if view.ty(*a).shape == view.ty(*b).shape {
                for (_, x) in expands_of(view, *a) {
                    if in_order(view.ty(x), view.ty(*b)) {
                        terms.push(binary(*function, x, *b));
                    }
                }
                for (_, y) in expands_of(view, *b) {
                    if in_order(view.ty(y), view.ty(*a)) {
                        terms.push(binary(*function, *a, y));
                    }
                }
            }
            for (expand, x) in expands_of(view, *a) {
                for (other, y) in expands_of(view, *b) {
                    if expand == other && view.ty(x).shape == view.ty(y).shape {
                        terms.push(Term::op(expand.clone(), [binary(*function, x, y)]));
                    }
                }
            }
        }
        (OpKind::Unary(function), [x]) => {
            for (expand, y) in expands_of(view, *x) {
                terms.push(Term::op(expand.clone(), [unary(*function, y)]));
            }
        }
        (OpKind::Expand { dims }, [x]) => {
            if view.ty(*x).shape == *dims {
                terms.push(Term::Class(*x));
            }
            for (_, y) in expands_of(view, *x) {
                terms.push(Term::op(kind.clone(), [y.into()]));
            }
        }
        _ => {}
    }
    terms
}

pub(super) fn reduce_expand(view: View<'_>) -> Vec<Term> {
    let (OpKind::Reduce { kind, dims }, [x]) = (view.kind(), view.inputs()) else {
        return Vec::new();
    };
    if *kind == ReduceKind::Lse {
        return Vec::new();
    }
    let mut terms = Vec::new();
    for (_, y) in expands_of(view, *x) {
        let (wide, narrow) = (view.ty(*x), view.ty(y));
        let (kept, copied): (Vec<&Dim>, Vec<&Dim>) = dims.iter().partition(|dim| narrow.has(dim));
        if copied.is_empty() {
            continue;
        }
        let n_copies: usize = copied.iter().filter_map(|dim| wide.size_of(dim)).product();
        let mut term = Term::Class(y);
        if !kept.is_empty() {
            let dims = kept.into_iter().cloned().collect();
            term = Term::op(OpKind::Reduce { kind: *kind, dims }, [term]);
        }
        let left: Vec<(Dim, usize)> = wide
            .shape
            .iter()
            .filter(|(dim, _)| !dims.contains(dim))
            .cloned()
            .collect();
        let has_all = narrow
            .shape
            .iter()
            .filter(|(dim, _)| !dims.contains(dim))
            .eq(&left);
        if *kind == ReduceKind::Sum {
            term = scaled(n_copies as f64, term);
        }
        if !has_all {
            term = Term::op(OpKind::Expand { dims: left }, [term]);
        }
        terms.push(term);
    }
    terms
}

pub(super) fn compose_reduces(view: View<'_>) -> Vec<Term> {
    let (OpKind::Reduce { kind, dims }, [x]) = (view.kind(), view.inputs()) else {
        return Vec::new();
    };
    view.ops(*x)
        .filter_map(|inner| match inner.kind() {
            OpKind::Reduce {
                kind: other,
                dims: first,
            } if other == kind => {
                let mut all = first.clone();
                all.extend(dims.iter().cloned());
                let op = OpKind::Reduce {
                    kind: *kind,
                    dims: all,
                };
                Some(Term::op(op, [inner.inputs()[0].into()]))
            }
            _ => None,
        })
        .collect()
}
