//! Routing of tokens to experts.
//!
//! In: assignments `[b.., seq, choice]` to experts and slots. Out: tokens moved between their places
//! and their experts' slots. An assignment whose slot is negative was dropped; one whose expert is
//! outside of this rank's belongs to another rank.
//! Invariant: assignments are walked in (token, choice) order, so sums have one order.

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::TensorType;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{MoeDims, OpKind};

use super::{local_index, offsets, size, stride, without};
use crate::error::{Error, Result};

#[derive(Debug, Clone)]
pub(super) enum Moe {
    Slots(Slots),
    Places(Places),
    Dispatch(Routes),
    Combine(Routes),
    GateGrad(Routes),
    Counts(Routes),
}

/// `(expert) -> slot`.
#[derive(Debug, Clone)]
pub(super) struct Slots {
    /// First assignments of each group in expert and slot.
    groups: Vec<[usize; 2]>,
    /// Offsets of a group's assignments in expert and slot, in (token, choice) order.
    assignments: Vec<[usize; 2]>,
    n_experts: usize,
    capacity: usize,
}

/// `(expert, slot, turns) -> place`.
#[derive(Debug, Clone)]
pub(super) struct Places {
    /// First assignments of each group in expert, slot and place.
    groups: Vec<[usize; 3]>,
    /// Offsets of a group's assignments in expert, slot and place, in (token, choice) order.
    assignments: Vec<[usize; 3]>,
    n_choices: usize,
    n_experts: usize,
    expert_stride: usize,
    n_turns: usize,
    turn_stride: usize,
}

/// The places of every assignment.
#[derive(Debug, Clone)]
pub(super) struct Routes {
    /// Offsets in expert, slot, gate, tokens, and in the slots' tensor before expert and slot.
    assignments: Vec<[usize; 5]>,
    /// Offsets of a token's features in tokens and slots' tensor.
    features: Features,
    first_expert: usize,
    n_experts: usize,
    expert_stride: usize,
    capacity: usize,
    slot_stride: usize,
    n_results: usize,
    rest: Rest,
    /// Features are indices, which are added up as such.
    is_index: bool,
}

/// What becomes of slots that no token takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rest {
    Zero,
    Left,
}

#[derive(Debug, Clone)]
enum Features {
    /// So many elements, next to each other in both.
    Dense(usize),
    /// Offsets in tokens and slots' tensor.
    Strided(Vec<[usize; 2]>),
}

impl Moe {
    pub(super) fn new(op: &OpKind, inputs: &[&TensorType], results: &[&TensorType]) -> Result<Moe> {
        match (op, inputs, results) {
            (
                OpKind::MoeSlots {
                    seq,
                    choice,
                    n_experts,
                    capacity,
                },
                [expert],
                [slot],
            ) => {
                let group = without(expert, &[seq, choice]);
                let within = [
                    (seq.clone(), size(expert, seq)?),
                    (choice.clone(), size(expert, choice)?),
                ];
                Ok(Moe::Slots(Slots {
                    groups: offsets(&group, [expert, slot]),
                    assignments: offsets(&within, [expert, slot]),
                    n_experts: *n_experts,
                    capacity: *capacity,
                }))
            }
            (OpKind::MoePlaces(dims), [expert, slot, turns], [place]) => {
                let group = without(expert, &[&dims.seq, &dims.choice]);
                let n_choices = size(expert, &dims.choice)?;
                let within = [
                    (dims.seq.clone(), size(expert, &dims.seq)?),
                    (dims.choice.clone(), n_choices),
                ];
                Ok(Moe::Places(Places {
                    groups: offsets(&group, [expert, slot, place]),
                    assignments: offsets(&within, [expert, slot, place]),
                    n_choices,
                    n_experts: size(turns, &dims.expert)?,
                    expert_stride: stride(turns, &dims.expert)?,
                    n_turns: size(turns, &dims.turn)?,
                    turn_stride: stride(turns, &dims.turn)?,
                }))
            }
            (OpKind::MoeDispatch(dims), [x, expert, slot, gate @ ..], [y]) => {
                Routes::new(dims, expert, slot, gate.first(), x, y, y).map(Moe::Dispatch)
            }
            (OpKind::MoeCombine(dims), [y, expert, slot, gate @ ..], [x]) => {
                Routes::new(dims, expert, slot, gate.first(), x, y, x).map(Moe::Combine)
            }
            (OpKind::MoeGateGrad(dims), [y, dout, expert, slot], [dgate]) => {
                Routes::new(dims, expert, slot, Some(dgate), dout, y, dgate).map(Moe::GateGrad)
            }
            (OpKind::MoeCounts(dims), [expert, slot], [counts]) => {
                Routes::counting(dims, expert, slot, counts).map(Moe::Counts)
            }
            _ => Err(Error::Invalid(format!(
                "damaged program: {} of {} inputs and {} results; compile again",
                op.name(),
                inputs.len(),
                results.len()
            ))),
        }
    }

