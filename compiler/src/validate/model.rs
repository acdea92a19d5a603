//! The model of a row.
//!
//! Enters: sizes, and words about the architecture. Leaves: a decoder's config.
//! Invariant: what a row does not say is what its family of models has; what its parameters decide
//! (whether feed-forward blocks are gated, heads tied) is decided by them.

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{RopeScaling, RopeTable};

use super::table::{Row, number_after, number_before};
use crate::model::{
    Activation, AttentionBias, AttentionConfig, DecoderConfig, FfnConfig, Mla, MoeConfig, Norm,
    NormKind, Positions, Router, SharedExperts,
};
use crate::plan::estimate::Parameters;

/// A model, and what its config does not hold.
pub(super) struct RowModel {
    pub config: DecoderConfig,
    pub prediction_layers: usize,
    pub window_every: usize,
}

/// Models of which rows often leave sizes out: (name, layers, hidden, heads, key heads, feed-forward width, vocabulary).
const KNOWN: [(&str, [usize; 6]); 14] = [
    ("llama-3.1-405b", [126, 16384, 128, 8, 53248, 128_256]),
    ("llama3.1-405b", [126, 16384, 128, 8, 53248, 128_256]),
    ("llama3-405b", [126, 16384, 128, 8, 53248, 128_256]),
    ("llama3-70b", [80, 8192, 64, 8, 28672, 128_256]),
    ("llama3-8b", [32, 4096, 32, 8, 14336, 128_256]),
    ("llama3.1-70b", [80, 8192, 64, 8, 28672, 128_256]),
    ("llama3.1-8b", [32, 4096, 32, 8, 14336, 128_256]),
    ("llama2-70b", [80, 8192, 64, 8, 28672, 32_000]),
    ("llama2-13b", [40, 5120, 40, 40, 13824, 32_000]),
    ("llama2-7b", [32, 4096, 32, 32, 11008, 32_000]),
    ("mistral-7b", [32, 4096, 32, 8, 14336, 32_000]),
    ("gpt3-175b", [96, 12288, 96, 96, 49152, 51_200]),
    ("gpt-175b", [96, 12288, 96, 96, 49152, 51_200]),
    ("bloom-176b", [70, 14336, 112, 112, 57344, 250_880]),
];

