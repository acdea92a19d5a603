//! Replicas of experts: a forward graph in which experts stand in more slots than one.
//!
//! Enters: a forward graph, and where the replicas of every layer are. Leaves: an equal graph whose
//! experts' rows are `[place, …]`, a place being a slot of a device.
//! Invariant: parameters are those of the graph before, one of each expert, so that moments, updates and
//! checkpoints are; what the graph computes is the same but for the order of sums.
//!
//! Before a layer's experts work, their weights go from home to every slot that holds them: a `moe_move`
//! whose tokens are experts. `moe_places` sends each assignment to one of its expert's slots. The
//! gradient of the move brings the copies' gradients home and adds them up there.
//!
//! ```text
//! w[expert]  ── split ─► [device, home] ── moe_move ─► [device, slot] ── merge ─► [place]
//! expert, slot ── moe_places ─► place ── moe_slots ─► slot among the place's
//! ```

use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{ConstInit, Graph, Op, Role, TensorId, TensorType};
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{MoeDims, MoeMove, MoePlaces, OpError, OpKind};

use crate::placement::replicas::{Layer, N_TURNS, Replicas};

/// Why experts of a graph cannot have replicas.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplicateError {
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Unsupported(String),
    #[error("internal error while experts were replicated: {0}")]
    Internal(String),
}

impl From<OpError> for ReplicateError {
    fn from(error: OpError) -> Self {
        Self::Internal(error.to_string())
    }
}

/// `forward` with the replicas of its experts, which are numbered by their homes. Linear in the ops.
///
/// # Errors
/// `Invalid` when the placement is of other layers or experts; `Unsupported` where tokens do not come
/// home from their experts, and for what experts compute with tensors that are no weights of theirs.
pub fn replicate(forward: &Graph, replicas: &Replicas) -> Result<Graph, ReplicateError> {
    let mut layers: Vec<(TensorId, TensorId)> = Vec::new();
    for op in &forward.ops {
        match (&op.kind, op.inputs.as_slice()) {
            (OpKind::MoeDispatch(dims), &[_, expert, slot, ..]) => {
                if dims.n_experts != replicas.experts {
                    return Err(ReplicateError::Invalid(format!(
                        "the placement has {} experts a layer, `{}` sends tokens to {}: place a trace of this model",
                        replicas.experts,
                        forward.op_name(op),
                        dims.n_experts
                    )));
                }
                if !layers.contains(&(expert, slot)) {
                    layers.push((expert, slot));
                }
            }
            (OpKind::MoeMove(_), _) => {
                return Err(ReplicateError::Unsupported(format!(
                    "`{}` takes tokens from expert to expert, which replicas do not go with yet: write `exchanges two`",
                    forward.op_name(op)
                )));
            }
            _ => {}
        }
    }
    if layers.len() != replicas.layers.len() {
        return Err(ReplicateError::Invalid(format!(
            "the placement has {} layers, the model has {} with experts: place a trace of this model",
            replicas.layers.len(),
            layers.len()
        )));
    }
    let most = replicas
        .layers
        .iter()
        .flat_map(|layer| copies(layer, replicas.slots));
    let n_copies = most.map(|of_expert| of_expert.len()).max().unwrap_or(1);
    let mut replicator = Replicator {
        forward,
        replicas,
        n_copies,
        graph: Graph::new(forward.name.clone()),
        now: vec![None; forward.tensors.len()],
        rows: BTreeMap::new(),
        places: vec![None; layers.len()],
        placed: BTreeMap::new(),
        routes: vec![None; layers.len()],
        layers,
    };
    for (id, tensor) in forward.tensor_ids().zip(&forward.tensors) {
        if tensor.role != Role::Temp {
            let role = match &tensor.role {
                Role::State { of } => Role::State {
                    of: replicator.now(*of)?,
                },
                other => other.clone(),
            };
            let own = replicator
                .graph
                .add_source(tensor.name.clone(), tensor.ty.clone(), role);
            replicator.now[id.index()] = Some(own);
        }
    }
    for op in &forward.ops {
        replicator.visit(op)?;
    }
    replicator.finish()
}

/// The slots of every position's expert, counted over all devices.
fn copies(layer: &Layer, slots: usize) -> Vec<Vec<usize>> {
    let mut copies = vec![Vec::new(); layer.order.len()];
    for (device, held) in layer.held.iter().enumerate() {
        for (slot, position) in held.iter().enumerate() {
            copies[*position].push(device * slots + slot);
        }
    }
    copies
}

struct Replicator<'a> {
    forward: &'a Graph,
    replicas: &'a Replicas,
    /// The most replicas of an expert.
    n_copies: usize,
    graph: Graph,
    /// What became of each tensor.
    now: Vec<Option<TensorId>>,
    /// The layer of every tensor of experts' rows.
    rows: BTreeMap<TensorId, usize>,
    /// Expert and slot of the routes of every layer.
    layers: Vec<(TensorId, TensorId)>,
    /// The same by places, once they are made.
    places: Vec<Option<[TensorId; 2]>>,
    /// The weights of a layer in all places.
    placed: BTreeMap<(usize, TensorId), TensorId>,
    /// Where weights come from and go to, once they are made: device and slot of both.
    routes: Vec<Option<[TensorId; 4]>>,
}

