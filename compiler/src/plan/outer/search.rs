//! Best-first branch and bound over the space of mappings.
//!
//! Enters: a problem. Leaves: the fastest mapping that fits, the runners-up, what was pruned, and the
//! least bound of everything that was not priced.
//! Invariant: a mapping is left out only when a bound on its time or on its memory says that it cannot
//! be the best, or is counted as not searched; equal prices are decided by the order of the space, so
//! the answer does not depend on the machine.
//!
//! The choices are made in four steps, each bounded by what the steps before it decide: the layers'
//! own (degrees, microbatch size, context), the pipeline's degree, its schedule with chunks and cuts,
//! ZeRO. With all of them the price without recomputation and offloading bounds everything with them.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Instant;

use meshweave_dsl::mapping::{Mapping, Module, Offload, Pipeline, Recompute, Zero};

use super::bound::{
    Layers, groups, least_bytes, least_seconds, least_seconds_of_cut, least_seconds_of_layers,
};
use super::grids::{Family, Grid, LayerKey, Objections, admits_microbatches, families, layer_keys};
use super::saving::savings;
use super::serving::first_token_s;
use super::space::{Cuts, MAX_CHUNKS, Space, Whole};
use super::stages::{balanced_in_memory, cuts_by_device};
use super::{Options, Problem};
use crate::plan::estimate::sites::{Sites, ranks_of};
use crate::plan::estimate::stages::Stages;
use crate::plan::estimate::{Estimate, Memories, Passes, Unpriced, family};
use crate::schedule::{Builtin, Shape};

/// A mapping with its price.
#[derive(Clone, Debug, PartialEq)]
pub struct Priced {
    pub mapping: Mapping,
    /// Sequences a step.
    pub batch: usize,
    pub estimate: Estimate,
}

impl Priced {
    /// Predicted seconds of a step, by sequence: what mappings of several batches are compared by.
    pub fn a_sequence_s(&self) -> f64 {
        self.estimate.step_s / self.batch as f64
    }
}

/// How much of the space was looked at, and how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counts {
    /// Complete mappings in the space; those that differ in which ranks compute whole layers again
    /// count as one.
    pub n_mappings: u64,
    /// Grids with the choices of their layers.
    pub n_nodes: u64,
    /// Partial mappings whose least memory exceeds the budget.
    pub n_too_large: u64,
    /// Partial mappings that were pruned by the bound of their time.
    pub n_too_slow: u64,
    /// Prices of layers, for bounds.
    pub n_layer_prices: u64,
    /// Mappings that were priced in full.
    pub n_priced: u64,
    /// Mappings whose memory alone was computed.
    pub n_weighed: u64,
    /// Mappings that have no price.
    pub n_unpriced: u64,
}

impl Counts {
    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            n_mappings: self.n_mappings + other.n_mappings,
            n_nodes: self.n_nodes + other.n_nodes,
            n_too_large: self.n_too_large + other.n_too_large,
            n_too_slow: self.n_too_slow + other.n_too_slow,
            n_layer_prices: self.n_layer_prices + other.n_layer_prices,
            n_priced: self.n_priced + other.n_priced,
            n_weighed: self.n_weighed + other.n_weighed,
            n_unpriced: self.n_unpriced + other.n_unpriced,
        }
    }
}

/// What a search found.
pub(super) struct Outcome {
    /// The fastest, then the best of other grids.
    pub best: Vec<Priced>,
    /// The best of every family of schedules that was priced.
    pub of_family: Vec<Priced>,
    pub lower_bound_s: f64,
    pub counts: Counts,
    /// Why grids were left out.
    pub objections: Objections,
    /// The mapping that needs least memory among those that were weighed and do not fit.
    pub closest: Option<(u64, Mapping)>,
    /// Why mappings had no price.
    pub unpriced: BTreeMap<String, u64>,
    pub is_out_of_time: bool,
    /// The fastest of those that take longer than the target.
    pub fastest_s: f64,
    /// The fastest first token of those that take longer than the target.
    pub fastest_first_s: f64,
}

