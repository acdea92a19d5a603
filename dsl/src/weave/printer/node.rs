//! The text of everything that is smaller than a line.

use std::fmt::{self, Display, Formatter};

use super::super::ast::{
    Arg, Axis, AxisRef, BinaryOp, Call, Choice, Degree, DimSplit, Dispatch, Exchanges, Expr, Goal,
    Index, IndexItem, Init, Layout, NodeList, OffloadTo, OrderKey, Partial, RecomputePolicy,
    Reduce, Reference, Segment, Selector, Setting, Solve, Spanned, Split, Target, TensorClass,
    Value, Var,
};
use crate::units::Number;

/// The items' texts with `separator` between them.
pub(super) fn join<T: Display>(items: &[T], separator: &str) -> String {
    let texts: Vec<String> = items.iter().map(T::to_string).collect();
    texts.join(separator)
}

/// `text` in quotes, with escapes.
pub(super) fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// `auto{…} := …` from the texts of its parts. Numbers are set tight: `auto{1,2}`.
pub(super) fn choice_text(among: &[String], witness: Option<String>) -> String {
    let mut out = "auto".to_owned();
    if !among.is_empty() {
        let is_tight = among.iter().all(|text| Number::parse(text).is_some());
        let list = among.join(if is_tight { "," } else { ", " });
        out.push_str(&format!("{{{list}}}"));
    }
    if let Some(witness) = witness {
        out.push_str(&format!(" := {witness}"));
    }
    out
}

impl<T: Display> Display for Spanned<T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.node.fmt(f)
    }
}

impl<T: Display> Display for Choice<T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(value) => value.fmt(f),
            Self::Auto { among, witness } => {
                let among: Vec<String> = among.iter().map(T::to_string).collect();
                f.write_str(&choice_text(&among, witness.as_ref().map(T::to_string)))
            }
        }
    }
}

impl Display for Reference {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => f.write_str(&quoted(text)),
            Self::Name(name) => name.fmt(f),
        }
    }
}

impl Display for Init {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Golden => f.write_str("golden"),
            Self::Random { seed: None } => f.write_str("random"),
            Self::Random { seed: Some(seed) } => write!(f, "random seed {seed}"),
            Self::Load { path } => write!(f, "load {}", quoted(path)),
        }
    }
}

impl Display for Setting {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.key, join(&self.values, " "))
    }
}

impl Display for Value {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Word(name) => name.fmt(f),
            Self::Number(number) => number.fmt(f),
            Self::Quantity(quantity) => quantity.fmt(f),
            Self::Text(text) => f.write_str(&quoted(text)),
        }
    }
}

impl Display for Arg {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Axis(axis) => axis.fmt(f),
            Self::Text(text) => f.write_str(&quoted(text)),
        }
    }
}

impl Display for AxisRef {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match &self.mesh {
            Some(mesh) => write!(f, "{mesh}.{}", self.axis),
            None => self.axis.fmt(f),
        }
    }
}

impl Display for Axis {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, self.degree)?;
        match &self.within {
            Some(level) => write!(f, " within {level}"),
            None => Ok(()),
        }
    }
}

impl Display for Degree {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (word, witness) = match self {
            Self::Is(choice) => return choice.fmt(f),
            Self::Rest { witness } => ("rest", witness),
            Self::Same { witness } => ("same", witness),
        };
        match witness {
            Some(witness) => write!(f, "{word} := {witness}"),
            None => f.write_str(word),
        }
    }
}

impl Display for Selector {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if self.is_floating {
            f.write_str(".")?;
        }
        f.write_str(&join(&self.segments, "."))
    }
}

impl Display for Segment {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Named { name, index: None } => name.fmt(f),
            Self::Named {
                name,
                index: Some(Index::All),
            } => write!(f, "{name}[*]"),
            Self::Named {
                name,
                index: Some(Index::Of(items)),
            } => write!(f, "{name}[{}]", join(items, ",")),
        }
    }
}

