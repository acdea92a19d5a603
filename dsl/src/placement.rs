//! Placements of experts on devices, and how they are written down.
//!
//! Enters: the experts that every device holds in every layer, or JSON. Leaves: JSON.
//! Invariant: every device holds as many experts as any other, in every layer; no device holds one
//! twice; every expert has a replica.
//!
//! The JSON is `{"devices", "per_node", "physical_to_logical_map"}`, where the map lists for every
//! layer the expert of every slot, device by device: SGLang's `--init-expert-location` and vLLM's
//! EPLB take the same list of lists.

use serde::{Deserialize, Serialize};

/// What a placement says wrongly.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacementTextError {
    #[error("{0}")]
    Invalid(String),
}

/// The experts of every device in every layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Text", into = "Text")]
pub struct Placement {
    per_node: usize,
    experts: usize,
    /// By layer, by device.
    layers: Vec<Vec<Vec<u16>>>,
}

#[derive(Clone, Serialize, Deserialize)]
struct Text {
    devices: usize,
    per_node: usize,
    /// Negative for an empty slot, which other programs may write.
    physical_to_logical_map: Vec<Vec<i32>>,
}

impl Placement {
    /// A placement from the experts of every device: `layers[layer][device]`.
    ///
    /// # Errors
    /// Devices with different numbers of experts, an expert twice on a device or on none, nodes that
    /// do not divide the devices.
    pub fn new(layers: Vec<Vec<Vec<u16>>>, per_node: usize) -> Result<Self, PlacementTextError> {
        let invalid = |text: String| Err(PlacementTextError::Invalid(text));
        let Some(first) = layers.first() else {
            return invalid("a placement has at least one layer".into());
        };
        let devices = first.len();
        let slots = first.first().map_or(0, Vec::len);
        if devices == 0 || slots == 0 {
            return invalid(format!(
                "{devices} devices with {slots} slots hold no experts; give every device a slot"
            ));
        }
        if per_node == 0 || !devices.is_multiple_of(per_node) {
            return invalid(format!(
                "{devices} devices do not make nodes of {per_node}; give a divisor of {devices}"
            ));
        }
        let all = layers.iter().flatten().flatten();
        let experts = usize::from(all.copied().max().unwrap_or(0)) + 1;
        for (layer, of_layer) in layers.iter().enumerate() {
            if of_layer.len() != devices {
                return invalid(format!(
                    "layer {layer} has {} devices, layer 0 has {devices}",
                    of_layer.len()
                ));
            }
            let mut is_placed = vec![false; experts];
            for (device, held) in of_layer.iter().enumerate() {
                if held.len() != slots {
                    return invalid(format!(
                        "device {device} holds {} experts in layer {layer}, others hold {slots}",
                        held.len()
                    ));
                }
                for (slot, expert) in held.iter().enumerate() {
                    if held[..slot].contains(expert) {
                        return invalid(format!(
                            "device {device} holds expert {expert} twice in layer {layer}; \
                             a replica helps on another device only"
                        ));
                    }
                    is_placed[usize::from(*expert)] = true;
                }
            }
            if let Some(expert) = is_placed.iter().position(|is_placed| !is_placed) {
                return invalid(format!(
                    "expert {expert} is on no device in layer {layer}, though {experts} experts \
                     occur (0 to {})",
                    experts - 1
                ));
            }
        }
        Ok(Self {
            per_node,
            experts,
            layers,
        })
    }

    /// A placement without replicas from the device of every expert: `devices_of[layer][expert]`.
    ///
    /// # Errors
    /// See [`Placement::new`].
    pub fn of_division(
        devices_of: &[Vec<u16>],
        devices: usize,
        per_node: usize,
    ) -> Result<Self, PlacementTextError> {
        let layers = devices_of.iter().map(|layer| {
            let mut held = vec![Vec::new(); devices];
            for (expert, device) in layer.iter().enumerate() {
                if let Some(held) = held.get_mut(usize::from(*device)) {
                    held.push(expert as u16);
                }
            }
            held
        });
        Self::new(layers.collect(), per_node)
    }

    pub fn n_layers(&self) -> usize {
        self.layers.len()
    }

    /// Experts a layer.
    pub fn n_experts(&self) -> usize {
        self.experts
    }

    pub fn n_devices(&self) -> usize {
        self.layers[0].len()
    }

    /// Devices of a node.
    pub fn per_node(&self) -> usize {
        self.per_node
    }

    /// Experts that a device holds in a layer.
    pub fn slots(&self) -> usize {
        self.layers[0][0].len()
    }

    /// The experts of every device in a layer.
    pub fn layer(&self, layer: usize) -> &[Vec<u16>] {
        &self.layers[layer]
    }

    /// The devices of every expert in a layer.
    pub fn devices_of(&self, layer: usize) -> Vec<Vec<u16>> {
        let mut devices_of = vec![Vec::new(); self.experts];
        for (device, held) in self.layers[layer].iter().enumerate() {
            for expert in held {
                devices_of[usize::from(*expert)].push(device as u16);
            }
        }
        devices_of
    }

