//! Two grids over the same ranks: parallel folding (MoE Parallel Folding, arXiv 2504.14960, §3).
//!
//! Enters: the mesh of attention and the mesh of experts, or the groups that another program made.
//! Leaves: one mesh that refines both, or the ranks on which the two disagree.
//! Invariant: an axis of either mesh is a list of axes of the refined one, so a layout over an axis of
//! either is a layout over the refined mesh, and going from attention to experts moves nothing.

use std::collections::BTreeMap;

use crate::layout::Mesh;
use crate::name::Axis;

/// Two grids that do not fit over the same ranks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FoldError {
    /// Against the rules of folding.
    #[error("{0}")]
    Invalid(String),
    /// Legal, but without a common refinement.
    #[error("{0}")]
    Unsupported(String),
}

/// A mesh that refines two others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fold {
    mesh: Mesh,
    parts: BTreeMap<Axis, Vec<Axis>>,
}

impl Fold {
    /// The common refinement of `main` and `folded`, both outermost axis first.
    ///
    /// Its axes are called after one axis of each, `dp_ep`; an axis of one rank, and one that both
    /// meshes have, keeps its name.
    ///
    /// # Errors
    /// `Invalid` when the meshes have different numbers of ranks, or an axis of both names (the
    /// pipeline's) has other groups in each, with a rank on which they disagree; `Unsupported` when an
    /// axis begins within another without dividing it.
    pub fn new(main: &Mesh, folded: &Mesh) -> Result<Self, FoldError> {
        if main.n_ranks() != folded.n_ranks() {
            return Err(FoldError::Invalid(format!(
                "`{main}` has {} ranks and `{folded}` has {}: give both the same number",
                main.n_ranks(),
                folded.n_ranks()
            )));
        }
        for (axis, degree) in main.axes() {
            let is_shared = folded.axes().iter().any(|(other, _)| other == axis);
            if is_shared {
                same_groups(main, folded, axis, *degree)?;
            }
        }
        let mut axes: Vec<(Axis, usize)> = Vec::new();
        let mut parts: BTreeMap<Axis, Vec<Axis>> = BTreeMap::new();
        let mut own = real(main);
        let mut other = real(folded);
        while let (Some((a, n_a)), Some((b, n_b))) = (own.pop(), other.pop()) {
            let degree = n_a.min(n_b);
            if !n_a.is_multiple_of(degree) || !n_b.is_multiple_of(degree) {
                return Err(FoldError::Unsupported(format!(
                    "`{a}` of `{main}` and `{b}` of `{folded}` meet at {n_a} and {n_b} ranks, neither of which divides the other: choose degrees of which one divides the other"
                )));
            }
            let name = if a == b {
                a.clone()
            } else {
                Axis::from(format!("{a}_{b}").as_str())
            };
            axes.push((name.clone(), degree));
            parts.entry(a.clone()).or_default().insert(0, name.clone());
            if a != b {
                parts.entry(b.clone()).or_default().insert(0, name);
            }
            if n_a > degree {
                own.push((a, n_a / degree));
            }
            if n_b > degree {
                other.push((b, n_b / degree));
            }
        }
        axes.reverse();
        for (axis, _) in main.axes().iter().chain(folded.axes()) {
            parts
                .entry(axis.clone())
                .or_insert_with(|| vec![axis.clone()]);
        }
        Ok(Self {
            mesh: Mesh::new(axes),
            parts,
        })
    }

    /// The refined mesh; without axes of one rank.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// The axes of the refined mesh that an axis of either mesh consists of, outermost first.
    pub fn parts(&self) -> &BTreeMap<Axis, Vec<Axis>> {
        &self.parts
    }
}

/// The axes of more than one rank, the innermost last.
fn real(mesh: &Mesh) -> Vec<(Axis, usize)> {
    let axes = mesh.axes().iter();
    axes.filter(|(_, degree)| *degree > 1).cloned().collect()
}

fn same_groups(main: &Mesh, folded: &Mesh, axis: &Axis, degree: usize) -> Result<(), FoldError> {
    let only = std::slice::from_ref(axis);
    for rank in 0..main.n_ranks() {
        let (own, other) = (main.group(rank, only), folded.group(rank, only));
        if own != other {
            return Err(FoldError::Invalid(format!(
                "`{axis}:{degree}` of `{main}` puts rank {rank} into the group {own:?}, `{folded}` into {other:?}: write `{axis}` at the same place of both meshes, outermost"
            )));
        }
    }
    Ok(())
}

/// The groups of one axis of a grid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupSet {
    pub axis: String,
    pub groups: Vec<Vec<usize>>,
}

