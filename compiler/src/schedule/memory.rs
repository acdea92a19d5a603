//! Memory of a schedule in bytes, and weight versions.
//!
//! Enters: a schedule and the costs of its stages. Leaves: what each rank holds before every action
//! and at most; which versions of weights asynchronous updates need.
//! Invariant: a rank's actions run one after another, so what it holds depends on its row alone.

use meshweave_dsl::schedule::{Action, ActionKind, Schedule, Updates};
use meshweave_dsl::units::Bytes;
use serde::{Deserialize, Serialize};

use super::PipelineError;
use super::index::Index;
use super::simulate::Costs;

/// What one rank holds: activations, and weight versions beyond the current one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankMemory {
    /// Before each action of the row.
    pub before_bytes: Vec<f64>,
    /// While each of them runs.
    pub while_bytes: Vec<f64>,
    /// While the action of that position runs, it is reached first.
    pub peak_position: usize,
    pub peak_bytes: f64,
}

/// Bytes that a forward adds. `recomputed`: only its input is kept until the recompute.
pub(super) fn forward_bytes(
    schedule: &Schedule,
    costs: &Costs,
    action: Action,
    recomputed: bool,
) -> f64 {
    let stage = &costs.stages[schedule.model_stage(action.stage)];
    let bytes = if recomputed {
        stage.checkpoint_bytes
    } else {
        stage.activation_bytes
    };
    bytes / schedule.n_slices as f64
}

/// Replays every row. Linear.
pub fn replay(schedule: &Schedule, costs: &Costs) -> Vec<RankMemory> {
    let index = Index::new(schedule);
    let versions = (schedule.updates == Updates::EveryMicrobatch).then(|| stashes(schedule));
    (0..schedule.n_ranks)
        .map(|rank| {
            let stashed = versions.as_ref().map(|versions| versions[rank].as_slice());
            replay_rank(&index, costs, rank, stashed)
        })
        .collect()
}

/// What an action adds before it runs and frees after it ran, in bytes: the sum over a microbatch is
/// zero.
pub(super) fn held_bytes(index: &Index, costs: &Costs, action: Action) -> (f64, f64) {
    let schedule = index.schedule;
    let stage = &costs.stages[schedule.model_stage(action.stage)];
    let n_slices = schedule.n_slices as f64;
    let has_recompute = index.id(action.with_kind(ActionKind::R)).is_some();
    let all = stage.activation_bytes / n_slices;
    let kept = forward_bytes(schedule, costs, action, has_recompute);
    let freed = stage.freed_by_input_bytes.min(stage.activation_bytes) / n_slices;
    match action.kind {
        // A recomputed forward holds everything while it runs.
        ActionKind::F => (all, all - kept),
        ActionKind::R => (all - kept, 0.0),
        ActionKind::B => (0.0, all),
        ActionKind::I => (0.0, freed),
        ActionKind::W => (0.0, all - freed),
    }
}

fn replay_rank(index: &Index, costs: &Costs, rank: usize, stashed: Option<&[f64]>) -> RankMemory {
    let schedule = index.schedule;
    let row = &schedule.rows[rank];
    let mut memory = RankMemory {
        before_bytes: Vec::with_capacity(row.len()),
        while_bytes: Vec::with_capacity(row.len()),
        peak_position: 0,
        peak_bytes: 0.0,
    };
    let weight_bytes = |stage: u32| costs.stages[schedule.model_stage(stage)].weight_bytes;
    let mut held = 0.0;
    for (position, action) in row.iter().enumerate() {
        let versions = stashed.map_or(0.0, |stashed| {
            stashed[position] * weight_bytes(action.stage)
        });
        memory.before_bytes.push(held + versions);
        let (added, freed) = held_bytes(index, costs, *action);
        held += added;
        memory.while_bytes.push(held + versions);
        if held + versions > memory.peak_bytes * (1.0 + 1e-12) {
            memory.peak_bytes = held + versions;
            memory.peak_position = position;
        }
        held -= freed;
    }
    memory
}

