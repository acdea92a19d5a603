//! The choice of a strategy for every group: a linear program, and branching only where it must.
//!
//! Enters: an [`Instance`] and a memory budget. Leaves: an assignment, its seconds, and a lower bound.
//! Invariant: `lower_bound_s ≤ seconds`, and `seconds` is the price of the assignment computed apart
//! from the solver.
//!
//! Variables: x[group, strategy] ≥ 0 with Σ x = 1. A net is a unit of flow from the layouts of its
//! maker to those of each reader over reshard arcs; readers of one net share what they pay for an
//! arc (y ≥ flow of every reader). The relaxation is solved first; where it is fractional, the
//! strategies that it uses are branched on, and only when that leaves a gap, all of them.

use std::collections::BTreeSet;

use good_lp::{
    Expression, ProblemVariables, ResolutionError, Solution, SolverModel, Variable, constraint,
    variable,
};

use super::grid::{Code, Metric};
use super::instance::Instance;

/// Bounds of one solve.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SolveLimits {
    /// Relative gap at which an assignment is good enough.
    pub gap: f64,
    /// Seconds for branching over all strategies of one mesh.
    pub branch_s: f64,
    /// Bytes a rank may use.
    pub budget_bytes: f64,
}

/// The best assignment found.
#[derive(Clone, Debug, PartialEq)]
pub struct Solved {
    /// One strategy index per group.
    pub assignment: Vec<usize>,
    pub seconds: f64,
    pub lower_bound_s: f64,
    pub memory: Memory,
    pub n_variables: usize,
    pub n_constraints: usize,
    /// Variables of the relaxation that were neither 0 nor 1.
    pub n_fractional: usize,
}

/// Bytes of one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Memory {
    pub kept_bytes: f64,
    pub saved_bytes: f64,
    pub gradient_bytes: f64,
}

impl Memory {
    /// At the turn from forward to backward, or at its end, whichever is more.
    pub fn peak_bytes(self) -> f64 {
        self.kept_bytes + self.saved_bytes.max(self.gradient_bytes)
    }
}

/// Why there is no assignment.
#[derive(Clone, Debug, PartialEq)]
pub enum NoSolution {
    /// Nothing fits the budget: the least peak that any assignment has.
    Memory { least: Memory },
    /// Rules that contradict each other.
    Rules,
    /// The solver gave up.
    Solver(String),
}

/// Seconds of an assignment: compute of all groups and reshards of all nets.
pub fn assignment_seconds(instance: &Instance, assignment: &[usize], metric: &mut Metric) -> f64 {
    let chosen = |group: usize| &instance.groups[group].strategies[assignment[group]];
    let compute: f64 = (0..instance.groups.len())
        .map(|group| chosen(group).seconds)
        .sum();
    let mut reshard = 0.0;
    for net in &instance.nets {
        let from = chosen(net.from.0).codes[net.from.1];
        let to: Vec<Code> = net
            .to
            .iter()
            .map(|(group, port)| chosen(*group).codes[*port])
            .collect();
        let via = if to.len() > 1 {
            net.codes(instance)
        } else {
            Vec::new()
        };
        reshard += net.weight * metric.shared_seconds(&net.ty, from, &to, &via);
    }
    compute + reshard
}

/// Bytes of an assignment.
pub fn assignment_memory(instance: &Instance, assignment: &[usize]) -> Memory {
    let mut memory = Memory::default();
    for (group, choice) in instance.groups.iter().zip(assignment) {
        let strategy = &group.strategies[*choice];
        memory.kept_bytes += strategy.kept_bytes;
        memory.saved_bytes += strategy.saved_bytes;
        memory.gradient_bytes += strategy.gradient_bytes;
    }
    memory
}

