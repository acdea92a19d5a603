//! What the ranks of a pipeline do when: one form for schedules that are simulated and steps that ran.
//!
//! Enters: a simulated schedule, or a program with a timeline of it. Leaves: an [`ActionGrid`].
//! Invariant: an idle span has its cause; nothing is idle and busy at once; what a rank holds is that
//! of the schedule's replay or of the program's memory plan, at the times of its actions.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use meshweave_dsl::program::{Action as Instructed, Program};
use meshweave_dsl::schedule::{Action, Schedule};
use meshweave_dsl::timeline::{Basis, Event, Timeline};

use crate::schedule::{Cause, Costs, Idle, Simulation, TimeSpan, memory_curves};

/// Ranks down, time across.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ActionGrid {
    pub basis: Basis,
    pub step_s: f64,
    pub unit: HeldUnit,
    pub rows: Vec<GridRow>,
}

/// What memory is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeldUnit {
    /// Of the arena.
    Bytes,
    /// Activations of a rank.
    Microbatches,
}

/// One rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GridRow {
    /// In order of time.
    pub actions: Vec<GridAction>,
    pub idle: Vec<Idle>,
    /// (seconds, amount held from then on).
    pub held: Vec<(f64, f64)>,
    pub peak: f64,
}

/// An action in time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GridAction {
    /// Such as `2F0`.
    pub label: String,
    pub span: TimeSpan,
    pub lane: Lane,
    /// Whether it is one of those that fix the length of the step.
    pub is_critical: bool,
}

/// Overlapped pairs share their time: one above the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lane {
    Whole,
    Upper,
    Lower,
}

impl GridAction {
    /// The schedule's action; none for updates.
    pub fn action(&self) -> Option<Action> {
        Action::parse(&self.label)
    }
}

impl ActionGrid {
    /// A schedule as simulated. Linear.
    pub fn of_simulation(schedule: &Schedule, simulation: &Simulation, costs: &Costs) -> Self {
        let curves = memory_curves(schedule, simulation, costs);
        let mut rows: Vec<GridRow> = curves
            .into_iter()
            .enumerate()
            .map(|(rank, held)| {
                let pairs = &schedule.pairs[rank];
                let lane = |position: usize| {
                    let begins = |at: usize| pairs.binary_search(&at).is_ok();
                    match position.checked_sub(1) {
                        Some(before) if begins(before) => Lane::Lower,
                        _ if begins(position) => Lane::Upper,
                        _ => Lane::Whole,
                    }
                };
                let spans = schedule.rows[rank].iter().zip(&simulation.spans[rank]);
                let actions = spans
                    .enumerate()
                    .map(|(position, (action, span))| GridAction {
                        label: action.to_string(),
                        span: *span,
                        lane: lane(position),
                        is_critical: false,
                    });
                GridRow {
                    actions: actions.collect(),
                    idle: simulation.idle[rank].clone(),
                    held,
                    peak: simulation.peak_bytes[rank],
                }
            })
            .collect();
        for (rank, position) in &simulation.critical_path {
            rows[*rank].actions[*position].is_critical = true;
        }
        Self {
            basis: Basis::Predicted,
            step_s: simulation.step_s,
            unit: HeldUnit::Microbatches,
            rows,
        }
    }

    /// A step of a pipelined program; `None` where the program has no actions. Linear in the events.
    ///
    /// A receive waits for a dependency until its message is sent, and for communication from then
    /// on; a send waits for room in its channel, which is memory; a collective within a stage, and
    /// whoever is done before the step is, wait for the other ranks.
    pub fn of_timeline(program: &Program, timeline: &Timeline) -> Option<Self> {
        if program.ranks.iter().all(|rank| rank.spans.is_empty()) {
            return None;
        }
        let step_s = timeline.step_s();
        let mut events: Vec<Vec<&Event>> = vec![Vec::new(); program.ranks.len()];
        for event in &timeline.events {
            if let Some(of_rank) = events.get_mut(event.rank) {
                of_rank.push(event);
            }
        }
        let sent_s = sent(program, &events);
        let mut rows: Vec<GridRow> = events
            .iter()
            .enumerate()
            .map(|(rank, events)| {
                let held = held(program, rank, events);
                GridRow {
                    actions: Vec::new(),
                    idle: idle(program, rank, events, &sent_s, step_s),
                    peak: held.iter().map(|(_, bytes)| *bytes).fold(0.0, f64::max),
                    held,
                }
            })
            .collect();
        for action in timeline.actions(program) {
            if action.label == "recv" {
                continue;
            }
            rows[action.rank].actions.push(GridAction {
                label: action.label,
                span: TimeSpan {
                    start_s: action.start_s,
                    end_s: action.end_s,
                },
                lane: Lane::Whole,
                is_critical: false,
            });
        }
        Some(Self {
            basis: timeline.basis,
            step_s,
            unit: HeldUnit::Bytes,
            rows,
        })
    }

