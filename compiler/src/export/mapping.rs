//! Mappings as configurations of other training systems.
//!
//! Enters: a workload and its mapping. Leaves: flags of Megatron-LM, sections of a torchtitan file, a
//! DeepSpeed file.
//! Invariant: what a system cannot say is refused by name; nothing is rounded to what it can.
//!
//! Sources: `megatron/training/arguments.py` and `transformer_config.py` (Megatron-Core 0.14), torchtitan's
//! `config/job_config.py`, DeepSpeed's configuration reference.

use meshweave_dsl::mapping::{Compute, Context, Mapping, Module, Recompute};
use serde_json::json;

use super::{ExportError, Result, Target};
use crate::plan::estimate::{Job, Workload};

/// The mapping in the words of another system.
///
/// # Errors
/// `Unsupported`, naming what the system cannot express.
pub fn export_mapping(workload: &Workload, mapping: &Mapping, target: Target) -> Result<String> {
    if workload.job != Job::Train {
        return Err(unsupported("inference", target));
    }
    refuse(
        mapping.offload.activations > 0.0,
        "offloading of activations",
        target,
    )?;
    match target {
        Target::Megatron => megatron(workload, mapping),
        Target::Torchtitan => torchtitan(workload, mapping),
        Target::Deepspeed => deepspeed(workload, mapping),
    }
}

fn unsupported(what: &str, target: Target) -> ExportError {
    ExportError::Unsupported(format!(
        "the plan uses {what}, which {} cannot express",
        target.name()
    ))
}

/// A schedule that the target does not run, with those that it does.
fn unknown_schedule(schedule: &str, known: &str, target: Target) -> ExportError {
    ExportError::Unsupported(format!(
        "the plan uses schedule `{schedule}`, which {} cannot express; plan with `schedule auto{{{known}}}`",
        target.name()
    ))
}

fn refuse(is_used: bool, what: &str, target: Target) -> Result<()> {
    match is_used {
        true => Err(unsupported(what, target)),
        false => Ok(()),
    }
}

