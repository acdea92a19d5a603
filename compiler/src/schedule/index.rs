//! Where every action of a schedule stands, and which actions it waits for.
//!
//! Enters: a schedule. Leaves: dense ids of its actions and their dependencies.
//! Invariant: ids number the cells rank by rank, in row order; the first of two equal actions keeps
//! the entry, the checks report the second.

use meshweave_dsl::schedule::{Action, ActionKind, Schedule};

/// Ids of actions: cell `position` of rank `r` is `row_start[r] + position`.
pub(super) struct Index<'a> {
    pub schedule: &'a Schedule,
    /// First id of each rank, and the number of all.
    pub row_start: Vec<usize>,
    /// Id + 1 by (stage, microbatch, slice, kind); 0 where there is none.
    table: Vec<u32>,
}

impl<'a> Index<'a> {
    /// Indexes all actions whose stage, microbatch and slice are in range. Linear.
    pub fn new(schedule: &'a Schedule) -> Self {
        let n_units = schedule.stage_rank.len() * schedule.n_microbatches * schedule.n_slices;
        let mut index = Self {
            schedule,
            row_start: Vec::with_capacity(schedule.rows.len() + 1),
            table: vec![0; n_units * ActionKind::ALL.len()],
        };
        let mut id = 0;
        for row in &schedule.rows {
            index.row_start.push(id);
            for action in row {
                if let Some(slot) = index.slot(*action)
                    && index.table[slot] == 0
                {
                    index.table[slot] = id as u32 + 1;
                }
                id += 1;
            }
        }
        index.row_start.push(id);
        index
    }

    fn slot(&self, action: Action) -> Option<usize> {
        let schedule = self.schedule;
        let (stage, microbatch) = (action.stage as usize, action.microbatch as usize);
        let slice = action.slice as usize;
        let in_range = stage < schedule.stage_rank.len()
            && microbatch < schedule.n_microbatches
            && slice < schedule.n_slices;
        let unit = (stage * schedule.n_microbatches + microbatch) * schedule.n_slices + slice;
        in_range.then_some(unit * ActionKind::ALL.len() + action.kind as usize)
    }

    /// Number of cells.
    pub fn n_actions(&self) -> usize {
        self.row_start.last().copied().unwrap_or(0)
    }

    /// The id of an action, if the schedule has it.
    pub fn id(&self, action: Action) -> Option<usize> {
        let entry = self.table[self.slot(action)?];
        (entry > 0).then(|| entry as usize - 1)
    }

    /// Rank and position of an id.
    pub fn place(&self, id: usize) -> (usize, usize) {
        let rank = self.row_start.partition_point(|start| *start <= id) - 1;
        (rank, id - self.row_start[rank])
    }

    /// The action of an id.
    pub fn action(&self, id: usize) -> Action {
        let (rank, position) = self.place(id);
        self.schedule.rows[rank][position]
    }

    /// Whichever action gives the input gradient: the full backward, or its first half.
    pub fn backward(&self, action: Action) -> Option<usize> {
        let id = self.id(action.with_kind(ActionKind::B));
        id.or_else(|| self.id(action.with_kind(ActionKind::I)))
    }

    /// Calls `f` with the id of every action that `action` waits for: on its own rank, and on that
    /// of a neighboring stage.
    ///
    /// Slices of a sequence depend on each other: a forward reads the keys and values of the slices
    /// before, a backward adds to what the slices after left (Seq1F1B, arXiv 2406.03488, §3).
    pub fn each_dependency(&self, action: Action, mut f: impl FnMut(usize)) {
        let schedule = self.schedule;
        let mut give = |id: Option<usize>| {
            if let Some(id) = id {
                f(id);
            }
        };
        match action.kind {
            ActionKind::F => {
                if let Some(before) = schedule.stage_before(action.stage) {
                    give(self.id(action.at_stage(before)));
                }
                if action.slice > 0 {
                    let slice = action.slice - 1;
                    give(self.id(Action { slice, ..action }));
                }
            }
            ActionKind::R => give(self.id(action.with_kind(ActionKind::F))),
            ActionKind::B | ActionKind::I => {
                give(self.id(action.with_kind(ActionKind::F)));
                give(self.id(action.with_kind(ActionKind::R)));
                if let Some(after) = schedule.stage_after(action.stage) {
                    give(self.backward(action.at_stage(after)));
                }
                if action.slice as usize + 1 < schedule.n_slices {
                    let slice = action.slice + 1;
                    give(self.backward(Action { slice, ..action }));
                }
            }
            ActionKind::W => give(self.id(action.with_kind(ActionKind::I))),
        }
    }

    /// The rank that waits for this action's result, where that is another one.
    pub fn receiver(&self, action: Action) -> Option<usize> {
        let schedule = self.schedule;
        let stage = match action.kind {
            ActionKind::F => schedule.stage_after(action.stage),
            ActionKind::B | ActionKind::I => schedule.stage_before(action.stage),
            ActionKind::R | ActionKind::W => None,
        };
        let to = schedule.stage_rank[stage? as usize];
        (to != schedule.stage_rank[action.stage as usize]).then_some(to)
    }
}
