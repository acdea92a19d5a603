//! The search on one network: climbing bounds, reading off assignments, and closing the gap.
//!
//! Enters: a [`Network`] and a memory budget. Leaves: the best assignment found, a lower bound, and the
//! potentials that prove it.
//! Invariant: the bound holds for every assignment of the network within the budget; the assignment's
//! cost is computed from the network, never from the potentials.
//!
//! 1. Sweeps of message passing raise the bound; each reads off an assignment.
//! 2. Where memory binds, its prices follow the cuts that assignments make (Kelley 1960).
//! 3. Strategies that the bound excludes are removed (reduced-cost fixing), and sweeps go on.
//! 4. What is left is enumerated depth first under the same bound, up to a limit.

use super::branch::{Bounds, enumerate};
use super::dual::{Direction, Dual};
use super::mend::{polish, relink};
use super::network::{Cost, Network};

/// When to stop.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClimbLimits {
    /// Relative gap at which an assignment is good enough.
    pub gap: f64,
    /// Bytes a rank may use.
    pub budget_bytes: f64,
    /// Bytes of it that are set aside for what ops work on, where that is more than any plan needs.
    pub working_bytes: f64,
    /// Seconds above which a bound ends the search: something better is known.
    pub cutoff_s: f64,
}

/// Where to start.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Start {
    pub byte_prices: [f64; 2],
    /// An assignment, by strategies' numbers in the instance.
    pub known: Option<Vec<usize>>,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Climbed {
    /// Strategies by their numbers in the instance, with their cost; `None` when no sweep found one
    /// that fits.
    pub best: Option<Met>,
    /// Holds for all assignments that cost less than the cutoff.
    pub bound_s: f64,
    /// Potentials, and the bound that they prove for the network that came in.
    pub proof: Proof,
    /// The assignment of least peak that was met, fitting or not.
    pub least: Option<Met>,
    /// Bytes within which the two sums of an assignment must stay.
    pub room_bytes: f64,
    /// What the bound does not exclude.
    pub network: Network,
}

/// An assignment by strategies' numbers in the instance.
#[derive(Clone, Debug, PartialEq)]
pub struct Met {
    pub numbers: Vec<usize>,
    pub cost: Cost,
}

/// Potentials and what they prove.
#[derive(Clone, Debug, PartialEq)]
pub struct Proof {
    pub dual: Dual,
    pub bound_s: f64,
}

/// Relative rise of the bound below which sweeps stop.
const STALL: f64 = 2e-6;
const MAX_SWEEPS: usize = 60;
/// Sweeps before strategies are removed for the first time.
const FIRST_SWEEPS: usize = 4;
const SWEEPS_A_PRICE: usize = 3;
const MAX_PRICES: usize = 24;
/// Assignments kept for mixing.
const N_MET: usize = 16;
/// Parts of the bound above it within which assignments are looked for, one after the other.
const DEPTHS: [f64; 4] = [1e-4, 3e-4, 1e-3, 4e-3];
const SWEEPS_A_DIVE: usize = 8;
/// Enumeration is tried where no more strategies than these are left to decide on.
const MAX_ENUMERATED: usize = 600;
const N_BRANCHES: usize = 50_000;
/// Once enumeration failed, it is hardly more than a way to find assignments.
const N_BRANCHES_AGAIN: usize = 5_000;
/// The gap of what was enumerated, for rounding.
const EXACT: f64 = 1e-9;

struct Climb {
    network: Network,
    dual: Dual,
    limits: ClimbLimits,
    room_bytes: f64,
    best: Option<Met>,
    least: Option<Met>,
    /// The latest assignments that do not fit.
    over: Vec<Met>,
    /// Seconds and bytes of all assignments met.
    cuts: Vec<Cost>,
    /// The assignment of the latest sweep, by position in the domains.
    latest: Vec<usize>,
    /// For the network as it is now, and for the whole.
    proof: Proof,
    whole: Proof,
    is_whole: bool,
    /// A bound that was proven by looking at everything below it.
    enumerated_s: f64,
    n_branches: usize,
}

