//! Pictures of a simulated schedule: ranks down, time across.
//!
//! Enters: a schedule and its simulation. Leaves: text for a terminal, or one HTML page that needs
//! nothing else.
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

/// Letters and colors of what a rank does; ANSI 256 background, then CSS.
fn kind_color(kind: ActionKind) -> (u8, &'static str) {
    match kind {
        ActionKind::F => (68, "#5b8db8"),
        ActionKind::B => (65, "#6a9a6a"),
        ActionKind::I => (107, "#8fb573"),
        ActionKind::W => (179, "#d1a954"),
        ActionKind::R => (132, "#b0709a"),
    }
}

/// The same for idle spans, with the sign that stands for them without colors.
fn cause_color(cause: Cause) -> (u8, &'static str, char) {
    match cause {
        Cause::Dependency => (236, "#e4e2dc", '·'),
        Cause::Communication => (131, "#c9605f", '~'),
        Cause::Memory => (97, "#8a72b5", 'm'),
        Cause::Barrier => (244, "#9a9a94", '|'),
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
    let (nothing, _, sign) = cause_color(Cause::Dependency);
    let mut columns = vec![(sign, nothing); n_columns];
    let column_of = |at_s: f64| ((at_s / column_s + 1e-9) as usize).min(n_columns);
    for idle in &simulation.idle[rank] {
        let (color, _, sign) = cause_color(idle.cause);
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
        let (color, _) = kind_color(action.kind);
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
fn memory_curves(
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
        let (background, _, sign) = cause_color(cause);
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

/// Most rectangles of a page; beyond, only the first ones by time are drawn, and the page says so.
const MAX_RECTANGLES: usize = 40_000;
const PAGE_WIDTH: f64 = 1500.0;
const ROW: f64 = 26.0;
const LEFT: f64 = 70.0;
const CURVE: f64 = 34.0;

/// One page with the grid, idle spans by cause, what each rank holds, and the key figures.
pub fn html(schedule: &Schedule, simulation: &Simulation, costs: &Costs) -> String {
    let n_ranks = schedule.n_ranks;
    // A cell of the shortest common work is wide enough for its name, within reason.
    let mean_s = simulation.busy_s.iter().sum::<f64>() / schedule.n_actions().max(1) as f64;
    let width = (simulation.step_s / mean_s * 26.0).clamp(PAGE_WIDTH, 12_000.0);
    let x =
        |at_s: f64| LEFT + (width - LEFT - 12.0) * at_s / simulation.step_s.max(f64::MIN_POSITIVE);
    let grid_height = n_ranks as f64 * ROW;
    let height = grid_height + 30.0 + n_ranks as f64 * CURVE + 10.0;
    let mut svg = format!(
        "<svg width=\"{width:.0}\" height=\"{height:.0}\" role=\"img\" aria-label=\"schedule\">\n"
    );
    let mut n_drawn = 0;
    for rank in 0..n_ranks {
        let y = rank as f64 * ROW;
        let _ = writeln!(
            svg,
            "<text x=\"4\" y=\"{:.0}\">rank {rank}</text>",
            y + 17.0
        );
        for idle in &simulation.idle[rank] {
            let (_, color, _) = cause_color(idle.cause);
            let (from, until) = (x(idle.span.start_s), x(idle.span.end_s));
            let _ = writeln!(
                svg,
                "<rect x=\"{from:.2}\" y=\"{:.0}\" width=\"{:.2}\" height=\"{:.0}\" fill=\"{color}\"><title>waits for {}: {:.4} s to {:.4} s (predicted)</title></rect>",
                y + 2.0,
                until - from,
                ROW - 4.0,
                idle.cause.text(),
                idle.span.start_s,
                idle.span.end_s
            );
        }
        for (position, action) in schedule.rows[rank].iter().enumerate() {
            if n_drawn >= MAX_RECTANGLES * (rank + 1) / n_ranks {
                break;
            }
            n_drawn += 1;
            let span = simulation.spans[rank][position];
            let (from, until) = (x(span.start_s), x(span.end_s));
            let (_, color) = kind_color(action.kind);
            // Overlapped pairs share a span: one above the other.
            let pairs = &schedule.pairs[rank];
            let (top, tall) = if pairs.binary_search(&position).is_ok() {
                (y + 2.0, ROW / 2.0 - 2.0)
            } else if position > 0 && pairs.binary_search(&(position - 1)).is_ok() {
                (y + ROW / 2.0, ROW / 2.0 - 2.0)
            } else {
                (y + 2.0, ROW - 4.0)
            };
            let _ = writeln!(
                svg,
                "<rect x=\"{from:.2}\" y=\"{top:.1}\" width=\"{:.2}\" height=\"{tall:.1}\" fill=\"{color}\" stroke=\"#fff\" stroke-width=\".6\"><title>{action}: {:.4} s to {:.4} s (predicted)</title></rect>",
                until - from,
                span.start_s,
                span.end_s
            );
            let name = action.microbatch.to_string();
            if until - from > 7.0 * name.len() as f64 + 2.0 && tall > 12.0 {
                let _ = writeln!(
                    svg,
                    "<text x=\"{:.1}\" y=\"{:.0}\" text-anchor=\"middle\" class=\"mb\">{name}</text>",
                    (from + until) / 2.0,
                    y + 17.0
                );
            }
        }
    }
    let peak = simulation.peak().max(f64::MIN_POSITIVE);
    for (rank, curve) in memory_curves(schedule, simulation, costs)
        .iter()
        .enumerate()
    {
        let base = grid_height + 30.0 + (rank + 1) as f64 * CURVE;
        let mut path = format!("M{LEFT:.1} {base:.1}");
        let thin = (curve.len() / (MAX_RECTANGLES / n_ranks.max(1)).max(1)).max(1);
        for (at_s, bytes) in curve.iter().step_by(thin) {
            let _ = write!(
                path,
                "H{:.1}V{:.1}",
                x(*at_s),
                base - (CURVE - 6.0) * bytes / peak
            );
        }
        let _ = writeln!(
            svg,
            "<text x=\"4\" y=\"{:.0}\">rank {rank}</text><path d=\"{path}V{base:.1}Z\" class=\"held\"><title>rank {rank} holds at most {:.4} (predicted)</title></path>",
            base - 6.0,
            simulation.peak_bytes[rank]
        );
    }
    svg += "</svg>\n";
    page(schedule, simulation, &svg, n_drawn)
}

fn page(schedule: &Schedule, simulation: &Simulation, svg: &str, n_drawn: usize) -> String {
    let bubble = &simulation.bubble;
    let mut legend = String::new();
    for kind in ActionKind::ALL {
        let meaning = match kind {
            ActionKind::F => "forward",
            ActionKind::B => "backward",
            ActionKind::I => "input gradient",
            ActionKind::W => "weight gradient",
            ActionKind::R => "recompute",
        };
        if schedule
            .rows
            .iter()
            .flatten()
            .any(|action| action.kind == kind)
        {
            let _ = write!(
                legend,
                "<i style=\"background:{}\"></i>{meaning} ",
                kind_color(kind).1
            );
        }
    }
    for cause in Cause::ALL {
        let _ = write!(
            legend,
            "<i style=\"background:{}\"></i>waits: {} {:.4} s ",
            cause_color(cause).1,
            cause.text(),
            bubble.of(cause)
        );
    }
    let note = if n_drawn < schedule.n_actions() {
        format!(
            "<p>The first {n_drawn} of {} actions are drawn.</p>",
            schedule.n_actions()
        )
    } else {
        String::new()
    };
    let name = escape(&schedule.name);
    format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>{name}</title>\n<style>\
         body{{font:14px/1.4 system-ui,sans-serif;margin:24px;color:#2b2b28;background:#fbfaf7}}\
         svg{{display:block}}svg text{{font:12px ui-monospace,monospace;fill:#55534d}}svg .mb{{fill:#fff}}\
         .scroll{{overflow-x:auto;border:1px solid #ddd9cf;padding:8px;background:#fff}}\
         .held{{fill:#c9d8e6;stroke:#5b8db8;stroke-width:.8}}\
         i{{display:inline-block;width:12px;height:12px;margin:0 4px 0 12px;vertical-align:-1px}}\
         td,th{{padding:2px 16px 2px 0;text-align:left;font-weight:normal}}th{{color:#77746b}}</style>\n\
         <h1>{name}</h1>\n<p>{} ranks · {} stages · {} microbatches; all figures are predicted.</p>\n\
         <table><tr><th>step</th><th>bubble</th><th>idle share</th><th>peak of a rank</th></tr>\
         <tr><td>{:.4} s</td><td>{:.4} s</td><td>{:.2} %</td><td>{:.4}</td></tr></table>\n\
         <p>{legend}</p>{note}\n<div class=\"scroll\">{svg}</div>\n\
         <p>Below the grid: what each rank holds over time, to one scale.</p>\n</html>\n",
        schedule.n_ranks,
        schedule.n_stages,
        schedule.n_microbatches,
        simulation.step_s,
        simulation.bubble_s,
        simulation.bubble_rate() * 100.0,
        simulation.peak()
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
