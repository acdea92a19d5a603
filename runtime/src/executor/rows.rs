//! Instructions over counted rows: kernels, contractions and collectives that keep to the rows in use.
//!
//! In: an instruction's plan, and counts that steps before it have made. Out: the same results in the
//! rows in use; what stands after them in a group is neither computed, nor sent, nor written.
//! Invariant: counts are checked against the slots of a group before anything is touched, so no count
//! can lead outside of a buffer.

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::OpKind;
use meshweave_dsl::program::ContractIndex;

use crate::collective::{Communicator, Crossing, CrossingOrder, Division, GroupIdx};
use crate::contract::{ContractOptions, RowPlan};
use crate::error::{Error, Result};
use crate::pool::WorkerPool;
use crate::routine::moved::Traveling;

/// The counts of a tensor's groups.
#[derive(Clone, Copy)]
pub(super) struct Counts {
    counts: *const i32,
    n_groups: usize,
    /// Slots of a group.
    capacity: usize,
    /// Elements of a row.
    row: usize,
}

impl Counts {
    /// `counts` holds `groups`, which are the first dims of `rows`, before `slot`.
    pub(super) fn new(
        counts: *const i32,
        groups: &TensorType,
        rows: &TensorType,
        slot: &Dim,
    ) -> Result<Counts> {
        let n_dims = groups.shape.len();
        let leads = rows.shape.get(..n_dims) == Some(groups.shape.as_slice())
            && rows.shape.get(n_dims).is_some_and(|(dim, _)| dim == slot);
        if !leads {
            return Err(Error::Invalid(format!(
                "damaged program: counts {groups} of rows {rows} along `{slot}`; compile again"
            )));
        }
        let capacity = rows.shape[n_dims].1;
        let n_groups = groups.n_elements();
        Ok(Counts {
            counts,
            n_groups,
            capacity,
            row: rows.n_elements() / (n_groups * capacity).max(1),
        })
    }

    /// Rows in use of a group.
    ///
    /// # Safety
    /// The counts are valid for reads, and `group` is below their number.
    unsafe fn get(&self, group: usize) -> Result<usize> {
        // SAFETY: as for this function.
        let count = unsafe { *self.counts.add(group) };
        match usize::try_from(count) {
            Ok(n_rows) if n_rows <= self.capacity => Ok(n_rows),
            _ => Err(Error::Internal(format!(
                "group {group} of rows is said to use {count} of {} slots",
                self.capacity
            ))),
        }
    }
}

/// A kernel over the elements of rows, in their order.
#[derive(Clone)]
pub(super) struct KernelRows {
    counts: Counts,
    /// Elements that one row of the kernel covers.
    lanes: usize,
}

impl KernelRows {
    /// `None` when the kernel's rows do not divide the elements.
    pub(super) fn new(counts: Counts, n_kernel_rows: usize) -> Option<KernelRows> {
        let n_elements = counts.n_groups * counts.capacity * counts.row;
        let divides = n_kernel_rows > 0 && n_elements.is_multiple_of(n_kernel_rows);
        divides.then(|| KernelRows {
            counts,
            lanes: n_elements / n_kernel_rows,
        })
    }

    /// Ranges of the kernel's rows that cover the rows in use, in order and apart.
    ///
    /// # Safety
    /// The counts are valid for reads.
    pub(super) unsafe fn ranges(&self) -> Result<Vec<(usize, usize)>> {
        let Counts {
            n_groups,
            capacity,
            row,
            ..
        } = self.counts;
        let mut ranges: Vec<(usize, usize)> = Vec::new();
        for group in 0..n_groups {
            // SAFETY: as for this function.
            let n_rows = unsafe { self.counts.get(group) }?;
            let first = group * capacity * row;
            let (begin, end) = (
                first / self.lanes,
                (first + n_rows * row).div_ceil(self.lanes),
            );
            match ranges.last_mut() {
                _ if n_rows == 0 => {}
                Some(last) if begin <= last.1 => last.1 = end.max(last.1),
                _ => ranges.push((begin, end)),
            }
        }
        Ok(ranges)
    }
}

/// A contraction of rows, group by group.
pub(super) struct ContractRows {
    plan: RowPlan,
    /// Offsets of each group in a, b and c, its index in the counts, and whether it is the first to be
    /// added to its part of c.
    groups: Vec<(usize, usize, usize, usize, bool)>,
    counts: *const i32,
    capacity: usize,
}

