//! `meshweave corpus`: programs for a GPU, with what they must give.
//!
//! Enters: a folder and a target. Leaves: for each program a folder with the artifact, `expected.json` and
//! `expected.safetensors`: losses, the first step's gradients and the last step's parameters of the serial
//! f64 interpreter. Programs that are only timed have neither losses nor tensors.
//! Invariant: a machine with a GPU needs these and their checker (`runtime/examples/gpu_check`) alone:
//! no LLVM, no network. `make gpu-corpus` makes both.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use meshweave_compiler::partition::Keep;
use meshweave_dsl::diagnostics::Class;
use meshweave_dsl::graph::{Graph, Role, TensorId};
use meshweave_runtime::data::DataSource;
use meshweave_runtime::reference::{ReferenceError, Stepper, Value};
use meshweave_runtime::tensor::{Elements, HostTensor};
use meshweave_runtime::{artifact, checkpoint};
use serde_json::json;

use super::compile::gpu_target;
use super::runtime_error;
use crate::cli::output::outln;
use crate::compile::{CompileOptions, target_features};
use crate::error::{Error, Result};
use crate::session::{Model, Session};

#[derive(Debug, Args)]
pub struct CorpusArgs {
    /// Where to put the programs.
    folder: PathBuf,
    /// The GPU to compile for.
    #[arg(long, value_name = "TARGET", default_value = "cuda:sm_90")]
    target: String,
    /// Programs of real sizes, to be timed alone.
    #[arg(long)]
    timed: bool,
}

/// Steps of each case: two whose instructions are timed, two as a graph.
const N_STEPS: usize = 4;

/// The golden model under a mesh: name, statements of the model, devices, mesh and tactics.
const CASES: [(&str, &str, usize, &str); 10] = [
    ("dense-1", "", 1, "mesh main = dp:1"),
    ("dense-dp2", "", 2, "mesh main = dp:2\napply dp(dp)"),
    ("dense-tp2", "", 2, "mesh main = tp:2\napply megatron(tp)"),
    (
        "dense-tp2-dp2",
        "",
        4,
        "mesh main = dp:2 > tp:2\napply dp(dp)\napply megatron(tp)",
    ),
    (
        "dense-fsdp4",
        "",
        4,
        "mesh main = dp:4\napply dp(dp)\napply zero(3, dp)",
    ),
    ("dense-planned-8", "", 8, ""),
    ("moe-1", "capacity 2", 1, "mesh main = dp:1"),
    ("moe-ep4", "capacity 2", 4, "mesh main = ep:4\napply ep(ep)"),
    (
        "moe-dropless-ep2-dp2",
        "capacity 0",
        4,
        "mesh main = dp:2 > ep:2\napply dp(dp)\napply ep(ep)",
    ),
    (
        "dense-pp2-dp2",
        "",
        4,
        "mesh main = pp:2 > dp:2\npipeline main.pp {\n  cut before layers[1]\n  schedule zb-h1\n  microbatches 4\n}\napply dp(dp)",
    ),
];

/// Those that train in bf16 as well. Where scores lie closer than rounding, a token goes to another
/// expert than the interpreter's: of experts losses alone are compared.
const MIXED: [&str; 6] = [
    "dense-1",
    "dense-tp2",
    "dense-tp2-dp2",
    "dense-fsdp4",
    "moe-ep4",
    "dense-pp2-dp2",
];

/// Greatest relative errors that are no failure.
#[derive(Clone, Copy)]
struct Tolerance {
    losses: f64,
    tensors: f64,
}

/// f32 with sums in another order.
const F32: Tolerance = Tolerance {
    losses: 2e-5,
    tensors: 2e-5,
};
/// Activations rounded to 2⁻⁹: one unit of bf16 in losses; of gradients and parameters, which sum what
/// was rounded in every layer, 2⁻⁴ of the greatest element.
const BF16: Tolerance = Tolerance {
    losses: 1.0 / 256.0,
    tensors: 1.0 / 16.0,
};

