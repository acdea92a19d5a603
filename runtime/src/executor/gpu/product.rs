//! A contraction as products of the device's library.
//!
//! In: the indices of a contraction. Out: one batch of products, run at several places of the operands;
//! or nothing, where the generated kernel serves better.
//! Invariant: the products together are the contraction, each element of `c` summed in one product.

use meshweave_dsl::dtype::DType;
use meshweave_dsl::program::{Bias, ContractIndex};

use crate::contract::{ContractOptions, ContractPlan};
use crate::device::gpu::{Address, Matrix, Product, Side};
use crate::error::Result;

/// More calls than this cost more than they gain.
const MAX_CALLS: usize = 16;

/// Libraries know no faster way for addresses that are multiples of more, in bytes.
const MAX_ALIGNMENT: u64 = 256;

/// A contraction as calls of one product.
#[derive(Debug, PartialEq)]
pub(super) struct Calls {
    pub(super) product: Product,
    /// For each call the first elements of a, b and c.
    pub(super) offsets: Vec<[usize; 3]>,
}

/// What a contraction adds to its product.
#[derive(Clone, Copy, Default)]
pub(super) struct Added<'a> {
    /// What the result holds.
    pub(super) onto: bool,
    /// A vector of the result's type, and where it is.
    pub(super) bias: Option<(&'a Bias, Address)>,
}

/// The products of a contraction of operands at these addresses and of these types; `None` where there
/// would be too many, or of strides or types that no library takes.
///
/// # Errors
/// `Invalid` when the contraction is damaged.
pub(super) fn products(
    indices: &[ContractIndex],
    added: Added<'_>,
    operands: [(Address, DType); 3],
) -> Result<Option<Calls>> {
    let [(_, factors), (_, b_dtype), (_, result)] = operands;
    if factors != b_dtype || !factors.is_float() || !result.is_float() {
        return Ok(None);
    }
    let options = ContractOptions {
        accumulate: added.onto,
        ..ContractOptions::default()
    };
    let plan = ContractPlan::new(indices, options)?;
    let [m, n, k] = plan.product_indices();
    let bias = match added.bias {
        Some((bias, _)) => match side_of(bias, indices, [m, n]) {
            Some(side) => Some(side),
            None => return Ok(None),
        },
        None => None,
    };
    let (outer, depth) = plan.loops();
    // A loop over sums would need the calls to follow one another with another factor for `c`.
    if !depth.is_empty() {
        return Ok(None);
    }
    let batch = outer.iter().max_by_key(|index| index.size).copied();
    let batch = batch.unwrap_or(ContractIndex {
        size: 1,
        a: 0,
        b: 0,
        c: 0,
    });
    let mut rest = outer.to_vec();
    if let Some(position) = rest.iter().position(|index| *index == batch) {
        rest.remove(position);
    }
    let n_calls: usize = rest.iter().map(|index| index.size).product();
    if n_calls > MAX_CALLS {
        return Ok(None);
    }
    let matrix = |row: usize, column: usize, batch: usize| Matrix { row, column, batch };
    let mut product = Product {
        m: m.size,
        n: n.size,
        k: k.size,
        n_batch: batch.size,
        a: matrix(m.a, k.a, batch.a),
        b: matrix(k.b, n.b, batch.b),
        c: matrix(m.c, n.c, batch.c),
        factors,
        result,
        accumulate: added.onto,
        bias,
        alignment: 1,
    };
    let dense = |matrix: Matrix, n_rows: usize, n_columns: usize| {
        (matrix.row == 1 || n_rows == 1) || (matrix.column == 1 || n_columns == 1)
    };
    let Product {
        m, n, k, a, b, c, ..
    } = product;
    if !(dense(a, m, k) && dense(b, k, n) && dense(c, m, n)) {
        return Ok(None);
    }
    let mut offsets = vec![[0; 3]];
    for index in &rest {
        offsets = offsets
            .iter()
            .flat_map(|[a, b, c]| {
                (0..index.size).map(move |i| [a + i * index.a, b + i * index.b, c + i * index.c])
            })
            .collect();
    }
    let starts = offsets
        .iter()
        .flat_map(|offsets| [0, 1, 2].map(|i| place(operands[i], offsets[i])));
    let batches = [product.a, product.b, product.c].map(|matrix| matrix.batch);
    let strides = [0, 1, 2].map(|i| place((0, operands[i].1), batches[i]));
    let bits = starts
        .chain(strides)
        .chain(added.bias.map(|(_, address)| address))
        .fold(MAX_ALIGNMENT, |bits, n| bits | n);
    product.alignment = 1 << bits.trailing_zeros();
    Ok(Some(Calls { product, offsets }))
}

