//! Names and name patterns.
//!
//! Invariant: a [`Name`] or [`Pattern`] lexes back to itself, because the constructors ask the
//! lexer; it is never the reserved word `auto`.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::diagnostics::Diagnostic;
use crate::weave::parser;

/// A name: letters, digits, `_`, and `-` between them, such as `main`, `zb-h1`, `1f1b`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// Checks the spelling.
    ///
    /// # Errors
    /// A diagnostic when `text` is no name, or is the reserved word `auto`.
    pub fn new(text: &str) -> Result<Self, Box<Diagnostic>> {
        parser::whole(text, parser::Parser::name)
    }

    /// A literal of this program that is known to be one.
    pub fn literal(text: &'static str) -> Self {
        debug_assert!(Self::new(text).is_ok(), "{text}");
        Self::trusted(text)
    }

    /// For the parser only: `text` was just read as a name.
    pub(in crate::weave) fn trusted(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// One segment of a selector: a name in which `*` stands for any characters, such as `w*`.
/// Never `*` alone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern(String);

impl Pattern {
    /// Checks the spelling.
    ///
    /// # Errors
    /// A diagnostic when `text` is no pattern.
    pub fn new(text: &str) -> Result<Self, Box<Diagnostic>> {
        // Behind a dot, as in `core.1`, a number is a name too.
        if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
            return Ok(Self(text.to_owned()));
        }
        parser::whole(text, parser::Parser::pattern)
    }

    /// A literal of this program that is known to be one.
    pub fn literal(text: &'static str) -> Self {
        debug_assert!(Self::new(text).is_ok(), "{text}");
        Self::trusted(text)
    }

    /// For the parser only: `text` was just read as a pattern.
    pub(in crate::weave) fn trusted(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it matches the whole of `name`. O(|pattern| · |name|).
    pub fn matches(&self, name: &str) -> bool {
        let pattern: Vec<char> = self.0.chars().collect();
        let name: Vec<char> = name.chars().collect();
        let (mut p, mut n) = (0, 0);
        // Where to return to when a literal fails: after the last star, one character on.
        let mut retry: Option<(usize, usize)> = None;
        while n < name.len() {
            if pattern.get(p) == Some(&'*') {
                retry = Some((p + 1, n));
                p += 1;
            } else if pattern.get(p) == name.get(n) {
                p += 1;
                n += 1;
            } else if let Some((after_star, from)) = retry {
                p = after_star;
                n = from + 1;
                retry = Some((after_star, n));
            } else {
                return false;
            }
        }
        pattern.iter().skip(p).all(|&c| c == '*')
    }
}

macro_rules! text_like {
    ($($type:ident)*) => {$(
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.0
            }
        }

        impl TryFrom<String> for $type {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                Self::new(&text).map_err(|diagnostic| diagnostic.message)
            }
        }

        impl PartialEq<str> for $type {
            fn eq(&self, other: &str) -> bool {
                self.0 == other
            }
        }

        impl PartialEq<&str> for $type {
            fn eq(&self, other: &&str) -> bool {
                self.0 == *other
            }
        }
    )*};
}

text_like! { Name Pattern }
