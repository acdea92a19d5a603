use std::collections::BTreeSet;

use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{RopeScaling, RopeTable};
use meshweave_dsl::mapping::{Mapping, Module, Offload, Pipeline, Precision, Recompute, Zero};
use proptest::prelude::*;

use super::activations::LayerSizes;
use super::*;
use crate::model::{
    Activation, AttentionBias, AttentionConfig, DecoderConfig, FfnConfig, Mla, MoeConfig, Norm,
    NormKind, Positions, Router, RouterLosses,
};
use crate::plan::estimate::workload::AttentionKernel;

const HALF: Precision = Precision {
    gradient_bytes: 2,
    ..Precision::MIXED_BF16
};

/// GPT-3's shape: heads of 128, feed-forward blocks of four widths, learned positions.
fn gpt(n_layers: usize, embed: usize, heads: usize) -> DecoderConfig {
    DecoderConfig {
        name: "gpt".into(),
        dtype: DType::Bf16,
        n_layers,
        embed,
        vocab: 51_200,
        norm: Norm {
            kind: NormKind::Layer,
            eps: 1e-5,
        },
        positions: Positions::Learned { n_positions: 2048 },
        attention: AttentionConfig {
            heads,
            kv_heads: heads,
            head: embed / heads,
            bias: AttentionBias::default(),
            qk_norm: false,
            scale: None,
            window: None,
            mla: None,
        },
        ffn: FfnConfig {
            width: 4 * embed,
            activation: Activation::GeluTanh,
            gated: false,
            bias: false,
        },
        moe: None,
        tied: true,
    }
}

fn llama(n_layers: usize) -> DecoderConfig {
    let gpt = gpt(n_layers, 4096, 32);
    DecoderConfig {
        positions: Positions::Rope(RopeTable {
            theta: 1e4,
            rotary_dim: 128,
            scaling: RopeScaling::None,
        }),
        attention: AttentionConfig {
            kv_heads: 8,
            ..gpt.attention.clone()
        },
        ffn: FfnConfig {
            width: 14_336,
            activation: Activation::Silu,
            gated: true,
            bias: false,
        },
        tied: false,
        vocab: 128_256,
        ..gpt
    }
}

fn mixtral() -> DecoderConfig {
    DecoderConfig {
        moe: Some(MoeConfig {
            n_experts: 8,
            top_k: 2,
            ffn: 14_336,
            capacity_factor: 0.0,
            subsequences: 1,
            router: Router::Softmax {
                normalize: true,
                scale: 1.0,
                groups: None,
            },
            losses: RouterLosses::default(),
            shared: None,
            dense_layers: BTreeSet::new(),
        }),
        ..llama(32)
    }
}

/// Megatron-LM's GPT of 2022: dropout, and a fused softmax between two products.
fn megatron_gpt(model: DecoderConfig, batch: usize) -> Workload {
    let mut workload = Workload::new(model, batch, 2048, Job::Train);
    workload.software.attention = AttentionKernel::FusedSoftmax;
    workload.software.framework = Framework::MEGATRON_GPT;
    workload
}

fn mapping(dp: usize) -> Mapping {
    Mapping::data_parallel(dp, 1, Precision::MIXED_BF16)
}

fn cluster(n_devices: usize) -> Cluster {
    Cluster::preset(&format!("a100-80:{n_devices}")).unwrap()
}

fn at(workload: &Workload, mapping: &Mapping, rank: usize) -> MemoryEstimate {
    memory(workload, mapping, &cluster(mapping.n_ranks()), rank)
}

