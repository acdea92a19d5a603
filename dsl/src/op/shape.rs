//! Shape rules: the result types of an op from the types of its inputs.
//!
//! Invariant: a rule that accepts its inputs gives results whose sizes follow from them and from
//! the sizes inside the op; everything else is refused by name, with both numbers.

use super::{AttentionDims, BinaryFn, MoeDims, MoeMove, OpKind, UnaryFn};
use crate::dtype::DType;
use crate::graph::TensorType;
use crate::name::Dim;

/// An op that does not fit its inputs.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("op `{op}`{}: {reason}", if at.is_empty() { String::new() } else { format!(" at `{at}`") })]
pub struct OpError {
    pub op: &'static str,
    /// Name of the op in its graph, empty while unknown.
    pub at: String,
    pub reason: String,
}

impl OpError {
    pub(crate) fn at(mut self, name: &str) -> Self {
        self.at = name.into();
        self
    }
}

type Rule<T> = Result<T, String>;

impl OpKind {
    /// The result types.
    ///
    /// # Errors
    /// The number, dims, sizes or element types of the inputs do not fit the op.
    pub fn infer(&self, inputs: &[&TensorType]) -> Result<Vec<TensorType>, OpError> {
        infer(self, inputs)
            .and_then(distinct)
            .map_err(|reason| OpError {
                op: self.name(),
                at: String::new(),
                reason,
            })
    }
}

