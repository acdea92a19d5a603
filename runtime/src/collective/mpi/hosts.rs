//! The order of ranks by where they run.
//!
//! In: the host of every process of the job. Out: the processes such that those of a host follow each
//! other.
//! Invariant: all processes come to the same order, since all sort the same names.

use std::ffi::c_int;
use std::ptr;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::mpi::{Handle, Mpi, Status};

/// Bytes of a host's name, the longest of either interface.
const NAME_BYTES: usize = 256;

/// The host of every process, in the launcher's order.
///
/// # Errors
/// `Exhausted` when MPI refuses, or some processes have not come after `timeout`.
pub(super) fn of_ranks(mpi: &Mpi, timeout: Duration) -> Result<Vec<String>> {
    let mut size = 0;
    // SAFETY: the out-parameter is a local; the world's communicator is always valid.
    let code = unsafe { (mpi.functions.comm_size)(mpi.world, &raw mut size) };
    mpi.check("MPI_Comm_size", code)?;
    let n_ranks = size as usize;
    let mut own = mpi.host().into_bytes();
    own.resize(NAME_BYTES, 0);
    let mut all = vec![0u8; n_ranks * NAME_BYTES];
    let counts = vec![NAME_BYTES as c_int; n_ranks];
    let starts: Vec<c_int> = (0..n_ranks)
        .map(|rank| (rank * NAME_BYTES) as c_int)
        .collect();
    let (mut request, mut is_done, mut status) = (Handle::EMPTY, 0, Status::EMPTY);
    let started = Instant::now();
    // SAFETY: the buffers hold what the counts say, and live until the request has ended.
    unsafe {
        let code = (mpi.functions.iallgatherv)(
            ptr::from_ref(own.as_slice()).cast(),
            NAME_BYTES as c_int,
            mpi.byte,
            ptr::from_mut(all.as_mut_slice()).cast(),
            counts.as_ptr(),
            starts.as_ptr(),
            mpi.byte,
            mpi.world,
            &raw mut request,
        );
        mpi.check("MPI_Iallgatherv", code)?;
        while is_done == 0 {
            let code = (mpi.functions.test)(&raw mut request, &raw mut is_done, &raw mut status);
            mpi.check("MPI_Test", code)?;
            if started.elapsed() >= timeout {
                // MPI may write to it until the process ends.
                std::mem::forget((own, all, counts, starts));
                return Err(Error::Exhausted(format!(
                    "not all {n_ranks} processes of the job have come within {:.1} s of this one's start, \
                     on {}: one of them is stopped, or busy; a larger --timeout helps where they are only slow",
                    timeout.as_secs_f64(),
                    mpi.host()
                )));
            }
            std::thread::yield_now();
        }
    }
    let name = |bytes: &[u8]| {
        let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(text).into_owned()
    };
    Ok(all.chunks(NAME_BYTES).map(name).collect())
}

/// The processes host by host: hosts in the order of their first processes, and on each its processes in
/// their own order.
pub(super) fn in_order(hosts: &[String]) -> Vec<usize> {
    let first = |rank: &usize| hosts.iter().position(|host| *host == hosts[*rank]);
    let mut order: Vec<usize> = (0..hosts.len()).collect();
    order.sort_by_key(first);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(hosts: &[&str]) -> Vec<usize> {
        in_order(&hosts.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn ranks_fill_one_host_after_another() {
        assert_eq!(order(&["b", "b", "a", "a"]), [0, 1, 2, 3]);
        assert_eq!(order(&["b", "a", "b", "a"]), [0, 2, 1, 3]);
        assert_eq!(order(&["c", "a", "b", "a", "c", "b"]), [0, 4, 1, 3, 2, 5]);
    }
}
