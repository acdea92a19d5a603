//! What several tests share.

pub mod golden;
pub mod graphs;
pub mod nvrtc;
pub mod plans;
pub mod ptx;
