//! The oracle: a serial interpreter of graphs in f64.
//!
//! Enters: a global [`Graph`] and the values of its sources (or none: they start as their roles say).
//! Leaves: the value of every tensor; over several steps, losses and gradients.
//! Invariant: each op is computed straight from its definition in [`meshweave_dsl::op`], in f64,
//! in one thread, in the order of the graph; nothing here is shared with the kernels it judges.
//!
//! [`evaluate_ranks`] steps the local graphs of all ranks side by side and executes their
//! collectives exactly, so that partitioning can be judged without generated code.
//!
//! Legend of shape suffixes: none; operands are addressed by dim names through strides.

mod collective;
mod evaluate;
mod init;
mod op;
mod train;
mod value;

pub use evaluate::{Values, evaluate, evaluate_ranks};
pub use init::{
    const_value, golden_inputs, golden_tokens, hash_uniform, init_value, initial_value,
    inverse_frequencies, lowbias32,
};
pub use op::evaluate_op;
pub use train::{StepResult, Stepper, train};
pub use value::Value;

use meshweave_dsl::op::OpError;

#[cfg(doc)]
use meshweave_dsl::graph::Graph;

/// Why a graph could not be interpreted.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ReferenceError {
    /// The values given do not fit the graph.
    #[error("{0}")]
    Invalid(String),
    /// An op does not fit its inputs.
    #[error(transparent)]
    Op(#[from] OpError),
    /// The graph breaks an invariant of its type.
    #[error("internal error: {0}")]
    Internal(String),
}

/// Result of the interpreter.
pub type Result<T> = std::result::Result<T, ReferenceError>;
