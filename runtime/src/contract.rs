//! Strided contractions of two f32 tensors: any einsum of two operands, by calls of the `gemm` library.
//!
//! In: the einsum's indices, each with its size and its stride in the operands `a`, `b` and in the
//! output `c`. Out: `c = alpha * Σ a·b` (or `c += …`).
//! Invariant: a [`ContractPlan`] touches exactly the elements its indices walk, and the order of
//! summation depends on the plan and the number of threads alone, never on timing.

pub(crate) mod bias;

use meshweave_dsl::program::ContractIndex;

use crate::error::{Error, Result};
use crate::pool::WorkerPool;

/// What the result does with the output's old content, and its factor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ContractOptions {
    /// Add to the output instead of replacing it.
    pub accumulate: bool,
    /// Factor of the product.
    pub alpha: f32,
}

impl Default for ContractOptions {
    fn default() -> Self {
        ContractOptions {
            accumulate: false,
            alpha: 1.0,
        }
    }
}

/// A contraction ready to run: one matrix product and the loops around it.
#[derive(Debug, Clone, PartialEq)]
pub struct ContractPlan {
    /// The product's three indices (rows, columns, depth).
    m: ContractIndex,
    n: ContractIndex,
    k: ContractIndex,
    /// Loops over output indices, outermost first.
    outer: Vec<ContractIndex>,
    /// Loops over summed indices, outermost first, inside of `outer`.
    depth: Vec<ContractIndex>,
    options: ContractOptions,
    /// Elements that each operand must span, counted from its base.
    spans: Spans,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Spans {
    a: usize,
    b: usize,
    c: usize,
}

/// The role of an index, which follows from its strides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Batch,
    Row,
    Column,
    Depth,
}

fn role(index: &ContractIndex) -> Role {
    match (index.a != 0, index.b != 0, index.c != 0) {
        (_, _, false) => Role::Depth,
        (true, true, true) => Role::Batch,
        (false, true, true) => Role::Column,
        // An output index that neither operand has repeats the row.
        (_, false, true) => Role::Row,
    }
}

/// Whether `outer` and `inner` walk every operand as one longer index would.
fn continues(outer: &ContractIndex, inner: &ContractIndex) -> bool {
    role(outer) == role(inner)
        && outer.a == inner.a * inner.size
        && outer.b == inner.b * inner.size
        && outer.c == inner.c * inner.size
}

impl ContractPlan {
    /// Plans the einsum with these indices: merges what walks memory as one, and picks for the
    /// matrix product the indices that make it cheapest. `O(d³)` in the number of indices.
    ///
    /// # Errors
    /// `Invalid` when two output elements would share a place.
    pub fn new(dims: &[ContractIndex], options: ContractOptions) -> Result<ContractPlan> {
        let spans = Spans {
            a: span(dims, |d| d.a),
            b: span(dims, |d| d.b),
            c: span(dims, |d| d.c),
        };
        check_output(dims)?;
        Ok(ContractPlan::of_merged(&merge(dims), spans, options))
    }

    /// The plan for indices that are as merged as they may be.
    fn of_merged(merged: &[ContractIndex], spans: Spans, options: ContractOptions) -> ContractPlan {
        let of = |wanted: Role| -> Vec<ContractIndex> {
            merged
                .iter()
                .copied()
                .filter(|d| role(d) == wanted)
                .collect()
        };
        let (batch, rows, columns, depths) = (
            of(Role::Batch),
            of(Role::Row),
            of(Role::Column),
            of(Role::Depth),
        );
        let (mut best, mut best_cost) = ((None, None, None), f64::INFINITY);
        let n_total: f64 = merged.iter().map(|d| d.size as f64).product();
        for m in choices(&rows) {
            for n in choices(&columns) {
                for k in choices(&depths) {
                    let cost = cost(n_total, pick(&rows, m), pick(&columns, n), pick(&depths, k));
                    if cost < best_cost {
                        (best, best_cost) = ((m, n, k), cost);
                    }
                }
            }
        }
        let (m, n, k) = best;
        let mut outer = batch;
        outer.extend(without(&rows, m));
        outer.extend(without(&columns, n));
        let (m_dim, n_dim) = (pick(&rows, m), pick(&columns, n));
        ContractPlan {
            m: m_dim,
            n: n_dim,
            k: pick(&depths, k),
            outer,
            depth: without(&depths, k),
            options,
            spans,
        }
    }

