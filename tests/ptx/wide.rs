//! Accesses of several neighbors: where they occur, and that rows of every length are computed.

use meshweave_compiler::codegen::kernel::{
    Access, BinaryOp, Elem, Kernel, KernelBuilder, Mutability, ReduceKind, StartFrom, UnaryOp,
};
use meshweave_compiler::codegen::launch::Launch;
use meshweave_compiler::mlir::{self, GpuTarget};

use crate::support::ptx::{Module, Order};

const N_ROWS: usize = 6;

/// `y = x / √(Σ x²) · w`, with `x` and `y` of an element, and `Σ x` over rows in `z`; accesses to `x` are
/// changed by `change`.
fn norm(lanes: usize, elem: Elem, accumulates: bool, change: fn(Access) -> Access) -> Kernel {
    let mut b = KernelBuilder::new("norm", &[N_ROWS], lanes);
    let x = b.arg(elem, Mutability::Read);
    let w = b.arg(Elem::F32, Mutability::Read);
    let y = b.arg(elem, Mutability::Write);
    let access = change(b.dense(x));
    let x = b.load(access);
    let square = b.binary(BinaryOp::Mul, x, x);
    let sum = b.reduce(ReduceKind::Sum, square);
    let scale = b.unary(UnaryOp::Rsqrt, sum);
    let access = b.per_lane(w);
    let w = b.load(access);
    let normed = b.binary(BinaryOp::Mul, x, scale);
    let scaled = b.binary(BinaryOp::Mul, normed, w);
    let access = b.dense(y);
    b.store(access, scaled);
    if accumulates {
        let z = b.arg(Elem::F32, Mutability::Write);
        let access = b.per_lane(z);
        b.accumulate(access, ReduceKind::Sum, StartFrom::Identity, x);
    }
    b.finish().unwrap()
}

/// The PTX of a kernel, and its launches.
fn ptx(kernel: &Kernel) -> (String, Vec<(String, Launch)>) {
    let mut ptx = mlir::compile_ptx(std::slice::from_ref(kernel), GpuTarget::Sm90, &[]).unwrap();
    (ptx.text, ptx.entries.remove(0))
}

/// Words of memory that hold these values, which bf16 represents.
fn words(values: &[f32], elem: Elem) -> Vec<u32> {
    let bits = values.iter().map(|value| value.to_bits());
    match elem {
        Elem::Bf16 => {
            let halves: Vec<u32> = bits.map(|bits| bits >> 16).collect();
            let pairs = halves
                .chunks(2)
                .map(|pair| pair[0] | pair.get(1).unwrap_or(&0) << 16);
            pairs.collect()
        }
        _ => bits.collect(),
    }
}

fn values(words: &[u32], elem: Elem) -> Vec<f32> {
    let values = words.iter().flat_map(|word| match elem {
        Elem::Bf16 => vec![word << 16, word & 0xffff_0000],
        _ => vec![*word],
    });
    values.map(f32::from_bits).collect()
}

/// Runs a kernel of `norm`, in both orders of threads, and compares it with its definition.
fn check(lanes: usize, elem: Elem, accumulates: bool) {
    let kernel = norm(lanes, elem, accumulates, |access| access);
    let (text, launches) = ptx(&kernel);
    let module = Module::parse(&text);
    let n = N_ROWS * lanes;
    let x: Vec<f32> = (0..n)
        .map(|i| ((i * 37 % 101) as f32 - 50.0) / 32.0)
        .collect();
    let w: Vec<f32> = (0..lanes).map(|i| (i % 7) as f32 - 3.0).collect();
    let tolerance = if elem == Elem::Bf16 {
        1.0 / 256.0
    } else {
        1e-5
    };
    let close = |found: f32, wanted: f64, i: usize| {
        let error = (f64::from(found) - wanted).abs();
        assert!(
            error <= tolerance * wanted.abs().max(0.05),
            "{lanes} lanes of {elem:?}: element {i} is {found}, not {wanted}"
        );
    };
    for order in [Order::Ascending, Order::Descending] {
        let mut buffers = vec![words(&x, elem), words(&w, Elem::F32), vec![0; n]];
        let n_words = buffers[0].len();
        buffers[2].truncate(n_words);
        let mut args = vec![0, 1, 2];
        if accumulates {
            buffers.push(vec![0; lanes]);
            args.push(3);
        }
        for (entry, launch) in &launches {
            module.run(entry, *launch, &args, &mut buffers, order);
        }
        let y = values(&buffers[2], elem);
        for (row, x) in x.chunks(lanes).enumerate() {
            let square: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
            for (lane, x) in x.iter().enumerate() {
                let wanted = f64::from(*x) / square.sqrt() * f64::from(w[lane]);
                close(y[row * lanes + lane], wanted, row * lanes + lane);
            }
        }
        for (lane, z) in buffers.get(3).into_iter().flatten().enumerate() {
            let wanted: f64 = x
                .iter()
                .skip(lane)
                .step_by(lanes)
                .map(|x| f64::from(*x))
                .sum();
            close(f32::from_bits(*z), wanted, lane);
        }
    }
}

/// One thread a group of lanes, several groups a thread in flight, and a rest; warps and blocks.
#[test]
fn rows_of_any_length() {
    for lanes in [37, 40, 64, 96, 250, 256, 264, 1000, 1024, 2048, 4608] {
        for elem in [Elem::F32, Elem::Bf16] {
            check(lanes, elem, false);
        }
    }
    for lanes in [40, 264, 2048] {
        for elem in [Elem::F32, Elem::Bf16] {
            check(lanes, elem, true);
        }
    }
}

/// The widest loads and stores that a kernel has, in bytes of one element and their number.
fn widest(text: &str) -> [String; 2] {
    ["ld.global", "st.global"].map(|name| {
        let accesses = text
            .lines()
            .filter_map(|line| line.trim().split('\t').next());
        let mut names: Vec<&str> = accesses
            .filter(|access| access.trim().starts_with(name))
            .map(str::trim)
            .collect();
        names.sort_unstable_by_key(|name| (name.contains(".v2"), name.contains(".v4"), *name));
        names.last().unwrap_or(&"").to_string()
    })
}

/// Sixteen bytes a thread where rows and offsets allow it, less where they do not.
#[test]
fn accesses_are_as_wide_as_rows_allow() {
    let moved = |lanes, elem, change| {
        let (text, launches) = ptx(&norm(lanes, elem, false, change));
        (launches[0].1.adjacent, widest(&text))
    };
    let same = |access: Access| access;
    let all = [
        ("4096 of bf16", moved(4096, Elem::Bf16, same)),
        ("4096 of f32", moved(4096, Elem::F32, same)),
        ("128 of bf16", moved(128, Elem::Bf16, same)),
        ("1004 of bf16", moved(1004, Elem::Bf16, same)),
        ("1001 of bf16", moved(1001, Elem::Bf16, same)),
        (
            "4096 of bf16, at 2",
            moved(4096, Elem::Bf16, |access| access.shifted(2)),
        ),
        (
            "4096 of f32, at 1",
            moved(4096, Elem::F32, |access| access.shifted(1)),
        ),
    ];
    let lines =
        all.map(|(rows, (n, [loads, stores]))| format!("{rows}: {n} lanes, {loads}, {stores}"));
    insta::assert_snapshot!("accesses", lines.join("\n"));
}
