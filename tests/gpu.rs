//! Whole training steps on a GPU that is not there: the GPU's executor with its streams, collectives
//! between ranks of one device and memory, and every kernel as PTX in an interpreter, against the
//! serial interpreter of the graph.

use std::path::Path;
use std::sync::Arc;

use meshweave::compile::{CompileOptions, Compiled, compile};
use meshweave::session::Session as Request;
use meshweave_compiler::partition::Keep;
use meshweave_compiler::schedule::{Builtin, Lowering, Shape, build, lower};
use meshweave_dsl::cluster::{Cluster, Host};
use meshweave_dsl::device_code::DeviceCode;
use meshweave_dsl::graph::{Graph, Role};
use meshweave_dsl::layout::Mesh;
use meshweave_dsl::plan::Plan;
use meshweave_dsl::program::Program;
use meshweave_dsl::timeline::Category;
use meshweave_dsl::weave::ast::{Block, Name, Statement};
use meshweave_runtime::artifact;
use meshweave_runtime::collective::Communicator;
use meshweave_runtime::collective::threads::{WaitOptions, World};
use meshweave_runtime::executor::{Session, SessionOptions};
use meshweave_runtime::reference::{Stepper, Value};
use meshweave_runtime::tensor::{Elements, HostTensor};

use crate::support::golden::{first_step, golden};
use crate::support::gpu::{Hub, Library, Simulated};
use crate::support::plans;

mod biases;
mod mixed;
mod processes;

/// Most difference from the oracle: of losses relative to them, of gradients and of parameters after
/// three steps relative to each tensor's greatest element.
#[derive(Clone, Copy, Default, Debug)]
struct Tolerance {
    losses: f64,
    tensors: f64,
}

/// In f32, against f64.
const F32: Tolerance = Tolerance {
    losses: 2e-5,
    tensors: 2e-5,
};

/// The program of a plan with its code, written to an artifact and read back.
fn compiled(graph: &Graph, plan: &Plan) -> (Program, DeviceCode) {
    let cluster = Cluster::local(plan.mesh.n_ranks(), &Host::nominal());
    through_artifact(&compile(graph, plan, &cluster, &options()).unwrap())
}

fn options() -> CompileOptions {
    options_for("sm_90")
}

fn options_for(target: &str) -> CompileOptions {
    CompileOptions {
        keep: Keep::Gradients,
        gpu: Some(target.into()),
        ..CompileOptions::default()
    }
}

fn through_artifact(compiled: &Compiled) -> (Program, DeviceCode) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("artifact");
    artifact::write_with_gpu(
        &path,
        &compiled.program,
        &compiled.kernels,
        "",
        compiled.code.as_ref(),
    )
    .unwrap();
    let (program, code) = artifact::load_gpu(&path).unwrap();
    assert_eq!(Some(&code), compiled.code.as_ref());
    (program, code)
}

/// All ranks on one device.
fn start(graph: &Graph, program: &Program, code: &DeviceCode, gpu: Simulated) -> Session {
    let planned: Vec<usize> = program.ranks.iter().map(|rank| rank.arena_bytes).collect();
    let options = SessionOptions::default();
    let mut session = Session::on_gpu(program.clone(), code, Box::new(gpu), &options).unwrap();
    assert_eq!(
        session.arena_bytes(),
        planned,
        "the predicted peak is allocated"
    );
    give_batch(graph, &mut session);
    session
}

fn give_batch(graph: &Graph, session: &mut Session) {
    let values = first_step(graph);
    for name in ["tokens", "targets"] {
        let id = graph.find(name).unwrap();
        let data = values[&id].data().iter().map(|x| *x as i32).collect();
        let value = HostTensor::new(graph.ty(id).clone(), Elements::I32(data)).unwrap();
        session.set(name, &value).unwrap();
    }
}

fn check(graph: &Graph, plan: &Plan, library: Library, seed: u64) {
    let (program, code) = compiled(graph, plan);
    let session = start(graph, &program, &code, Simulated::new(library, seed));
    check_steps(graph, session, F32);
}

