//! Memory over the program and loss over the steps.
//!
//! Enters: a program, losses. Leaves: parts of the page with inline SVG.
//! Invariant: a chart's axis starts at zero for memory, and holds every loss; what is drawn is
//! thinned to the picture's width, keeping each pixel's extremes.

use std::fmt::Write;

use meshweave_dsl::graph::Role;
use meshweave_dsl::program::{Program, RankProgram};

use super::ReportInput;
use super::format::{bytes, count, digits, plural};
use super::page::Part;

const WIDTH: f64 = 1100.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 76.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 22.0;
const BOTTOM: f64 = 34.0;

/// The rectangle in which a chart draws, and its scales.
struct Frame {
    x_max: f64,
    y_min: f64,
    y_max: f64,
}

impl Frame {
    fn x(&self, value: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * value / self.x_max.max(f64::MIN_POSITIVE)
    }

    fn y(&self, value: f64) -> f64 {
        let span = (self.y_max - self.y_min).max(f64::MIN_POSITIVE);
        HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.y_min) / span
    }

    fn open(&self, id: &str, label: &str) -> String {
        format!(
            "<div class=\"panel chart\"><svg id=\"{id}\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{label}\" data-left=\"{LEFT}\" data-right=\"{RIGHT}\">\n"
        )
    }

    fn rule(&self, svg: &mut String, value: f64, text: &str) {
        let y = self.y(value);
        let _ = writeln!(
            svg,
            "<path class=\"rule\" d=\"M{LEFT} {y:.1}H{}\"/><text x=\"{}\" y=\"{:.1}\" class=\"end\">{text}</text>",
            WIDTH - RIGHT,
            LEFT - 10.0,
            y + 4.0
        );
    }

    fn tick(&self, svg: &mut String, value: f64, text: &str) {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{}\" class=\"middle\">{text}</text>",
            self.x(value),
            HEIGHT - BOTTOM + 18.0
        );
    }

    /// What the horizontal axis counts, at its end; marks keep clear of it.
    fn unit(&self, svg: &mut String, text: &str) {
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" class=\"end\">{text}</text>",
            WIDTH - RIGHT,
            HEIGHT - BOTTOM + 18.0
        );
    }

    /// Whether a mark at `value` is clear of the axis' unit.
    fn has_room(&self, value: f64) -> bool {
        self.x(value) < WIDTH - RIGHT - 90.0
    }
}

/// Steps of 1, 2 or 5 times a power of ten (of two for bytes) that divide `span` into about `n`.
fn step_of(span: f64, n: f64, base_two: bool) -> f64 {
    let raw = (span / n).max(f64::MIN_POSITIVE);
    if base_two {
        return 2f64.powf(raw.log2().ceil());
    }
    let power = 10f64.powf(raw.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|step| *step >= raw)
        .unwrap_or(10.0 * power)
}

