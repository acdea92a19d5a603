//! The builders of statements with a block, and of `solve`.
//!
//! Invariant: lines appear in the order of the calls.

use super::super::ast::{
    Block, Choice, Definition, Dispatch, Exchanges, ExpertsItem, Goal, MemoryItem, Offload,
    OffloadTo, Pipeline, PipelineItem, Placement, Recompute, RecomputePolicy, Reference,
    SettingLine, Shard, Solve, Spanned, TacticDef, TacticItem,
};
use super::part::{IntoValue, Problems, apply, forbid, pin, prefer, read_all, selectors, setting};
use crate::units::Quantity;

/// The lines of a `model` or `cluster`.
#[derive(Debug, Clone)]
pub struct DefinitionBuilder {
    base: Option<Reference>,
    lines: Vec<SettingLine>,
    problems: Problems,
}

impl DefinitionBuilder {
    pub(super) fn new(base: Option<Reference>) -> Self {
        Self {
            base,
            lines: Vec::new(),
            problems: Problems::default(),
        }
    }

    /// The preset or family that the settings change.
    #[must_use]
    pub fn base(mut self, base: impl Into<Reference>) -> Self {
        self.base = Some(base.into());
        self
    }

    /// A line with one setting.
    #[must_use]
    pub fn set(mut self, key: &str, values: impl IntoValue) -> Self {
        let setting = setting(key, values, &mut self.problems);
        self.lines.extend(setting.map(|setting| SettingLine {
            settings: vec![setting.into()],
        }));
        self
    }

    /// Another setting on the last line, as in `link nvlink 450 GB/s within node`.
    #[must_use]
    pub fn and(mut self, key: &str, values: impl IntoValue) -> Self {
        let setting = setting(key, values, &mut self.problems);
        match (self.lines.last_mut(), setting) {
            (Some(line), Some(setting)) => line.settings.push(setting.into()),
            (None, Some(_)) => self.problems.add(format!("`{key}` needs a line before it")),
            (_, None) => {}
        }
        self
    }

    pub(super) fn finish(self, name: &str, problems: &mut Problems) -> Option<Definition> {
        problems.0.extend(self.problems.0);
        Some(Definition {
            name: problems.read(name, |p| p.name())?.into(),
            base: self.base.map(Spanned::from),
            body: Block::of(self.lines),
        })
    }
}

/// The lines of a `tactic`.
#[derive(Debug, Clone, Default)]
pub struct TacticBuilder {
    items: Vec<TacticItem>,
    problems: Problems,
}

impl TacticBuilder {
    /// `shard DIMS over AXES on TARGETS`
    #[must_use]
    pub fn shard<'a>(
        self,
        dims: impl IntoIterator<Item = &'a str>,
        over: impl IntoIterator<Item = &'a str>,
        on: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        self.shard_except(dims, over, on, [])
    }

    /// `shard DIMS over AXES on TARGETS except SELECTORS`
    #[must_use]
    pub fn shard_except<'a>(
        mut self,
        dims: impl IntoIterator<Item = &'a str>,
        over: impl IntoIterator<Item = &'a str>,
        on: impl IntoIterator<Item = &'a str>,
        except: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let shard = Shard {
            dims: read_all(dims, |p| p.name(), &mut self.problems),
            over: read_all(over, |p| p.axis_ref(), &mut self.problems),
            on: read_all(on, |p| p.target(), &mut self.problems),
            except: selectors(except, &mut self.problems),
        };
        if shard.dims.is_empty() || shard.over.is_empty() || shard.on.is_empty() {
            self.problems
                .add("`shard` needs at least one dim, one axis and one target");
        }
        self.items.push(TacticItem::Shard(shard));
        self
    }

    /// `apply TACTIC(ARGS)`
    #[must_use]
    pub fn apply<'a>(mut self, tactic: &str, args: impl IntoIterator<Item = &'a str>) -> Self {
        let apply = apply(tactic, args, [], &mut self.problems);
        self.items.extend(apply.map(TacticItem::Apply));
        self
    }

    /// `pin SELECTOR : LAYOUT`
    #[must_use]
    pub fn pin<'a>(mut self, on: &str, layout: impl Into<Choice<&'a str>>) -> Self {
        let pin = pin(on, layout.into(), &mut self.problems);
        self.items.extend(pin.map(TacticItem::Pin));
        self
    }

    /// `forbid SELECTOR : LAYOUT`
    #[must_use]
    pub fn forbid(mut self, on: &str, layout: &str) -> Self {
        let forbid = forbid(on, layout, &mut self.problems);
        self.items.extend(forbid.map(TacticItem::Forbid));
        self
    }

    /// `prefer SELECTOR.KEY = BEST over NEXT …`
    #[must_use]
    pub fn prefer<'a>(
        mut self,
        on: &str,
        ranking: impl IntoIterator<Item = &'a str>,
        weight: Option<f64>,
    ) -> Self {
        let prefer = prefer(on, ranking, weight, &mut self.problems);
        self.items.extend(prefer.map(TacticItem::Prefer));
        self
    }

    pub(super) fn finish(
        self,
        name: &str,
        params: &[&str],
        problems: &mut Problems,
    ) -> Option<TacticDef> {
        problems.0.extend(self.problems.0);
        Some(TacticDef {
            name: problems.read(name, |p| p.name())?.into(),
            params: read_all(params.iter().copied(), |p| p.name(), problems),
            body: Block::of(self.items),
        })
    }
}

