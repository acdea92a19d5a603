//! Functions between the types of `meshweave-dsl`.

pub mod codegen;
#[cfg(feature = "mlir")]
pub mod mlir;
