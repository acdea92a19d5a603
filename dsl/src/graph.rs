//! The one graph type: global (the model, differentiated and with its optimizer) and local (one rank's part).
//!
//! Enters: tensors and ops in any legal order. Leaves: an SSA list of ops in execution order.
//! Invariant: every op's inputs stand before it, every tensor has one producer (or is a source),
//! names are unique, and the stored result types are those of the op's shape rule.
//!
//! Tensors and ops are named by paths such as `layers[3].attn.wq`; an op bears the name of its first result.

pub mod text;
pub mod verify;
pub mod analysis;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::dtype::{DType, Scalar};
use crate::name::Dim;
use crate::op::{OpError, OpKind};

/// Index of a tensor in its graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TensorId(pub u32);

/// Index of an op in its graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OpId(pub u32);

impl TensorId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl OpId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Element type and named dims; the order of the dims is the row-major memory order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TensorType {
    pub dtype: DType,
    pub shape: Vec<(Dim, usize)>,
}

impl TensorType {
    /// A type from dims and sizes, outermost first.
    pub fn new(dtype: DType, shape: impl IntoIterator<Item = (impl Into<Dim>, usize)>) -> Self {
        Self {
            dtype,
            shape: shape
                .into_iter()
                .map(|(dim, size)| (dim.into(), size))
                .collect(),
        }
    }

    /// The dims, outermost first.
    pub fn dims(&self) -> impl DoubleEndedIterator<Item = &Dim> + Clone {
        self.shape.iter().map(|(dim, _)| dim)
    }

    /// The size of a dim, when the tensor has it.
    pub fn size_of(&self, dim: &Dim) -> Option<usize> {
        self.shape
            .iter()
            .find(|(name, _)| name == dim)
            .map(|(_, size)| *size)
    }

    /// Whether the tensor has this dim.
    pub fn has(&self, dim: &Dim) -> bool {
        self.size_of(dim).is_some()
    }

    /// Position of a dim, outermost 0.
    pub fn position(&self, dim: &Dim) -> Option<usize> {
        self.shape.iter().position(|(name, _)| name == dim)
    }

    /// Number of elements; 1 for a scalar.
    pub fn n_elements(&self) -> usize {
        self.shape.iter().map(|(_, size)| size).product()
    }

    /// Size in bytes.
    pub fn n_bytes(&self) -> usize {
        self.n_elements() * self.dtype.n_bytes()
    }

    /// Row-major stride of every dim, in elements.
    pub fn strides(&self) -> Vec<usize> {
        let mut strides = vec![1; self.shape.len()];
        for dim_idx in (1..self.shape.len()).rev() {
            strides[dim_idx - 1] = strides[dim_idx] * self.shape[dim_idx].1;
        }
        strides
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[", self.dtype)?;
        for (dim_idx, (dim, size)) in self.shape.iter().enumerate() {
            let separator = if dim_idx == 0 { "" } else { ", " };
            write!(f, "{separator}{dim}:{size}")?;
        }
        f.write_str("]")
    }
}

/// How a parameter starts when no weights are given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    Zeros,
    Ones,
    /// Element i (global row-major index) is scale · u(i), u uniform in [−1, 1) from a 32-bit hash of
    /// i and `stream` (lowbias32): no state, so any shard can be made anywhere.
    Hash {
        stream: u32,
        scale: f32,
    },
}

/// A table that the runtime computes once, in f64, rounded to the tensor's type.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConstInit {
    /// `[position, half]`: cos(position · inv_freq).
    RopeCos(RopeTable),
    /// `[position, half]`: sin(position · inv_freq).
    RopeSin(RopeTable),
    /// Every element the same.
    Fill(Scalar),
    /// 0, 1, 2, … along the dim (used for positions), repeated over the others.
    Iota { dim: Dim },
    /// These whole numbers, row-major.
    Numbers(Vec<i32>),
}

/// Rotary frequencies: inv_freq[j] = theta^(−2j / dim), then scaled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeTable {
    pub theta: f64,
    /// Width that is rotated: twice the table's half.
    pub rotary_dim: usize,
    pub scaling: RopeScaling,
}

/// Published changes of the rotary frequencies for longer contexts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeScaling {
    None,
    /// Positions divided by the factor.
    Linear {
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by the factor, high ones kept, smooth between.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_positions: usize,
    },
    /// YaRN (arXiv 2309.00071), as DeepSeek configures it.
    Yarn {
        factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        original_positions: usize,
        attention_factor: f64,
    },
}

/// What a tensor is to the graph.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Given at each step.
    Input,
    /// A weight; trained when the graph updates it.
    Param(Init),
    /// Optimizer state of a parameter, zero at first.
    State { of: TensorId },
    /// A table computed once.
    Const(ConstInit),
    /// The result of an op.
    Temp,
}

/// A value of the graph.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tensor {
    pub name: String,
    pub ty: TensorType,
    pub role: Role,
}

/// One computation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Op {
    pub kind: OpKind,
    pub inputs: Vec<TensorId>,
    pub results: Vec<TensorId>,
}

