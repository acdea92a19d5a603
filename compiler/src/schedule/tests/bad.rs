//! Known bad cases, and every kind of corruption.

use meshweave_dsl::schedule::{Action, ActionKind, Channels, Command, Schedule, Verb};
use proptest::prelude::*;
use proptest::sample::Index as Pick;

use super::*;

fn naive_result(builtin: Builtin, n_ranks: usize, channels: Channels) -> bool {
    let shape = shape_of(builtin, n_ranks, 2 * n_ranks);
    let schedule = build(builtin, &shape, None).unwrap();
    check_lowered(&lower_naively(&schedule, channels)).is_ok()
}

const SIX: [Builtin; 6] = [
    Builtin::OneFOneB,
    Builtin::LoopedBfs,
    Builtin::Interleaved,
    Builtin::InterleavedZb,
    Builtin::ZbV,
    Builtin::DualPipeV,
];

#[test]
fn naive_communication_deadlocks() {
    for builtin in SIX {
        for n_ranks in [4, 8, 16] {
            let passes = |channels| naive_result(builtin, n_ranks, channels);
            let name = builtin.name();
            assert!(!passes(Channels::Blocking), "{name} at {n_ranks}");
            let is_bfs = builtin == Builtin::LoopedBfs;
            assert_eq!(passes(Channels::PerPair), is_bfs, "{name} at {n_ranks}");
            let is_v = matches!(builtin, Builtin::ZbV | Builtin::DualPipeV);
            assert_eq!(passes(Channels::PerDirection), !is_v, "{name} at {n_ranks}");
        }
    }
}

#[test]
fn the_sender_places_both_and_all_pass() {
    for builtin in SIX {
        for n_ranks in [2, 4, 8, 16] {
            let schedule = build(builtin, &shape_of(builtin, n_ranks, 2 * n_ranks), None).unwrap();
            for channels in [
                Channels::Blocking,
                Channels::PerPair,
                Channels::PerDirection,
                Channels::Buffered(1),
                Channels::Buffered(4),
            ] {
                let lowering = Lowering {
                    channels,
                    ..Lowering::default()
                };
                let lowered = lower(&schedule, &lowering).unwrap();
                check_lowered(&lowered).unwrap();
                assert!(
                    machine::finishes(&lowered, &streams(&lowered), 1),
                    "{} {channels:?}",
                    builtin.name()
                );
            }
        }
    }
}