/// Per rank and position: versions of the action's stage that are kept beside the current one.
/// Exact for one stage a rank, which is what asynchronous schedules have.
fn stashes(schedule: &Schedule) -> Vec<Vec<f64>> {
    schedule
        .rows
        .iter()
        .map(|row| {
            let mut in_flight = 0usize;
            row.iter()
                .map(|action| match action.kind {
                    ActionKind::F => {
                        in_flight += 1;
                        in_flight.saturating_sub(1) as f64
                    }
                    kind if kind.gives_weight_gradient() => {
                        in_flight = in_flight.saturating_sub(1);
                        in_flight as f64
                    }
                    _ => in_flight.saturating_sub(1) as f64,
                })
                .collect()
        })
        .collect()
}

/// Checks that no rank holds more than `limit_bytes`.
///
/// # Errors
/// [`PipelineError::Infeasible`] with the rank, both figures and the grid around the peak.
pub fn check_memory(
    schedule: &Schedule,
    costs: &Costs,
    limit_bytes: f64,
) -> Result<(), PipelineError> {
    costs.fit(schedule)?;
    for (rank, memory) in replay(schedule, costs).iter().enumerate() {
        if memory.peak_bytes > limit_bytes * (1.0 + 1e-9) {
            let position = memory.peak_position;
            return Err(PipelineError::Infeasible(format!(
                "rank {rank} holds {} of activations at step {position} (`{}`), the limit is {}; recompute, \
                 offload, or take a schedule with fewer microbatches in flight (v-half, v-min)\n{}",
                amount(memory.peak_bytes),
                schedule.rows[rank][position],
                amount(limit_bytes),
                schedule.grid(&[(rank, position)])
            )));
        }
    }
    Ok(())
}

/// Bytes for people; small figures are counts of microbatches, as [`Costs::even`] gives them.
pub(super) fn amount(bytes: f64) -> String {
    if bytes < 1024.0 {
        format!("{bytes:.3}")
    } else {
        Bytes(bytes as u64).to_string()
    }
}

/// What asynchronous updates need and do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// Per stage: most versions of the weights alive at once, the current one included.
    pub n_versions: Vec<usize>,
    /// Per stage: most updates between the weights that a gradient was taken at and those that it
    /// is applied to. 0 where the schedule flushes.
    pub staleness: Vec<usize>,
}

/// Counts versions and staleness, and checks that both passes of a microbatch can see the same
/// version: with at most `n_kept` versions a stage where that is given. Linear.
///
/// # Errors
/// [`PipelineError::Invalid`] with the cell whose version is gone.
pub fn check_versions(
    schedule: &Schedule,
    n_kept: Option<usize>,
) -> Result<Versions, PipelineError> {
    let n_stages = schedule.stage_rank.len();
    let mut versions = Versions {
        n_versions: vec![1; n_stages],
        staleness: vec![0; n_stages],
    };
    if schedule.updates == Updates::Flush {
        return Ok(versions);
    }
    let mut n_updates = vec![0usize; n_stages];
    let mut seen = vec![vec![None; schedule.n_microbatches]; n_stages];
    for (rank, row) in schedule.rows.iter().enumerate() {
        for (position, action) in row.iter().enumerate() {
            let stage = action.stage as usize;
            let version = &mut seen[stage][action.microbatch as usize];
            match action.kind {
                ActionKind::F => *version = version.or(Some(n_updates[stage])),
                kind if kind.gives_weight_gradient() => {
                    let Some(at) = *version else {
                        return Err(PipelineError::Invalid(format!(
                            "`{action}` on rank {rank} at step {position} has no forward before it, so \
                             no version of the weights\n{}",
                            schedule.grid(&[(rank, position)])
                        )));
                    };
                    let staleness = n_updates[stage] - at;
                    versions.staleness[stage] = versions.staleness[stage].max(staleness);
                    versions.n_versions[stage] = versions.n_versions[stage].max(staleness + 1);
                    if let Some(n_kept) = n_kept.filter(|n_kept| staleness + 1 > *n_kept) {
                        return Err(PipelineError::Invalid(format!(
                            "`{action}` on rank {rank} at step {position} needs the weights of its \
                             forward, {staleness} updates ago, and {n_kept} versions are kept; keep {}\n{}",
                            staleness + 1,
                            schedule.grid(&[(rank, position)])
                        )));
                    }
                    n_updates[stage] += 1;
                }
                _ => {}
            }
        }
    }
    Ok(versions)
}