impl Display for IndexItem {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(at) => at.fmt(f),
            Self::Range { start, end: None } => write!(f, "{start}.."),
            Self::Range {
                start,
                end: Some(end),
            } => write!(f, "{start}..{end}"),
        }
    }
}

impl Display for NodeList {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "nodes[{}]", join(&self.items, ","))
    }
}

impl Display for Target {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Class(class) => class.fmt(f),
            Self::Selector(selector) => selector.fmt(f),
        }
    }
}

impl Display for Layout {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "[{}]", join(&self.dims, ", "))?;
        for partial in &self.partial {
            write!(f, " {partial}")?;
        }
        Ok(())
    }
}

impl Display for Partial {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "+{}({})", self.reduce, join(&self.axes, ","))
    }
}

impl Display for DimSplit {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.dim.fmt(f)?;
        match &self.split {
            Split::Whole => Ok(()),
            Split::Any => f.write_str("/*"),
            Split::Axes(axes) => write!(f, "/{}", axes_text(axes)),
            Split::Open { witness: None } => f.write_str("/?"),
            Split::Open {
                witness: Some(axes),
            } => write!(f, "/? := {}", axes_text(axes)),
        }
    }
}

fn axes_text(axes: &[AxisRef]) -> String {
    match axes {
        [axis] => axis.to_string(),
        axes => format!("({})", join(axes, ",")),
    }
}

impl Display for Call {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)?;
        if self.args.is_empty() {
            return Ok(());
        }
        write!(f, "({})", join(&self.args, ","))
    }
}

impl Display for RecomputePolicy {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Full => f.write_str("full"),
            Self::First(counts) => match counts.as_slice() {
                [count] => write!(f, "first {count}"),
                counts => write!(f, "first ({})", join(counts, ",")),
            },
        }
    }
}

impl Display for OffloadTo {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Host => f.write_str("host"),
            Self::Part(part) => write!(f, "host {part}"),
        }
    }
}

impl Display for Dispatch {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dropless => f.write_str("dropless"),
            Self::Capacity(factor) => write!(f, "capacity {factor}"),
        }
    }
}

impl Display for Exchanges {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl Display for Solve {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.goal, self.objective)?;
        if let Some(within) = self.within {
            write!(f, " within {within}")?;
        }
        if let Some(gap) = self.gap {
            write!(f, " gap {gap}")?;
        }
        Ok(())
    }
}

impl Display for OrderKey {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}:({})", self.action, join(&self.key, ","))
    }
}

impl Display for Expr {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(value) => value.fmt(f),
            Self::Var(var) => var.fmt(f),
            Self::Neg(inner) => {
                f.write_str("-")?;
                operand(f, inner, UNARY)
            }
            Self::Binary { op, left, right } => {
                operand(f, left, precedence(*op))?;
                f.write_str(op.text())?;
                // Left-associative: on the right even an equal precedence needs parentheses.
                operand(f, right, precedence(*op) + 1)
            }
            Self::Extremum { op, args } => write!(f, "{}({})", op.text(), join(args, ",")),
        }
    }
}

const UNARY: u8 = 3;

fn precedence(op: BinaryOp) -> u8 {
    match op {
        BinaryOp::Add | BinaryOp::Sub => 1,
        BinaryOp::Mul | BinaryOp::Div | BinaryOp::Rem => 2,
    }
}

/// Writes `expr`, in parentheses if it binds less than `least`.
fn operand(f: &mut Formatter<'_>, expr: &Expr, least: u8) -> fmt::Result {
    match expr {
        Expr::Binary { op, .. } if precedence(*op) < least => write!(f, "({expr})"),
        _ => expr.fmt(f),
    }
}

macro_rules! display_text {
    ($($type:ident)*) => {$(
        impl Display for $type {
            fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
                f.write_str(self.text())
            }
        }
    )*};
}

display_text! { Reduce TensorClass Goal Var }
