//! Where the stages of a mapping are, and what slow links do to it, in words.
//!
//! Enters: a priced mapping on a cluster whose nodes are not alike. Leaves: lines for people.
//! Invariant: times are predicted, of the same mapping with and without the link.

use meshweave_compiler::plan::estimate::estimate;
use meshweave_compiler::plan::estimate::sites::ranks_of;
use meshweave_compiler::plan::estimate::stages::Stages;
use meshweave_dsl::cluster::{SlowLinks, show_nodes};
use meshweave_dsl::mapping::GridAxis;

use super::Mapped;
use crate::cli::render::seconds;

/// Which pipeline ranks are on which nodes, and which nodes idle.
pub(super) fn place_lines(mapped: &Mapped) -> Vec<String> {
    let (cluster, mapping) = (&mapped.placed, &mapped.mapping);
    let layers = |rank: usize| -> usize {
        let stages = &mapped.estimate.stages;
        let own = Stages::new(&mapped.request.workload, mapping);
        let held = (0..stages.len()).filter(|stage| own.rank_of(*stage) == rank);
        held.map(|stage| stages[stage].n_layers).sum()
    };
    // Neighbors with the same devices and as many layers are said together.
    let mut runs: Vec<(String, usize, std::ops::Range<usize>)> = Vec::new();
    for rank in 0..mapping.pp {
        let mut names: Vec<String> = cluster
            .nodes_of(ranks_of(mapping, rank))
            .iter()
            .map(|node| {
                cluster
                    .group(cluster.node_id(*node).group)
                    .device
                    .name
                    .clone()
            })
            .collect();
        names.dedup();
        let (name, count) = (names.join(" and "), layers(rank));
        match runs.last_mut() {
            Some((last, layers, ranks)) if *last == name && *layers == count => ranks.end += 1,
            _ => runs.push((name, count, rank..rank + 1)),
        }
    }
    let mut lines: Vec<String> = runs
        .into_iter()
        .map(|(name, n_layers, ranks)| {
            let first = ranks_of(mapping, ranks.start).start;
            let end = ranks_of(mapping, ranks.end - 1).end;
            let (who, each) = match (ranks.len(), mapping.pp) {
                (_, 1) => ("all ranks".to_owned(), ""),
                (1, _) => (format!("pipeline rank {}", ranks.start), ""),
                (_, _) => (
                    format!("pipeline ranks {} to {}", ranks.start, ranks.end - 1),
                    " each",
                ),
            };
            let nodes = show_nodes(&cluster.nodes_of(first..end));
            format!("place: {who} on nodes {nodes} ({name}), {n_layers} layers{each}")
        })
        .collect();
    let taken = cluster.nodes_of(0..mapping.n_ranks());
    let idle: Vec<usize> = (0..cluster.n_all_nodes())
        .filter(|node| !taken.contains(node))
        .collect();
    if !idle.is_empty() {
        lines.push(format!("idle: nodes {}", show_nodes(&idle)));
    }
    lines
}

/// What each slow link of the cluster does to the step: who crosses it, and what the same mapping would
/// take without it.
pub(super) fn slow_links(mapped: &Mapped) -> String {
    let (cluster, mapping) = (&mapped.placed, &mapped.mapping);
    let mut text = String::new();
    let mut before = 0;
    for (group_idx, group) in cluster.groups().enumerate() {
        for (slow_idx, slow) in group.slow.iter().enumerate() {
            let mut healed = cluster.clone();
            let own = match group_idx {
                0 => Some(&mut healed),
                idx => healed.others.get_mut(idx - 1),
            };
            if let Some(own) = own {
                own.slow.remove(slow_idx);
            }
            let Ok(without) = estimate(&mapped.request.workload, mapping, &healed) else {
                continue;
            };
            let lost_s = (mapped.estimate.step_s - without.step_s).max(0.0);
            let crossing = crossings(mapped, &|node| {
                node >= before && node < before + group.n_nodes && slow.covers(node - before, group)
            });
            let who = match (crossing.is_empty(), slow.links) {
                (true, _) => "no group crosses it".to_owned(),
                (false, SlowLinks::Within) => format!("stages on it: {}", crossing.join("; ")),
                (false, SlowLinks::Uplink) => format!("crossed by {}", crossing.join("; ")),
            };
            text += &format!("  {:>10}  `{slow}`: {who}\n", seconds(lost_s));
        }
        before += group.n_nodes;
    }
    if text.is_empty() {
        return text;
    }
    format!("\nWhat each slow link costs (predicted: the same plan without it)\n{text}")
}

/// The pipeline ranks on any of these nodes, each with the axes whose groups leave them.
fn crossings(mapped: &Mapped, is_slow: &dyn Fn(usize) -> bool) -> Vec<String> {
    let (cluster, mapping) = (&mapped.placed, &mapped.mapping);
    let axes = [
        ("tp", GridAxis::Tp),
        ("cp", GridAxis::Cp),
        ("dp", GridAxis::Dp),
        ("pp", GridAxis::Pp),
        ("etp", GridAxis::Etp),
        ("ep", GridAxis::Ep),
        ("edp", GridAxis::Edp),
    ];
    let has_experts = mapped.request.workload.model.moe.is_some();
    let mut found = Vec::new();
    for rank in 0..mapping.pp {
        let ranks = ranks_of(mapping, rank);
        let slow: Vec<usize> = ranks
            .filter(|rank| is_slow(cluster.node_of(*rank)))
            .collect();
        if slow.is_empty() {
            continue;
        }
        let crosses = |axis: GridAxis| {
            let groups = mapping.groups(axis);
            groups.size > 1
                && slow.iter().any(|rank| {
                    let group = groups.of(*rank);
                    group.iter().any(|other| !is_slow(cluster.node_of(*other)))
                })
        };
        let names: Vec<&str> = axes
            .iter()
            .filter(|(name, axis)| (has_experts || !name.starts_with('e')) && crosses(*axis))
            .map(|(name, _)| *name)
            .collect();
        found.push(match names.is_empty() {
            true => format!("no axis of pipeline rank {rank}"),
            false => format!("{} of pipeline rank {rank}", names.join(", ")),
        });
    }
    found
}
