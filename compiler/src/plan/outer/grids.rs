//! Grids: all ways to lay the ranks out along both families of axes.
//!
//! Enters: a problem. Leaves: grids with a microbatch size and what belongs to the layer's own price.
//! Invariant: a grid has exactly the ranks that are asked for, both of its families cover them with the
//! same pipelines (MoE Parallel Folding, arXiv 2504.14960, §3), and every degree divides what it
//! divides in the model.

use std::collections::BTreeMap;

use meshweave_dsl::mapping::{Context, GridAxis, Mapping, Precision};

use super::{Allowed, Problem, Space};
use crate::plan::estimate::Job;

/// The degrees of both grids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Grid {
    pub tp: usize,
    pub cp: usize,
    pub dp: usize,
    pub pp: usize,
    pub ep: usize,
    pub etp: usize,
}

/// Everything that the price of a layer depends on, for a microbatch of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LayerKey {
    pub tp: usize,
    pub cp: usize,
    pub ep: usize,
    pub etp: usize,
    pub micro_batch: usize,
    pub sequence_parallel: bool,
    pub context: Context,
    pub precision: Precision,
}

impl Grid {
    /// The mapping of a grid with its layers as `key` says, and nothing else chosen.
    pub fn mapping(self, key: &LayerKey) -> Mapping {
        Mapping {
            tp: self.tp,
            cp: self.cp,
            pp: self.pp,
            ep: self.ep,
            etp: self.etp,
            sequence_parallel: key.sequence_parallel,
            context: key.context,
            ..Mapping::data_parallel(self.dp, key.micro_batch, key.precision)
        }
    }
}

/// The divisors of a number, ascending. O(√n).
pub(super) fn divisors(n: usize) -> Vec<usize> {
    let mut low = Vec::new();
    let mut high = Vec::new();
    let mut at = 1;
    while at * at <= n {
        if n.is_multiple_of(at) {
            low.push(at);
            if at * at < n {
                high.push(n / at);
            }
        }
        at += 1;
    }
    low.extend(high.into_iter().rev());
    low
}

/// Why degrees are not legal, with the numbers; `None` where they are.
pub(super) fn objection(problem: &Problem<'_>, grid: Grid) -> Option<String> {
    let (workload, cluster, space) = (problem.workload, problem.cluster, problem.space);
    let model = &workload.model;
    let attention = &model.attention;
    let no = |message: String| Some(message);
    let admitted = [
        ("tp", &space.tp, grid.tp),
        ("cp", &space.cp, grid.cp),
        ("dp", &space.dp, grid.dp),
        ("pp", &space.pp, grid.pp),
        ("ep", &space.ep, grid.ep),
        ("etp", &space.etp, grid.etp),
    ];
    if let Some((name, _, degree)) = admitted.iter().find(|(_, allowed, d)| !allowed.admits(*d)) {
        return no(format!("{name} {degree} is not among the choices"));
    }
    if !attention.heads.is_multiple_of(grid.tp) {
        return no(format!(
            "tp {} does not divide {} heads",
            grid.tp, attention.heads
        ));
    }
    if !attention.kv_heads.is_multiple_of(grid.tp) && !grid.tp.is_multiple_of(attention.kv_heads) {
        return no(format!(
            "tp {} neither divides {} key heads nor is a multiple of them",
            grid.tp, attention.kv_heads
        ));
    }
    if has_dense_layers(problem) && !model.ffn.width.is_multiple_of(grid.tp) {
        return no(format!(
            "tp {} does not divide the width {}",
            grid.tp, model.ffn.width
        ));
    }
    if grid.cp > 1 {
        // Load balance of a causal mask takes two chunks a rank (Llama 3, arXiv 2407.21783, §3.3.2).
        let chunks = 2 * grid.cp;
        if matches!(workload.job, Job::Decode { .. }) {
            return no("context parallelism has nothing to divide in a decoding step".into());
        }
        if !workload.seq.is_multiple_of(chunks) {
            return no(format!(
                "cp {} needs {chunks} chunks of {} tokens",
                grid.cp, workload.seq
            ));
        }
    }
    if !workload.batch.is_multiple_of(grid.dp) {
        return no(format!(
            "dp {} does not divide batch {}",
            grid.dp, workload.batch
        ));
    }
    if grid.pp > model.n_layers {
        return no(format!("pp {} exceeds {} layers", grid.pp, model.n_layers));
    }
    match &model.moe {
        None if grid.ep * grid.etp > 1 => return no("the model has no experts".into()),
        Some(moe) => {
            if !moe.n_experts.is_multiple_of(grid.ep) {
                return no(format!(
                    "ep {} does not divide {} experts",
                    grid.ep, moe.n_experts
                ));
            }
            if !moe.ffn.is_multiple_of(grid.etp) {
                return no(format!(
                    "etp {} does not divide an expert's width {}",
                    grid.etp, moe.ffn
                ));
            }
            let ranks = grid.tp * grid.cp * grid.dp;
            if !ranks.is_multiple_of(grid.etp * grid.ep) {
                return no(format!(
                    "etp {} × ep {} does not divide the {ranks} ranks of a stage",
                    grid.etp, grid.ep
                ));
            }
            let edp = ranks / (grid.etp * grid.ep);
            if !space.edp.admits(edp) {
                return no(format!("edp {edp} is not among the choices"));
            }
        }
        None => {}
    }
    let per_node = cluster.devices_per_node;
    for (axis, size, stride) in [
        (GridAxis::Tp, grid.tp, 1),
        (GridAxis::Cp, grid.cp, grid.tp),
        (GridAxis::Dp, grid.dp, grid.tp * grid.cp),
        (GridAxis::Etp, grid.etp, 1),
        (GridAxis::Ep, grid.ep, grid.etp),
    ] {
        let spans = size * stride;
        if size > 1 && space.within_node.contains(&axis) && !per_node.is_multiple_of(spans) {
            return no(format!(
                "the groups of {axis:?} span {spans} ranks, and a node has {per_node} devices"
            ));
        }
    }
    None
}

