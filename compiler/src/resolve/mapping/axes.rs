//! Meshes and tactics in the words of mappings.
//!
//! Enters: `mesh` and `apply`. Leaves: whether their axes and tactics are those of mappings.
//! Invariant: axes are listed as ranks are laid out, outermost first.

use meshweave_dsl::mapping::GridAxis;
use meshweave_dsl::weave::ast::{Apply, Document, MeshDef, Statement};

/// The axes of attention and dense layers, outermost first.
pub(super) const MAIN: [&str; 4] = ["pp", "dp", "cp", "tp"];
/// The axes of experts, outermost first.
pub(super) const EXPERTS: [&str; 4] = ["pp", "edp", "ep", "etp"];

/// The tactics that have a meaning for mappings.
const TACTICS: [&str; 10] = [
    "dp",
    "fsdp",
    "zero",
    "megatron",
    "sp",
    "ep",
    "context",
    "ring",
    "all_gather",
    "ulysses",
];

/// The axes that a mesh may have.
pub(super) fn axes_of(mesh: &MeshDef) -> [&'static str; 4] {
    match mesh.refolds {
        Some(_) => EXPERTS,
        None => MAIN,
    }
}

/// Whether all axes of a mesh are axes of mappings.
pub(super) fn has_known_axes(mesh: &MeshDef) -> bool {
    let known = axes_of(mesh);
    let mut axes = mesh.axes.iter();
    axes.all(|axis| known.contains(&axis.name.as_str()))
}

/// Whether a tactic is one of mappings.
pub(super) fn is_known_tactic(apply: &Apply) -> bool {
    apply.except.is_empty() && TACTICS.contains(&apply.tactic.node.as_str())
}

/// The axis of that name.
pub(super) fn grid_axis(name: &str) -> Option<GridAxis> {
    Some(match name {
        "tp" => GridAxis::Tp,
        "cp" => GridAxis::Cp,
        "dp" => GridAxis::Dp,
        "pp" => GridAxis::Pp,
        "ep" => GridAxis::Ep,
        "etp" => GridAxis::Etp,
        "edp" => GridAxis::Edp,
        _ => return None,
    })
}

/// The meshes of a document.
pub(super) fn meshes(document: &Document) -> impl Iterator<Item = &MeshDef> {
    document
        .statements()
        .filter_map(|statement| match &statement.node {
            Statement::Mesh(mesh) => Some(mesh),
            _ => None,
        })
}
