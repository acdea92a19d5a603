//! Directives on a graph: shards, pins, forbids and preferences as rules for the planner.
//!
//! Enters: a document, its request, and the graph that is planned. Leaves: [`Directives`].
//! Invariant: the rules of one tensor do not contradict each other; where statements overlap, the one
//! about fewer tensors holds, or the one that says `override`; else both are named in an error.
//!
//! `shard` adds to what else divides a tensor: several of them divide one dim together, in the order of the mesh. `pin` decides: the
//! dims that it names are as it says.

use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::diagnostics::{Diagnostic, Span, did_you_mean, has_errors};
use meshweave_dsl::graph::{Graph, Role, TensorId};
use meshweave_dsl::layout::{Interval, Mesh, ReduceKind};
use meshweave_dsl::name::{Axis, Dim};
use meshweave_dsl::op::Spread;
use meshweave_dsl::plan::{Plan, op_factors};
use meshweave_dsl::weave::ast::{
    Choice, Document, Forbid, Layout, MemoryItem, Name, Pin, Prefer, Reduce, Segment, Selector,
    Shard, Spanned, Split, Statement, TacticItem, Target, TensorClass,
};

use super::Request;
use super::mesh::Meshes;
use super::replay::{deciding_statement, replay};
use super::select::{Scene, tied};
use super::tactics::{Expanded, Origin, expand};
use crate::plan::directives::{Demand, DimPattern, Directives, Pattern, Rule, Subject};

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

