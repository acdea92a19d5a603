//! Plans as configurations of other training systems.
//!
//! Enters: a plan and its graph. Leaves: the text that gives another system the same division of
//! work, where that system can express it.
//! Invariant: what a system cannot say is refused with the tensor or op that shows it; nothing is
//! rounded to the nearest thing that can be said.
//!
//! A mesh axis is recognized by what it divides: the batch (data parallel, with parameters and
//! optimizer state replicated or sharded over it), the parts of weights that Megatron divides
//! (heads, ffn, vocab), experts, or the sequence.

mod mapping;
mod roles;

use serde::{Deserialize, Serialize};
use serde_json::json;

use meshweave_dsl::graph::{Graph, Role};
use meshweave_dsl::plan::Plan;

pub use mapping::export_mapping;
pub use roles::{AxisRole, Parallelism, Sharding, recognize};

/// A plan that cannot be said.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExportError {
    /// Neither system knows such a division, or this one does not.
    #[error("{0}")]
    Unsupported(String),
}

/// Result of exporting.
pub type Result<T> = std::result::Result<T, ExportError>;

/// A system to export to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Command-line flags of Megatron-LM's `pretrain_gpt.py`.
    Megatron,
    /// Sections of a torchtitan TOML file.
    Torchtitan,
    /// A DeepSpeed JSON file.
    Deepspeed,
}

impl Target {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Megatron => "megatron",
            Self::Torchtitan => "torchtitan",
            Self::Deepspeed => "deepspeed",
        }
    }

    /// All targets.
    pub fn all() -> [Self; 3] {
        [Self::Megatron, Self::Torchtitan, Self::Deepspeed]
    }
}

/// The plan in the words of another system. Linear in the size of the graph.
///
/// # Errors
/// `Unsupported`, naming what the target (or any of them) cannot express.
pub fn export(graph: &Graph, plan: &Plan, target: Target) -> Result<String> {
    let parallelism = recognize(graph, plan)?;
    match target {
        Target::Megatron => megatron(graph, &parallelism),
        Target::Torchtitan => torchtitan(graph, &parallelism),
        Target::Deepspeed => deepspeed(graph, &parallelism),
    }
}

/// Sequences and tokens of a step, from the input `tokens`.
fn batch_and_seq(graph: &Graph) -> Result<(usize, usize)> {
    graph
        .tensors
        .iter()
        .find(|tensor| tensor.role == Role::Input && tensor.name == "tokens")
        .and_then(|tensor| {
            Some((
                tensor.ty.size_of(&"batch".into())?,
                tensor.ty.size_of(&"seq".into())?,
            ))
        })
        .ok_or_else(|| {
            ExportError::Unsupported(format!(
                "`{}` has no input `tokens` with the dims batch and seq; only language models are exported",
                graph.name
            ))
        })
}

/// The batch of one data-parallel rank.
fn local_batch(batch: usize, n_data: usize, target: Target) -> Result<usize> {
    if batch.is_multiple_of(n_data) {
        return Ok(batch / n_data);
    }
    Err(ExportError::Unsupported(format!(
        "{batch} sequences over {n_data} data-parallel ranks leave uneven parts, which {} cannot express; make the batch a multiple of {n_data}",
        target.name()
    )))
}

fn megatron(graph: &Graph, parallelism: &Parallelism) -> Result<String> {
    let (batch, seq) = batch_and_seq(graph)?;
    let per_rank = local_batch(batch, parallelism.n_data(), Target::Megatron)?;
    if parallelism
        .sharded
        .is_some_and(|(_, sharding)| sharding != Sharding::OptimizerState)
        && parallelism.replicated > 1
    {
        return Err(ExportError::Unsupported(format!(
            "parameters are sharded over {} ranks and replicated over {}; Megatron-LM shards them over all data-parallel ranks",
            parallelism.sharded.map_or(1, |(degree, _)| degree),
            parallelism.replicated
        )));
    }
    let mut flags = vec![
        format!("--tensor-model-parallel-size {}", parallelism.tensor),
        "--pipeline-model-parallel-size 1".into(),
        format!("--context-parallel-size {}", parallelism.context),
    ];
    if parallelism.sequence {
        flags.push("--sequence-parallel".into());
    }
    if parallelism.expert > 1 {
        flags.push(format!(
            "--expert-model-parallel-size {}",
            parallelism.expert
        ));
    }
    match parallelism.sharded {
        None => {}
        Some((_, Sharding::OptimizerState)) => flags.push("--use-distributed-optimizer".into()),
        Some((_, Sharding::Parameters)) => {
            flags.push("--use-megatron-fsdp".into());
            flags.push("--data-parallel-sharding-strategy optim_grads_params".into());
        }
    }
    flags.push(format!("--micro-batch-size {per_rank}"));
    flags.push(format!("--global-batch-size {batch}"));
    flags.push(format!("--seq-length {seq}"));
    Ok(format!("{}\n", flags.join(" \\\n")))
}

