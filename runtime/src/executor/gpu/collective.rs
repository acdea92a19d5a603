//! Collectives between ranks that share a device: kernels that read the members' buffers in place.
//!
//! In: a group of members that have all come to the same collective, with the addresses of their
//! buffers. Out: launches of the two kernels of `collective.cu`, which may run in any order.
//! Invariant: reductions add in the order of the group's ranks, as on every other backend, and all
//! members receive the same bits.

use meshweave_dsl::device_code::Grid;
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

/// Blocks and threads of both kernels, which walk their elements in a loop.
const GRID: (u32, u32) = (1024, 256);

/// The functions of [`CODE`].
#[derive(Clone, Copy)]
pub(super) struct Functions {
    copy: FunctionIdx,
    reduce: FunctionIdx,
}

/// One member's part in a collective.
pub(super) struct Member<'a> {
    pub(super) rank: usize,
    pub(super) op: &'a OpKind,
    pub(super) src: Address,
    pub(super) dst: Address,
    pub(super) src_ty: &'a TensorType,
    pub(super) dst_ty: &'a TensorType,
}

/// Rows of elements that lie together, at a pitch in each member's buffer.
struct Rows {
    n: usize,
    width: usize,
    source_pitch: usize,
    source_offset: usize,
    target_pitch: usize,
}

impl Functions {
    /// Finds the kernels in their loaded module.
    ///
    /// # Errors
    /// Those of the device.
    pub(super) fn of(gpu: &mut dyn Gpu, module: ModuleIdx) -> Result<Self> {
        let grid = Grid::linear(GRID.0, GRID.1);
        Ok(Self {
            copy: gpu.function(module, "meshweave_copy", grid)?,
            reduce: gpu.function(module, "meshweave_reduce", grid)?,
        })
    }

