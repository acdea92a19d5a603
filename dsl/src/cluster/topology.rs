//! What a cluster has beyond like nodes on one switch: levels of switches, nodes of other types, links
//! that are slower than their kind, and the order in which ranks take the nodes.
//!
//! Enters: a [`Cluster`] and ranges of ranks. Leaves: the nodes of a rank, and the *site* of a range: the
//! part of the cluster that these ranks see, as a cluster of like nodes.
//! Invariant: a site is never faster than the devices and links that its ranks use.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::{Cluster, ClusterError, Link};
use crate::dtype::DType;

/// Units of so many nodes each, numbered in the order of the nodes: leaves or rails, pods, halls.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Level {
    pub name: String,
    /// Nodes of a unit.
    pub n_nodes: usize,
    /// Out of a unit, per device and direction while all its devices send.
    pub link: Link,
}

/// Links of one unit that run at a part of their speed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Slow {
    /// `node`, or the name of a level.
    pub unit: String,
    pub idx: usize,
    pub links: SlowLinks,
    /// Of the nominal bandwidth; above 0, up to 1.
    pub part: f64,
}

/// Which links of a unit are slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SlowLinks {
    /// Those between the devices of a node.
    Within,
    /// Those that leave the unit.
    Uplink,
}

impl std::fmt::Display for Slow {
    /// As a cluster block says it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let links = match self.links {
            SlowLinks::Within => "links",
            SlowLinks::Uplink => "uplink",
        };
        let percent = 100.0 * self.part;
        write!(f, "slow {} {} {links} {percent} %", self.unit, self.idx)
    }
}

impl Slow {
    /// Whether a node is in the unit.
    pub fn covers(&self, node: usize, cluster: &Cluster) -> bool {
        match self.unit.as_str() {
            "node" => node == self.idx,
            unit => cluster
                .levels
                .iter()
                .find(|level| level.name == unit)
                .is_some_and(|level| node / level.n_nodes == self.idx),
        }
    }
}

/// A node: its group, and its number within the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeId {
    pub group: usize,
    pub node: usize,
}

impl Cluster {
    /// Whether all nodes are alike, on one switch, and taken in order.
    pub fn is_flat(&self) -> bool {
        self.levels.is_empty()
            && self.slow.is_empty()
            && self.others.is_empty()
            && self.order.is_empty()
    }

    /// Whether there are nodes of several groups.
    pub fn is_mixed(&self) -> bool {
        !self.others.is_empty()
    }

    /// The groups of like nodes; the cluster itself is the first.
    pub fn groups(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(&self.others)
    }

    /// A group; the first one beyond the end.
    pub fn group(&self, idx: usize) -> &Self {
        self.groups().nth(idx).unwrap_or(self)
    }

    /// Nodes of all groups.
    pub fn n_all_nodes(&self) -> usize {
        self.groups().map(|group| group.n_nodes).sum()
    }

    /// The group of a node, which is numbered through all groups.
    pub fn node_id(&self, node: usize) -> NodeId {
        let mut left = node;
        for (group, own) in self.groups().enumerate() {
            if left < own.n_nodes {
                return NodeId { group, node: left };
            }
            left -= own.n_nodes;
        }
        // Beyond the end, as far as a cluster of like nodes would go.
        NodeId { group: 0, node }
    }

    /// The nodes that ranks take, in their order.
    pub fn placed_nodes(&self) -> Vec<usize> {
        if self.order.is_empty() {
            (0..self.n_all_nodes()).collect()
        } else {
            self.order.clone()
        }
    }

    /// Devices of a node.
    pub fn devices_of(&self, node: usize) -> usize {
        self.group(self.node_id(node).group).devices_per_node
    }

    /// The same cluster with these nodes only, which ranks take in this order.
    ///
    /// # Errors
    /// A node that there is not, or one that is listed twice.
    pub fn on_nodes(&self, order: &[usize]) -> Result<Self, ClusterError> {
        let n_nodes = self.n_all_nodes();
        let mut is_taken = vec![false; n_nodes];
        for &node in order {
            match is_taken.get_mut(node) {
                None => {
                    return Err(ClusterError::Invalid(format!(
                        "there is no node {node}: cluster `{}` has {n_nodes}, from 0 to {}",
                        self.name,
                        n_nodes.saturating_sub(1)
                    )));
                }
                Some(true) => {
                    return Err(ClusterError::Invalid(format!(
                        "node {node} of cluster `{}` is listed twice",
                        self.name
                    )));
                }
                Some(taken) => *taken = true,
            }
        }
        let is_all = order.len() == n_nodes && order.iter().enumerate().all(|(at, n)| at == *n);
        let order = if is_all { Vec::new() } else { order.to_vec() };
        Ok(Self {
            order,
            ..self.clone()
        })
    }

