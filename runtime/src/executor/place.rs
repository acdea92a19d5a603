//! Where the parts of global tensors lie.
//!
//! In: a program's global tensors and the ranks of this process. Out: for each the way to its parts here,
//! and the whole, gathered from all ranks.
//! Invariant: equal regions hold equal elements; of several holders the first one in the program's order
//! speaks for them.

use std::collections::{BTreeMap, BTreeSet};

use meshweave_dsl::graph::Role;
use meshweave_dsl::layout::Interval;
use meshweave_dsl::program::{GlobalTensor, Program, TensorPart};

use super::{Rank, Session, lock};
use crate::checkpoint::{Piece, key, region_type};
use crate::collective::Communicator;
use crate::error::{Error, Result};
use crate::tensor::{HostTensor, Part};

/// A global tensor with the way to its parts in this process.
pub(super) struct Placed {
    pub(super) tensor: GlobalTensor,
    pub(super) parts: Vec<PlacedPart>,
}

pub(super) struct PlacedPart {
    pub(super) rank: usize,
    /// Its index among the tensor's parts on all ranks.
    pub(super) part_idx: usize,
    pub(super) part: Part,
    pub(super) words: Words,
}

/// Where a part's words are.
#[derive(Clone, Copy)]
pub(super) enum Words {
    /// In the arena of a rank of this process.
    Here(*mut u32),
    /// In the memory of the GPU that all ranks are on.
    OnGpu,
}

// SAFETY: the addresses lie in the ranks' arenas, which the session owns and which stay in place; they
// are followed only while no rank runs (`&mut self` or `&self` of the session, outside of `step`).
unsafe impl Send for Placed {}
// SAFETY: as above; through a shared reference the addresses are only read from.
unsafe impl Sync for Placed {}

impl Placed {
    /// The parts of a rank, by their index.
    pub(super) fn of_rank(&self, rank: usize) -> impl Iterator<Item = (&Placed, usize)> {
        let parts = self.parts.iter().enumerate();
        parts
            .filter(move |(_, part)| part.rank == rank)
            .map(move |(idx, _)| (self, idx))
    }

    /// The first part of this process that equals part `idx`.
    pub(super) fn first_holder(&self, idx: usize) -> usize {
        let own = &self.parts[idx].part;
        self.parts
            .iter()
            .position(|other| other.part == *own)
            .unwrap_or(idx)
    }
}

/// The parts that together hold a tensor once: of each region its first holder.
pub(crate) fn holders(tensor: &GlobalTensor) -> impl Iterator<Item = (usize, &TensorPart)> {
    let parts = tensor.parts.iter().enumerate();
    parts.filter(|(part_idx, part)| {
        let before = &tensor.parts[..*part_idx];
        before.iter().all(|other| other.region != part.region)
    })
}

/// Whether a source is kept from step to step: a parameter or a state.
pub(crate) fn is_kept(source: &GlobalTensor) -> bool {
    matches!(source.role, Role::Param(_) | Role::State { .. })
}

