//! `meshweave run --calibrate`: what a run says of its cluster, and of the plan.
//!
//! Enters: the program that ran, its document, the measured timeline. Leaves: a cluster file, and both
//! plans' predictions on it.

use std::path::Path;

use meshweave_compiler::calibrate::{Calibration, TERMS, calibrate};
use meshweave_compiler::plan::Solution;
use meshweave_compiler::plan::price::price_plan;
use meshweave_compiler::resolve::print_cluster;
use meshweave_dsl::diagnostics::Class;
use meshweave_dsl::graph::Graph;
use meshweave_dsl::program::Program;
use meshweave_dsl::timeline::Timeline;
use serde_json::{Value, json};

use super::render::seconds;
use super::write_atomically;
use crate::error::{Error, Result};
use crate::session::{Model, Session};

/// The document behind a program.
pub struct Origin {
    pub session: Session,
    pub model: Model,
    pub solution: Solution,
    pub locals: Vec<Graph>,
}

/// What a run says of its cluster.
pub struct Calibrated {
    calibration: Calibration,
    /// Predicted seconds of a step: as planned, of the same plan on the calibrated cluster, of the
    /// best plan on it.
    planned_s: f64,
    kept_s: f64,
    best_s: f64,
    best_mesh: String,
}

/// Calibrates the cluster of the document, and plans anew on it.
///
/// # Errors
/// A request that nothing meets on the calibrated cluster.
pub fn calibrated(origin: &Origin, program: &Program, measured: &Timeline) -> Result<Calibrated> {
    let internal = |error: String| Error::plain(Class::Internal, error);
    let calibration = calibrate(program, &origin.session.request.cluster, measured)
        .map_err(|error| internal(error.to_string()))?;
    let cluster = calibration.cluster.clone();
    let kept = price_plan(&origin.model.graph, &origin.solution.plan, &cluster)
        .map_err(|error| internal(error.to_string()))?;
    let replanned = origin.session.on(cluster).plan(&origin.model)?;
    Ok(Calibrated {
        calibration,
        planned_s: origin.solution.certificate.predicted_s,
        kept_s: kept.seconds(),
        best_s: replanned.certificate.predicted_s,
        best_mesh: replanned.plan.mesh.to_string(),
    })
}

impl Calibrated {
    /// Writes the cluster as a file of the language.
    ///
    /// # Errors
    /// The path cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        write_atomically(path, print_cluster(&self.calibration.cluster).as_bytes())
    }

    /// The terms that the run showed: name, measured over predicted seconds.
    fn terms(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let factors = TERMS.iter().zip(self.calibration.factors);
        factors.filter_map(|(term, factor)| Some((*term, factor?)))
    }

    pub fn json(&self) -> Value {
        let terms: serde_json::Map<_, _> = self
            .terms()
            .map(|(term, factor)| (term.to_string(), json!(factor)))
            .collect();
        json!({
            "measured_over_predicted": terms,
            "predicted_s": {"planned": self.planned_s, "same_plan": self.kept_s, "best_plan": self.best_s},
            "best_mesh": self.best_mesh,
        })
    }

    pub fn text(&self) -> String {
        let terms: Vec<String> = self
            .terms()
            .map(|(term, factor)| format!("{term} ×{factor:.2}"))
            .collect();
        format!(
            "calibrated {} (measured over predicted seconds)\nreplanned  {} with this plan, {} with the best one, {} (predicted; {} as planned)",
            terms.join(", "),
            seconds(self.kept_s),
            seconds(self.best_s),
            self.best_mesh,
            seconds(self.planned_s)
        )
    }
}
