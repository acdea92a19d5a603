//! Iteration spaces: over which rows and lanes an op or a group of ops runs.
//!
//! Enters: an op and the types of its tensors. Leaves: a [`Space`], and for a group the collapsed
//! [`Grid`] of its kernel with the strides of every tensor on it.
//! Invariant: a space names each dim once; a grid visits exactly the points of its space, in an
//! order that every tensor's strides express.

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::OpKind;

/// Fused rows become lanes of one long row up to this length, which keeps a row in the first-level
/// cache and leaves rows to split over threads.
const MAX_MERGED_LANES: usize = 4096;

/// How an op treats the lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaneUse {
    /// Any cut of the dims into rows and lanes will do.
    Free,
    /// The lanes are the op's own dim: it reduces over them or numbers them.
    Fixed,
    /// The op pairs lanes at a distance (rope): its lanes mean nothing to other ops.
    Paired,
}

/// Rows and lanes by the dims' names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Space {
    /// Row dims, slowest first.
    pub outer: Vec<(Dim, usize)>,
    /// The lanes; `None` for one lane.
    pub lane: Option<(Dim, usize)>,
    /// What the lanes mean.
    pub lane_use: LaneUse,
}

impl Space {
    /// All dims of `ty` with `lane` as lanes.
    fn with_lane(ty: &TensorType, lane: &Dim, lane_use: LaneUse) -> Self {
        Self {
            outer: ty
                .shape
                .iter()
                .filter(|(dim, _)| dim != lane)
                .cloned()
                .collect(),
            lane: ty.size_of(lane).map(|size| (lane.clone(), size)),
            lane_use,
        }
    }

    /// All dims of `ty`, the innermost as lanes.
    fn innermost(ty: &TensorType, lane_use: LaneUse) -> Self {
        match ty.shape.last() {
            Some((dim, _)) => Self::with_lane(ty, dim, lane_use),
            None => Self::rows_only(ty),
        }
    }

    /// All dims of `ty` as rows.
    fn rows_only(ty: &TensorType) -> Self {
        Self {
            outer: ty.shape.clone(),
            lane: None,
            lane_use: LaneUse::Free,
        }
    }

    /// The space of an op that a kernel can compute; `None` for all others.
    pub fn of(kind: &OpKind, inputs: &[&TensorType], results: &[&TensorType]) -> Option<Self> {
        let first_input = || inputs.first().copied();
        let first_result = || results.first().copied();
        match kind {
            OpKind::Unary(_) | OpKind::Binary(_) | OpKind::Expand { .. } => {
                Some(Self::innermost(first_result()?, LaneUse::Free))
            }
            OpKind::Adamw { .. } | OpKind::Sgd { .. } => {
                Some(Self::innermost(first_result()?, LaneUse::Free))
            }
            OpKind::Gather { .. } => {
                let (idx, result) = (inputs.get(1)?, first_result()?);
                let (lane, _) = result.shape.last()?;
                if idx.has(lane) {
                    Some(Self::rows_only(result))
                } else {
                    Some(Self::innermost(result, LaneUse::Free))
                }
            }
            OpKind::ScatterAdd { .. } => {
                let (idx, y) = (first_input()?, inputs.get(1)?);
                match y.shape.last() {
                    Some((lane, _)) if !idx.has(lane) => Some(Self::innermost(y, LaneUse::Free)),
                    _ => Some(Self::rows_only(y)),
                }
            }
            OpKind::Reduce { kind, dims } => {
                let x = first_input()?;
                match (kind, dims.as_slice()) {
                    (_, [dim]) if *kind == ReduceKind::Lse => {
                        Some(Self::with_lane(x, dim, LaneUse::Fixed))
                    }
                    _ => {
                        let reduces_lanes =
                            x.shape.last().is_some_and(|(lane, _)| dims.contains(lane));
                        let lane_use = if reduces_lanes {
                            LaneUse::Fixed
                        } else {
                            LaneUse::Free
                        };
                        Some(Self::innermost(x, lane_use))
                    }
                }
            }
            OpKind::RmsNorm { dim, .. }
            | OpKind::RmsNormGrad { dim }
            | OpKind::LayerNorm { dim, .. }
            | OpKind::LayerNormGrad { dim }
            | OpKind::Softmax { dim }
            | OpKind::SoftmaxGrad { dim }
            | OpKind::CrossEntropyGrad { dim, .. } => {
                Some(Self::with_lane(first_input()?, dim, LaneUse::Fixed))
            }
            OpKind::Rope { dim, .. } => {
                let mut space = Self::with_lane(first_input()?, dim, LaneUse::Paired);
                if let Some((_, size)) = &mut space.lane {
                    *size /= 2;
                }
                Some(space)
            }
            OpKind::Pick { .. } => Some(Self::rows_only(first_result()?)),
            OpKind::Contract { .. }
            | OpKind::Attention(_)
            | OpKind::AttentionGrad(_)
            | OpKind::Transpose { .. }
            | OpKind::Rename { .. }
            | OpKind::Split { .. }
            | OpKind::Merge { .. }
            | OpKind::Slice { .. }
            | OpKind::Concat { .. }
            | OpKind::TopK { .. }
            | OpKind::TopKGrad { .. }
            | OpKind::MoeSlots { .. }
            | OpKind::MoePlaces(_)
            | OpKind::MoeDispatch(_)
            | OpKind::MoeCombine(_)
            | OpKind::MoeGateGrad(_)
            | OpKind::MoeCounts(_)
            | OpKind::MoeMove(_)
            | OpKind::AllGather { .. }
            | OpKind::AllReduce { .. }
            | OpKind::ReduceScatter { .. }
            | OpKind::AllToAll { .. }
            | OpKind::CollectivePermute { .. }
            | OpKind::Broadcast { .. } => None,
        }
    }

