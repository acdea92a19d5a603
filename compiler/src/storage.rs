//! Mixed precision: which tensors of a step are stored in bf16.
//!
//! Enters: graphs in f32, the global one first. Leaves: the same ops over tensors of two types, with
//! casts where an op wants its operand in the other one.
//! Invariants: sources, gradients of parameters and what the optimizer makes of them stay f32, as do
//! statistics of rows (of norms and softmax), losses and the scores of routers; both operands of a
//! product have one type; an op's results have types that follow from the op and its operands alone, so
//! equal ops on all ranks agree. Kernels compute in f32 whatever they load and store, and products sum
//! in f32 (Micikevicius et al. 2018, "Mixed Precision Training", §3.1 and 3.3, with the range of bf16
//! in place of a scaled loss).
//!
//! Parameters are f32 masters. Their copies for products are casts, made where they are first read in
//! a step; a gathered parameter is cast before it is gathered.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{Graph, Op, Role, Tensor, TensorId, TensorType};
use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{OpKind, UnaryFn};

use crate::codegen::bias::bias_add;
use crate::codegen::fuse::Uses;

/// The types of a step's tensors.
#[derive(Clone, Debug)]
pub struct Storage {
    /// Of activations and the operands of products.
    narrow: DType,
    /// Dims along which tokens stand: those of the inputs that no parameter has.
    tokens: BTreeSet<Dim>,
    /// Dims over which routers choose.
    scores: BTreeSet<Dim>,
    /// Of every tensor of the global graph.
    of: Vec<DType>,
}

impl Storage {
    /// The types of a global graph's tensors; `None` where all stay as they are.
    pub fn of(graph: &Graph, narrow: DType) -> Option<Self> {
        if narrow == DType::F32 {
            return None;
        }
        let dims = |is: &dyn Fn(&Role) -> bool| -> BTreeSet<Dim> {
            let tensors = graph.tensors.iter().filter(|tensor| is(&tensor.role));
            tensors
                .flat_map(|tensor| tensor.ty.dims().cloned())
                .collect()
        };
        let of_params = dims(&|role| matches!(role, Role::Param(_)));
        let mut tokens = dims(&|role| *role == Role::Input);
        tokens.retain(|dim| !of_params.contains(dim));
        let mut scores = BTreeSet::new();
        for op in &graph.ops {
            if let OpKind::TopK { dim, choice, .. } = &op.kind {
                scores.extend([dim.clone(), choice.clone()]);
            }
        }
        let mut storage = Self {
            narrow,
            tokens,
            scores,
            of: Vec::new(),
        };
        storage.follow(graph);
        storage.of = storage.assign(graph, |id| graph.ty(id).dtype).types;
        Some(storage)
    }

    /// The type of a tensor of the global graph.
    pub fn dtype(&self, id: TensorId) -> DType {
        self.of[id.index()]
    }

    /// The global graph with these types, for prices: it has no casts.
    #[must_use]
    pub fn typed(&self, graph: &Graph) -> Graph {
        let mut graph = graph.clone();
        for (tensor, dtype) in graph.tensors.iter_mut().zip(&self.of) {
            tensor.ty.dtype = *dtype;
        }
        graph
    }

    /// A local graph with types and casts. `given` says what a source is stored as, `wanted` what the
    /// output of a position is. Tensors keep their ids; casts come after them.
    #[must_use]
    pub fn applied(
        &self,
        local: &Graph,
        given: impl Fn(TensorId) -> DType,
        wanted: impl Fn(usize) -> DType,
    ) -> Graph {
        let mut known = self.clone();
        known.follow(local);
        let Assigned { types, mut needs } = known.assign(local, given);
        let mut graph = Graph {
            ops: Vec::with_capacity(local.ops.len()),
            ..local.clone()
        };
        for (tensor, dtype) in graph.tensors.iter_mut().zip(&types) {
            tensor.ty.dtype = *dtype;
        }
        let mut casts = BTreeMap::new();
        for (op, needs) in local.ops.iter().zip(&mut needs) {
            let inputs = op.inputs.iter().zip(needs);
            let inputs = inputs
                .map(|(input, need)| cast(&mut graph, &mut casts, *input, *need))
                .collect();
            graph.ops.push(Op {
                inputs,
                ..op.clone()
            });
        }
        for position in 0..graph.outputs.len() {
            let output = graph.outputs[position];
            graph.outputs[position] = cast(&mut graph, &mut casts, output, wanted(position));
        }
        for id in local.gradients.keys() {
            let gradient = cast(&mut graph, &mut casts, local.gradients[id], DType::F32);
            graph.gradients.insert(*id, gradient);
        }
        for (id, value) in &local.updates {
            let value = cast(&mut graph, &mut casts, *value, types[id.index()]);
            graph.updates.insert(*id, value);
        }
        graph
    }

