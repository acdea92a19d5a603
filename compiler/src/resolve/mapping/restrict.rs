//! What the decisions of a document do to the space of mappings.
//!
//! Enters: decisions. Leaves: a narrower space.
//! Invariant: a restriction only narrows what a search does unasked, save schedules, cuts and number
//! formats, which may also be named beyond it.

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::diagnostics::Span;
use meshweave_dsl::mapping::{Context, GridAxis, Precision};

use super::saving::{Offloading, Recomputing};
use crate::plan::outer::{Allowed, Cuts, Preference, ShardGroup, Space, largest_memory};

/// One decision of a document.
#[derive(Clone, Debug, PartialEq)]
pub struct Restriction {
    pub span: Span,
    /// As it is written.
    pub text: String,
    pub rule: Rule,
}

/// What a decision does to the space.
#[derive(Clone, Debug, PartialEq)]
pub enum Rule {
    Degree(GridAxis, Allowed),
    WithinNode(GridAxis),
    SequenceParallel(Vec<bool>),
    Contexts(Vec<Context>),
    Prefer(Preference),
    Zero(Vec<u8>),
    ShardGroups(Vec<ShardGroup>),
    Microbatches(Allowed),
    Chunks(Allowed),
    Cuts(Cuts),
    Schedules(Vec<String>),
    Budget(u64),
    /// Part of a device's memory.
    Headroom(f64),
    Recompute(Recomputing),
    Offload(Offloading),
    Precisions(Vec<Precision>),
    /// A step takes at most so many seconds.
    Within(f64),
    /// The first token takes at most so many.
    FirstWithin(f64),
}

impl Rule {
    /// Narrows the space.
    pub fn apply(&self, space: &mut Space, cluster: &Cluster) {
        match self {
            Self::Degree(axis, allowed) => {
                let own = match axis {
                    GridAxis::Tp => &mut space.tp,
                    GridAxis::Cp => &mut space.cp,
                    GridAxis::Dp => &mut space.dp,
                    GridAxis::Pp => &mut space.pp,
                    GridAxis::Ep => &mut space.ep,
                    GridAxis::Etp => &mut space.etp,
                    GridAxis::Edp => &mut space.edp,
                };
                *own = own.and(allowed);
            }
            Self::WithinNode(axis) => {
                space.within_node.insert(*axis);
            }
            Self::SequenceParallel(choices) => narrow(&mut space.sequence_parallel, choices),
            Self::Contexts(choices) => narrow(&mut space.contexts, choices),
            Self::Prefer(preference) => space.preferences.push(preference.clone()),
            Self::Zero(choices) => narrow(&mut space.zero_stages, choices),
            Self::ShardGroups(choices) => space.shard_groups = choices.clone(),
            Self::Microbatches(allowed) => {
                space.n_microbatches = space.n_microbatches.and(allowed);
            }
            Self::Chunks(allowed) => space.chunks = space.chunks.and(allowed),
            Self::Cuts(cuts) => space.cuts = cuts.clone(),
            Self::Schedules(names) => space.schedules = names.clone(),
            Self::Budget(bytes) => {
                space.budget_bytes = *bytes;
                space.headroom = 0.0;
            }
            Self::Headroom(part) => {
                let memory = largest_memory(cluster) as f64;
                space.budget_bytes = (memory * (1.0 - part)) as u64;
                space.headroom = *part;
            }
            Self::Recompute(recomputing) => recomputing.apply(space),
            Self::Offload(offloading) => offloading.apply(space),
            Self::Precisions(precisions) => space.precisions = precisions.clone(),
            Self::Within(most_s) => space.most_s = Some(*most_s),
            Self::FirstWithin(most_s) => space.most_first_s = Some(*most_s),
        }
    }
}

/// Keeps what is chosen from. Nothing that fits leaves nothing, so that no mapping is legal.
fn narrow<T: PartialEq>(own: &mut Vec<T>, choices: &[T]) {
    own.retain(|choice| choices.contains(choice));
}
