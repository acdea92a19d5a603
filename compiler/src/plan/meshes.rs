//! The meshes of a cluster.
//!
//! Enters: a number of ranks. Leaves: meshes, the fewest axes first, and afterwards axes named by
//! what they came to do.
//! Invariant: every mesh has exactly the ranks of the cluster; meshes that differ only in the order
//! of axes within one node are listed once.

use std::collections::BTreeMap;

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::graph::{Graph, Role};
use meshweave_dsl::layout::{Layout, Mesh};
use meshweave_dsl::name::Axis;
use meshweave_dsl::plan::{Placement, Plan};

/// Names of axes before they have a role.
const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// Meshes beyond which fewer axes are searched.
const MAX_MESHES: usize = 48;

/// All meshes of at most `max_axes` axes over the devices of the cluster.
pub fn enumerate_meshes(cluster: &Cluster, max_axes: usize) -> Vec<Mesh> {
    let n_ranks = cluster.n_devices();
    let mut meshes = vec![Mesh::new([(NAMES[0], n_ranks)])];
    for n_axes in 2..=max_axes.min(NAMES.len()) {
        for degrees in factorizations(n_ranks, n_axes) {
            if is_first_of_its_kind(cluster, &degrees) {
                meshes.push(Mesh::new(NAMES.iter().copied().zip(degrees)));
            }
        }
    }
    meshes
}

/// The most axes, at least two where asked for, whose meshes are not too many to search.
pub fn affordable_axes(cluster: &Cluster, max_axes: usize) -> usize {
    let mut n_axes = max_axes;
    while n_axes > 2 && enumerate_meshes(cluster, n_axes).len() > MAX_MESHES {
        n_axes -= 1;
    }
    n_axes
}

/// Whether axes of which all groups stay within nodes have ascending degrees: every link is alike
/// there, and their order does not matter.
fn is_first_of_its_kind(cluster: &Cluster, degrees: &[usize]) -> bool {
    let mut n_within = 0;
    let mut n_ranks = 1;
    for degree in degrees.iter().rev() {
        n_ranks *= degree;
        if !cluster.devices_per_node.is_multiple_of(n_ranks) && cluster.n_nodes > 1 {
            break;
        }
        n_within += 1;
    }
    degrees[degrees.len() - n_within..].is_sorted()
}

/// Number of meshes that a limit on the axes leaves out.
pub fn n_meshes_beyond(cluster: &Cluster, max_axes: usize) -> usize {
    enumerate_meshes(cluster, NAMES.len()).len() - enumerate_meshes(cluster, max_axes).len()
}

/// Ordered factorizations of n into k factors greater than 1.
fn factorizations(n: usize, k: usize) -> Vec<Vec<usize>> {
    if k == 1 {
        return if n > 1 { vec![vec![n]] } else { Vec::new() };
    }
    (2..n)
        .filter(|first| n.is_multiple_of(*first))
        .flat_map(|first| {
            factorizations(n / first, k - 1)
                .into_iter()
                .map(move |rest| std::iter::once(first).chain(rest).collect())
        })
        .collect()
}

/// Names the axes of a plan by what they do: `dp` (or `fsdp`, when it also shards parameters) divides
/// the batch, `cp` the sequence, `ep` experts, `tp` anything else of the contractions.
pub fn name_axes(graph: &Graph, plan: Plan) -> Plan {
    let mut names: BTreeMap<Axis, Axis> = BTreeMap::new();
    let mut taken: Vec<String> = Vec::new();
    for (axis, _) in plan.mesh.axes() {
        let role = role_of(graph, &plan, axis);
        let mut name = role.to_string();
        let mut n_taken = 1;
        while taken.contains(&name) {
            n_taken += 1;
            name = format!("{role}{n_taken}");
        }
        taken.push(name.clone());
        names.insert(axis.clone(), name.into());
    }
    rename_axes(plan, &names)
}

fn role_of(graph: &Graph, plan: &Plan, axis: &Axis) -> &'static str {
    let mut votes: BTreeMap<&'static str, f64> = BTreeMap::new();
    for ((_, op), placement) in graph.ops().zip(&plan.placements) {
        if !op.kind.is_matmul() {
            continue;
        }
        let Some(factor) = placement.factors.get(axis) else {
            continue;
        };
        let role = match factor.as_str() {
            "batch" => "dp",
            "seq" | "kv_seq" => "cp",
            "expert" => "ep",
            _ => "tp",
        };
        let types: Vec<_> = op.inputs.iter().map(|id| graph.ty(*id)).collect();
        *votes.entry(role).or_default() += op.kind.n_flops(&types, &[]).max(1.0);
    }
    let role = votes.into_iter().max_by(|a, b| a.1.total_cmp(&b.1));
    let role = role.map_or("dp", |(role, _)| role);
    if role != "dp" {
        return role;
    }
    let (mut sharded, mut whole) = (0, 0);
    for id in graph.tensor_ids() {
        if matches!(graph.tensor(id).role, Role::Param(_)) {
            let n_bytes = graph.ty(id).n_bytes();
            match plan.source_layout(id).dim_of(axis) {
                Some(_) => sharded += n_bytes,
                None => whole += n_bytes,
            }
        }
    }
    if sharded > whole { "fsdp" } else { "dp" }
}

fn rename_axes(mut plan: Plan, names: &BTreeMap<Axis, Axis>) -> Plan {
    let new = |axis: &Axis| names.get(axis).unwrap_or(axis).clone();
    let mesh = |mesh: &Mesh| Mesh::new(mesh.axes().iter().map(|(axis, n)| (new(axis), *n)));
    if let Some(first) = plan
        .certificate
        .as_mut()
        .and_then(|certificate| certificate.meshes.first_mut())
    {
        first.mesh = mesh(&first.mesh);
    }
    plan.mesh = mesh(&plan.mesh);
    plan.placements = plan
        .placements
        .iter()
        .map(|placement| Placement {
            factors: placement
                .factors
                .iter()
                .map(|(axis, factor)| (new(axis), factor.clone()))
                .collect(),
        })
        .collect();
    for layout in plan.sources.values_mut() {
        let renamed = Layout {
            shards: layout
                .shards
                .iter()
                .map(|(dim, axes)| (dim.clone(), axes.iter().map(new).collect()))
                .collect(),
            partial: layout
                .partial
                .iter()
                .map(|(axis, kind)| (new(axis), *kind))
                .collect(),
        };
        *layout = renamed;
    }
    plan
}

#[cfg(test)]
mod tests {
    use meshweave_dsl::cluster::Host;

    use super::*;

    fn shown(cluster: &Cluster, max_axes: usize) -> Vec<String> {
        let meshes = enumerate_meshes(cluster, max_axes);
        meshes
            .iter()
            .map(|mesh| {
                let degrees = mesh.axes().iter().map(|(_, n)| n.to_string());
                degrees.collect::<Vec<_>>().join("x")
            })
            .collect()
    }

    #[test]
    fn meshes_are_listed_once() {
        let local = |n| Cluster::local(n, &Host::nominal());
        assert_eq!(shown(&local(8), 3), ["8", "2x4", "2x2x2"]);
        assert_eq!(shown(&local(5), 3), ["5"]);
        assert_eq!(shown(&local(1), 3), ["1"]);
        let two_nodes = Cluster::preset("h100:16").unwrap();
        assert_eq!(shown(&two_nodes, 2), ["16", "2x8", "4x4", "8x2"]);
        assert_eq!(n_meshes_beyond(&local(8), 2), 1);
    }
}
