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
use serde::{Deserialize, Serialize};

use super::runtime_error;
use crate::error::{Error, Result};

/// Which expert stands at which position of the `expert` dim, layer by layer.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Relabeling {
    /// Devices that divide the positions among them.
    n_devices: usize,
    layers: Vec<Layer>,
}

/// What went from device to device when experts changed places.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Moved {
    pub experts: usize,
    /// Of their weights and moments.
    pub bytes: u64,
}

impl std::ops::AddAssign for Moved {
    fn add_assign(&mut self, other: Self) {
        self.experts += other.experts;
        self.bytes += other.bytes;
    }
}

#[derive(Clone, Serialize, Deserialize)]
struct Layer {
    /// What is permuted: name, and the dim.
    tensors: Vec<(String, Dim)>,
    /// The expert at every position.
    order: Vec<usize>,
}

impl Relabeling {
    /// The relabeling of a placement that was read or made from a file, for a plan of `graph`; `orders`
    /// are the experts at every layer's positions.
    ///
    /// # Errors
    /// The placement is of another model, or for other devices than the plan divides the experts over.
    pub fn of(
        placement: &Placement,
        orders: &[Vec<usize>],
        path: &Path,
        graph: &Graph,
        plan: &Plan,
    ) -> Result<Self> {
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
                    let of = format!("`{}`", tensor.name);
                    return Err(other_devices(path, placement, &of, degree));
                }
            }
            found.push(Layer {
                tensors: kept
                    .into_iter()
                    .map(|id| (graph.tensor(id).name.clone(), expert.clone()))
                    .collect(),
                order: orders.get(layer_idx).cloned().unwrap_or_default(),
            });
        }
        Ok(Self {
            n_devices: placement.n_devices(),
            layers: found,
        })
    }

    /// Every expert at its own position, on the devices that the plan divides experts over.
    ///
    /// # Errors
    /// The model has no experts, or such as cannot be moved apart; layers divided differently.
    pub fn in_order(graph: &Graph, plan: &Plan) -> Result<Self> {
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
            [degree] if n_experts.is_multiple_of(*degree) => Ok(Self {
                n_devices: *degree,
                layers: found,
            }),
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

    /// Devices that divide the experts among them.
    pub fn n_devices(&self) -> usize {
        self.n_devices
    }

    /// The device of a position, which of an expert's own number is where it began.
    pub fn device(&self, position: usize) -> usize {
        position * self.n_devices / self.n_experts().max(1)
    }

    /// Layers with experts.
    pub fn n_layers(&self) -> usize {
        self.layers.len()
    }

    /// Experts of a layer.
    pub fn n_experts(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.order.len())
    }

    /// Exchanges pairs of positions of a layer, one pair after the other; what went to other devices.
    ///
    /// # Errors
    /// A tensor cannot be read or written.
    pub fn exchange(
        &mut self,
        execution: &mut Execution,
        layer: usize,
        pairs: &[(usize, usize)],
    ) -> Result<Moved> {
        let n_devices = self.n_devices;
        let Some(layer) = self.layers.get_mut(layer).filter(|_| !pairs.is_empty()) else {
            return Ok(Moved::default());
        };
        let mut from: Vec<usize> = (0..layer.order.len()).collect();
        for (a, b) in pairs {
            from.swap(*a, *b);
            layer.order.swap(*a, *b);
        }
        layer.rearrange(execution, &from, n_devices)
    }

    /// Brings an execution's experts to the placement's positions; what went to other devices.
    ///
    /// # Errors
    /// A tensor cannot be read or written.
    pub fn apply(&self, execution: &mut Execution) -> Result<Moved> {
        self.permute(execution, |order| order.to_vec())
    }

    /// Brings them back to the model's own numbers.
    ///
    /// # Errors
    /// As for [`Relabeling::apply`].
    pub fn undo(&self, execution: &mut Execution) -> Result<Moved> {
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
    ) -> Result<Moved> {
        let mut moved = Moved::default();
        for layer in &self.layers {
            moved += layer.rearrange(execution, &from(&layer.order), self.n_devices)?;
        }
        Ok(moved)
    }
}

impl Layer {
    /// Gives position p what stood at `from[p]`.
    fn rearrange(
        &self,
        execution: &mut Execution,
        from: &[usize],
        n_devices: usize,
    ) -> Result<Moved> {
        let device = |position: usize| position * n_devices / from.len().max(1);
        let left = |(to, from): &(usize, &usize)| device(*to) != device(**from);
        let mut moved = Moved {
            experts: from.iter().enumerate().filter(left).count(),
            bytes: 0,
        };
        for (name, dim) in &self.tensors {
            let value = execution.get(name).map_err(runtime_error)?;
            let taken = take(&value, dim, from)?;
            execution.set(name, &taken).map_err(runtime_error)?;
            // Routers are commonly on every device.
            if name.contains(".experts.") {
                moved.bytes += (value.ty().n_bytes() / from.len().max(1) * moved.experts) as u64;
            }
        }
        Ok(moved)
    }
}

/// A placement on other devices than a plan divides the experts of something over.
pub(super) fn other_devices(path: &Path, placement: &Placement, of: &str, degree: usize) -> Error {
    Error::plain(
        Class::Invalid,
        format!(
            "{}: it is for {} devices, the plan divides the experts of {of} over {degree}; place with `--devices {degree}`, or change the degree of `ep`",
            path.display(),
            placement.n_devices()
        ),
    )
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
        // What replicas need is divided into devices' parts, which are no groups of a router.
        matches!(&op.kind, OpKind::Split { dim, into }
            if is_chosen(dim) && !into.iter().any(|(part, _)| part == dim))
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
            OpKind::MoeMove(moved) if !moved.weights => &moved.dims,
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