    /// The same, leaving slots that no token takes as they are.
    pub(super) fn leaving_rest(self) -> Moe {
        match self {
            Moe::Dispatch(routes) => Moe::Dispatch(Routes {
                rest: Rest::Left,
                ..routes
            }),
            other => other,
        }
    }

    /// # Safety
    /// As for [`super::Routine::run`].
    pub(super) unsafe fn run(&self, inputs: &[*const u32], results: &[*mut u32]) {
        // SAFETY: operands are in the order that `new` matched; see each routine.
        unsafe {
            match self {
                Moe::Slots(slots) => slots.run(inputs[0].cast(), results[0].cast()),
                Moe::Places(places) => {
                    let routes = [inputs[0], inputs[1], inputs[2]].map(|one| one.cast());
                    places.run(routes, results[0].cast());
                }
                Moe::Dispatch(routes) => {
                    let gate = inputs.get(3).map(|gate| gate.cast());
                    routes.dispatch(
                        inputs[0].cast(),
                        [inputs[1], inputs[2]],
                        gate,
                        results[0].cast(),
                    );
                }
                Moe::Combine(routes) => {
                    let gate = inputs.get(3).map(|gate| gate.cast());
                    routes.combine(
                        inputs[0].cast(),
                        [inputs[1], inputs[2]],
                        gate,
                        results[0].cast(),
                    );
                }
                Moe::GateGrad(routes) => {
                    let (y, dout) = (inputs[0].cast(), inputs[1].cast());
                    routes.gate_grad(y, dout, [inputs[2], inputs[3]], results[0].cast());
                }
                Moe::Counts(routes) => routes.count([inputs[0], inputs[1]], results[0].cast()),
            }
        }
    }
}

impl Slots {
    /// # Safety
    /// As for [`super::Routine::run`].
    unsafe fn run(&self, expert: *const i32, slot: *mut i32) {
        let mut n_assigned = vec![0usize; self.n_experts];
        for [expert_base, slot_base] in &self.groups {
            n_assigned.fill(0);
            for [at_expert, at_slot] in &self.assignments {
                // SAFETY: an assignment of the group.
                let expert = unsafe { *expert.add(expert_base + at_expert) };
                let mut rank = -1;
                if let Some(expert) = local_index(expert, 0, self.n_experts) {
                    if n_assigned[expert] < self.capacity {
                        rank = n_assigned[expert] as i32;
                    }
                    n_assigned[expert] += 1;
                }
                // SAFETY: as above.
                unsafe { *slot.add(slot_base + at_slot) = rank };
            }
        }
    }
}

impl Places {
    /// # Safety
    /// As for [`super::Routine::run`].
    unsafe fn run(&self, [expert, slot, turns]: [*const i32; 3], place: *mut i32) {
        let mut first = vec![0usize; self.n_experts];
        for [expert_base, slot_base, place_base] in &self.groups {
            for (idx, [at_expert, at_slot, at_place]) in self.assignments.iter().enumerate() {
                // SAFETY: an assignment of the group.
                let (expert, rank) = unsafe {
                    (
                        *expert.add(expert_base + at_expert),
                        *slot.add(slot_base + at_slot),
                    )
                };
                let expert = local_index(expert, 0, self.n_experts);
                let mut found = -1;
                if let (Some(expert), Ok(rank)) = (expert, usize::try_from(rank)) {
                    if rank == 0 {
                        first[expert] = idx / self.n_choices;
                    }
                    let turn = (first[expert] + rank) % self.n_turns;
                    let at = expert * self.expert_stride + turn * self.turn_stride;
                    // SAFETY: an expert and a turn of the table.
                    found = unsafe { *turns.add(at) };
                }
                // SAFETY: as above.
                unsafe { *place.add(place_base + at_place) = found };
            }
        }
    }
}

