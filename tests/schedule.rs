//! `meshweave schedule` as a user meets it.

use std::process::{Command, Output};

fn schedule(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_meshweave"))
        .arg("schedule")
        .args(args)
        .output()
        .unwrap()
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