impl Replicator<'_> {
    fn now(&self, id: TensorId) -> Result<TensorId, ReplicateError> {
        self.now[id.index()].ok_or_else(|| {
            ReplicateError::Internal(format!(
                "`{}` is read before it is made",
                self.forward.tensor(id).name
            ))
        })
    }

    fn visit(&mut self, op: &Op) -> Result<(), ReplicateError> {
        let mut kind = op.kind.clone();
        let mut inputs: Vec<TensorId> = op
            .inputs
            .iter()
            .map(|id| self.now(*id))
            .collect::<Result<_, _>>()?;
        let mut layer = op.inputs.iter().find_map(|id| self.rows.get(id).copied());
        if let OpKind::MoeDispatch(dims) | OpKind::MoeCombine(dims) = &mut kind
            && let &[_, expert, slot, ..] = op.inputs.as_slice()
        {
            let found = self.layers.iter().position(|one| *one == (expert, slot));
            let Some(found) = found else {
                return Err(self.unsupported(op, expert));
            };
            let scope = self.forward.op_name(op);
            let [place, seat] = self.places(found, dims, scope)?;
            (inputs[1], inputs[2]) = (place, seat);
            dims.n_experts = self.n_places();
            layer = matches!(op.kind, OpKind::MoeDispatch(_)).then_some(found);
        } else if let Some(layer) = layer {
            for (input, id) in inputs.iter_mut().zip(&op.inputs) {
                let has_experts = self.forward.ty(*id).has(&"expert".into());
                if has_experts && !self.rows.contains_key(id) {
                    *input = self.placed(layer, *id, op)?;
                }
            }
        }
        let name = self.forward.op_name(op).to_owned();
        let results = self.graph.add_op(name, kind, &inputs)?;
        for (id, own) in op.results.iter().zip(results) {
            let name = self.forward.tensor(*id).name.clone();
            self.graph.tensors[own.index()].name = name;
            self.now[id.index()] = Some(own);
            if let Some(layer) = layer {
                self.rows.insert(*id, layer);
            }
        }
        Ok(())
    }

    fn unsupported(&self, op: &Op, id: TensorId) -> ReplicateError {
        ReplicateError::Unsupported(format!(
            "`{}` reads `{}` of type {}, which replicas of experts cannot have copies of yet: place without replicas",
            self.forward.op_name(op),
            self.forward.tensor(id).name,
            self.forward.ty(id)
        ))
    }

    fn n_places(&self) -> usize {
        self.replicas.devices * self.replicas.slots
    }

    /// A table of whole numbers.
    fn table<const N: usize>(
        &mut self,
        name: String,
        shape: [(&str, usize); N],
        numbers: Vec<i32>,
    ) -> TensorId {
        let ty = TensorType::new(DType::I32, shape);
        let init = ConstInit::Numbers(numbers);
        self.graph.add_source(name, ty, Role::Const(init))
    }

    /// The place and the slot there of every assignment of a layer.
    fn places(
        &mut self,
        layer: usize,
        dims: &MoeDims,
        name: &str,
    ) -> Result<[TensorId; 2], ReplicateError> {
        if let Some(places) = self.places[layer] {
            return Ok(places);
        }
        let scope = scope(name);
        let (expert, slot) = self.layers[layer];
        let (expert, slot) = (self.now(expert)?, self.now(slot)?);
        let turns = self.replicas.layers[layer].turns.iter().flatten();
        let turns: Vec<i32> = turns.map(|place| *place as i32).collect();
        let shape = [("expert", self.replicas.experts), ("turn", N_TURNS)];
        let turns = self.table(format!("{scope}turns"), shape, turns);
        let kind = OpKind::MoePlaces(MoePlaces {
            seq: dims.seq.clone(),
            choice: dims.choice.clone(),
            expert: "expert".into(),
            turn: "turn".into(),
        });
        let place = self.add(format!("{scope}places"), kind, &[expert, slot, turns])?;
        let kind = OpKind::MoeSlots {
            seq: dims.seq.clone(),
            choice: dims.choice.clone(),
            n_experts: self.n_places(),
            capacity: dims.capacity,
        };
        let seat = self.add(format!("{scope}places.numbered"), kind, &[place])?;
        self.places[layer] = Some([place, seat]);
        Ok([place, seat])
    }

    /// A weight of a layer's experts in all places.
    fn placed(
        &mut self,
        layer: usize,
        id: TensorId,
        reader: &Op,
    ) -> Result<TensorId, ReplicateError> {
        if let Some(placed) = self.placed.get(&(layer, id)) {
            return Ok(*placed);
        }
        let (expert, home): (Dim, Dim) = ("expert".into(), "home".into());
        if self.forward.ty(id).position(&expert) != Some(0) {
            return Err(self.unsupported(reader, id));
        }
        let Replicas {
            devices, experts, ..
        } = *self.replicas;
        let name = &self.forward.tensor(id).name;
        let (scope, last) = name.rsplit_once('.').unwrap_or(("", name));
        let named = |what: &str| format!("{scope}.{what}.{last}");
        let (homes, filled, all) = (named("homes"), named("copied"), named("placed"));
        let [at, seat, to, to_seat] = self.routes(layer, format!("{scope}.copies"));
        let split = OpKind::Split {
            dim: expert.clone(),
            into: vec![(expert.clone(), devices), (home.clone(), experts / devices)],
        };
        let weight = self.now(id)?;
        let homes = self.add(homes, split, &[weight])?;
        let moved = OpKind::MoeMove(MoeMove {
            dims: MoeDims {
                seq: "copied".into(),
                choice: "copy".into(),
                expert: expert.clone(),
                slot: home.clone(),
                n_experts: devices,
                capacity: self.replicas.slots,
                offset: 0,
            },
            from: "at".into(),
            stays: false,
            weights: true,
            over: None,
        });
        let filled = self.add(filled, moved, &[homes, at, seat, to, to_seat])?;
        let merge = OpKind::Merge {
            dims: vec![expert.clone(), home],
            into: expert,
        };
        let all = self.add(all, merge, &[filled])?;
        self.placed.insert((layer, id), all);
        Ok(all)
    }

    /// Device and slot of every expert's home, and of its replicas.
    fn routes(&mut self, layer: usize, scope: String) -> [TensorId; 4] {
        if let Some(routes) = self.routes[layer] {
            return routes;
        }
        let Replicas {
            devices,
            slots,
            experts,
            ..
        } = *self.replicas;
        let n_homes = experts / devices;
        let homes = 0..experts;
        let device = homes.clone().map(|home| (home / n_homes) as i32).collect();
        let seat = homes.map(|home| (home % n_homes) as i32).collect();
        let copies = copies(&self.replicas.layers[layer], slots);
        // An expert with fewer replicas than another goes nowhere else.
        let all = copies.iter().flat_map(|copies| {
            let places = copies.iter().map(|place| Some(*place));
            places
                .chain(std::iter::repeat(None))
                .take(self.n_copies)
                .collect::<Vec<_>>()
        });
        let all: Vec<Option<usize>> = all.collect();
        let part = |part: &dyn Fn(usize) -> usize| -> Vec<i32> {
            let numbers = all
                .iter()
                .map(|place| place.map_or(-1, |place| part(place) as i32));
            numbers.collect()
        };
        let (to, to_seat) = (part(&|place| place / slots), part(&|place| place % slots));
        let from = [("copied", experts), ("at", 1)];
        let into = [("copied", experts), ("copy", self.n_copies)];
        let routes = [
            self.table(format!("{scope}.from"), from, device),
            self.table(format!("{scope}.from_slot"), from, seat),
            self.table(format!("{scope}.to"), into, to),
            self.table(format!("{scope}.to_slot"), into, to_seat),
        ];
        self.routes[layer] = Some(routes);
        routes
    }

    fn add(
        &mut self,
        name: String,
        kind: OpKind,
        inputs: &[TensorId],
    ) -> Result<TensorId, ReplicateError> {
        let results = self.graph.add_op(name, kind, inputs)?;
        match results[..] {
            [result] => Ok(result),
            _ => Err(ReplicateError::Internal(format!(
                "an op has {} results instead of 1",
                results.len()
            ))),
        }
    }

    fn finish(mut self) -> Result<Graph, ReplicateError> {
        let outputs = self.forward.outputs.iter().map(|id| self.now(*id));
        let outputs = outputs.collect::<Result<_, _>>()?;
        let pairs = |of: &BTreeMap<TensorId, TensorId>| {
            of.iter()
                .map(|(key, value)| Ok((self.now(*key)?, self.now(*value)?)))
                .collect::<Result<BTreeMap<_, _>, ReplicateError>>()
        };
        let updates = pairs(&self.forward.updates)?;
        let gradients = pairs(&self.forward.gradients)?;
        self.graph.outputs = outputs;
        self.graph.updates = updates;
        self.graph.gradients = gradients;
        let mut names = BTreeSet::new();
        let twice = self
            .graph
            .tensors
            .iter()
            .find(|one| !names.insert(&one.name));
        if let Some(twice) = twice {
            return Err(ReplicateError::Internal(format!(
                "`{}` is there twice",
                twice.name
            )));
        }
        Ok(self.graph)
    }
}

/// The scope of a layer's dispatch or combination, with a dot behind it.
fn scope(name: &str) -> &str {
    name.rfind('.').map_or("", |dot| &name[..=dot])
}
