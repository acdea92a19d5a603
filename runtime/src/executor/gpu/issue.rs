//! From the ranks of a device to work on its streams.
//!
//! In: the programs of the ranks, of which all are here or one is, the code's functions, and where each
//! rank's memory lies. Out: items of work, in an order in which every rank's instructions follow one
//! another.
//! Invariant: where all ranks are here, a collective stands once, after all its members have come to it;
//! a message is copied into its channel before it is copied out, and a channel never holds more than its
//! depth. Where one is, collectives follow one another on one stream, and the messages of a channel on
//! another of their own. What a rank offloads has a stream out and one back, so that copies overlap both
//! its work and each other.

use std::collections::BTreeMap;

use meshweave_dsl::device_code::{Argument, DeviceCode, Launch};
use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::TensorType;
use meshweave_dsl::program::{Action, Buffer, BufferId, Program};

use super::collective::{Collective, Functions, Launcher, Member};
use super::order::{Item, Range};
use super::product::{Added, place, products};
use super::remote::{Own, Staging};
use super::{Choice, Tables};
use crate::device::gpu::{
    Address, FunctionIdx, Gpu, ModuleIdx, Part, StreamIdx, TeamIdx, Value, Work,
};
use crate::error::{Error, Result};

/// Of the addresses of a row kernel's arguments, in bytes: its widest access.
const KERNEL_ALIGNMENT: u64 = 16;

/// Where a rank's memory lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) arena: Address,
    pub(super) arena_bytes: usize,
}

/// What work on a device is made from.
pub(super) struct Site<'a> {
    pub(super) program: &'a Program,
    pub(super) code: &'a DeviceCode,
    pub(super) gpu: &'a mut dyn Gpu,
    /// One a module of the code.
    pub(super) modules: Vec<ModuleIdx>,
    pub(super) collectives: Functions,
    /// One a rank; none for those that are elsewhere.
    pub(super) places: Vec<Option<Place>>,
    /// One a channel of the program: where its messages are kept.
    pub(super) channels: Vec<Address>,
    /// The one rank that is here, where the others are on other devices.
    pub(super) apart: Option<Apart>,
    pub(super) tables: Tables,
    /// How each contraction is done, by rank and instruction.
    pub(super) choices: BTreeMap<(usize, usize), Choice>,
    /// Functions by module, name and shape of the launch.
    pub(super) functions: BTreeMap<(usize, String, [u32; 7]), FunctionIdx>,
}

/// A rank whose peers are on other devices.
pub(super) struct Apart {
    pub(super) rank: usize,
    pub(super) teams: BTreeMap<TeamKey, TeamIdx>,
    /// The ranks of each team, where the host exchanges for them.
    pub(super) by_host: Option<Vec<Vec<usize>>>,
    pub(super) staging: Staging,
}

/// Who talks to whom: the ranks of a group, or the two ends of a channel, which do not wait for what
/// the group of the same two ranks does.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum TeamKey {
    Group(Vec<usize>),
    Channel(usize),
}

/// A channel while the ranks' instructions are put in order.
#[derive(Clone, Copy, Default)]
struct Queue {
    n_sent: usize,
    n_received: usize,
}

/// What comes of the instruction that a rank is at.
enum Outcome {
    Items(Vec<Item>),
    /// A collective, and all ranks that have done it.
    Met(Item, Vec<usize>),
    /// It waits for other ranks.
    Waits,
}

impl<'a> Site<'a> {
    /// All items of a step.
    ///
    /// # Errors
    /// `Invalid` when the program is damaged or its ranks wait for one another for ever; `Unsupported`
    /// when it needs what is not written for GPUs.
    pub(super) fn items(&mut self) -> Result<Vec<Item>> {
        let program = self.program;
        let mut items = Vec::new();
        let mut next = vec![0; program.ranks.len()];
        let mut queues = vec![Queue::default(); program.channels.len()];
        let ranks: Vec<usize> = match &self.apart {
            Some(apart) => vec![apart.rank],
            None => (0..program.ranks.len()).collect(),
        };
        loop {
            let mut progress = false;
            for rank in &ranks {
                while next[*rank] < program.ranks[*rank].instructions.len() {
                    match self.instruction((*rank, next[*rank]), &next, &mut queues)? {
                        Outcome::Items(made) => {
                            items.extend(made);
                            next[*rank] += 1;
                        }
                        Outcome::Met(item, members) => {
                            items.push(item);
                            members.iter().for_each(|member| next[*member] += 1);
                        }
                        Outcome::Waits => break,
                    }
                    progress = true;
                }
            }
            let waiting = ranks
                .iter()
                .find(|rank| next[**rank] < program.ranks[**rank].instructions.len());
            match waiting {
                None => return Ok(items),
                Some(rank) if !progress => {
                    let instruction = &program.ranks[*rank].instructions[next[*rank]];
                    return Err(Error::Invalid(format!(
                        "damaged program: rank {rank} waits at instruction {} `{}` for ranks that never \
                         come; compile again",
                        next[*rank], instruction.name
                    )));
                }
                Some(_) => {}
            }
        }
    }

