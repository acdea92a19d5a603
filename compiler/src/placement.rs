//! Where the experts of a mixture-of-experts model go, and how good that is.
//!
//! Enters: a routing trace (or loads), devices and their nodes. Leaves: a placement with what it
//! keeps local, how busy its busiest device is, bounds on both, and what it costs to get there.
//! Invariant: every figure comes with a bound that holds for all placements, and bounds are proven
//! by certificates that need no solver to check.

pub mod assign;
pub mod balance;
pub mod bounds;
pub mod chain;
pub mod coupled;
pub mod eigen;
pub mod exact;
pub mod ilp;
pub mod joint;
pub mod matching;
pub mod migrate;
pub mod price;
pub mod rebalance;
pub mod replicas;
pub mod search;
pub mod solve;
pub mod split;

/// Why there is no placement.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Infeasible(String),
    #[error("{0}")]
    Exhausted(String),
    #[error("{0}")]
    Unsupported(String),
    #[error("{0}")]
    Internal(String),
}

#[cfg(test)]
mod tests;
