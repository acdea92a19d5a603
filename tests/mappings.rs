//! Plans that are mappings, from documents: found, printed, read back, refused.

use std::path::Path;

use meshweave::compiler::plan::outer::FamilyRow;
use meshweave::dsl::diagnostics::{Color, SourceId};
use meshweave::dsl::weave;
use meshweave::session::Session;

const GPT_18B: &str =
    "model m = gpt {\n  layers 40 embed 6144 heads 48 vocab 51200 positions 2048\n}\n";
const MIXTRAL: &str = "model m = llama {\n  layers 32 embed 4096 heads 32 kv_heads 8 ffn 14336 vocab 32000\n  experts 8 topk 2\n}\n";

fn session(cluster: &str, model: &str, rest: &str) -> Session {
    let text = format!("plan \"x\" model m cluster \"{cluster}\"\n{model}{rest}\n");
    Session::from_text("plan.weave", &text, Path::new("."), None).unwrap()
}

/// What is said of a request that cannot be met. Figures change with every price, so they are masked.
fn complaint(cluster: &str, model: &str, rest: &str) -> String {
    let text = format!("plan \"x\" model m cluster \"{cluster}\"\n{model}{rest}\n");
    let found = Session::from_text("plan.weave", &text, Path::new("."), None)
        .and_then(|session| session.search_mapping());
    match found {
        Ok(mapped) => format!("planned: {}", mapped.mapping),
        Err(error) => mask(&error.render_with(Color::Never)),
    }
}

