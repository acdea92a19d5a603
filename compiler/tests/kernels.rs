//! Generated kernels against plain Rust in f64: every instruction, on odd sizes.
#![cfg(feature = "mlir")]
#![allow(clippy::unwrap_used, clippy::panic)]

use std::ffi::c_void;

use meshweave_compiler::codegen::kernel::{
    Elem, Kernel, KernelBuilder, Mutability, ReduceKind, UnaryOp, Val,
};
use meshweave_compiler::mlir::{self, CompileOptions, HostTarget, Stage};

/// Lane counts around the vector widths of all targets.
const LANES: [usize; 9] = [1, 3, 7, 8, 9, 31, 64, 130, 1000];

type KernelFn = unsafe extern "C" fn(*mut *mut c_void, i64, i64);

/// A loaded shared object with one function per kernel.
struct Loaded {
    library: libloading::Library,
    symbols: Vec<String>,
    _directory: tempfile::TempDir,
}

fn load(kernels: &[Kernel]) -> Loaded {
    load_for(kernels, &HostTarget::detect())
}

fn load_for(kernels: &[Kernel], target: &HostTarget) -> Loaded {
    let object = mlir::compile(kernels, target, &CompileOptions::default()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kernels.so");
    mlir::link(&object, &path).unwrap();
    // SAFETY: the object has no initializers.
    let library = unsafe { libloading::Library::new(&path) }.unwrap();
    Loaded {
        library,
        symbols: object.symbols,
        _directory: directory,
    }
}

/// An argument's memory.
enum Buffer {
    F(Vec<f32>),
    I(Vec<i32>),
}

impl Buffer {
    fn f(&self) -> &[f32] {
        match self {
            Self::F(values) => values,
            Self::I(_) => panic!("an i32 buffer"),
        }
    }
}

impl Loaded {
    fn run(&self, idx: usize, args: &mut [Buffer], rows: std::ops::Range<usize>) {
        let mut pointers: Vec<*mut c_void> = args
            .iter_mut()
            .map(|arg| match arg {
                Buffer::F(values) => values.as_mut_ptr().cast(),
                Buffer::I(values) => values.as_mut_ptr().cast(),
            })
            .collect();
        // SAFETY: the symbol has this signature, and the buffers have the sizes of the kernel.
        unsafe {
            let function: libloading::Symbol<KernelFn> =
                self.library.get(self.symbols[idx].as_bytes()).unwrap();
            function(pointers.as_mut_ptr(), rows.start as i64, rows.end as i64);
        }
    }
}

/// A target of x86-64 by its level: 2 has 4 lanes and no fused multiply-add, 3 has 8, 4 has 16.
fn x86_level(level: usize) -> HostTarget {
    HostTarget {
        triple: "x86_64-unknown-linux-gnu".to_string(),
        cpu: format!("x86-64-v{level}"),
        features: String::new(),
        vector_bits: 64 << (level - 1),
        has_fma: level > 2,
    }
}

/// This machine, and the least x86-64 where this is one.
fn runnable_targets() -> Vec<HostTarget> {
    let mut targets = vec![HostTarget::detect()];
    if cfg!(target_arch = "x86_64") {
        targets.push(x86_level(2));
    }
    targets
}

/// Deterministic values in `-scale..scale`.
fn noise(n: usize, seed: u64, scale: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale
        })
        .collect()
}

/// The largest error over the largest expected value.
#[track_caller]
fn assert_close(actual: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len());
    let largest = expected.iter().fold(1e-30_f64, |m, v| m.max(v.abs()));
    for (idx, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        let error = (f64::from(a) - e).abs() / largest;
        assert!(
            error <= tolerance,
            "element {idx}: {a} instead of {e}, error {error:e} of the largest {largest}"
        );
    }
}

/// Kernel of one input and one output of the same shape.
fn map(
    name: &str,
    rows: usize,
    lanes: usize,
    f: impl Fn(&mut KernelBuilder, Val) -> Val,
) -> Kernel {
    let mut b = KernelBuilder::new(name, &[rows], lanes);
    let x = b.arg(Elem::F32, Mutability::Read);
    let y = b.arg(Elem::F32, Mutability::Write);
    let access = b.dense(x);
    let x = b.load(access);
    let v = f(&mut b, x);
    let access = b.dense(y);
    b.store(access, v);
    b.finish().unwrap()
}

fn erf(x: f64) -> f64 {
    // Maclaurin series with compensation of the large terms by f64's width; |x| ≤ 6.
    if x.abs() > 6.0 {
        return x.signum();
    }
    if x.abs() < 2.5 {
        let (mut term, mut sum, mut n) = (x, x, 0.0);
        while term.abs() > 1e-18 * sum.abs().max(1e-300) && n < 200.0 {
            n += 1.0;
            term *= -x * x / n;
            sum += term / (2.0 * n + 1.0);
        }
        return sum * 2.0 / std::f64::consts::PI.sqrt();
    }
    // Continued fraction of erfc.
    let a = x.abs();
    let mut fraction = 0.0;
    for k in (1..120).rev() {
        fraction = f64::from(k) / 2.0 / (a + fraction);
    }
    let erfc = (-a * a).exp() / std::f64::consts::PI.sqrt() / (a + fraction);
    x.signum() * (1.0 - erfc)
}

