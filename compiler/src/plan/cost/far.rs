//! What lies beyond a switch of like nodes: levels above nodes, and slow links.
//!
//! Enters: how many ranks of a group each node has. Leaves: seconds a byte and steps of latency that the
//! levels and slow links take, for the prices of [`super::links`] to compare with the rest.
//! Invariant: nothing where the cluster has no levels and no slow links that the group meets.
//!
//! A ring over m units of a level, each with q ranks of the group, carries (m − 1)/m of the bytes out of
//! every unit, through the links of those q ranks; the other groups of the axis do the same at the same
//! time, so each device has its share of the unit's uplink, and no more (the argument of Thakur et al.
//! 2005, §4, level by level; an oversubscribed uplink is a lower share). An exchange sends (k − q)/k of
//! every rank's bytes out of its unit.

use std::collections::BTreeMap;

use meshweave_dsl::cluster::{Cluster, Slow, SlowLinks};
use meshweave_dsl::mapping::AxisGroups;

use super::links::{NETWORK_SIMPLE_S, network_part};

/// What levels above nodes and slow links take of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Far {
    /// Seconds a byte of the slowest of these links: in a ring, in an exchange, in a message.
    pub ring: f64,
    pub exchange: f64,
    pub send: f64,
    /// What the slowest links within a node lose: 1 − the part that is left.
    pub within_loss: f64,
    /// Latency above that of the network's first level, in steps of its nominal latency.
    pub ring_steps: f64,
    pub tree_steps: f64,
    pub hop_steps: f64,
}

impl Far {
    /// The part of the links within nodes that is left.
    pub fn within(&self) -> f64 {
        1.0 - self.within_loss
    }

    /// Of a group with so many ranks on each of its nodes, each node once.
    pub fn of(per_node: &[(usize, usize)], n_ranks: usize, cluster: &Cluster) -> Self {
        let mut far = Self::default();
        if cluster.levels.is_empty() && cluster.slow.is_empty() {
            return far;
        }
        let on = |node: usize| {
            let own = per_node.iter().find(|(known, _)| *known == node);
            own.map(|(_, count)| *count)
        };
        let is_at =
            |slow: &&Slow, unit: &str, links: SlowLinks| slow.unit == unit && slow.links == links;
        for slow in &cluster.slow {
            if is_at(&slow, "node", SlowLinks::Within)
                && on(slow.idx).is_some_and(|count| count > 1)
            {
                far.within_loss = far.within_loss.max(1.0 - slow.part);
            }
        }
        let network = &cluster.between_nodes;
        let bytes_per_s = network.bytes_per_s * network_part(&network.name);
        if per_node.len() > 1 {
            for slow in &cluster.slow {
                if is_at(&slow, "node", SlowLinks::Uplink)
                    && let Some(count) = on(slow.idx)
                {
                    let speed = bytes_per_s * slow.part;
                    far.cross(per_node.len(), count, n_ranks, speed);
                }
            }
        }
        let mut latency_s = network.latency_s;
        for level in &cluster.levels {
            let mut per_unit: BTreeMap<usize, usize> = BTreeMap::new();
            for (node, count) in per_node {
                *per_unit.entry(node / level.n_nodes.max(1)).or_default() += count;
            }
            let n_units = per_unit.len();
            if n_units < 2 {
                break;
            }
            let speed = level.link.bytes_per_s * network_part(&level.link.name);
            let fewest = per_unit.values().copied().min().unwrap_or(1);
            far.cross(n_units, fewest, n_ranks, speed);
            for slow in &cluster.slow {
                if is_at(&slow, &level.name, SlowLinks::Uplink)
                    && let Some(count) = per_unit.get(&slow.idx)
                {
                    far.cross(n_units, *count, n_ranks, speed * slow.part);
                }
            }
            let steps = (level.link.latency_s - latency_s).max(0.0) / NETWORK_SIMPLE_S;
            far.ring_steps += (n_units - 1) as f64 * steps;
            far.tree_steps += (n_units as f64).log2().ceil() * steps;
            far.hop_steps += steps;
            latency_s = latency_s.max(level.link.latency_s);
        }
        far
    }

    /// Notes a crossing of `n_units` with so many of the group's ranks in one, at so many bytes a second
    /// and device.
    fn cross(&mut self, n_units: usize, in_unit: usize, n_ranks: usize, bytes_per_s: f64) {
        let (m, q, k) = (n_units as f64, in_unit.max(1) as f64, n_ranks as f64);
        self.ring = self.ring.max((m - 1.0) / m / (q * bytes_per_s));
        self.exchange = self.exchange.max((k - q).max(0.0) / k / bytes_per_s);
        self.send = self.send.max(1.0 / bytes_per_s);
    }

