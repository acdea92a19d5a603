//! How the rows of a kernel are spread over the threads of a GPU.
//!
//! Enters: a [`Kernel`]. Leaves: its parts, each with a [`Launch`]: how many threads share a row, and the
//! grid.
//! Invariant: a program whose rows must follow one another gets one team, and a team is a thread,
//! a warp, or a whole block, so that a barrier is met by all threads that wait at it or by none.

use serde::{Deserialize, Serialize};

use super::columns::split;
use super::kernel::{Access, Inst, Kernel, RowProgram, Span};

/// Threads that execute one instruction together.
pub const WARP: usize = 32;
/// Threads of a block in which each warp or thread has its own row.
const BLOCK: usize = 256;
/// Beyond this many blocks every device is full; the rest of the rows follow in a loop.
const MAX_BLOCKS: usize = 8192;
/// Lanes that a thread of a block-wide team should get at least.
const LANES_PER_THREAD: usize = 4;
/// Bytes of the widest access of a thread. Buffers begin at multiples of this.
pub const ACCESS_BYTES: usize = 16;
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
    /// Neighboring lanes that a thread takes at once, a power of two that divides the lanes.
    pub adjacent: usize,
}

impl Launch {
    /// The launch of `program`.
    pub fn of(program: &RowProgram) -> Self {
        let lanes = program.lanes();
        let adjacent = adjacent_lanes(program);
        let team = match lanes {
            0..=1 => 1,
            2..=BLOCK => WARP,
            _ => (lanes / LANES_PER_THREAD.max(adjacent))
                .next_power_of_two()
                .clamp(2 * WARP, MAX_THREADS),
        };
        if !program.is_splittable() {
            return Self {
                walk: Walk::Rows,
                team,
                teams: 1,
                blocks: 1,
                adjacent,
            };
        }
        let teams = if team > WARP { 1 } else { BLOCK / team };
        let blocks = program.n_rows().div_ceil(teams).clamp(1, MAX_BLOCKS);
        Self {
            walk: Walk::Rows,
            team,
            teams,
            blocks,
            adjacent,
        }
    }

    /// The launch of a program of sums by column.
    fn of_columns(program: &RowProgram) -> Self {
        Self {
            walk: Walk::Columns,
            team: WARP,
            teams: program.n_rows().next_power_of_two().min(MAX_COLUMN_TEAMS),
            blocks: program.lanes().div_ceil(WARP),
            adjacent: 1,
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

    /// Blocks for which a multiprocessor must have room, so that an assembler does not spill to have
    /// more: those of [`MAX_THREADS`] threads, which leaves each 128 registers.
    pub fn blocks_at_once(&self) -> usize {
        (MAX_THREADS / self.threads()).max(1)
    }
}

/// Lanes that a thread loads and stores with one access of the narrowest element, where all accesses
/// over lanes are contiguous and aligned, and a warp has enough of them; else 1.
fn adjacent_lanes(program: &RowProgram) -> usize {
    if program.limit().is_some() {
        return 1;
    }
    let accesses = program.body().iter().filter_map(|inst| match inst {
        Inst::Load(access) | Inst::Store(access, _) | Inst::Accumulate { access, .. } => {
            (access.span() == Span::Lane).then_some(access)
        }
        _ => None,
    });
    let size = |access: &Access| program.args()[access.arg.index()].elem.size();
    let Some(narrowest) = accesses.clone().map(size).min() else {
        return 1;
    };
    let is_aligned = |access: &Access, n: usize| {
        let strides = access.outer.iter().zip(program.rows());
        let strides = strides.filter(|(_, n_rows)| **n_rows > 1);
        let indexed = access.indexed.iter().map(|indexed| indexed.stride);
        let mut steps = strides
            .map(|(stride, _)| *stride)
            .chain(indexed)
            .chain([access.offset]);
        access.lane == 1 && steps.all(|step| step % n as i64 == 0)
    };
    let mut n = ACCESS_BYTES / narrowest;
    while n > 1
        && !(n * WARP <= program.lanes()
            && program.lanes().is_multiple_of(n)
            && accesses.clone().all(|access| is_aligned(access, n)))
    {
        n /= 2;
    }
    n
}
