//! Pieces: what one action of a schedule computes, as a graph of its own.
//!
//! Enters: the training graph of a microbatch with the part of every op. Leaves, for every stage and
//! kind of action, local graphs for the ranks of the stage with their items, and what each input and
//! output is to the others.
//! Invariants: a value that passes between pieces has one layout, the same for its maker and all its
//! readers; sums over microbatches keep the partial values of their makers, so that they are reduced
//! once a step, in the update; what several slices give to one gradient is one sum.

use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::verify::{verify_global, verify_local, verify_ranks};
use meshweave_dsl::graph::{Graph, Op, OpId, Role, TensorId};
use meshweave_dsl::layout::{Layout, Mesh, ReduceKind};
use meshweave_dsl::name::Axis;
use meshweave_dsl::op::{BinaryFn, OpKind, PARTIAL_FACTOR};
use meshweave_dsl::pipeline::{OpPart, Phase, PipelinePlan};
use meshweave_dsl::plan::{Placement, Plan};
use meshweave_dsl::schedule::{ActionKind, Updates};

use super::{PipelineError, Result, name};
use crate::codegen::fuse::{Item, Platform, fuse};
use crate::partition::{Keep, partition_to};
use crate::reshard::{largest_local_type, reshard_path};
use crate::simplify::{self, simplify_ranks};
use crate::storage::Storage;

/// What a piece does in its stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Work {
    Action(ActionKind),
    /// Sums over microbatches and copies are reduced and applied.
    Update,
}

/// Pieces are equal when these are.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    /// Of the model, whatever the copy.
    pub(super) stage: usize,
    pub(super) work: Work,
    /// Of the sequence; 0 for updates.
    pub(super) slice: usize,
    /// Sums that begin with this piece; it adds to the others.
    pub(super) first: BTreeSet<TensorId>,
}

/// What an input or output of a piece is to the other pieces, by tensors of the microbatch's graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Slot {
    /// Kept between steps, or given at each; inputs of the graph have one for every microbatch.
    Source(TensorId),
    /// A microbatch's value.
    Value(TensorId),
    /// The sum over the microbatches so far that ran through this copy of the model.
    Sum(TensorId, usize),
    /// What the step gives: an output or a gradient.
    Result(TensorId),
}

/// A compiled piece.
pub(super) struct Piece {
    /// One a rank of the stage.
    pub(super) locals: Vec<Graph>,
    pub(super) items: Vec<Vec<Item>>,
    /// Of every source of the local graphs, in their order.
    pub(super) inputs: Vec<Slot>,
    /// Of every output of the local graphs, in their order.
    pub(super) outputs: Vec<Slot>,
}

/// A microbatch's graph by its pieces.
pub(super) struct Pieces<'a> {
    pub(super) graph: &'a Graph,
    pub(super) plan: &'a Plan,
    pub(super) pipeline: &'a PipelinePlan,
    pub(super) keep: Keep,
    pub(super) cluster: &'a Cluster,
    platform: Platform,
    /// Where values are stored in other types than the graph's.
    storage: Option<Storage>,
    producers: Vec<Option<OpId>>,
    consumers: Vec<Vec<OpId>>,
    /// Layouts of the values that pass between pieces.
    layouts: BTreeMap<TensorId, Layout>,
    /// What the update of a stage gives: outputs, and gradients when they are kept.
    results: BTreeMap<TensorId, usize>,
    /// Of what slices give to one gradient, and of its sum: the one that stands for all of them.
    joined: BTreeMap<TensorId, TensorId>,
    compiled: BTreeMap<Key, Piece>,
}

