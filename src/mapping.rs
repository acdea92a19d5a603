//! Plans that are mappings: found, or read back from their witnesses, and said in text.
//!
//! Enters: a session. Leaves: a mapping with its price and certificate, and the plan's text.
//! Invariant: a plan that is read is priced again; what its remarks say is never believed.

mod place;

use std::collections::BTreeSet;

use meshweave_compiler::plan::estimate::sites::Sites;
use meshweave_compiler::plan::estimate::stages::Stages;
use meshweave_compiler::plan::estimate::{Estimate, Job, Memories, estimate};
use meshweave_compiler::plan::outer::compare::{Change, changed, choices};
use meshweave_compiler::plan::outer::conflict::conflict;
use meshweave_compiler::plan::outer::{
    self, Certificate, Digests, FamilyRow, Found, Options, OuterError, Priced,
};
use meshweave_compiler::resolve::{self, MappingRequest, print_mapping};
use meshweave_dsl::cluster::Cluster;
use meshweave_dsl::diagnostics::{Class, Diagnostic, Span};
use meshweave_dsl::mapping::{GridAxis, Mapping};
use meshweave_dsl::weave;

use crate::cli::render::{bytes, exact_seconds, seconds, seconds_of};
use crate::error::{Error, Result};
use crate::session::Session;
use place::{place_lines, slow_links};

/// A mapping, priced.
#[derive(Clone, Debug)]
pub struct Mapped {
    pub request: MappingRequest,
    pub mapping: Mapping,
    /// The cluster with its nodes in the order in which ranks take them.
    pub placed: Cluster,
    pub estimate: Estimate,
    /// Of the search; absent for a mapping that was read.
    pub found: Option<Found>,
}

impl Session {
    /// Searches for the best mapping.
    ///
    /// # Errors
    /// Statements without meaning for mappings, or none that meets them.
    pub fn search_mapping(&self) -> Result<Mapped> {
        let mut request = self.mapping_request(&self.document)?;
        // The witnesses of an earlier plan, where they still are a mapping.
        request.options.warm_start =
            self.mapping_request(&self.document.freeze())
                .ok()
                .and_then(|frozen| {
                    outer::the_only(&frozen.workload, &frozen.cluster, &frozen.space()).ok()
                });
        let found = outer::search(
            &request.workload,
            &request.cluster,
            &request.space(),
            &request.options,
        )
        .map_err(|error| self.outer_error(&request, error))?;
        request.workload.batch = found.best.batch;
        Ok(Mapped {
            mapping: found.best.mapping.clone(),
            placed: found.placed.clone(),
            estimate: found.best.estimate.clone(),
            found: Some(found),
            request,
        })
    }

    /// The mapping that the document's witnesses say, priced again.
    ///
    /// # Errors
    /// Something is left open, or the mapping is not legal.
    pub fn read_mapping(&self) -> Result<Mapped> {
        let request = self.mapping_request(&self.document.freeze())?;
        let mapping = outer::the_only(&request.workload, &request.cluster, &request.space())
            .map_err(|error| Error::plain(Class::Invalid, error))?;
        let estimate = estimate(&request.workload, &mapping, &request.cluster)
            .map_err(|error| Error::plain(Class::Unsupported, error))?;
        Ok(Mapped {
            placed: request.cluster.clone(),
            request,
            mapping,
            estimate,
            found: None,
        })
    }

    /// The mapping that the document says, or else the best one.
    ///
    /// # Errors
    /// See [`Session::search_mapping`].
    pub fn mapping(&self) -> Result<Mapped> {
        self.read_mapping().or_else(|_| self.search_mapping())
    }

