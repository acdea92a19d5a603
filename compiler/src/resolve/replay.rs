//! Plans as text, and back.
//!
//! Enters: a document and the plan that was found for it. Leaves: the same document with witnesses
//! for its mesh, and one `place` an op and one `keep` a source (tied layers once).
//! Invariant: reading a printed plan gives the plan (without its certificate), so replaying it is
//! replaying the plan, and editing it is editing text.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use meshweave_dsl::diagnostics::{Diagnostic, Span, did_you_mean};
use meshweave_dsl::graph::{Graph, OpId, Role, TensorId};
use meshweave_dsl::layout::{Layout, Mesh, ReduceKind};
use meshweave_dsl::name::{Axis, Dim};
use meshweave_dsl::op::PARTIAL_FACTOR;
use meshweave_dsl::plan::{Certificate, Placement, Plan, op_factors};
use meshweave_dsl::units::{Bytes, Seconds};
use meshweave_dsl::weave::ast::{
    self, AxisRef, Choice, Comment, Degree, DimSplit, Document, Index, IndexItem, Keep, Line,
    MeshDef, Name, Partial, Pattern, Place, Reduce, Segment, Selector, Spanned, Split, Statement,
    Trivia,
};

use super::direct::smallest_part;
use super::mesh::Meshes;
use super::select::tied;
use super::tactics::Origin;
use crate::plan::Solution;

/// `document` with what `solution` decided: its intent stays, holes get their witnesses.
pub fn print_plan(document: &Document, graph: &Graph, solution: &Solution) -> Document {
    let plan = &solution.plan;
    let mut printed = document.clone();
    printed.drop_plan();
    witness_mesh(&mut printed, &plan.mesh);
    let mut lines = place_lines(graph, plan);
    lines.extend(keep_lines(graph, plan));
    if let Some(first) = lines.first_mut() {
        first.lead.push(Trivia::Blank);
        let comments = summary(&solution.certificate);
        let comments = comments
            .iter()
            .map(|text| Trivia::Comment(Comment::new(text)));
        first.lead.extend(comments);
    }
    printed.body.lines.extend(lines);
    printed
}

/// What the certificate says, for the head of the plan.
fn summary(certificate: &Certificate) -> Vec<String> {
    let peak = Bytes(certificate.memory.peak_bytes().max(0.0) as u64);
    vec![
        format!(
            "predicted: {} a step (at least {}, gap {:.1} %), {peak} a device on {}",
            Seconds(certificate.predicted_s),
            Seconds(certificate.lower_bound_s),
            100.0 * certificate.gap,
            certificate.cluster,
        ),
        "`place` says how ops are divided, `keep` how sources lie; `thaw` removes both.".into(),
    ]
}

/// Gives the mesh its witnesses, or adds the mesh.
fn witness_mesh(document: &mut Document, mesh: &Mesh) {
    let is_folded = document.statements().any(
        |statement| matches!(&statement.node, Statement::Mesh(mesh) if mesh.refolds.is_some()),
    );
    let mut is_witnessed = false;
    for line in &mut document.body.lines {
        let Statement::Mesh(definition) = &mut line.item.node else {
            continue;
        };
        if is_witnessed && definition.refolds.is_none() {
            continue;
        }
        is_witnessed = true;
        for axis in &mut definition.axes {
            let degree = match is_folded {
                true => folded_degree(mesh, axis.name.as_str()),
                false => mesh.degree(&axis.name.as_str().into()),
            };
            witness(&mut axis.node.degree, degree as u64);
        }
    }
    if is_witnessed {
        return;
    }
    let axes: Vec<Spanned<ast::Axis>> = mesh
        .axes()
        .iter()
        .filter_map(|(axis, degree)| {
            let axis = ast::Axis {
                name: Name::new(axis.as_str()).ok()?,
                degree: Degree::Is(Choice::auto().witnessed(*degree as u64)),
                within: None,
            };
            Some(axis.into())
        })
        .collect();
    let Ok(name) = Name::new("main") else { return };
    if axes.is_empty() {
        return;
    }
    let mut line = Line::of(Statement::Mesh(MeshDef {
        name: name.into(),
        axes,
        refolds: None,
        on: None,
    }));
    line.lead.push(Trivia::Blank);
    let at = behind_head(document);
    document.body.lines.insert(at, line);
}

