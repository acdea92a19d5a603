//! Collectives: what the ranks of a group do together.
//!
//! In: on every member the same call in the same order, with its own buffers. Out: the members'
//! results. Invariant: all members of a group receive the same bits where they receive the same
//! tensor, whatever the timing: reductions add in the order of the group's ranks.
//!
//! Tensors are of 32-bit elements. A dim that is divided or joined need not be the outermost one:
//! a [`Division`] says how many elements lie around it.

pub mod mpi;
pub mod threads;

use std::sync::Arc;
use std::time::Duration;

use meshweave_dsl::layout::ReduceKind;
use meshweave_dsl::name::Axis;
use meshweave_dsl::program::{Action, Program};

use crate::error::{Error, Result};

/// A group that a communicator has joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct GroupIdx(pub(crate) usize);

/// A tensor `[outer, Σ counts, inner]` divided along its middle dim, part `i` being `counts[i]` long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Division {
    /// Elements before the divided dim.
    pub outer: usize,
    /// Length of each member's part.
    pub counts: Vec<usize>,
    /// Elements after the divided dim.
    pub inner: usize,
}

impl Division {
    /// Length of the whole dim.
    pub fn total(&self) -> usize {
        self.counts.iter().sum()
    }

    /// Elements of the whole tensor.
    pub fn n_elements(&self) -> usize {
        self.outer * self.total() * self.inner
    }

    /// Elements of one part.
    pub fn n_part_elements(&self, part_idx: usize) -> usize {
        self.outer * self.counts[part_idx] * self.inner
    }

    /// Where a part begins along the divided dim.
    pub fn start(&self, part_idx: usize) -> usize {
        self.counts[..part_idx].iter().sum()
    }
}

/// How an all-to-all divides what is sent and joins what is received.
///
/// The tensors are `[outer, first, mid, second, inner]`; `split` and `concat` stand at `first` and
/// `second`, in the order said by `split_first`, or are one dim (`mid` and the other being 1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crossing {
    /// Elements before both dims.
    pub outer: usize,
    /// Elements between them.
    pub mid: usize,
    /// Elements after both.
    pub inner: usize,
    /// What this member sends: part `j` of `split` goes to member `j`.
    pub split_counts: Vec<usize>,
    /// What this member receives: `concat_counts[j]` elements of `concat` come from member `j`.
    pub concat_counts: Vec<usize>,
    /// Which of the dims is the outer one, or that they are the same.
    pub order: CrossingOrder,
}

/// The relative order of an all-to-all's dims.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CrossingOrder {
    /// `split` is outside of `concat`.
    SplitFirst,
    /// `concat` is outside of `split`.
    ConcatFirst,
    /// Both are one dim.
    SameDim,
}

/// What collectives cost a rank so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CollectiveStats {
    /// Collectives executed.
    pub n_calls: u64,
    /// Bytes received from other ranks.
    pub received_bytes: u64,
    /// Seconds spent waiting for other ranks.
    pub wait_s: f64,
}

/// Where a rank's calls come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Place {
    /// Steps done before this one.
    pub n_steps: usize,
    /// Index of the rank's instruction; `None` between steps.
    pub instruction: Option<usize>,
}

/// Bytes to or from another rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parcel {
    pub rank: usize,
    /// In this process' memory, or in its device's where [`Communicator::reaches_devices`].
    pub address: u64,
    pub n_bytes: usize,
}

/// Parcels that were sent off together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shipment(pub(crate) usize);

/// One rank's access to the others.
///
/// Every member of a group calls the same collectives of the group in the same order. A group of one
/// member is legal everywhere and copies. All errors of one rank reach the others: a rank that fails
/// calls [`Communicator::abort`], after which every pending and later call returns `Exhausted` or the
/// failure's own variant, naming the rank.
pub trait Communicator: Send {
    /// This rank.
    fn rank(&self) -> usize;

    /// Number of ranks of the world.
    fn n_ranks(&self) -> usize;

    /// The program whose instructions the calls will belong to: it gives its channels their depths, and
    /// messages the names of instructions.
    ///
    /// # Errors
    /// `Invalid` when a channel takes no message or names ranks that do not exist.
    fn follow(&mut self, program: &Arc<Program>) -> Result<()>;

    /// The calls from here on belong to this place.
    fn enter(&mut self, place: Place);

    /// Joins the group of these ranks, in the order of their shards; the same list gives the same
    /// group. May wait for the others.
    ///
    /// # Errors
    /// `Invalid` when the list is empty, repeats a rank, names one that does not exist, or lacks this one;
    /// `Exhausted` when members do not come in time.
    fn join(&mut self, ranks: &[usize]) -> Result<GroupIdx>;

    /// Number of members of a group.
    ///
    /// # Errors
    /// `Internal` when the group was not joined here.
    fn group_size(&self, group: GroupIdx) -> Result<usize>;

