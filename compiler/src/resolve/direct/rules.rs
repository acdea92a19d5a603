//! Decisions as rules of the planner.
//!
//! Enters: what is settled, bans and preferences. Leaves: rules with the statement that each comes from.
//! Invariant: no rule asks for what another forbids, unless an `override` lifts the ban.

use std::collections::BTreeMap;

use meshweave_dsl::diagnostics::Diagnostic;
use meshweave_dsl::graph::TensorId;
use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::name::{Axis, Dim};

use super::super::select::tied;
use super::{Claim, Claims, Decision, Said, Settled};
use crate::plan::directives::{Demand, DimPattern, Pattern, Rule, Subject};

impl Claims<'_> {
    /// The decisions as rules, and those that are forbidden.
    pub(super) fn rules(&mut self, settled: &Settled) -> Vec<Rule> {
        let mut rules = Vec::new();
        for (id, dims) in settled {
            let mut by_claims: BTreeMap<&[usize], Pattern> = BTreeMap::new();
            for (dim, decision) in dims {
                let is_shard = |idx: &usize| matches!(self.claims[*idx].said, Said::Shard { .. });
                if let DimPattern::Axes(axes) = &decision.pattern
                    && decision.claims.iter().all(is_shard)
                {
                    // Other axes may divide the tensor too, or leave it partial.
                    rules.extend(axes.iter().filter_map(|axis| {
                        let dims = vec![dim.clone()];
                        let axis = axis.clone();
                        self.rule(*id, &decision.claims, Demand::Over { axis, dims })
                    }));
                    continue;
                }
                let pattern = by_claims.entry(&decision.claims).or_default();
                pattern.dims.insert(dim.clone(), decision.pattern.clone());
            }
            let mut partial: BTreeMap<usize, Vec<(ReduceKind, Axis)>> = BTreeMap::new();
            for (claim_idx, claim) in self.claims.iter().enumerate() {
                if let Said::Pin(pattern, subjects) = &claim.said
                    && !pattern.partial.is_empty()
                    && subjects.contains(id)
                {
                    partial.insert(claim_idx, pattern.partial.clone());
                }
            }
            for (claim_idxs, mut pattern) in by_claims {
                let own = claim_idxs.first().and_then(|first| partial.remove(first));
                pattern.partial = own.unwrap_or_default();
                rules.extend(self.rule(*id, claim_idxs, Demand::Pin(pattern)));
            }
            for (claim_idx, partial) in partial {
                let pattern = Pattern {
                    dims: BTreeMap::new(),
                    partial,
                };
                rules.extend(self.rule(*id, &[claim_idx], Demand::Pin(pattern)));
            }
        }
        self.refuse_forbidden(settled);
        rules
    }

    fn rule(&self, id: TensorId, claim_idxs: &[usize], demand: Demand) -> Option<Rule> {
        let mut texts: Vec<&str> = Vec::new();
        for claim_idx in claim_idxs {
            let text = self.claims.get(*claim_idx)?.origin.text.as_str();
            if !texts.contains(&text) {
                texts.push(text);
            }
        }
        Some(Rule {
            subject: Subject::Tensor(id),
            demand,
            span: self.claims.get(*claim_idxs.first()?)?.origin.span,
            text: texts.join("; "),
        })
    }

    /// Reports decisions that another statement forbids; `override` lifts a ban.
    fn refuse_forbidden(&mut self, settled: &Settled) {
        let mut findings = Vec::new();
        let mut lifted: Vec<(usize, TensorId)> = Vec::new();
        for (claim_idx, claim) in self.claims.iter().enumerate() {
            let Said::Forbid(pattern, subjects) = &claim.said else {
                continue;
            };
            let mut is_reported = false;
            for id in subjects {
                let Some(dims) = settled.get(id) else {
                    continue;
                };
                let culprit = forbidden_by(pattern, dims);
                let Some(culprit) = culprit.and_then(|idx| self.claims.get(idx)) else {
                    continue;
                };
                if culprit.overrides && !claim.overrides {
                    lifted.push((claim_idx, *id));
                } else if !is_reported {
                    is_reported = true;
                    findings.push(
                        Diagnostic::invalid(format!(
                            "what one statement asks of {}, another forbids",
                            tied(self.scene.name(*id))
                        ))
                        .code("W111")
                        .at(claim.origin.span, "forbidden here")
                        .also(culprit.origin.span, "asked for here")
                        .help("remove one, or end the pin with `override`"),
                    );
                }
            }
        }
        self.diagnostics.extend(findings);
        for (claim_idx, id) in lifted {
            if let Some(Claim {
                said: Said::Forbid(_, subjects),
                ..
            }) = self.claims.get_mut(claim_idx)
            {
                subjects.retain(|other| *other != id);
            }
        }
    }
}

/// The claim behind a decision that makes a forbidden layout certain.
fn forbidden_by(pattern: &Pattern, dims: &BTreeMap<Dim, Decision>) -> Option<usize> {
    if pattern.dims.is_empty() || !pattern.partial.is_empty() {
        return None;
    }
    let mut culprit = None;
    for (dim, forbidden) in &pattern.dims {
        let decision = dims.get(dim)?;
        let is_met = match (forbidden, &decision.pattern) {
            (DimPattern::AnyAxis, DimPattern::Axes(_)) => true,
            (forbidden, decided) => forbidden == decided && *decided != DimPattern::Open,
        };
        if !is_met {
            return None;
        }
        if culprit.is_none() || *forbidden != DimPattern::Unsharded {
            culprit = decision.claims.first().copied();
        }
    }
    culprit
}

/// Bans and preferences as rules.
pub(super) fn demands(claims: &[Claim]) -> Vec<Rule> {
    let mut rules = Vec::new();
    for claim in claims {
        let (subjects, demands): (&[TensorId], Vec<Demand>) = match &claim.said {
            Said::Forbid(pattern, subjects) => (subjects, vec![Demand::Forbid(pattern.clone())]),
            Said::Prefer(ranking, subjects) => {
                let demand =
                    |(pattern, weight): &(Pattern, f64)| Demand::Prefer(pattern.clone(), *weight);
                (subjects, ranking.iter().map(demand).collect())
            }
            Said::Shard { .. } | Said::Pin(..) => continue,
        };
        for id in subjects {
            rules.extend(demands.iter().map(|demand| Rule {
                subject: Subject::Tensor(*id),
                demand: demand.clone(),
                span: claim.origin.span,
                text: claim.origin.text.clone(),
            }));
        }
    }
    rules
}
