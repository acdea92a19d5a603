use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::*;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn public(model: &str) -> String {
    std::fs::read_to_string(
        root()
            .join("examples/models")
            .join(model)
            .join("config.json"),
    )
    .unwrap()
}

#[test]
fn public_models_have_their_published_sizes() {
    let counts = root().join("tests/fixtures/hf/parameter_counts.json");
    let counts: BTreeMap<String, usize> =
        serde_json::from_str(&std::fs::read_to_string(counts).unwrap()).unwrap();
    assert_eq!(counts.len(), 12);
    let mut notes = String::new();
    for (model, expected) in counts {
        let imported = read_config(&model, &public(&model)).unwrap();
        let graph = build_decoder(&imported.config, 1, 128, Goal::Training).unwrap();
        // The biases of the routers are counted as buffers, not as parameters.
        let is_bias = |id: &_| graph.tensor(*id).name.ends_with("router_bias");
        let n_biases: usize = graph
            .params()
            .filter(is_bias)
            .map(|id| graph.ty(id).n_elements())
            .sum();
        assert!(
            [expected, expected + n_biases].contains(&graph.n_params()),
            "{model}: {} instead of {expected}",
            graph.n_params()
        );
        imported.weights.check(&graph).unwrap();
        for note in imported.notes {
            notes += &format!("{model}: {note}\n");
        }
    }
    insta::assert_snapshot!(notes);
}

#[test]
fn configs_of_the_families() {
    for model in [
        "llama-3.1-405b",
        "qwen3-30b-a3b",
        "deepseek-v2-lite",
        "deepseek-v3",
        "gpt2",
    ] {
        let imported = read_config(model, &public(model)).unwrap();
        let text = serde_json::to_string_pretty(&imported.config).unwrap();
        insta::assert_snapshot!(model, text);
    }
}

#[test]
fn sources_of_a_layer() {
    let mut text = String::new();
    for (model, layer) in [
        ("qwen3-30b-a3b", 7),
        ("mixtral-8x7b", 7),
        ("deepseek-v3", 3),
        ("gpt2", 7),
    ] {
        let imported = read_config(model, &public(model)).unwrap();
        for (param, source) in &imported.weights.sources {
            let in_layer = param.starts_with(&format!("layers[{layer}]."));
            if in_layer || !param.starts_with("layers[") {
                let dims: Vec<String> = source
                    .dims
                    .iter()
                    .map(|factors| {
                        let factors = factors.iter().map(|f| format!("{}@{}", f.size, f.step));
                        factors.collect::<Vec<_>>().join("·")
                    })
                    .collect();
                let names = &source.names[..source.names.len().min(2)];
                text += &format!(
                    "{model} {param} <- {names:?} {:?} from {} [{}]\n",
                    source.shape,
                    source.start,
                    dims.join(", ")
                );
            }
        }
        text += &format!("{model} ignores {:?}\n", imported.weights.ignored);
    }
    insta::assert_snapshot!(text);
}

/// A public config with fields changed (null removes one).
fn changed(model: &str, changes: &[(&str, Value)]) -> String {
    let mut config: serde_json::Map<String, Value> = serde_json::from_str(&public(model)).unwrap();
    for (key, value) in changes {
        if *value == json!("REMOVE") {
            config.remove(*key);
        } else {
            config.insert((*key).into(), value.clone());
        }
    }
    serde_json::to_string_pretty(&config).unwrap()
}

fn read(model: &str, changes: &[(&str, Value)]) -> Result<Imported, ImportError> {
    read_config("config.json", &changed(model, changes))
}

