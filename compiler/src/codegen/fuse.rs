//! From a local graph to what its rank executes, item by item.
//!
//! Enters: the local graph of one rank. Leaves: [`Item`]s in a legal execution order: fused
//! fragments with their kernels, contractions, attention, routines, collectives and views.
//! Invariants: an item's inputs are made by items before it; collectives keep the graph's order,
//! which is the same on all ranks; every tensor that another item reads, or that outlives the step,
//! is a result of the item that makes it.

use std::collections::BTreeMap;

use meshweave_dsl::graph::{Graph, Op, OpId, TensorId, TensorType};
use meshweave_dsl::op::OpKind;

use super::attention::{Sight, attention_softmax, attention_softmax_grad};
use super::group::{Draft, Group, Grouping};
use super::kernel::{Kernel, KernelError};
use super::row_ops::lower_group;
use super::space::Space;

/// A graph that cannot be turned into items.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FuseError {
    /// An op that host kernels do not compute yet.
    #[error("`{op}`: {reason}")]
    Unsupported {
        /// Name of the op.
        op: String,
        /// Why, and what to do instead.
        reason: String,
    },
    /// Our bug.
    #[error("internal error in fusion: {message}")]
    Internal {
        /// What is wrong.
        message: String,
    },
}

impl From<KernelError> for FuseError {
    fn from(error: KernelError) -> Self {
        Self::Internal {
            message: error.to_string(),
        }
    }
}

/// What the items are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Platform {
    /// Hosts, whose library of products adds no bias.
    Host,
    /// GPUs foremost; hosts run the items too, where they store f32 alone.
    Gpu,
}

/// One step of a rank.
#[derive(Clone, Debug)]
pub enum Item {
    /// A generated kernel for a group of ops.
    Fragment(Fragment),
    /// out = a · b, or with `onto`: out = onto + a · b, where out may take over the memory of
    /// `onto` if nobody reads that later; or with `bias` (see [`super::bias`]): out = a · b + bias.
    Contract {
        op: OpId,
        a: TensorId,
        b: TensorId,
        out: TensorId,
        onto: Option<TensorId>,
        bias: Option<TensorId>,
    },
    /// Blockwise attention with the softmax kernel of [`super::attention`].
    Attention { op: OpId, softmax: Kernel },
    /// Its gradient.
    AttentionGrad { op: OpId, softmax: Kernel },
    /// An op that the runtime has a routine for.
    Routine { op: OpId },
    /// A collective.
    Collective { op: OpId },
    /// The result is the input's memory.
    View { op: OpId },
}

impl Item {
    /// The same item in another graph, where `op` and `tensor` give the ids of its ops and tensors.
    #[must_use]
    pub fn renumbered(
        &self,
        op: impl Fn(OpId) -> OpId,
        tensor: impl Fn(TensorId) -> TensorId,
    ) -> Self {
        let mut item = self.clone();
        match &mut item {
            Self::Fragment(fragment) => {
                fragment.ops.iter_mut().for_each(|id| *id = op(*id));
                let args = fragment.args.iter_mut().chain(&mut fragment.results);
                args.for_each(|id| *id = tensor(*id));
                for (result, input) in &mut fragment.in_place {
                    (*result, *input) = (tensor(*result), tensor(*input));
                }
            }
            Self::Contract {
                op: id,
                a,
                b,
                out,
                onto,
                bias,
            } => {
                *id = op(*id);
                for one in [a, b, out].into_iter().chain(onto).chain(bias) {
                    *one = tensor(*one);
                }
            }
            Self::Attention { op: id, .. }
            | Self::AttentionGrad { op: id, .. }
            | Self::Routine { op: id }
            | Self::Collective { op: id }
            | Self::View { op: id } => *id = op(*id),
        }
        item
    }
}

/// A fused group.
#[derive(Clone, Debug)]
pub struct Fragment {
    /// Name of its first op.
    pub name: String,
    /// Its ops, in order.
    pub ops: Vec<OpId>,
    /// The code.
    pub kernel: Kernel,
    /// The tensor of each kernel argument, in argument order.
    pub args: Vec<TensorId>,
    /// The tensors that it writes; those of its ops that nobody else reads are never in memory.
    pub results: Vec<TensorId>,
    /// (result, input): may share memory, because each element is read before it is written.
    pub in_place: Vec<(TensorId, TensorId)>,
}

