//! From a plan to a program with kernels: partition, simplify, fuse, lower, generate, link.
//!
//! Enters: a global graph and its plan. Leaves: a program and the shared object of its kernels.
//! Invariant: every stage is verified before the next one starts.

#[cfg(feature = "mlir")]
mod gpu;

use std::time::Instant;

use meshweave_compiler::codegen::fuse::Platform;
use meshweave_compiler::codegen::kernel::Kernel;
use meshweave_compiler::lower::{Lowered, lower};
use meshweave_compiler::partition::{Keep, PartitionError, partition};
use meshweave_compiler::pipeline::{PipelineError, lower_pipeline};
use meshweave_compiler::simplify::{self, simplify_ranks};
use meshweave_compiler::storage::Storage;
use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::device_code::DeviceCode;
use meshweave_dsl::diagnostics::Class;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::Graph;
use meshweave_dsl::graph::verify::{verify_local, verify_ranks};
use meshweave_dsl::pipeline::PipelinePlan;
use meshweave_dsl::plan::Plan;
use meshweave_dsl::program::Program;

use crate::error::{Error, Result};

/// How to compile.
#[derive(Clone, Debug)]
pub struct CompileOptions {
    /// Whether the program also hands out the gradients (for comparisons; costs their memory).
    pub keep: Keep,
    /// Stages whose text to keep: `local`, `mlir`, `mlir-after:<pass>`, `llvm`, `asm`.
    pub emit: Vec<String>,
    /// The GPU to compile for besides this host, as NVIDIA writes it: `sm_90`, `sm_90a`.
    pub gpu: Option<String>,
}

impl CompileOptions {
    /// What a program is fused for.
    fn platform(&self, plan: &Plan) -> Platform {
        match &self.gpu {
            Some(_) => Platform::Gpu,
            None => platform(plan),
        }
    }
}

/// What a program is fused for where no GPU is named: hosts run f32 alone.
pub(crate) fn platform(plan: &Plan) -> Platform {
    match plan.storage {
        DType::F32 => Platform::Host,
        _ => Platform::Gpu,
    }
}

impl Default for CompileOptions {
    fn default() -> Self {
        Self {
            keep: Keep::Outputs,
            emit: Vec::new(),
            gpu: None,
        }
    }
}

