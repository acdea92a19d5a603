//! Whether a lowered schedule can wait for itself, under the channel model in force.
//!
//! Enters: a [`Lowered`]. Leaves: nothing, or the cycle as a step × rank grid.
//!
//! The graph that must have no cycle: nodes are commands, except that a send and its receive are
//! one node where the channel has no buffer. Edges are
//! - producer and reader of every message, and compute actions of a rank in order;
//! - queue order: commands of one queue in the order of the row. With [`Channels::Blocking`] the
//!   whole row is one queue; else there is one for each peer, or each peer and direction;
//! - with a buffer of depth k, send `i` of a queue after the receive of message `i − k`, and
//!   receives in the order of the sends.
//!
//! Collectives run in row order with computation, and every group of ranks that share a stage has
//! them in the same order.

use std::collections::{BTreeMap, HashMap};

use meshweave_dsl::schedule::{Action, ActionKind, Channels, Command, Lowered, Verb, Wire};

use super::PipelineError;
use super::commands::check_commands;
use super::index::Index;

/// Checks that memory actions make sense, that messages match, that nobody waits in a cycle, and that
/// the order of collectives of stages with copies agrees. `O(n log n)` for `n` commands.
///
/// # Errors
/// [`PipelineError::Invalid`] with the grid.
pub fn check_lowered(lowered: &Lowered) -> Result<(), PipelineError> {
    check_commands(lowered)?;
    let graph = Graph::new(lowered)?;
    graph.acyclic()?;
    collectives(lowered)
}

fn invalid(lowered: &Lowered, message: String, marks: &[(usize, usize)]) -> PipelineError {
    PipelineError::Invalid(format!("{message}\n{}", lowered.grid(marks)))
}

struct Graph<'a> {
    lowered: &'a Lowered,
    row_start: Vec<usize>,
    /// Node of every cell.
    node: Vec<u32>,
    /// Edges by origin, as pairs sorted at the end.
    edges: Vec<(u32, u32)>,
}

impl<'a> Graph<'a> {
    fn new(lowered: &'a Lowered) -> Result<Self, PipelineError> {
        let mut row_start = vec![0];
        for row in &lowered.rows {
            row_start.push(row_start.last().copied().unwrap_or(0) + row.len());
        }
        let n_cells = row_start.last().copied().unwrap_or(0);
        let mut graph = Self {
            lowered,
            row_start,
            node: (0..n_cells as u32).collect(),
            edges: Vec::new(),
        };
        let messages = graph.messages()?;
        if !matches!(lowered.channels, Channels::Buffered(_)) {
            for (send, receive) in messages.values() {
                graph.node[*receive] = graph.node[*send];
            }
        }
        graph.join_collectives();
        graph.data_edges(&messages)?;
        graph.queue_edges(&messages);
        Ok(graph)
    }

    /// Reductions of one stage's copies are one node, and so are all barriers.
    fn join_collectives(&mut self) {
        let schedule = &self.lowered.schedule;
        let mut first: HashMap<Option<usize>, usize> = HashMap::new();
        for (cell, command) in self.lowered.rows.iter().flatten().enumerate() {
            let group = match command.verb {
                Verb::ReduceGrad => Some(schedule.model_stage(command.stage)),
                Verb::Barrier => None,
                _ => continue,
            };
            let joined = *first.entry(group).or_insert(cell);
            self.node[cell] = self.node[joined];
        }
    }

    fn place(&self, cell: usize) -> (usize, usize) {
        let rank = self.row_start.partition_point(|start| *start <= cell) - 1;
        (rank, cell - self.row_start[rank])
    }

    fn command(&self, cell: usize) -> Command {
        let (rank, position) = self.place(cell);
        self.lowered.rows[rank][position]
    }

    fn edge(&mut self, from: usize, to: usize) {
        let (from, to) = (self.node[from], self.node[to]);
        self.edges.push((from, to));
    }

