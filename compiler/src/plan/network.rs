//! The planning problem as numbers: nodes that choose a strategy, nets that price their layouts.
//!
//! Enters: costs, bytes and layouts of strategies, and reshard prices. Leaves: the price of any
//! assignment, and smaller domains.
//! Invariant: removing a strategy never removes all assignments of finite price that are at least as
//! good as the limit it was removed under.

use std::rc::Rc;

/// Reshard prices among the layouts (by index) that meet on a net.
#[derive(Clone, Debug, PartialEq)]
pub struct Reshards {
    pub n_codes: usize,
    /// Seconds from each layout to each, row by row; infinite where there is no way.
    pub seconds: Vec<f64>,
    /// The reshards that no other layout of the net lies on, for nets of several readers: their closure
    /// has the price of every pair.
    pub arcs: Vec<Hop>,
    /// Where the arcs into each layout stand in `arcs`; those out of one are together.
    into: Vec<Vec<u32>>,
    out_of: Vec<std::ops::Range<usize>>,
}

/// A reshard between two layouts without a stop.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hop {
    pub from: u16,
    pub to: u16,
    pub seconds: f64,
}

impl Reshards {
    /// Seconds of one reshard.
    pub fn between(&self, from: u16, to: u16) -> f64 {
        self.seconds[usize::from(from) * self.n_codes + usize::from(to)]
    }

    /// Prices with their arcs. Quadratic in the number of layouts, times the arcs of one.
    pub fn new(n_codes: usize, seconds: Vec<f64>, has_arcs: bool) -> Self {
        let mut arcs: Vec<Hop> = Vec::new();
        let mut nearest: Vec<usize> = Vec::with_capacity(n_codes);
        for from in 0..if has_arcs { n_codes } else { 0 } {
            let row = &seconds[from * n_codes..(from + 1) * n_codes];
            nearest.clear();
            nearest.extend((0..n_codes).filter(|to| *to != from && row[*to].is_finite()));
            nearest.sort_by(|a, b| row[*a].total_cmp(&row[*b]));
            let first_arc = arcs.len();
            for to in &nearest {
                // The first stop of a detour is itself no detour, and nearer.
                let is_detour = arcs[first_arc..].iter().any(|arc| {
                    let rest = seconds[usize::from(arc.to) * n_codes + to];
                    arc.seconds > 0.0 && arc.seconds + rest <= row[*to] * (1.0 + 1e-9)
                });
                if !is_detour {
                    arcs.push(Hop {
                        from: from as u16,
                        to: *to as u16,
                        seconds: row[*to],
                    });
                }
            }
        }
        let mut into = vec![Vec::new(); n_codes];
        let mut out_of = vec![0..0; n_codes];
        for (arc_idx, arc) in arcs.iter().enumerate() {
            into[usize::from(arc.to)].push(arc_idx as u32);
            let out = &mut out_of[usize::from(arc.from)];
            let start = if out.start == out.end {
                arc_idx
            } else {
                out.start
            };
            *out = start..arc_idx + 1;
        }
        Self {
            n_codes,
            seconds,
            arcs,
            into,
            out_of,
        }
    }

    /// The arcs out of a layout (of a maker) or into one (of a reader), with their numbers.
    pub fn arcs_at(&self, code: usize, end: End) -> impl Iterator<Item = (usize, &Hop)> {
        let (range, list) = match end {
            End::Maker => (self.out_of[code].clone(), &[][..]),
            End::Reader => (0..0, self.into[code].as_slice()),
        };
        let numbers = range.chain(list.iter().map(|arc_idx| *arc_idx as usize));
        numbers.map(|arc_idx| (arc_idx, &self.arcs[arc_idx]))
    }
}

/// One choice to make.
#[derive(Clone, Debug, Default)]
pub struct Node {
    /// The strategies still allowed, by their numbers in the instance.
    pub strategies: Vec<usize>,
    /// Seconds of each.
    pub seconds: Vec<f64>,
    /// Bytes of each at the turn from forward to backward, and at the end of backward.
    pub bytes: Vec<[f64; 2]>,
    /// Bytes that each works on.
    pub working_bytes: Vec<f64>,
    /// Edges that end here, and whether as their reader.
    pub edges: Vec<(usize, End)>,
}