fn torchtitan(graph: &Graph, parallelism: &Parallelism) -> Result<String> {
    let (batch, seq) = batch_and_seq(graph)?;
    let per_rank = local_batch(batch, parallelism.n_data(), Target::Torchtitan)?;
    let shard = match parallelism.sharded {
        None => 1,
        Some((degree, Sharding::Parameters)) => degree,
        Some((_, Sharding::OptimizerState)) => {
            return Err(ExportError::Unsupported(
                "optimizer state is sharded while parameters are replicated (ZeRO-1), which torchtitan cannot express; shard the parameters too (zero(3))".into(),
            ));
        }
    };
    if parallelism.tensor > 1 && !parallelism.sequence {
        return Err(ExportError::Unsupported(
            "torchtitan shards the sequence between tensor-parallel blocks, this plan replicates it there; shard seq over that axis between blocks".into(),
        ));
    }
    if parallelism.expert > 1 && !(shard * parallelism.tensor).is_multiple_of(parallelism.expert) {
        return Err(ExportError::Unsupported(format!(
            "torchtitan takes the {} expert-parallel ranks from the {shard} that shard parameters",
            parallelism.expert
        )));
    }
    Ok(format!(
        "[training]\nlocal_batch_size = {per_rank}\nglobal_batch_size = {batch}\nseq_len = {seq}\n\n\
         [parallelism]\ndata_parallel_replicate_degree = {}\ndata_parallel_shard_degree = {shard}\n\
         tensor_parallel_degree = {}\ncontext_parallel_degree = {}\npipeline_parallel_degree = 1\n\
         expert_parallel_degree = {}\ndisable_loss_parallel = {}\n",
        parallelism.replicated,
        parallelism.tensor,
        parallelism.context,
        parallelism.expert,
        !parallelism.vocab,
    ))
}

fn deepspeed(graph: &Graph, parallelism: &Parallelism) -> Result<String> {
    let (batch, _) = batch_and_seq(graph)?;
    let per_rank = local_batch(batch, parallelism.n_data(), Target::Deepspeed)?;
    for (degree, what) in [
        (parallelism.context, "context parallelism"),
        (
            parallelism.expert,
            "expert parallelism (the model's code sets it)",
        ),
    ] {
        if degree > 1 {
            return Err(ExportError::Unsupported(format!(
                "the plan uses {what} over {degree} ranks, which a DeepSpeed configuration cannot express"
            )));
        }
    }
    if parallelism.sequence {
        return Err(ExportError::Unsupported(
            "the sequence is sharded between tensor-parallel blocks, which a DeepSpeed configuration cannot express".into(),
        ));
    }
    if let Some((degree, _)) = parallelism.sharded
        && parallelism.replicated > 1
    {
        return Err(ExportError::Unsupported(format!(
            "state is sharded over {degree} ranks and replicated over {}; DeepSpeed shards it over all data-parallel ranks",
            parallelism.replicated
        )));
    }
    let stage = match parallelism.sharded {
        None => 0,
        Some((_, Sharding::OptimizerState)) => 1,
        Some((_, Sharding::Parameters)) => 3,
    };
    let mut config = json!({
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": per_rank,
        "gradient_accumulation_steps": 1,
        "zero_optimization": { "stage": stage },
    });
    if parallelism.tensor > 1 {
        config["tensor_parallel"] = json!({ "autotp_size": parallelism.tensor });
    }
    Ok(format!("{config:#}\n"))
}
