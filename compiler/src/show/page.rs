//! The page: head, contents, and the parts that there is something to say about.
//!
//! Enters: the report's input. Leaves: one HTML document, well-formed as XML too.
//! Invariant: styles, scripts, data and pictures are inline; the page asks for nothing.

use std::fmt::Write;

use super::format::{CATEGORIES, category, escape, json_in_script};
use super::{
    Figure, ReportInput, charts, data, figures, graph_part, grid_part, plan_part, time_part,
};

const STYLE: &str = include_str!("report.css");
const SCRIPT: &str = include_str!("report.js");

/// A part of the page.
pub(super) struct Part {
    /// Anchor.
    pub id: &'static str,
    pub title: &'static str,
    /// One sentence below the title.
    pub lead: String,
    /// HTML.
    pub body: String,
}

pub(super) fn page(input: &ReportInput) -> String {
    let parts: Vec<Part> = [
        grid_part::pipeline(input),
        time_part::timeline(input),
        time_part::breakdown(input),
        plan_part::plan(input),
        charts::memory(input),
        charts::losses(input),
        graph_part::graph(input),
        plan_part::explanation(input),
    ]
    .into_iter()
    .flatten()
    .collect();
    let title = if input.title.is_empty() {
        "Meshweave report"
    } else {
        &input.title
    };
    let mut html = String::with_capacity(1 << 16);
    html.push_str("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n");
    html.push_str("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n");
    html.push_str("<meta name=\"color-scheme\" content=\"light dark\"/>\n");
    let _ = writeln!(html, "<title>{} · Meshweave</title>", escape(title));
    let _ = writeln!(html, "<style>\n{STYLE}</style>\n</head>\n<body>");
    head(&mut html, input, title);
    contents(&mut html, &parts);
    html.push_str("<main>\n");
    for part in &parts {
        let _ = write!(
            html,
            "<section id=\"{}\">\n<h2>{}</h2>\n",
            part.id, part.title
        );
        if !part.lead.is_empty() {
            let _ = writeln!(html, "<p class=\"lead\">{}</p>", part.lead);
        }
        html.push_str(&part.body);
        html.push_str("</section>\n");
    }
    html.push_str("</main>\n<footer>Made by Meshweave. This file is complete: it loads nothing and can be sent as it is.</footer>\n");
    html.push_str("<div id=\"tip\" role=\"status\" hidden=\"hidden\"></div>\n");
    let _ = writeln!(
        html,
        "<script type=\"application/json\" id=\"data\">{}</script>",
        json_in_script(&data::data(input))
    );
    let _ = write!(html, "<script>\n{SCRIPT}</script>\n</body>\n</html>\n");
    html
}

fn head(html: &mut String, input: &ReportInput, title: &str) {
    html.push_str("<header>\n<div class=\"brand\">");
    html.push_str(LOGO);
    html.push_str("<span>Meshweave</span></div>\n");
    let _ = writeln!(html, "<h1>{}</h1>", escape(title));
    if !input.subtitle.is_empty() {
        let _ = writeln!(
            html,
            "<p class=\"subtitle\">{}</p>",
            escape(&input.subtitle)
        );
    }
    html.push_str("<div class=\"figures\">\n");
    for figure in figures::figures(input) {
        card(html, &figure);
    }
    html.push_str("</div>\n</header>\n");
}

fn card(html: &mut String, figure: &Figure) {
    let _ = write!(
        html,
        "<div class=\"card\"><div class=\"label\">{}</div>",
        escape(&figure.label)
    );
    for (value_idx, value) in figure.values.iter().enumerate() {
        let class = if value_idx == 0 { "big" } else { "small" };
        // The unit is set smaller than the number it follows.
        let (number, unit) = value.text.rsplit_once(' ').unwrap_or((&value.text, ""));
        let _ = write!(
            html,
            "<div class=\"value {class}\"><span class=\"number\">{}<span class=\"unit\">{}{}</span></span> <span class=\"badge {}\">{}</span></div>",
            escape(number),
            if unit.is_empty() { "" } else { "\u{a0}" },
            escape(unit),
            value.source.label(),
            value.source.label(),
        );
    }
    if !figure.note.is_empty() {
        let _ = write!(html, "<div class=\"note\">{}</div>", escape(&figure.note));
    }
    html.push_str("</div>\n");
}

fn contents(html: &mut String, parts: &[Part]) {
    html.push_str("<nav aria-label=\"Parts of this report\">");
    for part in parts {
        let _ = write!(html, "<a href=\"#{}\">{}</a>", part.id, part.title);
    }
    html.push_str("</nav>\n");
}

/// The legend of the categories; with `waiting` for timelines.
pub(super) fn legend(waiting: bool, interactive: bool) -> String {
    let mut html = String::from("<div class=\"legend\">");
    for (category_idx, of) in CATEGORIES.into_iter().enumerate() {
        let (class, label) = category(of);
        if interactive {
            let _ = write!(
                html,
                "<button type=\"button\" class=\"key\" data-category=\"{category_idx}\" aria-pressed=\"true\"><i class=\"swatch {class}\"></i>{label}</button>"
            );
        } else {
            let _ = write!(
                html,
                "<span class=\"key\"><i class=\"swatch {class}\"></i>{label}</span>"
            );
        }
    }
    if waiting {
        html.push_str("<span class=\"key\"><i class=\"swatch wait\"></i>waiting for peers</span>");
    }
    html.push_str("</div>\n");
    html
}