fn has_dense_layers(problem: &Problem<'_>) -> bool {
    let model = &problem.workload.model;
    model
        .moe
        .as_ref()
        .is_none_or(|moe| !moe.dense_layers.is_empty())
}

/// Grids whose layers are alike: they differ in how many ranks the pipeline and the data have.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Family {
    pub tp: usize,
    pub cp: usize,
    pub ep: usize,
    pub etp: usize,
    pub grids: Vec<Grid>,
}

/// All legal grids of `n_ranks` by family, and the objections to the others.
pub(super) fn families(problem: &Problem<'_>, n_ranks: usize) -> (Vec<Family>, Objections) {
    let (grids, objections) = grids(problem, n_ranks);
    let mut families: BTreeMap<(usize, usize, usize, usize), Vec<Grid>> = BTreeMap::new();
    for grid in grids {
        let own = families.entry((grid.tp, grid.cp, grid.ep, grid.etp));
        own.or_default().push(grid);
    }
    let families = families
        .into_iter()
        .map(|((tp, cp, ep, etp), grids)| Family {
            tp,
            cp,
            ep,
            etp,
            grids,
        })
        .collect();
    (families, objections)
}

/// Tokens of a sequence that a rank of `cp` holds at least where `cp` is left open.
pub(super) const LEAST_TOKENS: usize = 256;
/// Nodes that the groups of `tp` and `etp` span at most where they are left open.
pub(super) const MOST_NODES: usize = 4;

/// Whether a degree is worth a look that nobody asked for.
fn is_searched(problem: &Problem<'_>, tp: usize, cp: usize, etp: usize) -> bool {
    let (space, cluster) = (problem.space, problem.cluster);
    let most = MOST_NODES * cluster.devices_per_node;
    (space.tp != Allowed::Any || tp <= most)
        && (space.etp != Allowed::Any || etp <= most)
        && (space.cp != Allowed::Any || cp == 1 || problem.workload.seq / cp >= LEAST_TOKENS)
}

/// All legal grids of `n_ranks`, and the objections to the others, each once with how often.
fn grids(problem: &Problem<'_>, n_ranks: usize) -> (Vec<Grid>, Objections) {
    let model = &problem.workload.model;
    let mut found = Vec::new();
    let mut objections = Objections::default();
    let all = divisors(n_ranks);
    let (expert_degrees, width_degrees) = match &model.moe {
        Some(moe) => (divisors(moe.n_experts), divisors(moe.ffn)),
        None => (vec![1], vec![1]),
    };
    // Attention first, so that the experts' choices are not named as causes of its objections.
    let space = Space {
        ep: Allowed::Any,
        etp: Allowed::Any,
        edp: Allowed::Any,
        ..problem.space.clone()
    };
    let without_experts = Problem {
        space: &space,
        ..*problem
    };
    for &pp in &all {
        for &tp in all.iter().filter(|tp| (n_ranks / pp).is_multiple_of(**tp)) {
            let left = n_ranks / pp / tp;
            for cp in divisors(left) {
                let grid = Grid {
                    tp,
                    cp,
                    dp: left / cp,
                    pp,
                    ep: 1,
                    etp: 1,
                };
                if let Some(why) = objection(&without_experts, grid) {
                    objections.add(why);
                    continue;
                }
                for &ep in &expert_degrees {
                    for &etp in &width_degrees {
                        if !is_searched(problem, tp, cp, etp) {
                            continue;
                        }
                        let folded = Grid { ep, etp, ..grid };
                        match objection(problem, folded) {
                            None => found.push(folded),
                            Some(why) => objections.add(why),
                        }
                    }
                }
            }
        }
    }
    (found, objections)
}

