//! Layers to stages.
//!
//! Enters: the layers of a model in order with their costs, and where stages lie. Leaves: cuts that
//! make the slowest rank as fast as possible, and the costs of the stages.
//! Invariant: stages are runs of layers in order; none is empty unless that was asked for; no other
//! cut has a faster slowest stage, and among those with one stage a rank none has a smaller sum of
//! squares.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::PipelineError;
use super::builtin::{Placement, Shape};
use super::simulate::StageCosts;

/// What one layer costs for one microbatch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LayerCosts {
    pub name: String,
    pub costs: StageCosts,
    /// Layers of one name here share their weights: embedding and head.
    pub tied: Option<String>,
}

/// How layers may be divided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PartitionOptions {
    pub n_ranks: usize,
    pub n_chunks: usize,
    pub placement: Placement,
    /// Whether stages without layers are wanted (Megatron-LM#1852: never silently).
    pub allow_empty: bool,
}

/// Layers divided into stages.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StagePartition {
    /// Layers of every stage: from the first one up to the first of the next.
    pub layers: Vec<std::ops::Range<usize>>,
    pub stages: Vec<StageCosts>,
    pub stage_rank: Vec<usize>,
    /// Seconds of one microbatch on each rank.
    pub rank_s: Vec<f64>,
    /// Ranks that share the weights of a tied group and reduce their gradients together; none where
    /// one rank has all of it.
    pub tied: BTreeMap<String, Vec<usize>>,
}

/// Divides `layers`. `O(L² S)` for `L` layers and `S` stages, then moves of single layers.
///
/// # Errors
/// [`PipelineError::Invalid`] when there are fewer layers than stages and empty ones are not allowed,
/// or when an explicit placement leaves a rank without a stage.
pub fn partition_layers(
    layers: &[LayerCosts],
    options: &PartitionOptions,
) -> Result<StagePartition, PipelineError> {
    let shape = Shape::new(options.n_ranks, 1).chunks(options.n_chunks);
    shape.check()?;
    let stage_rank = options.placement.stage_rank(&shape);
    if options.placement == Placement::TwoWay {
        return Err(PipelineError::Invalid(
            "layers are divided for one copy of the model; give the placement of copy 0".into(),
        ));
    }
    let n_stages = stage_rank.len();
    if let Some(rank) = stage_rank.iter().find(|rank| **rank >= options.n_ranks) {
        return Err(PipelineError::Invalid(format!(
            "a stage is placed on rank {rank} and there are {} ranks",
            options.n_ranks
        )));
    }
    if let Some(rank) = (0..options.n_ranks).find(|rank| !stage_rank.contains(rank)) {
        return Err(PipelineError::Invalid(format!(
            "rank {rank} of {} has no stage; place one there or take fewer ranks",
            options.n_ranks
        )));
    }
    if layers.len() < n_stages && !options.allow_empty {
        return Err(PipelineError::Invalid(format!(
            "{} layers cannot fill {n_stages} stages; take fewer ranks or chunks, or allow empty stages",
            layers.len()
        )));
    }
    let mut cuts = even_cuts(layers, n_stages, options.allow_empty);
    if n_stages > options.n_ranks {
        balance_ranks(layers, &mut cuts, &stage_rank, options);
    }
    Ok(partition(layers, &cuts, stage_rank, options.n_ranks))
}

fn seconds(costs: &StageCosts) -> f64 {
    costs.forward_s + costs.backward_input_s + costs.backward_weight_s + costs.recompute_s
}

/// Seconds of the layers before each one.
fn prefix(layers: &[LayerCosts]) -> Vec<f64> {
    let mut sums = vec![0.0];
    for layer in layers {
        sums.push(sums.last().copied().unwrap_or(0.0) + seconds(&layer.costs));
    }
    sums
}

