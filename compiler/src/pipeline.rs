//! Pipelined steps: from a microbatch's graph and a schedule to one program.
//!
//! Enters: the training graph of one microbatch, how its ops are placed within a stage, which stage
//! each belongs to, and a schedule. Leaves: a program whose ranks run the schedule's actions.
//! Invariant: the step equals that of the whole batch: the loss and every gradient are the sums over
//! the microbatches of those of a loss scaled by 1/M, each microbatch's with the same weights, and
//! every parameter is updated once. Schedules that update after every microbatch (PipeDream) equal a
//! serial model that does the same with the same versions of the weights: a microbatch's backward
//! uses what its forward saw in each stage, P − 1 − s updates old in stage s of P (Harlap et al. 2018,
//! §3.3), and each update is scaled by 1/M, as its part of the batch.
//!
//! 0. [`slices`]: for schedules that divide sequences, ops of their own for every slice.
//! 1. [`stages`]: which stage and phase every op belongs to.
//! 2. [`pieces`]: for every stage the graphs of F, I, W, B and of the update, with the tensors that
//!    pass between them explicit; each is partitioned over the stage's ranks and simplified.
//! 3. [`stream`]: the rows of the schedule as streams of pieces and messages, every message received
//!    in the order of its sender.
//! 4. [`link`]: for every rank one graph with a copy of each piece per microbatch, which is lowered
//!    as any other, so that the memory planner shares memory between microbatches as well.
//!
//! A step without a pipeline that accumulates gradients over microbatches is the case of one stage.
//!
//! Sums over microbatches are taken in f32 in the order in which a rank's row runs them: schedules
//! that keep a stage's microbatches in one order give the same bits.

mod choose;
mod costs;
mod link;
mod pieces;
mod slices;
mod stages;
mod stream;

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::dtype::Scalar;
use meshweave_dsl::graph::{Graph, TensorId};
use meshweave_dsl::op::{OpError, OpKind, UnaryFn};
use meshweave_dsl::pipeline::PipelinePlan;
use meshweave_dsl::plan::Plan;
use meshweave_dsl::schedule::{ActionKind, Updates};

use crate::codegen::fuse::{FuseError, Platform};
use crate::lower::{LowerError, Lowered};
use crate::partition::{Keep, PartitionError};
use crate::schedule;
use crate::simplify::SimplifyError;

pub use choose::{Candidate, PricedCandidate, Setting, choose};
pub use costs::{Rate, lower_bound_s, stage_costs};
pub use slices::{Sliced, slice_sequences};
pub use stages::{Empty, assign, cut_before, cut_evenly};

