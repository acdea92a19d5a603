//! Measuring this machine: what its virtual devices reach when all of them work at once.
//!
//! Enters: a number of devices. Leaves: a cluster whose speeds were measured here, now.
//! Invariant: nothing is nominal: matmul rate, memory rate, and latency and rate of collectives all
//! come from the code that runs programs. Medians of a few rounds; takes about two seconds.

use std::collections::BTreeMap;
use std::time::Instant;

use meshweave_dsl::cluster::{Arch, Cluster, Device, DeviceKind, Host, Link};
use meshweave_dsl::dtype::DType;
use meshweave_dsl::program::ContractIndex;

use crate::collective::threads::{WaitOptions, World};
use crate::collective::{Communicator, Division};
use crate::contract::{ContractOptions, ContractPlan};
use crate::error::{Error, Result};

/// Side of the square matrices of the matmul rate.
const MATMUL_SIDE: usize = 384;
/// Elements of the streams of the memory rate: well beyond the caches.
const STREAM_ELEMENTS: usize = 4 << 20;
/// Elements that every device contributes to the large and the small collective.
const LARGE_ELEMENTS: usize = 1 << 20;
const SMALL_ELEMENTS: usize = 16;
const N_ROUNDS: usize = 5;

/// What one device measured.
#[derive(Clone, Copy, Debug)]
struct Rates {
    matmul_flops_per_s: f64,
    vector_flops_per_s: f64,
    memory_bytes_per_s: f64,
    small_s: f64,
    large_s: f64,
}

/// Measures `n_devices` virtual devices of this machine, all at once, as `run` uses them.
///
/// # Errors
/// `Exhausted` when a thread cannot be started.
pub fn measure_host(n_devices: usize) -> Result<Cluster> {
    let n_devices = n_devices.max(1);
    let world = World::new(n_devices, WaitOptions::for_threads(n_devices));
    let rates = std::thread::scope(|scope| {
        let devices: Vec<_> = world
            .communicators()
            .into_iter()
            .map(|communicator| scope.spawn(move || measure_device(communicator, n_devices)))
            .collect();
        devices
            .into_iter()
            .map(|device| {
                device
                    .join()
                    .map_err(|_| Error::Internal("a device stopped while measuring".into()))?
            })
            .collect::<Result<Vec<Rates>>>()
    })?;
    let median = |of: fn(&Rates) -> f64| middle(rates.iter().map(of).collect());
    // A device receives n − 1 parts in an all_gather.
    let received_bytes = (4 * LARGE_ELEMENTS * (n_devices - 1).max(1)) as f64;
    let latency_s = median(|rates| rates.small_s);
    let link = Link {
        name: "shared memory".into(),
        bytes_per_s: received_bytes / (median(|rates| rates.large_s) - latency_s).max(1.0e-9),
        latency_s,
    };
    let host = Host::detect();
    let device = Device {
        name: "thread".into(),
        kind: DeviceKind::Host,
        arch: Arch::Host,
        memory_bytes: host.memory_bytes / n_devices as u64,
        memory_bytes_per_s: median(|rates| rates.memory_bytes_per_s),
        matmul_flops_per_s: BTreeMap::from([(
            DType::F32,
            median(|rates| rates.matmul_flops_per_s),
        )]),
        vector_flops_per_s: median(|rates| rates.vector_flops_per_s),
        matmul_efficiency: 1.0,
        vector_efficiency: 1.0,
        launch_s: 1.0e-6,
        host_bytes_per_s: 0.0,
        host_memory_bytes: 0,
    };
    Ok(Cluster::flat(
        format!("measured-local-{n_devices}"),
        [1, n_devices],
        device,
        [link.clone(), link],
    ))
}

