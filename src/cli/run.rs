//! `meshweave run`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use meshweave_compiler::partition::Keep;
use meshweave_compiler::resolve::{Init, Job};
use meshweave_compiler::show::{perfetto, report};
use meshweave_dsl::diagnostics::Class;
use meshweave_dsl::program::Program;
use meshweave_dsl::timeline::Timeline;
use meshweave_runtime::device::cuda::Cuda;
use meshweave_runtime::executor::{Session as Execution, SessionOptions};
use meshweave_runtime::pretrained::Pretrained;
use meshweave_runtime::tensor::{Elements, HostTensor};
use meshweave_runtime::{artifact, signals};

use super::calibrate::{Origin, calibrated};
use super::evidence::Evidence;
use super::experts::{Asked, Experts, plan};
use super::job::JobArgs;
use super::outcome::{Outcome, Written, print};
use super::rebalance::Rhythm;
use super::render::{plan_summary, seconds};
use super::train::{Progress, Training, data_source};
use super::{Format, launch, runtime_error, write_atomically};
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
    /// Write the HTML report here (documents only).
    #[arg(long)]
    report: Option<PathBuf>,
    /// Correct the cluster's constants by what this run measures, write the cluster here, and say
    /// which plan is best on it (documents only).
    #[arg(long)]
    calibrate: Option<PathBuf>,
    /// Compare the first step with the serial f64 interpreter: loss and every gradient (documents only).
    #[arg(long)]
    verify: bool,
    /// Write a routing trace of all steps here (Parquet; documents with experts).
    #[arg(long)]
    routes: Option<PathBuf>,
    /// Put experts on the devices that this placement of `meshweave place` gives them (documents only).
    #[arg(long, conflicts_with = "checkpoint")]
    placement: Option<PathBuf>,
    /// What part of its expert's load each replica takes, as written by `meshweave place --shares`; even
    /// parts without.
    #[arg(long, requires = "placement")]
    shares: Option<PathBuf>,
    /// Every so many steps, exchange experts between devices so that these have equal loads, or share the
    /// load anew among replicas (documents with experts). Losses do not change.
    #[arg(long, conflicts_with = "checkpoint", value_parser = clap::value_parser!(u64).range(1..))]
    rebalance: Option<u64>,
    /// Experts that may move each time.
    #[arg(long, default_value_t = 8, requires = "rebalance")]
    moves: usize,
    /// What the ranks are: threads of this process, processes started by MPI, or parts of a GPU's memory.
    #[arg(long, value_enum, default_value_t = Backend::Threads)]
    backend: Backend,
    /// Number of ranks, to be sure: that of the plan's mesh.
    #[arg(short = 'n', long = "ranks")]
    n_ranks: Option<usize>,
    /// Hosts and their numbers of ranks, as in `a:4,b:4` (MPI only).
    #[arg(long)]
    hosts: Option<String>,
    /// Where to put the artifact that the processes load, which all hosts must see (MPI only); a
    /// temporary folder by default.
    #[arg(long)]
    artifact: Option<PathBuf>,
    /// Which GPU, counted from 0 (CUDA only).
    #[arg(long, default_value_t = 0)]
    device: usize,
    #[command(flatten)]
    job: JobArgs,
}

/// What a program's ranks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Backend {
    /// Virtual devices: threads of this process.
    Threads,
    /// Processes, on one or several hosts.
    Mpi,
    /// All ranks on one NVIDIA GPU, taking turns.
    Cuda,
}

/// A program ready to start, and what is known of where it comes from.
struct Prepared {
    execution: Execution,
    n_steps: usize,
    init: Init,
    data: Option<PathBuf>,
    origin: Option<Origin>,
    experts: Experts,
}

