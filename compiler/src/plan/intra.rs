//! The choice of a strategy for every group of an instance.
//!
//! Enters: an [`Instance`] and a memory budget. Leaves: an assignment, its seconds, and a lower bound
//! with the potentials that prove it.
//! Invariant: `lower_bound_s ≤ seconds`, and `seconds` is the price of the assignment computed apart
//! from the search.
//!
//! The search is [`climb`]'s; what it leaves open is given to an integer program, where that is small.

use super::climb::{ClimbLimits, Climbed, Met, Proof, Start, climb};
use super::instance::Instance;
use super::lp::{Kind, ProgramLimits, solve_program};
use super::metric::Metric;
use super::network::Network;

/// Bounds of one solve.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SolveLimits {
    /// Relative gap at which an assignment is good enough.
    pub gap: f64,
    /// Seconds of an integer program, where the search leaves a gap.
    pub branch_s: f64,
    /// Bytes a rank may use, with what its ops work on.
    pub budget_bytes: f64,
    /// Seconds of a plan that is known: worse ones are of no interest.
    pub cutoff_s: f64,
}

/// The best assignment found.
#[derive(Clone, Debug, PartialEq)]
pub struct Solved {
    /// One strategy index per group.
    pub assignment: Vec<usize>,
    pub seconds: f64,
    pub lower_bound_s: f64,
    pub memory: Memory,
    /// Potentials over the nets of the whole instance, with the bound that they prove.
    pub proof: Proof,
    pub n_strategies: usize,
    pub n_nets: usize,
    /// Strategies beyond one a group that the bound does not exclude.
    pub n_open: usize,
}

/// Bytes of one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Memory {
    pub kept_bytes: f64,
    pub saved_bytes: f64,
    pub gradient_bytes: f64,
    /// The most that one op works on.
    pub working_bytes: f64,
}

impl Memory {
    /// At the turn from forward to backward, or at its end, whichever is more.
    pub fn peak_bytes(self) -> f64 {
        self.kept_bytes + self.saved_bytes.max(self.gradient_bytes) + self.working_bytes
    }
}

/// Why there is no assignment.
#[derive(Clone, Debug, PartialEq)]
pub enum NoSolution {
    /// Nothing fits the budget: the least peak that was found.
    Memory { least: Memory },
    /// Rules that contradict each other.
    Rules,
    /// Every assignment takes at least so long, which is longer than the cutoff.
    Slow { bound_s: f64 },
}

/// Bytes of an assignment.
pub fn assignment_memory(instance: &Instance, assignment: &[usize]) -> Memory {
    let mut memory = Memory::default();
    for (group, choice) in instance.groups.iter().zip(assignment) {
        let strategy = &group.strategies[*choice];
        memory.kept_bytes += strategy.kept_bytes;
        memory.saved_bytes += strategy.saved_bytes;
        memory.gradient_bytes += strategy.gradient_bytes;
        memory.working_bytes = memory.working_bytes.max(strategy.working_bytes);
    }
    memory
}

/// The cheapest assignment within the budget.
///
/// # Errors
/// Nothing fits, rules contradict each other, or everything is slower than the cutoff.
pub fn solve(
    instance: &Instance,
    limits: SolveLimits,
    start: &Start,
    metric: &mut Metric,
) -> Result<Solved, NoSolution> {
    let mut network = instance.network(metric);
    if !network.make_consistent() {
        return Err(NoSolution::Rules);
    }
    let n_strategies = n_strategies(&network);
    let n_nets = network.nets.len();
    let climbing = ClimbLimits {
        gap: limits.gap,
        budget_bytes: limits.budget_bytes,
        working_bytes: 0.0,
        cutoff_s: limits.cutoff_s,
    };
    let whole = limits.budget_bytes.is_finite().then(|| network.clone());
    let mut climbed = climb(network, climbing, start);
    if let Some(whole) = whole {
        leave_less_to_ops(&whole, climbing, &mut climbed);
    }
    close_by_program(&limits, &mut climbed);
    let Some(best) = climbed.best else {
        let is_cut = limits.cutoff_s.is_finite();
        if is_cut && climbed.bound_s >= limits.cutoff_s * (1.0 - limits.gap) {
            return Err(NoSolution::Slow {
                bound_s: climbed.bound_s,
            });
        }
        let least = climbed.least.ok_or(NoSolution::Rules)?;
        return Err(NoSolution::Memory {
            least: assignment_memory(instance, &least.numbers),
        });
    };
    // The objective has preferences on top of seconds; without them at most so much less.
    let greatest_dislike_s = instance.greatest_dislike_s();
    let mut proof = climbed.proof;
    proof.bound_s -= greatest_dislike_s;
    let groups = instance.groups.iter().zip(&best.numbers);
    let dislike_s: f64 = groups
        .map(|(group, choice)| group.strategies[*choice].dislike_s)
        .sum();
    let seconds = best.cost.seconds - dislike_s;
    Ok(Solved {
        lower_bound_s: (climbed.bound_s - greatest_dislike_s).min(seconds),
        memory: assignment_memory(instance, &best.numbers),
        assignment: best.numbers,
        seconds,
        proof,
        n_strategies,
        n_nets,
        n_open: self::n_strategies(&climbed.network) - climbed.network.nodes.len(),
    })
}