    /// The device of every expert in every layer, where no expert has replicas.
    pub fn division(&self) -> Option<Vec<Vec<u16>>> {
        let has_replicas = self.n_devices() * self.slots() != self.experts;
        let devices_of = |layer| {
            let devices = self.devices_of(layer).into_iter();
            devices.map(|devices| devices[0]).collect()
        };
        (!has_replicas).then(|| (0..self.layers.len()).map(devices_of).collect())
    }

    /// Experts that devices must receive to get here from `present`; devices keep their numbers.
    pub fn moves_from(&self, present: &Self) -> usize {
        let layers = self.layers.iter().zip(&present.layers);
        let devices = layers.flat_map(|(new, old)| new.iter().zip(old));
        devices
            .map(|(new, old)| new.iter().filter(|expert| !old.contains(expert)).count())
            .sum()
    }

    /// The same placement on other devices: what device `d` held, `to[d]` holds.
    ///
    /// # Errors
    /// `to` is not a permutation of the devices.
    pub fn renumbered(&self, to: &[usize]) -> Result<Self, PlacementTextError> {
        let mut seen = vec![false; self.n_devices()];
        for device in to {
            if let Some(seen) = seen.get_mut(*device) {
                *seen = true;
            }
        }
        if to.len() != seen.len() || seen.contains(&false) {
            return Err(PlacementTextError::Invalid(format!(
                "{to:?} does not renumber {} devices",
                seen.len()
            )));
        }
        let layers = self.layers.iter().map(|layer| {
            let mut renumbered = vec![Vec::new(); layer.len()];
            for (held, device) in layer.iter().zip(to) {
                renumbered[*device] = held.clone();
            }
            renumbered
        });
        Self::new(layers.collect(), self.per_node)
    }
}

impl TryFrom<Text> for Placement {
    type Error = PlacementTextError;

    fn try_from(text: Text) -> Result<Self, Self::Error> {
        let devices = text.devices;
        let mut layers = Vec::with_capacity(text.physical_to_logical_map.len());
        for (layer, slots) in text.physical_to_logical_map.iter().enumerate() {
            if devices == 0 || slots.is_empty() || !slots.len().is_multiple_of(devices) {
                return Err(PlacementTextError::Invalid(format!(
                    "layer {layer} lists {} slots, which {devices} devices do not share evenly",
                    slots.len()
                )));
            }
            let per_device = slots.len() / devices;
            let mut of_layer = vec![Vec::with_capacity(per_device); devices];
            for (slot, expert) in slots.iter().enumerate() {
                let (device, slot) = (slot / per_device, slot % per_device);
                let expert = u16::try_from(*expert).map_err(|_| {
                    PlacementTextError::Invalid(if *expert < 0 {
                        format!(
                            "slot {slot} of device {device} is empty in layer {layer}; give it an expert that the device does not hold yet, or place with fewer slots"
                        )
                    } else {
                        format!(
                            "slot {slot} of device {device} holds expert {expert} in layer {layer}; there are no experts above {}",
                            u16::MAX
                        )
                    })
                })?;
                of_layer[device].push(expert);
            }
            layers.push(of_layer);
        }
        Self::new(layers, text.per_node)
    }
}

impl From<Placement> for Text {
    fn from(placement: Placement) -> Self {
        Self {
            devices: placement.n_devices(),
            per_node: placement.per_node,
            physical_to_logical_map: placement
                .layers
                .into_iter()
                .map(|layer| layer.into_iter().flatten().map(i32::from).collect())
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn swapped() -> Placement {
        let layers = vec![vec![vec![0, 1], vec![2, 3]], vec![vec![3, 1], vec![2, 0]]];
        Placement::new(layers, 1).unwrap()
    }

    #[test]
    fn json_reads_back() {
        let text = serde_json::to_string(&swapped()).unwrap();
        assert_eq!(
            text,
            r#"{"devices":2,"per_node":1,"physical_to_logical_map":[[0,1,2,3],[3,1,2,0]]}"#
        );
        assert_eq!(serde_json::from_str::<Placement>(&text).unwrap(), swapped());
    }

    #[test]
    fn divisions_and_moves() {
        let division = swapped().division().unwrap();
        assert_eq!(division, [[0, 0, 1, 1], [1, 0, 1, 0]]);
        let again = Placement::of_division(&division, 2, 1).unwrap();
        assert_eq!(again.moves_from(&swapped()), 0);
        let exchanged = swapped().renumbered(&[1, 0]).unwrap();
        assert_eq!(exchanged.moves_from(&swapped()), 8);
    }

    #[test]
    fn wrong_placements_are_named() {
        let message = |layers| Placement::new(layers, 1).unwrap_err().to_string();
        let twice = vec![vec![vec![0, 0], vec![1, 2]]];
        assert!(message(twice).contains("device 0 holds expert 0 twice in layer 0"));
        let missing = vec![vec![vec![0], vec![2]]];
        assert!(message(missing).contains("expert 1 is on no device in layer 0"));
        let uneven = vec![vec![vec![0, 1], vec![2]]];
        assert!(message(uneven).contains("device 1 holds 1 experts in layer 0, others hold 2"));
    }
}
