//! `meshweave export`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use meshweave_compiler::export::{Target, export as export_plan, export_mapping};
use meshweave_compiler::resolve::Planner;
use meshweave_dsl::diagnostics::Class;
use serde_json::json;

use super::{Format, Input, write_atomically};
use crate::cli::output::{out, outln};
use crate::error::{Error, Result};
use crate::session::Session;

#[derive(Debug, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    input: Input,
    /// The engine whose configuration to write.
    #[arg(long, value_enum)]
    to: Engine,
    /// Where to write it; standard output by default.
    #[arg(long, short)]
    out: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Engine {
    /// Flags of Megatron-LM.
    Megatron,
    /// Sections of a torchtitan TOML file.
    Torchtitan,
    /// A DeepSpeed JSON file.
    Deepspeed,
}

/// Plans, and says the plan in the words of another engine.
pub fn export(args: &ExportArgs, format: Format) -> Result<()> {
    let session = Session::open(&args.input.document, args.input.cluster.as_deref())?;
    let target = match args.to {
        Engine::Megatron => Target::Megatron,
        Engine::Torchtitan => Target::Torchtitan,
        Engine::Deepspeed => Target::Deepspeed,
    };
    let text = match args.input.planner(&session)? {
        Planner::Mapping => {
            let mapped = session.mapping()?;
            export_mapping(&mapped.request.workload, &mapped.mapping, target)
        }
        Planner::Ops => {
            let model = session.model()?;
            let solution = session.plan(&model)?;
            export_plan(&model.graph, &solution.plan, target)
        }
    }
    .map_err(|error| Error::plain(Class::Unsupported, error))?;
    match (&args.out, format) {
        (Some(path), _) => {
            write_atomically(path, text.as_bytes())?;
            eprintln!("wrote {}", path.display());
        }
        (None, Format::Text) => out!("{text}"),
        (None, Format::Json) => outln!("{}", json!({"target": target.name(), "text": text})),
    }
    Ok(())
}
