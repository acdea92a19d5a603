//! The gradient rule of every op.
//!
//! Invariant: a rule adds to the gradients of those inputs that need one, and of no others.

use meshweave_dsl::dtype::{DType, Scalar};
use meshweave_dsl::graph::{Op, TensorId, TensorType};
use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{BinaryFn, OpKind, UnaryFn};

use super::{Backward, DifferentiateError, Rule};

impl Backward {
    /// Sends the gradients of an op's results on to its inputs.
    pub(super) fn visit(&mut self, op: &Op) -> Rule {
        if !op.results.iter().any(|result| self.needs(*result)) {
            return Ok(());
        }
        let Some(dy) = op.results.first().and_then(|y| self.gradients.get(y)) else {
            return self.refuse_others(op);
        };
        let dy = *dy;
        self.refuse_others(op)?;
        match (&op.kind, op.inputs.as_slice(), op.results.as_slice()) {
            (OpKind::Gather { dim, offset }, &[x, idx], _) => {
                let size = self.size(x, dim)?;
                let (dim, offset) = (dim.clone(), *offset);
                let dx = self.one(OpKind::ScatterAdd { dim, size, offset }, &[idx, dy], x)?;
                self.contribute(x, dx)
            }
            (OpKind::ScatterAdd { dim, offset, .. }, &[idx, y], _) => {
                let (dim, offset) = (dim.clone(), *offset);
                let d = self.one(OpKind::Gather { dim, offset }, &[dy, idx], y)?;
                self.contribute(y, d)
            }
            (OpKind::Contract { .. }, &[a, b], _) => {
                // The weight (by custom the second operand) first: its operands may die with it.
                if self.needs(b) {
                    self.contracted(b, a, dy, [a, dy])?;
                }
                if self.needs(a) {
                    self.contracted(a, b, dy, [dy, b])?;
                }
                Ok(())
            }
            (OpKind::Unary(function), &[x], &[y]) => {
                let dx = self.unary_gradient(*function, x, y, dy)?;
                self.contribute(x, dx)
            }
            (OpKind::Binary(function), &[a, b], &[y]) => {
                self.binary_gradient(*function, a, b, y, dy)
            }
            (OpKind::Reduce { kind, .. }, &[x], &[y]) => {
                let dx = match kind {
                    ReduceKind::Sum => {
                        let shape = self.ty(x).shape.clone();
                        self.expand(dy, shape, x)?
                    }
                    ReduceKind::Max => {
                        // The greatest elements share the gradient.
                        let greatest = self.binary(BinaryFn::Equal, x, y, x)?;
                        let n = self.unbroadcast(greatest, y)?;
                        let n = self.ordered(n, y)?;
                        let share = self.binary(BinaryFn::Div, dy, n, x)?;
                        self.binary(BinaryFn::Mul, greatest, share, x)?
                    }
                    ReduceKind::Lse => {
                        let shifted = self.binary(BinaryFn::Sub, x, y, x)?;
                        let softmax = self.unary(UnaryFn::Exp, shifted, x)?;
                        self.binary(BinaryFn::Mul, softmax, dy, x)?
                    }
                };
                self.contribute(x, dx)
            }
            (OpKind::Expand { .. }, &[x], _) => {
                let dx = self.unbroadcast(dy, x)?;
                self.contribute(x, dx)
            }
            (OpKind::RmsNorm { dim, .. }, &[x, weight], &[_, rstd]) => {
                let kind = OpKind::RmsNormGrad { dim: dim.clone() };
                self.many(kind, &[x, weight, rstd, dy], &[x, weight])
            }
            (OpKind::LayerNorm { dim, .. }, &[x, weight, bias], &[_, mean, rstd]) => {
                let kind = OpKind::LayerNormGrad { dim: dim.clone() };
                self.many(kind, &[x, weight, mean, rstd, dy], &[x, weight, bias])
            }
            (OpKind::Softmax { dim }, &[x], &[y]) => {
                let dx = self.one(OpKind::SoftmaxGrad { dim: dim.clone() }, &[y, dy], x)?;
                self.contribute(x, dx)
            }
            (OpKind::Rope { dim, inverse }, &[x, cos, sin], _) => {
                if self.needs(cos) || self.needs(sin) {
                    return self.refuse(op, "its tables");
                }
                let (dim, inverse) = (dim.clone(), !inverse);
                let dx = self.one(OpKind::Rope { dim, inverse }, &[dy, cos, sin], x)?;
                self.contribute(x, dx)
            }
            (OpKind::Attention(dims), &[q, k, v], &[o, lse]) => {
                let kind = OpKind::AttentionGrad(dims.clone());
                self.many(kind, &[q, k, v, o, lse, dy], &[q, k, v])
            }
            (OpKind::Pick { dim, offset: 0 }, &[x, idx], _) => {
                let size = self.size(x, dim)?;
                let dx = self.placed(dy, idx, dim, size, x)?;
                self.contribute(x, dx)
            }
            (OpKind::Transpose { .. }, &[x], _) => self.contribute(x, dy),
            (OpKind::Rename { from, to }, &[x], _) => {
                let (from, to) = (to.clone(), from.clone());
                let dx = self.one(OpKind::Rename { from, to }, &[dy], x)?;
                self.contribute(x, dx)
            }
            (OpKind::Split { dim, into }, &[x], _) => {
                let dims = into.iter().map(|(dim, _)| dim.clone()).collect();
                let into = dim.clone();
                let dx = self.one(OpKind::Merge { dims, into }, &[dy], x)?;
                self.contribute(x, dx)
            }
            (OpKind::Merge { dims, into }, &[x], _) => {
                let dim = into.clone();
                let into = dims
                    .iter()
                    .map(|dim| Ok((dim.clone(), self.size(x, dim)?)))
                    .collect::<Rule<_>>()?;
                let dx = self.one(OpKind::Split { dim, into }, &[dy], x)?;
                self.contribute(x, dx)
            }
            (OpKind::Slice { dim, start, len }, &[x], _) => {
                let size = self.size(x, dim)?;
                let dx = self.padded(dy, dim, *start, size - start - len, x)?;
                self.contribute(x, dx)
            }
            (OpKind::Concat { dim }, parts, _) => {
                let mut start = 0;
                for part in parts {
                    let (dim, len) = (dim.clone(), self.size(*part, dim)?);
                    if self.needs(*part) {
                        let slice = OpKind::Slice { dim, start, len };
                        let d = self.one(slice, &[dy], *part)?;
                        self.contribute(*part, d)?;
                    }
                    start += len;
                }
                Ok(())
            }
            (OpKind::TopK { dim, choice, .. }, &[x], &[_, idx]) => {
                let kind = OpKind::TopKGrad {
                    dim: dim.clone(),
                    choice: choice.clone(),
                    size: self.size(x, dim)?,
                };
                let dx = self.one(kind, &[dy, idx], x)?;
                self.contribute(x, dx)
            }
            (OpKind::TopKGrad { dim, .. }, &[values, idx], _) => {
                // Each value went to its index: take it from there.
                let mut wide = self.ty(idx).shape.clone();
                wide.push((dim.clone(), self.size(dy, dim)?));
                let wide = self.expand(dy, wide, values)?;
                let pick = OpKind::Pick {
                    dim: dim.clone(),
                    offset: 0,
                };
                let d = self.one(pick, &[wide, idx], values)?;
                self.contribute(values, d)
            }
            (OpKind::MoeDispatch(dims), &[x, expert, slot, ref gate @ ..], _) => {
                if let [gate] = *gate
                    && self.needs(gate)
                {
                    let kind = OpKind::MoeGateGrad(dims.clone());
                    let d = self.one(kind, &[dy, x, expert, slot], gate)?;
                    self.contribute(gate, d)?;
                }
                if self.needs(x) {
                    let mut inputs = vec![dy, expert, slot];
                    inputs.extend(gate);
                    let dx = self.one(OpKind::MoeCombine(dims.clone()), &inputs, x)?;
                    self.contribute(x, dx)?;
                }
                Ok(())
            }
            (OpKind::MoeCombine(dims), &[y, expert, slot, ref gate @ ..], _) => {
                if let [gate] = *gate
                    && self.needs(gate)
                {
                    let kind = OpKind::MoeGateGrad(dims.clone());
                    let d = self.one(kind, &[y, dy, expert, slot], gate)?;
                    self.contribute(gate, d)?;
                }
                if self.needs(y) {
                    let mut inputs = vec![dy, expert, slot];
                    inputs.extend(gate);
                    let d = self.one(OpKind::MoeDispatch(dims.clone()), &inputs, y)?;
                    self.contribute(y, d)?;
                }
                Ok(())
            }
            (OpKind::MoeGateGrad(dims), &[y, dout, expert, slot], _) => {
                // Bilinear in y and dout: the gradients of gate · ⟨y, dout⟩ with dy as the gate.
                if self.needs(y) {
                    let kind = OpKind::MoeDispatch(dims.clone());
                    let d = self.one(kind, &[dout, expert, slot, dy], y)?;
                    self.contribute(y, d)?;
                }
                if self.needs(dout) {
                    let kind = OpKind::MoeCombine(dims.clone());
                    let d = self.one(kind, &[y, expert, slot, dy], dout)?;
                    self.contribute(dout, d)?;
                }
                Ok(())
            }
            // The ranks of assignments are integers.
            (OpKind::MoeSlots { .. } | OpKind::MoePlaces(_) | OpKind::MoeCounts(_), ..) => Ok(()),
            // What is copied comes back as a sum.
            (OpKind::MoeMove(moved), &[rows, at, seat, to, to_seat], _) if moved.weights => {
                let mut back = moved.clone();
                std::mem::swap(&mut back.from, &mut back.dims.choice);
                back.dims.capacity = self.size(rows, &back.dims.slot)?;
                let inputs = [dy, to, to_seat, at, seat];
                let d = self.one(OpKind::MoeMove(back), &inputs, rows)?;
                self.contribute(rows, d)
            }
            // Second derivatives of these, updates, and ops of one rank's part of a graph.
            (
                OpKind::RmsNormGrad { .. }
                | OpKind::LayerNormGrad { .. }
                | OpKind::SoftmaxGrad { .. }
                | OpKind::AttentionGrad(_)
                | OpKind::CrossEntropyGrad { .. }
                | OpKind::Adamw { .. }
                | OpKind::Sgd { .. }
                | OpKind::AllGather { .. }
                | OpKind::AllReduce { .. }
                | OpKind::ReduceScatter { .. }
                | OpKind::AllToAll { .. }
                | OpKind::CollectivePermute { .. }
                | OpKind::Broadcast { .. },
                ..,
            ) => self.refuse(op, "its inputs"),
            // The right op with operands that its shape rule refuses, or part of a local graph.
            (
                OpKind::Gather { .. }
                | OpKind::ScatterAdd { .. }
                | OpKind::Contract { .. }
                | OpKind::Unary(_)
                | OpKind::Binary(_)
                | OpKind::Reduce { .. }
                | OpKind::Expand { .. }
                | OpKind::RmsNorm { .. }
                | OpKind::LayerNorm { .. }
                | OpKind::Softmax { .. }
                | OpKind::Rope { .. }
                | OpKind::Attention(_)
                | OpKind::Pick { .. }
                | OpKind::Transpose { .. }
                | OpKind::Rename { .. }
                | OpKind::Split { .. }
                | OpKind::Merge { .. }
                | OpKind::Slice { .. }
                | OpKind::TopK { .. }
                | OpKind::TopKGrad { .. }
                | OpKind::MoeDispatch(_)
                | OpKind::MoeCombine(_)
                | OpKind::MoeGateGrad(_),
                ..,
            ) => self.refuse(op, "operands of this form"),
            (OpKind::MoeMove(_), ..) => self.refuse(op, "tokens that stand with their experts"),
        }
    }

