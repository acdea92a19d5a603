//! Checking a plan without the search that made it.
//!
//! Enters: a graph, a cluster, directives and a plan. Leaves: whether it is legal and keeps the
//! directives, its seconds and bytes computed again, and its bound added up again from the certificate's
//! potentials.
//! Invariant: nothing here searches or solves; a figure that leaves was computed from the graph, the
//! cluster and the plan's placements alone.
//!
//! `meshweave verify` is [`verify_plan`] with a face.

use crate::storage::stored;
use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::graph::{Graph, TensorId};
use meshweave_dsl::layout::{Layout, Mesh};
use meshweave_dsl::plan::{BoundProof, MemoryParts, Plan, TimeParts, op_factors};

use super::classes::Classes;
use super::directives::{Directives, Subject, placement_layout};
use super::dual::Dual;
use super::grid::Grid;
use super::instance::build_instance;
use super::metric::Metric;
use super::price::price_plan;
use super::rules::Rules;
use super::{SearchError, bytes_text};

/// What a check found.
#[derive(Clone, Debug, PartialEq)]
pub struct Verified {
    /// Seconds of a step, computed again.
    pub predicted_s: f64,
    pub parts: TimeParts,
    /// Bytes of a device, computed again.
    pub memory: MemoryParts,
    /// Bytes that a device may use.
    pub budget_bytes: f64,
    /// Seconds that the certificate says; they differ when the cluster or the prices changed.
    pub recorded_s: Option<f64>,
    /// No plan on this mesh that keeps the directives is faster; `None` where no proof is stored.
    pub bound_s: Option<f64>,
}

impl Verified {
    /// Part of the predicted time that a better plan on this mesh might save.
    pub fn gap(&self) -> Option<f64> {
        self.bound_s
            .map(|bound_s| super::gap(bound_s, self.predicted_s))
    }

    /// Whether the certificate's seconds are those of today's prices.
    pub fn is_current(&self) -> bool {
        let same = |recorded_s: f64| (recorded_s / self.predicted_s - 1.0).abs() < 1e-6;
        self.recorded_s.is_none_or(same)
    }
}

/// Checks a plan: every op divided along factors of its own that admit the degrees, every layout
/// possible, every directive kept, the bytes within the budget; then its price and its bound.
///
/// # Errors
/// `Invalid` for a plan that does not fit the graph or the cluster, breaks a directive, or whose proof
/// does not hold; `Infeasible` for one that needs more memory than there is.
pub fn verify_plan(
    graph: &Graph,
    cluster: &Cluster,
    directives: &Directives,
    plan: &Plan,
) -> Result<Verified, SearchError> {
    if plan.mesh.n_ranks() != cluster.n_devices() {
        return Err(SearchError::Invalid(format!(
            "the plan's mesh {} has {} ranks and cluster `{}` has {} devices",
            plan.mesh,
            plan.mesh.n_ranks(),
            cluster.name,
            cluster.n_devices()
        )));
    }
    let price = price_plan(graph, plan, cluster)?;
    check_placements(graph, plan)?;
    check_directives(graph, directives, plan)?;
    let memory_bytes = cluster.device.memory_bytes as f64;
    let budget_bytes = directives.budget_bytes.map_or_else(
        || memory_bytes * (1.0 - super::HEADROOM),
        |n_bytes| n_bytes as f64,
    );
    if price.memory.peak_bytes() > budget_bytes {
        return Err(SearchError::Infeasible(format!(
            "the plan needs {} a device, {} is available; raise the budget or plan again",
            bytes_text(price.memory.peak_bytes()),
            bytes_text(budget_bytes)
        )));
    }
    let certificate = plan.certificate.as_ref();
    let proof = certificate.and_then(|certificate| certificate.proof.as_ref());
    let bound_s = proof
        .map(|proof| verify_bound(graph, cluster, directives, &plan.mesh, budget_bytes, proof))
        .transpose()?;
    let predicted_s = price.seconds();
    if let Some(bound_s) = bound_s
        && bound_s > predicted_s * (1.0 + 1e-9)
    {
        return Err(SearchError::Internal(format!(
            "the proven bound of {bound_s} s is above the plan's {predicted_s} s"
        )));
    }
    Ok(Verified {
        predicted_s,
        parts: price.time,
        memory: price.memory,
        budget_bytes,
        recorded_s: certificate.map(|certificate| certificate.predicted_s),
        bound_s,
    })
}

