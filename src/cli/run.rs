//! `meshweave run`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use meshweave_compiler::partition::Keep;
use meshweave_compiler::resolve::{Init, Job};
use meshweave_compiler::show::{perfetto, report};
use meshweave_dsl::diagnostics::Class;
use meshweave_dsl::graph::Role;
use meshweave_dsl::program::Program;
use meshweave_dsl::timeline::Timeline;
use meshweave_runtime::artifact;
use meshweave_runtime::data::DataSource;
use meshweave_runtime::executor::{Session as Execution, SessionOptions};
use meshweave_runtime::pretrained::Pretrained;
use meshweave_runtime::tensor::{Elements, HostTensor};
use serde_json::json;

use super::calibrate::{Calibrated, Origin, calibrated};
use super::render::{bytes, plan_summary, seconds, sparkline};
use super::{Format, runtime_error, write_atomically};
use crate::compile::{CompileOptions, Compiled, target_features};
use crate::error::{Error, Result};
use crate::report::{Shown, predicted_timeline, report_input};
use crate::session::Session;

#[derive(Debug, Args)]
pub struct RunArgs {
    /// A .weave document, which is planned and compiled first, or an artifact folder.
    input: PathBuf,
    /// Use this cluster instead of the document's: a preset such as `local:8`, or a .weave file.
    #[arg(long)]
    cluster: Option<String>,
    /// Steps to run; the document's number by default.
    #[arg(long)]
    steps: Option<usize>,
    /// How parameters start: `golden`, `random:SEED`, or a folder with safetensors.
    #[arg(long)]
    init: Option<String>,
    /// Text to train on, a token a byte; the document's by default, else the golden model's tokens.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Threads of each device; by default the cores divided by the devices.
    #[arg(long)]
    threads: Option<usize>,
    /// Write the HTML report here (documents only).
    #[arg(long)]
    report: Option<PathBuf>,
    /// Write the predicted and the measured timeline here, for Perfetto.
    #[arg(long)]
    trace: Option<PathBuf>,
    /// Save parameters and optimizer state here at the end (safetensors).
    #[arg(long)]
    save: Option<PathBuf>,
    /// Start from parameters and state saved with --save, under any plan.
    #[arg(long)]
    resume: Option<PathBuf>,
    /// Correct the cluster's constants by what this run measures, write the cluster here, and say
    /// which plan is best on it (documents only).
    #[arg(long)]
    calibrate: Option<PathBuf>,
    /// Compare the first step with the serial f64 interpreter: loss and every gradient (documents only).
    #[arg(long)]
    verify: bool,
}

/// A program ready to start, and what is known of where it comes from.
struct Prepared {
    execution: Execution,
    n_steps: usize,
    init: Init,
    data: Option<PathBuf>,
    origin: Option<Origin>,
}

/// What a run measured.
#[derive(Default)]
struct Outcome {
    losses: Vec<f64>,
    /// Wall seconds of every step.
    step_s: Vec<f64>,
    timeline: Option<Timeline>,
    /// What that timeline says of the cluster, where it was asked for.
    calibrated: Option<Calibrated>,
}

/// Runs a document or an artifact.
pub fn run(args: &RunArgs, format: Format) -> Result<()> {
    let mut prepared = if args.input.is_dir() {
        from_artifact(args)?
    } else {
        from_document(args, format)?
    };
    if let Some(data) = &args.data {
        prepared.data = Some(data.clone());
    }
    initialize(&mut prepared)?;
    if let Some(path) = &args.resume {
        meshweave_runtime::checkpoint::restore(&mut prepared.execution, path)
            .map_err(runtime_error)?;
    }
    let data = data_source(&prepared)?;
    let n_steps = args.steps.unwrap_or(prepared.n_steps);
    let mut outcome = Outcome::default();
    let checked = if args.verify {
        Some(verify(&mut prepared, &data, &mut outcome)?)
    } else {
        None
    };
    steps(
        &mut prepared.execution,
        &data,
        n_steps,
        format,
        &mut outcome,
    )?;
    if let Some(path) = &args.save {
        meshweave_runtime::checkpoint::save(&prepared.execution, path).map_err(runtime_error)?;
    }
    write_pictures(args, &prepared, &outcome)?;
    if let (Some(path), Some(origin), Some(timeline)) =
        (&args.calibrate, &prepared.origin, &outcome.timeline)
    {
        let found = calibrated(origin, prepared.execution.program(), timeline)?;
        found.write(path)?;
        outcome.calibrated = Some(found);
    }
    print(args, &prepared, &outcome, checked.as_ref(), format);
    Ok(())
}

