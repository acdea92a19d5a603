//! Lowering: local graphs to the program that the runtime executes.
//!
//! Enters: a partitioned graph. Leaves: instructions over an arena for every rank, and the kernels
//! that they call, equal kernels once.
//! Invariant: instructions stand in an order that respects every dependency, all addresses are fixed,
//! and the arena's size is the peak that the runtime will allocate.

mod counted;
mod globals;
mod memory;

use std::collections::BTreeMap;

use meshweave_dsl::cluster::{Cluster, DeviceKind};
use meshweave_dsl::graph::{Graph, Op, OpId, TensorId, TensorType};
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::OpKind;
use meshweave_dsl::plan::Plan;
use meshweave_dsl::program::{
    Action, Bias, Buffer, BufferId, ContractIndex, CountedRows, Instruction, KernelId,
    KernelSymbol, PROGRAM_VERSION, Program, RankProgram,
};

use crate::codegen::fuse::{FuseError, Item, Platform, fuse};
use crate::codegen::kernel::{Kernel, RowProgram};
use crate::partition::Partition;
use crate::plan::copies::Copies;
use crate::plan::cost::{
    GroupShape, Traffic, collective_seconds, fragment_seconds, op_seconds, traffic_seconds,
};
use counted::{CountedStep, Rows};
use globals::Globals;
use memory::{Access, MemoryPlan, plan_memory};

/// A partition that cannot be lowered.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum LowerError {
    #[error(transparent)]
    Fuse(#[from] FuseError),
    #[error("internal error in lowering: {0}")]
    Internal(String),
}

/// A program and the kernels that it calls, in the order of their ids.
#[derive(Clone, Debug)]
pub struct Lowered {
    pub program: Program,
    pub kernels: Vec<Kernel>,
}

/// One step of a rank: an item of its graph, or a message.
// Most steps are items; a box would be one more allocation an instruction.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug)]
pub enum Step {
    Item(Item),
    Send {
        tensor: TensorId,
        to: usize,
    },
    /// The only producer of its tensor.
    Recv {
        tensor: TensorId,
        from: usize,
    },
}

/// The ranks' programs, with the way from a tensor of a rank's graph to its buffer.
pub struct LoweredRanks {
    pub ranks: Vec<RankProgram>,
    pub buffers_of: Vec<BTreeMap<TensorId, BufferId>>,
    /// Index of the first instruction of every step, one list a rank.
    pub firsts: Vec<Vec<usize>>,
    pub symbols: Vec<KernelSymbol>,
    pub kernels: Vec<Kernel>,
}

/// Lowers the partition of `graph` under `plan` for a platform; prices are those of `cluster`.
///
/// # Errors
/// An op that no instruction can express, or a broken partition.
pub fn lower(
    graph: &Graph,
    plan: &Plan,
    partition: &Partition,
    cluster: &Cluster,
    platform: Platform,
) -> Result<Lowered, LowerError> {
    let steps = partition.locals.iter().map(|local| {
        let items = fuse(local, platform)?;
        Ok(items.into_iter().map(Step::Item).collect())
    });
    let steps = steps.collect::<Result<Vec<_>, LowerError>>()?;
    let lowered = lower_ranks(&partition.locals, steps, cluster)?;
    let site = Globals {
        graph,
        mesh: &plan.mesh,
        locals: &partition.locals,
        buffers_of: &lowered.buffers_of,
    };
    let program = Program {
        version: PROGRAM_VERSION,
        name: plan.name.clone(),
        mesh: plan.mesh.clone(),
        sources: site.sources(plan)?,
        outputs: site.outputs(partition)?,
        kernels: lowered.symbols,
        channels: Vec::new(),
        statements: BTreeMap::new(),
        ranks: lowered.ranks,
    };
    Ok(Lowered {
        program,
        kernels: lowered.kernels,
    })
}

