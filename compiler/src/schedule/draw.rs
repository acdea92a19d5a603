//! Pictures of a simulated schedule: ranks down, time across.
//!
//! Enters: a schedule and its simulation. Leaves: text for a terminal; reports draw the same from
//! [`memory_curves`] and the simulation.
//! Invariant: nothing is drawn to another scale than its row's; every idle span has its cause's
//! color; every figure says that it is predicted.

use std::fmt::Write;

use meshweave_dsl::schedule::{Action, ActionKind, Schedule};

use super::memory::replay;
use super::simulate::{Cause, Costs, Simulation};

/// How a terminal picture looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terminal {
    /// Columns for time.
    pub width: usize,
    pub color: bool,
}

/// The background of what a rank does, of ANSI's 256.
fn kind_color(kind: ActionKind) -> u8 {
    match kind {
        ActionKind::F => 68,
        ActionKind::B => 65,
        ActionKind::I => 107,
        ActionKind::W => 179,
        ActionKind::R => 132,
    }
}

/// The same for idle spans, with the sign that stands for them without colors.
fn cause_color(cause: Cause) -> (u8, char) {
    match cause {
        Cause::Dependency => (236, '·'),
        Cause::Communication => (131, '~'),
        Cause::Memory => (97, 'm'),
        Cause::Barrier => (244, '|'),
    }
}

/// The picture in characters: a line a rank, each column one slice of time; then what each rank
/// holds over time, as blocks. Linear in what is drawn.
pub fn terminal(
    schedule: &Schedule,
    simulation: &Simulation,
    costs: &Costs,
    how: Terminal,
) -> String {
    let n_columns = how.width.max(20);
    let column_s = simulation.step_s / n_columns as f64;
    let label = format!("rank {}", schedule.n_ranks.saturating_sub(1)).len();
    let mut text = String::new();
    for rank in 0..schedule.n_ranks {
        let columns = rank_columns(schedule, simulation, rank, n_columns, column_s);
        let _ = write!(text, "{:>label$} ", format!("rank {rank}"));
        for (sign, color) in &columns {
            if how.color {
                let _ = write!(text, "\x1b[48;5;{color}m\x1b[38;5;232m{sign}");
            } else {
                text.push(*sign);
            }
        }
        text.push_str(if how.color { "\x1b[0m\n" } else { "\n" });
    }
    text += "\nmemory (predicted, share of the highest peak)\n";
    let peak = simulation.peak().max(f64::MIN_POSITIVE);
    for (rank, memory) in memory_curves(schedule, simulation, costs)
        .iter()
        .enumerate()
    {
        let _ = write!(text, "{:>label$} ", format!("rank {rank}"));
        text.extend((0..n_columns).map(|column| {
            let (from_s, until_s) = (column as f64 * column_s, (column + 1) as f64 * column_s);
            block(held_within(memory, from_s, until_s) / peak)
        }));
        let _ = writeln!(text, " {:.4}", simulation.peak_bytes[rank]);
    }
    text
}

/// The sign and background of every column of a rank.
fn rank_columns(
    schedule: &Schedule,
    simulation: &Simulation,
    rank: usize,
    n_columns: usize,
    column_s: f64,
) -> Vec<(char, u8)> {
    let (nothing, sign) = cause_color(Cause::Dependency);
    let mut columns = vec![(sign, nothing); n_columns];
    let column_of = |at_s: f64| ((at_s / column_s + 1e-9) as usize).min(n_columns);
    for idle in &simulation.idle[rank] {
        let (color, sign) = cause_color(idle.cause);
        let range = column_of(idle.span.start_s)..column_of(idle.span.end_s);
        columns[range].fill((sign, color));
    }
    // Chunks beyond the first are in small letters, as in the papers.
    let first_stage = schedule.stages_of(rank).next();
    let letter_of = |action: &Action| {
        if first_stage == Some(action.stage) {
            action.kind.text().to_owned()
        } else {
            action.kind.text().to_lowercase()
        }
    };
    let row = &schedule.rows[rank];
    let pairs = &schedule.pairs[rank];
    for (position, (action, span)) in row.iter().zip(&simulation.spans[rank]).enumerate() {
        if position > 0 && pairs.binary_search(&(position - 1)).is_ok() {
            continue;
        }
        let (from, until) = (column_of(span.start_s), column_of(span.end_s));
        let color = kind_color(action.kind);
        let letter = letter_of(action);
        let mut name = format!("{letter}{}", action.microbatch);
        if pairs.binary_search(&position).is_ok()
            && let Some(second) = row.get(position + 1)
        {
            let _ = write!(name, "&{}{}", letter_of(second), second.microbatch);
        }
        let width = until.max(from + 1) - from;
        let shown: String = if name.len() < width { name } else { letter };
        let mut signs = shown.chars();
        for column in columns.iter_mut().skip(from).take(width) {
            *column = (signs.next().unwrap_or(' '), color);
        }
    }
    columns
}

/// (time, bytes held from then on) of every rank.
pub fn memory_curves(
    schedule: &Schedule,
    simulation: &Simulation,
    costs: &Costs,
) -> Vec<Vec<(f64, f64)>> {
    let replayed = replay(schedule, costs);
    let curve = |(rank, memory): (usize, &super::memory::RankMemory)| {
        let spans = &simulation.spans[rank];
        let starts = spans.iter().zip(&memory.while_bytes);
        let mut curve: Vec<(f64, f64)> =
            starts.map(|(span, bytes)| (span.start_s, *bytes)).collect();
        if let Some(last) = spans.last() {
            curve.push((last.end_s, 0.0));
        }
        curve
    };
    replayed.iter().enumerate().map(curve).collect()
}

/// Most bytes held in a span of time.
fn held_within(curve: &[(f64, f64)], from_s: f64, until_s: f64) -> f64 {
    let after = curve.partition_point(|(at_s, _)| *at_s < until_s - 1e-12);
    let first = curve
        .partition_point(|(at_s, _)| *at_s <= from_s + 1e-12)
        .saturating_sub(1);
    curve[first.min(after)..after]
        .iter()
        .map(|(_, bytes)| *bytes)
        .fold(0.0, f64::max)
}

fn block(share: f64) -> char {
    const BLOCKS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    BLOCKS[((share.clamp(0.0, 1.0) * 8.0).round() as usize).min(8)]
}

/// The legend of a terminal picture.
pub fn legend(color: bool) -> String {
    let mut text = String::from("idle: ");
    for cause in Cause::ALL {
        let (background, sign) = cause_color(cause);
        if color {
            let _ = write!(
                text,
                "\x1b[48;5;{background}m {sign} \x1b[0m {}  ",
                cause.text()
            );
        } else {
            let _ = write!(text, "{sign} {}  ", cause.text());
        }
    }
    text.trim_end().to_owned() + "\n"
}