impl<'a> Pieces<'a> {
    pub(super) fn new(
        graph: &'a Graph,
        plan: &'a Plan,
        pipeline: &'a PipelinePlan,
        keep: Keep,
        cluster: &'a Cluster,
        platform: Platform,
    ) -> Self {
        let mut pieces = Self {
            graph,
            plan,
            pipeline,
            keep,
            cluster,
            platform,
            storage: Storage::of(graph, plan.storage),
            producers: graph.producers(),
            consumers: graph.consumers(),
            layouts: BTreeMap::new(),
            results: BTreeMap::new(),
            joined: BTreeMap::new(),
            compiled: BTreeMap::new(),
        };
        let mut results: Vec<TensorId> = graph.outputs.clone();
        if keep == Keep::Gradients {
            results.extend(graph.gradients.values());
        }
        for id in results {
            if let Some(part) = pieces.maker(id) {
                pieces.results.insert(id, part.stage);
            }
        }
        if keep == Keep::Gradients {
            for (param, gradient) in &graph.gradients {
                // At home, where the parameter's layout is.
                if let Some(home) = pieces.home(*param) {
                    pieces.results.insert(*gradient, home);
                }
            }
        }
        pieces.join_slices();
        for id in graph.tensor_ids() {
            if pieces.passes(id) {
                let layout = pieces.passing_layout(id);
                pieces.layouts.insert(id, layout);
            }
        }
        pieces
    }

    /// Finds the additions in updates of what the slices of a sequence give to one gradient: they are
    /// summed as microbatches are, into one buffer.
    fn join_slices(&mut self) {
        let schedule = &self.pipeline.schedule;
        // Where every microbatch begins anew, its slices would, too.
        if schedule.n_slices < 2 || schedule.updates == Updates::EveryMicrobatch {
            return;
        }
        let mut members: BTreeMap<TensorId, Vec<TensorId>> = BTreeMap::new();
        for (op, part) in self.graph.ops.iter().zip(&self.pipeline.parts) {
            let is_addition = op.kind == OpKind::Binary(BinaryFn::Add);
            let ([x, y], [sum]) = (op.inputs.as_slice(), op.results.as_slice()) else {
                continue;
            };
            if part.phase != Phase::Update || !is_addition {
                continue;
            }
            // A sum goes into a further one where nothing else reads it.
            let is_passed_on = |id: &TensorId| {
                self.consumers[id.index()].len() == 1 && !self.results.contains_key(id)
            };
            let of = |id: &TensorId| {
                let sum = members.get(id).filter(|_| is_passed_on(id));
                sum.cloned().unwrap_or_else(|| vec![*id])
            };
            let all = [of(x), of(y)].concat();
            if all.iter().all(|id| self.is_given_by_slice(*id)) && self.are_alike(&all) {
                members.insert(*sum, all);
            }
        }
        for (sum, all) in members {
            let first = all.iter().min().copied().unwrap_or(sum);
            self.joined
                .extend(all.into_iter().chain([sum]).map(|id| (id, first)));
        }
    }

    /// Whether an action gives it to one addition in an update and to nothing else.
    fn is_given_by_slice(&self, id: TensorId) -> bool {
        let is_made = self
            .maker(id)
            .is_some_and(|part| part.phase != Phase::Update);
        is_made && self.consumers[id.index()].len() == 1 && !self.results.contains_key(&id)
    }

    /// Whether they can share a buffer: of one stage, of a slice each, of one type and layout.
    fn are_alike(&self, all: &[TensorId]) -> bool {
        let parts: Vec<OpPart> = all.iter().filter_map(|id| self.maker(*id)).collect();
        let slices: BTreeSet<usize> = parts.iter().map(|part| part.slice).collect();
        let first = all[0];
        slices.len() == all.len()
            && parts.iter().all(|part| part.stage == parts[0].stage)
            && all.iter().all(|id| {
                self.graph.ty(*id) == self.graph.ty(first)
                    && self.sum_layout(*id) == self.sum_layout(first)
            })
    }

    /// The sum that a value is added to, or is: its own, or that of all slices.
    pub(super) fn sum_of(&self, id: TensorId) -> TensorId {
        self.joined.get(&id).copied().unwrap_or(id)
    }

