//! The choice of strategies as a linear program, and as an integer one.
//!
//! Enters: a [`Network`] and a memory budget. Leaves: a value for every strategy, and a bound.
//! Invariant: the relaxation is the one whose dual [`super::dual`] climbs: neither bound exceeds the
//! cheapest assignment, and this one is never the lower, up to rounding.
//!
//! Variables: x[node, strategy] ≥ 0 with Σ x = 1. A net is a unit of flow from the layouts of its
//! maker to those of each reader over reshard arcs; readers of one net share what they pay for an
//! arc (y ≥ flow of every reader). Used where enumeration leaves a gap, and as a check in tests.

use good_lp::{
    Expression, ProblemVariables, ResolutionError, Solution, SolverModel, Variable, constraint,
    variable,
};

use super::network::{Network, Reshards};

/// Which program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "tests compare its bound with the dual's")
    )]
    Relaxed,
    Whole,
}

/// Bounds of one solve.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProgramLimits {
    /// Bytes at the turn and at the end of backward.
    pub room_bytes: f64,
    /// Of an integer program.
    pub gap: f64,
    pub time_s: f64,
}

/// A solved program.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub values: Vec<Vec<f64>>,
    /// The least seconds, of a relaxation a bound.
    pub seconds: f64,
}

impl Answer {
    /// The strategy of the greatest value in every node, the first among equals.
    pub fn rounded(&self) -> Vec<usize> {
        let best = |values: &Vec<f64>| {
            let mut best = 0;
            for (strategy, value) in values.iter().enumerate() {
                if *value > values[best] + 1e-9 {
                    best = strategy;
                }
            }
            best
        };
        self.values.iter().map(best).collect()
    }
}

/// Objective units a second (or a byte): solvers' tolerances are absolute.
const PER_SECOND: f64 = 1e6;
const PER_BYTE: f64 = 1e-6;

/// Solves the program of a network.
///
/// # Errors
/// There is no answer, or the solver gives up.
pub fn solve_program(
    network: &Network,
    kind: Kind,
    limits: ProgramLimits,
) -> Result<Answer, ResolutionError> {
    Program::build(network, kind, limits).solve(limits)
}

struct Program {
    variables: ProblemVariables,
    objective: Expression,
    constraints: Vec<good_lp::Constraint>,
    /// Per node, per strategy.
    choices: Vec<Vec<Variable>>,
    kind: Kind,
}

impl Program {
    fn build(network: &Network, kind: Kind, limits: ProgramLimits) -> Self {
        let mut program = Self {
            variables: ProblemVariables::new(),
            objective: Expression::with_capacity(1024),
            constraints: Vec::new(),
            choices: Vec::with_capacity(network.nodes.len()),
            kind,
        };
        let mut rows = [
            Expression::with_capacity(256),
            Expression::with_capacity(256),
        ];
        for node in &network.nodes {
            let mut sum = Expression::with_capacity(node.strategies.len());
            let mut choices = Vec::with_capacity(node.strategies.len());
            for (seconds, n_bytes) in node.seconds.iter().zip(&node.bytes) {
                let definition = variable().min(0.0);
                let x = program.variables.add(if kind == Kind::Whole {
                    definition.binary()
                } else {
                    definition
                });
                choices.push(x);
                sum += x;
                program.objective.add_mul(seconds * PER_SECOND, x);
                for (row, n_bytes) in rows.iter_mut().zip(n_bytes) {
                    if *n_bytes > 0.0 {
                        row.add_mul(n_bytes * PER_BYTE, x);
                    }
                }
            }
            program.constraints.push(constraint!(sum == 1.0));
            program.choices.push(choices);
        }
        if limits.room_bytes.is_finite() {
            for row in rows {
                let room = limits.room_bytes * PER_BYTE;
                program.constraints.push(constraint!(row <= room));
            }
        }
        for net in 0..network.nets.len() {
            program.add_net(network, net);
        }
        program
    }

    /// The strategies of a node by the layout they have at an edge, as sums.
    fn share(&self, node: usize, codes: &[u16], sign: f64, rows: &mut [Expression]) {
        for (code, x) in codes.iter().zip(&self.choices[node]) {
            rows[usize::from(*code)].add_mul(sign, *x);
        }
    }

    fn add_net(&mut self, network: &Network, net_idx: usize) {
        let net = &network.nets[net_idx];
        let edges = network.edges_of(net_idx);
        let with_arcs;
        let arcs = if net.n_edges > 1 {
            &net.reshards.arcs
        } else {
            let seconds = net.reshards.seconds.clone();
            with_arcs = Reshards::new(net.reshards.n_codes, seconds, true);
            &with_arcs.arcs
        };
        let paid: Vec<Variable> = arcs
            .iter()
            .map(|_| self.variables.add(variable().min(0.0)))
            .collect();
        for (arc, y) in arcs.iter().zip(&paid) {
            self.objective
                .add_mul(net.weight * arc.seconds * PER_SECOND, *y);
        }
        for edge in edges {
            let flows: Vec<Variable> = if edges.len() == 1 {
                paid.clone()
            } else {
                let flows = arcs.iter().map(|_| self.variables.add(variable().min(0.0)));
                let flows: Vec<Variable> = flows.collect();
                for (flow, y) in flows.iter().zip(&paid) {
                    self.constraints.push(constraint!(*flow <= *y));
                }
                flows
            };
            let mut rows = vec![Expression::with_capacity(16); net.reshards.n_codes];
            self.share(edge.maker, &edge.made, 1.0, &mut rows);
            self.share(edge.reader, &edge.read, -1.0, &mut rows);
            for (arc, flow) in arcs.iter().zip(&flows) {
                rows[usize::from(arc.from)].add_mul(-1.0, *flow);
                rows[usize::from(arc.to)].add_mul(1.0, *flow);
            }
            for row in rows {
                self.constraints.push(constraint!(row == 0.0));
            }
        }
    }

    fn solve(self, limits: ProgramLimits) -> Result<Answer, ResolutionError> {
        let unsolved = self.variables.minimise(self.objective.clone());
        #[cfg(feature = "highs")]
        let mut model = {
            let mut model = good_lp::highs(unsolved);
            model = model.set_option("threads", 1);
            if self.kind == Kind::Whole {
                model = model.set_option("time_limit", limits.time_s);
                model = model.set_option("mip_rel_gap", limits.gap);
            } else {
                // Dual simplex gets through these flow problems faster than presolve shrinks them.
                model = model.set_option("presolve", "off");
            }
            model
        };
        // The pure-Rust solver takes no limits.
        #[cfg(not(feature = "highs"))]
        let (mut model, _, _) = (good_lp::microlp(unsolved), limits, self.kind);
        for constraint in self.constraints {
            model.add_constraint(constraint);
        }
        let solution = model.solve()?;
        let choices = self.choices.iter();
        Ok(Answer {
            values: choices
                .map(|choices| choices.iter().map(|x| solution.value(*x)).collect())
                .collect(),
            seconds: solution.eval(&self.objective) / PER_SECOND,
        })
    }
}
