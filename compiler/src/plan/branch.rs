//! Depth-first enumeration of what the bounds leave.
//!
//! Enters: a network, admissible potentials, and the seconds to beat. Leaves: the best assignment
//! below them, and whether all were looked at.
//! Invariant: a branch is left only when its bound or its bytes exclude everything below it.
//!
//! The bound of a partial assignment is that of the potentials, plus the excess of every choice over
//! the least of its node, plus the slack of every net whose ends are all chosen.

use super::dual::{Dual, least};
use super::network::Network;

/// What to enumerate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bounds {
    /// Bytes within which the two sums stay, whatever ops work on.
    pub room_bytes: f64,
    pub budget_bytes: f64,
    /// Only what costs less is of interest, and only by more than the gap.
    pub upper_s: f64,
    pub gap: f64,
    pub n_steps: usize,
}

/// What enumeration came to.
pub struct Enumerated {
    /// By position in the domains.
    pub assignment: Option<Vec<usize>>,
    pub is_complete: bool,
}

struct Walk<'a> {
    network: &'a Network,
    /// Nodes with a choice.
    free: Vec<usize>,
    /// Of every node, what its strategies cost above the least.
    excess: Vec<Vec<f64>>,
    /// Nets with potentials that are complete once the free node of this rank is chosen.
    closing: Vec<Vec<usize>>,
    dual: &'a Dual,
    /// Of the free nodes from a rank on, the least bytes.
    least_bytes_from: Vec<[f64; 2]>,
    budget_bytes: f64,
    limit_s: f64,
    gap: f64,
    n_steps_left: usize,
    assignment: Vec<usize>,
    best: Option<Vec<usize>>,
}

/// Enumerates assignments of less than `upper_s` seconds.
pub fn enumerate(network: &Network, dual: &Dual, bounds: &Bounds) -> Enumerated {
    let n_nodes = network.nodes.len();
    let mut reduced = Vec::new();
    let mut excess = Vec::with_capacity(n_nodes);
    for node in 0..n_nodes {
        dual.reduced(network, node, &mut reduced);
        let low = least(&reduced);
        excess.push(reduced.iter().map(|seconds| seconds - low).collect());
    }
    let free: Vec<usize> = (0..n_nodes)
        .filter(|node| network.nodes[*node].strategies.len() > 1)
        .collect();
    let mut rank_of = vec![0; n_nodes];
    for (rank, node) in free.iter().enumerate() {
        rank_of[*node] = rank + 1;
    }
    // By the rank after which they are complete; rank 0 is before any choice.
    let mut closing = vec![Vec::new(); free.len() + 1];
    for net in 0..network.nets.len() {
        let ends = network.edges_of(net).iter();
        let ranks = ends.flat_map(|edge| [rank_of[edge.maker], rank_of[edge.reader]]);
        closing[ranks.max().unwrap_or(0)].push(net);
    }
    let mut least_bytes_from = vec![[0.0; 2]; free.len() + 1];
    for (rank, node) in free.iter().enumerate().rev() {
        for row in 0..2 {
            let bytes = network.nodes[*node].bytes.iter().map(|bytes| bytes[row]);
            least_bytes_from[rank][row] =
                least_bytes_from[rank + 1][row] + bytes.fold(f64::INFINITY, f64::min);
        }
    }
    let mut walk = Walk {
        network,
        free,
        excess,
        closing,
        dual,
        least_bytes_from,
        budget_bytes: bounds.budget_bytes,
        limit_s: bounds.upper_s,
        gap: bounds.gap,
        n_steps_left: bounds.n_steps,
        assignment: vec![0; n_nodes],
        best: None,
    };
    let mut bytes = [0.0; 2];
    let mut working_bytes: f64 = 0.0;
    for node in network
        .nodes
        .iter()
        .filter(|node| node.strategies.len() == 1)
    {
        for (sum, n_bytes) in bytes.iter_mut().zip(node.bytes[0]) {
            *sum += n_bytes;
        }
        working_bytes = working_bytes.max(node.working_bytes[0]);
    }
    let start_s = dual.bound_s(network, bounds.room_bytes) + walk.slack_s(0);
    walk.go(0, start_s, bytes, working_bytes);
    Enumerated {
        is_complete: walk.n_steps_left > 0,
        assignment: walk.best,
    }
}

impl Walk<'_> {
    /// What the nets that are complete after a rank cost above their potentials.
    fn slack_s(&self, rank: usize) -> f64 {
        let slack = |net: &usize| {
            let known: f64 = self
                .network
                .edges_of(*net)
                .iter()
                .zip(self.network.nets[*net].first_edge..)
                .map(|(edge, edge_idx)| {
                    let potential = &self.dual.potentials[edge_idx];
                    let read = edge.read[self.assignment[edge.reader]];
                    let made = edge.made[self.assignment[edge.maker]];
                    potential[usize::from(read)] - potential[usize::from(made)]
                })
                .sum();
            (self.network.net_seconds(*net, &self.assignment) - known).max(0.0)
        };
        self.closing[rank].iter().map(slack).sum()
    }

    fn go(&mut self, rank: usize, bound_s: f64, bytes: [f64; 2], working_bytes: f64) {
        let Some(node_idx) = self.free.get(rank).copied() else {
            let cost = self.network.cost(&self.assignment);
            if cost.peak_bytes() <= self.budget_bytes && cost.seconds < self.limit_s {
                self.limit_s = cost.seconds;
                self.best = Some(self.assignment.clone());
            }
            return;
        };
        let node = &self.network.nodes[node_idx];
        let mut branches = Vec::with_capacity(node.strategies.len());
        for choice in 0..node.strategies.len() {
            let excess_s = self.excess[node_idx][choice];
            if bound_s + excess_s >= self.limit_s * (1.0 - self.gap) {
                continue;
            }
            let rest = self.least_bytes_from[rank + 1];
            let working_bytes = working_bytes.max(node.working_bytes[choice]);
            let mut sums = bytes;
            let mut is_over = false;
            for row in 0..2 {
                sums[row] += node.bytes[choice][row];
                is_over |=
                    sums[row] + rest[row] + working_bytes > self.budget_bytes * (1.0 + 1e-12);
            }
            if is_over {
                continue;
            }
            self.n_steps_left = self.n_steps_left.saturating_sub(1);
            self.assignment[node_idx] = choice;
            let bound_s = bound_s + excess_s + self.slack_s(rank + 1);
            branches.push((bound_s, choice, sums, working_bytes));
        }
        branches.sort_by(|a, b| a.0.total_cmp(&b.0));
        for (bound_s, choice, sums, working_bytes) in branches {
            if self.n_steps_left == 0 {
                return;
            }
            if bound_s >= self.limit_s * (1.0 - self.gap) {
                return;
            }
            self.assignment[node_idx] = choice;
            self.go(rank + 1, bound_s, sums, working_bytes);
        }
    }
}
