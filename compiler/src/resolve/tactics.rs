//! Tactics: functions of the language.
//!
//! Enters: the directives of a document. Leaves: shards, pins, forbids and preferences without
//! parameters, each with the statement that it comes from.
//! Invariant: expansion ends (a tactic that applies itself is refused), and keeps the order.

use meshweave_dsl::diagnostics::{Diagnostic, SourceId, Span, did_you_mean};
use meshweave_dsl::units::Number;
use meshweave_dsl::weave::ast::{
    Apply, Arg, AxisRef, Block, Choice, Document, Layout, Name, Selector, Spanned, Split,
    Statement, TacticDef, TacticItem,
};
use meshweave_dsl::weave::{parse, print};

/// The standard tactics.
const STD: &str = include_str!("std.weave");
/// Their source, which no table of sources has.
const STD_SOURCE: SourceId = SourceId(u32::MAX);
/// Tactics within tactics.
const MAX_DEPTH: usize = 16;

/// The statement that something comes from.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Origin {
    pub span: Span,
    pub text: String,
}

impl Origin {
    pub fn of(statement: &Spanned<Statement>) -> Self {
        let document = Document {
            body: Block::of([statement.node.clone()]),
        };
        let printed = print(&document);
        // Columns are aligned with neighbors, of which there are none here.
        let text = printed.split_whitespace().collect::<Vec<_>>().join(" ");
        Self {
            span: statement.span,
            text,
        }
    }

    /// A place in the document: the statement's own for parts of standard tactics.
    pub fn place(&self, span: Span) -> Span {
        if span.source == STD_SOURCE {
            self.span
        } else {
            span
        }
    }
}

/// One directive without parameters.
pub(super) struct Expanded {
    /// Never an `apply`.
    pub item: TacticItem,
    pub origin: Origin,
    /// Of the tactics that it comes through.
    pub except: Vec<Spanned<Selector>>,
    /// The tactic that it stands in, if any.
    pub tactic: Option<Name>,
}

/// All directives of a document.
pub(super) fn expand(document: &Document, diagnostics: &mut Vec<Diagnostic>) -> Vec<Expanded> {
    let std = parse(STD, STD_SOURCE).document;
    let mut expansion = Expansion {
        own: tactics(document),
        std: tactics(&std),
        out: Vec::new(),
        diagnostics,
    };
    for statement in document.statements() {
        let item = match &statement.node {
            Statement::Apply(apply) => TacticItem::Apply(apply.clone()),
            Statement::Pin(pin) => TacticItem::Pin(pin.clone()),
            Statement::Forbid(forbid) => TacticItem::Forbid(forbid.clone()),
            Statement::Prefer(prefer) => TacticItem::Prefer(prefer.clone()),
            _ => continue,
        };
        let context = Context {
            origin: Origin::of(statement),
            except: Vec::new(),
            tactics: Vec::new(),
            is_std: false,
        };
        expansion.item(item, &context);
    }
    expansion.out
}

fn tactics(document: &Document) -> Vec<&TacticDef> {
    document
        .statements()
        .filter_map(|statement| match &statement.node {
            Statement::Tactic(tactic) => Some(tactic),
            _ => None,
        })
        .collect()
}

struct Expansion<'a> {
    own: Vec<&'a TacticDef>,
    std: Vec<&'a TacticDef>,
    out: Vec<Expanded>,
    diagnostics: &'a mut Vec<Diagnostic>,
}

/// Where an item stands.
#[derive(Clone)]
struct Context {
    origin: Origin,
    except: Vec<Spanned<Selector>>,
    /// Outermost first.
    tactics: Vec<Name>,
    /// Whether the innermost tactic is a standard one.
    is_std: bool,
}

