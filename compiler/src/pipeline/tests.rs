use std::collections::{BTreeMap, VecDeque};

use meshweave_dsl::cluster::Host;
use meshweave_dsl::graph::Role;
use meshweave_dsl::layout::Mesh;
use meshweave_dsl::pipeline::Phase;
use meshweave_dsl::program::{Action, Program};
use meshweave_dsl::schedule::Schedule;

use super::*;
use crate::differentiate::{Optimizer, differentiate_traced};
use crate::model::{DecoderConfig, Goal, GoldenSize, build_decoder};
use crate::schedule::{Builtin, Shape, build};

fn forward(tied: bool, batch: usize) -> Graph {
    let size = GoldenSize::named("tiny").unwrap();
    let mut config = DecoderConfig::golden(&size, None);
    config.tied = tied;
    build_decoder(&config, batch, size.seq, Goal::Training).unwrap()
}

fn cluster(n_devices: usize) -> Cluster {
    Cluster::local(n_devices, &Host::nominal())
}

#[test]
fn cuts_stand_before_blocks() {
    let forward = forward(false, 1);
    let paths = |paths: &[&str]| {
        paths
            .iter()
            .map(|path| (*path).to_string())
            .collect::<Vec<_>>()
    };
    let stages = cut_before(&forward, &paths(&["layers[1]", "final"])).unwrap();
    for (op, stage) in forward.ops.iter().zip(&stages) {
        let name = forward.op_name(op);
        let expected = match name {
            _ if name.starts_with("layers[1]") => 1,
            _ if name.starts_with("final") || name.starts_with("loss") => 2,
            _ => 0,
        };
        assert_eq!(*stage, expected, "{name}");
    }
    let refusal = |list: &[&str]| cut_before(&forward, &paths(list)).unwrap_err().to_string();
    let unknown = refusal(&["layers[2]"]);
    assert!(
        unknown.starts_with("cannot cut before `layers[2]`: no op"),
        "{unknown}"
    );
    for list in [&["final", "layers[1]"][..], &["embed"], &["final", "final"]] {
        let empty = refusal(list);
        assert!(empty.contains("leaves a stage without ops"), "{empty}");
    }
}

#[test]
fn even_cuts_balance_seconds() {
    let forward = forward(false, 8);
    let cluster = cluster(4);
    let op_s = |op: &meshweave_dsl::graph::Op| {
        let types = |ids: &[TensorId]| ids.iter().map(|id| forward.ty(*id)).collect::<Vec<_>>();
        crate::plan::cost::op_seconds(&op.kind, &types(&op.inputs), &types(&op.results), &cluster)
    };
    let whole_s: f64 = forward.ops.iter().map(op_s).sum();
    for n_stages in [1, 2, 3, 8] {
        let stages = cut_evenly(&forward, n_stages, &cluster).unwrap();
        assert!(stages.is_sorted());
        assert!((0..n_stages).all(|stage| stages.contains(&stage)));
        let mut stage_s = vec![0.0; n_stages];
        for (op, stage) in forward.ops.iter().zip(&stages) {
            stage_s[*stage] += op_s(op);
        }
        let dearest = stage_s.iter().copied().fold(0.0, f64::max);
        // The logits are one op of a quarter of the time.
        assert!(
            dearest < whole_s / n_stages as f64 + 0.3 * whole_s,
            "{stage_s:?}"
        );
    }
    let n_ops = forward.ops.len();
    let error = cut_evenly(&forward, n_ops + 1, &cluster).unwrap_err();
    assert!(matches!(error, PipelineError::Invalid(_)), "{error}");
}

#[test]
fn parts_of_tied_weights_are_added_in_the_update_of_their_home() {
    let forward = forward(true, 2);
    let stages = cut_evenly(&forward, 2, &cluster(2)).unwrap();
    let (graph, origins) = differentiate_traced(&forward, &Optimizer::GOLDEN_ADAMW).unwrap();
    let parts = assign(&graph, &origins, &stages).unwrap();
    let part_of = |name: &str| {
        let op = graph.ops.iter().position(|op| graph.op_name(op) == name);
        parts[op.unwrap()]
    };
    let home = meshweave_dsl::pipeline::OpPart {
        stage: 0,
        phase: Phase::Update,
    };
    assert_eq!(part_of("grad.embed.wte"), home);
    assert_eq!(part_of("embed.wte.next"), home);
    // The norm's op gives both gradients at once, and the stage before waits for one of them.
    assert_eq!(part_of("final.input").phase, Phase::Forward);
    assert_eq!(part_of("final.input").stage, 1);
    for (op, part) in graph.ops.iter().zip(&parts) {
        if graph.updates.values().any(|next| op.results.contains(next)) {
            assert_eq!(part.phase, Phase::Update);
        }
    }
}

