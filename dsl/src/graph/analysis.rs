//! What the structure of a graph says: order, dominators, cuts, repeated layers, live ranges.
//!
//! Enters: a graph. Leaves: facts about it, by op and tensor id.
//! Invariant: every list is in execution order, and every class is numbered by its first member, so
//! the same graph always gives the same answer.

use std::collections::BTreeMap;

use petgraph::Direction;
use petgraph::algo::{dominators, toposort};
use petgraph::graph::{DiGraph, NodeIndex};

use super::{Graph, Op, OpId, Role, TensorId, TensorType};
use crate::op::OpKind;

/// The ops as nodes (node i is op i), with an edge for every tensor from its producer to each reader.
/// Linear.
pub fn to_petgraph(graph: &Graph) -> DiGraph<OpId, TensorId> {
    let mut nodes = DiGraph::with_capacity(graph.ops.len(), graph.tensors.len());
    for (op_id, _) in graph.ops() {
        nodes.add_node(op_id);
    }
    let producers = graph.producers();
    for (op_id, op) in graph.ops() {
        for input in &op.inputs {
            if let Some(producer) = producers.get(input.index()).copied().flatten() {
                nodes.add_edge(node(producer), node(op_id), *input);
            }
        }
    }
    nodes
}

/// The ops in an order in which producers stand before readers: that of the graph when it is one.
/// Linear.
///
/// # Errors
/// An op that takes part in a cycle.
pub fn topological_order(graph: &Graph) -> Result<Vec<OpId>, OpId> {
    if in_order(graph) {
        return Ok(graph.ops().map(|(op_id, _)| op_id).collect());
    }
    toposort(&to_petgraph(graph), None)
        .map(|nodes| nodes.into_iter().map(op_of).collect())
        .map_err(|cycle| op_of(cycle.node_id()))
}

/// Whether every op stands after the producers of its inputs.
pub fn in_order(graph: &Graph) -> bool {
    let producers = graph.producers();
    graph.ops().all(|(op_id, op)| {
        op.inputs
            .iter()
            .filter_map(|input| producers.get(input.index()).copied().flatten())
            .all(|producer| producer < op_id)
    })
}

/// For every op, the last op that all ways from the sources to it go through; `None` when there is
/// no such op. Nearly linear.
pub fn dominators(graph: &Graph) -> Vec<Option<OpId>> {
    immediate(graph, Direction::Incoming)
}

/// For every op, the first op that all ways from it to the ends of the graph go through; `None` when
/// there is no such op. Nearly linear.
pub fn post_dominators(graph: &Graph) -> Vec<Option<OpId>> {
    immediate(graph, Direction::Outgoing)
}

/// The ops that all ways from the sources to `tensor` go through, its producer last.
pub fn articulation_ops(graph: &Graph, tensor: TensorId) -> Vec<OpId> {
    let dominators = dominators(graph);
    let mut ops = Vec::new();
    let mut next = graph.producers().get(tensor.index()).copied().flatten();
    while let Some(op_id) = next {
        ops.push(op_id);
        next = dominators[op_id.index()];
    }
    ops.reverse();
    ops
}

/// A place between two forward ops, and the results that are carried over it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The first op behind the cut.
    pub before: OpId,
    /// Results of ops in front of the cut that forward ops behind it read.
    pub crossing: Vec<TensorId>,
}

/// The places where the forward pass can be cut into stages with at most `max_crossing` tensors
/// carried over. Forward ops are those that an output depends on. Linear, times the crossings.
pub fn cuts(graph: &Graph, max_crossing: usize) -> Vec<Cut> {
    let forward = ancestors(graph, &graph.outputs);
    let mut last_reader: BTreeMap<TensorId, OpId> = BTreeMap::new();
    for (op_id, op) in graph.ops().filter(|(op_id, _)| forward[op_id.index()]) {
        for input in &op.inputs {
            if graph.tensor(*input).role == Role::Temp {
                last_reader.insert(*input, op_id);
            }
        }
    }
    let mut cuts = Vec::new();
    let mut open: Vec<TensorId> = Vec::new();
    for (op_id, op) in graph.ops().filter(|(op_id, _)| forward[op_id.index()]) {
        open.retain(|tensor| last_reader.get(tensor).is_some_and(|last| *last >= op_id));
        if !open.is_empty() && open.len() <= max_crossing {
            cuts.push(Cut {
                before: op_id,
                crossing: open.clone(),
            });
        }
        open.extend(op.results.iter().filter(|id| last_reader.contains_key(id)));
    }
    cuts
}

