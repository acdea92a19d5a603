//! Ranks that are processes of an MPI job against ranks that are threads, and runs that go on from
//! checkpoints. Where no MPI is installed, its tests say so and check nothing.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn meshweave() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_meshweave"));
    // Tests may run as root in containers; Open MPI wants to be told twice.
    command
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .args(["--format", "json"]);
    command
}

fn run(args: &[&str]) -> Output {
    meshweave().args(args).output().unwrap()
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).unwrap_or_else(|error| {
        let complaint = String::from_utf8_lossy(&output.stderr);
        panic!("{error}: {text}\n{complaint}")
    })
}

/// The bits of the losses of a run that ends well.
fn losses(args: &[&str]) -> Vec<u64> {
    losses_of(&run(args))
}

fn losses_of(output: &Output) -> Vec<u64> {
    let result = json(output);
    assert!(output.status.success(), "{result}");
    let losses = result["losses"].as_array().unwrap().iter();
    losses
        .map(|loss| loss.as_f64().unwrap().to_bits())
        .collect()
}

fn exists(launcher: &str) -> bool {
    Command::new(launcher).arg("--version").output().is_ok()
}

pub(crate) fn has_mpi() -> bool {
    if !exists("mpirun") {
        eprintln!("skipped: no mpirun on this machine");
    }
    exists("mpirun")
}

struct Case {
    folder: tempfile::TempDir,
}