impl Routes {
    fn new(
        dims: &MoeDims,
        expert: &TensorType,
        slot: &TensorType,
        gate: Option<&&TensorType>,
        tokens: &TensorType,
        slots: &TensorType,
        result: &TensorType,
    ) -> Result<Routes> {
        let gate = gate.copied().unwrap_or(expert);
        // Tokens in the order of the assignments, choices fastest.
        let mut walk = without(expert, &[&dims.seq, &dims.choice]);
        for dim in [&dims.seq, &dims.choice] {
            walk.push((dim.clone(), size(expert, dim)?));
        }
        let width: Vec<(Dim, usize)> = tokens
            .shape
            .iter()
            .filter(|(dim, _)| !expert.has(dim))
            .cloned()
            .collect();
        let features = offsets(&width, [tokens, slots]);
        let dense = features.iter().enumerate().all(|(i, at)| *at == [i, i]);
        Ok(Routes {
            assignments: offsets(&walk, [expert, slot, gate, tokens, slots]),
            features: if dense {
                Features::Dense(features.len())
            } else {
                Features::Strided(features)
            },
            first_expert: dims.offset,
            n_experts: size(slots, &dims.expert)?,
            expert_stride: stride(slots, &dims.expert)?,
            capacity: size(slots, &dims.slot)?,
            slot_stride: stride(slots, &dims.slot)?,
            n_results: result.n_elements(),
            rest: Rest::Zero,
            is_index: tokens.dtype == DType::I32,
        })
    }

    /// Routes into counts `[expert, b..]`, where a slot is no place of its own.
    fn counting(
        dims: &MoeDims,
        expert: &TensorType,
        slot: &TensorType,
        counts: &TensorType,
    ) -> Result<Routes> {
        let walk = without(expert, &[]);
        Ok(Routes {
            assignments: offsets(&walk, [expert, slot, expert, expert, counts]),
            features: Features::Dense(1),
            first_expert: dims.offset,
            n_experts: size(counts, &dims.expert)?,
            expert_stride: stride(counts, &dims.expert)?,
            capacity: dims.capacity,
            slot_stride: 0,
            n_results: counts.n_elements(),
            rest: Rest::Zero,
            is_index: true,
        })
    }

    /// The assignments that land on this rank: offsets of gate, token and slot.
    ///
    /// # Safety
    /// The addresses are those of the expert and slot tensors.
    unsafe fn landed(&self, [expert, slot]: [*const u32; 2]) -> impl Iterator<Item = [usize; 3]> {
        let (expert, slot) = (expert.cast::<i32>(), slot.cast::<i32>());
        self.assignments
            .iter()
            .filter_map(move |[at_expert, at_slot, gate, token, base]| {
                // SAFETY: offsets of assignments in their tensors.
                let (expert, slot) = unsafe { (*expert.add(*at_expert), *slot.add(*at_slot)) };
                let expert = local_index(expert, self.first_expert, self.n_experts)?;
                let slot = local_index(slot, 0, self.capacity)?;
                Some([
                    *gate,
                    *token,
                    base + expert * self.expert_stride + slot * self.slot_stride,
                ])
            })
    }

    /// # Safety
    /// As for [`super::Routine::run`].
    unsafe fn dispatch(
        &self,
        x: *const f32,
        routing: [*const u32; 2],
        gate: Option<*const f32>,
        y: *mut f32,
    ) {
        // SAFETY: indices were checked by `landed`; features lie inside of both tensors.
        unsafe {
            if self.rest == Rest::Zero {
                std::slice::from_raw_parts_mut(y, self.n_results).fill(0.0);
            }
            for [gate_at, token, slot] in self.landed(routing) {
                let factor = gate.map_or(1.0, |gate| *gate.add(gate_at));
                if self.rest == Rest::Left {
                    self.clear(y.add(slot));
                }
                self.add_scaled(factor, x.add(token), y.add(slot), |[token, slot]| {
                    (token, slot)
                });
            }
        }
    }

