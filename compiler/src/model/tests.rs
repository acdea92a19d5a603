use std::collections::BTreeSet;

use meshweave_dsl::graph::{Role, RopeScaling, RopeTable};

use super::*;

fn tiny() -> GoldenSize {
    GoldenSize::named("tiny").unwrap()
}

/// Every parameter with its type and start values, then the ops.
fn listing(graph: &Graph) -> String {
    let mut text = String::new();
    for id in graph.params() {
        let tensor = graph.tensor(id);
        let Role::Param(init) = &tensor.role else {
            continue;
        };
        text += &format!("{}: {} {init:?}\n", tensor.name, tensor.ty);
    }
    for op in &graph.ops {
        let names = |ids: &[TensorId]| {
            let names: Vec<_> = ids
                .iter()
                .map(|id| graph.tensor(*id).name.as_str())
                .collect();
            names.join(", ")
        };
        text += &format!(
            "{} = {}({})",
            names(&op.results),
            op.kind.name(),
            names(&op.inputs)
        );
        text += &format!(" {}\n", graph.ty(op.results[0]));
    }
    text
}

#[test]
fn golden_dense() {
    let graph =
        build_decoder(&DecoderConfig::golden(&tiny(), None), 8, 64, Goal::Training).unwrap();
    insta::assert_snapshot!(listing(&graph));
}

#[test]
fn golden_moe() {
    let graph = build_decoder(
        &DecoderConfig::golden(&tiny(), Some(2.0)),
        8,
        64,
        Goal::Training,
    )
    .unwrap();
    insta::assert_snapshot!(listing(&graph));
}

#[test]
fn golden_sizes() {
    let small = GoldenSize::named("small").unwrap();
    let graph =
        build_decoder(&DecoderConfig::golden(&small, None), 8, 256, Goal::Training).unwrap();
    assert_eq!(graph.n_params(), 21_238_272);
    let mut config = DecoderConfig::golden(&small, None);
    config.tied = true;
    let tied = build_decoder(&config, 8, 256, Goal::Training).unwrap();
    assert_eq!(tied.n_params(), 21_238_272 - 8192 * 512);
}

/// A small model of the DeepSeek-V3 kind.
fn deepseek() -> DecoderConfig {
    let mut config = DecoderConfig::golden(&tiny(), Some(0.0));
    config.attention.head = 24;
    config.attention.mla = Some(Mla {
        q_rank: Some(32),
        kv_rank: 16,
        nope: 16,
        rope: 8,
        value: 12,
        eps: 1e-6,
    });
    config.positions = Positions::Rope(RopeTable {
        theta: 10000.0,
        rotary_dim: 8,
        scaling: RopeScaling::None,
    });
    let moe = config.moe.as_mut().unwrap();
    moe.router = Router::Sigmoid {
        normalize: true,
        scale: 2.5,
        groups: Some((4, 2)),
    };
    moe.shared = Some(SharedExperts {
        ffn: 64,
        gated: true,
    });
    moe.dense_layers = BTreeSet::from([0]);
    config
}

#[test]
fn latent_attention_and_limited_groups() {
    let graph = build_decoder(&deepseek(), 2, 8, Goal::Logits).unwrap();
    insta::assert_snapshot!(listing(&graph));
}

#[test]
fn biases_and_learned_positions() {
    let mut config = DecoderConfig::golden(&tiny(), None);
    config.n_layers = 1;
    config.norm.kind = NormKind::Layer;
    config.positions = Positions::Learned { n_positions: 32 };
    config.attention.bias = AttentionBias {
        q: true,
        k: true,
        v: true,
        o: true,
    };
    config.attention.kv_heads = 2;
    config.attention.qk_norm = true;
    config.ffn.bias = true;
    config.ffn.gated = false;
    config.tied = true;
    let graph = build_decoder(&config, 2, 8, Goal::Logits).unwrap();
    insta::assert_snapshot!(listing(&graph));
    let error = build_decoder(&config, 2, 33, Goal::Logits).unwrap_err();
    insta::assert_snapshot!(error, @"a sequence of 33 tokens exceeds the 32 learned positions of model `golden`: lower `seq`");
}

#[test]
fn names_are_unique() {
    let graph = build_decoder(&deepseek(), 2, 8, Goal::Training).unwrap();
    let names: BTreeSet<_> = graph.tensors.iter().map(|tensor| &tensor.name).collect();
    assert_eq!(names.len(), graph.tensors.len());
}

#[test]
fn contradictions_are_named() {
    let refuse = |change: fn(&mut DecoderConfig)| {
        let mut config = deepseek();
        change(&mut config);
        build_decoder(&config, 2, 8, Goal::Logits)
            .unwrap_err()
            .to_string()
    };
    let messages = [
        refuse(|c| c.embed = 0),
        refuse(|c| c.attention.kv_heads = 3),
        refuse(|c| c.attention.kv_heads = 2),
        refuse(|c| c.attention.head = 32),
        refuse(|c| c.positions = Positions::Learned { n_positions: 64 }),
        refuse(|c| c.moe.as_mut().unwrap().top_k = 9),
        refuse(|c| c.moe.as_mut().unwrap().capacity_factor = -1.0),
        refuse(|c| c.moe.as_mut().unwrap().dense_layers = BTreeSet::from([2])),
        refuse(|c| c.moe.as_mut().unwrap().top_k = 5),
    ];
    insta::assert_snapshot!(messages.join("\n"));
}
