//! Resharding: the cheapest way from one layout of a tensor to another.
//!
//! Enters: two layouts of one tensor on one mesh, and a price for each step.
//! Leaves: a list of steps, each one collective (or a local slice) over one axis.
//! Invariant: every step takes its axis from, or appends it to, the *minor* end of a dim's axes, so
//! that balanced uneven chunks nest exactly; every layout on the way leaves every chunk nonempty.
//!
//! The path is a shortest path (Dijkstra) over layouts. With `a` axes and `d` dims a tensor has at
//! most about (d + 2)^a · a! layouts, a few hundred at most for three axes, and few are expanded.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BinaryHeap};
use std::fmt;

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::graph::TensorType;
use meshweave_dsl::layout::{Layout, Mesh, ReduceKind};
use meshweave_dsl::name::{Axis, Dim};

use crate::plan::cost::{axis_groups, step_seconds};

/// One move between layouts, over the ranks of one axis.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// Each rank keeps its chunk of `dim`: replicated over `axis` → `dim` sharded, no communication.
    Slice { dim: Dim, axis: Axis },
    /// `axis`, partial → sharded over `dim`.
    ReduceScatter {
        kind: ReduceKind,
        dim: Dim,
        axis: Axis,
    },
    /// `axis` moves from the minor end of `from` to the minor end of `to`.
    AllToAll { from: Dim, to: Dim, axis: Axis },
    /// `axis`, the minor axis of `dim`, sharded → replicated.
    AllGather { dim: Dim, axis: Axis },
    /// `axis`, partial → replicated.
    AllReduce { kind: ReduceKind, axis: Axis },
}

impl Step {
    /// The axis whose ranks communicate.
    pub fn axis(&self) -> &Axis {
        match self {
            Self::Slice { axis, .. }
            | Self::ReduceScatter { axis, .. }
            | Self::AllToAll { axis, .. }
            | Self::AllGather { axis, .. }
            | Self::AllReduce { axis, .. } => axis,
        }
    }

    /// The layout after this step; `None` where the step does not apply.
    pub fn apply(&self, layout: &Layout) -> Option<Layout> {
        let mut next = layout.clone();
        match self {
            Self::Slice { dim, axis } => {
                if next.dim_of(axis).is_some() || next.partial.contains_key(axis) {
                    return None;
                }
                push_minor(&mut next, dim, axis);
            }
            Self::ReduceScatter { kind, dim, axis } => {
                if next.partial.remove(axis) != Some(*kind) {
                    return None;
                }
                push_minor(&mut next, dim, axis);
            }
            Self::AllToAll { from, to, axis } => {
                if from == to || !pop_minor(&mut next, from, axis) {
                    return None;
                }
                push_minor(&mut next, to, axis);
            }
            Self::AllGather { dim, axis } => {
                if !pop_minor(&mut next, dim, axis) {
                    return None;
                }
            }
            Self::AllReduce { kind, axis } => {
                if next.partial.remove(axis) != Some(*kind) {
                    return None;
                }
            }
        }
        Some(next)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slice { dim, axis } => write!(f, "slice {dim}/{axis}"),
            Self::ReduceScatter { kind, dim, axis } => {
                write!(f, "reduce_scatter {}({axis}) to {dim}", kind.name())
            }
            Self::AllToAll { from, to, axis } => write!(f, "all_to_all {axis} from {from} to {to}"),
            Self::AllGather { dim, axis } => write!(f, "all_gather {dim}/{axis}"),
            Self::AllReduce { kind, axis } => write!(f, "all_reduce {}({axis})", kind.name()),
        }
    }
}

/// The type of the part of a tensor of type `ty` that `rank` holds.
pub fn local_type(ty: &TensorType, layout: &Layout, mesh: &Mesh, rank: usize) -> TensorType {
    TensorType {
        dtype: ty.dtype,
        shape: ty
            .shape
            .iter()
            .map(|(dim, size)| (dim.clone(), layout.interval(dim, *size, mesh, rank).len))
            .collect(),
    }
}

