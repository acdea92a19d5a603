//! What every stage says to people: errors, warnings and notes with places in source files.
//!
//! Enters: facts found by parsers, resolvers and planners. Leaves: [`Diagnostic`] values, plain
//! data with spans that may lie in several files, rendered as text by [`render`] or as JSON by
//! serde.
//! Invariant: a [`Span`] is a half-open byte range of the [`Source`] it names; rendering never
//! fails, whatever the span.

mod near;
mod render;

pub use near::{did_you_mean, distance, nearest};
pub use render::{Color, RenderOptions, render, render_all};

use serde::{Deserialize, Serialize};

/// Names one file (or one string) of a [`Sources`].
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct SourceId(pub u32);

/// A half-open range of bytes `start..end` of a source.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct Span {
    pub source: SourceId,
    pub start: usize,
    pub end: usize,
}

impl Span {
    /// The span `start..end` of `source`.
    pub fn new(source: SourceId, start: usize, end: usize) -> Self {
        Self { source, start, end }
    }

    /// The smallest span that covers both; they must lie in one source, else `self` is returned.
    pub fn to(self, other: Span) -> Span {
        if self.source != other.source {
            return self;
        }
        Span {
            source: self.source,
            start: self.start.min(other.start),
            end: self.end.max(other.end),
        }
    }

    /// The empty span at its end.
    pub fn after(self) -> Span {
        Span {
            start: self.end,
            ..self
        }
    }
}

/// A named text: a file, or a string given on the command line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    pub name: String,
    pub text: String,
}

impl Source {
    /// Line and column, both from 1, the column in characters; past the end gives the end.
    /// Linear in the offset.
    pub fn position(&self, offset: usize) -> (usize, usize) {
        let mut at = offset.min(self.text.len());
        while !self.text.is_char_boundary(at) {
            at -= 1;
        }
        let before = self.text.get(..at).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |i| i + 1);
        let line = before.matches('\n').count() + 1;
        let column = before.get(line_start..).unwrap_or_default().chars().count() + 1;
        (line, column)
    }
}

/// All texts that diagnostics may point into.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sources {
    files: Vec<Source>,
}

impl Sources {
    /// No sources yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a text and returns its id.
    pub fn add(&mut self, name: impl Into<String>, text: impl Into<String>) -> SourceId {
        let id = SourceId(u32::try_from(self.files.len()).unwrap_or(u32::MAX));
        self.files.push(Source {
            name: name.into(),
            text: text.into(),
        });
        id
    }

    /// The source of that id, if it is one of ours.
    pub fn get(&self, id: SourceId) -> Option<&Source> {
        self.files.get(usize::try_from(id.0).ok()?)
    }

    /// The text under `span`, empty when it lies outside.
    pub fn snippet(&self, span: Span) -> &str {
        self.get(span.source)
            .and_then(|source| source.text.get(span.start..span.end))
            .unwrap_or_default()
    }
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Note,
    Warning,
    Error,
}

/// Who acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// The user: the input is malformed or contradicts itself.
    Invalid,
    /// The user: the input is well formed, but nothing satisfies it.
    Infeasible,
    /// The machine: it ran out of memory, time or devices.
    Exhausted,
    /// Us, later: the input is meaningful, but not implemented.
    Unsupported,
    /// Us, now: a broken invariant.
    Internal,
}

/// A place and what to say about it; the message may be empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Label {
    pub span: Span,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// A replacement of the text under `span` that repairs the problem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fix {
    pub message: String,
    pub span: Span,
    pub replacement: String,
}

/// One finding. Build it with [`Diagnostic::error`] and the chained setters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnostic {
    pub severity: Severity,
    pub class: Class,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub primary: Option<Label>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secondary: Vec<Label>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub help: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fixes: Vec<Fix>,
}

impl Diagnostic {
    fn new(severity: Severity, class: Class, message: impl Into<String>) -> Self {
        Self {
            severity,
            class,
            code: None,
            message: message.into(),
            primary: None,
            secondary: Vec::new(),
            help: Vec::new(),
            fixes: Vec::new(),
        }
    }

    /// An error of the given class.
    pub fn error(class: Class, message: impl Into<String>) -> Self {
        Self::new(Severity::Error, class, message)
    }

    /// An error in the input: [`Class::Invalid`].
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::error(Class::Invalid, message)
    }

    /// Something meaningful that is not implemented: [`Class::Unsupported`].
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::error(Class::Unsupported, message)
    }

    /// A warning.
    pub fn warning(message: impl Into<String>) -> Self {
        Self::new(Severity::Warning, Class::Invalid, message)
    }

    /// Sets the stable code, such as `W012`.
    #[must_use]
    pub fn code(mut self, code: impl Into<String>) -> Self {
        self.code = Some(code.into());
        self
    }

    /// Sets the main place.
    #[must_use]
    pub fn at(mut self, span: Span, message: impl Into<String>) -> Self {
        self.primary = Some(Label {
            span,
            message: message.into(),
        });
        self
    }

    /// Adds another place, possibly in another file.
    #[must_use]
    pub fn also(mut self, span: Span, message: impl Into<String>) -> Self {
        self.secondary.push(Label {
            span,
            message: message.into(),
        });
        self
    }

    /// Adds a way out.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help.push(help.into());
        self
    }

    /// Adds a way out if there is one.
    #[must_use]
    pub fn maybe_help(mut self, help: Option<String>) -> Self {
        self.help.extend(help);
        self
    }

    /// Adds a replacement that repairs the text.
    #[must_use]
    pub fn fix(
        mut self,
        span: Span,
        replacement: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        self.fixes.push(Fix {
            message: message.into(),
            span,
            replacement: replacement.into(),
        });
        self
    }

    /// Whether it is an error, not a warning or a note.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

/// Whether any of them is an error.
pub fn has_errors(diagnostics: &[Diagnostic]) -> bool {
    diagnostics.iter().any(Diagnostic::is_error)
}

/// Applies all fixes of `diagnostics` that lie in `source` to `text`; of two that overlap, the
/// first wins.
pub fn apply_fixes(text: &str, source: SourceId, diagnostics: &[Diagnostic]) -> String {
    let mut fixes: Vec<&Fix> = diagnostics
        .iter()
        .flat_map(|diagnostic| &diagnostic.fixes)
        .filter(|fix| fix.span.source == source)
        .collect();
    fixes.sort_by_key(|fix| (fix.span.start, fix.span.end));
    let mut out = String::with_capacity(text.len());
    let mut done = 0;
    for fix in fixes {
        let Some(between) = text.get(done..fix.span.start) else {
            continue;
        };
        if text.get(fix.span.start..fix.span.end).is_none() {
            continue;
        }
        out.push_str(between);
        out.push_str(&fix.replacement);
        done = fix.span.end;
    }
    out.push_str(text.get(done..).unwrap_or_default());
    out
}