    fn instruction(
        &mut self,
        at: (usize, usize),
        next: &[usize],
        queues: &mut [Queue],
    ) -> Result<Outcome> {
        let program = self.program;
        let apart = self.apart.is_some();
        match &program.ranks[at.0].instructions[at.1].action {
            Action::Collective { .. } if apart => Ok(Outcome::Items(vec![self.take_part(at)?])),
            Action::Collective { .. } => self.meet(at, next),
            // A rank's channel to itself stays here.
            Action::Send { to, src } if apart && *to != at.0 => {
                Ok(Outcome::Items(self.send_apart(at, *to, *src)?))
            }
            Action::Send { to, src } => self.send(at, *to, *src, queues),
            Action::Recv { from, dst } if apart && *from != at.0 => {
                Ok(Outcome::Items(vec![self.recv_apart(at, *from, *dst)?]))
            }
            Action::Recv { from, dst } => self.recv(at, *from, *dst, queues),
            action => Ok(Outcome::Items(vec![self.own(at, action)?])),
        }
    }

    /// A rank's streams: its own work, and what it exchanges with others.
    fn streams(&self, rank: usize) -> (StreamIdx, StreamIdx) {
        let first = if self.apart.is_some() { 0 } else { 2 * rank };
        (StreamIdx(first), StreamIdx(first + 1))
    }

    /// Streams in use: two a rank here, one a channel to or from other devices, and two a channel of a
    /// rank to itself.
    pub(super) fn n_streams(&self) -> usize {
        self.first_offloading() + 2 * self.n_offloading(self.program.channels.len())
    }

    /// The first stream of what is offloaded.
    fn first_offloading(&self) -> usize {
        match &self.apart {
            Some(_) => 2 + self.program.channels.len(),
            None => 2 * self.program.ranks.len(),
        }
    }

    /// Channels of ranks to themselves among the first ones.
    fn n_offloading(&self, n_channels: usize) -> usize {
        let channels = self.program.channels[..n_channels].iter();
        channels
            .filter(|channel| channel.from == channel.to)
            .count()
    }

    /// The stream of a copy into a channel, or out of it.
    fn message_stream(&self, rank: usize, channel_idx: usize, is_out: bool) -> StreamIdx {
        let channel = &self.program.channels[channel_idx];
        if channel.from != channel.to {
            return self.streams(rank).1;
        }
        let pair = self.first_offloading() + 2 * self.n_offloading(channel_idx);
        StreamIdx(pair + usize::from(is_out))
    }