    /// # Safety
    /// As for [`super::Routine::run`].
    unsafe fn combine(
        &self,
        y: *const f32,
        routing: [*const u32; 2],
        gate: Option<*const f32>,
        x: *mut f32,
    ) {
        // SAFETY: as in `dispatch`.
        unsafe {
            std::slice::from_raw_parts_mut(x, self.n_results).fill(0.0);
            for [gate_at, token, slot] in self.landed(routing) {
                let factor = gate.map_or(1.0, |gate| *gate.add(gate_at));
                self.add_scaled(factor, y.add(slot), x.add(token), |[token, slot]| {
                    (slot, token)
                });
            }
        }
    }

    /// # Safety
    /// As for [`super::Routine::run`].
    unsafe fn gate_grad(
        &self,
        y: *const f32,
        dout: *const f32,
        routing: [*const u32; 2],
        dgate: *mut f32,
    ) {
        // SAFETY: as in `dispatch`.
        unsafe {
            std::slice::from_raw_parts_mut(dgate, self.n_results).fill(0.0);
            for [gate_at, token, slot] in self.landed(routing) {
                let (y, dout) = (y.add(slot), dout.add(token));
                let mut lanes = [0.0f32; 8];
                match &self.features {
                    Features::Dense(n) => {
                        for i in 0..*n {
                            lanes[i % 8] += *y.add(i) * *dout.add(i);
                        }
                    }
                    Features::Strided(features) => {
                        for (i, [token, slot]) in features.iter().enumerate() {
                            lanes[i % 8] += *y.add(*slot) * *dout.add(*token);
                        }
                    }
                }
                *dgate.add(gate_at) = lanes.iter().sum();
            }
        }
    }

    /// # Safety
    /// As for [`super::Routine::run`].
    unsafe fn count(&self, routing: [*const u32; 2], counts: *mut i32) {
        // SAFETY: as in `dispatch`.
        unsafe {
            std::slice::from_raw_parts_mut(counts, self.n_results).fill(0);
            for [_, _, group] in self.landed(routing) {
                *counts.add(group) += 1;
            }
        }
    }

    /// Zeros in a slot.
    ///
    /// # Safety
    /// The features lie inside of the slots' tensor.
    unsafe fn clear(&self, slot: *mut f32) {
        // SAFETY: as for this function.
        unsafe {
            match &self.features {
                Features::Dense(n) => std::slice::from_raw_parts_mut(slot, *n).fill(0.0),
                Features::Strided(features) => {
                    for [_, at] in features {
                        *slot.add(*at) = 0.0;
                    }
                }
            }
        }
    }

    /// `to += factor · from` over the features; `order` gives (from, to) of (token, slot).
    ///
    /// # Safety
    /// The features lie inside of both tensors, which do not overlap.
    unsafe fn add_scaled(
        &self,
        factor: f32,
        from: *const f32,
        to: *mut f32,
        order: impl Fn([usize; 2]) -> (usize, usize),
    ) {
        if self.is_index {
            let (from, to) = (from.cast::<i32>(), to.cast::<i32>());
            let places = match &self.features {
                Features::Dense(n) => (0..*n).map(|at| [at, at]).collect(),
                Features::Strided(features) => features.clone(),
            };
            for both in places {
                let (at_from, at_to) = order(both);
                // SAFETY: as for this function; both are tensors of indices.
                unsafe { *to.add(at_to) += *from.add(at_from) };
            }
            return;
        }
        // SAFETY: as for this function.
        unsafe {
            match &self.features {
                Features::Dense(n) => {
                    let from = std::slice::from_raw_parts(from, *n);
                    let to = std::slice::from_raw_parts_mut(to, *n);
                    for (to, from) in to.iter_mut().zip(from) {
                        *to += factor * from;
                    }
                }
                Features::Strided(features) => {
                    for both in features {
                        let (at_from, at_to) = order(*both);
                        *to.add(at_to) += factor * *from.add(at_from);
                    }
                }
            }
        }
    }
}
