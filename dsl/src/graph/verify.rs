//! The rules of graphs.
//!
//! Of every graph:
//! 1. every id lies in the graph;
//! 2. names are unique and not empty;
//! 3. a `Temp` has one producer, any other tensor has none;
//! 4. inputs stand before the ops that read them;
//! 5. results are those of the op's shape rule, in number and type;
//! 6. an update replaces a parameter or a state by a value of its type, a gradient is of the type of
//!    its parameter, and a state belongs to a parameter.
//!
//! Of a global graph:
//! 7. there are no collectives;
//! 8. the `offset` fields are 0, save that causal attention whose keys are more than its queries may
//!    begin at a later key, up to the last that its queries fit.
//!
//! Of a local graph:
//! 9. a collective's group holds this rank, only ranks of the mesh, none twice, and is the group of
//!    its axes when it names any;
//! 10. its counts are as many as the group's members and fit the types of input and result.
//!
//! Of the local graphs of all ranks together:
//! 11. the members of a group come to the same collectives in the same order, with inputs that fit
//!     each other, and no two wait for each other; partners of a permutation agree.
//!
//! Dims of one name agree in size within an op (rule 5), not in the whole graph: dense and expert
//! layers have an `ffn` of their own, and the parts of a concatenated `head` differ.
//!
//! Enters: graphs. Leaves: nothing, or the first rule broken, naming the op and both figures.

mod ranks;

use std::collections::BTreeMap;

use super::{Graph, Op, Role, TensorId, TensorType};
use crate::layout::Mesh;
use crate::name::{Axis, Dim};
use crate::op::{Group, MoeMove, OpError, OpKind, Shares};

pub use ranks::verify_ranks;

