//! Load and affinity together.
//!
//! Enters: a chain, loads, and a placement to begin with. Leaves: a placement whose predicted seconds
//! are no more.
//! Invariant: exchanges keep the replicas of every expert and the slots of every device.
//!
//! A layer is improved given its neighbors: what a replica keeps local on a device is then linear,
//! and an exchange of two replicas is priced by what it keeps and by the busiest device it leaves.

use meshweave_dsl::placement::Placement;

use super::PlacementError;
use super::assign::assign;
use super::chain::Chain;
use super::price::{Costs, balancedness, compute_seconds, kept, transfer_seconds};

/// What the trace says.
pub struct Demand<'a> {
    pub chain: &'a Chain,
    /// By layer and expert.
    pub load: &'a [Vec<f64>],
    /// Experts a token takes in a layer.
    pub choices: f64,
}

/// Predicted seconds of a token through all layers, one token a device: in every layer the experts
/// of the busiest device, between layers the tokens that leave their device.
pub fn seconds(demand: &Demand, costs: Costs, placement: &Placement) -> f64 {
    let layers = demand.load.iter().enumerate();
    let compute: f64 = layers
        .map(|(layer, load)| {
            compute_seconds(costs, demand.choices, balancedness(load, placement, layer))
        })
        .sum();
    let pairs = demand.chain.pairs.len() as f64;
    compute + pairs * transfer_seconds(costs, kept(demand.chain, placement))
}

/// Renumbers the devices layer by layer so that most transitions stay; loads do not change.
///
/// O(layers · devices³).
///
/// # Errors
/// None, unless an invariant is broken.
pub fn align(chain: &Chain, placement: &Placement) -> Result<Placement, PlacementError> {
    let devices = placement.n_devices();
    let mut layers: Vec<Vec<Vec<u16>>> = vec![placement.layer(0).to_vec()];
    for layer in 1..placement.n_layers() {
        let before = &layers[layer - 1];
        let here = placement.layer(layer);
        let shares = &chain.pairs[layer - 1];
        let counts = replica_counts(before, chain.experts);
        let mut flows = vec![0f64; devices * devices];
        for (row, held) in here.iter().enumerate() {
            for (column, from) in before.iter().enumerate() {
                let mut flow = 0.0;
                for i in from {
                    let each = 1.0 / counts[usize::from(*i)] as f64;
                    for j in held {
                        let share = shares[usize::from(*i) * chain.experts + usize::from(*j)];
                        flow += each * f64::from(share);
                    }
                }
                flows[row * devices + column] = flow;
            }
        }
        let to = assign(&flows, devices, 1).column_of;
        let mut aligned = vec![Vec::new(); devices];
        for (held, device) in here.iter().zip(to) {
            aligned[usize::from(device)] = held.clone();
        }
        layers.push(aligned);
    }
    Placement::new(layers, placement.per_node()).map_err(broken)
}

fn replica_counts(layer: &[Vec<u16>], experts: usize) -> Vec<usize> {
    let mut counts = vec![0usize; experts];
    for expert in layer.iter().flatten() {
        counts[usize::from(*expert)] += 1;
    }
    counts
}

fn broken(error: impl std::fmt::Display) -> PlacementError {
    PlacementError::Internal(format!("a placement that was built is illegal: {error}"))
}

/// Improves a placement by exchanges within layers, until a sweep gains nothing.
///
/// O(sweeps · layers · (devices · slots)²).
///
/// # Errors
/// None, unless an invariant is broken.
pub fn refine(
    demand: &Demand,
    costs: Costs,
    placement: &Placement,
    sweeps: usize,
) -> Result<Placement, PlacementError> {
    let mut layers: Vec<Vec<Vec<u16>>> = (0..placement.n_layers())
        .map(|layer| placement.layer(layer).to_vec())
        .collect();
    let mut best = placement.clone();
    let mut least = seconds(demand, costs, placement);
    for _ in 0..sweeps {
        for layer in 0..layers.len() {
            refine_layer(demand, costs, &mut layers, layer, placement.per_node());
        }
        let refined = Placement::new(layers.clone(), placement.per_node()).map_err(broken)?;
        let now = seconds(demand, costs, &refined);
        if now >= least * (1.0 - 1e-6) {
            break;
        }
        (best, least) = (refined, now);
    }
    Ok(best)
}

