//! Stages: where a model is cut, and which stage and phase every op of its training graph belongs to.
//!
//! Enters: a forward graph and cuts. Leaves: the stage of every forward op, and from the origins of
//! differentiation the part of every op of the training graph.
//! Invariant: stages are runs of the forward ops in their order, none empty; the gradient of an op is
//! taken in the op's own stage.

use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::graph::{Graph, OpId, Role, TensorId};
use meshweave_dsl::pipeline::{OpPart, Phase};

use super::{PipelineError, Result, name};
use crate::differentiate::Origin;
use crate::plan::cost::{GroupShape, Traffic, op_seconds, traffic_seconds};

/// Whether stages may be without ops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Empty {
    Refused,
    Allowed,
}

impl Empty {
    /// Whether they were asked for.
    pub fn when(allowed: bool) -> Self {
        if allowed {
            Self::Allowed
        } else {
            Self::Refused
        }
    }
}

/// The stage of every forward op when a stage begins before each of `paths`, such as `layers[2]` or
/// `layers[2].mlp`: at the first op at or below it. Linear in ops × cuts.
///
/// # Errors
/// `Invalid` when a path names no op, or when two cuts leave nothing between them that `empty` does not
/// allow.
pub fn cut_before(forward: &Graph, paths: &[String], empty: Empty) -> Result<Vec<usize>> {
    let mut stages = vec![0; forward.ops.len()];
    let mut last = 0;
    for path in paths {
        let is_below = |op_name: &str| {
            op_name
                .strip_prefix(path.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        let ops = &forward.ops;
        let first = ops.iter().position(|op| is_below(forward.op_name(op)));
        let Some(first) = first else {
            return Err(PipelineError::Invalid(format!(
                "cannot cut before `{path}`: no op of `{}` has that name",
                forward.name
            )));
        };
        if first < last || (first == last && empty == Empty::Refused) {
            return Err(PipelineError::Invalid(format!(
                "a cut before `{path}` leaves a stage without ops: list cuts in the model's order, each once, none before its first op; where a stage shall be empty, add `empty stages`"
            )));
        }
        last = first;
        stages[first..].iter_mut().for_each(|stage| *stage += 1);
    }
    Ok(stages)
}

/// The stage of every forward op, with the dearest stage as cheap as can be: a stage costs its ops
/// forward and backward (twice the forward) and the messages at its borders. Among equals the fewest
/// bytes pass. O(ops² × stages).
///
/// # Errors
/// `Invalid` when there are more stages than ops.
pub fn cut_evenly(forward: &Graph, n_stages: usize, cluster: &Cluster) -> Result<Vec<usize>> {
    let n_ops = forward.ops.len();
    if n_stages == 0 || n_stages > n_ops {
        return Err(PipelineError::Invalid(format!(
            "`{}` has {n_ops} ops and cannot be cut into {n_stages} stages",
            forward.name
        )));
    }
    let op_s: Vec<f64> = forward
        .ops
        .iter()
        .map(|op| {
            let types = |ids: &[TensorId]| ids.iter().map(|id| forward.ty(*id)).collect::<Vec<_>>();
            3.0 * op_seconds(&op.kind, &types(&op.inputs), &types(&op.results), cluster)
        })
        .collect();
    let mut until_s = vec![0.0; n_ops + 1];
    for (op_idx, seconds) in op_s.iter().enumerate() {
        until_s[op_idx + 1] = until_s[op_idx] + seconds;
    }
    let border_s = borders(forward, cluster);
    let stage_s = |from: usize, to: usize| {
        until_s[to] - until_s[from] + 2.0 * (border_s[from] + border_s[to])
    };
    // best[k][end]: (dearest stage, sum of borders, begin of the last stage) of ops 0..end in k + 1
    // stages.
    type Best = (f64, f64, usize);
    let mut best: Vec<Vec<Option<Best>>> = vec![vec![None; n_ops + 1]; n_stages];
    for end in 1..=n_ops {
        best[0][end] = Some((stage_s(0, end), border_s[end], 0));
    }
    for stage in 1..n_stages {
        for end in stage + 1..=n_ops {
            let choices = (stage..end).filter_map(|begin| {
                let (dearest, borders, _) = best[stage - 1][begin]?;
                let dearest = dearest.max(stage_s(begin, end));
                Some((dearest, borders + border_s[end], begin))
            });
            best[stage][end] = choices.min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
        }
    }
    let mut stages = vec![0; n_ops];
    let mut end = n_ops;
    for stage in (0..n_stages).rev() {
        let (.., begin) = best[stage][end].ok_or_else(|| {
            PipelineError::Internal(format!("no cut of {n_ops} ops into {n_stages} stages"))
        })?;
        stages[begin..end].iter_mut().for_each(|of| *of = stage);
        end = begin;
    }
    Ok(stages)
}

/// Seconds of the messages over the border before each op (and after the last).
fn borders(forward: &Graph, cluster: &Cluster) -> Vec<f64> {
    let n_ops = forward.ops.len();
    let pair = GroupShape::of(&[0, cluster.n_devices().saturating_sub(1).min(1)], cluster);
    let producers = forward.producers();
    let mut border_s = vec![0.0; n_ops + 1];
    for (tensor_idx, readers) in forward.consumers().iter().enumerate() {
        let (Some(made), Some(read)) = (producers[tensor_idx], readers.last()) else {
            continue;
        };
        let n_bytes = forward.tensors[tensor_idx].ty.n_bytes() as f64;
        let seconds = traffic_seconds(Traffic::Permute, n_bytes, pair, cluster);
        for seconds_there in &mut border_s[made.index() + 1..=read.index()] {
            *seconds_there += seconds;
        }
    }
    border_s
}

/// The part of every op of a training graph, from the stages of the forward ops and the origins that
/// [`crate::differentiate::differentiate_traced`] gives. Linear, save for names.
///
/// A parameter is at home in the first stage that reads it; that stage updates it. `slices` are those
/// of the forward ops where sequences are sliced, else empty.
///
/// # Errors
/// `Internal` when origins and graphs do not fit, or a piece would read from a later one.
pub fn assign(
    graph: &Graph,
    origins: &[Origin],
    stages: &[usize],
    slices: &[usize],
) -> Result<Vec<OpPart>> {
    let misfit = || PipelineError::Internal("origins of another graph".into());
    let stage_of = |op: OpId| stages.get(op.index()).copied().ok_or_else(misfit);
    let slice_of = |op: OpId| slices.get(op.index()).copied().unwrap_or(0);
    if origins.len() != graph.ops.len() {
        return Err(misfit());
    }
    let mut homes: BTreeMap<TensorId, usize> = BTreeMap::new();
    for (op, origin) in graph.ops.iter().zip(origins) {
        if let Origin::Forward(forward) = origin {
            let stage = stage_of(*forward)?;
            for input in &op.inputs {
                if matches!(graph.tensor(*input).role, Role::Param(_)) {
                    let home = homes.entry(*input).or_insert(stage);
                    *home = stage.min(*home);
                }
            }
        }
    }
    let mut parts = Vec::with_capacity(origins.len());
    for origin in origins {
        let (stage, phase, slice) = match origin {
            Origin::Forward(op) => (stage_of(*op)?, Phase::Forward, slice_of(*op)),
            Origin::InputGradient(op) => (stage_of(*op)?, Phase::InputGradient, slice_of(*op)),
            Origin::WeightGradient(op) => (stage_of(*op)?, Phase::WeightGradient, slice_of(*op)),
            Origin::Update(param) => (homes.get(param).copied().unwrap_or(0), Phase::Update, 0),
        };
        parts.push(OpPart {
            stage,
            phase,
            slice,
        });
    }
    let producers = graph.producers();
    let made_by = |id: &TensorId| producers[id.index()].map(OpId::index);
    // Backwards run from the last slice to the first: a gradient that is added up over slices, such as
    // that of keys, is whole with the first of them.
    for op_idx in 0..parts.len() {
        if parts[op_idx].phase == Phase::InputGradient {
            for maker in graph.ops[op_idx].inputs.iter().filter_map(made_by) {
                if parts[maker].phase == Phase::InputGradient {
                    parts[op_idx].slice = parts[op_idx].slice.min(parts[maker].slice);
                }
            }
        }
    }
    // What an input gradient needs is taken with it.
    for op_idx in (0..parts.len()).rev() {
        if parts[op_idx].phase == Phase::InputGradient {
            for maker in graph.ops[op_idx].inputs.iter().filter_map(made_by) {
                if parts[maker].phase == Phase::WeightGradient {
                    parts[maker].phase = Phase::InputGradient;
                }
            }
        }
    }
    // Parts of a gradient from several stages (tied weights) or slices are added once, when they are
    // summed.
    let is_sum = |op_idx: usize| {
        use meshweave_dsl::op::{BinaryFn, OpKind};
        matches!(graph.ops[op_idx].kind, OpKind::Binary(BinaryFn::Add))
    };
    for op_idx in 0..parts.len() {
        let part = parts[op_idx];
        if part.phase != Phase::WeightGradient {
            continue;
        }
        let makers: BTreeSet<usize> = graph.ops[op_idx]
            .inputs
            .iter()
            .filter_map(made_by)
            .collect();
        let crosses = makers.iter().any(|maker| {
            let maker = parts[*maker];
            maker.phase == Phase::Update || (maker.stage, maker.slice) != (part.stage, part.slice)
        });
        if crosses && is_sum(op_idx) {
            parts[op_idx].phase = Phase::Update;
            parts[op_idx].slice = 0;
        }
    }
    // Where the weights are at home, which is where their update reads the sum.
    let consumers = graph.consumers();
    for op_idx in (0..parts.len()).rev() {
        if parts[op_idx].phase != Phase::Update || !is_sum(op_idx) {
            continue;
        }
        let results = graph.ops[op_idx].results.iter();
        let mut readers = results.flat_map(|id| &consumers[id.index()]);
        let update = readers.find(|op| parts[op.index()].phase == Phase::Update);
        if let Some(update) = update {
            parts[op_idx].stage = parts[update.index()].stage;
        }
    }
    check_order(graph, &parts)?;
    Ok(parts)
}

/// Every value is there before a piece reads it, whatever the schedule.
fn check_order(graph: &Graph, parts: &[OpPart]) -> Result<()> {
    let producers = graph.producers();
    for (op, reader) in graph.ops.iter().zip(parts) {
        for input in &op.inputs {
            let Some(maker) = producers[input.index()].and_then(|op| parts.get(op.index())) else {
                continue;
            };
            let fits = match (maker.phase, reader.phase) {
                (Phase::Forward, Phase::Forward) => {
                    maker.stage <= reader.stage && maker.slice <= reader.slice
                }
                (Phase::InputGradient, Phase::InputGradient | Phase::WeightGradient) => {
                    maker.stage >= reader.stage && maker.slice >= reader.slice
                }
                (Phase::WeightGradient, Phase::WeightGradient) => {
                    (maker.stage, maker.slice) == (reader.stage, reader.slice)
                }
                (Phase::Forward, Phase::InputGradient | Phase::WeightGradient) => {
                    maker.stage <= reader.stage
                }
                (Phase::Forward, Phase::Update) | (Phase::Update, _) => {
                    reader.phase == Phase::Update && maker.stage == reader.stage
                }
                (Phase::InputGradient | Phase::WeightGradient, Phase::Update) => true,
                (Phase::InputGradient | Phase::WeightGradient, Phase::Forward)
                | (Phase::WeightGradient, Phase::InputGradient) => false,
            };
            if !fits {
                return Err(PipelineError::Internal(format!(
                    "`{}` ({reader:?}) reads `{}`, made by {maker:?}",
                    graph.op_name(op),
                    name(graph, *input)
                )));
            }
        }
    }
    Ok(())
}
