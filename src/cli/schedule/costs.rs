//! What stages cost, as arguments say it.

use std::fmt::Write;

use clap::{Args, ValueEnum};
use meshweave_compiler::schedule::{
    Contention, Costs, LayerCosts, PartitionOptions, Placement, StageCosts, StagePartition,
    partition_layers,
};

use super::{invalid, pipeline_error};
use crate::error::Result;

/// What stages cost.
#[derive(Debug, Args)]
pub(super) struct CostArgs {
    /// Seconds of forward, input gradient and weight gradient of one rank's microbatch, as F:I:W.
    #[arg(long, default_value = "1:1:1", value_name = "F:I:W")]
    costs: String,
    /// Relative costs of the stages, separated by commas, such as `0.8,1,1,1.4`; even where absent.
    #[arg(long, value_name = "A,B,…")]
    stages: Option<String>,
    /// Relative costs of the model's layers, such as `0.3,1*32,1.5`: stages are cut between them so
    /// that the slowest rank is as fast as can be.
    #[arg(long, value_name = "A,B*N,…", conflicts_with = "stages")]
    layers: Option<String>,
    /// Layers that share their weights, such as embedding and head: `0,33`.
    #[arg(
        long,
        value_delimiter = ',',
        requires = "layers",
        value_name = "LAYER,…"
    )]
    tied: Vec<usize>,
    /// Allow stages without layers.
    #[arg(long, requires = "layers")]
    empty: bool,
    /// Seconds that the activations of a rank's microbatch take between two ranks.
    #[arg(long, default_value_t = 0.0)]
    p2p: f64,
    /// Seconds from the end of a message on its link to its arrival.
    #[arg(long, default_value_t = 0.0)]
    latency: f64,
    /// Which messages share a link.
    #[arg(long, value_enum, default_value_t = Links::Direction)]
    links: Links,
    /// Wait for all ranks at the end, as clipping by the global gradient norm does.
    #[arg(long)]
    pub(super) barrier: bool,
}

/// [`Contention`] on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Links {
    /// Every message has a link of its own.
    None,
    /// Those of one direction between two ranks.
    Direction,
    /// Those of both directions between two ranks.
    Pair,
    /// All that leave a rank.
    Sender,
}

impl CostArgs {
    /// Costs of stages on these ranks: even, as listed, or of the layers that each gets.
    pub(super) fn of(&self, stage_rank: &[usize], n_ranks: usize) -> Result<Costs> {
        let n_stages = stage_rank.len();
        let [f, i, w] = three(&self.costs)?;
        let mut costs = Costs::even(n_ranks, n_stages, f, i, w);
        if let Some(shares) = &self.stages {
            let shares: Vec<f64> = shares.split(',').map(seconds).collect::<Result<_>>()?;
            if !n_stages.is_multiple_of(shares.len()) {
                return Err(invalid(format!(
                    "{} relative costs are listed and there are {n_stages} stages; list one for each, or \
                     a number that divides them",
                    shares.len()
                )));
            }
            // A coarse list is refined: each entry stands for neighboring stages.
            let repeat = n_stages / shares.len();
            for (stage_idx, stage) in costs.stages.iter_mut().enumerate() {
                let share = shares[stage_idx / repeat];
                stage.forward_s *= share;
                stage.backward_input_s *= share;
                stage.backward_weight_s *= share;
            }
        }
        if let Some(division) = self.division(stage_rank, n_ranks)? {
            costs.stages = division.stages;
        }
        for stage in &mut costs.stages {
            stage.p2p_s = self.p2p;
        }
        costs.latency_s = self.latency;
        costs.contention = match self.links {
            Links::None => Contention::None,
            Links::Direction => Contention::Direction,
            Links::Pair => Contention::Pair,
            Links::Sender => Contention::Sender,
        };
        costs.barrier = self.barrier;
        Ok(costs)
    }

