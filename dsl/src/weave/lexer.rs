//! Text to tokens.
//!
//! Enters: the text of a `.weave` file. Leaves: tokens with byte ranges, line ends and comments
//! included, ending in one [`Tok::End`], and diagnostics for what is no token.
//! Invariant: token ranges are increasing, lie on character boundaries, and cover everything but
//! blanks, a byte-order mark and what was reported.

use crate::diagnostics::{Diagnostic, SourceId, Span};
use crate::units::Unit;

/// A kind of token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Tok {
    /// A line end.
    Newline,
    /// From `#` to before the line end.
    Comment,
    /// Letters, digits and `_`, not a number: `main`, `1f1b`, `2F0`.
    Word,
    /// An unsigned number as written: `4096`, `50_304`, `1e-3`.
    Number,
    /// A quoted text, its escapes resolved.
    Text(String),
    /// A sign: one of [`SIGNS`].
    Sign(&'static str),
    /// The end of the text.
    End,
}

/// A token and its byte range.
#[derive(Debug, Clone)]
pub(super) struct Token {
    pub tok: Tok,
    pub start: usize,
    pub end: usize,
}

/// All signs, longer ones first.
const SIGNS: [&str; 20] = [
    ":=", "..", "{", "}", "(", ")", "[", "]", ",", ";", ":", "=", ">", "/", "*", "+", "-", "%",
    "?", ".",
];

/// Splits `text` into tokens. Linear.
pub(super) fn lex(text: &str, source: SourceId) -> (Vec<Token>, Vec<Diagnostic>) {
    let mut lexer = Lexer {
        text,
        source,
        at: 0,
        tokens: Vec::new(),
        diagnostics: Vec::new(),
    };
    if text.starts_with('\u{feff}') {
        lexer.at = '\u{feff}'.len_utf8();
    }
    while lexer.at < text.len() {
        lexer.next();
    }
    lexer.push(Tok::End, text.len());
    (lexer.tokens, lexer.diagnostics)
}

struct Lexer<'a> {
    text: &'a str,
    source: SourceId,
    at: usize,
    tokens: Vec<Token>,
    diagnostics: Vec<Diagnostic>,
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

impl<'a> Lexer<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    /// Pushes a token from the present place to `end` and goes there.
    fn push(&mut self, tok: Tok, end: usize) {
        self.tokens.push(Token {
            tok,
            start: self.at,
            end,
        });
        self.at = end;
    }

    fn span(&self, start: usize, end: usize) -> Span {
        Span::new(self.source, start, end)
    }

    fn next(&mut self) {
        let rest = self.rest();
        let Some(first) = rest.chars().next() else {
            return;
        };
        match first {
            '\n' => self.push(Tok::Newline, self.at + 1),
            '\r' if rest.starts_with("\r\n") => self.at += 1,
            ' ' | '\t' => self.at += 1,
            '#' => {
                let length = rest.find('\n').unwrap_or(rest.len());
                self.push(Tok::Comment, self.at + length);
            }
            '"' => self.text_literal(),
            c if c.is_ascii_digit() => self.number(),
            c if is_word(c) => {
                let length = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
                self.push(Tok::Word, self.at + length);
            }
            c => match SIGNS.iter().find(|sign| rest.starts_with(**sign)) {
                Some(sign) => self.push(Tok::Sign(sign), self.at + sign.len()),
                None => self.unknown(c),
            },
        }
    }

    /// Whether what is here goes on with a name, as the `5` in `w*5.3d` and the `2` in `x-2.3d`.
    fn is_within_name(&self) -> bool {
        let mut before = self.tokens.iter().rev();
        let mut end = self.at;
        let mut adjacent = || {
            let token = before.next().filter(|token| token.end == end)?;
            end = token.start;
            Some(&token.tok)
        };
        match adjacent() {
            Some(Tok::Sign("*")) => true,
            Some(Tok::Sign("-")) => {
                matches!(adjacent(), Some(Tok::Word | Tok::Number | Tok::Sign("*")))
            }
            _ => false,
        }
    }

    /// A number, or a word that begins with a digit.
    fn number(&mut self) {
        let rest = self.rest();
        if self.is_within_name() {
            // Here `5.3` is no decimal number: the dot parts two names.
            let whole = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
            let run = rest.get(..whole).unwrap_or_default();
            let is_number = run.chars().all(|c| c.is_ascii_digit() || c == '_');
            let tok = if is_number { Tok::Number } else { Tok::Word };
            self.push(tok, self.at + whole);
            return;
        }
        let number = number_length(rest);
        let tail = rest.get(number..).unwrap_or_default();
        let tail_length = tail.find(|c| !is_word(c)).unwrap_or(tail.len());
        let tail_word = tail.get(..tail_length).unwrap_or_default();
        let is_unit = Unit::ALL.iter().any(|unit| {
            // `GB/s` is three tokens: its first word is what follows the number.
            unit.text().split('/').next() == Some(tail_word)
        });
        let whole = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        if tail_word.is_empty() || is_unit {
            self.push(Tok::Number, self.at + number);
        } else if rest.get(..number).is_some_and(|n| n.contains('.')) {
            let end = self.at + number + tail_length;
            let written = self.text.get(self.at..end).unwrap_or_default();
            self.diagnostics.push(
                Diagnostic::invalid(format!("`{written}` is neither a number nor a name"))
                    .code("W001")
                    .at(self.span(self.at, end), "")
                    .help("write a number such as `0.5` or `1e-3`, a blank, and then a word"),
            );
            self.push(Tok::Number, self.at + number);
            self.at = end;
        } else {
            self.push(Tok::Word, self.at + whole);
        }
    }

    fn text_literal(&mut self) {
        let start = self.at;
        let mut value = String::new();
        let mut chars = self.rest().char_indices().skip(1).peekable();
        while let Some((i, c)) = chars.next() {
            match c {
                '"' => {
                    self.push(Tok::Text(value), start + i + 1);
                    return;
                }
                '\n' => break,
                '\r' if matches!(chars.peek(), Some((_, '\n'))) => break,
                '\\' => match chars.peek().copied() {
                    Some((_, escape @ ('"' | '\\' | 'n' | 't' | 'r'))) => {
                        chars.next();
                        value.push(match escape {
                            'n' => '\n',
                            't' => '\t',
                            'r' => '\r',
                            other => other,
                        });
                    }
                    _ => {
                        let at = start + i;
                        self.diagnostics.push(
                            Diagnostic::invalid("unknown escape in a quoted text")
                                .code("W001")
                                .at(self.span(at, at + 1), "")
                                .help("known escapes are `\\\"`, `\\\\`, `\\n`, `\\t`, `\\r`"),
                        );
                        value.push('\\');
                    }
                },
                c => value.push(c),
            }
        }
        let line = self.rest().lines().next().unwrap_or_default().len();
        let end = start + line.max(1);
        self.diagnostics.push(
            Diagnostic::invalid("this quoted text never ends")
                .code("W001")
                .at(self.span(start, end), "opened here")
                .help("close it with `\"` on the same line"),
        );
        self.push(Tok::Text(value), end);
    }

    fn unknown(&mut self, c: char) {
        // A run of strange characters is one finding.
        let known = |c: char| {
            c.is_ascii_whitespace()
                || c == '#'
                || c == '"'
                || is_word(c)
                || SIGNS.iter().any(|sign| sign.starts_with(c))
        };
        let rest = self.rest();
        let length = rest.find(known).unwrap_or(rest.len()).max(c.len_utf8());
        let end = self.at + length;
        let run = rest.get(..length).unwrap_or_default();
        let message = if run.chars().nth(1).is_none() {
            format!("unexpected character {c:?}")
        } else {
            let shown: String = run.chars().take(12).collect();
            format!("unexpected characters {shown:?}")
        };
        let mut diagnostic = Diagnostic::invalid(message)
            .code("W001")
            .at(self.span(self.at, end), "");
        if matches!(c, '\'' | '“' | '”' | '„' | '‘' | '’') {
            diagnostic = diagnostic.help("texts are quoted with `\"`");
        }
        self.diagnostics.push(diagnostic);
        self.at = end;
    }
}

