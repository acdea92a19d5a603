//! Clusters whose nodes are not alike: the search against brute force, bounds, slow links.

use meshweave_dsl::cluster::{Level, Slow, SlowLinks};

use super::super::arrange::orders;
use super::*;

/// So many nodes of one device each.
fn nodes(device: &str, n_nodes: usize) -> Cluster {
    Cluster {
        n_nodes,
        devices_per_node: 1,
        ..Cluster::preset(&format!("{device}:1")).unwrap()
    }
}

fn slow_uplink(idx: usize, part: f64) -> Slow {
    Slow {
        unit: "node".into(),
        idx,
        links: SlowLinks::Uplink,
        part,
    }
}

/// A tiny cluster of two groups, or of one with levels and a slow link.
fn tiny(kind: usize, n_devices: usize) -> Cluster {
    let some = n_devices.div_ceil(2);
    let mut cluster = match kind % 3 {
        0 => nodes("h100", n_devices),
        1 => Cluster {
            others: vec![nodes("a100-40", n_devices - some)],
            ..nodes("h100", some)
        },
        _ => Cluster {
            others: vec![nodes("h100", n_devices - some)],
            ..nodes("v100-32", some)
        },
    };
    cluster.others.retain(|group| group.n_nodes > 0);
    if kind.is_multiple_of(3) {
        cluster.levels.push(Level {
            name: "leaf".into(),
            n_nodes: 2,
            link: meshweave_dsl::cluster::Link {
                bytes_per_s: 10e9,
                ..cluster.between_nodes.clone()
            },
        });
    }
    if kind.is_multiple_of(2) {
        cluster.slow.push(slow_uplink(0, 0.1));
    }
    cluster
}

/// All ways to give each of `n_stages` at least one of `n_layers`.
fn cuts(n_layers: usize, n_stages: usize) -> Vec<Vec<usize>> {
    if n_stages == 1 {
        return vec![vec![n_layers]];
    }
    let first = 1..(n_layers + 2).saturating_sub(n_stages);
    first
        .flat_map(|own| {
            let rest = cuts(n_layers - own, n_stages - 1);
            rest.into_iter().map(move |cut| [vec![own], cut].concat())
        })
        .collect()
}

#[test]
fn the_search_over_unlike_nodes_is_as_good_as_brute_force() {
    let kind = std::cell::Cell::new(0);
    each_instance(60, |instance| {
        kind.set(kind.get() + 1);
        let cluster = tiny(kind.get(), instance.n_devices.clamp(2, 4));
        let workload = instance.workload();
        let mut space = instance.space(&workload, &cluster);
        space.headroom = 0.0;
        let mut best: Option<(f64, String)> = None;
        for order in orders(&cluster) {
            let placed = cluster.on_nodes(&order).unwrap();
            let problem = Problem {
                workload: &workload,
                cluster: &placed,
                space: &space,
            };
            for mapping in all_mappings(&problem) {
                let Ok(found) = estimate(&workload, &mapping, &placed) else {
                    continue;
                };
                let fits = worst_bytes(&problem, &mapping) <= space.budget_bytes;
                if fits && best.as_ref().is_none_or(|(known, _)| found.step_s < *known) {
                    best = Some((found.step_s, format!("{mapping:?} on {order:?}")));
                }
            }
        }
        let found = search(&workload, &cluster, &space, &Options::default());
        match (best, found) {
            (Some((seconds, mapping)), Ok(found)) => {
                let others = found.runners_up.iter().map(|other| other.estimate.step_s);
                let own = others.fold(found.certificate.predicted_s, f64::min);
                prop_assert!(
                    (own / seconds - 1.0).abs() < 1e-9,
                    "{cluster}: brute force {seconds} with {mapping}, search {own} with {:?}",
                    found.best.mapping
                );
                prop_assert!(found.certificate.lower_bound_s <= own * (1.0 + 1e-12));
            }
            (None, Err(_)) => {}
            (best, found) => prop_assert!(false, "{instance:?}: {best:?} against {found:?}"),
        }
        Ok(())
    });
}

