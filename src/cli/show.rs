//! `meshweave show`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use meshweave_compiler::resolve::Planner;
use meshweave_compiler::show::{Folding, dot, perfetto, report};
use serde_json::json;

use super::experts::with_replicas;
use super::{Format, Input, write_atomically};
use crate::cli::output::{out, outln};
use crate::error::Result;
use crate::mapping;
use crate::report::{Shown, predicted_timeline, report_input};
use crate::session::Session;

#[derive(Debug, Args)]
pub struct ShowArgs {
    #[command(flatten)]
    input: Input,
    /// What to write.
    #[arg(long = "as", value_enum, default_value_t = Kind::Html)]
    kind: Kind,
    /// Where to write it; `report.html`, `trace.json` or `graph.dot` by default.
    #[arg(long, short)]
    out: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// One offline page: graph, plan, predicted timeline and memory. `run --report` adds what was measured.
    Html,
    /// The predicted timeline for Perfetto or chrome://tracing.
    Perfetto,
    /// The graph for Graphviz, repeated layers folded.
    Dot,
}

/// Writes a picture of the plan.
pub fn show(args: &ShowArgs, format: Format) -> Result<()> {
    let session = Session::open(&args.input.document, args.input.cluster.as_deref())?;
    if args.input.planner(&session)? == Planner::Mapping {
        return show_mapping(args, &session, format);
    }
    let session = with_replicas(session)?;
    let model = session.model()?;
    let (default, text) = match args.kind {
        Kind::Dot => ("graph.dot", dot(&model.graph, Folding::Layers)),
        Kind::Html | Kind::Perfetto => {
            let solution = session.plan(&model)?;
            let (program, locals) = session.outline(&model, &solution.plan)?;
            if args.kind == Kind::Perfetto {
                (
                    "trace.json",
                    perfetto(&[predicted_timeline(&program)], Some(&program)).to_string(),
                )
            } else {
                let shown = Shown {
                    session: &session,
                    model: &model,
                    solution: &solution,
                    program: &program,
                };
                let local = locals.first().cloned();
                (
                    "report.html",
                    report(&report_input(&shown, local, None, Vec::new())?),
                )
            }
        }
    };
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from(default));
    write_atomically(&out, text.as_bytes())?;
    match format {
        Format::Text => outln!("{}", out.display()),
        Format::Json => outln!("{}", json!({"written": out})),
    }
    Ok(())
}

/// Mappings have no graph: their report is text.
fn show_mapping(args: &ShowArgs, session: &Session, format: Format) -> Result<()> {
    let text = mapping::report(&session.mapping()?);
    match &args.out {
        Some(out) => {
            write_atomically(out, text.as_bytes())?;
            match format {
                Format::Text => outln!("{}", out.display()),
                Format::Json => outln!("{}", json!({"written": out})),
            }
        }
        None => match format {
            Format::Text => out!("{text}"),
            Format::Json => outln!("{}", json!({"report": text})),
        },
    }
    Ok(())
}