impl Case {
    fn new() -> Case {
        Case {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// An artifact of the tiny golden model; `tail` holds the mesh and what is applied to it.
    fn compile(&self, name: &str, n_ranks: usize, model: &str, tail: &str) -> String {
        let document = format!(
            "plan \"{name}\" model m cluster \"local:{n_ranks}\"\n\
             train batch 8 seq 64 steps 6 optimizer adamw\ndata golden\ninit golden\n\
             model m = golden {{\n  size tiny\n  {model}\n}}\n{tail}\n"
        );
        let path = self.path(&format!("{name}.weave"));
        std::fs::write(&path, document).unwrap();
        let artifact = self.text(name);
        let output = run(&["compile", path.to_str().unwrap(), "--out", &artifact]);
        let complaint = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{complaint}");
        artifact
    }
}

const TP_DP: &str = "mesh main = dp:2 > tp:2\napply dp(dp)\napply megatron(tp)";
const PP_DP: &str = "mesh main = pp:2 > dp:2\npipeline main.pp {\n  cut before layers[1]\n  \
                     schedule zb-h1\n  microbatches 2\n}\napply dp(dp)";

#[test]
fn processes_give_the_bits_of_threads() {
    if !has_mpi() {
        return;
    }
    let case = Case::new();
    let plans = [
        ("tp2-dp2", 4, "", TP_DP),
        ("pp2-dp2", 4, "", PP_DP),
        (
            "ep2-dp2",
            4,
            "capacity 2",
            "mesh main = dp:2 > ep:2\napply dp(dp)\napply ep(ep)",
        ),
        // The rows that tokens fill, counted and sent.
        (
            "ep4-dropless",
            4,
            "capacity 0",
            "mesh main = ep:4\napply ep(ep)",
        ),
        (
            "tp4-dp2",
            8,
            "",
            "mesh main = dp:2 > tp:4\napply dp(dp)\napply megatron(tp)\napply zero(1, dp)",
        ),
    ];
    for (name, n_ranks, model, tail) in plans {
        let artifact = case.compile(name, n_ranks, model, tail);
        let threads = losses(&["run", &artifact, "--steps", "4"]);
        let n = n_ranks.to_string();
        let processes = [
            "run",
            &artifact,
            "--steps",
            "4",
            "--backend",
            "mpi",
            "-n",
            &n,
        ];
        assert_eq!(losses(&processes), threads, "{name}");
    }
}

#[test]
fn a_rank_that_stops_is_named_and_the_run_goes_on_from_its_checkpoint() {
    if !has_mpi() {
        return;
    }
    let case = Case::new();
    let artifact = case.compile("tp2-dp2", 4, "", TP_DP);
    let whole = losses(&["run", &artifact, "--steps", "6"]);
    for (drill, named) in [
        ("2:4:30:stop", "rank 2 gave no sign of life"),
        ("1:4:30:slow=60", "rank 1 gave no sign of life"),
        ("3:4:30:diverge", "ranks have diverged"),
    ] {
        let kept = case.text(&drill.replace(':', "-"));
        let common = [
            "run",
            &artifact,
            "--backend",
            "mpi",
            "--checkpoint",
            &kept,
            "--every",
            "1",
        ];
        let failing = ["--steps", "6", "--timeout", "6", "--drill", drill];
        let output = run(&[&common[..], &failing].concat());
        let error = json(&output)["error"].to_string();
        assert_eq!(output.status.code(), Some(4), "{error}");
        assert!(error.contains(named), "{drill}: {error}");
        if !drill.ends_with("diverge") {
            // The statements of the document about the axes of the call, with their lines.
            assert!(
                error.contains("mesh main = dp:2 > tp:2` (tp2-dp2.weave:9)"),
                "{error}"
            );
        }
        let resumed = losses(&[&common[..], &["--steps", "3", "--resume", &kept]].concat());
        // The checkpoint of step 3 was perhaps still being written.
        let goes_on = (2..=3).any(|step| resumed == whole[step..step + 3]);
        assert!(goes_on, "{drill}: {resumed:?} of {whole:?}");
    }
}

#[test]
fn a_rank_that_stops_before_it_joins_its_groups_is_named() {
    if !has_mpi() {
        return;
    }
    let case = Case::new();
    let artifact = case.compile("tp2-dp2", 4, "", TP_DP);
    let output = run(&[
        "run",
        &artifact,
        "--backend",
        "mpi",
        "--timeout",
        "4",
        "--drill",
        "2:0:0:stop",
    ]);
    let error = json(&output)["error"].to_string();
    assert_eq!(output.status.code(), Some(4), "{error}");
    for part in [
        "joining the group of ranks [",
        "rank 2 gave no sign of life",
    ] {
        assert!(error.contains(part), "{error}");
    }
}

/// What needs the document is done by the process that started the job.
#[test]
fn processes_are_verified_and_reported() {
    if !has_mpi() {
        return;
    }
    let case = Case::new();
    case.compile("pp2-dp2", 4, "", PP_DP);
    let document = case.text("pp2-dp2.weave");
    let (report, cluster) = (case.text("report.html"), case.text("measured.weave"));
    let args = [
        "run",
        &document,
        "--backend",
        "mpi",
        "--steps",
        "3",
        "--verify",
        "--report",
        &report,
        "--calibrate",
        &cluster,
    ];
    let output = run(&args);
    let result = json(&output);
    assert!(output.status.success(), "{result}");
    assert_eq!(
        losses_of(&output),
        losses(&["run", &document, "--steps", "3"])
    );
    let errors = result["errors"].as_object().unwrap();
    assert!(errors.len() > 10, "{result}");
    for (name, error) in errors {
        assert!(error.as_f64().unwrap() < 1e-4, "{name}: {error}");
    }
    assert!(
        std::fs::read_to_string(&report)
            .unwrap()
            .contains("measured")
    );
    assert!(
        std::fs::read_to_string(&cluster)
            .unwrap()
            .contains("cluster")
    );
    let artifact = case.text("pp2-dp2");
    let output = run(&["run", &artifact, "--backend", "mpi", "--verify"]);
    let error = json(&output)["error"].to_string();
    assert!(error.contains("needs the document"), "{error}");
}

#[test]
fn a_killed_rank_ends_the_job() {
    if !has_mpi() {
        return;
    }
    let case = Case::new();
    let artifact = case.compile("tp2-dp2", 4, "", TP_DP);
    let output = run(&[
        "run",
        &artifact,
        "--backend",
        "mpi",
        "--drill",
        "1:2:20:kill",
    ]);
    assert!(!output.status.success());
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(complaint.contains("rank 1"), "{complaint}");
}

#[test]
fn a_checkpoint_serves_every_plan() {
    let case = Case::new();
    let dp4 = case.compile("dp4", 4, "capacity 0", "mesh main = dp:4\napply dp(dp)");
    let plans = [
        ("tp2-dp2", TP_DP),
        ("pp2-dp2", PP_DP),
        ("ep4", "mesh main = ep:4\napply ep(ep)"),
        ("zero", "mesh main = dp:4\napply dp(dp)\napply zero(1, dp)"),
    ];
    let whole = losses(&["run", &dp4, "--steps", "6"]);
    let kept = case.text("kept");
    losses(&["run", &dp4, "--steps", "3", "--checkpoint", &kept]);
    assert_eq!(
        losses(&["run", &dp4, "--steps", "3", "--resume", &kept]),
        whole[3..]
    );
    for (name, tail) in plans {
        let artifact = case.compile(name, 4, "capacity 0", tail);
        let resumed = losses(&["run", &artifact, "--steps", "3", "--resume", &kept]);
        for (resumed, whole) in resumed.iter().zip(&whole[3..]) {
            let (resumed, whole) = (f64::from_bits(*resumed), f64::from_bits(*whole));
            assert!(
                (resumed - whole).abs() <= 1e-5 * whole,
                "{name}: {resumed} is not {whole}"
            );
        }
    }
}

#[test]
fn what_cannot_be_written_leaves_what_there_was() {
    let case = Case::new();
    let artifact = case.compile("one", 2, "", "mesh main = dp:2\napply dp(dp)");
    let kept = case.text("kept");
    losses(&["run", &artifact, "--steps", "2", "--checkpoint", &kept]);
    let before = listing(Path::new(&kept));
    // A file stands where the next checkpoint would be made.
    std::fs::write(case.path("kept/.step-00000004.unfinished"), "in the way").unwrap();
    let common = [
        "run",
        &artifact,
        "--steps",
        "2",
        "--checkpoint",
        &kept,
        "--resume",
        &kept,
    ];
    let output = run(&common);
    let error = json(&output)["error"].to_string();
    assert_eq!(output.status.code(), Some(4), "{error}");
    assert!(error.contains("could not be made"), "{error}");
    std::fs::remove_file(case.path("kept/.step-00000004.unfinished")).unwrap();
    assert_eq!(listing(Path::new(&kept)), before);
    losses(&common);
}

/// A file that may not grow any further is what a full disk is to a write: the checkpoint before stays
/// whole, and is gone on from.
#[test]
#[cfg(unix)]
fn a_full_disk_leaves_what_there_was() {
    let case = Case::new();
    let artifact = case.compile("one", 2, "", "mesh main = dp:2\napply dp(dp)");
    let kept = case.text("kept");
    let whole = losses(&["run", &artifact, "--steps", "4"]);
    losses(&["run", &artifact, "--steps", "2", "--checkpoint", &kept]);
    let before = listing(Path::new(&kept));
    let going_on = ["--steps", "2", "--checkpoint", &kept, "--resume", &kept];
    // Blocks of 512 bytes; the signal that would end the process is ignored.
    let limited = "trap '' XFSZ; ulimit -f 64; exec \"$0\" \"$@\"";
    let output = Command::new("sh")
        .args(["-c", limited, env!("CARGO_BIN_EXE_meshweave")])
        .args(["--format", "json", "run", &artifact])
        .args(going_on)
        .output()
        .unwrap();
    let error = json(&output)["error"].to_string();
    assert_eq!(output.status.code(), Some(4), "{error}");
    assert!(error.contains("could not be made"), "{error}");
    assert_eq!(listing(Path::new(&kept)), before);
    let resumed = losses(&[&["run", &artifact], &going_on[..]].concat());
    assert_eq!(resumed, whole[2..]);
}

fn listing(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}
