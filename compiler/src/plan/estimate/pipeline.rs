//! How long a pipeline takes, in closed form.
//!
//! Enters: the passes of every stage for one microbatch, a family of schedules, its shape. Leaves: the
//! rank that sets the pace, what its pairs hide, and the seconds in which it waits.
//! Invariant: a price is never below a rank's work with [`PipelineShape::fill_s`], and no simulation of a
//! schedule of the family is.

use super::stages::Stages;
use crate::schedule::{Builtin, RankCosts, Shape, closed_form, pair_s};

/// Seconds of a stage or of a pipeline rank for one microbatch, all its chunks together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RankWork {
    pub forward_s: f64,
    /// Recomputation included.
    pub backward_input_s: f64,
    pub backward_weight_s: f64,
    /// Of all three, what an exchange between experts takes: another microbatch's work can hide it.
    pub exchange_s: f64,
}

impl RankWork {
    /// All of it.
    pub fn seconds(&self) -> f64 {
        self.forward_s + self.backward_input_s + self.backward_weight_s
    }

    /// This and a part of another.
    #[must_use]
    pub fn and(self, other: Self, part: f64) -> Self {
        Self {
            forward_s: self.forward_s + part * other.forward_s,
            backward_input_s: self.backward_input_s + part * other.backward_input_s,
            backward_weight_s: self.backward_weight_s + part * other.backward_weight_s,
            exchange_s: self.exchange_s + part * other.exchange_s,
        }
    }

    /// What a forward takes less when it runs beside a backward of another microbatch than after it;
    /// see [`pair_s`].
    pub fn saved_by_pair_s(&self, slowdown: f64) -> f64 {
        self.seconds() - pair_s(self.seconds(), self.exchange_s, slowdown)
    }
}

/// A pipeline to be priced.
#[derive(Clone, Copy)]
pub struct PipelineShape<'a> {
    pub family: Builtin,
    pub stages: &'a Stages,
    pub n_microbatches: usize,
    /// By how much a pair's work takes longer for the units that its messages take.
    pub slowdown: f64,
    /// Ranks go on to the next step before the others are done, and check afterwards.
    pub post_validates: bool,
}

/// What a pipeline takes; see [`PipelineShape::time`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PipelineTime {
    /// The rank that has most to do.
    pub pace: usize,
    /// Of its work on a microbatch, what pairs hide on average.
    pub hidden_s: f64,
    /// Seconds of a step that it waits.
    pub wait_s: f64,
}

impl PipelineShape<'_> {
    fn shape(&self) -> Shape {
        let n_ranks = self.stages.n_ranks();
        let n_chunks = self.stages.all().len() / n_ranks.max(1);
        Shape::new(n_ranks, self.n_microbatches).chunks(n_chunks)
    }

    /// The work of every rank on a microbatch.
    pub fn ranks(&self, work: &[RankWork]) -> Vec<RankWork> {
        let of_rank = |rank: usize| {
            let stages = self.stages.on(rank);
            stages.fold(RankWork::default(), |sum, (stage, part)| {
                sum.and(work[stage], part)
            })
        };
        (0..self.stages.n_ranks()).map(of_rank).collect()
    }

    /// The price of the pipeline with such stages: the pace of the busiest rank, and the bubble of
    /// [`closed_form`] at the mean of the other ranks, which for equal stages is the formula itself and
    /// for 1F1B and GPipe the sum over the others.
    ///
    /// With post-validation (Qi et al., arXiv 2401.10241, §4) a step begins while the last one ends,
    /// which hides the fill of schedules that have no other gap: ZB-H2 waits (p − 1)(F + I − 2 W)
    /// (table 1 there), the V not at all.
    pub fn time(&self, work: &[RankWork]) -> PipelineTime {
        let ranks = self.ranks(work);
        if ranks.len() < 2 {
            return PipelineTime::default();
        }
        let shape = self.shape();
        let n_microbatches = self.n_microbatches as f64;
        let hidden: Vec<f64> = (0..ranks.len())
            .map(|rank| {
                let part = self.family.paired_part(&shape, rank);
                part * ranks[rank].saved_by_pair_s(self.slowdown)
            })
            .collect();
        let busy_s = |rank: usize| n_microbatches * (ranks[rank].seconds() - hidden[rank]);
        let pace = (0..ranks.len())
            .max_by(|a, b| busy_s(*a).total_cmp(&busy_s(*b)).then(b.cmp(a)))
            .unwrap_or(0);
        let n_others = (ranks.len() - 1) as f64;
        let others = ranks.iter().enumerate().filter(|(rank, _)| *rank != pace);
        let mean = others.fold(RankWork::default(), |sum, (_, work)| {
            sum.and(*work, 1.0 / n_others)
        });
        let overlap = 1.0 - mean.saved_by_pair_s(self.slowdown) / mean.seconds();
        let costs = RankCosts {
            forward_s: mean.forward_s,
            input_s: mean.backward_input_s,
            weight_s: mean.backward_weight_s,
            overlap: if overlap.is_finite() { overlap } else { 1.0 },
        };
        let formula = closed_form(self.family.name(), &shape, &costs);
        let bubble_s = formula.map_or(0.0, |formula| formula.bubble_s.max(0.0));
        let wait_s = match self.family {
            Builtin::ZbH2 if self.post_validates => {
                let (f, i, w) = (costs.forward_s, costs.input_s, costs.weight_s);
                n_others * (f + i - 2.0 * w).max(0.0)
            }
            Builtin::ZbV if self.post_validates => 0.0,
            _ => {
                let least_s = (0..ranks.len())
                    .map(|rank| busy_s(rank) + self.fill_s(rank, work))
                    .fold(0.0, f64::max);
                bubble_s.max(least_s - busy_s(pace))
            }
        };
        PipelineTime {
            pace,
            hidden_s: hidden[pace],
            wait_s,
        }
    }

    /// Seconds in which a rank cannot work, whatever the order: the first microbatch must come to its
    /// first stage, and where backwards are whole, the gradient of the last one goes on from there.
    pub fn fill_s(&self, rank: usize, work: &[RankWork]) -> f64 {
        let before = &work[..self.stages.first_on(rank)];
        let forward_s: f64 = before.iter().map(|stage| stage.forward_s).sum();
        if self.family.splits_backward() {
            return forward_s;
        }
        let backward = |stage: &RankWork| stage.backward_input_s + stage.backward_weight_s;
        forward_s + before.iter().map(backward).sum::<f64>()
    }
}

