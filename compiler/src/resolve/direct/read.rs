//! What each statement says, read into claims.
//!
//! Enters: statements with their tactics expanded. Leaves: [`Claim`]s, in the order of the document.
//! Invariant: a statement that names nothing, or divides nothing, is a finding.

use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::diagnostics::{Diagnostic, Span, did_you_mean};
use meshweave_dsl::graph::TensorId;
use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::name::{Axis, Dim};
use meshweave_dsl::op::Spread;
use meshweave_dsl::plan::op_factors;
use meshweave_dsl::weave::ast::{
    Choice, Forbid, Layout, Name, Pin, Prefer, Reduce, Segment, Selector, Shard, Spanned, Split,
    TacticItem, Target, TensorClass,
};

use super::super::tactics::{Expanded, Origin};
use super::{Claim, Claims, LARGEST, Said};
use crate::plan::directives::{DimPattern, Pattern};

impl Claims<'_> {
    pub(super) fn read(&mut self, expanded: &Expanded) {
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
    pub(super) fn find_folded(&mut self) {
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
    pub(super) fn is_divisible(&self, id: TensorId, dim: &Dim) -> bool {
        self.admits(id, dim, &|_| true)
    }

    /// Whether a source has the dim in such a size, or its op such a factor.
    pub(super) fn admits(
        &self,
        id: TensorId,
        dim: &Dim,
        is_legal: &dyn Fn(Option<bool>) -> bool,
    ) -> bool {
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
}

/// Whether a selector names tensors by part of their names.
fn is_wild(selector: &Selector) -> bool {
    selector.segments.iter().any(|segment| match segment {
        Segment::Any => true,
        Segment::Named { name, .. } => name.as_str().contains('*'),
    }) || selector.is_floating
}