    /// Every member receives all parts: `src` is this member's part of `division`, `dst` the whole.
    ///
    /// # Errors
    /// `Invalid` on sizes that do not fit; `Exhausted` when members do not arrive in time.
    fn all_gather(
        &mut self,
        group: GroupIdx,
        src: &[u32],
        dst: &mut [u32],
        division: &Division,
    ) -> Result<()>;

    /// `dst` becomes the reduction of all members' `src` (of their `dst`, when `src` is `None`).
    ///
    /// # Errors
    /// As for [`Communicator::all_gather`].
    fn all_reduce(
        &mut self,
        group: GroupIdx,
        kind: ReduceKind,
        src: Option<&[f32]>,
        dst: &mut [f32],
    ) -> Result<()>;

    /// `dst` becomes this member's part of the reduction of all members' whole `src`.
    ///
    /// # Errors
    /// As for [`Communicator::all_gather`].
    fn reduce_scatter(
        &mut self,
        group: GroupIdx,
        kind: ReduceKind,
        src: &[f32],
        dst: &mut [f32],
        division: &Division,
    ) -> Result<()>;

    /// Member `j` receives part `j` of this member's `src`; see [`Crossing`].
    ///
    /// # Errors
    /// As for [`Communicator::all_gather`].
    fn all_to_all(
        &mut self,
        group: GroupIdx,
        src: &[u32],
        dst: &mut [u32],
        crossing: &Crossing,
    ) -> Result<()>;

    /// `dst` becomes the `src` of the rank `from`; this rank's `src` goes to the rank that names it.
    ///
    /// # Errors
    /// As for [`Communicator::all_gather`].
    fn collective_permute(
        &mut self,
        group: GroupIdx,
        from: usize,
        src: &[u32],
        dst: &mut [u32],
    ) -> Result<()>;

    /// `dst` becomes the first member's `src`.
    ///
    /// # Errors
    /// As for [`Communicator::all_gather`].
    fn broadcast(&mut self, group: GroupIdx, src: &[u32], dst: &mut [u32]) -> Result<()>;

    /// Returns when every member has called it.
    ///
    /// # Errors
    /// `Exhausted` when members do not arrive in time.
    fn barrier(&mut self, group: GroupIdx) -> Result<()>;

    /// Waits for something that all ranks do together outside of their communicators, as GPUs do that
    /// exchange by a library of their own, and listens to the others meanwhile. `step` counts such waits;
    /// `usual` is how long this one takes when nothing is wrong, which the time-out is added to.
    ///
    /// # Errors
    /// Those of `is_done`, and another rank's failure; `Exhausted` when it is not done in time: it names
    /// the ranks that have not come so far.
    fn attend(
        &mut self,
        what: &str,
        step: u64,
        usual: Duration,
        is_done: &mut dyn FnMut(&mut dyn Communicator) -> Result<bool>,
    ) -> Result<()>;

    /// Starts to send and to receive bytes, all at once; does not wait. What one rank sends another under
    /// a tag, that one receives, in order.
    ///
    /// # Safety
    /// The memory is there, what is sent stays as it is, and what is received is not looked at, until
    /// [`Communicator::has_arrived`] says that all of it has arrived; for ever when that fails.
    ///
    /// # Errors
    /// Those of the network.
    unsafe fn ship(&mut self, tag: u32, sends: &[Parcel], recvs: &[Parcel]) -> Result<Shipment>;

    /// Whether all parcels of a shipment have been sent and received; does not wait.
    ///
    /// # Errors
    /// Those of the network; `Invalid` when a parcel is of another size than was sent.
    fn has_arrived(&mut self, shipment: Shipment) -> Result<bool>;

    /// Whether parcels may lie in the memory of a device of NVIDIA's.
    fn reaches_devices(&self) -> bool;

    /// Sends a copy of `src` to another rank; messages between two ranks arrive in order. Waits only
    /// while the channel to that rank is full.
    ///
    /// # Errors
    /// `Invalid` when the rank does not exist; `Exhausted` when the channel stays full.
    fn send(&mut self, to: usize, src: &[u32]) -> Result<()>;

    /// Receives the next message of another rank.
    ///
    /// # Errors
    /// `Invalid` when the rank does not exist or the message has another length; `Exhausted` when
    /// nothing arrives in time.
    fn recv(&mut self, from: usize, dst: &mut [u32]) -> Result<()>;

    /// Tells every other rank that this one has failed.
    fn abort(&self, error: &Error);

    /// After a failure: hears the others out for up to `patience`, then says which rank's failure is the
    /// one to report; `None` when there is none.
    fn settle(&self, patience: Duration) -> Option<(usize, Error)>;