/// Programs that are timed: name, the golden model's sizes, batch, tokens a sequence, dtype. `large` has
/// 1.3 B parameters, `attention-8k` is all attention at 8,192 tokens and heads of 128.
const TIMED: [(&str, &str, usize, usize, &str); 6] = [
    ("small-f32", "size small", 8, 256, "f32"),
    ("small-bf16", "size small", 8, 256, "bf16"),
    ("gpt2-f32", "size gpt2", 4, 512, "f32"),
    ("gpt2-bf16", "size gpt2", 4, 512, "bf16"),
    (
        "large-bf16",
        "layers 24\n  embed 2048\n  heads 16\n  ffn 5504\n  vocab 32000",
        4,
        2048,
        "bf16",
    ),
    (
        "attention-8k-bf16",
        "layers 2\n  embed 2048\n  heads 16\n  ffn 256\n  vocab 512",
        2,
        8192,
        "bf16",
    ),
];

/// Compiles all programs and runs them serially, or those that are timed.
pub fn corpus(args: &CorpusArgs) -> Result<()> {
    let gpu = gpu_target(&args.target)?;
    if args.timed {
        for (name, sizes, batch, seq, dtype) in TIMED {
            let document = format!(
                "plan \"{name}\" model timed cluster \"h100:1\"\n\
                 train batch {batch} seq {seq} dtype {dtype} optimizer adamw\ndata golden\ninit golden\n\
                 model timed = golden {{\n  {sizes}\n}}\nmesh main = dp:1\n"
            );
            make_timed(&document, &args.folder.join(name), &gpu)?;
            outln!("{name}: compiled for {gpu}");
        }
        return Ok(());
    }
    let is_mixed = |name: &str| MIXED.contains(&name);
    let mixed = CASES.iter().filter(|(name, ..)| is_mixed(name));
    let within = |model: &str| match model {
        "" => BF16,
        _ => Tolerance {
            tensors: 2.0,
            ..BF16
        },
    };
    let all = CASES.iter().map(|case| (case, "f32", F32));
    for ((name, model, n_devices, mesh), dtype, tolerance) in
        all.chain(mixed.map(|case| (case, "bf16", within(case.1))))
    {
        let name = match dtype {
            "f32" => (*name).to_string(),
            dtype => format!("{name}-{dtype}"),
        };
        let document = document(&name, (model, dtype), *n_devices, mesh);
        make(&document, &args.folder.join(&name), &gpu, tolerance)?;
        outln!("{name}: compiled for {gpu}");
    }
    Ok(())
}

fn document(name: &str, (model, dtype): (&str, &str), n_devices: usize, mesh: &str) -> String {
    format!(
        "plan \"{name}\" model tiny cluster \"local:{n_devices}\"\n\
         train batch 8 seq 64 steps {N_STEPS} dtype {dtype} optimizer adamw\ndata golden\ninit golden\n\
         model tiny = golden {{\n  size tiny\n  {model}\n}}\n{mesh}\n"
    )
}

/// Compiles a document and writes the artifact; the program's vocabulary.
fn compile(
    session: &Session,
    model: &Model,
    folder: &Path,
    (target, keep): (&str, Keep),
) -> Result<usize> {
    let solution = session.plan(model)?;
    let options = CompileOptions {
        keep,
        gpu: Some(target.into()),
        ..CompileOptions::default()
    };
    let compiled = session.compile(model, &solution.plan, &options)?;
    std::fs::create_dir_all(folder).map_err(|error| unwritten(folder, &error))?;
    artifact::write_with_gpu(
        &folder.join("artifact"),
        &compiled.program,
        &compiled.kernels,
        &target_features(),
        compiled.code.as_ref(),
    )
    .map_err(runtime_error)?;
    let vocab = compiled.program.sources.iter();
    let vocab = vocab
        .filter_map(|source| source.ty.size_of(&"vocab".into()))
        .max();
    vocab.ok_or_else(|| lacking("vocabulary"))
}

