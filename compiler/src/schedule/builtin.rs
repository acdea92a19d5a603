//! The built-in schedules by name, each from its rule.
//!
//! Enters: a name and a shape. Leaves: a checked [`Schedule`].
//! Invariant: nothing here is a table of actions; most rules are order keys, the V family and
//! Chimera are patterns of slots, DualPipe is a sequence of phases.
//!
//! In the keys, slot `t` of a rank holds one forward and what goes with it; `F` of the `k`-th
//! (microbatch, chunk) stands in slot `k`, and a backward stands so many slots behind its index as
//! the rank warms up.

use meshweave_dsl::schedule::{ActionKind, Schedule, Updates};
use serde::{Deserialize, Serialize};

use super::PipelineError;
use super::backfill::{backfill, hasten_drain};
use super::check::check;
use super::deadlock::check_lowered;
use super::dual;
use super::keys::{Slot, sorted};
use super::lower::{Lowering, lower};
use super::patterns::{self, Block};
use super::simulate::Costs;

/// How large a pipeline is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Shape {
    pub n_ranks: usize,
    pub n_microbatches: usize,
    /// Stages of one copy of the model on a rank.
    pub n_chunks: usize,
    /// Parts of every sequence.
    pub n_slices: usize,
}

impl Shape {
    /// One chunk a rank, whole sequences.
    pub fn new(n_ranks: usize, n_microbatches: usize) -> Self {
        Self {
            n_ranks,
            n_microbatches,
            n_chunks: 1,
            n_slices: 1,
        }
    }

    /// The same with so many chunks a rank.
    #[must_use]
    pub fn chunks(self, n_chunks: usize) -> Self {
        Self { n_chunks, ..self }
    }

    /// The same with so many slices a sequence.
    #[must_use]
    pub fn slices(self, n_slices: usize) -> Self {
        Self { n_slices, ..self }
    }

    /// Checks that nothing is zero and that ids fit.
    ///
    /// # Errors
    /// [`PipelineError::Invalid`] that names the count.
    pub fn check(&self) -> Result<(), PipelineError> {
        let counts = [
            ("ranks", self.n_ranks),
            ("microbatches", self.n_microbatches),
            ("chunks", self.n_chunks),
            ("slices", self.n_slices),
        ];
        if let Some((what, _)) = counts.iter().find(|(_, count)| *count == 0) {
            return Err(PipelineError::Invalid(format!(
                "a pipeline with 0 {what} does nothing; give at least 1"
            )));
        }
        let n_units = counts
            .iter()
            .try_fold(1usize, |product, (_, count)| product.checked_mul(*count));
        if n_units.is_none_or(|n_units| n_units > MAX_UNITS) {
            return Err(PipelineError::Invalid(format!(
                "{} ranks × {} microbatches × {} chunks × {} slices are more than {MAX_UNITS} units of \
                 work; take fewer microbatches",
                self.n_ranks, self.n_microbatches, self.n_chunks, self.n_slices
            )));
        }
        Ok(())
    }
}

/// Ids of actions are 32 bits; this leaves room for all kinds of commands.
const MAX_UNITS: usize = 1 << 26;

/// Which rank has which stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Placement {
    /// Stage `s` on rank `s mod P`.
    Loop,
    /// As a loop, every second round backwards: two stages that follow each other share a rank at
    /// the turns.
    V,
    /// Two copies, the second one from the last rank to the first.
    TwoWay,
    /// As listed, a rank for every stage.
    Explicit(Vec<usize>),
}

impl Placement {
    /// The rank of every stage.
    pub fn stage_rank(&self, shape: &Shape) -> Vec<usize> {
        let n_ranks = shape.n_ranks;
        let turned = |stage: usize| n_ranks - 1 - stage % n_ranks;
        match self {
            Self::Loop => (0..n_ranks * shape.n_chunks)
                .map(|stage| stage % n_ranks)
                .collect(),
            Self::V => (0..n_ranks * shape.n_chunks)
                .map(|stage| match stage / n_ranks % 2 {
                    0 => stage % n_ranks,
                    _ => turned(stage),
                })
                .collect(),
            Self::TwoWay => (0..2 * n_ranks)
                .map(|stage| {
                    if stage < n_ranks {
                        stage
                    } else {
                        turned(stage)
                    }
                })
                .collect(),
            Self::Explicit(ranks) => ranks.clone(),
        }
    }
}

