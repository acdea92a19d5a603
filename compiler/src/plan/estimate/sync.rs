//! What a step costs once, whatever the number of microbatches: gradients, parameters, the update.
//!
//! Enters: a workload, a mapping, a cluster, and the passes under which communication can hide.
//! Leaves: exposed seconds of data parallelism, and seconds of the optimizer.
//! Invariant: what is hidden under computation still costs what both compete for.

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::mapping::{AxisGroups, GridAxis, Mapping};

use super::memory::schedules::{runs_of_backward, stages_of_rank};
use super::workload::Workload;
use crate::plan::cost::compute::stream_seconds;
use crate::plan::cost::links::{GroupShape, Traffic, traffic_seconds};

/// Weights that a rank holds, before ZeRO divides them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Held {
    /// Divided over `tp`, replicated over `dp · cp`.
    pub dense: f64,
    /// Divided over `etp · ep`, replicated over `edp`.
    pub experts: f64,
    pub n_layers: f64,
    /// Ranks of a pipeline that hold a weight: replicas of each other, as those of data parallelism are.
    pub n_copies: f64,
}

/// Passes of a rank for one microbatch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cover {
    pub forward_s: f64,
    pub backward_s: f64,
    pub n_microbatches: f64,
}

/// Buckets in which gradients are reduced, the last of which nothing covers.
const N_BUCKETS: f64 = 8.0;
/// Part of hidden communication that is lost to shared units and memory.
const CONTENTION: f64 = 0.1;
/// The same of gathers and scatters under every layer, whose kernels take units from its own.
const GATHER_CONTENTION: f64 = 0.3;
/// Seconds of the host a step: the clipping of gradients, the scheduler, the log.
const STEP_S: f64 = 8.0e-3;
/// Bytes a weight that Adam moves: f32 gradient, both moments and the master copy read, the latter
/// three and the 16-bit weight written.
const ADAM_BYTES: f64 = 4.0 + 2.0 * 12.0 + 2.0;
/// Bytes a weight of clearing the gradient, taking its norm and scaling it.
const CLIP_BYTES: f64 = 4.0 + 4.0 + 8.0;

/// Exposed seconds of data parallelism.
pub fn data_parallel_s(
    workload: &Workload,
    mapping: &Mapping,
    cluster: &Cluster,
    held: Held,
    cover: Cover,
) -> f64 {
    let dense_group = AxisGroups {
        size: mapping.dp * mapping.cp,
        stride: mapping.tp,
    };
    let groups = [
        (dense_group, held.dense),
        (mapping.groups(GridAxis::Edp), held.experts),
    ];
    if mapping.zero.stage == 3 {
        return groups
            .iter()
            .map(|(group, weights)| {
                fsdp_s(workload, mapping, cluster, *group, *weights, held, cover)
            })
            .fold(0.0, f64::max);
    }
    // Seven weight matrices and two norms a layer.
    let pieces = if mapping.zero.stage > 0 {
        9.0 * held.n_layers * (mapping.dp * mapping.cp) as f64
    } else {
        0.0
    };
    let mut total = pieces * workload.software.piece_s;
    let n_reductions = reductions(workload, mapping, cover);
    // Both groups' messages run under the same passes.
    let mut forward = Run::of(mapping, cover, cover.forward_s);
    let mut backward = Run::of(mapping, cover, cover.backward_s);
    let mut between_s = cover.n_microbatches / n_reductions * cover.backward_s;
    for (group, weights) in groups {
        let shape = GroupShape::of_axis(group, cluster);
        let gradient_bytes = f64::from(mapping.precision.gradient_bytes);
        let (reduce, gather) = if workload.software.reduces_whole {
            let zero = if mapping.zero.stage > 0 { 1.0 } else { 0.0 };
            (
                traffic_seconds(Traffic::AllReduce, 4.0 * weights, shape, cluster),
                zero * traffic_seconds(Traffic::AllGather, 2.0 * weights, shape, cluster),
            )
        } else if mapping.zero.stage > 0 {
            (
                traffic_seconds(
                    Traffic::ReduceScatter,
                    gradient_bytes * weights,
                    shape,
                    cluster,
                ),
                traffic_seconds(Traffic::AllGather, 2.0 * weights, shape, cluster),
            )
        } else {
            (
                traffic_seconds(Traffic::AllReduce, gradient_bytes * weights, shape, cluster),
                0.0,
            )
        };
        let earlier = n_reductions - 1.0;
        total += if workload.software.overlap_dp {
            earlier * exposed(reduce, &mut between_s)
                + backward.exposed(reduce)
                + forward.exposed(gather)
        } else {
            n_reductions * reduce + gather
        };
    }
    total
}

/// The passes under which a rank's stages exchange once a step: gradients behind each stage's last
/// microbatch, parameters before its first.
///
/// Of several stages all but the last one's gradients (the first one's parameters) move while the rank
/// is busy with runs of the others; those of the one at the end have only its own pass.
struct Run {
    /// Part of the weights at the end.
    end: f64,
    others_s: f64,
    end_s: f64,
}

impl Run {
    /// `pass_s`: of a microbatch through all stages of the rank.
    fn of(mapping: &Mapping, cover: Cover, pass_s: f64) -> Self {
        let pipeline = &mapping.pipeline;
        let end = 1.0 / stages_of_rank(&pipeline.schedule, pipeline.chunks) as f64;
        let n_runs = runs_of(mapping, cover) as f64;
        Self {
            end,
            others_s: (1.0 - end) * pass_s * cover.n_microbatches / n_runs,
            end_s: end * pass_s,
        }
    }

