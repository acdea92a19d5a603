//! Ops that no kernel expresses: moves of data, and routing that depends on values.
//!
//! In: an op, the types of its operands, and their addresses. Out: its results.
//! Invariant: all offsets are computed when the routine is made; a run reads indices from memory and
//! checks each before it uses it, so that no value can lead outside of a buffer.

mod moe;
pub(crate) mod moved;
#[cfg(test)]
mod tests;

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::TensorType;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::OpKind;

use crate::error::{Error, Result};
use crate::strided::{CopyLoop, CopyPlan};
use moe::Moe;

/// A routine ready to run.
#[derive(Debug, Clone)]
pub struct Routine(Kind);

#[derive(Debug, Clone)]
enum Kind {
    /// Moves from inputs into the one result.
    Copies(Vec<Move>),
    TopK(TopK),
    TopKGrad(TopKGrad),
    Moe(Moe),
}

#[derive(Debug, Clone)]
struct Move {
    input: usize,
    src: usize,
    dst: usize,
    plan: CopyPlan,
}

/// `(x) -> (values, indices)`.
#[derive(Debug, Clone)]
struct TopK {
    /// First elements of a row in x, values and indices.
    rows: Vec<[usize; 3]>,
    /// The dims that number the rows, the last one fastest.
    row_dims: Vec<(Dim, usize)>,
    size: usize,
    stride: usize,
    k: usize,
    /// Strides of the choice in values and indices.
    choice: [usize; 2],
}

/// `(dvalues, indices) -> dx`.
#[derive(Debug, Clone)]
struct TopKGrad {
    /// First elements of a row in dvalues, indices and dx.
    rows: Vec<[usize; 3]>,
    k: usize,
    choice: [usize; 2],
    size: usize,
    stride: usize,
    n_results: usize,
}

impl Routine {
    /// Prepares the op for operands of these types.
    ///
    /// # Errors
    /// `Invalid` when the types do not fit the op; `Unsupported` for ops that are no routines.
    pub fn new(op: &OpKind, inputs: &[&TensorType], results: &[&TensorType]) -> Result<Routine> {
        check_types(op, inputs, results)?;
        let kind = match (op, inputs, results) {
            (OpKind::Transpose { .. }, [x], [y]) => Kind::Copies(vec![Move {
                input: 0,
                src: 0,
                dst: 0,
                plan: copy(y, x, y)?,
            }]),
            (OpKind::Slice { dim, start, .. }, [x], [y]) => {
                let src = start * stride(x, dim)?;
                Kind::Copies(vec![Move {
                    input: 0,
                    src,
                    dst: 0,
                    plan: copy(y, x, y)?,
                }])
            }
            (OpKind::Concat { dim }, parts, [y]) => {
                let mut moves = Vec::new();
                let mut start = 0;
                for (input, part) in parts.iter().enumerate() {
                    let dst = start * stride(y, dim)?;
                    moves.push(Move {
                        input,
                        src: 0,
                        dst,
                        plan: copy(part, part, y)?,
                    });
                    start += size(part, dim)?;
                }
                Kind::Copies(moves)
            }
            (OpKind::TopK { dim, choice, k }, [x], [values, indices]) => {
                let rows: Vec<(Dim, usize)> = without(x, &[dim]);
                Kind::TopK(TopK {
                    rows: offsets(&rows, [x, values, indices]),
                    row_dims: rows,
                    size: size(x, dim)?,
                    stride: stride(x, dim)?,
                    k: *k,
                    choice: [stride(values, choice)?, stride(indices, choice)?],
                })
            }
            (
                OpKind::TopKGrad {
                    dim,
                    choice,
                    size: n,
                },
                [dvalues, indices],
                [dx],
            ) => {
                let rows: Vec<(Dim, usize)> = without(dvalues, &[choice]);
                Kind::TopKGrad(TopKGrad {
                    rows: offsets(&rows, [dvalues, indices, dx]),
                    k: size(dvalues, choice)?,
                    choice: [stride(dvalues, choice)?, stride(indices, choice)?],
                    size: *n,
                    stride: stride(dx, dim)?,
                    n_results: dx.n_elements(),
                })
            }
            (
                OpKind::MoeSlots { .. }
                | OpKind::MoePlaces(_)
                | OpKind::MoeDispatch(_)
                | OpKind::MoeCombine(_)
                | OpKind::MoeGateGrad(_)
                | OpKind::MoeCounts(_),
                ..,
            ) => Kind::Moe(Moe::new(op, inputs, results)?),
            _ => {
                return Err(Error::Unsupported(format!(
                    "the host has no routine for {} of {} inputs",
                    op.name(),
                    inputs.len()
                )));
            }
        };
        Ok(Routine(kind))
    }

