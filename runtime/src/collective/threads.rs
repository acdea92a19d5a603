//! Collectives between threads of one process, over shared memory.
//!
//! In: the addresses of the members' buffers, published in the group. Out: each member copies or
//! reduces its own part straight from the peers' buffers.
//! Invariant: a member's buffers are read by peers only between the group's opening barrier, which
//! every member passes or none does, and the closing one, which no member leaves early: so a borrow
//! never ends while a peer still reads.
//!
//! Waiting parks the thread, since ranks may outnumber cores; only when every rank can have a core
//! of its own does a member spin for a few microseconds first.

mod barrier;
mod mail;
mod outside;
mod parcels;
mod reduce;
pub(crate) mod route;
#[cfg(test)]
mod tests;

use std::cell::{Cell, UnsafeCell};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::Thread;
use std::time::Duration;

use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::program::Program;

use super::{
    CollectiveStats, Communicator, Crossing, CrossingOrder, Division, GroupIdx, Parcel, Place,
    Shipment, describe,
};
use crate::error::{Error, Result};
use crate::strided::{CopyLoop, CopyPlan};
use barrier::Barrier;
use mail::Mail;
use parcels::{Expected, Parcels};
use route::Route;

/// How ranks wait for each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WaitOptions {
    /// After this long without a peer, a collective fails and names who is missing.
    pub timeout: Duration,
    /// Looks at the barrier before parking.
    pub n_spins: u32,
}

impl WaitOptions {
    /// Ten minutes; spinning only when `n_threads` threads have a core each.
    pub fn for_threads(n_threads: usize) -> WaitOptions {
        let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
        WaitOptions {
            timeout: Duration::from_secs(600),
            n_spins: if n_threads <= n_cores { 2000 } else { 0 },
        }
    }
}

/// What all ranks share.
pub struct World {
    n_ranks: usize,
    options: WaitOptions,
    groups: Mutex<BTreeMap<Vec<usize>, Arc<Group>>>,
    failed: AtomicBool,
    failure: Mutex<Option<Error>>,
    /// The thread on which a rank waits, so that a failure can wake it.
    threads: Vec<Mutex<Option<Thread>>>,
    /// Messages under way.
    mail: Mutex<Mail>,
    parcels: Mutex<Parcels>,
    /// What the ranks run, where they run a program.
    program: OnceLock<Arc<Program>>,
    /// Where each rank is in it: steps done, and the instruction (the greatest number between steps).
    places: Vec<[AtomicU64; 2]>,
    /// The last wait of each rank for something outside of its communicator.
    attending: Vec<AtomicU64>,
}

struct Group {
    ranks: Vec<usize>,
    barrier: Barrier,
    postings: Vec<Slot>,
}

/// A member's posting: written by the member before the opening barrier, read by all after it.
struct Slot(UnsafeCell<Posting>);

// SAFETY: a slot is written by its member only outside of the span between the opening and the
// closing barrier, and read by peers only inside of it; the barriers order the two.
unsafe impl Sync for Slot {}
// SAFETY: a posting is addresses and numbers; what it points to is governed by the barriers.
unsafe impl Send for Slot {}

#[derive(Clone, Copy)]
struct Posting {
    call: &'static str,
    src: *const u32,
    n_src: usize,
    /// Where an all-reduce leaves this member's part for the others.
    dst: *mut u32,
    /// The member's own split counts (all-to-all).
    counts: *const [usize],
}

/// One rank's end of the world.
pub struct ThreadCommunicator {
    rank: usize,
    world: Arc<World>,
    groups: Vec<Member>,
    expected: Expected,
    stats: CollectiveStats,
}

struct Member {
    group: Arc<Group>,
    member_idx: usize,
}

impl World {
    /// A world of `n_ranks` ranks.
    pub fn new(n_ranks: usize, options: WaitOptions) -> Arc<World> {
        Arc::new(World {
            n_ranks,
            options,
            groups: Mutex::new(BTreeMap::new()),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            threads: (0..n_ranks).map(|_| Mutex::new(None)).collect(),
            mail: Mutex::new(BTreeMap::new()),
            parcels: Mutex::new(BTreeMap::new()),
            program: OnceLock::new(),
            places: (0..n_ranks)
                .map(|_| [AtomicU64::new(0), AtomicU64::new(u64::MAX)])
                .collect(),
            attending: (0..n_ranks).map(|_| AtomicU64::new(0)).collect(),
        })
    }

