//! Whether a schedule is complete and can run at all.
//!
//! Rules, in the order of the checks:
//! 1. The shape fits: a rank for every stage of every copy, a row and a stage for every rank.
//! 2. Every action is of an existing stage, microbatch and slice, and stands on its stage's rank;
//!    a microbatch runs through its own copy of the model.
//! 3. Completeness is a multiset: every (stage, microbatch, slice) has exactly one `F`, and exactly
//!    one `B` or one `I` and one `W`; at most one `R`.
//! 4. Overlapped pairs are neighbors, apart from each other, and independent.
//! 5. Nothing waits for what its own rank does later, and ranks do not wait for each other in a
//!    cycle.
//!
//! Enters: a schedule. Leaves: nothing, or the first broken rule with the grid around it.

use std::collections::HashMap;

use meshweave_dsl::schedule::{Action, ActionKind, Schedule};

use super::PipelineError;
use super::index::Index;

/// Checks all rules. Linear.
///
/// # Errors
/// [`PipelineError::Invalid`] with the message and the step × rank grid, offending cells marked.
pub fn check(schedule: &Schedule) -> Result<(), PipelineError> {
    shape(schedule)?;
    cells(schedule)?;
    let index = Index::new(schedule);
    completeness(&index)?;
    pairs(&index)?;
    progress(&index)
}

fn invalid(schedule: &Schedule, message: String, marks: &[(usize, usize)]) -> PipelineError {
    PipelineError::Invalid(format!("{message}\n{}", schedule.grid(marks)))
}

fn shape(schedule: &Schedule) -> Result<(), PipelineError> {
    let n_places = schedule.n_stages * schedule.n_copies;
    let counts = [
        ("stages", schedule.n_stages),
        ("copies", schedule.n_copies),
        ("microbatches", schedule.n_microbatches),
        ("slices", schedule.n_slices),
        ("ranks", schedule.n_ranks),
    ];
    let problem = if let Some((what, _)) = counts.iter().find(|(_, count)| *count == 0) {
        Some(format!("has 0 {what}"))
    } else if schedule.stage_rank.len() != n_places {
        Some(format!(
            "places {} stages and has {} stages × {} copies = {n_places}",
            schedule.stage_rank.len(),
            schedule.n_stages,
            schedule.n_copies
        ))
    } else if schedule.rows.len() != schedule.n_ranks || schedule.pairs.len() != schedule.n_ranks {
        Some(format!(
            "has {} rows for {} ranks",
            schedule.rows.len(),
            schedule.n_ranks
        ))
    } else {
        let mut places = schedule.stage_rank.iter().enumerate();
        let beyond = places.find(|(_, rank)| **rank >= schedule.n_ranks);
        let idle = || (0..schedule.n_ranks).find(|rank| !schedule.stage_rank.contains(rank));
        match beyond {
            Some((stage, rank)) => Some(format!(
                "puts stage {stage} on rank {rank} of {}",
                schedule.n_ranks
            )),
            None => idle().map(|rank| {
                format!(
                    "leaves rank {rank} of {} without a stage; place one there, or take fewer ranks",
                    schedule.n_ranks
                )
            }),
        }
    };
    match problem {
        Some(problem) => Err(PipelineError::Invalid(format!(
            "schedule `{}` {problem}",
            schedule.name
        ))),
        None => Ok(()),
    }
}

