//! Best-first branch and bound over the space of mappings.
//!
//! Enters: a problem. Leaves: the fastest mapping that fits, the runners-up, what was pruned, and the
//! least bound of everything that was not priced.
//! Invariant: a mapping is left out only when a bound on its time or on its memory says that it cannot
//! be the best, or is counted as not searched; equal prices are decided by the order of the space, so
//! the answer does not depend on the machine.
//!
//! A *node* is a grid with the choices of its layers, bounded by [`super::bound`]; a *point* is a node
//! with schedule, chunks, cuts and ZeRO, whose price without recomputation and offloading bounds
//! everything with them.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Instant;

use meshweave_dsl::mapping::{Mapping, Module, Offload, Pipeline, Recompute, Zero};

use super::bound::{Layers, groups, least_bytes, least_seconds};
use super::grids::{Grid, LayerKey, Objections, grids, layer_keys};
use super::saving::savings;
use super::space::{Cuts, MAX_CHUNKS};
use super::stages::balanced;
use super::{Options, OuterError, Problem};
use crate::plan::estimate::{Estimate, Unpriced, estimate, memory};

/// A mapping with its price.
#[derive(Clone, Debug, PartialEq)]
pub struct Priced {
    pub mapping: Mapping,
    pub estimate: Estimate,
}

/// How much of the space was looked at, and how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counts {
    /// Complete mappings in the space.
    pub n_mappings: u64,
    /// Grids with the choices of their layers.
    pub n_nodes: u64,
    /// Nodes whose least memory exceeds the budget.
    pub n_too_large: u64,
    /// Nodes that were pruned by the bound of their time.
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

/// What a search found.
pub(super) struct Outcome {
    /// The fastest, then the best of other grids.
    pub best: Vec<Priced>,
    pub lower_bound_s: f64,
    pub counts: Counts,
    /// Why grids were left out.
    pub objections: Objections,
    /// The mapping that needs least memory among those that were weighed and do not fit.
    pub closest: Option<(u64, Mapping)>,
    /// Why mappings had no price.
    pub unpriced: BTreeMap<String, u64>,
    pub is_out_of_time: bool,
}

/// What waits in the queue: nodes first seen, then points.
enum Step {
    Node(Grid, LayerKey),
    Point(Box<Mapping>),
}

struct Entry {
    bound_s: f64,
    order: u64,
    step: Step,
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
    layers: Layers,
    queue: BinaryHeap<Entry>,
    n_entries: u64,
    outcome: Outcome,
    /// The best of every grid.
    by_grid: BTreeMap<Grid, Priced>,
    best_s: f64,
    best: Option<Priced>,
}

/// Searches the mappings of exactly `n_ranks` ranks.
pub(super) fn search(
    problem: &Problem<'_>,
    options: &Options,
    n_ranks: usize,
) -> Result<Outcome, OuterError> {
    let start = Instant::now();
    let (grids, objections) = grids(problem, n_ranks);
    let mut search = Search {
        problem,
        options,
        layers: Layers::default(),
        queue: BinaryHeap::new(),
        n_entries: 0,
        outcome: Outcome {
            best: Vec::new(),
            lower_bound_s: f64::INFINITY,
            counts: Counts::default(),
            objections,
            closest: None,
            unpriced: BTreeMap::new(),
            is_out_of_time: false,
        },
        by_grid: BTreeMap::new(),
        best_s: f64::INFINITY,
        best: None,
    };
    for grid in grids {
        search.add_grid(grid);
    }
    search.outcome.counts.n_layer_prices = search.layers.len() as u64;
    search.run(start);
    Ok(search.finish())
}

