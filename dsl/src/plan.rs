//! Plans: for every op of a global graph, how it is divided over the mesh.
//!
//! Enters: choices of a search or of a user. Leaves: layouts of every operand and result.
//! Invariant: a mesh axis divides an op along at most one factor of its sharding rule; an axis that
//! divides none is replicated.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::graph::{Graph, Op, OpId, TensorId, TensorType};
use crate::layout::{Layout, Mesh};
use crate::name::{Axis, Dim};
use crate::op::{Factor, Spread};

/// How one op is divided: mesh axis → name of one of its factors.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Placement {
    pub factors: BTreeMap<Axis, Dim>,
}

/// The layouts that a placement asks of an op's inputs and gives to its results.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpLayouts {
    pub inputs: Vec<Layout>,
    pub results: Vec<Layout>,
}

impl Placement {
    /// The layouts of operands and results; axes on one dim stand in mesh order, outermost major.
    /// Names that are no factor of the op are ignored (the plan's verifier reports them).
    pub fn layouts(
        &self,
        factors: &[Factor],
        n_inputs: usize,
        n_results: usize,
        mesh: &Mesh,
    ) -> OpLayouts {
        let mut layouts = OpLayouts {
            inputs: vec![Layout::replicated(); n_inputs],
            results: vec![Layout::replicated(); n_results],
        };
        for (axis, degree) in mesh.axes() {
            let Some(factor) = self
                .factors
                .get(axis)
                .and_then(|name| factors.iter().find(|factor| factor.name == *name))
            else {
                continue;
            };
            if *degree < 2 {
                continue;
            }
            let all = layouts
                .inputs
                .iter_mut()
                .zip(&factor.inputs)
                .chain(layouts.results.iter_mut().zip(&factor.results));
            for (layout, spread) in all {
                match spread {
                    Spread::Whole => {}
                    Spread::Split(dim) => layout
                        .shards
                        .entry(dim.clone())
                        .or_default()
                        .push(axis.clone()),
                    Spread::Partial(kind) => {
                        layout.partial.insert(axis.clone(), *kind);
                    }
                }
            }
        }
        layouts
    }
}

/// A complete division of a global graph over a mesh.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub name: String,
    pub mesh: Mesh,
    /// One placement per op of the graph, in its order.
    pub placements: Vec<Placement>,
    /// The layout in which each source (input, parameter, state, constant) is kept between steps;
    /// replicated where absent. Updated values return to it.
    pub sources: BTreeMap<TensorId, Layout>,
}

impl Plan {
    /// Everything on every rank: the plan of one device, and the worst one of many.
    pub fn replicated(name: impl Into<String>, graph: &Graph, mesh: Mesh) -> Self {
        Self {
            name: name.into(),
            mesh,
            placements: vec![Placement::default(); graph.ops.len()],
            sources: BTreeMap::new(),
        }
    }

    /// The layouts of an op's operands and results.
    pub fn op_layouts(&self, graph: &Graph, op_id: OpId) -> OpLayouts {
        let op = graph.op(op_id);
        let factors = op_factors(graph, op);
        match self.placements.get(op_id.index()) {
            Some(placement) => {
                placement.layouts(&factors, op.inputs.len(), op.results.len(), &self.mesh)
            }
            None => {
                Placement::default().layouts(&[], op.inputs.len(), op.results.len(), &self.mesh)
            }
        }
    }

    /// The layout in which a source is kept.
    pub fn source_layout(&self, id: TensorId) -> Layout {
        self.sources.get(&id).cloned().unwrap_or_default()
    }
}

/// The factors of an op of a graph.
pub fn op_factors(graph: &Graph, op: &Op) -> Vec<Factor> {
    let types = |ids: &[TensorId]| {
        ids.iter()
            .map(|id| graph.ty(*id))
            .collect::<Vec<&TensorType>>()
    };
    op.kind.factors(&types(&op.inputs), &types(&op.results))
}
