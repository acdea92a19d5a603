//! What a `pipeline` block leaves to the planner.
//!
//! Enters: the block, the document's mesh and schedules, the batch. Leaves: every pipeline that it
//! admits, and the document with one of them as its witnesses.
//! Invariant: the candidates are legal for the mesh and the batch; a document with witnesses leaves
//! nothing open.

use std::path::Path;

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::diagnostics::{Diagnostic, Span};
use meshweave_dsl::name::Axis;
use meshweave_dsl::schedule::Schedule;
use meshweave_dsl::weave::ast::{
    Choice, Degree, Document, Line, Name, Pipeline as Block, PipelineItem, Spanned, Statement,
};

use super::mesh::Meshes;
use super::pipeline::{is_any, is_search, paths, schedule};
use crate::schedule::{Builtin, Placement, Shape};

/// Chunks that are tried where nothing is said of their number.
const CHUNKS: [usize; 3] = [1, 2, 4];

/// The pipelines that a block admits.
#[derive(Clone, Debug, PartialEq)]
pub struct OpenPipeline {
    pub axis: Axis,
    /// Each begins a stage; where there are none, stages are even.
    pub cuts: Vec<String>,
    pub candidates: Vec<PipelineCandidate>,
    /// Whether a block that begins several stages leaves all but the last of them empty.
    pub allow_empty: bool,
    /// Whether the block has a line for the number of chunks.
    has_chunks: bool,
    /// The rank of every stage; none where nothing is said.
    ranks: Vec<usize>,
    /// The block.
    pub span: Span,
}

/// One of them.
#[derive(Clone, Debug, PartialEq)]
pub struct PipelineCandidate {
    /// The schedule's name, built in or of the document, or `search`.
    pub schedule: Name,
    pub shape: Shape,
    /// Where stages may lie while an order for them is searched for; none for schedules that exist.
    pub placements: Vec<Placement>,
}

/// What the document's pipeline leaves open for steps of `batch` sequences; `None` where everything is
/// said, and where the block is wrong, which reading it will report.
pub(super) fn open_pipeline(
    document: &Document,
    cluster: &Cluster,
    batch: usize,
) -> Option<OpenPipeline> {
    let block = document
        .statements()
        .find_map(|statement| match &statement.node {
            Statement::Pipeline(block) => Some((block, statement.span)),
            _ => None,
        });
    let (block, span) = block?;
    let meshes = Meshes::resolve_whole(document, cluster, &mut Vec::new());
    let axis = meshes.axis(&block.over.node, block.over.span).ok()?;
    let mut degrees = meshes.degrees(&axis);
    degrees.retain(|degree| *degree <= cluster.n_devices());
    let Items {
        chunks,
        cuts,
        names,
        microbatches,
        n_slices,
        ranks,
        allow_empty,
        is_open,
    } = Items::read(document, block, batch)?;
    if degrees.len() < 2 && !is_open {
        return None;
    }
    let mut candidates = Vec::new();
    for n_ranks in &degrees {
        for n_microbatches in &microbatches {
            // On one rank all schedules of one chunk are the same.
            let plain = Builtin::OneFOneB.name();
            let one = names.iter().position(|name| name.as_str() == plain);
            let names = match one.filter(|_| *n_ranks == 1) {
                Some(one) => &names[one..=one],
                None => &names,
            };
            for name in names {
                let builtin = Builtin::find(name.as_str());
                let is_search = is_search(document, name);
                let shape = Shape::new(*n_ranks, *n_microbatches).slices(n_slices);
                let n_chunks = match builtin.and_then(Builtin::fixed_chunks) {
                    Some(fixed) => vec![fixed],
                    None => chunks.clone().unwrap_or_else(|| {
                        let n_stages = cuts.len() + 1;
                        let n_stages = match ranks.len() {
                            0 => n_stages,
                            n_placed => n_placed,
                        };
                        let divides = n_stages > 1 && n_stages.is_multiple_of(*n_ranks);
                        match divides {
                            true => vec![n_stages / n_ranks],
                            // A search looks for stages in a row, and for two in a loop or a V.
                            false if is_search && *n_ranks > 1 && n_stages == 1 => vec![1, 2],
                            false => vec![1],
                        }
                    }),
                };
                let admitted = n_chunks.into_iter().filter(|n_chunks| {
                    let fits = |chunks: &Vec<usize>| chunks.contains(n_chunks);
                    chunks.as_ref().is_none_or(fits)
                        && (cuts.is_empty() || cuts.len() + 1 == n_ranks * n_chunks)
                        && (ranks.is_empty() || ranks.len() == n_ranks * n_chunks)
                });
                candidates.extend(admitted.map(|n_chunks| PipelineCandidate {
                    schedule: name.clone(),
                    shape: shape.chunks(n_chunks),
                    placements: match ranks.as_slice() {
                        _ if !is_search => Vec::new(),
                        [] if n_chunks > 1 => vec![Placement::Loop, Placement::V],
                        [] => vec![Placement::Loop],
                        ranks => vec![Placement::Explicit(ranks.to_vec())],
                    },
                }));
            }
        }
    }
    Some(OpenPipeline {
        axis,
        cuts,
        candidates,
        allow_empty,
        has_chunks: chunks.is_some(),
        ranks,
        span,
    })
}