impl Claims<'_> {
    fn read(&mut self, expanded: &Expanded) {
        self.check_exceptions(&expanded.except, &expanded.origin);
        match &expanded.item {
            TacticItem::Shard(shard) => self.shard(shard, expanded),
            TacticItem::Pin(pin) => self.pin(pin, expanded),
            TacticItem::Forbid(forbid) => self.forbid(forbid, expanded),
            TacticItem::Prefer(prefer) => self.prefer(prefer, expanded),
            TacticItem::Apply(_) => {}
        }
    }

    /// The tensors that the folded mesh is used on, by the names of their blocks.
    fn find_folded(&mut self) {
        for selector in &self.meshes.folded_on {
            let found: Vec<TensorId> = self
                .scene
                .graph
                .tensor_ids()
                .filter(|id| self.scene.is_excepted(*id, &[&selector.node]))
                .collect();
            if found.is_empty() {
                let diagnostic = self.matches_nothing(selector, selector.span, None);
                self.diagnostics.push(diagnostic);
            }
            self.folded.extend(found);
        }
    }

    fn push(&mut self, expanded: &Expanded, overrides: bool, scope: Vec<TensorId>, said: Said) {
        self.claims.push(Claim {
            origin: expanded.origin.clone(),
            overrides,
            scope: scope.into_iter().collect(),
            said,
        });
    }

    /// What a selector names, without exceptions; a finding when that is nothing.
    fn select(&mut self, selector: &Spanned<Selector>, expanded: &Expanded) -> Vec<TensorId> {
        let found = self.scene.select(selector);
        if found.is_empty() {
            let place = expanded.origin.place(selector.span);
            let diagnostic = self.matches_nothing(selector, place, expanded.tactic.as_ref());
            self.diagnostics.push(diagnostic);
        }
        self.without_exceptions(found, &expanded.except, &[])
    }

    fn matches_nothing(
        &self,
        selector: &Selector,
        place: Span,
        tactic: Option<&Name>,
    ) -> Diagnostic {
        let what = match tactic {
            Some(tactic) => format!("tactic `{tactic}`: `{selector}`"),
            None => format!("`{selector}`"),
        };
        let near = self.scene.near(selector);
        let diagnostic = Diagnostic::invalid(format!("{what} matches nothing"))
            .code("W108")
            .at(place, "no tensor has such a name");
        if near.is_empty() {
            return diagnostic.help("`meshweave show` lists the names of the model's tensors");
        }
        let near: Vec<String> = near.iter().map(|path| format!("`{path}`")).collect();
        diagnostic.help(format!("did you mean {}?", near.join(" or ")))
    }

    /// An exception that excepts nothing is a slip.
    fn check_exceptions(&mut self, except: &[Spanned<Selector>], origin: &Origin) {
        for selector in except {
            let place = origin.place(selector.span);
            let graph = self.scene.graph;
            let is_used = graph
                .tensor_ids()
                .any(|id| self.scene.is_excepted(id, &[&selector.node]));
            // Standard tactics except parts that a model need not have.
            if is_used || place != selector.span {
                continue;
            }
            let diagnostic = self.matches_nothing(selector, place, None);
            if !self.diagnostics.contains(&diagnostic) {
                self.diagnostics.push(diagnostic);
            }
        }
    }

    fn without_exceptions(
        &self,
        mut ids: Vec<TensorId>,
        outer: &[Spanned<Selector>],
        inner: &[Spanned<Selector>],
    ) -> Vec<TensorId> {
        let except: Vec<&Selector> = outer.iter().chain(inner).map(|s| &s.node).collect();
        ids.retain(|id| !self.scene.is_excepted(*id, &except));
        ids
    }

    /// The axes that references mean; `None` after a finding.
    fn axes<'r>(
        &mut self,
        references: impl IntoIterator<Item = (&'r meshweave_dsl::weave::ast::AxisRef, Span)>,
    ) -> Option<Vec<Axis>> {
        let mut axes: Vec<Axis> = Vec::new();
        let mut is_complete = true;
        for (reference, span) in references {
            match self.meshes.axes(reference, span) {
                Ok(parts) if parts.iter().any(|axis| axes.contains(axis)) => {
                    let message = match parts.as_slice() {
                        [axis] => format!("axis `{axis}` is named twice"),
                        _ => format!("`{reference}` shares ranks with another of these axes"),
                    };
                    self.diagnostics
                        .push(Diagnostic::invalid(message).code("W109").at(span, ""));
                    is_complete = false;
                }
                Ok(parts) => axes.extend(parts),
                Err(diagnostic) => {
                    // One finding a place: the axis may be named several times.
                    if !self.diagnostics.contains(&diagnostic) {
                        self.diagnostics.push(*diagnostic);
                    }
                    is_complete = false;
                }
            }
        }
        is_complete.then_some(axes)
    }

    fn shard(&mut self, shard: &Shard, expanded: &Expanded) {
        self.check_exceptions(&shard.except, &expanded.origin);
        let place = |span| expanded.origin.place(span);
        let references = shard.over.iter().map(|axis| (&axis.node, place(axis.span)));
        let axes = self.axes(references);
        // Each target is a claim of its own: how specific it is does not depend on the others.
        let mut scopes: Vec<Vec<TensorId>> = shard
            .on
            .iter()
            .map(|target| self.target(target, shard, expanded))
            .collect();
        let mut folded = shard
            .over
            .iter()
            .map(|axis| self.meshes.is_folded(&axis.node));
        if let Some(is_folded) = folded.next().flatten()
            && !self.folded.is_empty()
            && folded.all(|other| other == Some(is_folded))
        {
            // Each mesh divides the part of the model that it is used on.
            for scope in &mut scopes {
                scope.retain(|id| self.folded.contains(id) == is_folded);
            }
        }
        let Some(axes) = axes else { return };
        let mut n_divided = 0;
        for scope in &scopes {
            let mut dims = BTreeMap::new();
            let mut largest = Vec::new();
            for id in scope {
                let mut wanted = shard.dims.iter().map(|dim| dim.node.as_str());
                let ty = self.scene.graph.ty(*id);
                match wanted.find(|dim| *dim == LARGEST || ty.has(&(*dim).into())) {
                    Some(LARGEST) => largest.push(*id),
                    Some(dim) if self.is_divisible(*id, &dim.into()) => {
                        dims.insert(*id, dim.into());
                    }
                    _ => {}
                }
            }
            n_divided += dims.len() + largest.len();
            let said = Said::Shard {
                axes: axes.clone(),
                dims,
                largest,
            };
            self.push(expanded, false, scope.clone(), said);
        }
        let scope: Vec<TensorId> = scopes.into_iter().flatten().collect();
        if n_divided == 0 && !scope.is_empty() {
            self.shards_nothing(shard, &scope, expanded);
        }
    }

    /// The tensors of a target, without exceptions.
    fn target(
        &mut self,
        target: &Spanned<Target>,
        shard: &Shard,
        expanded: &Expanded,
    ) -> Vec<TensorId> {
        let found = match &target.node {
            Target::Class(class) => self.scene.class(*class),
            Target::Selector(selector) => {
                let selector = Spanned::new(selector.clone(), target.span);
                self.select(&selector, expanded)
            }
        };
        let mut found = self.without_exceptions(found, &expanded.except, &shard.except);
        if target.node == Target::Class(TensorClass::Gradients) {
            // A gradient is divided where it is used: a contraction over the batch gives partial
            // sums, which are scattered to the parts of the update.
            let graph = self.scene.graph;
            let updates: BTreeMap<TensorId, TensorId> = graph
                .gradients
                .iter()
                .filter_map(|(param, gradient)| Some((*gradient, *graph.updates.get(param)?)))
                .collect();
            for id in &mut found {
                *id = updates.get(id).copied().unwrap_or(*id);
            }
        }
        found
    }

    fn shards_nothing(&mut self, shard: &Shard, scope: &[TensorId], expanded: &Expanded) {
        let wanted: Vec<&str> = shard.dims.iter().map(|dim| dim.node.as_str()).collect();
        let mut known = BTreeSet::new();
        for id in scope {
            known.extend(self.scene.graph.ty(*id).dims().map(Dim::as_str));
        }
        let near = wanted
            .iter()
            .find_map(|dim| did_you_mean(dim, known.iter().copied()));
        let all: Vec<&str> = known.iter().copied().collect();
        let span = shard.dims.first().map_or(expanded.origin.span, |d| d.span);
        self.diagnostics.push(
            Diagnostic::invalid(format!(
                "`shard {}` finds nothing to divide: none of its {} tensors has such a dim",
                wanted.join(", "),
                scope.len()
            ))
            .code("W109")
            .at(expanded.origin.place(span), "")
            .maybe_help(near)
            .help(format!("their dims are {}", all.join(", "))),
        );
    }

    /// Whether an axis may divide the dim of a tensor: for results, whether its op can.
    fn is_divisible(&self, id: TensorId, dim: &Dim) -> bool {
        self.admits(id, dim, &|_| true)
    }

    /// Whether a source has the dim in such a size, or its op such a factor.
    fn admits(&self, id: TensorId, dim: &Dim, is_legal: &dyn Fn(Option<bool>) -> bool) -> bool {
        let graph = self.scene.graph;
        let Some(op_id) = self.scene.producers.get(id.index()).copied().flatten() else {
            return graph.ty(id).has(dim) && is_legal(None);
        };
        let op = graph.op(op_id);
        let Some(result_idx) = op.results.iter().position(|result| *result == id) else {
            return false;
        };
        let wanted = Spread::Split(dim.clone());
        op_factors(graph, op)
            .iter()
            .any(|f| f.results.get(result_idx) == Some(&wanted) && is_legal(Some(f.even)))
    }

    fn pin(&mut self, pin: &Pin, expanded: &Expanded) {
        let layout = match &pin.layout.node {
            Choice::Fixed(layout) => layout,
            Choice::Auto { among, .. } if among.is_empty() => return,
            Choice::Auto { .. } => {
                self.diagnostics.push(
                    Diagnostic::unsupported("a choice among layouts is not implemented yet")
                        .code("W120")
                        .at(expanded.origin.place(pin.layout.span), "")
                        .help("pin one of them, or leave dims open with `dim/?`"),
                );
                return;
            }
        };
        let scope = self.select(&pin.on, expanded);
        let span = expanded.origin.place(pin.layout.span);
        let Some(pattern) = self.pattern(layout, span) else {
            return;
        };
        let subjects = self.fitting(&scope, &pattern, &pin.on, span);
        let said = Said::Pin(pattern, subjects);
        self.push(expanded, pin.overrides, scope, said);
    }

    fn forbid(&mut self, forbid: &Forbid, expanded: &Expanded) {
        let scope = self.select(&forbid.on, expanded);
        let span = expanded.origin.place(forbid.layout.span);
        let Some(pattern) = self.pattern(&forbid.layout, span) else {
            return;
        };
        let subjects = self.having(&scope, &pattern, &forbid.on, span);
        let said = Said::Forbid(pattern, subjects);
        self.push(expanded, forbid.overrides, scope, said);
    }

    /// `prefer PATH.DIM = AXIS over AXIS weight N`; `none` is unsharded.
    fn prefer(&mut self, prefer: &Prefer, expanded: &Expanded) {
        let is_way = prefer.ranking.iter().any(|call| !call.args.is_empty());
        let scope = match is_way {
            true => Vec::new(),
            false => self.select(&prefer.on, expanded),
        };
        let dim: Dim = prefer.key.node.as_str().into();
        let graph = self.scene.graph;
        let subjects: Vec<TensorId> = scope
            .iter()
            .copied()
            .filter(|id| graph.ty(*id).has(&dim))
            .collect();
        if scope.is_empty() && !is_way {
            return;
        }
        if is_way || subjects.is_empty() {
            self.diagnostics.push(
                Diagnostic::unsupported(format!(
                    "a preference about `{}` is not implemented yet",
                    prefer.key.node
                ))
                .code("W120")
                .at(expanded.origin.place(prefer.key.span), "")
                .help(
                    "preferences are about dims: `prefer layers[*].attn.wq.heads = tp over none`",
                ),
            );
            return;
        }
        let weight = prefer.weight.map_or(1.0, |weight| weight.as_f64());
        let n_ranked = prefer.ranking.len() as f64;
        let mut ranking = Vec::new();
        for (place, call) in prefer.ranking.iter().enumerate() {
            let pattern = if call.name == "none" {
                Some(DimPattern::Unsharded)
            } else {
                let reference = meshweave_dsl::weave::ast::AxisRef {
                    mesh: None,
                    axis: call.name.clone(),
                };
                let span = expanded.origin.place(call.span);
                self.axes([(&reference, span)]).map(DimPattern::Axes)
            };
            if let Some(pattern) = pattern {
                let pattern = Pattern {
                    dims: [(dim.clone(), pattern)].into(),
                    partial: Vec::new(),
                };
                ranking.push((pattern, weight * (n_ranked - place as f64) / n_ranked));
            }
        }
        let said = Said::Prefer(ranking, subjects);
        self.push(expanded, prefer.overrides, scope, said);
    }

    /// A layout as written, with its axes resolved.
    fn pattern(&mut self, layout: &Layout, span: Span) -> Option<Pattern> {
        let mut pattern = Pattern::default();
        let mut used: Vec<Axis> = Vec::new();
        let mut is_complete = true;
        for item in &layout.dims {
            let dim: Dim = item.dim.as_str().into();
            let split = match &item.split {
                Split::Whole => Some(DimPattern::Unsharded),
                Split::Any => Some(DimPattern::AnyAxis),
                Split::Open { .. } => Some(DimPattern::Open),
                Split::Axes(axes) => self
                    .axes(axes.iter().map(|axis| (axis, span)))
                    .map(DimPattern::Axes),
            };
            let Some(split) = split else {
                is_complete = false;
                continue;
            };
            if let DimPattern::Axes(axes) = &split {
                if let Some(axis) = axes.iter().find(|axis| used.contains(axis)) {
                    self.diagnostics.push(
                        Diagnostic::invalid(format!("axis `{axis}` divides two dims"))
                            .code("W109")
                            .at(span, "")
                            .help("an axis divides one dim of a tensor; take it from one of them"),
                    );
                    is_complete = false;
                }
                used.extend(axes.iter().cloned());
            }
            if pattern.dims.insert(dim, split).is_some() {
                self.diagnostics.push(
                    Diagnostic::invalid(format!("dim `{}` is named twice", item.dim))
                        .code("W109")
                        .at(span, ""),
                );
                is_complete = false;
            }
        }
        for partial in &layout.partial {
            let kind = match partial.reduce {
                Reduce::Sum => ReduceKind::Sum,
                Reduce::Max => ReduceKind::Max,
                Reduce::Lse => ReduceKind::Lse,
            };
            match self.axes(partial.axes.iter().map(|axis| (axis, span))) {
                Some(axes) => pattern
                    .partial
                    .extend(axes.into_iter().map(|axis| (kind, axis))),
                None => is_complete = false,
            }
        }
        is_complete.then_some(pattern)
    }

    /// The tensors that have all dims of a pattern. Without a `*` in the selector, all must.
    fn having(
        &mut self,
        scope: &[TensorId],
        pattern: &Pattern,
        on: &Spanned<Selector>,
        span: Span,
    ) -> Vec<TensorId> {
        let graph = self.scene.graph;
        let lacking = |id: &TensorId| {
            let ty = graph.ty(*id);
            pattern.dims.keys().find(|dim| !ty.has(dim))
        };
        let fitting: Vec<TensorId> = scope
            .iter()
            .copied()
            .filter(|id| lacking(id).is_none())
            .collect();
        let first = scope.iter().find_map(|id| Some((*id, lacking(id)?)));
        if let Some((id, dim)) = first.filter(|_| fitting.is_empty() || !is_wild(on)) {
            let dims: Vec<&str> = graph.ty(id).dims().map(Dim::as_str).collect();
            let near = did_you_mean(dim.as_str(), dims.iter().copied());
            self.diagnostics.push(
                Diagnostic::invalid(format!("{} has no dim `{dim}`", self.scene.name(id)))
                    .code("W109")
                    .at(span, "")
                    .maybe_help(near)
                    .help(match dims.as_slice() {
                        [] => "it is a scalar".to_owned(),
                        dims => format!("its dims are {}", dims.join(", ")),
                    }),
            );
            return Vec::new();
        }
        fitting
    }

    /// The same, whose ops can be divided so.
    fn fitting(
        &mut self,
        scope: &[TensorId],
        pattern: &Pattern,
        on: &Spanned<Selector>,
        span: Span,
    ) -> Vec<TensorId> {
        let having = self.having(scope, pattern, on, span);
        let undivided = |this: &Self, id: &TensorId| {
            let divided = pattern
                .dims
                .iter()
                .filter(|(_, split)| matches!(split, DimPattern::Axes(_)))
                .map(|(dim, _)| dim.clone());
            divided.into_iter().find(|dim| !this.is_divisible(*id, dim))
        };
        let fitting: Vec<TensorId> = having
            .iter()
            .copied()
            .filter(|id| undivided(self, id).is_none())
            .collect();
        let first = having
            .iter()
            .find_map(|id| Some((*id, undivided(self, id)?)));
        if let Some((id, dim)) = first.filter(|_| fitting.is_empty() || !is_wild(on)) {
            let graph = self.scene.graph;
            let producer = self.scene.producers[id.index()];
            let kind = producer.map_or("source", |op_id| graph.op(op_id).kind.name());
            let legal: Vec<&str> = graph
                .ty(id)
                .dims()
                .filter(|dim| self.is_divisible(id, dim))
                .map(Dim::as_str)
                .collect();
            self.diagnostics.push(
                Diagnostic::invalid(format!(
                    "{} is the result of `{kind}`, which cannot be divided along `{dim}`",
                    self.scene.name(id)
                ))
                .code("W109")
                .at(span, "")
                .help(match legal.as_slice() {
                    [] => "it cannot be divided at all".to_owned(),
                    legal => format!("it can along {}", legal.join(", ")),
                }),
            );
            return Vec::new();
        }
        fitting
    }

    /// Gives `largest` a dim for each of its tensors: the largest that nothing else divides.
    fn choose_largest(&mut self) {
        let n_before = self.diagnostics.len();
        let settled = self.settle();
        // Contradictions are reported once, when everything is known.
        self.diagnostics.truncate(n_before);
        let graph = self.scene.graph;
        let params_of_updates: BTreeMap<TensorId, TensorId> = graph
            .updates
            .iter()
            .map(|(param, update)| (*update, *param))
            .collect();
        let candidates = &self.meshes.candidates;
        for claim in &mut self.claims {
            let Said::Shard {
                axes,
                dims,
                largest,
            } = &mut claim.said
            else {
                continue;
            };
            let n_parts = candidates
                .iter()
                .map(|mesh| axes.iter().map(|axis| mesh.degree(axis)).product::<usize>())
                .max()
                .unwrap_or(1);
            for id in largest.iter() {
                let owner = match &graph.tensor(*id).role {
                    Role::State { of } => *of,
                    _ => params_of_updates.get(id).copied().unwrap_or(*id),
                };
                let is_taken = |dim: &Dim| {
                    [*id, owner].iter().any(|id| {
                        let decision = settled.get(id).and_then(|dims| dims.get(dim));
                        decision.is_some_and(|d| matches!(d.pattern, DimPattern::Axes(_)))
                    })
                };
                let shape = &graph.ty(*id).shape;
                // The first of the largest; a dim that is divided already only when all are.
                let best = shape
                    .iter()
                    .filter(|(_, size)| *size >= n_parts)
                    .rev()
                    .max_by_key(|(dim, size)| (!is_taken(dim), *size));
                if let Some((dim, _)) = best {
                    dims.insert(*id, dim.clone());
                }
            }
        }
    }

    /// What holds for every tensor, after contradictions are resolved or reported.
    fn settle(&mut self) -> Settled {
        let mut by_tensor: BTreeMap<TensorId, Vec<usize>> = BTreeMap::new();
        for (claim_idx, claim) in self.claims.iter().enumerate() {
            match &claim.said {
                Said::Shard { dims, .. } => {
                    for id in dims.keys() {
                        by_tensor.entry(*id).or_default().push(claim_idx);
                    }
                }
                Said::Pin(_, subjects) => {
                    for id in subjects {
                        by_tensor.entry(*id).or_default().push(claim_idx);
                    }
                }
                Said::Forbid(..) | Said::Prefer(..) => {}
            }
        }
        let mut reported = BTreeSet::new();
        let mut settled = Settled::new();
        for (id, claim_idxs) in by_tensor {
            let dims = self.settle_tensor(id, &claim_idxs, &mut reported);
            settled.insert(id, dims);
        }
        settled
    }

    fn settle_tensor(
        &mut self,
        id: TensorId,
        claim_idxs: &[usize],
        reported: &mut BTreeSet<(usize, usize)>,
    ) -> BTreeMap<Dim, Decision> {
        let mut pinned: BTreeMap<&Dim, Vec<Decision>> = BTreeMap::new();
        let mut shards: BTreeMap<&Dim, Vec<usize>> = BTreeMap::new();
        for claim_idx in claim_idxs {
            match &self.claims[*claim_idx].said {
                Said::Shard { dims, .. } => {
                    if let Some(dim) = dims.get(&id) {
                        shards.entry(dim).or_default().push(*claim_idx);
                    }
                }
                Said::Pin(pattern, _) => {
                    for (dim, split) in &pattern.dims {
                        pinned.entry(dim).or_default().push(Decision {
                            pattern: split.clone(),
                            claims: vec![*claim_idx],
                        });
                    }
                }
                Said::Forbid(..) | Said::Prefer(..) => {}
            }
        }
        let mut contradictions: Vec<(usize, usize)> = Vec::new();
        let mut decided: BTreeMap<Dim, Decision> = BTreeMap::new();
        let all: BTreeSet<&Dim> = pinned.keys().chain(shards.keys()).copied().collect();
        for dim in all {
            let mut rivals = pinned.get(dim).cloned().unwrap_or_default();
            if let Some(claims) = shards.get(dim) {
                rivals.push(Decision {
                    pattern: DimPattern::Axes(self.together(claims)),
                    claims: claims.clone(),
                });
            }
            let mut winner: Option<Decision> = None;
            for rival in rivals {
                winner = Some(match winner {
                    None => rival,
                    Some(first) => self.stronger(first, rival, &mut contradictions),
                });
            }
            if let Some(winner) = winner {
                decided.insert(dim.clone(), winner);
            }
        }
        self.one_dim_an_axis(&mut decided, &mut contradictions);
        for (a, b) in contradictions {
            if reported.insert((a, b)) {
                self.contradiction(id, a, b);
            }
        }
        decided
    }

    /// The axes of several shards of one dim, in the order of the mesh.
    fn together(&self, claims: &[usize]) -> Vec<Axis> {
        let mut named: Vec<&Axis> = Vec::new();
        for claim_idx in claims {
            if let Said::Shard { axes, .. } = &self.claims[*claim_idx].said {
                named.extend(axes);
            }
        }
        if let [only] = claims
            && let Said::Shard { axes, .. } = &self.claims[*only].said
        {
            return axes.clone();
        }
        let mut order = self.meshes.order();
        order.retain(|axis| named.contains(&axis));
        order
    }

    fn stronger(
        &self,
        first: Decision,
        second: Decision,
        contradictions: &mut Vec<(usize, usize)>,
    ) -> Decision {
        if first.pattern == second.pattern {
            let mut claims = first.claims;
            claims.extend(second.claims);
            return Decision {
                pattern: first.pattern,
                claims,
            };
        }
        let beats = |a: &Decision, b: &Decision| {
            let claim = |idx: &usize| &self.claims[*idx];
            a.claims
                .iter()
                .any(|a| b.claims.iter().all(|b| claim(a).beats(claim(b))))
        };
        if beats(&second, &first) {
            return second;
        }
        if beats(&first, &second) || second.pattern == DimPattern::Open {
            return first;
        }
        if first.pattern == DimPattern::Open {
            return second;
        }
        if let (Some(a), Some(b)) = (first.claims.first(), second.claims.first()) {
            contradictions.push((*a, *b));
        }
        first
    }

    /// Takes an axis that divides two dims of a tensor from the weaker claim.
    fn one_dim_an_axis(
        &self,
        decided: &mut BTreeMap<Dim, Decision>,
        contradictions: &mut Vec<(usize, usize)>,
    ) {
        let mut users: BTreeMap<Axis, Vec<Dim>> = BTreeMap::new();
        for (dim, decision) in &*decided {
            if let DimPattern::Axes(axes) = &decision.pattern {
                for axis in axes {
                    users.entry(axis.clone()).or_default().push(dim.clone());
                }
            }
        }
        for (axis, dims) in users {
            let [first, second, ..] = dims.as_slice() else {
                continue;
            };
            let claim_of = |dim: &Dim| {
                let claims = decided.get(dim).map(|decision| decision.claims.as_slice());
                let names = |idx: &&usize| match &self.claims[**idx].said {
                    Said::Shard { axes, .. } => axes.contains(&axis),
                    _ => true,
                };
                claims.unwrap_or_default().iter().find(names).copied()
            };
            let (Some(a), Some(b)) = (claim_of(first), claim_of(second)) else {
                continue;
            };
            let loser = if self.claims[a].beats(&self.claims[b]) {
                second
            } else if self.claims[b].beats(&self.claims[a]) {
                first
            } else {
                contradictions.push((a, b));
                continue;
            };
            let is_empty = decided.get_mut(loser).is_some_and(|decision| {
                let DimPattern::Axes(axes) = &mut decision.pattern else {
                    return false;
                };
                axes.retain(|other| *other != axis);
                axes.is_empty()
            });
            if is_empty {
                decided.remove(loser);
            }
        }
    }

    fn contradiction(&mut self, id: TensorId, a: usize, b: usize) {
        let (first, second) = (&self.claims[a], &self.claims[b]);
        let (Some(one), Some(two)) = (first.says_of(id), second.says_of(id)) else {
            return;
        };
        let what = match first.origin == second.origin {
            true => format!(
                "`{}` contradicts itself about {}: [{one}] and [{two}]",
                first.origin.text,
                tied(self.scene.name(id)),
            ),
            false => format!(
                "two statements contradict each other about {}: [{one}] and [{two}]",
                tied(self.scene.name(id)),
            ),
        };
        let diagnostic = Diagnostic::invalid(what)
            .code("W111")
            .at(second.origin.span, format!("[{two}] here"))
            .also(first.origin.span, format!("[{one}] here"))
            .help("end the one that is to hold with `override`, make it about fewer tensors, or take tensors out with `except`");
        self.diagnostics.push(diagnostic);
    }

    /// The decisions as rules, and those that are forbidden.
    fn rules(&mut self, settled: &Settled) -> Vec<Rule> {
        let mut rules = Vec::new();
        for (id, dims) in settled {
            let mut by_claims: BTreeMap<&[usize], Pattern> = BTreeMap::new();
            for (dim, decision) in dims {
                let is_shard = |idx: &usize| matches!(self.claims[*idx].said, Said::Shard { .. });
                if let DimPattern::Axes(axes) = &decision.pattern
                    && decision.claims.iter().all(is_shard)
                {
                    // Other axes may divide the tensor too, or leave it partial.
                    rules.extend(axes.iter().filter_map(|axis| {
                        let dims = vec![dim.clone()];
                        let axis = axis.clone();
                        self.rule(*id, &decision.claims, Demand::Over { axis, dims })
                    }));
                    continue;
                }
                let pattern = by_claims.entry(&decision.claims).or_default();
                pattern.dims.insert(dim.clone(), decision.pattern.clone());
            }
            let mut partial: BTreeMap<usize, Vec<(ReduceKind, Axis)>> = BTreeMap::new();
            for (claim_idx, claim) in self.claims.iter().enumerate() {
                if let Said::Pin(pattern, subjects) = &claim.said
                    && !pattern.partial.is_empty()
                    && subjects.contains(id)
                {
                    partial.insert(claim_idx, pattern.partial.clone());
                }
            }
            for (claim_idxs, mut pattern) in by_claims {
                let own = claim_idxs.first().and_then(|first| partial.remove(first));
                pattern.partial = own.unwrap_or_default();
                rules.extend(self.rule(*id, claim_idxs, Demand::Pin(pattern)));
            }
            for (claim_idx, partial) in partial {
                let pattern = Pattern {
                    dims: BTreeMap::new(),
                    partial,
                };
                rules.extend(self.rule(*id, &[claim_idx], Demand::Pin(pattern)));
            }
        }
        self.refuse_forbidden(settled);
        rules
    }

    fn rule(&self, id: TensorId, claim_idxs: &[usize], demand: Demand) -> Option<Rule> {
        let mut texts: Vec<&str> = Vec::new();
        for claim_idx in claim_idxs {
            let text = self.claims.get(*claim_idx)?.origin.text.as_str();
            if !texts.contains(&text) {
                texts.push(text);
            }
        }
        Some(Rule {
            subject: Subject::Tensor(id),
            demand,
            span: self.claims.get(*claim_idxs.first()?)?.origin.span,
            text: texts.join("; "),
        })
    }

    /// Reports decisions that another statement forbids; `override` lifts a ban.
    fn refuse_forbidden(&mut self, settled: &Settled) {
        let mut findings = Vec::new();
        let mut lifted: Vec<(usize, TensorId)> = Vec::new();
        for (claim_idx, claim) in self.claims.iter().enumerate() {
            let Said::Forbid(pattern, subjects) = &claim.said else {
                continue;
            };
            let mut is_reported = false;
            for id in subjects {
                let Some(dims) = settled.get(id) else {
                    continue;
                };
                let culprit = forbidden_by(pattern, dims);
                let Some(culprit) = culprit.and_then(|idx| self.claims.get(idx)) else {
                    continue;
                };
                if culprit.overrides && !claim.overrides {
                    lifted.push((claim_idx, *id));
                } else if !is_reported {
                    is_reported = true;
                    findings.push(
                        Diagnostic::invalid(format!(
                            "what one statement asks of {}, another forbids",
                            tied(self.scene.name(*id))
                        ))
                        .code("W111")
                        .at(claim.origin.span, "forbidden here")
                        .also(culprit.origin.span, "asked for here")
                        .help("remove one, or end the pin with `override`"),
                    );
                }
            }
        }
        self.diagnostics.extend(findings);
        for (claim_idx, id) in lifted {
            if let Some(Claim {
                said: Said::Forbid(_, subjects),
                ..
            }) = self.claims.get_mut(claim_idx)
            {
                subjects.retain(|other| *other != id);
            }
        }
    }

    /// The candidates whose degrees all decisions admit.
    fn admitted(&mut self, settled: &Settled) -> Vec<Mesh> {
        let mut refusals: Vec<Refusal> = Vec::new();
        let mut admitted = Vec::new();
        for mesh in &self.meshes.candidates {
            let found: Vec<Refusal> = settled
                .iter()
                .flat_map(|(id, dims)| dims.iter().map(move |(dim, d)| (*id, dim, d)))
                .filter_map(|(id, dim, decision)| self.refusal(mesh, id, dim, decision))
                .collect();
            if found.is_empty() {
                admitted.push(mesh.clone());
            } else if refusals.is_empty() {
                refusals = found;
            }
        }
        if admitted.is_empty() {
            let mut reported = BTreeSet::new();
            for refusal in refusals {
                if reported.insert((refusal.dim.clone(), refusal.size, refusal.axes.clone())) {
                    let diagnostic = self.refused(&refusal);
                    self.diagnostics.push(diagnostic);
                }
            }
        }
        admitted
    }

    fn refusal(
        &self,
        mesh: &Mesh,
        id: TensorId,
        dim: &Dim,
        decision: &Decision,
    ) -> Option<Refusal> {
        let DimPattern::Axes(axes) = &decision.pattern else {
            return None;
        };
        let degrees: Vec<usize> = axes.iter().map(|axis| mesh.degree(axis)).collect();
        let n_parts: usize = degrees.iter().product();
        let size = self.scene.graph.ty(id).size_of(dim)?;
        let fits = |even: Option<bool>| {
            n_parts == 1
                || smallest_part(size, &degrees) > 0
                    && (even != Some(true) || size.is_multiple_of(n_parts))
        };
        if self.admits(id, dim, &fits) {
            return None;
        }
        let is_even = self.admits(id, dim, &|even| even == Some(true));
        Some(Refusal {
            id,
            dim: dim.clone(),
            size,
            axes: axes.iter().cloned().zip(degrees).collect(),
            claim: decision.claims.first().copied()?,
            is_even,
        })
    }

    fn refused(&self, refusal: &Refusal) -> Diagnostic {
        let Refusal { id, dim, size, .. } = refusal;
        let axes: Vec<String> = refusal
            .axes
            .iter()
            .map(|(axis, degree)| format!("{axis}:{degree}"))
            .collect();
        let verb = if axes.len() == 1 { "divides" } else { "divide" };
        let legal: Vec<String> = (1..=*size)
            .filter(|degree| !refusal.is_even || size.is_multiple_of(*degree))
            .map(|degree| degree.to_string())
            .collect();
        let legal = match legal.as_slice() {
            [first, .., last] if legal.len() > 12 && !refusal.is_even => {
                format!("{first} to {last}")
            }
            legal => legal.join(", "),
        };
        let span = self.claims[refusal.claim].origin.span;
        let message = format!(
            "`{}` {verb} `{dim}` of {}, which has {size}; legal degrees: {legal}",
            axes.join(" × "),
            tied(self.scene.name(*id)),
        );
        let mut diagnostic = Diagnostic::invalid(message)
            .code("W112")
            .at(span, "divided here");
        for (axis, degree) in &refusal.axes {
            if let Some(place) = self.meshes.span_of(axis) {
                diagnostic = diagnostic.also(place, format!("degree {degree}"));
            }
        }
        diagnostic.help("lower the degree, or take the tensor out with `except`")
    }
}

