//! From a rank's program to instructions with addresses.
//!
//! In: instructions over buffers, the rank's arena, the kernels. Out: one [`Prepared`] an instruction.
//! Invariant: whatever could be wrong with a program is found here, before anything runs: buffers
//! outside of the arena, kernels that do not exist, operands that overlap, sizes that do not fit.

use std::ffi::c_void;

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::TensorType;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::OpKind;
use meshweave_dsl::program::{Action, Buffer, BufferId, CountedRows, KernelId, Program};
use meshweave_dsl::timeline::Category;

use super::KernelTable;
use super::rows::{CallRows, ContractRows, Counts, KernelRows};
use crate::attention::{AttentionPlan, AttentionTypes, BackwardArgs, ForwardArgs, KernelFn};
use crate::collective::{Communicator, Crossing, CrossingOrder, Division, GroupIdx};
use crate::contract::bias::Spread;
use crate::contract::{ContractOptions, ContractPlan};
use crate::device::host::Arena;
use crate::error::{Error, Result};
use crate::routine::Routine;
use crate::routine::moved::MovePlan;

/// An instruction that can run.
pub(super) enum Prepared {
    Kernel {
        function: KernelFn,
        args: Vec<*mut c_void>,
        n_rows: usize,
        /// Worth dividing over the device's threads.
        divisible: bool,
        rows: Option<KernelRows>,
    },
    ContractRows {
        rows: ContractRows,
        bias: Option<(Spread, *const f32)>,
        a: *const f32,
        b: *const f32,
        c: *mut f32,
    },
    Contract {
        plan: ContractPlan,
        /// Run before the product, which is added then.
        bias: Option<(Spread, *const f32)>,
        a: *const f32,
        b: *const f32,
        c: *mut f32,
    },
    Attention {
        plan: AttentionPlan,
        kernel: KernelFn,
        args: ForwardArgs,
        scratch: *mut f32,
    },
    AttentionGrad {
        plan: AttentionPlan,
        kernel: KernelFn,
        args: BackwardArgs,
        scratch: *mut f32,
    },
    Routine {
        routine: Routine,
        inputs: Vec<*const u32>,
        results: Vec<*mut u32>,
        rows: Option<KernelRows>,
    },
    /// A move of tokens from slots to slots, among the ranks of a group where there is one.
    Move {
        plan: MovePlan,
        group: Option<GroupIdx>,
        inputs: Vec<*const u32>,
        result: *mut u32,
    },
    Collective {
        call: Call,
        group: GroupIdx,
        src: *const u32,
        n_src: usize,
        dst: *mut u32,
        n_dst: usize,
    },
    CollectiveRows {
        rows: CallRows,
        group: GroupIdx,
        src: *const u32,
        dst: *mut u32,
    },
    Send {
        to: usize,
        src: *const u32,
        n_words: usize,
    },
    Recv {
        from: usize,
        dst: *mut u32,
        n_words: usize,
    },
}

/// A collective with its divisions.
pub(super) enum Call {
    AllGather(Division),
    AllReduce(meshweave_dsl::layout::ReduceKind),
    ReduceScatter(meshweave_dsl::layout::ReduceKind, Division),
    AllToAll(Crossing),
    CollectivePermute { from: usize },
    Broadcast,
}

impl Prepared {
    pub(super) fn category(&self) -> Category {
        match self {
            Prepared::Kernel { .. } => Category::Kernel,
            Prepared::Contract { .. } | Prepared::ContractRows { .. } => Category::Contract,
            Prepared::Attention { .. } | Prepared::AttentionGrad { .. } => Category::Attention,
            Prepared::Routine { .. } | Prepared::Move { group: None, .. } => Category::Routine,
            Prepared::Move { group: Some(_), .. } => Category::Collective,
            Prepared::Collective { .. } | Prepared::CollectiveRows { .. } => Category::Collective,
            Prepared::Send { .. } | Prepared::Recv { .. } => Category::Message,
        }
    }

    /// Whether it communicates.
    pub(super) fn is_exchange(&self) -> bool {
        matches!(self.category(), Category::Collective | Category::Message)
    }

    /// Elements of attention scratch that each further thread needs.
    pub(super) fn scratch_elements(&self) -> usize {
        match self {
            Prepared::Attention { plan, .. } => plan.scratch_elements(false),
            Prepared::AttentionGrad { plan, .. } => plan.scratch_elements(true),
            _ => 0,
        }
    }
}

