//! `meshweave worker`: one rank, as one process of an MPI job.
//!
//! Enters: an artifact, the same on every process. Leaves: what `run` prints, from rank 0; after a failure
//! one report, from the rank that knows, and the end of all processes.
//! Invariant: nothing runs before all processes have agreed on what to run.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use meshweave_compiler::resolve::Init;
use meshweave_compiler::show::perfetto;
use meshweave_dsl::device_code::DeviceCode;
use meshweave_dsl::diagnostics::Class;
use meshweave_dsl::program::Program;
use meshweave_dsl::timeline::{Event, Timeline};
use meshweave_runtime::collective::Communicator;
use meshweave_runtime::collective::mpi::{Listener, MpiCommunicator};
use meshweave_runtime::data::DataSource;
use meshweave_runtime::device::cuda::{Cuda, Precision, n_devices};
use meshweave_runtime::executor::{Drill, KernelTable, Session as Execution, SessionOptions};
use meshweave_runtime::mpi::Mpi;
use meshweave_runtime::rendezvous::{self, Roster, Ticket};
use meshweave_runtime::{artifact, signals};

use super::evidence::Evidence;
use super::experts::Experts;
use super::job::JobArgs;
use super::outcome::{Outcome, Written, print};
use super::place::unreadable;
use super::train::{Progress, Training, data_source};
use super::{Format, report, runtime_error, write_atomically};
use crate::error::{Error, Result};
use crate::report::predicted_timeline;

#[derive(Debug, Args)]
pub struct WorkerArgs {
    /// The artifact folder, at the same path on every host.
    artifact: PathBuf,
    /// Write what was measured here instead of printing it, for the process that started the job.
    #[arg(long, hide = true)]
    outcome: Option<PathBuf>,
    /// Write what the first step began with and gave here, for the process that started the job.
    #[arg(long, hide = true)]
    evidence: Option<PathBuf>,
    /// What to do with the experts, from the process that started the job.
    #[arg(long, hide = true)]
    experts: Option<PathBuf>,
    #[command(flatten)]
    job: JobArgs,
}

/// What a process needs before it can meet the others.
struct Loaded {
    program: Program,
    code: Code,
    data: DataSource,
    seed: u32,
}

/// What the rank executes.
enum Code {
    Host(KernelTable),
    Gpu(DeviceCode),
}

/// How long a failed rank hears the others out, so that one of them reports.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long a rank that does not report waits to be ended by the one that does.
const LINGER: Duration = Duration::from_secs(5);

/// Runs one rank; returns when all have ended well, ends the process otherwise.
pub fn worker(args: &WorkerArgs, format: Format) -> Result<()> {
    signals::heed();
    let mpi = Arc::new(Mpi::load().map_err(runtime_error)?);
    let timeout = Duration::from_secs_f64(args.job.timeout_s());
    let communicator = MpiCommunicator::new(Arc::clone(&mpi), timeout);
    let mut communicator = Box::new(communicator.map_err(runtime_error)?);
    let (rank, listener) = (communicator.rank(), communicator.listener());
    let (loaded, roster) = match meet(args, &mpi, communicator.as_mut()) {
        Ok(agreed) => agreed,
        Err(error) => {
            // All have come to the same verdict: one says it, all end.
            if rank == 0 {
                report(&error, format);
            }
            let _ = communicator.finish();
            std::process::exit(i32::from(error.exit_code()));
        }
    };
    if rank == 0 && format == Format::Text {
        eprint!("{}", roster_text(&mpi, &roster, &loaded.program));
    }
    if let Some(drill) = args.job.drill.as_ref()
        && let Ok(drill) = drill.parse::<Drill>()
    {
        drill.before_groups(rank);
    }
    let options = SessionOptions {
        threads_per_device: Some(args.job.threads.unwrap_or_else(|| threads(&roster, rank))),
        seed: loaded.seed,
        timeout,
    };
    let started = match loaded.code {
        Code::Host(kernels) => Execution::one_of(loaded.program, kernels, &options, communicator),
        Code::Gpu(code) => own_gpu(&roster, rank, args.job.precision()).and_then(|gpu| {
            Execution::one_on_gpu(loaded.program, &code, Box::new(gpu), &options, communicator)
        }),
    };
    let mut execution = match started {
        Ok(execution) => execution,
        Err(error) => end(&mpi, &listener, rank, &runtime_error(error), format),
    };
    match train(args, &mut execution, loaded.data, rank, format) {
        Ok(()) => execution.finish().map_err(runtime_error),
        Err(error) => end(&mpi, &listener, rank, &error, format),
    }
}

