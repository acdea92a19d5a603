//! Layouts as small integers, and the price of every reshard between them.
//!
//! Enters: a mesh on a cluster, and tensor types. Leaves: shortest reshard prices.
//! Invariant: a [`Code`] has one state per axis of the grid: replicated, sharding a dim, or partial;
//! axes that shard one dim stand in the order of the mesh, outermost major, as placements put them.
//!
//! The prices are those of [`crate::reshard::reshard_path`] restricted to such layouts.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::rc::Rc;

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::graph::TensorType;
use meshweave_dsl::layout::{Layout, Mesh, ReduceKind};
use meshweave_dsl::name::Axis;

use super::cost::{GroupShape, Traffic, axis_groups, fragment_seconds, traffic_seconds};

/// A mesh on a cluster: its axes of more than one rank.
#[derive(Clone, Debug)]
pub struct Grid {
    pub mesh: Mesh,
    pub cluster: Cluster,
    pub axes: Vec<GridAxis>,
}

/// One axis of a grid.
#[derive(Clone, Debug)]
pub struct GridAxis {
    pub axis: Axis,
    pub degree: usize,
    group: GroupShape,
}

/// A layout as four bits an axis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Code(u32);

/// What an axis does to a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Replicated,
    /// Shards the dim of this position.
    Dim(usize),
    Partial(ReduceKind),
}

/// Axes and dims that fit a [`Code`].
pub const MAX_AXES: usize = 8;
pub const MAX_DIMS: usize = 12;

impl Code {
    /// The state of an axis.
    pub fn state(self, axis_idx: usize) -> State {
        match self.0 >> (4 * axis_idx) & 15 {
            0 => State::Replicated,
            13 => State::Partial(ReduceKind::Sum),
            14 => State::Partial(ReduceKind::Max),
            15 => State::Partial(ReduceKind::Lse),
            dim => State::Dim(dim as usize - 1),
        }
    }

    /// This code with another state of an axis.
    pub fn with(self, axis_idx: usize, state: State) -> Self {
        let bits = match state {
            State::Replicated => 0,
            State::Dim(dim_idx) => dim_idx as u32 + 1,
            State::Partial(ReduceKind::Sum) => 13,
            State::Partial(ReduceKind::Max) => 14,
            State::Partial(ReduceKind::Lse) => 15,
        };
        let shift = 4 * axis_idx;
        Self(self.0 & !(15 << shift) | bits << shift)
    }
}

impl Grid {
    /// The grid of a mesh.
    pub fn new(mesh: Mesh, cluster: &Cluster) -> Self {
        let groups = axis_groups(&mesh, cluster);
        let axes = mesh
            .axes()
            .iter()
            .filter(|(_, degree)| *degree > 1)
            .map(|(axis, degree)| GridAxis {
                axis: axis.clone(),
                degree: *degree,
                group: groups.get(axis).copied().unwrap_or_default(),
            })
            .collect();
        Self {
            mesh,
            cluster: cluster.clone(),
            axes,
        }
    }

    /// The layout of a code of a tensor of this type.
    pub fn layout(&self, code: Code, ty: &TensorType) -> Layout {
        let mut layout = Layout::replicated();
        for (axis_idx, axis) in self.axes.iter().enumerate() {
            match code.state(axis_idx) {
                State::Replicated => {}
                State::Dim(dim_idx) => {
                    if let Some((dim, _)) = ty.shape.get(dim_idx) {
                        layout = layout.shard(dim, &axis.axis);
                    }
                }
                State::Partial(kind) => layout = layout.partial(&axis.axis, kind),
            }
        }
        layout
    }