/// Searches a consistent network.
pub fn climb(network: Network, limits: ClimbLimits, start: &Start) -> Climbed {
    let room_bytes = network.room_bytes(limits.budget_bytes);
    let mut dual = Dual::new(&network);
    dual.byte_prices = start.byte_prices;
    let nothing = Proof {
        dual: dual.clone(),
        bound_s: f64::NEG_INFINITY,
    };
    let mut climb = Climb {
        proof: nothing.clone(),
        whole: nothing,
        is_whole: true,
        enumerated_s: f64::NEG_INFINITY,
        n_branches: N_BRANCHES,
        dual,
        network,
        limits,
        room_bytes: room_bytes.min(limits.budget_bytes - limits.working_bytes),
        best: None,
        least: None,
        over: Vec::new(),
        latest: Vec::new(),
        cuts: Vec::new(),
    };
    if let Some(known) = &start.known
        && let Some(assignment) = climb.positions(known)
    {
        climb.meet(&assignment);
    }
    climb.run();
    let bound_s = climb.bound_s();
    Climbed {
        best: climb.best,
        bound_s,
        proof: climb.whole,
        least: climb.least,
        room_bytes: climb.room_bytes,
        network: climb.network,
    }
}

impl Climb {
    /// All stages.
    fn run(&mut self) {
        // Whether memory binds is known when the bound has settled.
        for n_sweeps in [FIRST_SWEEPS, MAX_SWEEPS] {
            self.sweeps(n_sweeps);
            if self.is_tight() {
                self.price_memory();
            }
        }
        for depth in DEPTHS {
            if self.is_done() {
                break;
            }
            self.dive(depth);
        }
        // What the gap leaves open is often little enough to look at.
        if !self.is_closed(self.bound_s(), EXACT) && self.n_within() <= 2 * MAX_ENUMERATED {
            self.dive(f64::INFINITY);
        }
    }

    /// Looks for an assignment within a part of the bound, where few strategies are left to look at: one
    /// that is found closes the gap to that part, and when there is provably none the bound rises.
    fn dive(&mut self, depth: f64) {
        let surface = (
            self.network.clone(),
            self.proof.clone(),
            self.limits,
            self.is_whole,
        );
        let cutoff_s = self.proof.bound_s * (1.0 + depth);
        self.limits.cutoff_s = cutoff_s.min(self.limits.cutoff_s);
        self.dual.clone_from(&self.proof.dual);
        let complete = self.close();
        let below_s = self.proof.bound_s;
        (self.network, self.proof, self.limits, self.is_whole) = surface;
        if complete || below_s >= cutoff_s {
            self.enumerated_s = self
                .enumerated_s
                .max(cutoff_s.min(self.upper_s()) * (1.0 - EXACT));
        }
    }

    /// Removes what the bound excludes, improves what is left, and enumerates it where it is little;
    /// whether all of it was looked at.
    fn close(&mut self) -> bool {
        let mut n_open = usize::MAX;
        loop {
            self.fix();
            let n_before = n_open;
            let nodes = self.network.nodes.iter();
            n_open = nodes.map(|node| node.strategies.len() - 1).sum();
            if self.is_closed(self.proof.bound_s, EXACT) {
                return true;
            }
            if n_open == 0 || n_open as f64 > 0.95 * n_before as f64 {
                break;
            }
            self.dual.clone_from(&self.proof.dual);
            self.sweeps(SWEEPS_A_DIVE);
            self.mend();
        }
        if n_open > MAX_ENUMERATED {
            return false;
        }
        let found = enumerate(
            &self.network,
            &self.proof.dual,
            &Bounds {
                room_bytes: self.room_bytes,
                budget_bytes: self.limits.budget_bytes,
                upper_s: self.upper_s(),
                gap: EXACT,
                n_steps: self.n_branches,
            },
        );
        if let Some(assignment) = found.assignment {
            self.meet(&assignment);
        }
        if !found.is_complete {
            self.n_branches = N_BRANCHES_AGAIN;
        }
        found.is_complete
    }