    /// The part that makes a tensor; none for sources.
    pub(super) fn maker(&self, id: TensorId) -> Option<OpPart> {
        let op = self.producers[id.index()]?;
        self.pipeline.parts.get(op.index()).copied()
    }

    /// The parts that read a tensor.
    pub(super) fn readers(&self, id: TensorId) -> impl Iterator<Item = OpPart> + '_ {
        let readers = self.consumers[id.index()].iter();
        readers.map(|op| self.pipeline.parts[op.index()])
    }

    /// The stages whose actions, or updates, read a source.
    pub(super) fn stages_reading(&self, id: TensorId) -> BTreeSet<usize> {
        self.readers(id).map(|part| part.stage).collect()
    }

    /// The stage that updates a parameter: the first that reads it.
    pub(super) fn home(&self, param: TensorId) -> Option<usize> {
        let updating = self.readers(param).find(|part| part.phase == Phase::Update);
        updating
            .map(|part| part.stage)
            .or_else(|| self.readers(param).map(|part| part.stage).min())
    }

    /// Whether a microbatch's value is read by another of its pieces.
    fn passes(&self, id: TensorId) -> bool {
        self.maker(id).is_some_and(|maker| {
            maker.phase != Phase::Update
                && self
                    .readers(id)
                    .any(|reader| reader.phase != Phase::Update && reader != maker)
        })
    }

    /// Whether a microbatch's value is summed over the microbatches.
    pub(super) fn is_summed(&self, id: TensorId) -> bool {
        self.maker(id).is_some_and(|maker| {
            maker.phase != Phase::Update
                && (self.results.contains_key(&id)
                    || self.readers(id).any(|reader| reader.phase == Phase::Update))
        })
    }

    /// Which sums the actions of a stage of the model add to, for a slice.
    pub(super) fn sums(&self, stage: usize, kind: ActionKind, slice: usize) -> BTreeSet<TensorId> {
        let work = Work::Action(kind);
        if kind == ActionKind::R {
            return BTreeSet::new();
        }
        self.graph
            .tensor_ids()
            .filter(|id| {
                self.maker(*id)
                    .is_some_and(|part| is_part_of(&part, stage, work, slice))
                    && self.is_summed(*id)
            })
            .map(|id| self.sum_of(id))
            .collect()
    }

    /// The stage whose update reads a sum.
    pub(super) fn summed_at(&self, id: TensorId) -> Option<usize> {
        let updates = self.readers(id).find(|part| part.phase == Phase::Update);
        let updates = updates.map(|part| part.stage);
        updates.or_else(|| self.results.get(&id).copied())
    }

    /// The layout in which an op leaves a tensor.
    fn made_layout(&self, id: TensorId) -> Layout {
        let made = self.producers[id.index()].and_then(|op_id| {
            let op = self.graph.op(op_id);
            let result = op.results.iter().position(|result| *result == id)?;
            let layouts = self.plan.op_layouts(self.graph, op_id);
            layouts.results.into_iter().nth(result)
        });
        made.unwrap_or_default()
    }

    /// The layout of sums: as made, so that reductions wait for the update; only sums can wait.
    fn sum_layout(&self, id: TensorId) -> Layout {
        let mut layout = self.made_layout(id);
        layout.partial.retain(|_, kind| *kind == ReduceKind::Sum);
        layout
    }

    /// The layout of a value between pieces: of those that its maker leaves and its readers ask for,
    /// without partial values that no reader asks for, and from which every reader's can be made, the
    /// one with the least bytes on a rank, then the cheapest to make; else as its maker leaves it.
    fn passing_layout(&self, id: TensorId) -> Layout {
        let made = self.made_layout(id);
        let ty = self.graph.ty(id);
        let mut asked: Vec<Layout> = Vec::new();
        for op_id in &self.consumers[id.index()] {
            let inputs = self.graph.op(*op_id).inputs.iter();
            let layouts = self.plan.op_layouts(self.graph, *op_id).inputs;
            let of_this = inputs.zip(layouts).filter(|(input, _)| **input == id);
            for (_, layout) in of_this {
                if !asked.contains(&layout) {
                    asked.push(layout);
                }
            }
        }
        let mesh = &self.plan.mesh;
        let seconds = |from: &Layout, to: &Layout| {
            let path = reshard_path(from, to, ty, mesh, self.cluster);
            path.map(|(seconds, _)| seconds)
        };
        let carried: BTreeSet<&Axis> = asked
            .iter()
            .flat_map(|layout| layout.partial.keys())
            .collect();
        let candidates = asked.iter().chain([&made]).filter_map(|layout| {
            let mut layout = layout.clone();
            layout.partial.retain(|axis, _| carried.contains(axis));
            // What is reduced cannot be given to a reader that carries partial values through.
            let serves = |reader: &Layout| seconds(&layout, reader).is_some();
            let made_s = seconds(&made, &layout).filter(|_| asked.iter().all(serves))?;
            let n_bytes = largest_local_type(ty, &layout, mesh).n_bytes();
            Some((n_bytes, made_s, layout))
        });
        let best = candidates.min_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        best.map_or(made.clone(), |(.., layout)| layout)
    }

    /// The layout that the local tensors of an output of the step have.
    pub(super) fn result_layout(&self, id: TensorId) -> Layout {
        let of = self.graph.gradients.iter().find(|(_, g)| **g == id);
        match of {
            Some((param, _)) if !self.graph.outputs.contains(&id) => {
                self.plan.source_layout(*param)
            }
            _ => {
                let mut layout = self.made_layout(id);
                layout.partial.clear();
                layout
            }
        }
    }

    /// What the tensor of a slot is stored as.
    pub(super) fn slot_dtype(&self, slot: Slot) -> DType {
        match (slot, &self.storage) {
            (Slot::Value(id), Some(storage)) => storage.dtype(id),
            (Slot::Source(id) | Slot::Value(id) | Slot::Sum(id, _) | Slot::Result(id), _) => {
                self.graph.ty(id).dtype
            }
        }
    }

    /// The layout of a value on a rank of its stage.
    pub(super) fn slot_layout(&self, slot: Slot) -> Layout {
        match slot {
            Slot::Source(id) => self.plan.source_layout(id),
            Slot::Value(id) => self.layouts.get(&id).cloned().unwrap_or_default(),
            Slot::Sum(id, _) => self.sum_layout(id),
            Slot::Result(id) => self.result_layout(id),
        }
    }

    pub(super) fn mesh(&self) -> &'a Mesh {
        &self.plan.mesh
    }

    /// A piece that [`Pieces::compile`] has made.
    pub(super) fn piece(&self, key: &Key) -> Result<&Piece> {
        let made = self.compiled.get(key);
        made.ok_or_else(|| PipelineError::Internal(format!("{key:?} was not compiled")))
    }

    /// Makes a piece where it is not made yet.
    pub(super) fn compile(&mut self, key: &Key) -> Result<&Piece> {
        if !self.compiled.contains_key(key) {
            let piece = self.build(key)?;
            self.compiled.insert(key.clone(), piece);
        }
        self.piece(key)
    }

    fn build(&self, key: &Key) -> Result<Piece> {
        let internal = |error: &dyn std::fmt::Display| PipelineError::Internal(error.to_string());
        let draft = Draft::new(self, key)?;
        verify_global(&draft.graph).map_err(|error| internal(&error))?;
        let outputs: Vec<Layout> = draft
            .outputs
            .iter()
            .map(|slot| self.slot_layout(*slot))
            .collect();
        let parts = partition_to(
            &draft.graph,
            &draft.plan,
            Keep::Outputs,
            self.cluster,
            &outputs,
        )?;
        let (locals, _) = simplify_ranks(&parts.locals, &simplify::Options::default())?;
        for (rank, local) in locals.iter().enumerate() {
            verify_local(local, rank, self.mesh()).map_err(|error| internal(&error))?;
        }
        verify_ranks(&locals).map_err(|error| internal(&error))?;
        let locals = match &self.storage {
            None => locals,
            Some(storage) => {
                let given = |local: &Graph, id: TensorId| match draft.inputs.get(id.index()) {
                    Some(slot) => self.slot_dtype(*slot),
                    None => local.ty(id).dtype,
                };
                let wanted = |position: usize| self.slot_dtype(draft.outputs[position]);
                let apply = |local: &Graph| storage.applied(local, |id| given(local, id), wanted);
                locals.iter().map(apply).collect()
            }
        };
        let items = locals
            .iter()
            .map(|local| fuse(local, self.platform))
            .collect::<std::result::Result<_, _>>()?;
        Ok(Piece {
            locals,
            items,
            inputs: draft.inputs,
            outputs: draft.outputs,
        })
    }
}