/// Prepares all instructions of a rank.
///
/// # Errors
/// `Invalid` when the program is damaged, `Unsupported` when it needs what the host lacks.
pub(super) fn prepare(
    program: &Program,
    rank: usize,
    arena: &mut Arena,
    kernels: &KernelTable,
    communicator: &mut dyn Communicator,
) -> Result<Vec<Prepared>> {
    let rank_program = &program.ranks[rank];
    let mut site = Site {
        program,
        buffers: &rank_program.buffers,
        arena,
        kernels,
    };
    let instructions = rank_program.instructions.iter().enumerate();
    instructions
        .map(|(instruction_idx, instruction)| {
            let prepared = site.action(&instruction.action, instruction.n_bytes, communicator);
            let prepared = prepared.and_then(|prepared| match &instruction.rows {
                Some(rows) => site.keep_to(rows, &instruction.action, prepared),
                None => Ok(prepared),
            });
            prepared.map_err(|error| within(error, rank, instruction_idx, &instruction.name))
        })
        .collect()
}

fn within(error: Error, rank: usize, instruction_idx: usize, name: &str) -> Error {
    let place = format!("rank {rank}, instruction {instruction_idx} `{name}`");
    match error {
        Error::Invalid(text) => Error::Invalid(format!("{place}: {text}")),
        Error::Infeasible(text) => Error::Infeasible(format!("{place}: {text}")),
        Error::Exhausted(text) => Error::Exhausted(format!("{place}: {text}")),
        Error::Unsupported(text) => Error::Unsupported(format!("{place}: {text}")),
        Error::Internal(text) => Error::Internal(format!("{place}: {text}")),
    }
}

struct Site<'a> {
    program: &'a Program,
    buffers: &'a [Buffer],
    arena: &'a mut Arena,
    kernels: &'a KernelTable,
}

