//! The third level: what each device's queues hold, and which events they wait for.
//!
//! Enters: the assignment of a [`Lowered`]'s commands to queues, or a `streams` block of the language.
//! Leaves: what a device executes: each stream in order, an item once the events it waits for are
//! recorded.
//! Invariant: every event is recorded by exactly one item, the one of that number; a device's items in
//! the order of their events are its row.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::rows::MAX_STAGES;
use super::{Cell, Channels, Command, Lowered, ScheduleError};
use crate::weave::ast::{Block, Name, ScheduleBody, ScheduleDef, StreamLine};

/// What a stream is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamKind {
    Compute,
    /// Messages to one rank.
    Send {
        to: usize,
    },
    /// Messages from one rank.
    Recv {
        from: usize,
    },
    /// Messages of both directions with one rank, or with all where the queue is one.
    Exchange {
        with: Option<usize>,
    },
    /// Collectives within the stage's group.
    Collective,
    /// Copies to the host, and back: devices have an engine for each.
    ToHost,
    FromHost,
}

impl fmt::Display for StreamKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compute => f.write_str("compute"),
            Self::Send { to } => write!(f, "to {to}"),
            Self::Recv { from } => write!(f, "from {from}"),
            Self::Exchange { with: Some(with) } => write!(f, "with {with}"),
            Self::Exchange { with: None } => f.write_str("messages"),
            Self::Collective => f.write_str("collective"),
            Self::ToHost => f.write_str("to host"),
            Self::FromHost => f.write_str("from host"),
        }
    }
}

/// The end of an item: numbered through the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Event(pub usize);

/// One command on a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    pub command: Command,
    /// Recorded when it ends.
    pub event: Event,
    /// Of other streams of this device; ascending.
    pub waits: Vec<Event>,
}

impl fmt::Display for Item {
    /// `4:0B0[1,3]`: the event, the command, the events that it waits for.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.event.0, self.command)?;
        if self.waits.is_empty() {
            return Ok(());
        }
        let waits = self.waits.iter().map(|event| event.0.to_string());
        write!(f, "[{}]", waits.collect::<Vec<_>>().join(","))
    }
}

/// One queue of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stream {
    pub kind: StreamKind,
    pub items: Vec<Item>,
}

/// The queues of one rank's device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStreams {
    pub rank: usize,
    pub streams: Vec<Stream>,
}

impl Lowered {
    /// The schedule of a `streams` block of the language, and its queues as they are written.
    /// `O(n log n)`.
    ///
    /// # Errors
    /// [`ScheduleError::Invalid`] when a queue stands twice or out of order, when events are not
    /// numbered without gaps, when something waits for an event that is not there, and as
    /// [`Schedule::from_cells`](super::Schedule::from_cells).
    pub fn from_streams(
        name: &Name,
        block: &Block<StreamLine>,
        channels: Channels,
    ) -> Result<(Self, Vec<DeviceStreams>), ScheduleError> {
        let invalid = |message: String| Err(ScheduleError::Invalid(message));
        let mut devices: Vec<DeviceStreams> = Vec::new();
        let mut joined: Vec<Vec<(usize, usize)>> = Vec::new();
        for line in block.items() {
            let (rank, kind) = (line.rank, line.kind);
            if rank >= MAX_STAGES {
                return invalid(format!(
                    "rank {rank} has a queue; at most {MAX_STAGES} ranks are supported"
                ));
            }
            while devices.len() <= rank {
                devices.push(DeviceStreams {
                    rank: devices.len(),
                    streams: Vec::new(),
                });
                joined.push(Vec::new());
            }
            let streams = &mut devices[rank].streams;
            if streams.iter().any(|stream| stream.kind == kind) {
                return invalid(format!(
                    "queue `{kind}` of rank {rank} stands twice; write its commands in one line"
                ));
            }
            if let Some([first, second]) = line
                .items
                .array_windows()
                .find(|[first, second]| first.event >= second.event)
            {
                return invalid(format!(
                    "`{second}` stands behind `{first}` in queue `{kind}` of rank {rank}; events are \
                     numbered in the order of the queue"
                ));
            }
            let event = |nth: usize| line.items.get(nth).map(|item| item.event.0);
            let ends = line
                .pairs
                .iter()
                .map(|nth| Some((event(*nth)?, event(nth + 1)?)));
            joined[rank].extend(ends.flatten());
            streams.push(Stream {
                kind,
                items: line.items.clone(),
            });
        }
        let mut rows = Vec::with_capacity(devices.len());
        for (device, joined) in devices.iter().zip(&joined) {
            rows.push(cells(device, joined).map_err(ScheduleError::Invalid)?);
        }
        Ok((Self::from_cells(name.as_str(), &rows, channels)?, devices))
    }

