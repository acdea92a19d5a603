//! `meshweave trace`.

use std::fmt::Write as _;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use meshweave_dsl::diagnostics::Class;
use meshweave_dsl::trace::import::{Engine, Known, read};
use meshweave_dsl::trace::statistics::{LayerSummary, load, summarize, transitions};
use meshweave_dsl::trace::synth::{Load, Router};
use meshweave_dsl::trace::{RoutingTrace, TraceShape, file};
use serde_json::json;

use super::decode::{DecodeArgs, decode};
use super::place::{trace_error, unreadable};
use super::{Format, write_atomically};
use crate::cli::output::{out, outln};
use crate::error::{Error, Result};

#[derive(Debug, Args)]
pub struct TraceArgs {
    #[command(subcommand)]
    command: TraceCommand,
}

#[derive(Debug, Subcommand)]
enum TraceCommand {
    /// Make the trace of a synthetic router.
    Synth(SynthArgs),
    /// Say what a trace holds: load, balance and affinity of every layer.
    Stats(StatsArgs),
    /// Turn another engine's recording into a trace.
    Import(ImportArgs),
    /// Decode over a trace's routes: one exchange of tokens a layer against two.
    Decode(DecodeArgs),
}

#[derive(Debug, Args)]
struct SynthArgs {
    #[arg(long)]
    layers: usize,
    #[arg(long)]
    experts: usize,
    #[arg(long, default_value_t = 1)]
    top_k: usize,
    #[arg(long)]
    tokens: usize,
    /// Groups that experts of a layer fall into; tokens stay in theirs unless by noise.
    #[arg(long, default_value_t = 1)]
    topics: usize,
    /// Probability that a choice forgets the one before.
    #[arg(long, default_value_t = 0.3)]
    noise: f64,
    /// Of the Dirichlet rows within a topic: small means few successors; uniform where absent.
    #[arg(long)]
    concentration: Option<f64>,
    /// Exponent of Zipf-distributed popularity.
    #[arg(long, conflicts_with = "lognormal")]
    zipf: Option<f64>,
    /// σ of lognormal popularity.
    #[arg(long)]
    lognormal: Option<f64>,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where to write it (Parquet).
    #[arg(long, short)]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct StatsArgs {
    trace: PathBuf,
}

