//! Timelines and what the time went to.
//!
//! Enters: predicted and measured timelines. Leaves: the frame of the interactive timeline, the time
//! by category, and the instructions that take longest.
//! Invariant: sums are per device (the mean over the ranks), so that they compare with the step time.

use std::collections::BTreeMap;
use std::fmt::Write;

use meshweave_dsl::timeline::{Basis, Category, Timeline};

use super::ReportInput;
use super::fold::template;
use super::format::{CATEGORIES, category, escape, percent, plural, scaled, seconds};
use super::page::{Part, legend};

/// Instructions in the table of the longest.
const N_LONGEST: usize = 15;

pub(super) fn timeline(input: &ReportInput) -> Option<Part> {
    let timelines: Vec<&Timeline> = input.predicted.iter().chain(&input.measured).collect();
    let first = timelines.first()?;
    let n_ranks = timelines.iter().map(|timeline| timeline.n_ranks).max()?;
    let lead = if timelines.len() > 1 {
        format!(
            "One step on {}, as forecast and as it ran, on one time scale.",
            plural(n_ranks, "device")
        )
    } else {
        let basis = match first.basis {
            Basis::Predicted => "as forecast",
            Basis::Measured => "as it ran",
        };
        format!("One step on {}, {basis}.", plural(n_ranks, "device"))
    };
    let mut body = String::from("<div class=\"toolbar\">");
    body.push_str(&legend(true, true));
    body.push_str("<div class=\"buttons\"><button type=\"button\" data-zoom=\"out\" title=\"Zoom out\" aria-label=\"Zoom out\">−</button><button type=\"button\" data-zoom=\"in\" title=\"Zoom in\" aria-label=\"Zoom in\">+</button><button type=\"button\" data-zoom=\"fit\">Whole step</button></div></div>\n");
    body.push_str("<div class=\"panel\"><canvas id=\"lanes\" tabindex=\"0\" role=\"img\" aria-label=\"Timeline of all devices; the tables below hold its sums\"></canvas></div>\n");
    body.push_str("<p class=\"hint\">Drag to move, double click or Ctrl + wheel to zoom, arrow keys and + − work too. Point at an instruction for its figures; its twin is marked in the other timeline.</p>\n");
    Some(Part {
        id: "timeline",
        title: "Timeline",
        lead,
        body,
    })
}

pub(super) fn breakdown(input: &ReportInput) -> Option<Part> {
    let timelines: Vec<&Timeline> = input.predicted.iter().chain(&input.measured).collect();
    if timelines.is_empty() {
        return None;
    }
    let mut body = String::new();
    shares(&mut body, &timelines);
    longest(&mut body, &timelines);
    Some(Part {
        id: "breakdown",
        title: "Where the time goes",
        lead: "Mean over the devices. Idle is what is left of the step when a device has nothing to run.".into(),
        body,
    })
}

/// Seconds per device: busy by category, waiting, idle.
struct Shares {
    busy_s: Vec<(Category, f64)>,
    wait_s: f64,
    idle_s: f64,
    step_s: f64,
}

fn shares_of(timeline: &Timeline) -> Shares {
    let n_ranks = timeline.n_ranks.max(1) as f64;
    let step_s = timeline.step_s();
    let busy_s: Vec<(Category, f64)> = CATEGORIES
        .into_iter()
        .map(|category| (category, timeline.busy_s(category) / n_ranks))
        .collect();
    let wait_s = timeline
        .events
        .iter()
        .map(|event| event.wait_s)
        .sum::<f64>()
        / n_ranks;
    let used_s = busy_s.iter().map(|(_, busy_s)| busy_s).sum::<f64>() + wait_s;
    Shares {
        busy_s,
        wait_s,
        idle_s: (step_s - used_s).max(0.0),
        step_s,
    }
}