    /// Idle seconds of the mean rank for a cause.
    pub fn idle_s(&self, cause: Cause) -> f64 {
        let spans = self.rows.iter().flat_map(|row| &row.idle);
        let of_cause = spans.filter(|idle| idle.cause == cause);
        let idle_s = of_cause.fold(0.0, |sum, idle| sum + idle.span.seconds());
        idle_s / self.rows.len().max(1) as f64
    }

    /// The most that a rank holds.
    pub fn peak(&self) -> f64 {
        self.rows.iter().map(|row| row.peak).fold(0.0, f64::max)
    }
}

/// By channel, when the work of each send began.
type Sent = BTreeMap<(usize, usize), Vec<f64>>;

fn sent(program: &Program, events: &[Vec<&Event>]) -> Sent {
    let mut sent = Sent::new();
    for (rank, events) in events.iter().enumerate() {
        for event in events {
            if let Some(Instructed::Send { to, .. }) = action(program, rank, event) {
                let times = sent.entry((rank, *to)).or_default();
                times.push(event.start_s + event.wait_s);
            }
        }
    }
    sent
}

fn action<'a>(program: &'a Program, rank: usize, event: &Event) -> Option<&'a Instructed> {
    let instruction = program.ranks[rank].instructions.get(event.instruction)?;
    Some(&instruction.action)
}

fn idle(
    program: &Program,
    rank: usize,
    events: &[&Event],
    sent_s: &Sent,
    step_s: f64,
) -> Vec<Idle> {
    let mut spans = Spans(Vec::new());
    let mut n_received: BTreeMap<usize, usize> = BTreeMap::new();
    let mut done_s: f64 = 0.0;
    for event in events {
        let (start_s, worked_s) = (event.start_s, event.start_s + event.wait_s);
        let end_s = event.start_s + event.duration_s;
        done_s = done_s.max(end_s);
        match action(program, rank, event) {
            Some(Instructed::Recv { from, .. }) => {
                let nth = n_received.entry(*from).or_default();
                let times = sent_s.get(&(*from, rank));
                let sent_s = times.and_then(|times| times.get(*nth)).copied();
                *nth += 1;
                let sent_s = sent_s
                    .unwrap_or(worked_s)
                    .clamp(start_s, worked_s.max(start_s));
                spans.push(start_s, sent_s, Cause::Dependency);
                spans.push(sent_s, end_s, Cause::Communication);
            }
            Some(Instructed::Send { .. }) => spans.push(start_s, worked_s, Cause::Memory),
            _ => spans.push(start_s, worked_s, Cause::Barrier),
        }
    }
    spans.push(done_s, step_s, Cause::Barrier);
    spans.0
}

/// Idle spans in order; neighbors of one cause are one.
struct Spans(Vec<Idle>);

impl Spans {
    fn push(&mut self, start_s: f64, end_s: f64, cause: Cause) {
        if end_s <= start_s {
            return;
        }
        match self.0.last_mut() {
            Some(last) if last.cause == cause && start_s <= last.span.end_s => {
                last.span.end_s = end_s;
            }
            _ => self.0.push(Idle {
                span: TimeSpan { start_s, end_s },
                cause,
            }),
        }
    }
}

/// Bytes of the arena that are alive while instructions run; changes only.
fn held(program: &Program, rank: usize, events: &[&Event]) -> Vec<(f64, f64)> {
    let instructions = &program.ranks[rank].instructions;
    let mut curve: Vec<(f64, f64)> = Vec::new();
    for event in events {
        let Some(instruction) = instructions.get(event.instruction) else {
            continue;
        };
        let bytes = instruction.live_bytes as f64;
        if curve.last().is_none_or(|(_, last)| *last != bytes) {
            // Sources are there from the start.
            let from_s = match curve.is_empty() {
                true => 0.0,
                false => event.start_s + event.wait_s,
            };
            curve.push((from_s, bytes));
        }
    }
    curve
}
