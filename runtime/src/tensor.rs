//! Whole tensors on the host: what goes into a program and comes out of it.
//!
//! In: a type and its elements. Out: the part of a region, or the whole from parts.
//! Invariant: a tensor has exactly as many elements as its type says, in the type's memory order.

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::TensorType;
use meshweave_dsl::layout::Interval;

use crate::error::{Error, Result};
use crate::strided::{CopyLoop, CopyPlan};

/// The elements of one tensor, of 32 bits each.
#[derive(Debug, Clone, PartialEq)]
pub enum Elements {
    F32(Vec<f32>),
    I32(Vec<i32>),
}

/// A tensor of the global graph, in one piece.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    ty: TensorType,
    elements: Elements,
}

impl HostTensor {
    /// A tensor of these elements.
    ///
    /// # Errors
    /// `Invalid` when their number or kind is not the type's; `Unsupported` for 16-bit types.
    pub fn new(ty: TensorType, elements: Elements) -> Result<HostTensor> {
        check_dtype(&ty)?;
        let (n, dtype) = match &elements {
            Elements::F32(data) => (data.len(), DType::F32),
            Elements::I32(data) => (data.len(), DType::I32),
        };
        if n != ty.n_elements() || dtype != ty.dtype {
            return Err(Error::Invalid(format!(
                "a tensor {ty} has {} elements, {n} of {dtype} were given",
                ty.n_elements()
            )));
        }
        Ok(HostTensor { ty, elements })
    }

    /// A tensor of zeros.
    ///
    /// # Errors
    /// `Unsupported` for 16-bit types.
    pub fn zeros(ty: TensorType) -> Result<HostTensor> {
        let n = ty.n_elements();
        let elements = match ty.dtype {
            DType::I32 => Elements::I32(vec![0; n]),
            _ => Elements::F32(vec![0.0; n]),
        };
        HostTensor::new(ty, elements)
    }

    /// A scalar of f32.
    pub fn scalar(value: f32) -> HostTensor {
        HostTensor {
            ty: TensorType {
                dtype: DType::F32,
                shape: Vec::new(),
            },
            elements: Elements::F32(vec![value]),
        }
    }

    /// The type.
    pub fn ty(&self) -> &TensorType {
        &self.ty
    }

    /// The elements.
    pub fn elements(&self) -> &Elements {
        &self.elements
    }

    /// The elements, when they are f32.
    pub fn as_f32(&self) -> Option<&[f32]> {
        match &self.elements {
            Elements::F32(data) => Some(data),
            Elements::I32(_) => None,
        }
    }

    /// The elements, when they are i32.
    pub fn as_i32(&self) -> Option<&[i32]> {
        match &self.elements {
            Elements::I32(data) => Some(data),
            Elements::F32(_) => None,
        }
    }

    pub(crate) fn words(&self) -> *const u32 {
        match &self.elements {
            Elements::F32(data) => data.as_ptr().cast(),
            Elements::I32(data) => data.as_ptr().cast(),
        }
    }

    pub(crate) fn words_mut(&mut self) -> *mut u32 {
        match &mut self.elements {
            Elements::F32(data) => data.as_mut_ptr().cast(),
            Elements::I32(data) => data.as_mut_ptr().cast(),
        }
    }
}

/// The way between a whole tensor and one rank's part.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Part {
    /// Loops with the whole as the source.
    loops: Vec<CopyLoop>,
    /// Elements of the whole before the part's first one.
    start: usize,
}

impl Part {
    /// The part `region` of `whole`, lying in a buffer of type `local` (the same dims, any order).
    ///
    /// # Errors
    /// `Invalid` when region, whole and buffer do not fit each other.
    pub(crate) fn new(
        name: &str,
        whole: &TensorType,
        region: &[Interval],
        local: &TensorType,
    ) -> Result<Part> {
        let damaged = || {
            Error::Invalid(format!(
                "damaged program: the part {region:?} of `{name}` {whole} does not fit the buffer {local}; \
                 compile again"
            ))
        };
        check_dtype(whole)?;
        let same_dims = region.len() == whole.shape.len() && local.shape.len() == whole.shape.len();
        if !same_dims || local.dtype != whole.dtype {
            return Err(damaged());
        }
        let (whole_strides, local_strides) = (whole.strides(), local.strides());
        let (mut loops, mut start) = (Vec::new(), 0);
        for (dim_idx, ((dim, size), interval)) in whole.shape.iter().zip(region).enumerate() {
            let position = local.position(dim).ok_or_else(damaged)?;
            let ends = interval
                .start
                .checked_add(interval.len)
                .is_some_and(|end| end <= *size);
            if !ends || local.shape[position].1 != interval.len {
                return Err(damaged());
            }
            start += interval.start * whole_strides[dim_idx];
            loops.push(CopyLoop {
                size: interval.len,
                src: whole_strides[dim_idx],
                dst: local_strides[position],
            });
        }
        Ok(Part { loops, start })
    }