    /// An error of the planner in the words of the document: with the statements that exclude each
    /// other, and the cheapest single way out.
    fn outer_error(&self, request: &MappingRequest, error: OuterError) -> Error {
        let (class, reasons) = match &error {
            OuterError::Invalid { reasons, .. } => (Class::Invalid, reasons.clone()),
            OuterError::Infeasible { .. } => (Class::Infeasible, Vec::new()),
            OuterError::Unsupported(_) => (Class::Unsupported, Vec::new()),
            OuterError::Internal(_) => (Class::Internal, Vec::new()),
        };
        let mut diagnostic = Diagnostic::error(class, error.to_string());
        if matches!(class, Class::Invalid | Class::Infeasible) {
            let blame = blame(request);
            let mut places: Vec<Span> = Vec::new();
            for number in &blame.conflict {
                let restriction = &request.restrictions[*number];
                if places.contains(&restriction.span) {
                    continue;
                }
                let text = format!("`{}`", restriction.text);
                diagnostic = match places.is_empty() {
                    true => diagnostic.at(restriction.span, text),
                    false => diagnostic.also(restriction.span, format!("and {text}")),
                };
                places.push(restriction.span);
            }
            if !blame.conflict.is_empty() {
                diagnostic = diagnostic.help(match places.len() {
                    1 => "this alone cannot be met".to_owned(),
                    n => format!("these {n} cannot all be met; each of them alone can be dropped"),
                });
            }
            for way_out in &blame.ways_out {
                diagnostic = diagnostic.help(way_out.clone());
            }
        }
        for reason in reasons {
            diagnostic = diagnostic.help(reason);
        }
        Error::new(vec![diagnostic], self.sources.clone())
    }

    /// The document with every decision taken.
    pub fn mapping_text(&self, mapped: &Mapped) -> String {
        let remarks = remarks(mapped);
        let request = &mapped.request;
        weave::print(&print_mapping(
            &self.document,
            request,
            (&mapped.mapping, &mapped.placed),
            &remarks,
        ))
    }
}

/// Why a request cannot be met.
struct Blame {
    /// Numbers of restrictions that exclude each other.
    conflict: Vec<usize>,
    /// The cheapest change first.
    ways_out: Vec<String>,
}

/// Finds what excludes each other, and what the cheapest way out costs.
fn blame(request: &MappingRequest) -> Blame {
    let solve = |dropped: &[usize], gap: f64| {
        let options = Options {
            gap,
            within_s: 5.0,
            ..Options::default()
        };
        let space = request.space_without(dropped);
        outer::search(&request.workload, &request.cluster, &space, &options)
    };
    // With a gap of all, the first mapping that is found will do.
    let mut is_possible = |dropped: &[usize]| solve(dropped, 1.0).is_ok();
    let conflict = conflict(request.restrictions.len(), &mut is_possible);
    let mut relaxed: Vec<(f64, String)> = Vec::new();
    for number in &conflict {
        if let Ok(found) = solve(&[*number], request.options.gap.max(0.01)) {
            let text = format!(
                "without `{}` the best {} (predicted): {}",
                request.restrictions[*number].text,
                worth(request, &found.best),
                found.best.mapping
            );
            relaxed.push((found.best.a_sequence_s(), text));
        }
    }
    relaxed.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut ways_out: Vec<String> = relaxed.into_iter().map(|(_, text)| text).collect();
    if conflict.is_empty() {
        ways_out.extend(more_devices(request));
    }
    Blame { conflict, ways_out }
}

/// What a mapping is judged by, as the predicate of a sentence about the best one.
fn worth(request: &MappingRequest, priced: &Priced) -> String {
    match request.open_batch {
        None => format!("step takes {}", seconds(priced.estimate.step_s)),
        Some(_) => format!(
            "makes {} tokens/s with a batch of {}, {} a step",
            grouped(priced.estimate.tokens_per_s.round() as u64),
            grouped(priced.batch as u64),
            seconds(priced.estimate.step_s)
        ),
    }
}

/// How many devices the request needs, doubling them.
fn more_devices(request: &MappingRequest) -> Option<String> {
    const MOST_DOUBLINGS: u32 = 8;
    let options = Options {
        gap: 0.01,
        within_s: 5.0,
        ..Options::default()
    };
    (1..=MOST_DOUBLINGS).find_map(|n_doublings| {
        let factor = 2.0_f64.powi(n_doublings as i32);
        let cluster = changed(
            &request.cluster,
            Change {
                devices: factor,
                ..Change::default()
            },
        );
        let found = outer::search(&request.workload, &cluster, &request.space(), &options).ok()?;
        Some(format!(
            "{} such devices can do it: the best {} (predicted) with {}",
            cluster.n_devices(),
            worth(request, &found.best),
            found.best.mapping
        ))
    })
}

impl Mapped {
    /// Digests of what the mapping is for.
    pub fn digests(&self) -> Digests {
        Digests::of(&self.request.workload, &self.request.cluster.unplaced())
    }

