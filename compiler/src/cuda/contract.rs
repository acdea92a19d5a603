//! Contractions: any einsum of two operands as one product of matrices with batches.
//!
//! Enters: the contraction's loops, each with its stride in every operand. Leaves: one kernel.
//! Rows are the loops that only `a` and the output have, columns those that only `b` and the output
//! have, batches those of all three; the depth is summed. Each operand's place splits into a part by
//! row (column), one by depth and one by batch, whatever the memory order.
//! Invariant: every element of the output is written by one thread, its sum in the order of depth.

use meshweave_dsl::device_code::KernelSource;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::program::{Bias, Buffer, BufferId, ContractIndex};

use super::define::{Defines, Launch, Loop, merge, type_name};
use super::{Buffers, CudaError, Precision, Products, TensorCores, unsupported};

const TEXT: &str = include_str!("contract.cu");
/// The body for products of warp groups, and what it is written in.
const WARP_GROUPS: [&str; 3] = [
    include_str!("wgmma.cu"),
    TEXT,
    include_str!("contract_wgmma.cu"),
];
/// Multiprocessors that a grid should fill: those of an A100, and of an H100.
const N_MULTIPROCESSORS: usize = 108;
const N_MULTIPROCESSORS_WARP_GROUPS: usize = 132;
/// Bytes of the widest copy.
const MAX_COPY_BYTES: usize = 16;
/// Elements of padding of a line of shared memory that runs along rows or columns.
const PAD: usize = 8;

/// A tile of the output and how warps share it.
#[derive(Clone, Copy, Debug)]
struct Tile {
    rows: usize,
    columns: usize,
    warps_rows: usize,
    warps_columns: usize,
    /// Work of a full tile of this size beside the greatest: less reuse of operands. A rule of thumb,
    /// not measured.
    efficiency: f64,
}

const fn tile(rows: usize, columns: usize, warps: [usize; 2], efficiency: f64) -> Tile {
    Tile {
        rows,
        columns,
        warps_rows: warps[0],
        warps_columns: warps[1],
        efficiency,
    }
}

impl Tile {
    /// Stages of the ring of warp groups: what shared memory holds, four at most.
    fn warp_group_stages(&self) -> usize {
        let sharing = usize::from(self.columns <= MAX_SHARING_COLUMNS);
        let stage_bytes = 2 * WARP_GROUP_DEPTH * (self.rows + self.columns);
        (WARP_GROUP_SHARED_BYTES[sharing] / stage_bytes).min(4)
    }
}

/// Tiles of tensor cores; a warp's part is a multiple of 16 × 16.
const TENSOR_TILES: [Tile; 4] = [
    tile(128, 256, [2, 4], 1.0),
    tile(128, 128, [2, 2], 0.95),
    tile(64, 128, [2, 2], 0.8),
    tile(64, 64, [2, 2], 0.65),
];
/// Tiles of warp groups, each of which has 64 rows of 64, 128 or 256 columns.
const WARP_GROUP_TILES: [Tile; 4] = [
    tile(128, 256, [8, 1], 1.0),
    tile(128, 128, [8, 1], 0.85),
    tile(64, 128, [4, 1], 0.7),
    tile(64, 64, [4, 1], 0.5),
];
/// Depth of their steps: a line of shared memory.
const WARP_GROUP_DEPTH: usize = 64;
/// Bytes of dynamic shared memory of a block on compute capability 9.0, and of each of two that share a
/// multiprocessor.
const WARP_GROUP_SHARED_BYTES: [usize; 2] = [227 * 1024, 113 * 1024];
/// Most columns of a tile of which two blocks' accumulators fit into the registers.
const MAX_SHARING_COLUMNS: usize = 128;
/// Tiles of plain products; threads are 16 across, and as many down as there are.
const PLAIN_TILES: [Tile; 2] = [tile(128, 128, [4, 2], 1.0), tile(64, 64, [4, 2], 0.7)];

/// An operand: element type, and the greatest power of two that divides its address, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    pub id: BufferId,
    pub dtype: DType,
    pub alignment: usize,
}

impl Operand {
    /// A buffer as an operand; arenas begin at multiples of every copy's size.
    pub(super) fn new(id: BufferId, buffer: &Buffer) -> Self {
        Self {
            id,
            dtype: buffer.ty.dtype,
            alignment: alignment(buffer.offset),
        }
    }
}

/// What is added to a product.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Adds {
    /// What the result holds.
    pub onto: bool,
    /// Of the result's type.
    pub bias: Option<Bias>,
}

/// The loops by their roles, in the order of the flattened indices.
struct Roles {
    batch: Vec<ContractIndex>,
    rows: Vec<ContractIndex>,
    columns: Vec<ContractIndex>,
    depth: Vec<ContractIndex>,
}

