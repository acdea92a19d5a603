//! Gradients against finite differences, by the f64 interpreter: every op, and every model family.
//!
//! Of each parameter some elements are moved by ±h (h = 1e-5) and the central difference is compared
//! with the gradient. Errors are relative to the largest gradient of the parameter.

use std::collections::BTreeMap;

use meshweave_compiler::differentiate::{Optimizer, differentiate};
use meshweave_compiler::model::{
    Activation, AttentionBias, DecoderConfig, Goal, GoldenSize, Mla, NormKind, Positions, Router,
    RouterLosses, SharedExperts, build_decoder,
};
use meshweave_dsl::build::GraphBuilder;
use meshweave_dsl::dtype::{DType, Scalar};
use meshweave_dsl::graph::{ConstInit, Graph, Init, Role, RopeScaling, RopeTable, TensorId};
use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::op::{AttentionDims, BinaryFn, MoeDims, OpError, OpKind, UnaryFn};
use meshweave_runtime::reference::{Value, evaluate, golden_inputs, hash_uniform, init_value};

const STEP: f64 = 1e-5;
const TOLERANCE: f64 = 2e-6;
/// Elements of a parameter that are moved.
const N_SAMPLES: usize = 12;

fn loss(graph: &Graph, sources: &BTreeMap<TensorId, Value>) -> f64 {
    let values = evaluate(graph, sources).unwrap();
    values.get(graph.outputs[0]).unwrap().item()
}

/// Compares all gradients of `forward` with differences, from the parameters' start values unless
/// `sources` gives others.
fn check(forward: &Graph, mut sources: BTreeMap<TensorId, Value>) {
    let graph = differentiate(forward, &Optimizer::None).unwrap();
    for id in graph.params() {
        if let Role::Param(init) = &graph.tensor(id).role {
            let value = || init_value(init, graph.ty(id));
            sources.entry(id).or_insert_with(value);
        }
    }
    // Sources keep their ids: they stand before all ops' results in both graphs.
    for id in sources.keys() {
        assert_eq!(forward.tensor(*id).name, graph.tensor(*id).name);
    }
    let values = evaluate(&graph, &sources).unwrap();
    assert!(!graph.gradients.is_empty());
    for (param, gradient) in &graph.gradients {
        let name = &graph.tensor(*param).name;
        let gradient = values.require(&graph, *gradient).unwrap().clone();
        let largest = gradient.data().iter().fold(0.0_f64, |a, b| a.max(b.abs()));
        assert!(largest > 1e-9, "the gradient of {name} vanishes");
        let n = gradient.data().len();
        let stride = n.div_ceil(N_SAMPLES);
        for index in (0..n).step_by(stride) {
            let mut moved = |by: f64| {
                let value = sources.get_mut(param).unwrap();
                value.data_mut()[index] += by;
                let moved = loss(forward, &sources);
                sources.get_mut(param).unwrap().data_mut()[index] -= by;
                moved
            };
            let difference = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
            let error = (difference - gradient.data()[index]).abs() / largest;
            assert!(
                error < TOLERANCE,
                "gradient of {name}[{index}] is {}, the difference quotient {difference}",
                gradient.data()[index]
            );
        }
    }
}

/// A parameter of ±`scale` in the stream of its name's bytes, shifted by 0.
fn weight(b: &mut GraphBuilder, name: &str, shape: &[(&str, usize)]) -> TensorId {
    let stream = name
        .bytes()
        .fold(7_u32, |h, byte| h.wrapping_mul(31) + u32::from(byte));
    let init = Init::Hash { stream, scale: 1.0 };
    b.param(name, DType::F32, shape.to_vec(), init).unwrap()
}

/// Builds y, and checks the loss Σ y · r with fixed random r, so that every element of y counts.
fn check_op(build: impl FnOnce(&mut GraphBuilder) -> Result<TensorId, OpError>) {
    check_with(build, |_, sources| sources);
}

fn check_with(
    build: impl FnOnce(&mut GraphBuilder) -> Result<TensorId, OpError>,
    prepare: impl FnOnce(&Graph, BTreeMap<TensorId, Value>) -> BTreeMap<TensorId, Value>,
) {
    let mut b = GraphBuilder::new("test");
    // Given as an input, so that its gradient is not asked for; sources come before results.
    let y = build(&mut b).unwrap();
    let ty = b.ty(y).clone();
    let mut graph = b.finish();
    let r = graph.add_source("r", ty.clone(), Role::Input);
    let mut b = GraphBuilder::resume(graph);
    let weighted = b.mul("weighted", y, r).unwrap();
    let dims: Vec<_> = ty.dims().cloned().collect();
    let loss = b.reduce("loss", ReduceKind::Sum, weighted, dims).unwrap();
    b.output(loss);
    let graph = b.finish();
    let random = Value::from_fn(ty, |i| f64::from(hash_uniform(999, i)));
    let sources = prepare(&graph, BTreeMap::from([(r, random)]));
    check(&graph, sources);
}

