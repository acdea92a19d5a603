//! Full training steps of the golden model next to the matrix-multiplication roofline of the same run.
//!
//! `cargo bench --bench training` (or `-- tiny`, `-- small dp4`): AdamW steps of the golden model on
//! 1, dp4 and tp4 virtual devices, in CPU-seconds and wall seconds a step (the least of the rounds:
//! the machines are noisy), and where the time goes. CPU time is what compares across machines and
//! loads; `benches/baselines` holds the same model in JAX and PyTorch.

use std::time::Instant;

use meshweave::compile::{CompileOptions, compile};
use meshweave_compiler::differentiate::{Optimizer, differentiate};
use meshweave_compiler::model::{DecoderConfig, Goal, GoldenSize, build_decoder};
use meshweave_dsl::cluster::{Cluster, Host};
use meshweave_dsl::layout::Mesh;
use meshweave_dsl::program::ContractIndex;
use meshweave_dsl::timeline::{Category, Timeline};
use meshweave_runtime::contract::{ContractOptions, ContractPlan};
use meshweave_runtime::executor::{Session, SessionOptions};
use meshweave_runtime::reference::golden_tokens;
use meshweave_runtime::tensor::{Elements, HostTensor};

#[path = "../tests/support/plans.rs"]
mod plans;

const N_STEPS: usize = 4;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with('-'))
        .collect();
    let size_name = if wanted.iter().any(|arg| arg == "tiny") {
        "tiny"
    } else {
        "small"
    };
    let size = GoldenSize::named(size_name).ok_or("no such size")?;
    let peak = roofline()?;
    println!(
        "roofline: {:.1} GFLOP a CPU-second (measured, one thread, 512 × 1408 × 512)",
        peak / 1e9
    );
    println!(
        "golden `{size_name}`, AdamW step      CPU-s   wall s   of it products at the roofline   memory"
    );
    for (name, mesh, preferences) in [
        ("1", Mesh::new([("dp", 1)]), vec![]),
        (
            "dp4",
            Mesh::new([("dp", 4)]),
            vec![("dp", &["batch", "embed", "vocab"] as &[&str])],
        ),
        (
            "tp4",
            Mesh::new([("tp", 4)]),
            vec![("tp", &["heads", "ffn", "vocab", "seq", "embed"] as &[&str])],
        ),
    ] {
        if wanted.iter().any(|arg| arg != size_name) && !wanted.iter().any(|arg| arg == name) {
            continue;
        }
        bench(name, &size, &mesh, &preferences, peak)?;
    }
    Ok(())
}

fn bench(
    name: &str,
    size: &GoldenSize,
    mesh: &Mesh,
    preferences: &[(&str, &[&str])],
    peak: f64,
) -> Result<(), Failure> {
    let config = DecoderConfig::golden(size, None);
    let forward = build_decoder(&config, size.batch, size.seq, Goal::Training)?;
    let graph = differentiate(&forward, &Optimizer::GOLDEN_ADAMW)?;
    let plan = plans::preferring(&graph, mesh, preferences);
    let cluster = Cluster::local(mesh.n_ranks(), &Host::detect());
    let compiled = compile(&graph, &plan, &cluster, &CompileOptions::default())?;
    let compile_s: f64 = compiled.seconds.iter().map(|(_, seconds)| seconds).sum();
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("artifact");
    meshweave_runtime::artifact::write(&path, &compiled.program, &compiled.kernels, "")?;
    let (program, kernels) = meshweave_runtime::artifact::load(&path)?;
    let mut session = Session::new(program, kernels, &SessionOptions::default())?;
    let (tokens, targets) = golden_tokens(size.batch, size.seq, size.vocab);
    for (input, data) in [("tokens", tokens), ("targets", targets)] {
        let id = graph.find(input).ok_or("no such input")?;
        session.set(
            input,
            &HostTensor::new(graph.ty(id).clone(), Elements::I32(data))?,
        )?;
    }
    session.step()?;
    let mut least = (f64::INFINITY, f64::INFINITY);
    let mut last = None;
    for _ in 0..N_STEPS {
        let (cpu, start) = (cpu_seconds()?, Instant::now());
        last = Some(session.step()?);
        least = (
            least.0.min(cpu_seconds()? - cpu),
            least.1.min(start.elapsed().as_secs_f64()),
        );
    }
    let flops: f64 = session
        .program()
        .ranks
        .iter()
        .flat_map(|rank| &rank.instructions)
        .filter(|instruction| {
            matches!(
                instruction.action,
                meshweave_dsl::program::Action::Contract { .. }
            )
        })
        .map(|instruction| instruction.n_flops)
        .sum();
    let bytes: usize = session.arena_bytes().iter().sum();
    println!(
        "{name:<28} {:>8.3} {:>8.3} {:>21.3} s ({:.0} %) {:>10.1} MiB  (compiled in {compile_s:.1} s)",
        least.0,
        least.1,
        flops / peak,
        100.0 * flops / peak / least.0,
        bytes as f64 / (1 << 20) as f64
    );
    if let Some(timeline) = last {
        breakdown(&timeline);
    }
    Ok(())
}

/// Busy seconds of the last step by category and by the greatest instructions.
fn breakdown(timeline: &Timeline) {
    for category in [
        Category::Contract,
        Category::Attention,
        Category::Kernel,
        Category::Routine,
        Category::Collective,
    ] {
        println!("    {category:<11?} {:>8.3} s", timeline.busy_s(category));
    }
    let mut by_name: std::collections::BTreeMap<String, f64> = std::collections::BTreeMap::new();
    for event in timeline
        .events
        .iter()
        .filter(|event| event.category != Category::Contract)
    {
        let name: String = event.name.chars().filter(|c| !c.is_ascii_digit()).collect();
        *by_name.entry(name).or_default() += event.duration_s - event.wait_s;
    }
    let mut greatest: Vec<_> = by_name.into_iter().collect();
    greatest.sort_by(|a, b| b.1.total_cmp(&a.1));
    for (name, seconds) in greatest.into_iter().take(12) {
        println!("        {seconds:>8.3} s  {name}");
    }
}

/// Flops a CPU-second of the contraction library on a shape of the model.
fn roofline() -> Result<f64, Failure> {
    let (m, k, n) = (512, 512, 1408);
    let indices = [
        ContractIndex {
            size: m,
            a: k,
            b: 0,
            c: n,
        },
        ContractIndex {
            size: n,
            a: 0,
            b: 1,
            c: 1,
        },
        ContractIndex {
            size: k,
            a: 1,
            b: n,
            c: 0,
        },
    ];
    let plan = ContractPlan::new(
        &indices,
        ContractOptions {
            accumulate: false,
            alpha: 1.0,
        },
    )?;
    let (a, b, mut c) = (
        vec![1.0_f32; m * k],
        vec![0.5_f32; k * n],
        vec![0.0_f32; m * n],
    );
    let mut best = 0.0_f64;
    for _ in 0..40 {
        let start = Instant::now();
        plan.run(&a, &b, &mut c)?;
        best = best.max(2.0 * (m * k * n) as f64 / start.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// CPU seconds of this process, all threads.
fn cpu_seconds() -> Result<f64, Failure> {
    let mut total = 0.0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let path = task?.path().join("schedstat");
        let text = std::fs::read_to_string(path)?;
        total += text
            .split_whitespace()
            .next()
            .and_then(|ns| ns.parse::<f64>().ok())
            .unwrap_or(0.0)
            / 1e9;
    }
    Ok(total)
}
