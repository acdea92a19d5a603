//! Moves of tokens from the slots where they stand into those that they are sent to.
//!
//! In: rows of this rank's experts, and the routes of all tokens of its groups, before and after.
//! Out: the rows of the tokens that are sent to this rank's experts.
//! Invariant: every member walks the same tokens in the same order, so all know without a message which
//! rows go where; a token's choices are added up in their order, wherever they come from, so that the
//! bits are those of a combination and a dispatch.
//!
//! A token's row travels once to each rank that has experts for it, and not at all within one.

use meshweave_dsl::graph::TensorType;
use meshweave_dsl::op::{MoeMove, OpKind, Shares};

use super::{check_types, local_index, offsets, size, stride, without};
use crate::error::{Error, Result};

/// A move ready to run.
#[derive(Debug, Clone)]
pub(crate) struct MovePlan {
    tokens: Vec<Token>,
    /// The choices that tokens come from: how many, and strides in expert, slot and gate.
    from: Choices<3>,
    /// The choices that they go to: how many, and strides in expert and slot.
    to: Choices<2>,
    source: Slots,
    target: Slots,
    /// Elements of a row.
    row: usize,
    /// First expert of every member, and the end of the last one's.
    firsts: Vec<usize>,
    member_idx: usize,
    n_results: usize,
    leaves_rest: bool,
}

/// First elements of a token in its routes, and of its groups in both tensors of rows.
#[derive(Debug, Clone, Copy)]
struct Token {
    from: [usize; 3],
    to: [usize; 2],
    source: usize,
    target: usize,
}

#[derive(Debug, Clone, Copy)]
struct Choices<const N: usize> {
    n: usize,
    strides: [usize; N],
}

/// Rows `[expert, b.., slot, ..]`.
#[derive(Debug, Clone, Copy)]
struct Slots {
    expert_stride: usize,
    slot_stride: usize,
    capacity: usize,
}

/// What a run reads.
#[derive(Clone, Copy)]
struct Routes {
    from_expert: *const i32,
    from_slot: *const i32,
    expert: *const i32,
    slot: *const i32,
    gate: Option<*const f32>,
}

/// Buffers that rows are sent from and received in, kept from run to run.
#[derive(Default)]
pub(crate) struct Traveling {
    pub sent: Vec<f32>,
    pub sent_counts: Vec<usize>,
    pub received: Vec<f32>,
    pub received_counts: Vec<usize>,
}

