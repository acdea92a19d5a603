//! Routing traces: which experts every token chose in every layer of a mixture-of-experts model.
//!
//! Enters: tokens as a recorder saw them, files of ours ([`file`]) or of other engines ([`import`]),
//! or the parameters of a synthetic router ([`synth`]). Leaves: the choices, token by token, and
//! what placement needs of them ([`statistics`]).
//! Invariant: every choice is an expert below `experts` or [`NO_EXPERT`]; the experts of one token
//! in one layer differ; weights, where recorded, are finite and not negative.

pub mod file;
pub mod import;
pub mod statistics;
pub mod synth;

use serde::{Deserialize, Serialize};

/// What a trace says wrongly.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TraceError {
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Exhausted(String),
    #[error("{0}")]
    Unsupported(String),
    #[error("{0}")]
    Internal(String),
}

/// Marks a slot that holds no expert: a dropped token, or a position that was not recorded.
pub const NO_EXPERT: u16 = u16::MAX;

/// The greatest number of experts a trace can name.
pub const MOST_EXPERTS: usize = NO_EXPERT as usize;

/// The sizes of the router that a trace was recorded from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceShape {
    /// Layers with experts, in model order; dense layers are not counted.
    pub layers: usize,
    /// Experts a layer, without shared ones.
    pub experts: usize,
    /// Experts a token chooses in a layer.
    pub top_k: usize,
}

impl TraceShape {
    /// Checks that every size can occur.
    ///
    /// # Errors
    /// A size is 0, `top_k` exceeds the experts, or there are too many experts.
    pub fn check(self) -> Result<(), TraceError> {
        let Self {
            layers,
            experts,
            top_k,
        } = self;
        if layers == 0 || experts == 0 || top_k == 0 {
            return Err(TraceError::Invalid(format!(
                "a trace of {layers} layers, {experts} experts and top-{top_k} routes nothing; \
                 all three are at least 1"
            )));
        }
        if top_k > experts {
            return Err(TraceError::Invalid(format!(
                "a token cannot choose {top_k} of {experts} experts; lower top_k"
            )));
        }
        if experts > MOST_EXPERTS {
            return Err(TraceError::Unsupported(format!(
                "a trace has {experts} experts a layer, at most {MOST_EXPERTS} can be named"
            )));
        }
        Ok(())
    }

    /// Choices of one token: one slot per layer and choice.
    pub fn slots(self) -> usize {
        self.layers * self.top_k
    }
}

/// The choices of a number of tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct RoutingTrace {
    shape: TraceShape,
    model: Option<String>,
    /// Token by token, layer by layer, choice by choice.
    choices: Vec<u16>,
    /// The router's weights, laid out as the choices.
    weights: Option<Vec<f32>>,
}

impl RoutingTrace {
    /// A trace without tokens; `with_weights` says whether tokens will bring the router's weights.
    ///
    /// # Errors
    /// The shape cannot occur.
    pub fn new(shape: TraceShape, model: Option<String>) -> Result<Self, TraceError> {
        shape.check()?;
        Ok(Self {
            shape,
            model,
            choices: Vec::new(),
            weights: None,
        })
    }

    /// The sizes of the router.
    pub fn shape(&self) -> TraceShape {
        self.shape
    }

    /// The model that was recorded, where the recorder said so.
    pub fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    /// Number of tokens.
    pub fn n_tokens(&self) -> usize {
        self.choices.len() / self.shape.slots()
    }

    /// The experts of a token in a layer, `top_k` slots of which some may be [`NO_EXPERT`].
    pub fn chosen(&self, token: usize, layer: usize) -> &[u16] {
        let start = token * self.shape.slots() + layer * self.shape.top_k;
        &self.choices[start..start + self.shape.top_k]
    }

    /// All choices of a token, layer by layer.
    pub fn token(&self, token: usize) -> &[u16] {
        let start = token * self.shape.slots();
        &self.choices[start..start + self.shape.slots()]
    }

