//! Whole tensors in one `safetensors` file.
//!
//! In: tensors by name. Out: the file, and back.
//! Invariant: a file is complete or absent: it is written under another name and renamed.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::Path;

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{Role, TensorType};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::artifact::beside;
use crate::error::{Error, Result};
use crate::executor::Session;
use crate::tensor::{Elements, HostTensor};

/// The key of the file's metadata that holds the number of steps done.
const STEPS_KEY: &str = "meshweave_steps";

/// Writes tensors and the number of steps done.
///
/// # Errors
/// `Exhausted` when the file cannot be written; then nothing is left behind.
pub fn write(path: &Path, tensors: &BTreeMap<String, HostTensor>, n_steps: usize) -> Result<()> {
    let mut views = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let shape = tensor.ty().shape.iter().map(|(_, size)| *size).collect();
        let (dtype, bytes) = match tensor.elements() {
            Elements::F32(data) => (Dtype::F32, as_bytes(data)),
            Elements::I32(data) => (Dtype::I32, as_bytes(data)),
        };
        let view = TensorView::new(dtype, shape, bytes).map_err(|error| {
            Error::Internal(format!("tensor `{name}` {}: {error}", tensor.ty()))
        })?;
        views.push((name, view));
    }
    let metadata = HashMap::from([(STEPS_KEY.to_string(), n_steps.to_string())]);
    let unfinished = beside(path);
    let written = safetensors::serialize_to_file(views, Some(metadata), &unfinished)
        .map_err(|error| error.to_string())
        .and_then(|()| fs::rename(&unfinished, path).map_err(|error| error.to_string()));
    written.map_err(|error| {
        // Best effort: the error that matters is the first one.
        let _ = fs::remove_file(&unfinished);
        Error::Exhausted(format!(
            "cannot write the checkpoint {}: {error}",
            path.display()
        ))
    })
}

/// An opened checkpoint; tensors are read when asked for.
pub struct Checkpoint {
    path: String,
    map: memmap2::Mmap,
    n_steps: usize,
}

impl Checkpoint {
    /// Opens a file and checks its header.
    ///
    /// # Errors
    /// `Invalid` when it cannot be read, is truncated, or is no `safetensors` file.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let invalid = |error: String| {
            Error::Invalid(format!(
                "cannot read the checkpoint {}: {error}",
                path.display()
            ))
        };
        let file = File::open(path).map_err(|error| invalid(error.to_string()))?;
        // SAFETY: the file is mapped read-only; checkpoints are replaced by renaming, never changed in
        // place, so the mapped bytes stay what they are.
        let map =
            unsafe { memmap2::Mmap::map(&file) }.map_err(|error| invalid(error.to_string()))?;
        let (_, metadata) =
            SafeTensors::read_metadata(&map).map_err(|error| invalid(error.to_string()))?;
        SafeTensors::deserialize(&map).map_err(|error| invalid(error.to_string()))?;
        let steps = metadata
            .metadata()
            .as_ref()
            .and_then(|entries| entries.get(STEPS_KEY));
        let n_steps = match steps {
            Some(text) => text
                .parse()
                .map_err(|_| invalid(format!("its number of steps is `{text}`")))?,
            None => 0,
        };
        Ok(Checkpoint {
            path: path.display().to_string(),
            map,
            n_steps,
        })
    }

    /// Number of steps done when it was written; 0 for files of other programs.
    pub fn n_steps(&self) -> usize {
        self.n_steps
    }

    /// One tensor, as `ty`.
    ///
    /// # Errors
    /// `Invalid` when the file lacks it or has it in another shape or type.
    pub fn read(&self, name: &str, ty: &TensorType) -> Result<HostTensor> {
        let file = SafeTensors::deserialize(&self.map)
            .map_err(|error| Error::Invalid(format!("checkpoint {}: {error}", self.path)))?;
        let view = file.tensor(name).map_err(|_| {
            Error::Invalid(format!(
                "the checkpoint {} lacks `{name}` {ty}; it has {} tensors",
                self.path,
                file.len()
            ))
        })?;
        let shape: Vec<usize> = ty.shape.iter().map(|(_, size)| *size).collect();
        let dtype = match view.dtype() {
            Dtype::F32 => Some(DType::F32),
            Dtype::I32 => Some(DType::I32),
            _ => None,
        };
        if view.shape() != shape || dtype != Some(ty.dtype) {
            return Err(Error::Invalid(format!(
                "`{name}` is {ty}, the checkpoint {} has it as {:?}{:?}",
                self.path,
                view.dtype(),
                view.shape()
            )));
        }
        let words = view
            .data()
            .chunks_exact(4)
            .map(|b| [b[0], b[1], b[2], b[3]]);
        let elements = match ty.dtype {
            DType::I32 => Elements::I32(words.map(i32::from_le_bytes).collect()),
            _ => Elements::F32(words.map(f32::from_le_bytes).collect()),
        };
        HostTensor::new(ty.clone(), elements)
    }
}

