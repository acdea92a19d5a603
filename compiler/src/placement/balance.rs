//! Placement by load: replicas of experts packed onto devices so that the busiest has little to do.
//!
//! Enters: the load of every expert of a layer, devices and slots a device. Leaves: the experts of
//! every device, the greatest load, and a bound below which no placement comes.
//! Invariant: every expert has a replica, every slot holds an expert, and no device holds two
//! replicas of one.
//!
//! The problem is that of DeepSeek's EPLB (github.com/deepseek-ai/EPLB): replicas share their
//! expert's load evenly. Replicas go to the expert with the greatest load a replica, replicas are
//! packed greatest first, and then the best exchange between the busiest device and any other is
//! made while it helps; where slots are few, replicas are also moved from one expert to another.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::PlacementError;

/// Devices and their slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slots {
    pub devices: usize,
    /// Experts that a device holds in a layer.
    pub per_device: usize,
}

/// A layer placed by load.
#[derive(Clone, Debug, PartialEq)]
pub struct Balanced {
    /// Experts of every device.
    pub devices: Vec<Vec<u16>>,
    /// The greatest load of a device when replicas share evenly.
    pub greatest: f64,
    /// No placement has a smaller greatest load, even if replicas share unevenly.
    pub bound: f64,
}

/// Places one layer.
///
/// # Errors
/// The slots hold fewer than all experts, or so many that one device would need two replicas of
/// one expert; loads that are not numbers.
pub fn balance(load: &[f64], slots: Slots) -> Result<Balanced, PlacementError> {
    check(load, slots)?;
    let n_slots = slots.devices * slots.per_device;
    let mut counts = replicate(load, slots.devices, n_slots);
    let bound = least_greatest(load, slots);
    let mut packing = Packing::of(load, &counts, slots);
    packing.exchange();
    // Moving replicas between experts: few slots leave few choices, so all are tried.
    const FEW_SLOTS: usize = 64;
    if n_slots <= FEW_SLOTS {
        while let Some(better) = move_replica(load, &counts, slots, packing.greatest()) {
            (counts, packing) = better;
        }
    }
    Ok(Balanced {
        greatest: packing.greatest(),
        devices: packing.devices,
        bound,
    })
}

/// Places one layer within groups of experts that must share a node, as EPLB does hierarchically.
///
/// Groups are runs of `load.len() / groups` experts.
///
/// # Errors
/// Sizes that do not divide, and those of [`balance`].
pub fn balance_grouped(
    load: &[f64],
    slots: Slots,
    groups: usize,
    nodes: usize,
) -> Result<Balanced, PlacementError> {
    let divides = |n: usize, by: usize| by > 0 && n.is_multiple_of(by);
    if !divides(load.len(), groups) || !divides(groups, nodes) || !divides(slots.devices, nodes) {
        return Err(PlacementError::Invalid(format!(
            "{} experts in {groups} groups on {nodes} nodes of {} devices do not divide evenly",
            load.len(),
            slots.devices
        )));
    }
    let size = load.len() / groups;
    let of_node = Slots {
        devices: slots.devices / nodes,
        ..slots
    };
    let group_load: Vec<f64> = load.chunks(size).map(|group| group.iter().sum()).collect();
    let packed = Slots {
        devices: nodes,
        per_device: groups / nodes,
    };
    let mut nodes_of = Packing::of(&group_load, &vec![1; groups], packed);
    nodes_of.exchange();
    let place = |groups: &[u16]| -> Result<Balanced, PlacementError> {
        let experts: Vec<u16> = groups
            .iter()
            .flat_map(|group| (0..size).map(move |at| group * size as u16 + at as u16))
            .collect();
        let load: Vec<f64> = experts.iter().map(|e| load[usize::from(*e)]).collect();
        let mut placed = balance(&load, of_node)?;
        for expert in placed.devices.iter_mut().flatten() {
            *expert = experts[usize::from(*expert)];
        }
        Ok(placed)
    };
    let mut divided = nodes_of.devices;
    let mut placed = divided
        .iter()
        .map(|groups| place(groups))
        .collect::<Result<Vec<_>, _>>()?;
    let greatest = |placed: &[Balanced]| placed.iter().map(|p| p.greatest).fold(0.0, f64::max);
    // Exchanges of groups between nodes, judged by what the devices then have to do.
    loop {
        let mut best: Option<(f64, Vec<Vec<u16>>, Vec<Balanced>)> = None;
        for a in 0..nodes {
            for b in a + 1..nodes {
                for (i, j) in pairs(divided[a].len(), divided[b].len()) {
                    let mut tried = divided.clone();
                    let (x, y) = (tried[a][i], tried[b][j]);
                    (tried[a][i], tried[b][j]) = (y, x);
                    let mut outcome = placed.clone();
                    outcome[a] = place(&tried[a])?;
                    outcome[b] = place(&tried[b])?;
                    let now = greatest(&outcome);
                    let least = best.as_ref().map_or(greatest(&placed), |best| best.0);
                    if now < least * (1.0 - 1e-12) {
                        best = Some((now, tried, outcome));
                    }
                }
            }
        }
        let Some((_, tried, outcome)) = best else {
            break;
        };
        (divided, placed) = (tried, outcome);
    }
    Ok(Balanced {
        greatest: greatest(&placed),
        bound: least_greatest(load, slots),
        devices: placed.into_iter().flat_map(|p| p.devices).collect(),
    })
}

