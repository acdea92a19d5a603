//! Timelines: what ran (or is predicted to run) when, on which rank.
//!
//! Enters: prices of instructions, or clocks around them. Leaves: reports and calibrations.
//! Invariant: events of one (rank, stream) do not overlap and stand in order of time.

use serde::{Deserialize, Serialize};

/// Where numbers come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Basis {
    Predicted,
    Measured,
}

/// What kind of work an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Category {
    Contract,
    Attention,
    Kernel,
    Routine,
    Collective,
    /// Sending to and receiving from one other rank.
    Message,
}

/// One instruction's execution.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    pub rank: usize,
    /// Index of the instruction in its rank's program.
    pub instruction: usize,
    pub name: String,
    pub category: Category,
    /// Seconds from the start of the step.
    pub start_s: f64,
    pub duration_s: f64,
    /// Of the duration, seconds spent waiting for peers (collectives).
    pub wait_s: f64,
    pub n_flops: f64,
    pub n_bytes: f64,
}

/// The events of one step on all ranks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timeline {
    pub basis: Basis,
    pub n_ranks: usize,
    pub events: Vec<Event>,
}

impl Timeline {
    /// Seconds from the start of the step to the end of its last event.
    pub fn step_s(&self) -> f64 {
        self.events
            .iter()
            .map(|event| event.start_s + event.duration_s)
            .fold(0.0, f64::max)
    }

    /// Busy seconds (waiting left out) of a category, summed over ranks.
    pub fn busy_s(&self, category: Category) -> f64 {
        let events = self
            .events
            .iter()
            .filter(|event| event.category == category);
        events.map(|event| event.duration_s - event.wait_s).sum()
    }
}
