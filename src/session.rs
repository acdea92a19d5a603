//! One document and what follows from it, stage by stage.
//!
//! Enters: the path of a document. Leaves: the request, the training graph, the plan, the program.
//! Invariant: a stage starts only when the one before it had no errors; every error carries the
//! sources that its places point into.

use std::path::{Path, PathBuf};

use meshweave_compiler::differentiate::{Optimizer, differentiate, differentiate_traced};
use meshweave_compiler::import::{ImportError, Imported, read_config};
use meshweave_compiler::model::{DecoderConfig, ModelError, build_decoder};
use meshweave_compiler::partition::Keep;
use meshweave_compiler::pipeline::{
    Empty, PipelineError, assign, cut_before, cut_evenly, lower_pipeline, scale_loss,
    slice_sequences,
};
use meshweave_compiler::placement::replicas::Replicas;
use meshweave_compiler::plan::directives::Directives;
use meshweave_compiler::plan::{SearchError, SearchOptions, Solution, search};
use meshweave_compiler::replicate::{ReplicateError, replicate};
use meshweave_compiler::resolve::{
    self, Job, MappingRequest, ModelSource, Pipeline, Planner, Request,
};
use meshweave_compiler::simplify::{self, simplify};
use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::diagnostics::{Class, Diagnostic, Severity, Sources, Span};
use meshweave_dsl::graph::Graph;
use meshweave_dsl::graph::verify::verify_global;
use meshweave_dsl::name::Axis;
use meshweave_dsl::op::OpKind;
use meshweave_dsl::pipeline::{OpPart, PipelinePlan};
use meshweave_dsl::plan::Plan;
use meshweave_dsl::program::Program;
use meshweave_dsl::units::Bytes;
use meshweave_dsl::weave::ast::{Arg, Name, Statement};
use meshweave_dsl::weave::{self, Document};
use meshweave_dsl::weights::WeightMap;

use crate::choose::{Choice, chosen};
use crate::compile::{
    CompileOptions, Compiled, compile, compile_pipeline, outline, pipeline_error, platform,
};
use crate::error::{Error, Result};
use crate::exchanges::{self, ExchangeChoice};

/// A document that was read and resolved.
#[derive(Clone, Debug)]
pub struct Session {
    pub document: Document,
    pub sources: Sources,
    pub request: Request,
    /// Findings that are no errors.
    pub warnings: Vec<Diagnostic>,
    /// Why this pipeline, where the document left it open; `document` has the witnesses.
    pub choice: Option<Choice>,
    /// Why so many exchanges a layer, where the document left it open.
    pub exchanges: Option<ExchangeChoice>,
    /// The replicas of the experts, where a placement has some.
    pub replicas: Option<Replicas>,
}

/// The graph of a request.
#[derive(Clone, Debug)]
pub struct Model {
    /// Forward, and for training backward and the optimizer: simplified, or of one microbatch where
    /// the document has a pipeline.
    pub graph: Graph,
    pub stages: Option<Stages>,
    /// Where experts have replicas, the graph without them: what a step must equal.
    pub plain: Option<Graph>,
    /// Where weights come from, for imported models.
    pub weights: Option<WeightMap>,
    /// The folder of an imported model: its weights lie beside its config.
    pub folder: Option<PathBuf>,
}

/// How a microbatch's graph is divided into pieces.
#[derive(Clone, Debug)]
pub struct Stages {
    /// The training graph of the whole batch: what the step must equal.
    pub whole: Graph,
    /// One per op of the microbatch's graph.
    pub parts: Vec<OpPart>,
}

impl Model {
    /// The training graph of the whole batch, without replicas of experts.
    pub fn whole(&self) -> &Graph {
        let stages = self.stages.as_ref().map(|stages| &stages.whole);
        self.plain.as_ref().or(stages).unwrap_or(&self.graph)
    }
}

