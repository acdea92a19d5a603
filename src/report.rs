//! What a report shows of a session: the join of plan, program and timelines.
//!
//! Enters: a session's stages, and a measured timeline when something ran.
//! Leaves: the input of the HTML report. Nothing is computed anew, only put side by side.

use std::collections::BTreeMap;

use meshweave_compiler::pipeline::lower_bound_s;
use meshweave_compiler::plan::Solution;
use meshweave_compiler::show::{ActionGrid, Figure, FigureSource, FigureValue, ReportInput};
use meshweave_dsl::graph::Graph;
use meshweave_dsl::pipeline::PipelinePlan;
use meshweave_dsl::program::{Action, Program};
use meshweave_dsl::timeline::{Basis, Category, Event, Timeline};

use crate::cli::render::{bytes, plan_summary, seconds};
use crate::compile::pipeline_error;
use crate::error::Result;
use crate::session::{Model, Session};

/// The stages of a session that a report shows.
pub struct Shown<'a> {
    pub session: &'a Session,
    pub model: &'a Model,
    pub solution: &'a Solution,
    pub program: &'a Program,
}

/// Joins what is known into the input of the report.
///
/// # Errors
/// A schedule that cannot be simulated.
pub fn report_input(
    shown: &Shown,
    local: Option<Graph>,
    measured: Option<Timeline>,
    losses: Vec<f64>,
) -> Result<ReportInput> {
    let Shown {
        session,
        model,
        solution,
        program,
    } = shown;
    let (batch, seq) = session.request.job.sizes();
    let certificate = &solution.certificate;
    let arena_bytes = program
        .ranks
        .iter()
        .map(|rank| rank.arena_bytes)
        .max()
        .unwrap_or(0);
    let value = |text: String, source| FigureValue { text, source };
    let mut figures = vec![Figure {
        label: "Parameters".into(),
        values: vec![value(
            format!("{:.2} M", model.graph.n_params() as f64 / 1e6),
            FigureSource::Exact,
        )],
        note: String::new(),
    }];
    let allocated = value(bytes(arena_bytes as f64), FigureSource::Exact);
    let pipeline = session.pipeline(model, &solution.plan);
    let lower_bound_s = match &pipeline {
        // The certificate is that of one microbatch.
        Some(pipeline) => lower_bound_s(&model.graph, pipeline, &session.request.cluster)
            .map_err(pipeline_error)?,
        None => {
            let forecast = bytes(certificate.memory.peak_bytes());
            figures.push(Figure {
                label: "Memory a device".into(),
                values: vec![allocated, value(forecast, FigureSource::Predicted)],
                note:
                    "planned to the byte and allocated as planned; below it, the planner's forecast"
                        .into(),
            });
            certificate.lower_bound_s
        }
    };
    let predicted = predicted_timeline(program);
    let grids = [Some(&predicted), measured.as_ref()];
    let grids = grids.into_iter().flatten();
    let grids: Vec<ActionGrid> = grids
        .filter_map(|timeline| ActionGrid::of_timeline(program, timeline))
        .collect();
    Ok(ReportInput {
        title: session.request.name.clone(),
        subtitle: format!(
            "{} on {}, mesh {}, {batch} sequences of {seq} tokens a step{}",
            model.graph.name,
            session.request.cluster,
            pipeline
                .as_ref()
                .map_or(&solution.plan.mesh, |pipeline| &pipeline.mesh),
            pipeline.as_ref().map_or_else(String::new, |pipeline| {
                let schedule = &pipeline.schedule;
                format!(
                    " in {} microbatch{}, {}",
                    schedule.n_microbatches,
                    if schedule.n_microbatches == 1 {
                        ""
                    } else {
                        "es"
                    },
                    schedule.name
                )
            })
        ),
        figures,
        graph: Some(model.graph.clone()),
        plan: Some(solution.plan.clone()),
        plan_text: Some(session.plan_text(model, solution)),
        local,
        program: Some((*program).clone()),
        predicted: Some(predicted),
        measured,
        grids,
        lower_bound_s: Some(lower_bound_s),
        losses,
        explanation: Some(explanation(shown, pipeline.as_ref(), lower_bound_s)),
    })
}

/// Why this plan.
fn explanation(shown: &Shown, pipeline: Option<&PipelinePlan>, bound_s: f64) -> String {
    let certificate = &shown.solution.certificate;
    let mut text = plan_summary(&shown.session.request, shown.solution);
    if let Some(choice) = &shown.session.choice {
        text += &choice.text();
    }
    if let Some(exchanges) = &shown.session.exchanges {
        text += &exchanges.text();
    }
    if let Some(pipeline) = pipeline {
        text += &format!(
            "step       at least {} (bound): schedule {} over these {} stages, every product at the devices' peak and all else free; the figures above and below are of one microbatch\n",
            seconds(bound_s),
            pipeline.schedule.name,
            pipeline.schedule.n_stages
        );
    }
    text += &format!("not searched: {}\n", certificate.not_searched.join("; "));
    for mesh in &certificate.meshes {
        text += &match (mesh.predicted_s, &mesh.reason) {
            (Some(predicted_s), _) => {
                format!("  {}: {} (predicted)\n", mesh.mesh, seconds(predicted_s))
            }
            (None, reason) => format!(
                "  {}: {}\n",
                mesh.mesh,
                reason.as_deref().unwrap_or("no plan")
            ),
        };
    }
    text
}

