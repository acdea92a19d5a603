//! Partitioning: one local graph per rank, with explicit collectives.
//!
//! Enters: a global graph and a plan. Leaves: a local graph per rank, all with the same ops in the
//! same order, differing in sizes, offsets and slices only.
//! Invariants: collectives of a group stand in the same order on all its ranks; every local type is
//! what the op's own shape rule gives on the local inputs; kept tensors (sources) start and end a
//! step in the layout that the plan keeps them in.
//!
//! Between an op that leaves a tensor in one layout and an op that needs another stands the cheapest
//! path of [`reshard_path`]. A resharded version is shared by its readers within a phase (forward or
//! backward) and made again across phases, so that gathered weights and activations do not stay
//! alive from forward to backward (ZeRO-3 and Megatron's sequence parallelism do the same).

use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::graph::{Graph, Op, OpId, Role, TensorId, TensorType};
use meshweave_dsl::layout::{Interval, Layout, Mesh};
use meshweave_dsl::name::{Axis, Dim};
use meshweave_dsl::op::{Group, OpKind, Shares};
use meshweave_dsl::plan::{OpLayouts, Plan};

use crate::reshard::{Step, local_type, reshard_path};

/// A plan that does not fit its graph.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PartitionError {
    /// The plan was made for another graph, or is broken: the user's edit or our bug upstream.
    #[error("the plan does not fit the graph: {0}")]
    Invalid(String),
    /// A state that partitioning must never reach.
    #[error("internal error in partitioning: {0}")]
    Internal(String),
}

/// What partitioning keeps besides the outputs of the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Outputs and updated values only.
    Outputs,
    /// The gradients as well, each in the layout of its parameter.
    Gradients,
}

/// The layouts of the tensors that leave a partitioned graph.
#[derive(Clone, Debug, PartialEq)]
pub struct Partition {
    /// One local graph a rank.
    pub locals: Vec<Graph>,
    /// Layout of every output of the local graphs, in their order, then of every gradient in the
    /// order of its parameter.
    pub output_layouts: Vec<Layout>,
    pub gradient_layouts: Vec<Layout>,
}

/// Divides `graph` over the ranks of the plan's mesh. Linear in ops × ranks.
///
/// # Errors
/// `Invalid` when the plan has another number of placements than the graph has ops, or divides an op
/// along a factor that it does not have or over more ranks than the factor has elements.
pub fn partition(
    graph: &Graph,
    plan: &Plan,
    keep: Keep,
    cluster: &Cluster,
) -> Result<Partition, PartitionError> {
    partition_to(graph, plan, keep, cluster, &[])
}

/// [`partition`] with the outputs left in the given layouts, which may hold partial values; those
/// without one are reduced and otherwise stay as their ops leave them.
///
/// # Errors
/// Those of [`partition`].
pub fn partition_to(
    graph: &Graph,
    plan: &Plan,
    keep: Keep,
    cluster: &Cluster,
    outputs: &[Layout],
) -> Result<Partition, PartitionError> {
    if plan.placements.len() != graph.ops.len() {
        let (n_placements, n_ops) = (plan.placements.len(), graph.ops.len());
        return Err(PartitionError::Invalid(format!(
            "it places {n_placements} ops, `{}` has {n_ops}: plan this graph anew",
            graph.name
        )));
    }
    check_placements(graph, plan)?;
    let mut partitioner = Partitioner::new(graph, plan, cluster);
    for tensor_id in graph.tensor_ids() {
        if graph.tensor(tensor_id).role != Role::Temp {
            partitioner.add_source(tensor_id)?;
        }
    }
    for (op_id, op) in graph.ops() {
        partitioner.add_op(op_id, op)?;
    }
    partitioner.finish(keep, outputs)
}

fn check_placements(graph: &Graph, plan: &Plan) -> Result<(), PartitionError> {
    for (op, placement) in graph.ops.iter().zip(&plan.placements) {
        let factors = meshweave_dsl::plan::op_factors(graph, op);
        let mut degrees: BTreeMap<&Dim, usize> = BTreeMap::new();
        for (axis, name) in &placement.factors {
            *degrees.entry(name).or_insert(1) *= plan.mesh.degree(axis);
        }
        for (name, degree) in degrees {
            let op_name = graph.op_name(op);
            let Some(factor) = factors.iter().find(|factor| factor.name == *name) else {
                let known: Vec<&str> = factors.iter().map(|factor| factor.name.as_str()).collect();
                return Err(PartitionError::Invalid(format!(
                    "`{op_name}` cannot be divided along `{name}`; it has {}",
                    known.join(", ")
                )));
            };
            if !factor.admits(degree) {
                return Err(PartitionError::Invalid(format!(
                    "`{op_name}` has {} elements along `{name}` and cannot be divided over {degree} ranks{}",
                    factor.size,
                    if factor.even { " evenly" } else { "" }
                )));
            }
        }
    }
    Ok(())
}