    /// Bytes that every pipeline rank may use.
    pub fn budgets(&self) -> Vec<u64> {
        let space = self.request.space();
        let sites = Sites::new(&self.placed, &self.mapping);
        (0..self.mapping.pp)
            .map(|rank| space.budget_of(sites.of(rank), &self.placed))
            .collect()
    }

    /// Predicted bytes of every pipeline rank.
    pub fn memory_bytes(&self) -> Vec<u64> {
        let memories = Memories::new(&self.request.workload, &self.mapping);
        (0..self.mapping.pp)
            .map(|rank| memories.of(rank, &self.placed).total().0)
            .collect()
    }

    /// The parts of the step beside those of another, where either matters.
    pub fn parts_beside(&self, other: &Self) -> Vec<(&'static str, f64, f64)> {
        let (own, others) = (parts(&self.estimate), parts(&other.estimate));
        let least = 0.0005 * self.estimate.step_s.max(other.estimate.step_s);
        own.into_iter()
            .zip(others)
            .filter(|((_, one), (_, other))| one.max(*other) > least)
            .map(|((name, one), (_, other))| (name, one, other))
            .collect()
    }
}

/// Seconds by cause.
pub fn parts(estimate: &Estimate) -> [(&'static str, f64); 10] {
    let parts = &estimate.parts;
    [
        ("compute", parts.compute),
        ("recompute", parts.recompute),
        ("tp", parts.tp),
        ("cp", parts.cp),
        ("ep", parts.ep),
        ("p2p", parts.p2p),
        ("bubble", parts.bubble),
        ("dp", parts.dp),
        ("optimizer", parts.optimizer),
        ("offload", parts.offload),
    ]
}

/// What the remarks of a plan state.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stated {
    pub predicted_s: Option<f64>,
    pub bound_s: Option<f64>,
    pub model: Option<String>,
    pub cluster: Option<String>,
    pub prices: Option<String>,
}

