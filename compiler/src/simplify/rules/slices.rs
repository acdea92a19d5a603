//! Rules of slices and concatenations.

use egg::Id;

use meshweave_dsl::name::Dim;
use meshweave_dsl::op::OpKind;

use super::super::egraph::View;
use super::super::joint::Term;

/// A term for `[start, start + len)` of a tensor, which is the tensor when that is all of it.
fn part(view: View<'_>, x: Id, dim: &Dim, start: usize, len: usize) -> Term {
    if start == 0 && view.ty(x).size_of(dim) == Some(len) {
        return Term::Class(x);
    }
    let dim = dim.clone();
    Term::op(OpKind::Slice { dim, start, len }, [x.into()])
}

pub(super) fn compose(view: View<'_>) -> Vec<Term> {
    let (OpKind::Slice { dim, start, len }, [x]) = (view.kind(), view.inputs()) else {
        return Vec::new();
    };
    let mut terms = Vec::new();
    if *start == 0 && view.ty(*x).size_of(dim) == Some(*len) {
        terms.push(Term::Class(*x));
    }
    for inner in view.ops(*x) {
        match inner.kind() {
            OpKind::Slice {
                dim: other,
                start: first,
                ..
            } if other == dim => {
                terms.push(part(view, inner.inputs()[0], dim, first + start, *len));
            }
            OpKind::Concat { dim: other } if other == dim => {
                let mut begin = 0;
                for input in inner.inputs() {
                    let size = view.ty(*input).size_of(dim).unwrap_or(0);
                    if begin <= *start && start + len <= begin + size {
                        terms.push(part(view, *input, dim, start - begin, *len));
                        break;
                    }
                    begin += size;
                }
            }
            OpKind::Concat { dim: other } => {
                let parts = inner
                    .inputs()
                    .iter()
                    .map(|input| part(view, *input, dim, *start, *len));
                let dim = other.clone();
                terms.push(Term::op(OpKind::Concat { dim }, parts));
            }
            _ => {}
        }
    }
    terms
}

pub(super) fn join(view: View<'_>) -> Vec<Term> {
    let OpKind::Concat { dim } = view.kind() else {
        return Vec::new();
    };
    if let [x] = view.inputs() {
        return vec![Term::Class(*x)];
    }
    let Some(first) = view.inputs().first() else {
        return Vec::new();
    };
    let mut terms = Vec::new();
    for slice in view.ops(*first) {
        let OpKind::Slice {
            dim: other,
            start,
            len,
        } = slice.kind()
        else {
            continue;
        };
        if other != dim {
            continue;
        }
        let x = slice.inputs()[0];
        let mut end = start + len;
        let follows = view.inputs()[1..].iter().all(|input| {
            let next = view.ops(*input).find_map(|op| match op.kind() {
                OpKind::Slice {
                    dim: other,
                    start,
                    len,
                } if other == dim && *start == end && op.inputs()[0] == x => Some(start + len),
                _ => None,
            });
            end = next.unwrap_or(end);
            next.is_some()
        });
        if follows {
            terms.push(part(view, x, dim, *start, end - start));
        }
    }
    terms
}

pub(super) fn sink(view: View<'_>) -> Vec<Term> {
    let (OpKind::Slice { dim, start, len }, [x]) = (view.kind(), view.inputs()) else {
        return Vec::new();
    };
    let of = |id: Id| {
        if view.ty(id).has(dim) {
            part(view, id, dim, *start, *len)
        } else {
            Term::Class(id)
        }
    };
    let mut terms = Vec::new();
    for inner in view.ops(*x) {
        let kind = match inner.kind() {
            OpKind::Unary(_) | OpKind::Binary(_) | OpKind::Contract { .. } => inner.kind().clone(),
            OpKind::Transpose { .. } => inner.kind().clone(),
            OpKind::Expand { dims } => {
                let mut dims = dims.clone();
                for (name, size) in &mut dims {
                    if name == dim {
                        *size = *len;
                    }
                }
                OpKind::Expand { dims }
            }
            _ => continue,
        };
        terms.push(Term::op(kind, inner.inputs().iter().map(|id| of(*id))));
    }
    terms
}
