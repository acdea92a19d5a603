//! How each kind of line looks: its columns, and its block if it has one.

use crate::schedule::Channels;

use super::super::ast::{
    Apply, Block, Cell, Choice, Comment, Definition, ExpertsItem, Forbid, Keep, MemoryItem, Pin,
    Pipeline, PipelineItem, Place, Prefer, Row, ScheduleBody, ScheduleDef, Selector, SettingLine,
    Shard, Spanned, Statement, StreamLine, TacticDef, TacticItem,
};
use super::block_lines;
use super::node::{choice_text, join, quoted};

/// A line before alignment.
pub(super) struct Form {
    /// Lines of one family align with their neighbors.
    family: Family,
    /// At least one.
    pub columns: Vec<String>,
    pub body: Option<Body>,
}

/// The block of a line.
pub(super) struct Body {
    pub note: Option<Comment>,
    pub lines: Vec<String>,
}

#[derive(PartialEq)]
enum Family {
    None,
    Mesh,
    Use,
    Directive,
    Row,
}

impl Form {
    fn plain(text: String) -> Self {
        Self::columns(Family::None, vec![text])
    }

    fn columns(family: Family, columns: Vec<String>) -> Self {
        Self {
            family,
            columns,
            body: None,
        }
    }

    fn with_block<T: Show>(head: String, block: &Block<T>) -> Self {
        Self {
            family: Family::None,
            columns: vec![head],
            body: Some(Body {
                note: block.note.clone(),
                lines: block_lines(block),
            }),
        }
    }

    pub(super) fn is_aligned_with(&self, other: &Form) -> bool {
        self.family == other.family && self.family != Family::None
    }
}

/// What can be a line of a block.
pub(super) trait Show {
    fn form(&self) -> Form;
}

impl Show for Statement {
    fn form(&self) -> Form {
        match self {
            Self::Plan(header) => Form::plain(format!(
                "plan {} model {} cluster {}",
                quoted(&header.name),
                header.model,
                header.cluster
            )),
            Self::Model(model) => definition("model", model),
            Self::Cluster(cluster) => definition("cluster", cluster),
            Self::Data(reference) => Form::plain(format!("data {reference}")),
            Self::Init(init) => Form::plain(format!("init {init}")),
            Self::Train(job) => Form::plain(format!("train {}", join(&job.settings, " "))),
            Self::Infer(job) => Form::plain(format!("infer {}", join(&job.settings, " "))),
            Self::Mesh(mesh) => {
                let mut axes = format!("= {}", join(&mesh.axes, " > "));
                if let Some(other) = &mesh.refolds {
                    axes.push_str(&format!(" refolds {other}"));
                }
                if let Some(nodes) = &mesh.on {
                    axes.push_str(&format!(" on {nodes}"));
                }
                Form::columns(
                    Family::Mesh,
                    vec!["mesh".to_owned(), mesh.name.to_string(), axes],
                )
            }
            Self::Use(item) => {
                let on = format!("on {}{}", join(&item.on, ", "), marker(item.overrides));
                Form::columns(
                    Family::Use,
                    vec!["use".to_owned(), item.mesh.to_string(), on],
                )
            }
            Self::Tactic(tactic) => tactic_form(tactic),
            Self::Apply(apply) => apply.form(),
            Self::Pin(pin) => pin.form(),
            Self::Forbid(forbid) => forbid.form(),
            Self::Prefer(prefer) => prefer.form(),
            Self::Place(place) => place.form(),
            Self::Keep(keep) => keep.form(),
            Self::Schedule(schedule) => schedule_form(schedule),
            Self::Pipeline(pipeline) => pipeline_form(pipeline),
            Self::Memory(block) => Form::with_block("memory".to_owned(), block),
            Self::Experts(block) => Form::with_block("experts".to_owned(), block),
            Self::Solve(solve) => Form::plain(format!("solve {solve}")),
        }
    }
}

fn marker(overrides: bool) -> &'static str {
    if overrides { " override" } else { "" }
}

fn definition(keyword: &str, definition: &Definition) -> Form {
    let mut head = format!("{keyword} {}", definition.name);
    if let Some(base) = &definition.base {
        head.push_str(&format!(" = {base}"));
    }
    Form::with_block(head, &definition.body)
}

fn tactic_form(tactic: &TacticDef) -> Form {
    let head = format!("tactic {}({})", tactic.name, join(&tactic.params, ", "));
    Form::with_block(head, &tactic.body)
}

fn schedule_form(schedule: &ScheduleDef) -> Form {
    let head = format!("schedule {} =", schedule.name);
    match &schedule.body {
        ScheduleBody::Key(keys) => Form::plain(format!("{head} key {}", join(keys, " "))),
        ScheduleBody::Rows { channels, rows } => {
            Form::with_block(format!("{head} rows{}", channels_text(*channels)), rows)
        }
        ScheduleBody::Streams { channels, streams } => {
            let head = format!("{head} streams{}", channels_text(*channels));
            Form::with_block(head, streams)
        }
        ScheduleBody::Csv(file) => Form::plain(format!("{head} csv {}", quoted(file))),
    }
}

fn channels_text(channels: Option<Channels>) -> String {
    channels.map_or_else(String::new, |channels| format!(" channels {channels}"))
}

