//! From a row program to one function of the `func`, `scf`, `arith`, `vector` and `llvm` dialects.
//!
//! Enters: a [`RowProgram`] and the vector width. Leaves: a `func.func` appended to a module:
//! a loop over the rows, and inside it the passes of [`plan_lanes`] one after another.
//! Invariant: all loads of a chunk of lanes stand before its stores, instruction by instruction
//! across the unrolled vectors, so that neither aliasing nor latency serializes them.

use std::collections::HashMap;

use melior::Context;
use melior::ir::attribute::{StringAttribute, TypeAttribute};
use melior::ir::block::BlockLike;
use melior::ir::operation::OperationBuilder;
use melior::ir::r#type::FunctionType;
use melior::ir::{Block, Identifier, Module, Region, RegionLike, Type, ValueLike};

use super::Error;
use super::ops::{Cmp, Form, Ops, V};
use crate::codegen::kernel::{
    Access, BinaryOp, Elem, Inst, Predicate, ReduceKind, RowProgram, Span, StartFrom, UnaryOp, Val,
};
use crate::codegen::lanes::{LanePass, LanePlan, plan_lanes};

/// What the emitted code may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmitOptions {
    /// 32-bit lanes of a vector register; a power of two.
    pub width: usize,
    /// Whether a fused multiply-add is one instruction.
    pub has_fma: bool,
}

/// Appends the function `name` to `module`.
///
/// # Errors
/// `Internal` if an operation does not build, which is a bug of the emitter.
pub fn emit_kernel<'c>(
    context: &'c Context,
    module: &Module<'c>,
    name: &str,
    program: &RowProgram,
    options: EmitOptions,
) -> Result<(), Error> {
    let region = Region::new();
    let location = melior::ir::Location::unknown(context);
    let ptr = melior::dialect::llvm::r#type::pointer(context, 0);
    let i64_ty: Type<'c> = melior::ir::r#type::IntegerType::new(context, 64).into();
    let inputs = [ptr, i64_ty, i64_ty];
    let block = region.append_block(Block::new(&inputs.map(|ty| (ty, location))));
    let mut parameters = Vec::with_capacity(inputs.len());
    for idx in 0..inputs.len() {
        let argument = block.argument(idx).map_err(|error| Error::Internal {
            message: error.to_string(),
        })?;
        // SAFETY: the block moves with its region into the function, which the module owns.
        parameters.push(unsafe { V::<'c>::from_raw(argument.to_raw()) });
    }
    {
        // SAFETY: as above; the builder ends with this scope.
        let ops = unsafe { Ops::new(context, &block, options.has_fma) };
        let mut function = Function {
            ops,
            program,
            plan: plan_lanes(program),
            width: options.width,
            args: Vec::new(),
            scratch: Vec::new(),
            row_values: vec![None; program.body().len()],
            row_position: Vec::new(),
        };
        function.emit(parameters[0], parameters[1], parameters[2])?;
    }
    let function = OperationBuilder::new("func.func", location)
        .add_attributes(&[
            (
                Identifier::new(context, "sym_name"),
                StringAttribute::new(context, name).into(),
            ),
            (
                Identifier::new(context, "function_type"),
                TypeAttribute::new(FunctionType::new(context, &inputs, &[]).into()).into(),
            ),
        ])
        .add_regions([region])
        .build()
        .map_err(|error| Error::Internal {
            message: format!("func.func: {error}"),
        })?;
    module.body().append_operation(function);
    Ok(())
}

struct Function<'p, 'c> {
    ops: Ops<'c>,
    program: &'p RowProgram,
    plan: LanePlan,
    width: usize,
    args: Vec<V<'c>>,
    scratch: Vec<V<'c>>,
    /// Row values made so far.
    row_values: Vec<Option<V<'c>>>,
    /// Position along each row dim (`i64`).
    row_position: Vec<V<'c>>,
}

/// Vectors next to each other: the lanes `start .. start + n_vectors · width`.
#[derive(Clone, Copy)]
struct Chunk<'c> {
    start: V<'c>,
    n_vectors: usize,
    /// Lanes that exist, for the single vector of a tail.
    mask: Option<V<'c>>,
}

/// Where the lanes of a row end: as vectors of a main loop, single vectors and a masked rest.
struct Extent<'c> {
    /// End of the unrolled loop, end of the single vectors.
    main: V<'c>,
    vectors: V<'c>,
    /// Statically known, per part: is there anything to do?
    n_main: Option<usize>,
    n_single: Option<usize>,
    tail_mask: Option<V<'c>>,
}

