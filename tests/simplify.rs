//! Simplification against the interpreter: every rule on graphs where it fires, then random graphs,
//! whole models and the local graphs of random plans.
//!
//! All that a rule finds is evaluated, not only what extraction chooses, in f64 with a tolerance far
//! below the error of a wrong rule: only the order of sums and products may differ.

use crate::support::plans;
use std::collections::{BTreeMap, BTreeSet};

use meshweave_compiler::codegen::fuse::fuse;
use meshweave_compiler::partition::{Keep, partition};
use meshweave_compiler::simplify::{Options, RULES, simplify, simplify_ranks, variants};
use meshweave_dsl::cluster::{Cluster, Host};
use meshweave_dsl::dtype::{DType, Scalar};
use meshweave_dsl::graph::{ConstInit, Graph, Role, TensorId, TensorType};
use meshweave_dsl::layout::{Interval, Mesh, ReduceKind};
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{BinaryFn, Group, OpKind, UnaryFn};
use meshweave_runtime::reference::{Value, evaluate_ranks};
use proptest::prelude::*;

use crate::support::golden::{first_step, golden};

const TOLERANCE: f64 = 1e-12;

/// A graph under construction; sources have the dims `a:4 b:6 c:3 d:2` by their letters.
struct Net(Graph);

fn size(dim: char) -> usize {
    match dim {
        'a' => 4,
        'b' => 6,
        'c' => 3,
        _ => 2,
    }
}

fn shape(dims: &str) -> Vec<(Dim, usize)> {
    dims.chars()
        .map(|dim| (Dim::from(dim.to_string()), size(dim)))
        .collect()
}

fn dims(names: &str) -> Vec<Dim> {
    names
        .chars()
        .map(|dim| Dim::from(dim.to_string()))
        .collect()
}

impl Net {
    fn new() -> Self {
        Self(Graph::new("case"))
    }

    fn source(&mut self, name: &str, of: &str) -> TensorId {
        let ty = TensorType::new(DType::F32, shape(of));
        self.0.add_source(name, ty, Role::Input)
    }

    fn fill(&mut self, name: &str, of: &str, number: f64) -> TensorId {
        let ty = TensorType::new(DType::F32, shape(of));
        let role = Role::Const(ConstInit::Fill(Scalar(number)));
        self.0.add_source(name, ty, role)
    }

    fn op(&mut self, kind: OpKind, inputs: &[TensorId]) -> TensorId {
        let name = format!("t{}", self.0.tensors.len());
        self.0.add_op(name, kind, inputs).unwrap()[0]
    }

    fn unary(&mut self, function: UnaryFn, x: TensorId) -> TensorId {
        self.op(OpKind::Unary(function), &[x])
    }

    fn scale(&mut self, factor: f64, x: TensorId) -> TensorId {
        self.unary(UnaryFn::Scale(Scalar(factor)), x)
    }

    fn binary(&mut self, function: BinaryFn, a: TensorId, b: TensorId) -> TensorId {
        self.op(OpKind::Binary(function), &[a, b])
    }

    fn transpose(&mut self, to: &str, x: TensorId) -> TensorId {
        self.op(OpKind::Transpose { dims: dims(to) }, &[x])
    }

    fn rename(&mut self, from: &str, to: &str, x: TensorId) -> TensorId {
        let (from, to) = (from.into(), to.into());
        self.op(OpKind::Rename { from, to }, &[x])
    }

    fn contract(&mut self, out: &str, a: TensorId, b: TensorId) -> TensorId {
        self.op(OpKind::Contract { out: dims(out) }, &[a, b])
    }

    fn reduce(&mut self, kind: ReduceKind, over: &str, x: TensorId) -> TensorId {
        let dims = dims(over);
        self.op(OpKind::Reduce { kind, dims }, &[x])
    }

    fn expand(&mut self, to: &str, x: TensorId) -> TensorId {
        self.op(OpKind::Expand { dims: shape(to) }, &[x])
    }

    fn slice(&mut self, dim: &str, start: usize, len: usize, x: TensorId) -> TensorId {
        let dim = dim.into();
        self.op(OpKind::Slice { dim, start, len }, &[x])
    }

    fn concat(&mut self, dim: &str, parts: &[TensorId]) -> TensorId {
        self.op(OpKind::Concat { dim: dim.into() }, parts)
    }

    fn output(mut self, id: TensorId) -> Graph {
        self.0.outputs.push(id);
        self.0
    }
}

/// One graph of a closure per rank.
fn ranks(n_ranks: usize, build: impl Fn(&mut Net, usize) -> TensorId) -> Vec<Graph> {
    (0..n_ranks)
        .map(|rank| {
            let mut net = Net::new();
            let output = build(&mut net, rank);
            net.output(output)
        })
        .collect()
}

