//! Planning: from a graph, a cluster and partial decisions to a plan with a certificate.
//!
//! Enters: a global graph, a cluster, [`directives`]. Leaves: a [`Plan`] whose every op and source is
//! placed.
//! Invariant: the certificate's seconds are [`price::price_plan`]'s, never the solver's word; its
//! lower bound holds for every mesh that it lists.
//!
//! For each mesh the choice of all placements is one linear program ([`intra`]), near-integral
//! because few distinct layouts meet on a tensor; repeated layers are planned once ([`classes`]).

pub mod cost;
pub mod estimate;
pub mod outer;
pub mod directives;
mod rules;
pub mod price;
pub mod explain;
mod grid;
mod classes;
mod facts;
mod instance;
mod intra;
mod meshes;
#[cfg(test)]
mod tests;

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::graph::Graph;
use meshweave_dsl::layout::Mesh;
use meshweave_dsl::plan::{Certificate, MeshResult, Plan};

use classes::{Classes, class_name};
use directives::Directives;
use grid::{Grid, MAX_AXES, MAX_DIMS, Metric};
use instance::{Habits, NoStrategy, build_instance};
use intra::{Memory, NoSolution, SolveLimits, solve};
use price::price_plan;
use rules::Rules;

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SearchError {
    /// The request contradicts the graph or itself.
    #[error("{0}")]
    Invalid(String),
    /// Rules (by their numbers in the directives) that cannot all hold.
    #[error("{message}")]
    Conflict { message: String, rules: Vec<usize> },
    /// Nothing fits the cluster.
    #[error("{0}")]
    Infeasible(String),
    /// The solver gave up.
    #[error("{0}")]
    Exhausted(String),
    /// A graph or mesh beyond what the planner handles.
    #[error("{0}")]
    Unsupported(String),
    /// Our bug.
    #[error("internal error in planning: {0}")]
    Internal(String),
}

/// How to search.
#[derive(Clone, Debug, PartialEq)]
pub struct SearchOptions {
    /// Name of the plan.
    pub name: String,
    /// Axes of the meshes that are searched where no mesh is asked for.
    pub max_axes: usize,
    /// Relative gap at which the search of a mesh stops.
    pub gap: f64,
    /// Seconds of branching on a mesh, where the relaxation is fractional.
    pub branch_s: f64,
}

impl Default for SearchOptions {
    fn default() -> Self {
        Self {
            name: "plan".into(),
            max_axes: 2,
            gap: 1e-4,
            branch_s: 10.0,
        }
    }
}

/// A plan and how it was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Solution {
    /// Bears its certificate.
    pub plan: Plan,
    pub certificate: Certificate,
    /// Wall-clock seconds of the search.
    pub solve_s: f64,
}

/// Part of a device's memory that plans leave free: allocators, libraries and what prices miss.
pub const HEADROOM: f64 = 0.1;
/// Rounds of taking the working bytes of a plan off the budget of the next.
const N_BUDGET_ROUNDS: usize = 4;

/// Finds the fastest plan of the graph on the cluster that keeps the directives; a plan to be
/// replayed is checked and priced again instead.
///
/// # Errors
/// `Conflict` when rules exclude each other, `Infeasible` when nothing fits the memory, `Invalid`
/// for a mesh or a replayed plan that does not fit, `Unsupported` for tensors or meshes of too many
/// dims or axes, `Exhausted` when the solver gives up.
pub fn search(
    graph: &Graph,
    cluster: &Cluster,
    directives: &Directives,
    options: &SearchOptions,
) -> Result<Solution, SearchError> {
    let start = std::time::Instant::now();
    let request = PlanRequest::new(cluster, directives, options);
    let plan = match &directives.replay {
        Some(replayed) => replay(graph, &request, replayed)?,
        None => plan(graph, &request).map_err(|error| once_a_statement(error, directives))?,
    };
    let certificate = plan.certificate.clone();
    let certificate = certificate
        .ok_or_else(|| SearchError::Internal("a plan without its certificate".into()))?;
    Ok(Solution {
        plan,
        certificate,
        solve_s: start.elapsed().as_secs_f64(),
    })
}

