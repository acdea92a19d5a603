//! Graphs folded by layer: what repeats is told once.
//!
//! Enters: a graph whose names are paths such as `layers[3].attn.q`. Leaves: its ops by phase
//! (forward, backward, update) and block, blocks with equal ops folded into one with the list of
//! their layers.
//! Invariant: every op of the graph stands in exactly one member of exactly one block.

use std::collections::BTreeMap;

use meshweave_dsl::graph::{Graph, Op, OpId, TensorType};
use meshweave_dsl::op::OpKind;
use meshweave_dsl::timeline::Category;

/// The part of a training step that an op belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Phase {
    Forward,
    Backward,
    Update,
}

/// The place of a name among repeated layers: `layers[3].attn.q` is layer 3 of `layers`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Place {
    /// What stands before the first index, without a leading `grad.`, `m.` or `v.`.
    pub stem: String,
    pub layer: usize,
}

/// Blocks that do the same, shown once.
#[derive(Clone, Debug)]
pub(super) struct Block {
    pub phase: Phase,
    /// `None` for ops outside any layer.
    pub stem: Option<String>,
    /// The layers folded into this block, ascending; empty outside layers.
    pub layers: Vec<usize>,
    /// The ops of the first member, in order.
    pub ops: Vec<OpId>,
    /// The ops of every member, in the order of `layers` (the first member included).
    pub members: Vec<Vec<OpId>>,
}

impl Block {
    /// `layers[0–11]`, or the phase-neutral name of what is outside layers.
    pub fn title(&self) -> String {
        match &self.stem {
            Some(stem) => format!("{stem}[{}]", runs(&self.layers)),
            None => String::from("outside the layers"),
        }
    }
}

/// The name with its first index replaced by `*`.
pub(super) fn template(name: &str) -> String {
    match first_index(name) {
        Some((open, close, _)) => format!("{}*{}", &name[..open], &name[close..]),
        None => name.into(),
    }
}

/// The layer that a name belongs to.
pub(super) fn place(name: &str) -> Option<Place> {
    let (open, _, layer) = first_index(name)?;
    let path = &name[..open - 1];
    let stem = ["grad.", "m.", "v."]
        .iter()
        .find_map(|prefix| path.strip_prefix(prefix))
        .unwrap_or(path);
    Some(Place {
        stem: stem.into(),
        layer,
    })
}

/// The category of an op in timelines and pictures.
pub(super) fn category(kind: &OpKind) -> Category {
    match kind {
        OpKind::Contract { .. } => Category::Contract,
        OpKind::Attention(_) | OpKind::AttentionGrad(_) => Category::Attention,
        OpKind::Gather { .. }
        | OpKind::ScatterAdd { .. }
        | OpKind::Transpose { .. }
        | OpKind::Rename { .. }
        | OpKind::Split { .. }
        | OpKind::Merge { .. }
        | OpKind::Slice { .. }
        | OpKind::Concat { .. }
        | OpKind::TopK { .. }
        | OpKind::TopKGrad { .. }
        | OpKind::MoeSlots { .. }
        | OpKind::MoePlaces(_)
        | OpKind::MoeDispatch(_)
        | OpKind::MoeCombine(_)
        | OpKind::MoeGateGrad(_)
        | OpKind::MoeCounts(_) => Category::Routine,
        OpKind::MoeMove(moved) => match moved.over {
            Some(_) => Category::Collective,
            None => Category::Routine,
        },
        OpKind::Unary(_)
        | OpKind::Binary(_)
        | OpKind::Reduce { .. }
        | OpKind::Expand { .. }
        | OpKind::RmsNorm { .. }
        | OpKind::RmsNormGrad { .. }
        | OpKind::LayerNorm { .. }
        | OpKind::LayerNormGrad { .. }
        | OpKind::Softmax { .. }
        | OpKind::SoftmaxGrad { .. }
        | OpKind::Rope { .. }
        | OpKind::Pick { .. }
        | OpKind::CrossEntropyGrad { .. }
        | OpKind::Adamw { .. }
        | OpKind::Sgd { .. } => Category::Kernel,
        OpKind::AllGather { .. }
        | OpKind::AllReduce { .. }
        | OpKind::ReduceScatter { .. }
        | OpKind::AllToAll { .. }
        | OpKind::CollectivePermute { .. }
        | OpKind::Broadcast { .. } => Category::Collective,
    }
}

