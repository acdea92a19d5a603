//! Costs of stages, before they are compiled: what a schedule is chosen by, and what no plan can beat.
//!
//! Enters: a microbatch's training graph with the part of every op. Leaves: seconds and bytes of every
//! stage, and a lower bound of the step.
//! Invariant: stages whose ops take no longer give a step that takes no longer: a simulation without
//! shared links is a longest path.

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{Graph, Op, Role, TensorType};
use meshweave_dsl::pipeline::{OpPart, Phase, PipelinePlan};

use super::{PipelineError, Result};
use crate::plan::cost::{GroupShape, Traffic, op_seconds, traffic_seconds};
use crate::schedule::{Contention, Costs, StageCosts, simulate};

/// How ops are priced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// At the planner's prices, each op by itself and evenly divided over the devices of a stage.
    Priced,
    /// Contractions and attention at the device's peak; whatever else there is takes no time.
    Peak,
}

/// The costs of `n_stages` stages of a microbatch's graph on `n_devices` each. Linear in ops and
/// operands.
pub fn stage_costs(
    graph: &Graph,
    parts: &[OpPart],
    n_stages: usize,
    n_devices: usize,
    cluster: &Cluster,
    rate: Rate,
) -> Vec<StageCosts> {
    let mut stages = vec![StageCosts::default(); n_stages];
    let share = 1.0 / n_devices.max(1) as f64;
    for (op, part) in graph.ops.iter().zip(parts) {
        let seconds = match rate {
            Rate::Priced => priced_s(graph, op, share, cluster),
            Rate::Peak => peak_s(graph, op, share, cluster),
        };
        let Some(stage) = stages.get_mut(part.stage) else {
            continue;
        };
        match part.phase {
            Phase::Forward => stage.forward_s += seconds,
            Phase::InputGradient => stage.backward_input_s += seconds,
            Phase::WeightGradient => stage.backward_weight_s += seconds,
            // Once a step, and little.
            Phase::Update => {}
        }
    }
    for stage in &mut stages {
        stage.recompute_s = stage.forward_s;
    }
    if rate == Rate::Priced {
        add_bytes(&mut stages, graph, parts, share, cluster);
    }
    stages
}

fn types<'a>(graph: &'a Graph, op: &Op) -> [Vec<&'a TensorType>; 2] {
    [&op.inputs, &op.results].map(|ids| ids.iter().map(|id| graph.ty(*id)).collect())
}

fn priced_s(graph: &Graph, op: &Op, share: f64, cluster: &Cluster) -> f64 {
    let [inputs, results] = types(graph, op);
    let whole_s = op_seconds(&op.kind, &inputs, &results, cluster);
    let launch_s = cluster.device.launch_s.min(whole_s);
    launch_s + (whole_s - launch_s) * share
}

fn peak_s(graph: &Graph, op: &Op, share: f64, cluster: &Cluster) -> f64 {
    if !op.kind.is_matmul() {
        return 0.0;
    }
    let [inputs, results] = types(graph, op);
    let dtype = inputs.first().map_or(DType::F32, |ty| ty.dtype);
    op.kind.n_flops(&inputs, &results) * share / cluster.device.matmul_peak(dtype)
}

/// What is kept between actions, what passes between stages, and weights.
fn add_bytes(
    stages: &mut [StageCosts],
    graph: &Graph,
    parts: &[OpPart],
    share: f64,
    cluster: &Cluster,
) {
    let pair = GroupShape::of(&[0, cluster.n_devices().saturating_sub(1).min(1)], cluster);
    let producers = graph.producers();
    for (id, readers) in graph.tensor_ids().zip(graph.consumers()) {
        let n_bytes = graph.ty(id).n_bytes() as f64 * share;
        let readers: Vec<OpPart> = readers.iter().map(|op| parts[op.index()]).collect();
        let Some(maker) = producers[id.index()].map(|op| parts[op.index()]) else {
            if matches!(graph.tensor(id).role, Role::Param(_))
                && let Some(home) = readers.iter().map(|part| part.stage).min()
            {
                stages[home].weight_bytes += n_bytes;
            }
            continue;
        };
        if maker.phase != Phase::Forward {
            continue;
        }
        // Stages hold what they read, made there or received.
        for (stage_idx, stage) in stages.iter_mut().enumerate() {
            let reads = |phase| {
                let mut readers = readers.iter();
                readers.any(|part| part.stage == stage_idx && part.phase == phase)
            };
            if reads(Phase::WeightGradient) || reads(Phase::InputGradient) {
                stage.activation_bytes += n_bytes;
                if !reads(Phase::WeightGradient) {
                    stage.freed_by_input_bytes += n_bytes;
                }
            }
        }
        let last = readers.iter().filter(|part| part.phase == Phase::Forward);
        if let Some(last) = last.map(|part| part.stage).max()
            && last > maker.stage
        {
            let seconds = traffic_seconds(Traffic::Permute, n_bytes, pair, cluster);
            for stage in &mut stages[maker.stage..last] {
                stage.p2p_s += seconds;
            }
        }
    }
}

/// No plan of these stages under this schedule steps faster, in seconds: the schedule simulated with
/// every contraction at the device's peak, and all else free; of schedules that divide sequences, whose
/// slices differ, the work of the busiest rank.
///
/// # Errors
/// `Invalid` when the schedule cannot be simulated.
pub fn lower_bound_s(graph: &Graph, pipeline: &PipelinePlan, cluster: &Cluster) -> Result<f64> {
    let n_devices = pipeline.stage_mesh().n_ranks();
    let schedule = &pipeline.schedule;
    let stages = stage_costs(
        graph,
        &pipeline.parts,
        schedule.n_stages,
        n_devices,
        cluster,
        Rate::Peak,
    );
    let costs = Costs {
        contention: Contention::None,
        ..Costs::of(stages)
    };
    let simulation = simulate(schedule, &costs);
    let simulation = simulation.map_err(|error| PipelineError::Invalid(error.to_string()))?;
    Ok(if schedule.n_slices > 1 {
        simulation.busy_s.into_iter().fold(0.0, f64::max)
    } else {
        simulation.step_s
    })
}
