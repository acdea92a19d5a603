//! What the kernels take of a multiprocessor: registers, memory of a block, and how many blocks fit.
//!
//! The shapes are those of a decoder of 1.3 B parameters: 2048 wide, 4 sequences of 2048 tokens.

use std::fmt::Write;

use meshweave_compiler::cuda::{Precision, Products, TensorCores, kernels_of};
use meshweave_dsl::dtype::{DType, Scalar};
use meshweave_dsl::graph::TensorType;
use meshweave_dsl::op::{AttentionDims, MoeDims, OpKind};
use meshweave_dsl::program::{Action, Buffer, BufferId, ContractIndex, KernelId};

use super::{Device, ty};
use crate::support::nvrtc;
use crate::support::ptx::assemble;

/// A multiprocessor, by the tables of compute capabilities of NVIDIA's CUDA C++ Programming Guide.
struct Chip {
    sm: &'static str,
    compute: &'static str,
    shared_bytes: usize,
    cores: TensorCores,
}

const CHIPS: [Chip; 3] = [
    Chip {
        sm: "sm_80",
        compute: "compute_80",
        shared_bytes: 164 * 1024,
        cores: TensorCores::Warps,
    },
    Chip {
        sm: "sm_90",
        compute: "compute_90",
        shared_bytes: 228 * 1024,
        cores: TensorCores::Warps,
    },
    Chip {
        sm: "sm_90a",
        compute: "compute_90a",
        shared_bytes: 228 * 1024,
        cores: TensorCores::WarpGroups,
    },
];
const N_REGISTERS: usize = 65_536;
const MAX_WARPS: usize = 64;
const MAX_BLOCKS: usize = 32;

impl Chip {
    /// Blocks that fit, by registers (in units of 256 a warp), shared memory (1 KiB of each block is
    /// the system's) and warps.
    fn blocks(&self, n_threads: usize, n_registers: usize, shared_bytes: usize) -> usize {
        let warps = n_threads.div_ceil(32);
        let by_registers = N_REGISTERS / (warps * (32 * n_registers).next_multiple_of(256));
        let by_memory = self.shared_bytes / (shared_bytes.next_multiple_of(128) + 1024);
        by_registers
            .min(by_memory)
            .min(MAX_WARPS / warps)
            .min(MAX_BLOCKS)
    }
}

/// The value of a parameter that a kernel's text defines.
fn parameter(source: &str, name: &str) -> Option<f64> {
    let start = format!("#define {name} ");
    let line = source.lines().find(|line| line.starts_with(&start))?;
    line[start.len()..].trim_end_matches('u').parse().ok()
}

/// Operations for each byte that a block copies from global memory, in its inner loop.
fn intensity(entry: &str, source: &str) -> Option<f64> {
    let of = |name: &str| parameter(source, name);
    let is_bf16 = source.contains("#define IN bf16");
    let bytes = if is_bf16 { 2.0 } else { 4.0 };
    if let (Some(rows), Some(columns)) = (of("TILE_ROWS"), of("TILE_COLUMNS")) {
        return Some(2.0 * rows * columns / ((rows + columns) * bytes));
    }
    let pieces = of("PIECES").map(|pieces| 64.0 * pieces);
    let own = of("OWN").or(pieces).unwrap_or(32.0);
    let (head, value) = (of("HEAD")?, of("VALUE")?);
    // Products of each pair of an owned and a streamed row.
    let lengths = match entry.rsplit_once('_')?.0 {
        "attention" => head + value,
        "attention_grad_keys" => 2.0 * (head + value),
        "attention_grad_queries" => 2.0 * head + value,
        _ => return None,
    };
    Some(2.0 * own * lengths / ((head + value) * bytes))
}

/// Name, action, buffers and precision of what is measured.
type Case = (String, Action, Vec<Buffer>, Precision);