    /// The same cluster with all its nodes in order.
    #[must_use]
    pub fn unplaced(&self) -> Self {
        Self {
            order: Vec::new(),
            ..self.clone()
        }
    }

    /// The nodes of a range of ranks, in their order.
    pub fn nodes_of(&self, ranks: Range<usize>) -> Vec<usize> {
        if !self.is_mixed() {
            let per_node = self.devices_per_node.max(1);
            let places = ranks.start / per_node..ranks.end.div_ceil(per_node);
            if self.order.is_empty() {
                return (places.start..places.end.min(self.n_nodes)).collect();
            }
            let end = places.end.min(self.order.len());
            return self.order[places.start.min(end)..end].to_vec();
        }
        let mut found = Vec::new();
        let mut first = 0;
        for node in self.placed_nodes() {
            let end = first + self.devices_of(node);
            if first < ranks.end && end > ranks.start {
                found.push(node);
            }
            if end >= ranks.end {
                break;
            }
            first = end;
        }
        found
    }

    /// The group whose devices are slowest among those of some nodes.
    pub fn slowest_group(&self, nodes: &[usize]) -> usize {
        let speed = |group: &usize| {
            let device = &self.group(*group).device;
            device.matmul_peak(DType::Bf16) * device.matmul_efficiency
        };
        let mut groups: Vec<usize> = nodes.iter().map(|n| self.node_id(*n).group).collect();
        groups.sort_unstable();
        groups.dedup();
        groups
            .into_iter()
            .min_by(|a, b| speed(a).total_cmp(&speed(b)).then(a.cmp(b)))
            .unwrap_or(0)
    }

    /// The link between two groups: the one that is given, else the slower one of their networks.
    pub fn link_between_groups(&self) -> Link {
        let own = self.groups().map(|group| &group.between_nodes);
        self.between_groups.clone().unwrap_or_else(|| {
            own.min_by(|a, b| a.bytes_per_s.total_cmp(&b.bytes_per_s))
                .cloned()
                .unwrap_or_else(|| self.between_nodes.clone())
        })
    }

    /// The part of the cluster that a range of ranks is on.
    ///
    /// Nodes of one group keep its levels and slow links as far as the ranks meet them. Over several
    /// groups every device counts as the slowest of them, with the least memory, and every link of
    /// the network as the slowest one that there is, the one between the groups included.
    pub fn site(&self, ranks: Range<usize>) -> Self {
        let nodes = self.nodes_of(ranks);
        let ids: Vec<NodeId> = nodes.iter().map(|node| self.node_id(*node)).collect();
        let slowest = self.slowest_group(&nodes);
        let mut site = Self {
            others: Vec::new(),
            between_groups: None,
            order: Vec::new(),
            ..self.group(slowest).clone()
        };
        site.n_nodes = nodes.len().max(1);
        if ids.iter().all(|id| id.group == slowest) {
            let local: Vec<usize> = ids.iter().map(|id| id.node).collect();
            let group = self.group(slowest);
            site.levels.retain(|level| {
                let unit = |node: usize| node / level.n_nodes;
                let first = local.first().map(|node| unit(*node));
                local.iter().any(|node| Some(unit(*node)) != first)
            });
            let is_met = |slow: &Slow| local.iter().any(|node| slow.covers(*node, group));
            site.slow.retain(|slow| {
                let is_crossed = match slow.links {
                    SlowLinks::Within => true,
                    SlowLinks::Uplink if slow.unit == "node" => local.len() > 1,
                    SlowLinks::Uplink => site.levels.iter().any(|l| l.name == slow.unit),
                };
                is_crossed && is_met(slow)
            });
            if !(site.levels.is_empty() && site.slow.is_empty()) {
                site.order = local;
            }
            return site;
        }
        let between = self.link_between_groups();
        let mut network = between.clone();
        for id in &ids {
            let group = self.group(id.group);
            let (device, other) = (&mut site.device, &group.device);
            device.memory_bytes = device.memory_bytes.min(other.memory_bytes);
            device.memory_bytes_per_s = device.memory_bytes_per_s.min(other.memory_bytes_per_s);
            device.host_bytes_per_s = device.host_bytes_per_s.min(other.host_bytes_per_s);
            device.host_memory_bytes = device.host_memory_bytes.min(other.host_memory_bytes);
            device.launch_s = device.launch_s.max(other.launch_s);
            site.devices_per_node = site.devices_per_node.min(group.devices_per_node);
            let mut within = 1.0_f64;
            let mut speed = group.between_nodes.bytes_per_s;
            for slow in group.slow.iter().filter(|slow| slow.covers(id.node, group)) {
                match slow.links {
                    SlowLinks::Within => within = within.min(slow.part),
                    SlowLinks::Uplink => {
                        let level = group.levels.iter().find(|level| level.name == slow.unit);
                        let link = level.map_or(&group.between_nodes, |level| &level.link);
                        speed = speed.min(link.bytes_per_s * slow.part);
                    }
                }
            }
            for level in &group.levels {
                speed = speed.min(level.link.bytes_per_s);
                network.latency_s = network.latency_s.max(level.link.latency_s);
            }
            network.latency_s = network.latency_s.max(group.between_nodes.latency_s);
            if speed < network.bytes_per_s {
                network.bytes_per_s = speed;
                network.name.clone_from(&group.between_nodes.name);
            }
            let inside = &mut site.within_node;
            let own = group.within_node.bytes_per_s * within;
            inside.bytes_per_s = inside.bytes_per_s.min(own);
            inside.latency_s = inside.latency_s.max(group.within_node.latency_s);
        }
        site.between_nodes = network;
        site.levels.clear();
        site.slow.clear();
        site
    }
}

