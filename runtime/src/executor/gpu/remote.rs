//! Collectives between ranks on different devices: what one member sends, receives and combines.
//!
//! In: a [`Collective`] and this member's place in it. Out: work for its device, exchanges among it.
//! Invariant: what two members say of an exchange agrees, because both read it off the same collective;
//! sums are made in the order of the group's ranks, so they have the bits of every other backend. All
//! reductions but those by the library's own all-reduce are such: those of log-sum-exps, and all where the
//! host exchanges.

use meshweave_dsl::layout::ReduceKind;

use super::collective::{Collective, Launcher, Move, Rows};
use crate::device::gpu::{Address, Part, TeamIdx, Work};
use crate::error::Result;
use crate::strided::CopyLoop;

/// Stands before the memory for packed elements is known; its other bits are the offset there.
pub(super) const IN_STAGING: Address = 1 << 62;

/// Up to this many elements every member reduces everything by itself, which saves an exchange.
const SMALL: usize = 2048;

/// Multiples at which pieces of it begin.
const ALIGNMENT: usize = 256;

/// Memory for packed elements, which all collectives of a rank share, as they follow one another.
#[derive(Default)]
pub(super) struct Staging {
    used: usize,
    /// Bytes that the greatest collective needs.
    pub(super) n_bytes: usize,
}

impl Staging {
    /// The next collective begins.
    fn clear(&mut self) {
        self.used = 0;
    }

    fn take(&mut self, n_bytes: usize) -> Address {
        let address = IN_STAGING | self.used as u64;
        self.used += n_bytes.next_multiple_of(ALIGNMENT);
        self.n_bytes = self.n_bytes.max(self.used);
        address
    }
}

/// This member of a group.
#[derive(Clone, Copy)]
pub(super) struct Own {
    pub(super) team: TeamIdx,
    pub(super) member: usize,
    pub(super) n_members: usize,
    pub(super) src: Address,
    pub(super) dst: Address,
    /// Whether the team reduces by itself.
    pub(super) has_sums: bool,
}

