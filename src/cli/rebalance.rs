//! `meshweave run --rebalance`: experts change places between steps, so that devices have equal loads.
//!
//! Enters: an execution after each of its steps. Leaves: the same with some experts exchanged between
//! devices, as `--moves` allows.
//! Invariant: an exchange moves an expert's weights, moments and column of the router together, so what
//! the model computes stays the same; loads are measured, of what routers chose since the last time.

use meshweave_compiler::placement::rebalance::exchanges;
use meshweave_dsl::diagnostics::Class;
use meshweave_runtime::executor::Session as Execution;

use super::placed::Relabeling;
use super::runtime_error;
use crate::error::{Error, Result};

/// When experts change places, and how many.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rhythm {
    /// Steps from one time to the next.
    pub every: usize,
    /// Experts that may move each time, over all layers.
    pub moves: usize,
}

/// Exchanges experts while a program runs.
pub(super) struct Rebalancer {
    rhythm: Rhythm,
    /// The chosen experts of every layer, outputs of the program.
    tensors: Vec<String>,
    n_devices: usize,
    /// Assignments since the last time, by layer and position.
    loads: Vec<Vec<f64>>,
    /// Where experts are.
    relabeling: Relabeling,
    n_steps: usize,
    done: Rebalanced,
}

/// What was done in a run.
#[derive(Clone, Debug, Default)]
pub(super) struct Rebalanced {
    /// Experts moved, each time.
    pub moved: Vec<usize>,
    /// Mean over greatest load of a device, mean of the layers, each time: before, and as it would have
    /// been with the experts where they are afterwards.
    pub balancedness: Vec<(f64, f64)>,
}

impl Rebalancer {
    /// `tensors` are the outputs with the chosen experts of the layers that `relabeling` has.
    pub fn new(
        rhythm: Rhythm,
        tensors: Vec<String>,
        n_devices: usize,
        relabeling: Relabeling,
    ) -> Self {
        Self {
            loads: vec![Vec::new(); tensors.len()],
            rhythm,
            tensors,
            n_devices,
            relabeling,
            n_steps: 0,
            done: Rebalanced::default(),
        }
    }

    /// Counts the loads of the last step and, when it is time, moves experts.
    ///
    /// # Errors
    /// The execution lacks the outputs, or a tensor cannot be moved.
    pub fn after_step(&mut self, execution: &mut Execution) -> Result<()> {
        for (name, loads) in self.tensors.iter().zip(&mut self.loads) {
            let chosen = execution.get(name).map_err(runtime_error)?;
            let positions = chosen.as_i32().ok_or_else(|| {
                Error::plain(
                    Class::Internal,
                    format!("`{name}` holds no numbers of experts"),
                )
            })?;
            for position in positions.iter().filter_map(|at| usize::try_from(*at).ok()) {
                if loads.len() <= position {
                    loads.resize(position + 1, 0.0);
                }
                loads[position] += 1.0;
            }
        }
        self.n_steps += 1;
        if self.n_steps.is_multiple_of(self.rhythm.every) {
            self.rebalance(execution)?;
        }
        Ok(())
    }

    /// What was done, and where the experts are now.
    pub fn finish(self) -> (Rebalanced, Relabeling) {
        (self.done, self.relabeling)
    }

    fn rebalance(&mut self, execution: &mut Execution) -> Result<()> {
        let n_experts = self.relabeling.n_experts();
        let size = n_experts / self.n_devices.max(1);
        let mut slots: Vec<Vec<Vec<f64>>> = Vec::with_capacity(self.loads.len());
        for loads in &mut self.loads {
            loads.resize(n_experts, 0.0);
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
        for (layer, swaps) in swaps.iter().enumerate() {
            self.relabeling.exchange(execution, layer, swaps)?;
        }
        self.done.moved.push(n_moved);
        self.done
            .balancedness
            .push((before, mean_balancedness(&slots)));
        self.loads.iter_mut().for_each(Vec::clear);
        Ok(())
    }
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
