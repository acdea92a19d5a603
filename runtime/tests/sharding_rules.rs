//! Every sharding rule against the interpreter: an op divided along any of its factors, computed
//! part by part and put together as the factor says, gives what the whole op gives.

// Helpers of tests may fail as tests do.
#![allow(clippy::unwrap_used)]

use meshweave_dsl::dtype::DType::{F32, I32};
use meshweave_dsl::graph::TensorType;
use meshweave_dsl::layout::{Interval, Layout, Mesh, ReduceKind};
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{AttentionDims, BinaryFn, Factor, MoeDims, OpKind, Spread, UnaryFn};
use meshweave_runtime::reference::{Value, evaluate_op};
use proptest::prelude::*;

/// A deterministic source of numbers in [0, 1).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) as f64 / (1u64 << 31) as f64
    }

    fn floats(&mut self, dims: &[(&str, usize)]) -> Value {
        let ty = TensorType::new(F32, dims.iter().copied());
        Value::from_fn(ty, |_| 2.0 * self.next() - 1.0)
    }

    fn positive(&mut self, dims: &[(&str, usize)]) -> Value {
        let ty = TensorType::new(F32, dims.iter().copied());
        Value::from_fn(ty, |_| 0.1 + self.next())
    }

    /// Integers in [−1, n], so that some lie outside.
    fn indices(&mut self, dims: &[(&str, usize)], n: usize) -> Value {
        let ty = TensorType::new(I32, dims.iter().copied());
        Value::from_fn(ty, |_| (self.next() * (n + 2) as f64).floor() - 1.0)
    }
}

