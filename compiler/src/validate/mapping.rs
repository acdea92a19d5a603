//! The mappings that a row may mean.
//!
//! Enters: degrees and words of a row. Leaves: one mapping, or several where the row leaves a choice
//! open that the run had to make.
//! Invariant: what a row states is never changed; the candidates differ only in what it leaves blank.

use std::collections::BTreeSet;

use meshweave_dsl::mapping::{
    Compute, Context, Mapping, Module, Offload, Pipeline, Precision, Recompute, Zero,
};

use super::layers::layers;
use super::table::{Row, number_after};
use crate::plan::estimate::Workload;

/// Largest microbatch that is tried where a row has none.
const MAX_MICRO_BATCH: usize = 16;
/// Most chunks a pipeline rank that are tried where a row has none.
const MAX_CHUNKS: usize = 12;

/// The mappings that agree with the row.
///
/// # Errors
/// Degrees that do not multiply to the devices, or a batch that they do not divide.
pub(super) fn mappings(row: Row<'_>, workload: &Workload) -> Result<Vec<Mapping>, String> {
    let n_devices = row.count("gpus").ok_or("`gpus` is blank")?;
    let degree = |column: &str| row.count(column).unwrap_or(1);
    let (tp, cp, pp) = (degree("tp"), degree("cp"), degree("pp"));
    let inner = tp * cp * pp;
    if !n_devices.is_multiple_of(inner) {
        return Err(format!(
            "tp {tp} × cp {cp} × pp {pp} = {inner} does not divide {n_devices} devices"
        ));
    }
    let dp = n_devices / inner;
    let etp = row.count("etp").unwrap_or(1);
    let n_experts = workload.model.moe.as_ref().map_or(1, |moe| moe.n_experts);
    let ep = match row.count("ep") {
        Some(ep) => ep,
        None if n_experts > 1 => default_ep(n_experts, tp * cp * dp / etp.max(1)),
        None => 1,
    };
    let words = row.text_or_blank("schedule").to_ascii_lowercase();
    let zero = row.number("zero_stage").map_or_else(
        || default_zero(pp, row),
        |stage| stage.clamp(0.0, 3.0) as u8,
    );
    let batch = workload.batch;
    let micro_batches = match row.count("micro_batch") {
        Some(micro_batch) => vec![micro_batch],
        None => match row.count("num_microbatches") {
            Some(n) => vec![(batch / (dp * n)).max(1)],
            None => powers(MAX_MICRO_BATCH)
                .filter(|micro_batch| batch.is_multiple_of(dp * micro_batch))
                .collect(),
        },
    };
    let mut mappings = Vec::new();
    for &micro_batch in &micro_batches {
        for (schedule, chunks) in schedules(row, &words, pp, workload) {
            for recompute in recomputes(row) {
                mappings.push(Mapping {
                    tp,
                    cp,
                    dp,
                    pp,
                    ep,
                    etp,
                    sequence_parallel: tp > 1 && sequence_parallel(row),
                    context: Context::Ring,
                    zero: Zero {
                        stage: zero,
                        group: shard_group(row, dp * cp),
                    },
                    micro_batch,
                    pipeline: Pipeline {
                        schedule: schedule.clone(),
                        chunks,
                        layers: layers(row, workload, pp * chunks),
                    },
                    recompute,
                    offload: Offload {
                        optimizer: offloads(row),
                        activations: 0.0,
                    },
                    precision: precision(row),
                });
            }
        }
    }
    if mappings.is_empty() {
        return Err(format!("a batch of {batch} is not divided by dp {dp}"));
    }
    Ok(mappings)
}

/// The greatest part of the experts that the ranks can hold one each.
fn default_ep(n_experts: usize, n_ranks: usize) -> usize {
    powers(n_experts.min(n_ranks.max(1)))
        .filter(|ep| n_experts.is_multiple_of(*ep) && n_ranks.is_multiple_of(*ep))
        .last()
        .unwrap_or(1)
}

/// Megatron divides the optimizer since 2022; older rows and rows without data parallelism do not.
fn default_zero(pp: usize, row: Row<'_>) -> u8 {
    let notes = row.text_or_blank("notes").to_ascii_lowercase();
    let source = row.text_or_blank("source").to_ascii_lowercase();
    if notes.contains("fsdp") || notes.contains("zero-3") {
        3
    } else if source.contains("alpa") {
        // Alpa's benchmark shards the update (`prefer_reduce_scatter`).
        1
    } else {
        u8::from(pp == 1 || row.text_or_blank("gpu").contains("100-80"))
    }
}

/// FSDP's shard group, where the notes tell it.
fn shard_group(row: Row<'_>, n_ranks: usize) -> Option<usize> {
    let notes = row.text_or_blank("notes").to_ascii_lowercase();
    let group = number_after(&notes, "shard group")? as usize;
    (group > 0 && group < n_ranks && n_ranks.is_multiple_of(group)).then_some(group)
}

fn offloads(row: Row<'_>) -> bool {
    let notes = row.text_or_blank("notes").to_ascii_lowercase();
    notes.contains("optimizer cpu offload") || notes.contains("cpu offload of optimizer")
}

/// Megatron's sequence parallelism: stated in a column or in the notes, else used with `tp`.
fn sequence_parallel(row: Row<'_>) -> bool {
    let notes = row.text_or_blank("notes").to_ascii_lowercase();
    let stated = row.number("sp").or_else(|| number_after(&notes, "sp="));
    stated.is_none_or(|sp| sp > 0.0)
}