/// Number of a class of ops or tensors that a plan treats alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClassId(pub u32);

impl ClassId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Ops and tensors that do the same in different layers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ties {
    /// Class of every op.
    pub ops: Vec<ClassId>,
    /// Class of every tensor.
    pub tensors: Vec<ClassId>,
    pub n_op_classes: usize,
    pub n_tensor_classes: usize,
}

/// A layer: everything named `<stem>[<index>]…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// What stands in front of the index, such as `layers`.
    pub stem: String,
    pub index: usize,
    /// Forward, backward and optimizer ops, in execution order.
    pub ops: Vec<OpId>,
    /// Number of the layers' kind: layers of one kind have the same forward ops, wired alike.
    pub kind: usize,
}

/// The layers of a graph, found by the indices in names, by stem and index.
///
/// Two layers are of one kind when their forward ops (those before the gradients) are isomorphic:
/// the same ops with the same attributes and types in the same order, reading the same results of
/// the layer, the same tensors from outside all layers, or results of other layers.
pub fn layers(graph: &Graph) -> Vec<Layer> {
    let forward = ancestors(graph, &graph.outputs);
    let mut members: BTreeMap<(&str, usize), Vec<OpId>> = BTreeMap::new();
    for (op_id, op) in graph.ops() {
        if let Some(path) = LayerPath::of(graph.op_name(op)) {
            members
                .entry((path.stem, path.index))
                .or_default()
                .push(op_id);
        }
    }
    let mut kinds: BTreeMap<Vec<Step<'_>>, usize> = BTreeMap::new();
    members
        .into_iter()
        .map(|((stem, index), ops)| {
            let steps = signature(graph, &ops, &forward);
            let n_kinds = kinds.len();
            let kind = *kinds.entry(steps).or_insert(n_kinds);
            Layer {
                stem: stem.into(),
                index,
                ops,
                kind,
            }
        })
        .collect()
}

/// The ties of a graph: two ops are of one class when they stand in layers of one kind, bear the
/// same name up to the layer's index, and have the same kind, attributes and types; two tensors when
/// they are the same result of tied ops, or sources of the same name up to the index, role and type.
/// Everything outside layers is a class of its own.
///
/// Tied ops may read tensors of different classes where layers meet: the first layer reads the
/// embedding, the others the layer before.
pub fn ties(graph: &Graph) -> Ties {
    let kinds: BTreeMap<(String, usize), usize> = layers(graph)
        .into_iter()
        .map(|layer| ((layer.stem, layer.index), layer.kind))
        .collect();
    // Name up to the index, and the layer's kind; names outside layers are unique by themselves.
    let role_of = |name: &'_ str| -> (String, Option<usize>) {
        match LayerPath::of(name) {
            Some(path) => (
                format!("{}{}[*]{}", path.lead, path.stem, path.rest),
                kinds.get(&(path.stem.to_string(), path.index)).copied(),
            ),
            None => (name.to_string(), None),
        }
    };
    let mut op_classes: BTreeMap<OpKey<'_>, ClassId> = BTreeMap::new();
    let mut source_classes: BTreeMap<_, ClassId> = BTreeMap::new();
    let mut result_classes: BTreeMap<(ClassId, usize), ClassId> = BTreeMap::new();
    let mut ties = Ties {
        ops: Vec::with_capacity(graph.ops.len()),
        tensors: vec![ClassId(0); graph.tensors.len()],
        ..Ties::default()
    };
    for id in graph.tensor_ids() {
        let tensor = graph.tensor(id);
        if tensor.role == Role::Temp {
            continue;
        }
        let key = (role_of(&tensor.name), role_kind(&tensor.role), &tensor.ty);
        let class = *source_classes
            .entry(key)
            .or_insert_with(|| fresh(&mut ties.n_tensor_classes));
        ties.tensors[id.index()] = class;
    }
    for (_, op) in graph.ops() {
        let key = OpKey {
            role: role_of(graph.op_name(op)),
            form: Form::of(graph, op),
        };
        let class = *op_classes
            .entry(key)
            .or_insert_with(|| fresh(&mut ties.n_op_classes));
        ties.ops.push(class);
        for (result_idx, result) in op.results.iter().enumerate() {
            let class = *result_classes
                .entry((class, result_idx))
                .or_insert_with(|| fresh(&mut ties.n_tensor_classes));
            ties.tensors[result.index()] = class;
        }
    }
    ties
}

