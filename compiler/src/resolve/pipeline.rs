//! The `pipeline` block of a document that is executed.
//!
//! Enters: the block, the document's mesh and schedules. Leaves: a [`Pipeline`]: axis, cuts and the
//! schedule's rows.
//! Invariant: the schedule passed its checks and has the axis's ranks; the batch divides into its
//! microbatches.

use std::path::Path;

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::diagnostics::{Diagnostic, Span, did_you_mean};
use meshweave_dsl::layout::Mesh;
use meshweave_dsl::name::Axis;
use meshweave_dsl::schedule::{Lowered, Schedule};
use meshweave_dsl::weave::ast::{
    Choice, Document, Name, Pipeline as Block, PipelineItem, ScheduleBody, Selector, Spanned,
    Statement,
};

use super::mesh::Meshes;
use crate::schedule::{
    Builtin, Shape, build, definitions, from_definition, lowered_definition, place,
};

/// How the model is run as a pipeline, or its gradients accumulated.
#[derive(Clone, Debug, PartialEq)]
pub struct Pipeline {
    pub axis: Axis,
    /// All axes of the mesh, outermost first.
    pub axes: Vec<Axis>,
    /// Each begins a stage, as a path such as `layers[2]`; where there are none, stages are even.
    pub cuts: Vec<String>,
    /// Whether a block that begins several stages leaves all but the last of them empty.
    pub allow_empty: bool,
    pub schedule: Schedule,
    /// The schedule with its memory actions, where the document writes them.
    pub lowered: Option<Lowered>,
    /// The block.
    pub span: Span,
}

impl Pipeline {
    /// The devices of one stage, as a cluster; all have the memory of their whole pipeline, since the
    /// graph that is planned for them is that of all stages.
    pub fn stage_cluster(&self, cluster: &Cluster) -> Cluster {
        let n_ranks = self.schedule.n_ranks;
        let mut stage = cluster.clone();
        if stage.n_nodes.is_multiple_of(n_ranks) {
            stage.n_nodes /= n_ranks;
        } else {
            stage.devices_per_node = stage.n_devices() / n_ranks / stage.n_nodes;
        }
        stage.device.memory_bytes *= n_ranks as u64;
        stage
    }

    /// The mesh of all ranks around that of a stage.
    pub fn mesh(&self, stage: &Mesh) -> Mesh {
        Mesh::new(self.axes.iter().map(|axis| {
            let is_own = *axis == self.axis;
            let degree = if is_own {
                self.schedule.n_ranks
            } else {
                stage.degree(axis)
            };
            (axis.clone(), degree)
        }))
    }
}

/// A mesh without an axis.
pub(super) fn without(mesh: &Mesh, axis: &Axis) -> Mesh {
    let axes = mesh.axes().iter();
    Mesh::new(axes.filter(|(name, _)| name != axis).cloned())
}

