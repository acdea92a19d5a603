//! The graph, folded by layer, with layouts and collectives.
//!
//! Enters: the global graph and its plan, and the graph of one rank where there is one.
//! Leaves: a part of the page with one foldable table per block.
//! Invariant: types are those of the whole tensors where the global graph knows the name, and the
//! rank's own otherwise (marked as such).

use std::collections::BTreeMap;
use std::fmt::Write;

use meshweave_dsl::graph::{Graph, Op, OpId, TensorId, TensorType};
use meshweave_dsl::layout::{Layout, ReduceKind};
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::OpKind;
use meshweave_dsl::plan::Plan;
use meshweave_dsl::timeline::Category;

use super::ReportInput;
use super::fold::{Block, Phase, category, fold, template};
use super::format::{self, bytes, escape, plural, scaled};
use super::page::{Part, legend};
use super::plan_part::layout_html;

/// Blocks of more ops are cut, so that a page of an unfoldable graph still opens.
const N_SHOWN_OPS: usize = 600;

pub(super) fn graph(input: &ReportInput) -> Option<Part> {
    let shown = input.local.as_ref().or(input.graph.as_ref())?;
    let view = View {
        shown,
        global: input.graph.as_ref().map(Global::new),
        plan: input.plan.as_ref(),
        is_local: input.local.is_some(),
    };
    let blocks = fold(shown);
    let mut body = legend(false, false);
    let mut phase = None;
    for block in &blocks {
        if phase != Some(block.phase) {
            phase = Some(block.phase);
            let _ = writeln!(
                body,
                "<h3>{}</h3>",
                match block.phase {
                    Phase::Forward => "Forward",
                    Phase::Backward => "Backward",
                    Phase::Update => "Update",
                }
            );
        }
        view.block(&mut body, block);
    }
    let n_collectives = shown
        .ops
        .iter()
        .filter(|op| op.kind.group().is_some())
        .count();
    let mut lead = plural(shown.ops.len(), "op");
    if view.is_local {
        let _ = write!(
            lead,
            " on one device, {n_collectives} of them communication"
        );
    }
    let _ = write!(lead, ", folded into {}", plural(blocks.len(), "block"));
    lead.push_str(". Open a block for its ops; sizes are those of the whole tensors, layouts say which dim is sharded over which axis.");
    Some(Part {
        id: "graph",
        title: "Graph",
        lead,
        body,
    })
}

/// The global graph with its tensors by name.
struct Global<'a> {
    graph: &'a Graph,
    by_name: BTreeMap<&'a str, TensorId>,
    producers: Vec<Option<OpId>>,
}

impl<'a> Global<'a> {
    fn new(graph: &'a Graph) -> Self {
        Self {
            graph,
            by_name: graph
                .tensor_ids()
                .map(|id| (graph.tensor(id).name.as_str(), id))
                .collect(),
            producers: graph.producers(),
        }
    }

    fn layout(&self, plan: &Plan, id: TensorId) -> Layout {
        let Some(op_id) = self.producers[id.index()] else {
            return plan.source_layout(id);
        };
        let op = self.graph.op(op_id);
        let position = op.results.iter().position(|result| *result == id);
        let mut results = plan.op_layouts(self.graph, op_id).results;
        position
            .filter(|position| *position < results.len())
            .map(|position| results.swap_remove(position))
            .unwrap_or_default()
    }
}

struct View<'a> {
    shown: &'a Graph,
    global: Option<Global<'a>>,
    plan: Option<&'a Plan>,
    is_local: bool,
}

