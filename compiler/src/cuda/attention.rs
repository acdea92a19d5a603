//! Attention and its gradient: one kernel forward, three backward.
//!
//! Enters: the dims of the op and its operands' buffers. Leaves: kernels on tensor cores where the
//! operands lie so that 16 bytes can be copied at once and the head dims are multiples of 16 up to 128
//! (those of warp groups: 64 or 128);
//! plain ones otherwise, and wherever products are wanted in f32.
//! Backward, in order: D = Σ o ∘ do, kept at the beginning of each row of dq; dk and dv; dq. Only the
//! operands are touched, no scratch is needed.
//! Invariant: blocks of keys that no query of a block sees are not read; each result is written by one
//! block, in one order.

use meshweave_dsl::device_code::KernelSource;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::TensorType;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::AttentionDims;
use meshweave_dsl::program::BufferId;

use super::contract::alignment;
use super::define::{Defines, Launch, Loop, count, place, type_name};
use super::{Buffers, CudaError, Precision, Products, TensorCores, unsupported};

const HEAD: &str = include_str!("attention_head.cu");
const PLAIN: &str = include_str!("attention_plain.cu");
const TENSOR: &str = include_str!("attention_tensor.cu");
const WARP_GROUPS: &str = concat!(include_str!("wgmma.cu"), include_str!("attention_wgmma.cu"));
/// Rows and columns of a plain kernel's tiles, and its threads.
const PLAIN_TILE: usize = 32;
/// Threads of a kernel with tiles of plain products or of warps.
const THREADS: usize = 128;
/// Rows whose D a block computes.
const DOTS_ROWS: usize = 8;
/// Greatest head dim of which the accumulators fit into registers.
const MAX_TENSOR_HEAD: usize = 128;
/// Rows that a block of two warp groups owns.
const WARP_GROUPS_OWN: usize = 128;
/// Most dynamic shared memory of a block, on an A100.
const MAX_SHARED_BYTES: usize = 163 * 1024;

/// What a kernel computes; the numbers are those of the texts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Forward = 0,
    Dots = 1,
    Keys = 2,
    Queries = 3,
}

impl Pass {
    fn name(self) -> &'static str {
        match self {
            Self::Forward => "attention",
            Self::Dots => "attention_dots",
            Self::Keys => "attention_grad_keys",
            Self::Queries => "attention_grad_queries",
        }
    }
}

/// What multiplies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cores {
    Plain,
    Tensor(TensorCores),
}

/// How an operand lies in memory, in elements.
struct Operand {
    /// Loops over what keys have too (batch, key heads), outermost first.
    batch: Vec<Loop>,
    /// Loops over what only queries have (query heads of one key head).
    group: Vec<Loop>,
    row: usize,
    column: usize,
}

/// An op over its operands.
struct Attention {
    dtype: DType,
    /// Tensor cores, where they are wanted and all operands lie so that they can be fed.
    cores: Cores,
    queries: usize,
    keys: usize,
    head: usize,
    value: usize,
    dims: AttentionDims,
    /// q, k, v, o, lse.
    operands: [Operand; 5],
}

pub(super) fn forward(
    buffers: &Buffers<'_>,
    dims: &AttentionDims,
    ids: [BufferId; 5],
    products: Products,
) -> Result<Vec<KernelSource>, CudaError> {
    let attention = Attention::new(buffers, dims, ids, &ids[..3], products)?;
    if attention.n_heads() * attention.queries * attention.value == 0 {
        return Ok(Vec::new());
    }
    Ok(vec![attention.kernel(Pass::Forward, &ids)?])
}

