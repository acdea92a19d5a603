//! The op that a name and its attributes mean.
//!
//! Enters: a name, and what stands in its braces. Leaves: an [`OpKind`]. Invariant: a name or an
//! attribute that is not known is a fault that lists those that are.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{Cursor, Fault};
use crate::diagnostics::{Diagnostic, did_you_mean};
use crate::op::{BinaryFn, OpKind, UnaryFn};

/// The op of this name and attributes. Diagnostics about the name alone bear a code.
pub(super) fn op_kind(name: &str, content: Option<Value>) -> Result<OpKind, Fault> {
    let mut content = content.unwrap_or(Value::Null);
    let tag = |tag: &str, content: &Value| {
        Value::Object(Map::from_iter([(tag.to_string(), content.clone())]))
    };
    let function = match &content {
        Value::Null => Value::String(name.into()),
        content => tag(name, content),
    };
    let mut offers = variants::<OpKind>();
    offers.retain(|tag| tag != "unary" && tag != "binary");
    offers.extend(variants::<UnaryFn>());
    offers.extend(variants::<BinaryFn>());
    if !offers.iter().any(|known| known == name) {
        return Err(Box::new(
            Diagnostic::invalid(format!("there is no op `{name}`"))
                .code("name")
                .maybe_help(did_you_mean(name, offers.iter().map(String::as_str))),
        ));
    }
    if variants::<UnaryFn>().iter().any(|known| known == name) {
        return function_of(name, &function).map(OpKind::Unary);
    }
    if variants::<BinaryFn>().iter().any(|known| known == name) {
        return function_of(name, &function).map(OpKind::Binary);
    }
    if content.is_null() {
        content = Value::Object(Map::new());
    }
    typed(&tag(name, &content), &format!("op `{name}`"))
}

/// A function of elements: a tag, or a tag and its constant.
fn function_of<T: DeserializeOwned>(name: &str, value: &Value) -> Result<T, Fault> {
    serde_json::from_value(value.clone()).map_err(|error| {
        let bare = serde_json::from_value::<T>(Value::String(name.into()));
        let message = match (value, bare) {
            (Value::String(_), _) => {
                format!("op `{name}` takes a number in braces, such as `{name}{{0.5}}`")
            }
            (_, Ok(_)) => format!("op `{name}` has no attributes"),
            (_, Err(_)) => format!("op `{name}`: {error}"),
        };
        Box::new(Diagnostic::invalid(message))
    })
}

/// A value of a closed set of tags with attributes, such as an initial value.
pub(super) fn tagged<T: DeserializeOwned + serde::Serialize>(
    cursor: &mut Cursor<'_>,
    what: &str,
) -> Result<T, Fault> {
    cursor.skip_spaces();
    let start = cursor.at;
    let name = cursor.word(&format!("a {what}"))?;
    let value = match cursor.tagged_content()? {
        None => Value::String(name.clone()),
        Some(content) => Value::Object(Map::from_iter([(name.clone(), content)])),
    };
    let offers = variants::<T>();
    if !offers.contains(&name) {
        return Err(Box::new(
            Diagnostic::invalid(format!("there is no {what} `{name}`"))
                .at(cursor.span(start), "")
                .maybe_help(did_you_mean(&name, offers.iter().map(String::as_str)))
                .help(format!("known are {}", offers.join(", "))),
        ));
    }
    typed(&value, &format!("{what} `{name}`"))
        .map_err(|diagnostic| Box::new(diagnostic.at(cursor.span(start), "")))
}

/// Deserializes, refusing attributes that the type does not have.
pub(super) fn typed<T: DeserializeOwned + serde::Serialize>(
    value: &Value,
    what: &str,
) -> Result<T, Fault> {
    let typed: T = serde_json::from_value(value.clone())
        .map_err(|error| Box::new(Diagnostic::invalid(format!("{what}: {error}"))))?;
    let back = serde_json::to_value(&typed).unwrap_or(Value::Null);
    if let Some(key) = unknown_key(value, &back) {
        return Err(Box::new(Diagnostic::invalid(format!(
            "{what} has no attribute `{key}`"
        ))));
    }
    Ok(typed)
}

/// A key of `written` that is not in `known`.
fn unknown_key(written: &Value, known: &Value) -> Option<String> {
    match (written, known) {
        (Value::Object(written), Value::Object(known)) => {
            written
                .iter()
                .find_map(|(key, value)| match known.get(key) {
                    Some(known) => unknown_key(value, known),
                    None => Some(key.clone()),
                })
        }
        (Value::Array(written), Value::Array(known)) => written
            .iter()
            .zip(known)
            .find_map(|(written, known)| unknown_key(written, known)),
        _ => None,
    }
}

/// The tags of an enum, as serde lists them when it is given another.
pub(super) fn variants<T: DeserializeOwned>() -> Vec<String> {
    let error = serde_json::from_value::<T>(Value::String("?".into())).err();
    let message = error.map(|error| error.to_string()).unwrap_or_default();
    let listed = message.split_once("expected").map_or("", |(_, list)| list);
    listed
        .split('`')
        .skip(1)
        .step_by(2)
        .map(String::from)
        .collect()
}