    /// Rows and lanes together.
    pub fn dims(&self) -> impl Iterator<Item = &(Dim, usize)> {
        self.outer.iter().chain(&self.lane)
    }

    /// Does `ty` have exactly the dims of rows and lanes, in any order?
    pub fn is_full(&self, ty: &TensorType) -> bool {
        ty.shape.len() == self.dims().count()
            && self
                .dims()
                .all(|(dim, size)| ty.size_of(dim) == Some(*size))
    }

    /// Does `ty` have exactly the row dims, in any order?
    pub fn is_rows(&self, ty: &TensorType) -> bool {
        ty.shape.len() == self.outer.len()
            && self
                .outer
                .iter()
                .all(|(dim, size)| ty.size_of(dim) == Some(*size))
    }

    /// A space in which ops of both can run, if there is one: the same rows and lanes, or one's
    /// points are the other's rows.
    pub fn joined(&self, other: &Self) -> Option<Self> {
        if self.lane_use == LaneUse::Paired || other.lane_use == LaneUse::Paired {
            return None;
        }
        let same_set = |a: &[&(Dim, usize)], b: &[&(Dim, usize)]| {
            a.len() == b.len() && a.iter().all(|dim| b.contains(dim))
        };
        let (a, b): (Vec<_>, Vec<_>) = (self.dims().collect(), other.dims().collect());
        if self.lane == other.lane && same_set(&a, &b) {
            let mut joined = self.clone();
            if other.lane_use == LaneUse::Fixed {
                joined.lane_use = LaneUse::Fixed;
            }
            return Some(joined);
        }
        let rows_of = |wide: &Self, narrow: &Self, narrow_dims: &[&(Dim, usize)]| {
            let outer: Vec<_> = wide.outer.iter().collect();
            wide.lane.is_some() && narrow.lane_use == LaneUse::Free && same_set(&outer, narrow_dims)
        };
        if rows_of(self, other, &b) {
            return Some(self.clone());
        }
        if rows_of(other, self, &a) {
            return Some(other.clone());
        }
        None
    }
}

/// Strides of a tensor in elements: per row dim of a grid, and between lanes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GridStrides {
    /// Per row dim of the grid.
    pub outer: Vec<i64>,
    /// Between lanes.
    pub lane: i64,
}

/// The row dims and lanes of a kernel, after adjacent dims have been merged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Sizes of the row dims, slowest first.
    pub rows: Vec<usize>,
    /// Number of lanes.
    pub lanes: usize,
    /// Strides of each tensor given to [`Grid::new`], in its order.
    pub strides: Vec<GridStrides>,
}

impl Grid {
    /// Merges what can be merged of `space`, given the strides of all `tensors` on it.
    ///
    /// Two adjacent dims merge when, for every tensor, a step in the outer one is a whole turn of
    /// the inner one. Lanes merge with rows only where no op gives them a meaning.
    pub fn new(space: &Space, tensors: &[&TensorType]) -> Self {
        let mut sizes: Vec<usize> = space.outer.iter().map(|(_, size)| *size).collect();
        let lanes = space.lane.as_ref().map_or(1, |(_, size)| *size);
        sizes.push(lanes);
        let mut strides: Vec<Vec<i64>> = tensors
            .iter()
            .map(|ty| {
                let of_dim = |dim: &Dim| {
                    ty.position(dim)
                        .map_or(0, |position| ty.strides()[position] as i64)
                };
                let mut strides: Vec<i64> =
                    space.outer.iter().map(|(dim, _)| of_dim(dim)).collect();
                strides.push(space.lane.as_ref().map_or(0, |(dim, _)| of_dim(dim)));
                strides
            })
            .collect();
        let drop_dim = |sizes: &mut Vec<usize>, strides: &mut Vec<Vec<i64>>, at: usize| {
            sizes.remove(at);
            for tensor in strides {
                tensor.remove(at);
            }
        };
        for at in (0..sizes.len() - 1).rev() {
            if sizes[at] == 1 {
                drop_dim(&mut sizes, &mut strides, at);
            }
        }
        let n_kept = usize::from(space.lane_use != LaneUse::Free);
        for at in (0..sizes.len().saturating_sub(1 + n_kept)).rev() {
            let merges = strides
                .iter()
                .all(|tensor| tensor[at] == tensor[at + 1] * sizes[at + 1] as i64);
            let becomes_lanes = at + 2 == sizes.len();
            if merges && (!becomes_lanes || sizes[at + 1] < MAX_MERGED_LANES) {
                sizes[at + 1] *= sizes[at];
                drop_dim(&mut sizes, &mut strides, at);
            }
        }
        let mut lanes = sizes.pop().unwrap_or(1);
        if space.lane_use == LaneUse::Free
            && lanes > MAX_MERGED_LANES
            && let Some(part) = divisor_below(lanes, MAX_MERGED_LANES)
        {
            sizes.push(lanes / part);
            for tensor in &mut strides {
                let lane = tensor.last().copied().unwrap_or(0);
                tensor.insert(tensor.len().saturating_sub(1), lane * part as i64);
            }
            lanes = part;
        }
        let strides = strides
            .into_iter()
            .map(|mut tensor| {
                let lane = tensor.pop().unwrap_or(0);
                GridStrides {
                    outer: tensor,
                    lane,
                }
            })
            .collect();
        Self {
            rows: sizes,
            lanes,
            strides,
        }
    }
}

/// The greatest divisor of `n` that is at most `limit` and a multiple of 64, so that rows stay
/// whole vectors and cache lines.
fn divisor_below(n: usize, limit: usize) -> Option<usize> {
    (1..=limit / 64)
        .rev()
        .map(|blocks| blocks * 64)
        .find(|part| n.is_multiple_of(*part))
}
