//! The model of a row.
//!
//! Enters: sizes, and words about the architecture. Leaves: a decoder's config.
//! Invariant: what a row does not say is what its family of models has; what its parameters decide
//! (whether feed-forward blocks are gated, heads tied) is decided by them.

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{RopeScaling, RopeTable};

use super::known;
use super::table::{Row, number_after, number_before};
use crate::model::{
    Activation, AttentionBias, AttentionConfig, DecoderConfig, FfnConfig, Mla, MoeConfig, Norm,
    NormKind, Positions, Router, RouterLosses, SharedExperts,
};
use crate::plan::estimate::Parameters;

/// A model, and what its config does not hold.
pub(super) struct RowModel {
    pub config: DecoderConfig,
    pub prediction_layers: usize,
    pub window_every: usize,
}

/// Reads the model of a row.
///
/// # Errors
/// The size that is missing or contradicts another.
pub(super) fn model(row: Row<'_>) -> Result<RowModel, String> {
    let name = row.text("model").unwrap_or("model");
    let lower = name.to_ascii_lowercase().replace(' ', "-");
    if let Some((_, why)) = known::UNLIKE.iter().find(|(word, _)| lower.contains(word)) {
        return Err(format!("`{name}` is not priced: {why}"));
    }
    let known = known::find(&lower);
    let size = |column: &str, idx: usize| {
        row.count(column)
            .or_else(|| known.map(|known| known.sizes[idx]))
    };
    let need = |value: Option<usize>, column: &str| {
        value
            .ok_or_else(|| format!("`{column}` is blank and `{name}` is not a model known by name"))
    };
    // A table of stages says how many layers one has.
    let of_stages = || Some(row.count("layers_per_stage")? * row.count("pp")?);
    let n_layers = need(size("layers", 0).or_else(of_stages), "layers")?;
    let embed = need(size("hidden", 1), "hidden")?;
    let heads = need(size("heads", 2), "heads")?;
    let kv_heads = size("kv_heads", 3)
        .or_else(|| noted(row, "kv="))
        .filter(|kv_heads| heads.is_multiple_of(*kv_heads))
        .unwrap_or(heads);
    let extra = row
        .text("extra_arch")
        .or_else(|| known.map(|known| known.extra))
        .unwrap_or_default()
        .to_ascii_lowercase();
    let stated = |column: &str| {
        row.count(column)
            .or_else(|| number_after(&extra, &format!("{column} ")).map(|size| size as usize))
    };
    let head = stated("head_dim").unwrap_or((embed / heads).max(1));
    let notes = row.text_or_blank("notes").to_ascii_lowercase();
    let is_gpt = [
        "gpt-", "gpt3", "gpt2", "mpt", "opt", "bloom", "bert", "turing", "mt-nlg",
    ]
    .iter()
    .any(|family| lower.starts_with(family))
        && !lower.starts_with("gpt-oss");
    let seq = row.count("seq_len").unwrap_or(2048);
    let n_experts = stated("experts").filter(|n_experts| *n_experts > 1);
    let moe_ffn = stated("moe_ffn");
    let top_k = stated("topk");
    let vocab = size("vocab", 5).unwrap_or(if is_gpt { 51_200 } else { 32_000 });
    let stated_ffn = row
        .count("ffn_hidden")
        .or_else(|| noted(row, "ffn="))
        .or_else(|| size("ffn_hidden", 4))
        .or_else(|| moe_ffn.zip(top_k).map(|(width, top_k)| width * top_k));
    let ffn = stated_ffn.unwrap_or(4 * embed);
    let mla = mla(&extra);
    let moe = n_experts.map(|n_experts| {
        let width = moe_ffn.unwrap_or(ffn);
        MoeConfig {
            n_experts,
            top_k: top_k.unwrap_or(2).min(n_experts),
            ffn: width,
            capacity_factor: 0.0,
            subsequences: 1,
            router: Router::Softmax {
                normalize: true,
                scale: 1.0,
                groups: None,
            },
            losses: RouterLosses::default(),
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
        if stated_ffn.is_none() && !is_gpt {
            config.ffn.width = fitting_width(&config, params * 1e9);
        } else {
            config.ffn.gated = gated_fits(&config, params * 1e9);
        }
        if size("vocab", 5).is_none() {
            config.vocab = vocab_fits(&config, params * 1e9);
        }
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

/// The width of gated blocks, in steps of 128, that gives so many parameters.
fn fitting_width(config: &DecoderConfig, params: f64) -> usize {
    let of_width = |width: usize| {
        let mut config = config.clone();
        config.ffn.width = width;
        Parameters::of(&config, 0).total()
    };
    let (none, step) = (of_width(0), of_width(128) - of_width(0));
    let n_steps = ((params - none) / step).round();
    // Wider than eight times the stream or narrower than it is no feed-forward block of a decoder.
    if (1.0..8.0).contains(&(n_steps * 128.0 / config.embed as f64)) {
        n_steps as usize * 128
    } else {
        config.ffn.width
    }
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

/// The usual vocabulary with which the parameters are nearest.
fn vocab_fits(config: &DecoderConfig, params: f64) -> usize {
    let miss = |vocab: usize| {
        let mut config = config.clone();
        config.vocab = vocab;
        (Parameters::of(&config, 0).total() - params).abs()
    };
    let usual = [config.vocab, 32_000, 50_304, 51_200, 128_256];
    let nearest = usual
        .into_iter()
        .min_by(|a, b| miss(*a).total_cmp(&miss(*b)));
    nearest.unwrap_or(config.vocab)
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
