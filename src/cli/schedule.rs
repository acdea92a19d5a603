//! `meshweave schedule`: pipeline schedules, listed, drawn, checked, searched.

use std::io::IsTerminal;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use meshweave_compiler::schedule::{
    self as schedules, Builtin, Costs, Lowering, PipelineError, Placement, SearchOptions, Shape,
    Simulation, Stages, Terminal, Verdict, build, check, check_lowered, check_memory,
    check_versions, lower, lower_naively, search, simulate, table,
};
use meshweave_compiler::show::{
    ActionGrid, Figure, FigureSource, FigureValue, ReportInput, report,
};
use meshweave_dsl::diagnostics::{Class, SourceId};
use meshweave_dsl::schedule::{Channels, Schedule};
use serde_json::json;

use super::{Format, write_atomically};
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
    /// Check a schedule in CSV (one line a rank, `2F0` a cell, as PyTorch writes it).
    Check(CheckArgs),
    /// Compare simulated bubble and peak of every built-in schedule with the formulas.
    Table(TableArgs),
    /// Find the fastest schedule under a memory limit.
    Search(SearchArgs),
}

/// What stages cost.
#[derive(Debug, Args)]
struct CostArgs {
    /// Seconds of forward, input gradient and weight gradient of one rank's microbatch, as F:I:W.
    #[arg(long, default_value = "1:1:1", value_name = "F:I:W")]
    costs: String,
    /// Relative costs of the stages, separated by commas, such as `0.8,1,1,1.4`; even where absent.
    #[arg(long, value_name = "A,B,…")]
    stages: Option<String>,
    /// Seconds that the activations of a rank's microbatch take between two ranks.
    #[arg(long, default_value_t = 0.0)]
    p2p: f64,
    /// Wait for all ranks at the end, as clipping by the global gradient norm does.
    #[arg(long)]
    barrier: bool,
}

#[derive(Debug, Args)]
struct ShowArgs {
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
    #[command(flatten)]
    costs: CostArgs,
    /// Activations that a rank may hold, in microbatches of all its chunks.
    #[arg(long)]
    memory: Option<f64>,
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
    /// The CSV file.
    file: PathBuf,
    /// Channel model: blocking, pair, direction, or the depth of buffers.
    #[arg(long, default_value = "direction")]
    channels: String,
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
    /// Also write the order as CSV.
    #[arg(long)]
    csv: Option<PathBuf>,
    /// Columns of the picture; the terminal's where absent.
    #[arg(long)]
    width: Option<usize>,
}

/// Runs a subcommand.
pub fn schedule(args: &ScheduleArgs, format: Format) -> Result<()> {
    match &args.command {
        ScheduleCommand::List => {
            list(format);
            Ok(())
        }
        ScheduleCommand::Show(args) => show(args, format),
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
                println!("{:<15} {}", builtin.name(), builtin.summary());
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
            println!("{}", json!({"schedules": entries}));
        }
    }
}

impl CostArgs {
    /// Costs of so many stages, evenly divided or as listed.
    fn of(&self, n_ranks: usize, n_stages: usize) -> Result<Costs> {
        let [f, i, w] = three(&self.costs)?;
        let mut costs = Costs::even(n_ranks, n_stages, f, i, w);
        if let Some(shares) = &self.stages {
            let shares: Vec<f64> = shares.split(',').map(seconds).collect::<Result<_>>()?;
            if !n_stages.is_multiple_of(shares.len()) {
                return Err(invalid(format!(
                    "{} relative costs are listed and there are {n_stages} stages; list one for each, or \
                     a number that divides them",
                    shares.len()
                )));
            }
            // A coarse list is refined: each entry stands for neighboring stages.
            let repeat = n_stages / shares.len();
            for (stage_idx, stage) in costs.stages.iter_mut().enumerate() {
                let share = shares[stage_idx / repeat];
                stage.forward_s *= share;
                stage.backward_input_s *= share;
                stage.backward_weight_s *= share;
            }
        }
        for stage in &mut costs.stages {
            stage.p2p_s = self.p2p;
        }
        costs.barrier = self.barrier;
        Ok(costs)
    }
}

