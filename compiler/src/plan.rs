//! Planning: from a graph, a cluster and partial decisions to a plan with a certificate.
//!
//! Enters: a global graph, a cluster, [`directives`]. Leaves: a [`Plan`] whose every op and source is
//! placed.
//! Invariant: the certificate's seconds are [`price::price_plan`]'s, never the solver's word; its
//! lower bound holds for every mesh that it lists.
//!
//! For each mesh the choice of all placements is one network of few layouts a tensor ([`network`]); its
//! linear relaxation is climbed by message passing ([`dual`]) and nearly integral. Repeated layers are
//! planned once, or each for itself ([`Tie`]). What was found is checked without the search ([`verify`]).

pub mod cost;
pub mod copies;
pub mod estimate;
pub mod outer;
pub mod directives;
mod rules;
pub mod price;
pub mod explain;
pub mod verify;
mod grid;
mod metric;
mod classes;
mod facts;
mod instance;
mod network;
mod dual;
mod branch;
mod mend;
mod climb;
mod lp;
mod intra;
mod meshes;
mod why;
#[cfg(test)]
mod tests;

use crate::storage::stored;
use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::diagnostics::Span;
use meshweave_dsl::graph::Graph;
use meshweave_dsl::layout::Mesh;
pub use meshweave_dsl::plan::Tie;
use meshweave_dsl::plan::{BoundProof, Certificate, MeshResult, Plan};

use classes::{Classes, class_name};
use climb::Start;
use directives::Directives;
use grid::{Grid, MAX_AXES, MAX_DIMS};
use instance::{Instance, NoStrategy, build_instance};
use intra::{NoSolution, SolveLimits, Solved, solve};
use metric::Metric;
use price::price_plan;
use rules::Rules;
use why::why_nothing;

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
    /// Which layers are planned alike.
    pub tie: Tie,
    /// Axes of the meshes that are searched where no mesh is asked for; fewer where those are very many.
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
            tie: Tie::Layers,
            max_axes: 3,
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
/// What the explanation of a gap begins with.
pub const GAP_LEFT: &str = "what lies between bound and plan";
/// Gaps above it are explained.
const WIDE_GAP: f64 = 0.02;
/// Potentials up to which a certificate stores the proof of its bound.
const MAX_STORED: usize = 200_000;

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
    let graph = &*stored(graph, directives.storage);
    let mut plan = match &directives.replay {
        Some(replayed) => replay(graph, &request, replayed)?,
        None => plan(graph, &request).map_err(|error| once_a_statement(error, directives))?,
    };
    plan.storage = directives.storage.unwrap_or(plan.storage);
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
    /// The statements with the numbers of the rules that they made.
    statements: Vec<(String, BTreeSet<usize>)>,
    tie: Tie,
    budget_bytes: Option<f64>,
    gap: f64,
    branch_s: f64,
}

/// Statements in order; one about all layers made many rules.
fn statements(directives: &Directives) -> Vec<(String, BTreeSet<usize>)> {
    let mut numbers: BTreeMap<(Span, &str), BTreeSet<usize>> = BTreeMap::new();
    for (rule_idx, rule) in directives.rules.iter().enumerate() {
        let place = (rule.span, rule.text.as_str());
        numbers.entry(place).or_default().insert(rule_idx);
    }
    let statements = numbers.into_iter();
    statements
        .map(|((_, text), numbers)| (text.to_string(), numbers))
        .collect()
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
            statements: statements(directives),
            tie: options.tie,
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
    let classes = Classes::new(graph, &request.rules, Tie::Layers);
    let mut best: Option<Planned> = None;
    let mut results = Vec::with_capacity(candidates.len());
    let mut failures = Vec::new();
    for mesh in candidates {
        let cutoff_s = best.as_ref().map_or(f64::INFINITY, |best| best.seconds);
        match plan_on(graph, &classes, request, &mesh, cutoff_s, None) {
            Ok(found) => {
                results.push(found.result.clone());
                if found.seconds < cutoff_s {
                    best = Some(found);
                }
            }
            Err(failure) => {
                results.push(MeshResult {
                    mesh: mesh.clone(),
                    predicted_s: None,
                    lower_bound_s: failure.bound_s(),
                    n_strategies: 0,
                    n_nets: 0,
                    n_open: 0,
                    reason: Some(failure.brief()),
                });
                failures.push((mesh, failure));
            }
        }
    }
    if request.tie == Tie::None {
        untie(graph, request, &mut best, &mut results, &mut failures);
    }
    let Some(best) = best else {
        return Err(why_nothing(graph, request, failures));
    };
    results.sort_by(|a, b| {
        let seconds = |result: &MeshResult| result.predicted_s.unwrap_or(f64::INFINITY);
        seconds(a).total_cmp(&seconds(b))
    });
    let own = results.iter().position(|one| one.mesh == best.result.mesh);
    if let Some(own) = own {
        let own = results.remove(own);
        results.insert(0, own);
    }
    let bounds = results.iter().map(|result| result.lower_bound_s);
    let lower_bound_s = match request.tie {
        Tie::Layers => bounds.fold(f64::INFINITY, f64::min),
        // Only of the mesh whose layers were untied.
        Tie::None => best.result.lower_bound_s,
    };
    for result in &mut results {
        // JSON knows no infinity; a mesh without a plan has no bound.
        if !result.lower_bound_s.is_finite() {
            result.lower_bound_s = 0.0;
        }
    }
    let mut plan = best.plan;
    if let Some(certificate) = &mut plan.certificate {
        certificate.lower_bound_s = lower_bound_s.min(certificate.predicted_s);
        certificate.gap = gap(certificate.lower_bound_s, certificate.predicted_s);
        certificate.searched.insert(0, searched(&results));
        certificate.not_searched = not_searched(request, &results);
        if certificate.gap > WIDE_GAP {
            certificate.not_searched.push(format!(
                "{GAP_LEFT} ({:.1} %): {}",
                100.0 * certificate.gap,
                match request.tie {
                    Tie::Layers if best.byte_prices != [0.0; 2] =>
                        "memory binds, and tied layers change it in coarse steps; untie them",
                    _ => "enumeration was cut short",
                }
            ));
        }
        certificate.meshes = results;
    }
    Ok(match request.meshes {
        Meshes::Enumerate { .. } => meshes::name_axes(graph, plan),
        Meshes::Given(_) => plan,
    })
}

