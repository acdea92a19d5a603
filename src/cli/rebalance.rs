//! `meshweave run --rebalance`: experts change places between steps, so that devices have equal loads.
//!
//! Enters: an execution after each of its steps. Leaves: the same with some experts exchanged between
//! devices, as `--moves` allows; where experts have replicas, with other shares of these.
//! Invariant: an exchange moves an expert's weights, moments and column of the router together, and a
//! share sends tokens to another copy of the same weights, so what the model computes stays the same;
//! loads are measured, of what routers chose since the last time.

use meshweave_compiler::placement::rebalance::{exchanges, shares};
use meshweave_compiler::placement::replicas::{Layer, N_TURNS, Replicas};
use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::TensorType;
use meshweave_runtime::executor::Session as Execution;
use meshweave_runtime::tensor::{Elements, HostTensor};
use serde::{Deserialize, Serialize};

use super::place::placement_error;
use super::placed::{Moved, Relabeling};
use super::runtime_error;
use super::tally::numbers;
use crate::error::Result;

/// When experts change places, and how many.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Rhythm {
    /// Steps from one time to the next.
    pub every: usize,
    /// Experts that may move each time, over all layers.
    pub moves: usize,
}

/// Exchanges experts while a program runs.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Rebalancer {
    rhythm: Rhythm,
    /// The chosen experts of every layer, outputs of the program.
    chosen: Vec<String>,
    /// Where experts have replicas, these and the tables of their turns.
    replicas: Option<(Replicas, Vec<String>)>,
    /// Assignments since the last time, by layer and position.
    loads: Vec<Vec<f64>>,
    n_steps: usize,
    done: Rebalanced,
}

/// What was done in a run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Rebalanced {
    /// Experts moved, each time.
    pub moved: Vec<usize>,
    /// Bytes of their weights and moments, over all times.
    pub moved_bytes: u64,
    /// Mean over greatest load of a device, mean of the layers, each time: before, and as it would have
    /// been with the experts, or the shares of replicas, as they are afterwards.
    pub balancedness: Vec<(f64, f64)>,
}

impl Rebalancer {
    /// `chosen` are the outputs with the chosen experts of the layers; `replicas` those that experts have,
    /// with the names of the tables of their turns.
    pub fn new(
        rhythm: Rhythm,
        chosen: Vec<String>,
        replicas: Option<(Replicas, Vec<String>)>,
    ) -> Self {
        Self {
            loads: vec![Vec::new(); chosen.len()],
            rhythm,
            chosen,
            replicas,
            n_steps: 0,
            done: Rebalanced::default(),
        }
    }

    /// Counts the loads of the last step and, when it is time, moves experts, which are where
    /// `relabeling` says.
    ///
    /// # Errors
    /// The execution lacks the outputs, or a tensor cannot be moved.
    pub fn after_step(
        &mut self,
        execution: &mut Execution,
        relabeling: &mut Relabeling,
    ) -> Result<()> {
        let chosen = numbers(execution, &self.chosen)?;
        for (positions, loads) in chosen.iter().zip(&mut self.loads) {
            loads.resize(relabeling.n_experts(), 0.0);
            for position in positions.iter().filter_map(|at| usize::try_from(*at).ok()) {
                if let Some(load) = loads.get_mut(position) {
                    *load += 1.0;
                }
            }
        }
        self.n_steps += 1;
        if self.n_steps.is_multiple_of(self.rhythm.every) {
            if self.replicas.is_some() {
                self.share(execution)?;
            } else {
                self.exchange(execution, relabeling)?;
            }
            self.loads.iter_mut().for_each(|loads| loads.fill(0.0));
        }
        Ok(())
    }

    /// What was done.
    pub fn finish(self) -> Rebalanced {
        self.done
    }