impl ContractRows {
    /// `order` lists the positions of the dims of the counts, then of the slots, in `indices`.
    pub(super) fn new(
        indices: &[ContractIndex],
        order: &[usize],
        options: ContractOptions,
        counts: *const i32,
        n_counts: usize,
    ) -> Result<ContractRows> {
        let damaged = || {
            Error::Invalid(format!(
                "damaged program: rows {order:?} of a contraction of {} indices; compile again",
                indices.len()
            ))
        };
        let (slot, groups) = order.split_last().ok_or_else(damaged)?;
        let slot = *indices.get(*slot).ok_or_else(damaged)?;
        let group_indices: Option<Vec<ContractIndex>> =
            groups.iter().map(|at| indices.get(*at).copied()).collect();
        let group_indices = group_indices.ok_or_else(damaged)?;
        let others = indices.iter().enumerate();
        let others: Vec<ContractIndex> = others
            .filter(|(at, _)| !order.contains(at))
            .map(|(_, index)| *index)
            .collect();
        let mut offsets = vec![(0, 0, 0)];
        for index in &group_indices {
            offsets = offsets
                .iter()
                .flat_map(|(a, b, c)| {
                    (0..index.size)
                        .map(move |i| (a + i * index.a, b + i * index.b, c + i * index.c))
                })
                .collect();
        }
        if offsets.len() != n_counts {
            return Err(damaged());
        }
        let mut begun = std::collections::BTreeSet::new();
        let groups = offsets.into_iter().enumerate();
        Ok(ContractRows {
            groups: groups
                .map(|(at, (a, b, c))| (a, b, c, at, begun.insert(c)))
                .collect(),
            capacity: slot.size,
            plan: RowPlan::new(&others, slot, options)?,
            counts,
        })
    }

    /// # Safety
    /// As for [`crate::contract::ContractPlan::run_raw`], over the spans of the whole contraction; the
    /// counts are valid for reads.
    pub(super) unsafe fn run(
        &self,
        pool: &WorkerPool,
        a: *const f32,
        b: *const f32,
        c: *mut f32,
    ) -> Result<()> {
        let counts = Counts {
            counts: self.counts,
            n_groups: self.groups.len(),
            capacity: self.capacity,
            row: 1,
        };
        for &(at_a, at_b, at_c, group, is_first) in &self.groups {
            // SAFETY: the offsets are sums of indices below their sizes, and the count is at most the
            // slots' size, so the walk stays inside the spans of the whole contraction.
            unsafe {
                let n_rows = counts.get(group)?;
                let (a, b, c) = (a.add(at_a), b.add(at_b), c.add(at_c));
                self.plan.run_raw_on(pool, n_rows, is_first, (a, b, c))?;
            }
        }
        Ok(())
    }
}

/// A collective of rows: packed, exchanged by their counts, unpacked.
pub(super) struct CallRows {
    kind: CallKind,
    src: Counts,
    dst: Counts,
    /// What goes to each member; one part where all members get the same.
    sent: Vec<Part>,
    /// What comes from each member; one part where it comes from all.
    received: Vec<Part>,
}

/// Some groups, of each row so many elements.
struct Part {
    groups: Vec<usize>,
    /// First element of a row, and number of them.
    columns: (usize, usize),
}

enum CallKind {
    AllToAll,
    AllGather,
    ReduceScatter(ReduceKind),
    AllReduce(ReduceKind),
}

/// Buffers that packed rows are sent from and received in, kept from call to call.
#[derive(Default)]
pub(super) struct Packed {
    sent: Vec<u32>,
    received: Vec<u32>,
}

impl CallRows {
    /// `groups` are the types of the counts before and after.
    pub(super) fn new(
        op: &OpKind,
        (src, src_groups): (Counts, &TensorType),
        (dst, dst_groups): (Counts, &TensorType),
    ) -> Result<CallRows> {
        let all = |groups: &TensorType, row: usize| {
            vec![Part {
                groups: (0..groups.n_elements()).collect(),
                columns: (0, row),
            }]
        };
        let divided = |groups: &TensorType, row: usize, dim: &Dim, counts: &[usize]| {
            divide(groups, row, dim, counts).ok_or_else(|| {
                Error::Invalid(format!(
                    "damaged program: groups {groups} of rows of {row} divided along `{dim}` by {counts:?}; compile again"
                ))
            })
        };
        let (kind, sent, received) = match op {
            OpKind::AllToAll {
                split,
                split_counts,
                concat,
                concat_counts,
                ..
            } => (
                CallKind::AllToAll,
                divided(src_groups, src.row, split, split_counts)?,
                divided(dst_groups, dst.row, concat, concat_counts)?,
            ),
            OpKind::AllGather { dim, counts, .. } => (
                CallKind::AllGather,
                all(src_groups, src.row),
                divided(dst_groups, dst.row, dim, counts)?,
            ),
            OpKind::ReduceScatter {
                kind, dim, counts, ..
            } => (
                CallKind::ReduceScatter(*kind),
                divided(src_groups, src.row, dim, counts)?,
                all(dst_groups, dst.row),
            ),
            OpKind::AllReduce { kind, .. } => (
                CallKind::AllReduce(*kind),
                all(src_groups, src.row),
                all(dst_groups, dst.row),
            ),
            other => {
                return Err(Error::Invalid(format!(
                    "damaged program: {} has no form for counted rows; compile again",
                    other.name()
                )));
            }
        };
        Ok(CallRows {
            kind,
            src,
            dst,
            sent,
            received,
        })
    }