    /// The same, leaving the slots that no token takes as they are instead of writing zeros.
    #[must_use]
    pub fn leaving_rest(self) -> Routine {
        match self.0 {
            Kind::Moe(moe) => Routine(Kind::Moe(moe.leaving_rest())),
            other => Routine(other),
        }
    }

    /// Rows that may be run by ranges, for routines that have some.
    pub fn n_rows(&self) -> Option<usize> {
        match &self.0 {
            Kind::TopK(top_k) => Some(top_k.rows.len()),
            _ => None,
        }
    }

    /// Runs some of the rows on raw memory; those of a routine without rows all at once.
    ///
    /// # Errors
    /// As for [`Self::run`].
    ///
    /// # Safety
    /// As for [`Self::run`].
    pub unsafe fn run_rows(
        &self,
        inputs: &[*const u32],
        results: &[*mut u32],
        (first, end): (usize, usize),
    ) -> Result<()> {
        // SAFETY: as for this function.
        unsafe {
            match &self.0 {
                Kind::TopK(top_k) => {
                    let rows = first.min(end)..end.min(top_k.rows.len());
                    top_k.run(inputs[0].cast(), results[0].cast(), results[1].cast(), rows)
                }
                _ => self.run(inputs, results),
            }
        }
    }

    /// Runs on raw memory.
    ///
    /// # Errors
    /// `Invalid` when the greatest of values that are no numbers are asked for, with their place.
    ///
    /// # Safety
    /// The addresses are those of tensors of the planned types, in the op's order; inputs are valid
    /// for reads, results for writes, and results overlap neither inputs nor each other.
    pub unsafe fn run(&self, inputs: &[*const u32], results: &[*mut u32]) -> Result<()> {
        // SAFETY: as for this function; offsets were computed from the types.
        unsafe {
            match &self.0 {
                Kind::Copies(moves) => {
                    for part in moves {
                        part.plan
                            .run(inputs[part.input].add(part.src), results[0].add(part.dst));
                    }
                }
                Kind::TopK(top_k) => {
                    let rows = 0..top_k.rows.len();
                    top_k.run(inputs[0].cast(), results[0].cast(), results[1].cast(), rows)?;
                }
                Kind::TopKGrad(grad) => {
                    grad.run(inputs[0].cast(), inputs[1].cast(), results[0].cast());
                }
                Kind::Moe(moe) => moe.run(inputs, results),
            }
        }
        Ok(())
    }
}

impl TopK {
    /// # Safety
    /// As for [`Routine::run`].
    unsafe fn run(
        &self,
        x: *const f32,
        values: *mut f32,
        indices: *mut i32,
        rows: std::ops::Range<usize>,
    ) -> Result<()> {
        let mut row_values = vec![0.0f32; self.size];
        for row in rows {
            let [at_x, at_values, at_indices] = &self.rows[row];
            for (i, value) in row_values.iter_mut().enumerate() {
                // SAFETY: an element of the row.
                *value = unsafe { *x.add(at_x + i * self.stride) };
            }
            if let Some(at) = row_values.iter().position(|value| value.is_nan()) {
                return Err(self.not_a_number(row, at));
            }
            let mut taken = vec![false; self.size];
            for choice in 0..self.k {
                let mut best: Option<usize> = None;
                for (i, value) in row_values.iter().enumerate() {
                    // Only a strictly greater value displaces: among equals the lowest index stays.
                    if !taken[i] && best.is_none_or(|best| *value > row_values[best]) {
                        best = Some(i);
                    }
                }
                let Some(best) = best else { break };
                taken[best] = true;
                // SAFETY: `choice` is below k, which the types confirm.
                unsafe {
                    *values.add(at_values + choice * self.choice[0]) = row_values[best];
                    *indices.add(at_indices + choice * self.choice[1]) = best as i32;
                }
            }
        }
        Ok(())
    }

