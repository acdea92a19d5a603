//! What is done to elements before and after MPI moves them.
//!
//! In: the divisions of collectives. Out: copies between a tensor and the dense parts that travel, and the
//! fold of parts that have arrived. Invariant: parts are folded in the order of the group's members.

use meshweave_dsl::layout::ReduceKind;

use crate::collective::{Crossing, CrossingOrder, Division, combine};
use crate::strided::{CopyLoop, CopyPlan};

/// A peer's part of an all-to-all: how to pack what it gets, how to unpack what it gave.
pub(super) struct Route {
    /// First element in the source.
    pub(super) from: usize,
    pub(super) pack: CopyPlan,
    /// First element in the destination.
    pub(super) to: usize,
    pub(super) unpack: CopyPlan,
}

/// The way between member `own` and member `peer`; what travels is dense, in the tensor's order.
pub(super) fn route(crossing: &Crossing, own: usize, peer: usize) -> Route {
    let Crossing {
        outer, mid, inner, ..
    } = *crossing;
    let (split, concat) = (&crossing.split_counts, &crossing.concat_counts);
    let (n_split, n_concat): (usize, usize) = (split.iter().sum(), concat.iter().sum());
    let (skipped, place): (usize, usize) =
        (split[..peer].iter().sum(), concat[..peer].iter().sum());
    // Rows of `of` among rows of `among`, `times` of them: sparse in the tensor, dense on the way.
    let sparse_src = |times, of: usize, among: usize| {
        CopyPlan::new(&[
            CopyLoop {
                size: times,
                src: among,
                dst: of,
            },
            CopyLoop {
                size: of,
                src: 1,
                dst: 1,
            },
        ])
    };
    let sparse_dst = |times, of: usize, among: usize| {
        CopyPlan::new(&[
            CopyLoop {
                size: times,
                src: of,
                dst: among,
            },
            CopyLoop {
                size: of,
                src: 1,
                dst: 1,
            },
        ])
    };
    match crossing.order {
        CrossingOrder::SameDim => {
            let inner = mid * inner;
            Route {
                from: skipped * inner,
                pack: sparse_src(outer, split[peer] * inner, n_split * inner),
                to: place * inner,
                unpack: sparse_dst(outer, concat[peer] * inner, n_concat * inner),
            }
        }
        // [outer, split, mid, concat, inner]
        CrossingOrder::SplitFirst => {
            let row = mid * concat[own] * inner;
            Route {
                from: skipped * row,
                pack: sparse_src(outer, split[peer] * row, n_split * row),
                to: place * inner,
                unpack: sparse_dst(
                    outer * split[own] * mid,
                    concat[peer] * inner,
                    n_concat * inner,
                ),
            }
        }
        // [outer, concat, mid, split, inner]
        CrossingOrder::ConcatFirst => {
            let row = mid * split[own] * inner;
            Route {
                from: skipped * inner,
                pack: sparse_src(
                    outer * concat[own] * mid,
                    split[peer] * inner,
                    n_split * inner,
                ),
                to: place * row,
                unpack: sparse_dst(outer, concat[peer] * row, n_concat * row),
            }
        }
    }
}

/// Whether what travels must be packed from the source, and unpacked into the destination: not where the
/// parts of all peers lie there one after another.
pub(super) fn copies(crossing: &Crossing) -> (bool, bool) {
    let is_flat = crossing.outer == 1;
    match crossing.order {
        CrossingOrder::SameDim => (!is_flat, !is_flat),
        CrossingOrder::SplitFirst => (!is_flat, true),
        CrossingOrder::ConcatFirst => (true, !is_flat),
    }
}

/// The rows of a part: out of the whole to dense ones, and back.
pub(super) fn rows(division: &Division, part_idx: usize) -> (CopyPlan, CopyPlan) {
    let (row, whole) = (
        division.counts[part_idx] * division.inner,
        division.total() * division.inner,
    );
    let lines = CopyLoop {
        size: row,
        src: 1,
        dst: 1,
    };
    let size = division.outer;
    (
        CopyPlan::new(&[
            CopyLoop {
                size,
                src: whole,
                dst: row,
            },
            lines,
        ]),
        CopyPlan::new(&[
            CopyLoop {
                size,
                src: row,
                dst: whole,
            },
            lines,
        ]),
    )
}

/// Folds the members' values, which stand one after another in `received`, into `dst`, in their order.
pub(super) fn fold(kind: ReduceKind, received: &[u32], dst: &mut [f32]) {
    let n = dst.len();
    for (block_idx, block) in dst.chunks_mut(BLOCK).enumerate() {
        for (member_idx, part) in received.chunks_exact(n.max(1)).enumerate() {
            let part = part[block_idx * BLOCK..].iter();
            let both = block.iter_mut().zip(part.map(|word| f32::from_bits(*word)));
            match (member_idx, kind) {
                (0, _) => both.for_each(|(x, y)| *x = y),
                (_, ReduceKind::Sum) => both.for_each(|(x, y)| *x += y),
                _ => both.for_each(|(x, y)| *x = combine(kind, *x, y)),
            }
        }
    }
}

