//! Affinity placement proven optimal, where that is cheap.
//!
//! Enters: a chain and a number of groups. Leaves: an optimal division, or none where the method
//! does not apply.
//! Invariant: what is returned keeps the most that any division keeps.
//!
//! - With one expert a group the chain falls apart into one assignment problem per pair of layers,
//!   whose permutations compose.
//! - With few divisions of a layer, dynamic programming over them: a layer's names of groups do not
//!   matter, so states are unnamed divisions U and steps go to named ones S, O(layers · |U| · |S|).

use super::assign::{Assigned, assign};
use super::chain::{Chain, Division};

/// One expert a group: an optimal division, and the assignment of every pair with its prices.
///
/// O(layers · experts³).
pub fn assignments(chain: &Chain) -> (Division, Vec<Assigned>) {
    let experts = chain.experts;
    let mut division: Division = vec![(0..experts as u16).collect()];
    let mut proofs = Vec::with_capacity(chain.pairs.len());
    for (pair, shares) in chain.pairs.iter().enumerate() {
        let profits: Vec<f64> = shares.iter().map(|share| f64::from(*share)).collect();
        let assigned = assign(&profits, experts, 1);
        let mut layer = vec![0; experts];
        for (from, to) in assigned.column_of.iter().enumerate() {
            layer[usize::from(*to)] = division[pair][from];
        }
        division.push(layer);
        proofs.push(assigned);
    }
    (division, proofs)
}

/// Named and unnamed divisions of a layer: E! / (c!)^G, and that over G!.
fn n_states(experts: usize, groups: usize) -> (f64, f64) {
    let ln_factorial = |n: usize| (2..=n).map(|k| (k as f64).ln()).sum::<f64>();
    let size = experts / groups.max(1);
    let named = ln_factorial(experts) - groups as f64 * ln_factorial(size);
    (named.exp(), (named - ln_factorial(groups)).exp())
}

/// Steps that [`dynamic`] takes, about a nanosecond each.
pub fn dynamic_steps(chain: &Chain, groups: usize) -> f64 {
    let (named, unnamed) = n_states(chain.experts, groups);
    named * unnamed * chain.pairs.len() as f64
}

/// An optimal division by dynamic programming, where it takes at most `most_steps`.
pub fn dynamic(chain: &Chain, groups: usize, most_steps: f64) -> Option<Division> {
    if dynamic_steps(chain, groups) > most_steps || chain.experts > 32 {
        return None;
    }
    let states = States::all(chain.experts, groups);
    let n_unnamed = states.unnamed.len();
    let mut value = vec![0f64; n_unnamed];
    let mut came_from: Vec<Vec<(u32, u32)>> = Vec::with_capacity(chain.pairs.len());
    for pair in &chain.pairs {
        let mut next = vec![f64::NEG_INFINITY; n_unnamed];
        let mut from = vec![(0u32, 0u32); n_unnamed];
        for (state, before) in value.iter().enumerate() {
            let kept = states.kept_with(pair, &states.unnamed[state]);
            let targets = states.named.chunks(states.names);
            for ((target, named), (next, from)) in
                targets.enumerate().zip(next.iter_mut().zip(&mut from))
            {
                for (name, halves) in named.iter().enumerate() {
                    let total = before + kept.0[halves.0 as usize] + kept.1[halves.1 as usize];
                    if total > *next {
                        *next = total;
                        *from = (state as u32, (target * states.names + name) as u32);
                    }
                }
            }
        }
        value = next;
        came_from.push(from);
    }
    let best = (0..n_unnamed).fold(0, |best, state| {
        if value[state] > value[best] {
            state
        } else {
            best
        }
    });
    Some(states.retrace(&came_from, best))
}

/// All divisions of a layer.
struct States {
    groups: usize,
    /// Names that one unnamed division has: G!.
    names: usize,
    unnamed: Vec<Vec<u16>>,
    /// Per unnamed division its G! namings, as a pattern of the lower and of the upper experts.
    named: Vec<(u32, u32)>,
    lower: Vec<Vec<u16>>,
    upper: Vec<Vec<u16>>,
}