    /// Takes note of other names for the dims of tokens and scores.
    fn follow(&mut self, graph: &Graph) {
        for dims in [&mut self.tokens, &mut self.scores] {
            for op in &graph.ops {
                match &op.kind {
                    OpKind::Rename { from, to } if dims.contains(from) => {
                        dims.insert(to.clone());
                    }
                    OpKind::Split { dim, into } if dims.contains(dim) => {
                        dims.extend(into.iter().map(|(dim, _)| dim.clone()));
                    }
                    OpKind::Merge { dims: of, into } if of.iter().any(|dim| dims.contains(dim)) => {
                        dims.insert(into.clone());
                    }
                    _ => {}
                }
            }
        }
    }

    /// Whether a tensor holds features of tokens.
    fn is_activation(&self, ty: &TensorType) -> bool {
        let is_feature = |dim: &Dim| !self.tokens.contains(dim) && !self.scores.contains(dim);
        ty.dtype.is_float()
            && ty.dims().any(|dim| self.tokens.contains(dim))
            && ty.dims().any(is_feature)
    }

    /// Types of all tensors, those of sources given, and what each op wants of its inputs.
    fn assign(&self, graph: &Graph, given: impl Fn(TensorId) -> DType) -> Assigned {
        let (passed_on, uses) = (passed_on(graph), Uses::new(graph));
        let mut types: Vec<DType> = graph.tensor_ids().map(given).collect();
        let mut needs = Vec::with_capacity(graph.ops.len());
        for (op_id, op) in graph.ops() {
            let inputs: Vec<DType> = op.inputs.iter().map(|id| types[id.index()]).collect();
            let mut rule = self.rule(graph, op, &inputs, &passed_on);
            // A bias that the product adds is read in the result's type, as cuBLASLt wants it.
            if rule.results == [self.narrow] && bias_add(graph, &uses, op_id).is_some() {
                rule.inputs = vec![self.narrow; 2];
            }
            for (result, dtype) in op.results.iter().zip(&rule.results) {
                types[result.index()] = *dtype;
            }
            needs.push(rule.inputs);
        }
        Assigned { types, needs }
    }

    /// What an op of inputs of these types wants and gives.
    fn rule(&self, graph: &Graph, op: &Op, inputs: &[DType], passed_on: &[bool]) -> Rule {
        let results: Vec<&TensorType> = op.results.iter().map(|id| graph.ty(*id)).collect();
        let as_declared = || results.iter().map(|ty| ty.dtype).collect::<Vec<_>>();
        let narrow_if = |is_narrow: bool| if is_narrow { self.narrow } else { DType::F32 };
        let is_narrow = |dtype: &DType| *dtype == self.narrow;
        let activation = |idx: usize| results.get(idx).is_some_and(|ty| self.is_activation(ty));
        // Inputs as they are, and one narrow result where it is an activation.
        let any = |result: DType| Rule {
            inputs: inputs.to_vec(),
            results: vec![result],
        };
        match &op.kind {
            OpKind::Contract { .. } => {
                let narrow = inputs.iter().any(is_narrow) || activation(0);
                Rule {
                    inputs: vec![narrow_if(narrow); 2],
                    results: vec![narrow_if(narrow && activation(0))],
                }
            }
            OpKind::Attention(_) => {
                let mut wanted = vec![self.narrow; 3];
                wanted.extend(inputs.iter().skip(3));
                Rule {
                    inputs: wanted,
                    results: vec![self.narrow, DType::F32],
                }
            }
            OpKind::AttentionGrad(_) => {
                let mut wanted = vec![self.narrow; 6];
                wanted[4] = DType::F32;
                Rule {
                    inputs: wanted,
                    results: vec![self.narrow; 3],
                }
            }
            // Of a table of any type, which the kernel widens.
            OpKind::Gather { .. } => any(match activation(0) {
                true => self.narrow,
                false => inputs[0],
            }),
            OpKind::Unary(_)
            | OpKind::Binary(_)
            | OpKind::Expand { .. }
            | OpKind::Softmax { .. }
            | OpKind::SoftmaxGrad { .. }
            | OpKind::Rope { .. }
            | OpKind::CrossEntropyGrad { .. } => {
                let n_dims = results.first().map_or(0, |ty| ty.shape.len());
                let whole = op.inputs.iter().zip(inputs);
                let mut whole = whole.filter(|(id, _)| graph.ty(**id).shape.len() == n_dims);
                let narrow = whole.any(|(_, dtype)| is_narrow(dtype)) && activation(0);
                match results.first().is_some_and(|ty| ty.dtype.is_float()) {
                    true => any(narrow_if(narrow)),
                    false => Rule {
                        inputs: inputs.to_vec(),
                        results: as_declared(),
                    },
                }
            }
            OpKind::RmsNorm { .. }
            | OpKind::RmsNormGrad { .. }
            | OpKind::LayerNorm { .. }
            | OpKind::LayerNormGrad { .. } => {
                let mut types = vec![DType::F32; results.len()];
                types[0] = narrow_if(activation(0));
                Rule {
                    inputs: inputs.to_vec(),
                    results: types,
                }
            }
            OpKind::Transpose { .. }
            | OpKind::Rename { .. }
            | OpKind::Split { .. }
            | OpKind::Merge { .. }
            | OpKind::Slice { .. }
            | OpKind::Concat { .. }
            | OpKind::AllGather { .. }
            | OpKind::AllToAll { .. }
            | OpKind::CollectivePermute { .. }
            | OpKind::Broadcast { .. } => {
                let is_float = inputs.iter().all(|dtype| dtype.is_float());
                let narrow = inputs.iter().any(is_narrow)
                    || op.results.iter().any(|id| passed_on[id.index()]);
                let dtype = if is_float {
                    narrow_if(narrow)
                } else {
                    inputs[0]
                };
                Rule {
                    inputs: vec![dtype; inputs.len()],
                    results: vec![dtype],
                }
            }
            OpKind::AllReduce { kind, .. } | OpKind::ReduceScatter { kind, .. } => {
                let dtype = match kind {
                    ReduceKind::Sum | ReduceKind::Max => inputs[0],
                    ReduceKind::Lse => DType::F32,
                };
                Rule {
                    inputs: vec![dtype],
                    results: vec![dtype],
                }
            }
            OpKind::TopK { .. } => Rule {
                inputs: inputs.to_vec(),
                results: vec![inputs[0], DType::I32],
            },
            OpKind::TopKGrad { .. } | OpKind::MoeDispatch(_) | OpKind::MoeCombine(_) => {
                any(inputs[0])
            }
            // In f32, as declared: sums over tokens, statistics, what is added up to parameters.
            OpKind::ScatterAdd { .. }
            | OpKind::Reduce { .. }
            | OpKind::Pick { .. }
            | OpKind::MoeSlots { .. }
            | OpKind::MoeGateGrad(_)
            | OpKind::MoeCounts(_)
            | OpKind::MoePlaces(_)
            | OpKind::Adamw { .. }
            | OpKind::Sgd { .. } => Rule {
                inputs: inputs.to_vec(),
                results: as_declared(),
            },
            // Of inference on hosts alone.
            OpKind::MoeMove(_) => Rule {
                inputs: op.inputs.iter().map(|id| graph.ty(*id).dtype).collect(),
                results: as_declared(),
            },
        }
    }
}

