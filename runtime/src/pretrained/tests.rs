use std::io::Write;

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{Init, Role};
use safetensors::tensor::{TensorView, serialize};

use super::*;

/// A safetensors file of (name, dtype, shape, bytes).
fn write(path: &Path, tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) {
    let views: Vec<_> = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            let view = TensorView::new(*dtype, shape.to_vec(), bytes).unwrap();
            (name.to_string(), view)
        })
        .collect();
    let bytes = serialize(views, None).unwrap();
    File::create(path).unwrap().write_all(&bytes).unwrap();
}

fn f32_bytes(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

/// `w: f32[m:2, n:3]`, transposed in the checkpoint as `layer.weight`.
fn model() -> (Graph, WeightMap) {
    let mut graph = Graph::new("g");
    let ty = TensorType::new(DType::F32, [("m", 2), ("n", 3)]);
    graph.add_source("w", ty, Role::Param(Init::Zeros));
    let source = WeightSource::new("layer.weight", [3, 2]);
    let map = WeightMap {
        prefixes: vec!["model.".into(), String::new()],
        sources: [("w".to_owned(), source.permute(&[1, 0]).unwrap())].into(),
        ignored: vec!["*.bias".into()],
    };
    (graph, map)
}

#[test]
fn a_region_is_read_through_its_view() {
    let folder = tempfile::tempdir().unwrap();
    let (graph, map) = model();
    let data = f32_bytes([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    let bias = f32_bytes([9.0]);
    write(
        &folder.path().join(SINGLE),
        &[
            ("model.layer.weight", Dtype::F32, &[3, 2], data),
            ("model.layer.bias", Dtype::F32, &[1], bias),
        ],
    );
    let pretrained = Pretrained::open(folder.path()).unwrap();
    pretrained.check(&map, &graph).unwrap();
    let ty = &graph.tensors[0].ty;
    let all = pretrained.read_all(&map, "w", ty).unwrap();
    assert_eq!(all, [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]);
    let region = [Interval { start: 1, len: 1 }, Interval { start: 1, len: 2 }];
    assert_eq!(pretrained.read(&map, "w", ty, &region).unwrap(), [3.0, 5.0]);
}

#[test]
fn element_types_are_converted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let halves = [0x3C00_u16, 0xC000, 0x0001, 0x7BFF, 0x8000, 0x7C00];
    let brain = [0x3F80_u16, 0xC000, 0x0080];
    let bytes = |words: &[u16]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
    write(
        &path,
        &[
            ("f16", Dtype::F16, &[6], bytes(&halves)),
            ("bf16", Dtype::BF16, &[3], bytes(&brain)),
            ("f64", Dtype::F64, &[1], 0.1_f64.to_le_bytes().to_vec()),
            ("i64", Dtype::I64, &[1], vec![0; 8]),
        ],
    );
    let pretrained = Pretrained::open(&path).unwrap();
    let (_, f16) = pretrained.tensor("f16").unwrap();
    assert_eq!(
        f16,
        [1.0, -2.0, 2.0_f32.powi(-24), 65504.0, -0.0, f32::INFINITY]
    );
    let (_, bf16) = pretrained.tensor("bf16").unwrap();
    assert_eq!(bf16, [1.0, -2.0, f32::MIN_POSITIVE]);
    assert_eq!(pretrained.tensor("f64").unwrap().1, [0.1_f32]);
    let refused = pretrained.tensor("i64").unwrap_err();
    insta::assert_snapshot!(refused, @"tensor `i64` is stored as I64; F32, F64, BF16 and F16 can be read");
}

#[test]
fn several_files_with_an_index() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let data = f32_bytes([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    write(
        &at("a.safetensors"),
        &[("layer.weight", Dtype::F32, &[3, 2], data)],
    );
    write(
        &at("b.safetensors"),
        &[("layer.bias", Dtype::F32, &[1], f32_bytes([1.0]))],
    );
    let index = r#"{"metadata": {}, "weight_map": {"layer.weight": "a.safetensors", "layer.bias": "b.safetensors"}}"#;
    std::fs::write(at(INDEX), index).unwrap();
    let (graph, map) = model();
    let pretrained = Pretrained::open(folder.path()).unwrap();
    pretrained.check(&map, &graph).unwrap();
    assert_eq!(pretrained.names().count(), 2);

    std::fs::write(at(INDEX), index.replace("layer.bias", "layer.scale")).unwrap();
    let message = Pretrained::open(folder.path()).unwrap_err().to_string();
    assert!(message.contains("lacks tensor `layer.scale`"), "{message}");
    std::fs::write(at(INDEX), &index[..50]).unwrap();
    let message = Pretrained::open(folder.path()).unwrap_err().to_string();
    assert!(
        message.contains("EOF while parsing a string at line 1 column 50"),
        "{message}"
    );
    std::fs::remove_file(at(INDEX)).unwrap();
    let message = Pretrained::open(folder.path()).unwrap_err().to_string();
    assert!(message.contains("has neither"), "{message}");
}

#[test]
fn misfits_name_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let (graph, map) = model();
    let message = |tensors: &[(&str, Dtype, &[usize], Vec<u8>)]| {
        let path = folder.path().join(SINGLE);
        write(&path, tensors);
        let pretrained = Pretrained::open(folder.path()).unwrap();
        let error = pretrained.check(&map, &graph).unwrap_err();
        error
            .to_string()
            .replace(&folder.path().display().to_string(), "FOLDER")
    };
    let six = || vec![0; 24];
    let messages = [
        message(&[("layer.weigth", Dtype::F32, &[3, 2], six())]),
        message(&[("layer.weight", Dtype::F32, &[2, 3], six())]),
        message(&[("layer.weight", Dtype::I32, &[3, 2], six())]),
        message(&[
            ("layer.weight", Dtype::F32, &[3, 2], six()),
            ("layer.gain", Dtype::F32, &[6], six()),
        ]),
    ];
    insta::assert_snapshot!(messages.join("\n"));
}

#[test]
fn any_truncation_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(SINGLE);
    write(&path, &[("layer.weight", Dtype::F32, &[3, 2], vec![0; 24])]);
    let bytes = std::fs::read(&path).unwrap();
    for len in 0..bytes.len() {
        std::fs::write(&path, &bytes[..len]).unwrap();
        let error = Pretrained::open(&path).unwrap_err();
        assert!(matches!(error, Error::Invalid(_)), "{len}: {error}");
    }
    let huge = [u64::MAX.to_le_bytes().to_vec(), bytes[8..].to_vec()].concat();
    std::fs::write(&path, huge).unwrap();
    assert!(Pretrained::open(&path).is_err());
}
