//! Numbers and names as people read them.
//!
//! Enters: quantities in base units, and text. Leaves: text that is safe inside HTML.
//! Invariant: what [`escape`] returns holds no character that HTML gives a meaning to.

use meshweave_dsl::name::Axis;
use meshweave_dsl::op::Group;
use meshweave_dsl::timeline::Category;
use meshweave_dsl::units::{Bytes, Seconds};

/// Text inside an element or a quoted attribute.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // Characters that may not stand in a document at all.
            '\u{0}'..='\u{8}' | '\u{b}' | '\u{c}' | '\u{e}'..='\u{1f}' => escaped.push('\u{fffd}'),
            _ => escaped.push(character),
        }
    }
    escaped
}

/// JSON inside a script element: no `<` may close the element early.
pub(super) fn json_in_script(json: &str) -> String {
    json.replace('<', "\\u003c")
        .replace('>', "\\u003e")
        .replace('&', "\\u0026")
}

/// A duration with its unit.
pub(super) fn seconds(value_s: f64) -> String {
    if value_s.abs() < 0.5e-9 {
        return "0 s".into();
    }
    Seconds(value_s).to_string().replace(" us", " µs")
}

/// A size with its unit.
pub(super) fn bytes(n_bytes: usize) -> String {
    Bytes(n_bytes as u64).to_string()
}

/// Three digits and a decimal prefix: `21.3 M`.
pub(super) fn scaled(value: f64, unit: &str) -> String {
    let steps = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    let (scale, prefix) = steps
        .into_iter()
        .find(|(scale, _)| value.abs() >= *scale)
        .unwrap_or((1.0, ""));
    let separator = if prefix.is_empty() && unit.is_empty() {
        ""
    } else {
        " "
    };
    format!("{}{separator}{prefix}{unit}", digits(value / scale))
}

/// A share as a percentage.
pub(super) fn percent(ratio: f64) -> String {
    format!("{} %", digits(ratio * 100.0))
}

/// Three significant digits.
pub(super) fn digits(value: f64) -> String {
    let magnitude = value.abs();
    if magnitude >= 100.0 || magnitude == 0.0 {
        format!("{value:.0}")
    } else if magnitude >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// A count with thin separators between thousands.
pub(super) fn count(value: usize) -> String {
    let plain = value.to_string();
    let mut text = String::new();
    for (digit_idx, digit) in plain.chars().enumerate() {
        if digit_idx > 0 && (plain.len() - digit_idx).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// `1 op`, `3 ops`.
pub(super) fn plural(n: usize, noun: &str) -> String {
    let ending = if n == 1 { "" } else { "s" };
    format!("{}\u{a0}{noun}{ending}", count(n))
}

/// The axes of a group and its size.
pub(super) fn group(group: &Group) -> String {
    let axes: Vec<&str> = group.axes.iter().map(Axis::as_str).collect();
    if axes.is_empty() {
        plural(group.ranks.len(), "rank")
    } else {
        format!(
            "over {} · {}",
            axes.join(","),
            plural(group.ranks.len(), "rank")
        )
    }
}

/// The class name and the label of a category.
pub(super) fn category(category: Category) -> (&'static str, &'static str) {
    match category {
        Category::Contract => ("contract", "contraction"),
        Category::Attention => ("attention", "attention"),
        Category::Kernel => ("kernel", "generated kernel"),
        Category::Routine => ("routine", "data movement"),
        Category::Collective => ("collective", "collective"),
        Category::Message => ("message", "message"),
    }
}

/// All categories, in the order of legends and of the numbers in the page's data.
pub(super) const CATEGORIES: [Category; 6] = [
    Category::Contract,
    Category::Attention,
    Category::Kernel,
    Category::Routine,
    Category::Collective,
    Category::Message,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(scaled(21_345_678.0, ""), "21.3 M");
        assert_eq!(scaled(812.0, ""), "812");
        assert_eq!(count(1234567), "1\u{202f}234\u{202f}567");
        assert_eq!(plural(1, "op"), "1\u{a0}op");
        assert_eq!(digits(0.0), "0");
        assert_eq!(seconds(2.5e-4), "250 µs");
        assert_eq!(seconds(1e-17), "0 s");
        assert_eq!(percent(0.0312), "3.12 %");
    }

    #[test]
    fn markup_is_escaped() {
        assert_eq!(
            escape("<a b='c'>&\u{1}"),
            "&lt;a b=&#39;c&#39;&gt;&amp;\u{fffd}"
        );
        assert_eq!(json_in_script("</script>"), "\\u003c/script\\u003e");
    }
}
