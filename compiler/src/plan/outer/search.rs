//! Best-first branch and bound over the space of mappings.
//!
//! Enters: a problem. Leaves: the fastest mapping that fits, the runners-up, what was pruned, and the
//! least bound of everything that was not priced.
//! Invariant: a mapping is left out only when a bound on its time or on its memory says that it cannot
//! be the best, or is counted as not searched; equal prices are decided by the order of the space, so
//! the answer does not depend on the machine.
//!
//! The best few entries of the queue are expanded side by side, each knowing what was found before any
//! of them; what they yield is taken over in the queue's order, so that neither the number of threads
//! nor their pace changes what is found.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;
use std::time::Instant;

use meshweave_dsl::mapping::Mapping;

use super::bound::{Layers, least_seconds_of_layers};
use super::expand::{Expansion, Step, Yield, n_completions};
use super::grids::{Family, Grid, LayerKey, Objections, families, grid_of, layer_keys};
use super::{Options, Problem};
use crate::parallel::in_parallel;
use crate::plan::estimate::Estimate;

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

/// What was met on the way, beside what is worth keeping.
#[derive(Debug)]
pub(super) struct Seen {
    /// The least bound of what was left out.
    pub lower_bound_s: f64,
    pub counts: Counts,
    /// The mapping that needs least memory among those that were weighed and do not fit.
    pub closest: Option<(u64, Mapping)>,
    /// Why mappings had no price.
    pub unpriced: BTreeMap<String, u64>,
    /// The fastest of those that take longer than the target.
    pub fastest_s: f64,
    /// The fastest first token of those that take longer than the target.
    pub fastest_first_s: f64,
}

impl Default for Seen {
    fn default() -> Self {
        Self {
            lower_bound_s: f64::INFINITY,
            counts: Counts::default(),
            closest: None,
            unpriced: BTreeMap::new(),
            fastest_s: f64::INFINITY,
            fastest_first_s: f64::INFINITY,
        }
    }
}

impl Seen {
    /// What is pruned at once still bounds the rest.
    pub fn prune(&mut self, bound_s: f64) {
        self.lower_bound_s = self.lower_bound_s.min(bound_s);
        self.counts.n_too_slow += 1;
    }

    /// Remembers the closest of what does not fit.
    pub fn note_unfit(&mut self, bytes: u64, mapping: impl FnOnce() -> Mapping) {
        let is_closer = |(least, _): &(u64, Mapping)| bytes < *least;
        if self.closest.as_ref().is_none_or(is_closer) {
            self.closest = Some((bytes, mapping()));
        }
    }

    /// Adds what was seen later.
    fn add(&mut self, later: Self) {
        self.lower_bound_s = self.lower_bound_s.min(later.lower_bound_s);
        self.counts = self.counts.and(later.counts);
        if let Some((bytes, mapping)) = later.closest {
            self.note_unfit(bytes, || mapping);
        }
        for (why, count) in later.unpriced {
            *self.unpriced.entry(why).or_insert(0) += count;
        }
        self.fastest_s = self.fastest_s.min(later.fastest_s);
        self.fastest_first_s = self.fastest_first_s.min(later.fastest_first_s);
    }
}

/// What a search found.
pub(super) struct Outcome {
    /// The fastest, then the best of other grids.
    pub best: Vec<Priced>,
    /// The best of every family of schedules that was priced.
    pub of_family: Vec<Priced>,
    /// Why grids were left out.
    pub objections: Objections,
    pub is_out_of_time: bool,
    pub seen: Seen,
}

/// The best so far, by seconds weighed with the user's preferences.
pub(super) struct Incumbents {
    /// Of every grid.
    by_grid: BTreeMap<Grid, (f64, Priced)>,
    /// Of every family of schedules.
    by_family: BTreeMap<String, (f64, Priced)>,
    best: Option<Priced>,
    /// Of all, or what only faster mappings are of interest below.
    pub best_s: f64,
    /// Bytes of the closest of what does not fit.
    pub closest_bytes: u64,
}

impl Incumbents {
    fn is_best_of_grid(&self, mapping: &Mapping, seconds: f64) -> bool {
        let known = self.by_grid.get(&grid_of(mapping));
        known.is_none_or(|(known_s, _)| seconds < *known_s)
    }

    fn is_best_of_family(&self, mapping: &Mapping, seconds: f64) -> bool {
        let known = self.by_family.get(&mapping.pipeline.schedule);
        mapping.pp > 1 && known.is_none_or(|(known_s, _)| seconds < *known_s)
    }

    /// Whether a mapping would be kept.
    pub fn would_keep(&self, mapping: &Mapping, seconds: f64) -> bool {
        seconds < self.best_s
            || self.is_best_of_grid(mapping, seconds)
            || self.is_best_of_family(mapping, seconds)
    }

    fn keep(&mut self, seconds: f64, priced: Priced) {
        if self.is_best_of_family(&priced.mapping, seconds) {
            let name = priced.mapping.pipeline.schedule.clone();
            self.by_family.insert(name, (seconds, priced.clone()));
        }
        if self.is_best_of_grid(&priced.mapping, seconds) {
            let grid = grid_of(&priced.mapping);
            self.by_grid.insert(grid, (seconds, priced.clone()));
        }
        if seconds < self.best_s {
            self.best_s = seconds;
            self.best = Some(priced);
        }
    }
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

/// Entries that are expanded side by side, on any machine: with more of them some are expanded that an
/// earlier one would have pruned, with fewer threads wait for each other.
const WIDTH: usize = 128;

struct Search<'a> {
    problem: &'a Problem<'a>,
    options: &'a Options,
    layers: &'a Layers,
    queue: BinaryHeap<Entry>,
    n_entries: u64,
    known: Incumbents,
    seen: Seen,
    is_out_of_time: bool,
}

