//! Random plans: any legal placement of every op, so that every reshard gets exercised.

#![allow(dead_code)] // each benchmark uses its part

use std::collections::BTreeMap;

use meshweave_dsl::graph::{Graph, Role};
use meshweave_dsl::layout::{Layout, Mesh, ReduceKind};
use meshweave_dsl::plan::{Placement, Plan, op_factors};

/// A deterministic stream of 32-bit numbers (lowbias32 of a counter).
pub struct Numbers {
    state: u32,
}

impl Numbers {
    pub fn new(seed: u32) -> Self {
        Self {
            state: seed.wrapping_mul(0x9E37_79B9),
        }
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        self.state = self.state.wrapping_add(1);
        let mut x = self.state;
        x ^= x >> 16;
        x = x.wrapping_mul(0x7feb_352d);
        x ^= x >> 15;
        x = x.wrapping_mul(0x846c_a68b);
        x ^= x >> 16;
        x as usize % bound.max(1)
    }
}

/// A plan that gives every axis of every op a random admissible factor, or none.
pub fn random_plan(graph: &Graph, mesh: &Mesh, seed: u32) -> Plan {
    let mut numbers = Numbers::new(seed);
    let mut plan = Plan::replicated("random", graph, mesh.clone());
    let mut layouts: Vec<Layout> = vec![Layout::replicated(); graph.tensors.len()];
    for id in graph
        .tensor_ids()
        .filter(|id| graph.tensor(*id).role != Role::Temp)
    {
        let mut layout = Layout::replicated();
        for (axis, degree) in mesh.axes() {
            let shape = &graph.ty(id).shape;
            if shape.is_empty() || numbers.below(2) == 0 {
                continue;
            }
            let (dim, size) = &shape[numbers.below(shape.len())];
            let taken: usize = layout
                .axes_of(dim)
                .iter()
                .map(|axis| mesh.degree(axis))
                .product();
            if taken * degree <= *size {
                layout = layout.shard(dim, axis);
            }
        }
        plan.sources.insert(id, layout.clone());
        layouts[id.index()] = layout;
    }
    for (op_id, op) in graph.ops() {
        let factors = op_factors(graph, op);
        let mut placement = Placement::default();
        let mut degrees: BTreeMap<_, usize> = BTreeMap::new();
        for (axis, degree) in mesh.axes() {
            let is_partial = |id: &meshweave_dsl::graph::TensorId| {
                layouts[id.index()].partial.get(axis) == Some(&ReduceKind::Sum)
            };
            let choice = numbers.below(factors.len() + 1);
            let Some(factor) = factors.get(choice) else {
                continue;
            };
            let all = degrees.get(&factor.name).copied().unwrap_or(1) * degree;
            let carries_partial = factor.name.as_str() == meshweave_dsl::op::PARTIAL_FACTOR;
            if !factor.admits(all) || (carries_partial && !op.inputs.iter().all(is_partial)) {
                continue;
            }
            degrees.insert(factor.name.clone(), all);
            placement.factors.insert(axis.clone(), factor.name.clone());
        }
        let op_layouts = placement.layouts(&factors, op.inputs.len(), op.results.len(), mesh);
        for (result, layout) in op.results.iter().zip(op_layouts.results) {
            layouts[result.index()] = layout;
        }
        plan.placements[op_id.index()] = placement;
    }
    plan
}

/// A plan by preference: each axis divides every op along the first of its dims that the op has a
/// factor for and that admits the degree; sources follow the same preferences.
pub fn preferring(graph: &Graph, mesh: &Mesh, preferences: &[(&str, &[&str])]) -> Plan {
    let mut plan = Plan::replicated("preferring", graph, mesh.clone());
    let dims_of = |axis: &str| {
        let found = preferences.iter().find(|(name, _)| *name == axis);
        found.map_or(&[] as &[&str], |(_, dims)| dims)
    };
    for id in graph
        .tensor_ids()
        .filter(|id| graph.tensor(*id).role != Role::Temp)
    {
        let mut layout = Layout::replicated();
        for (axis, degree) in mesh.axes() {
            let ty = graph.ty(id);
            let choice = dims_of(axis.as_str()).iter().find_map(|dim| {
                let dim = (*dim).into();
                let taken: usize = layout
                    .axes_of(&dim)
                    .iter()
                    .map(|axis| mesh.degree(axis))
                    .product();
                ty.size_of(&dim)
                    .filter(|size| taken * degree <= *size)
                    .map(|_| dim)
            });
            if let Some(dim) = choice {
                layout = layout.shard(dim, axis);
            }
        }
        plan.sources.insert(id, layout);
    }
    for (op_id, op) in graph.ops() {
        let factors = op_factors(graph, op);
        let mut placement = Placement::default();
        let mut degrees: BTreeMap<_, usize> = BTreeMap::new();
        for (axis, degree) in mesh.axes() {
            let choice = dims_of(axis.as_str()).iter().find_map(|dim| {
                let factor = factors.iter().find(|factor| factor.name.as_str() == *dim)?;
                let all = degrees.get(&factor.name).copied().unwrap_or(1) * degree;
                factor.admits(all).then(|| (factor.name.clone(), all))
            });
            if let Some((name, all)) = choice {
                degrees.insert(name.clone(), all);
                placement.factors.insert(axis.clone(), name);
            }
        }
        plan.placements[op_id.index()] = placement;
    }
    plan
}