/// Ends the job after a failure: one rank reports.
fn end(mpi: &Mpi, listener: &Listener, rank: usize, error: &Error, format: Format) -> ! {
    // A failure of this rank alone is one that the others have to hear of.
    if listener.settle(Duration::ZERO).is_none() {
        listener.abort(&meshweave_runtime::Error::Exhausted(error.to_string()));
    }
    let known = listener.settle(PATIENCE);
    let reporter = known.as_ref().map_or(rank, |(reporter, _)| *reporter);
    if reporter != rank {
        std::thread::sleep(LINGER);
    } else {
        report(error, format);
    }
    mpi.abort(error.exit_code())
}

/// Loads the artifact and compares notes with all others.
fn meet(
    args: &WorkerArgs,
    mpi: &Mpi,
    communicator: &mut dyn Communicator,
) -> Result<(Loaded, Roster)> {
    let n_ranks = communicator.n_ranks();
    let loaded = load(args, n_ranks);
    let holds = match &loaded {
        Ok((loaded, identity)) => {
            let mut holds = vec![(
                "meshweave".to_string(),
                env!("CARGO_PKG_VERSION").to_string(),
            )];
            holds.extend(rendezvous::describe(&loaded.program));
            holds.extend(identity.iter().cloned());
            holds.push(("data".into(), loaded.data.identity()));
            holds.push(("command line".into(), format!("{:?}", args.job.to_args())));
            Ok(holds)
        }
        Err(error) => Err(error
            .diagnostics
            .first()
            .map_or_else(String::new, |first| first.message.clone())),
    };
    let ticket = Ticket {
        host: mpi.host(),
        holds,
    };
    let met = rendezvous::meet(communicator, &ticket);
    match (loaded, met) {
        (Ok((loaded, _)), Ok(roster)) => Ok((loaded, roster)),
        // What is wrong everywhere is told as if there were one process.
        (Err(error), _) if communicator.rank() == 0 => Err(error),
        (_, Err(error)) => Err(runtime_error(error)),
        (Err(error), Ok(_)) => Err(error),
    }
}

fn load(args: &WorkerArgs, n_found: usize) -> Result<(Loaded, Vec<(String, String)>)> {
    let identity = artifact::identity(&args.artifact).map_err(runtime_error)?;
    let (program, code) = if args.job.gpu {
        let (program, code) = artifact::load_gpu(&args.artifact).map_err(runtime_error)?;
        (program, Code::Gpu(code))
    } else {
        let (program, kernels) = artifact::load(&args.artifact).map_err(runtime_error)?;
        (program, Code::Host(kernels))
    };
    let n_ranks = program.ranks.len();
    if n_ranks != n_found {
        let message =
            format!("the artifact is for {n_ranks} ranks, {n_found} processes were started");
        return Err(Error::plain(Class::Invalid, message)
            .help(format!("start it as `mpirun -n {n_ranks} meshweave worker {}`", args.artifact.display()))
            .help("when mpirun did start as many, it belongs to another MPI than the library that was loaded: name the right one in MESHWEAVE_MPI_LIBRARY"));
    }
    let seed = match args.job.init()?.unwrap_or(Init::Golden) {
        Init::Golden => 0,
        Init::Random { seed } => seed as u32,
        Init::Load(path) => {
            let message = format!(
                "a worker cannot read the weights {}: their names follow from the model's config, which an artifact does not hold",
                path.display()
            );
            return Err(Error::plain(Class::Unsupported, message)
                .help("run the document once with `--init FOLDER --steps 0 --checkpoint FOLDER` and give the workers that checkpoint with --resume"));
        }
    };
    let data = data_source(&program, args.job.data.as_deref())?;
    let loaded = Loaded {
        program,
        code,
        data,
        seed,
    };
    Ok((loaded, identity))
}

fn read_experts(path: &Path) -> Result<Experts> {
    let text = std::fs::read_to_string(path).map_err(|error| unreadable(path, error))?;
    serde_json::from_str(&text).map_err(|error| {
        let message = format!("{} says nothing of experts: {error}", path.display());
        Error::plain(Class::Internal, message)
    })
}

