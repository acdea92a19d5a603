//! A placement for a trace, by the method that fits, with everything known about it.
//!
//! Enters: a [`Request`]. Leaves: a [`Placed`]: the placement and its [`Report`].
//! Invariant: the report's bounds hold for every placement of the request's kind, and its figures are
//! counted from the trace, apart from the search.

use meshweave_dsl::placement::Placement;
use meshweave_dsl::trace::RoutingTrace;
use meshweave_dsl::trace::statistics::{Transitions, load, transitions};
use serde::Serialize;

use super::PlacementError;
use super::balance::{Slots, balance};
use super::bounds::{Certificate, Proof, certify, evaluate};
use super::chain::{Chain, Division, Levels};
use super::coupled::{CoupledOptions, Multipliers};
use super::exact;
use super::joint::{Demand, align, refine, seconds};
use super::matching::Prices;
use super::migrate::nearest;
use super::price::{Balance, Costs, Kept, balance_of, kept};
use super::search::{SearchOptions, improve, search};
use crate::parallel::in_parallel;

/// What the placement is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// Transitions stay on the device, or in the node.
    Affinity,
    /// The busiest device has little to do.
    Load,
    /// Predicted seconds of both.
    Joint,
}

/// What to place, where.
#[derive(Clone, Debug)]
pub struct Request {
    pub devices: usize,
    /// Devices of a node.
    pub per_node: usize,
    /// Experts a device holds in a layer; as few as possible where absent.
    pub slots: Option<usize>,
    pub objective: Objective,
    pub costs: Costs,
    /// Bytes of an expert's parameters, for the price of migration.
    pub expert_bytes: Option<u64>,
    /// Where the experts are now.
    pub present: Option<Placement>,
    /// Share of the trace, at its end, that scores the placement and is not placed by.
    pub held_out: f64,
    pub search: SearchOptions,
    /// Steps that a proof of optimality by dynamic programming may take, about a nanosecond each.
    pub exact_steps: f64,
    /// Steps of the coupled bound; 0 leaves it out.
    pub coupled_steps: usize,
}

/// A placement and what is known about it.
#[derive(Clone, Debug)]
pub struct Placed {
    pub placement: Placement,
    pub report: Report,
    /// Proof of the bound on what stays on the device, where no expert has replicas.
    pub certificate: Option<Certificate>,
}

/// What is known about a placement.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    pub objective: Objective,
    pub method: Method,
    pub slots: usize,
    pub tokens: Tokens,
    pub device: Share,
    pub node: Share,
    pub balance: BalanceReport,
    /// Predicted, for one token a device through all layers.
    pub seconds: Seconds,
    pub migration: Option<Migration>,
    /// Experts that no token of the trace chose, summed over the layers: nothing is known about them.
    pub idle_experts: usize,
}

/// How the placement was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// One expert a device: assignment problems, optimal.
    Assignments,
    /// Dynamic programming over the divisions of a layer, optimal.
    DynamicProgramming,
    /// Alternating transport and re-splitting of pairs.
    Search,
    /// Packing by load and exchanges.
    Packing,
    /// Both, then exchanges by predicted seconds.
    Exchanges,
}

/// Tokens that placed and tokens that scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Tokens {
    pub placed_by: usize,
    pub held_out: usize,
}

/// A share of transitions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Share {
    /// Measured on the tokens that placed.
    pub kept: f64,
    /// No placement keeps more of these tokens.
    pub bound: f64,
    /// Measured on the tokens held out.
    pub held_out: Option<f64>,
    /// Of blocks of consecutive experts, measured.
    pub linear: Option<f64>,
    /// Of the present placement, measured.
    pub present: Option<f64>,
}

impl Share {
    /// How far the bound is above what is kept, relative to the bound.
    pub fn gap(&self) -> f64 {
        if self.bound > 0.0 {
            (1.0 - self.kept / self.bound).max(0.0)
        } else {
            0.0
        }
    }
}

/// How even the loads are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct BalanceReport {
    pub measured: Balance,
    /// No placement with these slots has a greater mean balancedness.
    pub bound: f64,
    pub held_out: Option<Balance>,
    pub present: Option<Balance>,
}

/// Predicted seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Seconds {
    pub predicted: f64,
    /// From the bounds on shares and loads.
    pub bound: f64,
    pub present: Option<f64>,
}

/// The way from the present placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Migration {
    /// Experts that devices receive, over all layers.
    pub experts: usize,
    /// Out of so many slots.
    pub of: usize,
    pub bytes: Option<u64>,
}

