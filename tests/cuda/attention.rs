//! Attention and its gradient against the serial interpreter, plain and on tensor cores.

use meshweave_compiler::cuda::{Precision, TensorCores, kernels_of};
use meshweave_dsl::dtype::{DType, Scalar};
use meshweave_dsl::op::{AttentionDims, OpKind};
use meshweave_dsl::program::{Action, BufferId, KernelId};
use meshweave_runtime::reference::{Value, evaluate_op};

use super::{Device, noise, ty};

#[derive(Clone, Copy)]
struct Case {
    queries: usize,
    keys: usize,
    /// Key heads, and query heads of each.
    heads: [usize; 2],
    head: usize,
    value: usize,
    causal: bool,
    offset: usize,
    /// Whether heads stand before positions.
    heads_first: bool,
}

const CASE: Case = Case {
    queries: 70,
    keys: 70,
    heads: [2, 2],
    head: 32,
    value: 32,
    causal: true,
    offset: 0,
    heads_first: false,
};

impl Case {
    /// Checks forward and backward; tolerances are relative to the greatest element.
    #[track_caller]
    fn check(self, dtype: DType, precision: Precision, tolerance: f64) {
        self.check_on(TensorCores::Warps, dtype, precision, tolerance);
    }

    #[track_caller]
    fn check_on(self, cores: TensorCores, dtype: DType, precision: Precision, tolerance: f64) {
        let dims = AttentionDims {
            seq: "s".into(),
            kv_seq: "t".into(),
            head: "d".into(),
            value: "v".into(),
            scale: Scalar(1.0 / (self.head as f64).sqrt()),
            causal: self.causal,
            offset: self.offset,
        };
        let [kv_heads, group] = self.heads;
        let of = |dtype: DType, seq: (&str, usize), grouped: bool, last: Option<(&str, usize)>| {
            let mut shape = vec![("b", 1), ("h", kv_heads)];
            if grouped {
                shape.push(("g", group));
            }
            shape.insert(if self.heads_first { shape.len() } else { 1 }, seq);
            shape.extend(last);
            ty(dtype, &shape)
        };
        let (s, t) = (("s", self.queries), ("t", self.keys));
        let (d, v) = (("d", self.head), ("v", self.value));
        let operands = |dtype: DType| {
            [
                noise(of(dtype, s, true, Some(d)), 1),
                noise(of(dtype, t, false, Some(d)), 2),
                noise(of(dtype, t, false, Some(v)), 3),
                noise(of(dtype, s, true, Some(v)), 4),
            ]
        };
        let [q, k, val, d_o] = operands(DType::F32);
        let kind = OpKind::Attention(dims.clone());
        let forward = evaluate_op(&kind, &[&q, &k, &val]).unwrap();
        let kind = OpKind::AttentionGrad(dims.clone());
        let inputs = [&q, &k, &val, &forward[0], &forward[1], &d_o];
        let backward = evaluate_op(&kind, &inputs).unwrap();

        let mut device = Device {
            cores,
            ..Device::default()
        };
        let [q, k, v, d_o] = operands(dtype).each_ref().map(|value| device.input(value));
        let o = device.result(&of(dtype, s, true, Some(("v", self.value))));
        let lse = device.result(&of(DType::F32, s, true, None));
        let action = Action::Attention {
            dims: dims.clone(),
            q,
            k,
            v,
            o,
            lse,
            seen: None,
            scratch: BufferId(u32::MAX),
            kernel: KernelId(0),
        };
        let [expected_o, expected_lse] = [0, 1].map(|idx| forward[idx].clone());
        let expected = [(o, expected_o), (lse, expected_lse)];
        device.check(&action, precision, &expected, tolerance);

        let results = [q, k, v].map(|id| {
            let ty = device.buffers[id.index()].ty.clone();
            device.result(&ty)
        });
        let action = Action::AttentionGrad {
            dims,
            inputs: [q, k, v, o, lse, d_o],
            results,
            scratch: BufferId(u32::MAX),
            kernel: KernelId(0),
        };
        let expected: Vec<(BufferId, Value)> = results.into_iter().zip(backward).collect();
        device.check(&action, precision, &expected, 2.0 * tolerance);
        // The test means what it says: tensor cores multiply where they are asked for and can.
        let tensor =
            self.head.is_multiple_of(16) && (dtype == DType::Bf16 || precision == Precision::Tf32);
        let kernels = kernels_of(&action, &device.buffers, device.products(precision)).unwrap();
        let by_warps = tensor && cores == TensorCores::Warps;
        assert_eq!(kernels[1].source.contains("#define PIECES"), by_warps);
        assert_eq!(
            kernels[1].source.contains("wgmma.mma_async"),
            tensor && !by_warps
        );
    }
}