impl<'a> Site<'a> {
    fn action(
        &mut self,
        action: &Action,
        n_bytes: f64,
        communicator: &mut dyn Communicator,
    ) -> Result<Prepared> {
        match action {
            Action::Kernel { kernel, args } => self.kernel(*kernel, args, n_bytes),
            Action::Contract {
                a,
                b,
                c,
                indices,
                accumulate,
                bias,
            } => {
                let reads = [*a, *b].into_iter();
                let reads = reads.chain(bias.as_ref().map(|bias| bias.buffer));
                self.disjoint(&reads.collect::<Vec<_>>(), &[*c])?;
                let options = ContractOptions {
                    accumulate: *accumulate || bias.is_some(),
                    ..ContractOptions::default()
                };
                let plan = ContractPlan::new(indices, options)?;
                let spans = plan.spans();
                let mut spans = vec![(*a, spans.0), (*b, spans.1), (*c, spans.2)];
                if let Some(bias) = bias {
                    // Without a stride for each index it fits no buffer.
                    spans.push((bias.buffer, bias.span(indices).unwrap_or(usize::MAX)));
                }
                for (id, span) in spans {
                    let buffer = self.buffer(id)?;
                    if buffer.ty.n_elements() < span {
                        return Err(Error::Invalid(format!(
                            "damaged program: `{}` {} has {} elements, the contraction spans {span}; \
                             compile again",
                            buffer.name,
                            buffer.ty,
                            buffer.ty.n_elements()
                        )));
                    }
                }
                let bias = bias.as_ref().map(|bias| {
                    let spread = Spread::new(bias, indices, *accumulate);
                    Ok::<_, Error>((spread, self.floats(bias.buffer)?.cast_const()))
                });
                Ok(Prepared::Contract {
                    plan,
                    bias: bias.transpose()?,
                    a: self.floats(*a)?,
                    b: self.floats(*b)?,
                    c: self.floats(*c)?,
                })
            }
            Action::Attention {
                dims,
                q,
                k,
                v,
                o,
                lse,
                seen,
                scratch,
                kernel,
            } => {
                let read: Vec<BufferId> = [*q, *k, *v].into_iter().chain(*seen).collect();
                self.disjoint(&read, &[*o, *lse, *scratch])?;
                let types = AttentionTypes {
                    q: self.ty(*q)?,
                    k: self.ty(*k)?,
                    v: self.ty(*v)?,
                    o: self.ty(*o)?,
                    lse: self.ty(*lse)?,
                };
                let mut plan = AttentionPlan::new(dims, types)?;
                if let Some(seen) = seen {
                    plan = plan.seeing(dims, types, self.ty(*seen)?)?;
                }
                Ok(Prepared::Attention {
                    scratch: self.scratch(*scratch, plan.scratch_elements(false))?,
                    plan,
                    kernel: self.function(*kernel)?,
                    args: ForwardArgs {
                        q: self.floats(*q)?,
                        k: self.floats(*k)?,
                        v: self.floats(*v)?,
                        o: self.floats(*o)?,
                        lse: self.floats(*lse)?,
                        seen: match seen {
                            Some(seen) => self.words(*seen)?.cast_const().cast(),
                            None => std::ptr::null(),
                        },
                    },
                })
            }
            Action::AttentionGrad {
                dims,
                inputs,
                results,
                scratch,
                kernel,
            } => {
                let [q, k, v, o, lse, d_o] = *inputs;
                let [dq, dk, dv] = *results;
                self.disjoint(inputs, &[dq, dk, dv, *scratch])?;
                let types = AttentionTypes {
                    q: self.ty(q)?,
                    k: self.ty(k)?,
                    v: self.ty(v)?,
                    o: self.ty(o)?,
                    lse: self.ty(lse)?,
                };
                for (gradient, of) in [(d_o, o), (dq, q), (dk, k), (dv, v)] {
                    let (gradient, of) = (self.ty(gradient)?, self.ty(of)?);
                    if gradient.shape != of.shape {
                        return Err(Error::Unsupported(format!(
                            "an attention gradient {gradient} in another memory order than {of}"
                        )));
                    }
                }
                let plan = AttentionPlan::new(dims, types)?;
                Ok(Prepared::AttentionGrad {
                    scratch: self.scratch(*scratch, plan.scratch_elements(true))?,
                    plan,
                    kernel: self.function(*kernel)?,
                    args: BackwardArgs {
                        q: self.floats(q)?,
                        k: self.floats(k)?,
                        v: self.floats(v)?,
                        o: self.floats(o)?,
                        lse: self.floats(lse)?,
                        d_o: self.floats(d_o)?,
                        dq: self.floats(dq)?,
                        dk: self.floats(dk)?,
                        dv: self.floats(dv)?,
                    },
                })
            }
            Action::Routine {
                op,
                inputs,
                results,
            } => {
                self.disjoint(inputs, results)?;
                let types = |ids: &[BufferId]| -> Result<Vec<&TensorType>> {
                    ids.iter().map(|id| self.ty(*id)).collect()
                };
                if let (OpKind::MoeMove(moved), [result]) = (op, results.as_slice()) {
                    let rank = communicator.rank();
                    let plan = MovePlan::new(moved, rank, &types(inputs)?, self.ty(*result)?)?;
                    let group = op.group().map(|group| communicator.join(&group.ranks));
                    let inputs = inputs.iter().map(|id| Ok(self.words(*id)?.cast_const()));
                    return Ok(Prepared::Move {
                        plan,
                        group: group.transpose()?,
                        inputs: inputs.collect::<Result<_>>()?,
                        result: self.words(*result)?,
                    });
                }
                let routine = Routine::new(op, &types(inputs)?, &types(results)?)?;
                let inputs = inputs.iter().map(|id| Ok(self.words(*id)?.cast_const()));
                let inputs = inputs.collect::<Result<Vec<_>>>()?;
                let results = results.iter().map(|id| self.words(*id));
                let results = results.collect::<Result<Vec<_>>>()?;
                Ok(Prepared::Routine {
                    routine,
                    inputs,
                    results,
                    rows: None,
                })
            }
            Action::Collective { op, src, dst } => self.collective(op, *src, *dst, communicator),
            Action::Send { to, src } => {
                let n_words = self.message(communicator.rank(), *to, *src)?;
                Ok(Prepared::Send {
                    to: *to,
                    src: self.words(*src)?,
                    n_words,
                })
            }
            Action::Recv { from, dst } => {
                let n_words = self.message(*from, communicator.rank(), *dst)?;
                Ok(Prepared::Recv {
                    from: *from,
                    dst: self.words(*dst)?,
                    n_words,
                })
            }
        }
    }

