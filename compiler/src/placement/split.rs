//! Re-splitting two groups: their experts are divided anew over all layers at once.
//!
//! Enters: a chain, a division, two groups and their movable experts. Leaves: the best way to divide
//! the movable ones, all others staying.
//! Invariant: the gain that is returned is counted in f64, apart from the search.
//!
//! With m movable experts of each group there are C(2m, m) states a layer, and the chain is solved
//! by dynamic programming over them: exact, O(layers · states²). With all experts of both groups
//! movable this is the optimum over both.
//!
//! Sides are signs: what stays together of a pair of layers is `½ (total + sᵀ W t)`. States come in
//! complements, of which `sᵀ W t` differs in sign only, so half of them are computed.

use super::chain::{Chain, Division, Levels};

/// Movable experts of each group and layer at most: C(8, 4) = 70 states.
pub const MOST_MOVABLE: usize = 4;

/// Working memory of re-splitting with a fixed number of movable experts.
pub struct Splitter {
    /// Movable experts of both groups.
    width: usize,
    /// States up to complement.
    half: usize,
    /// Signs, `signs[slot · half + state]`.
    signs: Vec<f32>,
    /// Values of every layer's states and of their complements.
    values: Vec<[Vec<f32>; 2]>,
    /// `Wᵀ s` of one state, and `sᵀ W t` of all.
    pull: Vec<f32>,
    gain: Vec<f32>,
    /// W of every pair of layers, and what experts that stay add.
    couplings: Vec<Vec<f32>>,
    linear: Vec<f32>,
}

impl Splitter {
    /// For `m` movable experts of each group.
    pub fn new(m: usize) -> Self {
        let width = 2 * m;
        // The first expert on the first side stands for a state and its complement.
        let masks: Vec<u32> = (0..1u32 << width)
            .filter(|mask| mask.count_ones() as usize == m && (m == 0 || mask & 1 == 1))
            .collect();
        let signs = (0..width).flat_map(|slot| {
            let sign = move |mask: &u32| if mask >> slot & 1 == 1 { 1.0 } else { -1.0 };
            masks.iter().map(sign)
        });
        Self {
            width,
            half: masks.len(),
            signs: signs.collect(),
            values: Vec::new(),
            pull: vec![0.0; width],
            gain: vec![0.0; masks.len()],
            couplings: Vec::new(),
            linear: vec![0.0; width],
        }
    }

    /// Divides anew: `movable[layer]` lists m experts of group `a`, then m of group `b`.
    /// Returns their new sides, `true` for `a`, and the gain in worth.
    pub fn split(
        &mut self,
        chain: &Chain,
        levels: &Levels,
        division: &Division,
        (a, b): (u16, u16),
        movable: &[Vec<usize>],
    ) -> (Vec<Vec<bool>>, f64) {
        let sides = Sides::of(chain, levels, division, (a, b), movable);
        self.couplings.clear();
        self.values.clear();
        for layer in 0..chain.layers {
            let mut next = [vec![0f32; self.half], vec![0f32; self.half]];
            if layer > 0 {
                self.couplings.push(sides.coupling(chain, layer - 1));
                next = self.step(layer);
            }
            if sides.others_matter {
                sides.linear(chain, layer, &mut self.linear);
                for (slot, linear) in self.linear.iter().enumerate() {
                    let signs = &self.signs[slot * self.half..(slot + 1) * self.half];
                    let [straight, complement] = &mut next;
                    for ((s, c), sign) in straight.iter_mut().zip(complement).zip(signs) {
                        *s += linear * sign;
                        *c -= linear * sign;
                    }
                }
            }
            self.values.push(next);
        }
        let chosen = self.trace_back(chain.layers);
        let gain = sides.gain(chain, &chosen);
        (chosen, gain)
    }

    /// `next[t] = max over s of value[s] + sᵀ W t`.
    fn step(&mut self, layer: usize) -> [Vec<f32>; 2] {
        let half = self.half;
        let coupling = &self.couplings[layer - 1];
        let [before, before_complement] = &self.values[layer - 1];
        let mut straight = vec![f32::NEG_INFINITY; half];
        let mut complement = vec![f32::NEG_INFINITY; half];
        for state in 0..half {
            self.pull.fill(0.0);
            for row in 0..self.width {
                let sign = self.signs[row * half + state];
                let shares = &coupling[row * self.width..(row + 1) * self.width];
                for (pull, share) in self.pull.iter_mut().zip(shares) {
                    *pull += sign * share;
                }
            }
            self.gain.fill(0.0);
            for (column, pull) in self.pull.iter().enumerate() {
                let signs = &self.signs[column * half..(column + 1) * half];
                for (gain, sign) in self.gain.iter_mut().zip(signs) {
                    *gain += pull * sign;
                }
            }
            let (v, w) = (before[state], before_complement[state]);
            let targets = straight.iter_mut().zip(&mut complement);
            for ((s, c), gain) in targets.zip(&self.gain) {
                *s = max(*s, max(v + gain, w - gain));
                *c = max(*c, max(v - gain, w + gain));
            }
        }
        [straight, complement]
    }

    fn sign(&self, slot: usize, (state, side): (usize, usize)) -> f32 {
        let sign = self.signs[slot * self.half + state];
        if side == 0 { sign } else { -sign }
    }