impl View<'_> {
    fn block(&self, body: &mut String, block: &Block) {
        let repeats = block.members.len();
        let mut collectives: BTreeMap<String, usize> = BTreeMap::new();
        let mut n_flops = 0.0;
        for op_id in &block.ops {
            let op = self.shown.op(*op_id);
            if let Some(group) = op.kind.group() {
                let axes: Vec<&str> = group.axes.iter().map(|axis| axis.as_str()).collect();
                *collectives
                    .entry(format!("{} {}", op.kind.name(), axes.join(",")))
                    .or_default() += 1;
            }
            n_flops += op
                .kind
                .n_flops(&self.types(&op.inputs), &self.types(&op.results));
        }
        let is_open = block.stem.is_some() && block.phase == Phase::Forward && repeats > 1;
        let _ = write!(
            body,
            "<details class=\"block\"{}><summary><code>{}</code>",
            if is_open { " open=\"open\"" } else { "" },
            escape(&block.title())
        );
        if repeats > 1 {
            let _ = write!(body, " <span class=\"times\">×{repeats}</span>");
        }
        let _ = write!(
            body,
            " <span class=\"faint\">{}{}</span>",
            plural(block.ops.len(), "op"),
            if n_flops > 0.0 {
                let whose = if self.is_local { " on a device" } else { "" };
                format!(" · {}{whose}", scaled(n_flops, "FLOP"))
            } else {
                String::new()
            }
        );
        for (what, times) in &collectives {
            let times = if *times > 1 {
                format!("{times} × ")
            } else {
                String::new()
            };
            let _ = write!(
                body,
                " <span class=\"chip\">{times}{}</span>",
                escape(what.trim_end())
            );
        }
        body.push_str("</summary>\n<div class=\"wide\"><table class=\"ops\"><tbody>\n");
        for op_id in block.ops.iter().take(N_SHOWN_OPS) {
            self.row(body, block, *op_id);
        }
        body.push_str("</tbody></table></div>\n");
        if block.ops.len() > N_SHOWN_OPS {
            let _ = writeln!(
                body,
                "<p class=\"hint\">{} more left out.</p>",
                plural(block.ops.len() - N_SHOWN_OPS, "op")
            );
        }
        body.push_str("</details>\n");
    }

    fn row(&self, body: &mut String, block: &Block, op_id: OpId) {
        let op = self.shown.op(op_id);
        let of = category(&op.kind);
        let (class, _) = format::category(of);
        let name = self.shown.op_name(op);
        let inputs: Vec<String> = op
            .inputs
            .iter()
            .map(|id| short(&self.shown.tensor(*id).name, block))
            .collect();
        if self.global.is_some() && self.plan.is_some() && !self.is_local {
            self.reshards(body, op_id, op);
        }
        let _ = write!(
            body,
            "<tr class=\"{class}\"><td class=\"kind\"><i class=\"swatch {class}\"></i>{}",
            op.kind.name()
        );
        let detail = detail(&op.kind, &self.types(&op.inputs));
        if !detail.is_empty() {
            let _ = write!(body, " <span class=\"faint\">{}</span>", escape(&detail));
        }
        let _ = write!(
            body,
            "</td><td class=\"name\"><code>{}</code><span class=\"from\"> ← {}</span></td>",
            escape(&short(name, block)),
            escape(&inputs.join(", "))
        );
        let Some(result) = op.results.first() else {
            body.push_str("<td></td><td></td></tr>\n");
            return;
        };
        if of == Category::Collective {
            let group = op.kind.group().map_or_else(String::new, format::group);
            let n_bytes = self.shown.ty(*result).n_bytes();
            let _ = writeln!(
                body,
                "<td>{}</td><td class=\"faint\">{} a device</td></tr>",
                escape(&group),
                bytes(n_bytes)
            );
            return;
        }
        let (ty, layout) = self.whole(*result);
        let layout = layout.unwrap_or_default();
        let _ = writeln!(
            body,
            "<td>{}</td><td><code class=\"faint\">{}</code></td></tr>",
            layout_html(&layout, ty),
            sizes(ty)
        );
    }

    /// Rows for inputs that are needed in another layout than they have.
    fn reshards(&self, body: &mut String, op_id: OpId, op: &Op) {
        let (Some(global), Some(plan)) = (&self.global, self.plan) else {
            return;
        };
        let wanted = plan.op_layouts(global.graph, op_id).inputs;
        for (id, wanted) in op.inputs.iter().zip(wanted) {
            let held = global.layout(plan, *id);
            if held == wanted {
                continue;
            }
            let ty = global.graph.ty(*id);
            let _ = writeln!(
                body,
                "<tr class=\"collective\"><td class=\"kind\"><i class=\"swatch collective\"></i>reshard</td><td class=\"name\"><code>{}</code></td><td>{}</td><td>→ {}</td></tr>",
                escape(&template(&global.graph.tensor(*id).name)),
                layout_html(&held, ty),
                layout_html(&wanted, ty)
            );
        }
    }

    fn types(&self, ids: &[TensorId]) -> Vec<&TensorType> {
        ids.iter().map(|id| self.shown.ty(*id)).collect()
    }

    /// The type of the whole tensor and its layout, where known.
    fn whole(&self, id: TensorId) -> (&TensorType, Option<Layout>) {
        let tensor = self.shown.tensor(id);
        let known = self.global.as_ref().and_then(|global| {
            let id = global.by_name.get(tensor.name.as_str())?;
            Some((global, *id))
        });
        match known {
            Some((global, id)) => (
                global.graph.ty(id),
                self.plan.map(|plan| global.layout(plan, id)),
            ),
            None => (&tensor.ty, None),
        }
    }
}

