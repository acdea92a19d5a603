//! The corpus of the language: `tests/cases/parse` is parsed, `tests/cases/fmt` is formatted, and
//! every example of `docs/language.md` is read.

// Helpers of tests may fail as tests do.
#![allow(clippy::unwrap_used)]

use meshweave_dsl::diagnostics::{RenderOptions, SourceId, Sources, has_errors, render_all};
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