fn shares(body: &mut String, timelines: &[&Timeline]) {
    let all: Vec<Shares> = timelines
        .iter()
        .map(|timeline| shares_of(timeline))
        .collect();
    let longest_s = all.iter().map(|shares| shares.step_s).fold(0.0, f64::max);
    body.push_str("<div class=\"bars\">\n");
    for (timeline, shares) in timelines.iter().zip(&all) {
        let basis = basis(timeline);
        let _ = write!(
            body,
            "<div class=\"bar-row\"><span class=\"badge {basis}\">{basis}</span><div class=\"bar\" style=\"width:{:.3}%\">",
            100.0 * shares.step_s / longest_s.max(f64::MIN_POSITIVE)
        );
        let segments = shares
            .busy_s
            .iter()
            .map(|(of, busy_s)| (category(*of).0, category(*of).1, *busy_s))
            .chain([
                ("wait", "waiting for peers", shares.wait_s),
                ("idle", "idle", shares.idle_s),
            ]);
        for (class, label, part_s) in segments.filter(|(_, _, part_s)| *part_s > 0.0) {
            let ratio = part_s / shares.step_s.max(f64::MIN_POSITIVE);
            let text = if ratio > 0.07 {
                percent(ratio)
            } else {
                String::new()
            };
            let _ = write!(
                body,
                "<span class=\"{class}\" style=\"width:{:.3}%\" title=\"{label}: {} · {}\">{text}</span>",
                100.0 * ratio,
                seconds(part_s),
                percent(ratio),
            );
        }
        let _ = writeln!(
            body,
            "</div><span class=\"total\">{}</span></div>",
            seconds(shares.step_s)
        );
    }
    body.push_str("</div>\n<table class=\"numbers\"><thead><tr><th>Category</th>");
    for timeline in timelines {
        let basis = basis(timeline);
        let _ = write!(
            body,
            "<th class=\"right\"><span class=\"badge {basis}\">{basis}</span></th><th class=\"right\">share</th>"
        );
    }
    if timelines.len() == 2 {
        body.push_str("<th class=\"right\">measured − predicted</th>");
    }
    body.push_str("</tr></thead><tbody>\n");
    let rows = CATEGORIES
        .into_iter()
        .enumerate()
        .map(|(row_idx, of)| (category(of), row_idx))
        .chain([
            (("wait", "waiting for peers"), CATEGORIES.len()),
            (("idle", "idle"), CATEGORIES.len() + 1),
        ]);
    for ((class, label), row_idx) in rows {
        let parts_s: Vec<f64> = all
            .iter()
            .map(|shares| {
                shares
                    .busy_s
                    .get(row_idx)
                    .map(|(_, busy_s)| *busy_s)
                    .unwrap_or(if class == "wait" {
                        shares.wait_s
                    } else {
                        shares.idle_s
                    })
            })
            .collect();
        if parts_s.iter().all(|part_s| *part_s <= 0.0) {
            continue;
        }
        let _ = write!(body, "<tr><td><i class=\"swatch {class}\"></i>{label}</td>");
        for (shares, part_s) in all.iter().zip(&parts_s) {
            let _ = write!(
                body,
                "<td class=\"right\">{}</td><td class=\"right faint\">{}</td>",
                seconds(*part_s),
                percent(part_s / shares.step_s.max(f64::MIN_POSITIVE))
            );
        }
        if let [predicted_s, measured_s] = parts_s.as_slice() {
            let _ = write!(
                body,
                "<td class=\"right\">{}</td>",
                signed(measured_s - predicted_s)
            );
        }
        body.push_str("</tr>\n");
    }
    body.push_str("</tbody></table>\n");
}

/// What instructions of one folded name add up to, per device.
#[derive(Default)]
struct Total {
    category: Option<Category>,
    /// Executions on the first rank that has them.
    n_runs: usize,
    busy_s: [Option<f64>; 2],
    n_flops: f64,
    n_bytes: f64,
}

