//! Plans: for every op of a global graph, how it is divided over the mesh.
//!
//! Enters: choices of a search or of a user. Leaves: layouts of every operand and result.
//! Invariant: a mesh axis divides an op along at most one factor of its sharding rule; an axis that
//! divides none is replicated.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
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
    /// What activations and the operands of products are stored as. Sources, gradients of parameters
    /// and what the optimizer computes with are f32 whatever it is.
    #[serde(default = "f32_storage", skip_serializing_if = "is_f32_storage")]
    pub storage: DType,
    /// How good it is, where a search made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<Certificate>,
}

fn f32_storage() -> DType {
    DType::F32
}

fn is_f32_storage(storage: &DType) -> bool {
    *storage == DType::F32
}

/// What is known about how good a plan is.
///
/// Invariant: `lower_bound_s ≤ predicted_s` and `gap = 1 − lower_bound_s / predicted_s`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    /// Name of the cluster that prices are of.
    pub cluster: String,
    /// Seconds of a step, computing and communicating one after the other.
    pub predicted_s: f64,
    /// No plan of the searched space is faster.
    pub lower_bound_s: f64,
    /// Part of the predicted time that a better plan might save.
    pub gap: f64,
    pub parts: TimeParts,
    pub memory: MemoryParts,
    /// Bytes a device may use.
    pub budget_bytes: f64,
    /// What was searched, in words.
    pub searched: Vec<String>,
    /// What was not, in words.
    pub not_searched: Vec<String>,
    /// All meshes looked at, fastest first; the plan's own is the first.
    pub meshes: Vec<MeshResult>,
    /// What proves a bound on the plan's own mesh to those who add it up again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<BoundProof>,
}

/// Which layers are planned alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tie {
    /// All repeated ones.
    #[default]
    Layers,
    /// None: every layer chooses for itself.
    None,
}

/// A dual solution: it proves a lower bound on all plans of one mesh by additions and comparisons alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BoundProof {
    pub tie: Tie,
    /// The seconds that it proves.
    pub bound_s: f64,
    /// Seconds a byte at the turn from forward to backward, and at the end of backward.
    pub byte_prices: [f64; 2],
    /// For every tensor and reader, in the order of the planner, seconds of each layout.
    pub potentials: Vec<Vec<f64>>,
}

/// Where the predicted seconds go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TimeParts {
    /// Contractions and attention.
    pub matmul_s: f64,
    /// All other compute.
    pub vector_s: f64,
    /// Collectives, and slices between layouts.
    pub reshard_s: f64,
}

/// Predicted bytes of one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryParts {
    /// Parameters, optimizer state, inputs and constants.
    pub kept_bytes: f64,
    /// Activations kept from forward to backward.
    pub saved_bytes: f64,
    pub gradient_bytes: f64,
    /// The greatest operands and results of one op.
    pub working_bytes: f64,
}

impl MemoryParts {
    /// At the turn from forward to backward or at the end of backward, whichever is more.
    pub fn peak_bytes(&self) -> f64 {
        self.kept_bytes + self.saved_bytes.max(self.gradient_bytes) + self.working_bytes
    }
}

/// What the search found on one mesh.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MeshResult {
    pub mesh: Mesh,
    /// Seconds of the best plan on it; `None` when nothing fits or it was pruned.
    pub predicted_s: Option<f64>,
    pub lower_bound_s: f64,
    /// Strategies of all groups of ops and sources, and tensors that are laid out between them.
    pub n_strategies: usize,
    pub n_nets: usize,
    /// Strategies, beyond one a group, that the bound did not exclude.
    pub n_open: usize,
    /// Why there is no plan on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl Plan {
    /// Everything on every rank: the plan of one device, and the worst one of many.
    pub fn replicated(name: impl Into<String>, graph: &Graph, mesh: Mesh) -> Self {
        Self {
            name: name.into(),
            mesh,
            placements: vec![Placement::default(); graph.ops.len()],
            sources: BTreeMap::new(),
            storage: DType::F32,
            certificate: None,
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