impl Launcher<'_> {
    /// This member's work in a collective.
    ///
    /// # Errors
    /// Those of the device.
    pub(super) fn remote(
        &mut self,
        collective: &Collective,
        own: Own,
        staging: &mut Staging,
    ) -> Result<Vec<Work>> {
        staging.clear();
        match collective {
            Collective::Moves(moves) => self.exchange(moves, own, staging),
            Collective::AllReduce { kind, n_elements }
                if *kind != ReduceKind::Lse && own.has_sums =>
            {
                Ok(vec![Work::AllReduce {
                    team: own.team,
                    kind: *kind,
                    dtype: self.dtype,
                    src: own.src,
                    dst: own.dst,
                    n_elements: *n_elements,
                }])
            }
            Collective::AllReduce { kind, n_elements } if *n_elements <= SMALL => {
                let rows = vec![Rows::dense(*n_elements); own.n_members];
                self.combine(*kind, &rows, own, staging)
            }
            Collective::AllReduce { kind, n_elements } => {
                self.all_reduce(*kind, *n_elements, own, staging)
            }
            Collective::ReduceScatter { kind, rows } => self.combine(*kind, rows, own, staging),
        }
    }

    /// Every member's rows of this member's source go there; those of all sources that come here are
    /// combined.
    fn combine(
        &mut self,
        kind: ReduceKind,
        rows: &[Rows],
        own: Own,
        staging: &mut Staging,
    ) -> Result<Vec<Work>> {
        let n_own = rows[own.member].n_elements();
        let size = self.dtype.n_bytes();
        let slots: Vec<Address> = (0..own.n_members)
            .map(|_| staging.take(size * n_own))
            .collect();
        let pitch = match slots.as_slice() {
            [first, second, ..] => (second - first) as usize / size,
            _ => 0,
        };
        let mut moves = Vec::new();
        for source in 0..own.n_members {
            for (target, rows) in rows.iter().enumerate() {
                moves.push(Move {
                    source,
                    target,
                    loops: rows.loops(),
                    from: rows.start,
                    // Only this member's own slots matter here.
                    to: pitch * source,
                });
            }
        }
        let into_slots = Own {
            dst: slots[0],
            ..own
        };
        let mut works = self.exchange(&moves, into_slots, staging)?;
        works.push(self.reduce(kind, &slots, &[own.dst], &Rows::dense(n_own))?);
        Ok(works)
    }

    /// Every member combines a part of the elements, which the others then get of it.
    fn all_reduce(
        &mut self,
        kind: ReduceKind,
        n_elements: usize,
        own: Own,
        staging: &mut Staging,
    ) -> Result<Vec<Work>> {
        let (share, more) = (n_elements / own.n_members, n_elements % own.n_members);
        let mut start = 0;
        let parts = (0..own.n_members).map(|member| {
            let n = share + usize::from(member < more);
            start += n;
            Rows {
                start: start - n,
                ..Rows::dense(n)
            }
        });
        let parts: Vec<Rows> = parts.collect();
        let own_part = Own {
            dst: self.element(own.dst, parts[own.member].start),
            ..own
        };
        let mut works = self.combine(kind, &parts, own_part, staging)?;
        let ways =
            (0..own.n_members).flat_map(|source| (0..own.n_members).map(move |to| (source, to)));
        let moves = ways.filter(|(source, target)| source != target);
        let moves = moves.map(|(source, target)| Move {
            source,
            target,
            loops: Rows::dense(parts[source].n_elements()).loops(),
            from: parts[source].start,
            to: parts[source].start,
        });
        let moves: Vec<Move> = moves.collect();
        let in_place = Own {
            src: own.dst,
            ..own
        };
        works.extend(self.exchange(&moves, in_place, staging)?);
        Ok(works)
    }

    /// This member's part in moves: elements that lie apart are packed and unpacked.
    fn exchange(&mut self, moves: &[Move], own: Own, staging: &mut Staging) -> Result<Vec<Work>> {
        let (mut before, mut after) = (Vec::new(), Vec::new());
        let (mut sends, mut recvs) = (Vec::new(), Vec::new());
        for one in moves {
            let n_elements: usize = one.loops.iter().map(|l| l.size).product();
            if n_elements == 0 {
                continue;
            }
            let n_bytes = self.dtype.n_bytes() * n_elements;
            let (src, dst) = (
                self.element(own.src, one.from),
                self.element(own.dst, one.to),
            );
            match (one.source == own.member, one.target == own.member) {
                (true, true) => after.push(self.copy(&one.loops, src, dst)?),
                (true, false) => {
                    let packed = with_dense(&one.loops, |l, stride| l.dst = stride);
                    let address = if is_dense(&one.loops, |l| l.src) {
                        src
                    } else {
                        let slot = staging.take(n_bytes);
                        before.push(self.copy(&packed, src, slot)?);
                        slot
                    };
                    let member = one.target;
                    sends.push(Part {
                        member,
                        address,
                        n_bytes,
                    });
                }
                (false, true) => {
                    let packed = with_dense(&one.loops, |l, stride| l.src = stride);
                    let address = if is_dense(&one.loops, |l| l.dst) {
                        dst
                    } else {
                        let slot = staging.take(n_bytes);
                        after.push(self.copy(&packed, slot, dst)?);
                        slot
                    };
                    let member = one.source;
                    recvs.push(Part {
                        member,
                        address,
                        n_bytes,
                    });
                }
                (false, false) => {}
            }
        }
        if !(sends.is_empty() && recvs.is_empty()) {
            let team = own.team;
            before.push(Work::Exchange { team, sends, recvs });
        }
        before.append(&mut after);
        Ok(before)
    }
}

/// The strides that the loops would have over elements that lie together.
fn dense_strides(loops: &[CopyLoop]) -> Vec<usize> {
    let mut strides = vec![1; loops.len()];
    for idx in (1..loops.len()).rev() {
        strides[idx - 1] = strides[idx] * loops[idx].size;
    }
    strides
}

fn is_dense(loops: &[CopyLoop], stride: impl Fn(&CopyLoop) -> usize) -> bool {
    let mut all = loops.iter().zip(dense_strides(loops));
    all.all(|(l, dense)| l.size == 1 || stride(l) == dense)
}

fn with_dense(loops: &[CopyLoop], set: impl Fn(&mut CopyLoop, usize)) -> Vec<CopyLoop> {
    let mut loops = loops.to_vec();
    let strides = dense_strides(&loops);
    for (l, stride) in loops.iter_mut().zip(strides) {
        set(l, stride);
    }
    loops
}