/// Lowers the steps of every rank over the tensors and ops of its graph.
///
/// # Errors
/// An item that no instruction can express.
pub fn lower_ranks(
    locals: &[Graph],
    steps: Vec<Vec<Step>>,
    cluster: &Cluster,
) -> Result<LoweredRanks, LowerError> {
    let mut kernels = KernelTable::default();
    let mut lowered = LoweredRanks {
        ranks: Vec::with_capacity(locals.len()),
        buffers_of: Vec::with_capacity(locals.len()),
        firsts: Vec::with_capacity(locals.len()),
        symbols: Vec::new(),
        kernels: Vec::new(),
    };
    for (rank, (local, steps)) in locals.iter().zip(steps).enumerate() {
        let (local, steps) = counted::count(local, rank, steps);
        let lowering = RankLowering::new(rank, &local, steps, cluster, &mut kernels);
        let (rank, buffers, firsts) = lowering.finish()?;
        lowered.ranks.push(rank);
        lowered.buffers_of.push(buffers);
        lowered.firsts.push(firsts);
    }
    lowered.symbols = kernels.symbols();
    lowered.kernels = kernels.kernels;
    Ok(lowered)
}

/// Kernels by their code: equal code is one kernel.
#[derive(Default)]
struct KernelTable {
    kernels: Vec<Kernel>,
    descriptions: Vec<String>,
    ids: BTreeMap<RowProgram, KernelId>,
}

impl KernelTable {
    fn id_of(&mut self, kernel: &Kernel, description: &str) -> KernelId {
        if let Some(id) = self.ids.get(kernel.program()) {
            return *id;
        }
        let id = KernelId(self.kernels.len() as u32);
        self.ids.insert(kernel.program().clone(), id);
        // Fragments of different shapes may wish for one name.
        self.kernels.push(
            kernel
                .clone()
                .renamed(format!("k{}_{}", id.0, kernel.name())),
        );
        self.descriptions.push(description.into());
        id
    }

    fn symbols(&self) -> Vec<KernelSymbol> {
        let named = self.kernels.iter().zip(&self.descriptions);
        named
            .map(|(kernel, description)| KernelSymbol {
                name: kernel.name().into(),
                description: description.clone(),
                splittable: kernel.program().is_splittable(),
                n_rows: kernel.program().n_rows(),
            })
            .collect()
    }
}

/// A rank's program, where its tensors lie, and the first instruction of every step.
type FinishedRank = (RankProgram, BTreeMap<TensorId, BufferId>, Vec<usize>);

struct RankLowering<'a> {
    rank: usize,
    local: &'a Graph,
    cluster: &'a Cluster,
    steps: Vec<CountedStep>,
    memory: MemoryPlan,
    buffers: Vec<Buffer>,
    buffer_of: BTreeMap<TensorId, BufferId>,
    kernels: &'a mut KernelTable,
}

impl<'a> RankLowering<'a> {
    fn new(
        rank: usize,
        local: &'a Graph,
        steps: Vec<CountedStep>,
        cluster: &'a Cluster,
        kernels: &'a mut KernelTable,
    ) -> Self {
        let accesses: Vec<Access> = steps.iter().map(|step| access_of(local, step)).collect();
        let memory = plan_memory(local, &accesses);
        let mut buffers = Vec::new();
        let mut buffer_of = BTreeMap::new();
        for (tensor_id, offset) in &memory.offsets {
            let tensor = local.tensor(*tensor_id);
            buffer_of.insert(*tensor_id, BufferId(buffers.len() as u32));
            buffers.push(Buffer {
                name: tensor.name.clone(),
                offset: *offset,
                ty: tensor.ty.clone(),
                persistent: tensor.role != meshweave_dsl::graph::Role::Temp,
            });
        }
        Self {
            rank,
            local,
            cluster,
            steps,
            memory,
            buffers,
            buffer_of,
            kernels,
        }
    }

    fn finish(mut self) -> Result<FinishedRank, LowerError> {
        let mut instructions = Vec::with_capacity(self.steps.len());
        let mut firsts = Vec::with_capacity(self.steps.len());
        let steps = std::mem::take(&mut self.steps);
        for (step_idx, step) in steps.iter().enumerate() {
            if !step.is_added {
                firsts.push(instructions.len());
            }
            match &step.step {
                Step::Item(item) => {
                    let rows = step.rows.as_ref();
                    self.add_item(step_idx, item, rows, &mut instructions)?;
                }
                Step::Send { tensor, to } => {
                    let (to, src) = (*to, self.buffer(*tensor)?);
                    let action = Action::Send { to, src };
                    instructions.push(self.message(step_idx, *tensor, to, action));
                }
                Step::Recv { tensor, from } => {
                    let (from, dst) = (*from, self.buffer(*tensor)?);
                    let action = Action::Recv { from, dst };
                    instructions.push(self.message(step_idx, *tensor, from, action));
                }
            }
        }
        for (source, value) in std::mem::take(&mut self.memory.copies) {
            let copy = self.copy(
                value,
                source,
                self.memory.live_bytes.last().copied().unwrap_or(0),
            )?;
            instructions.push(copy);
        }
        let program = RankProgram {
            arena_bytes: self.memory.arena_bytes,
            buffers: self.buffers,
            instructions,
            spans: Vec::new(),
        };
        Ok((program, self.buffer_of, firsts))
    }

