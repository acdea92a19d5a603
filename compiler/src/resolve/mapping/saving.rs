//! The `memory` block in the words of mappings.
//!
//! Enters: its lines. Leaves: what must, may and must not be computed again or rest in host memory.
//! Invariant: a line about parts of layers decides those parts alone; a line about whole layers decides
//! whole layers, and with `none` also the parts that no other line names.

use std::collections::BTreeSet;

use meshweave_dsl::diagnostics::Diagnostic;
use meshweave_dsl::mapping::Module;
use meshweave_dsl::weave::ast::{
    Choice, MemoryItem, OffloadTo, RecomputePolicy, Selector, Spanned, Target, TensorClass,
};

use super::read::Reader;
use super::restrict::Rule;
use crate::plan::outer::{Space, Whole};

/// The parts of layers by the paths that name them.
pub(super) const PARTS: [(&str, Module); 6] = [
    ("layers[*].attn.core", Module::CoreAttention),
    ("layers[*].attn.mla_up", Module::MlaUp),
    ("layers[*].norm", Module::Norm),
    ("layers[*].mlp", Module::Mlp),
    ("layers[*].moe", Module::Moe),
    ("layers[*].moe.act", Module::MoeActivation),
];

/// What a line about recomputation says.
#[derive(Clone, Debug, PartialEq)]
pub enum Recomputing {
    /// Of whole layers.
    Whole(Vec<Whole>),
    /// Of these parts: whether they may be kept, whether they may be computed again.
    Parts {
        parts: BTreeSet<Module>,
        may_be_kept: bool,
        may_be_again: bool,
    },
}

impl Recomputing {
    pub(super) fn apply(&self, space: &mut Space) {
        match self {
            Self::Whole(choices) => {
                space.whole.retain(|own| match own {
                    Whole::First(_) | Whole::Ranks(_) => {
                        choices.iter().any(|c| matches!(c, Whole::First(_)))
                    }
                    own => choices.contains(own),
                });
                let given = choices
                    .iter()
                    .filter(|choice| matches!(choice, Whole::First(Some(_)) | Whole::Ranks(_)));
                if given.clone().next().is_some() {
                    space.whole.retain(|own| !matches!(own, Whole::First(_)));
                    space.whole.extend(given.cloned());
                }
                // `none` of everything is also none of its parts.
                if choices == &[Whole::None] {
                    space.maybe_again = space.again.clone();
                }
            }
            Self::Parts {
                parts,
                may_be_kept,
                may_be_again,
            } => {
                if !may_be_kept {
                    space.again.extend(parts.iter().copied());
                    space.maybe_again.extend(parts.iter().copied());
                }
                if !may_be_again {
                    space.maybe_again.retain(|part| !parts.contains(part));
                    // Whole layers would compute them again.
                    space.whole.retain(|own| *own == Whole::None);
                }
            }
        }
    }
}

/// What a line about offloading says: parts of what it is about that may rest in host memory.
#[derive(Clone, Debug, PartialEq)]
pub enum Offloading {
    Optimizer(Vec<bool>),
    Activations(Vec<f64>),
}

impl Offloading {
    pub(super) fn apply(&self, space: &mut Space) {
        match self {
            Self::Optimizer(choices) => {
                space.offload_optimizer.retain(|own| choices.contains(own));
            }
            Self::Activations(choices) => space.offload_activations = choices.clone(),
        }
    }
}