impl Stated {
    /// Reads the remarks of a document.
    pub fn of(document: &weave::Document) -> Self {
        let mut stated = Self::default();
        for remark in resolve::remarks(document) {
            let Some((key, rest)) = remark.split_once(": ") else {
                continue;
            };
            let first_s = || seconds_of(rest);
            match key {
                "predicted" => stated.predicted_s = first_s(),
                "bound" => stated.bound_s = first_s(),
                "hashes" => {
                    for item in rest.split(", ") {
                        match item.split_once(' ') {
                            Some(("model", hash)) => stated.model = Some(hash.to_owned()),
                            Some(("cluster", hash)) => stated.cluster = Some(hash.to_owned()),
                            Some(("prices", hash)) => stated.prices = Some(hash.to_owned()),
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        stated
    }
}

/// Why a mapping is what it is.
pub fn explain(mapped: &Mapped) -> String {
    let mut text = String::from("Where the time goes (predicted, exposed)\n");
    let total = mapped.estimate.step_s;
    for (name, part) in parts(&mapped.estimate) {
        if part > 0.0005 * total {
            text += &format!(
                "  {:>10}  {:>5.1} %  {name}\n",
                seconds(part),
                100.0 * part / total
            );
        }
    }
    text += "\nWhat the ranks hold (predicted)\n";
    let held = &mapped.estimate.memory;
    for (name, part) in [
        ("parameters", held.parameters),
        ("gradients", held.gradients),
        ("optimizer", held.optimizer),
        ("activations", held.activations),
        ("temporaries", held.temporaries),
        ("communication", held.communication),
        ("logits", held.logits),
        ("cache", held.cache),
        ("fragmentation", held.fragmentation),
        ("framework", held.framework),
    ] {
        if part.0 > 0 {
            text += &format!("  {:>10}  {name}\n", bytes(part.0 as f64));
        }
    }
    text += &format!("  by pipeline rank: {}\n", by_rank(&mapped.memory_bytes()));
    if let Some(found) = &mapped.found {
        text += &families(&found.certificate.schedules);
        text += "\nOther grids (predicted)\n";
        for other in found.runners_up.iter().take(8) {
            let slower = 100.0 * (other.a_sequence_s() / found.best.a_sequence_s() - 1.0);
            let batch = match mapped.request.open_batch {
                Some(_) => format!(" · batch {}", grouped(other.batch as u64)),
                None => String::new(),
            };
            text += &format!(
                "  {:>10}  {}{batch} ({slower:+.1} %{})\n",
                seconds(other.estimate.step_s),
                other.mapping,
                if batch.is_empty() { "" } else { " a token" }
            );
        }
        if found.runners_up.is_empty() {
            text += "  none was priced: every other grid is slower by its bound, or does not fit\n";
        }
    }
    text += &slow_links(mapped);
    text += &prices_of_statements(mapped);
    for (what, change) in [
        (
            "twice the memory",
            Change {
                memory: 2.0,
                ..Change::default()
            },
        ),
        (
            "twice the network",
            Change {
                network: 2.0,
                ..Change::default()
            },
        ),
    ] {
        let cluster = changed(&mapped.request.cluster, change);
        let mut request = mapped.request.clone();
        request.cluster = cluster;
        if let Ok(found) = outer::search(
            &request.workload,
            &request.cluster,
            &request.space(),
            &request.options,
        ) {
            text += &format!(
                "\nWith {what}, the best {} (predicted): {}",
                worth(&request, &found.best),
                found.best.mapping
            );
        }
    }
    text.push('\n');
    text
}

/// Families of schedules beside the chosen one, the fastest first; empty without a pipeline.
fn families(rows: &[FamilyRow]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let mut text = String::from(
        "\nFamilies of schedules (predicted; simulated with the stages' own costs where near)\n",
    );
    text += "  family           closed form   simulated  peak memory  why\n";
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".into());
    for row in rows {
        text += &format!(
            "  {:<15} {:>12} {:>11} {:>12}  {}\n",
            row.family,
            or_dash(row.predicted_s.map(seconds)),
            or_dash(row.simulated_s.map(seconds)),
            or_dash(row.peak_bytes.map(|peak| bytes(peak as f64))),
            row.why
        );
    }
    text
}

/// Why the schedule is the plan's, in a line: the nearest other family.
fn why_schedule(rows: &[FamilyRow]) -> Option<String> {
    let chosen = rows.first()?;
    let next = rows.get(1..)?.iter().find(|row| row.predicted_s.is_some());
    let n_compared = rows.iter().filter(|row| row.predicted_s.is_some()).count();
    let nearest = next.map_or_else(String::new, |next| {
        format!("; next {}, {}", next.family, next.why)
    });
    Some(format!(
        "schedule: {}, the fastest of {n_compared} families{nearest}",
        chosen.family
    ))
}

/// What the best step would take without each statement.
fn prices_of_statements(mapped: &Mapped) -> String {
    let request = &mapped.request;
    let mut text = String::new();
    for (number, restriction) in request.restrictions.iter().enumerate() {
        let space = request.space_without(&[number]);
        let found = outer::search(
            &request.workload,
            &request.cluster,
            &space,
            &request.options,
        );
        let Ok(found) = found else { continue };
        let own = mapped.estimate.step_s / request.workload.batch as f64;
        let saved = 100.0 * (1.0 - found.best.a_sequence_s() / own).max(0.0);
        text += &format!(
            "  {:>5.1} %  without `{}` the best {}\n",
            saved,
            restriction.text,
            worth(request, &found.best)
        );
    }
    if text.is_empty() {
        return text;
    }
    format!("\nWhat each statement costs (predicted: what would be saved without it)\n{text}")
}

/// Runs of ranks beyond which those in between are told by their range.
const MOST_RUNS: usize = 6;

/// Bytes by pipeline rank: runs of equal ones once, and of many the range between the first and last.
fn by_rank(ranks: &[u64]) -> String {
    let mut runs: Vec<(String, usize)> = Vec::new();
    for rank in ranks {
        let item = bytes(*rank as f64);
        match runs.last_mut() {
            Some((last, count)) if *last == item => *count += 1,
            _ => runs.push((item, 1)),
        }
    }
    if runs.len() > MOST_RUNS
        && let [first, between @ .., last] = ranks
    {
        let of = |bound: Option<&u64>| bytes(bound.map_or(0.0, |rank| *rank as f64));
        return format!(
            "{} on rank 0, {} to {} on ranks 1 to {}, {} on rank {}",
            bytes(*first as f64),
            of(between.iter().min()),
            of(between.iter().max()),
            between.len(),
            bytes(*last as f64),
            between.len() + 1
        );
    }
    let texts: Vec<String> = runs
        .into_iter()
        .map(|(item, count)| match count {
            1 => item,
            count => format!("{count} × {item}"),
        })
        .collect();
    texts.join(", ")
}

/// A count with separators.
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (idx, digit) in digits.chars().enumerate() {
        if idx > 0 && (digits.len() - idx).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// What stands above the decisions of a plan: the certificate in words, with figures that are read back.
pub fn remarks(mapped: &Mapped) -> Vec<String> {
    lines(mapped, exact_seconds)
}

/// The certificate in words, with seconds as `show` writes them.
fn lines(mapped: &Mapped, show: fn(f64) -> String) -> Vec<String> {
    let estimate = &mapped.estimate;
    let mut lines = vec![
        format!("mapping: {}", mapped.mapping),
        format!(
            "predicted: {} a step, {} tokens/s, MFU {:.2} % (model operations with the causal half of attention, over the dense bf16 peak)",
            show(estimate.step_s),
            grouped(estimate.tokens_per_s.round() as u64),
            100.0 * estimate.mfu
        ),
    ];
    lines.extend(serving_line(mapped, show));
    if let Some(found) = &mapped.found {
        lines.extend(certificate_lines(mapped, &found.certificate, show));
    }
    let budgets: Vec<u64> = match mapped.budgets() {
        budgets if budgets.windows(2).all(|pair| pair[0] == pair[1]) => budgets[..1].to_vec(),
        budgets => budgets,
    };
    lines.push(format!(
        "memory: {} a rank of the pipeline (predicted) of {} allowed",
        by_rank(&mapped.memory_bytes()),
        by_rank(&budgets),
    ));
    let sites = Sites::new(&mapped.placed, &mapped.mapping);
    let stages = Stages::new(&mapped.request.workload, &mapped.mapping);
    let risk = (0..estimate.stages.len())
        .map(|stage| {
            let site = sites.of(stages.rank_of(stage));
            estimate.stages[stage].memory.risk(&site.device)
        })
        .fold(0.0, f64::max);
    if !mapped.placed.is_flat() {
        lines.extend(place_lines(mapped));
    }
    lines.push(format!(
        "risk: {:.0} % that a run needs more than the device has (part of published runs that exceeded such a prediction so far)",
        100.0 * risk
    ));
    let digests = mapped.digests();
    lines.push(format!(
        "hashes: model {}, cluster {}, prices {}",
        digests.model, digests.cluster, digests.prices
    ));
    lines
}

/// How many sequences are served, and how fast each of them.
fn serving_line(mapped: &Mapped, show: fn(f64) -> String) -> Option<String> {
    let Job::Decode { context } = mapped.request.workload.job else {
        return None;
    };
    let estimate = &mapped.estimate;
    let first = mapped
        .found
        .as_ref()
        .and_then(|found| found.certificate.first_token_s)
        .map(|first_s| format!(", {} to the first of an idle replica", show(first_s)));
    Some(format!(
        "serving: {} sequences of up to {} tokens, {} a token of each{} (predicted); their keys and values take {} a rank, the weights {}",
        grouped(mapped.request.workload.batch as u64),
        grouped(context as u64),
        show(estimate.step_s),
        first.unwrap_or_default(),
        bytes(estimate.memory.cache.0 as f64),
        bytes(estimate.memory.parameters.0 as f64)
    ))
}

fn certificate_lines(
    mapped: &Mapped,
    certificate: &Certificate,
    show: fn(f64) -> String,
) -> Vec<String> {
    let counts = &certificate.counts;
    let simulated = certificate.simulated_s.map(|simulated_s| {
        let seconds = show(simulated_s);
        format!("simulated: {seconds} a step, with the schedule run action by action")
    });
    let mut lines: Vec<String> = simulated.into_iter().collect();
    lines.extend(why_schedule(&certificate.schedules));
    let bound_s = show(certificate.lower_bound_s);
    let gap = gap_of(mapped, certificate);
    lines.push(match mapped.request.open_batch {
        None => format!(
            "bound: {bound_s} (no mapping of the space is faster under these prices), {gap}"
        ),
        Some(_) => format!(
            "bound: {bound_s} for a step of this batch, {} tokens/s (no mapping and no batch of the space makes more under these prices), {gap}",
            grouped(certificate.most_tokens_per_s.round() as u64)
        ),
    });
    lines.push(format!(
        "searched: {} mappings; {} partial ones too large, {} too slow by their bound, {} mappings priced",
        grouped(counts.n_mappings),
        grouped(counts.n_too_large),
        grouped(counts.n_too_slow),
        grouped(counts.n_priced)
    ));
    lines.extend(
        certificate
            .not_searched
            .iter()
            .map(|what| format!("not searched: {what}")),
    );
    lines
}

/// How far the plan is from its bound, and what makes it so where that is far.
fn gap_of(mapped: &Mapped, certificate: &Certificate) -> String {
    let percent = |part: f64| format!("{:.2} %", 100.0 * part);
    let gap = format!("gap {}", percent(certificate.gap));
    let closed_s = mapped.estimate.step_s;
    match certificate.simulated_s {
        Some(simulated_s) if certificate.gap > EXPLAINED_GAP && simulated_s > closed_s => format!(
            "{gap}: {} of closed forms over the bound, {} of the simulated schedule over its closed form",
            percent(closed_s / certificate.lower_bound_s - 1.0),
            percent((simulated_s - closed_s) / certificate.lower_bound_s)
        ),
        _ => gap,
    }
}

/// The gap from which on a plan says what makes it.
const EXPLAINED_GAP: f64 = 0.02;

/// The plan's key figures, for people.
pub fn summary(mapped: &Mapped) -> String {
    let mut text = String::new();
    for line in lines(mapped, seconds) {
        let (key, rest) = line.split_once(": ").unwrap_or(("", &line));
        text += &format!("{key:<10} {rest}\n");
    }
    let total = mapped.estimate.step_s;
    let shares: Vec<String> = parts(&mapped.estimate)
        .iter()
        .filter(|(_, part)| *part > 0.0005 * total)
        .map(|(name, part)| format!("{name} {:.1} %", 100.0 * part / total))
        .collect();
    text += &format!("time       {} (predicted, exposed)\n", shares.join(", "));
    if let Some(found) = &mapped.found {
        text += &format!("solved     in {} (measured)\n", seconds(found.solve_s));
    }
    text
}

/// A page of text about a mapping: its figures, its stages, its groups.
pub fn report(mapped: &Mapped) -> String {
    let mut text = summary(mapped);
    let mapping = &mapped.mapping;
    text += "\nChoices\n";
    for (choice, value) in choices(mapping) {
        text += &format!("  {choice:<20} {value}\n");
    }
    text += "\nStages (predicted, of one microbatch)\n";
    text += "  stage  rank  layers     forward    backward   recompute      memory\n";
    let stages = &mapped.estimate.stages;
    for (idx, stage) in stages.iter().enumerate() {
        let is_same = |other: usize| {
            stages.get(other).is_some_and(|other| {
                (other.n_layers, other.forward_s) == (stage.n_layers, stage.forward_s)
            })
        };
        // Of a long run of like stages the first and the last will do.
        if idx > 0 && is_same(idx - 1) && is_same(idx + 1) && idx % mapping.pp != 0 {
            continue;
        }
        text += &format!(
            "  {idx:>5} {:>5} {:>7}  {:>10}  {:>10}  {:>10}  {:>10}\n",
            idx % mapping.pp,
            stage.n_layers,
            seconds(stage.forward_s),
            seconds(stage.backward_input_s + stage.backward_weight_s),
            seconds(stage.recompute_s),
            bytes(stage.memory.total().0 as f64)
        );
    }
    text += "\nGroups (ranks are numbered tp innermost, pp outermost)\n";
    for (name, axis) in [
        ("tp", GridAxis::Tp),
        ("cp", GridAxis::Cp),
        ("dp", GridAxis::Dp),
        ("pp", GridAxis::Pp),
        ("etp", GridAxis::Etp),
        ("ep", GridAxis::Ep),
        ("edp", GridAxis::Edp),
    ] {
        let groups = mapping.groups(axis);
        if groups.size < 2 {
            continue;
        }
        let cluster = &mapped.placed;
        let nodes: BTreeSet<usize> = groups
            .of(0)
            .iter()
            .map(|rank| cluster.node_of(*rank))
            .collect();
        text += &format!(
            "  {name:<4} {:>6} ranks, {:>6} apart, on {} node{}\n",
            groups.size,
            groups.stride,
            nodes.len(),
            if nodes.len() == 1 { "" } else { "s" }
        );
    }
    text
}