    fn upper_s(&self) -> f64 {
        let best = self
            .best
            .as_ref()
            .map_or(f64::INFINITY, |best| best.cost.seconds);
        best.min(self.limits.cutoff_s)
    }

    fn bound_s(&self) -> f64 {
        self.proof.bound_s.max(self.enumerated_s)
    }

    fn is_done(&self) -> bool {
        self.is_closed(self.bound_s(), self.limits.gap)
    }

    fn is_closed(&self, bound_s: f64, gap: f64) -> bool {
        bound_s >= self.upper_s() * (1.0 - gap)
    }

    /// Whether some assignment met was too big, or memory has a price already.
    fn is_tight(&self) -> bool {
        !self.over.is_empty() || self.dual.byte_prices != [0.0; 2]
    }

    /// The positions of strategies in the domains, where all are still allowed.
    fn positions(&self, numbers: &[usize]) -> Option<Vec<usize>> {
        let nodes = self.network.nodes.iter().zip(numbers);
        nodes
            .map(|(node, number)| node.strategies.binary_search(number).ok())
            .collect()
    }

    /// Sweeps until the gap is closed or the bound stalls.
    fn sweeps(&mut self, n_sweeps: usize) {
        let mut before_s = f64::NEG_INFINITY;
        for _ in 0..n_sweeps {
            for direction in [Direction::Forward, Direction::Backward] {
                let assignment = self.dual.sweep(&self.network, direction);
                self.meet(&assignment);
                self.latest = assignment;
            }
            let bound_s = self.dual.bound_s(&self.network, self.room_bytes);
            if bound_s > self.proof.bound_s {
                self.proof = Proof {
                    dual: self.dual.clone(),
                    bound_s,
                };
                if self.is_whole {
                    self.whole.clone_from(&self.proof);
                }
            }
            if self.is_done() || bound_s - before_s < STALL * bound_s.abs() {
                return;
            }
            before_s = bound_s;
        }
    }

    /// Takes note of an assignment (by position in the domains).
    fn meet(&mut self, assignment: &[usize]) {
        let cost = self.network.cost(assignment);
        if !cost.seconds.is_finite() {
            return;
        }
        self.cuts.push(cost);
        let nodes = self.network.nodes.iter().zip(assignment);
        let met = Met {
            numbers: nodes
                .map(|(node, choice)| node.strategies[*choice])
                .collect(),
            cost,
        };
        let peak_bytes = |met: &Met| met.cost.peak_bytes();
        if self
            .least
            .as_ref()
            .is_none_or(|least| peak_bytes(&met) < peak_bytes(least))
        {
            self.least = Some(met.clone());
        }
        if peak_bytes(&met) > self.limits.budget_bytes {
            if !self.over.contains(&met) {
                if self.over.len() == N_MET {
                    self.over.remove(0);
                }
                self.over.push(met);
            }
        } else if self
            .best
            .as_ref()
            .is_none_or(|best| cost.seconds < best.cost.seconds)
        {
            self.best = Some(met);
        }
    }

    /// Improves the best assignment and the latest one, towards those that do not fit and on their own.
    fn mend(&mut self) {
        let budget_bytes = self.limits.budget_bytes;
        let best = self
            .best
            .as_ref()
            .and_then(|best| self.positions(&best.numbers));
        if let Some(mut assignment) = best {
            let limit_s = self.upper_s();
            let over = self
                .over
                .iter()
                .rev()
                .filter(|met| met.cost.seconds < limit_s);
            let over: Vec<Vec<usize>> = over
                .filter_map(|met| self.positions(&met.numbers))
                .collect();
            for cheaper in over {
                assignment = relink(&self.network, &assignment, &cheaper, budget_bytes);
            }
            polish(&self.network, &mut assignment, budget_bytes);
            self.meet(&assignment);
        }
        let mut latest = std::mem::take(&mut self.latest);
        polish(&self.network, &mut latest, budget_bytes);
        self.meet(&latest);
    }

