//! Runs the programs of a folder on a GPU and compares them: `gpu_check FOLDER [--bench] [--generated]`.
//!
//! In: what `meshweave corpus` has written. Out: a line a program: the greatest relative error of
//! losses, gradients and parameters against the serial f64 interpreter, and of losses against this
//! machine's CPU; with `--bench` times beside the limits of the device. With `--generated` no library
//! makes products. Fails when a program does, and when there is no GPU.

mod bench;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::program::Program;
use meshweave_runtime::artifact;
use meshweave_runtime::checkpoint::Checkpoint;
use meshweave_runtime::data::DataSource;
use meshweave_runtime::device::cuda::{Cuda, Precision, n_devices};
use meshweave_runtime::device::gpu::Gpu;
use meshweave_runtime::executor::{Session, SessionOptions};
use meshweave_runtime::tensor::HostTensor;
use serde::Deserialize;

type Failure = Box<dyn std::error::Error>;

/// What a program must give.
#[derive(Deserialize)]
struct Expected {
    losses: Vec<f64>,
    tolerance: Tolerance,
}

/// What its data are made with.
#[derive(Deserialize)]
struct Task {
    vocab: usize,
}

/// Against f64: of losses, and of tensors relative to the greatest element of each.
#[derive(Deserialize, Clone, Copy)]
struct Tolerance {
    losses: f64,
    tensors: f64,
}

/// What makes products.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Library,
    Generated,
}

