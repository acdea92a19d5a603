//! Traces that other engines recorded.
//!
//! Enters: text of a recorder, as publicly documented. Leaves: a trace, or loads where the recorder
//! keeps nothing more.
//! Invariant: layers keep their order; layers without experts are left out; tokens that were not
//! recorded in every layer are left out and counted.
//!
//! | engine | what it writes | read as |
//! |---|---|---|
//! | Megatron-Core | `--moe-routing-trace-path`: `router_trace_rank{r}.jsonl`, a record per step and layer with `top_indices` | trace |
//! | vLLM | `--enable-return-routed-experts`: `prompt_routed_experts` and `routed_experts` in responses, `[tokens, layers, top_k]` | trace |
//! | SGLang | `return_routed_experts`: base64 of `int32` in `meta_info` | trace, once decoded to lists |
//! | SGLang | `expert_distribution_recorder_mode=stat`: `logical_count`, `[steps, layers, experts]` | loads |
//! | SGLang | the same recorder's `.pt` files | not read: they are pickles; see [`PICKLE_HELP`] |

use std::collections::{BTreeMap, BTreeSet};
use std::io::BufRead;

use serde::Deserialize;
use serde_json::Value;

use super::{MOST_EXPERTS, NO_EXPERT, RoutingTrace, TraceError, TraceShape};

/// How to turn a pickle of SGLang's recorder into JSON.
pub const PICKLE_HELP: &str = "\
PyTorch pickles can run code and are not read; convert with: python -c \"import json,sys,torch; \
d=torch.load(sys.argv[1],weights_only=True); json.dump({'logical_count':d['logical_count'].tolist()} \
if 'logical_count' in d else {'routed_experts':[r for p in d['records'] for r in \
p['topk_ids_of_layer'].transpose(0,1).tolist()]}, open(sys.argv[2],'w'))\" in.pt out.json";

/// What an import gives.
#[derive(Clone, Debug, PartialEq)]
pub struct Imported {
    pub trace: RoutingTrace,
    /// Tokens of the recording that lack a layer, and were left out.
    pub n_left_out: usize,
}

/// Engines whose recordings are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    Megatron,
    Vllm,
    Sglang,
}

/// Sizes that a recording may not state.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Known {
    /// Experts a layer; one more than the greatest that occurs where absent.
    pub experts: Option<usize>,
    pub model: Option<String>,
}

/// Reads a recording.
///
/// # Errors
/// Text that is not the engine's format, pickles, experts that do not exist, no complete token.
pub fn read(engine: Engine, text: &mut dyn BufRead, known: &Known) -> Result<Imported, TraceError> {
    refuse_pickles(text)?;
    match engine {
        Engine::Megatron => megatron(text, known),
        Engine::Vllm | Engine::Sglang => responses(text, known),
    }
}

fn refuse_pickles(text: &mut dyn BufRead) -> Result<(), TraceError> {
    let start = text.fill_buf().map_err(unread)?;
    // `torch.save` writes a zip; older ones a bare pickle.
    if start.starts_with(b"PK\x03\x04") || start.starts_with(b"\x80\x02") {
        return Err(TraceError::Unsupported(PICKLE_HELP.into()));
    }
    Ok(())
}

fn unread(error: std::io::Error) -> TraceError {
    TraceError::Invalid(format!("the recording cannot be read: {error}"))
}

/// A record of Megatron-Core's `RouterTracer` (`core/transformer/moe/router_trace.py`).
#[derive(Deserialize)]
struct Record {
    step: u64,
    #[serde(default = "decoder")]
    block: String,
    layer: u64,
    #[serde(default)]
    rank: u64,
    #[serde(default)]
    mtp_idx: Option<u64>,
    top_indices: Vec<Vec<i64>>,
}

fn decoder() -> String {
    "decoder".into()
}

/// The choices of all tokens, of every layer.
type ChoicesByLayer = BTreeMap<u64, Vec<Vec<i64>>>;

