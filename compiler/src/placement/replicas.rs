//! A placement as a program executes it: where each expert is at home, and who takes which turn.
//!
//! Enters: the experts of every device, and what part of its expert's load each replica takes. Leaves:
//! homes, and the turns that replicas take.
//! Invariant: every device is home to as many experts as any other; an expert is at home where it has a
//! replica wherever such homes exist; an expert's turns are as close to its shares as whole turns can be.
//!
//! Weights, their moments and their updates are at home only; replicas are copies. FasterMoE (He et al.,
//! PPoPP 2022) shadows popular experts on all devices in the same way, and SwiftMoE (arXiv
//! 2504.19925) likewise keeps the optimizer apart from where experts serve.

use meshweave_dsl::placement::Placement;
use serde::{Deserialize, Serialize};

use super::PlacementError;

/// Turns after which replicas begin anew: shares are multiples of its inverse.
pub const N_TURNS: usize = 64;

/// A layer's experts by their positions: those of a device's homes follow each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// The expert at home at every position.
    pub order: Vec<usize>,
    /// The position whose expert each slot holds, device by device.
    pub held: Vec<Vec<usize>>,
    /// The slot, counted over all devices, that takes each turn of a position's expert.
    pub turns: Vec<Vec<usize>>,
}

/// A placement with replicas, ready to be compiled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replicas {
    pub devices: usize,
    /// Slots of a device, in every layer.
    pub slots: usize,
    pub experts: usize,
    pub layers: Vec<Layer>,
}

impl Replicas {
    /// The homes and turns of a placement; `shares` are the parts of their experts' loads that slots
    /// take, by layer, device and slot, and even ones where none are given.
    ///
    /// # Errors
    /// `Invalid` when the experts do not divide over the devices, or shares are not of this placement.
    pub fn new(
        placement: &Placement,
        shares: Option<&[Vec<Vec<f64>>]>,
    ) -> Result<Self, PlacementError> {
        let (devices, experts) = (placement.n_devices(), placement.n_experts());
        if !experts.is_multiple_of(devices) {
            return Err(PlacementError::Invalid(format!(
                "{experts} experts do not divide over {devices} devices, each of which is home to as many: place on a number of devices that divides {experts}"
            )));
        }
        if let Some(shares) = shares
            && shares.len() != placement.n_layers()
        {
            return Err(PlacementError::Invalid(format!(
                "the shares are of {} layers, the placement has {}: write both with one `meshweave place --out FILE --shares FILE`",
                shares.len(),
                placement.n_layers()
            )));
        }
        let layers = (0..placement.n_layers()).map(|layer| {
            let shares = shares.and_then(|shares| shares.get(layer));
            Layer::new(placement.layer(layer), experts, shares.map(Vec::as_slice))
                .map_err(|error| PlacementError::Invalid(format!("layer {layer}: {error}")))
        });
        Ok(Self {
            devices,
            slots: placement.slots(),
            experts,
            layers: layers.collect::<Result<_, _>>()?,
        })
    }

    /// Copies of experts beside their homes that a step fills, over all layers and devices.
    pub fn n_copies(&self) -> usize {
        let homes = self.experts / self.devices.max(1);
        let copies = |layer: &Layer| -> usize {
            let devices = layer.held.iter().enumerate();
            let away = devices.map(|(device, held)| {
                let is_away = |position: &&usize| **position / homes.max(1) != device;
                held.iter().filter(is_away).count()
            });
            away.sum()
        };
        self.layers.iter().map(copies).sum()
    }
}

impl Layer {
    fn new(
        devices: &[Vec<u16>],
        n_experts: usize,
        shares: Option<&[Vec<f64>]>,
    ) -> Result<Self, PlacementError> {
        let order = homes(devices, n_experts);
        let mut position_of = vec![0; n_experts];
        for (position, expert) in order.iter().enumerate() {
            position_of[*expert] = position;
        }
        let position = |expert: &u16| position_of[usize::from(*expert)];
        let held: Vec<Vec<usize>> = devices
            .iter()
            .map(|held| held.iter().map(position).collect())
            .collect();
        let turns = turns(&held, n_experts, shares)?;
        Ok(Self { order, held, turns })
    }

