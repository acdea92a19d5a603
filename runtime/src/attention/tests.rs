use meshweave_dsl::dtype::{DType, Scalar};
use meshweave_dsl::op::OpKind;

use super::*;
use crate::reference::{Value, evaluate_op, hash_uniform};

const SCALE: f32 = 0.25;

/// The contract of the generated forward kernel, written plainly.
unsafe extern "C" fn softmax<const KEYS: usize, const LSE_STRIDE: usize, const CAUSAL: bool>(
    args: *const *mut c_void,
    begin: i64,
    end: i64,
) {
    // SAFETY: the caller follows the contract of the forward kernel.
    unsafe {
        let (scores, lse) = ((*args).cast::<f32>(), (*args.add(1)).cast::<f32>());
        let place = (*args.add(2)).cast::<i32>();
        for row in begin as usize..end as usize {
            let (visible, extent) = limits::<KEYS, CAUSAL>(place, row);
            let scores = std::slice::from_raw_parts_mut(scores.add(row * KEYS), extent);
            let top = scores[..visible]
                .iter()
                .fold(f32::NEG_INFINITY, |top, x| top.max(x * SCALE));
            let sum: f32 = scores[..visible]
                .iter()
                .map(|x| (x * SCALE - top).exp())
                .sum();
            for (column, x) in scores.iter_mut().enumerate() {
                *x = if column < visible {
                    (*x * SCALE - top).exp() / sum
                } else {
                    0.0
                };
            }
            *lse.add(row * LSE_STRIDE) = top + sum.ln();
        }
    }
}

/// The contract of the gradient's kernel.
unsafe extern "C" fn softmax_grad<
    const KEYS: usize,
    const LSE_STRIDE: usize,
    const CAUSAL: bool,
>(
    args: *const *mut c_void,
    begin: i64,
    end: i64,
) {
    // SAFETY: the caller follows the contract of the gradient's kernel.
    unsafe {
        let (p, ds) = ((*args).cast::<f32>(), (*args.add(1)).cast::<f32>());
        let (lse, dots) = ((*args.add(2)).cast::<f32>(), (*args.add(3)).cast::<f32>());
        let place = (*args.add(4)).cast::<i32>();
        for row in begin as usize..end as usize {
            let (visible, extent) = limits::<KEYS, CAUSAL>(place, row);
            for column in 0..extent {
                let (p, ds) = (p.add(row * KEYS + column), ds.add(row * KEYS + column));
                if column < visible {
                    *p = (*p * SCALE - *lse.add(row * LSE_STRIDE)).exp();
                    *ds = SCALE * *p * (*ds - *dots.add(row));
                } else {
                    (*p, *ds) = (0.0, 0.0);
                }
            }
        }
    }
}

/// # Safety
/// `place` holds two values.
unsafe fn limits<const KEYS: usize, const CAUSAL: bool>(
    place: *const i32,
    row: usize,
) -> (usize, usize) {
    // SAFETY: as for this function.
    let (base, extent) = unsafe { (*place as usize, *place.add(1) as usize) };
    let visible = if CAUSAL {
        (base + row + 1).min(KEYS)
    } else {
        KEYS
    };
    (visible, extent.min(KEYS))
}

fn values(ty: &TensorType, stream: u32) -> (Vec<f32>, Value) {
    let data: Vec<f32> = (0..ty.n_elements())
        .map(|i| hash_uniform(stream, i))
        .collect();
    let exact = data.iter().map(|x| f64::from(*x)).collect();
    (data, Value::new(ty.clone(), exact).unwrap())
}

fn f32s(shape: &[(&str, usize)]) -> TensorType {
    TensorType::new(DType::F32, shape.iter().copied())
}

struct Case {
    dims: AttentionDims,
    q: TensorType,
    k: TensorType,
    v: TensorType,
    kernels: (KernelFn, KernelFn),
}

