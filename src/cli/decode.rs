//! `meshweave trace decode`: decoding steps over the routes of a trace, with two exchanges of tokens a
//! layer and with one.
//!
//! Enters: a trace, where experts are, sizes. Leaves: bytes and seconds of both ways, measured on
//! threads, and their seconds on a cluster's links, predicted.
//! Invariant: both ways run the same tokens, and their features are compared.

use std::path::PathBuf;

use clap::Args;
use meshweave_dsl::diagnostics::Class;
use meshweave_dsl::placement::Placement;
use meshweave_dsl::trace::file;
use meshweave_runtime::decode::{Decode, DecodeShape, Decoded, Exchanges, decode as run_steps};
use serde_json::json;

use super::place::{read_placement, trace_error};
use super::render::{bytes, seconds};
use super::{Format, runtime_error};
use crate::cli::output::outln;
use crate::error::{Error, Result};
use crate::session::named_cluster;

#[derive(Debug, Args)]
pub(super) struct DecodeArgs {
    /// A routing trace (Parquet), its tokens sequence by sequence.
    trace: PathBuf,
    /// Devices, as threads.
    #[arg(long)]
    devices: usize,
    /// Where experts are, as written by `meshweave place`; in order by default.
    #[arg(long)]
    placement: Option<PathBuf>,
    /// Sequences decoded together.
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Tokens of a recorded sequence.
    #[arg(long, default_value_t = 64)]
    seq: usize,
    /// Steps to decode; the trace's first ones.
    #[arg(long, default_value_t = 64)]
    steps: usize,
    #[arg(long, default_value_t = 64)]
    embed: usize,
    /// Width of an expert.
    #[arg(long, default_value_t = 96)]
    ffn: usize,
    /// Width of a token's keys, and of its values.
    #[arg(long, default_value_t = 16)]
    kv: usize,
    /// Whose links price what crosses devices: a preset or a .weave file.
    #[arg(long, default_value = "h100:8")]
    cluster: String,
}

/// One way, run.
struct Way {
    name: &'static str,
    decoded: Decoded,
    /// Of a step's exchanges, predicted.
    predicted_s: f64,
}

/// Decodes in both ways and says what each took.
pub(super) fn decode(args: &DecodeArgs, format: Format) -> Result<()> {
    let trace = file::read(&args.trace).map_err(trace_error)?;
    let shape = trace.shape();
    let placement = match &args.placement {
        Some(path) => Some(read_placement(path)?),
        None => None,
    };
    let devices = devices(args, placement.as_ref(), (shape.layers, shape.experts))?;
    let mut routes = Vec::new();
    let rounds = args.batch * args.seq;
    // Token (round, sequence, position): a round is decoded position after position.
    for step in 0..args.steps {
        let (round, position) = (step / args.seq, step % args.seq);
        for sequence in 0..args.batch {
            let token = round * rounds + sequence * args.seq + position;
            if token >= trace.n_tokens() {
                return Err(Error::plain(
                    Class::Invalid,
                    format!(
                        "{} has {} tokens, {} steps of {} sequences need more",
                        args.trace.display(),
                        trace.n_tokens(),
                        args.steps,
                        args.batch
                    ),
                )
                .help("choose fewer --steps, or record a longer trace"));
            }
            routes.extend_from_slice(trace.token(token));
        }
    }
    let cluster = named_cluster(&args.cluster)?;
    let mut ways = Vec::new();
    for (name, exchanges) in [("two", Exchanges::Two), ("one", Exchanges::One)] {
        let run = Decode {
            shape: DecodeShape {
                layers: shape.layers,
                experts: shape.experts,
                top_k: shape.top_k,
                embed: args.embed,
                ffn: args.ffn,
                kv: args.kv,
            },
            n_devices: args.devices,
            devices: &devices,
            n_sequences: args.batch,
            routes: &routes,
            exchanges,
        };
        let decoded = run_steps(&run).map_err(runtime_error)?;
        let (link, n_steps) = (&cluster.within_node, run.n_steps() as f64);
        let crossed = decoded.dispatched_bytes + decoded.context_bytes + decoded.count_bytes;
        // Every exchange is preceded by one of counts; gathering takes two as well.
        let n_calls = 2.0 * decoded.n_exchanges as f64 / n_steps
            + if exchanges == Exchanges::One {
                2.0
            } else {
                0.0
            };
        let a_device = crossed as f64 / n_steps / args.devices as f64;
        ways.push(Way {
            name,
            predicted_s: n_calls * link.latency_s + a_device / link.bytes_per_s,
            decoded,
        });
    }
    print(args, &ways, format);
    Ok(())
}

fn devices(
    args: &DecodeArgs,
    placement: Option<&Placement>,
    (layers, experts): (usize, usize),
) -> Result<Vec<Vec<u16>>> {
    let invalid = |text: String, help: &str| Err(Error::plain(Class::Invalid, text).help(help));
    let Some(placement) = placement else {
        if args.devices == 0 || !experts.is_multiple_of(args.devices) {
            let text = format!(
                "{experts} experts do not divide over {} devices",
                args.devices
            );
            return invalid(text, "choose a divisor, or give a placement");
        }
        let size = experts / args.devices;
        let layer: Vec<u16> = (0..experts).map(|expert| (expert / size) as u16).collect();
        return Ok(vec![layer; layers]);
    };
    if placement.n_devices() != args.devices {
        let text = format!(
            "the placement is for {} devices, --devices says {}",
            placement.n_devices(),
            args.devices
        );
        return invalid(text, "give the same number");
    }
    match placement.division() {
        Some(division) => Ok(division),
        None => Err(Error::plain(
            Class::Unsupported,
            "the placement has replicas, which are not decoded",
        )
        .help("place with as many slots as experts")),
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

fn print(args: &DecodeArgs, ways: &[Way], format: Format) {
    let n_steps = args.steps.max(1) as f64;
    let error = match ways {
        [two, one] => {
            let pairs = two.decoded.features.iter().zip(&one.decoded.features);
            pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        }
        _ => 0.0,
    };
    if format == Format::Json {
        let way = |way: &Way| {
            json!({
                "exchanges": way.name,
                "step_s": {"measured_median": median(&way.decoded.step_s)},
                "communication_s": {"predicted": way.predicted_s},
                "bytes_a_step": {
                    "tokens": way.decoded.dispatched_bytes as f64 / n_steps,
                    "context": way.decoded.context_bytes as f64 / n_steps,
                    "counts": way.decoded.count_bytes as f64 / n_steps,
                },
                "exchanges_a_step": way.decoded.n_exchanges as f64 / n_steps,
            })
        };
        let ways: Vec<serde_json::Value> = ways.iter().map(way).collect();
        outln!("{}", json!({"ways": ways, "greatest_difference": error}));
        return;
    }
    for way in ways {
        outln!(
            "{:<10} {:.0} exchanges a step: {} of tokens, {} of keys and values, {} of counts between devices; step {} (measured, median of {}); exchanges {} on {} (predicted)",
            way.name,
            way.decoded.n_exchanges as f64 / n_steps,
            bytes(way.decoded.dispatched_bytes as f64 / n_steps),
            bytes(way.decoded.context_bytes as f64 / n_steps),
            bytes(way.decoded.count_bytes as f64 / n_steps),
            seconds(median(&way.decoded.step_s)),
            args.steps,
            seconds(way.predicted_s),
            args.cluster,
        );
    }
    outln!("features   differ by {error:.1e} at most");
}