impl Session {
    /// Reads and resolves the document at `path`; `cluster` (a preset or a `.weave` file, relative to
    /// the working directory) replaces the one it names.
    ///
    /// # Errors
    /// The file cannot be read, or the document has errors.
    pub fn open(path: &Path, cluster: Option<&str>) -> Result<Self> {
        let text = read_text(path)?;
        let base = path.parent().map_or_else(PathBuf::new, Path::to_path_buf);
        Self::from_text(&path.display().to_string(), &text, &base, cluster)
    }

    /// Resolves a document from its text; paths in it are relative to `base`.
    ///
    /// # Errors
    /// The document has errors.
    pub fn from_text(name: &str, text: &str, base: &Path, cluster: Option<&str>) -> Result<Self> {
        let mut sources = Sources::new();
        let id = sources.add(name, text);
        let parsed = weave::parse(text, id);
        let mut findings = parsed.diagnostics;
        if has_errors(&findings) {
            return Err(Error::new(findings, sources));
        }
        let (request, more) = resolve::resolve(&parsed.document, base, &mut sources);
        findings.extend(more);
        let Some(mut request) = request.filter(|_| !has_errors(&findings)) else {
            return Err(Error::new(findings, sources));
        };
        if let Some(cluster) = cluster {
            request.cluster = named_cluster(cluster)?;
        }
        let session = Self {
            document: parsed.document,
            sources,
            request,
            warnings: findings,
            choice: None,
            exchanges: None,
            replicas: None,
        };
        match &session.request.open_pipeline {
            Some(open) => chosen(&session, open, base),
            None if session.request.experts.open_exchanges.is_some() => {
                exchanges::chosen(&session, base)
            }
            None => Ok(session),
        }
    }

    /// The same request with other witnesses.
    ///
    /// # Errors
    /// The document has errors.
    pub(crate) fn with_document(&self, document: Document, base: &Path) -> Result<Self> {
        let mut sources = self.sources.clone();
        let (request, findings) = resolve::resolve(&document, base, &mut sources);
        let Some(request) = request else {
            return Err(Error::new(findings, sources));
        };
        let request = Request {
            cluster: self.request.cluster.clone(),
            ..request
        };
        Ok(Self {
            document,
            sources,
            request,
            warnings: findings,
            choice: None,
            exchanges: None,
            replicas: None,
        })
    }

    /// The same request on another cluster.
    #[must_use]
    pub fn on(&self, cluster: Cluster) -> Self {
        let mut session = self.clone();
        session.request.cluster = cluster;
        session
    }

    /// Builds, differentiates and simplifies the graph.
    ///
    /// # Errors
    /// The model cannot be imported or built for the batch and sequence of the request.
    pub fn model(&self) -> Result<Model> {
        let (batch, _) = self.request.job.sizes();
        let (plain, weights, folder) = self.forward(batch)?;
        let forward = self.replicated(&plain)?;
        let plain = match (&self.replicas, &self.request.job) {
            (None, _) => None,
            (Some(_), Job::Infer { .. }) => Some(plain),
            (Some(_), Job::Train { optimizer, .. }) => Some(
                differentiate(&plain, optimizer)
                    .map_err(|error| Error::plain(Class::Unsupported, error))?,
            ),
        };
        if let (Some(pipeline), Job::Train { optimizer, .. }) =
            (&self.request.pipeline, &self.request.job)
        {
            let (graph, stages) = self.divided(pipeline, optimizer, &forward)?;
            return Ok(Model {
                graph,
                stages: Some(stages),
                plain,
                weights,
                folder,
            });
        }
        let graph = match &self.request.job {
            Job::Train { optimizer, .. } => differentiate(&forward, optimizer)
                .map_err(|error| Error::plain(Class::Unsupported, error))?,
            Job::Infer { .. } => forward,
        };
        let graph = simplify(&graph, &simplify::Options::default())
            .map_err(|error| Error::plain(Class::Internal, error))?;
        verify_global(&graph).map_err(|error| Error::plain(Class::Internal, error))?;
        Ok(Model {
            graph,
            stages: None,
            plain,
            weights,
            folder,
        })
    }

