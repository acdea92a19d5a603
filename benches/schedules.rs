//! Building, checking and simulating pipeline schedules at the sizes of large runs.
//!
//! `cargo bench --no-default-features --bench schedules`: one time is a schedule built from its rule,
//! checked (completeness, dependencies, deadlock of its lowering, memory) and simulated with real
//! costs (F : I : W = 1 : 1.4 : 0.8, messages and shared links).

use divan::Bencher;
use meshweave_compiler::schedule::{
    Builtin, Costs, PipelineError, Shape, build, check_memory, simulate,
};

fn main() {
    divan::main();
}

/// Names of the built-in schedules.
fn names() -> [&'static str; 16] {
    Builtin::ALL.map(Builtin::name)
}

/// Two chunks a rank where that can be chosen, two slices a sequence where it divides sequences.
fn built_and_simulated(
    name: &str,
    n_ranks: usize,
    n_microbatches: usize,
) -> Result<f64, PipelineError> {
    let builtin = Builtin::find(name).unwrap_or(Builtin::OneFOneB);
    let shape = builtin.fit(Shape::new(n_ranks, n_microbatches).chunks(2).slices(2));
    let mut costs = Costs::even(n_ranks, n_ranks * shape.n_chunks, 1.0, 1.4, 0.8);
    for stage in &mut costs.stages {
        stage.p2p_s = 0.05;
    }
    costs.latency_s = 0.01;
    let schedule = build(builtin, &shape, Some(&costs))?;
    check_memory(&schedule, &costs, f64::INFINITY)?;
    Ok(simulate(&schedule, &costs)?.step_s)
}

fn run(bencher: Bencher, name: &str, n_ranks: usize, n_microbatches: usize) {
    bencher.bench_local(|| {
        let name = divan::black_box(name);
        match built_and_simulated(name, n_ranks, n_microbatches) {
            Ok(step_s) => step_s,
            Err(error) => {
                eprintln!("{error}");
                std::process::exit(1)
            }
        }
    });
}

#[divan::bench(args = names(), sample_count = 3, sample_size = 1)]
fn ranks_32_microbatches_256(bencher: Bencher, name: &str) {
    run(bencher, name, 32, 256);
}

#[divan::bench(args = names(), sample_count = 1, sample_size = 1)]
fn ranks_64_microbatches_1024(bencher: Bencher, name: &str) {
    run(bencher, name, 64, 1024);
}
