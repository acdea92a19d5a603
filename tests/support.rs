//! What several tests share.

#[cfg(feature = "mlir")]
pub mod execution;
pub mod golden;
#[cfg(feature = "mlir")]
pub mod gpu;
pub mod graphs;
pub mod nvrtc;
pub mod plans;
pub mod ptx;
