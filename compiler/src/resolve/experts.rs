//! The `experts` block of a document that is executed.
//!
//! Enters: the block. Leaves: what it decides, and what it leaves open.
//! Invariant: what is open has at least two values.

use std::path::{Path, PathBuf};

use meshweave_dsl::diagnostics::{Diagnostic, Span};
use meshweave_dsl::weave::ast::{
    Block, Choice, Dispatch, Document, Exchanges, ExpertsItem, Placement, Statement,
};

use super::{Job, existing_file};
use crate::placement::solve::Objective;

/// What a document says about its experts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Experts {
    /// Slots of an expert as a multiple of its fair share; 0 drops nothing. The model's own unless said.
    pub capacity: Option<f64>,
    /// One exchange of tokens a layer, or two.
    pub exchanges: Option<Exchanges>,
    /// Both are to be priced: where that is said.
    pub open_exchanges: Option<Span>,
    /// The routes that experts are placed by before a run.
    pub placed: Option<PlacedBy>,
}

/// How experts are placed before a run.
#[derive(Clone, Debug, PartialEq)]
pub struct PlacedBy {
    pub routes: PathBuf,
    pub objective: Objective,
    /// Experts that a device holds in a layer, where that is not its share.
    pub slots: Option<usize>,
}

impl Experts {
    /// The document with a decision about exchanges.
    pub fn witnessed(document: &Document, exchanges: Exchanges) -> Document {
        let mut document = document.clone();
        for line in &mut document.body.lines {
            let Statement::Experts(block) = &mut line.item.node else {
                continue;
            };
            for line in &mut block.lines {
                if let ExpertsItem::Exchanges(choice) = &mut line.item.node {
                    *choice = choice.clone().witnessed(exchanges);
                }
            }
        }
        document
    }
}

/// What the document's block says; nothing without one.
pub(super) fn resolve_experts(
    block: &Block<ExpertsItem>,
    job: &Job,
    base_dir: &Path,
    diagnostics: &mut Vec<Diagnostic>,
) -> Experts {
    let mut experts = Experts::default();
    for item in block.items() {
        match &item.node {
            ExpertsItem::Exchanges(choice) => {
                exchanges(choice, item.span, job, &mut experts, diagnostics);
            }
            ExpertsItem::Dispatch(choice) => match choice.known() {
                Some(Dispatch::Dropless) => experts.capacity = Some(0.0),
                Some(Dispatch::Capacity(factor)) => experts.capacity = Some(factor.as_f64()),
                None => diagnostics.push(
                    Diagnostic::invalid(
                        "what is dropped decides what the model computes, so no plan may choose it",
                    )
                    .code("W103")
                    .at(item.span, "")
                    .help("write `dispatch dropless`, or `dispatch capacity 1.25`"),
                ),
            },
            ExpertsItem::Placement(placement) => {
                experts.placed = placed(placement, item.span, base_dir, diagnostics);
            }
        }
    }
    experts
}

fn exchanges(
    choice: &Choice<Exchanges>,
    span: Span,
    job: &Job,
    experts: &mut Experts,
    diagnostics: &mut Vec<Diagnostic>,
) {
    let only = match choice {
        Choice::Fixed(fixed) => Some(*fixed),
        Choice::Auto { among, witness } => witness.or_else(|| (among.len() == 1).then(|| among[0])),
    };
    match (only, job) {
        (Some(Exchanges::One), Job::Train { .. }) => diagnostics.push(
            Diagnostic::invalid(
                "`exchanges one` is for inference: in training tokens come home to their losses, and gradients go the same way back",
            )
            .code("W103")
            .at(span, "")
            .help("write `exchanges two`, or `infer`"),
        ),
        (Some(only), _) => experts.exchanges = Some(only),
        (None, Job::Train { .. }) => experts.exchanges = Some(Exchanges::Two),
        (None, Job::Infer { .. }) => experts.open_exchanges = Some(span),
    }
}

/// What experts are placed by.
fn placed(
    placement: &Placement,
    span: Span,
    base_dir: &Path,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<PlacedBy> {
    let objective = placement
        .method
        .known()
        .and_then(|method| match method.as_str() {
            "affinity" => Some(Objective::Affinity),
            "load" => Some(Objective::Load),
            "joint" => Some(Objective::Joint),
            _ => None,
        });
    let Some(objective) = objective else {
        let method = placement.method.to_string();
        diagnostics.push(
            Diagnostic::unsupported(format!("experts placed by `{method}` are not executed yet"))
                .code("W120")
                .at(span, "")
                .help("write `placement affinity`, `load` or `joint` with `trace \"routes.parquet\"`, or give `run` the `--placement` of `meshweave place`"),
        );
        return None;
    };
    let Some(trace) = &placement.trace else {
        diagnostics.push(
            Diagnostic::invalid("experts are placed by routes, and none are given")
                .code("W103")
                .at(span, "")
                .help("add `trace \"routes.parquet\"`, recorded by `meshweave run --routes`"),
        );
        return None;
    };
    let way_out = "record it with `meshweave run --routes FILE`";
    let routes = existing_file(
        "the trace",
        trace,
        trace.span,
        base_dir,
        way_out,
        diagnostics,
    )?;
    let slots = placement.slots.as_ref();
    Some(PlacedBy {
        routes,
        objective,
        slots: slots.and_then(|slots| usize::try_from(slots.node).ok()),
    })
}
