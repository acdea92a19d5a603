//! Meshes as candidates.
//!
//! Enters: `mesh NAME = …`, a mesh that `refolds` it, and the cluster. Leaves: every mesh that the
//! degrees admit; of two meshes their common refinement, of whose axes those of both consist.
//! Invariant: each candidate has exactly the cluster's number of ranks, and an axis `within node`
//! never leaves one.

use std::collections::BTreeMap;

use super::pipeline::without;
use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::diagnostics::{Diagnostic, Span, did_you_mean};
use meshweave_dsl::fold::{Fold, FoldError};
use meshweave_dsl::layout::Mesh;
use meshweave_dsl::name::Axis;
use meshweave_dsl::weave::ast::{
    AxisRef, Choice, Degree, Document, MeshDef, Name, Selector, Spanned, Statement,
};

/// The mesh of a document.
pub(super) struct Meshes<'a> {
    pub definition: Option<(&'a MeshDef, Span)>,
    /// The mesh that refolds it.
    folded: Option<(&'a MeshDef, Span)>,
    /// What each axis of two meshes consists of, outermost first; empty without a second mesh.
    parts: BTreeMap<Axis, Vec<Axis>>,
    /// What the second mesh is used on.
    pub folded_on: Vec<&'a Spanned<Selector>>,
    /// The one of the witnesses first; empty without a definition.
    pub candidates: Vec<Mesh>,
    /// The mesh that the fixed degrees and the witnesses give.
    pub witness: Option<Mesh>,
}

impl<'a> Meshes<'a> {
    /// Reads the mesh of a document that its ops are divided over: without the pipeline's axis.
    pub fn resolve(
        document: &'a Document,
        cluster: &Cluster,
        diagnostics: &mut Vec<Diagnostic>,
    ) -> Self {
        let mut this = Self::resolve_whole(document, cluster, diagnostics);
        for statement in document.statements() {
            let Statement::Pipeline(pipeline) = &statement.node else {
                continue;
            };
            // The block's own findings are reported with it.
            if let Ok(axis) = this.axis(&pipeline.over.node, pipeline.over.span) {
                let degrees = this.degrees(&axis);
                this.candidates = this
                    .candidates
                    .iter()
                    .filter(|mesh| degrees.contains(&mesh.degree(&axis)))
                    .map(|mesh| without(mesh, &axis))
                    .collect();
                this.witness = this.witness.map(|mesh| without(&mesh, &axis));
            }
        }
        this
    }

    /// Reads the mesh of a document.
    pub fn resolve_whole(
        document: &'a Document,
        cluster: &Cluster,
        diagnostics: &mut Vec<Diagnostic>,
    ) -> Self {
        let mut definition: Option<(&MeshDef, Span)> = None;
        let mut folded: Option<(&MeshDef, Span)> = None;
        for statement in document.statements() {
            let Statement::Mesh(mesh) = &statement.node else {
                continue;
            };
            if let Some(on) = &mesh.on {
                diagnostics.push(
                    Diagnostic::unsupported("the search over ops takes all nodes in order")
                        .code("W120")
                        .at(on.span, "")
                        .help("remove `on nodes[…]`, or plan with `--planner mapping`"),
                );
            }
            if mesh.refolds.is_some() {
                match folded {
                    Some((first, _)) if first.name.node == mesh.name.node => {}
                    Some((first, span)) => diagnostics.push(
                        unsupported("only one mesh can refold another")
                            .at(statement.span, "second mesh that refolds")
                            .also(span, "first one")
                            .help(format!("give all its axes to `{}`", first.name.node)),
                    ),
                    None => folded = Some((mesh, statement.span)),
                }
                continue;
            }
            match definition {
                // The same name twice is reported with the statements.
                Some((first, _)) if first.name.node == mesh.name.node => {}
                Some((first, span)) => diagnostics.push(
                    unsupported("more than one mesh is not implemented yet")
                        .at(statement.span, "second mesh")
                        .also(span, "first mesh")
                        .help(format!(
                            "write `refolds {}` behind one of them, or give all axes to one",
                            first.name.node
                        )),
                ),
                None => definition = Some((mesh, statement.span)),
            }
        }
        let folded_on = uses(document, definition, folded, diagnostics);
        let candidates = definition.map_or_else(Vec::new, |(mesh, span)| {
            candidates(mesh, span, cluster, None, diagnostics)
        });
        let witness = definition.and_then(|(mesh, _)| witness(mesh, None));
        let mut this = Self {
            definition,
            folded: None,
            parts: BTreeMap::new(),
            folded_on,
            candidates,
            witness,
        };
        if let Some((mesh, span)) = folded {
            this.fold(mesh, span, cluster, diagnostics);
        }
        let first = this
            .candidates
            .iter()
            .position(|mesh| Some(mesh) == this.witness.as_ref());
        if let Some(first) = first {
            this.candidates[..=first].rotate_right(1);
        }
        this
    }

    /// The degrees that an axis has among the candidates, or its witness if it is one of them;
    /// ascending.
    pub fn degrees(&self, axis: &Axis) -> Vec<usize> {
        let all = self.candidates.iter().map(|mesh| mesh.degree(axis));
        let all: std::collections::BTreeSet<usize> = all.collect();
        let definition = self.definition.into_iter();
        let mut own = definition.flat_map(|(mesh, _)| &mesh.axes);
        let own = own.find(|item| item.name.as_str() == axis.as_str());
        let known = own.and_then(|item| usize::try_from(item.degree.known()?).ok());
        match known.filter(|known| all.contains(known)) {
            Some(known) => vec![known],
            None => all.into_iter().collect(),
        }
    }

    /// Replaces the candidates by their common refinements with those of `folded`.
    fn fold(
        &mut self,
        folded: &'a MeshDef,
        span: Span,
        cluster: &Cluster,
        diagnostics: &mut Vec<Diagnostic>,
    ) {
        let invalid = |message: String| Diagnostic::invalid(message).code("W107").at(span, "");
        let Some((main, _)) = self.definition else {
            diagnostics.push(
                invalid(format!("mesh `{}` refolds no mesh", folded.name.node))
                    .help("add the mesh of the model, such as `mesh main = dp:rest > tp:2`"),
            );
            return;
        };
        if let Some(name) = folded
            .refolds
            .as_ref()
            .filter(|name| name.node != main.name.node)
        {
            diagnostics.push(
                invalid(format!("there is no mesh `{}`", name.node))
                    .help(format!("write `refolds {}`", main.name.node)),
            );
            return;
        }
        // `_` stands between the two names of a refined axis.
        let mut axes = main.axes.iter().chain(&folded.axes);
        if let Some(axis) = axes.find(|axis| axis.name.as_str().contains('_')) {
            diagnostics.push(
                Diagnostic::invalid(format!(
                    "`{}` has a `_`, which an axis of folded meshes cannot",
                    axis.name
                ))
                .code("W107")
                .at(axis.span, "")
                .help("rename it"),
            );
            return;
        }
        self.folded = Some((folded, span));
        self.witness = self.witness.take().and_then(|main| {
            let folded = witness(folded, Some(&main))?;
            Some(Fold::new(&main, &folded).ok()?.mesh().clone())
        });
        let mut refined: Vec<Mesh> = Vec::new();
        let mut refused: Option<FoldError> = None;
        // Parts by the places of their two axes: refinements of several candidates in one order.
        let mut all: Vec<Fold> = Vec::new();
        for main in std::mem::take(&mut self.candidates) {
            let n_before = diagnostics.len();
            for folded in candidates(folded, span, cluster, Some(&main), diagnostics) {
                match Fold::new(&main, &folded) {
                    Ok(fold) => {
                        if !refined.contains(fold.mesh()) {
                            refined.push(fold.mesh().clone());
                        }
                        all.push(fold);
                    }
                    Err(error) => refused = refused.or(Some(error)),
                }
            }
            if diagnostics.len() > n_before {
                return;
            }
        }
        if let (true, Some(error)) = (all.is_empty(), refused) {
            let diagnostic = match &error {
                FoldError::Invalid(message) => Diagnostic::invalid(message.clone()),
                FoldError::Unsupported(message) => Diagnostic::unsupported(message.clone()),
            };
            diagnostics.push(diagnostic.code("W107").at(span, ""));
        }
        self.candidates = refined;
        let place = |part: &Axis| {
            let (a, b) = part
                .as_str()
                .split_once('_')
                .unwrap_or((part.as_str(), part.as_str()));
            let at = |mesh: &MeshDef, name: &str| {
                mesh.axes.iter().position(|axis| axis.name.as_str() == name)
            };
            (at(main, a), at(folded, b))
        };
        for fold in &all {
            for (axis, parts) in fold.parts() {
                let known = self.parts.entry(axis.clone()).or_default();
                for part in parts {
                    if !known.contains(part) {
                        known.push(part.clone());
                    }
                }
                known.sort_by_key(place);
            }
        }
    }

    /// The axes that a reference means: one, or what an axis of two meshes consists of.
    pub fn axes(&self, reference: &AxisRef, span: Span) -> Result<Vec<Axis>, Box<Diagnostic>> {
        let refined: Axis = reference.axis.as_str().into();
        let is_refined = self.parts.values().any(|parts| parts.contains(&refined));
        if reference.mesh.is_none() && is_refined {
            return Ok(vec![refined]);
        }
        let axis = self.axis(reference, span)?;
        Ok(self.parts.get(&axis).cloned().unwrap_or_else(|| vec![axis]))
    }

    /// The axes of the meshes, in the order in which layouts list them.
    pub fn order(&self) -> Vec<Axis> {
        let mut order: Vec<Axis> = Vec::new();
        for axis in self.main_axes() {
            match self.parts.get(&axis) {
                Some(parts) => order.extend(parts.iter().cloned()),
                None => order.push(axis),
            }
        }
        let missing = self.parts.values().flatten();
        for part in missing {
            if !order.contains(part) {
                order.push(part.clone());
            }
        }
        order
    }

    fn main_axes(&self) -> impl Iterator<Item = Axis> {
        let definition = self.definition.into_iter();
        let axes = definition.flat_map(|(mesh, _)| &mesh.axes);
        axes.map(|axis| axis.name.as_str().into())
    }

    /// Which mesh an axis of a statement belongs to: whether it is the folded one's; `None` for an
    /// axis of both, or of their refinement.
    pub fn is_folded(&self, reference: &AxisRef) -> Option<bool> {
        let (folded, _) = self.folded?;
        let name = &reference.axis;
        if let Some(mesh) = &reference.mesh {
            return Some(*mesh == folded.name.node);
        }
        let has = |mesh: &MeshDef| mesh.axes.iter().any(|axis| axis.name == *name);
        let (main, _) = self.definition?;
        match (has(main), has(folded)) {
            (true, false) => Some(false),
            (false, true) => Some(true),
            _ => None,
        }
    }

    /// The axis that a reference means.
    pub fn axis(&self, reference: &AxisRef, span: Span) -> Result<Axis, Box<Diagnostic>> {
        let invalid = |message: String| Diagnostic::invalid(message).code("W107").at(span, "");
        let Some((main, _)) = self.definition else {
            return Err(Box::new(
                invalid(format!(
                    "there is no axis `{reference}`: no mesh is defined"
                ))
                .help(format!("add `mesh main = {}:auto`", reference.axis)),
            ));
        };
        let meshes: Vec<&MeshDef> = [self.definition, self.folded]
            .into_iter()
            .flatten()
            .map(|(mesh, _)| mesh)
            .filter(|mesh| {
                let name = reference.mesh.as_ref();
                name.is_none_or(|name| *name == mesh.name.node)
            })
            .collect();
        if let (Some(name), []) = (&reference.mesh, meshes.as_slice()) {
            return Err(Box::new(
                invalid(format!("there is no mesh `{name}`"))
                    .help(format!("the mesh is called `{}`", main.name.node)),
            ));
        }
        let axes = || meshes.iter().flat_map(|mesh| &mesh.axes);
        if axes().any(|axis| axis.name == reference.axis) {
            return Ok(reference.axis.as_str().into());
        }
        let names: Vec<&str> = axes().map(|axis| axis.name.as_str()).collect();
        let near = did_you_mean(reference.axis.as_str(), names.iter().copied());
        let all = format!("its axes are {}", names.join(", "));
        let mesh = meshes
            .first()
            .map_or(&main.name.node, |mesh| &mesh.name.node);
        let message = format!("mesh `{mesh}` has no axis `{}`", reference.axis);
        Err(Box::new(invalid(message).help(near.unwrap_or(all))))
    }

    /// The place of an axis.
    pub fn span_of(&self, axis: &Axis) -> Option<Span> {
        let axes = [self.definition, self.folded]
            .into_iter()
            .flatten()
            .flat_map(|(mesh, _)| &mesh.axes);
        let name = axis.as_str();
        let mut found = axes.filter(|item| {
            let own = item.name.as_str();
            own == name || name.split_once('_').is_some_and(|(first, _)| first == own)
        });
        found.next().map(|item| item.span)
    }
}

/// Checks the `use` statements; what the folded mesh is used on leaves.
fn uses<'a>(
    document: &'a Document,
    definition: Option<(&MeshDef, Span)>,
    folded: Option<(&MeshDef, Span)>,
    diagnostics: &mut Vec<Diagnostic>,
) -> Vec<&'a Spanned<Selector>> {
    let mut folded_on = Vec::new();
    let is_called = |mesh: Option<(&MeshDef, Span)>, name: &Name| {
        mesh.is_some_and(|(mesh, _)| mesh.name.node == *name)
    };
    for statement in document.statements() {
        let Statement::Use(item) = &statement.node else {
            continue;
        };
        let name = &item.mesh.node;
        if is_called(folded, name) {
            folded_on.extend(&item.on);
        } else if is_called(definition, name) {
            let is_partial = item.on.iter().any(|selector| selector.to_string() != "*");
            if is_partial {
                diagnostics.push(
                    unsupported("the first mesh is for the whole model")
                        .at(statement.span, "")
                        .help(format!(
                            "write `use {name} on *`, and `use` the mesh that refolds it on a part"
                        )),
                );
            }
        } else {
            let known = [definition, folded].into_iter().flatten();
            let known = known.map(|(mesh, _)| mesh.name.node.as_str());
            diagnostics.push(
                Diagnostic::invalid(format!("there is no mesh `{name}`"))
                    .code("W107")
                    .at(item.mesh.span, "")
                    .maybe_help(did_you_mean(name.as_str(), known)),
            );
        }
    }
    folded_on
}