/// Whether an op is part of the work of a stage on a slice.
fn is_part_of(part: &OpPart, stage: usize, work: Work, slice: usize) -> bool {
    part.stage == stage && part.slice == slice && does(work, part.phase)
}

/// Whether ops of a phase are part of some work.
fn does(work: Work, phase: Phase) -> bool {
    match phase {
        Phase::Forward => matches!(work, Work::Action(ActionKind::F | ActionKind::R)),
        Phase::InputGradient => matches!(work, Work::Action(ActionKind::I | ActionKind::B)),
        Phase::WeightGradient => matches!(work, Work::Action(ActionKind::W | ActionKind::B)),
        Phase::Update => work == Work::Update,
    }
}

/// A piece as a global graph with its plan.
struct Draft<'a> {
    pieces: &'a Pieces<'a>,
    key: &'a Key,
    graph: Graph,
    plan: Plan,
    /// Where the tensors of the microbatch's graph are in the piece.
    ids: BTreeMap<TensorId, TensorId>,
    inputs: Vec<Slot>,
    outputs: Vec<Slot>,
}

impl<'a> Draft<'a> {
    fn new(pieces: &'a Pieces<'a>, key: &'a Key) -> Result<Self> {
        let graph = Graph::new(format!("{}.{}", pieces.graph.name, label(key)));
        let mut draft = Self {
            pieces,
            key,
            plan: Plan::replicated(&graph.name, &graph, pieces.mesh().clone()),
            graph,
            ids: BTreeMap::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
        };
        let whole = pieces.graph;
        let parts = &pieces.pipeline.parts;
        let is_update = key.work == Work::Update;
        // What is summed already is not added again.
        let is_joined = |op: &Op| {
            let mut results = op.results.iter();
            is_update && results.any(|id| pieces.joined.contains_key(id))
        };
        let ops: Vec<(OpId, &Op)> = whole
            .ops()
            .filter(|(op_id, _)| is_part_of(&parts[op_id.index()], key.stage, key.work, key.slice))
            .filter(|(_, op)| !is_joined(op))
            .collect();
        let results = pieces
            .results
            .iter()
            .filter(|(_, stage)| **stage == key.stage);
        let results: Vec<TensorId> = results.map(|(id, _)| *id).filter(|_| is_update).collect();
        let mut read: BTreeSet<TensorId> = ops
            .iter()
            .flat_map(|(_, op)| op.inputs.iter().copied())
            .chain(results.iter().copied())
            .collect();
        let mut made: BTreeSet<TensorId> = ops
            .iter()
            .flat_map(|(_, op)| op.results.iter().copied())
            .collect();
        read.retain(|id| !made.contains(id));
        let renamed: Vec<TensorId> = read
            .iter()
            .copied()
            .filter(|id| is_update && pieces.sum_of(*id) != *id)
            .collect();
        for id in &renamed {
            read.remove(id);
            read.insert(pieces.sum_of(*id));
        }
        for id in &read {
            draft.add_input(*id)?;
        }
        if !is_update {
            made.retain(|id| pieces.is_summed(*id) && key.work != Work::Action(ActionKind::R));
            let begun = |id: &&TensorId| !key.first.contains(&pieces.sum_of(**id));
            for id in made.iter().filter(begun) {
                draft.add_sum_input(*id, 0, "summed_before.");
            }
        }
        if is_update {
            // After all sources, which partitioning wants first.
            for id in &read {
                draft.join_copies(*id)?;
            }
            for id in renamed {
                if let Some(sum) = draft.ids.get(&pieces.sum_of(id)).copied() {
                    draft.ids.insert(id, sum);
                }
            }
        }
        for (op_id, op) in &ops {
            draft.add_op(*op_id, op)?;
        }
        draft.finish(&ops, &results)
    }

