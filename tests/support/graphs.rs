//! Random small graphs: ops of every kind over random dims, legal by construction.

#![allow(dead_code)] // each test file uses its part

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{
    ConstInit, Graph, Init, Role, RopeScaling, RopeTable, TensorId, TensorType,
};
use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{AttentionDims, BinaryFn, MoeDims, OpKind, UnaryFn};

/// A deterministic stream of numbers (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((x ^ (x >> 31)) % bound.max(1) as u64) as usize
    }

    fn pick<T: Clone>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())].clone()
    }

    /// Some of the items, at least `least`, in random order.
    fn some<T: Clone>(&mut self, items: &[T], least: usize) -> Vec<T> {
        let mut rest = items.to_vec();
        let n = least + self.below(items.len() + 1 - least);
        (0..n)
            .map(|_| rest.remove(self.below(rest.len())))
            .collect()
    }
}

/// A graph of about `n_ops` ops and a few more; outputs are the results that nothing reads.
/// Values stay small and finite. Integer inputs are indices below 3, the least size of a dim.
pub fn random_graph(seed: u64, n_ops: usize) -> Graph {
    let mut build = Build::new(seed);
    let mut n_tries = 0;
    while build.graph.ops.len() < n_ops && n_tries < 100 * n_ops + 100 {
        n_tries += 1;
        build.try_op();
    }
    build.finish()
}

struct Build {
    graph: Graph,
    numbers: Numbers,
    dims: Vec<(Dim, usize)>,
    n_names: usize,
    /// Tensors that no further op reads.
    hidden: Vec<TensorId>,
}

impl Build {
    fn new(seed: u64) -> Self {
        let mut numbers = Numbers(seed);
        let dims: Vec<(Dim, usize)> = ["a", "b", "c", "d"]
            .into_iter()
            .map(|dim| (dim.into(), 3 + numbers.below(4)))
            .collect();
        let mut build = Self {
            graph: Graph::new(format!("random {seed}")),
            numbers,
            dims,
            n_names: 0,
            hidden: Vec::new(),
        };
        for _ in 0..4 {
            build.float_source();
        }
        for _ in 0..2 {
            let dims = build.dims.clone();
            let shape = build.numbers.some(&dims, 1);
            build.source(DType::I32, shape, Role::Input);
        }
        build
    }

    fn name(&mut self) -> String {
        self.n_names += 1;
        match self.n_names % 4 {
            0 => format!("layers[{}].x.{}", self.n_names % 3, self.n_names),
            1 => format!("{} \"odd\"", self.n_names),
            _ => format!("t{}", self.n_names),
        }
    }

    fn source(&mut self, dtype: DType, shape: Vec<(Dim, usize)>, role: Role) -> TensorId {
        let name = self.name();
        self.graph
            .add_source(name, TensorType { dtype, shape }, role)
    }

    fn float_source(&mut self) -> TensorId {
        let dims = self.dims.clone();
        let shape = self.numbers.some(&dims, 1);
        self.float_source_of(shape)
    }

    fn float_source_of(&mut self, shape: Vec<(Dim, usize)>) -> TensorId {
        let stream = self.numbers.below(1000) as u32;
        let role = match self.numbers.below(6) {
            0 => Role::Input,
            1 => Role::Const(ConstInit::Fill(0.75.into())),
            2 => Role::Const(ConstInit::Iota {
                dim: shape[0].0.clone(),
            }),
            3 => Role::Param(Init::Ones),
            _ => Role::Param(Init::Hash { stream, scale: 0.9 }),
        };
        self.source(DType::F32, shape, role)
    }

    fn any(&mut self, dtype: DType) -> TensorId {
        let ids: Vec<TensorId> = self
            .graph
            .tensor_ids()
            .filter(|id| self.graph.ty(*id).dtype == dtype && !self.hidden.contains(id))
            .collect();
        // Late tensors more often, so that the graph is deep.
        let n = ids.len();
        let late = n.saturating_sub(1 + self.numbers.below(5));
        if self.numbers.below(3) == 0 {
            self.numbers.pick(&ids)
        } else {
            ids[late.min(n - 1)]
        }
    }

    /// A float tensor of just this shape: an existing one or a new source.
    fn of_shape(&mut self, shape: Vec<(Dim, usize)>) -> TensorId {
        let found: Vec<TensorId> = self
            .graph
            .tensor_ids()
            .filter(|id| {
                let ty = self.graph.ty(*id);
                ty.dtype == DType::F32 && ty.shape == shape && !self.hidden.contains(id)
            })
            .collect();
        match found.as_slice() {
            [] if shape.is_empty() => self.source(DType::F32, shape, Role::Input),
            [] => self.float_source_of(shape),
            found => self.numbers.pick(found),
        }
    }

