//! Tokens to a syntax tree.
//!
//! Enters: the text of a `.weave` file. Leaves: a [`Document`] of what was understood and the
//! diagnostics for the rest; parsing never fails.
//! Invariant: each malformed statement yields at least one error with a place; after it, parsing
//! goes on at the next line (or behind the block that the statement opened).

mod block;
mod directive;
mod layout;
mod schedule;
mod select;
mod statement;
mod value;

use super::ast::{Document, Spanned};
use super::lexer::{self, Tok, Token};
use crate::diagnostics::{Diagnostic, SourceId, Span, did_you_mean};

/// What a file was understood as.
#[derive(Debug, Clone, PartialEq)]
pub struct Parsed {
    pub document: Document,
    /// In the order of their places.
    pub diagnostics: Vec<Diagnostic>,
}

impl Parsed {
    /// The document, if nothing was wrong with it.
    ///
    /// # Errors
    /// The diagnostics, when one of them is an error.
    pub fn ok(self) -> Result<Document, Vec<Diagnostic>> {
        if crate::diagnostics::has_errors(&self.diagnostics) {
            Err(self.diagnostics)
        } else {
            Ok(self.document)
        }
    }
}

/// Parses `text`, whose places are reported as lying in `source`.
pub fn parse(text: &str, source: SourceId) -> Parsed {
    let mut parser = Parser::new(text, source);
    let document = parser.document();
    Parsed {
        document,
        diagnostics: without_echoes(text, parser.diagnostics),
    }
}

/// Sorts by place, and of a line with something that is no token keeps that finding alone: what
/// the parser says about the rest of such a line only follows from it.
fn without_echoes(text: &str, mut diagnostics: Vec<Diagnostic>) -> Vec<Diagnostic> {
    let place = |diagnostic: &Diagnostic| diagnostic.primary.as_ref().map(|label| label.span.start);
    let is_lexical = |diagnostic: &Diagnostic| diagnostic.code.as_deref() == Some("W001");
    let is_echo =
        |diagnostic: &Diagnostic| matches!(diagnostic.code.as_deref(), Some("W001" | "W002"));
    let line_start = |diagnostic: &Diagnostic| {
        let before = text.get(..place(diagnostic)?)?;
        Some(before.rfind('\n').map_or(0, |newline| newline + 1))
    };
    diagnostics.sort_by_key(|diagnostic| (place(diagnostic).is_none(), place(diagnostic)));
    let mut damaged: Vec<(Option<usize>, Option<usize>)> = Vec::new();
    for diagnostic in diagnostics.iter().filter(|d| is_lexical(d)) {
        let line = line_start(diagnostic);
        if damaged.iter().all(|(other, _)| *other != line) {
            damaged.push((line, place(diagnostic)));
        }
    }
    diagnostics.retain(|diagnostic| {
        let line = line_start(diagnostic);
        let first = damaged.iter().find(|(other, _)| *other == line);
        first.is_none_or(|(_, first)| !is_echo(diagnostic) || place(diagnostic) == *first)
    });
    diagnostics
}

/// Parses all of `text` by one rule; the first error is the result.
pub(super) fn whole<'a, T>(
    text: &'a str,
    rule: impl FnOnce(&mut Parser<'a>) -> Parse<T>,
) -> Result<T, Box<Diagnostic>> {
    let mut parser = Parser::new(text, SourceId::default());
    let value = rule(&mut parser);
    if value.is_ok() && *parser.peek() != Tok::End {
        let _: Stop = parser.unexpected("nothing more");
    }
    match (value, parser.diagnostics.into_iter().next()) {
        (Ok(value), None) => Ok(value),
        (_, Some(diagnostic)) => Err(Box::new(diagnostic)),
        (Err(Stop), None) => Err(Box::new(Diagnostic::invalid(format!(
            "`{text}` is malformed"
        )))),
    }
}

/// The statement cannot be understood; its diagnostic is recorded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stop;

/// Whether a list in parentheses may have no items.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Empty {
    Allowed,
    Refused,
}

/// What a rule yields.
pub(super) type Parse<T> = Result<T, Stop>;

