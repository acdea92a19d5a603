//! Keys and values of definitions and jobs.
//!
//! Enters: the settings of one statement and the keys that it knows. Leaves: values of the kinds and
//! ranges that are asked for, and a finding for everything else.
//! Invariant: a setting that is not understood is reported, never ignored.

use meshweave_dsl::diagnostics::{Diagnostic, Span, did_you_mean, nearest};
use meshweave_dsl::dtype::DType;
use meshweave_dsl::units::{Quantity, UnitError};
use meshweave_dsl::weave::ast::{Choice, Setting, Spanned, Value};

/// The settings of one statement.
pub(super) struct Settings<'a> {
    /// For messages, such as ``model `tiny` ``.
    owner: String,
    span: Span,
    settings: Vec<&'a Spanned<Setting>>,
    pub diagnostics: Vec<Diagnostic>,
}

impl<'a> Settings<'a> {
    /// Reports unknown and repeated keys.
    pub fn new(
        owner: String,
        span: Span,
        settings: impl IntoIterator<Item = &'a Spanned<Setting>>,
        known: &[&str],
    ) -> Self {
        let mut this = Self {
            owner,
            span,
            settings: Vec::new(),
            diagnostics: Vec::new(),
        };
        for setting in settings {
            let key = setting.key.as_str();
            if !known.contains(&key) {
                this.diagnostics
                    .push(unknown_key(&this.owner, setting, known));
                continue;
            }
            match this.settings.iter().find(|first| first.key == setting.key) {
                // The parser has said so already where keys stand on one line.
                Some(first) => this.diagnostics.push(
                    Diagnostic::invalid(format!("{}: `{key}` is given twice", this.owner))
                        .code("W101")
                        .at(setting.span, "again here")
                        .also(first.span, "first here"),
                ),
                None => this.settings.push(setting),
            }
        }
        this
    }

