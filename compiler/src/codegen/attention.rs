//! Softmax kernels of blockwise attention: what stands between the products of a block.
//!
//! Enters: the dims of an attention op and the types of its queries and keys. Leaves: the kernel
//! that the runtime calls on the scores of one block of queries.
//!
//! The runtime walks, for each batch entry and each head of q, over blocks of
//! [`ATTENTION_BLOCK_ROWS`] positions of `seq`. A block's scores are a matrix
//! `[rows, kv_len]`, dense, of plain products q·kᵀ: the kernels apply the scale. Row `r` of a
//! block that starts at position `p` of the rank's queries sees the keys `0 ..= base + r`, where
//! `base = p + dims.offset`, if the op is causal, else all `kv_len` keys; a visible count outside
//! `1 ..= kv_len` is clamped into it. The last block calls the kernel with fewer rows.
//!
//! Forward, `void softmax(args, 0, rows)`:
//! - `args[0]` scores `f32[rows, kv_len]`: in: products; out: probabilities, 0 where not visible;
//! - `args[1]` lse, `f32`: the address of the block's first value; row `r` is written
//!   `r · stride` elements on, the stride being that of `seq` in the lse tensor;
//! - `args[2]` `i32[2]`: `base`, and the number of leading columns to write (`extent`, at least the
//!   largest visible count of the block; the product with v needs no more);
//! - `args[3]` `i32[rows]`, where queries bring counts of their own: the keys that each of them sees.
//!
//! Gradient, `void softmax_grad(args, 0, rows)`:
//! - `args[0]` scores, as above; out: the probabilities P;
//! - `args[1]` dP = do·vᵀ, `f32[rows, kv_len]`; out: dS = scale · P ∘ (dP − D), the gradient of the
//!   plain products, 0 where not visible;
//! - `args[2]` lse as above, read;
//! - `args[3]` D, `f32[rows]`, dense: Σ o ∘ do of each query;
//! - `args[4]` `i32[2]` as above.
//!
//! Only the columns below the visible count of a row need valid products on entry.
//! Invariant: rows are independent, so a block may be split over threads.
//!
//! Source: Dao 2023, "FlashAttention-2", algorithms 1 and 2, without the split over keys.

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{ATTENTION_BLOCK_ROWS, AttentionDims};

use super::kernel::{
    Access, BinaryOp, Elem, Kernel, KernelBuilder, KernelError, Mutability, ReduceKind, UnaryOp,
    Val,
};

/// Which keys a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sight {
    /// As the dims say.
    ByPlace,
    /// As many as a further argument says of each row.
    Counted,
}

/// The forward kernel; `lse` is the type of the log-sum-exp result.
///
/// # Errors
/// `Internal` if the dims do not fit the types.
pub fn attention_softmax(
    dims: &AttentionDims,
    k: &TensorType,
    lse: &TensorType,
    sight: Sight,
) -> Result<Kernel, KernelError> {
    let kv_len = size_of(k, &dims.kv_seq)?;
    let mut b = KernelBuilder::new("attention_softmax", &[ATTENTION_BLOCK_ROWS], kv_len);
    let scores_arg = b.arg(Elem::F32, Mutability::ReadWrite);
    let lse_arg = b.arg(Elem::F32, Mutability::Write);
    let place_arg = b.arg(Elem::I32, Mutability::Read);
    let seen = match sight {
        Sight::ByPlace => None,
        Sight::Counted => {
            let seen_arg = b.arg(Elem::I32, Mutability::Read);
            let access = b.per_row(seen_arg);
            Some(b.load(access))
        }
    };
    limit_lanes(&mut b, dims, place_arg, seen, kv_len);
    let access = b.dense(scores_arg);
    let product = b.load(access.clone());
    let score = b.scale(product, dims.scale.0 as f32);
    let (max, exp, sum) = softmax_parts(&mut b, score);
    let one = b.f32(1.0);
    let inverse = b.div(one, sum);
    let probability = b.mul(exp, inverse);
    b.store(access, probability);
    let log = b.unary(UnaryOp::Log, sum);
    let value = b.add(max, log);
    let access = lse_access(&b, dims, lse_arg, lse)?;
    b.store(access, value);
    b.finish_hashed()
}

