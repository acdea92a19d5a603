//! The pieces that a plan is built from, and the builders of blocks.
//!
//! Invariant: a piece that does not parse is recorded as a problem, never dropped in silence.

use super::super::ast::{
    Apply, Axis, Choice, Degree, Forbid, Keep, Name, Pin, Place, Prefer, Reference, Selector,
    Setting, Spanned, Value,
};
use super::super::parser::{Parse, Parser, whole};
use crate::diagnostics::{Diagnostic, Span};
use crate::units::{Number, Quantity};

/// What was wrong so far.
#[derive(Debug, Clone, Default)]
pub(super) struct Problems(pub Vec<Diagnostic>);

impl Problems {
    pub(super) fn add(&mut self, message: impl Into<String>) {
        self.0.push(Diagnostic::invalid(message));
    }

    /// Reads all of `text` by one of the parser's rules.
    pub(super) fn read<T>(
        &mut self,
        text: &str,
        rule: impl for<'a> FnOnce(&mut Parser<'a>) -> Parse<T>,
    ) -> Option<T> {
        match whole(text, rule) {
            Ok(value) => Some(value),
            Err(found) => {
                // The place lies in `text`, which no source map knows: name the text instead.
                let mut diagnostic = Diagnostic::invalid(format!("in `{text}`: {}", found.message));
                diagnostic.help = found.help;
                self.0.push(diagnostic);
                None
            }
        }
    }

    pub(super) fn read_choice<T>(
        &mut self,
        choice: Choice<&str>,
        rule: impl for<'a> Fn(&mut Parser<'a>) -> Parse<T> + Copy,
    ) -> Option<Choice<T>> {
        Some(match choice {
            Choice::Fixed(text) => Choice::Fixed(self.read(text, rule)?),
            Choice::Auto { among, witness } => {
                let n_choices = among.len();
                let among: Vec<T> = among
                    .into_iter()
                    .filter_map(|text| self.read(text, rule))
                    .collect();
                let witness = match witness {
                    Some(text) => Some(self.read(text, rule)?),
                    None => None,
                };
                if among.len() < n_choices {
                    return None;
                }
                Choice::Auto { among, witness }
            }
        })
    }
}

/// `auto`
pub fn auto<T>() -> Choice<T> {
    Choice::auto()
}

/// `auto{…}`
pub fn auto_of<T>(among: impl IntoIterator<Item = T>) -> Choice<T> {
    Choice::auto_of(among)
}

/// `auto := witness`
pub fn solved<T>(witness: T) -> Choice<T> {
    Choice::auto().witnessed(witness)
}

/// A name, where a text would be a path or a quoted text.
///
/// # Errors
/// A diagnostic when `text` is no name.
pub fn name(text: &str) -> Result<Name, Box<Diagnostic>> {
    Name::new(text)
}

impl From<&str> for Reference {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<Name> for Reference {
    fn from(name: Name) -> Self {
        Self::Name(name)
    }
}

/// What can be the values of a setting: numbers, quantities, names, texts, lists of these.
pub trait IntoValue {
    /// The values, at least one.
    fn into_values(self) -> Vec<Choice<Value>>;
}

macro_rules! into_value {
    ($($type:ty, $value:ident => $make:expr;)*) => {$(
        impl IntoValue for $type {
            fn into_values(self) -> Vec<Choice<Value>> {
                let $value = self;
                vec![Choice::Fixed($make)]
            }
        }
    )*};
}

into_value! {
    i32, value => Value::Number(Number::Int(i64::from(value)));
    i64, value => Value::Number(Number::Int(value));
    f64, value => Value::Number(Number::Float(value));
    u64, value => match i64::try_from(value) {
        Ok(value) => Value::Number(Number::Int(value)),
        Err(_) => Value::Number(Number::Float(value as f64)),
    };
    Quantity, value => Value::Quantity(value);
    &str, value => Value::Text(value.to_owned());
    Name, value => Value::Word(value);
    bool, value => Value::Word(Name::trusted(if value { "true" } else { "false" }));
    Value, value => value;
}

impl IntoValue for Choice<Value> {
    fn into_values(self) -> Vec<Choice<Value>> {
        vec![self]
    }
}

impl<T: IntoValue, const N: usize> IntoValue for [T; N] {
    fn into_values(self) -> Vec<Choice<Value>> {
        self.into_iter().flat_map(T::into_values).collect()
    }
}

impl<A: IntoValue, B: IntoValue> IntoValue for (A, B) {
    fn into_values(self) -> Vec<Choice<Value>> {
        let mut values = self.0.into_values();
        values.extend(self.1.into_values());
        values
    }
}

impl<A: IntoValue, B: IntoValue, C: IntoValue> IntoValue for (A, B, C) {
    fn into_values(self) -> Vec<Choice<Value>> {
        let mut values = (self.0, self.1).into_values();
        values.extend(self.2.into_values());
        values
    }
}

/// A setting, if its key is a name and it has values.
pub(super) fn setting(
    key: &str,
    values: impl IntoValue,
    problems: &mut Problems,
) -> Option<Setting> {
    let values: Vec<_> = values
        .into_values()
        .into_iter()
        .map(Spanned::from)
        .collect();
    if values.is_empty() {
        problems.add(format!("setting `{key}` has no value"));
        return None;
    }
    let key = problems.read(key, |p| p.name())?;
    Some(Setting { key, values })
}

/// One axis of a mesh; its degree is `auto` until said otherwise.
#[derive(Debug, Clone)]
pub struct AxisBuilder {
    name: String,
    degree: Degree,
    within: Option<String>,
}

/// An axis of that name.
pub fn axis(name: &str) -> AxisBuilder {
    AxisBuilder {
        name: name.to_owned(),
        degree: Degree::Is(Choice::auto()),
        within: None,
    }
}

impl AxisBuilder {
    /// A fixed degree.
    #[must_use]
    pub fn degree(mut self, degree: u64) -> Self {
        self.degree = Degree::Is(Choice::Fixed(degree));
        self
    }

