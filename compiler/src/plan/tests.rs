//! The planner against brute force, against its own prices, and against what experts would choose.

use std::collections::BTreeMap;

use meshweave_dsl::cluster::{Cluster, Host};
use meshweave_dsl::diagnostics::Span;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{Graph, Init, Role, TensorId, TensorType};
use meshweave_dsl::layout::Mesh;
use meshweave_dsl::op::{BinaryFn, OpKind, UnaryFn};
use proptest::prelude::*;

use super::classes::Classes;
use super::climb::Start;
use super::cost::{collective_seconds, op_seconds};
use super::directives::{Demand, DimPattern, Directives, Pattern, Rule, Subject};
use super::explain::explain;
use super::grid::Grid;
use super::instance::build_instance;
use super::intra::{NoSolution, SolveLimits, solve};
use super::lp::{Kind, ProgramLimits, solve_program};
use super::metric::Metric;
use super::network::Network;
use super::price::price_plan;
use super::rules::Rules;
use super::verify::{verify_bound, verify_plan};
use super::{Plan, SearchError, SearchOptions, Solution, Tie, search};
use crate::differentiate::{Optimizer, differentiate};
use crate::model::{DecoderConfig, Goal, GoldenSize, build_decoder};
use crate::partition::{Keep, partition};

fn training(size: &GoldenSize) -> Graph {
    let config = DecoderConfig::golden(size, None);
    let forward = build_decoder(&config, size.batch, size.seq, Goal::Training).unwrap();
    differentiate(&forward, &Optimizer::GOLDEN_ADAMW).unwrap()
}

fn local(n_devices: usize) -> Cluster {
    Cluster::local(n_devices, &Host::nominal())
}

fn on(mesh: Mesh) -> Directives {
    Directives {
        meshes: vec![mesh],
        ..Directives::default()
    }
}

fn found(
    graph: &Graph,
    cluster: &Cluster,
    directives: &Directives,
) -> Result<Solution, SearchError> {
    search(graph, cluster, directives, &SearchOptions::default())
}

fn rule(subject: Subject, demand: Demand, text: &str) -> Rule {
    Rule {
        subject,
        demand,
        span: Span::default(),
        text: text.into(),
    }
}

/// How an op is divided, `-` where it is not.
fn placed(graph: &Graph, plan: &Plan, name: &str, axis: &str) -> String {
    let (op_id, _) = graph
        .ops()
        .find(|(_, op)| graph.op_name(op) == name)
        .unwrap_or_else(|| panic!("no op `{name}`"));
    let factors = &plan.placements[op_id.index()].factors;
    factors
        .get(&axis.into())
        .map_or("-".into(), |factor| factor.to_string())
}

fn kept(graph: &Graph, plan: &Plan, name: &str) -> String {
    let id = graph.find(name).unwrap();
    plan.source_layout(id).display(graph.ty(id).dims())
}

#[test]
fn big_batches_of_small_models_become_data_parallel() {
    let size = GoldenSize {
        batch: 64,
        ..GoldenSize::named("tiny").unwrap()
    };
    let graph = training(&size);
    let cluster = Cluster::preset("h100:8").unwrap();
    let plan = found(&graph, &cluster, &on(Mesh::new([("a", 8)])))
        .unwrap()
        .plan;
    for name in [
        "layers[0].attn.q",
        "layers[1].attn.core",
        "layers[1].mlp.out",
    ] {
        assert_eq!(placed(&graph, &plan, name, "a"), "batch", "{name}");
    }
    assert_eq!(
        kept(&graph, &plan, "layers[1].attn.wq"),
        "[embed, heads, head]"
    );
}

