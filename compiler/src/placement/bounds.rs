//! How much of the transitions any division can keep, with proofs that need no solver to check.
//!
//! Enters: a chain and a number of groups. Leaves: a [`Certificate`], and from a certificate the
//! bound that it proves.
//! Invariant: [`evaluate`] depends on the chain and the certificate alone, and whatever the
//! certificate holds, no division keeps more.

use serde::{Deserialize, Serialize};

use super::chain::{Chain, transpose};
use super::eigen::{eigenvalues, product_transposed_right};
use super::matching::{self, Prices};
use crate::parallel::in_parallel;

/// Proofs of a bound, pair of layers by pair of layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    pub groups: usize,
    pub pairs: Vec<Proof>,
}

/// Why a pair of layers keeps at most so much.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Proof {
    /// Prices of a c-matching; see [`matching`].
    Matching(Prices),
    /// Singular values of the shares: a division's matrix of groups has G of them, all c. With the
    /// constant vector `u` apart, `kept ≤ c·(uᵀWu + σ₁(PWP) + … + σ_{G−1}(PWP))`, `P = I − uuᵀ`.
    Spectral,
}

/// Sweeps of [`matching::descend`]; more change the fourth digit.
const SWEEPS: usize = 24;

/// The best of the proofs above for every pair.
pub fn certify(chain: &Chain, groups: usize, threads: usize) -> Certificate {
    let pairs = in_parallel(chain.pairs.len(), threads, |pair| {
        best_proof(&widen(&chain.pairs[pair]), chain.experts, groups)
    });
    Certificate { groups, pairs }
}

fn best_proof(shares: &[f64], experts: usize, groups: usize) -> Proof {
    let size = experts / groups.max(1);
    let start = matching::row_prices(shares, experts, size);
    let rows = matching::bound(shares, size, &start);
    let both = matching::descend(shares, experts, size, start.clone(), SWEEPS);
    let by_matching = matching::bound(shares, size, &both);
    let transposed = transpose(shares, experts);
    let columns = matching::row_prices(&transposed, experts, size);
    let by_columns = matching::bound(&transposed, size, &columns);
    if spectral(shares, experts, groups) < by_matching.min(rows).min(by_columns) {
        return Proof::Spectral;
    }
    if by_matching <= rows.min(by_columns) {
        Proof::Matching(both)
    } else if rows <= by_columns {
        Proof::Matching(start)
    } else {
        Proof::Matching(Prices {
            rows: columns.columns,
            columns: columns.rows,
        })
    }
}

/// The bound that a certificate proves for a chain.
pub fn evaluate(chain: &Chain, certificate: &Certificate) -> f64 {
    evaluate_pairs(chain, certificate).iter().sum()
}

/// The same, pair by pair. A pair without a proof keeps at most all it has.
pub fn evaluate_pairs(chain: &Chain, certificate: &Certificate) -> Vec<f64> {
    let size = chain.experts / certificate.groups.max(1);
    let pairs = chain.pairs.iter().enumerate().map(|(pair, shares)| {
        let shares = widen(shares);
        let all: f64 = shares.iter().sum();
        match certificate.pairs.get(pair) {
            None => all,
            Some(Proof::Spectral) => spectral(&shares, chain.experts, certificate.groups).min(all),
            Some(Proof::Matching(prices)) => {
                let fits =
                    prices.rows.len() == chain.experts && prices.columns.len() == chain.experts;
                if fits {
                    matching::bound(&shares, size, prices).min(all)
                } else {
                    all
                }
            }
        }
    });
    pairs.collect()
}

/// Rounding of eigenvalues, relative to the greatest: far above what [`super::eigen`] leaves.
const ROUNDING: f64 = 1e-10;

fn spectral(shares: &[f64], experts: usize, groups: usize) -> f64 {
    let (centered, constant) = center(shares, experts);
    let gram = product_transposed_right(&centered, &centered, experts);
    let values = eigenvalues(&gram, experts);
    let greatest = values.last().copied().unwrap_or(0.0).max(0.0);
    let top = values.iter().rev().take(groups - 1);
    let sum: f64 = top
        .map(|value| (value.max(0.0) + ROUNDING * greatest).sqrt())
        .sum();
    (experts / groups) as f64 * (constant + sum)
}

/// `P W P` and `uᵀ W u` with `u = 1/√n` and `P = I − u uᵀ`.
pub fn center(matrix: &[f64], n: usize) -> (Vec<f64>, f64) {
    let scale = 1.0 / n as f64;
    let rows: Vec<f64> = matrix
        .chunks(n.max(1))
        .map(|row| row.iter().sum::<f64>() * scale)
        .collect();
    let mut columns = vec![0.0; n];
    for row in matrix.chunks(n.max(1)) {
        for (column, x) in columns.iter_mut().zip(row) {
            *column += x * scale;
        }
    }
    let mean = rows.iter().sum::<f64>() * scale;
    let centered = matrix
        .chunks(n.max(1))
        .zip(&rows)
        .flat_map(|(row, of_row)| {
            let entries = row.iter().zip(&columns);
            entries.map(move |(x, of_column)| x - of_row - of_column + mean)
        });
    (centered.collect(), mean * n as f64)
}

/// In double precision.
pub fn widen(matrix: &[f32]) -> Vec<f64> {
    matrix.iter().map(|x| f64::from(*x)).collect()
}
