//! Slices of sequences: a forward graph in which every slice has ops of its own.
//!
//! Enters: the forward graph of a microbatch. Leaves: an equal graph whose ops work on one slice of
//! the sequence each, with the op and the slice that each comes from.
//! Invariant: a slice reads what slices before it made (keys and values for causal attention, sums),
//! never what comes after, so forwards run from the first slice to the last; differentiation then
//! gives backwards that run from the last to the first, each adding to the gradients of the keys and
//! values of those before (TeraPipe, Li et al. 2021, §3.2; Seq1F1B, Sun et al. 2024, §3).

use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::graph::{Graph, Op, OpId, Role, TensorId};
use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{BinaryFn, OpKind};

use super::{PipelineError, Result};

/// A graph by slices.
#[derive(Clone, Debug)]
pub struct Sliced {
    pub graph: Graph,
    /// Of every op, the op that it comes from.
    pub op_of: Vec<OpId>,
    /// Of every op, its slice.
    pub slice_of: Vec<usize>,
}

impl Sliced {
    /// The stage of every op, from those of the ops that they come from.
    pub fn stages(&self, stages: &[usize]) -> Vec<usize> {
        let of = self.op_of.iter();
        of.filter_map(|op| stages.get(op.index()).copied())
            .collect()
    }
}

/// `forward` with every sequence in `n_slices` slices of equal length, as it is for one; sequences are the dims of the
/// queries and the keys of its attention ops. Linear in ops × slices, save for the keys and values of
/// attention, which are laid one after the other.
///
/// # Errors
/// `Invalid` where there is no attention or the length is no multiple of `n_slices`; `Unsupported` for
/// attention that is not causal, and for ops that work across the whole sequence otherwise.
pub fn slice_sequences(forward: &Graph, n_slices: usize) -> Result<Sliced> {
    if n_slices == 1 {
        return Ok(Sliced {
            graph: forward.clone(),
            op_of: forward.ops().map(|(op_id, _)| op_id).collect(),
            slice_of: vec![0; forward.ops.len()],
        });
    }
    let mut slicer = Slicer::new(forward, n_slices)?;
    for (op_id, op) in forward.ops() {
        slicer.op = op_id;
        slicer.visit(op)?;
    }
    slicer.finish()
}

/// What became of a tensor.
#[derive(Clone, Debug)]
enum Part {
    Whole(TensorId),
    /// One a slice.
    Slices(Vec<TensorId>),
}

struct Slicer<'a> {
    forward: &'a Graph,
    n_slices: usize,
    /// The dims that are cut.
    dims: BTreeSet<Dim>,
    sliced: Sliced,
    parts: BTreeMap<TensorId, Part>,
    /// The slice of every tensor that an op made.
    made_in: BTreeMap<TensorId, usize>,
    producers: Vec<Option<OpId>>,
    /// The op that is visited.
    op: OpId,
}

impl<'a> Slicer<'a> {
    fn new(forward: &'a Graph, n_slices: usize) -> Result<Self> {
        let mut dims = BTreeSet::new();
        for op in &forward.ops {
            if let OpKind::Attention(attention) = &op.kind {
                if !attention.causal {
                    return Err(PipelineError::Unsupported(format!(
                        "`{}` is not causal: a slice of the sequence would need those after it; choose a schedule of whole microbatches",
                        forward.op_name(op)
                    )));
                }
                dims.insert(attention.seq.clone());
                dims.insert(attention.kv_seq.clone());
            }
        }
        if dims.is_empty() {
            return Err(PipelineError::Invalid(format!(
                "`{}` has no attention, so no sequence can be divided into {n_slices} slices",
                forward.name
            )));
        }
        let mut graph = Graph::new(forward.name.clone());
        let mut parts = BTreeMap::new();
        for (id, tensor) in forward.tensor_ids().zip(&forward.tensors) {
            for (dim, size) in &tensor.ty.shape {
                if dims.contains(dim) && !size.is_multiple_of(n_slices) {
                    return Err(PipelineError::Invalid(format!(
                        "sequences of {size} tokens do not divide into {n_slices} slices: choose slices that divide {size}"
                    )));
                }
            }
            if tensor.role != Role::Temp {
                let own =
                    graph.add_source(tensor.name.clone(), tensor.ty.clone(), tensor.role.clone());
                parts.insert(id, Part::Whole(own));
            }
        }
        Ok(Self {
            forward,
            n_slices,
            dims,
            sliced: Sliced {
                graph,
                op_of: Vec::new(),
                slice_of: Vec::new(),
            },
            parts,
            made_in: BTreeMap::new(),
            producers: forward.producers(),
            op: OpId(0),
        })
    }

