#![allow(clippy::unwrap_used)]

use meshweave_dsl::placement::Placement;
use meshweave_dsl::trace::TraceShape;
use meshweave_dsl::trace::statistics::Transitions;
use meshweave_dsl::trace::synth::{Load, Random, Router};
use proptest::prelude::*;

use super::PlacementError;
use super::assign::assign;
use super::balance::{Slots, balance, balance_grouped};
use super::bounds::{Certificate, Proof, certify, evaluate};
use super::chain::{Chain, Division, Levels};
use super::coupled::{CoupledOptions, Multipliers};
use super::eigen::{Eigen, eigenvalues};
use super::exact::{assignments, dynamic};
use super::ilp::{self, Formulation};
use super::joint::{Demand, seconds};
use super::matching::Prices;
use super::migrate::nearest;
use super::price::{Costs, kept};
use super::search::{SearchOptions, search};
use super::solve::{Evidence, Method, Objective, Request, place, place_trace};

/// A chain of random shares, some of them large.
fn random_chain(layers: usize, experts: usize, seed: u64) -> Chain {
    let mut random = Random::new(seed);
    let mut pair = || -> Vec<f32> {
        let raw = (0..experts * experts).map(|_| random.uniform().powi(4));
        let raw: Vec<f64> = raw.collect();
        let sum: f64 = raw.iter().sum();
        raw.iter().map(|x| (x / sum) as f32).collect()
    };
    Chain::new(&Transitions {
        experts,
        pairs: (1..layers).map(|_| pair()).collect(),
    })
}

fn router(layers: usize, experts: usize, top_k: usize) -> Router {
    Router {
        shape: TraceShape {
            layers,
            experts,
            top_k,
        },
        topics: 4,
        noise: 0.3,
        concentration: 0.5,
        load: Load::LogNormal(0.5),
        seed: 11,
    }
}

fn request(devices: usize, per_node: usize, objective: Objective) -> Request {
    Request {
        devices,
        per_node,
        slots: None,
        objective,
        costs: Costs {
            expert_s: 1e-6,
            within_node_s: 1e-7,
            between_nodes_s: 9e-7,
        },
        expert_bytes: Some(1 << 20),
        present: None,
        held_out: 0.25,
        search: SearchOptions {
            threads: 2,
            ..SearchOptions::default()
        },
        exact_steps: 1e7,
        coupled_steps: 0,
    }
}

/// All divisions of a layer, by brute force.
fn divisions(experts: usize, groups: usize) -> Vec<Vec<u16>> {
    let size = experts / groups;
    let mut all = vec![Vec::new()];
    for _ in 0..experts {
        all = all
            .iter()
            .flat_map(|division: &Vec<u16>| {
                let open = (0..groups as u16)
                    .filter(|group| division.iter().filter(|g| *g == group).count() < size);
                open.map(|group| {
                    let mut longer = division.clone();
                    longer.push(group);
                    longer
                })
                .collect::<Vec<_>>()
            })
            .collect();
    }
    all
}

/// The most that any division keeps, by trying all of them.
fn brute_force(chain: &Chain, groups: usize) -> f64 {
    let all = divisions(chain.experts, groups);
    let mut best = f64::NEG_INFINITY;
    let mut chosen: Vec<usize> = vec![0; chain.layers];
    // The first layer's names do not matter, but trying them keeps this plain.
    loop {
        let division: Division = chosen.iter().map(|at| all[*at].clone()).collect();
        best = best.max(chain.kept(&division));
        let mut layer = 0;
        while layer < chain.layers {
            chosen[layer] += 1;
            if chosen[layer] < all.len() {
                break;
            }
            chosen[layer] = 0;
            layer += 1;
        }
        if layer == chain.layers {
            return best;
        }
    }
}

