//! Names, numbers, quantities, choices and settings.

use super::{Parse, Parser};
use crate::diagnostics::{Diagnostic, did_you_mean};
use crate::units::{Measure, Number, Quantity, Unit};
use crate::weave::ast::{
    Arg, AxisRef, Choice, Name, Pattern, Reference, Setting, SettingLine, Spanned, Value,
};
use crate::weave::lexer::Tok;

impl<'a> Parser<'a> {
    /// A name, `-` between its parts included.
    pub(in crate::weave) fn name(&mut self) -> Parse<Name> {
        self.name_as("a name")
    }

    pub(super) fn name_as(&mut self, what: &str) -> Parse<Name> {
        if self.is_word("auto") {
            let span = self.span();
            let message = format!("expected {what}, found `auto`");
            return Err(self.fail("W002", message, span));
        }
        if *self.peek() != Tok::Word {
            return Err(self.unexpected(what));
        }
        let start = self.token(0).start;
        self.advance();
        while self.is_sign("-") && self.is_adjacent() && self.next_joins(false) {
            self.advance();
            self.advance();
        }
        Ok(Name::trusted(self.text_from(start)))
    }

    /// A name in which `*` stands for any characters.
    pub(in crate::weave) fn pattern(&mut self) -> Parse<Pattern> {
        if self.is_word("auto") || !(*self.peek() == Tok::Word || self.is_sign("*")) {
            return Err(self.unexpected("a name or `*`"));
        }
        let start = self.token(0).start;
        self.advance();
        while self.is_adjacent() {
            let joins = match self.peek() {
                Tok::Word | Tok::Number | Tok::Sign("*") => true,
                Tok::Sign("-") => self.next_joins(true),
                _ => false,
            };
            if !joins {
                break;
            }
            self.advance();
        }
        let text = self.text_from(start);
        if text.chars().all(|c| c == '*') {
            let span = self.last_span();
            return Err(self.fail("W002", "`*` alone is no pattern of a name", span));
        }
        Ok(Pattern::trusted(text))
    }

    /// Whether the token behind the `-` that is here goes on with the same name.
    fn next_joins(&self, star_joins: bool) -> bool {
        let (dash, next) = (self.token(0), self.token(1));
        let text = self.text.get(next.start..next.end).unwrap_or_default();
        let joins = match next.tok {
            Tok::Word => true,
            Tok::Number => text.chars().all(|c| c.is_ascii_digit() || c == '_'),
            Tok::Sign("*") => star_joins,
            _ => false,
        };
        joins && dash.end == next.start
    }

