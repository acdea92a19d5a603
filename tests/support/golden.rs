//! The golden model at a size that the f64 interpreter takes in milliseconds, and its first step.

use std::collections::BTreeMap;

use meshweave_compiler::differentiate::{Optimizer, differentiate};
use meshweave_compiler::model::{DecoderConfig, Goal, GoldenSize, build_decoder};
use meshweave_dsl::graph::{Graph, TensorId};
use meshweave_runtime::reference::{Value, golden_inputs, initial_value};

const VOCAB: usize = 40;

/// The training graph; with experts where a capacity factor is given.
pub fn golden(capacity_factor: Option<f64>, tied: bool) -> Graph {
    altered(capacity_factor, |config| config.tied = tied)
}

/// The same with changes to its config.
pub fn altered(capacity_factor: Option<f64>, alter: impl FnOnce(&mut DecoderConfig)) -> Graph {
    let size = GoldenSize {
        n_layers: 2,
        embed: 16,
        heads: 4,
        ffn: 24,
        vocab: VOCAB,
        seq: 8,
        batch: 8,
    };
    let mut config = DecoderConfig::golden(&size, capacity_factor);
    alter(&mut config);
    let forward = build_decoder(&config, size.batch, size.seq, Goal::Training).unwrap();
    differentiate(&forward, &Optimizer::GOLDEN_ADAMW).unwrap()
}

/// Values of all sources of a global graph at its first step.
pub fn first_step(graph: &Graph) -> BTreeMap<TensorId, Value> {
    let mut values = golden_inputs(graph, VOCAB).unwrap();
    for id in graph.tensor_ids() {
        let tensor = graph.tensor(id);
        if let Some(value) = initial_value(&tensor.role, &tensor.ty).unwrap() {
            values.insert(id, value);
        }
    }
    if let Some(step) = graph.find("step") {
        values.insert(step, Value::full(graph.ty(step).clone(), 1.0));
    }
    values
}
