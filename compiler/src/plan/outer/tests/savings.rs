//! What saves memory, and what it costs.

use super::*;
use crate::plan::outer::bound::SLACK;
use crate::plan::outer::stages::balanced_in_memory;

fn gpt(n_layers: usize, batch: usize) -> Workload {
    let size = GoldenSize {
        n_layers,
        embed: 2048,
        heads: 16,
        ffn: 8192,
        vocab: 32768,
        seq: 2048,
        batch,
    };
    Workload::new(DecoderConfig::golden(&size, None), batch, 2048, Job::Train)
}

fn zero(stage: u8) -> Zero {
    Zero { stage, group: None }
}

#[test]
fn sharded_gradients_cost_a_reduction_a_microbatch() {
    let cluster = Cluster::preset("h100:16").unwrap();
    let step = |batch: usize, stage: u8| {
        let mapping = Mapping {
            zero: zero(stage),
            ..Mapping::data_parallel(16, 1, Precision::MIXED_BF16)
        };
        let found = estimate(&gpt(8, batch), &mapping, &cluster).unwrap();
        (found.parts.dp, found.memory.gradients.0)
    };
    // One microbatch: nothing is accumulated, and stage 2 is stage 1 with less memory.
    assert_eq!(step(16, 1).0, step(16, 2).0);
    assert!(step(16, 2).1 * 15 < step(16, 1).1);
    // Four of them: four reductions, and the parameters are gathered once as ever.
    let (one, four) = (step(16, 2).0, step(64, 2).0);
    assert!(four > 2.0 * one && four < 4.0 * one, "{one} {four}");
    assert_eq!(step(64, 1).0, step(16, 1).0);
}

#[test]
fn offloading_costs_what_the_host_link_cannot_hide() {
    let workload = gpt(8, 8);
    let mut cluster = Cluster::preset("h100:8").unwrap();
    let step = |cluster: &Cluster, activations: f64| {
        let mapping = Mapping {
            offload: Offload {
                optimizer: false,
                activations,
            },
            ..Mapping::data_parallel(8, 1, Precision::MIXED_BF16)
        };
        estimate(&workload, &mapping, cluster)
    };
    let (none, half, all) = (
        step(&cluster, 0.0).unwrap(),
        step(&cluster, 0.5).unwrap(),
        step(&cluster, 1.0).unwrap(),
    );
    assert_eq!(none.parts.offload, 0.0);
    assert!(0.0 < half.parts.offload && half.parts.offload < all.parts.offload);
    assert!(all.memory.activations < half.memory.activations);
    assert!(half.memory.activations < none.memory.activations);
    // A link as fast as can be hides everything; without one there is no price.
    cluster.device.host_bytes_per_s = 1e15;
    assert!(step(&cluster, 1.0).unwrap().parts.offload < 1e-3 * all.parts.offload);
    cluster.device.host_bytes_per_s = 0.0;
    let error = step(&cluster, 1.0).unwrap_err().to_string();
    assert!(error.contains("no link to its host"), "{error}");
}

#[test]
fn first_ranks_compute_more_again() {
    let workload = gpt(16, 64);
    let cluster = Cluster::preset("h100:8").unwrap();
    let base = Mapping {
        pp: 8,
        ..Mapping::data_parallel(1, 2, Precision::MIXED_BF16)
    };
    let mut space = Space {
        pp: Allowed::only(8),
        tp: Allowed::only(1),
        cp: Allowed::only(1),
        schedules: vec!["1f1b".into()],
        n_microbatches: Allowed::only(32),
        maybe_again: BTreeSet::new(),
        offload_optimizer: vec![false],
        offload_activations: vec![0.0],
        cuts: Cuts::Even,
        ..Space::everything(&workload, &cluster)
    };
    // The first rank holds the most microbatches: let it need a little less than it does.
    let whole = memory(&workload, &base, &cluster, 0).total().0;
    let last = memory(&workload, &base, &cluster, 6).total().0;
    space.budget_bytes = last + (whole - last) / 2;
    let found = search(&workload, &cluster, &space, &Options::default()).unwrap();
    let Recompute::LayersByRank(counts) = &found.best.mapping.recompute else {
        panic!("{}", found.best.mapping);
    };
    assert!(counts[0] > 0 && counts[6] == 0, "{counts:?}");
    assert!(counts.is_sorted_by(|a, b| a >= b), "{counts:?}");
    // The same number on every rank is slower.
    let uniform = Mapping {
        recompute: Recompute::Layers(counts[0]),
        ..found.best.mapping.clone()
    };
    let uniform_s = estimate(&workload, &uniform, &cluster).unwrap().step_s;
    assert!(found.best.estimate.step_s < uniform_s);
}

