//! Rehearsed failures: what a rank does at an instruction, to see how the others take it.
//!
//! In: `RANK:STEP:INSTRUCTION:WHAT`. Out: a drill for a session. Invariant: a drill happens once: on a GPU,
//! where all instructions of a step are started at once, before the step.

use std::str::FromStr;
use std::time::Duration;

use super::place::{Placed, PlacedPart, Words, is_kept};
use super::{Rank, Session, lock};
use crate::error::{Error, Result};

/// A failure at a certain instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drill {
    pub rank: usize,
    /// Counted from 1; 0 is before the ranks join their groups.
    pub step: usize,
    pub instruction: usize,
    pub what: Mishap,
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mishap {
    /// The process is killed.
    Kill,
    /// The process is stopped, as by a debugger or a machine that hangs.
    Stop,
    /// The rank takes this much longer.
    Slow(Duration),
    /// Bits of its memory flip.
    Diverge,
}

impl FromStr for Drill {
    type Err = Error;

    fn from_str(text: &str) -> Result<Drill> {
        let refused = || {
            Error::Invalid(format!(
                "`{text}` is no drill; write RANK:STEP:INSTRUCTION:WHAT, WHAT being kill, stop, \
                 slow=SECONDS or diverge, as in 3:2:17:slow=4"
            ))
        };
        let parts: Vec<&str> = text.split(':').collect();
        let [rank, step, instruction, what] = parts[..] else {
            return Err(refused());
        };
        let number = |text: &str| text.parse::<usize>().map_err(|_| refused());
        let slow = |seconds: &str| match seconds.parse::<f64>() {
            Ok(seconds) if (0.0..1e6).contains(&seconds) => {
                Ok(Mishap::Slow(Duration::from_secs_f64(seconds)))
            }
            _ => Err(refused()),
        };
        let what = match (what, what.strip_prefix("slow=")) {
            (_, Some(seconds)) => slow(seconds)?,
            ("kill", _) => Mishap::Kill,
            ("stop", _) => Mishap::Stop,
            ("diverge", _) => Mishap::Diverge,
            _ => return Err(refused()),
        };
        Ok(Drill {
            rank: number(rank)?,
            step: number(step)?,
            instruction: number(instruction)?,
            what,
        })
    }
}

impl Drill {
    /// Does what is rehearsed before the ranks join their groups, if it is that, on `rank`.
    pub fn before_groups(&self, rank: usize) {
        if (self.rank, self.step) == (rank, 0) {
            self.what.befall();
        }
    }
}

/// A drill, and the word that flips when it is about divergence.
pub(super) struct PlacedDrill {
    pub(super) drill: Drill,
    pub(super) at: *mut u32,
}

impl Session {
    /// Lets a rank rehearse a failure, if it is one of this process.
    ///
    /// # Errors
    /// `Invalid` when the program has no such rank or instruction.
    pub fn rehearse(&mut self, drill: &Drill) -> Result<()> {
        let program = self.program.ranks.get(drill.rank);
        let n_instructions = program.map_or(0, |program| program.instructions.len());
        if drill.instruction >= n_instructions {
            return Err(Error::Invalid(format!(
                "the drill is for instruction {} of rank {}, which has {n_instructions}; the program has \
                 {} ranks",
                drill.instruction,
                drill.rank,
                self.program.ranks.len()
            )));
        }
        // What diverges is best something that another rank holds too.
        let shared = |placed: &&Placed, here: &&PlacedPart| {
            let parts = &placed.tensor.parts;
            let same = parts
                .iter()
                .filter(|part| part.region == parts[here.part_idx].region);
            same.count() > 1
        };
        let kept = self.sources.iter().filter(|placed| is_kept(&placed.tensor));
        let mut held = kept.flat_map(|placed| {
            let parts = placed.parts.iter().filter(|here| here.rank == drill.rank);
            parts.map(move |here| (placed, here))
        });
        let first = held.clone().next();
        let chosen = held.find(|(placed, here)| shared(placed, here)).or(first);
        let Some((placed, here)) = chosen else {
            return Ok(());
        };
        let drill = drill.clone();
        let Words::Here(at) = here.words else {
            let buffer = placed.tensor.parts[here.part_idx].buffer;
            self.gpu_drill = Some((drill, buffer));
            return Ok(());
        };
        for rank in &self.ranks {
            let mut rank = lock(rank);
            if rank.rank == drill.rank {
                let drill = drill.clone();
                rank.drill = Some(PlacedDrill { drill, at });
            }
        }
        Ok(())
    }

    /// Does what is rehearsed before this step on a GPU, once.
    ///
    /// # Errors
    /// Those of the device.
    pub(super) fn rehearse_on_gpu(&mut self) -> Result<()> {
        let next = self.n_steps + 1;
        let Some((drill, buffer)) = self.gpu_drill.take_if(|(drill, _)| drill.step == next) else {
            return Ok(());
        };
        if drill.what != Mishap::Diverge {
            drill.what.befall();
            return Ok(());
        }
        let Some(gpu) = &self.gpu else { return Ok(()) };
        let (mut gpu, mut word, at) = (lock(gpu), [0], (drill.rank, buffer));
        gpu.read(&self.program, at, &mut word)?;
        gpu.write(&self.program, at, &[word[0] ^ 1])
    }
}

impl Mishap {
    /// What concerns the process befalls it.
    fn befall(self) {
        match self {
            // SAFETY: raising a signal in the own process.
            Self::Kill => drop(unsafe { libc::raise(libc::SIGKILL) }),
            // SAFETY: as above.
            Self::Stop => drop(unsafe { libc::raise(libc::SIGSTOP) }),
            Self::Slow(time) => std::thread::sleep(time),
            Self::Diverge => {}
        }
    }
}

impl Rank {
    /// Does what is rehearsed, once.
    pub(super) fn fail_as_rehearsed(&mut self) {
        let Some(drill) = self.drill.take() else {
            return;
        };
        if drill.drill.what == Mishap::Diverge {
            // SAFETY: the first word of a parameter or state in this rank's arena, which runs on
            // this thread alone.
            unsafe { *drill.at ^= 1 }
        }
        drill.drill.what.befall();
    }
}
