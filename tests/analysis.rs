//! The analyses of graphs, on models as they are planned.

use std::collections::{BTreeMap, BTreeSet};

use meshweave_compiler::differentiate::{Optimizer, differentiate};
use meshweave_compiler::import::read_config;
use meshweave_compiler::model::{DecoderConfig, Goal, GoldenSize, build_decoder};
use meshweave_dsl::diagnostics::SourceId;
use meshweave_dsl::graph::Graph;
use meshweave_dsl::graph::analysis::{
    articulation_ops, cuts, dominators, in_order, layers, live_ranges, post_dominators, ties,
    to_petgraph, topological_order,
};
use meshweave_dsl::graph::text::{parse, print};
use meshweave_dsl::graph::verify::verify_global;

fn golden(n_layers: usize, capacity_factor: Option<f64>, optimizer: &Optimizer) -> Graph {
    let size = GoldenSize {
        n_layers,
        embed: 32,
        heads: 4,
        ffn: 64,
        vocab: 48,
        seq: 16,
        batch: 2,
    };
    let config = DecoderConfig::golden(&size, capacity_factor);
    let forward = build_decoder(&config, size.batch, size.seq, Goal::Training).unwrap();
    differentiate(&forward, optimizer).unwrap()
}

#[test]
fn ties_do_not_grow_with_the_layers() {
    let optimizer = Optimizer::GOLDEN_ADAMW;
    for capacity_factor in [None, Some(2.0)] {
        let (few, many) = (
            golden(3, capacity_factor, &optimizer),
            golden(9, capacity_factor, &optimizer),
        );
        assert!(many.ops.len() > 2 * few.ops.len());
        let (few_ties, many_ties) = (ties(&few), ties(&many));
        assert_eq!(few_ties.n_op_classes, many_ties.n_op_classes);
        assert_eq!(few_ties.n_tensor_classes, many_ties.n_tensor_classes);
        for (op, class) in many.ops.iter().zip(&many_ties.ops) {
            let first = many_ties
                .ops
                .iter()
                .position(|other| other == class)
                .unwrap();
            let first = &many.ops[first];
            assert_eq!(op.kind, first.kind);
            for (a, b) in op.inputs.iter().zip(&first.inputs) {
                assert_eq!(many.ty(*a), many.ty(*b));
            }
        }
        let layers = layers(&many);
        assert_eq!(layers.len(), 9);
        assert!(
            layers
                .iter()
                .all(|layer| layer.kind == layers[0].kind && layer.stem == "layers")
        );
    }
}

#[test]
fn tied_ops_differ_across_layers_of_different_kinds() {
    let size = GoldenSize {
        n_layers: 4,
        embed: 32,
        heads: 4,
        ffn: 64,
        vocab: 48,
        seq: 16,
        batch: 2,
    };
    let mut config = DecoderConfig::golden(&size, Some(2.0));
    if let Some(moe) = &mut config.moe {
        moe.dense_layers = BTreeSet::from([0]);
    }
    let graph = build_decoder(&config, 2, 16, Goal::Training).unwrap();
    let kinds: Vec<usize> = layers(&graph).iter().map(|layer| layer.kind).collect();
    assert_eq!(kinds, [0, 1, 1, 1]);
    let ties = ties(&graph);
    let class = |name: &str| ties.tensors[graph.find(name).unwrap().index()];
    assert_eq!(class("layers[1].attn.wq"), class("layers[3].attn.wq"));
    assert_ne!(class("layers[0].attn.wq"), class("layers[1].attn.wq"));
    assert_ne!(class("layers[1].attn.wq"), class("layers[1].attn.wk"));
}

#[test]
fn the_forward_pass_is_cut_between_layers() {
    let graph = golden(3, None, &Optimizer::None);
    let cut_before: BTreeSet<String> = cuts(&graph, 1)
        .iter()
        .map(|cut| graph.op_name(graph.op(cut.before)).to_string())
        .collect();
    for layer in 0..3 {
        let first = format!("layers[{layer}].attn");
        assert!(
            cut_before.iter().any(|name| name.starts_with(&first)),
            "no cut at the head of layer {layer}: {cut_before:?}"
        );
    }
    // Within attention q, k and v are alive together.
    let k = "layers[1].attn.k";
    assert!(graph.find(k).is_some() && !cut_before.contains(k));
}

#[test]
fn ways_to_the_loss_go_through_the_residual_stream() {
    let graph = golden(3, None, &Optimizer::None);
    let loss = graph.outputs[0];
    let names: Vec<&str> = articulation_ops(&graph, loss)
        .iter()
        .map(|op_id| graph.op_name(graph.op(*op_id)))
        .collect();
    insta::assert_snapshot!(names.join("\n"));
    let producers = graph.producers();
    let loss_op = producers[loss.index()].unwrap();
    let post = post_dominators(&graph);
    assert_eq!(dominators(&graph).len(), graph.ops.len());
    // The gradients are ends of their own, so not everything leads to the loss.
    assert!(post.contains(&Some(loss_op)));
}

#[test]
fn order_and_live_ranges_agree() {
    let mut graph = golden(2, None, &Optimizer::GOLDEN_SGD);
    assert!(in_order(&graph));
    assert_eq!(to_petgraph(&graph).node_count(), graph.ops.len());
    let ranges = live_ranges(&graph);
    for (op_id, op) in graph.ops() {
        for input in &op.inputs {
            let range = ranges[input.index()];
            assert!(range.first <= op_id.index() && op_id.index() <= range.last);
        }
    }
    graph.ops.reverse();
    assert!(!in_order(&graph));
    let order = topological_order(&graph).unwrap();
    let place: BTreeMap<_, _> = order
        .iter()
        .enumerate()
        .map(|(place, op_id)| (*op_id, place))
        .collect();
    let producers = graph.producers();
    for (op_id, op) in graph.ops() {
        for input in &op.inputs {
            if let Some(producer) = producers[input.index()] {
                assert!(place[&producer] < place[&op_id]);
            }
        }
    }
}

/// Every shipped config, differentiated: the graph obeys the rules, prints and parses, and has no more
/// classes of ops than its kinds of layers account for.
#[test]
fn graphs_of_public_models_verify_print_and_tie() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models");
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    names.sort();
    assert!(names.len() >= 12);
    let mut report = String::new();
    for path in names {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(path.join("config.json")).unwrap();
        let imported = read_config(&name, &text).unwrap();
        let forward = build_decoder(&imported.config, 8, 128, Goal::Training).unwrap();
        let graph = differentiate(&forward, &Optimizer::GOLDEN_ADAMW).unwrap();
        assert_eq!(verify_global(&graph), Ok(()), "{name}");
        let parsed = parse(&print(&graph), SourceId::default());
        assert_eq!(parsed.diagnostics, [], "{name}");
        assert!(parsed.graph == graph, "{name} prints as another graph");
        let ties = ties(&graph);
        let layers = layers(&graph);
        let kinds: BTreeSet<usize> = layers.iter().map(|layer| layer.kind).collect();
        report.push_str(&format!(
            "{name}: {} ops in {} classes, {} layers of {} kinds\n",
            graph.ops.len(),
            ties.n_op_classes,
            layers.len(),
            kinds.len()
        ));
    }
    insta::assert_snapshot!(report);
}
