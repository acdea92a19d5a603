//! How often a row's lanes are walked, and what each walk computes.
//!
//! Enters: a [`RowProgram`]. Leaves: a [`LanePlan`]: passes over the lanes with the row values
//! computed between them.
//!
//! A value that depends on a reduction is one *level* above what is reduced; pass `k` walks the
//! lanes for the reductions of level `k`. Cheap lane values are recomputed in each pass that needs
//! them (their loads hit the first-level cache); costly ones are kept in a scratch row.
//!
//! Invariant: all lane stores and accumulations stand in the last pass and all row effects after
//! it, so an argument may be rewritten in place.

use super::kernel::{Inst, RowProgram, Span, Val};

/// Most bytes of scratch rows that a kernel of the host may hold on its stack; beyond, values are recomputed.
pub const SCRATCH_LIMIT_BYTES: usize = 64 * 1024;

/// One walk over the lanes and what precedes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LanePass {
    /// Row values computed before the walk, in order.
    pub row_values: Vec<Val>,
    /// Lane values of the walk, in order.
    pub lane_values: Vec<Val>,
    /// Lane values read from a scratch row instead.
    pub reloaded: Vec<(Val, usize)>,
    /// Lane values of this walk also written to a scratch row.
    pub spilled: Vec<(Val, usize)>,
    /// Reductions finished by the walk.
    pub reductions: Vec<Val>,
    /// Lane stores and lane accumulations; only in the last pass.
    pub effects: Vec<Val>,
}

/// The whole schedule of a row program.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LanePlan {
    /// Row values that are the same for all rows, computed once per call.
    pub invariant: Vec<Val>,
    /// Walks over the lanes.
    pub passes: Vec<LanePass>,
    /// Row values computed after the last walk.
    pub final_row_values: Vec<Val>,
    /// Row stores and row accumulations.
    pub row_effects: Vec<Val>,
    /// Number of scratch rows, each of `lanes` 32-bit elements.
    pub n_scratch: usize,
}

