//! Non-blocking calls of MPI, started and waited for.
//!
//! In: words and how many of them each member sends and receives. Out: the words, moved; or the failure that
//! ended the wait: another rank's, or that of who did not arrive in time.
//! Invariant: a call that returns well has left MPI: its buffers are free again. Every wait but those
//! inside of MPI's own making of communicators has an end.

use std::ffi::{c_int, c_void};
use std::time::{Duration, Instant};

use super::watch::Waiting;
use super::{MpiCommunicator, describe};
use crate::collective::{GroupIdx, Parcel};
use crate::error::{Error, Result};
use crate::mpi::{Handle, Mpi, Status};

/// Between two looks at what the other ranks say, while waiting.
const LOOK: Duration = Duration::from_millis(20);

/// So long a wait only yields its core between tests: MPI moves a message piece by piece, some with each
/// test, so that sleeping between them is what a large message would wait for.
const EAGER: Duration = Duration::from_millis(20);

/// Tests between two sleeps of a longer wait.
const N_TESTS: u32 = 16;

/// Most bytes of a parcel at once: MPI's counts have 31 bits.
const PIECE: usize = 1 << 30;

/// How long a rank still waits after the job was told to end.
const LAST_WAIT: Duration = Duration::from_millis(700);

impl MpiCommunicator {
    /// Starts a non-blocking call of a group and waits for it; false for a group of one, which needs none.
    ///
    /// `start` gets the group's communicator and where to put the request. The buffers that it hands to
    /// MPI outlive this call when it succeeds, and the process' use of MPI when it fails.
    pub(super) fn together(
        &mut self,
        call: &'static str,
        group: GroupIdx,
        start: impl FnOnce(&Mpi, Handle, *mut Handle) -> Result<()>,
    ) -> Result<bool> {
        if let Some(error) = &self.failure {
            return Err(error.clone());
        }
        let Some(member) = self.groups.get_mut(group.0) else {
            return Err(self.member(group).err().unwrap_or_else(|| {
                Error::Internal(format!("{call}: group {} vanished", group.0))
            }));
        };
        member.n_calls += 1;
        let Some(comm) = member.comm else {
            return Ok(false);
        };
        let mut request = Handle::EMPTY;
        if let Err(error) = start(&self.mpi, comm, &raw mut request) {
            return self.failed(error);
        }
        self.complete(&mut request, |this| {
            let member = &this.groups[group.0];
            Waiting {
                what: describe(call, this.program.as_deref(), this.rank, this.place),
                ranks: member.ranks.clone(),
                number: member.n_calls,
            }
        })?;
        Ok(true)
    }

    /// Waits until all members of a group have come: each tells a member twice as far away in every
    /// round, and hears of one as far behind (a dissemination barrier).
    pub(super) fn assemble(
        &mut self,
        ranks: &[usize],
        member_idx: usize,
        tag: c_int,
    ) -> Result<()> {
        if let Some(error) = &self.failure {
            return Err(error.clone());
        }
        let (n_members, mut distance) = (ranks.len(), 1);
        while distance < n_members {
            let to = ranks[(member_idx + distance) % n_members];
            let from = ranks[(member_idx + n_members - distance) % n_members];
            let mut requests = [Handle::EMPTY; 2];
            let [sent, heard] = &mut requests;
            let (functions, byte) = (&self.mpi.functions, self.mpi.byte);
            let nothing = std::ptr::NonNull::<u8>::dangling().as_ptr().cast();
            // SAFETY: messages without bytes, which need no memory.
            let (sent, heard) = unsafe {
                (
                    (functions.isend)(nothing, 0, byte, to as c_int, tag, self.messages, sent),
                    (functions.irecv)(nothing, 0, byte, from as c_int, tag, self.messages, heard),
                )
            };
            for (call, code) in [("MPI_Isend", sent), ("MPI_Irecv", heard)] {
                if let Err(error) = self.mpi.check(call, code) {
                    return self.failed(error);
                }
            }
            for mut request in requests {
                self.complete(&mut request, |_| Waiting {
                    what: "joining the group".to_string(),
                    ranks: ranks.to_vec(),
                    number: 0,
                })?;
            }
            distance *= 2;
        }
        Ok(())
    }

