//! The grid of a pipeline: ranks down, time across, what each rank holds below.
//!
//! Enters: grids, predicted before measured. Leaves: a part of the page with inline SVG.
//! Invariant: all grids of a page have one time scale, and all curves of a grid one scale; every idle
//! span has its cause's color and every figure its basis.

use std::fmt::Write;

use meshweave_dsl::schedule::ActionKind;
use meshweave_dsl::timeline::Basis;

use super::ReportInput;
use super::format::{bytes, digits, escape, percent, plural, seconds};
use super::grid::{ActionGrid, GridRow, HeldUnit, Lane};
use super::page::Part;
use crate::schedule::{Cause, Idle};

/// Rectangles of a grid; beyond, only the first ones of each rank are drawn, and the page says so.
const MAX_RECTANGLES: usize = 40_000;
/// Points of a rank's curve.
const MAX_POINTS: usize = 2_000;
/// Of the picture without scrolling.
const WIDTH: f64 = 1150.0;
const MAX_WIDTH: f64 = 12_000.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 12.0;
const ROW: f64 = 26.0;
const CURVE: f64 = 34.0;
const GAP: f64 = 26.0;

pub(super) fn pipeline(input: &ReportInput) -> Option<Part> {
    let first = input.grids.first()?;
    let longest_s = input
        .grids
        .iter()
        .map(|grid| grid.step_s)
        .fold(0.0, f64::max);
    let scale = Scale {
        width: width(&input.grids),
        longest_s: longest_s.max(f64::MIN_POSITIVE),
    };
    let mut body = legend(&input.grids);
    for grid in &input.grids {
        picture(&mut body, grid, &scale);
    }
    causes(&mut body, &input.grids);
    Some(Part {
        id: "pipeline",
        title: "Pipeline",
        lead: format!(
            "What each of {} does when, by stage, action and microbatch; where it idles and why; and below, what it holds.",
            plural(first.rows.len(), "rank")
        ),
        body,
    })
}

struct Scale {
    width: f64,
    longest_s: f64,
}

impl Scale {
    fn x(&self, at_s: f64) -> f64 {
        LEFT + (self.width - LEFT - RIGHT) * at_s / self.longest_s
    }
}

/// A cell of the mean length is wide enough for its name, within reason.
fn width(grids: &[ActionGrid]) -> f64 {
    let mean_s = |grid: &ActionGrid| {
        let actions = grid.rows.iter().flat_map(|row| &row.actions);
        let spans: Vec<f64> = actions.map(|action| action.span.seconds()).collect();
        spans.iter().sum::<f64>() / spans.len().max(1) as f64
    };
    let cells = grids
        .iter()
        .map(|grid| grid.step_s / mean_s(grid).max(f64::MIN_POSITIVE));
    (cells.fold(0.0, f64::max) * 24.0).clamp(WIDTH, MAX_WIDTH)
}

fn picture(body: &mut String, grid: &ActionGrid, scale: &Scale) {
    let basis = basis(grid);
    let n_rows = grid.rows.len();
    let grid_height = n_rows as f64 * ROW;
    let height = grid_height + GAP + n_rows as f64 * CURVE + 8.0;
    let _ = write!(
        body,
        "<h3><span class=\"badge {basis}\">{basis}</span> step {}, idle {}</h3>\n<div class=\"panel wide\"><svg class=\"grid\" width=\"{:.0}\" height=\"{height:.0}\" role=\"img\" aria-label=\"Actions of all ranks, {basis}\">\n",
        seconds(grid.step_s),
        percent(idle_part(grid)),
        scale.width
    );
    let mut n_drawn = 0;
    for (rank, row) in grid.rows.iter().enumerate() {
        n_drawn += cells(body, row, rank, scale, MAX_RECTANGLES / n_rows.max(1));
    }
    let _ = writeln!(
        body,
        "<text x=\"4\" y=\"{:.0}\">held, at most {}</text>",
        grid_height + GAP - 8.0,
        held_text(grid.unit, grid.peak())
    );
    for (rank, row) in grid.rows.iter().enumerate() {
        let base = grid_height + GAP + (rank + 1) as f64 * CURVE;
        curve(body, grid, row, rank, base, scale);
    }
    body.push_str("</svg></div>\n");
    let n_actions: usize = grid.rows.iter().map(|row| row.actions.len()).sum();
    if n_drawn < n_actions {
        let _ = writeln!(
            body,
            "<p class=\"hint\">The first {} of {} are drawn.</p>",
            n_drawn,
            plural(n_actions, "action")
        );
    }
}