#[test]
fn a_layer_keeps_what_korthikanti_et_al_count() {
    let (s, b, h, a) = (2048.0, 4.0, 12288.0, 96.0);
    let workload = megatron_gpt(gpt(96, 12288, 96), 64);
    let scores = 5.0 * a * s / h;
    let t = 8.0;
    let selective = Recompute::Modules([Module::CoreAttention].into());
    // arXiv 2205.05198, Table 2, from top to bottom.
    let cases = [
        (1, false, Recompute::None, 34.0 + scores),
        (8, false, Recompute::None, 10.0 + 24.0 / t + scores / t),
        (8, true, Recompute::None, (34.0 + scores) / t),
        (8, false, selective.clone(), 10.0 + 24.0 / t),
        (8, true, selective, 34.0 / t),
        (8, false, Recompute::Full, 2.0),
    ];
    for (tp, sequence_parallel, recompute, per_element) in cases {
        let mapping = Mapping {
            tp,
            sequence_parallel,
            micro_batch: 4,
            ..mapping(1)
        };
        let kept = LayerSizes::new(&workload, &mapping).kept(false, &recompute);
        let expected = s * b * h * per_element;
        assert!(
            (kept / expected - 1.0).abs() < 1e-9,
            "tp {tp}, sp {sequence_parallel}, {recompute:?}: {kept} against {expected}"
        );
    }
}

#[test]
fn zero_divides_what_rajbhandari_et_al_count() {
    // arXiv 1910.02054, Figure 1: 7.5 B parameters on 64 devices: 120, 31.4, 16.6 and 1.9 GB.
    let model = gpt(36, 4096, 32);
    let workload = Workload::new(model, 64, 2048, Job::Train);
    let n_parameters = workload.parameters().total();
    for (stage, expected_gb) in [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)] {
        let mapping = Mapping {
            zero: Zero { stage, group: None },
            precision: HALF,
            ..mapping(64)
        };
        let estimate = at(&workload, &mapping, 0);
        let state = [estimate.parameters, estimate.gradients, estimate.optimizer];
        let per_parameter = state.iter().map(|part| part.0).sum::<u64>() as f64 / n_parameters;
        let state_gb = per_parameter * 7.5;
        assert!(
            (state_gb - expected_gb).abs() < 0.06,
            "stage {stage}: {state_gb} GB"
        );
    }
}

#[test]
fn a_shard_group_divides_no_further() {
    let workload = Workload::new(llama(32), 64, 4096, Job::Train);
    let with = |group| Mapping {
        zero: Zero { stage: 3, group },
        ..mapping(64)
    };
    let (all, node) = (
        at(&workload, &with(None), 0),
        at(&workload, &with(Some(8)), 0),
    );
    assert_eq!(node.parameters.0 / all.parameters.0, 8);
}

#[test]
fn experts_are_divided_by_their_own_axes() {
    let workload = Workload::new(mixtral(), 64, 4096, Job::Train);
    let folded = Mapping {
        tp: 2,
        ep: 8,
        zero: Zero {
            stage: 1,
            group: None,
        },
        sequence_parallel: true,
        ..mapping(8)
    };
    let parameters = workload.parameters();
    let experts = 32.0 * 8.0 * parameters.expert / 8.0;
    let dense = (parameters.total() - 32.0 * 8.0 * parameters.expert) / 2.0;
    let estimate = at(&workload, &folded, 0);
    let near = |bytes: Bytes, expected: f64| {
        assert!(
            (bytes.0 as f64 / expected - 1.0).abs() < 1e-6,
            "{bytes:#} {expected}"
        );
    };
    near(estimate.parameters, 2.0 * (dense + experts));
    // 8 replicas of what is not an expert, 16 / 8 of an expert.
    near(estimate.optimizer, 12.0 * (dense / 8.0 + experts / 2.0));
}

#[test]
fn schedules_hold_what_their_papers_say() {
    use super::schedules::in_flight;
    assert_eq!(in_flight("gpipe", 4, 1, 2, 16), 16.0);
    let peaks: Vec<f64> = (0..4)
        .map(|rank| in_flight("1f1b", 4, 1, rank, 16))
        .collect();
    assert_eq!(peaks, [4.0, 3.0, 2.0, 1.0]);
    // [2 (P − 1) + (v − 1) P + 1] / v chunks of P = 4, v = 2.
    assert_eq!(in_flight("interleaved", 4, 2, 0, 16), 5.5);
    assert_eq!(in_flight("zb-h1", 4, 1, 3, 16), 4.0);
    assert_eq!(in_flight("zb-h2", 4, 1, 0, 16), 7.0);
    assert_eq!(in_flight("v-half", 8, 2, 0, 32), 5.0);
    assert_eq!(in_flight("v-min", 8, 2, 0, 32), 4.0);
    assert_eq!(in_flight("dualpipe", 16, 1, 0, 64), 17.0);
    assert_eq!(in_flight("1f1b", 8, 1, 0, 2), 2.0);
    assert_eq!(in_flight("1f1b", 1, 1, 0, 64), 1.0);
}

