//! A tighter bound from all pairs of layers together.
//!
//! Enters: a chain, a number of groups, and how many steps to spend. Leaves: multipliers, and from
//! multipliers the bound that they prove.
//! Invariant: whatever the multipliers hold, no division keeps more than [`Multipliers::bound`].
//!
//! For a division let X be a layer's matrix of experts and groups, `Y = X Xᵀ` (who shares a group)
//! and `Z = X X′ᵀ` (who shares one across two layers). `[[Y, Z], [Zᵀ, Y′]]` is positive semidefinite
//! (it is a Gram matrix), Z is a c-matching, and Y is c times a projection of rank G. So for any
//! split `W = 2N + R` and any `[[A, −N], [−Nᵀ, C]] ⪰ 0`,
//!
//! ```text
//! ⟨W, Z⟩ ≤ ⟨R, Z⟩ + ⟨A, Y⟩ + ⟨C, Y′⟩
//! kept   ≤ Σ matching(R) + c Σ (the G greatest eigenvalues of A of the pair after + C of that before)
//! ```
//!
//! This is the dual of the semidefinite relaxation that couples the pairs through Y (chordal, so
//! pairs suffice), with Lagrangian multipliers A and C; the sum over single pairs with `R = 0` is
//! the spectral bound, with `N = 0` the matching bound. As there, the constant vector is apart.
//!
//! Multipliers are found by a subgradient method: A and C are the gradients of the nuclear norm
//! `2‖Y^½ N Y′^½‖` at smoothed projections Y, and R moves toward agreement of both sides' Z.

use super::bounds::{center, widen};
use super::chain::Chain;
use super::eigen::{
    Eigen, eigenvalues, product, product_transposed_left, product_transposed_right,
};
use super::matching::{self, Prices};
use crate::parallel::in_parallel;

/// Multipliers of the whole chain.
#[derive(Clone, Debug, PartialEq)]
pub struct Multipliers {
    pub groups: usize,
    pub pairs: Vec<PairMultipliers>,
}

/// Multipliers of a pair of layers; matrices E × E.
#[derive(Clone, Debug, PartialEq)]
pub struct PairMultipliers {
    /// R: what the matching answers for.
    pub rest: Vec<f64>,
    pub prices: Prices,
    /// A and C.
    pub before: Vec<f64>,
    pub after: Vec<f64>,
}

/// How hard to try.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CoupledOptions {
    pub steps: usize,
    pub threads: usize,
}

/// Step of R at first, in units of the mean share 1/E²; falls as 1/(1 + step/10).
const FIRST_STEP: f64 = 10.0;
/// Width of the smoothed projections, relative to the spread of the eigenvalues, and their floor:
/// wide enough that A and C stay well conditioned.
const WIDTH: f64 = 0.4;
const FLOOR: f64 = 0.2;

impl Multipliers {
    /// Finds multipliers; the best of all steps. O(steps · layers · experts³).
    pub fn find(chain: &Chain, groups: usize, options: CoupledOptions) -> Self {
        let n = chain.experts;
        let mut rest: Vec<Vec<f64>> = vec![vec![0.0; n * n]; chain.pairs.len()];
        let mut roots: Vec<Option<Roots>> = vec![None; chain.layers];
        let mut prices = vec![Prices::default(); chain.pairs.len()];
        let mut best: Option<(f64, Self)> = None;
        for step in 0..options.steps.max(1) {
            let pairs = in_parallel(chain.pairs.len(), options.threads, |pair| {
                let shares = widen(&chain.pairs[pair]);
                dual_step(&shares, &rest[pair], &roots[pair], &roots[pair + 1], n)
            });
            let (found, agreements): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
            let size = n / groups;
            prices = in_parallel(chain.pairs.len(), options.threads, |pair| {
                matching::descend(&rest[pair], n, size, prices[pair].clone(), 6)
            });
            let multipliers = Self {
                groups,
                pairs: found
                    .into_iter()
                    .zip(&rest)
                    .zip(&prices)
                    .map(|(((before, after), rest), prices)| PairMultipliers {
                        rest: rest.clone(),
                        prices: prices.clone(),
                        before,
                        after,
                    })
                    .collect(),
            };
            let eigen = in_parallel(chain.layers, options.threads, |layer| {
                Eigen::of(&multipliers.of_layer(layer, n), n)
            });
            let bound = multipliers.total(chain, eigen.iter().map(|e| e.values.as_slice()));
            roots = eigen
                .iter()
                .map(|e| Some(Roots::of(e, groups - 1)))
                .collect();
            if step > 0 {
                let size = FIRST_STEP / (n * n) as f64 / (1.0 + step as f64 / 10.0);
                rest = in_parallel(chain.pairs.len(), options.threads, |pair| {
                    move_rest(
                        &rest[pair],
                        &prices[pair],
                        &agreements[pair],
                        n,
                        groups,
                        size,
                    )
                });
            }
            if best.as_ref().is_none_or(|(least, _)| bound < *least) {
                best = Some((bound, multipliers));
            }
        }
        best.map_or(
            Self {
                groups,
                pairs: Vec::new(),
            },
            |(_, best)| best,
        )
    }