    /// Floating point operations, a multiplication and an addition counted as two.
    pub fn flops(&self) -> u64 {
        let sizes = self
            .outer
            .iter()
            .chain(&self.depth)
            .chain([&self.m, &self.n, &self.k]);
        2 * sizes.map(|d| d.size as u64).product::<u64>()
    }

    /// Elements that `a`, `b` and `c` must hold, counted from their bases.
    pub fn spans(&self) -> (usize, usize, usize) {
        (self.spans.a, self.spans.b, self.spans.c)
    }

    /// The rows, columns and depth of its matrix product.
    pub(crate) fn product_indices(&self) -> [ContractIndex; 3] {
        [self.m, self.n, self.k]
    }

    /// The loops around its matrix product: over the output, and over sums.
    pub(crate) fn loops(&self) -> (&[ContractIndex], &[ContractIndex]) {
        (&self.outer, &self.depth)
    }

    /// Runs on slices: `a`, `b` and `c` hold at least [`ContractPlan::spans`] elements.
    ///
    /// # Errors
    /// `Invalid` when an operand is too short.
    pub fn run(&self, a: &[f32], b: &[f32], c: &mut [f32]) -> Result<()> {
        for (name, len, span) in [
            ("left operand", a.len(), self.spans.a),
            ("right operand", b.len(), self.spans.b),
            ("output", c.len(), self.spans.c),
        ] {
            if len < span {
                return Err(Error::Invalid(format!(
                    "the contraction's {name} holds {len} elements, its indices span {span}"
                )));
            }
        }
        // SAFETY: the lengths cover the spans, and the borrows make `c` disjoint from `a` and `b`.
        unsafe { self.run_raw(a.as_ptr(), b.as_ptr(), c.as_mut_ptr()) };
        Ok(())
    }

    /// Runs on raw memory.
    ///
    /// # Safety
    /// `a`, `b` and `c` are valid for as many elements as [`ContractPlan::spans`] states, `c` for
    /// writes and disjoint from both operands, and nobody else touches `c` meanwhile.
    pub unsafe fn run_raw(&self, a: *const f32, b: *const f32, c: *mut f32) {
        if self.flops() == 0 {
            // SAFETY: as for this function.
            unsafe { self.clear(c) };
            return;
        }
        let mut outer = Counter::new(&self.outer);
        while let Some((a_outer, b_outer, c_outer)) = outer.next_offsets() {
            let mut depth = Counter::new(&self.depth);
            let mut accumulate = self.options.accumulate;
            while let Some((a_depth, b_depth, _)) = depth.next_offsets() {
                // SAFETY: the offsets are sums of index·stride below the spans, which the caller
                // guarantees to be valid; the product walks m, n and k on top, inside the spans.
                unsafe {
                    product(
                        (&self.m, &self.n, &self.k),
                        (
                            a.add(a_outer + a_depth),
                            b.add(b_outer + b_depth),
                            c.add(c_outer),
                        ),
                        ContractOptions {
                            accumulate,
                            ..self.options
                        },
                    );
                }
                accumulate = true;
            }
        }
    }

