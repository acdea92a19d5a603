//! The Rust way to write a `.weave` file.
//!
//! Enters: calls, one a statement, in the order of the file; small pieces (selectors, layouts,
//! axes) are given as text and read by the parser's own rules. Leaves: the same tree that the
//! parser makes of the same statements.
//! Invariant: [`PlanBuilder::build`] returns either a document that reparses to itself, or all
//! that was wrong.
//!
//! ```
//! use meshweave_dsl::weave::{PlanBuilder, auto, auto_of, axis, parse};
//! use meshweave_dsl::diagnostics::SourceId;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let plan = PlanBuilder::new("small")
//!     .model("config.json")
//!     .cluster("h100:8")
//!     .train(256, 4096)
//!     .optimizer("adamw")
//!     .mesh("main", [axis("dp").rest(), axis("tp").auto_of([1, 2, 4]).within_node()])
//!     .apply("megatron", ["main.tp"])
//!     .pin("layers[*].attn.wq", "[embed, heads/tp]")
//!     .pipeline("main.pp", |p| p.schedule(auto_of(["1f1b", "zb-h1"])).microbatches(auto()))
//!     .build()?;
//! let text = r#"
//! plan "small" model "config.json" cluster "h100:8"
//! train batch 256 seq 4096 optimizer adamw
//!
//! mesh main = dp:rest > tp:auto{1,2,4} within node
//!
//! apply megatron(main.tp)
//!
//! pin layers[*].attn.wq : [embed, heads/tp]
//!
//! pipeline main.pp {
//!   schedule auto{1f1b, zb-h1}
//!   microbatches auto
//! }
//! "#;
//! assert_eq!(plan, parse(text, SourceId(0)).document);
//! # Ok(())
//! # }
//! ```

mod block;
mod part;

pub use block::{
    DefinitionBuilder, ExpertsBuilder, MemoryBuilder, PipelineBuilder, SolveBuilder, TacticBuilder,
    maximize, minimize,
};
pub use part::{AxisBuilder, IntoValue, auto, auto_of, axis, name, solved};

use part::{Problems, setting};

use super::ast::{
    Block, Choice, Comment, Document, Header, Init, Job, Line, MemoryItem, MeshDef, Reference,
    ScheduleBody, ScheduleDef, Selector, Spanned, Statement, Trivia, UseMesh,
};
use super::parser::{Parse, Parser};
use super::{parse, print};
use crate::diagnostics::{Diagnostic, SourceId};
use crate::schedule::Channels;

/// Everything that was wrong with the calls of a builder.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum BuildError {
    /// Pieces that do not parse, or calls that do not fit.
    #[error("{}", list(.0))]
    Invalid(Vec<Diagnostic>),
    /// The built tree does not survive printing: a broken invariant.
    #[error("the built plan does not reparse to itself:\n{0}")]
    Internal(String),
}

fn list(diagnostics: &[Diagnostic]) -> String {
    let messages: Vec<&str> = diagnostics.iter().map(|d| d.message.as_str()).collect();
    messages.join("; ")
}

/// Builds a [`Document`]. Each method appends the statement of its name.
#[derive(Debug, Clone, Default)]
pub struct PlanBuilder {
    header: Option<(String, Option<Reference>, Option<Reference>)>,
    lines: Vec<Line<Statement>>,
    /// Comments for the next statement.
    comments: Vec<Comment>,
    problems: Problems,
}

impl PlanBuilder {
    /// A plan of that name; it needs a [`model`](Self::model) and a [`cluster`](Self::cluster).
    pub fn new(name: &str) -> Self {
        Self {
            header: Some((name.to_owned(), None, None)),
            ..Self::default()
        }
    }

    /// Statements without a `plan` header: a library of tactics, a cluster file.
    pub fn fragment() -> Self {
        Self::default()
    }

    /// The model: a path, or the [`name`] of a definition in this file.
    #[must_use]
    pub fn model(mut self, model: impl Into<Reference>) -> Self {
        match &mut self.header {
            Some(header) => header.1 = Some(model.into()),
            None => self
                .problems
                .add("a fragment has no header: use `define_model`"),
        }
        self
    }

