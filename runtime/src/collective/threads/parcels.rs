//! Bytes on their way from one thread to another.
//!
//! In: parcels of two ranks. Out: the receiver's memory, filled. Invariant: parcels of a pair and a tag
//! arrive in the order in which they were sent; nobody waits for room.

use std::collections::{BTreeMap, VecDeque};

use super::{ThreadCommunicator, World, lock};
use crate::collective::{Parcel, Shipment};
use crate::error::{Error, Result};

/// Sent and not received, oldest first, by sender, receiver and tag.
pub(super) type Parcels = BTreeMap<(usize, usize, u32), VecDeque<Vec<u8>>>;

/// What this rank still expects of its shipments.
#[derive(Default)]
pub(super) struct Expected {
    n_shipments: usize,
    parcels: BTreeMap<Shipment, VecDeque<(u32, Parcel)>>,
}

impl ThreadCommunicator {
    /// # Safety
    /// As for [`Communicator::ship`](crate::collective::Communicator::ship).
    pub(super) unsafe fn send_off(
        &mut self,
        tag: u32,
        sends: &[Parcel],
        recvs: &[Parcel],
    ) -> Result<Shipment> {
        self.world.check()?;
        for parcel in sends {
            let from = parcel.address as *const u8;
            // SAFETY: as the caller promises.
            let bytes = unsafe { std::slice::from_raw_parts(from, parcel.n_bytes) }.to_vec();
            let way = (self.rank, parcel.rank, tag);
            lock(&self.world.parcels)
                .entry(way)
                .or_default()
                .push_back(bytes);
        }
        self.expected.n_shipments += 1;
        let shipment = Shipment(self.expected.n_shipments);
        let expected = recvs.iter().map(|parcel| (tag, *parcel)).collect();
        self.expected.parcels.insert(shipment, expected);
        Ok(shipment)
    }

    pub(super) fn take_in(&mut self, shipment: Shipment) -> Result<bool> {
        self.world.check()?;
        let Some(expected) = self.expected.parcels.get_mut(&shipment) else {
            return Ok(true);
        };
        while let Some((tag, parcel)) = expected.front() {
            let Some(bytes) = self.world.take_parcel((parcel.rank, self.rank, *tag)) else {
                return Ok(false);
            };
            if bytes.len() != parcel.n_bytes {
                let error = Error::Invalid(format!(
                    "rank {} receives {} bytes of rank {}, which sent {}",
                    self.rank,
                    parcel.n_bytes,
                    parcel.rank,
                    bytes.len()
                ));
                self.world.fail(&error);
                return Err(error);
            }
            let to = parcel.address as *mut u8;
            // SAFETY: as the caller of `send_off` promised.
            unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
            expected.pop_front();
        }
        self.expected.parcels.remove(&shipment);
        Ok(true)
    }
}

impl World {
    fn take_parcel(&self, way: (usize, usize, u32)) -> Option<Vec<u8>> {
        lock(&self.parcels).get_mut(&way)?.pop_front()
    }
}