/// Groups the ops of `graph` for a platform.
///
/// # Errors
/// `Unsupported` for ops that neither a kernel nor a routine computes, `Internal` for a broken graph.
pub fn fuse(graph: &Graph, platform: Platform) -> Result<Vec<Item>, FuseError> {
    let uses = Uses::new(graph);
    let mut grouping = Grouping::new(graph, &uses, platform);
    for (op_id, op) in graph.ops() {
        grouping.push(op_id, draft(graph, op_id, op)?);
    }
    let drafts = grouping.finish();
    // Readers that compute a result again do not read it.
    let mut recomputing: BTreeMap<OpId, Vec<OpId>> = BTreeMap::new();
    for draft in &drafts {
        if let Draft::Group(group) = draft {
            for op in &group.recomputed {
                recomputing.entry(*op).or_default().extend(&group.ops);
            }
        }
    }
    drafts
        .into_iter()
        .map(|draft| finish(graph, &uses, &recomputing, draft))
        .collect()
}

fn draft(graph: &Graph, op_id: OpId, op: &Op) -> Result<Draft, FuseError> {
    let inputs: Vec<&TensorType> = op.inputs.iter().map(|id| graph.ty(*id)).collect();
    let results: Vec<&TensorType> = op.results.iter().map(|id| graph.ty(*id)).collect();
    if let Some(space) = Space::of(&op.kind, &inputs, &results) {
        return Ok(Draft::Group(Group {
            ops: vec![op_id],
            recomputed: Vec::new(),
            space,
        }));
    }
    let arity = || FuseError::Internal {
        message: format!(
            "`{}` has {} inputs and {} results",
            graph.op_name(op),
            op.inputs.len(),
            op.results.len()
        ),
    };
    let item = match &op.kind {
        OpKind::Contract { .. } => match (op.inputs.as_slice(), op.results.as_slice()) {
            (&[a, b], &[out]) => Item::Contract {
                op: op_id,
                a,
                b,
                out,
                onto: None,
                bias: None,
            },
            _ => return Err(arity()),
        },
        OpKind::Attention(dims) => match (inputs.as_slice(), results.as_slice()) {
            ([_, k, _, seen @ ..], [_, lse]) => Item::Attention {
                op: op_id,
                softmax: {
                    let sight = match seen {
                        [] => Sight::ByPlace,
                        _ => Sight::Counted,
                    };
                    attention_softmax(dims, k, lse, sight)?
                },
            },
            _ => return Err(arity()),
        },
        OpKind::AttentionGrad(dims) => match inputs.as_slice() {
            [_, k, _, _, lse, _] => Item::AttentionGrad {
                op: op_id,
                softmax: attention_softmax_grad(dims, k, lse)?,
            },
            _ => return Err(arity()),
        },
        OpKind::Rename { .. } | OpKind::Split { .. } | OpKind::Merge { .. } => {
            Item::View { op: op_id }
        }
        OpKind::Transpose { .. }
        | OpKind::Slice { .. }
        | OpKind::Concat { .. }
        | OpKind::TopK { .. }
        | OpKind::TopKGrad { .. }
        | OpKind::MoeSlots { .. }
        | OpKind::MoePlaces(_)
        | OpKind::MoeDispatch(_)
        | OpKind::MoeCombine(_)
        | OpKind::MoeGateGrad(_)
        | OpKind::MoeCounts(_)
        | OpKind::MoeMove(_) => Item::Routine { op: op_id },
        OpKind::AllGather { .. }
        | OpKind::AllReduce { .. }
        | OpKind::ReduceScatter { .. }
        | OpKind::AllToAll { .. }
        | OpKind::CollectivePermute { .. }
        | OpKind::Broadcast { .. } => Item::Collective { op: op_id },
        OpKind::Gather { .. }
        | OpKind::ScatterAdd { .. }
        | OpKind::Unary(_)
        | OpKind::Binary(_)
        | OpKind::Reduce { .. }
        | OpKind::Expand { .. }
        | OpKind::RmsNorm { .. }
        | OpKind::RmsNormGrad { .. }
        | OpKind::LayerNorm { .. }
        | OpKind::LayerNormGrad { .. }
        | OpKind::Softmax { .. }
        | OpKind::SoftmaxGrad { .. }
        | OpKind::Rope { .. }
        | OpKind::Pick { .. }
        | OpKind::CrossEntropyGrad { .. }
        | OpKind::Adamw { .. }
        | OpKind::Sgd { .. } => return Err(arity()),
    };
    Ok(Draft::Other(item))
}

