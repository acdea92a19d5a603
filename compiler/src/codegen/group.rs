//! Which ops share a kernel, and where the kernel stands.
//!
//! Enters: the ops of a local graph, each as a draft of its own, in order. Leaves: fewer drafts in
//! a legal order. An op joins the group that makes one of its inputs, or one that reads the same
//! tensor, if both run over one space; a contraction swallows the addition that follows it.
//! Invariants: a draft's inputs are made by drafts before it; collectives are never moved; a group
//! is only moved over drafts that neither read its results nor make its inputs.
//!
//! Moving a group does not lengthen the life of what it makes: it moves *towards* its readers, or
//! forward to where all of its inputs already are.

use meshweave_dsl::graph::{Graph, Op, OpId, Role, TensorId};
use meshweave_dsl::op::{BinaryFn, OpKind};

use super::bias::{BiasAdd, bias_add};
use super::fuse::{Item, Platform, Uses};
use super::space::{LaneUse, Space};

/// Most ops of one kernel; beyond, registers run out and compile times grow.
const MAX_GROUP_OPS: usize = 24;
/// How many drafts back a partner is looked for.
const WINDOW: usize = 128;
/// Fewest lanes of a free space that take row values along, which keep the lanes from merging.
const MIN_LANES_WITH_ROWS: usize = 64;

/// An item before its kernel is made.
#[derive(Clone, Debug)]
pub(super) enum Draft {
    Group(Group),
    Other(Item),
}

/// Ops that will be one kernel.
#[derive(Clone, Debug)]
pub(super) struct Group {
    /// In the graph's order.
    pub ops: Vec<OpId>,
    /// Ops of other groups whose results are computed here once more, in the graph's order.
    pub recomputed: Vec<OpId>,
    /// The space they share.
    pub space: Space,
}

/// Merges drafts, given one by one in the graph's order.
pub(super) struct Grouping<'a> {
    graph: &'a Graph,
    uses: &'a Uses,
    platform: Platform,
    slots: Vec<Option<Draft>>,
    /// The slot that makes each tensor; sources have none.
    made_by: Vec<Option<usize>>,
}

impl<'a> Grouping<'a> {
    pub fn new(graph: &'a Graph, uses: &'a Uses, platform: Platform) -> Self {
        Self {
            graph,
            uses,
            platform,
            slots: Vec::with_capacity(graph.ops.len()),
            made_by: vec![None; graph.tensors.len()],
        }
    }

    /// The merged drafts in order.
    pub fn finish(mut self) -> Vec<Draft> {
        self.recompute();
        self.slots.into_iter().flatten().collect()
    }

    /// Lets a group compute a function of one tensor again, rather than read the result of
    /// another group, where it reads that tensor anyway: neither memory nor traffic grows, and a
    /// result that everybody recomputes is not stored at all.
    fn recompute(&mut self) {
        for slot in 0..self.slots.len() {
            let Some(group) = self.group(slot) else {
                continue;
            };
            for op_id in group.ops.clone() {
                let op = self.graph.op(op_id);
                if let (OpKind::Unary(_), &[input], &[result]) =
                    (&op.kind, op.inputs.as_slice(), op.results.as_slice())
                {
                    self.recompute_in_readers(slot, op_id, input, result);
                }
            }
        }
    }

    fn recompute_in_readers(
        &mut self,
        slot: usize,
        op_id: OpId,
        input: TensorId,
        result: TensorId,
    ) {
        let ty = self.graph.ty(result);
        let mut readers = Vec::new();
        for other in (0..self.slots.len()).filter(|other| *other != slot) {
            let Some(draft) = &self.slots[other] else {
                continue;
            };
            let reads = self.reads(draft);
            if !reads.contains(&result) {
                continue;
            }
            match draft {
                Draft::Group(group)
                    if reads.contains(&input)
                        && group.space.is_full(ty)
                        && group.space.lane_use != LaneUse::Paired
                        && group.ops.iter().all(|op| self.reads_by_value(*op, result)) =>
                {
                    readers.push(other);
                }
                // Somebody needs it in memory, where the others may read it too.
                _ => return,
            }
        }
        if self.uses.outlives(result) {
            return;
        }
        for reader in readers {
            if let Some(Some(Draft::Group(group))) = self.slots.get_mut(reader) {
                group.recomputed.push(op_id);
                group.recomputed.sort_unstable();
            }
        }
    }

    /// Does `op` take `tensor` as a value, if it takes it at all?
    fn reads_by_value(&self, op: OpId, tensor: TensorId) -> bool {
        let op = self.graph.op(op);
        let by_index = matches!(op.kind, OpKind::Gather { .. } | OpKind::Pick { .. });
        !(by_index && op.inputs.first() == Some(&tensor))
    }

    /// Adds the draft of `op_id`.
    pub fn push(&mut self, op_id: OpId, draft: Draft) {
        let op = self.graph.op(op_id);
        if self.add_onto_contraction(op_id, op) || self.add_bias(op_id, op) {
            return;
        }
        let mut at = self.slots.len();
        let is_group = matches!(draft, Draft::Group(_));
        self.put(at, draft);
        while is_group && let Some(partner) = self.partners(at).find_map(|i| self.merge(i, at)) {
            at = partner;
        }
    }