/// Why grids were left out, and how many.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Objections {
    reasons: BTreeMap<String, usize>,
}

impl Objections {
    fn add(&mut self, why: String) {
        *self.reasons.entry(why).or_insert(0) += 1;
    }

    /// The reasons, most frequent first.
    pub fn most_frequent(&self) -> Vec<(&str, usize)> {
        let mut reasons: Vec<(&str, usize)> = self
            .reasons
            .iter()
            .map(|(why, count)| (why.as_str(), *count))
            .collect();
        reasons.sort_by_key(|(why, count)| (std::cmp::Reverse(*count), *why));
        reasons
    }
}

/// Whether a grid has whole microbatches of this size, as many as may be.
pub(super) fn admits_microbatches(problem: &Problem<'_>, grid: Grid, micro_batch: usize) -> bool {
    let per_rank = problem.workload.batch / grid.dp;
    per_rank.is_multiple_of(micro_batch)
        && problem.space.n_microbatches.admits(per_rank / micro_batch)
}

/// The layer choices of a family: microbatch sizes, sequence parallelism, context, precision.
pub(super) fn layer_keys(problem: &Problem<'_>, grid: &Family) -> Vec<LayerKey> {
    let (workload, space) = (problem.workload, problem.space);
    let mut sizes: Vec<usize> = grid
        .grids
        .iter()
        .flat_map(|grid| {
            let sizes = divisors(workload.batch / grid.dp).into_iter();
            sizes.filter(|size| admits_microbatches(problem, *grid, *size))
        })
        .filter(|size| space.micro_batches.admits(*size))
        .collect();
    sizes.sort_unstable();
    sizes.dedup();
    let sequence_parallel: Vec<bool> = space
        .sequence_parallel
        .iter()
        .copied()
        .filter(|is_on| {
            let divides = (workload.seq / grid.cp).is_multiple_of(grid.tp);
            let is_legal = grid.tp > 1 && divides && !matches!(workload.job, Job::Decode { .. });
            !is_on || is_legal
        })
        .collect();
    // What makes no difference is not chosen.
    let sequence_parallel = match grid.tp {
        1 => vec![false],
        _ => sequence_parallel,
    };
    let contexts: Vec<Context> = if grid.cp == 1 {
        vec![Context::default()]
    } else {
        let attention = &workload.model.attention;
        space
            .contexts
            .iter()
            .copied()
            .filter(|context| {
                let heads = attention.heads / grid.tp;
                let kv_heads = (attention.kv_heads / grid.tp).max(1);
                *context != Context::Ulysses
                    || heads.is_multiple_of(grid.cp)
                        && (kv_heads.is_multiple_of(grid.cp) || grid.cp.is_multiple_of(kv_heads))
            })
            .collect()
    };
    let mut keys = Vec::new();
    for &micro_batch in &sizes {
        for &sequence_parallel in &sequence_parallel {
            for &context in &contexts {
                for &precision in &space.precisions {
                    keys.push(LayerKey {
                        tp: grid.tp,
                        cp: grid.cp,
                        ep: grid.ep,
                        etp: grid.etp,
                        micro_batch,
                        sequence_parallel,
                        context,
                        precision,
                    });
                }
            }
        }
    }
    keys
}

/// The degrees of a mapping.
pub(super) fn grid_of(mapping: &Mapping) -> Grid {
    Grid {
        tp: mapping.tp,
        cp: mapping.cp,
        dp: mapping.dp,
        pp: mapping.pp,
        ep: mapping.ep,
        etp: mapping.etp,
    }
}

/// The choices of its layers.
pub(super) fn key_of(mapping: &Mapping) -> LayerKey {
    LayerKey {
        tp: mapping.tp,
        cp: mapping.cp,
        ep: mapping.ep,
        etp: mapping.etp,
        micro_batch: mapping.micro_batch,
        sequence_parallel: mapping.sequence_parallel,
        context: mapping.context,
        precision: mapping.precision,
    }
}