fn indices(graph: &Graph, name: &str, values: &[i32]) -> (TensorId, Value) {
    let id = graph.find(name).unwrap();
    let data = values.iter().map(|i| f64::from(*i)).collect();
    (id, Value::new(graph.ty(id).clone(), data).unwrap())
}

#[test]
fn unary_functions() {
    let positive = [
        UnaryFn::Log,
        UnaryFn::Sqrt,
        UnaryFn::Rsqrt,
        UnaryFn::Reciprocal,
    ];
    let all = [
        UnaryFn::Neg,
        UnaryFn::Exp,
        UnaryFn::Square,
        UnaryFn::Tanh,
        UnaryFn::Sigmoid,
        UnaryFn::Silu,
        UnaryFn::Relu,
        UnaryFn::Gelu,
        UnaryFn::GeluTanh,
        UnaryFn::Scale(Scalar(-1.7)),
        UnaryFn::Shift(Scalar(0.3)),
    ];
    for function in positive {
        check_op(|b| {
            let w = weight(b, "w", &[("m", 3), ("n", 4)]);
            let x = b.shift("x", w, 1.5)?;
            b.unary("y", function, x)
        });
    }
    for function in all {
        check_op(|b| {
            let w = weight(b, "w", &[("m", 3), ("n", 4)]);
            b.unary("y", function, w)
        });
    }
}

#[test]
fn binary_functions_with_broadcasting() {
    use BinaryFn::{Add, Div, Max, Mul, Sub};
    let shapes: [&[(&str, usize)]; 5] = [
        &[("m", 3), ("n", 4)],
        &[("n", 4), ("m", 3)],
        &[("m", 3)],
        &[("n", 4)],
        &[],
    ];
    for function in [Add, Sub, Mul, Div, Max] {
        for narrow in shapes {
            for narrow_first in [false, true] {
                check_op(|b| {
                    let wide = weight(b, "wide", &[("m", 3), ("n", 4)]);
                    let narrow = weight(b, "narrow", narrow);
                    let wide = b.shift("wide.away", wide, 2.5)?;
                    let narrow = b.shift("narrow.away", narrow, 2.5)?;
                    let (x, y) = if narrow_first {
                        (narrow, wide)
                    } else {
                        (wide, narrow)
                    };
                    b.binary("y", function, x, y)
                });
            }
        }
    }
    // An operand used twice.
    check_op(|b| {
        let w = weight(b, "w", &[("m", 3)]);
        b.mul("y", w, w)
    });
}

#[test]
fn derivative_functions_are_linear_in_their_second_operand() {
    for function in [
        BinaryFn::TanhGrad,
        BinaryFn::SigmoidGrad,
        BinaryFn::SiluGrad,
        BinaryFn::ReluGrad,
        BinaryFn::GeluGrad,
        BinaryFn::GeluTanhGrad,
    ] {
        let build = |b: &mut GraphBuilder| {
            let w = weight(b, "w", &[("m", 3)]);
            let x = b.input("x", DType::F32, [("m", 3)])?;
            b.binary("y", function, x, w)
        };
        check_with(build, |graph, mut sources| {
            let id = graph.find("x").unwrap();
            let ty = graph.ty(id).clone();
            sources.insert(id, Value::from_fn(ty, |i| f64::from(hash_uniform(5, i))));
            sources
        });
    }
}

#[test]
fn contractions() {
    type Shape = &'static [(&'static str, usize)];
    let cases: [(Shape, Shape, &[&str]); 6] = [
        (&[("m", 3), ("k", 4)], &[("k", 4), ("n", 2)], &["m", "n"]),
        (&[("m", 3), ("k", 4)], &[("n", 2), ("k", 4)], &["n", "m"]),
        (
            &[("b", 2), ("m", 3), ("k", 4)],
            &[("b", 2), ("k", 4)],
            &["b", "m"],
        ),
        (
            &[("m", 3), ("k", 4), ("l", 2)],
            &[("k", 4), ("n", 2)],
            &["m", "n"],
        ),
        (&[("m", 3)], &[("n", 2)], &["n", "m"]),
        (&[("m", 3), ("k", 2)], &[("m", 3), ("k", 2)], &[]),
    ];
    for (a, other, out) in cases {
        check_op(|b| {
            let a = weight(b, "a", a);
            let other = weight(b, "b", other);
            b.contract("y", a, other, out.iter().copied())
        });
    }
}