    /// The cluster: a path or preset, or the [`name`] of a definition in this file.
    #[must_use]
    pub fn cluster(mut self, cluster: impl Into<Reference>) -> Self {
        match &mut self.header {
            Some(header) => header.2 = Some(cluster.into()),
            None => self
                .problems
                .add("a fragment has no header: use `define_cluster`"),
        }
        self
    }

    /// `model NAME = BASE { … }`
    #[must_use]
    pub fn define_model(
        mut self,
        name: &str,
        base: impl Into<Reference>,
        settings: impl FnOnce(DefinitionBuilder) -> DefinitionBuilder,
    ) -> Self {
        let builder = settings(DefinitionBuilder::new(Some(base.into())));
        match builder.finish(name, &mut self.problems) {
            Some(definition) => self.statement(Statement::Model(definition)),
            None => self,
        }
    }

    /// `cluster NAME { … }`
    #[must_use]
    pub fn define_cluster(
        mut self,
        name: &str,
        settings: impl FnOnce(DefinitionBuilder) -> DefinitionBuilder,
    ) -> Self {
        let builder = settings(DefinitionBuilder::new(None));
        match builder.finish(name, &mut self.problems) {
            Some(definition) => self.statement(Statement::Cluster(definition)),
            None => self,
        }
    }

    /// `data "path"`, or `data golden` given as a [`name`].
    #[must_use]
    pub fn data(self, data: impl Into<Reference>) -> Self {
        let data: Reference = data.into();
        self.statement(Statement::Data(data.into()))
    }

    /// `init …`
    #[must_use]
    pub fn init(self, init: Init) -> Self {
        self.statement(Statement::Init(init))
    }

    /// `train batch B seq S`; add to it with [`optimizer`](Self::optimizer) and
    /// [`with`](Self::with).
    #[must_use]
    pub fn train(self, batch: u64, seq: u64) -> Self {
        self.job(Statement::Train, batch, seq)
    }

    /// `infer batch B seq S`
    #[must_use]
    pub fn infer(self, batch: u64, seq: u64) -> Self {
        self.job(Statement::Infer, batch, seq)
    }

    fn job(mut self, statement: fn(Job) -> Statement, batch: u64, seq: u64) -> Self {
        let settings = [("batch", batch), ("seq", seq)];
        let settings = settings
            .into_iter()
            .filter_map(|(key, value)| setting(key, value, &mut self.problems))
            .map(Spanned::from)
            .collect();
        self.statement(statement(Job { settings }))
    }

    /// Adds `optimizer NAME` to the last `train`.
    #[must_use]
    pub fn optimizer(self, optimizer: &str) -> Self {
        match name(optimizer) {
            Ok(optimizer) => self.with("optimizer", optimizer),
            Err(diagnostic) => self.problem(*diagnostic),
        }
    }

    /// Adds a setting to the last `train` or `infer`.
    #[must_use]
    pub fn with(mut self, key: &str, values: impl IntoValue) -> Self {
        let setting = setting(key, values, &mut self.problems);
        let job = self
            .lines
            .iter_mut()
            .rev()
            .find_map(|line| match &mut line.item.node {
                Statement::Train(job) | Statement::Infer(job) => Some(job),
                _ => None,
            });
        match (job, setting) {
            (Some(job), Some(setting)) => job.settings.push(setting.into()),
            (None, _) => self
                .problems
                .add(format!("`{key}` is set before `train` or `infer`")),
            (_, None) => {}
        }
        self
    }

    /// `mesh NAME = AXES`, outermost first.
    #[must_use]
    pub fn mesh(self, name: &str, axes: impl IntoIterator<Item = AxisBuilder>) -> Self {
        self.any_mesh(name, axes.into_iter().collect(), None)
    }

    /// `mesh NAME = AXES refolds OTHER`
    #[must_use]
    pub fn refold(
        self,
        name: &str,
        axes: impl IntoIterator<Item = AxisBuilder>,
        other: &str,
    ) -> Self {
        self.any_mesh(name, axes.into_iter().collect(), Some(other))
    }

