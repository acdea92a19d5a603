//! Levels, slow links and groups of a cluster block.
//!
//! Enters: the lines `level`, `slow` and `group`. Leaves: a cluster with them.
//! Invariant: units of a level are whole; a slow link belongs to a unit that there is.

use meshweave_dsl::cluster::{Cluster, Level, Link, Slow, SlowLinks};
use meshweave_dsl::diagnostics::{Diagnostic, Span, did_you_mean};
use meshweave_dsl::weave::ast::Definition;

use super::{Block, define, preset};
use crate::resolve::settings::Settings;

/// Whether one block names another as a group.
pub(super) fn has_group(owner: &Definition, group: &Definition) -> bool {
    let mut groups = owner.settings().filter(|setting| setting.key == "group");
    groups.any(|setting| {
        let value = setting.values.first().and_then(|value| value.known());
        value.and_then(|value| value.as_str()) == Some(group.name.as_str())
    })
}

/// `level NAME of COUNT [oversubscription FACTOR] [link NAME BANDWIDTH [LATENCY]]`: so many units of the
/// level below, nodes at first, are a unit; its uplink has the bandwidth of the link below over the
/// factor, or of the link that is given.
pub(super) fn add_level(cluster: &mut Cluster, s: &mut Settings<'_>) {
    let Some((name, span)) = s.text("level") else {
        return;
    };
    let owner = format!("cluster `{}`", cluster.name);
    let known = cluster.levels.iter().any(|level| level.name == name);
    if known || ["node", "device"].contains(&name) {
        return report(
            s,
            span,
            format!("{owner} has a level `{name}` already"),
            "levels stand above nodes, innermost first, each with a name of its own",
        );
    }
    let Some(count) = s.required_count("of", 1) else {
        return;
    };
    let below = cluster.levels.last();
    let (below_name, below_nodes, below_link) = match below {
        None => ("node", 1, &cluster.between_nodes),
        Some(level) => (level.name.as_str(), level.n_nodes, &level.link),
    };
    let mut link = below_link.clone();
    let n_nodes = below_nodes.saturating_mul(count);
    if !cluster.n_nodes.is_multiple_of(n_nodes) {
        let message = format!(
            "{owner}: {} nodes do not make whole units of level `{name}`, which has {n_nodes} nodes \
             ({count} × {below_nodes} of level `{below_name}`)",
            cluster.n_nodes
        );
        let whole = cluster.n_nodes.next_multiple_of(n_nodes);
        return report(
            s,
            span,
            message,
            &format!("write `nodes {whole}`, or change the counts"),
        );
    }
    if let Some((name, bytes_per_s, latency_s)) = s.has("link").then(|| s.link("link")).flatten() {
        let latency_s = latency_s.unwrap_or(link.latency_s);
        link = Link {
            name,
            bytes_per_s,
            latency_s,
        };
    }
    if s.has("oversubscription") {
        let Some(factor) = s.number("oversubscription", "from 1 on", |factor| factor >= 1.0) else {
            return;
        };
        link.bytes_per_s /= factor;
    }
    let name = name.to_owned();
    cluster.levels.push(Level {
        name,
        n_nodes,
        link,
    });
}

/// `slow UNIT INDEX links PERCENT` or `slow UNIT INDEX uplink PERCENT`.
pub(super) fn add_slow(cluster: &mut Cluster, s: &mut Settings<'_>) {
    let Some((unit, idx, span)) = s.numbered("slow", "node 3 uplink 25 %") else {
        return;
    };
    let owner = format!("cluster `{}`", cluster.name);
    let level = cluster.levels.iter().find(|level| level.name == unit);
    let n_units = match (unit, level) {
        ("node", _) => cluster.n_nodes,
        (_, Some(level)) => cluster.n_nodes / level.n_nodes,
        (_, None) => {
            let names = || {
                let levels = cluster.levels.iter().map(|level| level.name.as_str());
                std::iter::once("node").chain(levels)
            };
            let all = format!("it has {}", names().collect::<Vec<_>>().join(", "));
            let way_out = did_you_mean(unit, names()).unwrap_or(all);
            return report(s, span, format!("{owner} has no level `{unit}`"), &way_out);
        }
    };
    if idx >= n_units {
        let message = format!("{owner} has no {unit} {idx}: there are {n_units}");
        let way_out = format!("count from 0 to {}", n_units - 1);
        return report(s, span, message, &way_out);
    }
    let mut found = Vec::new();
    for (key, links) in [("links", SlowLinks::Within), ("uplink", SlowLinks::Uplink)] {
        if s.has(key) {
            let Some(part) = s.part(key, "25 %") else {
                return;
            };
            found.push((links, part));
        }
    }
    if found.is_empty()
        || found
            .iter()
            .any(|(links, _)| *links == SlowLinks::Within && unit != "node")
    {
        let message = format!("{owner}: which links of {unit} {idx} are slow, and how slow?");
        let way_out = match unit {
            "node" => {
                "add `uplink 25 %` for those that leave the node, `links 50 %` for those within"
            }
            _ => "add `uplink 25 %` for those that leave it",
        };
        return report(s, span, message, way_out);
    }
    let unit = unit.to_owned();
    cluster
        .slow
        .extend(found.into_iter().map(|(links, part)| Slow {
            unit: unit.clone(),
            idx,
            links,
            part,
        }));
}

