//! The assignment of rows to columns of limited capacity, exactly.
//!
//! Enters: profits of rows in columns, and how many rows a column takes. Leaves: the most profitable
//! assignment with its dual prices.
//! Invariant: `Σ row prices + capacity · Σ column prices` equals the profit, and no profit exceeds
//! the sum of its row's and its column's price (up to rounding): the prices prove the assignment.
//!
//! Successive shortest paths with potentials (Kuhn 1955, Munkres 1957; columns with capacity as in
//! Ford and Fulkerson's transportation problem): O(rows · columns · (rows + columns)).

/// An assignment and the prices that prove it.
#[derive(Clone, Debug, PartialEq)]
pub struct Assigned {
    /// The column of every row.
    pub column_of: Vec<u16>,
    pub profit: f64,
    pub row_prices: Vec<f64>,
    pub column_prices: Vec<f64>,
}

/// Assigns every row to a column such that no column takes more than `capacity`.
///
/// `profits` is row-major, rows × columns; rows may not exceed `columns · capacity`.
pub fn assign(profits: &[f64], columns: usize, capacity: usize) -> Assigned {
    let rows = profits.len() / columns.max(1);
    let mut search = Search::new(profits, columns, capacity, rows);
    for row in 0..rows {
        search.add(row);
    }
    let column_of: Vec<u16> = search
        .column_of
        .iter()
        .map(|column| *column as u16)
        .collect();
    let chosen = column_of.iter().enumerate();
    Assigned {
        profit: chosen
            .map(|(row, column)| profits[row * columns + usize::from(*column)])
            .sum(),
        column_of,
        row_prices: search.row_potential.iter().map(|u| -u).collect(),
        column_prices: search.column_potential.iter().map(|v| -v).collect(),
    }
}

/// Costs are negated profits; `cost − row potential − column potential ≥ 0`, and 0 where assigned.
struct Search<'a> {
    profits: &'a [f64],
    columns: usize,
    capacity: usize,
    row_potential: Vec<f64>,
    column_potential: Vec<f64>,
    column_of: Vec<usize>,
    rows_of: Vec<Vec<usize>>,
    slack: Vec<f64>,
    via: Vec<usize>,
    seen: Vec<bool>,
}

impl<'a> Search<'a> {
    fn new(profits: &'a [f64], columns: usize, capacity: usize, rows: usize) -> Self {
        Self {
            profits,
            columns,
            capacity,
            row_potential: vec![0.0; rows],
            column_potential: vec![0.0; columns],
            column_of: vec![usize::MAX; rows],
            rows_of: vec![Vec::with_capacity(capacity); columns],
            slack: vec![0.0; columns],
            via: vec![0; columns],
            seen: vec![false; columns],
        }
    }

    /// Adds a row by a shortest augmenting path.
    fn add(&mut self, row: usize) {
        self.slack.fill(f64::INFINITY);
        self.seen.fill(false);
        let mut tree = vec![row];
        let mut n_scanned = 0;
        let last = loop {
            while n_scanned < tree.len() {
                self.scan(tree[n_scanned]);
                n_scanned += 1;
            }
            let open = (0..self.columns).filter(|column| !self.seen[*column]);
            let nearest = open.fold(usize::MAX, |best, column| {
                let is_nearer = best == usize::MAX || self.slack[column] < self.slack[best];
                if is_nearer { column } else { best }
            });
            if nearest == usize::MAX {
                return; // More rows than places: the row stays out.
            }
            let delta = self.slack[nearest];
            for row in &tree {
                self.row_potential[*row] += delta;
            }
            for column in 0..self.columns {
                if self.seen[column] {
                    self.column_potential[column] -= delta;
                } else {
                    self.slack[column] -= delta;
                }
            }
            self.seen[nearest] = true;
            if self.rows_of[nearest].len() < self.capacity {
                break nearest;
            }
            tree.extend_from_slice(&self.rows_of[nearest]);
        };
        self.augment(row, last);
    }

    fn scan(&mut self, row: usize) {
        let profits = &self.profits[row * self.columns..(row + 1) * self.columns];
        let u = self.row_potential[row];
        for (column, profit) in profits.iter().enumerate() {
            let reduced = -profit - u - self.column_potential[column];
            if !self.seen[column] && reduced < self.slack[column] {
                self.slack[column] = reduced;
                self.via[column] = row;
            }
        }
    }

    fn augment(&mut self, added: usize, last: usize) {
        let mut column = last;
        loop {
            let row = self.via[column];
            let before = self.column_of[row];
            self.column_of[row] = column;
            self.rows_of[column].push(row);
            if row == added {
                return;
            }
            self.rows_of[before].retain(|other| *other != row);
            column = before;
        }
    }
}