    fn visit(&mut self, op: &Op) -> Result<()> {
        let is_cut = |id: &TensorId| self.cut_dim(*id).is_some();
        let cuts = op.inputs.iter().any(is_cut) || op.results.iter().any(is_cut);
        if !cuts {
            return self.whole(op);
        }
        if op.results.iter().all(is_cut) {
            return self.each(op);
        }
        self.sum(op)
    }

    /// The dim along which a tensor of the forward graph is cut.
    fn cut_dim(&self, id: TensorId) -> Option<&Dim> {
        let ty = self.forward.ty(id);
        ty.dims().find(|dim| self.dims.contains(*dim))
    }

    fn unsupported(&self, op: &Op) -> PipelineError {
        PipelineError::Unsupported(format!(
            "`{}` ({}) works across the whole sequence, which cannot be divided into {} slices: choose a schedule of whole microbatches",
            self.forward.op_name(op),
            op.kind.name(),
            self.n_slices
        ))
    }

    /// An op without a sequence, once: with the last slice that its inputs are of.
    fn whole(&mut self, op: &Op) -> Result<()> {
        let inputs = op.inputs.iter().map(|input| self.of_whole(*input));
        let inputs = inputs.collect::<Result<Vec<_>>>()?;
        let last = inputs.iter().filter_map(|input| self.made_in.get(input));
        let last = last.copied().max();
        let names = self.names(op);
        let results = self.add(names, op.kind.clone(), &inputs, last.unwrap_or(0))?;
        for (id, own) in op.results.iter().zip(results) {
            self.parts.insert(*id, Part::Whole(own));
        }
        Ok(())
    }

    /// An op of every slice.
    fn each(&mut self, op: &Op) -> Result<()> {
        let mut results: Vec<Vec<TensorId>> = vec![Vec::new(); op.results.len()];
        for slice in 0..self.n_slices {
            let kind = self.kind(op, slice)?;
            let inputs = self.inputs(op, slice)?;
            let names = self.names(op).into_iter();
            let names = names.map(|name| format!("{name}.slice{slice}")).collect();
            let made = self.add(names, kind, &inputs, slice)?;
            for (all, own) in results.iter_mut().zip(made) {
                all.push(own);
            }
        }
        for (id, slices) in op.results.iter().zip(results) {
            self.parts.insert(*id, Part::Slices(slices));
        }
        Ok(())
    }

    /// A sum over the sequence: that of every slice, added to those before.
    fn sum(&mut self, op: &Op) -> Result<()> {
        let is_sum = match &op.kind {
            OpKind::Contract { .. } => op.inputs.iter().all(|id| self.cut_dim(*id).is_some()),
            OpKind::Reduce { kind, .. } => *kind == ReduceKind::Sum,
            _ => false,
        };
        let (&[result], true) = (op.results.as_slice(), is_sum) else {
            return Err(self.unsupported(op));
        };
        let name = &self.forward.tensor(result).name;
        let mut total = None;
        for slice in 0..self.n_slices {
            let inputs = self.inputs(op, slice)?;
            let names = vec![format!("{name}.slice{slice}")];
            let part = self.add(names, op.kind.clone(), &inputs, slice)?;
            let part = one(part)?;
            total = Some(match total {
                None => part,
                Some(before) => {
                    let is_last = slice + 1 == self.n_slices;
                    let names = vec![if is_last {
                        name.clone()
                    } else {
                        format!("{name}.until{slice}")
                    }];
                    let add = OpKind::Binary(BinaryFn::Add);
                    one(self.add(names, add, &[before, part], slice)?)?
                }
            });
        }
        if let Some(total) = total {
            self.parts.insert(result, Part::Whole(total));
        }
        Ok(())
    }

    /// What an op is for one slice.
    fn kind(&self, op: &Op, slice: usize) -> Result<OpKind> {
        let is_cut = |dim: &Dim| self.dims.contains(dim);
        Ok(match &op.kind {
            OpKind::Attention(attention) => {
                let mut attention = attention.clone();
                let queries = op.inputs.first().map(|id| self.forward.ty(*id));
                let n_queries = queries.and_then(|ty| ty.size_of(&attention.seq));
                attention.offset += slice * n_queries.unwrap_or(0) / self.n_slices;
                OpKind::Attention(attention)
            }
            OpKind::Expand { dims } => OpKind::Expand {
                dims: dims
                    .iter()
                    .map(|(dim, size)| {
                        let n_parts = if is_cut(dim) { self.n_slices } else { 1 };
                        (dim.clone(), size / n_parts)
                    })
                    .collect(),
            },
            // Element by element, or along other dims.
            OpKind::Gather { dim, .. } | OpKind::Pick { dim, .. } if !is_cut(dim) => {
                op.kind.clone()
            }
            OpKind::RmsNorm { dim, .. }
            | OpKind::LayerNorm { dim, .. }
            | OpKind::Softmax { dim }
            | OpKind::Rope { dim, .. }
            | OpKind::TopK { dim, .. }
            | OpKind::Slice { dim, .. }
            | OpKind::Concat { dim }
                if !is_cut(dim) =>
            {
                op.kind.clone()
            }
            OpKind::Reduce { dims, .. } if !dims.iter().any(is_cut) => op.kind.clone(),
            OpKind::Split { dim, .. } if !is_cut(dim) => op.kind.clone(),
            OpKind::Merge { dims, .. } if !dims.iter().any(is_cut) => op.kind.clone(),
            OpKind::Unary(_)
            | OpKind::Binary(_)
            | OpKind::Contract { .. }
            | OpKind::Transpose { .. }
            | OpKind::Rename { .. } => op.kind.clone(),
            _ => return Err(self.unsupported(op)),
        })
    }

