//! Walks over the lanes of a row by the threads of a GPU.
//!
//! Enters: a row program and its [`Launch`]. Leaves: a kernel `void name(arg pointers…)` in which a
//! team of threads shares a row: of its groups of neighboring lanes, one access each, thread `t` of `T`
//! takes the groups `t, t + T, …`.
//! Invariant: a lane belongs to the same thread in every pass and every row, so what a lane loads
//! and later stores or accumulates needs no barrier; what a row loads is loaded by all threads
//! before any of them stores.

use std::collections::HashMap;

use super::super::Error;
use super::super::ops::{Form, V};
use super::Function;
use crate::codegen::kernel::{Access, Elem, Inst, ReduceKind, Span, Val};
use crate::codegen::lanes::LanePass;
use crate::codegen::launch::{ACCESS_BYTES, Launch, WARP};

/// Lanes that a thread has in flight, unless one group is more; with twice as many, kernels of several
/// arguments (adamw) take so many registers that half as many threads fit.
const UNROLL: usize = 4;

/// Who a thread is.
pub(super) struct Threads<'c> {
    pub launch: Launch,
    /// Its number in its team (`i64`).
    pub lane: V<'c>,
    /// One `f32` per warp of a block, where a team is a block.
    pub shared: Option<V<'c>>,
}