    /// Runs on raw memory, split over the pool's threads.
    ///
    /// # Errors
    /// `Internal` when a worker panicked.
    ///
    /// # Safety
    /// As for [`ContractPlan::run_raw`].
    pub unsafe fn run_raw_on(
        &self,
        pool: &WorkerPool,
        a: *const f32,
        b: *const f32,
        c: *mut f32,
    ) -> Result<()> {
        let pieces = self.split(pool.n_threads());
        if pieces.len() <= 1 {
            // SAFETY: as for this function.
            unsafe { self.run_raw(a, b, c) };
            return Ok(());
        }
        let (a, b, c) = (SendPtr(a.cast_mut()), SendPtr(b.cast_mut()), SendPtr(c));
        pool.run(pieces.len(), &|piece_idx| {
            let (a, b, c) = (&a, &b, &c);
            let piece = &pieces[piece_idx];
            // SAFETY: a piece walks a part of this plan's indices from its base offsets, hence inside
            // the spans; the pieces divide an output index, so their outputs are disjoint.
            unsafe {
                piece.plan.run_raw(
                    a.0.add(piece.a).cast_const(),
                    b.0.add(piece.b).cast_const(),
                    c.0.add(piece.c),
                );
            }
        })
    }

    /// Divides the work into at most `n_pieces` parts with disjoint outputs. Every output element is
    /// written by one part.
    fn split(&self, n_pieces: usize) -> Vec<Piece> {
        /// Below this a part costs less than waking a thread for it.
        const MIN_FLOPS: u64 = 1 << 20;
        let worthwhile = usize::try_from(self.flops() / MIN_FLOPS).unwrap_or(usize::MAX);
        self.split_into(n_pieces.min(worthwhile))
    }

    fn split_into(&self, n_pieces: usize) -> Vec<Piece> {
        let n_pieces = n_pieces.max(1);
        // A loop around the product divides without packing anything twice; else the longer side of
        // the product, in whole blocks of the library's kernels.
        let widest =
            (0..self.outer.len()).max_by_key(|&i| (self.outer[i].size, self.outer.len() - i));
        let (slot, block) = match widest {
            Some(i) if self.outer[i].size >= n_pieces => (Slot::Outer(i), 1),
            _ if self.m.size >= self.n.size => (Slot::Row, 48),
            _ => (Slot::Column, 48),
        };
        let dim = match slot {
            Slot::Outer(i) => self.outer[i],
            Slot::Row => self.m,
            Slot::Column => self.n,
        };
        let n_blocks = dim.size.div_ceil(block);
        let n_pieces = n_pieces.min(n_blocks);
        (0..n_pieces)
            .map(|piece_idx| {
                let begin = (n_blocks * piece_idx / n_pieces) * block;
                let end = ((n_blocks * (piece_idx + 1) / n_pieces) * block).min(dim.size);
                let mut plan = self.clone();
                let size = end - begin;
                match slot {
                    Slot::Outer(i) => plan.outer[i].size = size,
                    Slot::Row => plan.m.size = size,
                    Slot::Column => plan.n.size = size,
                }
                Piece {
                    plan,
                    a: begin * dim.a,
                    b: begin * dim.b,
                    c: begin * dim.c,
                }
            })
            .collect()
    }

    /// An empty sum is zero: writes it unless the result accumulates.
    ///
    /// # Safety
    /// `c` is valid for writes over its span.
    unsafe fn clear(&self, c: *mut f32) {
        if self.options.accumulate {
            return;
        }
        let mut dims = self.outer.clone();
        dims.extend([self.m, self.n]);
        let mut counter = Counter::new(&dims);
        while let Some((_, _, offset)) = counter.next_offsets() {
            // SAFETY: the offset is below the output's span.
            unsafe { *c.add(offset) = 0.0 };
        }
    }
}

/// A contraction one of whose indices is as long as a run says.
#[derive(Debug, Clone)]
pub struct RowPlan {
    plan: ContractPlan,
    rows: ContractIndex,
}

impl RowPlan {
    /// Plans for `rows` at its full length besides `others`, which it is not merged with.
    ///
    /// # Errors
    /// As for [`ContractPlan::new`].
    pub fn new(
        others: &[ContractIndex],
        rows: ContractIndex,
        options: ContractOptions,
    ) -> Result<RowPlan> {
        let all: Vec<ContractIndex> = others.iter().copied().chain([rows]).collect();
        check_output(&all)?;
        let spans = Spans {
            a: span(&all, |d| d.a),
            b: span(&all, |d| d.b),
            c: span(&all, |d| d.c),
        };
        let mut merged = merge(others);
        merged.push(rows);
        Ok(RowPlan {
            plan: ContractPlan::of_merged(&merged, spans, options),
            rows,
        })
    }

