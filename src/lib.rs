//! Meshweave: a compiler and scheduling language for parallelism plans.
//!
//! Enters: a model, a cluster and as many decisions as the user cares to make.
//! Leaves: a plan with its certificate, per-rank programs with generated kernels, a run, and reports.
//!
//! This crate is the only semver surface; it joins the three crates below it, which see each other
//! only through the types of [`dsl`].

pub use meshweave_compiler as compiler;
pub use meshweave_dsl as dsl;
pub use meshweave_runtime as runtime;

pub mod error;
pub mod compile;
pub mod choose;
pub mod exchanges;
pub mod session;
pub mod mapping;
pub mod report;
pub mod cli;
