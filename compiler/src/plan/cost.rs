//! Prices: seconds of an op, a fused fragment, a collective and a reshard step on a cluster.
//!
//! Enters: local types (one rank's part) and the actual ranks of a group. Leaves: seconds.
//! Invariant: prices are nonnegative, and grow with bytes and with operations.
//!
//! Compute is a roofline (Williams et al., CACM 2009): the slower of arithmetic and memory traffic at
//! the efficiencies of the device, after a fixed cost ([`compute`]). Communication follows NCCL's
//! tuning model, with links within and between nodes apart ([`links`]): `docs/cost-model.md`.

pub mod compute;
pub mod efficiency;
pub mod far;
pub mod links;

use std::collections::BTreeMap;

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::TensorType;
use meshweave_dsl::layout::Mesh;
use meshweave_dsl::name::Axis;
use meshweave_dsl::op::OpKind;

pub use compute::{AttentionPass, attention_seconds, contract_seconds, fragment_seconds};
pub use links::{GroupShape, Traffic, traffic_seconds};

use crate::reshard::Step;

/// Seconds of one op on local types; collectives are priced by [`collective_seconds`].
pub fn op_seconds(
    kind: &OpKind,
    inputs: &[&TensorType],
    results: &[&TensorType],
    cluster: &Cluster,
) -> f64 {
    if kind.is_matmul() {
        return matmul_op_seconds(kind, inputs, results, cluster);
    }
    let n_flops = kind.n_flops(inputs, results);
    let n_bytes = kind.n_bytes_moved(inputs, results);
    if n_flops == 0.0 && n_bytes == 0.0 {
        return 0.0;
    }
    fragment_seconds(n_flops, n_bytes, cluster)
}

/// Seconds of a contraction or of attention on local types.
pub fn matmul_op_seconds(
    kind: &OpKind,
    inputs: &[&TensorType],
    results: &[&TensorType],
    cluster: &Cluster,
) -> f64 {
    let n_flops = kind.n_flops(inputs, results);
    let n_bytes = kind.n_bytes_moved(inputs, results);
    // Both operands are multiplied in the narrower type of the two.
    let dtypes = inputs.iter().take(2).map(|ty| ty.dtype);
    let dtype = dtypes.min_by_key(|dtype| dtype.n_bytes());
    let dtype = dtype.unwrap_or(DType::F32);
    let elements = |ty: Option<&&TensorType>| ty.map_or(1.0, |ty| ty.n_elements() as f64);
    match kind {
        OpKind::Attention(dims) | OpKind::AttentionGrad(dims) => {
            let size = |dim| {
                inputs
                    .get(1)
                    .and_then(|keys| keys.size_of(dim))
                    .unwrap_or(1)
            };
            let sizes = [size(&dims.kv_seq) as f64, size(&dims.head) as f64];
            let pass = match kind {
                OpKind::AttentionGrad(_) => AttentionPass::Backward,
                _ => AttentionPass::Forward,
            };
            attention_seconds(pass, sizes, n_flops, n_bytes, dtype, cluster)
        }
        _ => {
            let [a, b] = [inputs.first(), inputs.get(1)].map(elements);
            let sizes = [a, b, elements(results.first())];
            contract_seconds(sizes, n_flops, n_bytes, dtype, cluster)
        }
    }
}

/// The worst group of every axis of a mesh: the one on the most nodes.
pub fn axis_groups(mesh: &Mesh, cluster: &Cluster) -> BTreeMap<Axis, GroupShape> {
    mesh.axes()
        .iter()
        .map(|(axis, _)| {
            let shapes = (0..mesh.n_ranks())
                .filter(|rank| mesh.coordinate(*rank, axis) == 0)
                .map(|rank| GroupShape::of(&mesh.group(rank, std::slice::from_ref(axis)), cluster));
            let worst = shapes.max_by(|a, b| {
                let spread = |shape: &GroupShape| (shape.n_nodes, usize::MAX - shape.per_node);
                let far = |shape: &GroupShape| shape.far.ring + shape.far.within_loss;
                spread(a).cmp(&spread(b)).then(far(a).total_cmp(&far(b)))
            });
            (axis.clone(), worst.unwrap_or_default())
        })
        .collect()
}

