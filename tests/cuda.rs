//! Kernels in CUDA C++ without a GPU: compiled by NVRTC, run by the interpreter of PTX, and compared
//! with the serial interpreter; assembled by `ptxas`, with what they take of a multiprocessor.

mod attention;
mod contract;
mod resources;
mod routine;

use meshweave_compiler::cuda::{Precision, Products, TensorCores, kernels_of};
use meshweave_dsl::device_code::{Argument, KernelSource};
use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::TensorType;
use meshweave_dsl::program::{Action, Buffer, BufferId};
use meshweave_runtime::reference::Value;

use crate::support::nvrtc;
use crate::support::ptx::{Memory, Module, OFFSET_BITS, Order};

/// Buffers with their contents; results start as what is no number.
#[derive(Default)]
struct Device {
    buffers: Vec<Buffer>,
    bytes: Vec<Vec<u8>>,
    cores: TensorCores,
}

/// What NVRTC compiles for.
fn compute(cores: TensorCores) -> &'static str {
    match cores {
        TensorCores::Warps => "compute_80",
        TensorCores::WarpGroups => "compute_90a",
    }
}

impl Device {
    fn input(&mut self, value: &Value) -> BufferId {
        let bytes = value
            .data()
            .iter()
            .flat_map(|x| encode(value.ty().dtype, *x));
        self.add(value.ty(), bytes.collect())
    }

    fn result(&mut self, ty: &TensorType) -> BufferId {
        let bytes = [0xc0, 0x7f].repeat(ty.n_bytes() / 2);
        self.add(ty, bytes)
    }

    /// A buffer that nothing runs on.
    fn declare(&mut self, ty: &TensorType) -> BufferId {
        self.add(ty, Vec::new())
    }

    fn add(&mut self, ty: &TensorType, bytes: Vec<u8>) -> BufferId {
        let id = BufferId(self.buffers.len() as u32);
        self.buffers.push(Buffer {
            name: format!("b{}", id.index()),
            offset: 0,
            ty: ty.clone(),
            persistent: false,
        });
        self.bytes.push(bytes);
        id
    }

    fn products(&self, precision: Precision) -> Products {
        Products {
            precision,
            cores: self.cores,
        }
    }

    /// Runs an action with both orders of threads; false where there is no compiler.
    #[track_caller]
    fn run(&mut self, action: &Action, precision: Precision) -> bool {
        let kernels = kernels_of(action, &self.buffers, self.products(precision)).unwrap();
        self.launch(&kernels)
    }

    /// Runs kernels with both orders of threads; false where there is no compiler.
    #[track_caller]
    fn launch(&mut self, kernels: &[KernelSource]) -> bool {
        let mut modules = Vec::new();
        for kernel in kernels {
            let Some(ptx) = nvrtc::compile(&kernel.source, compute(self.cores)) else {
                return false;
            };
            modules.push(Module::parse(&ptx));
        }
        // A buffer's address is as little aligned as its place in the arena.
        let addresses: Vec<u64> = (self.buffers.iter().enumerate())
            .map(|(idx, buffer)| ((idx as u64 + 1) << OFFSET_BITS) + buffer.offset as u64 % 256)
            .collect();
        let run = |order: Order| {
            let mut bytes = self.bytes.clone();
            let mut memory = Memory::default();
            for (address, bytes) in addresses.iter().zip(&mut bytes) {
                memory.add(*address, bytes);
            }
            for (kernel, module) in kernels.iter().zip(&modules) {
                let args: Vec<u64> = (kernel.args.iter())
                    .map(|arg| match arg {
                        Argument::Buffer(id) => addresses[id.index()],
                        Argument::Int(value) => *value as u64,
                        Argument::Float(value) => u64::from(value.to_bits()),
                    })
                    .collect();
                module.launch(&kernel.entry, &kernel.grid, &args, &mut memory, order);
            }
            bytes
        };
        let (first, second) = (run(Order::Ascending), run(Order::Descending));
        assert!(first == second, "a race in {}", kernels[0].entry);
        self.bytes = first;
        true
    }

    /// Runs an action and compares results with what they should be.
    #[track_caller]
    fn check(
        &mut self,
        action: &Action,
        precision: Precision,
        expected: &[(BufferId, Value)],
        tolerance: f64,
    ) {
        if !self.run(action, precision) {
            return;
        }
        for (id, expected) in expected {
            let actual = self.value(*id);
            let largest = (expected.data().iter()).fold(1e-30_f64, |top, x| top.max(x.abs()));
            for (at, (a, e)) in actual.data().iter().zip(expected.data()).enumerate() {
                // Written so that what is no number does not pass.
                assert!(
                    (a - e).abs() / largest <= tolerance,
                    "element {at} of buffer {} {} is {a}, should be {e}",
                    id.index(),
                    expected.ty()
                );
            }
        }
    }

    fn value(&self, id: BufferId) -> Value {
        let ty = &self.buffers[id.index()].ty;
        let bytes = self.bytes[id.index()].chunks_exact(ty.dtype.n_bytes());
        let data = bytes.map(|bytes| match ty.dtype {
            DType::I32 => f64::from(i32::from_le_bytes(bytes.try_into().unwrap())),
            DType::F32 => f64::from(f32::from_le_bytes(bytes.try_into().unwrap())),
            _ => {
                let bits = u32::from(u16::from_le_bytes(bytes.try_into().unwrap()));
                f64::from(f32::from_bits(bits << 16))
            }
        });
        Value::new(ty.clone(), data.collect()).unwrap()
    }
}

fn encode(dtype: DType, x: f64) -> Vec<u8> {
    match dtype {
        DType::I32 => (x as i32).to_le_bytes().to_vec(),
        DType::F32 => (x as f32).to_le_bytes().to_vec(),
        // The values of these tests have few enough digits.
        _ => (((x as f32).to_bits() >> 16) as u16).to_le_bytes().to_vec(),
    }
}

fn ty(dtype: DType, shape: &[(&str, usize)]) -> TensorType {
    TensorType::new(dtype, shape.iter().copied())
}

/// Numbers in −1..1 with seven bits, which every element type holds.
fn noise(ty: TensorType, seed: u32) -> Value {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    Value::from_fn(ty, |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        f64::from(state % 129) / 64.0 - 1.0
    })
}