/// The lines of a `pipeline`.
#[derive(Debug, Clone, Default)]
pub struct PipelineBuilder {
    items: Vec<PipelineItem>,
    problems: Problems,
}

impl PipelineBuilder {
    /// `chunks N`
    #[must_use]
    pub fn chunks(mut self, chunks: impl Into<Choice<u64>>) -> Self {
        self.items.push(PipelineItem::Chunks(chunks.into()));
        self
    }

    /// `cut before SELECTORS`
    #[must_use]
    pub fn cut_before<'a>(mut self, selectors: impl IntoIterator<Item = &'a str>) -> Self {
        let cuts = self::selectors(selectors, &mut self.problems);
        if cuts.is_empty() {
            self.problems.add("`cut before` needs a selector");
        }
        self.items
            .push(PipelineItem::CutBefore(Choice::Fixed(cuts)));
        self
    }

    /// `cut before auto`
    #[must_use]
    pub fn cut_auto(mut self) -> Self {
        self.items.push(PipelineItem::CutBefore(Choice::auto()));
        self
    }

    /// `schedule NAME`
    #[must_use]
    pub fn schedule<'a>(mut self, schedule: impl Into<Choice<&'a str>>) -> Self {
        let schedule = self.problems.read_choice(schedule.into(), |p| p.name());
        self.items.extend(schedule.map(PipelineItem::Schedule));
        self
    }

    /// `microbatches N`
    #[must_use]
    pub fn microbatches(mut self, microbatches: impl Into<Choice<u64>>) -> Self {
        self.items
            .push(PipelineItem::Microbatches(microbatches.into()));
        self
    }

    /// `slices N`
    #[must_use]
    pub fn slices(mut self, slices: impl Into<Choice<u64>>) -> Self {
        self.items.push(PipelineItem::Slices(slices.into()));
        self
    }

    /// `ranks (0,1,1,0)`: the rank of every stage.
    #[must_use]
    pub fn ranks(mut self, ranks: impl IntoIterator<Item = u64>) -> Self {
        let ranks: Vec<u64> = ranks.into_iter().collect();
        if ranks.is_empty() {
            self.problems.add("`ranks` needs a rank for every stage");
        }
        self.items.push(PipelineItem::Ranks(ranks));
        self
    }

    /// `empty stages`
    #[must_use]
    pub fn empty_stages(mut self) -> Self {
        self.items.push(PipelineItem::EmptyStages);
        self
    }

    pub(super) fn finish(self, over: &str, problems: &mut Problems) -> Option<Pipeline> {
        problems.0.extend(self.problems.0);
        Some(Pipeline {
            over: problems.read(over, |p| p.axis_ref())?.into(),
            body: Block::of(self.items),
        })
    }
}

/// The lines of `memory`.
#[derive(Debug, Clone, Default)]
pub struct MemoryBuilder {
    items: Vec<MemoryItem>,
    problems: Problems,
}

impl MemoryBuilder {
    /// `budget BYTES`, a device.
    #[must_use]
    pub fn budget(mut self, budget: impl Into<Choice<Quantity>>) -> Self {
        self.items.push(MemoryItem::Budget(budget.into()));
        self
    }

    /// `headroom PERCENT` of the device's memory.
    #[must_use]
    pub fn headroom(mut self, headroom: impl Into<Choice<Quantity>>) -> Self {
        self.items.push(MemoryItem::Headroom(headroom.into()));
        self
    }