fn n_strategies(network: &Network) -> usize {
    let nodes = network.nodes.iter();
    nodes.map(|node| node.strategies.len()).sum()
}

/// Gaps that are not worth another search with other bytes set aside.
const WORTH_LESS: f64 = 5e-3;

/// Where memory is tight and ops of the best assignment work on more than they must, tries again
/// without the strategies that work on so much, with the room that this leaves.
fn leave_less_to_ops(whole: &Network, limits: ClimbLimits, climbed: &mut Climbed) {
    let upper_s = |climbed: &Climbed| {
        let best = climbed.best.as_ref();
        best.map_or(f64::INFINITY, |best| best.cost.seconds)
    };
    let is_tight = climbed.best.is_none() || climbed.proof.dual.byte_prices != [0.0; 2];
    let gap = limits.gap.max(WORTH_LESS);
    if !is_tight || climbed.bound_s >= upper_s(climbed).min(limits.cutoff_s) * (1.0 - gap) {
        return;
    }
    let spared_bytes = limits.budget_bytes - climbed.room_bytes;
    let met = climbed.best.as_ref().or(climbed.least.as_ref());
    let working_bytes = met.map_or(0.0, |met| met.cost.working_bytes);
    for allowed_bytes in [working_bytes, spared_bytes] {
        if allowed_bytes > working_bytes || working_bytes <= spared_bytes {
            continue;
        }
        let keeps: Vec<Vec<bool>> = whole
            .nodes
            .iter()
            .map(|node| {
                let working = node.working_bytes.iter();
                working.map(|n_bytes| *n_bytes <= allowed_bytes).collect()
            })
            .collect();
        if keeps.iter().any(|keep| !keep.contains(&true)) {
            continue;
        }
        let mut network = whole.clone();
        network.restrict(&keeps);
        if !network.make_consistent() {
            continue;
        }
        let cutoff_s = limits.cutoff_s.min(upper_s(climbed));
        let tighter = ClimbLimits {
            working_bytes: allowed_bytes,
            cutoff_s,
            ..limits
        };
        let start = Start {
            byte_prices: climbed.proof.dual.byte_prices,
            known: climbed.best.as_ref().map(|best| best.numbers.clone()),
        };
        let found = climb(network, tighter, &start);
        let is_less = |a: &Met, b: &Met| a.cost.peak_bytes() < b.cost.peak_bytes();
        if let Some(least) = found.least
            && climbed
                .least
                .as_ref()
                .is_none_or(|known| is_less(&least, known))
        {
            climbed.least = Some(least);
        }
        if found.best.is_some() {
            climbed.best = found.best;
        }
    }
}

/// Strategies left up to which an integer program is solved.
#[cfg(feature = "highs")]
const MAX_PROGRAM: usize = 1500;
/// The pure-Rust solver knows no limit of time.
#[cfg(not(feature = "highs"))]
const MAX_PROGRAM: usize = 60;

/// Closes the gap by an integer program over what is left, where that is little.
fn close_by_program(limits: &SolveLimits, climbed: &mut Climbed) {
    let best_s = climbed.best.as_ref().map(|best| best.cost.seconds);
    let upper_s = best_s.unwrap_or(f64::INFINITY).min(limits.cutoff_s);
    let is_closed = climbed.bound_s >= upper_s * (1.0 - limits.gap);
    let network = &climbed.network;
    let n_open = n_strategies(network) - network.nodes.len();
    if is_closed || n_open == 0 || n_open > MAX_PROGRAM {
        return;
    }
    let program = ProgramLimits {
        room_bytes: climbed.room_bytes,
        gap: limits.gap,
        time_s: limits.branch_s,
    };
    let Ok(answer) = solve_program(network, Kind::Whole, program) else {
        return;
    };
    let assignment = answer.rounded();
    let cost = network.cost(&assignment);
    let fits = cost.peak_bytes() <= limits.budget_bytes;
    if fits && best_s.is_none_or(|best_s| cost.seconds < best_s) {
        let nodes = network.nodes.iter().zip(&assignment);
        climbed.best = Some(Met {
            numbers: nodes
                .map(|(node, choice)| node.strategies[*choice])
                .collect(),
            cost,
        });
    }
}