fn one(build: impl Fn(&mut Net) -> TensorId) -> Vec<Graph> {
    ranks(1, |net, _| build(net))
}

fn group(axis: &str, ranks: &[usize]) -> Group {
    Group {
        axes: vec![axis.into()],
        ranks: ranks.to_vec(),
    }
}

fn all_reduce(net: &mut Net, of: Group, x: TensorId) -> TensorId {
    let kind = ReduceKind::Sum;
    net.op(OpKind::AllReduce { kind, group: of }, &[x])
}

fn all_gather(net: &mut Net, dim: &str, counts: &[usize], of: Group, x: TensorId) -> TensorId {
    let (dim, counts) = (dim.into(), counts.to_vec());
    net.op(
        OpKind::AllGather {
            dim,
            counts,
            group: of,
        },
        &[x],
    )
}

fn reduce_scatter(
    net: &mut Net,
    dim: &str,
    counts: &[usize],
    of: Group,
    rank: usize,
    x: TensorId,
) -> TensorId {
    let mut ty = net.0.ty(x).clone();
    let position = ty.position(&dim.into()).unwrap();
    let member = of.ranks.iter().position(|member| *member == rank).unwrap();
    ty.shape[position].1 = counts[member];
    let kind = OpKind::ReduceScatter {
        kind: ReduceKind::Sum,
        dim: dim.into(),
        counts: counts.to_vec(),
        group: of,
    };
    let name = format!("t{}", net.0.tensors.len());
    net.0.add_typed_op(&name, kind, &[x], ty)
}

/// Chunks of `n` over two ranks, the longer one first.
fn halves(n: usize, rank: usize) -> Interval {
    Interval { start: 0, len: n }.chunk(rank, 2)
}

