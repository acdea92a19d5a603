//! Values of rows and lanes alike, and what accumulators start from.
//!
//! Enters: an instruction and its operands. Leaves: the operations that compute it.
//! Invariant: a lane's result does not depend on the form in which it is computed.

use super::super::Error;
use super::super::ops::{Cmp, Form, V};
use super::Function;
use crate::codegen::kernel::{
    Access, BinaryOp, Elem, Inst, Predicate, ReduceKind, Span, StartFrom, UnaryOp, Val,
};

impl<'c> Function<'_, 'c> {
    // Accumulators.

    pub(super) fn identity(&mut self, kind: ReduceKind, form: Form) -> Result<V<'c>, Error> {
        let value = match kind {
            ReduceKind::Sum => 0.0,
            ReduceKind::Max => f64::NEG_INFINITY,
        };
        self.ops.float(Elem::F32, form, value)
    }

    /// `acc` and `v` into one; a NaN in `v` never becomes a maximum.
    pub(super) fn combine(
        &mut self,
        kind: ReduceKind,
        form: Form,
        acc: V<'c>,
        v: V<'c>,
    ) -> Result<V<'c>, Error> {
        match kind {
            ReduceKind::Sum => self.ops.addf(acc, v),
            ReduceKind::Max => self.ops.max_keeping_nan(form, v, acc),
        }
    }

    /// Fills with the identity whatever is accumulated from it.
    pub(super) fn fill_accumulators(&mut self) -> Result<(), Error> {
        let program = self.program;
        for inst in program.body() {
            let Inst::Accumulate {
                access,
                kind,
                start: StartFrom::Identity,
                ..
            } = inst
            else {
                continue;
            };
            let mut dims: Vec<(usize, i64)> = access
                .outer
                .iter()
                .zip(program.rows())
                .filter(|&(&stride, &size)| stride != 0 && size > 1)
                .map(|(&stride, &size)| (size, stride))
                .collect();
            if let Some(indexed) = &access.indexed {
                dims.push((indexed.size, indexed.stride));
            }
            let offset = self.ops.i64(access.offset)?;
            self.fill(access, *kind, &dims, offset)?;
        }
        Ok(())
    }

    fn fill(
        &mut self,
        access: &Access,
        kind: ReduceKind,
        dims: &[(usize, i64)],
        offset: V<'c>,
    ) -> Result<(), Error> {
        let (zero, one) = (self.ops.i64(0)?, self.ops.i64(1)?);
        if let Some((&(size, stride), rest)) = dims.split_first() {
            let size = self.ops.i64(size as i64)?;
            self.loop_over(zero, size, one, &[], |this, position, _| {
                let stride = this.ops.i64(stride)?;
                let part = this.ops.muli(position, stride)?;
                let offset = this.ops.addi(offset, part)?;
                this.fill(access, kind, rest, offset)?;
                Ok(Vec::new())
            })?;
            return Ok(());
        }
        let base = self
            .ops
            .element_ptr(self.args[access.arg.index()], offset, Elem::F32)?;
        if self.threads.is_some() {
            return self.fill_by_threads(access, kind, base);
        }
        if access.span() == Span::Row {
            let identity = self.identity(kind, Form::Scalar)?;
            return self.ops.store(base, identity, Elem::F32);
        }
        let lanes = self.program.lanes();
        let n_tail = lanes % self.width;
        let end = self.ops.i64((lanes - n_tail) as i64)?;
        let step = self.ops.i64(self.width as i64)?;
        let identity = self.identity(kind, Form::Vector(self.width))?;
        if lanes > n_tail {
            self.loop_over(zero, end, step, &[], |this, start, _| {
                this.store_lanes(access, base, start, None, identity)?;
                Ok(Vec::new())
            })?;
        }
        if n_tail > 0 {
            let mask = self.ops.prefix_mask(self.width, n_tail)?;
            self.store_lanes(access, base, end, Some(mask), identity)?;
        }
        Ok(())
    }

    // Values of either span.

    pub(super) fn compute(
        &mut self,
        val: Val,
        form: Form,
        operands: &[V<'c>],
    ) -> Result<V<'c>, Error> {
        let program = self.program;
        let elem = program.value_type(val).map_or(Elem::F32, |ty| ty.elem);
        let operand_elem = |v: Val| program.value_type(v).map_or(Elem::F32, |ty| ty.elem);
        match (program.inst(val), operands) {
            (Inst::Const { bits, .. }, _) => match elem {
                Elem::I32 => self.ops.int(form, f64::from_bits(*bits) as i32),
                _ => self.ops.float(elem, form, f64::from_bits(*bits)),
            },
            (Inst::Unary(op, _), &[v]) => self.unary(*op, elem, form, v),
            (Inst::Binary(op, ..), &[a, b]) => self.binary(*op, elem, form, a, b),
            (Inst::Fma(..), &[a, b, c]) => self.ops.fma(a, b, c),
            (Inst::Compare(predicate, of, _), &[a, b]) => {
                let cmp = match predicate {
                    Predicate::Eq => Cmp::Eq,
                    Predicate::Ne => Cmp::Ne,
                    Predicate::Lt => Cmp::Lt,
                    Predicate::Le => Cmp::Le,
                    Predicate::Gt => Cmp::Gt,
                    Predicate::Ge => Cmp::Ge,
                };
                if operand_elem(*of).is_float() {
                    self.ops.cmpf(cmp, form, a, b)
                } else {
                    self.ops.cmpi(cmp, form, a, b)
                }
            }
            (Inst::Select(..), &[condition, a, b]) => self.ops.select(condition, a, b),
            (Inst::Convert(to, from), &[v]) => {
                let ty = self.ops.ty(*to, form);
                let name = match (operand_elem(*from), *to) {
                    (Elem::I32, _) => "arith.sitofp",
                    (_, Elem::I32) => "arith.fptosi",
                    (Elem::F64, _) => "arith.truncf",
                    _ => "arith.extf",
                };
                self.ops.op1(name, &[v], &[], ty)
            }
            (inst, _) => Err(Error::Internal {
                message: format!("{val}: {inst:?} is not computed from operands"),
            }),
        }
    }

    fn unary(&mut self, op: UnaryOp, elem: Elem, form: Form, v: V<'c>) -> Result<V<'c>, Error> {
        match op {
            UnaryOp::Neg if elem == Elem::I32 => {
                let zero = self.ops.int(form, 0)?;
                self.ops.subi(zero, v)
            }
            UnaryOp::Neg => self.ops.same("arith.negf", &[v]),
            UnaryOp::Abs => self.ops.same("math.absf", &[v]),
            UnaryOp::Sqrt => self.ops.same("math.sqrt", &[v]),
            UnaryOp::Rsqrt => {
                let one = self.ops.float(elem, form, 1.0)?;
                let root = self.ops.same("math.sqrt", &[v])?;
                self.ops.divf(one, root)
            }
            UnaryOp::Exp => self.ops.exp(form, v),
            UnaryOp::Log => self.ops.log(form, v),
            UnaryOp::Tanh => self.ops.tanh(form, v),
            UnaryOp::Erf => self.ops.erf(form, v),
            UnaryOp::Sigmoid => self.ops.sigmoid(form, v),
            UnaryOp::Not => {
                let all = match form {
                    Form::Vector(width) => self.ops.prefix_mask(width, width)?,
                    Form::Scalar => {
                        let one = self.ops.int(form, 1)?;
                        let ty = self.ops.ty(Elem::Bool, form);
                        self.ops.op1("arith.trunci", &[one], &[], ty)?
                    }
                };
                self.ops.same("arith.xori", &[v, all])
            }
        }
    }

    fn binary(
        &mut self,
        op: BinaryOp,
        elem: Elem,
        form: Form,
        a: V<'c>,
        b: V<'c>,
    ) -> Result<V<'c>, Error> {
        let float = elem.is_float();
        let name = match op {
            BinaryOp::Add if float => "arith.addf",
            BinaryOp::Add => "arith.addi",
            BinaryOp::Sub if float => "arith.subf",
            BinaryOp::Sub => "arith.subi",
            BinaryOp::Mul if float => "arith.mulf",
            BinaryOp::Mul => "arith.muli",
            BinaryOp::Div => "arith.divf",
            BinaryOp::Max if float => return self.ops.max_keeping_nan(form, a, b),
            BinaryOp::Max => "arith.maxsi",
            BinaryOp::Min if float => {
                let less = self.ops.cmpf(Cmp::Lt, form, a, b)?;
                return self.ops.select(less, a, b);
            }
            BinaryOp::Min => "arith.minsi",
            BinaryOp::And => "arith.andi",
            BinaryOp::Or => "arith.ori",
        };
        self.ops.same(name, &[a, b])
    }
}
