//! From the ranks of a device to work on its streams.
//!
//! In: the programs of the ranks here, the code's functions, and where each rank's memory lies. Out:
//! items of work, in an order in which every rank's instructions follow one another.
//! Invariant: a collective stands once, after all its members have come to it; a message is copied into
//! its channel before it is copied out, and a channel never holds more than its depth.

use std::collections::BTreeMap;

use meshweave_dsl::device_code::{Argument, DeviceCode, Launch};
use meshweave_dsl::graph::TensorType;
use meshweave_dsl::program::{Action, Buffer, BufferId, Program};

use super::collective::{Functions, Member};
use super::order::{Item, Range};
use super::product::products;
use super::{Choice, Tables};
use crate::device::gpu::{Address, FunctionIdx, Gpu, ModuleIdx, StreamIdx, Value, Work};
use crate::error::{Error, Result};

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
    /// One a rank, all of which are here.
    pub(super) places: Vec<Place>,
    /// One a channel of the program: where its messages are kept.
    pub(super) channels: Vec<Address>,
    pub(super) tables: Tables,
    /// How each contraction is done, by rank and instruction.
    pub(super) choices: BTreeMap<(usize, usize), Choice>,
    /// Functions by module, name and shape of the launch.
    pub(super) functions: BTreeMap<(usize, String, [u32; 7]), FunctionIdx>,
}

/// A channel while the ranks' instructions are put in order.
#[derive(Clone, Copy, Default)]
struct Queue {
    n_sent: usize,
    n_received: usize,
}