/// The cheapest assignment within the budget.
///
/// # Errors
/// Nothing fits, rules contradict each other, or the solver gives up.
pub fn solve(
    instance: &Instance,
    limits: SolveLimits,
    metric: &mut Metric,
) -> Result<Solved, NoSolution> {
    let all = all_strategies(instance);
    let relaxed = Program::build(instance, &all, Kind::Relaxed, limits, metric).solve(limits);
    let relaxed = match relaxed {
        Ok(relaxed) => relaxed,
        Err(ResolutionError::Infeasible) => return Err(why_infeasible(instance, limits, metric)),
        Err(error) => return Err(NoSolution::Solver(error.to_string())),
    };
    // The objective has preferences on top of seconds; without them at most so much less.
    let lower_bound_s = relaxed.objective_s - greatest_dislike_s(instance);
    let n_fractional = relaxed
        .values
        .iter()
        .flatten()
        .filter(|value| (**value - value.round()).abs() > 1e-6)
        .count();
    let mut best = Assigned::of(instance, relaxed.rounded(), metric);
    let is_done = |best: &Assigned| {
        best.memory.peak_bytes() <= limits.budget_bytes
            && best.seconds + best.dislike_s <= relaxed.objective_s * (1.0 + limits.gap) + 1e-12
    };
    if n_fractional > 0 && !is_done(&best) {
        // The strategies in use, then all of them.
        let used: Vec<Vec<usize>> = relaxed
            .values
            .iter()
            .map(|values| {
                let used = values
                    .iter()
                    .enumerate()
                    .filter(|(_, value)| **value > 1e-6);
                used.map(|(strategy, _)| strategy).collect()
            })
            .collect();
        for allowed in [used, all] {
            let program = Program::build(instance, &allowed, Kind::Whole, limits, metric);
            if let Ok(whole) = program.solve(limits) {
                let found = Assigned::of(instance, whole.rounded(), metric);
                let fits = |one: &Assigned| one.memory.peak_bytes() <= limits.budget_bytes;
                let total = |one: &Assigned| one.seconds + one.dislike_s;
                if fits(&found) && (!fits(&best) || total(&found) < total(&best)) {
                    best = found;
                }
            }
            if is_done(&best) {
                break;
            }
        }
    }
    if best.memory.peak_bytes() > limits.budget_bytes * (1.0 + 1e-9) {
        return Err(NoSolution::Solver(format!(
            "no whole assignment within {:.0} bytes was found",
            limits.budget_bytes
        )));
    }
    Ok(Solved {
        lower_bound_s: lower_bound_s.min(best.seconds),
        assignment: best.assignment,
        seconds: best.seconds,
        memory: best.memory,
        n_variables: relaxed.n_variables,
        n_constraints: relaxed.n_constraints,
        n_fractional,
    })
}

struct Assigned {
    assignment: Vec<usize>,
    seconds: f64,
    dislike_s: f64,
    memory: Memory,
}

impl Assigned {
    fn of(instance: &Instance, assignment: Vec<usize>, metric: &mut Metric) -> Self {
        Self {
            seconds: assignment_seconds(instance, &assignment, metric),
            dislike_s: instance
                .groups
                .iter()
                .zip(&assignment)
                .map(|(group, choice)| group.strategies[*choice].dislike_s)
                .sum(),
            memory: assignment_memory(instance, &assignment),
            assignment,
        }
    }
}

fn greatest_dislike_s(instance: &Instance) -> f64 {
    let groups = instance.groups.iter();
    let greatest = groups.map(|group| {
        let strategies = group.strategies.iter();
        strategies.map(|one| one.dislike_s).fold(0.0, f64::max)
    });
    greatest.sum()
}

/// The least peak of all assignments, when that is above the budget.
fn why_infeasible(instance: &Instance, limits: SolveLimits, metric: &mut Metric) -> NoSolution {
    let all = all_strategies(instance);
    let free = SolveLimits {
        budget_bytes: f64::INFINITY,
        ..limits
    };
    let least = Program::build(instance, &all, Kind::LeastMemory, free, metric).solve(free);
    match least {
        Ok(least) => NoSolution::Memory {
            least: least.memory(instance),
        },
        Err(ResolutionError::Infeasible) => NoSolution::Rules,
        Err(error) => NoSolution::Solver(error.to_string()),
    }
}

fn all_strategies(instance: &Instance) -> Vec<Vec<usize>> {
    let groups = instance.groups.iter();
    groups
        .map(|group| (0..group.strategies.len()).collect())
        .collect()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Relaxed,
    Whole,
    /// Bytes instead of seconds.
    LeastMemory,
}