    /// The same instruction, keeping to the rows in use.
    fn keep_to(
        &mut self,
        rows: &CountedRows,
        action: &Action,
        prepared: Prepared,
    ) -> Result<Prepared> {
        match (action, prepared) {
            (
                Action::Kernel { args, .. },
                Prepared::Kernel {
                    function,
                    args: addresses,
                    n_rows,
                    divisible,
                    ..
                },
            ) => {
                let mut types = args.iter().map(|id| self.ty(*id));
                let counted = types.find(|ty| ty.as_ref().is_ok_and(|ty| ty.has(&rows.slot)));
                let counted = counted.transpose()?.ok_or_else(no_rows)?;
                let counts = self.counts(rows.counts, counted, &rows.slot)?;
                Ok(Prepared::Kernel {
                    function,
                    args: addresses,
                    n_rows,
                    divisible,
                    rows: KernelRows::new(counts, n_rows),
                })
            }
            (
                Action::Contract {
                    indices,
                    accumulate,
                    ..
                },
                Prepared::Contract { bias, a, b, c, .. },
            ) => {
                let options = ContractOptions {
                    accumulate: *accumulate || bias.is_some(),
                    ..ContractOptions::default()
                };
                let n_counts = self.ty(rows.counts)?.n_elements();
                let counts = self.words(rows.counts)?.cast_const().cast();
                let rows = ContractRows::new(indices, &rows.indices, options, counts, n_counts)?;
                Ok(Prepared::ContractRows {
                    rows,
                    bias,
                    a,
                    b,
                    c,
                })
            }
            (
                Action::Collective { op, src, dst },
                Prepared::Collective {
                    group,
                    src: from,
                    dst: to,
                    ..
                },
            ) => {
                let result_counts = rows.result_counts.ok_or_else(no_rows)?;
                let (src, dst) = (self.ty(*src)?, self.ty(*dst)?);
                let before = (
                    self.counts(rows.counts, src, &rows.slot)?,
                    self.ty(rows.counts)?,
                );
                let after = (
                    self.counts(result_counts, dst, &rows.slot)?,
                    self.ty(result_counts)?,
                );
                Ok(Prepared::CollectiveRows {
                    rows: CallRows::new(op, before, after)?,
                    group,
                    src: from,
                    dst: to,
                })
            }
            (
                Action::Routine {
                    results: buffers, ..
                },
                Prepared::Routine {
                    routine,
                    inputs,
                    results,
                    ..
                },
            ) => {
                let by_rows = match (routine.n_rows(), buffers.first()) {
                    (Some(n_rows), Some(result)) => {
                        let counts = self.counts(rows.counts, self.ty(*result)?, &rows.slot)?;
                        KernelRows::new(counts, n_rows)
                    }
                    _ => None,
                };
                Ok(Prepared::Routine {
                    routine: routine.leaving_rest(),
                    inputs,
                    results,
                    rows: by_rows,
                })
            }
            (
                Action::Routine { .. },
                Prepared::Move {
                    plan,
                    group,
                    inputs,
                    result,
                },
            ) => Ok(Prepared::Move {
                plan: plan.leaving_rest(),
                group,
                inputs,
                result,
            }),
            (
                Action::Attention { .. },
                Prepared::Attention {
                    plan,
                    kernel,
                    args,
                    scratch,
                },
            ) => Ok(Prepared::Attention {
                plan: plan.leaving_rest(),
                kernel,
                args,
                scratch,
            }),
            _ => Err(no_rows()),
        }
    }

    fn counts(&mut self, counts: BufferId, rows: &TensorType, slot: &Dim) -> Result<Counts> {
        let groups = self.ty(counts)?;
        if groups.dtype != DType::I32 {
            return Err(no_rows());
        }
        let address = self.words(counts)?.cast_const().cast();
        Counts::new(address, groups, rows, slot)
    }

    /// The words of a message, which its channel has room for.
    fn message(&self, from: usize, to: usize, id: BufferId) -> Result<usize> {
        let buffer = self.buffer(id)?;
        let mut channels = self.program.channels.iter();
        let channel = channels.find(|channel| (channel.from, channel.to) == (from, to));
        let n_bytes = channel.map_or(0, |channel| channel.n_bytes);
        if buffer.ty.n_bytes() > n_bytes {
            return Err(Error::Invalid(format!(
                "damaged program: `{}` {} of {} bytes goes from rank {from} to rank {to}, whose channel \
                 takes {n_bytes}; compile again",
                buffer.name,
                buffer.ty,
                buffer.ty.n_bytes()
            )));
        }
        Ok(buffer.ty.n_elements())
    }