    /// One communicator a rank, in order.
    pub fn communicators(self: &Arc<World>) -> Vec<ThreadCommunicator> {
        (0..self.n_ranks)
            .map(|rank| ThreadCommunicator {
                rank,
                world: Arc::clone(self),
                groups: Vec::new(),
                expected: Expected::default(),
                stats: CollectiveStats::default(),
            })
            .collect()
    }

    /// Records the first failure and wakes everyone.
    pub fn fail(&self, error: &Error) {
        lock(&self.failure).get_or_insert_with(|| error.clone());
        self.failed.store(true, Ordering::SeqCst);
        for thread in &self.threads {
            if let Some(thread) = &*lock(thread) {
                thread.unpark();
            }
        }
    }

    /// The failure that stopped the world, if any.
    pub fn failure(&self) -> Option<Error> {
        if self.failed.load(Ordering::SeqCst) {
            lock(&self.failure).clone()
        } else {
            None
        }
    }

    /// A call of a rank in words.
    fn describe(&self, call: &str, rank: usize) -> String {
        let Some(program) = self.program.get() else {
            return call.to_string();
        };
        let [n_steps, instruction] = &self.places[rank];
        let instruction = instruction.load(Ordering::Relaxed);
        let place = Place {
            n_steps: n_steps.load(Ordering::Relaxed) as usize,
            instruction: (instruction != u64::MAX).then_some(instruction as usize),
        };
        describe(call, Some(program), rank, place)
    }

    fn check(&self) -> Result<()> {
        match self.failure() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Leaves this thread's handle, so that [`World::fail`] and mail can wake it.
    fn register(&self, rank: usize) {
        let mut slot = lock(&self.threads[rank]);
        let current = std::thread::current();
        if slot
            .as_ref()
            .is_none_or(|thread| thread.id() != current.id())
        {
            *slot = Some(current);
        }
    }
}

impl ThreadCommunicator {
    fn member(&self, group: GroupIdx) -> Result<&Member> {
        self.groups.get(group.0).ok_or_else(|| {
            Error::Internal(format!(
                "rank {} uses group {} but has joined {} groups",
                self.rank,
                group.0,
                self.groups.len()
            ))
        })
    }

    /// Publishes, opens, lets `body` read the peers, and closes.
    ///
    /// `body` may call [`Span::cross`] any number of times, the same on every member; its checks before
    /// that fail on all members or on none.
    fn together(
        &mut self,
        group: GroupIdx,
        posting: Posting,
        body: impl FnOnce(&Span<'_>) -> Result<u64>,
    ) -> Result<()> {
        let Member { group, member_idx } = self.member(group)?;
        let (group, member_idx) = (Arc::clone(group), *member_idx);
        self.world.check()?;
        // SAFETY: outside of the span between opening and closing this slot is this member's alone:
        // the previous span of the group ended with a closing barrier that all members reached.
        unsafe { *group.postings[member_idx].0.get() = posting };
        let mut wait_s = group.barrier.open(&self.world, member_idx, posting.call)?;
        let span = Span {
            group: &group,
            world: &self.world,
            rank: self.rank,
            member_idx,
            wait_s: Cell::new(0.0),
        };
        // From here on every member is inside and none may leave before the closing barrier, not even
        // unwinding.
        let closing = Closing(&span);
        let outcome = span.check_calls(posting.call).and_then(|()| body(&span));
        drop(closing);
        wait_s += span.wait_s.get();
        self.stats.wait_s += wait_s;
        self.stats.n_calls += 1;
        match outcome {
            Ok(received_bytes) => {
                self.stats.received_bytes += received_bytes;
                Ok(())
            }
            Err(error) => {
                self.world.fail(&error);
                Err(error)
            }
        }
    }

    fn check_len(&self, call: &str, what: &str, len: usize, expected: usize) -> Result<()> {
        if len == expected {
            return Ok(());
        }
        let error = Error::Invalid(format!(
            "{call} on rank {}: the {what} holds {len} elements, the division says {expected}",
            self.rank
        ));
        self.world.fail(&error);
        Err(error)
    }

    fn check_counts(&self, call: &str, group: GroupIdx, counts: &[usize]) -> Result<usize> {
        let member = self.member(group)?;
        let size = member.group.ranks.len();
        if counts.len() == size {
            return Ok(member.member_idx);
        }
        let error = Error::Invalid(format!(
            "{call} on rank {}: {} counts for a group of {size} ranks",
            self.rank,
            counts.len()
        ));
        self.world.fail(&error);
        Err(error)
    }
}

/// The time between opening and closing, in which peers' postings may be read.
struct Span<'a> {
    group: &'a Group,
    world: &'a World,
    rank: usize,
    member_idx: usize,
    /// Seconds waited since the opening.
    wait_s: Cell<f64>,
}

impl Span<'_> {
    /// A barrier of all members, which are inside of the span and so on their way.
    fn cross(&self) {
        let waited = self.group.barrier.cross(self.world, self.member_idx);
        self.wait_s.set(self.wait_s.get() + waited);
    }

