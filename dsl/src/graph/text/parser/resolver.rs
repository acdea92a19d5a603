//! Statements to a graph, names resolved.
//!
//! Enters: statements in any order. Leaves: a graph, whose types are those that the ops give.
//! Invariant: a name that is not understood is reported once.

use std::collections::BTreeMap;

use super::{Named, SourceRole, Statement};
use crate::diagnostics::{Diagnostic, Span, did_you_mean};
use crate::graph::text::Parsed;
use crate::graph::{Graph, Op, Role, Tensor, TensorId, TensorType};
use crate::op::OpKind;

/// Builds the graph from statements, in their order.
pub(super) struct Resolver {
    graph: Graph,
    diagnostics: Vec<Diagnostic>,
    known: BTreeMap<String, (TensorId, Span)>,
    /// Results whose op has been read.
    made: Vec<bool>,
}

impl Resolver {
    pub(super) fn new(graph: Graph, diagnostics: Vec<Diagnostic>) -> Self {
        Self {
            graph,
            diagnostics,
            known: BTreeMap::new(),
            made: Vec::new(),
        }
    }

    pub(super) fn resolve(mut self, statements: Vec<Statement>) -> Parsed {
        for statement in &statements {
            match statement {
                Statement::Source { name, ty, role } => {
                    let role = match role {
                        SourceRole::Known(role) => role.clone(),
                        // Resolved below, when all names are known.
                        SourceRole::StateOf(_) => Role::State { of: TensorId(0) },
                    };
                    self.declare(name, ty, role);
                }
                Statement::Op { results, .. } => {
                    for (name, ty) in results {
                        self.declare(name, ty, Role::Temp);
                    }
                }
                _ => {}
            }
        }
        self.made = self
            .graph
            .tensors
            .iter()
            .map(|tensor| tensor.role != Role::Temp)
            .collect();
        let mut order = None;
        for statement in statements {
            match statement {
                Statement::Source { name, role, .. } => {
                    if let SourceRole::StateOf(owner) = role
                        && let (Some(state), Some(of)) = (self.find(&name), self.find(&owner))
                    {
                        self.graph.tensors[state.index()].role = Role::State { of };
                    }
                }
                Statement::Op {
                    results,
                    kind,
                    inputs,
                    span,
                } => self.op(results, kind, inputs, span),
                Statement::Output(name) => {
                    let id = self.find(&name);
                    self.graph.outputs.extend(id);
                }
                Statement::Update(source, update) => {
                    if let (Some(source), Some(update)) = (self.find(&source), self.find(&update)) {
                        self.graph.updates.insert(source, update);
                    }
                }
                Statement::Gradient(param, gradient) => {
                    if let (Some(param), Some(gradient)) = (self.find(&param), self.find(&gradient))
                    {
                        self.graph.gradients.insert(param, gradient);
                    }
                }
                Statement::Ids(ids, span) => order = Some((ids, span)),
            }
        }
        if let Some((ids, span)) = order {
            self.renumber(&ids, span);
        }
        Parsed {
            graph: self.graph,
            diagnostics: self.diagnostics,
        }
    }

    fn declare(&mut self, name: &Named, ty: &TensorType, role: Role) {
        if let Some((_, first)) = self.known.get(&name.name) {
            let message = format!("`{}` is named twice", name.name);
            self.diagnostics.push(
                Diagnostic::invalid(message)
                    .at(name.span, "")
                    .also(*first, "first here"),
            );
            return;
        }
        let id = TensorId(self.graph.tensors.len() as u32);
        self.graph.tensors.push(Tensor {
            name: name.name.clone(),
            ty: ty.clone(),
            role,
        });
        self.known.insert(name.name.clone(), (id, name.span));
    }

    fn find(&mut self, name: &Named) -> Option<TensorId> {
        if let Some((id, _)) = self.known.get(&name.name) {
            return Some(*id);
        }
        let known = self.known.keys().map(String::as_str);
        let help = did_you_mean(&name.name, known);
        let message = format!("there is no tensor `{}`", name.name);
        self.diagnostics.push(
            Diagnostic::invalid(message)
                .at(name.span, "")
                .maybe_help(help),
        );
        None
    }

