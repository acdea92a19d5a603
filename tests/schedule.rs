//! `meshweave schedule` as a user meets it.

use std::process::{Command, Output};

fn schedule(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_meshweave"))
        .arg("schedule")
        .args(args)
        .output()
        .unwrap()
}

/// A text with single blanks.
fn words(text: &str) -> String {
    text.split(' ')
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

fn text(args: &[&str]) -> String {
    let output = schedule(args);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn what_show_writes_check_accepts() {
    let folder = tempfile::tempdir().unwrap();
    let (csv, page) = (
        folder.path().join("order.csv"),
        folder.path().join("order.html"),
    );
    let (csv, page) = (csv.to_str().unwrap(), page.to_str().unwrap());
    let drawn = text(&[
        "show",
        "zb-v",
        "--ranks",
        "2",
        "--microbatches",
        "3",
        "--width",
        "60",
        "--csv",
        csv,
        "--report",
        page,
    ]);
    assert!(
        drawn.contains("rank 1") && drawn.contains("bubble 0.500 s"),
        "{drawn}"
    );
    assert!(std::fs::read_to_string(page).unwrap().contains("<svg"));
    assert!(text(&["check", csv]).contains("ok: 2 ranks, 4 stages, 3 microbatches"));
    let mut broken = std::fs::read_to_string(csv).unwrap();
    broken = broken.replacen("0F1", "0F1xyz", 1);
    std::fs::write(csv, broken).unwrap();
    let refused = schedule(&["check", csv]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        String::from_utf8(refused.stderr)
            .unwrap()
            .contains("`0F1xyz` is no action")
    );
}

#[test]
fn documents_define_schedules() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mine.weave");
    std::fs::write(&path, "schedule mine = key F:(mb,0) B:(mb+P-r,-1)\n").unwrap();
    let drawn = text(&[
        "show",
        path.to_str().unwrap(),
        "--ranks",
        "3",
        "--microbatches",
        "4",
    ]);
    assert!(drawn.contains("step 18.000 s  bubble 6.000 s"), "{drawn}");
}

/// Communication and memory actions, as CSV and in time; what is written is accepted, and refused
/// where it was changed.
#[test]
fn lowered_schedules_are_simulated_and_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let csv = folder.path().join("comms.csv");
    let csv = csv.to_str().unwrap();
    let shape = ["--ranks", "2", "--microbatches", "4", "--width", "60"];
    let mut args = vec!["lower", "1f1b"];
    args.extend(shape);
    args.extend(["--unshard", "1", "--unshard-time", "0.5", "--weights", "3"]);
    args.extend([
        "--offload",
        "0",
        "--offload-time",
        "0.25",
        "--reduce",
        "0.5",
    ]);
    args.extend(["--update", "0.25", "--barrier", "--csv", csv]);
    let drawn = text(&args);
    // Alone 15; half a second for the first weights, half for the last reduction, a quarter to update.
    assert!(
        drawn.contains("step 16.250 s  actions and messages alone 15.000 s"),
        "{drawn}"
    );
    let row = "row 0UNSHARD 0F0 0OFFLOAD0 0SEND_F0";
    assert!(words(&drawn).contains(row), "{drawn}");
    // The same as a document, its rows and its queues: what is printed is read, checked and runs alike.
    for more in [None, Some("--streams")] {
        let document = folder.path().join("written.weave");
        let document = document.to_str().unwrap();
        let mut writing = args.clone();
        writing.extend(["--weave", document]);
        writing.extend(more);
        let written = text(&writing);
        assert_eq!(
            more.is_some(),
            written.contains("rank 1 from 0 "),
            "{written}"
        );
        let mut reading = vec!["lower", document, "--width", "60", "--unshard-time", "0.5"];
        reading.extend([
            "--weights",
            "3",
            "--offload-time",
            "0.25",
            "--reduce",
            "0.5",
        ]);
        reading.extend(["--update", "0.25", "--barrier"]);
        reading.extend(more);
        assert_eq!(text(&reading), written);
        assert!(text(&["check", document]).contains("1f1b: ok: 2 ranks, 2 stages"));
        assert!(text(&["show", document, "--width", "60"]).contains("step 15.000 s"));
        reading.extend(["--unshard", "1"]);
        let refused = String::from_utf8(schedule(&reading).stderr).unwrap();
        assert!(refused.contains("has its communication and memory actions already"));
    }
    assert!(text(&["check", csv]).contains("ok: 2 ranks, 2 stages, 4 microbatches"));
    let written = std::fs::read_to_string(csv).unwrap();
    std::fs::write(csv, written.replacen("0PREFETCH1,", "", 1)).unwrap();
    let refused = schedule(&["check", csv]);
    assert_eq!(refused.status.code(), Some(1));
    let message = String::from_utf8(refused.stderr).unwrap();
    assert!(
        message.contains("`0OFFLOAD1` on rank 0") && message.contains(">0OFFLOAD1<"),
        "{message}"
    );
}

