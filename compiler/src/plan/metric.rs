//! Shortest reshard prices between layouts.
//!
//! Enters: a [`Grid`], types and layouts. Leaves: seconds of the cheapest way between two of them.
//! Invariant: prices are those of [`crate::reshard::reshard_path`] restricted to the layouts of the
//! grid; types of equal sizes share them, whatever their dims are called.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::rc::Rc;

use meshweave_dsl::graph::TensorType;

use super::grid::{Code, Grid};
use super::network::{Reshards, shared_seconds};

/// Shortest reshard prices, remembered by type.
#[derive(Debug)]
pub struct Metric<'a> {
    pub grid: &'a Grid,
    /// By bytes an element and sizes.
    types: HashMap<(usize, Vec<usize>), usize>,
    tables: Vec<Table>,
}

/// The layouts of one type met so far.
#[derive(Debug, Default)]
struct Table {
    idx_of: HashMap<Code, u32>,
    codes: Vec<Code>,
    /// Legal steps from each layout, once it was passed.
    steps: Vec<Option<Vec<(u32, f64)>>>,
    /// Seconds to all layouts within reach, from those that were asked for.
    from: HashMap<u32, Rc<Vec<f64>>>,
    nets: HashMap<(Vec<Code>, bool), Rc<Reshards>>,
}

impl<'a> Metric<'a> {
    /// The metric of a grid.
    pub fn new(grid: &'a Grid) -> Self {
        Self {
            grid,
            types: HashMap::new(),
            tables: Vec::new(),
        }
    }

    fn table(&mut self, ty: &TensorType) -> usize {
        let sizes = ty.shape.iter().map(|(_, size)| *size).collect();
        let n_tables = self.tables.len();
        let key = (ty.dtype.n_bytes(), sizes);
        let table = *self.types.entry(key).or_insert(n_tables);
        if table == n_tables {
            self.tables.push(Table::default());
        }
        table
    }

    /// Seconds of the cheapest reshard; infinite when there is none.
    pub fn seconds(&mut self, ty: &TensorType, from: Code, to: Code) -> f64 {
        if from == to {
            return 0.0;
        }
        let table = self.table(ty);
        let distances = self.tables[table].distances(self.grid, ty, from);
        self.tables[table].distance(&distances, to)
    }

    /// Prices among layouts, with their arcs where readers may share them. Remembered.
    pub fn reshards(&mut self, ty: &TensorType, codes: &[Code], has_arcs: bool) -> Rc<Reshards> {
        let table = self.table(ty);
        let table = &mut self.tables[table];
        let key = (codes.to_vec(), has_arcs);
        if let Some(known) = table.nets.get(&key) {
            return Rc::clone(known);
        }
        let reshards = Rc::new(Reshards::new(
            codes.len(),
            table.matrix(self.grid, ty, codes),
            has_arcs,
        ));
        table.nets.insert(key, Rc::clone(&reshards));
        reshards
    }

    /// Seconds of bringing a tensor from one layout to several, sharing what lies on the way among
    /// them.
    pub fn shared_seconds(&mut self, ty: &TensorType, from: Code, to: &[Code]) -> f64 {
        let mut targets: Vec<Code> = to.iter().copied().filter(|code| *code != from).collect();
        targets.sort_unstable();
        targets.dedup();
        match targets.as_slice() {
            [] => 0.0,
            [one] => self.seconds(ty, from, *one),
            _ => {
                targets.push(from);
                let table = self.table(ty);
                let seconds = self.tables[table].matrix(self.grid, ty, &targets);
                let reshards = Reshards::new(targets.len(), seconds, false);
                let n_targets = targets.len() as u16 - 1;
                let all: Vec<u16> = (0..n_targets).collect();
                shared_seconds(&reshards, n_targets, &all)
            }
        }
    }
}

impl Table {
    fn idx(&mut self, code: Code) -> u32 {
        let n_codes = self.codes.len() as u32;
        let idx = *self.idx_of.entry(code).or_insert(n_codes);
        if idx == n_codes {
            self.codes.push(code);
            self.steps.push(None);
        }
        idx
    }

    /// All layouts within reach are met when the distances are made: one met later is out of reach.
    fn distance(&self, distances: &[f64], to: Code) -> f64 {
        let idx = self.idx_of.get(&to).map(|idx| *idx as usize);
        let known = idx.and_then(|idx| distances.get(idx));
        known.copied().unwrap_or(f64::INFINITY)
    }