/// A degree that a dim does not admit.
struct Refusal {
    id: TensorId,
    dim: Dim,
    size: usize,
    axes: Vec<(Axis, usize)>,
    claim: usize,
    is_even: bool,
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

/// The claim behind a decision that makes a forbidden layout certain.
fn forbidden_by(pattern: &Pattern, dims: &BTreeMap<Dim, Decision>) -> Option<usize> {
    if pattern.dims.is_empty() || !pattern.partial.is_empty() {
        return None;
    }
    let mut culprit = None;
    for (dim, forbidden) in &pattern.dims {
        let decision = dims.get(dim)?;
        let is_met = match (forbidden, &decision.pattern) {
            (DimPattern::AnyAxis, DimPattern::Axes(_)) => true,
            (forbidden, decided) => forbidden == decided && *decided != DimPattern::Open,
        };
        if !is_met {
            return None;
        }
        if culprit.is_none() || *forbidden != DimPattern::Unsharded {
            culprit = decision.claims.first().copied();
        }
    }
    culprit
}

/// Elements of the smallest part when a dim is cut into so many parts, again and again.
pub(super) fn smallest_part(size: usize, degrees: &[usize]) -> usize {
    let whole = Interval {
        start: 0,
        len: size,
    };
    let last = |interval: Interval, degree: &usize| {
        let degree = (*degree).max(1);
        interval.chunk(degree - 1, degree)
    };
    degrees.iter().fold(whole, last).len
}

/// Bans and preferences as rules.
fn demands(claims: &[Claim]) -> Vec<Rule> {
    let mut rules = Vec::new();
    for claim in claims {
        let (subjects, demands): (&[TensorId], Vec<Demand>) = match &claim.said {
            Said::Forbid(pattern, subjects) => (subjects, vec![Demand::Forbid(pattern.clone())]),
            Said::Prefer(ranking, subjects) => {
                let demand =
                    |(pattern, weight): &(Pattern, f64)| Demand::Prefer(pattern.clone(), *weight);
                (subjects, ranking.iter().map(demand).collect())
            }
            Said::Shard { .. } | Said::Pin(..) => continue,
        };
        for id in subjects {
            rules.extend(demands.iter().map(|demand| Rule {
                subject: Subject::Tensor(*id),
                demand: demand.clone(),
                span: claim.origin.span,
                text: claim.origin.text.clone(),
            }));
        }
    }
    rules
}

/// Whether a selector names tensors by part of their names.
fn is_wild(selector: &Selector) -> bool {
    selector.segments.iter().any(|segment| match segment {
        Segment::Any => true,
        Segment::Named { name, .. } => name.as_str().contains('*'),
    }) || selector.is_floating
}