/// Reads the model of a row.
///
/// # Errors
/// The size that is missing or contradicts another.
pub(super) fn model(row: Row<'_>) -> Result<RowModel, String> {
    let name = row.text("model").unwrap_or("model");
    let lower = name.to_ascii_lowercase().replace(' ', "-");
    let known = KNOWN.iter().find(|(known, _)| lower.starts_with(known));
    let size = |column: &str, idx: usize| {
        row.count(column)
            .or_else(|| known.map(|(_, sizes)| sizes[idx]))
    };
    let need = |value: Option<usize>, column: &str| {
        value
            .ok_or_else(|| format!("`{column}` is blank and `{name}` is not a model known by name"))
    };
    let n_layers = need(size("layers", 0), "layers")?;
    let embed = need(size("hidden", 1), "hidden")?;
    let heads = need(size("heads", 2), "heads")?;
    let kv_heads = size("kv_heads", 3)
        .or_else(|| noted(row, "kv="))
        .filter(|kv_heads| heads.is_multiple_of(*kv_heads))
        .unwrap_or(heads);
    let head = row.count("head_dim").unwrap_or((embed / heads).max(1));
    let extra = row.text_or_blank("extra_arch").to_ascii_lowercase();
    let notes = row.text_or_blank("notes").to_ascii_lowercase();
    let is_gpt = [
        "gpt-", "gpt3", "gpt2", "mpt", "opt", "bloom", "bert", "turing", "mt-nlg",
    ]
    .iter()
    .any(|family| lower.starts_with(family))
        && !lower.starts_with("gpt-oss");
    let seq = row.count("seq_len").unwrap_or(2048);
    let n_experts = row.count("experts").filter(|n_experts| *n_experts > 1);
    let moe_ffn = row.count("moe_ffn");
    let ffn = size("ffn_hidden", 4)
        .or_else(|| noted(row, "ffn="))
        .or_else(|| {
            moe_ffn
                .zip(row.count("topk"))
                .map(|(width, top_k)| width * top_k)
        })
        .unwrap_or(4 * embed);
    let vocab = size("vocab", 5).unwrap_or(if is_gpt { 51_200 } else { 32_000 });
    let mla = mla(&extra);
    let moe = n_experts.map(|n_experts| {
        let width = moe_ffn.unwrap_or(ffn);
        MoeConfig {
            n_experts,
            top_k: row.count("topk").unwrap_or(2).min(n_experts),
            ffn: width,
            capacity_factor: 0.0,
            router: Router::Softmax {
                normalize: true,
                scale: 1.0,
                groups: None,
            },
            shared: shared(&extra, width).map(|ffn| SharedExperts { ffn, gated: false }),
            dense_layers: (0..dense_layers(&extra).min(n_layers)).collect(),
        }
    });
    let tied = if extra.contains("untied") {
        false
    } else {
        extra.contains("tied embeddings") || is_gpt
    };
    let head = mla.as_ref().map_or(head, |mla| mla.nope + mla.rope);
    let mut config = DecoderConfig {
        name: name.to_owned(),
        dtype: DType::Bf16,
        n_layers,
        embed,
        vocab,
        norm: Norm {
            kind: if is_gpt {
                NormKind::Layer
            } else {
                NormKind::Rms
            },
            eps: 1e-5,
        },
        positions: if is_gpt {
            Positions::Learned { n_positions: seq }
        } else {
            Positions::Rope(RopeTable {
                theta: 10_000.0,
                rotary_dim: mla.as_ref().map_or(head, |mla| mla.rope),
                scaling: RopeScaling::None,
            })
        },
        attention: AttentionConfig {
            heads,
            kv_heads: if mla.is_some() { heads } else { kv_heads },
            head,
            bias: AttentionBias::default(),
            qk_norm: lower.starts_with("qwen3"),
            scale: None,
            window: number_after(&extra, "sliding window").map(|window| window as usize),
            mla,
        },
        ffn: FfnConfig {
            width: ffn,
            activation: if is_gpt {
                Activation::GeluTanh
            } else {
                Activation::Silu
            },
            gated: !is_gpt,
            bias: false,
        },
        moe,
        tied,
    };
    if let Some(params) = row.number("params_b").filter(|_| config.moe.is_none()) {
        config.ffn.gated = gated_fits(&config, params * 1e9);
    }
    Ok(RowModel {
        config,
        prediction_layers: number_before(&notes, "mtp layer").map_or(0, |layers| layers as usize),
        window_every: if extra.contains("every other layer") {
            2
        } else {
            1
        },
    })
}

/// A size that the notes hold.
fn noted(row: Row<'_>, word: &str) -> Option<usize> {
    number_after(row.text_or_blank("notes"), word)
        .map(|size| size as usize)
        .filter(|size| *size > 0)
}

/// Whether the parameters are nearer to those of gated blocks than of plain ones.
fn gated_fits(config: &DecoderConfig, params: f64) -> bool {
    let miss = |gated: bool| {
        let mut config = config.clone();
        config.ffn.gated = gated;
        (Parameters::of(&config, 0).total() / params).ln().abs()
    };
    let (gated, plain) = (miss(true), miss(false));
    // A count that fits neither decides nothing.
    if gated.min(plain) > 0.1 {
        config.ffn.gated
    } else {
        gated < plain
    }
}

/// `MLA q_lora1536 kv_lora512 nope128 rope64 v128`, with DeepSeek-V2's sizes for what is missing.
fn mla(extra: &str) -> Option<Mla> {
    if !extra.contains("mla") {
        return None;
    }
    let size = |word: &str| number_after(extra, word).map(|size| size as usize);
    Some(Mla {
        q_rank: size("q_lora").filter(|_| !extra.contains("no q lora")),
        kv_rank: size("kv_lora").unwrap_or(512),
        nope: size("nope").unwrap_or(128),
        rope: size("rope64").map_or_else(|| size(" rope").unwrap_or(64), |_| 64),
        value: size(" v").unwrap_or(128),
        eps: 1e-6,
    })
}

/// Width of all shared experts: `shared expert ffn 20480`, or so many of an expert's width.
fn shared(extra: &str, width: usize) -> Option<usize> {
    if !extra.contains("shared expert") {
        return None;
    }
    number_after(extra, "shared expert ffn")
        .or_else(|| number_before(extra, "shared expert").map(|count| count * width as f64))
        .or(Some(width as f64))
        .map(|width| width as usize)
}

/// `first 3 layers dense`, `first layer dense`.
fn dense_layers(extra: &str) -> usize {
    if extra.contains("first layer dense") {
        return 1;
    }
    number_before(extra, "layers dense").map_or(0, |layers| layers as usize)
}
