//! The space of a search: what every dimension of a mapping may be.
//!
//! Enters: what a document leaves open. Leaves: the choices of each dimension.
//! Invariant: every list is in the order in which it is searched, without repetition.

use std::collections::BTreeSet;

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::mapping::{Context, GridAxis, Mapping, Module, Precision};

use crate::plan::HEADROOM;
use crate::plan::estimate::{Job, Workload};
use crate::schedule::Builtin;

/// What a degree may be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Allowed {
    /// Anything that is legal.
    #[default]
    Any,
    /// One of these.
    Among(Vec<usize>),
}

impl Allowed {
    /// Exactly this.
    pub fn only(degree: usize) -> Self {
        Self::Among(vec![degree])
    }

    /// What both admit.
    pub fn and(&self, other: &Self) -> Self {
        match (self, other) {
            (Self::Any, other) => other.clone(),
            (own, Self::Any) => own.clone(),
            (Self::Among(own), other) => {
                Self::Among(own.iter().copied().filter(|d| other.admits(*d)).collect())
            }
        }
    }

    /// Whether it may be this.
    pub fn admits(&self, degree: usize) -> bool {
        match self {
            Self::Any => true,
            Self::Among(degrees) => degrees.contains(&degree),
        }
    }
}

/// Where the layers are cut into stages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Cuts {
    /// As many layers a stage as possible alike.
    Even,
    /// Evenly, or so that the slowest stage is as fast as can be.
    #[default]
    Any,
    /// So many layers a stage.
    Given(Vec<usize>),
}

/// Which whole layers are computed again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whole {
    /// None.
    None,
    /// All.
    Full,
    /// So many of every pipeline rank; the least that fits where absent.
    First(Option<usize>),
    /// So many of each pipeline rank.
    Ranks(Vec<usize>),
}

/// Among how many ranks ZeRO divides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShardGroup {
    /// All data-parallel ranks.
    All,
    /// Those of a node.
    Node,
    Ranks(usize),
}

/// The choices of every dimension.
#[derive(Clone, Debug, PartialEq)]
pub struct Space {
    /// Sequences of a step. Of several the plan with the most tokens a second is sought.
    pub batches: Allowed,
    pub tp: Allowed,
    pub cp: Allowed,
    pub dp: Allowed,
    pub pp: Allowed,
    pub ep: Allowed,
    pub etp: Allowed,
    pub edp: Allowed,
    /// Axes whose groups must not cross nodes.
    pub within_node: BTreeSet<GridAxis>,
    pub sequence_parallel: Vec<bool>,
    pub contexts: Vec<Context>,
    pub zero_stages: Vec<u8>,
    pub shard_groups: Vec<ShardGroup>,
    pub micro_batches: Allowed,
    pub n_microbatches: Allowed,
    /// Names of built-in schedules; every family that trains synchronously where none is named.
    pub schedules: Vec<String>,
    pub chunks: Allowed,
    pub cuts: Cuts,
    /// Parts of layers that must be computed again.
    pub again: BTreeSet<Module>,
    /// Parts of layers that may be computed again.
    pub maybe_again: BTreeSet<Module>,
    pub whole: Vec<Whole>,
    pub offload_optimizer: Vec<bool>,
    /// Parts of the kept activations.
    pub offload_activations: Vec<f64>,
    pub precisions: Vec<Precision>,
    /// Bytes that a plan may use of a device.
    pub budget_bytes: u64,
    /// Part of a device's memory that stays free, where devices differ.
    pub headroom: f64,
    /// Seconds that a step may take.
    pub most_s: Option<f64>,
    /// Seconds that the first token of one prompt a replica may take where tokens are generated.
    pub most_first_s: Option<f64>,
    pub preferences: Vec<Preference>,
}

