//! Schedules as CSV, in the form that PyTorch's pipelines read and write.
//!
//! Enters: CSV text, one line a rank, one cell a step: `2F0`, an empty cell to wait,
//! `(2F3;5B1)OVERLAP_F_B` for an overlapped pair; with communication also `2SEND_F0`, `2UNSHARD` and
//! the like. Leaves: a [`Schedule`], or a [`Lowered`].
//! Invariant: reading is strict, every character has a meaning or is an error with its place
//! (PyTorch's reader accepts `2F0xyz` as `2F0`, and duplicates).
//! Source: `torch/distributed/pipelining/schedules.py`, `_load_csv`, `_dump_csv`, `_Action.from_str`.

use super::{Action, Cell, Channels, Command, Lowered, Schedule, ScheduleError};

const OVERLAP: &str = "OVERLAP_F_B";

impl Schedule {
    /// Reads the CSV form; blanks around a cell and quotes around it are allowed. Linear.
    ///
    /// # Errors
    /// [`ScheduleError::Invalid`] that names line and cell, and as [`Schedule::from_cells`].
    pub fn from_csv(name: impl Into<String>, text: &str) -> Result<Self, ScheduleError> {
        let rows = read_rows(text, |cell| {
            read_cell(cell).ok_or("no action; a cell is empty, or such as `2F0`, or")
        })?;
        if rows.iter().flatten().all(|cell| *cell == Cell::Wait) {
            return Err(nothing());
        }
        Self::from_cells(name, &rows)
    }

    /// The CSV form, without waiting cells.
    pub fn to_csv(&self) -> String {
        let mut text = String::new();
        for row in self.cells() {
            let cells: Vec<String> = row.iter().map(write_cell).collect();
            text += &cells.join(",");
            text.push('\n');
        }
        text
    }
}

impl Lowered {
    /// Reads the CSV form with communication (PyTorch's `compute_comms`): the compute actions are the
    /// schedule, and every command stays where it stands. Linear.
    ///
    /// # Errors
    /// As [`Schedule::from_csv`].
    pub fn from_csv(
        name: impl Into<String>,
        text: &str,
        channels: Channels,
    ) -> Result<Self, ScheduleError> {
        let rows = read_rows(text, |cell| {
            let command = unquoted(cell).and_then(Command::parse);
            command
                .map_or_else(|| read_cell(cell), |command| Cell::joined(&[command]))
                .ok_or("no command; a cell is empty, or such as `2F0`, `2SEND_F0`, or")
        })?;
        let is_action = |cell: &Cell| !matches!(cell, Cell::Wait | Cell::Other(_));
        if !rows.iter().flatten().any(is_action) {
            return Err(nothing());
        }
        Self::from_cells(name, &rows, channels)
    }

    /// Whether some cell of a text is a command other than a compute action.
    pub fn is_csv(text: &str) -> bool {
        let mut cells = text.lines().flat_map(|line| line.split(','));
        cells.any(|cell| {
            let command = unquoted(cell).and_then(Command::parse);
            command.is_some_and(|command| command.action().is_none())
        })
    }
}

fn nothing() -> ScheduleError {
    ScheduleError::Invalid(
        "the file has no action; write one line a rank, such as `0F0,0F1,,0B0`".into(),
    )
}

/// The cells of every line; `read` says what is wrong with one.
fn read_rows<T>(
    text: &str,
    read: impl Fn(&str) -> Result<T, &'static str>,
) -> Result<Vec<Vec<T>>, ScheduleError> {
    let text = text.trim_start_matches('\u{feff}').trim_end();
    let lines = text.lines().enumerate();
    let row = |(rank, line): (usize, &str)| {
        let cells = line.split(',').enumerate();
        let cells = cells.map(|(step, cell)| {
            read(cell).map_err(|why| {
                ScheduleError::Invalid(format!(
                    "line {} (rank {rank}), cell {}: `{}` is {why} `(2F3;5B1){OVERLAP}`",
                    rank + 1,
                    step + 1,
                    cell.trim()
                ))
            })
        });
        cells.collect()
    };
    lines.map(row).collect()
}

/// A cell without blanks and quotes around it.
fn unquoted(text: &str) -> Option<&str> {
    let text = text.trim();
    match text.strip_prefix('"') {
        Some(quoted) => Some(quoted.strip_suffix('"')?.trim()),
        None => Some(text),
    }
}

