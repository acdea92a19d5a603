//! Layers of the pipeline stages of a row.
//!
//! Enters: the source of a row, its notes, its sizes. Leaves: layers of every stage, where they are not
//! divided evenly.
//! Invariant: the layers of all stages are those of the model.

use super::table::Row;
use crate::plan::estimate::Workload;

/// The layers of `n_stages` stages, where the row's program does not divide them evenly.
pub(super) fn layers(row: Row<'_>, workload: &Workload, n_stages: usize) -> Option<Vec<usize>> {
    let n_layers = workload.model.n_layers;
    let notes = row.text_or_blank("notes").to_ascii_lowercase();
    let source = row.text_or_blank("source").to_ascii_lowercase();
    if n_stages < 2 {
        None
    } else if notes.contains("first and last stage have one layer less") {
        (n_layers + 2).is_multiple_of(n_stages).then(|| {
            let mut layers = vec![(n_layers + 2) / n_stages; n_stages];
            layers[0] -= 1;
            layers[n_stages - 1] -= 1;
            layers
        })
    } else if source.contains("nanotron") {
        Some(balanced(workload, n_stages))
    } else {
        None
    }
}

/// nanotron's balance (`models/base.py`, `build_model`): layers and head are weighed by their matrices,
/// attention as if every head had its own keys; a stage is closed once it has its part of the sum.
fn balanced(workload: &Workload, n_stages: usize) -> Vec<usize> {
    let model = &workload.model;
    let embed = model.embed as f64;
    let heads = (model.attention.heads * model.attention.head) as f64;
    let layer = 4.0 * heads * embed + 3.0 * model.ffn.width as f64 * embed;
    let head = model.vocab as f64 * embed;
    let total = layer * model.n_layers as f64 + head;
    let mut layers = vec![0; n_stages];
    let mut stage = 0;
    for layer_idx in 0..model.n_layers {
        layers[stage] += 1;
        let so_far = layer * (layer_idx + 1) as f64;
        let part = total * (stage + 1) as f64 / n_stages as f64;
        // The tolerance decides for sums that are equal but for rounding.
        if so_far >= part * (1.0 - 1e-9) && stage + 1 < n_stages {
            stage += 1;
        }
    }
    layers
}
