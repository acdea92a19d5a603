//! Checkpoints of Hugging Face's own classes: the imported models give the logits that the library
//! gave for the same tokens and weights (`tests/fixtures/hf/make_fixtures.py`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use meshweave_compiler::import::{Imported, read_config};
use meshweave_compiler::model::{Goal, build_decoder};
use meshweave_dsl::graph::{Graph, TensorId};
use meshweave_runtime::pretrained::Pretrained;
use meshweave_runtime::reference::{Value, evaluate};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/hf")
        .join(name)
}

fn import(folder: &Path) -> Imported {
    let path = folder.join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    read_config(&path.display().to_string(), &text).unwrap()
}

fn load(graph: &Graph, imported: &Imported, folder: &Path) -> BTreeMap<TensorId, Value> {
    let checkpoint = Pretrained::open(folder).unwrap();
    checkpoint.check(&imported.weights, graph).unwrap();
    let value = |id| {
        let tensor = graph.tensor(id);
        let data = checkpoint
            .read_all(&imported.weights, &tensor.name, &tensor.ty)
            .unwrap();
        let data = data.into_iter().map(f64::from).collect();
        (id, Value::new(tensor.ty.clone(), data).unwrap())
    };
    graph.params().map(value).collect()
}

/// The greatest difference between our logits in f64 and the library's in f32.
fn difference(name: &str) -> f64 {
    let folder = fixture(name);
    let imported = import(&folder);
    let expected = Pretrained::open(folder.join("expected.safetensors")).unwrap();
    let (shape, tokens) = expected.tensor("tokens").unwrap();
    let graph = build_decoder(&imported.config, shape[0], shape[1], Goal::Logits).unwrap();
    let mut sources = load(&graph, &imported, &folder);
    let id = graph.find("tokens").unwrap();
    let tokens = tokens.into_iter().map(f64::from).collect();
    sources.insert(id, Value::new(graph.ty(id).clone(), tokens).unwrap());
    let values = evaluate(&graph, &sources).unwrap();
    let logits = values.require(&graph, graph.outputs[0]).unwrap();
    let (shape, expected) = expected.tensor("logits").unwrap();
    let sizes: Vec<usize> = logits.ty().shape.iter().map(|(_, size)| *size).collect();
    assert_eq!(sizes, shape);
    logits
        .data()
        .iter()
        .zip(expected)
        .map(|(ours, theirs)| (ours - f64::from(theirs)).abs())
        .fold(0.0, f64::max)
}

macro_rules! gives_the_librarys_logits {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            let difference = difference(stringify!($name));
            assert!(difference < 2e-5, "{difference}");
        }
    )*};
}

gives_the_librarys_logits! {
    llama gpt2 qwen2 mixtral qwen2_moe qwen3_moe deepseek_v2 deepseek_v3
}

#[test]
fn another_models_weights_are_refused_with_both_sides() {
    let imported = import(&fixture("qwen2"));
    let graph = build_decoder(&imported.config, 1, 1, Goal::Logits).unwrap();
    let refused = |name: &str| {
        let error = Pretrained::open(fixture(name))
            .and_then(|checkpoint| checkpoint.check(&imported.weights, &graph))
            .unwrap_err();
        error
            .to_string()
            .replace(&fixture(name).display().to_string(), name)
    };
    let messages = [refused("llama"), refused("gpt2")].join("\n");
    insta::assert_snapshot!(messages);
}