    /// The training graph of one microbatch, and its stages.
    fn divided(
        &self,
        pipeline: &Pipeline,
        optimizer: &Optimizer,
        whole: &Graph,
    ) -> Result<(Graph, Stages)> {
        let (batch, _) = self.request.job.sizes();
        let schedule = &pipeline.schedule;
        if schedule.n_microbatches > 1 && matches!(self.request.model, ModelSource::Graph(_)) {
            let message =
                "the graph of a file has a fixed batch and cannot be divided into microbatches";
            return Err(Error::new(
                vec![
                    Diagnostic::error(Class::Unsupported, message)
                        .at(pipeline.span, "")
                        .help("write `microbatches 1`, or define the model in the document"),
                ],
                self.sources.clone(),
            ));
        }
        if schedule.n_microbatches > 1 && !whole.gradients.is_empty() {
            let message = "the bias of a router goes by the loads of the whole batch, which microbatches do not see together yet";
            return Err(Error::new(
                vec![
                    Diagnostic::error(Class::Unsupported, message)
                        .at(pipeline.span, "")
                        .help("write `microbatches 1`, or leave `bias_rate` out"),
                ],
                self.sources.clone(),
            ));
        }
        let located = |error: PipelineError| {
            let mut error = pipeline_error(error);
            error.sources = self.sources.clone();
            let findings = std::mem::take(&mut error.diagnostics).into_iter();
            error.diagnostics = findings
                .map(|finding| finding.at(pipeline.span, ""))
                .collect();
            error
        };
        let unsupported = |error| Error::plain(Class::Unsupported, error);
        let (forward, ..) = self.forward(batch / schedule.n_microbatches)?;
        let forward = self.replicated(&forward)?;
        let forward = scale_loss(&forward, schedule.n_microbatches).map_err(located)?;
        let stages = if pipeline.cuts.is_empty() {
            cut_evenly(&forward, schedule.n_stages, &self.request.stage_cluster())
        } else {
            cut_before(&forward, &pipeline.cuts, Empty::when(pipeline.allow_empty))
        };
        let stages = stages.map_err(located)?;
        let sliced = slice_sequences(&forward, schedule.n_slices).map_err(located)?;
        let stages = sliced.stages(&stages);
        let (graph, origins) =
            differentiate_traced(&sliced.graph, optimizer).map_err(unsupported)?;
        verify_global(&graph).map_err(|error| Error::plain(Class::Internal, error))?;
        let stages = Stages {
            whole: differentiate(whole, optimizer).map_err(unsupported)?,
            parts: assign(&graph, &origins, &stages, &sliced.slice_of).map_err(located)?,
        };
        Ok((graph, stages))
    }

    /// How the document's pipeline runs a plan of its stages; `None` without one.
    pub fn pipeline(&self, model: &Model, plan: &Plan) -> Option<PipelinePlan> {
        let (pipeline, stages) = self.request.pipeline.as_ref().zip(model.stages.as_ref())?;
        Some(PipelinePlan {
            mesh: pipeline.mesh(&plan.mesh),
            axis: pipeline.axis.clone(),
            batch: "batch".into(),
            parts: stages.parts.clone(),
            schedule: pipeline.schedule.clone(),
            lowered: pipeline.lowered.clone(),
        })
    }

    /// Compiles a plan of the model's graph, as a pipeline where the document has one.
    ///
    /// # Errors
    /// Those of [`compile`] and [`compile_pipeline`].
    pub fn compile(
        &self,
        model: &Model,
        plan: &Plan,
        options: &CompileOptions,
    ) -> Result<Compiled> {
        let cluster = &self.request.cluster;
        let mut compiled = match self.pipeline(model, plan) {
            Some(pipeline) => compile_pipeline(&model.graph, plan, &pipeline, cluster, options)?,
            None => compile(&model.graph, plan, cluster, options)?,
        };
        let axes = compiled.program.mesh.axes().iter();
        let said = axes.map(|(axis, _)| (axis.clone(), self.statements_of(axis)));
        compiled.program.statements = said.filter(|(_, said)| !said.is_empty()).collect();
        Ok(compiled)
    }

