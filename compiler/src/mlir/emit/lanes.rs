//! Walks over the lanes of a row: unrolled vectors, single vectors, a masked rest.
//!
//! Enters: one pass of the lane plan. Leaves: its loops in the row's body, its reductions as row
//! values. Invariant: masked lanes never touch memory and never enter a reduction.

use std::collections::HashMap;

use super::super::Error;
use super::super::ops::{Cmp, Form, V};
use super::Function;
use crate::codegen::kernel::{Access, Elem, Inst, ReduceKind, Val};
use crate::codegen::lanes::LanePass;

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
    pub(super) fn emit_pass(&mut self, pass: &LanePass) -> Result<(), Error> {
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

    pub(super) fn reduce_kind(&self, val: Val) -> Result<ReduceKind, Error> {
        match self.program.inst(val) {
            Inst::Reduce(kind, _) | Inst::Accumulate { kind, .. } => Ok(*kind),
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
    pub(super) fn widen(&mut self, val: Val) -> Result<V<'c>, Error> {
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

    pub(super) fn load_lanes(
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

    pub(super) fn store_lanes(
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
}
