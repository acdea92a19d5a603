//! One decision a dim of every tensor, where claims overlap.
//!
//! Enters: claims. Leaves: [`Settled`], with the claims behind each decision.
//! Invariant: the claim about fewer tensors holds, or the one that says `override`; neither is a finding.

use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::diagnostics::Diagnostic;
use meshweave_dsl::graph::{Role, TensorId};
use meshweave_dsl::name::{Axis, Dim};

use super::super::select::tied;
use super::{Claims, Decision, Said, Settled};
use crate::plan::directives::DimPattern;

impl Claims<'_> {
    /// Gives `largest` a dim for each of its tensors: the largest that nothing else divides.
    pub(super) fn choose_largest(&mut self) {
        let n_before = self.diagnostics.len();
        let settled = self.settle();
        // Contradictions are reported once, when everything is known.
        self.diagnostics.truncate(n_before);
        let graph = self.scene.graph;
        let params_of_updates: BTreeMap<TensorId, TensorId> = graph
            .updates
            .iter()
            .map(|(param, update)| (*update, *param))
            .collect();
        let candidates = &self.meshes.candidates;
        for claim in &mut self.claims {
            let Said::Shard {
                axes,
                dims,
                largest,
            } = &mut claim.said
            else {
                continue;
            };
            let n_parts = candidates
                .iter()
                .map(|mesh| axes.iter().map(|axis| mesh.degree(axis)).product::<usize>())
                .max()
                .unwrap_or(1);
            for id in largest.iter() {
                let owner = match &graph.tensor(*id).role {
                    Role::State { of } => *of,
                    _ => params_of_updates.get(id).copied().unwrap_or(*id),
                };
                let is_taken = |dim: &Dim| {
                    [*id, owner].iter().any(|id| {
                        let decision = settled.get(id).and_then(|dims| dims.get(dim));
                        decision.is_some_and(|d| matches!(d.pattern, DimPattern::Axes(_)))
                    })
                };
                let shape = &graph.ty(*id).shape;
                // The first of the largest; a dim that is divided already only when all are.
                let best = shape
                    .iter()
                    .filter(|(_, size)| *size >= n_parts)
                    .rev()
                    .max_by_key(|(dim, size)| (!is_taken(dim), *size));
                if let Some((dim, _)) = best {
                    dims.insert(*id, dim.clone());
                }
            }
        }
    }

    /// What holds for every tensor, after contradictions are resolved or reported.
    pub(super) fn settle(&mut self) -> Settled {
        let mut by_tensor: BTreeMap<TensorId, Vec<usize>> = BTreeMap::new();
        for (claim_idx, claim) in self.claims.iter().enumerate() {
            match &claim.said {
                Said::Shard { dims, .. } => {
                    for id in dims.keys() {
                        by_tensor.entry(*id).or_default().push(claim_idx);
                    }
                }
                Said::Pin(_, subjects) => {
                    for id in subjects {
                        by_tensor.entry(*id).or_default().push(claim_idx);
                    }
                }
                Said::Forbid(..) | Said::Prefer(..) => {}
            }
        }
        let mut reported = BTreeSet::new();
        let mut settled = Settled::new();
        for (id, claim_idxs) in by_tensor {
            let dims = self.settle_tensor(id, &claim_idxs, &mut reported);
            settled.insert(id, dims);
        }
        settled
    }

    fn settle_tensor(
        &mut self,
        id: TensorId,
        claim_idxs: &[usize],
        reported: &mut BTreeSet<(usize, usize)>,
    ) -> BTreeMap<Dim, Decision> {
        let mut pinned: BTreeMap<&Dim, Vec<Decision>> = BTreeMap::new();
        let mut shards: BTreeMap<&Dim, Vec<usize>> = BTreeMap::new();
        for claim_idx in claim_idxs {
            match &self.claims[*claim_idx].said {
                Said::Shard { dims, .. } => {
                    if let Some(dim) = dims.get(&id) {
                        shards.entry(dim).or_default().push(*claim_idx);
                    }
                }
                Said::Pin(pattern, _) => {
                    for (dim, split) in &pattern.dims {
                        pinned.entry(dim).or_default().push(Decision {
                            pattern: split.clone(),
                            claims: vec![*claim_idx],
                        });
                    }
                }
                Said::Forbid(..) | Said::Prefer(..) => {}
            }
        }
        let mut contradictions: Vec<(usize, usize)> = Vec::new();
        let mut decided: BTreeMap<Dim, Decision> = BTreeMap::new();
        let all: BTreeSet<&Dim> = pinned.keys().chain(shards.keys()).copied().collect();
        for dim in all {
            let mut rivals = pinned.get(dim).cloned().unwrap_or_default();
            if let Some(claims) = shards.get(dim) {
                rivals.push(Decision {
                    pattern: DimPattern::Axes(self.together(claims)),
                    claims: claims.clone(),
                });
            }
            let mut winner: Option<Decision> = None;
            for rival in rivals {
                winner = Some(match winner {
                    None => rival,
                    Some(first) => self.stronger(first, rival, &mut contradictions),
                });
            }
            if let Some(winner) = winner {
                decided.insert(dim.clone(), winner);
            }
        }
        self.one_dim_an_axis(&mut decided, &mut contradictions);
        for (a, b) in contradictions {
            if reported.insert((a, b)) {
                self.contradiction(id, a, b);
            }
        }
        decided
    }

    /// The axes of several shards of one dim, in the order of the mesh.
    fn together(&self, claims: &[usize]) -> Vec<Axis> {
        let mut named: Vec<&Axis> = Vec::new();
        for claim_idx in claims {
            if let Said::Shard { axes, .. } = &self.claims[*claim_idx].said {
                named.extend(axes);
            }
        }
        if let [only] = claims
            && let Said::Shard { axes, .. } = &self.claims[*only].said
        {
            return axes.clone();
        }
        let mut order = self.meshes.order();
        order.retain(|axis| named.contains(&axis));
        order
    }

    fn stronger(
        &self,
        first: Decision,
        second: Decision,
        contradictions: &mut Vec<(usize, usize)>,
    ) -> Decision {
        if first.pattern == second.pattern {
            let mut claims = first.claims;
            claims.extend(second.claims);
            return Decision {
                pattern: first.pattern,
                claims,
            };
        }
        let beats = |a: &Decision, b: &Decision| {
            let claim = |idx: &usize| &self.claims[*idx];
            a.claims
                .iter()
                .any(|a| b.claims.iter().all(|b| claim(a).beats(claim(b))))
        };
        if beats(&second, &first) {
            return second;
        }
        if beats(&first, &second) || second.pattern == DimPattern::Open {
            return first;
        }
        if first.pattern == DimPattern::Open {
            return second;
        }
        if let (Some(a), Some(b)) = (first.claims.first(), second.claims.first()) {
            contradictions.push((*a, *b));
        }
        first
    }

    /// Takes an axis that divides two dims of a tensor from the weaker claim.
    fn one_dim_an_axis(
        &self,
        decided: &mut BTreeMap<Dim, Decision>,
        contradictions: &mut Vec<(usize, usize)>,
    ) {
        let mut users: BTreeMap<Axis, Vec<Dim>> = BTreeMap::new();
        for (dim, decision) in &*decided {
            if let DimPattern::Axes(axes) = &decision.pattern {
                for axis in axes {
                    users.entry(axis.clone()).or_default().push(dim.clone());
                }
            }
        }
        for (axis, dims) in users {
            let [first, second, ..] = dims.as_slice() else {
                continue;
            };
            let claim_of = |dim: &Dim| {
                let claims = decided.get(dim).map(|decision| decision.claims.as_slice());
                let names = |idx: &&usize| match &self.claims[**idx].said {
                    Said::Shard { axes, .. } => axes.contains(&axis),
                    _ => true,
                };
                claims.unwrap_or_default().iter().find(names).copied()
            };
            let (Some(a), Some(b)) = (claim_of(first), claim_of(second)) else {
                continue;
            };
            let loser = if self.claims[a].beats(&self.claims[b]) {
                second
            } else if self.claims[b].beats(&self.claims[a]) {
                first
            } else {
                contradictions.push((a, b));
                continue;
            };
            let is_empty = decided.get_mut(loser).is_some_and(|decision| {
                let DimPattern::Axes(axes) = &mut decision.pattern else {
                    return false;
                };
                axes.retain(|other| *other != axis);
                axes.is_empty()
            });
            if is_empty {
                decided.remove(loser);
            }
        }
    }

    fn contradiction(&mut self, id: TensorId, a: usize, b: usize) {
        let (first, second) = (&self.claims[a], &self.claims[b]);
        let (Some(one), Some(two)) = (first.says_of(id), second.says_of(id)) else {
            return;
        };
        let what = match first.origin == second.origin {
            true => format!(
                "`{}` contradicts itself about {}: [{one}] and [{two}]",
                first.origin.text,
                tied(self.scene.name(id)),
            ),
            false => format!(
                "two statements contradict each other about {}: [{one}] and [{two}]",
                tied(self.scene.name(id)),
            ),
        };
        let diagnostic = Diagnostic::invalid(what)
            .code("W111")
            .at(second.origin.span, format!("[{two}] here"))
            .also(first.origin.span, format!("[{one}] here"))
            .help("end the one that is to hold with `override`, make it about fewer tensors, or take tensors out with `except`");
        self.diagnostics.push(diagnostic);
    }
}
