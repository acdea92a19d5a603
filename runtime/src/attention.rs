//! Blockwise attention on the host: products by the contraction library, the softmax between them by
//! a generated kernel, scores never larger than one block of queries.
//!
//! In: q, k, v (for the gradient also o, lse and do) by address and type, and the kernel. Out: o and
//! lse, or dq, dk and dv.
//! Invariant: an execution touches its operands and one scratch a thread; the order of summation
//! depends on the types alone, so results do not depend on the number of threads.
//!
//! The kernels' arguments (stride of a row of scores: |kv_seq|; `place` = first visible-by-offset
//! position of the block, and number of leading columns in use):
//! - forward: scores `f32[rows, kv_seq]` (products in, probabilities out), lse (address of the block's
//!   first value), place `i32[2]`, and where queries say how many keys they see, these counts
//!   `i32[rows]`;
//! - gradient: scores (products in, probabilities out), dP (in) and dS (out), lse, D = Σ o ∘ do
//!   `f32[rows]`, place `i32[2]`.
//!
//! Source: Dao 2023, "FlashAttention-2", algorithms 1 and 2, without the split over keys.

#[cfg(test)]
mod tests;

use std::ffi::c_void;

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{ATTENTION_BLOCK_ROWS, AttentionDims};
use meshweave_dsl::program::ContractIndex;

use crate::contract::{ContractOptions, product};
use crate::error::{Error, Result};
use crate::pool::WorkerPool;

/// A generated kernel: `void name(void** args, int64 begin, int64 end)` over rows `begin..end`.
pub type KernelFn = unsafe extern "C" fn(args: *const *mut c_void, begin: i64, end: i64);

/// How one operand lies in memory, in elements.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Operand {
    /// Strides of the dims that keys have too (batch, key heads), outermost first.
    batch: Vec<usize>,
    /// Strides of the dims that only queries have (query heads of one key head).
    group: Vec<usize>,
    /// Stride of `seq` or `kv_seq`.
    row: usize,
    /// Stride of `head` or `value`.
    column: usize,
}

/// The walk of one attention op, forward or backward.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttentionPlan {
    batch_sizes: Vec<usize>,
    group_sizes: Vec<usize>,
    seq: usize,
    kv_seq: usize,
    head: usize,
    value: usize,
    causal: bool,
    offset: usize,
    q: Operand,
    k: Operand,
    v: Operand,
    o: Operand,
    lse: Operand,
    /// How many keys each query sees, where the operands say so.
    seen: Option<Operand>,
    /// What comes of queries that see no key is left as it is instead of being 0.
    leaves_rest: bool,
}

/// The types of an attention op's operands. Gradients lie as what they are the gradient of.
#[derive(Debug, Clone, Copy)]
pub struct AttentionTypes<'a> {
    /// `[b.., seq, g.., head]` in any order.
    pub q: &'a TensorType,
    /// `[b.., kv_seq, head]` in any order.
    pub k: &'a TensorType,
    /// `[b.., kv_seq, value]` in any order.
    pub v: &'a TensorType,
    /// The dims of q with `value` in place of `head`.
    pub o: &'a TensorType,
    /// The dims of q without `head`.
    pub lse: &'a TensorType,
}

/// Addresses of a forward execution.
#[derive(Debug, Clone, Copy)]
pub struct ForwardArgs {
    pub q: *const f32,
    pub k: *const f32,
    pub v: *const f32,
    pub o: *mut f32,
    pub lse: *mut f32,
    /// Null unless the plan is [`AttentionPlan::seeing`].
    pub seen: *const i32,
}

/// Addresses of a backward execution.
#[derive(Debug, Clone, Copy)]
pub struct BackwardArgs {
    pub q: *const f32,
    pub k: *const f32,
    pub v: *const f32,
    pub o: *const f32,
    pub lse: *const f32,
    pub d_o: *const f32,
    pub dq: *mut f32,
    pub dk: *mut f32,
    pub dv: *mut f32,
}

/// Addresses that the pool's threads share.
struct Shared<T>(T);

// SAFETY: carries addresses to the pool's threads; the entries that a thread works on are its own.
unsafe impl<T> Sync for Shared<T> {}

/// One block of queries.
#[derive(Clone, Copy)]
struct Block {
    first: usize,
    rows: usize,
    /// `[position of the first query, columns in use]`.
    place: [i32; 2],
    columns: usize,
}

