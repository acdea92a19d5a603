//! What sources hold before the first step, made in place on every rank.
//!
//! In: a source's role and the part that a rank holds. Out: the part's elements.
//! Invariant: an element depends on its global row-major index alone, so shards are cuts of one
//! global tensor, whatever the mesh.

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{Init, Role, TensorType};

use crate::error::{Error, Result};
use crate::reference::{const_value, hash_uniform};
use crate::tensor::{Elements, HostTensor, Part};

/// The value of a constant table.
///
/// # Errors
/// `Invalid` when the table's shape does not fit what it holds.
pub(crate) fn constant(name: &str, role: &Role, ty: &TensorType) -> Result<Option<HostTensor>> {
    let Role::Const(init) = role else {
        return Ok(None);
    };
    let value = const_value(init, ty)
        .map_err(|error| Error::Invalid(format!("constant `{name}`: {error}; compile again")))?;
    let elements = match ty.dtype {
        DType::I32 => Elements::I32(value.data().iter().map(|x| *x as i32).collect()),
        _ => Elements::F32(value.data().iter().map(|x| *x as f32).collect()),
    };
    HostTensor::new(ty.clone(), elements).map(Some)
}

/// Writes the initial elements of a parameter's part (other roles start as zeros).
///
/// `seed` 0 is the rule of the golden model; any other seed gives other numbers of the same scales.
pub(crate) fn initialize(role: &Role, seed: u32, part: &Part, local: &mut [f32]) {
    match role {
        Role::Param(Init::Ones) => local.fill(1.0),
        Role::Param(Init::Hash { stream, scale }) => {
            let stream = stream.wrapping_add(seed.wrapping_mul(0x85EB_CA6B));
            part.for_each(|to, global| local[to] = scale * hash_uniform(stream, global));
        }
        Role::Param(Init::Zeros)
        | Role::State { .. }
        | Role::Input
        | Role::Const(_)
        | Role::Temp => {
            local.fill(0.0);
        }
    }
}