/// The degree of an axis of one of two meshes: that of all its parts in their refinement.
fn folded_degree(mesh: &Mesh, name: &str) -> usize {
    let is_part = |axis: &Axis| {
        let of = axis.as_str().split_once('_');
        axis.as_str() == name || of.is_some_and(|(a, b)| a == name || b == name)
    };
    let axes = mesh.axes().iter();
    axes.filter(|(axis, _)| is_part(axis))
        .map(|(_, degree)| degree)
        .product()
}

/// The place behind the statements that say what is run.
pub(in crate::resolve) fn behind_head(document: &Document) -> usize {
    let is_head = |line: &Line<Statement>| {
        matches!(
            line.item.node,
            Statement::Plan(_)
                | Statement::Model(_)
                | Statement::Cluster(_)
                | Statement::Data(_)
                | Statement::Init(_)
                | Statement::Train(_)
                | Statement::Infer(_)
        )
    };
    let at = document.body.lines.iter().rposition(is_head);
    at.map_or(0, |at| at + 1)
}

fn witness(degree: &mut Degree, value: u64) {
    match degree {
        Degree::Is(choice) => *choice = choice.clone().witnessed(value),
        Degree::Rest { witness } | Degree::Same { witness } => *witness = Some(value),
    }
}

/// One `place` for the ops of all layers that are placed alike.
fn place_lines(graph: &Graph, plan: &Plan) -> Vec<Line<Statement>> {
    let named = graph.ops().map(|(op_id, op)| {
        let placement = plan.placements.get(op_id.index());
        (graph.op_name(op), placement.cloned().unwrap_or_default())
    });
    let statement = |(on, placement): (Selector, Placement)| {
        let mut factors = ast::Layout::default();
        for (axis, factor) in in_mesh_order(&placement.factors, &plan.mesh) {
            if factor.as_str() == PARTIAL_FACTOR {
                factors.partial.push(Partial {
                    reduce: Reduce::Sum,
                    axes: vec![axis],
                });
            } else {
                split(&mut factors, factor, axis);
            }
        }
        let (on, factors) = (on.into(), factors.into());
        Line::of(Statement::Place(Place { on, factors }))
    };
    grouped(named).into_iter().map(statement).collect()
}

/// The factors by axis, outermost axis first.
fn in_mesh_order<'a>(
    factors: &'a BTreeMap<Axis, Dim>,
    mesh: &'a Mesh,
) -> impl Iterator<Item = (AxisRef, &'a Dim)> {
    let axes = mesh.axes().iter();
    axes.filter_map(|(axis, _)| Some((axis_ref(axis)?, factors.get(axis)?)))
}

fn axis_ref(axis: &Axis) -> Option<AxisRef> {
    Some(AxisRef {
        mesh: None,
        axis: Name::new(axis.as_str()).ok()?,
    })
}

/// Adds an axis to a dim of a layout.
fn split(layout: &mut ast::Layout, dim: &Dim, axis: AxisRef) {
    let known = layout.dims.iter_mut().find(|item| item.dim == dim.as_str());
    match known {
        Some(DimSplit {
            split: Split::Axes(axes),
            ..
        }) => axes.push(axis),
        Some(item) => item.split = Split::Axes(vec![axis]),
        None => {
            if let Ok(dim) = Name::new(dim.as_str()) {
                let split = Split::Axes(vec![axis]);
                layout.dims.push(DimSplit { dim, split });
            }
        }
    }
}

/// One `keep` for the sources of all layers that are kept alike.
fn keep_lines(graph: &Graph, plan: &Plan) -> Vec<Line<Statement>> {
    // Sources without a layout take part, so that `[*]` says nothing about them.
    let sources = graph
        .tensor_ids()
        .filter(|id| graph.tensor(*id).role != Role::Temp);
    let named = sources.map(|id| {
        let tensor = graph.tensor(id);
        // The dims belong to the text, so tensors of other dims are no kin.
        let dims: Vec<Dim> = tensor.ty.dims().cloned().collect();
        let kept = plan.sources.get(&id).map(|layout| (dims, layout.clone()));
        (tensor.name.as_str(), kept)
    });
    let statement = |(on, kept): (Selector, Option<(Vec<Dim>, Layout)>)| {
        let (dims, layout) = kept?;
        let mut text = ast::Layout::default();
        for dim in &dims {
            let Ok(name) = Name::new(dim.as_str()) else {
                continue;
            };
            let split = Split::Whole;
            text.dims.push(DimSplit { dim: name, split });
            for axis in layout.axes_of(dim) {
                if let Some(axis) = axis_ref(axis) {
                    self::split(&mut text, dim, axis);
                }
            }
        }
        for (axis, kind) in &layout.partial {
            let reduce = match kind {
                ReduceKind::Sum => Reduce::Sum,
                ReduceKind::Max => Reduce::Max,
                ReduceKind::Lse => Reduce::Lse,
            };
            let axes = axis_ref(axis).into_iter().collect();
            text.partial.push(Partial { reduce, axes });
        }
        let (on, layout) = (on.into(), text.into());
        Some(Line::of(Statement::Keep(Keep { on, layout })))
    };
    grouped(named).into_iter().filter_map(statement).collect()
}