fn program(schedule: &Schedule, tied: bool, mesh: Mesh) -> Result<Program> {
    let cluster = cluster(mesh.n_ranks());
    let forward = scale_loss(&forward(tied, 2), schedule.n_microbatches)?;
    let stages = cut_evenly(&forward, schedule.n_stages, &cluster)?;
    let (graph, origins) = differentiate_traced(&forward, &Optimizer::GOLDEN_ADAMW).unwrap();
    let pipeline = PipelinePlan {
        mesh,
        axis: "pp".into(),
        batch: "batch".into(),
        parts: assign(&graph, &origins, &stages)?,
        schedule: schedule.clone(),
    };
    let plan = Plan::replicated("stage", &graph, pipeline.stage_mesh());
    let lowered = lower_pipeline(&graph, &plan, &pipeline, Keep::Outputs, &cluster)?;
    Ok(lowered.program)
}

/// Every channel gives its messages in the order in which it got them, by tensor and bytes.
#[test]
fn messages_are_received_in_the_order_of_their_senders() {
    for builtin in [
        Builtin::Interleaved,
        Builtin::ZbV,
        Builtin::DualPipe,
        Builtin::Chimera,
    ] {
        let shape = builtin.fit(Shape::new(2, 4).chunks(2));
        let schedule = build(builtin, &shape, None).unwrap();
        let program = program(&schedule, true, Mesh::new([("pp", 2), ("dp", 2)])).unwrap();
        let mut channels: BTreeMap<(usize, usize), VecDeque<(String, usize)>> = BTreeMap::new();
        let plain = |name: &str| {
            let name = name
                .strip_suffix(".send")
                .or(name.strip_suffix(".recv"))
                .unwrap();
            let name = name.split_once(':').map_or(name, |(_, rest)| rest);
            let name = name.strip_prefix("summed.").unwrap_or(name);
            name.split('@')
                .next()
                .unwrap()
                .trim_end_matches(".sum")
                .to_string()
        };
        for (rank, of_rank) in program.ranks.iter().enumerate() {
            for instruction in &of_rank.instructions {
                if let Action::Send { to, src } = &instruction.action {
                    let n_bytes = of_rank.buffers[src.index()].ty.n_bytes();
                    let message = (plain(&instruction.name), n_bytes);
                    channels.entry((rank, *to)).or_default().push_back(message);
                }
            }
        }
        assert!(!channels.is_empty());
        for (rank, of_rank) in program.ranks.iter().enumerate() {
            for instruction in &of_rank.instructions {
                if let Action::Recv { from, dst } = &instruction.action {
                    let n_bytes = of_rank.buffers[dst.index()].ty.n_bytes();
                    let sent = channels.get_mut(&(*from, rank)).unwrap().pop_front();
                    assert_eq!(sent, Some((plain(&instruction.name), n_bytes)));
                }
            }
        }
        assert!(channels.values().all(VecDeque::is_empty), "{channels:?}");
    }
}

#[test]
fn a_microbatch_more_costs_what_the_schedule_holds() {
    let peak = |builtin: Builtin, n_microbatches| {
        let schedule = build(builtin, &Shape::new(2, n_microbatches), None).unwrap();
        let program = program(&schedule, false, Mesh::new([("pp", 2)])).unwrap();
        let inputs: usize = program
            .sources
            .iter()
            .filter(|source| source.role == Role::Input)
            .map(|source| source.ty.n_bytes())
            .sum();
        (program.ranks[0].arena_bytes, inputs)
    };
    let ((one_4, few), (one_8, many)) = (peak(Builtin::OneFOneB, 4), peak(Builtin::OneFOneB, 8));
    // More microbatches are more inputs, and (but for how the arena packs) nothing else.
    assert!(
        one_8.saturating_sub(one_4) <= many - few + one_4 / 20,
        "{one_4} {one_8}"
    );
    let (gpipe_8, _) = peak(Builtin::GPipe, 8);
    assert!(2 * gpipe_8 > 3 * one_8, "{gpipe_8} {one_8}");
}

#[test]
fn schedules_that_cannot_run_are_refused() {
    let mesh = || Mesh::new([("pp", 2)]);
    let mut schedule = build(Builtin::OneFOneB, &Shape::new(2, 2), None).unwrap();
    schedule.rows[0].reverse();
    let refusal = program(&schedule, false, mesh()).unwrap_err();
    assert!(matches!(refusal, PipelineError::Invalid(_)), "{refusal}");
    // The grid shows who waits for whom.
    assert!(refusal.to_string().contains("rank 1"), "{refusal}");
    let schedule = build(Builtin::PipeDream, &Shape::new(2, 2), None).unwrap();
    let refusal = program(&schedule, false, mesh()).unwrap_err();
    insta::assert_snapshot!(refusal, @"schedule `pipedream` updates weights after every microbatch, which is not executed with adamw, which counts steps: choose sgd, or 1f1b");
    let schedule = build(Builtin::OneFOneB, &Shape::new(4, 2), None).unwrap();
    let refusal = program(&schedule, false, mesh()).unwrap_err();
    insta::assert_snapshot!(refusal, @"schedule `1f1b` is for 4 ranks, mesh axis `pp` has 2");
}
