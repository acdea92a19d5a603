//! What a schedule takes: its actions in time, where ranks idle and why.
//!
//! Enters: a checked schedule and the costs of its stages. Leaves: a [`Simulation`].
//! Invariant: every rank runs its row in order; an action starts once its rank is free and all that
//! it waits for has arrived; all figures are predicted.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use meshweave_dsl::schedule::{Action, ActionKind, Schedule, Updates};
use serde::{Deserialize, Serialize};

use super::PipelineError;
use super::closed_form::pair_s;
use super::index::Index;
use super::memory;

/// What one stage costs for one microbatch (all its slices together).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StageCosts {
    pub forward_s: f64,
    pub backward_input_s: f64,
    pub backward_weight_s: f64,
    pub recompute_s: f64,
    /// Of the forward, and of the backward of the input with its recompute: messages within the stage
    /// that another microbatch's work can hide in a pair.
    pub forward_exchange_s: f64,
    pub backward_exchange_s: f64,
    /// Time on the link of the activations to the stage after, and of their gradients back.
    pub p2p_s: f64,
    /// Kept from the forward to the end of the backward.
    pub activation_bytes: f64,
    /// Of these, what the gradient of the input frees already.
    pub freed_by_input_bytes: f64,
    /// Of these, what is kept between forward and recompute where there is a recompute.
    pub checkpoint_bytes: f64,
    /// One version of the weights.
    pub weight_bytes: f64,
}

/// Which messages share a link.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Contention {
    /// None: every message has a link of its own.
    None,
    /// Those of one direction between two ranks.
    #[default]
    Direction,
    /// Those of both directions between two ranks.
    Pair,
    /// All that leave a rank, whatever their destination.
    Sender,
}

/// What a pipeline costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Costs {
    /// Per stage of the model (of one copy).
    pub stages: Vec<StageCosts>,
    /// From the end of a message on the link to its arrival.
    pub latency_s: f64,
    pub contention: Contention,
    /// What an overlapped pair takes, as a share of what its two actions take alone: 1 gains nothing.
    pub overlap: f64,
    /// By how much the work of a pair takes longer while its messages are sent; see
    /// [`pair_s`](super::pair_s).
    pub pair_slowdown: f64,
    /// Update of the weights after a rank's last action.
    pub update_s: f64,
    /// Whether all ranks wait for each other before they update: global gradient clipping, checks
    /// for NaN without post-validation.
    pub barrier: bool,
    /// Bytes of activations that a rank may hold; idle time in which a forward had its input and no
    /// room is a wait for memory. No limit, no such cause.
    pub memory_limit_bytes: Option<f64>,
}

impl Costs {
    /// Even stages: a rank's forward takes `forward_s` a microbatch, whatever its number of chunks;
    /// its activations of one microbatch are 1 byte.
    pub fn even(
        n_ranks: usize,
        n_stages: usize,
        forward_s: f64,
        input_s: f64,
        weight_s: f64,
    ) -> Self {
        let share = n_ranks as f64 / n_stages.max(1) as f64;
        let stage = StageCosts {
            forward_s: forward_s * share,
            backward_input_s: input_s * share,
            backward_weight_s: weight_s * share,
            activation_bytes: share,
            ..StageCosts::default()
        };
        Self::of(vec![stage; n_stages])
    }

    /// These stages, with messages that take no time beyond their own, no barrier and no update.
    pub fn of(stages: Vec<StageCosts>) -> Self {
        Self {
            stages,
            latency_s: 0.0,
            contention: Contention::default(),
            overlap: 1.0,
            pair_slowdown: 1.0,
            update_s: 0.0,
            barrier: false,
            memory_limit_bytes: None,
        }
    }

    /// Seconds of one action. The full backward is both halves.
    pub fn seconds(&self, schedule: &Schedule, action: Action) -> f64 {
        let stage = &self.stages[schedule.model_stage(action.stage)];
        let whole = match action.kind {
            ActionKind::F => stage.forward_s,
            ActionKind::I => stage.backward_input_s,
            ActionKind::W => stage.backward_weight_s,
            ActionKind::B => stage.backward_input_s + stage.backward_weight_s,
            ActionKind::R => stage.recompute_s,
        };
        whole / schedule.n_slices as f64
    }

