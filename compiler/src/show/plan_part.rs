//! The plan: its mesh, where every parameter is kept, its text, and why it was chosen.
//!
//! Enters: plan and graph, the plan's text, the explanation. Leaves: two parts of the page.
//! Invariant: bytes per device are those of the device that holds most.

use std::collections::BTreeMap;
use std::fmt::Write;

use meshweave_dsl::graph::{Graph, Role, TensorId, TensorType};
use meshweave_dsl::layout::{Layout, Mesh};
use meshweave_dsl::plan::Plan;

use super::ReportInput;
use super::fold::template;
use super::format::{bytes, count, escape, plural};
use super::page::Part;

/// Meshes of more ranks are told by their axes only.
const N_DRAWN_RANKS: usize = 64;

pub(super) fn plan(input: &ReportInput) -> Option<Part> {
    let mesh = input
        .plan
        .as_ref()
        .map(|plan| &plan.mesh)
        .or(input.program.as_ref().map(|program| &program.mesh));
    if mesh.is_none() && input.plan_text.is_none() {
        return None;
    }
    let mut body = String::new();
    if let Some(mesh) = mesh {
        draw_mesh(&mut body, mesh);
    }
    if let (Some(plan), Some(graph)) = (&input.plan, &input.graph) {
        sources(&mut body, plan, graph);
    }
    if let Some(text) = &input.plan_text {
        let _ = writeln!(
            body,
            "<details open=\"open\" class=\"text\"><summary>The plan in the language</summary><pre class=\"weave\">{}</pre></details>",
            weave(text)
        );
    }
    let lead = mesh.map_or_else(String::new, |mesh| {
        format!(
            "{} in a mesh of {}.",
            plural(mesh.n_ranks(), "device"),
            mesh.axes()
                .iter()
                .map(|(axis, degree)| format!("<b>{}</b>\u{a0}{degree}", escape(axis.as_str())))
                .collect::<Vec<_>>()
                .join(" × ")
        )
    });
    Some(Part {
        id: "plan",
        title: "Plan",
        lead,
        body,
    })
}

pub(super) fn explanation(input: &ReportInput) -> Option<Part> {
    let text = input.explanation.as_ref()?;
    Some(Part {
        id: "why",
        title: "Why this plan",
        lead: "What was searched, what is proven, and what else was considered.".into(),
        body: format!("<pre class=\"prose\">{}</pre>\n", escape(text.trim_end())),
    })
}

fn draw_mesh(body: &mut String, mesh: &Mesh) {
    let n_ranks = mesh.n_ranks();
    if !(2..=N_DRAWN_RANKS).contains(&n_ranks) {
        return;
    }
    let axes: Vec<_> = mesh
        .axes()
        .iter()
        .filter(|(_, degree)| *degree > 1)
        .collect();
    let Some(((inner, n_columns), outer)) = axes.split_last() else {
        return;
    };
    let outer_axes: Vec<&str> = outer.iter().map(|(axis, _)| axis.as_str()).collect();
    let _ = write!(
        body,
        "<figure class=\"mesh\"><table><caption>{}{} →</caption><tbody>",
        if outer_axes.is_empty() {
            String::new()
        } else {
            format!("{} ↓ \u{a0} ", escape(&outer_axes.join(" × ")))
        },
        escape(inner.as_str())
    );
    for row in 0..n_ranks / n_columns {
        body.push_str("<tr>");
        if !outer.is_empty() {
            let coordinates: Vec<String> = outer
                .iter()
                .map(|(axis, _)| {
                    format!(
                        "{}{}",
                        escape(axis.as_str()),
                        mesh.coordinate(row * n_columns, axis)
                    )
                })
                .collect();
            let _ = write!(body, "<th>{}</th>", coordinates.join(" "));
        }
        for column in 0..*n_columns {
            let _ = write!(body, "<td>{}</td>", row * n_columns + column);
        }
        body.push_str("</tr>");
    }
    body.push_str("</tbody></table></figure>\n");
}

/// Sources that are kept alike.
struct Class {
    n_members: usize,
    ty: TensorType,
    layout: Layout,
    role: &'static str,
    n_bytes: usize,
    n_device_bytes: usize,
}

