//! Meshes and layouts as written.
//!
//! Invariant: [`Split::Axes`] and the axes of a [`Partial`] are not empty; a [`MeshDef`] has at
//! least one axis.

use serde::{Deserialize, Serialize};

use super::{Choice, IndexItem, Name, Spanned};

/// `mesh NAME = axis:degree > axis:degree [within LEVEL] … [refolds OTHER] [on NODES]`, outermost
/// axis first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MeshDef {
    pub name: Spanned<Name>,
    pub axes: Vec<Spanned<Axis>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refolds: Option<Spanned<Name>>,
    /// The nodes that the ranks take, in their order; only of a mesh that refolds none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on: Option<Spanned<Choice<NodeList>>>,
}

/// `nodes[8..24,0]`: nodes of the cluster, in the order in which ranks take them; at least one item.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeList {
    pub items: Vec<IndexItem>,
}

impl NodeList {
    /// The list of these nodes.
    pub fn of(nodes: &[usize]) -> Self {
        let items = crate::cluster::ranges_of(nodes)
            .into_iter()
            .map(|range| match range.len() {
                1 => IndexItem::At(range.start as u64),
                _ => IndexItem::Range {
                    start: range.start as u64,
                    end: Some(range.end as u64),
                },
            })
            .collect();
        Self { items }
    }

    /// The nodes, of a cluster that has so many; an open range goes to the last one.
    pub fn nodes(&self, n_nodes: usize) -> Vec<usize> {
        let of = |item: &IndexItem| match *item {
            IndexItem::At(at) => at..at + 1,
            IndexItem::Range { start, end } => start..end.unwrap_or(n_nodes as u64),
        };
        // One beyond the end is enough to be refused.
        let most = n_nodes as u64 + 1;
        let all = self.items.iter().map(of);
        all.flat_map(|range| {
            (range.start..range.end.min(range.start.max(most))).map(|n| n as usize)
        })
        .collect()
    }
}

/// One axis of a mesh.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Axis {
    pub name: Name,
    pub degree: Degree,
    /// The level of the cluster that it must not leave, such as `node`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within: Option<Name>,
}

/// How many ranks lie along an axis.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Degree {
    /// A number, `auto`, `auto{…}`.
    Is(Choice<u64>),
    /// `rest`: what the other axes leave.
    Rest { witness: Option<u64> },
    /// `same`: that of the axis of this name in the mesh that is refolded.
    Same { witness: Option<u64> },
}

impl Degree {
    /// The degree if it is known: fixed, or the witness.
    pub fn known(&self) -> Option<u64> {
        match self {
            Self::Is(choice) => choice.known().copied(),
            Self::Rest { witness } | Self::Same { witness } => *witness,
        }
    }
}

/// `tp` or `main.tp`; within a tactic also one of its parameters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AxisRef {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mesh: Option<Name>,
    pub axis: Name,
}

/// `[dim/axis, …] +sum(axis)`
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Layout {
    pub dims: Vec<DimSplit>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub partial: Vec<Partial>,
}

/// One dim of a layout.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DimSplit {
    pub dim: Name,
    pub split: Split,
}

/// How a dim is split.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// `dim`: not at all.
    Whole,
    /// `dim/tp`, `dim/(cp,tp)`, major to minor.
    Axes(Vec<AxisRef>),
    /// `dim/?`, and with a witness `dim/? := tp`; an empty witness, `()`, is unsplit.
    Open { witness: Option<Vec<AxisRef>> },
    /// `dim/*`: over any axis; only in `forbid`.
    Any,
}

/// `+sum(dp)`: unreduced over these axes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Partial {
    pub reduce: Reduce,
    pub axes: Vec<AxisRef>,
}

/// How partial results are to be combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reduce {
    Sum,
    Max,
    /// Log of the sum of exponentials.
    Lse,
}

impl Reduce {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Sum, Self::Max, Self::Lse];

    /// The spelling in the language.
    pub fn text(self) -> &'static str {
        match self {
            Self::Sum => "sum",
            Self::Max => "max",
            Self::Lse => "lse",
        }
    }
}