    /// Of the seconds of an action, messages that a pair can hide.
    fn exchange_s(&self, schedule: &Schedule, action: Action) -> f64 {
        let stage = &self.stages[schedule.model_stage(action.stage)];
        let whole = match action.kind {
            ActionKind::F => stage.forward_exchange_s,
            ActionKind::I | ActionKind::B => stage.backward_exchange_s,
            ActionKind::W | ActionKind::R => 0.0,
        };
        whole / schedule.n_slices as f64
    }

    /// Seconds of an overlapped pair.
    pub(super) fn pair_seconds(&self, schedule: &Schedule, pair: [Action; 2]) -> f64 {
        let sum = |of: &dyn Fn(Action) -> f64| of(pair[0]) + of(pair[1]);
        let work_s = sum(&|action| self.seconds(schedule, action));
        let exchange_s = sum(&|action| self.exchange_s(schedule, action));
        pair_s(work_s, exchange_s, self.pair_slowdown) * self.overlap
    }

    /// Seconds on the link of an action's result.
    pub(super) fn transfer_s(&self, schedule: &Schedule, action: Action) -> f64 {
        // The boundary belongs to the stage before it, in both directions.
        let stage = match action.kind {
            ActionKind::F => Some(action.stage),
            _ => schedule.stage_before(action.stage),
        };
        let p2p_s = stage.map_or(0.0, |stage| self.stages[schedule.model_stage(stage)].p2p_s);
        p2p_s / schedule.n_slices as f64
    }

    /// Seconds from the end of an action to its result's arrival on another rank, the link free.
    pub(super) fn message_s(&self, schedule: &Schedule, action: Action) -> f64 {
        self.transfer_s(schedule, action) + self.latency_s
    }

    /// Checks that there is a finite cost for every stage.
    ///
    /// # Errors
    /// [`PipelineError::Invalid`] that names the stage.
    pub fn fit(&self, schedule: &Schedule) -> Result<(), PipelineError> {
        if self.stages.len() != schedule.n_stages {
            return Err(PipelineError::Invalid(format!(
                "costs of {} stages are given and schedule `{}` has {}; give one for each",
                self.stages.len(),
                schedule.name,
                schedule.n_stages
            )));
        }
        for (stage_idx, stage) in self.stages.iter().enumerate() {
            let times = [
                ("forward", stage.forward_s),
                ("backward of the input", stage.backward_input_s),
                ("backward of the weights", stage.backward_weight_s),
                ("recompute", stage.recompute_s),
                ("message", stage.p2p_s),
            ];
            if let Some((what, time)) = times
                .iter()
                .find(|(_, time)| !(time.is_finite() && *time >= 0.0))
            {
                return Err(PipelineError::Invalid(format!(
                    "the {what} of stage {stage_idx} takes {time} s; times are finite and not negative"
                )));
            }
        }
        Ok(())
    }
}

/// Why a rank idles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// What it waits for is not computed yet, or its own work is done.
    Dependency,
    /// What it waits for is computed and on its way.
    Communication,
    /// A forward has its input, and there is no room for its activations.
    Memory,
    /// The other ranks are not done yet.
    Barrier,
}

impl Cause {
    /// All causes.
    pub const ALL: [Self; 4] = [
        Self::Dependency,
        Self::Communication,
        Self::Memory,
        Self::Barrier,
    ];

    /// Its name.
    pub fn text(self) -> &'static str {
        match self {
            Self::Dependency => "dependency",
            Self::Communication => "communication",
            Self::Memory => "memory",
            Self::Barrier => "barrier",
        }
    }
}

/// When something ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TimeSpan {
    pub start_s: f64,
    pub end_s: f64,
}

impl TimeSpan {
    /// Its length.
    pub fn seconds(self) -> f64 {
        self.end_s - self.start_s
    }
}

