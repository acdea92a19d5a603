//! Attention and its gradient, one query row at a time.
//!
//! Source: Vaswani et al., arXiv 1706.03762, equation 1; the gradient from lse as in
//! FlashAttention-2 (arXiv 2307.08691, algorithm 2).

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::op::AttentionDims;

use super::super::Value;
use super::super::value::{along, for_each_offset, sizes, strides_over};

/// A query row: offsets of its first element in each operand.
struct Row {
    q: usize,
    k: usize,
    v: usize,
    o: usize,
    /// Keys that it sees.
    n_keys: usize,
}

/// The query rows in the order of `lse`. The head dims are innermost everywhere (the shape rule).
fn rows(
    dims: &AttentionDims,
    q: &TensorType,
    k: &TensorType,
    v: &TensorType,
    seen: Option<&Value>,
) -> Vec<Row> {
    let rows_ty = TensorType::new(
        q.dtype,
        q.shape.iter().filter(|(dim, _)| *dim != dims.head).cloned(),
    );
    let n_values = along(v, &dims.value).0;
    let n_keys = along(k, &dims.kv_seq).0;
    let (n_seq, seq_stride) = along(&rows_ty, &dims.seq);
    let mut rows = Vec::with_capacity(rows_ty.n_elements());
    for_each_offset(
        &sizes(&rows_ty),
        [
            &rows_ty.strides(),
            &strides_over(q, rows_ty.dims()),
            &strides_over(k, rows_ty.dims()),
            &strides_over(v, rows_ty.dims()),
            &seen.map_or(vec![0; rows_ty.shape.len()], |seen| {
                strides_over(seen.ty(), rows_ty.dims())
            }),
        ],
        |[row_idx, q, k, v, at_seen]| {
            let position = row_idx / seq_stride % n_seq + dims.offset;
            rows.push(Row {
                q,
                k,
                v,
                o: row_idx * n_values,
                n_keys: if let Some(seen) = seen {
                    n_keys.min(seen.data()[at_seen] as usize)
                } else if dims.causal {
                    n_keys.min(position + 1)
                } else {
                    n_keys
                },
            });
        },
    );
    rows
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add_scaled(to: &mut [f64], factor: f64, from: &[f64]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += factor * from;
    }
}

pub(super) fn attention(
    dims: &AttentionDims,
    [q, k, v]: [&Value; 3],
    seen: Option<&Value>,
    [o_ty, lse_ty]: [TensorType; 2],
) -> Vec<Value> {
    let (width, _) = along(q.ty(), &dims.head);
    let (n_values, _) = along(v.ty(), &dims.value);
    let (_, k_stride) = along(k.ty(), &dims.kv_seq);
    let (_, v_stride) = along(v.ty(), &dims.kv_seq);
    let mut o = Value::full(o_ty, 0.0);
    let mut lse = Value::full(lse_ty, 0.0);
    let rows = rows(dims, q.ty(), k.ty(), v.ty(), seen);
    for (row_idx, row) in rows.iter().enumerate() {
        if row.n_keys == 0 {
            continue;
        }
        let query = &q.data()[row.q..][..width];
        let scores: Vec<f64> = (0..row.n_keys)
            .map(|key| dims.scale.0 * dot(query, &k.data()[row.k + key * k_stride..][..width]))
            .collect();
        let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|score| (score - greatest).exp()).sum();
        let row_lse = greatest + sum.ln();
        lse.data_mut()[row_idx] = row_lse;
        let out = &mut o.data_mut()[row.o..][..n_values];
        for (key, score) in scores.iter().enumerate() {
            let value = &v.data()[row.v + key * v_stride..][..n_values];
            add_scaled(out, (score - row_lse).exp(), value);
        }
    }
    vec![o, lse]
}

/// Inputs `(q, k, v, o, lse, do)`, results `(dq, dk, dv)`.
pub(super) fn attention_grad(
    dims: &AttentionDims,
    [q, k, v, o, lse, do_]: [&Value; 6],
) -> Vec<Value> {
    let (width, _) = along(q.ty(), &dims.head);
    let (n_values, _) = along(v.ty(), &dims.value);
    let (_, k_stride) = along(k.ty(), &dims.kv_seq);
    let (_, v_stride) = along(v.ty(), &dims.kv_seq);
    let mut dq = Value::full(q.ty().clone(), 0.0);
    let mut dk = Value::full(k.ty().clone(), 0.0);
    let mut dv = Value::full(v.ty().clone(), 0.0);
    let rows = rows(dims, q.ty(), k.ty(), v.ty(), None);
    for (row_idx, row) in rows.iter().enumerate() {
        let query = &q.data()[row.q..][..width];
        let dout = &do_.data()[row.o..][..n_values];
        let projection = dot(dout, &o.data()[row.o..][..n_values]);
        for key in 0..row.n_keys {
            let (at_k, at_v) = (row.k + key * k_stride, row.v + key * v_stride);
            let key_row = &k.data()[at_k..][..width];
            let score = dims.scale.0 * dot(query, key_row);
            let probability = (score - lse.data()[row_idx]).exp();
            let dprobability = dot(dout, &v.data()[at_v..][..n_values]);
            let dscore = probability * (dprobability - projection) * dims.scale.0;
            add_scaled(&mut dq.data_mut()[row.q..][..width], dscore, key_row);
            add_scaled(&mut dk.data_mut()[at_k..][..width], dscore, query);
            add_scaled(&mut dv.data_mut()[at_v..][..n_values], probability, dout);
        }
    }
    vec![dq, dk, dv]
}