    /// The inputs of an op for one slice: keys and values are those of all slices so far.
    fn inputs(&mut self, op: &Op, slice: usize) -> Result<Vec<TensorId>> {
        let is_attention = matches!(op.kind, OpKind::Attention(_));
        let mut inputs = Vec::with_capacity(op.inputs.len());
        for (nth, id) in op.inputs.iter().enumerate() {
            let Some(dim) = self.cut_dim(*id).cloned() else {
                inputs.push(self.of_whole(*id)?);
                continue;
            };
            let own = match self.parts.get(id).cloned() {
                Some(Part::Slices(slices)) if is_attention && nth > 0 && slice > 0 => {
                    let name = self.forward.op_name(op);
                    let name = format!("{name}.kv{nth}.until{slice}");
                    let concat = OpKind::Concat { dim };
                    one(self.add(vec![name], concat, &slices[..=slice], slice)?)?
                }
                Some(Part::Slices(slices)) => slices[slice],
                // A source; each reader cuts for itself, so that no slice passes between stages.
                Some(Part::Whole(source)) => {
                    let size = self.forward.ty(*id).size_of(&dim).unwrap_or(0);
                    let len = size / self.n_slices;
                    let (start, len) = match is_attention && nth > 0 {
                        true => (0, len * (slice + 1)),
                        false => (slice * len, len),
                    };
                    let name = self.forward.op_name(op);
                    let name = format!("{name}.in{nth}.slice{slice}");
                    let cut = OpKind::Slice { dim, start, len };
                    one(self.add(vec![name], cut, &[source], slice)?)?
                }
                None => return Err(self.unmade(*id)),
            };
            inputs.push(own);
        }
        Ok(inputs)
    }

    fn of_whole(&self, id: TensorId) -> Result<TensorId> {
        match self.parts.get(&id) {
            Some(Part::Whole(own)) => Ok(*own),
            _ => Err(self.unmade(id)),
        }
    }

    fn unmade(&self, id: TensorId) -> PipelineError {
        PipelineError::Internal(format!(
            "`{}` is read before its slices are made",
            self.forward.tensor(id).name
        ))
    }

    fn names(&self, op: &Op) -> Vec<String> {
        let results = op.results.iter();
        results
            .map(|id| self.forward.tensor(*id).name.clone())
            .collect()
    }

    /// Adds an op with its names, from the op that is visited.
    fn add(
        &mut self,
        names: Vec<String>,
        kind: OpKind,
        inputs: &[TensorId],
        slice: usize,
    ) -> Result<Vec<TensorId>> {
        let graph = &mut self.sliced.graph;
        let first = names.first().cloned().unwrap_or_default();
        let results = graph.add_op(first, kind, inputs)?;
        for (own, name) in results.iter().zip(names) {
            graph.tensors[own.index()].name = name;
        }
        for own in &results {
            self.made_in.insert(*own, slice);
        }
        self.sliced.op_of.push(self.op);
        self.sliced.slice_of.push(slice);
        Ok(results)
    }

    fn finish(mut self) -> Result<Sliced> {
        for output in &self.forward.outputs {
            match self.parts.get(output) {
                Some(Part::Whole(own)) => self.sliced.graph.outputs.push(*own),
                _ => {
                    let maker = self.producers[output.index()].map(|op| self.forward.op(op));
                    return Err(
                        maker.map_or_else(|| self.unmade(*output), |maker| self.unsupported(maker))
                    );
                }
            }
        }
        Ok(self.sliced)
    }
}

fn one(results: Vec<TensorId>) -> Result<TensorId> {
    match results[..] {
        [result] => Ok(result),
        _ => Err(PipelineError::Internal(format!(
            "a slice of an op has {} results instead of 1",
            results.len()
        ))),
    }
}
