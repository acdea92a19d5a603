//! A barrier that parks, can fail while it opens, and cannot while it closes.
//!
//! In: the arrival of each member. Out: all pass together, or (opening only) none does.
//! Invariant: generation and number of arrivals change in one atomic word, so that a member that
//! gives up and the member that would complete the round never both succeed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{World, lock};
use crate::error::{Error, Result};

pub(super) struct Barrier {
    /// The members' ranks in the world.
    ranks: Vec<usize>,
    /// Generation in the high half, arrivals of this round in the low half.
    word: AtomicU64,
    /// Rounds each member has arrived at, to tell who is missing.
    arrivals: Vec<AtomicU64>,
    /// Members that are parked or about to be.
    parked: Vec<AtomicBool>,
}

/// The longest park of a barrier whose members are all on their way.
const PATIENCE: Duration = Duration::from_secs(1);

impl Barrier {
    pub(super) fn new(ranks: &[usize]) -> Barrier {
        Barrier {
            ranks: ranks.to_vec(),
            word: AtomicU64::new(0),
            arrivals: ranks.iter().map(|_| AtomicU64::new(0)).collect(),
            parked: ranks.iter().map(|_| AtomicBool::new(false)).collect(),
        }
    }

    /// Waits for all members to arrive at `call`; returns the seconds waited.
    ///
    /// # Errors
    /// The world's failure, or `Exhausted` after the world's timeout, naming who did not arrive;
    /// then this member has withdrawn and no member passes.
    pub(super) fn open(&self, world: &World, member_idx: usize, call: &str) -> Result<f64> {
        let Some(generation) = self.arrive(world, member_idx) else {
            return Ok(0.0);
        };
        let started = Instant::now();
        if self.spin(world, generation) {
            return Ok(started.elapsed().as_secs_f64());
        }
        world.register(self.ranks[member_idx]);
        while self.must_park(member_idx, generation) {
            let waited = started.elapsed();
            let failure = match world.failure() {
                Some(error) => Some(error),
                None if waited >= world.options.timeout => {
                    Some(self.missing(world, member_idx, call, waited))
                }
                None => None,
            };
            match failure {
                Some(error) if self.withdraw(generation) => {
                    self.parked[member_idx].store(false, Ordering::SeqCst);
                    world.fail(&error);
                    return Err(error);
                }
                // The round completed first: all are inside, the failure shows at the next call.
                Some(_) => break,
                None => std::thread::park_timeout(world.options.timeout - waited),
            }
        }
        self.parked[member_idx].store(false, Ordering::SeqCst);
        Ok(started.elapsed().as_secs_f64())
    }

    /// Waits for all members, which are known to be on their way; returns the seconds waited.
    pub(super) fn cross(&self, world: &World, member_idx: usize) -> f64 {
        let Some(generation) = self.arrive(world, member_idx) else {
            return 0.0;
        };
        let started = Instant::now();
        if !self.spin(world, generation) {
            world.register(self.ranks[member_idx]);
            while self.must_park(member_idx, generation) {
                std::thread::park_timeout(PATIENCE);
            }
            self.parked[member_idx].store(false, Ordering::SeqCst);
        }
        started.elapsed().as_secs_f64()
    }

    /// Counts this member in. The last one completes the round, wakes the others and gets `None`.
    fn arrive(&self, world: &World, member_idx: usize) -> Option<u64> {
        self.arrivals[member_idx].fetch_add(1, Ordering::Relaxed);
        let mut word = self.word.load(Ordering::SeqCst);
        loop {
            let (generation, n_arrived) = (word >> 32, word & 0xFFFF_FFFF);
            let last = n_arrived as usize + 1 == self.ranks.len();
            let next = if last {
                generation.wrapping_add(1) << 32
            } else {
                word + 1
            };
            let exchange =
                self.word
                    .compare_exchange_weak(word, next, Ordering::SeqCst, Ordering::SeqCst);
            match exchange {
                Ok(_) if last => break,
                Ok(_) => return Some(generation),
                Err(current) => word = current,
            }
        }
        for (parked, rank) in self.parked.iter().zip(&self.ranks) {
            // A member sets its flag before it looks at the word a last time: it sees the new round,
            // or this sees its flag.
            if parked.swap(false, Ordering::SeqCst)
                && let Some(thread) = &*lock(&world.threads[*rank])
            {
                thread.unpark();
            }
        }
        None
    }

    fn passed(&self, generation: u64) -> bool {
        self.word.load(Ordering::SeqCst) >> 32 != generation
    }

    fn spin(&self, world: &World, generation: u64) -> bool {
        for _ in 0..world.options.n_spins {
            if self.passed(generation) {
                return true;
            }
            std::hint::spin_loop();
        }
        self.passed(generation)
    }

    /// Raises this member's flag, then looks whether the round is over.
    ///
    /// The flag is raised before *every* park: a releaser of the round before may still be lowering
    /// flags, and its wake-up must not cost the one of this round.
    fn must_park(&self, member_idx: usize, generation: u64) -> bool {
        self.parked[member_idx].store(true, Ordering::SeqCst);
        !self.passed(generation)
    }

    /// Takes the arrival back; false when the round completed first.
    fn withdraw(&self, generation: u64) -> bool {
        let mut word = self.word.load(Ordering::SeqCst);
        while word >> 32 == generation {
            let exchange =
                self.word
                    .compare_exchange_weak(word, word - 1, Ordering::SeqCst, Ordering::SeqCst);
            match exchange {
                Ok(_) => return true,
                Err(current) => word = current,
            }
        }
        false
    }

    fn missing(&self, world: &World, member_idx: usize, call: &str, waited: Duration) -> Error {
        let own = self.arrivals[member_idx].load(Ordering::Relaxed);
        let missing: Vec<String> = (self.ranks.iter().zip(&self.arrivals))
            .filter(|(_, arrivals)| arrivals.load(Ordering::Relaxed) < own)
            .map(|(rank, _)| rank.to_string())
            .collect();
        Error::Exhausted(format!(
            "{} of group {:?}: rank {} waited {:.1} s for rank {}, which did not arrive; raise the \
             timeout if the machine is slow",
            world.describe(call, self.ranks[member_idx]),
            self.ranks,
            self.ranks[member_idx],
            waited.as_secs_f64(),
            missing.join(", ")
        ))
    }
}
