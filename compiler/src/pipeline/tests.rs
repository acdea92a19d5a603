use meshweave_dsl::cluster::Host;
use meshweave_dsl::layout::Mesh;
use meshweave_dsl::pipeline::Phase;
use meshweave_dsl::program::Program;
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
    let stages = cut_before(&forward, &paths(&["layers[1]", "final"]), Empty::Refused).unwrap();
    for (op, stage) in forward.ops.iter().zip(&stages) {
        let name = forward.op_name(op);
        let expected = match name {
            _ if name.starts_with("layers[1]") => 1,
            _ if name.starts_with("final") || name.starts_with("loss") => 2,
            _ => 0,
        };
        assert_eq!(*stage, expected, "{name}");
    }
    let refusal = |list: &[&str]| {
        cut_before(&forward, &paths(list), Empty::Refused)
            .unwrap_err()
            .to_string()
    };
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
fn parts_of_tied_weights_are_added_in_the_update_of_their_home() {
    let forward = forward(true, 2);
    let stages = cut_evenly(&forward, 2, &cluster(2)).unwrap();
    let (graph, origins) = differentiate_traced(&forward, &Optimizer::GOLDEN_ADAMW).unwrap();
    let parts = assign(&graph, &origins, &stages, &[]).unwrap();
    let part_of = |name: &str| {
        let op = graph.ops.iter().position(|op| graph.op_name(op) == name);
        parts[op.unwrap()]
    };
    let home = meshweave_dsl::pipeline::OpPart {
        stage: 0,
        phase: Phase::Update,
        slice: 0,
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
        parts: assign(&graph, &origins, &stages, &[])?,
        schedule: schedule.clone(),
        lowered: None,
    };
    let plan = Plan::replicated("stage", &graph, pipeline.stage_mesh());
    let lowered = lower_pipeline(
        &graph,
        &plan,
        &pipeline,
        Keep::Outputs,
        &cluster,
        Platform::Host,
    )?;
    Ok(lowered.program)
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
