//! From a parsed document to what it asks for.
//!
//! Enters: a [`Document`]. Leaves, in two steps, because the second needs the graph of the first:
//! a [`Request`] (model, cluster, job), then the planner's [`Directives`].
//! Invariant: every statement either has its effect or is refused with its place; none is ignored.
//!
//! [`Document`]: meshweave_dsl::weave::Document

mod settings;
mod model;
mod cluster;
mod job;
mod mesh;
mod open_pipeline;
mod pipeline;
mod select;
mod tactics;
mod direct;
mod experts;
mod replay;
mod mapping;

use std::path::{Path, PathBuf};

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::diagnostics::{Diagnostic, Sources, Span, has_errors};
use meshweave_dsl::dtype::DType;
use meshweave_dsl::weave::ast::{
    Document, Exchanges, Header, Init as InitStatement, MemoryItem, OffloadTo, RecomputePolicy,
    Reference, Spanned, Statement,
};

pub use cluster::{cluster_of_text, print_cluster};
pub use direct::direct;
pub use experts::{Experts, PlacedBy};
pub use mapping::{
    MappingRequest, Planner, Restriction, Rule, mapping_request, planner, print_mapping, remarks,
};
pub use open_pipeline::{OpenPipeline, PipelineCandidate};
pub use pipeline::Pipeline;
pub use replay::print_plan;

use crate::differentiate::Optimizer;
use crate::model::{DecoderConfig, Goal};

/// What a document asks for, apart from how the work is divided.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    pub name: String,
    pub model: ModelSource,
    pub cluster: Cluster,
    pub job: Job,
    /// What the batch may be where it is left open, anything where nothing is listed; the job then has
    /// the witness, or the least of these.
    pub open_batch: Option<Vec<usize>>,
    /// What activations and the operands of products are stored as.
    pub storage: DType,
    /// What is asked of inference beyond its sizes.
    pub serving: Serving,
    pub init: Init,
    /// The text to train on; without one, the golden model's tokens.
    pub data: Option<PathBuf>,
    pub solve: SolveLimits,
    /// Microbatches, and stages where there are several.
    pub pipeline: Option<Pipeline>,
    /// What the document leaves open of its pipeline; then there is none yet.
    pub open_pipeline: Option<OpenPipeline>,
    /// What it says about experts.
    pub experts: Experts,
}

impl Request {
    /// What the forward graph must end in, and how tokens get there.
    pub fn goal(&self) -> Goal {
        match self.job {
            Job::Train { .. } => Goal::Training,
            Job::Infer { .. } => match self.experts.exchanges {
                Some(Exchanges::One) => Goal::CoherentLogits,
                Some(Exchanges::Two) | None => Goal::Logits,
            },
        }
    }

    /// What the devices are that the ops of the graph are divided over: all, or those of a stage.
    pub fn stage_cluster(&self) -> Cluster {
        match &self.pipeline {
            Some(pipeline) => pipeline.stage_cluster(&self.cluster),
            None => self.cluster.clone(),
        }
    }
}

/// Where the graph comes from.
// One a request: its size does not matter.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug, PartialEq)]
pub enum ModelSource {
    /// Defined in the document.
    Decoder(DecoderConfig),
    /// A `config.json`, or the folder that holds it.
    Config(PathBuf),
    /// A graph as text.
    Graph(PathBuf),
}

/// What is to be done with the model.
#[derive(Clone, Debug, PartialEq)]
pub enum Job {
    Train {
        /// Sequences a step.
        batch: usize,
        /// Tokens a sequence.
        seq: usize,
        optimizer: Optimizer,
        n_steps: usize,
    },
    /// One forward pass to the logits.
    Infer { batch: usize, seq: usize },
}

impl Job {
    /// (sequences, tokens per sequence).
    pub fn sizes(&self) -> (usize, usize) {
        match self {
            Self::Train { batch, seq, .. } | Self::Infer { batch, seq } => (*batch, *seq),
        }
    }
}

/// How inference is used, and how fast it must be.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Serving {
    /// Tokens that are generated after the prompt: a step is then one token of every sequence.
    pub tokens: Option<usize>,
    /// How fast it must be.
    pub targets: Vec<LatencyTarget>,
}

/// What a target of latency is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Latency {
    /// The first token of a prompt.
    FirstToken,
    /// Every further token.
    NextToken,
}

/// A latency that must be kept.
#[derive(Clone, Debug, PartialEq)]
pub struct LatencyTarget {
    pub of: Latency,
    pub most_s: f64,
    /// Where it is said, and how.
    pub span: Span,
    pub text: String,
}

