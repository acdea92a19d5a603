//! Inference whose tokens stand with their experts: the logits of the usual two exchanges a layer with
//! one, and what crosses ranks.

use meshweave::compile::{CompileOptions, compile};
use meshweave::session::Session;
use meshweave_dsl::cluster::{Cluster, Host};
use meshweave_dsl::graph::Graph;
use meshweave_dsl::layout::Mesh;
use meshweave_dsl::plan::Plan;
use meshweave_dsl::program::Program;
use meshweave_dsl::timeline::Timeline;
use meshweave_runtime::artifact;
use meshweave_runtime::executor::{Session as Execution, SessionOptions};
use meshweave_runtime::reference::{Stepper, golden_inputs, golden_tokens};
use meshweave_runtime::tensor::{Elements, HostTensor};

use crate::support::plans;

const LAYERS: usize = 3;
const VOCAB: usize = 64;

type Preferences = Vec<(&'static str, &'static [&'static str])>;

fn document(top_k: usize, exchanges: &str, more: &str) -> String {
    format!(
        "plan \"coherent\" model decoder cluster \"local:4\"\n\
         infer batch 4 seq 16\n\
         model decoder = llama {{\n  layers {LAYERS} embed 32 heads 4 kv_heads 2 ffn 48 vocab {VOCAB}\n  \
         experts 8 topk {top_k} capacity 0 {more}\n}}\n\
         mesh main = ep:4\n\
         apply travel(ep)\n\
         experts {{\n  exchanges {exchanges}\n}}\n"
    )
}

fn session(text: &str) -> Session {
    let folder = std::path::Path::new(".");
    Session::from_text("plan.weave", text, folder, None).unwrap()
}

/// The logits of one step, with its program and what was measured.
fn run(graph: &Graph, plan: &Plan) -> (Vec<f32>, Program, Timeline) {
    let cluster = Cluster::local(plan.mesh.n_ranks(), &Host::nominal());
    let compiled = compile(graph, plan, &cluster, &CompileOptions::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("artifact");
    artifact::write(&path, &compiled.program, &compiled.kernels, "").unwrap();
    let (program, kernels) = artifact::load(&path).unwrap();
    let mut execution = Execution::new(program, kernels, &SessionOptions::default()).unwrap();
    let tokens = graph.find("tokens").unwrap();
    let ty = graph.ty(tokens).clone();
    let [batch, seq] = ["batch", "seq"].map(|dim| ty.size_of(&dim.into()).unwrap());
    let (data, _) = golden_tokens(batch, seq, VOCAB);
    let value = HostTensor::new(ty, Elements::I32(data)).unwrap();
    execution.set("tokens", &value).unwrap();
    execution.step().unwrap();
    // What the first step leaves behind must not show in the second.
    let timeline = execution.step().unwrap();
    let logits = execution.get(&graph.tensor(graph.outputs[0]).name).unwrap();
    (
        logits.as_f32().unwrap().to_vec(),
        execution.program().clone(),
        timeline,
    )
}

/// The document's own plan, run.
fn planned(text: &str) -> (Vec<f32>, Program, Timeline) {
    let session = session(text);
    let model = session.model().unwrap();
    let solution = session.plan(&model).unwrap();
    run(&model.graph, &solution.plan)
}

fn reference(text: &str) -> Vec<f64> {
    let graph = session(text).model().unwrap().graph;
    let mut stepper = Stepper::new(&graph).unwrap();
    let result = stepper
        .step(&golden_inputs(&graph, VOCAB).unwrap())
        .unwrap();
    result.outputs[0].data().to_vec()
}

fn greatest_error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let pairs = got.iter().zip(want);
    pairs
        .map(|(got, want)| (f64::from(*got) - want).abs())
        .fold(0.0, f64::max)
}

#[test]
fn both_graphs_are_one_function() {
    for (top_k, more) in [
        (1, ""),
        (2, ""),
        (3, "shared_ffn 24"),
        (2, "router sigmoid"),
    ] {
        let two = reference(&document(top_k, "two", more));
        let one = reference(&document(top_k, "one", more));
        let error = one.iter().zip(&two).map(|(a, b)| (a - b).abs());
        let error = error.fold(0.0, f64::max);
        assert!(error < 1e-12, "top {top_k} {more}: {error:e}");
    }
}

#[test]
fn any_division_computes_the_logits() {
    for top_k in [1, 2] {
        let text = document(top_k, "one", "");
        let (graph, want) = (session(&text).model().unwrap().graph, reference(&text));
        let prefer: [(Mesh, Preferences); 3] = [
            (Mesh::new([("ep", 4)]), vec![("ep", &["expert", "batch"])]),
            (
                Mesh::new([("dp", 2), ("ep", 2)]),
                vec![("dp", &["batch"]), ("ep", &["expert", "batch"])],
            ),
            (
                Mesh::new([("ep", 2), ("tp", 2)]),
                vec![
                    ("ep", &["expert", "batch"]),
                    ("tp", &["heads", "ffn", "embed"]),
                ],
            ),
        ];
        let preferred = prefer
            .iter()
            .map(|(mesh, axes)| plans::preferring(&graph, mesh, axes));
        let random =
            (0..3).map(|seed| plans::random_plan(&graph, &Mesh::new([("a", 2), ("b", 2)]), seed));
        for plan in preferred.chain(random) {
            let (logits, ..) = run(&graph, &plan);
            let error = greatest_error(&logits, &want);
            assert!(error < 1e-5, "top {top_k} on {}: {error:e}", plan.mesh);
        }
    }
}

#[test]
fn one_exchange_gives_the_logits_of_two() {
    for top_k in [1, 2] {
        let (want, usual, before) = planned(&document(top_k, "two", ""));
        let (logits, program, after) = planned(&format!(
            "{}pin final.home : [batch/ep]\n",
            document(top_k, "one", "")
        ));
        let want: Vec<f64> = want.into_iter().map(f64::from).collect();
        let greatest = want.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
        // Products over an expert's rows add up in another order than those over whole sequences.
        let error = greatest_error(&logits, &want) / greatest;
        assert!(error < 1e-6, "top {top_k}: {error:e}");
        assert_eq!(usual.n_token_exchanges(), 2 * LAYERS);
        // To every layer's experts; with several of them, back to the first; and home at the end.
        let n_exchanges = if top_k == 1 {
            LAYERS + 1
        } else {
            2 * LAYERS + 1
        };
        assert_eq!(program.n_token_exchanges(), n_exchanges, "top {top_k}");
        let (tokens, context) = (
            after.dispatched_bytes(&program).unwrap(),
            after.context_bytes(&program).unwrap(),
        );
        assert!(tokens < before.dispatched_bytes(&usual).unwrap());
        assert_eq!(before.context_bytes(&usual), None);
        // Of every token, to the three other ranks: keys and values of the layers in which tokens stand
        // with their experts, and the choices and gates of every layer.
        let (n_tokens, kv) = (4 * 16, 2 * 2 * 8);
        let routes = 2 * top_k * (LAYERS - 1);
        assert_eq!(
            context,
            (3 * 4 * n_tokens * (kv * (LAYERS - 1) + routes)) as u64
        );
    }
}
