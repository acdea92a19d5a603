//! One rank: its arena, and its instructions one after another.
//!
//! In: a program and kernels, then the values in the arena. Out: the arena after each step, and when each
//! instruction ran.
//! Invariant: addresses that instructions hold lie in the rank's own arena, which lives as long as they.

use std::time::Instant;

use meshweave_dsl::program::Program;

use super::KernelTable;
use super::drill::PlacedDrill;
use super::prepare::{Call, Prepared, prepare};
use super::rows::{self, Packed};
use crate::attention::KernelFn;
use crate::collective::{Communicator, Place};
use crate::contract::bias::Spread;
use crate::device::host::Arena;
use crate::error::{Error, Result};
use crate::pool::WorkerPool;
use crate::routine::moved::Traveling;

/// A rank of this process.
pub(super) struct Rank {
    pub(super) rank: usize,
    /// Of the instructions, for messages.
    pub(super) names: Vec<String>,
    pub(super) prepared: Vec<Prepared>,
    pub(super) communicator: Box<dyn Communicator>,
    pub(super) pool: WorkerPool,
    /// Attention scratch of the pool's threads but the first, which uses the arena's.
    pub(super) scratch: Vec<Vec<f32>>,
    pub(super) clocks: Vec<Clock>,
    pub(super) packed: Packed,
    /// Rows that move from slots to slots.
    pub(super) traveling: Traveling,
    pub(super) drill: Option<PlacedDrill>,
    /// After what points into it.
    pub(super) arena: Arena,
}

// SAFETY: a rank's addresses lie in its own arena, and are followed by the one thread that holds the
// rank's lock (and by its pool's threads on that thread's behalf).
unsafe impl Send for Rank {}

/// When an instruction ran.
#[derive(Clone, Copy)]
pub(super) struct Clock {
    pub(super) start: Instant,
    pub(super) duration_s: f64,
    pub(super) wait_s: f64,
    /// Bytes that came from other ranks.
    pub(super) received_bytes: u64,
}

impl Rank {
    pub(super) fn new(
        program: &Program,
        mut communicator: Box<dyn Communicator>,
        kernels: &KernelTable,
        n_threads: usize,
    ) -> Result<Rank> {
        let rank = communicator.rank();
        let mut arena = Arena::allocate(program.ranks[rank].arena_bytes)?;
        let prepared = prepare(program, rank, &mut arena, kernels, communicator.as_mut())?;
        let scratch = prepared
            .iter()
            .map(Prepared::scratch_elements)
            .max()
            .unwrap_or(0);
        let now = Clock {
            start: Instant::now(),
            duration_s: 0.0,
            wait_s: 0.0,
            received_bytes: 0,
        };
        let instructions = program.ranks[rank].instructions.iter();
        let names = instructions.map(|one| one.name.clone()).collect();
        Ok(Rank {
            rank,
            names,
            clocks: vec![now; prepared.len()],
            packed: Packed::default(),
            traveling: Traveling::default(),
            drill: None,
            prepared,
            communicator,
            pool: WorkerPool::new(n_threads)?,
            scratch: (1..n_threads).map(|_| vec![0.0; scratch]).collect(),
            arena,
        })
    }

    /// Runs all instructions once, as the step after `n_steps`.
    pub(super) fn run(&mut self, n_steps: usize) -> Result<()> {
        for instruction_idx in 0..self.prepared.len() {
            self.communicator.enter(Place {
                n_steps,
                instruction: Some(instruction_idx),
            });
            if let Some(drill) = &self.drill
                && (drill.drill.step, drill.drill.instruction) == (n_steps + 1, instruction_idx)
            {
                self.fail_as_rehearsed();
            }
            let before = self.communicator.stats();
            let start = Instant::now();
            self.execute(instruction_idx)?;
            let duration_s = start.elapsed().as_secs_f64();
            let after = self.communicator.stats();
            self.clocks[instruction_idx] = Clock {
                start,
                duration_s,
                wait_s: after.wait_s - before.wait_s,
                received_bytes: after.received_bytes - before.received_bytes,
            };
        }
        self.communicator.enter(Place {
            n_steps: n_steps + 1,
            instruction: None,
        });
        Ok(())
    }

