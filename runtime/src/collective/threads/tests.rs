use std::panic::{AssertUnwindSafe, catch_unwind};

use proptest::prelude::*;

use super::*;
use crate::collective::combine;

const PATIENT: WaitOptions = WaitOptions {
    timeout: Duration::from_secs(60),
    n_spins: 10,
};

/// Runs `body` on every rank and returns the results in the order of ranks.
fn on_ranks<T: Send>(
    n_ranks: usize,
    options: WaitOptions,
    body: impl Fn(&mut ThreadCommunicator) -> T + Sync,
) -> Vec<T> {
    let world = World::new(n_ranks, options);
    std::thread::scope(|scope| {
        let handles: Vec<_> = world
            .communicators()
            .into_iter()
            .map(|mut communicator| {
                let body = &body;
                scope.spawn(move || body(&mut communicator))
            })
            .collect();
        handles.into_iter().map(|h| h.join().unwrap()).collect()
    })
}

fn value(rank: usize, i: usize) -> f32 {
    ((rank * 7919 + i * 104_729) % 1009) as f32 / 97.0 - 5.0
}

/// Row-major elements of `[outer, total, inner]` numbered by their global index.
fn part(division: &Division, part_idx: usize) -> Vec<u32> {
    let (total, start) = (division.total(), division.start(part_idx));
    let mut part = Vec::new();
    for outer in 0..division.outer {
        for i in start..start + division.counts[part_idx] {
            for inner in 0..division.inner {
                part.push(((outer * total + i) * division.inner + inner) as u32);
            }
        }
    }
    part
}