/// A pipeline that cannot be compiled.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PipelineError {
    /// The plan, the cuts or the schedule do not fit the graph or each other.
    #[error("{0}")]
    Invalid(String),
    /// A meaningful schedule that cannot be executed yet.
    #[error("{0}")]
    Unsupported(String),
    /// Our bug.
    #[error("internal error in a pipeline: {0}")]
    Internal(String),
    #[error(transparent)]
    Partition(#[from] PartitionError),
    #[error(transparent)]
    Lower(#[from] LowerError),
}

impl From<SimplifyError> for PipelineError {
    fn from(error: SimplifyError) -> Self {
        Self::Internal(error.to_string())
    }
}

impl From<FuseError> for PipelineError {
    fn from(error: FuseError) -> Self {
        Self::Lower(error.into())
    }
}

impl From<OpError> for PipelineError {
    fn from(error: OpError) -> Self {
        Self::Internal(error.to_string())
    }
}

type Result<T> = std::result::Result<T, PipelineError>;

/// `forward` with its first output, the mean loss of one of `n_microbatches`, scaled to its part of
/// the mean over all of them. Its name goes to the scaled loss.
///
/// # Errors
/// `Invalid` when the graph has no output.
pub fn scale_loss(forward: &Graph, n_microbatches: usize) -> Result<Graph> {
    let mut graph = forward.clone();
    let loss = *graph.outputs.first().ok_or_else(|| {
        PipelineError::Invalid(format!(
            "graph `{}` has no output: make the loss its first output",
            graph.name
        ))
    })?;
    if n_microbatches == 1 {
        return Ok(graph);
    }
    let name = graph.tensor(loss).name.clone();
    graph.tensors[loss.index()].name = format!("{name}.microbatch");
    let kind = OpKind::Unary(UnaryFn::Scale(Scalar(1.0 / n_microbatches as f64)));
    let scaled = graph.add_op(name, kind, &[loss])?;
    graph.outputs.splice(..1, scaled);
    Ok(graph)
}

/// Compiles `graph`, the training graph of one microbatch (its loss scaled by [`scale_loss`]), to the
/// program of a whole step for a platform. `plan` places its ops over the mesh of one stage.
///
/// # Errors
/// `Invalid` when plan, pipeline and graph do not fit each other or the schedule reads what nothing
/// gives; `Unsupported` for updates between microbatches with adamw, split backwards, copies, or weights in several stages.
pub fn lower_pipeline(
    graph: &Graph,
    plan: &Plan,
    pipeline: &PipelinePlan,
    keep: Keep,
    cluster: &Cluster,
    platform: Platform,
) -> Result<Lowered> {
    check(graph, plan, pipeline)?;
    let mut pieces = pieces::Pieces::new(graph, plan, pipeline, keep, cluster, platform);
    let streams = stream::streams(&mut pieces)?;
    link::link(&pieces, &streams)
}

fn check(graph: &Graph, plan: &Plan, pipeline: &PipelinePlan) -> Result<()> {
    let PipelinePlan {
        mesh,
        axis,
        parts,
        schedule,
        ..
    } = pipeline;
    if parts.len() != graph.ops.len() {
        return Err(PipelineError::Invalid(format!(
            "the pipeline divides {} ops, `{}` has {}: cut this graph anew",
            parts.len(),
            graph.name,
            graph.ops.len()
        )));
    }
    if plan.mesh != pipeline.stage_mesh() {
        return Err(PipelineError::Invalid(format!(
            "the plan of a stage is over {}, the pipeline's mesh {mesh} without `{axis}` is {}",
            plan.mesh,
            pipeline.stage_mesh()
        )));
    }
    if mesh.degree(axis) != schedule.n_ranks {
        return Err(PipelineError::Invalid(format!(
            "schedule `{}` is for {} ranks, mesh axis `{axis}` has {}",
            schedule.name,
            schedule.n_ranks,
            mesh.degree(axis)
        )));
    }
    if let Some(part) = parts.iter().find(|part| part.stage >= schedule.n_stages) {
        return Err(PipelineError::Invalid(format!(
            "an op lies in stage {}, schedule `{}` has {}",
            part.stage, schedule.name, schedule.n_stages
        )));
    }
    schedule::check(schedule).map_err(|error| PipelineError::Invalid(error.to_string()))?;
    if let Some(lowered) = &pipeline.lowered {
        schedule::check_lowered(lowered)
            .map_err(|error| PipelineError::Invalid(error.to_string()))?;
        if lowered.schedule != *schedule {
            return Err(PipelineError::Invalid(format!(
                "the memory actions are those of schedule `{}`, and `{}` is to run",
                lowered.schedule.name, schedule.name
            )));
        }
    }
    let n_slices = parts.iter().map(|part| part.slice + 1).max().unwrap_or(1);
    if n_slices != schedule.n_slices {
        return Err(PipelineError::Invalid(format!(
            "the graph divides sequences into {n_slices} slices, schedule `{}` into {}",
            schedule.name, schedule.n_slices
        )));
    }
    if schedule.updates == Updates::EveryMicrobatch {
        check_asynchronous(graph, pipeline)?;
    }
    Ok(())
}

/// What updates between microbatches can do.
fn check_asynchronous(graph: &Graph, pipeline: &PipelinePlan) -> Result<()> {
    let schedule = &pipeline.schedule;
    let refuse = |why: &str, way_out: &str| {
        Err(PipelineError::Unsupported(format!(
            "schedule `{}` updates weights after every microbatch, which is not executed {why}: {way_out}",
            schedule.name
        )))
    };
    let has_adamw = graph
        .ops
        .iter()
        .any(|op| matches!(op.kind, OpKind::Adamw { .. }));
    let has_split = schedule
        .rows
        .iter()
        .flatten()
        .any(|action| matches!(action.kind, ActionKind::I | ActionKind::W));
    let shared = graph.params().find(|param| {
        let readers = graph.ops.iter().zip(&pipeline.parts);
        let mut stages = readers
            .filter(|(op, _)| op.inputs.contains(param))
            .map(|(_, part)| part.stage);
        let first = stages.next();
        stages.any(|stage| Some(stage) != first)
    });
    if has_adamw {
        return refuse("with adamw, which counts steps", "choose sgd, or 1f1b");
    }
    if has_split {
        return refuse("with input and weight gradients apart", "use B");
    }
    if schedule.n_copies > 1 {
        return refuse("with copies of the model", "use one");
    }
    match shared {
        Some(param) => refuse(
            &format!("with `{}` in several stages", name(graph, param)),
            "untie it, or choose 1f1b",
        ),
        None => Ok(()),
    }
}

/// The name of a tensor, for messages.
fn name(graph: &Graph, id: TensorId) -> &str {
    &graph.tensor(id).name
}

#[cfg(test)]
mod tests;