#[derive(Debug, Args)]
struct ImportArgs {
    /// Megatron-Core: router_trace_rank*.jsonl. vLLM, SGLang: responses with `routed_experts`.
    #[arg(required = true)]
    recordings: Vec<PathBuf>,
    #[arg(long, value_enum)]
    from: Recorder,
    /// Experts a layer, where not all of them occur.
    #[arg(long)]
    experts: Option<usize>,
    /// Name of the model, for the file.
    #[arg(long)]
    model: Option<String>,
    /// Where to write it (Parquet).
    #[arg(long, short)]
    out: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Recorder {
    Megatron,
    Vllm,
    Sglang,
}

/// Makes, describes or imports routing traces.
pub fn trace(args: &TraceArgs, format: Format) -> Result<()> {
    match &args.command {
        TraceCommand::Synth(args) => synth(args, format),
        TraceCommand::Stats(args) => stats(args, format),
        TraceCommand::Import(args) => import(args, format),
        TraceCommand::Decode(args) => decode(args, format),
    }
}

fn synth(args: &SynthArgs, format: Format) -> Result<()> {
    let router = Router {
        shape: TraceShape {
            layers: args.layers,
            experts: args.experts,
            top_k: args.top_k,
        },
        topics: args.topics,
        noise: args.noise,
        concentration: args.concentration.unwrap_or(f64::INFINITY),
        load: match (args.zipf, args.lognormal) {
            (Some(s), _) => Load::Zipf(s),
            (None, Some(sigma)) => Load::LogNormal(sigma),
            (None, None) => Load::Uniform,
        },
        seed: args.seed,
    };
    let trace = router.trace(args.tokens).map_err(trace_error)?;
    save(&trace, 0, &args.out, format)
}

fn import(args: &ImportArgs, format: Format) -> Result<()> {
    let engine = match args.from {
        Recorder::Megatron => Engine::Megatron,
        Recorder::Vllm => Engine::Vllm,
        Recorder::Sglang => Engine::Sglang,
    };
    let mut all: Option<RoutingTrace> = None;
    let mut n_left_out = 0;
    for path in &args.recordings {
        let text = File::open(path).map_err(|error| unreadable(path, error))?;
        let known = Known {
            experts: args.experts,
            model: args.model.clone(),
        };
        let imported = read(engine, &mut BufReader::new(text), &known)
            .map_err(|error| trace_error(error).help(format!("in {}", path.display())))?;
        n_left_out += imported.n_left_out;
        let Some(all) = &mut all else {
            all = Some(imported.trace);
            continue;
        };
        let (one, other) = (all.shape(), imported.trace.shape());
        if one != other {
            return Err(Error::plain(
                Class::Invalid,
                format!(
                    "{} has {} layers of {} experts, top-{}; the recordings before it have {} of \
                     {}, top-{}",
                    path.display(),
                    other.layers,
                    other.experts,
                    other.top_k,
                    one.layers,
                    one.experts,
                    one.top_k
                ),
            )
            .help("import one model at a time, and give --experts where not all experts occur"));
        }
        for token in 0..imported.trace.n_tokens() {
            let (choices, weights) = (
                imported.trace.token(token),
                imported.trace.token_weights(token),
            );
            all.push(choices, weights).map_err(trace_error)?;
        }
    }
    match all {
        Some(all) => save(&all, n_left_out, &args.out, format),
        None => Err(Error::plain(Class::Invalid, "no recordings were given")),
    }
}

fn save(trace: &RoutingTrace, n_left_out: usize, path: &Path, format: Format) -> Result<()> {
    let mut written = Vec::new();
    file::write(trace, &mut written).map_err(trace_error)?;
    write_atomically(path, &written)?;
    let shape = trace.shape();
    match format {
        Format::Text => {
            outln!(
                "{}: {} tokens, {} layers of {} experts, top-{}",
                path.display(),
                trace.n_tokens(),
                shape.layers,
                shape.experts,
                shape.top_k
            );
            if n_left_out > 0 {
                outln!("left out {n_left_out} tokens that were not recorded in every layer");
            }
        }
        Format::Json => outln!(
            "{}",
            json!({
                "path": path,
                "tokens": trace.n_tokens(),
                "left_out": n_left_out,
                "shape": shape,
            })
        ),
    }
    Ok(())
}

fn stats(args: &StatsArgs, format: Format) -> Result<()> {
    let trace = file::read(&args.trace).map_err(trace_error)?;
    if trace.n_tokens() == 0 {
        return Err(Error::plain(
            Class::Invalid,
            format!("{} has no tokens", args.trace.display()),
        ));
    }
    let layers = summarize(&load(&trace), &transitions(&trace));
    match format {
        Format::Text => out!("{}", render(&trace, &layers)),
        Format::Json => outln!(
            "{}",
            json!({
                "model": trace.model(),
                "tokens": trace.n_tokens(),
                "shape": trace.shape(),
                "layers": layers,
            })
        ),
    }
    Ok(())
}

fn render(trace: &RoutingTrace, layers: &[LayerSummary]) -> String {
    let shape = trace.shape();
    let mut text = format!(
        "{} tokens of {}, {} layers of {} experts, top-{} (measured)\n\
         layer  balancedness  busiest expert  its share  idle  affinity to next\n",
        trace.n_tokens(),
        trace.model().unwrap_or("an unnamed model"),
        shape.layers,
        shape.experts,
        shape.top_k
    );
    for layer in layers {
        let affinity = layer
            .affinity
            .map_or("-".to_string(), |affinity| format!("{affinity:.4}"));
        // Writing into a string cannot fail.
        let _ = writeln!(
            text,
            "{:>5}  {:>12.4}  {:>14}  {:>9.4}  {:>4}  {:>16}",
            layer.layer,
            layer.balancedness,
            layer.busiest_expert,
            layer.busiest_share,
            layer.idle_experts,
            affinity
        );
    }
    text
}
