//! What a collective moves and combines, and the kernels that do it on one device.
//!
//! In: a group of members, each with its op and its buffers. Out: a [`Collective`], the same seen from
//! any member; and its launches where all members share a device: kernels of `collective.cu`, which read
//! the members' buffers in place.
//! Invariant: reductions add in the order of the group's ranks, as on every other backend, and all
//! members receive the same bits.

use std::collections::BTreeMap;

use meshweave_dsl::device_code::Grid;
use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::TensorType;
use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::op::OpKind;

use super::Tables;
use crate::collective::threads::route::Route;
use crate::collective::{Crossing, CrossingOrder, Division};
use crate::device::gpu::{Address, FunctionIdx, Gpu, ModuleIdx, Value, Work};
use crate::error::{Error, Result};
use crate::executor::prepare::{cross, divide};
use crate::strided::CopyLoop;

/// The kernels as PTX for sm_80, which every device of this kind and later runs.
pub(super) const CODE: &str = include_str!("collective.ptx");

/// Threads of a block of both kernels, which walk their elements in a loop.
const THREADS: u32 = 256;
/// Beyond this many blocks every device is full.
const MAX_BLOCKS: usize = 1024;

/// The functions of [`CODE`], by name and number of blocks.
pub(super) struct Functions {
    module: ModuleIdx,
    known: BTreeMap<(&'static str, u32), FunctionIdx>,
}

/// What launches are made with.
pub(super) struct Launcher<'a> {
    pub(super) gpu: &'a mut dyn Gpu,
    pub(super) functions: &'a mut Functions,
    pub(super) tables: &'a mut Tables,
    /// Of the collective's elements.
    pub(super) dtype: DType,
}

/// One member's part in a collective; addresses of members on other devices mean nothing here.
pub(super) struct Member<'a> {
    pub(super) rank: usize,
    pub(super) op: &'a OpKind,
    pub(super) src: Address,
    pub(super) dst: Address,
    pub(super) src_ty: &'a TensorType,
    pub(super) dst_ty: &'a TensorType,
}

impl Member<'_> {
    /// Of its elements.
    pub(super) fn dtype(&self) -> DType {
        self.dst_ty.dtype
    }
}

/// What a collective does; members are counted in the order of the group.
#[derive(Debug, PartialEq)]
pub(super) enum Collective {
    /// Elements change their places.
    Moves(Vec<Move>),
    /// All sources are combined, element by element, into all targets.
    AllReduce { kind: ReduceKind, n_elements: usize },
    /// Of all sources, each member's rows are combined into its target.
    ReduceScatter { kind: ReduceKind, rows: Vec<Rows> },
}

/// Elements of one member's source that go to one member's target.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Move {
    pub(super) source: usize,
    pub(super) target: usize,
    /// Up to three, outermost first.
    pub(super) loops: Vec<CopyLoop>,
    /// First element in the source, and in the target.
    pub(super) from: usize,
    pub(super) to: usize,
}

/// Rows of elements that lie together: at a pitch in the sources, one after the other in the target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rows {
    pub(super) n: usize,
    pub(super) width: usize,
    /// Elements from one row to the next in the sources, and before the first one.
    pub(super) pitch: usize,
    pub(super) start: usize,
}

impl Rows {
    pub(super) fn dense(n_elements: usize) -> Self {
        Self {
            n: 1,
            width: n_elements,
            pitch: n_elements,
            start: 0,
        }
    }

    pub(super) fn n_elements(&self) -> usize {
        self.n * self.width
    }

    /// The rows as loops into a dense target.
    pub(super) fn loops(&self) -> Vec<CopyLoop> {
        vec![
            CopyLoop {
                size: self.n,
                src: self.pitch,
                dst: self.width,
            },
            together(self.width),
        ]
    }
}

/// Elements that lie together on both sides.
fn together(size: usize) -> CopyLoop {
    CopyLoop {
        size,
        src: 1,
        dst: 1,
    }
}