fn infer(kind: &OpKind, inputs: &[&TensorType]) -> Rule<Vec<TensorType>> {
    consistent(kind, inputs)?;
    let one = |ty: TensorType| Ok(vec![ty]);
    match kind {
        OpKind::Gather { dim, .. } => {
            let [x, idx] = take(inputs)?;
            is_index(idx)?;
            has(x, dim)?;
            has_not(idx, dim)?;
            one(TensorType {
                dtype: x.dtype,
                shape: joined(idx, &without(x, &[dim]))?,
            })
        }
        OpKind::ScatterAdd { dim, size, .. } => {
            let [idx, y] = take(inputs)?;
            is_index(idx)?;
            for index_dim in idx.dims() {
                has(y, index_dim)?;
            }
            has_not(y, dim)?;
            let rest: Vec<_> = y
                .shape
                .iter()
                .filter(|(name, _)| !idx.has(name))
                .cloned()
                .collect();
            let mut shape = vec![(dim.clone(), *size)];
            shape.extend(rest);
            one(TensorType {
                dtype: y.dtype,
                shape,
            })
        }
        OpKind::Contract { out } => {
            let [a, b] = take(inputs)?;
            if a.dtype != b.dtype {
                return Err(format!("multiplies {} by {}", a.dtype, b.dtype));
            }
            let shape = out
                .iter()
                .map(|dim| {
                    let size = a.size_of(dim).or_else(|| b.size_of(dim));
                    size.map(|size| (dim.clone(), size))
                        .ok_or_else(|| format!("no input has the result's dim `{dim}`"))
                })
                .collect::<Rule<Vec<_>>>()?;
            one(TensorType {
                dtype: a.dtype,
                shape,
            })
        }
        OpKind::Unary(function) => {
            let [x] = take(inputs)?;
            is_float(x)?;
            let mut ty = x.clone();
            if let UnaryFn::Cast(dtype) = function {
                ty.dtype = *dtype;
                is_float(&ty)?;
            }
            one(ty)
        }
        OpKind::Binary(function) => {
            let [a, b] = take(inputs)?;
            if a.dtype != b.dtype || (!a.dtype.is_float() && !matches!(function, BinaryFn::Equal)) {
                return Err(format!(
                    "takes two tensors of one float type, not {} and {}",
                    a.dtype, b.dtype
                ));
            }
            let wide = if b.dims().all(|dim| a.has(dim)) {
                a
            } else if a.dims().all(|dim| b.has(dim)) {
                b
            } else {
                return Err(format!("neither {a} nor {b} has all dims of the other"));
            };
            one(wide.clone())
        }
        OpKind::Reduce { dims, .. } => {
            let [x] = take(inputs)?;
            is_float(x)?;
            let dims: Vec<&Dim> = dims.iter().collect();
            for dim in &dims {
                has(x, dim)?;
            }
            one(TensorType {
                dtype: x.dtype,
                shape: without(x, &dims),
            })
        }
        OpKind::Expand { dims } => {
            let [x] = take(inputs)?;
            for (dim, size) in &x.shape {
                match dims.iter().find(|(name, _)| name == dim) {
                    Some((_, wanted)) if wanted == size => {}
                    Some((_, wanted)) => {
                        return Err(format!(
                            "dim `{dim}` has {size} elements and cannot become {wanted}"
                        ));
                    }
                    None => return Err(format!("the result lacks the input's dim `{dim}`")),
                }
            }
            one(TensorType {
                dtype: x.dtype,
                shape: dims.clone(),
            })
        }
        OpKind::RmsNorm { dim, .. } => {
            let [x, weight] = take(inputs)?;
            is_vector(weight, dim)?;
            let rows = TensorType {
                dtype: x.dtype,
                shape: rows_of(x, dim)?,
            };
            Ok(vec![x.clone(), rows])
        }
        OpKind::RmsNormGrad { dim } => {
            let [x, weight, rstd, dy] = take(inputs)?;
            is_vector(weight, dim)?;
            same_shape("rstd", &rstd.shape, &rows_of(x, dim)?)?;
            same_shape("dy", &dy.shape, &x.shape)?;
            Ok(vec![x.clone(), weight.clone()])
        }
        OpKind::LayerNorm { dim, .. } => {
            let [x, weight, bias] = take(inputs)?;
            is_vector(weight, dim)?;
            is_vector(bias, dim)?;
            let rows = TensorType {
                dtype: x.dtype,
                shape: rows_of(x, dim)?,
            };
            Ok(vec![x.clone(), rows.clone(), rows])
        }
        OpKind::LayerNormGrad { dim } => {
            let [x, weight, mean, rstd, dy] = take(inputs)?;
            is_vector(weight, dim)?;
            same_shape("mean", &mean.shape, &rows_of(x, dim)?)?;
            same_shape("rstd", &rstd.shape, &rows_of(x, dim)?)?;
            same_shape("dy", &dy.shape, &x.shape)?;
            Ok(vec![x.clone(), weight.clone(), weight.clone()])
        }
        OpKind::Softmax { dim } => {
            let [x] = take(inputs)?;
            has(x, dim)?;
            is_float(x)?;
            one(x.clone())
        }
        OpKind::SoftmaxGrad { dim } => {
            let [y, dy] = take(inputs)?;
            has(y, dim)?;
            same_shape("dy", &dy.shape, &y.shape)?;
            one(y.clone())
        }
        OpKind::Rope { dim, .. } => {
            let [x, cos, sin] = take(inputs)?;
            let width = has(x, dim)?;
            same_shape("sin", &sin.shape, &cos.shape)?;
            let Some(((_, half), positions)) = cos.shape.split_last() else {
                return Err("the tables have no dims".into());
            };
            if width != 2 * half {
                return Err(format!(
                    "dim `{dim}` has {width} elements, the tables rotate {}",
                    2 * half
                ));
            }
            for (position, size) in positions {
                if has(x, position)? != *size {
                    return Err(format!(
                        "the tables have {size} positions along `{position}`, x has another number"
                    ));
                }
            }
            if x.position(dim) != Some(x.shape.len() - 1) {
                return Err(format!("dim `{dim}` must be innermost in {x}"));
            }
            one(x.clone())
        }
        OpKind::Attention(dims) => {
            let (q, k, v, seen) = match inputs {
                [q, k, v] => (q, k, v, None),
                [q, k, v, seen] => (q, k, v, Some(seen)),
                _ => return Err(format!("takes 3 or 4 inputs, not {}", inputs.len())),
            };
            let (o, lse) = attention(dims, q, k, v)?;
            if let Some(seen) = seen {
                is_index(seen)?;
                has(seen, &dims.seq)?;
                for dim in seen.dims() {
                    has(q, dim)?;
                }
                if seen.position(&dims.seq) != Some(seen.shape.len() - 1) {
                    return Err(format!("dim `{}` must be innermost in {seen}", dims.seq));
                }
            }
            Ok(vec![o, lse])
        }
        OpKind::AttentionGrad(dims) => {
            let [q, k, v, o, lse, do_] = take(inputs)?;
            let (o_expected, lse_expected) = attention(dims, q, k, v)?;
            same_shape("o", &o.shape, &o_expected.shape)?;
            same_shape("do", &do_.shape, &o_expected.shape)?;
            same_shape("lse", &lse.shape, &lse_expected.shape)?;
            Ok(vec![q.clone(), k.clone(), v.clone()])
        }
        OpKind::Pick { dim, .. } => {
            let [x, idx] = take(inputs)?;
            is_index(idx)?;
            same_shape("the index", &idx.shape, &rows_of(x, dim)?)?;
            one(TensorType {
                dtype: x.dtype,
                shape: idx.shape.clone(),
            })
        }
        OpKind::CrossEntropyGrad { dim, .. } => {
            let [logits, lse, target, dloss] = take(inputs)?;
            is_index(target)?;
            let rows = rows_of(logits, dim)?;
            same_shape("lse", &lse.shape, &rows)?;
            same_shape("the target", &target.shape, &rows)?;
            same_shape("dloss", &dloss.shape, &rows)?;
            one(logits.clone())
        }
        OpKind::Transpose { dims } => {
            let [x] = take(inputs)?;
            if dims.len() != x.shape.len() {
                return Err(format!(
                    "names {} dims, x has {}",
                    dims.len(),
                    x.shape.len()
                ));
            }
            let shape = dims
                .iter()
                .map(|dim| Ok((dim.clone(), has(x, dim)?)))
                .collect::<Rule<Vec<_>>>()?;
            one(TensorType {
                dtype: x.dtype,
                shape,
            })
        }
        OpKind::Rename { from, to } => {
            let [x] = take(inputs)?;
            has(x, from)?;
            let mut ty = x.clone();
            for (dim, _) in &mut ty.shape {
                if dim == from {
                    *dim = to.clone();
                }
            }
            one(ty)
        }
        OpKind::Split { dim, into } => {
            let [x] = take(inputs)?;
            let size = has(x, dim)?;
            let product: usize = into.iter().map(|(_, size)| size).product();
            if size != product {
                return Err(format!(
                    "dim `{dim}` has {size} elements and cannot be split into {product}"
                ));
            }
            one(replaced(x, std::slice::from_ref(dim), into.clone())?)
        }
        OpKind::Merge { dims, into } => {
            let [x] = take(inputs)?;
            let sizes = dims
                .iter()
                .map(|dim| has(x, dim))
                .collect::<Rule<Vec<_>>>()?;
            one(replaced(
                x,
                dims,
                vec![(into.clone(), sizes.iter().product())],
            )?)
        }
        OpKind::Slice { dim, start, len } => {
            let [x] = take(inputs)?;
            let size = has(x, dim)?;
            if start + len > size {
                return Err(format!(
                    "dim `{dim}` has {size} elements, the slice ends at {}",
                    start + len
                ));
            }
            one(resized(x, dim, *len))
        }
        OpKind::Concat { dim } => {
            let first = *inputs.first().ok_or("takes at least one input")?;
            let mut total = 0;
            for input in inputs {
                total += has(input, dim)?;
                if resized(input, dim, 0) != resized(first, dim, 0) {
                    return Err(format!(
                        "{input} and {first} differ in more than dim `{dim}`"
                    ));
                }
            }
            one(resized(first, dim, total))
        }
        OpKind::TopK { dim, choice, k } => {
            let [x] = take(inputs)?;
            let size = has(x, dim)?;
            if *k > size || *k == 0 {
                return Err(format!("takes the {k} greatest of {size}"));
            }
            if choice == dim {
                return Err(format!(
                    "the choices and what is chosen from are both `{dim}`"
                ));
            }
            let mut shape = rows_of(x, dim)?;
            shape.push((choice.clone(), *k));
            Ok(vec![
                TensorType {
                    dtype: x.dtype,
                    shape: shape.clone(),
                },
                TensorType {
                    dtype: DType::I32,
                    shape,
                },
            ])
        }
        OpKind::TopKGrad { dim, choice, size } => {
            let [dvalues, idx] = take(inputs)?;
            is_index(idx)?;
            same_shape("the indices", &idx.shape, &dvalues.shape)?;
            one(replaced(
                dvalues,
                std::slice::from_ref(choice),
                vec![(dim.clone(), *size)],
            )?)
        }
        OpKind::MoeSlots { seq, choice, .. } => {
            let [expert] = take(inputs)?;
            is_index(expert)?;
            has(expert, seq)?;
            has(expert, choice)?;
            one(expert.clone())
        }
        OpKind::MoePlaces(places) => {
            let [expert, slot, turns] = take(inputs)?;
            is_index(expert)?;
            is_index(turns)?;
            has(expert, &places.seq)?;
            has(expert, &places.choice)?;
            has(turns, &places.expert)?;
            has(turns, &places.turn)?;
            same_shape("the slots", &slot.shape, &expert.shape)?;
            one(expert.clone())
        }
        OpKind::MoeDispatch(dims) => {
            let (x, rest) = inputs.split_first().ok_or("takes x, expert and slot")?;
            let expert = assignment(dims, rest)?;
            let mut shape = vec![(dims.expert.clone(), dims.n_experts)];
            shape.extend(moe_batch(dims, expert));
            shape.push((dims.slot.clone(), dims.capacity));
            shape.extend(x.shape.iter().filter(|(dim, _)| !expert.has(dim)).cloned());
            has(x, &dims.seq)?;
            one(TensorType {
                dtype: x.dtype,
                shape,
            })
        }
        OpKind::MoeCombine(dims) => {
            let (y, rest) = inputs.split_first().ok_or("takes y, expert and slot")?;
            let expert = assignment(dims, rest)?;
            check_moe_output(dims, y)?;
            let mut shape: Vec<_> = expert
                .shape
                .iter()
                .filter(|(dim, _)| *dim != dims.choice)
                .cloned()
                .collect();
            shape.extend(moe_features(dims, y, expert));
            one(TensorType {
                dtype: y.dtype,
                shape,
            })
        }
        OpKind::MoeGateGrad(dims) => {
            let [y, dout, expert, slot] = take(inputs)?;
            assignment(dims, &[expert, slot])?;
            check_moe_output(dims, y)?;
            has(dout, &dims.seq)?;
            one(TensorType {
                dtype: y.dtype,
                shape: expert.shape.clone(),
            })
        }
        OpKind::MoeCounts(dims) => {
            let [expert, slot] = take(inputs)?;
            assignment(dims, &[expert, slot])?;
            let mut shape = vec![(dims.expert.clone(), dims.n_experts)];
            shape.extend(moe_batch(dims, expert));
            one(TensorType {
                dtype: expert.dtype,
                shape,
            })
        }
        OpKind::MoeMove(MoeMove { dims, from, .. }) => {
            let (y, rest) = inputs.split_first().ok_or("takes rows and their routes")?;
            let [from_expert, from_slot, to @ ..] = rest else {
                return Err(format!("takes 5 or 6 inputs, not {}", inputs.len()));
            };
            let (to, gate) = to.split_at(2.min(to.len()));
            let source = MoeDims {
                choice: from.clone(),
                ..dims.clone()
            };
            let routes: Vec<&TensorType> = [from_expert, from_slot]
                .into_iter()
                .chain(gate)
                .copied()
                .collect();
            let from_expert = assignment(&source, &routes)?;
            let expert = assignment(dims, to)?;
            let n_experts = has(y, &dims.expert)?;
            if n_experts != dims.n_experts {
                return Err(format!(
                    "the rows have {n_experts} experts, the op says {}",
                    dims.n_experts
                ));
            }
            let batch = moe_batch(dims, expert);
            same_shape(
                "the batch of where tokens stand",
                &moe_batch(&source, from_expert),
                &batch,
            )?;
            let mut shape = vec![(dims.expert.clone(), dims.n_experts)];
            shape.extend(batch);
            let n_groups = shape.len();
            let groups = y.shape.get(..n_groups).unwrap_or_default();
            same_shape("the groups of rows", groups, &shape)?;
            if y.position(&dims.slot) != Some(n_groups) {
                return Err(format!("dim `{}` must follow the groups of {y}", dims.slot));
            }
            shape.push((dims.slot.clone(), dims.capacity));
            shape.extend(y.shape[n_groups + 1..].iter().cloned());
            one(TensorType {
                dtype: y.dtype,
                shape,
            })
        }
        OpKind::Adamw { .. } => {
            let [p, g, m, v, step] = take(inputs)?;
            for (what, ty) in [("the gradient", g), ("m", m), ("v", v)] {
                same_shape(what, &ty.shape, &p.shape)?;
            }
            if !step.shape.is_empty() {
                return Err(format!("the step is a scalar, not {step}"));
            }
            Ok(vec![p.clone(), m.clone(), v.clone()])
        }
        OpKind::Sgd { .. } => {
            let [p, g] = take(inputs)?;
            same_shape("the gradient", &g.shape, &p.shape)?;
            one(p.clone())
        }
        OpKind::AllGather { dim, counts, .. } => {
            let [x] = take(inputs)?;
            has(x, dim)?;
            one(resized(x, dim, counts.iter().sum()))
        }
        OpKind::AllReduce { .. } | OpKind::CollectivePermute { .. } | OpKind::Broadcast { .. } => {
            let [x] = take(inputs)?;
            one(x.clone())
        }
        OpKind::ReduceScatter { .. } | OpKind::AllToAll { .. } => {
            Err("its result depends on the rank: give the type where the op is made".into())
        }
    }
}

