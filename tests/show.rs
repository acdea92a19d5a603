//! The report of a real plan: a golden model, partitioned and lowered.

use crate::support::plans;
use meshweave_compiler::codegen::fuse::Platform;
use meshweave_compiler::differentiate::{Optimizer, differentiate};
use meshweave_compiler::lower::lower;
use meshweave_compiler::model::{DecoderConfig, Goal, GoldenSize, build_decoder};
use meshweave_compiler::partition::{Keep, partition};
use meshweave_compiler::show::{Folding, ReportInput, dot, report};
use meshweave_compiler::simplify::{Options, simplify, simplify_ranks};
use meshweave_dsl::cluster::{Cluster, Host};
use meshweave_dsl::layout::Mesh;

fn planned(size: &GoldenSize, capacity_factor: Option<f64>) -> ReportInput {
    let config = DecoderConfig::golden(size, capacity_factor);
    let forward = build_decoder(&config, size.batch, size.seq, Goal::Training).unwrap();
    let graph = differentiate(&forward, &Optimizer::GOLDEN_ADAMW).unwrap();
    let graph = simplify(&graph, &Options::default()).unwrap();
    let mesh = Mesh::new([("dp", 2), ("tp", 4)]);
    let preferences: [(&str, &[&str]); 2] = [
        ("dp", &["batch"]),
        ("tp", &["expert", "heads", "ffn", "vocab"]),
    ];
    let plan = plans::preferring(&graph, &mesh, &preferences);
    let cluster = Cluster::local(8, &Host::nominal());
    let mut parts = partition(&graph, &plan, Keep::Outputs, &cluster).unwrap();
    parts.locals = simplify_ranks(&parts.locals, &Options::default())
        .unwrap()
        .0;
    let lowered = lower(&graph, &plan, &parts, &cluster, Platform::Host).unwrap();
    ReportInput {
        title: "golden".into(),
        graph: Some(graph),
        plan: Some(plan),
        local: parts.locals.into_iter().next(),
        program: Some(lowered.program),
        ..ReportInput::default()
    }
}

#[test]
fn report_of_a_plan_folds_layers_and_shows_collectives() {
    let size = GoldenSize {
        n_layers: 6,
        ..GoldenSize::named("tiny").unwrap()
    };
    for capacity_factor in [None, Some(2.0)] {
        let input = planned(&size, capacity_factor);
        let html = report(&input);
        if let Ok(path) = std::env::var("MESHWEAVE_SAMPLE") {
            let name = if capacity_factor.is_some() {
                "moe"
            } else {
                "dense"
            };
            std::fs::write(format!("{path}.{name}.html"), &html).unwrap();
        }
        for expected in [
            "layers[0–5]</code> <span class=\"times\">×6</span>",
            "all_reduce",
            "<h3>Forward</h3>",
            "<h3>Backward</h3>",
            "<h3>Update</h3>",
            "[batch<b>/dp</b>, seq, embed]",
            "<b class=\"partial\">+sum(tp)</b>",
        ] {
            assert!(html.contains(expected), "{expected} is not in the page");
        }
        let n_blocks = html.matches("<details class=\"block\"").count();
        assert!(n_blocks < 16, "{n_blocks} blocks: layers do not fold");
        assert!(html.len() < 2 << 20, "{} bytes", html.len());
        let folded = dot(input.local.as_ref().unwrap(), Folding::Layers);
        assert!(folded.contains("×6"), "{folded}");
    }
}
