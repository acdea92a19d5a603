//! Attributes as text: a compact form of the values that serde makes of ops and initial values.
//!
//! Invariant: `read(write(v)) = v` for values of words, finite numbers, lists and maps with such.

use serde_json::{Map, Number, Value};

use super::parser::{Cursor, Fault};

/// No op has attributes nested deeper than a few levels; the limit keeps malformed text off the stack.
const MAX_DEPTH: usize = 16;

/// Whether a text needs no quotes as a word (a dim, an axis, a keyword).
pub(super) fn is_word(text: &str) -> bool {
    let mut chars = text.chars();
    chars
        .next()
        .is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && chars.all(is_word_char)
        && !matches!(text, "true" | "false" | "null")
}

fn is_word_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '+')
}

/// Whether a text needs no quotes as the name of a tensor.
pub(super) fn is_name(text: &str) -> bool {
    text.chars().next().is_some_and(is_word_char) && text.chars().all(is_name_char)
}

pub(super) fn is_name_char(c: char) -> bool {
    is_word_char(c) || matches!(c, '[' | ']')
}

/// A word, in quotes when it needs them.
pub(super) fn word(text: &str) -> String {
    if is_word(text) {
        text.into()
    } else {
        quoted(text)
    }
}

/// The name of a tensor, in quotes when it needs them.
pub(super) fn name(text: &str) -> String {
    if is_name(text) {
        text.into()
    } else {
        quoted(text)
    }
}

pub(super) fn quoted(text: &str) -> String {
    Value::String(text.into()).to_string()
}

/// A value that serde made of an enum: `tag` alone, `tag{key: value, …}`, or `tag{value}` for a single value.
pub(super) fn write_tagged(value: &Value) -> String {
    match value {
        Value::String(tag) => word(tag),
        Value::Object(map) => match map.iter().next() {
            Some((tag, Value::Object(fields))) => format!("{}{}", word(tag), write_map(fields)),
            Some((tag, other)) => format!("{}{{{}}}", word(tag), write(other)),
            None => String::new(),
        },
        other => write(other),
    }
}

pub(super) fn write(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => write_number(number),
        Value::String(text) => word(text),
        Value::Array(items) => match items.as_slice() {
            [Value::String(dim), Value::Number(size)] if size.is_u64() => {
                format!("{}:{size}", word(dim))
            }
            items => {
                let items: Vec<String> = items.iter().map(write).collect();
                format!("[{}]", items.join(", "))
            }
        },
        Value::Object(map) => write_map(map),
    }
}

fn write_map(map: &Map<String, Value>) -> String {
    let fields: Vec<String> = map
        .iter()
        .map(|(key, value)| format!("{}: {}", word(key), write(value)))
        .collect();
    format!("{{{}}}", fields.join(", "))
}

fn write_number(number: &Number) -> String {
    match number.as_f64() {
        Some(float) if number.is_f64() => {
            // The shortest digits that give the same number back.
            let text = format!("{float:?}");
            match text.strip_suffix(".0") {
                Some(whole) if whole != "-0" => whole.into(),
                _ => text,
            }
        }
        _ => number.to_string(),
    }
}

impl Cursor<'_> {
    /// A value of an attribute.
    fn value(&mut self, depth: usize) -> Result<Value, Fault> {
        self.skip_spaces();
        if depth > MAX_DEPTH {
            let message = format!("attributes are nested deeper than {MAX_DEPTH}");
            return Err(self.fault(self.at(), message));
        }
        match self.peek() {
            Some('[') => {
                self.bump();
                let mut items = Vec::new();
                while !self.eat(']') {
                    items.push(self.value(depth + 1)?);
                    self.skip_spaces();
                    if self.peek() != Some(']') {
                        self.expect(',')?;
                    }
                }
                Ok(Value::Array(items))
            }
            Some('{') => Ok(Value::Object(self.map(depth + 1)?)),
            Some('-' | '0'..='9') => self.number().map(Value::Number),
            _ => {
                let is_quoted = self.peek() == Some('"');
                let text = self.word("a value")?;
                if self.eat(':') {
                    self.skip_spaces();
                    let size = self.number()?;
                    return Ok(Value::Array(vec![text.into(), Value::Number(size)]));
                }
                Ok(match text.as_str() {
                    "true" if !is_quoted => Value::Bool(true),
                    "false" if !is_quoted => Value::Bool(false),
                    "null" if !is_quoted => Value::Null,
                    _ => Value::String(text),
                })
            }
        }
    }

    /// `{key: value, …}`.
    fn map(&mut self, depth: usize) -> Result<Map<String, Value>, Fault> {
        self.expect('{')?;
        let mut map = Map::new();
        while !self.eat('}') {
            self.skip_spaces();
            let start = self.at();
            let key = self.word("an attribute")?;
            self.expect(':')?;
            let value = self.value(depth)?;
            if map.insert(key.clone(), value).is_some() {
                return Err(self.fault(start, format!("attribute `{key}` is given twice")));
            }
            self.skip_spaces();
            if self.peek() != Some('}') {
                self.expect(',')?;
            }
        }
        Ok(map)
    }

    /// What stands behind a tag: nothing, `{key: value, …}` or `{value}`.
    pub(super) fn tagged_content(&mut self) -> Result<Option<Value>, Fault> {
        if self.peek() != Some('{') {
            return Ok(None);
        }
        let start = *self;
        if let Ok(map) = self.map(0) {
            return Ok(Some(Value::Object(map)));
        }
        let after_map = *self;
        *self = start;
        self.bump();
        match self
            .value(0)
            .and_then(|value| self.expect('}').map(|()| value))
        {
            // `dim:8` is a pair only inside lists; alone in braces it is a map gone wrong.
            Ok(value) if !value.is_array() => Ok(Some(value)),
            _ => {
                *self = start;
                let fault = self.map(0).err();
                *self = after_map;
                Err(fault.unwrap_or_else(|| self.fault(self.at(), "malformed attributes".into())))
            }
        }
    }

    fn number(&mut self) -> Result<Number, Fault> {
        let start = self.at();
        let text = self.take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '.'));
        let integer = if text == "-0" {
            None
        } else {
            let unsigned = text.parse::<u64>().ok().map(Number::from);
            unsigned.or_else(|| text.parse::<i64>().ok().map(Number::from))
        };
        integer
            .or_else(|| text.parse::<f64>().ok().and_then(Number::from_f64))
            .ok_or_else(|| self.fault(start, format!("`{text}` is not a number")))
    }
}
