//! Documents with pipelines: nested in meshes, placed, left open, searched for, written out.

use super::*;

/// A step of the golden model on virtual devices.
fn golden_document(n_devices: usize, mesh: &str, block: &str, apply: &str) -> String {
    format!(
        "plan \"golden\" model tiny cluster \"local:{n_devices}\"\n\
         train batch 8 seq 64 steps 1 optimizer adamw\n\
         data golden\ninit golden\nmodel tiny = golden {{\n  size tiny\n}}\nmesh main = {mesh}\n\
         pipeline main.pp {{\n{block}\n}}\n{apply}\n"
    )
}

fn open(text: &str) -> Result<meshweave::session::Session, Error> {
    let base = std::path::Path::new(".");
    meshweave::session::Session::from_text("golden.weave", text, base, None)
}

/// Runs a step as the planner divides it.
fn first_loss(case: &Case, session: &meshweave::session::Session) -> Result<f64, Error> {
    let model = session.model()?;
    let solution = session.plan(&model)?;
    let compiled = session.compile(&model, &solution.plan, &CompileOptions::default())?;
    let kernels = artifact::load_kernels(&compiled.program, &compiled.kernels).unwrap();
    let mut execution =
        Session::new(compiled.program, kernels, &SessionOptions::default()).unwrap();
    case.give(&mut execution);
    execution.step().unwrap();
    Ok(execution.loss().unwrap())
}

