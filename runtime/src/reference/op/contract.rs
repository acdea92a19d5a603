//! The einsum of two tensors.
//!
//! The operands are laid out as `[batch, m, k]` and `[batch, k, n]` (dims that only one operand has
//! and the result lacks are summed on the way), multiplied, and laid out as the result.
//! Invariant: `unsafe` is confined to the product of two contiguous matrices.

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::name::Dim;

use super::super::Value;
use super::super::value::{for_each_offset, sizes, strides_over};

type Shape = Vec<(Dim, usize)>;

pub(super) fn contract(a: &Value, b: &Value, ty: TensorType) -> Value {
    let pick = |of: &TensorType, wanted: &dyn Fn(&Dim) -> bool| -> Shape {
        of.shape
            .iter()
            .filter(|(dim, _)| wanted(dim))
            .cloned()
            .collect()
    };
    let batch = pick(&ty, &|dim| a.ty().has(dim) && b.ty().has(dim));
    let rows = pick(&ty, &|dim| a.ty().has(dim) && !b.ty().has(dim));
    let columns = pick(&ty, &|dim| !a.ty().has(dim) && b.ty().has(dim));
    let summed = pick(a.ty(), &|dim| b.ty().has(dim) && !ty.has(dim));
    let count = |shape: &Shape| shape.iter().map(|(_, size)| size).product::<usize>();
    let (n_batch, m, n, k) = (count(&batch), count(&rows), count(&columns), count(&summed));

    let left = laid_out(a, [&batch, &rows, &summed]);
    let right = laid_out(b, [&batch, &summed, &columns]);
    let mut product = vec![0.0; n_batch * m * n];
    for batch_idx in 0..n_batch {
        multiply(
            [m, n, k],
            &left[batch_idx * m * k..][..m * k],
            &right[batch_idx * k * n..][..k * n],
            &mut product[batch_idx * m * n..][..m * n],
        );
    }

    let product_ty = TensorType::new(ty.dtype, [batch, rows, columns].concat());
    let mut offsets = Vec::with_capacity(product.len());
    for_each_offset(
        &sizes(&ty),
        [&strides_over(&product_ty, ty.dims())],
        |[offset]| offsets.push(offset),
    );
    Value::from_fn(ty, |i| product[offsets[i]])
}

/// The elements of x over the given dims in this order, summed over all others.
fn laid_out(x: &Value, parts: [&Shape; 3]) -> Vec<f64> {
    let shape: Shape = parts.into_iter().flatten().cloned().collect();
    let target = TensorType::new(x.ty().dtype, shape);
    let mut data = vec![0.0; target.n_elements()];
    for_each_offset(
        &sizes(x.ty()),
        [&x.ty().strides(), &strides_over(&target, x.ty().dims())],
        |[from, to]| data[to] += x.data()[from],
    );
    data
}

/// out[m, n] = a[m, k] · b[k, n], all contiguous and row-major.
fn multiply([m, n, k]: [usize; 3], a: &[f64], b: &[f64], out: &mut [f64]) {
    assert_eq!(
        (a.len(), b.len(), out.len()),
        (m * k, k * n, m * n),
        "matrices of other sizes than announced"
    );
    // SAFETY: the three slices hold exactly the m·k, k·n and m·n elements that the row strides k, n
    // and n and the column stride 1 address (checked above), and `out` is borrowed exclusively.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.as_ptr(),
            1,
            k as isize,
            b.as_ptr(),
            1,
            n as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
