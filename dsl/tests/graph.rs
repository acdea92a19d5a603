//! The text form and the verifier of graphs: the corpus in `tests/cases/graph`, and random graphs.

// Helpers of tests may fail as tests do.
#![allow(clippy::unwrap_used)]

#[path = "../../tests/support/graphs.rs"]
mod graphs;

use meshweave_dsl::diagnostics::{RenderOptions, SourceId, Sources, has_errors, render_all};
use meshweave_dsl::graph::text::{parse, print};
use meshweave_dsl::graph::verify::{VerifyError, verify_global, verify_local, verify_ranks};
use meshweave_dsl::graph::{Graph, Role, TensorType};
use meshweave_dsl::layout::Mesh;
use meshweave_dsl::op::{Group, OpKind};
use proptest::prelude::*;

/// What every text must satisfy, malformed or not; returns the diagnostics and the printed graph.
fn check(name: &str, text: &str) -> String {
    let mut sources = Sources::new();
    let source = sources.add(name, text);
    let parsed = parse(text, source);
    let rendered = render_all(&parsed.diagnostics, &sources, RenderOptions::default());
    let printed = print(&parsed.graph);
    if has_errors(&parsed.diagnostics) {
        return format!("{rendered}---- understood ----\n{printed}");
    }
    let verified = match verify_global(&parsed.graph) {
        Ok(()) => "verified".to_string(),
        Err(error) => format!("not verified: {error}"),
    };
    let again = parse(&printed, source);
    assert_eq!(
        again.diagnostics,
        [],
        "the printed graph reparses:\n{printed}"
    );
    assert_eq!(again.graph, parsed.graph, "print, parse is the identity");
    format!("{rendered}---- {verified} ----\n{printed}")
}