/// How parameters start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Init {
    /// As the graph says, without a random generator.
    #[default]
    Golden,
    Random {
        seed: u64,
    },
    /// From a file or folder of weights.
    Load(PathBuf),
}

/// What a plan is to be best at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Objective {
    /// The least seconds of a step.
    StepTime,
    /// The most tokens a second. Of a batch that is given, the same.
    Throughput,
}

/// What the search looks for, and when it may stop.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SolveLimits {
    /// Where the document says it.
    pub objective: Option<Objective>,
    pub time_s: f64,
    /// Distance from the bound, as a part of it.
    pub gap: f64,
}

impl Default for SolveLimits {
    fn default() -> Self {
        Self {
            objective: None,
            time_s: 60.0,
            gap: 0.01,
        }
    }
}

/// What `document` asks for; paths in it are relative to `base_dir`.
///
/// Files that are read on the way (a cluster of its own file) are added to `sources`, which must
/// hold the document's own text. Without a request, at least one diagnostic is an error.
pub fn resolve(
    document: &Document,
    base_dir: &Path,
    sources: &mut Sources,
) -> (Option<Request>, Vec<Diagnostic>) {
    let mut diagnostics = Vec::new();
    let request = request(document, base_dir, sources, &mut diagnostics);
    if let Some(request) = &request
        && planner(document, request).0 == Planner::Ops
    {
        diagnostics.extend(ops_findings(document, request));
    }
    diagnostics.sort_by_key(|finding| {
        let place = finding.primary.as_ref().map(|label| label.span);
        (
            place.is_none(),
            place.map(|span| (span.source, span.start, span.end)),
        )
    });
    let request = request.filter(|_| !has_errors(&diagnostics));
    (request, diagnostics)
}

