//! Pipeline schedules in execution against the oracle: losses, every gradient and the moments after
//! a step are those of the serial model on the whole batch.
// Helpers of tests may fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg(feature = "mlir")]

#[path = "support/plans.rs"]
mod plans;

use meshweave::compile::{CompileOptions, compile_pipeline};
use meshweave_compiler::differentiate::{Optimizer, differentiate, differentiate_traced};
use meshweave_compiler::model::{DecoderConfig, Goal, GoldenSize, build_decoder};
use meshweave_compiler::partition::Keep;
use meshweave_compiler::pipeline::{assign, cut_evenly, scale_loss};
use meshweave_dsl::cluster::{Cluster, Host};
use meshweave_dsl::graph::{Graph, Role};
use meshweave_dsl::layout::Mesh;
use meshweave_dsl::pipeline::PipelinePlan;
use meshweave_dsl::schedule::{Action, ActionKind, Schedule};
use meshweave_runtime::artifact;
use meshweave_runtime::executor::{Session, SessionOptions};
use meshweave_runtime::reference::{StepResult, Stepper, Value, golden_inputs, golden_tokens};
use meshweave_runtime::tensor::{Elements, HostTensor};

/// Largest |difference| over largest |value| of a tensor, f32 programs against the f64 oracle.
const TOLERANCE: f64 = 1e-5;

/// A golden model and what the oracle makes of its first step.
struct Case {
    config: DecoderConfig,
    size: GoldenSize,
    whole: Graph,
    truth: StepResult,
    /// Parameters and moments after the step, by name.
    after: Vec<(String, Value)>,
}

impl Case {
    fn new(n_layers: usize, tied: bool) -> Case {
        let size = GoldenSize {
            n_layers,
            ..GoldenSize::named("tiny").unwrap()
        };
        let mut config = DecoderConfig::golden(&size, None);
        config.tied = tied;
        let forward = build_decoder(&config, size.batch, size.seq, Goal::Training).unwrap();
        let whole = differentiate(&forward, &Optimizer::GOLDEN_ADAMW).unwrap();
        let mut stepper = Stepper::new(&whole).unwrap();
        let truth = stepper
            .step(&golden_inputs(&whole, size.vocab).unwrap())
            .unwrap();
        let after = stepper
            .sources()
            .iter()
            .filter(|(id, _)| matches!(whole.tensor(**id).role, Role::State { .. }))
            .map(|(id, value)| (whole.tensor(*id).name.clone(), value.clone()))
            .collect();
        Case {
            config,
            size,
            whole,
            truth,
            after,
        }
    }

