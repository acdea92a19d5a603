//! Diagnostics as text, in the manner of rustc.
//!
//! Enters: a [`Diagnostic`] and the [`Sources`] it points into. Leaves: text, one finding a
//! paragraph, each line ending in a newline. Invariant: any span renders, also one that is empty,
//! crosses lines or lies outside its source.

use super::{Diagnostic, Fix, Label, Severity, Source, SourceId, Sources};

/// Whether the text carries ANSI colors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Color {
    #[default]
    Never,
    Always,
}

/// How to render.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RenderOptions {
    pub color: Color,
}

/// Renders all of them, with an empty line between two.
pub fn render_all(diagnostics: &[Diagnostic], sources: &Sources, options: RenderOptions) -> String {
    let texts: Vec<String> = diagnostics
        .iter()
        .map(|diagnostic| render(diagnostic, sources, options))
        .collect();
    texts.join("\n")
}

/// Renders one diagnostic.
pub fn render(diagnostic: &Diagnostic, sources: &Sources, options: RenderOptions) -> String {
    let mut out = Page {
        text: String::new(),
        color: options.color,
        gutter: gutter_width(diagnostic, sources),
    };
    out.heading(diagnostic);
    for (nth, (id, labels)) in by_source(diagnostic).into_iter().enumerate() {
        if let Some(source) = sources.get(id) {
            out.excerpt(source, &labels, if nth == 0 { "-->" } else { ":::" });
        }
    }
    let noted = !diagnostic.help.is_empty() || !diagnostic.fixes.is_empty();
    let placed = |label: &Label| sources.get(label.span.source).is_some();
    if noted && diagnostic.primary.as_ref().is_some_and(placed) {
        out.rule();
    }
    for help in &diagnostic.help {
        out.note(help);
    }
    for fix in &diagnostic.fixes {
        out.fix(fix, sources);
    }
    out.text
}

/// A label on one line: columns are in characters of the line with its tabs expanded.
struct Mark<'a> {
    line: usize,
    start: usize,
    width: usize,
    is_primary: bool,
    message: &'a str,
}

struct Page {
    text: String,
    color: Color,
    gutter: usize,
}

const BOLD: &str = "\x1b[1m";
const RED: &str = "\x1b[1;31m";
const YELLOW: &str = "\x1b[1;33m";
const BLUE: &str = "\x1b[1;34m";
const CYAN: &str = "\x1b[1;36m";

impl Page {
    fn paint(&self, style: &str, text: &str) -> String {
        match self.color {
            Color::Never => text.to_owned(),
            Color::Always => format!("{style}{text}\x1b[0m"),
        }
    }

    /// As many blanks as line numbers are wide.
    fn blank(&self) -> String {
        " ".repeat(self.gutter)
    }

    fn line(&mut self, text: &str) {
        self.text.push_str(text.trim_end());
        self.text.push('\n');
    }

    fn heading(&mut self, diagnostic: &Diagnostic) {
        let (word, style) = match diagnostic.severity {
            Severity::Error => ("error", RED),
            Severity::Warning => ("warning", YELLOW),
            Severity::Note => ("note", CYAN),
        };
        let code = match &diagnostic.code {
            Some(code) => format!("{word}[{code}]"),
            None => word.to_owned(),
        };
        let heading = format!(
            "{}{}",
            self.paint(style, &code),
            self.paint(BOLD, &format!(": {}", diagnostic.message))
        );
        self.line(&heading);
    }

    fn rule(&mut self) {
        let text = format!("{} {}", self.blank(), self.paint(BLUE, "|"));
        self.line(&text);
    }

    fn note(&mut self, help: &str) {
        let lead = format!("{} {} ", self.blank(), self.paint(BLUE, "="));
        let mut lines = help.lines();
        let first = lines.next().unwrap_or_default();
        let text = format!("{lead}{}: {first}", self.paint(BOLD, "help"));
        self.line(&text);
        for more in lines {
            let text = format!("{}         {more}", self.blank());
            self.line(&text);
        }
    }

