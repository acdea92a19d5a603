//! Clusters as blocks of the language.
//!
//! Enters: a cluster. Leaves: text. Invariant: it is read back to the same cluster, in any order of nodes.

use meshweave_dsl::cluster::{Cluster, DeviceKind, Link};
use meshweave_dsl::units::{Bytes, Quantity, Unit};
use meshweave_dsl::weave::ast::Name;

/// Blocks that are read back to the same cluster: one, or those of its groups and the one that joins
/// them.
pub fn print_cluster(cluster: &Cluster) -> String {
    if !cluster.is_mixed() {
        return print_group(cluster, &identifier(&cluster.name));
    }
    let own = identifier(&cluster.name);
    let mut text = String::new();
    let mut names: Vec<String> = Vec::new();
    for group in cluster.groups() {
        let base = identifier(&group.device.name);
        let mut name = base.clone();
        let mut count = 1;
        while names.contains(&name) || name == own {
            count += 1;
            name = format!("{base}-{count}");
        }
        let alone = Cluster {
            name: name.clone(),
            others: Vec::new(),
            between_groups: None,
            ..group.clone()
        };
        text += &print_group(&alone, &name);
        text.push('\n');
        names.push(name);
    }
    text += &format!("cluster {own} {{\n");
    if own != cluster.name {
        text += &format!("  name {:?}\n", cluster.name);
    }
    for name in names {
        text += &format!("  group {name}\n");
    }
    if let Some(link) = &cluster.between_groups {
        text += &format!("  link {} between groups\n", link_text(link));
    }
    text + "}\n"
}

fn link_text(link: &Link) -> String {
    format!(
        "{:?} {} {}",
        link.name,
        exact(
            link.bytes_per_s,
            [Unit::GigabytePerSecond, Unit::BytePerSecond]
        ),
        exact(link.latency_s, [Unit::Microsecond, Unit::Second]),
    )
}

/// A name of the language like this one.
fn identifier(name: &str) -> String {
    let name: String = name
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '_' {
                c
            } else {
                '-'
            }
        })
        .collect();
    match Name::new(name.trim_matches('-')) {
        Ok(name) => name.as_str().to_owned(),
        Err(_) => "measured".to_owned(),
    }
}

fn print_group(cluster: &Cluster, name: &str) -> String {
    let device = &cluster.device;
    let kind = match device.kind {
        DeviceKind::Host => "host",
        DeviceKind::Gpu => "gpu",
    };
    let host = if device.host_bytes_per_s > 0.0 {
        let speed = exact(
            device.host_bytes_per_s,
            [Unit::GigabytePerSecond, Unit::BytePerSecond],
        );
        let memory = Bytes(device.host_memory_bytes);
        format!(" host_bandwidth {speed} host_memory {memory:#}")
    } else {
        String::new()
    };
    let mut text = format!("cluster {name} {{\n");
    let mut line = |content: String| text.push_str(&format!("  {content}\n"));
    if name != cluster.name {
        line(format!("name {:?}", cluster.name));
    }
    line(format!("nodes {}", cluster.n_nodes));
    line(format!("devices {}", cluster.devices_per_node));
    line(format!(
        "device {:?} kind {kind} arch {} memory {:#} bandwidth {} vector {} launch {} matmul_efficiency {:?} vector_efficiency {:?}{host}",
        device.name,
        device.arch.name(),
        Bytes(device.memory_bytes),
        exact(
            device.memory_bytes_per_s,
            [Unit::GigabytePerSecond, Unit::BytePerSecond]
        ),
        exact(
            device.vector_flops_per_s,
            [Unit::GigaflopPerSecond, Unit::FlopPerSecond]
        ),
        exact(device.launch_s, [Unit::Microsecond, Unit::Second]),
        device.matmul_efficiency,
        device.vector_efficiency,
    ));
    for (dtype, speed) in &device.matmul_flops_per_s {
        let speed = exact(*speed, [Unit::GigaflopPerSecond, Unit::FlopPerSecond]);
        line(format!("matmul {dtype} {speed}"));
    }
    for (link, place) in [
        (&cluster.within_node, "within node"),
        (&cluster.between_nodes, "between nodes"),
    ] {
        line(format!("link {} {place}", link_text(link)));
    }
    let mut below = 1;
    for level in &cluster.levels {
        let (name, count) = (&level.name, level.n_nodes / below);
        line(format!(
            "level {name} of {count} link {}",
            link_text(&level.link)
        ));
        below = level.n_nodes.max(1);
    }
    for slow in &cluster.slow {
        line(slow.to_string());
    }
    text.push_str("}\n");
    text
}

/// A quantity in the first of the units in which it is exact; the last always is.
fn exact(base: f64, units: [Unit; 2]) -> Quantity {
    let [first, last] = units;
    let value = base / first.scale();
    if value * first.scale() == base {
        Quantity::new(value, first)
    } else {
        Quantity::new(base / last.scale(), last)
    }
}
