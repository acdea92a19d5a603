//! The families of models, and how each reads its config.

use std::collections::BTreeSet;

use meshweave_dsl::dtype::DType;

use super::ImportError;
use super::fields::Fields;
use super::rope::rope;
use crate::model::{
    Activation, AttentionBias, AttentionConfig, DecoderConfig, FfnConfig, Mla, MoeConfig, Norm,
    NormKind, Positions, Router, RouterLosses, SharedExperts,
};

type Read<T> = Result<T, ImportError>;

/// A `model_type` that can be imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Llama,
    Mistral,
    Gpt2,
    Qwen2,
    Qwen3,
    Mixtral,
    Qwen2Moe,
    Qwen3Moe,
    DeepseekV2,
    DeepseekV3,
}

impl Family {
    const ALL: [Self; 10] = [
        Self::Llama,
        Self::Mistral,
        Self::Gpt2,
        Self::Qwen2,
        Self::Qwen3,
        Self::Mixtral,
        Self::Qwen2Moe,
        Self::Qwen3Moe,
        Self::DeepseekV2,
        Self::DeepseekV3,
    ];

    /// The value of `model_type`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Gpt2 => "gpt2",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Mixtral => "mixtral",
            Self::Qwen2Moe => "qwen2_moe",
            Self::Qwen3Moe => "qwen3_moe",
            Self::DeepseekV2 => "deepseek_v2",
            Self::DeepseekV3 => "deepseek_v3",
        }
    }

    /// The class of its language model.
    fn architecture(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Gpt2 => "GPT2LMHeadModel",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::Mixtral => "MixtralForCausalLM",
            Self::Qwen2Moe => "Qwen2MoeForCausalLM",
            Self::Qwen3Moe => "Qwen3MoeForCausalLM",
            Self::DeepseekV2 => "DeepseekV2ForCausalLM",
            Self::DeepseekV3 => "DeepseekV3ForCausalLM",
        }
    }
}

/// What the weights need to know beyond the config.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Options {
    /// The rotated elements of q and k are stored as pairs, not as halves.
    pub interleaved: bool,
}

/// The family that a config names.
pub(super) fn family(fields: &mut Fields) -> Read<Family> {
    let model_type = fields.opt_text("model_type")?;
    let architectures = fields.texts("architectures")?.unwrap_or_default();
    let known = || {
        let types: Vec<&str> = Family::ALL.iter().map(|f| f.model_type()).collect();
        format!("known: {}", types.join(", "))
    };
    let by_class = |class: &String| {
        Family::ALL
            .into_iter()
            .find(|family| family.architecture() == class)
    };
    let family = match &model_type {
        Some(model_type) => Family::ALL
            .into_iter()
            .find(|family| family.model_type() == model_type)
            .ok_or_else(|| {
                fields.unsupported("model_type", &format!("\"{model_type}\""), &known())
            })?,
        None => architectures.iter().find_map(by_class).ok_or_else(|| {
            let value = format!("{architectures:?}");
            fields.unsupported("architectures", &value, &known())
        })?,
    };
    match architectures
        .iter()
        .find(|class| *class != family.architecture())
    {
        None => Ok(family),
        Some(class) => Err(fields.unsupported(
            "architectures",
            &format!("\"{class}\""),
            &format!("only {} of {}", family.architecture(), family.model_type()),
        )),
    }
}

/// Reads the fields of a family.
pub(super) fn decoder(family: Family, fields: &mut Fields) -> Read<(DecoderConfig, Options)> {
    if fields.has("quantization_config") {
        fields.note(
            "`quantization_config`: weights are taken as floats; a checkpoint with quantized tensors cannot be read".into(),
        );
    }
    fields.skip(&["quantization_config"]);
    match family {
        Family::Gpt2 => gpt2(fields),
        Family::DeepseekV2 | Family::DeepseekV3 => deepseek(family, fields),
        Family::Llama
        | Family::Mistral
        | Family::Qwen2
        | Family::Qwen3
        | Family::Mixtral
        | Family::Qwen2Moe
        | Family::Qwen3Moe => llama_like(family, fields),
    }
}

const DROPOUT: &str = "no dropout is applied";
const AUXILIARY: &str = "no auxiliary loss is added";

