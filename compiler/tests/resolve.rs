//! What documents ask for: `tests/cases/resolve`, good ones and those that a tired user would write.

// Helpers of tests may fail as tests do.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use meshweave_compiler::differentiate::differentiate;
use meshweave_compiler::model::build_decoder;
use meshweave_compiler::plan::Solution;
use meshweave_compiler::plan::directives::{Demand, DimPattern, Directives, Pattern, Subject};
use meshweave_compiler::resolve::{
    Init, Job, ModelSource, Request, cluster_of_text, direct, print_cluster, print_plan, resolve,
};
use meshweave_dsl::cluster::{Cluster, Host};
use meshweave_dsl::diagnostics::{
    Diagnostic, RenderOptions, SourceId, Sources, has_errors, render_all,
};
use meshweave_dsl::graph::{Graph, Role};
use meshweave_dsl::layout::{Layout, Mesh};
use meshweave_dsl::plan::{Certificate, MemoryParts, Plan, TimeParts, op_factors};
use meshweave_dsl::weave::{Document, parse, print};

/// The graph that a request plans, when its model stands in the document.
fn graph_of(request: &Request) -> Option<Graph> {
    let ModelSource::Decoder(config) = &request.model else {
        return None;
    };
    let (batch, seq) = request.job.sizes();
    let forward = build_decoder(config, batch, seq, request.goal()).unwrap();
    Some(match &request.job {
        Job::Train { optimizer, .. } => differentiate(&forward, optimizer).unwrap(),
        Job::Infer { .. } => forward,
    })
}

struct Resolved {
    document: Document,
    request: Option<Request>,
    graph: Option<Graph>,
    directives: Option<Directives>,
    diagnostics: Vec<Diagnostic>,
    sources: Sources,
}

fn resolve_all(name: &str, text: &str, base_dir: &Path) -> Resolved {
    let mut sources = Sources::new();
    let source = sources.add(name, text);
    let parsed = parse(text, source);
    let mut resolved = Resolved {
        document: parsed.document,
        request: None,
        graph: None,
        directives: None,
        diagnostics: parsed.diagnostics,
        sources,
    };
    if has_errors(&resolved.diagnostics) {
        return resolved;
    }
    let (request, found) = resolve(&resolved.document, base_dir, &mut resolved.sources);
    assert_eq!(
        request.is_none(),
        has_errors(&found),
        "a request or an error"
    );
    resolved.diagnostics.extend(found);
    resolved.request = request;
    resolved.graph = resolved.request.as_ref().and_then(graph_of);
    if let (Some(request), Some(graph)) = (&resolved.request, &resolved.graph) {
        let (directives, found) = direct(&resolved.document, request, graph);
        assert_eq!(
            directives.is_none(),
            has_errors(&found),
            "directives or an error"
        );
        resolved.diagnostics.extend(found);
        resolved.directives = directives;
    }
    resolved
}

/// `layers[3].attn` → `layers[*].attn`.
fn tied(name: &str) -> String {
    let mut out = name.to_owned();
    for layer in 0..8 {
        out = out.replace(&format!("layers[{layer}]"), "layers[*]");
    }
    out
}

fn pattern_text(pattern: &Pattern) -> String {
    let mut parts: Vec<String> = pattern
        .dims
        .iter()
        .map(|(dim, split)| match split {
            DimPattern::Unsharded => dim.to_string(),
            DimPattern::Open => format!("{dim}/?"),
            DimPattern::AnyAxis => format!("{dim}/*"),
            DimPattern::Axes(axes) => format!("{dim}/{axes:?}"),
        })
        .collect();
    parts.extend(
        pattern
            .partial
            .iter()
            .map(|(kind, axis)| format!("+{}({axis})", kind.name())),
    );
    parts.join(", ")
}

