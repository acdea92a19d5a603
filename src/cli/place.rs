//! `meshweave place`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use meshweave_compiler::import::read_config;
use meshweave_compiler::model::{DecoderConfig, MoeConfig};
use meshweave_compiler::parallel::available;
use meshweave_compiler::placement::PlacementError;
use meshweave_compiler::placement::price::Costs;
use meshweave_compiler::placement::rebalance::shares;
use meshweave_compiler::placement::search::SearchOptions;
use meshweave_compiler::placement::solve::{
    Evidence, Method, Objective, Placed, Report, Request, Share, place as place_by, place_trace,
};
use meshweave_compiler::resolve::PlacedBy;
use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::diagnostics::Class;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::placement::Placement;
use meshweave_dsl::trace::statistics::load;
use meshweave_dsl::trace::{TraceError, file, import};
use serde_json::json;

use super::render::{bytes, seconds};
use super::{Format, write_atomically};
use crate::cli::output::{out, outln};
use crate::error::{Error, Result};
use crate::session::{import_error, named_cluster};

#[derive(Debug, Args)]
pub struct PlaceArgs {
    /// A routing trace (Parquet), or loads (JSON with `logical_count`) for `--objective load`.
    trace: PathBuf,
    /// Devices that share the experts of a layer.
    #[arg(long)]
    devices: usize,
    /// Devices of a node; all in one node by default.
    #[arg(long)]
    per_node: Option<usize>,
    /// Experts that a device holds in a layer; more than experts/devices makes replicas.
    #[arg(long)]
    slots: Option<usize>,
    /// What the placement is for.
    #[arg(long, value_enum, default_value_t = Goal::Affinity)]
    objective: Goal,
    /// The links that leaving a device or a node costs: a preset or a .weave file.
    #[arg(long, default_value = "h100:8")]
    cluster: String,
    /// The model's config.json: checks the trace, and prices experts, tokens and migration.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Where the experts are now, as written by --out.
    #[arg(long)]
    present: Option<PathBuf>,
    /// Share of the trace, at its end, that scores the placement and is not placed by.
    #[arg(long, default_value_t = 0.2)]
    held_out: f64,
    /// How hard to search and to prove.
    #[arg(long, value_enum, default_value_t = Effort::Normal)]
    effort: Effort,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where to write the placement (JSON).
    #[arg(long, short)]
    out: Option<PathBuf>,
    /// Where to write what part of its expert's load each replica takes (JSON), by a linear program that
    /// leaves the busiest device least to do.
    #[arg(long)]
    shares: Option<PathBuf>,
    /// Where to write the proof of the bound (JSON).
    #[arg(long)]
    certificate: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Goal {
    /// Tokens find their next expert on the device, or in the node, where they are.
    Affinity,
    /// The busiest device has little to do.
    Load,
    /// Predicted seconds of both; needs --model.
    Joint,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Effort {
    Quick,
    Normal,
    /// Longer search, proofs of optimality up to a minute, and the coupled bound.
    Thorough,
}

/// The part of its expert's load that every slot takes, by layer, device and slot.
pub(super) type SlotShares = Vec<Vec<Vec<f64>>>;

/// Places the experts of a trace and says how good that is.
pub fn place(args: &PlaceArgs, format: Format) -> Result<()> {
    let model = args.model.as_deref().map(read_model).transpose()?;
    let request = request(args, model.as_ref())?;
    let (placed, load) = if is_json(&args.trace) {
        place_loads(args, model.as_ref(), &request)?
    } else {
        let trace = file::read(&args.trace).map_err(trace_error)?;
        if let Some(model) = &model {
            check_model(&trace.shape(), model)?;
        }
        let placed = place_trace(&trace, &request).map_err(placement_error)?;
        (placed, load(&trace))
    };
    let shared = match &args.shares {
        Some(path) => Some(write_shares(path, &placed.placement, &load)?),
        None => None,
    };
    if let Some(path) = &args.out {
        write_json(path, &json!(placed.placement))?;
    }
    if let Some(path) = &args.certificate {
        let certificate = placed.certificate.as_ref().ok_or_else(|| {
            Error::plain(
                Class::Unsupported,
                "placements with replicas have no certificate apart from the bound itself",
            )
        })?;
        write_json(path, &json!(certificate))?;
    }
    match format {
        Format::Text => {
            out!("{}", render(&placed, args, model.is_some()));
            if let Some(shared) = shared {
                outln!(
                    "shares     {shared:.4} mean balancedness (predicted, of the whole trace) when replicas share by the linear program"
                );
            }
        }
        Format::Json => outln!(
            "{}",
            json!({
                "report": placed.report,
                "gap": {"device": placed.report.device.gap(), "node": placed.report.node.gap()},
                "placement": placed.placement,
                "shared_balancedness": shared,
            })
        ),
    }
    Ok(())
}

fn is_json(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension == "json")
}

fn place_loads(
    args: &PlaceArgs,
    model: Option<&DecoderConfig>,
    request: &Request,
) -> Result<(Placed, Vec<Vec<f64>>)> {
    if args.objective != Goal::Load {
        return Err(Error::plain(
            Class::Invalid,
            "loads say nothing about affinity; give a routing trace, or --objective load",
        ));
    }
    let text = std::fs::File::open(&args.trace).map_err(|error| unreadable(&args.trace, error))?;
    let load: Vec<Vec<f64>> =
        import::read_load(&mut std::io::BufReader::new(text)).map_err(trace_error)?;
    let choices = model
        .and_then(|model| model.moe.as_ref())
        .map_or(1, |moe| moe.top_k);
    let evidence = Evidence::of_load(load.clone(), choices as f64);
    let placed = place_by(&evidence, None, request).map_err(placement_error)?;
    Ok((placed, load))
}

/// Writes the shares of a placement's replicas; the mean over the layers of mean over greatest load of a
/// device.
fn write_shares(path: &Path, placement: &Placement, load: &[Vec<f64>]) -> Result<f64> {
    let (parts, balancedness) = shares_of(placement, load)?;
    write_json(path, &json!({ "shares": parts }))?;
    Ok(balancedness)
}

/// The shares of a placement's replicas by the linear program: for every layer, device and slot, the part
/// of its expert's load; and the mean over the layers of mean over greatest load of a device.
fn shares_of(placement: &Placement, load: &[Vec<f64>]) -> Result<(SlotShares, f64)> {
    let mut parts = Vec::with_capacity(load.len());
    let mut sum = 0.0;
    for (layer, load) in load.iter().enumerate() {
        let devices = placement.layer(layer);
        let found = shares(load, devices).map_err(placement_error)?;
        let mean = load.iter().sum::<f64>() / devices.len() as f64;
        sum += if found.greatest > 0.0 {
            mean / found.greatest
        } else {
            1.0
        };
        let of_expert = |(expert, taken): (&u16, f64)| {
            let whole = load.get(usize::from(*expert)).copied().unwrap_or(0.0);
            if whole > 0.0 { taken / whole } else { 0.0 }
        };
        let of_device = |(held, taken): (&Vec<u16>, Vec<f64>)| -> Vec<f64> {
            held.iter().zip(taken).map(of_expert).collect()
        };
        let of_layer: Vec<Vec<f64>> = devices.iter().zip(found.of_slots).map(of_device).collect();
        parts.push(of_layer);
    }
    Ok((parts, sum / load.len().max(1) as f64))
}

fn request(args: &PlaceArgs, model: Option<&DecoderConfig>) -> Result<Request> {
    let moe = match model {
        None if args.objective == Goal::Joint => {
            return Err(Error::plain(
                Class::Invalid,
                "load and transfers weigh against each other by the sizes of the model",
            )
            .help("give the model's config.json with --model"));
        }
        None => None,
        Some(model) => {
            let moe = model.moe.as_ref().ok_or_else(|| {
                Error::plain(Class::Invalid, format!("`{}` has no experts", model.name))
            })?;
            Some((model, moe))
        }
    };
    let cluster = named_cluster(&args.cluster)?;
    let weights = moe.map_or(0, |(model, moe)| 3 * model.embed * moe.ffn);
    let present = args.present.as_deref().map(read_placement).transpose()?;
    let threads = available();
    let (rounds, exact_steps, coupled_steps) = match args.effort {
        Effort::Quick => (0, 3e7, 0),
        Effort::Normal => (2, 3e8, 0),
        Effort::Thorough => (8, 2e10, 16),
    };
    Ok(Request {
        devices: args.devices,
        per_node: args.per_node.unwrap_or(args.devices),
        slots: args.slots,
        objective: match args.objective {
            Goal::Affinity => Objective::Affinity,
            Goal::Load => Objective::Load,
            Goal::Joint => Objective::Joint,
        },
        costs: costs(&cluster, moe),
        expert_bytes: moe.map(|_| 2 * weights as u64),
        present,
        held_out: args.held_out,
        search: SearchOptions {
            rounds,
            threads,
            seed: args.seed,
            ..SearchOptions::default()
        },
        exact_steps,
        coupled_steps,
    })
}

/// The placement that a document asks for on so many devices of a cluster, and the shares of its
/// replicas; a joint one weighs load and transfers by the sizes of `model`.
///
/// # Errors
/// The trace cannot be read or is of another model, or its experts do not divide.
pub(super) fn placed_by_routes(
    by: &PlacedBy,
    n_devices: usize,
    cluster: &Cluster,
    model: Option<&DecoderConfig>,
) -> Result<(Placement, Option<SlotShares>)> {
    let trace = file::read(&by.routes).map_err(trace_error)?;
    if let Some(model) = model {
        check_model(&trace.shape(), model)?;
    }
    let request = Request {
        devices: n_devices,
        per_node: n_devices.min(cluster.devices_per_node.max(1)),
        slots: by.slots,
        objective: by.objective,
        costs: costs(
            cluster,
            model.and_then(|model| Some((model, model.moe.as_ref()?))),
        ),
        expert_bytes: None,
        present: None,
        held_out: 0.2,
        search: SearchOptions {
            rounds: 2,
            ..SearchOptions::default()
        },
        exact_steps: 3e8,
        coupled_steps: 0,
    };
    let placed = place_trace(&trace, &request).map_err(placement_error)?;
    let shares = match placed.placement.division() {
        Some(_) => None,
        None => Some(shares_of(&placed.placement, &load(&trace))?.0),
    };
    Ok((placed.placement, shares))
}

/// Seconds of a token by an expert, and over the links.
fn costs(cluster: &Cluster, moe: Option<(&DecoderConfig, &MoeConfig)>) -> Costs {
    // Activations travel in bf16; an expert is three projections (gate, up, down).
    let token_bytes = moe.map_or(1.0, |(model, _)| 2.0 * model.embed as f64);
    let weights = moe.map_or(0, |(model, moe)| 3 * model.embed * moe.ffn);
    let peak = cluster.device.matmul_peak(DType::Bf16) * cluster.device.matmul_efficiency;
    Costs {
        expert_s: 2.0 * weights as f64 / peak,
        within_node_s: token_bytes / cluster.within_node.bytes_per_s,
        between_nodes_s: token_bytes / cluster.between_nodes.bytes_per_s,
    }
}

fn check_model(shape: &meshweave_dsl::trace::TraceShape, model: &DecoderConfig) -> Result<()> {
    let Some(moe) = &model.moe else { return Ok(()) };
    let layers = model.n_layers - moe.dense_layers.len();
    let expected = (layers, moe.n_experts, moe.top_k);
    if (shape.layers, shape.experts, shape.top_k) == expected {
        return Ok(());
    }
    Err(Error::plain(
        Class::Invalid,
        format!(
            "the trace has {} layers of {} experts, top-{}; `{}` has {} layers of {}, top-{}",
            shape.layers,
            shape.experts,
            shape.top_k,
            model.name,
            expected.0,
            expected.1,
            expected.2
        ),
    )
    .help("give the trace of this model, or the config of the traced one"))
}

fn read_model(path: &Path) -> Result<DecoderConfig> {
    let path = if path.is_dir() {
        path.join("config.json")
    } else {
        path.to_path_buf()
    };
    let text = std::fs::read_to_string(&path).map_err(|error| unreadable(&path, error))?;
    let imported = read_config(&path.display().to_string(), &text).map_err(import_error)?;
    Ok(imported.config)
}

pub(super) fn read_placement(path: &Path) -> Result<Placement> {
    let text = std::fs::read_to_string(path).map_err(|error| unreadable(path, error))?;
    serde_json::from_str(&text).map_err(|error| {
        Error::plain(
            Class::Invalid,
            format!("{} is no placement: {error}", path.display()),
        )
    })
}

/// The shares that `--shares` wrote, by layer, device and slot.
///
/// # Errors
/// The file cannot be read, or holds something else.
pub(super) fn read_shares(path: &Path) -> Result<SlotShares> {
    #[derive(serde::Deserialize)]
    struct Shares {
        shares: SlotShares,
    }
    let text = std::fs::read_to_string(path).map_err(|error| unreadable(path, error))?;
    let read: Shares = serde_json::from_str(&text).map_err(|error| {
        Error::plain(
            Class::Invalid,
            format!("{} holds no shares of replicas: {error}", path.display()),
        )
        .help("write them with `meshweave place … --shares FILE`")
    })?;
    Ok(read.shares)
}

fn write_json(path: &Path, value: &serde_json::Value) -> Result<()> {
    write_atomically(path, format!("{value}\n").as_bytes())?;
    eprintln!("wrote {}", path.display());
    Ok(())
}

/// A file that cannot be read.
pub(super) fn unreadable(path: &Path, error: std::io::Error) -> Error {
    Error::plain(
        Class::Invalid,
        format!("cannot read {}: {error}", path.display()),
    )
}

/// An error of a trace as one of the facade.
pub(super) fn trace_error(error: TraceError) -> Error {
    let class = match &error {
        TraceError::Invalid(_) => Class::Invalid,
        TraceError::Exhausted(_) => Class::Exhausted,
        TraceError::Unsupported(_) => Class::Unsupported,
        TraceError::Internal(_) => Class::Internal,
    };
    Error::plain(class, error)
}

pub(super) fn placement_error(error: PlacementError) -> Error {
    let class = match &error {
        PlacementError::Invalid(_) => Class::Invalid,
        PlacementError::Infeasible(_) => Class::Infeasible,
        PlacementError::Exhausted(_) => Class::Exhausted,
        PlacementError::Unsupported(_) => Class::Unsupported,
        PlacementError::Internal(_) => Class::Internal,
    };
    Error::plain(class, error)
}

fn render(placed: &Placed, args: &PlaceArgs, is_priced: bool) -> String {
    let report = &placed.report;
    let per_node = args.per_node.unwrap_or(args.devices);
    let mut text = String::new();
    // Writing into a string cannot fail.
    let _ = writeln!(
        text,
        "placement  {} layers × {} experts on {} devices ({} a node), {} slots each; {}",
        placed.placement.n_layers(),
        placed.placement.n_experts(),
        args.devices,
        per_node,
        report.slots,
        method(report.method),
    );
    let _ = writeln!(
        text,
        "tokens     {} placed by, {} held out",
        report.tokens.placed_by, report.tokens.held_out
    );
    if report.device.bound > 0.0 {
        share(&mut text, "on device", &report.device);
        if per_node < args.devices {
            share(&mut text, "in node", &report.node);
        }
    }
    balance(&mut text, report);
    if is_priced {
        let _ = write!(
            text,
            "seconds    {} (predicted) for a token on every device; at best {} (bound)",
            seconds(report.seconds.predicted),
            seconds(report.seconds.bound)
        );
        if let Some(present) = report.seconds.present {
            let _ = write!(text, "; now {} (predicted)", seconds(present));
        }
        text.push('\n');
    }
    if let Some(migration) = report.migration {
        let _ = write!(
            text,
            "migration  {} of {} slots change their expert",
            migration.experts, migration.of
        );
        if let Some(moved) = migration.bytes {
            let _ = write!(text, ", {}", bytes(moved as f64));
        }
        text.push('\n');
    }
    if report.idle_experts > 0 {
        let _ = writeln!(
            text,
            "note       {} experts were never chosen; where they are is arbitrary",
            report.idle_experts
        );
    }
    text
}

fn method(method: Method) -> &'static str {
    match method {
        Method::Assignments => "assignments, proven optimal",
        Method::DynamicProgramming => "dynamic programming, proven optimal",
        Method::Search => "alternating transport and re-splitting of pairs",
        Method::Packing => "packing and exchanges by load",
        Method::Exchanges => "exchanges by predicted seconds",
    }
}

fn share(text: &mut String, name: &str, share: &Share) {
    let _ = write!(
        text,
        "{name:<10} {:.4} kept (measured), at most {:.4} (bound), gap {:.2} %",
        share.kept,
        share.bound,
        100.0 * share.gap()
    );
    if let Some(held_out) = share.held_out {
        let _ = write!(text, "; held out {held_out:.4}");
    }
    if let Some(linear) = share.linear {
        let _ = write!(text, "; linear {linear:.4}");
    }
    if let Some(present) = share.present {
        let _ = write!(text, "; now {present:.4}");
    }
    text.push('\n');
}

fn balance(text: &mut String, report: &Report) {
    let balance = &report.balance;
    let _ = write!(
        text,
        "balance    {:.4} mean, {:.4} worst in layer {} (measured), at most {:.4} (bound)",
        balance.measured.mean, balance.measured.worst, balance.measured.worst_layer, balance.bound
    );
    if let Some(held_out) = balance.held_out {
        let _ = write!(text, "; held out {:.4}", held_out.mean);
    }
    if let Some(present) = balance.present {
        let _ = write!(text, "; now {:.4}", present.mean);
    }
    text.push('\n');
}
