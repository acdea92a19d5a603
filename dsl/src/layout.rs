//! Meshes, layouts and the regions of a tensor that ranks hold.
//!
//! Enters: nothing but sizes. Leaves: which rank holds which part of which tensor.
//! Invariant: over all coordinates of the axes that shard a tensor, regions tile the tensor exactly.
//!
//! Chunks are balanced: `n` elements over `k` ranks give the first `n % k` ranks one element more.
//! A dim sharded over several axes is chunked by the first (major) axis, and each chunk by the next.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::name::{Axis, Dim};

/// How values on the ranks of an axis combine into the tensor's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReduceKind {
    Sum,
    Max,
    /// log Σ exp, the reduction of a vocabulary-parallel cross entropy.
    Lse,
}

impl ReduceKind {
    /// The name in text forms.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sum => "sum",
            Self::Max => "max",
            Self::Lse => "lse",
        }
    }
}

/// A grid of ranks; the first axis is outermost (ranks are its row-major indices).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Mesh {
    axes: Vec<(Axis, usize)>,
}

impl Mesh {
    /// A mesh of the given axes, outermost first. Axes of degree 0 are taken as degree 1.
    pub fn new(axes: impl IntoIterator<Item = (impl Into<Axis>, usize)>) -> Self {
        Self {
            axes: axes
                .into_iter()
                .map(|(axis, degree)| (axis.into(), degree.max(1)))
                .collect(),
        }
    }

    /// The axes with their degrees, outermost first.
    pub fn axes(&self) -> &[(Axis, usize)] {
        &self.axes
    }

    /// The degree of an axis; 1 when the mesh does not have it.
    pub fn degree(&self, axis: &Axis) -> usize {
        self.axes
            .iter()
            .find(|(name, _)| name == axis)
            .map_or(1, |(_, degree)| *degree)
    }

    /// Number of ranks.
    pub fn n_ranks(&self) -> usize {
        self.axes.iter().map(|(_, degree)| degree).product()
    }

    /// The coordinate of a rank on an axis; 0 when the mesh does not have it.
    pub fn coordinate(&self, rank: usize, axis: &Axis) -> usize {
        let mut stride = 1;
        for (name, degree) in self.axes.iter().rev() {
            if name == axis {
                return rank / stride % degree;
            }
            stride *= degree;
        }
        0
    }

    /// The ranks that differ from `rank` on the given axes only, in the order of their coordinates
    /// on `axes` (first axis major).
    pub fn group(&self, rank: usize, axes: &[Axis]) -> Vec<usize> {
        let mut ranks = vec![rank];
        for axis in axes {
            let degree = self.degree(axis);
            let stride = self.stride(axis);
            ranks = ranks
                .iter()
                .flat_map(|member| {
                    let base = member - self.coordinate(*member, axis) * stride;
                    (0..degree).map(move |coordinate| base + coordinate * stride)
                })
                .collect();
        }
        ranks
    }

    fn stride(&self, axis: &Axis) -> usize {
        self.axes
            .iter()
            .rev()
            .take_while(|(name, _)| name != axis)
            .map(|(_, degree)| degree)
            .product()
    }
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (axis_idx, (axis, degree)) in self.axes.iter().enumerate() {
            let separator = if axis_idx == 0 { "" } else { " > " };
            write!(f, "{separator}{axis}:{degree}")?;
        }
        Ok(())
    }
}

/// A half-open interval `[start, start + len)` of one dim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Interval {
    pub start: usize,
    pub len: usize,
}

impl Interval {
    /// Chunk `idx` of `n_chunks` balanced chunks of this interval.
    pub fn chunk(self, idx: usize, n_chunks: usize) -> Self {
        let (base, n_longer) = (self.len / n_chunks, self.len % n_chunks);
        Self {
            start: self.start + idx * base + idx.min(n_longer),
            len: base + usize::from(idx < n_longer),
        }
    }

    /// The common part of two intervals; of length 0 when there is none.
    pub fn intersect(self, other: Self) -> Self {
        let start = self.start.max(other.start);
        let end = (self.start + self.len).min(other.start + other.len);
        Self {
            start,
            len: end.saturating_sub(start),
        }
    }
}