/// What is known of a router.
#[derive(Clone, Debug)]
pub struct Evidence {
    pub chain: Chain,
    /// By layer and expert.
    pub load: Vec<Vec<f64>>,
    /// Experts a token takes in a layer.
    pub choices: f64,
    pub n_tokens: usize,
}

impl Evidence {
    /// What a trace tells.
    pub fn of_trace(trace: &RoutingTrace) -> Self {
        Self {
            chain: Chain::new(&transitions(trace)),
            load: load(trace),
            choices: trace.shape().top_k as f64,
            n_tokens: trace.n_tokens(),
        }
    }

    /// Loads alone, of routers that `choices` experts are taken from: nothing is known about
    /// transitions, which all count as none.
    pub fn of_load(load: Vec<Vec<f64>>, choices: f64) -> Self {
        let experts = load.first().map_or(0, Vec::len);
        let tokens: f64 = load.first().into_iter().flatten().sum();
        Self {
            chain: Chain::new(&Transitions {
                experts,
                pairs: vec![vec![0.0; experts * experts]; load.len().saturating_sub(1)],
            }),
            load,
            choices,
            n_tokens: (tokens / choices) as usize,
        }
    }
}

/// Places the experts of a trace; `request.held_out` of it scores the placement.
///
/// # Errors
/// See [`place`].
pub fn place_trace(trace: &RoutingTrace, request: &Request) -> Result<Placed, PlacementError> {
    let (train, held) = trace
        .split(request.held_out)
        .map_err(|error| PlacementError::Invalid(error.to_string()))?;
    let held = (held.n_tokens() > 0).then(|| Evidence::of_trace(&held));
    place(&Evidence::of_trace(&train), held.as_ref(), request)
}

/// Places experts by what is known, and scores the placement on what was held out.
///
/// # Errors
/// Sizes that do not divide, too few slots, no tokens, or a present placement of another model.
pub fn place(
    known: &Evidence,
    held_out: Option<&Evidence>,
    request: &Request,
) -> Result<Placed, PlacementError> {
    let size = check(known, request)?;
    let chain = &known.chain;
    let demand = Demand {
        chain,
        load: &known.load,
        choices: known.choices,
    };
    let slots = Slots {
        devices: request.devices,
        per_device: size,
    };
    let is_division = size * request.devices == chain.experts;
    let (placement, method) = match request.objective {
        Objective::Affinity if is_division => by_affinity(chain, request)?,
        Objective::Load => (by_load(&demand, slots, request)?, Method::Packing),
        _ => by_both(&demand, slots, request, is_division)?,
    };
    let placement = match &request.present {
        Some(present) => nearest(&placement, present)?,
        None => placement,
    };
    let certificate = is_division.then(|| proof(chain, request.devices, method, request));
    let of_device = bound(chain, request, certificate.as_ref(), request.devices, size);
    let n_nodes = request.devices / request.per_node;
    let of_node = if n_nodes == 1 {
        1.0
    } else {
        let certificate = is_division.then(|| certify(chain, n_nodes, request.search.threads));
        bound(
            chain,
            request,
            certificate.as_ref(),
            n_nodes,
            size * request.per_node,
        )
    };
    let scored = Scored::of(&placement, chain, held_out, request)?;
    let of_device = if matches!(method, Method::DynamicProgramming) {
        scored.kept.device
    } else {
        of_device
    };
    let report = report(
        &demand,
        slots,
        request,
        method,
        &placement,
        scored,
        Kept {
            device: of_device,
            node: of_node,
        },
    );
    Ok(Placed {
        placement,
        report: Report {
            tokens: Tokens {
                placed_by: known.n_tokens,
                held_out: held_out.map_or(0, |held| held.n_tokens),
            },
            ..report
        },
        certificate,
    })
}

