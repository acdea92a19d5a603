//! What a placement does for a program that runs: the devices' loads and the transitions that stay.
//!
//! Enters: the experts that routers chose in every step, and where experts are. Leaves: the greatest load
//! of a device and the share of transitions kept on one, with experts in order and as they are placed.
//! Invariant: both are counted from the same tokens, so they differ by the placement alone.

use meshweave_dsl::diagnostics::Class;
use meshweave_runtime::executor::Session as Execution;
use serde::{Deserialize, Serialize};

use super::placed::Relabeling;
use super::runtime_error;
use crate::error::{Error, Result};

/// Counts while a program runs.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Tally {
    /// Outputs with the chosen experts of every layer.
    chosen: Vec<String>,
    /// Where experts have replicas, outputs with the slots that took them, and the slots of a device.
    places: Option<(Vec<String>, usize)>,
    top_k: usize,
    in_order: Counts,
    placed: Counts,
}

#[derive(Clone, Default, Serialize, Deserialize)]
struct Counts {
    /// Assignments by layer and device.
    loads: Vec<Vec<f64>>,
    kept: u64,
    transitions: u64,
}

/// What was counted; of a pair, with experts in order and as they were placed.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Tallied {
    /// Load of the busiest device over the mean, mean of the layers.
    pub greatest_load: (f64, f64),
    /// Share of transitions between layers that stay on a device; none with one layer.
    pub kept: Option<(f64, f64)>,
}

impl Tally {
    pub fn new(chosen: Vec<String>, places: Option<(Vec<String>, usize)>, top_k: usize) -> Self {
        Self {
            chosen,
            places,
            top_k,
            in_order: Counts::default(),
            placed: Counts::default(),
        }
    }

    /// Counts the last step, in which experts were where `relabeling` says. Linear in the assignments,
    /// times the experts of a token.
    ///
    /// # Errors
    /// The execution lacks the outputs.
    pub fn after_step(&mut self, execution: &Execution, relabeling: &Relabeling) -> Result<()> {
        let chosen = numbers(execution, &self.chosen)?;
        let places = match &self.places {
            Some((names, _)) => Some(numbers(execution, names)?),
            None => None,
        };
        // The devices of every assignment, by layer; none of a token that was dropped.
        let mut devices: [Vec<Vec<Option<usize>>>; 2] = Default::default();
        for (layer, chosen) in chosen.iter().enumerate() {
            let mut both: [Vec<Option<usize>>; 2] = Default::default();
            for (idx, position) in chosen.iter().enumerate() {
                let position = usize::try_from(*position).ok();
                let expert = position.and_then(|position| relabeling.expert(layer, position));
                let place = match (&self.places, &places) {
                    (Some((_, slots)), Some(places)) => places
                        .get(layer)
                        .and_then(|places| usize::try_from(*places.get(idx)?).ok())
                        .map(|place| place / slots.max(&1)),
                    _ => position.map(|position| relabeling.device(position)),
                };
                let began = expert.map(|expert| relabeling.device(expert));
                both[0].push(began.filter(|_| place.is_some()));
                both[1].push(place);
            }
            let [began, placed] = both;
            devices[0].push(began);
            devices[1].push(placed);
        }
        let n_devices = relabeling.n_devices();
        let [began, placed] = &devices;
        self.in_order.add(began, n_devices, self.top_k);
        self.placed.add(placed, n_devices, self.top_k);
        Ok(())
    }

    /// What was counted; `None` before the first step.
    pub fn finish(&self) -> Option<Tallied> {
        let loads = (self.in_order.greatest_load()?, self.placed.greatest_load()?);
        let kept = self.in_order.share_kept().zip(self.placed.share_kept());
        Some(Tallied {
            greatest_load: loads,
            kept,
        })
    }
}

impl Counts {
    fn add(&mut self, layers: &[Vec<Option<usize>>], n_devices: usize, top_k: usize) {
        self.loads.resize(layers.len(), vec![0.0; n_devices]);
        for (loads, devices) in self.loads.iter_mut().zip(layers) {
            for device in devices.iter().flatten() {
                if let Some(load) = loads.get_mut(*device) {
                    *load += 1.0;
                }
            }
        }
        for pair in layers.windows(2) {
            let [before, after] = pair else { continue };
            let tokens = before.chunks(top_k.max(1)).zip(after.chunks(top_k.max(1)));
            for (before, after) in tokens {
                for from in before.iter().flatten() {
                    for to in after.iter().flatten() {
                        self.transitions += 1;
                        self.kept += u64::from(from == to);
                    }
                }
            }
        }
    }

    fn greatest_load(&self) -> Option<f64> {
        let over_mean = self.loads.iter().map(|loads| {
            let sum: f64 = loads.iter().sum();
            let greatest = loads.iter().copied().fold(0.0, f64::max);
            if sum > 0.0 {
                greatest * loads.len() as f64 / sum
            } else {
                1.0
            }
        });
        let sum: f64 = over_mean.sum();
        (!self.loads.is_empty()).then(|| sum / self.loads.len() as f64)
    }

    fn share_kept(&self) -> Option<f64> {
        (self.transitions > 0).then(|| self.kept as f64 / self.transitions as f64)
    }
}

/// The whole numbers of outputs.
///
/// # Errors
/// The execution lacks one, or it holds others.
pub(super) fn numbers(execution: &Execution, names: &[String]) -> Result<Vec<Vec<i32>>> {
    let all = names.iter().map(|name| {
        let value = execution.get(name).map_err(runtime_error)?;
        let numbers = value.as_i32().map(<[i32]>::to_vec);
        numbers.ok_or_else(|| {
            Error::plain(
                Class::Internal,
                format!("`{name}` holds no numbers of experts"),
            )
        })
    });
    all.collect()
}
