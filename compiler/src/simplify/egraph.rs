//! The e-graph of one graph on all ranks, and its saturation.
//!
//! Enters: isomorphic graphs. Leaves: an e-graph in which every class holds the ways found to
//! compute one tensor (or the results of one op), and the classes of the input's tensors.
//! Invariants: all nodes of a class have the same result types on every rank; nodes of the forward
//! and of the backward phase are distinct, because what is made again there on purpose (partitioning
//! gathers tensors again) need not stay alive in between.

use std::collections::{BTreeSet, HashMap};

use egg::{Analysis, DidMerge, EGraph, Id, Language};

use meshweave_dsl::dtype::Scalar;
use meshweave_dsl::graph::{ConstInit, Graph, Op, Role, TensorId, TensorType};
use meshweave_dsl::op::OpKind;

use super::joint::{JointTerm, join};
use super::price::Prices;
use super::rules::{RULES, merge_projections};
use super::{Options, Result, SimplifyError};

/// What a node computes, by its index in the table of [`Facts`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct KindId(pub u32);

/// A node: an op on all ranks, a source, or one result of an op that has several.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Node {
    pub kind: KindId,
    pub phase: Phase,
    pub children: Vec<Id>,
}

/// Whether an op is needed by the outputs, or by gradients and updates only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Phase {
    Forward,
    Backward,
}

impl Language for Node {
    type Discriminant = KindId;

    fn discriminant(&self) -> KindId {
        self.kind
    }

    fn matches(&self, other: &Self) -> bool {
        self.kind == other.kind
            && self.phase == other.phase
            && self.children.len() == other.children.len()
    }

    fn children(&self) -> &[Id] {
        &self.children
    }

    fn children_mut(&mut self) -> &mut [Id] {
        &mut self.children
    }
}

/// An entry of the table of kinds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Entry {
    Source(TensorId),
    /// The n-th result of the op below.
    Result(usize),
    Op {
        /// One per rank.
        kinds: Vec<OpKind>,
        /// Per rank, where the shape rule does not give them.
        types: Option<Vec<Vec<TensorType>>>,
    },
}

/// What is known of sources.
#[derive(Clone, Debug)]
pub(super) struct Source {
    /// One per rank.
    pub types: Vec<TensorType>,
    /// Set when every element is this number.
    pub fill: Option<Scalar>,
}

/// The table of kinds, and what the e-graph knows of each class.
#[derive(Default)]
pub(super) struct Facts {
    pub entries: Vec<Entry>,
    pub sources: HashMap<TensorId, Source>,
    ids: HashMap<Entry, KindId>,
    /// The first broken invariant, reported after the rebuild.
    broken: Option<String>,
}

/// What is known of a class.
#[derive(Clone, Debug)]
pub(super) struct ClassFacts {
    /// `types[result][rank]`.
    pub types: Vec<Vec<TensorType>>,
    /// The earliest phase that computes it.
    pub phase: Phase,
}

impl Facts {
    fn intern(&mut self, entry: Entry) -> KindId {
        if let Some(id) = self.ids.get(&entry) {
            return *id;
        }
        let id = KindId(self.entries.len() as u32);
        self.entries.push(entry.clone());
        self.ids.insert(entry, id);
        id
    }

    pub fn entry(&self, kind: KindId) -> &Entry {
        &self.entries[kind.0 as usize]
    }
}

impl Analysis<Node> for Facts {
    type Data = ClassFacts;

    fn make(graph: &mut EGraph<Node, Self>, node: &Node, _id: Id) -> ClassFacts {
        let phase = node.phase;
        let facts = &graph.analysis;
        let types = match facts.entry(node.kind) {
            Entry::Source(id) => facts
                .sources
                .get(id)
                .map(|source| vec![source.types.clone()]),
            Entry::Result(result_idx) => graph[node.children[0]]
                .data
                .types
                .get(*result_idx)
                .map(|of_ranks| vec![of_ranks.clone()]),
            Entry::Op { kinds, types } => match types {
                Some(types) => Some(transposed(types)),
                None => infer(graph, kinds, &node.children).ok(),
            },
        };
        let types = types.unwrap_or_else(|| {
            let entry = format!("no types for {:?}", graph.analysis.entry(node.kind));
            graph.analysis.broken.get_or_insert(entry);
            Vec::new()
        });
        ClassFacts { types, phase }
    }

    fn merge(&mut self, a: &mut ClassFacts, b: ClassFacts) -> DidMerge {
        if a.types != b.types {
            self.broken.get_or_insert_with(|| {
                format!(
                    "a rewrite equates {:?} with {:?}",
                    a.types.first().and_then(|of_ranks| of_ranks.first()),
                    b.types.first().and_then(|of_ranks| of_ranks.first())
                )
            });
        }
        a.phase = a.phase.min(b.phase);
        // Types agree, and no other fact is derived from phases.
        DidMerge(false, false)
    }
}