/// The streams of a rank: its own work, and what it exchanges with others.
pub(super) fn streams_of(rank: usize) -> (StreamIdx, StreamIdx) {
    (StreamIdx(2 * rank), StreamIdx(2 * rank + 1))
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
        loop {
            let mut progress = false;
            for rank in 0..program.ranks.len() {
                while let Some(instruction) = program.ranks[rank].instructions.get(next[rank]) {
                    let at = (rank, next[rank]);
                    let item = match &instruction.action {
                        Action::Collective { .. } => match self.meet(at, &next)? {
                            Some((item, others)) => {
                                others.iter().for_each(|other| next[*other] += 1);
                                item
                            }
                            None => break,
                        },
                        Action::Send { to, src } => match self.send(at, *to, *src, &mut queues)? {
                            Some(item) => item,
                            None => break,
                        },
                        Action::Recv { from, dst } => {
                            match self.recv(at, *from, *dst, &mut queues)? {
                                Some(item) => item,
                                None => break,
                            }
                        }
                        action => self.own(at, action)?,
                    };
                    // A collective's other members have been moved on already.
                    next[rank] +=
                        usize::from(!matches!(instruction.action, Action::Collective { .. }));
                    items.push(item);
                    progress = true;
                }
            }
            let waiting =
                (0..next.len()).find(|rank| next[*rank] < program.ranks[*rank].instructions.len());
            match waiting {
                None => return Ok(items),
                Some(rank) if !progress => {
                    let instruction = &program.ranks[rank].instructions[next[rank]];
                    return Err(Error::Invalid(format!(
                        "damaged program: rank {rank} waits at instruction {} `{}` for ranks that never \
                         come; compile again",
                        next[rank], instruction.name
                    )));
                }
                Some(_) => {}
            }
        }
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
                let launch = Launch {
                    entry: generated.entry.clone(),
                    args: args.iter().copied().map(Argument::Buffer).collect(),
                };
                let written = args.iter().zip(&generated.writes);
                // A kernel may read what it writes.
                let writes = written
                    .filter(|(_, is_written)| **is_written)
                    .map(|(arg, _)| *arg);
                (
                    args.clone(),
                    writes.collect(),
                    vec![self.launch(rank, &launch)?],
                )
            }
            Action::Contract {
                a,
                b,
                c,
                indices,
                accumulate,
            } => {
                let reads = if *accumulate {
                    vec![*a, *b, *c]
                } else {
                    vec![*a, *b]
                };
                let operands = [
                    self.address(rank, *a)?,
                    self.address(rank, *b)?,
                    self.address(rank, *c)?,
                ];
                let calls = match products(indices, *accumulate, operands)? {
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
                            let [a, b, c] = [0, 1, 2].map(|i| operands[i] + 4 * offsets[i] as u64);
                            Work::Product { product, a, b, c }
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
            stream: streams_of(rank).0,
            reads: self.ranges(rank, &reads)?,
            writes: self.ranges(rank, &writes)?,
            work,
            owners: vec![at],
        })
    }

    /// The collective that a rank has come to, with its members, once all of them are there.
    fn meet(
        &mut self,
        (rank, idx): (usize, usize),
        next: &[usize],
    ) -> Result<Option<(Item, Vec<usize>)>> {
        let program = self.program;
        let Action::Collective { op, .. } = &program.ranks[rank].instructions[idx].action else {
            return Ok(None);
        };
        let group = op
            .group()
            .filter(|group| group.ranks.iter().all(|rank| *rank < next.len()))
            .ok_or_else(|| damaged(format!("{} is no collective of its ranks", op.name())))?;
        let mut members = Vec::with_capacity(group.ranks.len());
        for member in &group.ranks {
            let instruction = program.ranks[*member].instructions.get(next[*member]);
            let Some(Action::Collective { op, src, dst }) =
                instruction.map(|instruction| &instruction.action)
            else {
                return Ok(None);
            };
            if op.group().is_none_or(|other| other.ranks != group.ranks) {
                return Ok(None);
            }
            members.push(Member {
                rank: *member,
                op,
                src: self.address(*member, *src)?,
                dst: self.address(*member, *dst)?,
                src_ty: self.ty(*member, *src)?,
                dst_ty: self.ty(*member, *dst)?,
            });
        }
        let range = |address: Address, ty: &TensorType| Range::new(address, ty.n_bytes());
        let item = Item {
            stream: streams_of(group.ranks[0]).1,
            reads: members
                .iter()
                .map(|one| range(one.src, one.src_ty))
                .collect(),
            writes: members
                .iter()
                .map(|one| range(one.dst, one.dst_ty))
                .collect(),
            work: self.collectives.launches(&members, &mut self.tables)?,
            owners: group
                .ranks
                .iter()
                .map(|rank| (*rank, next[*rank]))
                .collect(),
        };
        Ok(Some((item, group.ranks.clone())))
    }

    fn send(
        &mut self,
        at: (usize, usize),
        to: usize,
        src: BufferId,
        queues: &mut [Queue],
    ) -> Result<Option<Item>> {
        let (rank, _) = at;
        let channel_idx = self.channel(rank, to)?;
        let queue = &mut queues[channel_idx];
        if queue.n_sent - queue.n_received >= self.program.channels[channel_idx].depth {
            return Ok(None);
        }
        queue.n_sent += 1;
        let n_sent = queue.n_sent - 1;
        let n_bytes = self.ty(rank, src)?.n_bytes();
        let slot = self.slot(channel_idx, n_sent, n_bytes)?;
        let from = self.address(rank, src)?;
        Ok(Some(message(at, from, slot, n_bytes)))
    }

    fn recv(
        &mut self,
        at: (usize, usize),
        from: usize,
        dst: BufferId,
        queues: &mut [Queue],
    ) -> Result<Option<Item>> {
        let (rank, _) = at;
        let channel_idx = self.channel(from, rank)?;
        let queue = &mut queues[channel_idx];
        if queue.n_sent == queue.n_received {
            return Ok(None);
        }
        queue.n_received += 1;
        let n_received = queue.n_received - 1;
        let n_bytes = self.ty(rank, dst)?.n_bytes();
        let slot = self.slot(channel_idx, n_received, n_bytes)?;
        let to = self.address(rank, dst)?;
        Ok(Some(message(at, slot, to, n_bytes)))
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
        let (buffer, place) = (self.buffer(rank, id)?, self.places[rank]);
        address(buffer, place)
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
fn message(at: (usize, usize), from: Address, to: Address, n_bytes: usize) -> Item {
    Item {
        stream: streams_of(at.0).1,
        reads: vec![Range::new(from, n_bytes)],
        writes: vec![Range::new(to, n_bytes)],
        work: vec![Work::Copy { to, from, n_bytes }],
        owners: vec![at],
    }
}

fn damaged(what: String) -> Error {
    Error::Invalid(format!("damaged program: {what}; compile again"))
}
