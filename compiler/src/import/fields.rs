//! The fields of a JSON object, each to be read once.
//!
//! Invariant: [`Fields::finish`] succeeds only when every field was read or is known to be harmless.

use std::collections::BTreeSet;

use meshweave_dsl::diagnostics::did_you_mean;
use serde_json::{Map, Value};

use super::ImportError;
use super::families::Family;

type Read<T> = Result<T, ImportError>;

/// Fields that do not change what the model computes from tokens to logits: where it came from, how it
/// is stored, generated with, sharded, initialized or evaluated.
const HARMLESS: &[&str] = &[
    "_attn_implementation",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "dtype",
    "eos_token_id",
    "ep_size",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "label2id",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "seq_aux",
    "tokenizer_class",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "use_cache",
];

/// The object, and which of its fields were read.
pub(super) struct Fields {
    /// Path for messages.
    name: String,
    text: String,
    map: Map<String, Value>,
    read: BTreeSet<String>,
    notes: Vec<String>,
}

impl Fields {
    /// Parses the text of an object.
    pub fn parse(name: &str, text: &str) -> Read<Self> {
        let value: Value = serde_json::from_str(text).map_err(|error| {
            ImportError::Invalid(format!(
                "{name}:{}:{}: {error}",
                error.line(),
                error.column()
            ))
        })?;
        match value {
            Value::Object(map) => Ok(Self {
                name: name.into(),
                text: text.into(),
                map,
                read: BTreeSet::new(),
                notes: Vec::new(),
            }),
            other => Err(ImportError::Invalid(format!(
                "{name}:1:1: a model's config is a JSON object, not {}",
                kind(&other)
            ))),
        }
    }