fn random_division(layers: usize, experts: usize, groups: usize, seed: u64) -> Division {
    let mut random = Random::new(seed);
    (0..layers)
        .map(|_| {
            let mut layer: Vec<u16> = (0..experts).map(|e| (e % groups) as u16).collect();
            random.shuffle(&mut layer);
            layer
        })
        .collect()
}

#[test]
fn assignments_are_optimal_and_their_prices_prove_it() {
    let mut random = Random::new(5);
    for (columns, capacity) in [(3, 2), (6, 1), (2, 3)] {
        let rows = columns * capacity;
        let profits: Vec<f64> = (0..rows * columns).map(|_| random.uniform()).collect();
        let assigned = assign(&profits, columns, capacity);
        let all = divisions(rows, columns);
        let profit = |division: &Vec<u16>| -> f64 {
            let rows = division.iter().enumerate();
            rows.map(|(row, column)| profits[row * columns + usize::from(*column)])
                .sum()
        };
        let best = all.iter().map(profit).fold(0.0, f64::max);
        assert!((assigned.profit - best).abs() < 1e-12);
        let prices: f64 = assigned.row_prices.iter().sum::<f64>()
            + capacity as f64 * assigned.column_prices.iter().sum::<f64>();
        assert!((prices - best).abs() < 1e-9);
        for (at, profit) in profits.iter().enumerate() {
            let price = assigned.row_prices[at / columns] + assigned.column_prices[at % columns];
            assert!(*profit <= price + 1e-9);
        }
    }
}

#[test]
fn eigenvectors_are_eigenvectors() {
    for n in [1, 2, 7, 40] {
        let mut random = Random::new(n as u64);
        let mut matrix = vec![0.0; n * n];
        for row in 0..n {
            for column in 0..=row {
                let x = random.normal();
                matrix[row * n + column] = x;
                matrix[column * n + row] = x;
            }
        }
        let eigen = Eigen::of(&matrix, n);
        let again = eigen.map(|value| value);
        for (a, b) in matrix.iter().zip(&again) {
            assert!((a - b).abs() < 1e-10, "{a} became {b}");
        }
        let identity = eigen.map(|_| 1.0);
        for (at, x) in identity.iter().enumerate() {
            let expected = if at / n == at % n { 1.0 } else { 0.0 };
            assert!((x - expected).abs() < 1e-11);
        }
        for (a, b) in eigen.values.iter().zip(eigenvalues(&matrix, n)) {
            assert!((a - b).abs() < 1e-10);
        }
    }
}

#[test]
fn small_chains_are_solved_exactly() {
    for (layers, experts, groups) in [(3, 4, 2), (4, 4, 4), (3, 6, 2), (2, 6, 3)] {
        let chain = random_chain(layers, experts, 3 + experts as u64);
        let best = brute_force(&chain, groups);
        let by_steps = dynamic(&chain, groups, 1e9).unwrap();
        assert!((chain.kept(&by_steps) - best).abs() < 1e-9);
        let found = search(&chain, &Levels::flat(groups), &SearchOptions::default());
        assert!(chain.kept(&found) <= best + 1e-9);
        if experts == groups {
            let (division, _) = assignments(&chain);
            assert!((chain.kept(&division) - best).abs() < 1e-9);
        }
    }
}

#[test]
fn both_integer_programs_are_exact() {
    let chain = random_chain(3, 4, 8);
    let best = brute_force(&chain, 2);
    for formulation in [Formulation::Plain, Formulation::Flow] {
        let solved = ilp::solve(&chain, 2, formulation, 60.0).unwrap();
        assert!(solved.is_optimal);
        assert!(
            (solved.kept - best).abs() < 1e-6,
            "{formulation:?}: {} of {best}",
            solved.kept
        );
    }
}

#[test]
fn two_groups_of_four_are_re_split_to_the_optimum() {
    // All experts of both groups are movable at once, so one re-splitting is exact.
    let chain = random_chain(12, 8, 9);
    let best = chain.kept(&dynamic(&chain, 2, 1e9).unwrap());
    let found = search(&chain, &Levels::flat(2), &SearchOptions::default());
    assert!((chain.kept(&found) - best).abs() < 1e-9);
}

