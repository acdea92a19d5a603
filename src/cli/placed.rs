//! `meshweave run --placement`: experts on the devices that a placement gives them.
//!
//! Enters: a placement, the plan of a graph, and the execution of its program. Leaves: the execution
//! with its experts relabeled, and back.
//! Invariant: a relabeling permutes the `expert` dim of everything a layer keeps, router and experts
//! alike, so what the model computes stays the same; files hold experts by the model's own numbers.

use std::path::Path;

use meshweave_dsl::diagnostics::Class;
use meshweave_dsl::graph::{Graph, Role, TensorId};
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::OpKind;
use meshweave_dsl::placement::Placement;
use meshweave_dsl::plan::Plan;
use meshweave_runtime::executor::Session as Execution;
use meshweave_runtime::tensor::{Elements, HostTensor};

use super::place::read_placement;
use super::runtime_error;
use crate::error::{Error, Result};

/// Which expert stands at which position of the `expert` dim, layer by layer.
#[derive(Clone)]
pub(super) struct Relabeling {
    layers: Vec<Layer>,
}

#[derive(Clone)]
struct Layer {
    /// What is permuted: name, and the dim.
    tensors: Vec<(String, Dim)>,
    /// The expert at every position.
    order: Vec<usize>,
}

impl Relabeling {
    /// Reads a placement for a plan of `graph`.
    ///
    /// # Errors
    /// The placement cannot be read, is of another model, has replicas, or is for other devices than
    /// the plan divides the experts over.
    pub fn read(path: &Path, graph: &Graph, plan: &Plan) -> Result<Self> {
        Self::of(&read_placement(path)?, path, graph, plan)
    }

    /// The relabeling of a placement that was read or made from a file.
    ///
    /// # Errors
    /// As for [`Relabeling::read`].
    pub fn of(placement: &Placement, path: &Path, graph: &Graph, plan: &Plan) -> Result<Self> {
        let layers = movable_layers(graph)?;
        let invalid = |what: String| {
            Err(Error::plain(
                Class::Invalid,
                format!("{}: {what}", path.display()),
            ))
        };
        if layers.len() != placement.n_layers() {
            return invalid(format!(
                "it places {} layers, the model has {} with experts; place a trace of this model",
                placement.n_layers(),
                layers.len()
            ));
        }
        let mut found = Vec::new();
        for (layer_idx, (prefix, expert)) in layers.into_iter().enumerate() {
            let kept: Vec<TensorId> = graph
                .tensor_ids()
                .filter(|id| is_kept(graph, *id, &prefix, &expert))
                .collect();
            for id in &kept {
                let tensor = graph.tensor(*id);
                let n_experts = tensor.ty.size_of(&expert).unwrap_or(0);
                if n_experts != placement.n_experts() {
                    return invalid(format!(
                        "it places {} experts a layer, `{}` has {n_experts}; place a trace of this model",
                        placement.n_experts(),
                        tensor.name
                    ));
                }
                let layout = plan.source_layout(*id);
                let axes = layout.axes_of(&expert);
                let degree: usize = axes.iter().map(|axis| plan.mesh.degree(axis)).product();
                // Routers are commonly on every device.
                if degree != placement.n_devices() && tensor.name.contains(".experts.") {
                    return invalid(format!(
                        "it is for {} devices, the plan divides the experts of `{}` over {degree}; place with `--devices {degree}`, or change the degree of `ep`",
                        placement.n_devices(),
                        tensor.name
                    ));
                }
            }
            found.push(Layer {
                tensors: kept
                    .into_iter()
                    .map(|id| (graph.tensor(id).name.clone(), expert.clone()))
                    .collect(),
                order: order(placement, layer_idx, path)?,
            });
        }
        Ok(Self { layers: found })
    }

