//! The third level: what each device's queues hold, and which events they wait for.
//!
//! Enters: the assignment of a [`super::Lowered`]'s commands to queues. Leaves: what a device
//! executes: each stream in order, an item once the events it waits for are recorded.
//! Invariant: every event is recorded by exactly one item, the one of that number.

use serde::{Deserialize, Serialize};

use super::Command;

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
