//! Devices: where a rank's memory lies and its kernels run.

pub mod cuda;
pub mod gpu;
pub mod host;
pub mod target;
