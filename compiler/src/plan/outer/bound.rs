//! Bounds: what no completion of a partial choice can beat.
//!
//! Enters: a grid and the choices of its layers. Leaves: a time and a memory that every mapping with
//! them needs at least.
//! Invariant: a bound never exceeds what [`estimate`] or [`memory`] says of any mapping that completes
//! the choice. It is made of the same prices: the layers' own time, evenly spread over the pipeline,
//! with no bubble, no exposed gradient reduction, no optimizer, nothing computed again.

use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::mapping::{Mapping, Module, Offload, Recompute, Zero};

use super::Problem;
use super::grids::{Grid, LayerKey};
use super::saving::front;
use super::space::{Cuts, ShardGroup, Whole};
use crate::plan::estimate::{Job, StageEstimate, Workload, estimate, memory};

/// Seconds of a microbatch of a rank without a pipeline: by layer, and at both ends.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct LayerCosts {
    /// Of each layer: forward, and for training backward.
    pub layers: Vec<f64>,
    /// Before the first layer.
    pub first: f64,
    /// Behind the last one.
    pub last: f64,
}

impl LayerCosts {
    /// The whole model.
    pub fn total(&self) -> f64 {
        self.layers.iter().sum::<f64>() + self.first + self.last
    }

    /// The least that the slowest of `pp` pipeline ranks takes, however the layers are cut: its fair
    /// share, or as many of the cheapest layers as some rank must hold.
    pub fn least_of_slowest(&self, pp: usize) -> f64 {
        let cheapest = self.layers.iter().copied().fold(f64::INFINITY, f64::min);
        let most = self.layers.len().div_ceil(pp.max(1)) as f64;
        (self.total() / pp as f64)
            .max(most * cheapest)
            .max(self.last)
    }
}

/// Layer prices that were asked for before.
#[derive(Default)]
pub(super) struct Layers {
    known: BTreeMap<LayerKey, Option<LayerCosts>>,
    module_sets: BTreeMap<LayerKey, Vec<BTreeSet<Module>>>,
}

impl Layers {
    /// The layers' prices; `None` where they have none.
    pub fn costs(&mut self, problem: &Problem<'_>, key: LayerKey) -> Option<&LayerCosts> {
        self.known
            .entry(key)
            .or_insert_with(|| probe(problem, &key))
            .as_ref()
    }

    /// The worthwhile sets of parts to compute again.
    pub fn module_sets(&mut self, problem: &Problem<'_>, key: &LayerKey) -> &[BTreeSet<Module>] {
        self.module_sets.entry(*key).or_insert_with(|| {
            let space = problem.space;
            let worth: Vec<(Module, f64, f64)> = space
                .maybe_again
                .iter()
                .filter_map(|module| worth_of(problem, key, *module))
                .collect();
            front(&space.again, &worth)
        })
    }

    /// How many were asked for.
    pub fn len(&self) -> usize {
        self.known.len()
    }
}

/// Runs of layers of one kind: (first layer, how many).
fn runs(workload: &Workload) -> Vec<(usize, usize)> {
    let kind = |layer: usize| (workload.is_moe(layer), workload.window_of(layer));
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for layer in 0..workload.model.n_layers {
        match runs.last_mut() {
            Some((first, count)) if kind(*first) == kind(layer) => *count += 1,
            _ => runs.push((layer, 1)),
        }
    }
    runs
}

/// A pipeline whose stages are: the embedding, one run of like layers each, the head.
fn probe_of(
    problem: &Problem<'_>,
    key: &LayerKey,
    runs: &[(usize, usize)],
) -> (Workload, Mapping, Cluster) {
    // The smallest grid that the experts fold into: prices of layers know nothing of the rest.
    let attention = key.tp * key.cp;
    let experts = key.etp * key.ep;
    let dp = experts / common_divisor(attention, experts);
    let grid = Grid {
        tp: key.tp,
        cp: key.cp,
        dp,
        pp: runs.len() + 2,
        ep: key.ep,
        etp: key.etp,
    };
    let mut mapping = grid.mapping(key);
    let counts = runs.iter().map(|(_, count)| *count);
    mapping.pipeline.layers = Some(std::iter::once(0).chain(counts).chain([0]).collect());
    mapping.zero = Zero {
        stage: problem.space.zero_stages.first().copied().unwrap_or(0),
        group: None,
    };
    let workload = Workload {
        batch: dp * key.micro_batch * mapping.pp,
        ..problem.workload.clone()
    };
    let mut cluster = problem.cluster.clone();
    let per_node = cluster.devices_per_node.max(1);
    cluster.n_nodes = cluster.n_nodes.max(mapping.n_ranks().div_ceil(per_node));
    (workload, mapping, cluster)
}

/// What computing a part again takes and saves, over all layers of a microbatch.
fn worth_of(problem: &Problem<'_>, key: &LayerKey, module: Module) -> Option<(Module, f64, f64)> {
    let (workload, mapping, cluster) = probe_of(problem, key, &runs(problem.workload));
    let with = Mapping {
        recompute: Recompute::Modules([module].into()),
        ..mapping.clone()
    };
    let seconds = |mapping: &Mapping| {
        let found = estimate(&workload, mapping, &cluster).ok()?;
        Some(
            found
                .stages
                .iter()
                .map(|stage| stage.recompute_s)
                .sum::<f64>(),
        )
    };
    let bytes = |mapping: &Mapping| {
        let ranks = 0..mapping.pp;
        ranks
            .map(|rank| memory(&workload, mapping, &cluster, rank).activations.0 as f64)
            .sum::<f64>()
    };
    Some((
        module,
        seconds(&with)? - seconds(&mapping)?,
        bytes(&mapping) - bytes(&with),
    ))
}

