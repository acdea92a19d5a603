//! Pipeline schedules in execution against the oracle: losses, every gradient and the moments after
//! a step are those of the serial model on the whole batch.

mod documents;

use crate::support::plans;
use std::collections::BTreeMap;
use std::sync::OnceLock;

use meshweave::compile::{CompileOptions, Compiled, compile_pipeline};
use meshweave::error::Error;
use meshweave_compiler::differentiate::{Optimizer, differentiate, differentiate_traced};
use meshweave_compiler::model::{DecoderConfig, Goal, GoldenSize, build_decoder};
use meshweave_compiler::partition::Keep;
use meshweave_compiler::pipeline::{assign, cut_evenly, scale_loss, slice_sequences};
use meshweave_compiler::schedule::{
    Builtin, Cause, Costs, Lowering, Placement, SearchOptions, Shape, Stages, build, definitions,
    from_definition, lower, search,
};
use meshweave_compiler::show::{ReportInput, report};
use meshweave_dsl::cluster::{Cluster, Host};
use meshweave_dsl::diagnostics::SourceId;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{Graph, Op, Role, TensorId};
use meshweave_dsl::layout::Mesh;
use meshweave_dsl::pipeline::PipelinePlan;
use meshweave_dsl::plan::Plan;
use meshweave_dsl::schedule::{Action, ActionKind, Schedule};
use meshweave_dsl::timeline::Category;
use meshweave_runtime::artifact;
use meshweave_runtime::executor::{Session, SessionOptions};
use meshweave_runtime::reference::{StepResult, Stepper, Value, golden_inputs, golden_tokens};
use meshweave_runtime::tensor::{Elements, HostTensor};
use proptest::prelude::*;

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

/// The pieces of a case, before they are compiled.
struct Divided {
    graph: Graph,
    plan: Plan,
    pipeline: PipelinePlan,
    cluster: Cluster,
}

impl Divided {
    fn compile(&self) -> Result<Compiled, Error> {
        let options = CompileOptions {
            keep: Keep::Gradients,
            ..CompileOptions::default()
        };
        compile_pipeline(
            &self.graph,
            &self.plan,
            &self.pipeline,
            &self.cluster,
            &options,
        )
    }
}

impl Case {
    fn new(n_layers: usize, batch: usize, tied: bool) -> Case {
        let size = GoldenSize {
            n_layers,
            batch,
            ..GoldenSize::named("tiny").unwrap()
        };
        Case::of(size, tied)
    }

    /// Of short sequences.
    fn small(n_layers: usize, batch: usize) -> Case {
        let size = GoldenSize {
            n_layers,
            batch,
            seq: 16,
            ..GoldenSize::named("tiny").unwrap()
        };
        Case::of(size, false)
    }

    fn of(size: GoldenSize, tied: bool) -> Case {
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
        let failures = self.compare(self.start(schedule, axes)).into_iter();
        failures
            .map(|failure| format!("{} on {axes:?}: {failure}", schedule.name))
            .collect()
    }

    /// Runs a step and compares.
    fn compare(&self, mut session: Session) -> Vec<String> {
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
    }

    fn compile(&self, schedule: &Schedule, axes: &[(&str, usize)]) -> Result<Compiled, Error> {
        self.divide(schedule, axes, &Optimizer::GOLDEN_ADAMW)
            .compile()
    }

    fn divide(
        &self,
        schedule: &Schedule,
        axes: &[(&str, usize)],
        optimizer: &Optimizer,
    ) -> Divided {
        let n_microbatches = schedule.n_microbatches;
        let batch = self.size.batch / n_microbatches;
        let forward = build_decoder(&self.config, batch, self.size.seq, Goal::Training).unwrap();
        let forward = scale_loss(&forward, n_microbatches).unwrap();
        let mesh = Mesh::new(axes.iter().copied());
        let cluster = Cluster::local(mesh.n_ranks(), &Host::nominal());
        let stages = cut_evenly(&forward, schedule.n_stages, &cluster).unwrap();
        let sliced = slice_sequences(&forward, schedule.n_slices).unwrap();
        let stages = sliced.stages(&stages);
        let (graph, origins) = differentiate_traced(&sliced.graph, optimizer).unwrap();
        let pipeline = PipelinePlan {
            mesh,
            axis: "pp".into(),
            batch: "batch".into(),
            parts: assign(&graph, &origins, &stages, &sliced.slice_of).unwrap(),
            schedule: schedule.clone(),
            lowered: None,
        };
        let preferences: &[(&str, &[&str])] = &[
            ("dp", &["batch"]),
            ("tp", &["heads", "ffn", "vocab"]),
            ("sp", &["heads", "ffn", "vocab", "seq"]),
            ("fsdp", &["batch", "vocab", "embed", "ffn", "heads"]),
        ];
        let plan = plans::preferring(&graph, &pipeline.stage_mesh(), preferences);
        Divided {
            graph,
            plan,
            pipeline,
            cluster,
        }
    }