    /// Cells of send and receive by message, in the order of the rows.
    fn messages(&self) -> Result<BTreeMap<Action, (usize, usize)>, PipelineError> {
        let lowered = self.lowered;
        let mut sends: HashMap<Action, usize> = HashMap::new();
        let mut receives: HashMap<Action, usize> = HashMap::new();
        for (cell, command) in lowered.rows.iter().flatten().enumerate() {
            let (message, side) = match command.verb {
                Verb::Send(_) => (sent_by(lowered, *command), &mut sends),
                Verb::Recv(_) => (received_by(lowered, *command), &mut receives),
                _ => continue,
            };
            let at = self.place(cell);
            let Some(message) = message else {
                let text = format!(
                    "`{command}` on rank {} at step {} has no stage on its other end",
                    at.0, at.1
                );
                return Err(invalid(lowered, text, &[at]));
            };
            if let Some(first) = side.insert(message, cell) {
                let text = format!(
                    "`{command}` stands twice, the second time on rank {} at step {}",
                    at.0, at.1
                );
                return Err(invalid(lowered, text, &[self.place(first), at]));
            }
        }
        let mut matched = BTreeMap::new();
        for (message, send) in &sends {
            match receives.remove(message) {
                Some(receive) => {
                    matched.insert(*message, (*send, receive));
                }
                None => return Err(self.lonely(*send, "receive")),
            }
        }
        // The first in row order, whatever the order of the map.
        match receives.values().min() {
            Some(receive) => Err(self.lonely(*receive, "send")),
            None => Ok(matched),
        }
    }

    fn lonely(&self, cell: usize, other: &str) -> PipelineError {
        let at = self.place(cell);
        let message = format!(
            "`{}` on rank {} at step {} has no matching {other}",
            self.command(cell),
            at.0,
            at.1
        );
        invalid(self.lowered, message, &[at])
    }

    /// Producers before sends, receives before readers, compute in row order.
    fn data_edges(
        &mut self,
        messages: &BTreeMap<Action, (usize, usize)>,
    ) -> Result<(), PipelineError> {
        let lowered = self.lowered;
        let index = Index::new(&lowered.schedule);
        // By id of the action.
        let mut cell_of: Vec<Option<usize>> = vec![None; index.n_actions()];
        for (cell, command) in lowered.rows.iter().flatten().enumerate() {
            if let Some(id) = command.action().and_then(|action| index.id(action)) {
                cell_of[id] = Some(cell);
            }
        }
        // By id of the producer: where its result is received.
        let mut receive_of: Vec<Option<usize>> = vec![None; index.n_actions()];
        for (message, (send, receive)) in messages {
            let producer = match message.kind {
                ActionKind::I => index.backward(*message),
                _ => index.id(*message),
            };
            let Some((id, cell)) = producer.and_then(|id| Some((id, cell_of[id]?))) else {
                return Err(self.lonely(*send, "compute action"));
            };
            receive_of[id] = Some(*receive);
            self.edge(cell, *send);
            if matches!(lowered.channels, Channels::Buffered(_)) {
                self.edge(*send, *receive);
            }
        }
        for (rank, row) in lowered.rows.iter().enumerate() {
            let mut last: Option<usize> = None;
            for (position, command) in row.iter().enumerate() {
                let cell = self.row_start[rank] + position;
                if matches!(command.verb, Verb::Send(_) | Verb::Recv(_)) {
                    continue;
                }
                if let Some(last) = last.replace(cell) {
                    self.edge(last, cell);
                }
                let Some(action) = command.action() else {
                    continue;
                };
                let mut needed_cells = Vec::new();
                let mut missing = None;
                index.each_dependency(action, |needed| {
                    let is_here =
                        (index.row_start[rank]..index.row_start[rank + 1]).contains(&needed);
                    match if is_here {
                        cell_of[needed]
                    } else {
                        receive_of[needed]
                    } {
                        Some(cell) => needed_cells.push(cell),
                        None => missing = Some(index.action(needed)),
                    }
                });
                if let Some(missing) = missing {
                    let text = format!(
                        "`{action}` on rank {rank} at step {position} needs the result of `{missing}`, \
                         which nobody sends"
                    );
                    return Err(invalid(lowered, text, &[(rank, position)]));
                }
                for needed in needed_cells {
                    self.edge(needed, cell);
                }
            }
        }
        Ok(())
    }

