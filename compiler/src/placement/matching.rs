//! What a pair of layers can keep at most, seen as a matching of experts with `c` partners each.
//!
//! Enters: a matrix of shares and the number `c` of experts in a group. Leaves: prices, and the
//! bound that they prove.
//! Invariant: any prices prove a bound; [`bound`] needs nothing but the matrix and the prices.
//!
//! In a division every expert has exactly c experts of the next layer in its group, so the kept
//! transitions are a c-matching. Its linear program has the dual
//! `min c(Σu + Σv) + Σ (W − u − v)⁺`, and `v = 0` gives the sums of every row's c greatest.

/// Prices of the rows and columns of a matrix.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Prices {
    pub rows: Vec<f64>,
    pub columns: Vec<f64>,
}

/// The bound that prices prove: `c(Σu + Σv) + Σ (W − u − v)⁺`.
pub fn bound(matrix: &[f64], c: usize, prices: &Prices) -> f64 {
    let n_columns = prices.columns.len();
    let sum: f64 = prices.rows.iter().chain(&prices.columns).sum();
    let above: f64 = matrix
        .chunks(n_columns.max(1))
        .zip(&prices.rows)
        .map(|(row, u)| -> f64 {
            let entries = row.iter().zip(&prices.columns);
            entries.map(|(w, v)| (w - u - v).max(0.0)).sum()
        })
        .sum();
    c as f64 * sum + above
}

/// Prices of a low bound, from the given ones by exact steps over rows and columns in turn.
///
/// O(sweeps · n²).
pub fn descend(matrix: &[f64], n: usize, c: usize, start: Prices, sweeps: usize) -> Prices {
    let mut prices = start;
    prices.rows.resize(n, 0.0);
    prices.columns.resize(n, 0.0);
    if n == 0 || c == 0 || c > n {
        return prices;
    }
    let transposed = super::chain::transpose(matrix, n);
    let mut line = vec![0.0; n];
    let mut step = |matrix: &[f64], these: &mut [f64], others: &[f64]| {
        for (row, price) in matrix.chunks(n).zip(these) {
            for ((x, w), v) in line.iter_mut().zip(row).zip(others) {
                *x = w - v;
            }
            // Between the c-th and the next greatest every price is best; the middle leaves the
            // other side room to move.
            let (_, at, below) = line.select_nth_unstable_by(c - 1, |a, b| b.total_cmp(a));
            let next = below.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            *price = if c < n { 0.5 * (*at + next) } else { *at };
        }
    };
    for _ in 0..sweeps {
        step(matrix, &mut prices.rows, &prices.columns);
        step(&transposed, &mut prices.columns, &prices.rows);
    }
    prices
}

/// Rows alone: the sums of every row's c greatest entries.
pub fn row_prices(matrix: &[f64], n: usize, c: usize) -> Prices {
    let rows = matrix.chunks(n.max(1)).map(|row| {
        let mut row = row.to_vec();
        *row.select_nth_unstable_by(c - 1, |a, b| b.total_cmp(a)).1
    });
    Prices {
        rows: if c == 0 || c > n {
            vec![0.0; n]
        } else {
            rows.collect()
        },
        columns: vec![0.0; n],
    }
}
