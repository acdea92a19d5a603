//! Selectors and classes on a graph.
//!
//! Enters: selectors as written. Leaves: the tensors they are about, in the order of the graph.
//! Invariant: gradients, moments and updated values are reached only by selectors that say so
//! (`grad.…`, `m.…`, `v.…`, `….next`), so that naming a parameter is about the parameter alone.

use std::collections::BTreeSet;

use meshweave_dsl::diagnostics::distance;
use meshweave_dsl::graph::{Graph, OpId, Role, TensorId};
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::OpKind;
use meshweave_dsl::weave::ast::{Segment, Selector, TensorClass};

/// First segments of the names that differentiation makes.
const DERIVED: [&str; 3] = ["grad", "m", "v"];

/// The name of the tensor that a name such as `layers[0].attn.input.slice1` is a slice of.
fn unsliced(name: &str) -> &str {
    match name.rsplit_once(".slice") {
        Some((whole, nth)) if !nth.is_empty() && nth.bytes().all(|b| b.is_ascii_digit()) => whole,
        _ => name,
    }
}

/// What selectors are resolved against.
pub(super) struct Scene<'a> {
    pub graph: &'a Graph,
    pub producers: Vec<Option<OpId>>,
    /// Whether an output depends on the op, by op.
    is_forward: Vec<bool>,
}

impl<'a> Scene<'a> {
    pub fn new(graph: &'a Graph) -> Self {
        let producers = graph.producers();
        let mut is_forward = vec![false; graph.ops.len()];
        let mut open: Vec<TensorId> = graph.outputs.clone();
        while let Some(id) = open.pop() {
            let Some(op_id) = producers.get(id.index()).copied().flatten() else {
                continue;
            };
            if !std::mem::replace(&mut is_forward[op_id.index()], true) {
                open.extend(&graph.op(op_id).inputs);
            }
        }
        Self {
            graph,
            producers,
            is_forward,
        }
    }

    pub fn name(&self, id: TensorId) -> &'a str {
        &self.graph.tensor(id).name
    }

    /// The tensors that a selector names; the slices of a tensor go by its name.
    pub fn select(&self, selector: &Selector) -> Vec<TensorId> {
        let reach = Reach::of(selector);
        self.graph
            .tensor_ids()
            .filter(|id| {
                let name = self.name(*id);
                reach.admits(name) && (selector.matches(name) || selector.matches(unsliced(name)))
            })
            .collect()
    }

    /// Whether a selector names the tensor, a scope around it, or the tensor that it is derived from.
    pub fn is_excepted(&self, id: TensorId, except: &[&Selector]) -> bool {
        let name = self.name(id);
        let origin = origin(name);
        except
            .iter()
            .any(|selector| selector.covers(name) || selector.covers(origin))
    }

    /// The tensors of a class.
    pub fn class(&self, class: TensorClass) -> Vec<TensorId> {
        let graph = self.graph;
        let ids = graph.tensor_ids();
        match class {
            TensorClass::Params => graph.params().collect(),
            TensorClass::Gradients => {
                let of_params: BTreeSet<TensorId> = graph.gradients.values().copied().collect();
                ids.filter(|id| of_params.contains(id)).collect()
            }
            TensorClass::Optimizer => ids
                .filter(|id| matches!(graph.tensor(*id).role, Role::State { .. }))
                .collect(),
            TensorClass::Activations => ids.filter(|id| self.is_activation(*id)).collect(),
            TensorClass::Inputs => ids
                .filter(|id| graph.tensor(*id).role == Role::Input)
                .collect(),
            TensorClass::BetweenBlocks => self.between_blocks(),
            TensorClass::Rows => self.rows(),
        }
    }

    fn is_activation(&self, id: TensorId) -> bool {
        let producer = self.producers.get(id.index()).copied().flatten();
        producer.is_some_and(|op_id| self.is_forward[op_id.index()])
    }

    /// Activations with the dims of experts and slots, those apart that a dispatch fills: they are still
    /// where their tokens come from.
    fn rows(&self) -> Vec<TensorId> {
        let graph = self.graph;
        let mut kinds: BTreeSet<(&Dim, &Dim)> = BTreeSet::new();
        let mut filled: BTreeSet<TensorId> = BTreeSet::new();
        for op in &graph.ops {
            match &op.kind {
                OpKind::MoeDispatch(dims) => {
                    kinds.insert((&dims.expert, &dims.slot));
                    filled.extend(&op.results);
                }
                OpKind::MoeMove(moved) if !moved.weights => {
                    kinds.insert((&moved.dims.expert, &moved.dims.slot));
                }
                _ => {}
            }
        }
        let is_row = |id: &TensorId| {
            let ty = graph.ty(*id);
            let mut kinds = kinds.iter();
            kinds.any(|(expert, slot)| ty.has(expert) && ty.has(slot))
        };
        let all = graph.tensor_ids();
        all.filter(|id| is_row(id) && !filled.contains(id) && self.is_activation(*id))
            .collect()
    }

    /// Activations that an op of another block reads, one of the two blocks being in a layer.
    fn between_blocks(&self) -> Vec<TensorId> {
        let graph = self.graph;
        let mut crossing = BTreeSet::new();
        for (op_id, op) in graph.ops() {
            if !self.is_forward[op_id.index()] {
                continue;
            }
            let reader = block(graph.op_name(op));
            for input in &op.inputs {
                let writer = block(self.name(*input));
                let is_layered = reader.contains('[') || writer.contains('[');
                let is_float = graph.ty(*input).dtype.is_float();
                if self.is_activation(*input) && is_float && is_layered && reader != writer {
                    crossing.insert(*input);
                }
            }
        }
        crossing.into_iter().collect()
    }

    /// Paths that a selector which matches nothing may have meant.
    pub fn near(&self, selector: &Selector) -> Vec<String> {
        let written = selector.to_string();
        let reach = Reach::of(selector);
        let mut scopes = BTreeSet::new();
        let mut paths = BTreeSet::new();
        for id in self.graph.tensor_ids() {
            let name = self.name(id);
            if !reach.admits(name) {
                continue;
            }
            if selector.covers(name) {
                scopes.insert(format!("{written}.*"));
            }
            paths.insert(tied(name));
        }
        if !scopes.is_empty() {
            return scopes.into_iter().collect();
        }
        let plain = tied(&written);
        let limit = plain.chars().count() / 3 + 1;
        let mut ranked: Vec<(usize, String)> = paths
            .into_iter()
            .map(|path| {
                let last = |text: &str| text.rsplit('.').next().unwrap_or_default().to_owned();
                // A floating or starred selector is compared by its last segment alone.
                let is_loose = selector.is_floating || written.starts_with('*');
                let edits = if is_loose {
                    distance(&last(&plain), &last(&path))
                } else {
                    distance(&plain, &path)
                };
                (edits, path)
            })
            .filter(|(edits, _)| *edits <= limit)
            .collect();
        ranked.sort();
        ranked.into_iter().take(3).map(|(_, path)| path).collect()
    }
}

