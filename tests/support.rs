//! What several tests share.

pub mod golden;
pub mod graphs;
pub mod plans;
#[cfg(feature = "mlir")]
pub mod ptx;