/// A version of a global tensor in one layout, with its local tensor on every rank.
#[derive(Clone)]
struct Version {
    layout: Layout,
    locals: Vec<TensorId>,
    /// The phase it may be read in; `None` for the version that its producer made.
    phase: Option<Phase>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Forward,
    Backward,
}

struct Partitioner<'a> {
    graph: &'a Graph,
    plan: &'a Plan,
    cluster: &'a Cluster,
    locals: Vec<Graph>,
    /// Versions of each global tensor, the producer's first.
    versions: Vec<Vec<Version>>,
    names: BTreeSet<String>,
    phase: Phase,
    /// Ops from this one on belong to the backward phase.
    n_forward_ops: usize,
}

impl<'a> Partitioner<'a> {
    fn new(graph: &'a Graph, plan: &'a Plan, cluster: &'a Cluster) -> Self {
        let mut names: BTreeSet<String> = graph
            .tensors
            .iter()
            .map(|tensor| tensor.name.clone())
            .collect();
        names.insert(String::new());
        Self {
            graph,
            plan,
            cluster,
            locals: vec![Graph::new(&graph.name); plan.mesh.n_ranks()],
            versions: vec![Vec::new(); graph.tensors.len()],
            names,
            phase: Phase::Forward,
            n_forward_ops: n_forward_ops(graph),
        }
    }

