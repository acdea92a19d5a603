//! One entry of the search's queue, expanded.
//!
//! Enters: an entry, and what was found before. Leaves: the entries below it, each with its bound, the
//! mappings that are priced and fit, and what was seen on the way.
//! Invariant: nothing but the prices of layers is shared with other expansions, and those are the same
//! whoever asks first: what an entry yields depends on nothing else.
//!
//! The choices are made in four steps, each bounded by what the steps before it decide: the layers'
//! own (degrees, microbatch size, context), the pipeline's degree, its schedule with chunks and cuts,
//! ZeRO. With all of them the price without recomputation and offloading bounds everything with them.

use std::borrow::Cow;
use std::sync::Arc;

use meshweave_dsl::mapping::{Mapping, Module, Offload, Pipeline, Recompute, Zero};

use super::Problem;
use super::bound::{Layers, groups, least_bytes, least_seconds, least_seconds_of_cut};
use super::grids::{Grid, LayerKey, admits_microbatches, key_of};
use super::saving::savings;
use super::search::{Incumbents, Priced, Seen};
use super::serving::first_token_s;
use super::space::{Cuts, MAX_CHUNKS, Space, Whole};
use super::stages::{balanced_in_memory, cuts_by_device};
use crate::plan::estimate::sites::{Sites, ranks_of};
use crate::plan::estimate::stages::Stages;
use crate::plan::estimate::{Memories, Passes, Unpriced, family};
use crate::schedule::{Builtin, Shape};

/// What waits in the queue, with more and more decided.
pub(super) enum Step {
    /// The grids of a family, and the choices of their layers.
    Layers(Arc<[Grid]>, LayerKey),
    Grid(Grid, LayerKey),
    Cut(Grid, LayerKey, Pipeline),
    /// A whole mapping with nothing saved, which does not fit or must save something.
    Point(Mapping),
}

/// What an entry yields.
#[derive(Default)]
pub(super) struct Yield {
    /// Below it, each with its bound in seconds.
    pub steps: Vec<(f64, Step)>,
    /// Mappings that may be kept, with their seconds weighed by the user's preferences.
    pub priced: Vec<(f64, Priced)>,
    pub seen: Seen,
}

pub(super) struct Expansion<'a> {
    problem: &'a Problem<'a>,
    layers: &'a Layers,
    known: &'a Incumbents,
    /// The least weighed seconds, what was found here included.
    best_s: f64,
    /// The least weighed seconds of what was found here, all of one grid and one family of schedules.
    own_s: f64,
    found: Yield,
}

impl<'a> Expansion<'a> {
    pub fn new(problem: &'a Problem<'a>, layers: &'a Layers, known: &'a Incumbents) -> Self {
        Self {
            problem,
            layers,
            known,
            best_s: known.best_s,
            own_s: f64::INFINITY,
            found: Yield::default(),
        }
    }

    /// What an entry of this bound yields.
    pub fn of(mut self, step: &Step, bound_s: f64) -> Yield {
        match step {
            Step::Layers(grids, key) => self.lay_out(grids, key, bound_s),
            Step::Grid(grid, key) => self.cut(*grid, key, bound_s),
            Step::Cut(grid, key, pipeline) => self.divide(*grid, key, pipeline, bound_s),
            Step::Point(mapping) => self.complete(mapping, bound_s),
        }
        self.found
    }

    /// What a mapping to begin with yields.
    pub fn of_warm_start(mut self, mapping: &Mapping) -> Yield {
        if self.fits(mapping, &Stages::new(self.problem.workload, mapping)) {
            self.offer(mapping.clone());
        }
        self.found
    }

    fn push(&mut self, bound_s: f64, step: Step) {
        if bound_s >= self.best_s {
            return self.found.seen.prune(bound_s);
        }
        self.found.steps.push((bound_s, step));
    }