pub(super) fn backward(
    buffers: &Buffers<'_>,
    dims: &AttentionDims,
    [q, k, v, o, lse, d_o]: [BufferId; 6],
    [dq, dk, dv]: [BufferId; 3],
    products: Products,
) -> Result<Vec<KernelSource>, CudaError> {
    for (gradient, of) in [(d_o, o), (dq, q), (dk, k), (dv, v)] {
        let (gradient, of) = (buffers.get(gradient)?, buffers.get(of)?);
        if gradient.ty != of.ty {
            let reason = format!(
                "`{}` is {}, and what it is the gradient of {}; both must lie alike",
                gradient.name, gradient.ty, of.ty
            );
            return Err(unsupported("attention_grad", reason));
        }
    }
    let copied = [q, k, v, d_o, dq, dk, dv];
    let attention = Attention::new(buffers, dims, [q, k, v, o, lse], &copied, products)?;
    if attention.n_heads() * attention.queries * attention.keys == 0 {
        return Err(unsupported("attention_grad", "no queries or no keys"));
    }
    let q_at = &attention.operands[0];
    let strides = [&q_at.batch, &q_at.group].into_iter().flatten();
    let is_even = |stride: usize| stride.is_multiple_of(2);
    if attention.dtype == DType::Bf16
        && !(q_at.column == 1
            && attention.head >= 2
            && is_even(q_at.row)
            && strides.into_iter().all(|(_, stride)| is_even(*stride)))
    {
        let reason = "bf16 queries whose rows are not dense or begin at odd places";
        return Err(unsupported("attention_grad", reason));
    }
    Ok(vec![
        attention.kernel(Pass::Dots, &[o, d_o, dq])?,
        attention.kernel(Pass::Keys, &[q, k, v, lse, d_o, dq, dk, dv])?,
        attention.kernel(Pass::Queries, &[q, k, v, lse, d_o, dq])?,
    ])
}

impl Attention {
    /// The op over operands of these buffers; `copied` are those that tensor cores read in pieces of
    /// 16 bytes or that lie like them.
    fn new(
        buffers: &Buffers<'_>,
        dims: &AttentionDims,
        ids: [BufferId; 5],
        copied: &[BufferId],
        products: Products,
    ) -> Result<Self, CudaError> {
        let mut types = Vec::with_capacity(5);
        for id in ids {
            types.push(&buffers.get(id)?.ty);
        }
        let [q, k, v, o, lse] = [0, 1, 2, 3, 4].map(|idx| types[idx]);
        let dtype = q.dtype;
        if !matches!(dtype, DType::F32 | DType::Bf16)
            || [k, v, o].iter().any(|ty| ty.dtype != dtype)
            || lse.dtype != DType::F32
        {
            let reason = format!(
                "operands {q}, {k}, {v}, {o}, {lse}; all must be f32, or bf16 with an lse of f32"
            );
            return Err(unsupported("attention", reason));
        }
        let size = |ty: &TensorType, dim: &Dim| {
            ty.size_of(dim)
                .ok_or_else(|| CudaError::Internal(format!("attention over {ty}, without `{dim}`")))
        };
        let own = |dim: &&(Dim, usize)| ![&dims.kv_seq, &dims.head].contains(&&dim.0);
        let batch: Vec<(Dim, usize)> = k.shape.iter().filter(own).cloned().collect();
        let group: Vec<(Dim, usize)> = q
            .shape
            .iter()
            .filter(|(dim, _)| *dim != dims.seq && *dim != dims.head && !k.has(dim))
            .cloned()
            .collect();
        let stride = |ty: &TensorType, dim: &Dim| {
            ty.position(dim)
                .map(|position| ty.strides()[position])
                .ok_or_else(|| CudaError::Internal(format!("attention over {ty}, without `{dim}`")))
        };
        let operand = |ty: &TensorType, row: &Dim, column: Option<&Dim>, grouped: bool| {
            let loops = |dims: &[(Dim, usize)]| -> Result<Vec<Loop>, CudaError> {
                dims.iter()
                    .map(|(dim, n)| Ok((*n, stride(ty, dim)?)))
                    .collect()
            };
            Ok::<_, CudaError>(Operand {
                batch: loops(&batch)?,
                group: if grouped { loops(&group)? } else { Vec::new() },
                row: stride(ty, row)?,
                column: column.map_or(Ok(0), |dim| stride(ty, dim))?,
            })
        };
        let operands = [
            operand(q, &dims.seq, Some(&dims.head), true)?,
            operand(k, &dims.kv_seq, Some(&dims.head), false)?,
            operand(v, &dims.kv_seq, Some(&dims.value), false)?,
            operand(o, &dims.seq, Some(&dims.value), true)?,
            operand(lse, &dims.seq, None, true)?,
        ];
        let mut attention = Self {
            dtype,
            cores: Cores::Plain,
            queries: size(q, &dims.seq)?,
            keys: size(k, &dims.kv_seq)?,
            head: size(q, &dims.head)?,
            value: size(v, &dims.value)?,
            dims: dims.clone(),
            operands,
        };
        let mut aligned = true;
        for id in copied {
            aligned &= alignment(buffers.get(*id)?.offset) == 16;
        }
        if aligned
            && (dtype == DType::Bf16 || products.precision == Precision::Tf32)
            && attention.feeds_tensor_cores()
        {
            attention.cores = Cores::Tensor(match products.cores {
                TensorCores::WarpGroups if attention.feeds_warp_groups() => TensorCores::WarpGroups,
                _ => TensorCores::Warps,
            });
        }
        Ok(attention)
    }