/// A rank's idle spans and actions; how many actions were drawn.
fn cells(body: &mut String, row: &GridRow, rank: usize, scale: &Scale, most: usize) -> usize {
    let y = rank as f64 * ROW;
    let _ = writeln!(
        body,
        "<text x=\"4\" y=\"{:.0}\">rank {rank}</text>",
        y + 17.0
    );
    let shown = row.actions.len().min(most);
    let until_s = match row.actions.get(shown) {
        Some(next) => next.span.start_s,
        None => f64::INFINITY,
    };
    for idle in row.idle.iter().filter(|idle| idle.span.start_s < until_s) {
        wait(body, idle, scale, y + 2.0, ROW - 4.0);
    }
    // Chunks beyond the first are drawn darker.
    let stages = row.actions.iter().filter_map(|action| action.action());
    let first_stage = stages.map(|action| action.stage).min();
    for action in &row.actions[..shown] {
        let (from, until) = (scale.x(action.span.start_s), scale.x(action.span.end_s));
        let (top, tall) = match action.lane {
            Lane::Whole => (y + 2.0, ROW - 4.0),
            Lane::Upper => (y + 2.0, ROW / 2.0 - 2.0),
            Lane::Lower => (y + ROW / 2.0, ROW / 2.0 - 2.0),
        };
        let of = action.action();
        let class = of.map_or("act-U", |of| class_of(of.kind));
        let critical = if action.is_critical { " critical" } else { "" };
        let is_later = of.is_some_and(|of| first_stage.is_some_and(|first| of.stage > first));
        let later = if is_later { " later" } else { "" };
        let _ = writeln!(
            body,
            "<rect x=\"{from:.2}\" y=\"{top:.1}\" width=\"{:.2}\" height=\"{tall:.1}\" class=\"act {class}{later}{critical}\"><title>{}: {} from {}{}</title></rect>",
            (until - from).max(0.2),
            escape(&action.label),
            seconds(action.span.seconds()),
            seconds(action.span.start_s),
            if action.is_critical {
                ", on the critical path"
            } else {
                ""
            }
        );
        let name = of.map_or_else(String::new, |of| of.microbatch.to_string());
        if !name.is_empty() && until - from > 7.0 * name.len() as f64 + 2.0 {
            let (class, below) = match action.lane {
                Lane::Whole => ("mb", 15.0),
                Lane::Upper | Lane::Lower => ("mb half", 8.5),
            };
            let _ = writeln!(
                body,
                "<text x=\"{:.1}\" y=\"{:.1}\" class=\"{class}\">{name}</text>",
                (from + until) / 2.0,
                top + below
            );
        }
    }
    // Waits within an action, such as for the other ranks of a collective, as a strip over it.
    let mut next = 0;
    for idle in row.idle.iter().filter(|idle| idle.span.start_s < until_s) {
        while next < shown && row.actions[next].span.end_s <= idle.span.start_s {
            next += 1;
        }
        let is_within = next < shown && row.actions[next].span.start_s < idle.span.end_s;
        if is_within {
            wait(body, idle, scale, y + ROW - 8.0, 6.0);
        }
    }
    shown
}

/// An idle span.
fn wait(body: &mut String, idle: &Idle, scale: &Scale, top: f64, tall: f64) {
    let (from, until) = (scale.x(idle.span.start_s), scale.x(idle.span.end_s));
    if until - from < 0.05 {
        return;
    }
    let cause = idle.cause.text();
    let _ = writeln!(
        body,
        "<rect x=\"{from:.2}\" y=\"{top:.0}\" width=\"{:.2}\" height=\"{tall:.0}\" class=\"wait-{cause}\"><title>waits: {cause}, {} from {}</title></rect>",
        until - from,
        seconds(idle.span.seconds()),
        seconds(idle.span.start_s)
    );
}

/// What a rank holds, as an area on `base`; thinned to its highest in each stretch.
fn curve(
    body: &mut String,
    grid: &ActionGrid,
    row: &GridRow,
    rank: usize,
    base: f64,
    scale: &Scale,
) {
    let peak = grid.peak().max(f64::MIN_POSITIVE);
    let mut path = format!("M{:.1} {base:.1}", scale.x(0.0));
    for stretch in row.held.chunks(row.held.len().div_ceil(MAX_POINTS).max(1)) {
        let (at_s, _) = stretch[0];
        let amount = stretch
            .iter()
            .map(|(_, amount)| *amount)
            .fold(0.0, f64::max);
        let _ = write!(
            path,
            "H{:.1}V{:.1}",
            scale.x(at_s),
            base - (CURVE - 6.0) * amount / peak
        );
    }
    let end = scale.x(grid.step_s);
    let _ = writeln!(
        body,
        "<text x=\"4\" y=\"{:.0}\">rank {rank}</text><path d=\"{path}H{end:.1}V{base:.1}Z\" class=\"held\"><title>rank {rank} holds at most {} ({})</title></path>",
        base - 6.0,
        held_text(grid.unit, row.peak),
        basis(grid)
    );
}