impl Session {
    /// The parts of parameters and states that the ranks here hold first, copied.
    pub(crate) fn pieces(&self) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        for placed in self.sources.iter().filter(|placed| is_kept(&placed.tensor)) {
            let tensor = &placed.tensor;
            let first: BTreeSet<usize> = holders(tensor).map(|(part_idx, _)| part_idx).collect();
            for here in placed
                .parts
                .iter()
                .filter(|here| first.contains(&here.part_idx))
            {
                let TensorPart { region, buffer, .. } = &tensor.parts[here.part_idx];
                let local = &self.program.ranks[here.rank].buffers[buffer.index()].ty;
                let ty = region_type(&tensor.ty, region);
                let all: Vec<Interval> = region
                    .iter()
                    .map(|interval| Interval {
                        start: 0,
                        len: interval.len,
                    })
                    .collect();
                let way = Part::new(&tensor.name, &ty, &all, local)?;
                let mut piece = HostTensor::zeros(ty)?;
                self.with_words(placed, here, |words| {
                    // SAFETY: the words are those of the part, dense in its buffer's order.
                    unsafe { way.put(words.as_ptr(), &mut piece) };
                })?;
                pieces.push(Piece {
                    rank: here.rank,
                    key: key(&tensor.name, here.part_idx),
                    tensor: piece,
                });
            }
        }
        Ok(pieces)
    }

    /// Checksums of this process' parts of the tensors that `chosen` picks among parameters and states
    /// (by their index), keyed by the tensor and the region's first holder: equal keys have equal
    /// checksums on all ranks, unless they have diverged.
    pub fn checksums(
        &self,
        chosen: impl Fn(usize, usize) -> bool,
    ) -> Result<BTreeMap<String, u64>> {
        let kept: Vec<&Placed> = self
            .sources
            .iter()
            .filter(|placed| is_kept(&placed.tensor))
            .collect();
        let mut sums = BTreeMap::new();
        for (_, placed) in kept
            .iter()
            .enumerate()
            .filter(|(idx, _)| chosen(*idx, kept.len()))
        {
            let parts = &placed.tensor.parts;
            for here in &placed.parts {
                let region = &parts[here.part_idx].region;
                let first = parts.iter().position(|part| part.region == *region);
                let sum = self.with_words(placed, here, |words| {
                    words.iter().fold(words.len() as u64, |sum, word| {
                        (sum ^ u64::from(*word)).wrapping_mul(0x0100_0000_01B3)
                    })
                })?;
                let name = key(&placed.tensor.name, first.unwrap_or(here.part_idx));
                sums.insert(name, sum);
            }
        }
        Ok(sums)
    }

    /// Calls `read` with the words of a part.
    fn with_words<T>(
        &self,
        placed: &Placed,
        here: &PlacedPart,
        read: impl FnOnce(&[u32]) -> T,
    ) -> Result<T> {
        let n_words = here.part.n_elements();
        match (here.words, &self.gpu) {
            // SAFETY: called through a reference to the session, outside of `step`: no rank runs; the
            // part fills its buffer.
            (Words::Here(address), _) => Ok(read(unsafe {
                std::slice::from_raw_parts(address, n_words)
            })),
            (Words::OnGpu, Some(gpu)) => {
                let mut words = vec![0; n_words];
                let buffer = placed.tensor.parts[here.part_idx].buffer;
                lock(gpu).read(&self.program, (here.rank, buffer), &mut words)?;
                Ok(read(&words))
            }
            (Words::OnGpu, None) => Err(Error::Internal("a part on no GPU".into())),
        }
    }

    /// Calls `write` with the address of a part's words, all of which it writes.
    pub(super) fn fill(
        &self,
        placed: &Placed,
        here: &PlacedPart,
        write: impl FnOnce(*mut u32),
    ) -> Result<()> {
        match (here.words, &self.gpu) {
            (Words::Here(address), _) => write(address),
            (Words::OnGpu, Some(gpu)) => {
                let mut words = vec![0; here.part.n_elements()];
                write(words.as_mut_ptr());
                let buffer = placed.tensor.parts[here.part_idx].buffer;
                lock(gpu).write(&self.program, (here.rank, buffer), &words)?;
            }
            (Words::OnGpu, None) => return Err(Error::Internal("a part on no GPU".into())),
        }
        Ok(())
    }

    /// The whole of a tensor; all processes of the session call this together.
    pub(super) fn gather(&self, placed: &Placed) -> Result<HostTensor> {
        let tensor = &placed.tensor;
        if !tensor.layout.partial.is_empty() {
            return Err(Error::Internal(format!(
                "`{}` is a partial value on the ranks and cannot be gathered",
                tensor.name
            )));
        }
        let mut whole = HostTensor::zeros(tensor.ty.clone())?;
        for here in &placed.parts {
            self.with_words(placed, here, |words| {
                // SAFETY: the words are those of the part, dense in its buffer's order.
                unsafe { here.part.put(words.as_ptr(), &mut whole) };
            })?;
        }
        let n_ranks = self.program.ranks.len();
        if let Some(own) = self
            .ranks()
            .first()
            .filter(|_| self.ranks().len() < n_ranks)
        {
            let collected = self.with_communicator(|communicator| {
                self.collect(*own, communicator, placed, &mut whole)
            });
            collected.transpose()?;
        }
        Ok(whole)
    }

    /// Brings the parts of the other processes into `whole`: over rank 0 to all.
    fn collect(
        &self,
        own: usize,
        communicator: &mut dyn Communicator,
        placed: &Placed,
        whole: &mut HostTensor,
    ) -> Result<()> {
        let tensor = &placed.tensor;
        for (part_idx, part) in holders(tensor) {
            if part.rank == 0 || (own != 0 && own != part.rank) {
                continue;
            }
            if own == 0 {
                let local = &self.program.ranks[part.rank].buffers[part.buffer.index()].ty;
                let way = Part::new(&tensor.name, &tensor.ty, &part.region, local)?;
                let mut words = vec![0; way.n_elements()];
                communicator.recv(part.rank, &mut words)?;
                // SAFETY: the words are those of the part, dense in its buffer's order.
                unsafe { way.put(words.as_ptr(), whole) };
            } else if let Some(here) = placed.parts.iter().find(|here| here.part_idx == part_idx) {
                self.with_words(placed, here, |words| communicator.send(0, words))??;
            }
        }
        let n_words = tensor.ty.n_elements();
        let all = communicator.join(&(0..communicator.n_ranks()).collect::<Vec<_>>())?;
        // SAFETY: the tensor holds as many elements of 32 bits and is borrowed for writing.
        let words = unsafe { std::slice::from_raw_parts_mut(whole.words_mut(), n_words) };
        let own_words = if own == 0 { words.to_vec() } else { Vec::new() };
        communicator.broadcast(all, &own_words, words)
    }
}