pub(super) fn of_buffers(
    buffers: &Buffers<'_>,
    ids: [BufferId; 3],
    indices: &[ContractIndex],
    adds: Adds,
    products: Products,
) -> Result<Vec<KernelSource>, CudaError> {
    let operand = |id: BufferId| Ok::<_, CudaError>(Operand::new(id, buffers.get(id)?));
    let [a, b, c] = ids;
    let operands = [operand(a)?, operand(b)?, operand(c)?];
    if let Some(bias) = &adds.bias {
        let ty = &buffers.get(bias.buffer)?.ty;
        let fits = |span: usize| span <= ty.n_elements() && ty.dtype == operands[2].dtype;
        if !bias.span(indices).is_some_and(fits) {
            return Err(CudaError::Internal(format!(
                "a bias {ty} in a contraction to {}",
                buffers.get(c)?.ty
            )));
        }
    }
    Ok(contract(operands, indices, adds, products)?
        .into_iter()
        .collect())
}

/// Bytes that an address is a multiple of, up to the widest copy.
pub(super) fn alignment(offset: usize) -> usize {
    match offset {
        0 => MAX_COPY_BYTES,
        _ => (1 << offset.trailing_zeros()).min(MAX_COPY_BYTES),
    }
}

/// The kernel of `c = a · b`, or `c += a · b`, over these loops, with a bias or without; `None` when
/// `c` has no elements.
///
/// # Errors
/// `Unsupported` when the operands' element types are neither both f32 nor both bf16, or the output's
/// is neither.
pub fn contract(
    [a, b, c]: [Operand; 3],
    indices: &[ContractIndex],
    adds: Adds,
    products: Products,
) -> Result<Option<KernelSource>, CudaError> {
    // Neighbors in the output are columns, so that threads beside each other write beside each other.
    let across = |d: &ContractIndex| d.c == 1 && d.b == 0 && d.size > 1;
    if indices.iter().any(across) {
        let swapped = |d: &ContractIndex| ContractIndex {
            a: d.b,
            b: d.a,
            ..*d
        };
        let indices: Vec<ContractIndex> = indices.iter().map(swapped).collect();
        if !indices.iter().any(across) {
            return contract([b, a, c], &indices, adds, products);
        }
    }
    let mut math = match (a.dtype, b.dtype, products.precision) {
        (DType::F32, DType::F32, Precision::F32) => 0,
        (DType::F32, DType::F32, Precision::Tf32) => 1,
        (DType::Bf16, DType::Bf16, _) => 2,
        (x, y, _) => {
            let reason = format!("a product of {x} and {y}; both must be f32, or both bf16");
            return Err(unsupported("contract", reason));
        }
    };
    if !c.dtype.is_float() {
        return Err(unsupported("contract", format!("a product as {}", c.dtype)));
    }
    let roles = roles(indices);
    let [batch, rows, columns, depth] =
        [&roles.batch, &roles.rows, &roles.columns, &roles.depth].map(|loops| size(loops));
    if batch * rows * columns == 0 {
        return Ok(None);
    }
    let n_bytes = a.dtype.n_bytes();

    let along = |loops: &[ContractIndex], stride: fn(&ContractIndex) -> usize| -> Vec<Loop> {
        loops.iter().map(|d| (d.size, stride(d))).collect()
    };
    let a_sides = [
        along(&roles.rows, |d| d.a),
        along(&roles.depth, |d| d.a),
        along(&roles.batch, |d| d.a),
    ];
    let b_sides = [
        along(&roles.columns, |d| d.b),
        along(&roles.depth, |d| d.b),
        along(&roles.batch, |d| d.b),
    ];
    let c_sides = [
        along(&roles.rows, |d| d.c),
        along(&roles.columns, |d| d.c),
        along(&roles.batch, |d| d.c),
    ];
    let (a_inner, a_bytes) = copies(&a, &a_sides);
    let (b_inner, b_bytes) = copies(&b, &b_sides);
    // Two columns at once: neighbors in memory that begin at even places.
    let pairs = neighbors(&c, &c_sides[1], &[&c_sides[0], &c_sides[2]], 2) == 2;

    if math == 2
        && products.cores == TensorCores::WarpGroups
        && a_bytes.min(b_bytes) == MAX_COPY_BYTES
    {
        math = 3;
    }
    let tile = choose(math, batch, rows, columns);
    let (tile_depth, stages) = match math {
        3 => (WARP_GROUP_DEPTH, tile.warp_group_stages()),
        2 => (32, 3),
        _ => (16, 3),
    };

    let mut defines = Defines::default();
    defines
        .set("MATH", math)
        .set("IN", type_name("contract", a.dtype)?)
        .set("OUT", type_name("contract", c.dtype)?)
        .size("ROWS", rows)
        .size("COLUMNS", columns)
        .size("DEPTH", depth)
        .set("TILE_ROWS", tile.rows)
        .set("TILE_COLUMNS", tile.columns)
        .set("TILE_DEPTH", tile_depth)
        .set("STAGES", stages)
        .set("WARPS_ROWS", tile.warps_rows)
        .set("WARPS_COLUMNS", tile.warps_columns)
        .set("PAD", PAD)
        .set("A_DEPTH_INNER", u8::from(a_inner))
        .set("B_DEPTH_INNER", u8::from(b_inner))
        .set("A_BYTES", a_bytes)
        .set("B_BYTES", b_bytes)
        .set("OUT_PAIRS", u8::from(pairs))
        .set("ACCUMULATE", u8::from(adds.onto))
        .set("BIASED", u8::from(adds.bias.is_some()));
    let names = [
        ["A_ROW", "A_DEPTH", "A_BATCH"],
        ["B_COLUMN", "B_DEPTH", "B_BATCH"],
        ["C_ROW", "C_COLUMN", "C_BATCH"],
    ];
    for (names, sides) in names.iter().zip([&a_sides, &b_sides, &c_sides]) {
        for (name, loops) in names.iter().zip(sides) {
            defines.place(name, loops);
        }
    }
    let mut args = vec![a.id, b.id, c.id];
    if let Some(bias) = &adds.bias {
        let stride = |d: &ContractIndex| {
            let position = indices.iter().position(|index| index == d);
            position
                .and_then(|position| bias.strides.get(position))
                .copied()
                .unwrap_or(0)
        };
        for (name, loops) in [
            ("BIAS_ROW", &roles.rows),
            ("BIAS_COLUMN", &roles.columns),
            ("BIAS_BATCH", &roles.batch),
        ] {
            let loops: Vec<Loop> = loops.iter().map(|d| (d.size, stride(d))).collect();
            defines.place(name, &loops);
        }
        args.push(bias.buffer);
    }
    let part = |inner: bool, side: usize| {
        if math == 3 {
            side * tile_depth
        } else if inner {
            side * (tile_depth + MAX_COPY_BYTES / n_bytes)
        } else {
            tile_depth * (side + PAD)
        }
    };
    let n_elements = part(a_inner, tile.rows) + part(b_inner, tile.columns);
    let launch = Launch {
        blocks: batch * rows.div_ceil(tile.rows) * columns.div_ceil(tile.columns),
        threads: 32 * tile.warps_rows * tile.warps_columns,
        shared_bytes: stages * n_elements * n_bytes,
    };
    let name = match math {
        0 => "contract_f32",
        1 => "contract_tf32",
        2 => "contract_bf16",
        _ => "contract_bf16_wgmma",
    };
    let text = if math == 3 { &WARP_GROUPS[..] } else { &[TEXT] };
    let kernel = defines.kernel(name, text, launch, &args)?;
    Ok(Some(kernel))
}

