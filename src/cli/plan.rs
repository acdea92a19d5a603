//! `meshweave plan`.

use std::path::PathBuf;

use clap::Args;
use meshweave_compiler::resolve::Planner;
use serde_json::json;

use super::experts::with_replicas;
use super::render::plan_summary;
use super::{Format, Input, write_atomically};
use crate::cli::output::{out, outln};
use crate::error::Result;
use crate::mapping::summary;
use crate::session::Session;

#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    input: Input,
    /// Write the solved plan here, as a document that replays it.
    #[arg(long, short)]
    out: Option<PathBuf>,
}

/// Finds the best plan and prints it.
pub fn plan(args: &PlanArgs, format: Format) -> Result<()> {
    let session = Session::open(&args.input.document, args.input.cluster.as_deref())?;
    let text = match args.input.planner(&session)? {
        Planner::Mapping => plan_mapping(args, &session, format)?,
        Planner::Ops => plan_ops(args, &with_replicas(session)?, format)?,
    };
    if let Some(path) = &args.out {
        write_atomically(path, text.as_bytes())?;
        eprintln!("wrote {}", path.display());
    }
    Ok(())
}

fn plan_mapping(args: &PlanArgs, session: &Session, format: Format) -> Result<String> {
    let mapped = session.search_mapping()?;
    let text = session.mapping_text(&mapped);
    match format {
        Format::Text => {
            eprint!("{}", summary(&mapped));
            if args.out.is_none() {
                out!("{text}");
            }
        }
        Format::Json => outln!(
            "{}",
            json!({
                "mapping": mapped.mapping,
                "certificate": mapped.found.as_ref().map(|found| &found.certificate),
                "document": text,
            })
        ),
    }
    Ok(text)
}

fn plan_ops(args: &PlanArgs, session: &Session, format: Format) -> Result<String> {
    let model = session.model()?;
    let solution = session.plan(&model)?;
    let text = session.plan_text(&model, &solution);
    match format {
        Format::Text => {
            eprint!("{}", plan_summary(&session.request, &solution));
            if let Some(choice) = &session.choice {
                eprint!("{}", choice.text());
            }
            if let Some(exchanges) = &session.exchanges {
                eprint!("{}", exchanges.text());
            }
            if args.out.is_none() {
                out!("{text}");
            }
        }
        Format::Json => outln!(
            "{}",
            json!({
                "plan": solution.plan,
                "certificate": solution.certificate,
                "pipelines": session.choice,
                "exchanges": session.exchanges,
                "document": text,
            })
        ),
    }
    Ok(text)
}
