//! Tied classes: ops and tensors of repeated layers that are planned once.
//!
//! Enters: a graph and rules. Leaves: for every op and every source its class.
//! Invariant: members of a class have the same kind, the same types and the same rules, so that
//! whatever may divide one may divide all; they differ only in the index of `layers[…]` in their names.
//!
//! Edges are tied by the classes of their ends, so a plan of the classes is a plan of the graph
//! whatever the classes are: tying costs choices (layers planned apart), never correctness.

use std::collections::BTreeMap;

use meshweave_dsl::graph::{Graph, OpId, Role, TensorId, TensorType};
use meshweave_dsl::op::OpKind;
use meshweave_dsl::plan::Tie;

use super::directives::Subject;
use super::rules::Rules;

/// Classes of ops and of sources.
#[derive(Clone, Debug)]
pub struct Classes {
    pub tie: Tie,
    /// Ops of each class, in order; classes in the order of their first op.
    pub ops: Vec<Vec<OpId>>,
    /// The class of each op.
    pub of_op: Vec<usize>,
    /// Sources of each class.
    pub sources: Vec<Vec<TensorId>>,
    /// The class of each source; `None` for results of ops.
    pub of_source: Vec<Option<usize>>,
}

impl Classes {
    /// The classes of a graph under rules. n log n in its size.
    pub fn new(graph: &Graph, rules: &Rules, tie: Tie) -> Self {
        // Names are unique: with the index of the layer in them, so is every class.
        let class_name = |name: &str| match tie {
            Tie::Layers => class_name(name),
            Tie::None => name.into(),
        };
        type OpKey<'a> = (
            String,
            &'a OpKind,
            Vec<&'a TensorType>,
            Vec<&'a TensorType>,
            String,
        );
        let types = |ids: &[TensorId]| ids.iter().map(|id| graph.ty(*id)).collect();
        let mut classes = Self {
            tie,
            ops: Vec::new(),
            of_op: Vec::new(),
            sources: Vec::new(),
            of_source: vec![None; graph.tensors.len()],
        };
        let mut known: BTreeMap<OpKey, usize> = BTreeMap::new();
        for (op_id, op) in graph.ops() {
            let name = class_name(graph.op_name(op));
            let mut asked = rules.signature(Subject::Op(op_id));
            for result in &op.results {
                asked.push_str(&rules.signature(Subject::Tensor(*result)));
            }
            let key = (name, &op.kind, types(&op.inputs), types(&op.results), asked);
            let class = *known.entry(key).or_insert_with(|| {
                classes.ops.push(Vec::new());
                classes.ops.len() - 1
            });
            classes.ops[class].push(op_id);
            classes.of_op.push(class);
        }
        let mut known: BTreeMap<(String, &TensorType, u8, String), usize> = BTreeMap::new();
        for id in graph.tensor_ids() {
            let tensor = graph.tensor(id);
            let role = match tensor.role {
                Role::Temp => continue,
                Role::Input => 0,
                Role::Param(_) => 1,
                Role::State { .. } => 2,
                Role::Const(_) => 3,
            };
            let asked = rules.signature(Subject::Tensor(id));
            let key = (class_name(&tensor.name), &tensor.ty, role, asked);
            let class = *known.entry(key).or_insert_with(|| {
                classes.sources.push(Vec::new());
                classes.sources.len() - 1
            });
            classes.sources[class].push(id);
            classes.of_source[id.index()] = Some(class);
        }
        classes
    }
}

/// The name of a class of one or several members.
pub fn label(name: &str, n_members: usize) -> String {
    if n_members == 1 {
        name.into()
    } else {
        class_name(name)
    }
}

/// A name with the index of its layer taken out: `layers[3].attn.q` → `layers[*].attn.q`.
pub fn class_name(name: &str) -> String {
    let mut class = String::with_capacity(name.len());
    let mut rest = name;
    while let Some(at) = rest.find("layers[") {
        let (before, after) = rest.split_at(at + "layers[".len());
        class.push_str(before);
        rest = match after.find(']') {
            Some(end) if after[..end].bytes().all(|byte| byte.is_ascii_digit()) => {
                class.push('*');
                &after[end..]
            }
            _ => after,
        };
    }
    class.push_str(rest);
    class
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_share_a_name() {
        assert_eq!(
            class_name("grad.layers[12].attn.wq"),
            "grad.layers[*].attn.wq"
        );
        assert_eq!(class_name("embed.wte"), "embed.wte");
        assert_eq!(class_name("layers[0].mlp"), "layers[*].mlp");
    }
}