/// Checks that the sizes fit; returns the slots of a device.
fn check(known: &Evidence, request: &Request) -> Result<usize, PlacementError> {
    let (experts, devices) = (known.chain.experts, request.devices);
    let layers = known.load.len();
    let invalid = |text: String| Err(PlacementError::Invalid(text));
    if known.n_tokens == 0 || experts == 0 {
        return invalid(
            "the trace has no tokens to place by; record some, or hold out less".into(),
        );
    }
    if devices == 0 || request.per_node == 0 || !devices.is_multiple_of(request.per_node) {
        return invalid(format!(
            "{devices} devices do not make nodes of {}; give a divisor of the devices",
            request.per_node
        ));
    }
    for (layer, load) in known.load.iter().enumerate() {
        if load.iter().all(|load| *load == 0.0) {
            return invalid(format!(
                "no token chose an expert in layer {layer}; is it a layer without experts? Leave it \
                 out of the trace"
            ));
        }
    }
    let size = match request.slots {
        Some(0) => {
            return Err(PlacementError::Infeasible(format!(
                "devices without slots hold no experts; give {} slots",
                experts.div_ceil(devices)
            )));
        }
        Some(slots) if slots * devices < experts => {
            return Err(PlacementError::Infeasible(format!(
                "{devices} devices with {slots} slots hold {} experts, a layer has {experts}; give \
                 {} slots",
                slots * devices,
                experts.div_ceil(devices)
            )));
        }
        Some(slots) if slots > experts => {
            return Err(PlacementError::Infeasible(format!(
                "a device with {slots} slots would hold one of {experts} experts twice; give at \
                 most {experts}"
            )));
        }
        Some(slots) => slots,
        None if experts.is_multiple_of(devices) => experts / devices,
        None => {
            return Err(PlacementError::Infeasible(format!(
                "{experts} experts do not divide over {devices} devices; give --slots {} to fill up \
                 with replicas, or a number of devices that divides {experts}",
                experts.div_ceil(devices)
            )));
        }
    };
    if let Some(present) = &request.present {
        let found = (present.n_layers(), present.n_experts(), present.n_devices());
        if found != (layers, experts, devices) {
            return invalid(format!(
                "the present placement has {} layers, {} experts and {} devices; the trace has {} \
                 and {experts}, and {devices} devices are asked for",
                found.0, found.1, found.2, layers
            ));
        }
    }
    Ok(size)
}

fn broken(error: impl std::fmt::Display) -> PlacementError {
    PlacementError::Internal(format!("a placement that was built is illegal: {error}"))
}

/// The ladder: assignments, dynamic programming, search.
fn by_affinity(chain: &Chain, request: &Request) -> Result<(Placement, Method), PlacementError> {
    let (division, method) = divide(chain, request);
    let placement = Placement::of_division(&division, request.devices, request.per_node);
    Ok((placement.map_err(broken)?, method))
}

fn divide(chain: &Chain, request: &Request) -> (Division, Method) {
    let devices = request.devices;
    if devices == request.per_node {
        if devices == chain.experts {
            return (exact::assignments(chain).0, Method::Assignments);
        }
        if let Some(division) = exact::dynamic(chain, devices, request.exact_steps) {
            return (division, Method::DynamicProgramming);
        }
        return (
            search(chain, &Levels::flat(devices), &request.search),
            Method::Search,
        );
    }
    let levels = levels(request);
    (by_nodes(chain, &levels, request), Method::Search)
}

/// What staying is worth: the seconds it saves.
fn levels(request: &Request) -> Levels {
    let Costs {
        within_node_s,
        between_nodes_s,
        ..
    } = request.costs;
    let node = (between_nodes_s - within_node_s).max(0.0);
    let sum = (node + within_node_s).max(f64::MIN_POSITIVE);
    Levels {
        groups: request.devices,
        per_node: request.per_node,
        same_device: within_node_s / sum,
        same_node: node / sum,
    }
}

/// Nodes first and then devices within them, or both at once: whichever is worth more, then improved
/// at both levels.
fn by_nodes(chain: &Chain, levels: &Levels, request: &Request) -> Division {
    let options = SearchOptions {
        rounds: 0,
        ..request.search
    };
    let n_nodes = levels.groups / levels.per_node;
    let nodes = search(chain, &Levels::flat(n_nodes), &request.search);
    let inside = in_parallel(n_nodes, request.search.threads, |node| {
        let members: Vec<Vec<usize>> = nodes
            .iter()
            .map(|layer| {
                let members = layer.iter().enumerate();
                let members = members.filter(|(_, of)| usize::from(**of) == node);
                members.map(|(expert, _)| expert).collect()
            })
            .collect();
        let part = chain.restricted(&members);
        let alone = SearchOptions {
            threads: 1,
            ..options
        };
        (
            search(&part, &Levels::flat(levels.per_node), &alone),
            members,
        )
    });
    let mut nodes_first = nodes.clone();
    for (node, (division, members)) in inside.iter().enumerate() {
        for (layer, members) in members.iter().enumerate() {
            for (at, expert) in members.iter().enumerate() {
                nodes_first[layer][*expert] = (node * levels.per_node) as u16 + division[layer][at];
            }
        }
    }
    let at_once = search(chain, levels, &options);
    let mut best = if levels.value(chain, &nodes_first) >= levels.value(chain, &at_once) {
        nodes_first
    } else {
        at_once
    };
    improve(chain, levels, &mut best, &request.search);
    best
}