fn finish(
    graph: &Graph,
    uses: &Uses,
    recomputing: &BTreeMap<OpId, Vec<OpId>>,
    draft: Draft,
) -> Result<Item, FuseError> {
    let group = match draft {
        Draft::Other(item) => return Ok(item),
        Draft::Group(group) => group,
    };
    let mut made: Vec<TensorId> = Vec::new();
    let mut stored: Vec<TensorId> = Vec::new();
    for op in &group.ops {
        let recomputed = recomputing.get(op).map_or(&[] as &[OpId], Vec::as_slice);
        let inside: Vec<OpId> = group.ops.iter().chain(recomputed).copied().collect();
        for result in &graph.op(*op).results {
            made.push(*result);
            if uses.outside(*result, &inside) {
                stored.push(*result);
            }
        }
    }
    if stored.is_empty() {
        // Nobody reads anything: keep one result, so that the kernel has an effect.
        stored.extend(made.last());
    }
    let mut ops: Vec<OpId> = group.ops.iter().chain(&group.recomputed).copied().collect();
    ops.sort_unstable();
    let lowered = lower_group(graph, &ops, &group.space, &stored)?;
    let mut in_place = Vec::new();
    for result in &lowered.results {
        for arg in &lowered.args {
            if lowered.results.contains(arg)
                || graph.ty(*arg).n_bytes() != graph.ty(*result).n_bytes()
            {
                continue;
            }
            // Another argument that shows the same memory in another shape would see new values.
            let has_view = lowered
                .args
                .iter()
                .any(|other| other != arg && uses.memory_of(*other) == uses.memory_of(*arg));
            let program = lowered.kernel.program();
            if !has_view && program.in_place(lowered.arg_of[arg], lowered.arg_of[result]) {
                in_place.push((*result, *arg));
            }
        }
    }
    let name = group
        .ops
        .first()
        .map_or("", |op| graph.op_name(graph.op(*op)))
        .to_string();
    Ok(Item::Fragment(Fragment {
        name,
        ops: group.ops,
        kernel: lowered.kernel,
        args: lowered.args,
        results: lowered.results,
        in_place,
    }))
}

/// Who makes and reads what, and what is memory of what.
pub(crate) struct Uses {
    makers: Vec<Option<OpId>>,
    readers: Vec<Vec<OpId>>,
    /// Outputs, gradients and updates: read after the step.
    outlives: Vec<bool>,
    /// The tensor whose memory each tensor is.
    memory: Vec<TensorId>,
    /// The last op that reads the memory of each tensor that owns some; `None` if that is read
    /// after the step or never.
    last_read: Vec<Option<OpId>>,
}

impl Uses {
    pub(crate) fn new(graph: &Graph) -> Self {
        let mut outlives = vec![false; graph.tensors.len()];
        let kept = graph.outputs.iter().chain(graph.gradients.values());
        for tensor in kept.chain(graph.updates.values()) {
            outlives[tensor.index()] = true;
        }
        let mut memory: Vec<TensorId> = graph.tensor_ids().collect();
        let mut last_read = vec![None; graph.tensors.len()];
        for (op_id, op) in graph.ops() {
            let is_view = matches!(
                op.kind,
                OpKind::Rename { .. } | OpKind::Split { .. } | OpKind::Merge { .. }
            );
            if let (true, [input], [result]) =
                (is_view, op.inputs.as_slice(), op.results.as_slice())
            {
                memory[result.index()] = memory[input.index()];
            }
            for input in &op.inputs {
                last_read[memory[input.index()].index()] = Some(op_id);
            }
        }
        for tensor in graph.tensor_ids() {
            if outlives[tensor.index()] {
                last_read[memory[tensor.index()].index()] = None;
            }
        }
        Self {
            makers: graph.producers(),
            readers: graph.consumers(),
            outlives,
            memory,
            last_read,
        }
    }

    /// The op that makes `tensor`; `None` for sources.
    pub(super) fn maker(&self, tensor: TensorId) -> Option<OpId> {
        self.makers[tensor.index()]
    }

    /// The ops that read `tensor`, in order.
    pub(super) fn readers(&self, tensor: TensorId) -> &[OpId] {
        &self.readers[tensor.index()]
    }

    /// Is `tensor` read after the step?
    pub(super) fn outlives(&self, tensor: TensorId) -> bool {
        self.outlives[tensor.index()]
    }

    /// Is `tensor` read by ops other than `ops`, or after the step?
    pub(super) fn outside(&self, tensor: TensorId, ops: &[OpId]) -> bool {
        self.outlives[tensor.index()]
            || self.readers[tensor.index()]
                .iter()
                .any(|reader| !ops.contains(reader))
    }

    /// The tensor whose memory `tensor` is.
    pub(super) fn memory_of(&self, tensor: TensorId) -> TensorId {
        self.memory[tensor.index()]
    }

    /// The last op that reads the memory owned by `owner`; `None` if it is read after the step.
    pub(super) fn last_read(&self, owner: TensorId) -> Option<OpId> {
        self.last_read[owner.index()]
    }
}