/// The loops by their roles. The last one of a role is the one whose neighbors are neighbors in the
/// operand that is read along it; the others follow the output's order.
fn roles(indices: &[ContractIndex]) -> Roles {
    let mut sorted: Vec<ContractIndex> = indices.iter().copied().filter(|d| d.size != 1).collect();
    sorted.sort_by_key(|d| std::cmp::Reverse((d.c, d.a, d.b)));
    let of = |wanted: &dyn Fn(&ContractIndex) -> bool, near: &dyn Fn(&ContractIndex) -> bool| {
        let mut loops: Vec<ContractIndex> = sorted.iter().copied().filter(|d| wanted(d)).collect();
        if let Some(at) = loops.iter().position(near) {
            let last = loops.remove(at);
            loops.push(last);
        }
        loops
    };
    let is_batch = |d: &ContractIndex| d.c != 0 && d.a != 0 && d.b != 0;
    let has_both_inner = sorted.iter().any(|d| d.c == 0 && d.a == 1 && d.b == 1);
    Roles {
        batch: of(&is_batch, &|_| false),
        // An output loop that neither operand has repeats the row.
        rows: of(&|d| d.c != 0 && d.b == 0, &|d| d.a == 1),
        columns: of(&|d| d.c != 0 && d.b != 0 && d.a == 0, &|d| d.b == 1),
        depth: of(&|d| d.c == 0, &|d| {
            if has_both_inner {
                d.a == 1 && d.b == 1
            } else {
                d.a == 1 || d.b == 1
            }
        }),
    }
}

fn size(loops: &[ContractIndex]) -> usize {
    loops.iter().map(|d| d.size).product()
}

