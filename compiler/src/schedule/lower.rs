//! Communication and memory actions between the compute actions.
//!
//! Enters: a checked schedule and what to add. Leaves: a [`Lowered`].
//! Invariant: every result that another rank waits for has one send and one receive. In [`lower`]
//! the sender places both, in the order of its sends, so each rank names the messages of a channel
//! in the order of its peer: no channel model deadlocks. [`lower_naively`] lets each side place its
//! own, which deadlocks for most schedules; it is there to be refused.

use meshweave_dsl::schedule::{
    Action, ActionKind, Channels, Command, Lowered, Schedule, Updates, Verb, Wire,
};
use serde::{Deserialize, Serialize};

use super::PipelineError;
use super::index::Index;

/// What to add beside sends and receives.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lowering {
    pub channels: Channels,
    /// Weights are divided over data parallelism (ZeRO-3): gather them before use, and keep those
    /// of so many stages of a rank gathered at once.
    pub unsharded_stages: Option<usize>,
    /// Reduce gradients over data parallelism, and over copies, after a stage's last backward.
    pub reduce_gradients: bool,
    /// Stages whose activations rest on the host between forward and backward.
    pub offloaded_stages: Vec<u32>,
    /// Wait for all ranks before updates.
    pub barrier: bool,
    /// Update weights at the end (or after every microbatch, where the schedule says so).
    pub update: bool,
}

/// Places sends with their receives where the sender computes, and the other actions. Linear.
///
/// # Errors
/// [`PipelineError::Invalid`] when an option names a stage that is not there, or the schedule
/// cannot run.
pub fn lower(schedule: &Schedule, lowering: &Lowering) -> Result<Lowered, PipelineError> {
    let n_stages = schedule.stage_rank.len();
    if let Some(stage) = lowering
        .offloaded_stages
        .iter()
        .find(|stage| **stage as usize >= n_stages)
    {
        return Err(PipelineError::Invalid(format!(
            "stage {stage} is offloaded and there are {n_stages}; they count from 0"
        )));
    }
    let index = Index::new(schedule);
    let mut rows: Vec<Vec<Command>> = vec![Vec::new(); schedule.n_ranks];
    for id in running_order(&index)? {
        let (rank, _) = index.place(id);
        let action = index.action(id);
        rows[rank].push(action.into());
        if let Some(to) = index.receiver(action) {
            let (send, receive) = message(schedule, action);
            rows[rank].push(send);
            rows[to].push(receive);
        }
    }
    let rows = rows
        .into_iter()
        .map(|row| with_memory(schedule, lowering, row))
        .collect();
    Ok(Lowered {
        schedule: schedule.clone(),
        channels: lowering.channels,
        rows,
    })
}

/// Each side places its own: the receive before its reader, the send after its writer. Linear.
pub fn lower_naively(schedule: &Schedule, channels: Channels) -> Lowered {
    let index = Index::new(schedule);
    let row = |(rank, row): (usize, &Vec<Action>)| {
        let mut commands = Vec::new();
        for action in row {
            index.each_dependency(*action, |needed| {
                let needed = index.action(needed);
                if index.receiver(needed) == Some(rank) && needed.stage != action.stage {
                    commands.push(message(schedule, needed).1);
                }
            });
            commands.push((*action).into());
            if index.receiver(*action).is_some() {
                commands.push(message(schedule, *action).0);
            }
        }
        commands
    };
    Lowered {
        rows: schedule.rows.iter().enumerate().map(row).collect(),
        schedule: schedule.clone(),
        channels,
    }
}

/// The send of an action's result, and the receive in the neighboring stage.
fn message(schedule: &Schedule, action: Action) -> (Command, Command) {
    let (wire, stage) = match action.kind {
        ActionKind::F => (Wire::F, schedule.stage_after(action.stage)),
        _ => (Wire::B, schedule.stage_before(action.stage)),
    };
    let at = action.at_stage(stage.unwrap_or(action.stage));
    (
        Command::beside(action, Verb::Send(wire)),
        Command::beside(at, Verb::Recv(wire)),
    )
}

