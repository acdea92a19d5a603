//! Balance while a model runs: shares of replicas, and experts that change places between steps.

use meshweave_compiler::placement::balance::{Slots, balance, least_greatest};
use meshweave_compiler::placement::rebalance::{exchanges, shares};
use meshweave_dsl::trace::synth::Random;

/// Shares by the program are no worse than even ones, add up, and reach the bound of all placements
/// where replicas suffice.
#[test]
fn shares_are_between_the_bound_and_even_ones() {
    let mut random = Random::new(5);
    let slots = Slots {
        devices: 8,
        per_device: 5,
    };
    for _ in 0..20 {
        let load: Vec<f64> = (0..32).map(|_| random.normal().exp()).collect();
        let placed = balance(&load, slots).unwrap();
        let shares = shares(&load, &placed.devices).unwrap();
        assert!(shares.greatest <= placed.greatest * (1.0 + 1e-7));
        let mean = load.iter().sum::<f64>() / 8.0;
        assert!(shares.greatest >= mean * (1.0 - 1e-7));
        assert!(shares.greatest >= least_greatest(&load, slots).min(mean) * (1.0 - 1e-7));
        let mut taken = vec![0.0; load.len()];
        for (held, parts) in placed.devices.iter().zip(&shares.of_slots) {
            for (expert, part) in held.iter().zip(parts) {
                taken[usize::from(*expert)] += part;
            }
        }
        for (taken, load) in taken.iter().zip(&load) {
            assert!((taken - load).abs() < 1e-9 * load.max(1.0));
        }
    }
}

#[test]
fn shares_of_a_small_case_are_known() {
    // Expert 0 is on both devices, 1 and 2 on one each: 6 + 2 + 4 are divided evenly.
    let devices = [vec![0, 1], vec![0, 2]];
    let shares = shares(&[6.0, 2.0, 4.0], &devices).unwrap();
    assert!((shares.greatest - 6.0).abs() < 1e-7);
    assert!((shares.of_slots[0][0] - 4.0).abs() < 1e-6);
    assert!((shares.of_slots[1][0] - 2.0).abs() < 1e-6);
    let error =
        meshweave_compiler::placement::rebalance::shares(&[1.0, 2.0], &[vec![0]]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "expert 1 has a load of 2 and is on no device: give it a slot"
    );
}

#[test]
fn exchanges_help_and_are_bounded() {
    let slots = vec![vec![9.0, 8.0], vec![1.0, 2.0], vec![5.0, 5.0]];
    assert!(exchanges(&slots, 0).is_empty());
    assert_eq!(exchanges(&slots, 1), [[(0, 0), (1, 1)]]);
    // The busiest device has 10 then, which no further exchange lowers.
    assert_eq!(exchanges(&slots, 9).len(), 1);
    assert!(exchanges(&[vec![1.0], vec![1.0]], 5).is_empty());
}

/// Experts that change places between steps leave the losses as they are, and no more of them move than
/// was allowed.
#[cfg(feature = "mlir")]
#[test]
fn losses_do_not_change_when_experts_move() {
    let folder = tempfile::tempdir().unwrap();
    let root = env!("CARGO_MANIFEST_DIR");
    let document = format!("{root}/examples/moe-text.weave");
    let run = |flags: &[&str]| -> serde_json::Value {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_meshweave"))
            .args(["run", &document, "--steps", "6", "--format", "json"])
            .args(flags)
            .current_dir(folder.path())
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{error}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let losses = |value: &serde_json::Value| -> Vec<f64> {
        let losses = value["losses"].as_array().unwrap().iter();
        losses.map(|loss| loss.as_f64().unwrap()).collect()
    };
    let still = run(&[]);
    let moved = run(&["--rebalance", "2", "--moves", "6"]);
    for (a, b) in losses(&still).iter().zip(losses(&moved)) {
        assert!((a - b).abs() < 2e-5 * a, "{a} against {b}");
    }
    let times = moved["rebalanced"]["moved"].as_array().unwrap();
    assert_eq!(times.len(), 3);
    let counts: Vec<u64> = times.iter().map(|n| n.as_u64().unwrap()).collect();
    assert!(counts.iter().all(|n| *n <= 6 && n % 2 == 0), "{counts:?}");
    assert!(counts.iter().sum::<u64>() > 0);
    for pair in moved["rebalanced"]["balancedness"]["measured"]
        .as_array()
        .unwrap()
    {
        assert!(pair[1].as_f64() >= pair[0].as_f64(), "{pair}");
    }
}
