//! Two mappings side by side, and clusters that are changed for a question.
//!
//! Enters: mappings; a cluster and factors. Leaves: the choices that differ; the changed cluster.
//! Invariant: every field of a mapping is compared.

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::mapping::{Context, Mapping, Recompute};

/// One choice that differs: its name, and what it is in either mapping.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Difference {
    pub choice: String,
    pub first: String,
    pub second: String,
}

/// What differs, in the order of a plan's text.
pub fn differences(first: &Mapping, second: &Mapping) -> Vec<Difference> {
    let (first, second) = (choices(first), choices(second));
    first
        .into_iter()
        .zip(second)
        .filter(|((_, one), (_, other))| one != other)
        .map(|((choice, first), (_, second))| Difference {
            choice: choice.to_owned(),
            first,
            second,
        })
        .collect()
}

/// Every choice of a mapping in words.
pub fn choices(mapping: &Mapping) -> Vec<(&'static str, String)> {
    let Mapping {
        tp,
        cp,
        dp,
        pp,
        ep,
        etp,
        sequence_parallel,
        context,
        zero,
        micro_batch,
        pipeline,
        recompute,
        offload,
        precision,
    } = mapping;
    let layers = match &pipeline.layers {
        None => "even".to_owned(),
        Some(layers) => format!("{layers:?}"),
    };
    let recompute = match recompute {
        Recompute::None => "none".to_owned(),
        Recompute::Full => "full".to_owned(),
        Recompute::Layers(count) => format!("{count} layers of a rank"),
        Recompute::LayersByRank(counts) => format!("{counts:?} layers of the ranks"),
        Recompute::Modules(parts) => {
            let parts: Vec<String> = parts.iter().map(|part| format!("{part:?}")).collect();
            parts.join(" + ")
        }
    };
    let context = match context {
        _ if *cp == 1 => "-",
        Context::Ring => "ring",
        Context::AllGather => "all_gather",
        Context::Ulysses => "ulysses",
    };
    let group = zero
        .group
        .map_or_else(|| "all".to_owned(), |g| g.to_string());
    vec![
        ("pp", pp.to_string()),
        ("dp", dp.to_string()),
        ("cp", cp.to_string()),
        ("tp", tp.to_string()),
        ("ep", ep.to_string()),
        ("etp", etp.to_string()),
        ("sequence parallel", sequence_parallel.to_string()),
        ("context", context.to_owned()),
        ("zero", zero.stage.to_string()),
        ("zero group", group),
        ("micro-batch", micro_batch.to_string()),
        ("schedule", pipeline.schedule.clone()),
        ("chunks", pipeline.chunks.to_string()),
        ("layers of stages", layers),
        ("recompute", recompute),
        ("offload optimizer", offload.optimizer.to_string()),
        (
            "offload activations",
            format!("{:.0} %", 100.0 * offload.activations),
        ),
        (
            "precision",
            format!("{:?}", precision.compute).to_lowercase(),
        ),
    ]
}

/// By what a cluster is changed; 1 leaves it as it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// Bytes of a device.
    pub memory: f64,
    /// Bandwidth between nodes.
    pub network: f64,
    /// Bandwidth within a node.
    pub node_links: f64,
    /// Operations a second of a device.
    pub compute: f64,
    /// How many devices there are; rounded down to whole nodes.
    pub devices: f64,
}

impl Default for Change {
    fn default() -> Self {
        Self {
            memory: 1.0,
            network: 1.0,
            node_links: 1.0,
            compute: 1.0,
            devices: 1.0,
        }
    }
}

/// The changed cluster; every group is changed alike.
pub fn changed(cluster: &Cluster, change: Change) -> Cluster {
    let mut changed = cluster.clone();
    let device = &mut changed.device;
    device.memory_bytes = (device.memory_bytes as f64 * change.memory) as u64;
    for peak in device.matmul_flops_per_s.values_mut() {
        *peak *= change.compute;
    }
    device.vector_flops_per_s *= change.compute;
    changed.between_nodes.bytes_per_s *= change.network;
    changed.within_node.bytes_per_s *= change.node_links;
    for level in &mut changed.levels {
        level.link.bytes_per_s *= change.network;
    }
    if let Some(link) = &mut changed.between_groups {
        link.bytes_per_s *= change.network;
    }
    for other in &mut changed.others {
        *other = self::changed(other, change);
    }
    if change.devices != 1.0 {
        let own = cluster.n_nodes * cluster.devices_per_node;
        let wanted = (own as f64 * change.devices + 1e-9) as usize;
        let n_nodes = wanted / cluster.devices_per_node.max(1);
        if n_nodes == 0 {
            changed.devices_per_node = wanted.max(1);
        }
        changed.n_nodes = n_nodes.max(1);
        // Nodes of other numbers are in other places.
        changed.order = Vec::new();
    }
    changed
}
