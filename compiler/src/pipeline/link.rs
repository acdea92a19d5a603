//! Linking: the streams as one graph and one list of steps per rank, lowered to a program.
//!
//! Enters: compiled pieces and the streams of the ranks along the pipeline. Leaves: the program.
//! Invariants: a piece is copied once per action, over tensors of that action; all ranks of a stage
//! have the same steps, so their collectives stand in one order; what a rank keeps between steps is a
//! source of its graph, so the memory planner treats it as any other.

use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::graph::{Graph, Op, OpId, Role, TensorId, TensorType};
use meshweave_dsl::op::{OpKind, UnaryFn};
use meshweave_dsl::program::{
    Channel, GlobalTensor, PROGRAM_VERSION, Program, RankProgram, Span, TensorPart,
};

use super::pieces::{Piece, Pieces, Slot};
use super::stream::{Event, Run, Streams, Value};
use super::{PipelineError, Result, name};
use crate::codegen::fuse::Item;
use crate::lower::{Lowered, LoweredRanks, Step, lower_ranks};
use crate::reshard::local_type;

/// Links and lowers.
pub(super) fn link(pieces: &Pieces, streams: &Streams) -> Result<Lowered> {
    let pipeline = pieces.pipeline;
    let n_ranks = pipeline.mesh.n_ranks();
    let mut linked: Vec<Option<Linked>> = (0..n_ranks).map(|_| None).collect();
    for (pipeline_rank, events) in streams.events.iter().enumerate() {
        for stage_rank in 0..pieces.mesh().n_ranks() {
            let mut linker = Linker {
                pieces,
                pipeline_rank,
                stage_rank,
                linked: Linked::new(&pieces.graph.name, stage_rank),
            };
            for event in events {
                linker.event(event)?;
            }
            let rank = pipeline.rank(pipeline_rank, stage_rank);
            linked[rank] = Some(linker.linked);
        }
    }
    let linked: Option<Vec<Linked>> = linked.into_iter().collect();
    let mut linked =
        linked.ok_or_else(|| PipelineError::Internal("a rank of the mesh has no stream".into()))?;
    let graphs: Vec<Graph> = linked
        .iter_mut()
        .map(|rank| std::mem::take(&mut rank.graph))
        .collect();
    let steps: Vec<Vec<Step>> = linked
        .iter_mut()
        .map(|rank| std::mem::take(&mut rank.steps))
        .collect();
    let channels = channels(pieces, streams, &linked);
    let mut lowered = lower_ranks(&graphs, steps, pieces.cluster)?;
    for ((program, rank), firsts) in lowered.ranks.iter_mut().zip(&linked).zip(&lowered.firsts) {
        program.spans = spans(program, rank, firsts);
    }
    let sources = pieces.graph.tensor_ids().filter_map(|id| {
        let is_source = pieces.graph.tensor(id).role != Role::Temp;
        is_source.then(|| global(pieces, &linked, &lowered, Slot::Source(id)))
    });
    let sources = sources.collect::<Result<Vec<_>>>()?;
    let mut results: Vec<TensorId> = pieces.graph.outputs.clone();
    if pieces.keep == crate::partition::Keep::Gradients {
        results.extend(pieces.graph.gradients.values());
    }
    let outputs = results
        .into_iter()
        .map(|id| global(pieces, &linked, &lowered, Slot::Result(id)));
    let program = Program {
        version: PROGRAM_VERSION,
        name: pieces.plan.name.clone(),
        mesh: pipeline.mesh.clone(),
        outputs: outputs.collect::<Result<_>>()?,
        // Sources that nothing reads are nowhere.
        sources: sources
            .into_iter()
            .filter(|source| !source.parts.is_empty())
            .collect(),
        kernels: lowered.symbols,
        channels,
        statements: BTreeMap::new(),
        ranks: lowered.ranks,
    };
    Ok(Lowered {
        program,
        kernels: lowered.kernels,
    })
}

/// A rank's stream over one graph.
struct Linked {
    stage_rank: usize,
    graph: Graph,
    steps: Vec<Step>,
    values: BTreeMap<Value, TensorId>,
    /// Sources that are updated, where they are kept between steps; `values` has what came last.
    kept: BTreeMap<Value, TensorId>,
    /// Parameters in the type that products read, by what they are of: made once, by the first piece
    /// that reads them.
    casts: BTreeMap<TensorId, TensorId>,
    /// Label and first step.
    spans: Vec<(String, usize)>,
    /// Bytes of the greatest message by the rank that it goes to.
    sent_bytes: BTreeMap<(usize, usize), usize>,
}

