use meshweave_dsl::layout::Mesh;

use super::*;

fn program() -> Program {
    Program {
        version: PROGRAM_VERSION,
        name: "empty".into(),
        mesh: Mesh::new([("dp", 1)]),
        kernels: Vec::new(),
        sources: Vec::new(),
        outputs: Vec::new(),
        channels: Vec::new(),
        statements: Default::default(),
        ranks: Vec::new(),
    }
}

/// The message of loading `folder`, with the folder's own path taken out.
fn refusal(folder: &Path) -> String {
    let error = load(folder).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Invalid(_)), "{error}");
    error
        .to_string()
        .replace(&folder.display().to_string(), "FOLDER")
}

#[test]
fn damaged_artifacts_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("demo.artifact");
    insta::assert_snapshot!(refusal(&folder), @"there is no artifact FOLDER; make one with `meshweave compile`");

    write(&folder, &program(), b"no object", "+sse2").unwrap();
    let names: Vec<_> = fs::read_dir(place.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(names, ["demo.artifact"], "nothing else is left");
    // Everything is intact but the object itself.
    assert!(refusal(&folder).starts_with("kernels FOLDER/kernels.so: "));

    let kernels = folder.join(KERNELS);
    fs::write(&kernels, b"no objec").unwrap();
    insta::assert_snapshot!(refusal(&folder), @"kernels.so of the artifact FOLDER has 8 bytes, the manifest says 9: it is truncated or of another compilation; compile again");
    fs::write(&kernels, b"no objecT").unwrap();
    insta::assert_snapshot!(refusal(&folder), @"kernels.so of the artifact FOLDER has hash ba1b726f7d777a2d, the manifest says ba1b926f7d77b08d: it was changed; compile again");
    fs::remove_file(&kernels).unwrap();
    insta::assert_snapshot!(refusal(&folder), @"the artifact FOLDER lacks kernels.so (No such file or directory (os error 2)); compile again");

    let manifest = folder.join(MANIFEST);
    let text = fs::read_to_string(&manifest).unwrap();
    let version = format!("\"version\": {PROGRAM_VERSION}");
    assert!(text.contains(&version));
    fs::write(&manifest, text.replace(&version, "\"version\": 999")).unwrap();
    assert!(
        refusal(&folder)
            .starts_with("the artifact FOLDER is of version 999, this meshweave runs version")
    );
    fs::write(&manifest, &text[..text.len() / 2]).unwrap();
    assert!(refusal(&folder).starts_with("FOLDER/manifest.json is no manifest: EOF"));
    fs::write(&manifest, "{\"format\": \"other\", \"version\": 1}").unwrap();
    insta::assert_snapshot!(refusal(&folder), @"FOLDER/manifest.json is a manifest of `other`, not of an artifact");
    fs::remove_file(&manifest).unwrap();
    assert!(refusal(&folder).starts_with("the artifact FOLDER lacks manifest.json ("));
}

#[test]
fn an_artifact_replaces_an_artifact_and_nothing_else() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("out");
    fs::create_dir(&folder).unwrap();
    write(&folder, &program(), b"one", "").unwrap();
    write(&folder, &program(), b"another", "").unwrap();
    assert_eq!(fs::read(folder.join(KERNELS)).unwrap(), b"another");
    let other = place.path().join("precious");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("thesis.txt"), "years of work").unwrap();
    let error = write(&other, &program(), b"one", "")
        .unwrap_err()
        .to_string();
    assert!(error.contains("exists and is no artifact"), "{error}");
    assert!(other.join("thesis.txt").exists());
}

#[test]
fn another_cpu_is_refused() {
    let Some((lacking, _)) = cpu_features().into_iter().find(|(_, has)| !has) else {
        return;
    };
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("out");
    write(&folder, &program(), b"one", &format!("+avx,+{lacking}")).unwrap();
    let text = refusal(&folder);
    assert!(
        text.starts_with("the artifact FOLDER uses CPU features that this machine lacks: "),
        "{text}"
    );
}
