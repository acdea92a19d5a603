//! Seconds of messages over links.
//!
//! Enters: bytes, and how the ranks of a group lie on nodes. Leaves: seconds.
//! Invariant: links within and between nodes are apart; a group of one rank costs nothing.
//!
//! On GPUs the prices are those of NCCL's tuning model (`src/graph/tuning.cc`): per algorithm and
//! protocol a latency and a bandwidth, the fastest of which is taken, as NCCL does.

use std::collections::BTreeMap;

use meshweave_dsl::cluster::{Cluster, DeviceKind};
use meshweave_dsl::mapping::AxisGroups;

use super::efficiency::Efficiency;
use super::far::Far;

/// How the ranks of a group lie on nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GroupShape {
    pub n_ranks: usize,
    pub n_nodes: usize,
    /// Ranks on the node that has the fewest: they are its way to the network.
    pub per_node: usize,
    /// What levels above nodes and slow links add; nothing where there are none.
    pub far: Far,
}

impl GroupShape {
    /// The shape of a group of ranks.
    pub fn of(ranks: &[usize], cluster: &Cluster) -> Self {
        let mut per_node: BTreeMap<usize, usize> = BTreeMap::new();
        for rank in ranks {
            *per_node.entry(cluster.node_of(*rank)).or_default() += 1;
        }
        Self {
            n_ranks: ranks.len(),
            n_nodes: per_node.len(),
            per_node: per_node.values().copied().min().unwrap_or(0),
            far: match cluster.is_flat() {
                true => Far::default(),
                false => {
                    let counts: Vec<(usize, usize)> = per_node.into_iter().collect();
                    Far::of(&counts, ranks.len(), cluster)
                }
            },
        }
    }

    /// The shape of the groups of an axis of a mapping: of the first one, in closed form. Where there are
    /// levels or slow links, what is far is that of the worst group of all.
    pub fn of_axis(groups: AxisGroups, cluster: &Cluster) -> Self {
        let AxisGroups { size, stride } = groups;
        let node = cluster.devices_per_node.max(1);
        let per_node = if stride >= node {
            1
        } else if node.is_multiple_of(stride) {
            (node / stride).min(size)
        } else if cluster.is_flat() {
            return Self {
                n_ranks: size,
                n_nodes: (size.max(1) - 1) * stride / node + 1,
                per_node: fewest_on_a_node(size, stride, node),
                far: Far::default(),
            };
        } else {
            return Self::of(&groups.of(0), cluster);
        };
        let far = if cluster.is_flat() {
            Far::default()
        } else {
            Far::of_axis(groups, cluster)
        };
        Self {
            n_ranks: size,
            n_nodes: size.div_ceil(per_node),
            per_node,
            far,
        }
    }
}

/// The fewest of the ranks `0, stride, …` on any node that has some; `stride` is below `node`, the ranks
/// of a node.
fn fewest_on_a_node(size: usize, stride: usize, node: usize) -> usize {
    let before = |node_idx: usize| (node_idx * node).div_ceil(stride).min(size);
    let on = |node_idx: usize| before(node_idx + 1) - before(node_idx);
    let last = (size.max(1) - 1) * stride / node;
    // Every `stride` nodes the places are the same.
    let fewest = (0..last.min(stride)).map(on).min();
    fewest.map_or(on(last), |fewest| fewest.min(on(last)))
}

/// What a collective does, for its price.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    AllGather,
    ReduceScatter,
    AllReduce,
    AllToAll,
    Permute,
    Broadcast,
}

/// A protocol of NCCL: microseconds before the first step, of a step within and between nodes, for
/// rings and for trees; the part of the bandwidth that is payload (NCCL 2.19, `tuning.cc`, for Ampere
/// and later with NVLink).
struct Protocol {
    ring_us: [f64; 3],
    tree_us: [f64; 3],
    payload: f64,
}

/// LL, LL128, Simple.
const PROTOCOLS: [Protocol; 3] = [
    Protocol {
        ring_us: [6.6, 0.6, 2.7],
        tree_us: [6.8, 0.6, 5.0],
        payload: 0.25,
    },
    Protocol {
        ring_us: [14.0, 1.9, 4.0],
        tree_us: [14.0, 1.25, 8.5],
        payload: 0.80,
    },
    Protocol {
        ring_us: [8.4, 3.4, 14.0],
        tree_us: [8.4, 4.0, 14.0],
        payload: 1.0,
    },
];

