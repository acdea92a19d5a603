//! Bounds: what no completion of a partial choice can beat.
//!
//! Enters: a grid and the choices of its layers. Leaves: a time and a memory that every mapping with
//! them needs at least.
//! Invariant: a bound never exceeds what [`estimate`] or [`memory`] says of any mapping that completes
//! the choice. It is made of the same prices: the layers' own time, evenly spread over the pipeline,
//! with no bubble, no exposed gradient reduction, no optimizer, nothing computed again.

use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::mapping::{Mapping, Module, Offload, Pipeline, Recompute, Zero};

use super::Problem;
use super::grids::{Grid, LayerKey};
use super::saving::front;
use super::search::{chunk_counts, zero_stages};
use super::space::{Cuts, ShardGroup, Whole};
use crate::plan::estimate::layer::{LayerCost, Pricer};
use crate::plan::estimate::stages::Stages;
use crate::plan::estimate::{Job, Workload, memory};

/// Seconds of a microbatch of a rank without a pipeline: by layer, and at both ends.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct LayerCosts {
    /// Of each layer: forward, and for training backward.
    pub layers: Vec<f64>,
    /// Of computing each layer again, whole.
    pub again: Vec<f64>,
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
    known: BTreeMap<LayerKey, LayerCosts>,
    module_sets: BTreeMap<LayerKey, Vec<(f64, BTreeSet<Module>)>>,
}

impl Layers {
    /// The layers' prices.
    pub fn costs(&mut self, problem: &Problem<'_>, key: LayerKey) -> &LayerCosts {
        self.known
            .entry(key)
            .or_insert_with(|| probe(problem, &key))
    }

    /// The worthwhile sets of parts to compute again, with the seconds that each takes more over all
    /// layers of a microbatch.
    pub fn module_sets(
        &mut self,
        problem: &Problem<'_>,
        key: &LayerKey,
    ) -> &[(f64, BTreeSet<Module>)] {
        self.module_sets.entry(*key).or_insert_with(|| {
            let space = problem.space;
            let worth: Vec<(Module, f64, f64)> = space
                .maybe_again
                .iter()
                .map(|module| worth_of(problem, key, *module))
                .collect();
            front(&space.again, &worth)
        })
    }

    /// How many were asked for.
    pub fn len(&self) -> usize {
        self.known.len()
    }
}

/// The kinds of layers there are, each by its first layer, and the kind of every layer.
fn kinds(workload: &Workload) -> (Vec<usize>, Vec<usize>) {
    let kind = |layer: usize| (workload.is_moe(layer), workload.window_of(layer).is_some());
    let mut firsts: Vec<usize> = Vec::new();
    let mut kinds = Vec::with_capacity(workload.model.n_layers);
    for layer in 0..workload.model.n_layers {
        let known = firsts.iter().position(|first| kind(*first) == kind(layer));
        kinds.push(known.unwrap_or(firsts.len()));
        if known.is_none() {
            firsts.push(layer);
        }
    }
    (firsts, kinds)
}

/// The smallest mapping that has these layers: their prices know nothing of the rest.
fn smallest(key: &LayerKey) -> Mapping {
    let (attention, experts) = (key.tp * key.cp, key.etp * key.ep);
    let grid = Grid {
        tp: key.tp,
        cp: key.cp,
        dp: experts / common_divisor(attention, experts),
        pp: 1,
        ep: key.ep,
        etp: key.etp,
    };
    grid.mapping(key)
}

/// What computing a part again takes and saves, over all layers of a microbatch.
fn worth_of(problem: &Problem<'_>, key: &LayerKey, module: Module) -> (Module, f64, f64) {
    let workload = problem.workload;
    let kept = smallest(key);
    let again = Mapping {
        recompute: Recompute::Modules([module].into()),
        ..kept.clone()
    };
    let pricer = Pricer::new(workload, &again, problem.cluster);
    let (firsts, kinds) = kinds(workload);
    let of_kind: Vec<f64> = firsts
        .iter()
        .map(|layer| pricer.layer(*layer).recompute.seconds())
        .collect();
    let seconds = kinds.iter().map(|kind| of_kind[*kind]).sum();
    let bytes = |mapping: &Mapping| memory(workload, mapping, problem.cluster, 0).activations.0;
    (module, seconds, bytes(&kept) as f64 - bytes(&again) as f64)
}

