//! Contractions in every memory order, on plain and on tensor cores.

use meshweave_compiler::cuda::{Precision, TensorCores, kernels_of};
use meshweave_dsl::device_code::Grid;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::TensorType;
use meshweave_dsl::op::{BinaryFn, OpKind};
use meshweave_dsl::program::{Action, Bias, BufferId, ContractIndex};
use meshweave_runtime::reference::{Value, evaluate_op};

use super::{Device, noise, ty};

/// The loops of an einsum by the names of dims.
fn indices(a: &TensorType, b: &TensorType, c: &TensorType) -> Vec<ContractIndex> {
    let stride = |ty: &TensorType, dim| ty.position(dim).map_or(0, |at| ty.strides()[at]);
    let mut all: Vec<ContractIndex> = Vec::new();
    let mut seen = Vec::new();
    for (dim, size) in c.shape.iter().chain(&a.shape).chain(&b.shape) {
        if !seen.contains(&dim) {
            seen.push(dim);
            all.push(ContractIndex {
                size: *size,
                a: stride(a, dim),
                b: stride(b, dim),
                c: stride(c, dim),
            });
        }
    }
    all
}

/// A bias in the buffer `id` to a result of type `c` in a contraction of `indices`, whose first loops are
/// the result's.
fn along(bias: &TensorType, id: BufferId, c: &TensorType, indices: &[ContractIndex]) -> Bias {
    let stride = |dim| bias.position(dim).map_or(0, |at| bias.strides()[at]);
    let mut strides: Vec<usize> = c.dims().map(stride).collect();
    strides.resize(indices.len(), 0);
    Bias {
        buffer: id,
        strides,
    }
}

/// Computes `a, b -> out`, each a list of one-letter dims, with dims of these sizes; the text of its kernel.
#[track_caller]
fn check(
    dims: [&str; 3],
    sizes: &[(char, usize)],
    kind: Kind,
    accumulate: bool,
    offsets: [usize; 3],
) -> String {
    check_biased(dims, "", sizes, kind, accumulate, offsets)
}

/// The same with a bias of these dims, where there are some.
#[track_caller]
fn check_biased(
    [a, b, out]: [&str; 3],
    bias: &str,
    sizes: &[(char, usize)],
    Kind {
        dtype,
        precision,
        cores,
    }: Kind,
    accumulate: bool,
    offsets: [usize; 3],
) -> String {
    let of = |dtype: DType, dims: &str| {
        let size = |dim: char| sizes.iter().find(|(name, _)| *name == dim).unwrap().1;
        let names: Vec<String> = dims.chars().map(String::from).collect();
        let shape: Vec<(&str, usize)> = (names.iter().map(String::as_str))
            .zip(dims.chars().map(size))
            .collect();
        ty(dtype, &shape)
    };
    let (x, y) = (noise(of(dtype, a), 1), noise(of(dtype, b), 2));
    let as_f32 = |value: &Value, dims: &str| {
        Value::new(of(DType::F32, dims), value.data().to_vec()).unwrap()
    };
    let kind = OpKind::Contract {
        out: out.chars().map(|dim| dim.to_string().into()).collect(),
    };
    let mut expected = evaluate_op(&kind, &[&as_f32(&x, a), &as_f32(&y, b)])
        .unwrap()
        .remove(0);
    let mut device = Device {
        cores,
        ..Device::default()
    };
    let (a_id, b_id) = (device.input(&x), device.input(&y));
    let c_id = if accumulate {
        let old = noise(expected.ty().clone(), 3);
        for (sum, old) in expected.data_mut().iter_mut().zip(old.data()) {
            *sum += old;
        }
        device.input(&old)
    } else {
        device.result(expected.ty())
    };
    for (buffer, offset) in device.buffers.iter_mut().zip(offsets) {
        buffer.offset = offset;
    }
    let indices = indices(x.ty(), y.ty(), expected.ty());
    let bias = (!bias.is_empty()).then(|| noise(of(DType::F32, bias), 4));
    let bias = bias.map(|bias| {
        let kind = OpKind::Binary(BinaryFn::Add);
        expected = evaluate_op(&kind, &[&expected, &bias]).unwrap().remove(0);
        along(bias.ty(), device.input(&bias), expected.ty(), &indices)
    });
    let action = Action::Contract {
        a: a_id,
        b: b_id,
        c: c_id,
        indices,
        accumulate,
        bias,
    };
    // Operands are exact in every element type; sums are f32.
    device.check(&action, precision, &[(c_id, expected)], 1e-6);
    let mut kernels = kernels_of(&action, &device.buffers, device.products(precision)).unwrap();
    kernels.remove(0).source
}

