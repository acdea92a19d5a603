//! Simplification against the interpreter: every rule on graphs where it fires, then random graphs,
//! whole models and the local graphs of random plans.
//!
//! All that a rule finds is evaluated, not only what extraction chooses, in f64 with a tolerance far
//! below the error of a wrong rule: only the order of sums and products may differ.

mod cases;

use std::collections::{BTreeMap, BTreeSet};

use meshweave_compiler::codegen::fuse::{Platform, fuse};
use meshweave_compiler::partition::{Keep, partition};
use meshweave_compiler::simplify::{Options, RULES, simplify, simplify_ranks, variants};
use meshweave_dsl::cluster::{Cluster, Host};
use meshweave_dsl::dtype::Scalar;
use meshweave_dsl::graph::{Graph, Role, TensorId, TensorType};
use meshweave_dsl::layout::{Mesh, ReduceKind};
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{BinaryFn, OpKind, UnaryFn};
use meshweave_runtime::reference::{Value, evaluate_ranks};
use proptest::prelude::*;

use crate::support::golden::{first_step, golden};
use crate::support::plans;

const TOLERANCE: f64 = 1e-12;

use cases::{Net, all_gather, cases, group, one, ranks, shape};

/// Numbers in (−1, 1) that depend on the name, the rank and the index only.
fn value(name: &str, rank: usize, ty: &TensorType) -> Value {
    let seed = name.bytes().fold(2166136261u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(16777619)
    });
    Value::from_fn(ty.clone(), |index| {
        let mut x = seed
            .wrapping_add((rank as u32).wrapping_mul(7919))
            .wrapping_add((index as u32).wrapping_mul(2654435761));
        x ^= x >> 16;
        x = x.wrapping_mul(0x7feb_352d);
        x ^= x >> 15;
        x = x.wrapping_mul(0x846c_a68b);
        x ^= x >> 16;
        f64::from(x) / f64::from(u32::MAX) * 1.9 - 0.95
    })
}

fn inputs(graphs: &[Graph]) -> Vec<BTreeMap<TensorId, Value>> {
    graphs
        .iter()
        .enumerate()
        .map(|(rank, graph)| {
            graph
                .tensor_ids()
                .filter(|id| graph.tensor(*id).role == Role::Input)
                .map(|id| {
                    let tensor = graph.tensor(id);
                    (id, value(&tensor.name, rank, &tensor.ty))
                })
                .collect()
        })
        .collect()
}

/// What leaves the graphs (outputs, gradients, updates), on all ranks.
fn results(graphs: &[Graph], inputs: &[BTreeMap<TensorId, Value>]) -> Vec<Value> {
    let values = evaluate_ranks(graphs, inputs).unwrap();
    let ids = |graph: &Graph| {
        let ends = graph.outputs.iter().chain(graph.gradients.values());
        ends.chain(graph.updates.values())
            .copied()
            .collect::<Vec<_>>()
    };
    graphs
        .iter()
        .zip(&values)
        .flat_map(|(graph, values)| {
            ids(graph)
                .into_iter()
                .map(|id| values.require(graph, id).unwrap().clone())
        })
        .collect()
}

fn assert_equal(graphs: &[Graph], expected: &[Value]) -> Result<(), String> {
    let found = results(graphs, &inputs(graphs));
    if found.len() != expected.len() {
        return Err(format!(
            "{} results, expected {}",
            found.len(),
            expected.len()
        ));
    }
    for (found, expected) in found.iter().zip(expected) {
        if found.ty() != expected.ty() {
            return Err(format!("{} became {}", expected.ty(), found.ty()));
        }
        let error = found.relative_error(expected);
        if error.is_nan() || error > TOLERANCE {
            return Err(format!("off by {error:e}: {:#?}", graphs[0].ops));
        }
    }
    Ok(())
}

#[test]
fn every_rule_has_a_case() {
    let names: BTreeSet<&str> = cases().into_iter().map(|(name, _)| name).collect();
    let rules: BTreeSet<&str> = RULES
        .iter()
        .map(|rule| rule.name)
        .chain(["merge-projections"])
        .collect();
    assert_eq!(names, rules);
}

/// `docs/rewrites.md` lists every rule with its equation.
#[test]
fn every_rule_is_documented() {
    let page = include_str!("../docs/rewrites.md");
    for rule in RULES {
        let row = format!(
            "| `{}` | {} |",
            rule.name,
            rule.statement.replace('|', "\\|")
        );
        assert!(page.contains(&row), "docs/rewrites.md lacks the row\n{row}");
    }
    assert!(page.contains("| `merge-projections` |"));
}

