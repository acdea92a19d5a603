//! Clusters: devices, nodes and links, as far as prices need them.
//!
//! Enters: a preset such as `h100:16`, or a `cluster` block of the language.
//! Leaves: sizes and speeds in bytes, seconds and floating-point operations a second.
//! Invariant: all counts and speeds are positive; rank `r` runs on device `r`, and devices are
//! numbered node by node.

mod host;
mod presets;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::dtype::DType;

pub use host::Host;

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

/// The architecture of a device: what tables of efficiencies are keyed by.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Arch {
    /// Cores of a CPU.
    Host,
    /// V100.
    Volta,
    /// A100.
    Ampere,
    /// H100, H800, H200.
    #[default]
    Hopper,
    /// B200, GB200.
    Blackwell,
    /// B300, GB300.
    BlackwellUltra,
    /// MI250X, one die.
    Cdna2,
    /// MI300X.
    Cdna3,
    /// TPU v5p.
    TpuV5p,
    /// TPU v6e.
    TpuV6e,
}

impl Arch {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Host,
        Self::Volta,
        Self::Ampere,
        Self::Hopper,
        Self::Blackwell,
        Self::BlackwellUltra,
        Self::Cdna2,
        Self::Cdna3,
        Self::TpuV5p,
        Self::TpuV6e,
    ];

    /// The name in text forms.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Volta => "volta",
            Self::Ampere => "ampere",
            Self::Hopper => "hopper",
            Self::Blackwell => "blackwell",
            Self::BlackwellUltra => "blackwell_ultra",
            Self::Cdna2 => "cdna2",
            Self::Cdna3 => "cdna3",
            Self::TpuV5p => "tpu_v5p",
            Self::TpuV6e => "tpu_v6e",
        }
    }
}

/// One device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Device {
    pub name: String,
    pub kind: DeviceKind,
    #[serde(default)]
    pub arch: Arch,
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
    /// Bytes a second from and to the memory of the host, per direction; 0: there is none.
    #[serde(default)]
    pub host_bytes_per_s: f64,
    /// The device's share of the memory of its host.
    #[serde(default)]
    pub host_memory_bytes: u64,
}

/// A link between devices, per device and direction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Link {
    pub name: String,
    pub bytes_per_s: f64,
    pub latency_s: f64,
}

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
        match presets::find(name) {
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
        std::iter::once("local").chain(presets::names()).collect()
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