    /// The launches of a collective; `members` stand in the order of the group.
    ///
    /// # Errors
    /// `Invalid` when the members' ops and buffers do not fit each other, `Unsupported` when the op is
    /// not written for GPUs.
    pub(super) fn launches(self, members: &[Member<'_>], tables: &mut Tables) -> Result<Vec<Work>> {
        let Some(first) = members.first() else {
            return Ok(Vec::new());
        };
        match first.op {
            OpKind::AllReduce { kind, .. } => {
                let n_elements = first.src_ty.n_elements();
                for member in members {
                    let sizes = [member.src_ty, member.dst_ty].map(TensorType::n_elements);
                    ensure(member, sizes == [n_elements; 2])?;
                }
                let rows = Rows {
                    n: 1,
                    width: n_elements,
                    source_pitch: n_elements,
                    source_offset: 0,
                    target_pitch: n_elements,
                };
                Ok(vec![self.reduce(members, members, *kind, &rows, tables)])
            }
            OpKind::ReduceScatter { .. } => self.reduce_scatter(members, tables),
            OpKind::AllGather { .. } => self.all_gather(members),
            OpKind::AllToAll { .. } => self.all_to_all(members),
            OpKind::CollectivePermute { .. } => {
                let copies = members.iter().map(|member| {
                    let OpKind::CollectivePermute { from, .. } = member.op else {
                        return Err(misfit(member));
                    };
                    let source = members.iter().find(|other| other.rank == *from);
                    let source = source.ok_or_else(|| misfit(member))?;
                    same_size(source, member)
                });
                copies.collect()
            }
            OpKind::Broadcast { .. } => {
                let copies = members.iter().map(|member| same_size(first, member));
                copies.collect()
            }
            other => Err(Error::Unsupported(format!(
                "{} between ranks on GPUs; run with `--backend threads`",
                other.name()
            ))),
        }
    }

    fn reduce(
        self,
        sources: &[Member<'_>],
        targets: &[Member<'_>],
        kind: ReduceKind,
        rows: &Rows,
        tables: &mut Tables,
    ) -> Work {
        let sources: Vec<Address> = sources.iter().map(|member| member.src).collect();
        let targets: Vec<Address> = targets.iter().map(|member| member.dst).collect();
        let kind = match kind {
            ReduceKind::Sum => 0,
            ReduceKind::Max => 1,
            ReduceKind::Lse => 2,
        };
        let int = |n: usize| Value::Int(n as i64);
        Work::Launch {
            function: self.reduce,
            args: vec![
                tables.add(&sources),
                int(sources.len()),
                tables.add(&targets),
                int(targets.len()),
                int(rows.n),
                int(rows.width),
                int(rows.source_pitch),
                int(rows.source_offset),
                int(rows.target_pitch),
                Value::Int(kind),
            ],
        }
    }

    fn reduce_scatter(self, members: &[Member<'_>], tables: &mut Tables) -> Result<Vec<Work>> {
        let works = members.iter().enumerate().map(|(idx, member)| {
            let OpKind::ReduceScatter {
                kind, dim, counts, ..
            } = member.op
            else {
                return Err(misfit(member));
            };
            let division = divide(member.src_ty, dim, counts).ok_or_else(|| misfit(member))?;
            check_division(member, &division, members.len())?;
            ensure(
                member,
                division.n_part_elements(idx) == member.dst_ty.n_elements(),
            )?;
            for other in members {
                ensure(other, other.src_ty.n_elements() == division.n_elements())?;
            }
            let width = division.counts[idx] * division.inner;
            let rows = Rows {
                n: division.outer,
                width,
                source_pitch: division.total() * division.inner,
                source_offset: division.start(idx) * division.inner,
                target_pitch: width,
            };
            let target = std::slice::from_ref(member);
            Ok(self.reduce(members, target, *kind, &rows, tables))
        });
        works.collect()
    }

    fn all_gather(self, members: &[Member<'_>]) -> Result<Vec<Work>> {
        let mut works = Vec::new();
        for member in members {
            let OpKind::AllGather { dim, counts, .. } = member.op else {
                return Err(misfit(member));
            };
            let division = divide(member.dst_ty, dim, counts).ok_or_else(|| misfit(member))?;
            check_division(member, &division, members.len())?;
            for (idx, source) in members.iter().enumerate() {
                let n_part = division.n_part_elements(idx);
                ensure(source, source.src_ty.n_elements() == n_part)?;
                let width = division.counts[idx] * division.inner;
                let loops = [
                    CopyLoop {
                        size: division.outer,
                        src: width,
                        dst: division.total() * division.inner,
                    },
                    CopyLoop {
                        size: width,
                        src: 1,
                        dst: 1,
                    },
                ];
                let to = division.start(idx) * division.inner;
                works.push(self.copy(&loops, source.src, words(member.dst, to)));
            }
        }
        Ok(works)
    }

    fn all_to_all(self, members: &[Member<'_>]) -> Result<Vec<Work>> {
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
            let n = members.len();
            ensure(
                member,
                crossing.split_counts.len() == n && crossing.concat_counts.len() == n,
            )?;
            Ok(crossing)
        });
        let crossings = crossings.collect::<Result<Vec<Crossing>>>()?;
        let mut works = Vec::new();
        for (idx, (member, crossing)) in members.iter().zip(&crossings).enumerate() {
            for (peer_idx, (peer, sent)) in members.iter().zip(&crossings).enumerate() {
                let route = Route {
                    crossing,
                    peer_split: &sent.split_counts,
                    n_concat: crossing.concat_counts.iter().sum(),
                    own_split: crossing.split_counts[idx],
                    count: crossing.concat_counts[peer_idx],
                    skipped: sent.split_counts[..idx].iter().sum(),
                    place: crossing.concat_counts[..peer_idx].iter().sum(),
                };
                let (loops, from, to, n_src) = match crossing.order {
                    CrossingOrder::SameDim => route.same_dim(),
                    CrossingOrder::SplitFirst => route.split_first(),
                    CrossingOrder::ConcatFirst => route.concat_first(),
                };
                let fits = match crossing.order {
                    CrossingOrder::SameDim => sent.split_counts[idx] == route.count,
                    _ => sent.split_counts[idx] == route.own_split,
                };
                ensure(peer, fits && peer.src_ty.n_elements() == n_src)?;
                let (src, dst) = (words(peer.src, from), words(member.dst, to));
                works.push(self.copy(&loops, src, dst));
            }
        }
        Ok(works)
    }

    /// A copy over up to three loops, the last one over elements that lie together.
    fn copy(self, loops: &[CopyLoop], src: Address, dst: Address) -> Work {
        let once = CopyLoop {
            size: 1,
            src: 0,
            dst: 0,
        };
        let at = |from_last: usize| {
            let position = loops.len().checked_sub(from_last + 1);
            position.map_or(once, |position| loops[position])
        };
        let [inner, middle, outer] = [at(0), at(1), at(2)];
        if middle.size == 1 && outer.size == 1 {
            return Work::Copy {
                to: dst,
                from: src,
                n_bytes: inner.size * 4,
            };
        }
        let int = |n: usize| Value::Int(n as i64);
        Work::Launch {
            function: self.copy,
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
        }
    }
}

/// The address of a buffer's word.
fn words(buffer: Address, n: usize) -> Address {
    buffer + 4 * n as u64
}

fn same_size(source: &Member<'_>, target: &Member<'_>) -> Result<Work> {
    let n_bytes = target.dst_ty.n_bytes();
    ensure(target, source.src_ty.n_bytes() == n_bytes)?;
    Ok(Work::Copy {
        to: target.dst,
        from: source.src,
        n_bytes,
    })
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