    fn start(&self, schedule: &Schedule, axes: &[(&str, usize)]) -> Session {
        self.session(self.compile(schedule, axes).unwrap())
    }

    fn session(&self, compiled: Compiled) -> Session {
        let ranks = compiled.program.ranks.iter();
        let planned: Vec<usize> = ranks.map(|rank| rank.arena_bytes).collect();
        let kernels = artifact::load_kernels(&compiled.program, &compiled.kernels).unwrap();
        let mut session =
            Session::new(compiled.program, kernels, &SessionOptions::default()).unwrap();
        assert_eq!(
            session.arena_bytes(),
            planned,
            "the predicted peak is allocated"
        );
        self.give(&mut session);
        session
    }

    /// The golden batch.
    fn give(&self, session: &mut Session) {
        let size = &self.size;
        let (tokens, targets) = golden_tokens(size.batch, size.seq, size.vocab);
        for (name, data) in [("tokens", tokens), ("targets", targets)] {
            let ty = self.whole.ty(self.whole.find(name).unwrap()).clone();
            let value = HostTensor::new(ty, Elements::I32(data)).unwrap();
            session.set(name, &value).unwrap();
        }
    }
}

/// The built-in schedules that keep weights for the whole step.
fn executable() -> impl Iterator<Item = Builtin> {
    let others = [Builtin::PipeDream];
    Builtin::ALL
        .into_iter()
        .filter(move |builtin| !others.contains(builtin))
}

/// A built-in schedule with two chunks a rank where that can be chosen, and two slices a sequence.
fn built_in(builtin: Builtin, n_ranks: usize, n_microbatches: usize) -> Schedule {
    let shape = Shape::new(n_ranks, n_microbatches).chunks(2).slices(2);
    build(builtin, &builtin.fit(shape), None).unwrap()
}

