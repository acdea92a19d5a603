//! The model that a plan names.
//!
//! Enters: `model "path"`, or `model NAME = FAMILY { … }`. Leaves: where the graph comes from.
//! Invariant: a config that leaves has passed its own check.

use std::collections::BTreeSet;
use std::path::Path;

use meshweave_dsl::diagnostics::{Diagnostic, did_you_mean};
use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{RopeScaling, RopeTable};
use meshweave_dsl::weave::ast::{Definition, Document, Reference, Spanned, Statement};

use super::settings::Settings;
use super::{ModelSource, existing_file};
use crate::model::{
    Activation, AttentionBias, AttentionConfig, DecoderConfig, FfnConfig, GoldenSize, ModelError,
    MoeConfig, Norm, NormKind, Positions, Router, RouterLosses, SharedExperts,
};

/// The families that a definition may start from.
const FAMILIES: [&str; 3] = ["golden", "gpt", "llama"];

/// The sizes of a step that a model brings along: (sequences, tokens per sequence).
type StepSize = Option<(usize, usize)>;

/// The model, and the step's size when the model has one of its own.
pub(super) fn resolve_model(
    document: &Document,
    reference: &Spanned<Reference>,
    base_dir: &Path,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<(ModelSource, StepSize)> {
    match &reference.node {
        Reference::Text(text) => {
            path_source(text, reference, base_dir, diagnostics).map(|source| (source, None))
        }
        Reference::Name(name) => {
            let definitions = definitions(document);
            let found = definitions
                .iter()
                .find(|definition| definition.name.node == *name);
            match found {
                Some(definition) => define(definition, base_dir, diagnostics),
                None => {
                    let names = definitions.iter().map(|d| d.name.node.as_str());
                    diagnostics.push(
                        Diagnostic::invalid(format!("no model `{name}` is defined here"))
                            .code("W105")
                            .at(reference.span, "")
                            .maybe_help(did_you_mean(name.as_str(), names))
                            .help(format!(
                                "add `model {name} = llama {{ … }}`, or give a file in quotes"
                            )),
                    );
                    None
                }
            }
        }
    }
}

fn definitions(document: &Document) -> Vec<&Definition> {
    document
        .statements()
        .filter_map(|statement| match &statement.node {
            Statement::Model(definition) => Some(definition),
            _ => None,
        })
        .collect()
}

/// A `config.json`, a folder with one, or a graph.
fn path_source(
    text: &str,
    reference: &Spanned<Reference>,
    base_dir: &Path,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<ModelSource> {
    let path = existing_file(
        "the model",
        text,
        reference.span,
        base_dir,
        "give the path of a `config.json`, of the folder that holds it, or of a graph in a `.weave` \
         file, relative to this file",
        diagnostics,
    )?;
    let is_graph = path.extension().is_some_and(|ending| ending == "weave");
    Some(if is_graph {
        ModelSource::Graph(path)
    } else {
        ModelSource::Config(path)
    })
}

fn define(
    definition: &Definition,
    base_dir: &Path,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<(ModelSource, StepSize)> {
    let base = definition.base.as_ref()?;
    let family = match &base.node {
        Reference::Name(name) => name.as_str(),
        Reference::Text(text) => {
            if let Some(setting) = definition.settings().next() {
                diagnostics.push(
                    Diagnostic::unsupported(format!(
                        "model `{}`: changing `{}` of a model from a file is not implemented",
                        definition.name.node, setting.key
                    ))
                    .code("W120")
                    .at(setting.span, "")
                    .help("change the file, or write the whole model here"),
                );
                return None;
            }
            return path_source(text, base, base_dir, diagnostics).map(|source| (source, None));
        }
    };
    let n_before = diagnostics.len();
    let built = match family {
        "golden" => golden(definition, diagnostics),
        "gpt" => gpt(definition, diagnostics).map(|config| (config, None)),
        "llama" => llama(definition, diagnostics).map(|config| (config, None)),
        other => {
            diagnostics.push(
                Diagnostic::invalid(format!("there is no model family `{other}`"))
                    .code("W105")
                    .at(base.span, "")
                    .maybe_help(did_you_mean(other, FAMILIES))
                    .help(format!("families are {}", FAMILIES.join(", "))),
            );
            None
        }
    };
    let (config, step) = built.filter(|_| diagnostics.len() == n_before)?;
    if let Err(error) = config.check() {
        let diagnostic = match &error {
            ModelError::Unsupported(message) => Diagnostic::unsupported(message).code("W120"),
            other => Diagnostic::invalid(other.to_string()).code("W105"),
        };
        diagnostics.push(diagnostic.at(definition.name.span, "this model"));
        return None;
    }
    Some((ModelSource::Decoder(config), step))
}

fn settings<'a>(definition: &'a Definition, known: &[&str]) -> Settings<'a> {
    let owner = format!("model `{}`", definition.name.node);
    Settings::new(owner, definition.name.span, definition.settings(), known)
}

/// `head` of `embed` divided among `heads`, or a finding.
fn head_width(
    s: &mut Settings<'_>,
    definition: &Definition,
    embed: usize,
    heads: usize,
    way_out: &str,
) -> Option<usize> {
    if embed.is_multiple_of(heads) {
        return Some(embed / heads);
    }
    s.diagnostics.push(
        Diagnostic::invalid(format!(
            "model `{}`: `embed` {embed} does not divide evenly among {heads} heads",
            definition.name.node
        ))
        .code("W105")
        .at(s.span_of("heads"), "")
        .help(way_out),
    );
    None
}

/// The golden model: its sizes, its experts by `capacity`.
fn golden(
    definition: &Definition,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<(DecoderConfig, StepSize)> {
    let mut s = settings(
        definition,
        &[
            "size",
            "layers",
            "embed",
            "heads",
            "kv_heads",
            "ffn",
            "vocab",
            "experts",
            "topk",
            "capacity",
            "subsequences",
            "tied",
        ],
    );
    let built = golden_config(definition, &mut s);
    diagnostics.append(&mut s.diagnostics);
    built
}

fn golden_config(
    definition: &Definition,
    s: &mut Settings<'_>,
) -> Option<(DecoderConfig, StepSize)> {
    let named = s
        .word("size", &["tiny", "small", "gpt2"])
        .and_then(GoldenSize::named);
    if s.has("size") && named.is_none() {
        return None;
    }
    let mut count = |key: &str, named: Option<usize>| match named {
        Some(size) if !s.has(key) => Some(size),
        _ => s.required_count(key, 1),
    };
    let n_layers = count("layers", named.as_ref().map(|size| size.n_layers));
    let embed = count("embed", named.as_ref().map(|size| size.embed));
    let heads = count("heads", named.as_ref().map(|size| size.heads));
    let ffn = count("ffn", named.as_ref().map(|size| size.ffn));
    let vocab = count("vocab", named.as_ref().map(|size| size.vocab));
    let capacity = s.number("capacity", "from 0 (which never drops) on", |c| c >= 0.0);
    let subsequences = s.count("subsequences", 1);
    let tied = s.flag("tied");
    // What the golden model fixes may be repeated, but not changed.
    let fixed = [
        ("experts", 8, "experts"),
        ("topk", 2, "experts a token"),
        ("kv_heads", heads.unwrap_or(0), "key heads, one per head"),
    ];
    for (key, expected, what) in fixed {
        if let Some(found) = s.count(key, 1).filter(|found| *found != expected) {
            s.diagnostics.push(
                Diagnostic::invalid(format!(
                    "model `{}`: the golden model has {expected} {what}, not {found}",
                    definition.name.node
                ))
                .code("W105")
                .at(s.span_of(key), "")
                .help("start from `llama` for another architecture"),
            );
        }
    }
    if (s.has("experts") || s.has("topk")) && !s.has("capacity") {
        s.diagnostics.push(
            Diagnostic::invalid(format!(
                "model `{}` has experts but no `capacity`",
                definition.name.node
            ))
            .code("W105")
            .at(s.span_of("experts"), "")
            .help("add `capacity 2`, or `capacity 0` to drop no token"),
        );
    }
    let (embed, heads) = (embed?, heads?);
    head_width(
        s,
        definition,
        embed,
        heads,
        "make the first a multiple of the second",
    )?;
    let (seq, batch) = named.as_ref().map_or((0, 0), |size| (size.seq, size.batch));
    let size = GoldenSize {
        n_layers: n_layers?,
        embed,
        heads,
        ffn: ffn?,
        vocab: vocab?,
        seq,
        batch,
    };
    let mut config = DecoderConfig::golden(&size, capacity);
    config.name = definition.name.node.as_str().to_owned();
    config.tied = tied.unwrap_or(false);
    if let (Some(moe), Some(parts)) = (&mut config.moe, subsequences) {
        moe.subsequences = parts;
    }
    Some((config, named.map(|size| (size.batch, size.seq))))
}

/// A GPT as Megatron-LM trains it: layer norms, learned positions, biases, a tied head.
fn gpt(definition: &Definition, diagnostics: &mut Vec<Diagnostic>) -> Option<DecoderConfig> {
    let known = [
        "layers",
        "embed",
        "heads",
        "kv_heads",
        "ffn",
        "vocab",
        "positions",
        "tied",
    ];
    let mut s = settings(definition, &known);
    let config = gpt_config(definition, &mut s);
    diagnostics.append(&mut s.diagnostics);
    config
}

fn gpt_config(definition: &Definition, s: &mut Settings<'_>) -> Option<DecoderConfig> {
    let n_layers = s.required_count("layers", 1);
    let embed = s.required_count("embed", 1);
    let heads = s.required_count("heads", 1);
    let vocab = s.required_count("vocab", 1);
    let n_positions = s.required_count("positions", 1);
    let kv_heads = s.count("kv_heads", 1);
    let width = s.count("ffn", 1);
    let tied = s.flag("tied").unwrap_or(true);
    let (embed, heads) = (embed?, heads?);
    let way_out = "make the first a multiple of the second";
    let head = head_width(s, definition, embed, heads, way_out)?;
    Some(DecoderConfig {
        name: definition.name.node.as_str().to_owned(),
        dtype: DType::Bf16,
        n_layers: n_layers?,
        embed,
        vocab: vocab?,
        norm: Norm {
            kind: NormKind::Layer,
            eps: 1e-5,
        },
        positions: Positions::Learned {
            n_positions: n_positions?,
        },
        attention: AttentionConfig {
            heads,
            kv_heads: kv_heads.unwrap_or(heads),
            head,
            bias: AttentionBias {
                q: true,
                k: true,
                v: true,
                o: true,
            },
            qk_norm: false,
            scale: None,
            window: None,
            mla: None,
        },
        ffn: FfnConfig {
            width: width.unwrap_or(4 * embed),
            activation: Activation::GeluTanh,
            gated: false,
            bias: true,
        },
        moe: None,
        tied,
    })
}

/// What is said of experts.
const OF_EXPERTS: [&str; 8] = [
    "topk",
    "capacity",
    "subsequences",
    "shared_ffn",
    "balance",
    "z",
    "router",
    "bias_rate",
];

/// A Llama or, with experts, a Mixtral.
fn llama(definition: &Definition, diagnostics: &mut Vec<Diagnostic>) -> Option<DecoderConfig> {
    let of_layers = [
        "layers",
        "embed",
        "heads",
        "kv_heads",
        "head",
        "ffn",
        "vocab",
        "rope_theta",
        "norm_eps",
        "tied",
        "dtype",
        "experts",
    ];
    let mut s = settings(definition, &[of_layers.as_slice(), &OF_EXPERTS].concat());
    let config = llama_config(definition, &mut s);
    diagnostics.append(&mut s.diagnostics);
    config
}

fn llama_config(definition: &Definition, s: &mut Settings<'_>) -> Option<DecoderConfig> {
    let n_layers = s.required_count("layers", 1);
    let embed = s.required_count("embed", 1);
    let heads = s.required_count("heads", 1);
    let width = s.required_count("ffn", 1);
    let vocab = s.required_count("vocab", 1);
    let kv_heads = s.count("kv_heads", 1);
    let head = s.count("head", 1);
    let theta = s.number("rope_theta", "above 0", |theta| theta > 0.0);
    let eps = s.number("norm_eps", "from 0 on", |eps| eps >= 0.0);
    let tied = s.flag("tied").unwrap_or(false);
    let dtype = match s.word("dtype", &["f32", "bf16"]) {
        Some("bf16") => DType::Bf16,
        _ => DType::F32,
    };
    let moe = experts(definition, s, width);
    let (embed, heads) = (embed?, heads?);
    let head = match head {
        Some(head) => head,
        None if s.has("head") => return None,
        None => head_width(
            s,
            definition,
            embed,
            heads,
            "give the width of a head with `head`",
        )?,
    };
    Some(DecoderConfig {
        name: definition.name.node.as_str().to_owned(),
        dtype,
        n_layers: n_layers?,
        embed,
        vocab: vocab?,
        norm: Norm {
            kind: NormKind::Rms,
            eps: eps.unwrap_or(1e-5),
        },
        positions: Positions::Rope(RopeTable {
            theta: theta.unwrap_or(10_000.0),
            rotary_dim: head,
            scaling: RopeScaling::None,
        }),
        attention: AttentionConfig {
            heads,
            kv_heads: kv_heads.unwrap_or(heads),
            head,
            bias: AttentionBias::default(),
            qk_norm: false,
            scale: None,
            window: None,
            mla: None,
        },
        ffn: FfnConfig {
            width: width?,
            activation: Activation::Silu,
            gated: true,
            bias: false,
        },
        moe,
        tied,
    })
}

/// Experts of width `ffn`, as Mixtral has them.
fn experts(
    definition: &Definition,
    s: &mut Settings<'_>,
    width: Option<usize>,
) -> Option<MoeConfig> {
    let top_k = s.count("topk", 1);
    let capacity = s.number("capacity", "from 0 (which never drops) on", |c| c >= 0.0);
    let subsequences = s.count("subsequences", 1);
    let shared = s.count("shared_ffn", 1);
    let weight = "from 0 (which adds nothing) on";
    let balance = s.number("balance", weight, |w| w >= 0.0);
    let z = s.number("z", weight, |w| w >= 0.0);
    let router = s.word("router", &["softmax", "sigmoid"]);
    let bias_rate = s.number("bias_rate", "from 0 (which moves nothing) on", |r| r >= 0.0);
    if !s.has("experts") {
        for key in OF_EXPERTS {
            if s.has(key) {
                s.diagnostics.push(
                    Diagnostic::invalid(format!(
                        "model `{}` has `{key}` but no `experts`",
                        definition.name.node
                    ))
                    .code("W105")
                    .at(s.span_of(key), "")
                    .help("add `experts 8`, with your number"),
                );
            }
        }
        return None;
    }
    Some(MoeConfig {
        n_experts: s.count("experts", 1)?,
        top_k: top_k.unwrap_or(2),
        ffn: width?,
        capacity_factor: capacity.unwrap_or(0.0),
        subsequences: subsequences.unwrap_or(1),
        router: match router {
            Some("sigmoid") => Router::Sigmoid {
                normalize: true,
                scale: 1.0,
                groups: None,
            },
            _ => Router::Softmax {
                normalize: true,
                scale: 1.0,
                groups: None,
            },
        },
        losses: RouterLosses {
            balance: balance.unwrap_or(0.0),
            z: z.unwrap_or(0.0),
            bias_rate: bias_rate.unwrap_or(0.0),
        },
        shared: shared.map(|ffn| SharedExperts { ffn, gated: false }),
        dense_layers: BTreeSet::new(),
    })
}
