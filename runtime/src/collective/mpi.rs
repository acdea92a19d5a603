//! Collectives between processes, by the machine's MPI.
//!
//! In: the members' buffers, each in its own process. Out: the members' results, by non-blocking calls
//! on one communicator a group, polled so that a member that does not come is noticed.
//! Invariant: reductions are folded here, in the order of the group's ranks, from parts that MPI only
//! moves: the bits are those of the threads' collectives, whatever MPI and network.
//!
//! A rank of which a call failed is at its end: buffers of the call may still be written to by MPI, so
//! they must stay until the process ends ([`Communicator::settle`] says whose failure to report).

mod calls;
mod hosts;
mod moves;
mod watch;

use std::collections::{BTreeMap, VecDeque};
use std::ffi::c_int;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::program::Program;

use super::{
    CollectiveStats, Communicator, Crossing, Division, GroupIdx, Parcel, Place, Shipment, describe,
};
use crate::error::{Error, Result};
use crate::mpi::{Handle, Mpi};
use moves::{Route, copies, fold, route, rows, sized, words, words_as_floats, words_mut};
use watch::{Waiting, Watch};

/// Up to this many elements every member reduces everything by itself, which saves an exchange.
const SMALL: usize = 2048;

/// The tag of messages between ranks.
const TAG: c_int = 0;

/// Set in the numbers of waits that are no calls of a group.
const OUTSIDE: u64 = 1 << 63;

/// Messages under way on a channel whose depth no program states.
const DEFAULT_DEPTH: usize = 8;

/// One process' end of the job.
pub struct MpiCommunicator {
    mpi: Arc<Mpi>,
    rank: usize,
    n_ranks: usize,
    timeout: Duration,
    groups: Vec<Member>,
    /// For messages between ranks.
    messages: Handle,
    /// For parcels.
    parcels: Handle,
    /// Parcels under way, by the number of their shipment.
    shipments: BTreeMap<usize, Vec<Handle>>,
    n_shipments: usize,
    listener: Listener,
    /// Messages under way, by their receiver.
    sends: BTreeMap<usize, VecDeque<(Handle, Vec<u32>)>>,
    depths: BTreeMap<usize, usize>,
    n_received: BTreeMap<usize, u64>,
    program: Option<Arc<Program>>,
    place: Place,
    failure: Option<Error>,
    stats: CollectiveStats,
    /// Reused from call to call: what is sent, and what has been received.
    packed: Vec<u32>,
    received: Vec<u32>,
}

/// A rank's word with the others about failures, which outlives its communicator.
#[derive(Clone)]
pub struct Listener {
    mpi: Arc<Mpi>,
    watch: Arc<Mutex<Watch>>,
}