/// Seconds of a collective op of a local graph; `n_bytes` is the greater of its input and its result.
/// 0 for every other op.
pub fn collective_seconds(kind: &OpKind, n_bytes: f64, cluster: &Cluster) -> f64 {
    let traffic = match kind {
        OpKind::AllGather { .. } => Traffic::AllGather,
        OpKind::ReduceScatter { .. } => Traffic::ReduceScatter,
        OpKind::AllReduce { .. } => Traffic::AllReduce,
        OpKind::AllToAll { .. } | OpKind::MoeMove(_) => Traffic::AllToAll,
        OpKind::CollectivePermute { .. } => Traffic::Permute,
        OpKind::Broadcast { .. } => Traffic::Broadcast,
        _ => return 0.0,
    };
    kind.group().map_or(0.0, |group| {
        traffic_seconds(
            traffic,
            n_bytes,
            GroupShape::of(&group.ranks, cluster),
            cluster,
        )
    })
}

/// Seconds of one reshard step on the largest local type before it.
pub fn step_seconds(step: &Step, local: &TensorType, group: GroupShape, cluster: &Cluster) -> f64 {
    let n_bytes = local.n_bytes() as f64;
    let n_ranks = group.n_ranks.max(1) as f64;
    match step {
        // Read a chunk and write it: one pass of the vector units.
        Step::Slice { .. } => fragment_seconds(0.0, 2.0 * n_bytes / n_ranks, cluster),
        Step::AllGather { .. } => {
            traffic_seconds(Traffic::AllGather, n_bytes * n_ranks, group, cluster)
        }
        Step::ReduceScatter { .. } => {
            traffic_seconds(Traffic::ReduceScatter, n_bytes, group, cluster)
        }
        Step::AllReduce { .. } => traffic_seconds(Traffic::AllReduce, n_bytes, group, cluster),
        Step::AllToAll { .. } => traffic_seconds(Traffic::AllToAll, n_bytes, group, cluster),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(n_ranks: usize, cluster: &Cluster) -> GroupShape {
        GroupShape::of(&(0..n_ranks).collect::<Vec<_>>(), cluster)
    }

    #[test]
    fn the_network_is_dearer_than_the_node() {
        let cluster = Cluster::preset("h100:16").unwrap();
        let inner = traffic_seconds(Traffic::AllReduce, 1e8, shape(8, &cluster), &cluster);
        let strided: Vec<usize> = (0..8).map(|idx| idx * 2).collect();
        let both = GroupShape::of(&strided, &cluster);
        assert_eq!((both.n_nodes, both.per_node), (2, 4));
        let outer = traffic_seconds(Traffic::AllReduce, 1e8, both, &cluster);
        // 2 · 7/8 · 1e8 / (1.05 · 450e9) and 2 · 1/2 · 1e8 / (4 · 0.92 · 50e9), besides latency.
        assert!((3.6e-4..4.6e-4).contains(&inner), "{inner}");
        assert!((5.4e-4..6.6e-4).contains(&outer), "{outer}");
    }

    #[test]
    fn an_all_reduce_is_a_reduce_scatter_and_an_all_gather() {
        let cluster = Cluster::preset("a100-80:8").unwrap();
        let seconds = |traffic| traffic_seconds(traffic, 1e9, shape(8, &cluster), &cluster);
        let parts = seconds(Traffic::ReduceScatter) + seconds(Traffic::AllGather);
        assert!((seconds(Traffic::AllReduce) / parts - 1.0).abs() < 0.02);
    }

    #[test]
    fn large_contractions_run_at_the_peak() {
        let cluster = Cluster::preset("h100:1").unwrap();
        let ty = |a: &str, b: &str| TensorType::new(DType::Bf16, [(a, 8192), (b, 8192)]);
        let (x, y, z) = (ty("m", "k"), ty("k", "n"), ty("m", "n"));
        let kind = OpKind::Contract {
            out: vec!["m".into(), "n".into()],
        };
        let seconds = op_seconds(&kind, &[&x, &y], &[&z], &cluster);
        let tflops = 2.0 * 8192f64.powi(3) / seconds / 1e12;
        assert!((600.0..650.0).contains(&tflops), "{tflops}");
    }
}
