//! What collectives between processes take: `mpirun -n 4 mpi_speed [REPEATS]`.
//!
//! Enters: an MPI job. Leaves: a line a collective and size, from rank 0: the median of all calls, measured.
//! `scripts/mpi-speed.sh` sets them beside MPI's own calls.

use std::sync::Arc;
use std::time::{Duration, Instant};

use meshweave_dsl::layout::ReduceKind;
use meshweave_runtime::collective::mpi::MpiCommunicator;
use meshweave_runtime::collective::{Communicator, Division};
use meshweave_runtime::error::Result;
use meshweave_runtime::mpi::Mpi;

/// Bytes of the whole tensor.
const SIZES: [usize; 4] = [4 << 10, 64 << 10, 1 << 20, 4 << 20];

fn main() -> Result<()> {
    let n_repeats: usize = std::env::args()
        .nth(1)
        .and_then(|text| text.parse().ok())
        .unwrap_or(50);
    let mpi = Arc::new(Mpi::load()?);
    let mut communicator = MpiCommunicator::new(mpi, Duration::from_secs(60))?;
    let (rank, n_ranks) = (communicator.rank(), communicator.n_ranks());
    let group = communicator.join(&(0..n_ranks).collect::<Vec<_>>())?;
    for n_bytes in SIZES {
        let n = n_bytes / 4;
        let division = Division {
            outer: 1,
            counts: vec![n / n_ranks; n_ranks],
            inner: 1,
        };
        let own = vec![1.0_f32; n];
        let mut whole = vec![0.0_f32; division.n_elements()];
        let mut all_words = vec![0_u32; division.n_elements()];
        let own_words = vec![1_u32; n / n_ranks];
        let mut time = |call: &str, run: &mut dyn FnMut(&mut MpiCommunicator) -> Result<()>| {
            let mut seconds = Vec::with_capacity(n_repeats);
            for _ in 0..n_repeats {
                communicator.barrier(group)?;
                let start = Instant::now();
                run(&mut communicator)?;
                seconds.push(start.elapsed().as_secs_f64());
            }
            seconds.sort_by(f64::total_cmp);
            if rank == 0 {
                let median_us = 1e6 * seconds[n_repeats / 2];
                println!("{call:<15} {:>8} KiB {median_us:>10.1} us", n_bytes >> 10);
            }
            Ok(())
        };
        time("all_reduce", &mut |communicator| {
            whole[..n].copy_from_slice(&own);
            communicator.all_reduce(group, ReduceKind::Sum, Some(&own), &mut whole[..n])
        })?;
        time("all_gather", &mut |communicator| {
            communicator.all_gather(group, &own_words, &mut all_words, &division)
        })?;
    }
    communicator.finish()
}