/// Prices the layers of the smallest mapping that has them.
fn probe(problem: &Problem<'_>, key: &LayerKey) -> LayerCosts {
    let workload = problem.workload;
    let mapping = smallest(key);
    let pricer = Pricer::new(workload, &mapping, problem.cluster);
    let is_training = workload.job == Job::Train;
    let seconds = |cost: LayerCost| {
        cost.forward.seconds()
            + if is_training {
                cost.backward_input.seconds() + cost.backward_weight.seconds()
            } else {
                0.0
            }
    };
    let (firsts, kinds) = kinds(workload);
    let of_kind: Vec<f64> = firsts
        .iter()
        .map(|layer| seconds(pricer.layer(*layer)))
        .collect();
    let whole = Mapping {
        recompute: Recompute::Full,
        ..mapping.clone()
    };
    let pricer_of_whole = Pricer::new(workload, &whole, problem.cluster);
    let again: Vec<f64> = match workload.job {
        Job::Train => firsts
            .iter()
            .map(|layer| pricer_of_whole.layer(*layer).recompute.seconds())
            .collect(),
        Job::Prefill | Job::Decode { .. } => vec![0.0; firsts.len()],
    };
    let head = seconds(pricer.head());
    let predictions: f64 = (0..workload.prediction_layers)
        .map(|ahead| seconds(pricer.layer(workload.model.n_layers + ahead)) + head)
        .sum();
    LayerCosts {
        layers: kinds.iter().map(|kind| of_kind[*kind]).collect(),
        again: kinds.iter().map(|kind| again[*kind]).collect(),
        first: seconds(pricer.embedding()),
        last: head + predictions,
    }
}

fn common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common_divisor(b, a % b) }
}

/// Seconds that a step takes at least with layers of these prices, on any grid of `n_ranks`: all ranks
/// work all the time.
pub(super) fn least_seconds_of_layers(
    problem: &Problem<'_>,
    n_ranks: usize,
    key: &LayerKey,
    costs: &LayerCosts,
) -> f64 {
    // Microbatches over pipeline ranks: batch / (dp · micro_batch · pp).
    let share = problem.workload.batch as f64 * (key.tp * key.cp) as f64
        / (n_ranks * key.micro_batch) as f64;
    share * costs.total()
}

/// Seconds that a step takes at least on this grid: the slowest rank works all the time, and waits for
/// the others' first and last microbatch.
pub(super) fn least_seconds(
    problem: &Problem<'_>,
    grid: Grid,
    key: &LayerKey,
    costs: &LayerCosts,
) -> f64 {
    let n_microbatches = (problem.workload.batch / (grid.dp * key.micro_batch)).max(1);
    let n_layers = problem.workload.model.n_layers;
    let schedules = problem.space.schedules.iter();
    let least_wait = schedules
        .flat_map(|schedule| {
            let chunks = chunk_counts(schedule, grid.pp, n_layers, n_microbatches);
            chunks
                .into_iter()
                .filter(|chunks| problem.space.chunks.admits(*chunks))
                .map(|chunks| wait_share(schedule, chunks))
        })
        .fold(1.0, f64::min);
    with_wait(
        problem,
        n_microbatches,
        costs.least_of_slowest(grid.pp),
        costs.total(),
        least_wait,
    )
}

/// What a pipeline takes whose slowest rank works `pace_s` a microbatch, and waits for this share of
/// the others' work; when it generates tokens, until a microbatch has passed all ranks.
fn with_wait(
    problem: &Problem<'_>,
    n_microbatches: usize,
    pace_s: f64,
    total_s: f64,
    share: f64,
) -> f64 {
    if let Job::Decode { .. } = problem.workload.job {
        return (n_microbatches as f64 * pace_s).max(total_s);
    }
    n_microbatches as f64 * pace_s + share * (total_s - pace_s).max(0.0)
}