    /// The document's statements about an axis, with their places: meshes, tactics, pipelines.
    fn statements_of(&self, axis: &Axis) -> Vec<String> {
        // Of two meshes over the same ranks, an axis of their common refinement is a part of each.
        let is_part = |name: &Name| axis.as_str().split('_').any(|part| part == name.as_str());
        let concerns = |statement: &Statement| match statement {
            Statement::Mesh(mesh) => mesh.axes.iter().any(|own| is_part(&own.node.name)),
            Statement::Pipeline(block) => is_part(&block.over.node.axis),
            Statement::Apply(apply) => apply.args.iter().any(|arg| match arg.node.known() {
                Some(Arg::Axis(over)) => is_part(&over.axis),
                _ => false,
            }),
            _ => false,
        };
        let statements = self.document.statements();
        let found = statements.filter(|statement| concerns(&statement.node));
        found
            .filter_map(|statement| self.named(statement.span))
            .collect()
    }

    /// The first line of a statement, with its place.
    fn named(&self, span: Span) -> Option<String> {
        let source = self.sources.get(span.source)?;
        let text = self.sources.snippet(span).lines().next()?;
        let text = text.trim_end_matches(['{', ' ']);
        let file = Path::new(&source.name).file_name()?.to_string_lossy();
        let (line, _) = source.position(span.start);
        (!text.is_empty()).then(|| format!("`{text}` ({file}:{line})"))
    }

    /// The program of a plan without code, and its local graphs where there is one a rank.
    ///
    /// # Errors
    /// Those of [`Session::compile`], code generation aside.
    pub fn outline(&self, model: &Model, plan: &Plan) -> Result<(Program, Vec<Graph>)> {
        let cluster = &self.request.cluster;
        match self.pipeline(model, plan) {
            Some(pipeline) => {
                let keep = Keep::Outputs;
                let lowered =
                    lower_pipeline(&model.graph, plan, &pipeline, keep, cluster, platform(plan));
                Ok((lowered.map_err(pipeline_error)?.program, Vec::new()))
            }
            None => outline(&model.graph, plan, cluster),
        }
    }

    /// A forward graph with the replicas of its experts, where there are any.
    fn replicated(&self, forward: &Graph) -> Result<Graph> {
        let Some(replicas) = &self.replicas else {
            return Ok(forward.clone());
        };
        replicate(forward, replicas).map_err(|error| {
            let class = match error {
                ReplicateError::Invalid(_) => Class::Invalid,
                ReplicateError::Unsupported(_) => Class::Unsupported,
                ReplicateError::Internal(_) => Class::Internal,
            };
            Error::plain(class, error)
        })
    }

    /// The forward graph for so many sequences, with the source of its weights.
    pub(crate) fn forward(
        &self,
        batch: usize,
    ) -> Result<(Graph, Option<WeightMap>, Option<PathBuf>)> {
        let (_, seq) = self.request.job.sizes();
        let goal = self.request.goal();
        match &self.request.model {
            ModelSource::Decoder(config) => {
                let config = self.dropping(config)?;
                let graph = build_decoder(&config, batch, seq, goal).map_err(model_error)?;
                Ok((graph, None, None))
            }
            ModelSource::Config(path) => {
                let imported = read_decoder(path)?;
                let config = self.dropping(&imported.config)?;
                let graph = build_decoder(&config, batch, seq, goal).map_err(model_error)?;
                Ok((
                    graph,
                    Some(imported.weights),
                    config_path(path).parent().map(Path::to_path_buf),
                ))
            }
            ModelSource::Graph(path) => {
                let text = read_text(path)?;
                let mut sources = Sources::new();
                let id = sources.add(path.display().to_string(), text.as_str());
                let parsed = meshweave_dsl::graph::text::parse(&text, id);
                if has_errors(&parsed.diagnostics) {
                    return Err(Error::new(parsed.diagnostics, sources));
                }
                verify_global(&parsed.graph)
                    .map_err(|error| Error::plain(Class::Invalid, error))?;
                Ok((parsed.graph, None, None))
            }
        }
    }