/// The ways to all tensors' parts on these ranks.
pub(super) fn place(
    program: &Program,
    tensors: &[GlobalTensor],
    ranks: &mut [Rank],
    on_gpu: &[usize],
) -> Result<Vec<Placed>> {
    tensors
        .iter()
        .map(|tensor| {
            if tensor.parts.is_empty() {
                return Err(damaged(&tensor.name, "nowhere".into()));
            }
            let mut parts = Vec::new();
            for (part_idx, part) in tensor.parts.iter().enumerate() {
                parts.extend(place_part(
                    program,
                    ranks,
                    on_gpu,
                    tensor,
                    (part_idx, part),
                )?);
            }
            Ok(Placed {
                tensor: tensor.clone(),
                parts,
            })
        })
        .collect()
}

/// The way to a part; `None` when its rank is elsewhere.
fn place_part(
    program: &Program,
    ranks: &mut [Rank],
    on_gpu: &[usize],
    tensor: &GlobalTensor,
    (part_idx, part): (usize, &TensorPart),
) -> Result<Option<PlacedPart>> {
    let (name, rank, id) = (&tensor.name, part.rank, part.buffer.index());
    let n_ranks = program.ranks.len();
    let buffers = program.ranks.get(rank).map(|rank| &rank.buffers);
    let buffers = buffers.ok_or_else(|| damaged(name, format!("on rank {rank} of {n_ranks}")))?;
    let buffer = buffers.get(id).ok_or_else(|| {
        let place = format!("in buffer {id} on rank {rank}, which does not exist");
        damaged(name, place)
    })?;
    let part = Part::new(name, &tensor.ty, &part.region, &buffer.ty)?;
    let words = match ranks.iter_mut().find(|here| here.rank == rank) {
        Some(here) => Words::Here(here.arena.address(buffer)?.cast()),
        None if on_gpu.contains(&rank) => Words::OnGpu,
        None => return Ok(None),
    };
    Ok(Some(PlacedPart {
        rank,
        part_idx,
        part,
        words,
    }))
}

fn damaged(name: &str, place: String) -> Error {
    Error::Invalid(format!(
        "damaged program: `{name}` lies {place}; compile again"
    ))
}