fn pairs(n: usize, m: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..n).flat_map(move |i| (0..m).map(move |j| (i, j)))
}

fn check(load: &[f64], slots: Slots) -> Result<(), PlacementError> {
    let Slots {
        devices,
        per_device,
    } = slots;
    let experts = load.len();
    if experts == 0 {
        return Err(PlacementError::Invalid("the layer has no experts".into()));
    }
    if devices == 0 || per_device == 0 {
        return Err(PlacementError::Invalid(format!(
            "{devices} devices with {per_device} slots hold no experts; give every device a slot"
        )));
    }
    if devices * per_device < experts {
        return Err(PlacementError::Infeasible(format!(
            "{devices} devices with {per_device} slots hold {} experts, the layer has {experts}; \
             give {} slots a device",
            devices * per_device,
            experts.div_ceil(devices)
        )));
    }
    if per_device > experts {
        return Err(PlacementError::Infeasible(format!(
            "a device has {per_device} slots for {experts} experts and would hold one of them \
             twice; give at most {experts}"
        )));
    }
    if let Some(expert) = load
        .iter()
        .position(|load| !load.is_finite() || *load < 0.0)
    {
        return Err(PlacementError::Invalid(format!(
            "expert {expert} has load {}; loads are finite and not negative",
            load[expert]
        )));
    }
    Ok(())
}

/// Replicas of every expert: each further one goes where the load a replica is greatest.
fn replicate(load: &[f64], devices: usize, n_slots: usize) -> Vec<usize> {
    let mut counts = vec![1usize; load.len()];
    let mut heap: BinaryHeap<(Ordered, Reverse<usize>)> = load
        .iter()
        .enumerate()
        .map(|(expert, load)| (Ordered(*load), Reverse(expert)))
        .collect();
    let mut left = n_slots - load.len();
    while left > 0 {
        let Some((_, Reverse(expert))) = heap.pop() else {
            break;
        };
        if counts[expert] < devices {
            counts[expert] += 1;
            left -= 1;
            let each = load[expert] / counts[expert] as f64;
            heap.push((Ordered(each), Reverse(expert)));
        }
    }
    counts
}

#[derive(Clone, Copy, PartialEq)]
struct Ordered(f64);

impl Eq for Ordered {}

impl PartialOrd for Ordered {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ordered {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// A bound on the greatest load: the mean; and the least load T at which `Σ ⌈load / T⌉` replicas fit
/// the slots, since a device takes at most T of an expert.
pub fn least_greatest(load: &[f64], slots: Slots) -> f64 {
    let n_slots = slots.devices * slots.per_device;
    let mean = load.iter().sum::<f64>() / slots.devices as f64;
    let needed = |greatest: f64| -> f64 {
        let replicas = load.iter().map(|load| (load / greatest).ceil().max(1.0));
        replicas.sum()
    };
    // `needed` falls as T grows and jumps at load / k.
    let mut jumps: Vec<f64> = load
        .iter()
        .flat_map(|load| {
            let jumps = (1..=slots.devices).map(move |k| load / k as f64);
            jumps.take_while(move |jump| *jump > mean)
        })
        .collect();
    jumps.push(mean);
    jumps.sort_by(f64::total_cmp);
    let at = jumps.partition_point(|jump| needed(jump * (1.0 + 1e-12)) > n_slots as f64);
    jumps.get(at).copied().unwrap_or(mean)
}

/// Replicas on devices.
struct Packing {
    /// Load of a replica, by expert.
    each: Vec<f64>,
    devices: Vec<Vec<u16>>,
    loads: Vec<f64>,
}

impl Packing {
    /// Packs the replicas with the greatest load first, each onto the least busy device that has a
    /// slot and lacks the expert; where the last slots are on devices that have it, by exchange.
    fn of(load: &[f64], counts: &[usize], slots: Slots) -> Self {
        let each: Vec<f64> = load
            .iter()
            .zip(counts)
            .map(|(load, count)| load / *count as f64)
            .collect();
        let mut order: Vec<usize> = (0..load.len()).collect();
        order.sort_by(|a, b| each[*b].total_cmp(&each[*a]).then(a.cmp(b)));
        let mut packing = Self {
            each,
            devices: vec![Vec::with_capacity(slots.per_device); slots.devices],
            loads: vec![0.0; slots.devices],
        };
        for expert in order {
            for _ in 0..counts[expert] {
                packing.put(expert as u16, slots.per_device);
            }
        }
        packing
    }