/// The least part of the other ranks' work on a microbatch that a rank waits for.
///
/// Interleaving divides it by the chunks (Narayanan et al. 2021, §2.2.2); schedules that part the
/// backward pass may wait for less, down to nothing.
fn wait_share(schedule: &str, chunks: usize) -> f64 {
    match schedule {
        "1f1b" | "gpipe" | "interleaved" | "looped-bfs" => 1.0 / chunks as f64,
        _ => 0.0,
    }
}

/// Seconds that a step takes at least with these cuts.
pub(super) fn least_seconds_of_cut(
    problem: &Problem<'_>,
    mapping: &Mapping,
    costs: &LayerCosts,
) -> f64 {
    let stages = Stages::new(problem.workload, mapping);
    let of_rank = |rank: usize| {
        let chunks = 0..mapping.pipeline.chunks;
        let of_chunk = |chunk: usize| {
            let stage = stages.get(stages.stage_of(rank, chunk));
            let mut seconds: f64 = costs.layers[stage.layers.clone()].iter().sum();
            if stage.embeds {
                seconds += costs.first;
            }
            if stage.predicts {
                seconds += costs.last;
            }
            seconds
        };
        chunks.map(of_chunk).sum::<f64>()
    };
    let pace_s = (0..mapping.pp).map(of_rank).fold(0.0, f64::max);
    let share = match mapping.pp {
        1 => 0.0,
        _ => wait_share(&mapping.pipeline.schedule, mapping.pipeline.chunks),
    };
    let n_microbatches = mapping.n_microbatches(problem.workload.batch).max(1);
    with_wait(problem, n_microbatches, pace_s, costs.total(), share)
}

/// Bytes that the first and the last rank need at least: everything saved that may be saved.
pub(super) fn least_bytes(problem: &Problem<'_>, grid: Grid, key: &LayerKey) -> u64 {
    let space = problem.space;
    let mut mapping = grid.mapping(key);
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
    } else if !space.maybe_again.is_empty() {
        policies.push(Recompute::Modules(&space.again | &space.maybe_again));
    }
    let mut least = u64::MAX;
    for (schedule, zero, offload) in savings(problem, grid) {
        for recompute in &policies {
            let with = Mapping {
                zero,
                offload,
                recompute: recompute.clone(),
                pipeline: Pipeline {
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

/// Schedules that may differ in the memory they need with the fewest chunks.
fn kinds_of_memory(pp: usize, schedules: &[String]) -> Vec<String> {
    if pp == 1 {
        return vec![Pipeline::default().schedule];
    }
    let mut kinds: Vec<String> = Vec::new();
    for schedule in schedules {
        // With one chunk an interleaved pipeline is a plain one.
        let kind = match schedule.as_str() {
            "interleaved" => "1f1b",
            other => other,
        };
        if !kinds.iter().any(|known| known == kind) {
            kinds.push(kind.to_owned());
        }
    }
    kinds
}

/// Layers by which the stages of a cut may differ from even ones.
pub(super) const SLACK: usize = 2;

/// What may hold least: dividing and offloading more take buffers of their own, which small models
/// feel more than what they save.
fn savings(problem: &Problem<'_>, grid: Grid) -> Vec<(String, Zero, Offload)> {
    let space = problem.space;
    // Memory is linear in the part that leaves, but for the buffers that any part takes.
    let parts = || space.offload_activations.iter().copied();
    let (least, most) = (parts().fold(1.0, f64::min), parts().fold(0.0, f64::max));
    let mut found = Vec::new();
    for schedule in kinds_of_memory(grid.pp, &space.schedules) {
        for stage in zero_stages(space, grid) {
            let largest = groups(problem, grid, stage)
                .into_iter()
                .max_by_key(|group| group.unwrap_or(grid.dp));
            let group = largest.flatten();
            for &optimizer in &space.offload_optimizer {
                for activations in [least, most] {
                    let offload = Offload {
                        optimizer,
                        activations,
                    };
                    found.push((schedule.clone(), Zero { stage, group }, offload));
                    if least == most {
                        break;
                    }
                }
            }
        }
    }
    found
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
