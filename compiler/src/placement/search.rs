//! Affinity placement at any size: alternating transport, then re-splitting of pairs of groups.
//!
//! Enters: a chain and a number of groups. Leaves: a division, good but not proven here.
//! Invariant: every step keeps at least as much as the one before it; the same chain and options
//! give the same division, whatever the machine and the number of threads.

use meshweave_dsl::trace::synth::Random;

use super::assign::assign;
use super::chain::{Chain, Division, Levels};
use super::split::{MOST_MOVABLE, Splitter};
use crate::parallel::{available, in_parallel};

/// How long to search, counted in steps and never in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SearchOptions {
    /// Rounds over all layers of alternating transport.
    pub sweeps: usize,
    /// Rounds over all pairs of groups.
    pub rounds: usize,
    /// Independent starts, of which the best goes on to re-splitting.
    pub starts: usize,
    /// Threads.
    pub threads: usize,
    pub seed: u64,
}

impl Default for SearchOptions {
    fn default() -> Self {
        Self {
            sweeps: 12,
            rounds: 6,
            starts: 2,
            threads: available(),
            seed: 0,
        }
    }
}

/// A good division of a chain.
pub fn search(chain: &Chain, levels: &Levels, options: &SearchOptions) -> Division {
    let mut best: Option<(f64, Division)> = None;
    for start in 0..options.starts.max(1) {
        let mut division = first(chain, levels, start, options.seed);
        alternate(chain, levels, &mut division, options.sweeps);
        let value = levels.value(chain, &division);
        if best.as_ref().is_none_or(|(most, _)| value > *most) {
            best = Some((value, division));
        }
    }
    let Some((_, mut division)) = best else {
        return chain.linear(levels.groups);
    };
    improve(chain, levels, &mut division, options);
    division
}

/// Improves a division by re-splitting pairs of groups until a round gains next to nothing.
pub fn improve(chain: &Chain, levels: &Levels, division: &mut Division, options: &SearchOptions) {
    /// Gain of a round, relative to all there is, below which the next one is not begun.
    const LEAST_GAIN: f64 = 1e-5;
    let total = chain.total() * (levels.same_device + levels.same_node);
    for round in 0..options.rounds {
        let gain = resplit_all(chain, levels, division, options, round);
        alternate(chain, levels, division, 2);
        if gain <= LEAST_GAIN * total {
            break;
        }
    }
}

/// A first division: groups of experts with like successors (or shuffled ones), carried through the
/// layers by transport.
fn first(chain: &Chain, levels: &Levels, start: usize, seed: u64) -> Division {
    let groups = levels.groups;
    let mut division = chain.linear(groups);
    if chain.layers < 2 {
        return division;
    }
    // Where the carrying starts: at the first layer, the middle, …
    let origin = start * (chain.layers - 1) / 2 % chain.layers;
    division[origin] = cluster(chain, groups, origin, seed.wrapping_add(start as u64));
    for layer in origin + 1..chain.layers {
        let profits = profits(chain, levels, &division, layer, Side::Before);
        division[layer] = assign(&profits, groups, chain.experts / groups).column_of;
    }
    for layer in (0..origin).rev() {
        let profits = profits(chain, levels, &division, layer, Side::After);
        division[layer] = assign(&profits, groups, chain.experts / groups).column_of;
    }
    division
}