fn contractions(cases: &mut Vec<Case>) {
    for (name, dtype, sums, precision) in [
        ("f32", DType::F32, DType::F32, Precision::F32),
        ("tf32", DType::F32, DType::F32, Precision::Tf32),
        ("bf16", DType::Bf16, DType::Bf16, Precision::F32),
        ("bf16+=f32", DType::Bf16, DType::F32, Precision::F32),
    ] {
        let (m, n, k) = (8192, 5632, 2048);
        for (order, a, b) in [
            ("forward [mk, kn]", [k, 1], [1, n]),
            ("input gradient [mk, nk]", [k, 1], [k, 1]),
            ("weight gradient [km, kn]", [1, m], [1, n]),
        ] {
            let index = |size, a, b, c| ContractIndex { size, a, b, c };
            let mut device = Device::default();
            let mut buffer =
                |dtype, rows, columns| device.declare(&ty(dtype, &[("x", rows), ("y", columns)]));
            let ids = [buffer(dtype, m, k), buffer(dtype, k, n), buffer(sums, m, n)];
            let action = Action::Contract {
                a: ids[0],
                b: ids[1],
                c: ids[2],
                indices: vec![
                    index(m, a[0], 0, n),
                    index(n, 0, b[0], 1),
                    index(k, a[1], b[1], 0),
                ],
                // Gradients of parameters are summed in f32.
                accumulate: sums != dtype,
                bias: None,
            };
            cases.push((format!("{order} {name}"), action, device.buffers, precision));
        }
    }
}