impl AttentionPlan {
    /// Plans the op over operands of these types.
    ///
    /// # Errors
    /// `Invalid` when the types do not fit the dims or each other.
    pub fn new(dims: &AttentionDims, types: AttentionTypes<'_>) -> Result<AttentionPlan> {
        let AttentionTypes { q, k, v, o, lse } = types;
        let size = |what: &str, ty: &TensorType, dim: &Dim| {
            ty.size_of(dim).ok_or_else(|| {
                Error::Invalid(format!("attention: {what} is {ty} and lacks `{dim}`"))
            })
        };
        let (seq, head) = (size("q", q, &dims.seq)?, size("q", q, &dims.head)?);
        let (kv_seq, value) = (size("k", k, &dims.kv_seq)?, size("v", v, &dims.value)?);
        let own = |dim: &&(Dim, usize)| ![&dims.kv_seq, &dims.head].contains(&&dim.0);
        let batch: Vec<(Dim, usize)> = k.shape.iter().filter(own).cloned().collect();
        let group: Vec<(Dim, usize)> = q
            .shape
            .iter()
            .filter(|(dim, _)| *dim != dims.seq && *dim != dims.head && !k.has(dim))
            .cloned()
            .collect();
        let operand = |what: &str,
                       ty: &TensorType,
                       row: (&Dim, usize),
                       column: Option<(&Dim, usize)>,
                       grouped: bool| {
            let strides = ty.strides();
            let stride = |dim: &Dim, size: usize| match ty.position(dim) {
                Some(position) if ty.shape[position].1 == size => Ok(strides[position]),
                _ => Err(Error::Invalid(format!(
                    "attention: {what} is {ty}, which needs `{dim}` of {size} elements"
                ))),
            };
            let of = |dims: &[(Dim, usize)]| -> Result<Vec<usize>> {
                dims.iter().map(|(dim, size)| stride(dim, *size)).collect()
            };
            let n_dims = batch.len()
                + if grouped { group.len() } else { 0 }
                + 1
                + usize::from(column.is_some());
            if ty.shape.len() != n_dims {
                return Err(Error::Invalid(format!(
                    "attention: {what} is {ty}, which has dims too many"
                )));
            }
            Ok(Operand {
                batch: of(&batch)?,
                group: if grouped {
                    of(&group)?
                } else {
                    vec![0; group.len()]
                },
                row: stride(row.0, row.1)?,
                column: column.map_or(Ok(0), |(dim, size)| stride(dim, size))?,
            })
        };
        let (rows, keys) = ((&dims.seq, seq), (&dims.kv_seq, kv_seq));
        Ok(AttentionPlan {
            q: operand("q", q, rows, Some((&dims.head, head)), true)?,
            k: operand("k", k, keys, Some((&dims.head, head)), false)?,
            v: operand("v", v, keys, Some((&dims.value, value)), false)?,
            o: operand("o", o, rows, Some((&dims.value, value)), true)?,
            lse: operand("lse", lse, rows, None, true)?,
            batch_sizes: batch.iter().map(|(_, size)| *size).collect(),
            group_sizes: group.iter().map(|(_, size)| *size).collect(),
            seq,
            kv_seq,
            head,
            value,
            causal: dims.causal,
            offset: dims.offset,
            seen: None,
            leaves_rest: false,
        })
    }

    /// The same, leaving what comes of queries that see no key as it is.
    #[must_use]
    pub fn leaving_rest(self) -> AttentionPlan {
        AttentionPlan {
            leaves_rest: true,
            ..self
        }
    }

    /// The same, where `seen: i32[.., seq]`, over dims of q, says how many keys each query sees. Queries
    /// that see none stand at the end of a row of `seq` and are passed over.
    ///
    /// # Errors
    /// `Invalid` when the type does not fit.
    pub fn seeing(
        self,
        dims: &AttentionDims,
        types: AttentionTypes<'_>,
        seen: &TensorType,
    ) -> Result<AttentionPlan> {
        let AttentionTypes { q, k, .. } = types;
        let is_innermost = seen.position(&dims.seq) == Some(seen.shape.len().wrapping_sub(1));
        let fits = (seen.shape.iter()).all(|(dim, size)| q.size_of(dim) == Some(*size));
        if !is_innermost || !fits {
            return Err(Error::Invalid(format!(
                "attention: the keys that {q} sees are counted by {seen}, along `{}`",
                dims.seq
            )));
        }
        let strides = seen.strides();
        let over = |is: &dyn Fn(&Dim) -> bool, ty: &TensorType| -> Vec<usize> {
            let dims = ty.shape.iter().map(|(dim, _)| dim).filter(|dim| is(dim));
            dims.map(|dim| seen.position(dim).map_or(0, |at| strides[at]))
                .collect()
        };
        let batch = over(&|dim| ![&dims.kv_seq, &dims.head].contains(&dim), k);
        let is_group = |dim: &Dim| *dim != dims.seq && *dim != dims.head && !k.has(dim);
        let group = over(&is_group, q);
        Ok(AttentionPlan {
            seen: Some(Operand {
                batch,
                group,
                row: 1,
                column: 0,
            }),
            ..self
        })
    }

