//! Plans of training steps, of ops and of mappings: seconds, CPU seconds, and how good the plans are
//! known to be.
//!
//! `cargo bench --bench planning --no-default-features` (or `-- 8x8`, `-- mapping`, any part of a row's
//! name). Searches of ops run on one thread, those of mappings on all cores: CPU seconds compare across
//! machines and loads. "Untied" lets every layer choose for itself; mappings have everything open. Steps
//! are predicted, bounds are bounds.

use std::time::Instant;

use meshweave_compiler::differentiate::{Optimizer, differentiate};
use meshweave_compiler::import::read_config;
use meshweave_compiler::model::{DecoderConfig, Goal, GoldenSize, build_decoder};
use meshweave_compiler::plan::directives::Directives;
use meshweave_compiler::plan::estimate::{Job, Workload};
use meshweave_compiler::plan::outer::{self, Options, Space};
use meshweave_compiler::plan::verify::verify_plan;
use meshweave_compiler::plan::{SearchOptions, Tie, search};
use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::graph::Graph;
use meshweave_dsl::layout::Mesh;

/// As in the command.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Failure = Box<dyn std::error::Error>;

const LLAMA_3_8B: &str = include_str!("../examples/models/llama-3-8b/config.json");
const LLAMA_3_405B: &str = include_str!("../examples/models/llama-3.1-405b/config.json");
const DEEPSEEK_V3: &str = include_str!("../examples/models/deepseek-v3/config.json");

fn main() -> Result<(), Failure> {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with('-'))
        .collect();
    let is_wanted =
        |name: &str| wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str()));
    println!(
        "plan                            wall s    CPU-s     step ms      bound ms       gap  mesh"
    );
    for (name, batch, cluster, degrees, tie) in [
        (
            "llama-3-8b 8x8 tied",
            64,
            "h100:64",
            Some(vec![8, 8]),
            Tie::Layers,
        ),
        (
            "llama-3-8b 8x8 untied",
            64,
            "h100:64",
            Some(vec![8, 8]),
            Tie::None,
        ),
        (
            "llama-3-8b 2x4x2 tied",
            16,
            "h100:16",
            Some(vec![2, 4, 2]),
            Tie::Layers,
        ),
        (
            "llama-3-8b 2x4x2 untied",
            16,
            "h100:16",
            Some(vec![2, 4, 2]),
            Tie::None,
        ),
        (
            "llama-3-8b 4x4x4 tied",
            64,
            "h100:64",
            Some(vec![4, 4, 4]),
            Tie::Layers,
        ),
        (
            "llama-3-8b 4x4x4 untied",
            64,
            "h100:64",
            Some(vec![4, 4, 4]),
            Tie::None,
        ),
        (
            "llama-3-8b all meshes of 128",
            128,
            "h100:128",
            None,
            Tie::Layers,
        ),
    ] {
        if !is_wanted(name) {
            continue;
        }
        let cluster = Cluster::preset(cluster)?;
        let graph = llama(batch, 4096)?;
        let directives = Directives {
            meshes: degrees.into_iter().map(mesh).collect(),
            ..Directives::default()
        };
        let options = SearchOptions {
            tie,
            ..SearchOptions::default()
        };
        let (cpu, start) = (cpu_seconds()?, Instant::now());
        let solution = search(&graph, &cluster, &directives, &options)?;
        let (cpu, wall) = (cpu_seconds()? - cpu, start.elapsed().as_secs_f64());
        let certificate = &solution.certificate;
        println!(
            "{name:30} {wall:7.2}  {cpu:7.2}  {:10.3}  {:10.3}  {:7.4} %  {}",
            1e3 * certificate.predicted_s,
            1e3 * certificate.lower_bound_s,
            100.0 * certificate.gap,
            solution.plan.mesh
        );
        // The proof, added up again without the search.
        let (cpu, start) = (cpu_seconds()?, Instant::now());
        let verified = verify_plan(&graph, &cluster, &directives, &solution.plan)?;
        if let Some(bound_s) = verified.bound_s {
            println!(
                "  verified                     {:7.2}  {:7.2}  {:10.3}  {:10.3}",
                start.elapsed().as_secs_f64(),
                cpu_seconds()? - cpu,
                1e3 * verified.predicted_s,
                1e3 * bound_s
            );
        }
    }
    mappings(&is_wanted)
}

/// Mappings of published models on their clusters: every dimension is open, and the search ends when
/// its gap is closed.
fn mappings(is_wanted: &dyn Fn(&str) -> bool) -> Result<(), Failure> {
    for (name, model, cluster, batch, seq) in [
        ("mapping gpt-1t", gpt_1t(), "a100-80:3072", 3072, 2048),
        (
            "mapping deepseek-v3",
            read_config("deepseek-v3", DEEPSEEK_V3)?.config,
            "h800:2048",
            15_360,
            4096,
        ),
        (
            "mapping llama-3.1-405b",
            read_config("llama-3.1-405b", LLAMA_3_405B)?.config,
            "h100:16384",
            2048,
            8192,
        ),
    ] {
        if !is_wanted(name) {
            continue;
        }
        let cluster = Cluster::preset(cluster)?;
        let workload = Workload::new(model, batch, seq, Job::Train);
        let space = Space::everything(&workload, &cluster);
        let (cpu, start) = (cpu_seconds()?, Instant::now());
        let found = outer::search(&workload, &cluster, &space, &Options::default())?;
        let (cpu, wall) = (cpu_seconds()? - cpu, start.elapsed().as_secs_f64());
        let certificate = &found.certificate;
        println!(
            "{name:30} {wall:7.2}  {cpu:7.2}  {:10.3}  {:10.3}  {:7.4} %  {}",
            1e3 * certificate.predicted_s,
            1e3 * certificate.lower_bound_s,
            100.0 * certificate.gap,
            found.best.mapping
        );
    }
    Ok(())
}

/// A trillion parameters (Narayanan et al. 2021, table 1).
fn gpt_1t() -> DecoderConfig {
    let size = GoldenSize {
        n_layers: 128,
        embed: 25_600,
        heads: 160,
        ffn: 102_400,
        vocab: 51_200,
        seq: 2048,
        batch: 3072,
    };
    DecoderConfig::golden(&size, None)
}

fn mesh(degrees: Vec<usize>) -> Mesh {
    Mesh::new(["a", "b", "c", "d"].into_iter().zip(degrees))
}

/// The training graph of all 32 layers.
fn llama(batch: usize, seq: usize) -> Result<Graph, Failure> {
    let config = read_config("llama-3-8b", LLAMA_3_8B)?.config;
    let forward = build_decoder(&config, batch, seq, Goal::Training)?;
    Ok(differentiate(&forward, &Optimizer::GOLDEN_ADAMW)?)
}

/// CPU seconds of this process, all threads, those that have ended among them.
fn cpu_seconds() -> Result<f64, Failure> {
    /// Ticks a second in which Linux counts (`USER_HZ`).
    const TICKS: f64 = 100.0;
    let text = std::fs::read_to_string("/proc/self/stat")?;
    // Behind the name in parentheses: the state, then numbers; the 12th and 13th are user and system ticks.
    let behind = text.rsplit(')').next().unwrap_or_default();
    let ticks = behind.split_whitespace().skip(11).take(2);
    let ticks: Vec<f64> = ticks.map(str::parse).collect::<Result<_, _>>()?;
    Ok(ticks.iter().sum::<f64>() / TICKS)
}
