//! From a document to a search over mappings.
//!
//! Enters: a document, its request and the decoder's config. Leaves: a [`MappingRequest`]: the workload,
//! and what every statement restricts.
//! Invariant: every statement of the document restricts the space, has no bearing on it (`data`,
//! `init`), or is refused with its place.

mod axes;
mod restrict;
mod saving;
mod read;
mod print;

use meshweave_dsl::cluster::{Cluster, DeviceKind};
use meshweave_dsl::diagnostics::{Diagnostic, Span, has_errors};
use meshweave_dsl::mapping::{Compute, Precision};
use meshweave_dsl::weave::ast::{Choice, Document, Spanned, Statement, Value};

pub use print::{print_mapping, remarks};
pub use restrict::{Restriction, Rule};

use super::tactics::Origin;
use super::{Job, Latency, ModelSource, Objective, Request};
use crate::model::DecoderConfig;
use crate::plan::estimate::{Job as Step, Workload};
use crate::plan::outer::{Allowed, Options, Space};

/// Which planner a document is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planner {
    /// The search over mappings: degrees, pipeline, recomputation, offloading.
    Mapping,
    /// The search over layouts of every op; its plans can be compiled and run.
    Ops,
}

/// What the search over mappings is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct MappingRequest {
    pub workload: Workload,
    pub cluster: Cluster,
    pub options: Options,
    /// What the batch may be where it is left open: the plan is then to make the most tokens a second.
    pub open_batch: Option<Allowed>,
    /// What the document says, line by line.
    pub restrictions: Vec<Restriction>,
}

impl MappingRequest {
    /// What all statements leave open.
    pub fn space(&self) -> Space {
        self.space_without(&[])
    }

    /// What is open without the restrictions of these numbers.
    pub fn space_without(&self, dropped: &[usize]) -> Space {
        let mut space = Space::everything(&self.workload, &self.cluster);
        if let Some(batches) = &self.open_batch {
            space.batches = batches.clone();
        }
        for (number, restriction) in self.restrictions.iter().enumerate() {
            if !dropped.contains(&number) {
                restriction.rule.apply(&mut space, &self.cluster);
            }
        }
        space
    }
}

/// The planner that a document is for, and the place that says so where there is one.
///
/// The search over ops runs for virtual devices, for graphs, and for documents that decide about single
/// tensors (`pin`, `place`, `keep`, a tactic of their own) or name axes that mappings do not have; the
/// search over mappings for all others.
pub fn planner(document: &Document, request: &Request) -> (Planner, Option<Span>) {
    planner_of(document, &request.model, &request.cluster)
}

/// The same before there is a request.
pub(super) fn planner_of(
    document: &Document,
    model: &ModelSource,
    cluster: &Cluster,
) -> (Planner, Option<Span>) {
    if cluster.device.kind == DeviceKind::Host {
        return (Planner::Ops, None);
    }
    if matches!(model, ModelSource::Graph(_)) {
        return (Planner::Ops, None);
    }
    for statement in document.statements() {
        let is_about_tensors = match &statement.node {
            Statement::Pin(_) | Statement::Place(_) | Statement::Keep(_) | Statement::Tactic(_) => {
                true
            }
            Statement::Apply(apply) => !axes::is_known_tactic(apply),
            Statement::Forbid(forbid) => read::forbidden(forbid).is_none(),
            Statement::Prefer(prefer) => read::preferred(prefer).is_none(),
            Statement::Mesh(mesh) => !axes::has_known_axes(mesh),
            _ => false,
        };
        if is_about_tensors {
            return (Planner::Ops, Some(statement.span));
        }
    }
    (Planner::Mapping, None)
}

/// What a document asks of the search over mappings of this decoder.
///
/// Without a request, at least one diagnostic is an error.
pub fn mapping_request(
    document: &Document,
    request: &Request,
    config: &DecoderConfig,
) -> (Option<MappingRequest>, Vec<Diagnostic>) {
    let mut diagnostics = Vec::new();
    let (batch, seq) = request.job.sizes();
    let step = match (&request.job, &request.serving) {
        (Job::Train { .. }, _) => Step::Train,
        (Job::Infer { .. }, serving) => match serving.tokens {
            Some(tokens) => Step::Decode {
                context: seq + tokens,
            },
            None => Step::Prefill,
        },
    };
    let workload = Workload::new(config.clone(), batch, seq, step);
    let mut restrictions = Vec::new();
    for statement in document.statements() {
        let mut reader = read::Reader {
            request,
            workload: &workload,
            document,
            origin: Origin::of(statement),
            found: &mut restrictions,
            diagnostics: &mut diagnostics,
        };
        reader.read(statement);
    }
    for target in &request.serving.targets {
        let rule = match (target.of, step) {
            (Latency::FirstToken, Step::Decode { .. }) => Rule::FirstWithin(target.most_s),
            (Latency::NextToken, Step::Decode { .. }) | (Latency::FirstToken, Step::Prefill) => {
                Rule::Within(target.most_s)
            }
            // Nothing is generated.
            (Latency::NextToken, Step::Prefill) | (_, Step::Train) => continue,
        };
        restrictions.push(Restriction {
            span: target.span,
            text: target.text.clone(),
            rule,
        });
    }
    let open_batch = open_batch(document, request, &mut diagnostics);
    let found = MappingRequest {
        workload,
        cluster: placed(document, &request.cluster, &mut diagnostics),
        options: Options {
            gap: request.solve.gap,
            within_s: request.solve.time_s,
            ..Options::default()
        },
        open_batch,
        restrictions,
    };
    ((!has_errors(&diagnostics)).then_some(found), diagnostics)
}