fn show_request(request: &Request) -> String {
    let mut out = String::new();
    let model = match &request.model {
        ModelSource::Decoder(config) => format!("{config:?}"),
        ModelSource::Config(path) => format!("config {}", file_name(path)),
        ModelSource::Graph(path) => format!("graph {}", file_name(path)),
    };
    let data = request.data.as_deref().map(file_name);
    writeln!(out, "name: {}", request.name).unwrap();
    writeln!(out, "model: {model}").unwrap();
    writeln!(out, "cluster: {}", request.cluster).unwrap();
    writeln!(out, "job: {:?}", request.job).unwrap();
    let init = match &request.init {
        Init::Load(path) => format!("load {}", file_name(path)),
        other => format!("{other:?}"),
    };
    writeln!(out, "init: {init}, data: {data:?}").unwrap();
    writeln!(out, "solve: {:?}", request.solve).unwrap();
    if let Some(pipeline) = &request.pipeline {
        let (axis, cuts) = (&pipeline.axis, &pipeline.cuts);
        writeln!(out, "pipeline: over {axis}, cut before {cuts:?}").unwrap();
        writeln!(out, "{}", pipeline.schedule.grid(&[])).unwrap();
    }
    out
}

fn show_directives(directives: &Directives, graph: &Graph) -> String {
    let mut out = String::new();
    for mesh in &directives.meshes {
        writeln!(out, "mesh: {mesh}").unwrap();
    }
    if let Some(budget) = directives.budget_bytes {
        writeln!(out, "budget: {budget} bytes").unwrap();
    }
    // Rules of one kind once, with how many tensors they are about.
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    let mut order: Vec<String> = Vec::new();
    for rule in &directives.rules {
        let name = match rule.subject {
            Subject::Tensor(id) => graph.tensor(id).name.clone(),
            Subject::Op(id) => graph.op_name(graph.op(id)).to_owned(),
        };
        let demand = match &rule.demand {
            Demand::Pin(pattern) => format!("pin [{}]", pattern_text(pattern)),
            Demand::Forbid(pattern) => format!("forbid [{}]", pattern_text(pattern)),
            Demand::Over { axis, dims } => format!("over {axis}: {dims:?}"),
            Demand::NotOver { axis } => format!("not over {axis}"),
            Demand::Prefer(pattern, weight) => {
                format!("prefer [{}] weight {weight:.2}", pattern_text(pattern))
            }
        };
        let line = format!("{}: {demand}  <- {}", tied(&name), rule.text);
        *kinds.entry(line.clone()).or_insert_with(|| {
            order.push(line);
            0
        }) += 1;
    }
    for line in order {
        writeln!(out, "{line}  ({} tensors)", kinds[&line]).unwrap();
    }
    out
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

#[test]
fn resolve_cases() {
    insta::glob!("../../tests/cases/resolve", "*.weave", |path| {
        let text = std::fs::read_to_string(path).unwrap();
        let resolved = resolve_all(&file_name(path), &text, path.parent().unwrap());
        let mut out = render_all(
            &resolved.diagnostics,
            &resolved.sources,
            RenderOptions::default(),
        );
        if let Some(request) = &resolved.request {
            out += &show_request(request);
        }
        if let (Some(directives), Some(graph)) = (&resolved.directives, &resolved.graph) {
            out += &show_directives(directives, graph);
        }
        insta::with_settings!({
            snapshot_path => "../../tests/cases/resolve/snapshots",
            prepend_module_to_snapshot => false,
            omit_expression => true,
        }, {
            insta::assert_snapshot!("resolve", out);
        });
    });
}

/// A plan that is legal but of no other sense: each axis on a factor that the names choose.
fn some_plan(graph: &Graph, name: &str, mesh: &Mesh, seed: usize) -> Plan {
    let mut plan = Plan::replicated(name, graph, mesh.clone());
    let mut state = seed as u64;
    let mut pick = |n: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    for (op_idx, op) in graph.ops.iter().enumerate() {
        let factors = op_factors(graph, op);
        for (axis, degree) in mesh.axes() {
            let used = &plan.placements[op_idx].factors;
            let free: Vec<_> = factors
                .iter()
                .filter(|f| f.admits(*degree) && used.values().all(|name| *name != f.name))
                .collect();
            // Layers are often, but not always placed alike.
            let place = if pick(4) == 0 { pick(8) } else { seed };
            if let Some(factor) = free.get(place) {
                let factor = factor.name.clone();
                plan.placements[op_idx].factors.insert(axis.clone(), factor);
            }
        }
    }
    for id in graph.tensor_ids() {
        let ty = graph.ty(id);
        if graph.tensor(id).role == Role::Temp || pick(3) == 0 {
            continue;
        }
        let mut layout = Layout::replicated();
        for (axis, degree) in mesh.axes().iter().rev() {
            let fitting: Vec<_> = ty.shape.iter().filter(|(_, n)| *n >= 8 * degree).collect();
            if let Some((dim, _)) = fitting.get(pick(3)) {
                layout = layout.shard(dim, axis);
            }
        }
        plan.sources.insert(id, layout);
    }
    plan
}

fn certificate() -> Certificate {
    Certificate {
        cluster: "h100:8".into(),
        predicted_s: 2e-3,
        lower_bound_s: 1.5e-3,
        gap: 0.25,
        parts: TimeParts::default(),
        memory: MemoryParts::default(),
        budget_bytes: 1e9,
        searched: Vec::new(),
        not_searched: Vec::new(),
        meshes: Vec::new(),
        proof: None,
    }
}

/// Prints a plan into the document, reads it back, and returns the text and what was read.
fn replayed(text: &str, plan: &Plan) -> (String, Option<Plan>, Vec<Diagnostic>) {
    let resolved = resolve_all("plan.weave", text, Path::new("."));
    let graph = resolved.graph.unwrap();
    let solution = Solution {
        plan: plan.clone(),
        certificate: certificate(),
        solve_s: 0.0,
    };
    let printed = print_plan(&resolved.document, &graph, &solution);
    let text = print(&printed);
    // Printing again over a printed plan changes nothing.
    assert_eq!(print(&print_plan(&printed, &graph, &solution)), text);
    let again = resolve_all("again.weave", &text, Path::new("."));
    let replay = again.directives.and_then(|directives| directives.replay);
    (text, replay, again.diagnostics)
}

const MODELS: [&str; 3] = [
    "model m = golden { layers 3 embed 32 heads 4 ffn 64 vocab 64 }",
    "model m = golden { layers 3 embed 32 heads 4 ffn 64 vocab 64 capacity 2 tied true }",
    "model m = llama { layers 5; embed 32; heads 8; kv_heads 2; ffn 48; vocab 64 }",
];

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config {
        cases: 24, failure_persistence: None, ..Default::default()
    })]

    #[test]
    fn a_replayed_plan_is_the_plan(
        model in 0..MODELS.len(),
        mesh in proptest::sample::select(vec![
            "", "mesh main = dp:2 > tp:4\n", "mesh main = dp:auto > tp:auto{2,4}\n",
            "mesh all = a:rest > b:2 > c:auto\n",
        ]),
        seed in 0usize..1000,
    ) {
        let model = MODELS[model];
        let text = format!(
            "plan \"p\" model m cluster \"h100:8\"\n{model}\ntrain batch 16 seq 16\n{mesh}"
        );
        let resolved = resolve_all("plan.weave", &text, Path::new("."));
        let graph = resolved.graph.unwrap();
        let candidates = resolved.directives.unwrap().meshes;
        let own = Mesh::new([("x", 4), ("y", 2)]);
        let mesh = candidates.get(seed % candidates.len().max(1)).unwrap_or(&own);
        let plan = some_plan(&graph, "p", mesh, seed % 7);
        let (text, replay, diagnostics) = replayed(&text, &plan);
        proptest::prop_assert!(diagnostics.is_empty(), "{diagnostics:?}\n{text}");
        let replay = replay.unwrap();
        proptest::prop_assert_eq!(&replay.placements, &plan.placements, "{}", text);
        proptest::prop_assert_eq!(&replay.sources, &plan.sources, "{}", text);
        proptest::prop_assert_eq!(replay, plan);
    }
}

