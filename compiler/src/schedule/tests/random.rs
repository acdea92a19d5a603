//! Random schedules: what the checks accept, a machine finishes; what they refuse, it does not.

use meshweave_dsl::schedule::{Action, ActionKind, Channels, Lowered, Schedule, Verb};
use meshweave_dsl::weave::ast::ScheduleDef;
use proptest::prelude::*;

use super::*;

/// A random order that can run: again and again some action that is ready.
fn random_schedule(
    n_ranks: usize,
    n_chunks: usize,
    n_microbatches: usize,
    n_slices: usize,
    is_v: bool,
    choices: &[u32],
) -> Schedule {
    let shape = Shape::new(n_ranks, n_microbatches)
        .chunks(n_chunks)
        .slices(n_slices);
    let placement = if is_v { Placement::V } else { Placement::Loop };
    let stage_rank = placement.stage_rank(&shape);
    let mut nth = 0;
    let mut draw = |bound: usize| {
        nth += 1;
        (choices[nth % choices.len()] as usize)
            .wrapping_mul(2654435761)
            .wrapping_add(nth * 40503)
            / 7
            % bound
    };
    // All actions of a complete schedule, backward split or not by microbatch and stage.
    let mut left = Vec::new();
    for stage in 0..stage_rank.len() as u32 {
        for microbatch in 0..n_microbatches as u32 {
            let is_split = draw(2) == 0;
            for slice in 0..n_slices as u32 {
                let of = |kind| Action {
                    slice,
                    ..Action::new(stage, kind, microbatch)
                };
                let kinds: &[ActionKind] = match is_split {
                    true => &[ActionKind::F, ActionKind::I, ActionKind::W],
                    false => &[ActionKind::F, ActionKind::B],
                };
                left.extend(kinds.iter().map(|kind| of(*kind)));
            }
        }
    }
    let rows: Vec<Vec<Action>> = (0..n_ranks)
        .map(|rank| {
            left.iter()
                .copied()
                .filter(|a| stage_rank[a.stage as usize] == rank)
                .collect()
        })
        .collect();
    let whole = Schedule {
        n_slices,
        ..Schedule::new("random", n_microbatches, stage_rank.clone(), rows)
    };
    let index = index::Index::new(&whole);
    let mut is_done = vec![false; index.n_actions()];
    let mut ordered: Vec<Vec<Action>> = vec![Vec::new(); n_ranks];
    while !left.is_empty() {
        let ready: Vec<usize> = (0..left.len())
            .filter(|at| {
                let mut is_ready = true;
                index.each_dependency(left[*at], |needed| is_ready &= is_done[needed]);
                is_ready
            })
            .collect();
        let action = left.swap_remove(ready[draw(ready.len())]);
        is_done[index.id(action).unwrap()] = true;
        ordered[stage_rank[action.stage as usize]].push(action);
    }
    Schedule {
        rows: ordered,
        ..whole
    }
}

fn some_schedule() -> impl Strategy<Value = Schedule> {
    let sizes = (1usize..5, 1usize..3, 1usize..5, 1usize..3, any::<bool>());
    (sizes, proptest::collection::vec(any::<u32>(), 16..64))
        .prop_map(|((p, v, m, k, is_v), choices)| random_schedule(p, v, m, k, is_v, &choices))
}

/// A definition, printed and parsed.
fn reparsed(definition: ScheduleDef) -> ScheduleDef {
    let document = meshweave_dsl::weave::ast::Document {
        body: meshweave_dsl::weave::ast::Block::of([Statement::Schedule(definition)]),
    };
    let text = meshweave_dsl::weave::print(&document);
    let parsed = meshweave_dsl::weave::parse(&text, SourceId(0));
    assert!(
        parsed.diagnostics.is_empty(),
        "{text}{:?}",
        parsed.diagnostics
    );
    let mut found = definitions(&parsed.document);
    found.next().unwrap().clone()
}

fn some_channels() -> impl Strategy<Value = Channels> {
    prop_oneof![
        Just(Channels::Blocking),
        Just(Channels::PerPair),
        Just(Channels::PerDirection),
        (1usize..4).prop_map(Channels::Buffered),
    ]
}

/// Gradients reduced or not, then updates, a barrier, and the first stage's activations offloaded.
fn lowering(channels: Channels, options: [bool; 4]) -> Lowering {
    let [reduce_gradients, update, barrier, offload] = options;
    Lowering {
        channels,
        unsharded_stages: update.then_some(1),
        reduce_gradients,
        offloaded_stages: if offload { vec![0] } else { Vec::new() },
        barrier,
        update,
    }
}

