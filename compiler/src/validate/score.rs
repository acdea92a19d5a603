//! Scores of predictions against measurements.
//!
//! Enters: scored rows. Leaves: the summary of a table, whole and by source.
//! Invariant: every row of the table is counted, priced or not.

use std::collections::BTreeMap;

use serde::Serialize;

/// One row: what the model says and what was measured, in the unit of the table.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ScoredRow {
    pub row_id: String,
    pub source: String,
    pub predicted: Option<f64>,
    pub measured: Option<f64>,
    /// (predicted − measured) / measured; `None` where either is missing or nothing was measured.
    pub error: Option<f64>,
    /// Why there is no prediction.
    pub reason: Option<String>,
    /// What a row is a choice among: rows that differ only in their mapping share it.
    #[serde(skip)]
    pub choice: Option<String>,
}

/// The scores of a set of rows; what does not apply to a table is `None`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Of the absolute error.
    pub median: Option<f64>,
    pub mean: Option<f64>,
    pub p90: Option<f64>,
    /// Rows with a prediction, of all.
    pub priced: usize,
    pub total: usize,
    /// Of `fits`: right answers over answers; right and given, over given, of out of memory; right and
    /// given, over all that ran out of memory.
    pub accuracy: Option<f64>,
    pub precision: Option<f64>,
    pub recall: Option<f64>,
    /// Mean over choices of the measured time of the mapping that is predicted best over that of the
    /// best, less 1.
    pub regret: Option<f64>,
}

impl Summary {
    /// Scores of rows with a quantity: seconds of a step, or bytes.
    pub fn of_errors(rows: &[&ScoredRow]) -> Self {
        let mut errors: Vec<f64> = rows
            .iter()
            .filter_map(|row| row.error.map(f64::abs))
            .collect();
        errors.sort_by(f64::total_cmp);
        let mean = errors.iter().sum::<f64>() / errors.len().max(1) as f64;
        Self {
            median: quantile(&errors, 0.5),
            mean: (!errors.is_empty()).then_some(mean),
            p90: quantile(&errors, 0.9),
            ..Self::counted(rows)
        }
    }

    /// Scores of rows with an answer: 1 fits, 0 runs out of memory.
    pub fn of_answers(rows: &[&ScoredRow]) -> Self {
        let answers: Vec<(bool, bool)> = rows
            .iter()
            .filter_map(|row| Some((row.predicted? < 0.5, row.measured? < 0.5)))
            .collect();
        let count = |wanted: fn(&(bool, bool)) -> bool| {
            answers.iter().filter(|answer| wanted(answer)).count() as f64
        };
        let part = |some: f64, all: f64| (all > 0.0).then(|| some / all);
        let both = count(|(predicted, measured)| *predicted && *measured);
        Self {
            accuracy: part(
                count(|(predicted, measured)| predicted == measured),
                answers.len() as f64,
            ),
            precision: part(both, count(|(predicted, _)| *predicted)),
            recall: part(both, count(|(_, measured)| *measured)),
            ..Self::counted(rows)
        }
    }

    fn counted(rows: &[&ScoredRow]) -> Self {
        Self {
            priced: rows.iter().filter(|row| row.predicted.is_some()).count(),
            total: rows.len(),
            ..Self::default()
        }
    }
}

/// Mean regret over the choices with at least two priced and measured rows.
pub fn regret(rows: &[&ScoredRow]) -> Option<f64> {
    let mut choices: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for row in rows {
        if let (Some(choice), Some(predicted), Some(measured)) =
            (&row.choice, row.predicted, row.measured)
        {
            choices
                .entry(choice)
                .or_default()
                .push((predicted, measured));
        }
    }
    let regrets: Vec<f64> = choices
        .values()
        .filter(|rows| rows.len() > 1)
        .filter_map(|rows| {
            let chosen = rows.iter().min_by(|a, b| a.0.total_cmp(&b.0))?.1;
            let best = rows.iter().map(|row| row.1).min_by(f64::total_cmp)?;
            Some(chosen / best - 1.0)
        })
        .collect();
    (!regrets.is_empty()).then(|| regrets.iter().sum::<f64>() / regrets.len() as f64)
}

/// A quantile of sorted values, between neighbors in proportion.
fn quantile(sorted: &[f64], part: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let place = part * last as f64;
    let (below, above) = (
        sorted[place.floor() as usize],
        sorted[place.ceil() as usize],
    );
    Some(below + (above - below) * place.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(predicted: f64, measured: f64) -> ScoredRow {
        ScoredRow {
            predicted: Some(predicted),
            measured: Some(measured),
            error: Some((predicted - measured) / measured),
            choice: Some("one".into()),
            ..ScoredRow::default()
        }
    }

    #[test]
    fn scores_of_a_few_rows() {
        let rows = [
            row(1.1, 1.0),
            row(1.0, 2.0),
            row(3.0, 3.0),
            ScoredRow::default(),
        ];
        let rows: Vec<&ScoredRow> = rows.iter().collect();
        let summary = Summary::of_errors(&rows);
        assert_eq!((summary.priced, summary.total), (3, 4));
        assert!((summary.median.unwrap() - 0.1).abs() < 1e-12);
        assert!((summary.mean.unwrap() - 0.2).abs() < 1e-12);
        // The model likes the second mapping; it takes twice the best.
        assert!((regret(&rows).unwrap() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn answers_count_what_runs_out() {
        let rows = [row(0.0, 0.0), row(1.0, 0.0), row(1.0, 1.0), row(0.0, 1.0)];
        let summary = Summary::of_answers(&rows.iter().collect::<Vec<_>>());
        assert_eq!(summary.accuracy, Some(0.5));
        assert_eq!((summary.precision, summary.recall), (Some(0.5), Some(0.5)));
    }
}