    /// The code of a layout; `None` when a dim has its axes in another order than the mesh.
    pub fn code(&self, layout: &Layout, ty: &TensorType) -> Option<Code> {
        let mut code = Code::default();
        for (axis_idx, axis) in self.axes.iter().enumerate() {
            if let Some(dim) = layout.dim_of(&axis.axis) {
                code = code.with(axis_idx, State::Dim(ty.position(dim)?));
            } else if let Some(kind) = layout.partial.get(&axis.axis) {
                code = code.with(axis_idx, State::Partial(*kind));
            }
        }
        let same = self.layout(code, ty);
        let trivial = |axes: &Vec<Axis>| axes.iter().all(|axis| self.mesh.degree(axis) < 2);
        let equal = layout
            .shards
            .iter()
            .filter(|(_, axes)| !trivial(axes))
            .all(|(dim, axes)| {
                let real = axes.iter().filter(|axis| self.mesh.degree(axis) > 1);
                real.eq(same.axes_of(dim))
            });
        equal.then_some(code)
    }

    /// Length of the longest chunk of a dim, and of the shortest.
    fn chunk(&self, code: Code, dim_idx: usize, size: usize) -> (usize, usize) {
        let sharding = self.axes.iter().enumerate();
        sharding
            .filter(|(axis_idx, _)| code.state(*axis_idx) == State::Dim(dim_idx))
            .fold((size, size), |(longest, shortest), (_, axis)| {
                (longest.div_ceil(axis.degree), shortest / axis.degree)
            })
    }

    /// Whether every rank has at least one element, and partial values are of one kind.
    pub fn is_legal(&self, code: Code, ty: &TensorType) -> bool {
        let mut kind = None;
        (0..self.axes.len()).all(|axis_idx| match code.state(axis_idx) {
            State::Replicated => true,
            State::Dim(dim_idx) => dim_idx < ty.shape.len(),
            State::Partial(here) => *kind.get_or_insert(here) == here,
        }) && ty
            .shape
            .iter()
            .enumerate()
            .all(|(dim_idx, (_, size))| self.chunk(code, dim_idx, *size).1 > 0)
    }

    /// The type of the largest part of a tensor.
    pub fn local(&self, code: Code, ty: &TensorType) -> TensorType {
        let mut local = ty.clone();
        for (dim_idx, (_, size)) in local.shape.iter_mut().enumerate() {
            *size = self.chunk(code, dim_idx, *size).0;
        }
        local
    }

    /// Bytes of the largest part of a tensor.
    pub fn local_bytes(&self, code: Code, ty: &TensorType) -> f64 {
        let shape = ty.shape.iter().enumerate();
        let n_elements: usize = shape
            .map(|(dim_idx, (_, size))| self.chunk(code, dim_idx, *size).0)
            .product();
        (n_elements * ty.dtype.n_bytes()) as f64
    }

    /// All legal codes without partial values, over the dims that `may_shard` admits.
    pub fn kept_codes(&self, ty: &TensorType, may_shard: impl Fn(usize) -> bool) -> Vec<Code> {
        let dims: Vec<usize> = (0..ty.shape.len()).filter(|dim| may_shard(*dim)).collect();
        let mut codes = vec![Code::default()];
        for axis_idx in 0..self.axes.len() {
            let longer: Vec<Code> = codes
                .iter()
                .flat_map(|code| {
                    let dims = dims.iter().map(|dim| State::Dim(*dim));
                    dims.map(|state| code.with(axis_idx, state))
                })
                .filter(|code| self.is_legal(*code, ty))
                .collect();
            codes.extend(longer);
        }
        codes.sort_unstable();
        codes
    }

