//! Lines and blocks: where statements begin and end, comments, recovery.

use super::{Parse, Parser};
use crate::diagnostics::{Diagnostic, Span, did_you_mean};
use crate::weave::ast::{Block, Comment, Document, Line, Statement, Trivia};
use crate::weave::lexer::Tok;

/// The words by which a statement can go on.
const CLAUSES: [&str; 8] = [
    "except", "override", "over", "within", "refolds", "weight", "trace", "seed",
];

/// What a block is: for messages, and to tell its lines from statements.
#[derive(Clone, Copy)]
pub(super) struct BlockKind {
    /// Such as `pipeline`.
    pub name: &'static str,
    /// The keywords of its lines; empty when any name may begin a line.
    pub keywords: &'static [&'static str],
}

impl<'a> Parser<'a> {
    pub(super) fn document(&mut self) -> Document {
        let mut body = Block::default();
        loop {
            self.lines(&mut body, None, Self::statement);
            if *self.peek() == Tok::End {
                return Document { body };
            }
            // `lines` stops at a `}` that nothing opened.
            let span = self.span();
            self.fail("W004", "this `}` closes nothing", span);
            self.advance();
            self.skip_line();
        }
    }

    /// `{`, lines, `}`.
    pub(super) fn block<T>(
        &mut self,
        kind: BlockKind,
        item: fn(&mut Self) -> Parse<T>,
    ) -> Parse<Block<T>> {
        let opened = self.expect("{")?;
        let mut block = Block::default();
        if *self.peek() == Tok::Comment {
            block.note = Some(self.comment());
        }
        self.lines(&mut block, Some(kind), item);
        if !self.eat("}") {
            let name = kind.name;
            let place = self.found_span();
            let found = self.found();
            self.report(
                Diagnostic::invalid(format!("the `{{` of this {name} block is never closed"))
                    .code("W004")
                    .at(opened, "opened here")
                    .also(place, format!("{found} comes before its `}}`")),
            );
        }
        Ok(block)
    }

    /// Lines up to the end of the file, a `}`, or (within a block) a statement at the margin.
    fn lines<T>(
        &mut self,
        block: &mut Block<T>,
        kind: Option<BlockKind>,
        item: fn(&mut Self) -> Parse<T>,
    ) {
        loop {
            let is_first = block.lines.is_empty() && block.tail.is_empty();
            let mut lead = std::mem::take(&mut block.tail);
            self.trivia(&mut lead, is_first);
            let ends = *self.peek() == Tok::End || self.is_sign("}");
            if ends || kind.is_some_and(|kind| self.is_foreign(kind)) {
                if lead.last() == Some(&Trivia::Blank) {
                    lead.pop();
                }
                block.tail = lead;
                return;
            }
            let begin = self.at;
            match self.spanned(item) {
                Ok(parsed) if self.at_end_of_statement() || self.is_behind_newline() => {
                    let note = (*self.peek() == Tok::Comment).then(|| self.comment());
                    block.lines.push(Line {
                        lead,
                        item: parsed,
                        note,
                    });
                }
                Ok(_) => {
                    self.trailing_tokens();
                    block.tail = lead;
                    self.recover(begin);
                }
                Err(_) => {
                    block.tail = lead;
                    self.recover(begin);
                }
            }
        }
    }

    /// Whether a block without its `}` has just ended before a statement at the margin.
    fn is_behind_newline(&self) -> bool {
        let last = self.at.checked_sub(1).and_then(|at| self.tokens.get(at));
        last.is_some_and(|token| matches!(token.tok, Tok::Newline | Tok::Comment))
    }

    fn trailing_tokens(&mut self) {
        let keyword = *self.peek() == Tok::Word && Statement::KEYWORDS.contains(&self.here());
        let mut diagnostic = self.unexpected_diagnostic("the end of the line");
        if keyword {
            diagnostic = diagnostic.help("one statement a line");
        } else if *self.peek() == Tok::Word {
            diagnostic = diagnostic.maybe_help(did_you_mean(self.here(), CLAUSES));
        }
        self.report(diagnostic);
    }

    /// Comments and blank lines. `is_start`: nothing stands before, so blanks do not count.
    fn trivia(&mut self, lead: &mut Vec<Trivia>, is_start: bool) {
        // Line ends since the last thing on a line; two of them leave a blank line.
        let mut n_newlines = usize::from(self.at == 0);
        loop {
            match self.peek() {
                Tok::Newline => n_newlines += 1,
                Tok::Sign(";") => {}
                found => {
                    let is_comment = *found == Tok::Comment;
                    let starts = is_start && lead.is_empty();
                    if n_newlines >= 2 && !starts && lead.last() != Some(&Trivia::Blank) {
                        lead.push(Trivia::Blank);
                    }
                    if !is_comment {
                        return;
                    }
                    let comment = self.comment();
                    lead.push(Trivia::Comment(comment));
                    n_newlines = 0;
                    continue;
                }
            }
            self.advance();
        }
    }