/// No result has a dim twice.
fn distinct(types: Vec<TensorType>) -> Rule<Vec<TensorType>> {
    for ty in &types {
        for (dim_idx, (dim, _)) in ty.shape.iter().enumerate() {
            if ty.shape[..dim_idx].iter().any(|(name, _)| name == dim) {
                return Err(format!("dim `{dim}` would stand twice in the result {ty}"));
            }
        }
    }
    Ok(types)
}

/// Dims of the same name have the same size in all inputs (concatenation and routing aside).
fn consistent(kind: &OpKind, inputs: &[&TensorType]) -> Rule<()> {
    let exempt: Option<&Dim> = match kind {
        OpKind::Concat { dim } => Some(dim),
        _ => None,
    };
    for (input_idx, input) in inputs.iter().enumerate() {
        for (dim_idx, (dim, size)) in input.shape.iter().enumerate() {
            if input.shape[..dim_idx].iter().any(|(name, _)| name == dim) {
                return Err(format!("input {input_idx} has dim `{dim}` twice"));
            }
            if Some(dim) == exempt {
                continue;
            }
            for other in &inputs[..input_idx] {
                if let Some(other_size) = other.size_of(dim)
                    && other_size != *size
                {
                    return Err(format!(
                        "dim `{dim}` has {other_size} elements in one input and {size} in another"
                    ));
                }
            }
        }
    }
    Ok(())
}

