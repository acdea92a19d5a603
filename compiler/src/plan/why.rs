//! Why there is no plan, and the smallest change that would give one.
//!
//! Enters: a request and what failed on every mesh. Leaves: an error with figures.
//! Invariant: a conflict is minimal: without any one of its statements the others can hold. A
//! relaxation that names its figures was planned.

use std::collections::BTreeSet;

use meshweave_dsl::graph::Graph;
use meshweave_dsl::layout::Mesh;

use super::classes::Classes;
use super::grid::Grid;
use super::instance::build_instance;
use super::intra::{Memory, NoSolution};
use super::metric::Metric;
use super::rules::Rules;
use super::{Failure, PlanRequest, SearchError, Tie, bytes_text, plan_on};

/// Statements that are tried without, where memory is short.
const MAX_TRIED: usize = 6;

/// The error of a request without any plan.
pub(super) fn why_nothing(
    graph: &Graph,
    request: &PlanRequest,
    failures: Vec<(Mesh, Failure)>,
) -> SearchError {
    let mut least: Option<(Mesh, Memory)> = None;
    let mut other = None;
    for (mesh, failure) in failures {
        match failure {
            Failure::Solver(NoSolution::Memory { least: memory }) => {
                let is_less = |best: &(Mesh, Memory)| memory.peak_bytes() < best.1.peak_bytes();
                if least.as_ref().is_none_or(is_less) {
                    least = Some((mesh, memory));
                }
            }
            failure => other = other.or(Some((mesh, failure))),
        }
    }
    if let Some((mesh, memory)) = least {
        return too_little_memory(graph, request, &mesh, memory);
    }
    match other {
        Some((mesh, Failure::Rules(no_strategy))) => SearchError::Conflict {
            message: format!(
                "on mesh {mesh} there is no way to lay out `{}` that all statements about it allow; \
                 relax one of them",
                no_strategy.name
            ),
            rules: conflict(graph, request, &mesh, &no_strategy.statements),
        },
        Some((mesh, Failure::Solver(NoSolution::Rules))) => SearchError::Conflict {
            message: format!(
                "on mesh {mesh} the statements contradict each other: each can hold, all cannot"
            ),
            rules: conflict(graph, request, &mesh, &[]),
        },
        Some((_, Failure::Plan(error))) => error,
        _ => SearchError::Internal("no mesh was tried".into()),
    }
}

/// Rules, by their numbers, that cannot all hold on a mesh although all but any one statement can
/// (a deletion filter: Chinneck and Dravnieks 1991). Begins with the suspects, where there are any.
fn conflict(graph: &Graph, request: &PlanRequest, mesh: &Mesh, suspects: &[usize]) -> Vec<usize> {
    let all: BTreeSet<usize> = request
        .statements
        .iter()
        .flat_map(|(_, rules)| rules)
        .copied()
        .collect();
    let mut kept: BTreeSet<usize> = suspects.iter().copied().collect();
    let can_hold = |kept: &BTreeSet<usize>| {
        let dropped: BTreeSet<usize> = all.difference(kept).copied().collect();
        is_possible(graph, request, mesh, &request.rules.without(&dropped))
    };
    if kept.is_empty() || can_hold(&kept) {
        kept = all.clone();
    }
    for (_, rules) in &request.statements {
        let fewer: BTreeSet<usize> = kept.difference(rules).copied().collect();
        if fewer.len() < kept.len() && !fewer.is_empty() && !can_hold(&fewer) {
            kept = fewer;
        }
    }
    kept.into_iter().collect()
}

/// Whether some plan keeps the rules on a mesh, whatever it needs.
fn is_possible(graph: &Graph, request: &PlanRequest, mesh: &Mesh, rules: &Rules) -> bool {
    let classes = Classes::new(graph, rules, Tie::Layers);
    let grid = Grid::new(mesh.clone(), &request.cluster);
    let mut metric = Metric::new(&grid);
    let instance = build_instance(graph, &classes, &grid, rules, &mut metric);
    instance.is_ok_and(|instance| instance.network(&mut metric).make_consistent())
}

fn too_little_memory(
    graph: &Graph,
    request: &PlanRequest,
    mesh: &Mesh,
    memory: Memory,
) -> SearchError {
    let (needed, budget) = (memory.peak_bytes(), request.budget_bytes());
    let device_bytes = request.cluster.device.memory_bytes as f64;
    let n_devices = request.cluster.n_devices();
    let mut ways = Vec::new();
    if needed <= device_bytes {
        ways.push(format!(
            "raise the budget from {} to {} (the device has {})",
            bytes_text(budget),
            bytes_text(needed),
            bytes_text(device_bytes)
        ));
    }
    ways.extend(without_a_statement(graph, request, mesh));
    ways.push(format!(
        "use about {} devices instead of {n_devices}",
        (n_devices as f64 * needed / budget).ceil()
    ));
    if memory.saved_bytes > memory.gradient_bytes {
        ways.push(format!(
            "a smaller batch ({} of it are saved activations)",
            bytes_text(memory.saved_bytes)
        ));
    }
    SearchError::Infeasible(format!(
        "nothing fits: the plan of least memory (mesh {mesh}) needs {} a device, {} is available; {}",
        bytes_text(needed),
        bytes_text(budget),
        ways.join(", or ")
    ))
}

/// The one statement without which the fastest plan fits, with its figures.
fn without_a_statement(graph: &Graph, request: &PlanRequest, mesh: &Mesh) -> Option<String> {
    let mut best: Option<(f64, String)> = None;
    for (text, rules) in request.statements.iter().take(MAX_TRIED) {
        let freed = PlanRequest {
            rules: request.rules.without(rules),
            ..request.clone()
        };
        let classes = Classes::new(graph, &freed.rules, Tie::Layers);
        let cutoff_s = best.as_ref().map_or(f64::INFINITY, |best| best.0);
        let Ok(found) = plan_on(graph, &classes, &freed, mesh, cutoff_s, None) else {
            continue;
        };
        let peak_bytes = found
            .plan
            .certificate
            .as_ref()
            .map_or(0.0, |certificate| certificate.memory.peak_bytes());
        if found.seconds < cutoff_s {
            let way = format!(
                "drop `{text}`: then {} a device and {:.3} ms a step (predicted)",
                bytes_text(peak_bytes),
                1e3 * found.seconds
            );
            best = Some((found.seconds, way));
        }
    }
    best.map(|(_, way)| way)
}