fn megatron(workload: &Workload, mapping: &Mapping) -> Result<String> {
    let target = Target::Megatron;
    let pipeline = &mapping.pipeline;
    let is_known = matches!(pipeline.schedule.as_str(), "1f1b" | "interleaved");
    if mapping.pp > 1 && !is_known {
        return Err(unknown_schedule(
            &pipeline.schedule,
            "1f1b, interleaved",
            target,
        ));
    }
    refuse(mapping.zero.stage == 2, "ZeRO 2", target)?;
    refuse(
        mapping.zero.stage == 1 && mapping.zero.group.is_some(),
        "ZeRO 1 over a part of the data-parallel ranks",
        target,
    )?;
    let mut flags = vec![
        format!("--tensor-model-parallel-size {}", mapping.tp),
        format!("--pipeline-model-parallel-size {}", mapping.pp),
        format!("--context-parallel-size {}", mapping.cp),
    ];
    let mut add = |flag: String| flags.push(flag);
    if mapping.sequence_parallel {
        add("--sequence-parallel".into());
    }
    if mapping.cp > 1 {
        let kind = match mapping.context {
            Context::Ring => "p2p",
            Context::AllGather => "all_gather",
            Context::Ulysses => "a2a",
        };
        add(format!("--cp-comm-type {kind}"));
    }
    if workload.model.moe.is_some() {
        add(format!("--expert-model-parallel-size {}", mapping.ep));
        add(format!("--expert-tensor-parallel-size {}", mapping.etp));
        add("--moe-token-dispatcher-type alltoall".into());
    }
    if mapping.pp > 1 {
        let n_layers = workload.model.n_layers;
        if pipeline.layers.is_some() || !n_layers.is_multiple_of(mapping.n_stages()) {
            let layout = layout(workload, mapping);
            add(format!("--pipeline-model-parallel-layout \"{layout}\""));
        } else if pipeline.chunks > 1 {
            let chunks = pipeline.chunks;
            add(format!("--num-virtual-stages-per-pipeline-rank {chunks}"));
        }
    }
    add(format!("--micro-batch-size {}", mapping.micro_batch));
    add(format!("--global-batch-size {}", workload.batch));
    add(format!("--seq-length {}", workload.seq));
    match mapping.zero.stage {
        0 => {}
        1 => add("--use-distributed-optimizer".into()),
        _ => {
            add("--use-megatron-fsdp".into());
            add("--data-parallel-sharding-strategy optim_grads_params".into());
            if let Some(group) = mapping.zero.group {
                let copies = mapping.dp / group;
                add(format!("--num-distributed-optimizer-instances {copies}"));
            }
        }
    }
    match &mapping.recompute {
        Recompute::None => {}
        Recompute::Full => {
            add("--recompute-granularity full".into());
            add("--recompute-method uniform".into());
            add("--recompute-num-layers 1".into());
        }
        Recompute::Layers(count) => {
            // `block` counts the layers of a chunk.
            if !count.is_multiple_of(pipeline.chunks) {
                let what = format!(
                    "{count} recomputed layers on ranks of {} chunks",
                    pipeline.chunks
                );
                return Err(unsupported(&what, target));
            }
            add("--recompute-granularity full".into());
            add("--recompute-method block".into());
            add(format!(
                "--recompute-num-layers {}",
                count / pipeline.chunks
            ));
        }
        Recompute::LayersByRank(_) => {
            let what = "numbers of recomputed layers that differ between pipeline ranks";
            return Err(unsupported(what, target));
        }
        Recompute::Modules(parts) => {
            let names: Vec<&str> = parts.iter().map(|part| megatron_name(*part)).collect();
            add("--recompute-granularity selective".into());
            add(format!("--recompute-modules {}", names.join(" ")));
        }
    }
    if mapping.offload.optimizer {
        add("--optimizer-cpu-offload".into());
        add("--optimizer-offload-fraction 1.0".into());
        add("--use-precision-aware-optimizer".into());
    }
    match mapping.precision.compute {
        Compute::F32 => {}
        Compute::Bf16 => add("--bf16".into()),
        Compute::F16 => add("--fp16".into()),
        Compute::Fp8 => add("--bf16 --fp8-format hybrid --fp8-recipe tensorwise".into()),
        Compute::MxFp8 => add("--bf16 --fp8-format hybrid --fp8-recipe mxfp8".into()),
        Compute::NvFp4 => add("--bf16 --fp4-format e2m1 --fp4-recipe nvfp4".into()),
        Compute::Tf32 => return Err(unsupported("tf32 as the format of a run", target)),
    }
    Ok(flags.join(" \\\n") + "\n")
}

fn megatron_name(part: Module) -> &'static str {
    match part {
        Module::CoreAttention => "core_attn",
        Module::MlaUp => "mla_up_proj",
        Module::Norm => "layernorm",
        Module::Mlp => "mlp",
        Module::Moe => "moe",
        Module::MoeActivation => "moe_act",
    }
}

/// `Et*3|t*4|t*3L`: the stages in model order.
fn layout(workload: &Workload, mapping: &Mapping) -> String {
    let n_stages = mapping.n_stages();
    let n_layers = workload.model.n_layers;
    let even = |stage: usize| n_layers / n_stages + usize::from(stage < n_layers % n_stages);
    let stages: Vec<String> = (0..n_stages)
        .map(|stage| {
            let count = match &mapping.pipeline.layers {
                Some(layers) => layers.get(stage).copied().unwrap_or(0),
                None => even(stage),
            };
            let mut text = String::new();
            if stage == 0 {
                text.push('E');
            }
            match count {
                0 => {}
                1 => text.push('t'),
                count => text += &format!("t*{count}"),
            }
            if stage + 1 == n_stages {
                text.push('L');
            }
            text
        })
        .collect();
    stages.join("|")
}