/// What [`runs_of_backward`](super::schedules::runs_of_backward) says, counted in the schedules themselves.
#[test]
fn ranks_turn_between_stages_as_often_as_said() {
    use super::schedules::{runs_of_backward, stages_of_rank};
    use crate::schedule::{Builtin, Placement, Shape, build};
    use meshweave_dsl::schedule::ActionKind;

    let mut n_checked = 0;
    for family in Builtin::families() {
        for (pp, n_microbatches) in [(2, 4), (4, 8), (4, 10), (4, 16), (8, 32)] {
            for chunks in family.fixed_chunks().map_or(vec![1, 2, 4], |n| vec![n]) {
                let shape = Shape::new(pp, n_microbatches).chunks(chunks);
                let Ok(schedule) = build(family, &shape, None) else {
                    continue;
                };
                let said = runs_of_backward(family.name(), pp, chunks, n_microbatches);
                for (rank, row) in schedule.rows.iter().enumerate() {
                    let n_stages = schedule.stages_of(rank).count();
                    assert_eq!(n_stages, stages_of_rank(family.name(), chunks));
                    let makes_gradients = row
                        .iter()
                        .filter(|action| matches!(action.kind, ActionKind::B | ActionKind::W));
                    let mut stages: Vec<u32> = makes_gradients.map(|action| action.stage).collect();
                    stages.dedup();
                    let case = format!("{} of {pp} × {n_microbatches} × {chunks}", family.name());
                    match family.placement() {
                        Placement::Loop => assert_eq!(stages.len(), n_stages * said, "{case}"),
                        _ => assert!(stages.len() <= n_stages * said, "{case}"),
                    }
                    n_checked += 1;
                }
            }
        }
    }
    assert!(n_checked > 200);
}

#[test]
fn latent_attention_caches_one_latent_a_token() {
    // DeepSeek-V3: 576 elements a token and layer, against 2 · 8 · 128 of Llama 3 8B.
    let mut model = llama(61);
    model.attention.heads = 128;
    model.attention.kv_heads = 128;
    model.attention.head = 192;
    model.attention.mla = Some(Mla {
        q_rank: Some(1536),
        kv_rank: 512,
        nope: 128,
        rope: 64,
        value: 128,
        eps: 1e-6,
    });
    let decode = |model, batch| Workload::new(model, batch, 1, Job::Decode { context: 4095 });
    let latent = at(&decode(model, 16), &mapping(1), 0);
    assert_eq!(latent.cache.0, 16 * 4096 * 61 * 576 * 2);
    let grouped = at(&decode(llama(32), 16), &mapping(1), 0);
    assert_eq!(grouped.cache.0, 16 * 4096 * 32 * 2 * 8 * 128 * 2);
    // More ranks than key heads: each holds one.
    let wide = Mapping {
        tp: 16,
        ..mapping(1)
    };
    let divided = at(&decode(llama(32), 16), &wide, 0);
    assert_eq!(divided.cache.0, grouped.cache.0 / 8);
    assert_eq!(grouped.activations, Bytes(0));
}

#[test]
fn offloading_the_optimizer_leaves_parameters_and_gradients() {
    let workload = Workload::new(llama(32), 64, 4096, Job::Train);
    let mapping = Mapping {
        offload: Offload {
            optimizer: true,
            activations: 0.0,
        },
        ..mapping(8)
    };
    let estimate = at(&workload, &mapping, 0);
    assert_eq!(estimate.optimizer, Bytes(0));
    assert!(estimate.gradients > estimate.parameters);
}

