//! `meshweave validate`.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use meshweave_compiler::validate::{Kind, Report, ScoredRow, Summary, validate as score};
use meshweave_dsl::diagnostics::Class;

use super::Format;
use crate::cli::output::{out, outln};
use crate::error::{Error, Result};

/// Rows that are listed as the worst.
const N_WORST: usize = 15;

#[derive(Debug, Args)]
pub struct ValidateArgs {
    /// A table of published measurements: training, memory or feasibility.
    table: PathBuf,
    /// List every row.
    #[arg(long)]
    rows: bool,
}

/// Scores the cost model on a table.
pub fn validate(args: &ValidateArgs, format: Format) -> Result<()> {
    let name = args.table.display();
    let text = std::fs::read_to_string(&args.table).map_err(|error| {
        Error::plain(Class::Invalid, format!("`{name}` cannot be read: {error}"))
    })?;
    let report =
        score(&text).map_err(|error| Error::plain(Class::Invalid, format!("`{name}`: {error}")))?;
    match format {
        Format::Text => out!("{}", render(&report, args.rows)),
        Format::Json => outln!("{}", serde_json::json!(report)),
    }
    Ok(())
}

/// The scores by source and over all, the worst rows, and those without a price.
fn render(report: &Report, all_rows: bool) -> String {
    let mut text = String::new();
    let mut line = |content: String| _ = writeln!(text, "{}", content.trim_end());
    let unit = match report.kind {
        Kind::Training => "seconds of a step",
        Kind::Memory => "peak GB",
        Kind::Feasibility => "fits (1) or runs out of memory (0)",
        Kind::Stage => "ms of a pass of one stage for one microbatch",
    };
    line(format!("predicted against measured: {unit}"));
    line(String::new());
    if report.kind == Kind::Feasibility {
        line(format!(
            "{:28} {:>11} {:>9} {:>9} {:>9}",
            "source", "priced", "accuracy", "precision", "recall"
        ));
    } else {
        line(format!(
            "{:28} {:>11} {:>9} {:>9} {:>9} {:>9}",
            "source", "priced", "median", "mean", "P90", "regret"
        ));
    }
    let all = ("all".to_owned(), report.summary.clone());
    for (source, summary) in report.by_source.clone().into_iter().chain([all]) {
        line(summary_line(report.kind, &source, &summary));
    }
    let mut rows: Vec<&ScoredRow> = report
        .rows
        .iter()
        .filter(|row| row.error.is_some())
        .collect();
    rows.sort_by(|a, b| {
        let size = |row: &ScoredRow| row.error.map_or(0.0, f64::abs);
        size(b).total_cmp(&size(a))
    });
    if report.kind != Kind::Feasibility {
        line(String::new());
        line(if all_rows {
            "all rows, worst first".into()
        } else {
            "worst rows".into()
        });
        let n_rows = if all_rows { rows.len() } else { N_WORST };
        for row in rows.iter().take(n_rows) {
            line(format!(
                "  {:10} {:28} predicted {:>10.4} measured {:>10.4} {:>+7.1} %",
                row.row_id,
                row.source,
                row.predicted.unwrap_or(f64::NAN),
                row.measured.unwrap_or(f64::NAN),
                100.0 * row.error.unwrap_or(f64::NAN)
            ));
        }
    }
    let unpriced: Vec<&ScoredRow> = report
        .rows
        .iter()
        .filter(|row| row.reason.is_some())
        .collect();
    if !unpriced.is_empty() {
        line(String::new());
        line(format!("{} rows without a price", unpriced.len()));
        for row in unpriced {
            let reason = row.reason.as_deref().unwrap_or_default();
            line(format!("  {:10} {:28} {reason}", row.row_id, row.source));
        }
    }
    text
}

fn summary_line(kind: Kind, source: &str, summary: &Summary) -> String {
    let part = |value: Option<f64>| {
        value.map_or_else(|| "-".to_owned(), |value| format!("{:.1} %", 100.0 * value))
    };
    let priced = format!("{} of {}", summary.priced, summary.total);
    let columns = if kind == Kind::Feasibility {
        vec![summary.accuracy, summary.precision, summary.recall]
    } else {
        vec![summary.median, summary.mean, summary.p90, summary.regret]
    };
    let columns: String = columns
        .into_iter()
        .map(|value| format!(" {:>9}", part(value)))
        .collect();
    format!("{source:28} {priced:>11}{columns}")
}
