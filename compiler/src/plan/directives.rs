//! What a document demands of a plan.
//!
//! Enters: resolved statements. Leaves: candidates and rules that name tensors and ops of one graph.
//! Invariant: every rule remembers the statement it came from, for `explain` and for conflicts.

use std::collections::BTreeMap;

use meshweave_dsl::diagnostics::Span;
use meshweave_dsl::graph::{OpId, TensorId};
use meshweave_dsl::layout::{Mesh, ReduceKind};
use meshweave_dsl::name::{Axis, Dim};
use meshweave_dsl::plan::Plan;

/// The decisions that are made already, and the limits of those that are not.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Directives {
    /// Candidates; empty: all meshes of the cluster.
    pub meshes: Vec<Mesh>,
    pub rules: Vec<Rule>,
    /// Memory a device may use.
    pub budget_bytes: Option<u64>,
    /// A plan that is complete: nothing is searched.
    pub replay: Option<Plan>,
}

/// One demand.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    pub subject: Subject,
    pub demand: Demand,
    /// Of the statement.
    pub span: Span,
    /// The statement as written.
    pub text: String,
}

/// What a demand is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// A source's kept layout, else the layout of its producer's result.
    Tensor(TensorId),
    /// The layout of an op's first result.
    Op(OpId),
}

/// How strict it is.
#[derive(Clone, Debug, PartialEq)]
pub enum Demand {
    Pin(Pattern),
    Forbid(Pattern),
    /// With a weight.
    Prefer(Pattern, f64),
}

/// A partial layout.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pattern {
    /// A dim that is not named is not constrained.
    pub dims: BTreeMap<Dim, DimPattern>,
    pub partial: Vec<(ReduceKind, Axis)>,
}

/// What is said of one dim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DimPattern {
    Unsharded,
    /// Left to the search.
    Open,
    /// Any axis (in `forbid`).
    AnyAxis,
    /// Exactly these axes, major first.
    Axes(Vec<Axis>),
}