/// Whether an operand with places by side (row or column), depth and batch is copied along its depth,
/// and the bytes of one copy; 0 bytes when elements are too small for asynchronous copies.
fn copies(operand: &Operand, [side, depth, batch]: &[Vec<Loop>; 3]) -> (bool, usize) {
    let n_bytes = operand.dtype.n_bytes();
    let widest = MAX_COPY_BYTES / n_bytes;
    let along_depth = neighbors(operand, depth, &[side, batch], widest);
    let along_side = neighbors(operand, side, &[depth, batch], widest);
    let near = |loops: &[Loop]| merge(loops).last().is_some_and(|(_, stride)| *stride == 1);
    let inner = along_depth > along_side || (along_depth == along_side && !near(side));
    let bytes = along_depth.max(along_side) * n_bytes;
    (inner, if bytes < 4 { 0 } else { bytes })
}

/// Elements, up to `widest`, that neighbors along the loops `inner` may be moved by at once, whatever
/// the indices of the `others`.
pub(super) fn neighbors(
    operand: &Operand,
    inner: &[Loop],
    others: &[&[Loop]],
    widest: usize,
) -> usize {
    let inner = merge(inner);
    let Some(((size, 1), outer)) = inner.split_last() else {
        return 1;
    };
    let fits = |width: usize| {
        let divides = |(_, stride): &Loop| stride.is_multiple_of(width);
        size.is_multiple_of(width)
            && (operand.alignment / operand.dtype.n_bytes()).is_multiple_of(width)
            && outer.iter().all(divides)
            && others.iter().all(|loops| merge(loops).iter().all(divides))
    };
    let mut width = widest;
    while width > 1 && !fits(width) {
        width /= 2;
    }
    width
}

/// The tile with which a device is done first: full waves of tiles, each by its work and efficiency.
fn choose(math: u8, batch: usize, rows: usize, columns: usize) -> Tile {
    let (tiles, n_multiprocessors): (&[Tile], usize) = match math {
        0 => (&PLAIN_TILES, N_MULTIPROCESSORS),
        3 => (&WARP_GROUP_TILES, N_MULTIPROCESSORS_WARP_GROUPS),
        _ => (&TENSOR_TILES, N_MULTIPROCESSORS),
    };
    let time = |tile: &Tile| {
        let n_tiles = batch * rows.div_ceil(tile.rows) * columns.div_ceil(tile.columns);
        let n_waves = n_tiles.div_ceil(n_multiprocessors) as f64;
        n_waves * (tile.rows * tile.columns) as f64 / tile.efficiency
    };
    let mut best = tiles[0];
    for tile in &tiles[1..] {
        if time(tile) < time(&best) {
            best = *tile;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use meshweave_dsl::device_code::Argument;

    use super::*;

    const F32: Products = Products {
        precision: Precision::F32,
        cores: TensorCores::Warps,
    };

    fn index(size: usize, a: usize, b: usize, c: usize) -> ContractIndex {
        ContractIndex { size, a, b, c }
    }

    fn operand(id: u32) -> Operand {
        Operand {
            id: BufferId(id),
            dtype: DType::F32,
            alignment: 16,
        }
    }

    /// `c[i, j] = Σ a[i, k] b[k, j]` with a depth of 30 copies a by two, b by four elements.
    #[test]
    fn copies_are_as_wide_as_sizes_allow() {
        let indices = [index(8, 30, 0, 64), index(64, 0, 1, 1), index(30, 1, 64, 0)];
        let kernel = contract(
            [operand(0), operand(1), operand(2)],
            &indices,
            Adds::default(),
            F32,
        );
        let source = kernel.unwrap().unwrap().source;
        assert!(source.contains("#define A_BYTES 8\n"), "{source}");
        assert!(source.contains("#define A_DEPTH_INNER 1\n"));
        assert!(source.contains("#define B_BYTES 16\n"));
        assert!(source.contains("#define B_DEPTH_INNER 0\n"));
    }

    #[test]
    fn an_output_by_columns_swaps_the_operands() {
        let indices = [index(8, 30, 0, 1), index(64, 0, 1, 8), index(30, 1, 64, 0)];
        let kernel = contract(
            [operand(0), operand(1), operand(2)],
            &indices,
            Adds::default(),
            Products {
                precision: Precision::Tf32,
                ..F32
            },
        );
        let kernel = kernel.unwrap().unwrap();
        let ids = [1, 0, 2].map(|id| Argument::Buffer(BufferId(id)));
        assert_eq!(kernel.args, ids);
        assert!(kernel.source.contains("#define ROWS 64u\n"));
    }

    #[test]
    fn empty_outputs_need_no_kernel() {
        let indices = [index(0, 30, 0, 64), index(64, 0, 1, 1), index(30, 1, 64, 0)];
        let operands = [operand(0), operand(1), operand(2)];
        assert_eq!(contract(operands, &indices, Adds::default(), F32), Ok(None));
    }
}
