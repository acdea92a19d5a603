//! Placement at the size of DeepSeek-V3 (58 layers of 256 experts), and at ExFlow's sizes.
//!
//! `cargo bench --no-default-features --bench placement` prints, next to the times, what is kept and
//! the bound, and how even loads become.

use divan::Bencher;
use meshweave_compiler::parallel::in_parallel;
use meshweave_compiler::placement::balance::{Slots, balance};
use meshweave_compiler::placement::bounds::{certify, evaluate};
use meshweave_compiler::placement::chain::{Chain, Levels};
use meshweave_compiler::placement::exact::{assignments, dynamic};
use meshweave_compiler::placement::search::{SearchOptions, search};
use meshweave_dsl::trace::TraceShape;
use meshweave_dsl::trace::statistics::transitions;
use meshweave_dsl::trace::synth::{Load, Random, Router};

fn main() {
    divan::main();
}

fn chain(layers: usize, experts: usize, topics: usize, concentration: f64, tokens: usize) -> Chain {
    let router = Router {
        shape: TraceShape {
            layers,
            experts,
            top_k: 1,
        },
        topics,
        noise: 0.3,
        concentration,
        load: Load::Uniform,
        seed: 1,
    };
    match router.trace(tokens) {
        Ok(trace) => Chain::new(&transitions(&trace)),
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1)
        }
    }
}

/// Topics and concentration of strong, medium and weak affinity.
const AFFINITIES: [(&str, usize, f64); 3] = [
    ("strong", 64, f64::INFINITY),
    ("medium", 16, 1.0),
    ("weak", 1, 0.0125),
];

#[divan::bench(args = AFFINITIES.map(|affinity| affinity.0), sample_count = 1, sample_size = 1)]
fn deepseek_v3_on_64_devices(bencher: Bencher, name: &str) {
    let (_, topics, concentration) = AFFINITIES[AFFINITIES
        .iter()
        .position(|affinity| affinity.0 == name)
        .unwrap_or(0)];
    let chain = chain(58, 256, topics, concentration, 100_000);
    bencher.bench_local(|| {
        let options = SearchOptions {
            rounds: 2,
            ..SearchOptions::default()
        };
        let division = search(&chain, &Levels::flat(64), &options);
        let bound = evaluate(&chain, &certify(&chain, 64, options.threads));
        let pairs = chain.pairs.len() as f64;
        eprintln!(
            "{name}: kept {:.4} (measured), at most {:.4} (bound)",
            chain.kept(&division) / pairs,
            bound / pairs
        );
    });
}

#[divan::bench(args = [(8, 2, 32), (8, 4, 32), (16, 2, 8)], sample_count = 3, sample_size = 1)]
fn proven_by_dynamic_programming(
    bencher: Bencher,
    (experts, groups, layers): (usize, usize, usize),
) {
    let chain = chain(layers, experts, 1, 0.1, 20_000);
    bencher.bench_local(|| dynamic(&chain, groups, 1e11));
}

#[divan::bench(args = [8, 64, 256], sample_count = 3, sample_size = 1)]
fn proven_by_assignments(bencher: Bencher, experts: usize) {
    let chain = chain(32, experts, 1, 0.1, 20_000);
    bencher.bench_local(|| assignments(&chain));
}

#[divan::bench(args = [(32, 9), (64, 5)], sample_count = 20, sample_size = 1)]
fn balance_58_layers_of_256(bencher: Bencher, (devices, per_device): (usize, usize)) {
    let mut random = Random::new(3);
    let mut layer = || -> Vec<f64> { (0..256).map(|_| (0.5 * random.normal()).exp()).collect() };
    let loads: Vec<Vec<f64>> = (0..58).map(|_| layer()).collect();
    let threads = SearchOptions::default().threads;
    let balanced = || {
        in_parallel(loads.len(), threads, |layer| {
            let slots = Slots {
                devices,
                per_device,
            };
            balance(&loads[layer], slots).map(|placed| placed.greatest)
        })
    };
    let balancedness = loads.iter().zip(balanced()).map(|(load, greatest)| {
        let mean = load.iter().sum::<f64>() / devices as f64;
        greatest.map_or(0.0, |greatest| mean / greatest)
    });
    eprintln!(
        "{devices} devices of {per_device} slots: balancedness {:.4} (measured)",
        balancedness.sum::<f64>() / loads.len() as f64
    );
    bencher.bench_local(balanced);
}
