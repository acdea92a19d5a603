//! Calibration: the speeds of a cluster, corrected by what a run on it measured.
//!
//! Enters: a program with its prices, the cluster that they are of, a measured timeline of the program.
//! Leaves: the same cluster with other constants, and by how much each of them changed.
//! Invariant: only what the timeline shows is changed: a program without collectives says nothing of
//! links. Waiting for peers counts as latency of the collective that waits, so that the durations of a
//! rank add up to its step.
//!
//! The model is linear in what it corrects: an instruction takes `launch·x₀ + products·x₁`, or
//! `launch·x₀ + other·x₂`, a collective `launch·x₀ + latency·x₃ + bytes·x₄`; the x are fitted to all
//! events by least squares, none below 0 (Lawson and Hanson 1974, ch. 23).

use meshweave_dsl::cluster::{Cluster, Link};
use meshweave_dsl::program::{Action, Instruction, Program};
use meshweave_dsl::timeline::{Basis, Timeline};

use crate::plan::cost::collective_seconds;

/// What is corrected, in the order of [`Calibration::factors`].
pub const TERMS: [&str; 5] = [
    "launch",
    "products",
    "other compute",
    "collective latency",
    "collective bytes",
];

const N_TERMS: usize = TERMS.len();

/// Why a timeline cannot calibrate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CalibrateError {
    #[error("{0}")]
    Invalid(String),
}

/// A corrected cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    pub cluster: Cluster,
    /// Measured over predicted seconds of each of [`TERMS`]; `None` where the run did not show it.
    pub factors: [Option<f64>; N_TERMS],
}

/// Fits the constants of `cluster` to a measured timeline of `program`, whose prices are of it.
///
/// Linear in the events.
///
/// # Errors
/// `Invalid` for a predicted timeline, or one of another program.
pub fn calibrate(
    program: &Program,
    cluster: &Cluster,
    measured: &Timeline,
) -> Result<Calibration, CalibrateError> {
    if measured.basis != Basis::Measured {
        return Err(CalibrateError::Invalid(
            "a predicted timeline holds nothing to calibrate with; run the program".into(),
        ));
    }
    let mut fit = Fit::default();
    for event in &measured.events {
        let rank = program.ranks.get(event.rank);
        let instruction = rank.and_then(|rank| rank.instructions.get(event.instruction));
        let Some(instruction) = instruction.filter(|instruction| instruction.name == event.name)
        else {
            return Err(CalibrateError::Invalid(format!(
                "instruction {} of rank {} is `{}` in the timeline and another in the program `{}`",
                event.instruction, event.rank, event.name, program.name
            )));
        };
        fit.add(terms(instruction, cluster), event.duration_s);
    }
    let factors = fit.solve();
    Ok(Calibration {
        cluster: corrected(cluster, factors),
        factors,
    })
}

/// The predicted seconds of an instruction by term.
fn terms(instruction: &Instruction, cluster: &Cluster) -> [f64; N_TERMS] {
    let launch_s = cluster.device.launch_s.min(instruction.predicted_s);
    let work_s = instruction.predicted_s - launch_s;
    match &instruction.action {
        Action::Contract { .. } | Action::Attention { .. } | Action::AttentionGrad { .. } => {
            [launch_s, work_s, 0.0, 0.0, 0.0]
        }
        Action::Kernel { .. } | Action::Routine { .. } => [launch_s, 0.0, work_s, 0.0, 0.0],
        Action::Collective { op, .. } => {
            let empty_s = collective_seconds(op, 0.0, cluster);
            let latency_s = (empty_s - launch_s).clamp(0.0, work_s);
            [launch_s, 0.0, 0.0, latency_s, work_s - latency_s]
        }
        Action::Send { .. } | Action::Recv { .. } => {
            let latency_s = cluster.within_node.latency_s.min(work_s);
            [launch_s, 0.0, 0.0, latency_s, work_s - latency_s]
        }
    }
}