/// Runs a document or an artifact.
pub fn run(args: &RunArgs, format: Format) -> Result<()> {
    if args.backend == Backend::Mpi {
        return as_processes(args, format);
    }
    for (given, flag) in [
        (args.hosts.is_some(), "--hosts"),
        (args.artifact.is_some(), "--artifact"),
        (args.job.gpu, "--gpu"),
    ] {
        if given {
            let message = format!("{flag} is for ranks that are processes");
            return Err(Error::plain(Class::Invalid, message).help("add `--backend mpi`"));
        }
    }
    // Before anything is planned: without a GPU there is nothing to plan for.
    let gpu = match args.backend {
        Backend::Cuda => Some(open_gpu(args)?),
        Backend::Threads | Backend::Mpi => None,
    };
    let mut prepared = if args.input.is_dir() {
        from_artifact(args, gpu)?
    } else {
        from_document(args, gpu, format)?
    };
    check_ranks(args, prepared.execution.program())?;
    if args.job.checkpoint.is_some() {
        signals::heed();
    }
    initialize(&mut prepared)?;
    let path = args.job.data.as_deref().or(prepared.data.as_deref());
    let data = data_source(prepared.execution.program(), path)?;
    let n_steps = args.job.steps.unwrap_or(prepared.n_steps);
    let mut training = Training::new(&args.job, data, &mut prepared.execution)?;
    let experts = std::mem::take(&mut prepared.experts);
    training.place(experts, &mut prepared.execution)?;
    let mut outcome = Outcome::default();
    if let Some(origin) = prepared.origin.as_ref().filter(|_| args.verify) {
        let data = training.data();
        let evidence = Evidence::take(&mut prepared.execution, data, &mut outcome)?;
        outcome.errors = Some(evidence.errors(origin.model.whole())?);
        training.after_step(&mut prepared.execution)?;
    }
    let progress = match format {
        Format::Text => Progress::Shown,
        Format::Json => Progress::Hidden,
    };
    training.steps(&mut prepared.execution, n_steps, progress, &mut outcome)?;
    outcome.arena_bytes = prepared.execution.arena_bytes();
    outcome.gpu = prepared.execution.gpu();
    outcome.experts = training.settle(&mut prepared.execution)?;
    training.end(&prepared.execution, &args.job)?;
    let program = prepared.execution.program();
    if let Some(path) = &args.job.trace {
        let timelines: Vec<Timeline> = std::iter::once(predicted_timeline(program))
            .chain(outcome.timeline.clone())
            .collect();
        let text = perfetto(&timelines, Some(program)).to_string();
        write_atomically(path, text.as_bytes())?;
    }
    conclude(args, prepared.origin.as_ref(), program, outcome, format)
}

