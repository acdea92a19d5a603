//! Pipelined steps: which stage every op belongs to, and the schedule that runs the stages.
//!
//! Enters: cuts of a model and a schedule. Leaves: the division of a training graph into the pieces
//! that the schedule's actions run.
//! Invariant: the graph is that of one microbatch; a piece reads only what pieces before it give, so
//! forward values flow to later stages and gradients to earlier ones.

use serde::{Deserialize, Serialize};

use crate::layout::Mesh;
use crate::name::{Axis, Dim};
use crate::schedule::{Lowered, Schedule};

/// When an op of a training graph runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// `F`, and again in `R`.
    Forward,
    /// `I`, or the first half of `B`: what the stage before waits for.
    InputGradient,
    /// `W`, or the second half of `B`.
    WeightGradient,
    /// Once a step, on sums over all microbatches.
    Update,
}

/// The piece that an op belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct OpPart {
    pub stage: usize,
    pub phase: Phase,
    /// Of the sequence; 0 where sequences are whole, and in updates.
    #[serde(default)]
    pub slice: usize,
}

/// How a microbatch's graph is run as a pipeline. The placements of its ops are those of a plan over
/// [`PipelinePlan::stage_mesh`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PipelinePlan {
    /// All ranks, the pipeline's axis among the axes.
    pub mesh: Mesh,
    /// Its coordinate is the rank of the schedule.
    pub axis: Axis,
    /// The dim of inputs along which the batch is divided into microbatches.
    pub batch: Dim,
    /// One part per op of the microbatch's graph, in its order.
    pub parts: Vec<OpPart>,
    pub schedule: Schedule,
    /// The schedule with its memory actions, where they are written: activations rest outside of the
    /// arena between `OFFLOAD` and `PREFETCH`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lowered: Option<Lowered>,
}

impl PipelinePlan {
    /// The mesh of one stage: all axes but the pipeline's.
    pub fn stage_mesh(&self) -> Mesh {
        let axes = self.mesh.axes().iter();
        Mesh::new(axes.filter(|(axis, _)| *axis != self.axis).cloned())
    }

    /// The rank at `pipeline_rank` along the pipeline and `stage_rank` on the mesh of a stage.
    pub fn rank(&self, pipeline_rank: usize, stage_rank: usize) -> usize {
        let stage_mesh = self.stage_mesh();
        self.mesh.axes().iter().fold(0, |rank, (axis, degree)| {
            let coordinate = if *axis == self.axis {
                pipeline_rank
            } else {
                stage_mesh.coordinate(stage_rank, axis)
            };
            rank * degree + coordinate
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_follow_the_place_of_the_axis() {
        let plan = |axes: [(&str, usize); 3]| PipelinePlan {
            mesh: Mesh::new(axes),
            axis: "pp".into(),
            batch: "batch".into(),
            parts: Vec::new(),
            schedule: Schedule::new("none", 0, Vec::new(), Vec::new()),
            lowered: None,
        };
        let outer = plan([("pp", 2), ("dp", 2), ("tp", 3)]);
        assert_eq!(outer.rank(1, 4), 10);
        let inner = plan([("dp", 2), ("tp", 3), ("pp", 2)]);
        assert_eq!(inner.rank(1, 4), 9);
        let between = plan([("dp", 2), ("pp", 2), ("tp", 3)]);
        let mut ranks: Vec<usize> = (0..2)
            .flat_map(|pipeline| (0..6).map(move |stage| (pipeline, stage)))
            .map(|(pipeline, stage)| between.rank(pipeline, stage))
            .collect();
        assert_eq!(ranks[..6], [0, 1, 2, 6, 7, 8]);
        ranks.sort_unstable();
        assert_eq!(ranks, (0..12).collect::<Vec<_>>());
    }
}
