//! From chosen nodes back to graphs.
//!
//! Enters: one node per class, and the graphs that came in. Leaves: the same number of graphs.
//! Invariants: sources are all there, in their order; a class that held a tensor of the input bears
//! its name (an output's before a gradient's before the first); ops stand where the first op of
//! their class stood, new ones right before their first reader.

use std::collections::{BTreeMap, HashMap, HashSet};

use egg::Id;

use meshweave_dsl::graph::{Graph, Op, Role, Tensor, TensorId};

use super::egraph::{Entry, Node, Saturation};
use super::extract::Choice;
use super::{Result, SimplifyError};

pub(super) fn rebuild(
    saturation: &Saturation,
    choice: &Choice,
    graphs: &[Graph],
) -> Result<Vec<Graph>> {
    let Some(first) = graphs.first() else {
        return Ok(Vec::new());
    };
    let mut rebuild = Rebuild::new(saturation, choice, graphs, first);
    rebuild.sources(first)?;
    // Classes of the input in the order of its ops; each brings what it needs before it.
    for op in &first.ops {
        for result in &op.results {
            let class = saturation.graph.find(saturation.class_of[result.index()]);
            if choice.nodes.contains_key(&class) {
                rebuild.emit(class)?;
            }
        }
    }
    for root in &saturation.roots {
        rebuild.emit(saturation.graph.find(*root))?;
    }
    rebuild.finish(first)
}

struct Rebuild<'a> {
    saturation: &'a Saturation,
    choice: &'a Choice,
    graphs: Vec<Graph>,
    /// The tensor of every class made so far, the same on all ranks.
    made: HashMap<Id, TensorId>,
    /// The name of every class that held a tensor of the input.
    names: HashMap<Id, String>,
    taken: HashSet<String>,
}

impl<'a> Rebuild<'a> {
    fn new(
        saturation: &'a Saturation,
        choice: &'a Choice,
        graphs: &[Graph],
        first: &Graph,
    ) -> Self {
        let preferred = first
            .outputs
            .iter()
            .chain(first.gradients.values())
            .chain(first.updates.values())
            .copied();
        let mut names = HashMap::new();
        for id in preferred.chain(first.tensor_ids()) {
            let class = saturation.graph.find(saturation.class_of[id.index()]);
            names
                .entry(class)
                .or_insert_with(|| first.tensor(id).name.clone());
        }
        Self {
            saturation,
            choice,
            graphs: graphs
                .iter()
                .map(|graph| Graph::new(graph.name.clone()))
                .collect(),
            made: HashMap::new(),
            names,
            taken: first
                .tensors
                .iter()
                .map(|tensor| tensor.name.clone())
                .collect(),
        }
    }

    /// All sources, read or not: plans and weights name them.
    fn sources(&mut self, first: &Graph) -> Result<()> {
        let mut renumbered: BTreeMap<TensorId, TensorId> = BTreeMap::new();
        for id in first.tensor_ids() {
            let tensor = first.tensor(id);
            if tensor.role == Role::Temp {
                continue;
            }
            let role = match &tensor.role {
                Role::State { of } => Role::State {
                    of: renumbered.get(of).copied().ok_or_else(|| {
                        SimplifyError::Internal(format!(
                            "the state `{}` stands before its parameter",
                            tensor.name
                        ))
                    })?,
                },
                role => role.clone(),
            };
            let class = self.saturation.class_of[id.index()];
            let class = self.saturation.graph.find(class);
            let source = self
                .saturation
                .graph
                .analysis
                .sources
                .get(&id)
                .ok_or_else(|| SimplifyError::Internal(format!("`{}` got lost", tensor.name)))?;
            let mut new_id = TensorId(0);
            for (graph, ty) in self.graphs.iter_mut().zip(&source.types) {
                new_id = graph.add_source(tensor.name.clone(), ty.clone(), role.clone());
            }
            renumbered.insert(id, new_id);
            self.made.entry(class).or_insert(new_id);
        }
        Ok(())
    }