impl Reader<'_> {
    pub(super) fn memory(&mut self, item: &Spanned<MemoryItem>) {
        let span = item.span;
        match &item.node {
            MemoryItem::Budget(choice) => {
                let Choice::Fixed(quantity) = choice else {
                    return;
                };
                match quantity.bytes() {
                    Ok(bytes) if bytes.0 > 0 => {
                        let text = format!("budget {quantity}");
                        self.add_as(span, text, Rule::Budget(bytes.0));
                        self.warn_of_budget(item, bytes.0);
                    }
                    Ok(_) => self.invalid(span, "a budget of nothing".into(), "raise it"),
                    Err(error) => self.invalid(span, format!("`budget`: {error}"), "raise it"),
                }
            }
            MemoryItem::Headroom(choice) => {
                let Choice::Fixed(quantity) = choice else {
                    return;
                };
                match quantity.ratio() {
                    Ok(part) if (0.0..1.0).contains(&part.0) => {
                        let text = format!("headroom {quantity}");
                        self.add_as(span, text, Rule::Headroom(part.0));
                    }
                    _ => self.invalid(
                        span,
                        format!("a headroom of {quantity} leaves no memory"),
                        "write a part of the memory, as in `headroom 5 %`",
                    ),
                }
            }
            MemoryItem::Recompute(line) => {
                let text = format!("recompute {} = {}", line.on, line.policy);
                let found = self.recomputing(&line.on, &line.policy);
                if let Some(found) = found {
                    self.add_as(span, text, Rule::Recompute(found));
                }
            }
            MemoryItem::Offload(line) => {
                let text = format!("offload {} = {}", line.on, line.to);
                let choices: Vec<OffloadTo> = match &line.to {
                    Choice::Fixed(to) => vec![*to],
                    Choice::Auto { among, .. } => among.clone(),
                };
                if choices.is_empty() {
                    return;
                }
                let part = |to: &OffloadTo| match to {
                    OffloadTo::None => 0.0,
                    OffloadTo::Host => 1.0,
                    OffloadTo::Part(part) => part.ratio().map_or(1.0, |part| part.0),
                };
                let parts: Vec<f64> = choices.iter().map(part).collect();
                let found = match &line.on.node {
                    Target::Class(TensorClass::Optimizer) => {
                        if parts.iter().any(|part| *part != 0.0 && *part != 1.0) {
                            return self
                                .refuse(span, "a part of the optimizer state cannot be offloaded");
                        }
                        Offloading::Optimizer(parts.iter().map(|part| *part > 0.0).collect())
                    }
                    Target::Class(TensorClass::Activations)
                        if parts.iter().all(|part| (0.0..=1.0).contains(part)) =>
                    {
                        Offloading::Activations(parts)
                    }
                    other => {
                        return self.refuse(
                            span,
                            &format!("`{other}` cannot be offloaded: only `optimizer` and `activations` can"),
                        );
                    }
                };
                self.add_as(span, text, Rule::Offload(found));
            }
        }
    }

    /// A budget beyond the device is an error.
    fn warn_of_budget(&mut self, item: &Spanned<MemoryItem>, bytes: u64) {
        let device = &self.request.cluster.device;
        if bytes > device.memory_bytes {
            let has = meshweave_dsl::units::Bytes(device.memory_bytes);
            let budget = meshweave_dsl::units::Bytes(bytes);
            self.diagnostics.push(
                Diagnostic::invalid(format!(
                    "the budget is {budget}, but device `{}` has {has}",
                    device.name
                ))
                .code("W103")
                .at(item.span, "")
                .help("lower the budget, or write `budget auto` for all of the memory"),
            );
        }
    }

    fn recomputing(
        &mut self,
        on: &Spanned<Selector>,
        policy: &Choice<RecomputePolicy>,
    ) -> Option<Recomputing> {
        let choices: Vec<RecomputePolicy> = match policy {
            Choice::Fixed(policy) => vec![policy.clone()],
            Choice::Auto { among, .. } => among.clone(),
        };
        if choices.is_empty() {
            return None;
        }
        if on.node == Selector::everything() || on.matches("layers[0]") {
            let mut whole = Vec::new();
            for choice in &choices {
                whole.push(match choice {
                    RecomputePolicy::None => Whole::None,
                    RecomputePolicy::Full => Whole::Full,
                    RecomputePolicy::First(counts) => match counts.as_slice() {
                        [count] => Whole::First(usize::try_from(*count).ok()),
                        counts => Whole::Ranks(
                            counts
                                .iter()
                                .map(|count| usize::try_from(*count).unwrap_or(usize::MAX))
                                .collect(),
                        ),
                    },
                });
            }
            return Some(Recomputing::Whole(whole));
        }
        let is_part = |path: &str| on.matches(&path.replace("[*]", "[0]"));
        let parts: BTreeSet<Module> = PARTS
            .iter()
            .filter(|(path, _)| is_part(path))
            .map(|(_, part)| *part)
            .collect();
        if parts.is_empty() {
            let known = PARTS.map(|(path, _)| path);
            self.invalid(
                on.span,
                format!(
                    "`{}` is no part of a layer that can be computed again",
                    on.node
                ),
                &format!("write `layers[*]`, or a part: {}", known.join(", ")),
            );
            return None;
        }
        if choices
            .iter()
            .any(|choice| matches!(choice, RecomputePolicy::First(_)))
        {
            self.refuse(on.span, "`first` is for whole layers");
            return None;
        }
        Some(Recomputing::Parts {
            parts,
            may_be_kept: choices.contains(&RecomputePolicy::None),
            may_be_again: choices.contains(&RecomputePolicy::Full),
        })
    }
}
