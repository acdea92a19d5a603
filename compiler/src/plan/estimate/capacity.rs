//! The most sequences that a mapping serves at once.
//!
//! Enters: a workload of inference, a mapping, a cluster, a target of latency. Leaves: the greatest batch
//! whose caches fit beside the weights and whose step keeps the target, and what stops a greater one.
//! Invariant: the batch fits and keeps the target, the next one does not do both.

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::mapping::Mapping;
use meshweave_dsl::units::{Bytes, Seconds};

use super::workload::{Job, Workload};
use super::{Estimate, Memories, Unpriced, estimate};

/// Sequences a microbatch beyond which nothing is tried.
const MAX_MICRO_BATCH: usize = 1 << 20;

/// What a batch must keep.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Target {
    /// Seconds of a step: of the next token when decoding, of the first one in prefill.
    pub latency_s: Option<f64>,
    /// Part of the device's memory that stays free, 0 to 1.
    pub headroom: f64,
}

/// What stops a greater batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Its keys and values do not fit.
    Memory,
    /// Its step takes longer than the target.
    Latency,
    /// Nothing that is modeled.
    Nothing,
}

/// The greatest batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Capacity {
    /// Sequences over all replicas: `dp · pp · micro_batch`, so that every pipeline rank is busy.
    pub batch: usize,
    pub micro_batch: usize,
    /// Predicted, at this batch.
    pub estimate: Estimate,
    pub bound: Bound,
}

/// The greatest batch of a mapping; its own `micro_batch` and the workload's `batch` are ignored.
///
/// Takes some forty estimates: the microbatch is doubled and then bisected, as both memory and time grow
/// with it.
///
/// # Errors
/// `Invalid` for a workload that trains, and where not even one sequence a replica and pipeline rank
/// fits or keeps the target; else as [`estimate`].
pub fn max_batch(
    workload: &Workload,
    mapping: &Mapping,
    cluster: &Cluster,
    target: Target,
) -> Result<Capacity, Unpriced> {
    if workload.job == Job::Train {
        return Err(Unpriced::Invalid(
            "a batch that is trained is chosen, not bounded by caches; ask for prefill or decode"
                .into(),
        ));
    }
    let attempt = |micro_batch| try_batch(workload, mapping, cluster, target, micro_batch);
    let mut best = match attempt(1)? {
        Tried::Kept(estimate) => (1, estimate),
        Tried::Refused(bound, why) => return Err(Unpriced::Invalid(refusal(bound, &why))),
    };
    let (mut bound, mut above) = (Bound::Nothing, MAX_MICRO_BATCH + 1);
    while above - best.0 > 1 {
        let next = match bound {
            Bound::Nothing => (2 * best.0).min(MAX_MICRO_BATCH),
            Bound::Memory | Bound::Latency => best.0.midpoint(above),
        };
        match attempt(next)? {
            Tried::Kept(estimate) => best = (next, estimate),
            Tried::Refused(stopped_by, _) => (bound, above) = (stopped_by, next),
        }
    }
    let (micro_batch, estimate) = best;
    Ok(Capacity {
        batch: mapping.dp * mapping.pp * micro_batch,
        micro_batch,
        estimate,
        bound,
    })
}

enum Tried {
    Kept(Estimate),
    /// What stops it, and both numbers.
    Refused(Bound, String),
}

fn try_batch(
    workload: &Workload,
    mapping: &Mapping,
    cluster: &Cluster,
    target: Target,
    micro_batch: usize,
) -> Result<Tried, Unpriced> {
    let workload = Workload {
        batch: mapping.dp * mapping.pp * micro_batch,
        ..workload.clone()
    };
    let mapping = Mapping {
        micro_batch,
        ..mapping.clone()
    };
    let device = &cluster.device;
    let memories = Memories::new(&workload, &mapping);
    for rank in 0..mapping.pp {
        let held = memories.of(rank, cluster);
        if !held.fits(device, target.headroom) {
            let room = Bytes((device.memory_bytes as f64 * (1.0 - target.headroom)) as u64);
            let why = format!(
                "pipeline rank {rank} needs {}, of which {} are weights and {} caches, and {} has {room}",
                held.total(),
                held.parameters,
                held.cache,
                device.name
            );
            return Ok(Tried::Refused(Bound::Memory, why));
        }
    }
    let found = estimate(&workload, &mapping, cluster)?;
    match target.latency_s {
        Some(latency_s) if found.step_s > latency_s => Ok(Tried::Refused(
            Bound::Latency,
            format!(
                "a step takes {} and the target is {}",
                Seconds(found.step_s),
                Seconds(latency_s)
            ),
        )),
        _ => Ok(Tried::Kept(found)),
    }
}

