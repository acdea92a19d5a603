//! Fills the gaps of a schedule with work that stands further back.
//!
//! Enters: a schedule, costs, and the memory it may use. Leaves: a schedule of the same actions
//! that takes no longer and holds no more.
//! Invariant: an action moves forward only into a gap in which it is ready, fits in time and leaves
//! room for everything between its new and its old place. Known from batch queues as backfilling.

use meshweave_dsl::schedule::{Action, ActionKind, Schedule};

use super::PipelineError;
use super::index::Index;
use super::memory::{forward_bytes, replay};
use super::simulate::{Costs, Simulation, simulate};

/// Passes over all ranks before the pass that finds nothing.
const MAX_PASSES: usize = 12;

/// Fills gaps while that shortens the step, at no more memory than the limit of `costs`, or, where
/// that has none, than the schedule holds already. `O(passes · n · P)`.
///
/// # Errors
/// As [`simulate`].
pub fn backfill(schedule: &Schedule, costs: &Costs) -> Result<Schedule, PipelineError> {
    let mut best = schedule.clone();
    let mut simulation = simulate(&best, costs)?;
    let limit_bytes = costs
        .memory_limit_bytes
        .unwrap_or(0.0)
        .max(simulation.peak());
    for _ in 0..MAX_PASSES {
        let Some(filled) = pass(&best, &simulation, costs, limit_bytes) else {
            break;
        };
        let again = simulate(&filled, costs)?;
        // A pass that shortens nothing may open the gap that the next one fills.
        if again.step_s > simulation.step_s * (1.0 + 1e-12) {
            break;
        }
        best = filled;
        simulation = again;
    }
    Ok(best)
}

/// After a rank's last forward, input gradients first: other ranks wait for them, and nothing adds to
/// the rank's memory any more. Weight gradients go to the end, from where [`backfill`] takes them.
pub(super) fn hasten_drain(schedule: &Schedule) -> Schedule {
    let mut hastened = schedule.clone();
    for (row, pairs) in hastened.rows.iter_mut().zip(&schedule.pairs) {
        let is_forward = |action: &Action| action.kind == ActionKind::F;
        let Some(last) = row
            .iter()
            .rposition(is_forward)
            .filter(|_| pairs.is_empty())
        else {
            continue;
        };
        row[last + 1..].sort_by_key(|action| action.kind == ActionKind::W);
    }
    hastened
}

/// One pass: every rank fills its gaps by the times of the last simulation. `None` when nothing
/// moves.
fn pass(
    schedule: &Schedule,
    simulation: &Simulation,
    costs: &Costs,
    limit_bytes: f64,
) -> Option<Schedule> {
    let index = Index::new(schedule);
    let memories = replay(schedule, costs);
    let mut filled = schedule.clone();
    let mut has_moved = false;
    for (rank, memory) in memories.iter().enumerate() {
        // Pairs are left alone: their order is their point.
        if !schedule.pairs[rank].is_empty() {
            continue;
        }
        let mut row = Row {
            index: &index,
            simulation,
            costs,
            limit_bytes,
            rank,
            moved_to: vec![None; schedule.rows[rank].len()],
            added: vec![0.0; schedule.rows[rank].len() + 1],
            before_bytes: &memory.before_bytes,
        };
        has_moved |= row.fill();
        filled.rows[rank] = row.order();
    }
    has_moved.then_some(filled)
}

struct Row<'a> {
    index: &'a Index<'a>,
    simulation: &'a Simulation,
    costs: &'a Costs,
    limit_bytes: f64,
    rank: usize,
    /// By old position: the position before whose action it goes, and the order among those.
    moved_to: Vec<Option<(usize, usize)>>,
    /// Bytes that moved forwards hold additionally before each position.
    added: Vec<f64>,
    before_bytes: &'a [f64],
}

