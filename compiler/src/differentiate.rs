//! Reverse-mode differentiation on the graph, with the optimizer's updates.
//!
//! Enters: a forward graph whose first output is a scalar loss. Leaves: one graph with forward,
//! backward and updates; `gradients` and `updates` say which tensors those are.
//! Invariant: a gradient has the type of its tensor; only gradients that lead to a parameter are
//! built; every op of the result is reached from an output, a gradient or an update.
//!
//! Order: backward ops stand in the reverse order of the forward ops and sums are taken as their
//! terms appear, so that activations and partial gradients die early. A parameter is updated as soon
//! as its gradient is final and nothing reads the old value any more, so that the update can be made
//! in place and the gradient's memory is free again at once: this keeps the peak lower than updates
//! at the end, which hold all gradients at the same time.
//!
//! Weight decay applies to every parameter but the weights and biases of norms, and vectors that are
//! added to wider tensors (biases), as is usual; the golden model has none of the latter.

mod naming;
mod optimizer;
mod prune;
mod rules;

use std::collections::BTreeMap;

use meshweave_dsl::dtype::Scalar;
use meshweave_dsl::graph::{ConstInit, Graph, Op, OpId, Role, TensorId, TensorType};
use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{BinaryFn, OpError, OpKind, UnaryFn};

pub use optimizer::Optimizer;
pub use prune::remove_dead;

/// Why a graph cannot be differentiated.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum DifferentiateError {
    /// The graph has no scalar loss, or no parameter that moves it.
    #[error("{0}")]
    Invalid(String),
    /// A gradient would have to flow through an op without a rule.
    #[error("{0}")]
    Unsupported(String),
    /// A rule built something that its own shape rules refuse.
    #[error("internal error in a gradient: {0}")]
    Internal(#[from] OpError),
}

type Rule<T = ()> = Result<T, DifferentiateError>;

/// What an op of a differentiated graph is there for. Ops of the forward graph are meant by their
/// ids there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The forward op itself.
    Forward(OpId),
    /// The gradient of an activation that this forward op reads (or, with it, of a parameter).
    InputGradient(OpId),
    /// The gradient of a parameter that this forward op reads, and nothing else.
    WeightGradient(OpId),
    /// The update of this parameter of the differentiated graph.
    Update(TensorId),
}

/// `graph` with the gradients of its first output with respect to all parameters, and the updates of
/// `optimizer`. Linear in the size of the graph, save for names.
///
/// # Errors
/// [`DifferentiateError::Invalid`] without a scalar float output or a parameter that it depends on;
/// [`DifferentiateError::Unsupported`] when a gradient has to flow through an op that has none.
pub fn differentiate(graph: &Graph, optimizer: &Optimizer) -> Rule<Graph> {
    differentiate_traced(graph, optimizer).map(|(graph, _)| graph)
}

