//! Optimizer steps by the oracle.
//!
//! Invariant: outputs and gradients of step t are those before update t.

use std::collections::BTreeMap;

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{Graph, Role, TensorId, TensorType};

use super::evaluate::{Values, evaluate_keeping};
use super::init::initial_value;
use super::{ReferenceError, Result, Value};

/// The name of the input that counts the steps, from 1.
const STEP_INPUT: &str = "step";

/// What one step gave.
#[derive(Clone, Debug, PartialEq)]
pub struct StepResult {
    /// In the order of the graph's outputs.
    pub outputs: Vec<Value>,
    /// By parameter.
    pub gradients: BTreeMap<TensorId, Value>,
}

impl StepResult {
    /// The first output as a number; NaN when the graph has no outputs.
    pub fn loss(&self) -> f64 {
        self.outputs.first().map_or(f64::NAN, Value::item)
    }
}

/// Steps a graph, carrying its parameters and states along.
#[derive(Clone, Debug)]
pub struct Stepper<'a> {
    graph: &'a Graph,
    sources: BTreeMap<TensorId, Value>,
    n_steps: usize,
}

impl<'a> Stepper<'a> {
    /// Begins with the initial values of all parameters, states and constants.
    ///
    /// # Errors
    /// A constant's shape does not fit what it holds.
    pub fn new(graph: &'a Graph) -> Result<Self> {
        let mut sources = BTreeMap::new();
        for id in graph.tensor_ids() {
            let tensor = graph.tensor(id);
            if let Some(value) = initial_value(&tensor.role, &tensor.ty)? {
                sources.insert(id, value);
            }
        }
        Ok(Self {
            graph,
            sources,
            n_steps: 0,
        })
    }

    /// The values of parameters, states and constants as of now.
    pub fn sources(&self) -> &BTreeMap<TensorId, Value> {
        &self.sources
    }

    /// Replaces the value of a source (loaded weights).
    pub fn set(&mut self, id: TensorId, value: Value) {
        self.sources.insert(id, value);
    }

    /// Runs one step on the given inputs and applies the graph's updates. The scalar input `step`
    /// is given by itself.
    ///
    /// # Errors
    /// Those of [`super::evaluate`].
    pub fn step(&mut self, inputs: &BTreeMap<TensorId, Value>) -> Result<StepResult> {
        let graph = self.graph;
        self.n_steps += 1;
        let mut all = std::mem::take(&mut self.sources);
        all.extend(inputs.iter().map(|(id, value)| (*id, value.clone())));
        if let Some(id) = graph.find(STEP_INPUT)
            && graph.tensor(id).role == Role::Input
            && graph.ty(id).shape.is_empty()
        {
            let ty = TensorType {
                dtype: DType::F32,
                shape: Vec::new(),
            };
            all.entry(id)
                .or_insert_with(|| Value::full(ty, self.n_steps as f64));
        }
        let mut keep = graph.outputs.clone();
        keep.extend(graph.updates.values().chain(graph.gradients.values()));
        let outcome = evaluate_keeping(graph, &all, &keep);
        all.retain(|id, _| graph.tensor(*id).role != Role::Input);
        self.sources = all;
        let values = outcome?;
        let result = StepResult {
            outputs: graph
                .outputs
                .iter()
                .map(|id| values.require(graph, *id).cloned())
                .collect::<Result<_>>()?,
            gradients: graph
                .gradients
                .iter()
                .map(|(param, gradient)| Ok((*param, values.require(graph, *gradient)?.clone())))
                .collect::<Result<_>>()?,
        };
        self.update(&values)?;
        Ok(result)
    }

    fn update(&mut self, values: &Values) -> Result<()> {
        let graph = self.graph;
        for (source, next) in &graph.updates {
            let value = values.require(graph, *next)?;
            let ty = graph.ty(*source);
            if value.ty() != ty {
                return Err(ReferenceError::Internal(format!(
                    "`{}` is {ty}, its update is {}",
                    graph.tensor(*source).name,
                    value.ty()
                )));
            }
            self.sources.insert(*source, value.clone());
        }
        Ok(())
    }
}

/// Runs `n_steps` steps on the same inputs from the initial values.
///
/// # Errors
/// Those of [`super::evaluate`].
pub fn train(
    graph: &Graph,
    inputs: &BTreeMap<TensorId, Value>,
    n_steps: usize,
) -> Result<Vec<StepResult>> {
    let mut stepper = Stepper::new(graph)?;
    (0..n_steps).map(|_| stepper.step(inputs)).collect()
}