/// Groups a layer's experts greedily by how alike their rows of transitions are.
fn cluster(chain: &Chain, groups: usize, layer: usize, seed: u64) -> Vec<u16> {
    let experts = chain.experts;
    let size = experts / groups;
    let rows = if layer + 1 < chain.layers {
        &chain.pairs[layer]
    } else {
        &chain.reversed[layer - 1]
    };
    let row = |expert: usize| &rows[expert * experts..(expert + 1) * experts];
    let mut order: Vec<usize> = (0..experts).collect();
    Random::new(seed).shuffle(&mut order);
    let mut group_of = vec![u16::MAX; experts];
    let mut sum = vec![0f32; experts];
    for group in 0..groups {
        sum.fill(0.0);
        for _ in 0..size {
            let free = order.iter().filter(|expert| group_of[**expert] == u16::MAX);
            let alike =
                |expert: usize| -> f32 { row(expert).iter().zip(&sum).map(|(a, b)| a * b).sum() };
            let best = free
                .copied()
                .fold(None, |best: Option<(usize, f32)>, expert| {
                    let score = alike(expert);
                    match best {
                        Some((_, most)) if most >= score => best,
                        _ => Some((expert, score)),
                    }
                });
            let Some((expert, _)) = best else { break };
            group_of[expert] = group as u16;
            for (sum, share) in sum.iter_mut().zip(row(expert)) {
                *sum += share;
            }
        }
    }
    group_of
}

#[derive(Clone, Copy, PartialEq)]
enum Side {
    Before,
    After,
    Both,
}

/// What every expert of a layer is worth in every group, given its neighbors: experts × groups.
fn profits(
    chain: &Chain,
    levels: &Levels,
    division: &Division,
    layer: usize,
    side: Side,
) -> Vec<f64> {
    let (experts, groups) = (chain.experts, levels.groups);
    let mut with_group = vec![0f64; experts * groups];
    let mut add = |rows: &[f32], other: &[u16]| {
        let of_expert = with_group.chunks_mut(groups);
        for (with_group, row) in of_expert.zip(rows.chunks(experts)) {
            for (share, group) in row.iter().zip(other) {
                with_group[usize::from(*group)] += f64::from(*share);
            }
        }
    };
    if layer > 0 && side != Side::After {
        add(&chain.reversed[layer - 1], &division[layer - 1]);
    }
    if layer + 1 < chain.layers && side != Side::Before {
        add(&chain.pairs[layer], &division[layer + 1]);
    }
    for of_node in with_group.chunks_mut(levels.per_node) {
        let sum: f64 = of_node.iter().sum();
        for profit in of_node {
            *profit = levels.same_device * *profit + levels.same_node * sum;
        }
    }
    with_group
}

/// Assigns one layer after another exactly, given its neighbors, until nothing changes.
pub fn alternate(chain: &Chain, levels: &Levels, division: &mut Division, sweeps: usize) {
    let groups = levels.groups;
    let mut value = levels.value(chain, division);
    for sweep in 0..sweeps {
        for step in 0..chain.layers {
            let layer = if sweep % 2 == 0 {
                step
            } else {
                chain.layers - 1 - step
            };
            let profits = profits(chain, levels, division, layer, Side::Both);
            let now: f64 = division[layer]
                .iter()
                .enumerate()
                .map(|(expert, group)| profits[expert * groups + usize::from(*group)])
                .sum();
            let assigned = assign(&profits, groups, chain.experts / groups);
            if assigned.profit > now + 1e-12 {
                division[layer] = assigned.column_of;
            }
        }
        let after = levels.value(chain, division);
        if after <= value * (1.0 + 1e-7) {
            break;
        }
        value = after;
    }
}

/// Re-splits every pair of groups once. Returns what was gained.
fn resplit_all(
    chain: &Chain,
    levels: &Levels,
    division: &mut Division,
    options: &SearchOptions,
    round: usize,
) -> f64 {
    /// Passes over all pairs in one round, where not all experts of a pair are movable at once.
    const MOST_PASSES: usize = 8;
    let size = chain.experts / levels.groups;
    let movable = size.min(MOST_MOVABLE);
    let passes = size.div_ceil(movable.max(1)).min(MOST_PASSES);
    // Where nodes do not matter, every group is its own.
    let per_node = if levels.same_node == 0.0 {
        1
    } else {
        levels.per_node
    };
    let mut gained = 0.0;
    for pass in 0..passes {
        let seed = options.seed ^ ((round * passes + pass) as u64) << 20;
        for tasks in days(levels.groups, per_node) {
            let snapshot: &Division = division;
            let moves = in_parallel(tasks.len(), options.threads, |task| {
                resplit(chain, levels, snapshot, &tasks[task], movable, seed)
            });
            for (gain, moved) in moves {
                gained += gain;
                for (layer, expert, group) in moved {
                    division[layer][expert] = group;
                }
            }
        }
    }
    gained
}

