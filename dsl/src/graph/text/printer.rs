//! Graphs to text.
//!
//! Sources stand as early as their ids allow and before their first reader, so that the ids of most
//! graphs follow from the order of the lines.

use std::fmt::Write;

use serde::Serialize;
use serde_json::Value;

use super::value::{name, quoted, word, write_tagged};
use crate::graph::{Graph, Op, Role, TensorId, TensorType};
use crate::op::OpKind;

/// The text form of a graph. Linear, save for the `ids` of graphs in which they are out of order.
pub fn print(graph: &Graph) -> String {
    let mut printer = Printer {
        graph,
        text: String::new(),
        printed: vec![false; graph.tensors.len()],
        order: Vec::with_capacity(graph.tensors.len()),
    };
    printer.graph();
    printer.text
}

struct Printer<'a> {
    graph: &'a Graph,
    text: String,
    printed: Vec<bool>,
    /// The tensors in the order in which they were printed.
    order: Vec<TensorId>,
}

impl Printer<'_> {
    fn graph(&mut self) {
        let graph = self.graph;
        self.line(format!("graph {} {{", quoted(&graph.name)));
        let sources: Vec<TensorId> = graph
            .tensor_ids()
            .filter(|id| graph.tensor(*id).role != Role::Temp)
            .collect();
        let mut next_source = 0;
        for (_, op) in graph.ops() {
            let first_result = op.results.iter().min();
            while let Some(id) = sources.get(next_source)
                && first_result.is_some_and(|result| id < result)
            {
                self.source(*id);
                next_source += 1;
            }
            for id in &op.inputs {
                if graph.tensor(*id).role != Role::Temp {
                    self.source(*id);
                }
            }
            self.op(op);
        }
        for id in sources {
            self.source(id);
        }
        for id in &graph.outputs {
            self.line(format!("  output {}", self.name(*id)));
        }
        for (source, update) in &graph.updates {
            self.line(format!(
                "  update {} -> {}",
                self.name(*source),
                self.name(*update)
            ));
        }
        for (param, gradient) in &graph.gradients {
            self.line(format!(
                "  gradient {} -> {}",
                self.name(*param),
                self.name(*gradient)
            ));
        }
        // Of a broken graph, whose tensors do not all appear, the ids are not kept.
        if self.order.len() == graph.tensors.len()
            && self.order.iter().copied().ne(graph.tensor_ids())
        {
            let ids = ranges(&self.order);
            self.line(format!("  ids {ids}"));
        }
        self.line("}".into());
    }

    fn source(&mut self, id: TensorId) {
        if std::mem::replace(&mut self.printed[id.index()], true) {
            return;
        }
        self.order.push(id);
        let tensor = self.graph.tensor(id);
        let typed = format!("{}: {}", name(&tensor.name), type_text(&tensor.ty));
        let line = match &tensor.role {
            Role::Input => format!("  input {typed}"),
            Role::Param(init) => format!("  param {typed} = {}", tagged(init)),
            Role::State { of } => format!("  state {typed} of {}", self.name(*of)),
            Role::Const(init) => format!("  const {typed} = {}", tagged(init)),
            Role::Temp => return,
        };
        self.line(line);
    }

    fn op(&mut self, op: &Op) {
        let results: Vec<String> = op
            .results
            .iter()
            .map(|id| format!("{}: {}", self.name(*id), type_text(self.graph.ty(*id))))
            .collect();
        let inputs: Vec<String> = op.inputs.iter().map(|id| self.name(*id)).collect();
        self.order.extend(&op.results);
        let line = format!(
            "  {} = {}({})",
            results.join(", "),
            kind_text(&op.kind),
            inputs.join(", ")
        );
        self.line(line);
    }

    fn name(&self, id: TensorId) -> String {
        name(&self.graph.tensor(id).name)
    }

    fn line(&mut self, line: String) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "{line}");
    }
}

/// A type in the text form: as it displays, with words quoted where needed.
fn type_text(ty: &TensorType) -> String {
    let dims: Vec<String> = ty
        .shape
        .iter()
        .map(|(dim, size)| format!("{}:{size}", word(dim.as_str())))
        .collect();
    format!("{}[{}]", ty.dtype, dims.join(", "))
}

/// An op with its attributes.
pub(in crate::graph) fn kind_text(kind: &OpKind) -> String {
    let mut value = to_value(kind);
    if let Value::Object(map) = &mut value {
        // Functions of elements stand for themselves.
        if let Some(function) = map.remove("unary").or_else(|| map.remove("binary")) {
            return write_tagged(&function);
        }
        for (_, content) in map.iter_mut() {
            if let Value::Object(fields) = content
                && fields.get("offset").and_then(Value::as_u64) == Some(0)
            {
                fields.shift_remove("offset");
            }
        }
    }
    write_tagged(&value)
}

fn tagged(value: &impl Serialize) -> String {
    write_tagged(&to_value(value))
}

/// Ops and initial values are plain data: serializing them cannot fail.
fn to_value(value: &impl Serialize) -> Value {
    serde_json::to_value(value).unwrap_or(Value::Null)
}

/// `0-4 7 5-6`: runs of ascending ids.
fn ranges(ids: &[TensorId]) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for TensorId(id) in ids {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == *id => *last = *id,
            _ => runs.push((*id, *id)),
        }
    }
    let runs: Vec<String> = runs
        .into_iter()
        .map(|(first, last)| {
            if first == last {
                first.to_string()
            } else {
                format!("{first}-{last}")
            }
        })
        .collect();
    runs.join(" ")
}