impl Listener {
    fn watch(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Communicator::abort`].
    pub fn abort(&self, error: &Error) {
        self.watch().fail(&self.mpi, error);
    }

    /// As [`Communicator::settle`].
    pub fn settle(&self, patience: Duration) -> Option<(usize, Error)> {
        self.watch().settle(&self.mpi, patience)
    }
}

struct Member {
    ranks: Vec<usize>,
    member_idx: usize,
    /// `None` for a group of one.
    comm: Option<Handle>,
    n_calls: u64,
}

impl MpiCommunicator {
    /// This process' communicator; a wait of `timeout` fails.
    ///
    /// Ranks fill one host after another, however the launcher dealt them out: the innermost axes of a
    /// mesh lie within hosts.
    ///
    /// # Errors
    /// `Exhausted` when MPI refuses, or some processes of the job do not come in time.
    pub fn new(mpi: Arc<Mpi>, timeout: Duration) -> Result<MpiCommunicator> {
        let order = hosts::in_order(&hosts::of_ranks(&mpi, timeout)?);
        let all = mpi.subset(mpi.world, &order, TAG)?;
        let (mut rank, n_ranks) = (0, order.len());
        let (mut messages, mut control, mut parcels) =
            (Handle::EMPTY, Handle::EMPTY, Handle::EMPTY);
        // SAFETY: the out-parameters are locals; the communicator was made above.
        unsafe {
            mpi.check(
                "MPI_Comm_rank",
                (mpi.functions.comm_rank)(all, &raw mut rank),
            )?;
            for comm in [&raw mut messages, &raw mut control, &raw mut parcels] {
                mpi.check("MPI_Comm_dup", (mpi.functions.comm_dup)(all, comm))?;
                mpi.return_errors(*comm)?;
            }
        }
        let rank = rank as usize;
        let listener = Listener {
            mpi: Arc::clone(&mpi),
            watch: Arc::new(Mutex::new(Watch::new(control, rank, n_ranks))),
        };
        Ok(MpiCommunicator {
            mpi,
            rank,
            n_ranks,
            timeout,
            groups: Vec::new(),
            messages,
            parcels,
            shipments: BTreeMap::new(),
            n_shipments: 0,
            listener,
            sends: BTreeMap::new(),
            depths: BTreeMap::new(),
            n_received: BTreeMap::new(),
            program: None,
            place: Place::default(),
            failure: None,
            stats: CollectiveStats::default(),
            packed: Vec::new(),
            received: Vec::new(),
        })
    }

    /// Hears and tells of failures also when this communicator is gone.
    pub fn listener(&self) -> Listener {
        self.listener.clone()
    }

    fn lock_watch(&self) -> MutexGuard<'_, Watch> {
        self.listener.watch()
    }

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

    /// Records a failure of this rank and tells the others.
    fn failed<T>(&mut self, error: Error) -> Result<T> {
        self.lock_watch().fail(&self.mpi, &error);
        self.failure.get_or_insert_with(|| error.clone());
        Err(error)
    }

    fn ensure(&mut self, fits: bool, message: impl FnOnce(usize) -> String) -> Result<()> {
        if fits {
            return Ok(());
        }
        let error = Error::Invalid(message(self.rank));
        self.failed(error)
    }

    fn ensure_len(&mut self, call: &str, what: &str, len: usize, expected: usize) -> Result<()> {
        self.ensure(len == expected, |rank| {
            format!(
                "{call} on rank {rank}: the {what} holds {len} elements, the division says {expected}"
            )
        })
    }

    fn ensure_counts(&mut self, call: &str, group: GroupIdx, counts: &[usize]) -> Result<usize> {
        let Member {
            ranks, member_idx, ..
        } = self.member(group)?;
        let (size, member_idx) = (ranks.len(), *member_idx);
        self.ensure(counts.len() == size, |rank| {
            format!(
                "{call} on rank {rank}: {} counts for a group of {size} ranks",
                counts.len()
            )
        })?;
        Ok(member_idx)
    }

    /// Waits until at most `n_left` messages to a rank are under way.
    fn drain(&mut self, to: usize, n_left: usize) -> Result<()> {
        while self
            .sends
            .get(&to)
            .is_some_and(|queue| queue.len() > n_left)
        {
            let Some((mut request, buffer)) = self.sends.get_mut(&to).and_then(VecDeque::pop_front)
            else {
                return Ok(());
            };
            let outcome = self.complete(&mut request, |this| this.message("send", to, 0));
            if let Err(error) = outcome {
                // MPI may still read it.
                std::mem::forget(buffer);
                return Err(error);
            }
        }
        Ok(())
    }

    fn message(&self, call: &str, peer: usize, number: u64) -> Waiting {
        Waiting {
            what: describe(call, self.program.as_deref(), self.rank, self.place),
            ranks: vec![self.rank, peer],
            number,
        }
    }

    fn check_peer(&mut self, call: &str, peer: usize) -> Result<()> {
        let n_ranks = self.n_ranks;
        self.ensure(peer < n_ranks, |rank| {
            format!("{call} on rank {rank}: there is no rank {peer} among {n_ranks}")
        })?;
        match &self.failure {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }
}

impl Communicator for MpiCommunicator {
    fn rank(&self) -> usize {
        self.rank
    }

    fn n_ranks(&self) -> usize {
        self.n_ranks
    }

    fn follow(&mut self, program: &Arc<Program>) -> Result<()> {
        let starting = program
            .channels
            .iter()
            .filter(|channel| channel.from == self.rank);
        self.depths = starting
            .map(|channel| (channel.to, channel.depth))
            .collect();
        self.program = Some(Arc::clone(program));
        Ok(())
    }

    fn enter(&mut self, place: Place) {
        self.place = place;
    }

    fn join(&mut self, ranks: &[usize]) -> Result<GroupIdx> {
        if let Some(idx) = self.groups.iter().position(|member| member.ranks == ranks) {
            return Ok(GroupIdx(idx));
        }
        let mut sorted = ranks.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        let member_idx = ranks.iter().position(|rank| *rank == self.rank);
        let legal = sorted.len() == ranks.len() && ranks.iter().all(|rank| *rank < self.n_ranks);
        let (Some(member_idx), true) = (member_idx, legal) else {
            return Err(Error::Invalid(format!(
                "rank {} of {} cannot join the group {ranks:?}: a group lists distinct ranks of the \
                 world, this one among them",
                self.rank, self.n_ranks
            )));
        };
        let mut comm = None;
        if ranks.len() > 1 {
            // Members join in the order of their instructions, in which they also call: what would
            // stand still here would stand still there. MPI makes a communicator in one call that no
            // time-out ends, so that nobody starts it before all have come.
            let tag = tag_of(ranks);
            self.assemble(ranks, member_idx, tag)?;
            comm = Some(self.mpi.subset(self.messages, ranks, tag)?);
        }
        self.groups.push(Member {
            ranks: ranks.to_vec(),
            member_idx,
            comm,
            n_calls: 0,
        });
        Ok(GroupIdx(self.groups.len() - 1))
    }

    fn attend(
        &mut self,
        what: &str,
        step: u64,
        usual: Duration,
        is_done: &mut dyn FnMut(&mut dyn Communicator) -> Result<bool>,
    ) -> Result<()> {
        if let Some(error) = &self.failure {
            return Err(error.clone());
        }
        let at = |this: &MpiCommunicator| Waiting {
            what: what.to_string(),
            ranks: (0..this.n_ranks).collect(),
            number: OUTSIDE | step,
        };
        let patience = self.timeout + usual;
        self.poll(patience, at, |this| match is_done(this) {
            Ok(is_done) => Ok(is_done),
            Err(error) => this.failed(error),
        })
    }

    unsafe fn ship(&mut self, tag: u32, sends: &[Parcel], recvs: &[Parcel]) -> Result<Shipment> {
        // SAFETY: as the caller promises.
        let requests = unsafe { self.start_parcels(tag, sends, recvs) }?;
        self.n_shipments += 1;
        self.shipments.insert(self.n_shipments, requests);
        Ok(Shipment(self.n_shipments))
    }

    fn has_arrived(&mut self, Shipment(number): Shipment) -> Result<bool> {
        let mut requests = self.shipments.remove(&number).unwrap_or_default();
        while let Some(request) = requests.last_mut() {
            if !self.test(request)? {
                self.shipments.insert(number, requests);
                return Ok(false);
            }
            requests.pop();
        }
        Ok(true)
    }

    fn reaches_devices(&self) -> bool {
        self.mpi.reaches_cuda()
    }

    fn group_size(&self, group: GroupIdx) -> Result<usize> {
        Ok(self.member(group)?.ranks.len())
    }

    fn all_gather(
        &mut self,
        group: GroupIdx,
        src: &[u32],
        dst: &mut [u32],
        division: &Division,
    ) -> Result<()> {
        const CALL: &str = "all_gather";
        let member_idx = self.ensure_counts(CALL, group, &division.counts)?;
        let n_own = division.n_part_elements(member_idx);
        self.ensure_len(CALL, "source", src.len(), n_own)?;
        self.ensure_len(CALL, "destination", dst.len(), division.n_elements())?;
        let n_parts = division.counts.len();
        let counts: Vec<usize> = (0..n_parts).map(|i| division.n_part_elements(i)).collect();
        if division.outer == 1 {
            self.gather_words(CALL, group, src, dst, &counts)?;
        } else {
            let mut received = sized(&mut self.received, division.n_elements());
            let outcome = self.gather_words(CALL, group, src, &mut received, &counts);
            self.received = received;
            outcome?;
            let mut from = 0;
            for (part_idx, count) in counts.iter().enumerate() {
                let copy = rows(division, part_idx).1;
                // SAFETY: the part lies whole in `received`, its rows inside of `dst`.
                unsafe {
                    let to = division.start(part_idx) * division.inner;
                    copy.run(self.received.as_ptr().add(from), dst.as_mut_ptr().add(to));
                }
                from += count;
            }
        }
        self.stats.n_calls += 1;
        self.stats.received_bytes += 4 * (division.n_elements() - n_own) as u64;
        Ok(())
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
            self.ensure_len(CALL, "source", src.len(), dst.len())?;
        }
        let Member {
            ranks, member_idx, ..
        } = self.member(group)?;
        let (size, member_idx, n) = (ranks.len(), *member_idx, dst.len());
        let whole = vec![n; size];
        let is_small = n <= SMALL || size == 1;
        let counts: Vec<usize> = (0..size)
            .map(|i| n / size + usize::from(i < n % size))
            .collect();
        let n_own = if is_small { n } else { counts[member_idx] };
        let mut received = sized(&mut self.received, size * n_own);
        let outcome = if is_small {
            let own = words(src.unwrap_or(dst));
            self.gather_words(CALL, group, own, &mut received, &whole)
        } else {
            let own = words(src.unwrap_or(dst));
            let arrived = (&mut received[..], &vec![n_own; size][..]);
            self.exchange_words(CALL, group, (own, &counts), arrived)
                .and_then(|()| {
                    let mut reduced = sized(&mut self.packed, n_own);
                    fold(kind, &received, words_as_floats(&mut reduced));
                    let outcome = self.gather_words(CALL, group, &reduced, words_mut(dst), &counts);
                    self.packed = reduced;
                    outcome
                })
        };
        if outcome.is_ok() && is_small {
            fold(kind, &received, dst);
        }
        self.received = received;
        outcome?;
        self.stats.n_calls += 1;
        self.stats.received_bytes += 4 * (n - n / size) as u64 * u64::from(size > 1);
        Ok(())
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
        let member_idx = self.ensure_counts(CALL, group, &division.counts)?;
        let (n, n_own) = (division.n_elements(), division.n_part_elements(member_idx));
        self.ensure_len(CALL, "source", src.len(), n)?;
        self.ensure_len(CALL, "destination", dst.len(), n_own)?;
        let size = division.counts.len();
        let counts: Vec<usize> = (0..size).map(|i| division.n_part_elements(i)).collect();
        let mut packed = sized(&mut self.packed, if division.outer == 1 { 0 } else { n });
        if division.outer > 1 {
            let mut to = 0;
            for (part_idx, count) in counts.iter().enumerate() {
                let copy = rows(division, part_idx).0;
                // SAFETY: the part's rows lie inside of `src`, and whole in `packed`.
                unsafe {
                    let from = division.start(part_idx) * division.inner;
                    copy.run(words(src).as_ptr().add(from), packed.as_mut_ptr().add(to));
                }
                to += count;
            }
        }
        let mut received = sized(&mut self.received, size * n_own);
        let out = if division.outer > 1 {
            &packed
        } else {
            words(src)
        };
        let arrived = (&mut received[..], &vec![n_own; size][..]);
        let outcome = self.exchange_words(CALL, group, (out, &counts), arrived);
        if outcome.is_ok() {
            fold(kind, &received, dst);
        }
        (self.packed, self.received) = (packed, received);
        outcome?;
        self.stats.n_calls += 1;
        self.stats.received_bytes += 4 * n_own as u64 * (size - 1) as u64;
        Ok(())
    }

    fn all_to_all(
        &mut self,
        group: GroupIdx,
        src: &[u32],
        dst: &mut [u32],
        crossing: &Crossing,
    ) -> Result<()> {
        const CALL: &str = "all_to_all";
        let member_idx = self.ensure_counts(CALL, group, &crossing.split_counts)?;
        self.ensure_counts(CALL, group, &crossing.concat_counts)?;
        let size = crossing.split_counts.len();
        let routes: Vec<Route> = (0..size)
            .map(|peer| route(crossing, member_idx, peer))
            .collect();
        let sent: Vec<usize> = routes.iter().map(|route| route.pack.n_elements()).collect();
        let arriving: Vec<usize> = routes
            .iter()
            .map(|route| route.unpack.n_elements())
            .collect();
        let (n_src, n_dst): (usize, usize) = (sent.iter().sum(), arriving.iter().sum());
        self.ensure_len(CALL, "source", src.len(), n_src)?;
        self.ensure_len(CALL, "destination", dst.len(), n_dst)?;
        // Parts that lie one after another, in the order of members, travel from and to where they are.
        let (packs, unpacks) = copies(crossing);
        let mut packed = sized(&mut self.packed, if packs { n_src } else { 0 });
        let mut at = 0;
        for (route, count) in routes.iter().zip(&sent).filter(|_| packs) {
            // SAFETY: the routes' parts of `src` add up to it, so each lies inside of both.
            unsafe {
                let (from, to) = (src.as_ptr().add(route.from), packed.as_mut_ptr().add(at));
                route.pack.run(from, to);
            }
            at += count;
        }
        let mut received = sized(&mut self.received, if unpacks { n_dst } else { 0 });
        let out = if packs { &packed } else { src };
        let place = if unpacks {
            &mut received[..]
        } else {
            &mut dst[..]
        };
        let outcome = self.exchange_words(CALL, group, (out, &sent), (place, &arriving));
        if outcome.is_ok() && unpacks {
            let mut at = 0;
            for (route, count) in routes.iter().zip(&arriving) {
                // SAFETY: the routes' parts of `dst` add up to it, so each lies inside of both.
                unsafe {
                    let (from, to) = (received.as_ptr().add(at), dst.as_mut_ptr().add(route.to));
                    route.unpack.run(from, to);
                }
                at += count;
            }
        }
        (self.packed, self.received) = (packed, received);
        outcome?;
        self.stats.n_calls += 1;
        self.stats.received_bytes += 4 * (n_dst - arriving[member_idx]) as u64;
        Ok(())
    }

    fn collective_permute(
        &mut self,
        group: GroupIdx,
        from: usize,
        src: &[u32],
        dst: &mut [u32],
    ) -> Result<()> {
        const CALL: &str = "collective_permute";
        let Member {
            ranks, member_idx, ..
        } = self.member(group)?;
        let (ranks, member_idx) = (ranks.clone(), *member_idx);
        let source = ranks.iter().position(|rank| *rank == from);
        self.ensure(source.is_some(), |rank| {
            format!("{CALL} on rank {rank}: rank {from} is not in the group {ranks:?}")
        })?;
        let source = source.unwrap_or_default();
        // A sender has to know its receivers, who alone name it.
        let mut named = vec![0; ranks.len()];
        self.gather_words(
            CALL,
            group,
            &[source as u32],
            &mut named,
            &vec![1; ranks.len()],
        )?;
        let mut sent = vec![0; ranks.len()];
        let mut packed = sized(&mut self.packed, 0);
        for (peer, _) in named
            .iter()
            .enumerate()
            .filter(|(_, of)| **of == member_idx as u32)
        {
            sent[peer] = src.len();
            packed.extend_from_slice(src);
        }
        let mut arriving = vec![0; ranks.len()];
        arriving[source] = dst.len();
        let outcome = self.exchange_words(CALL, group, (&packed, &sent), (dst, &arriving));
        self.packed = packed;
        outcome?;
        self.stats.n_calls += 1;
        self.stats.received_bytes += 4 * dst.len() as u64 * u64::from(source != member_idx);
        Ok(())
    }

    fn broadcast(&mut self, group: GroupIdx, src: &[u32], dst: &mut [u32]) -> Result<()> {
        const CALL: &str = "broadcast";
        let is_first = self.member(group)?.member_idx == 0;
        if is_first {
            self.ensure_len(CALL, "source", src.len(), dst.len())?;
            dst.copy_from_slice(src);
        }
        let (n, _) = self.sizes(CALL, &[dst.len()])?;
        self.together(CALL, group, |mpi, comm, request| {
            // SAFETY: `dst` holds as many words; see `together`.
            let code = unsafe {
                (mpi.functions.ibcast)(dst.as_mut_ptr().cast(), n[0], mpi.word, 0, comm, request)
            };
            mpi.check("MPI_Ibcast", code)
        })?;
        self.stats.n_calls += 1;
        self.stats.received_bytes += 4 * dst.len() as u64 * u64::from(!is_first);
        Ok(())
    }

    fn barrier(&mut self, group: GroupIdx) -> Result<()> {
        self.together("barrier", group, |mpi, comm, request| {
            // SAFETY: the communicator is the group's.
            let code = unsafe { (mpi.functions.ibarrier)(comm, request) };
            mpi.check("MPI_Ibarrier", code)
        })?;
        self.stats.n_calls += 1;
        Ok(())
    }

    fn send(&mut self, to: usize, src: &[u32]) -> Result<()> {
        self.check_peer("send", to)?;
        let depth = self.depths.get(&to).copied().unwrap_or(DEFAULT_DEPTH);
        self.drain(to, depth.max(1) - 1)?;
        let (n, _) = self.sizes("send", &[src.len()])?;
        let (buffer, mut request) = (src.to_vec(), Handle::EMPTY);
        // SAFETY: the copy stays in `sends`, at its address, until the request is complete.
        let code = unsafe {
            (self.mpi.functions.isend)(
                buffer.as_ptr().cast(),
                n[0],
                self.mpi.word,
                to as c_int,
                TAG,
                self.messages,
                &raw mut request,
            )
        };
        self.sends
            .entry(to)
            .or_default()
            .push_back((request, buffer));
        if let Err(error) = self.mpi.check("MPI_Isend", code) {
            return self.failed(error);
        }
        self.stats.n_calls += 1;
        Ok(())
    }

    fn recv(&mut self, from: usize, dst: &mut [u32]) -> Result<()> {
        self.check_peer("recv", from)?;
        let (n, _) = self.sizes("recv", &[dst.len()])?;
        let mut request = Handle::EMPTY;
        // SAFETY: `dst` holds as many words; see `together`.
        let code = unsafe {
            (self.mpi.functions.irecv)(
                dst.as_mut_ptr().cast(),
                n[0],
                self.mpi.word,
                from as c_int,
                TAG,
                self.messages,
                &raw mut request,
            )
        };
        if let Err(error) = self.mpi.check("MPI_Irecv", code) {
            return self.failed(error);
        }
        let number = *self
            .n_received
            .entry(from)
            .and_modify(|n| *n += 1)
            .or_insert(1);
        self.complete(&mut request, |this| this.message("recv", from, number))?;
        self.stats.n_calls += 1;
        self.stats.received_bytes += 4 * dst.len() as u64;
        Ok(())
    }

    fn abort(&self, error: &Error) {
        self.listener.abort(error);
    }

    fn settle(&self, patience: Duration) -> Option<(usize, Error)> {
        self.listener.settle(patience)
    }

    fn finish(&mut self) -> Result<()> {
        for to in self.sends.keys().copied().collect::<Vec<_>>() {
            self.drain(to, 0)?;
        }
        let all: Vec<usize> = (0..self.n_ranks).collect();
        let group = self.join(&all)?;
        self.barrier(group)?;
        // SAFETY: nothing is under way: all ranks have passed the barrier.
        let code = unsafe { (self.mpi.functions.finalize)() };
        self.mpi.check("MPI_Finalize", code)
    }

    fn stats(&self) -> CollectiveStats {
        self.stats
    }
}

/// The tag of what the members of a group say to each other before they have a communicator: the same on
/// all of them, and another one for groups that are made at the same time.
fn tag_of(ranks: &[usize]) -> c_int {
    let hash = ranks.iter().fold(17_usize, |hash, rank| {
        hash.wrapping_mul(31).wrapping_add(rank + 1)
    });
    TAG + 1 + (hash % 32749) as c_int
}
