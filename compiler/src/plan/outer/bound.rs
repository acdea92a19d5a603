//! Bounds: what no completion of a partial choice can beat.
//!
//! Enters: a grid and the choices of its layers. Leaves: a time and a memory that every mapping with
//! them needs at least.
//! Invariant: a bound never exceeds what [`estimate`] or [`memory`] says of any mapping that completes
//! the choice, nor what a simulation of its schedule does. It is made of the same prices: the layers'
//! own time, evenly spread over the pipeline, with no bubble but the fill, no exposed gradient
//! reduction, no optimizer, nothing computed again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::mapping::{Mapping, Module, Offload, Pipeline, Recompute, Zero};

use super::Problem;
use super::expand::{chunk_counts, zero_stages};
use super::grids::{Grid, LayerKey};
use super::saving::front;
use super::space::{Cuts, ShardGroup, Space, Whole};
use super::stages::balanced;
use crate::plan::estimate::layer::{LayerCost, Pricer};
use crate::plan::estimate::sites::ranks_of;
use crate::plan::estimate::stages::Stages;
use crate::plan::estimate::{Job, Workload, family, memory, pair_slowdown};
use crate::schedule::Builtin;

/// Seconds of a microbatch of a rank without a pipeline: by layer, and at both ends.
///
/// Where groups of devices differ, those of the fastest group, layer by layer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct LayerCosts {
    /// Of each layer: forward, and for training backward.
    pub layers: Vec<f64>,
    /// Of computing each layer again, whole.
    pub again: Vec<f64>,
    /// The same, at best, where forwards run beside backwards.
    pub paired: Vec<f64>,
    /// The forward alone.
    pub forwards: Vec<f64>,
    /// Before the first layer, and of it the forward.
    pub first: f64,
    pub first_forward: f64,
    /// Behind the last one, and at best beside another microbatch.
    pub last: f64,
    pub last_paired: f64,
    /// The costs of every group of devices; none where there is one group.
    pub of_groups: Vec<LayerCosts>,
    /// By how much all devices together are slower than as many of the fastest; at least 1.
    pub drag: f64,
}

impl LayerCosts {
    /// The costs where so many devices are of each group.
    ///
    /// A device that takes at least ρ times as long as the fastest for every layer does at most 1/ρ of
    /// its work in the same time, so n devices of each do no more than Σ n/ρ of the fastest.
    fn of_all(groups: Vec<Self>, n_devices: &[usize]) -> Self {
        let used: Vec<(&Self, f64)> = groups
            .iter()
            .zip(n_devices)
            .filter(|(_, count)| **count > 0)
            .map(|(costs, count)| (costs, *count as f64))
            .collect();
        let least = |of: &dyn Fn(&Self) -> f64| {
            let all = used.iter().map(|(costs, _)| of(costs));
            all.fold(f64::INFINITY, f64::min)
        };
        let least_of = |of: fn(&Self) -> &[f64]| -> Vec<f64> {
            let n_layers = groups.first().map_or(0, |costs| of(costs).len());
            (0..n_layers)
                .map(|layer| least(&|costs| of(costs)[layer]))
                .collect()
        };
        let mut all = Self {
            layers: least_of(|costs| &costs.layers),
            again: least_of(|costs| &costs.again),
            paired: least_of(|costs| &costs.paired),
            forwards: least_of(|costs| &costs.forwards),
            first: least(&|costs| costs.first),
            first_forward: least(&|costs| costs.first_forward),
            last: least(&|costs| costs.last),
            last_paired: least(&|costs| costs.last_paired),
            of_groups: Vec::new(),
            drag: 1.0,
        };
        let slowness = |costs: &Self| {
            let ends = [
                (costs.first, all.first),
                (costs.last, all.last),
                (costs.last_paired, all.last_paired),
            ];
            let own = costs.layers.iter().chain(&costs.paired).copied();
            own.zip(all.layers.iter().chain(&all.paired).copied())
                .chain(ends)
                .filter(|(_, least)| *least > 0.0)
                .map(|(own, least)| own / least)
                .fold(f64::INFINITY, f64::min)
                .max(1.0)
        };
        let n_all: f64 = used.iter().map(|(_, count)| count).sum();
        let worth: f64 = used
            .iter()
            .map(|(costs, count)| count / slowness(costs))
            .sum();
        if worth > 0.0 {
            all.drag = (n_all / worth).max(1.0);
        }
        all.of_groups = groups;
        all
    }

