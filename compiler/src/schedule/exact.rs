//! The shortest schedule of a small pipeline, proven: the check of what the search finds.
//!
//! Enters: stages and a memory limit. Leaves: an optimum.
//! Invariant: complete up to the order of equal microbatches, which may be exchanged. Actions are
//! decided in order of their start; a state that another one reached with the same work done, no
//! later on any rank and with no result later, is left out.

use std::collections::HashMap;

use meshweave_dsl::schedule::{Action, ActionKind, Schedule};

use super::PipelineError;
use super::builtin::Shape;
use super::search::{SearchOptions, Stages};
use super::simulate::StageCosts;

/// A proven optimum.
#[derive(Clone, Debug, PartialEq)]
pub struct Optimum {
    pub schedule: Schedule,
    pub step_s: f64,
    /// States looked at.
    pub n_states: usize,
}

const KINDS: [ActionKind; 3] = [ActionKind::F, ActionKind::I, ActionKind::W];

/// Begun work of every stage: forwards, input gradients, weight gradients.
type Counts = Vec<[u8; 3]>;

#[derive(Clone)]
struct State {
    counts: Counts,
    free_s: Vec<f64>,
    /// Per stage: ends of forwards and input gradients, by microbatch.
    ends_s: Vec<[Vec<f64>; 2]>,
    held_bytes: Vec<f64>,
    last_s: f64,
}

struct Exact<'a> {
    stages: &'a [StageCosts],
    latency_s: f64,
    stage_rank: Vec<usize>,
    n_microbatches: usize,
    limit_bytes: f64,
    max_states: usize,
    n_states: usize,
    seen: HashMap<Counts, Vec<Vec<f64>>>,
    best_s: f64,
    best: Vec<Vec<Action>>,
    path: Vec<(usize, Action)>,
}

/// The schedule of least predicted step for one placement, without link contention. Exponential:
/// for pipelines of a few ranks and microbatches.
///
/// # Errors
/// [`PipelineError::Exhausted`] after `max_states` states; [`PipelineError::Infeasible`] when not
/// even one microbatch at a time fits.
pub fn optimum(
    stages: &Stages,
    options: &SearchOptions,
    upper_bound_s: f64,
    max_states: usize,
) -> Result<Optimum, PipelineError> {
    let shape = Shape::new(options.n_ranks, options.n_microbatches).chunks(stages.n_chunks);
    shape.check()?;
    let stage_rank = stages.placement.stage_rank(&shape);
    let n_stages = stages.costs.stages.len();
    if stage_rank.len() != n_stages || options.n_microbatches > usize::from(u8::MAX) {
        return Err(PipelineError::Invalid(format!(
            "costs of {n_stages} stages are given for {} places",
            stage_rank.len()
        )));
    }
    let mut exact = Exact {
        stages: &stages.costs.stages,
        latency_s: stages.costs.latency_s,
        stage_rank: stage_rank.clone(),
        n_microbatches: options.n_microbatches,
        limit_bytes: options.memory_limit_bytes.unwrap_or(f64::INFINITY) * (1.0 + 1e-9),
        max_states,
        n_states: 0,
        seen: HashMap::new(),
        best_s: upper_bound_s * (1.0 + 1e-9),
        best: Vec::new(),
        path: Vec::new(),
    };
    let nothing = || {
        [
            vec![f64::NAN; options.n_microbatches],
            vec![f64::NAN; options.n_microbatches],
        ]
    };
    let start = State {
        counts: vec![[0; 3]; n_stages],
        free_s: vec![0.0; options.n_ranks],
        ends_s: (0..n_stages).map(|_| nothing()).collect(),
        held_bytes: vec![0.0; options.n_ranks],
        last_s: 0.0,
    };
    exact.visit(&start);
    if exact.n_states >= max_states {
        return Err(PipelineError::Exhausted(format!(
            "the exact search looked at {max_states} states and is not done; take fewer ranks or \
             microbatches, or the heuristic search"
        )));
    }
    if exact.best.is_empty() {
        return Err(PipelineError::Infeasible(format!(
            "no order takes at most {upper_bound_s} s and holds at most {} bytes",
            exact.limit_bytes
        )));
    }
    Ok(Optimum {
        schedule: Schedule::new("optimum", options.n_microbatches, stage_rank, exact.best),
        step_s: exact.best_s,
        n_states: exact.n_states,
    })
}