/// Rule 2, and that no action stands twice.
fn cells(schedule: &Schedule) -> Result<(), PipelineError> {
    let mut seen: HashMap<Action, (usize, usize)> = HashMap::with_capacity(schedule.n_actions());
    for (rank, row) in schedule.rows.iter().enumerate() {
        for (position, action) in row.iter().enumerate() {
            let at = (rank, position);
            let bounds = [
                ("stage", action.stage as usize, schedule.stage_rank.len()),
                (
                    "microbatch",
                    action.microbatch as usize,
                    schedule.n_microbatches,
                ),
                ("slice", action.slice as usize, schedule.n_slices),
            ];
            if let Some((what, value, bound)) =
                bounds.iter().find(|(_, value, bound)| value >= bound)
            {
                let message = format!(
                    "`{action}` on rank {rank} at step {position} is of {what} {value} and there are \
                     {bound}; they count from 0"
                );
                return Err(invalid(schedule, message, &[at]));
            }
            let home = schedule.stage_rank[action.stage as usize];
            if home != rank {
                let message = format!(
                    "`{action}` stands on rank {rank} at step {position} and stage {} is on rank \
                     {home}; move it there",
                    action.stage
                );
                return Err(invalid(schedule, message, &[at]));
            }
            let copy = action.stage as usize / schedule.n_stages;
            if schedule.copy_of(action.microbatch) != copy {
                let message = format!(
                    "`{action}` on rank {rank} at step {position} is of copy {copy} and microbatch {} \
                     runs through copy {}",
                    action.microbatch,
                    schedule.copy_of(action.microbatch)
                );
                return Err(invalid(schedule, message, &[at]));
            }
            if let Some(first) = seen.insert(*action, at) {
                let message = format!(
                    "`{action}` stands twice on rank {rank}, at step {} and at step {position}; remove one",
                    first.1
                );
                return Err(invalid(schedule, message, &[first, at]));
            }
        }
    }
    Ok(())
}

/// Rule 3.
fn completeness(index: &Index) -> Result<(), PipelineError> {
    let schedule = index.schedule;
    for (stage, rank) in schedule.stage_rank.iter().enumerate() {
        let stage = stage as u32;
        for microbatch in schedule.microbatches_of(stage) {
            for slice in 0..schedule.n_slices as u32 {
                let of = |kind| Action {
                    slice,
                    ..Action::new(stage, kind, microbatch)
                };
                let place = |kind| index.id(of(kind)).map(|id| index.place(id));
                let missing = |kind: ActionKind, beside: &[Option<(usize, usize)>]| {
                    let marks: Vec<(usize, usize)> = beside.iter().flatten().copied().collect();
                    let message = format!(
                        "`{}` is missing on rank {rank}; every microbatch has one F, and one B or one I \
                         and one W, in every stage",
                        of(kind)
                    );
                    invalid(schedule, message, &marks)
                };
                let (forward, full) = (place(ActionKind::F), place(ActionKind::B));
                let (input, weight) = (place(ActionKind::I), place(ActionKind::W));
                if forward.is_none() {
                    return Err(missing(ActionKind::F, &[full, input, weight]));
                }
                match (full, input, weight) {
                    (Some(_), None, None) | (None, Some(_), Some(_)) => {}
                    (None, None, None) => return Err(missing(ActionKind::B, &[forward])),
                    (None, Some(_), None) => return Err(missing(ActionKind::W, &[input])),
                    (None, None, Some(_)) => return Err(missing(ActionKind::I, &[weight])),
                    (Some(full), input, weight) => {
                        let marks: Vec<(usize, usize)> =
                            [Some(full), input, weight].into_iter().flatten().collect();
                        let half = if input.is_some() {
                            ActionKind::I
                        } else {
                            ActionKind::W
                        };
                        let message = format!(
                            "rank {rank} has both `{}` and `{}`; the full backward is both halves, \
                             remove one of them",
                            of(ActionKind::B),
                            of(half)
                        );
                        return Err(invalid(schedule, message, &marks));
                    }
                }
            }
        }
    }
    Ok(())
}