#[test]
fn tight_memory_shards_the_optimizer_then_the_parameters() {
    let size = GoldenSize {
        batch: 64,
        embed: 512,
        ffn: 2048,
        ..GoldenSize::named("tiny").unwrap()
    };
    let graph = training(&size);
    let cluster = Cluster::preset("h100:8").unwrap();
    let mut directives = on(Mesh::new([("a", 8)]));
    // Activations over the batch, so that only memory moves the parameters.
    let core = |layer: usize| {
        let name = format!("layers[{layer}].attn.core");
        let pattern = Pattern {
            dims: BTreeMap::from([("batch".into(), DimPattern::Axes(vec!["a".into()]))]),
            partial: Vec::new(),
        };
        let subject = Subject::Tensor(graph.find(&name).unwrap());
        rule(
            subject,
            Demand::Pin(pattern),
            "pin attn.core : [batch/a, …]",
        )
    };
    directives.rules = vec![core(0), core(1)];
    let roomy = found(&graph, &cluster, &directives).unwrap();
    let peak = |solution: &Solution| solution.certificate.memory.peak_bytes();
    let mut times = vec![roomy.certificate.predicted_s];
    let whole = "[embed, ffn]";
    assert_eq!(kept(&graph, &roomy.plan, "m.layers[1].mlp.wg"), whole);
    assert_eq!(kept(&graph, &roomy.plan, "layers[1].mlp.wg"), whole);
    // Copies of the moments are 37 % of the peak, those of the parameters 17 %.
    for (part, spares_params) in [(0.72, false), (0.55, true)] {
        directives.budget_bytes = Some((part * peak(&roomy)) as u64);
        let tight = found(&graph, &cluster, &directives).unwrap();
        assert!(peak(&tight) <= part * peak(&roomy));
        times.push(tight.certificate.predicted_s);
        assert_ne!(kept(&graph, &tight.plan, "m.layers[1].mlp.wg"), whole);
        if spares_params {
            assert_ne!(kept(&graph, &tight.plan, "layers[1].mlp.wg"), whole);
        }
        assert_eq!(
            placed(&graph, &tight.plan, "layers[1].attn.q", "a"),
            "batch"
        );
    }
    assert!(times.is_sorted(), "{times:?}");
}

#[test]
fn small_batches_of_wide_models_become_tensor_and_sequence_parallel() {
    let size = GoldenSize {
        n_layers: 2,
        embed: 2048,
        heads: 16,
        ffn: 8192,
        vocab: 4096,
        seq: 1024,
        batch: 1,
    };
    let graph = training(&size);
    let directives = on(Mesh::new([("a", 8)]));
    let plan = found(&graph, &local(8), &directives).unwrap().plan;
    // Megatron: columns, then rows; norms and residuals between the blocks over the sequence.
    for (name, factor) in [
        ("layers[1].attn.q", "heads"),
        ("layers[1].attn.core", "heads"),
        ("layers[1].attn.out", "heads"),
        ("layers[1].mlp.gate", "ffn"),
        ("layers[1].mlp.out", "ffn"),
        ("layers[1].attn.residual", "seq"),
        ("layers[1].mlp.input", "seq"),
    ] {
        assert_eq!(placed(&graph, &plan, name, "a"), factor, "{name}");
    }
    assert_eq!(kept(&graph, &plan, "layers[1].mlp.wd"), "[ffn/a, embed]");
}

#[test]
fn two_axes_share_the_work() {
    let graph = training(&GoldenSize::named("small").unwrap());
    let solution = found(&graph, &local(8), &Directives::default()).unwrap();
    let (plan, certificate) = (&solution.plan, &solution.certificate);
    assert_eq!(plan.mesh.to_string(), "tp:2 > dp:4");
    assert_eq!(placed(&graph, plan, "layers[2].mlp.gate", "tp"), "ffn");
    assert_eq!(placed(&graph, plan, "layers[2].mlp.gate", "dp"), "batch");
    assert_eq!(certificate.meshes.len(), 3);
    assert!(certificate.gap < 1e-6, "{}", certificate.gap);
    assert!(certificate.meshes[0].n_strategies > 500);
    // What was found is a plan like any other: given back, it has the same price.
    let replay = Directives {
        replay: Some(plan.clone()),
        ..Directives::default()
    };
    let again = found(&graph, &local(8), &replay).unwrap();
    assert_eq!(again.plan.placements, plan.placements);
    assert_eq!(again.certificate.predicted_s, certificate.predicted_s);
    assert!(again.certificate.lower_bound_s <= certificate.lower_bound_s);
}