    /// What stays of a collective of all stages.
    fn exposed(&mut self, seconds: f64) -> f64 {
        exposed(self.end * seconds, &mut self.end_s)
            + uncovered((1.0 - self.end) * seconds, &mut self.others_s)
    }
}

/// Runs of microbatches through each stage of a rank.
fn runs_of(mapping: &Mapping, cover: Cover) -> usize {
    let pipeline = &mapping.pipeline;
    runs_of_backward(
        &pipeline.schedule,
        mapping.pp,
        pipeline.chunks,
        cover.n_microbatches as usize,
    )
}

/// Reductions of every gradient a step.
///
/// Stage 2 keeps no whole gradients but of what is in work. Without a pipeline that is a layer, whose
/// gradients are reduced every microbatch (Rajbhandari et al. 2020, arXiv 1910.02054, §5.2); in one, a
/// stage, whose gradients are reduced when its rank turns to another (Lamy-Poirier 2023, arXiv
/// 2211.05953, §3.2).
fn reductions(workload: &Workload, mapping: &Mapping, cover: Cover) -> f64 {
    match mapping.zero.stage {
        2 if workload.software.reduces_whole => 1.0,
        2 if mapping.pp == 1 => cover.n_microbatches,
        2 => runs_of(mapping, cover) as f64,
        _ => 1.0,
    }
}

/// What stays of a collective that runs in buckets under a pass, of which it leaves the rest to others.
fn exposed(seconds: f64, under_s: &mut f64) -> f64 {
    let bucket = seconds / N_BUCKETS;
    bucket + uncovered(seconds - bucket, under_s)
}

/// What stays of a collective that runs beside a pass, of which it leaves the rest to others.
fn uncovered(seconds: f64, under_s: &mut f64) -> f64 {
    let covered = seconds.min(*under_s);
    *under_s -= covered;
    seconds - covered + CONTENTION * covered
}

/// Layers are gathered before they run, forward and backward, and their gradients scattered, every
/// microbatch; each under the layer before it.
fn fsdp_s(
    workload: &Workload,
    mapping: &Mapping,
    cluster: &Cluster,
    group: AxisGroups,
    weights: f64,
    held: Held,
    cover: Cover,
) -> f64 {
    let size = mapping.zero.group.unwrap_or(group.size).min(group.size);
    let shape = GroupShape::of_axis(AxisGroups { size, ..group }, cluster);
    let n_layers = held.n_layers.max(1.0);
    let n_pieces = workload.software.gathers_a_layer;
    let one = weights / n_layers / n_pieces / workload.software.gather_part;
    let gather = n_pieces * traffic_seconds(Traffic::AllGather, 2.0 * one, shape, cluster);
    let gradient_bytes = f64::from(mapping.precision.gradient_bytes);
    let scatter =
        n_pieces * traffic_seconds(Traffic::ReduceScatter, gradient_bytes * one, shape, cluster);
    if !workload.software.overlap_dp {
        return cover.n_microbatches * n_layers * (2.0 * gather + scatter);
    }
    let (forward, backward) = (cover.forward_s / n_layers, cover.backward_s / n_layers);
    let beside = |seconds: f64, under: f64| {
        (seconds - under).max(0.0) + GATHER_CONTENTION * seconds.min(under)
    };
    let a_layer = beside(gather, forward) + beside(gather + scatter, backward);
    // The first gather and the last scatter have nothing to hide under.
    let mut total = cover.n_microbatches * (n_layers * a_layer + gather + scatter);
    let replicas = group.size / size.max(1);
    if replicas > 1 {
        let across = AxisGroups {
            size: replicas,
            stride: group.stride * size,
        };
        let shape = GroupShape::of_axis(across, cluster);
        let reduce = traffic_seconds(
            Traffic::AllReduce,
            4.0 * weights / size as f64,
            shape,
            cluster,
        );
        total += exposed(reduce, &mut { cover.backward_s });
    }
    total
}

/// Seconds of the update, and of moving what is offloaded.
pub fn optimizer_s(mapping: &Mapping, cluster: &Cluster, held: Held) -> (f64, f64) {
    let share = |ranks: usize| {
        if mapping.zero.stage > 0 {
            ranks as f64 * held.n_copies.max(1.0)
        } else {
            1.0
        }
    };
    let (dp, edp) = (mapping.dp * mapping.cp, mapping.edp());
    let own = held.dense / share(dp) + held.experts / share(edp);
    let all = held.dense + held.experts;
    let device = &cluster.device;
    let cleared = if mapping.zero.stage > 1 { own } else { all };
    let update = stream_seconds(ADAM_BYTES * own + CLIP_BYTES * cleared, device);
    let offload = if mapping.offload.optimizer && device.host_bytes_per_s > 0.0 {
        // Gradients go down, weights come up; the host's update runs at its memory's speed.
        let moved = f64::from(mapping.precision.gradient_bytes) + 2.0;
        moved * own / device.host_bytes_per_s + ADAM_BYTES * own / HOST_UPDATE_BYTES_PER_S
    } else {
        0.0
    };
    (STEP_S + update, offload)
}

/// Bytes a second of an update on a device's share of its host (CPU-Adam on 1/8 of two sockets).
const HOST_UPDATE_BYTES_PER_S: f64 = 25e9;
