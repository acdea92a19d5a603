//! `meshweave schedule`: pipeline schedules, listed, drawn, lowered, checked, searched.

mod costs;
mod lower;

use std::io::IsTerminal;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use meshweave_compiler::schedule::{
    self as schedules, Builtin, Costs, Lowering, PipelineError, Placement, SearchOptions, Shape,
    Simulation, Stages, Terminal, Verdict, build, check, check_lowered, check_memory,
    check_versions, lower, lower_naively, optimum, place, search, simulate, streams, table,
};
use meshweave_compiler::show::{
    ActionGrid, Figure, FigureSource, FigureValue, ReportInput, report,
};
use meshweave_dsl::diagnostics::{Class, SourceId};
use meshweave_dsl::schedule::{Channels, DeviceStreams, Lowered, Schedule, ScheduleError};
use meshweave_dsl::weave::Document;
use serde_json::json;

use self::costs::{CostArgs, three};
use self::lower::{LowerArgs, show_lowered};
use super::{Format, write_atomically};
use crate::cli::output::{out, outln};
use crate::error::{Error, Result};

#[derive(Debug, Args)]
pub struct ScheduleArgs {
    #[command(subcommand)]
    command: ScheduleCommand,
}

#[derive(Debug, Subcommand)]
enum ScheduleCommand {
    /// Name the built-in schedules.
    List,
    /// Simulate a schedule and draw it: ranks down, time across, idle time by cause, memory below.
    Show(ShowArgs),
    /// Add communication and memory actions, and run the queues of every device; a schedule that has
    /// them already is run as it stands.
    Lower(LowerArgs),
    /// Check a schedule in CSV (one line a rank, `2F0` a cell, as PyTorch writes it), or those that a
    /// document defines; with communication (`2SEND_F0`) they are checked as they stand.
    Check(CheckArgs),
    /// Compare simulated bubble and peak of every built-in schedule with the formulas.
    Table(TableArgs),
    /// Find the fastest schedule under a memory limit.
    Search(SearchArgs),
}

/// A schedule and what its stages cost.
#[derive(Debug, Args)]
struct PipelineArgs {
    /// A built-in schedule (`schedule list`), a CSV file, or a .weave document that defines one.
    name: String,
    /// Ranks of the pipeline; of a file, those of its rows.
    #[arg(long, default_value_t = 4)]
    ranks: usize,
    #[arg(long, default_value_t = 8)]
    microbatches: usize,
    /// Chunks (virtual stages) a rank, where the schedule leaves the choice.
    #[arg(long)]
    chunks: Option<usize>,
    /// Slices a sequence, for schedules that divide sequences.
    #[arg(long)]
    slices: Option<usize>,
    /// The rank of every stage, such as `1,0,3,2`.
    #[arg(long, value_delimiter = ',', value_name = "RANK,…")]
    place: Vec<usize>,
    #[command(flatten)]
    costs: CostArgs,
    /// Activations that a rank may hold, in microbatches of all its chunks.
    #[arg(long)]
    memory: Option<f64>,
}

#[derive(Debug, Args)]
struct ShowArgs {
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// Also write the picture as a report: one HTML page that needs nothing else.
    #[arg(long, alias = "html")]
    report: Option<PathBuf>,
    /// Also write the order as CSV.
    #[arg(long)]
    csv: Option<PathBuf>,
    /// Columns of the picture; the terminal's where absent.
    #[arg(long)]
    width: Option<usize>,
}

#[derive(Debug, Args)]
struct CheckArgs {
    /// The CSV file, or the .weave document.
    file: PathBuf,
    /// Channel model: blocking, pair, direction, or the depth of buffers. Documents say it themselves
    /// where their schedules have communication.
    #[arg(long, default_value = "direction")]
    channels: String,
    /// Ranks and microbatches for order keys; rows have theirs.
    #[arg(long, default_value_t = 4)]
    ranks: usize,
    #[arg(long, default_value_t = 8)]
    microbatches: usize,
    /// Let every rank place its own sends and receives, instead of the sender both.
    #[arg(long)]
    naive: bool,
    /// Activations that a rank may hold, in microbatches of all its chunks.
    #[arg(long)]
    memory: Option<f64>,
}

