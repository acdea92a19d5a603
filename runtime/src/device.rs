//! Devices: where a rank's memory lies and its kernels run.

pub mod host;
