//! Mappings: how training or serving a model is divided over a cluster, in degrees and choices.
//!
//! Enters: choices of a search, of a user, or of a published table. Leaves: the groups of ranks of
//! every axis, and what each axis does.
//! Invariant: both grids cover the same ranks, `tp·cp·dp·pp = etp·ep·edp·pp`, and have the same
//! pipeline groups (MoE Parallel Folding, arXiv 2504.14960, §3): ranks are numbered with `tp` (or
//! `etp`) innermost and `pp` outermost, as Megatron-Core's order `tp-cp-ep-dp-pp` does.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What a mapping says wrongly.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MappingError {
    #[error("{0}")]
    Invalid(String),
}

/// A complete mapping. All degrees are at least 1; an axis of degree 1 does nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mapping {
    /// Tensor parallelism of attention and dense layers.
    pub tp: usize,
    /// Context parallelism: ranks that share a sequence.
    pub cp: usize,
    /// Data parallelism of attention and dense layers.
    pub dp: usize,
    /// Pipeline ranks.
    pub pp: usize,
    /// Expert parallelism, folded into `tp·cp·dp`.
    pub ep: usize,
    /// Tensor parallelism within an expert, folded likewise.
    pub etp: usize,
    /// Whether activations between the blocks of `tp` are divided along the sequence (Megatron SP).
    pub sequence_parallel: bool,
    pub context: Context,
    pub zero: Zero,
    /// Sequences of a data-parallel rank in one microbatch.
    pub micro_batch: usize,
    pub pipeline: Pipeline,
    pub recompute: Recompute,
    pub offload: Offload,
    pub precision: Precision,
}

/// How the ranks of `cp` exchange keys and values.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Context {
    /// Keys and values are gathered before attention.
    AllGather,
    /// Keys and values travel around a ring while attention runs (Ring Attention).
    #[default]
    Ring,
    /// Heads are exchanged for sequence by `all_to_all` (DeepSpeed Ulysses).
    Ulysses,
}

/// What data-parallel ranks divide among themselves.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Zero {
    /// 0: nothing; 1: optimizer state; 2: gradients too; 3: parameters too (FSDP).
    pub stage: u8,
    /// Ranks that hold one copy between them; all data-parallel ranks where absent.
    pub group: Option<usize>,
}

/// How the layers are cut and in which order the pieces run.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Pipeline {
    /// Name of a schedule, as `schedule` commands know it: `1f1b`, `interleaved`, `zb-h1`…
    pub schedule: String,
    /// Model chunks a pipeline rank (virtual stages).
    pub chunks: usize,
    /// Layers of each of the `pp · chunks` stages in model order; as even as possible where absent.
    pub layers: Option<Vec<usize>>,
}

impl Default for Pipeline {
    fn default() -> Self {
        Self {
            schedule: "1f1b".into(),
            chunks: 1,
            layers: None,
        }
    }
}

/// A part of a layer whose activations can be computed again instead of kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Module {
    /// Scores, softmax and the product with the values.
    CoreAttention,
    /// The up-projections of multi-head latent attention.
    MlaUp,
    Norm,
    /// The dense feed-forward layer, whole.
    Mlp,
    /// The experts, with dispatch and combine.
    Moe,
    /// The activation function within the experts.
    MoeActivation,
}

/// Which activations are computed again in the backward pass.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    #[default]
    None,
    /// These parts of every layer (Korthikanti et al. 2022: selective recomputation).
    Modules(BTreeSet<Module>),
    /// Whole layers; only their inputs are kept.
    Full,
    /// So many whole layers of every pipeline rank, the others none.
    Layers(usize),
    /// So many whole layers of each pipeline rank: the first ones keep more microbatches.
    LayersByRank(Vec<usize>),
}

impl Recompute {
    /// What one pipeline rank does: never `LayersByRank`.
    pub fn of_rank(&self, rank: usize) -> Self {
        match self {
            Self::LayersByRank(counts) => match counts.get(rank) {
                None | Some(0) => Self::None,
                Some(count) => Self::Layers(*count),
            },
            other => other.clone(),
        }
    }
}

/// What rests in host memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Offload {
    /// Optimizer state and its update.
    pub optimizer: bool,
    /// Part of the kept activations, 0 to 1.
    pub activations: f64,
}

