//! Commands to queues: what each device executes, with events between its queues.
//!
//! Enters: a [`Lowered`]. Leaves: streams of every rank.
//! Invariant: within a stream the order is the row's; an item waits for the events of what it reads,
//! and of what must be over before it (a buffer that is freed, gradients that are whole).

use std::collections::BTreeMap;

use meshweave_dsl::schedule::{
    ActionKind, Channels, Command, DeviceStreams, Event, Item, Lowered, Stream, StreamKind, Verb,
    Wire,
};

use super::PipelineError;

/// The streams of all ranks, each rank's in order of first use. `O(n log n)`.
pub fn streams(lowered: &Lowered) -> Vec<DeviceStreams> {
    let rows = lowered.rows.iter().enumerate();
    rows.map(|(rank, row)| device(lowered, rank, row)).collect()
}

fn device(lowered: &Lowered, rank: usize, row: &[Command]) -> DeviceStreams {
    let mut streams: Vec<Stream> = Vec::new();
    let mut stream_of = vec![0usize; row.len()];
    let position_of: BTreeMap<Command, usize> = row
        .iter()
        .enumerate()
        .map(|(position, command)| (*command, position))
        .collect();
    for (position, command) in row.iter().enumerate() {
        let kind = stream_kind(lowered, *command);
        let stream = match streams.iter().position(|stream| stream.kind == kind) {
            Some(stream) => stream,
            None => {
                streams.push(Stream {
                    kind,
                    items: Vec::new(),
                });
                streams.len() - 1
            }
        };
        stream_of[position] = stream;
        let mut waits: Vec<Event> = needs(row, &position_of, position)
            .into_iter()
            .filter(|needed| *needed > position || stream_of[*needed] != stream)
            .map(Event)
            .collect();
        waits.sort_unstable();
        waits.dedup();
        streams[stream].items.push(Item {
            command: *command,
            event: Event(position),
            waits,
        });
    }
    DeviceStreams { rank, streams }
}

/// Checks queues that are written out: every command is in the queue that the channel model gives it,
/// and what must be over before it is, by queue order and events of its device. `O(n²)` at worst,
/// linear where every need is an event of its own.
///
/// # Errors
/// [`PipelineError::Invalid`] that names the command, and the event that it must wait for.
pub fn check_streams(lowered: &Lowered, given: &[DeviceStreams]) -> Result<(), PipelineError> {
    let invalid = |message: String| Err(PipelineError::Invalid(message));
    for (device, needed) in given.iter().zip(streams(lowered)) {
        let rank = device.rank;
        // Of every event: its queue, and the events that stand directly before it.
        let n_events = lowered.rows[rank].len();
        let mut kind = vec![StreamKind::Compute; n_events];
        let mut before: Vec<Vec<usize>> = vec![Vec::new(); n_events];
        for stream in &device.streams {
            let mut last = None;
            for item in &stream.items {
                let event = item.event.0;
                kind[event] = stream.kind;
                before[event] = item.waits.iter().map(|wait| wait.0).collect();
                before[event].extend(last.replace(event));
            }
        }
        for stream in &needed.streams {
            for item in &stream.items {
                let event = item.event.0;
                if kind[event] != stream.kind {
                    return invalid(format!(
                        "`{}` of rank {rank} is in queue `{}`; with channels {} it belongs to `{}`",
                        item.command, kind[event], lowered.channels, stream.kind
                    ));
                }
                let missing = item
                    .waits
                    .iter()
                    .find(|wait| !is_behind(&before, event, wait.0));
                if let Some(wait) = missing {
                    return invalid(format!(
                        "`{event}:{}` of rank {rank} does not wait for `{}`, which it needs; let it wait \
                         for event {}, as in `{item}`",
                        item.command, lowered.rows[rank][wait.0], wait.0
                    ));
                }
            }
        }
    }
    Ok(())
}

