//! Streams: what every rank of the pipeline does, in order.
//!
//! Enters: the rows of a schedule and the pieces. Leaves: for every rank along the pipeline its
//! pieces with the messages between them, and how deep the channels must be.
//! Invariants: a sender sends as soon as a value is made, and a receiver takes the messages of a
//! channel in the sender's order, just before the first piece that reads one; with channels of the
//! depth found, no rank waits for ever, whatever the timing: ranks with bounded queues are a Kahn
//! network, so one run that ends proves that all do (Kahn 1974; Parks 1995, §4).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use meshweave_dsl::graph::{Role, TensorId};
use meshweave_dsl::pipeline::Phase;
use meshweave_dsl::schedule::{Action, ActionKind, Command, Schedule, Updates, Verb};

use super::pieces::{Key, Pieces, Slot, Work};
use super::{PipelineError, Result, name};

/// A value on a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Value {
    /// Kept between steps, or given at each; inputs have one for every microbatch.
    Source(TensorId, Option<u32>),
    /// A parameter that another stage is at home in, as of this step.
    Lent(TensorId),
    /// A parameter as a microbatch's forward saw it, where updates do not wait for the end of the
    /// step.
    Version(TensorId, u32),
    /// Of a microbatch.
    Temp(TensorId, u32),
    /// The sum over the microbatches of a copy of the model.
    Sum(TensorId, usize),
    Result(TensorId),
}

/// One thing that a rank does.
#[derive(Clone, Debug)]
pub(super) enum Event {
    Run(Run),
    Send {
        value: Value,
        to: usize,
    },
    Recv {
        value: Value,
        from: usize,
    },
    /// Activations leave the arena, into the rank's channel to itself.
    Park(Moved),
    /// They come back, in the order in which they left.
    Fetch(Moved),
}

/// What an `OFFLOAD` or a `PREFETCH` moves.
#[derive(Clone, Debug)]
pub(super) struct Moved {
    /// Such as `0OFFLOAD1`.
    pub(super) label: String,
    pub(super) values: Vec<Value>,
}

/// A piece with the values that it reads and makes.
#[derive(Clone, Debug)]
pub(super) struct Run {
    pub(super) key: Key,
    /// Such as `2F0`.
    pub(super) label: String,
    pub(super) inputs: Vec<Value>,
    pub(super) outputs: Vec<Value>,
}

/// The streams of all ranks of the pipeline.
pub(super) struct Streams {
    pub(super) events: Vec<Vec<Event>>,
    /// Messages that every channel must hold.
    pub(super) depth: usize,
    /// Values of every rank that are parked at once.
    pub(super) n_parked: Vec<usize>,
}

/// Makes the streams, and every piece that they run. Linear in the actions times the inputs of their
/// pieces.
pub(super) fn streams(pieces: &mut Pieces) -> Result<Streams> {
    let schedule = pieces.pipeline.schedule.clone();
    let mut sent = Vec::with_capacity(schedule.n_ranks);
    let mut n_parked = Vec::with_capacity(schedule.n_ranks);
    for rank in 0..schedule.n_ranks {
        let (events, most) = Sender::new(pieces, &schedule, rank).events()?;
        sent.push(events);
        n_parked.push(most);
    }
    let events = receive(pieces, &schedule, sent)?;
    let depth = channel_depth(&schedule, &events)?;
    Ok(Streams {
        events,
        depth,
        n_parked,
    })
}

/// The rank of a stage of a copy of the model.
fn rank_of(schedule: &Schedule, copy: usize, stage: usize) -> usize {
    let at = schedule.stage_rank.get(copy * schedule.n_stages + stage);
    at.copied().unwrap_or(0)
}