/// What waits in the queue, with more and more decided.
enum Step {
    /// The family's number, and the choices of its layers.
    Layers(usize, LayerKey),
    Grid(Grid, LayerKey),
    Cut(Grid, LayerKey, Pipeline),
    /// A whole mapping with nothing saved, which does not fit or must save something.
    Point(Mapping),
}

struct Entry {
    bound_s: f64,
    order: u64,
    step: Box<Step>,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    /// The heap gives its greatest: the least bound, then the earliest.
    fn cmp(&self, other: &Self) -> Ordering {
        other
            .bound_s
            .total_cmp(&self.bound_s)
            .then(other.order.cmp(&self.order))
    }
}

/// Runs of the loop between two looks at the clock.
const N_STEPS_A_LOOK: u64 = 64;

pub(super) struct Search<'a> {
    problem: &'a Problem<'a>,
    options: &'a Options,
    n_ranks: usize,
    families: Vec<Family>,
    layers: &'a mut Layers,
    queue: BinaryHeap<Entry>,
    n_entries: u64,
    outcome: Outcome,
    /// The best of every grid.
    by_grid: BTreeMap<Grid, Priced>,
    /// The best of every family of schedules.
    by_family: BTreeMap<String, Priced>,
    best_s: f64,
    best: Option<Priced>,
}

/// Searches the mappings of exactly `n_ranks` ranks.
///
/// `layers` holds prices of layers, which other numbers of ranks share.
pub(super) fn search(
    problem: &Problem<'_>,
    options: &Options,
    n_ranks: usize,
    layers: &mut Layers,
) -> Outcome {
    let start = Instant::now();
    let (families, objections) = families(problem, n_ranks);
    let mut search = Search {
        problem,
        options,
        n_ranks,
        families,
        layers,
        queue: BinaryHeap::new(),
        n_entries: 0,
        outcome: Outcome {
            best: Vec::new(),
            of_family: Vec::new(),
            lower_bound_s: f64::INFINITY,
            counts: Counts::default(),
            objections,
            closest: None,
            unpriced: BTreeMap::new(),
            is_out_of_time: false,
            fastest_s: f64::INFINITY,
            fastest_first_s: f64::INFINITY,
        },
        by_grid: BTreeMap::new(),
        by_family: BTreeMap::new(),
        best_s: options.better_than_s.unwrap_or(f64::INFINITY),
        best: None,
    };
    let n_before = search.layers.len();
    for family_idx in 0..search.families.len() {
        search.add_family(family_idx);
    }
    search.outcome.counts.n_layer_prices = (search.layers.len() - n_before) as u64;
    if let Some(warm) = &options.warm_start
        && warm.n_ranks() == n_ranks
        && search.fits(warm, &Stages::new(problem.workload, warm))
    {
        search.offer(warm.clone());
    }
    search.run(start);
    search.finish()
}