fn pipeline_form(pipeline: &Pipeline) -> Form {
    Form::with_block(format!("pipeline {}", pipeline.over), &pipeline.body)
}

impl Show for SettingLine {
    fn form(&self) -> Form {
        Form::plain(join(&self.settings, " "))
    }
}

impl Show for TacticItem {
    fn form(&self) -> Form {
        match self {
            Self::Shard(shard) => shard.form(),
            Self::Apply(apply) => apply.form(),
            Self::Pin(pin) => pin.form(),
            Self::Forbid(forbid) => forbid.form(),
            Self::Prefer(prefer) => prefer.form(),
        }
    }
}

fn except(selectors: &[Spanned<Selector>]) -> String {
    if selectors.is_empty() {
        String::new()
    } else {
        format!(" except {}", join(selectors, ", "))
    }
}

impl Show for Shard {
    fn form(&self) -> Form {
        Form::plain(format!(
            "shard {} over {} on {}{}",
            join(&self.dims, ", "),
            join(&self.over, ", "),
            join(&self.on, ", "),
            except(&self.except)
        ))
    }
}

impl Show for Apply {
    fn form(&self) -> Form {
        Form::plain(format!(
            "apply {}({}){}",
            self.tactic,
            join(&self.args, ", "),
            except(&self.except)
        ))
    }
}

fn directive(keyword: &str, rest: String) -> Form {
    Form::columns(Family::Directive, vec![keyword.to_owned(), rest])
}

impl Show for Pin {
    fn form(&self) -> Form {
        let overrides = marker(self.overrides);
        directive("pin", format!("{} : {}{overrides}", self.on, self.layout))
    }
}

impl Show for Forbid {
    fn form(&self) -> Form {
        let overrides = marker(self.overrides);
        directive(
            "forbid",
            format!("{} : {}{overrides}", self.on, self.layout),
        )
    }
}

impl Show for Prefer {
    fn form(&self) -> Form {
        let mut text = format!(
            "{}.{} = {}",
            self.on,
            self.key,
            join(&self.ranking, " over ")
        );
        if let Some(weight) = self.weight {
            text.push_str(&format!(" weight {weight}"));
        }
        text.push_str(marker(self.overrides));
        directive("prefer", text)
    }
}

impl Show for Place {
    fn form(&self) -> Form {
        directive("place", format!("{} : {}", self.on, self.factors))
    }
}

impl Show for Keep {
    fn form(&self) -> Form {
        directive("keep", format!("{} : {}", self.on, self.layout))
    }
}

impl Show for Row {
    fn form(&self) -> Form {
        let mut columns = vec!["row".to_owned()];
        columns.extend(self.cells.iter().map(Cell::to_string));
        Form::columns(Family::Row, columns)
    }
}

impl Show for StreamLine {
    fn form(&self) -> Form {
        Form::plain(self.to_string())
    }
}

impl Show for PipelineItem {
    fn form(&self) -> Form {
        Form::plain(match self {
            Self::Chunks(chunks) => format!("chunks {chunks}"),
            Self::CutBefore(cuts) => format!("cut before {}", cuts_text(cuts)),
            Self::Schedule(schedule) => format!("schedule {schedule}"),
            Self::Microbatches(microbatches) => format!("microbatches {microbatches}"),
            Self::Slices(slices) => format!("slices {slices}"),
            Self::Ranks(ranks) => format!("ranks ({})", join(ranks, ",")),
            Self::EmptyStages => "empty stages".into(),
        })
    }
}

/// Lists among choices stand in parentheses, since commas part the choices.
fn cuts_text(cuts: &Choice<Vec<Spanned<Selector>>>) -> String {
    match cuts {
        Choice::Fixed(list) => join(list, ", "),
        Choice::Auto { among, witness } => {
            let grouped: Vec<String> = among
                .iter()
                .map(|list| format!("({})", join(list, ", ")))
                .collect();
            let witness = witness.as_ref().map(|list| join(list, ", "));
            choice_text(&grouped, witness)
        }
    }
}

impl Show for MemoryItem {
    fn form(&self) -> Form {
        Form::plain(match self {
            Self::Budget(budget) => format!("budget {budget}"),
            Self::Headroom(headroom) => format!("headroom {headroom}"),
            Self::Recompute(item) => {
                let overrides = marker(item.overrides);
                format!("recompute {} = {}{overrides}", item.on, item.policy)
            }
            Self::Offload(item) => {
                let overrides = marker(item.overrides);
                format!("offload {} = {}{overrides}", item.on, item.to)
            }
        })
    }
}

impl Show for ExpertsItem {
    fn form(&self) -> Form {
        Form::plain(match self {
            Self::Placement(placement) => {
                let mut line = format!("placement {}", placement.method);
                if let Some(trace) = &placement.trace {
                    line += &format!(" trace {}", quoted(trace));
                }
                if let Some(slots) = &placement.slots {
                    line += &format!(" slots {}", slots.node);
                }
                line
            }
            Self::Dispatch(dispatch) => format!("dispatch {dispatch}"),
            Self::Exchanges(exchanges) => format!("exchanges {exchanges}"),
        })
    }
}
