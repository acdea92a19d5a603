//! Norms, softmax and rotary embedding: ops on the rows of a tensor along one dim.
//!
//! Rows are numbered in the row-major order of the tensor without that dim, which is the memory
//! order of the statistics (`rstd`, `mean`).

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::name::Dim;

use super::super::Value;
use super::super::value::{along, for_each_offset, strides_over};

/// The rows of a tensor along a dim.
pub(super) struct Rows {
    /// Offset of the first element of each row.
    pub starts: Vec<usize>,
    /// Elements of a row.
    pub len: usize,
    /// From one element of a row to the next.
    pub stride: usize,
}

impl Rows {
    pub fn of(ty: &TensorType, dim: &Dim) -> Self {
        let (len, stride) = along(ty, dim);
        let others: Vec<&(Dim, usize)> = ty.shape.iter().filter(|(name, _)| name != dim).collect();
        let sizes: Vec<usize> = others.iter().map(|(_, size)| *size).collect();
        let strides = strides_over(ty, others.iter().map(|(name, _)| name));
        let mut starts = Vec::new();
        for_each_offset(&sizes, [&strides], |[start]| starts.push(start));
        Self {
            starts,
            len,
            stride,
        }
    }

    /// The offsets of the elements of a row that starts at `start`.
    pub fn offsets(&self, start: usize) -> impl Iterator<Item = usize> + Clone + use<> {
        let stride = self.stride;
        (0..self.len).map(move |i| start + i * stride)
    }
}

/// The type of the statistics of rows along `dim`.
fn statistics(ty: &TensorType, dim: &Dim) -> TensorType {
    let shape = ty.shape.iter().filter(|(name, _)| name != dim);
    TensorType::new(ty.dtype, shape.cloned())
}

/// Source: Zhang and Sennrich, arXiv 1910.07467, equation 4, with eps under the root.
pub(super) fn rms_norm(dim: &Dim, eps: f64, x: &Value, weight: &Value) -> Vec<Value> {
    let rows = Rows::of(x.ty(), dim);
    let mut y = x.clone();
    let mut rstd = Value::full(statistics(x.ty(), dim), 0.0);
    for (row_idx, start) in rows.starts.iter().enumerate() {
        let squares: f64 = rows.offsets(*start).map(|at| x.data()[at].powi(2)).sum();
        let scale = 1.0 / (squares / rows.len as f64 + eps).sqrt();
        rstd.data_mut()[row_idx] = scale;
        for (at, weight) in rows.offsets(*start).zip(weight.data()) {
            y.data_mut()[at] = x.data()[at] * scale * weight;
        }
    }
    vec![y, rstd]
}

pub(super) fn rms_norm_grad(
    dim: &Dim,
    x: &Value,
    weight: &Value,
    rstd: &Value,
    dy: &Value,
) -> Vec<Value> {
    let rows = Rows::of(x.ty(), dim);
    let mut dx = x.clone();
    let mut dweight = Value::full(weight.ty().clone(), 0.0);
    for (start, rstd) in rows.starts.iter().zip(rstd.data()) {
        let mut projection = 0.0;
        for (i, at) in rows.offsets(*start).enumerate() {
            projection += dy.data()[at] * weight.data()[i] * x.data()[at];
            dweight.data_mut()[i] += dy.data()[at] * x.data()[at] * rstd;
        }
        let mean = projection * rstd * rstd / rows.len as f64;
        for (i, at) in rows.offsets(*start).enumerate() {
            dx.data_mut()[at] = rstd * (dy.data()[at] * weight.data()[i] - x.data()[at] * mean);
        }
    }
    vec![dx, dweight]
}

/// Source: Ba, Kiros and Hinton, arXiv 1607.06450, equation 4, with eps under the root.
pub(super) fn layer_norm(
    dim: &Dim,
    eps: f64,
    x: &Value,
    weight: &Value,
    bias: &Value,
) -> Vec<Value> {
    let rows = Rows::of(x.ty(), dim);
    let n = rows.len as f64;
    let mut y = x.clone();
    let mut mean = Value::full(statistics(x.ty(), dim), 0.0);
    let mut rstd = mean.clone();
    for (row_idx, start) in rows.starts.iter().enumerate() {
        let average = rows.offsets(*start).map(|at| x.data()[at]).sum::<f64>() / n;
        let centered = |at: usize| x.data()[at] - average;
        let variance = rows
            .offsets(*start)
            .map(|at| centered(at).powi(2))
            .sum::<f64>()
            / n;
        let scale = 1.0 / (variance + eps).sqrt();
        mean.data_mut()[row_idx] = average;
        rstd.data_mut()[row_idx] = scale;
        for (i, at) in rows.offsets(*start).enumerate() {
            y.data_mut()[at] = centered(at) * scale * weight.data()[i] + bias.data()[i];
        }
    }
    vec![y, mean, rstd]
}