/// Packs every layer by load, then renumbers devices so that transitions stay where that is free.
fn by_load(demand: &Demand, slots: Slots, request: &Request) -> Result<Placement, PlacementError> {
    let layers = in_parallel(demand.load.len(), request.search.threads, |layer| {
        balance(&demand.load[layer], slots).map(|placed| placed.devices)
    });
    let layers = layers.into_iter().collect::<Result<Vec<_>, _>>()?;
    let placement = Placement::new(layers, request.per_node).map_err(broken)?;
    align(demand.chain, &placement)
}

/// The best of exchanges from the placements by load and by affinity.
fn by_both(
    demand: &Demand,
    slots: Slots,
    request: &Request,
    is_division: bool,
) -> Result<(Placement, Method), PlacementError> {
    /// Sweeps over all layers.
    const SWEEPS: usize = 12;
    let mut starts = vec![by_load(demand, slots, request)?];
    if is_division {
        starts.push(by_affinity(demand.chain, request)?.0);
    } else if demand.chain.experts.is_multiple_of(request.devices) {
        let (division, _) = divide(demand.chain, request);
        starts.push(filled(demand, &division, slots, request)?);
    }
    // By affinity alone, exchanges see transfers only.
    let costs = match request.objective {
        Objective::Affinity => Costs {
            expert_s: 0.0,
            ..request.costs
        },
        _ => request.costs,
    };
    let mut best: Option<(f64, Placement)> = None;
    for start in starts {
        let refined = refine(demand, costs, &start, SWEEPS)?;
        let total = seconds(demand, costs, &refined);
        if best.as_ref().is_none_or(|(least, _)| total < *least) {
            best = Some((total, refined));
        }
    }
    best.map(|(_, placement)| (placement, Method::Exchanges))
        .ok_or_else(|| PlacementError::Internal("no start was placed".into()))
}

/// A division with its spare slots filled: replicas of the busiest experts on the least busy devices.
fn filled(
    demand: &Demand,
    division: &Division,
    slots: Slots,
    request: &Request,
) -> Result<Placement, PlacementError> {
    let experts = demand.chain.experts;
    let layers = division.iter().zip(demand.load).map(|(layer, load)| {
        let mut held = vec![Vec::new(); slots.devices];
        for (expert, device) in layer.iter().enumerate() {
            held[usize::from(*device)].push(expert as u16);
        }
        let mut counts = vec![1usize; experts];
        let spare = slots.devices * slots.per_device - experts;
        for _ in 0..spare {
            let each = |expert: usize| load[expert] / counts[expert] as f64;
            let loads: Vec<f64> = held
                .iter()
                .map(|held| held.iter().map(|e| each(usize::from(*e))).sum())
                .collect();
            let open = (0..slots.devices).filter(|d| held[*d].len() < slots.per_device);
            let Some(device) = open.min_by(|a, b| loads[*a].total_cmp(&loads[*b])) else {
                break;
            };
            let lacking = (0..experts).filter(|e| !held[device].contains(&(*e as u16)));
            let Some(expert) = lacking.max_by(|a, b| each(*a).total_cmp(&each(*b))) else {
                break;
            };
            held[device].push(expert as u16);
            counts[expert] += 1;
        }
        held
    });
    Placement::new(layers.collect(), request.per_node).map_err(broken)
}

/// The certificate of what stays on devices.
fn proof(chain: &Chain, groups: usize, method: Method, request: &Request) -> Certificate {
    if method == Method::Assignments || groups == chain.experts {
        let (_, proofs) = exact::assignments(chain);
        let pairs = proofs.into_iter().map(|proof| {
            Proof::Matching(Prices {
                rows: proof.row_prices,
                columns: proof.column_prices,
            })
        });
        return Certificate {
            groups,
            pairs: pairs.collect(),
        };
    }
    certify(chain, groups, request.search.threads)
}