#[derive(Debug, Args)]
struct TableArgs {
    /// Only these schedules.
    names: Vec<String>,
    /// Forward, input gradient and weight gradient of one rank's microbatch, as F:I:W.
    #[arg(long, default_value = "1:1:1", value_name = "F:I:W")]
    costs: String,
}

#[derive(Debug, Args)]
struct SearchArgs {
    #[arg(long, default_value_t = 4)]
    ranks: usize,
    #[arg(long, default_value_t = 8)]
    microbatches: usize,
    #[command(flatten)]
    costs: CostArgs,
    /// Activations that a rank may hold, in microbatches of all its chunks; those of 1F1B where
    /// absent.
    #[arg(long)]
    memory: Option<f64>,
    /// Also prove the optimum of every placement, for pipelines of up to 3 ranks and 4 microbatches or
    /// so: a search over all orders.
    #[arg(long)]
    exact: bool,
    /// Also write the order as CSV.
    #[arg(long)]
    csv: Option<PathBuf>,
    /// Columns of the picture; the terminal's where absent.
    #[arg(long)]
    width: Option<usize>,
}

/// States that a proof looks at before it gives up.
const MAX_STATES: usize = 5_000_000;

/// Runs a subcommand.
pub fn schedule(args: &ScheduleArgs, format: Format) -> Result<()> {
    match &args.command {
        ScheduleCommand::List => {
            list(format);
            Ok(())
        }
        ScheduleCommand::Show(args) => show(args, format),
        ScheduleCommand::Lower(args) => show_lowered(args, format),
        ScheduleCommand::Check(args) => check_file(args, format),
        ScheduleCommand::Table(args) => print_table(args, format),
        ScheduleCommand::Search(args) => find(args, format),
    }
}

fn pipeline_error(error: PipelineError) -> Error {
    let class = match &error {
        PipelineError::Invalid(_) => Class::Invalid,
        PipelineError::Infeasible(_) => Class::Infeasible,
        PipelineError::Exhausted(_) => Class::Exhausted,
        PipelineError::Internal(_) => Class::Internal,
    };
    Error::plain(class, error)
}

fn invalid(message: String) -> Error {
    Error::plain(Class::Invalid, message)
}

fn list(format: Format) {
    match format {
        Format::Text => {
            for builtin in Builtin::ALL {
                outln!("{:<15} {}", builtin.name(), builtin.summary());
            }
        }
        Format::Json => {
            let entries = Builtin::ALL.map(|builtin| {
                json!({
                    "name": builtin.name(),
                    "summary": builtin.summary(),
                    "chunks": builtin.fixed_chunks(),
                    "slices": builtin.is_sliced(),
                    "splits_backward": builtin.splits_backward(),
                })
            });
            outln!("{}", json!({"schedules": entries}));
        }
    }
}

fn named(name: &str) -> Result<Builtin> {
    Builtin::find(name).ok_or_else(|| {
        let names = Builtin::ALL.map(Builtin::name);
        invalid(format!(
            "there is no schedule `{name}`; there are {}",
            names.join(", ")
        ))
    })
}

fn read(path: &std::path::Path) -> Result<String> {
    std::fs::read_to_string(path)
        .map_err(|error| invalid(format!("cannot read {}: {error}", path.display())))
}

