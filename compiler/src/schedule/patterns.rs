//! Schedules from repeating patterns of time slots: the V family and Chimera.
//!
//! Enters: the shape. Leaves: rows in the order of the slots.
//! Invariant: within one rank no two actions have the same slot: offsets of a pattern differ modulo
//! its period.

use meshweave_dsl::schedule::{Action, ActionKind, Schedule};

use super::PipelineError;
use super::builtin::{Placement, Shape};

/// Slots of one microbatch on a rank: six units of work, F, I and W of two chunks.
const PERIOD: usize = 6;

/// A building block of the V family: the slots of the first microbatch on each rank; microbatch `m`
/// follows `6 m` slots later (Qi et al. 2024, arXiv 2405.15362, §3 and table 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Block {
    /// Slots grow by 4 a rank on the way down and by 2 on the way back: lifespans of both chunks add
    /// up to `12 P`, so a rank holds `2 P` chunks, and forwards and backwards follow each other
    /// without a gap.
    Full,
    /// By 2 and 1: half the lifespan.
    Half,
    /// By 1 and 1: a third, the least that a V allows.
    Least,
}

impl Block {
    /// Slots of F of chunk 0, F of chunk 1, I of chunk 1, I of chunk 0 on `rank` of `n_ranks`.
    fn slots(self, rank: usize, n_ranks: usize) -> [usize; 4] {
        let (r, p) = (rank, n_ranks);
        match self {
            Self::Full => [
                4 * r,
                6 * p - 5 - 2 * r,
                6 * p - 4 + 4 * r,
                12 * p - 9 - 2 * r,
            ],
            Self::Half => {
                // For an even number of ranks both ways would meet in one slot: the way back waits.
                let wait = if p.is_multiple_of(2) { 3 } else { 0 };
                [
                    2 * r,
                    3 * p - r - 2,
                    3 * p + wait + 2 * r - 1,
                    6 * p + wait - r - 2,
                ]
            }
            Self::Least => {
                let wait = if p.is_multiple_of(3) { 2 } else { 0 };
                [r, 2 * p - r - 1, 2 * p + wait + r, 4 * p + wait - r - 1]
            }
        }
    }
}

/// The rows of a V: two chunks a rank, the second one on the way back. Weight gradients fill the
/// slots that the pattern leaves free, oldest first. Linear.
pub(super) fn v_rows(name: &str, block: Block, shape: &Shape) -> Schedule {
    let (n_ranks, n_microbatches) = (shape.n_ranks, shape.n_microbatches);
    let rows = (0..n_ranks).map(|rank| {
        let stages = [rank as u32, (2 * n_ranks - 1 - rank) as u32];
        let mut slotted: Vec<(usize, Action)> = Vec::with_capacity(n_microbatches * PERIOD);
        let kinds = [
            (stages[0], ActionKind::F),
            (stages[1], ActionKind::F),
            (stages[1], ActionKind::I),
            (stages[0], ActionKind::I),
        ];
        for ((stage, kind), first) in kinds.into_iter().zip(block.slots(rank, n_ranks)) {
            let actions = (0..n_microbatches)
                .map(|mb| (first + PERIOD * mb, Action::new(stage, kind, mb as u32)));
            slotted.extend(actions);
        }
        slotted.sort_by_key(|(slot, _)| *slot);
        with_weights(slotted)
    });
    let stage_rank = Placement::V.stage_rank(shape);
    Schedule::new(name, n_microbatches, stage_rank, rows.collect())
}

/// Puts the weight gradient of every input gradient into the next free slot.
fn with_weights(slotted: Vec<(usize, Action)>) -> Vec<Action> {
    let mut row = Vec::with_capacity(slotted.len() * 3 / 2);
    let mut pending = std::collections::VecDeque::new();
    let mut slot = 0;
    for (at, action) in slotted {
        while slot < at {
            row.extend(pending.pop_front());
            slot += 1;
        }
        row.push(action);
        if action.kind == ActionKind::I {
            pending.push_back(action.with_kind(ActionKind::W));
        }
        slot = at + 1;
    }
    row.extend(pending);
    row
}

/// Chimera: two copies of the model, one in each direction, two halves of the microbatches
/// (Li and Hoefler 2021, arXiv 2107.06925, §3.1, figure 3; more than `P` microbatches by direct
/// concatenation, §3.5). In slots of one forward or backward, forwards of stage `s` stand at
/// `s + 2 m`, backwards follow without a gap; since `P` is even, the two directions of a rank have
/// slots of different parity.
///
/// # Errors
/// [`PipelineError::Invalid`] for an odd number of ranks or microbatches.
pub(super) fn chimera(shape: &Shape) -> Result<Schedule, PipelineError> {
    let n_ranks = shape.n_ranks;
    two_way(shape, "chimera")?;
    let stage_rank = Placement::TwoWay.stage_rank(shape);
    let mut rows = vec![Vec::new(); n_ranks];
    for (stage, rank) in stage_rank.iter().enumerate() {
        let (copy, depth) = (stage / n_ranks, stage % n_ranks);
        for (nth, microbatch) in (copy..shape.n_microbatches).step_by(2).enumerate() {
            // Half as many microbatches as ranks in each direction make a unit of 2 P slots.
            let (unit, within) = (nth / (n_ranks / 2), nth % (n_ranks / 2));
            let first = 2 * n_ranks * unit + 2 * within;
            let action = |kind| Action::new(stage as u32, kind, microbatch as u32);
            let backward = first + n_ranks + (n_ranks - 1 - depth);
            rows[*rank].push((first + depth, action(ActionKind::F)));
            rows[*rank].push((backward, action(ActionKind::B)));
        }
    }
    let rows = rows.into_iter().map(|mut slotted: Vec<(usize, Action)>| {
        slotted.sort_by_key(|(slot, _)| *slot);
        slotted.into_iter().map(|(_, action)| action).collect()
    });
    Ok(Schedule {
        n_stages: n_ranks,
        n_copies: 2,
        ..Schedule::new(
            "chimera",
            shape.n_microbatches,
            stage_rank.clone(),
            rows.collect(),
        )
    })
}

/// What schedules in two directions ask of a shape.
pub(super) fn two_way(shape: &Shape, name: &str) -> Result<(), PipelineError> {
    for (what, count) in [
        ("ranks", shape.n_ranks),
        ("microbatches", shape.n_microbatches),
    ] {
        if !count.is_multiple_of(2) {
            return Err(PipelineError::Invalid(format!(
                "`{name}` runs half of everything in each direction and there are {count} {what}; take \
                 an even number"
            )));
        }
    }
    Ok(())
}