/// One rank's pieces and sends.
struct Sender<'a, 'b> {
    pieces: &'a mut Pieces<'b>,
    schedule: &'a Schedule,
    rank: usize,
    /// Sums that were begun here.
    begun: BTreeSet<(TensorId, usize)>,
    events: Vec<Event>,
    /// Values outside of the arena, the first that left first, and most of them so far.
    parked: VecDeque<Value>,
    most_parked: usize,
    /// What an `OFFLOAD` moved, by stage, microbatch and slice.
    moved: BTreeMap<(u32, Option<u32>, u32), Vec<Value>>,
}

impl<'a, 'b> Sender<'a, 'b> {
    fn new(pieces: &'a mut Pieces<'b>, schedule: &'a Schedule, rank: usize) -> Self {
        Self {
            pieces,
            schedule,
            rank,
            begun: BTreeSet::new(),
            events: Vec::new(),
            parked: VecDeque::new(),
            most_parked: 0,
            moved: BTreeMap::new(),
        }
    }

    /// The events, and how many values are parked at once.
    fn events(mut self) -> Result<(Vec<Event>, usize)> {
        self.lend();
        let row = &self.schedule.rows[self.rank];
        let memory = self.memory_commands();
        for (step, action) in row.iter().enumerate() {
            for command in &memory[step] {
                self.moves(*command);
            }
            self.act(action)?;
            let is_last = row[step + 1..]
                .iter()
                .all(|next| next.stage != action.stage);
            if self.is_asynchronous() {
                if action.kind == ActionKind::B {
                    let label = format!("{}U{}", action.stage, action.microbatch);
                    self.update(action.stage as usize, &label)?;
                }
            } else if is_last {
                self.send_sums(action.stage);
            }
        }
        for command in memory.last().into_iter().flatten() {
            self.moves(*command);
        }
        for stage in 0..self.schedule.n_stages {
            if !self.is_asynchronous() && rank_of(self.schedule, 0, stage) == self.rank {
                self.update(stage, &format!("{stage}U"))?;
            }
        }
        Ok((self.events, self.most_parked))
    }

    /// The rank's `OFFLOAD` and `PREFETCH` commands before each of its actions, and behind the last.
    fn memory_commands(&self) -> Vec<Vec<Command>> {
        let mut before: Vec<Vec<Command>> = vec![Vec::new()];
        let lowered = self.pieces.pipeline.lowered.as_ref();
        let Some(row) = lowered.and_then(|lowered| lowered.rows.get(self.rank)) else {
            return vec![Vec::new(); self.schedule.rows[self.rank].len() + 1];
        };
        for command in row {
            match command.verb {
                Verb::Compute(_) => before.push(Vec::new()),
                Verb::Offload | Verb::Prefetch => {
                    if let Some(these) = before.last_mut() {
                        these.push(*command);
                    }
                }
                _ => {}
            }
        }
        before
    }

    /// Parks what a forward left for its backward, or fetches it. The channel gives values back in the
    /// order in which they left: what is in the way comes back with them, early.
    fn moves(&mut self, command: Command) {
        let of = (command.stage, command.microbatch, command.slice);
        let label = command.to_string();
        if command.verb == Verb::Offload {
            let values = self.left_by_forward(command);
            self.parked.extend(&values);
            self.most_parked = self.most_parked.max(self.parked.len());
            self.moved.insert(of, values.clone());
            self.events.push(Event::Park(Moved { label, values }));
            return;
        }
        let wanted = self.moved.remove(&of).unwrap_or_default();
        let last = self.parked.iter().rposition(|value| wanted.contains(value));
        let values: Vec<Value> = self
            .parked
            .drain(..last.map_or(0, |last| last + 1))
            .collect();
        self.events.push(Event::Fetch(Moved { label, values }));
    }