/// Digits with a point, and all of a mapping, are figures of prices.
fn mask(text: &str) -> String {
    let is_figure = |word: &str| {
        let has_point = word.contains('.') && word.chars().any(|c| c.is_ascii_digit());
        let is_choice = word.starts_with("mb")
            || ["tp", "pp", "dp", "cp", "ep", "zero"].iter().any(|axis| {
                word.strip_prefix(axis).is_some_and(|rest| {
                    rest.chars().all(|c| c.is_ascii_digit()) && !rest.is_empty()
                })
            });
        has_point || is_choice
    };
    let lines = text.lines().map(|line| {
        // The choices of a mapping vary in number, too.
        let line = line.split(" (predicted)").next().unwrap_or_default();
        let words = line
            .split(' ')
            .map(|word| if is_figure(word) { "#" } else { word });
        words.collect::<Vec<_>>().join(" ")
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn a_printed_plan_reads_back_as_its_mapping() {
    for (cluster, model, rest) in [
        ("a100-80:64", GPT_18B, "train batch 256 seq 2048"),
        (
            "h100:32",
            MIXTRAL,
            "train batch 128 seq 4096 dtype auto{bf16, fp8}\n\
             mesh main = pp:auto > dp:rest > tp:auto{1,2,4} within node\n\
             mesh moe = pp:same > edp:rest > ep:auto{4,8} > etp:1 refolds main\n\
             use main on *\nuse moe on layers[*].moe.experts\n\
             apply zero(1, main.dp)\n\
             pipeline main.pp {\n  schedule auto{1f1b, interleaved}\n  microbatches auto\n}\n\
             memory {\n  headroom 8 %\n  recompute layers[*].mlp = auto{none, full}\n  offload optimizer = none\n}\n\
             solve minimize step_time within 60 s gap 2 %",
        ),
        ("h100:8", MIXTRAL, "infer batch 16 seq 2048 tokens 256"),
        (
            "h100:8",
            MIXTRAL,
            "infer batch auto seq 2048 tokens 256 ttft 1 s tpot 30 ms\nsolve maximize throughput",
        ),
        (
            "a100-80:16",
            GPT_18B,
            "train batch auto{32,64} seq 2048\nmesh main = pp:8 > dp:rest > tp:1\n\
             pipeline main.pp {\n  schedule 1f1b\n}\n\
             memory {\n  recompute layers[*] = first (3,2,2,1,1,0,0,0)\n}",
        ),
        (
            "h100:32",
            MIXTRAL,
            "train batch 128 seq 4096\nmesh main = pp:4 > dp:rest > tp:1\n\
             pipeline main.pp {\n  schedule auto{dualpipe, dualpipe-v}\n}",
        ),
    ] {
        let session = session(cluster, model, rest);
        let mapped = session.search_mapping().unwrap();
        let text = session.mapping_text(&mapped);
        let again = Session::from_text("plan.weave", &text, Path::new("."), None).unwrap();
        let read = again
            .read_mapping()
            .unwrap_or_else(|error| panic!("{text}\n{error}"));
        assert_eq!(read.mapping, mapped.mapping, "{text}");
        assert_eq!(read.estimate, mapped.estimate);
        let found = mapped.found.as_ref().unwrap();
        assert!(found.certificate.lower_bound_s <= found.certificate.predicted_s);
        // Printing a plan anew changes nothing, and its intent is still there.
        assert_eq!(again.mapping_text(&mapped), text);
        let document = weave::parse(&text, SourceId(0)).document;
        assert!(!weave::print(&document.thaw()).contains(":="));
    }
}

#[test]
fn the_families_of_schedules_are_compared() {
    let session = session(
        "h100:64",
        MIXTRAL,
        "train batch 256 seq 4096\nmesh main = pp:8 > dp:rest > tp:1\n\
         pipeline main.pp {\n  schedule auto{1f1b, zb-h1, zb-v, dualpipe}\n}",
    );
    let mapped = session.search_mapping().unwrap();
    let certificate = &mapped.found.as_ref().unwrap().certificate;
    let rows = &certificate.schedules;
    assert_eq!(rows[0].why, "chosen");
    assert_eq!(rows[0].family, mapped.mapping.pipeline.schedule);
    assert_eq!(rows[0].simulated_s, certificate.simulated_s);
    assert_eq!(rows.len(), 13);
    let seconds = |row: &FamilyRow| row.simulated_s.or(row.predicted_s);
    for row in &rows[1..] {
        if let (Some(own), Some(chosen)) = (row.simulated_s, seconds(&rows[0])) {
            assert!(chosen <= own, "{row:?} beats the chosen one");
        }
        let is_allowed = ["1f1b", "zb-h1", "zb-v", "dualpipe"].contains(&row.family.as_str());
        assert!(is_allowed || row.predicted_s.is_none(), "{row:?}");
        assert!(!row.why.is_empty());
    }
    let text = session.mapping_text(&mapped);
    assert!(text.contains("# | schedule: "), "{text}");
}

#[test]
fn requests_that_cannot_be_met_say_why() {
    let huge =
        "model m = gpt {\n  layers 128 embed 25600 heads 160 vocab 51200 positions 2048\n}\n";
    let cases = [
        (
            "a model larger than the cluster",
            "h100:8",
            huge,
            "train batch 64 seq 2048",
        ),
        (
            "a batch that no data parallelism divides",
            "a100-80:16",
            GPT_18B,
            "train batch 7 seq 2048\nmesh main = pp:2 > dp:rest > tp:2",
        ),
        (
            "statements that exclude each other",
            "a100-80:64",
            GPT_18B,
            "train batch 512 seq 2048\nmesh main = pp:auto > dp:rest > tp:1\n\
             apply zero(0, main.dp)\n\
             memory {\n  recompute layers[*] = none\n  offload optimizer = none\n}\n\
             pipeline main.pp {\n  microbatches 1\n}",
        ),
        (
            "a target of latency that no mapping meets",
            "h100:8",
            MIXTRAL,
            "infer batch 64 seq 8192 ttft 1 ms",
        ),
        (
            "targets of latency that no batch meets",
            "h100:8",
            MIXTRAL,
            "infer batch auto seq 8192 tokens 512 tpot 100 us\nsolve maximize throughput",
        ),
        (
            "a first token that comes too late",
            "h100:8",
            MIXTRAL,
            "infer batch auto seq 8192 tokens 512 ttft 1 ms",
        ),
        (
            "steps of different batches",
            "h100:8",
            MIXTRAL,
            "infer batch auto seq 8192 tokens 512\nsolve minimize step_time",
        ),
        (
            "a batch that nothing bounds",
            "h100:8",
            MIXTRAL,
            "train batch auto seq 4096",
        ),
        (
            "a latency of tokens that are not generated",
            "h100:8",
            MIXTRAL,
            "infer batch 8 seq 4096 tpot 30 ms",
        ),
        (
            "axes in another order",
            "h100:8",
            MIXTRAL,
            "train batch 64 seq 4096\nmesh main = tp:2 > dp:rest",
        ),
        (
            "a part that there is not",
            "h100:8",
            MIXTRAL,
            "train batch 64 seq 4096\nmemory {\n  recompute layers[*].attention = full\n}",
        ),
        (
            "a pin beside a pipeline",
            "h100:8",
            MIXTRAL,
            "train batch 64 seq 4096\nmesh main = pp:2 > dp:rest > tp:2\n\
             pin layers[*].attn.wq : [embed, heads/tp]\npipeline main.pp {\n  chunks 2\n}",
        ),
    ];
    let text: Vec<String> = cases
        .iter()
        .map(|(name, cluster, model, rest)| format!("{name}\n{}", complaint(cluster, model, rest)))
        .collect();
    insta::assert_snapshot!(text.join("\n----\n"));
}

#[test]
fn serving_is_planned_under_its_targets() {
    let with = |rest: &str| {
        let mapped = session("h100:8", MIXTRAL, rest).search_mapping().unwrap();
        let text = meshweave::mapping::summary(&mapped);
        assert!(text.contains("their keys and values take"), "{text}");
        assert!(text.contains("no batch of the space makes more"), "{text}");
        mapped
    };
    let free = with("infer batch auto seq 2048 tokens 256");
    let fast = with("infer batch auto seq 2048 tokens 256 tpot 12 ms");
    let (free_s, fast_s) = (free.estimate.step_s, fast.estimate.step_s);
    assert!(fast_s <= 0.012 && free_s > 0.012, "{fast_s} {free_s}");
    assert!(fast.request.workload.batch < free.request.workload.batch);
    assert!(fast.estimate.tokens_per_s < free.estimate.tokens_per_s);
    // The batch that was chosen is in the text, and the open one as well.
    let session = session("h100:8", MIXTRAL, "infer batch auto seq 2048 tokens 256");
    let text = session.mapping_text(&free);
    let batch = free.request.workload.batch;
    assert!(
        text.contains(&format!("batch auto := {batch} seq")),
        "{text}"
    );
}

#[test]
fn extremes_are_planned() {
    let small = "model m = gpt {\n  layers 12 embed 768 heads 12 vocab 50304 positions 1024\n}\n";
    let one = session("h100:1", small, "train batch 64 seq 1024")
        .search_mapping()
        .unwrap();
    assert_eq!(one.mapping.n_ranks(), 1);

    // A batch that no data parallelism divides is planned with other axes.
    let odd = session("a100-80:8", GPT_18B, "train batch 7 seq 2048")
        .search_mapping()
        .unwrap();
    assert_eq!((odd.mapping.dp, odd.mapping.n_ranks()), (1, 8));

    // 100,000 devices do not divide among a batch of 2,048: some stay idle, and are counted.
    let huge = session("h100:100000", GPT_18B, "train batch 2048 seq 2048");
    let found = huge.search_mapping().unwrap().found.unwrap();
    assert!(found.certificate.n_idle > 0);
    assert!(found.certificate.n_idle < 50_000);
    let whole = session("h100:100000", GPT_18B, "train batch 25000 seq 2048");
    let found = whole.search_mapping().unwrap().found.unwrap();
    assert_eq!(found.certificate.n_idle, 0);

    // Over a slow network less is said: the plan moves fewer bytes between nodes.
    let slow = "cluster far = h100 {\n  nodes 4\n  devices 8\n  link \"ethernet\" 1 GB/s 50 us between nodes\n}\n";
    let text = format!("plan \"x\" model m cluster far\n{slow}{GPT_18B}train batch 64 seq 2048\n");
    let session = Session::from_text("plan.weave", &text, Path::new("."), None).unwrap();
    let mapped = session.search_mapping().unwrap();
    assert!(mapped.mapping.pp > 1, "{}", mapped.mapping);
    assert!(mapped.mapping.tp <= 8);
}
