//! Counted rows: tensors whose groups use their first rows only.
//!
//! Enters: a rank's graph and its steps. Leaves: both, with the counts and the exchanges of counts that
//! the rows need, and for every step the counts that it reads and writes by.
//! Invariant: what stands past the count of its group is never used, so it is neither computed nor
//! sent; a runtime that pays no attention to counts computes the same.
//!
//! Rows `[expert, batch.., slot, embed..]` come from a dispatch of whole sequences, which fills the first
//! slots of every group (expert, batch..). The counts follow the rows through elementwise ops,
//! contractions and collectives. Where an op could look past them (a sum over slots that is no
//! contraction, a result that leaves the step), the rows before it are kept in full, with zeros.
//! This is the dropless dispatcher of MoE Parallel Folding (arXiv 2504.14960, §3.3): the variable
//! all-to-all, all-gather and reduce-scatter, and contractions over the experts' own rows.
//!
//! The analysis looks at kinds and dims alone, so it comes out alike on all ranks of a group.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{Graph, Op, OpId, TensorId, TensorType};
use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{Group, MoeDims, OpKind};

use super::Step;
use crate::codegen::fuse::Item;

/// A step with the counts of its rows.
#[derive(Clone, Debug)]
pub(super) struct CountedStep {
    pub step: Step,
    pub rows: Option<Rows>,
    /// Whether it computes or exchanges counts.
    pub is_added: bool,
}

/// The counts that a step goes by.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Rows {
    /// Of what it reads; of what it writes where it reads no rows.
    pub counts: TensorId,
    /// Of the result of a collective.
    pub result_counts: Option<TensorId>,
    /// The dim that is counted.
    pub slot: Dim,
    /// Part of the slots that is used when experts get equal shares.
    pub share: f64,
}

/// Finds counted rows and adds what counts them. Linear in the ops, times the rounds until no further
/// tensor has to be kept in full.
pub(super) fn count(
    graph: &Graph,
    rank: usize,
    steps: Vec<Step>,
) -> (Cow<'_, Graph>, Vec<CountedStep>) {
    let has_rows = graph
        .ops
        .iter()
        .any(|op| matches!(op.kind, OpKind::MoeDispatch(_)));
    if !has_rows {
        let plain = |step| CountedStep {
            step,
            rows: None,
            is_added: false,
        };
        return (Cow::Borrowed(graph), steps.into_iter().map(plain).collect());
    }
    let mut whole: BTreeSet<TensorId> = graph
        .outputs
        .iter()
        .chain(graph.gradients.values())
        .chain(graph.updates.values())
        .copied()
        .collect();
    whole.extend(steps.iter().filter_map(|step| match step {
        Step::Send { tensor, .. } => Some(*tensor),
        _ => None,
    }));
    loop {
        let mut analysis = Analysis::new(graph, rank);
        let n_whole = whole.len();
        for op in &graph.ops {
            analysis.visit(op, &mut whole);
        }
        if whole.len() == n_whole {
            return analysis.place(steps);
        }
    }
}

/// Index of counts in the analysis.
type CountIdx = usize;

/// One tensor of counts.
struct Counts {
    make: Make,
    /// `[expert, batch..]`.
    ty: TensorType,
    slot: Dim,
    share: f64,
    /// The slots of whose routes these are counts, as they were numbered on this rank.
    origin: TensorId,
    /// Where the counts begin along each dim: the first expert, then from the origin's own beginning.
    /// With the origin and the shape this says all: counts made in two ways are the same.
    starts: Vec<i64>,
    /// Once it is in the graph.
    tensor: Option<TensorId>,
}

impl Counts {
    /// The counts of the same slots for the rows made of these; `None` where they have fewer dims.
    fn again(&self, make: Make, starts: Vec<i64>, rows: &TensorType) -> Option<Self> {
        Some(Self {
            make,
            ty: TensorType {
                dtype: DType::I32,
                shape: rows.shape.get(..self.ty.shape.len())?.to_vec(),
            },
            slot: self.slot.clone(),
            share: self.share,
            origin: self.origin,
            starts,
            tensor: None,
        })
    }
}

#[derive(Clone)]
enum Make {
    /// From routes.
    Routes(MoeDims, [TensorId; 2]),
    /// By the collective that moves the rows, or the slice of what is everywhere.
    Moved(CountIdx, OpKind),
}

struct Analysis<'a> {
    graph: &'a Graph,
    rank: usize,
    producers: Vec<Option<OpId>>,
    counts: Vec<Counts>,
    of: BTreeMap<TensorId, CountIdx>,
}

impl<'a> Analysis<'a> {
    fn new(graph: &'a Graph, rank: usize) -> Self {
        Self {
            graph,
            rank,
            producers: graph.producers(),
            counts: Vec::new(),
            of: BTreeMap::new(),
        }
    }

