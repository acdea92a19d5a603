//! Balance while a model runs: who takes how much of a replicated expert, and few moves that help.
//!
//! Enters: loads of experts as they were measured, and where the experts are. Leaves: shares of
//! replicas, or exchanges of experts between devices.
//! Invariant: shares of an expert's replicas add up to its load; exchanges keep every device's number of
//! experts, and there are no more of them than was allowed.

use good_lp::{
    Expression, ResolutionError, Solution, SolverModel, Variable, constraint, variable, variables,
};

use super::PlacementError;

/// What the replicas of a layer take.
#[derive(Clone, Debug, PartialEq)]
pub struct Shares {
    /// Load taken by each slot, device by device.
    pub of_slots: Vec<Vec<f64>>,
    /// The greatest load of a device, which no other shares make smaller.
    pub greatest: f64,
}

/// Divides every expert's load among its replicas so that the busiest device has least to do: the
/// linear program min T, Σ_g f_eg = w_e, Σ_e f_eg ≤ T, f ≥ 0 (DeepSeek's LPLB solves the same).
///
/// `devices` lists the experts of every device.
///
/// # Errors
/// `Invalid` for an expert with load but without a replica; `Exhausted` when the solver fails.
pub fn shares(load: &[f64], devices: &[Vec<u16>]) -> Result<Shares, PlacementError> {
    let mut places: Vec<Vec<(usize, usize)>> = vec![Vec::new(); load.len()];
    for (device, held) in devices.iter().enumerate() {
        for (slot, expert) in held.iter().enumerate() {
            if let Some(places) = places.get_mut(usize::from(*expert)) {
                places.push((device, slot));
            }
        }
    }
    let idle = places
        .iter()
        .zip(load)
        .position(|(places, load)| places.is_empty() && *load > 0.0);
    if let Some(expert) = idle {
        return Err(PlacementError::Invalid(format!(
            "expert {expert} has a load of {} and is on no device: give it a slot",
            load[expert]
        )));
    }
    let total: f64 = load.iter().sum();
    let scale = if total > 0.0 {
        devices.len() as f64 / total
    } else {
        1.0
    };
    let mut program = variables!();
    let greatest = program.add(variable().min(0.0));
    let mut loads: Vec<Expression> = vec![greatest * -1.0; devices.len()];
    let mut rows = Vec::new();
    // What an expert with one replica takes is known; the others choose.
    let mut chosen: Vec<Vec<(usize, usize, Variable)>> = vec![Vec::new(); load.len()];
    for ((places, chosen), load) in places.iter().zip(&mut chosen).zip(load) {
        match places.as_slice() {
            [] => {}
            [(device, _)] => loads[*device] += load * scale,
            several => {
                for (device, slot) in several {
                    let share = program.add(variable().min(0.0));
                    loads[*device] += share;
                    chosen.push((*device, *slot, share));
                }
                let sum: Expression = chosen.iter().map(|(.., share)| *share).sum();
                rows.push(constraint!(sum == load * scale));
            }
        }
    }
    rows.extend(loads.into_iter().map(|load| constraint!(load <= 0.0)));
    let unsolved = program.minimise(greatest);
    #[cfg(feature = "highs")]
    let mut model = good_lp::highs(unsolved).set_option("threads", 1);
    #[cfg(not(feature = "highs"))]
    let mut model = good_lp::microlp(unsolved);
    for row in rows {
        model.add_constraint(row);
    }
    let solution = model.solve().map_err(|error: ResolutionError| {
        PlacementError::Exhausted(format!("no shares of replicas were found: {error}"))
    })?;
    let mut of_slots: Vec<Vec<f64>> = devices.iter().map(|held| vec![0.0; held.len()]).collect();
    for ((places, chosen), load) in places.iter().zip(&chosen).zip(load) {
        match chosen.as_slice() {
            [] => {
                for (device, slot) in places {
                    of_slots[*device][*slot] = *load;
                }
            }
            several => {
                // The solver's tolerance is put right: shares add up to the load.
                let values = several
                    .iter()
                    .map(|(.., share)| solution.value(*share).max(0.0));
                let values: Vec<f64> = values.collect();
                let sum: f64 = values.iter().sum();
                for ((device, slot, _), value) in several.iter().zip(values) {
                    let part = if sum > 0.0 {
                        value / sum
                    } else {
                        1.0 / several.len() as f64
                    };
                    of_slots[*device][*slot] = load * part;
                }
            }
        }
    }
    let loads = of_slots.iter().map(|slots| slots.iter().sum::<f64>());
    Ok(Shares {
        greatest: loads.fold(0.0, f64::max),
        of_slots,
    })
}

/// Exchanges of slots between the busiest device and any other, best first, while one helps and there
/// are fewer than `most`; `slots` is the load of every slot, device by device.
///
/// Each exchange is a pair of (device, slot). O(most · devices · slots²).
pub fn exchanges(slots: &[Vec<f64>], most: usize) -> Vec<[(usize, usize); 2]> {
    let mut slots = slots.to_vec();
    let mut made = Vec::new();
    while made.len() < most {
        let loads: Vec<f64> = slots.iter().map(|slots| slots.iter().sum()).collect();
        let busiest = (0..loads.len()).fold(0, |busiest, device| {
            if loads[device] > loads[busiest] {
                device
            } else {
                busiest
            }
        });
        let Some(&greatest) = loads.get(busiest) else {
            break;
        };
        let mut best: Option<(f64, usize, usize, usize)> = None;
        for other in (0..loads.len()).filter(|other| *other != busiest) {
            for (own, given) in slots[busiest].iter().enumerate() {
                for (theirs, taken) in slots[other].iter().enumerate() {
                    let moved = given - taken;
                    let after = (greatest - moved).max(loads[other] + moved);
                    if after < greatest && best.is_none_or(|(least, ..)| after < least) {
                        best = Some((after, own, other, theirs));
                    }
                }
            }
        }
        let Some((_, own, other, theirs)) = best else {
            break;
        };
        let given = slots[busiest][own];
        slots[busiest][own] = std::mem::replace(&mut slots[other][theirs], given);
        made.push([(busiest, own), (other, theirs)]);
    }
    made
}
