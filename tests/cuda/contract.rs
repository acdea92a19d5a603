//! Contractions in every memory order, on plain and on tensor cores.

use meshweave_compiler::cuda::Precision;
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

/// Computes `a, b -> out`, each a list of one-letter dims, with dims of these sizes.
#[track_caller]
fn check(
    dims: [&str; 3],
    sizes: &[(char, usize)],
    dtype: DType,
    precision: Precision,
    accumulate: bool,
    offsets: [usize; 3],
) {
    check_biased(dims, "", sizes, dtype, precision, accumulate, offsets);
}

/// The same with a bias of these dims, where there are some.
#[track_caller]
fn check_biased(
    [a, b, out]: [&str; 3],
    bias: &str,
    sizes: &[(char, usize)],
    dtype: DType,
    precision: Precision,
    accumulate: bool,
    offsets: [usize; 3],
) {
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
    let mut device = Device::default();
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
}

/// A product of bf16 that is stored as bf16, neighbors two at a time or one by one.
#[test]
fn bf16_results() {
    for n in [40, 37] {
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
            let mut device = Device::default();
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

const KINDS: [(DType, Precision); 3] = [
    (DType::F32, Precision::F32),
    (DType::F32, Precision::Tf32),
    (DType::Bf16, Precision::F32),
];

#[test]
fn memory_orders() {
    let sizes = [('m', 72), ('n', 40), ('k', 56)];
    for (dtype, precision) in KINDS {
        for a in ["mk", "km"] {
            for b in ["kn", "nk"] {
                for c in ["mn", "nm"] {
                    check([a, b, c], &sizes, dtype, precision, false, [0; 3]);
                }
            }
        }
    }
}

/// Sizes that no tile divides, so that copies are of one element and borders are ragged.
#[test]
fn odd_sizes() {
    let sizes = [('m', 67), ('n', 5), ('k', 35)];
    for (dtype, precision) in KINDS {
        for (a, b) in [("mk", "kn"), ("km", "nk")] {
            check([a, b, "mn"], &sizes, dtype, precision, true, [0; 3]);
        }
    }
    for sizes in [
        [('m', 1), ('n', 1), ('k', 1)],
        [('m', 1), ('n', 130), ('k', 3)],
    ] {
        check(
            ["mk", "kn", "mn"],
            &sizes,
            DType::F32,
            Precision::Tf32,
            false,
            [0; 3],
        );
    }
}

/// A bias along either side of the product, over one dim or several, with tiles that are full and that
/// are not, where the result is replaced and where it is added to.
#[test]
fn biases() {
    let full = [('m', 64), ('n', 128), ('k', 32)];
    let ragged = [('m', 67), ('n', 5), ('k', 35)];
    let heads = [('b', 2), ('s', 20), ('h', 4), ('d', 16), ('e', 24)];
    for (dtype, precision) in KINDS {
        for accumulate in [false, true] {
            for sizes in [&full, &ragged] {
                for (out, bias) in [("mn", "n"), ("nm", "m"), ("mn", "m")] {
                    let dims = ["mk", "kn", out];
                    check_biased(dims, bias, sizes, dtype, precision, accumulate, [0; 3]);
                }
            }
            let dims = ["bse", "ehd", "bshd"];
            check_biased(dims, "hd", &heads, dtype, precision, accumulate, [0; 3]);
        }
    }
}

/// Operands that begin at places to which wide copies would be unaligned.
#[test]
fn unaligned_operands() {
    let sizes = [('m', 64), ('n', 64), ('k', 32)];
    for (dtype, precision) in KINDS {
        for offsets in [[4, 8, 4], [8, 2 * dtype.n_bytes(), 12]] {
            check(["mk", "kn", "mn"], &sizes, dtype, precision, true, offsets);
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
    for (dtype, precision) in KINDS {
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
                check(dims, &sizes, dtype, precision, false, [0; 3]);
            }
        }
        check(["sd", "sd", ""], &sizes, dtype, precision, true, [0; 3]);
    }
}
