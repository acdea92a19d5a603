//! The walk over a graph's ops: one graph serially, or the local graphs of all ranks in lockstep.
//!
//! Invariant: every op runs exactly once, after its inputs; a collective runs when all members of
//! its group have come to it.

use std::collections::BTreeMap;

use meshweave_dsl::graph::{ConstInit, Graph, Init, Op, OpId, Role, TensorId};
use meshweave_dsl::op::OpKind;

use super::collective::exchange;
use super::init::initial_value;
use super::{ReferenceError, Result, Value, evaluate_op};

/// The values of a graph's tensors.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Values {
    values: Vec<Option<Value>>,
}

impl Values {
    fn new(graph: &Graph) -> Self {
        Self {
            values: vec![None; graph.tensors.len()],
        }
    }

    /// The value of a tensor; `None` when it was not computed or already dropped.
    pub fn get(&self, id: TensorId) -> Option<&Value> {
        self.values.get(id.index())?.as_ref()
    }

    /// The value of a tensor.
    ///
    /// # Errors
    /// It was not computed or already dropped.
    pub fn require(&self, graph: &Graph, id: TensorId) -> Result<&Value> {
        self.get(id).ok_or_else(|| {
            ReferenceError::Internal(format!("`{}` has no value", graph.tensor(id).name))
        })
    }

    /// The value of the tensor of this name.
    pub fn named(&self, graph: &Graph, name: &str) -> Option<&Value> {
        self.get(graph.find(name)?)
    }

    pub(super) fn take(&mut self, id: TensorId) -> Option<Value> {
        self.values.get_mut(id.index())?.take()
    }

    fn set(&mut self, graph: &Graph, id: TensorId, value: Value) -> Result<()> {
        let tensor = graph.tensor(id);
        if *value.ty() != tensor.ty {
            return Err(ReferenceError::Invalid(format!(
                "`{}` is {}, the value is {}",
                tensor.name,
                tensor.ty,
                value.ty()
            )));
        }
        self.values[id.index()] = Some(value);
        Ok(())
    }
}

/// The values of all tensors of a global graph.
///
/// `inputs` gives the inputs and whatever other sources shall differ from their initial values.
///
/// # Errors
/// An input is missing or of another type; an op is a collective or does not fit its inputs.
pub fn evaluate(graph: &Graph, inputs: &BTreeMap<TensorId, Value>) -> Result<Values> {
    let mut values = global_sources(graph, inputs)?;
    for (_, op) in graph.ops() {
        run_local(graph, op, &mut values)?;
    }
    Ok(values)
}

/// Like [`evaluate`], but drops each value after its last use unless it stands in `keep`.
pub(super) fn evaluate_keeping(
    graph: &Graph,
    inputs: &BTreeMap<TensorId, Value>,
    keep: &[TensorId],
) -> Result<Values> {
    let mut values = global_sources(graph, inputs)?;
    let mut last_use: Vec<Option<OpId>> = vec![None; graph.tensors.len()];
    for (op_id, op) in graph.ops() {
        for id in op.inputs.iter().chain(&op.results) {
            last_use[id.index()] = Some(op_id);
        }
    }
    for id in keep {
        last_use[id.index()] = None;
    }
    for (op_id, op) in graph.ops() {
        run_local(graph, op, &mut values)?;
        for id in op.inputs.iter().chain(&op.results) {
            if last_use[id.index()] == Some(op_id) {
                values.take(*id);
            }
        }
    }
    Ok(values)
}

