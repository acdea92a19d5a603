//! Code for a GPU, as an artifact carries it beside its program.
//!
//! Enters: generated kernels with their launches. Leaves: what a machine with a GPU needs to run the
//! program without the compiler.
//! Invariant: every launch names a module and an entry of it, and its arguments stand in the order of
//! the entry's parameters; the launches of an instruction follow one another on one stream.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::program::BufferId;

/// Version of the form; code of another version is refused.
pub const DEVICE_CODE_VERSION: u32 = 2;

/// The shape of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Grid {
    pub blocks: [u32; 3],
    /// Threads of a block.
    pub threads: [u32; 3],
    /// Bytes of a block's memory besides what the kernel declares itself.
    #[serde(default)]
    pub shared_bytes: u32,
}

impl Grid {
    /// So many blocks of so many threads in a row.
    pub fn linear(blocks: u32, threads: u32) -> Self {
        Self {
            blocks: [blocks, 1, 1],
            threads: [threads, 1, 1],
            shared_bytes: 0,
        }
    }

    /// Threads of a block.
    pub fn n_threads(&self) -> usize {
        self.threads.iter().map(|n| *n as usize).product()
    }
}

/// An argument of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Argument {
    /// The buffer's address: a pointer.
    Buffer(BufferId),
    /// A `long long`.
    Int(i64),
    /// A `float`.
    Float(f32),
}

/// A kernel in CUDA C++, and how an instruction launches it.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelSource {
    /// Name of an `extern "C" __global__` function of the source.
    pub entry: String,
    /// A whole translation unit that includes nothing.
    pub source: String,
    pub grid: Grid,
    /// One a parameter, in order.
    pub args: Vec<Argument>,
}

/// The code of all kernels of a program, for one kind of GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceCode {
    pub version: u32,
    /// What it is compiled for, as NVIDIA writes it: `sm_90`.
    pub target: String,
    pub modules: Vec<Module>,
    /// The program's generated kernels, in the order of their ids.
    pub kernels: Vec<GeneratedKernel>,
    /// For each rank and each of its instructions that is no generated kernel, collective or message,
    /// its launches; empty for the others.
    pub ranks: Vec<Vec<Vec<Launch>>>,
}

/// Code that is loaded as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Module {
    /// CUDA C++, where it was written in that; compiled when it is loaded, unless `ptx` is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ptx: Option<String>,
}

/// A function of a module with the shape of its launch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryPoint {
    /// Index among [`DeviceCode::modules`].
    pub module: usize,
    pub name: String,
    pub grid: Grid,
}

/// A kernel of the program: it takes its buffers' addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GeneratedKernel {
    /// Launched one after another, each with all arguments.
    pub entries: Vec<EntryPoint>,
    /// For each argument, whether it is written.
    pub writes: Vec<bool>,
}

/// One launch of an instruction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Launch {
    pub entry: EntryPoint,
    pub args: Vec<Argument>,
}

impl DeviceCode {
    /// Code for `target` that holds nothing yet but the generated kernels: one module of PTX.
    pub fn of_kernels(target: &str, ptx: String, kernels: Vec<GeneratedKernel>) -> Self {
        Self {
            version: DEVICE_CODE_VERSION,
            target: target.into(),
            kernels,
            modules: vec![Module {
                source: None,
                ptx: Some(ptx),
            }],
            ranks: Vec::new(),
        }
    }

    /// Adds a rank's launches, an element an instruction; equal sources become one module.
    pub fn add_rank(&mut self, instructions: Vec<Vec<KernelSource>>) {
        let known = self.modules.iter().enumerate();
        let mut modules: BTreeMap<String, usize> = known
            .filter_map(|(idx, module)| Some((module.source.clone()?, idx)))
            .collect();
        let mut launch = |kernel: KernelSource| {
            let module = *modules.entry(kernel.source).or_insert_with_key(|source| {
                self.modules.push(Module {
                    source: Some(source.clone()),
                    ptx: None,
                });
                self.modules.len() - 1
            });
            Launch {
                entry: EntryPoint {
                    module,
                    name: kernel.entry,
                    grid: kernel.grid,
                },
                args: kernel.args,
            }
        };
        let rank = instructions
            .into_iter()
            .map(|kernels| kernels.into_iter().map(&mut launch).collect());
        let rank = rank.collect();
        self.ranks.push(rank);
    }
}