/// Every built-in schedule on these axes beside the pipeline's.
fn check_all(case: &Case, n_ranks: usize, n_microbatches: usize, within: &[(&str, usize)]) {
    let axes: Vec<(&str, usize)> = [("pp", n_ranks)]
        .into_iter()
        .chain(within.to_vec())
        .collect();
    let failures: Vec<String> = executable()
        .flat_map(|builtin| case.check(&built_in(builtin, n_ranks, n_microbatches), &axes))
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Every built-in schedule on two and four ranks, alone, with data and with tensor parallelism: as
/// many layers as ranks, so that schedules of two chunks cut within layers.
mod every_built_in_schedule {
    use super::*;

    #[test]
    fn on_two_ranks() {
        check_all(&Case::new(2, 8, false), 2, 8, &[]);
    }

    #[test]
    fn on_two_ranks_with_data_parallelism() {
        check_all(&Case::new(2, 16, false), 2, 8, &[("dp", 2)]);
    }

    #[test]
    fn on_two_ranks_with_tensor_parallelism() {
        check_all(&Case::new(2, 8, false), 2, 8, &[("tp", 2)]);
    }

    #[test]
    fn on_four_ranks() {
        check_all(&Case::new(4, 8, false), 4, 8, &[]);
    }

    #[test]
    fn on_four_ranks_with_data_parallelism() {
        check_all(&Case::new(4, 16, false), 4, 8, &[("dp", 2)]);
    }

    #[test]
    fn on_four_ranks_with_tensor_parallelism() {
        check_all(&Case::new(4, 8, false), 4, 8, &[("tp", 2)]);
    }

    #[test]
    fn within_two_layers() {
        // Eight stages in two layers: cuts lie within blocks, several tensors pass at once.
        check_all(&Case::new(2, 8, false), 4, 8, &[]);
    }

    #[test]
    fn in_eight_layers() {
        let case = Case::new(8, 8, false);
        let failures: Vec<String> = executable()
            .filter(|builtin| builtin.fixed_chunks() != Some(1) || *builtin == Builtin::ZbH2)
            .flat_map(|builtin| case.check(&built_in(builtin, 4, 8), &[("pp", 4)]))
            .collect();
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }
}

#[test]
fn tied_embeddings_meet_in_the_first_stage() {
    let case = Case::new(2, 8, true);
    let schedules = [
        Builtin::OneFOneB,
        Builtin::ZbH1,
        Builtin::ZbV,
        Builtin::Chimera,
    ];
    for builtin in schedules {
        for within in [("dp", 1), ("tp", 2)] {
            let failures = case.check(&built_in(builtin, 2, 4), &[("pp", 2), within]);
            assert_eq!(failures, Vec::<String>::new());
        }
    }
}

#[test]
fn every_way_to_divide_a_stage() {
    let case = Case::new(2, 16, false);
    let schedule = built_in(Builtin::ZbH1, 2, 4);
    for within in [
        vec![("fsdp", 2)],
        vec![("sp", 2)],
        vec![("dp", 2), ("tp", 2)],
        vec![("fsdp", 2), ("sp", 2)],
    ] {
        let axes: Vec<(&str, usize)> = [("pp", 2)].into_iter().chain(within).collect();
        assert_eq!(case.check(&schedule, &axes), Vec::<String>::new());
    }
    // The pipeline's axis may stand anywhere in the mesh.
    assert_eq!(
        case.check(&schedule, &[("dp", 2), ("pp", 2)]),
        Vec::<String>::new()
    );
}

#[test]
fn gradients_accumulate_without_a_pipeline() {
    let case = Case::new(2, 8, false);
    for within in [("dp", 1), ("dp", 2), ("tp", 2)] {
        for n_microbatches in [1, 4] {
            let schedule = built_in(Builtin::OneFOneB, 1, n_microbatches);
            let failures = case.check(&schedule, &[("pp", 1), within]);
            assert_eq!(failures, Vec::<String>::new());
        }
    }
}

#[test]
fn the_published_losses() {
    const DENSE: [f64; 5] = [6.739996, 5.957613, 5.208904, 4.504258, 3.849025];
    let case = Case::new(2, 8, false);
    let mut session = case.start(&built_in(Builtin::ZbV, 2, 8), &[("pp", 2)]);
    for want in DENSE {
        session.step().unwrap();
        let got = session.loss().unwrap();
        assert!((got - want).abs() < 1e-4, "loss {got}, published {want}");
    }
}

/// Schedules that keep the microbatches of every stage in order give the same bits.
#[test]
fn sums_do_not_depend_on_the_schedule() {
    let case = Case::new(2, 8, false);
    let weights = |builtin| {
        let mut session = case.start(&built_in(builtin, 2, 4), &[("pp", 2)]);
        session.step().unwrap();
        session.step().unwrap();
        let get = |name: &str| session.get(name).unwrap().as_f32().unwrap().to_vec();
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        ["loss", "layers[0].attn.wq", "final.head"].map(|name| bits(get(name)))
    };
    let reference = weights(Builtin::GPipe);
    assert_eq!(weights(Builtin::OneFOneB), reference);
    // Chunked and split schedules divide the graph otherwise, and add within pieces alike.
    assert_eq!(weights(Builtin::ZbH1)[0], reference[0]);
}

/// What 1F1B holds does not grow with the microbatches; what GPipe holds does.
#[test]
fn memory_follows_the_schedule() {
    let case = Case::new(2, 8, false);
    let peak = |builtin, n_microbatches| {
        let session = case.start(&built_in(builtin, 2, n_microbatches), &[("pp", 2)]);
        session.arena_bytes()
    };
    let (gpipe, one) = (peak(Builtin::GPipe, 8), peak(Builtin::OneFOneB, 8));
    assert!(one[0] < gpipe[0] && one[1] < gpipe[1], "{one:?} {gpipe:?}");
    // The first rank holds one microbatch more than the last.
    let half = peak(Builtin::GPipe, 4);
    assert!(half[0] > gpipe[0] / 2, "{half:?} {gpipe:?}");
}

/// Between its forward and its backward, what a microbatch left rests outside of the arena.
#[test]
fn offloaded_activations_come_back() {
    let case = Case::new(4, 8, false);
    for (builtin, axes) in [
        (Builtin::GPipe, vec![("pp", 2)]),
        (Builtin::OneFOneB, vec![("pp", 2), ("dp", 2)]),
        (Builtin::Interleaved, vec![("pp", 2), ("tp", 2)]),
        (Builtin::ZbV, vec![("pp", 2)]),
        (Builtin::DualPipe, vec![("pp", 2)]),
        (Builtin::Seq1f1b, vec![("pp", 2)]),
    ] {
        let schedule = built_in(builtin, 2, 4);
        let lowering = Lowering {
            offloaded_stages: (0..schedule.stage_rank.len() as u32).collect(),
            ..Lowering::default()
        };
        let divided = |lowered| {
            let mut divided = case.divide(&schedule, &axes, &Optimizer::GOLDEN_ADAMW);
            divided.pipeline.lowered = lowered;
            case.session(divided.compile().unwrap())
        };
        let stays = divided(None).arena_bytes();
        let session = divided(Some(lower(&schedule, &lowering).unwrap()));
        let leaves = session.arena_bytes();
        let parked = session.program().channels.iter();
        assert!(parked.clone().any(|channel| channel.from == channel.to));
        if builtin == Builtin::GPipe {
            // All four microbatches of both stages wait for the first backward.
            assert!(
                leaves[0] < stays[0] && leaves[1] < stays[1],
                "{leaves:?} {stays:?}"
            );
        }
        assert_eq!(case.compare(session), Vec::<String>::new(), "{builtin:?}");
    }
}

#[test]
fn what_cannot_be_executed_is_refused() {
    let case = Case::new(2, 8, false);
    let schedule = build(Builtin::PipeDream, &Shape::new(2, 4), None).unwrap();
    let refused = case.compile(&schedule, &[("pp", 2)]).map(|_| ());
    let message = refused.unwrap_err().diagnostics[0].message.clone();
    assert!(message.contains("adamw, which counts steps"), "{message}");
    let forward = build_decoder(&case.config, 2, case.size.seq, Goal::Training).unwrap();
    let uneven = slice_sequences(&forward, 7).map(|_| ()).unwrap_err();
    assert!(
        uneven
            .to_string()
            .contains("sequences of 64 tokens do not divide into 7 slices"),
        "{uneven}"
    );
}

/// The graph of slices is that of whole sequences, before anything is divided or compiled.
#[test]
fn slices_add_up_to_the_whole() {
    let case = Case::small(2, 2);
    let (size, optimizer) = (&case.size, &Optimizer::GOLDEN_ADAMW);
    let forward = build_decoder(&case.config, size.batch, size.seq, Goal::Training).unwrap();
    for n_slices in [1, 2, 4, 8, 16] {
        let sliced = slice_sequences(&forward, n_slices).unwrap();
        let graph = differentiate(&sliced.graph, optimizer).unwrap();
        let inputs = golden_inputs(&graph, size.vocab).unwrap();
        let result = Stepper::new(&graph).unwrap().step(&inputs).unwrap();
        let (loss, truth) = (result.loss(), case.truth.loss());
        assert!(
            (loss - truth).abs() < 1e-9,
            "{n_slices} slices: {loss} {truth}"
        );
        for (param, gradient) in &case.truth.gradients {
            let name = &case.whole.tensor(*param).name;
            let own = graph.find(name).unwrap();
            let pairs = gradient.data().iter().zip(result.gradients[&own].data());
            let error = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(error < 1e-9, "{n_slices} slices: {name} differs by {error}");
        }
    }
}

/// Slices attend to the keys and values of those before them; the gradients of these are whole with
/// the first slice.
#[test]
fn sequences_are_sliced() {
    let case = Case::new(2, 8, false);
    for (builtin, n_slices) in [(Builtin::Seq1f1b, 4), (Builtin::TeraPipe, 8)] {
        let shape = Shape::new(2, 4).slices(n_slices);
        let schedule = build(builtin, &shape, None).unwrap();
        assert_eq!(case.check(&schedule, &[("pp", 2)]), Vec::<String>::new());
    }
    // With embeddings in two stages, and with input and weight gradients apart by keys of one's own.
    let tied = Case::new(2, 8, true);
    let schedule = built_in(Builtin::Seq1f1b, 2, 4);
    assert_eq!(tied.check(&schedule, &[("pp", 2)]), Vec::<String>::new());
    let text =
        "schedule split = key F:(mb*k+sl,1) I:(mb*k+k-1-sl+P-r+k-1,0) W:(mb*k+k-1-sl+P+k-1,2)";
    let document = meshweave_dsl::weave::parse(text, SourceId(0)).document;
    let definition = definitions(&document).next().unwrap();
    let shape = Shape::new(2, 4).slices(2);
    let folder = std::path::Path::new(".");
    let schedule = from_definition(definition, &shape, &[], folder).unwrap();
    assert_eq!(case.check(&schedule, &[("pp", 2)]), Vec::<String>::new());
}

/// A weight's gradient is one buffer, however many slices give to it.
#[test]
fn slices_share_gradients() {
    let case = Case::small(2, 8);
    let arena = |n_slices| {
        let schedule = build(Builtin::TeraPipe, &Shape::new(2, 4).slices(n_slices), None).unwrap();
        case.start(&schedule, &[("pp", 2)]).arena_bytes()
    };
    let (two, eight) = (arena(2), arena(8));
    let params = case.whole.params();
    let weights: usize = params.map(|id| case.whole.ty(id).n_bytes()).sum();
    for rank in 0..2 {
        // Six more buffers of half of the weights would be three times these.
        assert!(
            eight[rank] < two[rank] + weights / 2,
            "{eight:?} {two:?} {weights}"
        );
    }
}

/// PipeDream against the serial model that updates after every microbatch: a microbatch's gradient is
/// taken with the weights that each stage had at its forward, and applied to the newest.
#[test]
fn asynchronous_updates_use_the_versions_of_their_forwards() {
    const N_MICROBATCHES: usize = 8;
    let case = Case::new(2, 16, false);
    for (n_ranks, within) in [2, 4]
        .into_iter()
        .flat_map(|n_ranks| [("dp", 1), ("dp", 2), ("tp", 2)].map(|within| (n_ranks, within)))
    {
        let schedule = built_in(Builtin::PipeDream, n_ranks, N_MICROBATCHES);
        let axes = [("pp", n_ranks), within];
        let divided = case.divide(&schedule, &axes, &Optimizer::GOLDEN_SGD);
        let Divided {
            graph, pipeline, ..
        } = &divided;
        let home = |param: &TensorId| {
            let reads = |op: &&Op| op.inputs.contains(param);
            let op = graph.ops.iter().position(|op| reads(&op)).unwrap();
            pipeline.parts[op].stage as u32
        };
        // Versions that a stage has made when it begins a microbatch: backwards before its forward.
        let version = |stage: u32, microbatch: u32| {
            let row = &schedule.rows[schedule.stage_rank[stage as usize]];
            let forward = Action::new(stage, ActionKind::F, microbatch);
            let before = row.iter().take_while(|action| **action != forward);
            before.filter(|action| action.kind == ActionKind::B).count()
        };
        let mut stepper = Stepper::new(graph).unwrap();
        let mut history: BTreeMap<TensorId, Vec<Value>> = graph
            .params()
            .map(|param| (param, vec![stepper.sources()[&param].clone()]))
            .collect();
        let (tokens, targets) = golden_tokens(case.size.batch, case.size.seq, case.size.vocab);
        let mut loss = 0.0;
        for microbatch in 0..N_MICROBATCHES {
            for (param, versions) in &history {
                let seen = version(home(param), microbatch as u32);
                stepper.set(*param, versions[seen].clone());
            }
            let rows = case.size.batch / N_MICROBATCHES * case.size.seq;
            let inputs = [("tokens", &tokens), ("targets", &targets)].map(|(name, data)| {
                let id = graph.find(name).unwrap();
                let part = &data[microbatch * rows..(microbatch + 1) * rows];
                let values = part.iter().map(|x| f64::from(*x)).collect();
                (id, Value::new(graph.ty(id).clone(), values).unwrap())
            });
            let result = stepper.step(&inputs.into_iter().collect()).unwrap();
            loss += result.loss();
            for (param, gradient) in &result.gradients {
                let versions = history.get_mut(param).unwrap();
                let newest = versions.last().unwrap();
                let pairs = newest.data().iter().zip(gradient.data());
                let next = pairs.map(|(p, g)| p - 0.1 * g).collect();
                let next = Value::new(newest.ty().clone(), next).unwrap();
                versions.push(next);
            }
        }
        let mut session = case.session(divided.compile().unwrap());
        session.step().unwrap();
        let got = session.loss().unwrap();
        assert!((got - loss).abs() < TOLERANCE * loss, "{got} {loss}");
        for (param, versions) in &history {
            let name = &graph.tensor(*param).name;
            let (value, expected) = (session.get(name).unwrap(), versions.last().unwrap());
            let most = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0_f64, f64::max);
            let pairs = value.as_f32().unwrap().iter().zip(expected.data());
            let error = most(&mut pairs.map(|(got, want)| (f64::from(*got) - want).abs()));
            let scale = most(&mut expected.data().iter().map(|x| x.abs()));
            assert!(error < TOLERANCE * scale, "{name}: {error} of {scale}");
        }
    }
}

