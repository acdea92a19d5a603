//! Waits for what ranks do together outside of their communicators.
//!
//! In: how to see whether it is done. Out: when it is, or who has not come so far. Invariant: every such
//! wait has an end, and a failure of one rank ends those of all.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::ThreadCommunicator;
use crate::collective::Communicator;
use crate::error::{Error, Result};

/// Between two looks at something that does not wake who waits for it.
const GLANCE: Duration = Duration::from_micros(50);

impl ThreadCommunicator {
    /// As [`Communicator::attend`].
    pub(super) fn wait_outside(
        &mut self,
        what: &str,
        step: u64,
        usual: Duration,
        is_done: &mut dyn FnMut(&mut dyn Communicator) -> Result<bool>,
    ) -> Result<()> {
        self.world.attending[self.rank].store(step, Ordering::SeqCst);
        let (started, patience) = (Instant::now(), self.world.options.timeout + usual);
        loop {
            self.world.check()?;
            let error = match is_done(self) {
                Ok(true) => break,
                Ok(false) if started.elapsed() < patience => {
                    std::thread::sleep(GLANCE);
                    continue;
                }
                Ok(false) => {
                    let missing = self.world.attending.iter().enumerate();
                    let missing = missing.filter(|(_, at)| at.load(Ordering::SeqCst) < step);
                    let missing: Vec<String> = missing.map(|(rank, _)| rank.to_string()).collect();
                    Error::Exhausted(format!(
                        "{what}: rank {} waited {:.1} s, {}",
                        self.rank,
                        started.elapsed().as_secs_f64(),
                        match missing.as_slice() {
                            [] => "all ranks have arrived, and it does not end".to_string(),
                            missing =>
                                format!("for rank {}, which did not arrive", missing.join(", ")),
                        }
                    ))
                }
                Err(error) => error,
            };
            self.world.fail(&error);
            return Err(error);
        }
        self.stats.wait_s += started.elapsed().as_secs_f64();
        Ok(())
    }
}