#[test]
fn a_printed_plan_is_readable() {
    let text = "# What is asked for.\nplan \"p\" model m cluster \"h100:8\"\n\
                model m = golden { layers 3 embed 32 heads 4 ffn 64 vocab 64 }\n\
                train batch 16 seq 16 optimizer sgd\n\nmesh main = dp:rest > tp:auto\n\napply dp(dp)\n";
    let resolved = resolve_all("plan.weave", text, Path::new("."));
    let graph = resolved.graph.unwrap();
    let mesh = Mesh::new([("dp", 4), ("tp", 2)]);
    let mut plan = Plan::replicated("p", &graph, mesh);
    for (op_idx, op) in graph.ops.iter().enumerate() {
        let factors = &mut plan.placements[op_idx].factors;
        let has = |dim: &str| {
            op_factors(&graph, op)
                .iter()
                .any(|f| f.name.as_str() == dim)
        };
        for (axis, dim) in [("dp", "batch"), ("tp", "heads"), ("tp", "ffn")] {
            if has(dim) {
                factors.insert(axis.into(), dim.into());
            }
        }
        if graph.op_name(op).starts_with("layers[1].mlp.out") {
            factors.remove(&"tp".into());
        }
    }
    for id in graph.tensor_ids() {
        if graph.tensor(id).role == Role::Input {
            plan.sources
                .insert(id, Layout::replicated().shard("batch", "dp"));
        }
    }
    let (text, replay, diagnostics) = replayed(text, &plan);
    assert_eq!(diagnostics, []);
    assert_eq!(replay, Some(plan));
    insta::assert_snapshot!("printed_plan", text);
    let thawed = parse(&text, SourceId(0)).document.thaw();
    assert!(!print(&thawed).contains("place"));
}

