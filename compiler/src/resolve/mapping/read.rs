//! What single statements say about mappings.
//!
//! Enters: statements. Leaves: [`Restriction`]s of the space, one for every decision, with its place.
//! Invariant: what has no meaning for mappings is refused where it stands.

use std::collections::BTreeSet;

use meshweave_dsl::diagnostics::{Diagnostic, Span, did_you_mean};
use meshweave_dsl::mapping::{Context, GridAxis};
use meshweave_dsl::units::Number;
use meshweave_dsl::weave::ast::{
    Apply, Arg, Choice, Degree, Dispatch, Document, Exchanges, ExpertsItem, Forbid, Job, MeshDef,
    Pipeline, PipelineItem, Prefer, Segment, Selector, Spanned, Split, Statement, UseMesh,
};

use super::axes::{axes_of, grid_axis, meshes};
use super::formats;
use super::restrict::{Restriction, Rule};
use crate::plan::estimate::{Workload, names_of_families};
use crate::plan::outer::{Allowed, Cuts, Preference, ShardGroup};
use crate::resolve::Request;
use crate::resolve::tactics::Origin;
use crate::schedule::Builtin;

/// Reads one statement.
pub(super) struct Reader<'a> {
    pub request: &'a Request,
    pub workload: &'a Workload,
    pub document: &'a Document,
    pub origin: Origin,
    pub found: &'a mut Vec<Restriction>,
    pub diagnostics: &'a mut Vec<Diagnostic>,
}

