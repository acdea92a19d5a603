//! Values of tensors in f64, and the walk over elements by dim names.
//!
//! Invariant: a value has exactly as many elements as its type says, in the type's memory order.
//! Integers are held in f64 too, which represents every i32 exactly.

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::layout::Interval;
use meshweave_dsl::name::Dim;

use super::{ReferenceError, Result};

/// The elements of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    ty: TensorType,
    data: Vec<f64>,
}

impl Value {
    /// A value of the given elements, row-major in the order of the dims.
    ///
    /// # Errors
    /// The number of elements is not the type's.
    pub fn new(ty: TensorType, data: Vec<f64>) -> Result<Self> {
        if data.len() == ty.n_elements() {
            Ok(Self { ty, data })
        } else {
            Err(ReferenceError::Invalid(format!(
                "{ty} has {} elements, {} were given",
                ty.n_elements(),
                data.len()
            )))
        }
    }

    /// Every element the same.
    pub fn full(ty: TensorType, element: f64) -> Self {
        let data = vec![element; ty.n_elements()];
        Self { ty, data }
    }

    /// Element i is `element(i)`, i being the row-major index.
    pub fn from_fn(ty: TensorType, element: impl FnMut(usize) -> f64) -> Self {
        let data = (0..ty.n_elements()).map(element).collect();
        Self { ty, data }
    }

    /// The type.
    pub fn ty(&self) -> &TensorType {
        &self.ty
    }

    /// The elements, row-major in the order of the dims.
    pub fn data(&self) -> &[f64] {
        &self.data
    }

    /// The elements, to be changed in place.
    pub fn data_mut(&mut self) -> &mut [f64] {
        &mut self.data
    }

    /// The only element of a scalar (the first of any other value; 0 of an empty one).
    pub fn item(&self) -> f64 {
        self.data.first().copied().unwrap_or(0.0)
    }

    /// The same elements under another type.
    ///
    /// # Errors
    /// The types differ in their number of elements.
    pub fn with_type(self, ty: TensorType) -> Result<Self> {
        Self::new(ty, self.data)
    }

    /// The elements of a region, one interval a dim in the order of the dims.
    ///
    /// # Errors
    /// The region has another number of dims, or ends beyond one.
    pub fn part(&self, region: &[Interval]) -> Result<Self> {
        let (ty, start) = self.region_type(region)?;
        let sizes = sizes(&ty);
        let mut data = Vec::with_capacity(ty.n_elements());
        for_each_offset(&sizes, [&self.ty.strides()], |[from]| {
            data.push(self.data[start + from]);
        });
        Self::new(ty, data)
    }

    /// Writes `part` over a region of this value.
    ///
    /// # Errors
    /// The region has another number of dims, ends beyond one, or is not of the part's size.
    pub fn put_part(&mut self, region: &[Interval], part: &Value) -> Result<()> {
        let (ty, start) = self.region_type(region)?;
        if ty.shape != part.ty.shape {
            return Err(ReferenceError::Invalid(format!(
                "{} does not fill the region {ty}",
                part.ty
            )));
        }
        let mut from = part.data.iter();
        let strides = self.ty.strides();
        for_each_offset(&sizes(&ty), [&strides], |[to]| {
            if let Some(element) = from.next() {
                self.data[start + to] = *element;
            }
        });
        Ok(())
    }

    /// The greatest |self − other|, relative to the greatest |other|; infinite when the shapes
    /// differ or an element is not finite in one of them only.
    pub fn relative_error(&self, other: &Value) -> f64 {
        if self.ty.shape != other.ty.shape {
            return f64::INFINITY;
        }
        let mut difference = 0.0_f64;
        let mut scale = 0.0_f64;
        for (a, b) in self.data.iter().zip(&other.data) {
            if a == b {
                continue;
            }
            if !a.is_finite() || !b.is_finite() {
                return f64::INFINITY;
            }
            difference = difference.max((a - b).abs());
        }
        for b in other.data.iter().filter(|b| b.is_finite()) {
            scale = scale.max(b.abs());
        }
        difference / scale.max(f64::MIN_POSITIVE)
    }

    fn region_type(&self, region: &[Interval]) -> Result<(TensorType, usize)> {
        let fits = region.len() == self.ty.shape.len()
            && region
                .iter()
                .zip(&self.ty.shape)
                .all(|(interval, (_, size))| interval.start + interval.len <= *size);
        if !fits {
            return Err(ReferenceError::Invalid(format!(
                "the region {region:?} does not lie in {}",
                self.ty
            )));
        }
        let start = region
            .iter()
            .zip(self.ty.strides())
            .map(|(interval, stride)| interval.start * stride)
            .sum();
        let shape = self.ty.shape.iter().zip(region);
        let ty = TensorType::new(
            self.ty.dtype,
            shape.map(|((dim, _), interval)| (dim.clone(), interval.len)),
        );
        Ok((ty, start))
    }
}

/// The sizes of a type's dims, outermost first.
pub(super) fn sizes(ty: &TensorType) -> Vec<usize> {
    ty.shape.iter().map(|(_, size)| *size).collect()
}

/// The stride in `ty` of each of `dims`; 0 for a dim it lacks (which broadcasts).
pub(super) fn strides_over<'a>(
    ty: &TensorType,
    dims: impl IntoIterator<Item = &'a Dim>,
) -> Vec<usize> {
    let strides = ty.strides();
    dims.into_iter()
        .map(|dim| ty.position(dim).map_or(0, |position| strides[position]))
        .collect()
}

/// Size and stride of a dim; (1, 0) when the type lacks it.
pub(super) fn along(ty: &TensorType, dim: &Dim) -> (usize, usize) {
    ty.position(dim).map_or((1, 0), |position| {
        (ty.shape[position].1, ty.strides()[position])
    })
}

/// Calls `visit` with the offset in each operand for every index of the box `sizes`, row-major.
///
/// `strides[o][d]` is the step of operand `o` along dim `d`.
pub(super) fn for_each_offset<const N: usize>(
    sizes: &[usize],
    strides: [&[usize]; N],
    mut visit: impl FnMut([usize; N]),
) {
    if sizes.contains(&0) {
        return;
    }
    let Some((inner, outer)) = sizes.split_last() else {
        visit([0; N]);
        return;
    };
    let inner_strides = strides.map(|strides| strides[outer.len()]);
    let mut index = vec![0; outer.len()];
    let mut base = [0; N];
    loop {
        let mut offsets = base;
        for _ in 0..*inner {
            visit(offsets);
            for (offset, stride) in offsets.iter_mut().zip(inner_strides) {
                *offset += stride;
            }
        }
        let mut dim_idx = outer.len();
        loop {
            if dim_idx == 0 {
                return;
            }
            dim_idx -= 1;
            index[dim_idx] += 1;
            for (offset, strides) in base.iter_mut().zip(strides) {
                *offset += strides[dim_idx];
            }
            if index[dim_idx] < outer[dim_idx] {
                break;
            }
            index[dim_idx] = 0;
            for (offset, strides) in base.iter_mut().zip(strides) {
                *offset -= strides[dim_idx] * outer[dim_idx];
            }
        }
    }
}