    /// A message to or from `peer`. Both ends copy on a host; on other devices the receiver's price is
    /// that of the link, and the sender only starts it.
    fn message(
        &self,
        step_idx: usize,
        tensor: TensorId,
        peer: usize,
        action: Action,
    ) -> Instruction {
        let tensor = self.local.tensor(tensor);
        let n_bytes = tensor.ty.n_bytes() as f64;
        let is_send = matches!(action, Action::Send { .. });
        let link = GroupShape::of(&[self.rank, peer], self.cluster);
        let predicted_s = if is_send && self.cluster.device.kind != DeviceKind::Host {
            self.cluster.device.launch_s
        } else {
            traffic_seconds(Traffic::Permute, n_bytes, link, self.cluster)
        };
        Instruction {
            name: format!("{}.{}", tensor.name, if is_send { "send" } else { "recv" }),
            action,
            n_flops: 0.0,
            n_bytes,
            predicted_s,
            live_bytes: self.memory.live_bytes[step_idx],
            rows: None,
        }
    }

    fn add_item(
        &mut self,
        item_idx: usize,
        item: &Item,
        rows: Option<&Rows>,
        instructions: &mut Vec<Instruction>,
    ) -> Result<(), LowerError> {
        let live_bytes = self.memory.live_bytes[item_idx];
        let rows = rows.filter(|_| match item {
            Item::Fragment(fragment) => fragment.kernel.program().stores_in_order(),
            _ => true,
        });
        let action = match item {
            Item::View { .. } => return Ok(()),
            Item::Fragment(fragment) => {
                let kernel = self.kernels.id_of(&fragment.kernel, &fragment.name);
                Action::Kernel {
                    kernel,
                    args: self.buffers_of(&fragment.args)?,
                }
            }
            Item::Contract {
                op,
                a,
                b,
                out,
                onto,
                bias,
            } => {
                if let Some(onto) = onto
                    && self.memory.offsets.get(onto) != self.memory.offsets.get(out)
                {
                    instructions.push(self.copy(*onto, *out, live_bytes)?);
                }
                let op = self.local.op(*op);
                let [a_ty, b_ty, c_ty] = [*a, *b, *out].map(|id| self.local.ty(id));
                let bias = bias.map(|id| self.bias(id, [a_ty, b_ty, c_ty]));
                Action::Contract {
                    indices: contract_indices(a_ty, b_ty, self.local.ty(result(op, 0)?), c_ty)?,
                    a: self.buffer(*a)?,
                    b: self.buffer(*b)?,
                    c: self.buffer(*out)?,
                    accumulate: onto.is_some(),
                    bias: bias.transpose()?,
                }
            }
            Item::Attention { op, softmax } => {
                let op = self.local.op(*op);
                let OpKind::Attention(dims) = &op.kind else {
                    return Err(LowerError::Internal(
                        "an attention item of another op".into(),
                    ));
                };
                Action::Attention {
                    dims: dims.clone(),
                    q: self.buffer(input(op, 0)?)?,
                    k: self.buffer(input(op, 1)?)?,
                    v: self.buffer(input(op, 2)?)?,
                    o: self.buffer(result(op, 0)?)?,
                    lse: self.buffer(result(op, 1)?)?,
                    seen: (op.inputs.get(3))
                        .map(|seen| self.buffer(*seen))
                        .transpose()?,
                    scratch: self.scratch(item_idx, op)?,
                    kernel: self.kernels.id_of(softmax, "attention softmax"),
                }
            }
            Item::AttentionGrad { op, softmax } => {
                let op = self.local.op(*op);
                let OpKind::AttentionGrad(dims) = &op.kind else {
                    return Err(LowerError::Internal(
                        "an attention gradient item of another op".into(),
                    ));
                };
                let inputs = self.buffers_of(&op.inputs)?;
                let results = self.buffers_of(&op.results)?;
                let arity = || {
                    LowerError::Internal("attention_grad takes 6 inputs and gives 3 results".into())
                };
                Action::AttentionGrad {
                    dims: dims.clone(),
                    inputs: inputs.try_into().map_err(|_| arity())?,
                    results: results.try_into().map_err(|_| arity())?,
                    scratch: self.scratch(item_idx, op)?,
                    kernel: self.kernels.id_of(softmax, "attention softmax gradient"),
                }
            }
            Item::Routine { op } => {
                let op = self.local.op(*op);
                Action::Routine {
                    op: op.kind.clone(),
                    inputs: self.buffers_of(&op.inputs)?,
                    results: self.buffers_of(&op.results)?,
                }
            }
            Item::Collective { op } => {
                let op = self.local.op(*op);
                Action::Collective {
                    op: op.kind.clone(),
                    src: self.buffer(input(op, 0)?)?,
                    dst: self.buffer(result(op, 0)?)?,
                }
            }
        };
        let name = self.item_name(item);
        let share = rows.map_or(1.0, |rows| rows.share);
        let (n_flops, n_bytes, predicted_s) = self.price(item, share);
        instructions.push(Instruction {
            name,
            action,
            n_flops,
            n_bytes,
            predicted_s,
            live_bytes,
            rows: rows.map(|rows| self.counted_rows(item, rows)).transpose()?,
        });
        Ok(())
    }