/// The schedule that a name, a CSV file or a document stands for, with its costs.
fn load(args: &PipelineArgs) -> Result<(Schedule, Costs)> {
    let path = std::path::Path::new(&args.name);
    let extension = path.extension().and_then(|extension| extension.to_str());
    let shape = Shape::new(args.ranks, args.microbatches)
        .chunks(args.chunks.unwrap_or(1))
        .slices(args.slices.unwrap_or(1));
    let is_document = extension == Some("weave");
    let schedule = match extension {
        Some("csv") => Schedule::from_csv(stem(path), &read(path)?)
            .map_err(|error| pipeline_error(error.into()))?,
        Some("weave") => from_document(path, &shape, &args.place)?,
        _ => {
            let builtin = named(&args.name)?;
            let n_chunks = args.chunks.or(builtin.fixed_chunks()).unwrap_or(2);
            let n_slices = args
                .slices
                .unwrap_or(if builtin.is_sliced() { 2 } else { 1 });
            let shape = shape.chunks(n_chunks).slices(n_slices);
            // Patterns are fitted to the costs, so these come first.
            let placement = one_copy(builtin.placement());
            let mut costs = args.costs.of(&placement.stage_rank(&shape), args.ranks)?;
            costs.memory_limit_bytes = args.memory;
            build(builtin, &shape, Some(&costs)).map_err(pipeline_error)?
        }
    };
    let schedule = if args.place.is_empty() || is_document {
        schedule
    } else {
        place(&schedule, &args.place).map_err(pipeline_error)?
    };
    check(&schedule).map_err(pipeline_error)?;
    let stage_rank = &schedule.stage_rank[..schedule.n_stages];
    let costs = args.costs.of(stage_rank, schedule.n_ranks)?;
    Ok((schedule, costs))
}

/// Of two copies, where the stages of the first lie.
fn one_copy(placement: Placement) -> Placement {
    match placement {
        Placement::TwoWay => Placement::Loop,
        placement => placement,
    }
}

fn stem(path: &std::path::Path) -> String {
    let stem = path
        .file_stem()
        .map(|stem| stem.to_string_lossy().into_owned());
    stem.unwrap_or_else(|| "schedule".into())
}

/// The first schedule that a document defines, with stages where they are placed.
fn from_document(path: &std::path::Path, shape: &Shape, ranks: &[usize]) -> Result<Schedule> {
    let document = defining(path)?;
    let Some(definition) = schedules::definitions(&document).next() else {
        return Err(no_definition(path));
    };
    schedules::from_definition(definition, shape, ranks, folder(path)).map_err(pipeline_error)
}

fn folder(path: &std::path::Path) -> &std::path::Path {
    path.parent().unwrap_or(std::path::Path::new("."))
}

fn no_definition(path: &std::path::Path) -> Error {
    invalid(format!(
        "{} defines no schedule; write `schedule mine = key F:(mb,0) B:(mb+P-r,-1)`",
        path.display()
    ))
}

/// A document that parses.
fn defining(path: &std::path::Path) -> Result<Document> {
    let text = read(path)?;
    let parsed = meshweave_dsl::weave::parse(&text, SourceId(0));
    if !parsed.diagnostics.is_empty() {
        let mut sources = meshweave_dsl::diagnostics::Sources::new();
        sources.add(path.display().to_string(), text);
        return Err(Error::new(parsed.diagnostics, sources));
    }
    Ok(parsed.document)
}

/// The first schedule of a file with its communication and memory actions as they are written, and its
/// queues; none for built-in schedules, and where a file has compute actions only.
fn written(name: &str, channels: Channels) -> Result<Option<(Lowered, Vec<DeviceStreams>)>> {
    let path = std::path::Path::new(name);
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("weave") => {
            let document = defining(path)?;
            let Some(definition) = schedules::definitions(&document).next() else {
                return Err(no_definition(path));
            };
            schedules::lowered_definition(definition, folder(path)).map_err(pipeline_error)
        }
        Some("csv") => {
            let text = read(path)?;
            if !Lowered::is_csv(&text) {
                return Ok(None);
            }
            let lowered = Lowered::from_csv(stem(path), &text, channels);
            let lowered = lowered.map_err(|error| pipeline_error(error.into()))?;
            check(&lowered.schedule).map_err(pipeline_error)?;
            check_lowered(&lowered).map_err(pipeline_error)?;
            let devices = streams(&lowered);
            Ok(Some((lowered, devices)))
        }
        _ => Ok(None),
    }
}