    /// Refuses gradients of an op's further results (statistics of norms, the attention's lse), and
    /// of results that nothing can be said about.
    fn refuse_others(&self, op: &Op) -> Rule {
        let other = op
            .results
            .iter()
            .skip(1)
            .find(|result| self.gradients.contains_key(result));
        match other {
            None => Ok(()),
            Some(result) => Err(DifferentiateError::Unsupported(format!(
                "the loss depends on `{}`, a by-product of `{}` at `{}`, which has no gradient rule: compute it with ops of its own",
                self.graph.tensor(*result).name,
                op.kind.name(),
                self.graph.op_name(op)
            ))),
        }
    }

    fn refuse(&self, op: &Op, through: &str) -> Rule {
        Err(DifferentiateError::Unsupported(format!(
            "a gradient has to flow through {through} of op `{}` at `{}`, which has no gradient rule",
            op.kind.name(),
            self.graph.op_name(op)
        )))
    }

    fn size(&self, id: TensorId, dim: &Dim) -> Rule<usize> {
        self.ty(id).size_of(dim).ok_or_else(|| {
            DifferentiateError::Invalid(format!(
                "`{}` of type {} has no dim `{dim}`",
                self.graph.tensor(id).name,
                self.ty(id)
            ))
        })
    }

    /// An op whose results are the gradients of `of`, one for one.
    fn many(&mut self, kind: OpKind, inputs: &[TensorId], of: &[TensorId]) -> Rule {
        let Some(first) = of.first() else {
            return Ok(());
        };
        let results = self.op(kind, inputs, *first)?;
        // Names follow the tensor that each result belongs to.
        let n_made = self.made.len();
        for (entry, of) in self.made[n_made - results.len()..].iter_mut().zip(of) {
            entry.1 = *of;
        }
        for (result, of) in results.into_iter().zip(of) {
            if self.needs(*of) {
                self.contribute(*of, result)?;
            }
        }
        Ok(())
    }