#[test]
fn reductions() {
    for kind in [ReduceKind::Sum, ReduceKind::Max, ReduceKind::Lse] {
        for dims in [&["n"][..], &["m"], &["m", "n"]] {
            check_op(|b| {
                let w = weight(b, "w", &[("m", 3), ("n", 4)]);
                b.reduce("y", kind, w, dims.iter().copied())
            });
        }
    }
}

#[test]
fn reshapes() {
    check_op(|b| {
        let w = weight(b, "w", &[("m", 3), ("n", 4)]);
        let x = b.expand("x", w, [("n", 4), ("b", 2), ("m", 3)])?;
        let x = b.transpose("t", x, ["m", "n", "b"])?;
        let x = b.merge("merged", x, ["n", "b"], "nb")?;
        let x = b.split("split", x, "nb", [("p", 2), ("q", 4)])?;
        let x = b.rename("renamed", x, "q", "r")?;
        let x = b.square_of("square", x)?;
        let head = b.slice("head", x, "m", 0, 1)?;
        let middle = b.slice("middle", x, "r", 1, 2)?;
        let tail = b.slice("tail", x, "r", 2, 2)?;
        let head = b.slice("head.part", head, "r", 0, 2)?;
        b.concat("y", &[tail, head, middle], "m")
    });
}

/// An op whose gradient is not constant.
trait Square {
    fn square_of(&mut self, name: &str, x: TensorId) -> Result<TensorId, OpError>;
}

impl Square for GraphBuilder {
    fn square_of(&mut self, name: &str, x: TensorId) -> Result<TensorId, OpError> {
        self.unary(name, UnaryFn::Square, x)
    }
}

#[test]
fn norms() {
    for dim in ["m", "n"] {
        check_op(|b| {
            let x = weight(b, "x", &[("m", 3), ("n", 4)]);
            let size = b.size_of(x, dim)?;
            let g = weight(b, "g", &[(dim, size)]);
            b.rms_norm("y", x, g, dim, 1e-3)
        });
        check_op(|b| {
            let x = weight(b, "x", &[("m", 3), ("n", 4)]);
            let size = b.size_of(x, dim)?;
            let g = weight(b, "g", &[(dim, size)]);
            let c = weight(b, "c", &[(dim, size)]);
            b.layer_norm("y", x, g, c, dim, 1e-3)
        });
        check_op(|b| {
            let x = weight(b, "x", &[("m", 3), ("n", 4)]);
            b.softmax("y", x, dim)
        });
    }
}

#[test]
fn rotary_positions() {
    for inverse in [false, true] {
        check_op(|b| {
            let x = weight(
                b,
                "x",
                &[("batch", 2), ("seq", 5), ("heads", 2), ("head", 6)],
            );
            let table = RopeTable {
                theta: 100.0,
                rotary_dim: 6,
                scaling: RopeScaling::None,
            };
            let shape = [("seq", 5), ("half", 3)];
            let cos = ConstInit::RopeCos(table.clone());
            let cos = b.constant("cos", DType::F32, shape, cos)?;
            let sin = b.constant("sin", DType::F32, shape, ConstInit::RopeSin(table))?;
            let dim = "head".into();
            b.apply("y", OpKind::Rope { dim, inverse }, &[x, cos, sin])
        });
    }
}

#[test]
fn attention() {
    for causal in [false, true] {
        for group in [&[][..], &[("group", 2)]] {
            check_op(|b| {
                let rows = [("batch", 2), ("seq", 4), ("heads", 2)];
                let q: Vec<_> = rows
                    .iter()
                    .chain(group)
                    .copied()
                    .chain([("head", 3)])
                    .collect();
                let q = weight(b, "q", &q);
                let k = weight(
                    b,
                    "k",
                    &[("batch", 2), ("kv_seq", 4), ("heads", 2), ("head", 3)],
                );
                let v = weight(
                    b,
                    "v",
                    &[("batch", 2), ("kv_seq", 4), ("heads", 2), ("value", 5)],
                );
                let dims = AttentionDims {
                    seq: "seq".into(),
                    kv_seq: "kv_seq".into(),
                    head: "head".into(),
                    value: "value".into(),
                    scale: Scalar(0.7),
                    causal,
                    offset: 0,
                };
                b.attention("y", q, k, v, dims)
            });
        }
    }
}

