//! The corpus of the language: `tests/cases/parse` is parsed, `tests/cases/fmt` is formatted, and
//! every example of `docs/language.md` is read.

// Helpers of tests may fail as tests do.
#![allow(clippy::unwrap_used)]

use meshweave_dsl::diagnostics::{RenderOptions, SourceId, Sources, has_errors, render_all};
use meshweave_dsl::weave::ast::Statement;
use meshweave_dsl::weave::{Document, parse, print};

/// What every text must satisfy, malformed or not; returns the diagnostics and the printed tree.
fn check(name: &str, text: &str) -> (String, String) {
    let mut sources = Sources::new();
    let source = sources.add(name, text);
    let parsed = parse(text, source);
    let printed = print(&parsed.document);
    let again = parse(&printed, source);
    // Findings about a well-formed statement (something is given twice) leave it in the tree.
    let is_twice = |code: &Option<String>| code.as_deref() == Some("W006");
    let lost: Vec<_> = again
        .diagnostics
        .iter()
        .filter(|d| !is_twice(&d.code))
        .collect();
    assert!(
        lost.is_empty(),
        "the printed tree reparses:\n{printed}\n{lost:?}"
    );
    assert_eq!(
        again.document, parsed.document,
        "print, parse is the identity"
    );
    assert_eq!(print(&again.document), printed, "formatting is idempotent");
    let json = serde_json::to_string(&parsed.document).unwrap();
    let back: Document = serde_json::from_str(&json).unwrap();
    assert_eq!(back, parsed.document, "JSON is the identity");
    let rendered = render_all(&parsed.diagnostics, &sources, RenderOptions::default());
    (rendered, printed)
}

fn file_name(path: &std::path::Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

/// Snapshots lie next to their cases.
fn snapshot(stage: &str, text: String) {
    insta::with_settings!({
        snapshot_path => format!("../../tests/cases/{stage}/snapshots"),
        prepend_module_to_snapshot => false,
        omit_expression => true,
    }, {
        insta::assert_snapshot!(stage, text);
    });
}

#[test]
fn parse_cases() {
    insta::glob!("../../tests/cases/parse", "*.weave", |path| {
        let text = std::fs::read_to_string(path).unwrap();
        let (diagnostics, printed) = check(&file_name(path), &text);
        snapshot(
            "parse",
            format!("{diagnostics}---- printed ----\n{printed}"),
        );
    });
}

#[test]
fn fmt_cases() {
    insta::glob!("../../tests/cases/fmt", "*.weave", |path| {
        let text = std::fs::read_to_string(path).unwrap();
        let (diagnostics, printed) = check(&file_name(path), &text);
        assert_eq!(diagnostics, "", "only well-formed text is formatted");
        snapshot("fmt", printed);
    });
}

#[test]
fn the_sample_is_already_formatted() {
    let text = include_str!("../../tests/cases/parse/design_sample.weave");
    assert_eq!(check("sample", text), (String::new(), text.to_owned()));
}

#[test]
fn every_prefix_of_the_sample_parses_or_is_refused() {
    let text = include_str!("../../tests/cases/parse/design_sample.weave");
    for end in 0..text.len() {
        let parsed = parse(&text[..end], SourceId(0));
        let complete = text[..end].lines().next_back().unwrap_or_default();
        if complete.ends_with('{') {
            assert!(has_errors(&parsed.diagnostics), "{}", &text[..end]);
        }
        check("prefix", &text[..end]);
    }
}

/// The fenced `weave` blocks of a page, each with the number of its first line.
fn examples(page: &str) -> Vec<(usize, String)> {
    let mut out: Vec<(usize, String)> = Vec::new();
    let mut is_inside = false;
    for (nth, line) in page.lines().enumerate() {
        match (is_inside, line) {
            (false, "```weave") => {
                is_inside = true;
                out.push((nth + 2, String::new()));
            }
            (true, "```") => is_inside = false,
            (true, line) => {
                let (_, text) = out.last_mut().unwrap();
                text.push_str(line);
                text.push('\n');
            }
            (false, _) => {}
        }
    }
    out
}

#[test]
fn every_example_of_the_documentation_is_read() {
    let page = include_str!("../../docs/language.md");
    let examples = examples(page);
    let mut keywords = std::collections::BTreeSet::new();
    for (line, text) in &examples {
        let (diagnostics, printed) = check(&format!("docs/language.md:{line}"), text);
        assert_eq!(diagnostics, "", "the example at line {line}");
        assert_eq!(&printed, text, "the example at line {line} is formatted");
        let document = parse(text, SourceId(0)).document;
        keywords.extend(document.statements().map(|s| s.node.keyword()));
    }
    let missing: Vec<_> = Statement::KEYWORDS
        .iter()
        .filter(|keyword| !keywords.contains(*keyword))
        .collect();
    assert!(missing.is_empty(), "no example for {missing:?}");
}

#[test]
fn the_frozen_example_is_what_freezing_yields() {
    let page = include_str!("../../docs/language.md");
    let examples = examples(page);
    let at = examples
        .iter()
        .position(|(_, text)| text.contains(":="))
        .unwrap();
    let (solved, frozen) = (&examples[at].1, &examples[at + 1].1);
    let document = parse(solved, SourceId(0)).document;
    assert_eq!(&print(&document.freeze()), frozen);
}