#[test]
fn search_does_not_depend_on_the_number_of_threads() {
    let chain = random_chain(5, 24, 2);
    let levels = Levels {
        groups: 6,
        per_node: 2,
        same_device: 0.2,
        same_node: 0.8,
    };
    let with = |threads| {
        let options = SearchOptions {
            threads,
            ..SearchOptions::default()
        };
        search(&chain, &levels, &options)
    };
    assert_eq!(with(1), with(3));
}

#[test]
fn topics_are_found() {
    let trace = Router {
        topics: 8,
        concentration: f64::INFINITY,
        load: Load::Uniform,
        ..router(6, 32, 1)
    }
    .trace(40_000)
    .unwrap();
    let placed = place_trace(&trace, &request(8, 8, Objective::Affinity)).unwrap();
    let share = placed.report.device;
    // A device holds a topic: 0.7 stays by topic and an eighth of the noise by chance.
    assert!((share.kept - (0.7 + 0.3 / 8.0)).abs() < 0.01, "{share:?}");
    assert!(share.gap() < 0.005, "{share:?}");
    assert!((share.held_out.unwrap() - share.kept).abs() < 0.02);
    assert!(share.linear.unwrap() < 0.2);
}

#[test]
fn one_expert_a_device_is_proven_optimal() {
    let trace = router(6, 16, 1).trace(5000).unwrap();
    let placed = place_trace(&trace, &request(16, 16, Objective::Affinity)).unwrap();
    assert_eq!(placed.report.method, Method::Assignments);
    assert!(
        placed.report.device.gap() < 1e-9,
        "{:?}",
        placed.report.device
    );
}

#[test]
fn certificates_check_without_a_solver_whatever_they_hold() {
    let chain = random_chain(4, 12, 4);
    let found = search(&chain, &Levels::flat(3), &SearchOptions::default());
    let certificate = certify(&chain, 3, 1);
    let text = serde_json::to_string(&certificate).unwrap();
    let reread: Certificate = serde_json::from_str(&text).unwrap();
    assert_eq!(evaluate(&chain, &reread), evaluate(&chain, &certificate));
    assert!(evaluate(&chain, &certificate) >= chain.kept(&found));
    let forged = Certificate {
        groups: 3,
        pairs: vec![Proof::Matching(Prices {
            rows: vec![-1.0; 12],
            columns: vec![0.1; 12],
        })],
    };
    assert!(evaluate(&chain, &forged) >= chain.kept(&found));
}

#[test]
fn the_coupled_bound_holds_and_is_tighter_than_the_spectral_one() {
    let chain = random_chain(6, 24, 6);
    let found = search(&chain, &Levels::flat(6), &SearchOptions::default());
    let options = CoupledOptions {
        steps: 12,
        threads: 2,
    };
    let coupled = Multipliers::find(&chain, 6, options).bound(&chain, 2);
    let spectral = Certificate {
        groups: 6,
        pairs: vec![Proof::Spectral; 5],
    };
    assert!(coupled >= chain.kept(&found));
    assert!(coupled < evaluate(&chain, &spectral));
    // Multipliers that are not legal are paid for.
    let mut spoiled = Multipliers::find(&chain, 6, options);
    for pair in &mut spoiled.pairs {
        pair.before.iter_mut().for_each(|x| *x *= 0.5);
    }
    assert!(spoiled.bound(&chain, 1) >= chain.kept(&found));
}

/// The example of EPLB's README: 12 experts in 4 groups, 16 slots on 8 devices of 2 nodes.
const EPLB: [[f64; 12]; 2] = [
    [
        90., 132., 40., 61., 104., 165., 39., 4., 73., 56., 183., 86.,
    ],
    [
        20., 107., 104., 64., 19., 197., 187., 157., 172., 86., 16., 27.,
    ],
];