impl Reader<'_> {
    pub fn read(&mut self, statement: &Spanned<Statement>) {
        let span = statement.span;
        match &statement.node {
            Statement::Train(job) | Statement::Infer(job) => self.job(job),
            Statement::Mesh(mesh) => self.mesh(mesh),
            Statement::Use(item) => self.use_mesh(item, span),
            Statement::Apply(apply) => self.apply(apply),
            Statement::Prefer(prefer) => match preferred(prefer) {
                Some(preference) => self.add(span, Rule::Prefer(preference)),
                None => self.refuse(span, "this preference has no meaning for mappings"),
            },
            Statement::Forbid(forbid) => match forbidden(forbid) {
                Some(rule) => self.add(span, rule),
                None => self.refuse(span, "this layout has no meaning for mappings"),
            },
            Statement::Pipeline(pipeline) => self.pipeline(pipeline),
            Statement::Memory(block) => {
                for item in block.items() {
                    self.memory(item);
                }
            }
            Statement::Experts(block) => {
                for item in block.items() {
                    self.experts(item);
                }
            }
            Statement::Schedule(_) => self.refuse(span, "schedules of one's own have no price yet"),
            Statement::Pin(_) | Statement::Place(_) | Statement::Keep(_) | Statement::Tactic(_) => {
                self.refuse(
                    span,
                    "decisions about single tensors are for the search over ops",
                )
            }
            Statement::Plan(_)
            | Statement::Model(_)
            | Statement::Cluster(_)
            | Statement::Data(_)
            | Statement::Init(_)
            | Statement::Solve(_) => {}
        }
    }

    pub fn add(&mut self, span: Span, rule: Rule) {
        let text = self.origin.text.clone();
        self.add_as(span, text, rule);
    }

    pub fn add_as(&mut self, span: Span, text: String, rule: Rule) {
        self.found.push(Restriction { span, text, rule });
    }

    pub fn refuse(&mut self, span: Span, what: &str) {
        self.diagnostics.push(
            Diagnostic::unsupported(what)
                .code("W120")
                .at(span, "")
                .help("remove it, or plan with `--planner ops`"),
        );
    }

    pub fn invalid(&mut self, span: Span, what: String, way_out: &str) {
        self.diagnostics.push(
            Diagnostic::invalid(what)
                .code("W107")
                .at(span, "")
                .help(way_out),
        );
    }

    fn job(&mut self, job: &Job) {
        let Some(setting) = job.get("dtype") else {
            return;
        };
        let Some(value) = setting.values.first() else {
            return;
        };
        if let Some(precisions) = formats(value, self.diagnostics) {
            let text = format!("dtype {value}");
            self.add_as(setting.span, text, Rule::Precisions(precisions));
        }
    }

    fn unknown_mesh(&mut self, span: Span, name: &str) {
        let names: Vec<&str> = meshes(self.document)
            .map(|mesh| mesh.name.node.as_str())
            .collect();
        let near = did_you_mean(name, names);
        let way_out = near.unwrap_or_else(|| format!("add `mesh {name} = …`"));
        self.invalid(span, format!("there is no mesh `{name}`"), &way_out);
    }

    fn mesh(&mut self, mesh: &MeshDef) {
        let order = axes_of(mesh);
        if let Some(main) = &mesh.refolds {
            let is_main = |other: &MeshDef| other.name.node == main.node && other.refolds.is_none();
            if !meshes(self.document).any(is_main) {
                self.unknown_mesh(main.span, main.as_str());
            }
        }
        let mut last: Option<(usize, &str)> = None;
        for axis in &mesh.axes {
            let name = axis.name.as_str();
            let Some(place) = order.iter().position(|known| *known == name) else {
                return self.invalid(
                    axis.span,
                    format!("mappings have no axis `{name}` here"),
                    &format!("their axes are {}", order.join(" > ")),
                );
            };
            if let Some((_, outer)) = last.filter(|(before, _)| *before >= place) {
                return self.invalid(
                    axis.span,
                    format!(
                        "`{name}` stands inside of `{outer}`, and ranks are laid out {}",
                        order.join(" > ")
                    ),
                    "write the axes in that order, each once",
                );
            }
            last = Some((place, name));
        }
        for axis in &mesh.axes {
            let Some(grid_axis) = grid_axis(axis.name.as_str()) else {
                continue;
            };
            let text = format!("{}.{}", mesh.name.node, axis.node);
            if let Degree::Is(choice) = &axis.degree {
                let rule = Rule::Degree(grid_axis, allowed(choice));
                self.add_as(axis.span, text.clone(), rule);
            }
            match &axis.within {
                Some(level) if *level == "node" => {
                    self.add_as(axis.span, text, Rule::WithinNode(grid_axis));
                }
                Some(level) => self.invalid(
                    axis.span,
                    format!("there is no level `{level}` of a cluster"),
                    "write `within node`",
                ),
                None => {}
            }
        }
        if let (Some(on), Some(_)) = (&mesh.on, &mesh.refolds) {
            self.invalid(
                on.span,
                format!(
                    "mesh `{}` takes the nodes of the mesh that it refolds",
                    mesh.name.node
                ),
                "write `on nodes[…]` behind the mesh that refolds none",
            );
        }
        // An axis that a mesh does not have divides nothing; one of experts takes what the other
        // mesh leaves along the axes that both have.
        for name in order {
            let is_missing = mesh.axes.iter().all(|axis| axis.name != name);
            let is_implied = mesh.refolds.is_some() && matches!(name, "pp" | "edp");
            if let Some(axis) = grid_axis(name).filter(|_| is_missing && !is_implied) {
                let text = format!("mesh {} without `{name}`", mesh.name.node);
                let rule = Rule::Degree(axis, Allowed::only(1));
                self.add_as(self.origin.span, text, rule);
            }
        }
    }

    fn use_mesh(&mut self, item: &UseMesh, span: Span) {
        let name = &item.mesh.node;
        let Some(mesh) = meshes(self.document).find(|mesh| mesh.name.node == *name) else {
            return self.unknown_mesh(item.mesh.span, name.as_str());
        };
        let is_fine = item.on.iter().all(|selector| {
            let is_all = selector.node == Selector::everything();
            match mesh.refolds {
                None => is_all,
                Some(_) => !is_all && selector.covers("layers[0].moe.experts"),
            }
        });
        if is_fine {
            return;
        }
        let (what, way_out) = match mesh.refolds {
            None => (
                "a mesh for a part of the model has no meaning for mappings",
                format!("write `use {name} on *`"),
            ),
            Some(_) => (
                "a mesh that refolds another is for the experts",
                format!("write `use {name} on layers[*].moe.experts`"),
            ),
        };
        let refusal = Diagnostic::unsupported(what).code("W120").at(span, "");
        self.diagnostics.push(refusal.help(way_out));
    }

    fn apply(&mut self, apply: &Apply) {
        let span = self.origin.span;
        match apply.tactic.node.as_str() {
            "fsdp" => self.add(span, Rule::Zero(vec![3])),
            "sp" => match apply.args.first().map(words) {
                Some(choices) if choices.is_empty() => {}
                Some(choices) => {
                    let choices = choices.iter().map(|word| word != "none").collect();
                    self.add(span, Rule::SequenceParallel(choices));
                }
                None => self.invalid(span, "`sp` takes an axis".into(), "as in `sp(main.tp)`"),
            },
            "ring" => self.add(span, Rule::Contexts(vec![Context::Ring])),
            "all_gather" => self.add(span, Rule::Contexts(vec![Context::AllGather])),
            "ulysses" => self.add(span, Rule::Contexts(vec![Context::Ulysses])),
            "context" => {
                let words = apply.args.first().map(words).unwrap_or_default();
                let contexts: Option<Vec<Context>> =
                    words.iter().map(|word| context(word)).collect();
                match contexts {
                    Some(contexts) if contexts.is_empty() => {}
                    Some(contexts) => self.add(span, Rule::Contexts(contexts)),
                    None => self.invalid(
                        span,
                        format!("`context` knows no `{}`", words.join(", ")),
                        "write ring, all_gather or ulysses",
                    ),
                }
            }
            "zero" => self.zero(apply),
            // What the others say is so in every mapping.
            _ => {}
        }
    }

    /// `zero(STAGE, AXIS [, RANKS])`
    fn zero(&mut self, apply: &Apply) {
        let span = self.origin.span;
        match apply.args.first().map(numbers) {
            Some(Some(stages)) if stages.iter().all(|stage| *stage <= 3) => {
                if !stages.is_empty() {
                    let stages = stages.iter().map(|stage| *stage as u8).collect();
                    self.add(span, Rule::Zero(stages));
                }
            }
            _ => {
                return self.invalid(
                    span,
                    "`zero` takes a stage (0 to 3), an axis, and the ranks that share one copy"
                        .into(),
                    "as in `apply zero(1, main.dp)` or `apply zero(3, main.dp, 8)`",
                );
            }
        }
        match apply.args.get(2).map(numbers) {
            None => {}
            Some(Some(groups)) if groups.is_empty() => {}
            Some(Some(groups)) if !groups.contains(&0) => {
                let groups = groups.into_iter().map(ShardGroup::Ranks).collect();
                self.add(span, Rule::ShardGroups(groups));
            }
            Some(_) => self.invalid(
                span,
                "the third argument of `zero` is a number of ranks".into(),
                "as in `apply zero(3, main.dp, 8)`",
            ),
        }
    }

    fn pipeline(&mut self, pipeline: &Pipeline) {
        let over = &pipeline.over;
        if over.axis != "pp" {
            return self.invalid(
                over.span,
                format!("a pipeline runs over `pp`, not over `{}`", over.node),
                "write `pipeline main.pp`",
            );
        }
        let mut known = meshes(self.document).peekable();
        if let Some(mesh) = &over.mesh
            && known.peek().is_some()
            && !known.any(|other| other.name.node == *mesh)
        {
            return self.unknown_mesh(over.span, mesh.as_str());
        }
        for item in pipeline.body.items() {
            let span = item.span;
            match &item.node {
                PipelineItem::Chunks(choice) => {
                    let text = format!("chunks {choice}");
                    self.add_as(span, text, Rule::Chunks(allowed(choice)));
                }
                PipelineItem::Microbatches(choice) => {
                    let text = format!("microbatches {choice}");
                    self.add_as(span, text, Rule::Microbatches(allowed(choice)));
                }
                PipelineItem::Schedule(choice) => {
                    let names: Vec<String> = match choice {
                        Choice::Fixed(name) => vec![name.as_str().to_owned()],
                        Choice::Auto { among, .. } => {
                            among.iter().map(|name| name.as_str().to_owned()).collect()
                        }
                    };
                    self.schedules(span, format!("schedule {choice}"), names);
                }
                PipelineItem::Slices(choice) => {
                    if choice.known() != Some(&1) {
                        self.refuse(span, "slices of sequences are not searched");
                    }
                }
                PipelineItem::Ranks(_) => {
                    self.refuse(span, "ranks of stages are not searched");
                }
                PipelineItem::EmptyStages => {
                    self.refuse(span, "empty stages are not searched");
                }
                PipelineItem::CutBefore(Choice::Fixed(cuts)) => self.cuts(span, cuts),
                PipelineItem::CutBefore(Choice::Auto { among, .. }) if among.is_empty() => {}
                PipelineItem::CutBefore(Choice::Auto { .. }) => {
                    self.refuse(span, "choices among lists of cuts are not searched");
                }
            }
        }
    }

    /// Schedules that may be chosen; none named leaves all.
    fn schedules(&mut self, span: Span, text: String, names: Vec<String>) {
        let is_family = |name: &&String| Builtin::families().any(|one| one.name() == name.as_str());
        let Some(other) = names.iter().find(|name| !is_family(name)) else {
            if !names.is_empty() {
                self.add_as(span, text, Rule::Schedules(names));
            }
            return;
        };
        if Builtin::find(other).is_some() {
            return self.refuse(
                span,
                &format!(
                    "schedule `{other}` divides sequences or trains on stale weights, which has no \
                     price in a mapping"
                ),
            );
        }
        let families = Builtin::families().map(Builtin::name);
        let all = names_of_families();
        self.invalid(
            span,
            format!("there is no schedule `{other}`"),
            &did_you_mean(other, families).unwrap_or(format!("there are {all}")),
        );
    }

    fn cuts(&mut self, span: Span, cuts: &[Spanned<Selector>]) {
        let n_layers = self.workload.model.n_layers;
        let mut before = BTreeSet::new();
        for selector in cuts {
            let layers: Vec<usize> = (0..n_layers)
                .filter(|layer| selector.matches(&format!("layers[{layer}]")))
                .collect();
            if layers.is_empty() || layers.contains(&0) {
                let what = match layers.as_slice() {
                    [] => format!("`{selector}` is no layer: the model has {n_layers}"),
                    _ => format!("`{selector}` cuts before the first layer"),
                };
                return self.invalid(selector.span, what, "as in `cut before layers[14,28]`");
            }
            before.extend(layers);
        }
        let mut first = 0;
        let mut counts = Vec::new();
        for edge in before.into_iter().chain([n_layers]) {
            counts.push(edge - first);
            first = edge;
        }
        let texts: Vec<String> = cuts.iter().map(ToString::to_string).collect();
        let text = format!("cut before {}", texts.join(", "));
        self.add_as(span, text, Rule::Cuts(Cuts::Given(counts)));
    }

    fn experts(&mut self, item: &Spanned<ExpertsItem>) {
        match &item.node {
            ExpertsItem::Dispatch(choice) => {
                // Prices are those of dropless dispatch with balanced routes.
                let is_dropless = match choice {
                    Choice::Fixed(dispatch) => *dispatch == Dispatch::Dropless,
                    Choice::Auto { among, .. } => {
                        among.is_empty() || among.contains(&Dispatch::Dropless)
                    }
                };
                if !is_dropless {
                    self.refuse(item.span, "experts with a capacity have no price yet");
                }
            }
            ExpertsItem::Exchanges(choice) => {
                // Prices are those of tokens that come home.
                if choice.known() == Some(&Exchanges::One) {
                    self.refuse(item.span, "one exchange a layer has no price here yet");
                }
            }
            ExpertsItem::Placement(_) => {
                self.refuse(item.span, "placement of experts is not implemented yet");
            }
        }
    }
}

