//! Kernels in CUDA C++ for what row programs do not express: contractions, attention, routines.
//!
//! Enters: an instruction of a program and the buffers of its rank. Leaves: the launches that compute
//! it, each with the whole text of its kernel, for NVRTC.
//! Invariants: all sizes and places are constants in the text, so arguments are addresses alone, and
//! equal work has equal text; the order of every sum depends on the text alone, so the same input
//! gives the same bits in every run; nothing outside of the buffers' elements is touched.
//!
//! The texts stand in `cuda/*.cu`, which read as CUDA; what is generated is the list of their named
//! parameters. None includes a header, for NVRTC comes without them.

mod attention;
mod contract;
mod define;
mod routine;

use meshweave_dsl::device_code::KernelSource;
use meshweave_dsl::program::{Action, Buffer, BufferId};

pub use contract::{Adds, contract};

/// How products of f32 tensors are computed; those of bf16 tensors always run on tensor cores. Sums
/// are f32 either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Products in f32, no tensor cores.
    F32,
    /// Operands rounded to 11 bits of significand, on tensor cores.
    Tf32,
}

/// What multiplies tensors of bf16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TensorCores {
    /// Warps, by `mma.sync`: every device from `sm_80` on.
    #[default]
    Warps,
    /// Groups of four warps, by `wgmma`, where operands lie so that they can; code for `sm_90a` alone.
    WarpGroups,
}

/// How products are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Products {
    /// Those of f32.
    pub precision: Precision,
    /// Those of bf16.
    pub cores: TensorCores,
}

/// A kernel that cannot be generated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// Not on GPUs yet.
    #[error("`{op}` on a GPU: {reason}")]
    Unsupported {
        /// The kind of instruction.
        op: &'static str,
        /// Why, and what to do instead.
        reason: String,
    },
    /// Our bug, or a damaged program.
    #[error("internal error in CUDA code: {0}")]
    Internal(String),
}

/// The launches of an instruction, which follow one another on one stream; none where there is
/// nothing to compute.
///
/// # Errors
/// `Unsupported` for element types and memory orders that no kernel takes, and for actions that are
/// neither contraction, attention nor routine; `Internal` when buffers do not fit the action.
pub fn kernels_of(
    action: &Action,
    buffers: &[Buffer],
    products: Products,
) -> Result<Vec<KernelSource>, CudaError> {
    let buffers = Buffers(buffers);
    match action {
        Action::Contract {
            a,
            b,
            c,
            indices,
            accumulate,
            bias,
        } => {
            let adds = contract::Adds {
                onto: *accumulate,
                bias: bias.clone(),
            };
            contract::of_buffers(&buffers, [*a, *b, *c], indices, adds, products)
        }
        Action::Attention { seen: Some(_), .. } => Err(unsupported(
            "attention",
            "queries that say how many keys they see run on the host only",
        )),
        Action::Attention {
            dims,
            q,
            k,
            v,
            o,
            lse,
            ..
        } => attention::forward(&buffers, dims, [*q, *k, *v, *o, *lse], products),
        Action::AttentionGrad {
            dims,
            inputs,
            results,
            ..
        } => attention::backward(&buffers, dims, *inputs, *results, products),
        Action::Routine {
            op,
            inputs,
            results,
        } => routine::kernels(&buffers, op, inputs, results),
        Action::Kernel { .. } => Err(unsupported("kernel", "row programs are lowered to PTX")),
        Action::Collective { .. } | Action::Send { .. } | Action::Recv { .. } => Err(unsupported(
            "collective",
            "the runtime's communicator does it",
        )),
    }
}

fn unsupported(op: &'static str, reason: impl Into<String>) -> CudaError {
    CudaError::Unsupported {
        op,
        reason: reason.into(),
    }
}

/// A rank's buffers by their ids.
struct Buffers<'a>(&'a [Buffer]);

impl<'a> Buffers<'a> {
    fn get(&self, id: BufferId) -> Result<&'a Buffer, CudaError> {
        let n = self.0.len();
        self.0
            .get(id.index())
            .ok_or_else(|| CudaError::Internal(format!("buffer {} of {n}", id.index())))
    }
}