/// What the batch may be where the document leaves it open.
fn open_batch(
    document: &Document,
    request: &Request,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<Allowed> {
    let choices = request.open_batch.as_ref()?;
    let mut jobs = document
        .statements()
        .filter_map(|statement| match &statement.node {
            Statement::Train(job) | Statement::Infer(job) => job.get("batch"),
            _ => None,
        });
    let value = jobs.next()?.values.first()?;
    // A frozen document says its witness instead.
    let Choice::Auto { .. } = &value.node else {
        return None;
    };
    let mut refuse = |what: &str, way_out: &str| {
        let finding = Diagnostic::invalid(what).code("W103");
        diagnostics.push(finding.at(value.span, "").help(way_out));
    };
    if request.solve.objective == Some(Objective::StepTime) {
        refuse(
            "steps of different batches cannot be compared by their time",
            "write `solve maximize throughput`, or give the batch a value",
        );
    }
    if choices.is_empty() && matches!(request.job, Job::Train { .. }) {
        refuse(
            "nothing bounds the batch of a training step, which memory does not hold at once",
            "list what may be learned from, as in `batch auto{256,512}`",
        );
    }
    Some(match choices.as_slice() {
        [] => Allowed::Any,
        choices => Allowed::Among(choices.to_vec()),
    })
}

/// The cluster with the nodes that a mesh takes, in their order, where it says so.
fn placed(document: &Document, cluster: &Cluster, diagnostics: &mut Vec<Diagnostic>) -> Cluster {
    let mains = axes::meshes(document).filter(|mesh| mesh.refolds.is_none());
    for on in mains.filter_map(|mesh| mesh.on.as_ref()) {
        let Some(list) = on.known() else { continue };
        match cluster.on_nodes(&list.nodes(cluster.n_all_nodes())) {
            Ok(placed) => return placed,
            Err(error) => diagnostics.push(
                Diagnostic::invalid(error.to_string())
                    .code("W107")
                    .at(on.span, "")
                    .help("list nodes of the cluster, each once, or write `on auto`"),
            ),
        }
    }
    cluster.clone()
}

/// The number formats that `dtype` may say.
pub(super) const FORMATS: [(&str, Precision); 5] = [
    ("bf16", Precision::MIXED_BF16),
    ("f32", Precision::F32),
    ("fp8", with(Compute::Fp8)),
    ("mxfp8", with(Compute::MxFp8)),
    ("nvfp4", with(Compute::NvFp4)),
];

/// Products of this format, everything else as in mixed bf16.
const fn with(compute: Compute) -> Precision {
    Precision {
        compute,
        ..Precision::MIXED_BF16
    }
}

/// The formats of a `dtype` setting; `None` after a finding.
fn formats(
    value: &Spanned<Choice<Value>>,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<Vec<Precision>> {
    let words: Vec<&Value> = match &value.node {
        Choice::Fixed(word) => vec![word],
        Choice::Auto { among, .. } if among.is_empty() => {
            // Lower precision than asked for is never chosen unasked.
            return Some(vec![Precision::MIXED_BF16]);
        }
        Choice::Auto { among, .. } => among.iter().collect(),
    };
    let mut found = Vec::new();
    for word in words {
        let known = FORMATS.iter().find(|(name, _)| word.as_str() == Some(name));
        match known {
            Some((_, precision)) => found.push(*precision),
            None => {
                let names = FORMATS.map(|(name, _)| name);
                diagnostics.push(
                    Diagnostic::invalid(format!("`dtype` is no number format: `{word}`"))
                        .code("W103")
                        .at(value.span, "")
                        .help(format!("write one of {}", names.join(", "))),
                );
                return None;
            }
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests;