/// Number formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Precision {
    pub compute: Compute,
    /// Bytes of a stored parameter (2: bf16, 4: f32).
    pub parameter_bytes: u8,
    /// Bytes of an accumulated gradient.
    pub gradient_bytes: u8,
    /// Bytes of optimizer state a parameter: f32 master copy and two moments are 12.
    pub optimizer_bytes: u8,
}

/// The format of the operands of contractions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    F32,
    Tf32,
    F16,
    Bf16,
    /// 8-bit floats, one scale a tensor or block.
    Fp8,
    /// 8-bit floats with a scale for every 32 elements (OCP MX).
    MxFp8,
    /// 4-bit floats with two levels of scales.
    NvFp4,
}

impl Precision {
    /// bf16 products and parameters, f32 gradients, master copy and moments: Megatron's mixed precision.
    pub const MIXED_BF16: Self = Self {
        compute: Compute::Bf16,
        parameter_bytes: 2,
        gradient_bytes: 4,
        optimizer_bytes: 12,
    };
    /// f32 throughout: two moments beside the parameter.
    pub const F32: Self = Self {
        compute: Compute::F32,
        parameter_bytes: 4,
        gradient_bytes: 4,
        optimizer_bytes: 8,
    };
}

/// An axis of either grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GridAxis {
    Tp,
    Cp,
    Dp,
    Pp,
    Etp,
    Ep,
    Edp,
}

/// The groups of an axis: `size` ranks, `stride` apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AxisGroups {
    pub size: usize,
    pub stride: usize,
}

impl AxisGroups {
    /// The ranks of the group that `rank` is in, ascending.
    pub fn of(self, rank: usize) -> Vec<usize> {
        let block = self.size * self.stride;
        let first = rank / block * block + rank % self.stride;
        (0..self.size)
            .map(|idx| first + idx * self.stride)
            .collect()
    }
}

impl Mapping {
    /// One device, or `dp` of them, and nothing else.
    pub fn data_parallel(dp: usize, micro_batch: usize, precision: Precision) -> Self {
        Self {
            tp: 1,
            cp: 1,
            dp,
            pp: 1,
            ep: 1,
            etp: 1,
            sequence_parallel: false,
            context: Context::default(),
            zero: Zero::default(),
            micro_batch,
            pipeline: Pipeline::default(),
            recompute: Recompute::None,
            offload: Offload::default(),
            precision,
        }
    }

    /// Ranks of the whole mapping.
    pub fn n_ranks(&self) -> usize {
        self.tp * self.cp * self.dp * self.pp
    }

    /// Data parallelism of the experts: `tp·cp·dp / (etp·ep)`.
    pub fn edp(&self) -> usize {
        self.tp * self.cp * self.dp / (self.etp * self.ep).max(1)
    }

    /// Microbatches a step of `batch` sequences takes.
    pub fn n_microbatches(&self, batch: usize) -> usize {
        batch / (self.dp * self.micro_batch).max(1)
    }

    /// Stages of the pipeline, in model order.
    pub fn n_stages(&self) -> usize {
        self.pp * self.pipeline.chunks
    }

    /// Where the groups of an axis lie.
    pub fn groups(&self, axis: GridAxis) -> AxisGroups {
        let (size, stride) = match axis {
            GridAxis::Tp => (self.tp, 1),
            GridAxis::Cp => (self.cp, self.tp),
            GridAxis::Dp => (self.dp, self.tp * self.cp),
            GridAxis::Pp => (self.pp, self.tp * self.cp * self.dp),
            GridAxis::Etp => (self.etp, 1),
            GridAxis::Ep => (self.ep, self.etp),
            GridAxis::Edp => (self.edp(), self.etp * self.ep),
        };
        AxisGroups { size, stride }
    }

