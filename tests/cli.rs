//! The command line as a user meets it: a verified run, and messages for wrong inputs.

use std::path::Path;
use std::process::{Command, Output};

#[cfg(feature = "mlir")]
use meshweave::dsl::{placement::Placement, trace};

fn meshweave(args: &[&str], folder: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_meshweave"))
        .args(args)
        .current_dir(folder)
        .output()
        .unwrap()
}

#[test]
fn readers_that_stop_stop_no_command() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_meshweave"))
        .args("schedule show 1f1b --ranks 4 --microbatches 8".split(' '))
        .current_dir(folder.path())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

/// What `plan` says of a document, and its exit code.
fn complaint(text: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("plan.weave"), text).unwrap();
    let output = meshweave(&["plan", "plan.weave"], folder.path());
    let files = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(files, 1, "nothing is left behind");
    format!(
        "exit {}\n{}",
        output.status.code().unwrap(),
        String::from_utf8(output.stderr).unwrap()
    )
}

const HEAD: &str = "plan \"x\" model m cluster \"local:8\"\nmodel m = golden {\n  size tiny\n}\n";

#[test]
fn wrong_documents_are_refused_with_a_way_out() {
    let documents = [
        format!(
            "{HEAD}train batch 8 seq 64 optimizer adamw\nmesh main = tp:8\napply megatron(main.tp)\n"
        ),
        format!("{HEAD}train batch 8 seq 64 optimiser adamw\n"),
        format!(
            "{HEAD}train batch 8 seq 64 optimizer adamw\npin layers[*].atn.wq : [embed, heads]\n"
        ),
        format!("{HEAD}train batch 8 seq 64 optimizer adamw\nmesh main = dp:3\n"),
        format!(
            "{HEAD}train batch 8 seq 64 optimizer adamw\nmesh main = pp:2 > dp:rest\npipeline main.pp {{\n  microbatches auto{{3}}\n}}\n"
        ),
        "plan \"x\" model m cluster \"local:8\"\nmodel m = golden {\n  size tiny\n".to_string(),
    ];
    let complaints: Vec<String> = documents.iter().map(|text| complaint(text)).collect();
    insta::assert_snapshot!(complaints.join("\n----\n"));
}

#[test]
fn wrong_arguments_are_refused_with_a_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let document = format!("{HEAD}train batch 8 seq 64 optimizer adamw\n");
    std::fs::write(folder.path().join("plan.weave"), document).unwrap();
    std::fs::write(folder.path().join("empty.weave"), "# no cluster\n").unwrap();
    let complaints: Vec<String> = [
        ["run", "plan.weave", "--init", "random:abc"],
        ["plan", "plan.weave", "--cluster", "h10:8"],
        ["plan", "plan.weave", "--cluster", "absent.weave"],
        ["plan", "plan.weave", "--cluster", "empty.weave"],
    ]
    .iter()
    .map(|args| {
        let output = meshweave(args, folder.path());
        format!(
            "{}\nexit {}\n{}",
            args.join(" "),
            output.status.code().unwrap(),
            String::from_utf8(output.stderr).unwrap()
        )
    })
    .collect();
    insta::assert_snapshot!(complaints.join("\n----\n"));
}

#[test]
fn a_folder_that_is_no_artifact_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let output = meshweave(&["run", "."], folder.path());
    assert_eq!(output.status.code(), Some(1));
    insta::assert_snapshot!(String::from_utf8(output.stderr).unwrap());
}

/// The losses that a run prints.
#[cfg(feature = "mlir")]
fn losses(args: &[&str]) -> Vec<f64> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = meshweave(&[args, &["--format", "json"]].concat(), root);
    let complaint = String::from_utf8(output.stderr).unwrap();
    let result: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{complaint}"));
    let losses = result["losses"].as_array().unwrap().iter();
    losses.map(|loss| loss.as_f64().unwrap()).collect()
}

#[cfg(feature = "mlir")]
#[test]
fn a_recorded_trace_places_the_experts_of_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (routes, placement, again) = (path("a.parquet"), path("p.json"), path("b.parquet"));
    let example = "examples/folded-moe.weave";
    let before = losses(&["run", example, "--routes", &routes]);
    let published = [6.751000, 5.855239, 5.033547, 4.281944, 3.571185];
    for (got, want) in before.iter().zip(published) {
        assert!((got - want).abs() <= 1e-4, "{got} is not {want}");
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let place = [
        "place",
        &routes,
        "--devices",
        "4",
        "--per-node",
        "4",
        "-o",
        &placement,
    ];
    let output = meshweave(&place, root);
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{complaint}");
    let placed = std::fs::read_to_string(&placement).unwrap();
    let placed: Placement = serde_json::from_str(&placed).unwrap();
    // Experts move, in another way in each layer.
    let order = |layer: usize| placed.layer(layer).concat();
    assert!(order(0) != (0..8).collect::<Vec<u16>>() || order(1) != order(0));

    // The same model on other devices: the same losses and the same routes.
    let args = [
        "run",
        example,
        "--placement",
        &placement,
        "--routes",
        &again,
    ];
    for (got, want) in losses(&args).iter().zip(&before) {
        assert!((got - want).abs() <= 1e-5, "{got} is not {want}");
    }
    let (first, second) = (
        trace::file::read(Path::new(&routes)).unwrap(),
        trace::file::read(Path::new(&again)).unwrap(),
    );
    assert_eq!(first.n_tokens(), 5 * 8 * 64);
    let n_same = (0..first.n_tokens()).filter(|token| first.token(*token) == second.token(*token));
    assert!(n_same.count() > first.n_tokens() * 99 / 100);

    let place = [
        "place",
        &routes,
        "--devices",
        "2",
        "--per-node",
        "2",
        "-o",
        &placement,
    ];
    assert!(meshweave(&place, root).status.success());
    let refused = meshweave(&["run", example, "--placement", &placement], root);
    let complaint = String::from_utf8(refused.stderr).unwrap();
    assert!(
        complaint.contains("it is for 2 devices, the plan divides the experts of"),
        "{complaint}"
    );
}