/// `f32 8 × 256 × 512`; the names of the dims stand in the layout.
fn sizes(ty: &TensorType) -> String {
    let sizes: Vec<String> = ty.shape.iter().map(|(_, size)| size.to_string()).collect();
    format!("{} {}", ty.dtype, sizes.join("×"))
}

/// The name as it stands in its block: without the block's own prefix, other layers kept.
fn short(name: &str, block: &Block) -> String {
    let (Some(stem), Some(layer)) = (&block.stem, block.layers.first()) else {
        return name.into();
    };
    let own = format!("{stem}[{layer}].");
    match name.find(&own) {
        Some(at) => format!("{}{}", &name[..at], &name[at + own.len()..]),
        None if *layer > 0 && name.contains(&format!("{stem}[{}].", layer - 1)) => {
            name.replace(&format!("{stem}[{}]", layer - 1), &format!("{stem}[−1]"))
        }
        None => match name.contains(&format!("{stem}[{}].", layer + 1)) {
            true => name.replace(&format!("{stem}[{}]", layer + 1), &format!("{stem}[+1]")),
            false => name.into(),
        },
    }
}

/// What the name of the op does not say.
fn detail(kind: &OpKind, inputs: &[&TensorType]) -> String {
    let list = |dims: &[Dim]| dims.iter().map(Dim::as_str).collect::<Vec<_>>().join(", ");
    match kind {
        OpKind::Contract { out } => {
            let mut summed: Vec<Dim> = Vec::new();
            for dim in inputs.iter().flat_map(|ty| ty.dims()) {
                if !out.contains(dim) && !summed.contains(dim) {
                    summed.push(dim.clone());
                }
            }
            if summed.is_empty() {
                String::new()
            } else {
                format!("Σ {}", list(&summed))
            }
        }
        OpKind::Reduce { dims, .. } | OpKind::Transpose { dims } => list(dims),
        OpKind::Rename { from, to } => format!("{from} → {to}"),
        OpKind::Split { dim, into } => {
            let into: Vec<Dim> = into.iter().map(|(dim, _)| dim.clone()).collect();
            format!("{dim} → {}", list(&into))
        }
        OpKind::Merge { dims, into } => format!("{} → {into}", list(dims)),
        OpKind::Slice { dim, start, len } => format!("{dim} {start}..{}", start + len),
        OpKind::Concat { dim }
        | OpKind::Softmax { dim }
        | OpKind::RmsNorm { dim, .. }
        | OpKind::LayerNorm { dim, .. } => dim.to_string(),
        OpKind::TopK { k, dim, .. } => format!("{k} of {dim}"),
        OpKind::Attention(dims) if dims.causal => "causal".into(),
        OpKind::AllGather { dim, .. } => dim.to_string(),
        OpKind::AllReduce { kind, .. } => kind.name().into(),
        OpKind::ReduceScatter { kind, dim, .. } => match kind {
            ReduceKind::Sum => dim.to_string(),
            _ => format!("{} {dim}", kind.name()),
        },
        OpKind::AllToAll { split, concat, .. } => format!("{split} → {concat}"),
        OpKind::CollectivePermute { to, .. } => format!("to {to}"),
        _ => String::new(),
    }
}