    fn put(&mut self, at: usize, draft: Draft) {
        for tensor in self.results(&draft) {
            self.made_by[tensor.index()] = Some(at);
        }
        if at == self.slots.len() {
            self.slots.push(Some(draft));
        } else {
            self.slots[at] = Some(draft);
        }
    }

    fn group(&self, at: usize) -> Option<&Group> {
        match self.slots.get(at) {
            Some(Some(Draft::Group(group))) => Some(group),
            _ => None,
        }
    }

    fn ops_of(draft: &Draft) -> Vec<OpId> {
        match draft {
            Draft::Group(group) => group.ops.clone(),
            Draft::Other(
                Item::Contract { op, .. }
                | Item::Attention { op, .. }
                | Item::AttentionGrad { op, .. }
                | Item::Routine { op }
                | Item::Collective { op }
                | Item::View { op },
            ) => vec![*op],
            Draft::Other(Item::Fragment(fragment)) => fragment.ops.clone(),
        }
    }

    fn results(&self, draft: &Draft) -> Vec<TensorId> {
        if let Draft::Other(Item::Contract { out, .. }) = draft {
            return vec![*out];
        }
        let ops = Self::ops_of(draft);
        let results = ops.iter().flat_map(|op| &self.graph.op(*op).results);
        results.copied().collect()
    }

    /// Tensors that a draft reads and does not make.
    fn reads(&self, draft: &Draft) -> Vec<TensorId> {
        let mut reads = Vec::new();
        if let Draft::Other(Item::Contract {
            a, b, onto, bias, ..
        }) = draft
        {
            reads.extend([Some(*a), Some(*b), *onto, *bias].into_iter().flatten());
            return reads;
        }
        let made = self.results(draft);
        for op in Self::ops_of(draft) {
            for input in &self.graph.op(op).inputs {
                if !made.contains(input) && !reads.contains(input) {
                    reads.push(*input);
                }
            }
        }
        reads
    }

    // Merging groups.

    /// Slots of groups worth merging with the group at `at`: those that make its inputs, then those
    /// that read a whole tensor that it reads too; the nearest first.
    fn partners(&self, at: usize) -> impl Iterator<Item = usize> + use<> {
        let mut makers = Vec::new();
        let mut siblings = Vec::new();
        if let Some(Some(draft)) = self.slots.get(at)
            && let Some(group) = self.group(at)
        {
            let reads = self.reads(draft);
            for slot in (at.saturating_sub(WINDOW)..at).rev() {
                let Some(other) = self.group(slot) else {
                    continue;
                };
                if reads
                    .iter()
                    .any(|read| self.made_by[read.index()] == Some(slot))
                {
                    makers.push(slot);
                } else if self.accumulates(group) == self.accumulates(other)
                    && let Some(Some(draft)) = self.slots.get(slot)
                    && self.reads(draft).iter().any(|read| {
                        reads.contains(read) && {
                            let ty = self.graph.ty(*read);
                            group.space.is_full(ty) || other.space.is_full(ty)
                        }
                    })
                {
                    siblings.push(slot);
                }
            }
        }
        makers.into_iter().chain(siblings)
    }

    /// Does the group sum over rows, so that its rows cannot be split over threads?
    fn accumulates(&self, group: &Group) -> bool {
        group.ops.iter().any(|op| {
            let op = self.graph.op(*op);
            op.results.iter().any(|result| {
                let ty = self.graph.ty(*result);
                !group.space.is_full(ty) && !group.space.is_rows(ty)
            })
        })
    }

    /// Merges the groups at `first` and `second > first` if that is legal; returns where to.
    fn merge(&mut self, first: usize, second: usize) -> Option<usize> {
        let (a, b) = (self.group(first)?, self.group(second)?);
        if a.ops.len() + b.ops.len() > MAX_GROUP_OPS {
            return None;
        }
        let space = a.space.joined(&b.space)?;
        let takes_rows = a.space.lane != b.space.lane;
        if takes_rows
            && space.lane_use == LaneUse::Free
            && space
                .lane
                .as_ref()
                .is_none_or(|(_, n_lanes)| *n_lanes < MIN_LANES_WITH_ROWS)
        {
            return None;
        }
        let (a_draft, b_draft) = (self.slots[first].as_ref()?, self.slots[second].as_ref()?);
        let made = self.results(a_draft);
        for op in b.ops.iter().map(|op| self.graph.op(*op)) {
            for (input_idx, input) in op.inputs.iter().enumerate() {
                if made.contains(input) && !self.stays_inside(op, input_idx, &space) {
                    return None;
                }
            }
        }

        let mut between = (first + 1..second).filter_map(|slot| self.slots[slot].as_ref());
        let can_delay = between.all(|draft| !self.reads(draft).iter().any(|t| made.contains(t)));
        let at = if can_delay {
            second
        } else {
            let ready = self
                .reads(b_draft)
                .iter()
                .all(|tensor| self.made_by[tensor.index()].is_none_or(|slot| slot <= first));
            if !ready {
                return None;
            }
            first
        };
        let mut ops: Vec<OpId> = a.ops.iter().chain(&b.ops).copied().collect();
        ops.sort_unstable();
        self.slots[first] = None;
        self.slots[second] = None;
        self.put(
            at,
            Draft::Group(Group {
                ops,
                recomputed: Vec::new(),
                space,
            }),
        );
        Some(at)
    }

