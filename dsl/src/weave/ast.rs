//! The syntax tree of a `.weave` file, independent of models, clusters and graphs.
//!
//! Enters: what the parser understood or the builder was told. Leaves: plain data that prints,
//! serializes and is interpreted by later stages.
//! Invariant: every tree that the parser returns without an error, and every tree that the builder
//! returns, prints to text that reparses to an equal tree; spans do not take part in equality.

mod layout;
mod name;
mod schedule;
mod select;
mod statement;

pub use layout::{
    Axis, AxisRef, Degree, DimSplit, Layout, MeshDef, NodeList, Partial, Reduce, Split,
};
pub use name::{Name, Pattern};
pub use schedule::{
    BinaryOp, Expr, ExprError, ExtremumOp, OrderKey, Row, ScheduleBody, ScheduleDef, StreamLine,
    Var,
};
pub use select::{Index, IndexItem, Segment, Selector, Target, TensorClass};
pub use statement::{
    Apply, Arg, Call, Definition, Dispatch, Exchanges, ExpertsItem, Forbid, Goal, Header, Init,
    Job, Keep, MemoryItem, Offload, OffloadTo, Pin, Pipeline, PipelineItem, Place, Placement,
    Prefer, Recompute, RecomputePolicy, Reference, Setting, SettingLine, Shard, Solve, Statement,
    TacticDef, TacticItem, UseMesh, Value,
};

use std::ops::Deref;

use serde::{Deserialize, Serialize};

use crate::diagnostics::Span;
pub use crate::schedule::{Action, ActionKind, Cell};

/// A whole `.weave` file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Document {
    pub body: Block<Statement>,
}

impl Document {
    /// The statements with their places, in order.
    pub fn statements(&self) -> impl Iterator<Item = &Spanned<Statement>> {
        self.body.items()
    }
}

/// The lines between two braces, or of a whole file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Block<T> {
    /// The comment behind the opening brace; none for a whole file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<Comment>,
    pub lines: Vec<Line<T>>,
    /// What stands between the last line and the end; never ends in a blank.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tail: Vec<Trivia>,
}

impl<T> Default for Block<T> {
    fn default() -> Self {
        Self {
            note: None,
            lines: Vec::new(),
            tail: Vec::new(),
        }
    }
}

impl<T> Block<T> {
    /// A block of these items, without comments.
    pub fn of(items: impl IntoIterator<Item = T>) -> Self {
        Self {
            lines: items.into_iter().map(Line::of).collect(),
            ..Self::default()
        }
    }

    /// The items with their places, in order.
    pub fn items(&self) -> impl Iterator<Item = &Spanned<T>> {
        self.lines.iter().map(|line| &line.item)
    }
}

/// One statement with the comments that belong to it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Line<T> {
    /// What stands above it; a block's first line does not begin with a blank.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lead: Vec<Trivia>,
    pub item: Spanned<T>,
    /// The comment at the end of its line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<Comment>,
}

impl<T> Line<T> {
    /// A line without comments.
    pub fn of(item: T) -> Self {
        Self {
            lead: Vec::new(),
            item: item.into(),
            note: None,
        }
    }
}

/// Text between statements. Two blanks never follow each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trivia {
    /// One or more empty lines.
    Blank,
    /// A line that holds a comment only.
    Comment(Comment),
}

/// A comment without its `#`, the blank after it, and blanks at the end; one line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct Comment {
    text: String,
}

impl Comment {
    /// A comment; line breaks and other control characters become blanks.
    pub fn new(text: &str) -> Self {
        let clean = |c: char| if c.is_control() && c != '\t' { ' ' } else { c };
        let text: String = text.chars().map(clean).collect();
        Self {
            text: text.trim_end().to_owned(),
        }
    }

    /// Its text.
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl From<String> for Comment {
    fn from(text: String) -> Self {
        Self::new(&text)
    }
}

impl From<Comment> for String {
    fn from(comment: Comment) -> Self {
        comment.text
    }
}

/// A node and its place. Equality and JSON leave the place out.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Spanned<T> {
    pub node: T,
    #[serde(skip)]
    pub span: Span,
}

impl<T> Spanned<T> {
    /// The node at that place.
    pub fn new(node: T, span: Span) -> Self {
        Self { node, span }
    }
}

impl<T> From<T> for Spanned<T> {
    fn from(node: T) -> Self {
        Self {
            node,
            span: Span::default(),
        }
    }
}

impl<T> Deref for Spanned<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.node
    }
}

impl<T: PartialEq> PartialEq for Spanned<T> {
    fn eq(&self, other: &Self) -> bool {
        self.node == other.node
    }
}

/// A value that may be left to the planner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choice<T> {
    /// Decided by the user.
    Fixed(T),
    /// `auto`, `auto{a,b}`, and with a witness `auto{a,b} := a`.
    Auto {
        /// Empty: anything that is legal.
        #[serde(default = "Vec::new", skip_serializing_if = "Vec::is_empty")]
        among: Vec<T>,
        /// What the planner chose; one of `among` unless that is empty.
        #[serde(default = "none", skip_serializing_if = "Option::is_none")]
        witness: Option<T>,
    },
}

fn none<T>() -> Option<T> {
    None
}

impl<T> Choice<T> {
    /// `auto`.
    pub fn auto() -> Self {
        Self::auto_of([])
    }

    /// `auto{…}`.
    pub fn auto_of(among: impl IntoIterator<Item = T>) -> Self {
        Self::Auto {
            among: among.into_iter().collect(),
            witness: None,
        }
    }

    /// The same with a witness; a fixed value stays as it is.
    #[must_use]
    pub fn witnessed(self, value: T) -> Self {
        match self {
            Self::Fixed(fixed) => Self::Fixed(fixed),
            Self::Auto { among, .. } => Self::Auto {
                among,
                witness: Some(value),
            },
        }
    }

    /// The value if it is known: fixed, or the witness.
    pub fn known(&self) -> Option<&T> {
        match self {
            Self::Fixed(value) => Some(value),
            Self::Auto { witness, .. } => witness.as_ref(),
        }
    }

    /// Whether the planner decides it.
    pub fn is_auto(&self) -> bool {
        matches!(self, Self::Auto { .. })
    }
}

impl<T> From<T> for Choice<T> {
    fn from(value: T) -> Self {
        Self::Fixed(value)
    }
}