    /// The best states, last layer first; maxima are found again rather than kept.
    fn trace_back(&self, layers: usize) -> Vec<Vec<bool>> {
        let mut chosen = vec![Vec::new(); layers];
        let mut target = vec![0f32; self.width];
        for layer in (0..layers).rev() {
            let mut best = (f32::NEG_INFINITY, (0, 0));
            for state in (0..self.half).flat_map(|state| [(state, 0), (state, 1)]) {
                let mut value = self.values[layer][state.1][state.0];
                for (slot, pull) in target.iter().enumerate() {
                    value += self.sign(slot, state) * pull;
                }
                if value > best.0 {
                    best = (value, state);
                }
            }
            let signs: Vec<f32> = (0..self.width)
                .map(|slot| self.sign(slot, best.1))
                .collect();
            if layer > 0 {
                let rows = self.couplings[layer - 1].chunks(self.width);
                for (target, row) in target.iter_mut().zip(rows) {
                    *target = row
                        .iter()
                        .zip(&signs)
                        .map(|(share, sign)| share * sign)
                        .sum();
                }
            }
            chosen[layer] = signs.iter().map(|sign| *sign > 0.0).collect();
        }
        chosen
    }
}

/// Without the care for NaN that `f32::max` takes: compiles to one instruction.
fn max(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Two groups, their movable experts, and what the others pull.
struct Sides<'a> {
    division: &'a Division,
    movable: &'a [Vec<usize>],
    /// Worth of the same side, for two movable experts.
    together: f64,
    /// Worth of an expert of a group for the first side rather than the second.
    pull: Vec<f64>,
    others_matter: bool,
}

impl<'a> Sides<'a> {
    fn of(
        chain: &Chain,
        levels: &Levels,
        division: &'a Division,
        (a, b): (u16, u16),
        movable: &'a [Vec<usize>],
    ) -> Self {
        let groups = 0..levels.groups as u16;
        let pull = groups.map(|group| levels.worth(a, group) - levels.worth(b, group));
        let pull: Vec<f64> = pull.collect();
        let n_movable = movable.first().map_or(0, Vec::len);
        let are_all_movable = n_movable == 2 * (chain.experts / levels.groups.max(1));
        let outside_pulls = pull.iter().enumerate().any(|(group, pull)| {
            *pull != 0.0 && group != usize::from(a) && group != usize::from(b)
        });
        Self {
            division,
            movable,
            together: levels.worth(a, a) - levels.worth(a, b),
            pull,
            others_matter: !are_all_movable || outside_pulls,
        }
    }

    /// Shares between the movable experts of two adjacent layers, times the worth of togetherness.
    fn coupling(&self, chain: &Chain, pair: usize) -> Vec<f32> {
        let shares = &chain.pairs[pair];
        let together = self.together as f32;
        let rows = self.movable[pair].iter();
        rows.flat_map(|from| {
            let columns = self.movable[pair + 1].iter();
            columns.map(move |to| together * shares[from * chain.experts + to])
        })
        .collect()
    }

    /// What every movable expert of a layer is pulled to the first side by experts that stay.
    fn linear(&self, chain: &Chain, layer: usize, out: &mut [f32]) {
        let experts = chain.experts;
        out.fill(0.0);
        let mut add = |shares: &[f32], other: usize| {
            let mut pulls: Vec<f32> = self.division[other]
                .iter()
                .map(|group| self.pull[usize::from(*group)] as f32)
                .collect();
            for expert in &self.movable[other] {
                pulls[*expert] = 0.0;
            }
            for (out, expert) in out.iter_mut().zip(&self.movable[layer]) {
                let shares = &shares[expert * experts..(expert + 1) * experts];
                *out += shares.iter().zip(&pulls).map(|(s, p)| s * p).sum::<f32>();
            }
        };
        if layer > 0 {
            add(&chain.reversed[layer - 1], layer - 1);
        }
        if layer + 1 < chain.layers {
            add(&chain.pairs[layer], layer + 1);
        }
    }

    /// What the new sides are worth beyond the present ones.
    fn gain(&self, chain: &Chain, chosen: &[Vec<bool>]) -> f64 {
        let side = |is_first: bool| if is_first { 1.0 } else { -1.0 };
        // Per layer: experts whose side changes, and the new sign.
        let changed: Vec<Vec<(usize, f64)>> = (0..chain.layers)
            .map(|layer| {
                let slots = self.movable[layer].iter().zip(&chosen[layer]).enumerate();
                let half = self.movable[layer].len() / 2;
                slots
                    .filter(|(slot, (_, is_first))| **is_first != (*slot < half))
                    .map(|(_, (expert, is_first))| (*expert, side(*is_first)))
                    .collect()
            })
            .collect();
        let mut total = 0.0;
        for (pair, shares) in chain.pairs.iter().enumerate() {
            let pulls = |layer: usize| -> Vec<f64> {
                let groups = self.division[layer].iter();
                groups.map(|group| self.pull[usize::from(*group)]).collect()
            };
            // One end moves, the other end as it was: the pull toward its group changes by its
            // sign. Both ends move: as if the other had moved too.
            if !changed[pair].is_empty() {
                let pulls = pulls(pair + 1);
                for (from, sign) in &changed[pair] {
                    let row = &shares[from * chain.experts..(from + 1) * chain.experts];
                    let pulled: f64 = row.iter().zip(&pulls).map(|(s, p)| f64::from(*s) * p).sum();
                    total += sign * pulled;
                    for (to, other) in &changed[pair + 1] {
                        total += 2.0 * self.together * sign * other * f64::from(row[*to]);
                    }
                }
            }
            if !changed[pair + 1].is_empty() {
                let pulls = pulls(pair);
                let rows = &chain.reversed[pair];
                for (to, sign) in &changed[pair + 1] {
                    let row = &rows[to * chain.experts..(to + 1) * chain.experts];
                    let pulled: f64 = row.iter().zip(&pulls).map(|(s, p)| f64::from(*s) * p).sum();
                    total += sign * pulled;
                }
            }
        }
        total
    }
}
