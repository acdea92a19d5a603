//! The command line: arguments in, text or JSON out, an exit code at the end.
//!
//! Enters: parsed arguments. Leaves: results on standard output, everything else on standard error.
//! Invariant: with `--format json`, standard output holds exactly one JSON value, errors included.

mod calibrate;
mod check;
mod compile;
mod corpus;
mod decode;
mod diff;
mod evidence;
mod experts;
mod explain;
mod export;
mod fmt;
mod job;
mod launch;
mod outcome;
mod output;
mod place;
mod placed;
mod plan;
mod profile;
mod rebalance;
pub(crate) mod render;
mod routes;
mod run;
mod schedule;
mod show;
mod tally;
mod trace;
mod train;
mod validate;
mod verify;
mod what_if;
mod worker;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use meshweave_compiler::resolve::Planner;
use meshweave_dsl::diagnostics::Class;

use crate::cli::output::outln;
use crate::error::{Error, Result};
use crate::session::Session;

/// Plans, compiles and runs parallel training and inference.
#[derive(Debug, Parser)]
#[command(name = "meshweave", version, arg_required_else_help = true, after_help = EXIT_CODES)]
pub struct Cli {
    /// How results and errors are printed.
    #[arg(long, value_enum, global = true, default_value_t = Format::Text)]
    pub format: Format,

    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  the input is wrong (syntax, names, shapes, missing files)
  2  the command line is wrong
  3  the request cannot be met (no plan fits)
  4  the machine gave out (memory, disk, a missing tool)
  5  not supported yet
  70 a bug in meshweave

Files ending in .weave are documents; folders are compiled artifacts.
MESHWEAVE_LOG=info (or debug) logs what happens to standard error.";

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON value.
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check documents: syntax, names, shapes, and whether the directives can be met.
    Check(check::CheckArgs),
    /// Format documents in place.
    Fmt(fmt::FmtArgs),
    /// Find the best plan and print it, with its predicted time and memory and a lower bound.
    Plan(plan::PlanArgs),
    /// Plan and compile into an artifact folder that `run` executes without LLVM.
    Compile(compile::CompileArgs),
    /// Train or evaluate: a document (planned and compiled first) or an artifact.
    Run(Box<run::RunArgs>),
    /// Run one rank of an artifact as a process of an MPI job (`mpirun -n 8 meshweave worker ARTIFACT`).
    Worker(worker::WorkerArgs),
    /// Compile programs for a machine with a GPU, with what they must give (see `make test-gpu`).
    #[command(hide = true)]
    Corpus(corpus::CorpusArgs),
    /// Write a report, a trace or a drawing.
    Show(show::ShowArgs),
    /// Say why the plan is what it is: where time goes, the runner-up, the price of each pin.
    Explain(explain::ExplainArgs),
    /// List, draw, check and search pipeline schedules.
    Schedule(schedule::ScheduleArgs),
    /// Check a plan again without a search: legality, memory, price, bound, hashes.
    Verify(verify::VerifyArgs),
    /// Say in which choices two plans differ.
    Diff(diff::DiffArgs),
    /// Plan with more or less memory, network, compute or devices.
    WhatIf(what_if::WhatIfArgs),
    /// Place the experts of a routing trace on devices, with what it keeps local and a bound.
    Place(place::PlaceArgs),
    /// Make, describe or import routing traces.
    Trace(trace::TraceArgs),
    /// Write the plan as a configuration of another engine.
    Export(export::ExportArgs),
    /// Measure this machine and print it as a cluster.
    Profile(profile::ProfileArgs),
    /// Score the cost model on a table of published measurements.
    Validate(validate::ValidateArgs),
}

/// The document that most commands start from.
#[derive(Clone, Debug, Args)]
pub struct Input {
    /// The .weave document.
    pub document: PathBuf,
    /// Use this cluster instead of the document's: a preset such as `local:8`, or a .weave file.
    #[arg(long)]
    pub cluster: Option<String>,
    /// Which planner to use; by default the one that the document is for.
    #[arg(long, value_enum)]
    pub planner: Option<PlannerName>,
}

/// A planner on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PlannerName {
    /// Degrees, pipeline, recomputation and offloading of a decoder on a cluster.
    Mapping,
    /// The layout of every op; such plans can be compiled and run.
    Ops,
}

impl Input {
    /// The planner for a session.
    ///
    /// # Errors
    /// Statements that the planner asked for does not know.
    pub(crate) fn planner(&self, session: &Session) -> Result<Planner> {
        let asked = self.planner.map(|name| match name {
            PlannerName::Mapping => Planner::Mapping,
            PlannerName::Ops => Planner::Ops,
        });
        session.planner(asked)
    }
}

/// Runs a command and returns its exit code.
pub fn run(cli: &Cli) -> ExitCode {
    let done = match &cli.command {
        Command::Check(args) => check::check(args, cli.format),
        Command::Fmt(args) => fmt::fmt(args, cli.format),
        Command::Plan(args) => plan::plan(args, cli.format),
        Command::Compile(args) => compile::compile(args, cli.format),
        Command::Run(args) => run::run(args, cli.format),
        Command::Worker(args) => worker::worker(args, cli.format),
        Command::Corpus(args) => corpus::corpus(args),
        Command::Show(args) => show::show(args, cli.format),
        Command::Explain(args) => explain::explain(args, cli.format),
        Command::Schedule(args) => schedule::schedule(args, cli.format),
        Command::Verify(args) => verify::verify(args, cli.format),
        Command::Diff(args) => diff::diff(args, cli.format),
        Command::WhatIf(args) => what_if::what_if(args, cli.format),
        Command::Place(args) => place::place(args, cli.format),
        Command::Trace(args) => trace::trace(args, cli.format),
        Command::Export(args) => export::export(args, cli.format),
        Command::Profile(args) => profile::profile(args, cli.format),
        Command::Validate(args) => validate::validate(args, cli.format),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error, cli.format);
            ExitCode::from(error.exit_code())
        }
    }
}

fn report(error: &Error, format: Format) {
    match format {
        Format::Text => eprintln!("{}", error.render()),
        Format::Json => outln!("{}", error.to_json()),
    }
}

/// Writes a file so that it is there whole or not at all: a temporary sibling, then a rename.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let failed = |error: std::io::Error| {
        Error::plain(
            Class::Exhausted,
            format!("cannot write {}: {error}", path.display()),
        )
        .help("nothing was changed; give another place or make room")
    };
    std::fs::create_dir_all(folder).map_err(failed)?;
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    // Temporary files are private; what is kept may be read by others.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let readable = std::fs::Permissions::from_mode(0o644);
        file.as_file().set_permissions(readable).map_err(failed)?;
    }
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}

/// An error of the runtime as one of the facade.
pub(crate) fn runtime_error(error: meshweave_runtime::Error) -> Error {
    let class = match &error {
        meshweave_runtime::Error::Invalid(_) => Class::Invalid,
        meshweave_runtime::Error::Infeasible(_) => Class::Infeasible,
        meshweave_runtime::Error::Exhausted(_) => Class::Exhausted,
        meshweave_runtime::Error::Unsupported(_) => Class::Unsupported,
        meshweave_runtime::Error::Internal(_) => Class::Internal,
    };
    Error::plain(class, error)
}