    /// The model, dropping the tokens that the document says.
    fn dropping(&self, config: &DecoderConfig) -> Result<DecoderConfig> {
        let mut config = config.clone();
        match (self.request.experts.capacity, &mut config.moe) {
            (Some(capacity), Some(moe)) => moe.capacity_factor = capacity,
            (Some(_), None) => {
                let message = format!(
                    "model `{}` has no experts whose tokens the `experts` block could dispatch: remove `dispatch`",
                    config.name
                );
                return Err(Error::plain(Class::Invalid, message));
            }
            (None, _) => {}
        }
        Ok(config)
    }

    /// What the document demands of a plan of this graph.
    ///
    /// # Errors
    /// Directives that name nothing or contradict each other.
    pub fn directives(&self, model: &Model) -> Result<Directives> {
        if resolve::planner(&self.document, &self.request).0 == Planner::Mapping {
            let findings = resolve::why_not_ops(&self.document, &self.request);
            if has_errors(&findings) {
                return Err(Error::new(findings, self.sources.clone()));
            }
        }
        let (mut directives, findings) =
            resolve::direct(&self.document, &self.request, &model.graph);
        if let (Some(pipeline), Some(directives)) = (&self.request.pipeline, &mut directives) {
            // The graph is that of all stages, each of which a device holds one of.
            let budget_bytes = directives.budget_bytes.as_mut();
            if let Some(budget_bytes) = budget_bytes {
                *budget_bytes *= pipeline.schedule.n_ranks as u64;
            }
        }
        directives
            .filter(|_| !has_errors(&findings))
            .ok_or_else(|| Error::new(findings, self.sources.clone()))
    }

    /// How the document wants the search to be done.
    pub fn search_options(&self) -> SearchOptions {
        SearchOptions {
            name: self.request.name.clone(),
            gap: self.request.solve.gap,
            branch_s: self.request.solve.time_s,
            ..SearchOptions::default()
        }
    }

    /// Finds the best plan under the document's directives.
    ///
    /// # Errors
    /// Directives that name nothing, contradict each other, or that no plan meets.
    pub fn plan(&self, model: &Model) -> Result<Solution> {
        let cluster = &self.request.cluster;
        if cluster.is_mixed() {
            let message = format!("the search over ops knows devices of one type, not {cluster}");
            return Err(Error::plain(Class::Unsupported, message)
                .help("plan with `--planner mapping`, or for one of the groups"));
        }
        let directives = self.directives(model)?;
        search(
            &model.graph,
            &self.request.stage_cluster(),
            &directives,
            &self.search_options(),
        )
        .map_err(|error| self.search_error(error, &directives))
        .map_err(|error| match (&self.replicas, error.class()) {
            (Some(replicas), Class::Infeasible) => error.help(format!(
                "experts have {} slots a device instead of {}, whose weights take {} there besides those at home: place with fewer slots",
                replicas.slots,
                replicas.experts / replicas.devices.max(1),
                Bytes(replicas_bytes(&model.graph, replicas))
            )),
            _ => error,
        })
    }

    /// The document with every decision taken; replaying it gives the same plan.
    pub fn plan_text(&self, model: &Model, solution: &Solution) -> String {
        weave::print(&resolve::print_plan(&self.document, &model.graph, solution))
    }

    /// The planner that the document is for, or the one that is asked for.
    ///
    /// # Errors
    /// Statements that the planner asked for does not know.
    pub fn planner(&self, asked: Option<Planner>) -> Result<Planner> {
        let (own, _) = resolve::planner(&self.document, &self.request);
        match asked {
            Some(Planner::Ops) if own == Planner::Mapping => {
                let findings = resolve::why_not_ops(&self.document, &self.request);
                if has_errors(&findings) {
                    return Err(Error::new(findings, self.sources.clone()));
                }
                Ok(Planner::Ops)
            }
            Some(asked) => Ok(asked),
            None => Ok(own),
        }
    }

    /// The decoder's config.
    ///
    /// # Errors
    /// The model is a graph, or cannot be imported.
    pub fn decoder(&self) -> Result<DecoderConfig> {
        match &self.request.model {
            ModelSource::Decoder(config) => Ok(config.clone()),
            ModelSource::Config(path) => Ok(read_decoder(path)?.config),
            ModelSource::Graph(path) => Err(Error::plain(
                Class::Unsupported,
                format!(
                    "{} is a graph, and mappings are of decoders",
                    path.display()
                ),
            )
            .help("plan it with `--planner ops`")),
        }
    }

