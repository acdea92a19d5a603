//! Symmetric eigenvalue problems and products of small dense matrices.
//!
//! Enters: square matrices, row-major. Leaves: eigenvalues in ascending order, and eigenvectors.
//! Invariant: `A·v = λ·v` and the vectors are orthonormal, to about n·1e-16 of the norm.
//!
//! Householder's tridiagonalization and the implicit QL method (Wilkinson and Reinsch 1971; EISPACK
//! `tred2`, `tql2`), with vectors kept as rows so that every inner loop runs over contiguous memory.

/// A symmetric matrix taken apart.
#[derive(Clone, Debug, PartialEq)]
pub struct Eigen {
    pub n: usize,
    /// Ascending.
    pub values: Vec<f64>,
    /// `vectors[k · n ..]` belongs to `values[k]`.
    pub vectors: Vec<f64>,
}

impl Eigen {
    /// Takes a symmetric matrix apart. O(n³).
    pub fn of(matrix: &[f64], n: usize) -> Self {
        let mut reduced = Tridiagonal::of(matrix, n);
        let mut vectors = vec![0.0; n * n];
        for k in 0..n {
            vectors[k * n + k] = 1.0;
        }
        reduced.diagonalize(|i, cos, sin| {
            let (upper, lower) = vectors.split_at_mut((i + 1) * n);
            let first = &mut upper[i * n..];
            for (a, b) in first.iter_mut().zip(&mut lower[..n]) {
                let (x, y) = (*a, *b);
                *a = cos * x - sin * y;
                *b = sin * x + cos * y;
            }
        });
        for row in vectors.chunks_mut(n.max(1)) {
            for (k, reflector) in reduced.reflectors.iter().enumerate().rev() {
                let tail = &mut row[k + 1..];
                let along = dot(reflector, tail);
                for (x, v) in tail.iter_mut().zip(reflector) {
                    *x -= along * v;
                }
            }
        }
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|a, b| reduced.diagonal[*a].total_cmp(&reduced.diagonal[*b]));
        Self {
            n,
            values: order.iter().map(|k| reduced.diagonal[*k]).collect(),
            vectors: order
                .iter()
                .flat_map(|k| vectors[k * n..(k + 1) * n].iter().copied())
                .collect(),
        }
    }

    /// `Σ f(λ) v vᵀ`.
    pub fn map(&self, f: impl Fn(f64) -> f64) -> Vec<f64> {
        let n = self.n;
        let mut scaled = self.vectors.clone();
        for (row, value) in scaled.chunks_mut(n.max(1)).zip(&self.values) {
            let factor = f(*value);
            row.iter_mut().for_each(|x| *x *= factor);
        }
        product_transposed_left(&self.vectors, &scaled, n)
    }
}

/// Eigenvalues alone, ascending. O(n³), about a fifth of [`Eigen::of`].
pub fn eigenvalues(matrix: &[f64], n: usize) -> Vec<f64> {
    let mut reduced = Tridiagonal::of(matrix, n);
    reduced.diagonalize(|_, _, _| {});
    let mut values = reduced.diagonal;
    values.sort_by(f64::total_cmp);
    values
}

struct Tridiagonal {
    diagonal: Vec<f64>,
    /// `beside[k]` couples k and k + 1; the last is 0.
    beside: Vec<f64>,
    /// `A = H₀ H₁ … T … H₁ H₀` with `H = I − v vᵀ` on the indices above k.
    reflectors: Vec<Vec<f64>>,
}

impl Tridiagonal {
    fn of(matrix: &[f64], n: usize) -> Self {
        let mut a = matrix.to_vec();
        let mut beside = vec![0.0; n];
        let mut reflectors = Vec::with_capacity(n.saturating_sub(2));
        for k in 0..n.saturating_sub(2) {
            let mut v = a[k * n + k + 1..(k + 1) * n].to_vec();
            let norm = dot(&v, &v).sqrt();
            let alpha = if v[0] > 0.0 { -norm } else { norm };
            beside[k] = alpha;
            v[0] -= alpha;
            let square = dot(&v, &v);
            if square <= f64::MIN_POSITIVE {
                reflectors.push(vec![0.0; n - k - 1]);
                continue;
            }
            let scale = (2.0 / square).sqrt();
            v.iter_mut().for_each(|x| *x *= scale);
            let mut p: Vec<f64> = (k + 1..n)
                .map(|row| dot(&a[row * n + k + 1..(row + 1) * n], &v))
                .collect();
            let half = 0.5 * dot(&p, &v);
            for (p, v) in p.iter_mut().zip(&v) {
                *p -= half * v;
            }
            for row in k + 1..n {
                let (vi, pi) = (v[row - k - 1], p[row - k - 1]);
                let tail = &mut a[row * n + k + 1..(row + 1) * n];
                for ((x, v), p) in tail.iter_mut().zip(&v).zip(&p) {
                    *x -= vi * p + pi * v;
                }
            }
            reflectors.push(v);
        }
        if n > 1 {
            beside[n - 2] = a[(n - 2) * n + n - 1];
        }
        Self {
            diagonal: (0..n).map(|k| a[k * n + k]).collect(),
            beside,
            reflectors,
        }
    }