/// Selectors for names, one for those that differ in an index only and have the same value.
fn grouped<'a, T: Clone + PartialEq>(
    named: impl Iterator<Item = (&'a str, T)>,
) -> Vec<(Selector, T)> {
    /// Indices with their value, by the order in which values appear.
    type Members<T> = Vec<(T, Vec<Option<u64>>)>;
    let mut order: Vec<String> = Vec::new();
    let mut groups: HashMap<String, Members<T>> = HashMap::new();
    for (name, value) in named {
        let indices = indices(name);
        let (key, index) = match indices.as_slice() {
            [only] => (tied(name), Some(*only)),
            _ => (name.to_owned(), None),
        };
        let members = groups.entry(key.clone()).or_insert_with(|| {
            order.push(key);
            Vec::new()
        });
        match members.iter_mut().find(|(known, _)| *known == value) {
            Some((_, indices)) => indices.push(index),
            None => members.push((value, vec![index])),
        }
    }
    let mut out = Vec::new();
    for key in order {
        let members = groups.remove(&key).unwrap_or_default();
        let is_uniform = members.len() == 1;
        for (value, indices) in members {
            let mut indices: Vec<u64> = indices.into_iter().flatten().collect();
            indices.sort_unstable();
            let index = match (indices.is_empty(), is_uniform) {
                (true, _) => None,
                (false, true) => Some(Index::All),
                (false, false) => Some(Index::Of(ranges(&indices))),
            };
            out.push((selector(&key, index.as_ref()), value));
        }
    }
    out
}

/// The numbers in brackets.
fn indices(name: &str) -> Vec<u64> {
    let parts = name.split('[').skip(1);
    parts
        .filter_map(|part| part.split_once(']')?.0.parse().ok())
        .collect()
}

/// Sorted indices as ranges.
fn ranges(indices: &[u64]) -> Vec<IndexItem> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for index in indices {
        match ranges.last_mut() {
            Some((_, end)) if *end == *index => *end = index + 1,
            _ => ranges.push((*index, index + 1)),
        }
    }
    let item = |(start, end): (u64, u64)| match end - start {
        1 => IndexItem::At(start),
        _ => IndexItem::Range {
            start,
            end: Some(end),
        },
    };
    ranges.into_iter().map(item).collect()
}

/// The selector of a name; `index` stands for its `[*]`.
fn selector(name: &str, index: Option<&Index>) -> Selector {
    let segments = name.split('.').map(|part| {
        let (base, own) = match part.split_once('[') {
            Some((base, rest)) => {
                let number = rest.trim_end_matches(']').parse().ok();
                let own = number.map(|at| Index::Of(vec![IndexItem::At(at)]));
                (base, own.or_else(|| index.cloned()))
            }
            None => (part, None),
        };
        match pattern(base) {
            Some(name) => Segment::Named { name, index: own },
            None => Segment::Any,
        }
    });
    Selector {
        is_floating: false,
        segments: segments.collect(),
    }
}

/// A name as a pattern; characters that the language does not know are left open.
fn pattern(name: &str) -> Option<Pattern> {
    let open = |c: char| {
        if c.is_ascii_alphanumeric() || c == '_' {
            c
        } else {
            '*'
        }
    };
    Pattern::new(name)
        .or_else(|_| Pattern::new(&name.chars().map(open).collect::<String>()))
        .ok()
}