fn llama_like(family: Family, fields: &mut Fields) -> Read<(DecoderConfig, Options)> {
    let embed = fields.usize("hidden_size")?;
    let heads = fields.usize("num_attention_heads")?;
    let n_layers = fields.usize("num_hidden_layers")?;
    let default_head = match family {
        Family::Qwen3 => 128,
        _ => embed / heads.max(1),
    };
    let head = fields.usize_or("head_dim", default_head)?;
    let default_kv_heads = match family {
        Family::Mistral | Family::Mixtral => 8,
        Family::Qwen3Moe => 4,
        _ => heads,
    };
    let kv_heads = if fields.has("num_key_value_heads") {
        fields.usize("num_key_value_heads")?
    } else {
        // An explicit null means one key head per query head.
        let default = if fields.is_null("num_key_value_heads") {
            heads
        } else {
            default_kv_heads
        };
        fields.usize_or("num_key_value_heads", default)?
    };
    let default_theta = match family {
        Family::Mixtral => 1e6,
        _ => 1e4,
    };
    let max_positions = fields.opt_usize("max_position_embeddings")?;
    let rope = rope(fields, head, default_theta, max_positions)?;
    fields.note_unless_zero("attention_dropout", DROPOUT)?;

    let all_biased = match family {
        Family::Llama | Family::Qwen3 | Family::Qwen3Moe => {
            fields.bool_or("attention_bias", false)?
        }
        _ => false,
    };
    let qkv_biased = match family {
        Family::Qwen2 => true,
        Family::Qwen2Moe => fields.bool_or("qkv_bias", true)?,
        _ => all_biased,
    };
    let mlp_bias = family == Family::Llama && fields.bool_or("mlp_bias", false)?;
    let activation = activation(fields, "hidden_act", None)?;
    let width = fields.usize("intermediate_size")?;
    let moe = match family {
        Family::Mixtral => Some(mixtral_experts(fields, width)?),
        Family::Qwen2Moe | Family::Qwen3Moe => qwen_experts(family, fields, n_layers)?,
        _ => None,
    };
    let config = DecoderConfig {
        name: family.model_type().into(),
        dtype: DType::F32,
        n_layers,
        embed,
        vocab: fields.usize("vocab_size")?,
        norm: Norm {
            kind: NormKind::Rms,
            eps: fields.f64("rms_norm_eps")?,
        },
        attention: AttentionConfig {
            heads,
            kv_heads,
            head,
            bias: AttentionBias {
                q: qkv_biased,
                k: qkv_biased,
                v: qkv_biased,
                o: all_biased,
            },
            qk_norm: matches!(family, Family::Qwen3 | Family::Qwen3Moe),
            scale: scale(head, rope.scale),
            window: window(family, fields, n_layers)?,
            mla: None,
        },
        positions: Positions::Rope(rope.table),
        ffn: FfnConfig {
            width,
            activation,
            gated: true,
            bias: mlp_bias,
        },
        moe,
        tied: fields.bool_or("tie_word_embeddings", false)?,
    };
    Ok((config, Options::default()))
}

/// The attention's scale when it is not 1/√head.
fn scale(head: usize, factor: f64) -> Option<f64> {
    (factor != 1.0).then(|| factor / (head as f64).sqrt())
}

/// The sliding window in force, if any layer has one.
fn window(family: Family, fields: &mut Fields, n_layers: usize) -> Read<Option<usize>> {
    let layer_types = fields.texts("layer_types")?;
    if let Some(types) = &layer_types {
        let known = ["full_attention", "sliding_attention"];
        if let Some(other) = types.iter().find(|kind| !known.contains(&kind.as_str())) {
            let value = format!("\"{other}\" for a layer");
            return Err(fields.unsupported("layer_types", &value, "known: full_attention"));
        }
    }
    match family {
        // The window holds for all layers; releases that lack the field had 4096.
        Family::Mistral | Family::Mixtral => {
            let default =
                (family == Family::Mistral && !fields.is_null("sliding_window")).then_some(4096);
            let window = fields.opt_usize("sliding_window")?.or(default);
            Ok(window)
        }
        Family::Qwen2 | Family::Qwen3 | Family::Qwen2Moe | Family::Qwen3Moe => {
            let is_used = fields.bool_or("use_sliding_window", false)?;
            let size = fields.usize_or("sliding_window", 4096)?;
            let first = fields.usize_or("max_window_layers", 28)?;
            let some_layer = match (&layer_types, family) {
                (Some(types), _) => types.iter().any(|kind| kind == "sliding_attention"),
                (None, Family::Qwen2 | Family::Qwen3) => first < n_layers,
                (None, _) => true,
            };
            Ok((is_used && some_layer).then_some(size))
        }
        Family::Llama | Family::Gpt2 | Family::DeepseekV2 | Family::DeepseekV3 => {
            let is_sliding = |types: &Vec<String>| types.iter().any(|t| t == "sliding_attention");
            if layer_types.as_ref().is_some_and(is_sliding) {
                let value = "\"sliding_attention\" for a layer";
                return Err(fields.unsupported("layer_types", value, "only full_attention"));
            }
            Ok(None)
        }
    }
}