/// A built-in schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Builtin {
    GPipe,
    #[serde(rename = "1f1b")]
    OneFOneB,
    LoopedBfs,
    Interleaved,
    ZbH1,
    ZbH2,
    InterleavedZb,
    ZbV,
    VHalf,
    VMin,
    #[serde(rename = "dualpipe")]
    DualPipe,
    #[serde(rename = "dualpipe-v")]
    DualPipeV,
    Chimera,
    #[serde(rename = "pipedream")]
    PipeDream,
    Seq1f1b,
    #[serde(rename = "terapipe")]
    TeraPipe,
}

impl Builtin {
    /// All of them, simple ones first.
    pub const ALL: [Self; 16] = [
        Self::GPipe,
        Self::OneFOneB,
        Self::LoopedBfs,
        Self::Interleaved,
        Self::ZbH1,
        Self::ZbH2,
        Self::InterleavedZb,
        Self::ZbV,
        Self::VHalf,
        Self::VMin,
        Self::DualPipe,
        Self::DualPipeV,
        Self::Chimera,
        Self::PipeDream,
        Self::Seq1f1b,
        Self::TeraPipe,
    ];

    /// The name in the language and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::GPipe => "gpipe",
            Self::OneFOneB => "1f1b",
            Self::LoopedBfs => "looped-bfs",
            Self::Interleaved => "interleaved",
            Self::ZbH1 => "zb-h1",
            Self::ZbH2 => "zb-h2",
            Self::InterleavedZb => "interleaved-zb",
            Self::ZbV => "zb-v",
            Self::VHalf => "v-half",
            Self::VMin => "v-min",
            Self::DualPipe => "dualpipe",
            Self::DualPipeV => "dualpipe-v",
            Self::Chimera => "chimera",
            Self::PipeDream => "pipedream",
            Self::Seq1f1b => "seq1f1b",
            Self::TeraPipe => "terapipe",
        }
    }

    /// The schedule of that name.
    pub fn find(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|builtin| builtin.name() == name)
    }

    /// One line: what it is and where it is from.
    pub fn summary(self) -> &'static str {
        match self {
            Self::GPipe => "all forwards, then all backwards (Huang et al. 2019)",
            Self::OneFOneB => "one forward, one backward (PipeDream-Flush; Narayanan et al. 2021)",
            Self::LoopedBfs => {
                "all microbatches through a chunk before the next chunk (Lamy-Poirier 2023)"
            }
            Self::Interleaved => {
                "1F1B over several chunks a rank (Megatron-LM; Narayanan et al. 2021)"
            }
            Self::ZbH1 => "1F1B with delayed weight gradients, memory of 1F1B (Qi et al. 2023)",
            Self::ZbH2 => "twice the warm-up, no bubble but the fill (Qi et al. 2023)",
            Self::InterleavedZb => "interleaved 1F1B with delayed weight gradients",
            Self::ZbV => {
                "two chunks in a V, no bubble but the fill, memory of 1F1B (Qi et al. 2023)"
            }
            Self::VHalf => "two chunks in a V, half the memory of 1F1B (Qi et al. 2024)",
            Self::VMin => "two chunks in a V, a third of the memory of 1F1B (Qi et al. 2024)",
            Self::DualPipe => "two copies in both directions, overlapped pairs (DeepSeek-V3)",
            Self::DualPipeV => "DualPipe cut in half: two chunks in a V, overlapped pairs",
            Self::Chimera => "two copies in both directions (Li and Hoefler 2021)",
            Self::PipeDream => {
                "1F1B with an update after every microbatch: stale gradients (Harlap et al. 2018)"
            }
            Self::Seq1f1b => "1F1B over slices of sequences (Sun et al. 2024)",
            Self::TeraPipe => "GPipe over slices of sequences (Li et al. 2021)",
        }
    }

    /// Where its stages lie.
    pub fn placement(self) -> Placement {
        match self {
            Self::ZbV | Self::VHalf | Self::VMin | Self::DualPipeV => Placement::V,
            Self::DualPipe | Self::Chimera => Placement::TwoWay,
            _ => Placement::Loop,
        }
    }

    /// Whether the number of chunks can be chosen, or what it must be.
    pub fn fixed_chunks(self) -> Option<usize> {
        match self {
            Self::LoopedBfs | Self::Interleaved | Self::InterleavedZb => None,
            Self::ZbV | Self::VHalf | Self::VMin | Self::DualPipeV => Some(2),
            _ => Some(1),
        }
    }

    /// Whether sequences can be divided.
    pub fn is_sliced(self) -> bool {
        matches!(self, Self::Seq1f1b | Self::TeraPipe)
    }

    /// Whether input and weight gradients are apart.
    pub fn splits_backward(self) -> bool {
        matches!(
            self,
            Self::ZbH1
                | Self::ZbH2
                | Self::InterleavedZb
                | Self::ZbV
                | Self::VHalf
                | Self::VMin
                | Self::DualPipe
                | Self::DualPipeV
        )
    }

    /// Those that a plan chooses among: sequences are whole, and every gradient of a step is one of the
    /// same weights.
    pub fn families() -> impl Iterator<Item = Self> {
        let all = Self::ALL.into_iter();
        all.filter(|builtin| *builtin != Self::PipeDream && !builtin.is_sliced())
    }

    /// Whether forwards run in pairs with backwards of other microbatches, so that the messages of one
    /// travel while the other computes.
    pub fn has_pairs(self) -> bool {
        matches!(self, Self::DualPipe | Self::DualPipeV)
    }

    /// Copies of the model on the ranks of one pipeline.
    pub fn n_copies(self) -> usize {
        match self.placement() {
            Placement::TwoWay => 2,
            _ => 1,
        }
    }

    /// The part of a rank's forwards that run in pairs.
    pub fn paired_part(self, shape: &Shape, rank: usize) -> f64 {
        let n_pairs = match self {
            Self::DualPipe => dual::n_pairs(
                rank.min(shape.n_ranks - 1 - rank),
                shape.n_ranks / 2,
                shape.n_microbatches / 2,
            ),
            Self::DualPipeV => dual::n_pairs(rank, shape.n_ranks, shape.n_microbatches),
            _ => return 0.0,
        };
        let n_forwards = match self {
            Self::DualPipe => shape.n_microbatches,
            _ => 2 * shape.n_microbatches,
        };
        n_pairs as f64 / n_forwards as f64
    }

    /// Checks that the rule is defined for a shape.
    ///
    /// # Errors
    /// [`PipelineError::Invalid`] that names the count, and what would do.
    pub fn fits(self, shape: &Shape) -> Result<(), PipelineError> {
        let name = self.name();
        if let Some(n_chunks) = self.fixed_chunks()
            && n_chunks != shape.n_chunks
        {
            return Err(PipelineError::Invalid(format!(
                "`{name}` has {n_chunks} chunks a rank and {} are asked for; leave the number out, or \
                 take `interleaved`",
                shape.n_chunks
            )));
        }
        if shape.n_slices > 1 && !self.is_sliced() {
            return Err(PipelineError::Invalid(format!(
                "`{name}` takes whole sequences and {} slices are asked for; take `seq1f1b`",
                shape.n_slices
            )));
        }
        if self.placement() == Placement::TwoWay {
            patterns::two_way(shape, name)?;
        }
        if self.has_pairs() {
            dual::enough(shape, name)?;
        }
        Ok(())
    }

    /// The shape with the chunks and slices that this schedule has, where it leaves no choice.
    #[must_use]
    pub fn fit(self, shape: Shape) -> Shape {
        Shape {
            n_chunks: self.fixed_chunks().unwrap_or(shape.n_chunks),
            n_slices: if self.is_sliced() { shape.n_slices } else { 1 },
            ..shape
        }
    }

    /// The order of the rule at equal costs, before any check.
    fn order(self, shape: &Shape) -> Result<Schedule, PipelineError> {
        use ActionKind::{B, F, I, W};
        let p = shape.n_ranks as i64;
        let (v, k) = (shape.n_chunks as i64, shape.n_slices as i64);
        let name = self.name();
        let by = |kinds: &[ActionKind], key: &dyn Fn(&Slot) -> [i64; 3]| {
            sorted(name, shape, &Placement::Loop, kinds, key)
        };
        // The index of a chunk's microbatch where groups of P microbatches take turns at the chunks
        // (Narayanan et al. 2021, figure 4).
        let nth = |slot: &Slot, chunk: i64| {
            let (first, n_group) = group_of(slot.microbatch, shape);
            first * v + chunk * n_group + slot.microbatch - first
        };
        // Slots by which the backward of the last chunk's first microbatch follows its forward index.
        let ahead = (v - 1) * group_of(0, shape).1;
        let schedule = match self {
            Self::GPipe => by(&[F, B], &|s| [i64::from(s.kind == B), s.microbatch, 0]),
            Self::OneFOneB | Self::PipeDream => by(&[F, B], &|s| match s.kind {
                F => [s.microbatch, 1, 0],
                _ => [s.microbatch + p - s.rank, 0, 0],
            }),
            Self::LoopedBfs => by(&[F, B], &|s| match s.kind {
                F => [0, s.chunk, s.microbatch],
                _ => [1, v - 1 - s.chunk, s.microbatch],
            }),
            Self::Interleaved => by(&[F, B], &|s| match s.kind {
                F => [nth(s, s.chunk), 0, 0],
                _ => [nth(s, v - 1 - s.chunk) + 2 * (p - s.rank - 1) + ahead, 1, 0],
            }),
            // Weight gradients wait for `r` more input gradients on rank r: as many microbatches are
            // held as on rank 0.
            Self::ZbH1 | Self::InterleavedZb => by(&[F, I, W], &|s| match s.kind {
                F => [nth(s, s.chunk), 2, 0],
                I => [nth(s, v - 1 - s.chunk) + ahead + p - s.rank, 0, 0],
                _ => [nth(s, v - 1 - s.chunk) + ahead + p, 1, 0],
            }),
            Self::ZbH2 => by(&[F, I, W], &|s| match s.kind {
                F => [s.microbatch, 2, 0],
                I => [s.microbatch + 2 * (p - s.rank) - 1, 0, 0],
                _ => [s.microbatch + 2 * p - 1, 1, 0],
            }),
            Self::ZbV => patterns::v_rows(name, Block::Full, shape),
            Self::VHalf => patterns::v_rows(name, Block::Half, shape),
            Self::VMin => patterns::v_rows(name, Block::Least, shape),
            Self::DualPipe => dual::dualpipe(shape)?,
            Self::DualPipeV => dual::dualpipe_v(shape)?,
            Self::Chimera => patterns::chimera(shape)?,
            // Slices go forward first to last and backward last to first, so a backward waits for
            // k − 1 more forwards.
            Self::Seq1f1b => by(&[F, B], &|s| match s.kind {
                F => [s.microbatch * k + s.slice, 1, 0],
                _ => [
                    s.microbatch * k + (k - 1 - s.slice) + p - s.rank + k - 1,
                    0,
                    0,
                ],
            }),
            Self::TeraPipe => by(&[F, B], &|s| match s.kind {
                F => [0, s.microbatch, s.slice],
                _ => [1, s.microbatch, k - 1 - s.slice],
            }),
        };
        Ok(match self {
            Self::PipeDream => Schedule {
                updates: Updates::EveryMicrobatch,
                ..schedule
            },
            _ => schedule,
        })
    }
}

