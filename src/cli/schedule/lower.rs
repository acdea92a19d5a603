//! `meshweave schedule lower`: a schedule with its communication and memory actions, and the queues of
//! its devices in time.

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use meshweave_compiler::schedule::{
    CommandCosts, DeviceRun, Lowering, WaitFor, check_lowered, lower, run_queues, simulate, streams,
};
use meshweave_dsl::schedule::{Command, DeviceStreams, Lowered, StreamKind, Verb, Wire};
use meshweave_dsl::weave::Document;
use meshweave_dsl::weave::ast::{Block, Name, Statement};
use serde_json::json;

use super::{PipelineArgs, channels, columns, invalid, load, pipeline_error, written};
use crate::cli::output::{out, outln};
use crate::cli::{Format, write_atomically};
use crate::error::Result;

#[derive(Debug, Args)]
pub(super) struct LowerArgs {
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// Channel model: blocking, pair, direction, or the depth of buffers.
    #[arg(long, default_value = "direction")]
    channels: String,
    /// Weights are divided over data parallelism: keep those of so many stages of a rank gathered.
    #[arg(long, value_name = "STAGES")]
    unshard: Option<usize>,
    /// Seconds that gathering a rank's weights takes.
    #[arg(long, default_value_t = 0.0)]
    unshard_time: f64,
    /// What a rank's weights take while they are gathered, in activations of a rank's microbatch.
    #[arg(long, default_value_t = 0.0)]
    weights: f64,
    /// Reduce gradients; seconds that those of a rank take.
    #[arg(long, value_name = "SECONDS")]
    reduce: Option<f64>,
    /// Stages whose activations rest on the host between forward and backward, such as `0,1`.
    #[arg(long, value_delimiter = ',')]
    offload: Vec<u32>,
    /// Seconds that the activations of a rank's microbatch take to the host, or back.
    #[arg(long, default_value_t = 0.0)]
    offload_time: f64,
    /// Update weights; seconds that those of a rank take.
    #[arg(long, value_name = "SECONDS")]
    update: Option<f64>,
    /// Print the queues with their events instead of the rows.
    #[arg(long)]
    streams: bool,
    /// Also write the rows as CSV, as PyTorch does.
    #[arg(long)]
    csv: Option<PathBuf>,
    /// Also write what is printed, rows or queues, as a document.
    #[arg(long)]
    weave: Option<PathBuf>,
    /// Columns of the picture; the terminal's where absent.
    #[arg(long)]
    width: Option<usize>,
}

pub(super) fn show_lowered(args: &LowerArgs, format: Format) -> Result<()> {
    let channels = channels(&args.channels)?;
    let (lowered, devices) = match written(&args.pipeline.name, channels)? {
        Some(found) => {
            if args.unshard.is_some() || !args.offload.is_empty() {
                return Err(invalid(format!(
                    "{} has its communication and memory actions already; leave `--unshard` and \
                     `--offload` out, or its actions",
                    args.pipeline.name
                )));
            }
            found
        }
        None => {
            let (schedule, _) = load(&args.pipeline)?;
            let lowering = Lowering {
                channels,
                unsharded_stages: args.unshard,
                reduce_gradients: args.reduce.is_some(),
                offloaded_stages: args.offload.clone(),
                barrier: args.pipeline.costs.barrier,
                update: args.update.is_some(),
            };
            let lowered = lower(&schedule, &lowering).map_err(pipeline_error)?;
            check_lowered(&lowered).map_err(pipeline_error)?;
            let devices = streams(&lowered);
            (lowered, devices)
        }
    };
    let schedule = &lowered.schedule;
    let stage_rank = &schedule.stage_rank[..schedule.n_stages];
    let costs = args.pipeline.costs.of(stage_rank, schedule.n_ranks)?;
    // A rank's seconds and bytes are shared by its stages.
    let share = schedule.n_ranks as f64 / schedule.n_stages.max(1) as f64;
    let of_stage = CommandCosts {
        unshard_s: args.unshard_time * share,
        gathered_bytes: args.weights * share,
        reduce_s: args.reduce.unwrap_or(0.0) * share,
        copy_s: args.offload_time * share,
        update_s: args.update.unwrap_or(0.0) * share,
    };
    let commands = vec![of_stage; schedule.n_stages];
    let run = run_queues(&lowered, &devices, &costs, &commands).map_err(pipeline_error)?;
    let alone = simulate(schedule, &costs).map_err(pipeline_error)?;
    if let Some(path) = &args.csv {
        write_atomically(path, lowered.to_csv().as_bytes())?;
    }
    let text = document(&lowered, args.streams.then_some(devices.as_slice()));
    if let Some(path) = &args.weave {
        write_atomically(path, text.as_bytes())?;
    }
    match format {
        Format::Text => {
            out!(
                "{text}\n{}{}",
                lanes(&lowered, &devices, &run, args.width.unwrap_or_else(columns)),
                figures(&run, alone.step_s, alone.peak())
            );
        }
        Format::Json => outln!(
            "{}",
            json!({"lowered": lowered, "devices": devices, "predicted": run})
        ),
    }
    Ok(())
}