    /// Whether the key is given.
    pub fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// The setting of a key.
    pub fn get(&self, key: &str) -> Option<&'a Spanned<Setting>> {
        self.settings
            .iter()
            .copied()
            .find(|setting| setting.key == key)
    }

    /// The place of a key's setting, or of the statement.
    pub fn span_of(&self, key: &str) -> Span {
        self.get(key).map_or(self.span, |setting| setting.span)
    }

    /// The known values of a key; reports an open choice.
    fn values(&mut self, key: &str) -> Option<Vec<(&'a Value, Span)>> {
        let setting = self.get(key)?;
        let mut values = Vec::new();
        for value in &setting.node.values {
            match value.known() {
                Some(known) => values.push((known, value.span)),
                None => {
                    self.diagnostics.push(
                        Diagnostic::unsupported(format!(
                            "{}: the planner does not choose `{key}` yet",
                            self.owner
                        ))
                        .code("W120")
                        .at(value.span, "left open here")
                        .help(format!("give `{key}` a value")),
                    );
                    return None;
                }
            }
        }
        Some(values)
    }

    /// The only value of a key.
    fn single(&mut self, key: &str) -> Option<(&'a Value, Span)> {
        let values = self.values(key)?;
        if let [value] = values.as_slice() {
            return Some(*value);
        }
        let n_values = values.len();
        let span = self.span_of(key);
        self.wrong(
            key,
            span,
            format!("takes one value, found {n_values}"),
            "remove the others",
        );
        None
    }

    fn wrong(&mut self, key: &str, span: Span, what: String, way_out: &str) {
        self.diagnostics.push(
            Diagnostic::invalid(format!("{}: `{key}` {what}", self.owner))
                .code("W103")
                .at(span, "")
                .help(way_out),
        );
    }

    /// What a whole number from `lowest` on may be where its choice is left open, as in `auto` (anything:
    /// an empty list) and `auto{8,16}`; its witness, if it has one, is a value like any other.
    pub fn open_count(&mut self, key: &str, lowest: usize) -> Option<Vec<usize>> {
        let setting = self.get(key)?;
        let [value] = setting.node.values.as_slice() else {
            return None;
        };
        let Choice::Auto { among, .. } = &value.node else {
            return None;
        };
        let mut counts = Vec::new();
        for choice in among {
            let count = choice
                .as_u64()
                .and_then(|count| usize::try_from(count).ok());
            let Some(count) = count.filter(|count| *count >= lowest) else {
                let what = format!("is a whole number from {lowest} on, found {}", show(choice));
                self.wrong(key, value.span, what, "remove it from the choices");
                return None;
            };
            counts.push(count);
        }
        Some(counts)
    }

    /// A whole number from `lowest` on.
    pub fn count(&mut self, key: &str, lowest: usize) -> Option<usize> {
        let (value, span) = self.single(key)?;
        let count = value.as_u64().and_then(|count| usize::try_from(count).ok());
        if let Some(count) = count.filter(|count| *count >= lowest) {
            return Some(count);
        }
        let what = format!("is a whole number from {lowest} on, found {}", show(value));
        self.wrong(
            key,
            span,
            what,
            &format!("write `{key} {}`", lowest.max(1) * 4),
        );
        None
    }

    /// The same for a key that must be there.
    pub fn required_count(&mut self, key: &str, lowest: usize) -> Option<usize> {
        if !self.has(key) {
            let example = lowest.max(1) * 4;
            self.diagnostics.push(
                Diagnostic::invalid(format!("{} lacks `{key}`", self.owner))
                    .code("W101")
                    .at(self.span, "")
                    .help(format!("add `{key} {example}`, with your number")),
            );
            return None;
        }
        self.count(key, lowest)
    }

    /// A number for which `is_legal` holds; `range` says which those are.
    pub fn number(
        &mut self,
        key: &str,
        range: &str,
        is_legal: impl Fn(f64) -> bool,
    ) -> Option<f64> {
        let (value, span) = self.single(key)?;
        self.checked(key, value, span, range, is_legal)
    }

    fn checked(
        &mut self,
        key: &str,
        value: &Value,
        span: Span,
        range: &str,
        is_legal: impl Fn(f64) -> bool,
    ) -> Option<f64> {
        if let Some(number) = value.as_f64().filter(|number| is_legal(*number)) {
            return Some(number);
        }
        let what = format!("is a number {range}, found {}", show(value));
        self.wrong(key, span, what, "numbers are written `0.1` or `1e-3`");
        None
    }

    /// Two numbers.
    pub fn pair(
        &mut self,
        key: &str,
        range: &str,
        is_legal: impl Fn(f64) -> bool,
    ) -> Option<(f64, f64)> {
        let values = self.values(key)?;
        let [(first, first_span), (second, second_span)] = values.as_slice() else {
            let n_values = values.len();
            let span = self.span_of(key);
            self.wrong(
                key,
                span,
                format!("takes two numbers, found {n_values}"),
                "as in `betas 0.9 0.95`",
            );
            return None;
        };
        let first = self.checked(key, first, *first_span, range, &is_legal);
        let second = self.checked(key, second, *second_span, range, &is_legal);
        Some((first?, second?))
    }

    /// `true` or `false`.
    pub fn flag(&mut self, key: &str) -> Option<bool> {
        let (value, span) = self.single(key)?;
        let flag = value.as_bool();
        if flag.is_none() {
            let what = format!("is `true` or `false`, found {}", show(value));
            self.wrong(key, span, what, &format!("write `{key} true`"));
        }
        flag
    }

    /// One of a few words.
    pub fn word(&mut self, key: &str, among: &[&'static str]) -> Option<&'static str> {
        let (value, span) = self.single(key)?;
        let text = value.as_str();
        let found = among.iter().copied().find(|word| text == Some(*word));
        if found.is_none() {
            let what = format!("cannot be {}", show(value));
            let near = text.and_then(|text| did_you_mean(text, among.iter().copied()));
            let all = format!("it is one of {}", among.join(", "));
            self.wrong(key, span, what, &near.unwrap_or(all));
        }
        found
    }

    /// A quoted text or a word.
    pub fn text(&mut self, key: &str) -> Option<(&'a str, Span)> {
        let (value, span) = self.single(key)?;
        let text = value.as_str();
        if text.is_none() {
            let what = format!("is a name, found {}", show(value));
            self.wrong(key, span, what, &format!("write `{key} \"name\"`"));
        }
        Some((text?, span))
    }

    /// A quantity, in the base unit of what `convert` measures.
    pub fn quantity(
        &mut self,
        key: &str,
        example: &str,
        convert: impl Fn(Quantity) -> Result<f64, UnitError>,
    ) -> Option<f64> {
        let (value, span) = self.single(key)?;
        self.converted(key, value, span, example, convert)
    }

    fn converted(
        &mut self,
        key: &str,
        value: &Value,
        span: Span,
        example: &str,
        convert: impl Fn(Quantity) -> Result<f64, UnitError>,
    ) -> Option<f64> {
        let Value::Quantity(quantity) = value else {
            let what = format!("needs a unit, found {}", show(value));
            self.wrong(key, span, what, &format!("write `{key} {example}`"));
            return None;
        };
        match convert(*quantity) {
            Ok(base) if base > 0.0 => Some(base),
            Ok(_) => {
                let what = format!("must be positive, found {quantity}");
                self.wrong(key, span, what, &format!("write `{key} {example}`"));
                None
            }
            Err(error) => {
                let (owner, help) = (&self.owner, format!("write `{key} {example}`"));
                let message = format!("{owner}: `{key}`: {error}");
                let diagnostic = Diagnostic::invalid(message).code("W103");
                self.diagnostics.push(diagnostic.at(span, "").help(help));
                None
            }
        }
    }

    /// The values of a key as (type, operations a second): `f32 50 GFLOPS`.
    pub fn speed(&mut self, key: &str) -> Option<(DType, f64)> {
        const EXAMPLE: &str = "f32 50 GFLOPS";
        let values = self.values(key)?;
        let [(dtype, dtype_span), (speed, span)] = values.as_slice() else {
            let n_values = values.len();
            let span = self.span_of(key);
            let what = format!("takes a type and a throughput, found {n_values} values");
            self.wrong(key, span, what, &format!("write `{key} {EXAMPLE}`"));
            return None;
        };
        let known = [DType::F32, DType::Bf16, DType::F16];
        let text = dtype.as_str();
        let Some(dtype) = known.into_iter().find(|known| Some(known.name()) == text) else {
            let what = format!("begins with f32, bf16 or f16, found {}", show(dtype));
            self.wrong(key, *dtype_span, what, &format!("write `{key} {EXAMPLE}`"));
            return None;
        };
        let speed = self.converted(key, speed, *span, EXAMPLE, |quantity| {
            quantity.flops_per_second().map(|value| value.0)
        })?;
        Some((dtype, speed))
    }

    /// The values of a key as (word, bytes a second, seconds): `nvlink 450 GB/s 2 us`.
    pub fn link(&mut self, key: &str) -> Option<(String, f64, Option<f64>)> {
        const EXAMPLE: &str = "nvlink 450 GB/s 2 us";
        let values = self.values(key)?;
        let (name, bandwidth, latency) = match values.as_slice() {
            [name, bandwidth] => (name, bandwidth, None),
            [name, bandwidth, latency] => (name, bandwidth, Some(latency)),
            _ => {
                let n_values = values.len();
                let span = self.span_of(key);
                let what = format!("takes a name, a bandwidth and a latency, found {n_values}");
                self.wrong(
                    key,
                    span,
                    format!("{what} values"),
                    &format!("write `{key} {EXAMPLE}`"),
                );
                return None;
            }
        };
        let Some(text) = name.0.as_str() else {
            let what = format!("begins with a name, found {}", show(name.0));
            self.wrong(key, name.1, what, &format!("write `{key} {EXAMPLE}`"));
            return None;
        };
        let bytes_per_s = self.converted(key, bandwidth.0, bandwidth.1, EXAMPLE, |quantity| {
            quantity.bytes_per_second().map(|value| value.0)
        })?;
        let latency_s = match latency {
            None => None,
            Some((value, span)) => {
                Some(self.converted(key, value, *span, EXAMPLE, |quantity| {
                    quantity.seconds().map(|value| value.0)
                })?)
            }
        };
        Some((text.to_owned(), bytes_per_s, latency_s))
    }
}

impl<'a> Settings<'a> {
    /// A word and a number from 0 on: `node 3`.
    pub fn numbered(&mut self, key: &str, example: &str) -> Option<(&'a str, usize, Span)> {
        let values = self.values(key)?;
        if let [(name, span), (idx, _)] = values.as_slice()
            && let (Some(name), Some(idx)) = (name.as_str(), idx.as_u64())
        {
            return Some((name, idx as usize, *span));
        }
        let span = self.span_of(key);
        let what = "takes a name and a number from 0 on".to_owned();
        self.wrong(key, span, what, &format!("write `{key} {example}`"));
        None
    }

    /// A part of a whole, above 0 % and up to 100 %.
    pub fn part(&mut self, key: &str, example: &str) -> Option<f64> {
        let part = self.quantity(key, example, |quantity| {
            quantity.ratio().map(|ratio| ratio.0)
        })?;
        if part <= 1.0 {
            return Some(part);
        }
        let span = self.span_of(key);
        let what = format!("is a part of the nominal speed, found {} %", 100.0 * part);
        self.wrong(key, span, what, &format!("write `{key} {example}`"));
        None
    }
}

fn unknown_key(owner: &str, setting: &Spanned<Setting>, known: &[&str]) -> Diagnostic {
    let key = setting.key.as_str();
    let diagnostic = Diagnostic::invalid(format!("{owner} has no `{key}`"))
        .code("W102")
        .at(setting.span, "unknown key");
    match nearest(key, known.iter().copied()) {
        Some(near) => diagnostic.help(format!("did you mean `{near}`?")),
        None => diagnostic.help(format!("known are {}", known.join(", "))),
    }
}

/// A value for messages.
fn show(value: &Value) -> String {
    match value {
        Value::Text(text) => format!("\"{text}\""),
        other => format!("`{other}`"),
    }
}