    /// Every expert at its own position, and the number of devices that the plan divides experts over.
    ///
    /// # Errors
    /// The model has no experts, or such as cannot be moved apart; layers divided differently.
    pub fn in_order(graph: &Graph, plan: &Plan) -> Result<(Self, usize)> {
        let mut degrees: Vec<usize> = Vec::new();
        let mut found = Vec::new();
        for (prefix, expert) in movable_layers(graph)? {
            let kept = graph
                .tensor_ids()
                .filter(|id| is_kept(graph, *id, &prefix, &expert));
            let mut n_experts = 0;
            let mut tensors = Vec::new();
            for id in kept {
                let tensor = graph.tensor(id);
                n_experts = tensor.ty.size_of(&expert).unwrap_or(0);
                if tensor.name.contains(".experts.") {
                    let layout = plan.source_layout(id);
                    let axes = layout.axes_of(&expert).iter();
                    degrees.push(axes.map(|axis| plan.mesh.degree(axis)).product());
                }
                tensors.push((tensor.name.clone(), expert.clone()));
            }
            found.push(Layer {
                tensors,
                order: (0..n_experts).collect(),
            });
        }
        degrees.sort_unstable();
        degrees.dedup();
        let n_experts = found.first().map_or(0, |layer| layer.order.len());
        match degrees.as_slice() {
            [degree] if n_experts.is_multiple_of(*degree) => Ok((Self { layers: found }, *degree)),
            [degree] => Err(Error::plain(
                Class::Invalid,
                format!(
                    "{n_experts} experts do not divide over {degree} devices: choose a degree of `ep` that divides them"
                ),
            )),
            [] => Err(
                Error::plain(Class::Invalid, "the model has no experts to move")
                    .help("remove --rebalance, or give the model `experts 8`"),
            ),
            several => Err(Error::plain(
                Class::Unsupported,
                format!(
                    "layers divide their experts over {several:?} devices: pin one degree to move experts while the model runs"
                ),
            )),
        }
    }

    /// Experts of a layer.
    pub fn n_experts(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.order.len())
    }

    /// Exchanges pairs of positions of a layer, one pair after the other.
    ///
    /// # Errors
    /// A tensor cannot be read or written.
    pub fn exchange(
        &mut self,
        execution: &mut Execution,
        layer: usize,
        pairs: &[(usize, usize)],
    ) -> Result<()> {
        let Some(layer) = self.layers.get_mut(layer).filter(|_| !pairs.is_empty()) else {
            return Ok(());
        };
        let mut from: Vec<usize> = (0..layer.order.len()).collect();
        for (a, b) in pairs {
            from.swap(*a, *b);
            layer.order.swap(*a, *b);
        }
        for (name, dim) in &layer.tensors {
            let value = execution.get(name).map_err(runtime_error)?;
            let moved = take(&value, dim, &from)?;
            execution.set(name, &moved).map_err(runtime_error)?;
        }
        Ok(())
    }

    /// Brings an execution's experts to the placement's positions.
    ///
    /// # Errors
    /// A tensor cannot be read or written.
    pub fn apply(&self, execution: &mut Execution) -> Result<()> {
        self.permute(execution, |order| order.to_vec())
    }

    /// Brings them back to the model's own numbers.
    ///
    /// # Errors
    /// As for [`Relabeling::apply`].
    pub fn undo(&self, execution: &mut Execution) -> Result<()> {
        self.permute(execution, |order| {
            let mut inverse = vec![0; order.len()];
            for (position, expert) in order.iter().enumerate() {
                if let Some(place) = inverse.get_mut(*expert) {
                    *place = position;
                }
            }
            inverse
        })
    }

    /// The expert of the model that stands at a position of a layer.
    pub fn expert(&self, layer: usize, position: usize) -> Option<usize> {
        self.layers.get(layer)?.order.get(position).copied()
    }

    fn permute(
        &self,
        execution: &mut Execution,
        from: impl Fn(&[usize]) -> Vec<usize>,
    ) -> Result<()> {
        for layer in &self.layers {
            let from = from(&layer.order);
            for (name, dim) in &layer.tensors {
                let value = execution.get(name).map_err(runtime_error)?;
                let permuted = take(&value, dim, &from)?;
                execution.set(name, &permuted).map_err(runtime_error)?;
            }
        }
        Ok(())
    }
}