    /// Whether rows are dense and begin at multiples of 16 bytes, and accumulators fit into registers.
    fn feeds_tensor_cores(&self) -> bool {
        let step = 16 / self.dtype.n_bytes();
        let fits = |n: usize| n.is_multiple_of(16) && n <= MAX_TENSOR_HEAD && n > 0;
        let lies = |operand: &Operand| {
            operand.column == 1
                && operand.row.is_multiple_of(step)
                && [&operand.batch, &operand.group]
                    .into_iter()
                    .flatten()
                    .all(|(_, stride)| stride.is_multiple_of(step))
        };
        fits(self.head) && fits(self.value) && self.operands[..4].iter().all(lies)
    }

    /// Whether rows fill lines of shared memory, and greater scores mean greater weights.
    fn feeds_warp_groups(&self) -> bool {
        let fits = |n: usize| n == 64 || n == 128;
        self.dtype == DType::Bf16 && fits(self.head) && fits(self.value) && self.dims.scale.0 > 0.0
    }

    fn n_batches(&self) -> usize {
        count(&self.operands[1].batch)
    }

    fn n_groups(&self) -> usize {
        count(&self.operands[0].group)
    }

    fn n_heads(&self) -> usize {
        self.n_batches() * self.n_groups()
    }

    fn kernel(&self, pass: Pass, args: &[BufferId]) -> Result<KernelSource, CudaError> {
        let mut defines = Defines::default();
        defines
            .set("PASS", pass as u8)
            .set("IN", type_name("attention", self.dtype)?)
            .size("GROUP", self.n_groups())
            // Compared with signed positions.
            .set("QUERIES", self.queries)
            .set("KEYS", self.keys)
            .set("HEAD", self.head)
            .set("VALUE", self.value)
            .set("CAUSAL", u8::from(self.dims.causal))
            .set("OFFSET", self.dims.offset)
            .set("SCALE", format_args!("{:?}f", self.dims.scale.0 as f32));
        for (name, operand) in ["Q", "K", "V", "O", "L"].iter().zip(&self.operands) {
            let (batch, group) = (place("b", &operand.batch), place("g", &operand.group));
            defines
                .set(
                    &format!("{name}_AT(b, g)"),
                    format_args!("({batch} + {group})"),
                )
                .set(&format!("{name}_ROW"), format_args!("{}ull", operand.row))
                .set(
                    &format!("{name}_COLUMN"),
                    format_args!("{}ull", operand.column),
                );
        }
        let (n_heads, rows) = match pass {
            Pass::Keys => (self.n_batches(), self.keys),
            _ => (self.n_heads(), self.queries),
        };
        if pass == Pass::Dots {
            let launch = Launch {
                blocks: n_heads * rows.div_ceil(DOTS_ROWS),
                threads: 32 * DOTS_ROWS,
                shared_bytes: 0,
            };
            return defines.kernel(pass.name(), &[HEAD], launch, args);
        }
        let (text, own, threads, shared_bytes) = match self.cores {
            Cores::Plain => (PLAIN, PLAIN_TILE, THREADS, self.plain_shared_bytes(pass)),
            Cores::Tensor(TensorCores::Warps) => {
                let blocking = Blocking::of(pass, self);
                defines
                    .set("MATH", if self.dtype == DType::F32 { 1 } else { 2 })
                    .set("PIECES", blocking.pieces)
                    .set("OTHER", blocking.other)
                    .set("STAGES", 2);
                let shared_bytes = blocking.shared_bytes(pass, self);
                (TENSOR, 64 * blocking.pieces, THREADS, shared_bytes)
            }
            Cores::Tensor(TensorCores::WarpGroups) => {
                let ring = Ring::of(pass, self);
                defines
                    .set("OWN", WARP_GROUPS_OWN)
                    .set("OTHER", ring.other)
                    .set("STAGES", ring.stages);
                let own = WARP_GROUPS_OWN;
                (WARP_GROUPS, own, 2 * own, ring.shared_bytes(pass, self))
            }
        };
        if shared_bytes > MAX_SHARED_BYTES {
            let reason = format!(
                "head dims {} and {} need {shared_bytes} bytes of shared memory, a block has {MAX_SHARED_BYTES}",
                self.head, self.value
            );
            return Err(unsupported("attention", reason));
        }
        let launch = Launch {
            blocks: n_heads * rows.div_ceil(own),
            threads,
            shared_bytes,
        };
        defines.kernel(pass.name(), &[HEAD, text], launch, args)
    }

