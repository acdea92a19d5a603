//! Pipeline schedules as data: order keys, literal rows, CSV files.
//!
//! Invariant: the numbers in an [`Expr`] are not negative ([`Expr::Neg`] is), its depth is at most
//! [`Expr::MAX_DEPTH`].

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Block, Name, Spanned};
use crate::schedule::{ActionKind, Cell, Channels, Item, StreamKind};

/// `schedule NAME = …`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScheduleDef {
    pub name: Spanned<Name>,
    pub body: ScheduleBody,
}

/// The ways to write a schedule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleBody {
    /// `key F:(mb,0) B:(mb+P-r,-1)`: each rank sorts its actions by these keys.
    Key(Vec<Spanned<OrderKey>>),
    /// `rows [channels pair] { row 0F0 0F1 … }`: one row a rank, from rank 0.
    Rows {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        channels: Option<Channels>,
        rows: Block<Row>,
    },
    /// `streams [channels pair] { rank 0 compute 0:0F0 4:0B0[3] … }`: the queues of every device.
    Streams {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        channels: Option<Channels>,
        streams: Block<StreamLine>,
    },
    /// `csv "file"`
    Csv(Spanned<String>),
}

/// The key of one kind of action: tuples compare lexicographically.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OrderKey {
    pub action: ActionKind,
    /// At least one.
    pub key: Vec<Expr>,
}

/// What one rank does, in order: `row 0F0 . 0F1+0B0`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Row {
    pub cells: Vec<Cell>,
}

/// One queue of a rank's device, in order: `rank 0 compute 0:0F0 4:0B0[3]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamLine {
    pub rank: usize,
    pub kind: StreamKind,
    pub items: Vec<Item>,
    /// Ascending: `i` where the items `i` and `i + 1` run overlapped, written `4:2F3+6:5B1`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pairs: Vec<usize>,
}

impl fmt::Display for StreamLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} {}", self.rank, self.kind)?;
        for (nth, item) in self.items.iter().enumerate() {
            let is_second = nth > 0 && self.pairs.contains(&(nth - 1));
            f.write_str(if is_second { "+" } else { " " })?;
            item.fmt(f)?;
        }
        Ok(())
    }
}

/// What an order key may depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Var {
    Microbatch,
    Microbatches,
    Rank,
    Ranks,
    Stage,
    Chunk,
    Chunks,
    Slice,
    Slices,
}

impl Var {
    /// All variables.
    pub const ALL: [Self; 9] = [
        Self::Microbatch,
        Self::Microbatches,
        Self::Rank,
        Self::Ranks,
        Self::Stage,
        Self::Chunk,
        Self::Chunks,
        Self::Slice,
        Self::Slices,
    ];

    /// The spelling in the language.
    pub fn text(self) -> &'static str {
        match self {
            Self::Microbatch => "mb",
            Self::Microbatches => "M",
            Self::Rank => "r",
            Self::Ranks => "P",
            Self::Stage => "s",
            Self::Chunk => "c",
            Self::Chunks => "v",
            Self::Slice => "sl",
            Self::Slices => "k",
        }
    }

    /// What it stands for.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Microbatch => "the microbatch",
            Self::Microbatches => "how many microbatches",
            Self::Rank => "the rank along the pipeline",
            Self::Ranks => "how many ranks",
            Self::Stage => "the stage",
            Self::Chunk => "the chunk within the rank",
            Self::Chunks => "how many chunks a rank has",
            Self::Slice => "the slice of the sequence",
            Self::Slices => "how many slices a sequence has",
        }
    }
}

/// Integer arithmetic over [`Var`]s; division and remainder are Euclidean.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Expr {
    Int(u32),
    Var(Var),
    Neg(Box<Expr>),
    Binary {
        op: BinaryOp,
        left: Box<Expr>,
        right: Box<Expr>,
    },
    /// `min(a,b,…)`, `max(a,b,…)`; at least one argument.
    Extremum {
        op: ExtremumOp,
        args: Vec<Expr>,
    },
}

/// A binary operator of [`Expr`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BinaryOp {
    Add,
    Sub,
    Mul,
    Div,
    Rem,
}

impl BinaryOp {
    /// All operators.
    pub const ALL: [Self; 5] = [Self::Add, Self::Sub, Self::Mul, Self::Div, Self::Rem];

    /// The sign.
    pub fn text(self) -> &'static str {
        match self {
            Self::Add => "+",
            Self::Sub => "-",
            Self::Mul => "*",
            Self::Div => "/",
            Self::Rem => "%",
        }
    }
}

/// Smallest or largest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExtremumOp {
    Min,
    Max,
}

impl ExtremumOp {
    /// The spelling in the language.
    pub fn text(self) -> &'static str {
        match self {
            Self::Min => "min",
            Self::Max => "max",
        }
    }
}

