//! The one error type of the facade: diagnostics with the sources that they point into.
//!
//! Enters: errors of every stage. Leaves: text for people, JSON for machines, and an exit code.
//! Only this crate renders errors.

use std::io::IsTerminal;

use meshweave_dsl::diagnostics::{
    Class, Color, Diagnostic, RenderOptions, Severity, Sources, render_all,
};
use serde_json::json;

/// Result of the facade.
pub type Result<T> = std::result::Result<T, Error>;

/// One or more findings, of which at least one is an error.
#[derive(Clone, Debug, PartialEq)]
pub struct Error {
    pub diagnostics: Vec<Diagnostic>,
    pub sources: Sources,
}

impl Error {
    /// An error from findings in sources.
    pub fn new(diagnostics: Vec<Diagnostic>, sources: Sources) -> Self {
        Self {
            diagnostics,
            sources,
        }
    }

    /// An error without a place.
    pub fn plain(class: Class, message: impl ToString) -> Self {
        Self::new(
            vec![Diagnostic::error(class, message.to_string())],
            Sources::new(),
        )
    }

    /// This error with a hint what to do.
    pub fn help(mut self, help: impl Into<String>) -> Self {
        if let Some(first) = self.diagnostics.first_mut() {
            first.help.push(help.into());
        }
        self
    }

    /// The class of the first error: who acts.
    pub fn class(&self) -> Class {
        let errors = self
            .diagnostics
            .iter()
            .filter(|diagnostic| diagnostic.severity == Severity::Error);
        errors
            .map(|diagnostic| diagnostic.class)
            .next()
            .unwrap_or(Class::Internal)
    }

    /// The exit code of the command line.
    pub fn exit_code(&self) -> u8 {
        match self.class() {
            Class::Invalid => 1,
            Class::Infeasible => 3,
            Class::Exhausted => 4,
            Class::Unsupported => 5,
            Class::Internal => 70,
        }
    }

    /// Text for people, colored when standard error is a terminal.
    pub fn render(&self) -> String {
        let color = if std::io::stderr().is_terminal() {
            Color::Always
        } else {
            Color::Never
        };
        self.render_with(color)
    }

    /// Text for people.
    pub fn render_with(&self, color: Color) -> String {
        let options = RenderOptions { color };
        render_all(&self.diagnostics, &self.sources, options)
    }

    /// JSON for machines: `{"error": {"class", "exit_code", "diagnostics": [..], "sources": [names]}}`.
    pub fn to_json(&self) -> serde_json::Value {
        json!({
            "error": {
                "class": self.class(),
                "exit_code": self.exit_code(),
                "diagnostics": self.diagnostics,
            }
        })
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.render_with(Color::Never).trim_end())
    }
}

impl std::error::Error for Error {}
