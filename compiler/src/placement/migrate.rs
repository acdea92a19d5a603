//! The cheapest way from one placement to another.
//!
//! Enters: a placement and the present one. Leaves: the placement with its devices renumbered so
//! that as few experts as possible move.
//! Invariant: devices of a node stay together, so nothing that the placement keeps local changes.

use meshweave_dsl::placement::Placement;

use super::PlacementError;
use super::assign::assign;

/// Renumbers nodes, and devices within nodes, to move the fewest experts: exact, by assignments of
/// nodes whose profits are assignments of devices. O(devices² · slots · layers + devices³).
///
/// # Errors
/// The present placement has other devices or layers.
pub fn nearest(placement: &Placement, present: &Placement) -> Result<Placement, PlacementError> {
    let devices = placement.n_devices();
    let per_node = placement.per_node();
    if present.n_devices() != devices || present.n_layers() != placement.n_layers() {
        return Err(PlacementError::Invalid(format!(
            "the present placement has {} layers on {} devices, the new one {} on {devices}",
            present.n_layers(),
            present.n_devices(),
            placement.n_layers()
        )));
    }
    // Experts that stay where they are if device `new` takes the place of device `old`.
    let mut stay = vec![0f64; devices * devices];
    for layer in 0..placement.n_layers() {
        let places = present.devices_of(layer);
        for (new, held) in placement.layer(layer).iter().enumerate() {
            for expert in held {
                let old = places.get(usize::from(*expert)).into_iter().flatten();
                for old in old {
                    stay[new * devices + usize::from(*old)] += 1.0;
                }
            }
        }
    }
    let nodes = devices / per_node;
    let within = |new: usize, old: usize| {
        let profits: Vec<f64> = (0..per_node * per_node)
            .map(|at| {
                let (row, column) = (at / per_node, at % per_node);
                stay[(new * per_node + row) * devices + old * per_node + column]
            })
            .collect();
        assign(&profits, per_node, 1)
    };
    let profits: Vec<f64> = (0..nodes * nodes)
        .map(|at| within(at / nodes, at % nodes).profit)
        .collect();
    let node_of = assign(&profits, nodes, 1).column_of;
    let mut to = vec![0; devices];
    for (new, old) in node_of.iter().enumerate() {
        let old = usize::from(*old);
        for (at, column) in within(new, old).column_of.iter().enumerate() {
            to[new * per_node + at] = old * per_node + usize::from(*column);
        }
    }
    placement
        .renumbered(&to)
        .map_err(|error| PlacementError::Internal(error.to_string()))
}
