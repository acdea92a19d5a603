//! Reads pretrained weights from safetensors files: one, or several with an index.
//!
//! In: a folder or file, and the [`WeightMap`] that says where each parameter lies. Out: any region of
//! a parameter, as f32.
//! Invariant: only headers are held in memory; whatever a damaged file says, nothing outside of it is
//! read.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use meshweave_dsl::diagnostics::did_you_mean;
use meshweave_dsl::graph::{Graph, TensorType};
use meshweave_dsl::layout::Interval;
use meshweave_dsl::weights::{WeightMap, WeightSource};
use safetensors::tensor::{Dtype, Metadata};
use serde::Deserialize;

use crate::error::{Error, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The longest header that safetensors allows.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The tensors of a checkpoint by name.
#[derive(Clone, Debug)]
pub struct Pretrained {
    path: PathBuf,
    files: Vec<PathBuf>,
    entries: BTreeMap<String, Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    file_idx: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// First byte in the file.
    start: u64,
    n_bytes: usize,
}

/// `model.safetensors.index.json`; what else it has says nothing about where tensors are.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Pretrained {
    /// Reads the headers of a safetensors file, or of those in a folder (`model.safetensors`, or the
    /// files of `model.safetensors.index.json`).
    ///
    /// # Errors
    /// `Invalid` when a file is missing, truncated or malformed.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut pretrained = Self {
            path: path.to_owned(),
            files: Vec::new(),
            entries: BTreeMap::new(),
        };
        let index = path.join(INDEX);
        if !path.is_dir() {
            pretrained.add_file(path, None)?;
        } else if index.is_file() {
            let text =
                std::fs::read_to_string(&index).map_err(|error| unreadable(&index, &error))?;
            let Index { weight_map } = serde_json::from_str(&text).map_err(|error| {
                Error::Invalid(format!("{}: {error}: download it again", index.display()))
            })?;
            let mut by_file: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
            for (tensor, file) in &weight_map {
                by_file.entry(file).or_default().insert(tensor);
            }
            for (file, tensors) in by_file {
                pretrained.add_file(&path.join(file), Some(&tensors))?;
            }
        } else if path.join(SINGLE).is_file() {
            pretrained.add_file(&path.join(SINGLE), None)?;
        } else {
            return Err(Error::Invalid(format!(
                "{} has neither `{SINGLE}` nor `{INDEX}`: give a folder with one of them, or a file",
                path.display()
            )));
        }
        Ok(pretrained)
    }

    /// The names of its tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether all parameters of `graph` can be read by `map`, and everything in the checkpoint is
    /// either read or known to be of no use.
    ///
    /// # Errors
    /// `Invalid` for a missing tensor or another shape, naming both sides; `Unsupported` for element
    /// types without a conversion and for tensors that the model has no place for.
    pub fn check(&self, map: &WeightMap, graph: &Graph) -> Result<()> {
        let mut read = BTreeSet::new();
        for id in graph.params() {
            let tensor = graph.tensor(id);
            let source = self.source(map, &tensor.name, &tensor.ty)?;
            for name in &source.names {
                read.insert(self.entry(map, source, name, &tensor.name, &tensor.ty)?.0);
            }
        }
        for name in self.names().filter(|name| !read.contains(name)) {
            let is_known = |prefix: &String| {
                let name = name.strip_prefix(prefix.as_str());
                name.is_some_and(|name| map.ignores(name))
            };
            if !map.prefixes.iter().any(is_known) {
                return Err(Error::Unsupported(format!(
                    "checkpoint {}: the model has no place for tensor `{name}`; its config does not describe this checkpoint",
                    self.path.display()
                )));
            }
        }
        Ok(())
    }

    /// A region (one interval a dim) of parameter `param` of type `ty`, row-major.
    ///
    /// # Errors
    /// Those of [`Pretrained::check`] for this parameter; `Invalid` when a file cannot be read.
    pub fn read(
        &self,
        map: &WeightMap,
        param: &str,
        ty: &TensorType,
        region: &[Interval],
    ) -> Result<Vec<f32>> {
        let source = self.source(map, param, ty)?;
        let mut order = Vec::new();
        source
            .for_each(region, |tensor, element| order.push((tensor, element)))
            .map_err(|error| Error::Internal(format!("parameter `{param}`: {error}")))?;
        // Each tensor is read once; its elements go to their places.
        let mut values = vec![0.0; order.len()];
        let wanted: BTreeSet<usize> = order.iter().map(|(tensor, _)| *tensor).collect();
        for tensor_idx in wanted {
            let name = &source.names[tensor_idx];
            let (_, entry) = self.entry(map, source, name, param, ty)?;
            let bytes = self.bytes(entry)?;
            for (value, (tensor, element)) in values.iter_mut().zip(&order) {
                if *tensor == tensor_idx {
                    *value = element_at(entry.dtype, &bytes, *element).unwrap_or(f32::NAN);
                }
            }
        }
        Ok(values)
    }

    /// All of parameter `param`, row-major.
    ///
    /// # Errors
    /// Those of [`Pretrained::read`].
    pub fn read_all(&self, map: &WeightMap, param: &str, ty: &TensorType) -> Result<Vec<f32>> {
        let whole = |&(_, len): &(_, usize)| Interval { start: 0, len };
        let region: Vec<_> = ty.shape.iter().map(whole).collect();
        self.read(map, param, ty, &region)
    }

    /// A tensor of the checkpoint by its own name: its shape and elements. Integers of 32 bits are
    /// read too, exactly up to 2^24.
    ///
    /// # Errors
    /// `Invalid` when there is none; `Unsupported` for element types without a conversion.
    pub fn tensor(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        let entry = self
            .entries
            .get(name)
            .ok_or_else(|| self.missing(name, ""))?;
        if entry.dtype != Dtype::I32 {
            check_dtype(name, entry.dtype)?;
        }
        let bytes = self.bytes(entry)?;
        let n = entry.shape.iter().product();
        let values = (0..n).map(|at| element_at(entry.dtype, &bytes, at).unwrap_or(f32::NAN));
        Ok((entry.shape.clone(), values.collect()))
    }

    fn add_file(&mut self, path: &Path, indexed: Option<&BTreeSet<&str>>) -> Result<()> {
        let invalid = |what: String| {
            Error::Invalid(format!(
                "{}: {what}: the file is damaged or not safetensors; download it again",
                path.display()
            ))
        };
        let mut file = File::open(path).map_err(|error| unreadable(path, &error))?;
        let n_bytes = file
            .metadata()
            .map_err(|error| unreadable(path, &error))?
            .len();
        let mut n_header = [0; 8];
        file.read_exact(&mut n_header)
            .map_err(|_| invalid(format!("{n_bytes} bytes are too few for a header")))?;
        let n_header = u64::from_le_bytes(n_header);
        let data_start = n_header.saturating_add(8);
        if n_header > MAX_HEADER_BYTES || data_start > n_bytes {
            return Err(invalid(format!(
                "a header of {n_header} bytes is announced in a file of {n_bytes}"
            )));
        }
        let mut header = vec![0; n_header as usize];
        file.read_exact(&mut header)
            .map_err(|error| unreadable(path, &error))?;
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|error| invalid(format!("header: {error}")))?;
        let file_idx = self.files.len();
        self.files.push(path.to_owned());
        for (name, info) in metadata.tensors() {
            let (begin, end) = info.data_offsets;
            let n_bits = info
                .shape
                .iter()
                .try_fold(info.dtype.bitsize(), |n, size| n.checked_mul(*size));
            let expected = n_bits.map(|n_bits| n_bits / 8);
            let fits = begin <= end && (end as u64).saturating_add(data_start) <= n_bytes;
            if !fits || expected != Some(end - begin) {
                return Err(invalid(format!(
                    "tensor `{name}` ({:?} {:?}) is said to be bytes {begin} to {end} of {}",
                    info.dtype,
                    info.shape,
                    n_bytes - data_start
                )));
            }
            if indexed.is_some_and(|indexed| !indexed.contains(name.as_str())) {
                continue;
            }
            let entry = Entry {
                file_idx,
                dtype: info.dtype,
                shape: info.shape.clone(),
                start: data_start + begin as u64,
                n_bytes: end - begin,
            };
            self.entries.insert(name, entry);
        }
        match indexed.and_then(|names| names.iter().find(|name| !self.entries.contains_key(**name)))
        {
            None => Ok(()),
            Some(missing) => Err(Error::Invalid(format!(
                "{} lacks tensor `{missing}`, which `{INDEX}` says it has: download both again",
                path.display()
            ))),
        }
    }

    fn source<'a>(
        &self,
        map: &'a WeightMap,
        param: &str,
        ty: &TensorType,
    ) -> Result<&'a WeightSource> {
        let source = map.sources.get(param).ok_or_else(|| {
            Error::Invalid(format!(
                "the weight map says nothing about parameter `{param}`: compile the model again"
            ))
        })?;
        source
            .check(ty)
            .map_err(|error| Error::Invalid(format!("parameter `{param}`: {error}")))?;
        Ok(source)
    }

    fn entry<'a>(
        &'a self,
        map: &WeightMap,
        source: &WeightSource,
        name: &str,
        param: &str,
        ty: &TensorType,
    ) -> Result<(&'a str, &'a Entry)> {
        let (found, entry) = map
            .prefixes
            .iter()
            .find_map(|prefix| self.entries.get_key_value(&format!("{prefix}{name}")))
            .ok_or_else(|| self.missing(name, &format!(" for parameter `{param}` ({ty})")))?;
        if entry.shape != source.shape {
            return Err(Error::Invalid(format!(
                "checkpoint {}: tensor `{found}` is {:?}, parameter `{param}` ({ty}) needs {:?}: the config is of another model",
                self.path.display(),
                entry.shape,
                source.shape
            )));
        }
        check_dtype(found, entry.dtype)?;
        Ok((found, entry))
    }

    fn missing(&self, name: &str, wanted_for: &str) -> Error {
        let hint = did_you_mean(name, self.names()).map(|hint| format!("; {hint}"));
        Error::Invalid(format!(
            "checkpoint {} has no tensor `{name}`{wanted_for}{}",
            self.path.display(),
            hint.unwrap_or_default()
        ))
    }

    fn bytes(&self, entry: &Entry) -> Result<Vec<u8>> {
        let path = &self.files[entry.file_idx];
        let mut file = File::open(path).map_err(|error| unreadable(path, &error))?;
        let mut bytes = vec![0; entry.n_bytes];
        file.seek(SeekFrom::Start(entry.start))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|error| unreadable(path, &error))?;
        Ok(bytes)
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    Error::Invalid(format!("cannot read {}: {error}", path.display()))
}