fn show(args: &ShowArgs, format: Format) -> Result<()> {
    let (schedule, mut costs) = load(&args.pipeline)?;
    let memory = args.pipeline.memory;
    if let Some(limit) = memory {
        check_memory(&schedule, &costs, limit).map_err(pipeline_error)?;
    }
    // Idle time counts as a wait for memory where the schedule's own peak leaves no room.
    let first = simulate(&schedule, &costs).map_err(pipeline_error)?;
    costs.memory_limit_bytes = Some(memory.unwrap_or(first.peak()));
    let simulation = simulate(&schedule, &costs).map_err(pipeline_error)?;
    if let Some(path) = &args.report {
        let page = report(&report_of(&schedule, &simulation, &costs));
        write_atomically(path, page.as_bytes())?;
    }
    if let Some(path) = &args.csv {
        write_atomically(path, schedule.to_csv().as_bytes())?;
    }
    match format {
        Format::Text => {
            out!("{}", picture(&schedule, &simulation, &costs, args.width)?);
            let stage_rank = &schedule.stage_rank[..schedule.n_stages];
            let division = args.pipeline.costs.division(stage_rank, schedule.n_ranks)?;
            if let Some(division) = division {
                out!("{}", costs::division_text(&division));
            }
        }
        Format::Json => outln!("{}", json!({"schedule": schedule, "predicted": simulation})),
    }
    Ok(())
}

/// The report of a schedule by itself.
fn report_of(schedule: &Schedule, simulation: &Simulation, costs: &Costs) -> ReportInput {
    let figure = |label: &str, text: String, note: &str| Figure {
        label: label.into(),
        values: vec![FigureValue {
            text,
            source: FigureSource::Predicted,
        }],
        note: note.into(),
    };
    ReportInput {
        title: schedule.name.clone(),
        subtitle: format!(
            "{} ranks, {} stages, {} microbatches",
            schedule.n_ranks, schedule.n_stages, schedule.n_microbatches
        ),
        figures: vec![
            figure("Step time", format!("{:.3} s", simulation.step_s), ""),
            figure(
                "Bubble",
                format!("{:.3} s", simulation.bubble_s),
                "beyond the work of the busiest rank",
            ),
            figure(
                "Idle",
                format!("{:.2} %", 100.0 * simulation.bubble_rate()),
                "of all ranks' time",
            ),
            figure(
                "Peak of a rank",
                format!("{:.3}", simulation.peak()),
                "activations of a rank's microbatches",
            ),
        ],
        grids: vec![ActionGrid::of_simulation(schedule, simulation, costs)],
        ..ReportInput::default()
    }
}

/// The picture with its figures.
fn picture(
    schedule: &Schedule,
    simulation: &Simulation,
    costs: &Costs,
    width: Option<usize>,
) -> Result<String> {
    let how = Terminal {
        width: width.unwrap_or_else(columns),
        color: std::io::stdout().is_terminal(),
    };
    let mut text = format!(
        "{}: {} ranks, {} stages, {} microbatches\n\n",
        schedule.name, schedule.n_ranks, schedule.n_stages, schedule.n_microbatches
    );
    text += &schedules::terminal(schedule, simulation, costs, how);
    text += &schedules::legend(how.color);
    let bubble = &simulation.bubble;
    text += &format!(
        "\npredicted  step {:.3} s  bubble {:.3} s  idle {:.2} %  peak {:.3} microbatches of a rank\n",
        simulation.step_s,
        simulation.bubble_s,
        100.0 * simulation.bubble_rate(),
        simulation.peak()
    );
    text += &format!(
        "idle of the mean rank (predicted)  dependency {:.3} s  communication {:.3} s  memory {:.3} s  \
         barrier {:.3} s\n",
        bubble.dependency_s, bubble.communication_s, bubble.memory_s, bubble.barrier_s
    );
    text += &critical_text(schedule, simulation);
    let versions = check_versions(schedule, None).map_err(pipeline_error)?;
    if let Some(staleness) = versions
        .staleness
        .iter()
        .max()
        .filter(|staleness| **staleness > 0)
    {
        text += &format!(
            "gradients are up to {staleness} updates stale on the first stage; weight versions by stage: {:?}\n",
            versions.n_versions
        );
    }
    Ok(text)
}