/// The block's lines as choices.
struct Items {
    chunks: Option<Vec<usize>>,
    cuts: Vec<String>,
    names: Vec<Name>,
    microbatches: Vec<usize>,
    n_slices: usize,
    ranks: Vec<usize>,
    allow_empty: bool,
    is_open: bool,
}

impl Items {
    fn read(document: &Document, block: &Block, batch: usize) -> Option<Self> {
        let divisors = || (1..=batch).filter(|n| batch.is_multiple_of(*n));
        let mut items = Self {
            chunks: None,
            cuts: Vec::new(),
            names: vec![Name::new(Builtin::OneFOneB.name()).ok()?],
            microbatches: Vec::new(),
            n_slices: 1,
            ranks: Vec::new(),
            allow_empty: false,
            is_open: false,
        };
        for item in block.body.items() {
            match &item.node {
                PipelineItem::Chunks(choice) => {
                    items.is_open |= choice.known().is_none();
                    items.chunks = Some(among(choice, || CHUNKS.to_vec(), |n| *n as usize));
                }
                PipelineItem::CutBefore(choice) if choice.known().is_some() => {
                    items.cuts = paths(choice.known()?).ok()?;
                }
                // Even stages, or an alternative that reading refuses.
                PipelineItem::CutBefore(choice) if is_any(choice) => {}
                PipelineItem::CutBefore(_) => return None,
                PipelineItem::Schedule(choice) => {
                    let known = choice.known();
                    items.is_open |= known.is_none_or(|name| is_search(document, name));
                    items.names = among(choice, executable, Name::clone);
                }
                // Reading refuses them where they are open.
                PipelineItem::Slices(choice) => items.n_slices = *choice.known()? as usize,
                PipelineItem::Ranks(ranks) => {
                    items.ranks = ranks.iter().map(|rank| *rank as usize).collect();
                }
                PipelineItem::EmptyStages => items.allow_empty = true,
                PipelineItem::Microbatches(choice) => {
                    items.is_open |= choice.known().is_none();
                    items.microbatches = among(choice, || divisors().collect(), |n| *n as usize);
                    items
                        .microbatches
                        .retain(|n| *n > 0 && batch.is_multiple_of(*n));
                }
            }
        }
        (!items.microbatches.is_empty()).then_some(items)
    }
}