/// A product of bf16 that is stored as bf16, neighbors two at a time or one by one.
#[test]
fn bf16_results() {
    for (n, cores) in [
        (40, TensorCores::Warps),
        (37, TensorCores::Warps),
        (40, TensorCores::WarpGroups),
    ] {
        let (x, y) = (
            noise(ty(DType::Bf16, &[("m", 70), ("k", 32)]), 1),
            noise(ty(DType::Bf16, &[("k", 32), ("n", n)]), 2),
        );
        let as_f32 = |value: &Value| {
            let ty = TensorType {
                dtype: DType::F32,
                ..value.ty().clone()
            };
            Value::new(ty, value.data().to_vec()).unwrap()
        };
        let kind = OpKind::Contract {
            out: vec!["m".into(), "n".into()],
        };
        let product = evaluate_op(&kind, &[&as_f32(&x), &as_f32(&y)]).unwrap();
        let vector = noise(ty(DType::Bf16, &[("n", n)]), 3);
        let add = OpKind::Binary(BinaryFn::Add);
        let sum = evaluate_op(&add, &[&product[0], &as_f32(&vector)]).unwrap();
        for (expected, is_biased) in [(&product[0], false), (&sum[0], true)] {
            let mut device = Device {
                cores,
                ..Device::default()
            };
            let (a, b) = (device.input(&x), device.input(&y));
            let c = device.result(&ty(DType::Bf16, &[("m", 70), ("n", n)]));
            let indices = indices(x.ty(), y.ty(), expected.ty());
            let bias = is_biased.then(|| {
                let id = device.input(&vector);
                along(vector.ty(), id, expected.ty(), &indices)
            });
            let action = Action::Contract {
                a,
                b,
                c,
                indices,
                accumulate: false,
                bias,
            };
            // Eight bits of significand.
            let expected = [(c, expected.clone())];
            device.check(&action, Precision::F32, &expected, 1.0 / 256.0);
        }
    }
}

/// What products are of, and how they are made.
#[derive(Clone, Copy)]
struct Kind {
    dtype: DType,
    precision: Precision,
    cores: TensorCores,
}

const PLAIN: Kind = Kind {
    dtype: DType::F32,
    precision: Precision::F32,
    cores: TensorCores::Warps,
};
const TF32: Kind = Kind {
    precision: Precision::Tf32,
    ..PLAIN
};
const BF16: Kind = Kind {
    dtype: DType::Bf16,
    ..PLAIN
};
const WARP_GROUPS: Kind = Kind {
    cores: TensorCores::WarpGroups,
    ..BF16
};
const KINDS: [Kind; 4] = [PLAIN, TF32, BF16, WARP_GROUPS];

#[test]
fn memory_orders() {
    let sizes = [('m', 72), ('n', 40), ('k', 56)];
    for kind in KINDS {
        for a in ["mk", "km"] {
            for b in ["kn", "nk"] {
                for c in ["mn", "nm"] {
                    check([a, b, c], &sizes, kind, false, [0; 3]);
                }
            }
        }
    }
}