/// The state of parsing: a place among the tokens, and the findings so far.
pub(super) struct Parser<'a> {
    text: &'a str,
    source: SourceId,
    tokens: Vec<Token>,
    at: usize,
    diagnostics: Vec<Diagnostic>,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str, source: SourceId) -> Self {
        let (tokens, diagnostics) = lexer::lex(text, source);
        Self {
            text,
            source,
            tokens,
            at: 0,
            diagnostics,
        }
    }

    /// The token `ahead` places from here; the last one is `End`.
    fn token(&self, ahead: usize) -> &Token {
        const END: &Token = &Token {
            tok: Tok::End,
            start: 0,
            end: 0,
        };
        self.tokens
            .get(self.at + ahead)
            .or(self.tokens.last())
            .unwrap_or(END)
    }

    fn peek(&self) -> &Tok {
        &self.token(0).tok
    }

    /// The text of the token here.
    fn here(&self) -> &'a str {
        let token = self.token(0);
        self.text.get(token.start..token.end).unwrap_or_default()
    }

    /// The place of the token here.
    fn span(&self) -> Span {
        let token = self.token(0);
        Span::new(self.source, token.start, token.end)
    }

    /// The place of the token just read.
    fn last_span(&self) -> Span {
        let last = self.at.checked_sub(1).and_then(|at| self.tokens.get(at));
        last.map_or(Span::new(self.source, 0, 0), |token| {
            Span::new(self.source, token.start, token.end)
        })
    }

    fn advance(&mut self) {
        if self.at + 1 < self.tokens.len() {
            self.at += 1;
        }
    }

    /// Whether the token here follows the one before without a blank.
    fn is_adjacent(&self) -> bool {
        self.at > 0 && self.last_span().end == self.token(0).start
    }

    fn is_sign(&self, sign: &str) -> bool {
        matches!(self.peek(), Tok::Sign(found) if *found == sign)
    }

    /// Reads `sign` if it is here.
    fn eat(&mut self, sign: &str) -> bool {
        let found = self.is_sign(sign);
        if found {
            self.advance();
        }
        found
    }

    fn is_word(&self, word: &str) -> bool {
        *self.peek() == Tok::Word && self.here() == word
    }

    /// Reads `word` if it is here.
    fn eat_word(&mut self, word: &str) -> bool {
        let found = self.is_word(word);
        if found {
            self.advance();
        }
        found
    }

    fn expect(&mut self, sign: &str) -> Parse<Span> {
        if self.eat(sign) {
            Ok(self.last_span())
        } else {
            Err(self.unexpected(&format!("`{sign}`")))
        }
    }

    fn expect_word(&mut self, word: &str) -> Parse<Span> {
        if self.eat_word(word) {
            Ok(self.last_span())
        } else {
            Err(self.unexpected(&format!("`{word}`")))
        }
    }

    /// Whether a statement ends here.
    fn at_end_of_statement(&self) -> bool {
        matches!(self.peek(), Tok::Newline | Tok::Comment | Tok::End)
            || self.is_sign(";")
            || self.is_sign("}")
    }

    /// Records an error.
    fn report(&mut self, diagnostic: Diagnostic) -> Stop {
        self.diagnostics.push(diagnostic);
        Stop
    }

    /// Records an error at `span`.
    fn fail(&mut self, code: &str, message: impl Into<String>, span: Span) -> Stop {
        self.report(Diagnostic::invalid(message).code(code).at(span, ""))
    }

    /// What is here, for messages.
    fn found(&self) -> String {
        match self.peek() {
            Tok::Newline | Tok::Comment => "the end of the line".to_owned(),
            Tok::End => "the end of the file".to_owned(),
            Tok::Text(_) => format!("the text {}", self.here()),
            Tok::Word | Tok::Number | Tok::Sign(_) => format!("`{}`", self.here()),
        }
    }

    /// Where to point when what is here is unexpected: a line end is shown behind the last token.
    fn found_span(&self) -> Span {
        match self.peek() {
            Tok::Newline | Tok::Comment | Tok::End if self.at > 0 => self.last_span().after(),
            _ => self.span(),
        }
    }

    /// Records that `expected` should stand here.
    fn unexpected(&mut self, expected: &str) -> Stop {
        let diagnostic = self.unexpected_diagnostic(expected);
        self.report(diagnostic)
    }

    fn unexpected_diagnostic(&self, expected: &str) -> Diagnostic {
        Diagnostic::invalid(format!("expected {expected}, found {}", self.found()))
            .code("W002")
            .at(self.found_span(), format!("expected {expected}"))
    }

    /// Records that one of `words` should stand here, with the near one.
    fn unexpected_word(&mut self, what: &str, words: &[&str]) -> Stop {
        let quoted: Vec<String> = words.iter().map(|word| format!("`{word}`")).collect();
        let list = match quoted.as_slice() {
            [rest @ .., last] if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
            _ => quoted.join(""),
        };
        let span = self.found_span();
        let mut diagnostic =
            Diagnostic::invalid(format!("expected {what}, found {}", self.found()))
                .code("W002")
                .at(span, format!("expected {list}"));
        if *self.peek() == Tok::Word {
            diagnostic = diagnostic.maybe_help(did_you_mean(self.here(), words.iter().copied()));
        }
        self.report(diagnostic)
    }

    /// Reads one of the spellings in `all`.
    fn one_of<T: Copy>(&mut self, what: &str, all: &[T], text: fn(T) -> &'static str) -> Parse<T> {
        let found = all.iter().copied().find(|&item| self.is_word(text(item)));
        match found {
            Some(item) => {
                self.advance();
                Ok(item)
            }
            None => {
                let words: Vec<&str> = all.iter().copied().map(text).collect();
                Err(self.unexpected_word(what, &words))
            }
        }
    }

    /// Applies `rule` and adds the place of what it read.
    fn spanned<T>(&mut self, rule: impl FnOnce(&mut Self) -> Parse<T>) -> Parse<Spanned<T>> {
        let start = self.span();
        let node = rule(self)?;
        Ok(Spanned::new(node, start.to(self.last_span())))
    }

    /// The end of a list that `opened`.
    fn close(&mut self, sign: &str, opened: Span) -> Parse<()> {
        if self.eat(sign) {
            return Ok(());
        }
        let diagnostic = self
            .unexpected_diagnostic(&format!("`,` or `{sign}`"))
            .also(opened, "opened here");
        Err(self.report(diagnostic))
    }

    /// `(item, item, …)`
    fn parenthesized<T>(
        &mut self,
        is_empty_allowed: Empty,
        item: impl FnMut(&mut Self) -> Parse<T>,
    ) -> Parse<Vec<T>> {
        let opened = self.expect("(")?;
        if is_empty_allowed == Empty::Allowed && self.eat(")") {
            return Ok(Vec::new());
        }
        let items = self.comma_list(item)?;
        self.close(")", opened)?;
        Ok(items)
    }

    /// `item, item, …`, at least one.
    fn comma_list<T>(&mut self, mut item: impl FnMut(&mut Self) -> Parse<T>) -> Parse<Vec<T>> {
        let mut items = vec![item(self)?];
        while self.eat(",") {
            items.push(item(self)?);
        }
        Ok(items)
    }
}