    /// Elements of scratch that each thread needs, forward or backward.
    pub fn scratch_elements(&self, backward: bool) -> usize {
        if backward {
            ATTENTION_BLOCK_ROWS * (2 * self.kv_seq + 1)
        } else {
            ATTENTION_BLOCK_ROWS * self.kv_seq
        }
    }

    /// o = softmax(scale · q kᵀ) v and lse. `scratch` holds one address a thread of the pool; fewer
    /// addresses mean fewer threads.
    ///
    /// # Errors
    /// `Internal` when no scratch is given or a thread panicked.
    ///
    /// # Safety
    /// The addresses are valid for tensors of the planned types, the results for writes and disjoint
    /// from everything else; each scratch is valid for [`Self::scratch_elements`] elements and used by
    /// nobody else; the kernel is the forward kernel of these dims.
    pub unsafe fn forward(
        &self,
        pool: &WorkerPool,
        kernel: KernelFn,
        args: ForwardArgs,
        scratch: &[*mut f32],
    ) -> Result<()> {
        let n_groups = count(&self.group_sizes);
        let n_heads = count(&self.batch_sizes) * n_groups;
        let shared = Shared((args, scratch));
        on_threads(pool, scratch.len(), n_heads, &|thread, heads| {
            let Shared((args, scratch)) = &shared;
            for head in heads {
                // SAFETY: every head's results are written by one thread alone; `thread` is below the
                // number of scratches, of which each thread has its own.
                unsafe {
                    self.forward_head(
                        kernel,
                        args,
                        scratch[thread],
                        head / n_groups,
                        head % n_groups,
                    );
                }
            }
        })
    }

    /// dq, dk and dv from do, with the probabilities recomputed from lse.
    ///
    /// # Errors
    /// As for [`Self::forward`].
    ///
    /// # Safety
    /// As for [`Self::forward`], with the gradient's kernel.
    pub unsafe fn backward(
        &self,
        pool: &WorkerPool,
        kernel: KernelFn,
        args: BackwardArgs,
        scratch: &[*mut f32],
    ) -> Result<()> {
        let n_batches = count(&self.batch_sizes);
        let shared = Shared((args, scratch));
        on_threads(pool, scratch.len(), n_batches, &|thread, batches| {
            let Shared((args, scratch)) = &shared;
            for batch in batches {
                // SAFETY: as in `forward`; a key head's dk and dv, and the dq of all its query heads,
                // are written by one thread alone.
                unsafe { self.backward_batch(kernel, args, scratch[thread], batch) };
            }
        })
    }

    /// # Safety
    /// As for [`Self::forward`], for this head alone.
    unsafe fn forward_head(
        &self,
        kernel: KernelFn,
        args: &ForwardArgs,
        scores: *mut f32,
        batch: usize,
        group: usize,
    ) {
        // SAFETY: each address is an operand's base plus offsets of indices below its dims' sizes, and
        // each product walks a block of rows and columns inside of the operands and the scratch.
        unsafe {
            let q = args.q.add(self.at(&self.q, batch, group));
            let k = args.k.add(self.at(&self.k, batch, group));
            let v = args.v.add(self.at(&self.v, batch, group));
            let o = args.o.add(self.at(&self.o, batch, group));
            let lse = args.lse.add(self.at(&self.lse, batch, group));
            let seen = self.seen.as_ref().map(|at| {
                std::slice::from_raw_parts(args.seen.add(self.at(at, batch, group)), self.seq)
            });
            for block in self.blocks() {
                let mut block = block;
                if let Some(seen) = seen {
                    let seen = &seen[block.first..block.first + block.rows];
                    block.rows = seen.iter().take_while(|n| **n > 0).count();
                    let most = seen[..block.rows].iter().max().copied().unwrap_or(0);
                    block.columns = self.kv_seq.min(usize::try_from(most).unwrap_or(0));
                    block.place[1] = block.columns as i32;
                    if !self.leaves_rest {
                        for row in block.first + block.rows..block.first + seen.len() {
                            *lse.add(row * self.lse.row) = 0.0;
                            for column in 0..self.value {
                                *o.add(row * self.o.row + column * self.o.column) = 0.0;
                            }
                        }
                    }
                    if block.rows == 0 {
                        continue;
                    }
                }
                let q = q.add(block.first * self.q.row);
                self.scores(&block, (q, &self.q), (k, &self.k), self.head, scores);
                let seen = seen.map_or(std::ptr::null(), |seen| seen[block.first..].as_ptr());
                let kernel_args: [*mut c_void; 4] = [
                    scores.cast(),
                    lse.add(block.first * self.lse.row).cast(),
                    block.place.as_ptr().cast_mut().cast(),
                    seen.cast_mut().cast(),
                ];
                kernel(kernel_args.as_ptr(), 0, block.rows as i64);
                product(
                    (
                        &ContractIndex {
                            size: block.rows,
                            a: self.kv_seq,
                            b: 0,
                            c: self.o.row,
                        },
                        &ContractIndex {
                            size: self.value,
                            a: 0,
                            b: self.v.column,
                            c: self.o.column,
                        },
                        &ContractIndex {
                            size: block.columns,
                            a: 1,
                            b: self.v.row,
                            c: 0,
                        },
                    ),
                    (scores, v, o.add(block.first * self.o.row)),
                    ContractOptions::default(),
                );
            }
        }
    }

