//! Formulas beside simulations, for every built-in schedule over a range of shapes.
//!
//! Enters: shapes. Leaves: rows of one table.
//! Invariant: a row whose formula holds exactly has equal figures, or the table says so; every other
//! row says why the figures differ.

use serde::{Deserialize, Serialize};

use super::PipelineError;
use super::builtin::{Builtin, Shape, build};
use super::closed_form::{Exactness, RankCosts, closed_form};
use super::simulate::{Costs, simulate};

/// One schedule at one shape. Times in units of the forward of a rank's microbatch, peaks in
/// microbatches of a rank's activations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TableRow {
    pub schedule: Builtin,
    pub shape: Shape,
    /// F : I : W of a rank.
    pub costs: [f64; 3],
    /// By formula, as far as there is one at this shape.
    pub formula_bubble: Option<f64>,
    pub formula_peak: Option<f64>,
    /// By simulation; absent where the schedule does not exist at this shape.
    pub simulated_bubble: Option<f64>,
    pub simulated_peak: Option<f64>,
    pub verdict: Verdict,
}

/// How formula and simulation compare.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Both figures are equal.
    Equal,
    /// The formula does not hold here, for this reason.
    Differs(String),
    /// There is no such schedule at this shape.
    Undefined(String),
    /// The formula should hold and does not: a bug.
    Broken,
}

/// Ranks of the table.
pub const RANKS: [usize; 4] = [2, 4, 8, 16];
/// Chunks of the table.
pub const CHUNKS: [usize; 3] = [1, 2, 4];

/// Microbatches of the table for so many ranks: from below P to 8 P.
pub fn microbatches(n_ranks: usize) -> [usize; 6] {
    let p = n_ranks;
    [p / 2, p, p + p / 2, 2 * p, 4 * p, 8 * p]
}

/// F, I and W of equal length.
pub const EQUAL: [f64; 3] = [1.0, 1.0, 1.0];

/// The table of these schedules at F : I : W, over all [`RANKS`], [`microbatches`] and [`CHUNKS`].
/// At equal costs Chimera has F = B instead, as its source takes it.
///
/// # Errors
/// [`PipelineError::Internal`] when a built schedule does not pass the checks.
pub fn table(builtins: &[Builtin], costs: [f64; 3]) -> Result<Vec<TableRow>, PipelineError> {
    let mut rows = Vec::new();
    for builtin in builtins {
        for n_ranks in RANKS {
            for n_microbatches in microbatches(n_ranks) {
                for n_chunks in CHUNKS {
                    if n_chunks > 1 && (builtin.fixed_chunks().is_some() && !builtin.is_sliced()) {
                        continue;
                    }
                    // Sliced schedules divide sequences where others divide ranks.
                    let shape = Shape::new(n_ranks, n_microbatches);
                    let shape = builtin.fit(shape.chunks(n_chunks).slices(n_chunks));
                    rows.push(row(*builtin, shape, costs)?);
                }
            }
        }
    }
    Ok(rows)
}

fn row(builtin: Builtin, shape: Shape, costs: [f64; 3]) -> Result<TableRow, PipelineError> {
    let costs = match builtin {
        Builtin::Chimera if costs == EQUAL => [1.0, 0.5, 0.5],
        _ => costs,
    };
    let mut row = TableRow {
        schedule: builtin,
        shape,
        costs,
        formula_bubble: None,
        formula_peak: None,
        simulated_bubble: None,
        simulated_peak: None,
        verdict: Verdict::Broken,
    };
    let [f, i, w] = costs;
    let even = Costs::even(shape.n_ranks, shape.n_ranks * shape.n_chunks, f, i, w);
    let schedule = match build(builtin, &shape, Some(&even)) {
        Ok(schedule) => schedule,
        Err(PipelineError::Invalid(message)) => {
            row.verdict = Verdict::Undefined(message);
            return Ok(row);
        }
        Err(error) => return Err(error),
    };
    let simulation = simulate(&schedule, &even)?;
    row.simulated_bubble = Some(simulation.bubble_s);
    row.simulated_peak = Some(simulation.peak());
    let Some(form) = closed_form(builtin.name(), &shape, &RankCosts::new(f, i, w)) else {
        return Ok(row);
    };
    row.formula_bubble = Some(form.bubble_s);
    row.formula_peak = Some(form.peak_microbatches);
    let is_equal = (simulation.bubble_s - form.bubble_s).abs() < 1e-6
        && (simulation.peak() - form.peak_microbatches).abs() < 1e-6;
    row.verdict = match (is_equal, form.bubble_is) {
        (true, _) => Verdict::Equal,
        (false, Exactness::Exact) => Verdict::Broken,
        (false, Exactness::Approximate) => Verdict::Differs(reason(builtin, &shape, costs).into()),
    };
    Ok(row)
}