/// A ranking of the ways of context parallelism, best first.
#[derive(Clone, Debug, PartialEq)]
pub struct Preference {
    pub ranking: Vec<Context>,
    /// What each place down the ranking weighs, in percent of a step.
    pub weight: f64,
}

impl Preference {
    /// The factor by which a mapping counts as slower.
    pub fn factor(&self, mapping: &Mapping) -> f64 {
        if mapping.cp == 1 {
            return 1.0;
        }
        let place = self
            .ranking
            .iter()
            .position(|context| *context == mapping.context)
            .unwrap_or(0);
        1.0 + place as f64 * self.weight / 100.0
    }
}

/// Chunks of a pipeline rank that are searched.
pub const MAX_CHUNKS: usize = 16;

impl Space {
    /// Whether a mapping may keep everything where it is, and compute nothing again but what it must.
    pub fn may_save_nothing(&self) -> bool {
        self.whole.contains(&Whole::None)
            && self.offload_optimizer.contains(&false)
            && self.offload_activations.contains(&0.0)
    }

    /// Bytes that a plan may use of the devices of a site: the budget, and where devices differ no more
    /// than each has.
    pub fn budget_of(&self, site: &Cluster, cluster: &Cluster) -> u64 {
        if !cluster.is_mixed() {
            return self.budget_bytes;
        }
        let own = site.device.memory_bytes as f64 * (1.0 - self.headroom);
        self.budget_bytes.min(own as u64)
    }

    /// Everything that is legal for the workload on the cluster.
    pub fn everything(workload: &Workload, cluster: &Cluster) -> Self {
        let is_training = workload.job == Job::Train;
        let may_offload = is_training && cluster.device.host_bytes_per_s > 0.0;
        let model = &workload.model;
        let mut maybe_again = BTreeSet::new();
        if is_training {
            maybe_again.extend([Module::CoreAttention, Module::Norm, Module::Mlp]);
            if model.attention.mla.is_some() {
                maybe_again.insert(Module::MlaUp);
            }
            if model.moe.is_some() {
                maybe_again.extend([Module::Moe, Module::MoeActivation]);
            }
        }
        Self {
            batches: Allowed::only(workload.batch),
            tp: Allowed::Any,
            cp: Allowed::Any,
            dp: Allowed::Any,
            pp: Allowed::Any,
            ep: Allowed::Any,
            etp: Allowed::Any,
            edp: Allowed::Any,
            within_node: BTreeSet::new(),
            sequence_parallel: vec![true, false],
            contexts: vec![Context::Ring, Context::AllGather, Context::Ulysses],
            zero_stages: if is_training {
                vec![1, 0, 2, 3]
            } else {
                vec![0]
            },
            shard_groups: vec![ShardGroup::All, ShardGroup::Node],
            micro_batches: Allowed::Any,
            n_microbatches: Allowed::Any,
            schedules: if is_training {
                Builtin::families()
                    .map(|family| family.name().to_owned())
                    .collect()
            } else {
                vec!["1f1b".into()]
            },
            chunks: Allowed::Any,
            cuts: Cuts::Any,
            again: BTreeSet::new(),
            maybe_again,
            whole: if is_training {
                vec![Whole::None, Whole::First(None), Whole::Full]
            } else {
                vec![Whole::None]
            },
            offload_optimizer: if may_offload {
                vec![false, true]
            } else {
                vec![false]
            },
            // Opened by documents alone: every part is one more way to make a mapping fit.
            offload_activations: vec![0.0],
            precisions: vec![Precision::MIXED_BF16],
            budget_bytes: (largest_memory(cluster) as f64 * (1.0 - HEADROOM)) as u64,
            headroom: HEADROOM,
            most_s: None,
            most_first_s: None,
            preferences: Vec::new(),
        }
    }
}

/// Bytes of the largest device.
pub fn largest_memory(cluster: &Cluster) -> u64 {
    let groups = cluster.groups().map(|group| group.device.memory_bytes);
    groups.max().unwrap_or(0)
}