/// A gain, and the experts that move for it: layer, expert and its new group.
type Moves = (f64, Vec<(usize, usize, u16)>);

/// Re-splits the given pairs one after another.
fn resplit(
    chain: &Chain,
    levels: &Levels,
    division: &Division,
    pairs: &[(u16, u16)],
    movable: usize,
    seed: u64,
) -> Moves {
    let mut splitter = Splitter::new(movable);
    let mut division = division.clone();
    let mut gained = 0.0;
    let mut moved = Vec::new();
    for (a, b) in pairs {
        let mut random = Random::new(seed ^ (u64::from(*a) << 40) ^ (u64::from(*b) << 52));
        let chosen: Vec<Vec<usize>> = division
            .iter()
            .map(|layer| {
                let mut both = Vec::with_capacity(2 * movable);
                for group in [a, b] {
                    let experts = layer.iter().enumerate().filter(|(_, g)| *g == group);
                    let mut experts: Vec<usize> = experts.map(|(expert, _)| expert).collect();
                    if experts.len() > movable {
                        random.shuffle(&mut experts);
                    }
                    both.extend_from_slice(&experts[..movable]);
                }
                both
            })
            .collect();
        let (sides, gain) = splitter.split(chain, levels, &division, (*a, *b), &chosen);
        // The search is in f32: only what gains in f64 is taken.
        if gain <= 1e-12 {
            continue;
        }
        gained += gain;
        for (layer, (chosen, sides)) in chosen.iter().zip(&sides).enumerate() {
            for (expert, is_a) in chosen.iter().zip(sides) {
                let group = if *is_a { *a } else { *b };
                if division[layer][*expert] != group {
                    division[layer][*expert] = group;
                    moved.push((layer, *expert, group));
                }
            }
        }
    }
    (gained, moved)
}

/// All pairs of groups: days of tasks that touch different nodes, so they can run side by side; the
/// pairs of a task follow each other.
fn days(groups: usize, per_node: usize) -> Vec<Vec<Vec<(u16, u16)>>> {
    let nodes = groups / per_node;
    let of_node = |node: usize| node * per_node..(node + 1) * per_node;
    let within = (0..nodes).map(|node| {
        let pairs = of_node(node).flat_map(|a| (a + 1..(node + 1) * per_node).map(move |b| (a, b)));
        pairs.map(|(a, b)| (a as u16, b as u16)).collect()
    });
    let mut days = vec![within.collect::<Vec<Vec<_>>>()];
    for day in tournament(nodes) {
        let tasks = day.iter().map(|(x, y)| {
            let pairs = of_node(*x).flat_map(|a| of_node(*y).map(move |b| (a, b)));
            pairs.map(|(a, b)| (a as u16, b as u16)).collect()
        });
        days.push(tasks.collect());
    }
    days
}

/// All pairs of `n` in rounds in which none occurs twice (the circle method).
fn tournament(n: usize) -> Vec<Vec<(usize, usize)>> {
    let even = n + n % 2;
    let days = (0..even.saturating_sub(1)).map(|day| {
        let seat = |at: usize| match at {
            0 => 0,
            _ => (at - 1 + day) % (even - 1) + 1,
        };
        let pairs = (0..even / 2).map(|at| (seat(at), seat(even - 1 - at)));
        pairs.filter(|(a, b)| *a < n && *b < n).collect()
    });
    days.collect()
}
