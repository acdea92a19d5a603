//! Kernels for GPUs, as far as they go without one: PTX of a whole training step, assembled.
//! That they compute the right values is checked by an interpreter, fragment by fragment, in
//! `fragments`.

use meshweave_compiler::codegen::fuse::{Item, Platform, fuse};
use meshweave_compiler::codegen::kernel::{
    BinaryOp, Elem, Kernel, KernelBuilder, Mutability, ReduceKind, UnaryOp,
};
use meshweave_compiler::differentiate::{Optimizer, differentiate};
use meshweave_compiler::mlir::{self, GpuTarget};
use meshweave_compiler::model::{DecoderConfig, Goal, GoldenSize, build_decoder};
use meshweave_compiler::storage::Storage;
use meshweave_dsl::dtype::DType;

use crate::support::ptx::assemble;

mod wide;

/// The kernels of a training step of the golden model, with activations of a type.
fn kernels(capacity_factor: Option<f64>, dtype: DType) -> Vec<Kernel> {
    let size = GoldenSize::named("small").unwrap();
    let config = DecoderConfig::golden(&size, capacity_factor);
    let forward = build_decoder(&config, size.batch, size.seq, Goal::Training).unwrap();
    let mut graph = differentiate(&forward, &Optimizer::GOLDEN_ADAMW).unwrap();
    if let Some(storage) = Storage::of(&graph, dtype) {
        graph = storage.applied(&graph, |id| graph.ty(id).dtype, |_| DType::F32);
    }
    let mut kernels: Vec<Kernel> = Vec::new();
    for item in fuse(&graph, Platform::Gpu).unwrap() {
        if let Item::Fragment(fragment) = item
            && !kernels
                .iter()
                .any(|other| other.program() == fragment.kernel.program())
        {
            let name = format!("k{}_{}", kernels.len(), fragment.kernel.name());
            kernels.push(fragment.kernel.renamed(name));
        }
    }
    kernels
}

#[test]
fn a_training_step_assembles_without_spills() {
    for target in [GpuTarget::Sm80, GpuTarget::Sm90, GpuTarget::Sm90a] {
        for (capacity_factor, dtype) in [
            (None, DType::F32),
            (Some(2.0), DType::F32),
            (None, DType::Bf16),
            (Some(2.0), DType::Bf16),
        ] {
            let kernels = kernels(capacity_factor, dtype);
            let ptx = mlir::compile_ptx(&kernels, target, &[]).unwrap();
            let Some(all) = assemble(&ptx.text, target.chip()) else {
                return;
            };
            assert_eq!(all.len(), ptx.entries.iter().flatten().count());
            // Sums by column, then rows that are free of one another.
            let norms = ptx.entries.iter().filter(|entries| entries.len() == 2);
            let free = norms.filter(|entries| entries[1].1.blocks > 1);
            assert!(free.count() > 0);
            for resources in &all {
                assert_eq!(resources.spilled, 0, "{resources:?}");
                // 512 threads of 128 registers fill a multiprocessor.
                assert!(resources.registers <= 128, "{resources:?}");
            }
        }
    }
}

/// A softmax over a row that a block shares: a warp's butterfly, the block's memory, barriers.
#[test]
fn softmax_of_a_block() {
    let mut b = KernelBuilder::new("softmax", &[64], 1024);
    let x = b.arg(Elem::F32, Mutability::Read);
    let y = b.arg(Elem::F32, Mutability::Write);
    let access = b.dense(x);
    let v = b.load(access);
    let max = b.reduce(ReduceKind::Max, v);
    let shifted = b.binary(BinaryOp::Sub, v, max);
    let exp = b.unary(UnaryOp::Exp, shifted);
    let sum = b.reduce(ReduceKind::Sum, exp);
    let result = b.binary(BinaryOp::Div, exp, sum);
    let access = b.dense(y);
    b.store(access, result);
    let kernel = b.finish().unwrap();
    let ptx = mlir::compile_ptx(&[kernel], GpuTarget::Sm90, &[]).unwrap();
    insta::assert_snapshot!("softmax_of_a_block", ptx.text);
}
