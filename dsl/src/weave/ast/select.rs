//! Selectors: which tensors, operations or blocks a statement is about.
//!
//! Invariant: a selector has at least one segment.

use serde::{Deserialize, Serialize};

use super::Pattern;

/// A path with wildcards, such as `*`, `layers[3..8].attn.wq`, `.router`, `*.norm*`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Selector {
    /// Written with a leading dot: the path may begin anywhere.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_floating: bool,
    pub segments: Vec<Segment>,
}

/// What stands between two dots.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Segment {
    /// `*`: one or more segments.
    Any,
    /// A name with an optional index.
    Named {
        name: Pattern,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        index: Option<Index>,
    },
}

/// What stands in brackets.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Index {
    /// `[*]`
    All,
    /// `[0,2]`, `[3..8]`; at least one item.
    Of(Vec<IndexItem>),
}

/// One index or a half-open range.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IndexItem {
    At(u64),
    /// `start..end`, without `end` to the last.
    Range {
        start: u64,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        end: Option<u64>,
    },
}

impl IndexItem {
    /// Whether it covers `index`.
    pub fn contains(&self, index: u64) -> bool {
        match *self {
            Self::At(at) => at == index,
            Self::Range { start, end } => index >= start && end.is_none_or(|end| index < end),
        }
    }
}

impl Selector {
    /// `*`: everything.
    pub fn everything() -> Self {
        Self {
            is_floating: false,
            segments: vec![Segment::Any],
        }
    }

    /// Whether it selects exactly the path `path`, such as `layers[3].attn.wq`.
    /// A scope is selected by its own path, not by its members': see [`Selector::covers`].
    /// Polynomial in the number of segments.
    pub fn matches(&self, path: &str) -> bool {
        let path: Vec<(&str, Option<u64>)> = split(path);
        self.matches_segments(&path)
    }

    /// Whether it selects `path` or a scope around it: `layers[*].moe` covers
    /// `layers[3].moe.router`.
    pub fn covers(&self, path: &str) -> bool {
        let path = split(path);
        (1..=path.len()).any(|n| self.matches_segments(path.get(..n).unwrap_or_default()))
    }

    fn matches_segments(&self, path: &[(&str, Option<u64>)]) -> bool {
        if self.is_floating {
            let starts = 0..path.len();
            return starts
                .into_iter()
                .any(|at| matches_from(&self.segments, path.get(at..).unwrap_or_default()));
        }
        matches_from(&self.segments, path)
    }
}

/// Dynamic programming over (segments read, path read): no exponential backtracking on `*.*.*`.
fn matches_from(segments: &[Segment], path: &[(&str, Option<u64>)]) -> bool {
    // reach[j]: the segments so far can match the first j parts of the path.
    let mut reach = vec![false; path.len() + 1];
    reach[0] = true;
    for segment in segments {
        let mut next = vec![false; path.len() + 1];
        for (j, part) in path.iter().enumerate() {
            next[j + 1] = match segment {
                Segment::Any => reach[j] || next[j],
                Segment::Named { name, index } => reach[j] && part_matches(name, index, part),
            };
        }
        reach = next;
    }
    reach.last().copied().unwrap_or(false)
}

fn part_matches(name: &Pattern, index: &Option<Index>, part: &(&str, Option<u64>)) -> bool {
    let index_matches = match (index, part.1) {
        (None, None) | (Some(Index::All), Some(_)) => true,
        (Some(Index::Of(items)), Some(at)) => items.iter().any(|item| item.contains(at)),
        (None, Some(_)) | (Some(_), None) => false,
    };
    index_matches && name.matches(part.0)
}

/// `layers[3].attn` as its parts.
fn split(path: &str) -> Vec<(&str, Option<u64>)> {
    path.split('.')
        .map(|part| {
            let indexed = part.strip_suffix(']').and_then(|part| part.split_once('['));
            match indexed.and_then(|(name, index)| Some((name, index.parse().ok()?))) {
                Some((name, index)) => (name, Some(index)),
                None => (part, None),
            }
        })
        .collect()
}

/// What a tactic's `shard` or an `offload` is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    Class(TensorClass),
    Selector(Selector),
}

/// Tensors by their part in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TensorClass {
    Params,
    Gradients,
    Optimizer,
    Activations,
    Inputs,
    /// The activations that one block hands to the next.
    BetweenBlocks,
    /// The activations of tokens in the slots of their experts, once they have arrived there.
    Rows,
}

impl TensorClass {
    /// All classes.
    pub const ALL: [Self; 7] = [
        Self::Params,
        Self::Gradients,
        Self::Optimizer,
        Self::Activations,
        Self::Inputs,
        Self::BetweenBlocks,
        Self::Rows,
    ];

    /// The spelling in the language.
    pub fn text(self) -> &'static str {
        match self {
            Self::Params => "params",
            Self::Gradients => "gradients",
            Self::Optimizer => "optimizer",
            Self::Activations => "activations",
            Self::Inputs => "inputs",
            Self::BetweenBlocks => "between_blocks",
            Self::Rows => "rows",
        }
    }
}