    /// Raises the prices of memory until the best assignment under them fits.
    fn price_memory(&mut self) {
        let start = self.dual.byte_prices;
        for round in 0..MAX_PRICES {
            if self.is_done() {
                return;
            }
            // Near known prices, and not far beyond those that assignments were met under, until some
            // fit.
            let scale = self.proof.bound_s.abs() / self.room_bytes.max(1.0);
            let fits = |cut: &Cost| cut.bytes[0].max(cut.bytes[1]) <= self.room_bytes;
            let reach = if self.cuts.iter().any(fits) {
                6
            } else {
                round.min(6)
            };
            let most = 0.3 * scale * 10_f64.powi(reach as i32);
            let factor = 1.5_f64.powi(round as i32 + 1);
            let (byte_prices, model_s) = self.next_prices(start.map(|price| {
                if price > 0.0 {
                    [(price / factor).min(most), (price * factor).min(most)]
                } else {
                    [0.0, most]
                }
            }));
            let mut pairs = byte_prices.iter().zip(self.dual.byte_prices);
            let is_same = pairs.all(|(new, old)| (new - old).abs() <= 1e-3 * old);
            if is_same || model_s - self.proof.bound_s < 0.1 * self.limits.gap * model_s.abs() {
                return;
            }
            self.dual.byte_prices = byte_prices;
            self.sweeps(SWEEPS_A_PRICE);
        }
    }

    /// The byte prices at which the cuts allow the highest bound: a concave function of two prices,
    /// searched by golden sections one in the other.
    fn next_prices(&self, ranges: [[f64; 2]; 2]) -> ([f64; 2], f64) {
        let model = |prices: [f64; 2]| {
            let value = |cut: &Cost| {
                let over = cut.bytes.map(|n_bytes| n_bytes - self.room_bytes);
                cut.seconds + prices[0] * over[0] + prices[1] * over[1]
            };
            self.cuts.iter().map(value).fold(f64::INFINITY, f64::min)
        };
        let inner = |turn: f64| {
            let end = greatest(ranges[1], |end| model([turn, end]));
            (end, model([turn, end]))
        };
        let turn = greatest(ranges[0], |turn| inner(turn).1);
        let (end, value) = inner(turn);
        ([turn, end], value)
    }

    /// Strategies, beyond one a node, that the bound does not exclude.
    fn n_within(&self) -> usize {
        let slack_s = self.upper_s() - self.proof.bound_s;
        let keeps = self.proof.dual.within(&self.network, slack_s);
        let n_kept = keeps.iter().flatten().filter(|keep| **keep).count();
        n_kept - keeps.len()
    }

    /// Removes the strategies that no assignment better than the best has.
    fn fix(&mut self) {
        let slack_s = self.upper_s() - self.proof.bound_s;
        if !slack_s.is_finite() {
            return;
        }
        let slack_s = slack_s.max(0.0) + 1e-9 * self.proof.bound_s.abs();
        let keeps = self.proof.dual.within(&self.network, slack_s);
        self.is_whole &= keeps.iter().flatten().all(|keep| *keep);
        self.network.restrict(&keeps);
    }
}

/// The argument of the greatest value of a concave function on an interval; its start among equals
/// (Kiefer 1953).
fn greatest([start, most]: [f64; 2], value: impl Fn(f64) -> f64) -> f64 {
    let ratio = (5.0_f64.sqrt() - 1.0) / 2.0;
    let (mut low, mut high) = (start, most);
    let at = |low: f64, high: f64| (high - ratio * (high - low), low + ratio * (high - low));
    let (mut left, mut right) = at(low, high);
    let (mut left_value, mut right_value) = (value(left), value(right));
    for _ in 0..64 {
        if left_value >= right_value {
            (high, right, right_value) = (right, left, left_value);
            left = at(low, high).0;
            left_value = value(left);
        } else {
            (low, left, left_value) = (left, right, right_value);
            right = at(low, high).1;
            right_value = value(right);
        }
    }
    let middle = (low + high) / 2.0;
    if value(start) >= value(middle) {
        start
    } else {
        middle
    }
}