fn measure_device(mut communicator: impl Communicator, n_devices: usize) -> Result<Rates> {
    let all: Vec<usize> = (0..n_devices).collect();
    let world = communicator.join(&all)?;
    let matmul_s = time_matmul(&mut communicator, world)?;
    let stream_s = time_stream(&mut communicator, world)?;
    let vector_s = time_vector(&mut communicator, world)?;
    let small_s = time_gather(&mut communicator, world, n_devices, SMALL_ELEMENTS)?;
    let large_s = time_gather(&mut communicator, world, n_devices, LARGE_ELEMENTS)?;
    Ok(Rates {
        matmul_flops_per_s: 2.0 * (MATMUL_SIDE as f64).powi(3) / matmul_s,
        vector_flops_per_s: vector_s,
        memory_bytes_per_s: (8 * STREAM_ELEMENTS) as f64 / stream_s,
        small_s,
        large_s,
    })
}

type Group = crate::collective::GroupIdx;

/// Median seconds of `work`, all devices starting each round together.
fn timed(
    communicator: &mut impl Communicator,
    world: Group,
    mut work: impl FnMut() -> Result<()>,
) -> Result<f64> {
    work()?;
    let mut seconds = Vec::with_capacity(N_ROUNDS);
    for _ in 0..N_ROUNDS {
        communicator.barrier(world)?;
        let start = Instant::now();
        work()?;
        communicator.barrier(world)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    Ok(middle(seconds))
}

fn time_matmul(communicator: &mut impl Communicator, world: Group) -> Result<f64> {
    let side = MATMUL_SIDE;
    let indices = [
        ContractIndex {
            size: side,
            a: side,
            b: 0,
            c: side,
        },
        ContractIndex {
            size: side,
            a: 0,
            b: 1,
            c: 1,
        },
        ContractIndex {
            size: side,
            a: 1,
            b: side,
            c: 0,
        },
    ];
    let plan = ContractPlan::new(
        &indices,
        ContractOptions {
            accumulate: false,
            alpha: 1.0,
        },
    )?;
    let (a, b) = (vec![1.0_f32; side * side], vec![0.5_f32; side * side]);
    let mut c = vec![0.0_f32; side * side];
    timed(communicator, world, || plan.run(&a, &b, &mut c))
}

fn time_stream(communicator: &mut impl Communicator, world: Group) -> Result<f64> {
    let src = vec![1.0_f32; STREAM_ELEMENTS];
    let mut dst = vec![0.0_f32; STREAM_ELEMENTS];
    timed(communicator, world, || {
        dst.copy_from_slice(std::hint::black_box(&src));
        std::hint::black_box(&mut dst);
        Ok(())
    })
}

/// Multiply-adds a second on data in the first-level cache.
fn time_vector(communicator: &mut impl Communicator, world: Group) -> Result<f64> {
    const N_ELEMENTS: usize = 2048;
    const N_REPEATS: usize = 4096;
    let mut x = vec![1.0_f32; N_ELEMENTS];
    let seconds = timed(communicator, world, || {
        for _ in 0..N_REPEATS {
            for element in std::hint::black_box(&mut x).iter_mut() {
                *element = *element * 0.999 + 0.001;
            }
        }
        Ok(())
    })?;
    Ok((2 * N_ELEMENTS * N_REPEATS) as f64 / seconds)
}

fn time_gather(
    communicator: &mut impl Communicator,
    world: Group,
    n_devices: usize,
    n_elements: usize,
) -> Result<f64> {
    let src = vec![0_u32; n_elements];
    let mut dst = vec![0_u32; n_elements * n_devices];
    let division = Division {
        outer: 1,
        counts: vec![n_elements; n_devices],
        inner: 1,
    };
    let mut seconds = Vec::with_capacity(N_ROUNDS);
    for round in 0..=N_ROUNDS {
        communicator.barrier(world)?;
        let start = Instant::now();
        communicator.all_gather(world, &src, &mut dst, &division)?;
        if round > 0 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    Ok(middle(seconds))
}

fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rate_is_positive_and_finite() {
        let cluster = measure_host(2).unwrap();
        let device = &cluster.device;
        for rate in [
            device.memory_bytes_per_s,
            device.vector_flops_per_s,
            device.matmul_flops_per_s[&DType::F32],
            cluster.within_node.bytes_per_s,
            cluster.within_node.latency_s,
        ] {
            assert!(rate.is_finite() && rate > 0.0, "{cluster:?}");
        }
    }
}