    /// The QL method with implicit shifts; `rotate(i, cos, sin)` sees every rotation of rows i, i + 1.
    fn diagonalize(&mut self, mut rotate: impl FnMut(usize, f64, f64)) {
        /// Steps for one eigenvalue; two or three are usual.
        const MOST_STEPS: usize = 60;
        let n = self.diagonal.len();
        let (d, e) = (&mut self.diagonal, &mut self.beside);
        for l in 0..n {
            for _ in 0..MOST_STEPS {
                let small =
                    |m: &usize| e[*m].abs() <= f64::EPSILON * (d[*m].abs() + d[m + 1].abs());
                let m = (l..n - 1).find(small).unwrap_or(n - 1);
                if m == l {
                    break;
                }
                let mut g = (d[l + 1] - d[l]) / (2.0 * e[l]);
                let r = g.hypot(1.0);
                g = d[m] - d[l] + e[l] / (g + r.copysign(g));
                let (mut sin, mut cos, mut p) = (1.0, 1.0, 0.0);
                let mut is_split = false;
                for i in (l..m).rev() {
                    let f = sin * e[i];
                    let b = cos * e[i];
                    let r = f.hypot(g);
                    e[i + 1] = r;
                    if r == 0.0 {
                        d[i + 1] -= p;
                        e[m] = 0.0;
                        is_split = true;
                        break;
                    }
                    sin = f / r;
                    cos = g / r;
                    g = d[i + 1] - p;
                    let r = (d[i] - g) * sin + 2.0 * cos * b;
                    p = sin * r;
                    d[i + 1] = g + p;
                    g = cos * r - b;
                    rotate(i, cos, sin);
                }
                if !is_split {
                    d[l] -= p;
                    e[l] = g;
                    e[m] = 0.0;
                }
            }
        }
    }
}

/// `a · b` of vectors.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    /// Independent sums, so that the loop runs in vectors.
    const LANES: usize = 8;
    let mut sums = [0.0; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f64 = a_chunks
        .remainder()
        .iter()
        .zip(b_chunks.remainder())
        .map(|(a, b)| a * b)
        .sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f64>() + rest
}

/// `A · B` of n × n matrices.
pub fn product(a: &[f64], b: &[f64], n: usize) -> Vec<f64> {
    let mut out = vec![0.0; n * n];
    for (row, target) in a.chunks(n.max(1)).zip(out.chunks_mut(n.max(1))) {
        accumulate(target, row, b, n);
    }
    out
}

/// `Aᵀ · B` of n × n matrices.
pub fn product_transposed_left(a: &[f64], b: &[f64], n: usize) -> Vec<f64> {
    product(&super::chain::transpose(a, n), b, n)
}

/// `A · Bᵀ` of n × n matrices.
pub fn product_transposed_right(a: &[f64], b: &[f64], n: usize) -> Vec<f64> {
    product(a, &super::chain::transpose(b, n), n)
}

/// `target += row · B`, four rows of B at a time.
fn accumulate(target: &mut [f64], row: &[f64], b: &[f64], n: usize) {
    let mut k = 0;
    while k + 4 <= n {
        let (x0, x1, x2, x3) = (row[k], row[k + 1], row[k + 2], row[k + 3]);
        let rows = &b[k * n..(k + 4) * n];
        let (r0, rest) = rows.split_at(n);
        let (r1, rest) = rest.split_at(n);
        let (r2, r3) = rest.split_at(n);
        for j in 0..n {
            target[j] += x0 * r0[j] + x1 * r1[j] + x2 * r2[j] + x3 * r3[j];
        }
        k += 4;
    }
    for k in k..n {
        let x = row[k];
        for (t, b) in target.iter_mut().zip(&b[k * n..(k + 1) * n]) {
            *t += x * b;
        }
    }
}