#[test]
fn a_deadlock_prints_its_cycle() {
    let schedule = build(Builtin::OneFOneB, &Shape::new(2, 2), None).unwrap();
    let error = check_lowered(&lower_naively(&schedule, Channels::Blocking)).unwrap_err();
    insta::assert_snapshot!(error, @"
    with one blocking queue a rank these wait for each other, each for the one above, the first for the last:
      `0RECV_B0` (rank 0, step 4) with `1SEND_B0` (rank 1, step 3)
      `0SEND_F1` (rank 0, step 3) with `1RECV_F1` (rank 1, step 4)
    let the sender place both ends of a message (`lower` does)
    step   rank 0     rank 1
       0   0F0        1RECV_F0
       1   0SEND_F0   1F0
       2   0F1        1B0
       3  >0SEND_F1< >1SEND_B0<
       4  >0RECV_B0< >1RECV_F1<
       5   0B0        1F1
       6   0RECV_B1   1B1
       7   0B1        1SEND_B1
    ");
}

fn csv_error(text: &str) -> String {
    let schedule = Schedule::from_csv("x", text).unwrap();
    check(&schedule).unwrap_err().to_string()
}

#[test]
fn errors_print_the_grid_with_the_cell() {
    insta::assert_snapshot!(csv_error("0F0,0F1,0B0\n1F0,1B0,1F1,1B1\n"), @"
    `0B1` is missing on rank 0; every microbatch has one F, and one B or one I and one W, in every stage
    step   rank 0  rank 1
       0   0F0     1F0
       1  >0F1<    1B0
       2   0B0     1F1
       3           1B1
    ");
    insta::assert_snapshot!(csv_error("0F0,0I0,0W0,0B0\n"), @"
    rank 0 has both `0B0` and `0I0`; the full backward is both halves, remove one of them
    step   rank 0
       0   0F0
       1  >0I0<
       2  >0W0<
       3  >0B0<
    ");
    insta::assert_snapshot!(csv_error("0F0,0I0\n"), @"
    `0W0` is missing on rank 0; every microbatch has one F, and one B or one I and one W, in every stage
    step   rank 0
       0   0F0
       1  >0I0<
    ");
    insta::assert_snapshot!(csv_error("0B0,0F0\n"), @"
    `0B0` on rank 0 at step 0 waits for `0F0` on rank 0 at step 1, which comes later; move it before
    step   rank 0
       0  >0B0<
       1  >0F0<
    ");
    // Rank 0 wants the gradient of microbatch 0 first, rank 1 the activations of microbatch 1.
    insta::assert_snapshot!(csv_error("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n"), @"
    2 ranks wait for each other, so none goes on:
      `0B0` on rank 0 at step 1 waits for `1B0` on rank 1 at step 3
      `1F1` on rank 1 at step 0 waits for `0F1` on rank 0 at step 2
    step   rank 0  rank 1
       0   0F0    >1F1<
       1  >0B0<    1B1
       2  >0F1<    1F0
       3   0B1    >1B0<
    ");
    let dependent = Schedule::from_csv("x", "(0F0;0B0)OVERLAP_F_B\n").unwrap();
    insta::assert_snapshot!(check(&dependent).unwrap_err(), @"
    `0B0` waits for `0F0` and rank 0 overlaps them at step 0
    step   rank 0
       0  >0F0<
       1  >0B0<
    ");
    let mut foreign = build(Builtin::OneFOneB, &Shape::new(2, 2), None).unwrap();
    foreign.rows[1].push(Action::new(0, ActionKind::R, 0));
    insta::assert_snapshot!(check(&foreign).unwrap_err(), @"
    `0R0` stands on rank 1 at step 4 and stage 0 is on rank 0; move it there
    step   rank 0  rank 1
       0   0F0     1F0
       1   0F1     1B0
       2   0B0     1F1
       3   0B1     1B1
       4          >0R0<
    ");
    foreign.rows[1].pop();
    foreign.rows[0].push(Action::new(0, ActionKind::R, 7));
    insta::assert_snapshot!(check(&foreign).unwrap_err(), @"
    `0R7` on rank 0 at step 4 is of microbatch 7 and there are 2; they count from 0
    step   rank 0  rank 1
       0   0F0     1F0
       1   0F1     1B0
       2   0B0     1F1
       3   0B1     1B1
       4  >0R7<
    ");
}

#[test]
fn collectives_of_copies_need_one_order() {
    let schedule = build(Builtin::Chimera, &Shape::new(2, 4), None).unwrap();
    let lowering = Lowering {
        reduce_gradients: true,
        update: true,
        barrier: true,
        ..Lowering::default()
    };
    let mut lowered = lower(&schedule, &lowering).unwrap();
    check_lowered(&lowered).unwrap();
    let reductions: Vec<usize> = (0..lowered.rows[0].len())
        .filter(|position| lowered.rows[0][*position].verb == Verb::ReduceGrad)
        .collect();
    let row = &mut lowered.rows[0];
    let (first, last) = (row.remove(reductions[0]), reductions[1]);
    row.insert(last, first);
    let error = check_lowered(&lowered).unwrap_err().to_string();
    let is_order = error.contains("reduce gradients of the same stages in different orders");
    assert!(is_order || error.contains("wait for each other"), "{error}");
}

#[test]
fn messages_must_match() {
    let schedule = build(Builtin::OneFOneB, &Shape::new(2, 2), None).unwrap();
    let lowered = lower(&schedule, &Lowering::default()).unwrap();
    let without = |text: &str| {
        let mut lowered = lowered.clone();
        let command = Command::parse(text).unwrap();
        for row in &mut lowered.rows {
            row.retain(|other| *other != command);
        }
        check_lowered(&lowered).unwrap_err().to_string()
    };
    assert!(without("0SEND_F1").starts_with("`1RECV_F1` on rank 1 at step"));
    assert!(without("0RECV_B0").starts_with("`1SEND_B0` on rank 1 at step"));
    let mut doubled = lowered.clone();
    doubled.rows[0].push(Command::parse("0SEND_F1").unwrap());
    assert!(
        check_lowered(&doubled)
            .unwrap_err()
            .to_string()
            .contains("stands twice")
    );
    let mut outside = lowered;
    outside.rows[0].push(Command::parse("0SEND_B1").unwrap());
    assert!(
        check_lowered(&outside)
            .unwrap_err()
            .to_string()
            .contains("no stage on its other end")
    );
}

fn some_schedule() -> impl Strategy<Value = Schedule> {
    (0..Builtin::ALL.len(), 1usize..4, 1usize..4).prop_filter_map("exists", |(nth, p, m)| {
        let builtin = Builtin::ALL[nth];
        build(builtin, &shape_of(builtin, 2 * p, 2 * m), None).ok()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn duplicates_are_refused(schedule in some_schedule(), at in any::<Pick>(), to in any::<Pick>()) {
        let mut bad = schedule;
        let rank = at.index(bad.n_ranks);
        let position = at.index(bad.rows[rank].len());
        let action = bad.rows[rank][position];
        bad.pairs[rank].clear();
        let place = to.index(bad.rows[rank].len() + 1);
        bad.rows[rank].insert(place, action);
        let error = check(&bad).unwrap_err().to_string();
        prop_assert!(error.contains(&format!("`{action}` stands twice on rank {rank}")), "{error}");
        let csv = Schedule::from_csv("x", &bad.to_csv()).unwrap_err().to_string();
        prop_assert!(csv.contains(&format!("`{action}` stands twice")), "{csv}");
    }

    #[test]
    fn missing_actions_are_refused(schedule in some_schedule(), at in any::<Pick>()) {
        let mut bad = schedule;
        let rank = at.index(bad.n_ranks);
        let position = at.index(bad.rows[rank].len());
        bad.pairs[rank].clear();
        let action = bad.rows[rank].remove(position);
        let error = check(&bad).unwrap_err().to_string();
        prop_assert!(error.contains(&format!("`{action}` is missing on rank {rank}")), "{error}");
    }

    #[test]
    fn wrong_stages_are_refused(schedule in some_schedule(), at in any::<Pick>(), to in any::<Pick>()) {
        let mut bad = schedule;
        let rank = at.index(bad.n_ranks);
        let position = at.index(bad.rows[rank].len());
        bad.pairs[rank].clear();
        let action = bad.rows[rank].remove(position);
        let other = (rank + 1 + to.index(bad.n_ranks - 1)) % bad.n_ranks;
        let place = to.index(bad.rows[other].len() + 1);
        bad.pairs[other].clear();
        bad.rows[other].insert(place, action);
        let error = check(&bad).unwrap_err().to_string();
        prop_assert!(error.contains(&format!("`{action}` stands on rank {other}")), "{error}");
    }

    #[test]
    fn swapped_dependents_are_refused(schedule in some_schedule(), at in any::<Pick>()) {
        let mut bad = schedule;
        let rank = at.index(bad.n_ranks);
        bad.pairs[rank].clear();
        let row = &mut bad.rows[rank];
        let forwards: Vec<usize> =
            (0..row.len()).filter(|position| row[*position].kind == ActionKind::F).collect();
        let forward = forwards[at.index(forwards.len())];
        let backward = (0..row.len())
            .find(|position| {
                let (f, b) = (row[forward], row[*position]);
                b.kind.gives_input_gradient() && b.at_stage(f.stage).with_kind(f.kind) == f && b.stage == f.stage
            })
            .unwrap();
        row.swap(forward, backward);
        let error = check(&bad).unwrap_err().to_string();
        let is_found = error.contains("which comes later") || error.contains("ranks wait for each other");
        prop_assert!(is_found, "{error}");
    }

    #[test]
    fn cycles_between_ranks_are_refused(n_ranks in 2usize..6, extra in 0usize..6, at in any::<Pick>()) {
        // Rank r wants the gradient of microbatch 0 before it sends microbatch 1; the rank after wants
        // microbatch 1 first.
        let n_microbatches = 2 + extra;
        let mut bad = build(Builtin::GPipe, &Shape::new(n_ranks, n_microbatches), None).unwrap();
        let rank = at.index(n_ranks - 1);
        let move_to = |row: &mut Vec<Action>, action: Action, place: usize| {
            row.retain(|other| *other != action);
            row.insert(place, action);
        };
        let stage = rank as u32;
        move_to(&mut bad.rows[rank], Action::new(stage, ActionKind::B, 0), 1);
        move_to(&mut bad.rows[rank + 1], Action::new(stage + 1, ActionKind::F, 1), 0);
        let error = check(&bad).unwrap_err().to_string();
        prop_assert!(error.contains("ranks wait for each other, so none goes on"), "{error}");
        prop_assert!(error.contains('>') && error.contains("rank"), "{error}");
    }
}