    fn kernel(&mut self, kernel: KernelId, args: &[BufferId], n_bytes: f64) -> Result<Prepared> {
        /// Below this a part takes less time than waking a thread for it.
        const MIN_BYTES: f64 = 128.0 * 1024.0;
        let symbol = self
            .program
            .kernels
            .get(kernel.index())
            .ok_or_else(|| no_kernel(kernel))?;
        let args = args.iter().map(|id| Ok(self.words(*id)?.cast()));
        Ok(Prepared::Kernel {
            args: args.collect::<Result<Vec<_>>>()?,
            function: self.function(kernel)?,
            n_rows: symbol.n_rows,
            divisible: symbol.splittable && n_bytes >= MIN_BYTES && symbol.n_rows > 1,
            rows: None,
        })
    }

    fn collective(
        &mut self,
        op: &OpKind,
        src: BufferId,
        dst: BufferId,
        communicator: &mut dyn Communicator,
    ) -> Result<Prepared> {
        let (src_ty, dst_ty) = (self.ty(src)?, self.ty(dst)?);
        let group = op.group().ok_or_else(|| {
            Error::Invalid(format!(
                "damaged program: {} is no collective; compile again",
                op.name()
            ))
        })?;
        let n_members = group.ranks.len();
        let misfit = || {
            Error::Invalid(format!(
                "damaged program: {} from {src_ty} to {dst_ty} over {n_members} ranks does not fit; \
                 compile again",
                op.name()
            ))
        };
        let member_idx = group
            .ranks
            .iter()
            .position(|rank| *rank == communicator.rank())
            .ok_or_else(misfit)?;
        let ensure = |fits: bool| if fits { Ok(()) } else { Err(misfit()) };
        ensure(src_ty.dtype == dst_ty.dtype)?;
        let same_order = || src_ty.dims().eq(dst_ty.dims());
        let call = match op {
            OpKind::AllGather { dim, counts, .. } => {
                let division = divide(dst_ty, dim, counts).ok_or_else(misfit)?;
                ensure(same_order() && counts.len() == n_members)?;
                ensure(division.n_elements() == dst_ty.n_elements())?;
                ensure(division.n_part_elements(member_idx) == src_ty.n_elements())?;
                Call::AllGather(division)
            }
            OpKind::AllReduce { kind, .. } => {
                ensure(src_ty.shape == dst_ty.shape && src_ty.dtype == DType::F32)?;
                Call::AllReduce(*kind)
            }
            OpKind::ReduceScatter {
                kind, dim, counts, ..
            } => {
                let division = divide(src_ty, dim, counts).ok_or_else(misfit)?;
                ensure(same_order() && counts.len() == n_members && src_ty.dtype == DType::F32)?;
                ensure(division.n_elements() == src_ty.n_elements())?;
                ensure(division.n_part_elements(member_idx) == dst_ty.n_elements())?;
                Call::ReduceScatter(*kind, division)
            }
            OpKind::AllToAll {
                split,
                split_counts,
                concat,
                concat_counts,
                ..
            } => {
                ensure(same_order() && split_counts.len() == n_members)?;
                ensure(concat_counts.len() == n_members)?;
                Call::AllToAll(
                    cross(src_ty, split, split_counts, concat, concat_counts).ok_or_else(misfit)?,
                )
            }
            OpKind::CollectivePermute { from, .. } => {
                ensure(group.ranks.contains(from))?;
                Call::CollectivePermute { from: *from }
            }
            OpKind::Broadcast { .. } => {
                ensure(src_ty.shape == dst_ty.shape)?;
                Call::Broadcast
            }
            _ => return Err(misfit()),
        };
        let (n_src, n_dst) = (src_ty.n_elements(), dst_ty.n_elements());
        let in_place = matches!(call, Call::AllReduce(_))
            && self.buffer(src)?.offset == self.buffer(dst)?.offset;
        if !in_place {
            self.disjoint(&[src], &[dst])?;
        }
        Ok(Prepared::Collective {
            call,
            group: communicator.join(&group.ranks)?,
            src: self.words(src)?,
            n_src,
            dst: self.words(dst)?,
            n_dst,
        })
    }

    fn function(&self, kernel: KernelId) -> Result<KernelFn> {
        self.kernels.get(kernel).ok_or_else(|| no_kernel(kernel))
    }