/// An op of every kind, with inputs; `n` are the sizes of its dims.
fn cases(n: [usize; 5], numbers: &mut Numbers) -> Vec<(OpKind, Vec<Value>)> {
    let [na, nb, nc, nd, ne] = n;
    let (a, b, c, d) = (("a", na), ("b", nb), ("c", nc), ("d", nd));
    let x = numbers.floats(&[a, b, c]);
    let y = numbers.floats(&[a, b, c]);
    let positive = numbers.positive(&[a, b, c]);
    let vector = numbers.floats(&[c]);
    let rows = numbers.floats(&[a, b]);
    let ids = numbers.indices(&[a, b], nc);
    let mut cases: Vec<(OpKind, Vec<Value>)> = Vec::new();

    let (dim, offset) = (Dim::from("c"), 0);
    let table = numbers.floats(&[c, d]);
    let gather = OpKind::Gather {
        dim: dim.clone(),
        offset,
    };
    cases.push((gather, vec![table, ids.clone()]));
    let scatter = OpKind::ScatterAdd {
        dim: "e".into(),
        size: ne,
        offset,
    };
    let expert_ids = numbers.indices(&[a, b], ne);
    cases.push((scatter, vec![expert_ids, x.clone()]));
    let pick = OpKind::Pick {
        dim: dim.clone(),
        offset,
    };
    cases.push((pick, vec![x.clone(), ids.clone()]));
    let grad = OpKind::CrossEntropyGrad {
        dim: dim.clone(),
        offset,
    };
    let dloss = numbers.floats(&[a, b]);
    cases.push((grad, vec![x.clone(), rows.clone(), ids, dloss]));

    for out in [
        &["a", "d"][..],
        &["d", "b", "a"],
        &["a", "b", "c", "d"],
        &["b"],
        &[],
    ] {
        let out = out.iter().map(|dim| Dim::from(*dim)).collect();
        let other = numbers.floats(&[d, c, b]);
        cases.push((OpKind::Contract { out }, vec![x.clone(), other]));
    }

    for function in [
        UnaryFn::Neg,
        UnaryFn::Exp,
        UnaryFn::Log,
        UnaryFn::Sqrt,
        UnaryFn::Rsqrt,
        UnaryFn::Square,
        UnaryFn::Reciprocal,
        UnaryFn::Tanh,
        UnaryFn::Sigmoid,
        UnaryFn::Silu,
        UnaryFn::Relu,
        UnaryFn::Gelu,
        UnaryFn::GeluTanh,
        UnaryFn::Scale(1.5.into()),
        UnaryFn::Shift(0.5.into()),
    ] {
        cases.push((OpKind::Unary(function), vec![positive.clone()]));
    }
    for function in [
        BinaryFn::Add,
        BinaryFn::Sub,
        BinaryFn::Mul,
        BinaryFn::Div,
        BinaryFn::Max,
        BinaryFn::Equal,
        BinaryFn::TanhGrad,
        BinaryFn::SigmoidGrad,
        BinaryFn::SiluGrad,
        BinaryFn::ReluGrad,
        BinaryFn::GeluGrad,
        BinaryFn::GeluTanhGrad,
    ] {
        cases.push((OpKind::Binary(function), vec![x.clone(), positive.clone()]));
        cases.push((
            OpKind::Binary(function),
            vec![x.clone(), numbers.positive(&[b])],
        ));
        cases.push((
            OpKind::Binary(function),
            vec![numbers.floats(&[c, a]), positive.clone()],
        ));
    }

    for kind in [ReduceKind::Sum, ReduceKind::Max, ReduceKind::Lse] {
        for dims in [&["b"][..], &["a", "c"], &["a", "b", "c"]] {
            let dims = dims.iter().map(|dim| Dim::from(*dim)).collect();
            cases.push((OpKind::Reduce { kind, dims }, vec![x.clone()]));
        }
    }
    let dims = [c, d, a, b].map(|(dim, size)| (dim.into(), size)).to_vec();
    cases.push((OpKind::Expand { dims }, vec![rows.clone()]));

    let eps = 1e-5.into();
    cases.push((
        OpKind::RmsNorm {
            dim: dim.clone(),
            eps,
        },
        vec![x.clone(), vector.clone()],
    ));
    cases.push((
        OpKind::RmsNormGrad { dim: dim.clone() },
        vec![x.clone(), vector.clone(), rows.clone(), y.clone()],
    ));
    cases.push((
        OpKind::LayerNorm {
            dim: dim.clone(),
            eps,
        },
        vec![x.clone(), vector.clone(), numbers.floats(&[c])],
    ));
    cases.push((
        OpKind::LayerNormGrad { dim: dim.clone() },
        vec![
            x.clone(),
            vector.clone(),
            rows.clone(),
            numbers.floats(&[a, b]),
            y.clone(),
        ],
    ));
    cases.push((OpKind::Softmax { dim: "b".into() }, vec![x.clone()]));
    cases.push((
        OpKind::SoftmaxGrad { dim: "b".into() },
        vec![x.clone(), y.clone()],
    ));
    for inverse in [false, true] {
        let wide = numbers.floats(&[a, b, d, ("head", 6)]);
        let tables = [
            numbers.floats(&[b, ("half", 3)]),
            numbers.floats(&[b, ("half", 3)]),
        ];
        let [cos, sin] = tables;
        cases.push((
            OpKind::Rope {
                dim: "head".into(),
                inverse,
            },
            vec![wide, cos, sin],
        ));
    }

    for causal in [true, false] {
        let dims = AttentionDims {
            seq: "b".into(),
            kv_seq: "t".into(),
            head: "head".into(),
            value: "value".into(),
            scale: 0.7.into(),
            causal,
            offset: 0,
        };
        let q = numbers.floats(&[a, b, c, d, ("head", 4)]);
        let k = numbers.floats(&[a, ("t", nb), c, ("head", 4)]);
        let v = numbers.floats(&[a, ("t", nb), c, ("value", 3)]);
        let o = numbers.floats(&[a, b, c, d, ("value", 3)]);
        let lse = numbers.floats(&[a, b, c, d]);
        let do_ = numbers.floats(&[a, b, c, d, ("value", 3)]);
        cases.push((
            OpKind::Attention(dims.clone()),
            vec![q.clone(), k.clone(), v.clone()],
        ));
        cases.push((OpKind::AttentionGrad(dims), vec![q, k, v, o, lse, do_]));
    }

    let order = ["c", "a", "b"].map(Dim::from).to_vec();
    cases.push((OpKind::Transpose { dims: order }, vec![x.clone()]));
    cases.push((
        OpKind::Rename {
            from: "b".into(),
            to: "z".into(),
        },
        vec![x.clone()],
    ));
    let wide = numbers.floats(&[a, ("w", nb * 4), c]);
    let into = vec![("m".into(), nb), ("n".into(), 4)];
    cases.push((
        OpKind::Split {
            dim: "w".into(),
            into,
        },
        vec![wide.clone()],
    ));
    let into = vec![("m".into(), 4), ("n".into(), nb)];
    cases.push((
        OpKind::Split {
            dim: "w".into(),
            into,
        },
        vec![wide.clone()],
    ));
    let merge = |dims: [&str; 2]| OpKind::Merge {
        dims: dims.map(Dim::from).to_vec(),
        into: "w".into(),
    };
    cases.push((merge(["a", "b"]), vec![x.clone()]));
    cases.push((merge(["b", "c"]), vec![x.clone()]));
    cases.push((
        OpKind::Slice {
            dim: "b".into(),
            start: 1,
            len: nb - 1,
        },
        vec![x.clone()],
    ));
    let longer = numbers.floats(&[a, ("b", nb + 2), c]);
    cases.push((
        OpKind::Concat { dim: "b".into() },
        vec![x.clone(), longer, y.clone()],
    ));
    let top = OpKind::TopK {
        dim: "b".into(),
        choice: "choice".into(),
        k: 2,
    };
    cases.push((top, vec![x.clone()]));
    let top_grad = OpKind::TopKGrad {
        dim: "e".into(),
        choice: "choice".into(),
        size: ne,
    };
    let choices = [a, ("choice", 2), b];
    let chosen = numbers.indices(&choices, ne);
    cases.push((top_grad, vec![numbers.floats(&choices), chosen]));

    cases.extend(moe_cases(n, numbers));

    let adamw = OpKind::Adamw {
        lr: 1e-2.into(),
        beta1: 0.9.into(),
        beta2: 0.95.into(),
        eps: 1e-8.into(),
        decay: 0.1.into(),
    };
    let step = Value::full(
        TensorType {
            dtype: F32,
            shape: vec![],
        },
        3.0,
    );
    let moment = numbers.floats(&[a, b, c]);
    cases.push((adamw, vec![x.clone(), y.clone(), moment, positive, step]));
    cases.push((OpKind::Sgd { lr: 0.1.into() }, vec![x, y]));
    cases
}