/// The cluster whose prices are the old ones, each term times its factor.
fn corrected(cluster: &Cluster, factors: [Option<f64>; N_TERMS]) -> Cluster {
    // A factor of 0 would be an infinite speed: what took no time was hidden by something else.
    let [launch, products, other, latency, bytes] =
        factors.map(|factor| factor.filter(|factor| *factor > 1e-3).unwrap_or(1.0));
    let mut cluster = cluster.clone();
    let device = &mut cluster.device;
    device.launch_s *= launch;
    for flops_per_s in device.matmul_flops_per_s.values_mut() {
        *flops_per_s /= products;
    }
    device.vector_flops_per_s /= other;
    device.memory_bytes_per_s /= other;
    let change = |link: &mut Link| {
        link.latency_s *= latency;
        link.bytes_per_s /= bytes;
    };
    change(&mut cluster.within_node);
    change(&mut cluster.between_nodes);
    cluster
}

/// The normal equations of a least-squares fit.
#[derive(Default)]
struct Fit {
    gram: [[f64; N_TERMS]; N_TERMS],
    target: [f64; N_TERMS],
}

/// Sweeps of coordinate descent; the five terms are nearly independent, so that few are needed.
const N_SWEEPS: usize = 1000;

impl Fit {
    fn add(&mut self, terms: [f64; N_TERMS], seconds: f64) {
        for (row, x) in terms.iter().enumerate() {
            for (column, y) in terms.iter().enumerate() {
                self.gram[row][column] += x * y;
            }
            self.target[row] += x * seconds;
        }
    }

    /// Minimizes over nonnegative factors by coordinate descent, which converges because the problem
    /// is convex.
    fn solve(&self) -> [Option<f64>; N_TERMS] {
        let mut factors = [1.0; N_TERMS];
        for _ in 0..N_SWEEPS {
            for term in 0..N_TERMS {
                let diagonal = self.gram[term][term];
                if diagonal > 0.0 {
                    let explained: f64 = (0..N_TERMS)
                        .map(|other| self.gram[term][other] * factors[other])
                        .sum();
                    let step = (self.target[term] - explained) / diagonal;
                    factors[term] = (factors[term] + step).max(0.0);
                }
            }
        }
        std::array::from_fn(|term| (self.gram[term][term] > 0.0).then_some(factors[term]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fit_finds_the_factors_that_made_the_times() {
        let truth = [2.0, 1.5, 0.8, 3.0, 1.25];
        let mut fit = Fit::default();
        for idx in 1..40 {
            let size = f64::from(idx);
            let rows = [
                [1.0, size, 0.0, 0.0, 0.0],
                [1.0, 0.0, size * size, 0.0, 0.0],
                [1.0, 0.0, 0.0, 2.0, size],
                [1.0, 0.0, 0.0, 4.0, 3.0],
            ];
            for row in rows {
                let seconds: f64 = row.iter().zip(truth).map(|(x, factor)| x * factor).sum();
                fit.add(row, seconds);
            }
        }
        for (found, factor) in fit.solve().iter().zip(truth) {
            assert!((found.unwrap() - factor).abs() < 1e-6, "{found:?} {factor}");
        }
    }

    #[test]
    fn what_a_run_does_not_show_stays() {
        let mut fit = Fit::default();
        fit.add([1.0, 2.0, 0.0, 0.0, 0.0], 5.0);
        fit.add([1.0, 4.0, 0.0, 0.0, 0.0], 9.0);
        let factors = fit.solve();
        assert_eq!(factors[2..], [None; 3]);
        let cluster = Cluster::preset("h100:16").unwrap();
        let changed = corrected(&cluster, factors);
        assert_eq!(changed.within_node, cluster.within_node);
        let ratio = cluster
            .device
            .matmul_peak(meshweave_dsl::dtype::DType::Bf16)
            / changed
                .device
                .matmul_peak(meshweave_dsl::dtype::DType::Bf16);
        assert!((ratio - 2.0).abs() < 1e-6, "{ratio}");
    }
}
