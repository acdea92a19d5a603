//! Validation: the cost model and the memory model against tables of published measurements.
//!
//! Enters: a table of the schema of `data/published/`. Leaves: predicted and measured values of every
//! row, and their scores.
//! Invariant: a row is priced as its source states it; one that cannot be priced says why and is
//! counted. No measured value enters a prediction.

mod cluster;
mod known;
mod layers;
mod mapping;
mod memory;
mod model;
pub mod score;
mod software;
mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::mapping::Mapping;
use serde::Serialize;

pub use score::{ScoredRow, Summary};
pub use table::{Row, Table};

use crate::plan::estimate::{Estimate, Job, Workload, estimate};

/// What a table measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Seconds of a step.
    Training,
    /// Peak memory in GB.
    Memory,
    /// Whether a configuration fits: 1, or runs out of memory: 0.
    Feasibility,
    /// Milliseconds of a pass of one stage for one microbatch.
    Stage,
}

/// The scores of a table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    #[serde(skip)]
    pub kind: Kind,
    pub rows: Vec<ScoredRow>,
    pub summary: Summary,
    #[serde(skip)]
    pub by_source: BTreeMap<String, Summary>,
}

/// Why a table cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValidateError {
    #[error("{0}")]
    Invalid(String),
}

/// Most sequences of a step; a greater batch is given in tokens.
const MAX_BATCH: usize = 100_000;

/// What a row measures, as the model sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    pub workload: Workload,
    pub cluster: Cluster,
    /// The mappings that agree with the row: one, unless it leaves a choice open.
    pub mappings: Vec<Mapping>,
}

impl Case {
    /// Reads a row.
    ///
    /// # Errors
    /// What is missing or contradicts itself.
    pub fn read(row: Row<'_>) -> Result<Self, String> {
        let model = model::model(row)?;
        let cluster = cluster::cluster(row)?;
        let dp = row.count("dp").unwrap_or(1);
        let seq = row.count("seq_len").ok_or("`seq_len` is blank")?;
        let batch = match row.count("global_batch") {
            // No run has so many sequences a step: these are tokens.
            Some(tokens) if tokens > MAX_BATCH && tokens.is_multiple_of(seq) => tokens / seq,
            Some(batch) => batch,
            None => row.count("micro_batch").unwrap_or(1) * dp,
        };
        let workload = Workload {
            prediction_layers: model.prediction_layers,
            window_every: model.window_every,
            software: software::software(row, cluster.device.arch),
            ..Workload::new(model.config, batch, seq, Job::Train)
        };
        let mappings = mapping::mappings(row, &workload)?;
        Ok(Self {
            workload,
            cluster,
            mappings,
        })
    }

    /// The estimate of the fastest mapping that agrees with the row and fits so many times the device's
    /// memory, or of the fastest one where none fits.
    ///
    /// # Errors
    /// Why no mapping has a price.
    pub fn estimate(&self, room: f64) -> Result<(&Mapping, Estimate), String> {
        let mut reason = "no mapping agrees with the row".to_owned();
        let mut best: Option<(&Mapping, Estimate)> = None;
        let room = (room * self.cluster.device.memory_bytes as f64) as u64;
        for mapping in &self.mappings {
            match estimate(&self.workload, mapping, &self.cluster) {
                Ok(found) => {
                    let key = |found: &Estimate| {
                        // Where nothing fits, the prediction errs, and the row is taken at its word.
                        (u8::from(found.memory.total().0 > room), found.step_s)
                    };
                    let is_better = best
                        .as_ref()
                        .is_none_or(|(_, best)| key(&found) < key(best));
                    if is_better {
                        best = Some((mapping, found));
                    }
                }
                Err(error) => reason = error.to_string(),
            }
        }
        best.ok_or(reason)
    }
}

/// Part of the memory that a predicted peak may take before a choice that a row leaves open is given up:
/// the run did fit, and the prediction errs.
const ROOM: f64 = 1.15;