/// The side of a product of these rows and columns that a bias lies along as the result does.
fn side_of(
    bias: &Bias,
    indices: &[ContractIndex],
    [rows, columns]: [ContractIndex; 2],
) -> Option<Side> {
    let Bias { strides, .. } = bias;
    let along = indices.iter().zip(strides);
    let along = along.filter(|(index, stride)| **stride > 0 && index.size > 1);
    let n_elements: usize = along.clone().map(|(index, _)| index.size).product();
    let is_along = |side: ContractIndex| {
        let mut along = along.clone();
        n_elements == side.size && along.all(|(index, stride)| stride * side.c == index.c)
    };
    match (is_along(rows), is_along(columns)) {
        (true, false) => Some(Side::Rows),
        (false, true) => Some(Side::Columns),
        _ => None,
    }
}

/// The address of an element of an operand.
pub(super) fn place((address, dtype): (Address, DType), element: usize) -> Address {
    address + (dtype.n_bytes() * element) as u64
}

#[cfg(test)]
mod tests {
    use meshweave_dsl::program::BufferId;
    use proptest::prelude::*;

    use super::*;
    use crate::contract::bias::Spread;

    /// The products, element by element.
    fn run(calls: &Calls, [a, b, bias]: [&[f32]; 3], c: &mut [f32]) {
        let p = &calls.product;
        let at = |m: Matrix, batch, row, column| m.batch * batch + m.row * row + m.column * column;
        for [a0, b0, c0] in &calls.offsets {
            for l in 0..p.n_batch {
                for (i, j) in (0..p.m).flat_map(|i| (0..p.n).map(move |j| (i, j))) {
                    let terms =
                        (0..p.k).map(|x| a[a0 + at(p.a, l, i, x)] * b[b0 + at(p.b, l, x, j)]);
                    let added = match p.bias {
                        Some(Side::Rows) => bias[i],
                        Some(Side::Columns) => bias[j],
                        None => 0.0,
                    };
                    c[c0 + at(p.c, l, i, j)] = terms.sum::<f32>() + added;
                }
            }
        }
    }

    proptest! {
        #[test]
        fn products_are_the_contraction(
            sizes in proptest::array::uniform4(1usize..5),
            roles in proptest::array::uniform4(0usize..4),
            order in any::<[bool; 3]>(),
            side in proptest::option::of(1usize..3),
        ) {
            // Dense operands over the dims that each role gives them, first or last dim fastest.
            let uses = |operand: usize, role: usize| match operand {
                0 => role != 2,
                1 => role != 1,
                _ => role != 3,
            };
            let mut indices: Vec<ContractIndex> =
                sizes.iter().map(|size| ContractIndex { size: *size, a: 0, b: 0, c: 0 }).collect();
            let mut spans = [1usize; 3];
            for operand in 0..3 {
                let mut dims: Vec<usize> = (0..4).filter(|dim| uses(operand, roles[*dim])).collect();
                if order[operand] {
                    dims.reverse();
                }
                for dim in dims {
                    let index = &mut indices[dim];
                    *[&mut index.a, &mut index.b, &mut index.c][operand] = spans[operand];
                    spans[operand] *= sizes[dim];
                }
            }
            // A bias along all rows or all columns, in the result's order.
            let bias = side.map(|side| {
                let mut strides: Vec<usize> = (0..4)
                    .map(|dim| if roles[dim] == side { indices[dim].c } else { 0 })
                    .collect();
                let mut along: Vec<usize> = (0..4).filter(|dim| roles[*dim] == side).collect();
                along.sort_by_key(|dim| strides[*dim]);
                let mut span = 1;
                for dim in along {
                    strides[dim] = span;
                    span *= sizes[dim];
                }
                Bias { buffer: BufferId(3), strides }
            });
            let values = |n: usize| (0..n).map(|i| (i % 7) as f32 - 3.0).collect::<Vec<_>>();
            let (a, b) = (values(spans[0]), values(spans[1]));
            let bias_values = values(256);
            let mut expected = vec![0.0; spans[2]];
            if let Some(bias) = &bias {
                let spread = Spread::new(bias, &indices, false);
                // SAFETY: the bias spans less than 256 elements, the result is whole.
                unsafe { spread.run(bias_values.as_ptr(), expected.as_mut_ptr()) };
            }
            let options = ContractOptions { accumulate: bias.is_some(), ..Default::default() };
            let plan = ContractPlan::new(&indices, options).unwrap();
            plan.run(&a, &b, &mut expected).unwrap();
            let added = Added { onto: false, bias: bias.as_ref().map(|bias| (bias, 512)) };
            if let Some(calls) = products(&indices, added, [(256, DType::F32); 3]).unwrap() {
                let mut found = vec![0.0; spans[2]];
                run(&calls, [&a, &b, &bias_values], &mut found);
                prop_assert_eq!(found, expected);
            }
        }
    }
}
