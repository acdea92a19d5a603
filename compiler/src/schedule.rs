//! Pipeline schedules: built from rules, checked, simulated, searched and drawn.
//!
//! Enters: a name, order keys or rows, and the costs of stages. Leaves: a [`Schedule`] that passes
//! the checks, and a [`Simulation`] of it: time, idle time by cause, memory.
//! Invariant: what this module builds is checked before it is returned.
//!
//! The modules in reading order: [`index`] says who waits for whom; [`keys`], [`patterns`],
//! [`dual`] and [`builtin`] build; [`check`], [`lower`], [`commands`], [`deadlock`] and [`memory`] verify;
//! [`simulate`] and [`closed_form`] price; [`backfill`] and [`search`] improve; [`stages`] divides
//! layers; [`streams`] assigns queues and [`device`] runs them; [`table`] and [`draw`] show.

mod index;
mod keys;
mod patterns;
mod dual;
mod builtin;
mod place;
mod definition;
mod check;
mod lower;
mod commands;
mod deadlock;
mod memory;
mod simulate;
mod closed_form;
mod backfill;
mod greedy;
mod search;
mod exact;
mod stages;
mod streams;
mod device;
pub mod table;
mod draw;
#[cfg(test)]
mod tests;

pub use backfill::backfill;
pub(crate) use builtin::unchecked;
pub use builtin::{Builtin, Placement, Shape, build};
pub use check::check;
pub use closed_form::{ClosedForm, Exactness, RankCosts, closed_form, pair_s};
pub use deadlock::check_lowered;
pub use definition::{definitions, from_definition, lowered_definition};
pub use device::{CommandCosts, DeviceRun, WaitFor, run_devices, run_queues};
pub use draw::{Terminal, legend, memory_curves, terminal};
pub use exact::{Optimum, optimum};
pub use keys::from_keys;
pub use lower::{Lowering, lower, lower_naively};
pub use memory::{RankMemory, Versions, check_memory, check_versions, replay};
pub use place::place;
pub use search::{Candidate, Found, SearchOptions, Stages, search};
pub use simulate::{
    Bubble, Cause, Contention, Costs, Idle, Simulation, StageCosts, TimeSpan, repeat, simulate,
    steady_step_s,
};
pub use stages::{LayerCosts, PartitionOptions, StagePartition, partition_layers};
pub use streams::{check_streams, streams};
pub use table::{TableRow, Verdict, table};

use meshweave_dsl::schedule::ScheduleError;

/// Why there is no schedule, or why it is refused. Messages end in the step × rank grid with the
/// offending cells marked where there are any.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PipelineError {
    /// The request makes no sense: unknown names, counts that do not divide, actions that are
    /// doubled, missing, misplaced or out of order.
    #[error("{0}")]
    Invalid(String),
    /// The request is sound and cannot be met: memory.
    #[error("{0}")]
    Infeasible(String),
    /// The search gave up.
    #[error("{0}")]
    Exhausted(String),
    /// Our bug: a schedule that we built does not pass the checks.
    #[error("{0}")]
    Internal(String),
}

impl From<ScheduleError> for PipelineError {
    fn from(error: ScheduleError) -> Self {
        match error {
            ScheduleError::Invalid(message) => Self::Invalid(message),
        }
    }
}
