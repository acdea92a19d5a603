//! Training with activations and the operands of products in bf16, parameters and sums in f32.

use std::collections::BTreeSet;

use meshweave_compiler::model::Positions;
use meshweave_dsl::device_code::Launch;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::program::{Action, BufferId};

use super::*;
use crate::support::golden::altered;

/// Activations rounded to 2⁻⁹, against f64. Adam's first steps move an element as far whatever its
/// gradient's size, so one whose sign rounding decides ends up two steps away.
pub(super) const BF16: Tolerance = Tolerance {
    losses: 1.0 / 256.0,
    tensors: 1.0 / 16.0,
};

/// A plan whose activations are bf16.
fn mixed(plan: Plan) -> Plan {
    Plan {
        storage: DType::Bf16,
        ..plan
    }
}

fn check_mixed(graph: &Graph, plan: Plan, library: Library, seed: u64) {
    check_within(graph, plan, library, seed, BF16);
}

fn check_within(graph: &Graph, plan: Plan, library: Library, seed: u64, tolerance: Tolerance) {
    let (program, code) = compiled(graph, &mixed(plan));
    check_types(&program);
    let session = start(graph, &program, &code, Simulated::new(library, seed));
    check_steps(graph, session, tolerance);
}

/// What is kept between steps is f32, every product has operands of one type, which is bf16 but for a
/// few, and parameters are cast once.
fn check_types(program: &Program) {
    for rank in &program.ranks {
        let dtype = |id: BufferId| rank.buffers[id.index()].ty.dtype;
        let mut kept = rank.buffers.iter().filter(|buffer| buffer.persistent);
        assert!(kept.all(|buffer| buffer.ty.dtype != DType::Bf16));
        let (mut n_narrow, mut n_wide) = (0, 0);
        let mut cast = BTreeSet::new();
        for instruction in &rank.instructions {
            match &instruction.action {
                Action::Contract { a, b, .. } => {
                    assert_eq!(dtype(*a), dtype(*b), "{}", instruction.name);
                    match dtype(*a) {
                        DType::Bf16 => n_narrow += 1,
                        _ => n_wide += 1,
                    }
                }
                Action::Attention {
                    q, k, v, o, lse, ..
                } => {
                    assert_eq!([*q, *k, *v, *o].map(dtype), [DType::Bf16; 4]);
                    assert_eq!(dtype(*lse), DType::F32);
                }
                Action::Kernel { args, .. } if instruction.name.ends_with(".bf16") => {
                    let source = args.iter().find(|id| dtype(**id) == DType::F32);
                    assert!(cast.insert(source.copied()), "{} again", instruction.name);
                }
                _ => {}
            }
        }
        assert!(n_narrow > 0, "no products");
        assert!(
            n_wide * 8 <= n_narrow,
            "{n_narrow} of bf16, {n_wide} of f32"
        );
    }
}

#[test]
fn a_rank_alone_in_bf16() {
    let graph = golden(None, false);
    let plan = plan(&graph, &[("dp", 1)], &[]);
    check_mixed(&graph, plan.clone(), Library::None, 1);
    check_mixed(&graph, plan, Library::Products, 2);
}

/// Products and attention by groups of warps, which code for H100 and H200 alone has.
#[test]
fn warp_groups_in_bf16() {
    let graph = altered(None, |config| {
        config.attention.head = 64;
        config.positions = Positions::Learned { n_positions: 8 };
    });
    let plan = mixed(plan(&graph, &[("dp", 1)], &[]));
    let cluster = Cluster::local(1, &Host::nominal());
    let compiled = compile(&graph, &plan, &cluster, &options_for("sm_90a")).unwrap();
    let (program, code) = through_artifact(&compiled);
    assert_eq!(code.target, "sm_90a");
    check_types(&program);
    let is_by_groups = |launch: &Launch| {
        let source = code.modules[launch.entry.module].source.as_ref();
        source.is_some_and(|source| source.contains("wgmma.mma_async"))
    };
    let launches = program.ranks[0].instructions.iter().zip(&code.ranks[0]);
    let of = |is_wanted: fn(&Action) -> bool| -> Vec<bool> {
        let wanted = launches.clone().filter(|(one, _)| is_wanted(&one.action));
        wanted
            .flat_map(|(_, launches)| launches.iter().map(is_by_groups))
            .collect()
    };
    // All products but those of f32; of attention all but D = Σ o ∘ do.
    let products = of(|action| matches!(action, Action::Contract { .. }));
    let n_by_groups = products.iter().filter(|by_groups| **by_groups).count();
    assert!(8 * n_by_groups >= 7 * products.len(), "{products:?}");
    let attention = of(|action| {
        matches!(
            action,
            Action::Attention { .. } | Action::AttentionGrad { .. }
        )
    });
    assert_eq!(
        attention,
        [true, true, false, true, true, false, true, true]
    );
    let session = start(&graph, &program, &code, Simulated::new(Library::None, 3));
    check_steps(&graph, session, BF16);
}

