//! From a group of graph ops to one row program.
//!
//! Enters: the ops of a group, the space they share and which results others read.
//! Leaves: a kernel and the tensor of each of its arguments.
//! Invariant: every formula is that of the op's documentation in [`OpKind`]; values that stay
//! inside the group never touch memory.

use std::collections::BTreeMap;

use meshweave_dsl::dtype::{DType, Scalar};
use meshweave_dsl::graph::{Graph, Op, OpId, TensorId, TensorType};
use meshweave_dsl::layout::ReduceKind as GraphReduce;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{BinaryFn, OpKind, UnaryFn};

use super::attention::softmax_parts;
use super::fuse::FuseError;
use super::kernel::{
    Access, ArgId, BinaryOp, Elem, Kernel, KernelBuilder, Mutability, Predicate, ReduceKind, Span,
    StartFrom, UnaryOp, Val,
};
use super::space::{Grid, GridStrides, Space};

/// A kernel for a group.
#[derive(Clone, Debug)]
pub struct GroupKernel {
    /// The code.
    pub kernel: Kernel,
    /// The tensor of each argument.
    pub args: Vec<TensorId>,
    /// The tensors among them that the kernel writes.
    pub results: Vec<TensorId>,
    /// The argument of each tensor.
    pub arg_of: BTreeMap<TensorId, ArgId>,
}

/// Lowers `ops`, which run in `space`; the tensors of `stored` are written to memory.
///
/// # Errors
/// `Unsupported` for element types and reductions that no kernel computes, `Internal` for a group
/// whose ops do not fit its space.
pub fn lower_group(
    graph: &Graph,
    ops: &[OpId],
    space: &Space,
    stored: &[TensorId],
) -> Result<GroupKernel, FuseError> {
    let mut made = Vec::new();
    let mut touched: Vec<TensorId> = Vec::new();
    for op in ops.iter().map(|op| graph.op(*op)) {
        for input in &op.inputs {
            if !made.contains(input) && !touched.contains(input) {
                touched.push(*input);
            }
        }
        made.extend(op.results.iter().copied());
    }
    touched.extend(stored.iter().copied());
    for tensor in &touched {
        elem_of(graph, *tensor)?;
    }
    let types: Vec<&TensorType> = touched.iter().map(|id| graph.ty(*id)).collect();
    let grid = Grid::new(space, &types);
    let strides: BTreeMap<TensorId, GridStrides> = touched
        .iter()
        .copied()
        .zip(grid.strides.iter().cloned())
        .collect();
    let mut lowering = Lowering {
        graph,
        space,
        b: KernelBuilder::new(group_name(graph, ops), &grid.rows, grid.lanes),
        grid,
        strides,
        values: BTreeMap::new(),
        args: Vec::new(),
        arg_of: BTreeMap::new(),
        written: Vec::new(),
        exponentials: BTreeMap::new(),
    };
    for op in ops {
        lowering.op(graph.op(*op))?;
    }
    for tensor in stored {
        if lowering.written.contains(tensor) {
            continue;
        }
        let value = lowering.values.get(tensor).copied().ok_or_else(|| {
            lowering.internal(format!("`{}` is not computed", graph.tensor(*tensor).name))
        })?;
        let access = lowering.access(*tensor, Mutability::Write)?;
        lowering.b.store(access, value);
    }
    let results = lowering
        .args
        .iter()
        .copied()
        .filter(|arg| made.contains(arg))
        .collect();
    Ok(GroupKernel {
        kernel: lowering.b.finish_hashed()?,
        args: lowering.args,
        results,
        arg_of: lowering.arg_of,
    })
}

fn group_name(graph: &Graph, ops: &[OpId]) -> String {
    let mut names: Vec<&str> = ops.iter().map(|op| graph.op(*op).kind.name()).collect();
    names.dedup();
    if names.len() > 4 {
        let n_more = names.len() - 3;
        names.truncate(3);
        return format!("{}_and_{n_more}", names.join("_"));
    }
    names.join("_")
}

