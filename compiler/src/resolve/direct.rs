//! Directives on a graph: shards, pins, forbids and preferences as rules for the planner.
//!
//! Enters: a document, its request, and the graph that is planned. Leaves: [`Directives`].
//! Invariant: the rules of one tensor do not contradict each other; where statements overlap, the one
//! about fewer tensors holds, or the one that says `override`; else both are named in an error.
//!
//! `shard` adds to what else divides a tensor: several of them divide one dim together, in the order of the mesh. `pin` decides: the
//! dims that it names are as it says.

mod legal;
mod read;
mod rules;
mod settle;

use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::diagnostics::{Diagnostic, has_errors};
use meshweave_dsl::graph::{Graph, TensorId};
use meshweave_dsl::name::{Axis, Dim};
use meshweave_dsl::plan::Plan;
use meshweave_dsl::weave::ast::{Document, MemoryItem, Statement};

pub(super) use legal::smallest_part;
use rules::demands;

use super::Request;
use super::mesh::Meshes;
use super::replay::{deciding_statement, replay};
use super::select::{Scene, tied};
use super::tactics::{Origin, expand};
use crate::plan::directives::{DimPattern, Directives, Pattern, Rule, Subject};

/// The dim of a `shard` that stands for each tensor's largest.
const LARGEST: &str = "largest";

/// The decisions of `document` about `graph`, the one that is planned.
///
/// Without directives, at least one diagnostic is an error.
pub fn direct(
    document: &Document,
    request: &Request,
    graph: &Graph,
) -> (Option<Directives>, Vec<Diagnostic>) {
    let mut diagnostics = Vec::new();
    let meshes = Meshes::resolve(document, &request.cluster, &mut diagnostics);
    let budget_bytes = budget(document, request, &mut diagnostics);
    let scene = Scene::new(graph);
    let expanded = expand(document, &mut diagnostics);
    let mut claims = Claims {
        scene: &scene,
        meshes: &meshes,
        folded: BTreeSet::new(),
        claims: Vec::new(),
        diagnostics: &mut diagnostics,
    };
    claims.find_folded();
    for item in &expanded {
        claims.read(item);
    }
    claims.choose_largest();
    let settled = claims.settle();
    let mut rules = claims.rules(&settled);
    let candidates = claims.admitted(&settled);
    let claims = claims.claims;
    rules.extend(demands(&claims));
    let replay = match has_errors(&diagnostics) {
        true => None,
        false => replay(document, &request.name, graph, &meshes, &mut diagnostics),
    };
    if let Some(plan) = &replay {
        refuse_broken_rules(document, &rules, plan, &scene, &mut diagnostics);
    }
    let directives = Directives {
        meshes: candidates,
        rules,
        budget_bytes,
        storage: Some(request.storage),
        replay,
    };
    (
        (!has_errors(&diagnostics)).then_some(directives),
        diagnostics,
    )
}

/// A finished plan must keep what the same document asks for.
fn refuse_broken_rules(
    document: &Document,
    rules: &[Rule],
    plan: &Plan,
    scene: &Scene<'_>,
    diagnostics: &mut Vec<Diagnostic>,
) {
    let graph = scene.graph;
    let mut reported = BTreeSet::new();
    for rule in rules {
        let Subject::Tensor(id) = rule.subject else {
            continue;
        };
        let (name, layout) = match scene.producers.get(id.index()).copied().flatten() {
            None => (scene.name(id), plan.source_layout(id)),
            Some(op_id) => {
                let op = graph.op(op_id);
                let results = plan.op_layouts(graph, op_id).results;
                let layout = op.results.iter().zip(results).find(|(one, _)| **one == id);
                let Some((_, layout)) = layout else { continue };
                (graph.op_name(op), layout)
            }
        };
        if rule.demand.admits(&layout, &plan.mesh) || !reported.insert(rule.text.clone()) {
            continue;
        }
        let has = layout.display(graph.ty(id).dims());
        let mut diagnostic = Diagnostic::invalid(format!(
            "the plan gives {} the layout `{has}`, which `{}` excludes",
            tied(scene.name(id)),
            rule.text
        ))
        .code("W113")
        .at(rule.span, "asked for here");
        if let Some(origin) = deciding_statement(document, name) {
            diagnostic = diagnostic.also(origin.span, "decided here");
        }
        diagnostics.push(diagnostic.help(
            "change one of the two, or plan again without the `place` and `keep` statements",
        ));
    }
}