/// The same where tokens are generated: a microbatch's next token begins when its last one is there,
/// and nothing drains in between. A round takes as long as the slowest rank's work, or as a microbatch
/// takes through all ranks if there are too few of them to fill the pipeline.
pub fn round_wait_s(n_microbatches: f64, ranks: &[RankWork]) -> PipelineTime {
    let slowest = |a: &usize, b: &usize| ranks[*a].seconds().total_cmp(&ranks[*b].seconds());
    let pace = (0..ranks.len()).max_by(slowest).unwrap_or(0);
    let through: f64 = ranks.iter().map(RankWork::seconds).sum();
    let work = ranks.get(pace).map_or(0.0, RankWork::seconds);
    PipelineTime {
        pace,
        hidden_s: 0.0,
        wait_s: (through - n_microbatches * work).max(0.0),
    }
}

#[cfg(test)]
mod tests {
    use meshweave_dsl::mapping::{Mapping, Pipeline, Precision};
    use proptest::prelude::*;

    use super::*;
    use crate::schedule::{Costs, StageCosts, build, simulate};

    fn mapping(family: Builtin, pp: usize, chunks: usize) -> Mapping {
        Mapping {
            pp,
            pipeline: Pipeline {
                schedule: family.name().into(),
                chunks,
                layers: Some(vec![1; pp * chunks]),
            },
            ..Mapping::data_parallel(1, 1, Precision::MIXED_BF16)
        }
    }

    fn stages(family: Builtin, pp: usize, chunks: usize) -> Stages {
        Stages::of_layers(pp * chunks, &mapping(family, pp, chunks))
    }

    fn chunks_of(family: Builtin, n: usize) -> usize {
        family.fixed_chunks().unwrap_or(n)
    }

    fn work(forward_s: f64, backward_input_s: f64, backward_weight_s: f64) -> RankWork {
        RankWork {
            forward_s,
            backward_input_s,
            backward_weight_s,
            exchange_s: 0.0,
        }
    }

    fn simulated_s(family: Builtin, shape: &Shape, work: &[RankWork]) -> f64 {
        let costs = work.iter().map(|stage| StageCosts {
            forward_s: stage.forward_s,
            backward_input_s: stage.backward_input_s,
            backward_weight_s: stage.backward_weight_s,
            ..StageCosts::default()
        });
        let costs = Costs::of(costs.collect());
        let schedule = build(family, shape, Some(&costs)).unwrap();
        simulate(&schedule, &costs).unwrap().step_s
    }