    /// The text from byte `start` to the end of the token just read.
    pub(super) fn text_from(&self, start: usize) -> &'a str {
        self.text
            .get(start..self.last_span().end)
            .unwrap_or_default()
    }

    /// A quoted text.
    pub(super) fn text_value(&mut self, what: &str) -> Parse<String> {
        match self.peek() {
            Tok::Text(value) => {
                let value = value.clone();
                self.advance();
                Ok(value)
            }
            _ => Err(self.unexpected(what)),
        }
    }

    /// A quoted text or a name.
    pub(super) fn reference(&mut self, what: &str) -> Parse<Reference> {
        if let Tok::Text(_) = self.peek() {
            return self.text_value(what).map(Reference::Text);
        }
        self.name_as(what).map(Reference::Name)
    }

    /// `tp` or `main.tp`.
    pub(in crate::weave) fn axis_ref(&mut self) -> Parse<AxisRef> {
        let first = self.name_as("an axis, such as `tp` or `main.tp`")?;
        if !self.eat(".") {
            return Ok(AxisRef {
                mesh: None,
                axis: first,
            });
        }
        let axis = self.name_as("the name of an axis")?;
        Ok(AxisRef {
            mesh: Some(first),
            axis,
        })
    }

    /// A number, possibly negative.
    pub(super) fn number(&mut self, what: &str) -> Parse<Number> {
        let start = self.span();
        let negative = self.eat("-");
        if *self.peek() != Tok::Number {
            return Err(self.unexpected(what));
        }
        let sign = if negative { "-" } else { "" };
        let text = format!("{sign}{}", self.here());
        self.advance();
        match Number::parse(&text) {
            Some(number) => Ok(number),
            None => {
                let span = start.to(self.last_span());
                Err(self.fail("W005", format!("the number {text} is too large"), span))
            }
        }
    }

    /// A nonnegative integer.
    pub(super) fn count(&mut self, what: &str) -> Parse<u64> {
        let start = self.span();
        let number = self.number(what)?;
        number.as_u64().ok_or_else(|| {
            let span = start.to(self.last_span());
            let message = format!("expected {what}, found {number}");
            self.fail("W005", message, span)
        })
    }

    /// A positive integer.
    pub(super) fn positive(&mut self, what: &str) -> Parse<u64> {
        let start = self.span();
        let count = self.count(what)?;
        if count == 0 {
            let span = start.to(self.last_span());
            let message = format!("expected {what}, found 0; the least is 1");
            return Err(self.fail("W005", message, span));
        }
        Ok(count)
    }

    /// The unit here, if there is one.
    fn unit(&mut self) -> Option<Unit> {
        if self.eat("%") {
            return Some(Unit::Percent);
        }
        if *self.peek() != Tok::Word {
            return None;
        }
        let (slash, second) = (self.token(1), self.token(2));
        let second_text = self.text.get(second.start..second.end).unwrap_or_default();
        if slash.tok == Tok::Sign("/") && second.tok == Tok::Word {
            let text = format!("{}/{second_text}", self.here());
            // `TFLOP/s` is another spelling of `TFLOPS`.
            let flops = text.strip_suffix("FLOP/s").map(|k| format!("{k}FLOPS"));
            if let Some(unit) = Unit::lookup(flops.as_deref().unwrap_or(&text)) {
                self.advance();
                self.advance();
                self.advance();
                return Some(unit);
            }
        }
        let unit = Unit::lookup(self.here())?;
        self.advance();
        Some(unit)
    }

    /// A number with a unit of `measure`.
    pub(super) fn quantity(&mut self, measure: Measure) -> Parse<Quantity> {
        let start = self.span();
        let example = measure.example();
        let value = self.number(&format!("{measure} such as `{example}`"))?;
        let Some(unit) = self.unit() else {
            let known = Unit::ALL.iter().filter(|unit| unit.measure() == measure);
            let near = match self.peek() {
                Tok::Word => did_you_mean(self.here(), known.map(|unit| unit.text())),
                _ => None,
            };
            let diagnostic = self
                .unexpected_diagnostic(&format!("a unit behind {value}"))
                .help(near.unwrap_or_else(|| format!("write {measure}, as in `{example}`")));
            return Err(self.report(diagnostic));
        };
        let quantity = Quantity { value, unit };
        let span = start.to(self.last_span());
        if let Err(error) = quantity.base(measure) {
            return Err(self.fail("W005", error.to_string(), span));
        }
        if value.as_f64() < 0.0 {
            let message = format!("{measure} cannot be negative, found {quantity}");
            return Err(self.fail("W005", message, span));
        }
        if measure == Measure::Bytes
            && let Err(error) = quantity.bytes()
        {
            return Err(self.fail("W005", error.to_string(), span));
        }
        Ok(quantity)
    }

    /// A value, or `auto`, `auto{a,b}`, each with `:= witness`.
    pub(in crate::weave) fn choice<T: PartialEq>(
        &mut self,
        mut item: impl FnMut(&mut Self) -> Parse<T>,
    ) -> Parse<Choice<T>> {
        if !self.eat_word("auto") {
            let value = item(self)?;
            if self.is_sign(":=") {
                let span = self.span();
                let diagnostic = Diagnostic::invalid("a fixed value has no witness")
                    .code("W002")
                    .at(span, "")
                    .help("write `auto := …` to leave the value to the planner");
                return Err(self.report(diagnostic));
            }
            return Ok(Choice::Fixed(value));
        }
        let mut among = Vec::new();
        let mut listed = "";
        if self.is_sign("{") {
            let opened = self.span();
            self.advance();
            if self.is_sign("}") {
                let message = "`auto{}` leaves no choice; write `auto` or name the choices";
                return Err(self.fail("W002", message, opened.to(self.span())));
            }
            among = self.comma_list(&mut item)?;
            self.close("}", opened)?;
            listed = self.text_from(opened.start);
        }
        let mut witness = None;
        if self.eat(":=") {
            let value = self.spanned(&mut item)?;
            if !among.is_empty() && !among.contains(&value.node) {
                let written = self.text_from(value.span.start);
                let message =
                    format!("the witness `{written}` is not among the choices `{listed}`");
                return Err(self.fail("W005", message, value.span));
            }
            witness = Some(value.node);
        }
        Ok(Choice::Auto { among, witness })
    }

    /// The value of a setting.
    fn value(&mut self) -> Parse<Value> {
        match self.peek() {
            Tok::Text(_) => self.text_value("a value").map(Value::Text),
            Tok::Word => self.name_as("a value").map(Value::Word),
            _ => {
                let value = self.number("a value")?;
                Ok(match self.unit() {
                    Some(unit) => Value::Quantity(Quantity { value, unit }),
                    None => Value::Number(value),
                })
            }
        }
    }

    /// A value behind the first one of a setting: a word there would be the next key.
    fn further_value(&mut self) -> Parse<Value> {
        if *self.peek() == Tok::Word {
            return Err(self.unexpected("a number or a quoted text"));
        }
        self.value()
    }

    /// A key, its value, and further values that are not words.
    pub(super) fn setting(&mut self) -> Parse<Setting> {
        let start = self.span();
        let key = self.name_as("the name of a setting")?;
        if Unit::lookup(key.as_str()).is_some() {
            let message = format!("`{key}` is a unit; it cannot name a setting");
            return Err(self.fail("W005", message, start));
        }
        if self.at_end_of_statement() {
            let mut diagnostic = self.unexpected_diagnostic(&format!("the value of `{key}`"));
            let units = Unit::ALL.iter().map(|unit| unit.text());
            if *self.token_before(start.start) == Tok::Number {
                diagnostic = diagnostic.maybe_help(did_you_mean(key.as_str(), units));
            }
            return Err(self.report(diagnostic));
        }
        let mut values = vec![self.spanned(|p| p.choice(Self::value))?];
        while matches!(self.peek(), Tok::Number | Tok::Text(_) | Tok::Sign("-"))
            || self.is_word("auto")
        {
            values.push(self.spanned(|p| p.choice(Self::further_value))?);
        }
        Ok(Setting { key, values })
    }

    /// The token that ends at or before byte `start`.
    fn token_before(&self, start: usize) -> &Tok {
        let before = self.tokens.iter().rev().find(|token| token.end <= start);
        before.map_or(&Tok::End, |token| &token.tok)
    }

    /// Settings up to the end of the line, at least one.
    pub(super) fn settings(&mut self) -> Parse<Vec<Spanned<Setting>>> {
        let mut settings = vec![self.spanned(Self::setting)?];
        while !self.at_end_of_statement() {
            settings.push(self.spanned(Self::setting)?);
        }
        Ok(settings)
    }

    pub(super) fn setting_line(&mut self) -> Parse<SettingLine> {
        let settings = self.settings()?;
        Ok(SettingLine { settings })
    }

    /// An argument of a tactic.
    pub(in crate::weave) fn arg(&mut self) -> Parse<Arg> {
        match self.peek() {
            Tok::Text(_) => self.text_value("an argument").map(Arg::Text),
            Tok::Word => self.axis_ref().map(Arg::Axis),
            _ => self.number("an argument").map(Arg::Number),
        }
    }
}