/// Part of the bandwidth of a tree over nodes that is payload (NCCL: `0.92` of the ring's).
const TREE_PART: f64 = 0.92;
/// Microseconds of posting one message of an all_to_all.
const MESSAGE_US: f64 = 0.6;
/// Part of a network's bandwidth that an all_to_all reaches, whose messages collide, and of the links of
/// a node, where they do not, and no rank waits for its neighbor.
const EXCHANGE_PART: f64 = 0.80;
const NODE_EXCHANGE_PART: f64 = 0.75;

/// Part of a network's nominal bandwidth that large messages reach, by its kind.
pub(super) fn network_part(name: &str) -> f64 {
    match name {
        "roce" => 0.85,
        "efa" => 0.75,
        "slingshot" => 0.80,
        "ethernet" => 0.70,
        _ => 0.92,
    }
}

/// Seconds of a collective over a group. `n_bytes` is the whole gathered or reduced tensor of a rank
/// (all_gather: the result; the others: the input).
///
/// A ring of k ranks takes k − 1 steps and moves (k − 1)/k of the bytes through every rank
/// (Thakur, Rabenseifner, Gropp 2005, §4). Over m nodes of p ranks each, (m − 1)/m of the bytes enter
/// every node, through the p network links of its ranks; the slower of node and network counts.
pub fn traffic_seconds(
    traffic: Traffic,
    n_bytes: f64,
    group: GroupShape,
    cluster: &Cluster,
) -> f64 {
    if group.n_ranks < 2 || n_bytes <= 0.0 {
        return 0.0;
    }
    match cluster.device.kind {
        DeviceKind::Host => host_seconds(traffic, n_bytes, group, cluster),
        DeviceKind::Gpu => device_seconds(traffic, n_bytes, group, cluster),
    }
}

/// Threads read each other's memory between two barriers, however many there are.
fn host_seconds(traffic: Traffic, n_bytes: f64, group: GroupShape, cluster: &Cluster) -> f64 {
    let link = &cluster.within_node;
    let k = group.n_ranks as f64;
    let part_s = n_bytes * (k - 1.0) / k / link.bytes_per_s;
    cluster.device.launch_s
        + match traffic {
            Traffic::AllGather | Traffic::ReduceScatter | Traffic::AllToAll => {
                link.latency_s + part_s
            }
            Traffic::AllReduce => 2.0 * (link.latency_s + part_s),
            Traffic::Permute | Traffic::Broadcast => link.latency_s + n_bytes / link.bytes_per_s,
        }
}