/// Compiles a document that is timed alone.
fn make_timed(document: &str, folder: &Path, target: &str) -> Result<()> {
    let session = Session::from_text("corpus", document, Path::new("."), None)?;
    let model = session.model()?;
    let vocab = compile(&session, &model, folder, (target, Keep::Outputs))?;
    let expected = json!({ "vocab": vocab });
    std::fs::write(folder.join("expected.json"), expected.to_string())
        .map_err(|error| unwritten(folder, &error))
}

/// Compiles a document, runs it serially, and writes both.
fn make(document: &str, folder: &Path, target: &str, tolerance: Tolerance) -> Result<()> {
    let session = Session::from_text("corpus", document, Path::new("."), None)?;
    let model = session.model()?;
    let vocab = compile(&session, &model, folder, (target, Keep::Gradients))?;
    let graph = model.whole();
    let tokens = graph.find("tokens").ok_or_else(|| lacking("tokens"))?;
    let size = |dim: &str| graph.ty(tokens).size_of(&dim.into()).unwrap_or(1);
    let data = DataSource::Golden { vocab };
    let mut stepper = Stepper::new(graph).map_err(reference)?;
    let mut losses = Vec::new();
    let mut tensors = BTreeMap::new();
    for step in 0..N_STEPS {
        let (tokens, targets) = data
            .batch(step, size("batch"), size("seq"))
            .and_then(|batch| batch.tensors())
            .map_err(runtime_error)?;
        let inputs = [("tokens", tokens), ("targets", targets)];
        let inputs = inputs
            .into_iter()
            .map(|(name, value)| input(graph, name, &value));
        let truth = stepper
            .step(&inputs.collect::<Result<_>>()?)
            .map_err(reference)?;
        losses.push(truth.loss());
        if step == 0 {
            for (param, gradient) in &graph.gradients {
                let name = graph.tensor(*gradient).name.clone();
                tensors.insert(name, tensor(graph, *gradient, &truth.gradients[param])?);
            }
        }
    }
    for (id, value) in stepper.sources() {
        if matches!(graph.tensor(*id).role, Role::Param(_)) {
            tensors.insert(graph.tensor(*id).name.clone(), tensor(graph, *id, value)?);
        }
    }
    checkpoint::write(&folder.join("expected.safetensors"), &tensors, N_STEPS)
        .map_err(runtime_error)?;
    let expected = json!({
        "vocab": vocab,
        "losses": losses,
        "tolerance": { "losses": tolerance.losses, "tensors": tolerance.tensors },
    });
    std::fs::write(folder.join("expected.json"), expected.to_string())
        .map_err(|error| unwritten(folder, &error))?;
    Ok(())
}

fn input(graph: &Graph, name: &str, value: &HostTensor) -> Result<(TensorId, Value)> {
    let id = graph.find(name).ok_or_else(|| lacking(name))?;
    let Elements::I32(elements) = value.elements() else {
        return Err(lacking(name));
    };
    let elements = elements.iter().map(|x| f64::from(*x)).collect();
    let value = Value::new(graph.ty(id).clone(), elements).map_err(reference)?;
    Ok((id, value))
}

fn tensor(graph: &Graph, id: TensorId, value: &Value) -> Result<HostTensor> {
    let elements = value.data().iter().map(|x| *x as f32).collect();
    HostTensor::new(graph.ty(id).clone(), Elements::F32(elements)).map_err(runtime_error)
}

fn reference(error: ReferenceError) -> Error {
    Error::plain(Class::Internal, error)
}

fn lacking(name: &str) -> Error {
    Error::plain(Class::Internal, format!("the program lacks `{name}`"))
}

fn unwritten(folder: &Path, error: &std::io::Error) -> Error {
    let message = format!("cannot write the corpus to {}: {error}", folder.display());
    Error::plain(Class::Exhausted, message)
}