/// `[rank][result]` to `[result][rank]`.
fn transposed(types: &[Vec<TensorType>]) -> Vec<Vec<TensorType>> {
    let n_results = types.first().map_or(0, Vec::len);
    (0..n_results)
        .map(|result_idx| {
            types
                .iter()
                .filter_map(|of_rank| of_rank.get(result_idx).cloned())
                .collect()
        })
        .collect()
}

/// `types[result][rank]` by the shape rules.
fn infer(
    graph: &EGraph<Node, Facts>,
    kinds: &[OpKind],
    children: &[Id],
) -> std::result::Result<Vec<Vec<TensorType>>, String> {
    let of_ranks: Vec<Vec<TensorType>> = kinds
        .iter()
        .enumerate()
        .map(|(rank, kind)| {
            let inputs: Vec<&TensorType> = children
                .iter()
                .filter_map(|id| graph[*id].data.types.first()?.get(rank))
                .collect();
            kind.infer(&inputs).map_err(|error| error.to_string())
        })
        .collect::<std::result::Result<_, _>>()?;
    Ok(transposed(&of_ranks))
}

/// One op of a class as one rank sees it, and through it the classes around.
#[derive(Clone, Copy)]
pub struct View<'a> {
    graph: &'a EGraph<Node, Facts>,
    node: &'a Node,
    kinds: &'a [OpKind],
    class: Id,
    rank: usize,
}

impl<'a> View<'a> {
    /// The views on rank 0 of all ops of one result.
    pub(super) fn all(graph: &'a EGraph<Node, Facts>) -> impl Iterator<Item = Self> {
        graph
            .classes()
            .flat_map(move |class| Self::of(graph, class.id, 0))
    }

    fn of(graph: &'a EGraph<Node, Facts>, class: Id, rank: usize) -> impl Iterator<Item = Self> {
        let data = &graph[class];
        let nodes = if data.data.types.len() == 1 {
            data.nodes.as_slice()
        } else {
            &[]
        };
        nodes
            .iter()
            .filter_map(move |node| match graph.analysis.entry(node.kind) {
                Entry::Op { kinds, .. } => Some(Self {
                    graph,
                    node,
                    kinds,
                    class,
                    rank,
                }),
                _ => None,
            })
    }

    /// The rank whose view this is.
    pub fn rank(self) -> usize {
        self.rank
    }

    /// Number of ranks that are rewritten together.
    pub fn n_ranks(self) -> usize {
        self.kinds.len()
    }

    /// The same op on another rank.
    pub fn at(self, rank: usize) -> Self {
        Self { rank, ..self }
    }

    /// What the op computes on this rank.
    pub fn kind(self) -> &'a OpKind {
        &self.kinds[self.rank]
    }

    /// The classes it reads.
    pub fn inputs(self) -> &'a [Id] {
        &self.node.children
    }

    /// The class that it is one way to compute.
    pub fn class(self) -> Id {
        self.class
    }

    /// The rank's type of a tensor.
    pub fn ty(self, id: Id) -> &'a TensorType {
        &self.graph[id].data.types[0][self.rank]
    }

    /// The ops of one result that compute a class.
    pub fn ops(self, id: Id) -> impl Iterator<Item = View<'a>> {
        Self::of(self.graph, id, self.rank)
    }

    /// The number that every element of a class is, when it is a constant of that kind.
    pub fn fill(self, id: Id) -> Option<Scalar> {
        self.graph[id]
            .nodes
            .iter()
            .find_map(|node| match self.graph.analysis.entry(node.kind) {
                Entry::Source(source) => self.graph.analysis.sources.get(source)?.fill,
                _ => None,
            })
    }

    /// Whether a class is an input, a parameter, a state or a constant.
    pub fn is_source(self, id: Id) -> bool {
        self.graph[id]
            .nodes
            .iter()
            .any(|node| matches!(self.graph.analysis.entry(node.kind), Entry::Source(_)))
    }
}

/// The e-graph with what it takes to read graphs out of it again.
pub(super) struct Saturation {
    pub graph: EGraph<Node, Facts>,
    /// The class of every tensor of the input.
    pub class_of: Vec<Id>,
    /// The nodes of the input, in the order of its ops.
    pub input_nodes: Vec<(Id, Node)>,
    /// Classes that must be computed: outputs, updated values, gradients.
    pub roots: Vec<Id>,
    /// Nodes that are worth choosing together only.
    pub bundles: Vec<Vec<(Id, Node)>>,
}

