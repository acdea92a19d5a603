//! The optimizer's updates.
//!
//! Invariant: an update stands directly after the last op that makes its gradient or reads the old
//! value, so it can be made in place.

use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::dtype::{DType, Scalar};
use meshweave_dsl::graph::{Graph, Op, Role, TensorId, TensorType};
use meshweave_dsl::op::{BinaryFn, OpError, OpKind};
use serde::{Deserialize, Serialize};

/// How parameters follow their gradients.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Optimizer {
    /// Only the gradients.
    #[default]
    None,
    /// p −= lr g.
    Sgd { lr: f64 },
    /// Bias-corrected, with decoupled decay (arXiv 1711.05101, algorithm 2):
    /// p −= lr (m̂ / (√v̂ + eps) + decay p). Needs the input `step`: f32[], from 1.
    Adamw {
        lr: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        decay: f64,
    },
}

impl Optimizer {
    /// The AdamW of the golden model.
    pub const GOLDEN_ADAMW: Self = Self::Adamw {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        decay: 0.1,
    };
    /// The SGD of the golden model.
    pub const GOLDEN_SGD: Self = Self::Sgd { lr: 0.1 };
}

/// Adds the updates of all parameters with gradients, their states, and the input `step`; a parameter
/// whose gradient is `given` moves by that.
pub(super) fn add_updates(
    graph: &mut Graph,
    optimizer: &Optimizer,
    given: &BTreeMap<TensorId, TensorId>,
) -> Result<(), OpError> {
    let targets: Vec<(TensorId, TensorId)> = graph.gradients.clone().into_iter().collect();
    if *optimizer == Optimizer::None || targets.is_empty() {
        return Ok(());
    }
    let exempt = without_decay(graph);
    let places = places(graph, &targets);
    let n_ops = graph.ops.len();
    let mut step = None;
    for (param, gradient) in &targets {
        let name = graph.tensor(*param).name.clone();
        let next = format!("{name}.next");
        match *optimizer {
            Optimizer::None => {}
            _ if given.contains_key(param) => {
                let kind = OpKind::Sgd { lr: Scalar(1.0) };
                let results = graph.add_op(next, kind, &[*param, *gradient])?;
                graph.updates.extend([*param].into_iter().zip(results));
            }
            Optimizer::Sgd { lr } => {
                let kind = OpKind::Sgd { lr: Scalar(lr) };
                let results = graph.add_op(next, kind, &[*param, *gradient])?;
                graph.updates.extend([*param].into_iter().zip(results));
            }
            Optimizer::Adamw {
                lr,
                beta1,
                beta2,
                eps,
                decay,
            } => {
                let scalar = TensorType {
                    dtype: DType::F32,
                    shape: Vec::new(),
                };
                let step = *step.get_or_insert_with(|| {
                    let given = graph.find("step");
                    given.unwrap_or_else(|| graph.add_source("step", scalar, Role::Input))
                });
                let ty = TensorType {
                    dtype: DType::F32,
                    shape: graph.ty(*param).shape.clone(),
                };
                let role = Role::State { of: *param };
                let m = graph.add_source(format!("m.{name}"), ty.clone(), role.clone());
                let v = graph.add_source(format!("v.{name}"), ty, role);
                let kind = OpKind::Adamw {
                    lr: Scalar(lr),
                    beta1: Scalar(beta1),
                    beta2: Scalar(beta2),
                    eps: Scalar(eps),
                    decay: Scalar(if exempt.contains(param) { 0.0 } else { decay }),
                };
                let results = graph.add_op(next, kind, &[*param, *gradient, m, v, step])?;
                for (state, prefix, result) in [(m, "m", 1), (v, "v", 2)] {
                    if let Some(result) = results.get(result) {
                        graph.tensors[result.index()].name = format!("{prefix}.{name}.next");
                        graph.updates.insert(state, *result);
                    }
                }
                graph.updates.extend([*param].into_iter().zip(results));
            }
        }
    }
    let updates = graph.ops.split_off(n_ops);
    let mut due: BTreeMap<usize, Vec<Op>> = BTreeMap::new();
    for (place, update) in places.into_iter().zip(updates) {
        due.entry(place).or_default().push(update);
    }
    let mut ops = Vec::new();
    for (op_idx, op) in std::mem::take(&mut graph.ops).into_iter().enumerate() {
        ops.push(op);
        ops.extend(due.remove(&op_idx).unwrap_or_default());
    }
    // Gradients that no op makes (of a loss linear in a parameter) have no place of their own.
    ops.extend(due.into_values().flatten());
    graph.ops = ops;
    Ok(())
}

/// For each target the index of the last op that reads the parameter or makes its gradient.
fn places(graph: &Graph, targets: &[(TensorId, TensorId)]) -> Vec<usize> {
    let producers = graph.producers();
    let consumers = graph.consumers();
    targets
        .iter()
        .map(|(param, gradient)| {
            let made = producers[gradient.index()];
            let read = consumers[param.index()].last().copied();
            made.max(read).map_or(0, |op| op.index())
        })
        .collect()
}

/// Weights and biases of norms, and vectors added to wider tensors.
fn without_decay(graph: &Graph) -> BTreeSet<TensorId> {
    let mut exempt = BTreeSet::new();
    for op in &graph.ops {
        match (&op.kind, op.inputs.as_slice()) {
            (OpKind::RmsNorm { .. } | OpKind::LayerNorm { .. }, [_, vectors @ ..]) => {
                exempt.extend(vectors);
            }
            (OpKind::Binary(BinaryFn::Add), [a, b]) => {
                let (n_a, n_b) = (graph.ty(*a).shape.len(), graph.ty(*b).shape.len());
                exempt.extend((n_a < n_b).then_some(*a));
                exempt.extend((n_b < n_a).then_some(*b));
            }
            _ => {}
        }
    }
    exempt
}