impl Linked {
    fn new(name: &str, stage_rank: usize) -> Self {
        Self {
            stage_rank,
            graph: Graph::new(name),
            steps: Vec::new(),
            values: BTreeMap::new(),
            kept: BTreeMap::new(),
            casts: BTreeMap::new(),
            spans: Vec::new(),
            sent_bytes: BTreeMap::new(),
        }
    }
}

struct Linker<'a, 'b> {
    pieces: &'a Pieces<'b>,
    pipeline_rank: usize,
    stage_rank: usize,
    linked: Linked,
}

impl Linker<'_, '_> {
    fn rank(&self, pipeline_rank: usize) -> usize {
        self.pieces.pipeline.rank(pipeline_rank, self.stage_rank)
    }

    fn event(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Run(run) => self.run(run),
            Event::Send { value, to } => {
                let tensor = self.value(*value)?;
                self.sends(tensor, self.rank(*to));
                Ok(())
            }
            Event::Park(moved) => {
                let own = self.rank(self.pipeline_rank);
                self.begin(&moved.label);
                for value in &moved.values {
                    let tensor = self.value(*value)?;
                    self.sends(tensor, own);
                }
                Ok(())
            }
            Event::Fetch(moved) => {
                let own = self.rank(self.pipeline_rank);
                self.begin(&moved.label);
                for value in &moved.values {
                    let before = self.value(*value)?;
                    let graph = &mut self.linked.graph;
                    let parked = graph.tensor(before).clone();
                    let name = format!("{}.back", parked.name);
                    let tensor = graph.add_source(name, parked.ty, Role::Temp);
                    self.linked.values.insert(*value, tensor);
                    self.linked.steps.push(Step::Recv { tensor, from: own });
                }
                Ok(())
            }
            Event::Recv { value, from } => {
                let (slot, suffix) = match *value {
                    Value::Temp(id, microbatch) => (Slot::Value(id), format!("@{microbatch}")),
                    Value::Sum(id, copy) => (Slot::Sum(id, copy), ".sum".into()),
                    Value::Lent(id) | Value::Source(id, _) | Value::Version(id, _) => {
                        (Slot::Source(id), String::new())
                    }
                    Value::Result(id) => (Slot::Result(id), String::new()),
                };
                let (ty, name) = self.slot(slot);
                let tensor =
                    self.linked
                        .graph
                        .add_source(format!("{name}{suffix}"), ty, Role::Temp);
                self.linked.values.insert(*value, tensor);
                let from = self.rank(*from);
                self.begin("recv");
                self.linked.steps.push(Step::Recv { tensor, from });
                Ok(())
            }
        }
    }

    fn sends(&mut self, tensor: TensorId, to: usize) {
        let from = self.rank(self.pipeline_rank);
        let n_bytes = self.linked.graph.ty(tensor).n_bytes();
        let most = self.linked.sent_bytes.entry((from, to)).or_default();
        *most = n_bytes.max(*most);
        self.linked.steps.push(Step::Send { tensor, to });
    }

    /// The local type of a slot, and its name.
    fn slot(&self, slot: Slot) -> (TensorType, String) {
        let (Slot::Source(id) | Slot::Value(id) | Slot::Sum(id, _) | Slot::Result(id)) = slot;
        let layout = self.pieces.slot_layout(slot);
        let mut ty = local_type(
            self.pieces.graph.ty(id),
            &layout,
            self.pieces.mesh(),
            self.stage_rank,
        );
        ty.dtype = self.pieces.slot_dtype(slot);
        (ty, name(self.pieces.graph, id).into())
    }

    fn begin(&mut self, label: &str) {
        let spans = &mut self.linked.spans;
        if spans.last().is_none_or(|(last, _)| last != label) {
            spans.push((label.into(), self.linked.steps.len()));
        }
    }

    /// The tensor of a value; sources come into being with their first use.
    fn value(&mut self, value: Value) -> Result<TensorId> {
        if let Some(id) = self.linked.values.get(&value) {
            return Ok(*id);
        }
        if let Value::Version(id, _) = value {
            // The first piece of the microbatch that reads it is its forward.
            let current = self.value(Value::Source(id, None))?;
            self.linked.values.insert(value, current);
            return Ok(current);
        }
        let Value::Source(id, microbatch) = value else {
            return Err(PipelineError::Internal(format!(
                "{value:?} is read on rank {} before it is made",
                self.pipeline_rank
            )));
        };
        let role = match &self.pieces.graph.tensor(id).role {
            Role::State { of } => Role::State {
                of: self.value(Value::Source(*of, None))?,
            },
            role => role.clone(),
        };
        let (ty, name) = self.slot(Slot::Source(id));
        let name = microbatch.map_or(name.clone(), |microbatch| format!("{name}@{microbatch}"));
        let tensor = self.linked.graph.add_source(name, ty, role);
        self.linked.values.insert(value, tensor);
        Ok(tensor)
    }

    fn run(&mut self, run: &Run) -> Result<()> {
        let piece = self.pieces.piece(&run.key)?;
        let local = &piece.locals[self.stage_rank];
        self.begin(&run.label);
        let mut ids: Vec<TensorId> = Vec::with_capacity(local.tensors.len());
        let mut inputs = run.inputs.iter();
        let casts = source_casts(piece, self.stage_rank);
        let mut is_made = BTreeSet::new();
        for (local_id, tensor) in local.tensor_ids().zip(&local.tensors) {
            let shared = casts.get(&local_id).map(|source| ids[source.index()]);
            let known = shared.and_then(|source| self.linked.casts.get(&source));
            let id = if let Some(known) = known {
                is_made.insert(local_id);
                *known
            } else if tensor.role == Role::Temp {
                let name = format!("{}:{}", run.label, tensor.name);
                let graph = &mut self.linked.graph;
                graph.add_source(name, tensor.ty.clone(), Role::Temp)
            } else {
                let input = inputs.next().ok_or_else(|| {
                    PipelineError::Internal(format!("{} has an unknown source", run.label))
                })?;
                self.value(*input)?
            };
            if let Some(source) = shared {
                self.linked.casts.insert(source, id);
            }
            ids.push(id);
        }
        let graph = &mut self.linked.graph;
        let n_ops = graph.ops.len() as u32;
        let renew = |id: &TensorId| ids[id.index()];
        for op in &local.ops {
            let (pipeline, pipeline_rank) = (self.pieces.pipeline, self.pipeline_rank);
            graph.ops.push(Op {
                kind: op.kind.at_ranks(|rank| pipeline.rank(pipeline_rank, rank)),
                inputs: op.inputs.iter().map(renew).collect(),
                results: op.results.iter().map(renew).collect(),
            });
        }
        let is_known = |item: &&Item| match item {
            Item::Fragment(fragment) => {
                let mut results = fragment.results.iter();
                !fragment.results.is_empty() && results.all(|id| is_made.contains(id))
            }
            _ => false,
        };
        let items = &piece.items[self.stage_rank];
        for item in items.iter().filter(|item| !is_known(item)) {
            let item = item.renumbered(|op| OpId(op.0 + n_ops), |id| renew(&id));
            self.linked.steps.push(Step::Item(item));
        }
        for (value, id) in run.outputs.iter().zip(&local.outputs) {
            let before = self.linked.values.insert(*value, renew(id));
            if matches!(value, Value::Result(_)) {
                graph.outputs.retain(|output| Some(*output) != before);
                graph.outputs.push(renew(id));
            }
        }
        // What comes next is read by the pieces after; at the end of the step it is kept.
        let inputs = local
            .tensors
            .iter()
            .filter(|tensor| tensor.role != Role::Temp);
        let input_of: BTreeMap<&str, Value> = inputs
            .map(|tensor| tensor.name.as_str())
            .zip(run.inputs.iter().copied())
            .collect();
        for (source, next) in &local.updates {
            let value = input_of.get(local.tensor(*source).name.as_str()).copied();
            let value = value.ok_or_else(|| {
                PipelineError::Internal(format!("{} updates an unknown source", run.label))
            })?;
            let kept = *self.linked.kept.entry(value).or_insert(renew(source));
            graph.updates.insert(kept, renew(next));
            self.linked.values.insert(value, renew(next));
        }
        Ok(())
    }
}

