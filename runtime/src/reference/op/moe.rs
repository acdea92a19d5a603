//! Routing of tokens to experts.
//!
//! Walks the assignments `[b.., seq, choice]`; an assignment whose slot is negative was dropped, and
//! one whose expert is outside `[offset, offset + n_experts)` belongs to another rank.

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{MoeDims, MoeMove, MoePlaces, OpKind};

use super::super::value::{along, for_each_offset, sizes, strides_over};
use super::super::{ReferenceError, Result, Value};
use super::index::local_index;

pub(super) fn slots(
    seq: &Dim,
    choice: &Dim,
    n_experts: usize,
    capacity: usize,
    expert: &Value,
) -> Value {
    let ty = expert.ty();
    let batch: Vec<(Dim, usize)> = ty
        .shape
        .iter()
        .filter(|(dim, _)| dim != seq && dim != choice)
        .cloned()
        .collect();
    let batch_sizes: Vec<usize> = batch.iter().map(|(_, size)| *size).collect();
    let batch_strides = strides_over(ty, batch.iter().map(|(dim, _)| dim));
    let ((n_seq, seq_stride), (n_choices, choice_stride)) = (along(ty, seq), along(ty, choice));
    let mut result = Value::full(ty.clone(), -1.0);
    for_each_offset(&batch_sizes, [&batch_strides], |[base]| {
        let mut n_assigned = vec![0; n_experts];
        for token in 0..n_seq {
            for which in 0..n_choices {
                let at = base + token * seq_stride + which * choice_stride;
                let Some(expert) = local_index(expert.data()[at], 0, n_experts) else {
                    continue;
                };
                if n_assigned[expert] < capacity {
                    result.data_mut()[at] = n_assigned[expert] as f64;
                }
                n_assigned[expert] += 1;
            }
        }
    });
    result
}

/// The replica of every assignment: `turns[expert, (first + slot) mod turns]`, where `first` is the
/// token that took the expert's slot 0 in the same group.
pub(super) fn places(dims: &MoePlaces, expert: &Value, slot: &Value, turns: &Value) -> Value {
    let ty = expert.ty();
    let batch: Vec<(Dim, usize)> = ty
        .shape
        .iter()
        .filter(|(dim, _)| *dim != dims.seq && *dim != dims.choice)
        .cloned()
        .collect();
    let batch_sizes: Vec<usize> = batch.iter().map(|(_, size)| *size).collect();
    let names = || batch.iter().map(|(dim, _)| dim);
    let strides = [strides_over(ty, names()), strides_over(slot.ty(), names())];
    let strides_of = |ty: &TensorType| [along(ty, &dims.seq).1, along(ty, &dims.choice).1];
    let (here, there) = (strides_of(ty), strides_of(slot.ty()));
    let (n_seq, n_choices) = (along(ty, &dims.seq).0, along(ty, &dims.choice).0);
    let (n_experts, expert_stride) = along(turns.ty(), &dims.expert);
    let (n_turns, turn_stride) = along(turns.ty(), &dims.turn);
    let mut result = Value::full(ty.clone(), -1.0);
    for_each_offset(&batch_sizes, [&strides[0], &strides[1]], |[base, slots]| {
        let mut first = vec![0; n_experts];
        for token in 0..n_seq {
            for choice in 0..n_choices {
                let at = base + token * here[0] + choice * here[1];
                let rank = slot.data()[slots + token * there[0] + choice * there[1]];
                let Some(expert) = local_index(expert.data()[at], 0, n_experts) else {
                    continue;
                };
                if rank < 0.0 {
                    continue;
                }
                if rank == 0.0 {
                    first[expert] = token;
                }
                let turn = (first[expert] + rank as usize) % n_turns;
                let place = turns.data()[expert * expert_stride + turn * turn_stride];
                result.data_mut()[at] = place;
            }
        }
    });
    result
}

/// An assignment that lands on this rank.
struct Assignment {
    /// Offset of its token's first feature.
    token: usize,
    /// Offset of its slot's first feature.
    slot: usize,
    /// Offset in the assignment tensors.
    at: usize,
}

/// The assignments that land in `slots_ty` `[expert, b.., slot, ..]`, with their tokens in
/// `tokens_ty` `[b.., seq, ..]`.
fn assignments(
    dims: &MoeDims,
    expert: &Value,
    slot: &Value,
    tokens_ty: &TensorType,
    slots_ty: &TensorType,
) -> Vec<Assignment> {
    let (n_experts, expert_stride) = along(slots_ty, &dims.expert);
    let (capacity, slot_stride) = along(slots_ty, &dims.slot);
    let mut landed = Vec::new();
    for_each_offset(
        &sizes(expert.ty()),
        [
            &expert.ty().strides(),
            &strides_over(tokens_ty, expert.ty().dims()),
            &strides_over(slots_ty, expert.ty().dims()),
        ],
        |[at, token, base]| {
            let expert_idx = local_index(expert.data()[at], dims.offset, n_experts);
            let slot_idx = local_index(slot.data()[at], 0, capacity);
            if let (Some(expert_idx), Some(slot_idx)) = (expert_idx, slot_idx) {
                landed.push(Assignment {
                    token,
                    slot: base + expert_idx * expert_stride + slot_idx * slot_stride,
                    at,
                });
            }
        },
    );
    landed
}