    fn matrix(&mut self, grid: &Grid, ty: &TensorType, codes: &[Code]) -> Vec<f64> {
        let mut matrix = Vec::with_capacity(codes.len() * codes.len());
        for from in codes {
            let distances = self.distances(grid, ty, *from);
            matrix.extend(codes.iter().map(|to| self.distance(&distances, *to)));
        }
        matrix
    }

    /// Shortest paths from a layout (Dijkstra).
    fn distances(&mut self, grid: &Grid, ty: &TensorType, from: Code) -> Rc<Vec<f64>> {
        let from = self.idx(from);
        if let Some(known) = self.from.get(&from) {
            return Rc::clone(known);
        }
        let mut distances = vec![f64::INFINITY; self.codes.len()];
        let mut frontier = BinaryHeap::new();
        distances[from as usize] = 0.0;
        // Nonnegative floats order as their bits.
        frontier.push(Reverse((0_u64, from)));
        while let Some(Reverse((bits, here))) = frontier.pop() {
            let seconds = f64::from_bits(bits);
            if seconds > distances[here as usize] {
                continue;
            }
            let steps = match self.steps[here as usize].take() {
                Some(steps) => steps,
                None => self.steps_from(grid, ty, here),
            };
            distances.resize(self.codes.len(), f64::INFINITY);
            for (next, price) in &steps {
                let sum = seconds + price;
                if sum < distances[*next as usize] {
                    distances[*next as usize] = sum;
                    frontier.push(Reverse((sum.to_bits(), *next)));
                }
            }
            self.steps[here as usize] = Some(steps);
        }
        let distances = Rc::new(distances);
        self.from.insert(from, Rc::clone(&distances));
        distances
    }

    fn steps_from(&mut self, grid: &Grid, ty: &TensorType, here: u32) -> Vec<(u32, f64)> {
        let mut steps = Vec::new();
        grid.steps(self.codes[here as usize], ty, |next, price| {
            if grid.is_legal(next, ty) {
                steps.push((next, price.max(0.0)));
            }
        });
        let steps = steps.into_iter();
        steps.map(|(next, price)| (self.idx(next), price)).collect()
    }
}

#[cfg(test)]
mod tests {
    use meshweave_dsl::cluster::Cluster;
    use meshweave_dsl::dtype::DType;
    use meshweave_dsl::layout::{Mesh, ReduceKind};

    use super::*;
    use crate::plan::grid::State;
    use crate::reshard::reshard_path;

    #[test]
    fn prices_are_those_of_paths() {
        let cluster = Cluster::preset("h100:16").unwrap();
        let grid = Grid::new(Mesh::new([("dp", 2), ("one", 1), ("tp", 8)]), &cluster);
        let ty = TensorType::new(DType::Bf16, [("batch", 16), ("seq", 2048), ("embed", 4096)]);
        let mut metric = Metric::new(&grid);
        let mut codes = grid.kept_codes(&ty, |_| true);
        assert_eq!(codes.len(), 16);
        codes.extend(
            codes
                .clone()
                .iter()
                .map(|code| code.with(1, State::Partial(ReduceKind::Sum))),
        );
        for from in &codes {
            for to in grid.kept_codes(&ty, |_| true) {
                let (a, b) = (grid.layout(*from, &ty), grid.layout(to, &ty));
                assert_eq!(grid.code(&a, &ty), Some(*from));
                let (seconds, _) = reshard_path(&a, &b, &ty, &grid.mesh, &cluster).unwrap();
                let short = metric.seconds(&ty, *from, to);
                // The general path may use other orders of axes and be cheaper, never dearer.
                assert!(seconds <= short * (1.0 + 1e-9), "{seconds} {short}");
                assert!(short <= 3.0 * seconds + 1e-12, "{seconds} {short}");
            }
        }
    }

    #[test]
    fn shared_reshards_are_paid_once() {
        let cluster = Cluster::preset("h100:4").unwrap();
        let grid = Grid::new(Mesh::new([("dp", 2), ("tp", 2)]), &cluster);
        let ty = TensorType::new(DType::F32, [("a", 64), ("b", 64)]);
        let mut metric = Metric::new(&grid);
        let both = Code::default()
            .with(0, State::Dim(0))
            .with(1, State::Dim(0));
        let one = Code::default().with(0, State::Dim(0));
        let none = Code::default();
        let apart = metric.seconds(&ty, both, one) + metric.seconds(&ty, one, none);
        let shared = metric.shared_seconds(&ty, both, &[one, none]);
        assert!((shared - apart).abs() < 1e-12);
        let alone = metric.seconds(&ty, both, none) + metric.seconds(&ty, both, one);
        assert!(shared < alone);
    }
}