#[test]
fn no_cut_over_unlike_nodes_beats_its_bounds() {
    let kind = std::cell::Cell::new(0);
    each_instance(40, |instance| {
        kind.set(kind.get() + 1);
        let cluster = tiny(kind.get(), instance.n_devices.clamp(2, 4));
        let workload = instance.workload();
        let space = Space {
            cuts: Cuts::Any,
            ..instance.space(&workload, &cluster)
        };
        for order in orders(&cluster) {
            let placed = cluster.on_nodes(&order).unwrap();
            let problem = Problem {
                workload: &workload,
                cluster: &placed,
                space: &space,
            };
            let layers = Layers::default();
            for even in all_mappings(&problem) {
                for cut in cuts(instance.n_layers, even.n_stages()) {
                    let mut mapping = even.clone();
                    mapping.pipeline.layers = (mapping.pp > 1).then_some(cut);
                    let Ok(found) = estimate(&workload, &mapping, &placed) else {
                        continue;
                    };
                    let (grid, key) = (grid_of(&mapping), key_of(&mapping));
                    let costs = layers.costs(&problem, key);
                    let bounds = [
                        least_seconds_of_layers(&problem, mapping.n_ranks(), &key, &costs),
                        least_seconds(&problem, grid, &key, &costs),
                        least_seconds_of_cut(&problem, &mapping, &costs),
                    ];
                    for bound in bounds {
                        prop_assert!(
                            bound <= found.step_s * (1.0 + 1e-9),
                            "{mapping:?} takes {} and its bounds are {bounds:?}",
                            found.step_s
                        );
                    }
                    let bytes = worst_bytes(&problem, &mapping);
                    let least = bytes_with_savings(&problem, grid, &key).min().unwrap();
                    prop_assert!(least <= bytes, "{mapping:?} needs {bytes}, bound {least}");
                }
            }
        }
        Ok(())
    });
}

fn llama() -> Workload {
    Workload::new(published("llama-3-8b"), 128, 8192, Job::Train)
}

#[test]
fn fast_devices_get_more_layers() {
    let workload = llama();
    let cluster = Cluster {
        others: vec![Cluster::preset("a100-80:16").unwrap()],
        ..Cluster::preset("h100:16").unwrap()
    };
    let plan = |cluster: &Cluster| {
        let mut space = Space::everything(&workload, cluster);
        space.pp = Allowed::Among(vec![1, 2, 4]);
        search(&workload, cluster, &space, &Options::default()).unwrap()
    };
    let found = plan(&cluster);
    println!(
        "{} on {}: {:?}",
        found.best.mapping, found.placed, found.certificate
    );
    let alone = plan(&Cluster::preset("h100:16").unwrap());
    assert!(found.best.estimate.step_s < alone.best.estimate.step_s);
    let mapping = &found.best.mapping;
    assert!(mapping.pp > 1, "{mapping}");
    let sites = crate::plan::estimate::sites::Sites::new(&found.placed, mapping);
    let layers = |device: &str| -> usize {
        let stages = found.best.estimate.stages.iter().enumerate();
        let own = stages.filter(|(idx, _)| sites.of(idx % mapping.pp).device.name == device);
        own.map(|(_, stage)| stage.n_layers).sum()
    };
    assert_eq!(layers("h100") + layers("a100-80"), 32);
    assert!(layers("h100") > layers("a100-80"), "{:?}", mapping.pipeline);
}

#[test]
fn one_slow_link_is_priced_and_steered_around() {
    let workload = llama();
    let healthy = Cluster::preset("h100:32").unwrap();
    let ill = Cluster {
        slow: vec![slow_uplink(1, 0.02)],
        ..healthy.clone()
    };
    let of = |pp: usize| Mapping {
        tp: 8,
        pp,
        sequence_parallel: true,
        ..Mapping::data_parallel(4 / pp, 1, Precision::MIXED_BF16)
    };
    let parts = |pp: usize, cluster: &Cluster| estimate(&workload, &of(pp), cluster).unwrap().parts;
    // Data parallelism over all nodes waits for the slow one; a pipeline only sends to it.
    assert!(parts(1, &ill).dp > 10.0 * parts(1, &healthy).dp);
    assert_eq!(parts(1, &ill).tp, parts(1, &healthy).tp);
    assert_eq!(parts(4, &ill).dp, parts(4, &healthy).dp);
    assert!(parts(4, &ill).p2p > parts(4, &healthy).p2p);
    let plan = |cluster: &Cluster| {
        let space = Space::everything(&workload, cluster);
        search(&workload, cluster, &space, &Options::default()).unwrap()
    };
    let (best, found) = (plan(&healthy), plan(&ill));
    println!(
        "{} on {}: {:?}",
        found.best.mapping, found.placed, found.certificate
    );
    let kept = estimate(&workload, &best.best.mapping, &ill).unwrap();
    // The simulation may put a close runner-up first.
    assert!(found.best.estimate.step_s <= 1.02 * kept.step_s);
    assert!(found.best.estimate.step_s >= best.certificate.lower_bound_s);
}