fn take<'a, const N: usize>(inputs: &[&'a TensorType]) -> Rule<[&'a TensorType; N]> {
    inputs
        .try_into()
        .map_err(|_| format!("takes {N} inputs, not {}", inputs.len()))
}

fn has(ty: &TensorType, dim: &Dim) -> Rule<usize> {
    ty.size_of(dim)
        .ok_or_else(|| format!("{ty} has no dim `{dim}`"))
}

/// What an index selects along is another dim than those of the index.
fn has_not(ty: &TensorType, dim: &Dim) -> Rule<()> {
    if ty.has(dim) {
        Err(format!("{ty} already has the indexed dim `{dim}`"))
    } else {
        Ok(())
    }
}

fn is_index(ty: &TensorType) -> Rule<()> {
    if ty.dtype == DType::I32 {
        Ok(())
    } else {
        Err(format!("the index is {}, not i32", ty.dtype))
    }
}

fn is_float(ty: &TensorType) -> Rule<()> {
    if ty.dtype.is_float() {
        Ok(())
    } else {
        Err(format!("takes a float tensor, not {ty}"))
    }
}

fn is_vector(ty: &TensorType, dim: &Dim) -> Rule<()> {
    match ty.shape.as_slice() {
        [(name, _)] if name == dim => Ok(()),
        _ => Err(format!("the weight is {ty}, not a vector over `{dim}`")),
    }
}