fn activation(fields: &mut Fields, key: &str, default: Option<Activation>) -> Read<Activation> {
    let Some(name) = fields.opt_text(key)? else {
        return default.ok_or_else(|| fields.invalid(key, "is missing"));
    };
    match name.as_str() {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        "relu" => Ok(Activation::Relu),
        other => Err(fields.unsupported(
            key,
            &format!("\"{other}\""),
            "known: silu, swish, gelu, gelu_new, gelu_pytorch_tanh, relu",
        )),
    }
}

fn mixtral_experts(fields: &mut Fields, ffn: usize) -> Read<MoeConfig> {
    fields.must_equal("router_jitter_noise", 0.0)?;
    fields.note_unless_zero("router_aux_loss_coef", AUXILIARY)?;
    Ok(MoeConfig {
        n_experts: fields.usize("num_local_experts")?,
        top_k: fields.usize("num_experts_per_tok")?,
        ffn,
        capacity_factor: 0.0,
        subsequences: 1,
        router: Router::Softmax {
            normalize: true,
            scale: 1.0,
            groups: None,
        },
        losses: RouterLosses::default(),
        shared: None,
        dense_layers: BTreeSet::new(),
    })
}

/// `None` when no layer has experts.
fn qwen_experts(family: Family, fields: &mut Fields, n_layers: usize) -> Read<Option<MoeConfig>> {
    fields.note_unless_zero("router_aux_loss_coef", AUXILIARY)?;
    // The library writes the second name for the newer of the two families.
    let n_experts = if fields.has("num_local_experts") {
        fields.usize("num_local_experts")?
    } else {
        fields.usize("num_experts")?
    };
    let step = fields.usize_or("decoder_sparse_step", 1)?;
    if step == 0 {
        return Err(fields.invalid("decoder_sparse_step", "is 0, but must be at least 1"));
    }
    let plain = fields.indices("mlp_only_layers")?.unwrap_or_default();
    let dense_layers: BTreeSet<usize> = (0..n_layers)
        .filter(|layer| plain.contains(layer) || (layer + 1) % step != 0)
        .collect();
    let top_k = fields.usize("num_experts_per_tok")?;
    let ffn = fields.usize("moe_intermediate_size")?;
    let normalize = fields.bool_or("norm_topk_prob", false)?;
    let shared = match family {
        Family::Qwen2Moe => Some(SharedExperts {
            ffn: fields.usize("shared_expert_intermediate_size")?,
            gated: true,
        }),
        _ => None,
    };
    if n_experts == 0 || dense_layers.len() == n_layers {
        return Ok(None);
    }
    Ok(Some(MoeConfig {
        n_experts,
        top_k,
        ffn,
        capacity_factor: 0.0,
        subsequences: 1,
        router: Router::Softmax {
            normalize,
            scale: 1.0,
            groups: None,
        },
        losses: RouterLosses::default(),
        shared,
        dense_layers,
    }))
}