    fn node(&self, class: Id) -> Result<&'a Node> {
        let choice = self.choice;
        choice
            .nodes
            .get(&class)
            .ok_or_else(|| SimplifyError::Internal(format!("class {class} was not chosen")))
    }

    /// The op below a node: itself, or the one that it is a result of.
    fn producer(&self, class: Id) -> Result<(Id, &'a Node)> {
        let node = self.node(class)?;
        match self.saturation.graph.analysis.entry(node.kind) {
            Entry::Result(_) => {
                let below = self.saturation.graph.find(node.children[0]);
                Ok((below, self.node(below)?))
            }
            _ => Ok((class, node)),
        }
    }

    /// Makes a class and what it needs; operands before readers.
    fn emit(&mut self, class: Id) -> Result<()> {
        // (class, name for it when it has none, whether its operands are made)
        let mut todo = vec![(class, String::new(), false)];
        while let Some((class, hint, is_ready)) = todo.pop() {
            if self.made.contains_key(&class) {
                continue;
            }
            let (op_class, node) = self.producer(class)?;
            let name = self.names.get(&class).cloned();
            if is_ready {
                let name = match name {
                    Some(name) => name,
                    None => self.fresh_name(&hint, node),
                };
                self.make(class, op_class, node, name)?;
                continue;
            }
            let below = name.clone().unwrap_or_else(|| hint.clone());
            todo.push((class, hint, true));
            for child in node.children.iter().rev() {
                let child = self.saturation.graph.find(*child);
                if !self.made.contains_key(&child) {
                    todo.push((child, below.clone(), false));
                }
            }
        }
        Ok(())
    }

    fn fresh_name(&mut self, reader: &str, node: &Node) -> String {
        let kind = match self.saturation.graph.analysis.entry(node.kind) {
            Entry::Op { kinds, .. } => kinds.first().map_or("new", |kind| kind.name()),
            _ => "new",
        };
        let base = format!("{reader}.{kind}");
        let mut name = base.clone();
        let mut n_taken = 1;
        while !self.taken.insert(name.clone()) {
            n_taken += 1;
            name = format!("{base}#{n_taken}");
        }
        name
    }

    /// Adds the op of a class, with all its results, on every rank.
    fn make(&mut self, class: Id, op_class: Id, node: &Node, name: String) -> Result<()> {
        let graph = &self.saturation.graph;
        let Entry::Op { kinds, .. } = graph.analysis.entry(node.kind) else {
            return Err(SimplifyError::Internal(format!("`{name}` is no op")));
        };
        let inputs: Vec<TensorId> = node
            .children
            .iter()
            .map(|child| {
                self.made.get(&graph.find(*child)).copied().ok_or_else(|| {
                    SimplifyError::Internal(format!("an operand of `{name}` is missing"))
                })
            })
            .collect::<Result<_>>()?;
        let types = &graph[op_class].data.types;
        let mut result_names = Vec::with_capacity(types.len());
        let mut classes = Vec::with_capacity(types.len());
        for result_idx in 0..types.len() {
            let own = if types.len() == 1 && op_class == class {
                Some(class)
            } else {
                self.result_class(op_class, node, result_idx)
            };
            // A class that is computed otherwise keeps its name for that.
            let chosen = own.filter(|own| {
                !self.made.contains_key(own)
                    && self
                        .producer(*own)
                        .is_ok_and(|(below, _)| below == op_class)
            });
            let known = chosen.and_then(|own| self.names.get(&own).cloned());
            result_names.push(match known {
                Some(known) => known,
                None if chosen == Some(class) => name.clone(),
                None => self.unused_name(&name, result_idx),
            });
            classes.push(chosen);
        }
        let mut results = Vec::new();
        for (rank, out) in self.graphs.iter_mut().enumerate() {
            results = result_names
                .iter()
                .zip(types)
                .map(|(name, of_ranks)| {
                    let id = TensorId(out.tensors.len() as u32);
                    out.tensors.push(Tensor {
                        name: name.clone(),
                        ty: of_ranks[rank].clone(),
                        role: Role::Temp,
                    });
                    id
                })
                .collect();
            out.ops.push(Op {
                kind: kinds[rank].clone(),
                inputs: inputs.clone(),
                results: results.clone(),
            });
        }
        for (own, id) in classes.into_iter().zip(results) {
            if let Some(own) = own {
                self.made.insert(own, id);
            }
        }
        Ok(())
    }

    /// The class of a result of an op with several.
    fn result_class(&self, op_class: Id, node: &Node, result_idx: usize) -> Option<Id> {
        let graph = &self.saturation.graph;
        let entries = &graph.analysis.entries;
        let kind = entries
            .iter()
            .position(|entry| *entry == Entry::Result(result_idx))?;
        let found = graph.lookup(Node {
            kind: super::egraph::KindId(kind as u32),
            phase: node.phase,
            children: vec![op_class],
        })?;
        Some(graph.find(found))
    }

    fn unused_name(&mut self, name: &str, result_idx: usize) -> String {
        let mut unused = format!("{name}.{result_idx}");
        while !self.taken.insert(unused.clone()) {
            unused.push('\'');
        }
        unused
    }

    fn finish(mut self, first: &Graph) -> Result<Vec<Graph>> {
        let made = |id: &TensorId| {
            let class = self.saturation.class_of[id.index()];
            self.made
                .get(&self.saturation.graph.find(class))
                .copied()
                .ok_or_else(|| {
                    SimplifyError::Internal(format!("`{}` was not made", first.tensor(*id).name))
                })
        };
        let pairs = |map: &BTreeMap<TensorId, TensorId>| {
            map.iter()
                .map(|(source, value)| Ok((made(source)?, made(value)?)))
                .collect::<Result<BTreeMap<_, _>>>()
        };
        let outputs: Vec<TensorId> = first.outputs.iter().map(made).collect::<Result<_>>()?;
        let updates = pairs(&first.updates)?;
        let gradients = pairs(&first.gradients)?;
        for graph in &mut self.graphs {
            graph.outputs = outputs.clone();
            graph.updates = updates.clone();
            graph.gradients = gradients.clone();
        }
        Ok(self.graphs)
    }
}