#[test]
fn the_example_of_eplb_is_balanced_best() {
    let slots = Slots {
        devices: 8,
        per_device: 2,
    };
    let greatest: Vec<f64> = EPLB
        .iter()
        .map(|load| balance(load, slots).unwrap().greatest)
        .collect();
    assert_eq!(greatest, [136.0, 172.0]);
    let grouped: Vec<f64> = EPLB
        .iter()
        .map(|load| balance_grouped(load, slots, 4, 2).unwrap().greatest)
        .collect();
    assert_eq!(grouped, [151.0, 179.5]);
}

#[test]
fn lognormal_loads_are_balanced_as_well_as_packing_and_swap_are_known_to() {
    for (devices, per_device, least) in [(32, 9, 0.9998), (64, 5, 0.9994)] {
        let mut random = Random::new(3);
        let mut sum = 0.0;
        for _ in 0..58 {
            let load: Vec<f64> = (0..256).map(|_| (0.5 * random.normal()).exp()).collect();
            let slots = Slots {
                devices,
                per_device,
            };
            let placed = balance(&load, slots).unwrap();
            assert!(Placement::new(vec![placed.devices], 8).is_ok());
            sum += load.iter().sum::<f64>() / devices as f64 / placed.greatest;
        }
        assert!(sum / 58.0 >= least, "{devices} devices: {}", sum / 58.0);
    }
}

#[test]
fn joint_placement_is_no_slower_than_either() {
    let trace = router(5, 32, 2).trace(6000).unwrap();
    let evidence = Evidence::of_trace(&trace);
    let demand = Demand {
        chain: &evidence.chain,
        load: &evidence.load,
        choices: 2.0,
    };
    let of = |objective, slots| {
        let request = Request {
            slots,
            ..request(8, 4, objective)
        };
        let placed = place(&evidence, None, &request).unwrap();
        let total = seconds(&demand, request.costs, &placed.placement);
        assert!((total - placed.report.seconds.predicted).abs() < 1e-15);
        assert!(placed.report.seconds.bound <= total);
        total
    };
    // Both starts of the search, and with spare slots the one by load.
    assert!(of(Objective::Joint, None) <= of(Objective::Load, None) * (1.0 + 1e-9));
    assert!(of(Objective::Joint, None) <= of(Objective::Affinity, None) * (1.0 + 1e-9));
    assert!(of(Objective::Joint, Some(5)) <= of(Objective::Load, Some(5)) * (1.0 + 1e-9));
}

#[test]
fn nodes_count() {
    let trace = router(6, 32, 1).trace(8000).unwrap();
    let placed = place_trace(&trace, &request(8, 2, Objective::Affinity)).unwrap();
    let report = placed.report;
    assert!(report.node.kept >= report.device.kept);
    assert!(report.node.bound >= report.node.kept);
    assert!(report.node.kept > report.node.linear.unwrap());
}

#[test]
fn migration_is_counted_after_renumbering() {
    let trace = router(4, 16, 1).trace(4000).unwrap();
    let first = place_trace(&trace, &request(8, 2, Objective::Affinity)).unwrap();
    // The same placement on other devices: nodes and devices within them exchanged.
    let moved = first
        .placement
        .renumbered(&[3, 2, 7, 6, 0, 1, 4, 5])
        .unwrap();
    assert!(moved.moves_from(&first.placement) > 0);
    let back = nearest(&moved, &first.placement).unwrap();
    assert_eq!(back.moves_from(&first.placement), 0);
    let again = Request {
        present: Some(moved),
        ..request(8, 2, Objective::Affinity)
    };
    let migration = place_trace(&trace, &again)
        .unwrap()
        .report
        .migration
        .unwrap();
    assert_eq!((migration.experts, migration.bytes), (0, Some(0)));
}