/// Code for one device alone is refused by others, with the way out.
#[test]
fn code_for_another_device_is_refused() {
    let graph = golden(None, false);
    let plan = plan(&graph, &[("dp", 1)], &[]);
    let (program, code) = compiled(&graph, &plan);
    let refused = |target: &str| {
        let code = DeviceCode {
            target: target.into(),
            ..code.clone()
        };
        let gpu = Box::new(Simulated::new(Library::None, 1));
        let session = Session::on_gpu(program.clone(), &code, gpu, &SessionOptions::default());
        session.err().map(|error| error.to_string())
    };
    assert_eq!(refused("sm_80"), None);
    assert_eq!(refused("sm_90a"), None);
    let said = refused("sm_100").unwrap();
    let expected = "the code is for sm_100, which runs on compute capability 10.0 and later, and no GPU, but an \
                    interpreter of PTX (sm_90) has 9.0; compile it again with `--target cuda:sm_90`";
    assert_eq!(said, expected);
}

/// Layer norms, biases, learned positions, GELU and tied embeddings. A bias begins at zero, and that of the
/// keys has no gradient, so that Adam moves it by signs that rounding decides: losses are compared alone.
#[test]
fn a_model_as_gpt_in_bf16() {
    let graph = biases::gpt(true);
    let preferences = [("tp", &["heads", "ffn", "vocab", "seq"][..])];
    let plan = plan(&graph, &[("tp", 2)], &preferences);
    let tolerance = Tolerance {
        tensors: f64::INFINITY,
        ..BF16
    };
    for library in [Library::None, Library::Products] {
        check_within(&graph, plan.clone(), library, 4, tolerance);
    }
}

#[test]
fn ranks_share_a_device_in_bf16() {
    const TP: &[&str] = &["heads", "ffn", "vocab", "seq"];
    let graph = golden(None, false);
    for (seed, (axes, preferences)) in [
        (
            &[("fsdp", 2)][..],
            &[("fsdp", &["embed", "ffn", "vocab", "batch"][..])][..],
        ),
        (&[("dp", 2), ("tp", 2)], &[("dp", &["batch"]), ("tp", TP)]),
    ]
    .into_iter()
    .enumerate()
    {
        let plan = plan(&graph, axes, preferences);
        check_mixed(&graph, plan, Library::Products, seed as u64);
    }
    let plan = plans::random_plan(&graph, &Mesh::new([("dp", 2), ("tp", 2)]), 1);
    check_mixed(&graph, plan, Library::None, 11);
}

/// Where every token goes to all experts, rounding cannot send it elsewhere.
#[test]
fn all_experts_in_bf16() {
    let graph = altered(Some(0.0), |config| {
        let moe = config.moe.as_mut().unwrap();
        moe.top_k = moe.n_experts;
    });
    let plan = plan(&graph, &[("ep", 2)], &[("ep", &["expert", "batch"])]);
    check_mixed(&graph, plan, Library::Products, 7);
}

/// Where scores lie closer than rounding, a token goes to another expert than the oracle's, and of the
/// few of these models that is seen in an expert's gradient: losses are compared alone.
#[test]
fn chosen_experts_in_bf16() {
    let graph = golden(Some(2.0), false);
    let plan = plan(&graph, &[("ep", 2)], &[("ep", &["expert", "batch"])]);
    let tolerance = Tolerance {
        tensors: f64::INFINITY,
        ..BF16
    };
    check_within(&graph, plan, Library::None, 7, tolerance);
}

/// Each rank on a device of its own has the bits of one device, but for sums that the library makes.
#[test]
fn ranks_apart_in_bf16() {
    let graph = golden(None, false);
    let preferences = [("fsdp", &["embed", "ffn", "vocab", "batch"][..])];
    let plan = mixed(plan(&graph, &[("fsdp", 3)], &preferences));
    let (program, code) = compiled(&graph, &plan);
    check_apart(&graph, &program, &code);
}

#[test]
fn stages_in_bf16() {
    check_types(&check_pipeline("zb-h1", "", "bf16"));
}

/// Less is held and sent than in f32.
#[test]
fn bf16_takes_less() {
    let graph = golden(None, false);
    let preferences = [("tp", &["heads", "ffn", "vocab", "seq"][..])];
    let plan = plan(&graph, &[("tp", 2)], &preferences);
    let of = |plan: &Plan| {
        let (program, _) = compiled(&graph, plan);
        let rank = &program.ranks[0];
        let sent = rank.instructions.iter().filter_map(|one| match one.action {
            Action::Collective { .. } => Some(one.n_bytes),
            _ => None,
        });
        sent.sum::<f64>()
    };
    let (wide, narrow) = (of(&plan), of(&mixed(plan.clone())));
    assert!(narrow < 0.75 * wide, "{narrow} of {wide} bytes");
}

#[test]
fn hosts_say_that_they_do_not_compute_in_bf16() {
    let graph = golden(None, false);
    let plan = mixed(plan(&graph, &[("dp", 1)], &[]));
    let cluster = Cluster::local(1, &Host::nominal());
    let compiled = compile(&graph, &plan, &cluster, &CompileOptions::default()).unwrap();
    let refused = artifact::load_kernels(&compiled.program, &compiled.kernels);
    let message = refused.err().unwrap().to_string();
    let said = message.split_once('`').unwrap().0;
    assert_eq!(said, "the program stores ");
    assert!(
        message.ends_with("(`--backend cuda`), or compile with `dtype f32`"),
        "{message}"
    );
}