/// A conflict with one rule of every statement: a statement about all layers made many.
fn once_a_statement(error: SearchError, directives: &Directives) -> SearchError {
    let SearchError::Conflict { message, mut rules } = error else {
        return error;
    };
    let mut seen = Vec::new();
    rules.retain(|number| {
        let rule = directives.rules.get(*number);
        let place = rule.map(|rule| (rule.span, rule.text.as_str()));
        let is_new = !seen.contains(&place);
        seen.push(place);
        is_new
    });
    SearchError::Conflict { message, rules }
}

/// Which meshes to search.
#[derive(Clone, Debug, PartialEq)]
enum Meshes {
    /// All of at most so many axes; their names are given by what they come to do.
    Enumerate { max_axes: usize },
    /// These, with the names that rules use.
    Given(Vec<Mesh>),
}

/// What to plan for.
#[derive(Clone, Debug, PartialEq)]
struct PlanRequest {
    name: String,
    cluster: Cluster,
    meshes: Meshes,
    rules: Rules,
    budget_bytes: Option<f64>,
    gap: f64,
    branch_s: f64,
}

impl PlanRequest {
    fn new(cluster: &Cluster, directives: &Directives, options: &SearchOptions) -> Self {
        Self {
            name: options.name.clone(),
            cluster: cluster.clone(),
            meshes: match directives.meshes.as_slice() {
                [] => Meshes::Enumerate {
                    max_axes: options.max_axes,
                },
                meshes => Meshes::Given(meshes.to_vec()),
            },
            rules: Rules::new(&directives.rules),
            budget_bytes: directives.budget_bytes.map(|n_bytes| n_bytes as f64),
            gap: options.gap,
            branch_s: options.branch_s,
        }
    }

    /// Bytes a device may use.
    fn budget_bytes(&self) -> f64 {
        let memory = self.cluster.device.memory_bytes as f64;
        self.budget_bytes.unwrap_or(memory * (1.0 - HEADROOM))
    }
}

/// The fastest plan on the meshes of the request.
fn plan(graph: &Graph, request: &PlanRequest) -> Result<Plan, SearchError> {
    let candidates = candidates(graph, request)?;
    let classes = Classes::new(graph, &request.rules);
    let mut best: Option<Plan> = None;
    let mut results = Vec::with_capacity(candidates.len());
    let mut failures = Vec::new();
    let mut habits: Option<Habits> = None;
    for mesh in candidates {
        let is_wide = n_real_axes(&mesh) > MAX_FREE_AXES;
        if is_wide && habits.is_none() {
            habits = Some(learn_habits(graph, &classes, request));
        }
        let habits = habits.as_ref().filter(|_| is_wide);
        match plan_on(graph, &classes, request, &mesh, habits) {
            Ok((found, result)) => {
                let seconds = |plan: &Plan| predicted_s(plan);
                if best
                    .as_ref()
                    .is_none_or(|best| seconds(&found) < seconds(best))
                {
                    best = Some(found);
                }
                results.push(result);
            }
            Err(failure) => {
                results.push(MeshResult {
                    mesh: mesh.clone(),
                    predicted_s: None,
                    lower_bound_s: f64::INFINITY,
                    n_variables: 0,
                    n_constraints: 0,
                    n_fractional: 0,
                    reason: Some(failure.brief()),
                });
                failures.push((mesh, failure));
            }
        }
    }
    let Some(mut best) = best else {
        return Err(why_nothing(request, failures));
    };
    results.sort_by(|a, b| {
        let seconds = |result: &MeshResult| result.predicted_s.unwrap_or(f64::INFINITY);
        seconds(a).total_cmp(&seconds(b))
    });
    let bounds = results.iter().map(|result| result.lower_bound_s);
    let lower_bound_s = bounds.fold(f64::INFINITY, f64::min);
    if let Some(certificate) = &mut best.certificate {
        certificate.lower_bound_s = lower_bound_s.min(certificate.predicted_s);
        certificate.gap = gap(certificate.lower_bound_s, certificate.predicted_s);
        for result in &mut results {
            // JSON knows no infinity; a mesh without a plan has no bound.
            if !result.lower_bound_s.is_finite() {
                result.lower_bound_s = 0.0;
            }
        }
        let position = results.iter().position(|result| result.mesh == best.mesh);
        if let Some(position) = position {
            let own = results.remove(position);
            results.insert(0, own);
        }
        certificate.meshes = results;
        certificate
            .searched
            .insert(0, searched(&certificate.meshes));
        certificate.not_searched = not_searched(request, &certificate.meshes);
    }
    Ok(match request.meshes {
        Meshes::Enumerate { .. } => meshes::name_axes(graph, best),
        Meshes::Given(_) => best,
    })
}