    fn op(
        &mut self,
        results: Vec<(Named, TensorType)>,
        kind: Option<OpKind>,
        inputs: Vec<Named>,
        span: Span,
    ) {
        let input_ids: Vec<Option<TensorId>> = inputs.iter().map(|name| self.find(name)).collect();
        for (id, name) in input_ids.iter().zip(&inputs) {
            if let Some(id) = id
                && !self.made[id.index()]
            {
                let at = self.known.get(&name.name).map(|(_, span)| *span);
                let message = format!("`{}` is read before it is made", name.name);
                let mut diagnostic = Diagnostic::invalid(message).at(name.span, "");
                if let Some(at) = at {
                    diagnostic = diagnostic.also(at, "made here");
                }
                self.diagnostics.push(diagnostic);
            }
        }
        let result_ids: Vec<TensorId> = results
            .iter()
            .filter_map(|(name, _)| {
                // A name that stood before belongs to that place.
                let (id, span) = self.known.get(&name.name)?;
                (*span == name.span).then_some(*id)
            })
            .collect();
        for id in &result_ids {
            self.made[id.index()] = true;
        }
        let Some(inputs) = input_ids.into_iter().collect::<Option<Vec<TensorId>>>() else {
            return;
        };
        let (Some(kind), true) = (kind, result_ids.len() == results.len()) else {
            return;
        };
        if kind.group().is_none() {
            self.check_types(&kind, &inputs, &results, span);
        }
        self.graph.ops.push(Op {
            kind,
            inputs,
            results: result_ids,
        });
    }

    fn check_types(
        &mut self,
        kind: &OpKind,
        inputs: &[TensorId],
        results: &[(Named, TensorType)],
        span: Span,
    ) {
        let input_types: Vec<&TensorType> = inputs.iter().map(|id| self.graph.ty(*id)).collect();
        let diagnostic = match kind.infer(&input_types) {
            Err(error) => Some(Diagnostic::invalid(error.to_string()).at(span, "")),
            Ok(types) if types.len() != results.len() => Some(
                Diagnostic::invalid(format!(
                    "op `{}` has {} results, {} are named",
                    kind.name(),
                    types.len(),
                    results.len()
                ))
                .at(span, ""),
            ),
            Ok(types) => types
                .iter()
                .zip(results)
                .find_map(|(expected, (name, ty))| {
                    (expected != ty).then(|| {
                        Diagnostic::invalid(format!(
                            "`{}` is {ty}, op `{}` gives {expected}",
                            name.name,
                            kind.name()
                        ))
                        .at(name.span, "")
                        .also(span, "")
                    })
                }),
        };
        self.diagnostics.extend(diagnostic);
    }

    /// Gives the k-th tensor of the text the k-th id.
    fn renumber(&mut self, ids: &[u32], span: Span) {
        let n_tensors = self.graph.tensors.len();
        let mut places: Vec<Option<usize>> = vec![None; n_tensors];
        for (place, id) in ids.iter().enumerate() {
            if let Some(slot) = places.get_mut(*id as usize) {
                *slot = Some(place);
            }
        }
        let places: Option<Vec<usize>> = places.into_iter().collect();
        let (Some(places), true) = (places, ids.len() == n_tensors) else {
            let message = format!(
                "`ids` names {} ids; the graph has {n_tensors} tensors, each needs one of its own",
                ids.len()
            );
            self.diagnostics
                .push(Diagnostic::invalid(message).at(span, ""));
            return;
        };
        let renamed = |id: &TensorId| TensorId(ids[id.index()]);
        let graph = &mut self.graph;
        graph.tensors = places
            .iter()
            .map(|place| {
                let mut tensor = graph.tensors[*place].clone();
                if let Role::State { of } = &mut tensor.role {
                    *of = renamed(of);
                }
                tensor
            })
            .collect();
        for op in &mut graph.ops {
            for id in op.inputs.iter_mut().chain(&mut op.results) {
                *id = renamed(id);
            }
        }
        for id in &mut graph.outputs {
            *id = renamed(id);
        }
        for map in [&mut graph.updates, &mut graph.gradients] {
            *map = map.iter().map(|(a, b)| (renamed(a), renamed(b))).collect();
        }
    }
}
