//! What a placement costs: load, transitions, and the seconds that both make.
//!
//! Enters: a placement, loads and a chain. Leaves: figures, measured on the trace, and predicted
//! seconds.
//! Invariant: replicas share their expert's tokens evenly, and a token stays on its device whenever
//! that holds the next expert.

use meshweave_dsl::placement::Placement;
use serde::Serialize;

use super::chain::Chain;

/// Seconds of what a token does in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Costs {
    /// Of one expert on one token.
    pub expert_s: f64,
    /// Of a token's activations on the way to another device of the node.
    pub within_node_s: f64,
    /// Of the same to another node.
    pub between_nodes_s: f64,
}

/// Shares of transitions that stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Kept {
    /// On the device.
    pub device: f64,
    /// In the node.
    pub node: f64,
}

/// Transitions that a placement keeps, as a mean over the pairs of layers.
pub fn kept(chain: &Chain, placement: &Placement) -> Kept {
    let pairs = chain.pairs.len();
    let mut sum = Kept::default();
    for pair in 0..pairs {
        let of_pair = kept_of_pair(chain, placement, pair);
        sum.device += of_pair.device;
        sum.node += of_pair.node;
    }
    let mean = 1.0 / pairs.max(1) as f64;
    Kept {
        device: sum.device * mean,
        node: sum.node * mean,
    }
}

fn kept_of_pair(chain: &Chain, placement: &Placement, pair: usize) -> Kept {
    let experts = chain.experts;
    let per_node = placement.per_node();
    let from = placement.devices_of(pair);
    let next = placement.layer(pair + 1);
    let mut kept = Kept::default();
    let mut in_node = vec![false; experts];
    for (node, devices) in next.chunks(per_node).enumerate() {
        in_node.fill(false);
        for expert in devices.iter().flatten() {
            in_node[usize::from(*expert)] = true;
        }
        for (expert, places) in from.iter().enumerate() {
            let here = places
                .iter()
                .filter(|d| usize::from(**d) / per_node == node);
            let n_here = here.clone().count();
            if n_here == 0 {
                continue;
            }
            let row = &chain.pairs[pair][expert * experts..(expert + 1) * experts];
            let each = 1.0 / places.len() as f64;
            let to_node = row.iter().zip(&in_node).filter(|(_, is_here)| **is_here);
            let to_node: f64 = to_node.map(|(share, _)| f64::from(*share)).sum();
            kept.node += each * n_here as f64 * to_node;
            for device in here {
                let held = next[usize::from(*device)].iter();
                let to_device: f64 = held.map(|to| f64::from(row[usize::from(*to)])).sum();
                kept.device += each * to_device;
            }
        }
    }
    kept
}

/// Load of every device in a layer, replicas sharing evenly.
pub fn device_loads(load: &[f64], placement: &Placement, layer: usize) -> Vec<f64> {
    let counts = placement.devices_of(layer);
    let share = |expert: &u16| {
        let expert = usize::from(*expert);
        let load = load.get(expert).copied().unwrap_or(0.0);
        load / counts[expert].len() as f64
    };
    let devices = placement.layer(layer).iter();
    devices.map(|held| held.iter().map(share).sum()).collect()
}

/// How even the devices' loads are: mean over greatest, 1 being even.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Balance {
    /// Mean of the layers.
    pub mean: f64,
    pub worst: f64,
    pub worst_layer: usize,
}

/// Mean over greatest load of a layer's devices.
pub fn balancedness(load: &[f64], placement: &Placement, layer: usize) -> f64 {
    let loads = device_loads(load, placement, layer);
    let greatest = loads.iter().copied().fold(0.0, f64::max);
    let mean = loads.iter().sum::<f64>() / loads.len() as f64;
    if greatest > 0.0 { mean / greatest } else { 1.0 }
}

/// Balancedness of a placement under loads.
pub fn balance_of(load: &[Vec<f64>], placement: &Placement) -> Balance {
    let layers = load.iter().enumerate();
    let layers: Vec<f64> = layers
        .map(|(layer, load)| balancedness(load, placement, layer))
        .collect();
    let worst_layer = (0..layers.len()).fold(0, |worst, layer| {
        if layers[layer] < layers[worst] {
            layer
        } else {
            worst
        }
    });
    Balance {
        mean: layers.iter().sum::<f64>() / layers.len().max(1) as f64,
        worst: layers.get(worst_layer).copied().unwrap_or(1.0),
        worst_layer,
    }
}

/// Predicted seconds of the experts in a layer, one token a device that takes `choices` experts.
pub fn compute_seconds(costs: Costs, choices: f64, balancedness: f64) -> f64 {
    choices * costs.expert_s / balancedness.max(f64::MIN_POSITIVE)
}

/// Predicted seconds of the tokens that leave their device between two layers, one token a device.
pub fn transfer_seconds(costs: Costs, kept: Kept) -> f64 {
    (1.0 - kept.node).max(0.0) * costs.between_nodes_s
        + (kept.node - kept.device).max(0.0) * costs.within_node_s
}