#[test]
fn indexed_ops() {
    // Rows by index, one of them twice.
    check_with(
        |b| {
            let table = weight(b, "table", &[("row", 5), ("n", 3)]);
            let idx = b.input("idx", DType::I32, [("m", 4)])?;
            b.embedding("y", table, "row", idx)
        },
        |graph, mut sources| {
            sources.extend([indices(graph, "idx", &[3, 0, 3, 1])]);
            sources
        },
    );
    // The same with the table's rows inner, and the sum of rows.
    check_with(
        |b| {
            let table = weight(b, "table", &[("n", 3), ("row", 5)]);
            let idx = b.input("idx", DType::I32, [("m", 4)])?;
            let rows = b.embedding("rows", table, "row", idx)?;
            let rows = b.square_of("square", rows)?;
            let kind = OpKind::ScatterAdd {
                dim: "row".into(),
                size: 6,
                offset: 0,
            };
            b.apply("y", kind, &[idx, rows])
        },
        |graph, mut sources| {
            sources.extend([indices(graph, "idx", &[3, 0, 3, 1])]);
            sources
        },
    );
    // One element of each row, along an inner and an outer dim, and of a vector.
    for (shape, rows) in [
        (
            &[("m", 2), ("l", 2), ("n", 5)][..],
            &[("m", 2), ("l", 2)][..],
        ),
        (&[("n", 5), ("m", 2), ("l", 2)], &[("m", 2), ("l", 2)]),
        (&[("n", 5)], &[]),
    ] {
        check_with(
            |b| {
                let x = weight(b, "x", shape);
                let idx = b.input("idx", DType::I32, rows.to_vec())?;
                b.pick("y", x, idx, "n")
            },
            |graph, mut sources| {
                let values = &[4, 0, 4, 2][..if rows.is_empty() { 1 } else { 4 }];
                sources.extend([indices(graph, "idx", values)]);
                sources
            },
        );
    }
}

#[test]
fn cross_entropy_of_both_signs_and_with_other_readers() {
    for negated in [false, true] {
        for read_again in [false, true] {
            check_with(
                |b| {
                    let w = weight(b, "w", &[("m", 4), ("vocab", 6)]);
                    let logits = b.square_of("logits", w)?;
                    let idx = b.input("idx", DType::I32, [("m", 4)])?;
                    let lse = b.reduce("lse", ReduceKind::Lse, logits, ["vocab"])?;
                    let picked = b.pick("picked", logits, idx, "vocab")?;
                    let y = if negated {
                        b.sub("ll", picked, lse)?
                    } else {
                        b.sub("nll", lse, picked)?
                    };
                    if read_again {
                        let z = b.mul("z", lse, picked)?;
                        let z = b.add("zy", z, y)?;
                        let w = b.reduce("more", ReduceKind::Sum, logits, ["vocab"])?;
                        return b.mul("y", z, w);
                    }
                    Ok(y)
                },
                |graph, mut sources| {
                    sources.extend([indices(graph, "idx", &[5, 0, 3, 3])]);
                    sources
                },
            );
        }
    }
}

#[test]
fn greatest_elements() {
    for dim in ["m", "n"] {
        check_op(|b| {
            let x = weight(b, "x", &[("m", 4), ("n", 5)]);
            let (values, _) = b.top_k("top", x, dim, "choice", 2)?;
            b.square_of("y", values)
        });
    }
    // Scattered back by their indices.
    check_op(|b| {
        let x = weight(b, "x", &[("m", 4), ("n", 5)]);
        let (values, idx) = b.top_k("top", x, "n", "choice", 2)?;
        let kind = OpKind::TopKGrad {
            dim: "n".into(),
            choice: "choice".into(),
            size: 5,
        };
        let values = b.square_of("square", values)?;
        b.apply("y", kind, &[values, idx])
    });
}

/// Routes 2 sequences of 5 tokens to 2 of 3 experts with `capacity` slots.
fn moe(b: &mut GraphBuilder, capacity: usize) -> Result<(MoeDims, [TensorId; 4]), OpError> {
    let x = weight(b, "x", &[("batch", 2), ("seq", 5), ("embed", 3)]);
    let scores = weight(b, "scores", &[("batch", 2), ("seq", 5), ("expert", 3)]);
    let (gate, expert) = b.top_k("chosen", scores, "expert", "choice", 2)?;
    let slots = OpKind::MoeSlots {
        seq: "seq".into(),
        choice: "choice".into(),
        n_experts: 3,
        capacity,
    };
    let slot = b.apply("slots", slots, &[expert])?;
    let dims = MoeDims {
        seq: "seq".into(),
        choice: "choice".into(),
        expert: "expert".into(),
        slot: "slot".into(),
        n_experts: 3,
        capacity,
        offset: 0,
    };
    Ok((dims, [x, expert, slot, gate]))
}