/// Graphs on which a rule fires, by its name.
fn cases() -> Vec<(&'static str, Vec<Graph>)> {
    let both = || group("tp", &[0, 1]);
    vec![
        (
            "compose-relabels",
            one(|net| {
                let x = net.source("x", "abc");
                let y = net.transpose("cab", x);
                net.transpose("abc", y)
            }),
        ),
        (
            "compose-relabels",
            one(|net| {
                let x = net.source("x", "abc");
                let y = net.rename("b", "e", x);
                let y = net.rename("e", "f", y);
                net.rename("f", "b", y)
            }),
        ),
        (
            "compose-relabels",
            one(|net| {
                let x = net.source("x", "ab");
                let split = OpKind::Split {
                    dim: "b".into(),
                    into: vec![("p".into(), 2), ("q".into(), 3)],
                };
                let y = net.op(split, &[x]);
                let dims = vec!["p".into(), "q".into()];
                net.op(
                    OpKind::Merge {
                        dims,
                        into: "r".into(),
                    },
                    &[y],
                )
            }),
        ),
        (
            "compose-relabels",
            one(|net| {
                let x = net.source("x", "acd");
                let dims = vec!["c".into(), "d".into()];
                let y = net.op(
                    OpKind::Merge {
                        dims,
                        into: "r".into(),
                    },
                    &[x],
                );
                let into = shape("cd");
                net.op(
                    OpKind::Split {
                        dim: "r".into(),
                        into,
                    },
                    &[y],
                )
            }),
        ),
        (
            "lift-relabels",
            one(|net| {
                let x = net.source("x", "ab");
                let y = net.source("y", "ab");
                let x = net.transpose("ba", x);
                let y = net.transpose("ba", y);
                let x = net.unary(UnaryFn::Silu, x);
                net.binary(BinaryFn::Sub, x, y)
            }),
        ),
        (
            "lift-relabels",
            one(|net| {
                let x = net.source("x", "abc");
                let y = net.source("y", "ac");
                let x = net.rename("b", "e", x);
                let z = net.binary(BinaryFn::Sub, x, y);
                net.binary(BinaryFn::Div, y, z)
            }),
        ),
        (
            "reduce-relabeled",
            one(|net| {
                let x = net.source("x", "abc");
                let y = net.transpose("cba", x);
                let y = net.reduce(ReduceKind::Sum, "b", y);
                let z = net.rename("a", "e", x);
                let z = net.reduce(ReduceKind::Max, "ec", z);
                net.contract("cab", y, z)
            }),
        ),
        (
            "reduce-relabeled",
            one(|net| {
                let x = net.source("x", "ab");
                let split = OpKind::Split {
                    dim: "b".into(),
                    into: vec![("p".into(), 2), ("q".into(), 3)],
                };
                let y = net.op(split, &[x]);
                let kept = net.reduce(ReduceKind::Sum, "a", y);
                let dims = vec!["p".into(), "q".into()];
                let merged = net.op(
                    OpKind::Merge {
                        dims,
                        into: "r".into(),
                    },
                    &[kept],
                );
                net.reduce(ReduceKind::Sum, "r", merged)
            }),
        ),
        (
            "contract-relabeled",
            one(|net| {
                let x = net.source("x", "ab");
                let w = net.source("w", "bc");
                let x = net.transpose("ba", x);
                let w = net.transpose("cb", w);
                let y = net.contract("ac", x, w);
                net.transpose("ca", y)
            }),
        ),
        (
            "fold-scalars",
            one(|net| {
                let x = net.source("x", "ab");
                let x = net.scale(3.0, x);
                let x = net.scale(0.25, x);
                let x = net.unary(UnaryFn::Neg, x);
                let x = net.unary(UnaryFn::Neg, x);
                let x = net.unary(UnaryFn::Shift(Scalar(2.0)), x);
                let x = net.unary(UnaryFn::Shift(Scalar(-2.0)), x);
                net.scale(1.0, x)
            }),
        ),
        (
            "fold-constants",
            one(|net| {
                let x = net.source("x", "ab");
                let ones = net.fill("ones", "b", 1.0);
                let zeros = net.fill("zeros", "ab", 0.0);
                let threes = net.fill("threes", "b", 3.0);
                let x = net.binary(BinaryFn::Mul, x, ones);
                let x = net.binary(BinaryFn::Add, zeros, x);
                let x = net.binary(BinaryFn::Sub, x, zeros);
                let x = net.binary(BinaryFn::Div, x, ones);
                let x = net.binary(BinaryFn::Mul, threes, x);
                let x = net.binary(BinaryFn::Sub, x, threes);
                net.binary(BinaryFn::Add, x, threes)
            }),
        ),
        (
            "signs",
            one(|net| {
                let x = net.source("x", "ab");
                let y = net.source("y", "ab");
                let minus_x = net.unary(UnaryFn::Neg, x);
                let minus_y = net.unary(UnaryFn::Neg, y);
                let sum = net.binary(BinaryFn::Add, x, minus_y);
                let difference = net.binary(BinaryFn::Sub, sum, minus_x);
                let swapped = net.binary(BinaryFn::Add, minus_x, difference);
                let product = net.binary(BinaryFn::Mul, minus_x, minus_y);
                net.binary(BinaryFn::Max, swapped, product)
            }),
        ),
        (
            "lift-scale",
            one(|net| {
                let x = net.source("x", "ab");
                let y = net.source("y", "ab");
                let w = net.source("w", "bc");
                let (x, y) = (net.scale(2.0, x), net.scale(2.0, y));
                let sum = net.binary(BinaryFn::Add, x, y);
                let product = net.binary(BinaryFn::Mul, sum, x);
                let quotient = net.binary(BinaryFn::Div, product, y);
                let z = net.contract("ac", quotient, w);
                let z = net.reduce(ReduceKind::Sum, "c", z);
                net.scale(5.0, z)
            }),
        ),
        (
            "lift-scale",
            one(|net| {
                let x = net.source("x", "ab");
                let y = net.source("y", "b");
                let w = net.source("w", "bc");
                let product = net.binary(BinaryFn::Mul, x, y);
                let product = net.scale(3.0, product);
                let z = net.contract("abc", product, w);
                net.scale(7.0, z)
            }),
        ),
        (
            "drop-expand",
            one(|net| {
                let x = net.source("x", "b");
                let y = net.source("y", "abc");
                let z = net.source("z", "b");
                let wide = net.expand("ab", x);
                let wide = net.expand("abc", wide);
                let wide = net.unary(UnaryFn::Exp, wide);
                let sum = net.binary(BinaryFn::Sub, wide, y);
                let other = net.expand("abc", z);
                let both = net.binary(BinaryFn::Mul, wide, other);
                net.binary(BinaryFn::Add, sum, both)
            }),
        ),
        (
            "reduce-expand",
            one(|net| {
                let x = net.source("x", "ab");
                let wide = net.expand("acb", x);
                let sum = net.reduce(ReduceKind::Sum, "cb", wide);
                let most = net.reduce(ReduceKind::Max, "c", wide);
                net.binary(BinaryFn::Mul, most, sum)
            }),
        ),
        (
            "compose-reduces",
            one(|net| {
                let x = net.source("x", "abc");
                let sum = net.reduce(ReduceKind::Sum, "c", x);
                let sum = net.reduce(ReduceKind::Sum, "b", sum);
                let lse = net.reduce(ReduceKind::Lse, "a", x);
                let lse = net.reduce(ReduceKind::Lse, "c", lse);
                let max = net.reduce(ReduceKind::Max, "a", x);
                let max = net.reduce(ReduceKind::Max, "b", max);
                let a = net.expand("abc", sum);
                let b = net.expand("abc", lse);
                let ab = net.binary(BinaryFn::Mul, a, b);
                net.binary(BinaryFn::Add, ab, max)
            }),
        ),
        (
            "factor",
            one(|net| {
                let x = net.source("x", "ab");
                let y = net.source("y", "ab");
                let w = net.source("w", "bc");
                let p = net.contract("ac", x, w);
                let q = net.contract("ac", y, w);
                let left = net.binary(BinaryFn::Sub, p, q);
                let v = net.source("v", "c");
                let left = net.binary(BinaryFn::Mul, left, v);
                let right = net.binary(BinaryFn::Mul, p, v);
                net.binary(BinaryFn::Add, left, right)
            }),
        ),
        (
            "compose-slices",
            one(|net| {
                let x = net.source("x", "ab");
                let y = net.source("y", "ac");
                let y = net.rename("c", "b", y);
                let all = net.concat("b", &[x, y]);
                let all = net.slice("a", 0, 2, all);
                let all = net.slice("b", 1, 7, all);
                let all = net.slice("b", 1, 4, all);
                net.slice("b", 0, 4, all)
            }),
        ),
        (
            "join-slices",
            one(|net| {
                let x = net.source("x", "ab");
                let p = net.slice("b", 1, 2, x);
                let q = net.slice("b", 3, 2, x);
                let r = net.slice("b", 5, 1, x);
                let all = net.concat("b", &[p, q, r]);
                net.concat("b", &[all])
            }),
        ),
        (
            "sink-slices",
            one(|net| {
                let x = net.source("x", "ab");
                let w = net.source("w", "bc");
                let v = net.source("v", "c");
                let y = net.contract("ac", x, w);
                let v = net.expand("ac", v);
                let y = net.binary(BinaryFn::Mul, y, v);
                let y = net.unary(UnaryFn::Tanh, y);
                let y = net.transpose("ca", y);
                let y = net.slice("c", 1, 2, y);
                net.slice("a", 1, 2, y)
            }),
        ),
        (
            "merge-projections",
            one(|net| {
                let x = net.source("x", "ab");
                let x = net.unary(UnaryFn::Tanh, x);
                let w = net.source("w", "bc");
                let u = net.source("u", "bc");
                let p = net.contract("ac", x, w);
                let q = net.contract("ac", x, u);
                let p = net.unary(UnaryFn::Silu, p);
                net.binary(BinaryFn::Mul, p, q)
            }),
        ),
        (
            "scatter-reduction",
            ranks(2, |net, rank| {
                let x = net.source("x", "ab");
                let y = all_reduce(net, both(), x);
                let own = halves(6, rank);
                net.slice("b", own.start, own.len, y)
            }),
        ),
        (
            "scatter-reduction",
            ranks(3, |net, rank| {
                let x = net.source("x", "ab");
                let y = all_reduce(net, group("tp", &[0, 1, 2]), x);
                let own = Interval { start: 0, len: 4 }.chunk(rank, 3);
                net.slice("a", own.start, own.len, y)
            }),
        ),
        (
            "keep-shard",
            ranks(2, |net, rank| {
                let x = net.source("x", "ab");
                let own = halves(3, rank);
                let x = net.slice("b", 0, own.len, x);
                let y = net.unary(UnaryFn::Exp, x);
                let y = all_gather(net, "b", &[2, 1], both(), y);
                net.slice("b", own.start, own.len, y)
            }),
        ),
        (
            "merge-reductions",
            ranks(2, |net, rank| {
                let x = net.source("x", "ab");
                let y = net.source("y", "ab");
                let p = all_reduce(net, both(), x);
                let q = all_reduce(net, both(), y);
                let p = net.binary(BinaryFn::Sub, p, q);
                let r = reduce_scatter(net, "b", &[3, 3], both(), rank, x);
                let s = reduce_scatter(net, "b", &[3, 3], both(), rank, y);
                let r = net.binary(BinaryFn::Add, r, s);
                let p = net.slice("b", 2, 3, p);
                net.binary(BinaryFn::Mul, p, r)
            }),
        ),
        (
            "join-groups",
            ranks(4, |net, rank| {
                let x = net.source("x", "ab");
                let tp = group("tp", [&[0, 1], &[2, 3]][rank / 2]);
                let dp = group("dp", [&[0, 2], &[1, 3]][rank % 2]);
                let y = all_reduce(net, tp.clone(), x);
                let y = all_reduce(net, dp.clone(), y);
                let z = all_gather(net, "b", &[6, 6], tp, x);
                let z = all_gather(net, "b", &[12, 12], dp, z);
                let z = net.slice("b", 9, 6, z);
                net.binary(BinaryFn::Mul, y, z)
            }),
        ),
        (
            "gather-scattered",
            ranks(2, |net, rank| {
                let x = net.source("x", "ab");
                let y = reduce_scatter(net, "a", &[2, 2], both(), rank, x);
                all_gather(net, "a", &[2, 2], both(), y)
            }),
        ),
        (
            "lift-reductions",
            ranks(2, |net, _| {
                let x = net.source("x", "abc");
                let y = all_reduce(net, both(), x);
                let y = net.scale(3.0, y);
                let y = net.unary(UnaryFn::Neg, y);
                let y = net.transpose("bca", y);
                net.reduce(ReduceKind::Sum, "c", y)
            }),
        ),
        (
            "lift-gathers",
            ranks(2, |net, _| {
                let x = net.source("x", "ab");
                let y = net.source("y", "ab");
                let p = all_gather(net, "b", &[6, 6], both(), x);
                let q = all_gather(net, "b", &[6, 6], both(), y);
                let p = net.unary(UnaryFn::Gelu, p);
                let p = net.binary(BinaryFn::Mul, p, q);
                let p = net.transpose("ba", p);
                net.rename("b", "e", p)
            }),
        ),
        (
            "reduce-gathered",
            ranks(2, |net, _| {
                let x = net.source("x", "ab");
                let y = all_gather(net, "b", &[6, 6], both(), x);
                let sum = net.reduce(ReduceKind::Sum, "b", y);
                let max = net.reduce(ReduceKind::Max, "ab", y);
                let sum = net.binary(BinaryFn::Mul, sum, max);
                let lse = net.reduce(ReduceKind::Lse, "b", y);
                net.binary(BinaryFn::Add, sum, lse)
            }),
        ),
        (
            "undo-exchange",
            ranks(2, |net, rank| {
                let x = net.source("x", "ab");
                let own = halves(3, rank);
                let x = net.slice("b", 0, own.len, x);
                let exchange =
                    |split: &str, split_counts: &[usize], concat: &str, concat_counts: &[usize]| {
                        OpKind::AllToAll {
                            split: split.into(),
                            split_counts: split_counts.to_vec(),
                            concat: concat.into(),
                            concat_counts: concat_counts.to_vec(),
                            group: both(),
                        }
                    };
                let mut ty = net.0.ty(x).clone();
                ty.shape = vec![("a".into(), 2), ("b".into(), 3)];
                let there = exchange("a", &[2, 2], "b", &[2, 1]);
                let y = net.0.add_typed_op("there", there, &[x], ty.clone());
                let back = exchange("b", &[2, 1], "a", &[2, 2]);
                let ty = net.0.ty(x).clone();
                net.0.add_typed_op("back", back, &[y], ty)
            }),
        ),
    ]
}