    /// The pipelines that layers of these choices can be laid out in.
    fn lay_out(&mut self, grids: &[Grid], key: &LayerKey, bound_s: f64) {
        for &grid in grids {
            if !admits_microbatches(self.problem, grid, key.micro_batch) {
                continue;
            }
            if let Some(most_s) = self.problem.space.most_first_s
                && let Some(first_s) = first_token_s(self.problem, grid, key)
                && first_s > most_s
            {
                let fastest = &mut self.found.seen.fastest_first_s;
                *fastest = fastest.min(first_s);
                self.found.seen.counts.n_too_slow += 1;
                continue;
            }
            let least = least_bytes(self.problem, grid, key);
            self.found.seen.counts.n_weighed += 1;
            if least > self.problem.space.budget_bytes {
                self.found.seen.counts.n_too_large += 1;
                self.found.seen.note_unfit(least, || grid.mapping(key));
                continue;
            }
            let costs = self.layers.costs(self.problem, *key);
            let least_s = least_seconds(self.problem, grid, key, &costs);
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
            let least_s = least_seconds_of_cut(self.problem, &mapping, &costs);
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
            return self.found.seen.prune(floor_s);
        }
        let parts = match passes.parts(&mapping) {
            Ok(parts) => parts,
            Err(error) => return self.note_unpriced(&error),
        };
        let floor_s = floor_s.max(parts.total());
        if floor_s >= self.best_s {
            self.found.seen.counts.n_priced += 1;
            return self.found.seen.prune(floor_s);
        }
        let space = self.problem.space;
        let fits = self.fits_in(&mapping, &passes.memories(&mapping));
        if fits && space.may_save_nothing() {
            self.offer_with(mapping, passes, parts.total());
        } else {
            self.found.seen.counts.n_priced += 1;
            self.push(floor_s, Step::Point(mapping));
        }
    }

    fn note_unpriced(&mut self, error: &Unpriced) {
        self.found.seen.counts.n_unpriced += 1;
        *self
            .found
            .seen
            .unpriced
            .entry(error.to_string())
            .or_insert(0) += 1;
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
        if base.pipeline.layers != *self.layers.balanced(self.problem, *key, base.pp) {
            return None;
        }
        balanced_in_memory(self.problem, &self.layers.costs(self.problem, *key), base)
    }

    /// Whether a mapping of these stages fits its devices and their hosts.
    fn fits(&mut self, mapping: &Mapping, stages: &Stages) -> bool {
        self.found.seen.counts.n_weighed += 1;
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
        // What needs more than the closest one is of no interest.
        let own = self.found.seen.closest.as_ref();
        let closest = own.map_or(u64::MAX, |(bytes, _)| *bytes);
        let enough = closest.min(self.known.closest_bytes).max(budget_bytes + 1);
        let bytes = worst_of(self.problem, mapping, memories, enough);
        let fits = bytes <= budget_bytes;
        if !fits {
            self.found.seen.note_unfit(bytes, || mapping.clone());
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
        self.found.seen.counts.n_priced += 1;
        let space = self.problem.space;
        if space.most_s.is_some_and(|most_s| step_s > most_s) {
            let closest = &mut self.found.seen.fastest_s;
            *closest = closest.min(step_s);
            return;
        }
        // Preferences only weigh: a bound of the seconds is one of the weighed seconds too.
        let factors = space.preferences.iter().map(|one| one.factor(&mapping));
        let seconds = step_s * factors.product::<f64>();
        if seconds >= self.own_s || !self.known.would_keep(&mapping, seconds) {
            return;
        }
        self.own_s = seconds;
        self.best_s = self.best_s.min(seconds);
        let priced = Priced {
            estimate: passes.estimate(&mapping),
            mapping,
            batch: self.problem.workload.batch,
        };
        self.found.priced.push((seconds, priced));
    }
}

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
    layers: &Layers,
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
                        cuts_by_device(problem, grid, key, &with(None), &costs)
                    }
                    false => {
                        Vec::from_iter(layers.balanced(problem, *key, n_stages).as_ref().clone())
                    }
                };
                found.extend(cuts.into_iter().map(|layers| with(Some(layers))));
            }
        }
    }
    found
}

/// Complete mappings of a node, counted.
pub(super) fn n_completions(problem: &Problem<'_>, grid: Grid) -> u64 {
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
