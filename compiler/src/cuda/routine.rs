//! Routines: moves of data, and routing that depends on values.
//!
//! Enters: an op and its operands' buffers. Leaves: its kernels.
//! Invariant: as on the host, an index that is read from memory is checked before it is used.

use meshweave_dsl::device_code::KernelSource;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::TensorType;
use meshweave_dsl::name::Dim;
use meshweave_dsl::op::{MoeDims, OpKind};
use meshweave_dsl::program::{Buffer, BufferId};

use super::contract::{Operand, alignment, neighbors};
use super::define::{Defines, Launch, Loop, count, type_name};
use super::{Buffers, CudaError, unsupported};

const COPY: &str = include_str!("copy.cu");
const ROUTING: &str = include_str!("routing.cu");
/// Threads of a block in which each has its own element.
const THREADS: usize = 256;
/// Warps of a block in which each has its own row.
const WARPS: usize = 8;

/// Operands of an op with their types.
struct Operands<'a> {
    ids: Vec<BufferId>,
    buffers: Vec<&'a Buffer>,
}

impl<'a> Operands<'a> {
    fn new(buffers: &Buffers<'a>, ids: &[BufferId]) -> Result<Self, CudaError> {
        Ok(Self {
            ids: ids.to_vec(),
            buffers: ids
                .iter()
                .map(|id| buffers.get(*id))
                .collect::<Result<_, _>>()?,
        })
    }

    fn types(&self) -> Vec<&'a TensorType> {
        self.buffers.iter().map(|buffer| &buffer.ty).collect()
    }
}