impl Saturation {
    /// The e-graph of the graphs, unsaturated (common subexpressions are one class already).
    pub fn new(graphs: &[Graph]) -> Result<Self> {
        let Some(first) = graphs.first() else {
            return Err(SimplifyError::Internal("no graph".into()));
        };
        check_isomorphic(graphs, first)?;
        let mut saturation = Self {
            graph: EGraph::new(Facts::default()),
            class_of: Vec::with_capacity(first.tensors.len()),
            input_nodes: Vec::with_capacity(first.ops.len()),
            roots: Vec::new(),
            bundles: Vec::new(),
        };
        let phases = phases(first);
        let mut class_of: Vec<Option<Id>> = vec![None; first.tensors.len()];
        for id in first.tensor_ids() {
            let tensor = first.tensor(id);
            if tensor.role == Role::Temp {
                continue;
            }
            let source = Source {
                types: graphs.iter().map(|graph| graph.ty(id).clone()).collect(),
                fill: match &tensor.role {
                    Role::Const(ConstInit::Fill(number)) => Some(*number),
                    _ => None,
                },
            };
            saturation.graph.analysis.sources.insert(id, source);
            let kind = saturation.graph.analysis.intern(Entry::Source(id));
            class_of[id.index()] = Some(saturation.graph.add(Node {
                kind,
                phase: Phase::Forward,
                children: Vec::new(),
            }));
        }
        for (op_idx, op) in first.ops.iter().enumerate() {
            saturation.add_op(graphs, op_idx, op, phases[op_idx], &mut class_of)?;
        }
        saturation.class_of = class_of
            .into_iter()
            .enumerate()
            .map(|(tensor_idx, class)| {
                class.ok_or_else(|| {
                    SimplifyError::Internal(format!(
                        "nothing makes `{}`",
                        first.tensors[tensor_idx].name
                    ))
                })
            })
            .collect::<Result<_>>()?;
        let roots = first
            .outputs
            .iter()
            .chain(first.gradients.values())
            .chain(first.updates.values());
        saturation.roots = roots.map(|id| saturation.class_of[id.index()]).collect();
        saturation.graph.rebuild();
        saturation.check()?;
        Ok(saturation)
    }

    fn add_op(
        &mut self,
        graphs: &[Graph],
        op_idx: usize,
        op: &Op,
        phase: Phase,
        class_of: &mut [Option<Id>],
    ) -> Result<()> {
        let children = op
            .inputs
            .iter()
            .map(|id| class_of[id.index()])
            .collect::<Option<Vec<Id>>>()
            .ok_or_else(|| {
                SimplifyError::Internal(format!(
                    "`{}` reads what no op before it makes",
                    graphs[0].op_name(op)
                ))
            })?;
        let kinds: Vec<OpKind> = graphs
            .iter()
            .map(|graph| graph.ops[op_idx].kind.clone())
            .collect();
        let types: Vec<Vec<TensorType>> = graphs
            .iter()
            .map(|graph| op.results.iter().map(|id| graph.ty(*id).clone()).collect())
            .collect();
        let follows = infer(&self.graph, &kinds, &children)
            .is_ok_and(|inferred| inferred == transposed(&types));
        let kind = self.graph.analysis.intern(Entry::Op {
            kinds,
            types: (!follows).then_some(types),
        });
        let node = Node {
            kind,
            phase,
            children,
        };
        let class = self.graph.add(node.clone());
        self.input_nodes.push((class, node));
        if let [result] = op.results.as_slice() {
            class_of[result.index()] = Some(class);
            return Ok(());
        }
        for (result_idx, result) in op.results.iter().enumerate() {
            let kind = self.graph.analysis.intern(Entry::Result(result_idx));
            let node = Node {
                kind,
                phase,
                children: vec![class],
            };
            class_of[result.index()] = Some(self.graph.add(node));
        }
        Ok(())
    }

    /// Applies all rules until nothing changes or a limit is reached; returns what was found.
    pub fn run(&mut self, options: &Options) -> Result<Vec<(&'static str, usize)>> {
        let n_nodes = options.n_nodes_per_op * (self.input_nodes.len() + self.class_of.len()) + 512;
        let mut found = vec![0; RULES.len() + 1];
        for _ in 0..options.n_rounds {
            let mut equalities: Vec<(usize, Id, JointTerm)> = Vec::new();
            for view in View::all(&self.graph) {
                find(view, &mut equalities);
            }
            let mut has_changed = false;
            for (rule_idx, class, term) in equalities {
                if let Some((_, changed)) = self.equate(class, &term) {
                    found[rule_idx] += usize::from(changed);
                    has_changed |= changed;
                }
            }
            self.graph.rebuild();
            self.check()?;
            for group in merge_projections(&View::all(&self.graph).collect::<Vec<_>>()) {
                let mut bundle = Vec::new();
                for (class, term) in group {
                    if let Some((Some(node), changed)) = self.equate(class, &term) {
                        found[RULES.len()] += usize::from(changed);
                        has_changed |= changed;
                        bundle.push((class, node));
                    }
                }
                if !self.bundles.contains(&bundle) {
                    self.bundles.push(bundle);
                }
            }
            self.graph.rebuild();
            self.check()?;
            if !has_changed || self.graph.total_number_of_nodes() > n_nodes {
                break;
            }
        }
        let names = RULES
            .iter()
            .map(|rule| rule.name)
            .chain(["merge-projections"]);
        Ok(names.zip(found).filter(|(_, times)| *times > 0).collect())
    }

