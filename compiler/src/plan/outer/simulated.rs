//! The best mappings, simulated.
//!
//! Enters: a mapping with its estimate. Leaves: the step when its schedule is run action by action with
//! the costs of its own stages, instead of the closed form's wait.
//! Invariant: everything but the wait is the estimate's.

use meshweave_dsl::mapping::Mapping;

use crate::plan::estimate::{Estimate, Workload};
use crate::schedule::{Builtin, Costs, Shape, StageCosts, build, simulate};

/// Actions beyond which a schedule is not simulated.
const MOST_ACTIONS: usize = 2_000_000;

/// Seconds of a step by simulation; `None` for no pipeline, and for schedules that are not built in or
/// too long.
pub(super) fn simulated_s(
    workload: &Workload,
    mapping: &Mapping,
    estimate: &Estimate,
) -> Option<f64> {
    if mapping.pp < 2 {
        return None;
    }
    let n_microbatches = mapping.n_microbatches(workload.batch);
    if 2 * n_microbatches * mapping.n_stages() > MOST_ACTIONS {
        return None;
    }
    let stages = estimate
        .stages
        .iter()
        .map(|stage| StageCosts {
            forward_s: stage.forward_s,
            // Recomputation precedes the gradient of the input on the same rank.
            backward_input_s: stage.backward_input_s + stage.recompute_s,
            backward_weight_s: stage.backward_weight_s,
            ..StageCosts::default()
        })
        .collect();
    let costs = Costs::of(stages);
    let builtin = Builtin::find(&mapping.pipeline.schedule)?;
    let shape = Shape::new(mapping.pp, n_microbatches).chunks(mapping.pipeline.chunks);
    let schedule = build(builtin, &shape, Some(&costs)).ok()?;
    let simulation = simulate(&schedule, &costs).ok()?;
    Some(estimate.step_s - estimate.parts.bubble + simulation.bubble_s)
}