impl Search<'_> {
    fn push(&mut self, bound_s: f64, step: Step) {
        if bound_s >= self.best_s {
            return self.prune(bound_s);
        }
        let order = self.n_entries;
        self.n_entries += 1;
        self.queue.push(Entry {
            bound_s,
            order,
            step: Box::new(step),
        });
    }

    /// What is pruned at once still bounds the rest.
    fn prune(&mut self, bound_s: f64) {
        let bound = &mut self.outcome.lower_bound_s;
        *bound = bound.min(bound_s);
        self.outcome.counts.n_too_slow += 1;
    }

    fn add_family(&mut self, family_idx: usize) {
        let family = self.families[family_idx].clone();
        let n_completions: u64 = family
            .grids
            .iter()
            .map(|grid| n_completions(self.problem, *grid))
            .sum();
        for key in layer_keys(self.problem, &family) {
            self.outcome.counts.n_nodes += 1;
            self.outcome.counts.n_mappings += n_completions;
            let costs = self.layers.costs(self.problem, key);
            let bound_s = least_seconds_of_layers(self.problem, self.n_ranks, &key, costs);
            self.push(bound_s, Step::Layers(family_idx, key));
        }
    }

    fn note_unfit(&mut self, bytes: u64, mapping: impl FnOnce() -> Mapping) {
        let is_closer = self
            .outcome
            .closest
            .as_ref()
            .is_none_or(|(least, _)| bytes < *least);
        if is_closer {
            self.outcome.closest = Some((bytes, mapping()));
        }
    }

    fn run(&mut self, start: Instant) {
        let mut n_steps: u64 = 0;
        while let Some(entry) = self.queue.pop() {
            // Nothing left can be better by more than the gap.
            if entry.bound_s >= self.best_s * (1.0 - self.options.gap) {
                let bound = &mut self.outcome.lower_bound_s;
                *bound = bound.min(entry.bound_s);
                self.outcome.counts.n_too_slow += 1 + self.queue.len() as u64;
                break;
            }
            n_steps += 1;
            if n_steps.is_multiple_of(N_STEPS_A_LOOK)
                && self.best_s.is_finite()
                && start.elapsed().as_secs_f64() > self.options.within_s
            {
                let bound = &mut self.outcome.lower_bound_s;
                *bound = bound.min(entry.bound_s);
                self.outcome.is_out_of_time = true;
                break;
            }
            let bound_s = entry.bound_s;
            match *entry.step {
                Step::Layers(family_idx, key) => self.lay_out(family_idx, &key, bound_s),
                Step::Grid(grid, key) => self.cut(grid, &key, bound_s),
                Step::Cut(grid, key, pipeline) => self.divide(grid, &key, &pipeline, bound_s),
                Step::Point(mapping) => self.complete(&mapping, bound_s),
            }
        }
    }

    /// The pipelines that layers of these choices can be laid out in.
    fn lay_out(&mut self, family_idx: usize, key: &LayerKey, bound_s: f64) {
        let family = self.families[family_idx].clone();
        for grid in family.grids {
            if !admits_microbatches(self.problem, grid, key.micro_batch) {
                continue;
            }
            if let Some(most_s) = self.problem.space.most_first_s
                && let Some(first_s) = first_token_s(self.problem, grid, key)
                && first_s > most_s
            {
                let fastest = &mut self.outcome.fastest_first_s;
                *fastest = fastest.min(first_s);
                self.outcome.counts.n_too_slow += 1;
                continue;
            }
            let least = least_bytes(self.problem, grid, key);
            self.outcome.counts.n_weighed += 1;
            if least > self.problem.space.budget_bytes {
                self.outcome.counts.n_too_large += 1;
                self.note_unfit(least, || grid.mapping(key));
                continue;
            }
            let costs = self.layers.costs(self.problem, *key);
            let least_s = least_seconds(self.problem, grid, key, costs);
            self.push(least_s.max(bound_s), Step::Grid(grid, *key));
        }
    }

    /// Schedules, chunks and cuts.
    fn cut(&mut self, grid: Grid, key: &LayerKey, bound_s: f64) {
        for pipeline in self.pipelines(grid, key) {
            let mapping = Mapping {
                pipeline,
                ..grid.mapping(key)
            };
            let costs = self.layers.costs(self.problem, *key);
            let least_s = least_seconds_of_cut(self.problem, &mapping, costs);
            let step = Step::Cut(grid, *key, mapping.pipeline);
            self.push(least_s.max(bound_s), step);
        }
    }

    /// ZeRO, with prices. What fits with nothing saved is offered at once: the sooner the best is good,
    /// the less is left to look at.
    fn divide(&mut self, grid: Grid, key: &LayerKey, pipeline: &Pipeline, bound_s: f64) {
        let problem = self.problem;
        let space = problem.space;
        let mut known: Option<Passes<'_>> = None;
        for stage in zero_stages(space, grid) {
            for group in groups(problem, grid, stage) {
                let mapping = Mapping {
                    zero: Zero { stage, group },
                    pipeline: pipeline.clone(),
                    recompute: required(&space.again),
                    ..grid.mapping(key)
                };
                if !known.as_ref().is_some_and(|known| known.hold_for(&mapping)) {
                    match Passes::new(problem.workload, &mapping, problem.cluster) {
                        Ok(passes) => known = Some(passes),
                        Err(error) => {
                            self.note_unpriced(&error);
                            continue;
                        }
                    }
                }
                if let Some(passes) = &known {
                    self.weigh(mapping, passes, bound_s);
                }
            }
        }
    }

    /// A mapping with nothing saved: offered, or kept for what is to be saved.
    fn weigh(&mut self, mapping: Mapping, passes: &Passes<'_>, bound_s: f64) {
        // A bound never falls on the way down.
        let floor_s = bound_s.max(passes.seconds());
        if floor_s >= self.best_s {
            return self.prune(floor_s);
        }
        let parts = match passes.parts(&mapping) {
            Ok(parts) => parts,
            Err(error) => return self.note_unpriced(&error),
        };
        let floor_s = floor_s.max(parts.total());
        if floor_s >= self.best_s {
            self.outcome.counts.n_priced += 1;
            return self.prune(floor_s);
        }
        let space = self.problem.space;
        let fits = self.fits_in(&mapping, &passes.memories(&mapping));
        if fits && space.may_save_nothing() {
            self.offer_with(mapping, passes, parts.total());
        } else {
            self.outcome.counts.n_priced += 1;
            self.push(floor_s, Step::Point(mapping));
        }
    }

    fn note_unpriced(&mut self, error: &Unpriced) {
        self.outcome.counts.n_unpriced += 1;
        *self.outcome.unpriced.entry(error.to_string()).or_insert(0) += 1;
    }

    /// Schedules, chunks and cuts of a node.
    fn pipelines(&mut self, grid: Grid, key: &LayerKey) -> Vec<Pipeline> {
        if grid.pp == 1 {
            return vec![Pipeline::default()];
        }
        families_to_price(self.problem.space)
            .into_iter()
            .flat_map(|family| pipelines_of(self.problem, self.layers, family, grid, key))
            .collect()
    }

    /// The best completion of a point that must save something: whatever fits first.
    ///
    /// `bound_s`: the point's own price.
    fn complete(&mut self, point: &Mapping, bound_s: f64) {
        let space = self.problem.space;
        let key = key_of(point);
        let stages = Stages::new(self.problem.workload, point);
        // Of the same mapping, the less leaves the faster it is: the least part that fits will do.
        let mut parts = space.offload_activations.clone();
        parts.sort_by(f64::total_cmp);
        for &optimizer in &space.offload_optimizer {
            let with = |activations: f64| Mapping {
                offload: Offload {
                    optimizer,
                    activations,
                },
                ..point.clone()
            };
            // Activations that leave and what is computed again only add to it.
            if optimizer && !self.may_be_best(&with(0.0)) {
                continue;
            }
            let least = with(parts.first().copied().unwrap_or(0.0));
            if let Some(cut) = self.cut_by_memory(&least, &key) {
                self.offer(cut);
            }
            for (at_least_s, recompute) in savings(self.problem, self.layers, &key, &least) {
                if at_least_s > 0.0 && bound_s + at_least_s >= self.best_s {
                    continue;
                }
                let is_of_some_layers =
                    matches!(recompute, Recompute::Layers(_) | Recompute::LayersByRank(_));
                // As many layers as fit are those that fit without it.
                let is_alone = is_of_some_layers && space.whole.contains(&Whole::First(None));
                for &activations in &parts[..if is_alone { 1 } else { parts.len() }] {
                    let mapping = Mapping {
                        recompute: recompute.clone(),
                        ..with(activations)
                    };
                    if self.fits(&mapping, &stages) {
                        self.offer(mapping);
                        break;
                    }
                }
            }
        }
    }

    /// Whether a mapping's price is below the best one's.
    fn may_be_best(&mut self, mapping: &Mapping) -> bool {
        let passes = Passes::new(self.problem.workload, mapping, self.problem.cluster);
        match passes.and_then(|passes| passes.parts(mapping)) {
            Ok(parts) => parts.total() < self.best_s,
            Err(error) => {
                self.note_unpriced(&error);
                false
            }
        }
    }

    /// The stages and the layers computed again that the budget admits, where both are open and a rank
    /// has one stage.
    fn cut_by_memory(&mut self, base: &Mapping, key: &LayerKey) -> Option<Mapping> {
        let space = self.problem.space;
        let is_open = base.pp > 1
            && base.pipeline.chunks == 1
            && family(base).n_copies() == 1
            && space.cuts == Cuts::Any
            && !self.problem.cluster.is_mixed()
            && space.whole.contains(&Whole::First(None))
            && space.again.is_empty()
            && base.offload.activations == 0.0;
        if !is_open {
            return None;
        }
        // Once a pipeline, not for each of its cuts; from the fastest one, whose price bounds it.
        if base.pipeline.layers != self.layers.balanced(self.problem, *key, base.pp) {
            return None;
        }
        balanced_in_memory(self.problem, self.layers.costs(self.problem, *key), base)
    }

    /// Whether a mapping of these stages fits its devices and their hosts.
    fn fits(&mut self, mapping: &Mapping, stages: &Stages) -> bool {
        self.outcome.counts.n_weighed += 1;
        let host = self.problem.cluster.device.host_memory_bytes;
        let memories = Memories::with_stages(self.problem.workload, mapping, Cow::Borrowed(stages));
        if host > 0 && (0..mapping.pp).any(|rank| memories.on_host(rank).0 > host) {
            return false;
        }
        self.fits_in(mapping, &memories)
    }

    /// Whether a mapping fits its devices; the closest of those that do not is remembered.
    fn fits_in(&mut self, mapping: &Mapping, memories: &Memories<'_>) -> bool {
        let budget_bytes = self.problem.space.budget_bytes;
        let closest = self.outcome.closest.as_ref();
        // What needs more than the closest one is of no interest.
        let enough = closest.map_or(u64::MAX, |(least, _)| (*least).max(budget_bytes + 1));
        let bytes = worst_of(self.problem, mapping, memories, enough);
        let fits = bytes <= budget_bytes;
        if !fits {
            self.note_unfit(bytes, || mapping.clone());
        }
        fits
    }

    fn offer(&mut self, mapping: Mapping) {
        let problem = self.problem;
        let passes = Passes::new(problem.workload, &mapping, problem.cluster);
        let priced = passes.and_then(|passes| {
            let parts = passes.parts(&mapping)?;
            Ok((passes, parts.total()))
        });
        match priced {
            Ok((passes, step_s)) => self.offer_with(mapping, &passes, step_s),
            Err(error) => self.note_unpriced(&error),
        }
    }

    fn offer_with(&mut self, mapping: Mapping, passes: &Passes<'_>, step_s: f64) {
        self.outcome.counts.n_priced += 1;
        let space = self.problem.space;
        if space.most_s.is_some_and(|most_s| step_s > most_s) {
            let closest = &mut self.outcome.fastest_s;
            *closest = closest.min(step_s);
            return;
        }
        // Preferences only weigh: a bound of the seconds is one of the weighed seconds too.
        let factors = space.preferences.iter().map(|one| one.factor(&mapping));
        let seconds = step_s * factors.product::<f64>();
        let is_faster =
            |known: Option<&Priced>| known.is_none_or(|known| seconds < known.estimate.step_s);
        let grid = grid_of(&mapping);
        let name = &mapping.pipeline.schedule;
        let of_grid = is_faster(self.by_grid.get(&grid));
        let of_family = mapping.pp > 1 && is_faster(self.by_family.get(name));
        let of_all = seconds < self.best_s;
        if !(of_grid || of_family || of_all) {
            return;
        }
        let priced = Priced {
            estimate: passes.estimate(&mapping),
            mapping,
            batch: self.problem.workload.batch,
        };
        if of_family {
            let name = priced.mapping.pipeline.schedule.clone();
            self.by_family.insert(name, priced.clone());
        }
        if of_grid {
            self.by_grid.insert(grid, priced.clone());
        }
        if of_all {
            self.best_s = seconds;
            self.best = Some(priced);
        }
    }

    fn finish(mut self) -> Outcome {
        let Some(best) = self.best.take() else {
            return self.outcome;
        };
        let own = grid_of(&best.mapping);
        let mut others: Vec<Priced> = self
            .by_grid
            .into_iter()
            .filter(|(grid, _)| *grid != own)
            .map(|(_, priced)| priced)
            .collect();
        others.sort_by(|a, b| a.estimate.step_s.total_cmp(&b.estimate.step_s));
        others.truncate(N_RUNNERS_UP);
        self.outcome.lower_bound_s = self.outcome.lower_bound_s.min(best.estimate.step_s);
        self.outcome.best.push(best);
        self.outcome.best.extend(others);
        self.outcome.of_family = self.by_family.into_values().collect();
        self.outcome
    }
}