    /// The same with other shares, by device and slot.
    ///
    /// # Errors
    /// As for [`Replicas::new`].
    pub fn shared(&self, shares: &[Vec<f64>]) -> Result<Self, PlacementError> {
        Ok(Self {
            turns: turns(&self.held, self.order.len(), Some(shares))?,
            ..self.clone()
        })
    }
}

/// The expert at home at every position, where device d has positions d · n to (d + 1) · n: a matching
/// of experts with devices that hold them, completed where there is none of all. O(experts² · slots).
fn homes(devices: &[Vec<u16>], n_experts: usize) -> Vec<usize> {
    let size = n_experts / devices.len().max(1);
    let mut places: Vec<Vec<usize>> = vec![Vec::new(); n_experts];
    for (device, held) in devices.iter().enumerate() {
        for expert in held {
            if let Some(places) = places.get_mut(usize::from(*expert)) {
                places.push(device);
            }
        }
    }
    let mut at: Vec<Vec<usize>> = vec![Vec::new(); devices.len()];
    let mut homeless = Vec::new();
    for expert in 0..n_experts {
        let mut seen = vec![false; devices.len()];
        if !find_home(expert, &places, size, &mut at, &mut seen) {
            homeless.push(expert);
        }
    }
    for held in &mut at {
        let room = size.saturating_sub(held.len()).min(homeless.len());
        held.extend(homeless.drain(..room));
        held.sort_unstable();
    }
    at.into_iter().flatten().collect()
}

/// Gives an expert a home, moving others between theirs where that makes room.
fn find_home(
    expert: usize,
    places: &[Vec<usize>],
    size: usize,
    at: &mut [Vec<usize>],
    seen: &mut [bool],
) -> bool {
    let places_of = |expert: usize| places.get(expert).map_or(&[][..], Vec::as_slice);
    let free = places_of(expert)
        .iter()
        .find(|device| at[**device].len() < size);
    if let Some(device) = free {
        at[*device].push(expert);
        return true;
    }
    for device in places_of(expert) {
        if std::mem::replace(&mut seen[*device], true) {
            continue;
        }
        for slot in 0..at[*device].len() {
            if find_home(at[*device][slot], places, size, at, seen) {
                at[*device][slot] = expert;
                return true;
            }
        }
    }
    false
}

/// Who takes each turn: the replica that is furthest behind its share, which spreads turns evenly.
fn turns(
    held: &[Vec<usize>],
    n_experts: usize,
    shares: Option<&[Vec<f64>]>,
) -> Result<Vec<Vec<usize>>, PlacementError> {
    let mut replicas: Vec<Vec<(usize, f64)>> = vec![Vec::new(); n_experts];
    let mut place = 0;
    for (device, held) in held.iter().enumerate() {
        let of_device = shares.map(|shares| shares.get(device).map_or(&[][..], Vec::as_slice));
        if let Some(of_device) = of_device
            && of_device.len() != held.len()
        {
            return Err(PlacementError::Invalid(format!(
                "device {device} has {} slots and shares for {}: write both with one `meshweave place --out FILE --shares FILE`",
                held.len(),
                of_device.len()
            )));
        }
        for (slot, position) in held.iter().enumerate() {
            let share = of_device.map_or(1.0, |shares| shares[slot]);
            if !share.is_finite() || share < 0.0 {
                return Err(PlacementError::Invalid(format!(
                    "the share of slot {slot} of device {device} is {share}: give a part between 0 and 1"
                )));
            }
            replicas[*position].push((place, share));
            place += 1;
        }
    }
    let turns = replicas.into_iter().map(|mut replicas| {
        let sum: f64 = replicas.iter().map(|(_, share)| share).sum();
        if sum <= 0.0 {
            // Nothing was seen of the expert.
            replicas.iter_mut().for_each(|(_, share)| *share = 1.0);
        }
        let sum: f64 = replicas.iter().map(|(_, share)| share).sum();
        let mut taken = vec![0.0; replicas.len()];
        let turns = (1..=N_TURNS).map(|n| {
            let behind = |idx: usize| replicas[idx].1 / sum * n as f64 - taken[idx];
            let next = (1..replicas.len()).fold(0, |best, idx| {
                if behind(idx) > behind(best) {
                    idx
                } else {
                    best
                }
            });
            taken[next] += 1.0;
            replicas[next].0
        });
        turns.collect()
    });
    Ok(turns.collect())
}
