//! Exchanges between devices that the host makes, where the devices have no library for them.
//!
//! In: items of work with exchanges of teams. Out: the same items with calls of the host in their place,
//! and what each call exchanges; during a step, the calls that streams have come to.
//! Invariant: a team has one tag on all ranks, and its exchanges follow one another on one stream of each,
//! so that what one sends is what the other receives. A stream goes on when all of its call has arrived.
//!
//! Where the communicator does not reach the device's memory, what is exchanged passes through pinned
//! memory of the host; exchanges of one stream share it.

use std::collections::BTreeMap;

use super::order::Item;
use crate::collective::{Communicator, Parcel, Shipment};
use crate::device::gpu::{Address, CallIdx, Gpu, Part, StreamIdx, Work};
use crate::error::{Error, Result};

/// Multiples at which pieces of the host's memory begin.
const ALIGNMENT: usize = 256;

/// What the host exchanges for a device.
#[derive(Default)]
pub(super) struct Hosted {
    calls: Vec<Call>,
    under_way: Vec<(CallIdx, Shipment)>,
    /// Bytes of the host's memory that exchanges pass through.
    pub(super) n_bytes: usize,
}

struct Call {
    tag: u32,
    sends: Vec<Parcel>,
    recvs: Vec<Parcel>,
    /// Rank and instruction that it belongs to.
    owner: Option<(usize, usize)>,
}

impl Hosted {
    /// Puts calls of the host in the place of exchanges. `teams` lists the ranks of each team, by its
    /// index, which is its tag.
    ///
    /// # Errors
    /// `Exhausted` when the host has no memory for what passes through; `Internal` when a team is unknown.
    pub(super) fn replace(
        items: &mut [Item],
        teams: &[Vec<usize>],
        gpu: &mut dyn Gpu,
        reaches_devices: bool,
    ) -> Result<Hosted> {
        let mut hosted = Hosted::default();
        let mut through: BTreeMap<StreamIdx, Address> = BTreeMap::new();
        if !reaches_devices {
            let mut needed: BTreeMap<StreamIdx, usize> = BTreeMap::new();
            for item in &*items {
                for work in &item.work {
                    if let Work::Exchange { sends, recvs, .. } = work {
                        let n_bytes = sends.iter().chain(recvs).map(room).sum();
                        let most = needed.entry(item.stream).or_default();
                        *most = (*most).max(n_bytes);
                    }
                }
            }
            for (stream, n_bytes) in needed {
                through.insert(stream, gpu.allocate_host(n_bytes)?);
                hosted.n_bytes += n_bytes;
            }
        }
        for item in items {
            let start = through.get(&item.stream).copied();
            let owner = item.owners.first().copied();
            let mut works = Vec::with_capacity(item.work.len());
            for work in item.work.drain(..) {
                match work {
                    Work::Exchange { team, sends, recvs } => {
                        let ranks = teams.get(team.0).ok_or_else(|| {
                            Error::Internal(format!("team {} of {}", team.0, teams.len()))
                        })?;
                        works.extend(hosted.call((team.0, ranks), (sends, recvs), start, owner));
                    }
                    work => works.push(work),
                }
            }
            item.work = works;
        }
        Ok(hosted)
    }

    /// An exchange as work: copies to the host's memory from `start` on, the call, copies back.
    fn call(
        &mut self,
        (tag, ranks): (usize, &[usize]),
        (sends, recvs): (Vec<Part>, Vec<Part>),
        start: Option<Address>,
        owner: Option<(usize, usize)>,
    ) -> Vec<Work> {
        let mut next = start;
        let mut place = |part: &Part| {
            let address = next.unwrap_or(part.address);
            next = next.map(|next| next + room(part) as u64);
            Parcel {
                rank: ranks[part.member],
                address,
                n_bytes: part.n_bytes,
            }
        };
        let call = Call {
            tag: tag as u32,
            sends: sends.iter().map(&mut place).collect(),
            recvs: recvs.iter().map(&mut place).collect(),
            owner,
        };
        let copy = |to: Address, from: Address, n_bytes: usize| {
            (to != from).then_some(Work::Copy { to, from, n_bytes })
        };
        let out = sends.iter().zip(&call.sends);
        let out = out.filter_map(|(part, kept)| copy(kept.address, part.address, part.n_bytes));
        let back = recvs.iter().zip(&call.recvs);
        let back = back.filter_map(|(part, kept)| copy(part.address, kept.address, part.n_bytes));
        let ask = Work::Call(CallIdx(self.calls.len()));
        let works = out.chain([ask]).chain(back).collect();
        self.calls.push(call);
        works
    }

    /// Number of calls in a step.
    pub(super) fn n_calls(&self) -> usize {
        self.calls.len()
    }

    /// Starts the exchanges that streams have come to, and lets those streams go on whose exchanges are
    /// done; does not wait.
    ///
    /// # Errors
    /// Those of the device and of the communicator.
    pub(super) fn serve(
        &mut self,
        gpu: &mut dyn Gpu,
        communicator: &mut dyn Communicator,
    ) -> Result<()> {
        if self.calls.is_empty() {
            return Ok(());
        }
        for idx in gpu.calls()? {
            let call = &self.calls[idx.0];
            // SAFETY: the stream stands still until it is answered, and nothing else touches what passes
            // through the host; what lies on the device is its item's to read or write.
            let shipment = unsafe { communicator.ship(call.tag, &call.sends, &call.recvs) }?;
            self.under_way.push((idx, shipment));
        }
        let mut left = Vec::with_capacity(self.under_way.len());
        for (idx, shipment) in std::mem::take(&mut self.under_way) {
            if communicator.has_arrived(shipment)? {
                gpu.answer(idx)?;
            } else {
                left.push((idx, shipment));
            }
        }
        self.under_way = left;
        Ok(())
    }

    /// Rank and instruction of the exchange that has been under way for longest.
    pub(super) fn waits_at(&self) -> Option<(usize, usize)> {
        let mut owners = self
            .under_way
            .iter()
            .map(|(idx, _)| self.calls[idx.0].owner);
        owners.find_map(|owner| owner)
    }
}

/// Bytes that a part takes where it passes through.
fn room(part: &Part) -> usize {
    part.n_bytes.next_multiple_of(ALIGNMENT)
}