    fn mesh(&self) -> &'a Mesh {
        &self.plan.mesh
    }

    fn add_source(&mut self, tensor_id: TensorId) -> Result<(), PartitionError> {
        let tensor = self.graph.tensor(tensor_id);
        let layout = self.plan.source_layout(tensor_id);
        for (dim, axes) in &layout.shards {
            let degree: usize = axes.iter().map(|axis| self.mesh().degree(axis)).product();
            match tensor.ty.size_of(dim) {
                Some(size) if degree <= size => {}
                Some(size) => {
                    return Err(PartitionError::Invalid(format!(
                        "`{}` has {size} elements along `{dim}` and cannot be kept over {degree} ranks",
                        tensor.name
                    )));
                }
                None => {
                    return Err(PartitionError::Invalid(format!(
                        "`{}` has no dim `{dim}` to shard",
                        tensor.name
                    )));
                }
            }
        }
        let mesh = self.mesh();
        let mut locals = Vec::with_capacity(self.locals.len());
        for (rank, local) in self.locals.iter_mut().enumerate() {
            let role = match &tensor.role {
                Role::State { of } => {
                    let owner = self.versions[of.index()]
                        .first()
                        .map(|version| version.locals[rank]);
                    Role::State {
                        of: owner.unwrap_or(*of),
                    }
                }
                role => role.clone(),
            };
            locals.push(local.add_source(
                &tensor.name,
                local_type(&tensor.ty, &layout, mesh, rank),
                role,
            ));
        }
        self.versions[tensor_id.index()].push(Version {
            layout,
            locals,
            phase: None,
        });
        Ok(())
    }

    fn add_op(&mut self, op_id: OpId, op: &Op) -> Result<(), PartitionError> {
        if op_id.index() == self.n_forward_ops {
            self.phase = Phase::Backward;
        }
        let layouts = self.plan.op_layouts(self.graph, op_id);
        let inputs: Vec<Vec<TensorId>> = op
            .inputs
            .iter()
            .zip(&layouts.inputs)
            .map(|(input, layout)| self.version_in(*input, layout))
            .collect::<Result<_, _>>()?;
        let name = self.graph.op_name(op);
        let mut results: Vec<Vec<TensorId>> = vec![Vec::new(); op.results.len()];
        for rank in 0..self.locals.len() {
            let kind = op
                .kind
                .localize(|dim, size| self.interval(op, &layouts, dim, size, rank));
            let kind = self.among_members(kind, op, &layouts, rank);
            let local_inputs: Vec<TensorId> = inputs.iter().map(|locals| locals[rank]).collect();
            let local = &mut self.locals[rank];
            let local_results = local
                .add_op(name, kind, &local_inputs)
                .map_err(|error| PartitionError::Internal(format!("rank {rank}: {error}")))?;
            for (result_idx, (result, local_result)) in
                op.results.iter().zip(local_results).enumerate()
            {
                let expected = local_type(
                    self.graph.ty(*result),
                    &layouts.results[result_idx],
                    &self.plan.mesh,
                    rank,
                );
                let ty = local.ty(local_result);
                if *ty != expected {
                    return Err(PartitionError::Internal(format!(
                        "rank {rank}: `{name}` gives {ty}, its layout says {expected}"
                    )));
                }
                results[result_idx].push(local_result);
            }
        }
        for ((result, locals), layout) in op.results.iter().zip(results).zip(layouts.results) {
            self.versions[result.index()].push(Version {
                layout,
                locals,
                phase: None,
            });
        }
        Ok(())
    }

    /// A move of tokens, among the ranks that divide its experts.
    fn among_members(&self, kind: OpKind, op: &Op, layouts: &OpLayouts, rank: usize) -> OpKind {
        let OpKind::MoeMove(mut moved) = kind else {
            return kind;
        };
        let expert = moved.dims.expert.clone();
        let (Some(rows), Some(layout)) = (op.inputs.first(), layouts.inputs.first()) else {
            return OpKind::MoeMove(moved);
        };
        let axes = layout.axes_of(&expert);
        if !moved.stays && !axes.is_empty() {
            let ranks = self.mesh().group(rank, axes);
            let size = self.graph.ty(*rows).size_of(&expert).unwrap_or(0);
            let share = |member: &usize| layout.interval(&expert, size, self.mesh(), *member).len;
            moved.over = Some(Box::new(Shares {
                counts: ranks.iter().map(share).collect(),
                group: Group {
                    axes: axes.to_vec(),
                    ranks,
                },
            }));
        }
        OpKind::MoeMove(moved)
    }

    /// The part of a dim of an op's iteration space that a rank works on.
    fn interval(
        &self,
        op: &Op,
        layouts: &OpLayouts,
        dim: &Dim,
        size: usize,
        rank: usize,
    ) -> Interval {
        let results = op.results.iter().zip(&layouts.results);
        let inputs = op.inputs.iter().zip(&layouts.inputs);
        for (tensor, layout) in results.chain(inputs) {
            if let Some(size) = self.graph.ty(*tensor).size_of(dim) {
                return layout.interval(dim, size, self.mesh(), rank);
            }
        }
        Interval {
            start: 0,
            len: size,
        }
    }

    /// The local tensors of `tensor_id` in `layout`, resharded where no version has it yet.
    fn version_in(
        &mut self,
        tensor_id: TensorId,
        layout: &Layout,
    ) -> Result<Vec<TensorId>, PartitionError> {
        let versions = &self.versions[tensor_id.index()];
        let usable = |version: &&Version| version.phase.is_none_or(|phase| phase == self.phase);
        if let Some(version) = versions
            .iter()
            .filter(usable)
            .find(|version| version.layout == *layout)
        {
            return Ok(version.locals.clone());
        }
        let ty = self.graph.ty(tensor_id);
        let name = &self.graph.tensor(tensor_id).name;
        let mut best: Option<(f64, &Version, Vec<Step>)> = None;
        for version in versions.iter().filter(usable) {
            if let Some((seconds, steps)) =
                reshard_path(&version.layout, layout, ty, self.mesh(), self.cluster)
                && best.as_ref().is_none_or(|(least, ..)| seconds < *least)
            {
                best = Some((seconds, version, steps));
            }
        }
        let Some((_, start, steps)) = best else {
            let from = versions
                .first()
                .map(|version| version.layout.display(ty.dims()))
                .unwrap_or_default();
            return Err(PartitionError::Internal(format!(
                "`{name}` in {from} cannot be brought to {}",
                layout.display(ty.dims())
            )));
        };
        let mut version = start.clone();
        version.phase = Some(self.phase);
        for step in &steps {
            version = self.add_step(tensor_id, version, step)?;
            let known = &mut self.versions[tensor_id.index()];
            if !known
                .iter()
                .any(|other| other.layout == version.layout && other.phase == version.phase)
            {
                known.push(version.clone());
            }
        }
        Ok(version.locals)
    }

    fn add_step(
        &mut self,
        tensor_id: TensorId,
        from: Version,
        step: &Step,
    ) -> Result<Version, PartitionError> {
        let global = self.graph.tensor(tensor_id);
        let layout = step.apply(&from.layout).ok_or_else(|| {
            PartitionError::Internal(format!(
                "`{}`: the step {step} does not apply to its layout",
                global.name
            ))
        })?;
        let name = self.fresh_name(&format!("{}.{step}", global.name));
        let mesh = self.mesh();
        let mut locals = Vec::with_capacity(self.locals.len());
        for (rank, local) in self.locals.iter_mut().enumerate() {
            let input = from.locals[rank];
            let ty = local_type(&global.ty, &layout, mesh, rank);
            let site = Site {
                ty: &global.ty,
                from: &from.layout,
                to: &layout,
                mesh,
                rank,
            };
            let kind = site.lower(step);
            locals.push(local.add_typed_op(&name, kind, &[input], ty));
        }
        Ok(Version {
            layout,
            locals,
            phase: from.phase,
        })
    }

    fn fresh_name(&mut self, base: &str) -> String {
        let mut name = base.to_string();
        let mut n_taken = 1;
        while !self.names.insert(name.clone()) {
            n_taken += 1;
            name = format!("{base}#{n_taken}");
        }
        name
    }

    fn finish(mut self, keep: Keep, outputs: &[Layout]) -> Result<Partition, PartitionError> {
        let graph = self.graph;
        let mut output_layouts = Vec::new();
        for (output_idx, output) in graph.outputs.iter().enumerate() {
            let given = outputs.get(output_idx).cloned();
            let layout = given.unwrap_or_else(|| self.reduced_layout(*output));
            for (rank, local_id) in self.version_in(*output, &layout)?.into_iter().enumerate() {
                self.locals[rank].outputs.push(local_id);
            }
            output_layouts.push(layout);
        }
        for (source, updated) in &graph.updates {
            let layout = self.plan.source_layout(*source);
            let sources = self.version_in(*source, &layout)?;
            let updated = self.version_in(*updated, &layout)?;
            for (rank, (source, updated)) in sources.into_iter().zip(updated).enumerate() {
                self.locals[rank].updates.insert(source, updated);
            }
        }
        let mut gradient_layouts = Vec::new();
        if keep == Keep::Gradients {
            for (param, gradient) in &graph.gradients {
                let layout = self.plan.source_layout(*param);
                let params = self.version_in(*param, &layout)?;
                let gradients = self.version_in(*gradient, &layout)?;
                for (rank, (param, gradient)) in params.into_iter().zip(gradients).enumerate() {
                    self.locals[rank].gradients.insert(param, gradient);
                }
                gradient_layouts.push(layout);
            }
        }
        Ok(Partition {
            locals: self.locals,
            output_layouts,
            gradient_layouts,
        })
    }

    /// The producer's layout of a tensor, without partial values.
    fn reduced_layout(&self, tensor_id: TensorId) -> Layout {
        let mut layout = self.versions[tensor_id.index()]
            .first()
            .map(|version| version.layout.clone())
            .unwrap_or_default();
        layout.partial.clear();
        layout
    }
}