impl MovePlan {
    /// Prepares a move on `rank`.
    ///
    /// # Errors
    /// `Invalid` when the types do not fit the op, or the rank has no share in it.
    pub(crate) fn new(
        moved: &MoeMove,
        rank: usize,
        inputs: &[&TensorType],
        result: &TensorType,
    ) -> Result<MovePlan> {
        check_types(&OpKind::MoeMove(moved.clone()), inputs, &[result])?;
        let damaged = || {
            Error::Invalid(format!(
                "damaged program: a move of {} operands on rank {rank}; compile again",
                inputs.len()
            ))
        };
        let [y, from_expert, from_slot, expert, slot, gate @ ..] = inputs else {
            return Err(damaged());
        };
        let gate = gate.first().unwrap_or(from_expert);
        let dims = &moved.dims;
        let mut walk = without(expert, &[&dims.seq, &dims.choice]);
        walk.push((dims.seq.clone(), size(expert, &dims.seq)?));
        let all = [from_expert, from_slot, gate, expert, slot, y, &result];
        let tokens = offsets(&walk, all.map(|ty| *ty)).into_iter().map(
            |[from_expert, from_slot, gate, expert, slot, source, target]| Token {
                from: [from_expert, from_slot, gate],
                to: [expert, slot],
                source,
                target,
            },
        );
        let rows = |ty: &TensorType| -> Result<(Slots, usize)> {
            let slots = Slots {
                expert_stride: stride(ty, &dims.expert)?,
                slot_stride: stride(ty, &dims.slot)?,
                capacity: size(ty, &dims.slot)?,
            };
            let after = ty.position(&dims.slot).map_or(0, |position| position + 1);
            let row: usize = ty.shape[after..].iter().map(|(_, size)| size).product();
            // What stands behind a slot is a row, in one piece.
            (slots.slot_stride == row)
                .then_some((slots, row))
                .ok_or_else(damaged)
        };
        let ((source, row), (target, to_row)) = (rows(y)?, rows(result)?);
        if row != to_row {
            return Err(damaged());
        }
        let (firsts, member_idx) = match moved.over.as_deref() {
            None => (vec![dims.offset, dims.offset + dims.n_experts], 0),
            Some(Shares { counts, group }) => {
                let mut firsts = vec![0];
                let mut first = 0;
                for count in counts {
                    first += count;
                    firsts.push(first);
                }
                let member_idx = group.ranks.iter().position(|member| *member == rank);
                let member_idx = member_idx.ok_or_else(damaged)?;
                let mine = (firsts.get(member_idx), firsts.get(member_idx + 1));
                let expected = (dims.offset, dims.offset + dims.n_experts);
                if counts.len() != group.ranks.len()
                    || mine != (Some(&expected.0), Some(&expected.1))
                {
                    return Err(damaged());
                }
                (firsts, member_idx)
            }
        };
        Ok(MovePlan {
            tokens: tokens.collect(),
            from: Choices {
                n: size(from_expert, &moved.from)?,
                strides: [
                    stride(from_expert, &moved.from)?,
                    stride(from_slot, &moved.from)?,
                    stride(gate, &moved.from)?,
                ],
            },
            to: Choices {
                n: size(expert, &dims.choice)?,
                strides: [stride(expert, &dims.choice)?, stride(slot, &dims.choice)?],
            },
            source,
            target,
            row,
            firsts,
            member_idx,
            n_results: result.n_elements(),
            leaves_rest: false,
        })
    }

    /// The same, leaving slots that no token takes as they are.
    pub(crate) fn leaving_rest(self) -> MovePlan {
        MovePlan {
            leaves_rest: true,
            ..self
        }
    }

    /// Moves rows; `exchange` sends `sent` to the members by counts of elements, and receives.
    ///
    /// # Errors
    /// Those of the exchange.
    ///
    /// # Safety
    /// The addresses are those of tensors of the planned types, in the op's order; inputs are valid for
    /// reads, the result for writes, and it overlaps none of them.
    pub(crate) unsafe fn run(
        &self,
        inputs: &[*const u32],
        result: *mut u32,
        traveling: &mut Traveling,
        exchange: &mut dyn FnMut(&mut Traveling) -> Result<()>,
    ) -> Result<()> {
        let routes = Routes {
            from_expert: inputs[1].cast(),
            from_slot: inputs[2].cast(),
            expert: inputs[3].cast(),
            slot: inputs[4].cast(),
            gate: inputs.get(5).map(|gate| gate.cast()),
        };
        // SAFETY: the addresses are those of the planned tensors.
        unsafe {
            self.pack(inputs[0].cast(), routes, traveling);
            exchange(traveling)?;
            self.unpack(result.cast(), routes, traveling);
        }
        Ok(())
    }

    /// # Safety
    /// As for [`Self::run`].
    unsafe fn pack(&self, y: *const f32, routes: Routes, traveling: &mut Traveling) {
        let n_members = self.firsts.len() - 1;
        traveling.sent.clear();
        traveling.sent_counts.clear();
        traveling.received_counts.clear();
        traveling.received_counts.resize(n_members, 0);
        for member in 0..n_members {
            let before = traveling.sent.len();
            for token in &self.tokens {
                // SAFETY: a token of the routes; the slots were checked against the rows.
                unsafe {
                    if !self.goes_to(token, routes, member) {
                        continue;
                    }
                    for (owner, place, gate) in self.places(token, routes) {
                        if member == self.member_idx {
                            traveling.received_counts[owner] += self.row;
                        }
                        if owner == self.member_idx {
                            let row = std::slice::from_raw_parts(y.add(place), self.row);
                            let scaled = row.iter().map(|x| gate * x);
                            traveling.sent.extend(scaled);
                        }
                    }
                }
            }
            traveling.sent_counts.push(traveling.sent.len() - before);
        }
        let n_received = traveling.received_counts.iter().sum();
        traveling.received.clear();
        traveling.received.resize(n_received, 0.0);
    }