/// Numbers in (−1, 1) that depend on the name, the rank and the index only.
fn value(name: &str, rank: usize, ty: &TensorType) -> Value {
    let seed = name.bytes().fold(2166136261u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(16777619)
    });
    Value::from_fn(ty.clone(), |index| {
        let mut x = seed
            .wrapping_add((rank as u32).wrapping_mul(7919))
            .wrapping_add((index as u32).wrapping_mul(2654435761));
        x ^= x >> 16;
        x = x.wrapping_mul(0x7feb_352d);
        x ^= x >> 15;
        x = x.wrapping_mul(0x846c_a68b);
        x ^= x >> 16;
        f64::from(x) / f64::from(u32::MAX) * 1.9 - 0.95
    })
}

fn inputs(graphs: &[Graph]) -> Vec<BTreeMap<TensorId, Value>> {
    graphs
        .iter()
        .enumerate()
        .map(|(rank, graph)| {
            graph
                .tensor_ids()
                .filter(|id| graph.tensor(*id).role == Role::Input)
                .map(|id| {
                    let tensor = graph.tensor(id);
                    (id, value(&tensor.name, rank, &tensor.ty))
                })
                .collect()
        })
        .collect()
}

/// What leaves the graphs (outputs, gradients, updates), on all ranks.
fn results(graphs: &[Graph], inputs: &[BTreeMap<TensorId, Value>]) -> Vec<Value> {
    let values = evaluate_ranks(graphs, inputs).unwrap();
    let ids = |graph: &Graph| {
        let ends = graph.outputs.iter().chain(graph.gradients.values());
        ends.chain(graph.updates.values())
            .copied()
            .collect::<Vec<_>>()
    };
    graphs
        .iter()
        .zip(&values)
        .flat_map(|(graph, values)| {
            ids(graph)
                .into_iter()
                .map(|id| values.require(graph, id).unwrap().clone())
        })
        .collect()
}

