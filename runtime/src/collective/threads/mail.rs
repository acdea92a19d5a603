//! Messages between two threads, in bounded buffers.
//!
//! In: copies of the senders' tensors. Out: the same, in order, for each pair and direction.
//! Invariant: a channel of depth k never holds more than k messages, the one being copied out
//! included: a message needs one of the channel's k buffers, which comes back once it is received.
//! Pairs without an opened channel take as many messages as are sent.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use meshweave_dsl::program::Channel;

use super::{World, lock};
use crate::error::{Error, Result};

/// The channels by (from, to).
pub(super) type Mail = BTreeMap<(usize, usize), Mailbox>;

#[derive(Default)]
pub(super) struct Mailbox {
    is_bounded: bool,
    /// Sent and not received, oldest first.
    queue: VecDeque<Vec<u32>>,
    /// Buffers that no message is in.
    spare: Vec<Vec<u32>>,
}

impl World {
    /// Gives a channel its buffers.
    ///
    /// # Errors
    /// `Invalid` when it takes no message or names ranks that do not exist.
    pub fn open_channel(&self, channel: &Channel) -> Result<()> {
        let Channel {
            from,
            to,
            depth,
            n_bytes,
        } = *channel;
        if depth == 0 || from.max(to) >= self.n_ranks {
            return Err(Error::Invalid(format!(
                "damaged program: a channel of depth {depth} from rank {from} to rank {to} of {}; \
                 compile again",
                self.n_ranks
            )));
        }
        let mailbox = Mailbox {
            is_bounded: true,
            queue: VecDeque::with_capacity(depth),
            spare: (0..depth)
                .map(|_| Vec::with_capacity(n_bytes.div_ceil(4)))
                .collect(),
        };
        lock(&self.mail).insert((from, to), mailbox);
        Ok(())
    }

    /// Puts a copy of `src` into the channel; returns the seconds waited for room.
    pub(super) fn post(&self, from: usize, to: usize, src: &[u32]) -> Result<f64> {
        let take = |mailbox: &mut Mailbox| {
            let fresh = (!mailbox.is_bounded).then(Vec::new);
            mailbox.spare.pop().or(fresh)
        };
        let (mut buffer, wait_s) = self.wait_for(from, (from, to), "send", take)?;
        buffer.clear();
        buffer.extend_from_slice(src);
        lock(&self.mail)
            .entry((from, to))
            .or_default()
            .queue
            .push_back(buffer);
        self.wake(to);
        Ok(wait_s)
    }

    /// Copies the channel's oldest message with `receive`; returns its result and the seconds waited.
    pub(super) fn fetch<T>(
        &self,
        from: usize,
        to: usize,
        receive: impl FnOnce(&[u32]) -> Result<T>,
    ) -> Result<(T, f64)> {
        let take = |mailbox: &mut Mailbox| mailbox.queue.pop_front();
        let (buffer, wait_s) = self.wait_for(to, (from, to), "recv", take)?;
        let received = receive(&buffer)?;
        lock(&self.mail)
            .entry((from, to))
            .or_default()
            .spare
            .push(buffer);
        self.wake(from);
        Ok((received, wait_s))
    }

    /// What `take` finds in the mailbox, waiting on the thread of `rank` until it does.
    fn wait_for(
        &self,
        rank: usize,
        pair: (usize, usize),
        call: &str,
        take: impl Fn(&mut Mailbox) -> Option<Vec<u32>>,
    ) -> Result<(Vec<u32>, f64)> {
        self.check()?;
        if let Some(buffer) = take(lock(&self.mail).entry(pair).or_default()) {
            return Ok((buffer, 0.0));
        }
        let started = Instant::now();
        self.register(rank);
        loop {
            self.check()?;
            if let Some(buffer) = take(lock(&self.mail).entry(pair).or_default()) {
                return Ok((buffer, started.elapsed().as_secs_f64()));
            }
            let waited = started.elapsed();
            if waited >= self.options.timeout {
                let (what, peer) = if call == "send" {
                    ("no room in the channel to", pair.1)
                } else {
                    ("nothing from", pair.0)
                };
                let error = Error::Exhausted(format!(
                    "{} on rank {rank}: {what} rank {peer} after {:.1} s",
                    self.describe(call, rank),
                    waited.as_secs_f64()
                ));
                self.fail(&error);
                return Err(error);
            }
            std::thread::park_timeout(self.options.timeout - waited);
        }
    }

    fn wake(&self, rank: usize) {
        if let Some(thread) = &*lock(&self.threads[rank]) {
            thread.unpark();
        }
    }
}