    /// The bias of a contraction of operands and a result of these types.
    fn bias(&self, id: TensorId, [a, b, c]: [&TensorType; 3]) -> Result<Bias, LowerError> {
        let of = self.local.ty(id);
        let strides = of.strides();
        let stride = |dim: &Dim| of.position(dim).map_or(0, |position| strides[position]);
        Ok(Bias {
            buffer: self.buffer(id)?,
            strides: contract_dims(a, b, c)
                .iter()
                .map(|(dim, _)| stride(dim))
                .collect(),
        })
    }

    fn counted_rows(&self, item: &Item, rows: &Rows) -> Result<CountedRows, LowerError> {
        let mut indices = Vec::new();
        if let Item::Contract { a, b, out, .. } = item {
            let [a, b, out] = [a, b, out].map(|id| self.local.ty(*id));
            let all = contract_dims(a, b, out);
            let groups = self.local.ty(rows.counts).dims();
            for dim in groups.chain([&rows.slot]) {
                let position = all.iter().position(|(other, _)| other == dim);
                indices.push(position.ok_or_else(|| {
                    LowerError::Internal(format!("a contraction of rows lacks `{dim}`"))
                })?);
            }
        }
        let result_counts = rows.result_counts.map(|counts| self.buffer(counts));
        Ok(CountedRows {
            counts: self.buffer(rows.counts)?,
            result_counts: result_counts.transpose()?,
            slot: rows.slot.clone(),
            indices,
        })
    }

