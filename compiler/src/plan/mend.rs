//! Better assignments from those at hand.
//!
//! Enters: a network and assignments (by position in its domains). Leaves: cheaper ones that fit.
//! Invariant: what leaves costs no more than what entered, and fits where that did.

use super::network::Network;

/// Between an assignment that fits and a cheaper one that does not: of the parts in which they differ
/// and that share no net, those that save most a byte are taken over while they fit.
pub fn relink(
    network: &Network,
    fits: &[usize],
    cheaper: &[usize],
    budget_bytes: f64,
) -> Vec<usize> {
    let n_nodes = network.nodes.len();
    let mut part_of: Vec<usize> = (0..n_nodes).collect();
    let differs = |node: usize| fits[node] != cheaper[node];
    for net in 0..network.nets.len() {
        let edges = network.edges_of(net).iter();
        let ends = edges.flat_map(|edge| [edge.maker, edge.reader]);
        let mut ends = ends.filter(|node| differs(*node));
        if let Some(first) = ends.next() {
            for other in ends {
                let (a, b) = (root(&mut part_of, first), root(&mut part_of, other));
                part_of[a.max(b)] = a.min(b);
            }
        }
    }
    let mut parts: Vec<Vec<usize>> = vec![Vec::new(); n_nodes];
    for node in (0..n_nodes).filter(|node| differs(*node)) {
        parts[root(&mut part_of, node)].push(node);
    }
    let mut mixed = fits.to_vec();
    let start = network.cost(fits);
    // Seconds and bytes that each part adds.
    let mut gains: Vec<(f64, [f64; 2], f64, Vec<usize>)> = Vec::new();
    for part in parts.into_iter().filter(|part| !part.is_empty()) {
        let mut nets: Vec<usize> = part
            .iter()
            .flat_map(|node| network.nets_at(*node))
            .collect();
        nets.sort_unstable();
        nets.dedup();
        let nets_s = |assignment: &[usize]| -> f64 {
            nets.iter()
                .map(|net| network.net_seconds(*net, assignment))
                .sum()
        };
        let mut seconds = -nets_s(&mixed);
        let (mut bytes, mut working_bytes) = ([0.0; 2], 0.0_f64);
        for node_idx in &part {
            let node = &network.nodes[*node_idx];
            let (old, new) = (fits[*node_idx], cheaper[*node_idx]);
            seconds += node.seconds[new] - node.seconds[old];
            for (row, sum) in bytes.iter_mut().enumerate() {
                *sum += node.bytes[new][row] - node.bytes[old][row];
            }
            working_bytes = working_bytes.max(node.working_bytes[new]);
            mixed[*node_idx] = new;
        }
        seconds += nets_s(&mixed);
        part.iter().for_each(|node| mixed[*node] = fits[*node]);
        if seconds < 0.0 {
            gains.push((seconds, bytes, working_bytes, part));
        }
    }
    let a_byte =
        |gain: &(f64, [f64; 2], f64, Vec<usize>)| gain.0 / gain.1[0].max(gain.1[1]).max(1.0);
    gains.sort_by(|a, b| a_byte(a).total_cmp(&a_byte(b)));
    let mut sums = start.bytes;
    let mut most_working = start.working_bytes;
    for (_, bytes, working_bytes, part) in gains {
        let next = [sums[0] + bytes[0], sums[1] + bytes[1]];
        let working_bytes = working_bytes.max(most_working);
        if next[0].max(next[1]) + working_bytes <= budget_bytes {
            (sums, most_working) = (next, working_bytes);
            part.iter().for_each(|node| mixed[*node] = cheaper[*node]);
        }
    }
    mixed
}

fn root(part_of: &mut [usize], mut node: usize) -> usize {
    while part_of[node] != node {
        part_of[node] = part_of[part_of[node]];
        node = part_of[node];
    }
    node
}

/// Changes one node at a time for as long as that saves seconds and fits.
pub fn polish(network: &Network, assignment: &mut [usize], budget_bytes: f64) {
    let nets: Vec<Vec<usize>> = (0..network.nodes.len())
        .map(|node| network.nets_at(node))
        .collect();
    let mut cost = network.cost(assignment);
    for _ in 0..8 {
        let before_s = cost.seconds;
        for (node_idx, node) in network.nodes.iter().enumerate() {
            let old = assignment[node_idx];
            let nets_s = |assignment: &[usize]| -> f64 {
                let nets = nets[node_idx].iter();
                nets.map(|net| network.net_seconds(*net, assignment)).sum()
            };
            let old_s = node.seconds[old] + nets_s(assignment);
            let (mut best, mut best_s) = (old, old_s - 1e-12 * old_s.abs());
            for choice in (0..node.strategies.len()).filter(|choice| *choice != old) {
                let over =
                    |row: usize| cost.bytes[row] + node.bytes[choice][row] - node.bytes[old][row];
                let working_bytes = cost.working_bytes.max(node.working_bytes[choice]);
                if node.seconds[choice] >= best_s
                    || over(0).max(over(1)) + working_bytes > budget_bytes
                {
                    continue;
                }
                assignment[node_idx] = choice;
                let seconds = node.seconds[choice] + nets_s(assignment);
                if seconds < best_s {
                    (best, best_s) = (choice, seconds);
                }
            }
            assignment[node_idx] = best;
            if best != old {
                cost.seconds += best_s - old_s;
                for row in 0..2 {
                    cost.bytes[row] += node.bytes[best][row] - node.bytes[old][row];
                }
                cost.working_bytes = cost.working_bytes.max(node.working_bytes[best]);
            }
        }
        if cost.seconds >= before_s {
            return;
        }
    }
}
