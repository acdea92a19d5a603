//! Plans in the words of other systems, and what these cannot say.

use crate::support::plans;
use meshweave_compiler::differentiate::{Optimizer, differentiate};
use meshweave_compiler::export::{Target, export};
use meshweave_compiler::model::{DecoderConfig, Goal, GoldenSize, build_decoder};
use meshweave_dsl::graph::{Graph, Role};
use meshweave_dsl::layout::Mesh;
use meshweave_dsl::plan::Plan;

const WEIGHTS: &[&str] = &["heads", "ffn", "vocab"];
const PARAM_DIMS: &[&str] = &["batch", "expert", "vocab", "embed", "ffn", "heads"];

fn golden(capacity_factor: Option<f64>) -> Graph {
    let size = GoldenSize::named("tiny").unwrap();
    let config = DecoderConfig::golden(&size, capacity_factor);
    let forward = build_decoder(&config, size.batch, size.seq, Goal::Training).unwrap();
    differentiate(&forward, &Optimizer::GOLDEN_ADAMW).unwrap()
}

/// Keeps the optimizer state sharded over an axis, parameters replicated.
fn zero_1(graph: &Graph, mut plan: Plan, axis: &str) -> Plan {
    for id in graph.tensor_ids() {
        if matches!(graph.tensor(id).role, Role::State { .. }) {
            let dim = graph.ty(id).shape[0].0.clone();
            let layout = plan.source_layout(id).shard(dim, axis);
            plan.sources.insert(id, layout);
        }
    }
    plan
}

#[test]
fn plans_in_the_words_of_other_systems() {
    let graph = golden(None);
    let mesh = |axes: &[(&str, usize)]| Mesh::new(axes.iter().copied());
    let sequence = &["heads", "ffn", "vocab", "seq"][..];
    let plan = |axes: &[(&str, usize)], preferences: &[(&str, &[&str])]| {
        plans::preferring(&graph, &mesh(axes), preferences)
    };
    let cases = [
        ("dp4", plan(&[("dp", 4)], &[("dp", &["batch"])])),
        (
            "dp4 zero 1",
            zero_1(&graph, plan(&[("dp", 4)], &[("dp", &["batch"])]), "dp"),
        ),
        ("fsdp4", plan(&[("fsdp", 4)], &[("fsdp", PARAM_DIMS)])),
        (
            "dp2 x tp4",
            plan(
                &[("dp", 2), ("tp", 4)],
                &[("dp", &["batch"]), ("tp", WEIGHTS)],
            ),
        ),
        (
            "fsdp2 x tp2 with seq",
            plan(
                &[("fsdp", 2), ("tp", 2)],
                &[("fsdp", PARAM_DIMS), ("tp", sequence)],
            ),
        ),
        ("replicated", plan(&[("dp", 2)], &[])),
        ("embed", plan(&[("tp", 2)], &[("tp", &["embed"])])),
        ("dp3", plan(&[("dp", 3)], &[("dp", &["batch"])])),
    ];
    let mut text = String::new();
    for (name, plan) in cases {
        for target in Target::all() {
            let exported = match export(&graph, &plan, target) {
                Ok(exported) => exported,
                Err(error) => format!("error: {error}\n"),
            };
            text.push_str(&format!("--- {name}, {}\n{exported}", target.name()));
        }
    }
    insta::assert_snapshot!(text);
}

#[test]
fn experts_in_the_words_of_other_systems() {
    let graph = golden(Some(2.0));
    let mesh = Mesh::new([("ep", 4)]);
    let plan = plans::preferring(&graph, &mesh, &[("ep", &["expert", "batch"])]);
    let mut text = String::new();
    for target in Target::all() {
        let exported = match export(&graph, &plan, target) {
            Ok(exported) => exported,
            Err(error) => format!("error: {error}\n"),
        };
        text.push_str(&format!("--- {}\n{exported}", target.name()));
    }
    insta::assert_snapshot!(text);
}