/// A rank idles.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Idle {
    pub span: TimeSpan,
    pub cause: Cause,
}

/// Idle seconds by cause, a rank's mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bubble {
    pub dependency_s: f64,
    pub communication_s: f64,
    pub memory_s: f64,
    pub barrier_s: f64,
}

impl Bubble {
    /// All causes together.
    pub fn total_s(&self) -> f64 {
        self.dependency_s + self.communication_s + self.memory_s + self.barrier_s
    }

    /// The seconds of a cause.
    pub fn of(&self, cause: Cause) -> f64 {
        match cause {
            Cause::Dependency => self.dependency_s,
            Cause::Communication => self.communication_s,
            Cause::Memory => self.memory_s,
            Cause::Barrier => self.barrier_s,
        }
    }

    fn add(&mut self, cause: Cause, seconds: f64) {
        match cause {
            Cause::Dependency => self.dependency_s += seconds,
            Cause::Communication => self.communication_s += seconds,
            Cause::Memory => self.memory_s += seconds,
            Cause::Barrier => self.barrier_s += seconds,
        }
    }
}

/// A predicted step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Simulation {
    /// From the first start to the last end, update included.
    pub step_s: f64,
    /// Per rank and action of its row. The two actions of an overlapped pair have one span.
    pub spans: Vec<Vec<TimeSpan>>,
    /// Seconds in which each rank computes.
    pub busy_s: Vec<f64>,
    /// Per rank, in order of time.
    pub idle: Vec<Vec<Idle>>,
    /// Idle seconds of the mean rank.
    pub bubble: Bubble,
    /// What the step takes beyond the work of the busiest rank.
    pub bubble_s: f64,
    /// Idle seconds between first and last action, of the rank that has most.
    pub inner_bubble_s: f64,
    /// Most bytes of activations (and stashed weight versions) that each rank holds.
    pub peak_bytes: Vec<f64>,
    /// (rank, position) of the actions that fix the step's length, from the first to the last.
    pub critical_path: Vec<(usize, usize)>,
}

impl Simulation {
    /// Idle share of all ranks' time.
    pub fn bubble_rate(&self) -> f64 {
        let busy_s: f64 = self.busy_s.iter().sum();
        1.0 - busy_s / (self.step_s * self.busy_s.len() as f64).max(f64::MIN_POSITIVE)
    }

    /// The peak of the rank that holds most.
    pub fn peak(&self) -> f64 {
        self.peak_bytes.iter().copied().fold(0.0, f64::max)
    }
}

/// Runs `schedule` under `costs`. `O(n log P)` for `n` actions and `P` ranks.
///
/// # Errors
/// [`PipelineError::Invalid`] when costs do not fit, or when ranks wait for each other for ever.
pub fn simulate(schedule: &Schedule, costs: &Costs) -> Result<Simulation, PipelineError> {
    costs.fit(schedule)?;
    let mut run = Run::new(schedule, costs);
    run.go();
    if let Some(rank) =
        (0..schedule.n_ranks).find(|rank| run.next[*rank] < schedule.rows[*rank].len())
    {
        let position = run.next[rank];
        return Err(PipelineError::Invalid(format!(
            "rank {rank} waits for ever at step {position} (`{}`); `check` shows the cycle",
            schedule.rows[rank][position]
        )));
    }
    Ok(run.finish())
}

/// An end of work: time and rank, the earliest first.
#[derive(Clone, Copy, PartialEq)]
struct End {
    at_s: f64,
    rank: usize,
}

impl Eq for End {}

impl Ord for End {
    fn cmp(&self, other: &Self) -> Ordering {
        self.at_s
            .total_cmp(&other.at_s)
            .then(self.rank.cmp(&other.rank))
    }
}