    /// Notes the counts of an op's result; `whole` grows by the rows that the op may look past.
    fn visit(&mut self, op: &Op, whole: &mut BTreeSet<TensorId>) {
        let read: Vec<TensorId> = (op.inputs.iter().copied())
            .filter(|input| self.of.contains_key(input))
            .collect();
        let is_whole = op.results.iter().any(|result| whole.contains(result));
        let makes_rows = matches!(op.kind, OpKind::MoeDispatch(_) | OpKind::MoeMove(_));
        if (read.is_empty() && !makes_rows) || (makes_rows && is_whole) {
            whole.extend(read);
            return;
        }
        match self.result_counts(op) {
            Some(counts) if counts.is_none() || !is_whole => {
                if let Some(counts) = counts {
                    self.of
                        .extend(op.results.iter().map(|result| (*result, counts)));
                }
            }
            _ => whole.extend(read),
        }
    }

    /// The counts of an op's result, where the op keeps to those of its inputs: `Some(None)` when the
    /// result has no rows, `None` when the op may look past them.
    fn result_counts(&mut self, op: &Op) -> Option<Option<CountIdx>> {
        let counts: Vec<Option<CountIdx>> = op
            .inputs
            .iter()
            .map(|input| self.of.get(input).copied())
            .collect();
        let result = self.graph.ty(*op.results.first()?);
        match (&op.kind, counts.as_slice()) {
            (OpKind::MoeDispatch(dims), [None, ..]) => {
                let &[_, expert, slot, ..] = op.inputs.as_slice() else {
                    return None;
                };
                self.routes(dims, expert, slot, result).map(Some)
            }
            (OpKind::MoeMove(moved), [_, rest @ ..]) if rest.iter().all(Option::is_none) => {
                let &[_, _, _, expert, slot, ..] = op.inputs.as_slice() else {
                    return None;
                };
                self.routes(&moved.dims, expert, slot, result).map(Some)
            }
            (OpKind::MoeCombine(_) | OpKind::MoeGateGrad(_), [Some(_), rest @ ..]) => {
                rest.iter().all(Option::is_none).then_some(None)
            }
            // Row by row, along dims within them.
            (
                OpKind::RmsNorm { .. }
                | OpKind::LayerNorm { .. }
                | OpKind::Softmax { .. }
                | OpKind::Rope { .. }
                | OpKind::Reduce { .. }
                | OpKind::TopK { .. },
                counts,
            ) => {
                let mut known = counts.iter().flatten();
                let first = *known.next()?;
                let alike = known.all(|other| *other == first);
                let mut results = op.results.iter().map(|result| self.graph.ty(*result));
                (alike && results.all(|result| self.leads(first, result))).then_some(Some(first))
            }
            // Queries past the count see nothing and are passed over.
            (OpKind::Attention(dims), [Some(one), None, None, Some(seen)]) => {
                let is_row = dims.seq == self.counts[*one].slot;
                let mut results = op.results.iter().map(|result| self.graph.ty(*result));
                (one == seen && is_row && results.all(|result| self.leads(*one, result)))
                    .then_some(Some(*one))
            }
            (OpKind::Unary(_) | OpKind::Binary(_), counts) => {
                let mut known = counts.iter().flatten();
                let first = *known.next()?;
                let alike = known.all(|other| *other == first);
                (alike && self.leads(first, result)).then_some(Some(first))
            }
            (OpKind::Contract { .. }, &[a, b]) => {
                let slot = &self.counts[a.or(b)?].slot;
                match (a, b) {
                    (Some(a), Some(b)) => (a == b && !result.has(slot)).then_some(None),
                    (Some(one), None) | (None, Some(one)) => {
                        let other = op.inputs[usize::from(a.is_some())];
                        let apart = !self.graph.ty(other).has(slot);
                        (apart && self.leads(one, result)).then_some(Some(one))
                    }
                    (None, None) => None,
                }
            }
            (kind, &[Some(one)]) => self.moved(one, kind, op.inputs[0], result).map(Some),
            _ => None,
        }
    }

    /// Whether a tensor has the dims of the counts first, in their order, and then the slots.
    fn leads(&self, counts: CountIdx, ty: &TensorType) -> bool {
        let Counts {
            ty: groups, slot, ..
        } = &self.counts[counts];
        let n_dims = groups.shape.len();
        ty.shape.get(..n_dims) == Some(groups.shape.as_slice())
            && ty.shape.get(n_dims).is_some_and(|(dim, _)| dim == slot)
    }

