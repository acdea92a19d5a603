//! Affinity placement as an integer linear program.
//!
//! Enters: a chain, a number of groups, and a formulation. Leaves: a division with the solver's
//! bound on it.
//! Invariant: what is kept is counted apart from the solver.
//!
//! The plain program is ExFlow's (arXiv 2401.08383, §4.3), aggregated: x says which group an expert
//! lies in, y whether a transition is kept. Its relaxation is worth nothing: x = 1/G keeps all. With
//! y as a flow whose degree is the size of a group, the relaxation is the matching bound.

use good_lp::{
    Expression, ProblemVariables, ResolutionError, Solution, SolverModel, Variable, constraint,
    variable,
};

use super::PlacementError;
use super::chain::{Chain, Division};

/// How kept transitions are tied to groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Formulation {
    /// `y_ij ≤ 1 − x_ig + x_jg` for every group.
    Plain,
    /// The same, and `Σ_j y_ij = Σ_i y_ij = E/G`.
    Flow,
}

/// What the solver found.
#[derive(Clone, Debug, PartialEq)]
pub struct Solved {
    pub division: Division,
    pub kept: f64,
    /// The program was solved to the end.
    pub is_optimal: bool,
    pub n_variables: usize,
}

/// Solves within `limit_s` seconds where the solver takes limits (HiGHS does, microlp does not).
///
/// # Errors
/// The solver found nothing in time.
pub fn solve(
    chain: &Chain,
    groups: usize,
    formulation: Formulation,
    limit_s: f64,
) -> Result<Solved, PlacementError> {
    let (experts, size) = (chain.experts, (chain.experts / groups) as f64);
    let mut variables = ProblemVariables::new();
    let mut rows = Vec::new();
    let x: Vec<Vec<Vec<Variable>>> = (0..chain.layers)
        .map(|_| {
            let mut expert = || {
                (0..groups)
                    .map(|_| variables.add(variable().binary()))
                    .collect()
            };
            (0..experts).map(|_| expert()).collect()
        })
        .collect();
    for layer in &x {
        for expert in layer {
            rows.push(constraint!(expert.iter().sum::<Expression>() == 1.0));
        }
        for group in 0..groups {
            let members = layer.iter().map(|expert| expert[group]);
            rows.push(constraint!(members.sum::<Expression>() == size));
        }
    }
    // Names of groups do not matter: the first expert names its own.
    if let Some(first) = x.first().and_then(|layer| layer.first()) {
        rows.push(constraint!(first[0] == 1.0));
    }
    let mut objective = Expression::with_capacity(chain.pairs.len() * experts * experts);
    for (pair, shares) in chain.pairs.iter().enumerate() {
        let mut degrees = vec![Expression::default(); 2 * experts];
        for (at, share) in shares.iter().enumerate() {
            let (from, to) = (at / experts, at % experts);
            let y = variables.add(variable().min(0.0).max(1.0));
            objective.add_mul(f64::from(*share), y);
            degrees[from].add_mul(1.0, y);
            degrees[experts + to].add_mul(1.0, y);
            let ends = x[pair][from].iter().zip(&x[pair + 1][to]);
            rows.extend(ends.map(|(here, there)| constraint!(y + *here - *there <= 1.0)));
        }
        if formulation == Formulation::Flow {
            rows.extend(
                degrees
                    .into_iter()
                    .map(|degree| constraint!(degree == size)),
            );
        }
    }
    let n_variables = variables.len();
    let unsolved = variables.maximise(objective);
    #[cfg(feature = "highs")]
    let mut model = good_lp::highs(unsolved)
        .set_option("threads", 1)
        .set_option("time_limit", limit_s);
    // The pure-Rust solver takes no limits.
    #[cfg(not(feature = "highs"))]
    let (mut model, _) = (good_lp::microlp(unsolved), limit_s);
    for row in rows {
        model.add_constraint(row);
    }
    let solution = model.solve().map_err(|error: ResolutionError| {
        PlacementError::Exhausted(format!(
            "no placement was found in {limit_s} s ({n_variables} variables): {error}"
        ))
    })?;
    let division: Division = x
        .iter()
        .map(|layer| {
            let group_of = |expert: &Vec<Variable>| {
                let values = expert.iter().map(|x| solution.value(*x));
                let mut best = (f64::NEG_INFINITY, 0);
                for (group, value) in values.enumerate() {
                    if value > best.0 {
                        best = (value, group as u16);
                    }
                }
                best.1
            };
            layer.iter().map(group_of).collect()
        })
        .collect();
    Ok(Solved {
        kept: chain.kept(&division),
        division,
        is_optimal: matches!(solution.status(), good_lp::solvers::SolutionStatus::Optimal),
        n_variables,
    })
}
