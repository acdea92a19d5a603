//! What each axis of a plan's mesh is used for.
//!
//! Enters: a plan and its graph. Leaves: the degrees of the usual kinds of parallelism.
//! Invariant: every op and every kept tensor is divided over an axis as the axis' role says, or not
//! at all; the first that is not is named in the refusal.

use meshweave_dsl::graph::{Graph, Role, TensorId};
use meshweave_dsl::name::{Axis, Dim};
use meshweave_dsl::op::{OpKind, PARTIAL_FACTOR};
use meshweave_dsl::plan::Plan;

use super::{ExportError, Result};

/// What is sharded over data-parallel ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharding {
    /// ZeRO stage 1.
    OptimizerState,
    /// Parameters and all that belongs to them: ZeRO stage 3, FSDP.
    Parameters,
}

/// What one axis does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AxisRole {
    /// Divides the batch; what is kept may be sharded.
    Data(Option<Sharding>),
    /// Divides heads, ffn and vocab; with `sequence` the sequence in between, with `vocab` the
    /// logits.
    Tensor { sequence: bool, vocab: bool },
    /// Divides experts, and the batch elsewhere.
    Expert,
    /// Divides the sequence everywhere.
    Context,
}

/// Degrees of the kinds of parallelism; 1 where a kind is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parallelism {
    /// Data-parallel ranks that hold the same.
    pub replicated: usize,
    /// Data-parallel ranks that share what is kept, and what that is.
    pub sharded: Option<(usize, Sharding)>,
    pub tensor: usize,
    pub sequence: bool,
    /// The logits' vocab is divided.
    pub vocab: bool,
    /// A part of the data-parallel ranks, not a factor of its own.
    pub expert: usize,
    pub context: usize,
}

impl Parallelism {
    /// Ranks over which the batch is divided.
    pub fn n_data(&self) -> usize {
        self.replicated * self.sharded.map_or(1, |(degree, _)| degree)
    }
}

/// Recognizes the roles of all axes of more than one rank.
///
/// # Errors
/// `Unsupported` when an axis divides ops in a way that no role allows, or two axes have a role that
/// stands once.
pub fn recognize(graph: &Graph, plan: &Plan) -> Result<Parallelism> {
    let mut parallelism = Parallelism {
        replicated: 1,
        sharded: None,
        tensor: 1,
        sequence: false,
        vocab: false,
        expert: 1,
        context: 1,
    };
    for (axis, degree) in plan.mesh.axes() {
        if *degree < 2 {
            continue;
        }
        match role(graph, plan, axis)? {
            AxisRole::Data(None) => parallelism.replicated *= degree,
            AxisRole::Data(Some(sharding)) => match &mut parallelism.sharded {
                None => parallelism.sharded = Some((*degree, sharding)),
                Some((known, other)) if *other == sharding => *known *= degree,
                Some((_, other)) => {
                    return Err(ExportError::Unsupported(format!(
                        "`{axis}` shards {} and another axis {}; no target mixes the two",
                        what(sharding),
                        what(*other)
                    )));
                }
            },
            AxisRole::Tensor { sequence, vocab } => {
                once(axis, parallelism.tensor, "tensor parallel")?;
                parallelism.tensor = *degree;
                parallelism.sequence = sequence;
                parallelism.vocab = vocab;
            }
            AxisRole::Expert => {
                once(axis, parallelism.expert, "expert parallel")?;
                parallelism.expert = *degree;
                parallelism.replicated *= degree;
            }
            AxisRole::Context => {
                once(axis, parallelism.context, "context parallel")?;
                parallelism.context = *degree;
            }
        }
    }
    Ok(parallelism)
}

fn what(sharding: Sharding) -> &'static str {
    match sharding {
        Sharding::OptimizerState => "optimizer state",
        Sharding::Parameters => "parameters",
    }
}

fn once(axis: &Axis, known: usize, role: &str) -> Result<()> {
    if known == 1 {
        return Ok(());
    }
    Err(ExportError::Unsupported(format!(
        "`{axis}` is a second {role} axis; no target has two"
    )))
}