/// For each feature: its offset in both tensors.
fn features(dims: &MoeDims, expert: &Value, a: &TensorType, b: &TensorType) -> Vec<[usize; 2]> {
    let shape: Vec<&(Dim, usize)> = a
        .shape
        .iter()
        .filter(|(dim, _)| !expert.ty().has(dim) && *dim != dims.expert && *dim != dims.slot)
        .collect();
    let sizes: Vec<usize> = shape.iter().map(|(_, size)| *size).collect();
    let names = || shape.iter().map(|(dim, _)| dim);
    let mut offsets = Vec::new();
    for_each_offset(
        &sizes,
        [&strides_over(a, names()), &strides_over(b, names())],
        |both| offsets.push(both),
    );
    offsets
}

pub(super) fn dispatch(
    dims: &MoeDims,
    x: &Value,
    expert: &Value,
    slot: &Value,
    gate: Option<&Value>,
    ty: TensorType,
) -> Value {
    let features = features(dims, expert, x.ty(), &ty);
    let landed = assignments(dims, expert, slot, x.ty(), &ty);
    let mut result = Value::full(ty, 0.0);
    for assignment in landed {
        let gate = gate.map_or(1.0, |gate| gate.data()[assignment.at]);
        for [from, to] in &features {
            result.data_mut()[assignment.slot + to] += gate * x.data()[assignment.token + from];
        }
    }
    result
}

pub(super) fn combine(
    dims: &MoeDims,
    y: &Value,
    expert: &Value,
    slot: &Value,
    gate: Option<&Value>,
    ty: TensorType,
) -> Value {
    let features = features(dims, expert, y.ty(), &ty);
    let landed = assignments(dims, expert, slot, &ty, y.ty());
    let mut result = Value::full(ty, 0.0);
    for assignment in landed {
        let gate = gate.map_or(1.0, |gate| gate.data()[assignment.at]);
        for [from, to] in &features {
            result.data_mut()[assignment.token + to] += gate * y.data()[assignment.slot + from];
        }
    }
    result
}

pub(super) fn gate_grad(
    dims: &MoeDims,
    y: &Value,
    dout: &Value,
    expert: &Value,
    slot: &Value,
    ty: TensorType,
) -> Value {
    let features = features(dims, expert, y.ty(), dout.ty());
    let mut dgate = Value::full(ty, 0.0);
    for assignment in assignments(dims, expert, slot, dout.ty(), y.ty()) {
        let sum: f64 = features
            .iter()
            .map(|[in_y, in_dout]| {
                y.data()[assignment.slot + in_y] * dout.data()[assignment.token + in_dout]
            })
            .sum();
        dgate.data_mut()[assignment.at] = sum;
    }
    dgate
}

pub(super) fn counts(dims: &MoeDims, expert: &Value, slot: &Value, ty: TensorType) -> Value {
    let (n_experts, expert_stride) = along(&ty, &dims.expert);
    let group_strides = strides_over(&ty, expert.ty().dims());
    let mut counts = Value::full(ty, 0.0);
    for_each_offset(
        &sizes(expert.ty()),
        [&expert.ty().strides(), &group_strides],
        |[at, group]| {
            let expert_idx = local_index(expert.data()[at], dims.offset, n_experts);
            let slot_idx = local_index(slot.data()[at], 0, dims.capacity);
            if let (Some(expert_idx), Some(_)) = (expert_idx, slot_idx) {
                counts.data_mut()[group + expert_idx * expert_stride] += 1.0;
            }
        },
    );
    counts
}

/// A combination of where tokens stand, and a dispatch to where they go. `routes` are (expert, slot)
/// of both, and gates of the former.
///
/// # Errors
/// The routes are not those of a move.
pub(super) fn moved(
    moved: &MoeMove,
    y: &Value,
    routes: &[&Value],
    ty: TensorType,
) -> Result<Value> {
    let [from_expert, from_slot, expert, slot, gate @ ..] = routes else {
        return Err(ReferenceError::Internal(format!(
            "a move has {} routes",
            routes.len()
        )));
    };
    let source = MoeDims {
        choice: moved.from.clone(),
        ..moved.dims.clone()
    };
    let tokens = OpKind::MoeCombine(MoeDims {
        capacity: along(y.ty(), &source.slot).0,
        ..source.clone()
    });
    let types: Vec<&TensorType> = std::iter::once(y)
        .chain([*from_expert, *from_slot])
        .chain(gate.iter().copied())
        .map(Value::ty)
        .collect();
    let tokens_ty = tokens.infer(&types)?.swap_remove(0);
    let gate = gate.first().copied();
    let tokens = combine(&source, y, from_expert, from_slot, gate, tokens_ty);
    Ok(dispatch(&moved.dims, &tokens, expert, slot, None, ty))
}