/// A complete plan, checked and priced.
fn replay(graph: &Graph, request: &PlanRequest, replayed: &Plan) -> Result<Plan, SearchError> {
    candidates(
        graph,
        &PlanRequest {
            meshes: Meshes::Given(vec![replayed.mesh.clone()]),
            ..request.clone()
        },
    )?;
    let price = price_plan(graph, replayed, &request.cluster)?;
    let budget_bytes = request.budget_bytes();
    if price.memory.peak_bytes() > budget_bytes {
        return Err(SearchError::Infeasible(format!(
            "the replayed plan needs {} a device, {} is available; raise the budget, or drop some of \
             its placements to have them searched again",
            bytes_text(price.memory.peak_bytes()),
            bytes_text(budget_bytes)
        )));
    }
    let predicted_s = price.seconds();
    // No search: what is left as a bound is the contractions, evenly divided.
    let grid = Grid::new(Mesh::new([("a", 1)]), &request.cluster);
    let facts = facts::Facts::new(graph);
    let whole_s: f64 = graph
        .ops()
        .filter(|(_, op)| op.kind.is_matmul())
        .map(|(_, op)| {
            let (inputs, results) = facts::op_types(graph, op);
            let types: Vec<_> = inputs.into_iter().chain(results).cloned().collect();
            facts.seconds(op, &types, &grid.cluster) - grid.cluster.device.launch_s
        })
        .sum();
    let lower_bound_s = (whole_s / replayed.mesh.n_ranks() as f64).min(predicted_s);
    let mut plan = replayed.clone();
    plan.certificate = Some(Certificate {
        cluster: request.cluster.name.clone(),
        predicted_s,
        lower_bound_s,
        gap: gap(lower_bound_s, predicted_s),
        parts: price.time,
        memory: price.memory,
        budget_bytes,
        searched: Vec::new(),
        not_searched: vec!["anything: the plan was given, checked and priced".into()],
        meshes: vec![MeshResult {
            mesh: plan.mesh.clone(),
            predicted_s: Some(predicted_s),
            lower_bound_s,
            n_variables: 0,
            n_constraints: 0,
            n_fractional: 0,
            reason: None,
        }],
    });
    Ok(plan)
}

/// Axes of a mesh up to which every factor is tried on every axis.
const MAX_FREE_AXES: usize = 2;

fn n_real_axes(mesh: &Mesh) -> usize {
    mesh.axes().iter().filter(|(_, degree)| *degree > 1).count()
}

/// What the free plans of all meshes of few axes do, and what the rules name.
fn learn_habits(graph: &Graph, classes: &Classes, request: &PlanRequest) -> Habits {
    let free = PlanRequest {
        rules: Rules::default(),
        ..request.clone()
    };
    let mut habits = Habits::default();
    for mesh in meshes::enumerate_meshes(&request.cluster, MAX_FREE_AXES) {
        if let Ok((plan, _)) = plan_on(graph, classes, &free, &mesh, None) {
            habits.learn(graph, classes, &plan);
        }
    }
    habits.allow(&request.rules.dims());
    habits
}

fn predicted_s(plan: &Plan) -> f64 {
    let certificate = plan.certificate.as_ref();
    certificate.map_or(f64::INFINITY, |certificate| certificate.predicted_s)
}

