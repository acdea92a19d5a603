//! The text form of graphs.
//!
//! ```text
//! graph "tiny" {
//!   input tokens: i32[batch:8, seq:64]
//!   param embed.wte: f32[vocab:512, embed:128] = hash{stream: 0, scale: 1}
//!   const rope.cos: f32[seq:64, half:16] = rope_cos{theta: 10000, rotary_dim: 32, scaling: none}
//!   state m.embed.wte: f32[vocab:512, embed:128] of embed.wte
//!   h: f32[batch:8, seq:64, embed:128] = gather{dim: vocab}(embed.wte, tokens)
//!   y: f32[…], y.1: f32[…] = rms_norm{dim: embed, eps: 0.00001}(h, norm)
//!   output loss
//!   update embed.wte -> embed.wte.next
//!   gradient embed.wte -> grad.embed.wte
//!   ids 0-4 7 5-6
//! }
//! ```
//!
//! - One statement a line, `#` begins a comment. Names of other characters than letters, digits and
//!   `_ . [ ] +` are written in quotes; so are words that are not `[A-Za-z_][A-Za-z0-9_.+]*`.
//! - An op is its name, its attributes in braces and its inputs. The attributes are those of
//!   [`OpKind`](crate::op::OpKind) as serde names them: words, numbers, `[lists]`, `{maps}`, and
//!   `dim:size` for pairs; functions of elements are ops by themselves (`silu(x)`, `scale{2}(x)`).
//!   `offset` is 0 when left out.
//! - `ids` gives the ids of the tensors in the order in which the text names them; left out when
//!   that is 0, 1, 2, ….
//!
//! Enters: text or a graph. Leaves: a graph and diagnostics, or text.
//! Invariant: `parse(print(g)) = g` for every graph that obeys [`verify`](super::verify); parsing
//! never fails, it returns what it understood. It does not replace verification of what it returns.

mod parser;
mod printer;
mod value;

use super::Graph;
use crate::diagnostics::{Diagnostic, SourceId};

pub(super) use printer::kind_text;
pub use printer::print;

/// A graph as far as it was understood.
#[derive(Clone, Debug, PartialEq)]
pub struct Parsed {
    pub graph: Graph,
    pub diagnostics: Vec<Diagnostic>,
}

/// Reads a graph from the text of `source`. Nearly linear.
pub fn parse(text: &str, source: SourceId) -> Parsed {
    parser::parse(text, source)
}