    /// Work that concerns one rank alone.
    fn own(&mut self, at: (usize, usize), action: &Action) -> Result<Item> {
        let (rank, _) = at;
        let (reads, writes, work) = match action {
            Action::Kernel { kernel, args } => {
                let code = self.code;
                let generated = code
                    .kernels
                    .get(kernel.index())
                    .filter(|generated| generated.writes.len() == args.len());
                let generated = generated.ok_or_else(|| {
                    damaged(format!(
                        "the code has no kernel {} of {} arguments",
                        kernel.index(),
                        args.len()
                    ))
                })?;
                for arg in args {
                    if !self.address(rank, *arg)?.is_multiple_of(KERNEL_ALIGNMENT) {
                        return Err(damaged(format!(
                            "buffer {} of a kernel begins at no multiple of {KERNEL_ALIGNMENT} bytes",
                            arg.index()
                        )));
                    }
                }
                let launches = generated.entries.iter().map(|entry| {
                    let launch = Launch {
                        entry: entry.clone(),
                        args: args.iter().copied().map(Argument::Buffer).collect(),
                    };
                    self.launch(rank, &launch)
                });
                let launches = launches.collect::<Result<Vec<_>>>()?;
                let written = args.iter().zip(&generated.writes);
                // A kernel may read what it writes.
                let writes = written
                    .filter(|(_, is_written)| **is_written)
                    .map(|(arg, _)| *arg);
                (args.clone(), writes.collect(), launches)
            }
            Action::Contract {
                a,
                b,
                c,
                indices,
                accumulate,
                bias,
            } => {
                let mut reads = vec![*a, *b];
                reads.extend(accumulate.then_some(*c));
                reads.extend(bias.as_ref().map(|bias| bias.buffer));
                let at_bias = match bias {
                    Some(bias) => {
                        let (ty, c) = (self.ty(rank, bias.buffer)?, self.ty(rank, *c)?);
                        let span = bias.span(indices);
                        if span.is_none_or(|span| span > ty.n_elements()) || ty.dtype != c.dtype {
                            return Err(damaged(format!("a bias {ty} in a contraction to {c}")));
                        }
                        Some(self.address(rank, bias.buffer)?)
                    }
                    None => None,
                };
                let added = Added {
                    onto: *accumulate,
                    bias: bias.as_ref().zip(at_bias),
                };
                let operand =
                    |id| Ok::<_, Error>((self.address(rank, id)?, self.ty(rank, id)?.dtype));
                let operands = [operand(*a)?, operand(*b)?, operand(*c)?];
                let calls = match products(indices, added, operands)? {
                    Some(calls) => self
                        .gpu
                        .product(&calls.product)?
                        .map(|product| (product, calls.offsets)),
                    None => None,
                };
                let work = match calls {
                    Some((product, offsets)) => {
                        self.choices.insert(at, Choice::Library);
                        let call = |offsets: [usize; 3]| {
                            let [a, b, c] = [0, 1, 2].map(|i| place(operands[i], offsets[i]));
                            Work::Product {
                                product,
                                a,
                                b,
                                c,
                                bias: at_bias,
                            }
                        };
                        offsets.into_iter().map(call).collect()
                    }
                    None => {
                        self.choices.insert(at, Choice::Generated);
                        self.launches(at)?
                    }
                };
                (reads, vec![*c], work)
            }
            Action::Attention {
                q,
                k,
                v,
                o,
                lse,
                scratch,
                ..
            } => (
                vec![*q, *k, *v],
                vec![*o, *lse, *scratch],
                self.launches(at)?,
            ),
            Action::AttentionGrad {
                inputs,
                results,
                scratch,
                ..
            } => {
                let mut writes = results.to_vec();
                writes.push(*scratch);
                (inputs.to_vec(), writes, self.launches(at)?)
            }
            Action::Routine {
                inputs, results, ..
            } => (inputs.clone(), results.clone(), self.launches(at)?),
            Action::Collective { .. } | Action::Send { .. } | Action::Recv { .. } => {
                return Err(Error::Internal("a collective is no rank's own".into()));
            }
        };
        Ok(Item {
            stream: self.streams(rank).0,
            reads: self.ranges(rank, &reads)?,
            writes: self.ranges(rank, &writes)?,
            work,
            owners: vec![at],
        })
    }

    /// The collective that a rank has come to, once all its members have.
    fn meet(&mut self, (rank, idx): (usize, usize), next: &[usize]) -> Result<Outcome> {
        let group = self.group((rank, idx))?;
        let mut members = Vec::with_capacity(group.len());
        for member in group {
            let at = (*member, next[*member]);
            let instructions = &self.program.ranks[*member].instructions;
            if at.1 == instructions.len() || self.group(at).ok() != Some(group) {
                return Ok(Outcome::Waits);
            }
            members.push(self.member(at)?);
        }
        let collective = Collective::of(&members)?;
        let work = self
            .launcher(members[0].dtype())
            .here(&collective, &members)?;
        let range = |address: Address, ty: &TensorType| Range::new(address, ty.n_bytes());
        let item = Item {
            stream: self.streams(group[0]).1,
            reads: members
                .iter()
                .map(|one| range(one.src, one.src_ty))
                .collect(),
            writes: members
                .iter()
                .map(|one| range(one.dst, one.dst_ty))
                .collect(),
            work,
            owners: group.iter().map(|rank| (*rank, next[*rank])).collect(),
        };
        Ok(Outcome::Met(item, group.to_vec()))
    }

