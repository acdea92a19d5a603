//! The builder makes the same trees as the parser.
// Helpers of tests may fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use meshweave_dsl::diagnostics::SourceId;
use meshweave_dsl::schedule::Channels;
use meshweave_dsl::units::{Quantity, Unit};
use meshweave_dsl::weave::ast::{Choice, Dispatch, Exchanges, Init, OffloadTo, RecomputePolicy};
use meshweave_dsl::weave::{
    BuildError, PlanBuilder, auto, auto_of, axis, minimize, name, parse, print, solved,
};

#[test]
fn the_sample_of_the_design() {
    let built = PlanBuilder::new("mixtral-128")
        .model("mixtral-8x22b/config.json")
        .cluster("eos-h100:128")
        .train(256, 4096)
        .optimizer("adamw")
        .mesh(
            "main",
            [
                axis("pp").auto(),
                axis("dp").rest(),
                axis("cp").degree(1),
                axis("tp").auto_of([1, 2, 4, 8]).within_node(),
            ],
        )
        .refold(
            "moe",
            [
                axis("pp").same(),
                axis("edp").rest(),
                axis("ep").auto_of([4, 8]),
                axis("etp").degree(1),
            ],
            "main",
        )
        .use_mesh("main", ["*"])
        .use_mesh("moe", ["layers[*].moe.experts"])
        .tactic("megatron", ["t"], |t| {
            t.shard(["heads", "ffn", "vocab"], ["t"], ["params"]).shard(
                ["seq"],
                ["t"],
                ["between_blocks"],
            )
        })
        .apply("megatron", ["main.tp"])
        .apply_except("zero", ["1", "main.dp"], ["*.router"])
        .pin("layers[*].attn.wq", "[embed, heads/tp]")
        .forbid("layers[*].moe.router", "[experts/*]")
        .prefer("layers[*].attn.seq", ["ulysses(cp)", "ring(cp)"], Some(3.0))
        .pipeline("main.pp", |p| {
            p.chunks(auto_of([1, 2]))
                .cut_before(["layers[14]", "layers[28]"])
                .schedule(auto_of(["1f1b", "interleaved", "zb-h1", "zb-v"]))
                .microbatches(auto())
        })
        .memory(|m| {
            m.budget(Quantity::new(72, Unit::Gibibyte))
                .recompute("layers[*].attn.core", RecomputePolicy::Full)
                .recompute(
                    "layers[*].mlp",
                    auto_of([RecomputePolicy::None, RecomputePolicy::Full]),
                )
                .offload("optimizer", auto_of([OffloadTo::None, OffloadTo::Host]))
        })
        .experts(|e| {
            e.placement_from("affinity", "routes.parquet")
                .dispatch(Dispatch::Dropless)
        })
        .solve(
            minimize("step_time")
                .within(Quantity::new(60, Unit::Second))
                .gap(Quantity::new(2, Unit::Percent)),
        )
        .build()
        .unwrap();
    let text = include_str!("../../tests/cases/parse/design_sample.weave");
    assert_eq!(built, parse(text, SourceId(0)).document);
    assert_eq!(print(&built), text);
}

#[test]
fn exchanges_of_experts() {
    let built = PlanBuilder::new("decoder")
        .model("config.json")
        .cluster("local:4")
        .experts(|e| e.exchanges(auto_of([Exchanges::One, Exchanges::Two])))
        .build()
        .unwrap();
    let text = print(&built);
    assert!(text.contains("  exchanges auto{one, two}\n"), "{text}");
    assert_eq!(parse(&text, SourceId(0)).document, built);
}

