//! Meshes as candidates.
//!
//! Enters: `mesh NAME = …` and the cluster. Leaves: every mesh that the degrees admit.
//! Invariant: each candidate has exactly the cluster's number of ranks, and an axis `within node`
//! never leaves one.

use super::pipeline::without;
use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::diagnostics::{Diagnostic, Span, did_you_mean};
use meshweave_dsl::layout::Mesh;
use meshweave_dsl::name::Axis;
use meshweave_dsl::weave::ast::{AxisRef, Choice, Degree, Document, MeshDef, Statement};

/// The mesh of a document.
pub(super) struct Meshes<'a> {
    pub definition: Option<(&'a MeshDef, Span)>,
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
        for statement in document.statements() {
            let Statement::Mesh(mesh) = &statement.node else {
                continue;
            };
            if let Some(other) = &mesh.refolds {
                diagnostics.push(
                    unsupported("refolding a mesh is not implemented yet")
                        .at(other.span, "")
                        .help("use the axes of one mesh for all parts of the model"),
                );
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
                            "give all axes to mesh `{}`, or remove one",
                            first.name.node
                        )),
                ),
                None => definition = Some((mesh, statement.span)),
            }
        }
        for statement in document.statements() {
            let Statement::Use(item) = &statement.node else {
                continue;
            };
            let name = &item.mesh.node;
            match definition {
                Some((mesh, _)) if mesh.name.node == *name => {
                    let is_partial = item.on.iter().any(|selector| selector.to_string() != "*");
                    if is_partial {
                        diagnostics.push(
                            unsupported("a mesh for a part of the model is not implemented yet")
                                .at(statement.span, "")
                                .help(format!("write `use {name} on *`, or remove the statement")),
                        );
                    }
                }
                _ => {
                    let known = definition.map(|(mesh, _)| mesh.name.node.as_str());
                    diagnostics.push(
                        Diagnostic::invalid(format!("there is no mesh `{name}`"))
                            .code("W107")
                            .at(item.mesh.span, "")
                            .maybe_help(did_you_mean(name.as_str(), known)),
                    );
                }
            }
        }
        let candidates = definition.map_or_else(Vec::new, |(mesh, span)| {
            candidates(mesh, span, cluster, diagnostics)
        });
        let witness = definition.and_then(|(mesh, _)| witness(mesh));
        let mut this = Self {
            definition,
            candidates,
            witness,
        };
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

    /// The axis that a reference means.
    pub fn axis(&self, reference: &AxisRef, span: Span) -> Result<Axis, Box<Diagnostic>> {
        let invalid = |message: String| Diagnostic::invalid(message).code("W107").at(span, "");
        let Some((mesh, _)) = self.definition else {
            return Err(Box::new(
                invalid(format!(
                    "there is no axis `{reference}`: no mesh is defined"
                ))
                .help(format!("add `mesh main = {}:auto`", reference.axis)),
            ));
        };
        if let Some(name) = reference
            .mesh
            .as_ref()
            .filter(|name| **name != mesh.name.node)
        {
            return Err(Box::new(
                invalid(format!("there is no mesh `{name}`"))
                    .help(format!("the mesh is called `{}`", mesh.name.node)),
            ));
        }
        let found = mesh.axes.iter().find(|axis| axis.name == reference.axis);
        if found.is_some() {
            return Ok(reference.axis.as_str().into());
        }
        let names: Vec<&str> = mesh.axes.iter().map(|axis| axis.name.as_str()).collect();
        let near = did_you_mean(reference.axis.as_str(), names.iter().copied());
        let all = format!("its axes are {}", names.join(", "));
        let message = format!("mesh `{}` has no axis `{}`", mesh.name.node, reference.axis);
        Err(Box::new(invalid(message).help(near.unwrap_or(all))))
    }

    /// The place of an axis.
    pub fn span_of(&self, axis: &Axis) -> Option<Span> {
        let (mesh, _) = self.definition?;
        let found = mesh
            .axes
            .iter()
            .find(|item| item.name.as_str() == axis.as_str());
        found.map(|item| item.span)
    }
}

fn unsupported(message: &str) -> Diagnostic {
    Diagnostic::unsupported(message).code("W120")
}

fn witness(definition: &MeshDef) -> Option<Mesh> {
    let axes: Option<Vec<(&str, usize)>> = definition
        .axes
        .iter()
        .map(|axis| {
            let degree = usize::try_from(axis.degree.known()?).ok()?;
            Some((axis.name.as_str(), degree))
        })
        .collect();
    axes.map(Mesh::new)
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

fn candidates(
    definition: &MeshDef,
    span: Span,
    cluster: &Cluster,
    diagnostics: &mut Vec<Diagnostic>,
) -> Vec<Mesh> {
    let n_devices = cluster.n_devices();
    let n_before = diagnostics.len();
    let mut rest: Option<Span> = None;
    for axis in &definition.axes {
        match &axis.degree {
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
        let degrees = degrees(&axis.degree, n_devices).unwrap_or_else(|| vec![0]);
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
