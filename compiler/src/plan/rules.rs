//! Rules by what they are about, as the search asks for them.
//!
//! Enters: directives. Leaves: whether a layout or a placement is allowed, and what it costs extra.
//! Invariant: rules keep their numbers in the directives, for messages.

use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::graph::{OpId, TensorId, TensorType};
use meshweave_dsl::layout::{Layout, Mesh};
use meshweave_dsl::plan::Placement;

use super::directives::{Demand, Rule, Subject, placement_layout};
use super::grid::{Code, Grid};

/// All rules of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rules {
    by_subject: BTreeMap<Subject, Vec<(Demand, usize)>>,
}

impl Rules {
    /// Sorts rules by subject.
    pub fn new(rules: &[Rule]) -> Self {
        let mut by_subject: BTreeMap<Subject, Vec<(Demand, usize)>> = BTreeMap::new();
        for (rule_idx, rule) in rules.iter().enumerate() {
            let list = by_subject.entry(rule.subject).or_default();
            list.push((rule.demand.clone(), rule_idx));
        }
        Self { by_subject }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_subject.is_empty()
    }

    /// Whether any rule is about an op rather than a tensor.
    pub fn place_ops(&self) -> bool {
        let mut subjects = self.by_subject.keys();
        subjects.any(|subject| matches!(subject, Subject::Op(_)))
    }

    /// What the rules about a subject ask, as text; empty when there are none. Members of a class
    /// agree in it.
    pub fn signature(&self, subject: Subject) -> String {
        let rules = self.by_subject.get(&subject).into_iter().flatten();
        rules.map(|(demand, _)| format!("{demand:?};")).collect()
    }

    /// The numbers of the rules about a subject.
    pub fn about(&self, subject: Subject) -> impl Iterator<Item = usize> {
        let rules = self.by_subject.get(&subject).into_iter().flatten();
        rules.map(|(_, number)| *number)
    }

    /// These rules without the given ones.
    #[must_use]
    pub fn without(&self, numbers: &BTreeSet<usize>) -> Self {
        let mut by_subject = self.by_subject.clone();
        for list in by_subject.values_mut() {
            list.retain(|(_, number)| !numbers.contains(number));
        }
        by_subject.retain(|_, list| !list.is_empty());
        Self { by_subject }
    }

    /// Whether a layout of a tensor keeps every rule about it.
    pub fn admit(&self, id: TensorId, code: Code, ty: &TensorType, grid: &Grid) -> bool {
        let rules = self.by_subject.get(&Subject::Tensor(id));
        rules.is_none_or(|rules| admit(rules, &grid.layout(code, ty), &grid.mesh))
    }

    /// Whether a placement of an op keeps every rule about it.
    pub fn admit_placement(&self, id: OpId, placement: &Placement, mesh: &Mesh) -> bool {
        let rules = self.by_subject.get(&Subject::Op(id));
        rules.is_none_or(|rules| admit(rules, &placement_layout(placement, mesh), mesh))
    }

    /// Per cent of the fastest conceivable step that a layout of a tensor costs extra.
    pub fn dislike(&self, id: TensorId, code: Code, ty: &TensorType, grid: &Grid) -> f64 {
        let rules = self.by_subject.get(&Subject::Tensor(id));
        rules.map_or(0.0, |rules| {
            dislike(rules, &grid.layout(code, ty), &grid.mesh)
        })
    }

    /// Per cent of the fastest conceivable step that a placement of an op costs extra.
    pub fn dislike_placement(&self, id: OpId, placement: &Placement, mesh: &Mesh) -> f64 {
        let rules = self.by_subject.get(&Subject::Op(id));
        rules.map_or(0.0, |rules| {
            dislike(rules, &placement_layout(placement, mesh), mesh)
        })
    }
}

fn admit(rules: &[(Demand, usize)], layout: &Layout, mesh: &Mesh) -> bool {
    rules.iter().all(|(demand, _)| demand.admits(layout, mesh))
}

fn dislike(rules: &[(Demand, usize)], layout: &Layout, mesh: &Mesh) -> f64 {
    let weight = |demand: &Demand| match demand {
        Demand::Prefer(pattern, weight) if !pattern.matches(layout, mesh) => *weight,
        _ => 0.0,
    };
    rules.iter().map(|(demand, _)| weight(demand)).sum()
}