/// Scores a table.
///
/// # Errors
/// A table of none of the known schemas.
pub fn validate(text: &str) -> Result<Report, ValidateError> {
    let table = Table::parse(text);
    let kind = kind(&table)?;
    let rows: Vec<ScoredRow> = table
        .rows()
        .enumerate()
        .map(|(idx, row)| score_row(kind, idx, row))
        .collect();
    let summarize = |rows: &[&ScoredRow]| match kind {
        Kind::Training => Summary {
            regret: score::regret(rows),
            ..Summary::of_errors(rows)
        },
        Kind::Memory | Kind::Stage => Summary::of_errors(rows),
        Kind::Feasibility => Summary::of_answers(rows),
    };
    let mut by_source: BTreeMap<String, Vec<&ScoredRow>> = BTreeMap::new();
    for row in &rows {
        by_source.entry(row.source.clone()).or_default().push(row);
    }
    Ok(Report {
        kind,
        summary: summarize(&rows.iter().collect::<Vec<_>>()),
        by_source: by_source
            .iter()
            .map(|(source, rows)| (source.clone(), summarize(rows)))
            .collect(),
        rows,
    })
}

/// A table is known by its columns.
fn kind(table: &Table) -> Result<Kind, ValidateError> {
    if table.has("step_time_s") {
        Ok(Kind::Training)
    } else if table.has("mem_gb") {
        Ok(Kind::Memory)
    } else if table.has("fits") {
        Ok(Kind::Feasibility)
    } else if table.has("value_ms") {
        Ok(Kind::Stage)
    } else {
        Err(ValidateError::Invalid(
            "the table has none of the columns `step_time_s` (training), `mem_gb` (memory), `fits` (feasibility) and `value_ms` (passes of a stage)".into(),
        ))
    }
}

fn score_row(kind: Kind, idx: usize, row: Row<'_>) -> ScoredRow {
    let row_id = row
        .text("row_id")
        .map_or_else(|| format!("row {}", idx + 1), str::to_owned);
    let measured = match kind {
        Kind::Training => row.number("step_time_s").filter(|seconds| *seconds > 0.0),
        Kind::Memory => memory::measured_gb(row),
        Kind::Feasibility => row.number("fits"),
        Kind::Stage => row.number("value_ms"),
    };
    let predicted = Case::read(row).and_then(|mut case| {
        if kind == Kind::Stage {
            // The stage of a rank, whole.
            case.mappings.retain(|mapping| mapping.pipeline.chunks == 1);
        }
        predict(kind, row, &case)
    });
    let (predicted, reason) = match predicted {
        Ok(predicted) => (Some(predicted), None),
        Err(reason) => (None, Some(reason)),
    };
    ScoredRow {
        row_id,
        source: row.text_or_blank("source").into(),
        error: predicted
            .zip(measured.filter(|measured| *measured > 0.0))
            .map(|(predicted, measured)| (predicted - measured) / measured),
        predicted,
        measured,
        reason,
        choice: choice(row),
    }
}

/// The prediction of a row in the unit of its table.
fn predict(kind: Kind, row: Row<'_>, case: &Case) -> Result<f64, String> {
    let room = match kind {
        Kind::Training => ROOM,
        Kind::Memory | Kind::Feasibility | Kind::Stage => 1.0,
    };
    let (mapping, found) = case.estimate(room)?;
    Ok(match kind {
        Kind::Training => found.step_s,
        Kind::Memory => memory::predicted_gb(row, case, mapping),
        Kind::Feasibility => f64::from(u8::from(found.memory.fits(&case.cluster.device, 0.0))),
        Kind::Stage => 1e3 * pass_s(row, &found)?,
    })
}

/// Seconds of the pass that a row measures, of a stage in the middle: it neither embeds nor predicts.
fn pass_s(row: Row<'_>, found: &Estimate) -> Result<f64, String> {
    let stage = found
        .stages
        .get(found.stages.len() / 2)
        .ok_or("the mapping has no stages")?;
    // Zero Bubble's letters (arXiv 2401.10241): B is the gradient of the input alone.
    match row.text_or_blank("metric").split(' ').next() {
        Some("T_F") => Ok(stage.forward_s),
        Some("T_B") => Ok(stage.backward_input_s),
        Some("T_W") => Ok(stage.backward_weight_s),
        Some("T_comm") => Ok(stage.p2p_s),
        _ => Err(format!(
            "`{}` is no pass of a stage: T_F, T_B, T_W, T_comm",
            row.text_or_blank("metric")
        )),
    }
}

/// What rows must share to be choices of one mapping: source, model, devices, batch, sequence, format.
fn choice(row: Row<'_>) -> Option<String> {
    let columns = [
        "source",
        "model",
        "gpu",
        "gpus",
        "global_batch",
        "seq_len",
        "dtype",
    ];
    let fields: Vec<&str> = columns
        .iter()
        .map(|column| row.text_or_blank(column))
        .collect();
    (!fields[4].is_empty()).then(|| fields.join("|"))
}