#[test]
fn plain() {
    for heads_first in [false, true] {
        let case = Case {
            heads_first,
            ..CASE
        };
        case.check(DType::F32, Precision::F32, 2e-6);
    }
    let case = Case {
        causal: false,
        head: 12,
        value: 7,
        keys: 37,
        ..CASE
    };
    case.check(DType::F32, Precision::F32, 2e-6);
    // Queries of a later rank, which see keys before their own.
    let case = Case {
        queries: 33,
        keys: 97,
        offset: 64,
        heads: [1, 3],
        ..CASE
    };
    case.check(DType::F32, Precision::F32, 2e-6);
    // Keys that no query sees, and sees with more positions than keys.
    let case = Case {
        queries: 20,
        keys: 80,
        head: 8,
        value: 8,
        ..CASE
    };
    case.check(DType::F32, Precision::F32, 2e-6);
    let case = Case {
        queries: 40,
        keys: 24,
        offset: 8,
        head: 6,
        value: 6,
        ..CASE
    };
    case.check(DType::Bf16, Precision::F32, 2e-2);
}

#[test]
fn tensor_cores_tf32() {
    CASE.check(DType::F32, Precision::Tf32, 2e-3);
    let case = Case {
        queries: 130,
        keys: 194,
        offset: 64,
        heads: [1, 2],
        head: 64,
        value: 48,
        ..CASE
    };
    case.check(DType::F32, Precision::Tf32, 2e-3);
    let case = Case {
        causal: false,
        head: 128,
        value: 128,
        keys: 45,
        heads: [1, 1],
        heads_first: true,
        ..CASE
    };
    case.check(DType::F32, Precision::Tf32, 2e-3);
}

#[test]
fn tensor_cores_bf16() {
    CASE.check(DType::Bf16, Precision::F32, 2e-2);
    let case = Case {
        queries: 130,
        keys: 194,
        offset: 64,
        heads: [1, 2],
        head: 64,
        value: 48,
        ..CASE
    };
    case.check(DType::Bf16, Precision::F32, 2e-2);
    let case = Case {
        causal: false,
        head: 128,
        value: 128,
        keys: 45,
        heads: [1, 1],
        heads_first: true,
        ..CASE
    };
    case.check(DType::Bf16, Precision::F32, 2e-2);
    // Keys that no query sees.
    let case = Case {
        queries: 20,
        keys: 200,
        ..CASE
    };
    case.check(DType::Bf16, Precision::F32, 2e-2);
}

#[test]
fn warp_groups() {
    let base = Case {
        head: 64,
        value: 64,
        ..CASE
    };
    let all = [
        base,
        // Tiles of keys that stream by several times, for queries of a later rank.
        Case {
            queries: 150,
            keys: 406,
            offset: 256,
            heads: [1, 3],
            value: 128,
            ..base
        },
        Case {
            causal: false,
            head: 128,
            value: 128,
            queries: 140,
            keys: 300,
            heads: [1, 1],
            heads_first: true,
            ..base
        },
        // Keys that no query sees.
        Case {
            queries: 20,
            keys: 200,
            head: 128,
            ..base
        },
    ];
    for case in all {
        case.check_on(TensorCores::WarpGroups, DType::Bf16, Precision::F32, 2e-2);
    }
}
