//! What a contraction with a bias begins with.
//!
//! In: the contraction's indices and its bias. Out: a result that holds the bias, or has it added, for
//! the product to be added to.
//! Invariant: each element of the result is touched once, at the places that the contraction writes.

use meshweave_dsl::program::{Bias, ContractIndex};

use super::Counter;

/// A bias that is spread over a contraction's result.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Spread {
    /// The result's indices, with the bias as first operand.
    indices: Vec<ContractIndex>,
    /// Whether it is added to what the result holds.
    onto: bool,
}

impl Spread {
    /// The bias has a stride for each of the indices.
    pub(crate) fn new(bias: &Bias, indices: &[ContractIndex], onto: bool) -> Spread {
        let spread = indices.iter().zip(&bias.strides);
        let spread = spread.map(|(index, stride)| ContractIndex {
            a: *stride,
            b: 0,
            ..*index
        });
        Spread {
            // The others are summed over.
            indices: spread.filter(|index| index.c != 0).collect(),
            onto,
        }
    }

    /// Runs on raw memory.
    ///
    /// # Safety
    /// `bias` is valid for as many elements as [`Bias::span`] states, `c` for as many as the
    /// contraction's result, for writes and disjoint from the bias, and nobody else touches `c` meanwhile.
    pub(crate) unsafe fn run(&self, bias: *const f32, c: *mut f32) {
        let mut counter = Counter::new(&self.indices);
        while let Some((from, _, to)) = counter.next_offsets() {
            // SAFETY: the offsets are sums of indices below their sizes, inside the spans.
            unsafe {
                let old = if self.onto { *c.add(to) } else { 0.0 };
                *c.add(to) = old + *bias.add(from);
            }
        }
    }
}
