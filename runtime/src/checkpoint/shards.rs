//! Shards: the parts of tensors that ranks hold, one `safetensors` file a rank.
//!
//! In: parts cut out of a session, or a folder. Out: a file on the disk; a session with the tensors of the
//! folder, put together and cut again for its own mesh.
//! Invariant: a folder is opened only when each of its files has the size and the hash that the manifest
//! says, and the parts of each tensor fill it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::TensorType;
use meshweave_dsl::layout::Interval;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::file::{as_bytes, kept};
use super::manifest::{DataOrder, FileMark, Manifest, checksum};
use crate::error::{Error, Result};
use crate::executor::Session;
use crate::tensor::{Elements, HostTensor, Part};

/// A part of a tensor, copied out of a rank's arena.
pub(crate) struct Piece {
    pub(crate) rank: usize,
    /// The tensor's name, and which of its parts this is.
    pub(crate) key: String,
    /// Its elements, row-major in the tensor's order of dims.
    pub(crate) tensor: HostTensor,
}

/// The key of a part of a tensor.
pub(crate) fn key(name: &str, part_idx: usize) -> String {
    format!("{name}@{part_idx}")
}

/// The file of a rank.
pub(super) fn file_name(rank: usize) -> String {
    format!("rank-{rank:05}.safetensors")
}

/// The type of a region of a tensor.
pub(crate) fn region_type(ty: &TensorType, region: &[Interval]) -> TensorType {
    let dims = ty.shape.iter().zip(region);
    TensorType {
        dtype: ty.dtype,
        shape: dims
            .map(|((dim, _), interval)| (dim.clone(), interval.len))
            .collect(),
    }
}

/// Writes a rank's pieces to the disk.
pub(super) fn write(
    folder: &Path,
    rank: usize,
    pieces: &[Piece],
) -> std::result::Result<FileMark, String> {
    let name = file_name(rank);
    let path = folder.join(&name);
    let mut views = Vec::with_capacity(pieces.len());
    for Piece { key, tensor, .. } in pieces {
        let shape = tensor.ty().shape.iter().map(|(_, size)| *size).collect();
        let (dtype, bytes) = match tensor.elements() {
            Elements::F32(data) => (Dtype::F32, as_bytes(data)),
            Elements::I32(data) => (Dtype::I32, as_bytes(data)),
        };
        let view = TensorView::new(dtype, shape, bytes).map_err(|error| error.to_string())?;
        views.push((key, view));
    }
    let bytes = safetensors::serialize(views, None).map_err(|error| error.to_string())?;
    let mark = FileMark {
        name,
        n_bytes: bytes.len() as u64,
        hash: format!("{:016x}", checksum(&bytes)),
    };
    let write_all = || -> std::io::Result<()> {
        std::fs::create_dir_all(folder)?;
        let mut file = File::create(&path)?;
        file.write_all(&bytes)?;
        file.sync_all()
    };
    write_all().map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    Ok(mark)
}

/// A whole checkpoint's folder.
pub(super) struct Shards {
    folder: PathBuf,
    manifest: Manifest,
    /// In the order of the manifest's files.
    maps: Vec<memmap2::Mmap>,
}

impl Shards {
    /// Opens a folder and checks every byte of it.
    ///
    /// # Errors
    /// `Invalid` when something is missing, too short or changed.
    pub(super) fn open(folder: &Path) -> Result<Shards> {
        let manifest = Manifest::read(folder)?;
        let mut maps = Vec::with_capacity(manifest.files.len());
        for mark in &manifest.files {
            maps.push(open_file(folder, mark)?);
        }
        let shards = Shards {
            folder: folder.to_path_buf(),
            manifest,
            maps,
        };
        for tensor in &shards.manifest.tensors {
            let parts = tensor.parts.iter();
            let n: usize = parts
                .map(|part| region_type(&tensor.ty, &part.region).n_elements())
                .sum();
            if n != tensor.ty.n_elements() {
                return Err(shards.damaged(&format!(
                    "the parts of `{}` {} have {n} elements",
                    tensor.name, tensor.ty
                )));
            }
        }
        Ok(shards)
    }