/// Why an [`Expr`] has no value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ExprError {
    /// A division or remainder by zero.
    #[error("the order key divides by zero")]
    Invalid,
    /// The value does not fit 64 bits.
    #[error("the order key overflows 64-bit integers")]
    Exhausted,
}

impl Expr {
    /// How deep the parser lets expressions nest.
    pub const MAX_DEPTH: usize = 48;

    /// Its value, given those of the variables. Linear in its size.
    ///
    /// # Errors
    /// [`ExprError::Invalid`] on division by zero, [`ExprError::Exhausted`] on overflow.
    pub fn eval(&self, value_of: &dyn Fn(Var) -> i64) -> Result<i64, ExprError> {
        match self {
            Self::Int(value) => Ok(i64::from(*value)),
            Self::Var(var) => Ok(value_of(*var)),
            Self::Neg(inner) => {
                let value = inner.eval(value_of)?;
                value.checked_neg().ok_or(ExprError::Exhausted)
            }
            Self::Binary { op, left, right } => {
                let (left, right) = (left.eval(value_of)?, right.eval(value_of)?);
                if right == 0 && matches!(op, BinaryOp::Div | BinaryOp::Rem) {
                    return Err(ExprError::Invalid);
                }
                let value = match op {
                    BinaryOp::Add => left.checked_add(right),
                    BinaryOp::Sub => left.checked_sub(right),
                    BinaryOp::Mul => left.checked_mul(right),
                    BinaryOp::Div => left.checked_div_euclid(right),
                    BinaryOp::Rem => left.checked_rem_euclid(right),
                };
                value.ok_or(ExprError::Exhausted)
            }
            Self::Extremum { op, args } => {
                let mut best: Option<i64> = None;
                for arg in args {
                    let value = arg.eval(value_of)?;
                    best = Some(match (op, best) {
                        (_, None) => value,
                        (ExtremumOp::Min, Some(best)) => best.min(value),
                        (ExtremumOp::Max, Some(best)) => best.max(value),
                    });
                }
                best.ok_or(ExprError::Invalid)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Statement;
    use super::*;
    use crate::diagnostics::SourceId;
    use crate::weave::parse;

    /// The order of a rank's actions under the keys of `text`.
    fn order(text: &str, ranks: i64, rank: i64, microbatches: i64) -> String {
        let document = parse(text, SourceId(0)).document;
        let Some(Statement::Schedule(schedule)) = document.statements().map(|s| &s.node).next()
        else {
            panic!("{text} is a schedule");
        };
        let ScheduleBody::Key(keys) = &schedule.body else {
            panic!("{text} has keys");
        };
        let mut actions = Vec::new();
        for (microbatch, key) in (0..microbatches).flat_map(|mb| keys.iter().map(move |k| (mb, k)))
        {
            let value_of = |var| match var {
                Var::Microbatch => microbatch,
                Var::Microbatches => microbatches,
                Var::Rank | Var::Stage => rank,
                Var::Ranks => ranks,
                Var::Chunk | Var::Slice => 0,
                Var::Chunks | Var::Slices => 1,
            };
            let values: Result<Vec<i64>, ExprError> =
                key.key.iter().map(|expr| expr.eval(&value_of)).collect();
            actions.push((values, format!("{}{microbatch}", key.action.text())));
        }
        actions.sort_by_key(|(values, _)| values.clone().unwrap());
        let names: Vec<String> = actions.into_iter().map(|(_, name)| name).collect();
        names.join(" ")
    }

    #[test]
    fn order_keys_give_1f1b() {
        let text = "schedule x = key F:(mb,0) B:(mb+P-r,-1)";
        assert_eq!(order(text, 3, 0, 4), "F0 F1 F2 B0 F3 B1 B2 B3");
        assert_eq!(order(text, 3, 1, 4), "F0 F1 B0 F2 B1 F3 B2 B3");
        assert_eq!(order(text, 3, 2, 4), "F0 B0 F1 B1 F2 B2 F3 B3");
    }

    #[test]
    fn expressions_are_checked() {
        let eval = |text: &str| {
            let text = format!("schedule x = key F:({text})");
            let document = parse(&text, SourceId(0)).document;
            let statement = document.statements().next().map(|s| s.node.clone());
            let Some(Statement::Schedule(schedule)) = statement else {
                panic!("{text} is a schedule");
            };
            let ScheduleBody::Key(keys) = &schedule.body else {
                panic!("{text} has keys");
            };
            keys[0].key[0].eval(&|_| i64::MAX)
        };
        assert_eq!(eval("1-2-3*-4"), Ok(11));
        assert_eq!(eval("-7/2"), Ok(-4));
        assert_eq!(eval("-7%2"), Ok(1));
        assert_eq!(eval("min(3,max(1,2),5)"), Ok(2));
        assert_eq!(eval("1/(2-2)"), Err(ExprError::Invalid));
        assert_eq!(eval("mb+1"), Err(ExprError::Exhausted));
    }
}
