//! List schedules: every rank takes the best work that is ready.
//!
//! Enters: stages, a memory limit, a policy. Leaves: a schedule, or nothing where a policy runs out
//! of room.
//! Invariant: a forward that is not of a rank's last chunk leaves room for one of a later chunk, so
//! a microbatch that has begun can always finish.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use meshweave_dsl::schedule::{Action, ActionKind, Schedule};

use super::builtin::Shape;
use super::search::{SearchOptions, Stages};
use super::simulate::StageCosts;

/// What a rank prefers among ready work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Policy {
    pub first: First,
    /// Rather than begin a weight gradient, wait for work that arrives within this share of it.
    pub patience: f64,
    /// Microbatches in flight on rank r: at most this many times `P − r`, as far as memory allows.
    pub warm_up: f64,
}

/// Which of forward and input gradient goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum First {
    Backward,
    Forward,
    /// Whichever did not run last.
    Turns,
}

/// Those that are tried.
pub(super) const POLICIES: [Policy; 24] = policies();

const fn policies() -> [Policy; 24] {
    const FIRSTS: [First; 2] = [First::Backward, First::Turns];
    const PATIENCES: [f64; 4] = [0.0, 0.34, 0.67, 1.0];
    const WARM_UPS: [f64; 3] = [1.0, 2.0, f64::INFINITY];
    let mut policies = [Policy {
        first: First::Forward,
        patience: 0.0,
        warm_up: f64::INFINITY,
    }; 24];
    let mut nth = 0;
    while nth < 24 {
        policies[nth] = Policy {
            first: FIRSTS[nth % 2],
            patience: PATIENCES[nth / 2 % 4],
            warm_up: WARM_UPS[nth / 8],
        };
        nth += 1;
    }
    policies
}

/// A rank may have something to do.
#[derive(Clone, Copy, PartialEq)]
struct Wake {
    at_s: f64,
    rank: usize,
}

impl Eq for Wake {}

impl Ord for Wake {
    fn cmp(&self, other: &Self) -> Ordering {
        self.at_s
            .total_cmp(&other.at_s)
            .then(self.rank.cmp(&other.rank))
    }
}

impl PartialOrd for Wake {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// F, I and W of a stage in their order of microbatches.
const KINDS: [ActionKind; 3] = [ActionKind::F, ActionKind::I, ActionKind::W];

struct List<'a> {
    stages: &'a [StageCosts],
    stage_rank: Vec<usize>,
    /// Stages of each rank, in model order.
    on_rank: Vec<Vec<usize>>,
    n_microbatches: usize,
    latency_s: f64,
    limit_bytes: f64,
    policy: Policy,
    /// By stage: how many of each kind have begun.
    n_begun: Vec<[usize; 3]>,
    /// By stage, kind (F, I) and microbatch: when the next stage's work can use it.
    arrival_s: Vec<[Vec<f64>; 2]>,
    /// By stage: when its own F and I end.
    own_end_s: Vec<[Vec<f64>; 2]>,
    held_bytes: Vec<f64>,
    free_s: Vec<f64>,
    last: Vec<ActionKind>,
    rows: Vec<Vec<Action>>,
    wakes: BinaryHeap<Reverse<Wake>>,
}

/// A schedule of the stages under a policy; `None` when it comes to a halt. `O(n (v + log P))`.
pub(super) fn greedy(stages: &Stages, options: &SearchOptions, policy: Policy) -> Option<Schedule> {
    let shape = Shape::new(options.n_ranks, options.n_microbatches).chunks(stages.n_chunks);
    let stage_rank = stages.placement.stage_rank(&shape);
    let n_stages = stages.costs.stages.len();
    if stage_rank.len() != n_stages {
        return None;
    }
    let per_kind = || {
        [
            vec![f64::NAN; shape.n_microbatches],
            vec![f64::NAN; shape.n_microbatches],
        ]
    };
    let on_rank = (0..shape.n_ranks).map(|rank| {
        (0..n_stages)
            .filter(|stage| stage_rank[*stage] == rank)
            .collect()
    });
    let mut list = List {
        stages: &stages.costs.stages,
        on_rank: on_rank.collect(),
        n_microbatches: shape.n_microbatches,
        latency_s: stages.costs.latency_s,
        limit_bytes: options.memory_limit_bytes.unwrap_or(f64::INFINITY) * (1.0 + 1e-9),
        policy,
        n_begun: vec![[0; 3]; n_stages],
        arrival_s: (0..n_stages).map(|_| per_kind()).collect(),
        own_end_s: (0..n_stages).map(|_| per_kind()).collect(),
        held_bytes: vec![0.0; shape.n_ranks],
        free_s: vec![0.0; shape.n_ranks],
        last: vec![ActionKind::I; shape.n_ranks],
        rows: vec![Vec::new(); shape.n_ranks],
        wakes: (0..shape.n_ranks)
            .map(|rank| Reverse(Wake { at_s: 0.0, rank }))
            .collect(),
        stage_rank: stage_rank.clone(),
    };
    while let Some(Reverse(Wake { at_s, rank })) = list.wakes.pop() {
        if list.free_s[rank] <= at_s {
            list.decide(rank, at_s);
        }
    }
    let n_actions: usize = list.rows.iter().map(Vec::len).sum();
    let is_whole = n_actions == n_stages * shape.n_microbatches * KINDS.len();
    is_whole.then(|| Schedule::new("searched", shape.n_microbatches, stage_rank, list.rows))
}

