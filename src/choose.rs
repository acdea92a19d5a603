//! The choice of what a document leaves open of its pipeline.
//!
//! Enters: a session whose document has `auto` for the degree of its pipeline's axis, the schedule, the
//! chunks or the microbatches. Leaves: the session of the document with witnesses, and why.
//! Invariant: the choice is the fastest of the candidates that were planned and lowered like any
//! document; simulations and closed forms only decide which those are.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use meshweave_compiler::pipeline::{
    Candidate, Empty, PipelineError, PricedCandidate, Setting, choose,
};
use meshweave_compiler::resolve::{Job, OpenPipeline};
use meshweave_dsl::diagnostics::{Class, Diagnostic};
use serde::Serialize;

use crate::cli::render::seconds;
use crate::compile::pipeline_error;
use crate::error::{Error, Result};
use crate::report::predicted_timeline;
use crate::session::Session;

/// Candidates that are planned and lowered, besides the best of every degree.
const N_PLANNED: usize = 3;
/// Candidates that the explanation lists.
const N_LISTED: usize = 6;

/// What was chosen, and what else there was.
#[derive(Clone, Debug, Serialize)]
pub struct Choice {
    /// The fastest in simulation first.
    pub candidates: Vec<PricedCandidate>,
    /// Seconds a step of the first candidates as planned and lowered; none where there is no plan.
    pub planned_s: Vec<Option<f64>>,
    /// Why there is none, of those that were tried.
    pub not_planned: BTreeMap<usize, String>,
    /// Which of the candidates it is.
    pub chosen: usize,
}

impl Choice {
    /// Why this pipeline, a line a candidate.
    pub fn text(&self) -> String {
        let count = |is: &dyn Fn(&PricedCandidate) -> bool| {
            self.candidates.iter().filter(|one| is(one)).count()
        };
        let mut text = format!(
            "pipeline   {}; {} pipelines priced by closed form, {} simulated, {} planned\n",
            named(&self.candidates[self.chosen].candidate),
            count(&|one| one.closed_form_s.is_some()),
            count(&|one| one.simulated_s.is_some()),
            self.planned_s.iter().flatten().count()
        );
        let is_listed = |idx: usize| {
            let planned_s = self.planned_s.get(idx).copied().flatten();
            idx < N_LISTED || planned_s.is_some() || self.not_planned.contains_key(&idx)
        };
        let candidates = self.candidates.iter().enumerate();
        for (idx, one) in candidates.filter(|(idx, _)| is_listed(*idx)) {
            let price = |what: &str, value: Option<f64>| {
                value.map_or_else(String::new, |value| format!("  {what} {}", seconds(value)))
            };
            let planned_s = self.planned_s.get(idx).copied().flatten();
            let _ = writeln!(
                text,
                "  {} {:<48}{}{}{} (predicted){}",
                if idx == self.chosen { "→" } else { " " },
                named(&one.candidate),
                price("closed form", one.closed_form_s),
                price("simulated", one.simulated_s),
                price("planned", planned_s),
                self.why_not(idx)
            );
        }
        text
    }

    /// Why a candidate is out of the question, or could not be compiled.
    fn why_not(&self, idx: usize) -> String {
        let refused = self.candidates[idx].refused.as_ref();
        let why = match (refused, self.not_planned.get(&idx)) {
            (Some(why), _) => format!("  out: {why}"),
            (None, Some(why)) => format!("  cannot be compiled: {why}"),
            (None, None) => return String::new(),
        };
        // A grid of cells has its place where the schedule is checked by itself.
        why.lines().next().unwrap_or_default().to_owned()
    }
}

fn named(candidate: &Candidate) -> String {
    let shape = &candidate.shape;
    let count = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    let chunks = match shape.n_chunks {
        1 => String::new(),
        n_chunks => format!(", {}", count(n_chunks, "chunk")),
    };
    format!(
        "{} over {}{chunks}, {}",
        candidate.name,
        count(shape.n_ranks, "rank"),
        if shape.n_microbatches == 1 {
            "1 microbatch".into()
        } else {
            format!("{} microbatches", shape.n_microbatches)
        }
    )
}

