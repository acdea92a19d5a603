//! A builder of graphs: one thin, typed method per op, with scopes for names.
//!
//! Enters: calls in the order of the computation. Leaves: a [`Graph`].
//! Invariant: names are unique, and every op has passed its shape rule.
//!
//! ```
//! use meshweave_dsl::build::GraphBuilder;
//! use meshweave_dsl::dtype::DType;
//! use meshweave_dsl::graph::Init;
//! # use meshweave_dsl::op::OpError;
//!
//! // logits = rms_norm(table[tokens]) · head, loss = mean cross entropy.
//! let mut b = GraphBuilder::new("bigram");
//! let positions = [("batch", 4), ("seq", 16)];
//! let tokens = b.input("tokens", DType::I32, positions)?;
//! let targets = b.input("targets", DType::I32, positions)?;
//! let init = |stream| Init::Hash { stream, scale: 0.1 };
//! let table = b.param("table", DType::F32, [("vocab", 50), ("embed", 8)], init(0))?;
//! let norm = b.param("norm", DType::F32, [("embed", 8)], Init::Ones)?;
//! let head = b.param("head", DType::F32, [("embed", 8), ("vocab", 50)], init(1))?;
//! let h = b.embedding("h", table, "vocab", tokens)?;
//! let x = b.rms_norm("x", h, norm, "embed", 1e-5)?;
//! let logits = b.contract("logits", x, head, ["batch", "seq", "vocab"])?;
//! let losses = b.cross_entropy("losses", logits, targets, "vocab")?;
//! let loss = b.mean("loss", losses, ["batch", "seq"])?;
//! b.output(loss);
//! let graph = b.finish();
//! assert_eq!(graph.ty(logits).to_string(), "f32[batch:4, seq:16, vocab:50]");
//! assert_eq!(graph.n_params(), 50 * 8 + 8 + 8 * 50);
//! # Ok::<(), OpError>(())
//! ```

use std::collections::BTreeSet;

use crate::dtype::{DType, Scalar};
use crate::graph::{ConstInit, Graph, Init, Role, TensorId, TensorType};
use crate::layout::ReduceKind;
use crate::name::Dim;
use crate::op::{AttentionDims, BinaryFn, OpError, OpKind, UnaryFn};

/// Builds a graph op by op.
///
/// Every method takes the name of what it makes, relative to the scope in force, and fails when the
/// name is taken or the op's shape rule refuses its inputs.
#[derive(Clone, Debug, Default)]
pub struct GraphBuilder {
    graph: Graph,
    scope: String,
    names: BTreeSet<String>,
}

type Made<T = TensorId> = Result<T, OpError>;