/// Rule 4.
fn pairs(index: &Index) -> Result<(), PipelineError> {
    let schedule = index.schedule;
    for (rank, pairs) in schedule.pairs.iter().enumerate() {
        let row = &schedule.rows[rank];
        let mut free = 0;
        for &position in pairs {
            let (Some(first), Some(second)) = (row.get(position), row.get(position + 1)) else {
                let message = format!(
                    "rank {rank} overlaps steps {position} and {} of {}",
                    position + 1,
                    row.len()
                );
                return Err(invalid(schedule, message, &[]));
            };
            if position < free {
                let message = format!(
                    "`{first}` on rank {rank} at step {position} is in two overlapped pairs; pairs are \
                     listed in order and share no action"
                );
                return Err(invalid(schedule, message, &[(rank, position)]));
            }
            let first_id = index.row_start[rank] + position;
            let mut depends = false;
            index.each_dependency(*second, |needed| depends |= needed == first_id);
            if depends {
                let message = format!(
                    "`{second}` waits for `{first}` and rank {rank} overlaps them at step {position}"
                );
                let marks = [(rank, position), (rank, position + 1)];
                return Err(invalid(schedule, message, &marks));
            }
            free = position + 2;
        }
    }
    Ok(())
}

/// Rule 5: runs every rank as far as it comes, until all are done or nobody moves.
fn progress(index: &Index) -> Result<(), PipelineError> {
    let schedule = index.schedule;
    let n_ranks = schedule.n_ranks;
    let mut next = vec![0usize; n_ranks];
    let mut is_done = vec![false; index.n_actions()];
    let mut waiter: HashMap<usize, usize> = HashMap::new();
    let mut todo: Vec<usize> = (0..n_ranks).rev().collect();
    while let Some(rank) = todo.pop() {
        while let Some(action) = schedule.rows[rank].get(next[rank]) {
            if let Some(needed) = first_missing(index, *action, &is_done) {
                waiter.insert(needed, rank);
                break;
            }
            let id = index.row_start[rank] + next[rank];
            is_done[id] = true;
            next[rank] += 1;
            todo.extend(waiter.remove(&id));
        }
    }
    let stuck = (0..n_ranks).find(|rank| next[*rank] < schedule.rows[*rank].len());
    match stuck {
        None => Ok(()),
        Some(rank) => Err(cycle(index, &next, &is_done, rank)),
    }
}

fn first_missing(index: &Index, action: Action, is_done: &[bool]) -> Option<usize> {
    let mut missing = None;
    index.each_dependency(action, |needed| {
        if !is_done[needed] && missing.is_none() {
            missing = Some(needed);
        }
    });
    missing
}

/// The cycle of waiting that `from` runs into.
fn cycle(index: &Index, next: &[usize], is_done: &[bool], from: usize) -> PipelineError {
    let schedule = index.schedule;
    // Each stuck rank waits for an action of another stuck rank, or for a later one of its own.
    let mut visited: Vec<(usize, usize)> = Vec::new();
    let mut rank = from;
    while !visited.iter().any(|(seen, _)| *seen == rank) {
        let action = schedule.rows[rank][next[rank]];
        let Some(needed) = first_missing(index, action, is_done) else {
            return PipelineError::Internal(format!(
                "rank {rank} is stuck at `{action}` and waits for nothing"
            ));
        };
        visited.push((rank, needed));
        rank = index.place(needed).0;
    }
    let start = visited
        .iter()
        .position(|(seen, _)| *seen == rank)
        .unwrap_or(0);
    let cycle = &visited[start..];
    let mut marks = Vec::new();
    let mut lines = Vec::new();
    for (rank, needed) in cycle {
        let (at, needs) = (next[*rank], index.place(*needed));
        marks.push((*rank, at));
        marks.push(needs);
        lines.push(format!(
            "`{}` on rank {rank} at step {at} waits for `{}` on rank {} at step {}",
            schedule.rows[*rank][at],
            index.action(*needed),
            needs.0,
            needs.1
        ));
    }
    let message = match cycle {
        [_] => format!("{}, which comes later; move it before", lines[0]),
        _ => format!(
            "{} ranks wait for each other, so none goes on:\n  {}",
            cycle.len(),
            lines.join("\n  ")
        ),
    };
    invalid(schedule, message, &marks)
}
