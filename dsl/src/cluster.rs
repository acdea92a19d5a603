//! Clusters: devices, nodes and links, as far as prices need them.
//!
//! Enters: a preset such as `h100:16`, or a `cluster` block of the language.
//! Leaves: sizes and speeds in bytes, seconds and floating-point operations a second.
//! Invariant: all counts and speeds are positive; rank `r` runs on device `r`, and devices are
//! numbered node by node.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::dtype::DType;

/// What a preset or a block says wrongly.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    #[error("{0}")]
    Invalid(String),
}

/// Homogeneous nodes of homogeneous devices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    pub name: String,
    pub n_nodes: usize,
    pub devices_per_node: usize,
    pub device: Device,
    /// Between two devices of a node.
    pub within_node: Link,
    /// Between devices of two nodes.
    pub between_nodes: Link,
}

/// What runs the program of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// A thread of this machine.
    Host,
    Gpu,
}

/// One device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Device {
    pub name: String,
    pub kind: DeviceKind,
    pub memory_bytes: u64,
    pub memory_bytes_per_s: f64,
    /// Floating-point operations a second of dense contractions, by the type of the operands.
    pub matmul_flops_per_s: BTreeMap<DType, f64>,
    /// Floating-point operations a second of everything else.
    pub vector_flops_per_s: f64,
    /// Part of the matmul peak that large contractions reach.
    pub matmul_efficiency: f64,
    /// Part of the vector peak and of the memory bandwidth that other ops reach.
    pub vector_efficiency: f64,
    /// Fixed seconds of an instruction.
    pub launch_s: f64,
}

/// A link between devices, per device and direction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Link {
    pub name: String,
    pub bytes_per_s: f64,
    pub latency_s: f64,
}

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

/// A device with its links, before it is multiplied.
struct Preset {
    name: &'static str,
    devices_per_node: usize,
    memory_gb: f64,
    memory_tb_per_s: f64,
    bf16_tflops: f64,
    f32_tflops: f64,
    vector_tflops: f64,
    matmul_efficiency: f64,
    within: (&'static str, f64),
    between: (&'static str, f64),
}

/// Nominal figures. Sources: NVIDIA's data sheets of the A100 (2021), H100 and H200 SXM (2023): dense
/// bf16 peak, TF32 peak for f32 contractions, f32 vector peak, memory and NVLink (per direction);
/// achievable parts of the matmul peak (271 of 312, 794 of 989 TFLOPS) and the network per device
/// (Selene: 8 × 200 Gb/s, Eos and DGX H100: 8 × 400 Gb/s a node) as collected in
/// stas00/ml-engineering, chapters on accelerators and network.
const PRESETS: [Preset; 6] = [
    Preset {
        name: "a100-40",
        devices_per_node: 8,
        memory_gb: 40.0,
        memory_tb_per_s: 1.56,
        bf16_tflops: 312.0,
        f32_tflops: 156.0,
        vector_tflops: 19.5,
        matmul_efficiency: 0.87,
        within: ("nvlink", 300.0),
        between: ("hdr", 25.0),
    },
    Preset {
        name: "a100-80",
        devices_per_node: 8,
        memory_gb: 80.0,
        memory_tb_per_s: 2.0,
        bf16_tflops: 312.0,
        f32_tflops: 156.0,
        vector_tflops: 19.5,
        matmul_efficiency: 0.87,
        within: ("nvlink", 300.0),
        between: ("hdr", 25.0),
    },
    Preset {
        name: "h100",
        devices_per_node: 8,
        memory_gb: 80.0,
        memory_tb_per_s: 3.35,
        bf16_tflops: 989.0,
        f32_tflops: 494.0,
        vector_tflops: 67.0,
        matmul_efficiency: 0.80,
        within: ("nvlink", 450.0),
        between: ("ndr", 50.0),
    },
    Preset {
        name: "eos-h100",
        devices_per_node: 8,
        memory_gb: 80.0,
        memory_tb_per_s: 3.35,
        bf16_tflops: 989.0,
        f32_tflops: 494.0,
        vector_tflops: 67.0,
        matmul_efficiency: 0.80,
        within: ("nvlink", 450.0),
        between: ("ndr", 50.0),
    },
    Preset {
        name: "h200",
        devices_per_node: 8,
        memory_gb: 141.0,
        memory_tb_per_s: 4.8,
        bf16_tflops: 989.0,
        f32_tflops: 494.0,
        vector_tflops: 67.0,
        matmul_efficiency: 0.80,
        within: ("nvlink", 450.0),
        between: ("ndr", 50.0),
    },
    Preset {
        name: "b200",
        devices_per_node: 8,
        memory_gb: 180.0,
        memory_tb_per_s: 8.0,
        bf16_tflops: 2250.0,
        f32_tflops: 1125.0,
        vector_tflops: 75.0,
        matmul_efficiency: 0.78,
        within: ("nvlink", 900.0),
        between: ("ndr", 50.0),
    },
];

/// Part of the memory bandwidth that streaming kernels reach on a GPU.
const GPU_VECTOR_EFFICIENCY: f64 = 0.85;
/// Fixed cost of a kernel on a GPU stream.
const GPU_LAUNCH_S: f64 = 4.0e-6;
/// Base latency of a step of a ring within a node and between nodes (NCCL's tuning tables: NVLink
/// with the simple protocol, InfiniBand with the simple protocol).
const NVLINK_LATENCY_S: f64 = 3.4e-6;
const NETWORK_LATENCY_S: f64 = 14.0e-6;

impl Cluster {
    /// The cluster of a text such as `local:8`, `h100:16` or `eos-h100:128`.
    ///
    /// # Errors
    /// An unknown name, or a count that is no positive number.
    pub fn preset(text: &str) -> Result<Self, ClusterError> {
        let (name, count) = text.split_once(':').unwrap_or((text, "1"));
        let n_devices = count
            .parse()
            .ok()
            .filter(|count| *count > 0)
            .ok_or_else(|| {
                ClusterError::Invalid(format!(
                    "cluster `{text}`: `{count}` is no number of devices; write `{name}:8`"
                ))
            })?;
        if name == "local" {
            return Ok(Self::local(n_devices, &Host::detect()));
        }
        match PRESETS.iter().find(|preset| preset.name == name) {
            Some(preset) => Ok(preset.cluster(text, n_devices)),
            None => {
                let known = Self::preset_names();
                let near = crate::diagnostics::nearest(name, known.iter().copied());
                let hint = near.map_or_else(
                    || format!("known are {}", known.join(", ")),
                    |near| format!("did you mean `{near}:{count}`?"),
                );
                Err(ClusterError::Invalid(format!(
                    "cluster `{text}` is unknown: {hint}"
                )))
            }
        }
    }

    /// The names that [`Cluster::preset`] knows.
    pub fn preset_names() -> Vec<&'static str> {
        std::iter::once("local")
            .chain(PRESETS.iter().map(|preset| preset.name))
            .collect()
    }

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
        Self {
            name: format!("local:{n_devices}"),
            n_nodes: 1,
            devices_per_node: n_devices,
            device: Device {
                name: "core".into(),
                kind: DeviceKind::Host,
                memory_bytes: host.memory_bytes / n_devices as u64,
                memory_bytes_per_s: host.memory_bytes_per_s / share,
                matmul_flops_per_s: [DType::F32, DType::Bf16, DType::F16]
                    .map(|dtype| (dtype, flops_per_s))
                    .into(),
                vector_flops_per_s: flops_per_s / 2.0,
                matmul_efficiency: 0.85,
                vector_efficiency: 0.75,
                launch_s: 2.0e-6 * crowding,
            },
            within_node: link("memory"),
            between_nodes: link("memory"),
        }
    }

