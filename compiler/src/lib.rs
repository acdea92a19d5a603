//! Functions between the types of `meshweave-dsl`.

pub mod parallel;
pub mod model;
pub mod import;
pub mod replicate;
pub mod differentiate;
pub mod simplify;
pub mod resolve;
pub mod schedule;
pub mod plan;
pub mod placement;
pub mod reshard;
pub mod partition;
pub mod storage;
pub mod codegen;
pub mod lower;
pub mod cuda;
pub mod pipeline;
pub mod calibrate;
#[cfg(feature = "mlir")]
pub mod mlir;
pub mod export;
pub mod show;
pub mod validate;