fn report(s: &mut Settings<'_>, span: Span, message: String, way_out: &str) {
    let diagnostic = Diagnostic::invalid(message).code("W106");
    s.diagnostics.push(diagnostic.at(span, "").help(way_out));
}

impl Block<'_> {
    /// A cluster of several groups: the lines `group`, and the link between them.
    pub(super) fn join(
        self,
        all: &[&Definition],
        diagnostics: &mut Vec<Diagnostic>,
    ) -> Option<Cluster> {
        let definition = self.definition;
        let name = definition.name.as_str();
        let own = definition
            .body
            .items()
            .filter_map(|line| line.node.settings.first())
            .find(|setting| !["group", "link", "name"].contains(&setting.key.as_str()));
        let own = own.map(|setting| (setting.span, format!("`{}`", setting.key)));
        let own = own.or(definition
            .base
            .as_ref()
            .map(|base| (base.span, "the preset".into())));
        if let Some((span, what)) = own {
            diagnostics.push(
                Diagnostic::invalid(format!(
                    "cluster `{name}` is made of groups, so {what} has no place in it"
                ))
                .code("W106")
                .at(span, "")
                .help("say it in the cluster that is the group"),
            );
            return None;
        }
        let mut groups: Vec<Cluster> = Vec::new();
        for mut s in self.groups {
            let named = s.text("group");
            diagnostics.append(&mut s.diagnostics);
            let (text, span) = named?;
            let defined = all.iter().find(|other| other.name.as_str() == text);
            let group = match defined {
                None => preset(text, span, diagnostics)?,
                Some(group) if group.get("group").is_some() => {
                    diagnostics.push(
                        Diagnostic::invalid(format!(
                            "cluster `{text}` is made of groups, and cannot be one of `{name}`"
                        ))
                        .code("W106")
                        .at(span, "")
                        .help("list its groups here"),
                    );
                    return None;
                }
                Some(group) => define(group, all, diagnostics)?,
            };
            groups.push(group);
        }
        if groups
            .iter()
            .any(|group| group.device.kind != groups[0].device.kind)
        {
            diagnostics.push(
                Diagnostic::invalid(format!(
                    "cluster `{name}` joins virtual devices and real ones"
                ))
                .code("W106")
                .at(definition.name.span, "")
                .help("plan for them apart"),
            );
            return None;
        }
        let mut groups = groups.into_iter();
        let mut cluster = groups.next()?;
        cluster.others = groups.collect();
        cluster.name = self.name.unwrap_or_else(|| name.to_owned());
        for mut s in self.links {
            s.word("between", &["groups"]);
            if let Some((name, bytes_per_s, latency_s)) = s.link("link") {
                let latency_s = latency_s.unwrap_or(cluster.between_nodes.latency_s);
                cluster.between_groups = Some(Link {
                    name,
                    bytes_per_s,
                    latency_s,
                });
            }
            if !s.has("between") {
                let span = s.span_of("link");
                let message = format!("cluster `{name}`: between what is this link?");
                report(
                    &mut s,
                    span,
                    message,
                    "add `between groups`; links of a group belong in it",
                );
            }
            diagnostics.append(&mut s.diagnostics);
        }
        Some(cluster)
    }
}
