//! What a trace says about load and affinity.
//!
//! Enters: a trace. Leaves: tokens an expert, transitions between experts of adjacent layers, and
//! summary figures, all of them measured.
//! Invariant: a token weighs 1 in every layer and every transition, whatever its `top_k`: a slot
//! counts `1/k`, a pair of slots `1/(k·k′)`, over the slots that hold an expert.

use serde::Serialize;

use super::{NO_EXPERT, RoutingTrace, TraceShape};

/// Transition shares from the experts of one layer to those of the next, row-major E × E.
#[derive(Clone, Debug, PartialEq)]
pub struct Transitions {
    pub experts: usize,
    /// Per pair of adjacent layers; each sums to 1 unless no token was routed in both.
    pub pairs: Vec<Vec<f32>>,
}

/// Tokens of every expert: `load[layer][expert]`, a choice counting 1.
pub fn load(trace: &RoutingTrace) -> Vec<Vec<f64>> {
    let TraceShape {
        layers, experts, ..
    } = trace.shape();
    let mut load = vec![vec![0.0; experts]; layers];
    for token in 0..trace.n_tokens() {
        for (layer, of_layer) in load.iter_mut().enumerate() {
            for expert in chosen(trace, token, layer) {
                of_layer[expert] += 1.0;
            }
        }
    }
    load
}

/// Transition shares between adjacent layers. O(tokens · layers · top_k²).
pub fn transitions(trace: &RoutingTrace) -> Transitions {
    let TraceShape {
        layers, experts, ..
    } = trace.shape();
    let pairs = (1..layers).map(|layer| {
        let mut counts = vec![0f64; experts * experts];
        let mut total = 0.0;
        for token in 0..trace.n_tokens() {
            let n_from = chosen(trace, token, layer - 1).count();
            let n_to = chosen(trace, token, layer).count();
            if n_from == 0 || n_to == 0 {
                continue;
            }
            let share = 1.0 / (n_from * n_to) as f64;
            total += 1.0;
            for from in chosen(trace, token, layer - 1) {
                for to in chosen(trace, token, layer) {
                    counts[from * experts + to] += share;
                }
            }
        }
        let scale = if total > 0.0 { 1.0 / total } else { 0.0 };
        counts.iter().map(|count| (count * scale) as f32).collect()
    });
    Transitions {
        experts,
        pairs: pairs.collect(),
    }
}

fn chosen(trace: &RoutingTrace, token: usize, layer: usize) -> impl Iterator<Item = usize> {
    let slots = trace.chosen(token, layer).iter();
    slots
        .filter(|expert| **expert != NO_EXPERT)
        .map(|expert| usize::from(*expert))
}

/// Figures of one layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerSummary {
    pub layer: usize,
    /// Choices that hold an expert.
    pub choices: f64,
    /// Mean over greatest load of an expert: 1 is even (SGLang's "balancedness", on experts).
    pub balancedness: f64,
    pub busiest_expert: usize,
    pub busiest_share: f64,
    /// Experts that no token chose.
    pub idle_experts: usize,
    /// Share of transitions to the next layer that go to the likeliest successor of their expert;
    /// `None` in the last layer. 1/E where the next expert does not depend on this one.
    pub affinity: Option<f64>,
}

/// Summary figures, layer by layer.
pub fn summarize(load: &[Vec<f64>], transitions: &Transitions) -> Vec<LayerSummary> {
    let summaries = load.iter().enumerate().map(|(layer, load)| {
        let choices: f64 = load.iter().sum();
        let busiest_expert = (0..load.len()).fold(0, |best, expert| {
            if load[expert] > load[best] {
                expert
            } else {
                best
            }
        });
        let greatest = load.get(busiest_expert).copied().unwrap_or(0.0);
        let (balancedness, busiest_share) = if greatest > 0.0 {
            (choices / load.len() as f64 / greatest, greatest / choices)
        } else {
            (1.0, 0.0)
        };
        LayerSummary {
            layer,
            choices,
            balancedness,
            busiest_expert,
            busiest_share,
            idle_experts: load.iter().filter(|load| **load == 0.0).count(),
            affinity: transitions.pairs.get(layer).map(|pair| {
                let rows = pair.chunks(transitions.experts);
                rows.map(|row| f64::from(row.iter().copied().fold(0.0, f32::max)))
                    .sum()
            }),
        }
    });
    summaries.collect()
}