    /// Gives a session all parameters and states.
    ///
    /// # Errors
    /// `Invalid` when one is missing or of another type, or the data are others.
    pub(super) fn restore(&self, session: &mut Session, data: &DataOrder) -> Result<()> {
        if self.manifest.data != *data {
            let words = |order: &DataOrder| {
                format!(
                    "{} in batches of {} × {}",
                    order.source, order.n_batch, order.n_seq
                )
            };
            return Err(Error::Invalid(format!(
                "the checkpoint {} was made on {}, this run reads {}: going on would not repeat its order; \
                 give the same data, or start from a file of --save, which holds no place in the data",
                self.folder.display(),
                words(&self.manifest.data),
                words(data)
            )));
        }
        let types = session.program().sources.iter();
        let types: Vec<(String, TensorType)> = types
            .map(|source| (source.name.clone(), source.ty.clone()))
            .collect();
        let wanted: Vec<(String, TensorType)> = kept(session)
            .into_iter()
            .filter_map(|name| types.iter().find(|(known, _)| *known == name).cloned())
            .collect();
        // All names and types before anything is set: a checkpoint of another model changes nothing.
        for (name, ty) in &wanted {
            self.find(name, ty)?;
        }
        for (name, ty) in &wanted {
            let value = self.read(name, ty)?;
            session.set(name, &value)?;
        }
        session.set_n_steps(self.manifest.n_steps);
        Ok(())
    }

    fn find(&self, name: &str, ty: &TensorType) -> Result<&super::manifest::Tensor> {
        let tensors = &self.manifest.tensors;
        let folder = self.folder.display();
        let tensor = tensors
            .iter()
            .find(|tensor| tensor.name == name)
            .ok_or_else(|| {
                Error::Invalid(format!(
                    "the checkpoint {folder} lacks `{name}` {ty}; it has {} tensors",
                    tensors.len()
                ))
            })?;
        if tensor.ty != *ty {
            return Err(Error::Invalid(format!(
                "`{name}` is {ty}, the checkpoint {folder} has it as {}",
                tensor.ty
            )));
        }
        Ok(tensor)
    }

    /// A tensor, put together from its parts.
    fn read(&self, name: &str, ty: &TensorType) -> Result<HostTensor> {
        let tensor = self.find(name, ty)?;
        let mut whole = HostTensor::zeros(ty.clone())?;
        for part in &tensor.parts {
            let region_ty = region_type(ty, &part.region);
            let way = Part::new(name, ty, &part.region, &region_ty)?;
            let words = self.words(&part.file, &part.key, &region_ty)?;
            // SAFETY: the words are as many as the region has elements, row-major as its type says.
            unsafe { way.put(words.as_ptr(), &mut whole) };
        }
        Ok(whole)
    }

    fn words(&self, file: &str, key: &str, ty: &TensorType) -> Result<Vec<u32>> {
        let files = self.manifest.files.iter().zip(&self.maps);
        let map = files
            .filter(|(mark, _)| mark.name == file)
            .map(|(_, map)| map)
            .next();
        let map = map.ok_or_else(|| self.damaged(&format!("it lists no file {file}")))?;
        let tensors =
            SafeTensors::deserialize(map).map_err(|error| self.damaged(&error.to_string()))?;
        let view = tensors
            .tensor(key)
            .map_err(|error| self.damaged(&error.to_string()))?;
        let dtype = match view.dtype() {
            Dtype::F32 => Some(DType::F32),
            Dtype::I32 => Some(DType::I32),
            _ => None,
        };
        if dtype != Some(ty.dtype) || view.data().len() != 4 * ty.n_elements() {
            return Err(self.damaged(&format!(
                "`{key}` is {:?}{:?}, expected {ty}",
                view.dtype(),
                view.shape()
            )));
        }
        let words = view.data().chunks_exact(4);
        Ok(words
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect())
    }

    fn damaged(&self, what: &str) -> Error {
        Error::Invalid(format!(
            "the checkpoint {} is damaged: {what}",
            self.folder.display()
        ))
    }
}

fn open_file(folder: &Path, mark: &FileMark) -> Result<memmap2::Mmap> {
    let invalid = |what: String| {
        let (folder, name) = (folder.display(), &mark.name);
        Error::Invalid(format!(
            "the checkpoint {folder} is not whole: {name} {what}"
        ))
    };
    let file = File::open(folder.join(&mark.name))
        .map_err(|error| invalid(format!("cannot be read ({error})")))?;
    let n_bytes = file.metadata().map_or(0, |metadata| metadata.len());
    if n_bytes != mark.n_bytes {
        return Err(invalid(format!(
            "has {n_bytes} bytes, the manifest says {}",
            mark.n_bytes
        )));
    }
    // SAFETY: mapped read-only; a checkpoint's files are never changed in place.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|error| invalid(error.to_string()))?;
    let hash = format!("{:016x}", checksum(&map));
    if hash != mark.hash {
        return Err(invalid(format!(
            "has hash {hash}, the manifest says {}",
            mark.hash
        )));
    }
    Ok(map)
}