/// Warp and weft.
const LOGO: &str = "<svg viewBox=\"0 0 24 24\" width=\"22\" height=\"22\" aria-hidden=\"true\"><g fill=\"none\" stroke-width=\"3\" stroke-linecap=\"round\"><path d=\"M6 3v18M18 3v18\" stroke=\"var(--contract)\"/><path d=\"M12 3v18\" stroke=\"var(--attention)\"/><path d=\"M3 6h1.2M7.8 6H16.2M19.8 6H21M3 18h1.2M7.8 18H16.2M19.8 18H21\" stroke=\"var(--collective)\"/><path d=\"M3 12h7.2M13.8 12H21\" stroke=\"var(--kernel)\"/></g></svg>";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::show::{report, sample};

    /// Every element is closed by its own end tag, attributes are quoted, entities are known.
    fn assert_well_formed(html: &str) {
        let mut open: Vec<String> = Vec::new();
        let mut rest = html.strip_prefix("<!DOCTYPE html>\n").unwrap();
        while let Some(start) = rest.find('<') {
            let text = &rest[..start];
            let mut entities = text;
            while let Some(at) = entities.find('&') {
                entities = &entities[at..];
                let known = ["&amp;", "&lt;", "&gt;", "&quot;", "&#39;"];
                assert!(
                    known.iter().any(|entity| entities.starts_with(entity)),
                    "bare & in {text:?}"
                );
                entities = &entities[1..];
            }
            rest = &rest[start..];
            let mut quoted = false;
            let end = rest
                .char_indices()
                .find(|(_, character)| {
                    quoted ^= *character == '"';
                    *character == '>' && !quoted
                })
                .unwrap_or_else(|| panic!("unclosed tag: {:.80}", rest))
                .0;
            let tag = &rest[1..end];
            rest = &rest[end + 1..];
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop().as_deref(), Some(name), "near {rest:.80}");
                continue;
            }
            let name = tag.split([' ', '/', '\n']).next().unwrap().to_string();
            for attribute in tag
                .split_once(' ')
                .map_or("", |(_, rest)| rest)
                .split("\" ")
            {
                let attribute = attribute.trim_end_matches('/');
                assert!(
                    attribute.is_empty() || attribute.contains("=\""),
                    "attribute {attribute:?} of <{tag}>"
                );
            }
            if tag.ends_with('/') {
                continue;
            }
            if name == "script" || name == "style" {
                let close = format!("</{name}>");
                let at = rest.find(&close).unwrap();
                rest = &rest[at + close.len()..];
                continue;
            }
            open.push(name);
        }
        assert!(open.is_empty(), "left open: {open:?}");
    }

    /// The page may name sources in text, but nothing that a browser would load.
    fn assert_offline(html: &str) {
        for fetch in [
            "src=\"",
            "@import",
            "url(http",
            "url(//",
            "url(\"",
            "fetch(",
            "XMLHttpRequest",
            "<link",
            "import(",
            "WebSocket",
            "href=\"http",
        ] {
            assert!(!html.contains(fetch), "the page contains `{fetch}`");
        }
        let without_namespaces = html.replace("http://www.w3.org/2000/svg", "");
        assert!(
            !without_namespaces.contains("http://") && !without_namespaces.contains("https://")
        );
    }

    #[test]
    fn report_of_everything() {
        let input = sample::report_input(4);
        let html = report(&input);
        assert_well_formed(&html);
        assert_offline(&html);
        for part in [
            "pipeline",
            "timeline",
            "breakdown",
            "plan",
            "memory",
            "loss",
            "graph",
            "why",
        ] {
            assert!(html.contains(&format!("<section id=\"{part}\">")), "{part}");
        }
        for drawn in [
            "rank 1",
            "<title>1F0: ",
            "waits: barrier",
            "class=\"mb half\"",
        ] {
            assert!(html.contains(drawn), "{drawn}");
        }
        assert_eq!(html, report(&input));
    }

    #[test]
    fn report_of_parts() {
        let whole = sample::report_input(2);
        for input in [
            ReportInput::default(),
            ReportInput {
                graph: whole.graph.clone(),
                ..ReportInput::default()
            },
            ReportInput {
                graph: whole.graph.clone(),
                plan: whole.plan.clone(),
                predicted: whole.predicted.clone(),
                ..ReportInput::default()
            },
            ReportInput {
                program: whole.program.clone(),
                losses: vec![2.5],
                ..ReportInput::default()
            },
            ReportInput {
                measured: whole.measured.clone(),
                ..ReportInput::default()
            },
        ] {
            let html = report(&input);
            assert_well_formed(&html);
            assert_offline(&html);
        }
    }

    #[test]
    fn names_cannot_break_the_page() {
        let mut input = sample::report_input(2);
        let evil = "</script><img src=x onerror=\"alert('1')\">&";
        input.title = evil.into();
        input.subtitle = evil.into();
        input.plan_text = Some(evil.into());
        input.explanation = Some(evil.into());
        for tensor in input
            .graph
            .iter_mut()
            .chain(&mut input.local)
            .flat_map(|graph| &mut graph.tensors)
        {
            tensor.name = format!("{}{evil}", tensor.name);
        }
        for event in input
            .measured
            .iter_mut()
            .chain(&mut input.predicted)
            .flat_map(|timeline| &mut timeline.events)
        {
            event.name = format!("{}{evil}", event.name);
        }
        let html = report(&input);
        assert_well_formed(&html);
        assert!(!html.contains("<img"));
    }

    #[test]
    fn large_runs_stay_small() {
        let mut input = sample::report_input(2);
        let (graph, predicted, measured) = sample::large_run(8, 2000);
        input.program = Some(graph);
        input.predicted = Some(predicted);
        input.measured = Some(measured);
        let html = report(&input);
        assert!(html.len() < 3 << 20, "{} bytes", html.len());
    }
}