/// Mean bound on the share kept in one of `groups`, each of which holds `size` experts.
fn bound(
    chain: &Chain,
    request: &Request,
    certificate: Option<&Certificate>,
    groups: usize,
    size: usize,
) -> f64 {
    let pairs = chain.pairs.len().max(1) as f64;
    let Some(certificate) = certificate else {
        // With replicas, a device still holds no more than its slots of what may follow an expert.
        let rows = chain.pairs.iter().map(|pair| -> f64 {
            let top = |row: &[f32]| -> f64 {
                let mut row = row.to_vec();
                row.sort_unstable_by(|a, b| b.total_cmp(a));
                row.iter().take(size).map(|share| f64::from(*share)).sum()
            };
            pair.chunks(chain.experts).map(top).sum()
        });
        return rows.sum::<f64>() / pairs;
    };
    let single = evaluate(chain, certificate);
    let coupled = if request.coupled_steps > 0 && groups > 1 {
        let options = CoupledOptions {
            steps: request.coupled_steps,
            threads: request.search.threads,
        };
        Multipliers::find(chain, groups, options).bound(chain, options.threads)
    } else {
        single
    };
    single.min(coupled) / pairs
}

/// A placement on the tokens that placed it, on those held out, and next to others.
struct Scored {
    kept: Kept,
    held_out: Option<(Kept, Balance)>,
    linear: Option<Kept>,
    present: Option<Kept>,
}

impl Scored {
    fn of(
        placement: &Placement,
        chain: &Chain,
        held: Option<&Evidence>,
        request: &Request,
    ) -> Result<Self, PlacementError> {
        let held_out = held.map(|held| {
            (
                kept(&held.chain, placement),
                balance_of(&held.load, placement),
            )
        });
        let linear = if chain.experts.is_multiple_of(request.devices) {
            let division = chain.linear(request.devices);
            let linear = Placement::of_division(&division, request.devices, request.per_node);
            Some(kept(chain, &linear.map_err(broken)?))
        } else {
            None
        };
        Ok(Self {
            kept: kept(chain, placement),
            held_out,
            linear,
            present: request.present.as_ref().map(|present| kept(chain, present)),
        })
    }
}

fn report(
    demand: &Demand,
    slots: Slots,
    request: &Request,
    method: Method,
    placement: &Placement,
    scored: Scored,
    bound: Kept,
) -> Report {
    let share = |of: fn(&Kept) -> f64| Share {
        kept: of(&scored.kept),
        // Rounding: a proven optimum is its own bound.
        bound: of(&bound).max(of(&scored.kept)),
        held_out: scored.held_out.as_ref().map(|(kept, _)| of(kept)),
        linear: scored.linear.as_ref().map(of),
        present: scored.present.as_ref().map(of),
    };
    let (device, node) = (share(|kept| kept.device), share(|kept| kept.node));
    let bounds = demand.load.iter().map(|load| {
        let mean = load.iter().sum::<f64>() / slots.devices as f64;
        let least = super::balance::least_greatest(load, slots);
        if least > 0.0 { mean / least } else { 1.0 }
    });
    let bounds: Vec<f64> = bounds.collect();
    let total = |placement: &Placement| seconds(demand, request.costs, placement);
    let compute = bounds
        .iter()
        .map(|bound| super::price::compute_seconds(request.costs, demand.choices, *bound));
    let transfer = super::price::transfer_seconds(
        request.costs,
        Kept {
            device: device.bound,
            node: node.bound.max(device.bound),
        },
    );
    let predicted = total(placement);
    Report {
        objective: request.objective,
        method,
        slots: slots.per_device,
        tokens: Tokens {
            placed_by: 0,
            held_out: 0,
        },
        device,
        node,
        balance: BalanceReport {
            measured: balance_of(demand.load, placement),
            bound: bounds.iter().sum::<f64>() / bounds.len().max(1) as f64,
            held_out: scored.held_out.map(|(_, balance)| balance),
            present: request
                .present
                .as_ref()
                .map(|present| balance_of(demand.load, present)),
        },
        seconds: Seconds {
            predicted,
            bound: (compute.sum::<f64>() + demand.chain.pairs.len() as f64 * transfer)
                .min(predicted),
            present: request.present.as_ref().map(total),
        },
        migration: request.present.as_ref().map(|present| {
            let experts = placement.moves_from(present);
            Migration {
                experts,
                of: placement.n_layers() * placement.n_devices() * placement.slots(),
                bytes: request.expert_bytes.map(|bytes| bytes * experts as u64),
            }
        }),
        idle_experts: demand
            .load
            .iter()
            .flatten()
            .filter(|load| **load == 0.0)
            .count(),
    }
}