    fn size(&self) -> usize {
        self.group.ranks.len()
    }

    fn posting(&self, member_idx: usize) -> Posting {
        // SAFETY: inside of the span nobody writes postings.
        unsafe { *self.group.postings[member_idx].0.get() }
    }

    /// The published tensor of a member.
    fn src(&self, member_idx: usize) -> (*const u32, usize) {
        let posting = self.posting(member_idx);
        (posting.src, posting.n_src)
    }

    fn check_calls(&self, call: &str) -> Result<()> {
        for member_idx in 0..self.size() {
            let other = self.posting(member_idx).call;
            if other != call {
                return Err(Error::Internal(format!(
                    "rank {} calls {call} where rank {} calls {other}; the ranks' programs disagree on \
                     the order of collectives of group {:?}",
                    self.rank, self.group.ranks[member_idx], self.group.ranks
                )));
            }
        }
        Ok(())
    }

    fn check_src(&self, call: &str, member_idx: usize, expected: usize) -> Result<*const u32> {
        let (src, n_src) = self.src(member_idx);
        if n_src == expected {
            return Ok(src);
        }
        Err(Error::Invalid(format!(
            "{call} on rank {}: rank {} published {n_src} elements, expected {expected}",
            self.rank, self.group.ranks[member_idx]
        )))
    }

    /// Members in the order in which to copy from them: the own part first, then round the group, so
    /// that members do not all read the same peer at once.
    fn round(&self) -> impl Iterator<Item = usize> + use<> {
        let (own, size) = (self.member_idx, self.size());
        (0..size).map(move |i| (own + i) % size)
    }
}

/// Reaches the closing barrier, even when unwinding.
struct Closing<'a, 'b>(&'a Span<'b>);

impl Drop for Closing<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let rank = self.0.rank;
            let error = Error::Internal(format!("rank {rank} panicked inside a collective"));
            self.0.world.fail(&error);
        }
        self.0.cross();
    }
}

fn posting(call: &'static str, src: &[u32]) -> Posting {
    Posting {
        call,
        src: src.as_ptr(),
        n_src: src.len(),
        dst: std::ptr::null_mut(),
        counts: &[],
    }
}

impl Communicator for ThreadCommunicator {
    fn rank(&self) -> usize {
        self.rank
    }

    fn n_ranks(&self) -> usize {
        self.world.n_ranks
    }

    fn follow(&mut self, program: &Arc<Program>) -> Result<()> {
        for channel in &program.channels {
            if channel.from == self.rank || channel.from >= self.world.n_ranks {
                self.world.open_channel(channel)?;
            }
        }
        // The same program on every rank: the first one's serves all.
        let _ = self.world.program.set(Arc::clone(program));
        Ok(())
    }

    fn enter(&mut self, place: Place) {
        let instruction = place.instruction.map_or(u64::MAX, |idx| idx as u64);
        let [n_steps, at] = &self.world.places[self.rank];
        n_steps.store(place.n_steps as u64, Ordering::Relaxed);
        at.store(instruction, Ordering::Relaxed);
    }

    fn attend(
        &mut self,
        what: &str,
        step: u64,
        usual: Duration,
        is_done: &mut dyn FnMut(&mut dyn Communicator) -> Result<bool>,
    ) -> Result<()> {
        self.wait_outside(what, step, usual, is_done)
    }

