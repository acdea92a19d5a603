//! Schedules as literal rows of cells: what the CSV form and the language's `rows` share.
//!
//! Enters: one row of [`Cell`]s a rank. Leaves: a [`Schedule`] whose shape follows from its cells.
//! Invariant: no action stands twice, every stage has actions and all of them on one rank, and
//! waiting cells carry no meaning: they are dropped.

use std::collections::HashMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Action, Schedule, ScheduleError, grid};
use crate::weave::ast::{Block, Name, Row, ScheduleBody, ScheduleDef};

/// What one rank does in one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Cell {
    /// Waits: `.`
    Wait,
    /// `2F0`
    One(Action),
    /// Two actions overlapped: `2F3+5B1`
    Pair(Action, Action),
}

impl Cell {
    /// Reads `.`, `2F0` or `2F3+5B1`; nothing may follow.
    pub fn parse(text: &str) -> Option<Self> {
        if text == "." {
            return Some(Self::Wait);
        }
        match text.split_once('+') {
            Some((first, second)) => {
                Some(Self::Pair(Action::parse(first)?, Action::parse(second)?))
            }
            None => Action::parse(text).map(Self::One),
        }
    }

    fn actions(self) -> impl Iterator<Item = Action> {
        let (first, second) = match self {
            Self::Wait => (None, None),
            Self::One(action) => (Some(action), None),
            Self::Pair(first, second) => (Some(first), Some(second)),
        };
        first.into_iter().chain(second)
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wait => f.write_str("."),
            Self::One(action) => action.fmt(f),
            Self::Pair(first, second) => write!(f, "{first}+{second}"),
        }
    }
}

impl TryFrom<String> for Cell {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("`{text}` is no cell such as `2F0` or `.`"))
    }
}

impl From<Cell> for String {
    fn from(cell: Cell) -> Self {
        cell.to_string()
    }
}

impl Schedule {
    /// The schedule of these rows, one a rank: its stages, their ranks, the microbatches and slices
    /// are those that occur. Linear.
    ///
    /// Rows in which the lower half of the stages has even microbatches only and the upper half odd
    /// ones only are of two copies of the model; a complete schedule of one copy has no such rows.
    ///
    /// # Errors
    /// [`ScheduleError::Invalid`] with the grid when an action occurs twice, a stage occurs on two
    /// ranks, or a stage below the highest one does not occur.
    pub fn from_cells(name: impl Into<String>, cells: &[Vec<Cell>]) -> Result<Self, ScheduleError> {
        let mut rows = Vec::with_capacity(cells.len());
        let mut pairs = Vec::with_capacity(cells.len());
        for row in cells {
            let mut actions = Vec::with_capacity(row.len());
            let mut starts = Vec::new();
            for cell in row {
                if matches!(cell, Cell::Pair(..)) {
                    starts.push(actions.len());
                }
                actions.extend(cell.actions());
            }
            rows.push(actions);
            pairs.push(starts);
        }
        let stage_rank = places(cells)?;
        let most = |of: fn(&Action) -> u32| {
            let values = rows.iter().flatten().map(of);
            values.max().map_or(0, |most| most as usize + 1)
        };
        let n_microbatches = most(|action| action.microbatch);
        let n_slices = most(|action| action.slice).max(1);
        let n_copies = if has_two_copies(&rows, stage_rank.len(), n_microbatches) {
            2
        } else {
            1
        };
        Ok(Self {
            n_slices,
            pairs,
            n_copies,
            n_stages: stage_rank.len() / n_copies,
            ..Self::new(name, n_microbatches, stage_rank, rows)
        })
    }

    /// One row of cells a rank, without waiting cells.
    pub fn cells(&self) -> Vec<Vec<Cell>> {
        let row_cells = |(row, pairs): (&Vec<Action>, &Vec<usize>)| {
            let mut cells = Vec::with_capacity(row.len());
            let mut at = 0;
            while let Some(action) = row.get(at) {
                match row.get(at + 1).filter(|_| pairs.contains(&at)) {
                    Some(second) => {
                        cells.push(Cell::Pair(*action, *second));
                        at += 2;
                    }
                    None => {
                        cells.push(Cell::One(*action));
                        at += 1;
                    }
                }
            }
            cells
        };
        self.rows.iter().zip(&self.pairs).map(row_cells).collect()
    }