fn moe_cases(n: [usize; 5], numbers: &mut Numbers) -> Vec<(OpKind, Vec<Value>)> {
    let [na, nb, nc, nd, ne] = n;
    let (batch, seq, choice, embed) = (("a", na), ("s", nb + 2), ("choice", 2), ("d", nd));
    let expert = Value::from_fn(TensorType::new(I32, [batch, seq, choice]), |_| {
        (numbers.next() * ne as f64).floor()
    });
    let slots = OpKind::MoeSlots {
        seq: "s".into(),
        choice: "choice".into(),
        n_experts: ne,
        capacity: nc,
    };
    let slot = evaluate_op(&slots, &[&expert]).unwrap().remove(0);
    let dims = MoeDims {
        seq: "s".into(),
        choice: "choice".into(),
        expert: "e".into(),
        slot: "slot".into(),
        n_experts: ne,
        capacity: nc,
        offset: 0,
    };
    let x = numbers.floats(&[batch, seq, embed]);
    let gate = numbers.floats(&[batch, seq, choice]);
    let y = numbers.floats(&[("e", ne), batch, ("slot", nc), embed]);
    let routed = |first: &Value| vec![first.clone(), expert.clone(), slot.clone()];
    let gated = |first: &Value| [routed(first), vec![gate.clone()]].concat();
    vec![
        (slots, vec![expert.clone()]),
        (OpKind::MoeDispatch(dims.clone()), routed(&x)),
        (OpKind::MoeDispatch(dims.clone()), gated(&x)),
        (OpKind::MoeCombine(dims.clone()), routed(&y)),
        (OpKind::MoeCombine(dims.clone()), gated(&y)),
        (
            OpKind::MoeGateGrad(dims),
            vec![y.clone(), x.clone(), expert.clone(), slot.clone()],
        ),
    ]
}