/// The ends of the critical path, and how much of the step is work on it.
fn critical_text(schedule: &Schedule, simulation: &Simulation) -> String {
    const N_SHOWN: usize = 5;
    let path = &simulation.critical_path;
    let name = |(rank, position): &(usize, usize)| schedule.rows[*rank][*position].to_string();
    let names = |part: &[(usize, usize)]| part.iter().map(name).collect::<Vec<_>>().join(" ");
    let shown = if path.len() > 2 * N_SHOWN {
        let (first, last) = (&path[..N_SHOWN], &path[path.len() - N_SHOWN..]);
        format!("{} … {}", names(first), names(last))
    } else {
        names(path)
    };
    // The actions of a pair have one span.
    let mut work_s = 0.0;
    let mut last = None;
    for (rank, position) in path {
        let span = simulation.spans[*rank][*position];
        if last.replace((*rank, span)) != Some((*rank, span)) {
            work_s += span.seconds();
        }
    }
    format!(
        "critical path (predicted)  {shown}: {} actions, {work_s:.3} s of work\n",
        path.len()
    )
}

/// Columns of the terminal, less the labels.
fn columns() -> usize {
    let columns = std::env::var("COLUMNS")
        .ok()
        .and_then(|columns| columns.parse().ok());
    columns.unwrap_or(120usize).saturating_sub(16).max(40)
}

/// The channel model of that name.
fn channels(text: &str) -> Result<Channels> {
    Channels::parse(text).ok_or_else(|| {
        invalid(format!(
            "`--channels {text}` is no channel model; write blocking, pair, direction, or a depth of \
             buffers from 1"
        ))
    })
}

fn check_file(args: &CheckArgs, format: Format) -> Result<()> {
    let channels = channels(&args.channels)?;
    let mut checked = Vec::new();
    if args
        .file
        .extension()
        .is_some_and(|extension| extension == "weave")
    {
        let document = defining(&args.file)?;
        let shape = Shape::new(args.ranks, args.microbatches);
        for definition in schedules::definitions(&document) {
            let folder = folder(&args.file);
            let found =
                schedules::lowered_definition(definition, folder).map_err(pipeline_error)?;
            checked.push(match found {
                Some((lowered, _)) => lowered,
                None => {
                    let schedule = schedules::from_definition(definition, &shape, &[], folder);
                    commanded(&schedule.map_err(pipeline_error)?, channels, args)?
                }
            });
        }
        if checked.is_empty() {
            return Err(no_definition(&args.file));
        }
    } else {
        let text = read(&args.file)?;
        let name = stem(&args.file);
        let invalid = |error: ScheduleError| pipeline_error(error.into());
        checked.push(if Lowered::is_csv(&text) {
            Lowered::from_csv(name, &text, channels).map_err(invalid)?
        } else {
            let schedule = Schedule::from_csv(name, &text).map_err(invalid)?;
            check(&schedule).map_err(pipeline_error)?;
            commanded(&schedule, channels, args)?
        });
    }
    let mut results = Vec::new();
    for lowered in checked {
        let schedule = &lowered.schedule;
        check(schedule).map_err(pipeline_error)?;
        check_lowered(&lowered).map_err(pipeline_error)?;
        let costs = Costs::even(schedule.n_ranks, schedule.n_stages, 1.0, 1.0, 1.0);
        if let Some(limit) = args.memory {
            check_memory(schedule, &costs, limit).map_err(pipeline_error)?;
        }
        let simulation = simulate(schedule, &costs).map_err(pipeline_error)?;
        match format {
            Format::Text => outln!(
                "{}: {}: ok: {} ranks, {} stages, {} microbatches, {} actions; at equal costs idle \
                 {:.2} %, peak {:.3} microbatches of a rank (predicted)",
                args.file.display(),
                schedule.name,
                schedule.n_ranks,
                schedule.n_stages,
                schedule.n_microbatches,
                schedule.n_actions(),
                100.0 * simulation.bubble_rate(),
                simulation.peak()
            ),
            Format::Json => {
                results.push(json!({"schedule": schedule, "peak": simulation.peak_bytes}));
            }
        }
    }
    if format == Format::Json {
        outln!("{}", json!({"checked": args.file, "schedules": results}));
    }
    Ok(())
}

/// A schedule with its messages, as the arguments say.
fn commanded(schedule: &Schedule, channels: Channels, args: &CheckArgs) -> Result<Lowered> {
    if args.naive {
        return Ok(lower_naively(schedule, channels));
    }
    let lowering = Lowering {
        channels,
        ..Lowering::default()
    };
    lower(schedule, &lowering).map_err(pipeline_error)
}