impl PartialOrd for End {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

const NOBODY: u32 = u32::MAX;

struct Run<'a> {
    index: Index<'a>,
    costs: &'a Costs,
    /// Position of the action that each rank runs or waits to run.
    next: Vec<usize>,
    free_s: Vec<f64>,
    spans: Vec<TimeSpan>,
    /// By id: when the result is where it is needed; NaN before its end is known.
    arrival_s: Vec<f64>,
    /// By id: the rank that could not start for want of it.
    waiter: Vec<u32>,
    /// By id: what fixed the start, the action before on the rank or another's.
    blame: Vec<u32>,
    link_free_s: Vec<f64>,
    ends: BinaryHeap<Reverse<End>>,
    is_pair: Vec<bool>,
}

impl<'a> Run<'a> {
    fn new(schedule: &'a Schedule, costs: &'a Costs) -> Self {
        let index = Index::new(schedule);
        let (n_actions, n_ranks) = (index.n_actions(), schedule.n_ranks);
        let mut is_pair = vec![false; n_actions];
        for (rank, pairs) in schedule.pairs.iter().enumerate() {
            for position in pairs {
                is_pair[index.row_start[rank] + position] = true;
            }
        }
        Self {
            index,
            costs,
            next: vec![0; n_ranks],
            free_s: vec![0.0; n_ranks],
            spans: vec![TimeSpan::default(); n_actions],
            arrival_s: vec![f64::NAN; n_actions],
            waiter: vec![NOBODY; n_actions],
            blame: vec![NOBODY; n_actions],
            link_free_s: vec![0.0; n_ranks * n_ranks],
            ends: BinaryHeap::new(),
            is_pair,
        }
    }

    fn go(&mut self) {
        for rank in 0..self.next.len() {
            self.try_start(rank);
        }
        while let Some(Reverse(End { at_s, rank })) = self.ends.pop() {
            let first = self.index.row_start[rank] + self.next[rank];
            let n_actions = if self.is_pair[first] { 2 } else { 1 };
            self.next[rank] += n_actions;
            self.free_s[rank] = at_s;
            for id in first..first + n_actions {
                self.arrival_s[id] = self.deliver(rank, id, at_s);
                if self.waiter[id] != NOBODY && self.waiter[id] as usize != rank {
                    self.try_start(self.waiter[id] as usize);
                }
            }
            self.try_start(rank);
        }
    }

    /// When the result of `id`, computed at `at_s`, is where it is needed.
    fn deliver(&mut self, rank: usize, id: usize, at_s: f64) -> f64 {
        let schedule = self.index.schedule;
        let action = schedule.rows[rank][id - self.index.row_start[rank]];
        let Some(to) = self.index.receiver(action) else {
            return at_s;
        };
        let transfer_s = self.costs.transfer_s(schedule, action);
        let n_ranks = schedule.n_ranks;
        let link = match self.costs.contention {
            Contention::None => return at_s + transfer_s + self.costs.latency_s,
            Contention::Direction => rank * n_ranks + to,
            Contention::Pair => rank.min(to) * n_ranks + rank.max(to),
            Contention::Sender => rank * n_ranks + rank,
        };
        let start_s = at_s.max(self.link_free_s[link]);
        self.link_free_s[link] = start_s + transfer_s;
        start_s + transfer_s + self.costs.latency_s
    }

    /// Starts the rank's next action if all that it waits for has an arrival time.
    fn try_start(&mut self, rank: usize) {
        let schedule = self.index.schedule;
        let position = self.next[rank];
        let row = &schedule.rows[rank];
        if position >= row.len() {
            return;
        }
        let first = self.index.row_start[rank] + position;
        let last = if self.is_pair[first] {
            first + 1
        } else {
            first
        };
        let mut start_s = self.free_s[rank];
        let mut blame = first.checked_sub(1).filter(|_| position > 0);
        let mut missing = None;
        let mut work_s = 0.0;
        for id in first..=last {
            let action = row[id - self.index.row_start[rank]];
            work_s += self.costs.seconds(schedule, action);
            let (arrival_s, index) = (&self.arrival_s, &self.index);
            index.each_dependency(action, |needed| {
                if arrival_s[needed].is_nan() {
                    missing = Some(needed);
                    return;
                }
                // Within a rank the result is there at its end, whoever else waits for a message.
                let is_here = (index.row_start[rank]..index.row_start[rank + 1]).contains(&needed);
                let at_s = if is_here {
                    self.spans[needed].end_s
                } else {
                    arrival_s[needed]
                };
                if at_s > start_s {
                    start_s = at_s;
                    blame = Some(needed);
                }
            });
        }
        if let Some(missing) = missing {
            self.waiter[missing] = rank as u32;
            return;
        }
        if last > first {
            let pair = [row[position], row[position + 1]];
            work_s = self.costs.pair_seconds(schedule, pair);
        }
        let span = TimeSpan {
            start_s,
            end_s: start_s + work_s,
        };
        for id in first..=last {
            self.spans[id] = span;
            self.blame[id] = blame.map_or(NOBODY, |id| id as u32);
        }
        self.ends.push(Reverse(End {
            at_s: span.end_s,
            rank,
        }));
    }