/// All cuts of the layers within the slack.
fn all_cuts(n_layers: usize, n_stages: usize) -> Vec<Vec<usize>> {
    let fewest = (n_layers / n_stages).saturating_sub(SLACK).max(1);
    let most = n_layers.div_ceil(n_stages) + SLACK;
    let mut cuts: Vec<Vec<usize>> = vec![Vec::new()];
    for _ in 0..n_stages {
        cuts = cuts
            .into_iter()
            .flat_map(|cut| {
                (fewest..=most).map(move |count| {
                    let mut cut = cut.clone();
                    cut.push(count);
                    cut
                })
            })
            .collect();
    }
    cuts.retain(|cut| cut.iter().sum::<usize>() == n_layers);
    cuts
}

#[test]
fn cuts_by_memory_are_as_good_as_all_cuts() {
    let cluster = Cluster::preset("h100:4").unwrap();
    let mut n_found = 0;
    for (n_layers, pp, tightness) in [
        (6, 2, 0.2),
        (8, 2, 0.6),
        (8, 4, 0.3),
        (9, 4, 0.5),
        (10, 4, 0.05),
        (12, 4, 0.8),
    ] {
        let workload = gpt(n_layers, 16);
        let base = Mapping {
            pp,
            ..Mapping::data_parallel(1, 2, Precision::MIXED_BF16)
        };
        let mut space = Space::everything(&workload, &cluster);
        let first = |recompute: Recompute| {
            let mapping = Mapping {
                recompute,
                ..base.clone()
            };
            memory(&workload, &mapping, &cluster, 0).total().0
        };
        let (most, least) = (first(Recompute::None), first(Recompute::Full));
        space.budget_bytes = least + ((most - least) as f64 * tightness) as u64;
        let problem = Problem {
            workload: &workload,
            cluster: &cluster,
            space: &space,
        };
        let layers = Layers::default();
        let costs = layers.costs(&problem, key_of(&base));
        // Of every cut the slowest stage, with the fewest layers computed again.
        let slowest = |mapping: &Mapping| {
            let stages = Stages::new(&workload, mapping);
            let of = |rank: usize| {
                let stage = stages.get(rank);
                let count = match mapping.recompute.of_rank(rank) {
                    Recompute::Layers(count) => count as f64,
                    _ => 0.0,
                };
                let own = stage.layers.clone();
                let mut seconds: f64 = costs.layers[own.clone()].iter().sum();
                let again: f64 = costs.again[own.clone()].iter().sum();
                seconds += again * count / own.len() as f64;
                seconds
                    + if stage.embeds { costs.first } else { 0.0 }
                    + if stage.predicts { costs.last } else { 0.0 }
            };
            (0..pp).map(of).fold(0.0, f64::max)
        };
        let mut best = f64::INFINITY;
        for cut in all_cuts(n_layers, pp) {
            for again in upto_each(&cut) {
                let mapping = Mapping {
                    recompute: Recompute::LayersByRank(again),
                    pipeline: Pipeline {
                        layers: Some(cut.clone()),
                        ..base.pipeline.clone()
                    },
                    ..base.clone()
                };
                if worst_bytes(&problem, &mapping) <= space.budget_bytes {
                    best = best.min(slowest(&mapping));
                }
            }
        }
        match balanced_in_memory(&problem, &costs, &base) {
            Some(mapping) => {
                n_found += 1;
                assert!(worst_bytes(&problem, &mapping) <= space.budget_bytes);
                let own = slowest(&mapping);
                assert!((own / best - 1.0).abs() < 1e-9, "{own} {best} {mapping}");
            }
            None => assert!(best.is_infinite(), "{n_layers} {pp} {best}"),
        }
    }
    assert!(n_found > 2);
}

/// All lists with at most so many at each place.
fn upto_each(most: &[usize]) -> Vec<Vec<usize>> {
    let mut found: Vec<Vec<usize>> = vec![Vec::new()];
    for &most in most {
        found = found
            .into_iter()
            .flat_map(|list| {
                (0..=most).map(move |count| {
                    let mut list = list.clone();
                    list.push(count);
                    list
                })
            })
            .collect();
    }
    found
}
