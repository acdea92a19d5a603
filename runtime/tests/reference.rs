//! The oracle on examples whose results are known without it.

// Helpers of tests may fail as tests do.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use meshweave_dsl::dtype::DType::{F32, I32};
use meshweave_dsl::graph::{
    ConstInit, Graph, Init, Role, RopeScaling, RopeTable, TensorId, TensorType,
};
use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::op::{AttentionDims, BinaryFn, Group, OpKind, UnaryFn};
use meshweave_runtime::reference::{
    ReferenceError, Value, evaluate, evaluate_ranks, golden_inputs, hash_uniform, train,
};

type Dims<'a> = &'a [(&'a str, usize)];

fn f32s(dims: Dims) -> TensorType {
    TensorType::new(F32, dims.iter().copied())
}

fn op(graph: &mut Graph, name: &str, kind: OpKind, inputs: &[TensorId]) -> TensorId {
    graph.add_op(name, kind, inputs).unwrap()[0]
}

fn contract(graph: &mut Graph, name: &str, a: TensorId, b: TensorId, out: &[&str]) -> TensorId {
    let out = out.iter().map(|dim| (*dim).into()).collect();
    op(graph, name, OpKind::Contract { out }, &[a, b])
}

fn hashed(g: &mut Graph, name: &str, dims: Dims, stream: u32, scale: f64) -> TensorId {
    let init = Init::Hash {
        stream,
        scale: scale as f32,
    };
    g.add_source(name, f32s(dims), Role::Param(init))
}

fn rename(from: &str, to: &str) -> OpKind {
    OpKind::Rename {
        from: from.into(),
        to: to.into(),
    }
}

/// The golden dense decoder of size `tiny`, forward only, built op by op.
fn golden_forward() -> Graph {
    const D: usize = 128;
    const LAYERS: usize = 2;
    let mut g = Graph::new("tiny");
    let tokens_ty = TensorType::new(I32, [("batch", 8), ("seq", 64)]);
    let tokens = g.add_source("tokens", tokens_ty.clone(), Role::Input);
    let targets = g.add_source("targets", tokens_ty, Role::Input);
    let ones = |g: &mut Graph, name: &str| {
        g.add_source(name, f32s(&[("embed", D)]), Role::Param(Init::Ones))
    };
    let table = RopeTable {
        theta: 1e4,
        rotary_dim: 32,
        scaling: RopeScaling::None,
    };
    let rope_ty = f32s(&[("seq", 64), ("half", 16)]);
    let cos = ConstInit::RopeCos(table.clone());
    let cos = g.add_source("cos", rope_ty.clone(), Role::Const(cos));
    let sin = g.add_source("sin", rope_ty, Role::Const(ConstInit::RopeSin(table)));
    let wte = hashed(&mut g, "wte", &[("vocab", 512), ("embed", D)], 0, 1.0);
    let gather = OpKind::Gather {
        dim: "vocab".into(),
        offset: 0,
    };
    let mut h = op(&mut g, "h", gather, &[wte, tokens]);
    let norm = OpKind::RmsNorm {
        dim: "embed".into(),
        eps: 1e-5.into(),
    };
    let fan_in = |n: usize| (3.0 / n as f64).sqrt();
    let residual = 1.0 / (2.0 * LAYERS as f64).sqrt();
    for layer in 0..LAYERS {
        let name = |part: &str| format!("layers[{layer}].{part}");
        let stream = |j: u32| 16 * (layer as u32 + 1) + j;
        let ln1 = ones(&mut g, &name("ln1"));
        let a = op(&mut g, &name("a"), norm.clone(), &[h, ln1]);
        let mut heads = Vec::new();
        for (j, part) in ["q", "k", "v"].into_iter().enumerate() {
            let dims = [("embed", D), ("heads", 4), ("head", 32)];
            let w_name = name(&format!("w{part}"));
            let w = hashed(&mut g, &w_name, &dims, stream(j as u32 + 1), fan_in(D));
            let out = ["batch", "seq", "heads", "head"];
            let x = contract(&mut g, &name(part), a, w, &out);
            let rope = OpKind::Rope {
                dim: "head".into(),
                inverse: false,
            };
            let x = match part {
                "v" => op(&mut g, &name("vv"), rename("head", "value"), &[x]),
                _ => op(&mut g, &name(&format!("{part}r")), rope, &[x, cos, sin]),
            };
            heads.push(match part {
                "q" => x,
                _ => {
                    let name = name(&format!("{part}s"));
                    op(&mut g, &name, rename("seq", "kv_seq"), &[x])
                }
            });
        }
        let attention = OpKind::Attention(AttentionDims {
            seq: "seq".into(),
            kv_seq: "kv_seq".into(),
            head: "head".into(),
            value: "value".into(),
            scale: (1.0 / 32.0_f64.sqrt()).into(),
            causal: true,
            offset: 0,
        });
        let o = op(&mut g, &name("o"), attention, &heads);
        let dims = [("heads", 4), ("value", 32), ("embed", D)];
        let wo = hashed(&mut g, &name("wo"), &dims, stream(4), fan_in(D) * residual);
        let o = contract(&mut g, &name("proj"), o, wo, &["batch", "seq", "embed"]);
        h = op(&mut g, &name("h1"), OpKind::Binary(BinaryFn::Add), &[h, o]);
        let ln2 = ones(&mut g, &name("ln2"));
        let m = op(&mut g, &name("m"), norm.clone(), &[h, ln2]);
        let dims = [("embed", D), ("ffn", 512)];
        let wg = hashed(&mut g, &name("wg"), &dims, stream(6), fan_in(D));
        let wu = hashed(&mut g, &name("wu"), &dims, stream(7), fan_in(D));
        let dims = [("ffn", 512), ("embed", D)];
        let wd = hashed(
            &mut g,
            &name("wd"),
            &dims,
            stream(8),
            fan_in(512) * residual,
        );
        let gate = contract(&mut g, &name("gate"), m, wg, &["batch", "seq", "ffn"]);
        let gate = op(&mut g, &name("silu"), OpKind::Unary(UnaryFn::Silu), &[gate]);
        let up = contract(&mut g, &name("up"), m, wu, &["batch", "seq", "ffn"]);
        let mul = OpKind::Binary(BinaryFn::Mul);
        let f = op(&mut g, &name("f"), mul, &[gate, up]);
        let f = contract(&mut g, &name("down"), f, wd, &["batch", "seq", "embed"]);
        h = op(&mut g, &name("h2"), OpKind::Binary(BinaryFn::Add), &[h, f]);
    }
    let lnf = ones(&mut g, "lnf");
    let h = op(&mut g, "final", norm, &[h, lnf]);
    let dims = [("embed", D), ("vocab", 512)];
    let head = hashed(&mut g, "head", &dims, 2, fan_in(D));
    let logits = contract(&mut g, "logits", h, head, &["batch", "seq", "vocab"]);
    let lse = OpKind::Reduce {
        kind: ReduceKind::Lse,
        dims: vec!["vocab".into()],
    };
    let lse = op(&mut g, "lse", lse, &[logits]);
    let pick = OpKind::Pick {
        dim: "vocab".into(),
        offset: 0,
    };
    let picked = op(&mut g, "picked", pick, &[logits, targets]);
    let nll = op(&mut g, "nll", OpKind::Binary(BinaryFn::Sub), &[lse, picked]);
    let sum = OpKind::Reduce {
        kind: ReduceKind::Sum,
        dims: vec!["batch".into(), "seq".into()],
    };
    let sum = op(&mut g, "sum", sum, &[nll]);
    let scale = OpKind::Unary(UnaryFn::Scale((1.0 / 512.0).into()));
    let loss = op(&mut g, "loss", scale, &[sum]);
    g.outputs.push(loss);
    g
}

#[test]
fn golden_loss_before_training() {
    let graph = golden_forward();
    let inputs = golden_inputs(&graph, 512).unwrap();
    let loss = train(&graph, &inputs, 1).unwrap()[0].loss();
    assert!((loss - 6.739996).abs() < 5e-6, "{loss}");
}

#[test]
fn hash_is_exact() {
    // lowbias32(0) = 0, so the first number of stream 0 is −1.
    assert_eq!(hash_uniform(0, 0), -1.0);
    let mean = (0..4096).map(|i| hash_uniform(7, i)).sum::<f32>() / 4096.0;
    assert!(mean.abs() < 0.03, "{mean}");
}

#[test]
fn sgd_steps_follow_the_closed_form() {
    // Loss Σ p², gradient 2 p: every step multiplies p by 1 − 2 lr.
    let mut g = Graph::new("quadratic");
    let p = g.add_source("p", f32s(&[("x", 3)]), Role::Param(Init::Ones));
    let square = op(&mut g, "square", OpKind::Unary(UnaryFn::Square), &[p]);
    let sum = OpKind::Reduce {
        kind: ReduceKind::Sum,
        dims: vec!["x".into()],
    };
    let loss = op(&mut g, "loss", sum, &[square]);
    let double = OpKind::Unary(UnaryFn::Scale(2.0.into()));
    let gradient = op(&mut g, "grad.p", double, &[p]);
    let sgd = OpKind::Sgd { lr: 0.25.into() };
    let next = op(&mut g, "p.next", sgd, &[p, gradient]);
    g.outputs.push(loss);
    g.updates.insert(p, next);
    g.gradients.insert(p, gradient);
    let steps = train(&g, &BTreeMap::new(), 3).unwrap();
    let losses: Vec<f64> = steps.iter().map(|step| step.loss()).collect();
    assert_eq!(losses, [3.0, 0.75, 0.1875]);
    assert_eq!(steps[2].gradients[&p].data(), [0.5, 0.5, 0.5]);
}

/// A graph of one collective per rank; x holds 10·rank + i.
fn collective(
    n_ranks: usize,
    x_ty: impl Fn(usize) -> TensorType,
    kind: impl Fn(usize) -> OpKind,
    ty: impl Fn(usize) -> TensorType,
) -> Result<Vec<Vec<f64>>, ReferenceError> {
    let mut graphs = Vec::new();
    let mut inputs = Vec::new();
    for rank in 0..n_ranks {
        let mut g = Graph::new("local");
        let x = g.add_source("x", x_ty(rank), Role::Input);
        let y = g.add_typed_op("y", kind(rank), &[x], ty(rank));
        g.outputs.push(y);
        graphs.push(g);
        let value = Value::from_fn(x_ty(rank), |i| (10 * rank + i) as f64);
        inputs.push(BTreeMap::from([(x, value)]));
    }
    let values = evaluate_ranks(&graphs, &inputs)?;
    Ok(values
        .iter()
        .zip(&graphs)
        .map(|(values, graph)| values.named(graph, "y").unwrap().data().to_vec())
        .collect())
}

fn group(ranks: &[usize]) -> Group {
    Group {
        axes: vec!["tp".into()],
        ranks: ranks.to_vec(),
    }
}

#[test]
fn collectives_exchange_exactly() {
    let x = |sizes: [usize; 2]| move |rank: usize| f32s(&[("x", sizes[rank])]);
    let gather = |_| OpKind::AllGather {
        dim: "x".into(),
        counts: vec![2, 1],
        group: group(&[0, 1]),
    };
    let gathered = collective(2, x([2, 1]), gather, x([3, 3])).unwrap();
    assert_eq!(gathered, [[0.0, 1.0, 10.0], [0.0, 1.0, 10.0]]);

    let reduce = |kind| {
        move |_| OpKind::AllReduce {
            kind,
            group: group(&[0, 1]),
        }
    };
    let summed = collective(2, x([2, 2]), reduce(ReduceKind::Sum), x([2, 2])).unwrap();
    assert_eq!(summed, [[10.0, 12.0], [10.0, 12.0]]);
    let greatest = collective(2, x([2, 2]), reduce(ReduceKind::Max), x([2, 2])).unwrap();
    assert_eq!(greatest, [[10.0, 11.0], [10.0, 11.0]]);
    let lse = collective(2, x([1, 1]), reduce(ReduceKind::Lse), x([1, 1])).unwrap();
    assert_eq!(lse[0], lse[1]);
    assert!((lse[0][0] - (1.0 + 10.0_f64.exp()).ln()).abs() < 1e-14);

    let scatter = |_| OpKind::ReduceScatter {
        kind: ReduceKind::Sum,
        dim: "x".into(),
        counts: vec![2, 1],
        group: group(&[1, 0]),
    };
    // The group's first member is rank 1: it keeps the first two.
    let scattered = collective(2, x([3, 3]), scatter, x([1, 2])).unwrap();
    assert_eq!(scattered, [vec![14.0], vec![10.0, 12.0]]);

    let permute = |rank| OpKind::CollectivePermute {
        to: (rank + 1) % 3,
        from: (rank + 2) % 3,
        group: group(&[0, 1, 2]),
    };
    let one = |_| f32s(&[("x", 1)]);
    assert_eq!(
        collective(3, one, permute, one).unwrap(),
        [[20.0], [0.0], [10.0]]
    );

    let broadcast = |_| OpKind::Broadcast {
        group: group(&[1, 0]),
    };
    assert_eq!(
        collective(2, one, broadcast, one).unwrap(),
        [[10.0], [10.0]]
    );
}

#[test]
fn all_to_all_transposes_the_shards() {
    // Global [a:3, b:3]; ranks hold rows 0..2 and 2..3, and leave with columns 0..2 and 2..3.
    let rows = |rank: usize| f32s(&[("a", [2, 1][rank]), ("b", 3)]);
    let columns = |rank: usize| f32s(&[("a", 3), ("b", [2, 1][rank])]);
    let kind = |_| OpKind::AllToAll {
        split: "b".into(),
        split_counts: vec![2, 1],
        concat: "a".into(),
        concat_counts: vec![2, 1],
        group: group(&[0, 1]),
    };
    assert_eq!(
        collective(2, rows, kind, columns).unwrap(),
        [vec![0.0, 1.0, 3.0, 4.0, 10.0, 11.0], vec![2.0, 5.0, 12.0]]
    );
}

#[test]
fn disagreeing_ranks_are_named() {
    let x = |_| f32s(&[("x", 1)]);
    let kind = |rank: usize| OpKind::AllReduce {
        kind: [ReduceKind::Sum, ReduceKind::Max][rank],
        group: group(&[0, 1]),
    };
    insta::assert_snapshot!(collective(2, x, kind, x).unwrap_err());
    let lonely = |rank| OpKind::Broadcast {
        group: if rank == 0 {
            group(&[0, 1])
        } else {
            group(&[1])
        },
    };
    insta::assert_snapshot!(collective(2, x, lonely, x).unwrap_err());
    let permute = |rank| OpKind::CollectivePermute {
        to: rank,
        from: 1 - rank,
        group: group(&[0, 1]),
    };
    insta::assert_snapshot!(collective(2, x, permute, x).unwrap_err());
}

#[test]
fn wrong_inputs_are_named() {
    let mut g = Graph::new("g");
    let x = g.add_source("x", f32s(&[("a", 2)]), Role::Input);
    op(&mut g, "y", OpKind::Unary(UnaryFn::Exp), &[x]);
    insta::assert_snapshot!(evaluate(&g, &BTreeMap::new()).unwrap_err());
    let wrong = Value::full(f32s(&[("a", 3)]), 1.0);
    insta::assert_snapshot!(evaluate(&g, &BTreeMap::from([(x, wrong)])).unwrap_err());
}
