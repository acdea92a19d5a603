//! Makes checkpoints while a session runs on, and keeps the newest ones.
//!
//! In: a session between steps. Out: folders `step-…`, each whole, the oldest removed.
//! Invariant: a folder gets its name only when every rank's file and the manifest are on the disk; a
//! failure to write leaves all earlier checkpoints as they are.
//!
//! Between two steps the parts are copied; a thread writes them during the next ones. Where ranks are
//! processes, all call the same methods between the same steps and exchange [`Report`]s; the one with rank
//! 0 writes the manifest and gives the name.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};

use super::manifest::{
    DataOrder, FileMark, Manifest, StoredPart, Tensor, folder_name, newest_first, unfinished_name,
};
use super::shards::{Piece, file_name, key, write};
use crate::error::{Error, Result};
use crate::executor::{Session, holders, is_kept};

/// What has become of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is whole, in this folder.
    Made(PathBuf),
    /// It could not be written; all earlier ones are as they were.
    Failed(String),
}

/// What a process says of its part of the checkpoint under way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// `None` while it is being written.
    done: Option<std::result::Result<Vec<FileMark>, String>>,
}

/// The checkpoints of a run.
pub struct Keeper {
    folder: PathBuf,
    /// How many to keep; 0 is all.
    n_kept: usize,
    /// Whether this process gives names and removes.
    leads: bool,
    pending: Option<Pending>,
}

struct Pending {
    manifest: Manifest,
    writer: Option<JoinHandle<Written>>,
    report: Report,
}

type Written = std::result::Result<Vec<FileMark>, String>;

impl Keeper {
    /// Keeps checkpoints in `folder`, `n_kept` of them (0: all).
    pub fn new(folder: &Path, n_kept: usize, session: &Session) -> Keeper {
        Keeper {
            folder: folder.to_path_buf(),
            n_kept,
            leads: session.ranks().contains(&0),
            pending: None,
        }
    }

    /// Whether a checkpoint is under way.
    pub fn is_busy(&self) -> bool {
        self.pending.is_some()
    }

    /// Copies the session's parameters and states and begins to write them. The checkpoint before must
    /// have come to its end.
    ///
    /// # Errors
    /// `Internal` when it has not; `Exhausted` when no thread can be started.
    pub fn begin(&mut self, session: &Session, data: &DataOrder) -> Result<()> {
        if self.pending.is_some() {
            return Err(Error::Internal(
                "a checkpoint begins while another one is being written".into(),
            ));
        }
        let n_steps = session.n_steps();
        let pieces = session.pieces()?;
        let ranks = session.ranks();
        let folder = self.folder.join(unfinished_name(n_steps));
        let write_all = move || -> Written {
            let mut marks = Vec::with_capacity(ranks.len());
            let mut rest = pieces;
            for rank in ranks {
                let (own, others): (Vec<Piece>, Vec<Piece>) =
                    rest.into_iter().partition(|piece| piece.rank == rank);
                rest = others;
                marks.push(write(&folder, rank, &own)?);
            }
            Ok(marks)
        };
        let writer = std::thread::Builder::new()
            .name("checkpoint".into())
            .spawn(write_all);
        let writer = writer.map_err(|error| {
            Error::Exhausted(format!(
                "cannot start the thread that writes checkpoints: {error}"
            ))
        })?;
        self.pending = Some(Pending {
            manifest: manifest(session, data),
            writer: Some(writer),
            report: Report::default(),
        });
        Ok(())
    }

    /// How far this process is; with `wait`, when its files are written.
    pub fn report(&mut self, wait: bool) -> Report {
        let Some(pending) = &mut self.pending else {
            return Report::default();
        };
        let ready = |writer: &JoinHandle<Written>| wait || writer.is_finished();
        if pending.writer.as_ref().is_some_and(ready)
            && let Some(writer) = pending.writer.take()
        {
            let written = writer.join();
            pending.report.done =
                Some(written.unwrap_or_else(|_| Err("the thread that writes it panicked".into())));
        }
        pending.report.clone()
    }

    /// Ends the checkpoint under way when all processes' reports are in: names it, or gives it up.
    pub fn conclude(&mut self, reports: &[Report]) -> Option<Event> {
        if self.pending.is_none() || reports.iter().any(|report| report.done.is_none()) {
            return None;
        }
        let Pending { mut manifest, .. } = self.pending.take()?;
        let n_steps = manifest.n_steps;
        let unfinished = self.folder.join(unfinished_name(n_steps));
        let named = self.folder.join(folder_name(n_steps));
        let mut failures = Vec::new();
        for done in reports.iter().filter_map(|report| report.done.as_ref()) {
            match done {
                Ok(marks) => manifest.files.extend(marks.iter().cloned()),
                Err(error) => failures.push(error.clone()),
            }
        }
        if !self.leads {
            return Some(match failures.first() {
                None => Event::Made(named),
                Some(error) => Event::Failed(error.clone()),
            });
        }
        if failures.is_empty()
            && let Err(error) = self.publish(&manifest, &unfinished, &named)
        {
            failures.push(format!("cannot write {}: {error}", named.display()));
        }
        match failures.first() {
            None => {
                self.remove_old();
                Some(Event::Made(named))
            }
            Some(error) => {
                // Best effort: nobody takes it for a checkpoint.
                let _ = fs::remove_dir_all(&unfinished);
                Some(Event::Failed(error.clone()))
            }
        }
    }

    fn publish(&self, manifest: &Manifest, unfinished: &Path, named: &Path) -> std::io::Result<()> {
        manifest.write(unfinished)?;
        File::open(unfinished)?.sync_all()?;
        if named.exists() {
            // Made by an earlier run that went further than what this one started from.
            let aside = self
                .folder
                .join(format!(".{}.replaced", folder_name(manifest.n_steps)));
            let _ = fs::remove_dir_all(&aside);
            fs::rename(named, &aside)?;
            fs::rename(unfinished, named)?;
            let _ = fs::remove_dir_all(&aside);
        } else {
            fs::rename(unfinished, named)?;
        }
        File::open(&self.folder)?.sync_all()
    }

    fn remove_old(&self) {
        if self.n_kept == 0 {
            return;
        }
        let Ok(all) = newest_first(&self.folder) else {
            return;
        };
        for folder in all.iter().skip(self.n_kept) {
            // Not as a checkpoint that is there in part: the name goes first.
            let name = folder
                .file_name()
                .map(|name| name.to_string_lossy().into_owned());
            let aside = self
                .folder
                .join(format!(".{}.removed", name.unwrap_or_default()));
            if fs::rename(folder, &aside).is_ok() {
                let _ = fs::remove_dir_all(&aside);
            }
        }
    }
}

/// What all of the session's ranks together store.
fn manifest(session: &Session, data: &DataOrder) -> Manifest {
    let program = session.program();
    let kept = program.sources.iter().filter(|source| is_kept(source));
    let tensors = kept.map(|source| Tensor {
        name: source.name.clone(),
        ty: source.ty.clone(),
        parts: holders(source)
            .map(|(part_idx, part)| StoredPart {
                file: file_name(part.rank),
                key: key(&source.name, part_idx),
                region: part.region.clone(),
            })
            .collect(),
    });
    let axes = program.mesh.axes().iter();
    let axes: Vec<String> = axes
        .map(|(axis, degree)| format!("{axis}:{degree}"))
        .collect();
    Manifest {
        n_steps: session.n_steps(),
        data: data.clone(),
        mesh: axes.join(" > "),
        files: Vec::new(),
        tensors: tensors.collect(),
    }
}
