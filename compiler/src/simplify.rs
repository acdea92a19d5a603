//! Simplification of graphs by equality saturation.
//!
//! Enters: a global graph, or the local graphs of all ranks. Leaves: graphs that compute the same
//! and are priced no higher, with the names, sources, outputs, updates and gradients of those that
//! entered.
//! Invariants: what no output, update or gradient needs is gone; ops that stay keep their order;
//! local graphs stay isomorphic, so that collectives keep one order on all ranks. The result is a
//! function of the input: saturation is limited by rounds and nodes, never by time.
//!
//! Local graphs are rewritten together: a node of the e-graph is one op on *all* ranks, and a rule
//! fires only where it fires alike on every rank. The rules are listed in `docs/rewrites.md`.

mod egraph;
mod extract;
mod joint;
mod price;
mod rebuild;
mod rules;

use meshweave_dsl::graph::Graph;

pub use price::Prices;
pub use rules::{RULES, Rule};

use egraph::Saturation;

/// How far to go.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Rounds of rewriting at most.
    pub n_rounds: usize,
    /// No further round is begun once the e-graph has this many nodes per op of the input.
    pub n_nodes_per_op: usize,
    pub prices: Prices,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            n_rounds: 8,
            n_nodes_per_op: 6,
            prices: Prices::default(),
        }
    }
}

/// A graph that could not be simplified.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SimplifyError {
    /// The input breaks an invariant of its type, or a rule does.
    #[error("internal error in simplification: {0}")]
    Internal(String),
}

/// Result of simplification.
pub type Result<T> = std::result::Result<T, SimplifyError>;

/// What a simplification did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Priced seconds of one execution (of the slowest rank, op by op).
    pub before_s: f64,
    pub after_s: f64,
    /// Ops of one rank.
    pub n_ops_before: usize,
    pub n_ops_after: usize,
    /// Rules that changed the e-graph, with the number of equalities each found.
    pub found: Vec<(&'static str, usize)>,
}

/// The graph with equal results and the least price found.
///
/// Rounds × (nodes × rules) for the saturation; extraction is quadratic in the number of places
/// where there is a choice.
///
/// # Errors
/// `Internal` when the graph is not in SSA form or a rewrite changes a type.
pub fn simplify(graph: &Graph, options: &Options) -> Result<Graph> {
    let (mut graphs, _) = simplify_ranks(std::slice::from_ref(graph), options)?;
    graphs
        .pop()
        .ok_or_else(|| SimplifyError::Internal("one graph went in, none came out".into()))
}

/// [`simplify`] for the local graphs of all ranks, rewritten alike, with a report.
///
/// # Errors
/// Those of [`simplify`]; `Internal` also when the graphs are not isomorphic.
pub fn simplify_ranks(graphs: &[Graph], options: &Options) -> Result<(Vec<Graph>, Report)> {
    let Some(first) = graphs.first() else {
        return Ok((Vec::new(), Report::default()));
    };
    let mut saturation = Saturation::new(graphs)?;
    let found = saturation.run(options)?;
    let before_s = saturation.input_price(&options.prices);
    let choice = extract::extract(&saturation, &options.prices)?;
    // The choice is a good one and not always the best: what it would make slower stays as it is.
    let is_better = choice.price_s <= before_s;
    let simplified = if is_better {
        rebuild::rebuild(&saturation, &choice, graphs)?
    } else {
        graphs.to_vec()
    };
    let report = Report {
        before_s,
        after_s: choice.price_s.min(before_s),
        n_ops_before: first.ops.len(),
        n_ops_after: simplified.first().map_or(0, |graph| graph.ops.len()),
        found,
    };
    tracing::debug!(?report, graph = first.name, "simplified");
    Ok((simplified, report))
}

/// Every way that was found to compute one tensor of the graphs, each as the graphs with that one
/// change. The cheapest of them need not be among those that [`simplify_ranks`] would choose: this
/// is for tests that evaluate them all. Quadratic in the size of the graphs.
///
/// # Errors
/// Those of [`simplify_ranks`].
pub fn variants(graphs: &[Graph], options: &Options) -> Result<Vec<Vec<Graph>>> {
    let mut saturation = Saturation::new(graphs)?;
    saturation.run(options)?;
    extract::variants(&saturation, &options.prices)?
        .iter()
        .map(|choice| rebuild::rebuild(&saturation, choice, graphs))
        .collect()
}