    fn plain_shared_bytes(&self, pass: Pass) -> usize {
        let (heads, values, weights) = match pass {
            Pass::Forward => (2, 1, 1),
            Pass::Keys => (2, 2, 2),
            _ => (2, 2, 1),
        };
        let line = heads * (self.head + 1) + values * (self.value + 1) + weights * (PLAIN_TILE + 1);
        4 * PLAIN_TILE * line
    }
}

/// How a kernel on tensor cores divides its work: what its accumulators leave of 255 registers.
struct Blocking {
    /// Pieces of 16 rows that a warp owns; with two, each row that streams by is read half as often.
    pieces: usize,
    /// Rows that stream at a time.
    other: usize,
}

impl Blocking {
    fn of(pass: Pass, attention: &Attention) -> Self {
        let is_small = attention.head.max(attention.value) <= 64;
        let (pieces, other) = match pass {
            Pass::Forward if is_small => (2, 64),
            Pass::Forward => (2, 32),
            Pass::Queries if is_small => (2, 32),
            Pass::Queries if attention.dtype == DType::Bf16 => (2, 16),
            _ if is_small => (1, 64),
            _ if attention.dtype == DType::F32 => (1, 16),
            _ => (1, 32),
        };
        Self { pieces, other }
    }

    fn shared_bytes(&self, pass: Pass, attention: &Attention) -> usize {
        let n_bytes = attention.dtype.n_bytes();
        let pitch = |width: usize| width * n_bytes + 16;
        let (head, value) = (pitch(attention.head), pitch(attention.value));
        let own = 64 * self.pieces;
        match pass {
            Pass::Forward => own * head + self.other * (head + value),
            // Two stages, in which each streamed query has its lse and D.
            Pass::Keys => own * (head + value) + 2 * self.other * (head + value + 2 * 4),
            _ => own * (head + value) + 2 * self.other * (head + value),
        }
    }
}

/// How rows stream by warp groups: what their accumulators leave of 255 registers, and the products that
/// are under way while the next rows come.
struct Ring {
    /// Rows that stream at a time.
    other: usize,
    stages: usize,
}

impl Ring {
    fn of(pass: Pass, attention: &Attention) -> Self {
        let is_small = attention.head.max(attention.value) <= 64;
        let (other, stages) = match pass {
            // With 64 keys at a time two blocks fit on a multiprocessor.
            Pass::Forward if is_small => (64, 2),
            Pass::Forward => (128, 2),
            Pass::Keys => (64, 2),
            _ if is_small => (128, 3),
            _ => (64, 3),
        };
        Self { other, stages }
    }

    fn shared_bytes(&self, pass: Pass, attention: &Attention) -> usize {
        let (head, value) = (2 * attention.head, 2 * attention.value);
        let stage = self.other * (head + value);
        match pass {
            Pass::Forward => WARP_GROUPS_OWN * head + self.stages * stage,
            // Each streamed query has its lse and D.
            Pass::Keys => {
                WARP_GROUPS_OWN * (head + value) + self.stages * (stage + self.other * 2 * 4)
            }
            _ => WARP_GROUPS_OWN * (head + value) + self.stages * stage,
        }
    }
}