    unsafe fn ship(&mut self, tag: u32, sends: &[Parcel], recvs: &[Parcel]) -> Result<Shipment> {
        // SAFETY: as the caller promises.
        unsafe { self.send_off(tag, sends, recvs) }
    }

    fn has_arrived(&mut self, shipment: Shipment) -> Result<bool> {
        self.take_in(shipment)
    }

    fn reaches_devices(&self) -> bool {
        false
    }

    fn join(&mut self, ranks: &[usize]) -> Result<GroupIdx> {
        if let Some(idx) = self.groups.iter().position(|m| m.group.ranks == ranks) {
            return Ok(GroupIdx(idx));
        }
        let mut sorted = ranks.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        let member_idx = ranks.iter().position(|r| *r == self.rank);
        let legal = sorted.len() == ranks.len() && ranks.iter().all(|r| *r < self.world.n_ranks);
        let (Some(member_idx), true) = (member_idx, legal) else {
            return Err(Error::Invalid(format!(
                "rank {} of {} cannot join the group {ranks:?}: a group lists distinct ranks of the \
                 world, this one among them",
                self.rank, self.world.n_ranks
            )));
        };
        let mut groups = lock(&self.world.groups);
        let group = groups.entry(ranks.to_vec()).or_insert_with(|| {
            let empty = posting("nothing", &[]);
            Arc::new(Group {
                ranks: ranks.to_vec(),
                barrier: Barrier::new(ranks),
                postings: ranks.iter().map(|_| Slot(UnsafeCell::new(empty))).collect(),
            })
        });
        self.groups.push(Member {
            group: Arc::clone(group),
            member_idx,
        });
        Ok(GroupIdx(self.groups.len() - 1))
    }

    fn group_size(&self, group: GroupIdx) -> Result<usize> {
        Ok(self.member(group)?.group.ranks.len())
    }

    fn all_gather(
        &mut self,
        group: GroupIdx,
        src: &[u32],
        dst: &mut [u32],
        division: &Division,
    ) -> Result<()> {
        const CALL: &str = "all_gather";
        let member_idx = self.check_counts(CALL, group, &division.counts)?;
        self.check_len(
            CALL,
            "source",
            src.len(),
            division.n_part_elements(member_idx),
        )?;
        self.check_len(CALL, "destination", dst.len(), division.n_elements())?;
        self.together(group, posting(CALL, src), |span| {
            let mut received_bytes = 0;
            for peer in span.round() {
                let n = division.n_part_elements(peer);
                let part = span.check_src(CALL, peer, n)?;
                let row = division.counts[peer] * division.inner;
                let copy = CopyPlan::new(&[
                    CopyLoop {
                        size: division.outer,
                        src: row,
                        dst: division.total() * division.inner,
                    },
                    CopyLoop {
                        size: row,
                        src: 1,
                        dst: 1,
                    },
                ]);
                let start = division.start(peer) * division.inner;
                // SAFETY: the peer's part holds n elements, checked above, and stays borrowed until
                // the closing barrier; the place in `dst` is inside of the whole, whose length was
                // checked. `dst` is borrowed for writing, hence disjoint from every `src`.
                unsafe { copy.run(part, dst.as_mut_ptr().add(start)) };
                if peer != span.member_idx {
                    received_bytes += 4 * n as u64;
                }
            }
            Ok(received_bytes)
        })
    }

    fn all_reduce(
        &mut self,
        group: GroupIdx,
        kind: ReduceKind,
        src: Option<&[f32]>,
        dst: &mut [f32],
    ) -> Result<()> {
        const CALL: &str = "all_reduce";
        if let Some(src) = src {
            self.check_len(CALL, "source", src.len(), dst.len())?;
        }
        let n = dst.len();
        let own = dst.as_mut_ptr();
        let published = src.map_or(own.cast_const(), <[f32]>::as_ptr);
        let posting = Posting {
            call: CALL,
            src: published.cast(),
            n_src: n,
            dst: own.cast(),
            counts: &[],
        };
        self.together(group, posting, |span| {
            let size = span.size();
            let sources: Vec<*const f32> = (0..size)
                .map(|peer| span.check_src(CALL, peer, n).map(<*const u32>::cast))
                .collect::<Result<_>>()?;
            // SAFETY: all sources hold n elements and stay borrowed until the closing barrier. An own
            // part is written by its member alone, and read by peers only after the inner barrier:
            // in place, peers read this member's *other* parts until then.
            unsafe { reduce::all_reduce(span, kind, &sources, own, n) };
            Ok(4 * (n - n / size) as u64 * u64::from(size > 1))
        })
    }

