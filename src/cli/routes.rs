//! `meshweave run --routes`: a routing trace of the steps that are run.
//!
//! Enters: a graph with experts, and an execution after each of its steps. Leaves: a trace of every
//! token, in the order of the steps, sequences and positions.
//! Invariant: what is recorded is what the router chose, whether or not the token was dropped later.

use std::fs::File;
use std::path::{Path, PathBuf};

use meshweave_dsl::diagnostics::Class;
use meshweave_dsl::graph::{Graph, TensorId};
use meshweave_dsl::op::OpKind;
use meshweave_dsl::trace::file::TraceWriter;
use meshweave_dsl::trace::{NO_EXPERT, TraceShape};
use meshweave_runtime::executor::Session as Execution;
use serde::{Deserialize, Serialize};

use super::place::trace_error;
use super::placed::Relabeling;
use super::tally::numbers;
use crate::error::{Error, Result};

/// Writes a trace while a program runs.
#[derive(Serialize, Deserialize)]
pub(super) struct Recorder {
    path: PathBuf,
    model: String,
    /// The chosen experts of every layer, `[batch, seq, choice]`.
    tensors: Vec<String>,
    shape: TraceShape,
    /// Of the process that writes, once it has begun.
    #[serde(skip)]
    writer: Option<TraceWriter<File>>,
}

/// Makes the experts that every layer chooses outputs of the graph.
///
/// # Errors
/// The graph has no layer with experts, or layers of different sizes.
pub(super) fn add_outputs(graph: &mut Graph) -> Result<(Vec<String>, TraceShape)> {
    let mut found: Vec<(TensorId, usize, usize)> = Vec::new();
    for op in &graph.ops {
        if let (
            OpKind::MoeSlots {
                n_experts, choice, ..
            },
            &[chosen],
        ) = (&op.kind, op.inputs.as_slice())
            // Seats are numbered, too.
            && graph.op_name(op).ends_with("slots")
        {
            let top_k = graph.ty(chosen).size_of(choice).unwrap_or(1);
            found.push((chosen, *n_experts, top_k));
        }
    }
    let Some(&(_, experts, top_k)) = found.first() else {
        return Err(
            Error::plain(Class::Invalid, "the model has no experts to record")
                .help("remove --routes, or give the model `experts 8`"),
        );
    };
    if let Some(&(id, others, k)) = found.iter().find(|one| (one.1, one.2) != (experts, top_k)) {
        return Err(Error::plain(
            Class::Unsupported,
            format!(
                "`{}` is {k} of {others} experts, the first layer has {top_k} of {experts}: a trace has one size",
                graph.tensor(id).name
            ),
        ));
    }
    let shape = TraceShape {
        layers: found.len(),
        experts,
        top_k,
    };
    let mut names = Vec::new();
    for (id, ..) in found {
        if !graph.outputs.contains(&id) {
            graph.outputs.push(id);
        }
        names.push(graph.tensor(id).name.clone());
    }
    Ok((names, shape))
}

impl Recorder {
    /// The recording of `model` at `path`.
    pub fn new(path: &Path, (tensors, shape): (Vec<String>, TraceShape), model: &str) -> Self {
        Self {
            path: path.to_path_buf(),
            model: model.to_owned(),
            tensors,
            shape,
            writer: None,
        }
    }

    /// Begins the file.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open(&mut self) -> Result<()> {
        let file = File::create(&self.path).map_err(|error| {
            Error::plain(
                Class::Exhausted,
                format!("cannot write {}: {error}", self.path.display()),
            )
        })?;
        let model = Some(self.model.clone());
        let writer = TraceWriter::new(file, self.shape, model, false);
        self.writer = Some(writer.map_err(trace_error)?);
        Ok(())
    }

    /// Adds all tokens of the last step, experts by the model's own numbers.
    ///
    /// # Errors
    /// The execution lacks the outputs, or nothing can be written.
    pub fn record(&mut self, execution: &Execution, relabeling: Option<&Relabeling>) -> Result<()> {
        let layers = numbers(execution, &self.tensors)?;
        let Some(writer) = &mut self.writer else {
            return Ok(());
        };
        let top_k = self.shape.top_k;
        let n_tokens = layers.first().map_or(0, |layer| layer.len() / top_k);
        let mut choices = Vec::with_capacity(self.shape.slots());
        for token in 0..n_tokens {
            choices.clear();
            for (layer_idx, layer) in layers.iter().enumerate() {
                for position in layer.iter().skip(token * top_k).take(top_k) {
                    let position = usize::try_from(*position).ok();
                    let expert = match relabeling {
                        Some(relabeling) => {
                            position.and_then(|position| relabeling.expert(layer_idx, position))
                        }
                        None => position,
                    };
                    let expert = expert.and_then(|expert| u16::try_from(expert).ok());
                    choices.push(expert.unwrap_or(NO_EXPERT));
                }
            }
            writer.push(&choices, None).map_err(trace_error)?;
        }
        Ok(())
    }

    /// Ends the trace; the number of its tokens, where this process wrote it.
    ///
    /// # Errors
    /// Nothing can be written.
    pub fn finish(self) -> Result<Option<usize>> {
        let writer = self.writer.map(TraceWriter::finish);
        writer.transpose().map_err(trace_error)
    }
}