    /// `auto`
    #[must_use]
    pub fn auto(mut self) -> Self {
        self.degree = Degree::Is(Choice::auto());
        self
    }

    /// `auto{…}`
    #[must_use]
    pub fn auto_of(mut self, among: impl IntoIterator<Item = u64>) -> Self {
        self.degree = Degree::Is(Choice::auto_of(among));
        self
    }

    /// `rest`
    #[must_use]
    pub fn rest(mut self) -> Self {
        self.degree = Degree::Rest { witness: None };
        self
    }

    /// `same`
    #[must_use]
    pub fn same(mut self) -> Self {
        self.degree = Degree::Same { witness: None };
        self
    }

    /// `:= degree`; a fixed degree stays as it is.
    #[must_use]
    pub fn witness(mut self, degree: u64) -> Self {
        self.degree = match self.degree {
            Degree::Is(choice) => Degree::Is(choice.witnessed(degree)),
            Degree::Rest { .. } => Degree::Rest {
                witness: Some(degree),
            },
            Degree::Same { .. } => Degree::Same {
                witness: Some(degree),
            },
        };
        self
    }

    /// `within LEVEL`
    #[must_use]
    pub fn within(mut self, level: &str) -> Self {
        self.within = Some(level.to_owned());
        self
    }

    /// `within node`
    #[must_use]
    pub fn within_node(self) -> Self {
        self.within("node")
    }

    pub(super) fn finish(self, problems: &mut Problems) -> Option<Axis> {
        let within = match self.within {
            Some(level) => Some(problems.read(&level, |p| p.name())?),
            None => None,
        };
        Some(Axis {
            name: problems.read(&self.name, |p| p.name())?,
            degree: self.degree,
            within,
        })
    }
}

pub(super) fn apply<'a>(
    tactic: &str,
    args: impl IntoIterator<Item = &'a str>,
    except: impl IntoIterator<Item = &'a str>,
    problems: &mut Problems,
) -> Option<Apply> {
    let args = args
        .into_iter()
        .filter_map(|arg| problems.read(arg, |p| p.choice(|p| p.arg())))
        .map(Spanned::from)
        .collect();
    Some(Apply {
        tactic: problems.read(tactic, |p| p.name())?.into(),
        args,
        except: selectors(except, problems),
    })
}

pub(super) fn pin(on: &str, layout: Choice<&str>, problems: &mut Problems) -> Option<Pin> {
    let layout = problems.read_choice(layout, |p| p.layout());
    Some(Pin {
        on: problems.read(on, |p| p.selector())?.into(),
        layout: layout?.into(),
        overrides: false,
    })
}

pub(super) fn forbid(on: &str, layout: &str, problems: &mut Problems) -> Option<Forbid> {
    let layout = problems.read(layout, |p| p.layout());
    Some(Forbid {
        on: problems.read(on, |p| p.selector())?.into(),
        layout: layout?.into(),
        overrides: false,
    })
}

pub(super) fn place(on: &str, factors: &str, problems: &mut Problems) -> Option<Place> {
    let factors = problems.read(factors, |p| p.layout());
    Some(Place {
        on: problems.read(on, |p| p.selector())?.into(),
        factors: factors?.into(),
    })
}

pub(super) fn keep(on: &str, layout: &str, problems: &mut Problems) -> Option<Keep> {
    let layout = problems.read(layout, |p| p.layout());
    Some(Keep {
        on: problems.read(on, |p| p.selector())?.into(),
        layout: layout?.into(),
    })
}

pub(super) fn prefer<'a>(
    on: &str,
    ranking: impl IntoIterator<Item = &'a str>,
    weight: Option<f64>,
    problems: &mut Problems,
) -> Option<Prefer> {
    let ranking = read_all(ranking, |p| p.call(), problems);
    if ranking.is_empty() {
        problems.add("`prefer` needs a choice");
    }
    let (on, key) = problems.read(on, |p| p.keyed_selector())?;
    // Whole numbers are written without a point.
    let weight = weight.map(|weight| {
        let is_whole = weight.fract() == 0.0 && weight.abs() < 1e15;
        if is_whole {
            Number::Int(weight as i64)
        } else {
            Number::Float(weight)
        }
    });
    Some(Prefer {
        on: on.node.into(),
        key: key.node.into(),
        ranking,
        weight,
        overrides: false,
    })
}

pub(super) fn selectors<'a>(
    texts: impl IntoIterator<Item = &'a str>,
    problems: &mut Problems,
) -> Vec<Spanned<Selector>> {
    read_all(texts, |p| p.selector(), problems)
}

pub(super) fn read_all<'a, T>(
    texts: impl IntoIterator<Item = &'a str>,
    rule: impl for<'b> Fn(&mut Parser<'b>) -> Parse<T> + Copy,
    problems: &mut Problems,
) -> Vec<Spanned<T>> {
    texts
        .into_iter()
        .filter_map(|text| problems.read(text, rule))
        .map(|node| Spanned::new(node, Span::default()))
        .collect()
}