    fn any_mesh(mut self, name: &str, axes: Vec<AxisBuilder>, refolds: Option<&str>) -> Self {
        let name = self.read(name, |p| p.name());
        let refolds = refolds.map(|other| self.read(other, |p| p.name()));
        let axes: Vec<_> = axes
            .into_iter()
            .filter_map(|axis| axis.finish(&mut self.problems))
            .map(Spanned::from)
            .collect();
        if axes.is_empty() {
            self.problems.add("a mesh has at least one axis");
        }
        let (Some(name), Some(refolds)) = (name, transpose(refolds)) else {
            return self;
        };
        self.statement(Statement::Mesh(MeshDef {
            name: name.into(),
            axes,
            refolds: refolds.map(Spanned::from),
            on: None,
        }))
    }

    /// `use MESH on SELECTORS`
    #[must_use]
    pub fn use_mesh<'a>(mut self, mesh: &str, on: impl IntoIterator<Item = &'a str>) -> Self {
        let mesh = self.read(mesh, |p| p.name());
        let on = self.selectors(on);
        if on.is_empty() {
            self.problems.add("`use` needs a selector");
        }
        match mesh {
            Some(mesh) => self.statement(Statement::Use(UseMesh {
                mesh: mesh.into(),
                on,
                overrides: false,
            })),
            None => self,
        }
    }

    /// `tactic NAME(PARAMS) { … }`
    #[must_use]
    pub fn tactic<'a>(
        mut self,
        name: &str,
        params: impl IntoIterator<Item = &'a str>,
        body: impl FnOnce(TacticBuilder) -> TacticBuilder,
    ) -> Self {
        let builder = body(TacticBuilder::default());
        let params: Vec<&str> = params.into_iter().collect();
        match builder.finish(name, &params, &mut self.problems) {
            Some(tactic) => self.statement(Statement::Tactic(tactic)),
            None => self,
        }
    }

    /// `apply TACTIC(ARGS)`; an argument is written as in the language: `main.tp`, `1`,
    /// `auto{1,2}`.
    #[must_use]
    pub fn apply<'a>(self, tactic: &str, args: impl IntoIterator<Item = &'a str>) -> Self {
        self.apply_except(tactic, args, [])
    }

    /// `apply TACTIC(ARGS) except SELECTORS`
    #[must_use]
    pub fn apply_except<'a>(
        mut self,
        tactic: &str,
        args: impl IntoIterator<Item = &'a str>,
        except: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        match part::apply(tactic, args, except, &mut self.problems) {
            Some(apply) => self.statement(Statement::Apply(apply)),
            None => self,
        }
    }

    /// `pin SELECTOR : LAYOUT`
    #[must_use]
    pub fn pin<'a>(mut self, on: &str, layout: impl Into<Choice<&'a str>>) -> Self {
        match part::pin(on, layout.into(), &mut self.problems) {
            Some(pin) => self.statement(Statement::Pin(pin)),
            None => self,
        }
    }

    /// `forbid SELECTOR : LAYOUT`
    #[must_use]
    pub fn forbid(mut self, on: &str, layout: &str) -> Self {
        match part::forbid(on, layout, &mut self.problems) {
            Some(forbid) => self.statement(Statement::Forbid(forbid)),
            None => self,
        }
    }

    /// `prefer SELECTOR.KEY = BEST over NEXT …`, with a weight if it is not 1.
    #[must_use]
    pub fn prefer<'a>(
        mut self,
        on: &str,
        ranking: impl IntoIterator<Item = &'a str>,
        weight: Option<f64>,
    ) -> Self {
        match part::prefer(on, ranking, weight, &mut self.problems) {
            Some(prefer) => self.statement(Statement::Prefer(prefer)),
            None => self,
        }
    }

    /// `place SELECTOR : FACTORS`
    #[must_use]
    pub fn place(mut self, on: &str, factors: &str) -> Self {
        match part::place(on, factors, &mut self.problems) {
            Some(place) => self.statement(Statement::Place(place)),
            None => self,
        }
    }

    /// `keep SELECTOR : LAYOUT`
    #[must_use]
    pub fn keep(mut self, on: &str, layout: &str) -> Self {
        match part::keep(on, layout, &mut self.problems) {
            Some(keep) => self.statement(Statement::Keep(keep)),
            None => self,
        }
    }

    /// Marks the last statement (or the last line of its block) with `override`.
    #[must_use]
    pub fn overriding(mut self) -> Self {
        let last = self.lines.last_mut().map(|line| &mut line.item.node);
        let marker = match last {
            Some(Statement::Use(item)) => Some(&mut item.overrides),
            Some(Statement::Pin(item)) => Some(&mut item.overrides),
            Some(Statement::Forbid(item)) => Some(&mut item.overrides),
            Some(Statement::Prefer(item)) => Some(&mut item.overrides),
            Some(Statement::Memory(block)) => match block.lines.last_mut() {
                Some(line) => match &mut line.item.node {
                    MemoryItem::Recompute(item) => Some(&mut item.overrides),
                    MemoryItem::Offload(item) => Some(&mut item.overrides),
                    MemoryItem::Budget(_) | MemoryItem::Headroom(_) => None,
                },
                None => None,
            },
            _ => None,
        };
        match marker {
            Some(overrides) => *overrides = true,
            None => self.problems.add(
                "`override` follows `use`, `pin`, `forbid`, `prefer`, `recompute` or `offload`",
            ),
        }
        self
    }

    /// `schedule NAME = key KEYS`, such as `F:(mb,0) B:(mb+P-r,-1)`.
    #[must_use]
    pub fn schedule_key(self, name: &str, keys: &str) -> Self {
        self.schedule_text(name, &format!("key {keys}"))
    }

    /// `schedule NAME = rows { … }`, each row such as `0F0 0F1 . 0B0`.
    #[must_use]
    pub fn schedule_rows<'a>(self, name: &str, rows: impl IntoIterator<Item = &'a str>) -> Self {
        let rows: Vec<String> = rows.into_iter().map(|row| format!("row {row}\n")).collect();
        self.schedule_text(name, &format!("rows {{\n{}}}", rows.concat()))
    }

    /// `schedule NAME = rows channels CHANNELS { … }`, each row such as `0F0 0SEND_F0 0RECV_B0 0B0`.
    #[must_use]
    pub fn schedule_rows_over<'a>(
        self,
        name: &str,
        channels: Channels,
        rows: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let rows: Vec<String> = rows.into_iter().map(|row| format!("row {row}\n")).collect();
        let body = format!("rows channels {channels} {{\n{}}}", rows.concat());
        self.schedule_text(name, &body)
    }

    /// `schedule NAME = streams channels CHANNELS { … }`, each line such as `rank 0 compute 0:0F0 3:0B0[2]`.
    #[must_use]
    pub fn schedule_streams<'a>(
        self,
        name: &str,
        channels: Channels,
        lines: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let lines: Vec<&str> = lines.into_iter().collect();
        let body = format!("streams channels {channels} {{\n{}\n}}", lines.join("\n"));
        self.schedule_text(name, &body)
    }

    /// `schedule NAME = csv "FILE"`
    #[must_use]
    pub fn schedule_csv(mut self, name: &str, file: &str) -> Self {
        match self.read(name, |p| p.name()) {
            Some(name) => self.statement(Statement::Schedule(ScheduleDef {
                name: name.into(),
                body: ScheduleBody::Csv(file.to_owned().into()),
            })),
            None => self,
        }
    }

    fn schedule_text(mut self, name: &str, body: &str) -> Self {
        let text = format!("{name} = {body}");
        match self.read(&text, |p| p.schedule()) {
            Some(schedule) => self.statement(Statement::Schedule(schedule)),
            None => self,
        }
    }

    /// `pipeline AXIS { … }`
    #[must_use]
    pub fn pipeline(
        mut self,
        over: &str,
        body: impl FnOnce(PipelineBuilder) -> PipelineBuilder,
    ) -> Self {
        match body(PipelineBuilder::default()).finish(over, &mut self.problems) {
            Some(pipeline) => self.statement(Statement::Pipeline(pipeline)),
            None => self,
        }
    }

    /// `memory { … }`
    #[must_use]
    pub fn memory(mut self, body: impl FnOnce(MemoryBuilder) -> MemoryBuilder) -> Self {
        let block = body(MemoryBuilder::default()).finish(&mut self.problems);
        self.statement(Statement::Memory(block))
    }

    /// `experts { … }`
    #[must_use]
    pub fn experts(mut self, body: impl FnOnce(ExpertsBuilder) -> ExpertsBuilder) -> Self {
        let block = body(ExpertsBuilder::default()).finish(&mut self.problems);
        self.statement(Statement::Experts(block))
    }

    /// `solve …`, from [`minimize`] or [`maximize`].
    #[must_use]
    pub fn solve(mut self, solve: SolveBuilder) -> Self {
        match solve.finish(&mut self.problems) {
            Some(solve) => self.statement(Statement::Solve(solve)),
            None => self,
        }
    }

    /// A comment line above the next statement.
    #[must_use]
    pub fn comment(mut self, text: &str) -> Self {
        self.comments.extend(text.lines().map(Comment::new));
        self
    }

    /// Any statement, built by hand.
    #[must_use]
    pub fn statement(mut self, statement: Statement) -> Self {
        let comments = std::mem::take(&mut self.comments);
        let mut line = Line::of(statement);
        line.lead = comments.into_iter().map(Trivia::Comment).collect();
        self.lines.push(line);
        self
    }

    /// The document, with a blank line between groups of statements.
    ///
    /// # Errors
    /// [`BuildError::Invalid`] with all that is wrong with the calls, [`BuildError::Internal`]
    /// when the tree does not survive printing.
    pub fn build(mut self) -> Result<Document, BuildError> {
        let mut lines = std::mem::take(&mut self.lines);
        if let Some((name, model, cluster)) = self.header.take() {
            match (model, cluster) {
                (Some(model), Some(cluster)) => {
                    let header = Header {
                        name: name.into(),
                        model: model.into(),
                        cluster: cluster.into(),
                    };
                    lines.insert(0, Line::of(Statement::Plan(header)));
                }
                (None, _) => self.problems.add(format!("plan \"{name}\" has no model")),
                (_, None) => self.problems.add(format!("plan \"{name}\" has no cluster")),
            }
        }
        let tail: Vec<Trivia> = self.comments.into_iter().map(Trivia::Comment).collect();
        let document = Document {
            body: Block {
                note: None,
                lines,
                tail,
            },
        }
        .spaced();
        if !self.problems.0.is_empty() {
            return Err(BuildError::Invalid(self.problems.0));
        }
        let text = print(&document);
        let parsed = parse(&text, SourceId::default());
        if !parsed.diagnostics.is_empty() {
            return Err(BuildError::Invalid(parsed.diagnostics));
        }
        if parsed.document != document {
            return Err(BuildError::Internal(text));
        }
        Ok(document)
    }

    fn problem(mut self, diagnostic: Diagnostic) -> Self {
        self.problems.0.push(diagnostic);
        self
    }

    fn read<T>(
        &mut self,
        text: &str,
        rule: impl for<'a> FnOnce(&mut Parser<'a>) -> Parse<T>,
    ) -> Option<T> {
        self.problems.read(text, rule)
    }

    fn selectors<'a>(
        &mut self,
        texts: impl IntoIterator<Item = &'a str>,
    ) -> Vec<Spanned<Selector>> {
        part::selectors(texts, &mut self.problems)
    }
}

fn transpose<T>(value: Option<Option<T>>) -> Option<Option<T>> {
    match value {
        None => Some(None),
        Some(None) => None,
        Some(Some(value)) => Some(Some(value)),
    }
}