/// Sizes that no tile divides, so that copies are of one element and borders are ragged.
#[test]
fn odd_sizes() {
    let sizes = [('m', 67), ('n', 5), ('k', 35)];
    for kind in KINDS {
        for (a, b) in [("mk", "kn"), ("km", "nk")] {
            check([a, b, "mn"], &sizes, kind, true, [0; 3]);
        }
    }
    for sizes in [
        [('m', 1), ('n', 1), ('k', 1)],
        [('m', 1), ('n', 130), ('k', 3)],
    ] {
        check(["mk", "kn", "mn"], &sizes, TF32, false, [0; 3]);
    }
}

/// A bias along either side of the product, over one dim or several, with tiles that are full and that
/// are not, where the result is replaced and where it is added to.
#[test]
fn biases() {
    let full = [('m', 64), ('n', 128), ('k', 32)];
    let ragged = [('m', 67), ('n', 5), ('k', 35)];
    let heads = [('b', 2), ('s', 20), ('h', 4), ('d', 16), ('e', 24)];
    for kind in KINDS {
        for accumulate in [false, true] {
            for sizes in [&full, &ragged] {
                for (out, bias) in [("mn", "n"), ("nm", "m"), ("mn", "m")] {
                    let dims = ["mk", "kn", out];
                    check_biased(dims, bias, sizes, kind, accumulate, [0; 3]);
                }
            }
            let dims = ["bse", "ehd", "bshd"];
            check_biased(dims, "hd", &heads, kind, accumulate, [0; 3]);
        }
    }
}

/// Operands that begin at places to which wide copies would be unaligned.
#[test]
fn unaligned_operands() {
    let sizes = [('m', 64), ('n', 64), ('k', 32)];
    for kind in KINDS {
        for offsets in [[4, 8, 4], [8, 2 * kind.dtype.n_bytes(), 12]] {
            check(["mk", "kn", "mn"], &sizes, kind, true, offsets);
        }
    }
}

/// Batches, several loops of a role, summed loops of one operand alone, an outer product.
#[test]
fn many_loops() {
    let sizes = [
        ('b', 3),
        ('s', 20),
        ('h', 4),
        ('d', 16),
        ('e', 24),
        ('f', 2),
    ];
    for kind in KINDS {
        for dims in [
            // Heads of a projection, forward, and both gradients.
            ["bse", "ehd", "bshd"],
            ["bshd", "ehd", "bse"],
            ["bse", "bshd", "ehd"],
            // A product of each batch, and of each expert with a batch inside.
            ["bsd", "bed", "bse"],
            ["hbsd", "hde", "hbse"],
            ["bshd", "bsed", "bshe"],
            // Sums over what only one operand has; an outer product; a product of vectors.
            ["bsd", "e", "be"],
            ["bs", "e", "bse"],
            ["sd", "sd", "f"],
        ] {
            if dims[2]
                .chars()
                .all(|dim| dims[0].contains(dim) || dims[1].contains(dim))
            {
                check(dims, &sizes, kind, false, [0; 3]);
            }
        }
        check(["sd", "sd", ""], &sizes, kind, true, [0; 3]);
    }
}

/// Warp groups, with rings that go round several times, borders on every side, each size of tile, and operands
/// that they leave to warps.
#[test]
fn warp_groups() {
    let sizes = [('m', 136), ('n', 72), ('k', 64 * 7 + 24)];
    for (a, b) in [("mk", "nk"), ("mk", "kn"), ("km", "nk"), ("km", "kn")] {
        let source = check([a, b, "mn"], &sizes, WARP_GROUPS, true, [0; 3]);
        assert!(source.contains("#define MATH 3\n"));
    }
    // Batches make tiles many, so that greater ones are chosen.
    for (batch, m, n, tile) in [
        (133, 40, 104, [64, 128]),
        (67, 72, 72, [128, 128]),
        (79, 72, 200, [128, 256]),
    ] {
        let sizes = [('b', batch), ('m', m), ('n', n), ('k', 40)];
        let source = check(["bmk", "bkn", "bmn"], &sizes, WARP_GROUPS, false, [0; 3]);
        let [rows, columns] = tile;
        let tile = format!("#define TILE_ROWS {rows}\n#define TILE_COLUMNS {columns}\n");
        assert!(source.contains(&tile), "{tile}");
    }
    for sizes in [
        [('m', 64), ('n', 64), ('k', 60)],
        [('m', 64), ('n', 60), ('k', 64)],
    ] {
        let source = check(["mk", "kn", "mn"], &sizes, WARP_GROUPS, false, [0; 3]);
        assert!(source.contains("#define MATH 2\n"));
    }
}