impl GroupSet {
    /// The groups of an axis of a mesh, each ascending, in the order of their first ranks.
    pub fn of(mesh: &Mesh, axis: &Axis) -> Self {
        let mut groups: Vec<Vec<usize>> = (0..mesh.n_ranks())
            .map(|rank| mesh.group(rank, std::slice::from_ref(axis)))
            .collect();
        groups.sort();
        groups.dedup();
        Self {
            axis: axis.as_str().to_owned(),
            groups,
        }
    }

    /// The group of every rank; an error names a rank without one or with two.
    fn membership(&self, n_ranks: usize) -> Result<Vec<usize>, FoldError> {
        let axis = &self.axis;
        let mut of: Vec<Option<usize>> = vec![None; n_ranks];
        for (group_idx, group) in self.groups.iter().enumerate() {
            for rank in group {
                match of.get_mut(*rank) {
                    None => {
                        return Err(FoldError::Invalid(format!(
                            "a group of `{axis}` names rank {rank}, and there are {n_ranks} ranks"
                        )));
                    }
                    Some(Some(first)) => {
                        let first = self.groups.get(*first).cloned().unwrap_or_default();
                        return Err(FoldError::Invalid(format!(
                            "rank {rank} is in two groups of `{axis}`, {first:?} and {group:?}"
                        )));
                    }
                    Some(none) => *none = Some(group_idx),
                }
            }
        }
        of.iter()
            .enumerate()
            .map(|(rank, group)| {
                group.ok_or_else(|| {
                    FoldError::Invalid(format!("rank {rank} is in no group of `{axis}`"))
                })
            })
            .collect()
    }
}

/// Proves that two families of groups are grids over the ranks `0..n_ranks` with the same pipelines:
/// every axis has each rank in one group, two ranks share groups of at most one axis of a grid, the
/// groups of a grid reach all ranks, and the groups of `pipeline` are the same in both.
/// O(n_ranks · axes · group size).
///
/// # Errors
/// The first rule that is broken, with the ranks that break it.
pub fn prove(
    attention: &[GroupSet],
    experts: &[GroupSet],
    pipeline: &str,
    n_ranks: usize,
) -> Result<(), FoldError> {
    for grid in [attention, experts] {
        prove_grid(grid, n_ranks)?;
    }
    let find = |grid: &[GroupSet]| grid.iter().find(|set| set.axis == pipeline).cloned();
    let (Some(own), Some(other)) = (find(attention), find(experts)) else {
        return Err(FoldError::Invalid(format!(
            "both grids need groups of `{pipeline}`"
        )));
    };
    let sorted = |set: &GroupSet, group: usize| {
        let mut ranks = set.groups.get(group).cloned().unwrap_or_default();
        ranks.sort_unstable();
        ranks
    };
    let (of_own, of_other) = (own.membership(n_ranks)?, other.membership(n_ranks)?);
    for (rank, (a, b)) in of_own.into_iter().zip(of_other).enumerate() {
        let (a, b) = (sorted(&own, a), sorted(&other, b));
        if a != b {
            return Err(FoldError::Invalid(format!(
                "rank {rank} has the `{pipeline}` group {a:?} for attention and {b:?} for experts: lay ranks out with `{pipeline}` outermost in both grids"
            )));
        }
    }
    Ok(())
}

fn prove_grid(grid: &[GroupSet], n_ranks: usize) -> Result<(), FoldError> {
    let mut of = Vec::with_capacity(grid.len());
    for set in grid {
        of.push(set.membership(n_ranks)?);
    }
    for rank in 0..n_ranks {
        let mut size = 1usize;
        // Ranks met so far in a group of this rank, by axis.
        let mut met: BTreeMap<usize, &str> = BTreeMap::new();
        for (set, of) in grid.iter().zip(&of) {
            let group = of.get(rank).and_then(|group| set.groups.get(*group));
            let group = group.map_or(&[][..], Vec::as_slice);
            size = size.saturating_mul(group.len());
            for other in group.iter().filter(|other| **other != rank) {
                if let Some(first) = met.insert(*other, &set.axis) {
                    return Err(FoldError::Invalid(format!(
                        "ranks {rank} and {other} share a group of `{first}` and one of `{}`",
                        set.axis
                    )));
                }
            }
        }
        if size != n_ranks {
            let sizes: Vec<String> = grid
                .iter()
                .zip(&of)
                .map(|(set, of)| {
                    let group = of.get(rank).and_then(|group| set.groups.get(*group));
                    format!("{} {}", set.axis, group.map_or(0, Vec::len))
                })
                .collect();
            return Err(FoldError::Invalid(format!(
                "the groups of rank {rank} ({}) span {size} ranks, and there are {n_ranks}",
                sizes.join(" × ")
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