/// Megatron-Core's records, one JSON value a line. Layers of multi-token prediction are left out.
///
/// In training a layer has a record a microbatch: the n-th record of a layer in a step and rank
/// belongs to the n-th microbatch.
fn megatron(text: &mut dyn BufRead, known: &Known) -> Result<Imported, TraceError> {
    // By (rank, step).
    let mut steps: BTreeMap<(u64, u64), ChoicesByLayer> = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.map_err(unread)?;
        if line.trim().is_empty() {
            continue;
        }
        let record: Record = serde_json::from_str(&line).map_err(|error| {
            TraceError::Invalid(format!(
                "line {} is no record of Megatron-Core's router trace: {error}",
                number + 1
            ))
        })?;
        if record.mtp_idx.is_none() && record.block == "decoder" {
            let layers = steps.entry((record.rank, record.step)).or_default();
            layers
                .entry(record.layer)
                .or_default()
                .extend(record.top_indices);
        }
    }
    let layers: BTreeSet<u64> = steps.values().flat_map(BTreeMap::keys).copied().collect();
    let mut tokens = Vec::new();
    let mut n_left_out = 0;
    for of_step in steps.into_values() {
        let counts = of_step.values().map(Vec::len);
        let (most, least) = (counts.clone().max(), counts.min());
        if of_step.len() < layers.len() || most != least {
            n_left_out += most.unwrap_or(0);
            continue;
        }
        let n_tokens = most.unwrap_or(0);
        let mut of_step: Vec<_> = of_step.into_values().collect();
        for token in 0..n_tokens {
            let layers = of_step.iter_mut();
            tokens.push(
                layers
                    .map(|layer| std::mem::take(&mut layer[token]))
                    .collect(),
            );
        }
    }
    assemble(tokens, n_left_out, known)
}

/// Arrays `[tokens, layers, top_k]` anywhere in JSON under the names that the engines use, in the
/// order in which they occur; one JSON value or one a line.
fn responses(text: &mut dyn BufRead, known: &Known) -> Result<Imported, TraceError> {
    let mut tokens: Vec<Vec<Vec<i64>>> = Vec::new();
    let mut n_values = 0;
    for value in serde_json::Deserializer::from_reader(text).into_iter::<Value>() {
        let value = value
            .map_err(|error| TraceError::Invalid(format!("the recording is no JSON: {error}")))?;
        n_values += 1;
        collect(&value, &mut tokens)?;
    }
    if tokens.is_empty() {
        return Err(TraceError::Invalid(format!(
            "{n_values} JSON values hold no `routed_experts`; enable it with \
             --enable-return-routed-experts (vLLM, SGLang) and keep the whole responses"
        )));
    }
    assemble(tokens, 0, known)
}

fn collect(value: &Value, tokens: &mut Vec<Vec<Vec<i64>>>) -> Result<(), TraceError> {
    const NAMES: [&str; 2] = ["prompt_routed_experts", "routed_experts"];
    match value {
        Value::Array(values) => values.iter().try_for_each(|value| collect(value, tokens)),
        Value::Object(fields) => {
            // The prompt comes first in time.
            for name in NAMES {
                match fields.get(name) {
                    None | Some(Value::Null) => {}
                    Some(Value::String(_)) => {
                        return Err(TraceError::Unsupported(format!(
                            "`{name}` is base64; decode it with numpy and write lists: \
                             numpy.frombuffer(base64.b64decode(s), 'int32')\
                             .reshape(-1, layers, top_k).tolist()"
                        )));
                    }
                    Some(array) => {
                        let found: Vec<Vec<Vec<i64>>> = serde_json::from_value(array.clone())
                            .map_err(|error| {
                                TraceError::Invalid(format!(
                                    "`{name}` is no array of tokens, layers and choices: {error}"
                                ))
                            })?;
                        tokens.extend(found);
                    }
                }
            }
            let others = fields
                .iter()
                .filter(|(name, _)| !NAMES.contains(&name.as_str()));
            others
                .map(|(_, value)| value)
                .try_for_each(|value| collect(value, tokens))
        }
        _ => Ok(()),
    }
}