    /// Order within queues.
    fn queue_edges(&mut self, messages: &BTreeMap<Action, (usize, usize)>) {
        let lowered = self.lowered;
        // Sends of each directed channel, in the order of the row.
        let mut sends: BTreeMap<(usize, usize), Vec<usize>> = BTreeMap::new();
        for (rank, row) in lowered.rows.iter().enumerate() {
            let mut last: HashMap<(usize, bool), usize> = HashMap::new();
            for (position, command) in row.iter().enumerate() {
                let cell = self.row_start[rank] + position;
                let is_send = matches!(command.verb, Verb::Send(_));
                let queue = match (lowered.channels, lowered.peer(*command)) {
                    (Channels::Blocking, _) => Some((0, false)),
                    (_, None) => None,
                    (Channels::PerPair, Some(peer)) => Some((peer, false)),
                    (Channels::PerDirection | Channels::Buffered(_), Some(peer)) => {
                        Some((peer, is_send))
                    }
                };
                if let Some(queue) = queue
                    && let Some(before) = last.insert(queue, cell)
                {
                    self.edge(before, cell);
                }
                if let (Channels::Buffered(_), Some(peer), true) =
                    (lowered.channels, lowered.peer(*command), is_send)
                {
                    sends.entry((rank, peer)).or_default().push(cell);
                }
            }
        }
        if let Channels::Buffered(depth) = lowered.channels {
            for sends in sends.values() {
                let receives: Vec<Option<usize>> = sends
                    .iter()
                    .map(|send| {
                        let message = sent_by(lowered, self.command(*send))?;
                        messages.get(&message).map(|(_, receive)| *receive)
                    })
                    .collect();
                for (nth, send) in sends.iter().enumerate() {
                    // First in, first out: what was sent before is taken before.
                    if let (Some(Some(before)), Some(receive)) = (
                        nth.checked_sub(1).map(|before| receives[before]),
                        receives[nth],
                    ) {
                        self.edge(before, receive);
                    }
                    let room = nth.checked_sub(depth.max(1)).and_then(|nth| receives[nth]);
                    if let Some(receive) = room {
                        self.edge(receive, *send);
                    }
                }
            }
        }
    }

    /// Kahn's algorithm; on failure a cycle among what is left.
    fn acyclic(mut self) -> Result<(), PipelineError> {
        // Contracted messages in one queue give an edge from a node to itself: not a wait.
        self.edges.retain(|(from, to)| from != to);
        self.edges.sort_unstable();
        self.edges.dedup();
        let n_nodes = self.node.len();
        let mut first = vec![0u32; n_nodes + 1];
        let mut n_before = vec![0u32; n_nodes];
        for (from, to) in &self.edges {
            first[*from as usize + 1] += 1;
            n_before[*to as usize] += 1;
        }
        for node in 0..n_nodes {
            first[node + 1] += first[node];
        }
        let mut ready: Vec<u32> = (0..n_nodes as u32)
            .filter(|node| n_before[*node as usize] == 0)
            .collect();
        let mut n_done = 0;
        while let Some(node) = ready.pop() {
            n_done += 1;
            for (_, to) in self.after(&first, node) {
                n_before[*to as usize] -= 1;
                if n_before[*to as usize] == 0 {
                    ready.push(*to);
                }
            }
        }
        if n_done == n_nodes {
            return Ok(());
        }
        Err(self.cycle(&n_before))
    }

    fn after(&self, first: &[u32], node: u32) -> &[(u32, u32)] {
        &self.edges[first[node as usize] as usize..first[node as usize + 1] as usize]
    }

