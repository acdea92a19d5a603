#![allow(clippy::unwrap_used)]

use std::io::Cursor;

use proptest::prelude::*;

use super::file::{self, TraceReader, TraceWriter};
use super::import::{self, Engine, Known};
use super::statistics::{load, summarize, transitions};
use super::synth::{Load, Random, Router};
use super::*;

const SHAPE: TraceShape = TraceShape {
    layers: 3,
    experts: 8,
    top_k: 2,
};

fn router() -> Router {
    Router {
        shape: SHAPE,
        topics: 2,
        noise: 0.2,
        concentration: 0.5,
        load: Load::LogNormal(0.5),
        seed: 7,
    }
}

#[test]
fn tokens_that_contradict_the_shape_are_refused() {
    let message = |choices: &[u16], weights: Option<&[f32]>| {
        let mut trace = RoutingTrace::new(SHAPE, None).unwrap();
        trace.push(choices, weights).unwrap_err().to_string()
    };
    assert!(message(&[0, 1], None).contains("2 choices, 3 layers of top-2 need 6"));
    assert!(message(&[0, 1, 8, 1, 0, 1], None).contains("expert 8 in layer 1"));
    assert!(message(&[0, 1, 1, 1, 0, 1], None).contains("expert 1 twice in layer 1"));
    let weights = [0.5, 0.5, f32::NAN, 0.5, 0.5, 0.5];
    assert!(message(&[0, 1, 2, 1, 0, 1], Some(&weights)).contains("weight NaN in layer 1"));
    let none = TraceShape { top_k: 9, ..SHAPE };
    assert!(
        none.check()
            .unwrap_err()
            .to_string()
            .contains("9 of 8 experts")
    );
}

#[test]
fn synthetic_traces_are_reproducible_and_have_the_affinity_asked_for() {
    let trace = router().trace(4000).unwrap();
    assert_eq!(trace, router().trace(4000).unwrap());
    let other = Router {
        seed: 8,
        ..router()
    };
    assert_ne!(trace, other.trace(4000).unwrap());
    let affinity = |router: &Router| {
        let trace = router.trace(20_000).unwrap();
        let summary = summarize(&load(&trace), &transitions(&trace));
        summary[0].affinity.unwrap()
    };
    let top1 = Router {
        shape: TraceShape { top_k: 1, ..SHAPE },
        topics: 8,
        load: Load::Uniform,
        ..router()
    };
    // With a topic an expert, only noise leaves the one successor: 0.8 + 0.2 / 8.
    assert!((affinity(&top1) - 0.825).abs() < 0.02);
    let unrelated = Router { noise: 1.0, ..top1 };
    assert!(affinity(&unrelated) < 0.16);
}

#[test]
fn loads_follow_the_distribution() {
    let zipf = Router {
        shape: TraceShape { top_k: 1, ..SHAPE },
        load: Load::Zipf(1.0),
        noise: 1.0,
        ..router()
    };
    let load = load(&zipf.trace(50_000).unwrap());
    let mut first = load[0].clone();
    first.sort_by(|a, b| b.total_cmp(a));
    let harmonic: f64 = (1..=8).map(|k| 1.0 / f64::from(k)).sum();
    for (rank, tokens) in first.iter().enumerate() {
        let expected = 50_000.0 / harmonic / (rank + 1) as f64;
        assert!(
            (tokens / expected - 1.0).abs() < 0.1,
            "rank {rank}: {tokens} for {expected}"
        );
    }
}

