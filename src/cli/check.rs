//! `meshweave check`.

use std::path::PathBuf;

use clap::Args;
use meshweave_compiler::resolve::Planner;
use meshweave_dsl::diagnostics::{RenderOptions, render_all};
use serde_json::json;

use super::Format;
use crate::cli::output::outln;
use crate::error::Result;
use crate::session::Session;

#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The .weave documents.
    #[arg(required = true)]
    documents: Vec<PathBuf>,
    /// Check the syntax and the names only: do not search for a plan.
    #[arg(long)]
    no_plan: bool,
}

/// Checks every document; stops at the first one with errors.
pub fn check(args: &CheckArgs, format: Format) -> Result<()> {
    let mut checked = Vec::new();
    for path in &args.documents {
        let session = Session::open(path, None)?;
        match session.planner(None)? {
            Planner::Mapping if args.no_plan => {
                session.mapping_request(&session.document)?;
            }
            Planner::Mapping => {
                session.search_mapping()?;
            }
            Planner::Ops => {
                let model = session.model()?;
                if !args.no_plan {
                    session.plan(&model)?;
                }
            }
        }
        match format {
            Format::Text => {
                eprint!(
                    "{}",
                    render_all(
                        &session.warnings,
                        &session.sources,
                        RenderOptions::default()
                    )
                );
                outln!("{}: ok", path.display());
            }
            Format::Json => checked.push(json!({"document": path, "warnings": session.warnings})),
        }
    }
    if format == Format::Json {
        outln!("{}", json!({"checked": checked}));
    }
    Ok(())
}