/// Products with weights: what says how an axis divides the model.
fn role(graph: &Graph, plan: &Plan, axis: &Axis) -> Result<AxisRole> {
    let producers = graph.producers();
    let mut uses = Uses::default();
    for (op_id, op) in graph.ops() {
        let factor = plan
            .placements
            .get(op_id.index())
            .and_then(|placement| placement.factors.get(axis));
        if matches!(op.kind, OpKind::Adamw { .. } | OpKind::Sgd { .. }) {
            continue;
        }
        let reads_weight = matches!(op.kind, OpKind::Contract { .. })
            && op.inputs.iter().any(|id| {
                producers[id.index()].is_none() && matches!(graph.tensor(*id).role, Role::Param(_))
            });
        if let Some(factor) = factor {
            uses.add(factor, graph.op_name(op), reads_weight);
        }
    }
    uses.role(graph, plan, axis)
}

/// The first op that an axis divides in each way.
#[derive(Default)]
struct Uses<'a> {
    batch: Option<&'a str>,
    weights: Option<&'a str>,
    vocab: Option<&'a str>,
    expert: Option<&'a str>,
    seq: Option<&'a str>,
    /// A product with a weight that is divided along the sequence.
    seq_of_product: Option<&'a str>,
    other: Option<(&'a str, String)>,
}

impl<'a> Uses<'a> {
    fn add(&mut self, factor: &Dim, name: &'a str, reads_weight: bool) {
        let slot = match factor.as_str() {
            "batch" => &mut self.batch,
            "heads" | "group" | "ffn" => &mut self.weights,
            "vocab" => {
                self.vocab.get_or_insert(name);
                &mut self.weights
            }
            "expert" => &mut self.expert,
            "seq" => {
                if reads_weight {
                    self.seq_of_product.get_or_insert(name);
                }
                &mut self.seq
            }
            PARTIAL_FACTOR => return,
            other => {
                self.other.get_or_insert((name, other.into()));
                return;
            }
        };
        slot.get_or_insert(name);
    }

    fn role(&self, graph: &Graph, plan: &Plan, axis: &Axis) -> Result<AxisRole> {
        let refuse = |first: &str, one: &str, second: &str, other: &str| {
            Err(ExportError::Unsupported(format!(
                "`{axis}` divides `{first}` along {one} and `{second}` along {other}; no target gives one axis both"
            )))
        };
        if let Some((name, dim)) = &self.other {
            return Err(ExportError::Unsupported(format!(
                "`{axis}` divides `{name}` along `{dim}`, which no target does"
            )));
        }
        match (self.batch, self.weights, self.expert, self.seq) {
            (Some(batch), Some(weights), ..) => {
                refuse(batch, "the batch", weights, "a dim of the weights")
            }
            (Some(batch), _, _, Some(seq)) => refuse(batch, "the batch", seq, "the sequence"),
            (_, Some(weights), Some(expert), _) => {
                refuse(weights, "a dim of the weights", expert, "experts")
            }
            (None, _, Some(expert), _) => Err(ExportError::Unsupported(format!(
                "`{axis}` divides `{expert}` along experts and nothing along the batch; every target spreads the tokens over expert-parallel ranks"
            ))),
            (Some(_), None, Some(_), None) => Ok(AxisRole::Expert),
            (Some(_), None, None, None) => Ok(AxisRole::Data(self.sharding(graph, plan, axis))),
            (None, Some(weights), None, _) => match self.seq_of_product {
                Some(product) => refuse(weights, "a dim of the weights", product, "the sequence"),
                None => Ok(AxisRole::Tensor {
                    sequence: self.seq.is_some(),
                    vocab: self.vocab.is_some(),
                }),
            },
            (None, None, None, Some(_)) => Ok(AxisRole::Context),
            (None, None, None, None) => Err(ExportError::Unsupported(format!(
                "`{axis}` divides nothing: its ranks all compute the same, which no target does"
            ))),
        }
    }

    /// What the axis shards of parameters and their state, by bytes: a few small tensors kept whole
    /// (norms) do not make a plan another one.
    fn sharding(&self, graph: &Graph, plan: &Plan, axis: &Axis) -> Option<Sharding> {
        let share = |wanted: fn(&Role) -> bool| {
            let of = |id: TensorId| graph.ty(id).n_bytes();
            let all = graph
                .tensor_ids()
                .filter(|id| wanted(&graph.tensor(*id).role));
            let (mut sharded, mut total) = (0, 0);
            for id in all {
                total += of(id);
                if plan.source_layout(id).dim_of(axis).is_some() {
                    sharded += of(id);
                }
            }
            2 * sharded > total
        };
        if share(|role| matches!(role, Role::Param(_))) {
            Some(Sharding::Parameters)
        } else if share(|role| matches!(role, Role::State { .. })) {
            Some(Sharding::OptimizerState)
        } else {
            None
        }
    }
}
