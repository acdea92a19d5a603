use meshweave_dsl::op::MoeDims;

use super::*;
use crate::reference::{Value, evaluate_op, hash_uniform, lowbias32};

/// Runs the routine and the interpreter on the same inputs and compares all results.
fn check(op: &OpKind, inputs: &[(TensorType, Fill)]) {
    let mut words: Vec<Vec<u32>> = Vec::new();
    let mut exact = Vec::new();
    for (input_idx, (ty, fill)) in inputs.iter().enumerate() {
        let n = ty.n_elements();
        let stream = input_idx as u32 + 1;
        let data: Vec<f64> = match fill {
            Fill::Floats => (0..n).map(|i| f64::from(hash_uniform(stream, i))).collect(),
            // Few different values, so that ties occur.
            Fill::Coarse => (0..n)
                .map(|i| f64::from((hash_uniform(stream, i) * 3.0).round()))
                .collect(),
            Fill::Index(low, high) => (0..n)
                .map(|i| f64::from(low + (lowbias32(i as u32 + 77) % (high - low) as u32) as i32))
                .collect(),
            Fill::Given(data) => data.clone(),
        };
        words.push(match ty.dtype {
            DType::I32 => data.iter().map(|x| *x as i32 as u32).collect(),
            _ => data.iter().map(|x| (*x as f32).to_bits()).collect(),
        });
        exact.push(Value::new(ty.clone(), data).unwrap());
    }
    let exact: Vec<&Value> = exact.iter().collect();
    let expected = evaluate_op(op, &exact).unwrap();
    let input_types: Vec<&TensorType> = inputs.iter().map(|(ty, _)| ty).collect();
    let result_types: Vec<&TensorType> = expected.iter().map(Value::ty).collect();
    let routine = Routine::new(op, &input_types, &result_types).unwrap();
    let mut results: Vec<Vec<u32>> = result_types
        .iter()
        .map(|ty| vec![f32::NAN.to_bits(); ty.n_elements()])
        .collect();
    let input_addresses: Vec<*const u32> = words.iter().map(|w| w.as_ptr()).collect();
    let result_addresses: Vec<*mut u32> = results.iter_mut().map(|w| w.as_mut_ptr()).collect();
    // SAFETY: every vector has the elements of its type.
    unsafe { routine.run(&input_addresses, &result_addresses) }.unwrap();
    for (got, want) in results.iter().zip(&expected) {
        let dtype = want.ty().dtype;
        for (i, (got, want)) in got.iter().zip(want.data()).enumerate() {
            let got = match dtype {
                DType::I32 => f64::from(*got as i32),
                _ => f64::from(f32::from_bits(*got)),
            };
            assert!(
                (got - want).abs() < 1e-5,
                "{}: element {i} is {got}, expected {want}",
                op.name()
            );
        }
    }
}

enum Fill {
    Floats,
    Coarse,
    Index(i32, i32),
    Given(Vec<f64>),
}

fn f32s(shape: &[(&str, usize)]) -> TensorType {
    TensorType::new(DType::F32, shape.iter().copied())
}

fn i32s(shape: &[(&str, usize)]) -> TensorType {
    TensorType::new(DType::I32, shape.iter().copied())
}

#[test]
fn moves() {
    let x = f32s(&[("a", 5), ("b", 3), ("c", 20)]);
    for order in [
        ["c", "a", "b"],
        ["a", "c", "b"],
        ["c", "b", "a"],
        ["a", "b", "c"],
    ] {
        let dims = order.iter().map(|dim| Dim::from(*dim)).collect();
        check(&OpKind::Transpose { dims }, &[(x.clone(), Fill::Floats)]);
    }
    for (dim, start, len) in [("a", 1, 3), ("b", 2, 1), ("c", 7, 13)] {
        check(
            &OpKind::Slice {
                dim: dim.into(),
                start,
                len,
            },
            &[(x.clone(), Fill::Floats)],
        );
    }
    let parts = [2, 5, 1].map(|n| (f32s(&[("a", 4), ("b", n), ("c", 3)]), Fill::Floats));
    check(&OpKind::Concat { dim: "b".into() }, &parts);
    let parts = [2, 5].map(|n| (i32s(&[("b", n), ("c", 3)]), Fill::Index(-9, 9)));
    check(&OpKind::Concat { dim: "b".into() }, &parts);
}