    /// The costs of a group.
    pub fn of_group(&self, group: usize) -> &Self {
        self.of_groups.get(group).unwrap_or(self)
    }

    /// The whole model.
    pub fn total(&self) -> f64 {
        self.layers.iter().sum::<f64>() + self.first + self.last
    }

    /// The whole model, at best beside another microbatch.
    fn total_paired(&self) -> f64 {
        self.paired.iter().sum::<f64>() + self.first + self.last_paired
    }

    /// Of each layer and behind the last one, as a family of schedules runs them.
    fn of(&self, family: Builtin) -> (&[f64], f64) {
        if family.has_pairs() {
            (&self.paired, self.last_paired)
        } else {
            (&self.layers, self.last)
        }
    }

    /// The least that the slowest of `pp` pipeline ranks takes, however the layers are cut: its fair
    /// share, or as many of the cheapest layers as some rank must hold. With two copies of the model a
    /// rank has half of the microbatches in each of two stages.
    fn least_of_slowest(&self, pp: usize, family: Builtin) -> f64 {
        let (layers, last) = self.of(family);
        let cheapest = layers.iter().copied().fold(f64::INFINITY, f64::min);
        let n_copies = family.n_copies();
        let most = (n_copies * layers.len()).div_ceil(pp.max(1)) as f64 / n_copies as f64;
        let total = layers.iter().sum::<f64>() + self.first + last;
        (total / pp as f64 * self.drag)
            .max(most * cheapest)
            .max(last / n_copies as f64)
    }
}

/// What was computed before, for all threads.
struct Memo<K, V>(Mutex<BTreeMap<K, Arc<V>>>);

impl<K, V> Default for Memo<K, V> {
    fn default() -> Self {
        Self(Mutex::new(BTreeMap::new()))
    }
}

impl<K: Ord, V> Memo<K, V> {
    fn known(&self) -> MutexGuard<'_, BTreeMap<K, Arc<V>>> {
        // Whoever panics here has not yet changed anything.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Two threads that ask at once may both compute it, and get the same.
    fn get(&self, key: K, compute: impl FnOnce() -> V) -> Arc<V> {
        if let Some(known) = self.known().get(&key) {
            return Arc::clone(known);
        }
        let value = Arc::new(compute());
        Arc::clone(self.known().entry(key).or_insert(value))
    }
}

/// Sets of parts of a layer, each with seconds.
pub(super) type ModuleSets = Vec<(f64, BTreeSet<Module>)>;

/// Layer prices that were asked for before.
#[derive(Default)]
pub(super) struct Layers {
    costs: Memo<LayerKey, LayerCosts>,
    module_sets: Memo<LayerKey, ModuleSets>,
    cuts: Memo<(LayerKey, usize), Option<Vec<usize>>>,
}

impl Layers {
    /// The layers' prices.
    pub fn costs(&self, problem: &Problem<'_>, key: LayerKey) -> Arc<LayerCosts> {
        self.costs.get(key, || probe(problem, &key))
    }

    /// The worthwhile sets of parts to compute again, with the seconds that each takes more over all
    /// layers of a microbatch.
    pub fn module_sets(&self, problem: &Problem<'_>, key: &LayerKey) -> Arc<ModuleSets> {
        self.module_sets.get(*key, || {
            let space = problem.space;
            let worth: Vec<(Module, f64, f64)> = space
                .maybe_again
                .iter()
                .map(|module| worth_of(problem, key, *module))
                .collect();
            front(&space.again, &worth)
        })
    }

