//! Placement at the sizes of ExFlow, beside the plain integer program.
//!
//! `cargo run --example exflow` prints the table of `docs/placement.md`; `-- SECONDS` gives HiGHS another
//! time than 60 s.

use std::process::ExitCode;
use std::time::Instant;

use meshweave::compiler::placement::chain::Chain;
use meshweave::compiler::placement::ilp::{Formulation, solve};
use meshweave::compiler::placement::price::Costs;
use meshweave::compiler::placement::search::SearchOptions;
use meshweave::compiler::placement::solve::{
    Evidence, Method, Objective, Request, place as place_by,
};
use meshweave::dsl::trace::TraceShape;
use meshweave::dsl::trace::statistics::transitions;
use meshweave::dsl::trace::synth::{Load, Router};

/// Experts, layers, devices.
const SIZES: [(usize, usize, usize); 10] = [
    (8, 4, 2),
    (8, 12, 4),
    (8, 32, 2),
    (8, 32, 8),
    (16, 8, 4),
    (16, 24, 16),
    (16, 32, 8),
    (32, 12, 8),
    (64, 8, 8),
    (64, 32, 8),
];

/// Larger integer programs do not fit beside other work: 8 rows for each of E² (L − 1) transitions.
const MOST_TRANSITIONS: usize = 40_000;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let limit_s = std::env::args().nth(1).map_or(Ok(60.0), |text| {
        text.parse::<f64>()
            .map_err(|_| format!("`{text}` is no number of seconds"))
    })?;
    println!(
        "| E | L | G | kept (measured) | bound | gap | how | s | plain ILP kept | proven | s |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for (experts, layers, devices) in SIZES {
        println!("{}", line(experts, layers, devices, limit_s)?);
    }
    Ok(())
}

fn line(experts: usize, layers: usize, devices: usize, limit_s: f64) -> Result<String, String> {
    let router = Router {
        shape: TraceShape {
            layers,
            experts,
            top_k: 1,
        },
        topics: 1,
        noise: 0.3,
        concentration: 0.1,
        load: Load::Uniform,
        seed: 1,
    };
    let trace = router.trace(20_000).map_err(|error| error.to_string())?;
    let request = Request {
        devices,
        per_node: devices,
        slots: None,
        objective: Objective::Affinity,
        costs: Costs {
            expert_s: 0.0,
            within_node_s: 1.0,
            between_nodes_s: 1.0,
        },
        expert_bytes: None,
        present: None,
        held_out: 0.0,
        search: SearchOptions::default(),
        exact_steps: 3e8,
        coupled_steps: 0,
    };
    let started = Instant::now();
    let placed =
        place_by(&Evidence::of_trace(&trace), None, &request).map_err(|error| error.to_string())?;
    let seconds = started.elapsed().as_secs_f64();
    let how = match placed.report.method {
        Method::Assignments => "assignments, proven",
        Method::DynamicProgramming => "dynamic programming, proven",
        _ => "search",
    };
    let chain = Chain::new(&transitions(&trace));
    let plain = if experts * experts * (layers - 1) > MOST_TRANSITIONS {
        "not tried | | ".to_owned()
    } else {
        let started = Instant::now();
        let solved = solve(&chain, devices, Formulation::Plain, limit_s);
        let seconds = started.elapsed().as_secs_f64();
        match solved {
            Ok(solved) => format!(
                "{:.4} | {} | {seconds:.1}",
                solved.kept / chain.total(),
                if solved.is_optimal { "yes" } else { "no" }
            ),
            Err(_) => format!("none found | no | {seconds:.1}"),
        }
    };
    let share = &placed.report.device;
    Ok(format!(
        "| {experts} | {layers} | {devices} | {:.4} | {:.4} | {:.2} % | {how} | {seconds:.2} | {plain} |",
        share.kept,
        share.bound,
        100.0 * share.gap(),
    ))
}
