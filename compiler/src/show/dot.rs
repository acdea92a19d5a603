//! Graphs in the language of Graphviz.
//!
//! Enters: a graph, and whether to fold its layers. Leaves: DOT with one cluster per block.
//! Invariant: the text is the same for the same graph, and every name is quoted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use meshweave_dsl::graph::{Graph, OpId};
use meshweave_dsl::timeline::Category;

use super::fold::{Phase, category, fold, template};

/// Whether repeated layers are drawn once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Folding {
    /// Every op is a node.
    Flat,
    /// Layers that do the same are one cluster.
    Layers,
}

/// The graph as DOT: ops are nodes, tensors are edges labeled with their types.
pub fn dot(graph: &Graph, folding: Folding) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "digraph {} {{", quoted(&graph.name));
    text.push_str("  rankdir=TB;\n  node [shape=box, style=\"rounded,filled\", fontname=\"Helvetica\", fontsize=10, color=\"#ffffff\"];\n  edge [fontname=\"Helvetica\", fontsize=8, color=\"#7a7f87\"];\n");
    // The node that stands for each op: its own, or that of its twin in the first folded layer.
    let mut node_of: BTreeMap<OpId, OpId> = BTreeMap::new();
    for (block_idx, block) in fold(graph).iter().enumerate() {
        let shown: Vec<&Vec<OpId>> = match folding {
            Folding::Flat => block.members.iter().collect(),
            Folding::Layers => block.members.iter().take(1).collect(),
        };
        for members in &block.members {
            let twins = match folding {
                Folding::Flat => members,
                Folding::Layers => &block.ops,
            };
            node_of.extend(members.iter().copied().zip(twins.iter().copied()));
        }
        for (member_idx, ops) in shown.into_iter().enumerate() {
            let phase = match block.phase {
                Phase::Forward => "forward",
                Phase::Backward => "backward",
                Phase::Update => "update",
            };
            let title = match (&block.stem, folding) {
                (Some(stem), Folding::Flat) => {
                    format!("{phase} {stem}[{}]", block.layers[member_idx])
                }
                (Some(_), Folding::Layers) => {
                    format!("{phase} {} ×{}", block.title(), block.layers.len())
                }
                (None, _) => phase.into(),
            };
            let _ = writeln!(text, "  subgraph \"cluster_{block_idx}_{member_idx}\" {{");
            let _ = writeln!(
                text,
                "    label={}; fontname=\"Helvetica\"; fontsize=11; style=rounded; color=\"#b8bdc6\";",
                quoted(&title)
            );
            for op_id in ops {
                let op = graph.op(*op_id);
                let name = match folding {
                    Folding::Flat => graph.op_name(op).to_string(),
                    Folding::Layers => template(graph.op_name(op)),
                };
                let _ = writeln!(
                    text,
                    "    n{} [label={}, fillcolor=\"{}\"];",
                    op_id.0,
                    quoted(&format!("{}\n{name}", op.kind.name())),
                    fill(category(&op.kind))
                );
            }
            text.push_str("  }\n");
        }
    }
    let producers = graph.producers();
    let mut edges: BTreeSet<(OpId, OpId, String)> = BTreeSet::new();
    for (op_id, op) in graph.ops() {
        for input in &op.inputs {
            if let Some(producer) = producers[input.index()]
                && let (Some(from), Some(to)) = (node_of.get(&producer), node_of.get(&op_id))
            {
                edges.insert((*from, *to, graph.ty(*input).to_string()));
            }
        }
    }
    for (from, to, ty) in edges {
        let _ = writeln!(text, "  n{} -> n{} [label={}];", from.0, to.0, quoted(&ty));
    }
    text.push_str("}\n");
    text
}

fn quoted(text: &str) -> String {
    let escaped = text
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n");
    format!("\"{escaped}\"")
}

fn fill(category: Category) -> &'static str {
    match category {
        Category::Contract => "#a9c7ec",
        Category::Attention => "#cdb9ea",
        Category::Kernel => "#a8dcc8",
        Category::Routine => "#f0dda0",
        Category::Collective | Category::Message => "#f2b49b",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::show::sample;

    #[test]
    fn folding_draws_a_layer_once() {
        let graph = sample::decoder(3);
        let flat = dot(&graph, Folding::Flat);
        let folded = dot(&graph, Folding::Layers);
        let nodes = |text: &str| text.matches("fillcolor=\"#").count();
        assert_eq!(nodes(&flat), graph.ops.len());
        assert!(nodes(&folded) < nodes(&flat));
        assert!(folded.contains("layers[0–2] ×3"), "{folded}");
        assert_eq!(folded.matches('{').count(), folded.matches('}').count());
    }

    #[test]
    fn names_are_quoted() {
        let graph = Graph::new("a \"b\" \\");
        assert!(dot(&graph, Folding::Flat).starts_with("digraph \"a \\\"b\\\" \\\\\" {"));
    }
}
