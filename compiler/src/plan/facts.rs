//! What a graph says about its plans, whatever the mesh.
//!
//! Enters: a graph. Leaves: makers and readers, phases, what is saved and fused, and the seconds of an
//! op on local types.
//! Invariant: the ops before `n_forward` are those of the forward phase, as in partitioning.

use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::graph::{Graph, Op, OpId, TensorId, TensorType};
use meshweave_dsl::layout::Layout;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{MoeDims, OpKind};

use super::copies::Copies;
use super::cost::{Traffic, fragment_seconds, matmul_op_seconds, traffic_seconds};
use super::grid::Grid;

/// What the graph says, independent of the grid.
pub struct Facts {
    pub producers: Vec<Option<OpId>>,
    pub consumers: Vec<Vec<OpId>>,
    pub n_forward: usize,
    pub total_flops: f64,
    /// Dims that attention and rope need whole: splitting contractions along them only moves data.
    pub whole_dims: BTreeSet<Dim>,
    /// Temps that stay inside a fused fragment.
    pub is_fused: Vec<bool>,
    pub is_gradient: Vec<bool>,
    /// Forward temps that backward ops read.
    pub is_saved: Vec<bool>,
    /// Part of the rows of every tensor that tokens fill; 1 where there are no rows.
    pub shares: Vec<f64>,
    /// What moves of weights to replicas send, by their results.
    copies: BTreeMap<TensorId, Copies>,
}

impl Facts {
    /// The facts of a graph. Linear in its size.
    pub fn new(graph: &Graph) -> Self {
        let producers = graph.producers();
        let consumers = graph.consumers();
        let n_forward = n_forward_ops(graph, &producers);
        let mut whole_dims = BTreeSet::new();
        let mut total_flops = 0.0;
        for (_, op) in graph.ops() {
            match &op.kind {
                OpKind::Attention(dims) | OpKind::AttentionGrad(dims) => {
                    whole_dims.extend([dims.head.clone(), dims.value.clone()]);
                }
                OpKind::Rope { dim, .. } => {
                    whole_dims.insert(dim.clone());
                }
                _ => {}
            }
            let (inputs, results) = op_types(graph, op);
            total_flops += op.kind.n_flops(&inputs, &results);
        }
        let fuses = |op_id: OpId| is_fusible(&graph.op(op_id).kind);
        let is_fused = graph
            .tensor_ids()
            .map(|id| {
                producers[id.index()].is_some_and(fuses)
                    && matches!(consumers[id.index()].as_slice(), [reader] if fuses(*reader))
                    && !graph.outputs.contains(&id)
            })
            .collect();
        let mut is_gradient = vec![false; graph.tensors.len()];
        for gradient in graph.gradients.values() {
            is_gradient[gradient.index()] = true;
        }
        let reads_late = |id: TensorId| {
            consumers[id.index()]
                .iter()
                .any(|reader| reader.index() >= n_forward)
        };
        let mut is_saved = vec![false; graph.tensors.len()];
        for (_, op) in graph.ops().take(n_forward) {
            for result in &op.results {
                // Relabelings share the bytes of their operand; functions of one saved tensor are
                // computed again by the fragments that read them.
                let is_again = match &op.kind {
                    OpKind::Rename { .. } | OpKind::Split { .. } | OpKind::Merge { .. } => true,
                    OpKind::Unary(_) => {
                        let late = consumers[result.index()].iter();
                        late.filter(|reader| reader.index() >= n_forward)
                            .all(|reader| fuses(*reader))
                    }
                    _ => false,
                };
                let is_spared = is_again && op.inputs.iter().any(|input| reads_late(*input));
                is_saved[result.index()] = reads_late(*result) && !is_spared;
            }
        }
        Self {
            producers,
            consumers,
            n_forward,
            total_flops,
            whole_dims,
            is_fused,
            is_gradient,
            shares: row_shares(graph),
            copies: graph
                .ops
                .iter()
                .filter_map(|op| Some((*op.results.first()?, Copies::of(graph, op)?)))
                .collect(),
            is_saved,
        }
    }

    /// Seconds of one op on local types; tensors inside a fused fragment are not moved, and rows that no
    /// token fills are not computed.
    pub fn seconds(&self, op: &Op, locals: &[TensorType], cluster: &Cluster) -> f64 {
        let tensors = op.inputs.iter().chain(&op.results);
        let shares = tensors.map(|id| self.shares[id.index()]);
        shares.fold(1.0, f64::min) * self.whole_seconds(op, locals, cluster)
    }

    /// Seconds of the exchange within an op whose rows lie so.
    pub fn exchange_seconds(
        &self,
        op: &Op,
        (rows, local): (&Layout, &TensorType),
        grid: &Grid,
    ) -> f64 {
        let (OpKind::MoeMove(moved), [result]) = (&op.kind, op.results.as_slice()) else {
            return 0.0;
        };
        if moved.stays {
            return 0.0;
        }
        let copies = self.copies.get(result);
        let n_bytes = self.shares[result.index()] * local.n_bytes() as f64;
        let axes = grid.axes.iter();
        let crossed = axes.filter(|axis| rows.axes_of(&moved.dims.expert).contains(&axis.axis));
        let seconds = crossed.map(|axis| {
            let n_bytes = n_bytes * copies.map_or(1.0, |copies| copies.share(axis.group.n_ranks));
            traffic_seconds(Traffic::AllToAll, n_bytes, axis.group, &grid.cluster)
        });
        seconds.sum()
    }

