//! Properties of the language: print and parse are inverse, formatting is idempotent, JSON is
//! lossless, freezing and thawing are projections, and no text makes the parser panic.

// Helpers of tests may fail as tests do.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "weave_properties/strategy.rs"]
mod strategy;

use meshweave_dsl::diagnostics::{RenderOptions, SourceId, Sources, render_all};
use meshweave_dsl::weave::ast::{Choice, Layout, Selector, Statement};
use meshweave_dsl::weave::{Document, parse, print};
use proptest::prelude::*;

const SAMPLE: &str = include_str!("../../tests/cases/parse/design_sample.weave");

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn print_then_parse_is_the_identity(document in strategy::document()) {
        let text = print(&document);
        let parsed = parse(&text, SourceId(0));
        prop_assert_eq!(&parsed.diagnostics, &[], "{}", text);
        prop_assert_eq!(&parsed.document, &document, "{}", text);
        prop_assert_eq!(print(&parsed.document), text);
    }

    #[test]
    fn json_is_the_identity(document in strategy::document()) {
        let json = serde_json::to_string(&document).unwrap();
        let back: Document = serde_json::from_str(&json).unwrap();
        prop_assert_eq!(back, document);
    }

    #[test]
    fn freeze_and_thaw(document in strategy::document()) {
        let frozen = document.freeze();
        prop_assert_eq!(frozen.freeze(), frozen.clone());
        let mut without_plan = frozen.clone();
        without_plan.drop_plan();
        prop_assert_eq!(frozen.thaw(), without_plan, "only the solved plan is left to thaw");
        let thawed = document.thaw();
        prop_assert_eq!(thawed.thaw(), thawed.clone());
        prop_assert_eq!(thawed.freeze(), thawed.clone(), "nothing is left to freeze");
        for frozen in [frozen, thawed] {
            let text = print(&frozen);
            let parsed = parse(&text, SourceId(0));
            prop_assert_eq!(&parsed.diagnostics, &[], "{}", text);
        }
    }

    #[test]
    fn places_of_statements_are_their_texts(document in strategy::document()) {
        let text = print(&document);
        let parsed = parse(&text, SourceId(0));
        for statement in parsed.document.statements() {
            let span = statement.span;
            let alone = parse(&text[span.start..span.end], SourceId(0));
            let mut statements = alone.document.statements();
            prop_assert_eq!(statements.next().map(|s| &s.node), Some(&statement.node));
        }
    }

    #[test]
    fn damaged_text_is_read_or_refused(
        start in 0..SAMPLE.len(),
        length in 0..30usize,
        insert in "\\PC{0,4}|[{}()\\[\\]\":;=.*/#\n-]{0,6}",
    ) {
        let end = (start + length).min(SAMPLE.len());
        any_text_is_read_or_refused(&format!("{}{insert}{}", &SAMPLE[..start], &SAMPLE[end..]));
    }

    #[test]
    fn random_tokens_are_read_or_refused(
        words in prop::collection::vec(prop::sample::select(TOKENS), 0..40),
    ) {
        any_text_is_read_or_refused(&words.join(" "));
        any_text_is_read_or_refused(&words.concat());
    }
}

const TOKENS: &[&str] = &[
    "plan", "mesh", "use", "pin", "forbid", "prefer", "tactic", "apply", "shard", "pipeline",
    "memory", "schedule", "model", "train", "solve", "minimize", "auto", "rest", "over", "on",
    "except", "override", "key", "rows", "row", "F", "mb", "2F0", "{", "}", "(", ")", "[", "]",
    ",", ";", ":", ":=", "=", ">", "/", "*", "+", "-", "%", "?", ".", "..", "\n", "\n\n", "# c\n",
    "\"t\"", "1", "2.5", "1e-3", "GiB", "s", "x", "layers", "é", "\"",
];

fn any_text_is_read_or_refused(text: &str) {
    let mut sources = Sources::new();
    let source = sources.add("text", text);
    let parsed = parse(text, source);
    for diagnostic in &parsed.diagnostics {
        let labels = diagnostic.primary.iter().chain(&diagnostic.secondary);
        for label in labels {
            assert!(
                text.get(label.span.start..label.span.end).is_some(),
                "{diagnostic:?}"
            );
        }
        assert!(diagnostic.primary.is_some(), "{diagnostic:?} has no place");
    }
    render_all(&parsed.diagnostics, &sources, RenderOptions::default());
    let printed = print(&parsed.document);
    let again = parse(&printed, source);
    // Findings about a whole statement (something twice) leave it in the tree.
    let is_twice = |code: &Option<String>| code.as_deref() == Some("W006");
    assert!(
        again.diagnostics.iter().all(|d| is_twice(&d.code)),
        "{printed}"
    );
    assert_eq!(again.document, parsed.document, "{printed}");
}

/// The paths that a selector selects, told by an independent, slow definition.
fn selects(selector: &str, path: &str) -> bool {
    let text = format!("pin {selector} : []");
    let document = parse(&text, SourceId(0)).ok().unwrap();
    let statement = document.statements().next().unwrap();
    let Statement::Pin(pin) = &statement.node else {
        panic!("{text} is a pin");
    };
    let selector: &Selector = &pin.on;
    assert_eq!(pin.layout.node, Choice::Fixed(Layout::default()));
    selector.matches(path)
}

#[test]
fn selectors_match_paths() {
    let cases = [
        ("*", "wte", true),
        ("*", "layers[3].attn.wq", true),
        ("*.router", "layers[3].moe.router", true),
        ("*.router", "router", false),
        (".router", "router", true),
        (".router", "layers[3].moe.router", true),
        (".moe.router", "layers[3].moe.router", true),
        ("layers[*]", "layers[3]", true),
        ("layers[*]", "layers[3].moe", false),
        ("layers[*].attn.wq", "layers[11].attn.wq", true),
        ("layers[*].attn.w*", "layers[11].attn.wq", true),
        ("layers[*].attn.w*", "layers[11].attn.norm", false),
        ("layers[3..8].attn.wq", "layers[3].attn.wq", true),
        ("layers[3..8].attn.wq", "layers[8].attn.wq", false),
        ("layers[..2].x", "layers[1].x", true),
        ("layers[2..].x", "layers[1].x", false),
        ("layers[0,2].x", "layers[2].x", true),
        ("layers[0,2].x", "layers[1].x", false),
        ("layers.x", "layers[1].x", false),
        ("wte", "wte", true),
        ("*.*.*", "a.b", false),
        ("*.*.*", "a.b.c.d", true),
        ("*_norm", "attn_norm", true),
    ];
    for (selector, path, expected) in cases {
        assert_eq!(selects(selector, path), expected, "{selector} on {path}");
    }
}