#[test]
fn every_rule_fires_and_holds() {
    for (rule, graphs) in cases() {
        let options = Options::default();
        let (simplified, report) = simplify_ranks(&graphs, &options).unwrap();
        assert!(
            report.found.iter().any(|(name, _)| *name == rule),
            "{rule} does not fire: {report:?}"
        );
        assert!(
            report.after_s <= report.before_s * (1.0 + 1e-12),
            "{rule}: {report:?}"
        );
        let expected = results(&graphs, &inputs(&graphs));
        assert_equal(&simplified, &expected).unwrap_or_else(|error| panic!("{rule}: {error}"));
        let variants = variants(&graphs, &options).unwrap();
        assert!(!variants.is_empty(), "{rule} has no variants");
        for variant in variants {
            assert_equal(&variant, &expected)
                .unwrap_or_else(|error| panic!("a variant by {rule}: {error}"));
        }
    }
}

/// What the cases become, so that a change of rules or prices shows.
#[test]
fn simplified_cases() {
    let mut text = String::new();
    for (rule, graphs) in cases() {
        let (simplified, report) = simplify_ranks(&graphs, &Options::default()).unwrap();
        let ops = |graph: &Graph| {
            let names: Vec<&str> = graph.ops.iter().map(|op| op.kind.name()).collect();
            names.join(" ")
        };
        text.push_str(&format!(
            "{rule}\n  {}\n  {}\n  {:.2} µs -> {:.2} µs\n",
            ops(&graphs[0]),
            ops(&simplified[0]),
            report.before_s * 1e6,
            report.after_s * 1e6
        ));
    }
    insta::assert_snapshot!(text);
}

/// Gathers made again for the backward pass stay apart: they exist so that memory can be freed.
#[test]
fn phases_of_local_graphs_are_kept_apart() {
    let graphs = ranks(2, |net, _| {
        let x = net.source("x", "ab");
        let w = net.source("w", "bc");
        let both = || group("dp", &[0, 1]);
        let first = all_gather(net, "c", &[3, 3], both(), w);
        let y = net.contract("ac", x, first);
        let loss = net.reduce(ReduceKind::Sum, "ac", y);
        let again = all_gather(net, "c", &[3, 3], both(), w);
        let dx = net.contract("ab", y, again);
        net.0.gradients.insert(x, dx);
        loss
    });
    let (simplified, _) = simplify_ranks(&graphs, &Options::default()).unwrap();
    let n_gathers = |graph: &Graph| {
        let is_gather =
            |op: &&meshweave_dsl::graph::Op| matches!(op.kind, OpKind::AllGather { .. });
        graph.ops.iter().filter(is_gather).count()
    };
    assert_eq!(n_gathers(&simplified[0]), 2);
    // Within a phase they are one.
    let graphs = ranks(2, |net, _| {
        let w = net.source("w", "bc");
        let both = || group("dp", &[0, 1]);
        let first = all_gather(net, "c", &[3, 3], both(), w);
        let again = all_gather(net, "c", &[3, 3], both(), w);
        let again = net.unary(UnaryFn::Exp, again);
        net.binary(BinaryFn::Mul, first, again)
    });
    let (simplified, _) = simplify_ranks(&graphs, &Options::default()).unwrap();
    assert_eq!(n_gathers(&simplified[0]), 1);
}

#[test]
fn graphs_of_other_ranks_must_be_alike() {
    let graph = |n: usize| {
        one(|net| {
            let mut x = net.source("x", "ab");
            for _ in 0..n {
                x = net.unary(UnaryFn::Exp, x);
            }
            x
        })
        .remove(0)
    };
    let error = simplify_ranks(&[graph(1), graph(2)], &Options::default()).unwrap_err();
    insta::assert_snapshot!(error, @"internal error in simplification: rank 1 has another graph than rank 0 (`case`)");
}

/// Values of all sources at the first step, by name.
fn named_first_step(graph: &Graph) -> BTreeMap<String, Value> {
    first_step(graph)
        .into_iter()
        .map(|(id, value)| (graph.tensor(id).name.clone(), value))
        .collect()
}

