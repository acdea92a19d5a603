//! `meshweave explain`.

use clap::Args;
use meshweave_compiler::plan::explain::{Explanation, explain as explain_plan};
use meshweave_compiler::resolve::Planner;
use meshweave_dsl::diagnostics::Class;
use serde_json::json;

use super::experts::with_replicas;
use super::render::{plan_summary, seconds};
use super::{Format, Input};
use crate::cli::output::{out, outln};
use crate::error::{Error, Result};
use crate::mapping;
use crate::session::Session;

#[derive(Debug, Args)]
pub struct ExplainArgs {
    #[command(flatten)]
    input: Input,
}

/// Says why the plan is what it is.
pub fn explain(args: &ExplainArgs, format: Format) -> Result<()> {
    let session = Session::open(&args.input.document, args.input.cluster.as_deref())?;
    if args.input.planner(&session)? == Planner::Mapping {
        let mapped = session.search_mapping()?;
        match format {
            Format::Text => out!(
                "{}\n{}",
                mapping::summary(&mapped),
                mapping::explain(&mapped)
            ),
            Format::Json => outln!(
                "{}",
                json!({
                    "mapping": mapped.mapping,
                    "certificate": mapped.found.as_ref().map(|found| &found.certificate),
                    "explanation": mapping::explain(&mapped),
                })
            ),
        }
        return Ok(());
    }
    let session = with_replicas(session)?;
    let model = session.model()?;
    let solution = session.plan(&model)?;
    let directives = session.directives(&model)?;
    let explanation = explain_plan(
        &model.graph,
        &session.request.stage_cluster(),
        &directives,
        &session.search_options(),
        &solution.plan,
    )
    .map_err(|error| Error::plain(Class::Internal, error))?;
    match format {
        Format::Text => out!(
            "{}\n{}",
            plan_summary(&session.request, &solution),
            text(&explanation)
        ),
        Format::Json => outln!(
            "{}",
            json!({"certificate": solution.certificate, "explanation": explanation})
        ),
    }
    Ok(())
}

/// The explanation for people; every time in it is predicted.
pub fn text(explanation: &Explanation) -> String {
    let mut text = String::from("Where the time goes (predicted)\n");
    for cost in explanation.costs.iter().take(12) {
        let kind = if cost.is_reshard {
            "  communication"
        } else {
            ""
        };
        text += &format!("  {:>10}  {}{kind}\n", seconds(cost.seconds), cost.name);
    }
    text += "\nOther meshes (predicted)\n";
    for other in explanation.runners_up.iter().take(8) {
        match (other.predicted_s, &other.reason) {
            (Some(predicted_s), _) => {
                let slower = 100.0 * (predicted_s / explanation.predicted_s - 1.0);
                text += &format!(
                    "  {:>10}  {} ({slower:+.1} %)\n",
                    seconds(predicted_s),
                    other.mesh
                );
            }
            (None, reason) => {
                text += &format!(
                    "  {:>10}  {}: {}\n",
                    "-",
                    other.mesh,
                    reason.as_deref().unwrap_or("no plan")
                );
            }
        }
    }
    if !explanation.statements.is_empty() {
        text += "\nWhat each statement costs (predicted: the step without it)\n";
        for statement in &explanation.statements {
            let saved = explanation.predicted_s - statement.without_s;
            text += &format!(
                "  {:>10}  without `{}` (saves {})\n",
                seconds(statement.without_s),
                statement.text,
                seconds(saved.max(0.0))
            );
        }
    }
    text += &format!(
        "\nWith twice the memory the best step would take {} (predicted).\n",
        seconds(explanation.with_twice_the_memory_s)
    );
    text
}