    /// Runs over the first `n_rows`; the result replaces what was there when `is_first` and the options
    /// do not say to accumulate, otherwise it is added.
    ///
    /// # Errors
    /// As for [`ContractPlan::run_raw_on`].
    ///
    /// # Safety
    /// As for [`ContractPlan::run_raw`], with `n_rows` at most the full length.
    pub(crate) unsafe fn run_raw_on(
        &self,
        pool: &WorkerPool,
        n_rows: usize,
        is_first: bool,
        (a, b, c): (*const f32, *const f32, *mut f32),
    ) -> Result<()> {
        if n_rows == 0 && (self.rows.c != 0 || !is_first) {
            return Ok(());
        }
        let mut plan = self.plan.clone();
        plan.options.accumulate |= !is_first;
        {
            let places = [&mut plan.m, &mut plan.n, &mut plan.k].into_iter();
            let mut places = places.chain(&mut plan.outer).chain(&mut plan.depth);
            if let Some(place) = places.find(|index| **index == self.rows) {
                place.size = n_rows;
            }
        }
        // SAFETY: as for this function.
        unsafe { plan.run_raw_on(pool, a, b, c) }
    }
}

#[derive(Clone, Copy)]
enum Slot {
    Outer(usize),
    Row,
    Column,
}

struct Piece {
    plan: ContractPlan,
    a: usize,
    b: usize,
    c: usize,
}

struct SendPtr(*mut f32);

// SAFETY: carries an address to the pool's threads; each use states why its access is exclusive.
unsafe impl Sync for SendPtr {}