/// The plan that a document's `place` and `keep` statements say, if it has any.
pub(super) fn replay(
    document: &Document,
    name: &str,
    graph: &Graph,
    meshes: &Meshes<'_>,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<Plan> {
    let mut places: Vec<(&Place, Span)> = Vec::new();
    let mut keeps: Vec<(&Keep, Span)> = Vec::new();
    for statement in document.statements() {
        match &statement.node {
            Statement::Place(place) => places.push((place, statement.span)),
            Statement::Keep(keep) => keeps.push((keep, statement.span)),
            _ => {}
        }
    }
    let first = places.first().map(|(_, span)| *span);
    let first = first.or(keeps.first().map(|(_, span)| *span))?;
    let n_before = diagnostics.len();
    let mesh = match (&meshes.witness, meshes.definition) {
        (Some(mesh), _) => mesh.clone(),
        (None, None) => Mesh::new(Vec::<(Axis, usize)>::new()),
        (None, Some((definition, span))) => {
            diagnostics.push(
                Diagnostic::invalid(format!(
                    "the plan is complete, but not its mesh `{}`",
                    definition.name.node
                ))
                .code("W113")
                .at(span, "a degree is left open here")
                .also(first, "the plan begins here")
                .help("give every axis a degree or a witness, as in `tp:auto := 4`, or remove the `place` and `keep` statements"),
            );
            return None;
        }
    };
    if !meshes.candidates.is_empty() && !meshes.candidates.contains(&mesh) {
        let span = meshes.definition.map_or(first, |(_, span)| span);
        diagnostics.push(
            Diagnostic::invalid(format!("the witnesses `{mesh}` are no mesh of the cluster"))
                .code("W113")
                .at(span, "")
                .help("plan again, or correct the witnesses"),
        );
        return None;
    }
    let mut reader = Reader {
        graph,
        meshes,
        mesh,
        diagnostics,
    };
    let placements = reader.placements(&places, first);
    let sources = reader.sources(&keeps);
    let mesh = reader.mesh;
    if diagnostics.len() > n_before {
        return None;
    }
    Some(Plan {
        name: name.to_owned(),
        mesh,
        placements,
        sources,
        storage: meshweave_dsl::dtype::DType::F32,
        certificate: None,
    })
}

struct Reader<'a, 'd> {
    graph: &'a Graph,
    meshes: &'a Meshes<'a>,
    mesh: Mesh,
    diagnostics: &'d mut Vec<Diagnostic>,
}

impl Reader<'_, '_> {
    fn placements(&mut self, places: &[(&Place, Span)], first: Span) -> Vec<Placement> {
        let graph = self.graph;
        let names: Vec<&str> = graph.ops.iter().map(|op| graph.op_name(op)).collect();
        let selectors = places.iter().map(|(place, _)| &place.on);
        let chosen = self.assign(&names, selectors, "op");
        let mut placements = Vec::with_capacity(names.len());
        let mut missing = Vec::new();
        let mut reported = BTreeSet::new();
        for (op_idx, name) in names.iter().enumerate() {
            let place = chosen
                .get(&op_idx)
                .and_then(|idx| Some((*idx, places.get(*idx)?)));
            let Some((place_idx, (place, _))) = place else {
                missing.push(*name);
                placements.push(Placement::default());
                continue;
            };
            match self.placement(OpId(op_idx as u32), &place.factors) {
                Ok(placement) => placements.push(placement),
                Err(finding) => {
                    if reported.insert(place_idx) {
                        self.diagnostics.push(*finding);
                    }
                    placements.push(Placement::default());
                }
            }
        }
        if let Some(name) = missing.first() {
            let more = match missing.len() - 1 {
                0 => "has".to_owned(),
                n_more => format!("and {n_more} more ops have"),
            };
            self.diagnostics.push(
                Diagnostic::invalid(format!("`{name}` {more} no `place`, but others have"))
                    .code("W113")
                    .at(first, "the plan begins here")
                    .help("a plan is replayed as a whole: plan again, or remove all `place` and `keep` statements"),
            );
        }
        placements
    }