    /// The layers of each of so many stages, where that is faster than as many in each; see [`balanced`].
    pub fn balanced(
        &self,
        problem: &Problem<'_>,
        key: LayerKey,
        n_stages: usize,
    ) -> Arc<Option<Vec<usize>>> {
        let compute = || balanced(&self.costs(problem, key), n_stages);
        self.cuts.get((key, n_stages), compute)
    }

    /// How many were asked for.
    pub fn len(&self) -> usize {
        self.costs.known().len()
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
    let first = flat(problem.cluster);
    let pricer = Pricer::new(workload, &again, &first);
    let (firsts, kinds) = kinds(workload);
    let of_kind: Vec<f64> = firsts
        .iter()
        .map(|layer| pricer.layer(*layer).recompute.seconds())
        .collect();
    let seconds = kinds.iter().map(|kind| of_kind[*kind]).sum();
    let bytes = |mapping: &Mapping| memory(workload, mapping, problem.cluster, 0).activations.0;
    (module, seconds, bytes(&kept) as f64 - bytes(&again) as f64)
}

/// The group of devices of every pipeline rank: the slowest one that it touches.
pub(super) fn groups_of_ranks(problem: &Problem<'_>, mapping: &Mapping) -> Vec<usize> {
    let cluster = problem.cluster;
    if !cluster.is_mixed() {
        return vec![0; mapping.pp];
    }
    (0..mapping.pp)
        .map(|rank| cluster.slowest_group(&cluster.nodes_of(ranks_of(mapping, rank))))
        .collect()
}

/// Prices the layers of the smallest mapping that has them, on like nodes on one switch.
fn probe(problem: &Problem<'_>, key: &LayerKey) -> LayerCosts {
    let cluster = problem.cluster;
    if cluster.is_flat() {
        return probe_on(problem, cluster, key);
    }
    let groups: Vec<LayerCosts> = cluster
        .groups()
        .map(|group| probe_on(problem, &flat(group), key))
        .collect();
    let mut n_devices = vec![0; groups.len()];
    for node in cluster.placed_nodes() {
        n_devices[cluster.node_id(node).group] += cluster.devices_of(node);
    }
    LayerCosts::of_all(groups, &n_devices)
}

/// A group of nodes as if all were on one switch with links at full speed.
fn flat(group: &Cluster) -> Cluster {
    Cluster {
        levels: Vec::new(),
        slow: Vec::new(),
        others: Vec::new(),
        between_groups: None,
        order: Vec::new(),
        ..group.clone()
    }
}

fn probe_on(problem: &Problem<'_>, cluster: &Cluster, key: &LayerKey) -> LayerCosts {
    let workload = problem.workload;
    let mapping = smallest(key);
    let pricer = Pricer::new(workload, &mapping, cluster);
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
    let pricer_of_whole = Pricer::new(workload, &whole, cluster);
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
    // In a pair the exchange may be hidden whole, for the units that it takes; where that gains nothing
    // the passes run one after the other.
    let slowdown = pair_slowdown(cluster);
    let in_pairs = Mapping {
        pipeline: Pipeline {
            schedule: Builtin::DualPipe.name().into(),
            ..Pipeline::default()
        },
        ..mapping.clone()
    };
    let pricer_of_pairs = Pricer::new(workload, &in_pairs, cluster);
    let paired = |layer: usize| {
        let cost = pricer_of_pairs.layer(layer);
        let least = |pass: f64, exchange_s: f64| pass.min((pass - exchange_s) * slowdown);
        let backward_s = cost.backward_input.seconds() + cost.backward_weight.seconds();
        let exchange_s = cost.backward_input.ep + cost.backward_weight.ep;
        least(cost.forward.seconds(), cost.forward.ep) + least(backward_s, exchange_s)
    };
    let is_paired = is_training && workload.model.moe.is_some();
    let paired_of_kind: Vec<f64> = match is_paired {
        true => firsts.iter().map(|layer| paired(*layer)).collect(),
        false => of_kind.clone(),
    };
    let predictions_paired: f64 = match is_paired {
        true => (0..workload.prediction_layers)
            .map(|ahead| paired(workload.model.n_layers + ahead) + head)
            .sum(),
        false => predictions,
    };
    let forward_of_kind: Vec<f64> = firsts
        .iter()
        .map(|layer| pricer.layer(*layer).forward.seconds())
        .collect();
    let of_layers = |of_kind: &[f64]| kinds.iter().map(|kind| of_kind[*kind]).collect();
    LayerCosts {
        again: of_layers(&again),
        layers: of_layers(&of_kind),
        paired: of_layers(&paired_of_kind),
        forwards: of_layers(&forward_of_kind),
        first: seconds(pricer.embedding()),
        first_forward: pricer.embedding().forward.seconds(),
        last: head + predictions,
        last_paired: head + predictions_paired,
        of_groups: Vec::new(),
        drag: 1.0,
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
    let total_s = match families(problem.space).any(Builtin::has_pairs) {
        true => costs.total().min(costs.total_paired()),
        false => costs.total(),
    };
    share * total_s * costs.drag
}

/// The families of a space.
fn families(space: &Space) -> impl Iterator<Item = Builtin> {
    space
        .schedules
        .iter()
        .filter_map(|name| Builtin::find(name))
}

/// The families of a space that have schedules for a grid with so many microbatches.
fn families_of(
    problem: &Problem<'_>,
    grid: Grid,
    n_microbatches: usize,
) -> impl Iterator<Item = Builtin> {
    let n_layers = problem.workload.model.n_layers;
    families(problem.space).filter(move |family| {
        let chunks = chunk_counts(*family, grid.pp, n_layers, n_microbatches);
        let mut chunks = chunks.into_iter();
        chunks.any(|chunks| problem.space.chunks.admits(chunks))
    })
}

/// Seconds that a step takes at least on this grid: the slowest rank works all the time, in whatever
/// order; how long it waits depends on the family, and there is one that hardly waits.
pub(super) fn least_seconds(
    problem: &Problem<'_>,
    grid: Grid,
    key: &LayerKey,
    costs: &LayerCosts,
) -> f64 {
    let n_microbatches = (problem.workload.batch / (grid.dp * key.micro_batch)).max(1);
    let pace_s = match grid.pp {
        1 => costs.total(),
        pp => families_of(problem, grid, n_microbatches)
            .map(|family| costs.least_of_slowest(pp, family))
            .fold(f64::INFINITY, f64::min),
    };
    if pace_s.is_finite() {
        of_slowest(problem, n_microbatches as f64 * pace_s, costs)
    } else {
        // No family has a schedule: nothing will be found below.
        0.0
    }
}

/// What a step takes at least whose slowest rank is busy so long: when it generates tokens, a microbatch
/// passes all ranks before its next one.
fn of_slowest(problem: &Problem<'_>, busy_s: f64, costs: &LayerCosts) -> f64 {
    match problem.workload.job {
        Job::Decode { .. } => busy_s.max(costs.total()),
        Job::Train | Job::Prefill => busy_s,
    }
}

/// Seconds that a step takes at least with these cuts.
pub(super) fn least_seconds_of_cut(
    problem: &Problem<'_>,
    mapping: &Mapping,
    costs: &LayerCosts,
) -> f64 {
    let n_microbatches = mapping.n_microbatches(problem.workload.batch).max(1) as f64;
    if mapping.pp == 1 {
        return n_microbatches * costs.total();
    }
    let stages = Stages::new(problem.workload, mapping);
    let family = family(mapping);
    let groups = groups_of_ranks(problem, mapping);
    let mut busy = Vec::with_capacity(stages.all().len());
    // Before each stage: forwards, and where backwards are whole, the backwards after the last one.
    let mut fills = Vec::with_capacity(stages.all().len());
    let mut fill_s = 0.0;
    for (stage_idx, stage) in stages.all().iter().enumerate() {
        let costs = costs.of_group(groups[stages.rank_of(stage_idx)]);
        let (layers, last) = costs.of(family);
        let sum = |prices: &[f64]| prices[stage.layers.clone()].iter().sum::<f64>();
        let first = |price: f64| if stage.embeds { price } else { 0.0 };
        let behind = if stage.predicts { last } else { 0.0 };
        busy.push(sum(layers) + first(costs.first) + behind);
        fills.push(fill_s);
        fill_s += match family.splits_backward() {
            true => sum(&costs.forwards) + first(costs.first_forward),
            false => sum(&costs.layers) + first(costs.first),
        };
    }
    let is_round = matches!(problem.workload.job, Job::Decode { .. });
    let slowest_s = (0..mapping.pp)
        .map(|rank| {
            let busy_s: f64 = stages
                .on(rank)
                .map(|(stage, part)| part * busy[stage])
                .sum();
            let fill_s = if is_round {
                0.0
            } else {
                fills[stages.first_on(rank)]
            };
            n_microbatches * busy_s + fill_s
        })
        .fold(0.0, f64::max);
    of_slowest(problem, slowest_s, costs)
}

/// Bytes that the first and the last rank need at least with everything saved that may be, or the first
/// figure found that is within the budget.
pub(super) fn least_bytes(problem: &Problem<'_>, grid: Grid, key: &LayerKey) -> u64 {
    let mut least = u64::MAX;
    for bytes in bytes_with_savings(problem, grid, key) {
        least = least.min(bytes);
        if least <= problem.space.budget_bytes {
            break;
        }
    }
    least
}

/// Bytes that the first and the last rank need, by what is saved: one of them is the least that any
/// mapping of the grid needs.
pub(super) fn bytes_with_savings(
    problem: &Problem<'_>,
    grid: Grid,
    key: &LayerKey,
) -> impl Iterator<Item = u64> {
    let space = problem.space;
    let mapping = grid.mapping(key);
    let mut policies = Vec::with_capacity(2);
    if space.whole.iter().any(|whole| *whole != Whole::None) {
        policies.push(Recompute::Full);
    } else if !space.maybe_again.is_empty() {
        policies.push(Recompute::Modules(&space.again | &space.maybe_again));
    }
    policies.push(Recompute::None);
    savings(problem, grid, key).flat_map(move |(pipeline, zero, offload)| {
        let mut with = Mapping {
            zero,
            offload,
            pipeline,
            ..mapping.clone()
        };
        let mut needed = Vec::with_capacity(policies.len());
        for recompute in &policies {
            with.recompute = recompute.clone();
            let of_rank = |rank: usize| {
                let shifted = rank_with_fewest(problem, &with, rank);
                let own = memory(problem.workload, &shifted, problem.cluster, rank);
                own.total().0
            };
            needed.push(of_rank(0).max(of_rank(grid.pp - 1)));
        }
        needed
    })
}

/// The mapping with the layers that its cuts leave over on a stage that this rank does not run.
fn rank_with_fewest(problem: &Problem<'_>, mapping: &Mapping, rank: usize) -> Mapping {
    let mut shifted = mapping.clone();
    let (Cuts::Any, Some(layers)) = (&problem.space.cuts, &mut shifted.pipeline.layers) else {
        return shifted;
    };
    let stages = Stages::new(problem.workload, mapping);
    let held = layers.iter().sum::<usize>();
    let left = problem.workload.model.n_layers.saturating_sub(held);
    let is_own = |stage: usize| stages.on(rank).any(|(own, _)| own == stage);
    if let Some(stage) = (0..layers.len()).find(|stage| !is_own(*stage)) {
        layers[stage] += left;
    }
    shifted
}

/// The families of each placement, least memory first: none holds more microbatches than one after it,
/// and none of a placement has other stages.
const BY_MEMORY: [&[Builtin]; 3] = [
    &[
        Builtin::OneFOneB,
        Builtin::Interleaved,
        Builtin::ZbH1,
        Builtin::InterleavedZb,
        Builtin::ZbH2,
        Builtin::GPipe,
        Builtin::LoopedBfs,
    ],
    &[
        Builtin::VMin,
        Builtin::VHalf,
        Builtin::ZbV,
        Builtin::DualPipeV,
    ],
    &[Builtin::Chimera, Builtin::DualPipe],
];

/// Pipelines of which one needs no more memory than any of the space.
fn kinds_of_memory(problem: &Problem<'_>, grid: Grid, key: &LayerKey) -> Vec<Pipeline> {
    if grid.pp == 1 {
        return vec![Pipeline::default()];
    }
    let space = problem.space;
    let n_microbatches = (problem.workload.batch / (grid.dp * key.micro_batch)).max(1);
    let allowed: Vec<Builtin> = families_of(problem, grid, n_microbatches).collect();
    let mut found = Vec::new();
    for of_placement in BY_MEMORY {
        let Some(family) = of_placement.iter().find(|family| allowed.contains(family)) else {
            continue;
        };
        // With one chunk an interleaved pipeline is a plain one, and holds least.
        let (family, chunks) = match (family.fixed_chunks(), &space.cuts) {
            (Some(chunks), _) => (*family, chunks),
            (None, Cuts::Given(layers)) => (*family, (layers.len() / grid.pp).max(1)),
            (None, _) if *family == Builtin::Interleaved => (Builtin::OneFOneB, 1),
            (None, _) if *family == Builtin::InterleavedZb => (Builtin::ZbH1, 1),
            (None, _) => (Builtin::GPipe, 1),
        };
        let n_stages = grid.pp * chunks;
        let layers = match &space.cuts {
            Cuts::Even => None,
            Cuts::Given(layers) if layers.len() == n_stages => Some(layers.clone()),
            // Cuts may take this many layers off a stage.
            Cuts::Given(_) | Cuts::Any => {
                let even = problem.workload.model.n_layers / n_stages;
                let fewest = match problem.cluster.is_mixed() {
                    true => even.min(1),
                    false => even.saturating_sub(SLACK),
                };
                Some(vec![fewest; n_stages])
            }
        };
        // Of one placement all numbers of chunks count with the least.
        found.push(Pipeline {
            schedule: family.name().into(),
            chunks,
            layers,
        });
    }
    found
}

/// Layers by which the stages of a cut may differ from even ones.
pub(super) const SLACK: usize = 2;

/// What may hold least, likely first: dividing and offloading more take buffers of their own, which
/// small models feel more than what they save.
fn savings(
    problem: &Problem<'_>,
    grid: Grid,
    key: &LayerKey,
) -> impl Iterator<Item = (Pipeline, Zero, Offload)> {
    let space = problem.space;
    // Memory is linear in the part that leaves, but for the buffers that any part takes.
    let parts = || space.offload_activations.iter().copied();
    let (least, most) = (parts().fold(1.0, f64::min), parts().fold(0.0, f64::max));
    let mut activations = vec![most, least];
    activations.dedup();
    let mut divisions = Vec::new();
    for stage in zero_stages(space, grid).into_iter().rev() {
        let largest = groups(problem, grid, stage)
            .into_iter()
            .max_by_key(|group| group.unwrap_or(grid.dp));
        let group = largest.flatten();
        for &optimizer in space.offload_optimizer.iter().rev() {
            for &activations in &activations {
                let offload = Offload {
                    optimizer,
                    activations,
                };
                divisions.push((Zero { stage, group }, offload));
            }
        }
    }
    kinds_of_memory(problem, grid, key)
        .into_iter()
        .flat_map(move |pipeline| {
            let with = move |(zero, offload)| (pipeline.clone(), zero, offload);
            divisions.clone().into_iter().map(with)
        })
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