fn assert_equal(graphs: &[Graph], expected: &[Value]) -> Result<(), String> {
    let found = results(graphs, &inputs(graphs));
    if found.len() != expected.len() {
        return Err(format!(
            "{} results, expected {}",
            found.len(),
            expected.len()
        ));
    }
    for (found, expected) in found.iter().zip(expected) {
        if found.ty() != expected.ty() {
            return Err(format!("{} became {}", expected.ty(), found.ty()));
        }
        let error = found.relative_error(expected);
        if error.is_nan() || error > TOLERANCE {
            return Err(format!("off by {error:e}: {:#?}", graphs[0].ops));
        }
    }
    Ok(())
}

#[test]
fn every_rule_has_a_case() {
    let names: BTreeSet<&str> = cases().into_iter().map(|(name, _)| name).collect();
    let rules: BTreeSet<&str> = RULES
        .iter()
        .map(|rule| rule.name)
        .chain(["merge-projections"])
        .collect();
    assert_eq!(names, rules);
}

/// `docs/rewrites.md` lists every rule with its equation.
#[test]
fn every_rule_is_documented() {
    let page = include_str!("../docs/rewrites.md");
    for rule in RULES {
        let row = format!(
            "| `{}` | {} |",
            rule.name,
            rule.statement.replace('|', "\\|")
        );
        assert!(page.contains(&row), "docs/rewrites.md lacks the row\n{row}");
    }
    assert!(page.contains("| `merge-projections` |"));
}