    fn reduce_scatter(
        &mut self,
        group: GroupIdx,
        kind: ReduceKind,
        src: &[f32],
        dst: &mut [f32],
        division: &Division,
    ) -> Result<()> {
        const CALL: &str = "reduce_scatter";
        let member_idx = self.check_counts(CALL, group, &division.counts)?;
        let n = division.n_elements();
        self.check_len(CALL, "source", src.len(), n)?;
        self.check_len(
            CALL,
            "destination",
            dst.len(),
            division.n_part_elements(member_idx),
        )?;
        let posting = Posting {
            call: CALL,
            src: src.as_ptr().cast(),
            n_src: n,
            dst: std::ptr::null_mut(),
            counts: &[],
        };
        self.together(group, posting, |span| {
            let sources: Vec<*const f32> = (0..span.size())
                .map(|peer| span.check_src(CALL, peer, n).map(<*const u32>::cast))
                .collect::<Result<_>>()?;
            let row = division.counts[member_idx] * division.inner;
            let (whole, start) = (
                division.total() * division.inner,
                division.start(member_idx) * division.inner,
            );
            for outer in 0..division.outer {
                // SAFETY: row `outer` of the own part lies inside of every source, whose lengths were
                // checked and which stay borrowed; `dst` is this member's alone.
                unsafe {
                    let rows: Vec<*const f32> = sources
                        .iter()
                        .map(|s| s.add(outer * whole + start))
                        .collect();
                    reduce::reduce(kind, &rows, dst.as_mut_ptr().add(outer * row), row);
                }
            }
            Ok(4 * dst.len() as u64 * (span.size() - 1) as u64)
        })
    }

    fn all_to_all(
        &mut self,
        group: GroupIdx,
        src: &[u32],
        dst: &mut [u32],
        crossing: &Crossing,
    ) -> Result<()> {
        const CALL: &str = "all_to_all";
        let member_idx = self.check_counts(CALL, group, &crossing.split_counts)?;
        self.check_counts(CALL, group, &crossing.concat_counts)?;
        let around = crossing.outer * crossing.mid * crossing.inner;
        let (n_split, n_concat): (usize, usize) = (
            crossing.split_counts.iter().sum(),
            crossing.concat_counts.iter().sum(),
        );
        let (own_split, own_concat) = (
            crossing.split_counts[member_idx],
            crossing.concat_counts[member_idx],
        );
        let (n_src, n_dst) = match crossing.order {
            CrossingOrder::SameDim => (around * n_split, around * n_concat),
            _ => (around * n_split * own_concat, around * own_split * n_concat),
        };
        self.check_len(CALL, "source", src.len(), n_src)?;
        self.check_len(CALL, "destination", dst.len(), n_dst)?;
        let posting = Posting {
            counts: &raw const *crossing.split_counts,
            ..posting(CALL, src)
        };
        self.together(group, posting, |span| {
            let mut received_bytes = 0;
            for peer in span.round() {
                // SAFETY: the peer's counts are borrowed until the closing barrier.
                let peer_split = unsafe { &*span.posting(peer).counts };
                if peer_split.len() != span.size() {
                    return Err(Error::Internal(format!(
                        "{CALL}: rank {} published {} counts for {} ranks",
                        span.group.ranks[peer],
                        peer_split.len(),
                        span.size()
                    )));
                }
                let sent = peer_split[member_idx];
                let skipped: usize = peer_split[..member_idx].iter().sum();
                let place: usize = crossing.concat_counts[..peer].iter().sum();
                let count = crossing.concat_counts[peer];
                let route = Route { crossing, peer_split, n_concat, own_split, count, skipped, place };
                let (loops, from, to, expected) = match crossing.order {
                    CrossingOrder::SameDim => route.same_dim(),
                    CrossingOrder::SplitFirst => route.split_first(),
                    CrossingOrder::ConcatFirst => route.concat_first(),
                };
                let fits = match crossing.order {
                    CrossingOrder::SameDim => sent == count,
                    _ => sent == own_split,
                };
                if !fits {
                    return Err(Error::Invalid(format!(
                        "{CALL} on rank {}: rank {} sends {sent} elements of the divided dim, expected {}",
                        span.rank,
                        span.group.ranks[peer],
                        if crossing.order == CrossingOrder::SameDim { count } else { own_split },
                    )));
                }
                let part = span.check_src(CALL, peer, expected)?;
                let copy = CopyPlan::new(&loops);
                // SAFETY: the loops walk part `member_idx` of the peer's tensor of `expected`
                // elements, which stays borrowed, and place it inside of `dst`, whose length was
                // checked against the same counts; `dst` is this member's alone.
                unsafe { copy.run(part.add(from), dst.as_mut_ptr().add(to)) };
                if peer != span.member_idx {
                    received_bytes += 4 * copy.n_elements() as u64;
                }
            }
            Ok(received_bytes)
        })
    }

