//! Where the ranks of a pipeline are: the part of the cluster that each of them sees.
//!
//! Enters: a cluster and a mapping. Leaves: a *site* for every pipeline rank: a cluster of like nodes
//! with the levels and slow links that the rank's groups may meet; seconds of messages between stages.
//! Invariant: pipeline rank `r` has the ranks from `r · tp·cp·dp` on; like sites are one; on a flat
//! cluster there is one site, the cluster itself.

use std::borrow::Cow;
use std::ops::Range;

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::mapping::Mapping;

use crate::plan::cost::links::{GroupShape, Traffic, send_seconds, traffic_seconds};

/// The sites of a mapping.
pub struct Sites<'a> {
    cluster: &'a Cluster,
    /// Ranks of a pipeline rank.
    n_ranks: usize,
    distinct: Vec<Cow<'a, Cluster>>,
    /// The site of every pipeline rank.
    of_rank: Vec<usize>,
}

/// The ranks of a pipeline rank.
pub fn ranks_of(mapping: &Mapping, pipeline_rank: usize) -> Range<usize> {
    let n_ranks = mapping.tp * mapping.cp * mapping.dp;
    pipeline_rank * n_ranks..(pipeline_rank + 1) * n_ranks
}

impl<'a> Sites<'a> {
    /// The sites of a mapping on a cluster.
    pub fn new(cluster: &'a Cluster, mapping: &Mapping) -> Self {
        let n_ranks = mapping.tp * mapping.cp * mapping.dp;
        let mut sites = Self {
            cluster,
            n_ranks,
            distinct: Vec::new(),
            of_rank: Vec::new(),
        };
        if cluster.is_flat() {
            sites.distinct.push(Cow::Borrowed(cluster));
            return sites;
        }
        for rank in 0..mapping.pp {
            let site = cluster.site(ranks_of(mapping, rank));
            let known = sites.distinct.iter().position(|known| **known == site);
            sites.of_rank.push(known.unwrap_or(sites.distinct.len()));
            if known.is_none() {
                sites.distinct.push(Cow::Owned(site));
            }
        }
        sites
    }

    /// The different sites.
    pub fn distinct(&self) -> impl Iterator<Item = &Cluster> {
        self.distinct.iter().map(AsRef::as_ref)
    }

    /// The number of a pipeline rank's site among them.
    pub fn idx_of(&self, pipeline_rank: usize) -> usize {
        self.of_rank.get(pipeline_rank).copied().unwrap_or(0)
    }

    /// The site of a pipeline rank.
    pub fn of(&self, pipeline_rank: usize) -> &Cluster {
        let site = self.distinct.get(self.idx_of(pipeline_rank));
        site.map_or(self.cluster, AsRef::as_ref)
    }

    /// Whether all pipeline ranks are alike.
    pub fn are_alike(&self) -> bool {
        self.distinct.len() == 1
    }

    /// Dense bf16 operations a second of all devices of the mapping.
    pub fn peak(&self, mapping: &Mapping) -> f64 {
        if self.cluster.is_flat() {
            return self.cluster.device.matmul_peak(DType::Bf16) * mapping.n_ranks() as f64;
        }
        let mut first = 0;
        let mut sum = 0.0;
        for node in self.cluster.placed_nodes() {
            let group = self.cluster.group(self.cluster.node_id(node).group);
            let left = mapping.n_ranks().saturating_sub(first);
            let taken = group.devices_per_node.min(left);
            sum += taken as f64 * group.device.matmul_peak(DType::Bf16);
            first += group.devices_per_node;
        }
        sum
    }

    /// Seconds of a message of every rank to its peer of the next stage, for each pipeline rank but the
    /// last.
    pub fn send_seconds(&self, mapping: &Mapping, n_bytes: f64) -> Vec<f64> {
        if mapping.pp < 2 {
            return Vec::new();
        }
        if self.cluster.is_flat() {
            let is_spread = self.n_ranks >= self.cluster.devices_per_node;
            let one = send_seconds(n_bytes, is_spread, self.cluster);
            return vec![one; mapping.pp - 1];
        }
        (1..mapping.pp)
            .map(|rank| {
                let ranks = ranks_of(mapping, rank - 1).start..ranks_of(mapping, rank).end;
                let pair = self.cluster.site(ranks);
                let step = pair.devices_per_node.max(1);
                (0..self.n_ranks)
                    .step_by(step)
                    .map(|first| {
                        let shape = GroupShape::of(&[first, first + self.n_ranks], &pair);
                        traffic_seconds(Traffic::Permute, n_bytes, shape, &pair)
                    })
                    .fold(0.0, f64::max)
            })
            .collect()
    }
}
