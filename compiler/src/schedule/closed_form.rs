//! What a schedule costs by formula: the price that plans are searched with.
//!
//! Enters: a name, a shape and a rank's seconds of F, I and W for one microbatch. Leaves: bubble,
//! peak of activations, copies of the weights, volume of messages.
//! Invariant: a formula is the source's; where it is an approximation, or holds for large M only,
//! the field says so, and the table measures the difference.

use serde::{Deserialize, Serialize};

use super::builtin::{Builtin, Shape, group_of};

/// Seconds of one rank for one microbatch, all its chunks together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankCosts {
    pub forward_s: f64,
    pub input_s: f64,
    pub weight_s: f64,
    /// What an overlapped pair takes, as a share of its two actions.
    pub overlap: f64,
}

impl RankCosts {
    /// Nothing gained by overlap.
    pub fn new(forward_s: f64, input_s: f64, weight_s: f64) -> Self {
        Self {
            forward_s,
            input_s,
            weight_s,
            overlap: 1.0,
        }
    }

    /// Work of a rank for one microbatch.
    pub fn total_s(&self) -> f64 {
        self.forward_s + self.input_s + self.weight_s
    }
}

/// What a pair of a forward and a backward of different microbatches takes, of which `exchange_s` are
/// messages that one of them can send while the other computes: max(work · `slowdown`, exchange),
/// since what is sent takes units from what computes (DeepSeek-V3, arXiv 2412.19437, §3.2.1 and figure
/// 4), or one after the other where that is less.
pub fn pair_s(both_s: f64, exchange_s: f64, slowdown: f64) -> f64 {
    let work_s = both_s - exchange_s;
    (work_s * slowdown).max(exchange_s).min(both_s)
}

/// How exact a formula is at equal stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exactness {
    /// Equal to the simulation.
    Exact,
    /// The source gives it for equal F, I and W, or as an approximation.
    Approximate,
}

/// What a schedule costs by formula.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClosedForm {
    /// What a step takes beyond `M (F + I + W)`, fill and drain included.
    pub bubble_s: f64,
    /// Most activations of a rank, in microbatches of all its chunks.
    pub peak_microbatches: f64,
    /// Copies of the weights on a rank: 2 for two directions.
    pub n_weight_copies: usize,
    /// Versions of the weights kept on the first rank.
    pub n_weight_versions: usize,
    /// Messages a microbatch sends across a boundary of ranks, forward: 1 without chunks.
    pub n_crossings: usize,
    /// Of the bubble; peaks are exact.
    pub bubble_is: Exactness,
}

impl ClosedForm {
    /// The predicted step.
    pub fn step_s(&self, shape: &Shape, costs: &RankCosts) -> f64 {
        shape.n_microbatches as f64 * costs.total_s() + self.bubble_s
    }
}