/// The side of an edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Maker,
    Reader,
}

/// A maker and one of its readers.
#[derive(Clone, Debug)]
pub struct Edge {
    pub net: usize,
    pub maker: usize,
    pub reader: usize,
    /// The layout, by index in the net, of each strategy of the maker and of the reader.
    pub made: Vec<u16>,
    pub read: Vec<u16>,
}

/// A tensor between its maker and its readers in one phase.
#[derive(Clone, Debug)]
pub struct Wire {
    pub weight: f64,
    pub reshards: Rc<Reshards>,
    pub first_edge: usize,
    pub n_edges: usize,
}

/// The whole problem.
#[derive(Clone, Debug, Default)]
pub struct Network {
    pub nodes: Vec<Node>,
    pub nets: Vec<Wire>,
    pub edges: Vec<Edge>,
}

/// What an assignment costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    pub seconds: f64,
    pub bytes: [f64; 2],
    pub working_bytes: f64,
}

impl Cost {
    /// Bytes at the worst moment.
    pub fn peak_bytes(&self) -> f64 {
        self.bytes[0].max(self.bytes[1]) + self.working_bytes
    }
}

impl Network {
    /// The edges of a net.
    pub fn edges_of(&self, net: usize) -> &[Edge] {
        let net = &self.nets[net];
        &self.edges[net.first_edge..net.first_edge + net.n_edges]
    }

    /// Seconds of the reshards of a net under an assignment (by position in the domains).
    pub fn net_seconds(&self, net: usize, assignment: &[usize]) -> f64 {
        let edges = self.edges_of(net);
        let from = edges[0].made[assignment[edges[0].maker]];
        let Wire {
            weight, reshards, ..
        } = &self.nets[net];
        if let [edge] = edges {
            return weight * reshards.between(from, edge.read[assignment[edge.reader]]);
        }
        let mut targets: Vec<u16> = edges
            .iter()
            .map(|edge| edge.read[assignment[edge.reader]])
            .filter(|to| *to != from)
            .collect();
        targets.sort_unstable();
        targets.dedup();
        weight * shared_seconds(reshards, from, &targets)
    }

    /// The cost of an assignment (by position in the domains).
    pub fn cost(&self, assignment: &[usize]) -> Cost {
        let mut cost = Cost {
            seconds: 0.0,
            bytes: [0.0; 2],
            working_bytes: 0.0,
        };
        for (node, choice) in self.nodes.iter().zip(assignment) {
            cost.seconds += node.seconds[*choice];
            for (sum, n_bytes) in cost.bytes.iter_mut().zip(node.bytes[*choice]) {
                *sum += n_bytes;
            }
            cost.working_bytes = cost.working_bytes.max(node.working_bytes[*choice]);
        }
        for net in 0..self.nets.len() {
            cost.seconds += self.net_seconds(net, assignment);
        }
        cost
    }

    /// What a budget leaves besides the bytes that some op works on in any assignment.
    pub fn room_bytes(&self, budget_bytes: f64) -> f64 {
        let working = self.nodes.iter().map(|node| {
            let least = node.working_bytes.iter().copied();
            least.fold(f64::INFINITY, f64::min)
        });
        budget_bytes - working.fold(0.0, f64::max)
    }

    /// The distinct nets at a node, in order.
    pub fn nets_at(&self, node: usize) -> Vec<usize> {
        let edges = self.nodes[node].edges.iter();
        let mut nets: Vec<usize> = edges.map(|(edge, _)| self.edges[*edge].net).collect();
        nets.dedup();
        nets.sort_unstable();
        nets.dedup();
        nets
    }

    /// Keeps the marked strategies of every node.
    pub fn restrict(&mut self, keeps: &[Vec<bool>]) {
        fn filter<T>(values: &mut Vec<T>, keep: &[bool]) {
            let mut kept = keep.iter();
            values.retain(|_| kept.next().copied().unwrap_or(true));
        }
        for (node_idx, keep) in keeps.iter().enumerate() {
            if keep.iter().all(|keep| *keep) {
                continue;
            }
            let node = &mut self.nodes[node_idx];
            filter(&mut node.strategies, keep);
            filter(&mut node.seconds, keep);
            filter(&mut node.bytes, keep);
            filter(&mut node.working_bytes, keep);
            for (edge, end) in &node.edges {
                let edge = &mut self.edges[*edge];
                match end {
                    End::Maker => filter(&mut edge.made, keep),
                    End::Reader => filter(&mut edge.read, keep),
                }
            }
        }
    }