/// Plans every layer for itself on the mesh of the best tied plan, or, where no tied plan fits, on all.
fn untie(
    graph: &Graph,
    request: &PlanRequest,
    best: &mut Option<Planned>,
    results: &mut [MeshResult],
    failures: &mut Vec<(Mesh, Failure)>,
) {
    let classes = Classes::new(graph, &request.rules, Tie::None);
    let tied = best.take();
    let meshes: Vec<Mesh> = match &tied {
        Some(tied) => vec![tied.plan.mesh.clone()],
        None => failures.drain(..).map(|(mesh, _)| mesh).collect(),
    };
    for mesh in meshes {
        let cutoff_s = best.as_ref().map_or(f64::INFINITY, |best| best.seconds);
        match plan_on(graph, &classes, request, &mesh, cutoff_s, tied.as_ref()) {
            Ok(found) => {
                if let Some(result) = results.iter_mut().find(|one| one.mesh == mesh) {
                    result.clone_from(&found.result);
                }
                if found.seconds < cutoff_s {
                    *best = Some(found);
                }
            }
            Err(failure) => failures.push((mesh, failure)),
        }
    }
    // What is known of the tied plan stands where no better one was found.
    if let Some(tied) = tied
        && best.as_ref().is_none_or(|best| tied.seconds < best.seconds)
    {
        *best = Some(match best.take() {
            Some(untied) => tied.within(&untied),
            None => tied.unbounded(),
        });
    }
}

/// A plan on one mesh.
struct Planned {
    plan: Plan,
    seconds: f64,
    byte_prices: [f64; 2],
    result: MeshResult,
}

impl Planned {
    /// This plan in a larger space of which nothing is known.
    fn unbounded(mut self) -> Self {
        self.result.lower_bound_s = 0.0;
        if let Some(own) = &mut self.plan.certificate {
            own.proof = None;
        }
        self
    }

    /// This plan with the bound of a larger space that it lies in.
    fn within(mut self, wider: &Self) -> Self {
        self.result.lower_bound_s = wider.result.lower_bound_s.min(self.seconds);
        if let (Some(own), Some(other)) = (&mut self.plan.certificate, &wider.plan.certificate) {
            own.searched.clone_from(&other.searched);
            own.proof.clone_from(&other.proof);
        }
        self
    }
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
            n_strategies: 0,
            n_nets: 0,
            n_open: 0,
            reason: None,
        }],
        proof: None,
    });
    Ok(plan)
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
            let max_axes = meshes::affordable_axes(&request.cluster, (*max_axes).min(MAX_AXES));
            meshes::enumerate_meshes(&request.cluster, max_axes)
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
                format!("needs {} a device", bytes_text(least.peak_bytes()))
            }
            Self::Solver(NoSolution::Rules) => "the statements contradict each other".into(),
            Self::Solver(NoSolution::Slow { .. }) => "slower than a plan on another mesh".into(),
            Self::Plan(error) => error.to_string(),
        }
    }

    /// Seconds below which the mesh has no plan.
    fn bound_s(&self) -> f64 {
        match self {
            Self::Solver(NoSolution::Slow { bound_s }) => *bound_s,
            _ => f64::INFINITY,
        }
    }
}

