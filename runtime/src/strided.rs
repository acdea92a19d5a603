//! Copies between strided places: slices, concatenations, transposes, shards of tensors.
//!
//! In: the loops of a copy, each with its length and its stride in the source and the destination.
//! Out: the elements, moved. Invariant: exactly the elements the loops walk are read and written.

/// One loop of a copy; strides count elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyLoop {
    /// Number of steps.
    pub size: usize,
    /// Stride in the source.
    pub src: usize,
    /// Stride in the destination.
    pub dst: usize,
}

/// A copy of 32-bit elements, its loops merged and ordered for memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyPlan {
    /// Outermost first; the last one is the innermost.
    loops: Vec<CopyLoop>,
}

impl CopyPlan {
    /// Plans the copy of these loops, in any order: sorts them by destination stride and joins what
    /// walks memory as one. Quadratic in the number of loops.
    pub fn new(loops: &[CopyLoop]) -> CopyPlan {
        let mut sorted: Vec<CopyLoop> = loops.iter().copied().filter(|l| l.size != 1).collect();
        sorted.sort_by_key(|l| std::cmp::Reverse((l.dst, l.src)));
        let mut merged: Vec<CopyLoop> = Vec::new();
        for inner in sorted {
            match merged.last_mut() {
                Some(outer)
                    if outer.dst == inner.dst * inner.size
                        && outer.src == inner.src * inner.size =>
                {
                    *outer = CopyLoop {
                        size: outer.size * inner.size,
                        ..inner
                    };
                }
                _ => merged.push(inner),
            }
        }
        CopyPlan { loops: merged }
    }

    /// Elements the copy moves.
    pub fn n_elements(&self) -> usize {
        self.loops.iter().map(|l| l.size).product()
    }

    /// Elements that source and destination must hold, counted from their bases.
    pub fn spans(&self) -> (usize, usize) {
        if self.n_elements() == 0 {
            return (0, 0);
        }
        let last = |stride: fn(&CopyLoop) -> usize| -> usize {
            self.loops.iter().map(|l| (l.size - 1) * stride(l)).sum()
        };
        (last(|l| l.src) + 1, last(|l| l.dst) + 1)
    }

    /// Copies 32-bit elements.
    ///
    /// # Safety
    /// `src` is valid for reads and `dst` for writes over [`CopyPlan::spans`] elements; they do not
    /// overlap, and nobody writes to either meanwhile.
    pub unsafe fn run(&self, src: *const u32, dst: *mut u32) {
        if self.n_elements() > 0 {
            // SAFETY: as for this function.
            unsafe { walk(&self.loops, src, dst) };
        }
    }
}

/// # Safety
/// As for [`CopyPlan::run`], no loop being empty.
unsafe fn walk(loops: &[CopyLoop], src: *const u32, dst: *mut u32) {
    // SAFETY: every address is base + Σ index·stride with each index below its loop's size.
    unsafe {
        match loops {
            [] => *dst = *src,
            [
                CopyLoop {
                    size,
                    src: 1,
                    dst: 1,
                },
            ] => dst.copy_from_nonoverlapping(src, *size),
            [inner] => {
                for i in 0..inner.size {
                    *dst.add(i * inner.dst) = *src.add(i * inner.src);
                }
            }
            [rows, columns] if rows.src == 1 && columns.dst == 1 && rows.dst != 1 => {
                transpose(rows, columns, src, dst);
            }
            [outer, rest @ ..] => {
                for i in 0..outer.size {
                    walk(rest, src.add(i * outer.src), dst.add(i * outer.dst));
                }
            }
        }
    }
}

/// A transpose in squares that stay in the first cache.
///
/// # Safety
/// As for [`CopyPlan::run`].
unsafe fn transpose(rows: &CopyLoop, columns: &CopyLoop, src: *const u32, dst: *mut u32) {
    const SIDE: usize = 16;
    for row_begin in (0..rows.size).step_by(SIDE) {
        for column_begin in (0..columns.size).step_by(SIDE) {
            for row in row_begin..(row_begin + SIDE).min(rows.size) {
                for column in column_begin..(column_begin + SIDE).min(columns.size) {
                    // SAFETY: both indices are below their loops' sizes.
                    unsafe {
                        *dst.add(row * rows.dst + column) = *src.add(row + column * columns.src);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn moves_every_element(
            sizes in proptest::collection::vec(1usize..20, 1..4),
            swaps in proptest::collection::vec(any::<u8>(), 4),
        ) {
            let n: usize = sizes.iter().product();
            let mut order: Vec<usize> = (0..sizes.len()).collect();
            order.sort_by_key(|&i| swaps[i]);
            let strides = |order: &[usize]| {
                let mut strides = vec![0; sizes.len()];
                let mut stride = 1;
                for &i in order.iter().rev() {
                    strides[i] = stride;
                    stride *= sizes[i];
                }
                strides
            };
            let natural: Vec<usize> = (0..sizes.len()).collect();
            let (from, to) = (strides(&natural), strides(&order));
            let loops: Vec<CopyLoop> = (0..sizes.len())
                .map(|i| CopyLoop { size: sizes[i], src: from[i], dst: to[i] })
                .collect();
            let plan = CopyPlan::new(&loops);
            prop_assert_eq!(plan.spans(), (n, n));
            let src: Vec<u32> = (0..n as u32).collect();
            let mut dst = vec![u32::MAX; n];
            // SAFETY: both hold n elements, which are the plan's spans.
            unsafe { plan.run(src.as_ptr(), dst.as_mut_ptr()) };
            for flat in 0..n {
                let at: usize =
                    (0..sizes.len()).map(|i| flat / from[i] % sizes[i] * to[i]).sum();
                prop_assert_eq!(dst[at], flat as u32);
            }
        }
    }
}