    fn execute(&mut self, instruction_idx: usize) -> Result<()> {
        match &self.prepared[instruction_idx] {
            Prepared::Kernel {
                function,
                args,
                n_rows,
                divisible,
                rows: None,
            } => run_kernel(&self.pool, *function, args, (0, *n_rows), *divisible),
            Prepared::Kernel {
                function,
                args,
                divisible,
                rows: Some(rows),
                ..
            } => {
                // SAFETY: the counts lie in this rank's arena, made by an instruction before.
                let mut ranges = unsafe { rows.ranges() }?.into_iter();
                ranges.try_for_each(|range| {
                    run_kernel(&self.pool, *function, args, range, *divisible)
                })
            }
            Prepared::ContractRows {
                rows,
                bias,
                a,
                b,
                c,
            } => {
                // SAFETY: as for a contraction; the counts lie in this rank's arena.
                unsafe {
                    begin_with(bias.as_ref(), *c);
                    rows.run(&self.pool, *a, *b, *c)
                }
            }
            Prepared::CollectiveRows {
                rows,
                group,
                src,
                dst,
            } => {
                let communicator = self.communicator.as_mut();
                // SAFETY: `prepare` checked the buffers against the counts' types, and that they do
                // not overlap unless the rows are reduced in place.
                unsafe { rows.run(communicator, *group, *src, *dst, &mut self.packed) }
            }
            Prepared::Contract {
                plan,
                bias,
                a,
                b,
                c,
            } => {
                // SAFETY: `prepare` checked the spans against the buffers and c against the others.
                unsafe {
                    begin_with(bias.as_ref(), *c);
                    plan.run_raw_on(&self.pool, *a, *b, *c)
                }
            }
            Prepared::Attention {
                plan,
                kernel,
                args,
                scratch,
            } => {
                let scratch = per_thread(*scratch, &mut self.scratch);
                // SAFETY: `prepare` made the plan from the buffers' types and checked that results
                // and scratch are disjoint from the rest.
                unsafe { plan.forward(&self.pool, *kernel, *args, &scratch) }
            }
            Prepared::AttentionGrad {
                plan,
                kernel,
                args,
                scratch,
            } => {
                let scratch = per_thread(*scratch, &mut self.scratch);
                // SAFETY: as above.
                unsafe { plan.backward(&self.pool, *kernel, *args, &scratch) }
            }
            Prepared::Move {
                plan,
                group,
                inputs,
                result,
            } => {
                let communicator = self.communicator.as_mut();
                let mut exchange = |traveling: &mut Traveling| match group {
                    Some(group) => rows::travel(communicator, *group, traveling),
                    None => {
                        std::mem::swap(&mut traveling.sent, &mut traveling.received);
                        Ok(())
                    }
                };
                // SAFETY: `prepare` made the plan from the buffers' types and checked that the result
                // is disjoint from the rest.
                unsafe { plan.run(inputs, *result, &mut self.traveling, &mut exchange) }
            }
            Prepared::Routine {
                routine,
                inputs,
                results,
                rows,
            } => {
                // SAFETY: `prepare` made the routine from the buffers' types and checked that results
                // are disjoint from the rest; the counts lie in this rank's arena.
                let ran = unsafe {
                    match rows {
                        None => routine.run(inputs, results),
                        Some(rows) => rows.ranges().and_then(|ranges| {
                            let mut ranges = ranges.into_iter();
                            ranges.try_for_each(|range| routine.run_rows(inputs, results, range))
                        }),
                    }
                };
                ran.map_err(|error| {
                    let rank = self.communicator.rank();
                    let name = self.names.get(instruction_idx).map_or("?", String::as_str);
                    match error {
                        Error::Invalid(message) => {
                            Error::Invalid(format!("`{name}` on rank {rank}: {message}"))
                        }
                        other => other,
                    }
                })
            }
            Prepared::Collective {
                call,
                group,
                src,
                n_src,
                dst,
                n_dst,
            } => {
                let in_place = *src == dst.cast_const();
                // SAFETY: both buffers lie in this rank's arena and hold as many 32-bit elements;
                // they are disjoint (`prepare`) unless in place, when `src` is not used.
                let (src, dst) = unsafe {
                    let n_src = if in_place { 0 } else { *n_src };
                    (
                        std::slice::from_raw_parts(*src, n_src),
                        std::slice::from_raw_parts_mut(*dst, *n_dst),
                    )
                };
                let communicator = &mut self.communicator;
                match call {
                    Call::AllGather(division) => {
                        communicator.all_gather(*group, src, dst, division)
                    }
                    Call::AllReduce(kind) => {
                        let src = (!in_place).then(|| as_f32(src));
                        communicator.all_reduce(*group, *kind, src, as_f32_mut(dst))
                    }
                    Call::ReduceScatter(kind, division) => communicator.reduce_scatter(
                        *group,
                        *kind,
                        as_f32(src),
                        as_f32_mut(dst),
                        division,
                    ),
                    Call::AllToAll(crossing) => communicator.all_to_all(*group, src, dst, crossing),
                    Call::CollectivePermute { from } => {
                        communicator.collective_permute(*group, *from, src, dst)
                    }
                    Call::Broadcast => communicator.broadcast(*group, src, dst),
                }
            }
            Prepared::Send { to, src, n_words } => {
                // SAFETY: the buffer lies in this rank's arena and holds as many 32-bit elements.
                let src = unsafe { std::slice::from_raw_parts(*src, *n_words) };
                self.communicator.send(*to, src)
            }
            Prepared::Recv { from, dst, n_words } => {
                // SAFETY: as above; nobody else uses this rank's arena while it runs.
                let dst = unsafe { std::slice::from_raw_parts_mut(*dst, *n_words) };
                self.communicator.recv(*from, dst)
            }
        }
    }
}

