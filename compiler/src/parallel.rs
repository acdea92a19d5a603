//! Independent work on several threads.
//!
//! Enters: pieces of work by number. Leaves: their results in the order of the numbers.
//! Invariant: which thread does a piece, and when, cannot be seen in the results.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The threads that the machine runs at once.
#[must_use]
pub fn available() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

/// `f(0), f(1), …, f(n - 1)` on at most so many threads, this one among them; each takes the next piece
/// when it is done with one.
pub fn in_parallel<T: Send>(n: usize, threads: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let threads = threads.clamp(1, n.max(1));
    if threads == 1 {
        return (0..n).map(f).collect();
    }
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::with_capacity(n.div_ceil(threads));
        loop {
            let piece = next.fetch_add(1, Ordering::Relaxed);
            if piece >= n {
                return done;
            }
            done.push((piece, f(piece)));
        }
    };
    let mut all = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut all = work();
        for thread in others {
            match thread.join() {
                Ok(done) => all.extend(done),
                // The panic goes on where it would have without threads.
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    });
    all.sort_unstable_by_key(|(piece, _)| *piece);
    all.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_order_on_any_number_of_threads() {
        for threads in 0..5 {
            for n in [0, 1, 2, 100] {
                let squares = in_parallel(n, threads, |i| i * i);
                assert_eq!(squares, (0..n).map(|i| i * i).collect::<Vec<_>>());
            }
        }
    }
}