/// The first op of the backward phase: the first that reads what only gradients and updates need.
///
/// Ops that an output depends on are forward; the first op after the last of them is backward.
fn n_forward_ops(graph: &Graph) -> usize {
    let producers = graph.producers();
    graph
        .outputs
        .iter()
        .filter_map(|output| producers[output.index()])
        .map(|op_id| op_id.index() + 1)
        .max()
        .unwrap_or(graph.ops.len())
}

/// One rank's view of one reshard step.
struct Site<'a> {
    ty: &'a TensorType,
    from: &'a Layout,
    to: &'a Layout,
    mesh: &'a Mesh,
    rank: usize,
}

impl Site<'_> {
    fn lower(&self, step: &Step) -> OpKind {
        match step {
            Step::AllGather { dim, axis } => OpKind::AllGather {
                dim: dim.clone(),
                counts: self.counts(self.from, dim, axis),
                group: self.group(axis),
            },
            Step::Slice { dim, .. } => {
                let (from, to) = (
                    self.interval(self.from, dim, self.rank),
                    self.interval(self.to, dim, self.rank),
                );
                OpKind::Slice {
                    dim: dim.clone(),
                    start: to.start - from.start,
                    len: to.len,
                }
            }
            Step::AllToAll { from, to, axis } => OpKind::AllToAll {
                split: to.clone(),
                split_counts: self.counts(self.to, to, axis),
                concat: from.clone(),
                concat_counts: self.counts(self.from, from, axis),
                group: self.group(axis),
            },
            Step::AllReduce { axis, kind } => OpKind::AllReduce {
                kind: *kind,
                group: self.group(axis),
            },
            Step::ReduceScatter { axis, kind, dim } => OpKind::ReduceScatter {
                kind: *kind,
                dim: dim.clone(),
                counts: self.counts(self.to, dim, axis),
                group: self.group(axis),
            },
        }
    }

    fn group(&self, axis: &Axis) -> Group {
        Group {
            axes: vec![axis.clone()],
            ranks: self.mesh.group(self.rank, std::slice::from_ref(axis)),
        }
    }

    /// Elements along `dim` of each member of the axis's group, in `layout`.
    fn counts(&self, layout: &Layout, dim: &Dim, axis: &Axis) -> Vec<usize> {
        let group = self.mesh.group(self.rank, std::slice::from_ref(axis));
        group
            .into_iter()
            .map(|member| self.interval(layout, dim, member).len)
            .collect()
    }

    fn interval(&self, layout: &Layout, dim: &Dim, rank: usize) -> Interval {
        layout.interval(dim, self.ty.size_of(dim).unwrap_or(0), self.mesh, rank)
    }
}