    /// This rank's part in a collective with ranks on other devices.
    fn take_part(&mut self, at: (usize, usize)) -> Result<Item> {
        let (rank, idx) = at;
        let group = self.group(at)?;
        let is_same = |place: &(usize, usize)| self.group(*place).ok() == Some(group);
        let turn = (0..idx).filter(|idx| is_same(&(rank, *idx))).count();
        let mut members = Vec::with_capacity(group.len());
        for member in group {
            let n_instructions = self.program.ranks[*member].instructions.len();
            let mut places = (0..n_instructions)
                .map(|idx| (*member, idx))
                .filter(&is_same);
            let place = places.nth(turn).ok_or_else(|| {
                damaged(format!(
                    "rank {member} does not come to instruction {idx} of rank {rank}"
                ))
            })?;
            members.push(self.member(place)?);
        }
        let collective = Collective::of(&members)?;
        let position = group.iter().position(|member| *member == rank);
        let position =
            position.ok_or_else(|| damaged(format!("rank {rank} is not of its group")))?;
        let own = &members[position];
        let (src, dst, n_src, n_dst) =
            (own.src, own.dst, own.src_ty.n_bytes(), own.dst_ty.n_bytes());
        let dtype = own.dtype();
        let Some(apart) = &mut self.apart else {
            return Err(Error::Internal("all ranks are here".into()));
        };
        let team = apart.teams.get(&TeamKey::Group(group.to_vec()));
        let own = Own {
            team: *team.ok_or_else(|| Error::Internal("a group that was not joined".into()))?,
            member: position,
            n_members: group.len(),
            src,
            dst,
            has_sums: apart.by_host.is_none(),
        };
        let mut launcher = Launcher {
            gpu: &mut *self.gpu,
            functions: &mut self.collectives,
            tables: &mut self.tables,
            dtype,
        };
        let work = launcher.remote(&collective, own, &mut apart.staging)?;
        Ok(Item {
            stream: self.streams(rank).1,
            reads: vec![Range::new(src, n_src)],
            writes: vec![Range::new(dst, n_dst)],
            work,
            owners: vec![at],
        })
    }

