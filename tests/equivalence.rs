//! Compiled programs against the oracle.
#![cfg(feature = "mlir")]

#[path = "support/plans.rs"]
mod plans;

use meshweave::compile::{CompileOptions, compile};
use meshweave_compiler::differentiate::{Optimizer, differentiate};
use meshweave_compiler::model::{DecoderConfig, Goal, GoldenSize, build_decoder};
use meshweave_compiler::partition::Keep;
use meshweave_dsl::cluster::{Cluster, Host};
use meshweave_dsl::layout::Mesh;

#[test]
fn compiles() {
    let size = GoldenSize::named("tiny").unwrap();
    let config = DecoderConfig::golden(&size, None);
    let forward = build_decoder(&config, size.batch, size.seq, Goal::Training).unwrap();
    let graph = differentiate(&forward, &Optimizer::GOLDEN_ADAMW).unwrap();
    for (mesh, preferences) in [
        (Mesh::new([("dp", 1)]), vec![]),
        (Mesh::new([("dp", 8)]), vec![("dp", &["batch"] as &[&str])]),
        (
            Mesh::new([("dp", 2), ("tp", 4)]),
            vec![("dp", &["batch"]), ("tp", &["heads", "ffn", "vocab"])],
        ),
    ] {
        let plan = plans::preferring(&graph, &mesh, &preferences);
        let cluster = Cluster::local(mesh.n_ranks(), &Host::nominal());
        let compiled = compile(
            &graph,
            &plan,
            &cluster,
            &CompileOptions {
                keep: Keep::Gradients,
                emit: vec![],
            },
        )
        .unwrap();
        println!(
            "{mesh}: {:?} kernels {} arena {:?} instr {}",
            compiled.seconds,
            compiled.program.kernels.len(),
            compiled
                .program
                .ranks
                .iter()
                .map(|rank| rank.arena_bytes)
                .collect::<Vec<_>>(),
            compiled.program.ranks[0].instructions.len()
        );
    }
}