pub(super) fn kernels(
    buffers: &Buffers<'_>,
    op: &OpKind,
    inputs: &[BufferId],
    results: &[BufferId],
) -> Result<Vec<KernelSource>, CudaError> {
    let (inputs, results) = (
        Operands::new(buffers, inputs)?,
        Operands::new(buffers, results)?,
    );
    if results
        .buffers
        .iter()
        .all(|buffer| buffer.ty.n_elements() == 0)
    {
        return Ok(Vec::new());
    }
    let all = [inputs.ids.as_slice(), &results.ids].concat();
    match (op, inputs.types().as_slice(), results.types().as_slice()) {
        (OpKind::Transpose { .. }, [_], [y]) => copy(&inputs, 0, &results, y, 0, 0),
        (OpKind::Slice { dim, start, .. }, [x], [y]) => {
            copy(&inputs, 0, &results, y, start * stride(x, dim)?, 0)
        }
        (OpKind::Concat { dim }, parts, [y]) => {
            let mut kernels = Vec::new();
            let mut start = 0;
            for (part_idx, part) in parts.iter().enumerate() {
                let to = start * stride(y, dim)?;
                kernels.extend(copy(&inputs, part_idx, &results, part, 0, to)?);
                start += size(part, dim)?;
            }
            Ok(kernels)
        }
        (OpKind::TopK { dim, choice, k }, [x], [values, indices]) => {
            let mut defines = rows(dim, choice, *k, [x, values, indices])?;
            defines.set("OP", 0);
            let launch = warps(count(&loops(x, &without(x, &[dim]))));
            Ok(vec![defines.kernel("top_k", &[ROUTING], launch, &all)?])
        }
        (
            OpKind::TopKGrad {
                dim,
                choice,
                size: _,
            },
            [d_values, indices],
            [dx],
        ) => {
            let k = size(d_values, choice)?;
            let mut defines = rows(dim, choice, k, [dx, d_values, indices])?;
            defines.set("OP", 1);
            let launch = threads(dx.n_elements());
            Ok(vec![defines.kernel(
                "top_k_grad",
                &[ROUTING],
                launch,
                &all,
            )?])
        }
        (
            OpKind::MoeSlots {
                seq,
                choice,
                n_experts,
                capacity,
            },
            [expert],
            [slot],
        ) => {
            let groups = without(expert, &[seq, choice]);
            let each = [
                (seq.clone(), size(expert, seq)?),
                (choice.clone(), size(expert, choice)?),
            ];
            let mut defines = Defines::default();
            defines
                .set("OP", 2)
                .size("N_EACH", count(&loops(expert, &each)))
                .size("N_EXPERTS", *n_experts)
                .size("CAPACITY", *capacity)
                .place("E_GROUP", &loops(expert, &groups))
                .place("E_EACH", &loops(expert, &each))
                .place("S_GROUP", &loops(slot, &groups))
                .place("S_EACH", &loops(slot, &each));
            let launch = Launch {
                blocks: count(&loops(expert, &groups)) * n_experts,
                threads: THREADS,
                shared_bytes: 0,
            };
            Ok(vec![defines.kernel(
                "moe_slots",
                &[ROUTING],
                launch,
                &all,
            )?])
        }
        (OpKind::MoeDispatch(dims), [_, expert, slot, gate @ ..], [y]) => {
            let mut zero = Defines::default();
            zero.set("OP", 3)
                .set("Y", type_name("moe_dispatch", y.dtype)?)
                .size("N", y.n_elements());
            let zero = zero.kernel("zero", &[ROUTING], threads(y.n_elements()), &results.ids)?;
            let gate = gate.first().copied();
            let (mut defines, n, width) = routes(
                dims,
                [expert, slot],
                gate,
                [inputs.buffers[0], results.buffers[0]],
            )?;
            defines.set("OP", 4);
            let launch = threads(n * width);
            let scatter = defines.kernel("moe_dispatch", &[ROUTING], launch, &all)?;
            Ok(vec![zero, scatter])
        }
        (OpKind::MoeCombine(dims), [_, expert, slot, gate @ ..], [_]) => {
            let gate = gate.first().copied();
            let (mut defines, n, width) = routes(
                dims,
                [expert, slot],
                gate,
                [results.buffers[0], inputs.buffers[0]],
            )?;
            defines.set("OP", 5);
            let launch = threads(n / size(expert, &dims.choice)?.max(1) * width);
            let combine = defines.kernel("moe_combine", &[ROUTING], launch, &all)?;
            Ok(vec![combine])
        }
        (OpKind::MoeGateGrad(dims), [_, _, expert, slot], [d_gate]) => {
            let (mut defines, n, _) = routes(
                dims,
                [expert, slot],
                Some(d_gate),
                [inputs.buffers[1], inputs.buffers[0]],
            )?;
            defines.set("OP", 6);
            Ok(vec![defines.kernel(
                "moe_gate_grad",
                &[ROUTING],
                warps(n),
                &all,
            )?])
        }
        (OpKind::MoeCounts(dims), [expert, slot], [counts]) => {
            let groups = without(expert, &[&dims.seq, &dims.choice]);
            let each = [
                (dims.seq.clone(), size(expert, &dims.seq)?),
                (dims.choice.clone(), size(expert, &dims.choice)?),
            ];
            let n_experts = size(counts, &dims.expert)?;
            let mut defines = Defines::default();
            defines
                .set("OP", 7)
                .size("N_EACH", count(&loops(expert, &each)))
                .size("N_EXPERTS", n_experts)
                .size("FIRST_EXPERT", dims.offset)
                .size("CAPACITY", dims.capacity)
                .size("EXPERT_STRIDE", stride(counts, &dims.expert)?)
                .place("E_GROUP", &loops(expert, &groups))
                .place("E_EACH", &loops(expert, &each))
                .place("S_GROUP", &loops(slot, &groups))
                .place("S_EACH", &loops(slot, &each))
                .place("C_GROUP", &loops(counts, &groups));
            let launch = Launch {
                blocks: count(&loops(expert, &groups)) * n_experts,
                threads: THREADS,
                shared_bytes: 0,
            };
            Ok(vec![defines.kernel(
                "moe_counts",
                &[ROUTING],
                launch,
                &all,
            )?])
        }
        _ => {
            let reason = format!("no routine of {} inputs", inputs.ids.len());
            Err(unsupported(op.name(), reason))
        }
    }
}