/// A trace of tokens' choices by layer. Tokens that were cached (all −1) are left out, and so are
/// layers that no token has choices in.
fn assemble(
    tokens: Vec<Vec<Vec<i64>>>,
    mut n_left_out: usize,
    known: &Known,
) -> Result<Imported, TraceError> {
    let n_layers = tokens.first().map_or(0, Vec::len);
    let mut is_routed = vec![false; n_layers];
    let (mut top_k, mut experts) = (0, 0);
    for (token, layers) in tokens.iter().enumerate() {
        if layers.len() != n_layers {
            return Err(TraceError::Invalid(format!(
                "token {token} has {} layers, token 0 has {n_layers}; is this one model?",
                layers.len()
            )));
        }
        for (layer, chosen) in layers.iter().enumerate() {
            top_k = top_k.max(chosen.len());
            for expert in chosen {
                is_routed[layer] |= *expert >= 0;
                experts = experts.max(expert + 1);
            }
        }
    }
    let shape = TraceShape {
        layers: is_routed.iter().filter(|is_routed| **is_routed).count(),
        experts: known
            .experts
            .unwrap_or(usize::try_from(experts).unwrap_or(0)),
        top_k,
    };
    if shape.layers == 0 {
        return Err(TraceError::Invalid(format!(
            "none of {} tokens was recorded in every layer",
            tokens.len() + n_left_out
        )));
    }
    let mut trace = RoutingTrace::new(shape, known.model.clone())?;
    for (token, layers) in tokens.iter().enumerate() {
        let layers = layers
            .iter()
            .zip(&is_routed)
            .filter(|(_, is_routed)| **is_routed);
        let mut choices = Vec::with_capacity(shape.slots());
        let mut is_whole = true;
        for (chosen, _) in layers {
            is_whole &= chosen.iter().any(|expert| *expert >= 0);
            for slot in 0..top_k {
                choices.push(match chosen.get(slot) {
                    None | Some(-1) => NO_EXPERT,
                    Some(expert) => named(*expert, token)?,
                });
            }
        }
        if is_whole {
            trace.push(&choices, None)?;
        } else {
            n_left_out += 1;
        }
    }
    Ok(Imported { trace, n_left_out })
}

fn named(expert: i64, token: usize) -> Result<u16, TraceError> {
    let named = u16::try_from(expert).ok();
    named.filter(|expert| *expert != NO_EXPERT).ok_or_else(|| {
        TraceError::Invalid(format!(
            "token {token} chose expert {expert}; experts are 0 to {}, or −1 for none",
            MOST_EXPERTS - 1
        ))
    })
}

/// Loads from `logical_count` of SGLang's recorder: `[layers][experts]`, or steps of these, which
/// are summed.
///
/// # Errors
/// Text without `logical_count`, or one of another shape.
pub fn read_load(text: &mut dyn BufRead) -> Result<Vec<Vec<f64>>, TraceError> {
    refuse_pickles(text)?;
    let invalid = |text: String| TraceError::Invalid(text);
    let value: Value = serde_json::from_reader(text)
        .map_err(|error| invalid(format!("the loads are no JSON: {error}")))?;
    let counts = value
        .get("logical_count")
        .ok_or_else(|| invalid("the JSON has no `logical_count`".into()))?;
    let layers = |value: &Value| serde_json::from_value::<Vec<Vec<f64>>>(value.clone());
    let mut load = match layers(counts) {
        Ok(load) => load,
        Err(_) => {
            let steps: Vec<Vec<Vec<f64>>> = serde_json::from_value(counts.clone()).map_err(|error| {
                invalid(format!(
                    "`logical_count` is neither [layers][experts] nor [steps][layers][experts]: {error}"
                ))
            })?;
            let mut steps = steps.into_iter();
            let mut sum = steps.next().unwrap_or_default();
            for step in steps {
                for (sum, layer) in sum.iter_mut().zip(step) {
                    for (sum, count) in sum.iter_mut().zip(layer) {
                        *sum += count;
                    }
                }
            }
            sum
        }
    };
    // Layers without experts count nothing.
    load.retain(|layer| layer.iter().any(|count| *count > 0.0));
    let experts = load.first().map_or(0, Vec::len);
    if experts == 0 || load.iter().any(|layer| layer.len() != experts) {
        return Err(invalid(
            "`logical_count` has no counts, or layers with different numbers of experts".into(),
        ));
    }
    Ok(load)
}