/// Idle seconds of the mean rank by cause, predicted beside measured.
fn causes(body: &mut String, grids: &[ActionGrid]) {
    body.push_str(
        "<h3>Idle time of the mean rank</h3>\n<table class=\"numbers\"><thead><tr><th>Cause</th>",
    );
    for grid in grids {
        let basis = basis(grid);
        let _ = write!(
            body,
            "<th class=\"right\"><span class=\"badge {basis}\">{basis}</span></th><th class=\"right\">share</th>"
        );
    }
    body.push_str("</tr></thead><tbody>\n");
    for cause in Cause::ALL {
        let idle_s: Vec<f64> = grids.iter().map(|grid| grid.idle_s(cause)).collect();
        if idle_s.iter().all(|idle_s| *idle_s <= 0.0) {
            continue;
        }
        let _ = write!(
            body,
            "<tr><td><i class=\"swatch wait-{}\"></i>{}</td>",
            cause.text(),
            meaning(cause)
        );
        for (grid, idle_s) in grids.iter().zip(idle_s) {
            let _ = write!(
                body,
                "<td class=\"right\">{}</td><td class=\"right faint\">{}</td>",
                seconds(idle_s),
                percent(idle_s / grid.step_s.max(f64::MIN_POSITIVE))
            );
        }
        body.push_str("</tr>\n");
    }
    body.push_str("</tbody></table>\n");
}

/// Whether a rank has several stages.
fn has_chunks(row: &GridRow) -> bool {
    let mut stages = row.actions.iter().filter_map(|action| action.action());
    let first = stages.next().map(|action| action.stage);
    stages.any(|action| Some(action.stage) != first)
}

fn legend(grids: &[ActionGrid]) -> String {
    let actions = || {
        let rows = grids.iter().flat_map(|grid| &grid.rows);
        rows.flat_map(|row| &row.actions)
    };
    let mut html = String::from("<div class=\"legend\">");
    let mut key = |class: &str, text: &str| {
        let _ = write!(
            html,
            "<span class=\"key\"><i class=\"swatch {class}\"></i>{text}</span>"
        );
    };
    for kind in ActionKind::ALL {
        if actions().any(|action| action.action().is_some_and(|of| of.kind == kind)) {
            let text = match kind {
                ActionKind::F => "F forward",
                ActionKind::B => "B backward",
                ActionKind::I => "I input gradient",
                ActionKind::W => "W weight gradient",
                ActionKind::R => "R recompute",
            };
            key(class_of(kind), text);
        }
    }
    if grids.iter().flat_map(|grid| &grid.rows).any(has_chunks) {
        key("act-F later", "darker: further chunks of a rank");
    }
    if actions().any(|action| action.action().is_none()) {
        key("act-U", "update");
    }
    for cause in Cause::ALL {
        let rows = || grids.iter().flat_map(|grid| &grid.rows);
        if rows().any(|row| row.idle.iter().any(|idle| idle.cause == cause)) {
            key(
                &format!("wait-{}", cause.text()),
                &format!("waits: {}", cause.text()),
            );
        }
    }
    if actions().any(|action| action.is_critical) {
        key("critical", "critical path");
    }
    html + "</div>\n"
}

fn meaning(cause: Cause) -> &'static str {
    match cause {
        Cause::Dependency => "dependency: what it needs is not computed yet",
        Cause::Communication => "communication: what it needs is on its way",
        Cause::Memory => "memory: no room, for activations or in a channel",
        Cause::Barrier => "barrier: other ranks of its stage, or of the step, are not done",
    }
}

fn class_of(kind: ActionKind) -> &'static str {
    match kind {
        ActionKind::F => "act-F",
        ActionKind::B => "act-B",
        ActionKind::I => "act-I",
        ActionKind::W => "act-W",
        ActionKind::R => "act-R",
    }
}

fn basis(grid: &ActionGrid) -> &'static str {
    match grid.basis {
        Basis::Predicted => "predicted",
        Basis::Measured => "measured",
    }
}

fn idle_part(grid: &ActionGrid) -> f64 {
    let idle_s = Cause::ALL
        .map(|cause| grid.idle_s(cause))
        .iter()
        .sum::<f64>();
    idle_s / grid.step_s.max(f64::MIN_POSITIVE)
}

fn held_text(unit: HeldUnit, amount: f64) -> String {
    match unit {
        HeldUnit::Bytes => bytes(amount as usize),
        HeldUnit::Microbatches => format!("{} microbatches of a rank", digits(amount)),
    }
}