#[cfg(feature = "mlir")]
#[test]
fn the_golden_example_runs_verified_and_reports() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report.html");
    let output = meshweave(
        &[
            "run",
            "examples/golden-tiny.weave",
            "--steps",
            "5",
            "--verify",
            "--report",
            report.to_str().unwrap(),
            "--format",
            "json",
        ],
        root,
    );
    let text = String::from_utf8(output.stdout).unwrap();
    let result: serde_json::Value = serde_json::from_str(&text).unwrap();
    let published = [6.739996, 5.957613, 5.208904, 4.504258, 3.849025];
    let losses: Vec<f64> = result["losses"]
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_f64().unwrap())
        .collect();
    assert_eq!(losses.len(), published.len());
    for (got, want) in losses.iter().zip(published) {
        assert!((got - want).abs() <= 1e-4, "{got} is not {want}");
    }
    for (name, error) in result["errors"].as_object().unwrap() {
        assert!(error.as_f64().unwrap() <= 1e-5, "{name}: {error}");
    }
    assert!(
        std::fs::read_to_string(report)
            .unwrap()
            .contains("golden-tiny")
    );
}

/// Without a GPU, the message says what was looked for and how to go on; nothing is planned first.
#[test]
fn without_a_gpu_the_way_out_is_named() {
    use meshweave::runtime::device::cuda::n_devices;
    if n_devices().is_ok_and(|n| n > 0) {
        eprintln!("skipped: this machine has a GPU");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let document = format!("{HEAD}train batch 8 seq 64 optimizer adamw\n");
    std::fs::write(folder.path().join("plan.weave"), document).unwrap();
    for args in [
        &["run", "plan.weave", "--backend", "cuda"][..],
        &["run", "plan.weave", "--backend", "cuda", "--device", "1"],
    ] {
        let output = meshweave(args, folder.path());
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(4), "{said}");
        assert!(said.contains("CUDA driver"), "{said}");
        assert!(said.contains("--backend threads"), "{said}");
    }
}

#[cfg(feature = "mlir")]
#[test]
fn targets_that_do_not_exist_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let document = format!("{HEAD}train batch 8 seq 64 optimizer adamw\n");
    std::fs::write(folder.path().join("plan.weave"), document).unwrap();
    let args = ["compile", "plan.weave", "--out", "x", "--target", "sm_90"];
    let output = meshweave(&args, folder.path());
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("there is no target `sm_90`"), "{said}");
    assert!(
        said.contains("cuda:sm_90, cuda:sm_90a, cuda:sm_100"),
        "{said}"
    );
}

/// Traces and placements that do not fit say with which figures, and what to do.
#[test]
fn what_cannot_be_placed_is_refused_with_a_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let said = |args: &[&str]| {
        let output = meshweave(args, folder.path());
        let text = [output.stdout, output.stderr].concat();
        String::from_utf8(text).unwrap()
    };
    let synth = "trace synth --layers 3 --experts 8 --tokens 500 -o routes.parquet";
    said(&synth.split(' ').collect::<Vec<_>>());
    let place = |flags: &str| -> String {
        let line = format!("place routes.parquet {flags}");
        said(&line.split(' ').collect::<Vec<_>>())
    };
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/mixtral-8x22b");
    for (flags, expected) in [
        (
            "--devices 3".to_string(),
            "8 experts do not divide over 3 devices; give --slots 3",
        ),
        (
            "--devices 2 --slots 0".to_string(),
            "devices without slots hold no experts; give 4 slots",
        ),
        (
            "--devices 2 --slots 3".to_string(),
            "2 devices with 3 slots hold 6 experts, a layer has 8; give 4 slots",
        ),
        (
            format!("--devices 2 --model {model}"),
            "the trace has 3 layers of 8 experts, top-1; `mixtral` has 56 layers of 8, top-2",
        ),
    ] {
        let found = place(&flags);
        assert!(found.contains(expected), "{flags}: {found}");
    }
    // Experts that no token chose are placed, and counted.
    let loads = r#"{"logical_count": [[5, 0, 3, 4], [1, 1, 0, 0]]}"#;
    std::fs::write(folder.path().join("loads.json"), loads).unwrap();
    let found = said(&[
        "place",
        "loads.json",
        "--devices",
        "2",
        "--objective",
        "load",
    ]);
    assert!(found.contains("3 experts were never chosen"), "{found}");
    // Decoding asks for a placement of the same devices, and for tokens enough.
    let decode = "trace decode routes.parquet --devices 3";
    let found = said(&decode.split(' ').collect::<Vec<_>>());
    assert!(
        found.contains("8 experts do not divide over 3 devices"),
        "{found}"
    );
    let decode = "trace decode routes.parquet --devices 4";
    let found = said(&decode.split(' ').collect::<Vec<_>>());
    assert!(
        found.contains("has 500 tokens, 64 steps of 16 sequences need more"),
        "{found}"
    );
    let decode = "trace decode routes.parquet --devices 4 --batch 4 --seq 20 --steps 20";
    let found = said(&decode.split(' ').collect::<Vec<_>>());
    assert!(found.contains("features   differ by"), "{found}");
}
