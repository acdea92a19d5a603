//! What a lowered schedule takes: every queue of every device in time.
//!
//! Enters: a [`Lowered`], the costs of its stages, and those of what lies between their actions.
//! Leaves: a [`DeviceRun`]: when every command runs, how long computation waits and for what, what
//! device and host hold.
//! Invariant: a command starts once its queue is free, the events that it waits for are recorded, its
//! message has arrived or has room, and all that take part in a collective are there; without memory
//! commands the step is that of [`simulate`](super::simulate). All figures are predicted.

use std::collections::HashMap;

use meshweave_dsl::schedule::{
    Action, ActionKind, Channels, Command, DeviceStreams, Lowered, StreamKind, Verb, Wire,
};
use serde::{Deserialize, Serialize};

use super::PipelineError;
use super::index::Index;
use super::memory::held_bytes;
use super::simulate::{Costs, TimeSpan};
use super::streams::streams;

/// What one stage of the model costs beside its actions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CommandCosts {
    /// Gathering its weights, and what they take while they are gathered.
    pub unshard_s: f64,
    pub gathered_bytes: f64,
    /// Reducing its gradients.
    pub reduce_s: f64,
    /// Moving a microbatch's activations to the host, or back.
    pub copy_s: f64,
    /// Updating its weights.
    pub update_s: f64,
}

/// What computation waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitFor {
    /// What another rank has not computed yet.
    Work,
    /// A message on its way.
    Message,
    /// Weights that are gathered, gradients that are reduced, a barrier.
    Collective,
    /// Activations that come back from the host.
    Copy,
}

impl WaitFor {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Work, Self::Message, Self::Collective, Self::Copy];

    /// Its name.
    pub fn text(self) -> &'static str {
        match self {
            Self::Work => "work of others",
            Self::Message => "messages",
            Self::Collective => "collectives",
            Self::Copy => "copies",
        }
    }
}

/// A predicted step of all devices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceRun {
    pub step_s: f64,
    /// Per rank and command of its row; the two actions of an overlapped pair have one span.
    pub spans: Vec<Vec<TimeSpan>>,
    /// Seconds that the mean rank's computation waits, in the order of [`WaitFor::ALL`]; what is left
    /// of the step when a rank is done is not counted.
    pub waits_s: [f64; 4],
    /// Most bytes of activations and gathered weights on each rank's device, and on its host.
    pub device_peak_bytes: Vec<f64>,
    pub host_peak_bytes: Vec<f64>,
}

/// Runs all queues. `commands` has an entry for every stage of the model. `O(n log n)`.
///
/// # Errors
/// [`PipelineError::Invalid`] when costs do not fit, or when commands wait for each other, which
/// [`check_lowered`](super::check_lowered) explains.
pub fn run_devices(
    lowered: &Lowered,
    costs: &Costs,
    commands: &[CommandCosts],
) -> Result<DeviceRun, PipelineError> {
    run_queues(lowered, &streams(lowered), costs, commands)
}

/// As [`run_devices`], with queues that passed [`check_streams`](super::check_streams).
///
/// # Errors
/// As [`run_devices`].
pub fn run_queues(
    lowered: &Lowered,
    devices: &[DeviceStreams],
    costs: &Costs,
    commands: &[CommandCosts],
) -> Result<DeviceRun, PipelineError> {
    let schedule = &lowered.schedule;
    costs.fit(schedule)?;
    if commands.len() != schedule.n_stages {
        return Err(PipelineError::Invalid(format!(
            "costs of commands are given for {} stages and schedule `{}` has {}; give one for each",
            commands.len(),
            schedule.name,
            schedule.n_stages
        )));
    }
    let mut run = Run::new(lowered, devices, costs, commands);
    run.go()?;
    Ok(run.finish())
}

/// Commands that begin together: a message and its receive without a buffer, a collective, a pair.
type Node = usize;

struct Run<'a> {
    lowered: &'a Lowered,
    costs: &'a Costs,
    commands: &'a [CommandCosts],
    row_start: Vec<usize>,
    /// Of every cell.
    node: Vec<Node>,
    kind: Vec<StreamKind>,
    spans: Vec<TimeSpan>,
    /// Cells of every node.
    cells: Vec<Vec<usize>>,
    /// Per node: the cells whose ends it waits for.
    needs: Vec<Vec<usize>>,
    /// Per cell of computation: the cell of another queue that fixed its start, if one did.
    blame: Vec<Option<usize>>,
    /// Per cell of computation: when its queue was free.
    free_s: Vec<f64>,
    /// Per receive: its send.
    send_of: HashMap<usize, usize>,
}