    /// Adds the gradient of operand `of` of a contraction with `other`.
    fn contracted(
        &mut self,
        of: TensorId,
        other: TensorId,
        dy: TensorId,
        operands: [TensorId; 2],
    ) -> Rule {
        let reached = |dim: &&Dim| self.ty(other).has(dim) || self.ty(dy).has(dim);
        let out: Vec<Dim> = self.ty(of).dims().filter(reached).cloned().collect();
        // The operand with the result's outermost dim first, as in a row-major matrix product.
        let [left, right] = operands;
        let swapped = out
            .first()
            .is_some_and(|dim| !self.ty(left).has(dim) && self.ty(right).has(dim));
        let operands = if swapped {
            [right, left]
        } else {
            [left, right]
        };
        let d = self.one(OpKind::Contract { out }, &operands, of)?;
        // Dims that are only in `of` were summed: each of their elements has the same gradient.
        let shape = self.ty(of).shape.clone();
        let d = self.expand(d, shape, of)?;
        self.contribute(of, d)
    }

    fn unary_gradient(
        &mut self,
        function: UnaryFn,
        x: TensorId,
        y: TensorId,
        dy: TensorId,
    ) -> Rule<TensorId> {
        use BinaryFn::{Div, Mul};
        let scaled = |c: f64| UnaryFn::Scale(Scalar(c));
        match function {
            UnaryFn::Neg => self.unary(UnaryFn::Neg, dy, x),
            UnaryFn::Scale(c) => self.unary(UnaryFn::Scale(c), dy, x),
            UnaryFn::Shift(_) => Ok(dy),
            UnaryFn::Cast(_) => {
                let dtype = self.ty(x).dtype;
                self.unary(UnaryFn::Cast(dtype), dy, x)
            }
            UnaryFn::Exp => self.binary(Mul, dy, y, x),
            UnaryFn::Log => self.binary(Div, dy, x, x),
            UnaryFn::Sqrt => {
                // 1 / (2 √x)
                let half = self.unary(scaled(0.5), dy, x)?;
                self.binary(Div, half, y, x)
            }
            UnaryFn::Rsqrt => {
                // −x^(−3/2) / 2
                let half = self.unary(scaled(-0.5), dy, x)?;
                let square = self.unary(UnaryFn::Square, y, x)?;
                let part = self.binary(Mul, half, y, x)?;
                self.binary(Mul, part, square, x)
            }
            UnaryFn::Square => {
                let twice = self.unary(scaled(2.0), x, x)?;
                self.binary(Mul, dy, twice, x)
            }
            UnaryFn::Reciprocal => {
                // −1 / x²
                let square = self.unary(UnaryFn::Square, y, x)?;
                let part = self.binary(Mul, dy, square, x)?;
                self.unary(UnaryFn::Neg, part, x)
            }
            UnaryFn::Tanh => self.binary(BinaryFn::TanhGrad, x, dy, x),
            UnaryFn::Sigmoid => self.binary(BinaryFn::SigmoidGrad, x, dy, x),
            UnaryFn::Silu => self.binary(BinaryFn::SiluGrad, x, dy, x),
            UnaryFn::Relu => self.binary(BinaryFn::ReluGrad, x, dy, x),
            UnaryFn::Gelu => self.binary(BinaryFn::GeluGrad, x, dy, x),
            UnaryFn::GeluTanh => self.binary(BinaryFn::GeluTanhGrad, x, dy, x),
        }
    }

