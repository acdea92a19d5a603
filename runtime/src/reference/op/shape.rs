//! Ops that move elements without computing.

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::layout::Interval;
use meshweave_dsl::name::Dim;

use super::super::value::{for_each_offset, sizes, strides_over};
use super::super::{ReferenceError, Result, Value};

/// x read over the dims of `ty`, in their order; repeated along those it lacks.
pub(super) fn spread_over(x: &Value, ty: TensorType) -> Value {
    let mut offsets = Vec::with_capacity(ty.n_elements());
    for_each_offset(
        &sizes(&ty),
        [&strides_over(x.ty(), ty.dims())],
        |[offset]| offsets.push(offset),
    );
    Value::from_fn(ty, |i| x.data()[offsets[i]])
}

pub(super) fn slice(dim: &Dim, start: usize, x: &Value, ty: TensorType) -> Value {
    let strides = x.ty().strides();
    let skipped = x
        .ty()
        .position(dim)
        .map_or(0, |position| start * strides[position]);
    let mut offsets = Vec::with_capacity(ty.n_elements());
    for_each_offset(&sizes(&ty), [&strides], |[offset]| {
        offsets.push(skipped + offset);
    });
    Value::from_fn(ty, |i| x.data()[offsets[i]])
}

/// The inputs one after the other along `dim`.
///
/// # Errors
/// There are none, or they differ in more than `dim`.
pub(in super::super) fn concat(dim: &Dim, inputs: &[&Value]) -> Result<Value> {
    let Some(position) = inputs.first().and_then(|first| first.ty().position(dim)) else {
        return Err(ReferenceError::Invalid(format!(
            "nothing to lay along `{dim}`"
        )));
    };
    let mut ty = inputs[0].ty().clone();
    ty.shape[position].1 = inputs
        .iter()
        .map(|input| input.ty().size_of(dim).unwrap_or(0))
        .sum();
    let mut result = Value::full(ty, 0.0);
    let mut start = 0;
    for input in inputs {
        let mut region: Vec<Interval> = input
            .ty()
            .shape
            .iter()
            .map(|(_, size)| Interval {
                start: 0,
                len: *size,
            })
            .collect();
        let Some(interval) = region.get_mut(position) else {
            return Err(ReferenceError::Invalid(format!(
                "{} lacks `{dim}`",
                input.ty()
            )));
        };
        interval.start = start;
        start += interval.len;
        result.put_part(&region, input)?;
    }
    Ok(result)
}
