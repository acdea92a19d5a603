//! What can go wrong while a program is loaded or executed.
//!
//! In: a condition found by one of the modules. Out: one [`Error`] whose variant says who acts.
//! Invariant: every message names the entity, the numbers that disagree, and a way out.

/// A failure of the runtime; the variant says who acts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The user's input is wrong: a file, an option, a shape.
    #[error("{0}")]
    Invalid(String),
    /// The user's demands cannot be met together.
    #[error("{0}")]
    Infeasible(String),
    /// The machine ran out of something: memory, time, devices.
    #[error("{0}")]
    Exhausted(String),
    /// Meaningful, but not built yet.
    #[error("{0}")]
    Unsupported(String),
    /// A broken invariant: a bug of Meshweave.
    #[error("internal error: {0}")]
    Internal(String),
}

/// The runtime's result.
pub type Result<T> = std::result::Result<T, Error>;