fn unsupported(message: &str) -> Diagnostic {
    Diagnostic::unsupported(message).code("W120")
}

/// The mesh of fixed degrees and witnesses; over `main`, `same` and `rest` follow from it.
fn witness(definition: &MeshDef, main: Option<&Mesh>) -> Option<Mesh> {
    let mut axes: Vec<(&str, usize)> = Vec::new();
    for axis in &definition.axes {
        let name = axis.name.as_str();
        let degree = match (&axis.degree, main) {
            (Degree::Same { .. }, Some(main)) => main.degree(&name.into()),
            (Degree::Rest { witness: None }, Some(_)) => 0,
            (degree, _) => usize::try_from(degree.known()?).ok()?,
        };
        axes.push((name, degree));
    }
    if let Some(main) = main {
        let others = product(&axes.iter().map(|(_, degree)| *degree).collect::<Vec<_>>());
        for (_, degree) in axes.iter_mut().filter(|(_, degree)| *degree == 0) {
            *degree = main.n_ranks() / others;
        }
    }
    Some(Mesh::new(axes))
}

/// The degrees that an axis may have; `None` for `rest`.
fn degrees(degree: &Degree, n_devices: usize) -> Option<Vec<usize>> {
    let count = |degree: &u64| usize::try_from(*degree).unwrap_or(usize::MAX);
    match degree {
        Degree::Is(Choice::Fixed(degree)) => Some(vec![count(degree)]),
        Degree::Is(Choice::Auto { among, .. }) if among.is_empty() => {
            let divides = |degree: &usize| n_devices.is_multiple_of(*degree);
            Some((1..=n_devices).filter(divides).collect())
        }
        Degree::Is(Choice::Auto { among, .. }) => {
            let mut degrees: Vec<usize> = among.iter().map(count).collect();
            degrees.dedup();
            Some(degrees)
        }
        Degree::Rest { .. } | Degree::Same { .. } => None,
    }
}