impl<'c> Function<'_, 'c> {
    fn emit(&mut self, args: V<'c>, begin: V<'c>, end: V<'c>) -> Result<(), Error> {
        for idx in 0..self.program.args().len() {
            let arg = self.ops.load_ptr(args, idx)?;
            self.args.push(arg);
        }
        let padded = self.program.lanes().next_multiple_of(self.width);
        for _ in 0..self.plan.n_scratch {
            let scratch = self.ops.alloca(Elem::F32, padded)?;
            self.scratch.push(scratch);
        }
        for val in self.plan.invariant.clone() {
            self.row_value(val)?;
        }
        self.fill_accumulators()?;
        let one = self.ops.i64(1)?;
        // The body is emitted through the builder inside `self`; it is moved out for the call.
        let this = self;
        this.loop_over(begin, end, one, &[], |this, row, _| {
            this.emit_row(row)?;
            Ok(Vec::new())
        })?;
        this.ops.op0("func.return", &[], &[])
    }

    /// [`Ops::for_loop`] with the whole function at hand in the body.
    fn loop_over(
        &mut self,
        lower: V<'c>,
        upper: V<'c>,
        step: V<'c>,
        init: &[V<'c>],
        body: impl FnOnce(&mut Self, V<'c>, &[V<'c>]) -> Result<Vec<V<'c>>, Error>,
    ) -> Result<Vec<V<'c>>, Error> {
        let open = self.ops.open_loop(lower, upper, step, init)?;
        let (iv, carried) = (open.counter, open.carried.clone());
        let next = body(self, iv, &carried);
        self.ops.close_loop(open, next)
    }

    fn emit_row(&mut self, row: V<'c>) -> Result<(), Error> {
        self.delinearize(row)?;
        for pass in self.plan.passes.clone() {
            for &val in &pass.row_values {
                self.row_value(val)?;
            }
            self.emit_pass(&pass)?;
        }
        for val in self.plan.final_row_values.clone() {
            self.row_value(val)?;
        }
        for val in self.plan.row_effects.clone() {
            self.row_effect(val)?;
        }
        Ok(())
    }

    /// Position along each row dim from the flattened row.
    fn delinearize(&mut self, row: V<'c>) -> Result<(), Error> {
        let rows = self.program.rows();
        let mut position = Vec::with_capacity(rows.len());
        let mut rest = row;
        for (dim, &size) in rows.iter().enumerate().rev() {
            if dim == 0 {
                position.push(rest);
            } else if size == 1 {
                position.push(self.ops.i64(0)?);
            } else {
                let size = self.ops.i64(size as i64)?;
                position.push(self.ops.same("arith.remui", &[rest, size])?);
                rest = self.ops.same("arith.divui", &[rest, size])?;
            }
        }
        position.reverse();
        self.row_position = position;
        Ok(())
    }

    // Row values.

    fn row(&self, val: Val) -> Result<V<'c>, Error> {
        self.row_values[val.index()].ok_or_else(|| Error::Internal {
            message: format!("row value {val} is used before it is made"),
        })
    }

    fn row_value(&mut self, val: Val) -> Result<(), Error> {
        let program = self.program;
        let inst = program.inst(val);
        let value = match inst {
            Inst::RowIndex(dim) => {
                let ty = self.ops.ty(Elem::I32, Form::Scalar);
                self.ops
                    .op1("arith.trunci", &[self.row_position[*dim]], &[], ty)?
            }
            Inst::Load(access) => {
                let ptr = self.row_ptr(access)?;
                let elem = self.elem(access);
                self.ops.load(ptr, elem, Form::Scalar)?
            }
            Inst::PowI(base, exponent) => {
                let (base, exponent) = (self.row(*base)?, self.row(*exponent)?);
                self.powi(val, base, exponent)?
            }
            Inst::Const { .. }
            | Inst::Unary(..)
            | Inst::Binary(..)
            | Inst::Fma(..)
            | Inst::Compare(..)
            | Inst::Select(..)
            | Inst::Convert(..) => {
                let mut operands = Vec::new();
                let mut missing = None;
                inst.for_each_operand(|v| match self.row_values[v.index()] {
                    Some(value) => operands.push(value),
                    None => missing = Some(v),
                });
                if let Some(v) = missing {
                    self.row(v)?;
                }
                self.compute(val, Form::Scalar, &operands)?
            }
            Inst::LaneIndex | Inst::Reduce(..) | Inst::Store(..) | Inst::Accumulate { .. } => {
                return Err(Error::Internal {
                    message: format!("{val} is no row value to compute"),
                });
            }
        };
        self.row_values[val.index()] = Some(value);
        Ok(())
    }

    fn powi(&mut self, val: Val, base: V<'c>, exponent: V<'c>) -> Result<V<'c>, Error> {
        let elem = self.program.value_type(val).map_or(Elem::F32, |ty| ty.elem);
        let acc = self.ops.float(elem, Form::Scalar, 1.0)?;
        let (lower, upper, step) = (self.ops.i64(0)?, self.ops.i64(31)?, self.ops.i64(1)?);
        let i32_ty = self.ops.ty(Elem::I32, Form::Scalar);
        let results = self.loop_over(lower, upper, step, &[acc, base], |this, bit, carried| {
            let bit = this.ops.op1("arith.trunci", &[bit], &[], i32_ty)?;
            let shifted = this.ops.same("arith.shrui", &[exponent, bit])?;
            let one = this.ops.int(Form::Scalar, 1)?;
            let low = this.ops.same("arith.andi", &[shifted, one])?;
            let is_set = this.ops.cmpi(Cmp::Eq, Form::Scalar, low, one)?;
            let product = this.ops.mulf(carried[0], carried[1])?;
            let acc = this.ops.select(is_set, product, carried[0])?;
            let square = this.ops.mulf(carried[1], carried[1])?;
            Ok(vec![acc, square])
        })?;
        Ok(results[0])
    }

    fn row_effect(&mut self, val: Val) -> Result<(), Error> {
        let program = self.program;
        match program.inst(val) {
            Inst::Store(access, v) => {
                let ptr = self.row_ptr(access)?;
                let (v, elem) = (self.row(*v)?, self.elem(access));
                self.ops.store(ptr, v, elem)
            }
            Inst::Accumulate {
                access,
                kind,
                value,
                ..
            } => {
                let ptr = self.row_ptr(access)?;
                let (v, elem) = (self.row(*value)?, self.elem(access));
                let old = self.ops.load(ptr, elem, Form::Scalar)?;
                let new = self.combine(*kind, Form::Scalar, old, v)?;
                self.ops.store(ptr, new, elem)
            }
            _ => Err(Error::Internal {
                message: format!("{val} is no effect"),
            }),
        }
    }

    fn elem(&self, access: &Access) -> Elem {
        self.program.args()[access.arg.index()].elem
    }

    /// Address of lane 0 of the current row.
    fn row_ptr(&mut self, access: &Access) -> Result<V<'c>, Error> {
        let mut index = self.ops.i64(access.offset)?;
        for (dim, &stride) in access.outer.iter().enumerate() {
            if stride != 0 {
                let stride = self.ops.i64(stride)?;
                let part = self.ops.muli(self.row_position[dim], stride)?;
                index = self.ops.addi(index, part)?;
            }
        }
        if let Some(indexed) = &access.indexed {
            let value = self.row(indexed.index)?;
            let ty = self.ops.i64_ty(Form::Scalar);
            let value = self.ops.op1("arith.extsi", &[value], &[], ty)?;
            let stride = self.ops.i64(indexed.stride)?;
            let part = self.ops.muli(value, stride)?;
            index = self.ops.addi(index, part)?;
        }
        let elem = self.elem(access);
        self.ops
            .element_ptr(self.args[access.arg.index()], index, elem)
    }

    // Passes over the lanes.

    fn emit_pass(&mut self, pass: &LanePass) -> Result<(), Error> {
        let program = self.program;
        // Addresses of the row, outside the loop over its lanes.
        let mut row_ptrs = HashMap::new();
        for &val in pass.lane_values.iter().chain(&pass.effects) {
            if let Inst::Load(access) | Inst::Store(access, _) | Inst::Accumulate { access, .. } =
                program.inst(val)
            {
                row_ptrs.insert(val, self.row_ptr(access)?);
            }
        }

        let costly = pass
            .lane_values
            .iter()
            .any(|&val| matches!(program.inst(val), Inst::Unary(op, _) if op.is_expensive()));
        // Polynomials keep a vector busy for long and need registers; plain loops want more loads
        // in flight and more partial sums.
        let unroll = if costly { 2 } else { 4 };
        let extent = self.extent(unroll)?;
        let width = self.ops.i64(self.width as i64)?;

        let mut sums: Vec<V<'c>> = Vec::new();
        for &val in &pass.reductions {
            let identity = self.identity(self.reduce_kind(val)?, Form::Vector(self.width))?;
            sums.extend(std::iter::repeat_n(identity, unroll));
        }

        // Whole groups of vectors.
        let zero = self.ops.i64(0)?;
        match extent.n_main {
            Some(0) => {}
            Some(1) => {
                let chunk = Chunk {
                    start: zero,
                    n_vectors: unroll,
                    mask: None,
                };
                sums = self.emit_chunk(pass, &row_ptrs, chunk, sums)?;
            }
            Some(_) | None => {
                let step = self.ops.i64((self.width * unroll) as i64)?;
                sums = self.loop_over(zero, extent.main, step, &sums, |this, start, sums| {
                    let chunk = Chunk {
                        start,
                        n_vectors: unroll,
                        mask: None,
                    };
                    this.emit_chunk(pass, &row_ptrs, chunk, sums.to_vec())
                })?;
            }
        }
        // Single vectors.
        match extent.n_single {
            Some(0) => {}
            Some(n_vectors) => {
                let chunk = Chunk {
                    start: extent.main,
                    n_vectors,
                    mask: None,
                };
                sums = self.emit_chunk(pass, &row_ptrs, chunk, sums)?;
            }
            None => {
                sums = self.loop_over(
                    extent.main,
                    extent.vectors,
                    width,
                    &sums,
                    |this, start, sums| {
                        let chunk = Chunk {
                            start,
                            n_vectors: 1,
                            mask: None,
                        };
                        this.emit_chunk(pass, &row_ptrs, chunk, sums.to_vec())
                    },
                )?;
            }
        }
        // The rest, under a mask.
        if let Some(mask) = extent.tail_mask {
            let chunk = Chunk {
                start: extent.vectors,
                n_vectors: 1,
                mask: Some(mask),
            };
            sums = self.emit_chunk(pass, &row_ptrs, chunk, sums)?;
        }

        for (idx, &val) in pass.reductions.iter().enumerate() {
            let kind = self.reduce_kind(val)?;
            let mut partial = sums[idx * unroll..(idx + 1) * unroll].to_vec();
            while partial.len() > 1 {
                let mut next = Vec::with_capacity(partial.len() / 2);
                for pair in partial.chunks(2) {
                    next.push(match pair {
                        [a, b] => self.combine(kind, Form::Vector(self.width), *a, *b)?,
                        _ => pair[0],
                    });
                }
                partial = next;
            }
            let kind = match kind {
                ReduceKind::Sum => "add",
                ReduceKind::Max => "maxnumf",
            };
            let total = self.ops.horizontal(kind, partial[0])?;
            self.row_values[val.index()] = Some(total);
        }

        if let Some(limit) = program.limit() {
            for &val in &pass.effects {
                if let Inst::Store(access, _) = program.inst(val) {
                    let ptr = row_ptrs[&val];
                    self.fill_beyond(access, ptr, limit.visible, limit.extent)?;
                }
            }
        }
        Ok(())
    }

    fn reduce_kind(&self, val: Val) -> Result<ReduceKind, Error> {
        match self.program.inst(val) {
            Inst::Reduce(kind, _) => Ok(*kind),
            _ => Err(Error::Internal {
                message: format!("{val} is no reduction"),
            }),
        }
    }

    fn extent(&mut self, unroll: usize) -> Result<Extent<'c>, Error> {
        let width = self.width;
        if let Some(limit) = self.program.limit() {
            let visible = self.widen(limit.visible)?;
            let main = self.round_down(visible, width * unroll)?;
            let vectors = self.round_down(visible, width)?;
            let tail_mask = self.mask_below(vectors, visible)?;
            return Ok(Extent {
                main,
                vectors,
                n_main: None,
                n_single: None,
                tail_mask: Some(tail_mask),
            });
        }
        let lanes = self.program.lanes();
        let n_main = lanes / (width * unroll);
        let n_single = lanes / width - n_main * unroll;
        let n_tail = lanes % width;
        Ok(Extent {
            main: self.ops.i64((n_main * unroll * width) as i64)?,
            vectors: self.ops.i64((lanes - n_tail) as i64)?,
            n_main: Some(n_main),
            n_single: Some(n_single),
            tail_mask: if n_tail == 0 {
                None
            } else {
                Some(self.ops.prefix_mask(width, n_tail)?)
            },
        })
    }

    /// An `I32` row value as `i64`.
    fn widen(&mut self, val: Val) -> Result<V<'c>, Error> {
        let value = self.row(val)?;
        let ty = self.ops.i64_ty(Form::Scalar);
        self.ops.op1("arith.extsi", &[value], &[], ty)
    }

    /// Down to a multiple of a power of two.
    fn round_down(&mut self, v: V<'c>, multiple: usize) -> Result<V<'c>, Error> {
        let mask = self.ops.i64(-(multiple as i64))?;
        self.ops.same("arith.andi", &[v, mask])
    }

    /// Lanes of the vector at `start` that lie below `end`.
    fn mask_below(&mut self, start: V<'c>, end: V<'c>) -> Result<V<'c>, Error> {
        let n_left = self.ops.subi(end, start)?;
        let i32_ty = self.ops.ty(Elem::I32, Form::Scalar);
        let n_left = self.ops.op1("arith.trunci", &[n_left], &[], i32_ty)?;
        let n_left = self.ops.broadcast(n_left, Elem::I32, self.width)?;
        let iota = self.ops.iota(self.width)?;
        self.ops
            .cmpi(Cmp::Lt, Form::Vector(self.width), iota, n_left)
    }

    /// Zeros in the lanes `visible..extent` of a store.
    fn fill_beyond(
        &mut self,
        access: &Access,
        ptr: V<'c>,
        visible: Val,
        extent: Val,
    ) -> Result<(), Error> {
        if access.lane != 1 {
            return Err(Error::Unsupported {
                message: format!("a lane limit with a store of lane stride {}", access.lane),
            });
        }
        let elem = self.elem(access);
        let form = Form::Vector(self.width);
        let zero = match elem {
            Elem::I32 => self.ops.int(form, 0)?,
            _ => self.ops.float(elem, form, 0.0)?,
        };
        let visible = self.widen(visible)?;
        let extent = self.widen(extent)?;
        let n = self.ops.subi(extent, visible)?;
        let n_full = self.round_down(n, self.width)?;
        let full_end = self.ops.addi(visible, n_full)?;
        let step = self.ops.i64(self.width as i64)?;
        self.loop_over(visible, full_end, step, &[], |this, lane, _| {
            let ptr = this.ops.element_ptr(ptr, lane, elem)?;
            this.ops.store(ptr, zero, elem)?;
            Ok(Vec::new())
        })?;
        let mask = self.mask_below(full_end, extent)?;
        let ptr = self.ops.element_ptr(ptr, full_end, elem)?;
        self.ops.masked_store(ptr, zero, mask, elem)
    }

    /// One chunk of lanes: its values, reductions and effects; returns the new partial results.
    fn emit_chunk(
        &mut self,
        pass: &LanePass,
        row_ptrs: &HashMap<Val, V<'c>>,
        chunk: Chunk<'c>,
        mut sums: Vec<V<'c>>,
    ) -> Result<Vec<V<'c>>, Error> {
        let program = self.program;
        let form = Form::Vector(self.width);
        let unroll = sums.len().checked_div(pass.reductions.len()).unwrap_or(1);
        let mut lanes: HashMap<Val, Vec<V<'c>>> = HashMap::new();
        let mut starts = Vec::with_capacity(chunk.n_vectors);
        for idx in 0..chunk.n_vectors {
            let offset = self.ops.i64((idx * self.width) as i64)?;
            starts.push(self.ops.addi(chunk.start, offset)?);
        }

        for &(val, slot) in &pass.reloaded {
            let mut vectors = Vec::with_capacity(starts.len());
            for &start in &starts {
                let ptr = self.ops.element_ptr(self.scratch[slot], start, Elem::F32)?;
                vectors.push(self.ops.load(ptr, Elem::F32, form)?);
            }
            lanes.insert(val, vectors);
        }
        for &val in &pass.lane_values {
            let inst = program.inst(val);
            let mut vectors = Vec::with_capacity(starts.len());
            for (idx, &start) in starts.iter().enumerate() {
                let vector = match inst {
                    Inst::Load(access) => {
                        self.load_lanes(access, row_ptrs[&val], start, chunk.mask)?
                    }
                    Inst::LaneIndex => {
                        let i32_ty = self.ops.ty(Elem::I32, Form::Scalar);
                        let start = self.ops.op1("arith.trunci", &[start], &[], i32_ty)?;
                        let start = self.ops.broadcast(start, Elem::I32, self.width)?;
                        let iota = self.ops.iota(self.width)?;
                        self.ops.addi(start, iota)?
                    }
                    _ => {
                        let mut ids = Vec::new();
                        inst.for_each_operand(|v| ids.push(v));
                        let mut operands = Vec::with_capacity(ids.len());
                        for id in ids {
                            operands.push(self.lane_operand(&lanes, id, idx)?);
                        }
                        self.compute(val, form, &operands)?
                    }
                };
                vectors.push(vector);
            }
            lanes.insert(val, vectors);
        }
        for &(val, slot) in &pass.spilled {
            for (idx, &start) in starts.iter().enumerate() {
                let ptr = self.ops.element_ptr(self.scratch[slot], start, Elem::F32)?;
                let vector = self.lane_operand(&lanes, val, idx)?;
                self.ops.store(ptr, vector, Elem::F32)?;
            }
        }
        for (position, &val) in pass.reductions.iter().enumerate() {
            let Inst::Reduce(kind, v) = program.inst(val) else {
                continue;
            };
            for idx in 0..starts.len() {
                let mut vector = self.lane_operand(&lanes, *v, idx)?;
                if let Some(mask) = chunk.mask {
                    let identity = self.identity(*kind, form)?;
                    vector = self.ops.select(mask, vector, identity)?;
                }
                let sum = &mut sums[position * unroll + idx % unroll];
                *sum = self.combine(*kind, form, *sum, vector)?;
            }
        }
        for &val in &pass.effects {
            for (idx, &start) in starts.iter().enumerate() {
                match program.inst(val) {
                    Inst::Store(access, v) => {
                        let vector = self.lane_operand(&lanes, *v, idx)?;
                        self.store_lanes(access, row_ptrs[&val], start, chunk.mask, vector)?;
                    }
                    Inst::Accumulate {
                        access,
                        kind,
                        value,
                        ..
                    } => {
                        let vector = self.lane_operand(&lanes, *value, idx)?;
                        let old = self.load_lanes(access, row_ptrs[&val], start, chunk.mask)?;
                        let new = self.combine(*kind, form, old, vector)?;
                        self.store_lanes(access, row_ptrs[&val], start, chunk.mask, new)?;
                    }
                    _ => {}
                }
            }
        }
        Ok(sums)
    }

    /// A lane value's vector, or a row value in all lanes.
    fn lane_operand(
        &mut self,
        lanes: &HashMap<Val, Vec<V<'c>>>,
        val: Val,
        idx: usize,
    ) -> Result<V<'c>, Error> {
        if let Some(vectors) = lanes.get(&val) {
            return Ok(vectors[idx]);
        }
        let row = self.row(val)?;
        let elem = self.program.value_type(val).map_or(Elem::F32, |ty| ty.elem);
        self.ops.broadcast(row, elem, self.width)
    }

    fn load_lanes(
        &mut self,
        access: &Access,
        row_ptr: V<'c>,
        start: V<'c>,
        mask: Option<V<'c>>,
    ) -> Result<V<'c>, Error> {
        let elem = self.elem(access);
        if access.lane == 1 {
            let ptr = self.ops.element_ptr(row_ptr, start, elem)?;
            match mask {
                None => self.ops.load(ptr, elem, Form::Vector(self.width)),
                Some(mask) => self.ops.masked_load(ptr, mask, elem, self.width),
            }
        } else {
            let ptrs = self.lane_ptrs(access, row_ptr, start)?;
            let mask = self.or_all(mask)?;
            self.ops.gather(ptrs, mask, elem, self.width)
        }
    }

    fn store_lanes(
        &mut self,
        access: &Access,
        row_ptr: V<'c>,
        start: V<'c>,
        mask: Option<V<'c>>,
        vector: V<'c>,
    ) -> Result<(), Error> {
        let elem = self.elem(access);
        if access.lane == 1 {
            let ptr = self.ops.element_ptr(row_ptr, start, elem)?;
            match mask {
                None => self.ops.store(ptr, vector, elem),
                Some(mask) => self.ops.masked_store(ptr, vector, mask, elem),
            }
        } else {
            let ptrs = self.lane_ptrs(access, row_ptr, start)?;
            let mask = self.or_all(mask)?;
            self.ops.scatter(ptrs, vector, mask, elem)
        }
    }

    fn lane_ptrs(&mut self, access: &Access, row_ptr: V<'c>, start: V<'c>) -> Result<V<'c>, Error> {
        let form = Form::Vector(self.width);
        let i64_ty = self.ops.i64_ty(form);
        let iota = self.ops.iota(self.width)?;
        let iota = self.ops.op1("arith.extsi", &[iota], &[], i64_ty)?;
        let start = self.ops.op1("vector.broadcast", &[start], &[], i64_ty)?;
        let lane = self.ops.addi(start, iota)?;
        let stride = self.ops.i64(access.lane)?;
        let stride = self.ops.op1("vector.broadcast", &[stride], &[], i64_ty)?;
        let index = self.ops.muli(lane, stride)?;
        let elem = self.elem(access);
        self.ops.element_ptrs(row_ptr, index, elem, self.width)
    }

    fn or_all(&mut self, mask: Option<V<'c>>) -> Result<V<'c>, Error> {
        match mask {
            Some(mask) => Ok(mask),
            None => self.ops.prefix_mask(self.width, self.width),
        }
    }

    // Accumulators.

    fn identity(&mut self, kind: ReduceKind, form: Form) -> Result<V<'c>, Error> {
        let value = match kind {
            ReduceKind::Sum => 0.0,
            ReduceKind::Max => f64::NEG_INFINITY,
        };
        self.ops.float(Elem::F32, form, value)
    }

    /// `acc` and `v` into one; a NaN in `v` never becomes a maximum.
    fn combine(
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
    fn fill_accumulators(&mut self) -> Result<(), Error> {
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

    fn compute(&mut self, val: Val, form: Form, operands: &[V<'c>]) -> Result<V<'c>, Error> {
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
