//! Schedules from order keys: every rank sorts its actions.
//!
//! Enters: where stages lie, and a key for every action. Leaves: rows.
//! Invariant: the order depends on keys alone; equal keys fall back to the order of writing them,
//! then to chunk, microbatch and slice.

use meshweave_dsl::schedule::{Action, ActionKind, Schedule};
use meshweave_dsl::weave::ast::{ExprError, OrderKey, Spanned, Var};

use super::PipelineError;
use super::builtin::{Placement, Shape};
use super::check::check;

/// An action and what its key may depend on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub kind: ActionKind,
    pub rank: i64,
    pub stage: i64,
    pub chunk: i64,
    pub microbatch: i64,
    pub slice: i64,
}

/// Rows of the actions of these kinds, sorted by `key`; a schedule of one copy. `O(n log n)`.
pub(super) fn sorted<K: Ord>(
    name: &str,
    shape: &Shape,
    placement: &Placement,
    kinds: &[ActionKind],
    key: impl Fn(&Slot) -> K,
) -> Schedule {
    let stage_rank = placement.stage_rank(shape);
    let mut rows = Vec::with_capacity(shape.n_ranks);
    for rank in 0..shape.n_ranks {
        let stages: Vec<usize> = (0..stage_rank.len())
            .filter(|stage| stage_rank[*stage] == rank)
            .collect();
        let mut keyed = Vec::new();
        for kind in kinds {
            for (chunk, stage) in stages.iter().enumerate() {
                for microbatch in 0..shape.n_microbatches {
                    for slice in 0..shape.n_slices {
                        let slot = Slot {
                            kind: *kind,
                            rank: rank as i64,
                            stage: *stage as i64,
                            chunk: chunk as i64,
                            microbatch: microbatch as i64,
                            slice: slice as i64,
                        };
                        let action = Action {
                            slice: slice as u32,
                            ..Action::new(*stage as u32, *kind, microbatch as u32)
                        };
                        keyed.push((key(&slot), action));
                    }
                }
            }
        }
        keyed.sort_by(|(a, _), (b, _)| a.cmp(b));
        rows.push(keyed.into_iter().map(|(_, action)| action).collect());
    }
    Schedule {
        n_slices: shape.n_slices,
        ..Schedule::new(name, shape.n_microbatches, stage_rank, rows)
    }
}

/// The schedule of `schedule NAME = key …`. Kinds without a key do not occur: `F` and `B`, or `F`,
/// `I` and `W`.
///
/// # Errors
/// [`PipelineError::Invalid`] when a key has no value (division by zero, overflow), or when the
/// order does not pass the checks.
pub fn from_keys(
    name: &str,
    keys: &[Spanned<OrderKey>],
    shape: &Shape,
    placement: &Placement,
) -> Result<Schedule, PipelineError> {
    shape.check()?;
    let kinds: Vec<ActionKind> = keys.iter().map(|key| key.action).collect();
    let failure: std::cell::Cell<Option<(ActionKind, ExprError)>> = std::cell::Cell::new(None);
    let value = |slot: &Slot| -> Vec<i64> {
        let Some(key) = keys.iter().find(|key| key.action == slot.kind) else {
            return Vec::new();
        };
        let value_of = |var| match var {
            Var::Microbatch => slot.microbatch,
            Var::Microbatches => shape.n_microbatches as i64,
            Var::Rank => slot.rank,
            Var::Ranks => shape.n_ranks as i64,
            Var::Stage => slot.stage,
            Var::Chunk => slot.chunk,
            Var::Chunks => shape.n_chunks as i64,
            Var::Slice => slot.slice,
            Var::Slices => shape.n_slices as i64,
        };
        let parts = key.key.iter().map(|expr| {
            expr.eval(&value_of).unwrap_or_else(|error| {
                failure.set(Some((slot.kind, error)));
                0
            })
        });
        parts.collect()
    };
    let schedule = sorted(name, shape, placement, &kinds, value);
    if let Some((kind, error)) = failure.get() {
        return Err(PipelineError::Invalid(format!(
            "the key of `{kind}` in schedule `{name}` has no value: {error}"
        )));
    }
    check(&schedule)?;
    Ok(schedule)
}
