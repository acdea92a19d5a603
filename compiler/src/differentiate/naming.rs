//! Names of gradients: `grad.<tensor>` for the whole, `grad.<tensor>.0`, `.1`, … for its parts.

use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::graph::{Graph, TensorId};

/// Gives every tensor of `made` (with the tensor whose gradient it is for) a name of its own.
pub(super) fn name_gradients(
    graph: &mut Graph,
    gradients: &BTreeMap<TensorId, TensorId>,
    made: &[(TensorId, TensorId)],
) {
    let is_made: BTreeSet<TensorId> = made.iter().map(|(id, _)| *id).collect();
    let mut taken: BTreeSet<String> = graph
        .tensor_ids()
        .filter(|id| !is_made.contains(id))
        .map(|id| graph.tensor(id).name.clone())
        .collect();
    let mut named = BTreeSet::new();
    // A tensor that is the gradient of several (through sums and reshapes) is named after the one it
    // was made for.
    let owners = |of_made: bool| {
        made.iter()
            .filter(move |(id, of)| (gradients.get(of) == Some(id)) == of_made)
    };
    for (id, of) in owners(true) {
        let name = format!("grad.{}", graph.tensor(*of).name);
        if taken.insert(name.clone()) {
            named.insert(*id);
            graph.tensors[id.index()].name = name;
        }
    }
    let mut n_parts: BTreeMap<TensorId, usize> = BTreeMap::new();
    for (id, of) in made {
        if named.contains(id) {
            continue;
        }
        let part = n_parts.entry(*of).or_default();
        loop {
            let name = format!("grad.{}.{part}", graph.tensor(*of).name);
            *part += 1;
            if taken.insert(name.clone()) {
                graph.tensors[id.index()].name = name;
                break;
            }
        }
    }
}
