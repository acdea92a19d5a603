//! The first step of a run against the serial f64 interpreter.
//!
//! Enters: an execution before its first step, all of whose processes come here together. Leaves: the
//! parameters and the batch that it began with and what came out, here or in a file for another process;
//! of these the relative errors by tensor.
//! Invariant: what is compared is what the ranks held, gathered; nothing is computed twice.

use std::collections::BTreeMap;
use std::path::Path;

use meshweave_dsl::diagnostics::Class;
use meshweave_dsl::graph::{Graph, Role, TensorId};
use meshweave_runtime::checkpoint::{self, Checkpoint};
use meshweave_runtime::data::DataSource;
use meshweave_runtime::executor::Session as Execution;
use meshweave_runtime::reference::{ReferenceError, Stepper, Value};
use meshweave_runtime::tensor::{Elements, HostTensor};

use super::outcome::Outcome;
use super::runtime_error;
use super::train::give_batch;
use crate::error::{Error, Result};

/// The inputs of a batch.
const INPUTS: [&str; 2] = ["tokens", "targets"];

/// What a first step began with and gave.
pub(super) struct Evidence {
    tensors: BTreeMap<String, HostTensor>,
}

impl Evidence {
    /// Runs the first step.
    ///
    /// # Errors
    /// That of a rank that fails, or does not come.
    pub(super) fn take(
        execution: &mut Execution,
        data: &DataSource,
        outcome: &mut Outcome,
    ) -> Result<Self> {
        give_batch(execution, data, 0)?;
        let sources = execution.program().sources.iter();
        let begun = sources.filter(|source| match source.role {
            Role::Param(_) => true,
            Role::Input => INPUTS.contains(&source.name.as_str()),
            _ => false,
        });
        let begun: Vec<String> = begun.map(|source| source.name.clone()).collect();
        let outputs = execution.program().outputs.iter();
        let given: Vec<String> = outputs.map(|output| output.name.clone()).collect();
        let mut tensors = BTreeMap::new();
        for name in begun {
            let value = execution.get(&name).map_err(runtime_error)?;
            tensors.insert(name, value);
        }
        execution.step().map_err(runtime_error)?;
        outcome.losses.extend(execution.loss().ok());
        for name in given {
            let value = execution.get(&name).map_err(runtime_error)?;
            tensors.insert(name, value);
        }
        Ok(Self { tensors })
    }

    /// Writes all of it, for another process.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        checkpoint::write(path, &self.tensors, 1).map_err(runtime_error)
    }

    /// What another process wrote of a step of this graph.
    ///
    /// # Errors
    /// The file cannot be read, or lacks a tensor.
    pub(super) fn read(path: &Path, graph: &Graph) -> Result<Self> {
        let file = Checkpoint::open(path).map_err(runtime_error)?;
        let mut tensors = BTreeMap::new();
        for id in named(graph) {
            let tensor = graph.tensor(id);
            let value = file.read(&tensor.name, &tensor.ty);
            tensors.insert(tensor.name.clone(), value.map_err(runtime_error)?);
        }
        Ok(Self { tensors })
    }

    /// Relative errors of the loss and of every gradient against the serial interpreter, by name.
    ///
    /// # Errors
    /// A tensor of the graph is missing, or the interpreter refuses the graph.
    pub(super) fn errors(&self, graph: &Graph) -> Result<BTreeMap<String, f64>> {
        let mut stepper = Stepper::new(graph).map_err(reference)?;
        for id in graph.params() {
            stepper.set(id, self.value(graph, id)?);
        }
        let mut inputs = BTreeMap::new();
        for id in INPUTS.iter().filter_map(|name| graph.find(name)) {
            inputs.insert(id, self.value(graph, id)?);
        }
        let truth = stepper.step(&inputs).map_err(reference)?;
        let mut errors = BTreeMap::new();
        let mut compare = |id: TensorId, expected: &Value| -> Result<()> {
            let error = self.value(graph, id)?.relative_error(expected);
            errors.insert(graph.tensor(id).name.clone(), error);
            Ok(())
        };
        for (output, expected) in graph.outputs.iter().zip(&truth.outputs) {
            compare(*output, expected)?;
        }
        for (param, gradient) in &graph.gradients {
            if let Some(expected) = truth.gradients.get(param) {
                compare(*gradient, expected)?;
            }
        }
        Ok(errors)
    }

    fn value(&self, graph: &Graph, id: TensorId) -> Result<Value> {
        let name = &graph.tensor(id).name;
        let tensor = self.tensors.get(name).ok_or_else(|| {
            let message = format!("the first step has no tensor `{name}` to compare");
            Error::plain(Class::Internal, message)
        })?;
        let elements = match tensor.elements() {
            Elements::F32(elements) => elements.iter().map(|x| f64::from(*x)).collect(),
            Elements::I32(elements) => elements.iter().map(|x| f64::from(*x)).collect(),
        };
        Value::new(tensor.ty().clone(), elements).map_err(reference)
    }
}

/// All tensors of a graph that are compared, or that the comparison begins with.
fn named(graph: &Graph) -> Vec<TensorId> {
    let inputs = INPUTS.iter().filter_map(|name| graph.find(name));
    let gradients = graph.gradients.values().copied();
    let given = graph.outputs.iter().copied().chain(gradients);
    graph.params().chain(inputs).chain(given).collect()
}

fn reference(error: ReferenceError) -> Error {
    Error::plain(Class::Internal, error)
}