/// The names that a selector may reach.
struct Reach {
    derived: Option<String>,
    is_next: bool,
}

impl Reach {
    fn of(selector: &Selector) -> Self {
        let literal = |segment: Option<&Segment>| match segment {
            Some(Segment::Named { name, index: None }) => Some(name.as_str().to_owned()),
            _ => None,
        };
        let first = literal(selector.segments.first()).filter(|_| !selector.is_floating);
        Self {
            derived: first.filter(|first| DERIVED.contains(&first.as_str())),
            is_next: literal(selector.segments.last()).as_deref() == Some("next"),
        }
    }

    fn admits(&self, name: &str) -> bool {
        let first = name.split('.').next().unwrap_or_default();
        let is_derived = DERIVED.contains(&first);
        (!is_derived || self.derived.as_deref() == Some(first))
            && (self.is_next || !name.ends_with(".next"))
    }
}

/// The tensor that a gradient, a moment or an updated value belongs to.
pub(super) fn origin(name: &str) -> &str {
    let name = name.strip_suffix(".next").unwrap_or(name);
    match name.split_once('.') {
        Some((first, rest)) if DERIVED.contains(&first) => rest,
        _ => name,
    }
}

/// `layers[3].attn.q` → `layers[*].attn.q`.
pub(super) fn tied(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut rest = name;
    while let Some((before, after)) = rest.split_once('[') {
        out.push_str(before);
        match after.split_once(']') {
            Some((index, behind)) => {
                let is_index = !index.is_empty() && index.bytes().all(|b| b.is_ascii_digit());
                out.push_str(&if is_index {
                    "[*]".to_owned()
                } else {
                    format!("[{index}]")
                });
                rest = behind;
            }
            None => {
                out.push('[');
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}

/// The scope of a tensor, at most two segments of it: `layers[0].attn.q.rotated` → `layers[0].attn`.
fn block(name: &str) -> &str {
    let ends: Vec<usize> = name.match_indices('.').map(|(at, _)| at).collect();
    let end = match ends.as_slice() {
        [] => 0,
        [only] => *only,
        [_, second, ..] => *second,
    };
    name.get(..end).unwrap_or_default()
}