/// A unary function with its f64 reference and the range of its argument.
type UnaryCase = (UnaryOp, fn(f64) -> f64, f32, f32, f64);

/// Error in units of the last place over a range, and the limits.
#[test]
fn elementary_functions() {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let cases: [UnaryCase; 6] = [
        (UnaryOp::Exp, f64::exp, -86.9, 88.7, 2.0),
        (UnaryOp::Exp, f64::exp, -1.0, 1.0, 2.0),
        (UnaryOp::Log, f64::ln, 1e-30, 1e30, 2.0),
        (UnaryOp::Tanh, f64::tanh, -9.0, 9.0, 6.0),
        (UnaryOp::Erf, erf, -5.0, 5.0, 8.0),
        (UnaryOp::Sigmoid, sigmoid, -20.0, 20.0, 4.0),
    ];
    let n = 20_000;
    let kernels: Vec<Kernel> = cases
        .iter()
        .enumerate()
        .map(|(idx, (op, ..))| map(&format!("f{idx}"), 1, n, |b, x| b.unary(*op, x)))
        .collect();
    let loaded: Vec<Loaded> = runnable_targets()
        .iter()
        .map(|target| load_for(&kernels, target))
        .collect();
    for (idx, (op, reference, low, high, ulps)) in cases.into_iter().enumerate() {
        let x: Vec<f32> = if op == UnaryOp::Log {
            let (low, high) = (low.ln(), high.ln());
            (0..n)
                .map(|i| (low + (high - low) * i as f32 / n as f32).exp())
                .collect()
        } else {
            (0..n)
                .map(|i| low + (high - low) * i as f32 / n as f32)
                .collect()
        };
        for loaded in &loaded {
            let mut args = [Buffer::F(x.clone()), Buffer::F(vec![0.0; n])];
            loaded.run(idx, &mut args, 0..1);
            let mut worst = (0.0, 0.0, 0.0);
            for (&x, &y) in x.iter().zip(args[1].f()) {
                let expected = reference(f64::from(x));
                let magnitude = (expected.abs() as f32).max(f32::MIN_POSITIVE);
                let ulp = f64::from(f32::from_bits(magnitude.to_bits() + 1) - magnitude);
                let error = (f64::from(y) - expected).abs() / ulp;
                // A NaN must not hide.
                if error.is_nan() || error > worst.0 {
                    worst = (error, x, y);
                }
            }
            assert!(
                worst.0 <= ulps,
                "{op:?} is off by {:.1} ulp at {}: {}",
                worst.0,
                worst.1,
                worst.2
            );
        }
    }
}

/// Bits at the edges: infinities, zeros, overflow, NaN.
#[test]
fn limits() {
    let ops = [
        UnaryOp::Exp,
        UnaryOp::Log,
        UnaryOp::Tanh,
        UnaryOp::Erf,
        UnaryOp::Sigmoid,
        UnaryOp::Rsqrt,
    ];
    let inf = f32::INFINITY;
    let x = vec![-inf, -200.0, -0.0, 0.0, 200.0, inf, f32::NAN, -1e-40];
    let mut kernels: Vec<Kernel> = ops
        .iter()
        .map(|op| map(&format!("{op:?}"), 1, x.len(), |b, x| b.unary(*op, x)))
        .collect();
    kernels.push(map("relu", 1, x.len(), KernelBuilder::relu));
    let loaded = load(&kernels);
    let mut table = String::new();
    for (idx, kernel) in kernels.iter().enumerate() {
        let mut args = [Buffer::F(x.clone()), Buffer::F(vec![0.0; x.len()])];
        loaded.run(idx, &mut args, 0..1);
        table += &format!("{}: {:?}\n", kernel.name(), args[1].f());
    }
    insta::assert_snapshot!(format!("x: {x:?}\n{table}"));
}