/// What follows the steps of a run: its report, its calibration, its figures.
fn conclude(
    args: &RunArgs,
    origin: Option<&Origin>,
    program: &Program,
    mut outcome: Outcome,
    format: Format,
) -> Result<()> {
    if let (Some(path), Some(origin)) = (&args.report, origin) {
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
    if let (Some(path), Some(origin), Some(timeline)) = (&args.calibrate, origin, &outcome.timeline)
    {
        let found = calibrated(origin, program, timeline)?;
        found.write(path)?;
        outcome.calibrated = Some(found);
    }
    let written = Written {
        report: args.report.as_ref(),
        trace: args.job.trace.as_ref(),
        save: args.job.save.as_ref(),
        calibrate: args.calibrate.as_ref(),
    };
    let request = origin.map(|origin| &origin.session.request);
    print(program, &outcome, request, &written, format);
    Ok(())
}

fn open_gpu(args: &RunArgs) -> Result<Cuda> {
    Cuda::open(args.device, args.job.precision()).map_err(runtime_error)
}

/// Starts an artifact's program: on a GPU where there is one, else on threads.
fn start(folder: &Path, gpu: Option<Cuda>, options: &SessionOptions) -> Result<Execution> {
    let execution = match gpu {
        Some(gpu) => {
            let (program, code) = artifact::load_gpu(folder).map_err(runtime_error)?;
            Execution::on_gpu(program, &code, Box::new(gpu), options)
        }
        None => {
            let (program, kernels) = artifact::load(folder).map_err(runtime_error)?;
            Execution::new(program, kernels, options)
        }
    };
    execution.map_err(runtime_error)
}

/// Runs every rank as a process of its own, started by MPI's launcher.
fn as_processes(args: &RunArgs, format: Format) -> Result<()> {
    let mut flags = args.job.clone();
    let folder = temporary_folder()?;
    let mut origin = None;
    let mut experts = Experts::default();
    let artifact = if args.input.is_dir() {
        needs_document(args)?;
        args.input.clone()
    } else {
        let path = args
            .artifact
            .clone()
            .unwrap_or_else(|| folder.path().join("artifact"));
        let gpu = args.job.gpu.then(|| open_gpu(args)).transpose()?;
        let made = make_artifact(args, &path, gpu.as_ref().map(Cuda::target), format)?;
        drop(gpu);
        let request = &made.origin.session.request;
        flags.steps.get_or_insert(n_steps(&request.job));
        flags.data = flags.data.or_else(|| request.data.clone());
        if flags.init.is_none() {
            flags.init = match made.init {
                Init::Golden => None,
                Init::Random { seed } => Some(format!("random:{seed}")),
                Init::Load(path) => Some(path.display().to_string()),
            };
        }
        origin = Some(made.origin);
        experts = made.experts;
        path
    };
    // What the document is needed for is done here, from what the processes leave beside the artifact.
    let beside = |what: &str| {
        let mut path = artifact.clone().into_os_string();
        path.push(what);
        PathBuf::from(path)
    };
    let (outcome, evidence) = (beside(".outcome"), beside(".evidence"));
    let asked = beside(".experts");
    let mut more: Vec<OsString> = Vec::new();
    if origin.is_some() {
        more.extend(["--outcome".into(), outcome.clone().into_os_string()]);
    }
    if !experts.is_idle() {
        let text = serde_json::to_string(&experts);
        let text = text.map_err(|error| Error::plain(Class::Internal, error))?;
        write_atomically(&asked, text.as_bytes())?;
        more.extend(["--experts".into(), asked.clone().into_os_string()]);
    }
    if args.verify {
        more.extend(["--evidence".into(), evidence.clone().into_os_string()]);
    }
    let program = if args.job.gpu {
        artifact::load_gpu(&artifact).map_err(runtime_error)?.0
    } else {
        artifact::load(&artifact).map_err(runtime_error)?.0
    };
    check_ranks(args, &program)?;
    let job = launch::Job {
        artifact: &artifact,
        n_ranks: program.ranks.len(),
        hosts: args.hosts.as_deref(),
        flags: &flags,
        more: &more,
    };
    let code = launch::launch(&job, format)?;
    if let Some(code) = code {
        // The workers have said why.
        drop(folder);
        std::process::exit(i32::from(code));
    }
    let Some(origin) = &origin else {
        return Ok(());
    };
    let mut measured = measured(&outcome)?;
    if args.verify {
        let whole = origin.model.whole();
        measured.errors = Some(Evidence::read(&evidence, whole)?.errors(whole)?);
    }
    for path in [outcome, evidence, asked] {
        // Beside an artifact that is kept, these are not.
        let _ = std::fs::remove_file(path);
    }
    conclude(args, Some(origin), &program, measured, format)
}

/// What the processes of a job measured.
fn measured(path: &Path) -> Result<Outcome> {
    let unreadable = |error: String| {
        let message = format!(
            "the processes ended well, and what they measured cannot be read in {}: {error}",
            path.display()
        );
        Error::plain(Class::Exhausted, message)
            .help("give an `--artifact` folder that all hosts see at the same path")
    };
    let text = std::fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))?;
    serde_json::from_str(&text).map_err(|error| unreadable(error.to_string()))
}

/// `-n`, where it is given, is the number of the plan's ranks.
fn check_ranks(args: &RunArgs, program: &Program) -> Result<()> {
    let n_ranks = program.ranks.len();
    match args.n_ranks {
        Some(asked) if asked != n_ranks => {
            let message = format!("-n asks for {asked} ranks, the plan's mesh has {n_ranks}");
            Err(Error::plain(Class::Invalid, message)
                .help(format!("give a mesh of {asked}, a cluster such as `--cluster local:{asked}`, or leave out -n")))
        }
        _ => Ok(()),
    }
}