/// The length of the longest unsigned number at the start of `text`, which begins with a digit.
fn number_length(text: &str) -> usize {
    let bytes = text.as_bytes();
    let digit_at = |i: usize| bytes.get(i).is_some_and(u8::is_ascii_digit);
    let digits_from = |mut i: usize| {
        while digit_at(i) || (bytes.get(i) == Some(&b'_') && digit_at(i + 1)) {
            i += 1;
        }
        i
    };
    let mut end = digits_from(0);
    if bytes.get(end) == Some(&b'.') && digit_at(end + 1) {
        end = digits_from(end + 1);
    }
    if matches!(bytes.get(end), Some(b'e' | b'E')) {
        let signed = usize::from(matches!(bytes.get(end + 1), Some(b'+' | b'-')));
        if digit_at(end + 1 + signed) {
            end = digits_from(end + 1 + signed);
        }
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(text: &str) -> Vec<String> {
        let (tokens, diagnostics) = lex(text, SourceId(0));
        assert_eq!(diagnostics, []);
        tokens
            .iter()
            .map(|token| format!("{:?} {}", token.tok, &text[token.start..token.end]))
            .collect()
    }

    #[test]
    fn numbers_words_and_units() {
        let text = "1f1b 72GiB 450GB/s 3..8 1e-3 2F0 1_000 zb-h1 x:=4";
        insta::assert_snapshot!(kinds(text).join("\n"), @r#"
        Word 1f1b
        Number 72
        Word GiB
        Number 450
        Word GB
        Sign("/") /
        Word s
        Number 3
        Sign("..") ..
        Number 8
        Number 1e-3
        Word 2F0
        Number 1_000
        Word zb
        Sign("-") -
        Word h1
        Word x
        Sign(":=") :=
        Number 4
        End 
        "#);
    }

    proptest::proptest! {
        #[test]
        fn tokens_advance(text in "\\PC{0,40}|[a-z0-9.\"#\\\\\r\n é-]{0,40}") {
            let (tokens, _) = lex(&text, SourceId(0));
            let mut last = 0;
            for token in &tokens {
                proptest::prop_assert!(token.start >= last && token.end >= token.start);
                proptest::prop_assert!(text.get(token.start..token.end).is_some());
                last = token.end;
            }
            proptest::prop_assert_eq!(last, text.len());
        }
    }
}