    /// # Safety
    /// As for [`Self::backward`], for this key head alone.
    unsafe fn backward_batch(
        &self,
        kernel: KernelFn,
        args: &BackwardArgs,
        scratch: *mut f32,
        batch: usize,
    ) {
        // SAFETY: as in `forward_head`; the scratch holds two blocks of scores and a value per row.
        unsafe {
            let (scores, dscores) = (scratch, scratch.add(ATTENTION_BLOCK_ROWS * self.kv_seq));
            let row_dots = dscores.add(ATTENTION_BLOCK_ROWS * self.kv_seq);
            let (k_at, v_at) = (self.at(&self.k, batch, 0), self.at(&self.v, batch, 0));
            let (k, v) = (args.k.add(k_at), args.v.add(v_at));
            let (dk, dv) = (args.dk.add(k_at), args.dv.add(v_at));
            clear(dk, &self.k, self.kv_seq, self.head);
            clear(dv, &self.v, self.kv_seq, self.value);
            let onto = ContractOptions {
                accumulate: true,
                ..ContractOptions::default()
            };
            for group in 0..count(&self.group_sizes) {
                let q_at = self.at(&self.q, batch, group);
                let o_at = self.at(&self.o, batch, group);
                let lse = args.lse.add(self.at(&self.lse, batch, group));
                for block in self.blocks() {
                    let q_block = q_at + block.first * self.q.row;
                    let o_block = o_at + block.first * self.o.row;
                    let (q, d_o) = (args.q.add(q_block), args.d_o.add(o_block));
                    self.scores(&block, (q, &self.q), (k, &self.k), self.head, scores);
                    self.scores(&block, (d_o, &self.o), (v, &self.v), self.value, dscores);
                    self.row_dots(block.rows, args.o.add(o_block), d_o, row_dots);
                    let kernel_args: [*mut c_void; 5] = [
                        scores.cast(),
                        dscores.cast(),
                        lse.add(block.first * self.lse.row).cast_mut().cast(),
                        row_dots.cast(),
                        block.place.as_ptr().cast_mut().cast(),
                    ];
                    kernel(kernel_args.as_ptr(), 0, block.rows as i64);
                    // dv += Pᵀ do
                    product(
                        (
                            &ContractIndex {
                                size: block.columns,
                                a: 1,
                                b: 0,
                                c: self.v.row,
                            },
                            &ContractIndex {
                                size: self.value,
                                a: 0,
                                b: self.o.column,
                                c: self.v.column,
                            },
                            &ContractIndex {
                                size: block.rows,
                                a: self.kv_seq,
                                b: self.o.row,
                                c: 0,
                            },
                        ),
                        (scores, d_o, dv),
                        onto,
                    );
                    // dk += dSᵀ q
                    product(
                        (
                            &ContractIndex {
                                size: block.columns,
                                a: 1,
                                b: 0,
                                c: self.k.row,
                            },
                            &ContractIndex {
                                size: self.head,
                                a: 0,
                                b: self.q.column,
                                c: self.k.column,
                            },
                            &ContractIndex {
                                size: block.rows,
                                a: self.kv_seq,
                                b: self.q.row,
                                c: 0,
                            },
                        ),
                        (dscores, q, dk),
                        onto,
                    );
                    // dq = dS k
                    product(
                        (
                            &ContractIndex {
                                size: block.rows,
                                a: self.kv_seq,
                                b: 0,
                                c: self.q.row,
                            },
                            &ContractIndex {
                                size: self.head,
                                a: 0,
                                b: self.k.column,
                                c: self.q.column,
                            },
                            &ContractIndex {
                                size: block.columns,
                                a: 1,
                                b: self.k.row,
                                c: 0,
                            },
                        ),
                        (dscores, k, args.dq.add(q_block)),
                        ContractOptions::default(),
                    );
                }
            }
        }
    }