    fn put(&mut self, expert: u16, per_device: usize) {
        let open = (0..self.devices.len()).filter(|d| self.devices[*d].len() < per_device);
        let least = |best: Option<usize>, device: usize| match best {
            Some(best) if self.loads[best] <= self.loads[device] => Some(best),
            _ => Some(device),
        };
        let lacking = open.clone().filter(|d| !self.devices[*d].contains(&expert));
        if let Some(device) = lacking.fold(None, least) {
            self.devices[device].push(expert);
            self.loads[device] += self.each[usize::from(expert)];
            return;
        }
        // Every open device has the expert: another device, full and lacking it, gives one away.
        let Some(open) = open.fold(None, least) else {
            return;
        };
        let full = (0..self.devices.len()).filter(|d| !self.devices[*d].contains(&expert));
        for device in full {
            let given = self.devices[device]
                .iter()
                .position(|other| !self.devices[open].contains(other));
            if let Some(at) = given {
                let other = std::mem::replace(&mut self.devices[device][at], expert);
                self.devices[open].push(other);
                let (gained, lost) = (
                    self.each[usize::from(expert)],
                    self.each[usize::from(other)],
                );
                self.loads[device] += gained - lost;
                self.loads[open] += lost;
                return;
            }
        }
    }

    fn busiest(&self) -> usize {
        (0..self.loads.len()).fold(0, |best, device| {
            if self.loads[device] > self.loads[best] {
                device
            } else {
                best
            }
        })
    }

    fn greatest(&self) -> f64 {
        self.loads[self.busiest()]
    }

    /// Makes the best exchange between the busiest device and any other until none helps.
    fn exchange(&mut self) {
        /// Exchanges that one layer needs at most; a handful a device is usual.
        const MOST: usize = 4096;
        for _ in 0..MOST {
            let from = self.busiest();
            let greatest = self.loads[from];
            let mut best = (greatest * (1.0 - 1e-9), None);
            for to in 0..self.devices.len() {
                let room = greatest - self.loads[to];
                // Even the ideal exchange leaves the mean of both.
                if to == from || greatest - 0.5 * room >= best.0 {
                    continue;
                }
                for (i, a) in self.devices[from].iter().enumerate() {
                    let heavy = self.each[usize::from(*a)];
                    for (j, b) in self.devices[to].iter().enumerate() {
                        let moved = heavy - self.each[usize::from(*b)];
                        let after = (greatest - moved).max(greatest - room + moved);
                        if after < best.0
                            && !self.devices[to].contains(a)
                            && !self.devices[from].contains(b)
                        {
                            best = (after, Some((to, i, j, moved)));
                        }
                    }
                }
            }
            let (_, Some((to, i, j, moved))) = best else {
                return;
            };
            let (a, b) = (self.devices[from][i], self.devices[to][j]);
            self.devices[from][i] = b;
            self.devices[to][j] = a;
            self.loads[from] -= moved;
            self.loads[to] += moved;
        }
    }
}

/// The best packing with one replica moved from one expert to another, if it lowers the greatest load.
fn move_replica(
    load: &[f64],
    counts: &[usize],
    slots: Slots,
    greatest: f64,
) -> Option<(Vec<usize>, Packing)> {
    let mut best: Option<(Vec<usize>, Packing)> = None;
    let mut least = greatest * (1.0 - 1e-12);
    for (from, to) in pairs(load.len(), load.len()) {
        if from == to || counts[from] < 2 || counts[to] >= slots.devices {
            continue;
        }
        let mut counts = counts.to_vec();
        counts[from] -= 1;
        counts[to] += 1;
        let mut packing = Packing::of(load, &counts, slots);
        packing.exchange();
        if packing.greatest() < least {
            least = packing.greatest();
            best = Some((counts, packing));
        }
    }
    best
}
