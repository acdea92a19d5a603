//! What several tests share.

pub mod golden;
#[cfg(feature = "mlir")]
pub mod gpu;
pub mod graphs;
pub mod nvrtc;
pub mod plans;
pub mod ptx;
