//! Directives: what a user's statements ask of the plan of one graph.
//!
//! Enters: statements, resolved to the tensors and ops of a graph. Leaves: what the search must keep.
//! Invariant: every rule speaks of one tensor or op and carries its statement, so that messages can
//! quote it; overlaps were settled before.

use std::collections::BTreeMap;

use meshweave_dsl::diagnostics::Span;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{OpId, TensorId};
use meshweave_dsl::layout::{Layout, Mesh, ReduceKind};
use meshweave_dsl::name::{Axis, Dim};
use meshweave_dsl::plan::{Placement, Plan};

/// All directives of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Directives {
    /// Candidates; all meshes of the cluster when empty.
    pub meshes: Vec<Mesh>,
    pub rules: Vec<Rule>,
    /// Bytes that a device may use.
    pub budget_bytes: Option<u64>,
    /// What activations and the operands of products are stored as; as in the graph without it.
    pub storage: Option<DType>,
    /// A complete plan: nothing is searched, it is checked and priced again.
    pub replay: Option<Plan>,
}

/// One demand on one tensor or op.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    pub subject: Subject,
    pub demand: Demand,
    pub span: Span,
    /// The statement, for messages.
    pub text: String,
}

/// What a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// The layout in which a source is kept, else that in which its op leaves it.
    Tensor(TensorId),
    /// The factors over which an op is divided.
    Op(OpId),
}

/// What a rule asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Demand {
    Pin(Pattern),
    Forbid(Pattern),
    /// Anything else costs so many per cent of the fastest conceivable step.
    Prefer(Pattern, f64),
    /// The axis splits one of the dims (any dim when none is named).
    Over {
        axis: Axis,
        dims: Vec<Dim>,
    },
    /// The axis splits no dim.
    NotOver {
        axis: Axis,
    },
}

/// A layout with open parts. A dim that is not named is unconstrained.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pattern {
    pub dims: BTreeMap<Dim, DimPattern>,
    /// For a pin just these axes are partial; for the others at least these.
    pub partial: Vec<(ReduceKind, Axis)>,
}

/// One dim of a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DimPattern {
    Unsharded,
    Open,
    /// Split over at least one axis.
    AnyAxis,
    /// Split over just these, major first.
    Axes(Vec<Axis>),
}

impl Demand {
    /// Whether a layout on a mesh keeps the demand; preferences are always kept.
    pub fn admits(&self, layout: &Layout, mesh: &Mesh) -> bool {
        match self {
            Self::Pin(pattern) => {
                let is_asked = |axis: &Axis| pattern.partial.iter().any(|(_, one)| one == axis);
                pattern.matches(layout, mesh) && layout.partial.keys().all(is_asked)
            }
            Self::Forbid(pattern) => !pattern.matches(layout, mesh),
            Self::Prefer(..) => true,
            Self::Over { axis, dims } => {
                mesh.degree(axis) < 2
                    || layout
                        .dim_of(axis)
                        .is_some_and(|dim| dims.is_empty() || dims.contains(dim))
            }
            Self::NotOver { axis } => layout.dim_of(axis).is_none(),
        }
    }
}

impl Pattern {
    /// Whether a layout fits the pattern; axes of one rank mean nothing.
    pub fn matches(&self, layout: &Layout, mesh: &Mesh) -> bool {
        let is_real = |axis: &&Axis| mesh.degree(axis) > 1;
        let mut partial = self.partial.iter().filter(|(_, axis)| is_real(&axis));
        partial.all(|(kind, axis)| layout.partial.get(axis) == Some(kind))
            && self.dims.iter().all(|(dim, pattern)| {
                let axes = layout.axes_of(dim);
                match pattern {
                    DimPattern::Open => true,
                    DimPattern::Unsharded => axes.is_empty(),
                    DimPattern::AnyAxis => !axes.is_empty(),
                    DimPattern::Axes(asked) => asked.iter().filter(is_real).eq(axes),
                }
            })
    }
}

/// The placement of an op seen as a layout: factors are its dims, partial sums carried through are
/// partial.
pub fn placement_layout(placement: &Placement, mesh: &Mesh) -> Layout {
    let mut layout = Layout::replicated();
    for (axis, degree) in mesh.axes() {
        match placement.factors.get(axis) {
            Some(factor) if *degree > 1 && factor.as_str() == meshweave_dsl::op::PARTIAL_FACTOR => {
                layout = layout.partial(axis, ReduceKind::Sum);
            }
            Some(factor) if *degree > 1 => layout = layout.shard(factor, axis),
            _ => {}
        }
    }
    layout
}
