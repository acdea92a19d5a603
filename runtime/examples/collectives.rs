//! The best times of collectives between processes: `mpirun -n 2 collectives`, to set beside a plain MPI
//! benchmark of the same sizes (whole tensors of so many bytes, rank 0's clock, best of all repetitions).

// An example may fail as it likes.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use meshweave_dsl::layout::ReduceKind;
use meshweave_runtime::collective::mpi::MpiCommunicator;
use meshweave_runtime::collective::{Communicator, Crossing, CrossingOrder, Division};
use meshweave_runtime::mpi::Mpi;

fn main() {
    let started = Instant::now();
    let mpi = Arc::new(Mpi::load().unwrap());
    let mut communicator = MpiCommunicator::new(mpi, Duration::from_secs(60)).unwrap();
    let (rank, n_ranks) = (communicator.rank(), communicator.n_ranks());
    let all = communicator
        .join(&(0..n_ranks).collect::<Vec<_>>())
        .unwrap();
    communicator.barrier(all).unwrap();
    if rank == 0 {
        println!("start {:.3} s", started.elapsed().as_secs_f64());
    }
    for n_bytes in (0..6).map(|i| 4_usize << (4 * i)) {
        let n = n_bytes / 4;
        let part = (n / n_ranks).max(1);
        let (src, mut dst) = (vec![1.0_f32; n], vec![0.0_f32; n]);
        let (whole, mut gathered) = (vec![0_u32; part * n_ranks], vec![0_u32; part * n_ranks]);
        let division = Division {
            outer: 1,
            counts: vec![part; n_ranks],
            inner: 1,
        };
        let crossing = Crossing {
            outer: 1,
            mid: 1,
            inner: 1,
            split_counts: vec![part; n_ranks],
            concat_counts: vec![part; n_ranks],
            order: CrossingOrder::SameDim,
        };
        let n_reps = if n_bytes < 65536 { 200 } else { 20 };
        let mut best = [f64::INFINITY; 3];
        for _ in 0..n_reps {
            for (idx, best) in best.iter_mut().enumerate() {
                communicator.barrier(all).unwrap();
                let start = Instant::now();
                match idx {
                    0 => communicator.all_reduce(all, ReduceKind::Sum, Some(&src), &mut dst),
                    1 => communicator.all_gather(all, &whole[..part], &mut gathered, &division),
                    _ => communicator.all_to_all(all, &whole, &mut gathered, &crossing),
                }
                .unwrap();
                *best = best.min(start.elapsed().as_secs_f64());
            }
        }
        if rank == 0 {
            let [reduce, gather, cross] = best.map(|seconds| 1e6 * seconds);
            println!(
                "{n_bytes:>9} bytes  all_reduce {reduce:9.1} us  all_gather {gather:9.1} us  \
                 all_to_all {cross:9.1} us"
            );
        }
    }
    communicator.finish().unwrap();
}
