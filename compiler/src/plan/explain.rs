//! Explanations: why this plan, where its time goes, and what would change it.
//!
//! Enters: a graph, the request and its plan. Leaves: figures for people and machines.
//! Invariant: every what-if is a plan of its own, searched and priced like the one explained.

use crate::storage::stored;
use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::diagnostics::Span;
use meshweave_dsl::graph::Graph;
use meshweave_dsl::layout::Mesh;
use meshweave_dsl::plan::Plan;
use serde::Serialize;

use super::directives::Directives;
use super::price::price_plan;
use super::{PlanRequest, SearchError, SearchOptions, class_name, plan, predicted_s};

/// What can be said about a plan.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    pub predicted_s: f64,
    /// Other meshes with the seconds of their best plans, fastest first.
    pub runners_up: Vec<RunnerUp>,
    /// What costs most, the dearest first; repeated layers together.
    pub costs: Vec<Cost>,
    /// What each statement costs: seconds that a plan without it would save.
    pub statements: Vec<StatementPrice>,
    /// Seconds of the best plan with twice the memory.
    pub with_twice_the_memory_s: f64,
}

/// Another mesh.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunnerUp {
    pub mesh: Mesh,
    pub predicted_s: Option<f64>,
    pub reason: Option<String>,
}

/// One cost of the step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cost {
    /// The op or the tensor, with `layers[*]` for all layers.
    pub name: String,
    pub is_reshard: bool,
    pub seconds: f64,
}

/// The price of one statement.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StatementPrice {
    pub span: Span,
    pub text: String,
    /// Seconds of the best plan without it.
    pub without_s: f64,
}

/// Explains a plan of [`super::search`]. Plans again once for every statement and once for the memory.
///
/// # Errors
/// Those of planning and pricing.
pub fn explain(
    graph: &Graph,
    cluster: &Cluster,
    directives: &Directives,
    options: &SearchOptions,
    explained: &Plan,
) -> Result<Explanation, SearchError> {
    let request = &PlanRequest::new(cluster, directives, options);
    let graph = &*stored(graph, directives.storage);
    let price = price_plan(graph, explained, &request.cluster)?;
    let mut costs: BTreeMap<(String, bool), f64> = BTreeMap::new();
    for ((_, op), seconds) in graph.ops().zip(&price.op_s) {
        let name = class_name(graph.op_name(op));
        *costs.entry((name, false)).or_default() += seconds;
    }
    for (id, seconds) in &price.reshard_s {
        let name = class_name(&graph.tensor(*id).name);
        *costs.entry((name, true)).or_default() += seconds;
    }
    let mut costs: Vec<Cost> = costs
        .into_iter()
        .map(|((name, is_reshard), seconds)| Cost {
            name,
            is_reshard,
            seconds,
        })
        .collect();
    costs.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));

    let certificate = explained.certificate.as_ref();
    let others = certificate.map_or(&[][..], |certificate| &certificate.meshes);
    let runners_up = others.iter().skip(1).map(|result| RunnerUp {
        mesh: result.mesh.clone(),
        predicted_s: result.predicted_s,
        reason: result.reason.clone(),
    });

    // One statement may have made many rules: those that share its place.
    let mut numbers: BTreeMap<(Span, &str), BTreeSet<usize>> = BTreeMap::new();
    for (rule_idx, rule) in directives.rules.iter().enumerate() {
        let place = (rule.span, rule.text.as_str());
        numbers.entry(place).or_default().insert(rule_idx);
    }
    let mut prices = Vec::with_capacity(numbers.len());
    for ((span, text), numbers) in numbers {
        let freed = PlanRequest {
            rules: request.rules.without(&numbers),
            ..request.clone()
        };
        prices.push(StatementPrice {
            span,
            text: text.into(),
            without_s: predicted_s(&plan(graph, &freed)?),
        });
    }
    let roomy = PlanRequest {
        budget_bytes: Some(2.0 * request.budget_bytes()),
        ..request.clone()
    };
    Ok(Explanation {
        predicted_s: price.seconds(),
        runners_up: runners_up.collect(),
        costs,
        statements: prices,
        with_twice_the_memory_s: predicted_s(&plan(graph, &roomy)?),
    })
}