/// The group of a microbatch where groups take turns at the chunks: its first microbatch and its
/// size. Groups have P microbatches; where P does not divide M, as many groups as fit share them
/// evenly, since a group smaller than P would wait for itself.
pub(super) fn group_of(microbatch: i64, shape: &Shape) -> (i64, i64) {
    let (p, m) = (shape.n_ranks as i64, shape.n_microbatches as i64);
    let n_groups = (m / p).max(1);
    let (least, n_larger) = (m / n_groups, m % n_groups);
    let in_larger = n_larger * (least + 1);
    if microbatch < in_larger {
        (microbatch / (least + 1) * (least + 1), least + 1)
    } else {
        let nth = (microbatch - in_larger) / least;
        (in_larger + nth * least, least)
    }
}

/// A schedule as its rule gives it, for prices: those who run it take [`build`].
pub(crate) fn unchecked(
    builtin: Builtin,
    shape: &Shape,
    costs: Option<&Costs>,
) -> Result<Schedule, PipelineError> {
    shape.check()?;
    builtin.fits(shape)?;
    let schedule = builtin.order(shape)?;
    if builtin.placement() == Placement::V && builtin != Builtin::DualPipeV {
        let even = Costs::even(shape.n_ranks, schedule.n_stages, 1.0, 1.0, 1.0);
        return backfill(&hasten_drain(&schedule), costs.unwrap_or(&even));
    }
    Ok(schedule)
}

/// Builds a schedule and checks it, deadlocks included. `O(n log n)`.
///
/// Those of the V family are patterns of equal slots; their gaps at both ends are then filled by
/// what `costs` allow (equal ones where none are given), at no more memory than the pattern has.
///
/// # Errors
/// [`PipelineError::Invalid`] when the shape does not fit the rule; [`PipelineError::Internal`] when
/// what was built does not pass the checks.
pub fn build(
    builtin: Builtin,
    shape: &Shape,
    costs: Option<&Costs>,
) -> Result<Schedule, PipelineError> {
    let name = builtin.name();
    let schedule = unchecked(builtin, shape, costs)?;
    let internal = |error: PipelineError| {
        PipelineError::Internal(format!("schedule `{name}` as built is wrong: {error}"))
    };
    check(&schedule).map_err(internal)?;
    let lowered = lower(&schedule, &Lowering::default()).map_err(internal)?;
    check_lowered(&lowered).map_err(internal)?;
    Ok(schedule)
}
