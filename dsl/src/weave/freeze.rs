//! Freezing and thawing: from intent with witnesses to decisions, and back to intent alone.
//!
//! Enters: a document. Leaves: a new one. `freeze` replaces each `auto := w` by `w` and keeps an
//! `auto` without a witness; `thaw` drops the witnesses.
//! Invariant: both are idempotent, and neither touches fixed values; comments stay, save those of
//! the `place` and `keep` statements that `thaw` removes.

use super::ast::{
    Block, Choice, Degree, Document, ExpertsItem, Layout, MemoryItem, PipelineItem, Setting,
    Spanned, Split, Statement, TacticItem, Trivia,
};

/// Which of the two.
#[derive(Clone, Copy)]
enum Step {
    Freeze,
    Thaw,
}

impl Document {
    /// Every hole with a witness becomes that value; the other holes stay.
    #[must_use]
    pub fn freeze(&self) -> Document {
        self.settled(Step::Freeze)
    }

    /// Every witness is dropped, and with them what a plan says of single ops (`place`, `keep`).
    #[must_use]
    pub fn thaw(&self) -> Document {
        let mut document = self.settled(Step::Thaw);
        document.drop_plan();
        document
    }

    /// Removes `place` and `keep`, with the comments above the first of them.
    pub fn drop_plan(&mut self) {
        let body = &mut self.body;
        let is_plan =
            |statement: &Statement| matches!(statement, Statement::Place(_) | Statement::Keep(_));
        body.lines.retain(|line| !is_plan(&line.item));
        if let Some(first) = body.lines.first_mut()
            && first.lead.first() == Some(&Trivia::Blank)
        {
            first.lead.remove(0);
        }
        if body.lines.is_empty() && body.tail.first() == Some(&Trivia::Blank) {
            body.tail.remove(0);
        }
    }

    fn settled(&self, step: Step) -> Document {
        let mut document = self.clone();
        document.body.settle(step);
        document
    }
}

/// What may have holes in it.
trait Settle {
    fn settle(&mut self, step: Step);
}

impl<T: Settle> Settle for Block<T> {
    fn settle(&mut self, step: Step) {
        for line in &mut self.lines {
            line.item.node.settle(step);
        }
    }
}

impl<T: Settle> Settle for Spanned<T> {
    fn settle(&mut self, step: Step) {
        self.node.settle(step);
    }
}

impl<T: Settle> Settle for Vec<T> {
    fn settle(&mut self, step: Step) {
        for item in self {
            item.settle(step);
        }
    }
}

impl<T> Settle for Choice<T> {
    fn settle(&mut self, step: Step) {
        let Self::Auto { witness, .. } = self else {
            return;
        };
        // In both cases the witness leaves its place.
        let witness = witness.take();
        if let (Step::Freeze, Some(value)) = (step, witness) {
            *self = Self::Fixed(value);
        }
    }
}

impl Settle for Degree {
    fn settle(&mut self, step: Step) {
        match self {
            Self::Is(choice) => choice.settle(step),
            Self::Rest { witness } | Self::Same { witness } => {
                let witness = witness.take();
                if let (Step::Freeze, Some(degree)) = (step, witness) {
                    *self = Self::Is(Choice::Fixed(degree));
                }
            }
        }
    }
}

impl Settle for Layout {
    fn settle(&mut self, step: Step) {
        for dim in &mut self.dims {
            let Split::Open { witness } = &mut dim.split else {
                continue;
            };
            let witness = witness.take();
            if let (Step::Freeze, Some(axes)) = (step, witness) {
                dim.split = if axes.is_empty() {
                    Split::Whole
                } else {
                    Split::Axes(axes)
                };
            }
        }
    }
}

impl Settle for Setting {
    fn settle(&mut self, step: Step) {
        self.values.settle(step);
    }
}

/// A pin may be a hole as a whole, or have open dims in its layout (after freezing, too).
fn settle_layout(layout: &mut Choice<Layout>, step: Step) {
    layout.settle(step);
    match layout {
        Choice::Fixed(layout) => layout.settle(step),
        Choice::Auto { among, witness } => {
            among.settle(step);
            if let Some(witness) = witness {
                witness.settle(step);
            }
        }
    }
}

impl Settle for Statement {
    fn settle(&mut self, step: Step) {
        match self {
            Self::Model(definition) | Self::Cluster(definition) => {
                for line in &mut definition.body.lines {
                    line.item.node.settings.settle(step);
                }
            }
            Self::Train(job) | Self::Infer(job) => job.settings.settle(step),
            Self::Mesh(mesh) => {
                for axis in &mut mesh.axes {
                    axis.node.degree.settle(step);
                }
                if let Some(nodes) = &mut mesh.on {
                    nodes.node.settle(step);
                }
            }
            Self::Tactic(tactic) => tactic.body.settle(step),
            Self::Apply(apply) => apply.args.settle(step),
            Self::Pin(pin) => settle_layout(&mut pin.layout.node, step),
            Self::Pipeline(pipeline) => pipeline.body.settle(step),
            Self::Memory(block) => block.settle(step),
            Self::Experts(block) => block.settle(step),
            Self::Plan(_)
            | Self::Data(_)
            | Self::Init(_)
            | Self::Use(_)
            | Self::Forbid(_)
            | Self::Prefer(_)
            | Self::Place(_)
            | Self::Keep(_)
            | Self::Schedule(_)
            | Self::Solve(_) => {}
        }
    }
}

impl Settle for TacticItem {
    fn settle(&mut self, step: Step) {
        match self {
            Self::Apply(apply) => apply.args.settle(step),
            Self::Pin(pin) => settle_layout(&mut pin.layout.node, step),
            Self::Shard(_) | Self::Forbid(_) | Self::Prefer(_) => {}
        }
    }
}

impl Settle for PipelineItem {
    fn settle(&mut self, step: Step) {
        match self {
            Self::Chunks(choice) | Self::Microbatches(choice) | Self::Slices(choice) => {
                choice.settle(step);
            }
            Self::CutBefore(choice) => choice.settle(step),
            Self::Schedule(choice) => choice.settle(step),
            Self::Ranks(_) | Self::EmptyStages => {}
        }
    }
}

impl Settle for MemoryItem {
    fn settle(&mut self, step: Step) {
        match self {
            Self::Budget(choice) | Self::Headroom(choice) => choice.settle(step),
            Self::Recompute(item) => item.policy.settle(step),
            Self::Offload(item) => item.to.settle(step),
        }
    }
}

impl Settle for ExpertsItem {
    fn settle(&mut self, step: Step) {
        match self {
            Self::Placement(placement) => placement.method.settle(step),
            Self::Dispatch(choice) => choice.settle(step),
            Self::Exchanges(choice) => choice.settle(step),
        }
    }
}
