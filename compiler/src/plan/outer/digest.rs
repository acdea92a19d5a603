//! Digests: short names of a model, a cluster and the prices, to see whether a plan is stale.
//!
//! Enters: plain data. Leaves: sixteen hexadecimal digits.
//! Invariant: equal data has equal digests on every machine; prices are digested by what they say of
//! fixed mappings, so that only a change of a price changes them.

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::mapping::{Mapping, Precision, Zero};
use serde::Serialize;

use crate::model::{DecoderConfig, GoldenSize};
use crate::plan::estimate::{Job, Workload, estimate};

/// FNV-1a, 64 bits (Fowler, Noll, Vo; RFC 9923).
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The digest of anything that has a text.
pub fn digest(value: &impl Serialize) -> String {
    let text = serde_json::to_string(value).unwrap_or_default();
    format!("{:016x}", fnv(text.as_bytes()))
}

/// The digest of the prices: of the seconds and bytes of fixed mappings, to nine digits.
pub fn digest_of_prices() -> String {
    let mut text = String::new();
    let size = GoldenSize {
        n_layers: 8,
        embed: 4096,
        heads: 32,
        ffn: 16384,
        vocab: 50304,
        seq: 4096,
        batch: 64,
    };
    for capacity in [None, Some(0.0)] {
        let model = DecoderConfig::golden(&size, capacity);
        for job in [Job::Train, Job::Prefill, Job::Decode { context: 4096 }] {
            let workload = Workload::new(model.clone(), 64, 4096, job);
            for (preset, tp, pp, dp) in [("h100:32", 8, 2, 2), ("a100-80:32", 4, 1, 8)] {
                let Ok(cluster) = Cluster::preset(preset) else {
                    continue;
                };
                let mapping = Mapping {
                    tp,
                    pp,
                    ep: if capacity.is_some() { 2 } else { 1 },
                    sequence_parallel: job == Job::Train,
                    zero: Zero {
                        stage: 1,
                        group: None,
                    },
                    ..Mapping::data_parallel(dp, 1, Precision::MIXED_BF16)
                };
                text += &match estimate(&workload, &mapping, &cluster) {
                    Ok(found) => format!("{:.9e} {};", found.step_s, found.memory.total().0),
                    Err(error) => format!("{error};"),
                };
            }
        }
    }
    format!("{:016x}", fnv(text.as_bytes()))
}

/// The digests that a plan bears.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct Digests {
    pub model: String,
    pub cluster: String,
    pub prices: String,
}

impl Digests {
    /// Of what a plan is made for.
    pub fn of(workload: &Workload, cluster: &Cluster) -> Self {
        Self {
            model: digest(&workload.model),
            cluster: digest(cluster),
            prices: digest_of_prices(),
        }
    }
}