fn refusal(bound: Bound, why: &str) -> String {
    let way_out = match bound {
        Bound::Memory => "raise tp, ep or pp, or shorten the context",
        Bound::Latency => "raise tp, or relax the target",
        Bound::Nothing => "change the mapping",
    };
    format!("not even one sequence a replica is served: {why}; {way_out}")
}

#[cfg(test)]
mod tests {
    use meshweave_dsl::mapping::Precision;

    use super::*;
    use crate::import;
    use crate::plan::estimate::memory;

    const GB: f64 = 1e9;

    fn decode(model: &str, context: usize) -> Workload {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/models/");
        let text = std::fs::read_to_string(format!("{root}{model}/config.json")).unwrap();
        let model = import::read_config(model, &text).unwrap().config;
        Workload::new(model, 1, 1, Job::Decode { context })
    }

    fn on(n_devices: usize) -> (Mapping, Cluster) {
        let mapping = Mapping {
            tp: n_devices,
            ..Mapping::data_parallel(1, 1, Precision::MIXED_BF16)
        };
        (
            mapping,
            Cluster::preset(&format!("h100:{n_devices}")).unwrap(),
        )
    }

    #[test]
    fn caches_fill_what_the_weights_leave() {
        let workload = decode("llama-3-8b", 8191);
        let (mapping, cluster) = on(1);
        let found = max_batch(&workload, &mapping, &cluster, Target::default()).unwrap();
        // 16.1 GB of weights, 128 KiB a token: 1.07 GB a sequence, and some room for one layer's work.
        let at_most = (80.0 * GB - 16.1 * GB) / (131_072.0 * 8192.0);
        assert!(found.batch as f64 <= at_most, "{} {at_most}", found.batch);
        assert!(
            found.batch as f64 > 0.95 * at_most,
            "{} {at_most}",
            found.batch
        );
        assert_eq!(found.bound, Bound::Memory);
        let one_more = Workload {
            batch: found.batch + 1,
            ..workload
        };
        let mapping = Mapping {
            micro_batch: found.batch + 1,
            ..mapping
        };
        assert!(!memory(&one_more, &mapping, &cluster, 0).fits(&cluster.device, 0.0));
    }

    #[test]
    fn sharing_the_weights_leaves_more_than_its_part() {
        let workload = decode("llama-3-70b", 8191);
        let batch = |n_devices| {
            let (mapping, cluster) = on(n_devices);
            max_batch(&workload, &mapping, &cluster, Target::default())
                .unwrap()
                .batch
        };
        assert!(batch(8) > 2 * batch(4));
    }

    #[test]
    fn a_target_of_latency_bounds_the_batch() {
        let workload = decode("llama-3-8b", 8191);
        let (mapping, cluster) = on(1);
        let within = |latency_s, headroom| {
            let target = Target {
                latency_s,
                headroom,
            };
            max_batch(&workload, &mapping, &cluster, target).unwrap()
        };
        let free = within(None, 0.0);
        let half = within(Some(free.estimate.step_s / 2.0), 0.0);
        assert_eq!(half.bound, Bound::Latency);
        assert!(half.batch < free.batch && half.estimate.step_s <= free.estimate.step_s / 2.0);
        assert!(within(None, 0.2).batch < free.batch);
    }

    #[test]
    fn what_does_not_fit_says_both_numbers() {
        let (mapping, cluster) = on(1);
        let workload = decode("llama-3-70b", 8191);
        let error = max_batch(&workload, &mapping, &cluster, Target::default()).unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains("131 GiB") && message.contains("74.5 GiB"),
            "{message}"
        );
        assert!(message.contains("raise tp"), "{message}");
    }
}