#[test]
fn every_rule_fires_and_holds() {
    for (rule, graphs) in cases() {
        let options = Options::default();
        let (simplified, report) = simplify_ranks(&graphs, &options).unwrap();
        assert!(
            report.found.iter().any(|(name, _)| *name == rule),
            "{rule} does not fire: {report:?}"
        );
        assert!(
            report.after_s <= report.before_s * (1.0 + 1e-12),
            "{rule}: {report:?}"
        );
        let expected = results(&graphs, &inputs(&graphs));
        assert_equal(&simplified, &expected).unwrap_or_else(|error| panic!("{rule}: {error}"));
        let variants = variants(&graphs, &options).unwrap();
        assert!(!variants.is_empty(), "{rule} has no variants");
        for variant in variants {
            assert_equal(&variant, &expected)
                .unwrap_or_else(|error| panic!("a variant by {rule}: {error}"));
        }
    }
}

/// What the cases become, so that a change of rules or prices shows.
#[test]
fn simplified_cases() {
    let mut text = String::new();
    for (rule, graphs) in cases() {
        let (simplified, report) = simplify_ranks(&graphs, &Options::default()).unwrap();
        let ops = |graph: &Graph| {
            let names: Vec<&str> = graph.ops.iter().map(|op| op.kind.name()).collect();
            names.join(" ")
        };
        text.push_str(&format!(
            "{rule}\n  {}\n  {}\n  {:.2} µs -> {:.2} µs\n",
            ops(&graphs[0]),
            ops(&simplified[0]),
            report.before_s * 1e6,
            report.after_s * 1e6
        ));
    }
    insta::assert_snapshot!(text);
}

/// Gathers made again for the backward pass stay apart: they exist so that memory can be freed.
#[test]
fn phases_of_local_graphs_are_kept_apart() {
    let graphs = ranks(2, |net, _| {
        let x = net.source("x", "ab");
        let w = net.source("w", "bc");
        let both = || group("dp", &[0, 1]);
        let first = all_gather(net, "c", &[3, 3], both(), w);
        let y = net.contract("ac", x, first);
        let loss = net.reduce(ReduceKind::Sum, "ac", y);
        let again = all_gather(net, "c", &[3, 3], both(), w);
        let dx = net.contract("ab", y, again);
        net.0.gradients.insert(x, dx);
        loss
    });
    let (simplified, _) = simplify_ranks(&graphs, &Options::default()).unwrap();
    let n_gathers = |graph: &Graph| {
        let is_gather =
            |op: &&meshweave_dsl::graph::Op| matches!(op.kind, OpKind::AllGather { .. });
        graph.ops.iter().filter(is_gather).count()
    };
    assert_eq!(n_gathers(&simplified[0]), 2);
    // Within a phase they are one.
    let graphs = ranks(2, |net, _| {
        let w = net.source("w", "bc");
        let both = || group("dp", &[0, 1]);
        let first = all_gather(net, "c", &[3, 3], both(), w);
        let again = all_gather(net, "c", &[3, 3], both(), w);
        let again = net.unary(UnaryFn::Exp, again);
        net.binary(BinaryFn::Mul, first, again)
    });
    let (simplified, _) = simplify_ranks(&graphs, &Options::default()).unwrap();
    assert_eq!(n_gathers(&simplified[0]), 1);
}

#[test]
fn graphs_of_other_ranks_must_be_alike() {
    let graph = |n: usize| {
        one(|net| {
            let mut x = net.source("x", "ab");
            for _ in 0..n {
                x = net.unary(UnaryFn::Exp, x);
            }
            x
        })
        .remove(0)
    };
    let error = simplify_ranks(&[graph(1), graph(2)], &Options::default()).unwrap_err();
    insta::assert_snapshot!(error, @"internal error in simplification: rank 1 has another graph than rank 0 (`case`)");
}