/// The best plan on one mesh, where it is faster than the cutoff. Layers may be `tied` by a plan that is
/// known.
fn plan_on(
    graph: &Graph,
    classes: &Classes,
    request: &PlanRequest,
    mesh: &Mesh,
    cutoff_s: f64,
    tied: Option<&Planned>,
) -> Result<Planned, Failure> {
    let grid = Grid::new(mesh.clone(), &request.cluster);
    let mut metric = Metric::new(&grid);
    let instance = build_instance(graph, classes, &grid, &request.rules, &mut metric)
        .map_err(Failure::Rules)?;
    let compute_s = instance.least_seconds();
    if compute_s >= cutoff_s {
        return Err(Failure::Solver(NoSolution::Slow { bound_s: compute_s }));
    }
    let limits = SolveLimits {
        gap: request.gap,
        branch_s: request.branch_s,
        budget_bytes: request.budget_bytes(),
        cutoff_s,
    };
    let start = tied.map_or_else(Start::default, |tied| Start {
        byte_prices: tied.byte_prices,
        known: instance.assignment(&tied.plan, graph, classes, &grid),
    });
    let solved = solve(&instance, limits, &start, &mut metric).map_err(Failure::Solver)?;
    planned(graph, classes, request, &grid, &instance, solved)
}

/// The plan of a solved instance, priced apart from it.
fn planned(
    graph: &Graph,
    classes: &Classes,
    request: &PlanRequest,
    grid: &Grid,
    instance: &Instance,
    solved: Solved,
) -> Result<Planned, Failure> {
    let mut plan = instance.plan(&solved.assignment, graph, classes, grid, &request.name);
    let price = price_plan(graph, &plan, &request.cluster).map_err(Failure::Plan)?;
    let predicted_s = price.seconds();
    let lower_bound_s = solved.lower_bound_s.min(predicted_s);
    let potentials = solved.proof.dual.potentials;
    let n_potentials: usize = potentials.iter().map(Vec::len).sum();
    let byte_prices = solved.proof.dual.byte_prices;
    let proof = (n_potentials <= MAX_STORED).then_some(BoundProof {
        tie: classes.tie,
        bound_s: solved.proof.bound_s.min(predicted_s),
        byte_prices,
        potentials,
    });
    plan.certificate = Some(Certificate {
        cluster: request.cluster.name.clone(),
        predicted_s,
        lower_bound_s,
        gap: gap(lower_bound_s, predicted_s),
        parts: price.time,
        memory: price.memory,
        budget_bytes: request.budget_bytes(),
        searched: vec![format!(
            "the placement of {} ops in {} classes with the layouts of {} sources, together",
            graph.ops.len(),
            classes.ops.len(),
            classes.sources.iter().map(Vec::len).sum::<usize>(),
        )],
        not_searched: Vec::new(),
        meshes: Vec::new(),
        proof,
    });
    Ok(Planned {
        plan,
        seconds: predicted_s,
        byte_prices,
        result: MeshResult {
            mesh: grid.mesh.clone(),
            predicted_s: Some(predicted_s),
            lower_bound_s,
            n_strategies: solved.n_strategies,
            n_nets: solved.n_nets,
            n_open: solved.n_open,
            reason: None,
        },
    })
}

fn searched(results: &[MeshResult]) -> String {
    let n_solved = results
        .iter()
        .filter(|one| one.predicted_s.is_some())
        .count();
    let n_pruned = results
        .iter()
        .filter(|one| one.predicted_s.is_none() && one.lower_bound_s > 0.0)
        .count();
    format!(
        "{n_solved} of {} meshes solved, {n_pruned} excluded by their bounds",
        results.len()
    )
}

fn not_searched(request: &PlanRequest, results: &[MeshResult]) -> Vec<String> {
    let mut not: Vec<String> = Vec::new();
    if let Meshes::Enumerate { max_axes } = request.meshes {
        let max_axes = meshes::affordable_axes(&request.cluster, max_axes.min(MAX_AXES));
        let n_more = meshes::n_meshes_beyond(&request.cluster, max_axes);
        if n_more > 0 {
            not.push(format!(
                "{n_more} meshes of more than {max_axes} axes (name one to have it searched)"
            ));
        }
    }
    match request.tie {
        Tie::Layers => not.push("plans in which the layers differ".into()),
        Tie::None if results.len() > 1 => not.push(
            "plans in which the layers differ on other meshes than the one that is best tied"
                .into(),
        ),
        Tie::None => {}
    }
    not.extend(
        [
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