/// The meshes that the degrees admit; of a mesh that refolds `main`, over the same ranks.
fn candidates(
    definition: &MeshDef,
    span: Span,
    cluster: &Cluster,
    main: Option<&Mesh>,
    diagnostics: &mut Vec<Diagnostic>,
) -> Vec<Mesh> {
    let n_devices = cluster.n_devices();
    let n_before = diagnostics.len();
    let mut rest: Option<Span> = None;
    for axis in &definition.axes {
        match &axis.degree {
            Degree::Same { .. } if main.is_some() => {
                let name: Axis = axis.name.as_str().into();
                let axes = main.into_iter().flat_map(Mesh::axes);
                if axes.filter(|(other, _)| *other == name).count() == 0 {
                    diagnostics.push(
                        Diagnostic::invalid(format!(
                            "`{}` is `same`, but the refolded mesh has no such axis",
                            axis.node.name
                        ))
                        .code("W107")
                        .at(axis.span, "")
                        .help("give it a degree"),
                    );
                }
            }
            Degree::Same { .. } => diagnostics.push(
                Diagnostic::invalid(format!("`{}` is `same` as nothing", axis.node.name))
                    .code("W107")
                    .at(axis.span, "")
                    .help("`same` is for a mesh that `refolds` another"),
            ),
            Degree::Rest { .. } => match rest {
                Some(first) => diagnostics.push(
                    Diagnostic::invalid(format!(
                        "mesh `{}` leaves the rest to two axes",
                        definition.name.node
                    ))
                    .code("W107")
                    .at(axis.span, "again here")
                    .also(first, "first here")
                    .help("write `auto` for one of them"),
                ),
                None => rest = Some(axis.span),
            },
            Degree::Is(_) => {}
        }
        if let Some(level) = axis.within.as_ref().filter(|level| **level != "node") {
            diagnostics.push(
                Diagnostic::invalid(format!("there is no level `{level}` of a cluster"))
                    .code("W107")
                    .at(axis.span, "")
                    .help("write `within node`"),
            );
        }
    }
    if diagnostics.len() > n_before {
        return Vec::new();
    }
    // All products of the axes' degrees that divide the number of devices, `rest` as 0.
    let mut partial: Vec<Vec<usize>> = vec![Vec::new()];
    for axis in &definition.axes {
        let degrees = match (&axis.degree, main) {
            (Degree::Same { .. }, Some(main)) => vec![main.degree(&axis.name.as_str().into())],
            (degree, _) => degrees(degree, n_devices).unwrap_or_else(|| vec![0]),
        };
        partial = partial
            .iter()
            .flat_map(|before| {
                degrees.iter().map(|degree| {
                    let mut with = before.clone();
                    with.push(*degree);
                    with
                })
            })
            .filter(|degrees| n_devices.is_multiple_of(product(degrees)))
            .collect();
    }
    let complete: Vec<Mesh> = partial
        .into_iter()
        .map(|mut degrees| {
            let others = product(&degrees);
            for degree in degrees.iter_mut().filter(|degree| **degree == 0) {
                *degree = n_devices / others;
            }
            let names = definition.axes.iter().map(|axis| axis.name.as_str());
            Mesh::new(names.zip(degrees))
        })
        .filter(|mesh| mesh.n_ranks() == n_devices)
        .collect();
    if complete.is_empty() {
        diagnostics.push(no_product(definition, span, cluster, rest.is_some()));
        return complete;
    }
    let (inside, outside): (Vec<Mesh>, Vec<Mesh>) = complete
        .into_iter()
        .partition(|mesh| leaving_axis(definition, mesh, cluster).is_none());
    if inside.is_empty() {
        let found = outside.first().and_then(|mesh| {
            let axis = leaving_axis(definition, mesh, cluster)?;
            Some((mesh, axis))
        });
        if let Some((mesh, axis)) = found {
            let degree = mesh.degree(&axis.name.as_str().into());
            diagnostics.push(
                Diagnostic::invalid(format!(
                    "`{}:{degree}` leaves the node: nodes of `{}` have {} devices, and the axes inside of it take {}",
                    axis.name,
                    cluster.name,
                    cluster.devices_per_node,
                    stride(mesh, axis.name.as_str()),
                ))
                .code("W107")
                .at(span, "")
                .help("lower its degree, put it last, or remove `within node`"),
            );
        }
    }
    inside
}