/// Other grids that are remembered.
pub(super) const N_RUNNERS_UP: usize = 16;

/// The ZeRO stages of a grid: none without ranks to divide among.
pub(super) fn zero_stages(space: &Space, grid: Grid) -> Vec<u8> {
    match grid.dp * grid.cp {
        1 => vec![0],
        _ => space.zero_stages.clone(),
    }
}

/// The recomputation that is asked for, and nothing else.
pub(super) fn required(again: &std::collections::BTreeSet<Module>) -> Recompute {
    if again.is_empty() {
        Recompute::None
    } else {
        Recompute::Modules(again.clone())
    }
}

/// Bytes that a pipeline rank may use of its devices.
pub(super) fn budget_of_rank(problem: &Problem<'_>, mapping: &Mapping, rank: usize) -> u64 {
    if !problem.cluster.is_mixed() {
        return problem.space.budget_bytes;
    }
    let site = problem.cluster.site(ranks_of(mapping, rank));
    problem.space.budget_of(&site, problem.cluster)
}

/// Bytes of the rank that needs most. Where devices differ, what a rank's devices have less than the
/// budget counts as used.
pub(super) fn worst_bytes(problem: &Problem<'_>, mapping: &Mapping) -> u64 {
    let memories = Memories::new(problem.workload, mapping);
    worst_of(problem, mapping, &memories, u64::MAX)
}