fn refine_layer(
    demand: &Demand,
    costs: Costs,
    layers: &mut [Vec<Vec<u16>>],
    layer: usize,
    per_node: usize,
) {
    let devices = layers[layer].len();
    let experts = demand.chain.experts;
    let counts = replica_counts(&layers[layer], experts);
    let saved = saved(demand.chain, costs, layers, layer, &counts, per_node);
    let total: f64 = demand.load[layer].iter().sum();
    let each: Vec<f64> = demand.load[layer]
        .iter()
        .zip(&counts)
        .map(|(load, count)| load / (*count).max(1) as f64)
        .collect();
    let held = &mut layers[layer];
    let mut loads: Vec<f64> = held
        .iter()
        .map(|held| held.iter().map(|e| each[usize::from(*e)]).sum())
        .collect();
    // Seconds of the busiest device, by its load.
    let per_load = if total > 0.0 {
        demand.choices * costs.expert_s * devices as f64 / total
    } else {
        0.0
    };
    for a in 0..devices {
        for b in a + 1..devices {
            // The busiest of the others bounds what this exchange can lower.
            let others = (0..devices).filter(|d| *d != a && *d != b);
            let floor = others.map(|d| loads[d]).fold(0.0, f64::max);
            for i in 0..held[a].len() {
                for j in 0..held[b].len() {
                    let (x, y) = (held[a][i], held[b][j]);
                    if x == y || held[a].contains(&y) || held[b].contains(&x) {
                        continue;
                    }
                    let at = |e: u16, d: usize| saved[usize::from(e) * devices + d];
                    let gained = at(x, b) + at(y, a) - at(x, a) - at(y, b);
                    let moved = each[usize::from(x)] - each[usize::from(y)];
                    let before = floor.max(loads[a]).max(loads[b]);
                    let after = floor.max(loads[a] - moved).max(loads[b] + moved);
                    if gained + per_load * (before - after) > 1e-15 {
                        held[a][i] = y;
                        held[b][j] = x;
                        loads[a] -= moved;
                        loads[b] += moved;
                    }
                }
            }
        }
    }
}

/// Seconds that a replica of every expert saves on every device, given the neighboring layers.
///
/// With replicas, several in a node count each: an approximation that [`refine`] checks in full.
fn saved(
    chain: &Chain,
    costs: Costs,
    layers: &[Vec<Vec<u16>>],
    layer: usize,
    counts: &[usize],
    per_node: usize,
) -> Vec<f64> {
    let devices = layers[layer].len();
    let experts = chain.experts;
    let mut saved = vec![0f64; experts * devices];
    let mut add = |shares: &[f32], other: &[Vec<u16>], weight: &dyn Fn(usize, usize) -> f64| {
        for (expert, saved) in saved.chunks_mut(devices).enumerate() {
            for (device, held) in other.iter().enumerate() {
                let kept: f64 = held
                    .iter()
                    .map(|to| {
                        let to = usize::from(*to);
                        f64::from(shares[expert * experts + to]) * weight(expert, to)
                    })
                    .sum();
                saved[device] += kept * costs.within_node_s;
                let node = device / per_node * per_node;
                for neighbor in &mut saved[node..node + per_node] {
                    *neighbor += kept * (costs.between_nodes_s - costs.within_node_s);
                }
            }
        }
    };
    if layer + 1 < layers.len() {
        let each = |expert: usize, _: usize| 1.0 / counts[expert].max(1) as f64;
        add(&chain.pairs[layer], &layers[layer + 1], &each);
    }
    if layer > 0 {
        let before = replica_counts(&layers[layer - 1], experts);
        let each = |_: usize, from: usize| 1.0 / before[from].max(1) as f64;
        add(&chain.reversed[layer - 1], &layers[layer - 1], &each);
    }
    saved
}