impl Collective {
    /// The collective of these members, in the order of their group.
    ///
    /// # Errors
    /// `Invalid` when the members' ops and buffers do not fit each other, `Unsupported` when the op is
    /// not written for GPUs.
    pub(super) fn of(members: &[Member<'_>]) -> Result<Self> {
        let Some(first) = members.first() else {
            return Ok(Self::Moves(Vec::new()));
        };
        for member in members {
            let own = [member.src_ty.dtype, member.dst_ty.dtype];
            ensure(member, own == [first.dtype(); 2])?;
        }
        match first.op {
            OpKind::AllReduce { kind, .. } => {
                let n_elements = first.src_ty.n_elements();
                for member in members {
                    let sizes = [member.src_ty, member.dst_ty].map(TensorType::n_elements);
                    ensure(member, sizes == [n_elements; 2])?;
                }
                let kind = *kind;
                Ok(Self::AllReduce { kind, n_elements })
            }
            OpKind::ReduceScatter { kind, .. } => Ok(Self::ReduceScatter {
                kind: *kind,
                rows: scattered(members)?,
            }),
            OpKind::AllGather { .. } => gathered(members).map(Self::Moves),
            OpKind::AllToAll { .. } => crossed(members).map(Self::Moves),
            OpKind::CollectivePermute { .. } => {
                let moves = members.iter().enumerate().map(|(target, member)| {
                    let OpKind::CollectivePermute { from, .. } = member.op else {
                        return Err(misfit(member));
                    };
                    let source = members.iter().position(|other| other.rank == *from);
                    whole(members, source.ok_or_else(|| misfit(member))?, target)
                });
                moves.collect::<Result<_>>().map(Self::Moves)
            }
            OpKind::Broadcast { .. } => {
                let moves = (0..members.len()).map(|target| whole(members, 0, target));
                moves.collect::<Result<_>>().map(Self::Moves)
            }
            other => Err(Error::Unsupported(format!(
                "{} between ranks on GPUs; run with `--backend threads`",
                other.name()
            ))),
        }
    }
}

fn scattered(members: &[Member<'_>]) -> Result<Vec<Rows>> {
    let rows = members.iter().enumerate().map(|(idx, member)| {
        let OpKind::ReduceScatter { dim, counts, .. } = member.op else {
            return Err(misfit(member));
        };
        let division = divide(member.src_ty, dim, counts).ok_or_else(|| misfit(member))?;
        check_division(member, &division, members.len())?;
        let n_part = division.n_part_elements(idx);
        ensure(member, n_part == member.dst_ty.n_elements())?;
        for other in members {
            ensure(other, other.src_ty.n_elements() == division.n_elements())?;
        }
        Ok(Rows {
            n: division.outer,
            width: division.counts[idx] * division.inner,
            pitch: division.total() * division.inner,
            start: division.start(idx) * division.inner,
        })
    });
    rows.collect()
}

fn gathered(members: &[Member<'_>]) -> Result<Vec<Move>> {
    let mut moves = Vec::new();
    for (target, member) in members.iter().enumerate() {
        let OpKind::AllGather { dim, counts, .. } = member.op else {
            return Err(misfit(member));
        };
        let division = divide(member.dst_ty, dim, counts).ok_or_else(|| misfit(member))?;
        check_division(member, &division, members.len())?;
        for (source, other) in members.iter().enumerate() {
            let n_part = division.n_part_elements(source);
            ensure(other, other.src_ty.n_elements() == n_part)?;
            let width = division.counts[source] * division.inner;
            let rows = CopyLoop {
                size: division.outer,
                src: width,
                dst: division.total() * division.inner,
            };
            moves.push(Move {
                source,
                target,
                loops: vec![rows, together(width)],
                from: 0,
                to: division.start(source) * division.inner,
            });
        }
    }
    Ok(moves)
}

fn crossed(members: &[Member<'_>]) -> Result<Vec<Move>> {
    let n_members = members.len();
    let crossings = members.iter().map(|member| {
        let OpKind::AllToAll {
            split,
            split_counts,
            concat,
            concat_counts,
            ..
        } = member.op
        else {
            return Err(misfit(member));
        };
        let crossing = cross(member.src_ty, split, split_counts, concat, concat_counts);
        let crossing = crossing.ok_or_else(|| misfit(member))?;
        let counts = [crossing.split_counts.len(), crossing.concat_counts.len()];
        ensure(member, counts == [n_members; 2])?;
        Ok(crossing)
    });
    let crossings = crossings.collect::<Result<Vec<Crossing>>>()?;
    let mut moves = Vec::new();
    for (target, crossing) in crossings.iter().enumerate() {
        for (source, (peer, sent)) in members.iter().zip(&crossings).enumerate() {
            let route = Route {
                crossing,
                peer_split: &sent.split_counts,
                n_concat: crossing.concat_counts.iter().sum(),
                own_split: crossing.split_counts[target],
                count: crossing.concat_counts[source],
                skipped: sent.split_counts[..target].iter().sum(),
                place: crossing.concat_counts[..source].iter().sum(),
            };
            let (loops, from, to, n_src) = match crossing.order {
                CrossingOrder::SameDim => route.same_dim(),
                CrossingOrder::SplitFirst => route.split_first(),
                CrossingOrder::ConcatFirst => route.concat_first(),
            };
            let fits = match crossing.order {
                CrossingOrder::SameDim => sent.split_counts[target] == route.count,
                _ => sent.split_counts[target] == route.own_split,
            };
            ensure(peer, fits && peer.src_ty.n_elements() == n_src)?;
            moves.push(Move {
                source,
                target,
                loops,
                from,
                to,
            });
        }
    }
    Ok(moves)
}

/// A member's whole source to another's whole target.
fn whole(members: &[Member<'_>], source: usize, target: usize) -> Result<Move> {
    let n_elements = members[target].dst_ty.n_elements();
    let fits = members[source].src_ty.n_elements() == n_elements;
    ensure(&members[target], fits)?;
    Ok(Move {
        source,
        target,
        loops: vec![together(n_elements)],
        from: 0,
        to: 0,
    })
}

impl Functions {
    /// Those of a module that was loaded from [`CODE`].
    pub(super) fn of(module: ModuleIdx) -> Self {
        Self {
            module,
            known: BTreeMap::new(),
        }
    }
}

impl Launcher<'_> {
    /// The launches of a collective whose members are all on this device.
    ///
    /// # Errors
    /// Those of the device.
    pub(super) fn here(
        &mut self,
        collective: &Collective,
        members: &[Member<'_>],
    ) -> Result<Vec<Work>> {
        let sources: Vec<Address> = members.iter().map(|member| member.src).collect();
        let targets: Vec<Address> = members.iter().map(|member| member.dst).collect();
        match collective {
            Collective::Moves(moves) => {
                let copies = moves.iter().map(|one| {
                    let src = self.element(members[one.source].src, one.from);
                    let dst = self.element(members[one.target].dst, one.to);
                    self.copy(&one.loops, src, dst)
                });
                copies.collect()
            }
            Collective::AllReduce { kind, n_elements } => {
                let rows = Rows::dense(*n_elements);
                Ok(vec![self.reduce(*kind, &sources, &targets, &rows)?])
            }
            Collective::ReduceScatter { kind, rows } => {
                let parts = targets.iter().zip(rows);
                let works = parts.map(|(target, rows)| {
                    self.reduce(*kind, &sources, std::slice::from_ref(target), rows)
                });
                works.collect()
            }
        }
    }

    /// The address of a buffer's element.
    pub(super) fn element(&self, buffer: Address, n: usize) -> Address {
        buffer + (self.dtype.n_bytes() * n) as u64
    }

    /// The function for so many elements.
    fn function(&mut self, name: &'static str, n_elements: usize) -> Result<FunctionIdx> {
        let n_blocks = n_elements.div_ceil(THREADS as usize).clamp(1, MAX_BLOCKS) as u32;
        let Functions { module, known } = &mut *self.functions;
        if let Some(function) = known.get(&(name, n_blocks)) {
            return Ok(*function);
        }
        let grid = Grid::linear(n_blocks, THREADS);
        let function = self.gpu.function(*module, name, grid)?;
        known.insert((name, n_blocks), function);
        Ok(function)
    }

    /// Rows of the sources, combined in their order into every target.
    pub(super) fn reduce(
        &mut self,
        kind: ReduceKind,
        sources: &[Address],
        targets: &[Address],
        rows: &Rows,
    ) -> Result<Work> {
        let kind = match kind {
            ReduceKind::Sum => 0,
            ReduceKind::Max => 1,
            ReduceKind::Lse => 2,
        };
        let int = |n: usize| Value::Int(n as i64);
        let name = match self.dtype {
            DType::F32 => "meshweave_reduce",
            DType::Bf16 => "meshweave_reduce_bf16",
            DType::F16 | DType::I32 => {
                return Err(Error::Unsupported(format!(
                    "a reduction of {} between ranks on GPUs; reduce f32 or bf16",
                    self.dtype
                )));
            }
        };
        Ok(Work::Launch {
            function: self.function(name, rows.n_elements())?,
            args: vec![
                self.tables.add(sources),
                int(sources.len()),
                self.tables.add(targets),
                int(targets.len()),
                int(rows.n),
                int(rows.width),
                int(rows.pitch),
                int(rows.start),
                int(rows.width),
                Value::Int(kind),
            ],
        })
    }

    /// A copy over up to three loops, the last one over elements that lie together.
    pub(super) fn copy(&mut self, loops: &[CopyLoop], src: Address, dst: Address) -> Result<Work> {
        let at = |from_last: usize| {
            let position = loops.len().checked_sub(from_last + 1);
            position.map_or(together(1), |position| loops[position])
        };
        let [inner, middle, outer] = [at(0), at(1), at(2)];
        if middle.size == 1 && outer.size == 1 {
            return Ok(Work::Copy {
                to: dst,
                from: src,
                n_bytes: inner.size * self.dtype.n_bytes(),
            });
        }
        let int = |n: usize| Value::Int(n as i64);
        let n_elements = outer.size * middle.size * inner.size;
        let name = match self.dtype.n_bytes() {
            2 => "meshweave_copy_half",
            _ => "meshweave_copy",
        };
        Ok(Work::Launch {
            function: self.function(name, n_elements)?,
            args: vec![
                Value::Address(dst),
                Value::Address(src),
                int(outer.size),
                int(middle.size),
                int(inner.size),
                int(outer.dst),
                int(middle.dst),
                int(outer.src),
                int(middle.src),
            ],
        })
    }
}

fn check_division(member: &Member<'_>, division: &Division, n_members: usize) -> Result<()> {
    let same_order = member.src_ty.dims().eq(member.dst_ty.dims());
    ensure(member, same_order && division.counts.len() == n_members)
}

fn ensure(member: &Member<'_>, fits: bool) -> Result<()> {
    if fits { Ok(()) } else { Err(misfit(member)) }
}

fn misfit(member: &Member<'_>) -> Error {
    Error::Invalid(format!(
        "damaged program: {} of rank {} from {} to {} does not fit its group; compile again",
        member.op.name(),
        member.rank,
        member.src_ty,
        member.dst_ty
    ))
}