/// A copy over the dims of `shape` between an input and the one result, from and to these elements.
fn copy(
    inputs: &Operands<'_>,
    input: usize,
    results: &Operands<'_>,
    shape: &TensorType,
    from_at: usize,
    to_at: usize,
) -> Result<Vec<KernelSource>, CudaError> {
    let (from, to) = (inputs.buffers[input], results.buffers[0]);
    if shape.n_elements() == 0 {
        return Ok(Vec::new());
    }
    // From the result's outermost loop to its innermost; loops that continue each other on both sides
    // are one.
    let mut walk = Vec::new();
    for (dim, size) in shape.shape.iter().filter(|(_, size)| *size != 1) {
        walk.push([*size, stride(&from.ty, dim)?, stride(&to.ty, dim)?]);
    }
    walk.sort_by_key(|[_, _, to]| std::cmp::Reverse(*to));
    let mut merged: Vec<[usize; 3]> = Vec::new();
    for [size, src, dst] in walk {
        match merged.last_mut() {
            Some(outer) if outer[1] == src * size && outer[2] == dst * size => {
                *outer = [outer[0] * size, src, dst];
            }
            _ => merged.push([size, src, dst]),
        }
    }
    let n_bytes = shape.dtype.n_bytes();
    let args = [inputs.ids[input], results.ids[0]];
    let mut defines = Defines::default();
    let side = |loops: &[[usize; 3]], side: usize| -> Vec<Loop> {
        loops.iter().map(|one| (one[0], one[side])).collect()
    };
    let last = merged.last().copied();
    let near_source = merged.iter().position(|[_, src, _]| *src == 1);
    if let (Some([columns, column_from, 1]), Some(rows_at)) = (last, near_source)
        && rows_at + 1 < merged.len()
    {
        // Neighbors differ: through a tile in shared memory.
        let [rows, _, row_to] = merged.remove(rows_at);
        merged.pop();
        defines
            .set("TILED", 1)
            .set("WORD", word(n_bytes))
            .size("ROWS", rows)
            .size("COLUMNS", columns)
            .set("ROW_TO", format_args!("{row_to}ull"))
            .set("COLUMN_FROM", format_args!("{column_from}ull"))
            .set("FROM(i)", offset(from_at, &side(&merged, 1)))
            .set("TO(i)", offset(to_at, &side(&merged, 2)));
        let outer: usize = merged.iter().map(|[size, ..]| size).product();
        let launch = Launch {
            blocks: outer * rows.div_ceil(32) * columns.div_ceil(32),
            threads: THREADS,
            shared_bytes: 0,
        };
        return Ok(vec![defines.kernel("transpose", &[COPY], launch, &args)?]);
    }
    // As many elements at once as begin at multiples of their size on both sides.
    let mut width = 1;
    if let Some([size, 1, 1]) = last {
        let fits = |width: usize| {
            let divides = |n: &usize| n.is_multiple_of(width);
            let aligned = alignment(from.offset).min(alignment(to.offset));
            aligned.is_multiple_of(width * n_bytes)
                && [size, from_at, to_at].iter().all(divides)
                && merged[..merged.len() - 1]
                    .iter()
                    .all(|[_, src, dst]| divides(src) && divides(dst))
        };
        width = 16 / n_bytes;
        while width > 1 && !fits(width) {
            width /= 2;
        }
    }
    if width > 1
        && let Some((inner, outer)) = merged.split_last_mut()
    {
        inner[0] /= width;
        for [_, src, dst] in outer {
            *src /= width;
            *dst /= width;
        }
    }
    let n: usize = merged.iter().map(|[size, ..]| size).product();
    defines
        .set("TILED", 0)
        .set("WORD", word(width * n_bytes))
        .size("N", n)
        .set("FROM(i)", offset(from_at / width, &side(&merged, 1)))
        .set("TO(i)", offset(to_at / width, &side(&merged, 2)));
    Ok(vec![defines.kernel("copy", &[COPY], threads(n), &args)?])
}

/// The place of flattened index `i` behind a first element.
fn offset(first: usize, loops: &[Loop]) -> String {
    let place = super::define::place("i", loops);
    format!("({first}ull + {place})")
}

/// A type of so many bytes.
fn word(n_bytes: usize) -> &'static str {
    match n_bytes {
        2 => "unsigned short",
        4 => "u32",
        8 => "uint2",
        _ => "uint4",
    }
}

/// Parameters of routines over rows of scores: `x[.., dim]`, `values[.., choice]`, `indices[.., choice]`.
fn rows(
    dim: &Dim,
    choice: &Dim,
    k: usize,
    [x, values, indices]: [&TensorType; 3],
) -> Result<Defines, CudaError> {
    let row_dims = without(x, &[dim]);
    let mut defines = Defines::default();
    defines
        .set("X", type_name("top_k", x.dtype)?)
        .size("N_ROWS", count(&loops(x, &row_dims)))
        .size("SIZE", size(x, dim)?)
        .size("K", k)
        .place("X_ROW", &loops(x, &row_dims))
        .place("X_SIDE", &[(size(x, dim)?, stride(x, dim)?)])
        .place("V_ROW", &loops(values, &row_dims))
        .place("V_CHOICE", &[(k, stride(values, choice)?)])
        .place("I_ROW", &loops(indices, &row_dims))
        .place("I_CHOICE", &[(k, stride(indices, choice)?)]);
    if values.dtype != x.dtype || indices.dtype != DType::I32 {
        let reason = format!("{x} with values {values} and indices {indices}");
        return Err(unsupported("top_k", reason));
    }
    Ok(defines)
}

