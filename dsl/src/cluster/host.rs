//! The cluster that this machine is to its threads.
//!
//! Enters: what the system tells about itself. Leaves: a [`Cluster`] of virtual devices.
//! Invariant: the devices share what the host has; together they never exceed it.

use super::{Arch, Cluster, Device, DeviceKind, Link};
use crate::dtype::DType;

/// What a host brings to its virtual devices.
#[derive(Clone, Debug, PartialEq)]
pub struct Host {
    pub n_cores: usize,
    pub memory_bytes: u64,
    /// Single-precision operations a second of one core.
    pub core_flops_per_s: f64,
    /// Of the whole host.
    pub memory_bytes_per_s: f64,
}

/// Clock of the nominal host core.
const HOST_CLOCK_HZ: f64 = 3.5e9;
/// Bytes a second, read and written together, that a host core copies; up to four cores add up.
const HOST_BYTES_PER_S_PER_CORE: f64 = 20.0e9;
/// Seconds of a barrier of threads that all run.
const HOST_BARRIER_S: f64 = 10.0e-6;

impl Host {
    /// This machine, with nominal speeds for its vector width; `meshweave profile` measures them.
    pub fn detect() -> Self {
        let n_cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        // Two fused multiply-adds a cycle on vectors of f32.
        let flops_per_cycle = 4.0 * vector_lanes();
        Self {
            n_cores,
            memory_bytes: memory_bytes().unwrap_or(8 << 30),
            core_flops_per_s: flops_per_cycle * HOST_CLOCK_HZ,
            memory_bytes_per_s: HOST_BYTES_PER_S_PER_CORE * n_cores.min(4) as f64,
        }
    }

    /// A fixed machine for tests and documentation: 2 cores with AVX2 and 8 GiB.
    pub fn nominal() -> Self {
        Self {
            n_cores: 2,
            memory_bytes: 8 << 30,
            core_flops_per_s: 112.0e9,
            memory_bytes_per_s: 40.0e9,
        }
    }
}

/// Lanes of f32 in a vector register.
fn vector_lanes() -> f64 {
    #[cfg(target_arch = "x86_64")]
    {
        if std::is_x86_feature_detected!("avx512f") {
            return 16.0;
        }
        if std::is_x86_feature_detected!("avx2") {
            return 8.0;
        }
    }
    4.0
}

/// The host's memory, where the system tells.
fn memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib << 10)
}

impl Cluster {
    /// `n_devices` virtual devices: threads that share the cores, memory and bandwidth of a host.
    ///
    /// Collectives are copies through shared memory between barriers; with more devices than cores a
    /// barrier waits for threads that do not run.
    pub fn local(n_devices: usize, host: &Host) -> Self {
        let n_devices = n_devices.max(1);
        let share = n_devices as f64;
        let crowding = (share / host.n_cores as f64).max(1.0);
        let flops_per_s = host.core_flops_per_s * host.n_cores as f64 / share;
        let link = |name: &str| Link {
            name: name.into(),
            // Every byte received is read and written.
            bytes_per_s: host.memory_bytes_per_s / share / 2.0,
            latency_s: HOST_BARRIER_S * crowding,
        };
        let device = Device {
            name: "core".into(),
            kind: DeviceKind::Host,
            arch: Arch::Host,
            memory_bytes: host.memory_bytes / n_devices as u64,
            memory_bytes_per_s: host.memory_bytes_per_s / share,
            matmul_flops_per_s: [DType::F32, DType::Bf16, DType::F16]
                .map(|dtype| (dtype, flops_per_s))
                .into(),
            vector_flops_per_s: flops_per_s / 2.0,
            matmul_efficiency: 0.85,
            vector_efficiency: 0.75,
            launch_s: 2.0e-6 * crowding,
            host_bytes_per_s: 0.0,
            host_memory_bytes: 0,
        };
        let name = format!("local:{n_devices}");
        Self::flat(
            name,
            [1, n_devices],
            device,
            [link("memory"), link("memory")],
        )
    }
}