/// Schedules with their chunks. An interleaved one without its chunks is tried with all that divide
/// the layers.
fn schedules(row: Row<'_>, words: &str, pp: usize, workload: &Workload) -> Vec<(String, usize)> {
    if pp == 1 {
        return vec![("1f1b".into(), 1)];
    }
    let chunks = row.count("vpp");
    let named = [
        ("zb-2p", "zb-h2", 1),
        ("zb-1p", "zb-h1", 1),
        ("zb-h1", "zb-h1", 1),
        ("zb-h2", "zb-h2", 1),
        ("zb-v", "zb-v", 2),
        ("zbv", "zb-v", 2),
        ("v-half", "v-half", 2),
        ("v-min", "v-min", 2),
        ("dualpipev", "dualpipe-v", 2),
        ("dualpipe-v", "dualpipe-v", 2),
        ("dualpipe", "dualpipe", 1),
        ("gpipe", "gpipe", 1),
        ("afab", "gpipe", 1),
    ];
    if let Some((_, name, default)) = named.iter().find(|(word, ..)| words.contains(word)) {
        return vec![((*name).into(), chunks.unwrap_or(*default))];
    }
    let one = |chunks: usize| match chunks {
        1 => ("1f1b".to_owned(), 1),
        _ => ("interleaved".to_owned(), chunks),
    };
    match chunks {
        Some(chunks) => vec![one(chunks)],
        None if words == "1f1b" => vec![one(1)],
        None => {
            let n_layers = workload.model.n_layers;
            let legal = (1..=MAX_CHUNKS)
                .filter(|chunks| {
                    let stages = pp * chunks;
                    n_layers.is_multiple_of(stages) || (n_layers + 2).is_multiple_of(stages)
                })
                .filter(|chunks| *chunks > 1 || !words.contains("interleaved"));
            let mut legal: Vec<_> = legal.map(one).collect();
            if legal.is_empty() {
                legal.push(one(1));
            }
            legal
        }
    }
}

/// What is computed again; where the row does not say, nothing or, where that does not fit, everything.
fn recomputes(row: Row<'_>) -> Vec<Recompute> {
    let detail = row.text_or_blank("recompute_detail").to_ascii_lowercase();
    let modules = modules(&detail);
    match row
        .text("recompute")
        .map(str::to_ascii_lowercase)
        .as_deref()
    {
        Some("none") => vec![Recompute::None],
        Some("full") => vec![Recompute::Full],
        Some("selective") if modules.is_empty() => {
            vec![Recompute::Modules([Module::CoreAttention].into())]
        }
        Some("selective") => vec![Recompute::Modules(modules)],
        _ if detail.starts_with("none") => vec![Recompute::None],
        _ if !modules.is_empty() => vec![Recompute::Modules(modules)],
        _ => vec![
            Recompute::None,
            Recompute::Modules([Module::CoreAttention].into()),
            Recompute::Full,
        ],
    }
}

/// Megatron's names of modules.
fn modules(detail: &str) -> BTreeSet<Module> {
    let mut modules = BTreeSet::new();
    for (word, module) in [
        ("core_attn", Module::CoreAttention),
        ("mla_up_proj", Module::MlaUp),
        ("layernorm", Module::Norm),
        ("moe_act", Module::MoeActivation),
    ] {
        if detail.contains(word) {
            modules.insert(module);
        }
    }
    let parts = detail.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    for part in parts {
        match part {
            "mlp" => _ = modules.insert(Module::Mlp),
            "moe" => _ = modules.insert(Module::Moe),
            _ => {}
        }
    }
    modules
}

fn precision(row: Row<'_>) -> Precision {
    let words = row.text_or_blank("dtype").to_ascii_lowercase();
    let gpu = row.text_or_blank("gpu").to_ascii_lowercase();
    let compute = if words.contains("nvfp4") || words.contains("fp4") {
        Compute::NvFp4
    } else if words.contains("mxfp8") {
        Compute::MxFp8
    } else if words.contains("fp8") {
        Compute::Fp8
    } else if words.contains("bf16") {
        Compute::Bf16
    } else if words.contains("16") || (words.is_empty() && gpu.contains("v100")) {
        Compute::F16
    } else if words.contains("tf32") {
        Compute::Tf32
    } else if words.contains("32") {
        return Precision::F32;
    } else {
        Compute::Bf16
    };
    let source = row.text_or_blank("source").to_ascii_lowercase();
    let model = row.text_or_blank("model").to_ascii_lowercase();
    let names = |words: &[&str]| words.iter().any(|name| source.contains(name));
    // Aleph Alpha's scaling, DeepSpeed and Alpa accumulate gradients in the format of the parameters,
    // as Megatron-Bridge's recipes for performance do (`grad_reduce_in_fp32 = False`).
    let is_half = names(&[
        "hagemann",
        "deepspeed",
        "stas00",
        "colossal",
        "alpa",
        "megatron-bridge",
    ]);
    // DeepSeek-V3 and its kin keep both moments in bf16 (arXiv 2412.19437, 3.3.2; the recipes'
    // `use_precision_aware_optimizer`).
    let half_moments = ["deepseek-v3", "moonlight", "kimi"]
        .iter()
        .any(|name| model.contains(name));
    Precision {
        compute,
        gradient_bytes: if is_half { 2 } else { 4 },
        optimizer_bytes: if half_moments { 8 } else { 12 },
        ..Precision::MIXED_BF16
    }
}

/// 1, 2, 4, … up to a limit.
fn powers(limit: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(1), |power| Some(power * 2)).take_while(move |power| *power <= limit)
}
