//! The golden model against an independent framework: the oracle, run on the graph that model and
//! differentiation build, gives the losses, gradients and trained weights of the fixtures, which
//! JAX computed in f64 (`tests/fixtures/golden/make_fixtures.py`).

use std::collections::BTreeMap;

use meshweave_compiler::differentiate::{Optimizer, differentiate};
use meshweave_compiler::model::{DecoderConfig, Goal, GoldenSize, build_decoder};
use meshweave_runtime::reference::{Stepper, Value, golden_inputs, hash_uniform};
use serde::Deserialize;

/// Relative to the figure; both sides compute in f64.
const TOLERANCE: f64 = 1e-9;
/// The stream of the vector that probes tensors (a norm sees neither permutations nor signs).
const PROBE_STREAM: u32 = 1000;
const N_STEPS: usize = 5;

#[derive(Deserialize)]
struct Fixture {
    size: Size,
    capacity_factor: Option<f64>,
    tied: bool,
    optimizer: String,
    losses_f64: Vec<f64>,
    tensors: BTreeMap<String, Tensor>,
}

#[derive(Deserialize)]
struct Size {
    layers: usize,
    d: usize,
    heads: usize,
    ffn: usize,
    vocab: usize,
    seq: usize,
    batch: usize,
}

#[derive(Deserialize)]
struct Tensor {
    weight: Summary,
    grad: Summary,
    after: Summary,
}

#[derive(Deserialize)]
struct Summary {
    norm: f64,
    probe: f64,
}

/// Our name of a tensor of the fixtures.
fn our_name(name: &str, moe: bool) -> String {
    let (prefix, part) = match name.split_once('.') {
        Some((layer, part)) => (format!("{layer}."), part),
        None => (String::new(), name),
    };
    let ours = match part {
        "wte" => "embed.wte",
        "lnf" => "final.norm",
        "head" => "final.head",
        "ln1" => "attn.norm",
        "wq" => "attn.wq",
        "wk" => "attn.wk",
        "wv" => "attn.wv",
        "wo" => "attn.wo",
        "ln2" if moe => "moe.norm",
        "ln2" => "mlp.norm",
        "wg" => "mlp.wg",
        "wu" => "mlp.wu",
        "wd" => "mlp.wd",
        "router" => "moe.router",
        "we_g" => "moe.experts.wg",
        "we_u" => "moe.experts.wu",
        "we_d" => "moe.experts.wd",
        other => panic!("the fixtures have a tensor `{other}`"),
    };
    format!("{prefix}{ours}")
}

fn compare(what: &str, value: &Value, expected: &Summary) {
    let norm = value.data().iter().map(|x| x * x).sum::<f64>().sqrt();
    let probe: f64 = value
        .data()
        .iter()
        .enumerate()
        .map(|(i, x)| x * f64::from(hash_uniform(PROBE_STREAM, i)))
        .sum();
    for (figure, expected) in [(norm, expected.norm), (probe, expected.probe)] {
        // The probe is a sum with cancellation: its error goes with the norm.
        let scale = expected.abs().max(norm);
        assert!(
            (figure - expected).abs() <= TOLERANCE * scale,
            "{what}: {figure}, expected {expected}"
        );
    }
}

fn check(case: &str) {
    let path = format!(
        "{}/tests/fixtures/golden/{case}.json",
        env!("CARGO_MANIFEST_DIR")
    );
    let fixture: Fixture = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let size = GoldenSize {
        n_layers: fixture.size.layers,
        embed: fixture.size.d,
        heads: fixture.size.heads,
        ffn: fixture.size.ffn,
        vocab: fixture.size.vocab,
        seq: fixture.size.seq,
        batch: fixture.size.batch,
    };
    let mut config = DecoderConfig::golden(&size, fixture.capacity_factor);
    config.tied = fixture.tied;
    let forward = build_decoder(&config, size.batch, size.seq, Goal::Training).unwrap();
    let optimizer = match fixture.optimizer.as_str() {
        "adamw" => Optimizer::GOLDEN_ADAMW,
        "sgd" => Optimizer::GOLDEN_SGD,
        other => panic!("optimizer `{other}`"),
    };
    let graph = differentiate(&forward, &optimizer).unwrap();
    assert_eq!(graph.params().count(), fixture.tensors.len());

    let inputs = golden_inputs(&graph, size.vocab).unwrap();
    let moe = fixture.capacity_factor.is_some();
    let find = |name: &str| graph.find(&our_name(name, moe)).unwrap();
    let mut stepper = Stepper::new(&graph).unwrap();
    for step in 0..N_STEPS {
        if step == 0 {
            for (name, expected) in &fixture.tensors {
                let id = find(name);
                compare(
                    &format!("{case}: {name}"),
                    &stepper.sources()[&id],
                    &expected.weight,
                );
            }
        }
        let result = stepper.step(&inputs).unwrap();
        let (loss, expected) = (result.loss(), fixture.losses_f64[step]);
        assert!(
            (loss - expected).abs() < TOLERANCE * expected,
            "{case}, step {step}: loss {loss}, expected {expected}"
        );
        if step == 0 {
            for (name, expected) in &fixture.tensors {
                let id = find(name);
                let what = format!("{case}: gradient of {name}");
                compare(&what, &result.gradients[&id], &expected.grad);
            }
        }
    }
    for (name, expected) in &fixture.tensors {
        let id = find(name);
        let what = format!("{case}: {name} after {N_STEPS} steps");
        compare(&what, &stepper.sources()[&id], &expected.after);
    }
}

#[test]
fn dense() {
    check("odd-dense");
    check("tiny-dense");
}

#[test]
fn dense_with_sgd() {
    check("odd-dense-sgd");
}

#[test]
fn tied() {
    check("odd-dense-tied");
    check("odd-dense-tied-sgd");
}

#[test]
fn moe_with_capacity() {
    check("odd-moe-cf2");
    check("odd-moe-cf2-sgd");
    check("tiny-moe-cf2");
}

#[test]
fn moe_dropless() {
    check("tiny-moe-dropless");
}
