//! A graph for every rule, on which it fires.

use meshweave_dsl::dtype::{DType, Scalar};
use meshweave_dsl::graph::{ConstInit, Graph, Role, TensorId, TensorType};
use meshweave_dsl::layout::{Interval, ReduceKind};
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{BinaryFn, Group, OpKind, UnaryFn};

/// A graph under construction; sources have the dims `a:4 b:6 c:3 d:2` by their letters.
pub(super) struct Net(pub(super) Graph);

pub(super) fn size(dim: char) -> usize {
    match dim {
        'a' => 4,
        'b' => 6,
        'c' => 3,
        _ => 2,
    }
}

pub(super) fn shape(dims: &str) -> Vec<(Dim, usize)> {
    dims.chars()
        .map(|dim| (Dim::from(dim.to_string()), size(dim)))
        .collect()
}

pub(super) fn dims(names: &str) -> Vec<Dim> {
    names
        .chars()
        .map(|dim| Dim::from(dim.to_string()))
        .collect()
}

impl Net {
    pub(super) fn new() -> Self {
        Self(Graph::new("case"))
    }

    pub(super) fn source(&mut self, name: &str, of: &str) -> TensorId {
        let ty = TensorType::new(DType::F32, shape(of));
        self.0.add_source(name, ty, Role::Input)
    }

    pub(super) fn fill(&mut self, name: &str, of: &str, number: f64) -> TensorId {
        let ty = TensorType::new(DType::F32, shape(of));
        let role = Role::Const(ConstInit::Fill(Scalar(number)));
        self.0.add_source(name, ty, role)
    }

    pub(super) fn op(&mut self, kind: OpKind, inputs: &[TensorId]) -> TensorId {
        let name = format!("t{}", self.0.tensors.len());
        self.0.add_op(name, kind, inputs).unwrap()[0]
    }

    pub(super) fn unary(&mut self, function: UnaryFn, x: TensorId) -> TensorId {
        self.op(OpKind::Unary(function), &[x])
    }

    pub(super) fn scale(&mut self, factor: f64, x: TensorId) -> TensorId {
        self.unary(UnaryFn::Scale(Scalar(factor)), x)
    }

    pub(super) fn binary(&mut self, function: BinaryFn, a: TensorId, b: TensorId) -> TensorId {
        self.op(OpKind::Binary(function), &[a, b])
    }

    pub(super) fn transpose(&mut self, to: &str, x: TensorId) -> TensorId {
        self.op(OpKind::Transpose { dims: dims(to) }, &[x])
    }

    pub(super) fn rename(&mut self, from: &str, to: &str, x: TensorId) -> TensorId {
        let (from, to) = (from.into(), to.into());
        self.op(OpKind::Rename { from, to }, &[x])
    }

    pub(super) fn contract(&mut self, out: &str, a: TensorId, b: TensorId) -> TensorId {
        self.op(OpKind::Contract { out: dims(out) }, &[a, b])
    }

    pub(super) fn reduce(&mut self, kind: ReduceKind, over: &str, x: TensorId) -> TensorId {
        let dims = dims(over);
        self.op(OpKind::Reduce { kind, dims }, &[x])
    }

    pub(super) fn expand(&mut self, to: &str, x: TensorId) -> TensorId {
        self.op(OpKind::Expand { dims: shape(to) }, &[x])
    }

    pub(super) fn slice(&mut self, dim: &str, start: usize, len: usize, x: TensorId) -> TensorId {
        let dim = dim.into();
        self.op(OpKind::Slice { dim, start, len }, &[x])
    }

    pub(super) fn concat(&mut self, dim: &str, parts: &[TensorId]) -> TensorId {
        self.op(OpKind::Concat { dim: dim.into() }, parts)
    }

    pub(super) fn output(mut self, id: TensorId) -> Graph {
        self.0.outputs.push(id);
        self.0
    }
}

/// One graph of a closure per rank.
pub(super) fn ranks(n_ranks: usize, build: impl Fn(&mut Net, usize) -> TensorId) -> Vec<Graph> {
    (0..n_ranks)
        .map(|rank| {
            let mut net = Net::new();
            let output = build(&mut net, rank);
            net.output(output)
        })
        .collect()
}

pub(super) fn one(build: impl Fn(&mut Net) -> TensorId) -> Vec<Graph> {
    ranks(1, |net, _| build(net))
}

pub(super) fn group(axis: &str, ranks: &[usize]) -> Group {
    Group {
        axes: vec![axis.into()],
        ranks: ranks.to_vec(),
    }
}

pub(super) fn all_reduce(net: &mut Net, of: Group, x: TensorId) -> TensorId {
    let kind = ReduceKind::Sum;
    net.op(OpKind::AllReduce { kind, group: of }, &[x])
}

pub(super) fn all_gather(
    net: &mut Net,
    dim: &str,
    counts: &[usize],
    of: Group,
    x: TensorId,
) -> TensorId {
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

pub(super) fn reduce_scatter(
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
pub(super) fn halves(n: usize, rank: usize) -> Interval {
    Interval { start: 0, len: n }.chunk(rank, 2)
}

/// Graphs on which a rule fires, by its name.
pub(super) fn cases() -> Vec<(&'static str, Vec<Graph>)> {
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
