//! The second and third level: commands that make sense, queues in time.

use meshweave_dsl::schedule::{Channels, Lowered};

use super::*;

fn lowered(schedule: &Schedule, lowering: &Lowering) -> Lowered {
    let lowered = lower(schedule, lowering).unwrap();
    check_lowered(&lowered).unwrap();
    lowered
}

/// Queues without memory actions take what the simulation of the actions says, and hold as much.
#[test]
fn queues_take_what_the_schedule_takes() {
    for schedule in all_built(4, 8).into_iter().chain(all_built(2, 4)) {
        let mut costs = Costs::even(schedule.n_ranks, schedule.n_stages, 1.0, 1.4, 0.8);
        for stage in &mut costs.stages {
            stage.p2p_s = 0.3;
        }
        costs.overlap = 0.9;
        let simulation = simulate(&schedule, &costs).unwrap();
        let free = vec![CommandCosts::default(); schedule.n_stages];
        for channels in [Channels::PerDirection, Channels::Buffered(64)] {
            let lowering = Lowering {
                channels,
                ..Lowering::default()
            };
            let run = run_devices(&lowered(&schedule, &lowering), &costs, &free).unwrap();
            let name = &schedule.name;
            assert!(
                (run.step_s - simulation.step_s).abs() < 1e-9,
                "{name} {channels:?}: {} {}",
                run.step_s,
                simulation.step_s
            );
            for (held, expected) in run.device_peak_bytes.iter().zip(&simulation.peak_bytes) {
                // Versions of weights are kept apart.
                assert!((held - expected).abs() < 1e-9, "{name}: {held} {expected}");
            }
            let inner_s = simulation.bubble.total_s();
            let waits_s: f64 = run.waits_s.iter().sum();
            assert!(waits_s <= inner_s + 1e-9, "{name}: {waits_s} {inner_s}");
        }
    }
}

/// A receiver that is late stops its sender once the buffer is full.
#[test]
fn small_buffers_never_speed_up() {
    let schedule = build(Builtin::Interleaved, &Shape::new(4, 8).chunks(2), None).unwrap();
    let mut costs = Costs::even(4, 8, 1.0, 1.0, 1.0);
    for stage in &mut costs.stages {
        stage.p2p_s = 0.7;
    }
    let step_s = |channels| {
        let lowering = Lowering {
            channels,
            ..Lowering::default()
        };
        let free = vec![CommandCosts::default(); 8];
        let run = run_devices(&lowered(&schedule, &lowering), &costs, &free);
        run.unwrap().step_s
    };
    let deep_s = step_s(Channels::Buffered(64));
    assert!(step_s(Channels::Buffered(1)) >= deep_s);
    assert!(step_s(Channels::PerPair) > deep_s);
    assert!(step_s(Channels::Blocking) > step_s(Channels::PerPair));
}

#[test]
fn offloading_moves_bytes_to_the_host() {
    let schedule = build(Builtin::OneFOneB, &Shape::new(4, 12), None).unwrap();
    let costs = Costs::even(4, 4, 1.0, 1.0, 1.0);
    let run = |copy_s| {
        let lowering = Lowering {
            offloaded_stages: vec![0],
            ..Lowering::default()
        };
        let of_stage = CommandCosts {
            copy_s,
            ..CommandCosts::default()
        };
        run_devices(&lowered(&schedule, &lowering), &costs, &[of_stage; 4]).unwrap()
    };
    // Rank 0 held four microbatches: of these stay what it computes, what goes and what comes.
    let quick = run(0.2);
    assert_eq!(simulate(&schedule, &costs).unwrap().step_s, quick.step_s);
    assert!(
        quick.device_peak_bytes[0] <= 3.0,
        "{:?}",
        quick.device_peak_bytes
    );
    assert!(quick.host_peak_bytes[0] >= 2.0 && quick.host_peak_bytes[1] == 0.0);
    assert_eq!(quick.waits_s[WaitFor::Copy as usize], 0.0);
    // A slow host is waited for.
    let slow = run(2.0);
    assert!(slow.step_s > quick.step_s);
    assert!(slow.waits_s[WaitFor::Copy as usize] > 0.0);
}