/// Where a tensor's elements are: dims sharded over axes, and axes over which values are partial.
///
/// An axis named nowhere holds copies (replicated). The empty layout is fully replicated.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Layout {
    /// Axes per sharded dim, major first; no empty lists.
    pub shards: BTreeMap<Dim, Vec<Axis>>,
    /// Axes over which the ranks hold unreduced values.
    pub partial: BTreeMap<Axis, ReduceKind>,
}

impl Layout {
    /// Every rank holds the whole tensor.
    pub fn replicated() -> Self {
        Self::default()
    }

    /// This layout with `dim` sharded over one more (minor) axis.
    pub fn shard(mut self, dim: impl Into<Dim>, axis: impl Into<Axis>) -> Self {
        self.shards.entry(dim.into()).or_default().push(axis.into());
        self
    }

    /// This layout with values partial over `axis`.
    pub fn partial(mut self, axis: impl Into<Axis>, kind: ReduceKind) -> Self {
        self.partial.insert(axis.into(), kind);
        self
    }

    /// The axes that shard `dim`, major first.
    pub fn axes_of(&self, dim: &Dim) -> &[Axis] {
        self.shards.get(dim).map_or(&[], Vec::as_slice)
    }

    /// The dim that `axis` shards, if any.
    pub fn dim_of(&self, axis: &Axis) -> Option<&Dim> {
        self.shards
            .iter()
            .find(|(_, axes)| axes.contains(axis))
            .map(|(dim, _)| dim)
    }

    /// Whether every rank holds the whole, reduced tensor.
    pub fn is_replicated(&self) -> bool {
        self.shards.is_empty() && self.partial.is_empty()
    }

    /// The part of a dim of `size` elements that `rank` holds.
    pub fn interval(&self, dim: &Dim, size: usize, mesh: &Mesh, rank: usize) -> Interval {
        self.axes_of(dim).iter().fold(
            Interval {
                start: 0,
                len: size,
            },
            |interval, axis| interval.chunk(mesh.coordinate(rank, axis), mesh.degree(axis)),
        )
    }

    /// The part of a tensor of `shape` that `rank` holds, one interval a dim.
    pub fn region(&self, shape: &[(Dim, usize)], mesh: &Mesh, rank: usize) -> Vec<Interval> {
        shape
            .iter()
            .map(|(dim, size)| self.interval(dim, *size, mesh, rank))
            .collect()
    }

    /// The text form over the dims of a tensor, such as `[batch/dp, seq, embed]+sum(tp)`.
    pub fn display<'a>(&'a self, dims: impl IntoIterator<Item = &'a Dim>) -> String {
        let mut text = String::from("[");
        for (dim_idx, dim) in dims.into_iter().enumerate() {
            if dim_idx > 0 {
                text.push_str(", ");
            }
            text.push_str(dim.as_str());
            match self.axes_of(dim) {
                [] => {}
                [axis] => text.push_str(&format!("/{axis}")),
                axes => {
                    let names: Vec<&str> = axes.iter().map(Axis::as_str).collect();
                    text.push_str(&format!("/({})", names.join(",")));
                }
            }
        }
        text.push(']');
        for (axis, kind) in &self.partial {
            text.push_str(&format!("+{}({axis})", kind.name()));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_tile_and_are_balanced() {
        let whole = Interval { start: 3, len: 8 };
        let chunks: Vec<_> = (0..5).map(|idx| whole.chunk(idx, 5)).collect();
        let lens: Vec<_> = chunks.iter().map(|chunk| chunk.len).collect();
        assert_eq!(lens, [2, 2, 2, 1, 1]);
        let mut next = whole.start;
        for chunk in chunks {
            assert_eq!(chunk.start, next);
            next += chunk.len;
        }
        assert_eq!(next, 11);
    }

    #[test]
    fn groups_follow_the_axes() {
        let mesh = Mesh::new([("dp", 2), ("tp", 4)]);
        assert_eq!(mesh.group(5, &["tp".into()]), [4, 5, 6, 7]);
        assert_eq!(mesh.group(5, &["dp".into()]), [1, 5]);
        assert_eq!(
            mesh.group(5, &["tp".into(), "dp".into()]),
            [0, 4, 1, 5, 2, 6, 3, 7]
        );
        assert_eq!(mesh.coordinate(6, &"tp".into()), 2);
    }
}