fn same_shape(what: &str, shape: &[(Dim, usize)], expected: &[(Dim, usize)]) -> Rule<()> {
    if shape == expected {
        return Ok(());
    }
    let text = |shape: &[(Dim, usize)]| {
        shape
            .iter()
            .map(|(dim, size)| format!("{dim}:{size}"))
            .collect::<Vec<_>>()
            .join(", ")
    };
    Err(format!(
        "{what} is [{}], expected [{}]",
        text(shape),
        text(expected)
    ))
}

fn without(ty: &TensorType, dims: &[&Dim]) -> Vec<(Dim, usize)> {
    ty.shape
        .iter()
        .filter(|(dim, _)| !dims.contains(&dim))
        .cloned()
        .collect()
}

fn rows_of(ty: &TensorType, dim: &Dim) -> Rule<Vec<(Dim, usize)>> {
    has(ty, dim)?;
    Ok(without(ty, &[dim]))
}

fn joined(a: &TensorType, rest: &[(Dim, usize)]) -> Rule<Vec<(Dim, usize)>> {
    if let Some((dim, _)) = rest.iter().find(|(dim, _)| a.has(dim)) {
        return Err(format!("dim `{dim}` would stand twice in the result"));
    }
    Ok(a.shape.iter().chain(rest).cloned().collect())
}