/// Writes a session's parameters and states, gathered from its ranks; where they are processes, all call
/// this together and the one of rank 0 writes.
///
/// # Errors
/// As for [`write`].
pub fn save(session: &Session, path: &Path) -> Result<()> {
    let mut tensors = BTreeMap::new();
    for source in kept(session) {
        tensors.insert(source.clone(), session.get(&source)?);
    }
    if !session.ranks().contains(&0) {
        return Ok(());
    }
    write(path, &tensors, session.n_steps())
}

/// Gives a session the parameters and states of a file, on any mesh.
///
/// # Errors
/// As for [`Checkpoint::open`] and [`Checkpoint::read`].
pub fn restore(session: &mut Session, path: &Path) -> Result<()> {
    let checkpoint = Checkpoint::open(path)?;
    let types: BTreeMap<String, TensorType> = session
        .program()
        .sources
        .iter()
        .map(|source| (source.name.clone(), source.ty.clone()))
        .collect();
    // Everything is read before anything is set, so that a bad file changes nothing.
    let mut values = Vec::new();
    for name in kept(session) {
        if let Some(ty) = types.get(&name) {
            values.push((checkpoint.read(&name, ty)?, name));
        }
    }
    for (value, name) in values {
        session.set(&name, &value)?;
    }
    session.set_n_steps(checkpoint.n_steps());
    Ok(())
}

/// Names of the parameters and states, in the program's order.
pub(super) fn kept(session: &Session) -> Vec<String> {
    let sources = session.program().sources.iter();
    sources
        .filter(|source| matches!(source.role, Role::Param(_) | Role::State { .. }))
        .map(|source| source.name.clone())
        .collect()
}

pub(super) fn as_bytes<T: Copy>(data: &[T]) -> &[u8] {
    // SAFETY: f32 and i32 (the callers' types) are four bytes without padding; u8 has no alignment.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let ty = TensorType::new(DType::F32, [("a", 2), ("b", 3)]);
        let data = vec![1.5, -0.0, f32::MIN_POSITIVE, 3.0, f32::INFINITY, 5.25];
        let tensor = HostTensor::new(ty.clone(), Elements::F32(data)).unwrap();
        write(
            &path,
            &BTreeMap::from([("w".to_string(), tensor.clone())]),
            12,
        )
        .unwrap();
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            1,
            "nothing else is left"
        );

        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.n_steps(), 12);
        assert_eq!(checkpoint.read("w", &ty).unwrap(), tensor);
        let refusal = |error: Error| {
            error
                .to_string()
                .replace(&path.display().to_string(), "FILE")
        };
        insta::assert_snapshot!(
            refusal(checkpoint.read("v", &ty).unwrap_err()),
            @"the checkpoint FILE lacks `v` f32[a:2, b:3]; it has 1 tensors"
        );
        let other = TensorType::new(DType::F32, [("a", 3), ("b", 2)]);
        insta::assert_snapshot!(
            refusal(checkpoint.read("w", &other).unwrap_err()),
            @"`w` is f32[a:3, b:2], the checkpoint FILE has it as F32[2, 3]"
        );

        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 4]).unwrap();
        assert!(
            refusal(Checkpoint::open(&path).map(|_| ()).unwrap_err())
                .starts_with("cannot read the checkpoint FILE: ")
        );
    }
}
