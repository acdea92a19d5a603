//! Efficiencies: what part of its nominal figures an architecture reaches, by class of work.
//!
//! Enters: an architecture. Leaves: parts of peaks, and fixed seconds.
//! Invariant: values are properties of devices and their libraries, each with its source in
//! `docs/cost-model.md`; none belongs to a model, a cluster or a published row.

use meshweave_dsl::cluster::Arch;
use meshweave_dsl::mapping::Compute;

/// What an architecture and its libraries reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Efficiency {
    /// Units that work on one tile at a time (SMs, CUs); 0: tiles do not matter.
    pub n_units: usize,
    /// Peak over the bf16 peak, of 8-bit and 4-bit floats.
    pub fp8_speed: f64,
    pub fp4_speed: f64,
    /// Part of those peaks that large contractions reach.
    pub fp8: f64,
    pub fp4: f64,
    /// Length of the reduction over which a tile's start and end weigh as much as its middle.
    pub ramp: f64,
    /// Part of the bf16 peak of the fastest attention kernels on long sequences, forward and backward.
    pub attention: [f64; 2],
    /// The same of FlashAttention 2, and of FlashAttention 1.
    pub attention2: [f64; 2],
    pub attention1: [f64; 2],
    /// Part of the bf16 peak of batched products of single heads (unfused attention).
    pub batched: f64,
    /// Part of the link within a node that rings reach, and an all_reduce in the switch (0: none).
    pub node_ring: f64,
    pub node_switch: f64,
}

/// Part of the speed that scales for every block of 32 elements leave.
const BLOCK_SCALED: f64 = 0.95;

/// A machine whose figures are measured: nothing is lost besides.
const EXACT: Efficiency = Efficiency {
    n_units: 0,
    fp8_speed: 1.0,
    fp4_speed: 1.0,
    fp8: 1.0,
    fp4: 1.0,
    ramp: 0.0,
    attention: [1.0, 1.0],
    attention2: [1.0, 1.0],
    attention1: [1.0, 1.0],
    batched: 1.0,
    node_ring: 1.0,
    node_switch: 0.0,
};

impl Efficiency {
    /// The efficiencies of an architecture.
    pub const fn of(arch: Arch) -> Self {
        match arch {
            Arch::Host => EXACT,
            Arch::Volta => Self {
                n_units: 80,
                ramp: 128.0,
                attention: [0.40, 0.30],
                attention2: [0.40, 0.30],
                attention1: [0.30, 0.25],
                batched: 0.35,
                node_ring: 0.85,
                ..EXACT
            },
            Arch::Ampere => Self {
                n_units: 108,
                ramp: 128.0,
                attention: [0.64, 0.54],
                attention2: [0.64, 0.54],
                attention1: [0.40, 0.32],
                batched: 0.40,
                node_ring: 0.65,
                ..EXACT
            },
            Arch::Hopper => Self {
                n_units: 132,
                fp8_speed: 2.0,
                fp8: 0.60,
                ramp: 256.0,
                attention: [0.60, 0.48],
                attention2: [0.40, 0.34],
                attention1: [0.20, 0.15],
                batched: 0.25,
                node_ring: 0.72,
                node_switch: 1.05,
                ..EXACT
            },
            Arch::Blackwell => Self {
                n_units: 148,
                fp8_speed: 2.0,
                fp4_speed: 4.0,
                fp8: 0.54,
                fp4: 0.40,
                ramp: 384.0,
                attention: [0.55, 0.45],
                attention2: [0.20, 0.17],
                attention1: [0.10, 0.08],
                batched: 0.20,
                node_ring: 0.75,
                node_switch: 0.92,
            },
            Arch::BlackwellUltra => Self {
                fp4_speed: 6.0,
                fp8: 0.62,
                fp4: 0.37,
                attention: [0.60, 0.48],
                ..Self::of(Arch::Blackwell)
            },
            Arch::Cdna2 => Self {
                n_units: 110,
                ramp: 256.0,
                attention: [0.35, 0.25],
                attention2: [0.35, 0.25],
                attention1: [0.25, 0.20],
                batched: 0.30,
                node_ring: 0.80,
                ..EXACT
            },
            Arch::Cdna3 => Self {
                n_units: 304,
                fp8_speed: 2.0,
                fp8: 0.45,
                ramp: 256.0,
                attention: [0.35, 0.25],
                attention2: [0.35, 0.25],
                attention1: [0.20, 0.15],
                batched: 0.20,
                node_ring: 0.75,
                ..EXACT
            },
            Arch::TpuV5p | Arch::TpuV6e => Self {
                ramp: 128.0,
                attention: [0.50, 0.42],
                attention2: [0.50, 0.42],
                attention1: [0.50, 0.42],
                batched: 0.45,
                node_ring: 0.85,
                ..EXACT
            },
        }
    }

    /// Peak over the bf16 peak of a format, and the part of it that large contractions reach; `half`
    /// is the part that those of 16-bit floats reach.
    pub fn format(&self, compute: Compute, half: f64) -> (f64, f64) {
        match compute {
            Compute::F16 | Compute::Bf16 | Compute::F32 | Compute::Tf32 => (1.0, half),
            Compute::Fp8 if self.fp8_speed > 1.0 => (self.fp8_speed, self.fp8),
            Compute::MxFp8 if self.fp8_speed > 1.0 => (self.fp8_speed, BLOCK_SCALED * self.fp8),
            Compute::NvFp4 if self.fp4_speed > 1.0 => (self.fp4_speed, self.fp4),
            Compute::Fp8 | Compute::MxFp8 | Compute::NvFp4 => (1.0, half),
        }
    }
}