    fn cycle(&self, n_before: &[u32]) -> PipelineError {
        // Walk back along edges between nodes that are left: each has one before it.
        let mut before: HashMap<u32, u32> = HashMap::new();
        for (from, to) in &self.edges {
            if n_before[*from as usize] > 0 && n_before[*to as usize] > 0 {
                before.entry(*to).or_insert(*from);
            }
        }
        let Some(start) = before.keys().min() else {
            return PipelineError::Internal("a cycle without nodes".into());
        };
        let mut at = *start;
        let mut path = Vec::new();
        while !path.contains(&at) {
            path.push(at);
            match before.get(&at) {
                Some(from) => at = *from,
                None => return PipelineError::Internal("a cycle that ends".into()),
            }
        }
        let begin = path.iter().position(|node| *node == at).unwrap_or(0);
        let mut cycle: Vec<u32> = path[begin..].to_vec();
        cycle.reverse();
        let mut marks = Vec::new();
        let names: Vec<String> = cycle
            .iter()
            .map(|node| {
                let cells = (0..self.node.len()).filter(|cell| self.node[*cell] == *node);
                let texts: Vec<String> = cells
                    .map(|cell| {
                        let (rank, position) = self.place(cell);
                        marks.push((rank, position));
                        format!("`{}` (rank {rank}, step {position})", self.command(cell))
                    })
                    .collect();
                texts.join(" with ")
            })
            .collect();
        let shown = if names.len() > 12 {
            let (head, tail) = (
                names[..6].join("\n  "),
                names[names.len() - 5..].join("\n  "),
            );
            format!("{head}\n  … {} more\n  {tail}", names.len() - 11)
        } else {
            names.join("\n  ")
        };
        let message = format!(
            "with {} these wait for each other, each for the one above, the first for the last:\n  \
             {shown}\nlet the sender place both ends of a message (`lower` does)",
            model_text(self.lowered.channels)
        );
        invalid(self.lowered, message, &marks)
    }
}

fn model_text(channels: Channels) -> String {
    match channels {
        Channels::Blocking => "one blocking queue a rank".into(),
        Channels::PerPair => "one ordered queue for each pair of ranks".into(),
        Channels::PerDirection => "one ordered queue for each direction of a pair of ranks".into(),
        Channels::Buffered(depth) => format!("queues that hold {depth} messages"),
    }
}

/// What a send carries: the result of an action, an input gradient always as `I`.
fn sent_by(lowered: &Lowered, command: Command) -> Option<Action> {
    lowered.peer(command)?;
    result(command, command.stage)
}

/// What a receive takes.
fn received_by(lowered: &Lowered, command: Command) -> Option<Action> {
    lowered.peer(command)?;
    let stage = match command.verb {
        Verb::Recv(Wire::F) => lowered.schedule.stage_before(command.stage),
        _ => lowered.schedule.stage_after(command.stage),
    };
    result(command, stage?)
}

fn result(command: Command, stage: u32) -> Option<Action> {
    let kind = match command.verb {
        Verb::Send(Wire::F) | Verb::Recv(Wire::F) => ActionKind::F,
        _ => ActionKind::I,
    };
    Some(Action {
        slice: command.slice,
        ..Action::new(stage, kind, command.microbatch?)
    })
}

/// Ranks that hold the same stage of the model (in different copies) reduce its gradients together:
/// two of them that share several stages must name these in one order.
fn collectives(lowered: &Lowered) -> Result<(), PipelineError> {
    let schedule = &lowered.schedule;
    // Per rank: model stage and position of every reduction, in order.
    let reductions: Vec<Vec<(usize, usize)>> = lowered
        .rows
        .iter()
        .map(|row| {
            let commands = row.iter().enumerate();
            commands
                .filter(|(_, command)| command.verb == Verb::ReduceGrad)
                .map(|(position, command)| (schedule.model_stage(command.stage), position))
                .collect()
        })
        .collect();
    for a in 0..reductions.len() {
        for b in a + 1..reductions.len() {
            let shared = |of: usize, with: usize| {
                let others = &reductions[with];
                let is_shared = move |stage: usize| others.iter().any(|(other, _)| *other == stage);
                let of = reductions[of].iter().copied();
                of.filter(move |(stage, _)| is_shared(*stage))
            };
            let difference = shared(a, b)
                .zip(shared(b, a))
                .find(|(left, right)| left.0 != right.0);
            if let Some((left, right)) = difference {
                let message = format!(
                    "ranks {a} and {b} reduce gradients of the same stages in different orders: rank {a} \
                     of stage {} at step {}, rank {b} of stage {} at step {}; give both one order",
                    left.0, left.1, right.0, right.1
                );
                return Err(invalid(lowered, message, &[(a, left.1), (b, right.1)]));
            }
        }
    }
    Ok(())
}