fn from_artifact(args: &RunArgs) -> Result<Prepared> {
    for (given, flag) in [
        (args.report.is_some(), "--report"),
        (args.verify, "--verify"),
        (args.cluster.is_some(), "--cluster"),
        (args.calibrate.is_some(), "--calibrate"),
    ] {
        if given {
            return Err(Error::plain(
                Class::Invalid,
                format!("{flag} needs the document; an artifact holds the program only"),
            )
            .help("run the .weave document instead"));
        }
    }
    let (program, kernels) = artifact::load(&args.input).map_err(runtime_error)?;
    let init = args.init.as_deref().map_or(Ok(Init::Golden), parse_init)?;
    Ok(Prepared {
        execution: Execution::new(program, kernels, &options(args, &init))
            .map_err(runtime_error)?,
        n_steps: 10,
        init,
        data: None,
        origin: None,
    })
}

fn from_document(args: &RunArgs, format: Format) -> Result<Prepared> {
    let session = Session::open(&args.input, args.cluster.as_deref())?;
    let init = args
        .init
        .as_deref()
        .map_or_else(|| Ok(session.request.init.clone()), parse_init)?;
    let model = session.model()?;
    let solution = session.plan(&model)?;
    if format == Format::Text {
        eprint!("{}", plan_summary(&session.request, &solution));
        if let Some(choice) = &session.choice {
            eprint!("{}", choice.text());
        }
    }
    let keep = if args.verify {
        Keep::Gradients
    } else {
        Keep::Outputs
    };
    let compile_options = CompileOptions {
        keep,
        ..CompileOptions::default()
    };
    let compiled = session.compile(&model, &solution.plan, &compile_options)?;
    if format == Format::Text {
        let compile_s: f64 = compiled.seconds.iter().map(|(_, seconds)| seconds).sum();
        eprintln!(
            "compiled   {} kernels in {} (measured)",
            compiled.program.kernels.len(),
            seconds(compile_s)
        );
    }
    let Compiled {
        program,
        kernels,
        locals,
        ..
    } = compiled;
    // The way of every artifact: what runs is what was written and read back.
    let folder = tempfile::tempdir().map_err(|error| {
        Error::plain(
            Class::Exhausted,
            format!("cannot make a temporary folder: {error}"),
        )
    })?;
    let path = folder.path().join("artifact");
    artifact::write(&path, &program, &kernels, &target_features()).map_err(runtime_error)?;
    let (program, kernels) = artifact::load(&path).map_err(runtime_error)?;
    let n_steps = match &session.request.job {
        Job::Train { n_steps, .. } => *n_steps,
        Job::Infer { .. } => 1,
    };
    Ok(Prepared {
        execution: Execution::new(program, kernels, &options(args, &init))
            .map_err(runtime_error)?,
        n_steps,
        init,
        data: session.request.data.clone(),
        origin: Some(Origin {
            session,
            model,
            solution,
            locals,
        }),
    })
}

fn options(args: &RunArgs, init: &Init) -> SessionOptions {
    let seed = match init {
        Init::Random { seed } => *seed as u32,
        Init::Golden | Init::Load(_) => 0,
    };
    SessionOptions {
        threads_per_device: args.threads,
        seed,
        ..SessionOptions::default()
    }
}

fn parse_init(text: &str) -> Result<Init> {
    match text.split_once(':') {
        _ if text == "golden" => Ok(Init::Golden),
        _ if text == "random" => Ok(Init::Random { seed: 1 }),
        Some(("random", seed)) => seed.parse().map(|seed| Init::Random { seed }).map_err(|_| {
            Error::plain(Class::Invalid, format!("`{seed}` is no seed"))
                .help("write a whole number, as in `--init random:7`")
        }),
        _ => Ok(Init::Load(PathBuf::from(text))),
    }
}