#[test]
fn what_changes_the_mathematics_is_honored_or_refused() {
    let cases: &[(&str, &[(&str, Value)])] = &[
        ("llama-3-8b", &[("model_type", json!("rwkv"))]),
        (
            "llama-3-8b",
            &[("architectures", json!(["LlamaForSequenceClassification"]))],
        ),
        (
            "llama-3-8b",
            &[
                ("model_type", json!("REMOVE")),
                ("architectures", json!(["BloomForCausalLM"])),
            ],
        ),
        ("llama-3-8b", &[("hidden_act", json!("quick_gelu"))]),
        ("llama-3-8b", &[("attn_logit_softcapping", json!(50.0))]),
        ("llama-3-8b", &[("partial_rotary_factor", json!(0.5))]),
        (
            "llama-3-8b",
            &[(
                "rope_scaling",
                json!({"rope_type": "dynamic", "factor": 2.0}),
            )],
        ),
        (
            "llama-3-8b",
            &[(
                "rope_scaling",
                json!({"rope_type": "linear", "factor": 2.0, "long_factor": [1.0]}),
            )],
        ),
        (
            "llama-3-8b",
            &[(
                "rope_scaling",
                json!({"rope_type": "linear", "factor": -2.0}),
            )],
        ),
        (
            "llama-3-8b",
            &[("rope_scaling", json!({"rope_type": "linear"}))],
        ),
        ("llama-3-8b", &[("num_key_value_heads", json!(5))]),
        (
            "llama-3-8b",
            &[
                ("num_hidden_layers", json!("REMOVE")),
                ("num_hiden_layers", json!(32)),
            ],
        ),
        ("llama-3-8b", &[("num_hidden_layers", json!("32"))]),
        ("llama-3-8b", &[("num_hidden_layers", json!(0))]),
        ("llama-3-8b", &[("vocab_size", json!(1e12))]),
        ("llama-3-8b", &[("tie_word_embeddings", json!(1))]),
        ("qwen3-8b", &[("layer_types", json!(["linear_attention"]))]),
        ("mixtral-8x7b", &[("router_jitter_noise", json!(0.1))]),
        ("mixtral-8x7b", &[("num_experts_per_tok", json!(9))]),
        ("gpt2", &[("scale_attn_by_inverse_layer_idx", json!(true))]),
        ("gpt2", &[("n_head", json!(7))]),
        ("deepseek-v2-lite", &[("norm_topk_prob", json!(true))]),
        ("deepseek-v2-lite", &[("topk_method", json!("noaux_tc"))]),
        ("deepseek-v3", &[("scoring_func", json!("softmax"))]),
        ("deepseek-v3", &[("attention_bias", json!(true))]),
        ("deepseek-v3", &[("n_group", json!(7))]),
        ("deepseek-v3", &[("qk_head_dim", json!(128))]),
    ];
    let messages: Vec<String> = cases
        .iter()
        .map(|(model, changes)| read(model, changes).unwrap_err().to_string())
        .collect();
    insta::assert_snapshot!(messages.join("\n"));
}

#[test]
fn malformed_text_has_its_place() {
    let text = public("llama-3-8b");
    let messages: Vec<String> = [
        "",
        "[1, 2]",
        "{\"model_type\": \"llama\",\n  hidden_size: 4\n}",
        &text[..text.len() / 2],
    ]
    .into_iter()
    .map(|text| read_config("config.json", text).unwrap_err().to_string())
    .collect();
    insta::assert_snapshot!(messages.join("\n"));
    for end in 0..text.trim_end().len() {
        if text.is_char_boundary(end) {
            assert!(read_config("config.json", &text[..end]).is_err());
        }
    }
}

#[test]
fn windows_are_refused_only_where_they_matter() {
    let build = |changes: &[(&str, Value)], seq| {
        let imported = read("mistral-7b", changes).unwrap();
        build_decoder(&imported.config, 1, seq, Goal::Logits).map(|_| ())
    };
    assert!(build(&[], 8192).is_ok());
    assert!(build(&[("sliding_window", json!(4096))], 4096).is_ok());
    let error = build(&[("sliding_window", json!(4096))], 4097).unwrap_err();
    insta::assert_snapshot!(error, @"model `mistral` attends to a sliding window of 4096 tokens, which is not implemented for a sequence of 4097: lower `seq` to 4096");
    // Absent, the field has the library's default.
    assert!(build(&[("sliding_window", json!("REMOVE"))], 4097).is_err());
    let qwen =
        |changes: &[(&str, Value)]| read("qwen2-7b", changes).unwrap().config.attention.window;
    assert_eq!(qwen(&[]), None);
    let used = ("use_sliding_window", json!(true));
    assert_eq!(qwen(std::slice::from_ref(&used)), None);
    assert_eq!(
        qwen(&[used, ("max_window_layers", json!(20))]),
        Some(131072)
    );
}

#[test]
fn both_spellings_of_rotary_positions_agree() {
    let old = read("llama-3.1-405b", &[]).unwrap();
    let new = json!({
        "rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192
    });
    let changes = [
        ("rope_parameters", new),
        ("rope_scaling", json!("REMOVE")),
        ("rope_theta", json!("REMOVE")),
    ];
    assert_eq!(read("llama-3.1-405b", &changes).unwrap(), old);
}
