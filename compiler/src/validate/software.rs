//! How the program of a row is written.
//!
//! Enters: the source of a row and its notes. Leaves: kernels, and what runs under what.
//! Invariant: these are facts about frameworks, not fits: each follows from what the source or its
//! documentation states.

use meshweave_dsl::cluster::Arch;

use super::table::{Row, number_after};
use crate::plan::estimate::{AttentionKernel, Framework, Software};

/// Year and month of FlashAttention 1's code becoming usual in training programs: half a year after
/// its paper (arXiv 2205.14135).
const FLASH: u32 = 22_12;

/// The software of a row.
pub(super) fn software(row: Row<'_>, arch: Arch) -> Software {
    let source = row.text_or_blank("source").to_ascii_lowercase();
    let notes = row.text_or_blank("notes").to_ascii_lowercase();
    let names = |words: &[&str]| words.iter().any(|word| source.contains(word));
    let says = |words: &[&str]| words.iter().any(|word| notes.contains(word));
    let year_month = arxiv(&source)
        .or_else(|| arxiv(row.text_or_blank("url_or_file")))
        .or_else(|| arxiv(row.text_or_blank("url")))
        .or_else(|| arxiv(&notes));
    let is_fsdp = row.number("zero_stage") == Some(3.0) || says(&["fsdp"]) || names(&["fsdp"]);
    let mut software = if names(&[
        "sc21",
        "zero-bubble",
        "bigscience",
        "bloom",
        "alpa",
        "turing",
        "korthikanti",
    ]) || arch == Arch::Volta
        || year_month.is_some_and(|year_month| year_month < FLASH)
    {
        Software::megatron_2021()
    } else if names(&["bridge", "nemo", "llama-readme"]) {
        // TransformerEngine's kernels, whatever divides the parameters.
        Software {
            overlap_tp: true,
            fused_loss: true,
            dispatch_once_a_node: true,
            ..Software::default()
        }
    } else if names(&["torchtitan"]) {
        // RMSNorm is one kernel; where the model is compiled, the other elementwise ops are too.
        Software {
            fused_norm: true,
            fused_elementwise: says(&["compile"]) && !says(&["no compile", "not compiled"]),
            ..Software::fsdp()
        }
    } else if names(&["deepseek"]) {
        // DeepEP (arXiv 2412.19437, §3.2.2); what runs beside the exchange is DualPipe's to say.
        Software {
            dispatch_once_a_node: true,
            fused_loss: true,
            ..Software::default()
        }
    } else if is_fsdp || names(&["llm-foundry", "mosaic"]) {
        Software::fsdp()
    } else if names(&["hagemann"]) {
        // Aleph Alpha's scaling: `core/nn/mlp.py` multiplies gate and up apart, `core/nn/linear/utils.py`
        // overlaps nothing, `core/optimizer/optimizer.py` reduces whole gradients in f32.
        Software {
            fused_elementwise: false,
            fused_accumulation: false,
            input_gradients: 3.0,
            overlap_tp_backward: false,
            overlap_dp: false,
            reduces_whole: true,
            blocking_p2p: true,
            framework: Framework::SCALING,
            ..Software::default()
        }
    } else if names(&["nanotron", "neox", "frontier", "deepspeed"]) {
        Software {
            attention: AttentionKernel::Flash2,
            overlap_dp: false,
            fused_elementwise: false,
            fused_accumulation: false,
            blocking_p2p: true,
            // `optim/zero.py` divides every parameter over all ranks; asynchronous collectives of `tp`
            // are Python autograd functions of their own.
            piece_s: if names(&["nanotron"]) { 8e-6 } else { 0.0 },
            launch_s: if names(&["nanotron"]) { 20e-6 } else { 10e-6 },
            pipelined_launches: if names(&["nanotron"]) { 3.5 } else { 1.0 },
            ..Software::default()
        }
    } else {
        Software::default()
    };
    if says(&["deepspeed zero-3"]) && !says(&["tiled mlp"]) {
        software.attention = AttentionKernel::FusedSoftmax;
        software.overlap_dp = false;
        software.gathers_a_layer = 12.0;
        software.gather_part = 0.25;
    }
    software.post_validates = names(&["zero-bubble"]);
    if names(&["mosaic", "llm-foundry"]) {
        // MPT's attention is FlashAttention 1 in Triton, for its ALiBi.
        software.attention = AttentionKernel::Flash1;
    }
    if says(&["kernel=torch", "non-flash attention"]) {
        software.attention = AttentionKernel::Unfused;
    } else if says(&["kernel=fused"]) {
        software.attention = AttentionKernel::FusedSoftmax;
    } else if says(&["flash_attentionv1", "flash attention 1"]) {
        software.attention = AttentionKernel::Flash1;
    } else if says(&["kernel=flash_attention2"]) {
        software.attention = AttentionKernel::Flash;
    }
    if says(&["kernel="]) {
        software.fused_norm = says(&["rms kernel"]);
    }
    if says(&["a2a overlapped with compute: yes", "ep comm overlap"]) {
        software.overlap_ep = true;
    }
    // Megatron-Bridge records whole iterations on racks since its release 26.06.
    let table = row.text_or_blank("source_table");
    let release = number_after(table, "").filter(|_| names(&["bridge-docs"]));
    let is_rack = row
        .text_or_blank("gpu")
        .to_ascii_lowercase()
        .starts_with("gb");
    if says(&["cuda graphs"]) || is_rack && release.is_some_and(|release| release >= 26.06) {
        software.launch_s = 0.0;
    }
    software.framework = if names(&["nanotron"]) {
        Framework::NANOTRON
    } else if names(&["hagemann"]) {
        Framework::SCALING
    } else if says(&["tiled mlp"]) {
        Framework::DEEPSPEED_TILED
    } else if says(&["deepspeed"]) || names(&["deepspeed", "stas00"]) {
        Framework::DEEPSPEED
    } else if is_fsdp || names(&["torchtitan", "llm-foundry", "mosaic", "colossal"]) {
        Framework::PYTORCH
    } else if software.attention == AttentionKernel::FusedSoftmax && names(&["zero-bubble", "sc21"])
    {
        Framework::MEGATRON_GPT
    } else {
        Framework::MEGATRON
    };
    software
}

/// Year and month of the first arXiv number in a text: `2311.05610` is 2311.
fn arxiv(text: &str) -> Option<u32> {
    let is_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    let places = text.match_indices('.').map(|(idx, _)| idx);
    let mut numbers = places.filter_map(|idx| {
        let before = text.get(idx.checked_sub(4)?..idx)?;
        let after = text.get(idx + 1..idx + 6)?;
        let is_number = is_digits(before) && is_digits(after);
        before.parse().ok().filter(|_| is_number)
    });
    numbers.find(|number| (701..=9912).contains(number) && (1..=12).contains(&(number % 100)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn papers_have_dates() {
        assert_eq!(arxiv("hagemann-2311.05610"), Some(2311));
        assert_eq!(arxiv("https://arxiv.org/abs/2205.05198"), Some(2205));
        assert_eq!(arxiv("v1.0.8, 42.57%, 2113.05610"), None);
    }
}