    fn add_input(&mut self, id: TensorId) -> Result<()> {
        let tensor = self.pieces.graph.tensor(id);
        let Some(maker) = self.pieces.maker(id) else {
            let role = match &tensor.role {
                Role::State { of } => Role::State {
                    of: *self.ids.get(of).ok_or_else(|| {
                        PipelineError::Internal(format!(
                            "the state `{}` stands before its parameter",
                            tensor.name
                        ))
                    })?,
                },
                role => role.clone(),
            };
            self.add_source(id, &tensor.name, role, Slot::Source(id));
            return Ok(());
        };
        if maker.phase == Phase::Update {
            return Err(PipelineError::Internal(format!(
                "`{}` of an update is read by {}",
                tensor.name,
                label(self.key)
            )));
        }
        match (self.key.work, self.pieces.pipeline.schedule.n_copies) {
            (Work::Update, 0 | 1) => self.add_sum_input(id, 0, ""),
            (Work::Update, n_copies) => {
                for copy in 0..n_copies {
                    self.add_sum_input(id, copy, &format!("copy{copy}."));
                }
            }
            (Work::Action(_), _) => {
                self.add_source(id, &tensor.name, Role::Input, Slot::Value(id));
            }
        }
        Ok(())
    }

    fn add_sum_input(&mut self, id: TensorId, copy: usize, prefix: &str) {
        let sum = format!("{prefix}{}", name(self.pieces.graph, id));
        let slot = Slot::Sum(self.pieces.sum_of(id), copy);
        self.add_source(id, &sum, Role::Input, slot);
    }