    fn binary_gradient(
        &mut self,
        function: BinaryFn,
        a: TensorId,
        b: TensorId,
        y: TensorId,
        dy: TensorId,
    ) -> Rule {
        use BinaryFn::{Add, Div, Equal, Max, Mul, Sub};
        if function == Sub && self.cross_entropy(a, b, dy)? {
            return Ok(());
        }
        if self.needs(a) {
            let da = match function {
                Add | Sub => Some(dy),
                Mul => Some(self.binary(Mul, dy, b, a)?),
                Div => Some(self.binary(Div, dy, b, a)?),
                Max => Some(self.max_share(a, [a, b], y, dy)?),
                Equal => None,
                BinaryFn::TanhGrad
                | BinaryFn::SigmoidGrad
                | BinaryFn::SiluGrad
                | BinaryFn::ReluGrad
                | BinaryFn::GeluGrad
                | BinaryFn::GeluTanhGrad => {
                    return Err(DifferentiateError::Unsupported(format!(
                        "`{}` is a derivative, whose derivative has no gradient rule",
                        self.graph.tensor(y).name
                    )));
                }
            };
            if let Some(da) = da {
                let da = self.unbroadcast(da, a)?;
                self.contribute(a, da)?;
            }
        }
        if self.needs(b) {
            let db = match function {
                Add => Some(dy),
                Sub => Some(self.unary(UnaryFn::Neg, dy, b)?),
                Mul => Some(self.binary(Mul, dy, a, b)?),
                Div => {
                    // −a / b² = −y / b, where b is the same along the dims that it lacks.
                    let part = self.binary(Mul, dy, y, b)?;
                    let part = self.unbroadcast(part, b)?;
                    let part = self.binary(Div, part, b, b)?;
                    Some(self.unary(UnaryFn::Neg, part, b)?)
                }
                Max => Some(self.max_share(b, [a, b], y, dy)?),
                Equal => None,
                // Linear in the second operand.
                BinaryFn::TanhGrad
                | BinaryFn::SigmoidGrad
                | BinaryFn::SiluGrad
                | BinaryFn::ReluGrad
                | BinaryFn::GeluGrad
                | BinaryFn::GeluTanhGrad => Some(self.binary(function, a, dy, b)?),
            };
            if let Some(db) = db {
                let db = self.unbroadcast(db, b)?;
                self.contribute(b, db)?;
            }
        }
        Ok(())
    }