#[test]
fn models_keep_their_meaning_and_names() {
    for (capacity_factor, tied) in [(None, false), (None, true), (Some(2.0), false)] {
        let graph = golden(capacity_factor, tied);
        let simplified = simplify(&graph, &Options::default()).unwrap();
        assert!(simplified.ops.len() <= graph.ops.len());
        assert_eq!(simplified, simplify(&graph, &Options::default()).unwrap());
        let names = |graph: &Graph, ids: Vec<TensorId>| {
            ids.into_iter()
                .map(|id| graph.tensor(id).name.clone())
                .collect::<Vec<_>>()
        };
        let sources = |graph: &Graph| {
            graph
                .tensor_ids()
                .filter(|id| graph.tensor(*id).role != Role::Temp)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            names(&graph, sources(&graph)),
            names(&simplified, sources(&simplified))
        );
        let ends = |graph: &Graph| {
            let mut ends = graph.outputs.clone();
            ends.extend(graph.updates.values());
            ends
        };
        assert_eq!(
            names(&graph, ends(&graph)),
            names(&simplified, ends(&simplified))
        );
        let unique: BTreeSet<&str> = simplified
            .tensors
            .iter()
            .map(|tensor| tensor.name.as_str())
            .collect();
        assert_eq!(unique.len(), simplified.tensors.len());
        let values = named_first_step(&graph);
        let inputs = |graph: &Graph| {
            let given = graph
                .tensor_ids()
                .filter_map(|id| Some((id, values.get(&graph.tensor(id).name)?.clone())));
            vec![given.collect::<BTreeMap<_, _>>()]
        };
        let expected = results(std::slice::from_ref(&graph), &inputs(&graph));
        let found = results(std::slice::from_ref(&simplified), &inputs(&simplified));
        for (found, expected) in found.iter().zip(&expected) {
            assert!(found.relative_error(expected) < 1e-9);
        }
    }
}

/// What the rules find in whole models, and that host code can be made for what is left.
/// Differentiation leaves little to find; models as people write them do.
#[test]
fn models_become_no_dearer() {
    let mut text = String::new();
    for (name, capacity_factor, tied) in [
        ("dense", None, false),
        ("tied", None, true),
        ("moe", Some(2.0), false),
    ] {
        let graph = golden(capacity_factor, tied);
        let (simplified, report) =
            simplify_ranks(std::slice::from_ref(&graph), &Options::default()).unwrap();
        assert!(report.after_s <= report.before_s);
        fuse(&simplified[0], Platform::Host).unwrap();
        text.push_str(&format!(
            "{name}: {} -> {} ops, {:.1} -> {:.1} µs; {:?}\n",
            report.n_ops_before,
            report.n_ops_after,
            report.before_s * 1e6,
            report.after_s * 1e6,
            report.found
        ));
    }
    insta::assert_snapshot!(text);
}

fn meshes() -> impl Strategy<Value = Mesh> {
    prop_oneof![
        Just(Mesh::new([("dp", 2)])),
        Just(Mesh::new([("dp", 3)])),
        Just(Mesh::new([("dp", 2), ("tp", 2)])),
        Just(Mesh::new([("dp", 2), ("tp", 3)])),
    ]
}

/// A graph of random ops over random operands, with every result that nothing reads as output.
fn random_graph(seed: u32, n_ops: usize) -> Graph {
    let mut numbers = plans::Numbers::new(seed);
    let mut net = Net::new();
    let mut tensors: Vec<TensorId> = Vec::new();
    for (name, of) in [
        ("x", "ab"),
        ("y", "ab"),
        ("z", "b"),
        ("w", "bc"),
        ("v", "abc"),
    ] {
        tensors.push(net.source(name, of));
    }
    tensors.push(net.fill("ones", "b", 1.0));
    tensors.push(net.fill("zeros", "ab", 0.0));
    let mut is_read = BTreeSet::new();
    while net.0.ops.len() < n_ops {
        let mut pick = || tensors[numbers.below(tensors.len())];
        let (x, y) = (pick(), pick());
        let ty = net.0.ty(x).clone();
        let dims_of = |ty: &TensorType| ty.dims().cloned().collect::<Vec<Dim>>();
        let mut reversed = dims_of(&ty);
        reversed.reverse();
        let Some(dim) = reversed.first().cloned() else {
            continue;
        };
        let len = ty.size_of(&dim).unwrap();
        let kind = match numbers.below(13) {
            0 => OpKind::Unary(UnaryFn::Neg),
            1 => OpKind::Unary(UnaryFn::Scale(Scalar(1.0 + numbers.below(3) as f64))),
            2 => OpKind::Unary(UnaryFn::Tanh),
            3 => OpKind::Binary(BinaryFn::Add),
            4 => OpKind::Binary(BinaryFn::Sub),
            5 => OpKind::Binary(BinaryFn::Mul),
            6 => OpKind::Transpose { dims: reversed },
            7 => OpKind::Reduce {
                kind: ReduceKind::Sum,
                dims: vec![dim],
            },
            8 if len > 1 => OpKind::Slice {
                dim,
                start: numbers.below(2),
                len: len - 1,
            },
            9 => {
                let mut out = dims_of(&ty);
                out.extend(net.0.ty(y).dims().filter(|dim| !ty.has(dim)).cloned());
                out.retain(|dim| !(ty.has(dim) && net.0.ty(y).has(dim)));
                OpKind::Contract { out }
            }
            10 => OpKind::Expand { dims: shape("abc") },
            11 => OpKind::Concat { dim },
            _ => OpKind::Rename {
                from: dim,
                to: ["b", "d"][numbers.below(2)].into(),
            },
        };
        let inputs = match kind {
            OpKind::Binary(_) | OpKind::Contract { .. } | OpKind::Concat { .. } => vec![x, y],
            _ => vec![x],
        };
        let types: Vec<&TensorType> = inputs.iter().map(|id| net.0.ty(*id)).collect();
        // What the shape rules refuse, repeats a dim or grows too large is drawn again.
        let is_small = kind.infer(&types).is_ok_and(|types| {
            let names: BTreeSet<&Dim> = types[0].dims().collect();
            names.len() == types[0].shape.len() && types[0].n_elements() <= 4096
        });
        if is_small {
            is_read.extend(inputs.iter().copied());
            tensors.push(net.op(kind, &inputs));
        }
    }
    let unread: Vec<TensorId> = net
        .0
        .ops
        .iter()
        .flat_map(|op| op.results.clone())
        .filter(|id| !is_read.contains(id))
        .collect();
    net.0.outputs = unread;
    net.0
}