    fn not_a_number(&self, row: usize, at: usize) -> Error {
        let mut rest = row;
        let mut place: Vec<String> = self
            .row_dims
            .iter()
            .rev()
            .map(|(dim, size)| {
                let index = rest % size;
                rest /= size;
                format!("{dim} {index}")
            })
            .collect();
        place.reverse();
        Error::Invalid(format!(
            "the {} greatest of {} scores are to be chosen, and score {at} at {} is not a number: the weights or inputs before it have overflowed; lower the learning rate, or resume from an earlier checkpoint",
            self.k,
            self.size,
            place.join(", ")
        ))
    }
}

impl TopKGrad {
    /// # Safety
    /// As for [`Routine::run`].
    unsafe fn run(&self, dvalues: *const f32, indices: *const i32, dx: *mut f32) {
        // SAFETY: dx holds that many elements; the rest are elements of rows, the index being checked.
        unsafe {
            std::slice::from_raw_parts_mut(dx, self.n_results).fill(0.0);
            for [at_dvalues, at_indices, at_dx] in &self.rows {
                for choice in 0..self.k {
                    let index = *indices.add(at_indices + choice * self.choice[1]);
                    if let Some(index) = local_index(index, 0, self.size) {
                        *dx.add(at_dx + index * self.stride) +=
                            *dvalues.add(at_dvalues + choice * self.choice[0]);
                    }
                }
            }
        }
    }
}

/// The index within `[offset, offset + size)`, from its start.
fn local_index(index: i32, offset: usize, size: usize) -> Option<usize> {
    let local = i64::from(index) - offset as i64;
    usize::try_from(local).ok().filter(|local| *local < size)
}

/// The op's own shape rule must give the results.
fn check_types(op: &OpKind, inputs: &[&TensorType], results: &[&TensorType]) -> Result<()> {
    let inferred = op
        .infer(inputs)
        .map_err(|error| Error::Invalid(format!("damaged program: {error}; compile again")))?;
    let agree = inferred.len() == results.len()
        && inferred.iter().zip(results).all(|(a, b)| {
            a.dtype == b.dtype
                && a.shape.len() == b.shape.len()
                && a.shape
                    .iter()
                    .all(|(dim, size)| b.size_of(dim) == Some(*size))
        });
    let held = inputs
        .iter()
        .chain(results)
        .all(|ty| matches!(ty.dtype, DType::F32 | DType::I32));
    if agree && held {
        return Ok(());
    }
    let list = |types: &[&TensorType]| {
        types
            .iter()
            .map(|ty| ty.to_string())
            .collect::<Vec<_>>()
            .join(", ")
    };
    Err(Error::Invalid(format!(
        "damaged program: {} of ({}) does not give ({}); compile again",
        op.name(),
        list(inputs),
        list(results)
    )))
}

/// A copy over the dims of `shape` from one type's places to another's.
fn copy(shape: &TensorType, src: &TensorType, dst: &TensorType) -> Result<CopyPlan> {
    let loops = shape.shape.iter().map(|(dim, size)| {
        Ok(CopyLoop {
            size: *size,
            src: stride(src, dim)?,
            dst: stride(dst, dim)?,
        })
    });
    Ok(CopyPlan::new(&loops.collect::<Result<Vec<_>>>()?))
}

fn stride(ty: &TensorType, dim: &Dim) -> Result<usize> {
    let position = ty.position(dim).ok_or_else(|| lacks(ty, dim))?;
    Ok(ty.strides()[position])
}

fn size(ty: &TensorType, dim: &Dim) -> Result<usize> {
    ty.size_of(dim).ok_or_else(|| lacks(ty, dim))
}

fn lacks(ty: &TensorType, dim: &Dim) -> Error {
    Error::Invalid(format!(
        "damaged program: {ty} lacks `{dim}`; compile again"
    ))
}

fn without(ty: &TensorType, left_out: &[&Dim]) -> Vec<(Dim, usize)> {
    let kept = ty.shape.iter().filter(|(dim, _)| !left_out.contains(&dim));
    kept.cloned().collect()
}

/// Offsets in each type of every combination of indices of `dims`, the last dim fastest; a dim that a
/// type lacks does not move it.
fn offsets<const N: usize>(dims: &[(Dim, usize)], types: [&TensorType; N]) -> Vec<[usize; N]> {
    let mut all = vec![[0; N]];
    for (dim, size) in dims {
        let strides = types.map(|ty| {
            ty.position(dim)
                .map_or(0, |position| ty.strides()[position])
        });
        all = all
            .iter()
            .flat_map(|base| {
                (0..*size).map(move |i| std::array::from_fn(|t| base[t] + i * strides[t]))
            })
            .collect();
    }
    all
}
