//! Tables: comma-separated values with a header.
//!
//! Enters: text (RFC 4180: quoted fields may hold commas, quotes and line breaks). Leaves: rows whose
//! fields are read by the name of their column.
//! Invariant: a blank field and a missing column read alike.

use std::collections::BTreeMap;

/// A table of text fields.
#[derive(Clone, Debug, Default)]
pub struct Table {
    columns: BTreeMap<String, usize>,
    rows: Vec<Vec<String>>,
}

/// One row of a table.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    table: &'a Table,
    fields: &'a [String],
}

impl Table {
    /// Reads a table; a text without a header is an empty table.
    pub fn parse(text: &str) -> Self {
        let mut rows = split(text).into_iter();
        let header = rows.next().unwrap_or_default();
        let columns = header.iter().enumerate();
        Self {
            columns: columns
                .map(|(idx, name)| (name.trim().trim_start_matches('\u{feff}').into(), idx))
                .collect(),
            rows: rows
                .filter(|fields| fields.iter().any(|field| !field.trim().is_empty()))
                .collect(),
        }
    }

    /// Whether there is a column of this name.
    pub fn has(&self, column: &str) -> bool {
        self.columns.contains_key(column)
    }

    /// All rows, in order.
    pub fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        self.rows.iter().map(|fields| Row {
            table: self,
            fields,
        })
    }
}

impl<'a> Row<'a> {
    /// A field without the spaces around it; `None` where it is blank or says that nothing is known.
    pub fn text(self, column: &str) -> Option<&'a str> {
        let field = self.fields.get(*self.table.columns.get(column)?)?.trim();
        let is_blank = matches!(
            field.to_ascii_lowercase().as_str(),
            "" | "-" | "?" | "na" | "n/a" | "nan" | "none stated" | "unknown" | "null"
        );
        (!is_blank).then_some(field)
    }

    /// The field, or nothing.
    pub fn text_or_blank(self, column: &str) -> &'a str {
        self.text(column).unwrap_or_default()
    }

    /// A finite number.
    pub fn number(self, column: &str) -> Option<f64> {
        let number: f64 = self.text(column)?.replace('_', "").parse().ok()?;
        number.is_finite().then_some(number)
    }

    /// A count of at least 1.
    pub fn count(self, column: &str) -> Option<usize> {
        let number = self.number(column)?;
        (number >= 1.0).then_some(number.round() as usize)
    }
}

/// Records of fields.
fn split(text: &str) -> Vec<Vec<String>> {
    let mut records = Vec::new();
    let (mut record, mut field) = (Vec::new(), String::new());
    let mut is_quoted = false;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if is_quoted && chars.peek() == Some(&'"') => {
                chars.next();
                field.push('"');
            }
            '"' if is_quoted => is_quoted = false,
            '"' if field.is_empty() => is_quoted = true,
            ',' if !is_quoted => record.push(std::mem::take(&mut field)),
            '\r' if !is_quoted => {}
            '\n' if !is_quoted => {
                record.push(std::mem::take(&mut field));
                records.push(std::mem::take(&mut record));
            }
            c => field.push(c),
        }
    }
    if !field.is_empty() || !record.is_empty() {
        record.push(field);
        records.push(record);
    }
    records
}

/// The whole number that stands right before (`8x200`: before `x`) or after a word in a text.
pub(super) fn number_after(text: &str, word: &str) -> Option<f64> {
    let rest = &text[text.find(word)? + word.len()..];
    let rest = rest.trim_start_matches([' ', '=', ':']);
    let end = rest
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(rest.len());
    rest[..end].trim_end_matches('.').parse().ok()
}

/// The number that stands before a word in a text, spaces between them or not.
pub(super) fn number_before(text: &str, word: &str) -> Option<f64> {
    let before = text[..text.find(word)?].trim_end();
    let start = before
        .rfind(|c: char| !c.is_ascii_digit() && c != '.')
        .map_or(0, |idx| {
            idx + before[idx..].chars().next().map_or(1, char::len_utf8)
        });
    before[start..].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_fields_and_blanks() {
        let table = Table::parse("a,b,c\n1,\"x, \"\"y\"\"\n2\",\r\n,,\n-,3");
        let rows: Vec<_> = table.rows().collect();
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[0].count("a"), Some(1));
        assert_eq!(rows[0].text("b"), Some("x, \"y\"\n2"));
        assert_eq!((rows[0].text("c"), rows[0].text("d")), (None, None));
        assert_eq!((rows[1].text("a"), rows[1].number("b")), (None, Some(3.0)));
    }

    #[test]
    fn numbers_next_to_words() {
        assert_eq!(number_after("MLA kv_lora512 v128", "kv_lora"), Some(512.0));
        assert_eq!(
            number_before("first 3 layers dense", "layers dense"),
            Some(3.0)
        );
        assert_eq!(number_before("NVLink3; 1600Gb/s", "Gb/s"), Some(1600.0));
        assert_eq!(number_before("Gb/s", "Gb/s"), None);
    }
}