/// An artifact lacks what some flags ask for.
fn needs_document(args: &RunArgs) -> Result<()> {
    for (given, flag) in [
        (args.report.is_some(), "--report"),
        (args.verify, "--verify"),
        (args.cluster.is_some(), "--cluster"),
        (args.calibrate.is_some(), "--calibrate"),
        (args.routes.is_some(), "--routes"),
        (args.placement.is_some(), "--placement"),
        (args.rebalance.is_some(), "--rebalance"),
    ] {
        if given {
            return Err(Error::plain(
                Class::Invalid,
                format!("{flag} needs the document; an artifact holds the program only"),
            )
            .help("run the .weave document instead"));
        }
    }
    Ok(())
}

fn from_artifact(args: &RunArgs, gpu: Option<Cuda>) -> Result<Prepared> {
    needs_document(args)?;
    let init = args.job.init()?.unwrap_or(Init::Golden);
    Ok(Prepared {
        execution: start(&args.input, gpu, &options(args, &init))?,
        n_steps: 10,
        init,
        data: None,
        origin: None,
        experts: Experts::default(),
    })
}

/// A document, planned and compiled into an artifact.
struct Made {
    origin: Origin,
    init: Init,
    experts: Experts,
}

/// The way of every document: what runs is what was written and read back.
fn from_document(args: &RunArgs, gpu: Option<Cuda>, format: Format) -> Result<Prepared> {
    let folder = temporary_folder()?;
    let path = folder.path().join("artifact");
    let Made {
        origin,
        init,
        experts,
    } = make_artifact(args, &path, gpu.as_ref().map(Cuda::target), format)?;
    Ok(Prepared {
        execution: start(&path, gpu, &options(args, &init))?,
        n_steps: n_steps(&origin.session.request.job),
        init,
        data: origin.session.request.data.clone(),
        origin: Some(origin),
        experts,
    })
}

fn make_artifact(args: &RunArgs, path: &Path, gpu: Option<&str>, format: Format) -> Result<Made> {
    let mut session = Session::open(&args.input, args.cluster.as_deref())?;
    let init = args
        .job
        .init()?
        .unwrap_or_else(|| session.request.init.clone());
    let asked = Asked {
        placement: args.placement.as_deref(),
        shares: args.shares.as_deref(),
        routes: args.routes.as_deref(),
        rhythm: args.rebalance.map(|every| Rhythm {
            every: usize::try_from(every).unwrap_or(usize::MAX),
            moves: args.moves,
        }),
    };
    let placement = asked.placement(&mut session)?;
    let mut model = session.model()?;
    let observed = asked.observed(&session, &mut model)?;
    let solution = plan(&session, &model, placement.as_ref())?;
    let experts = asked.experts(&session, &model, &solution.plan, placement, observed)?;
    if format == Format::Text {
        eprint!("{}", plan_summary(&session.request, &solution));
        if let Some(choice) = &session.choice {
            eprint!("{}", choice.text());
        }
        if let Some(exchanges) = &session.exchanges {
            eprint!("{}", exchanges.text());
        }
    }
    let keep = if args.verify {
        Keep::Gradients
    } else {
        Keep::Outputs
    };
    let compile_options = CompileOptions {
        keep,
        gpu: gpu.map(String::from),
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
        code,
        locals,
        ..
    } = compiled;
    artifact::write_with_gpu(path, &program, &kernels, &target_features(), code.as_ref())
        .map_err(runtime_error)?;
    let origin = Origin {
        session,
        model,
        solution,
        locals,
    };
    Ok(Made {
        origin,
        init,
        experts,
    })
}

fn n_steps(job: &Job) -> usize {
    match job {
        Job::Train { n_steps, .. } => *n_steps,
        Job::Infer { .. } => 1,
    }
}

fn temporary_folder() -> Result<tempfile::TempDir> {
    tempfile::tempdir().map_err(|error| {
        let message = format!("cannot make a temporary folder: {error}");
        Error::plain(Class::Exhausted, message)
    })
}

fn options(args: &RunArgs, init: &Init) -> SessionOptions {
    let seed = match init {
        Init::Random { seed } => *seed as u32,
        Init::Golden | Init::Load(_) => 0,
    };
    SessionOptions {
        threads_per_device: args.job.threads,
        seed,
        timeout: Duration::from_secs_f64(args.job.timeout_s()),
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
