//! What a sharded checkpoint's folder holds, in its `manifest.json`.
//!
//! In: the tensors' parts and the marks of the files. Out: the text, and back.
//! Invariant: the manifest is written last and checks itself: with it, the folder is complete.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::layout::Interval;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

pub(super) const MANIFEST: &str = "manifest.json";
const FORMAT: &str = "meshweave-checkpoint";
const VERSION: u32 = 1;

/// Where a run is in its data: batches are functions of their step, so the step and the source say all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataOrder {
    /// What [`crate::data::DataSource::identity`] says.
    pub source: String,
    /// Sequences of a step.
    pub n_batch: usize,
    /// Tokens of a sequence.
    pub n_seq: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// Steps done; the next batch is the one of this number, counted from 0.
    pub(super) n_steps: usize,
    pub(super) data: DataOrder,
    /// The plan's mesh, for people.
    pub(super) mesh: String,
    pub(super) files: Vec<FileMark>,
    pub(super) tensors: Vec<Tensor>,
}

/// A file and what it must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileMark {
    pub(super) name: String,
    pub(super) n_bytes: u64,
    /// [`checksum`] in hexadecimal digits.
    pub(super) hash: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) ty: TensorType,
    /// Each element lies in exactly one part.
    pub(super) parts: Vec<StoredPart>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredPart {
    pub(super) file: String,
    /// The tensor's name inside of the file.
    pub(super) key: String,
    pub(super) region: Vec<Interval>,
}

#[derive(Serialize, Deserialize)]
struct Signed<T> {
    format: String,
    version: u32,
    /// Of the body's text.
    checksum: String,
    body: T,
}

impl Manifest {
    /// Writes it into a folder, to the disk.
    pub(super) fn write(&self, folder: &Path) -> std::io::Result<()> {
        let signed = Signed {
            format: FORMAT.into(),
            version: VERSION,
            checksum: self.checksum()?,
            body: self,
        };
        let mut file = File::create(folder.join(MANIFEST))?;
        file.write_all(&serde_json::to_vec(&signed)?)?;
        file.sync_all()
    }

    /// Reads it from a folder.
    ///
    /// # Errors
    /// `Invalid` when it is missing, damaged, or of another version.
    pub(super) fn read(folder: &Path) -> Result<Manifest> {
        let invalid =
            |what: String| Error::Invalid(format!("the checkpoint {} {what}", folder.display()));
        let bytes = fs::read(folder.join(MANIFEST)).map_err(|error| {
            invalid(format!(
                "is not complete: {MANIFEST} cannot be read ({error})"
            ))
        })?;
        let damaged =
            |error: &dyn std::fmt::Display| invalid(format!("has a damaged {MANIFEST} ({error})"));
        let signed: Signed<Manifest> =
            serde_json::from_slice(&bytes).map_err(|error| damaged(&error))?;
        if signed.format != FORMAT || signed.version != VERSION {
            return Err(invalid(format!(
                "is of format {} version {}, this meshweave reads {FORMAT} version {VERSION}",
                signed.format, signed.version
            )));
        }
        let found = signed.body.checksum().map_err(|error| damaged(&error))?;
        if found != signed.checksum {
            let what = format!("its checksum is {found}, it says {}", signed.checksum);
            return Err(damaged(&what));
        }
        Ok(signed.body)
    }

    /// Of its text, which is the same for the same manifest.
    fn checksum(&self) -> std::result::Result<String, serde_json::Error> {
        let text = serde_json::to_vec(self)?;
        Ok(format!("{:016x}", checksum(&text)))
    }
}

/// The folder of the checkpoint after so many steps.
pub(super) fn folder_name(n_steps: usize) -> String {
    format!("step-{n_steps:08}")
}

/// Where it is made before it is whole.
pub(super) fn unfinished_name(n_steps: usize) -> String {
    format!(".{}.unfinished", folder_name(n_steps))
}

/// A checkpoint's folder itself, or those inside of a folder, the newest first.
///
/// # Errors
/// `Invalid` when the folder cannot be read.
pub(super) fn newest_first(path: &Path) -> Result<Vec<PathBuf>> {
    if path.join(MANIFEST).exists() {
        return Ok(vec![path.to_path_buf()]);
    }
    let unreadable =
        |error: std::io::Error| Error::Invalid(format!("cannot read {}: {error}", path.display()));
    let mut found = Vec::new();
    for entry in fs::read_dir(path).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let n_steps = name
            .strip_prefix("step-")
            .and_then(|digits| digits.parse::<usize>().ok());
        found.extend(n_steps.map(|n_steps| (n_steps, entry.path())));
    }
    found.sort_by_key(|(n_steps, _)| std::cmp::Reverse(*n_steps));
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// FNV-1a of 64 bits over little-endian words of 8 bytes, the last one filled with zeros, then the length.
/// Each step is a bijection of the state, so any change within one word changes the result.
pub(super) fn checksum(bytes: &[u8]) -> u64 {
    let fold = |hash: u64, word: u64| (hash ^ word).wrapping_mul(0x0100_0000_01B3);
    let chunks = bytes.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    });
    fold(chunks.fold(0xCBF2_9CE4_8422_2325, fold), bytes.len() as u64)
}