/// Cuts (first layer of each stage, and the end) of the fastest slowest stage, then of the least sum
/// of squares. Two dynamic programs over (stage, last layer).
fn even_cuts(layers: &[LayerCosts], n_stages: usize, allow_empty: bool) -> Vec<usize> {
    let n_layers = layers.len();
    let sums = prefix(layers);
    let least = usize::from(!allow_empty);
    let solve = |worst: &dyn Fn(f64, f64) -> f64| -> (f64, Vec<usize>) {
        // best[s][l]: the first l layers in s stages; from[s][l]: where the last of them begins.
        let mut best = vec![vec![f64::INFINITY; n_layers + 1]; n_stages + 1];
        let mut from = vec![vec![0; n_layers + 1]; n_stages + 1];
        best[0][0] = 0.0;
        for stage in 1..=n_stages {
            for end in 0..=n_layers {
                for begin in 0..=end.saturating_sub(least) {
                    if end < begin + least {
                        continue;
                    }
                    let value = worst(best[stage - 1][begin], sums[end] - sums[begin]);
                    if value < best[stage][end] {
                        best[stage][end] = value;
                        from[stage][end] = begin;
                    }
                }
            }
        }
        let mut cuts = vec![n_layers];
        for stage in (1..=n_stages).rev() {
            let end = cuts.last().copied().unwrap_or(0);
            cuts.push(from[stage][end]);
        }
        cuts.reverse();
        (best[n_stages][n_layers], cuts)
    };
    let (slowest_s, _) = solve(&|before, stage_s| before.max(stage_s));
    let limit_s = slowest_s * (1.0 + 1e-12);
    let squares = |before: f64, stage_s: f64| {
        if stage_s > limit_s {
            f64::INFINITY
        } else {
            before + stage_s * stage_s
        }
    };
    solve(&squares).1
}

/// With several stages a rank the rank's sum counts: moves single layers across cuts while that
/// makes the slowest rank faster, or as fast with a faster slowest stage.
fn balance_ranks(
    layers: &[LayerCosts],
    cuts: &mut Vec<usize>,
    stage_rank: &[usize],
    options: &PartitionOptions,
) {
    let sums = prefix(layers);
    let least = usize::from(!options.allow_empty);
    let score = |cuts: &[usize]| {
        let mut rank_s = vec![0.0; options.n_ranks];
        let mut slowest_s: f64 = 0.0;
        for (stage, rank) in stage_rank.iter().enumerate() {
            let stage_s = sums[cuts[stage + 1]] - sums[cuts[stage]];
            rank_s[*rank] += stage_s;
            slowest_s = slowest_s.max(stage_s);
        }
        let squares: f64 = rank_s.iter().map(|rank_s| rank_s * rank_s).sum();
        (rank_s.into_iter().fold(0.0, f64::max), slowest_s, squares)
    };
    let is_less = |a: (f64, f64, f64), b: (f64, f64, f64)| {
        let close = |x: f64, y: f64| (x - y).abs() <= 1e-12 * x.abs().max(y.abs());
        match (close(a.0, b.0), close(a.2, b.2)) {
            (false, _) => a.0 < b.0,
            (true, false) => a.2 < b.2,
            (true, true) => a.1 < b.1 && !close(a.1, b.1),
        }
    };
    let mut best = score(cuts);
    loop {
        let mut found: Option<Vec<usize>> = None;
        // One layer across one cut, or across two cuts in opposite or equal directions.
        let n_cuts = cuts.len() - 1;
        let moves = (1..n_cuts).flat_map(|cut| [(cut, 1i64), (cut, -1)]);
        let moves: Vec<(usize, i64)> = moves.collect();
        let singles = moves.iter().map(|one| vec![*one]);
        let doubles = moves.iter().enumerate();
        let doubles =
            doubles.flat_map(|(nth, one)| moves[nth + 1..].iter().map(move |two| vec![*one, *two]));
        for candidate in singles.chain(doubles) {
            let mut moved = cuts.clone();
            for (cut, by) in &candidate {
                moved[*cut] = (moved[*cut] as i64 + by).max(0) as usize;
            }
            let is_legal = moved.windows(2).all(|pair| pair[0] + least <= pair[1]);
            if is_legal && is_less(score(&moved), best) {
                best = score(&moved);
                found = Some(moved);
            }
        }
        match found {
            Some(moved) => *cuts = moved,
            None => break,
        }
    }
}

fn partition(
    layers: &[LayerCosts],
    cuts: &[usize],
    stage_rank: Vec<usize>,
    n_ranks: usize,
) -> StagePartition {
    let ranges: Vec<std::ops::Range<usize>> =
        cuts.windows(2).map(|pair| pair[0]..pair[1]).collect();
    let stages: Vec<StageCosts> = ranges
        .iter()
        .map(|range| sum(&layers[range.clone()]))
        .collect();
    let mut rank_s = vec![0.0; n_ranks];
    let mut tied: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for ((range, costs), rank) in ranges.iter().zip(&stages).zip(&stage_rank) {
        rank_s[*rank] += seconds(costs);
        for layer in &layers[range.clone()] {
            if let Some(name) = &layer.tied {
                tied.entry(name.clone()).or_default().push(*rank);
            }
        }
    }
    for ranks in tied.values_mut() {
        ranks.sort_unstable();
        ranks.dedup();
        if ranks.len() == 1 {
            ranks.clear();
        }
    }
    StagePartition {
        layers: ranges,
        stages,
        stage_rank,
        rank_s,
        tied,
    }
}