    /// A block's products with all keys in use: `out[rows, columns] = x yᵀ`, rows of |kv_seq| apart.
    ///
    /// # Safety
    /// The operands and the scratch are valid for the block.
    unsafe fn scores(
        &self,
        block: &Block,
        (x, x_at): (*const f32, &Operand),
        (y, y_at): (*const f32, &Operand),
        depth: usize,
        out: *mut f32,
    ) {
        // SAFETY: as for this function.
        unsafe {
            product(
                (
                    &ContractIndex {
                        size: block.rows,
                        a: x_at.row,
                        b: 0,
                        c: self.kv_seq,
                    },
                    &ContractIndex {
                        size: block.columns,
                        a: 0,
                        b: y_at.row,
                        c: 1,
                    },
                    &ContractIndex {
                        size: depth,
                        a: x_at.column,
                        b: y_at.column,
                        c: 0,
                    },
                ),
                (x, y, out),
                ContractOptions::default(),
            );
        }
    }

    /// D = Σ o ∘ do of each row.
    ///
    /// # Safety
    /// Both operands are valid for the block, `out` for one value per row.
    unsafe fn row_dots(&self, rows: usize, o: *const f32, d_o: *const f32, out: *mut f32) {
        for row in 0..rows {
            let mut lanes = [0.0f32; 8];
            for column in 0..self.value {
                let at = row * self.o.row + column * self.o.column;
                // SAFETY: row and column are inside of the block.
                lanes[column % 8] += unsafe { *o.add(at) * *d_o.add(at) };
            }
            // SAFETY: `row` is below the block's rows.
            unsafe { *out.add(row) = lanes.iter().sum() };
        }
    }

    /// Offset of a head's first element.
    fn at(&self, operand: &Operand, batch: usize, group: usize) -> usize {
        offset(&self.batch_sizes, &operand.batch, batch)
            + offset(&self.group_sizes, &operand.group, group)
    }

    fn blocks(&self) -> impl Iterator<Item = Block> + '_ {
        (0..self.seq).step_by(ATTENTION_BLOCK_ROWS).map(|first| {
            let rows = ATTENTION_BLOCK_ROWS.min(self.seq - first);
            let base = first + self.offset;
            let columns = if self.causal {
                (base + rows).min(self.kv_seq)
            } else {
                self.kv_seq
            };
            Block {
                first,
                rows,
                place: [base as i32, columns as i32],
                columns,
            }
        })
    }
}

/// Divides `0..n` over up to `n_threads` threads in contiguous parts.
fn on_threads(
    pool: &WorkerPool,
    n_threads: usize,
    n: usize,
    body: &(dyn Fn(usize, std::ops::Range<usize>) + Sync),
) -> Result<()> {
    let n_threads = n_threads.min(pool.n_threads()).min(n.max(1));
    if n_threads == 0 {
        return Err(Error::Internal("attention was given no scratch".into()));
    }
    pool.run(n_threads, &|thread| {
        body(thread, n * thread / n_threads..n * (thread + 1) / n_threads);
    })
}

/// # Safety
/// The operand's rows and columns are valid for writes.
unsafe fn clear(base: *mut f32, at: &Operand, rows: usize, columns: usize) {
    for row in 0..rows {
        for column in 0..columns {
            // SAFETY: both indices are below the operand's sizes.
            unsafe { *base.add(row * at.row + column * at.column) = 0.0 };
        }
    }
}

fn count(sizes: &[usize]) -> usize {
    sizes.iter().product()
}

/// Offset of the `flat`-th combination of indices, the last one fastest.
fn offset(sizes: &[usize], strides: &[usize], flat: usize) -> usize {
    let mut rest = flat;
    let mut offset = 0;
    for (size, stride) in sizes.iter().zip(strides).rev() {
        offset += rest % size * stride;
        rest /= size;
    }
    offset
}