/// The same, or those of the first rank that needs `enough`.
fn worst_of(problem: &Problem<'_>, mapping: &Mapping, memories: &Memories<'_>, enough: u64) -> u64 {
    let sites = problem
        .cluster
        .is_mixed()
        .then(|| Sites::new(problem.cluster, mapping));
    let mut worst = 0;
    for rank in 0..mapping.pp {
        let own = memories.of(rank, problem.cluster);
        let missing = sites.as_ref().map_or(0, |sites| {
            let space = problem.space;
            space.budget_bytes - space.budget_of(sites.of(rank), problem.cluster)
        });
        worst = worst.max(own.total().0.saturating_add(missing));
        if worst >= enough {
            break;
        }
    }
    worst
}

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

/// The families that are worth a price: with 1F1B among them GPipe takes as long and holds more, and so
/// does looped BFS beside interleaving (their formulas are equal).
fn families_to_price(space: &Space) -> Vec<Builtin> {
    let all: Vec<Builtin> = space
        .schedules
        .iter()
        .filter_map(|name| Builtin::find(name))
        .collect();
    let has = |family: Builtin| all.contains(&family);
    let is_beaten = |family: &Builtin| match family {
        Builtin::GPipe => has(Builtin::OneFOneB),
        Builtin::LoopedBfs => has(Builtin::Interleaved),
        _ => false,
    };
    all.iter()
        .filter(|family| !is_beaten(family))
        .copied()
        .collect()
}