    fn add_source(&mut self, id: TensorId, name: &str, role: Role, slot: Slot) {
        let ty = self.pieces.graph.ty(id).clone();
        let own = self.graph.add_source(name, ty, role);
        self.ids.insert(id, own);
        self.plan.sources.insert(own, self.pieces.slot_layout(slot));
        self.inputs.push(slot);
    }

    /// The sum over the copies of the model.
    fn join_copies(&mut self, id: TensorId) -> Result<()> {
        let of_id = |slot: &Slot| matches!(slot, Slot::Sum(sum, _) if *sum == id);
        let copies: Vec<TensorId> = self
            .inputs
            .iter()
            .enumerate()
            .filter(|(_, slot)| of_id(slot))
            .map(|(input_idx, _)| TensorId(input_idx as u32))
            .collect();
        let Some((first, others)) = copies.split_first() else {
            return Ok(());
        };
        let mut sum = *first;
        for (idx, other) in others.iter().enumerate() {
            let all = if idx + 1 == others.len() {
                name(self.pieces.graph, id).to_string()
            } else {
                format!("copies{}.{}", idx + 1, name(self.pieces.graph, id))
            };
            sum = self.add(&all, id, sum, *other)?;
        }
        self.ids.insert(id, sum);
        Ok(())
    }