/// The bound that stored potentials prove for all plans of a mesh under directives: they are checked to
/// overdraw no reshard, then the cheapest reduced strategy of every group is summed.
///
/// # Errors
/// `Invalid` where the potentials are of another graph or prove nothing.
pub fn verify_bound(
    graph: &Graph,
    cluster: &Cluster,
    directives: &Directives,
    mesh: &Mesh,
    budget_bytes: f64,
    proof: &BoundProof,
) -> Result<f64, SearchError> {
    let other = |what: String| {
        SearchError::Invalid(format!(
            "the stored proof is not of this graph, cluster and directives: {what}; plan again"
        ))
    };
    let graph = &*stored(graph, directives.storage);
    let rules = Rules::new(&directives.rules);
    let classes = Classes::new(graph, &rules, proof.tie);
    let grid = Grid::new(mesh.clone(), cluster);
    let mut metric = Metric::new(&grid);
    let instance = build_instance(graph, &classes, &grid, &rules, &mut metric)
        .map_err(|none| other(format!("`{}` cannot be placed", none.name)))?;
    let mut network = instance.network(&mut metric);
    if !network.make_consistent() {
        return Err(other("no assignment is possible".into()));
    }
    let dual = Dual::stored(&network, &proof.potentials, proof.byte_prices)
        .ok_or_else(|| other("potentials of other tensors".into()))?;
    let overdraft_s = dual.overdraft_s(&network);
    // Rounding of sums of seconds, for every net.
    let rounding_s = 1e-12 * network.nets.len() as f64;
    if overdraft_s > rounding_s {
        return Err(other(format!(
            "potentials rise by {overdraft_s:e} s more than a reshard takes"
        )));
    }
    let bound_s = dual.bound_s(&network, network.room_bytes(budget_bytes));
    let overdrafts_s = overdraft_s * network.nets.len() as f64;
    Ok(bound_s - overdrafts_s - instance.greatest_dislike_s())
}

fn check_placements(graph: &Graph, plan: &Plan) -> Result<(), SearchError> {
    for ((_, op), placement) in graph.ops().zip(&plan.placements) {
        let factors = op_factors(graph, op);
        for factor in placement.factors.values() {
            let known = factors.iter().find(|known| known.name == *factor);
            let axes = plan.mesh.axes().iter();
            let degree: usize = axes
                .filter(|(axis, _)| placement.factors.get(axis) == Some(factor))
                .map(|(_, degree)| degree)
                .product();
            if known.is_none_or(|known| !known.admits(degree)) {
                return Err(SearchError::Invalid(format!(
                    "`{}` cannot be divided along `{factor}` over {degree} ranks",
                    graph.op_name(op)
                )));
            }
        }
        let axes = plan.mesh.axes();
        if let Some(axis) = placement
            .factors
            .keys()
            .find(|axis| axes.iter().all(|(known, _)| known != *axis))
        {
            return Err(SearchError::Invalid(format!(
                "`{}` is divided over `{axis}`, and the mesh is {}",
                graph.op_name(op),
                plan.mesh
            )));
        }
    }
    Ok(())
}

fn check_directives(
    graph: &Graph,
    directives: &Directives,
    plan: &Plan,
) -> Result<(), SearchError> {
    let producers = graph.producers();
    let layout_of = |id: TensorId| -> Layout {
        let Some(op_id) = producers[id.index()] else {
            return plan.source_layout(id);
        };
        let results = &graph.op(op_id).results;
        let result_idx = results.iter().position(|result| *result == id);
        let layouts = plan.op_layouts(graph, op_id).results;
        let layout = result_idx.and_then(|result_idx| layouts.into_iter().nth(result_idx));
        layout.unwrap_or_default()
    };
    for rule in &directives.rules {
        let (name, layout) = match rule.subject {
            Subject::Tensor(id) => (graph.tensor(id).name.as_str(), layout_of(id)),
            Subject::Op(op_id) => {
                let placement = plan.placements.get(op_id.index()).cloned();
                let layout = placement_layout(&placement.unwrap_or_default(), &plan.mesh);
                (graph.op_name(graph.op(op_id)), layout)
            }
        };
        if !rule.demand.admits(&layout, &plan.mesh) {
            return Err(SearchError::Invalid(format!(
                "the plan breaks `{}` at `{name}`",
                rule.text
            )));
        }
    }
    Ok(())
}
