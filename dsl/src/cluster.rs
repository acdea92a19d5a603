//! Clusters: devices, nodes and links, as far as prices need them.
//!
//! Enters: a preset such as `h100:16`, or a `cluster` block of the language.
//! Leaves: sizes and speeds in bytes, seconds and floating-point operations a second.
//! Invariant: all counts and speeds are positive; rank `r` runs on device `r`, and devices are
//! numbered node by node, in the order of the nodes.

mod host;
mod presets;
mod topology;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::dtype::DType;

pub use host::Host;
pub use topology::{Level, NodeId, Slow, SlowLinks, ranges_of, show_nodes};

/// What a preset or a block says wrongly.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    #[error("{0}")]
    Invalid(String),
}

/// Like nodes of like devices, and possibly further groups of other nodes.
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
    /// Levels of switches above nodes, innermost first; all nodes are on one switch without any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub levels: Vec<Level>,
    /// Links that are slower than their kind.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub slow: Vec<Slow>,
    /// Groups of other nodes, numbered behind these; they have no others of their own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<Cluster>,
    /// Between nodes of two groups; the slower one of their networks where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub between_groups: Option<Link>,
    /// The nodes that ranks take, in their order, numbered through all groups; all where empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub order: Vec<usize>,
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
                let mut near: Vec<&str> = known
                    .iter()
                    .copied()
                    .filter(|preset| preset.starts_with(&format!("{name}-")))
                    .collect();
                if near.is_empty() {
                    near.extend(crate::diagnostics::nearest(name, known.iter().copied()));
                }
                let hint = match near.as_slice() {
                    [] => format!("known are {}", known.join(", ")),
                    near => {
                        let near: Vec<_> = near
                            .iter()
                            .map(|near| format!("`{near}:{count}`"))
                            .collect();
                        format!("did you mean {}?", near.join(" or "))
                    }
                };
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

    /// Like nodes on one switch.
    pub fn flat(
        name: String,
        [n_nodes, devices_per_node]: [usize; 2],
        device: Device,
        [within_node, between_nodes]: [Link; 2],
    ) -> Self {
        Self {
            name,
            n_nodes,
            devices_per_node,
            device,
            within_node,
            between_nodes,
            levels: Vec::new(),
            slow: Vec::new(),
            others: Vec::new(),
            between_groups: None,
            order: Vec::new(),
        }
    }

    /// Number of devices that ranks take.
    pub fn n_devices(&self) -> usize {
        if self.order.is_empty() {
            let of_group = |group: &Self| group.n_nodes * group.devices_per_node;
            return self.groups().map(of_group).sum();
        }
        self.order.iter().map(|node| self.devices_of(*node)).sum()
    }

    /// The node of a rank.
    pub fn node_of(&self, rank: usize) -> usize {
        if !self.is_mixed() {
            let place = rank / self.devices_per_node.max(1);
            return self.order.get(place).copied().unwrap_or(place);
        }
        let nodes = self.nodes_of(rank..rank + 1);
        nodes
            .first()
            .copied()
            .unwrap_or(rank / self.devices_per_node.max(1))
    }

    /// The same cluster with another number of devices: the first so many.
    #[must_use]
    pub fn with_devices(mut self, n_devices: usize) -> Self {
        if !self.is_flat() {
            let mut nodes = self.nodes_of(0..n_devices);
            nodes.truncate(nodes.len().max(1));
            self.order = nodes;
            return self;
        }
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
        write!(f, "{}: ", self.name)?;
        for (idx, group) in self.groups().enumerate() {
            let plus = if idx > 0 { " + " } else { "" };
            let (n_nodes, per_node) = (group.n_nodes, group.devices_per_node);
            write!(f, "{plus}{n_nodes} × {per_node} {}", group.device.name)?;
        }
        if !self.order.is_empty() {
            write!(f, ", on nodes {}", show_nodes(&self.order))?;
        }
        Ok(())
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
            message("a100:8"),
            "cluster `a100:8` is unknown: did you mean `a100-40:8` or `a100-80:8`?"
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