fn print_table(args: &TableArgs, format: Format) -> Result<()> {
    let builtins = if args.names.is_empty() {
        Builtin::ALL.to_vec()
    } else {
        args.names
            .iter()
            .map(|name| named(name))
            .collect::<Result<_>>()?
    };
    let rows = table::table(&builtins, three(&args.costs)?).map_err(pipeline_error)?;
    match format {
        Format::Text => {
            out!("{}", table::text(&rows));
            let count =
                |is: fn(&Verdict) -> bool| rows.iter().filter(|row| is(&row.verdict)).count();
            outln!(
                "\n{} rows: {} equal, {} differ for the reason given, {} undefined, {} broken",
                rows.len(),
                count(|verdict| *verdict == Verdict::Equal),
                count(|verdict| matches!(verdict, Verdict::Differs(_))),
                count(|verdict| matches!(verdict, Verdict::Undefined(_))),
                count(|verdict| *verdict == Verdict::Broken)
            );
        }
        Format::Json => outln!("{}", json!({"rows": rows})),
    }
    Ok(())
}

fn find(args: &SearchArgs, format: Format) -> Result<()> {
    let stages = |placement: Placement, n_chunks| -> Result<Stages> {
        Ok(Stages {
            n_chunks,
            costs: args.costs.of(
                &placement.stage_rank(&Shape::new(args.ranks, 1).chunks(n_chunks)),
                args.ranks,
            )?,
            placement,
        })
    };
    let stages = [
        stages(Placement::Loop, 1)?,
        stages(Placement::Loop, 2)?,
        stages(Placement::V, 2)?,
    ];
    let options = SearchOptions {
        memory_limit_bytes: Some(args.memory.unwrap_or(args.ranks as f64)),
        ..SearchOptions::new(args.ranks, args.microbatches)
    };
    let found = search(&stages, &options).map_err(pipeline_error)?;
    if let Some(path) = &args.csv {
        write_atomically(path, found.schedule.to_csv().as_bytes())?;
    }
    match format {
        Format::Text => {
            let mut costs = args.costs.of(&found.schedule.stage_rank, args.ranks)?;
            costs.memory_limit_bytes = options.memory_limit_bytes;
            out!(
                "{}",
                picture(&found.schedule, &found.simulation, &costs, args.width)?
            );
            outln!(
                "\nbuilt-in schedules within {:.3} (predicted)",
                args.memory.unwrap_or(args.ranks as f64)
            );
            for candidate in &found.builtins {
                outln!(
                    "  {:<15} v={}  step {:>10.3} s  {:+7.2} %  peak {:.3}",
                    candidate.name,
                    candidate.n_chunks,
                    candidate.step_s,
                    100.0 * (candidate.step_s / found.simulation.step_s - 1.0),
                    candidate.peak_bytes
                );
            }
            outln!("{} schedules were simulated", found.n_simulated);
            if args.exact {
                for stages in &stages {
                    let until_s = found.simulation.step_s * (1.0 + 1e-9);
                    let proven = optimum(stages, &options, until_s, MAX_STATES);
                    outln!("{}", proof_text(stages, until_s, proven)?);
                }
            }
        }
        Format::Json => outln!("{}", json!({"found": found})),
    }
    Ok(())
}

/// What a proof says: no order of these stages is faster than the one found, or than this.
fn proof_text(
    stages: &Stages,
    until_s: f64,
    proven: std::result::Result<schedules::Optimum, PipelineError>,
) -> Result<String> {
    let shape = format!(
        "{:?} with {} chunks a rank",
        stages.placement, stages.n_chunks
    );
    Ok(match proven {
        Ok(proven) => format!(
            "exact: {shape}: no order is faster than {:.3} s ({} states)",
            proven.step_s, proven.n_states
        ),
        Err(PipelineError::Exhausted(why)) => format!("exact: {shape}: given up: {why}"),
        Err(PipelineError::Infeasible(_)) => {
            format!("exact: {shape}: no order takes at most {until_s:.3} s within the limit")
        }
        Err(error) => return Err(pipeline_error(error)),
    })
}