    /// Waits for a request, listening to the others when it takes long.
    pub(super) fn complete(
        &mut self,
        request: &mut Handle,
        at: impl Fn(&MpiCommunicator) -> Waiting,
    ) -> Result<()> {
        self.poll(self.timeout, at, |this| this.test(request))
    }

    /// Waits until `is_done`, for at most `patience`, listening to the others when it takes long.
    pub(super) fn poll(
        &mut self,
        patience: Duration,
        at: impl Fn(&MpiCommunicator) -> Waiting,
        mut is_done: impl FnMut(&mut MpiCommunicator) -> Result<bool>,
    ) -> Result<()> {
        if is_done(self)? {
            return Ok(());
        }
        let started = Instant::now();
        let mut n_tests = 0_u32;
        let mut looked = started;
        let mut waiting: Option<Waiting> = None;
        while !is_done(self)? {
            n_tests = n_tests.wrapping_add(1);
            if n_tests < 64 {
                std::hint::spin_loop();
                continue;
            }
            let now = Instant::now();
            let waited = now - started;
            if waited < EAGER || !n_tests.is_multiple_of(N_TESTS) {
                std::thread::yield_now();
                continue;
            }
            // A core that others need, or a wait for something slow: give it up.
            std::thread::sleep(Duration::from_micros(50));
            if now - looked < LOOK {
                continue;
            }
            looked = now;
            if waiting.is_none() {
                let begun = self.lock_watch().begin(&self.mpi);
                if let Err(error) = begun {
                    return self.failed(error);
                }
            }
            let waiting = waiting.get_or_insert_with(|| at(self));
            let heard = self.lock_watch().look(&self.mpi, waiting, waited);
            if let Err(error) = heard {
                self.failure.get_or_insert_with(|| error.clone());
                return Err(error);
            }
            let ending = crate::signals::ending() && waited > self.timeout.min(LAST_WAIT);
            if waited >= patience || ending {
                let hint = if ending {
                    " (the job was told to end)"
                } else {
                    "; a larger --timeout helps where they are only slow"
                };
                let error = self.lock_watch().blame(waiting, waited, hint);
                return self.failed(error);
            }
        }
        self.stats.wait_s += started.elapsed().as_secs_f64();
        Ok(())
    }

    /// Starts to send and to receive parcels, greater ones piece by piece.
    ///
    /// # Safety
    /// As for [`Communicator::ship`](crate::collective::Communicator::ship).
    pub(super) unsafe fn start_parcels(
        &mut self,
        tag: u32,
        sends: &[Parcel],
        recvs: &[Parcel],
    ) -> Result<Vec<Handle>> {
        if let Some(error) = &self.failure {
            return Err(error.clone());
        }
        let (tag, byte, comm) = (tag as c_int, self.mpi.byte, self.parcels);
        let mut requests = Vec::new();
        for (is_send, parcels) in [(false, recvs), (true, sends)] {
            for parcel in parcels {
                let peer = parcel.rank as c_int;
                let mut done = 0;
                while done < parcel.n_bytes {
                    let n_bytes = (parcel.n_bytes - done).min(PIECE);
                    let at = parcel.address + done as u64;
                    let mut request = Handle::EMPTY;
                    let (functions, out) = (&self.mpi.functions, &raw mut request);
                    let n = n_bytes as c_int;
                    // SAFETY: as the caller promises.
                    let (call, code) = unsafe {
                        if is_send {
                            let isend = functions.isend;
                            (
                                "MPI_Isend",
                                isend(at as *const c_void, n, byte, peer, tag, comm, out),
                            )
                        } else {
                            let irecv = functions.irecv;
                            (
                                "MPI_Irecv",
                                irecv(at as *mut c_void, n, byte, peer, tag, comm, out),
                            )
                        }
                    };
                    if let Err(error) = self.mpi.check(call, code) {
                        return self.failed(error);
                    }
                    requests.push(request);
                    done += n_bytes;
                }
            }
        }
        Ok(requests)
    }