fn layout(spread: &Spread) -> Layout {
    match spread {
        Spread::Whole | Spread::Partial(_) => Layout::replicated(),
        Spread::Split(dim) => Layout::replicated().shard(dim, "t"),
    }
}

fn combine(kind: ReduceKind, a: f64, b: f64) -> f64 {
    match kind {
        ReduceKind::Sum => a + b,
        ReduceKind::Max => a.max(b),
        ReduceKind::Lse => (a.exp() + b.exp()).ln(),
    }
}

/// Computes `kind` divided along `factor` over `degree` ranks and puts the results together.
fn divided(
    kind: &OpKind,
    inputs: &[Value],
    whole: &[Value],
    factor: &Factor,
    degree: usize,
    numbers: &mut Numbers,
) -> Result<Vec<Value>, String> {
    let mesh = Mesh::new([("t", degree)]);
    let region = |value: &Value, spread: &Spread, rank: usize| -> Vec<Interval> {
        layout(spread).region(&value.ty().shape, &mesh, rank)
    };
    // What each rank holds of each input.
    let mut parts: Vec<Vec<Value>> = vec![Vec::new(); degree];
    for (input, spread) in inputs.iter().zip(&factor.inputs) {
        let mut rest = input.clone();
        for (rank, parts) in parts.iter_mut().enumerate() {
            parts.push(match spread {
                Spread::Partial(ReduceKind::Sum) if rank + 1 < degree => {
                    let term = Value::from_fn(input.ty().clone(), |_| numbers.next() - 0.5);
                    for (rest, term) in rest.data_mut().iter_mut().zip(term.data()) {
                        *rest -= term;
                    }
                    term
                }
                Spread::Partial(ReduceKind::Sum) => rest.clone(),
                Spread::Partial(kind) => {
                    return Err(format!("takes inputs partial by {}", kind.name()));
                }
                Spread::Whole | Spread::Split(_) => {
                    let region = region(input, spread, rank);
                    if region.iter().any(|interval| interval.len == 0) {
                        return Err("a rank gets nothing".into());
                    }
                    input.part(&region).map_err(|error| error.to_string())?
                }
            });
        }
    }
    let mut results: Vec<Option<Value>> = vec![None; whole.len()];
    for (rank, parts) in parts.iter().enumerate() {
        let interval = |dim: &Dim, size: usize| -> Interval {
            let operands = whole
                .iter()
                .zip(&factor.results)
                .chain(inputs.iter().zip(&factor.inputs));
            for (value, spread) in operands {
                if let Some(size) = value.ty().size_of(dim) {
                    return layout(spread).interval(dim, size, &mesh, rank);
                }
            }
            Interval {
                start: 0,
                len: size,
            }
        };
        let local = kind.localize(interval);
        let outcome = evaluate_op(&local, &parts.iter().collect::<Vec<_>>())
            .map_err(|error| format!("rank {rank}: {error}"))?;
        for (result_idx, part) in outcome.into_iter().enumerate() {
            let (whole, spread) = (&whole[result_idx], &factor.results[result_idx]);
            match (&mut results[result_idx], spread) {
                (None, Spread::Whole | Spread::Partial(_)) => results[result_idx] = Some(part),
                (Some(so_far), Spread::Whole) => {
                    if so_far.relative_error(&part) > 1e-12 {
                        return Err(format!("result {result_idx} differs between ranks"));
                    }
                }
                (Some(so_far), Spread::Partial(kind)) => {
                    for (a, b) in so_far.data_mut().iter_mut().zip(part.data()) {
                        *a = combine(*kind, *a, *b);
                    }
                }
                (so_far, Spread::Split(_)) => so_far
                    .get_or_insert_with(|| Value::full(whole.ty().clone(), f64::NAN))
                    .put_part(&region(whole, spread, rank), &part)
                    .map_err(|error| format!("result {result_idx} of rank {rank}: {error}"))?,
            }
        }
    }
    results
        .into_iter()
        .map(|result| result.ok_or_else(|| "a result was not computed".into()))
        .collect()
}