    fn buffer(&self, id: BufferId) -> Result<&'a Buffer> {
        self.buffers.get(id.index()).ok_or_else(|| {
            Error::Invalid(format!(
                "damaged program: buffer {} of {}; compile again",
                id.index(),
                self.buffers.len()
            ))
        })
    }

    fn ty(&self, id: BufferId) -> Result<&'a TensorType> {
        Ok(&self.buffer(id)?.ty)
    }

    fn words(&mut self, id: BufferId) -> Result<*mut u32> {
        let buffer = self.buffer(id)?;
        crate::tensor::check_dtype(&buffer.ty)?;
        Ok(self.arena.address(buffer)?.cast())
    }

    fn floats(&mut self, id: BufferId) -> Result<*mut f32> {
        let buffer = self.buffer(id)?;
        if buffer.ty.dtype != DType::F32 {
            return Err(Error::Unsupported(format!(
                "`{}` is {}, the host's products take f32; plan with dtype f32",
                buffer.name, buffer.ty
            )));
        }
        Ok(self.words(id)?.cast())
    }

    fn scratch(&mut self, id: BufferId, n_elements: usize) -> Result<*mut f32> {
        let buffer = self.buffer(id)?;
        if buffer.ty.n_elements() < n_elements {
            return Err(Error::Invalid(format!(
                "damaged program: scratch `{}` has {} elements, {n_elements} are needed; compile again",
                buffer.name,
                buffer.ty.n_elements()
            )));
        }
        self.floats(id)
    }

    /// No written buffer overlaps a read one or another written one.
    fn disjoint(&self, reads: &[BufferId], writes: &[BufferId]) -> Result<()> {
        for (write_idx, write) in writes.iter().enumerate() {
            for other in reads.iter().chain(&writes[..write_idx]) {
                let (x, y) = (self.buffer(*write)?, self.buffer(*other)?);
                let apart = x.offset.saturating_add(x.ty.n_bytes()) <= y.offset
                    || y.offset.saturating_add(y.ty.n_bytes()) <= x.offset;
                if !apart {
                    return Err(Error::Invalid(format!(
                        "damaged program: `{}` is written over `{}`, which is in use; compile again",
                        x.name, y.name
                    )));
                }
            }
        }
        Ok(())
    }
}

fn no_rows() -> Error {
    Error::Invalid(
        "damaged program: counted rows that do not fit their instruction; compile again".into(),
    )
}

fn no_kernel(kernel: KernelId) -> Error {
    Error::Invalid(format!(
        "damaged program: there is no kernel {}; compile again",
        kernel.index()
    ))
}

/// The tensor around one dim; `None` when it lacks the dim or the counts do not add up to it.
pub(super) fn divide(whole: &TensorType, dim: &Dim, counts: &[usize]) -> Option<Division> {
    let position = whole.position(dim)?;
    let (outer, inner) = around(whole, position);
    let fits = counts.iter().sum::<usize>() == whole.shape[position].1;
    fits.then(|| Division {
        outer,
        counts: counts.to_vec(),
        inner,
    })
}

/// Elements before and after a dim.
fn around(ty: &TensorType, position: usize) -> (usize, usize) {
    let product = |dims: &[(Dim, usize)]| dims.iter().map(|(_, size)| size).product();
    (
        product(&ty.shape[..position]),
        product(&ty.shape[position + 1..]),
    )
}

pub(super) fn cross(
    src: &TensorType,
    split: &Dim,
    split_counts: &[usize],
    concat: &Dim,
    concat_counts: &[usize],
) -> Option<Crossing> {
    let (at_split, at_concat) = (src.position(split)?, src.position(concat)?);
    if split_counts.iter().sum::<usize>() != src.shape[at_split].1 {
        return None;
    }
    let (first, last) = (at_split.min(at_concat), at_split.max(at_concat));
    let (outer, _) = around(src, first);
    let (_, inner) = around(src, last);
    let between = src.shape.get(first + 1..last).unwrap_or(&[]);
    let order = match at_split.cmp(&at_concat) {
        std::cmp::Ordering::Less => CrossingOrder::SplitFirst,
        std::cmp::Ordering::Greater => CrossingOrder::ConcatFirst,
        std::cmp::Ordering::Equal => CrossingOrder::SameDim,
    };
    Some(Crossing {
        outer,
        mid: between.iter().map(|(_, size)| size).product(),
        inner,
        split_counts: split_counts.to_vec(),
        concat_counts: concat_counts.to_vec(),
        order,
    })
}