    pub(super) fn test(&mut self, request: &mut Handle) -> Result<bool> {
        let (mut flag, mut status) = (0, Status::EMPTY);
        // SAFETY: the request is one that MPI made; the out-parameters are locals.
        let code =
            unsafe { (self.mpi.functions.test)(&raw mut *request, &raw mut flag, &raw mut status) };
        match self.mpi.check("MPI_Test", code) {
            Ok(()) => Ok(flag != 0),
            Err(error) => self.failed(error),
        }
    }

    /// Every member's `counts[i]` words of `src`, in order, into `dst`.
    pub(super) fn gather_words(
        &mut self,
        call: &'static str,
        group: GroupIdx,
        src: &[u32],
        dst: &mut [u32],
        counts: &[usize],
    ) -> Result<()> {
        let (sizes, places) = self.sizes(call, counts)?;
        let n_src = src.len() as c_int;
        let done = self.together(call, group, |mpi, comm, request| {
            // SAFETY: the counts add up to `dst`, whose parts are disjoint; see `together`.
            let code = unsafe {
                (mpi.functions.iallgatherv)(
                    src.as_ptr().cast(),
                    n_src,
                    mpi.word,
                    dst.as_mut_ptr().cast(),
                    sizes.as_ptr(),
                    places.as_ptr(),
                    mpi.word,
                    comm,
                    request,
                )
            };
            mpi.check("MPI_Iallgatherv", code)
        })?;
        if !done {
            dst.copy_from_slice(src);
        }
        Ok(())
    }

    /// Member `j` receives `sent[j]` words of `src`, this member `received[j]` from it.
    pub(super) fn exchange_words(
        &mut self,
        call: &'static str,
        group: GroupIdx,
        (src, sent): (&[u32], &[usize]),
        (dst, received): (&mut [u32], &[usize]),
    ) -> Result<()> {
        let (out_sizes, out_places) = self.sizes(call, sent)?;
        let (in_sizes, in_places) = self.sizes(call, received)?;
        let done = self.together(call, group, |mpi, comm, request| {
            // SAFETY: the counts add up to the buffers' lengths; see `together`.
            let code = unsafe {
                (mpi.functions.ialltoallv)(
                    src.as_ptr().cast(),
                    out_sizes.as_ptr(),
                    out_places.as_ptr(),
                    mpi.word,
                    dst.as_mut_ptr().cast(),
                    in_sizes.as_ptr(),
                    in_places.as_ptr(),
                    mpi.word,
                    comm,
                    request,
                )
            };
            mpi.check("MPI_Ialltoallv", code)
        })?;
        if !done {
            dst.copy_from_slice(src);
        }
        Ok(())
    }

    /// MPI's counts and displacements.
    pub(super) fn sizes(
        &mut self,
        call: &str,
        counts: &[usize],
    ) -> Result<(Vec<c_int>, Vec<c_int>)> {
        let total: usize = counts.iter().sum();
        if c_int::try_from(total).is_err() {
            let error = Error::Unsupported(format!(
                "{call} on rank {} moves {total} elements at once, MPI's counts end at {}; divide the \
                 tensor over more ranks",
                self.rank,
                c_int::MAX
            ));
            return self.failed(error);
        }
        let sizes: Vec<c_int> = counts.iter().map(|count| *count as c_int).collect();
        let places = sizes.iter().scan(0, |next, size| {
            let place = *next;
            *next += size;
            Some(place)
        });
        let places = places.collect();
        Ok((sizes, places))
    }
}