impl GraphBuilder {
    /// An empty graph of this name.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            graph: Graph::new(name),
            ..Self::default()
        }
    }

    /// Goes on with a graph that exists.
    pub fn resume(graph: Graph) -> Self {
        let names = graph.tensors.iter().map(|t| t.name.clone()).collect();
        Self {
            graph,
            scope: String::new(),
            names,
        }
    }

    /// Runs `build` with `scope.` before all names; scopes nest.
    ///
    /// # Errors
    /// Those of `build`.
    pub fn within<T, E>(
        &mut self,
        scope: impl AsRef<str>,
        build: impl FnOnce(&mut Self) -> Result<T, E>,
    ) -> Result<T, E> {
        let outer = self.scope.clone();
        self.scope = self.path(scope.as_ref());
        let made = build(self);
        self.scope = outer;
        made
    }

    /// The full path of a name in the scope in force.
    pub fn path(&self, name: &str) -> String {
        if self.scope.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.scope)
        }
    }

    /// The graph so far.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The graph so far, to change what is not an op (updates, gradients).
    pub fn graph_mut(&mut self) -> &mut Graph {
        &mut self.graph
    }

    /// The type of a tensor of this graph.
    pub fn ty(&self, id: TensorId) -> &TensorType {
        self.graph.ty(id)
    }

    /// The size of a dim of a tensor.
    ///
    /// # Errors
    /// The tensor has no such dim.
    pub fn size_of(&self, id: TensorId, dim: impl Into<Dim>) -> Made<usize> {
        let dim = dim.into();
        self.ty(id).size_of(&dim).ok_or_else(|| OpError {
            op: "size",
            at: self.graph.tensor(id).name.clone(),
            reason: format!("{} has no dim `{dim}`", self.ty(id)),
        })
    }

    /// Adds an output.
    pub fn output(&mut self, id: TensorId) {
        self.graph.outputs.push(id);
    }

    /// The finished graph.
    pub fn finish(self) -> Graph {
        self.graph
    }

    /// A tensor given at each step.
    ///
    /// # Errors
    /// The name is taken.
    pub fn input(&mut self, name: &str, dtype: DType, shape: impl Shape) -> Made {
        self.source(name, TensorType::new(dtype, shape.dims()), Role::Input)
    }

    /// A weight.
    ///
    /// # Errors
    /// The name is taken.
    pub fn param(&mut self, name: &str, dtype: DType, shape: impl Shape, init: Init) -> Made {
        let ty = TensorType::new(dtype, shape.dims());
        self.source(name, ty, Role::Param(init))
    }

    /// A table computed once.
    ///
    /// # Errors
    /// The name is taken.
    pub fn constant(
        &mut self,
        name: &str,
        dtype: DType,
        shape: impl Shape,
        init: ConstInit,
    ) -> Made {
        let ty = TensorType::new(dtype, shape.dims());
        self.source(name, ty, Role::Const(init))
    }

    /// A source of any role.
    ///
    /// # Errors
    /// The name is taken.
    pub fn source(&mut self, name: &str, ty: TensorType, role: Role) -> Made {
        let path = self.claim("source", name)?;
        Ok(self.graph.add_source(path, ty, role))
    }

    /// Any op, with all its results.
    ///
    /// # Errors
    /// The name is taken, or the shape rule refuses the inputs.
    pub fn op(&mut self, name: &str, kind: OpKind, inputs: &[TensorId]) -> Made<Vec<TensorId>> {
        let path = self.claim(kind.name(), name)?;
        let results = self.graph.add_op(path, kind, inputs)?;
        for result in results.iter().skip(1) {
            self.names.insert(self.graph.tensor(*result).name.clone());
        }
        Ok(results)
    }

    /// Any op, for its first result.
    ///
    /// # Errors
    /// The name is taken, or the shape rule refuses the inputs.
    pub fn apply(&mut self, name: &str, kind: OpKind, inputs: &[TensorId]) -> Made {
        let op = kind.name();
        self.op(name, kind, inputs)?
            .first()
            .copied()
            .ok_or_else(|| OpError {
                op,
                at: self.path(name),
                reason: "has no result".into(),
            })
    }

    fn claim(&mut self, op: &'static str, name: &str) -> Made<String> {
        let path = self.path(name);
        if self.names.insert(path.clone()) {
            return Ok(path);
        }
        Err(OpError {
            op,
            at: path,
            reason: "the name is taken: give another".into(),
        })
    }
}

/// One method per op. All fail when the name is taken or the shape rule refuses the inputs.
#[allow(clippy::missing_errors_doc)]
impl GraphBuilder {
    /// `table[.., dim, ..]` at `index[..]`: `[index.., rest..]`.
    pub fn embedding(
        &mut self,
        name: &str,
        table: TensorId,
        dim: impl Into<Dim>,
        index: TensorId,
    ) -> Made {
        let dim = dim.into();
        self.apply(name, OpKind::Gather { dim, offset: 0 }, &[table, index])
    }

    /// The einsum of `a` and `b` by dim names with the result's dims `out`.
    pub fn contract(
        &mut self,
        name: &str,
        a: TensorId,
        b: TensorId,
        out: impl IntoIterator<Item = impl Into<Dim>>,
    ) -> Made {
        let out = out.into_iter().map(Into::into).collect();
        self.apply(name, OpKind::Contract { out }, &[a, b])
    }

    /// A function of each element.
    pub fn unary(&mut self, name: &str, function: UnaryFn, x: TensorId) -> Made {
        self.apply(name, OpKind::Unary(function), &[x])
    }

    /// A function of two elements, the smaller operand broadcast by dim names.
    pub fn binary(&mut self, name: &str, function: BinaryFn, a: TensorId, b: TensorId) -> Made {
        self.apply(name, OpKind::Binary(function), &[a, b])
    }

    /// a + b.
    pub fn add(&mut self, name: &str, a: TensorId, b: TensorId) -> Made {
        self.binary(name, BinaryFn::Add, a, b)
    }

