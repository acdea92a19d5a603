//! Row programs to host objects or PTX through MLIR and LLVM: the only module that touches either.
//!
//! Enters: [`Kernel`]s. Leaves: object files with one function per distinct program, and on
//! request the text of each stage. The way: [`emit`] builds MLIR, [`passes`] lowers it to the
//! `llvm` dialect, [`llvm`] translates, optimizes and emits machine code, [`link()`] makes a
//! shared object that a process without LLVM can load.
//! Invariant: the output depends on the kernels, the target and the options only, not on the
//! number of threads or on timing.

pub mod emit;
mod link;
mod llvm;
mod math;
mod ops;
mod passes;
mod target;

use std::collections::HashMap;

pub use link::link;
pub use passes::{PASSES, PassEntry};
pub use target::{GpuTarget, HostTarget};

use crate::codegen::kernel::{Elem, Kernel, RowProgram};
use crate::codegen::launch::Launch;
use crate::parallel::available;

/// What can go wrong between a kernel and its object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A kernel or a target that is not handled yet.
    #[error("{message}")]
    Unsupported {
        /// What, and what to do instead.
        message: String,
    },
    /// The machine lacks something: a linker, disk space.
    #[error("{message}")]
    Exhausted {
        /// What, and the way out.
        message: String,
    },
    /// Our bug: MLIR or LLVM refuses what was made here.
    #[error("internal error in code generation: {message}")]
    Internal {
        /// What was refused, with the library's words.
        message: String,
    },
}

/// A stage whose text can be asked for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// MLIR as built from the row programs.
    Mlir,
    /// MLIR after the pass of that name in [`PASSES`].
    MlirAfter(String),
    /// Optimized LLVM IR.
    Llvm,
    /// Assembly.
    Asm,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Mlir => write!(f, "mlir"),
            Self::MlirAfter(pass) => write!(f, "mlir-after:{pass}"),
            Self::Llvm => write!(f, "llvm"),
            Self::Asm => write!(f, "asm"),
        }
    }
}

impl Stage {
    /// Every stage, in order.
    pub fn all() -> Vec<Self> {
        let mut stages = vec![Self::Mlir];
        stages.extend(
            PASSES
                .iter()
                .map(|pass| Self::MlirAfter(pass.name.to_string())),
        );
        stages.extend([Self::Llvm, Self::Asm]);
        stages
    }
}

/// How to compile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompileOptions {
    /// Kernels are spread over this many modules, each compiled by its own thread.
    pub n_threads: usize,
    /// Stages whose text to keep.
    pub stages: Vec<Stage>,
}

impl Default for CompileOptions {
    fn default() -> Self {
        Self {
            n_threads: available().min(8),
            stages: Vec::new(),
        }
    }
}

/// Compiled kernels.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostObject {
    /// Relocatable object files.
    pub objects: Vec<Vec<u8>>,
    /// For each kernel given, in order, the symbol of its function; equal programs share one.
    pub symbols: Vec<String>,
    /// Text of the stages asked for, in their order; one text per module.
    pub stages: Vec<(Stage, String)>,
}

