//! Hugging Face checkpoints through compiled programs: the library's logits, on one device and on four.

use std::path::Path;

use meshweave::compile::{CompileOptions, compile};
use meshweave::session::Session;
use meshweave_runtime::artifact;
use meshweave_runtime::executor::{Session as Execution, SessionOptions};
use meshweave_runtime::pretrained::Pretrained;
use meshweave_runtime::tensor::{Elements, HostTensor};
use safetensors::SafeTensors;

const TOLERANCE: f32 = 1e-4;

fn check(family: &str, n_devices: usize) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/hf")
        .join(family);
    let text = format!(
        "plan \"{family}\" model \"config.json\" cluster \"local:{n_devices}\"\ninfer batch 2 seq 16\n"
    );
    let session = Session::from_text("plan.weave", &text, &folder, None).unwrap();
    let model = session.model().unwrap();
    let solution = session.plan(&model).unwrap();
    let compiled = compile(
        &model.graph,
        &solution.plan,
        &session.request.cluster,
        &CompileOptions::default(),
    )
    .unwrap();
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("artifact");
    artifact::write(&path, &compiled.program, &compiled.kernels, "").unwrap();
    let (program, kernels) = artifact::load(&path).unwrap();
    let mut execution = Execution::new(program, kernels, &SessionOptions::default()).unwrap();

    let map = model.weights.as_ref().unwrap();
    let pretrained = Pretrained::open(&folder).unwrap();
    pretrained.check(map, &model.graph).unwrap();
    for id in model.graph.params() {
        let tensor = model.graph.tensor(id);
        let values = pretrained.read_all(map, &tensor.name, &tensor.ty).unwrap();
        let value = HostTensor::new(tensor.ty.clone(), Elements::F32(values)).unwrap();
        execution.set(&tensor.name, &value).unwrap();
    }
    let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| -> Vec<[u8; 4]> {
        let data = expected.tensor(name).unwrap().data().to_vec();
        data.chunks_exact(4)
            .map(|word| word.try_into().unwrap())
            .collect()
    };
    let tokens = words("tokens")
        .into_iter()
        .map(i32::from_le_bytes)
        .collect();
    let ty = model.graph.ty(model.graph.find("tokens").unwrap()).clone();
    execution
        .set(
            "tokens",
            &HostTensor::new(ty, Elements::I32(tokens)).unwrap(),
        )
        .unwrap();
    execution.step().unwrap();
    let output = &model.graph.tensor(model.graph.outputs[0]).name;
    let got = execution.get(output).unwrap();
    let want: Vec<f32> = words("logits")
        .into_iter()
        .map(f32::from_le_bytes)
        .collect();
    let got = got.as_f32().unwrap();
    assert_eq!(got.len(), want.len());
    let error = got
        .iter()
        .zip(&want)
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, f32::max);
    assert!(
        error <= TOLERANCE,
        "{family} on {n_devices} devices: {error:e}"
    );
}

#[test]
fn logits_are_the_library_s_on_one_device() {
    for family in ["llama", "gpt2", "qwen2", "mixtral"] {
        check(family, 1);
    }
}

#[test]
fn logits_are_the_library_s_on_four_devices() {
    for family in ["llama", "gpt2", "qwen2", "mixtral"] {
        check(family, 4);
    }
}