#[test]
fn what_cannot_be_placed_says_why() {
    let trace = router(3, 16, 1).trace(500).unwrap();
    let message = |request: &Request| place_trace(&trace, request).unwrap_err();
    let uneven = message(&request(6, 2, Objective::Affinity));
    assert!(matches!(&uneven, PlacementError::Infeasible(text)
        if text.contains("16 experts do not divide over 6 devices; give --slots 3")));
    let few = Request {
        slots: Some(1),
        ..request(8, 2, Objective::Load)
    };
    assert!(
        message(&few)
            .to_string()
            .contains("8 devices with 1 slots hold 8 experts")
    );
    let none = Request {
        slots: Some(0),
        ..request(8, 2, Objective::Load)
    };
    assert!(message(&none).to_string().contains("devices without slots"));
    let other = place_trace(
        &router(2, 16, 1).trace(100).unwrap(),
        &request(8, 2, Objective::Load),
    );
    let other = Request {
        present: Some(other.unwrap().placement),
        ..request(8, 2, Objective::Load)
    };
    assert!(
        message(&other)
            .to_string()
            .contains("has 2 layers, 16 experts and 8 devices")
    );
    let empty = router(3, 16, 1).trace(0).unwrap();
    let error = place_trace(&empty, &request(8, 2, Objective::Load)).unwrap_err();
    assert!(error.to_string().contains("no tokens to place by"));
}

/// The greatest load of the best packing, by trying all of them; every expert once.
fn best_packing(load: &[f64], devices: usize) -> f64 {
    let all = divisions(load.len(), devices);
    let greatest = |division: &Vec<u16>| {
        let mut loads = vec![0.0; devices];
        for (expert, device) in division.iter().enumerate() {
            loads[usize::from(*device)] += load[expert];
        }
        loads.into_iter().fold(0.0, f64::max)
    };
    all.iter().map(greatest).fold(f64::INFINITY, f64::min)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn bounds_hold_for_every_division(
        layers in 2usize..5,
        size in 1usize..5,
        groups in 1usize..5,
        seed: u64,
    ) {
        let experts = size * groups;
        let chain = random_chain(layers, experts, seed);
        let division = search(&chain, &Levels::flat(groups), &SearchOptions::default());
        let other = random_division(layers, experts, groups, seed);
        let bound = evaluate(&chain, &certify(&chain, groups, 1));
        prop_assert!(chain.kept(&other) <= chain.kept(&division).max(chain.kept(&other)));
        prop_assert!(bound >= chain.kept(&division) - 1e-9);
        prop_assert!(bound >= chain.kept(&other) - 1e-9);
        if groups > 1 {
            let options = CoupledOptions { steps: 4, threads: 1 };
            let coupled = Multipliers::find(&chain, groups, options).bound(&chain, 1);
            prop_assert!(coupled >= chain.kept(&division) - 1e-9);
        }
        let placement = Placement::of_division(&division, groups, 1).unwrap();
        let mean = chain.kept(&division) / (layers - 1) as f64;
        prop_assert!((kept(&chain, &placement).device - mean).abs() < 1e-9);
    }

    #[test]
    fn no_packing_is_below_the_bound(
        devices in 1usize..4,
        per_device in 1usize..4,
        n_spare in 0usize..3,
        seed: u64,
    ) {
        let n_slots = devices * per_device;
        let experts = n_slots.saturating_sub(n_spare).max(per_device);
        let mut random = Random::new(seed);
        let load: Vec<f64> = (0..experts).map(|_| random.uniform()).collect();
        let placed = balance(&load, Slots { devices, per_device }).unwrap();
        prop_assert!(placed.greatest >= placed.bound - 1e-12);
        prop_assert!(Placement::new(vec![placed.devices.clone()], 1).is_ok());
        if experts == n_slots {
            let best = best_packing(&load, devices);
            prop_assert!(placed.bound <= best + 1e-12);
            prop_assert!(placed.greatest <= 1.35 * best + 1e-12, "{} of {best}", placed.greatest);
        }
    }
}
