//! From fused groups of row-wise operations to kernels.
//!
//! A *row program* ([`kernel::Kernel`]) enters and leaves as a value: it is built here, free of
//! LLVM, and turned into host code by [`crate::mlir`] (feature `mlir`).
//! Invariant: every [`kernel::Kernel`] that exists has passed the checks of
//! [`kernel::KernelBuilder::finish`], so emitters need not re-check types or bounds of ids.

pub mod columns;
pub mod kernel;
pub mod kernel_builder;
pub mod lanes;
pub mod launch;
pub mod recipes;
pub mod attention;
mod space;
pub(crate) mod bias;
mod row_ops;
mod group;
pub mod fuse;