    /// # Safety
    /// As for [`Self::run`].
    unsafe fn unpack(&self, result: *mut f32, routes: Routes, traveling: &Traveling) {
        let mut next: Vec<usize> = Vec::with_capacity(traveling.received_counts.len());
        let mut first = 0;
        for count in &traveling.received_counts {
            next.push(first);
            first += count;
        }
        let mut sum = vec![0.0f32; self.row];
        // SAFETY: the slots were checked against the rows.
        unsafe {
            if !self.leaves_rest {
                std::slice::from_raw_parts_mut(result, self.n_results).fill(0.0);
            }
            for token in &self.tokens {
                if !self.goes_to(token, routes, self.member_idx) {
                    continue;
                }
                sum.fill(0.0);
                for (owner, ..) in self.places(token, routes) {
                    let row = &traveling.received[next[owner]..next[owner] + self.row];
                    next[owner] += self.row;
                    for (sum, x) in sum.iter_mut().zip(row) {
                        *sum += x;
                    }
                }
                for choice in 0..self.to.n {
                    if let Some((_, place)) = self.target_of(token, routes, choice, self.member_idx)
                    {
                        let row = std::slice::from_raw_parts_mut(result.add(place), self.row);
                        row.copy_from_slice(&sum);
                    }
                }
            }
        }
    }

    /// Whether a member has experts that the token goes to.
    ///
    /// # Safety
    /// The addresses are those of the routes.
    unsafe fn goes_to(&self, token: &Token, routes: Routes, member: usize) -> bool {
        // SAFETY: as for this function.
        (0..self.to.n)
            .any(|choice| unsafe { self.target_of(token, routes, choice, member).is_some() })
    }

    /// The member's expert that a choice is, and the first element of its slot there.
    ///
    /// # Safety
    /// The addresses are those of the routes.
    unsafe fn target_of(
        &self,
        token: &Token,
        routes: Routes,
        choice: usize,
        member: usize,
    ) -> Option<(usize, usize)> {
        let [expert_stride, slot_stride] = self.to.strides;
        // SAFETY: offsets of a token's choices in their tensors.
        let (expert, slot) = unsafe {
            (
                *routes.expert.add(token.to[0] + choice * expert_stride),
                *routes.slot.add(token.to[1] + choice * slot_stride),
            )
        };
        let first = self.firsts[member];
        let expert = local_index(expert, first, self.firsts[member + 1] - first)?;
        let slot = local_index(slot, 0, self.target.capacity)?;
        let place = expert * self.target.expert_stride + slot * self.target.slot_stride;
        Some((expert, token.target + place))
    }

    /// Where a token stands: the member, the first element of its row there, and its gate.
    ///
    /// # Safety
    /// The addresses are those of the routes.
    unsafe fn places<'a>(
        &'a self,
        token: &'a Token,
        routes: Routes,
    ) -> impl Iterator<Item = (usize, usize, f32)> + 'a {
        (0..self.from.n).filter_map(move |choice| {
            let [expert_stride, slot_stride, gate_stride] = self.from.strides;
            // SAFETY: offsets of a token's choices in their tensors.
            let (expert, slot, gate) = unsafe {
                (
                    *routes
                        .from_expert
                        .add(token.from[0] + choice * expert_stride),
                    *routes.from_slot.add(token.from[1] + choice * slot_stride),
                    routes
                        .gate
                        .map_or(1.0, |gate| *gate.add(token.from[2] + choice * gate_stride)),
                )
            };
            let (first, end) = (*self.firsts.first()?, *self.firsts.last()?);
            let expert = first + local_index(expert, first, end - first)?;
            let slot = local_index(slot, 0, self.source.capacity)?;
            let member = self.firsts.partition_point(|first| *first <= expert) - 1;
            let local = expert - self.firsts[member];
            let place = local * self.source.expert_stride + slot * self.source.slot_stride;
            Some((member, token.source + place, gate))
        })
    }
}