/// F:I:W.
fn three(text: &str) -> Result<[f64; 3]> {
    let parts: Vec<&str> = text.split(':').collect();
    match parts.as_slice() {
        [f, i, w] => Ok([seconds(f)?, seconds(i)?, seconds(w)?]),
        _ => Err(invalid(format!(
            "`--costs {text}` is not F:I:W; write three numbers such as 1:1.4:0.8"
        ))),
    }
}

fn seconds(text: &str) -> Result<f64> {
    let value: Option<f64> = text.trim().parse().ok();
    value
        .filter(|value| value.is_finite() && *value >= 0.0)
        .ok_or_else(|| invalid(format!("`{text}` is no time; write a number such as 1.4")))
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
fn load(args: &ShowArgs) -> Result<(Schedule, Costs)> {
    let path = std::path::Path::new(&args.name);
    let extension = path.extension().and_then(|extension| extension.to_str());
    let shape = Shape::new(args.ranks, args.microbatches)
        .chunks(args.chunks.unwrap_or(1))
        .slices(args.slices.unwrap_or(1));
    let schedule = match extension {
        Some("csv") => Schedule::from_csv(stem(path), &read(path)?)
            .map_err(|error| pipeline_error(error.into()))?,
        Some("weave") => from_document(path, &shape)?,
        _ => {
            let builtin = named(&args.name)?;
            let n_chunks = args.chunks.or(builtin.fixed_chunks()).unwrap_or(2);
            let n_slices = args
                .slices
                .unwrap_or(if builtin.is_sliced() { 2 } else { 1 });
            let shape = shape.chunks(n_chunks).slices(n_slices);
            // Patterns are fitted to the costs, so these come first.
            let n_stages = args.ranks * n_chunks;
            let mut costs = args.costs.of(args.ranks, n_stages)?;
            costs.memory_limit_bytes = args.memory;
            build(builtin, &shape, Some(&costs)).map_err(pipeline_error)?
        }
    };
    check(&schedule).map_err(pipeline_error)?;
    let costs = args.costs.of(schedule.n_ranks, schedule.n_stages)?;
    Ok((schedule, costs))
}

fn stem(path: &std::path::Path) -> String {
    let stem = path
        .file_stem()
        .map(|stem| stem.to_string_lossy().into_owned());
    stem.unwrap_or_else(|| "schedule".into())
}

/// The first schedule that a document defines.
fn from_document(path: &std::path::Path, shape: &Shape) -> Result<Schedule> {
    let text = read(path)?;
    let parsed = meshweave_dsl::weave::parse(&text, SourceId(0));
    if !parsed.diagnostics.is_empty() {
        let mut sources = meshweave_dsl::diagnostics::Sources::new();
        sources.add(path.display().to_string(), text);
        return Err(Error::new(parsed.diagnostics, sources));
    }
    let Some(definition) = schedules::definitions(&parsed.document).next() else {
        return Err(invalid(format!(
            "{} defines no schedule; write `schedule mine = key F:(mb,0) B:(mb+P-r,-1)`",
            path.display()
        )));
    };
    let folder = path.parent().unwrap_or(std::path::Path::new("."));
    schedules::from_definition(definition, shape, folder).map_err(pipeline_error)
}

fn show(args: &ShowArgs, format: Format) -> Result<()> {
    let (schedule, mut costs) = load(args)?;
    if let Some(limit) = args.memory {
        check_memory(&schedule, &costs, limit).map_err(pipeline_error)?;
    }
    // Idle time counts as a wait for memory where the schedule's own peak leaves no room.
    let first = simulate(&schedule, &costs).map_err(pipeline_error)?;
    costs.memory_limit_bytes = Some(args.memory.unwrap_or(first.peak()));
    let simulation = simulate(&schedule, &costs).map_err(pipeline_error)?;
    if let Some(path) = &args.report {
        let page = report(&report_of(&schedule, &simulation, &costs));
        write_atomically(path, page.as_bytes())?;
    }
    if let Some(path) = &args.csv {
        write_atomically(path, schedule.to_csv().as_bytes())?;
    }
    match format {
        Format::Text => print!("{}", picture(&schedule, &simulation, &costs, args.width)?),
        Format::Json => println!("{}", json!({"schedule": schedule, "predicted": simulation})),
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

/// Columns of the terminal, less the labels.
fn columns() -> usize {
    let columns = std::env::var("COLUMNS")
        .ok()
        .and_then(|columns| columns.parse().ok());
    columns.unwrap_or(120usize).saturating_sub(16).max(40)
}

fn check_file(args: &CheckArgs, format: Format) -> Result<()> {
    let channels = match args.channels.as_str() {
        "blocking" => Channels::Blocking,
        "pair" => Channels::PerPair,
        "direction" => Channels::PerDirection,
        depth => Channels::Buffered(depth.parse().map_err(|_| {
            invalid(format!(
                "`--channels {depth}` is no channel model; write blocking, pair, direction, or a number"
            ))
        })?),
    };
    let schedule = Schedule::from_csv(stem(&args.file), &read(&args.file)?)
        .map_err(|error| pipeline_error(error.into()))?;
    check(&schedule).map_err(pipeline_error)?;
    let lowered = if args.naive {
        lower_naively(&schedule, channels)
    } else {
        let lowering = Lowering {
            channels,
            ..Lowering::default()
        };
        lower(&schedule, &lowering).map_err(pipeline_error)?
    };
    check_lowered(&lowered).map_err(pipeline_error)?;
    let costs = Costs::even(schedule.n_ranks, schedule.n_stages, 1.0, 1.0, 1.0);
    if let Some(limit) = args.memory {
        check_memory(&schedule, &costs, limit).map_err(pipeline_error)?;
    }
    let simulation = simulate(&schedule, &costs).map_err(pipeline_error)?;
    match format {
        Format::Text => println!(
            "{}: ok: {} ranks, {} stages, {} microbatches, {} actions; at equal costs idle {:.2} %, peak \
             {:.3} microbatches of a rank (predicted)",
            args.file.display(),
            schedule.n_ranks,
            schedule.n_stages,
            schedule.n_microbatches,
            schedule.n_actions(),
            100.0 * simulation.bubble_rate(),
            simulation.peak()
        ),
        Format::Json => println!(
            "{}",
            json!({"checked": args.file, "schedule": schedule, "peak": simulation.peak_bytes})
        ),
    }
    Ok(())
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
            print!("{}", table::text(&rows));
            let count =
                |is: fn(&Verdict) -> bool| rows.iter().filter(|row| is(&row.verdict)).count();
            println!(
                "\n{} rows: {} equal, {} differ for the reason given, {} undefined, {} broken",
                rows.len(),
                count(|verdict| *verdict == Verdict::Equal),
                count(|verdict| matches!(verdict, Verdict::Differs(_))),
                count(|verdict| matches!(verdict, Verdict::Undefined(_))),
                count(|verdict| *verdict == Verdict::Broken)
            );
        }
        Format::Json => println!("{}", json!({"rows": rows})),
    }
    Ok(())
}

fn find(args: &SearchArgs, format: Format) -> Result<()> {
    let stages = |placement, n_chunks| -> Result<Stages> {
        Ok(Stages {
            placement,
            n_chunks,
            costs: args.costs.of(args.ranks, args.ranks * n_chunks)?,
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
            let n_stages = found.schedule.n_stages;
            let mut costs = args.costs.of(args.ranks, n_stages)?;
            costs.memory_limit_bytes = options.memory_limit_bytes;
            print!(
                "{}",
                picture(&found.schedule, &found.simulation, &costs, args.width)?
            );
            println!(
                "\nbuilt-in schedules within {:.3} (predicted)",
                args.memory.unwrap_or(args.ranks as f64)
            );
            for candidate in &found.builtins {
                println!(
                    "  {:<15} v={}  step {:>10.3} s  {:+7.2} %  peak {:.3}",
                    candidate.name,
                    candidate.n_chunks,
                    candidate.step_s,
                    100.0 * (candidate.step_s / found.simulation.step_s - 1.0),
                    candidate.peak_bytes
                );
            }
            println!("{} schedules were simulated", found.n_simulated);
        }
        Format::Json => println!("{}", json!({"found": found})),
    }
    Ok(())
}