    /// Every step from a code, with its price.
    fn steps(&self, from: Code, ty: &TensorType, mut visit: impl FnMut(Code, f64)) {
        let n_axes = self.axes.len();
        let n_bytes = self.local_bytes(from, ty);
        let has_later = |axis_idx: usize, dim_idx: usize| {
            (axis_idx + 1..n_axes).any(|later| from.state(later) == State::Dim(dim_idx))
        };
        for (axis_idx, axis) in self.axes.iter().enumerate() {
            let price =
                |traffic, n_bytes| traffic_seconds(traffic, n_bytes, axis.group, &self.cluster);
            let to = |state| from.with(axis_idx, state);
            let n_ranks = axis.degree as f64;
            let free_dims = (0..ty.shape.len()).filter(|dim_idx| !has_later(axis_idx, *dim_idx));
            match from.state(axis_idx) {
                State::Partial(_) => {
                    visit(to(State::Replicated), price(Traffic::AllReduce, n_bytes));
                    let seconds = price(Traffic::ReduceScatter, n_bytes);
                    free_dims.for_each(|dim_idx| visit(to(State::Dim(dim_idx)), seconds));
                }
                State::Dim(here) if !has_later(axis_idx, here) => {
                    let seconds = price(Traffic::AllGather, n_bytes * n_ranks);
                    visit(to(State::Replicated), seconds);
                    let seconds = price(Traffic::AllToAll, n_bytes);
                    free_dims
                        .filter(|dim_idx| *dim_idx != here)
                        .for_each(|dim_idx| visit(to(State::Dim(dim_idx)), seconds));
                }
                State::Dim(_) => {}
                State::Replicated => {
                    let seconds = fragment_seconds(0.0, 2.0 * n_bytes / n_ranks, &self.cluster);
                    free_dims.for_each(|dim_idx| visit(to(State::Dim(dim_idx)), seconds));
                }
            }
        }
    }
}

/// Shortest reshard prices, remembered by type.
#[derive(Debug)]
pub struct Metric<'a> {
    pub grid: &'a Grid,
    types: HashMap<TensorType, usize>,
    from: HashMap<(usize, Code), Rc<HashMap<Code, f64>>>,
    arcs: HashMap<(usize, Vec<Code>), Rc<Vec<Arc>>>,
}

/// A reshard between two of a set of layouts (by index) that no other of the set lies on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arc {
    pub from: usize,
    pub to: usize,
    pub seconds: f64,
}

impl<'a> Metric<'a> {
    /// The metric of a grid.
    pub fn new(grid: &'a Grid) -> Self {
        Self {
            grid,
            types: HashMap::new(),
            from: HashMap::new(),
            arcs: HashMap::new(),
        }
    }

    fn type_id(&mut self, ty: &TensorType) -> usize {
        if let Some(id) = self.types.get(ty) {
            return *id;
        }
        let id = self.types.len();
        self.types.insert(ty.clone(), id);
        id
    }

    /// Seconds of the cheapest reshard; infinite when there is none.
    pub fn seconds(&mut self, ty: &TensorType, from: Code, to: Code) -> f64 {
        if from == to {
            return 0.0;
        }
        let distances = self.distances(ty, from);
        distances.get(&to).copied().unwrap_or(f64::INFINITY)
    }

    fn distances(&mut self, ty: &TensorType, from: Code) -> Rc<HashMap<Code, f64>> {
        let key = (self.type_id(ty), from);
        if let Some(known) = self.from.get(&key) {
            return Rc::clone(known);
        }
        let distances = Rc::new(dijkstra(self.grid, ty, from));
        self.from.insert(key, Rc::clone(&distances));
        distances
    }

    /// The reshards between the codes that are no detour over another of them: their closure under
    /// concatenation has the price of every pair. Cubic in the number of codes, remembered.
    pub fn arcs(&mut self, ty: &TensorType, codes: &[Code]) -> Rc<Vec<Arc>> {
        let key = (self.type_id(ty), codes.to_vec());
        if let Some(known) = self.arcs.get(&key) {
            return Rc::clone(known);
        }
        let n = codes.len();
        let mut prices = vec![f64::INFINITY; n * n];
        for (from, code) in codes.iter().enumerate() {
            let distances = self.distances(ty, *code);
            for (to, code) in codes.iter().enumerate() {
                prices[from * n + to] = distances.get(code).copied().unwrap_or(f64::INFINITY);
            }
        }
        let mut arcs = Vec::new();
        for from in 0..n {
            for to in 0..n {
                let seconds = prices[from * n + to];
                if from == to || !seconds.is_finite() {
                    continue;
                }
                let is_detour = (0..n).any(|via| {
                    via != from
                        && via != to
                        && prices[from * n + via] + prices[via * n + to] <= seconds * (1.0 + 1e-9)
                });
                if !is_detour {
                    arcs.push(Arc { from, to, seconds });
                }
            }
        }
        let arcs = Rc::new(arcs);
        self.arcs.insert(key, Rc::clone(&arcs));
        arcs
    }