/// The example, as the command line runs it.
#[test]
fn the_example_gives_the_losses_of_one_device() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/pipeline.weave");
    let session = meshweave::session::Session::open(path.as_ref(), None).unwrap();
    let model = session.model().unwrap();
    let solution = session.plan(&model).unwrap();
    let options = CompileOptions::default();
    let compiled = session.compile(&model, &solution.plan, &options).unwrap();
    let kernels = artifact::load_kernels(&compiled.program, &compiled.kernels).unwrap();
    let mut execution =
        Session::new(compiled.program, kernels, &SessionOptions::default()).unwrap();
    let case = Case::new(2, 8, false);
    case.give(&mut execution);
    let timeline = execution.step().unwrap();
    let loss = execution.loss().unwrap();
    assert!(
        (loss - case.truth.loss()).abs() < TOLERANCE * loss,
        "{loss}"
    );
    let predicted = meshweave::report::predicted_timeline(execution.program());
    let shown = meshweave::report::Shown {
        session: &session,
        model: &model,
        solution: &solution,
        program: execution.program(),
    };
    let measured = Some(timeline.clone());
    let input = meshweave::report::report_input(&shown, None, measured, vec![loss]).unwrap();
    check_report(&input);
    for timeline in [predicted, timeline] {
        let labels: Vec<String> = timeline
            .actions(execution.program())
            .into_iter()
            .filter(|action| action.rank == 0 && action.label != "recv")
            .map(|action| action.label)
            .collect();
        let expected = "0F0 0F1 0I0 0F2 0W0 0I1 0F3 0W1 0I2 0W2 0I3 0W3 0U";
        let mut sorted: Vec<&str> = expected.split(' ').collect();
        sorted.sort_unstable();
        let mut found: Vec<&str> = labels.iter().map(String::as_str).collect();
        found.sort_unstable();
        assert_eq!(found, sorted);
    }
}