/// The closed form of a built-in schedule by name; `None` for other names. Constant time.
///
/// Sources: GPipe (Huang et al. 2019, §2.3); 1F1B and interleaved (Narayanan et al. 2021, §2.2);
/// looped BFS (Lamy-Poirier 2023, table 4.1); ZB-H1, ZB-H2 and ZB-V (Qi et al. 2023, tables 1 and 2);
/// V-Half and V-Min (Qi et al. 2024, §4); DualPipe (DeepSeek-V3, table 2) and DualPipeV (its README);
/// Chimera (Li and Hoefler 2021, table 2); PipeDream (Narayanan et al. 2019, §3.3); sliced sequences
/// (Sun et al. 2024; Li et al. 2021): as 1F1B and GPipe, with P + k − 2 slices of warm-up.
pub fn closed_form(name: &str, shape: &Shape, costs: &RankCosts) -> Option<ClosedForm> {
    let builtin = Builtin::find(name)?;
    let shape = builtin.fit(*shape);
    let (p, m) = (shape.n_ranks as f64, shape.n_microbatches as f64);
    let (v, k) = (shape.n_chunks as f64, shape.n_slices as f64);
    let RankCosts {
        forward_s: f,
        input_s: i,
        weight_s: w,
        overlap,
    } = *costs;
    let b = i + w;
    let plain = (p - 1.0) * (f + b);
    // With fewer microbatches than ranks there are fewer weight gradients to fill with, and every
    // further chunk waits for the first microbatch to come round.
    // The fill of forwards is there in any case.
    let fill = (p - 1.0) * f;
    let split = ((p - 1.0) * (f + i) - (p.min(m) - 1.0) * w).max(fill);
    let waits = (v - 1.0) * (p - m).max(0.0);
    use Exactness::{Approximate, Exact};
    let exact_if = |holds: bool| if holds { Exact } else { Approximate };
    let is_same = |a: f64, b: f64| (a - b).abs() <= 1e-9 * a.max(b);
    let is_even = is_same(f, i) && is_same(f, w);
    let (bubble_s, bubble_is) = match builtin {
        Builtin::GPipe | Builtin::OneFOneB | Builtin::PipeDream => (plain, Exact),
        Builtin::LoopedBfs | Builtin::Interleaved => ((plain + waits * (f + b)) / v, Exact),
        Builtin::Seq1f1b | Builtin::TeraPipe => (plain / k, Exact),
        Builtin::ZbH1 => (split, exact_if(w <= i * (1.0 + 1e-9))),
        Builtin::InterleavedZb => (
            (split + waits * (f + i - w)) / v,
            exact_if(w <= i * (1.0 + 1e-9)),
        ),
        // No gap within a rank: what remains is the fill.
        Builtin::ZbH2 => (fill, exact_if(i <= w * (1.0 + 1e-9) && m >= 2.0 * p - 1.0)),
        Builtin::ZbV => (fill / 2.0, exact_if(is_even && m >= p)),
        // Rates, of the work M (F + I + W).
        Builtin::VHalf => (p / 2.0 * costs.total_s(), Approximate),
        Builtin::VMin => (2.0 * p / 3.0 * costs.total_s(), Approximate),
        Builtin::DualPipe => {
            let pair = overlap * (f + b);
            (
                (p / 2.0 - 1.0) * (pair + b - 3.0 * w),
                exact_if(is_same(f, i) && overlap == 1.0),
            )
        }
        Builtin::DualPipeV => {
            let pair = overlap * (f + b);
            (
                (p - 1.0) * (pair + b - 3.0 * w) / 2.0,
                exact_if(is_same(f, i) && overlap == 1.0),
            )
        }
        Builtin::Chimera => (
            (p / 2.0 - 1.0) * (f + b),
            exact_if(is_same(f, b) && m % p == 0.0),
        ),
    };
    // Groups that take turns at the chunks are larger than P where P does not divide M.
    let group = group_of(0, &shape).1 as f64;
    let peak_microbatches = match builtin {
        Builtin::GPipe | Builtin::LoopedBfs | Builtin::TeraPipe => m,
        Builtin::OneFOneB
        | Builtin::ZbH1
        | Builtin::PipeDream
        | Builtin::ZbV
        | Builtin::Chimera => p,
        Builtin::Interleaved => (2.0 * (p - 1.0) + (v - 1.0) * group + 1.0) / v,
        Builtin::InterleavedZb => ((v - 1.0) * group + p) / v,
        Builtin::ZbH2 => 2.0 * p - 1.0,
        Builtin::VHalf => ((p + 2.0) / 2.0).floor(),
        Builtin::VMin => ((p + 4.0) / 3.0).floor(),
        Builtin::DualPipe => p + 1.0,
        Builtin::DualPipeV => p + 0.5,
        Builtin::Seq1f1b => (p - 1.0 + k) / k,
    };
    Some(ClosedForm {
        bubble_s,
        peak_microbatches: peak_microbatches.min(m),
        n_weight_copies: if matches!(builtin, Builtin::DualPipe | Builtin::Chimera) {
            2
        } else {
            1
        },
        n_weight_versions: match builtin {
            Builtin::PipeDream => shape.n_ranks.min(shape.n_microbatches),
            _ => 1,
        },
        n_crossings: shape.n_chunks,
        bubble_is,
    })
}