    /// The statement `schedule NAME = streams channels … { … }` of these queues.
    pub fn streams_statement(&self, devices: &[DeviceStreams], name: Name) -> ScheduleDef {
        let mut lines = Vec::new();
        for device in devices {
            let pairs = self.pair_events(device.rank);
            for stream in &device.streams {
                let ends = stream.items.windows(2).enumerate();
                let is_pair = |ends: &[Item]| pairs.contains(&(ends[0].event.0, ends[1].event.0));
                let pairs = ends.filter(|(_, ends)| is_pair(ends)).map(|(nth, _)| nth);
                lines.push(StreamLine {
                    rank: device.rank,
                    kind: stream.kind,
                    pairs: pairs.collect(),
                    items: stream.items.clone(),
                });
            }
        }
        ScheduleDef {
            name: name.into(),
            body: ScheduleBody::Streams {
                channels: Some(self.channels),
                streams: Block::of(lines),
            },
        }
    }

    /// Of the overlapped pairs of a rank: where both actions stand in its row.
    fn pair_events(&self, rank: usize) -> Vec<(usize, usize)> {
        let row = self.rows.get(rank).into_iter().flatten().enumerate();
        let actions: Vec<usize> = row
            .filter(|(_, command)| command.action().is_some())
            .map(|(position, _)| position)
            .collect();
        let starts = self.schedule.pairs.get(rank).into_iter().flatten();
        let ends = starts.map(|nth| Some((*actions.get(*nth)?, *actions.get(nth + 1)?)));
        ends.flatten().collect()
    }
}

/// The row of a device: its items in the order of their events. `joined` are the pairs' events.
fn cells(device: &DeviceStreams, joined: &[(usize, usize)]) -> Result<Vec<Cell>, String> {
    let rank = device.rank;
    let items = || device.streams.iter().flat_map(|stream| &stream.items);
    let n_items = items().count();
    let mut row: Vec<Option<Command>> = vec![None; n_items];
    for item in items() {
        let event = item.event.0;
        match row.get_mut(event) {
            None => {
                return Err(format!(
                    "`{item}` of rank {rank} records event {event} and there are {n_items}; number \
                     them from 0, in the order of the row"
                ));
            }
            Some(Some(first)) => {
                return Err(format!(
                    "`{first}` and `{}` of rank {rank} both record event {event}; number them apart",
                    item.command
                ));
            }
            Some(place) => *place = Some(item.command),
        }
        if let Some(wait) = item.waits.iter().find(|wait| wait.0 >= n_items) {
            return Err(format!(
                "`{item}` of rank {rank} waits for event {} and there are {n_items}",
                wait.0
            ));
        }
    }
    let row: Vec<Command> = row.into_iter().flatten().collect();
    let mut cells = Vec::with_capacity(n_items);
    let mut at = 0;
    while at < row.len() {
        let pair = joined.iter().find(|(first, _)| *first == at);
        let end = pair.map_or(at, |(_, second)| *second);
        let cell = row.get(at..=end).and_then(Cell::joined).ok_or_else(|| {
            format!(
                "`{}` and `{}` of rank {rank} are joined; only two compute actions can be, with \
                 none between them",
                row[at], row[end]
            )
        })?;
        cells.push(cell);
        at = end + 1;
    }
    Ok(cells)
}