/// The numbers of chunks a rank that a family of schedules takes; none where it has no schedule for so
/// many microbatches.
///
/// Interleaving runs microbatches in rounds of `pp` (Narayanan et al. 2021, §2.2.2), so their number
/// must be a multiple of it.
pub(super) fn chunk_counts(
    family: Builtin,
    pp: usize,
    n_layers: usize,
    n_microbatches: usize,
) -> Vec<usize> {
    let most = (n_layers / pp).min(MAX_CHUNKS);
    match family.fixed_chunks() {
        None if n_microbatches.is_multiple_of(pp) => (2..=most).collect(),
        None => Vec::new(),
        Some(chunks) => {
            let shape = Shape::new(pp, n_microbatches).chunks(chunks);
            let is_defined = chunks <= most && family.fits(&shape).is_ok();
            Vec::from_iter(is_defined.then_some(chunks))
        }
    }
}

/// The pipelines of a family, in all numbers of chunks and cuts of the space.
pub(super) fn pipelines_of(
    problem: &Problem<'_>,
    layers: &mut Layers,
    family: Builtin,
    grid: Grid,
    key: &LayerKey,
) -> Vec<Pipeline> {
    let n_layers = problem.workload.model.n_layers;
    let n_microbatches = problem.workload.batch / (grid.dp * key.micro_batch);
    let mut found = Vec::new();
    for chunks in chunk_counts(family, grid.pp, n_layers, n_microbatches) {
        if !problem.space.chunks.admits(chunks) {
            continue;
        }
        let n_stages = grid.pp * chunks;
        let with = |layers| Pipeline {
            schedule: family.name().into(),
            chunks,
            layers,
        };
        match &problem.space.cuts {
            Cuts::Given(layers) if layers.len() == n_stages => {
                found.push(with(Some(layers.clone())));
            }
            Cuts::Given(_) => {}
            Cuts::Even => found.push(with(None)),
            Cuts::Any => {
                found.push(with(None));
                let cuts = match problem.cluster.is_mixed() {
                    true => {
                        let costs = layers.costs(problem, *key);
                        cuts_by_device(problem, grid, key, &with(None), costs)
                    }
                    false => Vec::from_iter(layers.balanced(problem, *key, n_stages)),
                };
                found.extend(cuts.into_iter().map(|layers| with(Some(layers))));
            }
        }
    }
    found
}

/// Complete mappings of a node, counted.
fn n_completions(problem: &Problem<'_>, grid: Grid) -> u64 {
    let space = problem.space;
    let n_layers = problem.workload.model.n_layers;
    let n_pipelines: usize = if grid.pp == 1 {
        1
    } else {
        let n_cuts = if space.cuts == Cuts::Any { 2 } else { 1 };
        // As many microbatches as every family has a schedule for.
        let of = |family: Builtin| chunk_counts(family, grid.pp, n_layers, 2 * grid.pp).len();
        let families = space.schedules.iter();
        let families = families.filter_map(|name| Builtin::find(name));
        families.map(of).sum::<usize>() * n_cuts
    };
    let n_zero: usize = zero_stages(space, grid)
        .iter()
        .map(|stage| groups(problem, grid, *stage).len())
        .sum();
    let n_parts = 1usize << space.maybe_again.len();
    let n_whole = if space.whole.len() > 1 {
        n_layers.div_ceil(grid.pp)
    } else {
        0
    };
    let n_offload = space.offload_optimizer.len() * space.offload_activations.len();
    (n_pipelines * n_zero * (n_parts + n_whole) * n_offload) as u64
}
