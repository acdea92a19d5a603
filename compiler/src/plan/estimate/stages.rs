//! Which layers each stage of a pipeline holds.
//!
//! Enters: a workload and a mapping. Leaves: a range of layers a stage, in model order.
//! Invariant: every layer is in exactly one stage; the first stage embeds, the last one predicts; a rank
//! runs its stages for all microbatches, or, with two copies of the model, each of two for half of them.

use std::ops::Range;

use meshweave_dsl::mapping::Mapping;

use super::workload::Workload;
use crate::schedule::{Builtin, Placement};

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
    placement: Placement,
}

impl Stages {
    /// The stages that the mapping lists; else equal ones; else such that the embedding, the head and
    /// every prediction layer count as a layer (Megatron-Core's `account_for_embedding_in_pipeline_split`
    /// and `account_for_loss_in_pipeline_split`).
    pub fn new(workload: &Workload, mapping: &Mapping) -> Self {
        let n_layers = workload.model.n_layers;
        Self::divided(n_layers, n_layers + 2 + workload.prediction_layers, mapping)
    }

    /// The stages of so many layers, the ends of the model not counted.
    #[cfg(test)]
    pub fn of_layers(n_layers: usize, mapping: &Mapping) -> Self {
        Self::divided(n_layers, n_layers + 2, mapping)
    }

    fn divided(n_layers: usize, slots: usize, mapping: &Mapping) -> Self {
        let n_stages = mapping.n_stages().max(1);
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
            placement: placement(&mapping.pipeline.schedule),
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

    /// Ranks of the pipeline.
    pub fn n_ranks(&self) -> usize {
        self.pp
    }

    /// The pipeline rank that runs a stage, of two copies the first one's.
    pub fn rank_of(&self, stage: usize) -> usize {
        let (chunk, place) = (stage / self.pp, stage % self.pp);
        if self.placement == Placement::V && chunk % 2 == 1 {
            self.pp - 1 - place
        } else {
            place
        }
    }

    /// Layers of a pipeline rank, those that predict further tokens included; of two copies of the model
    /// the mean, of which a rank runs half of the microbatches each.
    pub fn n_layers_of(&self, pipeline_rank: usize, workload: &Workload) -> usize {
        let own = self.on(pipeline_rank).map(|(stage, part)| {
            let stage = self.get(stage);
            let ahead = if stage.predicts {
                workload.prediction_layers
            } else {
                0
            };
            part * (stage.layers.len() + ahead) as f64
        });
        own.sum::<f64>().ceil() as usize
    }

    /// The stages that a pipeline rank runs, each with the part of the microbatches that it runs there.
    pub fn on(&self, pipeline_rank: usize) -> impl Iterator<Item = (usize, f64)> {
        let (pp, n_stages) = (self.pp, self.stages.len());
        let (is_v, is_two_way) = (
            self.placement == Placement::V,
            self.placement == Placement::TwoWay && self.pp > 1,
        );
        let n_places = if is_two_way { 2 } else { n_stages / pp };
        (0..n_places).map(move |place| {
            let turned = pp - 1 - pipeline_rank;
            match place {
                1 if is_two_way => (turned, 0.5),
                _ if is_two_way => (pipeline_rank, 0.5),
                _ if is_v && place % 2 == 1 => (place * pp + turned, 1.0),
                _ => (place * pp + pipeline_rank, 1.0),
            }
        })
    }

    /// The first stage in model order that a pipeline rank runs.
    pub fn first_on(&self, pipeline_rank: usize) -> usize {
        let stages = self.on(pipeline_rank).map(|(stage, _)| stage);
        stages.min().unwrap_or(0)
    }

    /// Copies of a stage: on so many ranks of a pipeline are its weights.
    pub fn n_copies(&self) -> usize {
        match self.placement {
            Placement::TwoWay if self.pp > 1 => 2,
            _ => 1,
        }
    }
}

/// Where the stages of a schedule lie; those of an unknown one in rounds.
fn placement(schedule: &str) -> Placement {
    Builtin::find(schedule).map_or(Placement::Loop, Builtin::placement)
}