    fn collective_permute(
        &mut self,
        group: GroupIdx,
        from: usize,
        src: &[u32],
        dst: &mut [u32],
    ) -> Result<()> {
        const CALL: &str = "collective_permute";
        self.together(group, posting(CALL, src), |span| {
            copy_from(CALL, span, from, dst)
        })
    }

    fn broadcast(&mut self, group: GroupIdx, src: &[u32], dst: &mut [u32]) -> Result<()> {
        const CALL: &str = "broadcast";
        self.together(group, posting(CALL, src), |span| {
            copy_from(CALL, span, span.group.ranks[0], dst)
        })
    }

    fn barrier(&mut self, group: GroupIdx) -> Result<()> {
        self.together(group, posting("barrier", &[]), |_| Ok(0))
    }

    fn send(&mut self, to: usize, src: &[u32]) -> Result<()> {
        self.check_peer("send", to)?;
        self.stats.wait_s += self.world.post(self.rank, to, src)?;
        self.stats.n_calls += 1;
        Ok(())
    }

    fn recv(&mut self, from: usize, dst: &mut [u32]) -> Result<()> {
        self.check_peer("recv", from)?;
        let world = Arc::clone(&self.world);
        let n_words = dst.len();
        let ((), wait_s) = world.fetch(from, self.rank, |message| {
            self.check_len("recv", "destination", n_words, message.len())?;
            dst.copy_from_slice(message);
            Ok(())
        })?;
        self.stats.wait_s += wait_s;
        self.stats.n_calls += 1;
        self.stats.received_bytes += 4 * n_words as u64;
        Ok(())
    }

    fn abort(&self, error: &Error) {
        self.world.fail(error);
    }

    fn settle(&self, _patience: Duration) -> Option<(usize, Error)> {
        self.world.failure().map(|error| (self.rank, error))
    }

    fn finish(&mut self) -> Result<()> {
        self.world.check()
    }

    fn stats(&self) -> CollectiveStats {
        self.stats
    }
}

impl ThreadCommunicator {
    fn check_peer(&self, call: &str, peer: usize) -> Result<()> {
        if peer < self.world.n_ranks {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "{call} on rank {}: there is no rank {peer} among {}",
            self.rank, self.world.n_ranks
        )))
    }
}

/// Copies the whole tensor of the group's rank `from`.
fn copy_from(call: &str, span: &Span<'_>, from: usize, dst: &mut [u32]) -> Result<u64> {
    let Some(peer) = span.group.ranks.iter().position(|rank| *rank == from) else {
        return Err(Error::Invalid(format!(
            "{call} on rank {}: rank {from} is not in the group {:?}",
            span.rank, span.group.ranks
        )));
    };
    let src = span.check_src(call, peer, dst.len())?;
    // SAFETY: the peer's tensor holds as many elements and stays borrowed until the closing barrier;
    // `dst` is borrowed for writing, hence disjoint from it.
    unsafe { dst.as_mut_ptr().copy_from_nonoverlapping(src, dst.len()) };
    Ok(if peer == span.member_idx {
        0
    } else {
        4 * dst.len() as u64
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
