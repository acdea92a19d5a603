//! The outer planner: which mapping a decoder takes on a cluster.
//!
//! Enters: a workload, a cluster, a [`Space`] of what is left open. Leaves: the fastest mapping that
//! fits the memory, with a certificate, and its runners-up.
//! Invariant: seconds and bytes are those of [`super::estimate`]; the lower bound holds for every
//! mapping of the space, pruned ones included; the same input gives the same mapping.
//!
//! Grids are enumerated in closed form, bounded by the prices of their layers, and priced best first
//! (branch and bound); stages are cut by dynamic programming.

mod space;
mod grids;
mod bound;
mod stages;
mod saving;
mod search;

use meshweave_dsl::cluster::Cluster;
use serde::{Deserialize, Serialize};

use super::estimate::Workload;

pub use search::{Counts, Priced};
pub use space::{Allowed, Cuts, HEADROOM, ShardGroup, Space, Whole};

/// Why there is no mapping.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum OuterError {
    /// No degrees are legal.
    #[error("{message}")]
    Invalid {
        message: String,
        reasons: Vec<String>,
    },
    /// Nothing fits the memory, or meets the target.
    #[error("{message}")]
    Infeasible { message: String, least_bytes: u64 },
    /// Legal mappings, none of which has a price.
    #[error("{0}")]
    Unsupported(String),
    /// Our bug.
    #[error("internal error in planning: {0}")]
    Internal(String),
}

/// When to stop.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Distance from the bound, as a part of the price.
    pub gap: f64,
    /// Seconds after which the best so far is taken.
    pub within_s: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            gap: 0.0,
            within_s: 60.0,
        }
    }
}

/// What is searched.
#[derive(Clone, Copy)]
pub(crate) struct Problem<'a> {
    pub workload: &'a Workload,
    pub cluster: &'a Cluster,
    pub space: &'a Space,
}

/// A mapping, and how good it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    pub best: Priced,
    /// The best mappings of other grids that were priced, fastest first.
    pub runners_up: Vec<Priced>,
    pub certificate: Certificate,
    /// Wall-clock seconds of the search.
    pub solve_s: f64,
}

/// What is known of a mapping: predicted figures, the bound, and what was searched.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    pub predicted_s: f64,
    /// No mapping of the space is faster under these prices.
    pub lower_bound_s: f64,
    /// How far the prediction is above the bound, as a part of it.
    pub gap: f64,
    pub tokens_per_s: f64,
    /// Model operations over the dense bf16 peak: causal half of attention, nothing counted twice.
    pub mfu: f64,
    /// Bytes of every pipeline rank.
    pub memory_bytes: Vec<u64>,
    pub budget_bytes: u64,
    pub n_devices: usize,
    pub n_idle: usize,
    pub counts: Counts,
    pub not_searched: Vec<String>,
}

/// Finds the fastest mapping of the space.
///
/// # Errors
/// `Invalid` where no degrees are legal, `Infeasible` where nothing fits the budget, `Unsupported` where
/// nothing that is legal has a price.
pub fn search(
    workload: &Workload,
    cluster: &Cluster,
    space: &Space,
    options: &Options,
) -> Result<Found, OuterError> {
    let start = std::time::Instant::now();
    let problem = Problem {
        workload,
        cluster,
        space,
    };
    let n_devices = cluster.n_devices();
    let outcome = search::search(&problem, options, n_devices)?;
    let mut best = outcome.best.into_iter();
    let Some(first) = best.next() else {
        return Err(OuterError::Internal("nothing found".into()));
    };
    let bound_s = outcome.lower_bound_s;
    let certificate = Certificate {
        predicted_s: first.estimate.step_s,
        lower_bound_s: bound_s,
        gap: (first.estimate.step_s / bound_s - 1.0).max(0.0),
        tokens_per_s: first.estimate.tokens_per_s,
        mfu: first.estimate.mfu,
        memory_bytes: Vec::new(),
        budget_bytes: space.budget_bytes,
        n_devices,
        n_idle: n_devices - first.mapping.n_ranks(),
        counts: outcome.counts,
        not_searched: Vec::new(),
    };
    Ok(Found {
        best: first,
        runners_up: best.collect(),
        certificate,
        solve_s: start.elapsed().as_secs_f64(),
    })
}

#[cfg(test)]
mod tests;