/// The pipeline of a document for steps of `batch` sequences; none without a block.
pub(super) fn resolve_pipeline(
    document: &Document,
    cluster: &Cluster,
    batch: usize,
    base_dir: &Path,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<Pipeline> {
    let mut blocks = document
        .statements()
        .filter_map(|statement| match &statement.node {
            Statement::Pipeline(block) => Some((block, statement.span)),
            _ => None,
        });
    let first = blocks.next();
    warn_of_unused(document, first.map(|(block, _)| block), diagnostics);
    let (block, span) = first?;
    if let Some((_, second)) = blocks.next() {
        diagnostics.push(
            Diagnostic::invalid("`pipeline` is given twice")
                .code("W101")
                .at(second, "again here")
                .also(span, "first here")
                .help("remove one of the two"),
        );
        return None;
    }
    match read(document, block, span, cluster, batch, base_dir) {
        Ok(pipeline) => Some(pipeline),
        Err(diagnostic) => {
            diagnostics.push(*diagnostic);
            None
        }
    }
}

/// A schedule that no pipeline names has no effect.
fn warn_of_unused(document: &Document, block: Option<&Block>, diagnostics: &mut Vec<Diagnostic>) {
    let is_named = |name: &Name| {
        block.is_some_and(|block| {
            block.body.items().any(|item| {
                let PipelineItem::Schedule(choice) = &item.node else {
                    return false;
                };
                let among = match choice {
                    Choice::Auto { among, .. } => among.as_slice(),
                    Choice::Fixed(_) => &[],
                };
                choice.known() == Some(name) || among.contains(name)
            })
        })
    };
    for statement in document.statements() {
        if let Statement::Schedule(definition) = &statement.node
            && !is_named(&definition.name.node)
        {
            let name = &definition.name.node;
            diagnostics.push(
                Diagnostic::warning(format!("schedule `{name}` is not used"))
                    .code("W119")
                    .at(statement.span, "")
                    .help(format!(
                        "write `schedule {name}` in a `pipeline` block, or remove it"
                    )),
            );
        }
    }
}

type Read<T> = Result<T, Box<Diagnostic>>;

fn read(
    document: &Document,
    block: &Block,
    span: Span,
    cluster: &Cluster,
    batch: usize,
    base_dir: &Path,
) -> Read<Pipeline> {
    // The mesh's own findings are reported with it.
    let meshes = Meshes::resolve_whole(document, cluster, &mut Vec::new());
    let axis = meshes.axis(&block.over.node, block.over.span)?;
    let degrees = meshes.degrees(&axis);
    let [n_ranks] = degrees[..] else {
        return Err(open(
            block.over.span,
            &format!("the degree of `{axis}`"),
            &format!("write `{axis}:2` in the mesh"),
        ));
    };
    let (mut n_chunks, mut cuts, mut n_microbatches) = (None, Vec::new(), None);
    let (mut n_slices, mut ranks, mut allow_empty) = (1, Vec::new(), false);
    let mut name: Option<Spanned<Name>> = None;
    for item in block.body.items() {
        let at = item.span;
        match &item.node {
            PipelineItem::Chunks(choice) => {
                n_chunks = Some(known(choice, at, "the number of chunks", "chunks 2")? as usize);
            }
            PipelineItem::CutBefore(choice) => {
                if choice.known().is_some() || !is_any(choice) {
                    cuts = known(choice, at, "the cuts", "cut before layers[1]")?;
                }
            }
            PipelineItem::Schedule(choice) => {
                let node = known(choice, at, "the schedule", "schedule 1f1b")?;
                if is_search(document, &node) {
                    return Err(open(at, "the schedule", "write such as `schedule 1f1b`"));
                }
                name = Some(Spanned { node, span: at });
            }
            PipelineItem::Microbatches(choice) => {
                let what = "the number of microbatches";
                n_microbatches = Some((known(choice, at, what, "microbatches 4")? as usize, at));
            }
            PipelineItem::Slices(choice) => {
                n_slices = known(choice, at, "the number of slices", "slices 2")? as usize;
            }
            PipelineItem::Ranks(listed) => {
                ranks = listed.iter().map(|rank| *rank as usize).collect();
            }
            PipelineItem::EmptyStages => allow_empty = true,
        }
    }
    let (n_microbatches, at) = n_microbatches
        .ok_or_else(|| open(span, "the number of microbatches", "add `microbatches 4`"))?;
    if !batch.is_multiple_of(n_microbatches) {
        return Err(Box::new(
            Diagnostic::invalid(format!(
                "{batch} sequences do not divide into {n_microbatches} microbatches"
            ))
            .code("W119")
            .at(at, "")
            .help(format!(
                "take a number that divides {batch}, or change the batch"
            )),
        ));
    }
    let cuts = paths(&cuts)?;
    let from_cuts = (!cuts.is_empty() && (cuts.len() + 1).is_multiple_of(n_ranks))
        .then(|| (cuts.len() + 1) / n_ranks);
    let shape = Shape {
        n_chunks: n_chunks.or(from_cuts).unwrap_or(1),
        ..Shape::new(n_ranks, n_microbatches).slices(n_slices)
    };
    let own = Spanned {
        node: Name::literal("1f1b"),
        span,
    };
    let has_chunks = n_chunks.is_some() && name.is_some();
    let named = name.as_ref().unwrap_or(&own);
    let schedule = schedule(document, named, &shape, has_chunks, &ranks, base_dir)?;
    let place = name.as_ref().map_or(span, |name| name.span);
    let mut own = definitions(document).filter(|own| own.name.node == named.node);
    let lowered = match own.next() {
        Some(definition) => lowered_definition(definition, base_dir)
            .map_err(|error| refused(&error, place))?
            .map(|(lowered, _)| lowered),
        None => None,
    };
    if lowered.is_some() && !ranks.is_empty() {
        return Err(Box::new(
            Diagnostic::invalid(format!(
                "schedule `{}` has its messages in place, which say where its stages are",
                schedule.name
            ))
            .code("W119")
            .at(span, "`ranks` moves them")
            .help("remove `ranks`, or the communication and memory actions"),
        ));
    }
    if (schedule.n_ranks, schedule.n_microbatches) != (n_ranks, n_microbatches) {
        return Err(Box::new(
            Diagnostic::invalid(format!(
                "schedule `{}` is for {} ranks and {} microbatches, the pipeline has {n_ranks} and {n_microbatches}",
                schedule.name, schedule.n_ranks, schedule.n_microbatches
            ))
            .code("W119")
            .at(place, "")
            .help("change the mesh, the microbatches, or the rows"),
        ));
    }
    if !cuts.is_empty() && cuts.len() + 1 != schedule.n_stages {
        return Err(Box::new(
            Diagnostic::invalid(format!(
                "{} cuts make {} stages, schedule `{}` has {}",
                cuts.len(),
                cuts.len() + 1,
                schedule.name,
                schedule.n_stages
            ))
            .code("W119")
            .at(span, "")
            .help(format!("give {} cuts, or none", schedule.n_stages - 1)),
        ));
    }
    let mesh = meshes.candidates.first();
    Ok(Pipeline {
        axes: mesh.map_or_else(Vec::new, |mesh| {
            mesh.axes().iter().map(|(axis, _)| axis.clone()).collect()
        }),
        axis,
        cuts,
        allow_empty,
        schedule,
        lowered,
        span,
    })
}

/// A built-in schedule, or one that the document defines, with stages on `ranks` where any are given.
pub(super) fn schedule(
    document: &Document,
    name: &Spanned<Name>,
    shape: &Shape,
    has_chunks: bool,
    ranks: &[usize],
    base_dir: &Path,
) -> Read<Schedule> {
    let text = name.node.as_str();
    let own = definitions(document).find(|definition| definition.name.node == name.node);
    if let Some(definition) = own {
        let at = match &definition.body {
            ScheduleBody::Key(_) => name.span,
            ScheduleBody::Rows { .. } | ScheduleBody::Streams { .. } => definition.name.span,
            ScheduleBody::Csv(file) => file.span,
        };
        return from_definition(definition, shape, ranks, base_dir)
            .map_err(|error| refused(&error, at));
    }
    let Some(builtin) = Builtin::find(text) else {
        let known = Builtin::ALL.iter().map(|builtin| builtin.name());
        let all = known.clone().collect::<Vec<_>>().join(", ");
        return Err(Box::new(
            Diagnostic::invalid(format!("there is no schedule `{text}`"))
                .code("W119")
                .at(name.span, "")
                .help(
                    did_you_mean(text, known.chain(["search"])).unwrap_or(format!(
                        "built in are {all}; or define it with `schedule`, or `search`"
                    )),
                ),
        ));
    };
    let shape = if has_chunks {
        *shape
    } else {
        builtin.fit(*shape).slices(shape.n_slices)
    };
    let built = build(builtin, &shape, None).and_then(|schedule| match ranks {
        [] => Ok(schedule),
        ranks => place(&schedule, ranks),
    });
    built.map_err(|error| refused(&error, name.span))
}

/// Whether an order is to be searched for, rather than one of the document's taken.
pub(super) fn is_search(document: &Document, name: &Name) -> bool {
    let mut own = definitions(document);
    name.as_str() == "search" && !own.any(|definition| definition.name.node == *name)
}

fn refused(error: &dyn std::fmt::Display, span: Span) -> Box<Diagnostic> {
    let diagnostic = Diagnostic::invalid(error.to_string()).code("W119");
    Box::new(diagnostic.at(span, ""))
}

fn open(span: Span, what: &str, way_out: &str) -> Box<Diagnostic> {
    Box::new(
        Diagnostic::unsupported(format!(
            "{what} must be given for a pipeline to be executed"
        ))
        .code("W120")
        .at(span, "left to the planner here")
        .help(way_out),
    )
}

pub(super) fn is_any<T>(choice: &Choice<T>) -> bool {
    matches!(choice, Choice::Auto { among, .. } if among.is_empty())
}

fn known<T: Clone>(choice: &Choice<T>, span: Span, what: &str, example: &str) -> Read<T> {
    let value = choice.known().cloned();
    value.ok_or_else(|| open(span, what, &format!("write such as `{example}`")))
}

/// Cuts as paths of one block each.
pub(super) fn paths(cuts: &[Spanned<Selector>]) -> Read<Vec<String>> {
    cuts.iter()
        .map(|cut| {
            let text = cut.node.to_string();
            if cut.node.is_floating || text.contains(['*', ',']) || text.contains("..") {
                return Err(Box::new(
                    Diagnostic::invalid(format!("`{text}` is not one block"))
                        .code("W119")
                        .at(cut.span, "")
                        .help("name each block that begins a stage, such as `layers[2]`"),
                ));
            }
            Ok(text)
        })
        .collect()
}
