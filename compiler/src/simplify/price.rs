//! What an op costs, for choosing between equal graphs.
//!
//! Enters: ops with the types of their operands on all ranks. Leaves: seconds.
//! Invariant: every op costs something, so that fewer equal ops are always better.
//!
//! This is a roofline with fixed rates, not the planner's cost model: it only has to order
//! alternatives, before anything is known of the cluster.

use egg::EGraph;

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::op::OpKind;

use super::egraph::{Entry, Facts, Node};

/// Rates of one device.
#[derive(Clone, Debug, PartialEq)]
pub struct Prices {
    /// Contractions and attention, in FLOP/s.
    pub matmul_flops_per_s: f64,
    /// Everything else, in FLOP/s.
    pub flops_per_s: f64,
    /// Memory, in bytes/s.
    pub bytes_per_s: f64,
    /// Between devices, in bytes/s.
    pub link_bytes_per_s: f64,
    /// Start of an op, in seconds.
    pub op_s: f64,
    /// Start of a collective, in seconds.
    pub collective_s: f64,
}

impl Default for Prices {
    /// One core of a current server processor.
    fn default() -> Self {
        Self {
            matmul_flops_per_s: 6e10,
            flops_per_s: 2e10,
            bytes_per_s: 1e10,
            link_bytes_per_s: 5e9,
            op_s: 5e-7,
            collective_s: 5e-6,
        }
    }
}

impl Prices {
    /// Seconds of an op with these operands on one rank.
    pub fn op(&self, kind: &OpKind, inputs: &[&TensorType], results: &[&TensorType]) -> f64 {
        if let Some(group) = kind.group() {
            let others = (group.ranks.len() as f64 - 1.0) / group.ranks.len().max(1) as f64;
            let bytes_of =
                |types: &[&TensorType]| types.iter().map(|ty| ty.n_bytes() as f64).sum::<f64>();
            let moved = match kind {
                OpKind::AllReduce { .. } => 2.0 * others * bytes_of(inputs),
                OpKind::AllGather { .. } => others * bytes_of(results),
                OpKind::ReduceScatter { .. } | OpKind::AllToAll { .. } => others * bytes_of(inputs),
                _ => bytes_of(inputs),
            };
            return self.collective_s + moved / self.link_bytes_per_s;
        }
        let n_flops = kind.n_flops(inputs, results);
        let n_bytes = kind.n_bytes_moved(inputs, results);
        let flops_per_s = if kind.is_matmul() {
            self.matmul_flops_per_s
        } else {
            self.flops_per_s
        };
        self.op_s + (n_flops / flops_per_s).max(n_bytes / self.bytes_per_s)
    }

    /// Seconds of a node on its slowest rank; sources and projections are free.
    pub(super) fn node(&self, graph: &EGraph<Node, Facts>, node: &Node) -> f64 {
        let Entry::Op { kinds, .. } = graph.analysis.entry(node.kind) else {
            return 0.0;
        };
        let results = graph.lookup(node.clone()).map(|id| &graph[id].data.types);
        kinds
            .iter()
            .enumerate()
            .map(|(rank, kind)| {
                let inputs: Vec<&TensorType> = node
                    .children
                    .iter()
                    .filter_map(|id| graph[*id].data.types.first()?.get(rank))
                    .collect();
                let results: Vec<&TensorType> = results
                    .into_iter()
                    .flatten()
                    .filter_map(|of_ranks| of_ranks.get(rank))
                    .collect();
                self.op(kind, &inputs, &results)
            })
            .fold(0.0, f64::max)
    }
}