/// Plans the passes with at most `scratch_bytes` of scratch rows. Complexity: passes × instructions.
pub fn plan_lanes(program: &RowProgram, scratch_bytes: usize) -> LanePlan {
    let n_insts = program.body().len();
    let levels = levels(program);
    let invariant = invariant(program);
    let is_lane = |v: Val| {
        program
            .value_type(v)
            .is_some_and(|ty| ty.span == Span::Lane)
    };

    let mut plan = LanePlan::default();
    let mut lane_effects = Vec::new();
    for (val, inst) in program.insts() {
        match inst {
            Inst::Store(access, _) | Inst::Accumulate { access, .. } => {
                if access.span() == Span::Lane {
                    lane_effects.push(val);
                } else {
                    plan.row_effects.push(val);
                }
            }
            _ => {}
        }
    }

    // Which values anything needs at all.
    let mut needed = vec![false; n_insts];
    let mut mark: Vec<Val> = lane_effects
        .iter()
        .chain(&plan.row_effects)
        .copied()
        .collect();
    if let Some(limit) = program.limit() {
        mark.extend([limit.visible, limit.extent]);
    }
    while let Some(val) = mark.pop() {
        if !std::mem::replace(&mut needed[val.index()], true) {
            program.inst(val).for_each_operand(|v| mark.push(v));
        }
    }

    let reductions: Vec<Val> = program
        .insts()
        .filter(|(val, inst)| matches!(inst, Inst::Reduce(..)) && needed[val.index()])
        .map(|(val, _)| val)
        .collect();
    let pass_of = |val: Val| match program.inst(val) {
        Inst::Reduce(_, v) => levels[v.index()],
        _ => levels[val.index()],
    };
    let n_passes = reductions
        .iter()
        .chain(&lane_effects)
        .map(|&val| pass_of(val) + 1)
        .max()
        .unwrap_or(0);
    plan.passes = vec![LanePass::default(); n_passes];

    // Row values stand before the first pass that can see their operands.
    for (val, inst) in program.insts() {
        if !needed[val.index()] || is_lane(val) || inst.is_effect() {
            continue;
        }
        if matches!(inst, Inst::Reduce(..)) {
            plan.passes[pass_of(val)].reductions.push(val);
        } else if invariant[val.index()] {
            plan.invariant.push(val);
        } else if levels[val.index()] < n_passes {
            plan.passes[levels[val.index()]].row_values.push(val);
        } else {
            plan.final_row_values.push(val);
        }
    }
    if let Some(last) = plan.passes.last_mut() {
        last.effects = lane_effects;
    }

    // Lane values by demand, pass after pass.
    let max_scratch = scratch_bytes / (4 * program.lanes().max(1));
    let mut made_in: Vec<Option<usize>> = vec![None; n_insts];
    let mut slot_of: Vec<Option<usize>> = vec![None; n_insts];
    for pass in 0..n_passes {
        let mut wanted = vec![false; n_insts];
        let mut reload = vec![false; n_insts];
        let mut mark = Vec::new();
        for &root in plan.passes[pass]
            .reductions
            .iter()
            .chain(&plan.passes[pass].effects)
        {
            program.inst(root).for_each_operand(|v| mark.push(v));
        }
        while let Some(val) = mark.pop() {
            if !is_lane(val) || std::mem::replace(&mut wanted[val.index()], true) {
                continue;
            }
            let costly = matches!(program.inst(val), Inst::Unary(op, _) if op.is_expensive());
            if costly && let Some(maker) = made_in[val.index()] {
                if slot_of[val.index()].is_none() && plan.n_scratch < max_scratch {
                    slot_of[val.index()] = Some(plan.n_scratch);
                    plan.passes[maker].spilled.push((val, plan.n_scratch));
                    plan.n_scratch += 1;
                }
                if slot_of[val.index()].is_some() {
                    reload[val.index()] = true;
                    continue;
                }
            }
            program.inst(val).for_each_operand(|v| mark.push(v));
        }
        for (val, _) in program.insts() {
            if !wanted[val.index()] {
                continue;
            }
            match slot_of[val.index()] {
                Some(slot) if reload[val.index()] => plan.passes[pass].reloaded.push((val, slot)),
                _ => {
                    made_in[val.index()].get_or_insert(pass);
                    plan.passes[pass].lane_values.push(val);
                }
            }
        }
    }
    plan
}

/// Number of reductions that must be finished before a value can be computed.
fn levels(program: &RowProgram) -> Vec<usize> {
    let mut levels = vec![0; program.body().len()];
    for (val, inst) in program.insts() {
        let mut level = 0;
        inst.for_each_operand(|v| level = level.max(levels[v.index()]));
        if matches!(inst, Inst::Reduce(..)) {
            level += 1;
        }
        levels[val.index()] = level;
    }
    levels
}

/// Row values that depend on no row: constants, loads at one place, and what follows from them.
fn invariant(program: &RowProgram) -> Vec<bool> {
    let mut invariant = vec![false; program.body().len()];
    for (val, inst) in program.insts() {
        let mut same = match inst {
            Inst::Const { .. } => true,
            Inst::LaneIndex | Inst::RowIndex(_) | Inst::Reduce(..) => false,
            Inst::Load(access) => {
                access.span() == Span::Row && access.outer.iter().all(|&stride| stride == 0)
            }
            Inst::Store(..) | Inst::Accumulate { .. } => false,
            Inst::Unary(..)
            | Inst::Binary(..)
            | Inst::Fma(..)
            | Inst::Compare(..)
            | Inst::Select(..)
            | Inst::Convert(..)
            | Inst::PowI(..) => true,
        };
        inst.for_each_operand(|v| same &= invariant[v.index()]);
        invariant[val.index()] = same;
    }
    invariant
}
