//! One exchange of tokens a layer, or two: which of them a document's inference is faster with.
//!
//! Enters: a session whose document leaves `exchanges` open. Leaves: the session of the document with the
//! witness, and why.
//! Invariant: both are planned and lowered like any document; the faster program is chosen.

use std::path::Path;

use meshweave_compiler::resolve::Experts;
use meshweave_dsl::diagnostics::Class;
use meshweave_dsl::timeline::Category;
use meshweave_dsl::weave::ast::Exchanges;
use serde::Serialize;

use crate::cli::render::seconds;
use crate::error::{Error, Result};
use crate::report::predicted_timeline;
use crate::session::Session;

/// What was chosen, and what the other would have taken.
#[derive(Clone, Debug, Serialize)]
pub struct ExchangeChoice {
    pub chosen: Exchanges,
    /// Both ways in the order of [`Exchanges::ALL`].
    pub ways: Vec<Way>,
}

/// One of the ways.
#[derive(Clone, Debug, Serialize)]
pub struct Way {
    pub exchanges: Exchanges,
    /// Predicted seconds of a step, and of the collectives in it on the mean rank; none where there is no such program.
    pub step_s: Option<f64>,
    pub collective_s: Option<f64>,
    pub why_not: Option<String>,
}

impl ExchangeChoice {
    /// Why, in a line for each way.
    pub fn text(&self) -> String {
        let mut text = format!("exchanges  {} a layer\n", self.chosen.text());
        for way in &self.ways {
            let arrow = if way.exchanges == self.chosen {
                "→"
            } else {
                " "
            };
            let what = match (way.step_s.zip(way.collective_s), &way.why_not) {
                (Some((step_s, collective_s)), _) => format!(
                    "{} a step, {} of it in collectives (predicted)",
                    seconds(step_s),
                    seconds(collective_s)
                ),
                (None, Some(why)) => why.clone(),
                (None, None) => "not tried".into(),
            };
            text += &format!("  {arrow} {:<4} {what}\n", way.exchanges.text());
        }
        text
    }
}

/// The session of the document with the faster way.
///
/// # Errors
/// Neither can be planned; the reason of the usual two exchanges is given.
pub(crate) fn chosen(session: &Session, base: &Path) -> Result<Session> {
    let mut ways = Vec::new();
    let mut best: Option<(f64, Exchanges, Session)> = None;
    let mut failed = None;
    for exchanges in Exchanges::ALL {
        let document = Experts::witnessed(&session.document, exchanges);
        let planned = session.with_document(document, base).and_then(|session| {
            let model = session.model()?;
            let solution = session.plan(&model)?;
            let (program, _) = session.outline(&model, &solution.plan)?;
            Ok((predicted_timeline(&program), session))
        });
        let mut way = Way {
            exchanges,
            step_s: None,
            collective_s: None,
            why_not: None,
        };
        match planned {
            Ok((timeline, session)) => {
                let step_s = timeline.step_s();
                way.step_s = Some(step_s);
                let all_s = timeline.busy_s(Category::Collective);
                way.collective_s = Some(all_s / timeline.n_ranks.max(1) as f64);
                if best.as_ref().is_none_or(|(best_s, ..)| step_s < *best_s) {
                    best = Some((step_s, exchanges, session));
                }
            }
            Err(error) => {
                let first = error.diagnostics.first();
                way.why_not = first.map(|finding| finding.message.clone());
                failed = Some(error);
            }
        }
        ways.push(way);
    }
    let Some((_, chosen, session)) = best else {
        let none = || Error::plain(Class::Internal, "a choice of exchanges without any");
        return Err(failed.unwrap_or_else(none));
    };
    Ok(Session {
        exchanges: Some(ExchangeChoice { chosen, ways }),
        ..session
    })
}
