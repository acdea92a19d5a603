//! Which layers each stage of a pipeline holds.
//!
//! Enters: a workload and a mapping. Leaves: a range of layers a stage, in model order.
//! Invariant: every layer is in exactly one stage; the first stage embeds, the last one predicts.

use std::ops::Range;

use meshweave_dsl::mapping::Mapping;

use super::workload::Workload;

/// The layers of one stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageLayers {
    pub layers: Range<usize>,
    /// Holds the embedding.
    pub embeds: bool,
    /// Holds the final norm, the head and the loss.
    pub predicts: bool,
}

/// The stages of a mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stages {
    stages: Vec<StageLayers>,
    pp: usize,
    is_v: bool,
}

impl Stages {
    /// The stages that the mapping lists; else equal ones; else such that the embedding, the head and
    /// every prediction layer count as a layer (Megatron-Core's `account_for_embedding_in_pipeline_split`
    /// and `account_for_loss_in_pipeline_split`).
    pub fn new(workload: &Workload, mapping: &Mapping) -> Self {
        let n_stages = mapping.n_stages().max(1);
        let n_layers = workload.model.n_layers;
        let slots = n_layers + 2 + workload.prediction_layers;
        let even = |stage: usize| {
            if n_layers.is_multiple_of(n_stages) {
                return n_layers / n_stages;
            }
            slots / n_stages + usize::from(stage < slots % n_stages)
        };
        let mut next = 0;
        let stages = (0..n_stages)
            .map(|stage| {
                let count = match &mapping.pipeline.layers {
                    Some(layers) => layers.get(stage).copied().unwrap_or(0),
                    None if n_layers.is_multiple_of(n_stages) => even(stage),
                    None => even(stage).saturating_sub(usize::from(stage == 0)),
                };
                let first = next;
                next = (first + count).min(n_layers);
                if stage + 1 == n_stages {
                    next = n_layers;
                }
                StageLayers {
                    layers: first..next,
                    embeds: stage == 0,
                    predicts: stage + 1 == n_stages,
                }
            })
            .collect();
        Self {
            stages,
            pp: mapping.pp,
            is_v: places_in_a_v(&mapping.pipeline.schedule),
        }
    }

    /// All stages, in model order.
    pub fn all(&self) -> &[StageLayers] {
        &self.stages
    }

    /// A stage; the last one beyond the end.
    pub fn get(&self, stage: usize) -> &StageLayers {
        &self.stages[stage.min(self.stages.len() - 1)]
    }

    /// The pipeline rank that runs a stage.
    pub fn rank_of(&self, stage: usize) -> usize {
        let (chunk, place) = (stage / self.pp, stage % self.pp);
        if self.is_v && chunk % 2 == 1 {
            self.pp - 1 - place
        } else {
            place
        }
    }

    /// Layers of a pipeline rank, those that predict further tokens included.
    pub fn n_layers_of(&self, pipeline_rank: usize, workload: &Workload) -> usize {
        let own = self.stages.iter().enumerate();
        own.filter(|(stage, _)| self.rank_of(*stage) == pipeline_rank)
            .map(|(_, stage)| {
                let ahead = if stage.predicts {
                    workload.prediction_layers
                } else {
                    0
                };
                stage.layers.len() + ahead
            })
            .sum()
    }

    /// The stage that a pipeline rank runs as its so-manieth chunk.
    pub fn stage_of(&self, pipeline_rank: usize, chunk: usize) -> usize {
        if self.is_v && chunk % 2 == 1 {
            chunk * self.pp + self.pp - 1 - pipeline_rank
        } else {
            chunk * self.pp + pipeline_rank
        }
    }
}

/// Schedules whose second chunks run back from the last rank to the first.
fn places_in_a_v(schedule: &str) -> bool {
    ["zb-v", "dualpipe-v", "v-half", "v-min"].contains(&schedule)
}