fn gap(lower_bound_s: f64, predicted_s: f64) -> f64 {
    if predicted_s > 0.0 {
        (1.0 - lower_bound_s / predicted_s).max(0.0)
    } else {
        0.0
    }
}

fn candidates(graph: &Graph, request: &PlanRequest) -> Result<Vec<Mesh>, SearchError> {
    if let Some(wide) = graph
        .tensors
        .iter()
        .find(|tensor| tensor.ty.shape.len() > MAX_DIMS)
    {
        return Err(SearchError::Unsupported(format!(
            "`{}` has {} dims; the planner handles {MAX_DIMS}",
            wide.name,
            wide.ty.shape.len()
        )));
    }
    let meshes = match &request.meshes {
        Meshes::Enumerate { max_axes } => {
            meshes::enumerate_meshes(&request.cluster, (*max_axes).min(MAX_AXES))
        }
        Meshes::Given(meshes) => meshes.clone(),
    };
    for mesh in &meshes {
        let n_devices = request.cluster.n_devices();
        if mesh.n_ranks() != n_devices {
            return Err(SearchError::Invalid(format!(
                "mesh {mesh} has {} ranks and cluster `{}` has {n_devices} devices: change a degree \
                 or the cluster",
                mesh.n_ranks(),
                request.cluster.name
            )));
        }
        if mesh.axes().len() > MAX_AXES {
            return Err(SearchError::Unsupported(format!(
                "mesh {mesh} has {} axes; the planner handles {MAX_AXES}",
                mesh.axes().len()
            )));
        }
    }
    if meshes.is_empty() {
        return Err(SearchError::Invalid("there is no mesh to plan on".into()));
    }
    Ok(meshes)
}

/// Why a mesh has no plan.
enum Failure {
    Rules(NoStrategy),
    Solver(NoSolution),
    Plan(SearchError),
}

impl Failure {
    fn brief(&self) -> String {
        match self {
            Self::Rules(no_strategy) => format!("no way to place `{}`", no_strategy.name),
            Self::Solver(NoSolution::Memory { least }) => {
                format!("needs at least {} a device", bytes_text(least.peak_bytes()))
            }
            Self::Solver(NoSolution::Rules) => "the statements contradict each other".into(),
            Self::Solver(NoSolution::Solver(error)) => error.clone(),
            Self::Plan(error) => error.to_string(),
        }
    }
}

/// The best plan on one mesh.
fn plan_on(
    graph: &Graph,
    classes: &Classes,
    request: &PlanRequest,
    mesh: &Mesh,
    habits: Option<&Habits>,
) -> Result<(Plan, MeshResult), Failure> {
    let grid = Grid::new(mesh.clone(), &request.cluster);
    let mut metric = Metric::new(&grid);
    let instance = build_instance(graph, classes, &grid, &request.rules, habits, &mut metric)
        .map_err(Failure::Rules)?;
    let budget_bytes = request.budget_bytes();
    let mut working_bytes: f64 = 0.0;
    // What ops work on is known only with a plan: it comes off the budget of the next round.
    for round in 0..N_BUDGET_ROUNDS {
        let limits = SolveLimits {
            gap: request.gap,
            branch_s: request.branch_s,
            budget_bytes: budget_bytes - working_bytes,
        };
        let solved = solve(&instance, limits, &mut metric).map_err(|error| match error {
            NoSolution::Memory { mut least } => {
                least.kept_bytes += working_bytes;
                Failure::Solver(NoSolution::Memory { least })
            }
            other => Failure::Solver(other),
        })?;
        let mut plan = instance.plan(&solved.assignment, graph, classes, &grid, &request.name);
        let price = price_plan(graph, &plan, &request.cluster).map_err(Failure::Plan)?;
        if price.memory.peak_bytes() > budget_bytes && round + 1 < N_BUDGET_ROUNDS {
            working_bytes = price.memory.working_bytes.max(working_bytes * 1.1);
            continue;
        }
        if price.memory.peak_bytes() > budget_bytes {
            return Err(Failure::Solver(NoSolution::Memory {
                least: Memory {
                    kept_bytes: price.memory.kept_bytes + price.memory.working_bytes,
                    saved_bytes: price.memory.saved_bytes,
                    gradient_bytes: price.memory.gradient_bytes,
                },
            }));
        }
        let predicted_s = price.seconds();
        let lower_bound_s = solved.lower_bound_s.min(predicted_s);
        plan.certificate = Some(Certificate {
            cluster: request.cluster.name.clone(),
            predicted_s,
            lower_bound_s,
            gap: gap(lower_bound_s, predicted_s),
            parts: price.time,
            memory: price.memory,
            budget_bytes,
            searched: vec![format!(
                "the placement of {} ops in {} classes with the layouts of {} sources, together",
                graph.ops.len(),
                classes.ops.len(),
                classes.sources.iter().map(Vec::len).sum::<usize>(),
            )],
            not_searched: Vec::new(),
            meshes: Vec::new(),
        });
        let result = MeshResult {
            mesh: mesh.clone(),
            predicted_s: Some(predicted_s),
            lower_bound_s,
            n_variables: solved.n_variables,
            n_constraints: solved.n_constraints,
            n_fractional: solved.n_fractional,
            reason: None,
        };
        return Ok((plan, result));
    }
    Err(Failure::Plan(SearchError::Internal(
        "no round of planning".into(),
    )))
}

