//! Timelines: what ran (or is predicted to run) when, on which rank.
//!
//! Enters: prices of instructions, or clocks around them. Leaves: reports and calibrations.
//! Invariant: events of one (rank, stream) do not overlap and stand in order of time.

use serde::{Deserialize, Serialize};

use crate::op::OpKind;
use crate::program::{Action, Instruction, Program};

/// Where numbers come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Basis {
    Predicted,
    Measured,
}

/// What kind of work an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Category {
    Contract,
    Attention,
    Kernel,
    Routine,
    Collective,
    /// Sending to and receiving from one other rank.
    Message,
}

/// One instruction's execution.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    pub rank: usize,
    /// Index of the instruction in its rank's program.
    pub instruction: usize,
    pub name: String,
    pub category: Category,
    /// Seconds from the start of the step.
    pub start_s: f64,
    pub duration_s: f64,
    /// Of the duration, seconds spent waiting for peers (collectives).
    pub wait_s: f64,
    pub n_flops: f64,
    pub n_bytes: f64,
    /// Bytes that came from other ranks, where that was counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub received_bytes: Option<u64>,
}

/// The events of one step on all ranks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timeline {
    pub basis: Basis,
    pub n_ranks: usize,
    pub events: Vec<Event>,
}

impl Timeline {
    /// Seconds from the start of the step to the end of its last event.
    pub fn step_s(&self) -> f64 {
        self.events
            .iter()
            .map(|event| event.start_s + event.duration_s)
            .fold(0.0, f64::max)
    }

    /// Busy seconds (waiting left out) of a category, summed over ranks.
    pub fn busy_s(&self, category: Category) -> f64 {
        let events = self
            .events
            .iter()
            .filter(|event| event.category == category);
        events.map(|event| event.duration_s - event.wait_s).sum()
    }

    /// Bytes of tokens that were dispatched to experts and brought back from another rank than their
    /// own, over all ranks; `None` where bytes were not counted, or no rows are.
    pub fn dispatched_bytes(&self, program: &Program) -> Option<u64> {
        let is_context = |instruction: &Instruction| program.gathers_context(instruction);
        self.received_bytes(program, &|one| one.rows.is_some() && !is_context(one))
    }

    /// Bytes of keys, values and routes that every rank was given of tokens which stand with their
    /// experts, over all ranks; `None` as above, or where tokens come home.
    pub fn context_bytes(&self, program: &Program) -> Option<u64> {
        self.received_bytes(program, &|one| program.gathers_context(one))
    }

    /// Bytes of weights that went to replicas of experts, and of gradients that came back, over all
    /// ranks; `None` as above, or without replicas.
    pub fn copied_bytes(&self, program: &Program) -> Option<u64> {
        self.received_bytes(program, &|one| {
            matches!(&one.action, Action::Routine { op: OpKind::MoeMove(moved), .. } if moved.weights)
        })
    }

    fn received_bytes(
        &self,
        program: &Program,
        is_one: &dyn Fn(&Instruction) -> bool,
    ) -> Option<u64> {
        let mut total = None;
        for event in &self.events {
            let of_rank = program.ranks.get(event.rank);
            let instruction = of_rank.and_then(|rank| rank.instructions.get(event.instruction));
            let counts = instruction.is_some_and(is_one);
            if let Some(bytes) = event.received_bytes.filter(|_| counts) {
                *total.get_or_insert(0) += bytes;
            }
        }
        total
    }

    /// The actions of a schedule on every rank, from the spans of the program that ran. Linear.
    pub fn actions(&self, program: &Program) -> Vec<ActionTime> {
        let mut actions: Vec<ActionTime> = Vec::new();
        for (rank, of_rank) in program.ranks.iter().enumerate() {
            let events = self.events.iter().filter(|event| event.rank == rank);
            let mut events = events.peekable();
            let ends = of_rank.spans.iter().skip(1).map(|span| span.first);
            for (span, end) in of_rank.spans.iter().zip(ends.chain([usize::MAX])) {
                let mut action = ActionTime {
                    rank,
                    label: span.label.clone(),
                    start_s: f64::INFINITY,
                    end_s: 0.0,
                    busy_s: 0.0,
                };
                while let Some(event) = events.next_if(|event| event.instruction < end) {
                    action.start_s = action.start_s.min(event.start_s + event.wait_s);
                    action.end_s = action.end_s.max(event.start_s + event.duration_s);
                    action.busy_s += event.duration_s - event.wait_s;
                }
                if action.start_s.is_finite() {
                    actions.push(action);
                }
            }
        }
        actions
    }

    /// Part of the ranks' time in which they wait or have nothing to do: in a pipeline, its bubble.
    pub fn idle_part(&self) -> f64 {
        let busy_s: f64 = self
            .events
            .iter()
            .map(|event| event.duration_s - event.wait_s)
            .sum();
        let all_s = self.step_s() * self.n_ranks as f64;
        if all_s > 0.0 {
            (1.0 - busy_s / all_s).max(0.0)
        } else {
            0.0
        }
    }
}

/// When an action of a schedule ran, from its first instruction's work to the end of its last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ActionTime {
    pub rank: usize,
    /// Such as `2F0`.
    pub label: String,
    pub start_s: f64,
    pub end_s: f64,
    /// Seconds of work in it, waiting left out.
    pub busy_s: f64,
}