    /// What the forward of a stage, microbatch and slice read and made that a backward reads here.
    fn left_by_forward(&self, command: Command) -> Vec<Value> {
        let forward = Command {
            verb: Verb::Compute(ActionKind::F),
            ..command
        };
        let label = forward.to_string();
        let run = self.events.iter().rev().find_map(|event| match event {
            Event::Run(run) if run.label == label => Some(run),
            _ => None,
        });
        let stage = self.schedule.model_stage(command.stage);
        let is_kept = |value: &Value| match *value {
            Value::Temp(id, _) => self.pieces.readers(id).any(|part| {
                let is_backward =
                    matches!(part.phase, Phase::InputGradient | Phase::WeightGradient);
                part.stage == stage && is_backward
            }),
            _ => false,
        };
        let values = run
            .into_iter()
            .flat_map(|run| run.inputs.iter().chain(&run.outputs));
        let mut kept: Vec<Value> = Vec::new();
        for value in values.filter(|value| is_kept(value)) {
            if !kept.contains(value) && !self.parked.contains(value) {
                kept.push(*value);
            }
        }
        kept
    }

    fn is_asynchronous(&self) -> bool {
        self.schedule.updates == Updates::EveryMicrobatch
    }

    /// Sends parameters that are at home here to the other ranks that read them.
    fn lend(&mut self) {
        let params: Vec<TensorId> = self.pieces.graph.params().collect();
        for param in params {
            let Some(home) = self.pieces.home(param) else {
                continue;
            };
            if rank_of(self.schedule, 0, home) != self.rank {
                continue;
            }
            let readers: BTreeSet<usize> = (0..self.schedule.n_copies)
                .flat_map(|copy| {
                    let stages = self.pieces.stages_reading(param);
                    stages.into_iter().map(move |stage| (copy, stage))
                })
                .map(|(copy, stage)| rank_of(self.schedule, copy, stage))
                .filter(|rank| *rank != self.rank)
                .collect();
            let value = Value::Source(param, None);
            let sends = readers.into_iter().map(|to| Event::Send { value, to });
            self.events.extend(sends);
        }
    }

    fn act(&mut self, action: &Action) -> Result<()> {
        let schedule = self.schedule;
        let stage = schedule.model_stage(action.stage);
        let copy = schedule.copy_of(action.microbatch);
        let slice = action.slice as usize;
        let mut first = self.pieces.sums(stage, action.kind, slice);
        // Gradients begin anew where every microbatch is followed by an update.
        let begins_anew =
            |sum: &TensorId| self.is_asynchronous() && !self.pieces.graph.outputs.contains(sum);
        let anew: BTreeSet<TensorId> = first.iter().copied().filter(begins_anew).collect();
        first.retain(|sum| self.begun.insert((*sum, copy)) || anew.contains(sum));
        let key = Key {
            stage,
            work: Work::Action(action.kind),
            slice,
            first,
        };
        self.pieces.compile(&key)?;
        let value = |slot: &Slot| match *slot {
            Slot::Source(id) => self.source(id, Some(action.microbatch)),
            Slot::Value(id) => Value::Temp(id, action.microbatch),
            Slot::Sum(id, _) => Value::Sum(id, copy),
            Slot::Result(id) => Value::Result(id),
        };
        let piece = self.pieces.piece(&key)?;
        let (inputs, outputs): (Vec<Value>, Vec<Value>) = (
            piece.inputs.iter().map(value).collect(),
            piece.outputs.iter().map(value).collect(),
        );
        let made = outputs.clone();
        self.events.push(Event::Run(Run {
            key,
            label: action.to_string(),
            inputs,
            outputs,
        }));
        if action.kind == ActionKind::R {
            return Ok(());
        }
        for value in made {
            if let Value::Temp(id, _) = value {
                let readers: BTreeSet<usize> = self
                    .pieces
                    .readers(id)
                    .filter(|part| part.phase != Phase::Update)
                    .map(|part| rank_of(schedule, copy, part.stage))
                    .filter(|rank| *rank != self.rank)
                    .collect();
                let sends = readers.into_iter().map(|to| Event::Send { value, to });
                self.events.extend(sends);
            }
        }
        Ok(())
    }