/// Stages of layers, stages on chosen ranks, links that are shared, proofs.
#[test]
fn costs_are_those_of_layers_and_links() {
    let shape = ["--ranks", "4", "--microbatches", "8", "--width", "60"];
    let shown = |name: &str, more: &[&str]| {
        let mut args = vec!["show", name];
        args.extend(shape);
        args.extend(more);
        text(&args)
    };
    let cut = shown("1f1b", &["--layers", "1,4*8,12", "--tied", "0,9"]);
    assert!(
        cut.contains("0: 0-2 (rank 0)  1: 3-5 (rank 1)  2: 6-8 (rank 2)  3: 9 (rank 3)"),
        "{cut}"
    );
    assert!(cut.contains("tied layers are on ranks [0, 3]"), "{cut}");
    let folded = shown("zb-v", &["--layers", "1,4*14,3", "--tied", "0,15"]);
    assert!(folded.contains("tied layers are on one rank"), "{folded}");
    let mut args = vec!["show", "1f1b", "--layers", "1,1,1"];
    args.extend(shape);
    let refused = schedule(&args);
    let message = String::from_utf8(refused.stderr).unwrap();
    assert!(
        message.contains("3 layers cannot fill 4 stages"),
        "{message}"
    );
    let empty = shown("1f1b", &["--layers", "1,1,1", "--empty"]);
    assert!(empty.contains("none"), "{empty}");
    let placed = shown("1f1b", &["--place", "3,2,1,0"]);
    let first = placed.lines().find(|line| line.starts_with("rank 0 "));
    assert!(first.unwrap().starts_with("rank 0 ···"), "{placed}");
    let free = shown(
        "interleaved",
        &["--p2p", "1.2", "--links", "none", "--latency", "0.1"],
    );
    let shared = shown(
        "interleaved",
        &["--p2p", "1.2", "--links", "sender", "--latency", "0.1"],
    );
    let step = |drawn: &str| {
        let (_, rest) = drawn.split_once("predicted  step ").unwrap();
        rest.split_once(' ').unwrap().0.parse::<f64>().unwrap()
    };
    assert!(step(&free) < step(&shared), "{free} {shared}");
    assert!(free.contains("critical path (predicted)  0F0"), "{free}");
    let args = [
        "--ranks",
        "2",
        "--microbatches",
        "3",
        "--costs",
        "1:1.4:0.8",
        "--exact",
    ];
    let proven = text(&[&["search"], &args[..]].concat());
    assert!(
        proven.contains("exact: V with 2 chunks a rank: no order is faster than 10.300 s"),
        "{proven}"
    );
}

#[test]
fn results_are_one_json_value() {
    for args in [
        vec!["list"],
        vec!["table", "gpipe"],
        vec!["show", "1f1b", "--ranks", "2", "--microbatches", "2"],
        vec![
            "search",
            "--ranks",
            "2",
            "--microbatches",
            "2",
            "--stages",
            "1,1.5",
        ],
    ] {
        let mut args = args;
        args.extend(["--format", "json"]);
        let value: serde_json::Value = serde_json::from_str(&text(&args)).unwrap();
        assert!(value.is_object(), "{args:?}");
    }
    let refused = schedule(&["show", "2f2b", "--format", "json"]);
    assert_eq!(refused.status.code(), Some(1));
    let error: serde_json::Value = serde_json::from_slice(&refused.stdout).unwrap();
    assert_eq!(error["error"]["class"], "invalid");
}