/// A compiled plan.
#[derive(Clone, Debug)]
pub struct Compiled {
    pub program: Program,
    /// The shared object of the generated kernels.
    pub kernels: Vec<u8>,
    /// Code for the GPU that was asked for.
    pub code: Option<DeviceCode>,
    /// The local graph of every rank.
    pub locals: Vec<Graph>,
    /// The stages asked for, by name.
    pub emitted: Vec<(String, String)>,
    /// Seconds of each part, measured.
    pub seconds: Vec<(&'static str, f64)>,
}

/// Compiles `graph` under `plan` for this host; prices in the program are those of `cluster`.
///
/// # Errors
/// A plan that does not fit the graph, an op that no kernel expresses, a missing linker, or a build
/// without the feature `mlir`.
pub fn compile(
    graph: &Graph,
    plan: &Plan,
    cluster: &Cluster,
    options: &CompileOptions,
) -> Result<Compiled> {
    let (mut program, locals, fragments, mut clock) =
        lower_plan(graph, plan, cluster, options.keep, options.platform(plan))?;
    let mut emitted = Vec::new();
    if options.emit.iter().any(|stage| stage == "local") {
        let texts: Vec<String> = locals
            .iter()
            .map(meshweave_dsl::graph::text::print)
            .collect();
        emitted.push(("local".into(), texts.join("\n")));
    }
    let kernels = generate(plan, &fragments, &mut program, options, &mut emitted)?;
    clock.lap("generate and link");
    let code = generate_gpu(&fragments, &program, options)?;
    clock.lap("generate for the GPU");
    Ok(Compiled {
        program,
        kernels,
        code,
        locals,
        emitted,
        seconds: clock.laps,
    })
}

/// Compiles `graph`, the training graph of one microbatch, to a program that runs the pipeline's
/// schedule; `plan` places its ops over the mesh of a stage. No local graphs are kept: there is one a
/// piece.
///
/// # Errors
/// Those of [`compile`], and a schedule that cannot be executed.
pub fn compile_pipeline(
    graph: &Graph,
    plan: &Plan,
    pipeline: &PipelinePlan,
    cluster: &Cluster,
    options: &CompileOptions,
) -> Result<Compiled> {
    let mut clock = Clock::start();
    let Lowered {
        mut program,
        kernels,
    } = lower_pipeline(
        graph,
        plan,
        pipeline,
        options.keep,
        cluster,
        options.platform(plan),
    )
    .map_err(pipeline_error)?;
    clock.lap("partition, simplify, fuse and lower");
    let mut emitted = Vec::new();
    let fragments = kernels;
    let kernels = generate(plan, &fragments, &mut program, options, &mut emitted)?;
    clock.lap("generate and link");
    let code = generate_gpu(&fragments, &program, options)?;
    clock.lap("generate for the GPU");
    Ok(Compiled {
        program,
        kernels,
        code,
        locals: Vec::new(),
        emitted,
        seconds: clock.laps,
    })
}

/// The error of a pipeline with its class.
pub(crate) fn pipeline_error(error: PipelineError) -> Error {
    let class = match &error {
        PipelineError::Invalid(_) | PipelineError::Partition(PartitionError::Invalid(_)) => {
            Class::Invalid
        }
        PipelineError::Unsupported(_) => Class::Unsupported,
        PipelineError::Internal(_) | PipelineError::Partition(_) | PipelineError::Lower(_) => {
            Class::Internal
        }
    };
    Error::plain(class, error)
}

/// The program of a plan without code for its kernels: what a report shows, and needs no LLVM.
///
/// # Errors
/// Those of [`compile`], code generation aside.
pub fn outline(graph: &Graph, plan: &Plan, cluster: &Cluster) -> Result<(Program, Vec<Graph>)> {
    let (program, locals, _, _) = lower_plan(graph, plan, cluster, Keep::Outputs, platform(plan))?;
    Ok((program, locals))
}

fn lower_plan(
    graph: &Graph,
    plan: &Plan,
    cluster: &Cluster,
    keep: Keep,
    platform: Platform,
) -> Result<(Program, Vec<Graph>, Vec<Kernel>, Clock)> {
    let mut clock = Clock::start();
    let mut parts = partition(graph, plan, keep, cluster).map_err(|error| {
        let class = match &error {
            meshweave_compiler::partition::PartitionError::Invalid(_) => Class::Invalid,
            meshweave_compiler::partition::PartitionError::Internal(_) => Class::Internal,
        };
        Error::plain(class, error)
    })?;
    clock.lap("partition");
    // Here, because only now collectives exist; before fusion, which then sees fewer ops.
    let (locals, _) = simplify_ranks(&parts.locals, &simplify::Options::default())
        .map_err(|error| Error::plain(Class::Internal, error))?;
    parts.locals = locals;
    clock.lap("simplify");
    for (rank, local) in parts.locals.iter().enumerate() {
        verify_local(local, rank, &plan.mesh).map_err(broken)?;
    }
    verify_ranks(&parts.locals).map_err(broken)?;
    clock.lap("verify");
    if let Some(storage) = Storage::of(graph, plan.storage) {
        let apply = |local: &Graph| {
            let given = |id| local.ty(id).dtype;
            storage.applied(local, given, |position| given(local.outputs[position]))
        };
        parts.locals = parts.locals.iter().map(apply).collect();
    }
    let lowered = lower(graph, plan, &parts, cluster, platform)
        .map_err(|error| Error::plain(Class::Internal, error))?;
    clock.lap("fuse and lower");
    Ok((lowered.program, parts.locals, lowered.kernels, clock))
}

/// A stage that gave a graph which breaks the rules: our bug.
fn broken(error: impl ToString) -> Error {
    Error::plain(Class::Internal, error)
}

struct Clock {
    last: Instant,
    laps: Vec<(&'static str, f64)>,
}

impl Clock {
    fn start() -> Self {
        Self {
            last: Instant::now(),
            laps: Vec::new(),
        }
    }

