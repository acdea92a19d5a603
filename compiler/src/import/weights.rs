//! Where each family's checkpoint has the parameters.
//!
//! Invariant: sizes come from the graph's parameters; the rules here only say in which order a
//! checkpoint lays them.
//!
//! The families but GPT-2 store projections as [out, in]; ours are [in, out].

use meshweave_dsl::graph::{Graph, TensorType};
use meshweave_dsl::weights::{WeightError, WeightMap, WeightSource};

use super::ImportError;
use super::families::{Family, Options};
use crate::model::DecoderConfig;

/// `None` where the family has no such parameter.
type Sourced = Result<Option<WeightSource>, ImportError>;

/// The sources of all parameters of the graph.
pub(super) fn weight_map(
    family: Family,
    config: &DecoderConfig,
    options: Options,
    graph: &Graph,
) -> Result<WeightMap, ImportError> {
    let rules = Rules {
        family,
        config,
        options,
    };
    let mut map = WeightMap {
        prefixes: match family {
            // Checkpoints of the bare model lack the prefix.
            Family::Gpt2 => vec!["transformer.".into(), String::new()],
            _ => vec![String::new()],
        },
        ..WeightMap::default()
    };
    for id in graph.params() {
        let tensor = graph.tensor(id);
        let source = rules.source(&tensor.name, &tensor.ty)?;
        map.sources.insert(tensor.name.clone(), source);
    }
    if config.tied {
        map.ignored.push("lm_head.weight".into());
    }
    match family {
        // The causal mask, stored by old releases.
        Family::Gpt2 => map
            .ignored
            .extend(["h.*.attn.bias".into(), "h.*.attn.masked_bias".into()]),
        Family::DeepseekV3 => map
            .ignored
            .push(format!("model.layers.{}.*", config.n_layers)),
        _ => {}
    }
    if family != Family::Gpt2 {
        map.ignored
            .push("model.layers.*.self_attn.rotary_emb.inv_freq".into());
    }
    Ok(map)
}

struct Rules<'a> {
    family: Family,
    config: &'a DecoderConfig,
    options: Options,
}