    /// Removes strategies that no strategy at the other end of some edge can be brought to, until
    /// none is left; `false` when a node loses its last.
    pub fn make_consistent(&mut self) -> bool {
        loop {
            let mut keeps: Vec<Vec<bool>> = self
                .nodes
                .iter()
                .map(|node| vec![true; node.strategies.len()])
                .collect();
            let mut is_changed = false;
            for edge in &self.edges {
                let reshards = &self.nets[edge.net].reshards;
                let n = reshards.n_codes;
                let (mut is_made, mut is_read) = (vec![false; n], vec![false; n]);
                edge.made
                    .iter()
                    .for_each(|c| is_made[usize::from(*c)] = true);
                edge.read
                    .iter()
                    .for_each(|c| is_read[usize::from(*c)] = true);
                let (mut reaches, mut is_reached) = (vec![false; n], vec![false; n]);
                for from in (0..n).filter(|from| is_made[*from]) {
                    for to in (0..n).filter(|to| is_read[*to]) {
                        let is_way = reshards.seconds[from * n + to].is_finite();
                        reaches[from] |= is_way;
                        is_reached[to] |= is_way;
                    }
                }
                for (keep, code) in keeps[edge.maker].iter_mut().zip(&edge.made) {
                    is_changed |= *keep && !reaches[usize::from(*code)];
                    *keep &= reaches[usize::from(*code)];
                }
                for (keep, code) in keeps[edge.reader].iter_mut().zip(&edge.read) {
                    is_changed |= *keep && !is_reached[usize::from(*code)];
                    *keep &= is_reached[usize::from(*code)];
                }
            }
            if keeps.iter().any(|keep| !keep.contains(&true)) {
                return false;
            }
            if !is_changed {
                return true;
            }
            self.restrict(&keeps);
        }
    }
}

/// Seconds of bringing a tensor from one layout to several distinct others, sharing what lies on the
/// way: a cheapest Steiner arborescence (Dreyfus and Wagner 1971).
/// Exponential in the number of targets, which is small.
pub fn shared_seconds(reshards: &Reshards, from: u16, targets: &[u16]) -> f64 {
    match targets {
        [] => return 0.0,
        [one] => return reshards.between(from, *one),
        [one, two] => {
            let n = reshards.n_codes;
            let row = &reshards.seconds[usize::from(from) * n..(usize::from(from) + 1) * n];
            let ways = row.iter().enumerate().map(|(via, seconds)| {
                seconds + reshards.between(via as u16, *one) + reshards.between(via as u16, *two)
            });
            return ways.fold(f64::INFINITY, f64::min);
        }
        _ => {}
    }
    let n = reshards.n_codes;
    let n_sets = 1_usize << targets.len();
    // best[set · n + node]: the cheapest tree from the node to all targets of the set.
    let mut best = vec![f64::INFINITY; n_sets * n];
    let mut here = vec![f64::INFINITY; n];
    for set in 1..n_sets {
        here.fill(f64::INFINITY);
        if set.is_power_of_two() {
            here[usize::from(targets[set.trailing_zeros() as usize])] = 0.0;
        } else {
            let mut part = (set - 1) & set;
            while part > 0 {
                let rest = set & !part;
                if part >= rest {
                    for (node, seconds) in here.iter_mut().enumerate() {
                        *seconds = seconds.min(best[part * n + node] + best[rest * n + node]);
                    }
                }
                part = (part - 1) & set;
            }
        }
        for node in 0..n {
            let row = &reshards.seconds[node * n..(node + 1) * n];
            let ways = row.iter().zip(&here).map(|(there, rest)| there + rest);
            best[set * n + node] = ways.fold(f64::INFINITY, f64::min);
        }
    }
    best[(n_sets - 1) * n + usize::from(from)]
}