/// From where to where a tensor is needed, as positions of ops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiveRange {
    /// The op that makes it; 0 for sources.
    pub first: usize,
    /// The last op that reads it; the number of ops when it outlives the step.
    pub last: usize,
}

/// The live range of every tensor. Outputs, updated values, gradients, parameters, states and
/// constants live to the end; a result that nobody reads lives at its producer only. Linear.
pub fn live_ranges(graph: &Graph) -> Vec<LiveRange> {
    let mut ranges = vec![LiveRange { first: 0, last: 0 }; graph.tensors.len()];
    for (op_id, op) in graph.ops() {
        for result in &op.results {
            ranges[result.index()] = LiveRange {
                first: op_id.index(),
                last: op_id.index(),
            };
        }
        for input in &op.inputs {
            ranges[input.index()].last = op_id.index();
        }
    }
    let kept = graph
        .tensor_ids()
        .filter(|id| !matches!(graph.tensor(*id).role, Role::Temp | Role::Input));
    let ends = graph.outputs.iter().chain(graph.updates.values());
    for id in kept.chain(ends.chain(graph.gradients.values()).copied()) {
        ranges[id.index()].last = graph.ops.len();
    }
    ranges
}

/// Whether each op is needed for one of `tensors`. Linear.
pub fn ancestors(graph: &Graph, tensors: &[TensorId]) -> Vec<bool> {
    let mut needed_tensors = vec![false; graph.tensors.len()];
    for id in tensors {
        needed_tensors[id.index()] = true;
    }
    let mut needed = vec![false; graph.ops.len()];
    for (op_id, op) in graph.ops().collect::<Vec<_>>().into_iter().rev() {
        if op.results.iter().any(|id| needed_tensors[id.index()]) {
            needed[op_id.index()] = true;
            for id in &op.inputs {
                needed_tensors[id.index()] = true;
            }
        }
    }
    needed
}

/// A name that contains an index: `lead` `stem[index]` `rest`.
struct LayerPath<'a> {
    lead: &'a str,
    stem: &'a str,
    index: usize,
    rest: &'a str,
}

impl<'a> LayerPath<'a> {
    /// The first index in the name; the stem is the path segment it stands on.
    fn of(name: &'a str) -> Option<Self> {
        let (before, after) = name.split_once('[')?;
        let (index, rest) = after.split_once(']')?;
        let (lead, stem) = before.split_at(before.rfind('.').map_or(0, |dot| dot + 1));
        Some(Self {
            lead,
            stem,
            index: index.parse().ok()?,
            rest,
        })
    }
}

/// Kind and types of an op.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Form<'a> {
    kind: &'a OpKind,
    inputs: Vec<&'a TensorType>,
    results: Vec<&'a TensorType>,
}

impl<'a> Form<'a> {
    fn of(graph: &'a Graph, op: &'a Op) -> Self {
        Self {
            kind: &op.kind,
            inputs: op.inputs.iter().map(|id| graph.ty(*id)).collect(),
            results: op.results.iter().map(|id| graph.ty(*id)).collect(),
        }
    }
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct OpKey<'a> {
    role: (String, Option<usize>),
    form: Form<'a>,
}