/// [`differentiate`], with the origin of every op of the result.
///
/// # Errors
/// Those of [`differentiate`].
pub fn differentiate_traced(graph: &Graph, optimizer: &Optimizer) -> Rule<(Graph, Vec<Origin>)> {
    let loss = *graph.outputs.first().ok_or_else(|| {
        DifferentiateError::Invalid(format!(
            "graph `{}` has no output: make the loss its first output",
            graph.name
        ))
    })?;
    let ty = graph.ty(loss);
    if !ty.shape.is_empty() || !ty.dtype.is_float() {
        return Err(DifferentiateError::Invalid(format!(
            "the first output of graph `{}` is `{}` of type {ty}, not a scalar: reduce it to the loss",
            graph.name,
            graph.tensor(loss).name
        )));
    }
    let mut backward = Backward::new(graph);
    if !backward.needs[loss.index()] {
        return Err(DifferentiateError::Invalid(format!(
            "`{}` depends on no parameter of graph `{}`",
            graph.tensor(loss).name,
            graph.name
        )));
    }
    let seed = backward.fill(ty.clone(), 1.0, loss);
    backward.gradients.insert(loss, seed);
    let mut visited: Vec<OpId> = graph.ops().map(|(op_id, _)| op_id).collect();
    for (op_id, op) in graph.ops().collect::<Vec<_>>().into_iter().rev() {
        backward.visit(op)?;
        visited.resize(backward.graph.ops.len(), op_id);
    }
    let n_forward_ops = graph.ops.len();
    let Backward {
        mut graph,
        gradients,
        made,
        ..
    } = backward;
    // What the graph gives as a gradient itself is the whole step of its parameter.
    let given = std::mem::take(&mut graph.gradients);
    graph.gradients = graph
        .params()
        .filter_map(|param| Some((param, *given.get(&param).or(gradients.get(&param))?)))
        .collect();
    naming::name_gradients(&mut graph, &gradients, &made);
    let of: BTreeMap<TensorId, TensorId> = made.into_iter().collect();
    let is_param = |id: &TensorId| matches!(graph.tensor(*id).role, Role::Param(_));
    let mut origins: BTreeMap<String, Origin> = BTreeMap::new();
    for ((op_id, op), visited) in graph.ops().zip(visited) {
        let is_of_params = op
            .results
            .iter()
            .all(|result| of.get(result).is_some_and(is_param));
        let origin = if op_id.index() < n_forward_ops {
            Origin::Forward(op_id)
        } else if is_of_params {
            Origin::WeightGradient(visited)
        } else {
            Origin::InputGradient(visited)
        };
        origins.insert(graph.op_name(op).into(), origin);
    }
    optimizer::add_updates(&mut graph, optimizer, &given)?;
    let graph = remove_dead(&graph);
    // Ops that were added last are the updates; each begins with the parameter.
    let origin = |op: &Op| match (origins.get(graph.op_name(op)), op.inputs.first()) {
        (Some(origin), _) => Ok(*origin),
        (None, Some(param)) => Ok(Origin::Update(*param)),
        (None, None) => Err(DifferentiateError::Internal(OpError {
            op: op.kind.name(),
            at: graph.op_name(op).into(),
            reason: "updates nothing".into(),
        })),
    };
    let origins = graph.ops.iter().map(origin).collect::<Rule<_>>()?;
    Ok((graph, origins))
}

/// The graph under construction.
struct Backward {
    graph: Graph,
    /// The op that makes a forward tensor.
    producers: BTreeMap<TensorId, Op>,
    /// Whether the loss's gradient with respect to a tensor is wanted, by tensor.
    needs: Vec<bool>,
    /// The sum of the contributions to a tensor's gradient so far.
    gradients: BTreeMap<TensorId, TensorId>,
    /// Every tensor made here, with the forward tensor whose gradient it is for.
    made: Vec<(TensorId, TensorId)>,
}

impl Backward {
    fn new(graph: &Graph) -> Self {
        let mut needs = vec![false; graph.tensors.len()];
        for param in graph.params() {
            needs[param.index()] = graph.ty(param).dtype.is_float();
        }
        let mut producers = BTreeMap::new();
        for op in &graph.ops {
            let flows = op.inputs.iter().any(|input| needs[input.index()]);
            for result in &op.results {
                needs[result.index()] = flows && graph.ty(*result).dtype.is_float();
                producers.insert(*result, op.clone());
            }
        }
        Self {
            graph: graph.clone(),
            producers,
            needs,
            gradients: BTreeMap::new(),
            made: Vec::new(),
        }
    }

    fn needs(&self, id: TensorId) -> bool {
        self.needs[id.index()]
    }

    fn ty(&self, id: TensorId) -> &TensorType {
        self.graph.ty(id)
    }

    /// Adds `part` to the gradient of `of`.
    fn contribute(&mut self, of: TensorId, part: TensorId) -> Rule {
        let part = self.ordered(part, of)?;
        let total = match self.gradients.get(&of) {
            None => part,
            Some(sum) => self.binary(BinaryFn::Add, *sum, part, of)?,
        };
        self.gradients.insert(of, total);
        Ok(())
    }

