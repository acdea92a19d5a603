//! The rules.
//!
//! Enters: an op in its e-graph. Leaves: terms that the op's class equals.
//! Invariant: both sides of a rule are the same function of real numbers, for all inputs; in floating
//! point they differ by the order of sums and products at most (the rules that change it say so).
//! A term of another type than the class is refused by the e-graph, so rules need not check shapes
//! that the shape rules check.

mod algebra;
mod collective;
mod contraction;
mod relabel;
mod slices;

use super::egraph::View;
use super::joint::Term;

pub(super) use contraction::merge_projections;

/// A rewrite rule.
pub struct Rule {
    pub name: &'static str,
    /// The equation, for people.
    pub statement: &'static str,
    /// What the op of the view equals.
    pub equals: fn(View<'_>) -> Vec<Term>,
}

const fn rule(
    name: &'static str,
    statement: &'static str,
    equals: fn(View<'_>) -> Vec<Term>,
) -> Rule {
    Rule {
        name,
        statement,
        equals,
    }
}

/// All rules that look at one op and its operands, in the order in which they are tried.
pub const RULES: &[Rule] = &[
    // Relabelings: transpose, rename, split, merge.
    rule(
        "compose-relabels",
        "transpose(transpose(x)) = transpose(x); rename(rename(x)) = rename(x); split and merge of the same dims cancel; what changes nothing is x",
        relabel::compose,
    ),
    rule(
        "lift-relabels",
        "f(relabel(x)) = relabel(f(x)); g(relabel(x), relabel(y)) = relabel(g(x, y)), for elementwise f and g",
        relabel::lift,
    ),
    rule(
        "reduce-relabeled",
        "reduce(relabel(x)) = relabel(reduce(x)), or reduce(x) where the relabeled dims are reduced",
        relabel::reduce,
    ),
    rule(
        "contract-relabeled",
        "contract(transpose(x), y) = contract(x, y); transpose(contract(x, y)) = contract(x, y) in that order of dims",
        relabel::contract,
    ),
    // Constants and scalings. Products of constants are rounded once instead of twice.
    rule(
        "fold-scalars",
        "scale(scale(x)), shift(shift(x)), neg(neg(x)), neg(scale(x)) are one op or none; scale(x, 1) = shift(x, 0) = x",
        algebra::fold_scalars,
    ),
    rule(
        "fold-constants",
        "x · 1 = x + 0 = x − 0 = x / 1 = x; x · c = scale(x, c); x + c = shift(x, c) for tables of one number",
        algebra::fold_constants,
    ),
    rule(
        "signs",
        "x + (−y) = x − y; x − (−y) = x + y; (−x) · (−y) = x · y",
        algebra::signs,
    ),
    rule(
        "lift-scale",
        "scale comes out of products, contractions, sums and reductions, and into the smaller factor (reassociates products)",
        algebra::lift_scale,
    ),
    // Broadcasts and reductions.
    rule(
        "drop-expand",
        "g(expand(x), y) = g(x, y) where y has all dims; f(expand(x)) = expand(f(x)); expand(expand(x)) = expand(x)",
        algebra::drop_expand,
    ),
    rule(
        "reduce-expand",
        "reduce_sum(expand(x)) = scale(reduce_sum(x), copies); reduce_max(expand(x)) = reduce_max(x) (reassociates sums)",
        algebra::reduce_expand,
    ),
    rule(
        "compose-reduces",
        "reduce(reduce(x)) = reduce(x) of the same kind (reassociates sums)",
        algebra::compose_reduces,
    ),
    rule(
        "factor",
        "contract(x, w) ± contract(y, w) = contract(x ± y, w); x·z ± y·z = (x ± y)·z (reassociates sums)",
        contraction::factor,
    ),
    // Slices and concatenations.
    rule(
        "compose-slices",
        "slice(slice(x)) = slice(x); slice(concat(x, y)) = x or a part of it; a slice of everything is x",
        slices::compose,
    ),
    rule(
        "join-slices",
        "concat of adjacent slices of x is a slice of x, or x",
        slices::join,
    ),
    rule(
        "sink-slices",
        "slice(f(x)) = f(slice(x)), of g(x, y) and contract(x, y) alike: only what is needed is computed",
        slices::sink,
    ),
    // Collectives, in local graphs.
    rule(
        "scatter-reduction",
        "slice of one's own chunk of all_reduce(x) = reduce_scatter(x) (reassociates sums)",
        collective::scatter_reduction,
    ),
    rule(
        "keep-shard",
        "slice of one's own chunk of all_gather(x) = x",
        collective::keep_shard,
    ),
    rule(
        "merge-reductions",
        "all_reduce(x) ± all_reduce(y) = all_reduce(x ± y), of reduce_scatter alike; max likewise (reassociates sums)",
        collective::merge_reductions,
    ),
    rule(
        "join-groups",
        "all_reduce over one axis of all_reduce over another = all_reduce over both; of all_gather along one dim alike (reassociates sums)",
        collective::join_groups,
    ),
    rule(
        "gather-scattered",
        "all_gather(reduce_scatter(x)) of the same chunks = all_reduce(x) (reassociates sums)",
        collective::gather_scattered,
    ),
    rule(
        "lift-reductions",
        "f(all_reduce(x)) = all_reduce(f(x)) for linear f of one operand: neg, scale, relabelings, reduce_sum (reassociates sums)",
        collective::lift_reductions,
    ),
    rule(
        "lift-gathers",
        "f(all_gather(x)) = all_gather(f(x)) and g of two gathers of the same chunks, elementwise",
        collective::lift_gathers,
    ),
    rule(
        "reduce-gathered",
        "reduce of all_gather(x) over the gathered dim = all_reduce(reduce(x)) (reassociates sums)",
        collective::reduce_gathered,
    ),
    rule(
        "undo-exchange",
        "all_to_all and its inverse cancel",
        collective::undo_exchange,
    ),
];
