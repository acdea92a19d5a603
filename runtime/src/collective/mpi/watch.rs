//! Who waits where: the conversation of ranks that wait too long.
//!
//! In: what this rank waits for, and the messages of the others on a communicator of their own. Out: the
//! failure of another rank, or a sentence that says who did not arrive and what is known of them.
//! Invariant: nothing is sent while collectives complete in time; a rank that says where it waits is
//! alive, and one that is silent while all others wait is what they wait for.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::mpi::{Handle, Mpi, Status};

/// The tag of all messages of the conversation.
const TAG: c_int = 1;

/// A wait of this length is told to the others, and again each time it has lasted as long.
const FIRST_WORD: Duration = Duration::from_millis(500);

/// What was said longer ago is no sign of life: who waits says so every half second.
const FRESH: Duration = Duration::from_secs(4);

/// What a rank waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Waiting {
    /// Such as "all_reduce `w.grad` (instruction 12 of step 3)".
    pub(super) what: String,
    /// The ranks that take part.
    pub(super) ranks: Vec<usize>,
    /// Which call of its group it is.
    pub(super) number: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Word {
    /// Where the sender waits; the receivers are to answer when asked.
    Waiting { at: Waiting, asks: bool },
    /// The sender has failed.
    Failed { class: u8, text: String },
}

/// This rank's side of the conversation.
pub(super) struct Watch {
    comm: Handle,
    rank: usize,
    n_ranks: usize,
    /// What the others said last since this rank began to wait.
    heard: BTreeMap<usize, (Waiting, Instant)>,
    /// Failures, by the rank that reported them.
    failures: BTreeMap<usize, Error>,
    last_word: Option<Instant>,
    /// Messages that may be under way; never waited for, since their receiver may be gone.
    sent: Vec<(Handle, Vec<u8>)>,
}

impl Watch {
    pub(super) fn new(comm: Handle, rank: usize, n_ranks: usize) -> Watch {
        Watch {
            comm,
            rank,
            n_ranks,
            heard: BTreeMap::new(),
            failures: BTreeMap::new(),
            last_word: None,
            sent: Vec::new(),
        }
    }

    /// Forgets what was heard, and what lies unheard from the time before: a new wait begins.
    pub(super) fn begin(&mut self, mpi: &Mpi) -> Result<()> {
        self.listen(mpi)?;
        self.heard.clear();
        self.last_word = None;
        Ok(())
    }

    /// Listens, and says where this rank waits when it is time to or another asked.
    ///
    /// # Errors
    /// The failure that another rank reports.
    pub(super) fn look(&mut self, mpi: &Mpi, at: &Waiting, waited: Duration) -> Result<()> {
        let asked = self.listen(mpi)?;
        if let Some(error) = self.failures.values().next() {
            return Err(error.clone());
        }
        let due = waited >= FIRST_WORD
            && self
                .last_word
                .is_none_or(|last| last.elapsed() >= FIRST_WORD);
        if due || asked {
            self.last_word = Some(Instant::now());
            let at = at.clone();
            self.say(mpi, &Word::Waiting { at, asks: due })?;
        }
        Ok(())
    }

    /// Tells all others that this rank has failed.
    pub(super) fn fail(&mut self, mpi: &Mpi, error: &Error) {
        if self.failures.contains_key(&self.rank) {
            return;
        }
        let (class, text) = match error {
            Error::Invalid(text) => (0, text),
            Error::Infeasible(text) => (1, text),
            Error::Exhausted(text) => (2, text),
            Error::Unsupported(text) => (3, text),
            Error::Internal(text) => (4, text),
        };
        let word = Word::Failed {
            class,
            text: text.clone(),
        };
        // A rank whose failure came from another one repeats it under the first rank's name only.
        if self.failures.values().any(|known| known == error) {
            return;
        }
        self.failures.insert(self.rank, error.clone());
        // Best effort: who does not hear of it runs into a time-out of its own.
        let _ = self.say(mpi, &word);
    }

