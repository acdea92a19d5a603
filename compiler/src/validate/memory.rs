//! What a row's memory figure counts.
//!
//! Enters: words of a row. Leaves: bytes of its unit, which of the process's bytes, and whose.
//! Invariant: predictions are converted to what was measured, never the other way round.

use meshweave_dsl::mapping::Mapping;

use super::Case;
use super::table::Row;
use crate::plan::estimate::{MemoryEstimate, memory};

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
    let bytes = (0..ranks)
        .map(|rank| of(memory(&case.workload, mapping, &case.cluster, rank)).0)
        .max();
    bytes.unwrap_or(0) as f64 / 1e9
}

/// Measured GB (10⁹ bytes).
pub(super) fn measured_gb(row: Row<'_>) -> Option<f64> {
    Some(row.number("mem_gb")? * reading(row).bytes_per_unit / 1e9)
}