impl Search<'_> {
    fn push(&mut self, bound_s: f64, step: Step) {
        let order = self.n_entries;
        self.n_entries += 1;
        self.queue.push(Entry {
            bound_s,
            order,
            step,
        });
    }

    fn add_grid(&mut self, grid: Grid) {
        let n_completions = n_completions(self.problem, grid);
        for key in layer_keys(self.problem, grid) {
            let counts = &mut self.outcome.counts;
            counts.n_nodes += 1;
            counts.n_mappings += n_completions;
            let least = least_bytes(self.problem, grid, &key);
            if least > self.problem.space.budget_bytes {
                counts.n_too_large += 1;
                self.note_unfit(least, || grid.mapping(&key));
                continue;
            }
            let Some(costs) = self.layers.costs(self.problem, key) else {
                self.outcome.counts.n_unpriced += 1;
                continue;
            };
            let bound_s = least_seconds(self.problem, grid, &key, costs);
            self.push(bound_s, Step::Node(grid, key));
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
        let mut n_steps = 0;
        while let Some(entry) = self.queue.pop() {
            // Nothing left can be better by more than the gap.
            if entry.bound_s >= self.best_s * (1.0 - self.options.gap) {
                self.outcome.lower_bound_s = entry.bound_s;
                break;
            }
            n_steps += 1;
            let looks = n_steps % N_STEPS_A_LOOK == 0;
            if looks && self.best.is_some() && start.elapsed().as_secs_f64() > self.options.within_s
            {
                self.outcome.lower_bound_s = entry.bound_s;
                self.outcome.is_out_of_time = true;
                break;
            }
            match entry.step {
                Step::Node(grid, key) => self.expand(grid, &key, entry.bound_s),
                Step::Point(mapping) => self.complete(*mapping),
            }
        }
        let left = self.queue.iter();
        let nodes = left.filter(|entry| matches!(entry.step, Step::Node(..)));
        self.outcome.counts.n_too_slow = nodes.count() as u64;
    }

    /// Prices the points of a node.
    fn expand(&mut self, grid: Grid, key: &LayerKey, bound_s: f64) {
        let space = self.problem.space;
        for pipeline in self.pipelines(grid, key) {
            for &stage in &space.zero_stages {
                for group in groups(self.problem, grid, stage) {
                    let mapping = Mapping {
                        zero: Zero { stage, group },
                        pipeline: pipeline.clone(),
                        recompute: required(&space.again),
                        ..grid.mapping(key)
                    };
                    match estimate(self.problem.workload, &mapping, self.problem.cluster) {
                        Ok(found) => {
                            self.outcome.counts.n_priced += 1;
                            // A bound never falls on the way down.
                            let floor_s = found.step_s.max(bound_s);
                            if floor_s < self.best_s {
                                self.push(floor_s, Step::Point(Box::new(mapping)));
                            }
                        }
                        Err(error) => self.note_unpriced(&error),
                    }
                }
            }
        }
    }

    fn note_unpriced(&mut self, error: &Unpriced) {
        self.outcome.counts.n_unpriced += 1;
        *self.outcome.unpriced.entry(error.to_string()).or_insert(0) += 1;
    }

    /// Schedules, chunks and cuts of a node.
    fn pipelines(&mut self, grid: Grid, key: &LayerKey) -> Vec<Pipeline> {
        let space = self.problem.space;
        let n_layers = self.problem.workload.model.n_layers;
        if grid.pp == 1 {
            return vec![Pipeline::default()];
        }
        let n_microbatches = self.problem.workload.batch / (grid.dp * key.micro_batch);
        let costs = self.layers.costs(self.problem, *key).cloned();
        let mut found = Vec::new();
        for schedule in &space.schedules {
            for chunks in chunk_counts(schedule, grid.pp, n_layers, n_microbatches) {
                if !space.chunks.admits(chunks) {
                    continue;
                }
                let with = |layers| Pipeline {
                    schedule: schedule.clone(),
                    chunks,
                    layers,
                };
                match &space.cuts {
                    Cuts::Given(layers) if layers.len() == grid.pp * chunks => {
                        found.push(with(Some(layers.clone())));
                    }
                    Cuts::Given(_) => {}
                    Cuts::Even => found.push(with(None)),
                    Cuts::Any => {
                        found.push(with(None));
                        let better = costs
                            .as_ref()
                            .and_then(|costs| balanced(costs, grid.pp * chunks));
                        found.extend(better.map(|layers| with(Some(layers))));
                    }
                }
            }
        }
        found
    }

    /// The best completion of a point: with nothing saved where that fits, else whatever fits first.
    fn complete(&mut self, point: Mapping) {
        let with_point = self.fits(&point);
        if with_point {
            self.offer(point);
            return;
        }
        let space = self.problem.space;
        let key = key_of(&point);
        for &optimizer in &space.offload_optimizer {
            for &activations in &space.offload_activations {
                let offload = Offload {
                    optimizer,
                    activations,
                };
                let base = Mapping {
                    offload,
                    ..point.clone()
                };
                for recompute in savings(self.problem, &mut self.layers, &key, &base) {
                    let mapping = Mapping {
                        recompute,
                        ..base.clone()
                    };
                    if self.fits(&mapping) {
                        self.offer(mapping);
                    }
                }
            }
        }
    }

    fn fits(&mut self, mapping: &Mapping) -> bool {
        self.outcome.counts.n_weighed += 1;
        let bytes = worst_bytes(self.problem, mapping);
        if bytes > self.problem.space.budget_bytes {
            self.note_unfit(bytes, || mapping.clone());
            return false;
        }
        true
    }

    fn offer(&mut self, mapping: Mapping) {
        let estimate = match estimate(self.problem.workload, &mapping, self.problem.cluster) {
            Ok(estimate) => estimate,
            Err(error) => return self.note_unpriced(&error),
        };
        self.outcome.counts.n_priced += 1;
        let seconds = estimate.step_s;
        let priced = Priced { mapping, estimate };
        let grid = grid_of(&priced.mapping);
        let known = self.by_grid.get(&grid);
        if known.is_none_or(|known| seconds < known.estimate.step_s) {
            self.by_grid.insert(grid, priced.clone());
        }
        if seconds < self.best_s {
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
        self.outcome
    }
}

/// Other grids that are remembered.
const N_RUNNERS_UP: usize = 16;

/// The recomputation that is asked for, and nothing else.
fn required(again: &std::collections::BTreeSet<Module>) -> Recompute {
    if again.is_empty() {
        Recompute::None
    } else {
        Recompute::Modules(again.clone())
    }
}

/// Bytes of the rank that needs most.
pub(super) fn worst_bytes(problem: &Problem<'_>, mapping: &Mapping) -> u64 {
    (0..mapping.pp)
        .map(|rank| {
            memory(problem.workload, mapping, problem.cluster, rank)
                .total()
                .0
        })
        .max()
        .unwrap_or(0)
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

/// The numbers of chunks a rank that a schedule takes.
///
/// Interleaving runs microbatches in rounds of `pp` (Narayanan et al. 2021, §2.2.2), so their number
/// must be a multiple of it.
fn chunk_counts(schedule: &str, pp: usize, n_layers: usize, n_microbatches: usize) -> Vec<usize> {
    let most = (n_layers / pp).min(MAX_CHUNKS);
    match schedule {
        "interleaved" | "looped-bfs" | "interleaved-zb" => {
            if !n_microbatches.is_multiple_of(pp) {
                return Vec::new();
            }
            (2..=most).collect()
        }
        "zb-v" | "v-half" | "v-min" | "dualpipe-v" => (2..=most.min(2)).collect(),
        _ => vec![1],
    }
}

/// Complete mappings of a node, counted.
fn n_completions(problem: &Problem<'_>, grid: Grid) -> u64 {
    let space = problem.space;
    let n_layers = problem.workload.model.n_layers;
    let n_pipelines: usize = if grid.pp == 1 {
        1
    } else {
        let n_cuts = if space.cuts == Cuts::Any { 2 } else { 1 };
        let of = |schedule: &String| chunk_counts(schedule, grid.pp, n_layers, grid.pp).len();
        space.schedules.iter().map(of).sum::<usize>() * n_cuts
    };
    let n_zero: usize = space
        .zero_stages
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