#[test]
fn experts_with_and_without_dropping() {
    for capacity in [2, 5] {
        for n_gates in [0, 1] {
            check_op(|b| {
                let (dims, [x, expert, slot, gate]) = moe(b, capacity)?;
                let mut inputs = vec![x, expert, slot];
                inputs.extend([gate].iter().take(n_gates));
                b.apply("y", OpKind::MoeDispatch(dims), &inputs)
            });
            check_op(|b| {
                let (dims, [_, expert, slot, gate]) = moe(b, capacity)?;
                let shape = [
                    ("expert", 3),
                    ("batch", 2),
                    ("slot", capacity),
                    ("embed", 3),
                ];
                let y = weight(b, "rows", &shape);
                let mut inputs = vec![y, expert, slot];
                inputs.extend([gate].iter().take(n_gates));
                b.apply("y", OpKind::MoeCombine(dims), &inputs)
            });
        }
        check_op(|b| {
            let (dims, [x, expert, slot, _]) = moe(b, capacity)?;
            let shape = [
                ("expert", 3),
                ("batch", 2),
                ("slot", capacity),
                ("embed", 3),
            ];
            let y = weight(b, "rows", &shape);
            b.apply("y", OpKind::MoeGateGrad(dims), &[y, x, expert, slot])
        });
    }
}

/// The golden model of a size that differences are quick on.
fn small(capacity_factor: Option<f64>) -> DecoderConfig {
    let size = GoldenSize {
        n_layers: 2,
        embed: 16,
        heads: 4,
        ffn: 12,
        vocab: 11,
        seq: 6,
        batch: 2,
    };
    DecoderConfig::golden(&size, capacity_factor)
}

/// Checks a model from its start values; constant ones (norms, biases) are moved off 0 and 1.
fn check_model(config: &DecoderConfig) {
    let graph = build_decoder(config, 2, 6, Goal::Training).unwrap();
    let mut sources = golden_inputs(&graph, config.vocab).unwrap();
    for (param_idx, id) in graph.params().enumerate() {
        let Role::Param(init @ (Init::Zeros | Init::Ones)) = &graph.tensor(id).role else {
            continue;
        };
        let mut value = init_value(init, graph.ty(id));
        for (index, element) in value.data_mut().iter_mut().enumerate() {
            *element += 0.2 * f64::from(hash_uniform(1000 + param_idx as u32, index));
        }
        sources.insert(id, value);
    }
    check(&graph, sources);
}

#[test]
fn golden_models() {
    check_model(&small(None));
    let mut tied = small(None);
    tied.tied = true;
    check_model(&tied);
    check_model(&small(Some(1.0)));
    check_model(&small(Some(0.0)));
}

#[test]
fn grouped_queries_with_biases_and_norms_of_heads() {
    let mut config = small(None);
    config.attention.kv_heads = 2;
    config.attention.qk_norm = true;
    config.attention.bias = AttentionBias {
        q: true,
        k: true,
        v: true,
        o: false,
    };
    check_model(&config);
}

#[test]
fn learned_positions_and_layer_norms() {
    let mut config = small(None);
    config.norm.kind = NormKind::Layer;
    config.positions = Positions::Learned { n_positions: 9 };
    config.attention.bias = AttentionBias {
        q: true,
        k: false,
        v: true,
        o: true,
    };
    config.ffn.activation = Activation::GeluTanh;
    config.ffn.gated = false;
    config.ffn.bias = true;
    config.tied = true;
    check_model(&config);
}

#[test]
fn latent_attention_with_limited_groups() {
    let mut config = small(Some(0.0));
    config.attention.head = 6;
    config.attention.mla = Some(Mla {
        q_rank: Some(5),
        kv_rank: 7,
        nope: 2,
        rope: 4,
        value: 3,
        eps: 1e-6,
    });
    config.positions = Positions::Rope(RopeTable {
        theta: 100.0,
        rotary_dim: 4,
        scaling: RopeScaling::None,
    });
    let routers = [
        Router::Sigmoid {
            normalize: true,
            scale: 2.5,
            groups: Some((4, 2)),
        },
        Router::Softmax {
            normalize: false,
            scale: 1.5,
            groups: Some((4, 2)),
        },
    ];
    for router in routers {
        let moe = config.moe.as_mut().unwrap();
        moe.losses = RouterLosses {
            balance: 0.3,
            z: 0.2,
            bias_rate: 0.0,
        };
        moe.router = router;
        moe.shared = Some(SharedExperts {
            ffn: 5,
            gated: true,
        });
        moe.dense_layers = [0].into();
        check_model(&config);
    }
}