#[test]
fn certificates_are_priced_apart_from_the_solver() {
    let graph = training(&GoldenSize::named("tiny").unwrap());
    let classes = Classes::new(&graph, &Rules::default(), Tie::Layers);
    for mesh in [
        Mesh::new([("a", 1)]),
        Mesh::new([("a", 3)]),
        Mesh::new([("a", 5)]),
        Mesh::new([("a", 2), ("b", 4)]),
    ] {
        let cluster = local(mesh.n_ranks());
        let grid = Grid::new(mesh, &cluster);
        let mut metric = Metric::new(&grid);
        let rules = Rules::default();
        let instance = build_instance(&graph, &classes, &grid, &rules, &mut metric).unwrap();
        let solved = solve(&instance, LIMITS, &Start::default(), &mut metric).unwrap();
        let plan = instance.plan(&solved.assignment, &graph, &classes, &grid, "tiny");
        let price = price_plan(&graph, &plan, &cluster).unwrap();
        let relative = price.seconds() / solved.seconds - 1.0;
        assert!(
            (-1e-9..1e-3).contains(&relative),
            "{relative} on {}",
            grid.mesh
        );
        let memory = solved.memory;
        assert!((price.memory.kept_bytes - memory.kept_bytes).abs() < 1.0);
        assert!((price.memory.saved_bytes - memory.saved_bytes).abs() < 1.0);
        assert!((price.memory.gradient_bytes - memory.gradient_bytes).abs() < 1.0);
        assert!((price.memory.working_bytes - memory.working_bytes).abs() < 1.0);
        assert!(solved.lower_bound_s <= solved.seconds);
    }
}

#[test]
fn more_devices_than_a_dim_has_parts_still_plan() {
    // 4 heads over 8 ranks: attention goes over the batch instead.
    let graph = training(&GoldenSize::named("tiny").unwrap());
    let plan = found(&graph, &local(8), &on(Mesh::new([("a", 8)])))
        .unwrap()
        .plan;
    assert_ne!(placed(&graph, &plan, "layers[0].attn.core", "a"), "heads");
    assert!(plan.certificate.unwrap().gap < 1e-3);
}

fn over_ffn() -> Pattern {
    Pattern {
        dims: BTreeMap::from([
            ("embed".into(), DimPattern::Unsharded),
            ("ffn".into(), DimPattern::Axes(vec!["a".into()])),
        ]),
        partial: Vec::new(),
    }
}

#[test]
fn pins_hold_and_have_a_price() {
    let graph = training(&GoldenSize::named("tiny").unwrap());
    let mut directives = on(Mesh::new([("a", 4)]));
    let free = found(&graph, &local(4), &directives).unwrap();
    let id = graph.find("layers[0].mlp.wg").unwrap();
    let text = "pin layers[0].mlp.wg : [embed, ffn/a]";
    directives.rules = vec![rule(Subject::Tensor(id), Demand::Pin(over_ffn()), text)];
    let pinned = found(&graph, &local(4), &directives).unwrap();
    assert_eq!(
        kept(&graph, &pinned.plan, "layers[0].mlp.wg"),
        "[embed, ffn/a]"
    );
    let options = SearchOptions::default();
    let why = explain(&graph, &local(4), &directives, &options, &pinned.plan).unwrap();
    let free_s = free.certificate.predicted_s;
    assert_eq!(why.statements.len(), 1);
    assert_eq!(why.statements[0].text, text);
    assert!((why.statements[0].without_s - free_s).abs() < 1e-9);
    assert!(why.predicted_s >= free_s * (1.0 - 1e-9));
    assert!(why.costs.is_sorted_by(|a, b| a.seconds >= b.seconds));
}

#[test]
fn pins_of_one_layer_untie_it() {
    let graph = training(&GoldenSize::named("tiny").unwrap());
    let mut directives = on(Mesh::new([("a", 4)]));
    let wg = |layer: usize| {
        let id = graph.find(&format!("layers[{layer}].mlp.wg"));
        Subject::Tensor(id.unwrap())
    };
    let whole = Pattern {
        dims: BTreeMap::from([
            ("embed".into(), DimPattern::Unsharded),
            ("ffn".into(), DimPattern::Unsharded),
        ]),
        partial: Vec::new(),
    };
    directives.rules = vec![
        rule(wg(0), Demand::Pin(over_ffn()), "pin layers[0]"),
        rule(wg(1), Demand::Pin(whole), "pin layers[1]"),
    ];
    let plan = found(&graph, &local(4), &directives).unwrap().plan;
    assert_eq!(kept(&graph, &plan, "layers[0].mlp.wg"), "[embed, ffn/a]");
    assert_eq!(kept(&graph, &plan, "layers[1].mlp.wg"), "[embed, ffn]");
}