/// Objective units a second (or a byte): solvers' tolerances are absolute.
const PER_SECOND: f64 = 1e6;
const PER_BYTE: f64 = 1e-6;

struct Program {
    variables: ProblemVariables,
    objective: Expression,
    constraints: Vec<good_lp::Constraint>,
    /// Per group, per strategy; `None` where it is not allowed.
    choices: Vec<Vec<Option<Variable>>>,
    kind: Kind,
}

struct Answer {
    values: Vec<Vec<f64>>,
    objective_s: f64,
    n_variables: usize,
    n_constraints: usize,
}

impl Answer {
    /// Bytes of the (possibly fractional) answer.
    fn memory(&self, instance: &Instance) -> Memory {
        let mut memory = Memory::default();
        for (group, values) in instance.groups.iter().zip(&self.values) {
            for (strategy, value) in group.strategies.iter().zip(values) {
                memory.kept_bytes += value * strategy.kept_bytes;
                memory.saved_bytes += value * strategy.saved_bytes;
                memory.gradient_bytes += value * strategy.gradient_bytes;
            }
        }
        memory
    }

    /// The strategy of the greatest value in every group, the first among equals.
    fn rounded(&self) -> Vec<usize> {
        self.values
            .iter()
            .map(|values| {
                let mut best = 0;
                for (strategy, value) in values.iter().enumerate() {
                    if *value > values[best] + 1e-9 {
                        best = strategy;
                    }
                }
                best
            })
            .collect()
    }
}

impl Program {
    fn build(
        instance: &Instance,
        allowed: &[Vec<usize>],
        kind: Kind,
        limits: SolveLimits,
        metric: &mut Metric,
    ) -> Self {
        let mut program = Self {
            variables: ProblemVariables::new(),
            objective: Expression::with_capacity(1024),
            constraints: Vec::new(),
            choices: Vec::with_capacity(instance.groups.len()),
            kind,
        };
        for (group, allowed) in instance.groups.iter().zip(allowed) {
            let mut choices = vec![None; group.strategies.len()];
            let mut sum = Expression::with_capacity(allowed.len());
            for strategy in allowed {
                let definition = variable().min(0.0);
                let x = program.variables.add(if kind == Kind::Whole {
                    definition.binary()
                } else {
                    definition
                });
                choices[*strategy] = Some(x);
                sum += x;
                if kind != Kind::LeastMemory {
                    let one = &group.strategies[*strategy];
                    let one_s = one.seconds + one.dislike_s;
                    program.objective.add_mul(one_s * PER_SECOND, x);
                }
            }
            program.constraints.push(constraint!(sum == 1.0));
            program.choices.push(choices);
        }
        program.add_memory(instance, limits);
        if kind != Kind::LeastMemory {
            for net in &instance.nets {
                program.add_net(instance, net, metric);
            }
        }
        program
    }

    fn add_memory(&mut self, instance: &Instance, limits: SolveLimits) {
        let mut turn = Expression::with_capacity(256);
        let mut end = Expression::with_capacity(256);
        for (group, choices) in instance.groups.iter().zip(&self.choices) {
            for (strategy, x) in group.strategies.iter().zip(choices) {
                let Some(x) = x else { continue };
                let add = |row: &mut Expression, n_bytes: f64| {
                    if n_bytes > 0.0 {
                        row.add_mul(n_bytes * PER_BYTE, *x);
                    }
                };
                add(&mut turn, strategy.kept_bytes + strategy.saved_bytes);
                add(&mut end, strategy.kept_bytes + strategy.gradient_bytes);
            }
        }
        if self.kind == Kind::LeastMemory {
            let peak = self.variables.add(variable().min(0.0));
            self.objective.add_mul(1.0, peak);
            self.constraints.push(constraint!(turn <= peak));
            self.constraints.push(constraint!(end <= peak));
        } else if limits.budget_bytes.is_finite() {
            let budget = limits.budget_bytes * PER_BYTE;
            self.constraints.push(constraint!(turn <= budget));
            self.constraints.push(constraint!(end <= budget));
        }
    }