    fn finish(self) -> Simulation {
        let schedule = self.index.schedule;
        let n_ranks = schedule.n_ranks;
        let done_s: Vec<f64> = self.free_s.clone();
        let all_done_s = done_s.iter().copied().fold(0.0, f64::max);
        let update_s = self.costs.update_s;
        let step_s = all_done_s + update_s;
        let replayed = memory::replay(schedule, self.costs);
        let mut busy_s = vec![0.0; n_ranks];
        let mut idle = vec![Vec::new(); n_ranks];
        let mut bubble = Bubble::default();
        let mut inner_bubble_s: f64 = 0.0;
        for rank in 0..n_ranks {
            let mut gaps = self.gaps(rank, &replayed[rank].before_bytes, &mut busy_s[rank]);
            let first_s = self.first_start_s(rank);
            inner_bubble_s = inner_bubble_s.max(done_s[rank] - first_s - busy_s[rank]);
            let (from_s, until_s, cause) = if self.costs.barrier {
                (done_s[rank], all_done_s, Cause::Barrier)
            } else {
                (done_s[rank] + update_s, step_s, Cause::Dependency)
            };
            push_idle(&mut gaps, from_s, until_s, cause);
            busy_s[rank] += update_s;
            for gap in &gaps {
                bubble.add(gap.cause, gap.span.seconds() / n_ranks as f64);
            }
            idle[rank] = gaps;
        }
        let spans = (0..n_ranks)
            .map(|rank| {
                self.spans[self.index.row_start[rank]..self.index.row_start[rank + 1]].to_vec()
            })
            .collect();
        let busiest_s = busy_s.iter().copied().fold(0.0, f64::max);
        Simulation {
            step_s,
            spans,
            bubble_s: step_s - busiest_s,
            busy_s,
            idle,
            bubble,
            inner_bubble_s,
            peak_bytes: replayed.iter().map(|rank| rank.peak_bytes).collect(),
            critical_path: self.critical_path(),
        }
    }

    fn first_start_s(&self, rank: usize) -> f64 {
        let range = self.index.row_start[rank]..self.index.row_start[rank + 1];
        self.spans[range].first().map_or(0.0, |span| span.start_s)
    }

    /// The idle spans of a rank before its actions, by cause.
    fn gaps(&self, rank: usize, before_bytes: &[f64], busy_s: &mut f64) -> Vec<Idle> {
        let row = &self.index.schedule.rows[rank];
        let mut gaps = Vec::new();
        let mut free_s = 0.0;
        let mut position = 0;
        while position < row.len() {
            let id = self.index.row_start[rank] + position;
            let span = self.spans[id];
            *busy_s += span.seconds();
            if span.start_s > free_s {
                let computed_s = match self.blame[id] {
                    NOBODY => free_s,
                    // A message from another rank: computed first, then on its way.
                    needed => self.spans[needed as usize]
                        .end_s
                        .clamp(free_s, span.start_s),
                };
                let room_s = self.waits_for_room_from(rank, position, before_bytes, span.start_s);
                let memory_s =
                    room_s.map_or(span.start_s, |room_s| room_s.clamp(free_s, span.start_s));
                push_idle(
                    &mut gaps,
                    free_s,
                    computed_s.min(memory_s),
                    Cause::Dependency,
                );
                push_idle(
                    &mut gaps,
                    computed_s.min(memory_s),
                    memory_s,
                    Cause::Communication,
                );
                push_idle(&mut gaps, memory_s, span.start_s, Cause::Memory);
            }
            free_s = span.end_s;
            position += if self.is_pair[id] { 2 } else { 1 };
        }
        gaps
    }