/// The type of the largest part of a tensor of type `ty` that a rank holds.
pub fn largest_local_type(ty: &TensorType, layout: &Layout, mesh: &Mesh) -> TensorType {
    TensorType {
        dtype: ty.dtype,
        shape: ty
            .shape
            .iter()
            .map(|(dim, size)| {
                let axes = layout.axes_of(dim).iter();
                let len = axes.fold(*size, |len, axis| len.div_ceil(mesh.degree(axis)));
                (dim.clone(), len)
            })
            .collect(),
    }
}

/// Whether the layout names only dims of the tensor and leaves every rank at least one element of
/// each, with every axis used once.
pub fn is_legal(layout: &Layout, ty: &TensorType, mesh: &Mesh) -> bool {
    let mut used: Vec<&Axis> = layout.partial.keys().collect();
    layout.shards.iter().all(|(dim, axes)| {
        let Some(mut least) = ty.size_of(dim) else {
            return false;
        };
        axes.iter().all(|axis| {
            let is_new = !used.contains(&axis);
            used.push(axis);
            least /= mesh.degree(axis);
            is_new && least > 0
        })
    })
}

/// The cheapest steps that turn `from` into `to` on this cluster, with their seconds; empty when the
/// layouts are the same on this mesh. `None` as for [`reshard_path_by`].
pub fn reshard_path(
    from: &Layout,
    to: &Layout,
    ty: &TensorType,
    mesh: &Mesh,
    cluster: &Cluster,
) -> Option<(f64, Vec<Step>)> {
    let shapes = axis_groups(mesh, cluster);
    let price = |step: &Step, local: &TensorType| {
        let group = shapes.get(step.axis()).copied().unwrap_or_default();
        step_seconds(step, local, group, cluster)
    };
    let steps = reshard_path_by(from, to, ty, mesh, price)?;
    let mut layout = without_trivial(from, mesh);
    let mut seconds = 0.0;
    for step in &steps {
        seconds += price(step, &largest_local_type(ty, &layout, mesh));
        layout = step.apply(&layout)?;
    }
    Some((seconds, steps))
}

/// The cheapest steps that turn `from` into `to`, empty when they are the same on this mesh.
///
/// `price` is given a step and the largest local type before it, and returns seconds (at least 0).
/// Among paths of one price the shortest, then the first in the order of layouts, is taken.
/// `None` when there is no way: `to` holds partial values that `from` does not, or has an empty
/// chunk, or partial values of different kinds would have to be combined.
pub fn reshard_path_by(
    from: &Layout,
    to: &Layout,
    ty: &TensorType,
    mesh: &Mesh,
    price: impl Fn(&Step, &TensorType) -> f64,
) -> Option<Vec<Step>> {
    let (from, to) = (without_trivial(from, mesh), without_trivial(to, mesh));
    if from == to {
        return Some(Vec::new());
    }
    let mut kinds = from.partial.values();
    let first_kind = kinds.next();
    if kinds.any(|kind| Some(kind) != first_kind)
        || to
            .partial
            .iter()
            .any(|(axis, kind)| from.partial.get(axis) != Some(kind))
        || !is_legal(&to, ty, mesh)
    {
        return None;
    }

    let mut settled: BTreeMap<Layout, Option<(Layout, Step)>> = BTreeMap::new();
    let mut frontier = BinaryHeap::new();
    frontier.push(Reverse(Reached {
        seconds: 0.0,
        n_steps: 0,
        layout: from.clone(),
        last: None,
    }));
    while let Some(Reverse(reached)) = frontier.pop() {
        if settled.contains_key(&reached.layout) {
            continue;
        }
        settled.insert(reached.layout.clone(), reached.last);
        if reached.layout == to {
            return Some(trace(&settled, &to));
        }
        let local = largest_local_type(ty, &reached.layout, mesh);
        for step in steps_from(&reached.layout, &to, ty, mesh) {
            let Some(next) = step.apply(&reached.layout) else {
                continue;
            };
            if settled.contains_key(&next) || !is_legal(&next, ty, mesh) {
                continue;
            }
            frontier.push(Reverse(Reached {
                seconds: reached.seconds + price(&step, &local).max(0.0),
                n_steps: reached.n_steps + 1,
                layout: next,
                last: Some((reached.layout.clone(), step)),
            }));
        }
    }
    None
}