impl Exact<'_> {
    fn visit(&mut self, state: &State) {
        self.n_states += 1;
        if self.n_states >= self.max_states {
            return;
        }
        let bound_s = self.bound_s(state);
        if bound_s >= self.best_s * (1.0 - 1e-9) && !self.best.is_empty() || bound_s > self.best_s {
            return;
        }
        if state.counts.iter().all(|counts| {
            counts
                .iter()
                .all(|n| usize::from(*n) == self.n_microbatches)
        }) {
            self.best_s = state.free_s.iter().copied().fold(0.0, f64::max);
            self.best = vec![Vec::new(); state.free_s.len()];
            for (rank, action) in &self.path {
                self.best[*rank].push(*action);
            }
            return;
        }
        if self.is_dominated(state) {
            return;
        }
        let mut moves: Vec<(f64, usize, usize)> = Vec::new();
        for stage in 0..self.stages.len() {
            for nth in 0..KINDS.len() {
                if let Some(start_s) = self.start_s(state, stage, nth) {
                    moves.push((start_s, stage, nth));
                }
            }
        }
        // Early starts first; input gradients before forwards before weight gradients.
        moves.sort_by(|a, b| {
            let rank_of = |nth: usize| [1, 0, 2][nth];
            a.0.total_cmp(&b.0)
                .then(rank_of(a.2).cmp(&rank_of(b.2)))
                .then(b.1.cmp(&a.1))
        });
        for (start_s, stage, nth) in moves {
            if start_s < state.last_s - 1e-12 {
                continue;
            }
            let next = self.after(state, stage, nth, start_s);
            let microbatch = u32::from(state.counts[stage][nth]);
            let action = Action::new(stage as u32, KINDS[nth], microbatch);
            self.path.push((self.stage_rank[stage], action));
            self.visit(&next);
            self.path.pop();
        }
    }

    /// Every rank still has its own work, and its last microbatch has to come back.
    fn bound_s(&self, state: &State) -> f64 {
        let n = self.n_microbatches as f64;
        let left_s = |stage: usize| {
            let [f, i, w] = state.counts[stage].map(f64::from);
            let costs = &self.stages[stage];
            (n - f) * costs.forward_s
                + (n - i) * costs.backward_input_s
                + (n - w) * costs.backward_weight_s
        };
        let mut bound_s: f64 = 0.0;
        for (rank, free_s) in state.free_s.iter().enumerate() {
            let stages = (0..self.stages.len()).filter(|stage| self.stage_rank[*stage] == rank);
            let work_s: f64 = stages.map(left_s).sum();
            let from_s = if work_s > 0.0 {
                free_s.max(state.last_s)
            } else {
                *free_s
            };
            bound_s = bound_s.max(from_s + work_s);
        }
        bound_s
    }

    fn is_dominated(&mut self, state: &State) -> bool {
        let mut times: Vec<f64> = state.free_s.clone();
        times.push(state.last_s);
        for (ends, counts) in state.ends_s.iter().zip(&state.counts) {
            for (nth, ends) in ends.iter().enumerate() {
                times.extend(&ends[..usize::from(counts[nth])]);
            }
        }
        // What is past on its reader's rank no longer matters.
        let known = self.seen.entry(state.counts.clone()).or_default();
        let no_later = |other: &Vec<f64>| other.iter().zip(&times).all(|(a, b)| *a <= *b + 1e-12);
        if known.iter().any(no_later) {
            return true;
        }
        known.retain(|other| !times.iter().zip(other).all(|(a, b)| *a <= *b + 1e-12));
        known.push(times);
        false
    }

    /// When a stage's next action of a kind can begin; `None` when it cannot be next.
    fn start_s(&self, state: &State, stage: usize, nth: usize) -> Option<f64> {
        let counts = &state.counts[stage];
        let microbatch = usize::from(counts[nth]);
        if microbatch >= self.n_microbatches {
            return None;
        }
        let rank = self.stage_rank[stage];
        let message_s = |from: usize, boundary: usize| {
            if self.stage_rank[from] == rank {
                0.0
            } else {
                self.stages[boundary].p2p_s + self.latency_s
            }
        };
        let needed_s = match nth {
            0 => {
                let bytes = self.stages[stage].activation_bytes;
                if state.held_bytes[rank] + bytes > self.limit_bytes {
                    return None;
                }
                match stage.checked_sub(1) {
                    None => 0.0,
                    Some(before) => state.ends_s[before][0][microbatch] + message_s(before, before),
                }
            }
            1 => {
                let forward_s = state.ends_s[stage][0][microbatch];
                match stage + 1 {
                    after if after < self.stages.len() => {
                        let gradient_s =
                            state.ends_s[after][1][microbatch] + message_s(after, stage);
                        if gradient_s.is_nan() {
                            return None;
                        }
                        forward_s.max(gradient_s)
                    }
                    _ => forward_s,
                }
            }
            _ => state.ends_s[stage][1][microbatch],
        };
        (!needed_s.is_nan()).then(|| needed_s.max(state.free_s[rank]))
    }

    fn after(&self, state: &State, stage: usize, nth: usize, start_s: f64) -> State {
        let mut next = state.clone();
        let costs = &self.stages[stage];
        let rank = self.stage_rank[stage];
        let microbatch = usize::from(next.counts[stage][nth]);
        next.counts[stage][nth] += 1;
        let (seconds, bytes) = match nth {
            0 => (costs.forward_s, costs.activation_bytes),
            1 => (costs.backward_input_s, -costs.freed_by_input_bytes),
            _ => (
                costs.backward_weight_s,
                costs.freed_by_input_bytes - costs.activation_bytes,
            ),
        };
        let end_s = start_s + seconds;
        next.free_s[rank] = end_s;
        next.held_bytes[rank] += bytes;
        next.last_s = start_s;
        if nth < 2 {
            next.ends_s[stage][nth][microbatch] = end_s;
        }
        next
    }
}