    /// Listens for this long, then says which rank's failure is the one to report: that of the lowest rank.
    pub(super) fn settle(&mut self, mpi: &Mpi, patience: Duration) -> Option<(usize, Error)> {
        let started = Instant::now();
        while started.elapsed() < patience {
            if self.listen(mpi).is_err() {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let first = self.failures.iter().next();
        first.map(|(rank, error)| (*rank, error.clone()))
    }

    /// Who is missing from `at`, and why, as far as it is known here.
    pub(super) fn blame(&self, at: &Waiting, waited: Duration, hint: &str) -> Error {
        let heard = |rank: usize| {
            let heard = self.heard.get(&rank);
            heard
                .filter(|(_, when)| when.elapsed() < FRESH)
                .map(|(other, _)| other)
        };
        let arrived = |rank: usize| {
            let same = |other: &Waiting| other.ranks == at.ranks && other.number == at.number;
            rank == self.rank || heard(rank).is_some_and(same)
        };
        let missing: Vec<usize> = at
            .ranks
            .iter()
            .copied()
            .filter(|rank| !arrived(*rank))
            .collect();
        let silent: Vec<usize> = (0..self.n_ranks)
            .filter(|rank| *rank != self.rank && heard(*rank).is_none())
            .collect();
        let mut text = format!(
            "{} of ranks {:?}: rank {} waited {:.1} s",
            at.what,
            at.ranks,
            self.rank,
            waited.as_secs_f64(),
        );
        if missing.is_empty() {
            text += "; all of them have arrived, and it does not end";
            return Error::Exhausted(text + hint);
        }
        text += &format!(" for {}, which did not arrive", listed(&missing));
        for rank in &missing {
            if let Some(other) = heard(*rank) {
                text += &format!(
                    "; rank {rank} waits in {} of ranks {:?}",
                    other.what, other.ranks
                );
            }
        }
        if silent.is_empty() {
            text += "; every rank waits for another: their programs have diverged";
            return Error::Internal(text);
        }
        text += &format!(
            "; {} gave no sign of life: stopped, dead, or busy for longer than the time-out{hint}",
            listed(&silent)
        );
        Error::Exhausted(text)
    }

    /// Takes in what has arrived; true when someone asked for a sign of life.
    fn listen(&mut self, mpi: &Mpi) -> Result<bool> {
        let mut asked = false;
        for from in (0..self.n_ranks).filter(|rank| *rank != self.rank) {
            while let Some(word) = self.receive(mpi, from)? {
                match word {
                    Word::Waiting { at, asks } => {
                        asked |= asks;
                        self.heard.insert(from, (at, Instant::now()));
                    }
                    Word::Failed { class, text } => {
                        let error = match class {
                            0 => Error::Invalid(text),
                            1 => Error::Infeasible(text),
                            3 => Error::Unsupported(text),
                            4 => Error::Internal(text),
                            _ => Error::Exhausted(text),
                        };
                        self.failures.entry(from).or_insert(error);
                    }
                }
            }
        }
        Ok(asked)
    }

    fn receive(&self, mpi: &Mpi, from: usize) -> Result<Option<Word>> {
        let (mut flag, mut status, mut len) = (0, Status::EMPTY, 0);
        let functions = &mpi.functions;
        // SAFETY: the out-parameters are locals; the buffer has the length that the probe found.
        let bytes = unsafe {
            let code = (functions.iprobe)(
                from as c_int,
                TAG,
                self.comm,
                &raw mut flag,
                &raw mut status,
            );
            mpi.check("MPI_Iprobe", code)?;
            if flag == 0 {
                return Ok(None);
            }
            mpi.check(
                "MPI_Get_count",
                (functions.get_count)(&raw const status, mpi.byte, &raw mut len),
            )?;
            let mut bytes = vec![0u8; len.max(0) as usize];
            let buffer = bytes.as_mut_ptr().cast();
            let code = (functions.recv)(
                buffer,
                len,
                mpi.byte,
                from as c_int,
                TAG,
                self.comm,
                &raw mut status,
            );
            mpi.check("MPI_Recv", code)?;
            bytes
        };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            Error::Internal(format!("rank {from} sent an unreadable word: {error}"))
        })
    }

    fn say(&mut self, mpi: &Mpi, word: &Word) -> Result<()> {
        let text = serde_json::to_vec(word)
            .map_err(|error| Error::Internal(format!("a word cannot be written: {error}")))?;
        for to in (0..self.n_ranks).filter(|rank| *rank != self.rank) {
            let (mut request, text) = (Handle::EMPTY, text.clone());
            // SAFETY: the text stays in `sent`, at its address, until the end.
            let code = unsafe {
                (mpi.functions.isend)(
                    text.as_ptr().cast(),
                    text.len() as c_int,
                    mpi.byte,
                    to as c_int,
                    TAG,
                    self.comm,
                    &raw mut request,
                )
            };
            self.sent.push((request, text));
            mpi.check("MPI_Isend", code)?;
        }
        Ok(())
    }
}

fn listed(ranks: &[usize]) -> String {
    let names: Vec<String> = ranks.iter().map(usize::to_string).collect();
    format!("rank {}", names.join(", "))
}