impl Expansion<'_> {
    fn item(&mut self, item: TacticItem, context: &Context) {
        match item {
            TacticItem::Apply(apply) => self.apply(&apply, context),
            item => self.out.push(Expanded {
                item,
                origin: context.origin.clone(),
                except: context.except.clone(),
                tactic: context.tactics.last().cloned(),
            }),
        }
    }

    fn apply(&mut self, apply: &Apply, context: &Context) {
        let place = context.origin.place(apply.tactic.span);
        let Some(mut args) = self.args(apply, context) else {
            return;
        };
        let mut name = apply.tactic.node.as_str().to_owned();
        let is_own = |tactic: &&&TacticDef| tactic.name.node == apply.tactic.node;
        let own = self
            .own
            .iter()
            .find(is_own)
            .copied()
            .filter(|_| !context.is_std);
        if own.is_none() && name == "zero" {
            match args.first() {
                Some((Arg::Number(Number::Int(stage @ 1..=3)), _)) => {
                    name = format!("zero{stage}");
                    args.remove(0);
                }
                _ => {
                    self.diagnostics.push(
                        Diagnostic::invalid("`zero` takes a stage (1, 2 or 3) and an axis")
                            .code("W110")
                            .at(place, "")
                            .help("as in `apply zero(1, dp)`"),
                    );
                    return;
                }
            }
        }
        let std = self
            .std
            .iter()
            .find(|tactic| tactic.name.node == name.as_str())
            .copied();
        let Some(tactic) = own.or(std) else {
            self.unknown(&name, place);
            return;
        };
        if context.tactics.len() >= MAX_DEPTH || context.tactics.contains(&tactic.name.node) {
            self.diagnostics.push(
                Diagnostic::invalid(format!("tactic `{name}` applies itself"))
                    .code("W110")
                    .at(place, "here"),
            );
            return;
        }
        if args.len() != tactic.params.len() {
            let params: Vec<&str> = tactic.params.iter().map(|p| p.node.as_str()).collect();
            let plural = if params.len() == 1 { "" } else { "s" };
            self.diagnostics.push(
                Diagnostic::invalid(format!(
                    "tactic `{name}` takes {} argument{plural}, found {}",
                    params.len(),
                    args.len()
                ))
                .code("W110")
                .at(place, "")
                .help(format!("write `apply {name}({})`", params.join(", "))),
            );
            return;
        }
        let bound: Vec<(&Name, (Arg, Span))> = tactic
            .params
            .iter()
            .map(|param| &param.node)
            .zip(args)
            .collect();
        let mut inner = context.clone();
        inner.tactics.push(tactic.name.node.clone());
        inner.except.extend(apply.except.iter().cloned());
        inner.is_std = own.is_none();
        for item in tactic.body.items() {
            let mut item = item.node.clone();
            let result = substitute(&mut item, &mut |axis| bind(axis, &bound));
            match result {
                Ok(()) => self.item(item, &inner),
                Err(diagnostic) => self.diagnostics.push(*diagnostic),
            }
        }
    }

    /// The arguments with their places; `None` after a finding.
    fn args(&mut self, apply: &Apply, context: &Context) -> Option<Vec<(Arg, Span)>> {
        let mut args = Vec::new();
        for arg in &apply.args {
            let place = context.origin.place(arg.span);
            match arg.known() {
                Some(known) => args.push((known.clone(), place)),
                None => {
                    self.diagnostics.push(
                        Diagnostic::unsupported(format!(
                            "the planner does not choose arguments of `{}` yet",
                            apply.tactic.node
                        ))
                        .code("W120")
                        .at(place, "left open here")
                        .help("give a value"),
                    );
                    return None;
                }
            }
        }
        Some(args)
    }

    fn unknown(&mut self, name: &str, place: Span) {
        let known: Vec<&str> = self
            .own
            .iter()
            .chain(&self.std)
            .map(|tactic| tactic.name.node.as_str())
            .chain(["zero"])
            .collect();
        let near = did_you_mean(name, known.iter().copied());
        let all = format!("known are {}", known.join(", "));
        self.diagnostics.push(
            Diagnostic::invalid(format!("there is no tactic `{name}`"))
                .code("W110")
                .at(place, "")
                .help(near.unwrap_or(all)),
        );
    }
}

type Outcome = Result<(), Box<Diagnostic>>;

/// Replaces a parameter by its argument.
fn bind(axis: &mut AxisRef, bound: &[(&Name, (Arg, Span))]) -> Outcome {
    if axis.mesh.is_some() {
        return Ok(());
    }
    let Some((param, (arg, span))) = bound.iter().find(|(param, _)| **param == axis.axis) else {
        return Ok(());
    };
    match arg {
        Arg::Axis(given) => {
            *axis = given.clone();
            Ok(())
        }
        Arg::Number(_) | Arg::Text(_) => Err(Box::new(
            Diagnostic::invalid(format!("`{param}` is used as an axis, but `{arg}` is none"))
                .code("W110")
                .at(*span, "")
                .help("give the name of an axis of the mesh"),
        )),
    }
}

type Bind<'a> = &'a mut dyn FnMut(&mut AxisRef) -> Outcome;

/// Applies `bind` to every axis in an item.
fn substitute(item: &mut TacticItem, bind: Bind<'_>) -> Outcome {
    match item {
        TacticItem::Shard(shard) => shard
            .over
            .iter_mut()
            .try_for_each(|axis| bind(&mut axis.node)),
        TacticItem::Apply(apply) => apply.args.iter_mut().try_for_each(|arg| {
            let args: Vec<&mut Arg> = match &mut arg.node {
                Choice::Fixed(arg) => vec![arg],
                Choice::Auto { among, witness } => among.iter_mut().chain(witness).collect(),
            };
            args.into_iter().try_for_each(|arg| match arg {
                Arg::Axis(axis) => bind(axis),
                Arg::Number(_) | Arg::Text(_) => Ok(()),
            })
        }),
        TacticItem::Pin(pin) => match &mut pin.layout.node {
            Choice::Fixed(layout) => substitute_layout(layout, bind),
            Choice::Auto { among, witness } => among
                .iter_mut()
                .chain(witness)
                .try_for_each(|layout| substitute_layout(layout, bind)),
        },
        TacticItem::Forbid(forbid) => substitute_layout(&mut forbid.layout.node, bind),
        TacticItem::Prefer(prefer) => prefer
            .ranking
            .iter_mut()
            .flat_map(|call| &mut call.node.args)
            .try_for_each(bind),
    }
}

fn substitute_layout(layout: &mut Layout, bind: Bind<'_>) -> Outcome {
    for dim in &mut layout.dims {
        match &mut dim.split {
            Split::Axes(axes)
            | Split::Open {
                witness: Some(axes),
            } => {
                axes.iter_mut().try_for_each(&mut *bind)?;
            }
            Split::Whole | Split::Any | Split::Open { witness: None } => {}
        }
    }
    layout
        .partial
        .iter_mut()
        .flat_map(|partial| &mut partial.axes)
        .try_for_each(bind)
}