#[test]
fn activations_and_gradients() {
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let phi = |x: f64| 0.5 * (1.0 + erf(x / 2f64.sqrt()));
    let root = (2.0 / std::f64::consts::PI).sqrt();
    let gelu_tanh = move |x: f64| 0.5 * x * (1.0 + (root * (x + 0.044715 * x * x * x)).tanh());
    type Builder = fn(&mut KernelBuilder, Val, Val) -> Val;
    type Reference = Box<dyn Fn(f64) -> f64>;
    let cases: Vec<(&str, Builder, Reference)> = vec![
        ("silu", |b, x, _| b.silu(x), Box::new(silu)),
        ("gelu", |b, x, _| b.gelu(x), Box::new(move |x| x * phi(x))),
        ("gelu_tanh", |b, x, _| b.gelu_tanh(x), Box::new(gelu_tanh)),
        ("relu", |b, x, _| b.relu(x), Box::new(|x| x.max(0.0))),
    ];
    let grads: Vec<Builder> = vec![
        |b, x, dy| b.silu_grad(x, dy),
        |b, x, dy| b.gelu_grad(x, dy),
        |b, x, dy| b.gelu_tanh_grad(x, dy),
        |b, x, dy| b.relu_grad(x, dy),
    ];
    let rows = 3;
    let mut kernels = Vec::new();
    for lanes in LANES {
        for ((name, forward, _), backward) in cases.iter().zip(&grads) {
            let mut b = KernelBuilder::new(format!("{name}_{lanes}"), &[rows], lanes);
            let args = [(); 2].map(|()| b.arg(Elem::F32, Mutability::Read));
            let outs = [(); 2].map(|()| b.arg(Elem::F32, Mutability::Write));
            let access = args.map(|arg| b.dense(arg));
            let [x, dy] = access.map(|access| b.load(access));
            let y = forward(&mut b, x, dy);
            let dx = backward(&mut b, x, dy);
            for (out, v) in outs.into_iter().zip([y, dx]) {
                let access = b.dense(out);
                b.store(access, v);
            }
            kernels.push(b.finish().unwrap());
        }
    }
    let loaded = load(&kernels);
    let mut idx = 0;
    for lanes in LANES {
        let n = rows * lanes;
        let (x, dy) = (noise(n, 1, 6.0), noise(n, 2, 1.0));
        for (_, _, reference) in &cases {
            let mut args = [
                Buffer::F(x.clone()),
                Buffer::F(dy.clone()),
                Buffer::F(vec![7.0; n]),
                Buffer::F(vec![7.0; n]),
            ];
            loaded.run(idx, &mut args, 0..2);
            assert_eq!(args[2].f()[2 * lanes], 7.0, "row 2 was not asked for");
            loaded.run(idx, &mut args, 2..3);
            let y: Vec<f64> = x.iter().map(|&x| reference(f64::from(x))).collect();
            assert_close(args[2].f(), &y, 1e-6);
            let h = 1e-6;
            let dx: Vec<f64> = x
                .iter()
                .zip(&dy)
                .map(|(&x, &dy)| {
                    let x = f64::from(x);
                    f64::from(dy) * (reference(x + h) - reference(x - h)) / (2.0 * h)
                })
                .collect();
            assert_close(args[3].f(), &dx, 2e-6);
            idx += 1;
        }
    }
}

#[test]
fn equal_programs_share_a_symbol() {
    let kernels = [
        map("first", 4, 20, KernelBuilder::relu),
        map("second", 4, 20, KernelBuilder::relu),
        map("third", 4, 21, KernelBuilder::relu),
    ];
    let object =
        mlir::compile(&kernels, &HostTarget::detect(), &CompileOptions::default()).unwrap();
    assert_eq!(object.symbols, ["first", "first", "third"]);
}

/// Every stage as text, of a kernel with a reduction and of one with a tail.
#[test]
fn stages() {
    let target = x86_level(3);
    let mut b = KernelBuilder::new("rms", &[4], 32);
    let (x, y) = (
        b.arg(Elem::F32, Mutability::Read),
        b.arg(Elem::F32, Mutability::Write),
    );
    let access = b.dense(x);
    let x = b.load(access);
    let square = b.mul(x, x);
    let sum = b.reduce(ReduceKind::Sum, square);
    let mean = b.scale(sum, 1.0 / 32.0);
    let rstd = b.unary(UnaryOp::Rsqrt, mean);
    let v = b.mul(x, rstd);
    let access = b.dense(y);
    b.store(access, v);
    let kernels = [b.finish().unwrap(), map("relu", 1, 11, KernelBuilder::relu)];
    let options = CompileOptions {
        n_threads: 1,
        stages: Stage::all(),
    };
    let object = mlir::compile(&kernels, &target, &options).unwrap();
    let stages: Vec<String> = object.stages.iter().map(|(s, _)| s.to_string()).collect();
    insta::assert_snapshot!("stage_names", stages.join("\n"));
    let programs = kernels.each_ref().map(ToString::to_string).join("\n");
    insta::assert_snapshot!("stage_kernel", programs);
    insta::assert_snapshot!("stage_mlir_after_cse", object.stages[1].1);
    assert!(object.stages.iter().all(|(_, text)| text.contains("rms")));
    // The widest registers are compiled for wherever the tests run.
    let object = mlir::compile(&kernels, &x86_level(4), &options).unwrap();
    let (_, asm) = object.stages.last().unwrap();
    assert!(asm.contains("zmm"));
}