    /// What the search over mappings is asked for, by this document or its witnesses.
    ///
    /// # Errors
    /// Statements that have no meaning for mappings.
    pub fn mapping_request(&self, document: &Document) -> Result<MappingRequest> {
        let config = self.decoder()?;
        let (request, findings) = resolve::mapping_request(document, &self.request, &config);
        request
            .filter(|_| !has_errors(&findings))
            .ok_or_else(|| Error::new(findings, self.sources.clone()))
    }

    fn search_error(&self, error: SearchError, directives: &Directives) -> Error {
        let class = match &error {
            SearchError::Invalid(_) => Class::Invalid,
            SearchError::Conflict { .. } | SearchError::Infeasible(_) => Class::Infeasible,
            SearchError::Exhausted(_) => Class::Exhausted,
            SearchError::Unsupported(_) => Class::Unsupported,
            SearchError::Internal(_) => Class::Internal,
        };
        let mut diagnostic = Diagnostic::error(class, error.to_string());
        if let SearchError::Conflict { rules, .. } = &error {
            let mut spans = rules
                .iter()
                .filter_map(|rule| directives.rules.get(*rule))
                .map(|rule| rule.span);
            if let Some(span) = spans.next() {
                diagnostic = diagnostic.at(span, "demanded here");
            }
            for span in spans {
                diagnostic = diagnostic.also(span, "and here");
            }
        }
        Error::new(vec![diagnostic], self.sources.clone())
    }
}

/// The `config.json` of a model's path.
fn config_path(path: &Path) -> PathBuf {
    if path.is_dir() {
        path.join("config.json")
    } else {
        path.to_path_buf()
    }
}

fn read_decoder(path: &Path) -> Result<Imported> {
    let path = config_path(path);
    let text = read_text(&path)?;
    read_config(&path.display().to_string(), &text).map_err(import_error)
}

fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|error| {
        Error::plain(
            Class::Invalid,
            format!("cannot read {}: {error}", path.display()),
        )
    })
}

fn model_error(error: ModelError) -> Error {
    let class = match &error {
        ModelError::Invalid(_) => Class::Invalid,
        ModelError::Unsupported(_) => Class::Unsupported,
        ModelError::Internal(_) => Class::Internal,
    };
    Error::plain(class, error)
}

pub(crate) fn import_error(error: ImportError) -> Error {
    let class = match &error {
        ImportError::Invalid(_) => Class::Invalid,
        ImportError::Unsupported(_) => Class::Unsupported,
        ImportError::Internal(_) => Class::Internal,
    };
    Error::plain(class, error)
}

fn has_errors(diagnostics: &[Diagnostic]) -> bool {
    diagnostics
        .iter()
        .any(|diagnostic| diagnostic.severity == Severity::Error)
}

/// A preset such as `h100:16`, or the cluster block of a `.weave` file.
pub(crate) fn named_cluster(name: &str) -> Result<Cluster> {
    if !name.ends_with(".weave") {
        return Cluster::preset(name).map_err(|error| Error::plain(Class::Invalid, error));
    }
    let text = read_text(Path::new(name))?;
    let mut sources = Sources::new();
    let (cluster, findings) = resolve::cluster_of_text(name, &text, &mut sources);
    cluster.ok_or_else(|| Error::new(findings, sources))
}

/// Bytes of the weights in all slots of a device.
fn replicas_bytes(graph: &Graph, replicas: &Replicas) -> u64 {
    let placed = graph.ops.iter().filter(|op| {
        // The gradients' way home has the capacity of homes.
        matches!(&op.kind, OpKind::MoeMove(moved)
            if moved.weights && moved.dims.capacity == replicas.slots)
    });
    let bytes = placed
        .flat_map(|op| &op.results)
        .map(|id| graph.ty(*id).n_bytes());
    (bytes.sum::<usize>() / replicas.devices.max(1)) as u64
}