fn run_kernel(
    pool: &WorkerPool,
    function: KernelFn,
    args: &[*mut std::ffi::c_void],
    (first, end): (usize, usize),
    divisible: bool,
) -> Result<()> {
    let n_rows = end - first;
    let n_parts = if divisible {
        pool.n_threads().min(n_rows)
    } else {
        1
    };
    if n_parts <= 1 {
        // SAFETY: the table's functions follow the contract of their symbols, and `prepare` took the
        // arguments from the instruction that the compiler wrote for this symbol.
        unsafe { function(args.as_ptr(), first as i64, end as i64) };
        return Ok(());
    }
    struct Args<'a>(&'a [*mut std::ffi::c_void]);
    // SAFETY: the kernel is splittable: disjoint row ranges may run at the same time.
    unsafe impl Sync for Args<'_> {}
    let args = Args(args);
    pool.run(n_parts, &|part| {
        let Args(args) = &args;
        let at = |part: usize| (first + n_rows * part / n_parts) as i64;
        // SAFETY: as above, for a part of the rows.
        unsafe { function(args.as_ptr(), at(part), at(part + 1)) };
    })
}

/// Lets the result of a contraction with a bias begin with it.
///
/// # Safety
/// As for [`Spread::run`].
unsafe fn begin_with(bias: Option<&(Spread, *const f32)>, c: *mut f32) {
    if let Some((spread, bias)) = bias {
        // SAFETY: as for this function.
        unsafe { spread.run(*bias, c) };
    }
}

/// The scratch of every thread: the arena's for the first.
fn per_thread(first: *mut f32, others: &mut [Vec<f32>]) -> Vec<*mut f32> {
    std::iter::once(first)
        .chain(others.iter_mut().map(|s| s.as_mut_ptr()))
        .collect()
}

pub(super) fn as_f32(words: &[u32]) -> &[f32] {
    // SAFETY: f32 and u32 have one size and alignment, and all bits are legal in both.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len()) }
}

pub(super) fn as_words(floats: &[f32]) -> &[u32] {
    // SAFETY: both have four bytes, and every pattern is a value of both.
    unsafe { std::slice::from_raw_parts(floats.as_ptr().cast(), floats.len()) }
}

pub(super) fn as_words_mut(floats: &mut [f32]) -> &mut [u32] {
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), floats.len()) }
}

pub(super) fn as_f32_mut(words: &mut [u32]) -> &mut [f32] {
    // SAFETY: as in `as_f32`.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len()) }
}