/// Everything in the report of the example is of the whole step on all ranks.
fn check_report(input: &ReportInput) {
    assert!(
        input.subtitle.contains("mesh pp:2 > dp:2, 8 sequences"),
        "{}",
        input.subtitle
    );
    let predicted_s = input.predicted.as_ref().unwrap().step_s();
    let bound_s = input.lower_bound_s.unwrap();
    // Two stages that a microbatch passes forward and backward: more than the work of one.
    let program = input.program.as_ref().unwrap();
    let peak = Cluster::local(4, &Host::nominal())
        .device
        .matmul_peak(DType::F32);
    let busiest_s = program.ranks.iter().map(|rank| {
        let products = rank.instructions.iter().filter(|instruction| {
            use meshweave_dsl::program::Action::{Attention, AttentionGrad, Contract};
            matches!(
                instruction.action,
                Contract { .. } | Attention { .. } | AttentionGrad { .. }
            )
        });
        products.map(|instruction| instruction.n_flops).sum::<f64>() / peak
    });
    let busiest_s = busiest_s.fold(0.0, f64::max);
    assert!(
        busiest_s < bound_s && bound_s < predicted_s,
        "{busiest_s} {bound_s} {predicted_s}"
    );
    let page = report(input);
    assert!(page.contains("512\u{a0}tokens a step"), "not of the batch");
    let [predicted, measured] = &input.grids[..] else {
        panic!("{} grids", input.grids.len());
    };
    for grid in [predicted, measured] {
        assert_eq!(grid.rows.len(), 4);
        for (row, rank) in grid.rows.iter().zip(&program.ranks) {
            // F, I and W of four microbatches, and the update.
            assert_eq!(row.actions.len(), 13);
            let most = rank.instructions.iter().map(|one| one.live_bytes).max();
            assert_eq!(row.peak, most.unwrap() as f64);
            let mut last_s = 0.0;
            for idle in &row.idle {
                assert!(last_s <= idle.span.start_s && idle.span.start_s < idle.span.end_s);
                last_s = idle.span.end_s;
            }
            assert!(last_s <= grid.step_s * (1.0 + 1e-9));
        }
    }
    // What is idle and what is busy are the whole step, where nothing else happens in between.
    let timeline = input.predicted.as_ref().unwrap();
    let idle_s: f64 = Cause::ALL.map(|cause| predicted.idle_s(cause)).iter().sum();
    let received_s = timeline.busy_s(Category::Message) / 4.0;
    let part = idle_s / predicted.step_s;
    assert!(
        timeline.idle_part() <= part + 1e-9
            && part <= timeline.idle_part() + received_s / predicted.step_s + 1e-9,
        "{part} {}",
        timeline.idle_part()
    );
    // The second stage waits for the first forward; measured, perhaps for its message alone.
    let first = [predicted, measured].map(|grid| grid.rows[2].idle.first().unwrap().cause);
    assert_eq!(first[0], Cause::Dependency);
    assert!([Cause::Dependency, Cause::Communication].contains(&first[1]));
}

