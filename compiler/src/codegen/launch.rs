//! How the rows of a kernel are spread over the threads of a GPU.
//!
//! Enters: a [`Kernel`]. Leaves: its parts, each with a [`Launch`]: how many threads share a row, and the
//! grid.
//! Invariant: a program whose rows must follow one another gets one team, and a team is a thread,
//! a warp, or a whole block, so that a barrier is met by all threads that wait at it or by none.

use serde::{Deserialize, Serialize};

use super::columns::split;
use super::kernel::{Kernel, RowProgram};

/// Threads that execute one instruction together.
pub const WARP: usize = 32;
/// Threads of a block in which each warp or thread has its own row.
const BLOCK: usize = 256;
/// Beyond this many blocks every device is full; the rest of the rows follow in a loop.
const MAX_BLOCKS: usize = 8192;
/// Lanes that a thread of a block-wide team should get at least: one 128-bit access.
const LANES_PER_THREAD: usize = 4;
/// Most threads of a block: with these, each may have 128 of a multiprocessor's 65,536 registers.
const MAX_THREADS: usize = 512;

/// Teams of a block that sums columns, a row at a time each.
const MAX_COLUMN_TEAMS: usize = 16;

/// Who takes which rows and lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Walk {
    /// A team takes a row, and its threads the lanes.
    Rows,
    /// A block takes a warp of lanes, a thread each in every team, and its teams the rows.
    Columns,
}

/// Grid and block of a kernel, and the threads that share a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    pub walk: Walk,
    /// Threads that share a row: 1, a warp, or a block of a power of two of warps.
    pub team: usize,
    /// Teams in a block.
    pub teams: usize,
    /// Blocks of the grid.
    pub blocks: usize,
}

impl Launch {
    /// The launch of `program`.
    pub fn of(program: &RowProgram) -> Self {
        let lanes = program.lanes();
        let team = match lanes {
            0..=1 => 1,
            2..=BLOCK => WARP,
            _ => (lanes / LANES_PER_THREAD)
                .next_power_of_two()
                .clamp(2 * WARP, MAX_THREADS),
        };
        if !program.is_splittable() {
            return Self {
                walk: Walk::Rows,
                team,
                teams: 1,
                blocks: 1,
            };
        }
        let teams = if team > WARP { 1 } else { BLOCK / team };
        let blocks = program.n_rows().div_ceil(teams).clamp(1, MAX_BLOCKS);
        Self {
            walk: Walk::Rows,
            team,
            teams,
            blocks,
        }
    }

    /// The launch of a program of sums by column.
    fn of_columns(program: &RowProgram) -> Self {
        Self {
            walk: Walk::Columns,
            team: WARP,
            teams: program.n_rows().next_power_of_two().min(MAX_COLUMN_TEAMS),
            blocks: program.lanes().div_ceil(WARP),
        }
    }

    /// A kernel as what a GPU does one after another: sums by column first, then the rest.
    pub fn parts(kernel: &Kernel) -> Vec<(Kernel, Self)> {
        let split = split(kernel.program());
        let Some(columns) = split.columns else {
            return vec![(kernel.clone(), Self::of(kernel.program()))];
        };
        let launch = Self::of_columns(&columns);
        let mut parts = vec![(kernel.part("_columns", columns), launch)];
        if let Some(rest) = split.rest {
            let launch = Self::of(&rest);
            parts.push((kernel.part("", rest), launch));
        }
        parts
    }

    /// Threads of a block.
    pub fn threads(&self) -> usize {
        self.team * self.teams
    }
}