    /// The schedule of a `rows` block of the language.
    ///
    /// # Errors
    /// As [`Schedule::from_cells`].
    pub fn from_block(name: &Name, block: &Block<Row>) -> Result<Self, ScheduleError> {
        let cells: Vec<Vec<Cell>> = block.items().map(|row| row.cells.clone()).collect();
        Self::from_cells(name.as_str(), &cells)
    }

    /// The statement `schedule NAME = rows { … }`.
    pub fn to_statement(&self, name: Name) -> ScheduleDef {
        let rows = self.cells().into_iter().map(|cells| Row { cells });
        ScheduleDef {
            name: name.into(),
            body: ScheduleBody::Rows(Block::of(rows)),
        }
    }
}

/// Whether microbatches run alternately through the two halves of the stages.
fn has_two_copies(rows: &[Vec<Action>], n_stages: usize, n_microbatches: usize) -> bool {
    let half = n_stages as u32 / 2;
    let mut actions = rows.iter().flatten();
    n_stages.is_multiple_of(2)
        && n_stages > 0
        && n_microbatches > 1
        && actions.all(|action| (action.stage < half) == action.microbatch.is_multiple_of(2))
}

/// The rank of every stage, from where its actions stand.
fn places(cells: &[Vec<Cell>]) -> Result<Vec<usize>, ScheduleError> {
    let invalid = |message: String, marks: &[(usize, usize)]| {
        let text = |row: &Vec<Cell>| row.iter().map(Cell::to_string).collect();
        let rows: Vec<Vec<String>> = cells.iter().map(text).collect();
        Err(ScheduleError::Invalid(format!(
            "{message}\n{}",
            grid(&rows, marks)
        )))
    };
    let mut seen: HashMap<Action, (usize, usize)> = HashMap::new();
    let mut stage_place: Vec<Option<(usize, usize)>> = Vec::new();
    for (rank, row) in cells.iter().enumerate() {
        for (step, cell) in row.iter().enumerate() {
            for action in cell.actions() {
                if let Some(first) = seen.insert(action, (rank, step)) {
                    let message = format!(
                        "`{action}` stands twice, on rank {} at step {} and on rank {rank} at step \
                         {step}; remove one",
                        first.0, first.1
                    );
                    return invalid(message, &[first, (rank, step)]);
                }
                let stage = action.stage as usize;
                if stage >= MAX_STAGES {
                    let message = format!(
                        "`{action}` is of stage {stage}; at most {MAX_STAGES} stages are supported"
                    );
                    return invalid(message, &[(rank, step)]);
                }
                if stage >= stage_place.len() {
                    stage_place.resize(stage + 1, None);
                }
                match stage_place[stage] {
                    None => stage_place[stage] = Some((rank, step)),
                    Some(first) if first.0 != rank => {
                        let message = format!(
                            "stage {stage} stands on rank {} and, with `{action}`, on rank {rank}; \
                             a stage's weights are on one rank",
                            first.0
                        );
                        return invalid(message, &[first, (rank, step)]);
                    }
                    Some(_) => {}
                }
            }
        }
    }
    let n_stages = stage_place.len();
    let mut stage_rank = Vec::with_capacity(n_stages);
    for (stage, place) in stage_place.into_iter().enumerate() {
        match place {
            Some((rank, _)) => stage_rank.push(rank),
            None => {
                let message = format!(
                    "stage {stage} has no action and there are stages up to {}; number the stages \
                     without gaps",
                    n_stages - 1
                );
                return invalid(message, &[]);
            }
        }
    }
    Ok(stage_rank)
}

/// Far above any pipeline; keeps a mistyped stage from asking for memory.
const MAX_STAGES: usize = 1 << 16;