/// A layout on the frontier, ordered by price, then number of steps, then layout.
struct Reached {
    seconds: f64,
    n_steps: usize,
    layout: Layout,
    last: Option<(Layout, Step)>,
}

impl Ord for Reached {
    fn cmp(&self, other: &Self) -> Ordering {
        self.seconds
            .total_cmp(&other.seconds)
            .then(self.n_steps.cmp(&other.n_steps))
            .then_with(|| self.layout.cmp(&other.layout))
            .then_with(|| self.last.cmp(&other.last))
    }
}

impl PartialOrd for Reached {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Reached {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Reached {}

/// Every step from a layout, but away from partial values that `to` holds too.
fn steps_from(layout: &Layout, to: &Layout, ty: &TensorType, mesh: &Mesh) -> Vec<Step> {
    let mut steps = Vec::new();
    for (axis, degree) in mesh.axes() {
        if *degree < 2 {
            continue;
        }
        let axis = axis.clone();
        if let Some(kind) = layout.partial.get(&axis).copied() {
            if to.partial.contains_key(&axis) {
                continue;
            }
            steps.extend(ty.dims().map(|dim| Step::ReduceScatter {
                kind,
                dim: dim.clone(),
                axis: axis.clone(),
            }));
            steps.push(Step::AllReduce { kind, axis });
        } else if let Some(from) = layout.dim_of(&axis).cloned() {
            if layout.axes_of(&from).last() != Some(&axis) {
                continue;
            }
            let others = ty.dims().filter(|dim| **dim != from);
            steps.extend(others.map(|dim| Step::AllToAll {
                from: from.clone(),
                to: dim.clone(),
                axis: axis.clone(),
            }));
            steps.push(Step::AllGather { dim: from, axis });
        } else {
            // Also over dims that `to` has whole: a reduction of slices may be cheaper.
            steps.extend(ty.dims().map(|dim| Step::Slice {
                dim: dim.clone(),
                axis: axis.clone(),
            }));
        }
    }
    steps
}

fn trace(settled: &BTreeMap<Layout, Option<(Layout, Step)>>, to: &Layout) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut layout = to;
    while let Some(Some((previous, step))) = settled.get(layout) {
        steps.push(step.clone());
        layout = previous;
    }
    steps.reverse();
    steps
}

/// The layout without axes of degree 1, which mean nothing.
fn without_trivial(layout: &Layout, mesh: &Mesh) -> Layout {
    let mut kept = layout.clone();
    kept.partial.retain(|axis, _| mesh.degree(axis) > 1);
    kept.shards.retain(|_, axes| {
        axes.retain(|axis| mesh.degree(axis) > 1);
        !axes.is_empty()
    });
    kept
}

fn push_minor(layout: &mut Layout, dim: &Dim, axis: &Axis) {
    layout
        .shards
        .entry(dim.clone())
        .or_default()
        .push(axis.clone());
}

fn pop_minor(layout: &mut Layout, dim: &Dim, axis: &Axis) -> bool {
    let Some(axes) = layout.shards.get_mut(dim) else {
        return false;
    };
    if axes.last() != Some(axis) {
        return false;
    }
    axes.pop();
    if axes.is_empty() {
        layout.shards.remove(dim);
    }
    true
}

#[cfg(test)]
mod tests {
    use meshweave_dsl::dtype::DType;
    use proptest::prelude::*;

    use super::*;

    fn mesh() -> Mesh {
        Mesh::new([("dp", 2), ("tp", 4), ("cp", 3)])
    }

    fn ty() -> TensorType {
        TensorType::new(DType::F32, [("batch", 24), ("seq", 30), ("embed", 17)])
    }

    /// Bytes that a rank receives, plus a latency.
    fn price(step: &Step, local: &TensorType) -> f64 {
        let n_ranks = mesh().degree(step.axis()) as f64;
        let bytes = local.n_bytes() as f64;
        match step {
            Step::Slice { .. } => 1.0,
            Step::AllGather { .. } => 100.0 + bytes * (n_ranks - 1.0),
            Step::AllReduce { .. } => 200.0 + 2.0 * bytes * (n_ranks - 1.0) / n_ranks,
            Step::ReduceScatter { .. } | Step::AllToAll { .. } => {
                100.0 + bytes * (n_ranks - 1.0) / n_ranks
            }
        }
    }

