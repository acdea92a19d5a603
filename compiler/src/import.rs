//! Reads models as Hugging Face publishes them.
//!
//! Enters: the text of a `config.json`. Leaves: a [`DecoderConfig`], the [`WeightMap`] of its
//! safetensors checkpoint, and notes about what was left out on purpose.
//! Invariant: every field of the config is honored, refused by name, or on a list of fields that do
//! not change what the model computes; nothing is guessed. Where the library has a default for a
//! missing field, that default is taken.
//!
//! Source of the fields' meaning: `transformers` 5.23 and 4.x, `models/*/configuration_*.py` and
//! `modeling_*.py`.

mod families;
mod fields;
mod rope;
mod weights;

use meshweave_dsl::graph::Graph;
use meshweave_dsl::weights::{WeightError, WeightMap};

use crate::model::{DecoderConfig, Goal, ModelError, build_decoder};

/// Why a model cannot be imported.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ImportError {
    /// The file is malformed or contradicts itself.
    #[error("{0}")]
    Invalid(String),
    /// The file is meaningful, but asks for something that is not implemented.
    #[error("{0}")]
    Unsupported(String),
    /// A rule for this family does not fit its own model.
    #[error("internal error in the import: {0}")]
    Internal(String),
}

impl From<ModelError> for ImportError {
    fn from(error: ModelError) -> Self {
        match error {
            ModelError::Invalid(message) => Self::Invalid(message),
            ModelError::Unsupported(message) => Self::Unsupported(message),
            ModelError::Internal(error) => Self::Internal(error.to_string()),
        }
    }
}

impl From<WeightError> for ImportError {
    fn from(error: WeightError) -> Self {
        Self::Internal(error.to_string())
    }
}

/// A model as it was published.
#[derive(Clone, Debug, PartialEq)]
pub struct Imported {
    pub config: DecoderConfig,
    /// Where the checkpoint has each parameter.
    pub weights: WeightMap,
    /// What the config asks for that no graph contains (dropout, auxiliary losses, …), for people.
    pub notes: Vec<String>,
}

/// Reads a `config.json`; `name` (its path) is for messages.
///
/// # Errors
/// [`ImportError::Invalid`] for text that is no JSON (with line and column), missing fields and fields
/// of the wrong type; [`ImportError::Unsupported`] for unknown architectures, unknown fields and values
/// that are not implemented.
///
/// ```
/// use meshweave_compiler::import::read_config;
/// use meshweave_compiler::model::{Goal, build_decoder};
///
/// let text = r#"{
///   "model_type": "llama", "architectures": ["LlamaForCausalLM"],
///   "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
///   "num_key_value_heads": 2, "vocab_size": 100, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
///   "hidden_act": "silu", "tie_word_embeddings": true
/// }"#;
/// let imported = read_config("config.json", text)?;
/// let graph = build_decoder(&imported.config, 1, 16, Goal::Logits)?;
/// assert_eq!(imported.weights.sources["layers[1].attn.wq"].names, ["model.layers.1.self_attn.q_proj.weight"]);
/// assert_eq!(graph.n_params(), 100 * 64 + 2 * (64 * 64 * 3 + 64 * 96 * 3 + 2 * 64) + 64);
/// # Ok::<(), meshweave_compiler::import::ImportError>(())
/// ```
pub fn read_config(name: &str, text: &str) -> Result<Imported, ImportError> {
    let mut fields = fields::Fields::parse(name, text)?;
    let family = families::family(&mut fields)?;
    let (config, options) = families::decoder(family, &mut fields)?;
    let notes = fields.finish(family)?;
    config.check()?;
    // One token suffices: parameters do not depend on the size of a step.
    let graph: Graph = build_decoder(&config, 1, 1, Goal::Logits)?;
    let weights = weights::weight_map(family, &config, options, &graph)?;
    weights.check(&graph)?;
    Ok(Imported {
        config,
        weights,
        notes,
    })
}

#[cfg(test)]
mod tests;