    /// How a source is called here.
    fn source(&self, id: TensorId, microbatch: Option<u32>) -> Value {
        let tensor = self.pieces.graph.tensor(id);
        match tensor.role {
            Role::Input if tensor.ty.has(&self.pieces.pipeline.batch) => {
                Value::Source(id, microbatch)
            }
            Role::Param(_) if self.home_rank(id) != self.rank => Value::Lent(id),
            Role::Param(_) => match microbatch.filter(|_| self.is_asynchronous()) {
                Some(microbatch) => Value::Version(id, microbatch),
                None => Value::Source(id, None),
            },
            _ => Value::Source(id, None),
        }
    }

    fn home_rank(&self, param: TensorId) -> usize {
        let home = self.pieces.home(param).unwrap_or(0);
        rank_of(self.schedule, 0, home)
    }

    /// Sends the finished sums of a stage to the rank that updates with them.
    fn send_sums(&mut self, stage: u32) {
        let copy = stage as usize / self.schedule.n_stages;
        let stage = self.schedule.model_stage(stage);
        let ids: Vec<TensorId> = self.pieces.graph.tensor_ids().collect();
        for id in ids {
            let is_made_here = self
                .pieces
                .maker(id)
                .is_some_and(|part| part.stage == stage)
                && self.pieces.is_summed(id)
                && self.pieces.sum_of(id) == id;
            let Some(updated_at) = self.pieces.summed_at(id).filter(|_| is_made_here) else {
                continue;
            };
            let to = rank_of(self.schedule, 0, updated_at);
            if to != self.rank {
                let value = Value::Sum(id, copy);
                self.events.push(Event::Send { value, to });
            }
        }
    }

    fn update(&mut self, stage: usize, label: &str) -> Result<()> {
        let key = Key {
            stage,
            work: Work::Update,
            slice: 0,
            first: BTreeSet::new(),
        };
        self.pieces.compile(&key)?;
        let value = |slot: &Slot| match *slot {
            Slot::Source(id) => self.source(id, None),
            Slot::Sum(id, copy) => Value::Sum(id, copy),
            Slot::Result(id) => Value::Result(id),
            Slot::Value(id) => Value::Temp(id, 0),
        };
        let piece = self.pieces.piece(&key)?;
        let run = Run {
            label: label.into(),
            inputs: piece.inputs.iter().map(value).collect(),
            outputs: piece.outputs.iter().map(value).collect(),
            key,
        };
        self.events.push(Event::Run(run));
        Ok(())
    }
}

/// Puts in the receives: just before the first piece that reads a message, those before it in the
/// channel first.
fn receive(pieces: &Pieces, schedule: &Schedule, sent: Vec<Vec<Event>>) -> Result<Vec<Vec<Event>>> {
    let mut channels: BTreeMap<(usize, usize), VecDeque<Value>> = BTreeMap::new();
    for (from, events) in sent.iter().enumerate() {
        for event in events {
            if let Event::Send { value, to } = event {
                channels.entry((from, *to)).or_default().push_back(*value);
            }
        }
    }
    let mut all = Vec::with_capacity(sent.len());
    for (rank, events) in sent.into_iter().enumerate() {
        let mut known: BTreeSet<Value> = BTreeSet::new();
        let mut stream = Vec::with_capacity(events.len());
        for event in events {
            if let Event::Run(run) = &event {
                for input in &run.inputs {
                    let is_kept = matches!(input, Value::Source(..) | Value::Version(..));
                    if is_kept || known.contains(input) {
                        continue;
                    }
                    let from = origin(pieces, schedule, *input)?;
                    // A lent parameter is the lender's own.
                    let message = match *input {
                        Value::Lent(id) => Value::Source(id, None),
                        value => value,
                    };
                    let waiting = channels.entry((from, rank)).or_default();
                    while !known.contains(input) {
                        let Some(value) = waiting.pop_front().filter(|_| from != rank) else {
                            return Err(PipelineError::Invalid(format!(
                                "schedule `{}`: {} on rank {rank} reads {}, which nothing gives before it",
                                schedule.name,
                                run.label,
                                describe(pieces, *input)
                            )));
                        };
                        let received = if value == message { *input } else { value };
                        let received = match received {
                            Value::Source(id, None) => Value::Lent(id),
                            value => value,
                        };
                        known.insert(received);
                        stream.push(Event::Recv {
                            value: received,
                            from,
                        });
                    }
                }
                known.extend(run.outputs.iter().copied());
            }
            stream.push(event);
        }
        all.push(stream);
    }
    Ok(all)
}

