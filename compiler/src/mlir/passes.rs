//! The passes from the dialects that [`super::emit`] writes to the `llvm` dialect.
//!
//! Enters: a module of `func`, `scf`, `arith`, `math`, `vector` and `llvm` operations.
//! Leaves: the same module in the `llvm` dialect alone. Invariant: the verifier runs after each.

use melior::Context;
use melior::ir::Module;
use melior::pass::PassManager;
use melior::utility::parse_pass_pipeline;

use super::{Error, Stage};

/// One step of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PassEntry {
    /// Short name, as in `--emit mlir-after:<name>`.
    pub name: &'static str,
    /// MLIR's textual pipeline.
    pub pipeline: &'static str,
}

/// Every pass, in order.
pub const PASSES: &[PassEntry] = &[
    // First, because emission repeats constants, broadcasts and addresses wherever they are used.
    PassEntry {
        name: "cse",
        pipeline: "builtin.module(cse)",
    },
    // While loops are still structured: what a row computes once leaves the loop over its lanes.
    PassEntry {
        name: "licm",
        pipeline: "builtin.module(func.func(loop-invariant-code-motion))",
    },
    // Loops become branches; nothing after this needs their structure.
    PassEntry {
        name: "scf-to-cf",
        pipeline: "builtin.module(convert-scf-to-cf)",
    },
    // Before the general conversion, which would keep the order of horizontal sums sequential:
    // a row's sum is already split over vectors and lanes, so its end may be a tree too.
    PassEntry {
        name: "vector-to-llvm",
        pipeline: "builtin.module(convert-vector-to-llvm{reassociate-fp-reductions=true})",
    },
    // Everything else: arithmetic, math without library calls (our polynomials leave only fma,
    // sqrt and abs), branches, functions.
    PassEntry {
        name: "to-llvm",
        pipeline: "builtin.module(convert-math-to-llvm,convert-to-llvm)",
    },
    // Last: the conversions leave casts between a type and itself.
    PassEntry {
        name: "reconcile",
        pipeline: "builtin.module(reconcile-unrealized-casts)",
    },
];

/// Runs [`PASSES`], handing the module to `after` behind each.
///
/// # Errors
/// `Internal` if a pass fails.
pub fn run_passes(
    context: &Context,
    module: &mut Module,
    mut after: impl FnMut(Stage, &Module),
) -> Result<(), Error> {
    melior::utility::register_all_passes();
    for pass in PASSES {
        let manager = PassManager::new(context);
        manager.enable_verifier(true);
        parse_pass_pipeline(manager.as_operation_pass_manager(), pass.pipeline).map_err(
            |error| Error::Internal {
                message: format!("pass {}: {error}", pass.name),
            },
        )?;
        manager.run(module).map_err(|error| Error::Internal {
            message: format!("pass {}: {error}", pass.name),
        })?;
        after(Stage::MlirAfter(pass.name.to_string()), module);
    }
    Ok(())
}