impl<'c> Function<'_, 'c> {
    /// The whole kernel; `shared` names the block's memory.
    pub(super) fn emit_threads(&mut self, launch: Launch, shared: &str) -> Result<(), Error> {
        let thread = self.ops.register("tid.x")?;
        let block = self.ops.register("ctaid.x")?;
        let n_blocks = self.ops.register("nctaid.x")?;
        let n_teams = self.ops.i64(launch.teams as i64)?;
        let team_size = self.ops.i64(launch.team as i64)?;
        let lane = self.ops.same("arith.remui", &[thread, team_size])?;
        let team = self.ops.same("arith.divui", &[thread, team_size])?;
        let first = self.ops.muli(block, n_teams)?;
        let first = self.ops.addi(first, team)?;
        let step = self.ops.muli(n_blocks, n_teams)?;
        let shared = if launch.team > WARP {
            Some(self.ops.shared(shared)?)
        } else {
            None
        };
        self.threads = Some(Threads {
            launch,
            lane,
            shared,
        });

        for val in self.plan.invariant.clone() {
            self.row_value(val)?;
        }
        self.fill_accumulators()?;
        self.sync()?;
        let end = self.ops.i64(self.program.n_rows() as i64)?;
        let this = self;
        this.loop_over(first, end, step, &[], |this, row, _| {
            this.emit_row(row)?;
            Ok(Vec::new())
        })?;
        this.ops.op0("func.return", &[], &[])
    }

    pub(super) fn threads(&self) -> Result<&Threads<'c>, Error> {
        self.threads.as_ref().ok_or_else(|| Error::Internal {
            message: "a walk by threads in host code".to_string(),
        })
    }

    /// Waits for the other threads of the team, and lets them see what was stored.
    pub(super) fn sync(&mut self) -> Result<(), Error> {
        match self.threads()?.launch.team {
            1 => Ok(()),
            WARP => {
                let all = self.ops.int(Form::Scalar, -1)?;
                self.ops.op0("nvvm.bar.warp.sync", &[all], &[])
            }
            _ => self.sync_block(),
        }
    }

    /// Waits for the other threads of the block, all of which come here.
    pub(super) fn sync_block(&mut self) -> Result<(), Error> {
        self.ops.op0("nvvm.barrier0", &[], &[])
    }

    /// Runs `body` in the first thread of the team only.
    pub(super) fn first_thread(
        &mut self,
        body: impl FnOnce(&mut Self) -> Result<(), Error>,
    ) -> Result<(), Error> {
        // A loop from the thread's number to 1 has a turn in thread 0 alone.
        let (lane, one) = (self.threads()?.lane, self.ops.i64(1)?);
        self.loop_over(lane, one, one, &[], |this, _, _| {
            body(this)?;
            Ok(Vec::new())
        })?;
        Ok(())
    }

    pub(super) fn emit_pass_by_threads(&mut self, pass: &LanePass) -> Result<(), Error> {
        let program = self.program;
        let mut row_ptrs = HashMap::new();
        for &val in pass.lane_values.iter().chain(&pass.effects) {
            if let Inst::Load(access) | Inst::Store(access, _) | Inst::Accumulate { access, .. } =
                program.inst(val)
            {
                row_ptrs.insert(val, self.row_ptr(access)?);
            }
        }
        if !pass.effects.is_empty() {
            self.sync()?;
        }
        let mut sums = Vec::with_capacity(pass.reductions.len());
        for &val in &pass.reductions {
            sums.push(self.identity(self.reduce_kind(val)?, Form::Scalar)?);
        }

        let (launch, lane) = (self.threads()?.launch, self.threads()?.lane);
        let stride = launch.team * launch.adjacent;
        let step = self.ops.i64(stride as i64)?;
        let (rest, end) = match program.limit() {
            Some(limit) => (lane, self.widen(limit.visible)?),
            None => {
                let lanes = program.lanes();
                let adjacent = self.ops.i64(launch.adjacent as i64)?;
                let first = self.ops.muli(lane, adjacent)?;
                let n_groups = (UNROLL / launch.adjacent).max(1);
                let unrolled = match n_groups {
                    1 => 0,
                    _ => lanes / (stride * n_groups) * (stride * n_groups),
                };
                let end = self.ops.i64(unrolled as i64)?;
                if unrolled > 0 {
                    let big_step = self.ops.i64((stride * n_groups) as i64)?;
                    sums = self.loop_over(first, end, big_step, &sums, |this, start, sums| {
                        let mut starts = vec![start];
                        for idx in 1..n_groups {
                            let offset = this.ops.i64((idx * stride) as i64)?;
                            starts.push(this.ops.addi(start, offset)?);
                        }
                        this.emit_lanes(pass, &row_ptrs, &starts, sums.to_vec())
                    })?;
                }
                let rest = self.ops.addi(first, end)?;
                (rest, self.ops.i64(lanes as i64)?)
            }
        };
        sums = self.loop_over(rest, end, step, &sums, |this, start, sums| {
            this.emit_lanes(pass, &row_ptrs, &[start], sums.to_vec())
        })?;
        for (&val, partial) in pass.reductions.iter().zip(sums) {
            let kind = self.reduce_kind(val)?;
            let total = self.team_total(kind, partial)?;
            self.row_values[val.index()] = Some(total);
        }

        if let Some(limit) = program.limit() {
            for &val in &pass.effects {
                if let Inst::Store(access, _) = program.inst(val) {
                    let visible = self.widen(limit.visible)?;
                    let first = self.ops.addi(visible, lane)?;
                    let extent = self.widen(limit.extent)?;
                    let ptr = row_ptrs[&val];
                    self.loop_over(first, extent, step, &[], |this, lane, _| {
                        let zero = match this.elem(access) {
                            Elem::I32 => this.ops.int(Form::Scalar, 0)?,
                            elem => this.ops.float(elem.as_value(), Form::Scalar, 0.0)?,
                        };
                        this.store_lane(access, ptr, lane, zero)?;
                        Ok(Vec::new())
                    })?;
                }
            }
        }
        Ok(())
    }

    /// One thread's groups of lanes that begin at `starts`: instruction by instruction, so that their
    /// loads are in flight together.
    pub(super) fn emit_lanes(
        &mut self,
        pass: &LanePass,
        row_ptrs: &HashMap<Val, V<'c>>,
        starts: &[V<'c>],
        mut sums: Vec<V<'c>>,
    ) -> Result<Vec<V<'c>>, Error> {
        let program = self.program;
        let adjacent = self.threads()?.launch.adjacent;
        let n_lanes = starts.len() * adjacent;
        let mut lanes: HashMap<Val, Vec<V<'c>>> = HashMap::new();
        for &val in &pass.lane_values {
            let inst = program.inst(val);
            let mut values = Vec::with_capacity(n_lanes);
            match inst {
                Inst::Load(access) => {
                    for &start in starts {
                        values.extend(self.load_group(access, row_ptrs[&val], start)?);
                    }
                }
                Inst::LaneIndex => {
                    let ty = self.ops.ty(Elem::I32, Form::Scalar);
                    for &start in starts {
                        for idx in 0..adjacent {
                            let offset = self.ops.i64(idx as i64)?;
                            let lane = self.ops.addi(start, offset)?;
                            values.push(self.ops.op1("arith.trunci", &[lane], &[], ty)?);
                        }
                    }
                }
                _ => {
                    let mut ids = Vec::new();
                    inst.for_each_operand(|v| ids.push(v));
                    for idx in 0..n_lanes {
                        let mut operands = Vec::with_capacity(ids.len());
                        for &id in &ids {
                            operands.push(self.lane_or_row(&lanes, id, idx)?);
                        }
                        values.push(self.compute(val, Form::Scalar, &operands)?);
                    }
                }
            }
            lanes.insert(val, values);
        }
        for (sum, &val) in sums.iter_mut().zip(&pass.reductions) {
            let (Inst::Reduce(kind, v) | Inst::Accumulate { kind, value: v, .. }) =
                program.inst(val)
            else {
                continue;
            };
            for idx in 0..n_lanes {
                let value = self.lane_or_row(&lanes, *v, idx)?;
                *sum = self.combine(*kind, Form::Scalar, *sum, value)?;
            }
        }
        for &val in &pass.effects {
            for (group, &start) in starts.iter().enumerate() {
                let own = group * adjacent..(group + 1) * adjacent;
                match program.inst(val) {
                    Inst::Store(access, v) => {
                        let values = own.map(|idx| self.lane_or_row(&lanes, *v, idx));
                        let values = values.collect::<Result<Vec<_>, _>>()?;
                        self.store_group(access, row_ptrs[&val], start, &values)?;
                    }
                    Inst::Accumulate {
                        access,
                        kind,
                        value,
                        ..
                    } => {
                        let mut values = self.load_group(access, row_ptrs[&val], start)?;
                        for (old, idx) in values.iter_mut().zip(own) {
                            let value = self.lane_or_row(&lanes, *value, idx)?;
                            *old = self.combine(*kind, Form::Scalar, *old, value)?;
                        }
                        self.store_group(access, row_ptrs[&val], start, &values)?;
                    }
                    _ => {}
                }
            }
        }
        Ok(sums)
    }

    /// The lanes of a group, one access where there are several.
    fn load_group(
        &mut self,
        access: &Access,
        row_ptr: V<'c>,
        start: V<'c>,
    ) -> Result<Vec<V<'c>>, Error> {
        let adjacent = self.threads()?.launch.adjacent;
        let elem = self.elem(access);
        let ptr = self.lane_ptr(access, row_ptr, start)?;
        if adjacent == 1 {
            return Ok(vec![self.ops.load(ptr, elem, Form::Scalar)?]);
        }
        let mut values = Vec::with_capacity(adjacent);
        for (first, n) in pieces(elem, adjacent) {
            let offset = self.ops.i64(first as i64)?;
            let ptr = self.ops.element_ptr(ptr, offset, elem)?;
            values.extend(self.ops.load_neighbors(ptr, elem, n)?);
        }
        Ok(values)
    }

    fn store_group(
        &mut self,
        access: &Access,
        row_ptr: V<'c>,
        start: V<'c>,
        values: &[V<'c>],
    ) -> Result<(), Error> {
        let elem = self.elem(access);
        let ptr = self.lane_ptr(access, row_ptr, start)?;
        if let &[value] = values {
            return self.ops.store(ptr, value, elem);
        }
        for (first, n) in pieces(elem, values.len()) {
            let offset = self.ops.i64(first as i64)?;
            let ptr = self.ops.element_ptr(ptr, offset, elem)?;
            self.ops
                .store_neighbors(ptr, &values[first..first + n], elem)?;
        }
        Ok(())
    }

    fn lane_or_row(
        &self,
        lanes: &HashMap<Val, Vec<V<'c>>>,
        val: Val,
        idx: usize,
    ) -> Result<V<'c>, Error> {
        match lanes.get(&val) {
            Some(values) => Ok(values[idx]),
            None => self.row(val),
        }
    }

    pub(super) fn lane_ptr(
        &mut self,
        access: &Access,
        row_ptr: V<'c>,
        lane: V<'c>,
    ) -> Result<V<'c>, Error> {
        let stride = self.ops.i64(access.lane)?;
        let index = self.ops.muli(lane, stride)?;
        let elem = self.elem(access);
        self.ops.element_ptr(row_ptr, index, elem)
    }

    fn store_lane(
        &mut self,
        access: &Access,
        row_ptr: V<'c>,
        lane: V<'c>,
        value: V<'c>,
    ) -> Result<(), Error> {
        let elem = self.elem(access);
        let ptr = self.lane_ptr(access, row_ptr, lane)?;
        self.ops.store(ptr, value, elem)
    }

    /// The team's total, in every thread of it: a butterfly within a warp, then one over the
    /// warps' totals. The order is fixed, so the result is the same in every run.
    fn team_total(&mut self, kind: ReduceKind, partial: V<'c>) -> Result<V<'c>, Error> {
        let (team, lane, shared) = {
            let threads = self.threads()?;
            (threads.launch.team, threads.lane, threads.shared)
        };
        if team == 1 {
            return Ok(partial);
        }
        let total = self.butterfly(kind, partial, WARP)?;
        let Some(shared) = shared else {
            return Ok(total);
        };
        let n_warps = team / WARP;
        let warp_size = self.ops.i64(WARP as i64)?;
        let warp = self.ops.same("arith.divui", &[lane, warp_size])?;
        // The last total may still be read by a slower warp.
        self.sync()?;
        let slot = self.ops.element_ptr(shared, warp, Elem::F32)?;
        self.ops.store(slot, total, Elem::F32)?;
        self.sync()?;
        let n_warps_v = self.ops.i64(n_warps as i64)?;
        let other = self.ops.same("arith.remui", &[lane, n_warps_v])?;
        let slot = self.ops.element_ptr(shared, other, Elem::F32)?;
        let partial = self.ops.load(slot, Elem::F32, Form::Scalar)?;
        self.butterfly(kind, partial, n_warps)
    }

    /// Combines over groups of `n` neighbors of a warp (`n` a power of two).
    fn butterfly(&mut self, kind: ReduceKind, value: V<'c>, n: usize) -> Result<V<'c>, Error> {
        let mut value = value;
        let mut distance = n / 2;
        while distance > 0 {
            let other = self.ops.shuffle(value, distance)?;
            value = self.combine(kind, Form::Scalar, value, other)?;
            distance /= 2;
        }
        Ok(value)
    }

    /// Fills an accumulator's lanes, or its one element, with the identity.
    pub(super) fn fill_by_threads(
        &mut self,
        access: &Access,
        kind: ReduceKind,
        base: V<'c>,
    ) -> Result<(), Error> {
        let identity = self.identity(kind, Form::Scalar)?;
        if access.span() == Span::Row {
            return self.first_thread(|this| this.ops.store(base, identity, Elem::F32));
        }
        let (lane, team) = (self.threads()?.lane, self.threads()?.launch.team);
        let end = self.ops.i64(self.program.lanes() as i64)?;
        let step = self.ops.i64(team as i64)?;
        self.loop_over(lane, end, step, &[], |this, lane, _| {
            this.store_lane(access, base, lane, identity)?;
            Ok(Vec::new())
        })?;
        Ok(())
    }
}

/// Accesses of so many neighbors: the first element of each, and how many it has.
fn pieces(elem: Elem, n: usize) -> impl Iterator<Item = (usize, usize)> {
    let widest = (ACCESS_BYTES / elem.size()).min(n);
    (0..n).step_by(widest).map(move |first| (first, widest))
}