    /// Adds an op for the gradient of `of`, with all its results.
    fn op(&mut self, kind: OpKind, inputs: &[TensorId], of: TensorId) -> Rule<Vec<TensorId>> {
        let name = format!("grad.{}", self.graph.tensor(of).name);
        let results = self.graph.add_op(name, kind, inputs)?;
        self.made.extend(results.iter().map(|result| (*result, of)));
        Ok(results)
    }

    /// Adds an op with one result.
    fn one(&mut self, kind: OpKind, inputs: &[TensorId], of: TensorId) -> Rule<TensorId> {
        let name = kind.name();
        match self.op(kind, inputs, of)?[..] {
            [result] => Ok(result),
            ref results => Err(OpError {
                op: name,
                at: self.graph.tensor(of).name.clone(),
                reason: format!("has {} results instead of 1", results.len()),
            }
            .into()),
        }
    }

    fn binary(
        &mut self,
        function: BinaryFn,
        a: TensorId,
        b: TensorId,
        of: TensorId,
    ) -> Rule<TensorId> {
        self.one(OpKind::Binary(function), &[a, b], of)
    }

    /// A function of each element; of a constant, the constant.
    fn unary(&mut self, function: UnaryFn, x: TensorId, of: TensorId) -> Rule<TensorId> {
        let folded = self.filled(x).and_then(|value| match function {
            UnaryFn::Neg => Some(-value),
            UnaryFn::Scale(factor) => Some(factor.0 * value),
            _ => None,
        });
        match folded {
            Some(value) => Ok(self.fill(self.ty(x).clone(), value, of)),
            None => self.one(OpKind::Unary(function), &[x], of),
        }
    }

    /// x repeated along the dims it lacks, in the shape given.
    fn expand(&mut self, x: TensorId, dims: Vec<(Dim, usize)>, of: TensorId) -> Rule<TensorId> {
        if self.ty(x).shape == dims {
            return Ok(x);
        }
        if let Some(value) = self.filled(x) {
            let dtype = self.ty(x).dtype;
            return Ok(self.fill(TensorType { dtype, shape: dims }, value, of));
        }
        self.one(OpKind::Expand { dims }, &[x], of)
    }

    /// The sum over the dims that `like` lacks: the gradient of a broadcast.
    fn unbroadcast(&mut self, x: TensorId, like: TensorId) -> Rule<TensorId> {
        let wanted = self.ty(like);
        let dims: Vec<Dim> = self
            .ty(x)
            .dims()
            .filter(|dim| !wanted.has(dim))
            .cloned()
            .collect();
        if dims.is_empty() {
            return Ok(x);
        }
        let kind = ReduceKind::Sum;
        self.one(OpKind::Reduce { kind, dims }, &[x], like)
    }

    /// x in the memory order of `like`.
    fn ordered(&mut self, x: TensorId, like: TensorId) -> Rule<TensorId> {
        if self.ty(x).dims().eq(self.ty(like).dims()) {
            return Ok(x);
        }
        let dims = self.ty(like).dims().cloned().collect();
        self.one(OpKind::Transpose { dims }, &[x], like)
    }

    /// A constant with every element the same.
    fn fill(&mut self, ty: TensorType, value: f64, of: TensorId) -> TensorId {
        let name = format!("grad.{}", self.graph.tensor(of).name);
        let role = Role::Const(ConstInit::Fill(Scalar(value)));
        let id = self.graph.add_source(name, ty, role);
        self.made.push((id, of));
        id
    }

    /// The value of all elements of x, if it is such a constant.
    fn filled(&self, x: TensorId) -> Option<f64> {
        match &self.graph.tensor(x).role {
            Role::Const(ConstInit::Fill(value)) => Some(value.0),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