    /// The bound that these multipliers prove.
    pub fn bound(&self, chain: &Chain, threads: usize) -> f64 {
        let n = chain.experts;
        // What A and C lack to be legal is added to their diagonals, and paid.
        let lacking: f64 = in_parallel(self.pairs.len(), threads, |pair| {
            let half = self.half(&widen(&chain.pairs[pair]), pair);
            let of_pair = &self.pairs[pair];
            lack(&of_pair.before, &half, &of_pair.after, n)
        })
        .iter()
        .sum();
        let values = in_parallel(chain.layers, threads, |layer| {
            eigenvalues(&self.of_layer(layer, n), n)
        });
        let total = self.total(chain, values.iter().map(Vec::as_slice));
        // Both layers of the pair pay c · (G − 1) times what is added.
        let paid = 2.0 * (n / self.groups * (self.groups - 1)) as f64 * lacking;
        total + paid
    }

    /// N of a pair, without its constant part.
    fn half(&self, shares: &[f64], pair: usize) -> Vec<f64> {
        let half = shares.iter().zip(&self.pairs[pair].rest);
        let half: Vec<f64> = half.map(|(w, r)| 0.5 * (w - r)).collect();
        let n = self.pairs[pair].prices.rows.len();
        center(&half, n).0
    }

    /// A of the pair after a layer, and C of the pair before it.
    fn of_layer(&self, layer: usize, n: usize) -> Vec<f64> {
        let mut sum = vec![0.0; n * n];
        let mut add = |matrix: &[f64]| {
            for (sum, x) in sum.iter_mut().zip(matrix) {
                *sum += x;
            }
        };
        if let Some(pair) = self.pairs.get(layer) {
            add(&pair.before);
        }
        if let Some(pair) = layer.checked_sub(1).and_then(|pair| self.pairs.get(pair)) {
            add(&pair.after);
        }
        sum
    }

    fn total<'a>(&self, chain: &Chain, values: impl Iterator<Item = &'a [f64]>) -> f64 {
        let n = chain.experts;
        let size = n / self.groups;
        let of_layers: f64 = values
            .map(|values| {
                let top: f64 = values.iter().rev().take(self.groups - 1).sum();
                size as f64 * top
            })
            .sum();
        let of_pairs = self.pairs.iter().enumerate().map(|(pair, multipliers)| {
            let shares = widen(&chain.pairs[pair]);
            let half = shares.iter().zip(&multipliers.rest);
            let half: Vec<f64> = half.map(|(w, r)| 0.5 * (w - r)).collect();
            let constant = 2.0 * size as f64 * center(&half, n).1;
            constant + matching::bound(&multipliers.rest, size, &multipliers.prices)
        });
        of_layers + of_pairs.sum::<f64>()
    }
}

/// `Y^½` and `Y^−½` of a smoothed projection.
#[derive(Clone)]
struct Roots {
    root: Vec<f64>,
    inverse: Vec<f64>,
}

impl Roots {
    /// The projection onto the `rank` greatest eigenvalues, with soft edges.
    fn of(eigen: &Eigen, rank: usize) -> Self {
        let least = eigen.values.first().copied().unwrap_or(0.0);
        let greatest = eigen.values.last().copied().unwrap_or(0.0);
        let width = WIDTH * (greatest - least).max(f64::MIN_POSITIVE);
        let weight = |value: f64, edge: f64| 1.0 / (1.0 + ((edge - value) / width).exp());
        let (mut low, mut high) = (least - 20.0 * width, greatest + 20.0 * width);
        for _ in 0..60 {
            let edge = 0.5 * (low + high);
            let sum: f64 = eigen.values.iter().map(|value| weight(*value, edge)).sum();
            if sum > rank as f64 {
                low = edge;
            } else {
                high = edge;
            }
        }
        Self {
            root: eigen.map(|value| weight(value, low).max(FLOOR).sqrt()),
            inverse: eigen.map(|value| 1.0 / weight(value, low).max(FLOOR).sqrt()),
        }
    }
}