/// Gives parameters their first values where the program's own rule is not what was asked for.
fn initialize(prepared: &mut Prepared) -> Result<()> {
    match prepared.init.clone() {
        // By the seed that the execution was started with.
        Init::Golden | Init::Random { .. } => Ok(()),
        Init::Load(path) => {
            let Some(origin) = &prepared.origin else {
                return Err(Error::plain(
                    Class::Invalid,
                    "weights are read by the model's config, which an artifact does not hold",
                )
                .help("run the .weave document, or give the artifact a checkpoint with --resume"));
            };
            let Some(map) = &origin.model.weights else {
                return Err(Error::plain(Class::Invalid, format!("the document's model is not imported, so {} has no names for it", path.display()))
                    .help("name a Hugging Face config.json as the model, or use --resume for a checkpoint of `run --save`"));
            };
            let pretrained = Pretrained::open(&path).map_err(runtime_error)?;
            pretrained
                .check(map, &origin.model.graph)
                .map_err(runtime_error)?;
            for id in origin.model.graph.params() {
                let tensor = origin.model.graph.tensor(id);
                let values = pretrained
                    .read_all(map, &tensor.name, &tensor.ty)
                    .map_err(runtime_error)?;
                let value = HostTensor::new(tensor.ty.clone(), Elements::F32(values))
                    .map_err(runtime_error)?;
                prepared
                    .execution
                    .set(&tensor.name, &value)
                    .map_err(runtime_error)?;
            }
            Ok(())
        }
    }
}

fn data_source(prepared: &Prepared) -> Result<DataSource> {
    let vocab = vocab(prepared.execution.program());
    match &prepared.data {
        None => Ok(DataSource::Golden { vocab }),
        Some(path) => {
            let data = DataSource::text_file(path).map_err(runtime_error)?;
            let greatest = greatest_byte(&data);
            if greatest >= vocab {
                return Err(Error::plain(
                    Class::Invalid,
                    format!(
                        "{} has a byte {greatest}, the model's vocabulary has {vocab} tokens",
                        path.display()
                    ),
                )
                .help(
                    "a token is a byte: give the model `vocab 256`, or a text of smaller bytes",
                ));
            }
            Ok(data)
        }
    }
}

fn greatest_byte(data: &DataSource) -> usize {
    match data {
        DataSource::Text(text) => text.iter().copied().max().map_or(0, usize::from),
        DataSource::Golden { vocab } => vocab.saturating_sub(1),
    }
}

/// Size of the vocabulary: that of the embedding table.
fn vocab(program: &Program) -> usize {
    let sizes = program
        .sources
        .iter()
        .filter_map(|source| source.ty.size_of(&"vocab".into()));
    sizes.max().unwrap_or(256)
}

fn give_batch(execution: &mut Execution, data: &DataSource, step: usize) -> Result<()> {
    let input = |name: &str| {
        execution
            .program()
            .sources
            .iter()
            .find(|source| source.name == name && source.role == Role::Input)
    };
    let Some(tokens) = input("tokens") else {
        return Ok(());
    };
    let size = |dim: &str| tokens.ty.size_of(&dim.into()).unwrap_or(1);
    let has_targets = input("targets").is_some();
    let batch = data
        .batch(step, size("batch"), size("seq"))
        .map_err(runtime_error)?;
    let (tokens, targets) = batch.tensors().map_err(runtime_error)?;
    execution.set("tokens", &tokens).map_err(runtime_error)?;
    if has_targets {
        execution.set("targets", &targets).map_err(runtime_error)?;
    }
    Ok(())
}

