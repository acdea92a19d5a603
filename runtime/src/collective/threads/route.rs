//! What one peer sends through an all-to-all, as loops of a copy.
//!
//! In: the crossing and the peer's counts. Out: the loops, where they begin, and how long the peer's
//! tensor must be. Invariant: the loops walk exactly the peer's part for this member, inside both tensors.

use crate::collective::Crossing;
use crate::strided::CopyLoop;

/// One peer's way through an all-to-all.
pub(crate) struct Route<'a> {
    pub(crate) crossing: &'a Crossing,
    pub(crate) peer_split: &'a [usize],
    /// Length of `concat` in the result.
    pub(crate) n_concat: usize,
    /// Length of `split` in the result.
    pub(crate) own_split: usize,
    /// Elements of `concat` that the peer sends.
    pub(crate) count: usize,
    /// Elements of `split` in the peer's tensor before this member's part.
    pub(crate) skipped: usize,
    /// Where the peer's elements begin along `concat`.
    pub(crate) place: usize,
}

/// Loops, first element in the source, first in the destination, length of the source.
pub(crate) type Path = (Vec<CopyLoop>, usize, usize, usize);

impl Route<'_> {
    pub(crate) fn same_dim(&self) -> Path {
        let Crossing {
            outer, mid, inner, ..
        } = *self.crossing;
        let inner = mid * inner;
        let n_split: usize = self.peer_split.iter().sum();
        let loops = vec![
            CopyLoop {
                size: outer,
                src: n_split * inner,
                dst: self.n_concat * inner,
            },
            CopyLoop {
                size: self.count * inner,
                src: 1,
                dst: 1,
            },
        ];
        (
            loops,
            self.skipped * inner,
            self.place * inner,
            outer * n_split * inner,
        )
    }

    /// `[outer, split, mid, concat, inner]`.
    pub(crate) fn split_first(&self) -> Path {
        let Crossing {
            outer, mid, inner, ..
        } = *self.crossing;
        let n_split: usize = self.peer_split.iter().sum();
        let (src_mid, dst_mid) = (self.count * inner, self.n_concat * inner);
        let loops = vec![
            CopyLoop {
                size: outer,
                src: n_split * mid * src_mid,
                dst: self.own_split * mid * dst_mid,
            },
            CopyLoop {
                size: self.own_split * mid,
                src: src_mid,
                dst: dst_mid,
            },
            CopyLoop {
                size: self.count * inner,
                src: 1,
                dst: 1,
            },
        ];
        let n_src = outer * n_split * mid * src_mid;
        (
            loops,
            self.skipped * mid * src_mid,
            self.place * inner,
            n_src,
        )
    }

    /// `[outer, concat, mid, split, inner]`.
    pub(crate) fn concat_first(&self) -> Path {
        let Crossing {
            outer, mid, inner, ..
        } = *self.crossing;
        let n_split: usize = self.peer_split.iter().sum();
        let (src_mid, dst_mid) = (n_split * inner, self.own_split * inner);
        let loops = vec![
            CopyLoop {
                size: outer,
                src: self.count * mid * src_mid,
                dst: self.n_concat * mid * dst_mid,
            },
            CopyLoop {
                size: self.count * mid,
                src: src_mid,
                dst: dst_mid,
            },
            CopyLoop {
                size: self.own_split * inner,
                src: 1,
                dst: 1,
            },
        ];
        let n_src = outer * self.count * mid * src_mid;
        (
            loops,
            self.skipped * inner,
            self.place * mid * dst_mid,
            n_src,
        )
    }
}