    /// Checks what holds for every model: positive degrees, both grids over the same ranks.
    ///
    /// # Errors
    /// The first rule that is broken, with its figures.
    pub fn check(&self) -> Result<(), MappingError> {
        let invalid = |message: String| Err(MappingError::Invalid(message));
        let degrees = [
            ("tp", self.tp),
            ("cp", self.cp),
            ("dp", self.dp),
            ("pp", self.pp),
            ("ep", self.ep),
            ("etp", self.etp),
            ("micro_batch", self.micro_batch),
            ("chunks", self.pipeline.chunks),
        ];
        if let Some((name, _)) = degrees.iter().find(|(_, degree)| *degree == 0) {
            return invalid(format!("{name} is 0; it is at least 1"));
        }
        let (attention, experts) = (self.tp * self.cp * self.dp, self.etp * self.ep);
        if !attention.is_multiple_of(experts) {
            return invalid(format!(
                "etp {} × ep {} = {experts} does not divide the tp {} × cp {} × dp {} = {attention} \
                 ranks of a pipeline stage",
                self.etp, self.ep, self.tp, self.cp, self.dp
            ));
        }
        if let Some(group) = self
            .zero
            .group
            .filter(|group| *group == 0 || !self.dp.is_multiple_of(*group))
        {
            return invalid(format!(
                "a shard group of {group} does not divide dp {}",
                self.dp
            ));
        }
        if let Recompute::LayersByRank(counts) = &self.recompute
            && counts.len() != self.pp
        {
            return invalid(format!(
                "recomputed layers are listed for {} ranks, and pp is {}",
                counts.len(),
                self.pp
            ));
        }
        if let Some(layers) = &self.pipeline.layers
            && layers.len() != self.n_stages()
        {
            return invalid(format!(
                "{} stages are listed and pp {} × {} chunks are {}",
                layers.len(),
                self.pp,
                self.pipeline.chunks,
                self.n_stages()
            ));
        }
        Ok(())
    }
}

impl fmt::Display for Mapping {
    /// One line for people: `tp8 pp4 dp16 · mb1 · interleaved×2 · zero1 · sp`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words: Vec<String> = [
            ("tp", self.tp),
            ("etp", self.etp),
            ("cp", self.cp),
            ("ep", self.ep),
            ("pp", self.pp),
            ("dp", self.dp),
        ]
        .iter()
        .filter(|(name, degree)| {
            *degree > 1 && (*name != "etp" || self.ep > 1 || self.etp != self.tp)
        })
        .map(|(name, degree)| format!("{name}{degree}"))
        .collect();
        if words.is_empty() {
            words.push("1 rank".into());
        }
        words.push(format!("mb{}", self.micro_batch));
        if self.pp > 1 {
            words.push(match self.pipeline.chunks {
                1 => self.pipeline.schedule.clone(),
                chunks => format!("{}×{chunks}", self.pipeline.schedule),
            });
        }
        if self.zero.stage > 0 {
            words.push(format!("zero{}", self.zero.stage));
        }
        if self.sequence_parallel {
            words.push("sp".into());
        }
        match &self.recompute {
            Recompute::None => {}
            Recompute::Modules(_) => words.push("recompute parts".into()),
            Recompute::Full => words.push("recompute full".into()),
            Recompute::Layers(n_layers) => words.push(format!("recompute {n_layers} layers")),
            Recompute::LayersByRank(counts) => words.push(format!(
                "recompute {} to {} layers",
                counts.iter().min().unwrap_or(&0),
                counts.iter().max().unwrap_or(&0)
            )),
        }
        if self.offload.optimizer {
            words.push("offload optimizer".into());
        }
        if self.offload.activations > 0.0 {
            let percent = 100.0 * self.offload.activations;
            words.push(format!("offload {percent:.0} % of activations"));
        }
        f.write_str(&words.join(" · "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mixtral-8x22B on 128 devices as MoE Parallel Folding's Table 3 folds it.
    fn folded() -> Mapping {
        Mapping {
            tp: 2,
            pp: 8,
            ep: 8,
            ..Mapping::data_parallel(8, 1, Precision::MIXED_BF16)
        }
    }

    #[test]
    fn both_grids_cover_the_ranks_with_the_same_pipelines() {
        let mapping = folded();
        assert_eq!((mapping.n_ranks(), mapping.edp()), (128, 2));
        assert_eq!(
            mapping.groups(GridAxis::Ep).of(17),
            (16..24).collect::<Vec<_>>()
        );
        assert_eq!(mapping.groups(GridAxis::Tp).of(17), [16, 17]);
        assert_eq!(mapping.groups(GridAxis::Edp).of(3), [3, 11]);
        assert_eq!(mapping.groups(GridAxis::Pp).of(3)[..3], [3, 19, 35]);
        mapping.check().unwrap();
    }

    #[test]
    fn a_fold_that_does_not_divide_is_refused() {
        let mapping = Mapping { ep: 3, ..folded() };
        assert_eq!(
            mapping.check().unwrap_err().to_string(),
            "etp 1 × ep 3 = 3 does not divide the tp 2 × cp 1 × dp 8 = 16 ranks of a pipeline stage"
        );
    }
}