/// The softmax kernels of blockwise attention against the formulas, block after block.
#[test]
fn attention_softmax_blocks() {
    use meshweave_compiler::codegen::attention::{
        Sight, attention_softmax, attention_softmax_grad,
    };
    use meshweave_dsl::dtype::{DType, Scalar};
    use meshweave_dsl::graph::TensorType;
    use meshweave_dsl::op::{ATTENTION_BLOCK_ROWS, AttentionDims};

    let mut cases = Vec::new();
    let mut kernels = Vec::new();
    for (kv_len, offset, causal) in [
        (5, 0, true),
        // The last row fills the vectors: a masked one follows that holds nothing.
        (8, 0, true),
        (16, 8, true),
        (64, 0, true),
        (150, 10, true),
        (150, 0, false),
        (31, 2, false),
    ] {
        let dims = AttentionDims {
            seq: "seq".into(),
            kv_seq: "kv_seq".into(),
            head: "head".into(),
            value: "value".into(),
            scale: Scalar(0.3),
            causal,
            offset,
        };
        let seq = kv_len - offset;
        let k = TensorType::new(DType::F32, [("kv_seq", kv_len), ("heads", 3), ("head", 4)]);
        let lse = TensorType::new(DType::F32, [("seq", seq), ("heads", 3)]);
        kernels.push(attention_softmax(&dims, &k, &lse, Sight::ByPlace).unwrap());
        kernels.push(attention_softmax_grad(&dims, &k, &lse).unwrap());
        cases.push((kv_len, seq, offset, causal));
    }
    let loaded = load(&kernels);
    for (case_idx, (kv_len, seq, offset, causal)) in cases.into_iter().enumerate() {
        let products = noise(seq * kv_len, 5, 20.0);
        let dp = noise(seq * kv_len, 6, 1.0);
        let d = noise(seq, 7, 1.0);
        let visible = |row: usize| if causal { offset + row + 1 } else { kv_len };
        let mut lse = vec![0.0_f32; seq * 3];
        for first in (0..seq).step_by(ATTENTION_BLOCK_ROWS) {
            let rows = first..(first + ATTENTION_BLOCK_ROWS).min(seq);
            let extent = visible(rows.end - 1).div_ceil(8) * 8;
            let extent = extent.min(kv_len);
            let place = vec![(first + offset) as i32, extent as i32];
            let block = |values: &[f32]| {
                let mut block = values[rows.start * kv_len..rows.end * kv_len].to_vec();
                // What is not visible must not be read.
                for (row, values) in block.chunks_mut(kv_len).enumerate() {
                    values[visible(rows.start + row)..].fill(f32::NAN);
                }
                block
            };
            let mut args = [
                Buffer::F(block(&products)),
                Buffer::F(lse[first * 3..].to_vec()),
                Buffer::I(place.clone()),
            ];
            loaded.run(2 * case_idx, &mut args, 0..rows.len());
            let mut expected_p = Vec::new();
            let mut expected_ds = Vec::new();
            let mut expected_lse = Vec::new();
            for row in rows.clone() {
                let scores: Vec<f64> = products[row * kv_len..][..visible(row)]
                    .iter()
                    .map(|&s| f64::from(s) * 0.3)
                    .collect();
                let max = scores.iter().fold(f64::MIN, |m, s| m.max(*s));
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                expected_lse.push(max + sum.ln());
                for column in 0..extent {
                    let p = scores.get(column).map_or(0.0, |s| (s - max).exp() / sum);
                    expected_p.push(p);
                    let dp = f64::from(dp[row * kv_len + column]);
                    expected_ds.push(0.3 * p * (dp - f64::from(d[row])));
                }
            }
            let written = |buffer: &Buffer| -> Vec<f32> {
                buffer
                    .f()
                    .chunks(kv_len)
                    .flat_map(|row| row[..extent].to_vec())
                    .collect()
            };
            assert_close(&written(&args[0]), &expected_p, 2e-6);
            let lse_block: Vec<f32> = args[1].f().iter().step_by(3).copied().collect();
            assert_close(&lse_block[..rows.len()], &expected_lse, 1e-6);
            let Buffer::F(values) = &args[1] else {
                panic!()
            };
            lse[first * 3..].copy_from_slice(values);

            let mut args = [
                Buffer::F(block(&products)),
                Buffer::F(block(&dp)),
                Buffer::F(lse[first * 3..].to_vec()),
                Buffer::F(d[rows.clone()].to_vec()),
                Buffer::I(place),
            ];
            loaded.run(2 * case_idx + 1, &mut args, 0..rows.len());
            assert_close(&written(&args[0]), &expected_p, 5e-6);
            assert_close(&written(&args[1]), &expected_ds, 5e-6);
        }
    }
}