    /// Adds a term and makes it equal to a class; its top node, and whether that was news.
    fn equate(&mut self, class: Id, term: &JointTerm) -> Option<(Option<Node>, bool)> {
        let phase = self.graph[class].data.phase;
        let (id, node) = self.build(term, phase)?;
        if self.graph[id].data.types != self.graph[class].data.types {
            return None;
        }
        let changed = self.graph.union(class, id);
        Some((node, changed))
    }

    /// The class of a term and its top node; `None` when a shape rule refuses a part of it.
    fn build(&mut self, term: &JointTerm, phase: Phase) -> Option<(Id, Option<Node>)> {
        let (kinds, inputs, types) = match term {
            JointTerm::Class(id) => return Some((self.graph.find(*id), None)),
            JointTerm::Op {
                kinds,
                inputs,
                types,
            } => (kinds, inputs, types),
        };
        let children: Vec<Id> = inputs
            .iter()
            .map(|term| self.build(term, phase).map(|(id, _)| id))
            .collect::<Option<_>>()?;
        let types: Option<Vec<Vec<TensorType>>> = match types {
            Some(types) => Some(types.iter().map(|ty| vec![ty.clone()]).collect()),
            None => {
                infer(&self.graph, kinds, &children).ok()?;
                None
            }
        };
        let kind = self.graph.analysis.intern(Entry::Op {
            kinds: kinds.clone(),
            types,
        });
        let node = Node {
            kind,
            phase,
            children,
        };
        Some((self.graph.add(node.clone()), Some(node)))
    }

    fn check(&self) -> Result<()> {
        match &self.graph.analysis.broken {
            Some(what) => Err(SimplifyError::Internal(what.clone())),
            None => Ok(()),
        }
    }

    /// Seconds of the graph that came in, dead ops included.
    pub fn input_price(&self, prices: &Prices) -> f64 {
        self.input_nodes
            .iter()
            .map(|(_, node)| prices.node(&self.graph, node))
            .sum()
    }
}

/// What the rules say of one op, on all ranks alike.
fn find(view: View<'_>, equalities: &mut Vec<(usize, Id, JointTerm)>) {
    for (rule_idx, rule) in RULES.iter().enumerate() {
        let first = (rule.equals)(view);
        if first.is_empty() {
            continue;
        }
        let mut by_rank = vec![first];
        by_rank.extend((1..view.n_ranks()).map(|rank| (rule.equals)(view.at(rank))));
        if by_rank.iter().any(|terms| terms.len() != by_rank[0].len()) {
            continue;
        }
        let mut of_ranks: Vec<_> = by_rank.into_iter().map(Vec::into_iter).collect();
        while let Some(terms) = of_ranks
            .iter_mut()
            .map(Iterator::next)
            .collect::<Option<Vec<_>>>()
        {
            if let Some(term) = join(terms) {
                equalities.push((rule_idx, view.class(), term));
            }
        }
    }
}

/// The same ops with the same operands on every rank.
fn check_isomorphic(graphs: &[Graph], first: &Graph) -> Result<()> {
    for (rank, graph) in graphs.iter().enumerate() {
        let same_ops = graph.ops.len() == first.ops.len()
            && graph.tensors.len() == first.tensors.len()
            && graph.ops.iter().zip(&first.ops).all(|(a, b)| {
                a.inputs == b.inputs
                    && a.results == b.results
                    && std::mem::discriminant(&a.kind) == std::mem::discriminant(&b.kind)
            });
        let same_ends = graph.outputs == first.outputs
            && graph.updates == first.updates
            && graph.gradients == first.gradients;
        if !same_ops || !same_ends {
            return Err(SimplifyError::Internal(format!(
                "rank {rank} has another graph than rank 0 (`{}`)",
                first.name
            )));
        }
    }
    Ok(())
}

/// Per op: whether the outputs need it, or only gradients and updates do.
fn phases(graph: &Graph) -> Vec<Phase> {
    let mut needed: BTreeSet<TensorId> = graph.outputs.iter().copied().collect();
    let mut phases = vec![Phase::Backward; graph.ops.len()];
    for (op_idx, op) in graph.ops.iter().enumerate().rev() {
        if op.results.iter().any(|id| needed.contains(id)) {
            phases[op_idx] = Phase::Forward;
            needed.extend(op.inputs.iter().copied());
        }
    }
    phases
}
