//! Rules of contractions with a common operand.

use std::collections::BTreeMap;

use egg::Id;

use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{BinaryFn, OpKind};

use super::super::egraph::View;
use super::super::joint::{JointTerm, Term};
use super::algebra::binary;

/// Sums of products with a common factor, in the same place of both products.
pub(super) fn factor(view: View<'_>) -> Vec<Term> {
    let (OpKind::Binary(function @ (BinaryFn::Add | BinaryFn::Sub)), [a, b]) =
        (view.kind(), view.inputs())
    else {
        return Vec::new();
    };
    let mut terms = Vec::new();
    for left in view.ops(*a) {
        let is_product = matches!(
            left.kind(),
            OpKind::Contract { .. } | OpKind::Binary(BinaryFn::Mul)
        );
        if !is_product {
            continue;
        }
        for right in view.ops(*b) {
            let ([x, y], [z, w]) = (left.inputs(), right.inputs()) else {
                continue;
            };
            if left.kind() != right.kind() {
                continue;
            }
            let same = |p: Id, q: Id| view.ty(p).shape == view.ty(q).shape;
            if y == w && same(*x, *z) {
                let sum = binary(*function, *x, *z);
                terms.push(Term::op(left.kind().clone(), [sum, (*y).into()]));
            }
            if x == z && same(*y, *w) {
                let sum = binary(*function, *y, *w);
                terms.push(Term::op(left.kind().clone(), [(*x).into(), sum]));
            }
        }
    }
    terms
}

/// Contractions of one tensor with several weights: contract(x, w₁), contract(x, w₂), … =
/// slices of contract(x, concat(w₁, w₂, …)), where the weights differ in the size of one dim at
/// most and the results keep that dim. Each group is worth choosing as a whole only.
pub(in super::super) fn merge_projections(views: &[View<'_>]) -> Vec<Vec<(Id, JointTerm)>> {
    // (shared operand, whether it comes first, result dims, weight dims) → (class, weight).
    type Key = (Id, bool, Vec<Dim>, Vec<Dim>);
    let mut groups: BTreeMap<Key, Vec<(Id, Id, View<'_>)>> = BTreeMap::new();
    for view in views {
        let (OpKind::Contract { out }, [a, b]) = (view.kind(), view.inputs()) else {
            continue;
        };
        for (shared, weight, is_first) in [(*a, *b, true), (*b, *a, false)] {
            if shared == weight || !view.is_source(weight) || view.is_source(shared) {
                continue;
            }
            let dims = view.ty(weight).dims().cloned().collect();
            let members = groups
                .entry((shared, is_first, out.clone(), dims))
                .or_default();
            if !members.iter().any(|(class, ..)| *class == view.class()) {
                members.push((view.class(), weight, *view));
            }
        }
    }
    groups
        .into_iter()
        .filter(|(_, members)| members.len() > 1)
        .filter_map(|((shared, is_first, out, dims), members)| {
            let dim = stacking_dim(shared, &out, &dims, &members)?;
            Some(merged(shared, is_first, &out, &dim, &members))
        })
        .collect()
}

/// The dim to stack the weights along: kept in the result, not of x, and the only one whose size
/// differs between the weights, on every rank.
fn stacking_dim(
    shared: Id,
    out: &[Dim],
    dims: &[Dim],
    members: &[(Id, Id, View<'_>)],
) -> Option<Dim> {
    let (_, first, view) = members.first()?;
    let candidates = dims
        .iter()
        .filter(|dim| out.contains(dim) && !view.ty(shared).has(dim));
    let agree_but = |dim: &Dim| {
        (0..view.n_ranks()).all(|rank| {
            let view = view.at(rank);
            members.iter().all(|(_, weight, _)| {
                dims.iter().all(|other| {
                    other == dim
                        || view.ty(*weight).size_of(other) == view.ty(*first).size_of(other)
                })
            })
        })
    };
    let mut candidates = candidates.filter(|dim| agree_but(dim));
    candidates.next().cloned()
}

fn merged(
    shared: Id,
    is_first: bool,
    out: &[Dim],
    dim: &Dim,
    members: &[(Id, Id, View<'_>)],
) -> Vec<(Id, JointTerm)> {
    let n_ranks = members.first().map_or(0, |(.., view)| view.n_ranks());
    let stacked = JointTerm::Op {
        kinds: vec![OpKind::Concat { dim: dim.clone() }; n_ranks],
        inputs: members
            .iter()
            .map(|(_, weight, _)| JointTerm::Class(*weight))
            .collect(),
        types: None,
    };
    let mut inputs = vec![JointTerm::Class(shared), stacked];
    if !is_first {
        inputs.reverse();
    }
    let product = JointTerm::Op {
        kinds: vec![OpKind::Contract { out: out.to_vec() }; n_ranks],
        inputs,
        types: None,
    };
    let mut starts = vec![0; n_ranks];
    members
        .iter()
        .map(|(class, weight, view)| {
            let kinds = starts
                .iter_mut()
                .enumerate()
                .map(|(rank, next)| {
                    let len = view.at(rank).ty(*weight).size_of(dim).unwrap_or(0);
                    let start = *next;
                    *next += len;
                    let dim = dim.clone();
                    OpKind::Slice { dim, start, len }
                })
                .collect();
            let slice = JointTerm::Op {
                kinds,
                inputs: vec![product.clone()],
                types: None,
            };
            (*class, slice)
        })
        .collect()
}