fn figures(run: &DeviceRun, alone_s: f64, alone_peak: f64) -> String {
    let most = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
    let mut text = format!(
        "\npredicted  step {:.3} s  actions and messages alone {alone_s:.3} s\n\
         peak of a device {:.3}  of a host {:.3}  of activations alone {alone_peak:.3}, in microbatches of \
         a rank\ncomputation of the mean rank waits (predicted)",
        run.step_s,
        most(&run.device_peak_bytes),
        most(&run.host_peak_bytes),
    );
    for (what, seconds) in WaitFor::ALL.iter().zip(run.waits_s) {
        let _ = write!(text, "  for {} {seconds:.3} s", what.text());
    }
    text.push('\n');
    text
}

/// A document that defines the schedule: its rows, or the queues of its devices.
fn document(lowered: &Lowered, devices: Option<&[DeviceStreams]>) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let name: String = lowered
        .schedule
        .name
        .chars()
        .filter(|c| is_plain(*c))
        .collect();
    let name = Name::new(&name).unwrap_or_else(|_| Name::literal("lowered"));
    let definition = match devices {
        Some(devices) => lowered.streams_statement(devices, name),
        None => lowered.to_statement(name),
    };
    let body = Block::of([Statement::Schedule(definition)]);
    meshweave_dsl::weave::print(&Document { body })
}

/// A line a queue that takes time, time across.
fn lanes(lowered: &Lowered, devices: &[DeviceStreams], run: &DeviceRun, width: usize) -> String {
    let width = width.max(20);
    let column_s = run.step_s.max(f64::MIN_POSITIVE) / width as f64;
    let column_of = |at_s: f64| ((at_s / column_s + 1e-9) as usize).min(width);
    let mut text = String::new();
    for device in devices {
        for stream in &device.streams {
            let span = |event: usize| run.spans[device.rank][event];
            let is_timed =
                |item: &meshweave_dsl::schedule::Item| span(item.event.0).seconds() > 0.0;
            if stream.kind != StreamKind::Compute && !stream.items.iter().any(is_timed) {
                continue;
            }
            let mut line = vec!['·'; width];
            for item in &stream.items {
                let at = span(item.event.0);
                let range = column_of(at.start_s)..column_of(at.end_s);
                let name = name_of(item.command);
                let name = name.chars();
                for (column, sign) in range.clone().zip(name.chain(std::iter::repeat(' '))) {
                    line[column] = sign;
                }
            }
            let line: String = line.into_iter().collect();
            let name = stream.kind.to_string();
            let _ = writeln!(text, "rank {:>2} {name:<10} {line}", device.rank);
        }
    }
    let _ = writeln!(
        text,
        "{} queues of {} ranks; lines are time, from 0 to {:.3} s (predicted)",
        devices
            .iter()
            .map(|device| device.streams.len())
            .sum::<usize>(),
        lowered.rows.len(),
        run.step_s
    );
    text
}

fn name_of(command: Command) -> String {
    let microbatch = command
        .microbatch
        .map_or_else(String::new, |microbatch| microbatch.to_string());
    let sign = match command.verb {
        Verb::Compute(kind) => kind.text(),
        Verb::Send(Wire::F) => ">",
        Verb::Send(Wire::B) => "<",
        Verb::Recv(_) => "r",
        Verb::Unshard => "U",
        Verb::Reshard => "-",
        Verb::ReduceGrad => "+",
        Verb::Offload => "v",
        Verb::Prefetch => "^",
        Verb::Barrier => "|",
        Verb::Update => "*",
    };
    let of = match command.verb {
        Verb::Unshard | Verb::ReduceGrad | Verb::Update => command.stage.to_string(),
        _ => microbatch,
    };
    format!("{sign}{of}")
}