/// Ids of all actions in an order in which they can run: by the step that each could take at
/// earliest if every action took one step, then by rank.
pub(super) fn running_order(index: &Index) -> Result<Vec<usize>, PipelineError> {
    let schedule = index.schedule;
    let n_actions = index.n_actions();
    let mut order = Vec::with_capacity(n_actions);
    let mut step_done = vec![u32::MAX; n_actions];
    let mut next = vec![0usize; schedule.n_ranks];
    let mut step = 0u32;
    while order.len() < n_actions {
        let before = order.len();
        for (rank, next) in next.iter_mut().enumerate() {
            let Some(action) = schedule.rows[rank].get(*next) else {
                continue;
            };
            let mut is_ready = true;
            index.each_dependency(*action, |needed| {
                is_ready &= step_done[needed] < step;
            });
            if is_ready {
                let id = index.row_start[rank] + *next;
                step_done[id] = step;
                *next += 1;
                order.push(id);
            }
        }
        if order.len() == before {
            return Err(PipelineError::Invalid(format!(
                "schedule `{}` cannot run: {} of {n_actions} actions wait for each other; `check` shows \
                 the cycle",
                schedule.name,
                n_actions - before
            )));
        }
        step += 1;
    }
    Ok(order)
}

/// Adds gathering, freeing, offloading, reduction and update to one rank's commands.
fn with_memory(schedule: &Schedule, lowering: &Lowering, row: Vec<Command>) -> Vec<Command> {
    let last_gradient = |stage: u32| {
        row.iter().rposition(|command| {
            let action = command.action();
            action
                .is_some_and(|action| action.stage == stage && action.kind.gives_weight_gradient())
        })
    };
    let mut stages: Vec<u32> = row
        .iter()
        .filter_map(|command| command.action())
        .map(|a| a.stage)
        .collect();
    stages.sort_unstable();
    stages.dedup();
    let last: Vec<(usize, u32)> = stages
        .iter()
        .filter_map(|stage| last_gradient(*stage).map(|at| (at, *stage)))
        .collect();
    let is_offloaded = |stage: u32| lowering.offloaded_stages.contains(&stage);
    let mut commands = Vec::with_capacity(row.len());
    // Gathered stages, the one used longest ago first.
    let mut gathered: Vec<u32> = Vec::new();
    for (position, command) in row.iter().enumerate() {
        let Some(action) = command.action() else {
            commands.push(*command);
            continue;
        };
        let stage = action.stage;
        if let Some(n_gathered) = lowering.unsharded_stages {
            if let Some(at) = gathered.iter().position(|other| *other == stage) {
                gathered.remove(at);
            } else {
                while gathered.len() >= n_gathered.max(1) {
                    commands.push(Command::of_stage(gathered.remove(0), Verb::Reshard));
                }
                commands.push(Command::of_stage(stage, Verb::Unshard));
            }
            gathered.push(stage);
        }
        if is_offloaded(stage) && action.kind.gives_input_gradient() {
            commands.push(Command::beside(action, Verb::Prefetch));
        }
        commands.push(*command);
        if is_offloaded(stage) && action.kind == ActionKind::F {
            commands.push(Command::beside(action, Verb::Offload));
        }
        if schedule.updates == Updates::EveryMicrobatch {
            if lowering.update && action.kind.gives_weight_gradient() {
                commands.push(Command::beside(action, Verb::Update));
            }
        } else if last.contains(&(position, stage)) && lowering.reduce_gradients {
            commands.push(Command::of_stage(stage, Verb::ReduceGrad));
        }
    }
    commands.extend(
        gathered
            .iter()
            .map(|stage| Command::of_stage(*stage, Verb::Reshard)),
    );
    if schedule.updates == Updates::Flush {
        if lowering.barrier && !stages.is_empty() {
            commands.push(Command::of_stage(stages[0], Verb::Barrier));
        }
        if lowering.update {
            commands.extend(
                stages
                    .iter()
                    .map(|stage| Command::of_stage(*stage, Verb::Update)),
            );
        }
    }
    commands
}