#[test]
fn risk_falls_with_room() {
    let reserved = Bytes(70_000_000_000);
    let estimate = MemoryEstimate {
        activations: reserved,
        ..MemoryEstimate::default()
    };
    let mut device = cluster(1).device;
    let mut risks = Vec::new();
    for room_gb in [40, 60, 70, 80, 100, 140] {
        device.memory_bytes = room_gb * 1_000_000_000;
        risks.push(estimate.risk(&device));
    }
    assert!(
        risks.is_sorted_by(|before, after| before >= after),
        "{risks:?}"
    );
    assert_eq!((risks[0], risks[5]), (1.0, 0.0));
    assert!((0.4..0.75).contains(&risks[2]), "{risks:?}");
}

prop_compose! {
    fn any_mapping()(
        tp in 1usize..=3, dp in 0usize..=4, pp in 0usize..=2, micro_batch in 1usize..=4,
        sequence_parallel: bool, stage in 0u8..=3, schedule in 0usize..4,
    ) -> Mapping {
        Mapping {
            tp: 1 << tp,
            pp: 1 << pp,
            sequence_parallel,
            micro_batch,
            zero: Zero { stage, group: None },
            pipeline: Pipeline {
                schedule: ["1f1b", "gpipe", "zb-h1", "v-half"][schedule].into(),
                chunks: 1,
                layers: None,
            },
            ..mapping(1 << dp)
        }
    }
}

proptest! {
    #[test]
    fn more_zero_never_needs_more(mapping in any_mapping(), is_moe: bool) {
        let model = if is_moe { mixtral() } else { llama(64) };
        let workload = Workload::new(model, 1024, 2048, Job::Train);
        for rank in 0..mapping.pp {
            let totals: Vec<u64> = (0..=3)
                .map(|stage| {
                    let zero = Zero { stage, group: None };
                    at(&workload, &Mapping { zero, ..mapping.clone() }, rank).total().0
                })
                .collect();
            prop_assert!(totals.is_sorted_by(|less, more| less >= more), "{totals:?}");
        }
    }

    #[test]
    fn recomputing_more_never_needs_more(mapping in any_mapping(), is_moe: bool) {
        let model = if is_moe { mixtral() } else { llama(64) };
        let workload = Workload::new(model, 1024, 2048, Job::Train);
        let norm: BTreeSet<Module> = [Module::Norm].into();
        let both: BTreeSet<Module> = [Module::Norm, Module::Mlp, Module::Moe].into();
        let choices = [
            Recompute::None,
            Recompute::Modules(norm),
            Recompute::Modules(both),
            Recompute::Full,
        ];
        let totals: Vec<u64> = choices
            .into_iter()
            .map(|recompute| at(&workload, &Mapping { recompute, ..mapping.clone() }, 0).total().0)
            .collect();
        prop_assert!(totals.is_sorted_by(|less, more| less >= more), "{totals:?}");
    }

    #[test]
    fn more_tensor_parallelism_never_needs_more(mapping in any_mapping()) {
        let workload = Workload::new(llama(64), 1024, 2048, Job::Train);
        let twice = Mapping { tp: 2 * mapping.tp, ..mapping.clone() };
        for rank in 0..mapping.pp {
            let (less, more) = (at(&workload, &mapping, rank), at(&workload, &twice, rank));
            prop_assert!(more.total() <= less.total(), "{less:?} {more:?}");
        }
    }

    #[test]
    fn waiting_for_all_forward_passes_needs_most(mapping in any_mapping()) {
        let workload = Workload::new(llama(64), 1024, 2048, Job::Train);
        let with = |schedule: &str| {
            let mut mapping = mapping.clone();
            mapping.pipeline.schedule = schedule.into();
            at(&workload, &mapping, 0).total()
        };
        prop_assert!(with("1f1b") <= with("zb-h1"));
        prop_assert!(with("zb-h1") <= with("gpipe"));
    }
}
