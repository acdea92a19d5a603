//! Pictures of graphs, plans, programs and runs.
//!
//! Enters: whatever of these there is ([`ReportInput`]). Leaves: one HTML file that needs nothing
//! else, a trace for <https://ui.perfetto.dev>, or a graph in DOT.
//! Invariant: every number says whether it was predicted, measured or proven as a bound, and
//! nothing in a page is loaded from anywhere.

mod charts;
mod data;
mod dot;
mod figures;
mod fold;
mod format;
mod graph_part;
mod grid;
mod grid_part;
mod page;
mod perfetto;
mod plan_part;
mod time_part;

#[cfg(test)]
mod sample;

use serde::{Deserialize, Serialize};

use meshweave_dsl::graph::Graph;
use meshweave_dsl::plan::Plan;
use meshweave_dsl::program::Program;
use meshweave_dsl::timeline::Timeline;

pub use dot::{Folding, dot};
pub use grid::{ActionGrid, GridAction, GridRow, HeldUnit, Lane};
pub use perfetto::perfetto;

/// What a report is made of; every part is optional, and what is absent is left out of the page.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReportInput {
    /// Heading of the page: the plan or the model.
    pub title: String,
    /// One line below it: model, mesh, batch.
    pub subtitle: String,
    /// Key figures besides those that follow from the other parts.
    pub figures: Vec<Figure>,
    /// The global graph.
    pub graph: Option<Graph>,
    pub plan: Option<Plan>,
    /// The plan in the language.
    pub plan_text: Option<String>,
    /// The graph of one rank, with its collectives.
    pub local: Option<Graph>,
    pub program: Option<Program>,
    pub predicted: Option<Timeline>,
    pub measured: Option<Timeline>,
    /// Ranks × time of a pipeline, predicted before measured.
    pub grids: Vec<ActionGrid>,
    /// No plan of this model on this cluster can step faster, in seconds; of a pipeline, none of its
    /// stages under its schedule.
    pub lower_bound_s: Option<f64>,
    /// Loss after each step.
    pub losses: Vec<f64>,
    /// Why this plan: certificate and explanation, as text.
    pub explanation: Option<String>,
}

/// One key figure: a quantity with its values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    pub label: String,
    /// The first one is set in large type.
    pub values: Vec<FigureValue>,
    /// A remark below the values, may be empty.
    pub note: String,
}

/// A value for people, with its unit and where it comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FigureValue {
    pub text: String,
    pub source: FigureSource,
}

/// Where a figure comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FigureSource {
    Predicted,
    Measured,
    Bound,
    /// Counted in the graph or the program: neither a forecast nor a measurement.
    Exact,
}

impl FigureSource {
    /// The word on its badge.
    pub fn label(self) -> &'static str {
        match self {
            Self::Predicted => "predicted",
            Self::Measured => "measured",
            Self::Bound => "bound",
            Self::Exact => "exact",
        }
    }
}

/// One HTML file with everything that `input` has. Linear in the size of the input.
pub fn report(input: &ReportInput) -> String {
    page::page(input)
}