/// Parameters of the routines between tokens and slots, the number of assignments, and of features.
fn routes(
    dims: &MoeDims,
    [expert, slot]: [&TensorType; 2],
    gate: Option<&TensorType>,
    [tokens, slots]: [&Buffer; 2],
) -> Result<(Defines, usize, usize), CudaError> {
    let pieces = [tokens, slots].map(|buffer| Operand::new(BufferId(0), buffer));
    let (tokens, slots) = (&tokens.ty, &slots.ty);
    // Tokens in the order of the assignments, choices fastest.
    let mut walk = without(expert, &[&dims.seq, &dims.choice]);
    for dim in [&dims.seq, &dims.choice] {
        walk.push((dim.clone(), size(expert, dim)?));
    }
    let width: Vec<(Dim, usize)> = tokens
        .shape
        .iter()
        .filter(|(dim, _)| !expert.has(dim))
        .cloned()
        .collect();
    let n = count(&loops(expert, &walk));
    let mut features = [tokens, slots].map(|ty| loops(ty, &width));
    // Elements that are moved at once: neighbors on both sides that begin at multiples of their size.
    let steps = [
        loops(tokens, &walk),
        [
            loops(slots, &walk),
            vec![
                (2, stride(slots, &dims.expert)?),
                (2, stride(slots, &dims.slot)?),
            ],
        ]
        .concat(),
    ];
    let mut pack = 16 / tokens.dtype.n_bytes().max(slots.dtype.n_bytes());
    for ((piece, features), steps) in pieces.iter().zip(&features).zip(&steps) {
        // Each step by itself, so that none hides in another.
        let steps: Vec<&[Loop]> = steps.chunks(1).collect();
        pack = neighbors(piece, features, &steps, pack);
    }
    while pack > 1 && !width.last().is_some_and(|(_, n)| n.is_multiple_of(pack)) {
        pack /= 2;
    }
    for (size, stride) in features.iter_mut().filter_map(|loops| loops.last_mut()) {
        *size /= pack;
        *stride *= pack;
    }
    let n_features = count(&features[0]);
    let mut defines = Defines::default();
    let gate_ty = gate.unwrap_or(expert);
    let place = if slots.n_elements() < i32::MAX as usize {
        "u32"
    } else {
        "u64"
    };
    defines
        .set("X", type_name("moe", tokens.dtype)?)
        .set("Y", type_name("moe", slots.dtype)?)
        .set("G", type_name("moe", gate_ty.dtype)?)
        .set("PLACE", place)
        .set("GATED", u8::from(gate.is_some()))
        .size("N", n)
        .size("WIDTH", n_features)
        .size("N_CHOICES", size(expert, &dims.choice)?)
        .size("FIRST_EXPERT", dims.offset)
        .size("N_EXPERTS", size(slots, &dims.expert)?)
        .size("EXPERT_STRIDE", stride(slots, &dims.expert)?)
        .size("CAPACITY", size(slots, &dims.slot)?)
        .size("SLOT_STRIDE", stride(slots, &dims.slot)?)
        .place("E_AT", &loops(expert, &walk))
        .place("S_AT", &loops(slot, &walk))
        .place("G_AT", &loops(gate_ty, &walk))
        .place("X_AT", &loops(tokens, &walk))
        .place("Y_AT", &loops(slots, &walk))
        .set("PACK", pack)
        .place("X_WIDTH", &features[0])
        .place("Y_WIDTH", &features[1]);
    Ok((defines, n, n_features))
}

/// A thread each of `n`.
fn threads(n: usize) -> Launch {
    Launch {
        blocks: n.div_ceil(THREADS),
        threads: THREADS,
        shared_bytes: 0,
    }
}

/// A warp each of `n`.
fn warps(n: usize) -> Launch {
    Launch {
        blocks: n.div_ceil(WARPS),
        threads: 32 * WARPS,
        shared_bytes: 0,
    }
}

/// Loops over `dims` in a type; a dim that it lacks does not move it.
fn loops(ty: &TensorType, dims: &[(Dim, usize)]) -> Vec<Loop> {
    let strides = ty.strides();
    dims.iter()
        .map(|(dim, size)| (*size, ty.position(dim).map_or(0, |at| strides[at])))
        .collect()
}

fn without(ty: &TensorType, left_out: &[&Dim]) -> Vec<(Dim, usize)> {
    let kept = ty.shape.iter().filter(|(dim, _)| !left_out.contains(&dim));
    kept.cloned().collect()
}

fn stride(ty: &TensorType, dim: &Dim) -> Result<usize, CudaError> {
    let position = ty.position(dim).ok_or_else(|| lacks(ty, dim))?;
    Ok(ty.strides()[position])
}

fn size(ty: &TensorType, dim: &Dim) -> Result<usize, CudaError> {
    ty.size_of(dim).ok_or_else(|| lacks(ty, dim))
}

fn lacks(ty: &TensorType, dim: &Dim) -> CudaError {
    CudaError::Internal(format!("{ty} lacks `{dim}`"))
}