impl<'a> Run<'a> {
    fn new(
        lowered: &'a Lowered,
        devices: &[DeviceStreams],
        costs: &'a Costs,
        commands: &'a [CommandCosts],
    ) -> Self {
        let mut row_start = vec![0];
        for row in &lowered.rows {
            row_start.push(row_start.last().copied().unwrap_or(0) + row.len());
        }
        let n_cells = row_start.last().copied().unwrap_or(0);
        let mut run = Self {
            lowered,
            costs,
            commands,
            row_start,
            node: (0..n_cells).collect(),
            kind: vec![StreamKind::Compute; n_cells],
            spans: vec![TimeSpan::default(); n_cells],
            cells: Vec::new(),
            needs: Vec::new(),
            blame: vec![None; n_cells],
            free_s: vec![0.0; n_cells],
            send_of: HashMap::new(),
        };
        let edges = run.queues(devices);
        run.messages();
        run.join();
        run.cells = vec![Vec::new(); n_cells];
        run.needs = vec![Vec::new(); n_cells];
        for cell in 0..n_cells {
            let node = run.node[cell];
            run.cells[node].push(cell);
        }
        let rooms = run.rooms();
        for (from, to) in edges.into_iter().chain(rooms) {
            if run.node[from] != run.node[to] {
                run.needs[run.node[to]].push(from);
            }
        }
        run
    }

    fn command(&self, cell: usize) -> Command {
        let (rank, position) = self.place(cell);
        self.lowered.rows[rank][position]
    }

    fn place(&self, cell: usize) -> (usize, usize) {
        let rank = self.row_start.partition_point(|start| *start <= cell) - 1;
        (rank, cell - self.row_start[rank])
    }

    fn is_buffered(&self) -> bool {
        matches!(self.lowered.channels, Channels::Buffered(_))
    }

    /// Order within queues, and events between them: (earlier, later).
    fn queues(&mut self, devices: &[DeviceStreams]) -> Vec<(usize, usize)> {
        let mut edges = Vec::new();
        for device in devices {
            let first = self.row_start[device.rank];
            for stream in &device.streams {
                let mut last: Option<usize> = None;
                for item in &stream.items {
                    let cell = first + item.event.0;
                    self.kind[cell] = stream.kind;
                    if let Some(last) = last.replace(cell) {
                        edges.push((last, cell));
                    }
                    edges.extend(item.waits.iter().map(|event| (first + event.0, cell)));
                    // What has no queue of its own waits for all before it.
                    if self.lowered.channels == Channels::Blocking && item.event.0 > 0 {
                        edges.push((cell - 1, cell));
                    }
                }
            }
        }
        edges
    }

    /// Finds the send of every receive; without a buffer both are one.
    fn messages(&mut self) {
        let schedule = &self.lowered.schedule;
        let mut sends: HashMap<(u32, Wire, Option<u32>, u32), usize> = HashMap::new();
        let rows = self.lowered.rows.iter().flatten().enumerate();
        for (cell, command) in rows.clone() {
            if let Verb::Send(wire) = command.verb {
                sends.insert(
                    (command.stage, wire, command.microbatch, command.slice),
                    cell,
                );
            }
        }
        for (cell, command) in rows {
            let Verb::Recv(wire) = command.verb else {
                continue;
            };
            let sender = match wire {
                Wire::F => schedule.stage_before(command.stage),
                Wire::B => schedule.stage_after(command.stage),
            };
            let Some(send) = sender.and_then(|stage| {
                let message = (stage, wire, command.microbatch, command.slice);
                sends.get(&message).copied()
            }) else {
                continue;
            };
            self.send_of.insert(cell, send);
        }
        if !self.is_buffered() {
            let messages: Vec<(usize, usize)> =
                self.send_of.iter().map(|(r, s)| (*r, *s)).collect();
            for (receive, send) in messages {
                self.node[receive] = send;
            }
        }
    }

    /// Collectives of several ranks, and overlapped pairs, begin together.
    fn join(&mut self) {
        let schedule = &self.lowered.schedule;
        let mut first: HashMap<Option<usize>, usize> = HashMap::new();
        let mut cells: HashMap<Action, usize> = HashMap::new();
        for (cell, command) in self.lowered.rows.iter().flatten().enumerate() {
            if let Some(action) = command.action() {
                cells.insert(action, cell);
            }
            let group = match command.verb {
                Verb::ReduceGrad => Some(schedule.model_stage(command.stage)),
                Verb::Barrier => None,
                _ => continue,
            };
            self.node[cell] = *first.entry(group).or_insert(cell);
        }
        for (row, pairs) in schedule.rows.iter().zip(&schedule.pairs) {
            for position in pairs {
                let pair = row.get(*position).zip(row.get(position + 1));
                if let Some((first, second)) = pair
                    && let (Some(first), Some(second)) = (cells.get(first), cells.get(second))
                {
                    self.node[*second] = *first;
                }
            }
        }
    }