    fn placement(
        &self,
        op_id: OpId,
        layout: &Spanned<ast::Layout>,
    ) -> Result<Placement, Box<Diagnostic>> {
        let op = self.graph.op(op_id);
        let factors = op_factors(self.graph, op);
        let name = self.graph.op_name(op);
        let invalid = |message: String| {
            Diagnostic::invalid(message)
                .code("W113")
                .at(layout.span, "")
        };
        let mut placement = Placement::default();
        let mut wanted: Vec<(&str, Vec<&AxisRef>)> = Vec::new();
        for item in &layout.dims {
            if let Split::Axes(axes) = &item.split {
                wanted.push((item.dim.as_str(), axes.iter().collect()));
            } else {
                wanted.push((item.dim.as_str(), Vec::new()));
            }
        }
        for partial in &layout.partial {
            if partial.reduce != Reduce::Sum {
                let text = partial.reduce.text();
                return Err(Box::new(invalid(format!(
                    "`{name}` cannot be divided by `+{text}`: ops carry only partial sums"
                ))));
            }
            wanted.push((PARTIAL_FACTOR, partial.axes.iter().collect()));
        }
        for (factor_name, axes) in wanted {
            let factor = factors.iter().find(|f| f.name.as_str() == factor_name);
            let Some(factor) = factor else {
                let known: Vec<&str> = factors.iter().map(|f| f.name.as_str()).collect();
                return Err(Box::new(
                    invalid(format!(
                        "`{name}` ({}) cannot be divided by `{factor_name}`",
                        op.kind.name()
                    ))
                    .maybe_help(did_you_mean(factor_name, known.iter().copied()))
                    .help(match known.as_slice() {
                        [] => "it cannot be divided at all".to_owned(),
                        known => format!("it can by {}", known.join(", ")),
                    }),
                ));
            };
            let mut degrees = Vec::new();
            for reference in axes {
                for axis in self.meshes.axes(reference, layout.span)? {
                    degrees.push(self.mesh.degree(&axis));
                    if placement
                        .factors
                        .insert(axis, factor.name.clone())
                        .is_some()
                    {
                        return Err(Box::new(invalid(format!(
                            "axis `{reference}` divides `{name}` twice"
                        ))));
                    }
                }
            }
            let n_parts: usize = degrees.iter().product();
            if n_parts > 1 && (smallest_part(factor.size, &degrees) == 0 || !factor.admits(n_parts))
            {
                return Err(Box::new(
                    invalid(format!(
                        "`{factor_name}` of `{name}` has {} elements, which {n_parts} ranks cannot divide",
                        factor.size
                    ))
                    .help("lower the degree, or divide another factor"),
                ));
            }
        }
        Ok(placement)
    }

    fn sources(&mut self, keeps: &[(&Keep, Span)]) -> BTreeMap<TensorId, Layout> {
        let graph = self.graph;
        let ids: Vec<TensorId> = graph
            .tensor_ids()
            .filter(|id| graph.tensor(*id).role != Role::Temp)
            .collect();
        let names: Vec<&str> = ids
            .iter()
            .map(|id| graph.tensor(*id).name.as_str())
            .collect();
        let selectors = keeps.iter().map(|(keep, _)| &keep.on);
        let chosen = self.assign(&names, selectors, "source");
        let mut sources = BTreeMap::new();
        let mut reported = BTreeSet::new();
        for (name_idx, keep_idx) in chosen {
            let (Some(id), Some((keep, _))) = (ids.get(name_idx), keeps.get(keep_idx)) else {
                continue;
            };
            match self.kept(*id, &keep.layout) {
                Ok(layout) => {
                    sources.insert(*id, layout);
                }
                Err(finding) => {
                    if reported.insert(keep_idx) {
                        self.diagnostics.push(*finding);
                    }
                }
            }
        }
        sources
    }

    fn kept(&self, id: TensorId, text: &Spanned<ast::Layout>) -> Result<Layout, Box<Diagnostic>> {
        let tensor = self.graph.tensor(id);
        let name = &tensor.name;
        let invalid = |message: String| Diagnostic::invalid(message).code("W113").at(text.span, "");
        let mut layout = Layout::replicated();
        let mut used: Vec<Axis> = Vec::new();
        let mut once = |axis: &Axis| {
            let is_new = !used.contains(axis);
            used.push(axis.clone());
            is_new
        };
        for item in &text.dims {
            let dim: Dim = item.dim.as_str().into();
            let Some(size) = tensor.ty.size_of(&dim) else {
                let dims: Vec<&str> = tensor.ty.dims().map(Dim::as_str).collect();
                return Err(Box::new(
                    invalid(format!("{name} has no dim `{dim}`"))
                        .maybe_help(did_you_mean(dim.as_str(), dims.iter().copied()))
                        .help(format!("its dims are {}", dims.join(", "))),
                ));
            };
            let Split::Axes(axes) = &item.split else {
                continue;
            };
            let mut degrees = Vec::new();
            for reference in axes {
                for axis in self.meshes.axes(reference, text.span)? {
                    if !once(&axis) {
                        return Err(Box::new(invalid(format!(
                            "axis `{axis}` divides {name} twice"
                        ))));
                    }
                    degrees.push(self.mesh.degree(&axis));
                    layout = layout.shard(&dim, &axis);
                }
            }
            let n_parts: usize = degrees.iter().product();
            if n_parts > 1 && smallest_part(size, &degrees) == 0 {
                return Err(Box::new(invalid(format!(
                    "`{dim}` of {name} has {size} elements, which {n_parts} ranks cannot divide"
                ))));
            }
        }
        for partial in &text.partial {
            let kind = match partial.reduce {
                Reduce::Sum => ReduceKind::Sum,
                Reduce::Max => ReduceKind::Max,
                Reduce::Lse => ReduceKind::Lse,
            };
            for reference in &partial.axes {
                for axis in self.meshes.axes(reference, text.span)? {
                    layout = layout.partial(axis, kind);
                }
            }
        }
        Ok(layout)
    }