/// Elements that stay in the nearest cache while all members' are folded into them.
const BLOCK: usize = 4096;

/// A buffer of this many words, taken from where it is kept.
pub(super) fn sized(kept: &mut Vec<u32>, n_words: usize) -> Vec<u32> {
    let mut buffer = std::mem::take(kept);
    if buffer.len() > n_words {
        buffer.truncate(n_words);
    } else {
        buffer.resize(n_words, 0);
    }
    buffer
}

pub(super) fn words(floats: &[f32]) -> &[u32] {
    // SAFETY: f32 and u32 have one size and alignment, and all bits are legal in both.
    unsafe { std::slice::from_raw_parts(floats.as_ptr().cast(), floats.len()) }
}

pub(super) fn words_mut(floats: &mut [f32]) -> &mut [u32] {
    // SAFETY: as in `words`.
    unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), floats.len()) }
}

pub(super) fn words_as_floats(words: &mut [u32]) -> &mut [f32] {
    // SAFETY: as in `words`.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Sends what every member packs to where every member unpacks.
    fn exchange(crossings: &[Crossing], sources: &[Vec<u32>], lens: &[usize]) -> Vec<Vec<u32>> {
        let mut results: Vec<Vec<u32>> = lens.iter().map(|n| vec![u32::MAX; *n]).collect();
        for (from, source) in sources.iter().enumerate() {
            for (to, result) in results.iter_mut().enumerate() {
                let out = route(&crossings[from], from, to);
                let mut packed = vec![0; out.pack.n_elements()];
                // Without a copy, parts are found where those of the peers before end.
                let (packs, unpacks) = copies(&crossings[from]);
                let n_before = |routes: &mut dyn Iterator<Item = usize>| routes.sum::<usize>();
                if !packs {
                    let before = &mut (0..to)
                        .map(|peer| route(&crossings[from], from, peer).pack.n_elements());
                    assert_eq!(out.from, n_before(before));
                    assert_eq!(out.pack.spans().0, packed.len());
                }
                if !unpacks {
                    let way = route(&crossings[to], to, from);
                    let before = &mut (0..from)
                        .map(|peer| route(&crossings[to], to, peer).unpack.n_elements());
                    assert_eq!(way.to, n_before(before));
                    assert_eq!(way.unpack.spans().1, packed.len());
                }
                let arriving = route(&crossings[to], to, from);
                assert_eq!(arriving.unpack.n_elements(), packed.len());
                assert!(out.from + out.pack.spans().0 <= source.len());
                assert!(arriving.to + arriving.unpack.spans().1 <= result.len());
                // SAFETY: the spans were checked above.
                unsafe {
                    out.pack
                        .run(source.as_ptr().add(out.from), packed.as_mut_ptr());
                    let at = result.as_mut_ptr().add(arriving.to);
                    arriving.unpack.run(packed.as_ptr(), at);
                }
            }
        }
        results
    }

    proptest! {
        #[test]
        fn crossing_twice_gives_the_same(
            (split, concat) in (1usize..5).prop_flat_map(|n| (
                proptest::collection::vec(1usize..4, n),
                proptest::collection::vec(1usize..4, n),
            )),
            outer in 1usize..3, mid in 1usize..3, inner in 1usize..3,
            first in any::<bool>(),
        ) {
            let n = split.len();
            let (n_split, n_concat): (usize, usize) = (split.iter().sum(), concat.iter().sum());
            let around = outer * mid * inner;
            let order = if first { CrossingOrder::SplitFirst } else { CrossingOrder::ConcatFirst };
            let back = if first { CrossingOrder::ConcatFirst } else { CrossingOrder::SplitFirst };
            let there = Crossing {
                outer, mid, inner, order,
                split_counts: split.clone(),
                concat_counts: concat.clone(),
            };
            let again = Crossing {
                order: back,
                split_counts: concat.clone(),
                concat_counts: split.clone(),
                ..there.clone()
            };
            let sources: Vec<Vec<u32>> = (0..n)
                .map(|i| (0..around * n_split * concat[i]).map(|x| (1000 * i + x) as u32).collect())
                .collect();
            let lens: Vec<usize> = (0..n).map(|i| around * split[i] * n_concat).collect();
            let crossed = exchange(&vec![there; n], &sources, &lens);
            prop_assert!(crossed.iter().flatten().all(|x| *x != u32::MAX));
            let lens: Vec<usize> = sources.iter().map(Vec::len).collect();
            prop_assert_eq!(exchange(&vec![again; n], &crossed, &lens), sources);
        }
    }
}
