//! Removal of what nothing reads.

use std::collections::BTreeMap;

use meshweave_dsl::graph::{Graph, Op, Role, TensorId};

/// The graph without ops and constants that no output, gradient or update depends on. Inputs,
/// parameters and states stay; the order of everything else stays. Linear in the graph.
pub fn remove_dead(graph: &Graph) -> Graph {
    let mut live = vec![false; graph.tensors.len()];
    let roots = graph
        .outputs
        .iter()
        .chain(graph.updates.values())
        .chain(graph.gradients.values());
    for root in roots {
        live[root.index()] = true;
    }
    let mut kept = Vec::new();
    for op in graph.ops.iter().rev() {
        if op.results.iter().any(|result| live[result.index()]) {
            for id in op.inputs.iter().chain(&op.results) {
                live[id.index()] = true;
            }
            kept.push(op);
        }
    }
    let mut pruned = Graph::new(graph.name.clone());
    let mut new_ids = BTreeMap::new();
    for id in graph.tensor_ids() {
        let tensor = graph.tensor(id);
        let is_given = !matches!(tensor.role, Role::Temp | Role::Const(_));
        if live[id.index()] || is_given {
            new_ids.insert(id, TensorId(pruned.tensors.len() as u32));
            pruned.tensors.push(tensor.clone());
        }
    }
    let renew = |id: &TensorId| new_ids.get(id).copied().unwrap_or(*id);
    for tensor in &mut pruned.tensors {
        if let Role::State { of } = &mut tensor.role {
            *of = renew(of);
        }
    }
    pruned.ops = kept
        .into_iter()
        .rev()
        .map(|op| Op {
            kind: op.kind.clone(),
            inputs: op.inputs.iter().map(renew).collect(),
            results: op.results.iter().map(renew).collect(),
        })
        .collect();
    let renewed = |map: &BTreeMap<TensorId, TensorId>| {
        map.iter()
            .map(|(key, value)| (renew(key), renew(value)))
            .collect()
    };
    pruned.outputs = graph.outputs.iter().map(renew).collect();
    pruned.updates = renewed(&graph.updates);
    pruned.gradients = renewed(&graph.gradients);
    pruned
}