    fn lap(&mut self, name: &'static str) {
        self.laps.push((name, self.last.elapsed().as_secs_f64()));
        self.last = Instant::now();
    }
}

#[cfg(feature = "mlir")]
fn generate(
    plan: &Plan,
    kernels: &[Kernel],
    program: &mut Program,
    options: &CompileOptions,
    emitted: &mut Vec<(String, String)>,
) -> Result<Vec<u8>> {
    use meshweave_compiler::mlir;

    if plan.storage != DType::F32 {
        // The host computes in f32 alone; the runtime says so where such a program is to run there.
        return Ok(Vec::new());
    }
    let stages = mlir::Stage::all()
        .into_iter()
        .filter(|stage| options.emit.contains(&stage.to_string()));
    let mlir_options = mlir::CompileOptions {
        stages: stages.collect(),
        ..mlir::CompileOptions::default()
    };
    let object =
        mlir::compile(kernels, &mlir::HostTarget::detect(), &mlir_options).map_err(mlir_error)?;
    for (symbol, name) in program.kernels.iter_mut().zip(&object.symbols) {
        symbol.name.clone_from(name);
    }
    emitted.extend(
        object
            .stages
            .iter()
            .map(|(stage, text)| (stage.to_string(), text.clone())),
    );
    for target in mlir::GpuTarget::ALL {
        let stage = ptx_stage(target);
        if options.emit.contains(&stage) {
            let ptx = mlir::compile_ptx(kernels, target, &[]).map_err(mlir_error)?;
            emitted.push((stage, ptx.text));
        }
    }
    let folder = tempfile::tempdir().map_err(|error| {
        Error::plain(
            Class::Exhausted,
            format!("cannot make a temporary folder: {error}"),
        )
    })?;
    let path = folder.path().join("kernels.so");
    mlir::link(&object, &path).map_err(mlir_error)?;
    std::fs::read(&path).map_err(|error| {
        Error::plain(
            Class::Exhausted,
            format!("cannot read the linked kernels: {error}"),
        )
    })
}

/// Code for the GPU that the options name.
#[cfg(feature = "mlir")]
fn generate_gpu(
    kernels: &[Kernel],
    program: &Program,
    options: &CompileOptions,
) -> Result<Option<DeviceCode>> {
    let Some(name) = &options.gpu else {
        return Ok(None);
    };
    gpu::device_code(kernels, program, gpu::target(name)?).map(Some)
}

#[cfg(not(feature = "mlir"))]
fn generate_gpu(
    _kernels: &[Kernel],
    _program: &Program,
    _options: &CompileOptions,
) -> Result<Option<DeviceCode>> {
    Ok(None)
}

/// Name of the stage with the kernels for a GPU.
#[cfg(feature = "mlir")]
fn ptx_stage(target: meshweave_compiler::mlir::GpuTarget) -> String {
    format!("ptx:{}", target.chip())
}

#[cfg(feature = "mlir")]
fn mlir_error(error: meshweave_compiler::mlir::Error) -> Error {
    use meshweave_compiler::mlir;
    let class = match &error {
        mlir::Error::Unsupported { .. } => Class::Unsupported,
        mlir::Error::Exhausted { .. } => Class::Exhausted,
        mlir::Error::Internal { .. } => Class::Internal,
    };
    Error::plain(class, error)
}

#[cfg(not(feature = "mlir"))]
fn generate(
    _plan: &Plan,
    _kernels: &[Kernel],
    _program: &mut Program,
    _options: &CompileOptions,
    _emitted: &mut Vec<(String, String)>,
) -> Result<Vec<u8>> {
    Err(Error::plain(Class::Unsupported, "this build of meshweave has no code generator")
        .help("plan, check, show, explain and export work; to compile and run, install it with the default feature `mlir`"))
}

/// The stages that [`CompileOptions::emit`] and the command line know, in order.
pub fn stage_names() -> Vec<String> {
    let names = ["graph", "plan", "local"].map(String::from).into_iter();
    #[cfg(feature = "mlir")]
    let names = names.chain(
        meshweave_compiler::mlir::Stage::all()
            .into_iter()
            .map(|stage| stage.to_string())
            .chain(meshweave_compiler::mlir::GpuTarget::ALL.map(ptx_stage)),
    );
    names.collect()
}

/// CPU features that kernels compiled here need, as LLVM lists them.
pub fn target_features() -> String {
    #[cfg(feature = "mlir")]
    return meshweave_compiler::mlir::HostTarget::detect().features;
    #[cfg(not(feature = "mlir"))]
    String::new()
}
