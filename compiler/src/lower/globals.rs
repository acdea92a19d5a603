//! Where the parts of global tensors lie.
//!
//! Enters: a global graph, its partition, and the buffers of every rank's tensors. Leaves: sources and
//! outputs of a program.
//! Invariant: the parts of a tensor together hold all of it.

use std::collections::BTreeMap;

use meshweave_dsl::graph::{Graph, Role, TensorId};
use meshweave_dsl::layout::{Layout, Mesh};
use meshweave_dsl::plan::Plan;
use meshweave_dsl::program::{BufferId, GlobalTensor, TensorPart};

use super::LowerError;
use crate::partition::Partition;

/// The tensors of the global graph by where their parts lie.
pub(super) struct Globals<'a> {
    pub(super) graph: &'a Graph,
    pub(super) mesh: &'a Mesh,
    pub(super) locals: &'a [Graph],
    pub(super) buffers_of: &'a [BTreeMap<TensorId, BufferId>],
}

impl Globals<'_> {
    pub(super) fn sources(&self, plan: &Plan) -> Result<Vec<GlobalTensor>, LowerError> {
        let graph = self.graph;
        let sources = graph
            .tensor_ids()
            .filter(|id| graph.tensor(*id).role != Role::Temp);
        sources
            .enumerate()
            .map(|(source_idx, id)| {
                // Partitioning adds the sources first and in order, the same on every rank.
                let local_id = TensorId(source_idx as u32);
                self.tensor(
                    id,
                    &plan.source_layout(id),
                    &vec![local_id; self.locals.len()],
                )
            })
            .collect()
    }

    pub(super) fn outputs(&self, partition: &Partition) -> Result<Vec<GlobalTensor>, LowerError> {
        let mut outputs = Vec::new();
        for (output_idx, (output, layout)) in self
            .graph
            .outputs
            .iter()
            .zip(&partition.output_layouts)
            .enumerate()
        {
            let locals: Vec<TensorId> = self
                .locals
                .iter()
                .map(|local| local.outputs[output_idx])
                .collect();
            outputs.push(self.tensor(*output, layout, &locals)?);
        }
        let gradients = self
            .graph
            .gradients
            .values()
            .zip(&partition.gradient_layouts);
        for (gradient_idx, (gradient, layout)) in gradients.enumerate() {
            let locals: Option<Vec<TensorId>> = self
                .locals
                .iter()
                .map(|local| local.gradients.values().nth(gradient_idx).copied())
                .collect();
            let locals =
                locals.ok_or_else(|| LowerError::Internal("a rank lacks a gradient".into()))?;
            outputs.push(self.tensor(*gradient, layout, &locals)?);
        }
        Ok(outputs)
    }

    fn tensor(
        &self,
        id: TensorId,
        layout: &Layout,
        locals: &[TensorId],
    ) -> Result<GlobalTensor, LowerError> {
        let tensor = self.graph.tensor(id);
        let parts = locals.iter().zip(self.buffers_of).enumerate();
        let parts = parts.map(|(rank, (local, buffers))| {
            Some(TensorPart {
                rank,
                buffer: buffers.get(local).copied()?,
                region: layout.region(&tensor.ty.shape, self.mesh, rank),
            })
        });
        Ok(GlobalTensor {
            name: tensor.name.clone(),
            ty: tensor.ty.clone(),
            role: tensor.role.clone(),
            layout: layout.clone(),
            parts: parts.collect::<Option<_>>().ok_or_else(|| {
                LowerError::Internal(format!("`{}` has no storage on some rank", tensor.name))
            })?,
        })
    }
}