/// Any order in which every action finds its operands made: a walk over the actions that are ready,
/// by a list of choices.
fn random_schedule(
    n_ranks: usize,
    n_stages: usize,
    n_microbatches: usize,
    choices: &[usize],
) -> Schedule {
    let mut choices = choices.iter().cycle();
    let mut choose = |n: usize| choices.next().map_or(0, |choice| choice % n);
    let stage_rank: Vec<usize> = (0..n_stages).map(|_| choose(n_ranks)).collect();
    let mut rows = vec![Vec::new(); n_ranks];
    let mut done: Vec<Action> = Vec::new();
    let mut todo: Vec<Action> = Vec::new();
    for stage in 0..n_stages as u32 {
        for microbatch in 0..n_microbatches as u32 {
            let kinds: &[ActionKind] = match choose(4) {
                0 => &[ActionKind::F, ActionKind::B],
                1 => &[ActionKind::F, ActionKind::R, ActionKind::B],
                _ => &[ActionKind::F, ActionKind::I, ActionKind::W],
            };
            todo.extend(
                kinds
                    .iter()
                    .map(|kind| Action::new(stage, *kind, microbatch)),
            );
        }
    }
    let is_ready = |action: &Action, done: &[Action], all: &[Action]| {
        use ActionKind::{B, F, I, R, W};
        let has = |kind| done.contains(&action.with_kind(kind));
        let gradient = |stage: u32| {
            let at = action.at_stage(stage);
            done.contains(&at.with_kind(B)) || done.contains(&at.with_kind(I))
        };
        let needs_r = all.contains(&action.with_kind(R));
        match action.kind {
            F => action.stage == 0 || done.contains(&action.at_stage(action.stage - 1)),
            R => has(F),
            W => has(I),
            B | I => {
                has(F)
                    && (has(R) || !needs_r)
                    && (action.stage as usize + 1 == n_stages || gradient(action.stage + 1))
            }
        }
    };
    while !todo.is_empty() {
        let ready: Vec<usize> = (0..todo.len())
            .filter(|idx| is_ready(&todo[*idx], &done, &todo))
            .collect();
        let action = todo.remove(ready[choose(ready.len())]);
        rows[stage_rank[action.stage as usize]].push(action);
        done.push(action);
    }
    Schedule::new("random", n_microbatches, stage_rank, rows)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn random_schedules_run(
        n_ranks in 2..4_usize,
        n_stages in 2..5_usize,
        n_microbatches in prop::sample::select(vec![1_usize, 2, 4]),
        choices in prop::collection::vec(0..1000_usize, 50),
    ) {
        static CASE: OnceLock<Case> = OnceLock::new();
        let case = CASE.get_or_init(|| Case::small(2, 4));
        let schedule = random_schedule(n_ranks, n_stages, n_microbatches, &choices);
        prop_assume!((0..n_ranks).all(|rank| schedule.stage_rank.contains(&rank)));
        prop_assert_eq!(case.check(&schedule, &[("pp", n_ranks)]), Vec::<String>::new());
    }
}