/// The values of all tensors on every rank: `graphs[r]` and `inputs[r]` are those of rank r.
///
/// Sources that `inputs` does not give start by their roles where that is the same for every
/// shard; the others (hashed parameters, rotary tables) must be given.
///
/// # Errors
/// Those of [`evaluate`]; a collective whose members disagree, or that some member never reaches.
pub fn evaluate_ranks(
    graphs: &[Graph],
    inputs: &[BTreeMap<TensorId, Value>],
) -> Result<Vec<Values>> {
    if graphs.len() != inputs.len() {
        return Err(ReferenceError::Invalid(format!(
            "{} graphs have the inputs of {} ranks",
            graphs.len(),
            inputs.len()
        )));
    }
    let mut values = graphs
        .iter()
        .zip(inputs)
        .enumerate()
        .map(|(rank, (graph, inputs))| {
            local_sources(graph, inputs).map_err(|error| at_rank(rank, error))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut next_op = vec![0; graphs.len()];
    loop {
        for (rank, graph) in graphs.iter().enumerate() {
            while let Some(op) = graph.ops.get(next_op[rank])
                && op.kind.group().is_none()
            {
                run_local(graph, op, &mut values[rank]).map_err(|error| at_rank(rank, error))?;
                next_op[rank] += 1;
            }
        }
        let waiting: Vec<Option<&Op>> = graphs
            .iter()
            .zip(&next_op)
            .map(|(graph, next)| graph.ops.get(*next))
            .collect();
        if waiting.iter().all(Option::is_none) {
            return Ok(values);
        }
        let ready = first_ready(graphs, &waiting)?;
        run_collective(graphs, &ready, &waiting, &mut values)?;
        for rank in ready {
            next_op[rank] += 1;
        }
    }
}

/// The ranks of the first collective to which all its members have come.
fn first_ready(graphs: &[Graph], waiting: &[Option<&Op>]) -> Result<Vec<usize>> {
    for (rank, op) in waiting.iter().enumerate() {
        let Some(group) = op.and_then(|op| op.kind.group()) else {
            continue;
        };
        if !group.ranks.contains(&rank) {
            return Err(ReferenceError::Invalid(format!(
                "rank {rank} takes part in a collective of the ranks {:?}",
                group.ranks
            )));
        }
        let arrived = group.ranks.iter().all(|member| {
            let other = waiting.get(*member).copied().flatten();
            other.and_then(|op| op.kind.group()).map(|it| &it.ranks) == Some(&group.ranks)
        });
        if arrived {
            return Ok(group.ranks.clone());
        }
    }
    let places: Vec<String> = waiting
        .iter()
        .enumerate()
        .map(|(rank, op)| match op {
            Some(op) => format!(
                "rank {rank} at {} `{}` of {:?}",
                op.kind.name(),
                graphs[rank].op_name(op),
                op.kind.group().map_or(&[][..], |group| &group.ranks)
            ),
            None => format!("rank {rank} is done"),
        })
        .collect();
    Err(ReferenceError::Invalid(format!(
        "the collectives cannot go on: {}",
        places.join(", ")
    )))
}

fn run_collective(
    graphs: &[Graph],
    ranks: &[usize],
    waiting: &[Option<&Op>],
    values: &mut [Values],
) -> Result<()> {
    let mut members = Vec::with_capacity(ranks.len());
    for rank in ranks {
        let Some(op) = waiting[*rank] else {
            return Err(ReferenceError::Internal(format!("rank {rank} is done")));
        };
        members.push((*rank, op));
    }
    let Some(((first_rank, first), others)) = members.split_first() else {
        return Err(ReferenceError::Internal("a group has no ranks".into()));
    };
    for (rank, op) in others {
        if !first.kind.meets(&op.kind) {
            return Err(ReferenceError::Invalid(format!(
                "rank {first_rank} is at {:?} `{}`, rank {rank} at {:?} `{}`",
                first.kind,
                graphs[*first_rank].op_name(first),
                op.kind,
                graphs[*rank].op_name(op)
            )));
        }
    }
    check_partners(&members)?;
    let mut inputs = Vec::with_capacity(members.len());
    let mut routes: Vec<Vec<&Value>> = Vec::with_capacity(members.len());
    for (rank, op) in &members {
        let ([input, others @ ..], [_]) = (op.inputs.as_slice(), op.results.as_slice()) else {
            return Err(ReferenceError::Internal(format!(
                "collective `{}` has {} inputs and {} results instead of one of each",
                graphs[*rank].op_name(op),
                op.inputs.len(),
                op.results.len()
            )));
        };
        let require = |id: &TensorId| values[*rank].require(&graphs[*rank], *id);
        inputs.push(require(input)?);
        routes.push(others.iter().map(require).collect::<Result<_>>()?);
    }
    let results = members
        .iter()
        .enumerate()
        .map(|(member_idx, (rank, op))| {
            let routes = &routes[member_idx];
            exchange(&op.kind, member_idx, &inputs, routes).map_err(|error| at_rank(*rank, error))
        })
        .collect::<Result<Vec<_>>>()?;
    for ((rank, op), result) in members.iter().zip(results) {
        for id in &op.results {
            values[*rank]
                .set(&graphs[*rank], *id, result.clone())
                .map_err(|error| at_rank(*rank, error))?;
        }
    }
    Ok(())
}

/// In a permutation, the rank that one receives from sends to it.
fn check_partners(members: &[(usize, &Op)]) -> Result<()> {
    for (rank, op) in members {
        let OpKind::CollectivePermute { from, .. } = &op.kind else {
            continue;
        };
        let sender = members.iter().find(|(member, _)| member == from);
        match sender.map(|(_, op)| &op.kind) {
            Some(OpKind::CollectivePermute { to, .. }) if to == rank => {}
            Some(OpKind::CollectivePermute { to, .. }) => {
                return Err(ReferenceError::Invalid(format!(
                    "rank {rank} receives from rank {from}, which sends to rank {to}"
                )));
            }
            _ => {
                return Err(ReferenceError::Invalid(format!(
                    "rank {rank} receives from rank {from}, which is not in the group"
                )));
            }
        }
    }
    Ok(())
}

fn run_local(graph: &Graph, op: &Op, values: &mut Values) -> Result<()> {
    let inputs = op
        .inputs
        .iter()
        .map(|id| values.require(graph, *id))
        .collect::<Result<Vec<_>>>()?;
    let at = |error: ReferenceError| match error {
        ReferenceError::Op(mut error) => {
            error.at = graph.op_name(op).into();
            error.into()
        }
        ReferenceError::Invalid(reason) => {
            ReferenceError::Invalid(format!("`{}`: {reason}", graph.op_name(op)))
        }
        ReferenceError::Internal(reason) => {
            ReferenceError::Internal(format!("`{}`: {reason}", graph.op_name(op)))
        }
    };
    let results = evaluate_op(&op.kind, &inputs).map_err(at)?;
    if results.len() != op.results.len() {
        return Err(ReferenceError::Internal(format!(
            "`{}` has {} results, its kind gives {}",
            graph.op_name(op),
            op.results.len(),
            results.len()
        )));
    }
    for (id, value) in op.results.iter().zip(results) {
        values.set(graph, *id, value)?;
    }
    Ok(())
}

fn global_sources(graph: &Graph, inputs: &BTreeMap<TensorId, Value>) -> Result<Values> {
    let mut values = Values::new(graph);
    for id in graph.tensor_ids() {
        let tensor = graph.tensor(id);
        let value = match inputs.get(&id) {
            Some(value) => Some(value.clone()),
            None => initial_value(&tensor.role, &tensor.ty)?,
        };
        match value {
            Some(value) => values.set(graph, id, value)?,
            None if tensor.role == Role::Input => return Err(missing(&tensor.name)),
            None => {}
        }
    }
    Ok(values)
}

fn local_sources(graph: &Graph, inputs: &BTreeMap<TensorId, Value>) -> Result<Values> {
    let mut values = Values::new(graph);
    for id in graph.tensor_ids() {
        let tensor = graph.tensor(id);
        let same_everywhere = matches!(
            tensor.role,
            Role::Param(Init::Zeros | Init::Ones)
                | Role::State { .. }
                | Role::Const(ConstInit::Fill(_))
        );
        let value = match inputs.get(&id) {
            Some(value) => Some(value.clone()),
            None if same_everywhere => initial_value(&tensor.role, &tensor.ty)?,
            None => None,
        };
        match value {
            Some(value) => values.set(graph, id, value)?,
            None if tensor.role == Role::Temp => {}
            None => return Err(missing(&tensor.name)),
        }
    }
    Ok(values)
}

fn missing(name: &str) -> ReferenceError {
    ReferenceError::Invalid(format!("`{name}` has no value; give one among the inputs"))
}

fn at_rank(rank: usize, error: ReferenceError) -> ReferenceError {
    match error {
        ReferenceError::Invalid(reason) => {
            ReferenceError::Invalid(format!("rank {rank}: {reason}"))
        }
        ReferenceError::Internal(reason) => {
            ReferenceError::Internal(format!("rank {rank}: {reason}"))
        }
        ReferenceError::Op(mut error) => {
            error.reason = format!("{} (rank {rank})", error.reason);
            error.into()
        }
    }
}