    /// The part of dy that goes to operand `of` of a maximum y: all, none, or half where they are equal.
    fn max_share(
        &mut self,
        of: TensorId,
        operands: [TensorId; 2],
        y: TensorId,
        dy: TensorId,
    ) -> Rule<TensorId> {
        let [a, b] = operands;
        let is_a = self.binary(BinaryFn::Equal, y, a, of)?;
        let is_b = self.binary(BinaryFn::Equal, y, b, of)?;
        let n = self.binary(BinaryFn::Add, is_a, is_b, of)?;
        let share = self.binary(BinaryFn::Div, dy, n, of)?;
        let mine = if of == a { is_a } else { is_b };
        self.binary(BinaryFn::Mul, share, mine, of)
    }

    /// If a − b is logsumexp(logits) − logits[target], or its negative, the gradient goes straight to
    /// the logits as softmax − one-hot, neither of which is made.
    fn cross_entropy(&mut self, a: TensorId, b: TensorId, dy: TensorId) -> Rule<bool> {
        let (Some(first), Some(second)) = (self.producers.get(&a), self.producers.get(&b)) else {
            return Ok(false);
        };
        let (sum, picked, lse, negated) = match (&first.kind, &second.kind) {
            (OpKind::Reduce { .. }, OpKind::Pick { .. }) => (first, second, a, false),
            (OpKind::Pick { .. }, OpKind::Reduce { .. }) => (second, first, b, true),
            _ => return Ok(false),
        };
        let (
            OpKind::Reduce {
                kind: ReduceKind::Lse,
                dims,
            },
            OpKind::Pick { dim, offset },
        ) = (&sum.kind, &picked.kind)
        else {
            return Ok(false);
        };
        let ([logits], [same_logits, target]) = (sum.inputs.as_slice(), picked.inputs.as_slice())
        else {
            return Ok(false);
        };
        if logits != same_logits || dims.as_slice() != std::slice::from_ref(dim) {
            return Ok(false);
        }
        let (logits, target) = (*logits, *target);
        let kind = OpKind::CrossEntropyGrad {
            dim: dim.clone(),
            offset: *offset,
        };
        if self.needs(logits) {
            let dloss = if negated {
                self.unary(UnaryFn::Neg, dy, lse)?
            } else {
                dy
            };
            let d = self.one(kind, &[logits, lse, target, dloss], logits)?;
            self.contribute(logits, d)?;
        }
        Ok(true)
    }

