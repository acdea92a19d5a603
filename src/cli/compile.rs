//! `meshweave compile`.

use std::path::PathBuf;

use clap::Args;
use meshweave_compiler::partition::Keep;
use meshweave_dsl::diagnostics::Class;
use serde_json::json;

use super::experts::{at_home, with_replicas};
use super::render::{bytes, plan_summary, seconds};
use super::{Format, Input, runtime_error};
use crate::cli::output::{out, outln};
use crate::compile::{CompileOptions, stage_names, target_features};
use crate::error::{Error, Result};
use crate::session::Session;

#[derive(Debug, Args)]
pub struct CompileArgs {
    #[command(flatten)]
    input: Input,
    /// The artifact folder.
    #[arg(long, short)]
    out: Option<PathBuf>,
    /// Print a stage instead: graph, plan, local, mlir, mlir-after:<pass>, llvm, asm or
    /// ptx:<target>.
    #[arg(long, value_name = "STAGE")]
    emit: Option<String>,
    /// Compile for a GPU besides this host: cuda:sm_80, cuda:sm_90, cuda:sm_90a (H100 and H200 alone, with
    /// their own tensor-core instructions) or cuda:sm_100.
    #[arg(long, value_name = "TARGET")]
    target: Option<String>,
    /// Keep the gradients as outputs.
    #[arg(long)]
    gradients: bool,
}

/// Plans and compiles into an artifact, or prints a stage.
pub fn compile(args: &CompileArgs, format: Format) -> Result<()> {
    if let Some(stage) = &args.emit {
        let known = stage_names();
        if !known.contains(stage) {
            return Err(
                Error::plain(Class::Invalid, format!("there is no stage `{stage}`"))
                    .help(format!("stages are {}", known.join(", "))),
            );
        }
    } else if args.out.is_none() {
        return Err(
            Error::plain(Class::Invalid, "nowhere to write the artifact")
                .help("give a folder with --out, or a stage to print with --emit"),
        );
    }
    let gpu = args.target.as_deref().map(gpu_target).transpose()?;
    let session = Session::open(&args.input.document, args.input.cluster.as_deref())?;
    let mut session = with_replicas(session)?;
    // Who runs an artifact knows of no placement: experts are at home in their own order.
    session.replicas = session.replicas.as_ref().map(at_home);
    let model = session.model()?;
    if args.emit.as_deref() == Some("graph") {
        out!("{}", meshweave_dsl::graph::text::print(&model.graph));
        return Ok(());
    }
    let solution = session.plan(&model)?;
    if args.emit.as_deref() == Some("plan") {
        out!("{}", session.plan_text(&model, &solution));
        return Ok(());
    }
    let options = CompileOptions {
        keep: if args.gradients {
            Keep::Gradients
        } else {
            Keep::Outputs
        },
        emit: args.emit.iter().cloned().collect(),
        gpu,
    };
    let compiled = session.compile(&model, &solution.plan, &options)?;
    if args.emit.is_some() {
        for (_, text) in &compiled.emitted {
            out!("{text}");
        }
        return Ok(());
    }
    let Some(out) = &args.out else { return Ok(()) };
    meshweave_runtime::artifact::write_with_gpu(
        out,
        &compiled.program,
        &compiled.kernels,
        &target_features(),
        compiled.code.as_ref(),
    )
    .map_err(runtime_error)?;
    let arena_bytes = compiled
        .program
        .ranks
        .iter()
        .map(|rank| rank.arena_bytes)
        .max()
        .unwrap_or(0);
    let compile_s: f64 = compiled.seconds.iter().map(|(_, seconds)| seconds).sum();
    match format {
        Format::Text => {
            eprint!("{}", plan_summary(&session.request, &solution));
            eprintln!(
                "compiled   {} kernels, {} a device (planned to the byte), in {} (measured)",
                compiled.program.kernels.len(),
                bytes(arena_bytes as f64),
                seconds(compile_s)
            );
            outln!("{}", out.display());
        }
        Format::Json => outln!(
            "{}",
            json!({
                "artifact": out,
                "n_kernels": compiled.program.kernels.len(),
                "arena_bytes": arena_bytes,
                "seconds": compiled.seconds,
                "certificate": solution.certificate,
            })
        ),
    }
    Ok(())
}

/// The GPU of a target such as `cuda:sm_90`.
pub(super) fn gpu_target(target: &str) -> Result<String> {
    let stages = stage_names();
    let known: Vec<&str> = stages
        .iter()
        .filter_map(|stage| stage.strip_prefix("ptx:"))
        .collect();
    let gpu = target.strip_prefix("cuda:").unwrap_or_default();
    // A build without a code generator says so later.
    if known.contains(&gpu) || known.is_empty() {
        return Ok(gpu.into());
    }
    let targets: Vec<String> = known.iter().map(|gpu| format!("cuda:{gpu}")).collect();
    Err(
        Error::plain(Class::Invalid, format!("there is no target `{target}`"))
            .help(format!("targets are {}", targets.join(", "))),
    )
}