    /// The counts of rows dispatched by these routes; `None` when a sequence's slots were numbered
    /// with more of it than is here.
    fn routes(
        &mut self,
        dims: &MoeDims,
        expert: TensorId,
        slot: TensorId,
        rows: &TensorType,
    ) -> Option<CountIdx> {
        let here = self.graph.ty(slot).size_of(&dims.seq)?;
        let groups: Vec<(Dim, usize)> = (rows.shape.iter())
            .take_while(|(dim, _)| *dim != dims.slot)
            .cloned()
            .collect();
        let mut starts = vec![0; groups.len()];
        *starts.first_mut()? = dims.offset as i64;
        let at = |dim: &Dim| groups.iter().position(|(other, _)| other == dim);
        let mut origin = slot;
        let n_experts = loop {
            let op = self.graph.op(self.producers[origin.index()]?);
            match &op.kind {
                OpKind::MoeSlots { n_experts, .. } => break *n_experts,
                kind => self.shift(kind, &mut starts, at)?,
            }
            origin = *op.inputs.first()?;
        };
        if self.graph.ty(origin).size_of(&dims.seq)? != here {
            return None;
        }
        let n_choices = self.graph.ty(slot).size_of(&dims.choice)?;
        let assigned = (n_choices * here) as f64;
        Some(self.known(Counts {
            make: Make::Routes(dims.clone(), [expert, slot]),
            ty: TensorType {
                dtype: DType::I32,
                shape: groups,
            },
            slot: dims.slot.clone(),
            share: (assigned / (n_experts * dims.capacity) as f64).min(1.0),
            origin,
            starts,
            tensor: None,
        }))
    }

    /// Where this rank's groups start after an op; `at`: the place of a dim among those of groups. `None`
    /// of an op that is no move.
    fn shift(
        &self,
        kind: &OpKind,
        starts: &mut [i64],
        at: impl Fn(&Dim) -> Option<usize>,
    ) -> Option<()> {
        match kind {
            OpKind::Slice { dim, start, .. } => starts[at(dim)?] += *start as i64,
            OpKind::AllGather { dim, counts, group } => {
                starts[at(dim)?] -= self.before(counts, group)?;
            }
            OpKind::AllToAll {
                split,
                split_counts,
                concat,
                concat_counts,
                group,
            } => {
                starts[at(split)?] += self.before(split_counts, group)?;
                starts[at(concat)?] -= self.before(concat_counts, group)?;
            }
            _ => return None,
        }
        Some(())
    }

    /// Elements of the members before this rank.
    fn before(&self, counts: &[usize], group: &Group) -> Option<i64> {
        let member_idx = group.ranks.iter().position(|rank| *rank == self.rank)?;
        Some(counts.get(..member_idx)?.iter().sum::<usize>() as i64)
    }

    /// The counts of `rows` after a collective; `None` where rows do not keep together.
    fn moved(
        &mut self,
        from: CountIdx,
        kind: &OpKind,
        rows: TensorId,
        result: &TensorType,
    ) -> Option<CountIdx> {
        let before = &self.counts[from];
        let rows = self.graph.ty(rows);
        // A dim within rows: they may be cut along it if it is all there is.
        let (groups, slot) = (before.ty.clone(), before.slot.clone());
        let is_group = |dim: &Dim| groups.has(dim);
        let is_column = |dim: &Dim| {
            rows.shape.len() == groups.shape.len() + 2 && *dim != slot && !groups.has(dim)
        };
        let slice = |dim: &Dim, counts: &[usize], group: &Group| {
            let start = usize::try_from(self.before(counts, group)?).ok()?;
            let member_idx = group.ranks.iter().position(|rank| *rank == self.rank)?;
            Some(OpKind::Slice {
                dim: dim.clone(),
                start,
                len: *counts.get(member_idx)?,
            })
        };
        // The routes that count some experts count those of all members: nothing is exchanged.
        if let (OpKind::AllGather { dim, counts, group }, Make::Routes(dims, routes)) =
            (kind, &before.make)
            && *dim == dims.expert
        {
            let behind = self.before(counts, group)?;
            let mut starts = before.starts.clone();
            *starts.first_mut()? -= behind;
            let dims = MoeDims {
                n_experts: counts.iter().sum(),
                offset: usize::try_from(dims.offset as i64 - behind).ok()?,
                ..dims.clone()
            };
            let make = Make::Routes(dims, *routes);
            let all = before.again(make, starts, result)?;
            return Some(self.known(all));
        }
        let kind = match kind {
            OpKind::AllToAll { split, concat, .. } if is_group(split) && is_group(concat) => {
                kind.clone()
            }
            // Every rank has the counts of all groups already: those of its part are a slice.
            OpKind::AllToAll {
                split,
                split_counts,
                concat,
                group,
                ..
            } if is_group(split) && is_column(concat) => slice(split, split_counts, group)?,
            OpKind::AllToAll {
                split,
                concat,
                concat_counts,
                group,
                ..
            } if is_column(split) && is_group(concat) => OpKind::AllGather {
                dim: concat.clone(),
                counts: concat_counts.clone(),
                group: group.clone(),
            },
            OpKind::AllGather { dim, .. } if is_group(dim) => kind.clone(),
            OpKind::ReduceScatter {
                kind: ReduceKind::Sum,
                dim,
                counts,
                group,
            } if is_group(dim) => slice(dim, counts, group)?,
            OpKind::AllGather { dim, .. }
            | OpKind::ReduceScatter {
                kind: ReduceKind::Sum,
                dim,
                ..
            } if is_column(dim) => return Some(from),
            OpKind::AllReduce {
                kind: ReduceKind::Sum,
                ..
            } => return Some(from),
            _ => return None,
        };
        let mut starts = before.starts.clone();
        let at = |dim: &Dim| groups.position(dim);
        self.shift(&kind, &mut starts, at)?;
        let counts = before.again(Make::Moved(from, kind), starts, result)?;
        Some(self.known(counts))
    }