    /// A new source whose elements differ by more than rounding, so that the greatest are the same
    /// however they were computed.
    fn without_ties(&mut self, shape: Vec<(Dim, usize)>) -> TensorId {
        let stream = self.numbers.below(1000) as u32;
        let init = Init::Hash { stream, scale: 0.9 };
        self.source(DType::F32, shape, Role::Param(init))
    }

    fn index_of_shape(&mut self, shape: Vec<(Dim, usize)>) -> TensorId {
        self.source(DType::I32, shape, Role::Input)
    }

    fn add(&mut self, kind: OpKind, inputs: &[TensorId]) -> Option<Vec<TensorId>> {
        let name = self.name();
        let types: Vec<&TensorType> = inputs.iter().map(|id| self.graph.ty(*id)).collect();
        let results = kind.infer(&types).ok()?;
        // Small enough to be evaluated many times.
        if results.iter().any(|ty| ty.n_elements() > 2000) {
            return None;
        }
        self.graph.add_op(name, kind, inputs).ok()
    }

    fn try_op(&mut self) {
        let x = self.any(DType::F32);
        let ty = self.graph.ty(x).clone();
        let Some((dim, size)) = (!ty.shape.is_empty()).then(|| self.numbers.pick(&ty.shape)) else {
            return;
        };
        let dims: Vec<Dim> = ty.dims().cloned().collect();
        let rows: Vec<(Dim, usize)> = ty
            .shape
            .iter()
            .filter(|(name, _)| *name != dim)
            .cloned()
            .collect();
        let all_dims = self.dims.clone();
        match self.numbers.below(22) {
            0 | 1 => {
                let function = self.numbers.pick(&[
                    UnaryFn::Neg,
                    UnaryFn::Tanh,
                    UnaryFn::Sigmoid,
                    UnaryFn::Silu,
                    UnaryFn::Relu,
                    UnaryFn::Gelu,
                    UnaryFn::GeluTanh,
                    UnaryFn::Scale(0.5.into()),
                    UnaryFn::Shift((-0.25).into()),
                ]);
                self.add(OpKind::Unary(function), &[x]);
            }
            2 | 3 => {
                let function = self.numbers.pick(&[
                    BinaryFn::Add,
                    BinaryFn::Sub,
                    BinaryFn::Mul,
                    BinaryFn::Max,
                    BinaryFn::SiluGrad,
                    BinaryFn::GeluGrad,
                ]);
                let narrow = self.numbers.some(&ty.shape, 0);
                let y = self.of_shape(narrow);
                let inputs = if self.numbers.below(2) == 0 {
                    [x, y]
                } else {
                    [y, x]
                };
                self.add(OpKind::Binary(function), &inputs);
            }
            4..=6 => {
                let other = self.any(DType::F32);
                let mut known = dims.clone();
                known.extend(
                    self.graph
                        .ty(other)
                        .dims()
                        .filter(|dim| !ty.has(dim))
                        .cloned(),
                );
                let out = self.numbers.some(&known, 0);
                self.add(OpKind::Contract { out }, &[x, other]);
            }
            7 => {
                let kind = self
                    .numbers
                    .pick(&[ReduceKind::Sum, ReduceKind::Max, ReduceKind::Lse]);
                let dims = self.numbers.some(&dims, 1);
                self.add(OpKind::Reduce { kind, dims }, &[x]);
            }
            8 => {
                let mut shape = ty.shape.clone();
                shape.extend(all_dims.iter().filter(|(dim, _)| !ty.has(dim)).cloned());
                let dims = self.numbers.some(&shape, shape.len());
                self.add(OpKind::Expand { dims }, &[x]);
            }
            9 => {
                let weight = self.of_shape(vec![(dim.clone(), size)]);
                let eps = 1e-3.into();
                if self.numbers.below(2) == 0 {
                    let results = self.add(
                        OpKind::RmsNorm {
                            dim: dim.clone(),
                            eps,
                        },
                        &[x, weight],
                    );
                    if let Some([_, rstd]) = results.as_deref() {
                        let inputs = [x, weight, *rstd, x];
                        self.add(OpKind::RmsNormGrad { dim }, &inputs);
                    }
                } else {
                    let inputs = [x, weight, weight];
                    let results = self.add(
                        OpKind::LayerNorm {
                            dim: dim.clone(),
                            eps,
                        },
                        &inputs,
                    );
                    if let Some([_, mean, rstd]) = results.as_deref() {
                        let inputs = [x, weight, *mean, *rstd, x];
                        self.add(OpKind::LayerNormGrad { dim }, &inputs);
                    }
                }
            }
            10 => {
                if let Some(results) = self.add(OpKind::Softmax { dim: dim.clone() }, &[x]) {
                    self.add(OpKind::SoftmaxGrad { dim }, &[results[0], x]);
                }
            }
            11 => {
                let dims = self.numbers.some(&dims, dims.len());
                self.add(OpKind::Transpose { dims }, &[x]);
            }
            12 => {
                let to = Dim::from(format!("{dim}{dim}"));
                self.add(OpKind::Rename { from: dim, to }, &[x]);
            }
            13 => {
                // A pair of dims becomes one, and two again under other names.
                let at = self.numbers.below(ty.shape.len().saturating_sub(1).max(1));
                let Some([(first, n_first), (second, n_second)]) = ty.shape.get(at..at + 2) else {
                    return;
                };
                let into = Dim::from(format!("{first}x{second}"));
                let dims = vec![first.clone(), second.clone()];
                let merged = self.add(
                    OpKind::Merge {
                        dims,
                        into: into.clone(),
                    },
                    &[x],
                );
                let parts = vec![
                    (Dim::from(format!("{first}1")), *n_first),
                    (Dim::from(format!("{second}2")), *n_second),
                ];
                if let Some(merged) = merged {
                    self.add(
                        OpKind::Split {
                            dim: into,
                            into: parts,
                        },
                        &merged,
                    );
                }
            }
            14 if size > 2 => self.slice_and_concat(x, dim, size),
            15 => {
                let idx = self.any(DType::I32);
                let offset = 0;
                if let Some(rows) = self.add(
                    OpKind::Gather {
                        dim: dim.clone(),
                        offset,
                    },
                    &[x, idx],
                ) {
                    let kind = OpKind::ScatterAdd { dim, size, offset };
                    self.add(kind, &[idx, rows[0]]);
                }
            }
            16 => {
                let idx = self.index_of_shape(rows.clone());
                let offset = 0;
                self.add(
                    OpKind::Pick {
                        dim: dim.clone(),
                        offset,
                    },
                    &[x, idx],
                );
                let lse = OpKind::Reduce {
                    kind: ReduceKind::Lse,
                    dims: vec![dim.clone()],
                };
                if let Some(lse) = self.add(lse, &[x]) {
                    let dloss = self.of_shape(rows);
                    let inputs = [x, lse[0], idx, dloss];
                    self.add(OpKind::CrossEntropyGrad { dim, offset }, &inputs);
                }
            }
            17 => {
                let choice = Dim::from(format!("top{}", self.n_names));
                let kind = OpKind::TopK {
                    dim: dim.clone(),
                    choice: choice.clone(),
                    k: 2,
                };
                let x = self.without_ties(ty.shape.clone());
                if let Some(results) = self.add(kind, &[x]) {
                    self.add(OpKind::TopKGrad { dim, choice, size }, &results);
                }
            }
            18 => self.attention(),
            19 => self.rope(),
            20 => self.moe(),
            21 => self.update(x, &ty),
            _ => {}
        }
    }

