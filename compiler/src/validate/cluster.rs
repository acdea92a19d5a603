//! The cluster of a row.
//!
//! Enters: the name of a device, its number, and words about the network. Leaves: a cluster.
//! Invariant: the device is a preset; only its node size and its network are the row's.

use meshweave_dsl::cluster::Cluster;

use super::table::{Row, number_before};

/// Names that tables have for devices, most special first, with the preset and the devices a node.
const DEVICES: [(&str, &str); 22] = [
    ("gb300", "gb300"),
    ("gb200", "gb200"),
    ("b300", "b300"),
    ("b200", "b200"),
    ("h800", "h800"),
    ("h200", "h200"),
    ("h100-96", "h100-96"),
    ("h100 96", "h100-96"),
    ("h100", "h100"),
    ("h20", ""),
    ("a100-40", "a100-40"),
    ("a100 40", "a100-40"),
    ("a100", "a100-80"),
    ("a800", "a100-80"),
    ("v100-16", "v100-16"),
    ("v100 16", "v100-16"),
    ("v100", "v100-32"),
    ("mi250", "mi250x"),
    ("mi300", "mi300x"),
    ("mi325", "mi300x"),
    ("v5p", "tpu-v5p"),
    ("v6e", "tpu-v6e"),
];

/// Reads the cluster of a row.
///
/// # Errors
/// A device without figures, or no number of devices.
pub(super) fn cluster(row: Row<'_>) -> Result<Cluster, String> {
    let gpu = row.text("gpu").ok_or("`gpu` is blank")?;
    let lower = gpu.to_ascii_lowercase();
    let preset = DEVICES.iter().find(|(name, _)| lower.contains(name));
    let preset = preset
        .map(|(_, preset)| *preset)
        .filter(|preset| !preset.is_empty())
        .ok_or_else(|| format!("the device `{gpu}` has no preset"))?;
    let n_devices = row.count("gpus").ok_or("`gpus` is blank")?;
    let mut cluster =
        Cluster::preset(&format!("{preset}:{n_devices}")).map_err(|error| error.to_string())?;
    // `GB/s` are bytes of the links of a node; networks are told in bits.
    let interconnect = row.text_or_blank("interconnect").replace("GB/s", "bytes");
    let interconnect = interconnect.to_ascii_lowercase();
    let is_rack = cluster.device.name.starts_with("gb");
    let per_node = row.count("gpus_per_node").filter(|_| !is_rack);
    if let Some(per_node) = per_node {
        cluster.devices_per_node = per_node.min(n_devices);
        cluster.n_nodes = n_devices.div_ceil(cluster.devices_per_node);
    }
    let nominal_per_node = per_node.unwrap_or(if is_rack { 4 } else { 8 }) as f64;
    let network = &mut cluster.between_nodes;
    if let Some(gbit_per_s) = network_gbit(&interconnect, nominal_per_node) {
        network.bytes_per_s = gbit_per_s / nominal_per_node * 1e9 / 8.0;
    }
    for (word, name) in [
        ("roce", "roce"),
        ("efa", "efa"),
        ("slingshot", "slingshot"),
        ("ethernet", "ethernet"),
    ] {
        if interconnect.contains(word) {
            network.name = name.into();
        }
    }
    Ok(cluster)
}

/// Gbit/s of a node's network: `8x200Gb`, `1600Gb/s RoCE per node`, `800Gb-…/GPU`, `3200Gb/node`.
fn network_gbit(interconnect: &str, per_node: f64) -> Option<f64> {
    let links = interconnect
        .split([';', '(', ')'])
        .filter(|part| !part.contains("nvlink") || part.contains("gb"))
        .find_map(|part| {
            let gbit = number_before(part, "gb")?;
            let count = number_before(part, "x");
            let is_per_gpu = part.contains("/gpu") || part.contains("per gpu");
            // A range is told by its lower end.
            let scale = if is_per_gpu {
                per_node
            } else {
                count.unwrap_or(1.0)
            };
            Some(gbit * scale)
        });
    links.filter(|gbit| *gbit >= 10.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read_from_words() {
        let words = [
            ("nvlink3 intra-node; 8x200gb hdr ib/node", Some(1600.0)),
            ("nvlink3; 1600gb/s roce per node", Some(1600.0)),
            ("nvlink4; aws efa 3200gb/node", Some(3200.0)),
            (
                "nvlink5 nvl72 domain (4 gpus/tray); 400gb-800gb/gpu ib",
                Some(1600.0),
            ),
            ("nvlink5 intra-node (8); 8x800gb xdr ib/node", Some(6400.0)),
            ("nvlink4", None),
        ];
        for (text, gbit) in words {
            let per_node = if text.contains("nvl72") { 4.0 } else { 8.0 };
            assert_eq!(network_gbit(text, per_node), gbit, "{text}");
        }
    }
}