    fn whole_seconds(&self, op: &Op, locals: &[TensorType], cluster: &Cluster) -> f64 {
        let (inputs, results) = locals.split_at(op.inputs.len());
        let inputs: Vec<&TensorType> = inputs.iter().collect();
        let results: Vec<&TensorType> = results.iter().collect();
        let kind = localized(&op.kind, &inputs, &results);
        let n_flops = kind.n_flops(&inputs, &results);
        let mut n_bytes = kind.n_bytes_moved(&inputs, &results);
        if kind.is_matmul() {
            return matmul_op_seconds(&kind, &inputs, &results, cluster);
        }
        if n_flops == 0.0 && n_bytes == 0.0 {
            return 0.0;
        }
        let mut continues = false;
        if is_fusible(&kind) {
            for (input_idx, id) in op.inputs.iter().enumerate() {
                if self.is_fused[id.index()] {
                    n_bytes -= inputs[input_idx].n_bytes() as f64;
                    continues = true;
                }
            }
            for (result_idx, id) in op.results.iter().enumerate() {
                if self.is_fused[id.index()] {
                    n_bytes -= results[result_idx].n_bytes() as f64;
                }
            }
        }
        let seconds = fragment_seconds(n_flops, n_bytes.max(0.0), cluster);
        if continues {
            seconds - cluster.device.launch_s
        } else {
            seconds
        }
    }
}

/// Ops that outputs depend on are forward; the first op after the last of them is backward. As in
/// partitioning.
fn n_forward_ops(graph: &Graph, producers: &[Option<OpId>]) -> usize {
    let makers = graph.outputs.iter().filter_map(|id| producers[id.index()]);
    let last = makers.map(|op_id| op_id.index() + 1).max();
    last.unwrap_or(graph.ops.len())
}

/// The part of every tensor's rows that tokens fill: those of a dispatch, and of what is computed from
/// them row by row. As many rows are filled as there are assignments, unless they are dropped.
fn row_shares(graph: &Graph) -> Vec<f64> {
    let mut shares = vec![1.0; graph.tensors.len()];
    let mut slots: Vec<Option<&Dim>> = vec![None; graph.tensors.len()];
    for (_, op) in graph.ops() {
        let assigned = |dims: &MoeDims, expert: Option<&TensorId>| {
            let size = |dim| {
                expert
                    .and_then(|id| graph.ty(*id).size_of(dim))
                    .unwrap_or(0)
            };
            // Where tokens are dropped, slots are few, and taken to be full.
            if dims.capacity < size(&dims.seq) {
                return 1.0;
            }
            let n_assigned = (size(&dims.seq) * size(&dims.choice)) as f64;
            (n_assigned / (dims.n_experts * dims.capacity) as f64).min(1.0)
        };
        let (share, slot) = match &op.kind {
            OpKind::MoeDispatch(dims) => (assigned(dims, op.inputs.get(1)), Some(&dims.slot)),
            OpKind::MoeMove(moved) => {
                let dims = &moved.dims;
                (assigned(dims, op.inputs.get(3)), Some(&dims.slot))
            }
            _ => {
                let rows = op.inputs.iter().find(|id| slots[id.index()].is_some());
                rows.map_or((1.0, None), |id| (shares[id.index()], slots[id.index()]))
            }
        };
        let Some(slot) = slot else { continue };
        for result in &op.results {
            if graph.ty(*result).has(slot) {
                shares[result.index()] = share;
                slots[result.index()] = Some(slot);
            }
        }
    }
    shares
}

/// Types of the operands and results of an op.
pub fn op_types<'a>(graph: &'a Graph, op: &Op) -> (Vec<&'a TensorType>, Vec<&'a TensorType>) {
    let types = |ids: &[TensorId]| ids.iter().map(|id| graph.ty(*id)).collect();
    (types(&op.inputs), types(&op.results))
}

/// Whether code generation fuses the op with its neighbors.
fn is_fusible(kind: &OpKind) -> bool {
    matches!(
        kind,
        OpKind::Unary(_)
            | OpKind::Binary(_)
            | OpKind::Rope { .. }
            | OpKind::RmsNorm { .. }
            | OpKind::RmsNormGrad { .. }
            | OpKind::LayerNorm { .. }
            | OpKind::LayerNormGrad { .. }
            | OpKind::Softmax { .. }
            | OpKind::SoftmaxGrad { .. }
            | OpKind::CrossEntropyGrad { .. }
            | OpKind::Expand { .. }
    )
}

/// The op with the sizes that its price looks at set to the local ones.
fn localized(kind: &OpKind, inputs: &[&TensorType], results: &[&TensorType]) -> OpKind {
    match kind {
        // A rank in the middle of a split causal sequence sees half of the keys, as the whole does.
        OpKind::Attention(dims) | OpKind::AttentionGrad(dims) => {
            let mut dims = dims.clone();
            let length = |ty: Option<&&TensorType>, dim: &Dim| ty.and_then(|ty| ty.size_of(dim));
            let q_len = length(inputs.first(), &dims.seq).unwrap_or(0);
            let kv_len = length(inputs.get(1), &dims.kv_seq).unwrap_or(0);
            if dims.causal {
                // The last rank sees the most, and all wait for it.
                dims.offset = kv_len.saturating_sub(q_len);
            }
            match kind {
                OpKind::Attention(_) => OpKind::Attention(dims),
                _ => OpKind::AttentionGrad(dims),
            }
        }
        OpKind::ScatterAdd { dim, offset, .. } => OpKind::ScatterAdd {
            dim: dim.clone(),
            size: results.first().and_then(|ty| ty.size_of(dim)).unwrap_or(0),
            offset: *offset,
        },
        _ => kind.clone(),
    }
}