/// The product of the degrees that are known (not 0), and never 0.
fn product(degrees: &[usize]) -> usize {
    degrees
        .iter()
        .filter(|degree| **degree > 0)
        .fold(1, |all: usize, degree| all.saturating_mul(*degree))
}

fn stride(mesh: &Mesh, axis: &str) -> usize {
    let inner = mesh.axes().iter().rev();
    inner
        .take_while(|(name, _)| name.as_str() != axis)
        .map(|(_, degree)| degree)
        .product()
}

/// An axis that must stay within a node, but does not.
fn leaving_axis<'a>(
    definition: &'a MeshDef,
    mesh: &Mesh,
    cluster: &Cluster,
) -> Option<&'a meshweave_dsl::weave::ast::Axis> {
    let bound = definition.axes.iter().filter(|axis| axis.within.is_some());
    bound.map(|axis| &axis.node).find(|axis| {
        let name: Axis = axis.name.as_str().into();
        (0..mesh.n_ranks()).any(|rank| {
            let group = mesh.group(rank, std::slice::from_ref(&name));
            let node = cluster.node_of(rank);
            group.iter().any(|member| cluster.node_of(*member) != node)
        })
    })
}

fn no_product(definition: &MeshDef, span: Span, cluster: &Cluster, has_rest: bool) -> Diagnostic {
    let n_devices = cluster.n_devices();
    let fixed: Option<Vec<usize>> = definition
        .axes
        .iter()
        .map(|axis| match &axis.degree {
            Degree::Is(Choice::Fixed(degree)) => usize::try_from(*degree).ok(),
            _ => None,
        })
        .collect();
    let name = &definition.name.node;
    let devices = format!("cluster `{}` has {n_devices} devices", cluster.name);
    match fixed {
        Some(degrees) => {
            let n_ranks = product(&degrees);
            let text: Vec<String> = degrees.iter().map(usize::to_string).collect();
            let sum = match text.as_slice() {
                [_] => format!("mesh `{name}` has {n_ranks} ranks"),
                _ => format!("mesh `{name}` has {} = {n_ranks} ranks", text.join(" × ")),
            };
            Diagnostic::invalid(format!("{sum}, but {devices}"))
                .code("W107")
                .at(span, "")
                .help("change a degree, write `rest` for one axis, or change the cluster")
        }
        None => {
            let how = if has_rest {
                "no choice of degrees divides them evenly"
            } else {
                "no choice of degrees has that product"
            };
            Diagnostic::invalid(format!("mesh `{name}`: {devices}, and {how}"))
                .code("W107")
                .at(span, "")
                .help("widen a choice, or write `rest` for one axis")
        }
    }
}