    fn fix(&mut self, fix: &Fix, sources: &Sources) {
        self.note(&fix.message);
        let Some(source) = sources.get(fix.span.source) else {
            return;
        };
        let text = &source.text;
        let (line, _) = source.position(fix.span.start);
        let from = text
            .get(..fix.span.start)
            .map_or(0, |before| before.rfind('\n').map_or(0, |i| i + 1));
        let until = text
            .get(fix.span.end..)
            .and_then(|rest| rest.find('\n'))
            .map_or(text.len(), |i| fix.span.end + i);
        let before = text.get(from..fix.span.start).unwrap_or_default();
        let after = text.get(fix.span.end..until).unwrap_or_default();
        let fixed = format!("{before}{}{after}", fix.replacement);
        self.rule();
        for (nth, fixed_line) in fixed.lines().enumerate() {
            self.numbered(line + nth, fixed_line, "+");
        }
    }

    fn numbered(&mut self, line: usize, text: &str, mark: &str) {
        let width = self.gutter;
        let lead = self.paint(BLUE, &format!("{line:>width$} {mark}"));
        let text = format!("{lead} {}", expand_tabs(text));
        self.line(&text);
    }

    fn excerpt(&mut self, source: &Source, labels: &[(&Label, bool)], arrow: &str) {
        let Some((first, _)) = labels.first() else {
            return;
        };
        let (line, column) = source.position(first.span.start);
        let place = format!(
            "{}{} {}:{line}:{column}",
            self.blank(),
            self.paint(BLUE, arrow),
            source.name
        );
        self.line(&place);
        let mut marks: Vec<Mark<'_>> = labels
            .iter()
            .map(|(label, is_primary)| mark_of(source, label, *is_primary))
            .collect();
        marks.sort_by_key(|mark| (mark.line, mark.start));
        let lines: Vec<&str> = source.text.split('\n').collect();
        self.rule();
        let mut shown: Option<usize> = None;
        for mark in &marks {
            if shown != Some(mark.line) {
                if shown.is_some_and(|last| mark.line > last + 1) {
                    self.line("...");
                }
                let text = lines.get(mark.line - 1).copied().unwrap_or_default();
                self.numbered(mark.line, text.trim_end_matches('\r'), "|");
                shown = Some(mark.line);
            }
            self.underline(mark);
        }
    }

    fn underline(&mut self, mark: &Mark<'_>) {
        let (sign, style) = if mark.is_primary {
            ("^", RED)
        } else {
            ("-", BLUE)
        };
        let signs = self.paint(
            style,
            &format!("{} {}", sign.repeat(mark.width), mark.message),
        );
        let text = format!(
            "{} {} {}{signs}",
            self.blank(),
            self.paint(BLUE, "|"),
            " ".repeat(mark.start)
        );
        self.line(&text);
    }
}

/// The labels grouped by source, the primary's source first.
fn by_source(diagnostic: &Diagnostic) -> Vec<(SourceId, Vec<(&Label, bool)>)> {
    let mut groups: Vec<(SourceId, Vec<(&Label, bool)>)> = Vec::new();
    let labels = diagnostic
        .primary
        .iter()
        .map(|label| (label, true))
        .chain(diagnostic.secondary.iter().map(|label| (label, false)));
    for (label, is_primary) in labels {
        match groups.iter_mut().find(|(id, _)| *id == label.span.source) {
            Some((_, group)) => group.push((label, is_primary)),
            None => groups.push((label.span.source, vec![(label, is_primary)])),
        }
    }
    groups
}

fn mark_of<'a>(source: &Source, label: &'a Label, is_primary: bool) -> Mark<'a> {
    let (line, column) = source.position(label.span.start);
    let text = source.text.split('\n').nth(line - 1).unwrap_or_default();
    let text = text.trim_end_matches('\r');
    let (end_line, end_column) = source.position(label.span.end.max(label.span.start));
    // A span that crosses lines is underlined to the end of its first line.
    let end_column = if end_line == line {
        end_column
    } else {
        text.chars().count() + 1
    };
    let prefix: String = text.chars().take(column - 1).collect();
    let covered: String = text.chars().take(end_column.max(column) - 1).collect();
    let start = expand_tabs(&prefix).chars().count();
    let end = expand_tabs(&covered).chars().count();
    Mark {
        line,
        start,
        width: end.saturating_sub(start).max(1),
        is_primary,
        message: &label.message,
    }
}