/// The rank that makes a value.
fn origin(pieces: &Pieces, schedule: &Schedule, value: Value) -> Result<usize> {
    let stage = |id: TensorId| {
        let maker = pieces.maker(id).map(|part| part.stage);
        maker.ok_or_else(|| {
            PipelineError::Internal(format!("`{}` has no maker", name(pieces.graph, id)))
        })
    };
    Ok(match value {
        Value::Source(id, _) | Value::Version(id, _) | Value::Lent(id) => {
            rank_of(schedule, 0, pieces.home(id).unwrap_or(0))
        }
        Value::Temp(id, microbatch) => rank_of(schedule, schedule.copy_of(microbatch), stage(id)?),
        Value::Sum(id, copy) => rank_of(schedule, copy, stage(id)?),
        Value::Result(id) => rank_of(schedule, 0, stage(id)?),
    })
}

fn describe(pieces: &Pieces, value: Value) -> String {
    let name = |id| name(pieces.graph, id);
    match value {
        Value::Source(id, _) | Value::Version(id, _) | Value::Lent(id) | Value::Result(id) => {
            format!("`{}`", name(id))
        }
        Value::Temp(id, microbatch) => format!("`{}` of microbatch {microbatch}", name(id)),
        Value::Sum(id, _) => format!("the sum of `{}`", name(id)),
    }
}

/// The least depth, from 2 on (one message read while the next is written), with which the streams
/// run to their end.
fn channel_depth(schedule: &Schedule, events: &[Vec<Event>]) -> Result<usize> {
    let n_messages = events.iter().flatten().count();
    let mut depth = 2;
    loop {
        match stuck(events, depth) {
            None => return Ok(depth),
            Some(_) if depth < n_messages => depth *= 2,
            Some(places) => {
                return Err(PipelineError::Invalid(format!(
                    "schedule `{}` waits for itself: {}",
                    schedule.name,
                    places.join("; ")
                )));
            }
        }
    }
}

/// Runs the streams with channels of a depth; where they stand when nothing goes on.
fn stuck(events: &[Vec<Event>], depth: usize) -> Option<Vec<String>> {
    let mut next = vec![0; events.len()];
    let mut queued: BTreeMap<(usize, usize), usize> = BTreeMap::new();
    loop {
        let mut went_on = false;
        for (rank, stream) in events.iter().enumerate() {
            while let Some(event) = stream.get(next[rank]) {
                match event {
                    // A rank's channel to itself holds all that is parked at once.
                    Event::Run(_) | Event::Park(_) | Event::Fetch(_) => {}
                    Event::Send { to, .. } => {
                        let queue = queued.entry((rank, *to)).or_default();
                        if *queue == depth {
                            break;
                        }
                        *queue += 1;
                    }
                    Event::Recv { from, .. } => {
                        let queue = queued.entry((*from, rank)).or_default();
                        if *queue == 0 {
                            break;
                        }
                        *queue -= 1;
                    }
                }
                next[rank] += 1;
                went_on = true;
            }
        }
        if next
            .iter()
            .zip(events)
            .all(|(next, stream)| *next == stream.len())
        {
            return None;
        }
        if !went_on {
            let places = events.iter().zip(&next).enumerate();
            let places = places.filter(|(_, (stream, next))| **next < stream.len());
            let places = places.map(|(rank, (stream, next))| {
                let after = stream[*next..].iter().find_map(|event| match event {
                    Event::Run(run) => Some(run.label.as_str()),
                    _ => None,
                });
                format!("rank {rank} before {}", after.unwrap_or("its end"))
            });
            return Some(places.collect());
        }
    }
}