/// A broken rule. All are bugs of what made the graph, or of its author where it was written as text.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum VerifyError {
    #[error("{at} names tensor {id}, the graph has {n_tensors}")]
    UnknownTensor {
        at: String,
        id: u32,
        n_tensors: usize,
    },
    #[error("tensors {first} and {second} are both named `{name}`; names must be unique")]
    DuplicateName {
        name: String,
        first: usize,
        second: usize,
    },
    #[error("tensor {id} has no name")]
    EmptyName { id: usize },
    #[error("`{tensor}` is a result, but no op makes it")]
    NoProducer { tensor: String },
    #[error("`{tensor}` is made by op {first} and again by op {second}")]
    TwoProducers {
        tensor: String,
        first: usize,
        second: usize,
    },
    #[error("`{tensor}` is {role}, but op {op_idx} makes it")]
    ProducedSource {
        tensor: String,
        role: &'static str,
        op_idx: usize,
    },
    #[error("{op} `{at}` (op {op_idx}) reads `{tensor}`, which op {producer_idx} makes only later")]
    ReadTooEarly {
        op: &'static str,
        at: String,
        op_idx: usize,
        tensor: String,
        producer_idx: usize,
    },
    #[error(transparent)]
    Op(#[from] OpError),
    #[error("{op} `{at}` has {found} results, its rule gives {expected}")]
    ResultCount {
        op: &'static str,
        at: String,
        expected: usize,
        found: usize,
    },
    #[error("`{tensor}` is {found}, {op} gives {expected}")]
    ResultType {
        op: &'static str,
        tensor: String,
        expected: TensorType,
        found: TensorType,
    },
    #[error("`{source_name}` is {expected}, its update `{update}` is {found}")]
    UpdateType {
        source_name: String,
        update: String,
        expected: TensorType,
        found: TensorType,
    },
    #[error("`{tensor}` is {role} and cannot be updated; only parameters and states can")]
    UpdateOf { tensor: String, role: &'static str },
    #[error("parameter `{param}` is {expected}, its gradient `{gradient}` is {found}")]
    GradientType {
        param: String,
        gradient: String,
        expected: TensorType,
        found: TensorType,
    },
    #[error("`{tensor}` is {role} and has a gradient; only parameters have")]
    GradientOf { tensor: String, role: &'static str },
    #[error("state `{state}` belongs to `{owner}`, which is {role}, not a parameter")]
    StateOf {
        state: String,
        owner: String,
        role: &'static str,
    },

    #[error("{op} `{at}` is a collective; a global graph has none")]
    Collective { op: &'static str, at: String },
    #[error(
        "{op} `{at}` starts at {offset}; in a global graph every op starts at 0, save causal attention over more keys than queries"
    )]
    Offset {
        op: &'static str,
        at: String,
        offset: usize,
    },
    #[error("{op} `{at}` of rank {rank} runs over the ranks {ranks:?}, which lack it")]
    GroupLacksRank {
        op: &'static str,
        at: String,
        rank: usize,
        ranks: Vec<usize>,
    },
    #[error("{op} `{at}` names rank {member}, the mesh has {n_ranks}")]
    UnknownRank {
        op: &'static str,
        at: String,
        member: usize,
        n_ranks: usize,
    },
    #[error("{op} `{at}` names rank {member} twice")]
    RankTwice {
        op: &'static str,
        at: String,
        member: usize,
    },
    #[error("{op} `{at}` runs over the ranks {found:?}, along {axes:?} they are {expected:?}")]
    GroupAxes {
        op: &'static str,
        at: String,
        axes: Vec<Axis>,
        expected: Vec<usize>,
        found: Vec<usize>,
    },
    #[error("{op} `{at}`: {what} should be {expected}, not {found}")]
    Counts {
        op: &'static str,
        at: String,
        what: String,
        expected: usize,
        found: usize,
    },

    #[error("rank {first_rank} is at {first}, rank {second_rank} at {second}")]
    Disagree {
        first_rank: usize,
        first: String,
        second_rank: usize,
        second: String,
    },
    #[error("the collectives cannot go on: {}", places.join("; "))]
    Stuck { places: Vec<String> },
    #[error("rank {rank} receives from rank {from} in `{at}`, which sends to rank {to}")]
    Partners {
        at: String,
        rank: usize,
        from: usize,
        to: usize,
    },
}

/// Checks the rules of a global graph. Linear, save for the names.
///
/// # Errors
/// The first rule broken.
pub fn verify_global(graph: &Graph) -> Result<(), VerifyError> {
    verify_common(graph)?;
    for (_, op) in graph.ops() {
        if op.kind.group().is_some() {
            return Err(VerifyError::Collective {
                op: op.kind.name(),
                at: graph.op_name(op).into(),
            });
        }
        if offset(&op.kind) > last_offset(graph, op) {
            return Err(VerifyError::Offset {
                op: op.kind.name(),
                at: graph.op_name(op).into(),
                offset: offset(&op.kind),
            });
        }
    }
    Ok(())
}

/// Checks the rules of a rank's local graph. Linear, save for the names.
///
/// # Errors
/// The first rule broken.
pub fn verify_local(graph: &Graph, rank: usize, mesh: &Mesh) -> Result<(), VerifyError> {
    verify_common(graph)?;
    for (_, op) in graph.ops() {
        if let Some(group) = op.kind.group() {
            let at = graph.op_name(op);
            verify_group(op.kind.name(), at, group, rank, mesh)?;
            verify_counts(graph, op, group, rank)?;
        }
    }
    Ok(())
}

fn verify_common(graph: &Graph) -> Result<(), VerifyError> {
    verify_ids(graph)?;
    verify_names(graph)?;
    verify_producers(graph)?;
    for (_, op) in graph.ops() {
        // The results of collectives depend on the rank: their counts are checked instead.
        if op.kind.group().is_none() {
            verify_results(graph, op)?;
        }
    }
    verify_roles(graph)
}

fn verify_ids(graph: &Graph) -> Result<(), VerifyError> {
    let n_tensors = graph.tensors.len();
    let known = |id: &TensorId, at: &dyn Fn() -> String| {
        if id.index() < n_tensors {
            Ok(())
        } else {
            Err(VerifyError::UnknownTensor {
                at: at(),
                id: id.0,
                n_tensors,
            })
        }
    };
    for (op_id, op) in graph.ops() {
        for id in op.inputs.iter().chain(&op.results) {
            known(id, &|| format!("{} (op {})", op.kind.name(), op_id.index()))?;
        }
    }
    for id in &graph.outputs {
        known(id, &|| "the list of outputs".into())?;
    }
    for (source, target) in graph.updates.iter().chain(&graph.gradients) {
        known(source, &|| "the list of updates and gradients".into())?;
        known(target, &|| "the list of updates and gradients".into())?;
    }
    for tensor in &graph.tensors {
        if let Role::State { of } = &tensor.role {
            known(of, &|| format!("state `{}`", tensor.name))?;
        }
    }
    Ok(())
}

fn verify_names(graph: &Graph) -> Result<(), VerifyError> {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    for (idx, tensor) in graph.tensors.iter().enumerate() {
        if tensor.name.is_empty() {
            return Err(VerifyError::EmptyName { id: idx });
        }
        if let Some(first) = seen.insert(&tensor.name, idx) {
            return Err(VerifyError::DuplicateName {
                name: tensor.name.clone(),
                first,
                second: idx,
            });
        }
    }
    Ok(())
}

fn verify_producers(graph: &Graph) -> Result<(), VerifyError> {
    let mut producers: Vec<Option<usize>> = vec![None; graph.tensors.len()];
    for (op_id, op) in graph.ops() {
        for result in &op.results {
            let tensor = graph.tensor(*result);
            if tensor.role != Role::Temp {
                return Err(VerifyError::ProducedSource {
                    tensor: tensor.name.clone(),
                    role: role_name(&tensor.role),
                    op_idx: op_id.index(),
                });
            }
            if let Some(first) = producers[result.index()].replace(op_id.index()) {
                return Err(VerifyError::TwoProducers {
                    tensor: tensor.name.clone(),
                    first,
                    second: op_id.index(),
                });
            }
        }
    }
    for (tensor, producer) in graph.tensors.iter().zip(&producers) {
        if tensor.role == Role::Temp && producer.is_none() {
            return Err(VerifyError::NoProducer {
                tensor: tensor.name.clone(),
            });
        }
    }
    for (op_id, op) in graph.ops() {
        for input in &op.inputs {
            if let Some(producer_idx) = producers[input.index()]
                && producer_idx >= op_id.index()
            {
                return Err(VerifyError::ReadTooEarly {
                    op: op.kind.name(),
                    at: graph.op_name(op).into(),
                    op_idx: op_id.index(),
                    tensor: graph.tensor(*input).name.clone(),
                    producer_idx,
                });
            }
        }
    }
    Ok(())
}

fn verify_results(graph: &Graph, op: &Op) -> Result<(), VerifyError> {
    let inputs: Vec<&TensorType> = op.inputs.iter().map(|id| graph.ty(*id)).collect();
    let at = graph.op_name(op);
    let types = op.kind.infer(&inputs).map_err(|error| error.at(at))?;
    if types.len() != op.results.len() {
        return Err(VerifyError::ResultCount {
            op: op.kind.name(),
            at: at.into(),
            expected: types.len(),
            found: op.results.len(),
        });
    }
    for (result, expected) in op.results.iter().zip(types) {
        let tensor = graph.tensor(*result);
        if tensor.ty != expected {
            return Err(VerifyError::ResultType {
                op: op.kind.name(),
                tensor: tensor.name.clone(),
                expected,
                found: tensor.ty.clone(),
            });
        }
    }
    Ok(())
}

fn verify_roles(graph: &Graph) -> Result<(), VerifyError> {
    for tensor in &graph.tensors {
        if let Role::State { of } = &tensor.role {
            let owner = graph.tensor(*of);
            if !matches!(owner.role, Role::Param(_)) {
                return Err(VerifyError::StateOf {
                    state: tensor.name.clone(),
                    owner: owner.name.clone(),
                    role: role_name(&owner.role),
                });
            }
        }
    }
    for (source, update) in &graph.updates {
        let (source, update) = (graph.tensor(*source), graph.tensor(*update));
        if !matches!(source.role, Role::Param(_) | Role::State { .. }) {
            return Err(VerifyError::UpdateOf {
                tensor: source.name.clone(),
                role: role_name(&source.role),
            });
        }
        if source.ty != update.ty {
            return Err(VerifyError::UpdateType {
                source_name: source.name.clone(),
                update: update.name.clone(),
                expected: source.ty.clone(),
                found: update.ty.clone(),
            });
        }
    }
    for (param, gradient) in &graph.gradients {
        let (param, gradient) = (graph.tensor(*param), graph.tensor(*gradient));
        if !matches!(param.role, Role::Param(_)) {
            return Err(VerifyError::GradientOf {
                tensor: param.name.clone(),
                role: role_name(&param.role),
            });
        }
        if param.ty != gradient.ty {
            return Err(VerifyError::GradientType {
                param: param.name.clone(),
                gradient: gradient.name.clone(),
                expected: param.ty.clone(),
                found: gradient.ty.clone(),
            });
        }
    }
    Ok(())
}

fn verify_group(
    op: &'static str,
    at: &str,
    group: &Group,
    rank: usize,
    mesh: &Mesh,
) -> Result<(), VerifyError> {
    let at = || at.to_string();
    for (member_idx, member) in group.ranks.iter().enumerate() {
        if *member >= mesh.n_ranks() {
            return Err(VerifyError::UnknownRank {
                op,
                at: at(),
                member: *member,
                n_ranks: mesh.n_ranks(),
            });
        }
        if group.ranks[..member_idx].contains(member) {
            return Err(VerifyError::RankTwice {
                op,
                at: at(),
                member: *member,
            });
        }
    }
    if !group.ranks.contains(&rank) {
        return Err(VerifyError::GroupLacksRank {
            op,
            at: at(),
            rank,
            ranks: group.ranks.clone(),
        });
    }
    let expected = mesh.group(rank, &group.axes);
    if !group.axes.is_empty() && expected != group.ranks {
        return Err(VerifyError::GroupAxes {
            op,
            at: at(),
            axes: group.axes.clone(),
            expected,
            found: group.ranks.clone(),
        });
    }
    Ok(())
}

fn verify_counts(graph: &Graph, op: &Op, group: &Group, rank: usize) -> Result<(), VerifyError> {
    let (name, at) = (op.kind.name(), graph.op_name(op));
    if let OpKind::MoeMove(moved) = &op.kind {
        return verify_move(graph, op, moved, rank);
    }
    let ([input], [result]) = (op.inputs.as_slice(), op.results.as_slice()) else {
        return Err(VerifyError::Counts {
            op: name,
            at: at.into(),
            what: "the number of its inputs and results together".into(),
            expected: 2,
            found: op.inputs.len() + op.results.len(),
        });
    };
    let (input, result) = (graph.ty(*input), graph.ty(*result));
    let member_idx = group.ranks.iter().position(|member| *member == rank);
    let member_idx = member_idx.unwrap_or(0);
    let equal = |what: String, found: usize, expected: usize| {
        if found == expected {
            Ok(())
        } else {
            Err(VerifyError::Counts {
                op: name,
                at: at.into(),
                what,
                expected,
                found,
            })
        }
    };
    let size = |ty: &TensorType, dim: &Dim| ty.size_of(dim).unwrap_or(0);
    let mine = |counts: &[usize]| counts.get(member_idx).copied().unwrap_or(0);
    let all = |counts: &[usize]| counts.iter().sum::<usize>();
    let as_many = |counts: &[usize]| {
        equal(
            "the number of counts".into(),
            counts.len(),
            group.ranks.len(),
        )
    };
    // What the counts make of the input; the result must be just that.
    let mut expected = input.clone();
    let mut resize = |dim: &Dim, size: usize| {
        for (name, old) in &mut expected.shape {
            if name == dim {
                *old = size;
            }
        }
    };
    match &op.kind {
        OpKind::AllGather { dim, counts, .. } => {
            as_many(counts)?;
            equal(
                format!("this rank's count of `{dim}`"),
                mine(counts),
                size(input, dim),
            )?;
            resize(dim, all(counts));
        }
        OpKind::ReduceScatter { dim, counts, .. } => {
            as_many(counts)?;
            equal(
                format!("the sum of the counts of `{dim}`"),
                all(counts),
                size(input, dim),
            )?;
            resize(dim, mine(counts));
        }
        OpKind::AllToAll {
            split,
            split_counts,
            concat,
            concat_counts,
            ..
        } => {
            as_many(split_counts)?;
            as_many(concat_counts)?;
            equal(
                format!("the sum of the counts of `{split}`"),
                all(split_counts),
                size(input, split),
            )?;
            equal(
                format!("this rank's count of `{concat}`"),
                mine(concat_counts),
                size(input, concat),
            )?;
            resize(split, mine(split_counts));
            resize(concat, all(concat_counts));
        }
        OpKind::CollectivePermute { to, from, .. } => {
            for member in [to, from] {
                if !group.ranks.contains(member) {
                    return Err(VerifyError::GroupLacksRank {
                        op: name,
                        at: at.into(),
                        rank: *member,
                        ranks: group.ranks.clone(),
                    });
                }
            }
            // The sender's shard may be of another size; `verify_ranks` compares the two.
            expected = result.clone();
        }
        _ => {}
    }
    if *result != expected {
        return Err(VerifyError::ResultType {
            op: name,
            tensor: at.into(),
            expected,
            found: result.clone(),
        });
    }
    Ok(())
}

/// A move's result follows from its inputs; its experts are this rank's share of the group's.
fn verify_move(graph: &Graph, op: &Op, moved: &MoeMove, rank: usize) -> Result<(), VerifyError> {
    verify_results(graph, op)?;
    let Some(Shares { counts, group }) = moved.over.as_deref() else {
        return Ok(());
    };
    let member_idx = group.ranks.iter().position(|member| *member == rank);
    let before = counts.get(..member_idx.unwrap_or(0)).unwrap_or_default();
    let mine = member_idx.and_then(|idx| counts.get(idx)).copied();
    for (what, found, expected) in [
        ("the number of shares", counts.len(), group.ranks.len()),
        (
            "the experts of this rank",
            moved.dims.n_experts,
            mine.unwrap_or(0),
        ),
        (
            "the first expert of this rank",
            moved.dims.offset,
            before.iter().sum(),
        ),
    ] {
        if found != expected {
            return Err(VerifyError::Counts {
                op: op.kind.name(),
                at: graph.op_name(op).into(),
                what: what.into(),
                expected,
                found,
            });
        }
    }
    Ok(())
}

/// The last key at which an op of a global graph may begin.
fn last_offset(graph: &Graph, op: &Op) -> usize {
    let (OpKind::Attention(dims) | OpKind::AttentionGrad(dims)) = &op.kind else {
        return 0;
    };
    let size = |nth: usize, dim: &Dim| {
        let ty = op.inputs.get(nth).map(|id| graph.ty(*id));
        ty.and_then(|ty| ty.size_of(dim)).unwrap_or(0)
    };
    let (n_queries, n_keys) = (size(0, &dims.seq), size(1, &dims.kv_seq));
    if dims.causal {
        n_keys.saturating_sub(n_queries)
    } else {
        0
    }
}

fn offset(kind: &OpKind) -> usize {
    match kind {
        OpKind::Gather { offset, .. }
        | OpKind::ScatterAdd { offset, .. }
        | OpKind::Pick { offset, .. }
        | OpKind::CrossEntropyGrad { offset, .. } => *offset,
        OpKind::Attention(dims) | OpKind::AttentionGrad(dims) => dims.offset,
        OpKind::MoeDispatch(dims)
        | OpKind::MoeCombine(dims)
        | OpKind::MoeGateGrad(dims)
        | OpKind::MoeCounts(dims) => dims.offset,
        OpKind::MoeMove(moved) => moved.dims.offset,
        _ => 0,
    }
}

fn role_name(role: &Role) -> &'static str {
    match role {
        Role::Input => "an input",
        Role::Param(_) => "a parameter",
        Role::State { .. } => "a state",
        Role::Const(_) => "a constant",
        Role::Temp => "a result",
    }
}