fn train(
    args: &WorkerArgs,
    execution: &mut Execution,
    data: DataSource,
    rank: usize,
    format: Format,
) -> Result<()> {
    let speaks = rank == 0;
    let mut training = Training::new(&args.job, data, execution)?;
    if let Some(path) = &args.experts {
        training.place(read_experts(path)?, execution)?;
    }
    let progress = if speaks && format == Format::Text {
        Progress::Shown
    } else {
        Progress::Hidden
    };
    let mut outcome = Outcome::default();
    if let Some(path) = &args.evidence {
        let evidence = Evidence::take(execution, training.data(), &mut outcome)?;
        if speaks {
            evidence.write(path)?;
        }
        training.after_step(execution)?;
    }
    training.steps(
        execution,
        args.job.steps.unwrap_or(10),
        progress,
        &mut outcome,
    )?;
    outcome.experts = training.settle(execution)?;
    training.end(execution, &args.job)?;
    gather(execution, &mut outcome)?;
    if !speaks {
        return Ok(());
    }
    let program = execution.program();
    if let Some(path) = &args.job.trace {
        let timelines: Vec<Timeline> = std::iter::once(predicted_timeline(program))
            .chain(outcome.timeline.clone())
            .collect();
        let text = perfetto(&timelines, Some(program)).to_string();
        write_atomically(path, text.as_bytes())?;
    }
    if let Some(path) = &args.outcome {
        let text = serde_json::to_string(&outcome);
        let text = text.map_err(|error| Error::plain(Class::Internal, error))?;
        return write_atomically(path, text.as_bytes());
    }
    let written = Written {
        trace: args.job.trace.as_ref(),
        save: args.job.save.as_ref(),
        ..Written::default()
    };
    print(program, &outcome, None, &written, format);
    Ok(())
}

/// Brings the other processes' part of the outcome here.
fn gather(execution: &Execution, outcome: &mut Outcome) -> Result<()> {
    let events = outcome.timeline.as_ref().map(|timeline| &timeline.events);
    let broken = |error: serde_json::Error| Error::plain(Class::Internal, error);
    // What every step received, of tokens, of what all need of them, and of copied weights.
    let received = [
        &outcome.dispatched_bytes,
        &outcome.context_bytes,
        &outcome.copied_bytes,
    ];
    let own = serde_json::to_string(&(execution.arena_bytes(), events, received));
    let mut all: Vec<Event> = Vec::new();
    let mut sums: [Vec<u64>; 3] = Default::default();
    for text in execution
        .exchange(&own.map_err(broken)?)
        .map_err(runtime_error)?
    {
        let (arena_bytes, events, received): (Vec<usize>, Option<Vec<Event>>, [Vec<u64>; 3]) =
            serde_json::from_str(&text).map_err(broken)?;
        outcome.arena_bytes.extend(arena_bytes);
        all.extend(events.into_iter().flatten());
        for (sums, received) in sums.iter_mut().zip(received) {
            sums.resize(sums.len().max(received.len()), 0);
            for (sum, bytes) in sums.iter_mut().zip(received) {
                *sum += bytes;
            }
        }
    }
    [
        outcome.dispatched_bytes,
        outcome.context_bytes,
        outcome.copied_bytes,
    ] = sums;
    if let Some(timeline) = &mut outcome.timeline {
        timeline.events = all;
    }
    Ok(())
}

/// The GPU of a process: its host's processes take one each, in the order of their ranks.
fn own_gpu(roster: &Roster, rank: usize, precision: Precision) -> meshweave_runtime::Result<Cuda> {
    let own = roster.hosts.get(rank);
    let before = roster.hosts.iter().take(rank);
    let ordinal = before.filter(|host| Some(*host) == own).count();
    let n_devices = n_devices()?;
    if ordinal >= n_devices {
        return Err(meshweave_runtime::Error::Exhausted(format!(
            "rank {rank} is the process {ordinal} of its host, counted from 0, which has {n_devices} GPUs; \
             start fewer processes there, or put all ranks on one GPU with `meshweave run --backend cuda`"
        )));
    }
    Cuda::open(ordinal, precision)
}

/// Threads of a rank: the cores of its host divided by its host's ranks.
fn threads(roster: &Roster, rank: usize) -> usize {
    let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
    let own = roster.hosts.get(rank);
    let n_here = roster
        .hosts
        .iter()
        .filter(|host| Some(*host) == own)
        .count();
    (n_cores / n_here.max(1)).max(1)
}

fn roster_text(mpi: &Mpi, roster: &Roster, program: &Program) -> String {
    let hosts: Vec<String> = roster
        .by_host()
        .iter()
        .map(|(host, ranks)| match ranks.as_slice() {
            [first, .., last] if last - first + 1 == ranks.len() => {
                format!("{host}: {first}–{last}")
            }
            ranks => format!("{host}: {ranks:?}"),
        })
        .collect();
    let across = roster.axes_across_hosts(&program.mesh);
    let across = match across.as_slice() {
        [] => String::new(),
        axes => format!("; {} of the plan's mesh between hosts", axes.join(" and ")),
    };
    format!(
        "processes  {} on {}{across}; {}\n",
        roster.hosts.len(),
        hosts.join(", "),
        mpi.version()
    )
}
