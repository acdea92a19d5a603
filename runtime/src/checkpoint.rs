//! Checkpoints: parameters, states and the place in the data, to go on from under any plan.
//!
//! In: a session between steps. Out: files, and back into a session, on the same mesh or another one.
//! Invariant: a checkpoint is whole or is none: what is not complete to the last byte is never restored.
//!
//! Two forms: one file of whole tensors ([`save`]), to hand on; and folders of shards, one file a rank,
//! that a [`Keeper`] makes while the session runs on.

mod file;
mod keeper;
mod manifest;
mod shards;

use std::path::Path;

pub use file::{Checkpoint, save, write};
pub use keeper::{Event, Keeper, Report};
pub use manifest::DataOrder;
pub(crate) use shards::{Piece, key, region_type};

use crate::error::{Error, Result};
use crate::executor::Session;

/// What was gone on from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resumed {
    pub n_steps: usize,
    /// Newer checkpoints that are not whole, and why.
    pub passed_over: Vec<String>,
}

/// Gives a session the parameters and states at `path`: a file of [`save`], a checkpoint's folder, or the
/// newest whole one in a folder of checkpoints. `data` is what the session will read: a folder made with
/// other data is refused.
///
/// # Errors
/// `Invalid` when nothing there is whole, or it is of another model or other data; then the session is
/// unchanged.
pub fn restore(session: &mut Session, path: &Path, data: &DataOrder) -> Result<Resumed> {
    if !path.is_dir() {
        file::restore(session, path)?;
        return Ok(Resumed {
            n_steps: session.n_steps(),
            passed_over: Vec::new(),
        });
    }
    let mut passed_over = Vec::new();
    for folder in manifest::newest_first(path)? {
        match shards::Shards::open(&folder) {
            Ok(shards) => {
                shards.restore(session, data)?;
                return Ok(Resumed {
                    n_steps: session.n_steps(),
                    passed_over,
                });
            }
            Err(error) => passed_over.push(error.to_string()),
        }
    }
    Err(Error::Invalid(if passed_over.is_empty() {
        format!("{} holds no checkpoint", path.display())
    } else {
        format!(
            "{} holds no whole checkpoint:\n  {}",
            path.display(),
            passed_over.join("\n  ")
        )
    }))
}