fn steps(
    execution: &mut Execution,
    data: &DataSource,
    n_steps: usize,
    format: Format,
    outcome: &mut Outcome,
) -> Result<()> {
    let bar = if format == Format::Text {
        ProgressBar::new(n_steps as u64)
    } else {
        ProgressBar::hidden()
    };
    if let Ok(style) = ProgressStyle::with_template(
        "training   {bar:32} {pos}/{len}  {msg}  [{elapsed}, {eta} left]",
    ) {
        bar.set_style(style);
    }
    let has_loss = execution.loss().is_ok();
    bar.set_position(outcome.losses.len() as u64);
    for _ in outcome.losses.len()..n_steps {
        let step = execution.n_steps();
        give_batch(execution, data, step)?;
        let start = Instant::now();
        let timeline = execution.step().map_err(runtime_error)?;
        outcome.step_s.push(start.elapsed().as_secs_f64());
        if has_loss {
            let loss = execution.loss().map_err(runtime_error)?;
            if !loss.is_finite() {
                return Err(Error::plain(
                    Class::Invalid,
                    format!("the loss of step {step} is {loss}"),
                )
                .help("a smaller learning rate, or other initial weights, may help"));
            }
            bar.set_message(format!("loss {loss:.4}"));
            outcome.losses.push(loss);
        }
        // The quietest step shows the program, not the machine's other work.
        let best = outcome
            .timeline
            .as_ref()
            .is_none_or(|best| timeline.step_s() < best.step_s());
        if best {
            outcome.timeline = Some(timeline);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

/// Runs the first step and compares it with the serial interpreter: relative error of the loss and
/// of every gradient, by name.
fn verify(
    prepared: &mut Prepared,
    data: &DataSource,
    outcome: &mut Outcome,
) -> Result<BTreeMap<String, f64>> {
    use meshweave_runtime::reference::{Stepper, Value};
    let Some(origin) = &prepared.origin else {
        return Ok(BTreeMap::new());
    };
    let graph = origin.model.whole();
    let reference =
        |error: meshweave_runtime::reference::ReferenceError| Error::plain(Class::Internal, error);
    let as_value = |tensor: HostTensor| {
        let elements = match tensor.elements() {
            Elements::F32(elements) => elements.iter().map(|x| f64::from(*x)).collect(),
            Elements::I32(elements) => elements.iter().map(|x| f64::from(*x)).collect(),
        };
        Value::new(tensor.ty().clone(), elements).map_err(reference)
    };
    let mut stepper = Stepper::new(graph).map_err(reference)?;
    for id in graph.params() {
        let value = prepared
            .execution
            .get(&graph.tensor(id).name)
            .map_err(runtime_error)?;
        stepper.set(id, as_value(value)?);
    }
    give_batch(&mut prepared.execution, data, 0)?;
    let mut inputs = BTreeMap::new();
    for name in ["tokens", "targets"] {
        if let Some(id) = graph.find(name) {
            inputs.insert(
                id,
                as_value(prepared.execution.get(name).map_err(runtime_error)?)?,
            );
        }
    }
    let truth = stepper.step(&inputs).map_err(reference)?;
    prepared.execution.step().map_err(runtime_error)?;
    outcome.losses.extend(prepared.execution.loss().ok());
    let mut errors = BTreeMap::new();
    for (output, expected) in graph.outputs.iter().zip(&truth.outputs) {
        let name = &graph.tensor(*output).name;
        let got = as_value(prepared.execution.get(name).map_err(runtime_error)?)?;
        errors.insert(name.clone(), got.relative_error(expected));
    }
    for (param, gradient) in &graph.gradients {
        let name = &graph.tensor(*gradient).name;
        let got = as_value(prepared.execution.get(name).map_err(runtime_error)?)?;
        if let Some(expected) = truth.gradients.get(param) {
            errors.insert(name.clone(), got.relative_error(expected));
        }
    }
    Ok(errors)
}

fn write_pictures(args: &RunArgs, prepared: &Prepared, outcome: &Outcome) -> Result<()> {
    let program = prepared.execution.program();
    if let (Some(path), Some(origin)) = (&args.report, &prepared.origin) {
        let shown = Shown {
            session: &origin.session,
            model: &origin.model,
            solution: &origin.solution,
            program,
        };
        let input = report_input(
            &shown,
            origin.locals.first().cloned(),
            outcome.timeline.clone(),
            outcome.losses.clone(),
        )?;
        write_atomically(path, report(&input).as_bytes())?;
    }
    if let Some(path) = &args.trace {
        let timelines: Vec<Timeline> = std::iter::once(predicted_timeline(program))
            .chain(outcome.timeline.clone())
            .collect();
        write_atomically(
            path,
            perfetto(&timelines, Some(program)).to_string().as_bytes(),
        )?;
    }
    Ok(())
}

fn print(
    args: &RunArgs,
    prepared: &Prepared,
    outcome: &Outcome,
    checked: Option<&BTreeMap<String, f64>>,
    format: Format,
) {
    let program = prepared.execution.program();
    let predicted = predicted_timeline(program);
    let predicted_s = predicted.step_s();
    let mut sorted = outcome.step_s.clone();
    sorted.sort_by(f64::total_cmp);
    let median_s = sorted.get(sorted.len() / 2).copied();
    let arena_bytes = prepared.execution.arena_bytes();
    let peak_bytes = arena_bytes.iter().copied().max().unwrap_or(0);
    let planned_bytes = program
        .ranks
        .iter()
        .map(|rank| rank.arena_bytes)
        .max()
        .unwrap_or(0);
    if format == Format::Json {
        println!(
            "{}",
            json!({
                "losses": outcome.losses,
                "step_s": {"predicted": predicted_s, "measured_median": median_s, "measured": outcome.step_s},
                "memory_bytes": {"predicted": planned_bytes, "measured": arena_bytes},
                "idle_part": {"predicted": predicted.idle_part(), "measured": outcome.timeline.as_ref().map(Timeline::idle_part)},
                "actions": {
                    "predicted": predicted.actions(program),
                    "measured": outcome.timeline.as_ref().map(|timeline| timeline.actions(program)),
                },
                "errors": checked,
                "report": args.report,
                "trace": args.trace,
                "calibrated": outcome.calibrated.as_ref().map(Calibrated::json),
            })
        );
        return;
    }
    if let Some(errors) = checked {
        let worst = errors.iter().max_by(|a, b| a.1.total_cmp(b.1));
        if let Some((name, error)) = worst {
            println!(
                "verified   {} tensors against the serial f64 model; greatest relative error {error:.1e} ({name})",
                errors.len()
            );
        }
    }
    if let Some(median_s) = median_s {
        println!(
            "step time  {} predicted, {} measured (median of {})",
            seconds(predicted_s),
            seconds(median_s),
            sorted.len()
        );
    }
    let request = prepared
        .origin
        .as_ref()
        .map(|origin| &origin.session.request);
    if let Some(pipeline) = request.and_then(|request| request.pipeline.as_ref()) {
        let schedule = &pipeline.schedule;
        let measured = outcome
            .timeline
            .as_ref()
            .map(|timeline| format!(", {:.0} % measured", 100.0 * timeline.idle_part()));
        println!(
            "pipeline   {}: {} stages on {} ranks, {} microbatches; idle {:.0} % predicted{}",
            schedule.name,
            schedule.n_stages,
            schedule.n_ranks,
            schedule.n_microbatches,
            100.0 * predicted.idle_part(),
            measured.unwrap_or_default()
        );
    }
    println!(
        "memory     {} a device predicted, {} allocated",
        bytes(planned_bytes as f64),
        bytes(peak_bytes as f64)
    );
    if let (Some(first), Some(last)) = (outcome.losses.first(), outcome.losses.last()) {
        println!(
            "loss       {first:.6} → {last:.6}  {}",
            sparkline(&outcome.losses, 48)
        );
    }
    if outcome.losses.len() <= 10 && !outcome.losses.is_empty() {
        let losses: Vec<String> = outcome
            .losses
            .iter()
            .map(|loss| format!("{loss:.6}"))
            .collect();
        println!("losses     {}", losses.join(" "));
    }
    if let Some(calibrated) = &outcome.calibrated {
        println!("{}", calibrated.text());
    }
    for path in [&args.report, &args.trace, &args.save, &args.calibrate]
        .into_iter()
        .flatten()
    {
        println!("wrote      {}", absolute(path));
    }
}

fn absolute(path: &Path) -> String {
    std::path::absolute(path)
        .unwrap_or_else(|_| path.to_path_buf())
        .display()
        .to_string()
}
