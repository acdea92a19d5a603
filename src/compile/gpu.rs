//! Code for a GPU: the program's kernels as PTX, and CUDA C++ for all other instructions.
//!
//! Enters: kernels and a program. Leaves: what the runtime loads on a machine with such a GPU.
//! Invariant: every instruction that is no collective and no message has its launches, or compiling
//! fails and says which one has not.

use std::collections::BTreeMap;

use meshweave_compiler::codegen::kernel::{Kernel, Mutability};
use meshweave_compiler::codegen::launch::Launch;
use meshweave_compiler::cuda::{CudaError, Precision, Products, TensorCores, kernels_of};
use meshweave_compiler::mlir::{self, GpuTarget};
use meshweave_dsl::device_code::{DeviceCode, EntryPoint, GeneratedKernel, Grid};
use meshweave_dsl::diagnostics::Class;
use meshweave_dsl::program::{Action, Program, RankProgram};
use meshweave_runtime::device::cuda::ptx_of;

use super::mlir_error;
use crate::error::{Error, Result};

/// The target of a name such as `sm_90`.
pub(super) fn target(name: &str) -> Result<GpuTarget> {
    GpuTarget::parse(name).ok_or_else(|| {
        let known: Vec<&str> = GpuTarget::ALL.map(GpuTarget::chip).to_vec();
        Error::plain(Class::Invalid, format!("there is no GPU target `{name}`"))
            .help(format!("targets are {}", known.join(", ")))
    })
}

/// The code of a program for a target. CUDA C++ becomes PTX here where NVRTC is installed, else where
/// the code is loaded.
pub(super) fn device_code(
    kernels: &[Kernel],
    program: &Program,
    target: GpuTarget,
) -> Result<DeviceCode> {
    let ptx = mlir::compile_ptx(kernels, target, &[]).map_err(mlir_error)?;
    let generated = kernels.iter().zip(ptx.entries);
    let generated = generated.map(|(kernel, entries)| {
        let args = kernel.program().args().iter();
        let entries = entries.into_iter().map(|(name, launch)| EntryPoint {
            module: 0,
            name,
            grid: grid(launch),
        });
        GeneratedKernel {
            entries: entries.collect(),
            writes: args.map(|arg| arg.mutability != Mutability::Read).collect(),
        }
    });
    let products = Products {
        precision: Precision::F32,
        cores: match target {
            GpuTarget::Sm90a => TensorCores::WarpGroups,
            GpuTarget::Sm80 | GpuTarget::Sm90 | GpuTarget::Sm100 => TensorCores::Warps,
        },
    };
    let mut code = DeviceCode::of_kernels(target.chip(), ptx.text, generated.collect());
    for (rank, rank_program) in program.ranks.iter().enumerate() {
        code.add_rank(launches(rank, rank_program, products)?);
    }
    translate(&mut code)?;
    Ok(code)
}

fn grid(launch: Launch) -> Grid {
    Grid::linear(launch.blocks as u32, launch.threads() as u32)
}

/// The kernels of a rank's instructions.
fn launches(
    rank: usize,
    program: &RankProgram,
    products: Products,
) -> Result<Vec<Vec<meshweave_dsl::device_code::KernelSource>>> {
    let instructions = program.instructions.iter().enumerate();
    let kernels = instructions.map(|(idx, instruction)| match &instruction.action {
        Action::Kernel { .. }
        | Action::Collective { .. }
        | Action::Send { .. }
        | Action::Recv { .. } => Ok(Vec::new()),
        action => kernels_of(action, &program.buffers, products).map_err(|error| {
            let class = match error {
                CudaError::Unsupported { .. } => Class::Unsupported,
                CudaError::Internal(_) => Class::Internal,
            };
            let name = &instruction.name;
            let place = format!("instruction {idx} `{name}` of rank {rank}");
            Error::plain(class, format!("{place}: {error}"))
                .help("run on the host: `--backend threads`")
        }),
    });
    kernels.collect()
}

/// CUDA C++ to PTX, where NVRTC is installed.
fn translate(code: &mut DeviceCode) -> Result<()> {
    let mut known: BTreeMap<String, String> = BTreeMap::new();
    for module in &mut code.modules {
        let Some(source) = module.source.as_ref().filter(|_| module.ptx.is_none()) else {
            continue;
        };
        if let Some(ptx) = known.get(source) {
            module.ptx = Some(ptx.clone());
            continue;
        }
        match ptx_of(source, &code.target) {
            Ok(ptx) => {
                known.insert(source.clone(), ptx.clone());
                module.ptx = Some(ptx);
            }
            Err(meshweave_runtime::Error::Exhausted(reason)) => {
                tracing::info!("CUDA C++ is compiled where it is loaded: {reason}");
                return Ok(());
            }
            Err(error) => return Err(Error::plain(Class::Internal, error)),
        }
    }
    Ok(())
}