#[test]
fn transitions_weigh_every_token_alike() {
    let mut trace = RoutingTrace::new(SHAPE, None).unwrap();
    trace.push(&[0, 1, 2, 3, 4, 5], None).unwrap();
    trace
        .push(&[0, NO_EXPERT, 2, 3, 4, NO_EXPERT], None)
        .unwrap();
    let transitions = transitions(&trace);
    let first = &transitions.pairs[0];
    assert!((first.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    // ¼ of the first token and ½ of the second, over two tokens.
    assert!((first[2] - 0.375).abs() < 1e-6);
    assert!((first[8 + 2] - 0.125).abs() < 1e-6);
    assert_eq!(load(&trace)[0], [2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
}

#[test]
fn parquet_files_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("routes.parquet");
    let trace = router().trace(300).unwrap();
    file::write(&trace, std::fs::File::create(&path).unwrap()).unwrap();
    assert_eq!(file::read(&path).unwrap(), trace);
    let reader = TraceReader::open(&path).unwrap();
    assert_eq!(reader.shape(), SHAPE);
    assert_eq!(reader.header().model.as_deref(), Some("synthetic"));
}

#[test]
fn parquet_streams_in_parts_with_weights() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("routes.parquet");
    let shape = TraceShape {
        layers: 1000,
        experts: 4,
        top_k: 1,
    };
    let target = std::fs::File::create(&path).unwrap();
    let mut writer = TraceWriter::new(target, shape, None, true).unwrap();
    let choices: Vec<u16> = (0..1000).map(|layer| layer % 4).collect();
    let weights: Vec<f32> = (0..1000).map(|layer| layer as f32).collect();
    for _ in 0..600 {
        writer.push(&choices, Some(&weights)).unwrap();
    }
    assert!(writer.push(&choices, None).is_err());
    assert_eq!(writer.finish().unwrap(), 600);
    let mut reader = TraceReader::open(&path).unwrap();
    let mut parts = Vec::new();
    while let Some(part) = reader.next_part().unwrap() {
        assert_eq!(part.token_weights(0).unwrap(), weights);
        parts.push(part.n_tokens());
    }
    assert!(parts.len() > 1, "one part of {parts:?}");
    assert_eq!(parts.iter().sum::<usize>(), 600);
}

#[test]
fn files_that_are_no_traces_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("routes.parquet");
    let message = || TraceReader::open(&path).err().unwrap().to_string();
    assert!(message().contains("cannot open"));
    std::fs::write(&path, "token,layer\n").unwrap();
    assert!(message().contains("cannot be read as Parquet"));
}

fn import(engine: Engine, text: &str) -> Result<import::Imported, TraceError> {
    import::read(engine, &mut Cursor::new(text), &Known::default())
}

#[test]
fn megatron_records_become_a_trace() {
    let text = r#"
{"step":0,"stage":"pre_dispatch","block":"decoder","layer":3,"rank":0,"num_tokens":2,"topk":2,"top_indices":[[0,1],[2,3]]}
{"step":0,"stage":"pre_dispatch","block":"decoder","layer":4,"rank":0,"num_tokens":2,"topk":2,"top_indices":[[4,5],[1,2]]}
{"step":0,"block":"mtp","mtp_idx":0,"layer":3,"rank":0,"top_indices":[[7,6],[7,6]]}
{"step":1,"block":"decoder","layer":3,"rank":0,"top_indices":[[0,1]]}
"#;
    let imported = import(Engine::Megatron, text).unwrap();
    assert_eq!(imported.n_left_out, 1);
    let trace = imported.trace;
    assert_eq!(
        trace.shape(),
        TraceShape {
            layers: 2,
            experts: 6,
            top_k: 2
        }
    );
    assert_eq!(trace.token(1), [2, 3, 1, 2]);
}

#[test]
fn responses_become_a_trace() {
    let text = r#"{"choices":[{"text":"a","routed_experts":[[[0,1],[-1,-1],[2,3]]]}],
        "prompt_routed_experts":[[[-1,-1],[-1,-1],[-1,-1]],[[1,3],[-1,-1],[3,0]]]}"#;
    let imported = import(Engine::Vllm, text).unwrap();
    // The second layer has no experts; the first token came from a cache.
    assert_eq!(imported.trace.shape().layers, 2);
    assert_eq!(imported.n_left_out, 1);
    assert_eq!(imported.trace.token(0), [1, 3, 3, 0]);
    assert_eq!(imported.trace.token(1), [0, 1, 2, 3]);
}

#[test]
fn what_cannot_be_imported_says_how_to_convert() {
    let message = |text: &str| import(Engine::Sglang, text).unwrap_err();
    assert!(
        matches!(message("PK\u{3}\u{4}…"), TraceError::Unsupported(text) if text.contains("torch.load"))
    );
    let base64 = r#"{"meta_info":{"routed_experts":"AAAA"}}"#;
    assert!(matches!(message(base64), TraceError::Unsupported(text) if text.contains("b64decode")));
    assert!(
        message(r#"{"text":"a"}"#)
            .to_string()
            .contains("hold no `routed_experts`")
    );
}

#[test]
fn counts_become_loads() {
    let text = r#"{"rank":0,"logical_count":[[[1,2],[0,0],[3,4]],[[1,0],[0,0],[0,1]]]}"#;
    let load = import::read_load(&mut Cursor::new(text)).unwrap();
    assert_eq!(load, [[2.0, 2.0], [3.0, 5.0]]);
}

proptest! {
    #[test]
    fn any_trace_reads_back(
        layers in 1usize..5,
        experts in 1usize..9,
        n_tokens in 0usize..40,
        with_weights: bool,
        seed: u64,
    ) {
        let mut random = Random::new(seed);
        let top_k = 1 + random.below(experts);
        let shape = TraceShape { layers, experts, top_k };
        let mut trace = RoutingTrace::new(shape, Some("any".into())).unwrap();
        for _ in 0..n_tokens {
            let mut choices = Vec::new();
            for _ in 0..layers {
                let mut all: Vec<u16> = (0..experts as u16).collect();
                random.shuffle(&mut all);
                all.truncate(top_k);
                if random.below(4) == 0 {
                    all[0] = NO_EXPERT;
                }
                choices.extend(all);
            }
            let weights: Vec<f32> = choices.iter().map(|_| random.uniform() as f32).collect();
            trace.push(&choices, with_weights.then_some(&weights[..])).unwrap();
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("any.parquet");
        file::write(&trace, std::fs::File::create(&path).unwrap()).unwrap();
        prop_assert_eq!(file::read(&path).unwrap(), trace);
    }
}