    /// (flops, bytes, seconds) of one execution on this share of the rows.
    fn price(&self, item: &Item, share: f64) -> (f64, f64, f64) {
        let types = |ids: &[TensorId]| {
            ids.iter()
                .map(|id| self.local.ty(*id))
                .collect::<Vec<&TensorType>>()
        };
        let flops = |op: &Op| op.kind.n_flops(&types(&op.inputs), &types(&op.results));
        match item {
            Item::Fragment(fragment) => {
                let n_flops: f64 = fragment
                    .ops
                    .iter()
                    .map(|op| flops(self.local.op(*op)))
                    .sum();
                let n_bytes: f64 = types(&fragment.args)
                    .iter()
                    .map(|ty| ty.n_bytes() as f64)
                    .sum();
                let (n_flops, n_bytes) = (share * n_flops, share * n_bytes);
                let seconds = fragment_seconds(n_flops, n_bytes, self.cluster);
                (n_flops, n_bytes, seconds)
            }
            Item::Collective { op } => {
                let op = self.local.op(*op);
                let (inputs, results) = (types(&op.inputs), types(&op.results));
                let n_bytes = inputs
                    .iter()
                    .chain(&results)
                    .map(|ty| ty.n_bytes())
                    .max()
                    .unwrap_or(0) as f64;
                let n_bytes = share * n_bytes;
                (
                    0.0,
                    n_bytes,
                    collective_seconds(&op.kind, n_bytes, self.cluster),
                )
            }
            Item::Contract { op, .. }
            | Item::Attention { op, .. }
            | Item::AttentionGrad { op, .. }
            | Item::Routine { op }
            | Item::View { op } => {
                let op = self.local.op(*op);
                let (inputs, results) = (types(&op.inputs), types(&op.results));
                let (launch_s, n_rows) = (self.cluster.device.launch_s, share);
                let whole_s = op_seconds(&op.kind, &inputs, &results, self.cluster);
                let mut seconds = launch_s.min(whole_s) + n_rows * (whole_s - launch_s).max(0.0);
                if op.kind.group().is_some() {
                    let n_bytes = share * types(&op.results[..1])[0].n_bytes() as f64;
                    let n_ranks = op.kind.group().map_or(1, |group| group.ranks.len());
                    let copies = Copies::of(self.local, op);
                    let n_bytes = n_bytes * copies.map_or(1.0, |copies| copies.share(n_ranks));
                    seconds += collective_seconds(&op.kind, n_bytes, self.cluster);
                }
                let n_bytes = op.kind.n_bytes_moved(&inputs, &results);
                (share * flops(op), share * n_bytes, seconds)
            }
        }
    }

    fn item_name(&self, item: &Item) -> String {
        match item {
            Item::Fragment(fragment) => fragment.name.clone(),
            Item::Contract { op, .. }
            | Item::Attention { op, .. }
            | Item::AttentionGrad { op, .. }
            | Item::Routine { op }
            | Item::Collective { op }
            | Item::View { op } => self.local.op_name(self.local.op(*op)).into(),
        }
    }

    fn copy(
        &self,
        from: TensorId,
        to: TensorId,
        live_bytes: usize,
    ) -> Result<Instruction, LowerError> {
        let ty = self.local.ty(from);
        let kind = OpKind::Transpose {
            dims: ty.dims().cloned().collect(),
        };
        let predicted_s = op_seconds(&kind, &[ty], &[ty], self.cluster);
        Ok(Instruction {
            name: format!("{}.copy", self.local.tensor(to).name),
            action: Action::Routine {
                op: kind,
                inputs: vec![self.buffer(from)?],
                results: vec![self.buffer(to)?],
            },
            n_flops: 0.0,
            n_bytes: 2.0 * ty.n_bytes() as f64,
            predicted_s,
            live_bytes,
            rows: None,
        })
    }

    fn scratch(&mut self, item_idx: usize, op: &Op) -> Result<BufferId, LowerError> {
        let n_elements = scratch_elements(self.local, op);
        let offset = match self.memory.scratch[item_idx] {
            Some(offset) => offset,
            None if n_elements == 0 => 0,
            None => {
                let what = "an attention item without scratch";
                return Err(LowerError::Internal(what.into()));
            }
        };
        let id = BufferId(self.buffers.len() as u32);
        self.buffers.push(Buffer {
            name: format!("{}.scratch", self.local.op_name(op)),
            offset,
            ty: TensorType::new(meshweave_dsl::dtype::DType::F32, [("scratch", n_elements)]),
            persistent: false,
        });
        Ok(id)
    }

    fn buffer(&self, tensor: TensorId) -> Result<BufferId, LowerError> {
        self.buffer_of.get(&tensor).copied().ok_or_else(|| {
            LowerError::Internal(format!(
                "`{}` is used but has no storage",
                self.local.tensor(tensor).name
            ))
        })
    }

    fn buffers_of(&self, tensors: &[TensorId]) -> Result<Vec<BufferId>, LowerError> {
        tensors.iter().map(|tensor| self.buffer(*tensor)).collect()
    }
}