pub(super) fn layer_norm_grad(
    dim: &Dim,
    x: &Value,
    weight: &Value,
    mean: &Value,
    rstd: &Value,
    dy: &Value,
) -> Vec<Value> {
    let rows = Rows::of(x.ty(), dim);
    let n = rows.len as f64;
    let mut dx = x.clone();
    let mut dweight = Value::full(weight.ty().clone(), 0.0);
    let mut dbias = dweight.clone();
    for (row_idx, start) in rows.starts.iter().enumerate() {
        let (mean, rstd) = (mean.data()[row_idx], rstd.data()[row_idx]);
        let normal = |at: usize| (x.data()[at] - mean) * rstd;
        let mut sum = 0.0;
        let mut projection = 0.0;
        for (i, at) in rows.offsets(*start).enumerate() {
            let dnormal = dy.data()[at] * weight.data()[i];
            sum += dnormal;
            projection += dnormal * normal(at);
            dweight.data_mut()[i] += dy.data()[at] * normal(at);
            dbias.data_mut()[i] += dy.data()[at];
        }
        for (i, at) in rows.offsets(*start).enumerate() {
            let dnormal = dy.data()[at] * weight.data()[i];
            dx.data_mut()[at] = rstd * (dnormal - sum / n - normal(at) * projection / n);
        }
    }
    vec![dx, dweight, dbias]
}

pub(super) fn softmax(dim: &Dim, x: &Value) -> Value {
    let rows = Rows::of(x.ty(), dim);
    let mut y = x.clone();
    for start in &rows.starts {
        let greatest = rows
            .offsets(*start)
            .map(|at| x.data()[at])
            .fold(f64::NEG_INFINITY, f64::max);
        let mut sum = 0.0;
        for at in rows.offsets(*start) {
            y.data_mut()[at] = (x.data()[at] - greatest).exp();
            sum += y.data()[at];
        }
        for at in rows.offsets(*start) {
            y.data_mut()[at] /= sum;
        }
    }
    y
}

pub(super) fn softmax_grad(dim: &Dim, y: &Value, dy: &Value) -> Value {
    let rows = Rows::of(y.ty(), dim);
    let mut dx = y.clone();
    for start in &rows.starts {
        let projection: f64 = rows
            .offsets(*start)
            .map(|at| y.data()[at] * dy.data()[at])
            .sum();
        for at in rows.offsets(*start) {
            dx.data_mut()[at] = y.data()[at] * (dy.data()[at] - projection);
        }
    }
    dx
}

/// Source: Su et al., arXiv 2104.09864, equation 34, with halves in place of pairs (GPT-NeoX form).
pub(super) fn rope(dim: &Dim, sign: f64, x: &Value, cos: &Value, sin: &Value) -> Value {
    let half = along(x.ty(), dim).0 / 2;
    let others: Vec<&(Dim, usize)> = x
        .ty()
        .shape
        .iter()
        .filter(|(name, _)| name != dim)
        .collect();
    let sizes: Vec<usize> = others.iter().map(|(_, size)| *size).collect();
    let names = || others.iter().map(|(name, _)| name);
    let stride = along(x.ty(), dim).1;
    // The half dim of the tables is their innermost: its stride is 1.
    let mut y = x.clone();
    for_each_offset(
        &sizes,
        [
            &strides_over(x.ty(), names()),
            &strides_over(cos.ty(), names()),
        ],
        |[row, table]| {
            for i in 0..half {
                let (at1, at2) = (row + i * stride, row + (half + i) * stride);
                let (x1, x2) = (x.data()[at1], x.data()[at2]);
                let (cos, sin) = (cos.data()[table + i], sign * sin.data()[table + i]);
                y.data_mut()[at1] = x1 * cos - x2 * sin;
                y.data_mut()[at2] = x2 * cos + x1 * sin;
            }
        },
    );
    y
}