impl By {
    /// In words, for headings.
    fn words(self) -> &'static str {
        match self {
            Self::Library => "by cuBLASLt where it is installed",
            Self::Generated => "by generated kernels",
        }
    }

    fn open(self) -> Result<Cuda, Failure> {
        let gpu = Cuda::open(0, Precision::F32)?;
        Ok(match self {
            Self::Library => gpu,
            Self::Generated => gpu.without_library(),
        })
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some(folder) = args.iter().find(|arg| !arg.starts_with("--")) else {
        eprintln!("usage: gpu_check FOLDER [--bench] [--generated]");
        return ExitCode::FAILURE;
    };
    let has = |flag: &str| args.iter().any(|arg| arg == flag);
    let by = match has("--generated") {
        true => By::Generated,
        false => By::Library,
    };
    let run = match has("--bench") {
        true => bench::bench(Path::new(folder), by),
        false => check_all(Path::new(folder), by),
    };
    match run {
        Ok(0) => ExitCode::SUCCESS,
        Ok(n_failed) => {
            eprintln!("{n_failed} programs failed");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The programs of a folder, by name.
fn cases(folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    let entries = std::fs::read_dir(folder).map_err(|error| {
        format!(
            "cannot read {}: {error}; make it with `make gpu-corpus`",
            folder.display()
        )
    })?;
    let mut cases: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.is_dir())
        .collect();
    cases.sort();
    if cases.is_empty() {
        return Err(format!("{} is empty; `make gpu-corpus` fills it", folder.display()).into());
    }
    Ok(cases)
}

/// A program's name.
fn name(case: &Path) -> String {
    case.file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into())
}

fn check_all(folder: &Path, by: By) -> Result<usize, Failure> {
    // Without a GPU this is what there is to say.
    n_devices()?;
    println!("device     {}", by.open()?.name());
    println!("products   {}", by.words());
    println!("program                    losses   tensors   losses to CPU");
    let mut n_failed = 0;
    for case in cases(folder)? {
        let name = name(&case);
        match check(&case, by) {
            Ok(Found {
                tolerance,
                losses,
                tensors,
                cpu,
            }) => {
                let passed = losses <= tolerance.losses && tensors <= tolerance.tensors;
                n_failed += usize::from(!passed);
                let cpu = cpu.map_or_else(
                    |reason| format!("skipped: {reason}"),
                    |e| format!("{e:.1e}"),
                );
                let verdict = if passed { "" } else { "   FAILED" };
                println!("{name:<24}  {losses:.1e}   {tensors:.1e}   {cpu}{verdict}");
            }
            Err(error) => {
                n_failed += 1;
                println!("{name:<24}  FAILED: {error}");
            }
        }
    }
    Ok(n_failed)
}

/// Greatest relative errors: losses and tensors against the interpreter, losses against the CPU or why
/// it was not asked.
struct Found {
    tolerance: Tolerance,
    losses: f64,
    tensors: f64,
    cpu: Result<f64, String>,
}

fn check(case: &Path, by: By) -> Result<Found, Failure> {
    let text = std::fs::read(case.join("expected.json"))?;
    let expected: Expected = serde_json::from_slice(&text)?;
    let Task { vocab } = serde_json::from_slice(&text)?;
    let truth = Checkpoint::open(&case.join("expected.safetensors"))?;
    let mut session = on_gpu(case, by)?;
    let gradients: Vec<(String, TensorType)> = session
        .program()
        .outputs
        .iter()
        .skip(1)
        .map(|one| (one.name.clone(), one.ty.clone()))
        .collect();
    let mut tensors: f64 = 0.0;
    let mut losses = Vec::new();
    for step in 0..expected.losses.len() {
        give_batch(&mut session, vocab, step)?;
        session.step()?;
        losses.push(session.loss()?);
        if step == 0 {
            for (name, ty) in &gradients {
                if let Ok(want) = truth.read(name, ty) {
                    tensors = tensors.max(error(&session.get(name)?, &want));
                }
            }
        }
    }
    let sources = session.program().sources.clone();
    for source in &sources {
        if let Ok(want) = truth.read(&source.name, &source.ty) {
            tensors = tensors.max(error(&session.get(&source.name)?, &want));
        }
    }
    let cpu = match artifact::load(&case.join("artifact")) {
        Ok((program, kernels)) => {
            let mut session = Session::new(program, kernels, &SessionOptions::default())?;
            let mut own = Vec::new();
            for step in 0..expected.losses.len() {
                give_batch(&mut session, vocab, step)?;
                session.step()?;
                own.push(session.loss()?);
            }
            Ok(greatest(&losses, &own))
        }
        Err(error) => Err(error.to_string()),
    };
    Ok(Found {
        tolerance: expected.tolerance,
        losses: greatest(&losses, &expected.losses),
        tensors,
        cpu,
    })
}

fn on_gpu(case: &Path, by: By) -> Result<Session, Failure> {
    let (program, code) = artifact::load_gpu(&case.join("artifact"))?;
    let gpu = Box::new(by.open()?);
    Ok(Session::on_gpu(
        program,
        &code,
        gpu,
        &SessionOptions::default(),
    )?)
}

fn give_batch(session: &mut Session, vocab: usize, step: usize) -> Result<(), Failure> {
    let size = |program: &Program, dim: &str| {
        let tokens = program
            .sources
            .iter()
            .find(|source| source.name == "tokens");
        tokens
            .and_then(|tokens| tokens.ty.size_of(&dim.into()))
            .unwrap_or(1)
    };
    let (n_batch, n_seq) = (
        size(session.program(), "batch"),
        size(session.program(), "seq"),
    );
    let batch = DataSource::Golden { vocab }.batch(step, n_batch, n_seq)?;
    let (tokens, targets) = batch.tensors()?;
    session.set("tokens", &tokens)?;
    session.set("targets", &targets)?;
    Ok(())
}

fn greatest(got: &[f64], want: &[f64]) -> f64 {
    let errors = got
        .iter()
        .zip(want)
        .map(|(got, want)| (got - want).abs() / want.abs());
    errors.fold(0.0, |most, error| {
        if error.is_nan() {
            f64::INFINITY
        } else {
            most.max(error)
        }
    })
}

/// Relative to the greatest element.
fn error(got: &HostTensor, want: &HostTensor) -> f64 {
    let (Some(got), Some(want)) = (got.as_f32(), want.as_f32()) else {
        return f64::INFINITY;
    };
    let scale = want
        .iter()
        .fold(0.0_f32, |most, x| most.max(x.abs()))
        .max(f32::MIN_POSITIVE);
    let errors = got
        .iter()
        .zip(want)
        .map(|(got, want)| f64::from((got - want).abs() / scale));
    errors.fold(0.0, |most, error| {
        if error.is_nan() {
            f64::INFINITY
        } else {
            most.max(error)
        }
    })
}