    fn launcher(&mut self, dtype: DType) -> Launcher<'_> {
        Launcher {
            gpu: &mut *self.gpu,
            functions: &mut self.collectives,
            tables: &mut self.tables,
            dtype,
        }
    }

    /// The group of an instruction that is a collective.
    fn group(&self, (rank, idx): (usize, usize)) -> Result<&'a [usize]> {
        let program = self.program;
        let n_ranks = program.ranks.len();
        let action = &program.ranks[rank].instructions[idx].action;
        let group = match action {
            Action::Collective { op, .. } => op.group(),
            _ => None,
        };
        let group = group.filter(|group| {
            !group.ranks.is_empty() && group.ranks.iter().all(|rank| *rank < n_ranks)
        });
        let group = group.ok_or_else(|| {
            damaged(format!(
                "instruction {idx} of rank {rank} is no collective of its ranks"
            ))
        })?;
        Ok(&group.ranks)
    }

    fn member(&self, (rank, idx): (usize, usize)) -> Result<Member<'a>> {
        let program = self.program;
        let Action::Collective { op, src, dst } = &program.ranks[rank].instructions[idx].action
        else {
            return Err(damaged(format!(
                "instruction {idx} of rank {rank} is no collective"
            )));
        };
        let address = |id: BufferId| match self.places[rank] {
            Some(_) => self.address(rank, id),
            None => Ok(0),
        };
        Ok(Member {
            rank,
            op,
            src: address(*src)?,
            dst: address(*dst)?,
            src_ty: self.ty(rank, *src)?,
            dst_ty: self.ty(rank, *dst)?,
        })
    }

    fn send(
        &mut self,
        at: (usize, usize),
        to: usize,
        src: BufferId,
        queues: &mut [Queue],
    ) -> Result<Outcome> {
        let (rank, _) = at;
        let channel_idx = self.channel(rank, to)?;
        let queue = &mut queues[channel_idx];
        if queue.n_sent - queue.n_received >= self.program.channels[channel_idx].depth {
            return Ok(Outcome::Waits);
        }
        queue.n_sent += 1;
        let n_before = queue.n_sent - 1;
        Ok(Outcome::Items(vec![
            self.keep(at, channel_idx, n_before, src)?.0,
        ]))
    }

    /// Copies a message into its channel; the slot that it has there.
    fn keep(
        &self,
        at: (usize, usize),
        channel_idx: usize,
        n_before: usize,
        src: BufferId,
    ) -> Result<(Item, Address)> {
        let (rank, _) = at;
        let n_bytes = self.ty(rank, src)?.n_bytes();
        let slot = self.slot(channel_idx, n_before, n_bytes)?;
        let from = self.address(rank, src)?;
        let stream = self.message_stream(rank, channel_idx, false);
        Ok((message(at, stream, from, slot, n_bytes), slot))
    }

    /// A message to another device: copied into its slot here, which its channel sends from.
    fn send_apart(&mut self, at: (usize, usize), to: usize, src: BufferId) -> Result<Vec<Item>> {
        let (rank, idx) = at;
        let channel_idx = self.channel(rank, to)?;
        let before = self.program.ranks[rank].instructions[..idx].iter();
        let n_before = before
            .filter(|one| matches!(one.action, Action::Send { to: other, .. } if other == to))
            .count();
        let (copy, address) = self.keep(at, channel_idx, n_before, src)?;
        let n_bytes = self.ty(rank, src)?.n_bytes();
        let part = Part {
            member: 1,
            address,
            n_bytes,
        };
        let item = Item {
            stream: StreamIdx(2 + channel_idx),
            reads: vec![Range::new(address, n_bytes)],
            writes: Vec::new(),
            work: vec![Work::Exchange {
                team: self.channel_team(channel_idx)?,
                sends: vec![part],
                recvs: Vec::new(),
            }],
            // The copy's time is the rank's; the channel takes its own.
            owners: Vec::new(),
        };
        Ok(vec![copy, item])
    }

    /// A message from another device, received where it belongs.
    fn recv_apart(&mut self, at: (usize, usize), from: usize, dst: BufferId) -> Result<Item> {
        let (rank, _) = at;
        let channel_idx = self.channel(from, rank)?;
        let address = self.address(rank, dst)?;
        let n_bytes = self.ty(rank, dst)?.n_bytes();
        let part = Part {
            member: 0,
            address,
            n_bytes,
        };
        Ok(Item {
            stream: StreamIdx(2 + channel_idx),
            reads: Vec::new(),
            writes: vec![Range::new(address, n_bytes)],
            work: vec![Work::Exchange {
                team: self.channel_team(channel_idx)?,
                sends: Vec::new(),
                recvs: vec![part],
            }],
            owners: vec![at],
        })
    }

    fn channel_team(&self, channel_idx: usize) -> Result<TeamIdx> {
        let teams = self.apart.as_ref().map(|apart| &apart.teams);
        let team = teams.and_then(|teams| teams.get(&TeamKey::Channel(channel_idx)));
        team.copied()
            .ok_or_else(|| Error::Internal("a channel that was not joined".into()))
    }

    fn recv(
        &mut self,
        at: (usize, usize),
        from: usize,
        dst: BufferId,
        queues: &mut [Queue],
    ) -> Result<Outcome> {
        let (rank, _) = at;
        let channel_idx = self.channel(from, rank)?;
        let queue = &mut queues[channel_idx];
        if queue.n_sent == queue.n_received {
            return Ok(Outcome::Waits);
        }
        queue.n_received += 1;
        let n_before = queue.n_received - 1;
        let n_bytes = self.ty(rank, dst)?.n_bytes();
        let slot = self.slot(channel_idx, n_before, n_bytes)?;
        let to = self.address(rank, dst)?;
        let stream = self.message_stream(rank, channel_idx, true);
        Ok(Outcome::Items(vec![message(at, stream, slot, to, n_bytes)]))
    }

    fn channel(&self, from: usize, to: usize) -> Result<usize> {
        let mut channels = self.program.channels.iter();
        let position = channels.position(|channel| (channel.from, channel.to) == (from, to));
        position
            .ok_or_else(|| damaged(format!("there is no channel from rank {from} to rank {to}")))
    }

    fn slot(&self, channel_idx: usize, n_before: usize, n_bytes: usize) -> Result<Address> {
        let channel = &self.program.channels[channel_idx];
        if n_bytes > channel.n_bytes || channel.depth == 0 {
            return Err(damaged(format!(
                "a message of {n_bytes} bytes goes from rank {} to rank {}, whose channel takes {}",
                channel.from, channel.to, channel.n_bytes
            )));
        }
        let slot = n_before % channel.depth;
        Ok(self.channels[channel_idx] + (slot * channel.n_bytes) as u64)
    }

    /// The launches that the code has for an instruction.
    fn launches(&mut self, (rank, idx): (usize, usize)) -> Result<Vec<Work>> {
        let code = self.code;
        let launches = code.ranks.get(rank).and_then(|rank| rank.get(idx));
        let launches = launches
            .ok_or_else(|| damaged(format!("the code lacks instruction {idx} of rank {rank}")))?;
        launches
            .iter()
            .map(|launch| self.launch(rank, launch))
            .collect()
    }

    fn launch(&mut self, rank: usize, launch: &Launch) -> Result<Work> {
        let entry = &launch.entry;
        let grid = entry.grid;
        let ([bx, by, bz], [tx, ty, tz]) = (grid.blocks, grid.threads);
        let shape = [bx, by, bz, tx, ty, tz, grid.shared_bytes];
        let key = (entry.module, entry.name.clone(), shape);
        let function = match self.functions.get(&key) {
            Some(function) => *function,
            None => {
                let module = self.modules.get(entry.module).ok_or_else(|| {
                    damaged(format!(
                        "`{}` is of module {} of {}",
                        entry.name,
                        entry.module,
                        self.modules.len()
                    ))
                })?;
                let function = self.gpu.function(*module, &entry.name, grid)?;
                self.functions.insert(key, function);
                function
            }
        };
        let args = launch.args.iter().map(|arg| {
            Ok(match arg {
                Argument::Buffer(id) => Value::Address(self.address(rank, *id)?),
                Argument::Int(value) => Value::Int(*value),
                Argument::Float(value) => Value::Float(*value),
            })
        });
        Ok(Work::Launch {
            function,
            args: args.collect::<Result<_>>()?,
        })
    }

    fn buffer(&self, rank: usize, id: BufferId) -> Result<&'a Buffer> {
        let program = self.program;
        let buffers = &program.ranks[rank].buffers;
        let buffer = buffers.get(id.index());
        buffer.ok_or_else(|| damaged(format!("buffer {} of {}", id.index(), buffers.len())))
    }

    fn ty(&self, rank: usize, id: BufferId) -> Result<&'a TensorType> {
        Ok(&self.buffer(rank, id)?.ty)
    }

    fn address(&self, rank: usize, id: BufferId) -> Result<Address> {
        let place = self.places[rank];
        let place = place.ok_or_else(|| Error::Internal(format!("rank {rank} is elsewhere")))?;
        address(self.buffer(rank, id)?, place)
    }

    fn ranges(&self, rank: usize, ids: &[BufferId]) -> Result<Vec<Range>> {
        let range = |id: &BufferId| {
            let n_bytes = self.buffer(rank, *id)?.ty.n_bytes();
            Ok(Range::new(self.address(rank, *id)?, n_bytes))
        };
        ids.iter().map(range).collect()
    }
}