/// Why a formula does not hold where it is approximate.
fn reason(builtin: Builtin, shape: &Shape, costs: [f64; 3]) -> &'static str {
    let (p, m) = (shape.n_ranks, shape.n_microbatches);
    match builtin {
        Builtin::ZbH2 if m + 1 < 2 * p => {
            "fewer than 2P-1 microbatches cannot fill twice the warm-up"
        }
        Builtin::ZbH2 => "the formula takes I at most as long as W; longer ones come late",
        Builtin::ZbV if m < p => {
            "fewer than P microbatches leave gaps that no weight gradient can fill"
        }
        Builtin::VHalf if costs == EQUAL => {
            "the source's rate P/2M is asymptotic; gaps at both ends are backfilled here"
        }
        Builtin::VMin if costs == EQUAL => {
            "the source's rate 2P/3M is asymptotic; gaps at both ends are backfilled here"
        }
        Builtin::ZbV | Builtin::VHalf | Builtin::VMin => {
            "the formula takes F = I = W; slots of unequal length do not close up"
        }
        Builtin::Chimera if !m.is_multiple_of(p) => {
            "a unit of both directions takes P microbatches; the last one is not full"
        }
        Builtin::Chimera => "the formula takes F = B; units of other costs do not close up",
        Builtin::DualPipe | Builtin::DualPipeV => "the formula takes F = I",
        _ => "the formula takes W at most as long as I",
    }
}

/// The table as text, one line a row.
pub fn text(rows: &[TableRow]) -> String {
    let mut text = format!(
        "{:<15} {:>3} {:>4} {:>3} {:>3} {:>9} {:>9} {:>9} {:>8} {:>8}  {}\n",
        "schedule", "P", "M", "v", "k", "F:I:W", "bubble", "bubble", "peak", "peak", ""
    );
    text += &format!(
        "{:<15} {:>3} {:>4} {:>3} {:>3} {:>9} {:>9} {:>9} {:>8} {:>8}  {}\n",
        "", "", "", "", "", "", "formula", "simulated", "formula", "simul.", "verdict"
    );
    for row in rows {
        let figure = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.2}"));
        let verdict = match &row.verdict {
            Verdict::Equal => "=".to_owned(),
            Verdict::Differs(why) => format!("≠ {why}"),
            Verdict::Undefined(why) => {
                format!("undefined: {}", why.lines().next().unwrap_or_default())
            }
            Verdict::Broken => "BROKEN: the formula should hold".to_owned(),
        };
        let [f, i, w] = row.costs;
        text += &format!(
            "{:<15} {:>3} {:>4} {:>3} {:>3} {:>9} {:>9} {:>9} {:>8} {:>8}  {verdict}\n",
            row.schedule.name(),
            row.shape.n_ranks,
            row.shape.n_microbatches,
            row.shape.n_chunks,
            row.shape.n_slices,
            format!("{f}:{i}:{w}"),
            figure(row.formula_bubble),
            figure(row.simulated_bubble),
            figure(row.formula_peak),
            figure(row.simulated_peak),
        );
    }
    text
}
