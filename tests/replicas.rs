//! Experts with replicas, executed: losses, gradients and logits are those of the model without, on any
//! mesh, and the busiest device has less to do.

use meshweave_compiler::differentiate::{Optimizer, differentiate};
use meshweave_compiler::model::{DecoderConfig, Goal, GoldenSize, build_decoder};
use meshweave_compiler::placement::replicas::{N_TURNS, Replicas};
use meshweave_compiler::replicate::replicate;
use meshweave_dsl::graph::Graph;
use meshweave_dsl::layout::Mesh;
use meshweave_dsl::placement::Placement;
use meshweave_runtime::reference::{StepResult, Stepper, golden_inputs};
use meshweave_runtime::tensor::HostTensor;

use crate::support::execution::start;
use crate::support::plans;

mod runs;

/// Largest |difference| over largest |value| of a tensor, f32 programs against the f64 oracle.
const TOLERANCE: f64 = 1e-5;

type Preferences = Vec<(&'static str, &'static [&'static str])>;

/// The golden model's forward graph: two layers of eight experts.
fn forward(goal: Goal, top_k: usize, capacity: f64) -> Graph {
    let size = GoldenSize::named("tiny").unwrap();
    let mut config = DecoderConfig::golden(&size, Some(capacity));
    config.moe.as_mut().unwrap().top_k = top_k;
    build_decoder(&config, size.batch, size.seq, goal).unwrap()
}

/// Three slots on each of four devices; expert 0 is everywhere in the first layer. Experts are at home in
/// their own order, so that programs start from the model's own weights.
fn placement() -> Placement {
    let first = vec![vec![0, 1, 6], vec![2, 3, 0], vec![4, 5, 0], vec![6, 7, 0]];
    let second = vec![vec![1, 0, 7], vec![3, 2, 7], vec![4, 5, 1], vec![6, 7, 4]];
    Placement::new(vec![first, second], 4).unwrap()
}

fn replicas() -> Replicas {
    let replicas = Replicas::new(&placement(), None).unwrap();
    for layer in &replicas.layers {
        assert_eq!(layer.order, (0..8).collect::<Vec<_>>());
    }
    replicas
}

fn truth(graph: &Graph) -> StepResult {
    let mut stepper = Stepper::new(graph).unwrap();
    stepper.step(&golden_inputs(graph, 512).unwrap()).unwrap()
}

fn relative_error(got: &HostTensor, want: &[f64]) -> f64 {
    let got = got.as_f32().unwrap();
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
    let errors = got.iter().zip(want).map(|(a, b)| (f64::from(*a) - b).abs());
    errors.fold(0.0, f64::max) / scale.max(f64::MIN_POSITIVE)
}

fn meshes() -> [(Mesh, Preferences); 3] {
    [
        (Mesh::new([("ep", 4)]), vec![("ep", &["expert", "batch"])]),
        // Attention on dp2 × tp2, experts on both together.
        (
            Mesh::new([("dp", 2), ("tp", 2)]),
            vec![
                ("dp", &["expert", "batch"]),
                ("tp", &["expert", "heads", "vocab"]),
            ],
        ),
        // Two groups of two devices: experts' gradients are sums over dp.
        (
            Mesh::new([("dp", 2), ("ep", 2)]),
            vec![("dp", &["batch"]), ("ep", &["expert", "ffn"])],
        ),
    ]
}

#[test]
fn the_graph_with_replicas_is_the_same_function() {
    for (top_k, capacity) in [(1, 0.0), (2, 0.0), (2, 1.0)] {
        let plain = forward(Goal::Training, top_k, capacity);
        let with = replicate(&plain, &replicas()).unwrap();
        let [plain, with] = [&plain, &with].map(|graph| {
            let graph = differentiate(graph, &Optimizer::GOLDEN_ADAMW).unwrap();
            let result = truth(&graph);
            (graph, result)
        });
        let error = (plain.1.loss() - with.1.loss()).abs();
        assert!(error < 1e-12, "top {top_k}: {error:e}");
        assert_eq!(plain.0.gradients.len(), with.0.gradients.len());
        for (param, want) in &plain.1.gradients {
            let name = &plain.0.tensor(*param).name;
            let got = &with.1.gradients[&with.0.find(name).unwrap()];
            let error = got.relative_error(want);
            assert!(error < 1e-12, "top {top_k}: {name}: {error:e}");
        }
    }
}

#[test]
fn training_with_replicas_has_the_losses_and_gradients_without() {
    for top_k in [1, 2] {
        let plain = forward(Goal::Training, top_k, 0.0);
        let with = replicate(&plain, &replicas()).unwrap();
        let plain = differentiate(&plain, &Optimizer::GOLDEN_ADAMW).unwrap();
        let with = differentiate(&with, &Optimizer::GOLDEN_ADAMW).unwrap();
        let mut stepper = Stepper::new(&plain).unwrap();
        let inputs = golden_inputs(&plain, 512).unwrap();
        let want = [
            stepper.step(&inputs).unwrap(),
            stepper.step(&inputs).unwrap(),
        ];
        let preferred = meshes();
        let preferred = preferred
            .iter()
            .map(|(mesh, axes)| plans::preferring(&with, mesh, axes));
        let random =
            (0..2).map(|seed| plans::random_plan(&with, &Mesh::new([("a", 2), ("b", 2)]), seed));
        for plan in preferred.chain(random) {
            let mut execution = start(&with, &plan);
            for (step, want) in want.iter().enumerate() {
                execution.step().unwrap();
                let error = (execution.loss().unwrap() - want.loss()).abs() / want.loss();
                assert!(
                    error < TOLERANCE,
                    "top {top_k} on {}: step {step}: {error:e}",
                    plan.mesh
                );
                if step > 0 {
                    continue;
                }
                for (param, gradient) in &plain.gradients {
                    let name = &plain.tensor(*gradient).name;
                    let got = execution.get(name).unwrap();
                    let error = relative_error(&got, want.gradients[param].data());
                    assert!(
                        error < TOLERANCE,
                        "top {top_k} on {}: {name}: {error:e}",
                        plan.mesh
                    );
                }
            }
        }
    }
}

#[test]
fn inference_with_replicas_has_the_logits_without() {
    for top_k in [1, 2] {
        let plain = forward(Goal::Logits, top_k, 0.0);
        let with = replicate(&plain, &replicas()).unwrap();
        let want = truth(&plain);
        for (mesh, axes) in meshes() {
            let mut execution = start(&with, &plans::preferring(&with, &mesh, &axes));
            execution.step().unwrap();
            let logits = execution.get(&with.tensor(with.outputs[0]).name).unwrap();
            let error = relative_error(&logits, want.outputs[0].data());
            assert!(error < TOLERANCE, "top {top_k} on {mesh}: {error:e}");
        }
    }
}

#[test]
fn homes_are_where_experts_serve_and_turns_follow_shares() {
    // Every expert of devices 0 and 1 could live on either; 4 and 5 have one place each.
    let layer = vec![vec![4, 0, 1], vec![5, 0, 1], vec![2, 3, 4]];
    let placement = Placement::new(vec![layer], 3).unwrap();
    let shares = vec![vec![
        vec![1.0, 0.25, 0.0],
        vec![1.0, 0.75, 1.0],
        vec![1.0, 1.0, 0.0],
    ]];
    let replicas = Replicas::new(&placement, Some(&shares)).unwrap();
    let layer = &replicas.layers[0];
    for (position, expert) in layer.order.iter().enumerate() {
        let device = position / 2;
        let held = &placement.layer(0)[device];
        assert!(held.contains(&(*expert as u16)), "{expert} at {device}");
    }
    let of = |expert: usize| {
        let position = layer.order.iter().position(|one| *one == expert).unwrap();
        &layer.turns[position]
    };
    let taken = |expert, place| of(expert).iter().filter(|one| **one == place).count();
    assert_eq!((taken(0, 1), taken(0, 4)), (N_TURNS / 4, 3 * N_TURNS / 4));
    assert_eq!((taken(1, 2), taken(1, 5)), (0, N_TURNS));
    // Spread evenly: one in any four.
    for four in of(0).chunks(4) {
        assert_eq!(four.iter().filter(|place| **place == 1).count(), 1);
    }
    assert_eq!(replicas.n_copies(), 3);
}

#[test]
fn placements_of_other_models_are_refused() {
    let plain = forward(Goal::Logits, 1, 0.0);
    let layers = |layers: Vec<Vec<Vec<u16>>>| {
        let placement = Placement::new(layers, 1).unwrap();
        Replicas::new(&placement, None).map_err(|error| error.to_string())
    };
    let one = vec![vec![0, 1, 2], vec![3, 0, 1]];
    let error = replicate(&plain, &layers(vec![one.clone()]).unwrap()).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("has 4 experts a layer") && error.contains("to 8"),
        "{error}"
    );
    let all = vec![vec![0, 1, 2, 3, 4], vec![5, 6, 7, 0, 1]];
    let error = replicate(&plain, &layers(vec![all]).unwrap())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("1 layers") && error.contains("has 2"),
        "{error}"
    );
    let odd = vec![vec![0, 1], vec![2, 0]];
    let error = layers(vec![odd]).unwrap_err();
    assert!(
        error.contains("3 experts do not divide over 2 devices"),
        "{error}"
    );
    let text = r#"{"devices":2,"per_node":2,"physical_to_logical_map":[[0,1,2,-1]]}"#;
    let error = serde_json::from_str::<Placement>(text)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("slot 1 of device 1 is empty in layer 0"),
        "{error}"
    );
}