/// Prices the stages of the probe.
fn probe(problem: &Problem<'_>, key: &LayerKey) -> Option<LayerCosts> {
    let runs = runs(problem.workload);
    let (workload, mapping, cluster) = probe_of(problem, key, &runs);
    let found = estimate(&workload, &mapping, &cluster).ok()?;
    let is_training = workload.job == Job::Train;
    let seconds = |stage: &StageEstimate| {
        stage.forward_s
            + if is_training {
                stage.backward_input_s + stage.backward_weight_s
            } else {
                0.0
            }
    };
    let (first, rest) = found.stages.split_first()?;
    let (last, middle) = rest.split_last()?;
    let layers = runs.iter().zip(middle).flat_map(|((_, count), stage)| {
        std::iter::repeat_n(seconds(stage) / *count as f64, *count)
    });
    Some(LayerCosts {
        layers: layers.collect(),
        first: seconds(first),
        last: seconds(last),
    })
}

fn common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common_divisor(b, a % b) }
}

/// Seconds that a step takes at least on this grid with layers of these prices.
pub(super) fn least_seconds(
    problem: &Problem<'_>,
    grid: Grid,
    key: &LayerKey,
    costs: &LayerCosts,
) -> f64 {
    let n_microbatches = (problem.workload.batch / (grid.dp * key.micro_batch)).max(1);
    n_microbatches as f64 * costs.least_of_slowest(grid.pp)
}

/// Bytes that the first and the last rank need at least: everything saved that may be saved.
pub(super) fn least_bytes(problem: &Problem<'_>, grid: Grid, key: &LayerKey) -> u64 {
    let space = problem.space;
    let mut mapping = grid.mapping(key);
    mapping.zero = most_divided(problem, grid);
    mapping.offload = Offload {
        optimizer: space.offload_optimizer.contains(&true),
        activations: space
            .offload_activations
            .iter()
            .copied()
            .fold(0.0, f64::max),
    };
    mapping.pipeline.chunks = (1..=super::space::MAX_CHUNKS)
        .find(|chunks| space.chunks.admits(*chunks))
        .unwrap_or(1);
    mapping.pipeline.layers = match &space.cuts {
        Cuts::Even => None,
        Cuts::Given(layers) => Some(layers.clone()),
        Cuts::Any => {
            // Cuts may take this many layers off a stage.
            let n_stages = mapping.n_stages();
            let fewest = (problem.workload.model.n_layers / n_stages).saturating_sub(SLACK);
            Some(vec![fewest; n_stages])
        }
    };
    let mut policies = vec![Recompute::None];
    if space.whole.iter().any(|whole| *whole != Whole::None) {
        policies.push(Recompute::Full);
    }
    let parts = &space.again | &space.maybe_again;
    if !parts.is_empty() {
        policies.push(Recompute::Modules(parts));
    }
    let mut least = u64::MAX;
    for schedule in &space.schedules {
        for recompute in &policies {
            let with = Mapping {
                recompute: recompute.clone(),
                pipeline: meshweave_dsl::mapping::Pipeline {
                    schedule: schedule.clone(),
                    ..mapping.pipeline.clone()
                },
                ..mapping.clone()
            };
            let needed = [0, grid.pp - 1].map(|rank| {
                memory(problem.workload, &with, problem.cluster, rank)
                    .total()
                    .0
            });
            least = least.min(needed[0].max(needed[1]));
        }
    }
    least
}

/// Layers by which the stages of a cut may differ from even ones.
pub(super) const SLACK: usize = 2;

/// The ZeRO stage and group that leave the least on a rank.
pub(super) fn most_divided(problem: &Problem<'_>, grid: Grid) -> Zero {
    let stage = problem.space.zero_stages.iter().copied().max().unwrap_or(0);
    let groups = groups(problem, grid, stage);
    let largest = groups
        .into_iter()
        .max_by_key(|group| group.unwrap_or(grid.dp));
    Zero {
        stage,
        group: largest.flatten(),
    }
}

/// The shard groups of a grid, distinct.
pub(super) fn groups(problem: &Problem<'_>, grid: Grid, stage: u8) -> Vec<Option<usize>> {
    if stage == 0 || grid.dp == 1 {
        return vec![None];
    }
    let mut found = Vec::new();
    for group in &problem.space.shard_groups {
        let ranks = match group {
            ShardGroup::All => None,
            ShardGroup::Node => {
                let inner = grid.tp * grid.cp;
                let ranks = problem.cluster.devices_per_node / inner;
                if ranks < 2 || ranks >= grid.dp || !grid.dp.is_multiple_of(ranks) {
                    continue;
                }
                Some(ranks)
            }
            ShardGroup::Ranks(ranks) if *ranks == grid.dp => None,
            ShardGroup::Ranks(ranks) if grid.dp.is_multiple_of(*ranks) => Some(*ranks),
            ShardGroup::Ranks(_) => continue,
        };
        if !found.contains(&ranks) {
            found.push(ranks);
        }
    }
    found
}