    /// x + y, both in the layout of sums of `of`.
    fn add(&mut self, name: &str, of: TensorId, x: TensorId, y: TensorId) -> Result<TensorId> {
        let layout = self.pieces.sum_layout(of);
        let mut placement = Placement::default();
        for axis in layout.partial.keys() {
            placement
                .factors
                .insert(axis.clone(), PARTIAL_FACTOR.into());
        }
        for (dim, axes) in &layout.shards {
            for axis in axes {
                placement.factors.insert(axis.clone(), dim.clone());
            }
        }
        let sums = self
            .graph
            .add_op(name, OpKind::Binary(BinaryFn::Add), &[x, y])?;
        self.plan.placements.push(placement);
        let sum = sums.first().copied();
        sum.ok_or_else(|| PipelineError::Internal("an addition without a result".into()))
    }

    /// An op of the piece, with the additions to the sums of its results.
    fn add_op(&mut self, op_id: OpId, op: &Op) -> Result<()> {
        let whole = self.pieces.graph;
        let inputs = op.inputs.iter().map(|input| {
            let own = self.ids.get(input).copied();
            own.ok_or_else(|| {
                PipelineError::Internal(format!(
                    "`{}` is read by {} before it is made",
                    name(whole, *input),
                    label(self.key)
                ))
            })
        });
        let inputs = inputs.collect::<Result<Vec<_>>>()?;
        let results = self
            .graph
            .add_op(whole.op_name(op), op.kind.clone(), &inputs)?;
        self.plan
            .placements
            .push(self.pieces.plan.placements[op_id.index()].clone());
        for (own, id) in results.iter().zip(&op.results) {
            // The rule's names for further results may have been replaced.
            self.graph.tensors[own.index()].name = name(whole, *id).into();
            let before = self.ids.insert(*id, *own);
            let is_summed = matches!(self.key.work, Work::Action(kind) if kind != ActionKind::R)
                && self.pieces.is_summed(*id);
            if is_summed {
                let sum = match before {
                    Some(before) => {
                        self.add(&format!("summed.{}", name(whole, *id)), *id, *own, before)?
                    }
                    None => *own,
                };
                self.graph.outputs.push(sum);
                self.outputs.push(Slot::Sum(self.pieces.sum_of(*id), 0));
            }
        }
        Ok(())
    }

    fn finish(mut self, ops: &[(OpId, &Op)], results: &[TensorId]) -> Result<Self> {
        let pieces = self.pieces;
        let Key {
            stage, work, slice, ..
        } = *self.key;
        let phases = |part: &OpPart| is_part_of(part, stage, work, slice);
        let made = ops.iter().flat_map(|(_, op)| &op.results);
        let passing: Vec<TensorId> = made
            .copied()
            .filter(|id| {
                self.key.work != Work::Update
                    && pieces
                        .readers(*id)
                        .any(|part| part.phase != Phase::Update && !phases(&part))
            })
            .collect();
        let outputs = passing
            .into_iter()
            .map(Slot::Value)
            .chain(results.iter().copied().map(Slot::Result));
        for slot in outputs {
            let (Slot::Value(id) | Slot::Result(id)) = slot else {
                continue;
            };
            let own = self.ids.get(&id).copied().ok_or_else(|| {
                PipelineError::Internal(format!("`{}` is not made", name(pieces.graph, id)))
            })?;
            self.graph.outputs.push(own);
            self.outputs.push(slot);
        }
        if self.key.work == Work::Update {
            for (source, next) in &pieces.graph.updates {
                if let (Some(source), Some(next)) = (self.ids.get(source), self.ids.get(next)) {
                    self.graph.updates.insert(*source, *next);
                }
            }
        }
        Ok(self)
    }
}

/// Such as `stage1.F`.
pub(super) fn label(key: &Key) -> String {
    match key.work {
        Work::Action(kind) if key.slice > 0 => {
            format!("stage{}.{kind}.slice{}", key.stage, key.slice)
        }
        Work::Action(kind) => format!("stage{}.{kind}", key.stage),
        Work::Update => format!("stage{}.update", key.stage),
    }
}