fn attentions(cases: &mut Vec<Case>) {
    for (name, dtype, precision) in [
        ("f32", DType::F32, Precision::F32),
        ("tf32", DType::F32, Precision::Tf32),
        ("bf16", DType::Bf16, Precision::F32),
    ] {
        for head in [64, 128] {
            let dims = AttentionDims {
                seq: "s".into(),
                kv_seq: "t".into(),
                head: "d".into(),
                value: "v".into(),
                scale: Scalar(0.125),
                causal: true,
                offset: 0,
            };
            let heads = [("b", 4), ("h", 1024 / head), ("g", 2)];
            let of = |dtype, seq, n_heads: usize, last: &[(&'static str, usize)]| -> TensorType {
                ty(
                    dtype,
                    &[&heads[..1], &[(seq, 2048)], &heads[1..n_heads], last].concat(),
                )
            };
            let mut device = Device::default();
            let types = [
                of(dtype, "s", 3, &[("d", head)]),
                of(dtype, "t", 2, &[("d", head)]),
                of(dtype, "t", 2, &[("v", head)]),
                of(dtype, "s", 3, &[("v", head)]),
                of(DType::F32, "s", 3, &[]),
            ];
            let [q, k, v, o, lse] = types.each_ref().map(|ty| device.declare(ty));
            let [d_o, dq, dk, dv] = [3, 0, 1, 2].map(|idx| device.declare(&types[idx]));
            let (scratch, kernel) = (BufferId(u32::MAX), KernelId(0));
            let action = Action::AttentionGrad {
                dims: dims.clone(),
                inputs: [q, k, v, o, lse, d_o],
                results: [dq, dk, dv],
                scratch,
                kernel,
            };
            let (label, buffers) = (format!("head {head} {name}"), device.buffers.clone());
            cases.push((label.clone(), action, buffers, precision));
            let action = Action::Attention {
                dims,
                q,
                k,
                v,
                o,
                lse,
                seen: None,
                scratch,
                kernel,
            };
            cases.push((label, action, device.buffers, precision));
        }
    }
}

/// Routines over features of a type; scores and gates are f32.
fn routines(cases: &mut Vec<Case>, features: DType) {
    let wide = |shape: &[(&str, usize)]| ty(features, shape);
    let f32 = |shape: &[(&str, usize)]| ty(DType::F32, shape);
    let i32 = |shape: &[(&str, usize)]| ty(DType::I32, shape);
    let tokens = [("b", 4), ("s", 2048)];
    let with = |last: &[(&'static str, usize)]| [&tokens[..], last].concat();
    let (choice, x) = (with(&[("k", 2)]), wide(&with(&[("d", 2048)])));
    let (expert, gate) = (i32(&choice), f32(&choice));
    let y = wide(&[("e", 8), ("b", 4), ("c", 640), ("d", 2048)]);
    let dims = MoeDims {
        seq: "s".into(),
        choice: "k".into(),
        expert: "e".into(),
        slot: "c".into(),
        n_experts: 8,
        capacity: 640,
        offset: 0,
    };
    let order = ["d", "b", "s"].map(Into::into).to_vec();
    let (e, k) = (|| "e".into(), || "k".into());
    let scores = f32(&with(&[("e", 8)]));
    let slots = OpKind::MoeSlots {
        seq: "s".into(),
        choice: k(),
        n_experts: 8,
        capacity: 640,
    };
    let all: [(OpKind, Vec<&TensorType>, Vec<TensorType>); 8] = [
        (
            OpKind::Transpose { dims: order },
            vec![&x],
            vec![wide(&[("d", 2048), ("b", 4), ("s", 2048)])],
        ),
        (
            OpKind::Slice {
                dim: "d".into(),
                start: 64,
                len: 512,
            },
            vec![&x],
            vec![wide(&with(&[("d", 512)]))],
        ),
        (
            OpKind::TopK {
                dim: e(),
                choice: k(),
                k: 2,
            },
            vec![&scores],
            vec![gate.clone(), expert.clone()],
        ),
        (
            OpKind::TopKGrad {
                dim: e(),
                choice: k(),
                size: 8,
            },
            vec![&gate, &expert],
            vec![scores.clone()],
        ),
        (slots, vec![&expert], vec![expert.clone()]),
        (
            OpKind::MoeDispatch(dims.clone()),
            vec![&x, &expert, &expert],
            vec![y.clone()],
        ),
        (
            OpKind::MoeCombine(dims.clone()),
            vec![&y, &expert, &expert, &gate],
            vec![x.clone()],
        ),
        (
            OpKind::MoeGateGrad(dims),
            vec![&y, &x, &expert, &expert],
            vec![gate.clone()],
        ),
    ];
    for (op, inputs, results) in all {
        let mut device = Device::default();
        let inputs = inputs.into_iter().map(|ty| device.declare(ty)).collect();
        let results = results.iter().map(|ty| device.declare(ty)).collect();
        let action = Action::Routine {
            op,
            inputs,
            results,
        };
        let name = match features {
            DType::F32 => String::new(),
            other => other.to_string(),
        };
        cases.push((name, action, device.buffers, Precision::F32));
    }
}

#[test]
fn no_kernel_spills() {
    let mut cases = Vec::new();
    contractions(&mut cases);
    attentions(&mut cases);
    routines(&mut cases, DType::F32);
    routines(&mut cases, DType::Bf16);
    let mut table = String::from(
        "kernel                 | shapes                        | chip   | threads | registers | shared B | blocks | occupancy | flop/B\n",
    );
    for (name, action, buffers, precision) in cases {
        let kernels = CHIPS.each_ref().map(|chip| {
            let products = Products {
                precision,
                cores: chip.cores,
            };
            kernels_of(&action, &buffers, products).unwrap()
        });
        for idx in 0..kernels[0].len() {
            for (chip, kernels) in CHIPS.iter().zip(&kernels) {
                let kernel = &kernels[idx];
                // Other code of sm_90a is that of sm_90.
                if chip.cores == TensorCores::WarpGroups
                    && !kernel.source.contains("wgmma.mma_async")
                {
                    continue;
                }
                let Some(ptx) = nvrtc::compile(&kernel.source, chip.compute) else {
                    return;
                };
                let Some(all) = assemble(&ptx, chip.sm) else {
                    return;
                };
                let [resources] = all.as_slice() else {
                    panic!("{all:?}")
                };
                assert_eq!(resources.spilled, 0, "{name}: {resources:?}");
                let n_threads = kernel.grid.n_threads();
                let shared = resources.shared + kernel.grid.shared_bytes as usize;
                let blocks = chip.blocks(n_threads, resources.registers, shared);
                assert!(blocks > 0, "{name} does not fit: {resources:?}");
                let occupancy = blocks * n_threads.div_ceil(32) * 100 / MAX_WARPS;
                let short = kernel.entry.rsplit_once('_').unwrap().0;
                let flops = intensity(&kernel.entry, &kernel.source)
                    .map_or("-".into(), |flops| format!("{flops:.1}"));
                writeln!(
                    table,
                    "{short:22} | {name:29} | {:6} | {n_threads:7} | {:9} | {shared:8} | {blocks:6} | {occupancy:7} % | {flops:>6}",
                    chip.sm, resources.registers
                )
                .unwrap();
            }
        }
    }
    insta::assert_snapshot!(table);
}