pub(super) fn memory(input: &ReportInput) -> Option<Part> {
    let program = input.program.as_ref()?;
    let fullest = program
        .ranks
        .iter()
        .enumerate()
        .max_by_key(|(rank_idx, rank)| (rank.arena_bytes, usize::MAX - rank_idx))?;
    let (fullest_idx, fullest_rank) = fullest;
    let n_instructions = program
        .ranks
        .iter()
        .map(|rank| rank.instructions.len())
        .max()
        .filter(|n| *n > 0)?;
    let arena = fullest_rank.arena_bytes;
    let frame = Frame {
        x_max: n_instructions as f64,
        y_min: 0.0,
        y_max: arena as f64 * 1.06,
    };
    let mut svg = frame.open(
        "memory-chart",
        "Memory in use over the instructions of a step",
    );
    let step = step_of(arena as f64, 4.0, true);
    let mut mark = 0.0;
    while mark <= arena as f64 {
        // The line of the arena itself has its own text.
        if mark == 0.0 || (arena as f64 - mark) > step * 0.3 {
            frame.rule(&mut svg, mark, &bytes(mark as usize));
        }
        mark += step;
    }
    let x_step = step_of(n_instructions as f64, 8.0, false).max(1.0);
    let mut tick = 0.0;
    while frame.has_room(tick) {
        frame.tick(&mut svg, tick, &count(tick as usize));
        tick += x_step;
    }
    frame.unit(&mut svg, "instruction");
    let persistent = persistent_bytes(fullest_rank);
    let base = frame.y(0.0);
    let _ = writeln!(
        svg,
        "<path class=\"area\" d=\"{}V{base:.1}H{LEFT}Z\"/>",
        path(fullest_rank, &frame)
    );
    let _ = writeln!(
        svg,
        "<path class=\"persistent\" d=\"M{LEFT} {:.1}H{}V{base:.1}H{LEFT}Z\"/>",
        frame.y(persistent as f64),
        WIDTH - RIGHT
    );
    for (rank_idx, rank) in program.ranks.iter().enumerate() {
        let class = if rank_idx == fullest_idx {
            "line"
        } else {
            "line thin"
        };
        let _ = writeln!(
            svg,
            "<path class=\"{class}\" d=\"{}\"/>",
            path(rank, &frame)
        );
    }
    let arena_y = frame.y(arena as f64);
    let _ = writeln!(
        svg,
        "<path class=\"arena\" d=\"M{LEFT} {arena_y:.1}H{}\"/><text x=\"{}\" y=\"{:.1}\" class=\"end strong\">{}</text><text x=\"{}\" y=\"{:.1}\" class=\"end strong\">arena: allocated once, never grown</text>",
        WIDTH - RIGHT,
        LEFT - 10.0,
        arena_y + 4.0,
        bytes(arena),
        WIDTH - RIGHT - 6.0,
        arena_y - 6.0,
    );
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{:.1}\" class=\"halo\">kept between steps: {}</text>",
        LEFT + 10.0,
        (frame.y(persistent as f64 / 2.0) + 4.0).min(base - 6.0),
        bytes(persistent)
    );
    svg.push_str("<path class=\"cursor\" d=\"\"/></svg></div>\n");
    svg.push_str(&persistent_table(program, fullest_idx));
    let peak = fullest_rank
        .instructions
        .iter()
        .map(|instruction| instruction.live_bytes)
        .max()
        .unwrap_or(0);
    Some(Part {
        id: "memory",
        title: "Memory",
        lead: format!(
            "Bytes in use while each instruction runs, on {}; the fullest (rank {fullest_idx}) is filled. Its busiest moment needs {}, its arena is {}.",
            plural(program.ranks.len(), "device"),
            bytes(peak),
            bytes(arena),
        ),
        body: svg,
    })
}

fn persistent_bytes(rank: &RankProgram) -> usize {
    rank.buffers
        .iter()
        .filter(|buffer| buffer.persistent)
        .map(|buffer| buffer.ty.n_bytes())
        .sum()
}

/// What the fullest rank keeps, by role.
fn persistent_table(program: &Program, rank_idx: usize) -> String {
    let mut of_role = [0usize; 4];
    for source in &program.sources {
        let parts = source.parts.iter().filter(|part| part.rank == rank_idx);
        let n_bytes: usize = parts
            .filter_map(|part| {
                program
                    .ranks
                    .get(rank_idx)?
                    .buffers
                    .get(part.buffer.index())
            })
            .map(|buffer| buffer.ty.n_bytes())
            .sum();
        let slot = match source.role {
            Role::Param(_) => 0,
            Role::State { .. } => 1,
            Role::Const(_) => 2,
            Role::Input => 3,
            Role::Temp => continue,
        };
        of_role[slot] += n_bytes;
    }
    if of_role.iter().all(|n_bytes| *n_bytes == 0) {
        return String::new();
    }
    let mut html = String::from("<p class=\"keptline\">");
    for (label, n_bytes) in ["parameters", "optimizer state", "tables", "inputs"]
        .into_iter()
        .zip(of_role)
        .filter(|(_, n_bytes)| *n_bytes > 0)
    {
        let _ = write!(html, "<span><b>{}</b> {label}</span>", bytes(n_bytes));
    }
    html.push_str("<span class=\"faint\">kept between steps on the fullest device</span></p>\n");
    html
}