/// The timeline that the program's prices predict: every rank executes its instructions in order, a
/// collective starts when the last of its group has come to it, a message is received when it was
/// sent, and sent when its channel has room.
pub fn predicted_timeline(program: &Program) -> Timeline {
    let n_ranks = program.ranks.len();
    let mut clock_s = vec![0.0_f64; n_ranks];
    let mut next = vec![0; n_ranks];
    // Ranks that stand at a collective, by the ranks of its group.
    let mut arrived: BTreeMap<Vec<usize>, Vec<usize>> = BTreeMap::new();
    let mut messages = Messages::new(program);
    let mut events = Vec::new();
    let mut runnable: Vec<usize> = (0..n_ranks).rev().collect();
    while let Some(rank) = runnable.pop() {
        while let Some(instruction) = program.ranks[rank].instructions.get(next[rank]) {
            let mut members = vec![rank];
            let mut ready_s = 0.0;
            match &instruction.action {
                action if action.group().is_some() => {
                    let group = action.group().map(|group| group.ranks.clone());
                    if let Some(ranks) = group.filter(|ranks| ranks.len() > 1) {
                        let waiting = arrived.entry(ranks.clone()).or_default();
                        // A message may have woken a rank that waits here already.
                        if !waiting.contains(&rank) {
                            waiting.push(rank);
                        }
                        if waiting.len() < ranks.len() {
                            break;
                        }
                        members = std::mem::take(waiting);
                    }
                }
                Action::Send { .. } | Action::Recv { .. } => {
                    let Some(ready) = messages.ready_s(rank, &instruction.action) else {
                        break;
                    };
                    ready_s = ready;
                }
                _ => {}
            }
            let start_s = members
                .iter()
                .map(|member| clock_s[*member])
                .fold(ready_s, f64::max);
            for member in &members {
                let instruction = &program.ranks[*member].instructions[next[*member]];
                let wait_s = start_s - clock_s[*member];
                events.push(Event {
                    rank: *member,
                    instruction: next[*member],
                    name: instruction.name.clone(),
                    category: category(&instruction.action),
                    start_s: clock_s[*member],
                    duration_s: wait_s + instruction.predicted_s,
                    wait_s,
                    n_flops: instruction.n_flops,
                    n_bytes: instruction.n_bytes,
                    received_bytes: None,
                });
                clock_s[*member] = start_s + instruction.predicted_s;
                next[*member] += 1;
                if *member != rank {
                    runnable.push(*member);
                }
            }
            let peer = messages.pass(rank, &instruction.action, clock_s[rank]);
            runnable.extend(peer.filter(|peer| !runnable.contains(peer)));
        }
    }
    events.sort_by_key(|event| (event.rank, event.instruction));
    Timeline {
        basis: Basis::Predicted,
        n_ranks,
        events,
    }
}

/// The messages of a channel: how many it holds, when they were sent, when received.
type Passed = (usize, Vec<f64>, Vec<f64>);

/// When messages were sent and received, by channel.
struct Messages {
    channels: BTreeMap<(usize, usize), Passed>,
}

impl Messages {
    fn new(program: &Program) -> Self {
        let channels = program.channels.iter();
        Self {
            channels: channels
                .map(|channel| {
                    let pair = (channel.from, channel.to);
                    (pair, (channel.depth, Vec::new(), Vec::new()))
                })
                .collect(),
        }
    }

    /// When a rank may send or receive its next message; `None` while that is not known.
    fn ready_s(&self, rank: usize, action: &Action) -> Option<f64> {
        match action {
            Action::Send { to, .. } => {
                let (depth, sent, received) = self.channels.get(&(rank, *to))?;
                match sent.len().checked_sub(*depth) {
                    None => Some(0.0),
                    Some(oldest) => received.get(oldest).copied(),
                }
            }
            Action::Recv { from, .. } => {
                let (_, sent, received) = self.channels.get(&(*from, rank))?;
                sent.get(received.len()).copied()
            }
            _ => Some(0.0),
        }
    }

    /// Notes that a rank has done it; the peer may go on.
    fn pass(&mut self, rank: usize, action: &Action, end_s: f64) -> Option<usize> {
        match action {
            Action::Send { to, .. } => {
                let (_, sent, _) = self.channels.get_mut(&(rank, *to))?;
                sent.push(end_s);
                Some(*to)
            }
            Action::Recv { from, .. } => {
                let (.., received) = self.channels.get_mut(&(*from, rank))?;
                received.push(end_s);
                Some(*from)
            }
            _ => None,
        }
    }
}

fn category(action: &Action) -> Category {
    match action {
        Action::Routine { .. } if action.group().is_some() => Category::Collective,
        Action::Kernel { .. } => Category::Kernel,
        Action::Contract { .. } => Category::Contract,
        Action::Attention { .. } | Action::AttentionGrad { .. } => Category::Attention,
        Action::Routine { .. } => Category::Routine,
        Action::Collective { .. } => Category::Collective,
        Action::Send { .. } | Action::Recv { .. } => Category::Message,
    }
}
