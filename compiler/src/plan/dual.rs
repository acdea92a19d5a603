//! Lower bounds by potentials, and assignments read off them.
//!
//! Enters: a [`Network`]. Leaves: for each edge a potential of every layout, and prices of memory, that
//! together prove a lower bound which anyone can add up again without a solver.
//! Invariant: potentials are *admissible*: on every reshard of a net the rises of its edges' potentials
//! sum to no more than its seconds. A net then costs at least what its readers' potentials are above
//! the maker's, so the cheapest reduced strategy of every node, summed, bounds every assignment.
//!
//! This is the dual of the flow relaxation (a unit of flow from the maker's layouts to each reader's,
//! paying once for what readers share). It is climbed node by node as in tree-reweighted message
//! passing (Kolmogorov 2006, TRW-S): a node spreads its reduced costs evenly over the edges ahead.
//! Memory is a constraint over all nodes; it enters by Lagrange multipliers.

use super::network::{Edge, End, Network, Reshards, Wire};

/// Admissible potentials with prices of memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Dual {
    /// Of every edge, seconds by layout of its net.
    pub potentials: Vec<Vec<f64>>,
    /// Seconds a byte, at the turn and at the end of backward.
    pub byte_prices: [f64; 2],
    /// Of every net of several readers, the seconds of each arc that potentials use.
    used: Vec<Vec<f64>>,
}

/// Which way a sweep goes through the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Forward,
    Backward,
}

impl Dual {
    /// Potentials of zero: admissible, and proving the compute alone.
    pub fn new(network: &Network) -> Self {
        let n_codes = |net: usize| network.nets[net].reshards.n_codes;
        Self {
            potentials: network
                .edges
                .iter()
                .map(|edge| vec![0.0; n_codes(edge.net)])
                .collect(),
            byte_prices: [0.0; 2],
            used: network
                .nets
                .iter()
                .map(|net| {
                    let n_arcs = net.reshards.arcs.len();
                    vec![0.0; if net.n_edges > 1 { n_arcs } else { 0 }]
                })
                .collect(),
        }
    }

    /// Stored potentials; `None` where they are not those of the edges of the network.
    pub fn stored(
        network: &Network,
        potentials: &[Vec<f64>],
        byte_prices: [f64; 2],
    ) -> Option<Self> {
        let zero = Self::new(network);
        let mut pairs = potentials.iter().zip(&zero.potentials);
        let is_same = potentials.len() == zero.potentials.len()
            && pairs.all(|(stored, own)| stored.len() == own.len())
            && potentials.iter().flatten().all(|value| value.is_finite())
            && byte_prices.iter().all(|price| *price >= 0.0);
        is_same.then(|| Self {
            potentials: potentials.to_vec(),
            byte_prices,
            ..zero
        })
    }

    /// Seconds of the strategies of a node after potentials and byte prices.
    pub fn reduced(&self, network: &Network, node: usize, reduced: &mut Vec<f64>) {
        let node = &network.nodes[node];
        let [turn, end] = self.byte_prices;
        reduced.clear();
        let bytes = node.bytes.iter();
        reduced.extend(
            node.seconds
                .iter()
                .zip(bytes)
                .map(|(seconds, bytes)| seconds + turn * bytes[0] + end * bytes[1]),
        );
        for (edge_idx, side) in &node.edges {
            let potential = &self.potentials[*edge_idx];
            let edge = &network.edges[*edge_idx];
            match side {
                End::Reader => {
                    for (value, code) in reduced.iter_mut().zip(&edge.read) {
                        *value += potential[usize::from(*code)];
                    }
                }
                End::Maker => {
                    for (value, code) in reduced.iter_mut().zip(&edge.made) {
                        *value -= potential[usize::from(*code)];
                    }
                }
            }
        }
    }

    /// No assignment whose bytes keep the budgets costs less.
    pub fn bound_s(&self, network: &Network, budget_bytes: f64) -> f64 {
        let mut reduced = Vec::new();
        let mut sum = 0.0;
        for node in 0..network.nodes.len() {
            self.reduced(network, node, &mut reduced);
            sum += least(&reduced);
        }
        if budget_bytes.is_finite() {
            sum -= (self.byte_prices[0] + self.byte_prices[1]) * budget_bytes;
        }
        sum
    }

