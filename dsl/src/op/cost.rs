//! Work of an op: floating-point operations and bytes moved, from the types alone.
//!
//! Invariant: numbers are those of one execution on tensors of exactly these types; for a rank's
//! part, give the types of the part.

use super::{MoeDims, OpKind};
use crate::dtype::DType;
use crate::graph::TensorType;

/// Queries that attention on the host works on at once.
pub const ATTENTION_BLOCK_ROWS: usize = 64;

impl OpKind {
    /// Floating-point operations: a multiply-add counts 2; a transcendental function counts as the
    /// handful of multiply-adds of its polynomial. Causal attention counts its lower half.
    pub fn n_flops(&self, inputs: &[&TensorType], results: &[&TensorType]) -> f64 {
        let elements = |ty: Option<&&TensorType>| ty.map_or(0.0, |ty| ty.n_elements() as f64);
        let result = elements(results.first());
        match self {
            Self::Contract { .. } => match inputs {
                [a, b] => {
                    let extra: usize = b
                        .shape
                        .iter()
                        .filter(|(dim, _)| !a.has(dim))
                        .map(|(_, size)| size)
                        .product();
                    2.0 * a.n_elements() as f64 * extra as f64
                }
                _ => 0.0,
            },
            Self::Attention(dims) | Self::AttentionGrad(dims) => {
                let [q, k, v, ..] = inputs else { return 0.0 };
                let kv_len = k.size_of(&dims.kv_seq).unwrap_or(0) as f64;
                let width = k.size_of(&dims.head).unwrap_or(1) as f64;
                let value = v.size_of(&dims.value).unwrap_or(0) as f64;
                let rows = q.n_elements() as f64 / width;
                let seq_len = q.size_of(&dims.seq).unwrap_or(0) as f64;
                let visible = if dims.causal {
                    dims.offset as f64 + (seq_len + 1.0) / 2.0
                } else {
                    kv_len
                };
                let forward = 2.0 * rows * visible.min(kv_len) * (width + value);
                match self {
                    // S = q kᵀ again, then dP, dV, dQ and dK: 2½ times the forward products.
                    Self::AttentionGrad(_) => 2.5 * forward,
                    _ => forward,
                }
            }
            Self::Unary(_) | Self::Binary(_) => 4.0 * result,
            Self::Softmax { .. } | Self::CrossEntropyGrad { .. } => 16.0 * result,
            Self::Reduce { .. } => 2.0 * elements(inputs.first()),
            Self::SoftmaxGrad { .. } | Self::Rope { .. } => 4.0 * result,
            Self::RmsNorm { .. } | Self::LayerNorm { .. } => 6.0 * result,
            Self::RmsNormGrad { .. } | Self::LayerNormGrad { .. } => 12.0 * result,
            Self::Adamw { .. } => 16.0 * result,
            Self::Sgd { .. } => 2.0 * result,
            Self::TopK { k, .. } => *k as f64 * elements(inputs.first()),
            Self::ScatterAdd { .. } => elements(inputs.get(1)),
            Self::MoeDispatch(_) => 2.0 * elements(inputs.first()),
            Self::MoeCombine(dims) | Self::MoeGateGrad(dims) => {
                2.0 * rows_read(dims, inputs) * elements(inputs.first())
            }
            Self::Gather { .. }
            | Self::Expand { .. }
            | Self::Pick { .. }
            | Self::Transpose { .. }
            | Self::Rename { .. }
            | Self::Split { .. }
            | Self::Merge { .. }
            | Self::Slice { .. }
            | Self::Concat { .. }
            | Self::TopKGrad { .. }
            | Self::MoeSlots { .. }
            | Self::MoePlaces(_)
            | Self::MoeCounts(_)
            | Self::MoeMove(_)
            | Self::AllGather { .. }
            | Self::AllReduce { .. }
            | Self::ReduceScatter { .. }
            | Self::AllToAll { .. }
            | Self::CollectivePermute { .. }
            | Self::Broadcast { .. } => 0.0,
        }
    }

    /// Bytes read and written, each operand once; relabelings move nothing.
    pub fn n_bytes_moved(&self, inputs: &[&TensorType], results: &[&TensorType]) -> f64 {
        let all = |types: &[&TensorType]| types.iter().map(|ty| ty.n_bytes() as f64).sum::<f64>();
        match self {
            Self::Rename { .. } | Self::Split { .. } | Self::Merge { .. } => 0.0,
            Self::Gather { .. } | Self::Slice { .. } => 2.0 * all(results),
            Self::Pick { .. } => 3.0 * all(results),
            Self::MoeCombine(dims) | Self::MoeGateGrad(dims) => {
                let rows = inputs.first().map_or(0.0, |rows| rows.n_bytes() as f64);
                all(inputs) - (1.0 - rows_read(dims, inputs)) * rows + all(results)
            }
            _ => all(inputs) + all(results),
        }
    }

    /// Elements of f32 scratch that the host runtime needs for one execution: attention works on
    /// blocks of [`ATTENTION_BLOCK_ROWS`] queries, holding their scores (and, for the gradient, the
    /// scores' gradient and one value per query) at once. Everything else needs none, nor do tensors
    /// of types that hosts do not compute in.
    pub fn scratch_elements(&self, inputs: &[&TensorType]) -> usize {
        let (Self::Attention(dims) | Self::AttentionGrad(dims)) = self else {
            return 0;
        };
        let kv_len = inputs
            .get(1)
            .filter(|k| k.dtype == DType::F32)
            .and_then(|k| k.size_of(&dims.kv_seq))
            .unwrap_or(0);
        match self {
            Self::AttentionGrad(_) => ATTENTION_BLOCK_ROWS * (2 * kv_len + 1),
            _ => ATTENTION_BLOCK_ROWS * kv_len,
        }
    }

    /// Whether the op runs on the matrix units (a contraction or attention).
    pub fn is_matmul(&self) -> bool {
        matches!(
            self,
            Self::Contract { .. } | Self::Attention(_) | Self::AttentionGrad(_)
        )
    }
}

/// The part of the rows `[expert, b.., slot, ..]`, the first of the inputs, that assignments, the
/// index among them, can be read from.
fn rows_read(dims: &MoeDims, inputs: &[&TensorType]) -> f64 {
    let routes = inputs
        .iter()
        .find(|ty| ty.has(&dims.choice) && ty.has(&dims.seq));
    let size = |dim| routes.and_then(|ty| ty.size_of(dim)).unwrap_or(0);
    // Where tokens are dropped, slots are few, and taken to be full.
    if dims.capacity < size(&dims.seq) {
        return 1.0;
    }
    let n_assigned = (size(&dims.seq) * size(&dims.choice)) as f64;
    (n_assigned / (dims.n_experts * dims.capacity).max(1) as f64).min(1.0)
}
