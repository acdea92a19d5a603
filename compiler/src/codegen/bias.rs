//! Biases that contractions add themselves, on GPUs.
//!
//! Enters: an addition of a graph. Leaves: the product and the bias, where the contraction takes it over.
//! Invariants: both cuBLASLt's epilogue and the generated kernel express what is taken over: the bias
//! has an element for each row of the product's matrix, or for each column, and lies as the result
//! does. The sum goes to memory either way: where a kernel would add the bias on its way to something
//! else, nothing is gained, and the kernel keeps it.

use meshweave_dsl::graph::{Graph, OpId, TensorId, TensorType};
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{BinaryFn, OpKind};

use super::fuse::Uses;
use super::space::Space;

/// An addition that is a contraction's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BiasAdd {
    /// What the contraction gives, to the addition alone.
    pub product: TensorId,
    pub bias: TensorId,
}

/// The addition `op_id` as a contraction's; `None` where it is none, or is better left to a kernel.
pub(crate) fn bias_add(graph: &Graph, uses: &Uses, op_id: OpId) -> Option<BiasAdd> {
    let op = graph.op(op_id);
    let (OpKind::Binary(BinaryFn::Add), &[x, y], &[sum]) =
        (&op.kind, op.inputs.as_slice(), op.results.as_slice())
    else {
        return None;
    };
    if !goes_to_memory(graph, uses, sum) {
        return None;
    }
    let pairs = [(x, y), (y, x)].into_iter();
    let mut pairs = pairs.filter(|(product, bias)| {
        let maker = uses.maker(*product).map(|maker| graph.op(maker));
        let Some(maker) = maker.filter(|_| !uses.outside(*product, &[op_id])) else {
            return false;
        };
        matches!(maker.kind, OpKind::Contract { .. })
            && graph.ty(*product).shape == graph.ty(sum).shape
            && lies_along_a_side(graph.ty(sum), graph.ty(*bias), &maker.inputs, graph)
    });
    let (product, bias) = pairs.next()?;
    Some(BiasAdd { product, bias })
}

/// Whether the kernel of the only reader of `sum` could not make it on its way.
fn goes_to_memory(graph: &Graph, uses: &Uses, sum: TensorId) -> bool {
    let (&[reader], false) = (uses.readers(sum), uses.outlives(sum)) else {
        return true;
    };
    let types = |ids: &[TensorId]| ids.iter().map(|id| graph.ty(*id)).collect::<Vec<_>>();
    let reader = graph.op(reader);
    let space = Space::of(
        &reader.kind,
        &types(&reader.inputs),
        &types(&reader.results),
    );
    let own = Space::of(&OpKind::Binary(BinaryFn::Add), &[], &[graph.ty(sum)]);
    let joined = space.zip(own).and_then(|(space, own)| own.joined(&space));
    joined.is_none()
}

/// Whether the bias has all dims of the result that come from one of the two operands alone, those
/// are the result's last, and all three tensors have them together and in the same order, so that each
/// of them walks them as one.
fn lies_along_a_side(
    sum: &TensorType,
    bias: &TensorType,
    operands: &[TensorId],
    graph: &Graph,
) -> bool {
    let &[a, b] = operands else {
        return false;
    };
    let of_bias: Vec<&Dim> = bias.dims().collect();
    let is_last =
        !of_bias.is_empty() && of_bias.len() < sum.shape.len() && sum.shape.ends_with(&bias.shape);
    let is_own = |own: &TensorType, other: &TensorType| {
        let dims: Vec<&Dim> = own.dims().collect();
        dims.windows(of_bias.len()).any(|dims| dims == of_bias)
            && sum
                .dims()
                .all(|dim| of_bias.contains(&dim) == (own.has(dim) && !other.has(dim)))
    };
    let (a, b) = (graph.ty(a), graph.ty(b));
    is_last && (is_own(a, b) || is_own(b, a))
}