    /// A field's object, with its own record of what was read.
    pub fn object(&mut self, key: &str) -> Read<Option<Fields>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields {
                name: format!("{}: `{key}`", self.place(key)),
                text: String::new(),
                map,
                read: BTreeSet::new(),
                notes: Vec::new(),
            })),
            Some(other) => Err(self.wrong(key, &other, "an object")),
        }
    }

    /// The value of a field, unless it is absent or null.
    fn take(&mut self, key: &str) -> Option<Value> {
        self.read.insert(key.into());
        self.map.get(key).filter(|value| !value.is_null()).cloned()
    }

    pub fn opt_usize(&mut self, key: &str) -> Read<Option<usize>> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        let number = value
            .as_u64()
            .and_then(|number| usize::try_from(number).ok());
        // A bound that no model reaches keeps products of two sizes within 64 bits.
        match number.filter(|number| *number <= 1 << 31) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(key, &value, "an integer from 0 to 2^31")),
        }
    }

    pub fn usize(&mut self, key: &str) -> Read<usize> {
        let value = self.opt_usize(key)?;
        self.required(key, value)
    }

    pub fn usize_or(&mut self, key: &str, default: usize) -> Read<usize> {
        Ok(self.opt_usize(key)?.unwrap_or(default))
    }

    pub fn opt_f64(&mut self, key: &str) -> Read<Option<f64>> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(key, &value, "a number")),
        }
    }

    pub fn f64(&mut self, key: &str) -> Read<f64> {
        let value = self.opt_f64(key)?;
        self.required(key, value)
    }

    pub fn f64_or(&mut self, key: &str, default: f64) -> Read<f64> {
        Ok(self.opt_f64(key)?.unwrap_or(default))
    }

    pub fn bool_or(&mut self, key: &str, default: bool) -> Read<bool> {
        match self.take(key) {
            None => Ok(default),
            Some(Value::Bool(value)) => Ok(value),
            Some(other) => Err(self.wrong(key, &other, "true or false")),
        }
    }

    pub fn opt_text(&mut self, key: &str) -> Read<Option<String>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, &other, "a string")),
        }
    }

    pub fn texts(&mut self, key: &str) -> Read<Option<Vec<String>>> {
        self.list(key, "a list of strings", |value| {
            value.as_str().map(str::to_owned)
        })
    }

    pub fn indices(&mut self, key: &str) -> Read<Option<Vec<usize>>> {
        self.list(key, "a list of layer numbers", |value| {
            value
                .as_u64()
                .and_then(|number| usize::try_from(number).ok())
        })
    }

    fn list<T>(
        &mut self,
        key: &str,
        wanted: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Read<Option<Vec<T>>> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        let items: Option<Vec<T>> = value
            .as_array()
            .and_then(|items| items.iter().map(read).collect());
        match items {
            Some(items) => Ok(Some(items)),
            None => Err(self.wrong(key, &value, wanted)),
        }
    }

    /// Whether a field is there and not null, without reading it.
    pub fn has(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(|value| !value.is_null())
    }

    /// Whether a field is there and null.
    pub fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// Marks fields as read whose value does not matter here.
    pub fn skip(&mut self, keys: &[&str]) {
        self.read.extend(keys.iter().map(|key| (*key).to_owned()));
    }

    /// Refuses any value of a flag but `false`.
    pub fn must_be_false(&mut self, key: &str) -> Read<()> {
        if self.bool_or(key, false)? {
            return Err(self.unsupported(key, "true", "only false"));
        }
        Ok(())
    }

    /// Refuses any number but `only`, which is also the default.
    pub fn must_equal(&mut self, key: &str, only: f64) -> Read<()> {
        match self.opt_f64(key)? {
            Some(value) if value != only => {
                Err(self.unsupported(key, &value.to_string(), &format!("only {only}")))
            }
            _ => Ok(()),
        }
    }

    /// Says that a training-time feature is left out when the number is not 0.
    pub fn note_unless_zero(&mut self, key: &str, what: &str) -> Read<()> {
        if let Some(value) = self.opt_f64(key)?
            && value != 0.0
        {
            self.note(format!("`{key}` is {value}: {what}"));
        }
        Ok(())
    }

    pub fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    /// A value that is meaningful, but not implemented.
    pub fn unsupported(&self, key: &str, value: &str, instead: &str) -> ImportError {
        ImportError::Unsupported(format!(
            "{}: `{key}` is {value}, which is not implemented ({instead})",
            self.place(key)
        ))
    }

    /// A value that contradicts another.
    pub fn invalid(&self, key: &str, what: &str) -> ImportError {
        ImportError::Invalid(format!("{}: `{key}` {what}", self.place(key)))
    }

    /// Refuses what was not read and is not harmless; gives the notes.
    pub fn finish(self, family: Family) -> Read<Vec<String>> {
        self.check_all_read(HARMLESS, &format!("of {}", family.model_type()))?;
        Ok(self.notes)
    }

    /// Refuses what was not read and is not among `harmless`.
    pub fn check_all_read(&self, harmless: &[&str], of_what: &str) -> Read<()> {
        let unread =
            |key: &&String| !self.read.contains(key.as_str()) && !harmless.contains(&key.as_str());
        let Some(key) = self.map.keys().find(unread) else {
            return Ok(());
        };
        let absent = self
            .read
            .iter()
            .filter(|read| !self.map.contains_key(*read));
        let hint = did_you_mean(key, absent.map(String::as_str));
        Err(ImportError::Unsupported(format!(
            "{}: unknown field `{key}` {of_what}: it may change what the model computes{}",
            self.place(key),
            hint.map_or_else(
                || "; remove it if it does not".to_owned(),
                |hint| format!("; {hint}")
            )
        )))
    }

    fn required<T>(&self, key: &str, value: Option<T>) -> Read<T> {
        value.ok_or_else(|| {
            let hint = did_you_mean(key, self.map.keys().map(String::as_str));
            ImportError::Invalid(format!(
                "{}: field `{key}` is missing{}",
                self.name,
                hint.map_or_else(String::new, |hint| format!("; {hint}"))
            ))
        })
    }

    fn wrong(&self, key: &str, value: &Value, wanted: &str) -> ImportError {
        ImportError::Invalid(format!(
            "{}: `{key}` is {}, but must be {wanted}",
            self.place(key),
            kind(value)
        ))
    }

    /// The file and line of a field.
    fn place(&self, key: &str) -> String {
        let quoted = format!("\"{key}\"");
        let is_key = |(at, _): &(usize, &str)| {
            let after = &self.text[at + quoted.len()..];
            after.trim_start().starts_with(':')
        };
        match self.text.match_indices(&quoted).find(is_key) {
            Some((at, _)) => {
                let before = &self.text[..at];
                let line = before.matches('\n').count() + 1;
                let column = at - before.rfind('\n').map_or(0, |newline| newline + 1) + 1;
                format!("{}:{line}:{column}", self.name)
            }
            None => self.name.clone(),
        }
    }
}

/// A value in words, short.
fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(text) => format!("\"{}\"", text.chars().take(40).collect::<String>()),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
    }
}