    /// Seconds of bringing a tensor from one layout to several, sharing what lies on the way: a
    /// cheapest Steiner arborescence among `from` and `to` (Dreyfus and Wagner 1971).
    /// Exponential in the number of distinct targets, which is small.
    pub fn shared_seconds(
        &mut self,
        ty: &TensorType,
        from: Code,
        to: &[Code],
        via: &[Code],
    ) -> f64 {
        let mut targets: Vec<Code> = to.iter().copied().filter(|code| *code != from).collect();
        targets.sort_unstable();
        targets.dedup();
        match targets.as_slice() {
            [] => return 0.0,
            [one] => return self.seconds(ty, from, *one),
            _ => {}
        }
        let mut codes: Vec<Code> = via.to_vec();
        codes.push(from);
        codes.extend(&targets);
        codes.sort_unstable();
        codes.dedup();
        let n = codes.len();
        let distances: Vec<Rc<HashMap<Code, f64>>> =
            codes.iter().map(|code| self.distances(ty, *code)).collect();
        let price = |from: usize, to: usize| {
            let known = distances[from].get(&codes[to]).copied();
            known.unwrap_or(f64::INFINITY)
        };
        let position = |code: &Code| codes.binary_search(code).unwrap_or(0);
        let n_sets = 1_usize << targets.len();
        // best[set][node]: the cheapest tree from the node to all targets of the set.
        let mut best = vec![vec![f64::INFINITY; n]; n_sets];
        for set in 1..n_sets {
            let mut here = vec![f64::INFINITY; n];
            if set.is_power_of_two() {
                here[position(&targets[set.trailing_zeros() as usize])] = 0.0;
            } else {
                let mut part = (set - 1) & set;
                while part > 0 {
                    let rest = set & !part;
                    if part >= rest {
                        for (node, seconds) in here.iter_mut().enumerate() {
                            *seconds = seconds.min(best[part][node] + best[rest][node]);
                        }
                    }
                    part = (part - 1) & set;
                }
            }
            best[set] = (0..n)
                .map(|node| {
                    let reached = (0..n).map(|via| price(node, via) + here[via]);
                    reached.fold(f64::INFINITY, f64::min)
                })
                .collect();
        }
        best[n_sets - 1][position(&from)]
    }
}

fn dijkstra(grid: &Grid, ty: &TensorType, from: Code) -> HashMap<Code, f64> {
    let mut settled: HashMap<Code, f64> = HashMap::new();
    let mut frontier = BinaryHeap::new();
    // Nonnegative floats order as their bits.
    frontier.push(Reverse((0_u64, from)));
    while let Some(Reverse((bits, code))) = frontier.pop() {
        if settled.contains_key(&code) {
            continue;
        }
        let seconds = f64::from_bits(bits);
        settled.insert(code, seconds);
        grid.steps(code, ty, |next, price| {
            if !settled.contains_key(&next) && grid.is_legal(next, ty) {
                frontier.push(Reverse(((seconds + price.max(0.0)).to_bits(), next)));
            }
        });
    }
    settled
}

#[cfg(test)]
mod tests {
    use meshweave_dsl::dtype::DType;

    use super::*;
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
        let shared = metric.shared_seconds(&ty, both, &[one, none], &[]);
        assert!((shared - apart).abs() < 1e-12);
        let alone = metric.seconds(&ty, both, none) + metric.seconds(&ty, both, one);
        assert!(shared < alone);
    }
}