/// A graph of which the extraction would choose a slower one.
#[test]
fn what_would_be_slower_stays() {
    let graphs = vec![random_graph(27407, 22)];
    let (simplified, report) = simplify_ranks(&graphs, &Options::default()).unwrap();
    assert_eq!(report.after_s, report.before_s);
    assert_eq!(simplified, graphs);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_graphs_keep_their_meaning(seed in 0u32..1_000_000, n_ops in 4usize..28) {
        let graphs = vec![random_graph(seed, n_ops)];
        let expected = results(&graphs, &inputs(&graphs));
        let (simplified, report) = simplify_ranks(&graphs, &Options::default()).unwrap();
        prop_assert!(report.after_s <= report.before_s * (1.0 + 1e-9), "{:?}", report);
        prop_assert_eq!(close(&simplified, &expected), Ok(()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn local_graphs_keep_their_meaning(mesh in meshes(), seed in 0u32..1000, tied: bool) {
        let graph = simplify(&golden(None, tied), &Options::default()).unwrap();
        let plan = plans::random_plan(&graph, &mesh, seed);
        let cluster = Cluster::local(mesh.n_ranks(), &Host::nominal());
        let locals = partition(&graph, &plan, Keep::Gradients, &cluster).unwrap().locals;
        let (simplified, report) = simplify_ranks(&locals, &Options::default()).unwrap();
        prop_assert!(report.after_s <= report.before_s * (1.0 + 1e-9), "{:?}", report);
        let values = named_first_step(&graph);
        let inputs = |locals: &[Graph]| -> Vec<BTreeMap<TensorId, Value>> {
            locals
                .iter()
                .enumerate()
                .map(|(rank, local)| {
                    local
                        .tensor_ids()
                        .filter(|id| local.tensor(*id).role != Role::Temp)
                        .map(|id| {
                            let name = &local.tensor(id).name;
                            let whole = graph.find(name).unwrap();
                            let region = plan
                                .source_layout(whole)
                                .region(&graph.ty(whole).shape, &mesh, rank);
                            (id, values[name].part(&region).unwrap())
                        })
                        .collect()
                })
                .collect()
        };
        let expected = results(&locals, &inputs(&locals));
        let found = results(&simplified, &inputs(&simplified));
        prop_assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            prop_assert!(found.relative_error(expected) < 1e-8);
        }
    }
}

/// Sums in another order: the error is judged against the size of the terms, not of a sum that
/// cancels.
fn close(graphs: &[Graph], expected: &[Value]) -> Result<(), String> {
    let found = results(graphs, &inputs(graphs));
    for (found, expected) in found.iter().zip(expected) {
        if found.ty() != expected.ty() {
            return Err(format!("{} became {}", expected.ty(), found.ty()));
        }
        for (a, b) in found.data().iter().zip(expected.data()) {
            let is_close = (a - b).abs() <= 1e-9 * (1.0 + b.abs());
            if !is_close {
                return Err(format!("{a} instead of {b}"));
            }
        }
    }
    Ok(())
}
