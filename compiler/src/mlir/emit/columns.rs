//! Sums over rows by the threads of a GPU, column by column.
//!
//! Enters: a program that only accumulates, each lane's element being the same in all rows
//! ([`crate::codegen::columns`]), and its [`Launch`]. Leaves: a kernel in which each thread keeps to one
//! lane and takes every `teams`th row; the teams' sums are combined at the end, in their order.
//! Invariant: sums stay in registers until then, and nothing is stored before, so that the loads of
//! several rows are in flight together.

use std::collections::HashMap;

use super::super::Error;
use super::super::ops::{Form, V};
use super::Function;
use super::threads::Threads;
use crate::codegen::columns::sums;
use crate::codegen::kernel::{Elem, Inst, StartFrom, Val};
use crate::codegen::lanes::LanePass;
use crate::codegen::launch::{Launch, WARP};

/// Rows that a thread has in flight.
const UNROLL: usize = 4;

impl<'c> Function<'_, 'c> {
    /// The whole kernel; `shared` names the block's memory, a float a thread.
    pub(super) fn emit_columns(&mut self, launch: Launch, shared: &str) -> Result<(), Error> {
        let (thread, block) = (self.ops.register("tid.x")?, self.ops.register("ctaid.x")?);
        let width = self.ops.i64(WARP as i64)?;
        let within = self.ops.same("arith.remui", &[thread, width])?;
        let team = self.ops.same("arith.divui", &[thread, width])?;
        let first = self.ops.muli(block, width)?;
        let lane = self.ops.addi(first, within)?;
        let shared = self.ops.shared(shared)?;
        self.threads = Some(Threads {
            launch,
            lane: within,
            shared: Some(shared),
        });
        for val in self.plan.invariant.clone() {
            self.row_value(val)?;
        }

        let program = self.program;
        let wanted: Vec<Val> = sums(program).collect();
        let mut totals = Vec::with_capacity(wanted.len());
        for &val in &wanted {
            totals.push(self.identity(self.reduce_kind(val)?, Form::Scalar)?);
        }
        // A loop of one turn for threads that have a lane, and of none for the others.
        let n_lanes = self.ops.i64(program.lanes() as i64)?;
        totals = self.loop_over(lane, n_lanes, n_lanes, &totals, |this, lane, totals| {
            this.sum_rows(launch.teams, (team, lane), &wanted, totals)
        })?;
        for (&val, total) in wanted.iter().zip(totals) {
            self.combine_teams(val, (team, lane), (thread, shared), total)?;
        }
        self.ops.op0("func.return", &[], &[])
    }

    /// A lane's sums over the rows of one team.
    fn sum_rows(
        &mut self,
        teams: usize,
        (team, lane): (V<'c>, V<'c>),
        wanted: &[Val],
        totals: &[V<'c>],
    ) -> Result<Vec<V<'c>>, Error> {
        let n_rows = self.program.n_rows();
        let whole = n_rows / (teams * UNROLL) * (teams * UNROLL);
        let mut totals = totals.to_vec();
        if whole > 0 {
            let end = self.ops.i64(whole as i64)?;
            let step = self.ops.i64((teams * UNROLL) as i64)?;
            totals = self.loop_over(team, end, step, &totals, |this, row, totals| {
                let mut totals = totals.to_vec();
                for idx in 0..UNROLL {
                    let offset = this.ops.i64((idx * teams) as i64)?;
                    let row = this.ops.addi(row, offset)?;
                    totals = this.add_row((row, lane), wanted, totals)?;
                }
                Ok(totals)
            })?;
        }
        if whole == n_rows {
            return Ok(totals);
        }
        let done = self.ops.i64(whole as i64)?;
        let first = self.ops.addi(team, done)?;
        let (end, step) = (self.ops.i64(n_rows as i64)?, self.ops.i64(teams as i64)?);
        self.loop_over(first, end, step, &totals, |this, row, totals| {
            this.add_row((row, lane), wanted, totals.to_vec())
        })
    }

    /// One row's element of a lane, added to the lane's sums.
    fn add_row(
        &mut self,
        (row, lane): (V<'c>, V<'c>),
        wanted: &[Val],
        totals: Vec<V<'c>>,
    ) -> Result<Vec<V<'c>>, Error> {
        let program = self.program;
        self.delinearize(row)?;
        // Nothing is reduced over lanes: there is one walk.
        let mut walk = LanePass::default();
        for pass in self.plan.passes.clone() {
            for &val in &pass.row_values {
                self.row_value(val)?;
            }
            walk.lane_values.extend(pass.lane_values);
        }
        walk.reductions = wanted.to_vec();
        let mut row_ptrs = HashMap::new();
        for &val in &walk.lane_values {
            if let Inst::Load(access) = program.inst(val) {
                row_ptrs.insert(val, self.row_ptr(access)?);
            }
        }
        self.emit_lanes(&walk, &row_ptrs, &[lane], totals)
    }

    /// The teams' sums of a lane, combined by the first of them into the argument.
    fn combine_teams(
        &mut self,
        val: Val,
        (team, lane): (V<'c>, V<'c>),
        (thread, shared): (V<'c>, V<'c>),
        total: V<'c>,
    ) -> Result<(), Error> {
        let program = self.program;
        let Inst::Accumulate {
            access,
            kind,
            start,
            ..
        } = program.inst(val)
        else {
            return Err(Error::Internal {
                message: format!("{val} is no sum over rows"),
            });
        };
        let teams = self.threads()?.launch.teams;
        let slot = self.ops.element_ptr(shared, thread, Elem::F32)?;
        self.ops.store(slot, total, Elem::F32)?;
        self.sync_block()?;
        let (one, zero) = (self.ops.i64(1)?, self.ops.i64(0)?);
        let n_lanes = self.ops.i64(program.lanes() as i64)?;
        self.loop_over(team, one, one, &[], |this, _, _| {
            this.loop_over(lane, n_lanes, n_lanes, &[], |this, lane, _| {
                let mut sum = total;
                for other in 1..teams {
                    let offset = this.ops.i64((other * WARP) as i64)?;
                    let slot = this.ops.addi(thread, offset)?;
                    let slot = this.ops.element_ptr(shared, slot, Elem::F32)?;
                    let part = this.ops.load(slot, Elem::F32, Form::Scalar)?;
                    sum = this.combine(*kind, Form::Scalar, sum, part)?;
                }
                // The element is the same in all rows.
                this.delinearize(zero)?;
                let base = this.row_ptr(access)?;
                let ptr = this.lane_ptr(access, base, lane)?;
                let elem = this.elem(access);
                if *start == StartFrom::Existing {
                    let old = this.ops.load(ptr, elem, Form::Scalar)?;
                    sum = this.combine(*kind, Form::Scalar, old, sum)?;
                }
                this.ops.store(ptr, sum, elem)?;
                Ok(Vec::new())
            })?;
            Ok(Vec::new())
        })?;
        // The next sum takes the same memory.
        self.sync_block()
    }
}