/// NCCL's model: the fastest protocol and algorithm.
fn device_seconds(traffic: Traffic, n_bytes: f64, group: GroupShape, cluster: &Cluster) -> f64 {
    let efficiency = Efficiency::of(cluster.device.arch);
    let far = group.far;
    let within = cluster.within_node.bytes_per_s * far.within();
    let node_bw = within * efficiency.node_ring;
    let network = &cluster.between_nodes;
    let network_bw = network.bytes_per_s * network_part(&network.name);
    let (k, m, p) = (
        group.n_ranks as f64,
        group.n_nodes as f64,
        group.per_node.max(1) as f64,
    );
    let is_spread = group.n_nodes > 1;
    let inside_s = if group.per_node > 1 || !is_spread {
        n_bytes * (k - 1.0) / k / node_bw
    } else {
        0.0
    };
    let outside_s = n_bytes * (m - 1.0) / m / (p * network_bw);
    let ring_s = inside_s.max(outside_s).max(n_bytes * far.ring);
    // Latencies are those of the preset's links, in the protocols' proportions.
    let (node_x, network_x) = (
        cluster.within_node.latency_s / NVLINK_SIMPLE_S,
        network.latency_s / NETWORK_SIMPLE_S,
    );
    let (inner_steps, outer_steps) = (k - m, m - 1.0);
    let ring = |protocol: &Protocol, rounds: f64| {
        let [base, node, net] = protocol.ring_us;
        let outer_x = outer_steps * network_x + far.ring_steps;
        let steps_us = inner_steps * node * node_x + outer_x * net;
        1e-6 * (base + rounds * steps_us) + rounds * ring_s / protocol.payload
    };
    let tree = |protocol: &Protocol| {
        let [base, node, net] = protocol.tree_us;
        let outer_x = m.log2().ceil() * network_x + far.tree_steps;
        let steps_us = (p - 1.0).min(k - 1.0) * node * node_x + outer_x * net;
        1e-6 * (base + 2.0 * steps_us) + 2.0 * ring_s / (protocol.payload * TREE_PART)
    };
    let fastest = |seconds: &dyn Fn(&Protocol) -> f64| {
        PROTOCOLS.iter().map(seconds).fold(f64::INFINITY, f64::min)
    };
    match traffic {
        Traffic::AllGather | Traffic::ReduceScatter => fastest(&|protocol| ring(protocol, 1.0)),
        Traffic::AllReduce => {
            let mut seconds = fastest(&|protocol| ring(protocol, 2.0));
            if is_spread {
                seconds = seconds.min(fastest(&tree));
            } else if efficiency.node_switch > 0.0 && group.n_ranks > 2 {
                // Reduced in the switch: every rank sends and receives once (NVLink SHARP).
                let bw = within * efficiency.node_switch;
                let switched = 1e-6 * 20.0 + 2.0 * n_bytes * (k - 1.0) / k / bw;
                seconds = seconds.min(switched);
            }
            seconds
        }
        Traffic::AllToAll => {
            // Every rank sends (k − p)/k of its bytes over its own link to the network.
            let outside = (n_bytes * (k - p) / k / network_bw).max(n_bytes * far.exchange);
            let node_bw = within * NODE_EXCHANGE_PART;
            let inside = n_bytes * (p - 1.0) / k / node_bw;
            let hops_us = match is_spread {
                true => 14.0 * (network_x + far.hop_steps),
                false => 3.4,
            };
            let base_us = PROTOCOLS[2].ring_us[0] + hops_us;
            1e-6 * (base_us + k * MESSAGE_US) + inside.max(outside / EXCHANGE_PART)
        }
        Traffic::Permute | Traffic::Broadcast => {
            let flat_s = send_seconds(n_bytes, is_spread, cluster);
            let slow_s = match is_spread {
                true => cluster.device.launch_s + network.latency_s + n_bytes * far.send,
                false => n_bytes / node_bw,
            };
            flat_s.max(slow_s) + far.hop_steps * NETWORK_SIMPLE_S
        }
    }
}

/// Latencies that the protocols' figures are relative to.
const NVLINK_SIMPLE_S: f64 = 3.4e-6;
pub(super) const NETWORK_SIMPLE_S: f64 = 14.0e-6;

/// Seconds of a message from one rank to another, on the same node or not.
pub fn send_seconds(n_bytes: f64, between_nodes: bool, cluster: &Cluster) -> f64 {
    let efficiency = Efficiency::of(cluster.device.arch);
    let (link, part) = if between_nodes {
        let network = &cluster.between_nodes;
        (network, network_part(&network.name))
    } else {
        (&cluster.within_node, efficiency.node_ring)
    };
    let part = if cluster.device.kind == DeviceKind::Host {
        1.0
    } else {
        part
    };
    cluster.device.launch_s + link.latency_s + n_bytes / (link.bytes_per_s * part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_that_straddle_nodes_are_as_counted() {
        for node in [4, 8, 72] {
            let cluster = Cluster {
                n_nodes: 64,
                devices_per_node: node,
                ..Cluster::preset("h100:8").unwrap()
            };
            for stride in (2..node).filter(|stride| !node.is_multiple_of(*stride)) {
                for size in [1, 2, 3, 5, 8, 13, 20] {
                    let groups = AxisGroups { size, stride };
                    let counted = GroupShape::of(&groups.of(0), &cluster);
                    assert_eq!(GroupShape::of_axis(groups, &cluster), counted, "{groups:?}");
                }
            }
        }
    }
}