fn budget(
    document: &Document,
    request: &Request,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<u64> {
    let items = document
        .statements()
        .filter_map(|statement| match &statement.node {
            Statement::Memory(block) => Some(block.items()),
            _ => None,
        });
    for item in items.flatten() {
        if let MemoryItem::Headroom(choice) = &item.node {
            let part = choice.known()?.ratio().map_or(0.0, |part| part.0);
            let memory = request.cluster.device.memory_bytes as f64;
            return Some((memory * (1.0 - part.clamp(0.0, 1.0))) as u64);
        }
        let MemoryItem::Budget(choice) = &item.node else {
            continue;
        };
        let quantity = *choice.known()?;
        let bytes = match quantity.bytes() {
            Ok(bytes) => bytes.0,
            Err(error) => {
                let message = format!("`budget`: {error}");
                diagnostics.push(Diagnostic::invalid(message).code("W103").at(item.span, ""));
                return None;
            }
        };
        let device = &request.cluster.device;
        if bytes == 0 || bytes > device.memory_bytes {
            let has = meshweave_dsl::units::Bytes(device.memory_bytes);
            diagnostics.push(
                Diagnostic::invalid(format!(
                    "the budget is {quantity}, but device `{}` has {has}",
                    device.name
                ))
                .code("W103")
                .at(item.span, "")
                .help("lower the budget, or write `budget auto` for all of the memory"),
            );
            return None;
        }
        return Some(bytes);
    }
    None
}

/// What one statement says about a set of tensors.
struct Claim {
    origin: Origin,
    overrides: bool,
    /// All tensors that it selects: the smaller set is the more specific claim.
    scope: BTreeSet<TensorId>,
    said: Said,
}

enum Said {
    /// The tensors and the dim of each that the axes divide.
    Shard {
        axes: Vec<Axis>,
        dims: BTreeMap<TensorId, Dim>,
        /// Tensors whose largest free dim is divided, if they have one.
        largest: Vec<TensorId>,
    },
    Pin(Pattern, Vec<TensorId>),
    Forbid(Pattern, Vec<TensorId>),
    Prefer(Vec<(Pattern, f64)>, Vec<TensorId>),
}

impl Claim {
    /// Whether this claim holds where the other contradicts it.
    fn beats(&self, other: &Claim) -> bool {
        if self.overrides != other.overrides {
            return self.overrides;
        }
        self.scope.len() < other.scope.len() && self.scope.is_subset(&other.scope)
    }
}

/// What is decided of one dim, and the claims that decide it.
#[derive(Clone, Debug)]
struct Decision {
    pattern: DimPattern,
    claims: Vec<usize>,
}

type Settled = BTreeMap<TensorId, BTreeMap<Dim, Decision>>;

struct Claims<'a> {
    scene: &'a Scene<'a>,
    meshes: &'a Meshes<'a>,
    /// What the mesh that refolds the other is used on.
    folded: BTreeSet<TensorId>,
    claims: Vec<Claim>,
    diagnostics: &'a mut Vec<Diagnostic>,
}

impl Claim {
    /// What it says about a tensor, as the inside of a layout.
    fn says_of(&self, id: TensorId) -> Option<String> {
        let list = |axes: &[Axis]| {
            let names: Vec<&str> = axes.iter().map(Axis::as_str).collect();
            match names.as_slice() {
                [axis] => (*axis).to_owned(),
                axes => format!("({})", axes.join(",")),
            }
        };
        match &self.said {
            Said::Shard { axes, dims, .. } => Some(format!("{}/{}", dims.get(&id)?, list(axes))),
            Said::Pin(pattern, _) | Said::Forbid(pattern, _) => {
                let dims = pattern.dims.iter().map(|(dim, split)| match split {
                    DimPattern::Unsharded => dim.to_string(),
                    DimPattern::Open => format!("{dim}/?"),
                    DimPattern::AnyAxis => format!("{dim}/*"),
                    DimPattern::Axes(axes) => format!("{dim}/{}", list(axes)),
                });
                Some(dims.collect::<Vec<_>>().join(", "))
            }
            Said::Prefer(..) => None,
        }
    }
}