    fn exchange(&mut self, execution: &mut Execution, relabeling: &mut Relabeling) -> Result<()> {
        let size = relabeling.n_experts() / relabeling.n_devices().max(1);
        let mut slots: Vec<Vec<Vec<f64>>> = Vec::with_capacity(self.loads.len());
        for loads in &self.loads {
            slots.push(loads.chunks(size.max(1)).map(<[f64]>::to_vec).collect());
        }
        let before = mean_balancedness(&slots);
        let mut swaps: Vec<Vec<(usize, usize)>> = vec![Vec::new(); slots.len()];
        let mut n_moved = 0;
        let mut settled = vec![false; slots.len()];
        // The worst layer first; each exchange moves two experts.
        while n_moved + 2 <= self.rhythm.moves {
            let open = (0..slots.len()).filter(|layer| !settled[*layer]);
            let worst = open
                .map(|layer| (balancedness(&slots[layer]), layer))
                .min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            let Some((_, layer)) = worst else { break };
            let Some(&[(a, i), (b, j)]) = exchanges(&slots[layer], 1).first() else {
                settled[layer] = true;
                continue;
            };
            let load = slots[layer][a][i];
            slots[layer][a][i] = std::mem::replace(&mut slots[layer][b][j], load);
            swaps[layer].push((a * size + i, b * size + j));
            n_moved += 2;
        }
        let mut moved = Moved::default();
        for (layer, swaps) in swaps.iter().enumerate() {
            moved += relabeling.exchange(execution, layer, swaps)?;
        }
        self.done.moved.push(n_moved);
        self.done.moved_bytes += moved.bytes;
        self.done
            .balancedness
            .push((before, mean_balancedness(&slots)));
        Ok(())
    }

    /// Gives replicas the shares that leave the busiest device least to do.
    fn share(&mut self, execution: &mut Execution) -> Result<()> {
        let Some((replicas, tables)) = &mut self.replicas else {
            return Ok(());
        };
        let (mut before, mut after) = (Vec::new(), Vec::new());
        for ((layer, table), loads) in replicas.layers.iter_mut().zip(tables).zip(&self.loads) {
            before.push(taken(layer, loads));
            let held: Vec<Vec<u16>> = layer
                .held
                .iter()
                .map(|held| held.iter().map(|position| *position as u16).collect())
                .collect();
            let found = shares(loads, &held).map_err(placement_error)?;
            *layer = layer.shared(&found.of_slots).map_err(placement_error)?;
            after.push(taken(layer, loads));
            let shape = [("expert", layer.turns.len()), ("turn", N_TURNS)];
            let turns = layer.turns.iter().flatten().map(|place| *place as i32);
            let ty = TensorType::new(DType::I32, shape);
            let value =
                HostTensor::new(ty, Elements::I32(turns.collect())).map_err(runtime_error)?;
            execution.set(table, &value).map_err(runtime_error)?;
        }
        self.done.moved.push(0);
        self.done
            .balancedness
            .push((mean_balancedness(&before), mean_balancedness(&after)));
        Ok(())
    }
}

/// What every slot takes of its expert's load by the turns of a layer, device by device.
fn taken(layer: &Layer, loads: &[f64]) -> Vec<Vec<f64>> {
    let mut taken: Vec<Vec<f64>> = layer
        .held
        .iter()
        .map(|held| vec![0.0; held.len()])
        .collect();
    let slots = taken.first().map_or(1, |held| held.len().max(1));
    for (turns, load) in layer.turns.iter().zip(loads) {
        for place in turns {
            let slot = taken.get_mut(place / slots);
            if let Some(slot) = slot.and_then(|held| held.get_mut(place % slots)) {
                *slot += load / turns.len() as f64;
            }
        }
    }
    taken
}

fn balancedness(slots: &[Vec<f64>]) -> f64 {
    let loads = slots.iter().map(|slots| slots.iter().sum::<f64>());
    let (sum, greatest) = loads.fold((0.0, 0.0), |(sum, greatest): (f64, f64), load| {
        (sum + load, greatest.max(load))
    });
    if greatest > 0.0 {
        sum / slots.len() as f64 / greatest
    } else {
        1.0
    }
}

fn mean_balancedness(layers: &[Vec<Vec<f64>>]) -> f64 {
    let sum: f64 = layers.iter().map(|slots| balancedness(slots)).sum();
    sum / layers.len().max(1) as f64
}