fn resized(ty: &TensorType, dim: &Dim, size: usize) -> TensorType {
    let mut ty = ty.clone();
    for (name, old) in &mut ty.shape {
        if name == dim {
            *old = size;
        }
    }
    ty
}

/// `ty` with the adjacent dims `from` replaced by `into`.
fn replaced(ty: &TensorType, from: &[Dim], into: Vec<(Dim, usize)>) -> Rule<TensorType> {
    let start = from
        .first()
        .and_then(|dim| ty.position(dim))
        .ok_or_else(|| format!("{ty} lacks the dims to replace"))?;
    let adjacent = ty.shape.get(start..start + from.len());
    if !adjacent.is_some_and(|dims| dims.iter().map(|(dim, _)| dim).eq(from)) {
        return Err(format!("the dims {from:?} are not adjacent in {ty}"));
    }
    let mut shape = ty.shape.clone();
    shape.splice(start..start + from.len(), into);
    Ok(TensorType {
        dtype: ty.dtype,
        shape,
    })
}

/// Types of (o, lse).
fn attention(
    dims: &AttentionDims,
    q: &TensorType,
    k: &TensorType,
    v: &TensorType,
) -> Rule<(TensorType, TensorType)> {
    if has(q, &dims.head)? != has(k, &dims.head)? {
        return Err("q and k have heads of different widths".into());
    }
    has(q, &dims.seq)?;
    if has(k, &dims.kv_seq)? != has(v, &dims.kv_seq)? {
        return Err("k and v have different lengths".into());
    }
    let value = has(v, &dims.value)?;
    for (dim, _) in k
        .shape
        .iter()
        .filter(|(dim, _)| *dim != dims.kv_seq && *dim != dims.head)
    {
        has(q, dim)?;
        has(v, dim)?;
    }
    if q.position(&dims.head) != Some(q.shape.len() - 1)
        || k.position(&dims.head) != Some(k.shape.len() - 1)
        || v.position(&dims.value) != Some(v.shape.len() - 1)
    {
        return Err("the head dims must be innermost".into());
    }
    let rows = without(q, &[&dims.head]);
    let mut shape = rows.clone();
    shape.push((dims.value.clone(), value));
    Ok((
        TensorType {
            dtype: q.dtype,
            shape,
        },
        TensorType {
            dtype: q.dtype,
            shape: rows,
        },
    ))
}

/// Checks `expert, slot[, gate]` and returns the expert indices' type.
fn assignment<'a>(dims: &MoeDims, inputs: &[&'a TensorType]) -> Rule<&'a TensorType> {
    let (expert, slot, gate) = match inputs {
        [expert, slot] => (expert, slot, None),
        [expert, slot, gate] => (expert, slot, Some(gate)),
        _ => {
            return Err(format!(
                "takes expert, slot and perhaps gate, not {} inputs",
                inputs.len()
            ));
        }
    };
    is_index(expert)?;
    is_index(slot)?;
    has(expert, &dims.seq)?;
    has(expert, &dims.choice)?;
    same_shape("the slots", &slot.shape, &expert.shape)?;
    if let Some(gate) = gate {
        is_float(gate)?;
        same_shape("the gates", &gate.shape, &expert.shape)?;
    }
    Ok(expert)
}

fn moe_batch(dims: &MoeDims, expert: &TensorType) -> Vec<(Dim, usize)> {
    without(expert, &[&dims.seq, &dims.choice])
}

fn moe_features(dims: &MoeDims, y: &TensorType, expert: &TensorType) -> Vec<(Dim, usize)> {
    y.shape
        .iter()
        .filter(|(dim, _)| *dim != dims.expert && *dim != dims.slot && !expert.has(dim))
        .cloned()
        .collect()
}

fn check_moe_output(dims: &MoeDims, y: &TensorType) -> Rule<()> {
    let n_experts = has(y, &dims.expert)?;
    let capacity = has(y, &dims.slot)?;
    if (n_experts, capacity) != (dims.n_experts, dims.capacity) {
        return Err(format!(
            "has {n_experts} experts of {capacity} slots, the op says {} of {}",
            dims.n_experts, dims.capacity
        ));
    }
    Ok(())
}