    /// What is cut along a dim is renamed, so that a dim has one size wherever sources are made for it.
    fn slice_and_concat(&mut self, x: TensorId, dim: Dim, size: usize) {
        let start = self.numbers.below(2);
        let kind = OpKind::Slice {
            dim: dim.clone(),
            start,
            len: size - 1,
        };
        let Some(sliced) = self.add(kind, &[x]) else {
            return;
        };
        self.hidden.push(sliced[0]);
        let shorter = OpKind::Rename {
            from: dim.clone(),
            to: format!("{dim}s{}", size - 1).into(),
        };
        self.add(shorter, &sliced);
        if let Some(joined) = self.add(OpKind::Concat { dim: dim.clone() }, &[sliced[0], x]) {
            self.hidden.push(joined[0]);
            let to = format!("{dim}c{}", 2 * size - 1).into();
            self.add(OpKind::Rename { from: dim, to }, &joined);
        }
    }

    fn attention(&mut self) {
        let dims = self.dims.clone();
        let [(b, nb), (s, ns), (h, nh), (g, ng)] = [&dims[0], &dims[1], &dims[2], &dims[3]];
        let op = AttentionDims {
            seq: s.clone(),
            kv_seq: "kv".into(),
            head: "head".into(),
            value: "value".into(),
            scale: 0.6.into(),
            causal: self.numbers.below(2) == 0,
            offset: 0,
        };
        let head = (Dim::from("head"), 4);
        let q_shape = [(b, nb), (s, ns), (h, nh), (g, ng)].map(|(dim, n)| (dim.clone(), *n));
        let q = self.of_shape([q_shape.to_vec(), vec![head.clone()]].concat());
        let kv = vec![(b.clone(), *nb), ("kv".into(), *ns), (h.clone(), *nh)];
        let k = self.of_shape([kv.clone(), vec![head]].concat());
        let v = self.of_shape([kv, vec![("value".into(), 2)]].concat());
        if let Some([o, lse]) = self
            .add(OpKind::Attention(op.clone()), &[q, k, v])
            .as_deref()
        {
            self.add(OpKind::AttentionGrad(op), &[q, k, v, *o, *lse, *o]);
        }
    }