fn count(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn allowed(choice: &Choice<u64>) -> Allowed {
    match choice {
        Choice::Fixed(degree) => Allowed::only(count(*degree)),
        Choice::Auto { among, .. } if among.is_empty() => Allowed::Any,
        Choice::Auto { among, .. } => Allowed::Among(among.iter().copied().map(count).collect()),
    }
}

/// The values that an argument may take; empty for anything.
fn values(arg: &Spanned<Choice<Arg>>) -> Vec<&Arg> {
    match &arg.node {
        Choice::Fixed(value) => vec![value],
        Choice::Auto { among, .. } => among.iter().collect(),
    }
}

fn words(arg: &Spanned<Choice<Arg>>) -> Vec<String> {
    values(arg).into_iter().map(ToString::to_string).collect()
}

fn numbers(arg: &Spanned<Choice<Arg>>) -> Option<Vec<usize>> {
    let number = |value: &Arg| match value {
        Arg::Number(Number::Int(number)) => usize::try_from(*number).ok(),
        _ => None,
    };
    values(arg).into_iter().map(number).collect()
}

fn context(word: &str) -> Option<Context> {
    Some(match word {
        "ring" => Context::Ring,
        "all_gather" => Context::AllGather,
        "ulysses" => Context::Ulysses,
        _ => return None,
    })
}

/// `prefer layers[*].attn.seq = ulysses(cp) over ring(cp) weight 3`
pub(super) fn preferred(prefer: &Prefer) -> Option<Preference> {
    if prefer.key.node != "seq" {
        return None;
    }
    let ranking: Option<Vec<Context>> = prefer
        .ranking
        .iter()
        .map(|call| context(call.name.as_str()))
        .collect();
    Some(Preference {
        ranking: ranking?,
        weight: prefer.weight.map_or(1.0, |weight| weight.as_f64()),
    })
}

/// `forbid SELECTOR : [dim/*]` in degrees: what may not divide that dim.
pub(super) fn forbidden(forbid: &Forbid) -> Option<Rule> {
    let [dim] = forbid.layout.dims.as_slice() else {
        return None;
    };
    let only_one = |axis| Some(Rule::Degree(axis, Allowed::only(1)));
    match (dim.dim.as_str(), &dim.split) {
        ("batch", Split::Any) => only_one(GridAxis::Dp),
        ("heads", Split::Any) => only_one(GridAxis::Tp),
        ("experts" | "expert", Split::Any) if is_about_experts(&forbid.on) => {
            only_one(GridAxis::Ep)
        }
        ("ffn", Split::Any) if is_about_experts(&forbid.on) => only_one(GridAxis::Etp),
        ("seq", Split::Any) => only_one(GridAxis::Cp),
        ("seq", Split::Axes(axes)) if axes.iter().all(|axis| axis.axis == "tp") => {
            Some(Rule::SequenceParallel(vec![false]))
        }
        _ => None,
    }
}

fn is_about_experts(selector: &Selector) -> bool {
    selector.segments.iter().any(|segment| match segment {
        Segment::Named { name, .. } => name.as_str().starts_with("expert"),
        Segment::Any => false,
    })
}