/// Compiles `kernels` for `target`.
///
/// # Errors
/// `Unsupported` for programs or targets not handled, `Internal` if MLIR or LLVM refuses.
pub fn compile(
    kernels: &[Kernel],
    target: &HostTarget,
    options: &CompileOptions,
) -> Result<HostObject, Error> {
    let (distinct, symbols) = distinct(kernels)?;
    let is_narrow = |kernel: &&&Kernel| {
        let mut args = kernel.program().args().iter();
        args.any(|arg| arg.elem == Elem::Bf16)
    };
    if let Some(kernel) = distinct.iter().find(is_narrow) {
        return Err(Error::Unsupported {
            message: format!(
                "`{}` loads or stores bf16, which kernels for hosts do not; take `dtype f32`, or a GPU",
                kernel.name()
            ),
        });
    }
    if distinct.is_empty() {
        return Ok(HostObject::default());
    }

    let n_modules = options.n_threads.clamp(1, distinct.len());
    let chunks: Vec<Vec<&Kernel>> = (0..n_modules)
        .map(|first| {
            distinct
                .iter()
                .copied()
                .skip(first)
                .step_by(n_modules)
                .collect()
        })
        .collect();
    let modules: Vec<Result<llvm::CompiledModule, Error>> = std::thread::scope(|scope| {
        let threads: Vec<_> = chunks
            .iter()
            .map(|chunk| scope.spawn(|| llvm::compile_module(chunk, target, &options.stages)))
            .collect();
        threads
            .into_iter()
            .map(|thread| {
                thread.join().unwrap_or_else(|_| {
                    Err(Error::Internal {
                        message: "a compiling thread died".to_string(),
                    })
                })
            })
            .collect()
    });
    let mut result = HostObject {
        symbols,
        ..HostObject::default()
    };
    for module in modules {
        let module = module?;
        result.objects.push(module.object);
        result.stages.extend(module.stages);
    }
    // A stable sort keeps the order of modules within a stage.
    result.stages.sort_by_key(|(stage, _)| {
        Stage::all()
            .iter()
            .position(|other| other == stage)
            .unwrap_or(usize::MAX)
    });
    Ok(result)
}

/// Kernels for a GPU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ptx {
    /// One module of PTX; the driver, or `ptxas`, assembles it.
    pub text: String,
    /// For each kernel given, in order, its entries and how to launch them, one after another; equal
    /// programs share them.
    pub entries: Vec<Vec<(String, Launch)>>,
    /// Text of the stages asked for, in their order.
    pub stages: Vec<(Stage, String)>,
}

/// Compiles `kernels` for `target`: `name(arg pointers…)` over all rows at once, all parts of a kernel with
/// the same arguments.
///
/// # Errors
/// `Unsupported` for programs not handled, `Internal` if MLIR or LLVM refuses.
pub fn compile_ptx(kernels: &[Kernel], target: GpuTarget, stages: &[Stage]) -> Result<Ptx, Error> {
    let (distinct, symbols) = distinct(kernels)?;
    let mut parts: Vec<(Kernel, Launch)> = Vec::new();
    let mut entries_of: HashMap<&str, Vec<(String, Launch)>> = HashMap::new();
    for kernel in distinct {
        let own = Launch::parts(kernel);
        let entries = own
            .iter()
            .map(|(part, launch)| (part.name().to_string(), *launch));
        entries_of.insert(kernel.name(), entries.collect());
        parts.extend(own);
    }
    let entries = symbols
        .iter()
        .map(|symbol| entries_of[symbol.as_str()].clone());
    let entries = entries.collect();
    let (text, stages) = llvm::compile_ptx_module(&parts, target, stages)?;
    Ok(Ptx {
        text,
        entries,
        stages,
    })
}

/// The distinct programs, and the symbol of every kernel's.
fn distinct(kernels: &[Kernel]) -> Result<(Vec<&Kernel>, Vec<String>), Error> {
    let mut symbol_of: HashMap<&RowProgram, &str> = HashMap::new();
    let mut used: HashMap<&str, &RowProgram> = HashMap::new();
    let mut distinct: Vec<&Kernel> = Vec::new();
    let mut symbols = Vec::with_capacity(kernels.len());
    for kernel in kernels {
        let symbol = match symbol_of.get(kernel.program()) {
            Some(symbol) => symbol,
            None => {
                if used.insert(kernel.name(), kernel.program()).is_some() {
                    return Err(Error::Internal {
                        message: format!("two different kernels are named {}", kernel.name()),
                    });
                }
                symbol_of.insert(kernel.program(), kernel.name());
                distinct.push(kernel);
                kernel.name()
            }
        };
        symbols.push(symbol.to_string());
    }
    Ok((distinct, symbols))
}
