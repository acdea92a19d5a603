//! What a row's memory figure counts.
//!
//! Enters: words of a row. Leaves: bytes of its unit, which of the process's bytes, and whose.
//! Invariant: predictions are converted to what was measured, never the other way round.

use meshweave_dsl::mapping::Mapping;

use super::Case;
use super::table::Row;
use crate::plan::estimate::{Memories, MemoryEstimate};

/// What of the process's memory is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counted {
    /// Live tensors: `max_memory_allocated`.
    Allocated,
    /// The allocator's segments: `max_memory_reserved`.
    Reserved,
}

/// How a figure was read.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Reading {
    counted: Counted,
    /// Of the first pipeline rank alone; else of the one that needs most.
    first_rank: bool,
    bytes_per_unit: f64,
}

const GIB: f64 = 1024.0 * 1024.0 * 1024.0;

/// Reads `mem_kind`.
///
/// PyTorch programs print `bytes / 1024³` and call it GB; Megatron-Bridge divides by 10⁹
/// (`training/utils/train_utils.py`). nanotron logs the first rank (`trainer.py`).
fn reading(row: Row<'_>) -> Reading {
    let kind = row.text_or_blank("mem_kind").to_ascii_lowercase();
    let source = row.text_or_blank("source").to_ascii_lowercase();
    let is_decimal = source.contains("megatron-bridge") && !kind.contains("gib");
    Reading {
        counted: match kind.contains("reserved") {
            true => Counted::Reserved,
            false => Counted::Allocated,
        },
        first_rank: source.contains("nanotron")
            || kind.contains("rank 0")
            || kind.contains("rank-0"),
        bytes_per_unit: if is_decimal { 1e9 } else { GIB },
    }
}

/// Predicted GB (10⁹ bytes) of what the row counted.
pub(super) fn predicted_gb(row: Row<'_>, case: &Case, mapping: &Mapping) -> f64 {
    let reading = reading(row);
    let of = |estimate: MemoryEstimate| match reading.counted {
        Counted::Allocated => estimate.allocated(),
        Counted::Reserved => estimate.reserved(),
    };
    let ranks = if reading.first_rank { 1 } else { mapping.pp };
    let memories = Memories::new(&case.workload, mapping);
    let bytes = (0..ranks)
        .map(|rank| of(memories.of(rank, &case.cluster)).0)
        .max();
    bytes.unwrap_or(0) as f64 / 1e9
}

/// Measured GB (10⁹ bytes).
pub(super) fn measured_gb(row: Row<'_>) -> Option<f64> {
    Some(row.number("mem_gb")? * reading(row).bytes_per_unit / 1e9)
}

#[cfg(test)]
mod tests {
    use crate::plan::estimate::memory::MEASURED_OVER_PREDICTED;
    use crate::validate::{Report, validate};

    fn report(table: &str) -> Report {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../data/published/");
        validate(&std::fs::read_to_string(format!("{root}{table}.csv")).unwrap()).unwrap()
    }

    #[test]
    fn published_peaks_are_predicted() {
        let report = report("memory");
        let summary = &report.summary;
        assert!(summary.median.unwrap() <= 0.08, "{summary:?}");
        assert!(summary.p90.unwrap() <= 0.22, "{summary:?}");
        // Adapters and layers that no decoder has are not priced; they say so.
        assert_eq!((summary.priced, summary.total), (87, 97), "{summary:?}");
        assert!(
            report
                .rows
                .iter()
                .all(|row| row.predicted.is_some() != row.reason.is_some())
        );
        let median = |source: &str| report.by_source[source].median.unwrap();
        assert!(median("zero-bubble") <= 0.03);
        assert!(median("megatron-bridge-skills") <= 0.06);
        assert!(median("nanotron-ultrascale") <= 0.10);
    }

    #[test]
    fn published_overflows_are_predicted() {
        let summary = report("feasibility").summary;
        assert_eq!(summary.priced, 700);
        assert!(summary.accuracy.unwrap() >= 0.95, "{summary:?}");
        assert!(summary.recall.unwrap() >= 0.90, "{summary:?}");
        assert!(summary.precision.unwrap() >= 0.95, "{summary:?}");
    }

    #[test]
    fn the_stated_spread_is_that_of_the_table() {
        let rows = report("memory").rows;
        let ratios = rows
            .iter()
            .filter_map(|row| Some(row.measured? / row.predicted?));
        let mut ratios: Vec<f64> = ratios.collect();
        ratios.sort_by(f64::total_cmp);
        let n_steps = MEASURED_OVER_PREDICTED.len() - 1;
        for (idx, stated) in MEASURED_OVER_PREDICTED.into_iter().enumerate() {
            let found = ratios[(ratios.len() - 1) * idx / n_steps];
            assert!(
                (found - stated).abs() < 0.05,
                "{idx}: {found} against {stated}"
            );
        }
    }
}
