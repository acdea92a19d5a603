use std::collections::BTreeSet;

use meshweave_dsl::build::GraphBuilder;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::Init;

use super::*;
use crate::model::{DecoderConfig, Goal, GoldenSize, build_decoder};

fn golden(capacity_factor: Option<f64>, tied: bool) -> Graph {
    let size = GoldenSize::named("tiny").unwrap();
    let mut config = DecoderConfig::golden(&size, capacity_factor);
    config.n_layers = 1;
    config.tied = tied;
    build_decoder(&config, 2, 8, Goal::Training).unwrap()
}

/// Ops with the sizes that are made, one a line.
fn listing(graph: &Graph) -> String {
    let mut text = String::new();
    for op in &graph.ops {
        let names = |ids: &[TensorId]| {
            let names: Vec<_> = ids
                .iter()
                .map(|id| graph.tensor(*id).name.as_str())
                .collect();
            names.join(", ")
        };
        text += &format!(
            "{} = {}({}) {}\n",
            names(&op.results),
            op.kind.name(),
            names(&op.inputs),
            graph.ty(op.results[0])
        );
    }
    text
}

/// What every differentiated graph must satisfy.
fn check(graph: &Graph) {
    let mut known: BTreeSet<TensorId> = graph
        .tensor_ids()
        .filter(|id| graph.tensor(*id).role != Role::Temp)
        .collect();
    for op in &graph.ops {
        let inputs: Vec<_> = op.inputs.iter().map(|id| graph.ty(*id)).collect();
        assert!(
            op.inputs.iter().all(|id| known.contains(id)),
            "{}",
            graph.op_name(op)
        );
        let types = op.kind.infer(&inputs).unwrap();
        let results: Vec<_> = op.results.iter().map(|id| graph.ty(*id).clone()).collect();
        assert_eq!(types, results);
        assert!(op.results.iter().all(|id| known.insert(*id)));
    }
    let names: BTreeSet<_> = graph.tensors.iter().map(|tensor| &tensor.name).collect();
    assert_eq!(names.len(), graph.tensors.len());
    for (param, gradient) in &graph.gradients {
        assert_eq!(graph.ty(*param), graph.ty(*gradient));
    }
    for (old, new) in &graph.updates {
        assert_eq!(graph.ty(*old), graph.ty(*new));
    }
}

#[test]
fn golden_dense_trains() {
    let graph = differentiate(&golden(None, false), &Optimizer::GOLDEN_ADAMW).unwrap();
    check(&graph);
    assert_eq!(graph.gradients.len(), graph.params().count());
    assert_eq!(graph.updates.len(), 3 * graph.params().count());
    insta::assert_snapshot!(listing(&graph));
}

#[test]
fn golden_moe_trains() {
    let graph = differentiate(&golden(Some(2.0), true), &Optimizer::GOLDEN_SGD).unwrap();
    check(&graph);
    assert_eq!(graph.updates.len(), graph.params().count());
    insta::assert_snapshot!(listing(&graph));
}

#[test]
fn without_an_optimizer_only_gradients() {
    let forward = golden(None, true);
    let graph = differentiate(&forward, &Optimizer::None).unwrap();
    check(&graph);
    assert!(graph.updates.is_empty());
    assert_eq!(graph.find("step"), None);
    assert_eq!(graph.gradients.len(), forward.params().count());
}

#[test]
fn norms_and_biases_do_not_decay() {
    let graph = differentiate(&golden(None, false), &Optimizer::GOLDEN_ADAMW).unwrap();
    let plain: Vec<_> = graph
        .ops
        .iter()
        .filter(|op| matches!(&op.kind, OpKind::Adamw { decay, .. } if decay.0 == 0.0))
        .map(|op| graph.op_name(op))
        .collect();
    assert_eq!(
        plain,
        [
            "final.norm.next",
            "layers[0].mlp.norm.next",
            "layers[0].attn.norm.next"
        ]
    );
}

#[test]
fn updates_follow_the_last_use() {
    let graph = differentiate(&golden(None, true), &Optimizer::GOLDEN_ADAMW).unwrap();
    let consumers = graph.consumers();
    for (op_id, op) in graph.ops() {
        if let OpKind::Adamw { .. } = op.kind {
            assert_eq!(consumers[op.inputs[0].index()].last(), Some(&op_id));
        }
    }
    // The tied table is read by the head's gradient and by the embedding's, which is the last op.
    assert_eq!(graph.op_name(graph.ops.last().unwrap()), "embed.wte.next");
}

#[test]
fn the_cross_entropy_makes_no_one_hot() {
    let graph = differentiate(&golden(None, false), &Optimizer::None).unwrap();
    let wide: Vec<_> = graph
        .ops
        .iter()
        .filter(|op| {
            op.results
                .iter()
                .any(|id| graph.ty(*id).has(&"vocab".into()))
        })
        .map(|op| op.kind.name())
        .collect();
    assert_eq!(
        wide,
        ["contract", "cross_entropy_grad", "contract", "scatter_add"]
    );
}

#[test]
fn only_what_leads_to_a_parameter_is_built() {
    let mut b = GraphBuilder::new("g");
    let x = b.input("x", DType::F32, [("n", 4)]).unwrap();
    let fixed = b.silu("fixed", x).unwrap();
    let w = b.param("w", DType::F32, [("n", 4)], Init::Ones).unwrap();
    let y = b.mul("y", fixed, w).unwrap();
    let loss = b.mean("loss", y, ["n"]).unwrap();
    b.output(loss);
    let graph = differentiate(&b.finish(), &Optimizer::None).unwrap();
    check(&graph);
    insta::assert_snapshot!(listing(&graph), @r"
    fixed = silu(x) f32[n:4]
    y = mul(fixed, w) f32[n:4]
    loss.sum = reduce_sum(y) f32[]
    loss = scale(loss.sum) f32[]
    grad.w = mul(grad.y, fixed) f32[n:4]
    ");
}

#[test]
fn refusals_name_the_op() {
    let message = |build: &dyn Fn(&mut GraphBuilder, TensorId) -> Result<TensorId, OpError>| {
        let mut b = GraphBuilder::new("g");
        let w = b
            .param("w", DType::F32, [("m", 2), ("n", 4)], Init::Ones)
            .unwrap();
        let y = build(&mut b, w).unwrap();
        b.output(y);
        differentiate(&b.finish(), &Optimizer::None)
            .unwrap_err()
            .to_string()
    };
    let messages = [
        message(&|_, w| Ok(w)),
        message(&|b, _| b.input("x", DType::F32, ())),
        message(&|b, w| {
            let g = b.param("g", DType::F32, [("n", 4)], Init::Ones)?;
            let kind = OpKind::RmsNorm {
                dim: "n".into(),
                eps: Scalar(1e-5),
            };
            let results = b.op("normed", kind, &[w, g])?;
            b.reduce("loss", ReduceKind::Sum, results[1], ["m"])
        }),
        message(&|b, w| {
            let y = b.softmax("y", w, "n")?;
            let z = b.apply("z", OpKind::SoftmaxGrad { dim: "n".into() }, &[y, w])?;
            b.reduce("loss", ReduceKind::Sum, z, ["m", "n"])
        }),
        differentiate(&Graph::new("empty"), &Optimizer::None)
            .unwrap_err()
            .to_string(),
    ];
    insta::assert_snapshot!(messages.join("\n"));
}