    /// Can `op` take input `input_idx` as a value made in its own kernel?
    fn stays_inside(&self, op: &Op, input_idx: usize, space: &Space) -> bool {
        // Addressed by index, the input must lie in memory.
        let by_index =
            matches!(op.kind, OpKind::Gather { .. } | OpKind::Pick { .. }) && input_idx == 0;
        let Some(tensor) = op.inputs.get(input_idx) else {
            return false;
        };
        let scattered = self.uses.maker(*tensor).is_some_and(|maker| {
            matches!(
                self.graph.op(maker).kind,
                OpKind::ScatterAdd { .. } | OpKind::Rope { .. }
            )
        });
        let ty = self.graph.ty(*tensor);
        !by_index && !scattered && (space.is_full(ty) || space.is_rows(ty))
    }

    // Contractions with an addition.

    /// If `op` adds a contraction that nobody else reads to a tensor that dies here, the
    /// contraction accumulates onto that tensor instead.
    fn add_onto_contraction(&mut self, op_id: OpId, op: &Op) -> bool {
        let (OpKind::Binary(BinaryFn::Add), &[x, y], &[sum]) =
            (&op.kind, op.inputs.as_slice(), op.results.as_slice())
        else {
            return false;
        };
        let at = self.slots.len();
        let mut best: Option<(usize, TensorId)> = None;
        for (product, onto) in [(x, y), (y, x)] {
            if let Some(slot) = self.contraction_of(op_id, product)
                && self.dies_at(op_id, onto)
                && onto != product
                && self.graph.ty(onto) == self.graph.ty(sum)
                && self.graph.ty(product).shape.len() == self.graph.ty(sum).shape.len()
                && best.is_none_or(|(other, _)| slot > other)
            {
                best = Some((slot, onto));
            }
        }
        let Some((slot, onto)) = best else {
            return false;
        };
        let Some(Draft::Other(Item::Contract { op, a, b, .. })) = self.slots[slot].take() else {
            return false;
        };
        let memory = self.uses.memory_of(onto);
        let is_ready = self.made_by[onto.index()].is_none_or(|made| made < slot);
        let is_unread = self.slots[slot + 1..].iter().flatten().all(|draft| {
            self.reads(draft)
                .iter()
                .all(|read| self.uses.memory_of(*read) != memory)
        });
        let target = if is_ready && is_unread { slot } else { at };
        let item = Item::Contract {
            op,
            a,
            b,
            out: sum,
            onto: Some(onto),
            bias: None,
        };
        self.put(target, Draft::Other(item));
        true
    }

    /// If `op` is an addition that a contraction takes over on a GPU, it does.
    fn add_bias(&mut self, op_id: OpId, op: &Op) -> bool {
        let found = match self.platform {
            Platform::Host => None,
            Platform::Gpu => bias_add(self.graph, self.uses, op_id),
        };
        let (Some(BiasAdd { product, bias }), &[sum]) = (found, op.results.as_slice()) else {
            return false;
        };
        let dtype = |id: TensorId| self.graph.ty(id).dtype;
        if [product, bias].map(dtype) != [dtype(sum); 2] {
            return false;
        }
        let Some(slot) = self.contraction_of(op_id, product) else {
            return false;
        };
        let Some(Draft::Other(Item::Contract { op, a, b, .. })) = self.slots[slot].take() else {
            return false;
        };
        let is_ready = self.made_by[bias.index()].is_none_or(|made| made < slot);
        let at = if is_ready { slot } else { self.slots.len() };
        let item = Item::Contract {
            op,
            a,
            b,
            out: sum,
            onto: None,
            bias: Some(bias),
        };
        self.put(at, Draft::Other(item));
        true
    }

    /// The slot of the plain contraction that makes `tensor` for `reader` alone.
    fn contraction_of(&self, reader: OpId, tensor: TensorId) -> Option<usize> {
        let slot = self.made_by[tensor.index()]?;
        let is_plain = matches!(
            self.slots[slot],
            Some(Draft::Other(Item::Contract {
                onto: None,
                bias: None,
                ..
            }))
        );
        (is_plain && !self.uses.outside(tensor, &[reader])).then_some(slot)
    }

    /// Is `reader` the last to read the memory of `tensor`?
    fn dies_at(&self, reader: OpId, tensor: TensorId) -> bool {
        let memory = self.uses.memory_of(tensor);
        self.graph.tensor(memory).role == Role::Temp && self.uses.last_read(memory) == Some(reader)
    }
}
