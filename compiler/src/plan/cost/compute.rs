//! Seconds of kernels on one device.
//!
//! Enters: shapes, operations and bytes. Leaves: seconds.
//! Invariant: seconds grow with operations and bytes; an architecture without efficiencies of its own
//! (`host`) is a plain roofline.

use meshweave_dsl::cluster::{Arch, Cluster, Device};
use meshweave_dsl::dtype::DType;
use meshweave_dsl::mapping::Compute;

use super::efficiency::Efficiency;

/// Tiles that contractions are cut into, with the part of the peak each reaches within its tile
/// (CUTLASS's and cuBLAS's usual ones).
const TILES: [(f64, f64, f64); 4] = [
    (128.0, 256.0, 1.0),
    (128.0, 128.0, 0.93),
    (64.0, 128.0, 0.78),
    (64.0, 64.0, 0.60),
];

/// A contraction: `groups` products of [m, k] by [k, n].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MatmulShape {
    pub m: f64,
    pub n: f64,
    pub k: f64,
    pub groups: f64,
}

impl MatmulShape {
    /// One product.
    pub fn new(m: f64, n: f64, k: f64) -> Self {
        Self {
            m,
            n,
            k,
            groups: 1.0,
        }
    }

    /// The shape of a contraction by its operations and the elements of its operands and its result:
    /// g·m·k, g·k·n and g·m·n.
    pub fn of([a, b, result]: [f64; 3], n_flops: f64) -> Self {
        let k = n_flops / (2.0 * result.max(1.0));
        let groups = (a * b / (result.max(1.0) * (k * k).max(1.0))).max(1.0);
        Self {
            m: a / (groups * k.max(1.0)),
            n: b / (groups * k.max(1.0)),
            k,
            groups,
        }
    }

    /// Operations.
    pub fn flops(self) -> f64 {
        2.0 * self.groups * self.m * self.n * self.k
    }

    /// The part of the peak that the shape allows: whole tiles on whole waves of units, and the start
    /// and end of every tile's reduction.
    pub fn quantization(self, efficiency: &Efficiency) -> f64 {
        if efficiency.n_units == 0 {
            return 1.0;
        }
        let units = efficiency.n_units as f64;
        let best = TILES.iter().map(|(m, n, part)| {
            // Whichever way round fits better.
            [(m, n), (n, m)]
                .into_iter()
                .map(|(m, n)| {
                    let tiles = self.groups * (self.m / m).ceil() * (self.n / n).ceil();
                    let waves = (tiles / units).ceil();
                    part * self.groups * self.m * self.n / (waves * units * m * n)
                })
                .fold(0.0, f64::max)
        });
        best.fold(0.0, f64::max) * self.k / (self.k + efficiency.ramp)
    }
}

/// Seconds of a contraction in a format, without a launch; operands and result of `n_bytes` pass
/// through memory at least once.
pub fn matmul_seconds(shape: MatmulShape, n_bytes: f64, compute: Compute, device: &Device) -> f64 {
    if shape.flops() <= 0.0 {
        return 0.0;
    }
    let efficiency = Efficiency::of(device.arch);
    let (speed, part) = efficiency.format(compute, device.matmul_efficiency);
    let dtype = match compute {
        Compute::F32 | Compute::Tf32 => DType::F32,
        _ => DType::Bf16,
    };
    let peak = device.matmul_peak(dtype) * speed * part;
    let arithmetic = shape.flops() / (peak * shape.quantization(&efficiency));
    arithmetic.max(stream_seconds(n_bytes, device))
}

/// Seconds of moving bytes through the device's memory, without a launch.
pub fn stream_seconds(n_bytes: f64, device: &Device) -> f64 {
    n_bytes / (device.memory_bytes_per_s * device.vector_efficiency)
}

/// Seconds of a contraction of so many operations and bytes, with its launch; `elements` are those of
/// both operands and of the result.
pub fn contract_seconds(
    elements: [f64; 3],
    n_flops: f64,
    n_bytes: f64,
    dtype: DType,
    cluster: &Cluster,
) -> f64 {
    let device = &cluster.device;
    let quantization =
        MatmulShape::of(elements, n_flops).quantization(&Efficiency::of(device.arch));
    let speed = device.matmul_peak(dtype) * device.matmul_efficiency * quantization;
    device.launch_s + (n_flops / speed).max(stream_seconds(n_bytes, device))
}

/// Seconds of attention with the device's fastest kernel, with its launch; heads are `width` wide, and
/// `keys` are seen at most.
pub fn attention_seconds(
    pass: AttentionPass,
    [keys, width]: [f64; 2],
    n_flops: f64,
    n_bytes: f64,
    dtype: DType,
    cluster: &Cluster,
) -> f64 {
    let device = &cluster.device;
    let parts = Efficiency::of(device.arch).attention;
    let part = parts[pass as usize] * attention_part(keys, width);
    let exact = device.arch == Arch::Host;
    let speed = device.matmul_peak(dtype)
        * if exact {
            device.matmul_efficiency
        } else {
            part
        };
    device.launch_s + (n_flops / speed).max(stream_seconds(n_bytes, device))
}

/// A pass of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionPass {
    Forward,
    Backward,
}

/// What is left of an attention kernel's speed: short rows leave its pipeline cold, and heads other than
/// 128 wide waste tiles.
pub fn attention_part(keys: f64, width: f64) -> f64 {
    let fit = match width {
        128.0 => 1.0,
        width if width < 128.0 => 0.70 + 0.30 * (width / 128.0).powi(2),
        _ => 0.85,
    };
    fit * keys / (keys + 512.0)
}

/// Seconds of a fused fragment that runs on the vector units and moves its arguments once.
pub fn fragment_seconds(n_flops: f64, n_bytes: f64, cluster: &Cluster) -> f64 {
    let device = &cluster.device;
    let arithmetic = n_flops / (device.vector_flops_per_s * device.vector_efficiency);
    device.launch_s + arithmetic.max(stream_seconds(n_bytes, device))
}