    fn price_s(shape: &PipelineShape<'_>, work: &[RankWork]) -> (f64, f64) {
        let ranks = shape.ranks(work);
        let time = shape.time(work);
        let n = shape.n_microbatches as f64;
        let least_s = (0..ranks.len())
            .map(|rank| n * ranks[rank].seconds() + shape.fill_s(rank, work))
            .fold(0.0, f64::max);
        (n * ranks[time.pace].seconds() + time.wait_s, least_s)
    }

    #[test]
    fn even_stages_take_what_the_simulation_takes() {
        let (pp, m) = (4, 16);
        for family in Builtin::families() {
            let chunks = chunks_of(family, 2);
            let stages = stages(family, pp, chunks);
            let shape = PipelineShape {
                family,
                stages: &stages,
                n_microbatches: m,
                slowdown: 1.0,
                post_validates: false,
            };
            let work = vec![work(1.0, 1.0, 1.0); pp * chunks];
            let (price_s, _) = price_s(&shape, &work);
            let simulated_s = simulated_s(family, &Shape::new(pp, m).chunks(chunks), &work);
            // The rates of V-Half and V-Min are asymptotic, Chimera's formula takes F = B.
            let tolerance = match family {
                Builtin::VHalf | Builtin::VMin => 0.16,
                Builtin::Chimera => 0.30,
                _ => 1e-9,
            };
            assert!(
                (price_s / simulated_s - 1.0).abs() <= tolerance,
                "{}: {price_s} in closed form, {simulated_s} simulated",
                family.name()
            );
        }
    }

    #[test]
    fn tokens_wait_for_the_ones_before_them() {
        let ranks = [work(1.0, 1.0, 1.0); 4];
        // Tokens of four microbatches fill four ranks; those of one leave three of them idle.
        assert_eq!(round_wait_s(4.0, &ranks).wait_s, 0.0);
        assert_eq!(round_wait_s(1.0, &ranks).wait_s, 9.0);
    }

    #[test]
    fn pairs_hide_the_exchange_under_the_work() {
        let stage = |exchange_s: f64| RankWork {
            exchange_s,
            ..work(1.0 + exchange_s / 2.0, 1.0 + exchange_s / 2.0, 1.0)
        };
        // Three of work and one of exchange: hidden, but for the units that the messages take.
        assert!((stage(1.0).saved_by_pair_s(1.1) - 0.7).abs() < 1e-12);
        // More exchange than work: the work is hidden.
        assert!((stage(5.0).saved_by_pair_s(1.1) - 3.0).abs() < 1e-12);
        // Too little to give units away for.
        assert_eq!(stage(0.2).saved_by_pair_s(1.1), 0.0);
    }

    #[test]
    fn pairs_are_as_many_as_the_rows_have() {
        for (family, pp, m) in [
            (Builtin::DualPipe, 4, 8),
            (Builtin::DualPipe, 8, 24),
            (Builtin::DualPipeV, 3, 9),
            (Builtin::DualPipeV, 4, 8),
        ] {
            let shape = family.fit(Shape::new(pp, m));
            let schedule = build(family, &shape, None).unwrap();
            let n_forwards = if family == Builtin::DualPipe {
                m
            } else {
                2 * m
            };
            for rank in 0..pp {
                let n_pairs = schedule.pairs[rank].len();
                let part = n_pairs as f64 / n_forwards as f64;
                assert_eq!(family.paired_part(&shape, rank), part, "{family:?} {rank}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        /// No schedule of a family, simulated on any stages, is faster than its bound, nor is its price.
        #[test]
        fn no_simulation_beats_the_bound(
            which in 0usize..13, pp in 2usize..5, more in 0usize..9,
            seconds in proptest::collection::vec((0.2..3.0f64, 0.2..3.0f64, 0.1..2.0f64), 12),
        ) {
            let family = Builtin::families().nth(which).unwrap();
            let chunks = chunks_of(family, 3);
            let m = 2 * pp + more;
            let shape = Shape::new(pp, m).chunks(chunks);
            prop_assume!(family.fits(&shape).is_ok());
            let stages = stages(family, pp, chunks);
            let priced = PipelineShape {
                family,
                stages: &stages,
                n_microbatches: m,
                slowdown: 1.0,
                post_validates: false,
            };
            let work: Vec<RankWork> = (0..pp * chunks)
                .map(|stage| work(seconds[stage].0, seconds[stage].1, seconds[stage].2))
                .collect();
            let (price_s, least_s) = price_s(&priced, &work);
            let simulated_s = simulated_s(family, &shape, &work);
            prop_assert!(least_s <= price_s * (1.0 + 1e-9));
            prop_assert!(least_s <= simulated_s * (1.0 + 1e-9), "{least_s} > {simulated_s}");
        }
    }
}