fn elem_of(graph: &Graph, tensor: TensorId) -> Result<Elem, FuseError> {
    let tensor = graph.tensor(tensor);
    match tensor.ty.dtype {
        DType::F32 => Ok(Elem::F32),
        DType::I32 => Ok(Elem::I32),
        DType::Bf16 => Ok(Elem::Bf16),
        DType::F16 => Err(FuseError::Unsupported {
            op: tensor.name.clone(),
            reason: "no kernel loads or stores f16; use dtype bf16 or f32".into(),
        }),
    }
}

struct Lowering<'a> {
    graph: &'a Graph,
    space: &'a Space,
    grid: Grid,
    strides: BTreeMap<TensorId, GridStrides>,
    b: KernelBuilder,
    /// Values of the group's tensors, loaded inputs included.
    values: BTreeMap<TensorId, Val>,
    args: Vec<TensorId>,
    arg_of: BTreeMap<TensorId, ArgId>,
    /// Results that are already written.
    written: Vec<TensorId>,
    /// For each log-sum-exp made here: what it was taken of, the exponentials and their sum.
    exponentials: BTreeMap<TensorId, (TensorId, Val, Val)>,
}

impl Lowering<'_> {
    fn op(&mut self, op: &Op) -> Result<(), FuseError> {
        match &op.kind {
            OpKind::Unary(function) => {
                let x = self.input(op, 0)?;
                let y = self.unary(*function, x);
                self.define(op, 0, y)
            }
            OpKind::Binary(function) => {
                let (x, y) = (self.input(op, 0)?, self.input(op, 1)?);
                let z = self.binary(*function, x, y);
                self.define(op, 0, z)
            }
            OpKind::Expand { .. } => {
                let x = self.input(op, 0)?;
                self.define(op, 0, x)
            }
            OpKind::Reduce { kind, dims } => self.reduce(op, *kind, dims),
            OpKind::Gather { dim, offset } => {
                let idx = self.input(op, 1)?;
                let x = self.external(op, 0)?;
                let (access, inside) = self.indexed(x, dim, *offset, idx, Mutability::Read)?;
                let row = self.b.load(access);
                let zero = self.zero_like(row);
                let y = self.b.select(inside, row, zero);
                self.define(op, 0, y)
            }
            OpKind::Pick { dim, offset } => {
                let idx = self.input(op, 1)?;
                let x = self.external(op, 0)?;
                let (mut access, inside) = self.indexed(x, dim, *offset, idx, Mutability::Read)?;
                access.lane = 0;
                let element = self.b.load(access);
                let zero = self.zero_like(element);
                let y = self.b.select(inside, element, zero);
                self.define(op, 0, y)
            }
            OpKind::ScatterAdd { dim, offset, .. } => {
                let (idx, y) = (self.input(op, 0)?, self.input(op, 1)?);
                let result = self.result(op, 0)?;
                let (access, inside) =
                    self.indexed(result, dim, *offset, idx, Mutability::Write)?;
                let zero = self.b.f32(0.0);
                let y = self.b.select(inside, y, zero);
                self.b
                    .accumulate(access, ReduceKind::Sum, StartFrom::Identity, y);
                self.written.push(result);
                Ok(())
            }
            OpKind::RmsNorm { eps, .. } => {
                let (x, weight) = (self.input(op, 0)?, self.input(op, 1)?);
                let square = self.b.mul(x, x);
                let mean = self.mean(square);
                let rstd = self.rstd(mean, *eps);
                let normal = self.b.mul(x, rstd);
                let y = self.b.mul(normal, weight);
                self.define(op, 0, y)?;
                self.define(op, 1, rstd)
            }
            OpKind::RmsNormGrad { .. } => self.rms_norm_grad(op),
            OpKind::LayerNorm { eps, .. } => {
                let (x, weight, bias) =
                    (self.input(op, 0)?, self.input(op, 1)?, self.input(op, 2)?);
                let mean = self.mean(x);
                let centered = self.b.sub(x, mean);
                let square = self.b.mul(centered, centered);
                let variance = self.mean(square);
                let rstd = self.rstd(variance, *eps);
                let normal = self.b.mul(centered, rstd);
                let y = self.b.fma(normal, weight, bias);
                self.define(op, 0, y)?;
                self.define(op, 1, mean)?;
                self.define(op, 2, rstd)
            }
            OpKind::LayerNormGrad { .. } => self.layer_norm_grad(op),
            OpKind::Softmax { .. } => {
                let x = self.input(op, 0)?;
                let (_, exp, sum) = softmax_parts(&mut self.b, x);
                let one = self.b.f32(1.0);
                let inverse = self.b.div(one, sum);
                let y = self.b.mul(exp, inverse);
                self.define(op, 0, y)
            }
            OpKind::SoftmaxGrad { .. } => {
                let (y, dy) = (self.input(op, 0)?, self.input(op, 1)?);
                let product = self.b.mul(y, dy);
                let sum = self.b.reduce(ReduceKind::Sum, product);
                let centered = self.b.sub(dy, sum);
                let dx = self.b.mul(y, centered);
                self.define(op, 0, dx)
            }
            OpKind::Rope { inverse, .. } => self.rope(op, *inverse),
            OpKind::CrossEntropyGrad { offset, .. } => {
                let (logits, lse) = (self.input(op, 0)?, self.input(op, 1)?);
                let (target, dloss) = (self.input(op, 2)?, self.input(op, 3)?);
                let p = match self.exponentials.get(&op.inputs[1]) {
                    // exp(x − lse) is at hand as exp(x − max) / Σ exp(x − max).
                    Some(&(of, exp, sum)) if of == op.inputs[0] => {
                        let one = self.b.f32(1.0);
                        let inverse = self.b.div(one, sum);
                        self.b.mul(exp, inverse)
                    }
                    _ => {
                        let centered = self.b.sub(logits, lse);
                        self.b.exp(centered)
                    }
                };
                let lane = self.b.lane_index();
                let first = self.index_constant(*offset)?;
                let place = self.b.sub(target, first);
                let hit = self.b.compare(Predicate::Eq, lane, place);
                let one = self.b.f32(1.0);
                let less = self.b.sub(p, one);
                let difference = self.b.select(hit, less, p);
                let y = self.b.mul(difference, dloss);
                self.define(op, 0, y)
            }
            OpKind::Adamw {
                lr,
                beta1,
                beta2,
                eps,
                decay,
            } => self.adamw(op, [*lr, *beta1, *beta2, *eps, *decay]),
            OpKind::Sgd { lr } => {
                let (p, g) = (self.input(op, 0)?, self.input(op, 1)?);
                let step = self.b.f32(-(lr.0 as f32));
                let next = self.b.fma(g, step, p);
                self.define(op, 0, next)
            }
            OpKind::Contract { .. }
            | OpKind::Attention(_)
            | OpKind::AttentionGrad(_)
            | OpKind::Transpose { .. }
            | OpKind::Rename { .. }
            | OpKind::Split { .. }
            | OpKind::Merge { .. }
            | OpKind::Slice { .. }
            | OpKind::Concat { .. }
            | OpKind::TopK { .. }
            | OpKind::TopKGrad { .. }
            | OpKind::MoeSlots { .. }
            | OpKind::MoePlaces(_)
            | OpKind::MoeDispatch(_)
            | OpKind::MoeCombine(_)
            | OpKind::MoeGateGrad(_)
            | OpKind::MoeCounts(_)
            | OpKind::MoeMove(_)
            | OpKind::AllGather { .. }
            | OpKind::AllReduce { .. }
            | OpKind::ReduceScatter { .. }
            | OpKind::AllToAll { .. }
            | OpKind::CollectivePermute { .. }
            | OpKind::Broadcast { .. } => {
                Err(self.internal(format!("`{}` is in no kernel", op.kind.name())))
            }
        }
    }

    // Elementwise.

    fn unary(&mut self, function: UnaryFn, x: Val) -> Val {
        let b = &mut self.b;
        match function {
            UnaryFn::Neg => b.unary(UnaryOp::Neg, x),
            UnaryFn::Exp => b.exp(x),
            UnaryFn::Log => b.unary(UnaryOp::Log, x),
            UnaryFn::Sqrt => b.unary(UnaryOp::Sqrt, x),
            UnaryFn::Rsqrt => b.unary(UnaryOp::Rsqrt, x),
            UnaryFn::Square => b.mul(x, x),
            UnaryFn::Reciprocal => {
                let one = b.f32(1.0);
                b.div(one, x)
            }
            UnaryFn::Tanh => b.unary(UnaryOp::Tanh, x),
            UnaryFn::Sigmoid => b.unary(UnaryOp::Sigmoid, x),
            UnaryFn::Silu => b.silu(x),
            UnaryFn::Relu => b.relu(x),
            UnaryFn::Gelu => b.gelu(x),
            UnaryFn::GeluTanh => b.gelu_tanh(x),
            UnaryFn::Scale(factor) => b.scale(x, factor.0 as f32),
            UnaryFn::Shift(term) => {
                let term = b.f32(term.0 as f32);
                b.add(x, term)
            }
            // Memory rounds: values inside of a kernel are f32.
            UnaryFn::Cast(_) => x,
        }
    }

    fn binary(&mut self, function: BinaryFn, x: Val, y: Val) -> Val {
        let b = &mut self.b;
        match function {
            BinaryFn::Add => b.add(x, y),
            BinaryFn::Sub => b.sub(x, y),
            BinaryFn::Mul => b.mul(x, y),
            BinaryFn::Div => b.div(x, y),
            BinaryFn::Max => b.binary(BinaryOp::Max, x, y),
            BinaryFn::Equal => {
                let equal = b.compare(Predicate::Eq, x, y);
                let (one, zero) = match b.ty(x).elem {
                    Elem::I32 => (b.i32(1), b.i32(0)),
                    _ => (b.f32(1.0), b.f32(0.0)),
                };
                b.select(equal, one, zero)
            }
            BinaryFn::TanhGrad => {
                let tanh = b.unary(UnaryOp::Tanh, x);
                let one = b.f32(1.0);
                let square = b.mul(tanh, tanh);
                let slope = b.sub(one, square);
                b.mul(y, slope)
            }
            BinaryFn::SigmoidGrad => {
                let s = b.unary(UnaryOp::Sigmoid, x);
                let one = b.f32(1.0);
                let complement = b.sub(one, s);
                let slope = b.mul(s, complement);
                b.mul(y, slope)
            }
            BinaryFn::SiluGrad => b.silu_grad(x, y),
            BinaryFn::ReluGrad => b.relu_grad(x, y),
            BinaryFn::GeluGrad => b.gelu_grad(x, y),
            BinaryFn::GeluTanhGrad => b.gelu_tanh_grad(x, y),
        }
    }

    // Rows.

    fn mean(&mut self, v: Val) -> Val {
        let sum = self.b.reduce(ReduceKind::Sum, v);
        let n_lanes = self.b.lanes() as f32;
        self.b.scale(sum, 1.0 / n_lanes)
    }

    fn rstd(&mut self, mean_square: Val, eps: Scalar) -> Val {
        let eps = self.b.f32(eps.0 as f32);
        let shifted = self.b.add(mean_square, eps);
        self.b.unary(UnaryOp::Rsqrt, shifted)
    }

    /// With x̂ = x·rstd and g = dy·w: dx = rstd·(g − x̂·mean(g·x̂)), dw = Σ dy·x̂ over rows
    /// (Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", appendix).
    fn rms_norm_grad(&mut self, op: &Op) -> Result<(), FuseError> {
        let (x, weight) = (self.input(op, 0)?, self.input(op, 1)?);
        let (rstd, dy) = (self.input(op, 2)?, self.input(op, 3)?);
        let normal = self.b.mul(x, rstd);
        let g = self.b.mul(dy, weight);
        let product = self.b.mul(g, normal);
        let mean = self.mean(product);
        let along = self.b.mul(normal, mean);
        let across = self.b.sub(g, along);
        let dx = self.b.mul(across, rstd);
        self.define(op, 0, dx)?;
        let dweight = self.b.mul(dy, normal);
        self.sum_rows(op, 1, ReduceKind::Sum, dweight)
    }

    /// With x̂ = (x − mean)·rstd and g = dy·w: dx = rstd·(g − mean(g) − x̂·mean(g·x̂)),
    /// dw = Σ dy·x̂ and db = Σ dy over rows (Ba et al. 2016, "Layer Normalization").
    fn layer_norm_grad(&mut self, op: &Op) -> Result<(), FuseError> {
        let (x, weight) = (self.input(op, 0)?, self.input(op, 1)?);
        let (mean, rstd) = (self.input(op, 2)?, self.input(op, 3)?);
        let dy = self.input(op, 4)?;
        let centered = self.b.sub(x, mean);
        let normal = self.b.mul(centered, rstd);
        let g = self.b.mul(dy, weight);
        let product = self.b.mul(g, normal);
        let mean_g = self.mean(g);
        let mean_product = self.mean(product);
        let along = self.b.mul(normal, mean_product);
        let shifted = self.b.sub(g, mean_g);
        let across = self.b.sub(shifted, along);
        let dx = self.b.mul(across, rstd);
        self.define(op, 0, dx)?;
        let dweight = self.b.mul(dy, normal);
        self.sum_rows(op, 1, ReduceKind::Sum, dweight)?;
        self.sum_rows(op, 2, ReduceKind::Sum, dy)
    }

    /// out = concat(x1·cos − x2·sin, x2·cos + x1·sin); the inverse negates sin
    /// (Su et al. 2021, "RoFormer", equation 34, in the half-split order of GPT-NeoX).
    fn rope(&mut self, op: &Op, inverse: bool) -> Result<(), FuseError> {
        let half = self.b.lanes() as i64;
        let x = self.external(op, 0)?;
        let first = self.access(x, Mutability::Read)?;
        let second = first.clone().shifted(half * first.lane);
        let tables = [1, 2].map(|idx| -> Result<Val, FuseError> {
            let table = self.external(op, idx)?;
            // The table's innermost dim has a name of its own; it runs with the lanes.
            let mut access = self.access(table, Mutability::Read)?;
            access.lane = 1;
            Ok(self.b.load(access))
        });
        let [cos, sin] = tables;
        let (cos, mut sin) = (cos?, sin?);
        if inverse {
            sin = self.b.unary(UnaryOp::Neg, sin);
        }
        let (x1, x2) = (self.b.load(first), self.b.load(second));
        let x2_sin = self.b.mul(x2, sin);
        let x1_cos = self.b.mul(x1, cos);
        let y1 = self.b.sub(x1_cos, x2_sin);
        let x1_sin = self.b.mul(x1, sin);
        let x2_cos = self.b.mul(x2, cos);
        let y2 = self.b.add(x2_cos, x1_sin);
        let result = self.result(op, 0)?;
        let first = self.access(result, Mutability::Write)?;
        let second = first.clone().shifted(half * first.lane);
        self.b.store(first, y1);
        self.b.store(second, y2);
        self.written.push(result);
        Ok(())
    }

    fn reduce(&mut self, op: &Op, kind: GraphReduce, dims: &[Dim]) -> Result<(), FuseError> {
        let x = self.input(op, 0)?;
        let reduces_lanes = self
            .space
            .lane
            .as_ref()
            .is_some_and(|(lane, _)| dims.contains(lane));
        let n_row_dims = dims.len() - usize::from(reduces_lanes);
        let kind = match kind {
            GraphReduce::Sum => ReduceKind::Sum,
            GraphReduce::Max => ReduceKind::Max,
            GraphReduce::Lse => {
                if n_row_dims > 0 || !reduces_lanes {
                    return Err(FuseError::Unsupported {
                        op: self.graph.op_name(op).to_string(),
                        reason: "logsumexp over several dims; merge them first".to_string(),
                    });
                }
                let (max, exp, sum) = {
                    let x = self.widened(x);
                    softmax_parts(&mut self.b, x)
                };
                let (of, lse) = (op.inputs[0], self.result(op, 0)?);
                self.exponentials.insert(lse, (of, exp, sum));
                let log = self.b.unary(UnaryOp::Log, sum);
                let lse = self.b.add(max, log);
                return self.define(op, 0, lse);
            }
        };
        let mut value = x;
        if reduces_lanes {
            let lanes = self.widened(value);
            value = self.b.reduce(kind, lanes);
        }
        if n_row_dims == 0 {
            return self.define(op, 0, value);
        }
        self.sum_rows(op, 0, kind, value)
    }

    /// A row value as a lane value, for reductions of what was broadcast to the lanes.
    fn widened(&mut self, v: Val) -> Val {
        if self.b.ty(v).span == Span::Lane {
            return v;
        }
        // x + 0·lane would not keep infinities; a select between equal values does.
        let lane = self.b.lane_index();
        let zero = self.b.i32(0);
        let first = self.b.compare(Predicate::Eq, lane, zero);
        self.b.select(first, v, v)
    }

    /// Combines `value` over the row dims that result `idx` of `op` lacks.
    fn sum_rows(
        &mut self,
        op: &Op,
        idx: usize,
        kind: ReduceKind,
        value: Val,
    ) -> Result<(), FuseError> {
        let result = self.result(op, idx)?;
        let access = self.access(result, Mutability::Write)?;
        let is_reduced = access
            .outer
            .iter()
            .zip(&self.grid.rows)
            .any(|(&stride, &size)| stride == 0 && size > 1);
        if is_reduced {
            self.b.accumulate(access, kind, StartFrom::Identity, value);
        } else {
            // All reduced dims have one element.
            self.b.store(access, value);
            self.values.insert(result, value);
        }
        self.written.push(result);
        Ok(())
    }

    /// p −= lr·(m̂/(√v̂ + eps) + decay·p), m̂ = m/(1 − β1ᵗ), v̂ = v/(1 − β2ᵗ)
    /// (Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2, with the
    /// schedule multiplier folded into lr). The corrections are computed in f64, once per call.
    fn adamw(&mut self, op: &Op, scalars: [Scalar; 5]) -> Result<(), FuseError> {
        let [lr, beta1, beta2, eps, decay] = scalars.map(|scalar| scalar.0);
        let (p, g) = (self.input(op, 0)?, self.input(op, 1)?);
        let (m, v) = (self.input(op, 2)?, self.input(op, 3)?);
        let step = self.input(op, 4)?;
        let b = &mut self.b;
        let step = b.convert(Elem::I32, step);
        let one = b.f64(1.0);
        let [correction1, correction2] = [beta1, beta2].map(|beta| {
            let beta = b.f64(beta);
            let power = b.powi(beta, step);
            b.sub(one, power)
        });
        let lr_value = b.f64(-lr);
        let rate = b.div(lr_value, correction1);
        let rate = b.convert(Elem::F32, rate);
        let root = b.unary(UnaryOp::Rsqrt, correction2);
        let root = b.convert(Elem::F32, root);

        let keep1 = b.f32(beta1 as f32);
        let take1 = b.f32((1.0 - beta1) as f32);
        let part = b.mul(g, take1);
        let m = b.fma(m, keep1, part);
        let keep2 = b.f32(beta2 as f32);
        let take2 = b.f32((1.0 - beta2) as f32);
        let square = b.mul(g, g);
        let part = b.mul(square, take2);
        let v = b.fma(v, keep2, part);
        let sqrt = b.unary(UnaryOp::Sqrt, v);
        let eps = b.f32(eps as f32);
        let denominator = b.fma(sqrt, root, eps);
        let ratio = b.div(m, denominator);
        let shrink = b.f32((1.0 - lr * decay) as f32);
        let kept = b.mul(p, shrink);
        let p = b.fma(ratio, rate, kept);
        self.define(op, 0, p)?;
        self.define(op, 1, m)?;
        self.define(op, 2, v)
    }

    // Operands and results.

    /// The value of an input: made in the group, or loaded.
    fn input(&mut self, op: &Op, idx: usize) -> Result<Val, FuseError> {
        let tensor = *op
            .inputs
            .get(idx)
            .ok_or_else(|| self.internal(format!("`{}` has no input {idx}", op.kind.name())))?;
        if let Some(value) = self.values.get(&tensor) {
            return Ok(*value);
        }
        let access = self.access(tensor, Mutability::Read)?;
        let value = self.b.load(access);
        self.values.insert(tensor, value);
        Ok(value)
    }

    /// An input that must be in memory because it is addressed in another way.
    fn external(&self, op: &Op, idx: usize) -> Result<TensorId, FuseError> {
        op.inputs
            .get(idx)
            .copied()
            .filter(|tensor| self.strides.contains_key(tensor))
            .ok_or_else(|| {
                self.internal(format!(
                    "input {idx} of `{}` is not in memory",
                    op.kind.name()
                ))
            })
    }

    fn result(&self, op: &Op, idx: usize) -> Result<TensorId, FuseError> {
        op.results
            .get(idx)
            .copied()
            .ok_or_else(|| self.internal(format!("`{}` has no result {idx}", op.kind.name())))
    }

    fn define(&mut self, op: &Op, idx: usize, value: Val) -> Result<(), FuseError> {
        let tensor = self.result(op, idx)?;
        self.values.insert(tensor, value);
        Ok(())
    }

    fn access(&mut self, tensor: TensorId, mutability: Mutability) -> Result<Access, FuseError> {
        let strides = self.strides.get(&tensor).cloned().ok_or_else(|| {
            let name = &self.graph.tensor(tensor).name;
            self.internal(format!("`{name}` has no memory in this group"))
        })?;
        let arg = match self.arg_of.get(&tensor) {
            Some(arg) => *arg,
            None => {
                let arg = self.b.arg(elem_of(self.graph, tensor)?, mutability);
                self.arg_of.insert(tensor, arg);
                self.args.push(tensor);
                arg
            }
        };
        Ok(Access {
            arg,
            outer: strides.outer,
            lane: strides.lane,
            offset: 0,
            indexed: None,
        })
    }

    /// Access to `tensor` at `index − offset` along `dim`, clamped into it, and whether it was
    /// inside.
    fn indexed(
        &mut self,
        tensor: TensorId,
        dim: &Dim,
        offset: usize,
        index: Val,
        mutability: Mutability,
    ) -> Result<(Access, Val), FuseError> {
        let ty = self.graph.ty(tensor);
        let (Some(size), Some(position)) = (ty.size_of(dim), ty.position(dim)) else {
            return Err(self.internal(format!("{ty} has no dim `{dim}`")));
        };
        let stride = ty.strides()[position] as i64;
        let mut access = self.access(tensor, mutability)?;
        if self
            .space
            .lane
            .as_ref()
            .is_some_and(|(lane, _)| lane == dim)
        {
            access.lane = 0;
        }
        let first = self.index_constant(offset)?;
        let end = self.index_constant(size)?;
        let zero = self.b.i32(0);
        let place = self.b.sub(index, first);
        let above = self.b.compare(Predicate::Ge, place, zero);
        let below = self.b.compare(Predicate::Lt, place, end);
        let inside = self.b.binary(BinaryOp::And, above, below);
        let place = self.b.select(inside, place, zero);
        Ok((access.at(place, stride, size), inside))
    }

    fn index_constant(&mut self, value: usize) -> Result<Val, FuseError> {
        let value = i32::try_from(value)
            .map_err(|_| self.internal(format!("{value} exceeds a 32-bit index")))?;
        Ok(self.b.i32(value))
    }

    fn zero_like(&mut self, v: Val) -> Val {
        match self.b.ty(v).elem {
            Elem::I32 => self.b.i32(0),
            _ => self.b.f32(0.0),
        }
    }

    fn internal(&self, message: String) -> FuseError {
        FuseError::Internal { message }
    }
}
