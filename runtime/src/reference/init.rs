//! What sources hold before the first step.
//!
//! Enters: roles. Leaves: values whose elements are exactly representable in the tensor's type.
//! Invariant: an element depends on its global row-major index alone, so shards agree with wholes.

use std::collections::BTreeMap;
use std::f64::consts::TAU;

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{
    ConstInit, Graph, Init, Role, RopeScaling, RopeTable, TensorId, TensorType,
};

use super::value::{along, for_each_offset, sizes, strides_over};
use super::{ReferenceError, Result, Value};

/// A 32-bit integer hash of low bias (C. Wellons, "Prospecting for Hash Functions").
pub fn lowbias32(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// Element `index` of the uniform numbers in [−1, 1) of a stream; exact in f32.
pub fn hash_uniform(stream: u32, index: usize) -> f32 {
    (stream_hash(stream, index) >> 8) as f32 * 2.0_f32.powi(-23) - 1.0
}

fn stream_hash(stream: u32, index: usize) -> u32 {
    lowbias32((index as u32).wrapping_add(stream.wrapping_mul(0x9E37_79B9)))
}

/// The initial value of a parameter.
pub fn init_value(init: &Init, ty: &TensorType) -> Value {
    match init {
        Init::Zeros => Value::full(ty.clone(), 0.0),
        Init::Ones => Value::full(ty.clone(), 1.0),
        Init::Hash { stream, scale } => Value::from_fn(ty.clone(), |index| {
            rounded(f64::from(scale * hash_uniform(*stream, index)), ty.dtype)
        }),
    }
}

/// The value of a constant table.
///
/// # Errors
/// A rotary table is not of the shape `[position, half]`, or the counted dim is missing.
pub fn const_value(init: &ConstInit, ty: &TensorType) -> Result<Value> {
    match init {
        ConstInit::RopeCos(table) => rope_table(table, ty, f64::cos),
        ConstInit::RopeSin(table) => rope_table(table, ty, f64::sin),
        ConstInit::Fill(element) => Ok(Value::full(ty.clone(), rounded(element.0, ty.dtype))),
        ConstInit::Numbers(numbers) => {
            if numbers.len() != ty.n_elements() {
                return Err(ReferenceError::Invalid(format!(
                    "{ty} has {} elements, {} numbers are given",
                    ty.n_elements(),
                    numbers.len()
                )));
            }
            Ok(Value::from_fn(ty.clone(), |index| {
                f64::from(numbers[index])
            }))
        }
        ConstInit::Iota { dim } => {
            if !ty.has(dim) {
                return Err(ReferenceError::Invalid(format!(
                    "{ty} counts along `{dim}`, which it lacks"
                )));
            }
            let (size, stride) = along(ty, dim);
            Ok(Value::from_fn(ty.clone(), |index| {
                rounded((index / stride % size) as f64, ty.dtype)
            }))
        }
    }
}

/// What a source of a global graph holds before the first step; `None` for inputs and results.
///
/// # Errors
/// Those of [`const_value`].
pub fn initial_value(role: &Role, ty: &TensorType) -> Result<Option<Value>> {
    match role {
        Role::Param(init) => Ok(Some(init_value(init, ty))),
        Role::State { .. } => Ok(Some(Value::full(ty.clone(), 0.0))),
        Role::Const(init) => const_value(init, ty).map(Some),
        Role::Input | Role::Temp => Ok(None),
    }
}

/// The rotary frequencies of a table: one for each pair of elements.
///
/// Sources: Llama 3.1 as `transformers` computes it (`_compute_llama3_parameters`); YaRN: arXiv
/// 2309.00071, equations 17 to 23, with the bounds of the ramp rounded outwards to whole dims.
pub fn inverse_frequencies(table: &RopeTable) -> Vec<f64> {
    let width = table.rotary_dim as f64;
    let plain = |pair: usize| table.theta.powf(-2.0 * pair as f64 / width);
    (0..table.rotary_dim / 2)
        .map(|pair| {
            let frequency = plain(pair);
            match &table.scaling {
                RopeScaling::None => frequency,
                RopeScaling::Linear { factor } => frequency / factor,
                RopeScaling::Llama3 {
                    factor,
                    low_freq_factor,
                    high_freq_factor,
                    original_positions,
                } => {
                    let turns = *original_positions as f64 * frequency / TAU;
                    let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor))
                        .clamp(0.0, 1.0);
                    frequency * (kept + (1.0 - kept) / factor)
                }
                RopeScaling::Yarn {
                    factor,
                    beta_fast,
                    beta_slow,
                    original_positions,
                    ..
                } => {
                    // The pair that turns `rotations` times over the original context.
                    let pair_of = |rotations: f64| {
                        width * (*original_positions as f64 / (rotations * TAU)).ln()
                            / (2.0 * table.theta.ln())
                    };
                    let low = pair_of(*beta_fast).floor().max(0.0);
                    let high = pair_of(*beta_slow).ceil().min(width - 1.0);
                    let span = if high == low { 0.001 } else { high - low };
                    let interpolated = ((pair as f64 - low) / span).clamp(0.0, 1.0);
                    frequency * (1.0 - interpolated + interpolated / factor)
                }
            }
        })
        .collect()
}