    /// `recompute SELECTOR = POLICY`
    #[must_use]
    pub fn recompute(mut self, on: &str, policy: impl Into<Choice<RecomputePolicy>>) -> Self {
        if let Some(on) = self.problems.read(on, |p| p.selector()) {
            self.items.push(MemoryItem::Recompute(Recompute {
                on: on.into(),
                policy: policy.into(),
                overrides: false,
            }));
        }
        self
    }

    /// `offload TARGET = PLACE`
    #[must_use]
    pub fn offload(mut self, on: &str, to: impl Into<Choice<OffloadTo>>) -> Self {
        if let Some(on) = self.problems.read(on, |p| p.target()) {
            self.items.push(MemoryItem::Offload(Offload {
                on: on.into(),
                to: to.into(),
                overrides: false,
            }));
        }
        self
    }

    pub(super) fn finish(self, problems: &mut Problems) -> Block<MemoryItem> {
        problems.0.extend(self.problems.0);
        Block::of(self.items)
    }
}

/// The lines of `experts`.
#[derive(Debug, Clone, Default)]
pub struct ExpertsBuilder {
    items: Vec<ExpertsItem>,
    problems: Problems,
}

impl ExpertsBuilder {
    /// `placement METHOD`
    #[must_use]
    pub fn placement<'a>(self, method: impl Into<Choice<&'a str>>) -> Self {
        self.any_placement(method.into(), None, None)
    }

    /// `placement METHOD trace "FILE"`
    #[must_use]
    pub fn placement_from<'a>(self, method: impl Into<Choice<&'a str>>, trace: &str) -> Self {
        self.any_placement(method.into(), Some(trace), None)
    }

    /// `placement METHOD trace "FILE" slots N`
    #[must_use]
    pub fn placement_in_slots<'a>(
        self,
        method: impl Into<Choice<&'a str>>,
        trace: &str,
        slots: u64,
    ) -> Self {
        self.any_placement(method.into(), Some(trace), Some(slots))
    }

    fn any_placement(
        mut self,
        method: Choice<&str>,
        trace: Option<&str>,
        slots: Option<u64>,
    ) -> Self {
        if let Some(method) = self.problems.read_choice(method, |p| p.name()) {
            self.items.push(ExpertsItem::Placement(Placement {
                method,
                trace: trace.map(|file| file.to_owned().into()),
                slots: slots.map(Into::into),
            }));
        }
        self
    }

    /// `dispatch HOW`
    #[must_use]
    pub fn dispatch(mut self, dispatch: impl Into<Choice<Dispatch>>) -> Self {
        self.items.push(ExpertsItem::Dispatch(dispatch.into()));
        self
    }

    /// `exchanges one | two`
    #[must_use]
    pub fn exchanges(mut self, exchanges: impl Into<Choice<Exchanges>>) -> Self {
        self.items.push(ExpertsItem::Exchanges(exchanges.into()));
        self
    }

    pub(super) fn finish(self, problems: &mut Problems) -> Block<ExpertsItem> {
        problems.0.extend(self.problems.0);
        Block::of(self.items)
    }
}

/// A `solve` statement.
#[derive(Debug, Clone)]
pub struct SolveBuilder {
    goal: Goal,
    objective: String,
    within: Option<Quantity>,
    gap: Option<Quantity>,
}

/// `solve minimize OBJECTIVE`
pub fn minimize(objective: &str) -> SolveBuilder {
    SolveBuilder {
        goal: Goal::Minimize,
        objective: objective.to_owned(),
        within: None,
        gap: None,
    }
}

/// `solve maximize OBJECTIVE`
pub fn maximize(objective: &str) -> SolveBuilder {
    SolveBuilder {
        goal: Goal::Maximize,
        ..minimize(objective)
    }
}

impl SolveBuilder {
    /// `within TIME`
    #[must_use]
    pub fn within(mut self, time: Quantity) -> Self {
        self.within = Some(time);
        self
    }

    /// `gap PERCENT`
    #[must_use]
    pub fn gap(mut self, ratio: Quantity) -> Self {
        self.gap = Some(ratio);
        self
    }

    pub(super) fn finish(self, problems: &mut Problems) -> Option<Solve> {
        Some(Solve {
            goal: self.goal,
            objective: problems.read(&self.objective, |p| p.name())?.into(),
            within: self.within,
            gap: self.gap,
        })
    }
}