    fn known(&mut self, counts: Counts) -> CountIdx {
        let same = self.counts.iter().position(|one| {
            (one.origin, &one.starts, &one.ty) == (counts.origin, &counts.starts, &counts.ty)
        });
        same.unwrap_or_else(|| {
            self.counts.push(counts);
            self.counts.len() - 1
        })
    }

    /// Adds the counts that steps read, each before the first of them.
    fn place(mut self, steps: Vec<Step>) -> (Cow<'a, Graph>, Vec<CountedStep>) {
        let mut graph = self.graph.clone();
        let mut placed = Vec::with_capacity(steps.len());
        for step in steps {
            let rows = match &step {
                Step::Item(item) => self.rows(item, &mut graph, &mut placed),
                Step::Send { .. } | Step::Recv { .. } => None,
            };
            placed.push(CountedStep {
                step,
                rows,
                is_added: false,
            });
        }
        (Cow::Owned(graph), placed)
    }

    fn rows(
        &mut self,
        item: &Item,
        graph: &mut Graph,
        placed: &mut Vec<CountedStep>,
    ) -> Option<Rows> {
        let of = |tensor: &TensorId| self.of.get(tensor).copied();
        let (read, written) = match item {
            Item::Fragment(fragment) => {
                let first = of(fragment.results.first()?)?;
                let alike = (fragment.results.iter()).all(|result| of(result) == Some(first));
                (alike.then_some(first)?, None)
            }
            Item::Contract { a, b, .. } => (of(a).or(of(b))?, None),
            Item::Routine { op } => {
                let op = self.graph.op(*op);
                let is_counted = matches!(
                    op.kind,
                    OpKind::MoeDispatch(_) | OpKind::MoeMove(_) | OpKind::TopK { .. }
                );
                let result = op.results.first().filter(|_| is_counted)?;
                (of(result)?, None)
            }
            Item::Collective { op } => {
                let op = self.graph.op(*op);
                (of(op.inputs.first()?)?, Some(of(op.results.first()?)?))
            }
            Item::Attention { op, .. } => (of(self.graph.op(*op).results.first()?)?, None),
            Item::AttentionGrad { .. } | Item::View { .. } => return None,
        };
        let Counts { slot, share, .. } = &self.counts[read];
        let (slot, share) = (slot.clone(), *share);
        Some(Rows {
            counts: self.tensor(read, graph, placed),
            result_counts: written.map(|written| self.tensor(written, graph, placed)),
            slot,
            share,
        })
    }

    /// The tensor of counts, with the steps that make it when it is read for the first time.
    fn tensor(
        &mut self,
        counts: CountIdx,
        graph: &mut Graph,
        placed: &mut Vec<CountedStep>,
    ) -> TensorId {
        if let Some(tensor) = self.counts[counts].tensor {
            return tensor;
        }
        let (kind, inputs) = match self.counts[counts].make.clone() {
            Make::Routes(dims, routes) => (OpKind::MoeCounts(dims), routes.to_vec()),
            Make::Moved(from, kind) => (kind, vec![self.tensor(from, graph, placed)]),
        };
        let name = match inputs.as_slice() {
            [before] => format!("{}.{}", graph.tensor(*before).name, kind.name()),
            _ => format!("{}.counts", graph.tensor(inputs[1]).name),
        };
        let taken = graph.tensors.iter().filter(|one| one.name == name).count();
        let name = if taken == 0 {
            name
        } else {
            format!("{name}#{counts}")
        };
        let ty = self.counts[counts].ty.clone();
        let is_collective = kind.group().is_some();
        let tensor = graph.add_typed_op(&name, kind, &inputs, ty);
        let op = OpId(graph.ops.len() as u32 - 1);
        let item = if is_collective {
            Item::Collective { op }
        } else {
            Item::Routine { op }
        };
        placed.push(CountedStep {
            step: Step::Item(item),
            rows: None,
            is_added: true,
        });
        self.counts[counts].tensor = Some(tensor);
        tensor
    }
}