    /// Ends the use of the communicator, when all ranks have come so far.
    ///
    /// # Errors
    /// `Exhausted` when the others do not come.
    fn finish(&mut self) -> Result<()>;

    /// What the calls so far have cost this rank.
    fn stats(&self) -> CollectiveStats;
}

/// Every rank's text, in the order of ranks; all ranks call this together.
///
/// # Errors
/// As for [`Communicator::all_gather`].
pub fn exchange_texts(communicator: &mut dyn Communicator, text: &str) -> Result<Vec<String>> {
    let n_ranks = communicator.n_ranks();
    let group = communicator.join(&(0..n_ranks).collect::<Vec<_>>())?;
    let bytes = text.as_bytes();
    let mut lens = vec![0; n_ranks];
    let division = |counts: Vec<usize>| Division {
        outer: 1,
        counts,
        inner: 1,
    };
    let ones = division(vec![1; n_ranks]);
    communicator.all_gather(group, &[bytes.len() as u32], &mut lens, &ones)?;
    let n_words = |len: &u32| (*len as usize).div_ceil(4);
    let counts: Vec<usize> = lens.iter().map(n_words).collect();
    let packed: Vec<u32> = bytes
        .chunks(4)
        .map(|chunk| {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            u32::from_le_bytes(word)
        })
        .collect();
    let division = division(counts);
    let mut all = vec![0; division.n_elements()];
    communicator.all_gather(group, &packed, &mut all, &division)?;
    let texts = lens.iter().enumerate().map(|(rank, len)| {
        let words = &all[division.start(rank)..][..division.counts[rank]];
        let bytes = words.iter().flat_map(|word| word.to_le_bytes());
        let bytes: Vec<u8> = bytes.take(*len as usize).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    });
    Ok(texts.collect())
}

/// A call in words: with the name of the instruction that makes it, the axes of the plan's mesh that
/// its group lies along, and the action of the schedule that it belongs to, as far as they are known.
pub(crate) fn describe(call: &str, program: Option<&Program>, rank: usize, place: Place) -> String {
    let step = place.n_steps + 1;
    let Some((program, instruction_idx)) = program.zip(place.instruction) else {
        return format!("{call} between steps, before step {step}");
    };
    let rank_program = program.ranks.get(rank);
    let instruction = rank_program.and_then(|rank| rank.instructions.get(instruction_idx));
    let Some((rank_program, instruction)) = rank_program.zip(instruction) else {
        return call.to_string();
    };
    let mut text = format!(
        "{call} `{}` (instruction {instruction_idx} of step {step}",
        instruction.name
    );
    let mut spans = rank_program.spans.iter().rev();
    if let Some(span) = spans.find(|span| span.first <= instruction_idx) {
        text += &format!(", action {}", span.label);
    }
    let ranks = match &instruction.action {
        Action::Send { to: peer, .. } | Action::Recv { from: peer, .. } => Some(vec![rank, *peer]),
        action => action.group().map(|group| group.ranks.clone()),
    };
    let axes = axes_of(program, &ranks.unwrap_or_default());
    if !axes.is_empty() {
        let names: Vec<String> = axes
            .iter()
            .map(|(axis, degree)| format!("{axis}:{degree}"))
            .collect();
        text += &format!(", over {} of the plan's mesh", names.join(" and "));
        let mut statements: Vec<&str> = Vec::new();
        for said in axes
            .iter()
            .filter_map(|(axis, _)| program.statements.get(axis))
        {
            for statement in said {
                if !statements.contains(&statement.as_str()) {
                    statements.push(statement);
                }
            }
        }
        if !statements.is_empty() {
            text += &format!(": {}", statements.join(", "));
        }
    }
    text + ")"
}

/// The axes of the plan's mesh that a group lies along, with their degrees.
fn axes_of<'a>(program: &'a Program, ranks: &[usize]) -> Vec<(&'a Axis, usize)> {
    let axes = program.mesh.axes().iter();
    let lies_along = |axis: &Axis| {
        let along = |rank: &usize| program.mesh.coordinate(*rank, axis);
        let first = ranks.first().map(along);
        ranks.iter().any(|other| Some(along(other)) != first)
    };
    axes.filter(|(axis, _)| lies_along(axis))
        .map(|(axis, degree)| (axis, *degree))
        .collect()
}

/// The reduction of two elements that is folded over a group.
pub(crate) fn combine(kind: ReduceKind, x: f32, y: f32) -> f32 {
    match kind {
        ReduceKind::Sum => x + y,
        ReduceKind::Max => x.max(y),
        ReduceKind::Lse => {
            let top = x.max(y);
            // Two empty sums stay empty; without this, ∞ − ∞ would follow.
            if top == f32::NEG_INFINITY {
                top
            } else {
                top + ((x - top).exp() + (y - top).exp()).ln()
            }
        }
    }
}