/// Steps of live bytes, thinned to two points a pixel.
fn path(rank: &RankProgram, frame: &Frame) -> String {
    let live: Vec<usize> = rank
        .instructions
        .iter()
        .map(|instruction| instruction.live_bytes)
        .collect();
    let per_pixel = (live.len() as f64 / (WIDTH - LEFT - RIGHT)).ceil().max(1.0) as usize;
    let mut path = String::new();
    for (chunk_idx, chunk) in live.chunks(per_pixel).enumerate() {
        let x = frame.x((chunk_idx * per_pixel) as f64);
        let low = chunk.iter().copied().min().unwrap_or(0) as f64;
        let high = chunk.iter().copied().max().unwrap_or(0) as f64;
        if chunk_idx == 0 {
            let _ = write!(path, "M{x:.1} {:.1}", frame.y(high));
        } else if per_pixel > 1 {
            let _ = write!(path, "H{x:.1}V{:.1}V{:.1}", frame.y(low), frame.y(high));
        } else {
            let _ = write!(path, "H{x:.1}V{:.1}", frame.y(high));
        }
    }
    let _ = write!(path, "H{:.1}", frame.x(live.len() as f64));
    path
}

pub(super) fn losses(input: &ReportInput) -> Option<Part> {
    let finite: Vec<(usize, f64)> = input
        .losses
        .iter()
        .copied()
        .enumerate()
        .filter(|(_, loss)| loss.is_finite())
        .collect();
    let (_, first) = *finite.first()?;
    let (_, last) = *finite.last()?;
    let low = finite.iter().map(|(_, loss)| *loss).fold(first, f64::min);
    let high = finite.iter().map(|(_, loss)| *loss).fold(first, f64::max);
    let step = step_of((high - low).max(high.abs() * 1e-3), 4.0, false);
    let frame = Frame {
        x_max: (input.losses.len().max(2) - 1) as f64,
        y_min: (low / step).floor() * step,
        y_max: ((high / step).ceil() * step).max((low / step).floor() * step + step),
    };
    let mut svg = frame.open("loss-chart", "Loss after each step");
    let n_rules = ((frame.y_max - frame.y_min) / step).round() as usize;
    for rule_idx in 0..=n_rules {
        let value = frame.y_min + rule_idx as f64 * step;
        let decimals = (-step.log10().floor()).clamp(0.0, 6.0) as usize;
        frame.rule(&mut svg, value, &format!("{value:.decimals$}"));
    }
    let x_step = step_of(frame.x_max, 8.0, false).max(1.0);
    // Steps count from 1, marks stand at round numbers.
    let mut tick = 1.0;
    while frame.has_room(tick - 1.0) {
        frame.tick(&mut svg, tick - 1.0, &count(tick as usize));
        tick = if tick == 1.0 && x_step > 1.0 {
            x_step
        } else {
            tick + x_step
        };
    }
    frame.unit(&mut svg, "step");
    let mut line = String::new();
    for (point_idx, (step_idx, loss)) in finite.iter().enumerate() {
        let letter = if point_idx == 0 { 'M' } else { 'L' };
        let _ = write!(
            line,
            "{letter}{:.1} {:.1}",
            frame.x(*step_idx as f64),
            frame.y(*loss)
        );
    }
    let _ = writeln!(svg, "<path class=\"loss\" d=\"{line}\"/>");
    if finite.len() <= 60 {
        for (step_idx, loss) in &finite {
            let _ = writeln!(
                svg,
                "<circle class=\"point\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.6\"/>",
                frame.x(*step_idx as f64),
                frame.y(*loss)
            );
        }
    }
    svg.push_str("<path class=\"cursor\" d=\"\"/></svg></div>\n");
    let n_lost = input.losses.len() - finite.len();
    let warning = if n_lost > 0 {
        format!(" {} not finite and left out.", plural(n_lost, "value"))
    } else {
        String::new()
    };
    Some(Part {
        id: "loss",
        title: "Loss",
        lead: format!(
            "From {} to {} in {}.{warning}",
            digits(first),
            digits(last),
            plural(input.losses.len(), "step")
        ),
        body: svg,
    })
}