    /// The time from which the rank's next forward has its input and no room, if that is before
    /// `until_s`.
    fn waits_for_room_from(
        &self,
        rank: usize,
        position: usize,
        before_bytes: &[f64],
        until_s: f64,
    ) -> Option<f64> {
        let limit_bytes = self.costs.memory_limit_bytes?;
        let schedule = self.index.schedule;
        let row = &schedule.rows[rank];
        let forward = row[position..]
            .iter()
            .find(|action| action.kind == ActionKind::F)?;
        let needed_bytes = memory::forward_bytes(schedule, self.costs, *forward, false);
        if *forward == row[position]
            || before_bytes[position] + needed_bytes <= limit_bytes * (1.0 + 1e-9)
        {
            return None;
        }
        let mut ready_s: f64 = 0.0;
        self.index.each_dependency(*forward, |needed| {
            ready_s = ready_s.max(self.arrival_s[needed]);
        });
        (ready_s < until_s).then_some(ready_s)
    }

    fn critical_path(&self) -> Vec<(usize, usize)> {
        let ends = (0..self.spans.len()).max_by(|a, b| {
            let order = self.spans[*a].end_s.total_cmp(&self.spans[*b].end_s);
            order.then(b.cmp(a))
        });
        let mut path = Vec::new();
        let mut at = ends;
        while let Some(id) = at {
            path.push(self.index.place(id));
            at = Some(self.blame[id])
                .filter(|id| *id != NOBODY)
                .map(|id| id as usize);
        }
        path.reverse();
        path
    }
}

fn push_idle(gaps: &mut Vec<Idle>, start_s: f64, end_s: f64, cause: Cause) {
    if end_s > start_s {
        gaps.push(Idle {
            span: TimeSpan { start_s, end_s },
            cause,
        });
    }
}

/// The same order `n_steps` times over, microbatches numbered through: what ranks do when no
/// barrier stands between steps.
pub fn repeat(schedule: &Schedule, n_steps: usize) -> Schedule {
    let mut repeated = schedule.clone();
    repeated.n_microbatches *= n_steps;
    for (rank, row) in schedule.rows.iter().enumerate() {
        for step in 1..n_steps {
            let shift = (step * schedule.n_microbatches) as u32;
            repeated.rows[rank].extend(row.iter().map(|action| Action {
                microbatch: action.microbatch + shift,
                ..*action
            }));
            let pairs = schedule.pairs[rank].iter().map(|at| at + step * row.len());
            repeated.pairs[rank].extend(pairs);
        }
    }
    repeated
}

/// Seconds of a step in a long run: with a barrier all ranks begin together; without one, a rank
/// goes on to the next step as soon as it has updated (post-validation, zero bubble §4).
///
/// # Errors
/// As [`simulate`].
pub fn steady_step_s(schedule: &Schedule, costs: &Costs) -> Result<f64, PipelineError> {
    if costs.barrier {
        return Ok(simulate(schedule, costs)?.step_s);
    }
    if schedule.updates == Updates::EveryMicrobatch {
        // There is no end of a step at which ranks would drain: the slowest rank sets the pace.
        let busy_s = simulate(schedule, costs)?.busy_s;
        return Ok(busy_s.into_iter().fold(0.0, f64::max));
    }
    // The pattern of steps repeats once the slowest rank is busy throughout: after three steps here.
    let (short, long) = (repeat(schedule, 3), repeat(schedule, 5));
    let update_s = costs.update_s;
    let costs = Costs {
        update_s: 0.0,
        ..costs.clone()
    };
    let seconds = simulate(&long, &costs)?.step_s - simulate(&short, &costs)?.step_s;
    Ok(seconds / 2.0 + update_s)
}