#[test]
fn preferences_tip_the_scale() {
    let graph = training(&GoldenSize::named("tiny").unwrap());
    let mut directives = on(Mesh::new([("a", 4)]));
    let id = graph.find("layers[0].mlp.wg").unwrap();
    let over_embed = Pattern {
        dims: BTreeMap::from([("embed".into(), DimPattern::Axes(vec!["a".into()]))]),
        partial: Vec::new(),
    };
    let prefer = |weight| Demand::Prefer(over_embed.clone(), weight);
    let free = found(&graph, &local(4), &directives).unwrap();
    assert_ne!(
        kept(&graph, &free.plan, "layers[0].mlp.wg"),
        "[embed/a, ffn]"
    );
    directives.rules = vec![rule(Subject::Tensor(id), prefer(1000.0), "prefer")];
    let preferred = found(&graph, &local(4), &directives).unwrap();
    assert_eq!(
        kept(&graph, &preferred.plan, "layers[0].mlp.wg"),
        "[embed/a, ffn]"
    );
    // The preference is no part of the predicted seconds.
    let certificate = preferred.certificate;
    assert!(certificate.predicted_s < 2.0 * free.certificate.predicted_s);
    assert!(certificate.lower_bound_s <= certificate.predicted_s);
}

#[test]
fn contradictions_and_tight_budgets_say_what_to_do() {
    let graph = training(&GoldenSize::named("tiny").unwrap());
    let mut directives = on(Mesh::new([("a", 4)]));
    directives.budget_bytes = Some(100_000);
    let error = found(&graph, &local(4), &directives).unwrap_err();
    assert!(matches!(error, SearchError::Infeasible(_)));
    insta::assert_snapshot!(error.to_string());

    directives.budget_bytes = None;
    let subject = Subject::Tensor(graph.find("layers[0].mlp.wg").unwrap());
    let over = Demand::Over {
        axis: "a".into(),
        dims: vec!["ffn".into()],
    };
    let not = Demand::NotOver { axis: "a".into() };
    directives.rules = vec![rule(subject, over, "shard"), rule(subject, not, "pin")];
    let error = found(&graph, &local(4), &directives).unwrap_err();
    let SearchError::Conflict { rules, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(rules, &[0, 1]);
    insta::assert_snapshot!(error.to_string());

    let error = found(&graph, &local(4), &on(Mesh::new([("a", 6)]))).unwrap_err();
    insta::assert_snapshot!(error.to_string());
}

const LIMITS: SolveLimits = SolveLimits {
    gap: 1e-6,
    branch_s: 10.0,
    budget_bytes: f64::INFINITY,
    cutoff_s: f64::INFINITY,
};

/// A small graph: each step applies one op to earlier tensors of dims out of a, b and c.
fn small_graph(steps: &[(u8, usize, usize)], sizes: [usize; 3]) -> Graph {
    let mut graph = Graph::new("small");
    let dims = ["a", "b", "c"];
    let ty = |which: &[usize]| {
        TensorType::new(
            DType::F32,
            which.iter().map(|idx| (dims[*idx], sizes[*idx])),
        )
    };
    let mut pool: Vec<TensorId> = vec![
        graph.add_source("x", ty(&[0, 1]), Role::Input),
        graph.add_source("w", ty(&[1, 2]), Role::Param(Init::Zeros)),
        graph.add_source("u", ty(&[2, 0]), Role::Param(Init::Zeros)),
    ];
    for (step_idx, (what, first, second)) in steps.iter().enumerate() {
        let (x, y) = (pool[first % pool.len()], pool[second % pool.len()]);
        let name = format!("t{step_idx}");
        let made = match what % 4 {
            0 => {
                let out: Vec<_> = dims
                    .iter()
                    .map(|dim| (*dim).into())
                    .filter(|dim| graph.ty(x).has(dim) != graph.ty(y).has(dim))
                    .collect();
                graph.add_op(name, OpKind::Contract { out }, &[x, y])
            }
            1 => graph.add_op(name, OpKind::Unary(UnaryFn::Silu), &[x]),
            2 => graph.add_op(name, OpKind::Binary(BinaryFn::Add), &[x, y]),
            _ => graph.add_op(name, OpKind::Unary(UnaryFn::Neg), &[x]),
        };
        // Ops that do not fit their operands are left out.
        if let Ok(results) = made {
            pool.extend(results);
        }
    }
    graph.outputs = pool.last().copied().into_iter().collect();
    graph
}

/// The cheapest assignment by trying all of them; `None` when nothing fits.
fn brute_force(network: &Network, budget_bytes: f64) -> Option<f64> {
    let mut assignment = vec![0; network.nodes.len()];
    let mut best: Option<f64> = None;
    loop {
        let cost = network.cost(&assignment);
        if cost.peak_bytes() <= budget_bytes && cost.seconds.is_finite() {
            best = Some(best.map_or(cost.seconds, |best| best.min(cost.seconds)));
        }
        let Some(next) = (0..assignment.len())
            .find(|node| assignment[*node] + 1 < network.nodes[*node].strategies.len())
        else {
            return best;
        };
        assignment[next] += 1;
        assignment[..next].fill(0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_search_finds_what_brute_force_and_the_program_find(
        steps in prop::collection::vec((0..4_u8, 0..8_usize, 0..8_usize), 1..4),
        sizes in prop::array::uniform3(prop::sample::select(vec![1_usize, 2, 3, 64, 1024])),
        mesh in prop::sample::select(vec![vec![2], vec![3], vec![2, 2]]),
        tightness in prop::option::of(0.3..1.0_f64),
    ) {
        let graph = small_graph(&steps, sizes);
        prop_assume!(!graph.ops.is_empty());
        let mesh = Mesh::new(["m", "n"].into_iter().zip(mesh));
        let cluster = local(mesh.n_ranks());
        let grid = Grid::new(mesh.clone(), &cluster);
        let mut metric = Metric::new(&grid);
        let rules = Rules::default();
        let classes = Classes::new(&graph, &rules, Tie::Layers);
        let instance = build_instance(&graph, &classes, &grid, &rules, &mut metric).unwrap();
        let network = instance.network(&mut metric);
        let n_assignments: f64 = network
            .nodes
            .iter()
            .map(|node| node.strategies.len() as f64)
            .product();
        prop_assume!(n_assignments < 20_000.0);
        let start = Start::default();
        let free = solve(&instance, LIMITS, &start, &mut metric).unwrap();
        let budget_bytes = tightness.map_or(f64::INFINITY, |part| {
            part * free.memory.peak_bytes()
        });
        let limits = SolveLimits { budget_bytes, ..LIMITS };
        let solved = solve(&instance, limits, &start, &mut metric);
        match (solved, brute_force(&network, budget_bytes)) {
            (Ok(solved), Some(best)) => {
                prop_assert!(solved.lower_bound_s <= best * (1.0 + 1e-6));
                prop_assert!(
                    (solved.seconds - best).abs() <= best * 1e-5 + 1e-12,
                    "{} and {}", solved.seconds, best
                );
                // What the potentials prove, anyone can add up again, and no program proves more.
                let proven_s = solved.proof.bound_s;
                prop_assert!(solved.proof.dual.overdraft_s(&network) <= 1e-12);
                let limits = ProgramLimits {
                    room_bytes: network.room_bytes(budget_bytes),
                    gap: 0.0,
                    time_s: 10.0,
                };
                let program = solve_program(&network, Kind::Relaxed, limits).unwrap();
                prop_assert!(program.seconds <= best * (1.0 + 1e-5));
                prop_assert!(
                    proven_s <= program.seconds * (1.0 + 1e-5) + 1e-12,
                    "{} and {}", proven_s, program.seconds
                );
            }
            (Err(NoSolution::Memory { least }), None) => {
                prop_assert!(least.peak_bytes() > budget_bytes * (1.0 - 1e-6));
            }
            (solved, best) => prop_assert!(false, "{solved:?} and {best:?}"),
        }
    }
}

#[test]
fn meshes_of_three_axes_are_searched_like_others() {
    let graph = training(&GoldenSize::named("tiny").unwrap());
    let mesh = Mesh::new([("dp", 2), ("fsdp", 2), ("tp", 2)]);
    let solution = found(&graph, &local(8), &on(mesh)).unwrap();
    let free = found(&graph, &local(8), &Directives::default()).unwrap();
    let ratio = solution.certificate.predicted_s / free.certificate.predicted_s;
    assert!((1.0..1.3).contains(&ratio), "{ratio}");
    assert!(solution.certificate.gap < 0.02);
    assert!(free.certificate.gap < 0.02);
}

#[test]
fn proofs_are_added_up_again_and_forgeries_are_not() {
    let graph = training(&GoldenSize::named("tiny").unwrap());
    let cluster = local(8);
    let mesh = Mesh::new([("a", 2), ("b", 4)]);
    let id = graph.find("layers[0].mlp.wg").unwrap();
    let mut directives = on(mesh.clone());
    for (tie, budget_bytes) in [
        (Tie::Layers, None),
        (Tie::None, None),
        (Tie::None, Some(5 << 20)),
    ] {
        directives.budget_bytes = budget_bytes;
        let options = SearchOptions {
            tie,
            ..SearchOptions::default()
        };
        let solution = search(&graph, &cluster, &directives, &options).unwrap();
        let certificate = &solution.certificate;
        let verified = verify_plan(&graph, &cluster, &directives, &solution.plan).unwrap();
        assert!(verified.is_current());
        let bound_s = verified.bound_s.unwrap();
        assert!(bound_s <= certificate.predicted_s);
        assert!(verified.gap().unwrap() < 0.02, "{:?}", verified.gap());
        let proof = certificate.proof.as_ref().unwrap();
        assert!((bound_s / proof.bound_s - 1.0).abs() < 1e-6);

        // A potential raised out of proportion proves nothing.
        let mut forged = proof.clone();
        let longest = forged.potentials.iter_mut().max_by_key(|one| one.len());
        longest.unwrap()[0] += 1.0;
        let budget_bytes = verified.budget_bytes;
        let outcome = verify_bound(&graph, &cluster, &directives, &mesh, budget_bytes, &forged);
        assert!(
            matches!(outcome, Err(SearchError::Invalid(_))),
            "{outcome:?}"
        );
        // Nor does a proof of another mesh.
        let other = Mesh::new([("a", 8)]);
        let outcome = verify_bound(&graph, &cluster, &directives, &other, budget_bytes, proof);
        assert!(
            matches!(outcome, Err(SearchError::Invalid(_))),
            "{outcome:?}"
        );
    }
    // A plan that breaks a statement is no plan of the request.
    directives.budget_bytes = None;
    let solution = found(&graph, &cluster, &directives).unwrap();
    let never = Demand::NotOver { axis: "a".into() };
    let nowhere = Demand::NotOver { axis: "b".into() };
    directives.rules = vec![
        rule(Subject::Tensor(id), never, "pin wg : [embed, ffn]"),
        rule(Subject::Tensor(id), nowhere, "pin wg : [embed, ffn]"),
    ];
    let layout = solution.plan.source_layout(id);
    let verified = verify_plan(&graph, &cluster, &directives, &solution.plan);
    assert_eq!(verified.is_err(), !layout.is_replicated(), "{verified:?}");
}

#[test]
fn layers_that_choose_for_themselves_are_no_slower() {
    let graph = training(&GoldenSize::named("tiny").unwrap());
    let cluster = local(8);
    for budget_bytes in [None, Some(5 << 20)] {
        let mut directives = on(Mesh::new([("a", 2), ("b", 4)]));
        directives.budget_bytes = budget_bytes;
        let tied = found(&graph, &cluster, &directives).unwrap();
        let options = SearchOptions {
            tie: Tie::None,
            ..SearchOptions::default()
        };
        let untied = search(&graph, &cluster, &directives, &options).unwrap();
        let (tied, untied) = (&tied.certificate, &untied.certificate);
        assert!(untied.predicted_s <= tied.predicted_s);
        assert!(untied.lower_bound_s <= untied.predicted_s);
        assert!(untied.gap < 0.02, "{}", untied.gap);
        let differ = |not: &&String| not.starts_with("plans in which the layers differ");
        assert!(untied.not_searched.iter().find(differ).is_none());
        assert!(tied.not_searched.iter().find(differ).is_some());
    }
}

#[test]
fn no_plan_is_faster_than_the_bound() {
    let graph = training(&GoldenSize::named("tiny").unwrap());
    let rules = Rules::default();
    for (mesh, tie) in [
        (Mesh::new([("a", 2), ("b", 4)]), Tie::Layers),
        (Mesh::new([("a", 4), ("b", 2)]), Tie::None),
    ] {
        let cluster = local(mesh.n_ranks());
        let classes = Classes::new(&graph, &rules, tie);
        let grid = Grid::new(mesh, &cluster);
        let mut metric = Metric::new(&grid);
        let instance = build_instance(&graph, &classes, &grid, &rules, &mut metric).unwrap();
        let solved = solve(&instance, LIMITS, &Start::default(), &mut metric).unwrap();
        let mut n_priced = 0;
        let mut state = 1_u64;
        for _ in 0..100 {
            // Near the best and far from it: a few groups, or all of them, choose at random.
            let n_changed = if state.is_multiple_of(2) {
                3
            } else {
                instance.groups.len()
            };
            let mut assignment = solved.assignment.clone();
            for step in 0..n_changed {
                let mut draw = |n: usize| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    (state >> 33) as usize % n
                };
                let group = if n_changed == 3 {
                    draw(instance.groups.len())
                } else {
                    step
                };
                assignment[group] = draw(instance.groups[group].strategies.len());
            }
            let plan = instance.plan(&assignment, &graph, &classes, &grid, "random");
            // Some layouts cannot be brought to each other.
            let Ok(price) = price_plan(&graph, &plan, &cluster) else {
                continue;
            };
            n_priced += 1;
            assert!(price.seconds() >= solved.lower_bound_s * (1.0 - 1e-9));
        }
        assert!(n_priced > 20, "{n_priced}");
    }
}

#[test]
fn odd_clusters_have_sensible_plans() {
    let graph = training(&GoldenSize::named("tiny").unwrap());
    let alone = found(&graph, &local(1), &Directives::default()).unwrap();
    assert_eq!(alone.certificate.parts.reshard_s, 0.0);
    assert!(alone.certificate.gap < 1e-6);

    // A prime number of devices, more than most dims have elements; and a network a thousand times
    // slower than it should be, for which what is best on a fast one is no better.
    let fast = Cluster::preset("h100:16").unwrap();
    let mut slow = fast.clone();
    slow.between_nodes.bytes_per_s /= 1000.0;
    for cluster in [local(97), slow.clone()] {
        let solution = found(&graph, &cluster, &Directives::default()).unwrap();
        assert!(
            solution.certificate.gap < 0.02,
            "{}",
            solution.certificate.gap
        );
        assert!(verify_plan(&graph, &cluster, &Directives::default(), &solution.plan).is_ok());
    }
    let on_fast = found(&graph, &fast, &Directives::default()).unwrap();
    let on_slow = found(&graph, &slow, &Directives::default()).unwrap();
    let moved = price_plan(&graph, &on_fast.plan, &slow).unwrap();
    assert!(on_slow.certificate.predicted_s <= moved.seconds() * (1.0 + 1e-3));
    assert!(on_slow.certificate.predicted_s >= on_fast.certificate.predicted_s);
}

#[test]
fn conflicts_are_minimal_and_relaxations_have_figures() {
    let graph = training(&GoldenSize::named("tiny").unwrap());
    let mut directives = on(Mesh::new([("a", 4)]));
    let subject = |name: &str| Subject::Tensor(graph.find(name).unwrap());
    let over = |dim: &str| Demand::Over {
        axis: "a".into(),
        dims: vec![dim.into()],
    };
    // Of three statements about one weight and one about another, two exclude each other.
    let statements = [
        (subject("layers[0].mlp.wg"), over("ffn"), "first"),
        (subject("layers[1].mlp.wg"), over("ffn"), "elsewhere"),
        (
            subject("layers[0].mlp.wg"),
            Demand::NotOver { axis: "a".into() },
            "second",
        ),
    ];
    directives.rules = statements
        .into_iter()
        .zip(0_usize..)
        .map(|((subject, demand, text), place)| Rule {
            span: Span {
                start: place,
                ..Span::default()
            },
            ..rule(subject, demand, text)
        })
        .collect();
    let error = found(&graph, &local(4), &directives).unwrap_err();
    let SearchError::Conflict { rules, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(rules, &[0, 2]);

    // A statement that keeps a weight whole, in less memory than that needs.
    directives.rules = vec![rule(
        subject("embed.wte"),
        Demand::NotOver { axis: "a".into() },
        "pin embed.wte : [vocab, embed]",
    )];
    let free = found(&graph, &local(4), &directives).unwrap();
    let kept_bytes = free.certificate.memory.peak_bytes();
    let mut parts = (1..20).map(|part| kept_bytes * (1.0 - 0.05 * f64::from(part)));
    let message = parts.find_map(|budget_bytes| {
        directives.budget_bytes = Some(budget_bytes as u64);
        found(&graph, &local(4), &directives).err()
    });
    let message = message.unwrap().to_string();
    assert!(message.contains("raise the budget"), "{message}");
    assert!(message.contains("use about"), "{message}");
}

#[test]
fn experts_are_divided() {
    let size = GoldenSize::named("tiny").unwrap();
    let config = DecoderConfig::golden(&size, Some(2.0));
    let forward = build_decoder(&config, size.batch, size.seq, Goal::Training).unwrap();
    let graph = differentiate(&forward, &Optimizer::GOLDEN_ADAMW).unwrap();
    let directives = on(Mesh::new([("ep", 4)]));
    let plan = found(&graph, &local(4), &directives).unwrap().plan;
    assert_eq!(
        kept(&graph, &plan, "layers[0].moe.experts.wg"),
        "[expert/ep, embed, ffn]"
    );
}

#[test]
fn reshards_cost_what_partitioning_makes_of_them() {
    let graph = training(&GoldenSize::named("tiny").unwrap());
    let cluster = local(8);
    for mesh in [Mesh::new([("a", 8)]), Mesh::new([("a", 2), ("b", 4)])] {
        let solution = found(&graph, &cluster, &on(mesh)).unwrap();
        let partition = partition(&graph, &solution.plan, Keep::Outputs, &cluster).unwrap();
        let local = &partition.locals[0];
        let mut seconds = 0.0;
        for (_, op) in local.ops() {
            let all = op.inputs.iter().chain(&op.results);
            let n_bytes = all.map(|id| local.ty(*id).n_bytes()).max().unwrap_or(0);
            seconds += collective_seconds(&op.kind, n_bytes as f64, &cluster);
            if matches!(op.kind, OpKind::Slice { .. }) {
                let types =
                    |ids: &[TensorId]| ids.iter().map(|id| local.ty(*id)).collect::<Vec<_>>();
                let (inputs, results) = (types(&op.inputs), types(&op.results));
                seconds += op_seconds(&op.kind, &inputs, &results, &cluster);
            }
        }
        let predicted = solution.certificate.parts.reshard_s;
        assert!(
            (seconds / predicted - 1.0).abs() < 0.05,
            "{seconds} and {predicted}"
        );
    }
}
/// A plan in a few lines: mesh, rounded figures, and one layer's placements and kept layouts.
fn summary(graph: &Graph, solution: &Solution) -> String {
    let certificate = &solution.certificate;
    let mut lines = vec![format!(
        "{}: {:.3} ms, gap {:.3} %, {:.2} MB a device",
        solution.plan.mesh,
        1e3 * certificate.predicted_s,
        100.0 * certificate.gap,
        certificate.memory.peak_bytes() / 1e6
    )];
    for ((_, op), placement) in graph.ops().zip(&solution.plan.placements) {
        let name = graph.op_name(op);
        if name.contains("layers[0]") && op.kind.is_matmul() {
            let factors = placement.factors.iter();
            let factors: Vec<String> = factors
                .map(|(axis, factor)| format!("{factor}/{axis}"))
                .collect();
            lines.push(format!("{name} over {}", factors.join(", ")));
        }
    }
    for id in graph.params() {
        let name = &graph.tensor(id).name;
        if !name.contains("layers[1]") {
            lines.push(format!("{name} {}", kept(graph, &solution.plan, name)));
        }
    }
    lines.join("\n")
}

#[test]
fn plans_of_a_tiny_model() {
    let graph = training(&GoldenSize::named("tiny").unwrap());
    for (name, mesh) in [
        ("dp4", Mesh::new([("dp", 4)])),
        ("three", Mesh::new([("m", 3)])),
    ] {
        let solution = found(&graph, &local(mesh.n_ranks()), &on(mesh)).unwrap();
        insta::assert_snapshot!(name, summary(&graph, &solution));
    }
}
