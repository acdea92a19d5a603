//! Which meshes the decisions admit.
//!
//! Enters: what is settled, the candidate meshes. Leaves: those whose degrees divide what they must.
//! Invariant: where none is left, the first one's refusals are findings that list the legal degrees.

use std::collections::BTreeSet;

use meshweave_dsl::diagnostics::Diagnostic;
use meshweave_dsl::graph::TensorId;
use meshweave_dsl::layout::{Interval, Mesh};
use meshweave_dsl::name::{Axis, Dim};

use super::super::select::tied;
use super::{Claims, Decision, Settled};
use crate::plan::directives::DimPattern;

impl Claims<'_> {
    /// The candidates whose degrees all decisions admit.
    pub(super) fn admitted(&mut self, settled: &Settled) -> Vec<Mesh> {
        let mut refusals: Vec<Refusal> = Vec::new();
        let mut admitted = Vec::new();
        for mesh in &self.meshes.candidates {
            let found: Vec<Refusal> = settled
                .iter()
                .flat_map(|(id, dims)| dims.iter().map(move |(dim, d)| (*id, dim, d)))
                .filter_map(|(id, dim, decision)| self.refusal(mesh, id, dim, decision))
                .collect();
            if found.is_empty() {
                admitted.push(mesh.clone());
            } else if refusals.is_empty() {
                refusals = found;
            }
        }
        if admitted.is_empty() {
            let mut reported = BTreeSet::new();
            for refusal in refusals {
                if reported.insert((refusal.dim.clone(), refusal.size, refusal.axes.clone())) {
                    let diagnostic = self.refused(&refusal);
                    self.diagnostics.push(diagnostic);
                }
            }
        }
        admitted
    }

    fn refusal(
        &self,
        mesh: &Mesh,
        id: TensorId,
        dim: &Dim,
        decision: &Decision,
    ) -> Option<Refusal> {
        let DimPattern::Axes(axes) = &decision.pattern else {
            return None;
        };
        let degrees: Vec<usize> = axes.iter().map(|axis| mesh.degree(axis)).collect();
        let n_parts: usize = degrees.iter().product();
        let size = self.scene.graph.ty(id).size_of(dim)?;
        let fits = |even: Option<bool>| {
            n_parts == 1
                || smallest_part(size, &degrees) > 0
                    && (even != Some(true) || size.is_multiple_of(n_parts))
        };
        if self.admits(id, dim, &fits) {
            return None;
        }
        let is_even = self.admits(id, dim, &|even| even == Some(true));
        Some(Refusal {
            id,
            dim: dim.clone(),
            size,
            axes: axes.iter().cloned().zip(degrees).collect(),
            claim: decision.claims.first().copied()?,
            is_even,
        })
    }

    fn refused(&self, refusal: &Refusal) -> Diagnostic {
        let Refusal { id, dim, size, .. } = refusal;
        let axes: Vec<String> = refusal
            .axes
            .iter()
            .map(|(axis, degree)| format!("{axis}:{degree}"))
            .collect();
        let verb = if axes.len() == 1 { "divides" } else { "divide" };
        let legal: Vec<String> = (1..=*size)
            .filter(|degree| !refusal.is_even || size.is_multiple_of(*degree))
            .map(|degree| degree.to_string())
            .collect();
        let legal = match legal.as_slice() {
            [first, .., last] if legal.len() > 12 && !refusal.is_even => {
                format!("{first} to {last}")
            }
            legal => legal.join(", "),
        };
        let span = self.claims[refusal.claim].origin.span;
        let message = format!(
            "`{}` {verb} `{dim}` of {}, which has {size}; legal degrees: {legal}",
            axes.join(" × "),
            tied(self.scene.name(*id)),
        );
        let mut diagnostic = Diagnostic::invalid(message)
            .code("W112")
            .at(span, "divided here");
        for (axis, degree) in &refusal.axes {
            if let Some(place) = self.meshes.span_of(axis) {
                diagnostic = diagnostic.also(place, format!("degree {degree}"));
            }
        }
        diagnostic.help("lower the degree, or take the tensor out with `except`")
    }
}

/// A degree that a dim does not admit.
struct Refusal {
    id: TensorId,
    dim: Dim,
    size: usize,
    axes: Vec<(Axis, usize)>,
    claim: usize,
    is_even: bool,
}

/// Elements of the smallest part when a dim is cut into so many parts, again and again.
pub(in crate::resolve) fn smallest_part(size: usize, degrees: &[usize]) -> usize {
    let whole = Interval {
        start: 0,
        len: size,
    };
    let last = |interval: Interval, degree: &usize| {
        let degree = (*degree).max(1);
        interval.chunk(degree - 1, degree)
    };
    degrees.iter().fold(whole, last).len
}
