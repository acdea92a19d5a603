//! The cluster that a plan names.
//!
//! Enters: `cluster "h100:16"`, `cluster "file.weave"`, or `cluster NAME [= PRESET] { … }`.
//! Leaves: a [`Cluster`]. Invariant: all its counts and speeds are positive; its levels have whole units.

mod print;
mod topology;

use std::path::Path;

use meshweave_dsl::cluster::{Arch, Cluster, DeviceKind, Link};
use meshweave_dsl::diagnostics::{Diagnostic, SourceId, Sources, Span, did_you_mean, has_errors};
use meshweave_dsl::units::Quantity;
use meshweave_dsl::weave::ast::{
    Definition, Document, Reference, Setting, SettingLine, Spanned, Statement,
};
use meshweave_dsl::weave::parse;

use super::existing_file;
use super::settings::Settings;

pub use print::print_cluster;

pub(super) fn resolve_cluster(
    document: &Document,
    reference: &Spanned<Reference>,
    base_dir: &Path,
    sources: &mut Sources,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<Cluster> {
    match &reference.node {
        Reference::Text(text) if text.ends_with(".weave") => {
            from_file(text, reference.span, base_dir, sources, diagnostics)
        }
        Reference::Text(text) => preset(text, reference.span, diagnostics),
        Reference::Name(name) => {
            let definitions = definitions(document);
            let found = definitions
                .iter()
                .find(|definition| definition.name.node == *name);
            if let Some(definition) = found {
                return define(definition, &definitions, diagnostics);
            }
            let names = definitions.iter().map(|d| d.name.node.as_str());
            let mut diagnostic =
                Diagnostic::invalid(format!("no cluster `{name}` is defined here"))
                    .code("W106")
                    .at(reference.span, "")
                    .maybe_help(did_you_mean(name.as_str(), names));
            diagnostic = if Cluster::preset_names().contains(&name.as_str()) {
                diagnostic.fix(
                    reference.span,
                    format!("\"{name}:8\""),
                    "a preset stands in quotes, with its number of devices",
                )
            } else {
                diagnostic.help(format!(
                    "add `cluster {name} {{ … }}`, or give a preset such as \"local:8\""
                ))
            };
            diagnostics.push(diagnostic);
            None
        }
    }
}

fn definitions(document: &Document) -> Vec<&Definition> {
    document
        .statements()
        .filter_map(|statement| match &statement.node {
            Statement::Cluster(definition) => Some(definition),
            _ => None,
        })
        .collect()
}

fn preset(text: &str, span: Span, diagnostics: &mut Vec<Diagnostic>) -> Option<Cluster> {
    match Cluster::preset(text) {
        Ok(cluster) => Some(cluster),
        Err(error) => {
            diagnostics.push(
                Diagnostic::invalid(error.to_string())
                    .code("W106")
                    .at(span, "")
                    .help(format!(
                        "presets are {}, with a number of devices as in \"local:8\"; a file ends in `.weave`",
                        Cluster::preset_names().join(", ")
                    )),
            );
            None
        }
    }
}

/// The only cluster block of another file.
fn from_file(
    text: &str,
    span: Span,
    base_dir: &Path,
    sources: &mut Sources,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<Cluster> {
    let path = existing_file(
        "the cluster",
        text,
        span,
        base_dir,
        "give the path of a `.weave` file with a `cluster` block, relative to this file",
        diagnostics,
    )?;
    let content = match std::fs::read_to_string(&path) {
        Ok(content) => content,
        Err(error) => {
            diagnostics.push(
                Diagnostic::invalid(format!("the cluster file `{text}` cannot be read: {error}"))
                    .code("W104")
                    .at(span, ""),
            );
            return None;
        }
    };
    let source = sources.add(text, content.clone());
    only_block(&content, text, source, Some(span), diagnostics)
}

/// The only cluster block of `text`, which came from `name`.
///
/// Without a cluster, at least one diagnostic is an error.
pub fn cluster_of_text(
    name: &str,
    text: &str,
    sources: &mut Sources,
) -> (Option<Cluster>, Vec<Diagnostic>) {
    let mut diagnostics = Vec::new();
    let source = sources.add(name, text);
    let cluster = only_block(text, name, source, None, &mut diagnostics);
    (cluster.filter(|_| !has_errors(&diagnostics)), diagnostics)
}

fn only_block(
    content: &str,
    name: &str,
    source: SourceId,
    named_at: Option<Span>,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<Cluster> {
    let parsed = parse(content, source);
    let is_broken = has_errors(&parsed.diagnostics);
    diagnostics.extend(parsed.diagnostics);
    if is_broken {
        return None;
    }
    let all = definitions(&parsed.document);
    // Those that are groups of another one are parts of it.
    let whole: Vec<&Definition> = all
        .iter()
        .copied()
        .filter(|definition| {
            !all.iter()
                .any(|other| topology::has_group(other, definition))
        })
        .collect();
    match whole.as_slice() {
        [definition] => define(definition, &all, diagnostics),
        found => {
            let diagnostic = Diagnostic::invalid(format!(
                "the file `{name}` has {} cluster blocks, but must have one",
                found.len()
            ))
            .code("W106");
            diagnostics.push(match named_at {
                Some(span) => diagnostic.at(span, ""),
                None => diagnostic,
            });
            None
        }
    }
}

/// Keys that begin a line, with those that may follow on it.
const LINES: [(&str, &[&str]); 9] = [
    ("name", &["name"]),
    ("nodes", &["nodes", "devices"]),
    ("devices", &["devices", "nodes"]),
    (
        "device",
        &[
            "device",
            "kind",
            "arch",
            "memory",
            "bandwidth",
            "throughput",
            "vector",
            "launch",
            "matmul_efficiency",
            "vector_efficiency",
            "host_bandwidth",
            "host_memory",
        ],
    ),
    ("matmul", &["matmul"]),
    ("link", &["link", "within", "between"]),
    ("level", &["level", "of", "oversubscription", "link"]),
    ("slow", &["slow", "links", "uplink"]),
    ("group", &["group"]),
];

fn define(
    definition: &Definition,
    all: &[&Definition],
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<Cluster> {
    let n_before = diagnostics.len();
    let block = Block::read(definition, diagnostics);
    let cluster = match block.groups.is_empty() {
        true => block.build(diagnostics),
        false => block.join(all, diagnostics),
    };
    cluster.filter(|_| !has_errors(diagnostics.get(n_before..).unwrap_or_default()))
}

/// A cluster block, line by line.
struct Block<'a> {
    definition: &'a Definition,
    n_nodes: Option<usize>,
    n_devices: Option<usize>,
    name: Option<String>,
    device: Option<Settings<'a>>,
    /// Speeds of contractions by type.
    matmul: Vec<Settings<'a>>,
    links: Vec<Settings<'a>>,
    levels: Vec<Settings<'a>>,
    slow: Vec<Settings<'a>>,
    groups: Vec<Settings<'a>>,
}

impl<'a> Block<'a> {
    fn read(definition: &'a Definition, diagnostics: &mut Vec<Diagnostic>) -> Self {
        let mut block = Self {
            definition,
            n_nodes: None,
            n_devices: None,
            name: None,
            device: None,
            matmul: Vec::new(),
            links: Vec::new(),
            levels: Vec::new(),
            slow: Vec::new(),
            groups: Vec::new(),
        };
        let owner = format!("cluster `{}`", definition.name.node);
        let mut seen: Vec<&Spanned<Setting>> = Vec::new();
        for line in definition.body.items() {
            let SettingLine { settings } = &line.node;
            let Some(first) = settings.first() else {
                continue;
            };
            let key = first.key.as_str();
            let Some((_, known)) = LINES.iter().find(|(begin, _)| *begin == key) else {
                let keys = LINES.map(|(begin, _)| begin);
                let unknown = Settings::new(owner.clone(), line.span, settings.first(), &keys);
                diagnostics.extend(unknown.diagnostics);
                continue;
            };
            let mut s = Settings::new(owner.clone(), line.span, settings, known);
            diagnostics.append(&mut s.diagnostics);
            for key in ["name", "nodes", "devices", "device"] {
                let Some(setting) = s.get(key) else { continue };
                match seen.iter().find(|earlier| earlier.key == setting.key) {
                    Some(earlier) => diagnostics.push(
                        Diagnostic::invalid(format!("{owner}: `{key}` is given twice"))
                            .code("W101")
                            .at(setting.span, "again here")
                            .also(earlier.span, "first here"),
                    ),
                    None => seen.push(setting),
                }
            }
            if s.has("nodes") {
                block.n_nodes = s.count("nodes", 1);
            }
            if s.has("devices") {
                block.n_devices = s.count("devices", 1);
            }
            diagnostics.append(&mut s.diagnostics);
            match key {
                "device" => block.device = Some(s),
                "matmul" => block.matmul.push(s),
                "link" => block.links.push(s),
                "level" => block.levels.push(s),
                "slow" => block.slow.push(s),
                "group" => block.groups.push(s),
                "name" => {
                    block.name = s.text("name").map(|(text, _)| text.to_owned());
                    diagnostics.append(&mut s.diagnostics);
                }
                _ => {}
            }
        }
        block
    }

    fn build(self, diagnostics: &mut Vec<Diagnostic>) -> Option<Cluster> {
        let definition = self.definition;
        let mut device = self.device;
        let named = device
            .as_mut()
            .and_then(|s| s.text("device"))
            .map(|(text, span)| (if text == "host" { "local" } else { text }, span));
        // With its kind, a device is described here and bears any name.
        let kind = device
            .as_mut()
            .and_then(|s| s.word("kind", &["host", "gpu"]));
        let own_name = named
            .filter(|_| kind.is_some())
            .map(|(text, _)| text.to_owned());
        let named = named.map(|(text, span)| match kind {
            Some("host") => ("local", span),
            Some(_) => ("h100", span),
            None => (text, span),
        });
        let base = match (&definition.base, named) {
            (Some(base), None) => match &base.node {
                Reference::Name(name) => (name.as_str().to_owned(), base.span),
                Reference::Text(text) => {
                    let name = text.split(':').next().unwrap_or_default();
                    (name.to_owned(), base.span)
                }
            },
            (None, Some((text, span))) => (text.to_owned(), span),
            (Some(base), Some((_, span))) => {
                diagnostics.push(
                    Diagnostic::invalid(format!(
                        "cluster `{}` has a preset and a device of its own",
                        definition.name.node
                    ))
                    .code("W106")
                    .at(span, "the device")
                    .also(base.span, "the preset")
                    .help("remove one of the two"),
                );
                return None;
            }
            (None, None) => {
                diagnostics.push(
                    Diagnostic::invalid(format!(
                        "cluster `{}` has no device",
                        definition.name.node
                    ))
                    .code("W106")
                    .at(definition.name.span, "")
                    .help("add `device \"host\"` or `device \"h100\"`, or start from a preset: `cluster NAME = h100 { … }`"),
                );
                return None;
            }
        };
        let n_nodes = self.n_nodes.unwrap_or(1);
        let one = preset(&format!("{}:64", base.0), base.1, diagnostics)?;
        let is_host = one.device.kind == DeviceKind::Host;
        let default = if is_host { 1 } else { one.devices_per_node };
        let n_devices = self.n_devices.unwrap_or(default);
        let total = n_nodes.saturating_mul(n_devices);
        let mut cluster = preset(&format!("{}:{total}", base.0), base.1, diagnostics)?;
        cluster.name = self
            .name
            .unwrap_or_else(|| definition.name.node.as_str().to_owned());
        if let Some(name) = own_name {
            cluster.device.name = name;
        }
        (cluster.n_nodes, cluster.devices_per_node) = (n_nodes, n_devices);
        if let Some(mut s) = device {
            change_device(&mut cluster, &mut s);
            diagnostics.append(&mut s.diagnostics);
        }
        if !self.matmul.is_empty() {
            cluster.device.matmul_flops_per_s.clear();
        }
        for mut s in self.matmul {
            if let Some((dtype, speed)) = s.speed("matmul") {
                cluster.device.matmul_flops_per_s.insert(dtype, speed);
            }
            diagnostics.append(&mut s.diagnostics);
        }
        for mut s in self.links {
            change_link(&mut cluster, &mut s);
            diagnostics.append(&mut s.diagnostics);
        }
        for mut s in self.levels {
            topology::add_level(&mut cluster, &mut s);
            diagnostics.append(&mut s.diagnostics);
        }
        for mut s in self.slow {
            topology::add_slow(&mut cluster, &mut s);
            diagnostics.append(&mut s.diagnostics);
        }
        Some(cluster)
    }
}

fn change_device(cluster: &mut Cluster, s: &mut Settings<'_>) {
    let device = &mut cluster.device;
    let throughput = |quantity: Quantity| quantity.flops_per_second().map(|value| value.0);
    if let Some(bytes) = s.quantity("memory", "80 GiB", |q| q.bytes().map(|b| b.0 as f64)) {
        device.memory_bytes = bytes as u64;
    }
    if let Some(speed) = s.quantity("bandwidth", "3 TB/s", |q| {
        q.bytes_per_second().map(|value| value.0)
    }) {
        device.memory_bytes_per_s = speed;
    }
    if let Some(speed) = s.quantity("throughput", "50 GFLOPS", throughput) {
        for peak in device.matmul_flops_per_s.values_mut() {
            *peak = speed;
        }
        device.vector_flops_per_s = device.vector_flops_per_s.min(speed);
    }
    if let Some(speed) = s.quantity("vector", "20 GFLOPS", throughput) {
        device.vector_flops_per_s = speed;
    }
    let is_part = |part: f64| part > 0.0 && part <= 1.0;
    if let Some(part) = s.number("matmul_efficiency", "above 0 and up to 1", is_part) {
        device.matmul_efficiency = part;
    }
    if let Some(part) = s.number("vector_efficiency", "above 0 and up to 1", is_part) {
        device.vector_efficiency = part;
    }
    if let Some(launch) = s.quantity("launch", "4 us", |q| q.seconds().map(|t| t.0)) {
        device.launch_s = launch;
    }
    if let Some(name) = s.word("arch", &Arch::ALL.map(Arch::name)) {
        let found = Arch::ALL.into_iter().find(|arch| arch.name() == name);
        device.arch = found.unwrap_or(device.arch);
    }
    if let Some(speed) = s.quantity("host_bandwidth", "25 GB/s", |q| {
        q.bytes_per_second().map(|value| value.0)
    }) {
        device.host_bytes_per_s = speed;
    }
    if let Some(bytes) = s.quantity("host_memory", "128 GB", |q| q.bytes().map(|b| b.0 as f64)) {
        device.host_memory_bytes = bytes as u64;
    }
}

/// `link NAME BANDWIDTH [LATENCY] [within node | between nodes]`; between nodes when not said.
fn change_link(cluster: &mut Cluster, s: &mut Settings<'_>) {
    let is_within = s.has("within");
    if is_within {
        s.word("within", &["node"]);
    }
    if s.has("between") {
        s.word("between", &["nodes"]);
    }
    let Some((name, bytes_per_s, latency_s)) = s.link("link") else {
        return;
    };
    let link = if is_within {
        &mut cluster.within_node
    } else {
        &mut cluster.between_nodes
    };
    *link = Link {
        name,
        bytes_per_s,
        latency_s: latency_s.unwrap_or(link.latency_s),
    };
}