/// Searches the mappings of exactly `n_ranks` ranks.
///
/// `layers` holds prices of layers, which other numbers of ranks share.
pub(super) fn search(
    problem: &Problem<'_>,
    options: &Options,
    n_ranks: usize,
    layers: &Layers,
) -> Outcome {
    let start = Instant::now();
    let (families, objections) = families(problem, n_ranks);
    let mut search = Search {
        problem,
        options,
        layers,
        queue: BinaryHeap::new(),
        n_entries: 0,
        known: Incumbents {
            by_grid: BTreeMap::new(),
            by_family: BTreeMap::new(),
            best: None,
            best_s: options.better_than_s.unwrap_or(f64::INFINITY),
            closest_bytes: u64::MAX,
        },
        seen: Seen::default(),
        is_out_of_time: false,
    };
    let n_before = layers.len();
    search.add_families(families, n_ranks);
    search.seen.counts.n_layer_prices = (layers.len() - n_before) as u64;
    if let Some(warm) = &options.warm_start
        && warm.n_ranks() == n_ranks
    {
        let offered = Expansion::new(problem, layers, &search.known).of_warm_start(warm);
        search.take_over(offered);
    }
    search.run(start);
    search.finish(objections)
}

impl Search<'_> {
    fn push(&mut self, bound_s: f64, step: Step) {
        if bound_s >= self.known.best_s {
            return self.seen.prune(bound_s);
        }
        let order = self.n_entries;
        self.n_entries += 1;
        self.queue.push(Entry {
            bound_s,
            order,
            step: Box::new(step),
        });
    }

    /// All grids, with the choices of their layers.
    fn add_families(&mut self, families: Vec<Family>, n_ranks: usize) {
        let mut nodes: Vec<(Arc<[Grid]>, LayerKey)> = Vec::new();
        for family in families {
            let keys = layer_keys(self.problem, &family);
            let grids: Arc<[Grid]> = family.grids.into();
            let n_completions: u64 = grids
                .iter()
                .map(|grid| n_completions(self.problem, *grid))
                .sum();
            for key in keys {
                self.seen.counts.n_nodes += 1;
                self.seen.counts.n_mappings += n_completions;
                nodes.push((Arc::clone(&grids), key));
            }
        }
        let bounds = in_parallel(nodes.len(), self.options.threads, |node| {
            let (_, key) = &nodes[node];
            let costs = self.layers.costs(self.problem, *key);
            least_seconds_of_layers(self.problem, n_ranks, key, &costs)
        });
        for (bound_s, (grids, key)) in bounds.into_iter().zip(nodes) {
            self.push(bound_s, Step::Layers(grids, key));
        }
    }

    fn run(&mut self, start: Instant) {
        loop {
            let batch = self.next(start);
            if batch.is_empty() {
                return;
            }
            let found = in_parallel(batch.len(), self.options.threads, |idx| {
                let Entry { bound_s, step, .. } = &batch[idx];
                Expansion::new(self.problem, self.layers, &self.known).of(step, *bound_s)
            });
            for found in found {
                self.take_over(found);
            }
        }
    }

    /// The entries that are expanded next; none when the search is over.
    fn next(&mut self, start: Instant) -> Vec<Entry> {
        let mut batch = Vec::with_capacity(WIDTH);
        let within_s = self.options.within_s;
        let is_late = self.known.best_s.is_finite() && start.elapsed().as_secs_f64() > within_s;
        // Nothing left can be better by more than the gap.
        let enough_s = self.known.best_s * (1.0 - self.options.gap);
        while batch.len() < WIDTH
            && let Some(entry) = self.queue.pop()
        {
            if is_late || entry.bound_s >= enough_s {
                self.is_out_of_time = is_late && entry.bound_s < enough_s;
                self.seen.prune(entry.bound_s);
                self.seen.counts.n_too_slow += self.queue.len() as u64;
                self.queue.clear();
                break;
            }
            batch.push(entry);
        }
        batch
    }

    fn take_over(&mut self, found: Yield) {
        self.seen.add(found.seen);
        if let Some((bytes, _)) = &self.seen.closest {
            self.known.closest_bytes = *bytes;
        }
        for (seconds, priced) in found.priced {
            self.known.keep(seconds, priced);
        }
        for (bound_s, step) in found.steps {
            self.push(bound_s, step);
        }
    }

    fn finish(self, objections: Objections) -> Outcome {
        let Incumbents {
            by_grid,
            by_family,
            best,
            ..
        } = self.known;
        let mut outcome = Outcome {
            best: Vec::new(),
            of_family: Vec::new(),
            objections,
            is_out_of_time: self.is_out_of_time,
            seen: self.seen,
        };
        let Some(best) = best else {
            return outcome;
        };
        let own = grid_of(&best.mapping);
        let mut others: Vec<Priced> = by_grid
            .into_iter()
            .filter(|(grid, _)| *grid != own)
            .map(|(_, (_, priced))| priced)
            .collect();
        others.sort_by(|a, b| a.estimate.step_s.total_cmp(&b.estimate.step_s));
        others.truncate(N_RUNNERS_UP);
        let bound_s = &mut outcome.seen.lower_bound_s;
        *bound_s = bound_s.min(best.estimate.step_s);
        outcome.best.push(best);
        outcome.best.extend(others);
        outcome.of_family = by_family.into_values().map(|(_, priced)| priced).collect();
        outcome
    }
}

/// Other grids that are remembered.
pub(super) const N_RUNNERS_UP: usize = 16;