fn check(case: Case, n_threads: usize) {
    let Case {
        dims,
        q,
        k,
        v,
        kernels,
    } = case;
    let kind = OpKind::Attention(dims.clone());
    let results = kind.infer(&[&q, &k, &v]).unwrap();
    let (o, lse) = (&results[0], &results[1]);
    let plan = AttentionPlan::new(
        &dims,
        AttentionTypes {
            q: &q,
            k: &k,
            v: &v,
            o,
            lse,
        },
    )
    .unwrap();
    let ((q_data, q_exact), (k_data, k_exact)) = (values(&q, 1), values(&k, 2));
    let ((v_data, v_exact), (do_data, do_exact)) = (values(&v, 3), values(o, 4));
    let expected = evaluate_op(&kind, &[&q_exact, &k_exact, &v_exact]).unwrap();

    let pool = WorkerPool::new(n_threads).unwrap();
    let mut scratch: Vec<Vec<f32>> = vec![vec![f32::NAN; plan.scratch_elements(true)]; n_threads];
    let scratch: Vec<*mut f32> = scratch.iter_mut().map(|s| s.as_mut_ptr()).collect();
    let (mut o_data, mut lse_data) = (
        vec![f32::NAN; o.n_elements()],
        vec![f32::NAN; lse.n_elements()],
    );
    let args = ForwardArgs {
        q: q_data.as_ptr(),
        k: k_data.as_ptr(),
        v: v_data.as_ptr(),
        o: o_data.as_mut_ptr(),
        lse: lse_data.as_mut_ptr(),
        seen: std::ptr::null(),
    };
    // SAFETY: the vectors have the sizes of the planned types.
    unsafe { plan.forward(&pool, kernels.0, args, &scratch) }.unwrap();
    assert_close("o", &o_data, &expected[0]);
    assert_close("lse", &lse_data, &expected[1]);

    let grad = OpKind::AttentionGrad(dims);
    let exact = [
        &q_exact,
        &k_exact,
        &v_exact,
        &expected[0],
        &expected[1],
        &do_exact,
    ];
    let expected = evaluate_op(&grad, &exact).unwrap();
    let mut gradients: Vec<Vec<f32>> = [&q, &k, &v]
        .iter()
        .map(|ty| vec![f32::NAN; ty.n_elements()])
        .collect();
    let [dq, dk, dv] = gradients.as_mut_slice() else {
        unreachable!()
    };
    let args = BackwardArgs {
        q: q_data.as_ptr(),
        k: k_data.as_ptr(),
        v: v_data.as_ptr(),
        o: o_data.as_ptr(),
        lse: lse_data.as_ptr(),
        d_o: do_data.as_ptr(),
        dq: dq.as_mut_ptr(),
        dk: dk.as_mut_ptr(),
        dv: dv.as_mut_ptr(),
    };
    // SAFETY: as above.
    unsafe { plan.backward(&pool, kernels.1, args, &scratch) }.unwrap();
    for ((name, got), want) in ["dq", "dk", "dv"].iter().zip(&gradients).zip(&expected) {
        assert_close(name, got, want);
    }
}

fn assert_close(what: &str, got: &[f32], want: &Value) {
    for (i, (got, want)) in got.iter().zip(want.data()).enumerate() {
        let error = (f64::from(*got) - want).abs();
        assert!(error < 1e-5, "{what}[{i}] is {got}, expected {want}");
    }
}

fn dims(causal: bool, offset: usize) -> AttentionDims {
    AttentionDims {
        seq: "seq".into(),
        kv_seq: "kv_seq".into(),
        head: "head".into(),
        value: "value".into(),
        scale: Scalar(f64::from(SCALE)),
        causal,
        offset,
    }
}

#[test]
fn causal_grouped_queries_over_several_blocks() {
    // 150 queries are two full blocks and a part; lse is [batch, seq, kv_heads, group].
    for n_threads in [1, 3] {
        check(
            Case {
                dims: dims(true, 0),
                q: f32s(&[
                    ("batch", 2),
                    ("seq", 150),
                    ("kv_heads", 2),
                    ("group", 3),
                    ("head", 8),
                ]),
                k: f32s(&[("batch", 2), ("kv_seq", 150), ("kv_heads", 2), ("head", 8)]),
                v: f32s(&[("batch", 2), ("kv_seq", 150), ("kv_heads", 2), ("value", 5)]),
                kernels: (softmax::<150, 6, true>, softmax_grad::<150, 6, true>),
            },
            n_threads,
        );
    }
}

#[test]
fn a_shard_of_queries_sees_the_keys_before_it() {
    check(
        Case {
            dims: dims(true, 70),
            q: f32s(&[("batch", 1), ("heads", 2), ("seq", 30), ("head", 16)]),
            k: f32s(&[("batch", 1), ("heads", 2), ("kv_seq", 100), ("head", 16)]),
            v: f32s(&[("batch", 1), ("heads", 2), ("kv_seq", 100), ("value", 16)]),
            kernels: (softmax::<100, 1, true>, softmax_grad::<100, 1, true>),
        },
        2,
    );
}

#[test]
fn without_a_mask_every_key_is_seen() {
    check(
        Case {
            dims: dims(false, 0),
            q: f32s(&[("batch", 2), ("seq", 7), ("group", 2), ("head", 4)]),
            k: f32s(&[("batch", 2), ("kv_seq", 11), ("head", 4)]),
            v: f32s(&[("batch", 2), ("kv_seq", 11), ("value", 4)]),
            kernels: (softmax::<11, 2, false>, softmax_grad::<11, 2, false>),
        },
        1,
    );
}

#[test]
fn types_that_do_not_fit_are_refused() {
    let q = f32s(&[("batch", 2), ("seq", 7), ("head", 4)]);
    let k = f32s(&[("batch", 2), ("kv_seq", 11), ("head", 5)]);
    let v = f32s(&[("batch", 2), ("kv_seq", 11), ("value", 4)]);
    let o = f32s(&[("batch", 2), ("seq", 7), ("value", 4)]);
    let lse = f32s(&[("batch", 2), ("seq", 7)]);
    let types = AttentionTypes {
        q: &q,
        k: &k,
        v: &v,
        o: &o,
        lse: &lse,
    };
    let error = AttentionPlan::new(&dims(true, 0), types).unwrap_err();
    insta::assert_snapshot!(error, @"attention: k is f32[batch:2, kv_seq:11, head:5], which needs `head` of 4 elements");
}
