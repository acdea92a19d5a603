//! DualPipe and DualPipeV: forwards and backwards in overlapped pairs.
//!
//! Enters: the shape. Leaves: rows with pairs.
//! Invariant: a pair holds a forward and a full backward of different chunks.
//! Source: DeepSeek-V3 (arXiv 2412.19437), §3.2.1, figure 5; "cut in half" for DualPipeV
//! (Sea AI Lab): fold the two directions of `2 P` ranks onto `P`.

use meshweave_dsl::schedule::{Action, ActionKind, Schedule};

use super::PipelineError;
use super::builtin::{Placement, Shape};
use super::patterns::two_way;

/// One rank's row while it is written: two chunks, each with counters of what is done.
struct Row {
    /// Stage and microbatches of each chunk. Chunk 0 is entered first: nearer to its input.
    stages: [u32; 2],
    microbatches: [Vec<u32>; 2],
    n_forward: [usize; 2],
    n_backward: [usize; 2],
    /// Weight gradients not yet taken, oldest first.
    pending: std::collections::VecDeque<Action>,
    actions: Vec<Action>,
    pairs: Vec<usize>,
}

impl Row {
    fn forward(&mut self, chunk: usize) {
        let microbatch = self.microbatches[chunk][self.n_forward[chunk]];
        self.n_forward[chunk] += 1;
        self.actions
            .push(Action::new(self.stages[chunk], ActionKind::F, microbatch));
    }

    fn backward(&mut self, chunk: usize) {
        let action = self.next_backward(chunk, ActionKind::B);
        self.actions.push(action);
    }

    /// The input gradient; the weight gradient waits.
    fn backward_input(&mut self, chunk: usize) {
        let action = self.next_backward(chunk, ActionKind::I);
        self.pending.push_back(action.with_kind(ActionKind::W));
        self.actions.push(action);
    }

    fn next_backward(&mut self, chunk: usize, kind: ActionKind) -> Action {
        let microbatch = self.microbatches[chunk][self.n_backward[chunk]];
        self.n_backward[chunk] += 1;
        Action::new(self.stages[chunk], kind, microbatch)
    }

    fn weight(&mut self) {
        self.actions.extend(self.pending.pop_front());
    }

    fn overlapped(&mut self, forward: usize, backward: usize) {
        self.pairs.push(self.actions.len());
        self.forward(forward);
        self.backward(backward);
    }

    /// The eight phases of the rank at distance `depth` from the ends of a half of `half` ranks,
    /// for `n` microbatches a direction.
    fn phases(&mut self, depth: usize, half: usize, n: usize) {
        let to_middle = half - 1 - depth;
        // 1, 2: forwards of the near chunk until the first microbatch returns on the far one.
        (0..2 * to_middle).for_each(|_| self.forward(0));
        for _ in 0..=depth {
            self.forward(0);
            self.forward(1);
        }
        // 3: backwards begin; weight gradients at once, since there is nothing to wait for.
        for _ in 0..to_middle {
            self.backward_input(1);
            self.weight();
            self.forward(1);
        }
        // 4, 5: steady state, every forward overlapped with a backward of the other chunk. In the
        // middle the first pair would wait for its own forward: it runs apart.
        for step in 0..n - 2 * half + depth + 1 {
            if step == 0 && to_middle == 0 {
                self.forward(0);
                self.backward(1);
            } else {
                self.overlapped(0, 1);
            }
            self.overlapped(1, 0);
        }
        for _ in 0..to_middle {
            self.backward(1);
            self.overlapped(1, 0);
        }
        // 6: backwards alone; in their second half weight gradients wait, to fill the end.
        let mut is_split = false;
        for step in 0..=depth {
            let is_half = step == depth.div_ceil(2);
            if is_half && !depth.is_multiple_of(2) {
                is_split = true;
            }
            self.backward_as(1, is_split);
            if is_half && depth.is_multiple_of(2) {
                is_split = true;
            }
            self.backward_as(0, is_split);
        }
        // 7, 8: the last input gradients, then what is left.
        for _ in 0..to_middle {
            self.weight();
            self.backward_input(0);
        }
        while !self.pending.is_empty() {
            self.weight();
        }
    }