    /// Runs a step of the schedule on a mesh (its axis `pp` is the pipeline) and compares.
    fn check(&self, schedule: &Schedule, axes: &[(&str, usize)]) -> Vec<String> {
        let mut session = self.start(schedule, axes);
        session.step().unwrap();
        let mut failures = Vec::new();
        let loss = session.loss().unwrap();
        if (loss - self.truth.loss()).abs() > TOLERANCE * self.truth.loss() {
            failures.push(format!(
                "loss {loss}, the oracle's is {}",
                self.truth.loss()
            ));
        }
        let mut compare = |name: &str, expected: &Value| {
            let value = session.get(name).unwrap();
            let most = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0_f64, f64::max);
            let scale = most(&mut expected.data().iter().map(|x| x.abs()));
            let pairs = value.as_f32().unwrap().iter().zip(expected.data());
            let error = most(&mut pairs.map(|(got, want)| (f64::from(*got) - want).abs())) / scale;
            if error.is_nan() || error > TOLERANCE {
                failures.push(format!("{name}: relative error {error:e}"));
            }
        };
        for (param, gradient) in &self.whole.gradients {
            compare(
                &self.whole.tensor(*gradient).name,
                &self.truth.gradients[param],
            );
        }
        for (name, value) in &self.after {
            compare(name, value);
        }
        failures
            .into_iter()
            .map(|failure| format!("{} on {axes:?}: {failure}", schedule.name))
            .collect()
    }

    fn start(&self, schedule: &Schedule, axes: &[(&str, usize)]) -> Session {
        let n_microbatches = schedule.n_microbatches;
        let size = &self.size;
        let forward = build_decoder(
            &self.config,
            size.batch / n_microbatches,
            size.seq,
            Goal::Training,
        )
        .unwrap();
        let forward = scale_loss(&forward, n_microbatches).unwrap();
        let mesh = Mesh::new(axes.iter().copied());
        let cluster = Cluster::local(mesh.n_ranks(), &Host::nominal());
        let stages = cut_evenly(&forward, schedule.n_stages, &cluster).unwrap();
        let (graph, origins) = differentiate_traced(&forward, &Optimizer::GOLDEN_ADAMW).unwrap();
        let pipeline = PipelinePlan {
            mesh,
            axis: "pp".into(),
            batch: "batch".into(),
            parts: assign(&graph, &origins, &stages).unwrap(),
            schedule: schedule.clone(),
        };
        let preferences: &[(&str, &[&str])] = &[
            ("dp", &["batch"]),
            ("tp", &["heads", "ffn", "vocab"]),
            ("sp", &["heads", "ffn", "vocab", "seq"]),
            ("fsdp", &["batch", "vocab", "embed", "ffn", "heads"]),
        ];
        let plan = plans::preferring(&graph, &pipeline.stage_mesh(), preferences);
        let options = CompileOptions {
            keep: Keep::Gradients,
            emit: Vec::new(),
        };
        let compiled = compile_pipeline(&graph, &plan, &pipeline, &cluster, &options).unwrap();
        let planned: Vec<usize> = compiled
            .program
            .ranks
            .iter()
            .map(|r| r.arena_bytes)
            .collect();
        let kernels = artifact::load_kernels(&compiled.program, &compiled.kernels).unwrap();
        let mut session =
            Session::new(compiled.program, kernels, &SessionOptions::default()).unwrap();
        assert_eq!(
            session.arena_bytes(),
            planned,
            "the predicted peak is allocated"
        );
        let (tokens, targets) = golden_tokens(size.batch, size.seq, size.vocab);
        for (name, data) in [("tokens", tokens), ("targets", targets)] {
            let ty = self.whole.ty(self.whole.find(name).unwrap()).clone();
            let value = HostTensor::new(ty, Elements::I32(data)).unwrap();
            session.set(name, &value).unwrap();
        }
        session
    }
}

/// Each rank's actions from `F0` such as texts.
fn rows(name: &str, n_microbatches: usize, rows: &[Vec<Action>]) -> Schedule {
    Schedule::new(
        name,
        n_microbatches,
        (0..rows.len()).collect(),
        rows.to_vec(),
    )
}

/// All forwards, then all backwards.
fn gpipe(n_ranks: usize, n_microbatches: usize) -> Schedule {
    let row = |rank: usize| {
        let all = |kind| (0..n_microbatches).map(move |m| Action::new(rank as u32, kind, m as u32));
        all(ActionKind::F).chain(all(ActionKind::B)).collect()
    };
    rows(
        "gpipe",
        n_microbatches,
        &(0..n_ranks).map(row).collect::<Vec<_>>(),
    )
}

/// P − r forwards, then a backward and a forward in turn.
fn one_f_one_b(n_ranks: usize, n_microbatches: usize, kinds: &[ActionKind]) -> Schedule {
    let row = |rank: usize| {
        let act = |kind, m: usize| Action::new(rank as u32, kind, m as u32);
        let n_ahead = (n_ranks - rank).min(n_microbatches);
        let mut row: Vec<Action> = (0..n_ahead).map(|m| act(ActionKind::F, m)).collect();
        for m in 0..n_microbatches {
            row.extend(kinds.iter().map(|kind| act(*kind, m)));
            if m + n_ahead < n_microbatches {
                row.push(act(ActionKind::F, m + n_ahead));
            }
        }
        row
    };
    rows(
        "1f1b",
        n_microbatches,
        &(0..n_ranks).map(row).collect::<Vec<_>>(),
    )
}

#[test]
fn gpipe_and_1f1b_on_two_ranks() {
    use ActionKind::{B, I, W};
    let case = Case::new(2, false);
    let schedules = [
        gpipe(2, 4),
        one_f_one_b(2, 4, &[B]),
        one_f_one_b(2, 4, &[I, W]),
    ];
    for schedule in schedules {
        assert_eq!(case.check(&schedule, &[("pp", 2)]), Vec::<String>::new());
    }
}