impl Rules<'_> {
    fn source(&self, param: &str, ty: &TensorType) -> Result<WeightSource, ImportError> {
        let sizes: Vec<usize> = ty.shape.iter().map(|(_, size)| *size).collect();
        let layer = param
            .strip_prefix("layers[")
            .and_then(|rest| rest.split_once("]."));
        let source = match (self.family, layer) {
            (Family::Gpt2, None) => gpt2_ends(param, sizes)?,
            (Family::Gpt2, Some((layer, part))) => self.gpt2_layer(layer, part, sizes)?,
            (_, None) => match param {
                "embed.wte" => Some(WeightSource::new("model.embed_tokens.weight", sizes)),
                "final.norm" => Some(WeightSource::new("model.norm.weight", sizes)),
                "final.head" => Some(linear("lm_head.weight", &sizes, 1)?),
                _ => None,
            },
            (_, Some((layer, part))) => self.layer(layer, part, sizes)?,
        };
        source.ok_or_else(|| {
            ImportError::Internal(format!(
                "no rule for parameter `{param}` of {}",
                self.family.model_type()
            ))
        })
    }

    fn layer(&self, layer: &str, part: &str, sizes: Vec<usize>) -> Sourced {
        let at = |rest: &str| format!("model.layers.{layer}.{rest}");
        if let Some(part) = part.strip_prefix("attn.") {
            if self.config.attention.mla.is_some()
                && let Some(source) = self.latent(&at("self_attn"), part, &sizes)?
            {
                return Ok(Some(source));
            }
            let plain = |name: &str| WeightSource::new(at(name), sizes.clone());
            return Ok(Some(match part {
                "norm" => plain("input_layernorm.weight"),
                "wq" => linear(at("self_attn.q_proj.weight"), &sizes, 1)?,
                "wk" => linear(at("self_attn.k_proj.weight"), &sizes, 1)?,
                "wv" => linear(at("self_attn.v_proj.weight"), &sizes, 1)?,
                "wo" => linear(at("self_attn.o_proj.weight"), &sizes, sizes.len() - 1)?,
                "bq" => flat(at("self_attn.q_proj.bias"), &sizes)?,
                "bk" => flat(at("self_attn.k_proj.bias"), &sizes)?,
                "bv" => flat(at("self_attn.v_proj.bias"), &sizes)?,
                "bo" => plain("self_attn.o_proj.bias"),
                "q_norm" => plain("self_attn.q_norm.weight"),
                "k_norm" => plain("self_attn.k_norm.weight"),
                _ => return Ok(None),
            }));
        }
        // The block's name, with or without experts.
        let block = match self.family {
            Family::Mixtral => "block_sparse_moe",
            _ => "mlp",
        };
        if let Some(part) = part.strip_prefix("moe.experts.") {
            let [n_experts, rest @ ..] = sizes.as_slice() else {
                return Ok(None);
            };
            let Some(name) = projection(self.family == Family::Mixtral, part) else {
                return Ok(None);
            };
            let names = (0..*n_experts)
                .map(|expert| at(&format!("{block}.experts.{expert}.{name}.weight")))
                .collect();
            return Ok(Some(linear("", rest, 1)?.stack(names)));
        }
        if let Some(part) = part.strip_prefix("moe.shared.") {
            let shared = match self.family {
                Family::Qwen2Moe => "mlp.shared_expert",
                _ => "mlp.shared_experts",
            };
            if part == "ws" {
                return Ok(Some(
                    WeightSource::new(
                        at("mlp.shared_expert_gate.weight"),
                        [1, sizes.iter().product()],
                    )
                    .first_of(0)?,
                ));
            }
            let Some(name) = projection(false, part) else {
                return Ok(None);
            };
            let name = at(&format!("{shared}.{name}.weight"));
            return Ok(Some(linear(name, &sizes, 1)?));
        }
        let Some((_, part)) = part.split_once('.') else {
            return Ok(None);
        };
        Ok(Some(match part {
            "norm" => WeightSource::new(at("post_attention_layernorm.weight"), sizes),
            "router" => linear(at(&format!("{block}.gate.weight")), &sizes, 1)?,
            "router_bias" => WeightSource::new(at("mlp.gate.e_score_correction_bias"), sizes),
            _ => {
                let Some(name) = projection(false, &part.replacen('b', "w", 1)) else {
                    return Ok(None);
                };
                let is_bias = part.starts_with('b');
                let kind = if is_bias { "bias" } else { "weight" };
                let name = at(&format!("mlp.{name}.{kind}"));
                if is_bias {
                    WeightSource::new(name, sizes)
                } else {
                    linear(name, &sizes, 1)?
                }
            }
        }))
    }

    /// The weights of latent attention: ours are apart where the checkpoint's are joined.
    fn latent(&self, at: &str, part: &str, sizes: &[usize]) -> Sourced {
        let Some(mla) = &self.config.attention.mla else {
            return Ok(None);
        };
        let heads = self.config.attention.heads;
        let rotated = |source: WeightSource, dim: usize| {
            if self.options.interleaved {
                source.deinterleave(dim)
            } else {
                Ok(source)
            }
        };
        let first = sizes.first().copied().unwrap_or(0);
        let q_name = match mla.q_rank {
            None => format!("{at}.q_proj.weight"),
            Some(_) => format!("{at}.q_b_proj.weight"),
        };
        // [heads · (a + b), in] as [in, heads, len of them from start]
        let of_heads = |name: String, width: usize, start: usize, len: usize| {
            WeightSource::new(name, [heads * width, first])
                .split(0, &[heads, width])?
                .slice(1, start, len)?
                .permute(&[2, 0, 1])
        };
        let kv_name = format!("{at}.kv_b_proj.weight");
        let kv_a = WeightSource::new(
            format!("{at}.kv_a_proj_with_mqa.weight"),
            [mla.kv_rank + mla.rope, first],
        );
        Ok(Some(match part {
            "wq_a" => linear(format!("{at}.q_a_proj.weight"), sizes, 1)?,
            "q_a_norm" => WeightSource::new(format!("{at}.q_a_layernorm.weight"), sizes),
            "wq_nope" => of_heads(q_name, mla.nope + mla.rope, 0, mla.nope)?,
            "wq_rope" => rotated(
                of_heads(q_name, mla.nope + mla.rope, mla.nope, mla.rope)?,
                2,
            )?,
            "wkv_a" => kv_a.slice(0, 0, mla.kv_rank)?.permute(&[1, 0])?,
            "kv_a_norm" => WeightSource::new(format!("{at}.kv_a_layernorm.weight"), sizes),
            "wk_rope" => rotated(kv_a.slice(0, mla.kv_rank, mla.rope)?.permute(&[1, 0])?, 1)?,
            "wk_nope" => of_heads(kv_name, mla.nope + mla.value, 0, mla.nope)?,
            "wv" => of_heads(kv_name, mla.nope + mla.value, mla.nope, mla.value)?,
            _ => return Ok(None),
        }))
    }

    /// GPT-2 stores [in, out], and q, k and v as one.
    fn gpt2_layer(&self, layer: &str, part: &str, sizes: Vec<usize>) -> Sourced {
        let at = |rest: &str| format!("h.{layer}.{rest}");
        let embed = self.config.embed;
        // A third of the outputs; the other dims of ours follow in order.
        let third = |idx: usize| {
            WeightSource::new(at("attn.c_attn.weight"), [embed, 3 * embed])
                .slice(1, idx * embed, embed)?
                .split(1, &sizes[1..])
        };
        let third_bias = |idx: usize| {
            WeightSource::new(at("attn.c_attn.bias"), [3 * embed])
                .slice(0, idx * embed, embed)?
                .split(0, &sizes)
        };
        let plain = |name: &str| WeightSource::new(at(name), sizes.clone());
        Ok(Some(match part {
            "attn.norm" => plain("ln_1.weight"),
            "attn.norm_bias" => plain("ln_1.bias"),
            "attn.wq" => third(0)?,
            "attn.wk" => third(1)?,
            "attn.wv" => third(2)?,
            "attn.bq" => third_bias(0)?,
            "attn.bk" => third_bias(1)?,
            "attn.bv" => third_bias(2)?,
            "attn.wo" => WeightSource::new(at("attn.c_proj.weight"), [embed, embed])
                .split(0, &sizes[..sizes.len() - 1])?,
            "attn.bo" => plain("attn.c_proj.bias"),
            "mlp.norm" => plain("ln_2.weight"),
            "mlp.norm_bias" => plain("ln_2.bias"),
            "mlp.wu" => plain("mlp.c_fc.weight"),
            "mlp.bu" => plain("mlp.c_fc.bias"),
            "mlp.wd" => plain("mlp.c_proj.weight"),
            "mlp.bd" => plain("mlp.c_proj.bias"),
            _ => return Ok(None),
        }))
    }
}