    /// For each name the selector that decides: the one that selects fewest, if others contain it.
    fn assign<'s>(
        &mut self,
        names: &[&str],
        selectors: impl Iterator<Item = &'s Spanned<Selector>>,
        what: &str,
    ) -> BTreeMap<usize, usize> {
        let mut by_tied: HashMap<String, Vec<usize>> = HashMap::new();
        for (name_idx, name) in names.iter().enumerate() {
            by_tied.entry(tied(name)).or_default().push(name_idx);
        }
        let all: Vec<usize> = (0..names.len()).collect();
        let mut selected: Vec<(BTreeSet<usize>, Span)> = Vec::new();
        for selector in selectors {
            // A selector without wildcards but `[*]` has its names in one bucket.
            let text = selector.node.to_string();
            let literal = text.replace("[*]", "");
            let bucket = if literal.contains('*') || selector.node.is_floating {
                all.as_slice()
            } else {
                let key = open_indices(&selector.node);
                by_tied.get(&key).map_or(&[][..], Vec::as_slice)
            };
            let found: BTreeSet<usize> = bucket
                .iter()
                .copied()
                .filter(|name_idx| {
                    names
                        .get(*name_idx)
                        .is_some_and(|name| selector.matches(name))
                })
                .collect();
            if found.is_empty() {
                let near = did_you_mean(&tied(&text), by_tied.keys().map(String::as_str));
                self.diagnostics.push(
                    Diagnostic::invalid(format!("`{text}` matches no {what}"))
                        .code("W108")
                        .at(selector.span, format!("no {what} has such a name"))
                        .maybe_help(near)
                        .help("the plan may be of another model: plan again"),
                );
            }
            selected.push((found, selector.span));
        }
        let mut chosen: BTreeMap<usize, usize> = BTreeMap::new();
        let mut reported = BTreeSet::new();
        for (idx, (found, span)) in selected.iter().enumerate() {
            for name_idx in found {
                let Some(other) = chosen.get(name_idx).copied() else {
                    chosen.insert(*name_idx, idx);
                    continue;
                };
                let Some((others, other_span)) = selected.get(other) else {
                    continue;
                };
                let is_within = found.len() < others.len() && found.is_subset(others);
                let is_around = others.len() < found.len() && others.is_subset(found);
                if is_within {
                    chosen.insert(*name_idx, idx);
                } else if !is_around && reported.insert((other, idx)) {
                    let name = names.get(*name_idx).copied().unwrap_or_default();
                    self.diagnostics.push(
                        Diagnostic::invalid(format!("two statements are about {what} `{name}`"))
                            .code("W111")
                            .at(*span, "second statement")
                            .also(*other_span, "first statement")
                            .help("remove one, or make it about fewer layers"),
                    );
                }
            }
        }
        chosen
    }
}

/// The text of a selector with every index as `[*]`.
fn open_indices(selector: &Selector) -> String {
    let parts: Vec<String> = selector
        .segments
        .iter()
        .map(|segment| match segment {
            Segment::Any => "*".to_owned(),
            Segment::Named { name, index: None } => name.to_string(),
            Segment::Named {
                name,
                index: Some(_),
            } => format!("{name}[*]"),
        })
        .collect();
    parts.join(".")
}

/// The statement of a replayed plan that decides an op or a source, for messages.
pub(super) fn deciding_statement(document: &Document, name: &str) -> Option<Origin> {
    let mut best: Option<(usize, Origin)> = None;
    for statement in document.statements() {
        let on = match &statement.node {
            Statement::Place(place) => &place.on,
            Statement::Keep(keep) => &keep.on,
            _ => continue,
        };
        // The longest selector is the most specific.
        let length = on.to_string().len();
        if on.matches(name) && best.as_ref().is_none_or(|(longest, _)| length > *longest) {
            best = Some((length, Origin::of(statement)));
        }
    }
    best.map(|(_, origin)| origin)
}
