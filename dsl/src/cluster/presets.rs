//! Devices and networks by name.
//!
//! Enters: a name such as `h100`. Leaves: nominal figures of a device, its node and its network.
//! Invariant: figures are those of data sheets; what part of them is reached is the cost model's.
//!
//! Sources: NVIDIA's data sheets of V100 SXM2/SXM3, A100, H100, H200, H800, B200, B300, GB200 and
//! GB300 NVL72; AMD's of MI250X and MI300X; Google Cloud's pages of TPU v5p and v6e: dense peaks,
//! memory, links per direction. Achievable parts of the matmul peak (271 of 312, 794 of 989, 1745 of
//! 2250, 1822 of 2500, 668 of 1300 TFLOPS) and networks per device (Selene: 8 × 200 Gb/s, Eos and
//! DGX H100: 8 × 400 Gb/s a node, Frontier: 4 × 200 Gb/s for 8 dies) as collected in
//! stas00/ml-engineering, chapters on accelerators and network. Those of Hopper and later are bursts of
//! the best shape; the parts here are what remains of them at the power limit of hours of training.

use super::{Arch, Cluster, Device, DeviceKind, Link};
use crate::dtype::DType;

/// A device with its links, before it is multiplied.
pub(super) struct Preset {
    name: &'static str,
    arch: Arch,
    devices_per_node: usize,
    memory_gb: f64,
    memory_tb_per_s: f64,
    /// Peaks in TFLOPS: contractions of bf16 and f32 (TF32 where there is one), and vectors of f32.
    bf16: f64,
    f32: f64,
    vector: f64,
    matmul_efficiency: f64,
    /// Name and GB/s a device and direction.
    within: (&'static str, f64),
    between: (&'static str, f64),
    /// GB/s to the memory of the host, and GB of it, a device.
    host: (f64, f64),
}

#[rustfmt::skip] // A table: one line a device.
const PRESETS: [Preset; 18] = [
    preset("v100-16", Arch::Volta, 8, (16.0, 0.9), [125.0, 15.7, 15.7], 0.80, ("nvlink", 150.0), ("edr", 12.5), (12.0, 64.0)),
    preset("v100-32", Arch::Volta, 16, (32.0, 0.9), [125.0, 15.7, 15.7], 0.80, ("nvlink", 150.0), ("edr", 6.25), (6.0, 96.0)),
    preset("a100-40", Arch::Ampere, 8, (40.0, 1.56), [312.0, 156.0, 19.5], 0.87, ("nvlink", 300.0), ("hdr", 25.0), (25.0, 128.0)),
    preset("a100-80", Arch::Ampere, 8, (80.0, 2.0), [312.0, 156.0, 19.5], 0.87, ("nvlink", 300.0), ("hdr", 25.0), (25.0, 256.0)),
    preset("h100", Arch::Hopper, 8, (80.0, 3.35), [989.0, 494.0, 67.0], 0.65, ("nvlink", 450.0), ("ndr", 50.0), (55.0, 256.0)),
    preset("eos-h100", Arch::Hopper, 8, (80.0, 3.35), [989.0, 494.0, 67.0], 0.65, ("nvlink", 450.0), ("ndr", 50.0), (55.0, 256.0)),
    // HBM2e, and 500 W in place of 700 W, as torchtitan's tables note.
    preset("h100-96", Arch::Hopper, 8, (96.0, 2.4), [989.0, 494.0, 67.0], 0.53, ("nvlink", 450.0), ("ndr", 50.0), (55.0, 256.0)),
    preset("h800", Arch::Hopper, 8, (80.0, 3.35), [989.0, 494.0, 67.0], 0.65, ("nvlink", 200.0), ("ndr", 50.0), (55.0, 256.0)),
    preset("h200", Arch::Hopper, 8, (141.0, 4.8), [989.0, 494.0, 67.0], 0.65, ("nvlink", 450.0), ("ndr", 50.0), (55.0, 256.0)),
    preset("b200", Arch::Blackwell, 8, (180.0, 8.0), [2250.0, 1125.0, 75.0], 0.66, ("nvlink", 900.0), ("ndr", 50.0), (55.0, 256.0)),
    preset("b300", Arch::BlackwellUltra, 8, (288.0, 8.0), [2250.0, 1125.0, 75.0], 0.70, ("nvlink", 900.0), ("xdr", 100.0), (55.0, 256.0)),
    preset("gb200", Arch::Blackwell, 72, (186.0, 8.0), [2500.0, 1250.0, 80.0], 0.64, ("nvlink", 900.0), ("ndr", 50.0), (200.0, 240.0)),
    preset("gb300", Arch::BlackwellUltra, 72, (288.0, 8.0), [2500.0, 1250.0, 80.0], 0.70, ("nvlink", 900.0), ("xdr", 100.0), (200.0, 240.0)),
    // Dies are devices: two a package, eight a node.
    preset("mi250x", Arch::Cdna2, 8, (64.0, 1.64), [191.5, 47.9, 23.9], 0.72, ("xgmi", 50.0), ("slingshot", 12.5), (36.0, 64.0)),
    preset("mi300x", Arch::Cdna3, 8, (192.0, 5.3), [1300.0, 653.0, 163.0], 0.51, ("xgmi", 448.0), ("roce", 50.0), (55.0, 256.0)),
    preset("tpu-v5p", Arch::TpuV5p, 4, (95.0, 2.77), [459.0, 115.0, 10.0], 0.85, ("ici", 300.0), ("ici", 300.0), (16.0, 112.0)),
    preset("tpu-v6e", Arch::TpuV6e, 8, (32.0, 1.64), [918.0, 230.0, 20.0], 0.80, ("ici", 200.0), ("ici", 200.0), (16.0, 180.0)),
    // AWS p5: EFA in place of InfiniBand.
    preset("h100-efa", Arch::Hopper, 8, (80.0, 3.35), [989.0, 494.0, 67.0], 0.65, ("nvlink", 450.0), ("efa", 50.0), (55.0, 256.0)),
];

#[expect(clippy::too_many_arguments)]
const fn preset(
    name: &'static str,
    arch: Arch,
    devices_per_node: usize,
    memory: (f64, f64),
    peaks: [f64; 3],
    matmul_efficiency: f64,
    within: (&'static str, f64),
    between: (&'static str, f64),
    host: (f64, f64),
) -> Preset {
    Preset {
        name,
        arch,
        devices_per_node,
        memory_gb: memory.0,
        memory_tb_per_s: memory.1,
        bf16: peaks[0],
        f32: peaks[1],
        vector: peaks[2],
        matmul_efficiency,
        within,
        between,
        host,
    }
}

/// Part of the memory bandwidth that streaming kernels reach on a GPU.
const GPU_VECTOR_EFFICIENCY: f64 = 0.85;
/// Fixed cost of a kernel on a GPU stream.
const GPU_LAUNCH_S: f64 = 4.0e-6;
/// Base latency of a step of a ring within a node and between nodes (NCCL's tuning tables: NVLink
/// with the simple protocol, InfiniBand with the simple protocol).
const NVLINK_LATENCY_S: f64 = 3.4e-6;
const NETWORK_LATENCY_S: f64 = 14.0e-6;

/// The preset of a name.
pub(super) fn find(name: &str) -> Option<&'static Preset> {
    PRESETS.iter().find(|preset| preset.name == name)
}

/// All names.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|preset| preset.name)
}

impl Preset {
    pub(super) fn cluster(&self, text: &str, n_devices: usize) -> Cluster {
        let devices_per_node = self.node(n_devices);
        let link = |(name, gb_per_s): (&str, f64), latency_s: f64| Link {
            name: name.into(),
            bytes_per_s: gb_per_s * 1e9,
            latency_s,
        };
        let half = self.bf16 * 1e12;
        let device = Device {
            name: self.name.into(),
            kind: DeviceKind::Gpu,
            arch: self.arch,
            memory_bytes: (self.memory_gb * 1e9) as u64,
            memory_bytes_per_s: self.memory_tb_per_s * 1e12,
            matmul_flops_per_s: [
                (DType::F32, self.f32 * 1e12),
                (DType::Bf16, half),
                (DType::F16, half),
            ]
            .into(),
            vector_flops_per_s: self.vector * 1e12,
            matmul_efficiency: self.matmul_efficiency,
            vector_efficiency: GPU_VECTOR_EFFICIENCY,
            launch_s: GPU_LAUNCH_S,
            host_bytes_per_s: self.host.0 * 1e9,
            host_memory_bytes: (self.host.1 * 1e9) as u64,
        };
        Cluster::flat(
            text.into(),
            [n_devices.div_ceil(devices_per_node), devices_per_node],
            device,
            [
                link(self.within, NVLINK_LATENCY_S),
                link(self.between, NETWORK_LATENCY_S),
            ],
        )
    }

    /// Devices that share the inner link. Of the 72 of an NVLink rack, jobs of whole powers of two
    /// take 64, so that no group straddles two racks (segments of 16 trays of 4).
    fn node(&self, n_devices: usize) -> usize {
        let full = self.devices_per_node.min(n_devices);
        if self.devices_per_node == 72 && n_devices > 72 && !n_devices.is_multiple_of(72) {
            return if n_devices.is_multiple_of(64) { 64 } else { 32 };
        }
        full
    }
}