fn longest(body: &mut String, timelines: &[&Timeline]) {
    let mut totals: BTreeMap<(String, Category), Total> = BTreeMap::new();
    for (timeline_idx, timeline) in timelines.iter().enumerate() {
        let n_ranks = timeline.n_ranks.max(1) as f64;
        for event in &timeline.events {
            let total = totals
                .entry((template(&event.name), event.category))
                .or_default();
            total.category = Some(event.category);
            *total.busy_s[timeline_idx.min(1)].get_or_insert(0.0) +=
                (event.duration_s - event.wait_s) / n_ranks;
            if timeline_idx == 0 {
                total.n_runs += usize::from(event.rank == 0);
                total.n_flops += event.n_flops / n_ranks;
                total.n_bytes += event.n_bytes / n_ranks;
            }
        }
    }
    let step_s = timelines.last().map_or(0.0, |timeline| timeline.step_s());
    let last = timelines.len() - 1;
    let mut rows: Vec<((String, Category), Total)> = totals.into_iter().collect();
    // The last timeline is the measured one where there is one.
    rows.sort_by(|(_, a), (_, b)| {
        let of = |total: &Total| total.busy_s[last].unwrap_or(0.0);
        of(b).total_cmp(&of(a))
    });
    let n_others = rows.len().saturating_sub(N_LONGEST);
    rows.truncate(N_LONGEST);
    let scale_s = rows
        .iter()
        .flat_map(|(_, total)| total.busy_s)
        .flatten()
        .fold(0.0, f64::max)
        .max(f64::MIN_POSITIVE);
    body.push_str("<h3>Longest instructions</h3>\n<div class=\"wide\"><table class=\"numbers\"><thead><tr><th>Instruction</th><th class=\"right\">times</th>");
    for timeline in timelines {
        let basis = basis(timeline);
        let _ = write!(
            body,
            "<th class=\"right\"><span class=\"badge {basis}\">{basis}</span></th>"
        );
    }
    body.push_str("<th class=\"meter-head\"></th><th class=\"right\">of step</th><th class=\"right\">rate</th></tr></thead><tbody>\n");
    for ((name, of), total) in &rows {
        let (class, label) = category(*of);
        let _ = write!(
            body,
            "<tr><td class=\"name\"><i class=\"swatch {class}\" title=\"{label}\"></i><code>{}</code></td><td class=\"right faint\">{}</td>",
            escape(name),
            total.n_runs.max(1)
        );
        for timeline_idx in 0..timelines.len() {
            let text = total.busy_s[timeline_idx].map_or_else(|| "–".into(), seconds);
            let _ = write!(body, "<td class=\"right\">{text}</td>");
        }
        body.push_str("<td class=\"meters\">");
        for (timeline_idx, timeline) in timelines.iter().enumerate() {
            let part_s = total.busy_s[timeline_idx].unwrap_or(0.0);
            let _ = write!(
                body,
                "<i class=\"meter {class} {}\" style=\"width:{:.2}%\"></i>",
                basis(timeline),
                100.0 * part_s / scale_s
            );
        }
        let busy_s = total.busy_s[last].unwrap_or(0.0);
        let rate = if busy_s <= 0.0 {
            "–".into()
        } else if total.n_flops > 0.0 && matches!(of, Category::Contract | Category::Attention) {
            scaled(total.n_flops / busy_s, "FLOP/s")
        } else {
            scaled(total.n_bytes / busy_s, "B/s")
        };
        let _ = writeln!(
            body,
            "</td><td class=\"right faint\">{}</td><td class=\"right\">{rate}</td></tr>",
            percent(busy_s / step_s.max(f64::MIN_POSITIVE)),
        );
    }
    body.push_str("</tbody></table></div>\n");
    let how = if last == 1 {
        "The upper bar of each pair is the forecast, the lower one the measurement; rates are measured."
    } else {
        ""
    };
    if n_others > 0 || !how.is_empty() {
        let others = if n_others > 0 {
            format!(" {} shorter left out.", plural(n_others, "instruction"))
        } else {
            String::new()
        };
        let _ = writeln!(
            body,
            "<p class=\"hint\">Instructions of repeated layers are added up. {how}{others}</p>"
        );
    }
}

fn basis(timeline: &Timeline) -> &'static str {
    match timeline.basis {
        Basis::Predicted => "predicted",
        Basis::Measured => "measured",
    }
}

fn signed(difference_s: f64) -> String {
    let sign = if difference_s < 0.0 { "−" } else { "+" };
    format!("{sign}{}", seconds(difference_s.abs()))
}