/// One matrix product `c = alpha a b` or `c += alpha a b`.
///
/// # Safety
/// The operands are valid over what `m`, `n` and `k` walk; `c` for writes, disjoint from both.
pub(crate) unsafe fn product(
    (m, n, k): (&ContractIndex, &ContractIndex, &ContractIndex),
    (a, b, c): (*const f32, *const f32, *mut f32),
    options: ContractOptions,
) {
    // The library prefers c by columns and transposes by itself when its rows are contiguous; an
    // index of size 1 has no stride of its own, so give it one that makes the other contiguous.
    let row_stride = if m.size == 1 {
        n.c.max(1) * n.size
    } else {
        m.c
    };
    let column_stride = if n.size == 1 {
        row_stride.max(1) * m.size
    } else {
        n.c
    };
    // SAFETY: as for this function; strides are the indices' own except those of size 1.
    unsafe {
        gemm::gemm(
            m.size,
            n.size,
            k.size,
            c,
            column_stride as isize,
            row_stride as isize,
            options.accumulate,
            a,
            k.a as isize,
            m.a as isize,
            b,
            n.b as isize,
            k.b as isize,
            1.0,
            options.alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Walks the offsets of a nest of loops, the last index fastest.
struct Counter<'a> {
    dims: &'a [ContractIndex],
    at: Vec<usize>,
    offsets: (usize, usize, usize),
    done: bool,
}

impl<'a> Counter<'a> {
    fn new(dims: &'a [ContractIndex]) -> Counter<'a> {
        let done = dims.iter().any(|d| d.size == 0);
        Counter {
            dims,
            at: vec![0; dims.len()],
            offsets: (0, 0, 0),
            done,
        }
    }

    fn next_offsets(&mut self) -> Option<(usize, usize, usize)> {
        if self.done {
            return None;
        }
        let current = self.offsets;
        self.done = true;
        for (at, dim) in self.at.iter_mut().zip(self.dims).rev() {
            *at += 1;
            let offsets = &mut self.offsets;
            if *at < dim.size {
                *offsets = (offsets.0 + dim.a, offsets.1 + dim.b, offsets.2 + dim.c);
                self.done = false;
                break;
            }
            *at = 0;
            let back = dim.size - 1;
            *offsets = (
                offsets.0 - back * dim.a,
                offsets.1 - back * dim.b,
                offsets.2 - back * dim.c,
            );
        }
        Some(current)
    }
}

/// Elements from the base to the last one touched.
fn span(dims: &[ContractIndex], stride: impl Fn(&ContractIndex) -> usize) -> usize {
    if dims.iter().any(|d| d.size == 0 && stride(d) != 0) {
        return 0;
    }
    let last: usize = dims
        .iter()
        .map(|d| d.size.saturating_sub(1) * stride(d))
        .sum();
    last + 1
}

/// Sorted by stride, each output index must step over all of the smaller ones.
fn check_output(dims: &[ContractIndex]) -> Result<()> {
    let mut outputs: Vec<(usize, usize)> = dims
        .iter()
        .filter(|d| d.c != 0 && d.size > 1)
        .map(|d| (d.c, d.size))
        .collect();
    outputs.sort_unstable();
    let mut reach = 1;
    for (stride, size) in outputs {
        if stride < reach {
            return Err(Error::Invalid(format!(
                "two output elements of a contraction share a place: an index steps by {stride} where \
                 the smaller ones reach over {reach} elements"
            )));
        }
        reach += stride * (size - 1);
    }
    Ok(())
}

/// Drops indices of size 1, sorts the rest from outer to inner, and joins neighbors.
fn merge(dims: &[ContractIndex]) -> Vec<ContractIndex> {
    let mut sorted: Vec<ContractIndex> = dims.iter().copied().filter(|d| d.size != 1).collect();
    sorted.sort_by_key(|d| std::cmp::Reverse((d.c, d.a, d.b, d.size)));
    let mut merged: Vec<ContractIndex> = Vec::new();
    'next: for dim in sorted.into_iter().rev() {
        for inner in &mut merged {
            if continues(&dim, inner) {
                inner.size *= dim.size;
                continue 'next;
            }
            if continues(inner, &dim) {
                *inner = ContractIndex {
                    size: inner.size * dim.size,
                    ..dim
                };
                continue 'next;
            }
        }
        merged.push(dim);
    }
    merged.reverse();
    merged
}

/// The positions to try for one side of the product.
fn choices(dims: &[ContractIndex]) -> Vec<Option<usize>> {
    if dims.is_empty() {
        vec![None]
    } else {
        (0..dims.len()).map(Some).collect()
    }
}

/// A chosen index, or a single step where the side is absent.
fn pick(dims: &[ContractIndex], choice: Option<usize>) -> ContractIndex {
    match choice {
        Some(i) => dims[i],
        None => ContractIndex {
            size: 1,
            a: 0,
            b: 0,
            c: 0,
        },
    }
}

fn without(dims: &[ContractIndex], choice: Option<usize>) -> Vec<ContractIndex> {
    let others = dims.iter().enumerate().filter(|(i, _)| Some(*i) != choice);
    others.map(|(_, d)| *d).collect()
}

/// Relative time of the whole contraction when its inner product is `m`×`n`×`k`: full blocks of the
/// library's 16×6 kernels, packing of both operands, access to the output, and a fixed price a call.
fn cost(n_total: f64, m: ContractIndex, n: ContractIndex, k: ContractIndex) -> f64 {
    let inner = (m.size * n.size * k.size).max(1) as f64;
    let n_calls = n_total / inner;
    let (m_size, n_size, k_size) = (m.size as f64, n.size as f64, k.size as f64);
    let multiply = blocks(m.size, 8) * blocks(n.size, 8) * k_size / 32.0;
    let reading = |near: usize, far: usize| if near == 1 || far == 1 { 0.25 } else { 2.0 };
    let writing = if m.c == 1 || n.c == 1 { 0.5 } else { 4.0 };
    let pack_a = m_size * k_size * reading(m.a, k.a);
    let pack_b = n_size * k_size * reading(n.b, k.b);
    n_calls * (multiply + pack_a + pack_b + m_size * n_size * writing + 400.0)
}

/// `size` rounded up to blocks, as a number of elements.
fn blocks(size: usize, block: usize) -> f64 {
    (size.div_ceil(block) * block) as f64
}

#[cfg(test)]
mod tests;
