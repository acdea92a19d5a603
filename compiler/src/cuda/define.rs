//! Named parameters of the kernels' texts: numbers, types, and places of flattened indices.
//!
//! Enters: loops with their sizes and strides. Leaves: `#define` lines, and whole kernels.
//! Invariant: a place is an expression in constants, which the compiler of CUDA turns into shifts and
//! multiplications; its type is as wide as the greatest place needs.

use std::fmt::{Display, Write};

use meshweave_dsl::device_code::{Argument, Grid, KernelSource};
use meshweave_dsl::dtype::DType;
use meshweave_dsl::program::BufferId;

use super::{CudaError, unsupported};

/// What every text begins with.
const DEVICE: &str = include_str!("device.cu");
/// Most threads in a grid's first dimension, by blocks.
const MAX_BLOCKS: usize = i32::MAX as usize;

/// One loop of a flattened index: its length, and its stride in one operand, in elements.
pub(super) type Loop = (usize, usize);

/// The `#define` lines of a kernel.
#[derive(Default)]
pub(super) struct Defines(String);

impl Defines {
    /// `#define name value`.
    pub(super) fn set(&mut self, name: &str, value: impl Display) -> &mut Self {
        // Writing into a string does not fail.
        let _ = writeln!(self.0, "#define {name} {value}");
        self
    }

    /// `#define name value` of a size; sizes are compared with unsigned indices.
    pub(super) fn size(&mut self, name: &str, value: usize) -> &mut Self {
        self.set(name, format_args!("{value}u"))
    }

    /// `#define name(i) …`, the place of flattened index `i` of these loops.
    pub(super) fn place(&mut self, name: &str, loops: &[Loop]) -> &mut Self {
        let place = place("i", loops);
        self.set(&format!("{name}(i)"), place)
    }

    /// The kernel of these parameters and this text.
    ///
    /// # Errors
    /// `Unsupported` when the grid is too great.
    pub(super) fn kernel(
        &self,
        name: &'static str,
        text: &[&str],
        launch: Launch,
        args: &[BufferId],
    ) -> Result<KernelSource, CudaError> {
        let body = format!("{}{DEVICE}{}", self.0, text.concat());
        let entry = format!("{name}_{:016x}", hash(&body));
        if launch.blocks > MAX_BLOCKS {
            let reason = format!("{} blocks, a grid has {MAX_BLOCKS} at most", launch.blocks);
            return Err(unsupported(name, reason));
        }
        Ok(KernelSource {
            source: format!("#define ENTRY {entry}\n{body}"),
            entry,
            grid: Grid {
                blocks: [launch.blocks as u32, 1, 1],
                threads: [launch.threads as u32, 1, 1],
                shared_bytes: launch.shared_bytes as u32,
            },
            args: args.iter().map(|id| Argument::Buffer(*id)).collect(),
        })
    }
}

/// Blocks, threads of each, and bytes of dynamic shared memory.
pub(super) struct Launch {
    pub(super) blocks: usize,
    pub(super) threads: usize,
    pub(super) shared_bytes: usize,
}

/// The name of an element type in the texts.
pub(super) fn type_name(op: &'static str, dtype: DType) -> Result<&'static str, CudaError> {
    match dtype {
        DType::F32 => Ok("float"),
        DType::Bf16 => Ok("bf16"),
        DType::I32 => Ok("int"),
        DType::F16 => Err(unsupported(op, "elements of type f16; use bf16")),
    }
}

/// The place of flattened index `index` over `loops`, the last one fastest.
pub(super) fn place(index: &str, loops: &[Loop]) -> String {
    let reach: usize = loops.iter().map(|(n, s)| n.saturating_sub(1) * s).sum();
    let suffix = if reach < i32::MAX as usize {
        "u"
    } else {
        "ull"
    };
    let mut terms = Vec::new();
    let mut inner = 1;
    let merged = merge(loops);
    for (loop_idx, (size, stride)) in merged.iter().enumerate().rev() {
        let mut term = format!("({index})");
        if inner > 1 {
            term += &format!(" / {inner}u");
        }
        if loop_idx > 0 {
            term += &format!(" % {size}u");
        }
        if *stride > 0 {
            terms.push(format!("{term} * {stride}{suffix}"));
        }
        inner *= size;
    }
    if terms.is_empty() {
        return format!("0{suffix}");
    }
    terms.reverse();
    format!("({})", terms.join(" + "))
}

/// The same walk in as few loops as possible.
pub(super) fn merge(loops: &[Loop]) -> Vec<Loop> {
    let mut merged: Vec<Loop> = Vec::new();
    for (size, stride) in loops.iter().copied().filter(|(size, _)| *size != 1) {
        match merged.last_mut() {
            Some(outer) if outer.1 == stride * size => *outer = (outer.0 * size, stride),
            _ => merged.push((size, stride)),
        }
    }
    merged
}

/// Product of the loops' sizes.
pub(super) fn count(loops: &[Loop]) -> usize {
    loops.iter().map(|(size, _)| size).product()
}

/// FNV-1a, 64 bits: names must not change with the compiler's version.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