    /// The strategies of a group that have a layout at a port, as a sum.
    fn share(
        &self,
        instance: &Instance,
        end: (usize, usize),
        code: Code,
        sign: f64,
        row: &mut Expression,
    ) {
        let strategies = instance.groups[end.0].strategies.iter();
        for (strategy, x) in strategies.zip(&self.choices[end.0]) {
            if strategy.codes[end.1] == code
                && let Some(x) = x
            {
                row.add_mul(sign, *x);
            }
        }
    }

    fn codes_at(&self, instance: &Instance, end: (usize, usize)) -> BTreeSet<Code> {
        let strategies = instance.groups[end.0].strategies.iter();
        strategies
            .zip(&self.choices[end.0])
            .filter(|(_, x)| x.is_some())
            .map(|(strategy, _)| strategy.codes[end.1])
            .collect()
    }

    fn add_net(&mut self, instance: &Instance, net: &super::instance::Net, metric: &mut Metric) {
        let mut codes = self.codes_at(instance, net.from);
        for end in &net.to {
            codes.extend(self.codes_at(instance, *end));
        }
        if codes.len() < 2 {
            return;
        }
        let codes: Vec<Code> = codes.into_iter().collect();
        let arcs = metric.arcs(&net.ty, &codes);
        let paid: Vec<Variable> = arcs
            .iter()
            .map(|_| self.variables.add(variable().min(0.0)))
            .collect();
        for (arc, y) in arcs.iter().zip(&paid) {
            self.objective
                .add_mul(net.weight * arc.seconds * PER_SECOND, *y);
        }
        for end in &net.to {
            let flows: Vec<Variable> = if net.to.len() == 1 {
                paid.clone()
            } else {
                let flows = arcs.iter().map(|_| self.variables.add(variable().min(0.0)));
                let flows: Vec<Variable> = flows.collect();
                for (flow, y) in flows.iter().zip(&paid) {
                    self.constraints.push(constraint!(*flow <= *y));
                }
                flows
            };
            let mut rows: Vec<Expression> = codes
                .iter()
                .map(|code| {
                    let mut row = Expression::with_capacity(16);
                    self.share(instance, net.from, *code, 1.0, &mut row);
                    self.share(instance, *end, *code, -1.0, &mut row);
                    row
                })
                .collect();
            for (arc, flow) in arcs.iter().zip(&flows) {
                rows[arc.from].add_mul(-1.0, *flow);
                rows[arc.to].add_mul(1.0, *flow);
            }
            for row in rows {
                self.constraints.push(constraint!(row == 0.0));
            }
        }
    }

    fn solve(self, limits: SolveLimits) -> Result<Answer, ResolutionError> {
        let n_variables = self.variables.len();
        let n_constraints = self.constraints.len();
        let unsolved = self.variables.minimise(self.objective.clone());
        #[cfg(feature = "highs")]
        let mut model = {
            let mut model = good_lp::highs(unsolved);
            model = model.set_option("threads", 1);
            if self.kind != Kind::Whole {
                // Dual simplex gets through these flow problems faster than presolve shrinks them.
                model = model.set_option("presolve", "off");
            }
            if self.kind == Kind::Whole {
                model = model.set_option("time_limit", limits.branch_s);
                model = model.set_option("mip_rel_gap", limits.gap);
            }
            model
        };
        // The pure-Rust solver takes no limits.
        #[cfg(not(feature = "highs"))]
        let (mut model, _) = (good_lp::microlp(unsolved), limits);
        for constraint in self.constraints {
            model.add_constraint(constraint);
        }
        let solution = model.solve()?;
        let values: Vec<Vec<f64>> = self
            .choices
            .iter()
            .map(|choices| {
                let values = choices.iter();
                values
                    .map(|x| x.map_or(0.0, |x| solution.value(x)))
                    .collect()
            })
            .collect();
        let unit = match self.kind {
            Kind::LeastMemory => PER_BYTE,
            _ => PER_SECOND,
        };
        Ok(Answer {
            values,
            objective_s: solution.eval(&self.objective) / unit,
            n_variables,
            n_constraints,
        })
    }
}