fn read_cell(text: &str) -> Option<Cell> {
    let text = unquoted(text)?;
    if text.is_empty() {
        return Some(Cell::Wait);
    }
    match text.strip_prefix('(') {
        Some(rest) => {
            let (first, second) = rest
                .strip_suffix(OVERLAP)?
                .strip_suffix(')')?
                .split_once(';')?;
            Some(Cell::Pair(
                Action::parse(first.trim())?,
                Vec::new(),
                Action::parse(second.trim())?,
            ))
        }
        None => Action::parse(text).map(Cell::One),
    }
}

fn write_cell(cell: &Cell) -> String {
    match cell {
        Cell::Wait => String::new(),
        Cell::One(action) => action.to_string(),
        // Schedules have no communication between the actions of a pair.
        Cell::Pair(first, _, second) => format!("({first};{second}){OVERLAP}"),
        Cell::Other(command) => command.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO_RANKS: &str = "0F0,0F1,,0B0,,0B1\n,1F0,1B0,1F1,1B1\n";

    #[test]
    fn csv_reads_and_prints() {
        let schedule = Schedule::from_csv("x", TWO_RANKS).unwrap();
        assert_eq!((schedule.n_ranks, schedule.n_stages), (2, 2));
        assert_eq!(schedule.n_microbatches, 2);
        assert_eq!(schedule.to_csv(), "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n");
        let again = Schedule::from_csv("x", &schedule.to_csv()).unwrap();
        assert_eq!(again, schedule);
        let json = serde_json::to_string(&schedule).unwrap();
        assert_eq!(serde_json::from_str::<Schedule>(&json).unwrap(), schedule);
    }

    #[test]
    fn communication_reads_and_prints() {
        let text = "0UNSHARD,0F0,0SEND_F0,0RECV_B0,0B0,0RESHARD,0REDUCE_GRAD\n\
                    1RECV_F0,1F0,1B0,1SEND_B0\n";
        assert!(Lowered::is_csv(text) && !Lowered::is_csv(TWO_RANKS));
        let lowered = Lowered::from_csv("x", text, Channels::default()).unwrap();
        assert_eq!(lowered.to_csv(), text);
        assert_eq!(lowered.schedule.to_csv(), "0F0,0B0\n1F0,1B0\n");
        let error = |text: &str| {
            let read = Lowered::from_csv("x", text, Channels::default());
            read.unwrap_err().to_string()
        };
        insta::assert_snapshot!(error("0F0,0SEND_F0xyz\n"), @"line 1 (rank 0), cell 2: `0SEND_F0xyz` is no command; a cell is empty, or such as `2F0`, `2SEND_F0`, or `(2F3;5B1)OVERLAP_F_B`");
        insta::assert_snapshot!(error("0SEND_F0\n"), @"the file has no action; write one line a rank, such as `0F0,0F1,,0B0`");
    }

    #[test]
    fn pairs_survive() {
        let text = "0F0,(0F1;0B0)OVERLAP_F_B,0B1\n";
        let schedule = Schedule::from_csv("x", text).unwrap();
        assert_eq!(schedule.pairs, [[1]]);
        assert_eq!(schedule.to_csv(), text);
    }

    #[test]
    fn junk_is_refused_with_its_place() {
        let error = |text: &str| Schedule::from_csv("x", text).unwrap_err().to_string();
        insta::assert_snapshot!(error("0F0,0B0\n1F0,2F0xyz\n"), @"line 2 (rank 1), cell 2: `2F0xyz` is no action; a cell is empty, or such as `2F0`, or `(2F3;5B1)OVERLAP_F_B`");
        insta::assert_snapshot!(error("0F0,0F1,0F0\n"), @"
        `0F0` stands twice, on rank 0 at step 0 and on rank 0 at step 2; remove one
        step   rank 0
           0  >0F0<
           1   0F1
           2  >0F0<
        ");
        insta::assert_snapshot!(error("0F0,0B0\n0F1,1B0\n"), @"
        stage 0 stands on rank 0 and, with `0F1`, on rank 1; a stage's weights are on one rank
        step   rank 0  rank 1
           0  >0F0<   >0F1<
           1   0B0     1B0
        ");
        insta::assert_snapshot!(error("0F0,0B0\n2F0,2B0\n"), @"
        stage 1 has no action and there are stages up to 2; number the stages without gaps
        step   rank 0  rank 1
           0   0F0     2F0
           1   0B0     2B0
        ");
        insta::assert_snapshot!(error(",\n"), @"the file has no action; write one line a rank, such as `0F0,0F1,,0B0`");
        for text in [
            "0F0,(0F1;0B0)OVERLAP_F_B junk",
            "0F0,(0F1;0B0",
            "\"0F0",
            "0F0;0F1",
            "0F0 0F1",
        ] {
            assert!(Schedule::from_csv("x", text).is_err(), "{text}");
        }
    }
}