    /// # Safety
    /// `src` and `dst` hold the rows that the counts were made for, and do not overlap unless they are
    /// the same; the counts are valid for reads.
    pub(super) unsafe fn run(
        &self,
        communicator: &mut dyn Communicator,
        group: GroupIdx,
        src: *const u32,
        dst: *mut u32,
        packed: &mut Packed,
    ) -> Result<()> {
        packed.sent.clear();
        let mut sent_words = Vec::with_capacity(self.sent.len());
        for part in &self.sent {
            let before = packed.sent.len();
            let (first, width) = part.columns;
            for &at in &part.groups {
                // SAFETY: a group's rows lie inside of `src`, and the count is at most its slots.
                let rows = unsafe {
                    let n_words = self.src.get(at)? * self.src.row;
                    let rows = src.add(at * self.src.capacity * self.src.row);
                    std::slice::from_raw_parts(rows, n_words)
                };
                if width == self.src.row {
                    packed.sent.extend_from_slice(rows);
                } else {
                    for row in rows.chunks(self.src.row) {
                        packed.sent.extend_from_slice(&row[first..first + width]);
                    }
                }
            }
            sent_words.push(packed.sent.len() - before);
        }
        let mut received_words = Vec::with_capacity(self.received.len());
        for part in &self.received {
            let mut n_words = 0;
            for &at in &part.groups {
                // SAFETY: a group of the counts.
                n_words += unsafe { self.dst.get(at) }? * part.columns.1;
            }
            received_words.push(n_words);
        }
        let n_received = received_words.iter().sum();
        packed.received.clear();
        packed.received.resize(n_received, 0);
        let (from, to) = (packed.sent.as_slice(), packed.received.as_mut_slice());
        let along = |counts: Vec<usize>| Division {
            outer: 1,
            counts,
            inner: 1,
        };
        match self.kind {
            CallKind::AllToAll => {
                let crossing = Crossing {
                    outer: 1,
                    mid: 1,
                    inner: 1,
                    split_counts: sent_words,
                    concat_counts: received_words,
                    order: CrossingOrder::SameDim,
                };
                communicator.all_to_all(group, from, to, &crossing)?;
            }
            CallKind::AllGather => {
                communicator.all_gather(group, from, to, &along(received_words))?;
            }
            CallKind::ReduceScatter(kind) => {
                let (from, to) = (super::rank::as_f32(from), super::rank::as_f32_mut(to));
                communicator.reduce_scatter(group, kind, from, to, &along(sent_words))?;
            }
            CallKind::AllReduce(kind) => {
                let (from, to) = (super::rank::as_f32(from), super::rank::as_f32_mut(to));
                communicator.all_reduce(group, kind, Some(from), to)?;
            }
        }
        let mut arrived = packed.received.as_slice();
        for part in &self.received {
            let (first, width) = part.columns;
            for &at in &part.groups {
                // SAFETY: a group's rows lie inside of `dst`, and the count is at most its slots.
                let rows = unsafe {
                    let n_words = self.dst.get(at)? * self.dst.row;
                    let rows = dst.add(at * self.dst.capacity * self.dst.row);
                    std::slice::from_raw_parts_mut(rows, n_words)
                };
                for row in rows.chunks_mut(self.dst.row) {
                    let (words, rest) = arrived.split_at(width);
                    row[first..first + width].copy_from_slice(words);
                    arrived = rest;
                }
            }
        }
        Ok(())
    }
}

/// Sends rows to the members of a group, by counts of elements that all of them know.
pub(super) fn travel(
    communicator: &mut dyn Communicator,
    group: GroupIdx,
    traveling: &mut Traveling,
) -> Result<()> {
    let crossing = Crossing {
        outer: 1,
        mid: 1,
        inner: 1,
        split_counts: traveling.sent_counts.clone(),
        concat_counts: traveling.received_counts.clone(),
        order: CrossingOrder::SameDim,
    };
    let (from, to) = (
        super::rank::as_words(&traveling.sent),
        super::rank::as_words_mut(&mut traveling.received),
    );
    communicator.all_to_all(group, from, to, &crossing)
}

/// The parts of a dim of groups, or of the one dim of rows, in order; `None` when the counts do not add
/// up to it.
fn divide(groups: &TensorType, row: usize, dim: &Dim, counts: &[usize]) -> Option<Vec<Part>> {
    let total: usize = counts.iter().sum();
    let mut start = 0;
    let mut starts = counts.iter().map(|count| {
        let first = start;
        start += count;
        (first, *count)
    });
    match groups.position(dim) {
        Some(position) => {
            let (size, stride) = (groups.shape[position].1, groups.strides()[position]);
            let parts = starts.map(|(first, count)| Part {
                groups: (0..groups.n_elements())
                    .filter(|at| (first..first + count).contains(&(at / stride % size)))
                    .collect(),
                columns: (0, row),
            });
            (total == size).then(|| parts.collect())
        }
        None => (total == row).then(|| {
            let part = |columns| Part {
                groups: (0..groups.n_elements()).collect(),
                columns,
            };
            starts.by_ref().map(part).collect()
        }),
    }
}
