//! Layouts as small integers, and the price of every step between them.
//!
//! Enters: a mesh on a cluster, and tensor types. Leaves: codes of layouts, local types, prices of steps.
//! Invariant: a [`Code`] has one state per axis of the grid: replicated, sharding a dim, or partial;
//! axes that shard one dim stand in the order of the mesh, outermost major, as placements put them.
//!
//! The prices are those of [`crate::reshard::reshard_path`] restricted to such layouts.

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
    pub group: GroupShape,
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
    pub fn steps(&self, from: Code, ty: &TensorType, mut visit: impl FnMut(Code, f64)) {
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