    /// Which layers each stage gets, where layers are listed: the mean rank takes F:I:W.
    pub(super) fn division(
        &self,
        stage_rank: &[usize],
        n_ranks: usize,
    ) -> Result<Option<StagePartition>> {
        let Some(layers) = &self.layers else {
            return Ok(None);
        };
        let [f, i, w] = three(&self.costs)?;
        let mut shares = Vec::new();
        for entry in layers.split(',') {
            let (share, n) = match entry.split_once('*') {
                Some((share, n)) => (share, n.trim().parse().ok()),
                None => (entry, Some(1)),
            };
            let n = n.filter(|n| (1..=MAX_LAYERS).contains(n)).ok_or_else(|| {
                invalid(format!(
                    "`{entry}` is no number of layers; write such as `1*32`"
                ))
            })?;
            shares.extend(vec![seconds(share)?; n]);
        }
        if let Some(layer) = self.tied.iter().find(|layer| **layer >= shares.len()) {
            return Err(invalid(format!(
                "layer {layer} is tied and there are {}; they count from 0",
                shares.len()
            )));
        }
        let mean = shares.iter().sum::<f64>() / n_ranks as f64;
        let layers: Vec<LayerCosts> = shares
            .iter()
            .enumerate()
            .map(|(layer_idx, share)| {
                let share = share / mean.max(f64::MIN_POSITIVE);
                LayerCosts {
                    name: format!("layer {layer_idx}"),
                    costs: StageCosts {
                        forward_s: f * share,
                        backward_input_s: i * share,
                        backward_weight_s: w * share,
                        activation_bytes: share,
                        ..StageCosts::default()
                    },
                    tied: self.tied.contains(&layer_idx).then(|| "tied".into()),
                }
            })
            .collect();
        let options = PartitionOptions {
            n_ranks,
            n_chunks: stage_rank.len().div_ceil(n_ranks.max(1)).max(1),
            placement: Placement::Explicit(stage_rank.to_vec()),
            allow_empty: self.empty,
        };
        let division = partition_layers(&layers, &options).map_err(pipeline_error)?;
        Ok(Some(division))
    }
}

const MAX_LAYERS: usize = 4096;

/// The layers of every stage, and what the slowest rank takes.
pub(super) fn division_text(division: &StagePartition) -> String {
    let mut text = String::from("layers of the stages");
    for (stage_idx, (layers, rank)) in division.layers.iter().zip(&division.stage_rank).enumerate()
    {
        let range = match layers.len() {
            0 => "none".into(),
            1 => layers.start.to_string(),
            _ => format!("{}-{}", layers.start, layers.end - 1),
        };
        let _ = write!(text, "  {stage_idx}: {range} (rank {rank})");
    }
    let slowest_s = division.rank_s.iter().copied().fold(0.0, f64::max);
    let mean_s = division.rank_s.iter().sum::<f64>() / division.rank_s.len().max(1) as f64;
    let _ = writeln!(
        text,
        "\nslowest rank {slowest_s:.3} s a microbatch, mean {mean_s:.3} s (predicted)"
    );
    for ranks in division.tied.values() {
        if ranks.is_empty() {
            text +=
                "tied layers are on one rank: their gradients need no reduction between ranks\n";
        } else {
            let _ = writeln!(
                text,
                "tied layers are on ranks {ranks:?}, which reduce their gradients"
            );
        }
    }
    text
}

/// F:I:W.
pub(super) fn three(text: &str) -> Result<[f64; 3]> {
    let parts: Vec<&str> = text.split(':').collect();
    match parts.as_slice() {
        [f, i, w] => Ok([seconds(f)?, seconds(i)?, seconds(w)?]),
        _ => Err(invalid(format!(
            "`--costs {text}` is not F:I:W; write three numbers such as 1:1.4:0.8"
        ))),
    }
}

fn seconds(text: &str) -> Result<f64> {
    let value: Option<f64> = text.trim().parse().ok();
    value
        .filter(|value| value.is_finite() && *value >= 0.0)
        .ok_or_else(|| invalid(format!("`{text}` is no time; write a number such as 1.4")))
}
