//! Searches for inference: batches that are chosen, and targets of latency.

use super::*;

fn decode(batch: usize) -> Workload {
    Workload::new(
        published("llama-3-8b"),
        batch,
        1024,
        Job::Decode { context: 1536 },
    )
}

fn space(workload: &Workload, cluster: &Cluster, batches: Allowed) -> Space {
    Space {
        batches,
        ..Space::everything(workload, cluster)
    }
}

#[test]
fn an_open_batch_is_as_good_as_the_best_fixed_one() {
    for (preset, most_s, most_first_s) in [
        ("h100:8", None, None),
        ("h100:8", Some(0.012), None),
        ("a100-80:4", Some(0.030), Some(0.060)),
        ("h100:6", None, None),
    ] {
        let cluster = Cluster::preset(preset).unwrap();
        let workload = decode(1);
        let choices = vec![1, 2, 3, 8, 24, 64, 96, 512, 1536, 100_000];
        let open = Space {
            most_s,
            most_first_s,
            ..space(&workload, &cluster, Allowed::Among(choices.clone()))
        };
        let found = search(&workload, &cluster, &open, &Options::default()).unwrap();
        let rates = choices.into_iter().filter_map(|batch| {
            let fixed = Space {
                batches: Allowed::only(batch),
                ..open.clone()
            };
            let found = search(&decode(batch), &cluster, &fixed, &Options::default()).ok()?;
            Some(found.certificate.tokens_per_s)
        });
        let best = rates.fold(0.0, f64::max);
        let own = found.certificate.tokens_per_s;
        assert!((own / best - 1.0).abs() < 1e-9, "{preset}: {own} {best}");
        assert!(found.certificate.most_tokens_per_s >= own * (1.0 - 1e-9));
        assert!(most_s.is_none_or(|most_s| found.best.estimate.step_s <= most_s));
        let first_s = found.certificate.first_token_s.unwrap();
        assert!(most_first_s.is_none_or(|most_s| first_s <= most_s));
    }
}

#[test]
fn a_free_batch_ends_where_the_caches_or_the_target_end() {
    let cluster = Cluster::preset("h100:8").unwrap();
    let workload = decode(1);
    let run = |most_s: Option<f64>| {
        let open = Space {
            most_s,
            ..space(&workload, &cluster, Allowed::Any)
        };
        search(&workload, &cluster, &open, &Options::default()).unwrap()
    };
    let free = run(None);
    // 128 KiB a token of cache, 1,537 tokens, beside at least one copy of 16 GB of weights.
    let budget = 8.0 * free.certificate.budget_bytes as f64;
    let at_most = (budget - 16e9) / (131_072.0 * 1_537.0);
    let batch = free.certificate.batch as f64;
    assert!(
        batch <= at_most && batch > 0.7 * at_most,
        "{batch} {at_most}"
    );
    let fast = run(Some(free.best.estimate.step_s / 3.0));
    assert!(fast.certificate.batch < free.certificate.batch);
    assert!(fast.certificate.tokens_per_s < free.certificate.tokens_per_s);
    assert!(fast.best.estimate.step_s <= free.best.estimate.step_s / 3.0);
    assert_eq!(run(None).best, free.best);
}

#[test]
fn targets_that_nothing_meets_say_what_is_possible() {
    let cluster = Cluster::preset("h100:8").unwrap();
    let workload = decode(1);
    let open = space(&workload, &cluster, Allowed::Any);
    let tokens = Space {
        most_s: Some(1e-4),
        ..open.clone()
    };
    let error = search(&workload, &cluster, &tokens, &Options::default()).unwrap_err();
    assert!(matches!(error, OuterError::Infeasible { .. }), "{error}");
    assert!(error.to_string().contains("100 us are allowed"), "{error}");
    let first = Space {
        most_first_s: Some(1e-4),
        ..open
    };
    let error = search(&workload, &cluster, &first, &Options::default()).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("the first token of a prompt of 1024"),
        "{error}"
    );
}

#[test]
fn generating_is_searched_as_well_as_brute_force() {
    for (n_devices, n_layers, batch) in [(2, 3, 4), (4, 4, 6), (4, 2, 8), (8, 4, 8)] {
        let size = GoldenSize {
            n_layers,
            embed: 1024,
            heads: 8,
            ffn: 4096,
            vocab: 8192,
            seq: 1024,
            batch,
        };
        let model = DecoderConfig::golden(&size, None);
        let workload = Workload::new(model, batch, 1024, Job::Decode { context: 2047 });
        let cluster = Cluster::preset(&format!("h100:{n_devices}")).unwrap();
        let space = Space {
            cuts: Cuts::Even,
            ..Space::everything(&workload, &cluster)
        };
        let problem = Problem {
            workload: &workload,
            cluster: &cluster,
            space: &space,
        };
        let mut best = f64::INFINITY;
        let layers = Layers::default();
        for mapping in all_mappings(&problem) {
            let found = estimate(&workload, &mapping, &cluster).unwrap();
            best = best.min(found.step_s);
            let (grid, key) = (grid_of(&mapping), key_of(&mapping));
            let costs = layers.costs(&problem, key);
            let bound = least_seconds(&problem, grid, &key, &costs)
                .max(least_seconds_of_cut(&problem, &mapping, &costs));
            assert!(bound <= found.step_s * (1.0 + 1e-9), "{mapping}");
        }
        let found = search(&workload, &cluster, &space, &Options::default()).unwrap();
        let own = found.certificate.predicted_s;
        assert!((own / best - 1.0).abs() < 1e-9, "{own} {best}");
    }
}