/// The costs of layers that run one after another: a message leaves the last one only.
fn sum(layers: &[LayerCosts]) -> StageCosts {
    let mut total = StageCosts::default();
    for LayerCosts { costs, .. } in layers {
        total.forward_s += costs.forward_s;
        total.backward_input_s += costs.backward_input_s;
        total.backward_weight_s += costs.backward_weight_s;
        total.recompute_s += costs.recompute_s;
        total.p2p_s = costs.p2p_s;
        total.activation_bytes += costs.activation_bytes;
        total.freed_by_input_bytes += costs.freed_by_input_bytes;
        total.checkpoint_bytes += costs.checkpoint_bytes;
        total.weight_bytes += costs.weight_bytes;
    }
    total
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layers(seconds: &[u32]) -> Vec<LayerCosts> {
        let layer = |(nth, seconds): (usize, &u32)| LayerCosts {
            name: format!("layer{nth}"),
            costs: StageCosts {
                forward_s: f64::from(*seconds),
                ..StageCosts::default()
            },
            tied: None,
        };
        seconds.iter().enumerate().map(layer).collect()
    }

    fn options(n_ranks: usize, n_chunks: usize, placement: Placement) -> PartitionOptions {
        PartitionOptions {
            n_ranks,
            n_chunks,
            placement,
            allow_empty: false,
        }
    }

    /// The fastest slowest stage over all cuts.
    fn brute(seconds: &[u32], n_stages: usize) -> u32 {
        if n_stages == 1 {
            return seconds.iter().sum();
        }
        let ends = 1..=seconds.len() + 1 - n_stages;
        let best = ends.map(|end| {
            let head: u32 = seconds[..end].iter().sum();
            head.max(brute(&seconds[end..], n_stages - 1))
        });
        best.min().unwrap()
    }

    proptest! {
        #[test]
        fn no_cut_has_a_faster_slowest_stage(
            seconds in proptest::collection::vec(1u32..20, 1..9),
            n_ranks in 1usize..5,
        ) {
            prop_assume!(seconds.len() >= n_ranks);
            let cut = partition_layers(&layers(&seconds), &options(n_ranks, 1, Placement::Loop)).unwrap();
            let slowest = cut.rank_s.iter().copied().fold(0.0, f64::max);
            prop_assert_eq!(slowest, f64::from(brute(&seconds, n_ranks)));
            prop_assert!(cut.layers.iter().all(|range| !range.is_empty()));
            prop_assert_eq!(cut.layers.last().unwrap().end, seconds.len());
        }
    }

    #[test]
    fn a_heavy_head_gets_a_shorter_stage() {
        // An embedding, eight layers, a head that costs three layers.
        let cut = partition_layers(
            &layers(&[1, 4, 4, 4, 4, 4, 4, 4, 4, 12]),
            &options(4, 1, Placement::Loop),
        )
        .unwrap();
        assert_eq!(cut.layers, [0..3, 3..6, 6..9, 9..10]);
        assert_eq!(cut.rank_s, [9.0, 12.0, 12.0, 12.0]);
    }

    #[test]
    fn tied_weights_meet_on_one_rank_of_a_v() {
        let mut layers = layers(&[1, 4, 4, 4, 4, 4, 4, 3]);
        layers[0].tied = Some("wte".into());
        layers[7].tied = Some("wte".into());
        let v = partition_layers(&layers, &options(2, 2, Placement::V)).unwrap();
        assert!(v.tied["wte"].is_empty());
        let loops = partition_layers(&layers, &options(2, 2, Placement::Loop)).unwrap();
        assert_eq!(loops.tied["wte"], [0, 1]);
    }

    #[test]
    fn empty_stages_are_refused_unless_asked_for() {
        let three = layers(&[1, 1, 1]);
        let refused = partition_layers(&three, &options(4, 1, Placement::Loop)).unwrap_err();
        insta::assert_snapshot!(refused, @"3 layers cannot fill 4 stages; take fewer ranks or chunks, or allow empty stages");
        let allowed = PartitionOptions {
            allow_empty: true,
            ..options(4, 1, Placement::Loop)
        };
        let cut = partition_layers(&three, &allowed).unwrap();
        assert_eq!(
            cut.layers.iter().filter(|range| range.is_empty()).count(),
            1
        );
        let gap = options(3, 1, Placement::Explicit(vec![0, 0, 2]));
        let refused = partition_layers(&three, &gap).unwrap_err();
        insta::assert_snapshot!(refused, @"rank 1 of 3 has no stage; place one there or take fewer ranks");
    }
}