    /// With buffers: a receive after its send, and a send after the receive that makes room for it.
    fn rooms(&self) -> Vec<(usize, usize)> {
        let Channels::Buffered(depth) = self.lowered.channels else {
            return Vec::new();
        };
        let receive_of: HashMap<usize, usize> =
            self.send_of.iter().map(|(r, s)| (*s, *r)).collect();
        let mut edges = Vec::new();
        let mut sends: HashMap<(usize, usize), Vec<usize>> = HashMap::new();
        for cell in 0..self.node.len() {
            if let StreamKind::Send { to } = self.kind[cell] {
                let (rank, _) = self.place(cell);
                sends.entry((rank, to)).or_default().push(cell);
                edges.extend(receive_of.get(&cell).map(|receive| (cell, *receive)));
            }
        }
        for sends in sends.values() {
            for (nth, send) in sends.iter().enumerate().skip(depth.max(1)) {
                let before = sends[nth - depth.max(1)];
                edges.extend(receive_of.get(&before).map(|receive| (*receive, *send)));
            }
        }
        edges
    }

    /// Nodes in an order in which all that they need is over.
    fn go(&mut self) -> Result<(), PipelineError> {
        let n_nodes = self.cells.len();
        let mut n_left: Vec<usize> = self.needs.iter().map(Vec::len).collect();
        let mut after: Vec<Vec<Node>> = vec![Vec::new(); n_nodes];
        for (node, needs) in self.needs.iter().enumerate() {
            for cell in needs {
                after[self.node[*cell]].push(node);
            }
        }
        let is_used = |node: &Node| !self.cells[*node].is_empty();
        let n_used = (0..n_nodes).filter(is_used).count();
        let mut ready: Vec<Node> = (0..n_nodes).filter(is_used).collect();
        ready.retain(|node| n_left[*node] == 0);
        let mut n_done = 0;
        while let Some(node) = ready.pop() {
            n_done += 1;
            self.run(node);
            for next in &after[node] {
                n_left[*next] -= 1;
                if n_left[*next] == 0 {
                    ready.push(*next);
                }
            }
        }
        if n_done < n_used {
            return Err(PipelineError::Invalid(format!(
                "schedule `{}` as lowered cannot run: {} of {n_used} commands wait for each other; \
                 `check` shows the cycle",
                self.lowered.schedule.name,
                n_used - n_done
            )));
        }
        Ok(())
    }

    fn run(&mut self, node: Node) {
        let (mut start_s, mut own_s) = (0.0_f64, 0.0_f64);
        let mut blame = None;
        let cells = std::mem::take(&mut self.cells[node]);
        for cell in &self.needs[node] {
            let end_s = self.spans[*cell].end_s;
            if self.kind[*cell] == StreamKind::Compute {
                own_s = own_s.max(end_s);
            }
            if end_s > start_s {
                start_s = end_s;
                blame = Some(*cell);
            }
        }
        let blame = blame.filter(|cell| self.kind[*cell] != StreamKind::Compute);
        let work_s = self.seconds(&cells);
        for cell in &cells {
            self.blame[*cell] = blame;
            self.free_s[*cell] = own_s;
            let is_receive = matches!(self.command(*cell).verb, Verb::Recv(_));
            let latency_s = if is_receive {
                self.costs.latency_s
            } else {
                0.0
            };
            self.spans[*cell] = TimeSpan {
                start_s,
                end_s: start_s + work_s + latency_s,
            };
        }
        self.cells[node] = cells;
    }

    /// Seconds of a node.
    fn seconds(&self, cells: &[usize]) -> f64 {
        let schedule = &self.lowered.schedule;
        if let [first, second] = *cells
            && let (Some(first), Some(second)) =
                (self.command(first).action(), self.command(second).action())
        {
            return self.costs.pair_seconds(schedule, [first, second]);
        }
        let each = cells.iter().map(|cell| {
            let command = self.command(*cell);
            let stage = &self.commands[schedule.model_stage(command.stage)];
            match command.verb {
                Verb::Compute(_) => command
                    .action()
                    .map_or(0.0, |action| self.costs.seconds(schedule, action)),
                Verb::Send(wire) => {
                    let kind = match wire {
                        Wire::F => ActionKind::F,
                        Wire::B => ActionKind::I,
                    };
                    let of = Action {
                        slice: command.slice,
                        ..Action::new(command.stage, kind, command.microbatch.unwrap_or(0))
                    };
                    self.costs.transfer_s(schedule, of)
                }
                Verb::Unshard => stage.unshard_s,
                Verb::ReduceGrad => stage.reduce_s,
                Verb::Offload | Verb::Prefetch => stage.copy_s / schedule.n_slices as f64,
                Verb::Update => stage.update_s,
                Verb::Recv(_) | Verb::Reshard | Verb::Barrier => 0.0,
            }
        });
        each.fold(0.0, f64::max)
    }