fn sources(body: &mut String, plan: &Plan, graph: &Graph) {
    let mut order: Vec<(String, String)> = Vec::new();
    let mut classes: BTreeMap<(String, String), Class> = BTreeMap::new();
    for id in graph.tensor_ids() {
        let tensor = graph.tensor(id);
        let role = match tensor.role {
            Role::Input => "input",
            Role::Param(_) => "parameter",
            Role::State { .. } => "optimizer state",
            Role::Const(_) => "table",
            Role::Temp => continue,
        };
        let layout = plan.source_layout(id);
        let key = (
            template(&tensor.name),
            format!("{} {}", tensor.ty, layout.display(tensor.ty.dims())),
        );
        let n_device_bytes = device_bytes(plan, graph, id, &layout);
        let class = classes.entry(key.clone()).or_insert_with(|| {
            order.push(key);
            Class {
                n_members: 0,
                ty: tensor.ty.clone(),
                layout,
                role,
                n_bytes: 0,
                n_device_bytes: 0,
            }
        });
        class.n_members += 1;
        class.n_bytes += tensor.ty.n_bytes();
        class.n_device_bytes += n_device_bytes;
    }
    let roles = [
        ("parameter", "Parameters", true),
        ("optimizer state", "Optimizer state", false),
        ("input", "Inputs", true),
        ("table", "Tables", false),
    ];
    for (role, heading, open) in roles {
        let members: Vec<(&(String, String), &Class)> = order
            .iter()
            .filter_map(|key| classes.get(key).map(|class| (key, class)))
            .filter(|(_, class)| class.role == role)
            .collect();
        if members.is_empty() {
            continue;
        }
        let total: usize = members.iter().map(|(_, class)| class.n_bytes).sum();
        let on_device: usize = members.iter().map(|(_, class)| class.n_device_bytes).sum();
        let _ = write!(
            body,
            "<details class=\"sources\"{}><summary>{heading} <span class=\"faint\">{} on a device of {} in all</span></summary>\n<div class=\"wide\"><table class=\"numbers\"><thead><tr><th>Tensor</th><th class=\"right\">number</th><th>Type</th><th>Layout</th><th class=\"right\">on a device</th><th class=\"right\">in all</th></tr></thead><tbody>\n",
            if open { " open=\"open\"" } else { "" },
            bytes(on_device),
            bytes(total),
        );
        for ((name, _), class) in members {
            let _ = writeln!(
                body,
                "<tr><td class=\"name\"><code>{}</code></td><td class=\"right faint\">{}</td><td><code class=\"faint\">{}</code></td><td>{}</td><td class=\"right\">{}</td><td class=\"right faint\">{}</td></tr>",
                escape(name),
                count(class.n_members),
                escape(&class.ty.to_string()),
                layout_html(&class.layout, &class.ty),
                bytes(class.n_device_bytes),
                bytes(class.n_bytes),
            );
        }
        body.push_str("</tbody></table></div></details>\n");
    }
}

fn device_bytes(plan: &Plan, graph: &Graph, id: TensorId, layout: &Layout) -> usize {
    let ty = graph.ty(id);
    // Chunks are balanced with the longer ones first, so that rank 0 holds most.
    let n_elements: usize = layout
        .region(&ty.shape, &plan.mesh, 0)
        .iter()
        .map(|interval| interval.len)
        .product();
    n_elements * ty.dtype.n_bytes()
}

/// `[batch/dp, seq, embed]+sum(tp)` with the axes set off.
pub(super) fn layout_html(layout: &Layout, ty: &TensorType) -> String {
    let text = escape(&layout.display(ty.dims()));
    let mut html = String::from("<code class=\"layout\">");
    let mut in_axes = false;
    let mut depth = 0;
    for character in text.chars() {
        let ends =
            in_axes && depth == 0 && (character == ']' || character == ',' || character == '+');
        if ends {
            html.push_str("</b>");
            in_axes = false;
        }
        match character {
            '/' | '+' if !in_axes => {
                html.push_str(if character == '/' {
                    "<b>"
                } else {
                    "<b class=\"partial\">"
                });
                in_axes = true;
            }
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        html.push(character);
    }
    if in_axes {
        html.push_str("</b>");
    }
    html.push_str("</code>");
    html
}

/// Plan text with its keywords and comments set off.
fn weave(text: &str) -> String {
    const KEYWORDS: [&str; 27] = [
        "plan",
        "model",
        "cluster",
        "train",
        "mesh",
        "use",
        "on",
        "tactic",
        "apply",
        "shard",
        "over",
        "pin",
        "forbid",
        "prefer",
        "pipeline",
        "chunks",
        "cut",
        "schedule",
        "microbatches",
        "memory",
        "budget",
        "recompute",
        "offload",
        "experts",
        "solve",
        "except",
        "weight",
    ];
    let mut html = String::new();
    for line in text.trim_end().lines() {
        let (code, comment) = match line.find('#') {
            Some(at) => line.split_at(at),
            None => (line, ""),
        };
        let indent = code.len() - code.trim_start().len();
        html.push_str(&code[..indent]);
        let first = code[indent..].split([' ', '{']).next().unwrap_or("");
        if KEYWORDS.contains(&first) {
            let _ = write!(html, "<b>{first}</b>");
            html.push_str(&escape(&code[indent + first.len()..]));
        } else {
            html.push_str(&escape(&code[indent..]));
        }
        if !comment.is_empty() {
            let _ = write!(html, "<i>{}</i>", escape(comment));
        }
        html.push('\n');
    }
    html
}

#[cfg(test)]
mod tests {
    use super::*;
    use meshweave_dsl::dtype::DType;
    use meshweave_dsl::layout::ReduceKind;

    #[test]
    fn layouts_are_set_off_and_balanced() {
        let ty = TensorType::new(DType::F32, [("batch", 4), ("seq", 8), ("embed", 16)]);
        let layout = Layout::replicated()
            .shard("batch", "dp")
            .shard("seq", "cp")
            .shard("seq", "tp")
            .partial("ep", ReduceKind::Sum);
        assert_eq!(
            layout_html(&layout, &ty),
            "<code class=\"layout\">[batch<b>/dp</b>, seq<b>/(cp,tp)</b>, embed]<b class=\"partial\">+sum(ep)</b></code>"
        );
    }

    #[test]
    fn plan_text_keeps_its_characters() {
        let html = weave("mesh main = dp:2 > tp:4 # <fast>\n  shard x over tp\n");
        assert_eq!(
            html,
            "<b>mesh</b> main = dp:2 &gt; tp:4 <i># &lt;fast&gt;</i>\n  <b>shard</b> x over tp\n"
        );
    }
}
