//! The tests of the whole, in one binary: each further one would link LLVM once more.

// Helpers of tests may fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod analysis;
mod cli;
#[cfg(feature = "mlir")]
mod coherent;
mod cuda;
mod decode;
mod differentiate;
#[cfg(feature = "mlir")]
mod equivalence;
mod export;
#[cfg(feature = "mlir")]
mod folding;
#[cfg(feature = "mlir")]
mod fragments;
mod golden;
#[cfg(feature = "mlir")]
mod gpu;
mod hf;
#[cfg(feature = "mlir")]
mod logits;
mod mappings;
mod partition;
#[cfg(feature = "mlir")]
mod pipelines;
#[cfg(feature = "mlir")]
mod ptx;
#[cfg(feature = "mlir")]
mod processes;
mod random_graphs;
mod rebalance;
#[cfg(feature = "mlir")]
mod replicas;
mod schedule;
mod show;
mod simplify;
mod support;