/// A list of nodes as ranges: `0..8`, `12`.
pub fn ranges_of(nodes: &[usize]) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for &node in nodes {
        match ranges.last_mut() {
            Some(last) if last.end == node => last.end = node + 1,
            _ => ranges.push(node..node + 1),
        }
    }
    ranges
}

/// The same in words, such as `0..8, 12`.
pub fn show_nodes(nodes: &[usize]) -> String {
    let texts: Vec<String> = ranges_of(nodes)
        .into_iter()
        .map(|range| match range.len() {
            1 => range.start.to_string(),
            _ => format!("{}..{}", range.start, range.end),
        })
        .collect();
    texts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mixed() -> Cluster {
        Cluster {
            others: vec![Cluster::preset("a100-80:32").unwrap()],
            ..Cluster::preset("h100:16").unwrap()
        }
    }

    #[test]
    fn ranks_take_the_nodes_of_all_groups() {
        let cluster = mixed();
        assert_eq!((cluster.n_devices(), cluster.n_all_nodes()), (48, 6));
        assert_eq!(cluster.node_of(15), 1);
        assert_eq!(cluster.node_of(16), 2);
        assert_eq!(cluster.nodes_of(8..24), [1, 2]);
        let turned = cluster.on_nodes(&[2, 3, 0]).unwrap();
        assert_eq!((turned.n_devices(), turned.node_of(17)), (24, 0));
        assert_eq!(turned.site(0..16).device.name, "a100-80");
        assert_eq!(turned.site(16..24).device.name, "h100");
    }

    #[test]
    fn a_site_over_two_groups_is_as_slow_as_the_slower_one() {
        let site = mixed().site(0..48);
        assert_eq!(site.device.name, "a100-80");
        assert_eq!(site.within_node.bytes_per_s, 300e9);
        assert_eq!(site.between_nodes.bytes_per_s, 25e9);
        assert!(site.is_flat());
    }

    #[test]
    fn a_slow_uplink_is_met_only_by_ranks_that_leave_the_node() {
        let slow = Slow {
            unit: "node".into(),
            idx: 1,
            links: SlowLinks::Uplink,
            part: 0.25,
        };
        let cluster = Cluster {
            slow: vec![slow],
            ..Cluster::preset("h100:32").unwrap()
        };
        assert!(cluster.site(8..16).is_flat());
        assert!(cluster.site(16..32).is_flat());
        assert_eq!(cluster.site(0..16).slow.len(), 1);
    }

    #[test]
    fn nodes_that_are_not_there_are_refused() {
        let message = |order: &[usize]| mixed().on_nodes(order).unwrap_err().to_string();
        assert_eq!(
            message(&[0, 6]),
            "there is no node 6: cluster `h100:16` has 6, from 0 to 5"
        );
        assert_eq!(
            message(&[0, 0]),
            "node 0 of cluster `h100:16` is listed twice"
        );
    }
}