    /// Number of devices.
    pub fn n_devices(&self) -> usize {
        self.n_nodes * self.devices_per_node
    }

    /// The node of a rank.
    pub fn node_of(&self, rank: usize) -> usize {
        rank / self.devices_per_node.max(1)
    }

    /// The same cluster with another number of devices: the first so many.
    #[must_use]
    pub fn with_devices(mut self, n_devices: usize) -> Self {
        self.devices_per_node = self.devices_per_node.min(n_devices).max(1);
        self.n_nodes = n_devices.div_ceil(self.devices_per_node).max(1);
        self
    }
}

impl Device {
    /// Contraction speed for operands of this type, before efficiency.
    pub fn matmul_peak(&self, dtype: DType) -> f64 {
        let by_type = &self.matmul_flops_per_s;
        let peak = by_type.get(&dtype).or_else(|| by_type.get(&DType::F32));
        peak.copied().unwrap_or(self.vector_flops_per_s)
    }
}

impl Preset {
    fn cluster(&self, text: &str, n_devices: usize) -> Cluster {
        let devices_per_node = self.devices_per_node.min(n_devices);
        let link = |(name, gb_per_s): (&str, f64), latency_s: f64| Link {
            name: name.into(),
            bytes_per_s: gb_per_s * 1e9,
            latency_s,
        };
        let half = self.bf16_tflops * 1e12;
        Cluster {
            name: text.into(),
            n_nodes: n_devices.div_ceil(devices_per_node),
            devices_per_node,
            device: Device {
                name: self.name.into(),
                kind: DeviceKind::Gpu,
                memory_bytes: (self.memory_gb * 1e9) as u64,
                memory_bytes_per_s: self.memory_tb_per_s * 1e12,
                matmul_flops_per_s: [
                    (DType::F32, self.f32_tflops * 1e12),
                    (DType::Bf16, half),
                    (DType::F16, half),
                ]
                .into(),
                vector_flops_per_s: self.vector_tflops * 1e12,
                matmul_efficiency: self.matmul_efficiency,
                vector_efficiency: GPU_VECTOR_EFFICIENCY,
                launch_s: GPU_LAUNCH_S,
            },
            within_node: link(self.within, NVLINK_LATENCY_S),
            between_nodes: link(self.between, NETWORK_LATENCY_S),
        }
    }
}

impl fmt::Display for Cluster {
    /// One line for people.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} × {} {}",
            self.name, self.n_nodes, self.devices_per_node, self.device.name
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_have_their_devices() {
        let cluster = Cluster::preset("eos-h100:128").unwrap();
        assert_eq!((cluster.n_nodes, cluster.devices_per_node), (16, 8));
        assert_eq!(cluster.node_of(17), 2);
        assert_eq!(Cluster::preset("a100-80:4").unwrap().n_devices(), 4);
        assert_eq!(Cluster::preset("local:8").unwrap().n_devices(), 8);
    }

    #[test]
    fn bad_presets_say_what_is_known() {
        let message = |text: &str| Cluster::preset(text).unwrap_err().to_string();
        assert_eq!(
            message("h10:8"),
            "cluster `h10:8` is unknown: did you mean `h100:8`?"
        );
        assert_eq!(
            message("h100:many"),
            "cluster `h100:many`: `many` is no number of devices; write `h100:8`"
        );
    }

    #[test]
    fn virtual_devices_share_the_host() {
        let (one, eight) = (
            Cluster::local(1, &Host::nominal()),
            Cluster::local(8, &Host::nominal()),
        );
        let ratio = one.device.matmul_peak(DType::F32) / eight.device.matmul_peak(DType::F32);
        assert!((ratio - 8.0).abs() < 1e-9);
    }
}