    /// Elements of the part.
    pub(crate) fn n_elements(&self) -> usize {
        self.loops.iter().map(|l| l.size).product()
    }

    /// Copies the part out of the whole.
    ///
    /// # Safety
    /// `local` is valid for writes of the buffer's elements and used by nobody else; `whole` is of the
    /// planned type.
    pub(crate) unsafe fn cut(&self, whole: &HostTensor, local: *mut u32) {
        // SAFETY: `new` checked that the region lies inside of the whole and fills the buffer.
        unsafe { CopyPlan::new(&self.loops).run(whole.words().add(self.start), local) };
    }

    /// Copies the part into the whole.
    ///
    /// # Safety
    /// `local` is valid for reads of the buffer's elements and written by nobody; `whole` is of the
    /// planned type.
    pub(crate) unsafe fn put(&self, local: *const u32, whole: &mut HostTensor) {
        let flipped: Vec<CopyLoop> = self
            .loops
            .iter()
            .map(|l| CopyLoop {
                src: l.dst,
                dst: l.src,
                ..*l
            })
            .collect();
        // SAFETY: as in `cut`.
        unsafe { CopyPlan::new(&flipped).run(local, whole.words_mut().add(self.start)) };
    }

    /// Calls `write(local index, global index)` for every element, both row-major.
    #[inline]
    pub(crate) fn for_each(&self, mut write: impl FnMut(usize, usize)) {
        let Some((inner, outer)) = self.loops.split_last() else {
            write(0, self.start);
            return;
        };
        if self.loops.iter().any(|l| l.size == 0) {
            return;
        }
        let mut at = vec![0; outer.len()];
        let (mut local, mut global) = (0, self.start);
        loop {
            for i in 0..inner.size {
                write(local + i * inner.dst, global + i * inner.src);
            }
            let mut done = true;
            for (at, step) in at.iter_mut().zip(outer).rev() {
                *at += 1;
                (local, global) = (local + step.dst, global + step.src);
                if *at < step.size {
                    done = false;
                    break;
                }
                *at = 0;
                (local, global) = (local - step.size * step.dst, global - step.size * step.src);
            }
            if done {
                return;
            }
        }
    }
}

/// The runtime holds f32 and i32.
pub(crate) fn check_dtype(ty: &TensorType) -> Result<()> {
    match ty.dtype {
        DType::F32 | DType::I32 => Ok(()),
        DType::Bf16 | DType::F16 => Err(Error::Unsupported(format!(
            "the runtime holds f32 and i32, not {ty}; plan with dtype f32"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use meshweave_dsl::layout::{Layout, Mesh};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn gathering_the_parts_gives_the_whole(
            a in 1usize..9, b in 1usize..9, c in 1usize..9,
            d0 in 1usize..4, d1 in 1usize..4,
            place in 0usize..9,
            transposed in any::<bool>(),
        ) {
            let shape = [("a", a), ("b", b), ("c", c)];
            let ty = TensorType::new(DType::I32, shape);
            let mesh = Mesh::new([("x", d0), ("y", d1)]);
            let layout = Layout::default().shard(shape[place / 3].0, "x").shard(shape[place % 3].0, "y");
            let whole = HostTensor::new(ty.clone(), Elements::I32((0..(a * b * c) as i32).collect())).unwrap();
            let mut gathered = HostTensor::zeros(ty.clone()).unwrap();
            for rank in 0..mesh.n_ranks() {
                let region = layout.region(&ty.shape, &mesh, rank);
                let mut local: Vec<_> =
                    ty.shape.iter().zip(&region).map(|((dim, _), r)| (dim.clone(), r.len)).collect();
                if transposed {
                    local.reverse();
                }
                let local = TensorType { dtype: DType::I32, shape: local };
                let part = Part::new("x", &ty, &region, &local).unwrap();
                let mut data = vec![u32::MAX; local.n_elements()];
                let mut expected = data.clone();
                // SAFETY: `data` has the elements of the local type.
                unsafe {
                    part.cut(&whole, data.as_mut_ptr());
                    part.put(data.as_ptr(), &mut gathered);
                }
                part.for_each(|local, global| expected[local] = global as u32);
                prop_assert_eq!(data, expected);
            }
            prop_assert_eq!(gathered, whole);
        }
    }
}