/// One op of a layer, with its inputs as the layer sees them.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Step<'a> {
    name: &'a str,
    form: Form<'a>,
    inputs: Vec<Reference<'a>>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Reference<'a> {
    /// Result of an op of the layer: position of the op, index of the result.
    Inside(usize, usize),
    /// A source of the layer, by its name after the index.
    Own(&'a str),
    /// A source outside all layers, by its name.
    Shared(&'a str),
    /// A result from outside the layer.
    Outside,
}

/// The forward ops of a layer.
fn signature<'a>(graph: &'a Graph, ops: &[OpId], forward: &[bool]) -> Vec<Step<'a>> {
    let mut made: BTreeMap<TensorId, (usize, usize)> = BTreeMap::new();
    let mut steps: Vec<Step<'a>> = Vec::new();
    for op_id in ops.iter().filter(|op_id| forward[op_id.index()]) {
        let op = graph.op(*op_id);
        let inputs = op
            .inputs
            .iter()
            .map(|id| {
                let tensor = graph.tensor(*id);
                match (made.get(id), &tensor.role) {
                    (Some((step, result)), _) => Reference::Inside(*step, *result),
                    (None, Role::Temp) => Reference::Outside,
                    (None, _) => match LayerPath::of(&tensor.name) {
                        Some(path) => Reference::Own(path.rest),
                        None => Reference::Shared(&tensor.name),
                    },
                }
            })
            .collect();
        for (result_idx, result) in op.results.iter().enumerate() {
            made.insert(*result, (steps.len(), result_idx));
        }
        steps.push(Step {
            name: LayerPath::of(graph.op_name(op)).map_or("", |path| path.rest),
            form: Form::of(graph, op),
            inputs,
        });
    }
    steps
}

fn role_kind(role: &Role) -> u8 {
    match role {
        Role::Input => 0,
        Role::Param(_) => 1,
        Role::State { .. } => 2,
        Role::Const(_) => 3,
        Role::Temp => 4,
    }
}

fn fresh(n_classes: &mut usize) -> ClassId {
    let class = ClassId(*n_classes as u32);
    *n_classes += 1;
    class
}

fn node(op_id: OpId) -> NodeIndex {
    NodeIndex::new(op_id.index())
}

fn op_of(node: NodeIndex) -> OpId {
    OpId(node.index() as u32)
}

/// Immediate dominators from the side of the sources (`Incoming`: the flow begins at ops that read no
/// results) or of the ends (`Outgoing`: it begins at ops whose results are kept or not read).
fn immediate(graph: &Graph, side: Direction) -> Vec<Option<OpId>> {
    let ops = to_petgraph(graph);
    let mut flow = DiGraph::<(), ()>::with_capacity(ops.node_count() + 1, ops.edge_count());
    for _ in graph.ops() {
        flow.add_node(());
    }
    let root = flow.add_node(());
    for edge in ops.edge_indices() {
        if let Some((from, to)) = ops.edge_endpoints(edge) {
            let (from, to) = match side {
                Direction::Incoming => (from, to),
                Direction::Outgoing => (to, from),
            };
            flow.add_edge(from, to, ());
        }
    }
    let ends: Vec<NodeIndex> = ops.externals(side).collect();
    for end in ends {
        flow.add_edge(root, end, ());
    }
    if side == Direction::Outgoing {
        let producers = graph.producers();
        let kept = graph.outputs.iter().chain(graph.updates.values());
        for id in kept.chain(graph.gradients.values()) {
            if let Some(op_id) = producers.get(id.index()).copied().flatten() {
                flow.add_edge(root, node(op_id), ());
            }
        }
    }
    let found = dominators::simple_fast(&flow, root);
    graph
        .ops()
        .map(|(op_id, _)| {
            found
                .immediate_dominator(node(op_id))
                .filter(|dominator| *dominator != root)
                .map(op_of)
        })
        .collect()
}