/// The casts of a piece that are of its sources alone and kernels of their own: result and source.
fn source_casts(piece: &Piece, stage_rank: usize) -> BTreeMap<TensorId, TensorId> {
    let local = &piece.locals[stage_rank];
    let is_source = |id: TensorId| matches!(piece.inputs.get(id.index()), Some(Slot::Source(_)));
    let items = piece.items[stage_rank].iter();
    let casts = items.filter_map(|item| match item {
        Item::Fragment(fragment) => match fragment.ops.as_slice() {
            [op] => Some(local.op(*op)),
            _ => None,
        },
        _ => None,
    });
    let casts = casts.filter(|op| matches!(op.kind, OpKind::Unary(UnaryFn::Cast(_))));
    casts
        .filter_map(|op| Some((*op.results.first()?, *op.inputs.first()?)))
        .filter(|(_, source)| is_source(*source))
        .collect()
}

/// One channel for each pair and direction that messages take; those of a rank to itself hold all that
/// it parks at once.
fn channels(pieces: &Pieces, streams: &Streams, linked: &[Linked]) -> Vec<Channel> {
    let sent = linked.iter().flat_map(|rank| &rank.sent_bytes);
    let channels: BTreeMap<(usize, usize), usize> = sent.map(|(pair, n)| (*pair, *n)).collect();
    let parked = |rank: usize| {
        let mesh = &pieces.pipeline.mesh;
        let along = mesh.coordinate(rank, &pieces.pipeline.axis);
        streams.n_parked.get(along).copied().unwrap_or(1)
    };
    channels
        .into_iter()
        .map(|((from, to), n_bytes)| Channel {
            from,
            to,
            depth: if from == to {
                parked(from)
            } else {
                streams.depth
            },
            n_bytes,
        })
        .collect()
}