impl List<'_> {
    /// Begins what the rank prefers at `at_s`, if anything is ready.
    fn decide(&mut self, rank: usize, at_s: f64) {
        let mut choice: Option<(usize, ActionKind)> = None;
        let mut soonest_s = f64::INFINITY;
        let order = match self.policy.first {
            First::Backward => [ActionKind::I, ActionKind::F],
            First::Forward => [ActionKind::F, ActionKind::I],
            First::Turns if self.last[rank] == ActionKind::I => [ActionKind::F, ActionKind::I],
            First::Turns => [ActionKind::I, ActionKind::F],
        };
        // Work that others wait for: later chunks first, they are nearer to the end.
        for kind in order {
            for &stage in self.on_rank[rank].iter().rev() {
                let Some(ready_s) = self.ready_s(stage, kind) else {
                    continue;
                };
                if kind == ActionKind::F && !self.has_room(rank, stage) {
                    continue;
                }
                if ready_s <= at_s {
                    choice = choice.or(Some((stage, kind)));
                } else {
                    soonest_s = soonest_s.min(ready_s);
                }
            }
        }
        if choice.is_none() {
            choice = self.weight(rank, at_s, soonest_s);
        }
        if let Some((stage, kind)) = choice {
            self.begin(rank, stage, kind, at_s);
        }
    }

    /// When the stage's next action of this kind could begin, as far as that is known.
    fn ready_s(&self, stage: usize, kind: ActionKind) -> Option<f64> {
        let n_begun = &self.n_begun[stage];
        match kind {
            ActionKind::F => {
                let microbatch = n_begun[0];
                if microbatch >= self.n_microbatches {
                    return None;
                }
                if stage == 0 {
                    return Some(0.0);
                }
                Some(self.arrival_s[stage - 1][0][microbatch]).filter(|at_s| !at_s.is_nan())
            }
            _ => {
                let microbatch = n_begun[1];
                if microbatch >= n_begun[0] {
                    return None;
                }
                let forward_s = self.own_end_s[stage][0][microbatch];
                if stage + 1 == self.stages.len() {
                    return Some(forward_s);
                }
                let gradient_s = self.arrival_s[stage + 1][1][microbatch];
                (!gradient_s.is_nan()).then(|| forward_s.max(gradient_s))
            }
        }
    }

    /// Whether a forward of `stage` fits, with one of a later chunk kept free.
    fn has_room(&self, rank: usize, stage: usize) -> bool {
        let bytes = |stage: &usize| self.stages[*stage].activation_bytes;
        let later = self.on_rank[rank]
            .iter()
            .filter(|other| **other > stage)
            .map(bytes);
        let kept_bytes = later.fold(0.0, f64::max);
        let n_ranks = self.rows.len();
        let all_bytes: f64 = self.on_rank[rank].iter().map(bytes).sum();
        let in_flight_bytes =
            self.policy.warm_up * (n_ranks - rank.min(n_ranks - 1)) as f64 * all_bytes;
        let limit_bytes = self.limit_bytes.min(in_flight_bytes.max(all_bytes));
        self.held_bytes[rank] + bytes(&stage) + kept_bytes <= limit_bytes
    }

    /// A weight gradient, unless it is worth waiting for what arrives at `soonest_s`.
    fn weight(&mut self, rank: usize, at_s: f64, soonest_s: f64) -> Option<(usize, ActionKind)> {
        let stage = self.on_rank[rank].iter().copied().find(|stage| {
            let microbatch = self.n_begun[*stage][2];
            microbatch < self.n_begun[*stage][1]
        })?;
        let seconds = self.stages[stage].backward_weight_s;
        if soonest_s < at_s + self.policy.patience * seconds {
            self.wakes.push(Reverse(Wake {
                at_s: soonest_s,
                rank,
            }));
            return None;
        }
        Some((stage, ActionKind::W))
    }

    fn begin(&mut self, rank: usize, stage: usize, kind: ActionKind, at_s: f64) {
        let costs = self.stages[stage];
        let (nth, seconds) = match kind {
            ActionKind::F => (0, costs.forward_s),
            ActionKind::I => (1, costs.backward_input_s),
            _ => (2, costs.backward_weight_s),
        };
        let microbatch = self.n_begun[stage][nth];
        self.n_begun[stage][nth] += 1;
        let end_s = at_s + seconds;
        self.free_s[rank] = end_s;
        self.rows[rank].push(Action::new(stage as u32, kind, microbatch as u32));
        match kind {
            ActionKind::F => self.held_bytes[rank] += costs.activation_bytes,
            ActionKind::I => self.held_bytes[rank] -= costs.freed_by_input_bytes,
            _ => self.held_bytes[rank] -= costs.activation_bytes - costs.freed_by_input_bytes,
        }
        if kind != ActionKind::W {
            self.last[rank] = kind;
            self.own_end_s[stage][nth][microbatch] = end_s;
            let (to, p2p_s) = if kind == ActionKind::F {
                (
                    Some(stage + 1).filter(|to| *to < self.stages.len()),
                    costs.p2p_s,
                )
            } else {
                let before = stage.checked_sub(1);
                (
                    before,
                    before.map_or(0.0, |before| self.stages[before].p2p_s),
                )
            };
            if let Some(to) = to {
                let to_rank = self.stage_rank[to];
                let message_s = if to_rank == rank {
                    0.0
                } else {
                    p2p_s + self.latency_s
                };
                self.arrival_s[stage][nth][microbatch] = end_s + message_s;
                self.wakes.push(Reverse(Wake {
                    at_s: end_s + message_s,
                    rank: to_rank,
                }));
            }
        }
        self.wakes.push(Reverse(Wake { at_s: end_s, rank }));
    }
}