    /// dy of each row at its index along `dim`, 0 elsewhere.
    fn placed(
        &mut self,
        dy: TensorId,
        idx: TensorId,
        dim: &Dim,
        size: usize,
        of: TensorId,
    ) -> Rule<TensorId> {
        let choice = self.unused_dim(of, "picked");
        let mut rows = self.ty(idx).shape.clone();
        rows.push((choice.clone(), 1));
        let values = self.expand(dy, rows.clone(), of)?;
        let index = self.expand(idx, rows, of)?;
        let dim = dim.clone();
        self.one(OpKind::TopKGrad { dim, choice, size }, &[values, index], of)
    }

    /// A dim's name that the tensor does not have.
    fn unused_dim(&self, of: TensorId, name: &str) -> Dim {
        let mut name = name.to_owned();
        while self.ty(of).has(&Dim::from(name.as_str())) {
            name.push('_');
        }
        name.into()
    }

    /// dy between `before` and `after` zeros along `dim`.
    fn padded(
        &mut self,
        dy: TensorId,
        dim: &Dim,
        before: usize,
        after: usize,
        of: TensorId,
    ) -> Rule<TensorId> {
        let mut parts = Vec::new();
        for (len, is_dy) in [(before, false), (0, true), (after, false)] {
            if is_dy {
                parts.push(dy);
            } else if len > 0 {
                let ty = self.ty(dy);
                let resize = |(name, size): &(Dim, usize)| {
                    (name.clone(), if name == dim { len } else { *size })
                };
                let shape = ty.shape.iter().map(resize).collect();
                let dtype: DType = ty.dtype;
                parts.push(self.fill(TensorType { dtype, shape }, 0.0, of));
            }
        }
        if let [only] = parts[..] {
            return Ok(only);
        }
        self.one(OpKind::Concat { dim: dim.clone() }, &parts, of)
    }
}