/// The graph as a plan prices it: with the types of [`Storage::typed`], where they are others.
pub fn stored(graph: &Graph, narrow: Option<DType>) -> Cow<'_, Graph> {
    match narrow.and_then(|narrow| Storage::of(graph, narrow)) {
        Some(storage) => Cow::Owned(storage.typed(graph)),
        None => Cow::Borrowed(graph),
    }
}

/// The types of all tensors, and what each op wants of its inputs.
struct Assigned {
    types: Vec<DType>,
    needs: Vec<Vec<DType>>,
}

struct Rule {
    inputs: Vec<DType>,
    results: Vec<DType>,
}

/// Whether all that becomes of each tensor, moved or not, are operands of products and rows of tables.
fn passed_on(graph: &Graph) -> Vec<bool> {
    let consumers = graph.consumers();
    let mut passed_on = vec![false; graph.tensors.len()];
    let mut kept = vec![false; graph.tensors.len()];
    let after = graph.outputs.iter().chain(graph.gradients.values());
    for id in after.chain(graph.updates.values()) {
        kept[id.index()] = true;
    }
    for op in graph.ops.iter().rev() {
        for result in &op.results {
            let readers = &consumers[result.index()];
            let is_operand = |reader: &Op| match &reader.kind {
                OpKind::Contract { .. } | OpKind::Attention(_) | OpKind::Gather { .. } => true,
                OpKind::Transpose { .. }
                | OpKind::Rename { .. }
                | OpKind::Split { .. }
                | OpKind::Merge { .. }
                | OpKind::Slice { .. }
                | OpKind::Concat { .. }
                | OpKind::AllGather { .. }
                | OpKind::AllToAll { .. }
                | OpKind::CollectivePermute { .. }
                | OpKind::Broadcast { .. } => {
                    let mut results = reader.results.iter();
                    results.all(|id| passed_on[id.index()])
                }
                _ => false,
            };
            passed_on[result.index()] = graph.ty(*result).dtype.is_float()
                && !kept[result.index()]
                && !readers.is_empty()
                && readers.iter().all(|reader| is_operand(graph.op(*reader)));
        }
    }
    passed_on
}

/// The tensor as this type: itself, or a cast, which is made once.
fn cast(
    graph: &mut Graph,
    casts: &mut BTreeMap<(TensorId, DType), TensorId>,
    id: TensorId,
    dtype: DType,
) -> TensorId {
    let tensor = graph.tensor(id);
    if tensor.ty.dtype == dtype {
        return id;
    }
    if let Some(cast) = casts.get(&(id, dtype)) {
        return *cast;
    }
    let own = Tensor {
        name: format!("{}.{dtype}", tensor.name),
        ty: TensorType {
            dtype,
            shape: tensor.ty.shape.clone(),
        },
        role: Role::Temp,
    };
    let kind = OpKind::Unary(UnaryFn::Cast(dtype));
    let result = graph.add_typed_op(&own.name, kind, &[id], own.ty);
    casts.insert((id, dtype), result);
    result
}