fn request(
    document: &Document,
    base_dir: &Path,
    sources: &mut Sources,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<Request> {
    refuse_repeats(document, diagnostics);
    let header = header(document, diagnostics);
    let found = header.and_then(|(header, _)| {
        model::resolve_model(document, &header.model, base_dir, diagnostics)
    });
    let cluster = header.and_then(|(header, _)| {
        cluster::resolve_cluster(document, &header.cluster, base_dir, sources, diagnostics)
    });
    let step = found.as_ref().and_then(|(_, step)| *step);
    let (mut job, mut init, mut data) = (None, Init::default(), None);
    let mut serving = Serving::default();
    let mut open_batch = None;
    let mut storage = DType::F32;
    let mut solve = SolveLimits::default();
    let mut jobs: Vec<Span> = Vec::new();
    for statement in document.statements() {
        let span = statement.span;
        match &statement.node {
            Statement::Train(train) => {
                jobs.push(span);
                (job, open_batch) = job::resolve_train(train, span, step, diagnostics);
                storage = job::storage(train);
            }
            Statement::Infer(infer) => {
                jobs.push(span);
                (job, serving, open_batch) = job::resolve_infer(infer, span, step, diagnostics);
            }
            Statement::Init(statement) => {
                init = resolve_init(statement, span, base_dir, diagnostics);
            }
            Statement::Data(reference) => {
                data = resolve_data(reference, base_dir, diagnostics);
            }
            Statement::Solve(statement) => {
                solve = job::resolve_solve(statement, span, diagnostics);
            }
            _ => {}
        }
    }
    match jobs.as_slice() {
        [] => {
            let place = header.map(|(_, span)| span);
            let mut diagnostic = Diagnostic::invalid("nothing is to be done with the model")
                .code("W101")
                .help("add `train batch 8 seq 128`, or `infer batch 1 seq 128`");
            if let Some(span) = place {
                diagnostic = diagnostic.at(span, "this plan");
            }
            diagnostics.push(diagnostic);
        }
        [first, second] if first != second => {
            let is_mixed = document
                .statements()
                .any(|s| matches!(s.node, Statement::Train(_)))
                && document
                    .statements()
                    .any(|s| matches!(s.node, Statement::Infer(_)));
            if is_mixed {
                diagnostics.push(
                    Diagnostic::invalid("a plan is for training or for inference, not for both")
                        .code("W101")
                        .at(*second, "second job")
                        .also(*first, "first job")
                        .help("write one file for each"),
                );
            }
        }
        _ => {}
    }
    let (header, _) = header?;
    let (model, _) = found?;
    let (job, cluster) = (job?, cluster?);
    let (batch, _) = job.sizes();
    let planner = mapping::planner_of(document, &model, &cluster).0;
    let (pipeline, open_pipeline) = match planner {
        // Searched with everything else, not executed.
        Planner::Mapping => (None, None),
        Planner::Ops => match open_pipeline::open_pipeline(document, &cluster, batch) {
            Some(open) => (None, Some(open)),
            None => {
                let pipeline =
                    pipeline::resolve_pipeline(document, &cluster, batch, base_dir, diagnostics);
                (pipeline, None)
            }
        },
    };
    if let (Some(pipeline), Job::Infer { .. }) = (&pipeline, &job) {
        diagnostics.push(
            Diagnostic::unsupported("pipelines of inference are not executed yet")
                .code("W120")
                .at(pipeline.span, "")
                .help("remove the block, or train"),
        );
    }
    let block = document
        .statements()
        .find_map(|statement| match &statement.node {
            Statement::Experts(block) => Some(block),
            _ => None,
        });
    let experts = match (block, planner) {
        (Some(block), Planner::Ops) => experts::resolve_experts(block, &job, base_dir, diagnostics),
        _ => Experts::default(),
    };
    Some(Request {
        name: header.name.node.clone(),
        model,
        cluster,
        job,
        open_batch,
        storage,
        serving,
        init,
        data,
        solve,
        pipeline,
        open_pipeline,
        experts,
    })
}

/// Statements of which a document has at most one.
fn refuse_repeats(document: &Document, diagnostics: &mut Vec<Diagnostic>) {
    let mut seen: Vec<(String, Span)> = Vec::new();
    for statement in document.statements() {
        let subject = match &statement.node {
            Statement::Plan(_)
            | Statement::Data(_)
            | Statement::Init(_)
            | Statement::Train(_)
            | Statement::Infer(_)
            | Statement::Memory(_)
            | Statement::Experts(_)
            | Statement::Solve(_) => format!("`{}`", statement.node.keyword()),
            Statement::Model(definition) => format!("model `{}`", definition.name.node),
            Statement::Cluster(definition) => format!("cluster `{}`", definition.name.node),
            Statement::Mesh(mesh) => format!("mesh `{}`", mesh.name.node),
            Statement::Tactic(tactic) => format!("tactic `{}`", tactic.name.node),
            Statement::Schedule(schedule) => format!("schedule `{}`", schedule.name.node),
            Statement::Use(_)
            | Statement::Apply(_)
            | Statement::Pin(_)
            | Statement::Forbid(_)
            | Statement::Prefer(_)
            | Statement::Place(_)
            | Statement::Keep(_)
            | Statement::Pipeline(_) => continue,
        };
        match seen.iter().find(|(earlier, _)| *earlier == subject) {
            Some((_, first)) => diagnostics.push(
                Diagnostic::invalid(format!("{subject} is given twice"))
                    .code("W101")
                    .at(statement.span, "again here")
                    .also(*first, "first here")
                    .help("remove one of the two"),
            ),
            None => seen.push((subject, statement.span)),
        }
    }
}

fn header<'a>(
    document: &'a Document,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<(&'a Header, Span)> {
    let header = document
        .statements()
        .find_map(|statement| match &statement.node {
            Statement::Plan(header) => Some((header, statement.span)),
            _ => None,
        });
    if header.is_none() {
        diagnostics.push(
            Diagnostic::invalid("the file has no `plan` statement")
                .code("W101")
                .help("begin with `plan \"name\" model M cluster \"local:8\"`"),
        );
    }
    header
}

fn resolve_init(
    statement: &InitStatement,
    span: Span,
    base_dir: &Path,
    diagnostics: &mut Vec<Diagnostic>,
) -> Init {
    match statement {
        InitStatement::Golden => Init::Golden,
        InitStatement::Random { seed } => Init::Random {
            seed: seed.unwrap_or(0),
        },
        InitStatement::Load { path } => existing_file(
            "the weights",
            path,
            span,
            base_dir,
            "give a `.safetensors` file, or the folder that holds it",
            diagnostics,
        )
        .map_or(Init::Golden, Init::Load),
    }
}

