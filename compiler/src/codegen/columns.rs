//! Sums over rows apart from the rest of a kernel, for GPUs.
//!
//! Enters: a [`RowProgram`]. Leaves: what it accumulates lane by lane over all rows as a program of its
//! own, which threads can walk column by column, and the rest, whose rows are then often free of one
//! another.
//! Invariant: the two together do what the program does, the sums first: the rest may rewrite in place
//! what both read.

use super::kernel::{Access, Inst, RowProgram, Val};

/// A program's sums by column, and what is left of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// Accumulations alone: each has one element a lane, which all rows share.
    pub columns: Option<RowProgram>,
    pub rest: Option<RowProgram>,
}

/// Takes the sums by column out of `program`. Complexity: instructions.
pub fn split(program: &RowProgram) -> Split {
    let is_column = columns(program);
    let part = |wanted: bool| {
        let has_any = program
            .insts()
            .any(|(val, inst)| inst.is_effect() && is_column[val.index()] == wanted);
        has_any.then(|| program.with_effects(|val| is_column[val.index()] == wanted))
    };
    Split {
        columns: part(true),
        rest: part(false),
    }
}

/// Which instructions are accumulations whose element depends on the lane alone, of values that no
/// reduction over lanes leads to.
fn columns(program: &RowProgram) -> Vec<bool> {
    let mut is_column = vec![false; program.body().len()];
    if program.limit().is_some() || program.n_rows() == 1 {
        return is_column;
    }
    let mut is_reduced = vec![false; program.body().len()];
    for (val, inst) in program.insts() {
        let mut after = matches!(inst, Inst::Reduce(..));
        inst.for_each_operand(|operand| after |= is_reduced[operand.index()]);
        is_reduced[val.index()] = after;
        if let Inst::Accumulate { access, .. } = inst {
            is_column[val.index()] = !after && is_by_lane(program, access);
        }
    }
    is_column
}

fn is_by_lane(program: &RowProgram, access: &Access) -> bool {
    let mut dims = access.outer.iter().zip(program.rows());
    access.lane != 0
        && access.indexed.is_none()
        && dims.all(|(stride, size)| *stride == 0 || *size == 1)
}

/// The accumulations of a program of columns.
pub fn sums(program: &RowProgram) -> impl Iterator<Item = Val> {
    let all = program.insts();
    all.filter_map(|(val, inst)| matches!(inst, Inst::Accumulate { .. }).then_some(val))
}