fn check_dtype(name: &str, dtype: Dtype) -> Result<()> {
    match dtype {
        Dtype::F32 | Dtype::F64 | Dtype::BF16 | Dtype::F16 => Ok(()),
        _ => Err(Error::Unsupported(format!(
            "tensor `{name}` is stored as {dtype:?}; F32, F64, BF16 and F16 can be read"
        ))),
    }
}

/// Element `at` of row-major little-endian data, rounded to f32; `None` beyond its end.
fn element_at(dtype: Dtype, bytes: &[u8], at: usize) -> Option<f32> {
    fn word<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
        bytes.get(at * N..)?.first_chunk().copied()
    }
    match dtype {
        Dtype::F32 => word(bytes, at).map(f32::from_le_bytes),
        Dtype::I32 => word(bytes, at).map(|bytes| i32::from_le_bytes(bytes) as f32),
        Dtype::F64 => word(bytes, at).map(|bytes| f64::from_le_bytes(bytes) as f32),
        Dtype::BF16 => {
            word(bytes, at).map(|word| f32::from_bits(u32::from(u16::from_le_bytes(word)) << 16))
        }
        Dtype::F16 => word(bytes, at).map(|word| f16_to_f32(u16::from_le_bytes(word))),
        _ => None,
    }
}

/// IEEE 754 half precision, exactly.
fn f16_to_f32(bits: u16) -> f32 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let exponent = i32::from(bits >> 10 & 0x1F);
    let fraction = f32::from(bits & 0x3FF);
    match exponent {
        0 => sign * fraction * 2.0_f32.powi(-24),
        31 if fraction == 0.0 => sign * f32::INFINITY,
        31 => f32::NAN,
        _ => sign * (1.0 + fraction / 1024.0) * 2.0_f32.powi(exponent - 15),
    }
}

#[cfg(test)]
mod tests;
