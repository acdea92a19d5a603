//! The scores on the published tables: what the documentation says must stay true.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use super::*;

const TRAINING: &str = include_str!("../../../data/published/training.csv");

#[test]
fn step_times_agree_with_published_measurements() {
    let report = validate(TRAINING).unwrap();
    let summary = &report.summary;
    assert_eq!(report.kind, Kind::Training);
    assert!(summary.priced as f64 >= 0.95 * summary.total as f64);
    assert!(summary.median.unwrap() <= 0.08, "{summary:?}");
    assert!(summary.p90.unwrap() <= 0.25, "{summary:?}");
    assert!(summary.regret.unwrap() <= 0.03, "{summary:?}");
    let unpriced = report.rows.iter().filter(|row| row.predicted.is_none());
    assert!(unpriced.into_iter().all(|row| row.reason.is_some()));
}

/// Korthikanti et al. 2022, arXiv 2205.05198, Table 5: the eight runs by which Calculon (Isaev et al.
/// 2023, SC) scores itself, with a mean of 3.65 % and at most 8.87 %.
#[test]
fn runs_with_and_without_recomputation_agree_better_than_calculon_says() {
    let report = validate(include_str!("../../../data/published/recompute.csv")).unwrap();
    assert_eq!((report.summary.priced, report.summary.total), (8, 8));
    assert!(report.summary.mean.unwrap() < 0.0365, "{:?}", report.rows);
    let errors = report.rows.iter().filter_map(|row| row.error);
    assert!(errors.map(f64::abs).fold(0.0, f64::max) < 0.0887);
}

/// Zero Bubble's Table 6: its kernels calibrate those of the A100, its messages nothing.
#[test]
fn passes_of_stages_agree_with_those_they_calibrate() {
    let table = include_str!("../../../data/published/layer_micro.csv");
    let report = validate(table).unwrap();
    assert_eq!(report.kind, Kind::Stage);
    assert_eq!((report.summary.priced, report.summary.total), (30, 30));
    let parsed = Table::parse(table);
    let passes = parsed.rows().zip(&report.rows);
    let passes: Vec<&ScoredRow> = passes
        .filter(|(row, _)| !row.text_or_blank("metric").starts_with("T_comm"))
        .map(|(_, scored)| scored)
        .collect();
    let summary = Summary::of_errors(&passes);
    assert!(summary.median.unwrap() <= 0.10, "{summary:?}");
}

/// Constants are no source's own: without any one source, the others score as well.
#[test]
fn no_source_carries_the_scores() {
    let report = validate(TRAINING).unwrap();
    for source in report.by_source.keys() {
        let others: Vec<&ScoredRow> = report
            .rows
            .iter()
            .filter(|row| row.source != *source)
            .collect();
        let summary = Summary::of_errors(&others);
        assert!(
            summary.median.unwrap() <= 0.09,
            "without {source}: {summary:?}"
        );
        assert!(
            summary.p90.unwrap() <= 0.25,
            "without {source}: {summary:?}"
        );
    }
}

/// MoE Parallel Folding, arXiv 2504.14960, Tables 3 and 4: folding beats the five dimensions in order
/// for all four models.
#[test]
fn folding_is_predicted_to_win_where_it_did() {
    let table = Table::parse(TRAINING);
    let mut runs: BTreeMap<String, [Option<f64>; 2]> = BTreeMap::new();
    for (row, scored) in table.rows().zip(validate(TRAINING).unwrap().rows) {
        if row.text("source") != Some("moe-parallel-folding") {
            continue;
        }
        let columns = ["model", "global_batch", "dtype"];
        let key = columns.map(|column| row.text_or_blank(column)).join(" ");
        let is_folded = row.text_or_blank("source_table").contains("folding");
        // Tokens a second and device, so that runs on more devices compare.
        let n_devices = row.number("gpus").unwrap();
        let cost = scored.predicted.unwrap() * n_devices;
        let slot = &mut runs.entry(key).or_default()[usize::from(is_folded)];
        *slot = Some(slot.map_or(cost, |best: f64| best.min(cost)));
    }
    let pairs: Vec<_> = runs
        .iter()
        .filter_map(|(key, [plain, folded])| Some((key, (*plain)?, (*folded)?)))
        .collect();
    let models: std::collections::BTreeSet<&str> = pairs
        .iter()
        .filter_map(|(key, ..)| key.split(' ').next())
        .collect();
    assert_eq!(models.len(), 4, "{pairs:?}");
    for (key, plain, folded) in pairs {
        assert!(folded < plain, "{key}: folded {folded}, in order {plain}");
    }
}

#[test]
fn odd_rows_are_refused_with_a_reason() {
    let text = "source,model,layers,hidden,heads,seq_len,gpu,gpus,tp,pp,global_batch,step_time_s\n\
        a,m,2,64,4,128,Abacus,8,1,1,8,1\n\
        b,m,,64,4,128,H100,8,1,1,8,1\n\
        c,m,2,64,4,128,H100,8,3,1,8,1\n\
        d,m,2,64,4,128,H100,8,1,1,8,\n\
        e,m,2,64,4,128,H100,8,2,1,8,soon\n";
    let report = validate(text).unwrap();
    let reasons: Vec<_> = report
        .rows
        .iter()
        .map(|row| row.reason.as_deref())
        .collect();
    assert_eq!(reasons[0], Some("the device `Abacus` has no preset"));
    assert_eq!(
        reasons[1],
        Some("`layers` is blank and `m` is not a model known by name")
    );
    assert_eq!(
        reasons[2],
        Some("tp 3 × cp 1 × pp 1 = 3 does not divide 8 devices")
    );
    assert_eq!(&reasons[3..], [None, None]);
    assert_eq!(
        (report.rows[3].measured, report.rows[4].measured),
        (None, None)
    );
    assert_eq!((report.summary.priced, report.summary.total), (2, 5));
}