/// The same commands with sends and receives moved about.
fn shuffled(mut lowered: Lowered, choices: &[u32]) -> Lowered {
    for (rank, row) in lowered.rows.iter_mut().enumerate() {
        for (nth, choice) in choices.iter().enumerate() {
            if row.len() < 2 {
                continue;
            }
            let at = (*choice as usize).wrapping_add(nth * 31 + rank * 17) % (row.len() - 1);
            let is_message = |at: usize| matches!(row[at].verb, Verb::Send(_) | Verb::Recv(_));
            if is_message(at) || is_message(at + 1) {
                row.swap(at, at + 1);
            }
        }
    }
    lowered
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn accepted_schedules_never_deadlock(
        schedule in some_schedule(),
        channels in some_channels(),
        seed in any::<u64>(),
        options in any::<[bool; 4]>(),
    ) {
        check(&schedule).unwrap();
        let lowered = lower(&schedule, &lowering(channels, options)).unwrap();
        check_lowered(&lowered).unwrap();
        prop_assert!(machine::finishes(&lowered, &streams(&lowered), seed));
    }

    #[test]
    fn the_check_says_what_the_machine_does(
        schedule in some_schedule(),
        channels in some_channels(),
        is_naive in any::<bool>(),
        choices in proptest::collection::vec(any::<u32>(), 0..12),
        seed in any::<u64>(),
    ) {
        let lowered = if is_naive {
            lower_naively(&schedule, channels)
        } else {
            lower(&schedule, &Lowering { channels, ..Lowering::default() }).unwrap()
        };
        let lowered = shuffled(lowered, &choices);
        let is_accepted = check_lowered(&lowered).is_ok();
        prop_assert_eq!(is_accepted, machine::finishes(&lowered, &streams(&lowered), seed));
    }

    #[test]
    fn forms_keep_the_schedule(schedule in some_schedule()) {
        // Stages and microbatches that occur are all there are, so the text says everything.
        let csv = Schedule::from_csv("random", &schedule.to_csv()).unwrap();
        prop_assert_eq!(&csv, &schedule);
        let json = serde_json::to_string(&schedule).unwrap();
        prop_assert_eq!(&serde_json::from_str::<Schedule>(&json).unwrap(), &schedule);
        let name = meshweave_dsl::weave::ast::Name::new("random").unwrap();
        let definition = reparsed(schedule.to_statement(name));
        let ScheduleBody::Rows { rows, .. } = &definition.body else {
            panic!("{definition:?} has rows");
        };
        prop_assert_eq!(&Schedule::from_block(&definition.name.node, rows).unwrap(), &schedule);
    }

    /// The second and the third level are printed, parsed and checked again; a queue that does not wait
    /// for what it needs is refused.
    #[test]
    fn lowered_forms_keep_every_command(
        schedule in some_schedule(),
        channels in some_channels(),
        options in any::<[bool; 4]>(),
        pick in any::<proptest::sample::Index>(),
    ) {
        let lowered = lower(&schedule, &lowering(channels, options)).unwrap();
        let devices = streams(&lowered);
        let name = || meshweave_dsl::weave::ast::Name::new("random").unwrap();
        let read = |statement| {
            let definition = reparsed(statement);
            lowered_definition(&definition, std::path::Path::new("."))
        };
        if lowered.rows.iter().flatten().any(|command| command.action().is_none()) {
            let found = read(lowered.to_statement(name())).unwrap();
            prop_assert_eq!(found, Some((lowered.clone(), devices.clone())));
        }
        let found = read(lowered.streams_statement(&devices, name())).unwrap();
        prop_assert_eq!(found, Some((lowered.clone(), devices.clone())));
        let mut wrong = devices.clone();
        let mut waiting: Vec<_> = wrong
            .iter_mut()
            .flat_map(|device| &mut device.streams)
            .flat_map(|stream| &mut stream.items)
            .filter(|item| !item.waits.is_empty())
            .collect();
        if !waiting.is_empty() {
            let at = pick.index(waiting.len());
            waiting[at].waits.clear();
            // What other events and the order of queues say already may be left out.
            let seed = pick.index(1 << 16) as u64;
            match read(lowered.streams_statement(&wrong, name())) {
                Ok(_) => prop_assert!(machine::finishes(&lowered, &wrong, seed)),
                Err(error) => prop_assert!(error.to_string().contains("does not wait for"), "{}", error),
            }
        }
    }

    #[test]
    fn memory_is_what_a_count_says(schedule in some_schedule()) {
        let costs = Costs::even(schedule.n_ranks, schedule.n_stages, 1.0, 1.0, 1.0);
        let share = schedule.n_ranks as f64 / schedule.n_stages as f64 / schedule.n_slices as f64;
        for (rank, memory) in replay(&schedule, &costs).iter().enumerate() {
            let (mut held, mut most) = (0i64, 0i64);
            for action in &schedule.rows[rank] {
                held += i64::from(action.kind == ActionKind::F);
                most = most.max(held);
                held -= i64::from(action.kind.gives_weight_gradient());
            }
            prop_assert!((memory.peak_bytes - most as f64 * share).abs() < 1e-9);
            prop_assert_eq!(held, 0);
        }
    }

    #[test]
    fn the_step_is_at_least_the_work(schedule in some_schedule()) {
        let costs = Costs::even(schedule.n_ranks, schedule.n_stages, 1.0, 1.4, 0.8);
        let simulation = simulate(&schedule, &costs).unwrap();
        let work_s = schedule.n_microbatches as f64 * 3.2;
        prop_assert!(simulation.step_s >= work_s - 1e-9);
        prop_assert!((simulation.bubble_s - (simulation.step_s - work_s)).abs() < 1e-9);
        let filled = backfill(&schedule, &costs).unwrap();
        check(&filled).unwrap();
        prop_assert!(simulate(&filled, &costs).unwrap().step_s <= simulation.step_s + 1e-9);
    }
}
