//! Pipeline schedules as data: who does what in which order.
//!
//! Enters: order keys, literal rows or CSV, or a generator's rows. Leaves: a [`Schedule`], its text
//! in the language, its CSV, its JSON.
//! Invariant: what parses and prints is the same; whether a schedule is complete and free of
//! deadlocks is for the checks to say, a `Schedule` itself may be wrong.
//!
//! Three levels: compute actions ([`Action`]), commands with communication and memory
//! ([`Command`]), and streams with events ([`DeviceStreams`]).

mod action;
mod command;
mod csv;
mod grid;
mod rows;
mod streams;

pub use action::{Action, ActionKind};
pub use command::{Channels, Command, Lowered, Verb, Wire};
pub use grid::grid;
pub use rows::Cell;
pub use streams::{DeviceStreams, Event, Item, Stream, StreamKind};

use serde::{Deserialize, Serialize};

/// What is wrong with the text of a schedule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// The message names the cell and ends in the grid around it.
    #[error("{0}")]
    Invalid(String),
}

/// When a stage's weights change.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Updates {
    /// Once, after the last microbatch: every microbatch sees the same weights.
    #[default]
    Flush,
    /// After every microbatch's backward (PipeDream): a microbatch's backward uses the weights that
    /// its forward saw, so versions are kept, and gradients are stale.
    EveryMicrobatch,
}

/// The order of work of every rank of one pipeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    pub name: String,
    pub n_ranks: usize,
    /// Stages of one copy of the model.
    pub n_stages: usize,
    /// Copies of the model: 2 where microbatches run in both directions (Chimera, DualPipe).
    /// Stage `s` of copy `c` is written as stage `c · n_stages + s`; microbatch `m` runs through
    /// copy `m mod n_copies`.
    pub n_copies: usize,
    pub n_microbatches: usize,
    /// Parts of every sequence; 1 unless sequences are divided.
    pub n_slices: usize,
    pub updates: Updates,
    /// The rank of every stage of every copy: `n_copies · n_stages` entries.
    pub stage_rank: Vec<usize>,
    /// What each rank does, in order.
    pub rows: Vec<Vec<Action>>,
    /// Per rank, ascending: `i` where the actions `i` and `i + 1` of the row run overlapped, one's
    /// communication under the other's computation. Whoever cannot overlap runs them in order.
    pub pairs: Vec<Vec<usize>>,
}

impl Schedule {
    /// One copy, whole sequences, one update, no overlap.
    pub fn new(
        name: impl Into<String>,
        n_microbatches: usize,
        stage_rank: Vec<usize>,
        rows: Vec<Vec<Action>>,
    ) -> Self {
        Self {
            name: name.into(),
            n_ranks: rows.len(),
            n_stages: stage_rank.len(),
            n_copies: 1,
            n_microbatches,
            n_slices: 1,
            updates: Updates::Flush,
            stage_rank,
            pairs: vec![Vec::new(); rows.len()],
            rows,
        }
    }

    /// The copy of the model that a microbatch runs through.
    pub fn copy_of(&self, microbatch: u32) -> usize {
        microbatch as usize % self.n_copies.max(1)
    }

    /// The microbatches that run through a stage (of a copy).
    pub fn microbatches_of(&self, stage: u32) -> impl Iterator<Item = u32> {
        let copy = stage as usize / self.n_stages.max(1);
        (copy..self.n_microbatches)
            .step_by(self.n_copies.max(1))
            .map(|microbatch| microbatch as u32)
    }

    /// The stage of the model, whatever its copy.
    pub fn model_stage(&self, stage: u32) -> usize {
        stage as usize % self.n_stages.max(1)
    }

    /// The stage whose output this one reads; none for a first stage.
    pub fn stage_before(&self, stage: u32) -> Option<u32> {
        (self.model_stage(stage) > 0).then(|| stage - 1)
    }

    /// The stage that reads this one's output; none for a last stage.
    pub fn stage_after(&self, stage: u32) -> Option<u32> {
        (self.model_stage(stage) + 1 < self.n_stages).then_some(stage + 1)
    }

    /// The stages (of copies) on a rank, ascending.
    pub fn stages_of(&self, rank: usize) -> impl Iterator<Item = u32> {
        let ranks = self.stage_rank.iter().enumerate();
        ranks
            .filter(move |(_, at)| **at == rank)
            .map(|(stage, _)| stage as u32)
    }

    /// Number of actions of all ranks.
    pub fn n_actions(&self) -> usize {
        self.rows.iter().map(Vec::len).sum()
    }

    /// The step × rank grid with marked cells (rank, step).
    pub fn grid(&self, marks: &[(usize, usize)]) -> String {
        let text = |row: &Vec<Action>| row.iter().map(Action::to_string).collect();
        grid(&self.rows.iter().map(text).collect::<Vec<_>>(), marks)
    }
}