#[test]
fn clusters_read_back() {
    let host = Cluster::local(3, &Host::nominal());
    let mut odd = Cluster::preset("eos-h100:128").unwrap();
    odd.device.launch_s = 1.0 / 3.0 * 1e-6;
    odd.within_node.bytes_per_s = 1e10 / 7.0;
    odd.device.memory_bytes = 80_000_000_001;
    odd.name = "measured".into();
    for cluster in [host, odd, Cluster::preset("a100-40:12").unwrap()] {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("c.weave"), print_cluster(&cluster)).unwrap();
        let text = "plan \"p\" model m cluster \"c.weave\"\nmodel m = golden { size tiny }\ntrain steps 1\n";
        let resolved = resolve_all("p.weave", text, folder.path());
        assert_eq!(resolved.diagnostics, []);
        assert_eq!(resolved.request.unwrap().cluster, cluster);
    }
}

#[test]
fn examples_resolve_and_are_formatted() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let mut n_examples = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|ending| ending != "weave") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("# "), "{path:?} says what it shows");
        let resolved = resolve_all(&file_name(&path), &text, &folder);
        assert_eq!(resolved.diagnostics, [], "{path:?}");
        assert!(resolved.request.is_some(), "{path:?}");
        // A model in a file is read when it is planned.
        let has_graph = resolved.graph.is_some();
        assert_eq!(resolved.directives.is_some(), has_graph, "{path:?}");
        assert_eq!(print(&resolved.document), text, "{path:?}");
        n_examples += 1;
    }
    assert!(n_examples >= 6);
}

#[test]
fn clusters_with_levels_slow_links_and_groups_print_and_read_back() {
    let text = "cluster new {\n  nodes 16\n  device \"h100\"\n  level leaf of 4 oversubscription 2\n\
                level pod of 2 link \"spine\" 12.5 GB/s 20 us\n  slow node 3 uplink 25 %\n\
                slow node 4 links 50 %\n  slow leaf 1 uplink 10 %\n}\n\
                cluster both {\n  group new\n  group \"a100-80:128\"\n  link \"hdr\" 20 GB/s 25 us between groups\n}\n";
    let (cluster, findings) = cluster_of_text("c.weave", text, &mut Sources::new());
    let cluster = cluster.unwrap_or_else(|| panic!("{findings:?}"));
    assert_eq!((cluster.n_devices(), cluster.n_all_nodes()), (256, 32));
    assert_eq!(cluster.levels[1].n_nodes, 8);
    assert_eq!(cluster.levels[0].link.bytes_per_s, 25e9);
    assert_eq!(cluster.slow.len(), 3);
    let printed = print_cluster(&cluster);
    let (again, findings) = cluster_of_text("c.weave", &printed, &mut Sources::new());
    let again = again.unwrap_or_else(|| panic!("{printed}\n{findings:?}"));
    assert_eq!(print_cluster(&again), printed);
    assert_eq!((again.levels, again.slow), (cluster.levels, cluster.slow));
    assert_eq!(
        again.others[0].between_nodes,
        cluster.others[0].between_nodes
    );
    assert_eq!(again.between_groups, cluster.between_groups);
}