    /// a − b.
    pub fn sub(&mut self, name: &str, a: TensorId, b: TensorId) -> Made {
        self.binary(name, BinaryFn::Sub, a, b)
    }

    /// a · b, element by element.
    pub fn mul(&mut self, name: &str, a: TensorId, b: TensorId) -> Made {
        self.binary(name, BinaryFn::Mul, a, b)
    }

    /// a / b, element by element.
    pub fn div(&mut self, name: &str, a: TensorId, b: TensorId) -> Made {
        self.binary(name, BinaryFn::Div, a, b)
    }

    /// c · x.
    pub fn scale(&mut self, name: &str, x: TensorId, factor: f64) -> Made {
        self.unary(name, UnaryFn::Scale(Scalar(factor)), x)
    }

    /// x + c.
    pub fn shift(&mut self, name: &str, x: TensorId, by: f64) -> Made {
        self.unary(name, UnaryFn::Shift(Scalar(by)), x)
    }

    /// x · sigmoid(x).
    pub fn silu(&mut self, name: &str, x: TensorId) -> Made {
        self.unary(name, UnaryFn::Silu, x)
    }

    /// A reduction over `dims`.
    pub fn reduce(
        &mut self,
        name: &str,
        kind: ReduceKind,
        x: TensorId,
        dims: impl IntoIterator<Item = impl Into<Dim>>,
    ) -> Made {
        let dims = dims.into_iter().map(Into::into).collect();
        self.apply(name, OpKind::Reduce { kind, dims }, &[x])
    }

    /// The mean over `dims`: a sum (named `name.sum`) times a constant.
    pub fn mean(
        &mut self,
        name: &str,
        x: TensorId,
        dims: impl IntoIterator<Item = impl Into<Dim>>,
    ) -> Made {
        let sum = self.reduce(&format!("{name}.sum"), ReduceKind::Sum, x, dims)?;
        let n = self.ty(x).n_elements() / self.ty(sum).n_elements().max(1);
        self.scale(name, sum, 1.0 / n as f64)
    }

    /// x repeated along the dims it lacks.
    pub fn expand(&mut self, name: &str, x: TensorId, shape: impl Shape) -> Made {
        let dims = shape.dims();
        self.apply(name, OpKind::Expand { dims }, &[x])
    }

    /// Root-mean-square norm over `dim`.
    pub fn rms_norm(
        &mut self,
        name: &str,
        x: TensorId,
        weight: TensorId,
        dim: impl Into<Dim>,
        eps: f64,
    ) -> Made {
        let (dim, eps) = (dim.into(), Scalar(eps));
        self.apply(name, OpKind::RmsNorm { dim, eps }, &[x, weight])
    }

    /// Layer norm over `dim`.
    pub fn layer_norm(
        &mut self,
        name: &str,
        x: TensorId,
        weight: TensorId,
        bias: TensorId,
        dim: impl Into<Dim>,
        eps: f64,
    ) -> Made {
        let (dim, eps) = (dim.into(), Scalar(eps));
        self.apply(name, OpKind::LayerNorm { dim, eps }, &[x, weight, bias])
    }

    /// Softmax over `dim`.
    pub fn softmax(&mut self, name: &str, x: TensorId, dim: impl Into<Dim>) -> Made {
        self.apply(name, OpKind::Softmax { dim: dim.into() }, &[x])
    }

    /// Rotary embedding of the innermost dim `dim` by tables over (position, half).
    pub fn rope(
        &mut self,
        name: &str,
        x: TensorId,
        (cos, sin): (TensorId, TensorId),
        dim: impl Into<Dim>,
    ) -> Made {
        let kind = OpKind::Rope {
            dim: dim.into(),
            inverse: false,
        };
        self.apply(name, kind, &[x, cos, sin])
    }

    /// Attention; the result has the dims of q with `value` in place of `head`.
    pub fn attention(
        &mut self,
        name: &str,
        q: TensorId,
        k: TensorId,
        v: TensorId,
        dims: AttentionDims,
    ) -> Made {
        self.apply(name, OpKind::Attention(dims), &[q, k, v])
    }

