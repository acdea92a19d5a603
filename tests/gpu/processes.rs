//! Ranks as processes of an MPI job, each with a GPU that is not there, whose exchanges MPI makes.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use meshweave_dsl::graph::Graph;
use meshweave_runtime::artifact;
use meshweave_runtime::collective::mpi::MpiCommunicator;
use meshweave_runtime::executor::Session;
use meshweave_runtime::mpi::Mpi;

use super::{compiled, plan, start, start_apart};
use crate::processes::has_mpi;
use crate::support::golden::golden;
use crate::support::gpu::{Library, Simulated};

/// Where a process of the job finds its artifact.
const ARTIFACT: &str = "MESHWEAVE_TEST_ARTIFACT";

/// Where the first one leaves what it found.
const FOUND: &str = "found";

/// Three steps: the loss and the sum of each parameter, as bits.
fn three_steps(graph: &Graph, session: &mut Session) -> String {
    for _ in 0..3 {
        session.step().unwrap();
    }
    let mut found = format!("loss {:016x}\n", session.loss().unwrap().to_bits());
    for id in graph.params() {
        let name = &graph.tensor(id).name;
        let value = session.get(name).unwrap();
        let elements = value.as_f32().unwrap().iter();
        let sum: f64 = elements.map(|x| f64::from(*x)).sum();
        found += &format!("{name} {:016x}\n", sum.to_bits());
    }
    found
}

/// Three steps of processes have the bits of one device's.
#[test]
fn mpi_exchanges_for_devices() {
    if !has_mpi() {
        return;
    }
    const TP: &[&str] = &["heads", "ffn", "vocab", "seq"];
    let graph = golden(None, false);
    let plan = plan(&graph, &[("tp", 2)], &[("tp", TP)]);
    let (program, code) = compiled(&graph, &plan);
    let mut whole = start(
        &graph,
        &program,
        &code,
        Simulated::new(Library::Products, 3),
    );
    let expected = three_steps(&graph, &mut whole);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("artifact");
    artifact::write_with_gpu(&path, &program, &[], "", Some(&code)).unwrap();
    let output = Command::new("mpirun")
        .args(["-n", "2", "--oversubscribe"])
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "gpu::processes::a_process_of_the_job",
            "--ignored",
        ])
        .env(ARTIFACT, &path)
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    let found = std::fs::read_to_string(path.join(FOUND)).unwrap();
    assert_eq!(found, expected);
}

#[test]
#[ignore = "a process of the job that `mpi_exchanges_for_devices` starts"]
fn a_process_of_the_job() {
    let path = std::env::var(ARTIFACT).unwrap();
    let (program, code) = artifact::load_gpu(Path::new(&path)).unwrap();
    let mpi = Arc::new(Mpi::load().unwrap());
    let communicator = MpiCommunicator::new(mpi, Duration::from_secs(300)).unwrap();
    let gpu = Simulated::new(Library::Products, 5).without_teams();
    let graph = golden(None, false);
    let mut session = start_apart(&graph, (&program, &code), gpu, communicator);
    let found = three_steps(&graph, &mut session);
    if session.ranks() == [0] {
        std::fs::write(Path::new(&path).join(FOUND), found).unwrap();
    }
    session.finish().unwrap();
}
