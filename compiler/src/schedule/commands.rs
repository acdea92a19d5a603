//! Whether the memory actions of a lowered schedule make sense.
//!
//! Rules, for each rank's row:
//! 1. Every command is of an existing stage, microbatch and slice, stands on its stage's rank, and
//!    stands once; `UNSHARD` and `RESHARD` take turns instead.
//! 2. Where a stage's weights are gathered at all, its actions run while they are.
//! 3. What is offloaded was computed before, and is prefetched once before the gradient of its input.
//! 4. Gradients are reduced after the last gradient of the stage's weights, weights updated after that
//!    and after any barrier.
//!
//! Enters: a [`Lowered`]. Leaves: nothing, or the first broken rule with the grid around it.

use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::schedule::{ActionKind, Command, Lowered, Updates, Verb};

use super::PipelineError;

/// Checks all rules, in rows that have memory actions: actions and messages have checks of their own.
/// `O(n log n)`.
///
/// # Errors
/// [`PipelineError::Invalid`] with the grid.
pub(super) fn check_commands(lowered: &Lowered) -> Result<(), PipelineError> {
    for rank in 0..lowered.rows.len() {
        let is_memory = |command: &Command| {
            !matches!(
                command.verb,
                Verb::Compute(_) | Verb::Send(_) | Verb::Recv(_)
            )
        };
        if !lowered.rows[rank].iter().any(is_memory) {
            continue;
        }
        let row = Row {
            lowered,
            rank,
            row: &lowered.rows[rank],
        };
        let position_of = row.places()?;
        row.gathered()?;
        row.offloaded(&position_of)?;
        row.updated()?;
    }
    Ok(())
}

struct Row<'a> {
    lowered: &'a Lowered,
    rank: usize,
    row: &'a [Command],
}

impl Row<'_> {
    fn refuse(&self, position: usize, also: Option<usize>, why: &str) -> PipelineError {
        let mut marks = vec![(self.rank, position)];
        marks.extend(also.map(|also| (self.rank, also)));
        PipelineError::Invalid(format!(
            "`{}` on rank {} at step {position} {why}\n{}",
            self.row[position],
            self.rank,
            self.lowered.grid(&marks)
        ))
    }

    /// Rule 1; leaves where every command stands.
    fn places(&self) -> Result<BTreeMap<Command, usize>, PipelineError> {
        let schedule = &self.lowered.schedule;
        let mut position_of = BTreeMap::new();
        for (position, command) in self.row.iter().enumerate() {
            let bounds = [
                ("stage", command.stage as usize, schedule.stage_rank.len()),
                (
                    "microbatch",
                    command.microbatch.unwrap_or(0) as usize,
                    schedule.n_microbatches,
                ),
                ("slice", command.slice as usize, schedule.n_slices),
            ];
            if let Some((what, value, bound)) =
                bounds.iter().find(|(_, value, bound)| value >= bound)
            {
                let why = format!("is of {what} {value} and there are {bound}; they count from 0");
                return Err(self.refuse(position, None, &why));
            }
            let home = schedule.stage_rank[command.stage as usize];
            if home != self.rank {
                let why = format!(
                    "is of stage {}, which is on rank {home}; move it there",
                    command.stage
                );
                return Err(self.refuse(position, None, &why));
            }
            if matches!(command.verb, Verb::Unshard | Verb::Reshard) {
                continue;
            }
            if let Some(first) = position_of.insert(*command, position) {
                let why = "stands twice; remove one";
                return Err(self.refuse(position, Some(first), why));
            }
        }
        Ok(position_of)
    }

    /// Rule 2.
    fn gathered(&self) -> Result<(), PipelineError> {
        let verbs = self.row.iter();
        let sharded: BTreeSet<u32> = verbs
            .filter(|command| matches!(command.verb, Verb::Unshard | Verb::Reshard))
            .map(|command| command.stage)
            .collect();
        let mut gathered: BTreeMap<u32, usize> = BTreeMap::new();
        for (position, command) in self.row.iter().enumerate() {
            let stage = command.stage;
            match command.verb {
                Verb::Unshard => {
                    if let Some(first) = gathered.insert(stage, position) {
                        let why = "gathers weights that are gathered; reshard them before";
                        return Err(self.refuse(position, Some(first), why));
                    }
                }
                Verb::Reshard => {
                    let why = "frees weights that are not gathered; unshard them before";
                    let freed = gathered.remove(&stage);
                    freed.ok_or_else(|| self.refuse(position, None, why))?;
                }
                Verb::Compute(_) if sharded.contains(&stage) && !gathered.contains_key(&stage) => {
                    let why =
                        "runs while its stage's weights are not gathered; unshard them before";
                    return Err(self.refuse(position, None, why));
                }
                _ => {}
            }
        }
        match gathered.values().min() {
            Some(position) => {
                let why = "gathers weights that are never freed; reshard them";
                Err(self.refuse(*position, None, why))
            }
            None => Ok(()),
        }
    }

    /// Rule 3.
    fn offloaded(&self, position_of: &BTreeMap<Command, usize>) -> Result<(), PipelineError> {
        for (position, command) in self.row.iter().enumerate() {
            let at = |verb| position_of.get(&Command { verb, ..*command }).copied();
            match command.verb {
                Verb::Offload => {
                    let forward = at(Verb::Compute(ActionKind::F));
                    if forward.is_none_or(|forward| forward > position) {
                        let why = "moves what is not computed yet; put it after the forward";
                        return Err(self.refuse(position, forward, why));
                    }
                    let back = at(Verb::Prefetch);
                    let reader = at(Verb::Compute(ActionKind::B))
                        .or_else(|| at(Verb::Compute(ActionKind::I)));
                    let is_back = back.is_some_and(|back| {
                        back > position && reader.is_none_or(|reader| back < reader)
                    });
                    if !is_back {
                        let why = "moves what is not back for its backward; prefetch it before";
                        return Err(self.refuse(position, back.or(reader), why));
                    }
                }
                Verb::Prefetch if at(Verb::Offload).is_none() => {
                    let why = "brings back what was not offloaded; remove it";
                    return Err(self.refuse(position, None, why));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Rule 4.
    fn updated(&self) -> Result<(), PipelineError> {
        if self.lowered.schedule.updates == Updates::EveryMicrobatch {
            return Ok(());
        }
        let rows = self.row.iter().enumerate();
        let last = |is: &dyn Fn(&Command) -> bool| {
            let mut found = rows.clone().rev();
            found.find(|(_, command)| is(command)).map(|(at, _)| at)
        };
        let barrier = last(&|command| command.verb == Verb::Barrier);
        for (position, command) in rows.clone() {
            let late = match command.verb {
                Verb::ReduceGrad | Verb::Update => last(&|other| {
                    let is_gradient =
                        matches!(other.verb, Verb::Compute(kind) if kind.gives_weight_gradient());
                    let is_reduction =
                        other.verb == Verb::ReduceGrad && command.verb == Verb::Update;
                    other.stage == command.stage && (is_gradient || is_reduction)
                }),
                _ => continue,
            };
            let late = late.max(barrier.filter(|_| command.verb == Verb::Update));
            if let Some(late) = late.filter(|late| *late > position) {
                let why = format!(
                    "comes before `{}`, which it must follow; move it behind",
                    self.row[late]
                );
                return Err(self.refuse(position, Some(late), &why));
            }
        }
        Ok(())
    }
}
