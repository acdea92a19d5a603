//! Selectors and targets.

use super::{Parse, Parser};
use crate::weave::ast::{
    Index, IndexItem, Name, Pattern, Segment, Selector, Spanned, Target, TensorClass,
};
use crate::weave::lexer::Tok;

impl<'a> Parser<'a> {
    /// `layers[3..8].attn.wq`, `*.router`, `.wq`, `*`.
    pub(in crate::weave) fn selector(&mut self) -> Parse<Selector> {
        let is_floating = self.eat(".");
        let starts = matches!(self.peek(), Tok::Word | Tok::Sign("*"));
        if !is_floating && !starts {
            return Err(self.unexpected("a selector, such as `layers[*].attn.wq`"));
        }
        let mut segments = vec![self.segment()?];
        while self.eat(".") {
            // `core.1`: a further result of an op.
            if let Some(numbers) = self.number_segments() {
                segments.extend(numbers);
                continue;
            }
            segments.push(self.segment()?);
        }
        Ok(Selector {
            is_floating,
            segments,
        })
    }

    /// The number here as segments: `1`, or `1.0`, which is one token.
    fn number_segments(&mut self) -> Option<Vec<Segment>> {
        let text = self.here();
        let is_digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        let parts: Vec<&str> = text.split('.').collect();
        if *self.peek() != Tok::Number || !parts.iter().all(|part| is_digits(part)) {
            return None;
        }
        // `0*`, `0-1` and `0[2]` are patterns, which do not begin with a number.
        let (number, next) = (self.token(0), self.token(1));
        let joins = matches!(next.tok, Tok::Word | Tok::Sign("*" | "-" | "["));
        if joins && number.end == next.start {
            return None;
        }
        self.advance();
        let segment = |part: &&str| Segment::Named {
            name: Pattern::trusted(part),
            index: None,
        };
        Some(parts.iter().map(segment).collect())
    }

    fn segment(&mut self) -> Parse<Segment> {
        if self.is_sign("*") && !self.next_continues_pattern() {
            self.advance();
            if self.is_sign("[") && self.is_adjacent() {
                let span = self.span();
                let message = "`*` takes no index; it stands for whole segments";
                return Err(self.fail("W002", message, span));
            }
            return Ok(Segment::Any);
        }
        let name = self.pattern()?;
        // `x : [a]` has a blank, `x[0]` has none.
        let index = if self.is_sign("[") && self.is_adjacent() {
            Some(self.index()?)
        } else {
            None
        };
        Ok(Segment::Named { name, index })
    }

    /// Whether the `*` here goes on as in `*_norm`.
    fn next_continues_pattern(&self) -> bool {
        let (star, next) = (self.token(0), self.token(1));
        let joins = matches!(next.tok, Tok::Word | Tok::Number | Tok::Sign("*" | "-"));
        joins && star.end == next.start
    }

    fn index(&mut self) -> Parse<Index> {
        self.expect("[")?;
        if self.eat("*") {
            self.expect("]")?;
            return Ok(Index::All);
        }
        let items = self.comma_list(Self::index_item)?;
        if !self.eat("]") {
            return Err(self.unexpected("`,` or `]`"));
        }
        Ok(Index::Of(items))
    }

    /// `[3,5..8]`
    pub(super) fn index_items(&mut self) -> Parse<Vec<IndexItem>> {
        self.expect("[")?;
        let items = self.comma_list(Self::index_item)?;
        if !self.eat("]") {
            return Err(self.unexpected("`,` or `]`"));
        }
        Ok(items)
    }

    fn index_item(&mut self) -> Parse<IndexItem> {
        let begin = self.span();
        if self.eat("..") {
            let end = self.count("the end of the range")?;
            return Ok(IndexItem::Range {
                start: 0,
                end: Some(end),
            });
        }
        let start = self.count("an index, a range such as `3..8`, or `*`")?;
        if !self.eat("..") {
            return Ok(IndexItem::At(start));
        }
        if *self.peek() != Tok::Number {
            return Ok(IndexItem::Range { start, end: None });
        }
        let end = self.count("the end of the range")?;
        if end <= start {
            let span = begin.to(self.last_span());
            let message = format!("the range {start}..{end} is empty; its end is exclusive");
            return Err(self.fail("W005", message, span));
        }
        Ok(IndexItem::Range {
            start,
            end: Some(end),
        })
    }

    pub(super) fn selectors(&mut self) -> Parse<Vec<Spanned<Selector>>> {
        self.comma_list(|p| p.spanned(Self::selector))
    }

    /// `[except SELECTORS]`
    pub(super) fn except(&mut self) -> Parse<Vec<Spanned<Selector>>> {
        if self.eat_word("except") {
            self.selectors()
        } else {
            Ok(Vec::new())
        }
    }

    /// `SELECTOR.key`, as the selector and the key.
    pub(in crate::weave) fn keyed_selector(&mut self) -> Parse<(Spanned<Selector>, Spanned<Name>)> {
        let mut selector = self.spanned(Self::selector)?;
        let last = selector.node.segments.pop();
        let key = match &last {
            Some(Segment::Named { name, index: None }) if !name.as_str().contains('*') => {
                Name::trusted(name.as_str())
            }
            _ => {
                let message = "a preference names a property: write `SELECTOR.property`";
                return Err(self.fail("W002", message, selector.span));
            }
        };
        if selector.node.segments.is_empty() {
            let message = format!("of what is `{key}` the property? write `*.{key}` for all");
            return Err(self.fail("W002", message, selector.span));
        }
        let span = self.last_span();
        Ok((selector, Spanned::new(key, span)))
    }

    /// A class of tensors, or a selector.
    pub(in crate::weave) fn target(&mut self) -> Parse<Target> {
        let class = TensorClass::ALL
            .into_iter()
            .find(|class| self.is_word(class.text()));
        let is_path = matches!(self.token(1).tok, Tok::Sign("." | "[" | "*" | "-"))
            && self.token(0).end == self.token(1).start;
        match class {
            Some(class) if !is_path => {
                self.advance();
                Ok(Target::Class(class))
            }
            _ => self.selector().map(Target::Selector),
        }
    }

    /// `override`, which ends a statement.
    pub(super) fn overrides(&mut self) -> bool {
        self.eat_word("override")
    }
}
