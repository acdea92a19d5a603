//! A compiled program, started as its users start it.

use meshweave::compile::{CompileOptions, compile};
use meshweave_compiler::model::GoldenSize;
use meshweave_compiler::partition::Keep;
use meshweave_dsl::cluster::{Cluster, Host};
use meshweave_dsl::graph::Graph;
use meshweave_dsl::plan::Plan;
use meshweave_runtime::artifact;
use meshweave_runtime::executor::{Session, SessionOptions};
use meshweave_runtime::reference::golden_tokens;
use meshweave_runtime::tensor::{Elements, HostTensor};

/// A plan of the golden model of size `tiny`, compiled, written, read back and given its tokens, and its
/// targets where the graph has them.
pub fn start(graph: &Graph, plan: &Plan) -> Session {
    let cluster = Cluster::local(plan.mesh.n_ranks(), &Host::nominal());
    let options = CompileOptions {
        keep: Keep::Gradients,
        ..CompileOptions::default()
    };
    let compiled = compile(graph, plan, &cluster, &options).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("artifact");
    artifact::write(&path, &compiled.program, &compiled.kernels, "").unwrap();
    let (program, kernels) = artifact::load(&path).unwrap();
    assert_eq!(
        program, compiled.program,
        "an artifact holds what was written"
    );
    let planned: Vec<usize> = program.ranks.iter().map(|rank| rank.arena_bytes).collect();
    let mut session = Session::new(program, kernels, &SessionOptions::default()).unwrap();
    assert_eq!(
        session.arena_bytes(),
        planned,
        "the predicted peak is allocated"
    );
    let size = GoldenSize::named("tiny").unwrap();
    let (tokens, targets) = golden_tokens(size.batch, size.seq, size.vocab);
    assert!(graph.find("tokens").is_some());
    assert!(graph.gradients.is_empty() || graph.find("targets").is_some());
    for (name, data) in [("tokens", tokens), ("targets", targets)] {
        let Some(id) = graph.find(name) else { continue };
        let value = HostTensor::new(graph.ty(id).clone(), Elements::I32(data)).unwrap();
        session.set(name, &value).unwrap();
    }
    session
}