fn divisions() -> impl Strategy<Value = Division> {
    (
        1usize..4,
        proptest::collection::vec(1usize..5, 1..6),
        1usize..40,
    )
        .prop_map(|(outer, counts, inner)| Division {
            outer,
            counts,
            inner,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn all_gather_joins_the_parts(division in divisions()) {
        let n = division.counts.len();
        let ranks: Vec<usize> = (0..n).rev().collect();
        let results = on_ranks(n, PATIENT, |communicator| {
            let group = communicator.join(&ranks).unwrap();
            let member_idx = n - 1 - communicator.rank();
            let src = part(&division, member_idx);
            let mut dst = vec![u32::MAX; division.n_elements()];
            communicator.all_gather(group, &src, &mut dst, &division).unwrap();
            (dst, communicator.stats().received_bytes)
        });
        for (rank, (dst, received_bytes)) in results.into_iter().enumerate() {
            let whole: Vec<u32> = (0..division.n_elements() as u32).collect();
            prop_assert_eq!(dst, whole);
            let others = division.n_elements() - division.n_part_elements(n - 1 - rank);
            prop_assert_eq!(received_bytes, 4 * others as u64);
        }
    }

    #[test]
    fn reductions_are_the_fold_in_rank_order(
        n_ranks in 1usize..6,
        n in prop_oneof![1usize..50, 2040usize..2060, 5000usize..9000],
        kind in prop_oneof![Just(ReduceKind::Sum), Just(ReduceKind::Max), Just(ReduceKind::Lse)],
        in_place in any::<bool>(),
    ) {
        let ranks: Vec<usize> = (0..n_ranks).collect();
        let results = on_ranks(n_ranks, PATIENT, |communicator| {
            let group = communicator.join(&ranks).unwrap();
            let src: Vec<f32> = (0..n).map(|i| value(communicator.rank(), i)).collect();
            let mut dst = if in_place { src.clone() } else { vec![f32::NAN; n] };
            for _ in 0..3 {
                if in_place {
                    dst.copy_from_slice(&src);
                }
                let src = (!in_place).then_some(src.as_slice());
                communicator.all_reduce(group, kind, src, &mut dst).unwrap();
            }
            dst
        });
        for i in 0..n {
            let expected = (1..n_ranks).fold(value(0, i), |sum, rank| combine(kind, sum, value(rank, i)));
            for dst in &results {
                prop_assert_eq!(dst[i].to_bits(), expected.to_bits());
            }
        }
    }

    #[test]
    fn reduce_scatter_is_a_part_of_the_reduction(division in divisions()) {
        let n_ranks = division.counts.len();
        let ranks: Vec<usize> = (0..n_ranks).collect();
        let results = on_ranks(n_ranks, PATIENT, |communicator| {
            let rank = communicator.rank();
            let group = communicator.join(&ranks).unwrap();
            let src: Vec<f32> = (0..division.n_elements()).map(|i| value(rank, i)).collect();
            let mut dst = vec![f32::NAN; division.n_part_elements(rank)];
            communicator.reduce_scatter(group, ReduceKind::Sum, &src, &mut dst, &division).unwrap();
            dst
        });
        for (rank, dst) in results.iter().enumerate() {
            for (at, i) in part(&division, rank).into_iter().enumerate() {
                let sum = (1..n_ranks).fold(value(0, i as usize), |sum, r| sum + value(r, i as usize));
                prop_assert_eq!(dst[at].to_bits(), sum.to_bits());
            }
        }
    }

    #[test]
    fn all_to_all_moves_the_sharded_dim(
        around in (1usize..3, 1usize..3, 1usize..4),
        counts in proptest::collection::vec((1usize..4, 1usize..4), 1..5),
        split_first in any::<bool>(),
    ) {
        // From concat sharded and split whole to split sharded and concat whole.
        let (outer, mid, inner) = around;
        let split_counts: Vec<usize> = counts.iter().map(|c| c.0).collect();
        let concat_counts: Vec<usize> = counts.iter().map(|c| c.1).collect();
        let n_ranks = counts.len();
        let ranks: Vec<usize> = (0..n_ranks).collect();
        let (n_split, n_concat): (usize, usize) =
            (split_counts.iter().sum(), concat_counts.iter().sum());
        let start = |counts: &[usize], i: usize| counts[..i].iter().sum::<usize>();
        // Elements of the whole tensor whose split and concat indices lie in the ranges, in order.
        let region = |split: (usize, usize), concat: (usize, usize)| {
            let (first, second) = if split_first { (split, concat) } else { (concat, split) };
            let (n_first, n_second) = if split_first { (n_split, n_concat) } else { (n_concat, n_split) };
            let mut elements = Vec::new();
            for o in 0..outer {
                for f in first.0..first.0 + first.1 {
                    for m in 0..mid {
                        for s in second.0..second.0 + second.1 {
                            for i in 0..inner {
                                let at = ((o * n_first + f) * mid + m) * n_second + s;
                                elements.push((at * inner + i) as u32);
                            }
                        }
                    }
                }
            }
            elements
        };
        let crossing = Crossing {
            outer, mid, inner,
            split_counts: split_counts.clone(),
            concat_counts: concat_counts.clone(),
            order: if split_first { CrossingOrder::SplitFirst } else { CrossingOrder::ConcatFirst },
        };
        let results = on_ranks(n_ranks, PATIENT, |communicator| {
            let rank = communicator.rank();
            let group = communicator.join(&ranks).unwrap();
            let src = region((0, n_split), (start(&concat_counts, rank), concat_counts[rank]));
            let expected = region((start(&split_counts, rank), split_counts[rank]), (0, n_concat));
            let mut dst = vec![u32::MAX; expected.len()];
            communicator.all_to_all(group, &src, &mut dst, &crossing).unwrap();
            (dst, expected)
        });
        for (dst, expected) in results {
            prop_assert_eq!(dst, expected);
        }
    }

    #[test]
    fn all_to_all_within_one_dim(
        outer in 1usize..3,
        inner in 1usize..4,
        sent in proptest::collection::vec(0usize..4, 9),
    ) {
        // Rank i sends sent[3 i + j] elements to rank j; an element is (sender, receiver, index).
        let ranks = [0, 1, 2];
        let label = |from: usize, to: usize, o: usize, i: usize| (((from * 3 + to) * 8 + o) * 64 + i) as u32;
        let results = on_ranks(3, PATIENT, |communicator| {
            let rank = communicator.rank();
            let group = communicator.join(&ranks).unwrap();
            let (mut src, mut expected) = (Vec::new(), Vec::new());
            for o in 0..outer {
                for peer in 0..3 {
                    src.extend((0..sent[3 * rank + peer] * inner).map(|i| label(rank, peer, o, i)));
                    expected.extend((0..sent[3 * peer + rank] * inner).map(|i| label(peer, rank, o, i)));
                }
            }
            let crossing = Crossing {
                outer, mid: 1, inner,
                split_counts: (0..3).map(|peer| sent[3 * rank + peer]).collect(),
                concat_counts: (0..3).map(|peer| sent[3 * peer + rank]).collect(),
                order: CrossingOrder::SameDim,
            };
            let mut dst = vec![u32::MAX; expected.len()];
            communicator.all_to_all(group, &src, &mut dst, &crossing).unwrap();
            (dst, expected)
        });
        for (dst, expected) in results {
            prop_assert_eq!(dst, expected);
        }
    }
}

#[test]
fn crossed_groups_are_active_at_once() {
    // A 2×3 mesh: rows and columns in turn, many times.
    let results = on_ranks(6, PATIENT, |communicator| {
        let rank = communicator.rank();
        let row: Vec<usize> = (0..3).map(|c| rank / 3 * 3 + c).collect();
        let column = [rank % 3, rank % 3 + 3];
        let row = communicator.join(&row).unwrap();
        let column = communicator.join(&column).unwrap();
        let mut sum = vec![rank as f32 + 1.0; 3000];
        for _ in 0..200 {
            communicator
                .all_reduce(row, ReduceKind::Sum, None, &mut sum)
                .unwrap();
            communicator
                .all_reduce(column, ReduceKind::Sum, None, &mut sum)
                .unwrap();
            sum.iter_mut().for_each(|x| *x /= 6.0);
        }
        sum
    });
    assert!(results.iter().all(|sum| *sum == results[0]));
    assert!(
        (results[0][2999] - 3.5).abs() < 1e-4,
        "{}",
        results[0][2999]
    );
}

#[test]
fn permute_broadcast_send_and_receive() {
    on_ranks(3, PATIENT, |communicator| {
        let rank = communicator.rank();
        let group = communicator.join(&[0, 1, 2]).unwrap();
        let mut got = [0u32; 2];
        communicator
            .collective_permute(group, (rank + 2) % 3, &[rank as u32, 9], &mut got)
            .unwrap();
        assert_eq!(got, [(rank as u32 + 2) % 3, 9]);
        communicator
            .broadcast(group, &[rank as u32 + 40, 1], &mut got)
            .unwrap();
        assert_eq!(got, [40, 1]);
        for i in 0..5 {
            communicator
                .send((rank + 1) % 3, &[rank as u32, i])
                .unwrap();
        }
        for i in 0..5 {
            communicator.recv((rank + 2) % 3, &mut got).unwrap();
            assert_eq!(got, [(rank as u32 + 2) % 3, i]);
        }
        communicator.barrier(group).unwrap();
    });
}

#[test]
fn channels_hold_as_many_messages_as_they_are_deep() {
    let impatient = WaitOptions {
        timeout: Duration::from_millis(50),
        n_spins: 0,
    };
    for depth in 1..4 {
        let world = World::new(2, impatient);
        let channel = meshweave_dsl::program::Channel {
            from: 0,
            to: 1,
            depth,
            n_bytes: 8,
        };
        world.open_channel(&channel).unwrap();
        let mut ends = world.communicators();
        for i in 0..depth as u32 {
            ends[0].send(1, &[i, 7]).unwrap();
        }
        let mut got = [0; 2];
        for i in 0..3 {
            ends[1].recv(0, &mut got).unwrap();
            assert_eq!(got, [i, 7]);
            ends[0].send(1, &[i + depth as u32, 7]).unwrap();
        }
        let error = ends[0].send(1, &[9, 9]).unwrap_err().to_string();
        assert!(
            error.contains("no room in the channel to rank 1"),
            "{error}"
        );
    }
}

#[test]
fn a_group_of_one_copies() {
    on_ranks(2, PATIENT, |communicator| {
        let group = communicator.join(&[communicator.rank()]).unwrap();
        assert_eq!(communicator.group_size(group).unwrap(), 1);
        let division = Division {
            outer: 2,
            counts: vec![3],
            inner: 1,
        };
        let mut dst = [0u32; 6];
        communicator
            .all_gather(group, &[1, 2, 3, 4, 5, 6], &mut dst, &division)
            .unwrap();
        assert_eq!(dst, [1, 2, 3, 4, 5, 6]);
        let mut sum = [0.0f32; 6];
        communicator
            .all_reduce(group, ReduceKind::Sum, Some(&[1.0; 6]), &mut sum)
            .unwrap();
        assert_eq!(sum, [1.0; 6]);
        assert_eq!(communicator.stats().received_bytes, 0);
    });
}

#[test]
fn a_missing_rank_is_named() {
    let options = WaitOptions {
        timeout: Duration::from_millis(50),
        n_spins: 0,
    };
    let results = on_ranks(4, options, |communicator| {
        let group = communicator.join(&[0, 1, 2, 3]).unwrap();
        if communicator.rank() == 2 {
            // Arrives only after the others have given up.
            while communicator.world.failure().is_none() {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        communicator
            .all_reduce(group, ReduceKind::Sum, None, &mut [1.0])
            .unwrap_err()
    });
    for error in results {
        assert!(matches!(error, Error::Exhausted(_)));
        let text = error.to_string();
        assert!(text.contains("all_reduce of group [0, 1, 2, 3]"), "{text}");
        assert!(text.contains("for rank 2, which did not arrive"), "{text}");
    }
}

#[test]
fn a_failing_or_panicking_rank_stops_the_others() {
    for panics in [false, true] {
        let results = on_ranks(3, PATIENT, |communicator| {
            let pair = communicator.join(&[0, 1, 2]).unwrap();
            if communicator.rank() == 1 {
                let outcome = catch_unwind(AssertUnwindSafe(|| {
                    assert!(!panics, "a rank panics on purpose");
                }));
                let error = Error::Invalid(format!("rank 1 failed, panic: {}", outcome.is_err()));
                communicator.abort(&error);
                return error;
            }
            communicator.barrier(pair).unwrap_err()
        });
        for error in results {
            assert_eq!(
                error,
                Error::Invalid(format!("rank 1 failed, panic: {panics}"))
            );
        }
    }
}

#[test]
fn disagreeing_programs_are_reported() {
    let results = on_ranks(2, PATIENT, |communicator| {
        let group = communicator.join(&[0, 1]).unwrap();
        if communicator.rank() == 0 {
            communicator.barrier(group).unwrap_err()
        } else {
            communicator
                .all_reduce(group, ReduceKind::Sum, None, &mut [1.0])
                .unwrap_err()
        }
    });
    insta::assert_snapshot!(
        results[0],
        @"internal error: rank 0 calls barrier where rank 1 calls all_reduce; the ranks' programs disagree on the order of collectives of group [0, 1]"
    );
    let results = on_ranks(2, PATIENT, |communicator| {
        let group = communicator.join(&[0, 1]).unwrap();
        let mut sum = vec![0.0; 3 + communicator.rank()];
        communicator
            .all_reduce(group, ReduceKind::Sum, None, &mut sum)
            .unwrap_err()
    });
    assert!(
        results.iter().all(|e| matches!(e, Error::Invalid(_))),
        "{results:?}"
    );
}

#[test]
fn illegal_groups_are_refused() {
    let world = World::new(2, PATIENT);
    let mut communicator = world.communicators().remove(0);
    for ranks in [&[1][..], &[0, 0], &[0, 2], &[]] {
        assert!(
            matches!(communicator.join(ranks), Err(Error::Invalid(_))),
            "{ranks:?}"
        );
    }
}

#[test]
fn waiting_costs_no_processor_time() {
    // User and system time of this thread, in ticks of 10 ms.
    let ticks = || {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let results = on_ranks(
        2,
        WaitOptions {
            n_spins: 0,
            ..PATIENT
        },
        |communicator| {
            let group = communicator.join(&[0, 1]).unwrap();
            if communicator.rank() == 1 {
                std::thread::sleep(Duration::from_millis(200));
            }
            let before = ticks();
            communicator.barrier(group).unwrap();
            (ticks() - before, communicator.stats().wait_s)
        },
    );
    let (busy_ticks, wait_s) = results[0];
    assert!(wait_s > 0.1, "{wait_s}");
    assert!(
        busy_ticks <= 5,
        "{busy_ticks} ticks busy while waiting {wait_s} s"
    );
}
