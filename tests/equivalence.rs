//! Compiled programs against the oracle, on the meshes that people use: losses and every gradient.

use crate::support::execution::start;
use crate::support::plans;
use meshweave_compiler::differentiate::{Optimizer, differentiate};
use meshweave_compiler::model::{DecoderConfig, Goal, GoldenSize, build_decoder};
use meshweave_dsl::graph::{Graph, Role};
use meshweave_dsl::layout::Mesh;
use meshweave_dsl::plan::Plan;
use meshweave_runtime::reference::{Stepper, Value, golden_inputs};

/// Largest |difference| over largest |value| of a tensor, f32 programs against the f64 oracle.
const TOLERANCE: f64 = 1e-5;
/// Of the published losses of the golden model.
const GOLDEN_TOLERANCE: f64 = 1e-4;

const DENSE: [f64; 5] = [6.739996, 5.957613, 5.208904, 4.504258, 3.849025];
const MOE_CAPACITY_2: [f64; 5] = [6.751934, 5.857271, 5.038284, 4.282347, 3.568987];
const MOE_DROPLESS: [f64; 5] = [6.751000, 5.855239, 5.033547, 4.281944, 3.571185];

type Preferences = Vec<(&'static str, &'static [&'static str])>;

const TP: &[&str] = &["heads", "ffn", "vocab"];
const PARAM_DIMS: &[&str] = &["batch", "expert", "vocab", "embed", "ffn", "heads"];

/// Meshes with the dims that each axis divides, best first.
fn meshes() -> Vec<(&'static str, Mesh, Preferences)> {
    vec![
        ("1", Mesh::new([("dp", 1)]), vec![]),
        ("dp8", Mesh::new([("dp", 8)]), vec![("dp", &["batch"])]),
        ("tp4", Mesh::new([("tp", 4)]), vec![("tp", TP)]),
        (
            "dp2 x tp4",
            Mesh::new([("dp", 2), ("tp", 4)]),
            vec![("dp", &["batch"]), ("tp", TP)],
        ),
        (
            "fsdp8",
            Mesh::new([("fsdp", 8)]),
            vec![("fsdp", PARAM_DIMS)],
        ),
        (
            "fsdp2 x tp2 x sp",
            Mesh::new([("fsdp", 2), ("tp", 2)]),
            vec![
                ("fsdp", PARAM_DIMS),
                ("tp", &["heads", "ffn", "vocab", "seq"]),
            ],
        ),
        ("dp3", Mesh::new([("dp", 3)]), vec![("dp", &["batch"])]),
        (
            "tp3",
            Mesh::new([("tp", 3)]),
            vec![("tp", &["heads", "ffn", "vocab", "seq"])],
        ),
        ("dp5", Mesh::new([("dp", 5)]), vec![("dp", PARAM_DIMS)]),
        (
            "ep4",
            Mesh::new([("ep", 4)]),
            vec![("ep", &["expert", "batch"])],
        ),
    ]
}

fn golden(capacity_factor: Option<f64>, tied: bool) -> Graph {
    let size = GoldenSize::named("tiny").unwrap();
    let mut config = DecoderConfig::golden(&size, capacity_factor);
    config.tied = tied;
    let forward = build_decoder(&config, size.batch, size.seq, Goal::Training).unwrap();
    differentiate(&forward, &Optimizer::GOLDEN_ADAMW).unwrap()
}

/// Steps the program: the losses against `expected`, the first step's gradients against the oracle.
fn check(graph: &Graph, plan: &Plan, expected: Option<&[f64; 5]>) -> Vec<String> {
    let mut failures = Vec::new();
    let mut session = start(graph, plan);
    let mut stepper = Stepper::new(graph).unwrap();
    let truth = stepper.step(&golden_inputs(graph, 512).unwrap()).unwrap();
    session.step().unwrap();
    let loss = session.loss().unwrap();
    let loss_error = (loss - truth.loss()).abs() / truth.loss();
    if loss_error > TOLERANCE {
        failures.push(format!("loss {loss}, the oracle's is {}", truth.loss()));
    }
    let mut compare = |name: &str, expected: &Value| {
        let value = session.get(name).unwrap();
        let scale = expected
            .data()
            .iter()
            .fold(0.0_f64, |most, x| most.max(x.abs()));
        let pairs = value.as_f32().unwrap().iter().zip(expected.data());
        let error = pairs
            .map(|(got, want)| (f64::from(*got) - want).abs())
            .fold(0.0, f64::max)
            / scale;
        if error.is_nan() || error > TOLERANCE {
            failures.push(format!("{name}: relative error {error:e}"));
        }
    };
    for (param, gradient) in &graph.gradients {
        compare(&graph.tensor(*gradient).name, &truth.gradients[param]);
    }
    // The moments after the step show that updates arrive where the next step reads them.
    for (id, value) in stepper.sources() {
        if matches!(graph.tensor(*id).role, Role::State { .. }) {
            compare(&graph.tensor(*id).name, value);
        }
    }
    for (step_idx, want) in expected.iter().flat_map(|losses| losses.iter()).enumerate() {
        if step_idx > 0 {
            session.step().unwrap();
        }
        let got = session.loss().unwrap();
        if (got - want).abs() > GOLDEN_TOLERANCE {
            failures.push(format!("step {step_idx}: loss {got}, published {want}"));
        }
    }
    failures
}

fn check_meshes(graph: &Graph, expected: Option<&[f64; 5]>) {
    let mut failures = Vec::new();
    for (name, mesh, preferences) in meshes() {
        let plan = plans::preferring(graph, &mesh, &preferences);
        failures.extend(
            check(graph, &plan, expected)
                .into_iter()
                .map(|failure| format!("{name}: {failure}")),
        );
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn dense_decoder() {
    check_meshes(&golden(None, false), Some(&DENSE));
}

#[test]
fn dense_decoder_with_tied_embeddings() {
    check_meshes(&golden(None, true), None);
}

#[test]
fn moe_decoder_with_capacity() {
    check_meshes(&golden(Some(2.0), false), Some(&MOE_CAPACITY_2));
}

#[test]
fn moe_decoder_without_drops() {
    check_meshes(&golden(Some(0.0), false), Some(&MOE_DROPLESS));
}

#[test]
fn random_plans_run() {
    let graph = golden(None, false);
    for seed in 0..4 {
        let plan = plans::random_plan(&graph, &Mesh::new([("dp", 2), ("tp", 2)]), seed);
        assert_eq!(
            check(&graph, &plan, Some(&DENSE)),
            Vec::<String>::new(),
            "seed {seed}"
        );
    }
}