/// Steps the program three times, the last one as a graph: losses, gradients and parameters against the
/// oracle.
fn check_steps(graph: &Graph, mut session: Session, tolerance: Tolerance) {
    let mut stepper = Stepper::new(graph).unwrap();
    let values = first_step(graph);
    let inputs = ["tokens", "targets"].map(|name| graph.find(name).unwrap());
    let inputs = inputs
        .into_iter()
        .map(|id| (id, values[&id].clone()))
        .collect();
    let mut failures = Vec::new();
    let mut found = Tolerance::default();
    for step in 0..3 {
        let truth = stepper.step(&inputs).unwrap();
        let timeline = session.step().unwrap();
        assert!(timeline.events.iter().all(|event| event.duration_s > 0.0));
        let compute = timeline.events.iter();
        assert!(
            compute
                .filter(|event| event.category == Category::Contract)
                .count()
                > 0
        );
        let loss = session.loss().unwrap();
        let error = (loss - truth.loss()).abs() / truth.loss();
        found.losses = found.losses.max(error);
        if error.is_nan() || error > tolerance.losses {
            failures.push(format!(
                "step {step}: loss {loss}, the oracle's is {}",
                truth.loss()
            ));
        }
        let mut compare = |name: &str, expected: &Value| {
            let value = session.get(name).unwrap();
            let most = |most: f64, x: f64| most.max(x.abs());
            let scale = expected.data().iter().copied().fold(0.0, most);
            let pairs = value.as_f32().unwrap().iter().zip(expected.data());
            let error = pairs
                .map(|(got, want)| f64::from(*got) - want)
                .fold(0.0, most)
                / scale;
            found.tensors = found.tensors.max(error);
            if error.is_nan() || error > tolerance.tensors {
                failures.push(format!("step {step}: {name}: relative error {error:e}"));
            }
        };
        if step == 0 {
            for (param, gradient) in &graph.gradients {
                compare(&graph.tensor(*gradient).name, &truth.gradients[param]);
            }
        }
        if step == 2 {
            for (id, value) in stepper.sources() {
                if matches!(graph.tensor(*id).role, Role::Param(_)) {
                    compare(&graph.tensor(*id).name, value);
                }
            }
        }
    }
    println!("greatest errors: {found:?}");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn plan(graph: &Graph, axes: &[(&str, usize)], preferences: &[(&str, &[&str])]) -> Plan {
    let mesh = Mesh::new(axes.iter().copied());
    plans::preferring(graph, &mesh, preferences)
}

#[test]
fn a_rank_alone() {
    let graph = golden(None, false);
    let plan = plan(&graph, &[("dp", 1)], &[]);
    check(&graph, &plan, Library::None, 1);
    check(&graph, &plan, Library::Products, 2);
}

#[test]
fn ranks_share_a_device() {
    const TP: &[&str] = &["heads", "ffn", "vocab", "seq"];
    let graph = golden(None, false);
    for (seed, (axes, preferences)) in [
        (&[("tp", 3)][..], &[("tp", TP)][..]),
        (
            &[("fsdp", 2)],
            &[("fsdp", &["embed", "ffn", "vocab", "batch"])],
        ),
        (&[("dp", 2), ("tp", 2)], &[("dp", &["batch"]), ("tp", TP)]),
    ]
    .into_iter()
    .enumerate()
    {
        let plan = plan(&graph, axes, preferences);
        check(&graph, &plan, Library::Products, seed as u64);
    }
}

#[test]
fn experts_share_a_device() {
    for capacity_factor in [2.0, 0.0] {
        let graph = golden(Some(capacity_factor), false);
        let plan = plan(&graph, &[("ep", 2)], &[("ep", &["expert", "batch"])]);
        check(&graph, &plan, Library::Products, 7);
    }
}

/// Missing waits are found: without them some order of the streams gives other values.
#[test]
fn a_random_plan_in_a_random_order() {
    let graph = golden(None, true);
    let plan = plans::random_plan(&graph, &Mesh::new([("dp", 2), ("tp", 2)]), 1);
    check(&graph, &plan, Library::Products, 11);
}

/// Each rank on a device of its own, as processes would be: losses and parameters have the bits of one
/// device, where the library's own reduction has the order of ranks too.
#[test]
fn ranks_on_devices_of_their_own() {
    const TP: &[&str] = &["heads", "ffn", "vocab", "seq"];
    let dense = golden(None, false);
    let experts = golden(Some(2.0), false);
    for (graph, axes, preferences) in [
        (&dense, &[("tp", 2)][..], &[("tp", TP)][..]),
        (
            &dense,
            &[("fsdp", 3)],
            &[("fsdp", &["embed", "ffn", "vocab", "batch"])],
        ),
        (&experts, &[("ep", 2)], &[("ep", &["expert", "batch"])]),
    ] {
        let plan = plan(graph, axes, preferences);
        let (program, code) = compiled(graph, &plan);
        check_apart(graph, &program, &code);
    }
}

/// Three steps on as many devices as there are ranks, which exchange by themselves or by their host, and
/// on one.
fn check_apart(graph: &Graph, program: &Program, code: &DeviceCode) {
    let mut whole = start(graph, program, code, Simulated::new(Library::Products, 3));
    for _ in 0..3 {
        whole.step().unwrap();
    }
    let n_ranks = program.ranks.len();
    for has_teams in [true, false] {
        let hub = Arc::new(Hub::default());
        let world = World::new(n_ranks, WaitOptions::for_threads(n_ranks));
        std::thread::scope(|scope| {
            for communicator in world.communicators() {
                let (hub, whole) = (hub.clone(), &whole);
                scope.spawn(move || {
                    let gpu = Simulated::with_peers(Library::Products, 5, hub);
                    let gpu = if has_teams { gpu } else { gpu.without_teams() };
                    let mut session = start_apart(graph, (program, code), gpu, communicator);
                    for _ in 0..3 {
                        session.step().unwrap();
                    }
                    assert_eq!(session.loss().unwrap(), whole.loss().unwrap());
                    for id in graph.params() {
                        let name = &graph.tensor(id).name;
                        let (here, there) = (session.get(name), whole.get(name));
                        assert_eq!(here.unwrap(), there.unwrap(), "{name}");
                    }
                });
            }
        });
    }
}

/// The communicator's rank, on a device of its own.
fn start_apart(
    graph: &Graph,
    (program, code): (&Program, &DeviceCode),
    gpu: Simulated,
    communicator: impl Communicator + 'static,
) -> Session {
    let (gpu, communicator) = (Box::new(gpu), Box::new(communicator));
    let options = SessionOptions::default();
    let session = Session::one_on_gpu(program.clone(), code, gpu, &options, communicator);
    let mut session = session.unwrap();
    give_batch(graph, &mut session);
    session
}

/// A rank that does not come to a step is named by those whose devices wait for it, with the instruction
/// that they have come to.
#[test]
fn a_rank_that_does_not_come_is_named() {
    let graph = golden(None, false);
    let plan = plan(&graph, &[("dp", 2)], &[("dp", &["batch"])]);
    let (program, code) = compiled(&graph, &plan);
    let (graph, program, code) = (&graph, &program, &code);
    let wait = WaitOptions {
        timeout: std::time::Duration::from_secs(5),
        ..WaitOptions::for_threads(2)
    };
    for has_teams in [true, false] {
        let hub = Arc::new(Hub::default());
        std::thread::scope(|scope| {
            for communicator in World::new(2, wait).communicators() {
                let hub = hub.clone();
                scope.spawn(move || {
                    let rank = communicator.rank();
                    let gpu = Simulated::with_peers(Library::Products, 5, hub);
                    let gpu = if has_teams { gpu } else { gpu.without_teams() };
                    let mut session = start_apart(graph, (program, code), gpu, communicator);
                    let slow = "1:1:0:slow=10".parse().unwrap();
                    session.rehearse(&slow).unwrap();
                    // The rank that was waited for hears of it when it comes.
                    let error = session.step().unwrap_err().to_string();
                    let said = "step 1 of this run on GPUs: rank 0 waited";
                    assert!(error.contains(said), "{error}");
                    let missing = "for rank 1, which did not arrive";
                    assert!(error.contains(missing), "{error}");
                    let place = "rank 0 has come to instruction";
                    assert_eq!(error.contains(place), rank == 0, "{error}");
                    assert_eq!(session.step().unwrap_err().to_string(), error);
                });
            }
        });
    }
}

/// Stages of a pipeline, which send each other messages: on one device, and on one each.
#[test]
fn stages_send_messages() {
    check_pipeline("zb-h1", "", "f32");
}

/// Activations that leave the arena between forward and backward.
#[test]
fn activations_rest_in_a_channel() {
    let gpipe = build(Builtin::GPipe, &Shape::new(2, 4), None).unwrap();
    let lowering = Lowering {
        offloaded_stages: vec![0, 1],
        ..Lowering::default()
    };
    let statement = lower(&gpipe, &lowering)
        .unwrap()
        .to_statement(Name::literal("mine"));
    let body = Block::of([Statement::Schedule(statement)]);
    let rows = meshweave_dsl::weave::print(&meshweave_dsl::weave::Document { body });
    let program = check_pipeline("mine", &rows, "f32");
    let mut channels = program.channels.iter();
    assert!(channels.any(|channel| channel.from == channel.to));
}

/// Three steps of a pipeline with a schedule, on one device and on one each.
fn check_pipeline(schedule: &str, definition: &str, dtype: &str) -> Program {
    let document = format!(
        "plan \"p\" model small cluster \"local:2\"\n\
        train batch 8 seq 8 steps 1 dtype {dtype} optimizer adamw\ndata golden\ninit golden\n\
        model small = llama {{\n  layers 2\n  embed 16\n  heads 4\n  kv_heads 2\n  ffn 24\n  vocab 40\n}}\n\
        mesh main = pp:2\n{definition}\
        pipeline main.pp {{\n  cut before layers[1]\n  schedule {schedule}\n  microbatches 4\n}}\n"
    );
    let request = Request::from_text("p.weave", &document, Path::new("."), None).unwrap();
    let model = request.model().unwrap();
    let solution = request.plan(&model).unwrap();
    let compiled = request.compile(&model, &solution.plan, &options()).unwrap();
    let (program, code) = through_artifact(&compiled);
    assert!(!program.channels.is_empty());
    let gpu = Simulated::new(Library::Products, 9);
    let session = start(model.whole(), &program, &code, gpu);
    let tolerance = match dtype {
        "f32" => F32,
        _ => mixed::BF16,
    };
    // What is offloaded rests with the host.
    let mut channels = program.channels.iter();
    let is_offloading = channels.any(|channel| channel.from == channel.to);
    assert_eq!(session.gpu().unwrap().host_bytes > 0, is_offloading);
    check_steps(model.whole(), session, tolerance);
    check_apart(model.whole(), &program, &code);
    program
}