impl Row<'_> {
    fn actions(&self) -> &[Action] {
        &self.index.schedule.rows[self.rank]
    }

    fn fill(&mut self) -> bool {
        let spans = &self.simulation.spans[self.rank];
        let n_actions = spans.len();
        let mut free_s = 0.0;
        let mut has_moved = false;
        // The first position from which each kind of work may still be found.
        let mut from = [0usize; 3];
        for position in 0..n_actions {
            if self.moved_to[position].is_some() {
                // Its time is free now; the action behind it can only begin earlier.
                continue;
            }
            let until_s = spans[position].start_s;
            let mut nth = 0;
            while until_s > free_s * (1.0 + 1e-12) {
                let Some(found) = self.candidate(position, free_s, until_s, &mut from) else {
                    break;
                };
                let span = spans[found];
                free_s = free_s.max(self.ready_s(found)) + span.seconds();
                self.take(found, position, nth);
                nth += 1;
                has_moved = true;
            }
            free_s = spans[position].end_s;
        }
        has_moved
    }

    /// When all that an action waits for is there, by the last simulation.
    fn ready_s(&self, position: usize) -> f64 {
        let mut ready_s: f64 = 0.0;
        let simulation = self.simulation;
        let (index, costs) = (self.index, self.costs);
        index.each_dependency(self.actions()[position], |needed| {
            let (rank, at) = index.place(needed);
            let action = index.schedule.rows[rank][at];
            let message_s = match index.receiver(action) {
                Some(to) if to == self.rank => costs.message_s(index.schedule, action),
                _ => 0.0,
            };
            ready_s = ready_s.max(simulation.spans[rank][at].end_s + message_s);
        });
        ready_s
    }

    /// The first forward, input gradient or weight gradient after `position` that fits between.
    fn candidate(
        &self,
        position: usize,
        free_s: f64,
        until_s: f64,
        from: &mut [usize; 3],
    ) -> Option<usize> {
        // Weight gradients come last: they are the only work that nobody waits for.
        let groups: [fn(ActionKind) -> bool; 3] = [
            |kind| kind.gives_input_gradient() || kind == ActionKind::R,
            |kind| kind == ActionKind::F,
            |kind| kind == ActionKind::W,
        ];
        for (group, is_of_group) in groups.into_iter().enumerate() {
            from[group] = from[group].max(position + 1);
            let mut seen_stages: Vec<u32> = Vec::new();
            let mut is_first = true;
            for found in from[group]..self.actions().len() {
                let action = self.actions()[found];
                if self.moved_to[found].is_some() || !is_of_group(action.kind) {
                    continue;
                }
                if is_first {
                    from[group] = found;
                    is_first = false;
                }
                // The order of one stage's microbatches stays.
                if seen_stages.contains(&action.stage) {
                    if seen_stages.len() >= self.n_stages() {
                        break;
                    }
                    continue;
                }
                seen_stages.push(action.stage);
                let begin_s = free_s.max(self.ready_s(found));
                let end_s = begin_s + self.simulation.spans[self.rank][found].seconds();
                if end_s <= until_s * (1.0 + 1e-9) && self.has_room(found, position) {
                    return Some(found);
                }
                if seen_stages.len() >= self.n_stages() {
                    break;
                }
            }
        }
        None
    }

    fn n_stages(&self) -> usize {
        self.index.schedule.stages_of(self.rank).count()
    }

    /// Whether what an action adds fits from its new place to its old one.
    fn has_room(&self, found: usize, position: usize) -> bool {
        let action = self.actions()[found];
        if action.kind != ActionKind::F {
            return true;
        }
        let schedule = self.index.schedule;
        let bytes = forward_bytes(schedule, self.costs, action, false);
        (position..=found).all(|at| {
            let own = match self.actions()[at].kind {
                // While it runs, a forward adds its own bytes.
                ActionKind::F if at != found && self.moved_to[at].is_none() => {
                    forward_bytes(schedule, self.costs, self.actions()[at], false)
                }
                _ => 0.0,
            };
            self.before_bytes[at] + self.added[at] + bytes + own <= self.limit_bytes * (1.0 + 1e-9)
        })
    }

    fn take(&mut self, found: usize, position: usize, nth: usize) {
        self.moved_to[found] = Some((position, nth));
        let action = self.actions()[found];
        if action.kind == ActionKind::F {
            let bytes = forward_bytes(self.index.schedule, self.costs, action, false);
            for at in position..=found {
                self.added[at] += bytes;
            }
        }
    }

    fn order(&self) -> Vec<Action> {
        let mut keyed: Vec<((usize, usize, usize), Action)> = self
            .actions()
            .iter()
            .enumerate()
            .map(|(position, action)| match self.moved_to[position] {
                Some((before, nth)) => ((before, 0, nth), *action),
                None => ((position, 1, 0), *action),
            })
            .collect();
        keyed.sort_by_key(|(key, _)| *key);
        keyed.into_iter().map(|(_, action)| action).collect()
    }
}
