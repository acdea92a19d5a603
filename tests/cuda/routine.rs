//! Routines against the serial interpreter: moves exactly, sums to rounding.

use meshweave_compiler::cuda::Precision;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::op::{MoeDims, OpKind};
use meshweave_dsl::program::{Action, BufferId};
use meshweave_runtime::reference::{Value, evaluate_op};

use super::{Device, noise, ty};

/// Runs the op and compares all its results; returns them.
#[track_caller]
fn check(op: OpKind, inputs: &[&Value]) -> Vec<Value> {
    let expected = evaluate_op(&op, inputs).unwrap();
    let mut device = Device::default();
    let inputs: Vec<BufferId> = inputs.iter().map(|value| device.input(value)).collect();
    let results: Vec<BufferId> = (expected.iter())
        .map(|value| device.result(value.ty()))
        .collect();
    let action = Action::Routine {
        op,
        inputs,
        results: results.clone(),
    };
    let pairs: Vec<(BufferId, Value)> = results.into_iter().zip(expected.clone()).collect();
    device.check(&action, Precision::F32, &pairs, 1e-6);
    expected
}

#[test]
fn moves() {
    let x = noise(ty(DType::F32, &[("a", 5), ("b", 37), ("c", 66)]), 1);
    for dims in ["acb", "cab", "bac", "cba"] {
        let dims = dims.chars().map(|dim| dim.to_string().into()).collect();
        check(OpKind::Transpose { dims }, &[&x]);
    }
    for (dim, start, len) in [("a", 1, 3), ("b", 4, 8), ("c", 4, 60), ("c", 3, 2)] {
        let dim = dim.into();
        check(OpKind::Slice { dim, start, len }, &[&x]);
    }
    let y = noise(ty(DType::F32, &[("a", 5), ("b", 3), ("c", 66)]), 2);
    let dim = "b".into();
    check(OpKind::Concat { dim }, &[&x, &y, &x]);
    let y = noise(ty(DType::F32, &[("a", 5), ("b", 37), ("c", 2)]), 2);
    let dim = "c".into();
    check(OpKind::Concat { dim }, &[&y, &x]);
}

/// A routing of tokens to the greatest two of so many scores, and the way there and back.
fn route(n_experts: usize, capacity: usize, d: (&'static str, usize)) {
    let tokens = [("b", 2), ("s", 50)];
    let with = |last: &[(&'static str, usize)]| ty(DType::F32, &[&tokens[..], last].concat());
    // Few different scores: many are equal.
    let scores = noise(with(&[("e", n_experts)]), 5);
    let top = check(
        OpKind::TopK {
            dim: "e".into(),
            choice: "k".into(),
            k: 2,
        },
        &[&scores],
    );
    let (gate, expert) = (&top[0], &top[1]);
    check(
        OpKind::TopKGrad {
            dim: "e".into(),
            choice: "k".into(),
            size: n_experts,
        },
        &[&noise(gate.ty().clone(), 6), expert],
    );
    let slots = check(
        OpKind::MoeSlots {
            seq: "s".into(),
            choice: "k".into(),
            n_experts,
            capacity,
        },
        &[expert],
    );
    // The second half of the experts, as a rank has them.
    for (n_here, offset) in [(n_experts, 0), (n_experts / 2, n_experts / 2)] {
        let dims = MoeDims {
            seq: "s".into(),
            choice: "k".into(),
            expert: "e".into(),
            slot: "c".into(),
            n_experts: n_here,
            capacity,
            offset,
        };
        let x = noise(with(&[d]), 7);
        for gates in [&[][..], &[gate][..]] {
            let inputs = [&[&x, expert, &slots[0]][..], gates].concat();
            let y = check(OpKind::MoeDispatch(dims.clone()), &inputs);
            let y = noise(y[0].ty().clone(), 8);
            let inputs = [&[&y, expert, &slots[0]][..], gates].concat();
            check(OpKind::MoeCombine(dims.clone()), &inputs);
            check(
                OpKind::MoeGateGrad(dims.clone()),
                &[&y, &x, expert, &slots[0]],
            );
        }
    }
}

#[test]
fn routing() {
    route(6, 12, ("d", 9));
    route(40, 100, ("d", 64));
}
