//! The `.weave` language: a plan as text.
//!
//! Enters: text, or calls of the [`builder`]. Leaves: a [`Document`], a syntax tree that knows
//! nothing of models, clusters or graphs; its meaning is given by later stages.
//! Invariant: `parse(print(x)) == x` for every document without errors, and printing is
//! idempotent: the printer is the formatter.

pub mod ast;
pub mod builder;
mod freeze;
mod lexer;
mod parser;
mod printer;
mod spacing;

pub use ast::Document;
pub use builder::{BuildError, PlanBuilder, auto, auto_of, axis, maximize, minimize, name, solved};
pub use parser::{Parsed, parse};
pub use printer::print;