/// Values of all sources at the first step, by name.
fn named_first_step(graph: &Graph) -> BTreeMap<String, Value> {
    first_step(graph)
        .into_iter()
        .map(|(id, value)| (graph.tensor(id).name.clone(), value))
        .collect()
}

#[test]
fn models_keep_their_meaning_and_names() {
    for (capacity_factor, tied) in [(None, false), (None, true), (Some(2.0), false)] {
        let graph = golden(capacity_factor, tied);
        let simplified = simplify(&graph, &Options::default()).unwrap();
        assert!(simplified.ops.len() <= graph.ops.len());
        assert_eq!(simplified, simplify(&graph, &Options::default()).unwrap());
        let names = |graph: &Graph, ids: Vec<TensorId>| {
            ids.into_iter()
                .map(|id| graph.tensor(id).name.clone())
                .collect::<Vec<_>>()
        };
        let sources = |graph: &Graph| {
            graph
                .tensor_ids()
                .filter(|id| graph.tensor(*id).role != Role::Temp)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            names(&graph, sources(&graph)),
            names(&simplified, sources(&simplified))
        );
        let ends = |graph: &Graph| {
            let mut ends = graph.outputs.clone();
            ends.extend(graph.updates.values());
            ends
        };
        assert_eq!(
            names(&graph, ends(&graph)),
            names(&simplified, ends(&simplified))
        );
        let unique: BTreeSet<&str> = simplified
            .tensors
            .iter()
            .map(|tensor| tensor.name.as_str())
            .collect();
        assert_eq!(unique.len(), simplified.tensors.len());
        let values = named_first_step(&graph);
        let inputs = |graph: &Graph| {
            let given = graph
                .tensor_ids()
                .filter_map(|id| Some((id, values.get(&graph.tensor(id).name)?.clone())));
            vec![given.collect::<BTreeMap<_, _>>()]
        };
        let expected = results(std::slice::from_ref(&graph), &inputs(&graph));
        let found = results(std::slice::from_ref(&simplified), &inputs(&simplified));
        for (found, expected) in found.iter().zip(&expected) {
            assert!(found.relative_error(expected) < 1e-9);
        }
    }
}

/// What the rules find in whole models, and that host code can be made for what is left.
/// Differentiation leaves little to find; models as people write them do.
#[test]
fn models_become_no_dearer() {
    let mut text = String::new();
    for (name, capacity_factor, tied) in [
        ("dense", None, false),
        ("tied", None, true),
        ("moe", Some(2.0), false),
    ] {
        let graph = golden(capacity_factor, tied);
        let (simplified, report) =
            simplify_ranks(std::slice::from_ref(&graph), &Options::default()).unwrap();
        assert!(report.after_s <= report.before_s);
        fuse(&simplified[0]).unwrap();
        text.push_str(&format!(
            "{name}: {} -> {} ops, {:.1} -> {:.1} µs; {:?}\n",
            report.n_ops_before,
            report.n_ops_after,
            report.before_s * 1e6,
            report.after_s * 1e6,
            report.found
        ));
    }
    insta::assert_snapshot!(text);
}

fn meshes() -> impl Strategy<Value = Mesh> {
    prop_oneof![
        Just(Mesh::new([("dp", 2)])),
        Just(Mesh::new([("dp", 3)])),
        Just(Mesh::new([("dp", 2), ("tp", 2)])),
        Just(Mesh::new([("dp", 2), ("tp", 3)])),
    ]
}

