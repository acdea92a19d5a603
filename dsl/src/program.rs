//! Programs: what each rank executes, with every address fixed.
//!
//! Enters: the lowering of a partitioned graph. Leaves: instructions over an arena, for the runtime.
//! Invariant: every buffer lies inside its rank's arena; two buffers overlap only when they are not
//! alive together or when one is a view of the other; collectives of a group stand in the same order
//! on all its ranks; a channel's messages are received in the order in which they are sent.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::graph::{Role, TensorType};
use crate::layout::{Interval, Layout, Mesh};
use crate::name::{Axis, Dim};
use crate::op::{AttentionDims, Group, OpKind};

/// Version of the program form; an artifact of another version is refused.
pub const PROGRAM_VERSION: u32 = 3;

/// Index of a buffer in its rank's program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BufferId(pub u32);

/// Index of a kernel in the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KernelId(pub u32);

impl BufferId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl KernelId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A compiled program for all ranks of a mesh.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Program {
    pub version: u32,
    pub name: String,
    pub mesh: Mesh,
    pub kernels: Vec<KernelSymbol>,
    /// Inputs, parameters, states and constants of the global graph.
    pub sources: Vec<GlobalTensor>,
    /// Outputs (the loss first) and, when asked for, gradients.
    pub outputs: Vec<GlobalTensor>,
    /// The ways of messages between ranks, one for each pair and direction in use.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub channels: Vec<Channel>,
    /// Of the document's statements those about each axis of the mesh, with their places, such as
    /// "`mesh main = dp:2` (plan.weave:5)": for messages.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub statements: BTreeMap<Axis, Vec<String>>,
    pub ranks: Vec<RankProgram>,
}

/// An ordered way of messages from one rank to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Channel {
    pub from: usize,
    pub to: usize,
    /// Messages that may be under way; a further one waits until the first is received.
    pub depth: usize,
    /// Bytes of the greatest message.
    pub n_bytes: usize,
}

/// Whether an op takes tokens from expert to expert; weights of replicas travel in the same way.
fn moves_tokens(op: &OpKind) -> bool {
    matches!(op, OpKind::MoeMove(moved) if !moved.weights)
}

impl Action {
    /// The ranks that do it together; `None` for what a rank does alone, and for messages.
    pub fn group(&self) -> Option<&Group> {
        match self {
            Self::Collective { op, .. } | Self::Routine { op, .. } => op.group(),
            _ => None,
        }
    }
}

impl Program {
    /// Whether tokens go from expert to expert without coming home.
    pub fn moves_tokens(&self) -> bool {
        let mut all = self.ranks.iter().flat_map(|rank| &rank.instructions);
        all.any(|instruction| match &instruction.action {
            Action::Routine { op, .. } => moves_tokens(op),
            _ => false,
        })
    }

    /// Whether an instruction gathers what everybody needs of tokens that do not come home.
    pub fn gathers_context(&self, instruction: &Instruction) -> bool {
        let gathers = matches!(
            &instruction.action,
            Action::Collective {
                op: OpKind::AllGather { .. },
                ..
            }
        );
        instruction.rows.is_some() && gathers && self.moves_tokens()
    }

    /// Exchanges of tokens in a step: all_to_alls of rows, and moves among ranks.
    pub fn n_token_exchanges(&self) -> usize {
        let first = self
            .ranks
            .first()
            .map_or(&[][..], |rank| &rank.instructions);
        let exchanges = first.iter().filter(|one| match &one.action {
            Action::Collective { op, .. } => {
                one.rows.is_some() && matches!(op, OpKind::AllToAll { .. })
            }
            Action::Routine { op, .. } => moves_tokens(op) && op.group().is_some(),
            _ => false,
        });
        exchanges.count()
    }

    /// Bytes of the channels that end at a rank, besides its arena.
    pub fn channel_bytes(&self, rank: usize) -> usize {
        let ending = self.channels.iter().filter(|channel| channel.to == rank);
        ending.map(|channel| channel.depth * channel.n_bytes).sum()
    }
}

/// A generated function `void name(void** args, int64 begin, int64 end)` of the kernel object:
/// it computes rows `begin..end` of its `n_rows`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelSymbol {
    pub name: String,
    /// What it computes, for people.
    pub description: String,
    /// Whether disjoint row ranges may run at the same time.
    pub splittable: bool,
    pub n_rows: usize,
}

/// A tensor of the global graph and where its parts are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GlobalTensor {
    pub name: String,
    pub ty: TensorType,
    pub role: Role,
    pub layout: Layout,
    /// Together they hold the whole tensor; a rank may hold none, one or several.
    pub parts: Vec<TensorPart>,
}

/// A part of a global tensor on one rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorPart {
    pub rank: usize,
    pub buffer: BufferId,
    /// One interval a dim.
    pub region: Vec<Interval>,
}