fn expand_tabs(text: &str) -> String {
    text.replace('\t', "    ")
}

fn gutter_width(diagnostic: &Diagnostic, sources: &Sources) -> usize {
    let labels = diagnostic.primary.iter().chain(&diagnostic.secondary);
    let spans = labels
        .map(|label| label.span)
        .chain(diagnostic.fixes.iter().map(|fix| fix.span));
    let last = spans
        .filter_map(|span| Some(sources.get(span.source)?.position(span.start).0))
        .max();
    last.unwrap_or(1).to_string().len()
}

#[cfg(test)]
mod tests {
    use super::super::Span;
    use super::*;

    #[test]
    fn spans_in_two_files() {
        let mut sources = Sources::new();
        let plan = sources.add("plan.weave", "mesh main = tp:3\nuse main on *\n");
        let model = sources.add("config.json", "{\n\t\"num_heads\": 4\n}\n");
        let diagnostic = Diagnostic::invalid("axis `tp` of degree 3 does not divide 4 heads")
            .code("W100")
            .at(Span::new(plan, 12, 16), "degree 3")
            .also(Span::new(plan, 17, 30), "used here")
            .also(Span::new(model, 3, 17), "4 heads")
            .help("legal degrees are 1, 2, 4")
            .fix(Span::new(plan, 15, 16), "2", "use the nearest legal degree");
        let text = render(&diagnostic, &sources, RenderOptions::default());
        insta::assert_snapshot!(text, @r#"
        error[W100]: axis `tp` of degree 3 does not divide 4 heads
         --> plan.weave:1:13
          |
        1 | mesh main = tp:3
          |             ^^^^ degree 3
        2 | use main on *
          | ------------- used here
         ::: config.json:2:2
          |
        2 |     "num_heads": 4
          |     -------------- 4 heads
          |
          = help: legal degrees are 1, 2, 4
          = help: use the nearest legal degree
          |
        1 + mesh main = tp:2
        "#);
    }

    #[test]
    fn json_is_lossless() {
        let diagnostic = Diagnostic::warning("m")
            .code("W1")
            .at(Span::new(SourceId(1), 2, 3), "")
            .also(Span::new(SourceId(0), 0, 1), "l")
            .help("h")
            .fix(Span::new(SourceId(1), 2, 3), "r", "f");
        let json = serde_json::to_string(&diagnostic).unwrap();
        insta::assert_snapshot!(json, @r#"{"severity":"warning","class":"invalid","code":"W1","message":"m","primary":{"span":{"source":1,"start":2,"end":3}},"secondary":[{"span":{"source":0,"start":0,"end":1},"message":"l"}],"help":["h"],"fixes":[{"message":"f","span":{"source":1,"start":2,"end":3},"replacement":"r"}]}"#);
        assert_eq!(
            serde_json::from_str::<Diagnostic>(&json).unwrap(),
            diagnostic
        );
    }

    #[test]
    fn fixes_apply() {
        let mut sources = Sources::new();
        let text = "messh a = dp:2\npn x : [a]\n";
        let source = sources.add("x", text);
        let parsed = crate::weave::parse(text, source);
        let fixed = crate::diagnostics::apply_fixes(text, source, &parsed.diagnostics);
        assert_eq!(fixed, "mesh a = dp:2\npin x : [a]\n");
    }

    #[test]
    fn any_span_renders() {
        let mut sources = Sources::new();
        let id = sources.add("x", "aé\r\nb\n");
        for start in 0..12 {
            for end in 0..12 {
                let diagnostic = Diagnostic::invalid("m")
                    .at(Span::new(id, start, end), "")
                    .fix(Span::new(id, start, end), "r", "f");
                let options = RenderOptions {
                    color: Color::Always,
                };
                assert!(render(&diagnostic, &sources, options).contains("-->"));
            }
        }
        let nowhere = Diagnostic::invalid("m").at(Span::new(SourceId(7), 0, 1), "l");
        assert_eq!(
            render(&nowhere, &sources, RenderOptions::default()),
            "error: m\n"
        );
    }
}