    fn backward_as(&mut self, chunk: usize, is_split: bool) {
        if is_split {
            self.backward_input(chunk);
        } else {
            self.backward(chunk);
        }
    }
}

fn row(stages: [u32; 2], microbatches: [Vec<u32>; 2]) -> Row {
    Row {
        stages,
        microbatches,
        n_forward: [0; 2],
        n_backward: [0; 2],
        pending: std::collections::VecDeque::new(),
        actions: Vec::new(),
        pairs: Vec::new(),
    }
}

/// The pairs that [`Row::phases`] makes.
pub(super) fn n_pairs(depth: usize, half: usize, n: usize) -> usize {
    let to_middle = half.saturating_sub(1 + depth);
    let n_steady = (n + depth + 1).saturating_sub(2 * half);
    (2 * n_steady + to_middle).saturating_sub(usize::from(to_middle == 0 && n_steady > 0))
}

/// DualPipe: two copies of the model in opposite directions, half of the microbatches each.
///
/// # Errors
/// [`PipelineError::Invalid`] for odd counts or fewer than 2 P microbatches.
pub(super) fn dualpipe(shape: &Shape) -> Result<Schedule, PipelineError> {
    two_way(shape, "dualpipe")?;
    let n_ranks = shape.n_ranks;
    enough(shape, "dualpipe")?;
    let of_copy = |copy: u32| {
        (copy..shape.n_microbatches as u32)
            .step_by(2)
            .collect::<Vec<u32>>()
    };
    let rows = (0..n_ranks).map(|rank| {
        // Copy 1 runs the other way: its stage s lies on rank P − 1 − s.
        let stages = [rank, 2 * n_ranks - 1 - rank].map(|stage| stage as u32);
        let depth = rank.min(n_ranks - 1 - rank);
        let mut row = if rank < n_ranks / 2 {
            row(stages, [of_copy(0), of_copy(1)])
        } else {
            row([stages[1], stages[0]], [of_copy(1), of_copy(0)])
        };
        row.phases(depth, n_ranks / 2, shape.n_microbatches / 2);
        row
    });
    let schedule = finish("dualpipe", shape, &Placement::TwoWay, rows);
    Ok(Schedule {
        n_stages: n_ranks,
        n_copies: 2,
        ..schedule
    })
}

/// DualPipeV: one copy, two chunks a rank in a V.
///
/// # Errors
/// [`PipelineError::Invalid`] for fewer than 2 P microbatches.
pub(super) fn dualpipe_v(shape: &Shape) -> Result<Schedule, PipelineError> {
    let n_ranks = shape.n_ranks;
    enough(shape, "dualpipe-v")?;
    let all: Vec<u32> = (0..shape.n_microbatches as u32).collect();
    let rows = (0..n_ranks).map(|rank| {
        let stages = [rank, 2 * n_ranks - 1 - rank].map(|stage| stage as u32);
        let mut row = row(stages, [all.clone(), all.clone()]);
        row.phases(rank, n_ranks, shape.n_microbatches);
        row
    });
    Ok(finish("dualpipe-v", shape, &Placement::V, rows))
}

pub(super) fn enough(shape: &Shape, name: &str) -> Result<(), PipelineError> {
    if shape.n_microbatches < 2 * shape.n_ranks {
        return Err(PipelineError::Invalid(format!(
            "`{name}` is defined for at least two microbatches a rank and there are {} on {} ranks; take \
             {} or more, or `zb-v`",
            shape.n_microbatches,
            shape.n_ranks,
            2 * shape.n_ranks
        )));
    }
    Ok(())
}

fn finish(
    name: &str,
    shape: &Shape,
    placement: &Placement,
    rows: impl Iterator<Item = Row>,
) -> Schedule {
    let (actions, pairs) = rows.map(|row| (row.actions, row.pairs)).unzip();
    let stage_rank = placement.stage_rank(shape);
    Schedule {
        pairs,
        ..Schedule::new(name, shape.n_microbatches, stage_rank, actions)
    }
}
