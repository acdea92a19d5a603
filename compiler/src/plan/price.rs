//! The price of a plan, whoever made it: seconds by part and bytes by part.
//!
//! Enters: a graph and a plan. Leaves: what the search would have said, computed without it.
//! Invariant: for a plan of the search, the seconds are those of its certificate; a plan that is
//! loaded is priced again, never believed.

use crate::storage::stored;
use std::collections::BTreeMap;

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::graph::{Graph, OpId, TensorId, TensorType};
use meshweave_dsl::layout::Layout;
use meshweave_dsl::plan::{MemoryParts, Plan, TimeParts};

use super::SearchError;
use super::facts::Facts;
use super::grid::{Code, Grid};
use super::metric::Metric;

/// Seconds and bytes of a plan, whole and by op.
#[derive(Clone, Debug, PartialEq)]
pub struct Price {
    pub time: TimeParts,
    pub memory: MemoryParts,
    /// Compute of every op of the graph.
    pub op_s: Vec<f64>,
    /// Reshards of every tensor, where there are any, over both phases.
    pub reshard_s: BTreeMap<TensorId, f64>,
}

impl Price {
    /// Seconds of a step.
    pub fn seconds(&self) -> f64 {
        self.time.matmul_s + self.time.vector_s + self.time.reshard_s
    }
}

/// Prices a plan on a cluster.
///
/// # Errors
/// `Invalid` when the plan does not fit the graph: another number of ops, a layout with empty
/// chunks, or a reshard that cannot be.
pub fn price_plan(graph: &Graph, plan: &Plan, cluster: &Cluster) -> Result<Price, SearchError> {
    if plan.placements.len() != graph.ops.len() {
        return Err(SearchError::Invalid(format!(
            "the plan places {} ops and the graph has {}",
            plan.placements.len(),
            graph.ops.len()
        )));
    }
    let graph = &*stored(graph, Some(plan.storage));
    let grid = Grid::new(plan.mesh.clone(), cluster);
    let mut metric = Metric::new(&grid);
    let facts = Facts::new(graph);
    let mut price = Price {
        time: TimeParts::default(),
        memory: MemoryParts::default(),
        op_s: Vec::with_capacity(graph.ops.len()),
        reshard_s: BTreeMap::new(),
    };
    let code_of = |id: TensorId, layout: &Layout| {
        let ty = graph.ty(id);
        let code = grid.code(layout, ty);
        code.filter(|code| grid.is_legal(*code, ty)).ok_or_else(|| {
            SearchError::Invalid(format!(
                "`{}` of type {ty} cannot be laid out as {} on the mesh {}: axes of a dim stand in \
                 the order of the mesh, and every rank needs at least one element",
                graph.tensor(id).name,
                layout.display(ty.dims()),
                plan.mesh
            ))
        })
    };
    let mut made: Vec<Code> = Vec::with_capacity(graph.tensors.len());
    for id in graph.tensor_ids() {
        made.push(match facts.producers[id.index()] {
            None => {
                let code = code_of(id, &plan.source_layout(id))?;
                price.memory.kept_bytes += grid.local_bytes(code, graph.ty(id));
                code
            }
            Some(_) => Code::default(),
        });
    }
    // Layouts wanted by the readers of a tensor: forward, backward, after the step.
    let mut wanted: Vec<[Vec<Code>; 3]> = vec![Default::default(); graph.tensors.len()];
    for (op_id, op) in graph.ops() {
        let layouts = plan.op_layouts(graph, op_id);
        let mut locals: Vec<TensorType> = Vec::new();
        for (id, layout) in op.inputs.iter().zip(&layouts.inputs) {
            let code = code_of(*id, layout)?;
            locals.push(grid.local(code, graph.ty(*id)));
            wanted[id.index()][usize::from(op_id.index() >= facts.n_forward)].push(code);
        }
        for (id, layout) in op.results.iter().zip(&layouts.results) {
            let code = code_of(*id, layout)?;
            let local = grid.local(code, graph.ty(*id));
            let n_bytes = local.n_bytes() as f64;
            if facts.is_saved[id.index()] {
                price.memory.saved_bytes += n_bytes;
            }
            if facts.is_gradient[id.index()] {
                price.memory.gradient_bytes += n_bytes;
            }
            made[id.index()] = code;
            locals.push(local);
        }
        let working: f64 = locals.iter().map(|local| local.n_bytes() as f64).sum();
        price.memory.working_bytes = price.memory.working_bytes.max(working);
        let mut seconds = facts.seconds(op, &locals, cluster);
        if let Some(rows) = layouts.results.first().zip(locals.last()) {
            seconds += facts.exchange_seconds(op, rows, &grid);
        }
        if op.kind.is_matmul() {
            price.time.matmul_s += seconds;
        } else {
            price.time.vector_s += seconds;
        }
        price.op_s.push(seconds);
    }
    for (source, value) in &graph.updates {
        wanted[value.index()][1].push(made[source.index()]);
    }
    for output in &graph.outputs {
        let mut layout = grid.layout(made[output.index()], graph.ty(*output));
        if !layout.partial.is_empty() {
            layout.partial.clear();
            wanted[output.index()][2].push(code_of(*output, &layout)?);
        }
    }
    for (id, phases) in graph.tensor_ids().zip(&wanted) {
        let ty = graph.ty(id);
        let mut seconds = 0.0;
        for targets in phases {
            let whole_s = metric.shared_seconds(ty, made[id.index()], targets);
            seconds += facts.shares[id.index()] * whole_s;
        }
        if !seconds.is_finite() {
            let reader = facts.consumers[id.index()]
                .first()
                .copied()
                .unwrap_or(OpId(0));
            return Err(SearchError::Invalid(format!(
                "`{}` is made as {} and cannot be brought to what `{}` and its other readers ask",
                graph.tensor(id).name,
                grid.layout(made[id.index()], ty).display(ty.dims()),
                graph.op_name(graph.op(reader)),
            )));
        }
        if seconds > 0.0 {
            price.reshard_s.insert(id, seconds);
            price.time.reshard_s += seconds;
        }
    }
    Ok(price)
}