fn gpt2(fields: &mut Fields) -> Read<(DecoderConfig, Options)> {
    let embed = fields.usize("n_embd")?;
    let heads = fields.usize("n_head")?;
    if heads == 0 || !embed.is_multiple_of(heads) {
        let what = format!("of {heads} does not divide `n_embd` of {embed}");
        return Err(fields.invalid("n_head", &what));
    }
    for key in ["attn_pdrop", "embd_pdrop", "resid_pdrop"] {
        fields.note_unless_zero(key, DROPOUT)?;
    }
    fields.must_be_false("scale_attn_by_inverse_layer_idx")?;
    fields.must_be_false("add_cross_attention")?;
    // Numerics of the library, its old spelling of `n_positions`, and heads for other tasks.
    fields.skip(&[
        "n_ctx",
        "reorder_and_upcast_attn",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
    ]);
    let is_scaled = fields.bool_or("scale_attn_weights", true)?;
    let config = DecoderConfig {
        name: Family::Gpt2.model_type().into(),
        dtype: DType::F32,
        n_layers: fields.usize("n_layer")?,
        embed,
        vocab: fields.usize("vocab_size")?,
        norm: Norm {
            kind: NormKind::Layer,
            eps: fields.f64_or("layer_norm_epsilon", 1e-5)?,
        },
        positions: Positions::Learned {
            n_positions: fields.usize("n_positions")?,
        },
        attention: AttentionConfig {
            heads,
            kv_heads: heads,
            head: embed / heads,
            bias: AttentionBias {
                q: true,
                k: true,
                v: true,
                o: true,
            },
            qk_norm: false,
            scale: (!is_scaled).then_some(1.0),
            window: None,
            mla: None,
        },
        ffn: FfnConfig {
            width: fields.usize_or("n_inner", 4 * embed)?,
            activation: activation(fields, "activation_function", Some(Activation::GeluTanh))?,
            gated: false,
            bias: true,
        },
        moe: None,
        tied: fields.bool_or("tie_word_embeddings", true)?,
    };
    Ok((config, Options::default()))
}

fn deepseek(family: Family, fields: &mut Fields) -> Read<(DecoderConfig, Options)> {
    let is_v3 = family == Family::DeepseekV3;
    let embed = fields.usize("hidden_size")?;
    let heads = fields.usize("num_attention_heads")?;
    let kv_heads = fields.usize_or("num_key_value_heads", heads)?;
    let n_layers = fields.usize("num_hidden_layers")?;
    let mla = Mla {
        q_rank: fields.opt_usize("q_lora_rank")?,
        kv_rank: fields.usize("kv_lora_rank")?,
        nope: fields.usize("qk_nope_head_dim")?,
        rope: fields.usize("qk_rope_head_dim")?,
        value: fields.usize("v_head_dim")?,
        // The library builds the norms of the latents with its default, whatever `rms_norm_eps` says.
        eps: 1e-6,
    };
    let head = mla.nope + mla.rope;
    for (key, expected) in [("qk_head_dim", head), ("head_dim", mla.rope)] {
        if let Some(value) = fields.opt_usize(key)?
            && value != expected
        {
            let what = format!("is {value}, but the parts of a head make it {expected}");
            return Err(fields.invalid(key, &what));
        }
    }
    let max_positions = fields.opt_usize("max_position_embeddings")?;
    let rope = rope(fields, mla.rope, 1e4, max_positions)?;
    // V2 rotates pairs, V3 unless it says otherwise.
    let interleaved = !is_v3 || fields.bool_or("rope_interleave", true)?;
    fields.must_be_false("attention_bias")?;
    fields.must_be_false("mlp_bias")?;
    fields.note_unless_zero("attention_dropout", DROPOUT)?;
    if let Some(n) = fields.opt_usize("num_nextn_predict_layers")?
        && n > 0
    {
        fields.note(format!(
            "`num_nextn_predict_layers` is {n}: layers that predict further tokens are left out"
        ));
    }
    fields.skip(&["num_mtp_layers"]);
    let config = DecoderConfig {
        name: family.model_type().into(),
        dtype: DType::F32,
        n_layers,
        embed,
        vocab: fields.usize("vocab_size")?,
        norm: Norm {
            kind: NormKind::Rms,
            eps: fields.f64("rms_norm_eps")?,
        },
        attention: AttentionConfig {
            heads,
            kv_heads,
            head,
            bias: AttentionBias::default(),
            qk_norm: false,
            scale: scale(head, rope.scale),
            window: window(family, fields, n_layers)?,
            mla: Some(mla),
        },
        positions: Positions::Rope(rope.table),
        ffn: FfnConfig {
            width: fields.usize("intermediate_size")?,
            activation: activation(fields, "hidden_act", None)?,
            gated: true,
            bias: false,
        },
        moe: deepseek_experts(family, fields, n_layers)?,
        tied: fields.bool_or("tie_word_embeddings", false)?,
    };
    Ok((config, Options { interleaved }))
}