#[test]
fn top_k_with_ties_and_its_gradient() {
    for dims in [[("row", 30), ("expert", 8)], [("expert", 8), ("row", 30)]] {
        let top_k = OpKind::TopK {
            dim: "expert".into(),
            choice: "choice".into(),
            k: 3,
        };
        check(&top_k, &[(f32s(&dims), Fill::Coarse)]);
    }
    let grad = OpKind::TopKGrad {
        dim: "expert".into(),
        choice: "choice".into(),
        size: 8,
    };
    let shape = [("row", 30), ("choice", 3)];
    check(
        &grad,
        &[
            (f32s(&shape), Fill::Floats),
            (i32s(&shape), Fill::Index(-1, 9)),
        ],
    );
}

#[test]
fn routing() {
    let assignment = [("batch", 2), ("seq", 12), ("choice", 2)];
    let slots = OpKind::MoeSlots {
        seq: "seq".into(),
        choice: "choice".into(),
        n_experts: 4,
        capacity: 5,
    };
    check(&slots, &[(i32s(&assignment), Fill::Index(0, 4))]);

    let expert = Value::from_fn(i32s(&assignment), |i| f64::from(lowbias32(i as u32) % 4));
    let slot = evaluate_op(&slots, &[&expert]).unwrap().remove(0);
    assert!(
        slot.data().contains(&-1.0),
        "the case should drop assignments"
    );
    let routing = || {
        [
            (i32s(&assignment), Fill::Given(expert.data().to_vec())),
            (i32s(&assignment), Fill::Given(slot.data().to_vec())),
        ]
    };
    // All experts, and a rank that holds experts 1 and 2.
    for (n_experts, offset) in [(4, 0), (2, 1)] {
        let dims = MoeDims {
            seq: "seq".into(),
            choice: "choice".into(),
            expert: "expert".into(),
            slot: "slot".into(),
            n_experts,
            capacity: 5,
            offset,
        };
        let x = || {
            (
                f32s(&[("batch", 2), ("seq", 12), ("embed", 16)]),
                Fill::Floats,
            )
        };
        let y = || {
            (
                f32s(&[
                    ("expert", n_experts),
                    ("batch", 2),
                    ("slot", 5),
                    ("embed", 16),
                ]),
                Fill::Floats,
            )
        };
        let gate = || (f32s(&assignment), Fill::Floats);
        let [expert, slot] = routing();
        check(&OpKind::MoeDispatch(dims.clone()), &[x(), expert, slot]);
        let [expert, slot] = routing();
        check(
            &OpKind::MoeDispatch(dims.clone()),
            &[x(), expert, slot, gate()],
        );
        let [expert, slot] = routing();
        check(&OpKind::MoeCombine(dims.clone()), &[y(), expert, slot]);
        let [expert, slot] = routing();
        check(
            &OpKind::MoeCombine(dims.clone()),
            &[y(), expert, slot, gate()],
        );
        let [expert, slot] = routing();
        check(&OpKind::MoeGateGrad(dims), &[y(), x(), expert, slot]);
    }
}

#[test]
fn what_is_no_routine_is_refused() {
    let x = f32s(&[("a", 5)]);
    let error = Routine::new(&OpKind::Softmax { dim: "a".into() }, &[&x], &[&x]).unwrap_err();
    insta::assert_snapshot!(error, @"the host has no routine for softmax of 1 inputs");
    let y = f32s(&[("a", 4)]);
    let error = Routine::new(
        &OpKind::Transpose {
            dims: vec!["a".into()],
        },
        &[&x],
        &[&y],
    )
    .unwrap_err();
    insta::assert_snapshot!(error, @"damaged program: transpose of (f32[a:5]) does not give (f32[a:4]); compile again");
}
