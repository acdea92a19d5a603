//! Reductions over the members' buffers, in the order of the group's ranks.
//!
//! In: one address a member. Out: the folded elements.
//! Invariant: an element's value depends on the members' values and their order alone, so every
//! member that computes it gets the same bits.

use meshweave_dsl::layout::ReduceKind;

use super::Span;
use crate::collective::combine;

/// Elements folded at a time, so that the running result stays in the first cache.
const CHUNK: usize = 2048;

/// Up to this many elements every member reduces everything by itself, which saves an exchange.
const SMALL: usize = 2048;

/// Folds `n` elements of every source into `dst`, which may be the same place as one source.
///
/// # Safety
/// The sources are valid for reads and `dst` for writes of `n` elements; nobody else writes any of
/// them meanwhile; `dst` is equal to a source or disjoint from it.
pub(super) unsafe fn reduce(kind: ReduceKind, sources: &[*const f32], dst: *mut f32, n: usize) {
    let mut partial = [0.0f32; CHUNK];
    for begin in (0..n).step_by(CHUNK) {
        let len = CHUNK.min(n - begin);
        let partial = &mut partial[..len];
        for (source_idx, source) in sources.iter().enumerate() {
            // SAFETY: begin + len ≤ n elements are valid, and nothing writes to them while this
            // reference lives: `dst` is written after it.
            let part = unsafe { std::slice::from_raw_parts(source.add(begin), len) };
            if source_idx == 0 {
                partial.copy_from_slice(part);
            } else {
                fold(kind, partial, part);
            }
        }
        // SAFETY: as above; `partial` is a local.
        unsafe {
            dst.add(begin)
                .copy_from_nonoverlapping(partial.as_ptr(), len);
        }
    }
}

fn fold(kind: ReduceKind, partial: &mut [f32], part: &[f32]) {
    match kind {
        ReduceKind::Sum => {
            for (x, y) in partial.iter_mut().zip(part) {
                *x += *y;
            }
        }
        ReduceKind::Max | ReduceKind::Lse => {
            for (x, y) in partial.iter_mut().zip(part) {
                *x = combine(kind, *x, *y);
            }
        }
    }
}

/// Each member reduces its own part of the elements into its `dst`, then fetches the other parts.
///
/// # Safety
/// `sources` are the members' published buffers of `n` elements and `dst` is this member's, all alive
/// until the closing barrier; a member's `dst` is its own source or disjoint from all sources.
pub(super) unsafe fn all_reduce(
    span: &Span<'_>,
    kind: ReduceKind,
    sources: &[*const f32],
    dst: *mut f32,
    n: usize,
) {
    let size = span.size();
    if size == 1 {
        // SAFETY: both are this member's, and equal or disjoint.
        unsafe { dst.copy_from(sources[0], n) };
        return;
    }
    if n <= SMALL {
        let mut whole = vec![0.0; n];
        // SAFETY: reads the sources, writes a local.
        unsafe { reduce(kind, sources, whole.as_mut_ptr(), n) };
        // In place, peers still read this member's `dst` until they all have their results.
        span.cross();
        // SAFETY: after the barrier nobody reads this member's `dst`.
        unsafe { dst.copy_from_nonoverlapping(whole.as_ptr(), n) };
        return;
    }
    let begin = |member_idx: usize| n / size * member_idx + (n % size).min(member_idx);
    let own = span.member_idx;
    let (first, len) = (begin(own), begin(own + 1) - begin(own));
    // SAFETY: only this member reads or writes the own part of its `dst` before the barrier, even
    // when it is its source, whose own part nobody else reads.
    unsafe {
        let parts: Vec<*const f32> = sources.iter().map(|s| s.add(first)).collect();
        reduce(kind, &parts, dst.add(first), len);
    }
    span.cross();
    for peer in span.round().filter(|peer| *peer != own) {
        let (first, len) = (begin(peer), begin(peer + 1) - begin(peer));
        let result: *const f32 = span.posting(peer).dst.cast_const().cast();
        // SAFETY: the peer wrote this part of its `dst` before the barrier and leaves it until the
        // closing one; the same part of this member's `dst` is read by nobody after the barrier.
        unsafe {
            dst.add(first)
                .copy_from_nonoverlapping(result.add(first), len);
        }
    }
}
