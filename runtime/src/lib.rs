//! Runs programs: devices, collectives, executor, and the serial reference.
//!
//! In: a compiled program, its kernels, weights and data. Out: outputs and a measured timeline.
//! Invariant: this crate never depends on the compiler; what a worker needs is here alone.

pub mod error;

pub mod tensor;
pub mod device;
pub mod pool;
pub mod strided;
pub mod contract;
pub mod attention;
pub mod routine;
pub mod signals;
pub mod mpi;
pub mod collective;
mod weights;
pub mod data;
pub mod executor;
pub mod artifact;
pub mod rendezvous;
pub mod checkpoint;
pub mod pretrained;
pub mod profile;
pub mod decode;
pub mod reference;

pub use error::{Error, Result};