/// A and C of a pair, and its Z over c: gradients of `2‖Y^½ N Y′^½‖` (nuclear norm).
fn dual_step(
    shares: &[f64],
    rest: &[f64],
    before: &Option<Roots>,
    after: &Option<Roots>,
    n: usize,
) -> ((Vec<f64>, Vec<f64>), Vec<f64>) {
    let half: Vec<f64> = shares
        .iter()
        .zip(rest)
        .map(|(w, r)| 0.5 * (w - r))
        .collect();
    let half = center(&half, n).0;
    let scaled = match (before, after) {
        (Some(before), Some(after)) => product(&product(&before.root, &half, n), &after.root, n),
        _ => half,
    };
    let gram = Eigen::of(&product_transposed_right(&scaled, &scaled, n), n);
    let greatest = gram.values.last().copied().unwrap_or(0.0).max(0.0).sqrt();
    let singular = |value: f64| value.max(0.0).sqrt();
    let absolute = gram.map(singular);
    let inverse = gram.map(|value| {
        let value = singular(value);
        if value > 1e-9 * greatest {
            1.0 / value
        } else {
            0.0
        }
    });
    let polar = product(&inverse, &scaled, n);
    let reversed = product_transposed_left(&scaled, &polar, n);
    match (before, after) {
        (Some(before), Some(after)) => {
            let around = |outer: &[f64], inner: &[f64], other: &[f64]| {
                product(&product(outer, inner, n), other, n)
            };
            (
                (
                    symmetric(around(&before.inverse, &absolute, &before.inverse), n),
                    symmetric(around(&after.inverse, &reversed, &after.inverse), n),
                ),
                around(&before.root, &polar, &after.root),
            )
        }
        _ => ((symmetric(absolute, n), symmetric(reversed, n)), polar),
    }
}

fn symmetric(matrix: Vec<f64>, n: usize) -> Vec<f64> {
    (0..n * n)
        .map(|at| 0.5 * (matrix[at] + matrix[(at % n) * n + at / n]))
        .collect()
}

/// R after a step: less where the matching has more than the spectrum, more where it has less.
fn move_rest(
    rest: &[f64],
    prices: &Prices,
    spectral: &[f64],
    n: usize,
    groups: usize,
    step: f64,
) -> Vec<f64> {
    let width = 0.3 * step;
    let matched: Vec<f64> = rest
        .iter()
        .enumerate()
        .map(|(at, rest)| {
            let above = rest - prices.rows[at / n] - prices.columns[at % n];
            1.0 / (1.0 + (-above / width).exp())
        })
        .collect();
    // Both have the same sums of rows and columns; smoothing disturbs those of the matching.
    let matched = center(&matched, n).0;
    let size = n as f64 / groups as f64;
    let moved = rest.iter().zip(&matched).zip(spectral);
    moved
        .map(|((rest, matched), spectral)| rest - 2.0 * step * (matched - size * spectral))
        .collect()
}

/// What must be added to the diagonals of A and C for `[[A, −N], [−Nᵀ, C]] ⪰ 0`.
fn lack(before: &[f64], half: &[f64], after: &[f64], n: usize) -> f64 {
    let m = 2 * n;
    let mut block = vec![0.0; m * m];
    for row in 0..n {
        for column in 0..n {
            block[row * m + column] = before[row * n + column];
            block[(n + row) * m + n + column] = after[row * n + column];
            block[row * m + n + column] = -half[row * n + column];
            block[(n + column) * m + row] = -half[row * n + column];
        }
    }
    let values = eigenvalues(&block, m);
    let least = values.first().copied().unwrap_or(0.0);
    let greatest = values.last().copied().unwrap_or(0.0).abs();
    // Rounding of the eigenvalues, paid in full.
    (-least).max(0.0) + 1e-12 * greatest
}