fn check(kind: &OpKind, inputs: &[Value], numbers: &mut Numbers) -> Result<usize, String> {
    let at = |what: &str| format!("{kind:?}: {what}");
    let whole = evaluate_op(kind, &inputs.iter().collect::<Vec<_>>())
        .map_err(|error| at(&error.to_string()))?;
    let input_types: Vec<&TensorType> = inputs.iter().map(Value::ty).collect();
    let result_types: Vec<&TensorType> = whole.iter().map(Value::ty).collect();
    let mut n_checked = 0;
    for factor in kind.factors(&input_types, &result_types) {
        for degree in [2, 3] {
            if !factor.admits(degree) {
                continue;
            }
            let at = |what: &str| format!("{kind:?} along `{}` over {degree}: {what}", factor.name);
            let results = divided(kind, inputs, &whole, &factor, degree, numbers)
                .map_err(|error| at(&error))?;
            for (result_idx, (result, whole)) in results.iter().zip(&whole).enumerate() {
                let error = result.relative_error(whole);
                if error > 1e-11 {
                    return Err(at(&format!("result {result_idx} is off by {error:e}")));
                }
            }
            n_checked += 1;
        }
    }
    Ok(n_checked)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn parts_make_the_whole(n in prop::array::uniform5(3..7_usize), seed: u64) {
        let mut numbers = Numbers(seed);
        let mut n_checked = 0;
        for (kind, inputs) in cases(n, &mut numbers) {
            n_checked += check(&kind, &inputs, &mut numbers).map_err(TestCaseError::fail)?;
        }
        prop_assert!(n_checked > 300, "only {} divisions were tried", n_checked);
    }
}

/// A rule that gives no factors at all would pass the property: these must be there.
#[test]
fn the_factors_of_known_layouts_are_offered() {
    let mut numbers = Numbers(1);
    let names = |kind: OpKind, inputs: &[Value]| -> Vec<String> {
        let whole = evaluate_op(&kind, &inputs.iter().collect::<Vec<_>>()).unwrap();
        let input_types: Vec<&TensorType> = inputs.iter().map(Value::ty).collect();
        let result_types: Vec<&TensorType> = whole.iter().map(Value::ty).collect();
        let factors = kind.factors(&input_types, &result_types);
        factors
            .into_iter()
            .map(|factor| factor.name.to_string())
            .collect()
    };
    let x = numbers.floats(&[("a", 3), ("b", 4)]);
    let w = numbers.floats(&[("b", 4), ("c", 5)]);
    let contract = OpKind::Contract {
        out: vec!["a".into(), "c".into()],
    };
    assert_eq!(names(contract, &[x.clone(), w]), ["a", "c", "b"]);
    assert_eq!(names(OpKind::Softmax { dim: "b".into() }, &[x]), ["a"]);
}

/// The check itself must be able to fail: softmax cannot be divided along the dim it normalizes.
#[test]
fn a_wrong_factor_is_caught() {
    let mut numbers = Numbers(2);
    let x = numbers.floats(&[("a", 3), ("b", 4)]);
    let kind = OpKind::Softmax { dim: "b".into() };
    let whole = evaluate_op(&kind, &[&x]).unwrap();
    let factor = Factor {
        name: "b".into(),
        size: 4,
        even: false,
        inputs: vec![Spread::Split("b".into())],
        results: vec![Spread::Split("b".into())],
    };
    let results = divided(&kind, &[x], &whole, &factor, 2, &mut numbers).unwrap();
    assert!(results[0].relative_error(&whole[0]) > 0.1);
}