fn gpt2_ends(param: &str, sizes: Vec<usize>) -> Sourced {
    Ok(Some(match param {
        "embed.wte" => WeightSource::new("wte.weight", sizes),
        "embed.wpe" => WeightSource::new("wpe.weight", sizes),
        "final.norm" => WeightSource::new("ln_f.weight", sizes),
        "final.norm_bias" => WeightSource::new("ln_f.bias", sizes),
        "final.head" => linear("lm_head.weight", &sizes, 1)?,
        _ => return Ok(None),
    }))
}

/// The name of a projection of a gated block.
fn projection(is_mixtral: bool, part: &str) -> Option<&'static str> {
    match (part, is_mixtral) {
        ("wg", false) => Some("gate_proj"),
        ("wu", false) => Some("up_proj"),
        ("wd", false) => Some("down_proj"),
        ("wg", true) => Some("w1"),
        ("wu", true) => Some("w3"),
        ("wd", true) => Some("w2"),
        _ => None,
    }
}

/// A parameter whose first `n_in` dims are inputs and the others outputs, stored as [out, in].
fn linear(
    name: impl Into<String>,
    sizes: &[usize],
    n_in: usize,
) -> Result<WeightSource, WeightError> {
    let (inputs, outputs) = sizes.split_at(n_in.min(sizes.len()));
    let shape = [outputs.iter().product(), inputs.iter().product()];
    let n_out = outputs.len();
    let order: Vec<usize> = (n_out..sizes.len()).chain(0..n_out).collect();
    WeightSource::new(name, shape)
        .split(1, inputs)?
        .split(0, outputs)?
        .permute(&order)
}

/// A parameter of several dims that is stored as a vector.
fn flat(name: String, sizes: &[usize]) -> Result<WeightSource, WeightError> {
    WeightSource::new(name, [sizes.iter().product::<usize>()]).split(0, sizes)
}