#[test]
fn definitions_witnesses_and_overrides() {
    let built = PlanBuilder::new("tiny")
        .model(name("tiny").unwrap())
        .cluster(name("laptop").unwrap())
        .data(name("golden").unwrap())
        .init(Init::Random { seed: Some(1) })
        .train(8, 64)
        .optimizer("adamw")
        .with("lr", 1e-3)
        .with("betas", [0.9, 0.95])
        .define_model("tiny", name("golden").unwrap(), |m| {
            m.set("layers", 2).set("capacity", 1.25).set("tied", false)
        })
        .define_cluster("laptop", |c| {
            c.set("devices", 8)
                .set("link", name("shm").unwrap())
                .and(
                    "bandwidth",
                    (
                        Quantity::new(20, Unit::GigabytePerSecond),
                        Quantity::new(2, Unit::Microsecond),
                    ),
                )
                .and("within", name("node").unwrap())
        })
        .mesh(
            "main",
            [
                axis("dp").rest().witness(2),
                axis("tp").auto_of([2, 4]).witness(4),
            ],
        )
        .comment("what the planner chose")
        .pin("wte", solved("[vocab/tp, embed]"))
        .pin("layers[0].attn.wq", "[embed, heads/? := (dp,tp)]")
        .overriding()
        .schedule_key("mine", "F:(mb,0) B:(mb+P-r,-1)")
        .schedule_rows("literal", ["0F0 0F1 . 0B0 0B1", ". 1F0 1B0 1F1 1B1"])
        .schedule_rows_over(
            "lowered",
            Channels::Buffered(2),
            ["0F0 0SEND_F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0"],
        )
        .schedule_streams("queued", Channels::PerPair, ["rank 0 compute 0:0F0 1:0B0"])
        .schedule_csv("file", "order.csv")
        .memory(|m| {
            m.budget(Quantity::new(1, Unit::Gibibyte))
                .recompute("*", Choice::auto().witnessed(RecomputePolicy::None))
        })
        .overriding()
        .build()
        .unwrap();
    insta::assert_snapshot!(print(&built), @r#"
    plan "tiny" model tiny cluster laptop
    data golden
    init random seed 1
    train batch 8 seq 64 optimizer adamw lr 0.001 betas 0.9 0.95

    model tiny = golden {
      layers 2
      capacity 1.25
      tied false
    }
    cluster laptop {
      devices 8
      link shm bandwidth 20 GB/s 2 us within node
    }

    mesh main = dp:rest := 2 > tp:auto{2,4} := 4

    # what the planner chose
    pin wte : auto := [vocab/tp, embed]
    pin layers[0].attn.wq : [embed, heads/? := (dp,tp)] override

    schedule mine = key F:(mb,0) B:(mb+P-r,-1)
    schedule literal = rows {
      row 0F0 0F1 .   0B0 0B1
      row .   1F0 1B0 1F1 1B1
    }
    schedule lowered = rows channels 2 {
      row 0F0      0SEND_F0 0RECV_B0 0B0
      row 1RECV_F0 1F0      1B0      1SEND_B0
    }
    schedule queued = streams channels pair {
      rank 0 compute 0:0F0 1:0B0
    }
    schedule file = csv "order.csv"
    memory {
      budget 1 GiB
      recompute * = auto := none override
    }
    "#);
    insta::assert_snapshot!(print(&built.freeze()), @r#"
    plan "tiny" model tiny cluster laptop
    data golden
    init random seed 1
    train batch 8 seq 64 optimizer adamw lr 0.001 betas 0.9 0.95

    model tiny = golden {
      layers 2
      capacity 1.25
      tied false
    }
    cluster laptop {
      devices 8
      link shm bandwidth 20 GB/s 2 us within node
    }

    mesh main = dp:2 > tp:4

    # what the planner chose
    pin wte : [vocab/tp, embed]
    pin layers[0].attn.wq : [embed, heads/(dp,tp)] override

    schedule mine = key F:(mb,0) B:(mb+P-r,-1)
    schedule literal = rows {
      row 0F0 0F1 .   0B0 0B1
      row .   1F0 1B0 1F1 1B1
    }
    schedule lowered = rows channels 2 {
      row 0F0      0SEND_F0 0RECV_B0 0B0
      row 1RECV_F0 1F0      1B0      1SEND_B0
    }
    schedule queued = streams channels pair {
      rank 0 compute 0:0F0 1:0B0
    }
    schedule file = csv "order.csv"
    memory {
      budget 1 GiB
      recompute * = none override
    }
    "#);
}

#[test]
fn everything_wrong_is_told() {
    let result = PlanBuilder::new("bad")
        .cluster("x")
        .with("lr", 1)
        .mesh("a b", [])
        .mesh("m", [axis("auto")])
        .pin("layers[", "[a/]")
        .apply("zero", ["1 2"])
        .pipeline("pp", |p| p.schedule("a b").cut_before([]))
        .overriding()
        .prefer("seq", ["ring"], None)
        .define_model("m", name("golden").unwrap(), |m| {
            m.and("x", 1).set("GiB", 1)
        })
        .solve(minimize("time").within(Quantity::new(1, Unit::Byte)))
        .build();
    let Err(BuildError::Invalid(diagnostics)) = result else {
        panic!("{result:?} is an error");
    };
    let messages: Vec<String> = diagnostics.into_iter().map(|d| d.message).collect();
    insta::assert_snapshot!(messages.join("\n"), @r#"
    `lr` is set before `train` or `infer`
    in `a b`: expected nothing more, found `b`
    a mesh has at least one axis
    in `auto`: expected a name, found `auto`
    a mesh has at least one axis
    in `[a/]`: expected an axis, such as `tp` or `main.tp`, found `]`
    in `layers[`: expected an index, a range such as `3..8`, or `*`, found the end of the file
    in `1 2`: expected nothing more, found `2`
    in `a b`: expected nothing more, found `b`
    `cut before` needs a selector
    `override` follows `use`, `pin`, `forbid`, `prefer`, `recompute` or `offload`
    in `seq`: of what is `seq` the property? write `*.seq` for all
    `x` needs a line before it
    plan "bad" has no model
    "#);
    let late = PlanBuilder::fragment()
        .solve(minimize("time").within(Quantity::new(1, Unit::Byte)))
        .build();
    assert!(matches!(late, Err(BuildError::Invalid(_))), "{late:?}");
}