/// Where a buffer lies.
///
/// # Errors
/// `Invalid` when it is not inside of its rank's arena.
pub(super) fn address(buffer: &Buffer, place: Place) -> Result<Address> {
    let n_bytes = buffer.ty.n_bytes();
    let inside = buffer
        .offset
        .checked_add(n_bytes)
        .is_some_and(|end| end <= place.arena_bytes);
    if !inside || !buffer.offset.is_multiple_of(buffer.ty.dtype.n_bytes()) {
        return Err(damaged(format!(
            "buffer `{}` of {n_bytes} bytes at offset {} does not lie in an arena of {} bytes",
            buffer.name, buffer.offset, place.arena_bytes
        )));
    }
    Ok(place.arena + buffer.offset as u64)
}

/// A message's copy from one place to another.
fn message(
    at: (usize, usize),
    stream: StreamIdx,
    from: Address,
    to: Address,
    n_bytes: usize,
) -> Item {
    Item {
        stream,
        reads: vec![Range::new(from, n_bytes)],
        writes: vec![Range::new(to, n_bytes)],
        work: vec![Work::Copy { to, from, n_bytes }],
        owners: vec![at],
    }
}

fn damaged(what: String) -> Error {
    Error::Invalid(format!("damaged program: {what}; compile again"))
}