fn access_of(local: &Graph, step: &CountedStep) -> Access {
    let mut access = match &step.step {
        Step::Item(item) => access(local, item),
        Step::Send { tensor, .. } => Access {
            reads: vec![*tensor],
            ..Access::default()
        },
        Step::Recv { tensor, .. } => Access {
            writes: vec![*tensor],
            ..Access::default()
        },
    };
    if let Some(rows) = &step.rows {
        access.reads.push(rows.counts);
        access.reads.extend(rows.result_counts);
    }
    access
}

/// What an item reads and writes.
fn access(local: &Graph, item: &Item) -> Access {
    let of_op = |op: &OpId| {
        let op = local.op(*op);
        let pairs = op.kind.in_place().iter();
        Access {
            reads: op.inputs.clone(),
            writes: op.results.clone(),
            in_place: pairs
                .map(|(result, input)| (op.results[*result], op.inputs[*input]))
                .collect(),
            ..Access::default()
        }
    };
    match item {
        Item::Fragment(fragment) => Access {
            reads: fragment
                .args
                .iter()
                .filter(|arg| !fragment.results.contains(arg))
                .copied()
                .collect(),
            writes: fragment.results.clone(),
            in_place: fragment.in_place.clone(),
            ..Access::default()
        },
        Item::Contract {
            a,
            b,
            out,
            onto,
            bias,
            ..
        } => Access {
            reads: [Some(*a), Some(*b), *onto, *bias]
                .into_iter()
                .flatten()
                .collect(),
            writes: vec![*out],
            in_place: onto
                .iter()
                .filter(|onto| *onto != a && *onto != b)
                .map(|onto| (*out, *onto))
                .collect(),
            ..Access::default()
        },
        Item::Attention { op, .. } | Item::AttentionGrad { op, .. } => Access {
            scratch_bytes: 4 * scratch_elements(local, local.op(*op)),
            ..of_op(op)
        },
        Item::Routine { op } | Item::Collective { op } => of_op(op),
        Item::View { op } => {
            let op = local.op(*op);
            let view = op.results.first().copied().zip(op.inputs.first().copied());
            Access {
                view,
                ..Access::default()
            }
        }
    }
}

fn scratch_elements(local: &Graph, op: &Op) -> usize {
    let types: Vec<&TensorType> = op.inputs.iter().map(|id| local.ty(*id)).collect();
    op.kind.scratch_elements(&types)
}

/// The loops of c = a · b. `op_ty` names the dims of the result; `c_ty` is where it is written
/// (the same dims, when an addition was folded in).
fn contract_indices(
    a: &TensorType,
    b: &TensorType,
    op_ty: &TensorType,
    c: &TensorType,
) -> Result<Vec<ContractIndex>, LowerError> {
    if !op_ty.dims().all(|dim| c.has(dim)) || op_ty.shape.len() != c.shape.len() {
        return Err(LowerError::Internal(format!(
            "a contraction to {op_ty} is written as {c}"
        )));
    }
    let stride_of = |ty: &TensorType, dim: &Dim| {
        ty.position(dim)
            .map_or(0, |position| ty.strides()[position])
    };
    let indices = contract_dims(a, b, c).into_iter();
    let indices = indices.map(|(dim, size)| ContractIndex {
        size,
        a: stride_of(a, &dim),
        b: stride_of(b, &dim),
        c: stride_of(c, &dim),
    });
    Ok(indices.collect())
}

/// The dims of c, then those that are summed.
fn contract_dims(a: &TensorType, b: &TensorType, c: &TensorType) -> Vec<(Dim, usize)> {
    let mut dims: Vec<(Dim, usize)> = Vec::new();
    for (dim, size) in c.shape.iter().chain(&a.shape).chain(&b.shape) {
        if !dims.iter().any(|(seen, _)| seen == dim) {
            dims.push((dim.clone(), *size));
        }
    }
    dims
}

fn input(op: &Op, idx: usize) -> Result<TensorId, LowerError> {
    let name = op.kind.name();
    op.inputs
        .get(idx)
        .copied()
        .ok_or_else(|| LowerError::Internal(format!("`{name}` has no input {idx}")))
}

fn result(op: &Op, idx: usize) -> Result<TensorId, LowerError> {
    let name = op.kind.name();
    op.results
        .get(idx)
        .copied()
        .ok_or_else(|| LowerError::Internal(format!("`{name}` has no result {idx}")))
}
