//! The mapping of a space that leaves nothing open.
//!
//! Enters: a space, as a plan with all its witnesses gives it. Leaves: its only mapping, unpriced.
//! Invariant: nothing is chosen here; what is still open is named.

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::mapping::{Context, Mapping, Offload, Pipeline, Recompute, Zero};

use super::grids::{Grid, objection};
use super::space::{Allowed, Cuts, ShardGroup, Space, Whole};
use super::{OuterError, Problem};
use crate::plan::estimate::{Job, Workload};

/// The only mapping of the space.
///
/// # Errors
/// `Invalid`, naming what is open, or why the mapping is not legal.
pub fn the_only(
    workload: &Workload,
    cluster: &Cluster,
    space: &Space,
) -> Result<Mapping, OuterError> {
    let open = |what: &str| OuterError::Invalid {
        message: format!("the plan leaves {what} open"),
        reasons: Vec::new(),
    };
    let degree = |name: &str, allowed: &Allowed| match allowed {
        Allowed::Among(degrees) => match degrees.as_slice() {
            [degree] if *degree > 0 => Ok(*degree),
            _ => Err(open(name)),
        },
        Allowed::Any => Err(open(name)),
    };
    let (tp, cp, pp) = (
        degree("tp", &space.tp)?,
        degree("cp", &space.cp)?,
        degree("pp", &space.pp)?,
    );
    let dp = match &space.dp {
        Allowed::Any => (cluster.n_devices() / (tp * cp * pp)).max(1),
        dp => degree("dp", dp)?,
    };
    let (ep, etp) = match workload.model.moe {
        None => (1, 1),
        Some(_) => (degree("ep", &space.ep)?, degree("etp", &space.etp)?),
    };
    let grid = Grid {
        tp,
        cp,
        dp,
        pp,
        ep,
        etp,
    };
    let illegal = |message: String| OuterError::Invalid {
        message,
        reasons: Vec::new(),
    };
    if let Some(why) = objection(
        &Problem {
            workload,
            cluster,
            space,
        },
        grid,
    ) {
        return Err(illegal(why));
    }
    let n_ranks = tp * cp * dp * pp;
    if n_ranks > cluster.n_devices() {
        return Err(illegal(format!(
            "the plan takes {n_ranks} ranks and the cluster has {} devices",
            cluster.n_devices()
        )));
    }
    let n_microbatches = degree("microbatches", &space.n_microbatches)?;
    if !workload.batch.is_multiple_of(dp * n_microbatches) {
        return Err(illegal(format!(
            "dp {dp} × {n_microbatches} microbatches do not divide batch {}",
            workload.batch
        )));
    }
    let mut mapping = Mapping {
        tp,
        cp,
        pp,
        ep,
        etp,
        ..Mapping::data_parallel(
            dp,
            workload.batch / (dp * n_microbatches),
            only("dtype", &space.precisions).map_err(open_of)?,
        )
    };
    if tp > 1 && !matches!(workload.job, Job::Decode { .. }) {
        mapping.sequence_parallel = only("sp", &space.sequence_parallel).map_err(open_of)?;
    }
    mapping.context = match cp {
        1 => Context::default(),
        _ => only("context", &space.contexts).map_err(open_of)?,
    };
    if dp * cp > 1 && workload.job == Job::Train {
        let stage = only("zero", &space.zero_stages).map_err(open_of)?;
        let group = match space.shard_groups.as_slice() {
            [ShardGroup::Ranks(ranks)] if *ranks != dp => Some(*ranks),
            _ => None,
        };
        mapping.zero = Zero {
            stage,
            group: group.filter(|_| stage > 0),
        };
    }
    if pp > 1 {
        let chunks = degree("chunks", &space.chunks)?;
        mapping.pipeline = Pipeline {
            schedule: only("schedule", &space.schedules).map_err(open_of)?,
            chunks,
            layers: match &space.cuts {
                Cuts::Given(layers) if !is_even(layers, workload.model.n_layers) => {
                    Some(layers.clone())
                }
                Cuts::Given(_) | Cuts::Even => None,
                Cuts::Any => return Err(open("cuts")),
            },
        };
    }
    if workload.job == Job::Train {
        mapping.recompute = match only("recompute", &space.whole).map_err(open_of)? {
            Whole::None if space.maybe_again != space.again => return Err(open("recompute")),
            Whole::None if space.again.is_empty() => Recompute::None,
            Whole::None => Recompute::Modules(space.again.clone()),
            Whole::Full => Recompute::Full,
            Whole::First(Some(count)) => Recompute::Layers(count),
            Whole::First(None) => return Err(open("recompute")),
            Whole::Ranks(counts) => Recompute::LayersByRank(counts),
        };
        mapping.offload = Offload {
            optimizer: only("offload optimizer", &space.offload_optimizer).map_err(open_of)?,
            activations: only("offload activations", &space.offload_activations)
                .map_err(open_of)?,
        };
    }
    mapping
        .check()
        .map_err(|error| illegal(error.to_string()))?;
    Ok(mapping)
}

fn open_of(what: String) -> OuterError {
    OuterError::Invalid {
        message: format!("the plan leaves {what} open"),
        reasons: Vec::new(),
    }
}

fn only<T: Clone>(what: &str, choices: &[T]) -> Result<T, String> {
    match choices {
        [choice] => Ok(choice.clone()),
        _ => Err(what.to_owned()),
    }
}

/// Whether these are the layers of stages that are as even as possible.
pub(super) fn is_even(layers: &[usize], n_layers: usize) -> bool {
    let n_stages = layers.len();
    let even = |stage: usize| n_layers / n_stages + usize::from(stage < n_layers % n_stages);
    layers
        .iter()
        .enumerate()
        .all(|(stage, count)| *count == even(stage))
}