/// The gradient's kernel; `lse` is the type of the log-sum-exp input.
///
/// # Errors
/// `Internal` if the dims do not fit the types.
pub fn attention_softmax_grad(
    dims: &AttentionDims,
    k: &TensorType,
    lse: &TensorType,
) -> Result<Kernel, KernelError> {
    let kv_len = size_of(k, &dims.kv_seq)?;
    let mut b = KernelBuilder::new("attention_softmax_grad", &[ATTENTION_BLOCK_ROWS], kv_len);
    let scores_arg = b.arg(Elem::F32, Mutability::ReadWrite);
    let dp_arg = b.arg(Elem::F32, Mutability::ReadWrite);
    let lse_arg = b.arg(Elem::F32, Mutability::Read);
    let d_arg = b.arg(Elem::F32, Mutability::Read);
    let place_arg = b.arg(Elem::I32, Mutability::Read);
    limit_lanes(&mut b, dims, place_arg, None, kv_len);
    let scale = b.f32(dims.scale.0 as f32);
    let access = lse_access(&b, dims, lse_arg, lse)?;
    let lse = b.load(access);
    let access = b.per_row(d_arg);
    let d = b.load(access);
    let scores = b.dense(scores_arg);
    let product = b.load(scores.clone());
    let minus_lse = b.unary(UnaryOp::Neg, lse);
    let exponent = b.fma(product, scale, minus_lse);
    let p = b.exp(exponent);
    let dp_access = b.dense(dp_arg);
    let dp = b.load(dp_access.clone());
    let centered = b.sub(dp, d);
    let scaled = b.mul(p, scale);
    let ds = b.mul(scaled, centered);
    b.store(scores, p);
    b.store(dp_access, ds);
    b.finish_hashed()
}

/// `(max, exp(x - max), Σ exp(x - max))` of a lane value; a row of −∞ alone has the maximum 0.
pub(super) fn softmax_parts(b: &mut KernelBuilder, x: Val) -> (Val, Val, Val) {
    let max = b.reduce(ReduceKind::Max, x);
    let lowest = b.f32(f32::MIN);
    let zero = b.f32(0.0);
    let is_finite = b.compare(super::kernel::Predicate::Ge, max, lowest);
    let max = b.select(is_finite, max, zero);
    let centered = b.sub(x, max);
    let exp = b.exp(centered);
    let sum = b.reduce(ReduceKind::Sum, exp);
    (max, exp, sum)
}

fn limit_lanes(
    b: &mut KernelBuilder,
    dims: &AttentionDims,
    place: super::kernel::ArgId,
    seen: Option<Val>,
    kv_len: usize,
) {
    let access = b.single(place, 1);
    let extent = b.load(access);
    let last = b.i32(kv_len as i32);
    let extent = b.binary(BinaryOp::Min, extent, last);
    let visible = if let Some(seen) = seen {
        let one = b.i32(1);
        let seen = b.binary(BinaryOp::Min, seen, last);
        b.binary(BinaryOp::Max, seen, one)
    } else if dims.causal {
        let access = b.single(place, 0);
        let base = b.load(access);
        let row = b.row_index(0);
        let one = b.i32(1);
        let position = b.add(base, row);
        let count = b.add(position, one);
        let count = b.binary(BinaryOp::Min, count, last);
        b.binary(BinaryOp::Max, count, one)
    } else {
        last
    };
    b.set_limit(visible, extent);
}

fn lse_access(
    b: &KernelBuilder,
    dims: &AttentionDims,
    arg: super::kernel::ArgId,
    lse: &TensorType,
) -> Result<Access, KernelError> {
    let position = lse
        .position(&dims.seq)
        .ok_or_else(|| KernelError::Internal {
            kernel: "attention_softmax".to_string(),
            message: format!("the log-sum-exp {lse} has no dim `{}`", dims.seq),
        })?;
    let mut access = b.single(arg, 0);
    access.outer = vec![lse.strides()[position] as i64];
    Ok(access)
}

fn size_of(ty: &TensorType, dim: &Dim) -> Result<usize, KernelError> {
    ty.size_of(dim).ok_or_else(|| KernelError::Internal {
        kernel: "attention_softmax".to_string(),
        message: format!("{ty} has no dim `{dim}`"),
    })
}