    fn rope(&mut self) {
        let dims = self.dims.clone();
        let (seq, n_seq) = self.numbers.pick(&dims);
        let table = RopeTable {
            theta: 100.0,
            rotary_dim: 4,
            scaling: RopeScaling::None,
        };
        let shape = vec![(seq, n_seq), ("half".into(), 2)];
        let cos = ConstInit::RopeCos(table.clone());
        let cos = self.source(DType::F32, shape.clone(), Role::Const(cos));
        let sin = self.source(DType::F32, shape, Role::Const(ConstInit::RopeSin(table)));
        let x = self.of_shape([dims, vec![("head".into(), 4)]].concat());
        let inverse = self.numbers.below(2) == 0;
        self.add(
            OpKind::Rope {
                dim: "head".into(),
                inverse,
            },
            &[x, cos, sin],
        );
    }

    fn moe(&mut self) {
        let dims = self.dims.clone();
        let [batch, seq, expert, embed] = [0, 1, 2, 3].map(|at| dims[at].clone());
        let logits = self.without_ties(vec![batch.clone(), seq.clone(), expert.clone()]);
        let choice = Dim::from("pick");
        let top = OpKind::TopK {
            dim: expert.0.clone(),
            choice: choice.clone(),
            k: 2,
        };
        let Some(top) = self.add(top, &[logits]) else {
            return;
        };
        let capacity = 1 + self.numbers.below(4);
        let slots = OpKind::MoeSlots {
            seq: seq.0.clone(),
            choice: choice.clone(),
            n_experts: expert.1,
            capacity,
        };
        let Some(slot) = self.add(slots, &[top[1]]) else {
            return;
        };
        let op = MoeDims {
            seq: seq.0.clone(),
            choice,
            expert: expert.0.clone(),
            slot: format!("slot{}", self.n_names).as_str().into(),
            n_experts: expert.1,
            capacity,
            offset: 0,
        };
        let x = self.of_shape(vec![batch, seq, embed]);
        let routed = [x, top[1], slot[0]];
        let Some(y) = self.add(OpKind::MoeDispatch(op.clone()), &routed) else {
            return;
        };
        self.add(
            OpKind::MoeCombine(op.clone()),
            &[y[0], top[1], slot[0], top[0]],
        );
        self.add(OpKind::MoeGateGrad(op), &[y[0], x, top[1], slot[0]]);
    }

    /// A parameter with its state, trained on x as if it were the gradient.
    fn update(&mut self, x: TensorId, ty: &TensorType) {
        let p = self.source(DType::F32, ty.shape.clone(), Role::Param(Init::Ones));
        if self.numbers.below(2) == 0 {
            if let Some(next) = self.add(OpKind::Sgd { lr: 0.1.into() }, &[p, x]) {
                self.graph.updates.insert(p, next[0]);
                self.graph.gradients.insert(p, x);
            }
            return;
        }
        let state =
            |build: &mut Self| build.source(DType::F32, ty.shape.clone(), Role::State { of: p });
        let (m, v) = (state(self), state(self));
        let step = self.source(DType::F32, vec![], Role::Input);
        let kind = OpKind::Adamw {
            lr: 0.01.into(),
            beta1: 0.9.into(),
            beta2: 0.95.into(),
            eps: 1e-3.into(),
            decay: 0.1.into(),
        };
        if let Some(next) = self.add(kind, &[p, x, m, v, step]) {
            self.graph.updates.extend([p, m, v].into_iter().zip(next));
            self.graph.gradients.insert(p, x);
        }
    }

    fn finish(mut self) -> Graph {
        let consumers = self.graph.consumers();
        let unread: Vec<TensorId> = self
            .graph
            .tensor_ids()
            .filter(|id| {
                let tensor = self.graph.tensor(*id);
                tensor.role == Role::Temp && consumers[id.index()].is_empty()
            })
            .collect();
        self.graph.outputs = unread;
        self.graph
    }
}