#[test]
fn graph_cases() {
    insta::glob!("../../tests/cases/graph", "*.weave", |path| {
        let text = std::fs::read_to_string(path).unwrap();
        let name = path.file_name().unwrap().to_string_lossy();
        let report = check(&name, &text);
        insta::with_settings!({
            snapshot_path => "../../tests/cases/graph/snapshots",
            prepend_module_to_snapshot => false,
            omit_expression => true,
        }, {
            insta::assert_snapshot!("graph", report);
        });
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn print_and_parse_are_inverse(seed: u64, n_ops in 0..40_usize) {
        let graph = graphs::random_graph(seed, n_ops);
        prop_assert_eq!(verify_global(&graph), Ok(()));
        let text = print(&graph);
        let parsed = parse(&text, SourceId::default());
        prop_assert_eq!(parsed.diagnostics, vec![], "{}", text);
        prop_assert_eq!(&parsed.graph, &graph, "{}", text);
        let json = serde_json::to_string(&graph).unwrap();
        prop_assert_eq!(serde_json::from_str::<Graph>(&json).unwrap(), graph);
    }

    /// Truncated and damaged texts give diagnostics, never a panic.
    #[test]
    fn damaged_text_is_survived(
        seed: u64,
        damage in prop::collection::vec((any::<prop::sample::Index>(), "[ -~\n]{0,3}"), 1..4),
    ) {
        let mut text = print(&graphs::random_graph(seed, 12));
        for (at, patch) in damage {
            let at = at.index(text.len());
            if text.is_char_boundary(at) && text.is_char_boundary(at + 1) {
                text.replace_range(at..at + 1, &patch);
            }
        }
        let parsed = parse(&text, SourceId::default());
        for diagnostic in &parsed.diagnostics {
            let span = diagnostic.primary.as_ref().unwrap().span;
            prop_assert!(span.start <= span.end && span.end <= text.len());
        }
        if !has_errors(&parsed.diagnostics) {
            let again = parse(&print(&parsed.graph), SourceId::default());
            prop_assert_eq!(again.graph, parsed.graph);
        }
    }
}

#[test]
fn random_graphs_have_every_kind_of_op() {
    let mut names: Vec<&str> = Vec::new();
    for seed in 0..200 {
        let graph = graphs::random_graph(seed, 30);
        names.extend(graph.ops.iter().map(|op| op.kind.name()));
    }
    names.sort_unstable();
    names.dedup();
    for kind in [
        "gather",
        "scatter_add",
        "contract",
        "reduce_sum",
        "reduce_max",
        "logsumexp",
        "expand",
        "rms_norm",
        "rms_norm_grad",
        "layer_norm",
        "layer_norm_grad",
        "softmax",
        "softmax_grad",
        "rope",
        "attention",
        "attention_grad",
        "pick",
        "cross_entropy_grad",
        "transpose",
        "rename",
        "split",
        "merge",
        "slice",
        "concat",
        "top_k",
        "top_k_grad",
        "moe_slots",
        "moe_dispatch",
        "moe_combine",
        "moe_gate_grad",
        "adamw",
        "sgd",
    ] {
        assert!(names.contains(&kind), "no {kind} among {names:?}");
    }
}

/// Numbers that JSON has no form for survive, and so do names that look like other things.
#[test]
fn odd_constants_and_names_print_and_parse() {
    use meshweave_dsl::dtype::DType::{F32, I32};
    use meshweave_dsl::graph::ConstInit;
    use meshweave_dsl::op::UnaryFn;

    let mut g = Graph::new("a \"quoted\"\nname");
    let ty = TensorType::new(F32, [("true", 2), ("8", 3), ("a b", 1)]);
    let mut x = g.add_source(
        "input",
        ty.clone(),
        Role::Const(ConstInit::Fill(f64::NEG_INFINITY.into())),
    );
    for (name, c) in [
        ("graph", f64::INFINITY),
        ("ids", -0.0),
        ("-> #", 1e300),
        ("", 1e-7),
        ("ü[0]", 0.1),
        ("}", 3.0),
        ("null", -2.5e22),
    ] {
        x = g
            .add_op(name, OpKind::Unary(UnaryFn::Scale(c.into())), &[x])
            .unwrap()[0];
    }
    let iota = ConstInit::Iota { dim: "8".into() };
    g.add_source(
        "output",
        TensorType::new(I32, [("8", 3)]),
        Role::Const(iota),
    );
    g.outputs.push(x);
    let parsed = parse(&print(&g), SourceId::default());
    assert_eq!(parsed.diagnostics, []);
    assert_eq!(parsed.graph, g);
}

/// A graph x → y of one op, to be broken in one way each.
fn valid() -> Graph {
    let text = "graph \"g\" {
  input x: f32[a:2, b:3]
  param w: f32[b:3] = ones
  state m: f32[b:3] of w
  y: f32[a:2] = contract{out: [a]}(x, w)
  grad.w: f32[b:3] = reduce{kind: sum, dims: [a]}(x)
  w.next: f32[b:3] = sgd{lr: 0.5}(w, grad.w)
  output y
  update w -> w.next
  gradient w -> grad.w
}";
    let parsed = parse(text, SourceId::default());
    assert_eq!(parsed.diagnostics, []);
    assert_eq!(verify_global(&parsed.graph), Ok(()));
    parsed.graph
}

#[test]
fn every_rule_of_a_graph_is_checked() {
    type Break = fn(&mut Graph);
    let breaks: Vec<(&str, Break)> = vec![
        ("1 ids", |g| g.outputs[0].0 = 99),
        ("2 names", |g| g.tensors[1].name = "x".into()),
        ("2 empty", |g| g.tensors[1].name.clear()),
        ("3 no producer", |g| drop(g.ops.remove(0))),
        ("3 two producers", |g| g.ops.push(g.ops[0].clone())),
        ("3 source", |g| g.tensors[3].role = Role::Input),
        ("4 order", |g| g.ops.swap(1, 2)),
        ("5 rule", |g| g.ops[0].inputs.truncate(1)),
        ("5 count", |g| {
            let extra = g.ops[1].results[0];
            g.ops.remove(1);
            g.ops[0].results.push(extra);
        }),
        ("5 type", |g| g.tensors[3].ty.shape[0].1 = 7),
        ("6 update", |g| {
            *g.updates.values_mut().next().unwrap() = g.outputs[0]
        }),
        ("6 update of", |g| {
            let update = g.outputs[0];
            g.updates.insert(meshweave_dsl::graph::TensorId(0), update);
        }),
        ("6 gradient", |g| {
            *g.gradients.values_mut().next().unwrap() = g.outputs[0]
        }),
        ("6 gradient of", |g| {
            let gradient = g.outputs[0];
            g.gradients
                .insert(meshweave_dsl::graph::TensorId(0), gradient);
        }),
        ("6 state", |g| {
            g.tensors[2].role = Role::State {
                of: meshweave_dsl::graph::TensorId(0),
            }
        }),
        ("7 collective", |g| {
            let group = Group {
                axes: vec![],
                ranks: vec![0],
            };
            let ty = g.ty(g.outputs[0]).clone();
            let y = g.outputs[0];
            g.add_typed_op("z", OpKind::Broadcast { group }, &[y], ty);
        }),
        ("8 offset", |g| {
            let ids = TensorType::new(meshweave_dsl::dtype::DType::I32, [("c", 2)]);
            let ids = g.add_source("ids", ids, Role::Input);
            let x = meshweave_dsl::graph::TensorId(0);
            let gather = OpKind::Gather {
                dim: "a".into(),
                offset: 4,
            };
            g.add_op("z", gather, &[x, ids]).unwrap();
        }),
    ];
    let mut report = String::new();
    for (rule, break_it) in breaks {
        let mut graph = valid();
        break_it(&mut graph);
        let error = verify_global(&graph).expect_err(rule);
        report.push_str(&format!("{rule}: {error}\n"));
    }
    insta::assert_snapshot!(report);
}

/// Rank graphs of one collective each.
fn ranks(
    n: usize,
    sizes: [usize; 2],
    result: [usize; 2],
    kind: impl Fn(usize) -> OpKind,
) -> Vec<Graph> {
    (0..n)
        .map(|rank| {
            let ty = |size| TensorType::new(meshweave_dsl::dtype::DType::F32, [("a", size)]);
            let mut g = Graph::new("local");
            let x = g.add_source("x", ty(sizes[rank % 2]), Role::Input);
            let y = g.add_typed_op("y", kind(rank), &[x], ty(result[rank % 2]));
            g.outputs.push(y);
            g
        })
        .collect()
}

fn group(ranks: &[usize]) -> Group {
    Group {
        axes: vec!["t".into()],
        ranks: ranks.to_vec(),
    }
}

#[test]
fn collectives_of_local_graphs_are_checked() {
    let mesh = Mesh::new([("t", 2)]);
    let gather = |counts: [usize; 2], group: Group| {
        move |_| OpKind::AllGather {
            dim: "a".into(),
            counts: counts.to_vec(),
            group: group.clone(),
        }
    };
    let good = ranks(2, [2, 1], [3, 3], gather([2, 1], group(&[0, 1])));
    for (rank, graph) in good.iter().enumerate() {
        assert_eq!(verify_local(graph, rank, &mesh), Ok(()));
    }
    assert_eq!(verify_ranks(&good), Ok(()));
    let mut report = String::new();
    let mut local = |what: &str, graphs: Vec<Graph>| {
        let error = (graphs.iter().enumerate())
            .find_map(|(rank, graph)| verify_local(graph, rank, &mesh).err())
            .expect(what);
        report.push_str(&format!("{what}: {error}\n"));
    };
    local(
        "counts",
        ranks(2, [2, 1], [3, 3], gather([1, 2], group(&[0, 1]))),
    );
    local(
        "result",
        ranks(2, [2, 1], [4, 3], gather([2, 1], group(&[0, 1]))),
    );
    local(
        "unknown rank",
        ranks(2, [2, 1], [3, 3], gather([2, 1], group(&[0, 2]))),
    );
    local(
        "twice",
        ranks(2, [2, 1], [3, 3], gather([2, 1], group(&[0, 0]))),
    );
    local(
        "not a member",
        ranks(2, [2, 1], [3, 3], gather([2, 1], group(&[1]))),
    );
    local(
        "axes",
        ranks(2, [2, 1], [3, 3], gather([2, 1], group(&[1, 0]))),
    );
    let scatter = |_| OpKind::ReduceScatter {
        kind: meshweave_dsl::layout::ReduceKind::Sum,
        dim: "a".into(),
        counts: vec![2, 2],
        group: group(&[0, 1]),
    };
    local("sum of counts", ranks(2, [3, 3], [2, 2], scatter));
    insta::assert_snapshot!(report);
}

#[test]
fn collectives_of_all_ranks_are_checked() {
    let reduce = |kind: &[meshweave_dsl::layout::ReduceKind; 2]| {
        let kind = *kind;
        move |rank: usize| OpKind::AllReduce {
            kind: kind[rank],
            group: group(&[0, 1]),
        }
    };
    use meshweave_dsl::layout::ReduceKind::{Max, Sum};
    let mut report = String::new();
    let mut refused = |what: &str, graphs: Vec<Graph>| {
        let error: VerifyError = verify_ranks(&graphs).expect_err(what);
        report.push_str(&format!("{what}: {error}\n"));
    };
    refused("kinds", ranks(2, [2, 2], [2, 2], reduce(&[Sum, Max])));
    refused("sizes", ranks(2, [2, 3], [2, 3], reduce(&[Sum, Sum])));
    refused("absent", {
        let mut graphs = ranks(2, [2, 2], [2, 2], reduce(&[Sum, Sum]));
        graphs[1].ops.clear();
        graphs
    });
    // Ranks 0 and 1 meet in two groups, each entering another one first.
    refused("deadlock", {
        let groups = [group(&[0, 1]), group(&[0, 1, 2])];
        let mut graphs = ranks(3, [2, 2], [2, 2], |rank| OpKind::Broadcast {
            group: groups[usize::from(rank > 0)].clone(),
        });
        for (rank, group) in [(0, &groups[1]), (1, &groups[0])] {
            let y = graphs[rank].outputs[0];
            let ty = graphs[rank].ty(y).clone();
            graphs[rank].add_typed_op(
                "z",
                OpKind::Broadcast {
                    group: group.clone(),
                },
                &[y],
                ty,
            );
        }
        graphs
    });
    refused(
        "partners",
        ranks(2, [2, 2], [2, 2], |rank| OpKind::CollectivePermute {
            to: rank,
            from: 1 - rank,
            group: group(&[0, 1]),
        }),
    );
    insta::assert_snapshot!(report);
}