fn torchtitan(workload: &Workload, mapping: &Mapping) -> Result<String> {
    let target = Target::Torchtitan;
    refuse(mapping.zero.stage == 1, "ZeRO 1", target)?;
    refuse(
        mapping.offload.optimizer,
        "offloading of the optimizer alone",
        target,
    )?;
    refuse(
        mapping.cp > 1 && mapping.context == Context::Ulysses,
        "Ulysses",
        target,
    )?;
    refuse(
        mapping.pipeline.layers.is_some(),
        "uneven stages (its model parts are listed by module names)",
        target,
    )?;
    let mode = match &mapping.recompute {
        Recompute::None => "none",
        Recompute::Full => "full",
        _ => {
            return Err(unsupported(
                "recomputation of parts or of some layers",
                target,
            ));
        }
    };
    let schedule = match mapping.pipeline.schedule.as_str() {
        "1f1b" => "1F1B",
        "interleaved" => "Interleaved1F1B",
        "gpipe" => "GPipe",
        "zb-v" => "ZBVZeroBubble",
        "dualpipe-v" => "DualPipeV",
        "looped-bfs" => "LoopedBFS",
        "interleaved-zb" => "InterleavedZeroBubble",
        other => {
            let known = "gpipe, 1f1b, looped-bfs, interleaved, interleaved-zb, zb-v, dualpipe-v";
            return Err(unknown_schedule(other, known, target));
        }
    };
    let shard = match mapping.zero.stage {
        0 => 1,
        _ => mapping.zero.group.unwrap_or(mapping.dp),
    };
    let reshard = if mapping.zero.stage == 2 {
        "never"
    } else {
        "always"
    };
    let mut text = format!(
        "[training]\nlocal_batch_size = {}\nglobal_batch_size = {}\nseq_len = {}\n\n[parallelism]\n\
         data_parallel_replicate_degree = {}\ndata_parallel_shard_degree = {shard}\n\
         fsdp_reshard_after_forward = \"{reshard}\"\ntensor_parallel_degree = {}\n\
         context_parallel_degree = {}\n",
        workload.batch / mapping.dp,
        workload.batch,
        workload.seq,
        mapping.dp / shard,
        mapping.tp,
        mapping.cp,
    );
    if mapping.cp > 1 {
        let method = match mapping.context {
            Context::Ring => "alltoall",
            Context::AllGather | Context::Ulysses => "allgather",
        };
        text += &format!("context_parallel_rotate_method = \"{method}\"\n");
    }
    if workload.model.moe.is_some() {
        text += &format!(
            "expert_parallel_degree = {}\nexpert_tensor_parallel_degree = {}\n",
            mapping.ep, mapping.etp
        );
    }
    text += &format!("pipeline_parallel_degree = {}\n", mapping.pp);
    if mapping.pp > 1 {
        text += &format!(
            "pipeline_parallel_schedule = \"{schedule}\"\npipeline_parallel_microbatch_size = {}\n\
             pipeline_parallel_layers_per_stage = {}\n",
            mapping.micro_batch,
            workload.model.n_layers.div_ceil(mapping.n_stages())
        );
    }
    text += &format!("\n[activation_checkpoint]\nmode = \"{mode}\"\n");
    Ok(text)
}

fn deepspeed(workload: &Workload, mapping: &Mapping) -> Result<String> {
    let target = Target::Deepspeed;
    refuse(
        mapping.pp > 1,
        "a pipeline (the model's code sets it)",
        target,
    )?;
    refuse(
        mapping.ep > 1,
        "expert parallelism (the model's code sets it)",
        target,
    )?;
    refuse(
        mapping.cp > 1 && mapping.context != Context::Ulysses,
        "context parallelism other than Ulysses",
        target,
    )?;
    refuse(
        mapping.recompute != Recompute::None,
        "recomputation (the model's code sets it)",
        target,
    )?;
    refuse(
        mapping.sequence_parallel,
        "a sequence that is sharded between tensor-parallel blocks",
        target,
    )?;
    let mut config = json!({
        "train_batch_size": workload.batch,
        "train_micro_batch_size_per_gpu": mapping.micro_batch,
        "gradient_accumulation_steps": mapping.n_microbatches(workload.batch),
        "bf16": { "enabled": mapping.precision.compute == Compute::Bf16 },
        "zero_optimization": { "stage": mapping.zero.stage },
    });
    if let Some(group) = mapping.zero.group {
        refuse(mapping.zero.stage < 3, "groups of ZeRO 1 and 2", target)?;
        config["zero_optimization"]["zero_hpz_partition_size"] = json!(group);
    }
    if mapping.offload.optimizer {
        config["zero_optimization"]["offload_optimizer"] = json!({ "device": "cpu" });
    }
    if mapping.cp > 1 {
        config["sequence_parallel_size"] = json!(mapping.cp);
    }
    if mapping.tp > 1 {
        config["tensor_parallel"] = json!({ "autotp_size": mapping.tp });
    }
    Ok(format!("{config:#}\n"))
}