/// A kernel that breaks a rule of `wgmma` does not pass: each is broken once. The tile is made
/// one of two warp groups, which go on without each other where nothing holds them.
#[test]
fn rules_of_warp_groups() {
    let (x, y) = (
        noise(ty(DType::Bf16, &[("m", 128), ("k", 512)]), 1),
        noise(ty(DType::Bf16, &[("k", 512), ("n", 64)]), 2),
    );
    let result = ty(DType::F32, &[("m", 128), ("n", 64)]);
    let run = |broken: Option<(&str, &str)>| {
        let mut device = Device {
            cores: TensorCores::WarpGroups,
            ..Device::default()
        };
        let (a, b) = (device.input(&x), device.input(&y));
        let c = device.result(&result);
        let action = Action::Contract {
            a,
            b,
            c,
            indices: indices(x.ty(), y.ty(), &result),
            accumulate: false,
            bias: None,
        };
        let products = device.products(Precision::F32);
        let mut kernels = kernels_of(&action, &device.buffers, products).unwrap();
        let tile = "#define TILE_ROWS 64\n#define TILE_COLUMNS 64\n#define TILE_DEPTH 64\n#define STAGES 4\n#define WARPS_ROWS 4\n";
        assert!(kernels[0].source.contains(tile));
        let twice = tile
            .replace("TILE_ROWS 64", "TILE_ROWS 128")
            .replace("WARPS_ROWS 4", "WARPS_ROWS 8");
        kernels[0].source = kernels[0].source.replace(tile, &twice);
        kernels[0].grid = Grid {
            blocks: [1, 1, 1],
            threads: [256, 1, 1],
            shared_bytes: 4 * 128 * (128 + 64),
        };
        if let Some((from, to)) = broken {
            assert!(kernels[0].source.contains(from), "{from}");
            kernels[0].source = kernels[0].source.replace(from, to);
        }
        device.launch(&kernels).then(|| device.value(c))
    };
    let Some(right) = run(None) else { return };
    for broken in [
        // What was copied is not shown to the tensor cores; shown before it is there; not waited for.
        ("fence.proxy.async.shared::cta;", ""),
        (
            "        wait<AHEAD - 1>();\n        fence_async();",
            "        fence_async();\n        wait<AHEAD - 1>();",
        ),
        ("wait<AHEAD - 1>();", ""),
        // Threads do not wait for the copies of the others.
        ("__syncthreads();", ""),
        // Sums that were set are not given to the products; they are read too early.
        ("wgmma.fence.sync.aligned;", ""),
        ("products_wait<0>();", ""),
        // A stage is filled that products still read.
        ("#define AHEAD (STAGES - 2)", "#define AHEAD (STAGES - 1)"),
        // Another swizzling, other strides, another major order than those of the copy.
        ("u64(1) << 62", "u64(2) << 62"),
        ("#define LINES_BYTES 1024", "#define LINES_BYTES 512"),
        ("!B_DEPTH_INNER>(acc", "B_DEPTH_INNER>(acc"),
    ] {
        let found = std::panic::catch_unwind(|| run(Some(broken)));
        let is_right = found.is_ok_and(|found| found.as_ref() == Some(&right));
        assert!(!is_right, "{broken:?} goes unnoticed");
    }
}