    /// Reads the comment that is here.
    fn comment(&mut self) -> Comment {
        let text = self.here();
        let text = text.strip_prefix('#').unwrap_or(text);
        self.advance();
        Comment::new(text.strip_prefix(' ').unwrap_or(text))
    }

    /// Whether a top-level statement stands here at the margin, which no line of this block is:
    /// then the block's `}` is missing.
    fn is_foreign(&self, kind: BlockKind) -> bool {
        let start = self.token(0).start;
        let at_margin = start == 0 || self.text.as_bytes().get(start - 1) == Some(&b'\n');
        let is_statement = *self.peek() == Tok::Word && Statement::KEYWORDS.contains(&self.here());
        let is_ours = kind.keywords.contains(&self.here());
        // Any name may begin a line of a definition, so only what cannot be a key counts there.
        let is_certain = !kind.keywords.is_empty() || self.next_is_name_then_sign();
        at_margin && is_statement && !is_ours && is_certain
    }

    /// `mesh main =`, `pipeline main.pp {`, … : a statement, not a setting.
    fn next_is_name_then_sign(&self) -> bool {
        self.token(1).tok == Tok::Word
            && matches!(self.token(2).tok, Tok::Sign("=" | "{" | "." | "(" | ":"))
    }

    /// Goes to the end of the statement that began at token `begin` and failed here. If its line
    /// opened a block, that is skipped too.
    fn recover(&mut self, begin: usize) {
        self.at = self.at.max(begin);
        // Brackets that the statement has opened before it failed.
        let mut open: Vec<Span> = Vec::new();
        for token in self.tokens.get(begin..self.at).unwrap_or_default() {
            match token.tok {
                Tok::Sign("{") => open.push(Span::new(self.source, token.start, token.end)),
                Tok::Sign("}") => {
                    open.pop();
                }
                _ => {}
            }
        }
        loop {
            match self.peek() {
                Tok::End => break,
                Tok::Newline => {
                    let last_is_brace = self
                        .tokens
                        .get(begin..self.at)
                        .unwrap_or_default()
                        .iter()
                        .rfind(|token| token.tok != Tok::Comment)
                        .is_some_and(|token| token.tok == Tok::Sign("{"));
                    if last_is_brace && let Some(&brace) = open.last() {
                        self.skip_block(brace);
                        self.skip_line();
                    }
                    return;
                }
                Tok::Sign(";") if open.is_empty() => return,
                Tok::Sign("{") => open.push(self.span()),
                Tok::Sign("}") if open.pop().is_none() => return,
                _ => {}
            }
            self.advance();
        }
    }

    /// Goes behind the `}` of the block that `opened`, from its first line end.
    fn skip_block(&mut self, opened: Span) {
        let mut depth = 1;
        while depth > 0 {
            match self.peek() {
                Tok::End => {
                    let place = self.found_span();
                    self.report(
                        Diagnostic::invalid("the `{` of this block is never closed")
                            .code("W004")
                            .at(opened, "opened here")
                            .also(place, "the end of the file comes before its `}`"),
                    );
                    return;
                }
                Tok::Sign("{") => depth += 1,
                Tok::Sign("}") => depth -= 1,
                _ => {}
            }
            self.advance();
        }
    }

    fn skip_line(&mut self) {
        while !matches!(self.peek(), Tok::Newline | Tok::End) {
            self.advance();
        }
    }

    /// Records that the word here begins no line of `kind`.
    pub(super) fn unknown_line(&mut self, kind: BlockKind) -> super::Stop {
        let word = self.here();
        let name = kind.name;
        let is_statement = Statement::KEYWORDS.contains(&word);
        let message = match self.peek() {
            Tok::Word if is_statement => format!("`{word}` cannot stand in a {name} block"),
            Tok::Word => format!("a {name} block has no line `{word}`"),
            _ => format!("expected a line of {name}, found {}", self.found()),
        };
        let list: Vec<String> = kind.keywords.iter().map(|k| format!("`{k}`")).collect();
        let near = did_you_mean(word, kind.keywords.iter().copied());
        let help = near.unwrap_or_else(|| format!("its lines are {}", list.join(", ")));
        let span = self.found_span();
        let diagnostic = Diagnostic::invalid(message).code("W003").at(span, "");
        self.report(diagnostic.help(help))
    }

    /// Records the second of two lines of which a block may have one.
    pub(super) fn only_once<T>(&mut self, block: &Block<T>, name: fn(&T) -> Option<&'static str>) {
        let mut seen: Vec<(&'static str, Span)> = Vec::new();
        for item in block.items() {
            let Some(name) = name(&item.node) else {
                continue;
            };
            match seen.iter().find(|(earlier, _)| *earlier == name) {
                Some(&(_, first)) => {
                    let message = format!("`{name}` is given twice");
                    let diagnostic = Diagnostic::invalid(message).code("W006");
                    self.diagnostics.push(
                        diagnostic
                            .at(item.span, "again here")
                            .also(first, "first here"),
                    );
                }
                None => seen.push((name, item.span)),
            }
        }
    }
}