/// What a choice may be: its value, its list, or anything.
fn among<T, U>(choice: &Choice<T>, any: impl Fn() -> Vec<U>, of: impl Fn(&T) -> U) -> Vec<U> {
    match choice {
        Choice::Fixed(value) => vec![of(value)],
        Choice::Auto {
            witness: Some(value),
            ..
        } => vec![of(value)],
        Choice::Auto { among, .. } if among.is_empty() => any(),
        Choice::Auto { among, .. } => among.iter().map(of).collect(),
    }
}

/// The built-in schedules that give the step of the whole batch: asynchronous updates do not, and are
/// taken only by name.
fn executable() -> Vec<Name> {
    Builtin::ALL
        .into_iter()
        .filter(|builtin| !builtin.is_sliced() && *builtin != Builtin::PipeDream)
        .filter_map(|builtin| Name::new(builtin.name()).ok())
        .collect()
}

/// Defines the schedule that was searched for, by the name that asked for the search: from now on it is
/// that one.
fn define(document: &mut Document, name: &Name, found: &Schedule) {
    let statement = Statement::Schedule(found.to_statement(name.clone()));
    let lines = &mut document.body.lines;
    let is_pipeline = |line: &Line<Statement>| matches!(line.item.node, Statement::Pipeline(_));
    let at = lines.iter().position(is_pipeline).unwrap_or(lines.len());
    lines.insert(at, Line::of(statement));
}

impl OpenPipeline {
    /// A candidate's schedule.
    ///
    /// # Errors
    /// The schedule does not have that shape.
    pub fn schedule(
        &self,
        document: &Document,
        candidate: &PipelineCandidate,
        base_dir: &Path,
    ) -> Result<Schedule, Box<Diagnostic>> {
        let name = Spanned {
            node: candidate.schedule.clone(),
            span: self.span,
        };
        let made = schedule(
            document,
            &name,
            &candidate.shape,
            true,
            &self.ranks,
            base_dir,
        )?;
        let found = (made.n_ranks, made.n_microbatches);
        let wanted = (candidate.shape.n_ranks, candidate.shape.n_microbatches);
        if found != wanted {
            return Err(Box::new(Diagnostic::invalid(format!(
                "schedule `{}` is for {} ranks and {} microbatches",
                made.name, found.0, found.1
            ))));
        }
        Ok(made)
    }

    /// The document with a candidate for its witnesses; an order that was `found` for it is written
    /// into the document.
    #[must_use]
    pub fn witnessed(
        &self,
        document: &Document,
        candidate: &PipelineCandidate,
        found: Option<&Schedule>,
    ) -> Document {
        let mut document = document.clone();
        let PipelineCandidate {
            schedule, shape, ..
        } = candidate;
        if let Some(found) = found {
            define(&mut document, schedule, found);
        }
        for line in &mut document.body.lines {
            match &mut line.item.node {
                Statement::Mesh(mesh) => {
                    let own = mesh
                        .axes
                        .iter_mut()
                        .filter(|axis| axis.node.name.as_str() == self.axis.as_str());
                    for axis in own {
                        let degree = shape.n_ranks as u64;
                        match &mut axis.node.degree {
                            Degree::Is(choice) => *choice = choice.clone().witnessed(degree),
                            Degree::Rest { witness } | Degree::Same { witness } => {
                                *witness = Some(degree);
                            }
                        }
                    }
                }
                Statement::Pipeline(block) => {
                    for line in &mut block.body.lines {
                        match &mut line.item.node {
                            PipelineItem::Chunks(choice) => {
                                *choice = choice.clone().witnessed(shape.n_chunks as u64);
                            }
                            PipelineItem::Schedule(choice) => {
                                *choice = choice.clone().witnessed(schedule.clone());
                            }
                            PipelineItem::Microbatches(choice) => {
                                *choice = choice.clone().witnessed(shape.n_microbatches as u64);
                            }
                            PipelineItem::CutBefore(_)
                            | PipelineItem::Slices(_)
                            | PipelineItem::Ranks(_)
                            | PipelineItem::EmptyStages => {}
                        }
                    }
                }
                _ => {}
            }
        }
        document
    }
}