fn rope_table(table: &RopeTable, ty: &TensorType, function: fn(f64) -> f64) -> Result<Value> {
    let half = match ty.shape.as_slice() {
        [_, (_, half)] if 2 * half == table.rotary_dim => *half,
        _ => {
            return Err(ReferenceError::Invalid(format!(
                "a rotary table over {} elements is [position, half:{}], not {ty}",
                table.rotary_dim,
                table.rotary_dim / 2
            )));
        }
    };
    let amplitude = match &table.scaling {
        RopeScaling::Yarn {
            attention_factor, ..
        } => *attention_factor,
        RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => 1.0,
    };
    let frequencies = inverse_frequencies(table);
    Ok(Value::from_fn(ty.clone(), |index| {
        let angle = (index / half) as f64 * frequencies[index % half];
        rounded(amplitude * function(angle), ty.dtype)
    }))
}

/// The golden batch `[batch, seq + 1]` of hashed tokens: `(tokens, targets)`, the targets being the
/// tokens shifted by one. Both row-major `[batch, seq]`.
pub fn golden_tokens(n_batch: usize, n_seq: usize, n_vocab: usize) -> (Vec<i32>, Vec<i32>) {
    /// The stream of the golden model's tokens.
    const TOKENS_STREAM: u32 = 3;
    let token = |row: usize, column: usize| {
        let hash = stream_hash(TOKENS_STREAM, row * (n_seq + 1) + column);
        (hash as usize % n_vocab.max(1)) as i32
    };
    let positions = || (0..n_batch).flat_map(|row| (0..n_seq).map(move |column| (row, column)));
    (
        positions()
            .map(|(row, column)| token(row, column))
            .collect(),
        positions()
            .map(|(row, column)| token(row, column + 1))
            .collect(),
    )
}

/// The golden batch as values of the graph's inputs `tokens` and `targets`, of any memory order.
///
/// # Errors
/// An input of that name is not `i32[batch, seq]`.
pub fn golden_inputs(graph: &Graph, n_vocab: usize) -> Result<BTreeMap<TensorId, Value>> {
    let (batch, seq) = ("batch".into(), "seq".into());
    let mut inputs = BTreeMap::new();
    for (name, which) in [("tokens", 0), ("targets", 1)] {
        let Some(id) = graph.find(name) else { continue };
        let ty = graph.ty(id);
        let (Some(n_batch), Some(n_seq), 2, DType::I32) = (
            ty.size_of(&batch),
            ty.size_of(&seq),
            ty.shape.len(),
            ty.dtype,
        ) else {
            return Err(ReferenceError::Invalid(format!(
                "the golden batch is i32[batch, seq], `{name}` is {ty}"
            )));
        };
        let (tokens, targets) = golden_tokens(n_batch, n_seq, n_vocab);
        let source = if which == 0 { tokens } else { targets };
        let golden_ty = TensorType::new(DType::I32, [("batch", n_batch), ("seq", n_seq)]);
        let mut data = Vec::with_capacity(source.len());
        for_each_offset(
            &sizes(ty),
            [&strides_over(&golden_ty, ty.dims())],
            |[offset]| data.push(f64::from(source[offset])),
        );
        inputs.insert(id, Value::new(ty.clone(), data)?);
    }
    Ok(inputs)
}

/// The nearest number of the type (ties to even).
pub(super) fn rounded(x: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F32 => f64::from(x as f32),
        DType::Bf16 => to_significand(x, 8, -126, f64::from_bits(0x47EF_E000_0000_0000)),
        DType::F16 => to_significand(x, 11, -14, 65504.0),
        DType::I32 => x.round_ties_even(),
    }
}

/// Rounds to `n_bits` of significand, subnormal below 2^`min_exponent`, infinite above `max`.
fn to_significand(x: f64, n_bits: i32, min_exponent: i32, max: f64) -> f64 {
    if x == 0.0 || !x.is_finite() {
        return x;
    }
    let exponent = ((x.to_bits() >> 52) & 0x7FF) as i32 - 1023;
    let ulp = 2.0_f64.powi(exponent.max(min_exponent) - (n_bits - 1));
    let rounded = (x / ulp).round_ties_even() * ulp;
    if rounded.abs() > max {
        f64::INFINITY.copysign(x)
    } else {
        rounded
    }
}