/// The session of the document with the best of what it leaves open.
///
/// # Errors
/// Nothing that the document admits can be planned; the first reason is given.
pub(crate) fn chosen(session: &Session, open: &OpenPipeline, base: &Path) -> Result<Session> {
    let Job::Train { optimizer, .. } = &session.request.job else {
        let diagnostic = Diagnostic::unsupported("pipelines of inference are not executed yet");
        let diagnostic = diagnostic.code("W120").at(open.span, "");
        let diagnostic = diagnostic.help("remove the block, or train");
        return Err(Error::new(vec![diagnostic], session.sources.clone()));
    };
    let (batch, _) = session.request.job.sizes();
    let forward = |batch: usize| {
        let graph = session.forward(batch);
        graph
            .map(|(graph, ..)| graph)
            .map_err(|error| PipelineError::Invalid(first_message(&error)))
    };
    let schedule = |nth: usize| {
        let made = open.schedule(&session.document, &open.candidates[nth], base);
        made.map_err(|diagnostic| PipelineError::Invalid(diagnostic.message.clone()))
    };
    let setting = Setting {
        forward: &forward,
        optimizer,
        batch,
        cuts: &open.cuts,
        empty: Empty::when(open.allow_empty),
        cluster: &session.request.cluster,
    };
    let candidates = open.candidates.iter().map(|candidate| Candidate {
        name: candidate.schedule.to_string(),
        shape: candidate.shape,
        placements: candidate.placements.clone(),
    });
    let candidates = choose(candidates.collect(), &schedule, &setting).map_err(|error| {
        let mut error = pipeline_error(error);
        error.sources = session.sources.clone();
        let findings = std::mem::take(&mut error.diagnostics).into_iter();
        error.diagnostics = findings.map(|finding| finding.at(open.span, "")).collect();
        error
    })?;
    let mut planned_s: Vec<Option<f64>> = Vec::new();
    let mut best: Option<(f64, usize, Session)> = None;
    let mut why_not = None;
    let mut not_planned = BTreeMap::new();
    let simulated = candidates
        .iter()
        .enumerate()
        .filter(|(_, one)| one.simulated_s.is_some() && one.refused.is_none());
    let mut degrees = BTreeSet::new();
    for (idx, one) in simulated {
        // What a degree costs within stages is known with their plan only; and it takes one plan.
        let is_first = degrees.insert(one.candidate.shape.n_ranks);
        let n_planned = planned_s.iter().flatten().count();
        if n_planned >= N_PLANNED && !is_first && best.is_some() {
            continue;
        }
        let candidate = &open.candidates[one.nth];
        let document = open.witnessed(&session.document, candidate, one.found.as_ref());
        let planned = session.with_document(document, base).and_then(|session| {
            let model = session.model()?;
            let solution = session.plan(&model)?;
            let (program, _) = session.outline(&model, &solution.plan)?;
            Ok((predicted_timeline(&program).step_s(), session))
        });
        planned_s.resize(idx, None);
        match planned {
            Ok((step_s, session)) => {
                planned_s.push(Some(step_s));
                if best.as_ref().is_none_or(|(best_s, ..)| step_s < *best_s) {
                    best = Some((step_s, idx, session));
                }
            }
            Err(error) => {
                planned_s.push(None);
                not_planned.insert(idx, first_message(&error));
                why_not.get_or_insert(error);
            }
        }
    }
    let Some((_, chosen, session)) = best else {
        let none = || Error::plain(Class::Internal, "a choice of pipelines without candidates");
        return Err(why_not.unwrap_or_else(none));
    };
    Ok(Session {
        choice: Some(Choice {
            candidates,
            planned_s,
            not_planned,
            chosen,
        }),
        ..session
    })
}

fn first_message(error: &Error) -> String {
    let first = error.diagnostics.first();
    first.map_or_else(String::new, |finding| finding.message.clone())
}