    /// The weights of a token, laid out as its choices, where the trace has weights.
    pub fn token_weights(&self, token: usize) -> Option<&[f32]> {
        let start = token * self.shape.slots();
        let weights = self.weights.as_ref()?;
        Some(&weights[start..start + self.shape.slots()])
    }

    /// Adds a token: `choices[layer · top_k + slot]`, and weights laid out alike or none.
    ///
    /// # Errors
    /// The numbers of choices or weights are not `layers · top_k`, an expert does not exist or is
    /// chosen twice in a layer, a weight is not a number, or only some tokens have weights.
    pub fn push(&mut self, choices: &[u16], weights: Option<&[f32]>) -> Result<(), TraceError> {
        let token = self.n_tokens();
        let TraceShape { experts, top_k, .. } = self.shape;
        let expected = self.shape.slots();
        if choices.len() != expected {
            return Err(TraceError::Invalid(format!(
                "token {token} has {} choices, {} layers of top-{top_k} need {expected}",
                choices.len(),
                self.shape.layers,
            )));
        }
        for (layer, chosen) in choices.chunks(top_k).enumerate() {
            for (slot, expert) in chosen.iter().enumerate() {
                if *expert == NO_EXPERT {
                    continue;
                }
                if usize::from(*expert) >= experts {
                    return Err(TraceError::Invalid(format!(
                        "token {token} chose expert {expert} in layer {layer}, the router has \
                         {experts} (0 to {}); is this the trace of another model?",
                        experts - 1
                    )));
                }
                if chosen[..slot].contains(expert) {
                    return Err(TraceError::Invalid(format!(
                        "token {token} chose expert {expert} twice in layer {layer}"
                    )));
                }
            }
        }
        self.check_weights(token, weights)?;
        if let Some(weights) = weights {
            self.weights
                .get_or_insert_with(Vec::new)
                .extend_from_slice(weights);
        }
        self.choices.extend_from_slice(choices);
        Ok(())
    }

    fn check_weights(&self, token: usize, weights: Option<&[f32]>) -> Result<(), TraceError> {
        if token > 0 && weights.is_some() != self.weights.is_some() {
            let (this, others) = if weights.is_some() {
                ("has", "have none")
            } else {
                ("has no", "have")
            };
            return Err(TraceError::Invalid(format!(
                "token {token} {this} weights, the {token} tokens before it {others}; \
                 record weights for all tokens or for none"
            )));
        }
        let Some(weights) = weights else {
            return Ok(());
        };
        if weights.len() != self.shape.slots() {
            return Err(TraceError::Invalid(format!(
                "token {token} has {} weights for {} choices",
                weights.len(),
                self.shape.slots()
            )));
        }
        if let Some(at) = weights.iter().position(|w| !w.is_finite() || *w < 0.0) {
            return Err(TraceError::Invalid(format!(
                "token {token} has weight {} in layer {}; weights are finite and not negative",
                weights[at],
                at / self.shape.top_k
            )));
        }
        Ok(())
    }

    /// The first `1 − share` of the tokens, and the rest held out.
    ///
    /// Tokens stand in the order of recording, so what is held out is later text, not a sample of
    /// the same sequences.
    ///
    /// # Errors
    /// `share` is not in `[0, 1)`.
    pub fn split(&self, share: f64) -> Result<(Self, Self), TraceError> {
        if !(0.0..1.0).contains(&share) {
            return Err(TraceError::Invalid(format!(
                "{share} of a trace cannot be held out; give a share from 0 up to 1"
            )));
        }
        let n_tokens = self.n_tokens();
        let n_held = (n_tokens as f64 * share).round() as usize;
        let at = n_tokens - n_held.min(n_tokens.saturating_sub(1));
        Ok((self.range(0, at), self.range(at, n_tokens)))
    }

    /// The tokens `from..to`.
    pub fn range(&self, from: usize, to: usize) -> Self {
        let slots = self.shape.slots();
        Self {
            shape: self.shape,
            model: self.model.clone(),
            choices: self.choices[from * slots..to * slots].to_vec(),
            weights: self
                .weights
                .as_ref()
                .map(|weights| weights[from * slots..to * slots].to_vec()),
        }
    }
}

#[cfg(test)]
mod tests;