    /// The most seconds by which the potentials overdraw a reshard; 0 where they are admissible.
    pub fn overdraft_s(&self, network: &Network) -> f64 {
        let mut worst: f64 = 0.0;
        for net in &network.nets {
            let reshards = &net.reshards;
            let potentials = &self.potentials[net.first_edge..net.first_edge + net.n_edges];
            let mut draw = |from: usize, to: usize, seconds: f64| {
                let rises = potentials
                    .iter()
                    .map(|potential| (potential[to] - potential[from]).max(0.0));
                worst = worst.max(rises.sum::<f64>() - net.weight * seconds);
            };
            if net.n_edges > 1 {
                for arc in &reshards.arcs {
                    draw(usize::from(arc.from), usize::from(arc.to), arc.seconds);
                }
            } else {
                let n = reshards.n_codes;
                for (at, seconds) in reshards.seconds.iter().enumerate() {
                    draw(at / n, at % n, *seconds);
                }
            }
        }
        worst
    }

    /// One sweep over all nodes. It also reads off an assignment, each node choosing with what the nodes
    /// before it chose.
    pub fn sweep(&mut self, network: &Network, direction: Direction) -> Vec<usize> {
        let n_nodes = network.nodes.len();
        let mut chosen: Vec<Option<usize>> = vec![None; n_nodes];
        let (mut reduced, mut least_of, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for step in 0..n_nodes {
            let node_idx = match direction {
                Direction::Forward => step,
                Direction::Backward => n_nodes - 1 - step,
            };
            let node = &network.nodes[node_idx];
            self.reduced(network, node_idx, &mut reduced);
            chosen[node_idx] = Some(self.choose(network, node_idx, &reduced, &chosen));
            let is_ahead = |edge: &Edge, end: End| {
                let other = match end {
                    End::Maker => edge.reader,
                    End::Reader => edge.maker,
                };
                (other > node_idx) == (direction == Direction::Forward)
            };
            let edges = node.edges.iter();
            let n_ahead = edges
                .filter(|(edge, end)| is_ahead(&network.edges[*edge], *end))
                .count();
            let share = 1.0 / n_ahead.max(node.edges.len() - n_ahead).max(1) as f64;
            for (edge_idx, end) in &node.edges {
                let edge = &network.edges[*edge_idx];
                if !is_ahead(edge, *end) {
                    continue;
                }
                let codes = match end {
                    End::Maker => &edge.made,
                    End::Reader => &edge.read,
                };
                least_of.clear();
                least_of.resize(network.nets[edge.net].reshards.n_codes, f64::INFINITY);
                for (seconds, code) in reduced.iter().zip(codes) {
                    let least = &mut least_of[usize::from(*code)];
                    *least = least.min(*seconds);
                }
                let all_least = least(&least_of);
                let sign = match end {
                    End::Maker => share,
                    End::Reader => -share,
                };
                let potential = &self.potentials[*edge_idx];
                values.clear();
                values.extend(least_of.iter().zip(potential).map(|(least, before)| {
                    if least.is_finite() {
                        before + sign * (least - all_least)
                    } else {
                        // Not a layout of this end: whatever the others admit.
                        sign * f64::INFINITY
                    }
                }));
                self.raise(
                    &network.nets[edge.net],
                    *edge_idx,
                    edge.net,
                    *end,
                    &mut values,
                );
            }
        }
        chosen.into_iter().map(Option::unwrap_or_default).collect()
    }

    /// Makes the wished values of one edge admissible beside the other edges of its net: the highest
    /// potentials that do not rise above the maker's, or the lowest that do not fall below the reader's.
    fn raise(&mut self, net: &Wire, edge_idx: usize, net_idx: usize, end: End, values: &mut [f64]) {
        let potential = &mut self.potentials[edge_idx];
        if net.n_edges == 1 {
            match end {
                End::Maker => spread_from(&net.reshards, net.weight, values, potential),
                End::Reader => spread_to(&net.reshards, net.weight, values, potential),
            }
        } else {
            let used = &mut self.used[net_idx];
            let arcs = &net.reshards.arcs;
            let rise = |potential: &[f64], from: u16, to: u16| {
                (potential[usize::from(to)] - potential[usize::from(from)]).max(0.0)
            };
            for (used, arc) in used.iter_mut().zip(arcs) {
                *used = (*used - rise(potential, arc.from, arc.to)).max(0.0);
            }
            let free =
                |arc_idx: usize| (net.weight * arcs[arc_idx].seconds - used[arc_idx]).max(0.0);
            settle(&net.reshards, values, end, free);
            potential.copy_from_slice(values);
        }
        clamp(potential, end);
        if net.n_edges > 1 {
            let potential = &self.potentials[edge_idx];
            for (used, arc) in self.used[net_idx].iter_mut().zip(&net.reshards.arcs) {
                *used +=
                    (potential[usize::from(arc.to)] - potential[usize::from(arc.from)]).max(0.0);
            }
        }
    }

    /// The best strategy of a node beside the choices of the nodes before it.
    fn choose(
        &self,
        network: &Network,
        node: usize,
        reduced: &[f64],
        chosen: &[Option<usize>],
    ) -> usize {
        let mut costs = reduced.to_vec();
        for (edge_idx, end) in &network.nodes[node].edges {
            let edge = &network.edges[*edge_idx];
            let net = &network.nets[edge.net];
            let potential = &self.potentials[*edge_idx];
            match end {
                End::Reader => {
                    let Some(maker) = chosen[edge.maker] else {
                        continue;
                    };
                    // Where the tensor is already: with its maker and the readers so far.
                    let mut there: Vec<u16> = vec![edge.made[maker]];
                    for other in network.edges_of(edge.net) {
                        there.extend(chosen[other.reader].map(|choice| other.read[choice]));
                    }
                    there.sort_unstable();
                    there.dedup();
                    for (cost, code) in costs.iter_mut().zip(&edge.read) {
                        let ways = there.iter().map(|from| net.reshards.between(*from, *code));
                        let seconds = ways.fold(f64::INFINITY, f64::min);
                        *cost += net.weight * seconds - potential[usize::from(*code)];
                    }
                }
                End::Maker => {
                    let Some(reader) = chosen[edge.reader] else {
                        continue;
                    };
                    let to = edge.read[reader];
                    for (cost, code) in costs.iter_mut().zip(&edge.made) {
                        let seconds = net.reshards.between(*code, to);
                        *cost += net.weight * seconds + potential[usize::from(*code)];
                    }
                }
            }
        }
        first_least(&costs)
    }

    /// Marks the strategies that a bound of `slack_s` above the least keeps.
    pub fn within(&self, network: &Network, slack_s: f64) -> Vec<Vec<bool>> {
        let mut reduced = Vec::new();
        (0..network.nodes.len())
            .map(|node| {
                self.reduced(network, node, &mut reduced);
                let limit = least(&reduced) + slack_s;
                reduced.iter().map(|seconds| *seconds <= limit).collect()
            })
            .collect()
    }
}

/// The least of some values; infinite when there are none.
pub fn least(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

/// The first of the least values, up to rounding.
pub fn first_least(values: &[f64]) -> usize {
    let limit = least(values);
    let limit = limit + 1e-12 * limit.abs();
    values.iter().position(|value| *value <= limit).unwrap_or(0)
}

/// `to[b] = min over a of from[a] + weight · seconds(a, b)`.
fn spread_from(reshards: &Reshards, weight: f64, from: &[f64], to: &mut [f64]) {
    to.fill(f64::INFINITY);
    for (code, value) in from.iter().enumerate() {
        if value.is_finite() {
            let row = &reshards.seconds[code * to.len()..(code + 1) * to.len()];
            for (best, seconds) in to.iter_mut().zip(row) {
                *best = best.min(value + weight * seconds);
            }
        }
    }
}

/// `from[a] = max over b of to[b] − weight · seconds(a, b)`.
fn spread_to(reshards: &Reshards, weight: f64, to: &[f64], from: &mut [f64]) {
    for (row, best) in reshards.seconds.chunks(to.len()).zip(from) {
        let ways = row
            .iter()
            .zip(to)
            .map(|(seconds, value)| value - weight * seconds);
        *best = ways.fold(f64::NEG_INFINITY, f64::max);
    }
}

/// The same over what is free of the arcs: a shortest path from all finite values (Dijkstra on a dense
/// graph; a net has few layouts).
fn settle(reshards: &Reshards, values: &mut [f64], end: End, free: impl Fn(usize) -> f64) {
    let sign = match end {
        End::Maker => 1.0,
        End::Reader => -1.0,
    };
    let mut is_settled = vec![false; values.len()];
    loop {
        let mut next = None;
        for (code, value) in values.iter().enumerate() {
            let is_better = |best: usize| sign * value < sign * values[best];
            if !is_settled[code] && value.is_finite() && next.is_none_or(is_better) {
                next = Some(code);
            }
        }
        let Some(code) = next else { return };
        is_settled[code] = true;
        for (arc_idx, arc) in reshards.arcs_at(code, end) {
            let other = usize::from(match end {
                End::Maker => arc.to,
                End::Reader => arc.from,
            });
            let value = values[code] + sign * free(arc_idx);
            if !is_settled[other] && sign * value < sign * values[other] {
                values[other] = value;
            }
        }
    }
}

/// Layouts that are out of reach get the last finite value: nothing constrains them beyond it.
fn clamp(potential: &mut [f64], end: End) {
    let finite = potential.iter().copied().filter(|value| value.is_finite());
    let last = match end {
        End::Maker => finite.fold(f64::NEG_INFINITY, f64::max),
        End::Reader => finite.fold(f64::INFINITY, f64::min),
    };
    for value in potential {
        if !value.is_finite() {
            *value = if last.is_finite() { last } else { 0.0 };
        }
    }
}