    /// Of the worst groups of an axis: of all of them where there are levels, else of those that have
    /// ranks on nodes with slow links. O(nodes · groups that begin on different nodes).
    pub fn of_axis(groups: AxisGroups, cluster: &Cluster) -> Self {
        let AxisGroups { size, stride } = groups;
        let mut worst = Self::default();
        if size < 2 {
            return worst;
        }
        let node = cluster.devices_per_node.max(1);
        let n_devices = cluster.n_devices();
        let block = size * stride;
        // Groups that begin on one node and take the same nodes are looked at once.
        let step = if stride >= node { node } else { stride };
        let mut starts: Vec<usize> = Vec::new();
        if cluster.levels.is_empty() {
            for place in 0..n_devices.div_ceil(node) {
                let id = cluster.node_of(place * node);
                if cluster.slow.iter().any(|slow| slow.idx == id) {
                    let ranks = place * node..(place + 1) * node;
                    starts.extend(
                        ranks.map(|rank| rank / block * block + rank % stride / step * step),
                    );
                }
            }
            starts.dedup();
        } else {
            let blocks = (0..n_devices).step_by(block);
            starts.extend(
                blocks
                    .flat_map(|first| (0..stride).step_by(step).map(move |offset| first + offset)),
            );
        }
        let mut per_node: Vec<(usize, usize)> = Vec::with_capacity(size);
        for start in starts {
            per_node.clear();
            for rank in (0..size).map(|idx| start + idx * stride) {
                if rank >= n_devices {
                    break;
                }
                let own = cluster.node_of(rank);
                match per_node.last_mut() {
                    Some((last, count)) if *last == own => *count += 1,
                    _ => per_node.push((own, 1)),
                }
            }
            worst = worst.or(&Self::of(&per_node, size, cluster));
        }
        worst
    }

    /// The worse of both, figure by figure.
    fn or(&self, other: &Self) -> Self {
        Self {
            ring: self.ring.max(other.ring),
            exchange: self.exchange.max(other.exchange),
            send: self.send.max(other.send),
            within_loss: self.within_loss.max(other.within_loss),
            ring_steps: self.ring_steps.max(other.ring_steps),
            tree_steps: self.tree_steps.max(other.tree_steps),
            hop_steps: self.hop_steps.max(other.hop_steps),
        }
    }
}

#[cfg(test)]
mod tests {
    use meshweave_dsl::cluster::Level;

    use super::super::links::{GroupShape, Traffic, traffic_seconds};
    use super::*;

    fn leaves(oversubscription: f64) -> Cluster {
        let cluster = Cluster::preset("h100:64").unwrap();
        let mut link = cluster.between_nodes.clone();
        link.bytes_per_s /= oversubscription;
        let level = Level {
            name: "leaf".into(),
            n_nodes: 2,
            link,
        };
        Cluster {
            levels: vec![level],
            ..cluster
        }
    }

    fn slow(idx: usize, links: SlowLinks) -> Cluster {
        let slow = Slow {
            unit: "node".into(),
            idx,
            links,
            part: 0.25,
        };
        Cluster {
            slow: vec![slow],
            ..Cluster::preset("h100:64").unwrap()
        }
    }

    fn seconds(size: usize, stride: usize, cluster: &Cluster) -> f64 {
        let shape = GroupShape::of_axis(AxisGroups { size, stride }, cluster);
        traffic_seconds(Traffic::ReduceScatter, 1e9, shape, cluster)
    }

    #[test]
    fn levels_at_full_speed_cost_nothing() {
        let flat = Cluster::preset("h100:64").unwrap();
        for (size, stride) in [(8, 1), (8, 8), (64, 1), (4, 16), (2, 8)] {
            assert_eq!(
                seconds(size, stride, &leaves(1.0)),
                seconds(size, stride, &flat)
            );
        }
    }

    #[test]
    fn oversubscription_slows_what_leaves_the_leaf() {
        let (one, four) = (leaves(1.0), leaves(4.0));
        // Two nodes of one leaf.
        assert_eq!(seconds(2, 8, &four), seconds(2, 8, &one));
        // All eight nodes, one rank a node, two a leaf: 3/4 / (2 · 1/4) against 7/8.
        let ratio = seconds(8, 8, &four) / seconds(8, 8, &one);
        assert!((ratio / (1.5 / 0.875) - 1.0).abs() < 0.05, "{ratio}");
    }

    #[test]
    fn slow_links_slow_only_those_who_cross_them() {
        let flat = Cluster::preset("h100:64").unwrap();
        let uplink = slow(3, SlowLinks::Uplink);
        assert_eq!(seconds(8, 1, &uplink), seconds(8, 1, &flat));
        assert!(seconds(8, 8, &uplink) > 3.5 * seconds(8, 8, &flat));
        let inside = slow(3, SlowLinks::Within);
        assert!(seconds(8, 1, &inside) > 3.5 * seconds(8, 1, &flat));
        assert_eq!(seconds(8, 8, &inside), seconds(8, 8, &flat));
    }

    #[test]
    fn the_actual_ranks_of_a_group_count() {
        let cluster = slow(3, SlowLinks::Uplink);
        let price = |ranks: &[usize]| {
            let shape = GroupShape::of(ranks, &cluster);
            traffic_seconds(Traffic::AllReduce, 1e9, shape, &cluster)
        };
        assert_eq!(price(&[0, 8]), price(&[8, 16]));
        assert!(price(&[16, 24]) > 3.5 * price(&[0, 8]));
    }
}
