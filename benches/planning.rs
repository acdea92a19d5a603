//! Op-level plans of training graphs: seconds, CPU seconds, and how good the plans are known to be.
//!
//! `cargo bench --bench planning` (or `-- 8x8`, any part of a row's name). The process runs one thread:
//! CPU seconds compare across machines and loads. "Untied" lets every layer choose for itself.

use std::time::Instant;

use meshweave_compiler::differentiate::{Optimizer, differentiate};
use meshweave_compiler::import::read_config;
use meshweave_compiler::model::{Goal, build_decoder};
use meshweave_compiler::plan::directives::Directives;
use meshweave_compiler::plan::{SearchOptions, search};
use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::graph::Graph;
use meshweave_dsl::layout::Mesh;

type Failure = Box<dyn std::error::Error>;

const LLAMA_3_8B: &str = include_str!("../examples/models/llama-3-8b/config.json");

fn main() -> Result<(), Failure> {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with('-'))
        .collect();
    println!("plan                              wall s    CPU-s   step ms     gap     mesh");
    for (name, n_layers, cluster, degrees) in [
        ("llama-3-8b 8x8", 32, "h100:64", Some(vec![8, 8])),
        ("llama-3-8b 2x4x2", 32, "h100:16", Some(vec![2, 4, 2])),
        ("llama-3-8b 4x4x4", 32, "h100:64", Some(vec![4, 4, 4])),
        ("llama-3-8b on 128", 32, "h100:128", None),
    ] {
        if !wanted.is_empty() && !wanted.iter().any(|part| name.contains(part.as_str())) {
            continue;
        }
        let cluster = Cluster::preset(cluster)?;
        let graph = llama(n_layers, 64, 4096)?;
        let directives = Directives {
            meshes: degrees.into_iter().map(mesh).collect(),
            ..Directives::default()
        };
        let options = SearchOptions::default();
        let (cpu, start) = (cpu_seconds()?, Instant::now());
        let solution = search(&graph, &cluster, &directives, &options)?;
        let (cpu, wall) = (cpu_seconds()? - cpu, start.elapsed().as_secs_f64());
        let certificate = &solution.certificate;
        println!(
            "{name:32} {wall:7.2}  {cpu:7.2}  {:8.2}  {:6.3} %  {}",
            1e3 * certificate.predicted_s,
            100.0 * certificate.gap,
            solution.plan.mesh
        );
    }
    Ok(())
}

fn mesh(degrees: Vec<usize>) -> Mesh {
    Mesh::new(["a", "b", "c", "d"].into_iter().zip(degrees))
}

fn llama(n_layers: usize, batch: usize, seq: usize) -> Result<Graph, Failure> {
    let mut config = read_config("llama-3-8b", LLAMA_3_8B)?.config;
    config.n_layers = n_layers;
    let forward = build_decoder(&config, batch, seq, Goal::Training)?;
    Ok(differentiate(&forward, &Optimizer::GOLDEN_ADAMW)?)
}

/// CPU seconds of this process, all threads.
fn cpu_seconds() -> Result<f64, Failure> {
    let text = std::fs::read_to_string("/proc/self/schedstat")?;
    let nanoseconds: f64 = text.split(' ').next().unwrap_or("0").parse()?;
    Ok(nanoseconds / 1e9)
}