/// A graph of random ops over random operands, with every result that nothing reads as output.
fn random_graph(seed: u32, n_ops: usize) -> Graph {
    let mut numbers = plans::Numbers::new(seed);
    let mut net = Net::new();
    let mut tensors: Vec<TensorId> = Vec::new();
    for (name, of) in [
        ("x", "ab"),
        ("y", "ab"),
        ("z", "b"),
        ("w", "bc"),
        ("v", "abc"),
    ] {
        tensors.push(net.source(name, of));
    }
    tensors.push(net.fill("ones", "b", 1.0));
    tensors.push(net.fill("zeros", "ab", 0.0));
    let mut is_read = BTreeSet::new();
    while net.0.ops.len() < n_ops {
        let mut pick = || tensors[numbers.below(tensors.len())];
        let (x, y) = (pick(), pick());
        let ty = net.0.ty(x).clone();
        let dims_of = |ty: &TensorType| ty.dims().cloned().collect::<Vec<Dim>>();
        let mut reversed = dims_of(&ty);
        reversed.reverse();
        let Some(dim) = reversed.first().cloned() else {
            continue;
        };
        let len = ty.size_of(&dim).unwrap();
        let kind = match numbers.below(13) {
            0 => OpKind::Unary(UnaryFn::Neg),
            1 => OpKind::Unary(UnaryFn::Scale(Scalar(1.0 + numbers.below(3) as f64))),
            2 => OpKind::Unary(UnaryFn::Tanh),
            3 => OpKind::Binary(BinaryFn::Add),
            4 => OpKind::Binary(BinaryFn::Sub),
            5 => OpKind::Binary(BinaryFn::Mul),
            6 => OpKind::Transpose { dims: reversed },
            7 => OpKind::Reduce {
                kind: ReduceKind::Sum,
                dims: vec![dim],
            },
            8 if len > 1 => OpKind::Slice {
                dim,
                start: numbers.below(2),
                len: len - 1,
            },
            9 => {
                let mut out = dims_of(&ty);
                out.extend(net.0.ty(y).dims().filter(|dim| !ty.has(dim)).cloned());
                out.retain(|dim| !(ty.has(dim) && net.0.ty(y).has(dim)));
                OpKind::Contract { out }
            }
            10 => OpKind::Expand { dims: shape("abc") },
            11 => OpKind::Concat { dim },
            _ => OpKind::Rename {
                from: dim,
                to: ["b", "d"][numbers.below(2)].into(),
            },
        };
        let inputs = match kind {
            OpKind::Binary(_) | OpKind::Contract { .. } | OpKind::Concat { .. } => vec![x, y],
            _ => vec![x],
        };
        let types: Vec<&TensorType> = inputs.iter().map(|id| net.0.ty(*id)).collect();
        // What the shape rules refuse, repeats a dim or grows too large is drawn again.
        let is_small = kind.infer(&types).is_ok_and(|types| {
            let names: BTreeSet<&Dim> = types[0].dims().collect();
            names.len() == types[0].shape.len() && types[0].n_elements() <= 4096
        });
        if is_small {
            is_read.extend(inputs.iter().copied());
            tensors.push(net.op(kind, &inputs));
        }
    }
    let unread: Vec<TensorId> = net
        .0
        .ops
        .iter()
        .flat_map(|op| op.results.clone())
        .filter(|id| !is_read.contains(id))
        .collect();
    net.0.outputs = unread;
    net.0
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_graphs_keep_their_meaning(seed in 0u32..1_000_000, n_ops in 4usize..28) {
        let graphs = vec![random_graph(seed, n_ops)];
        let expected = results(&graphs, &inputs(&graphs));
        let (simplified, report) = simplify_ranks(&graphs, &Options::default()).unwrap();
        prop_assert!(report.after_s <= report.before_s * (1.0 + 1e-9), "{:?}", report);
        prop_assert_eq!(close(&simplified, &expected), Ok(()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn local_graphs_keep_their_meaning(mesh in meshes(), seed in 0u32..1000, tied: bool) {
        let graph = simplify(&golden(None, tied), &Options::default()).unwrap();
        let plan = plans::random_plan(&graph, &mesh, seed);
        let cluster = Cluster::local(mesh.n_ranks(), &Host::nominal());
        let locals = partition(&graph, &plan, Keep::Gradients, &cluster).unwrap().locals;
        let (simplified, report) = simplify_ranks(&locals, &Options::default()).unwrap();
        prop_assert!(report.after_s <= report.before_s * (1.0 + 1e-9), "{:?}", report);
        let values = named_first_step(&graph);
        let inputs = |locals: &[Graph]| -> Vec<BTreeMap<TensorId, Value>> {
            locals
                .iter()
                .enumerate()
                .map(|(rank, local)| {
                    local
                        .tensor_ids()
                        .filter(|id| local.tensor(*id).role != Role::Temp)
                        .map(|id| {
                            let name = &local.tensor(id).name;
                            let whole = graph.find(name).unwrap();
                            let region = plan
                                .source_layout(whole)
                                .region(&graph.ty(whole).shape, &mesh, rank);
                            (id, values[name].part(&region).unwrap())
                        })
                        .collect()
                })
                .collect()
        };
        let expected = results(&locals, &inputs(&locals));
        let found = results(&simplified, &inputs(&simplified));
        prop_assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            prop_assert!(found.relative_error(expected) < 1e-8);
        }
    }
}

/// Sums in another order: the error is judged against the size of the terms, not of a sum that
/// cancels.
fn close(graphs: &[Graph], expected: &[Value]) -> Result<(), String> {
    let found = results(graphs, &inputs(graphs));
    for (found, expected) in found.iter().zip(expected) {
        if found.ty() != expected.ty() {
            return Err(format!("{} became {}", expected.ty(), found.ty()));
        }
        for (a, b) in found.data().iter().zip(expected.data()) {
            let is_close = (a - b).abs() <= 1e-9 * (1.0 + b.abs());
            if !is_close {
                return Err(format!("{a} instead of {b}"));
            }
        }
    }
    Ok(())
}
