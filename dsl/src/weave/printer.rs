//! A syntax tree to text: the printer is the formatter.
//!
//! Enters: any tree. Leaves: its canonical text, one statement a line, two blanks a level, columns
//! of neighboring statements aligned, comments kept, a line end at the end.
//! Invariant: `parse(print(x)) == x`, and `print(parse(print(x))) == print(x)`.

mod line;
mod node;

use std::fmt;

use line::{Form, Show};

use super::ast::{Block, Comment, Document, Trivia};

/// The canonical text of `document`.
pub fn print(document: &Document) -> String {
    let mut text = block_lines(&document.body).join("\n");
    if !text.is_empty() {
        text.push('\n');
    }
    text
}

impl fmt::Display for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&print(self))
    }
}

/// The lines of a block, relative to its own indentation.
fn block_lines<T: Show>(block: &Block<T>) -> Vec<String> {
    let forms: Vec<Form> = block.lines.iter().map(|line| line.item.form()).collect();
    let is_joined: Vec<bool> = block
        .lines
        .iter()
        .map(|line| !line.lead.contains(&Trivia::Blank))
        .collect();
    let mut heads = aligned_heads(&forms, &is_joined);
    let notes: Vec<Option<&Comment>> = block.lines.iter().map(|line| line.note.as_ref()).collect();
    append_notes(&mut heads, &forms, &notes, &is_joined);

    let mut out = Vec::new();
    for ((line, form), head) in block.lines.iter().zip(forms).zip(heads) {
        out.extend(line.lead.iter().map(trivia_text));
        let Some(body) = form.body else {
            out.push(head);
            continue;
        };
        match body.note {
            Some(note) => out.push(format!("{head} {{  {}", comment_text(&note))),
            None => out.push(format!("{head} {{")),
        }
        out.extend(body.lines.iter().map(|inner| indent(inner)));
        match &line.note {
            Some(note) => out.push(format!("}}  {}", comment_text(note))),
            None => out.push("}".to_owned()),
        }
    }
    out.extend(block.tail.iter().map(trivia_text));
    out
}

/// The text of each line before its block or note: within a run of neighbors of one family, all
/// columns but a line's last are padded to one width.
fn aligned_heads(forms: &[Form], is_joined: &[bool]) -> Vec<String> {
    let mut heads = Vec::with_capacity(forms.len());
    for run in runs(forms.len(), |nth| {
        let (Some(before), Some(here)) = (forms.get(nth - 1), forms.get(nth)) else {
            return false;
        };
        is_joined.get(nth) == Some(&true) && here.is_aligned_with(before)
    }) {
        let run = forms.get(run).unwrap_or_default();
        let n_columns = run.iter().map(|form| form.columns.len()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..n_columns)
            .map(|column| {
                run.iter()
                    .filter_map(|form| form.columns.get(column))
                    .map(|cell| width(cell))
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        for form in run {
            let mut head = String::new();
            for (column, cell) in form.columns.iter().enumerate() {
                head.push_str(cell);
                if column + 1 < form.columns.len() {
                    let room = widths.get(column).copied().unwrap_or(0);
                    head.push_str(&" ".repeat(room.saturating_sub(width(cell)) + 1));
                }
            }
            heads.push(head);
        }
    }
    heads
}

/// Appends the notes of lines without a block, aligned within runs of neighbors that have one.
fn append_notes(
    heads: &mut [String],
    forms: &[Form],
    notes: &[Option<&Comment>],
    is_joined: &[bool],
) {
    let is_noted = |nth: usize| {
        notes.get(nth).is_some_and(Option::is_some)
            && forms.get(nth).is_some_and(|form| form.body.is_none())
    };
    for run in runs(heads.len(), |nth| {
        is_joined.get(nth) == Some(&true) && is_noted(nth - 1) && is_noted(nth)
    }) {
        let lines = heads.get(run.clone()).unwrap_or_default();
        let room = lines.iter().map(|head| width(head)).max().unwrap_or(0);
        for nth in run.filter(|&nth| is_noted(nth)) {
            if let (Some(head), Some(Some(note))) = (heads.get_mut(nth), notes.get(nth)) {
                let blanks = " ".repeat(room.saturating_sub(width(head)) + 2);
                head.push_str(&blanks);
                head.push_str(&comment_text(note));
            }
        }
    }
}

/// Cuts `0..n` into maximal runs; `joins(i)` says whether `i` goes with `i - 1`, for `i >= 1`.
fn runs(n: usize, joins: impl Fn(usize) -> bool) -> Vec<std::ops::Range<usize>> {
    let mut out: Vec<std::ops::Range<usize>> = Vec::new();
    for nth in 0..n {
        match out.last_mut() {
            Some(run) if joins(nth) => run.end = nth + 1,
            _ => out.push(nth..nth + 1),
        }
    }
    out
}

fn width(text: &str) -> usize {
    text.chars().count()
}

fn indent(line: &str) -> String {
    if line.is_empty() {
        String::new()
    } else {
        format!("  {line}")
    }
}

fn trivia_text(trivia: &Trivia) -> String {
    match trivia {
        Trivia::Blank => String::new(),
        Trivia::Comment(comment) => comment_text(comment),
    }
}

fn comment_text(comment: &Comment) -> String {
    let text = comment.text();
    // `##` and `#!` stay as they are; a text that begins so keeps its distance from the `#` only
    // if it had one, which is the same comment.
    if text.is_empty() || text.starts_with(['#', '!']) {
        format!("#{text}")
    } else {
        format!("# {text}")
    }
}