/// One rank's instructions and memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankProgram {
    /// Bytes of the arena: the predicted peak, and what the runtime allocates.
    pub arena_bytes: usize,
    pub buffers: Vec<Buffer>,
    pub instructions: Vec<Instruction>,
    /// What the instructions belong to, in order, where the step is a schedule of several pieces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spans: Vec<Span>,
}

/// The instructions of one action of a schedule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Such as `2F0`: stage 2, forward, microbatch 0.
    pub label: String,
    /// Index of its first instruction; it ends where the next span begins.
    pub first: usize,
}

/// A typed place in the arena.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Buffer {
    pub name: String,
    /// Bytes from the start of the arena; a multiple of 64 unless it is a view.
    pub offset: usize,
    pub ty: TensorType,
    /// Kept between steps (sources), not reused within one.
    pub persistent: bool,
}

/// One instruction with its price.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Instruction {
    /// The op it comes from (the first one of a fused fragment).
    pub name: String,
    pub action: Action,
    /// Floating-point operations of one execution.
    pub n_flops: f64,
    /// Bytes read and written, or sent by this rank for a collective.
    pub n_bytes: f64,
    /// Predicted duration in seconds.
    pub predicted_s: f64,
    /// Bytes of the arena alive while it runs (persistent buffers included).
    pub live_bytes: usize,
    /// Rows that it may keep to; without them, or for a runtime that pays no attention to them, all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<CountedRows>,
}

/// Rows of which the first of each group are used. What stands after them is never read.
///
/// Tensors of rows are `[dims of the counts.., slot, ..]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CountedRows {
    /// i32, a number of rows for every group: of what is read, or written where no rows are read.
    pub counts: BufferId,
    /// Of the result of a collective.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result_counts: Option<BufferId>,
    /// The dim whose first elements count.
    pub slot: Dim,
    /// Positions of the dims of the counts, then of the slots, among a contraction's indices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub indices: Vec<usize>,
}

/// What an instruction does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// A generated kernel over all its rows.
    Kernel {
        kernel: KernelId,
        args: Vec<BufferId>,
    },
    /// c = a · b, or c += a · b, with a bias or without.
    Contract {
        a: BufferId,
        b: BufferId,
        c: BufferId,
        indices: Vec<ContractIndex>,
        accumulate: bool,
        /// Added to the result, in programs for GPUs.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bias: Option<Bias>,
    },
    /// Blockwise attention: products by the contraction library, the softmax by a generated kernel.
    Attention {
        dims: AttentionDims,
        q: BufferId,
        k: BufferId,
        v: BufferId,
        o: BufferId,
        lse: BufferId,
        /// How many keys each query sees, where that does not follow from its place.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seen: Option<BufferId>,
        scratch: BufferId,
        kernel: KernelId,
    },
    /// Its gradient, with P recomputed from lse.
    AttentionGrad {
        dims: AttentionDims,
        /// q, k, v, o, lse, do.
        inputs: [BufferId; 6],
        /// dq, dk, dv.
        results: [BufferId; 3],
        scratch: BufferId,
        kernel: KernelId,
    },
    /// Data-dependent or purely moving ops that the runtime has a routine for: routing, transpose,
    /// slice, concat.
    Routine {
        op: OpKind,
        inputs: Vec<BufferId>,
        results: Vec<BufferId>,
    },
    /// A collective of the group inside `op`, over the types of the buffers.
    Collective {
        op: OpKind,
        src: BufferId,
        dst: BufferId,
    },
    /// A message into the channel to another rank; waits only while that is full.
    Send { to: usize, src: BufferId },
    /// The next message of the channel from another rank.
    Recv { from: usize, dst: BufferId },
}

/// What a contraction adds along some dims of its result, of whose type it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bias {
    pub buffer: BufferId,
    /// In elements, one for each of the contraction's indices; 0 where it does not have the index.
    pub strides: Vec<usize>,
}

impl Bias {
    /// Elements that the buffer must hold for a contraction of these indices; `None` where there is not
    /// a stride for each of them, or one along what is summed.
    pub fn span(&self, indices: &[ContractIndex]) -> Option<usize> {
        let along = indices.iter().zip(&self.strides);
        let mut along = along.filter(|(_, stride)| **stride > 0);
        if self.strides.len() != indices.len() || along.clone().any(|(index, _)| index.c == 0) {
            return None;
        }
        along.try_fold(1_usize, |span, (index, stride)| {
            span.checked_add(index.size.saturating_sub(1).checked_mul(*stride)?)
        })
    }
}

/// One loop of a contraction: its length and its strides, in elements, in each operand (0 where
/// the operand does not have it).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ContractIndex {
    pub size: usize,
    pub a: usize,
    pub b: usize,
    pub c: usize,
}