/// Whether `event` comes after `wanted` on its device.
fn is_behind(before: &[Vec<usize>], event: usize, wanted: usize) -> bool {
    if before[event].contains(&wanted) {
        return true;
    }
    let mut seen = vec![false; before.len()];
    let mut open = before[event].clone();
    while let Some(next) = open.pop() {
        if next == wanted {
            return true;
        }
        if !std::mem::replace(&mut seen[next], true) {
            open.extend(&before[next]);
        }
    }
    false
}

fn stream_kind(lowered: &Lowered, command: Command) -> StreamKind {
    let peer = lowered.peer(command);
    match (command.verb, peer) {
        (Verb::Send(_) | Verb::Recv(_), peer) => match (lowered.channels, peer) {
            (Channels::Blocking, _) | (_, None) => StreamKind::Exchange { with: None },
            (Channels::PerPair, Some(peer)) => StreamKind::Exchange { with: Some(peer) },
            (_, Some(peer)) if matches!(command.verb, Verb::Send(_)) => {
                StreamKind::Send { to: peer }
            }
            (_, Some(peer)) => StreamKind::Recv { from: peer },
        },
        (Verb::Unshard | Verb::Reshard | Verb::ReduceGrad | Verb::Barrier, _) => {
            StreamKind::Collective
        }
        (Verb::Offload, _) => StreamKind::ToHost,
        (Verb::Prefetch, _) => StreamKind::FromHost,
        (Verb::Compute(_) | Verb::Update, _) => StreamKind::Compute,
    }
}

/// Positions of the row that must be over before the command at `position`.
fn needs(row: &[Command], position_of: &BTreeMap<Command, usize>, position: usize) -> Vec<usize> {
    let command = row[position];
    let same = |verb| Command { verb, ..command };
    let at = |command: Command| position_of.get(&command).copied();
    let before = |wanted: &dyn Fn(&Command) -> bool| row[..position].iter().rposition(wanted);
    let stage = command.stage;
    let of_stage = |verb: Verb| before(&|other| other.stage == stage && other.verb == verb);
    let last_compute =
        || before(&|other| other.stage == stage && matches!(other.verb, Verb::Compute(_)));
    let found: Vec<Option<usize>> = match command.verb {
        Verb::Compute(kind) => {
            let mut found = vec![of_stage(Verb::Unshard)];
            match kind {
                ActionKind::F => found.push(at(same(Verb::Recv(Wire::F)))),
                ActionKind::B | ActionKind::I => {
                    found.push(at(same(Verb::Recv(Wire::B))));
                    found.push(at(same(Verb::Prefetch)));
                }
                ActionKind::W | ActionKind::R => {}
            }
            found
        }
        Verb::Send(Wire::F) | Verb::Offload => vec![at(same(Verb::Compute(ActionKind::F)))],
        Verb::Send(Wire::B) => vec![
            at(same(Verb::Compute(ActionKind::B)))
                .or_else(|| at(same(Verb::Compute(ActionKind::I)))),
        ],
        Verb::Recv(_) => Vec::new(),
        // One action ahead of its reader: early enough to be hidden, not so early that it fills memory.
        Verb::Prefetch => {
            let is_compute = |other: &Command| matches!(other.verb, Verb::Compute(_));
            let last = before(&is_compute).unwrap_or(0);
            vec![
                at(same(Verb::Offload)),
                row[..last].iter().rposition(is_compute),
            ]
        }
        Verb::Unshard => vec![of_stage(Verb::Reshard)],
        Verb::Reshard | Verb::ReduceGrad => vec![last_compute()],
        Verb::Barrier => {
            let last = |verb_is: fn(&Verb) -> bool| before(&|other: &Command| verb_is(&other.verb));
            vec![
                last(|verb| matches!(verb, Verb::Compute(_))),
                last(|verb| *verb == Verb::ReduceGrad),
            ]
        }
        Verb::Update => {
            let barrier = before(&|other| other.verb == Verb::Barrier);
            vec![of_stage(Verb::ReduceGrad), barrier, last_compute()]
        }
    };
    let mut found: Vec<usize> = found.into_iter().flatten().collect();

    found.retain(|needed| *needed != position);
    found
}