#[test]
fn weights_are_gathered_ahead_of_their_use() {
    let schedule = build(Builtin::Interleaved, &Shape::new(2, 4).chunks(2), None).unwrap();
    let costs = Costs::even(2, 4, 1.0, 1.0, 1.0);
    let run = |unsharded_stages| {
        let lowering = Lowering {
            unsharded_stages: Some(unsharded_stages),
            reduce_gradients: true,
            barrier: true,
            update: true,
            ..Lowering::default()
        };
        let of_stage = CommandCosts {
            unshard_s: 0.25,
            gathered_bytes: 10.0,
            reduce_s: 0.5,
            update_s: 0.125,
            ..CommandCosts::default()
        };
        run_devices(&lowered(&schedule, &lowering), &costs, &[of_stage; 4]).unwrap()
    };
    let (one, both) = (run(1), run(2));
    // Both stages of a rank gathered once a step, or each anew whenever the other was there.
    assert!(one.device_peak_bytes[0] < both.device_peak_bytes[0]);
    assert!(both.device_peak_bytes[0] >= 20.0 && one.device_peak_bytes[0] < 20.0);
    assert!(one.waits_s[WaitFor::Collective as usize] > both.waits_s[WaitFor::Collective as usize]);
    // The first gathering is waited for, then the last reduction and two updates.
    let alone_s = simulate(&schedule, &costs).unwrap().step_s;
    assert_eq!(both.step_s, alone_s + 0.25 + 0.5 + 2.0 * 0.125);
}

#[test]
fn commands_that_make_no_sense_are_refused() {
    for (text, expected) in [
        (
            "0UNSHARD,0F0,0RESHARD,0B0\n",
            "`0B0` on rank 0 at step 3 runs while its stage's weights are not gathered",
        ),
        (
            "0UNSHARD,0F0,0B0\n",
            "`0UNSHARD` on rank 0 at step 0 gathers weights that are never freed",
        ),
        (
            "0F0,0RESHARD,0B0\n",
            "`0F0` on rank 0 at step 0 runs while its stage's weights are not gathered",
        ),
        (
            "0F0,0OFFLOAD0,0B0,0PREFETCH0\n",
            "`0OFFLOAD0` on rank 0 at step 1 moves what is not back for its backward",
        ),
        (
            "0F0,0PREFETCH0,0B0\n",
            "`0PREFETCH0` on rank 0 at step 1 brings back what was not offloaded",
        ),
        (
            "0OFFLOAD0,0F0,0PREFETCH0,0B0\n",
            "`0OFFLOAD0` on rank 0 at step 0 moves what is not computed yet",
        ),
        (
            "0F0,0REDUCE_GRAD,0B0,0UPDATE\n",
            "`0REDUCE_GRAD` on rank 0 at step 1 comes before `0B0`, which it must follow",
        ),
        (
            "0F0,0B0,0UPDATE,0BARRIER\n",
            "`0UPDATE` on rank 0 at step 2 comes before `0BARRIER`, which it must follow",
        ),
        (
            "0F0,0B0,1UPDATE\n",
            "`1UPDATE` on rank 0 at step 2 is of stage 1 and there are 1",
        ),
    ] {
        let lowered = Lowered::from_csv("x", text, Channels::default()).unwrap();
        let error = check_lowered(&lowered).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
        assert!(
            error.contains('>') && error.contains("step   rank 0"),
            "{error}"
        );
    }
    // What PyTorch's `compute_comms` names, and what `lower` writes, is read again.
    for schedule in all_built(4, 8) {
        let lowering = Lowering {
            unsharded_stages: Some(1),
            reduce_gradients: schedule.updates == Updates::Flush,
            offloaded_stages: vec![0],
            barrier: schedule.updates == Updates::Flush,
            update: true,
            ..Lowering::default()
        };
        let written = lowered(&schedule, &lowering);
        let read = Lowered::from_csv("x", &written.to_csv(), Channels::default()).unwrap();
        assert_eq!(read.rows, written.rows, "{}", schedule.name);
        check(&read.schedule).unwrap();
        if schedule.updates == Updates::Flush {
            check_lowered(&read).unwrap();
        }
    }
}