/// Groups the ops of a graph by phase and layer and folds equal layers.
///
/// Linear in the size of the graph but for the logarithm of the maps.
pub(super) fn fold(graph: &Graph) -> Vec<Block> {
    let phases = phases(graph);
    let mut order: Vec<(Phase, Option<Place>)> = Vec::new();
    let mut sections: BTreeMap<(Phase, Option<Place>), Vec<OpId>> = BTreeMap::new();
    for (op_id, op) in graph.ops() {
        let key = (phases[op_id.index()], place(graph.op_name(op)));
        let ops = sections.entry(key.clone()).or_insert_with(|| {
            order.push(key);
            Vec::new()
        });
        ops.push(op_id);
    }
    let mut blocks: Vec<Block> = Vec::new();
    let mut by_signature: BTreeMap<(Phase, Option<String>, Vec<String>), usize> = BTreeMap::new();
    order.sort_by_key(|(phase, _)| *phase);
    for key in order {
        let ops = sections.remove(&key).unwrap_or_default();
        let (phase, place) = key;
        let stem = place.as_ref().map(|place| place.stem.clone());
        let signature = ops
            .iter()
            .map(|op_id| signature(graph, graph.op(*op_id)))
            .collect();
        let block_idx = *by_signature
            .entry((phase, stem.clone(), signature))
            .or_insert_with(|| {
                blocks.push(Block {
                    phase,
                    stem,
                    layers: Vec::new(),
                    ops: ops.clone(),
                    members: Vec::new(),
                });
                blocks.len() - 1
            });
        let block = &mut blocks[block_idx];
        let Some(place) = place else {
            block.members.push(ops);
            continue;
        };
        let position = block.layers.partition_point(|layer| *layer < place.layer);
        block.layers.insert(position, place.layer);
        block.members.insert(position, ops);
    }
    for block in &mut blocks {
        if let Some(first) = block.members.first() {
            block.ops = first.clone();
        }
    }
    blocks
}

/// Everything of an op that must agree for two layers to be told as one.
fn signature(graph: &Graph, op: &Op) -> String {
    let types: Vec<String> = op
        .results
        .iter()
        .map(|id| graph.ty(*id).to_string())
        .collect();
    let inputs: Vec<String> = op
        .inputs
        .iter()
        .map(|id| {
            let ty: &TensorType = graph.ty(*id);
            ty.to_string()
        })
        .collect();
    format!(
        "{} {} {} {}",
        template(graph.op_name(op)),
        op.kind.name(),
        inputs.join(" "),
        types.join(" ")
    )
}

/// The phase of every op: it follows the data, so that an unnamed helper of the backward pass is
/// told there. An op that makes an updated value, and all that follows it, is the update.
fn phases(graph: &Graph) -> Vec<Phase> {
    let mut of_tensor = vec![Phase::Forward; graph.tensors.len()];
    let mut phases = Vec::with_capacity(graph.ops.len());
    for op in &graph.ops {
        let name = graph.op_name(op);
        let own = if matches!(op.kind, OpKind::Adamw { .. } | OpKind::Sgd { .. })
            || name.ends_with(".next")
        {
            Phase::Update
        } else if name.starts_with("grad.") || name.contains(".grad.") || is_gradient(&op.kind) {
            Phase::Backward
        } else {
            Phase::Forward
        };
        let inherited = op.inputs.iter().map(|id| of_tensor[id.index()]).max();
        let phase = inherited.map_or(own, |phase| phase.max(own));
        for id in &op.results {
            of_tensor[id.index()] = phase;
        }
        phases.push(phase);
    }
    phases
}

fn is_gradient(kind: &OpKind) -> bool {
    matches!(
        kind,
        OpKind::RmsNormGrad { .. }
            | OpKind::LayerNormGrad { .. }
            | OpKind::SoftmaxGrad { .. }
            | OpKind::AttentionGrad(_)
            | OpKind::CrossEntropyGrad { .. }
            | OpKind::TopKGrad { .. }
            | OpKind::MoeGateGrad(_)
    )
}

/// Byte positions of the first `[n]` (of its digits and after them) and n.
fn first_index(name: &str) -> Option<(usize, usize, usize)> {
    let mut from = 0;
    while let Some(found) = name[from..].find('[') {
        let open = from + found + 1;
        let close = open + name[open..].find(']')?;
        if let Ok(layer) = name[open..close].parse() {
            return Some((open, close, layer));
        }
        from = open;
    }
    None
}

/// `0–3, 5` for 0, 1, 2, 3, 5.
fn runs(layers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for layer in layers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == *layer => *last = *layer,
            _ => runs.push((*layer, *layer)),
        }
    }
    let texts: Vec<String> = runs
        .into_iter()
        .map(|(first, last)| {
            if first == last {
                first.to_string()
            } else {
                format!("{first}–{last}")
            }
        })
        .collect();
    texts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::show::sample;

    #[test]
    fn names_have_places() {
        let found = place("grad.layers[12].attn.wq").unwrap();
        assert_eq!((found.stem.as_str(), found.layer), ("layers", 12));
        assert_eq!(template("layers[3].mlp.wu"), "layers[*].mlp.wu");
        assert_eq!(place("embed.wte"), None);
        assert_eq!(template("odd[x].y[4]"), "odd[x].y[*]");
        assert_eq!(runs(&[0, 1, 2, 5, 7, 8]), "0–2, 5, 7–8");
    }

    #[test]
    fn equal_layers_fold_and_no_op_is_lost() {
        let graph = sample::decoder(4);
        let blocks = fold(&graph);
        let n_ops: usize = blocks
            .iter()
            .flat_map(|block| &block.members)
            .map(Vec::len)
            .sum();
        assert_eq!(n_ops, graph.ops.len());
        let forward = blocks
            .iter()
            .find(|block| block.phase == Phase::Forward && block.stem.is_some())
            .unwrap();
        assert_eq!(forward.layers, [0, 1, 2, 3]);
        assert_eq!(forward.title(), "layers[0–3]");
    }
}