fn resolve_data(
    reference: &Spanned<Reference>,
    base_dir: &Path,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<PathBuf> {
    match &reference.node {
        Reference::Name(name) if *name == "golden" => None,
        Reference::Name(name) => {
            diagnostics.push(
                Diagnostic::invalid(format!("there is no data set `{name}`"))
                    .code("W104")
                    .at(reference.span, "")
                    .help("give a text file in quotes, or `golden`"),
            );
            None
        }
        Reference::Text(text) => existing_file(
            "the data",
            text,
            reference.span,
            base_dir,
            "give the path of a text file, relative to this file",
            diagnostics,
        ),
    }
}

/// `base_dir/text`, when there is such a file or folder.
fn existing_file(
    what: &str,
    text: &str,
    span: Span,
    base_dir: &Path,
    way_out: &str,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<PathBuf> {
    let path = base_dir.join(text);
    if !text.is_empty() && path.exists() {
        return Some(path);
    }
    diagnostics.push(
        Diagnostic::invalid(format!("{what} `{text}` does not exist"))
            .code("W104")
            .at(span, "no such file or folder")
            .help(way_out),
    );
    None
}

/// What the search over ops has against a document, before its graph is known.
fn ops_findings(document: &Document, request: &Request) -> Vec<Diagnostic> {
    let mut diagnostics = Vec::new();
    // Only for its findings: the candidates belong to the directives.
    mesh::Meshes::resolve(document, &request.cluster, &mut diagnostics);
    refuse_mapping_statements(document, &mut diagnostics);
    diagnostics
}

/// The same for a document that was resolved for the search over mappings.
pub fn why_not_ops(document: &Document, request: &Request) -> Vec<Diagnostic> {
    let mut diagnostics = ops_findings(document, request);
    if request.pipeline.is_none()
        && let Some(block) = document
            .statements()
            .find(|statement| matches!(statement.node, Statement::Pipeline(_)))
    {
        diagnostics.push(
            Diagnostic::unsupported("this pipeline is for the search over mappings")
                .code("W120")
                .at(block.span, "")
                .help("plan with `--planner mapping`, or remove the block"),
        );
    }
    diagnostics
}

/// Statements that only the search over mappings understands.
fn refuse_mapping_statements(document: &Document, diagnostics: &mut Vec<Diagnostic>) {
    let mut refuse = |span: Span, what: &str, way_out: &str| {
        diagnostics.push(
            Diagnostic::unsupported(format!("{what} not implemented yet"))
                .code("W120")
                .at(span, "")
                .help(way_out),
        );
    };
    for statement in document.statements() {
        match &statement.node {
            Statement::Memory(block) => {
                for item in block.items() {
                    match &item.node {
                        MemoryItem::Recompute(recompute)
                            if recompute.policy.known() != Some(&RecomputePolicy::None) =>
                        {
                            refuse(item.span, "recomputation is", "write `none`, or remove it");
                        }
                        MemoryItem::Offload(offload)
                            if offload.to.known() != Some(&OffloadTo::None) =>
                        {
                            refuse(item.span, "offloading is", "write `none`, or remove it");
                        }
                        MemoryItem::Budget(_)
                        | MemoryItem::Headroom(_)
                        | MemoryItem::Recompute(_)
                        | MemoryItem::Offload(_) => {}
                    }
                }
            }
            Statement::Train(job) | Statement::Infer(job) => {
                if let Some(value) = job.get("batch").and_then(|setting| setting.values.first())
                    && value.known().is_none()
                {
                    refuse(
                        value.span,
                        "a batch that is left open is",
                        "give it a value",
                    );
                }
                let types = match &statement.node {
                    Statement::Train(_) => &["f32", "bf16"][..],
                    _ => &["f32"],
                };
                for (key, what) in [
                    ("dtype", ""),
                    ("tokens", "decoding is"),
                    ("ttft", "a target of latency is"),
                    ("tpot", "a target of latency is"),
                    ("latency", "a target of latency is"),
                ] {
                    let Some(setting) = job.get(key) else {
                        continue;
                    };
                    let word = setting.value().and_then(|value| value.as_str());
                    if key != "dtype" {
                        refuse(setting.span, what, "remove it");
                    } else if !word.is_some_and(|word| types.contains(&word)) {
                        let what = format!(
                            "a type of the computation other than `{}` is",
                            types.join("` and `")
                        );
                        refuse(setting.span, &what, "remove it");
                    }
                }
            }
            Statement::Plan(_)
            | Statement::Model(_)
            | Statement::Cluster(_)
            | Statement::Data(_)
            | Statement::Init(_)
            | Statement::Mesh(_)
            | Statement::Use(_)
            | Statement::Tactic(_)
            | Statement::Apply(_)
            | Statement::Pin(_)
            | Statement::Forbid(_)
            | Statement::Prefer(_)
            | Statement::Place(_)
            | Statement::Keep(_)
            | Statement::Pipeline(_)
            | Statement::Schedule(_)
            | Statement::Experts(_)
            | Statement::Solve(_) => {}
        }
    }
}