/// Any schedule in any nesting of the mesh, with ZeRO, tensor and sequence parallelism within the
/// stages, as the planner divides them.
#[test]
fn documents_nest_schedules_in_every_mesh() {
    let case = Case::new(2, 8, false);
    let mut failures = Vec::new();
    let all: Vec<Builtin> = executable().collect();
    let mut schedules = all.into_iter().cycle();
    for (n_devices, mesh, apply) in [
        (4, "pp:2 > dp:2", "apply dp(dp)"),
        (4, "dp:2 > pp:2", "apply dp(dp)"),
        (4, "pp:2 > tp:2", "apply megatron(tp)"),
        (4, "tp:2 > pp:2", "apply megatron(tp)"),
        (4, "pp:2 > tp:2", "apply megatron(tp)\napply sp(tp)"),
        (4, "pp:2 > dp:2", "apply zero(1, dp)"),
        (4, "pp:2 > dp:2", "apply zero(2, dp)"),
        (4, "dp:2 > pp:2", "apply zero(3, dp)"),
        (
            8,
            "dp:2 > pp:2 > tp:2",
            "apply zero(1, dp)\napply megatron(tp)",
        ),
    ] {
        let mut names: Vec<&str> = (0..2)
            .filter_map(|_| schedules.next())
            .map(Builtin::name)
            .collect();
        // What failed once: its input gradients pass with partial sums.
        if !names.contains(&"zb-v") {
            names.push("zb-v");
        }
        for name in names {
            let builtin = Builtin::find(name).unwrap();
            let slices = if builtin.is_sliced() {
                "\n  slices 2"
            } else {
                ""
            };
            let block = format!("  schedule {name}\n  microbatches 4{slices}");
            let text = golden_document(n_devices, mesh, &block, apply);
            match open(&text).and_then(|session| first_loss(&case, &session)) {
                Ok(loss) if (loss - case.truth.loss()).abs() < TOLERANCE * loss => {}
                Ok(loss) => failures.push(format!("{name} on {mesh}, {apply}: loss {loss}")),
                Err(error) => failures.push(format!("{name} on {mesh}, {apply}: {error}")),
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Stages on ranks of one's choice, and stages without work where that is asked for.
#[test]
fn stages_lie_where_they_are_put() {
    let case = Case::new(2, 8, false);
    let keys = "schedule mine = key F:(0,mb,s) B:(1,mb,-s)\napply dp(dp)";
    let empty = "  cut before layers[1], layers[1], final\n  schedule interleaved\n  chunks 2\n  microbatches 4";
    for (block, apply, stage_rank) in [
        (
            "  schedule zb-h1\n  ranks (1,0)\n  microbatches 4",
            "apply dp(dp)",
            vec![1, 0],
        ),
        (
            "  schedule mine\n  ranks (0,1,1,0)\n  microbatches 4",
            keys,
            vec![0, 1, 1, 0],
        ),
        (
            &format!("{empty}\n  empty stages"),
            "apply dp(dp)",
            vec![0, 1, 0, 1],
        ),
    ] {
        let session = open(&golden_document(4, "pp:2 > dp:2", block, apply)).unwrap();
        let schedule = &session.request.pipeline.as_ref().unwrap().schedule;
        assert_eq!(schedule.stage_rank, stage_rank);
        let loss = first_loss(&case, &session).unwrap();
        assert!(
            (loss - case.truth.loss()).abs() < TOLERANCE * loss,
            "{block}: {loss}"
        );
    }
    let refused = open(&golden_document(4, "pp:2 > dp:2", empty, "apply dp(dp)"));
    let error = refused
        .and_then(|session| session.model())
        .map(|_| ())
        .unwrap_err();
    let message = &error.diagnostics[0].message;
    assert!(message.contains("add `empty stages`"), "{message}");
    let block = "  schedule zb-v\n  ranks (0,1,0,1)\n  microbatches 4";
    let error = open(&golden_document(4, "pp:2 > dp:2", block, ""))
        .map(|_| ())
        .unwrap_err();
    let message = &error.diagnostics[0].message;
    assert!(message.contains("stages 1 and 2 on one rank"), "{message}");
}

/// What the search finds for uneven stages runs as any schedule does.
#[test]
fn searched_schedules_run() {
    let case = Case::new(2, 8, false);
    let stages = [(Placement::Loop, 1), (Placement::V, 2)].map(|(placement, n_chunks)| {
        let mut costs = Costs::even(2, 2 * n_chunks, 1.0, 1.4, 0.8);
        costs.stages[0].forward_s *= 0.6;
        Stages {
            placement,
            n_chunks,
            costs,
        }
    });
    let options = SearchOptions {
        memory_limit_bytes: Some(2.0),
        max_actions: 100_000,
        ..SearchOptions::new(2, 8)
    };
    let found = search(&stages, &options).unwrap();
    assert_eq!(
        case.check(&found.schedule, &[("pp", 2)]),
        Vec::<String>::new()
    );
}

/// What a document leaves open of its pipeline is chosen, run, and written into it.
#[test]
fn open_pipelines_are_chosen_and_run() {
    let document = |mesh: &str, block: &str| golden_document(4, mesh, block, "apply dp(dp)");
    let case = Case::new(2, 8, false);
    for (mesh, block) in [
        (
            "pp:auto > dp:rest",
            "  chunks auto\n  schedule auto\n  microbatches auto",
        ),
        (
            "pp:2 > dp:2",
            "  schedule auto{gpipe, zb-v, dualpipe}\n  microbatches auto{2, 4}",
        ),
    ] {
        let session = open(&document(mesh, block)).unwrap();
        let choice = session.choice.as_ref().unwrap();
        let step_s = |idx: usize| choice.planned_s[idx].unwrap();
        let best = step_s(choice.chosen);
        assert!(
            choice
                .planned_s
                .iter()
                .flatten()
                .all(|other| best <= *other)
        );
        let model = session.model().unwrap();
        let solution = session.plan(&model).unwrap();
        let (program, _) = session.outline(&model, &solution.plan).unwrap();
        let again_s = meshweave::report::predicted_timeline(&program).step_s();
        assert_eq!(
            again_s, best,
            "the plan that was compared is the one that runs"
        );
        let loss = first_loss(&case, &session).unwrap();
        assert!(
            (loss - case.truth.loss()).abs() < TOLERANCE * loss,
            "{loss}"
        );
        // The plan's text leaves nothing open and gives the same program.
        let text = session.plan_text(&model, &solution);
        assert!(
            text.contains("microbatches auto") && text.contains(":= "),
            "{text}"
        );
        let replayed = open(&text).unwrap();
        assert!(replayed.choice.is_none());
        assert_eq!(
            replayed.request.pipeline.as_ref().unwrap().schedule,
            session.request.pipeline.as_ref().unwrap().schedule
        );
    }
    let refused = open(&document("pp:4", "  schedule zb-v\n  microbatches auto{3}"));
    assert!(refused.is_err());
}

/// What the search finds for a document's own stages is written into the plan, and runs.
#[test]
fn documents_ask_for_a_search() {
    let case = Case::new(2, 8, false);
    for (mesh, block) in [
        ("pp:2 > dp:2", "  schedule search\n  microbatches 4"),
        (
            "pp:2 > dp:2",
            "  chunks 2\n  schedule auto{interleaved, search}\n  microbatches 4",
        ),
        (
            "pp:2 > dp:2",
            "  schedule search\n  ranks (0,1,1,0)\n  microbatches 4",
        ),
    ] {
        let session = open(&golden_document(4, mesh, block, "apply dp(dp)")).unwrap();
        let choice = session.choice.as_ref().unwrap();
        let simulated = |name: &str| {
            let mut all = choice.candidates.iter();
            all.find(|one| one.candidate.name == name)?.simulated_s
        };
        let searched_s = simulated("search").unwrap();
        assert!(simulated("interleaved").is_none_or(|other_s| searched_s <= other_s));
        let loss = first_loss(&case, &session).unwrap();
        assert!(
            (loss - case.truth.loss()).abs() < TOLERANCE * loss,
            "{loss}"
        );
        let model = session.model().unwrap();
        let solution = session.plan(&model).unwrap();
        let text = session.plan_text(&model, &solution);
        if choice.candidates[choice.chosen].found.is_some() {
            assert!(text.contains("schedule search = rows {"), "{text}");
        }
        let replayed = open(&text).unwrap();
        assert!(replayed.choice.is_none());
        let schedule = |session: &meshweave::session::Session| {
            session.request.pipeline.as_ref().unwrap().schedule.clone()
        };
        assert_eq!(schedule(&replayed).rows, schedule(&session).rows);
    }
    // Without a plan there is nothing to search for; the message says so.
    let text = golden_document(4, "pp:2 > dp:2", "  schedule serch\n  microbatches 4", "");
    let error = open(&text).map(|_| ()).unwrap_err();
    let help = format!("{:?}", error.diagnostics[0]);
    assert!(help.contains("search"), "{help}");
}

/// Candidates that cannot be compiled, and those that do not fit, say why.
#[test]
fn candidates_say_why_they_are_out() {
    let apply =
        "apply dp(dp)\nschedule two = rows {\n  row 0F0 0F1 0B0 0B1\n  row 1F0 1B0 1F1 1B1\n}";
    let block = "  schedule auto{1f1b, two}\n  microbatches 4";
    let session = open(&golden_document(4, "pp:2 > dp:2", block, apply)).unwrap();
    let text = session.choice.as_ref().unwrap().text();
    let line = text.lines().find(|line| line.contains("two over")).unwrap();
    assert!(
        line.contains("out: ") && line.contains("2 microbatches"),
        "{text}"
    );
}

/// Rows with communication and memory actions: activations leave for the host and come back, and the
/// step stays what it is.
#[test]
fn documents_say_what_rests_on_the_host() {
    let case = Case::new(2, 8, false);
    let schedule = built_in(Builtin::GPipe, 2, 4);
    let lowering = Lowering {
        offloaded_stages: vec![0, 1],
        reduce_gradients: true,
        update: true,
        ..Lowering::default()
    };
    let lowered = lower(&schedule, &lowering).unwrap();
    let name = meshweave_dsl::weave::ast::Name::new("mine").unwrap();
    let body =
        meshweave_dsl::weave::ast::Block::of([meshweave_dsl::weave::ast::Statement::Schedule(
            lowered.to_statement(name),
        )]);
    let rows = meshweave_dsl::weave::print(&meshweave_dsl::weave::Document { body });
    let text = |name: &str| {
        let block = format!("  schedule {name}\n  microbatches 4");
        golden_document(4, "pp:2 > dp:2", &block, &format!("apply dp(dp)\n{rows}"))
    };
    let session = open(&text("mine")).unwrap();
    let loss = first_loss(&case, &session).unwrap();
    assert!(
        (loss - case.truth.loss()).abs() < TOLERANCE * loss,
        "{loss}"
    );
    let broken = text("mine").replacen(" 0PREFETCH1", "", 1);
    let error = open(&broken).map(|_| ()).unwrap_err();
    let message = &error.diagnostics[0].message;
    assert!(message.contains("`0OFFLOAD1` on rank 0"), "{message}");
    let moved = text("mine").replacen("microbatches 4", "microbatches 4\n  ranks (1,0)", 1);
    let error = open(&moved).map(|_| ()).unwrap_err();
    let message = &error.diagnostics[0].message;
    assert!(message.contains("messages in place"), "{message}");
}

/// Slices beside sequence parallelism: the parts of a sequence are divided once more.
#[test]
fn slices_are_divided_again() {
    let case = Case::new(2, 8, false);
    let apply = "apply megatron(tp)\napply sp(tp)";
    for name in ["terapipe", "seq1f1b"] {
        let block = format!("  schedule {name}\n  slices 4\n  microbatches 4");
        let text = golden_document(4, "pp:2 > tp:2", &block, apply);
        let loss = first_loss(&case, &open(&text).unwrap()).unwrap();
        assert!(
            (loss - case.truth.loss()).abs() < TOLERANCE * loss,
            "{name}: {loss}"
        );
    }
}