fn deepseek_experts(
    family: Family,
    fields: &mut Fields,
    n_layers: usize,
) -> Read<Option<MoeConfig>> {
    fields.note_unless_zero("aux_loss_alpha", AUXILIARY)?;
    fields.note_unless_zero("router_aux_loss_coef", AUXILIARY)?;
    let Some(n_experts) = fields.opt_usize("n_routed_experts")? else {
        return Err(fields.invalid("n_routed_experts", "is missing"));
    };
    let ffn = fields.usize("moe_intermediate_size")?;
    let first = fields.usize("first_k_dense_replace")?;
    let every = fields.usize_or("moe_layer_freq", 1)?;
    if every == 0 {
        return Err(fields.invalid("moe_layer_freq", "is 0, but must be at least 1"));
    }
    let dense_layers: BTreeSet<usize> = (0..n_layers)
        .filter(|layer| *layer < first || layer % every != 0)
        .collect();
    let default_shared = match family {
        _ if fields.is_null("n_shared_experts") => 0,
        Family::DeepseekV3 => 1,
        _ => 2,
    };
    let shared = Some(fields.usize_or("n_shared_experts", default_shared)?)
        .filter(|n| *n > 0)
        .map(|n| SharedExperts {
            ffn: n * ffn,
            gated: false,
        });
    let (scoring, method) = match family {
        Family::DeepseekV3 => ("sigmoid", "noaux_tc"),
        _ => ("softmax", "greedy"),
    };
    let scoring_in_force = fields
        .opt_text("scoring_func")?
        .unwrap_or_else(|| scoring.into());
    if scoring_in_force != scoring {
        let value = format!("\"{scoring_in_force}\"");
        return Err(fields.unsupported("scoring_func", &value, &format!("only {scoring}")));
    }
    let method = fields
        .opt_text("topk_method")?
        .unwrap_or_else(|| method.into());
    let (n_groups, kept) = match family {
        Family::DeepseekV3 => (Some(8), Some(4)),
        _ => (None, None),
    };
    let n_groups = fields.opt_usize("n_group")?.or(n_groups);
    let groups = n_groups.zip(fields.opt_usize("topk_group")?.or(kept));
    let scale = fields.f64_or(
        "routed_scaling_factor",
        if family == Family::DeepseekV3 {
            2.5
        } else {
            1.0
        },
    )?;
    let normalize = fields.bool_or("norm_topk_prob", family == Family::DeepseekV3)?;
    let router = match (family, method.as_str()) {
        (Family::DeepseekV3, "noaux_tc") => Router::Sigmoid {
            normalize,
            scale,
            // One group is no limit.
            groups: groups.filter(|(n_groups, _)| *n_groups > 1),
        },
        (Family::DeepseekV2, "greedy" | "group_limited_greedy") if normalize => {
            return Err(fields.unsupported(
                "norm_topk_prob",
                "true",
                "the published code and the library disagree on it for deepseek_v2",
            ));
        }
        (Family::DeepseekV2, "greedy") => Router::Softmax {
            normalize,
            scale,
            groups: None,
        },
        (Family::DeepseekV2, "group_limited_greedy") => {
            let groups = groups.ok_or_else(|| {
                fields.invalid(
                    "n_group",
                    "and `topk_group` are needed by group_limited_greedy",
                )
            })?;
            Router::Softmax {
                normalize,
                scale,
                groups: Some(groups),
            }
        }
        _ => {
            let known =
                "known: greedy and group_limited_greedy of deepseek_v2, noaux_tc of deepseek_v3";
            return Err(fields.unsupported("topk_method", &format!("\"{method}\""), known));
        }
    };
    let top_k = fields.usize("num_experts_per_tok")?;
    if dense_layers.len() == n_layers {
        return Ok(None);
    }
    Ok(Some(MoeConfig {
        n_experts,
        top_k,
        ffn,
        capacity_factor: 0.0,
        subsequences: 1,
        router,
        losses: RouterLosses::default(),
        shared,
        dense_layers,
    }))
}
