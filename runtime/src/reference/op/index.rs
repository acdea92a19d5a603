//! Ops addressed by integers: gather, scatter, pick, cross entropy and top-k.
//!
//! An index is *local* to a shard after `offset` is taken off; one outside belongs to another shard.

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::name::Dim;

use super::super::Value;
use super::super::value::{along, for_each_offset, sizes, strides_over};
use super::rows::Rows;

/// The index within `[offset, offset + size)`, from its start.
pub(super) fn local_index(index: f64, offset: usize, size: usize) -> Option<usize> {
    let local = index as i64 - offset as i64;
    usize::try_from(local).ok().filter(|local| *local < size)
}

pub(super) fn gather(dim: &Dim, offset: usize, x: &Value, idx: &Value, ty: TensorType) -> Value {
    let (size, stride) = along(x.ty(), dim);
    let mut result = Value::full(ty.clone(), 0.0);
    let mut out = result.data_mut().iter_mut();
    for_each_offset(
        &sizes(&ty),
        [
            &strides_over(x.ty(), ty.dims()),
            &strides_over(idx.ty(), ty.dims()),
        ],
        |[at_x, at_idx]| {
            if let (Some(out), Some(row)) =
                (out.next(), local_index(idx.data()[at_idx], offset, size))
            {
                *out = x.data()[at_x + row * stride];
            }
        },
    );
    result
}

pub(super) fn scatter_add(
    dim: &Dim,
    offset: usize,
    idx: &Value,
    y: &Value,
    ty: TensorType,
) -> Value {
    let (size, stride) = along(&ty, dim);
    let to_strides = strides_over(&ty, y.ty().dims());
    let mut result = Value::full(ty, 0.0);
    for_each_offset(
        &sizes(y.ty()),
        [
            &y.ty().strides(),
            &strides_over(idx.ty(), y.ty().dims()),
            &to_strides,
        ],
        |[at_y, at_idx, to]| {
            if let Some(row) = local_index(idx.data()[at_idx], offset, size) {
                result.data_mut()[to + row * stride] += y.data()[at_y];
            }
        },
    );
    result
}

pub(super) fn pick(dim: &Dim, offset: usize, x: &Value, idx: &Value, ty: TensorType) -> Value {
    gather(dim, offset, x, idx, ty)
}

pub(super) fn cross_entropy_grad(
    dim: &Dim,
    offset: usize,
    logits: &Value,
    lse: &Value,
    target: &Value,
    dloss: &Value,
) -> Value {
    let rows = Rows::of(logits.ty(), dim);
    let mut dlogits = logits.clone();
    for (row_idx, start) in rows.starts.iter().enumerate() {
        let (lse, dloss) = (lse.data()[row_idx], dloss.data()[row_idx]);
        let target = local_index(target.data()[row_idx], offset, rows.len);
        for (i, at) in rows.offsets(*start).enumerate() {
            let hit = if target == Some(i) { 1.0 } else { 0.0 };
            dlogits.data_mut()[at] = ((logits.data()[at] - lse).exp() - hit) * dloss;
        }
    }
    dlogits
}

pub(super) fn top_k(
    dim: &Dim,
    k: usize,
    x: &Value,
    values_ty: TensorType,
    indices_ty: TensorType,
) -> Vec<Value> {
    let rows = Rows::of(x.ty(), dim);
    let mut values = Value::full(values_ty, 0.0);
    let mut indices = Value::full(indices_ty, 0.0);
    for (row_idx, start) in rows.starts.iter().enumerate() {
        let row: Vec<f64> = rows.offsets(*start).map(|at| x.data()[at]).collect();
        let mut order: Vec<usize> = (0..rows.len).collect();
        // Stable: among equals the lowest index stays first.
        order.sort_by(|a, b| {
            row[*b]
                .partial_cmp(&row[*a])
                .unwrap_or(std::cmp::Ordering::Equal)
        });
        for (choice, index) in order.into_iter().take(k).enumerate() {
            values.data_mut()[row_idx * k + choice] = row[index];
            indices.data_mut()[row_idx * k + choice] = index as f64;
        }
    }
    vec![values, indices]
}

pub(super) fn top_k_grad(
    dim: &Dim,
    choice: &Dim,
    dvalues: &Value,
    indices: &Value,
    ty: TensorType,
) -> Value {
    let (size, stride) = along(&ty, dim);
    let mut dx = Value::full(ty.clone(), 0.0);
    let choices = Rows::of(dvalues.ty(), choice);
    let targets = Rows::of(&ty, dim);
    for (from, to) in choices.starts.iter().zip(&targets.starts) {
        for at in choices.offsets(*from) {
            if let Some(index) = local_index(indices.data()[at], 0, size) {
                dx.data_mut()[to + index * stride] += dvalues.data()[at];
            }
        }
    }
    dx
}