/// A graph of tensors and ops.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Graph {
    pub name: String,
    pub tensors: Vec<Tensor>,
    /// In execution order.
    pub ops: Vec<Op>,
    /// What a step returns, the loss first where there is one.
    pub outputs: Vec<TensorId>,
    /// Parameter or state → its value after the step.
    pub updates: BTreeMap<TensorId, TensorId>,
    /// Parameter → the gradient of the loss with respect to it.
    pub gradients: BTreeMap<TensorId, TensorId>,
}

impl Graph {
    /// An empty graph.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            ..Self::default()
        }
    }

    /// Adds a source tensor (an input, a parameter, a state or a constant).
    pub fn add_source(&mut self, name: impl Into<String>, ty: TensorType, role: Role) -> TensorId {
        self.push_tensor(Tensor {
            name: name.into(),
            ty,
            role,
        })
    }

    /// Adds an op and its results, typed by the op's shape rule; result names are `name`, `name.1`, ….
    ///
    /// # Errors
    /// The op's shape rule refuses the inputs.
    pub fn add_op(
        &mut self,
        name: impl Into<String>,
        kind: OpKind,
        inputs: &[TensorId],
    ) -> Result<Vec<TensorId>, OpError> {
        let name = name.into();
        let input_types: Vec<&TensorType> = inputs.iter().map(|id| self.ty(*id)).collect();
        let types = kind.infer(&input_types).map_err(|error| error.at(&name))?;
        let results: Vec<TensorId> = types
            .into_iter()
            .enumerate()
            .map(|(result_idx, ty)| {
                let name = if result_idx == 0 {
                    name.clone()
                } else {
                    format!("{name}.{result_idx}")
                };
                self.push_tensor(Tensor {
                    name,
                    ty,
                    role: Role::Temp,
                })
            })
            .collect();
        self.ops.push(Op {
            kind,
            inputs: inputs.to_vec(),
            results: results.clone(),
        });
        Ok(results)
    }

    /// Adds an op whose result types the caller knows (collectives, whose results depend on the rank).
    pub fn add_typed_op(
        &mut self,
        name: &str,
        kind: OpKind,
        inputs: &[TensorId],
        ty: TensorType,
    ) -> TensorId {
        let result = self.push_tensor(Tensor {
            name: name.into(),
            ty,
            role: Role::Temp,
        });
        self.ops.push(Op {
            kind,
            inputs: inputs.to_vec(),
            results: vec![result],
        });
        result
    }

    /// The tensor of an id of this graph.
    pub fn tensor(&self, id: TensorId) -> &Tensor {
        &self.tensors[id.index()]
    }

    /// The type of a tensor.
    pub fn ty(&self, id: TensorId) -> &TensorType {
        &self.tensor(id).ty
    }

    /// The op of an id of this graph.
    pub fn op(&self, id: OpId) -> &Op {
        &self.ops[id.index()]
    }

    /// The name of an op: that of its first result.
    pub fn op_name(&self, op: &Op) -> &str {
        op.results.first().map_or("", |id| &self.tensor(*id).name)
    }

    /// All tensor ids.
    pub fn tensor_ids(&self) -> impl Iterator<Item = TensorId> + use<> {
        (0..self.tensors.len() as u32).map(TensorId)
    }

    /// All ops with their ids, in execution order.
    pub fn ops(&self) -> impl Iterator<Item = (OpId, &Op)> {
        self.ops
            .iter()
            .enumerate()
            .map(|(op_idx, op)| (OpId(op_idx as u32), op))
    }

    /// The tensor of this name. Linear in the number of tensors.
    pub fn find(&self, name: &str) -> Option<TensorId> {
        self.tensor_ids().find(|id| self.tensor(*id).name == name)
    }

    /// The op that makes each tensor; `None` for sources.
    pub fn producers(&self) -> Vec<Option<OpId>> {
        let mut producers = vec![None; self.tensors.len()];
        for (op_id, op) in self.ops() {
            for result in &op.results {
                producers[result.index()] = Some(op_id);
            }
        }
        producers
    }

    /// The ops that read each tensor, in order, without repeats.
    pub fn consumers(&self) -> Vec<Vec<OpId>> {
        let mut consumers = vec![Vec::new(); self.tensors.len()];
        for (op_id, op) in self.ops() {
            for input in &op.inputs {
                let readers: &mut Vec<OpId> = &mut consumers[input.index()];
                if readers.last() != Some(&op_id) {
                    readers.push(op_id);
                }
            }
        }
        consumers
    }

    /// The parameters, in order.
    pub fn params(&self) -> impl Iterator<Item = TensorId> + '_ {
        self.tensor_ids()
            .filter(|id| matches!(self.tensor(*id).role, Role::Param(_)))
    }

    /// Number of parameters (elements).
    pub fn n_params(&self) -> usize {
        self.params().map(|id| self.ty(id).n_elements()).sum()
    }

    fn push_tensor(&mut self, tensor: Tensor) -> TensorId {
        let id = TensorId(self.tensors.len() as u32);
        self.tensors.push(tensor);
        id
    }
}
