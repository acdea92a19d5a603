//! Meshes and layouts.

use super::{Empty, Parse, Parser};
use crate::diagnostics::Diagnostic;
use crate::weave::ast::{
    Axis, AxisRef, Choice, Degree, DimSplit, Layout, MeshDef, NodeList, Partial, Reduce, Split,
};

impl<'a> Parser<'a> {
    /// `NAME = axis:degree > … [refolds OTHER] [on nodes[…]]`
    pub(super) fn mesh(&mut self) -> Parse<MeshDef> {
        let name = self.spanned(|p| p.name_as("the name of the mesh"))?;
        self.expect("=")?;
        let mut axes = vec![self.spanned(Self::axis)?];
        while self.eat(">") {
            axes.push(self.spanned(Self::axis)?);
        }
        let refolds = if self.eat_word("refolds") {
            Some(self.spanned(|p| p.name_as("the name of the mesh to refold"))?)
        } else {
            None
        };
        let on = if self.eat_word("on") {
            Some(self.spanned(|p| p.choice(Self::node_list))?)
        } else {
            None
        };
        for (nth, axis) in axes.iter().enumerate() {
            let earlier = axes.iter().take(nth).find(|other| other.name == axis.name);
            if let Some(earlier) = earlier {
                let message = format!("mesh `{}` has two axes `{}`", name.node, axis.name);
                let diagnostic = Diagnostic::invalid(message).code("W006");
                self.diagnostics.push(
                    diagnostic
                        .at(axis.span, "again here")
                        .also(earlier.span, "first here"),
                );
            }
        }
        Ok(MeshDef {
            name,
            axes,
            refolds,
            on,
        })
    }

    /// `nodes[8..24,0]`
    fn node_list(&mut self) -> Parse<NodeList> {
        if !self.eat_word("nodes") {
            return Err(self.unexpected("`nodes[…]`, such as `nodes[8..24,0..8]`"));
        }
        self.index_items().map(|items| NodeList { items })
    }

    pub(in crate::weave) fn axis(&mut self) -> Parse<Axis> {
        let name = self.name_as("the name of an axis")?;
        self.expect(":")?;
        let degree = self.degree()?;
        let within = if self.eat_word("within") {
            Some(self.name_as("a level of the cluster, such as `node`")?)
        } else {
            None
        };
        Ok(Axis {
            name,
            degree,
            within,
        })
    }

    fn degree(&mut self) -> Parse<Degree> {
        const WHAT: &str = "a degree (a number, `auto`, `rest` or `same`)";
        if self.eat_word("rest") {
            let witness = self.degree_witness()?;
            return Ok(Degree::Rest { witness });
        }
        if self.eat_word("same") {
            let witness = self.degree_witness()?;
            return Ok(Degree::Same { witness });
        }
        self.choice(|p| p.positive(WHAT)).map(Degree::Is)
    }

    fn degree_witness(&mut self) -> Parse<Option<u64>> {
        if self.eat(":=") {
            self.positive("the degree").map(Some)
        } else {
            Ok(None)
        }
    }

    /// A layout of a `pin`.
    pub(super) fn pinned_layout(&mut self) -> Parse<Choice<Layout>> {
        self.choice(|p| {
            let layout = p.spanned(Self::layout)?;
            if layout.dims.iter().any(|dim| dim.split == Split::Any) {
                let diagnostic = Diagnostic::invalid("`/*` cannot stand in a pin")
                    .code("W002")
                    .at(layout.span, "")
                    .help("`dim/?` leaves a dim open; `dim/*` is for `forbid`");
                return Err(p.report(diagnostic));
            }
            Ok(layout.node)
        })
    }

    /// A layout of a `forbid`.
    pub(super) fn forbidden_layout(&mut self) -> Parse<Layout> {
        let layout = self.spanned(Self::layout)?;
        let is_open = |dim: &DimSplit| matches!(dim.split, Split::Open { .. });
        if layout.dims.iter().any(is_open) {
            let diagnostic = Diagnostic::invalid("`/?` cannot stand in a forbid")
                .code("W002")
                .at(layout.span, "")
                .help("`dim/*` forbids any axis; `dim/?` is for `pin`");
            return Err(self.report(diagnostic));
        }
        Ok(layout.node)
    }

    /// A layout of a `place` or `keep`, which leaves nothing open.
    pub(super) fn complete_layout(&mut self) -> Parse<Layout> {
        let layout = self.spanned(Self::layout)?;
        let is_open = |dim: &DimSplit| matches!(dim.split, Split::Open { .. } | Split::Any);
        if layout.dims.iter().any(is_open) {
            let diagnostic = Diagnostic::invalid("a finished plan leaves no dim open")
                .code("W002")
                .at(layout.span, "")
                .help("name axes, or write the bare dim; `dim/?` is for `pin`");
            return Err(self.report(diagnostic));
        }
        Ok(layout.node)
    }

    /// `[dim/axis, …] +sum(axis)`
    pub(in crate::weave) fn layout(&mut self) -> Parse<Layout> {
        let opened = self.span();
        if !self.eat("[") {
            return Err(self.unexpected("a layout, such as `[embed, heads/tp]`"));
        }
        let mut dims = Vec::new();
        if !self.is_sign("]") {
            dims = self.comma_list(Self::dim_split)?;
        }
        if dims.is_empty() {
            self.expect("]")?;
        } else {
            self.close("]", opened)?;
        }
        let mut partial = Vec::new();
        while self.eat("+") {
            let reduce = self.one_of("a way to reduce", &Reduce::ALL, Reduce::text)?;
            let axes = self.parenthesized(Empty::Refused, Self::axis_ref)?;
            partial.push(Partial { reduce, axes });
        }
        Ok(Layout { dims, partial })
    }

    fn dim_split(&mut self) -> Parse<DimSplit> {
        let dim = self.name_as("a dim")?;
        let split = self.split()?;
        Ok(DimSplit { dim, split })
    }

    fn split(&mut self) -> Parse<Split> {
        if !self.eat("/") {
            return Ok(Split::Whole);
        }
        if self.eat("*") {
            return Ok(Split::Any);
        }
        if self.eat("?") {
            let mut witness = None;
            if self.eat(":=") {
                witness = Some(self.split_axes()?);
            }
            return Ok(Split::Open { witness });
        }
        let opened = self.span();
        let axes = self.split_axes()?;
        if axes.is_empty() {
            let message = "`/()` names no axis; write the bare dim to leave it unsplit";
            return Err(self.fail("W002", message, opened.to(self.last_span())));
        }
        Ok(Split::Axes(axes))
    }

    /// `tp`, `(cp,tp)`, `()`.
    fn split_axes(&mut self) -> Parse<Vec<AxisRef>> {
        if self.is_sign("(") {
            return self.parenthesized(Empty::Allowed, Self::axis_ref);
        }
        Ok(vec![self.axis_ref()?])
    }
}
