//! Runs of the command line whose experts have replicas.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

const MODEL: &str = "plan \"replicas\" model m cluster \"local:4\"\n\
    model m = llama {\n  layers 2 embed 32 heads 4 ffn 48 vocab 64\n  experts 8 topk 2 capacity 0\n}\n";
const MESHES: &str = "mesh main = dp:2 > tp:2\nmesh moe = ep:4 refolds main\nuse main on *\n\
    use moe on layers[*].moe.experts\napply dp(dp)\napply megatron(tp)\napply ep(ep)\n";

struct Folder(tempfile::TempDir);

impl Folder {
    /// A folder with the routes of four steps, and placements by their load.
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        folder.document("plain.weave", &format!("{MODEL}{}{MESHES}", job("train")));
        folder.json(&[
            "run",
            "plain.weave",
            "--steps",
            "4",
            "--routes",
            "routes.parquet",
        ]);
        for (slots, name) in [("2", "two.json"), ("3", "three.json")] {
            let mut args = vec!["place", "routes.parquet", "--devices", "4", "--objective"];
            args.extend(["load", "--slots", slots, "--held-out", "0", "-o", name]);
            if slots == "3" {
                args.extend(["--shares", "shares.json"]);
            }
            folder.json(&args);
        }
        folder
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn document(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_meshweave"));
        command
            .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
            .args(["--format", "json"])
            .args(args)
            .current_dir(self.0.path());
        command.output().unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.run(args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {error}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn error(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(!output.status.success(), "{args:?}");
        let text = [output.stdout, output.stderr].concat();
        String::from_utf8(text).unwrap()
    }

    /// What the routes of a run are.
    fn routes(&self, name: &str) -> Vec<u8> {
        std::fs::read(Path::new(&self.path(name))).unwrap()
    }
}

fn job(job: &str) -> String {
    let rest = if job == "train" {
        " optimizer adamw"
    } else {
        ""
    };
    format!("{job} batch 8 seq 32{rest}\n")
}

fn numbers(value: &Value) -> Vec<f64> {
    let all = value.as_array().unwrap().iter();
    all.map(|one| one.as_f64().unwrap()).collect()
}

fn same_losses(a: &Value, b: &Value) {
    let (a, b) = (numbers(&a["losses"]), numbers(&b["losses"]));
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(&b) {
        assert!((a - b).abs() < 1e-5 * a, "{a} against {b}");
    }
}

fn with_placement<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec![
        "run",
        "plain.weave",
        "--steps",
        "4",
        "--placement",
        "three.json",
    ];
    args.extend(more);
    args
}

#[test]
fn replicas_even_the_loads_and_leave_the_losses() {
    let folder = Folder::new();
    let plain = folder.json(&["run", "plain.weave", "--steps", "4"]);
    assert!(plain["placed"].is_null());
    let args = with_placement(&[
        "--shares",
        "shares.json",
        "--verify",
        "--routes",
        "again.parquet",
    ]);
    let with = folder.json(&args);
    same_losses(&plain, &with);
    for (name, error) in with["errors"].as_object().unwrap() {
        assert!(error.as_f64().unwrap() < 1e-5, "{name}: {error}");
    }
    // Routes are recorded by the model's own numbers.
    assert_eq!(
        folder.routes("routes.parquet"),
        folder.routes("again.parquet")
    );
    let placed = &with["placed"];
    let loads = numbers(&placed["greatest_load"]["measured"]);
    // The shares were made of these very tokens; turns are whole.
    assert!(loads[1] < 1.05 && loads[1] < loads[0], "{loads:?}");
    let kept = numbers(&placed["kept"]["measured"]);
    assert!(
        kept.iter().all(|kept| (0.0..=1.0).contains(kept)),
        "{kept:?}"
    );
    assert!(placed["copies"].as_u64().unwrap() > 0);
    assert!(placed["moved_bytes"]["measured"].as_u64().unwrap() > 0);
    // Step by step the same: weights to the copies and gradients back.
    let copied = numbers(&with["copied_bytes"]["measured"]);
    assert!(
        copied[0] > 0.0 && copied.iter().all(|bytes| *bytes == copied[0]),
        "{copied:?}"
    );
    assert_eq!(
        with["memory_bytes"]["predicted"],
        with["memory_bytes"]["measured"][0]
    );
    let dispatched = numbers(&with["dispatched_bytes"]["measured"]);
    assert!(
        dispatched.iter().all(|bytes| *bytes > 0.0),
        "{dispatched:?}"
    );

    // Without replicas, the loads are no worse than with experts in order, and nothing is copied.
    let args = [
        "run",
        "plain.weave",
        "--steps",
        "4",
        "--placement",
        "two.json",
    ];
    let moved = folder.json(&args);
    same_losses(&plain, &moved);
    let without = numbers(&moved["placed"]["greatest_load"]["measured"]);
    assert!(
        without[0] == loads[0] && without[1] <= without[0],
        "{without:?}"
    );
    assert!(
        moved["copied_bytes"]["measured"]
            .as_array()
            .unwrap()
            .is_empty()
    );

    // The document itself may say so; equal parts become better ones between steps.
    let block = "experts {\n  placement load trace \"routes.parquet\" slots 3\n}\n";
    folder.document(
        "said.weave",
        &format!("{MODEL}{}{MESHES}{block}", job("train")),
    );
    let said = folder.json(&["run", "said.weave", "--steps", "4"]);
    same_losses(&plain, &said);
    assert!(said["placed"]["copies"].as_u64().unwrap() > 0);
    // Plans are of the graph with replicas, and artifacts run by themselves.
    folder.json(&["plan", "said.weave", "-o", "planned.weave"]);
    folder.json(&["verify", "planned.weave"]);
    same_losses(
        &plain,
        &folder.json(&["run", "planned.weave", "--steps", "4"]),
    );
    folder.json(&["compile", "said.weave", "-o", "artifact"]);
    same_losses(&plain, &folder.json(&["run", "artifact", "--steps", "4"]));
    let shared = folder.json(&with_placement(&["--rebalance", "2"]));
    same_losses(&plain, &shared);
    for pair in shared["rebalanced"]["balancedness"]["measured"]
        .as_array()
        .unwrap()
    {
        let pair = numbers(pair);
        assert!(pair[1] >= pair[0] - 1e-2, "{pair:?}");
    }
}

#[test]
fn replicas_infer_and_run_in_pipelines() {
    let folder = Folder::new();
    folder.document("infer.weave", &format!("{MODEL}{}{MESHES}", job("infer")));
    let args = [
        "run",
        "infer.weave",
        "--placement",
        "three.json",
        "--verify",
    ];
    let result = folder.json(&args);
    for (name, error) in result["errors"].as_object().unwrap() {
        assert!(error.as_f64().unwrap() < 1e-5, "{name}: {error}");
    }
    let pipeline = "mesh main = pp:2 > dp:2 > tp:2\nmesh moe = pp:same > ep:4 refolds main\n\
        use main on *\nuse moe on layers[*].moe.experts\napply dp(dp)\napply megatron(tp)\n\
        apply ep(ep)\npipeline main.pp {\n  microbatches 2\n}\n";
    let model = MODEL.replace("local:4", "local:8");
    folder.document("piped.weave", &format!("{model}{}{pipeline}", job("train")));
    let plain = folder.json(&["run", "plain.weave", "--steps", "3"]);
    let args = [
        "run",
        "piped.weave",
        "--steps",
        "3",
        "--placement",
        "three.json",
    ];
    let piped = folder.json(&args);
    same_losses(&plain, &piped);
    assert!(piped["placed"]["copies"].as_u64().unwrap() > 0);
    assert!(piped["placed"]["greatest_load"]["measured"].is_null());
}

#[test]
fn processes_have_the_replicas_of_threads() {
    if Command::new("mpirun").arg("--version").output().is_err() {
        eprintln!("skipped: no mpirun on this machine");
        return;
    }
    let folder = Folder::new();
    let flags = ["--shares", "shares.json", "--rebalance", "2", "--routes"];
    let threads = folder.json(&with_placement(&[&flags[..], &["a.parquet"]].concat()));
    let mpi = ["b.parquet", "--backend", "mpi"];
    let processes = folder.json(&with_placement(&[&flags[..], &mpi].concat()));
    assert_eq!(folder.routes("a.parquet"), folder.routes("b.parquet"));
    for key in [
        "losses",
        "placed",
        "rebalanced",
        "dispatched_bytes",
        "copied_bytes",
    ] {
        assert_eq!(threads[key], processes[key], "{key}");
    }
}

#[test]
fn placements_that_do_not_fit_are_named() {
    let folder = Folder::new();
    let refused = |args: &[&str], expected: &[&str]| {
        let error = folder.error(args);
        for part in expected {
            assert!(error.contains(part), "{part}: {error}");
        }
    };
    let shares = [
        "run",
        "plain.weave",
        "--placement",
        "two.json",
        "--shares",
        "shares.json",
    ];
    refused(&shares, &["shares the loads of replicas", "has none"]);
    let wide = [
        "place",
        "routes.parquet",
        "--devices",
        "2",
        "--objective",
        "load",
    ];
    refused(
        &[&wide[..], &["--slots", "9"]].concat(),
        &["9 slots", "8 experts"],
    );
    folder.json(&[&wide[..], &["--slots", "5", "-o", "other.json"]].concat());
    let other = ["run", "plain.weave", "--placement", "other.json"];
    refused(&other, &["it is for 2 devices", "over 4"]);
    let twice =
        r#"{"devices":4,"per_node":4,"physical_to_logical_map":[[0,1,1,2,3,4,5,6,7,0,2,3]]}"#;
    folder.document("twice.json", twice);
    let twice = ["run", "plain.weave", "--placement", "twice.json"];
    refused(&twice, &["device 0 holds expert 1 twice in layer 0"]);
    let budget = "memory {\n  budget 1 MiB\n}\n";
    folder.document(
        "small.weave",
        &format!("{MODEL}{}{MESHES}{budget}", job("train")),
    );
    let small = ["run", "small.weave", "--placement", "three.json"];
    refused(
        &small,
        &[
            "1.0 MiB is available",
            "3 slots a device",
            "place with fewer slots",
        ],
    );
}