    #[test]
    fn takes_the_collective_made_for_it() {
        let none = Layout::replicated;
        let path = |from: Layout, to: Layout| -> Vec<String> {
            let mesh = Mesh::new([("dp", 1), ("tp", 4)]);
            let steps = reshard_path_by(&from, &to, &ty(), &mesh, price).unwrap();
            steps.iter().map(Step::to_string).collect()
        };
        assert!(path(none().shard("batch", "dp"), none().shard("batch", "dp")).is_empty());
        assert_eq!(
            path(
                none().partial("tp", ReduceKind::Sum),
                none().shard("seq", "tp")
            ),
            ["reduce_scatter sum(tp) to seq"]
        );
        assert_eq!(
            path(none().shard("seq", "tp"), none().shard("embed", "tp")),
            ["all_to_all tp from seq to embed"]
        );
        assert_eq!(
            path(none().partial("tp", ReduceKind::Sum), none()),
            ["all_reduce sum(tp)"]
        );
    }

    #[test]
    fn reduces_slices_where_copies_stand_by() {
        let from = Layout::replicated().partial("tp", ReduceKind::Sum);
        let steps = reshard_path_by(&from, &Layout::replicated(), &ty(), &mesh(), price).unwrap();
        let names: Vec<String> = steps.iter().map(Step::to_string).collect();
        // Each of the copies along cp and dp reduces a part, and they exchange what they have.
        assert_eq!(names.first().map(String::as_str), Some("slice batch/cp"));
        assert!(names.contains(&"all_reduce sum(tp)".into()), "{names:?}");
    }

    #[test]
    fn moves_only_minor_axes() {
        let from = Layout::replicated().shard("seq", "dp").shard("seq", "tp");
        let to = Layout::replicated().shard("seq", "tp");
        let steps = reshard_path_by(&from, &to, &ty(), &mesh(), price).unwrap();
        let end = steps
            .iter()
            .try_fold(from, |layout, step| step.apply(&layout));
        assert_eq!(end, Some(to));
    }

    #[test]
    fn refuses_what_cannot_be() {
        let none = Layout::replicated;
        let refused = |from: Layout, to: Layout| {
            assert_eq!(reshard_path_by(&from, &to, &ty(), &mesh(), price), None);
        };
        refused(none(), none().partial("tp", ReduceKind::Sum));
        refused(none(), none().shard("heads", "tp"));
        let full = none().shard("embed", "tp").shard("embed", "cp");
        refused(none(), full.shard("embed", "dp"));
        let mixed = none()
            .partial("tp", ReduceKind::Sum)
            .partial("dp", ReduceKind::Max);
        refused(mixed, none());
    }

    prop_compose! {
        /// Each axis on one of three dims, partial (3) or replicated (4); dims in any axis order.
        fn layouts(partial: bool)(
            places in prop::array::uniform3(0..5_usize),
            order in Just(["dp", "tp", "cp"]).prop_shuffle(),
        ) -> Layout {
            let dims = ["batch", "seq", "embed"];
            order.iter().zip(places).fold(Layout::replicated(), |layout, (axis, place)| {
                match place {
                    0..3 => layout.shard(dims[place], *axis),
                    3 if partial => layout.partial(*axis, ReduceKind::Sum),
                    _ => layout,
                }
            })
        }
    }

    proptest! {
        #[test]
        fn every_path_ends_where_it_should(from in layouts(true), to in layouts(false)) {
            prop_assume!(is_legal(&from, &ty(), &mesh()) && is_legal(&to, &ty(), &mesh()));
            let steps = reshard_path_by(&from, &to, &ty(), &mesh(), price).unwrap();
            let mut layout = from;
            for step in &steps {
                layout = step.apply(&layout).unwrap();
                prop_assert!(is_legal(&layout, &ty(), &mesh()));
            }
            prop_assert_eq!(layout, to);
        }
    }
}