/// [`layers_of`] a graph whose experts may be anywhere.
///
/// # Errors
/// A router that chooses among groups of experts.
fn movable_layers(graph: &Graph) -> Result<Vec<(String, Dim)>> {
    let layers = layers_of(graph);
    let limited = graph.ops.iter().find(|op| {
        let dims = layers.iter().map(|(_, expert)| expert);
        // Where tokens stand by their experts, those they choose from are called targets.
        let is_chosen = |dim: &Dim| dim.as_str() == "target" || dims.clone().any(|one| one == dim);
        matches!(&op.kind, OpKind::Split { dim, .. } if is_chosen(dim))
    });
    match limited {
        None => Ok(layers),
        Some(op) => Err(Error::plain(
            Class::Unsupported,
            format!(
                "`{}` chooses among groups of experts that lie together, which a placement takes apart: placements of group-limited routers are not executed yet",
                graph.op_name(op)
            ),
        )),
    }
}

/// The layers with experts: the scope of their names, and the dim of their experts.
fn layers_of(graph: &Graph) -> Vec<(String, Dim)> {
    let mut layers: Vec<(String, Dim)> = Vec::new();
    for op in &graph.ops {
        let dims = match &op.kind {
            OpKind::MoeDispatch(dims) => dims,
            OpKind::MoeMove(moved) => &moved.dims,
            _ => continue,
        };
        let name = graph.op_name(op);
        // Gradients dispatch, too.
        let prefix = name.strip_suffix("dispatched");
        if let Some(prefix) = prefix.or_else(|| name.strip_suffix("moved"))
            && !layers.iter().any(|(known, _)| known == prefix)
        {
            layers.push((prefix.to_owned(), dims.expert.clone()));
        }
    }
    layers
}

/// Whether a tensor is a parameter or moment of the layer with an `expert` dim.
fn is_kept(graph: &Graph, id: TensorId, prefix: &str, expert: &Dim) -> bool {
    let tensor = graph.tensor(id);
    let of = match &tensor.role {
        Role::Param(_) => id,
        Role::State { of } => *of,
        _ => return false,
    };
    tensor.ty.has(expert) && graph.tensor(of).name.starts_with(prefix)
}

fn order(placement: &Placement, layer: usize, path: &Path) -> Result<Vec<usize>> {
    let order: Vec<usize> = placement
        .layer(layer)
        .iter()
        .flatten()
        .map(|expert| usize::from(*expert))
        .collect();
    if order.len() != placement.n_experts() {
        return Err(Error::plain(
            Class::Unsupported,
            format!(
                "{}: {} slots for {} experts: replicas are not executed yet",
                path.display(),
                order.len(),
                placement.n_experts()
            ),
        )
        .help("place with as many slots as experts"));
    }
    Ok(order)
}

/// `value` with position p of `dim` taken from position `from[p]`.
fn take(value: &HostTensor, dim: &Dim, from: &[usize]) -> Result<HostTensor> {
    let ty = value.ty();
    let at = ty.position(dim).unwrap_or(0);
    let inner: usize = ty.shape.iter().skip(at + 1).map(|(_, size)| size).product();
    let block = from.len() * inner;
    fn moved<T: Copy>(data: &[T], block: usize, inner: usize, from: &[usize]) -> Vec<T> {
        let mut out = Vec::with_capacity(data.len());
        for part in data.chunks(block) {
            for position in from {
                let start = position * inner;
                out.extend(part.get(start..start + inner).into_iter().flatten());
            }
        }
        out
    }
    let elements = match value.elements() {
        Elements::F32(data) => Elements::F32(moved(data, block, inner, from)),
        Elements::I32(data) => Elements::I32(moved(data, block, inner, from)),
    };
    HostTensor::new(ty.clone(), elements).map_err(runtime_error)
}