    fn finish(self) -> DeviceRun {
        let n_ranks = self.lowered.rows.len();
        let step_s = self.spans.iter().map(|span| span.end_s).fold(0.0, f64::max);
        let mut waits_s = [0.0; 4];
        for cell in 0..self.node.len() {
            if self.kind[cell] != StreamKind::Compute || self.is_second(cell) {
                continue;
            }
            self.add_waits(cell, &mut waits_s);
        }
        for seconds in &mut waits_s {
            *seconds /= n_ranks.max(1) as f64;
        }
        let (device_peak_bytes, host_peak_bytes) =
            (0..n_ranks).map(|rank| self.peaks(rank)).unzip();
        let spans = (0..n_ranks)
            .map(|rank| self.spans[self.row_start[rank]..self.row_start[rank + 1]].to_vec())
            .collect();
        DeviceRun {
            step_s,
            spans,
            waits_s,
            device_peak_bytes,
            host_peak_bytes,
        }
    }

    /// Whether it is the second action of a pair, which waits with the first.
    fn is_second(&self, cell: usize) -> bool {
        self.node[cell] != cell
    }

    fn add_waits(&self, cell: usize, waits_s: &mut [f64; 4]) {
        let (free_s, start_s) = (self.free_s[cell], self.spans[cell].start_s);
        let Some(blame) = self.blame[cell].filter(|_| start_s > free_s) else {
            return;
        };
        let mut add = |what: WaitFor, seconds: f64| waits_s[what as usize] += seconds;
        match self.kind[blame] {
            StreamKind::Collective => add(WaitFor::Collective, start_s - free_s),
            StreamKind::ToHost | StreamKind::FromHost => add(WaitFor::Copy, start_s - free_s),
            _ => {
                // Until the message is made, its maker works; from then on it is on its way.
                let send = self.send_of.get(&blame).copied().unwrap_or(blame);
                let maker = self.maker_end_s(send).clamp(free_s, start_s);
                add(WaitFor::Work, maker - free_s);
                add(WaitFor::Message, start_s - maker);
            }
        }
    }

    /// When what a send carries was computed.
    fn maker_end_s(&self, send: usize) -> f64 {
        let needs = self.needs[self.node[send]].iter();
        let made = needs.filter(|cell| self.kind[**cell] == StreamKind::Compute);
        made.map(|cell| self.spans[*cell].end_s).fold(0.0, f64::max)
    }

    /// Most bytes of a rank's device and of its host.
    fn peaks(&self, rank: usize) -> (f64, f64) {
        let schedule = &self.lowered.schedule;
        let index = Index::new(schedule);
        // (time, bytes of the device, of the host).
        let mut changes: Vec<(f64, f64, f64)> = Vec::new();
        let range = self.row_start[rank]..self.row_start[rank + 1];
        for (span, command) in self.spans[range].iter().zip(&self.lowered.rows[rank]) {
            let stage = &self.commands[schedule.model_stage(command.stage)];
            let kept = || {
                let microbatch = command.microbatch.unwrap_or(0);
                let forward = Action {
                    slice: command.slice,
                    ..Action::new(command.stage, ActionKind::F, microbatch)
                };
                let (added, freed) = held_bytes(&index, self.costs, forward);
                added - freed
            };
            match command.verb {
                Verb::Compute(_) => {
                    let Some(action) = command.action() else {
                        continue;
                    };
                    let (added, freed) = held_bytes(&index, self.costs, action);
                    changes.push((span.start_s, added, 0.0));
                    changes.push((span.end_s, -freed, 0.0));
                }
                Verb::Offload => {
                    changes.push((span.start_s, 0.0, kept()));
                    changes.push((span.end_s, -kept(), 0.0));
                }
                Verb::Prefetch => {
                    changes.push((span.start_s, kept(), 0.0));
                    changes.push((span.end_s, 0.0, -kept()));
                }
                Verb::Unshard => changes.push((span.start_s, stage.gathered_bytes, 0.0)),
                Verb::Reshard => changes.push((span.end_s, -stage.gathered_bytes, 0.0)),
                _ => {}
            }
        }
        // What ends frees its room before what begins then.
        changes.sort_by(|a, b| {
            a.0.total_cmp(&b.0)
                .then((a.1 + a.2).total_cmp(&(b.1 + b.2)))
        });
        let (mut device, mut host) = (0.0, 0.0);
        let (mut most_device, mut most_host) = (0.0_f64, 0.0_f64);
        for (_, on_device, on_host) in changes {
            device += on_device;
            host += on_host;
            most_device = most_device.max(device);
            most_host = most_host.max(host);
        }
        (most_device, most_host)
    }
}
