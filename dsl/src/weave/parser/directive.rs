//! Directives: use, tactics, apply, pin, forbid, prefer.

use super::block::BlockKind;
use super::{Empty, Parse, Parser};
use crate::diagnostics::Diagnostic;
use crate::weave::ast::{
    Apply, Call, Forbid, Keep, Name, Pin, Place, Prefer, Shard, Spanned, TacticDef, TacticItem,
    UseMesh,
};

const TACTIC: BlockKind = BlockKind {
    name: "tactic",
    keywords: &["shard", "apply", "pin", "forbid", "prefer"],
};

impl<'a> Parser<'a> {
    /// `MESH on SELECTORS`
    pub(super) fn use_mesh(&mut self) -> Parse<UseMesh> {
        let mesh = self.spanned(|p| p.name_as("the name of a mesh"))?;
        self.expect_word("on")?;
        let on = self.selectors()?;
        let overrides = self.overrides();
        Ok(UseMesh {
            mesh,
            on,
            overrides,
        })
    }

    /// `NAME(PARAMS) { … }`
    pub(super) fn tactic(&mut self) -> Parse<TacticDef> {
        let name = self.spanned(|p| p.name_as("the name of the tactic"))?;
        let params =
            self.parenthesized(Empty::Allowed, |p| p.spanned(|p| p.name_as("a parameter")))?;
        for (nth, param) in params.iter().enumerate() {
            let first = params.iter().take(nth).find(|other| other == &param);
            if let Some(first) = first {
                let message = format!("tactic `{}` has two parameters `{}`", name.node, param.node);
                let diagnostic = Diagnostic::invalid(message).code("W006");
                self.diagnostics.push(
                    diagnostic
                        .at(param.span, "again here")
                        .also(first.span, "first here"),
                );
            }
        }
        let body = self.block(TACTIC, Self::tactic_item)?;
        Ok(TacticDef { name, params, body })
    }

    fn tactic_item(&mut self) -> Parse<TacticItem> {
        if self.eat_word("shard") {
            return self.shard().map(TacticItem::Shard);
        }
        if self.eat_word("apply") {
            return self.apply().map(TacticItem::Apply);
        }
        if self.eat_word("pin") {
            return self.pin().map(TacticItem::Pin);
        }
        if self.eat_word("forbid") {
            return self.forbid().map(TacticItem::Forbid);
        }
        if self.eat_word("prefer") {
            return self.prefer().map(TacticItem::Prefer);
        }
        Err(self.unknown_line(TACTIC))
    }

    /// `DIMS over AXES on TARGETS [except SELECTORS]`
    fn shard(&mut self) -> Parse<Shard> {
        let dims = self.comma_list(|p| p.spanned(|p| p.name_as("a dim")))?;
        self.expect_word("over")?;
        let over = self.comma_list(|p| p.spanned(Self::axis_ref))?;
        self.expect_word("on")?;
        let on = self.comma_list(|p| p.spanned(Self::target))?;
        let except = self.except()?;
        Ok(Shard {
            dims,
            over,
            on,
            except,
        })
    }

    /// `TACTIC(ARGS) [except SELECTORS]`
    pub(super) fn apply(&mut self) -> Parse<Apply> {
        let tactic = self.spanned(|p| p.name_as("the name of a tactic"))?;
        let args = self.parenthesized(Empty::Allowed, |p| p.spanned(|p| p.choice(Self::arg)))?;
        let except = self.except()?;
        Ok(Apply {
            tactic,
            args,
            except,
        })
    }

    /// `SELECTOR : LAYOUT`
    pub(super) fn pin(&mut self) -> Parse<Pin> {
        let on = self.spanned(Self::selector)?;
        self.expect(":")?;
        let layout = self.spanned(Self::pinned_layout)?;
        let overrides = self.overrides();
        Ok(Pin {
            on,
            layout,
            overrides,
        })
    }

    /// `SELECTOR : LAYOUT`
    pub(super) fn forbid(&mut self) -> Parse<Forbid> {
        let on = self.spanned(Self::selector)?;
        self.expect(":")?;
        let layout = self.spanned(Self::forbidden_layout)?;
        let overrides = self.overrides();
        Ok(Forbid {
            on,
            layout,
            overrides,
        })
    }

    /// `SELECTOR.KEY = CHOICE over CHOICE … [weight N]`
    pub(super) fn prefer(&mut self) -> Parse<Prefer> {
        let (on, key): (_, Spanned<Name>) = self.keyed_selector()?;
        self.expect("=")?;
        let mut ranking = vec![self.spanned(Self::call)?];
        while self.eat_word("over") {
            ranking.push(self.spanned(Self::call)?);
        }
        let weight = if self.eat_word("weight") {
            let begin = self.span();
            let weight = self.number("a weight")?;
            if weight.as_f64() < 0.0 {
                let span = begin.to(self.last_span());
                let message = format!("a weight cannot be negative, found {weight}");
                return Err(self.fail("W005", message, span));
            }
            Some(weight)
        } else {
            None
        };
        let overrides = self.overrides();
        Ok(Prefer {
            on,
            key,
            ranking,
            weight,
            overrides,
        })
    }

    /// `SELECTOR : FACTORS`
    pub(super) fn place(&mut self) -> Parse<Place> {
        let on = self.spanned(Self::selector)?;
        self.expect(":")?;
        let factors = self.spanned(Self::complete_layout)?;
        Ok(Place { on, factors })
    }

    /// `SELECTOR : LAYOUT`
    pub(super) fn keep(&mut self) -> Parse<Keep> {
        let on = self.spanned(Self::selector)?;
        self.expect(":")?;
        let layout = self.spanned(Self::complete_layout)?;
        Ok(Keep { on, layout })
    }

    /// `ring(cp)` or `ring`.
    pub(in crate::weave) fn call(&mut self) -> Parse<Call> {
        let name = self.name_as("a choice, such as `ring(cp)`")?;
        let mut args = Vec::new();
        if self.is_sign("(") {
            args = self.parenthesized(Empty::Refused, Self::axis_ref)?;
        }
        Ok(Call { name, args })
    }
}
