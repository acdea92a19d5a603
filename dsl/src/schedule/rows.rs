//! Schedules as literal rows of cells: what the CSV form and the language's `rows` share.
//!
//! Enters: one row of [`Cell`]s a rank. Leaves: a [`Schedule`] whose shape follows from its cells, or
//! a [`Lowered`] where they hold communication and memory actions.
//! Invariant: no action stands twice, every stage has actions and all of them on one rank, and
//! waiting cells carry no meaning: they are dropped.

use std::collections::HashMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Action, Channels, Command, Lowered, Schedule, ScheduleError, Updates, Verb, grid};
use crate::weave::ast::{Block, Name, Row, ScheduleBody, ScheduleDef};

/// What one rank does in one step.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Cell {
    /// Waits: `.`
    Wait,
    /// `2F0`
    One(Action),
    /// A communication or memory action: `2SEND_F0`
    Other(Command),
    /// Two actions overlapped, with the communication and memory actions between them: `2F3+5B1`,
    /// `2F3+2SEND_F3+5B1`
    Pair(Action, Vec<Command>, Action),
}

impl Cell {
    /// Reads `.`, `2F0`, `2SEND_F0` or `2F3+5B1`; nothing may follow.
    pub fn parse(text: &str) -> Option<Self> {
        if text == "." {
            return Some(Self::Wait);
        }
        let commands: Option<Vec<Command>> = text.split('+').map(Command::parse).collect();
        Self::joined(&commands?)
    }

    /// The cell of commands that are joined by `+`: one, or two actions with others between.
    pub fn joined(commands: &[Command]) -> Option<Self> {
        match commands {
            [command] => Some(match command.action() {
                Some(action) => Self::One(action),
                None => Self::Other(*command),
            }),
            [first, between @ .., second] => {
                let is_plain = between.iter().all(|command| command.action().is_none());
                let pair = || Some((first.action()?, second.action()?));
                let (first, second) = pair().filter(|_| is_plain)?;
                Some(Self::Pair(first, between.to_vec(), second))
            }
            [] => None,
        }
    }

    /// Whether it holds a communication or memory action.
    pub fn is_lowered(&self) -> bool {
        match self {
            Self::Wait | Self::One(_) => false,
            Self::Other(_) => true,
            Self::Pair(_, between, _) => !between.is_empty(),
        }
    }

    fn actions(&self) -> impl Iterator<Item = Action> + use<> {
        let (first, second) = match self {
            Self::Wait | Self::Other(_) => (None, None),
            Self::One(action) => (Some(*action), None),
            Self::Pair(first, _, second) => (Some(*first), Some(*second)),
        };
        first.into_iter().chain(second)
    }

    fn commands(&self) -> Vec<Command> {
        match self {
            Self::Wait => Vec::new(),
            Self::One(action) => vec![(*action).into()],
            Self::Other(command) => vec![*command],
            Self::Pair(first, between, second) => {
                let ends = [(*first).into(), (*second).into()];
                [&ends[..1], between.as_slice(), &ends[1..]].concat()
            }
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wait => f.write_str("."),
            Self::One(action) => action.fmt(f),
            Self::Other(command) => command.fmt(f),
            Self::Pair(first, between, second) => {
                write!(f, "{first}+")?;
                for command in between {
                    write!(f, "{command}+")?;
                }
                second.fmt(f)
            }
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
    /// Communication and memory actions are left out; [`Lowered::from_cells`] keeps them.
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
                        cells.push(Cell::Pair(*action, Vec::new(), *second));
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
        Self::from_cells(name.as_str(), &cells_of(block))
    }

    /// The statement `schedule NAME = rows { … }`.
    pub fn to_statement(&self, name: Name) -> ScheduleDef {
        let rows = self.cells().into_iter().map(|cells| Row { cells });
        ScheduleDef {
            name: name.into(),
            body: ScheduleBody::Rows {
                channels: None,
                rows: Block::of(rows),
            },
        }
    }
}

impl Lowered {
    /// The rows of these cells as they stand; their compute actions are the schedule, and an update of
    /// a microbatch (`0UPDATE3`) says that there is one after every microbatch. Linear.
    ///
    /// # Errors
    /// As [`Schedule::from_cells`].
    pub fn from_cells(
        name: impl Into<String>,
        cells: &[Vec<Cell>],
        channels: Channels,
    ) -> Result<Self, ScheduleError> {
        let row = |cells: &Vec<Cell>| cells.iter().flat_map(Cell::commands).collect();
        let rows: Vec<Vec<Command>> = cells.iter().map(row).collect();
        let mut schedule = Schedule::from_cells(name, cells)?;
        let mut commands = rows.iter().flatten();
        if commands.any(|command| command.verb == Verb::Update && command.microbatch.is_some()) {
            schedule.updates = Updates::EveryMicrobatch;
        }
        Ok(Self {
            schedule,
            channels,
            rows,
        })
    }

    /// One row of cells a rank; overlapped pairs are one cell with what stands between them.
    pub fn cells(&self) -> Vec<Vec<Cell>> {
        let row_cells = |(row, pairs): (&Vec<Command>, &Vec<usize>)| {
            let mut cells = Vec::with_capacity(row.len());
            // Of a pair that has begun: its first action, and what followed.
            let mut begun: Option<(Action, Vec<Command>)> = None;
            let mut nth = 0;
            for command in row {
                let Some(action) = command.action() else {
                    match &mut begun {
                        Some((_, between)) => between.push(*command),
                        None => cells.push(Cell::Other(*command)),
                    }
                    continue;
                };
                match begun.take() {
                    Some((first, between)) => cells.push(Cell::Pair(first, between, action)),
                    None if pairs.contains(&nth) => begun = Some((action, Vec::new())),
                    None => cells.push(Cell::One(action)),
                }
                nth += 1;
            }
            cells
        };
        let rows = self.rows.iter().zip(&self.schedule.pairs);
        rows.map(row_cells).collect()
    }

    /// The schedule of a `rows` block of the language, with its communication and memory actions;
    /// none where it has compute actions only.
    ///
    /// # Errors
    /// As [`Schedule::from_cells`].
    pub fn from_block(
        name: &Name,
        block: &Block<Row>,
        channels: Channels,
    ) -> Result<Option<Self>, ScheduleError> {
        let cells = cells_of(block);
        if !cells.iter().flatten().any(Cell::is_lowered) {
            return Ok(None);
        }
        Self::from_cells(name.as_str(), &cells, channels).map(Some)
    }

    /// The statement `schedule NAME = rows channels … { … }`.
    pub fn to_statement(&self, name: Name) -> ScheduleDef {
        let rows = self.cells().into_iter().map(|cells| Row { cells });
        ScheduleDef {
            name: name.into(),
            body: ScheduleBody::Rows {
                channels: Some(self.channels),
                rows: Block::of(rows),
            },
        }
    }
}

fn cells_of(block: &Block<Row>) -> Vec<Vec<Cell>> {
    block.items().map(|row| row.cells.clone()).collect()
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
pub(super) const MAX_STAGES: usize = 1 << 16;