impl States {
    fn all(experts: usize, groups: usize) -> Self {
        let size = experts / groups;
        let mut unnamed = Vec::new();
        enumerate(
            &mut Vec::new(),
            &mut vec![0; groups],
            experts,
            size,
            &mut unnamed,
        );
        let permutations = permutations(groups);
        let half = experts / 2;
        let mut lower = Patterns::default();
        let mut upper = Patterns::default();
        let mut named = Vec::with_capacity(unnamed.len() * permutations.len());
        for division in &unnamed {
            for names in &permutations {
                let renamed: Vec<u16> = division.iter().map(|g| names[usize::from(*g)]).collect();
                named.push((lower.id(&renamed[..half]), upper.id(&renamed[half..])));
            }
        }
        Self {
            groups,
            names: permutations.len(),
            unnamed,
            named,
            lower: lower.all,
            upper: upper.all,
        }
    }

    /// What every pattern of the next layer keeps with a division of this one.
    fn kept_with(&self, pair: &[f32], division: &[u16]) -> (Vec<f64>, Vec<f64>) {
        let experts = division.len();
        let mut of_group = vec![0f64; experts * self.groups];
        for (from, group) in division.iter().enumerate() {
            for to in 0..experts {
                of_group[to * self.groups + usize::from(*group)] +=
                    f64::from(pair[from * experts + to]);
            }
        }
        let sum = |pattern: &Vec<u16>, first: usize| -> f64 {
            let experts = pattern.iter().enumerate();
            experts
                .map(|(at, group)| of_group[(first + at) * self.groups + usize::from(*group)])
                .sum()
        };
        let half = experts / 2;
        (
            self.lower.iter().map(|pattern| sum(pattern, 0)).collect(),
            self.upper
                .iter()
                .map(|pattern| sum(pattern, half))
                .collect(),
        )
    }

    fn retrace(&self, came_from: &[Vec<(u32, u32)>], last: usize) -> Division {
        let mut states = vec![last];
        let mut steps = Vec::with_capacity(came_from.len());
        for from in came_from.iter().rev() {
            let (state, named) = from[states[states.len() - 1]];
            states.push(state as usize);
            steps.push(named as usize);
        }
        states.reverse();
        steps.reverse();
        let mut division = vec![self.unnamed[states[0]].clone()];
        // From the names of the unnamed division of a layer to the names of the first layer.
        let mut names: Vec<u16> = (0..self.groups as u16).collect();
        for (step, state) in steps.iter().zip(&states[1..]) {
            let (lower, upper) = self.named[*step];
            let mut layer = self.lower[lower as usize].clone();
            layer.extend_from_slice(&self.upper[upper as usize]);
            for group in &mut layer {
                *group = names[usize::from(*group)];
            }
            let mut next = vec![0; self.groups];
            for (unnamed, named) in self.unnamed[*state].iter().zip(&layer) {
                next[usize::from(*unnamed)] = *named;
            }
            names = next;
            division.push(layer);
        }
        division
    }
}

/// Patterns numbered in the order in which they are first seen.
#[derive(Default)]
struct Patterns {
    ids: std::collections::BTreeMap<Vec<u16>, u32>,
    all: Vec<Vec<u16>>,
}

impl Patterns {
    fn id(&mut self, pattern: &[u16]) -> u32 {
        if let Some(id) = self.ids.get(pattern) {
            return *id;
        }
        let id = self.all.len() as u32;
        self.ids.insert(pattern.to_vec(), id);
        self.all.push(pattern.to_vec());
        id
    }
}

/// Divisions whose groups are numbered by their first expert.
fn enumerate(
    chosen: &mut Vec<u16>,
    filled: &mut Vec<usize>,
    experts: usize,
    size: usize,
    out: &mut Vec<Vec<u16>>,
) {
    if chosen.len() == experts {
        out.push(chosen.clone());
        return;
    }
    for group in 0..filled.len() {
        let is_empty = filled[group] == 0;
        if filled[group] < size {
            filled[group] += 1;
            chosen.push(group as u16);
            enumerate(chosen, filled, experts, size, out);
            chosen.pop();
            filled[group] -= 1;
        }
        if is_empty {
            return; // Later groups are named later.
        }
    }
}

fn permutations(n: usize) -> Vec<Vec<u16>> {
    let mut all = vec![Vec::new()];
    for next in 0..n as u16 {
        all = all
            .iter()
            .flat_map(|shorter: &Vec<u16>| {
                (0..=shorter.len()).map(move |at| {
                    let mut longer = shorter.clone();
                    longer.insert(at, next);
                    longer
                })
            })
            .collect();
    }
    all
}