    /// −log softmax(logits)[target] over `dim`: log-sum-exp (`name.lse`) − the picked logit
    /// (`name.picked`).
    pub fn cross_entropy(
        &mut self,
        name: &str,
        logits: TensorId,
        target: TensorId,
        dim: impl Into<Dim>,
    ) -> Made {
        let dim = dim.into();
        let lse = self.reduce(&format!("{name}.lse"), ReduceKind::Lse, logits, [&dim])?;
        let picked = self.pick(&format!("{name}.picked"), logits, target, dim)?;
        self.sub(name, lse, picked)
    }

    /// The element of each row at its index.
    pub fn pick(&mut self, name: &str, x: TensorId, index: TensorId, dim: impl Into<Dim>) -> Made {
        let dim = dim.into();
        self.apply(name, OpKind::Pick { dim, offset: 0 }, &[x, index])
    }

    /// x with its dims in another memory order.
    pub fn transpose(
        &mut self,
        name: &str,
        x: TensorId,
        dims: impl IntoIterator<Item = impl Into<Dim>>,
    ) -> Made {
        let dims = dims.into_iter().map(Into::into).collect();
        self.apply(name, OpKind::Transpose { dims }, &[x])
    }

    /// x with a dim under another name.
    pub fn rename(
        &mut self,
        name: &str,
        x: TensorId,
        from: impl Into<Dim>,
        to: impl Into<Dim>,
    ) -> Made {
        let (from, to) = (from.into(), to.into());
        self.apply(name, OpKind::Rename { from, to }, &[x])
    }

    /// A dim as several, the first of `into` major.
    pub fn split(
        &mut self,
        name: &str,
        x: TensorId,
        dim: impl Into<Dim>,
        into: impl Shape,
    ) -> Made {
        let (dim, into) = (dim.into(), into.dims());
        self.apply(name, OpKind::Split { dim, into }, &[x])
    }

    /// Adjacent dims as one.
    pub fn merge(
        &mut self,
        name: &str,
        x: TensorId,
        dims: impl IntoIterator<Item = impl Into<Dim>>,
        into: impl Into<Dim>,
    ) -> Made {
        let dims = dims.into_iter().map(Into::into).collect();
        let into = into.into();
        self.apply(name, OpKind::Merge { dims, into }, &[x])
    }

    /// `len` elements of a dim from `start`.
    pub fn slice(
        &mut self,
        name: &str,
        x: TensorId,
        dim: impl Into<Dim>,
        start: usize,
        len: usize,
    ) -> Made {
        let dim = dim.into();
        self.apply(name, OpKind::Slice { dim, start, len }, &[x])
    }

    /// Tensors one after the other along `dim`.
    pub fn concat(&mut self, name: &str, parts: &[TensorId], dim: impl Into<Dim>) -> Made {
        self.apply(name, OpKind::Concat { dim: dim.into() }, parts)
    }

    /// The k greatest along `dim`: (values, indices), both with `choice` in its place.
    pub fn top_k(
        &mut self,
        name: &str,
        x: TensorId,
        dim: impl Into<Dim>,
        choice: impl Into<Dim>,
        k: usize,
    ) -> Made<(TensorId, TensorId)> {
        let (dim, choice) = (dim.into(), choice.into());
        match self.op(name, OpKind::TopK { dim, choice, k }, &[x])?[..] {
            [values, indices] => Ok((values, indices)),
            ref results => Err(OpError {
                op: "top_k",
                at: self.path(name),
                reason: format!("has {} results instead of 2", results.len()),
            }),
        }
    }
}

/// Dims with their sizes, outermost first: `[("batch", 8), ("seq", 64)]`, an owned list, `[]`.
pub trait Shape {
    /// The dims as a list.
    fn dims(self) -> Vec<(Dim, usize)>;
}

impl<D: Into<Dim>, const N: usize> Shape for [(D, usize); N] {
    fn dims(self) -> Vec<(Dim, usize)> {
        self.into_iter().map(|(d, size)| (d.into(), size)).collect()
    }
}

impl<D: Into<Dim>> Shape for Vec<(D, usize)> {
    fn dims(self) -> Vec<(Dim, usize)> {
        self.into_iter().map(|(d, size)| (d.into(), size)).collect()
    }
}

impl Shape for () {
    /// A scalar.
    fn dims(self) -> Vec<(Dim, usize)> {
        Vec::new()
    }
}