fn searched(results: &[MeshResult]) -> String {
    let n_solved = results
        .iter()
        .filter(|one| one.predicted_s.is_some())
        .count();
    format!("{n_solved} of {} meshes solved", results.len())
}

fn not_searched(request: &PlanRequest, results: &[MeshResult]) -> Vec<String> {
    let mut not: Vec<String> = Vec::new();
    if let Meshes::Enumerate { max_axes } = request.meshes {
        let n_more = meshes::n_meshes_beyond(&request.cluster, max_axes);
        if n_more > 0 {
            not.push(format!(
                "{n_more} meshes of more than {max_axes} axes (name one to have it searched)"
            ));
        }
    }
    if results
        .iter()
        .any(|one| n_real_axes(&one.mesh) > MAX_FREE_AXES)
    {
        not.push(format!(
            "on meshes of more than {MAX_FREE_AXES} axes, factors that no plan of a mesh of fewer \
             axes uses and no statement names"
        ));
    }
    not.extend(
        [
            "plans in which the layers differ",
            "elementwise ops placed otherwise than what they follow",
            "parallel projections placed otherwise than each other",
            "contractions replicated over an axis, or split along the width of a head",
            "axes of a dim in another order than the mesh's",
            "communication overlapped with compute, recomputation, offloading, pipelines",
        ]
        .map(String::from),
    );
    not
}

/// The error of a request without any plan.
fn why_nothing(request: &PlanRequest, failures: Vec<(Mesh, Failure)>) -> SearchError {
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
        return too_little_memory(request, &mesh, memory);
    }
    match other {
        Some((mesh, Failure::Rules(no_strategy))) => SearchError::Conflict {
            message: format!(
                "on mesh {mesh} there is no way to lay out `{}` that all statements about it allow; \
                 relax one of them",
                no_strategy.name
            ),
            rules: no_strategy.statements,
        },
        Some((mesh, Failure::Solver(NoSolution::Rules))) => SearchError::Conflict {
            message: format!(
                "on mesh {mesh} the statements contradict each other: each can hold, all cannot"
            ),
            rules: Vec::new(),
        },
        Some((mesh, Failure::Solver(NoSolution::Solver(error)))) => {
            SearchError::Exhausted(format!("mesh {mesh}: {error}; raise the time of `solve`"))
        }
        Some((_, Failure::Plan(error))) => error,
        _ => SearchError::Internal("no mesh was tried".into()),
    }
}

fn too_little_memory(request: &PlanRequest, mesh: &Mesh, memory: Memory) -> SearchError {
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

/// Bytes for people.
pub fn bytes_text(n_bytes: f64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n_bytes;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{value:.0} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}