/// The spans by instructions; those without any are left out.
fn spans(program: &RankProgram, rank: &Linked, firsts: &[usize]) -> Vec<Span> {
    let n_instructions = program.instructions.len();
    let first_of = |step: usize| firsts.get(step).copied().unwrap_or(n_instructions);
    let ends = rank.spans.iter().skip(1).map(|(_, step)| first_of(*step));
    rank.spans
        .iter()
        .zip(ends.chain([n_instructions]))
        .map(|((label, step), end)| (label, first_of(*step), end))
        .filter(|(_, first, end)| first < end)
        .map(|(label, first, _)| Span {
            label: label.clone(),
            first,
        })
        .collect()
}

/// A source or a result of the step by its parts; an input's parts are those of all microbatches,
/// which lie one after the other in the whole batch.
fn global(
    pieces: &Pieces,
    linked: &[Linked],
    lowered: &LoweredRanks,
    slot: Slot,
) -> Result<GlobalTensor> {
    let (Slot::Source(id) | Slot::Result(id) | Slot::Value(id) | Slot::Sum(id, _)) = slot;
    let tensor = pieces.graph.tensor(id);
    let layout = pieces.slot_layout(slot);
    let n_microbatches = pieces.pipeline.schedule.n_microbatches;
    let is_divided = tensor.role == Role::Input && tensor.ty.has(&pieces.pipeline.batch);
    let mut ty = tensor.ty.clone();
    let mut parts = Vec::new();
    for (rank, rank_linked) in linked.iter().enumerate() {
        let Linked {
            stage_rank,
            values,
            kept,
            ..
        } = rank_linked;
        let mut region = layout.region(&tensor.ty.shape, pieces.mesh(), *stage_rank);
        let mut held: BTreeSet<(u32, TensorId)> = BTreeSet::new();
        let value = |microbatch| match slot {
            Slot::Result(id) => Value::Result(id),
            _ => Value::Source(id, microbatch),
        };
        if is_divided {
            for microbatch in 0..n_microbatches as u32 {
                let held_here = values.get(&value(Some(microbatch)));
                held.extend(held_here.map(|local| (microbatch, *local)));
            }
        } else {
            let held_here = kept.get(&value(None)).or(values.get(&value(None)));
            held.extend(held_here.map(|local| (0, *local)));
        }
        for (microbatch, local) in held {
            let buffer = lowered.buffers_of[rank].get(&local).copied();
            let buffer = buffer.ok_or_else(|| {
                PipelineError::Internal(format!("`{}` has no storage on rank {rank}", tensor.name))
            })?;
            if is_divided && let Some(position) = tensor.ty.position(&pieces.pipeline.batch) {
                let size = tensor.ty.shape[position].1;
                let own = layout.region(&tensor.ty.shape, pieces.mesh(), *stage_rank);
                region[position].start = own[position].start + microbatch as usize * size;
            }
            parts.push(TensorPart {
                rank,
                buffer,
                region: region.clone(),
            });
        }
    }
    if is_divided && let Some(position) = ty.position(&pieces.pipeline.batch) {
        ty.shape[position].1 *= n_microbatches;
    }
    Ok(GlobalTensor {
        name: tensor.name.clone(),
        ty,
        role: tensor.role.clone(),
        layout,
        parts,
    })
}
