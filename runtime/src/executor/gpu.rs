//! Executes a program's ranks on one GPU: all of them, or one whose peers are on other devices.
//!
//! In: a program, its code for the device, the device. Out: the ranks' memory to read and write between
//! steps, and steps, with the times of their instructions.
//! Invariant: everything that could be wrong with a program is found before anything runs; a step is
//! the same list of commands every time, put in order once ([`order`]), which is started command by
//! command while instructions are timed, and as one graph afterwards.
//!
//! Memory is what the program plans: an arena a rank and its channels. Besides them there are tables of
//! addresses for collectives, and where peers are on other devices, room for elements on their way:
//! [`OnGpu::other_bytes`] in all.

mod collective;
mod hosted;
mod issue;
mod order;
mod product;
mod remote;
mod session;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use meshweave_dsl::device_code::{DEVICE_CODE_VERSION, DeviceCode, Module};
use meshweave_dsl::program::{Action, BufferId, Program, RankProgram};

use crate::collective::{Communicator, exchange_texts};
use crate::device::gpu::{Address, Gpu, GraphIdx, TEAM_NAME_WORDS, TeamIdx, Value, Work};
use crate::device::target::check_target;
use crate::error::{Error, Result};
use collective::Functions;
use hosted::Hosted;
use issue::{Apart, Place, Site, TeamKey, address};
use order::{Order, Step, Timing};
use remote::{IN_STAGING, Staging};
pub use session::GpuUse;

/// Steps that are timed instruction by instruction before the graph takes over: the first one loads
/// code, the second one does not.
const N_TIMED_STEPS: usize = 2;

/// When an instruction ran: seconds from the start of the step, and its duration.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Span {
    pub(super) start_s: f64,
    pub(super) duration_s: f64,
}

/// What does a contraction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Choice {
    /// The device's library.
    Library,
    /// A kernel of the program's code.
    Generated,
}

/// Addresses that kernels read from tables in the device's memory.
#[derive(Default)]
struct Tables {
    addresses: Vec<Address>,
}

/// Stands before the table's own address is known; its other bits are the offset in the table.
const IN_TABLE: Address = 1 << 63;

impl Tables {
    /// An argument that will point to these addresses.
    fn add(&mut self, addresses: &[Address]) -> Value {
        let offset = 8 * self.addresses.len() as u64;
        self.addresses.extend_from_slice(addresses);
        Value::Address(IN_TABLE | offset)
    }
}

/// Where addresses that were not known before lie.
#[derive(Clone, Copy)]
struct Known {
    table: Address,
    staging: Address,
}

impl Known {
    fn of(self, address: &mut Address) {
        for (mark, base) in [(IN_TABLE, self.table), (IN_STAGING, self.staging)] {
            if *address & mark != 0 {
                *address = base + (*address & !mark);
                return;
            }
        }
    }

    fn place(self, work: &mut Work) {
        match work {
            Work::Launch { args, .. } => {
                for arg in args {
                    if let Value::Address(address) = arg {
                        self.of(address);
                    }
                }
            }
            Work::Copy { to, from, .. } => [to, from].into_iter().for_each(|one| self.of(one)),
            Work::Exchange { sends, recvs, .. } => {
                let parts = sends.iter_mut().chain(recvs);
                parts.for_each(|part| self.of(&mut part.address));
            }
            // Of buffers alone.
            Work::Product { .. } | Work::AllReduce { .. } => {}
            Work::Call(_) | Work::Record(_) | Work::Wait(_) => {}
        }
    }
}

/// The ranks of a program on a GPU.
pub(in crate::executor) struct OnGpu {
    gpu: Box<dyn Gpu>,
    /// One a rank of the program; none for those that are elsewhere.
    places: Vec<Option<Place>>,
    /// For each item its rank and instruction, several for collectives.
    owners: Vec<Vec<(usize, usize)>>,
    timed: Step,
    whole: Step,
    graph: Option<GraphIdx>,
    n_run: usize,
    /// What the last step took.
    usual: Duration,
    /// Of the last timed step, one a rank and instruction.
    spans: Vec<Vec<Span>>,
    choices: BTreeMap<(usize, usize), Choice>,
    other_bytes: usize,
    host_bytes: usize,
    /// What the host exchanges, where the device has no library for it.
    hosted: Hosted,
}

impl OnGpu {
    /// Allocates the ranks' memory, loads the code, and puts the step's commands in order. With a
    /// communicator, only its rank is here, and all ranks call this together; else all ranks are.
    ///
    /// # Errors
    /// `Invalid` when program, code and device do not fit each other or are damaged; `Exhausted` when the
    /// device's memory does not suffice; `Unsupported` when the program needs what is not written for
    /// GPUs.
    pub(super) fn new(
        program: &Program,
        code: &DeviceCode,
        mut gpu: Box<dyn Gpu>,
        communicator: Option<&mut dyn Communicator>,
    ) -> Result<Self> {
        check(program, code)?;
        check_target(&code.target, &gpu.name(), gpu.capability())?;
        let here = communicator
            .as_ref()
            .map(|communicator| communicator.rank());
        let is_here = |rank: usize| here.is_none_or(|here| here == rank);
        let mut places = Vec::with_capacity(program.ranks.len());
        for (rank, rank_program) in program.ranks.iter().enumerate() {
            let arena_bytes = rank_program.arena_bytes;
            let place = |arena| Place { arena, arena_bytes };
            let arena = is_here(rank).then(|| gpu.allocate(arena_bytes));
            places.push(arena.transpose()?.map(place));
        }
        // A channel to another device keeps its messages where they come from; one of a rank to itself
        // is what is offloaded, and rests with the host.
        let mut host_bytes = 0;
        let channels = program.channels.iter().map(|channel| {
            let n_bytes = channel.depth * channel.n_bytes;
            if !is_here(channel.from) {
                Ok(0)
            } else if channel.from == channel.to {
                host_bytes += n_bytes;
                gpu.allocate_host(n_bytes)
            } else {
                gpu.allocate(n_bytes)
            }
        });
        let channels = channels.collect::<Result<Vec<_>>>()?;
        let modules = code
            .modules
            .iter()
            .map(|module| gpu.load(module, &code.target));
        let modules = modules.collect::<Result<Vec<_>>>()?;
        let own = Module {
            source: None,
            ptx: Some(collective::CODE.into()),
        };
        let own = gpu.load(&own, &code.target)?;
        let reaches_devices = communicator
            .as_ref()
            .is_some_and(|communicator| communicator.reaches_devices());
        let apart = communicator.map(|communicator| join(program, gpu.as_mut(), communicator));
        let mut site = Site {
            program,
            code,
            gpu: gpu.as_mut(),
            modules,
            collectives: Functions::of(own),
            places,
            channels,
            apart: apart.transpose()?,
            tables: Tables::default(),
            choices: BTreeMap::new(),
            functions: BTreeMap::new(),
        };
        let mut items = site.items()?;
        let n_streams = site.n_streams();
        let (places, choices) = (site.places, site.choices);
        let addresses = site.tables.addresses;
        let apart = site.apart;
        let staging_bytes = apart.as_ref().map_or(0, |apart| apart.staging.n_bytes);
        let table_bytes = 8 * addresses.len();
        let known = Known {
            table: if table_bytes > 0 {
                gpu.allocate(table_bytes)?
            } else {
                0
            },
            staging: if staging_bytes > 0 {
                gpu.allocate(staging_bytes)?
            } else {
                0
            },
        };
        let halves = |mut address: u64| {
            known.of(&mut address);
            [address as u32, (address >> 32) as u32]
        };
        let words: Vec<u32> = addresses.into_iter().flat_map(halves).collect();
        if !words.is_empty() {
            gpu.upload(known.table, &words)?;
        }
        let works = items.iter_mut().flat_map(|item| &mut item.work);
        works.for_each(|work| known.place(work));
        let by_host = apart.and_then(|apart| apart.by_host);
        let hosted = match by_host {
            Some(teams) => Hosted::replace(&mut items, &teams, gpu.as_mut(), reaches_devices)?,
            None => Hosted::default(),
        };
        host_bytes += hosted.n_bytes;
        let order = Order::new(items, n_streams);
        let (timed, whole) = (order.step(Timing::EveryItem), order.step(Timing::StepOnly));
        let n_events = timed.n_events.max(whole.n_events);
        gpu.reserve(n_streams, n_events, hosted.n_calls())?;
        let n_instructions = program.ranks.iter().map(|rank| rank.instructions.len());
        Ok(Self {
            gpu,
            places,
            owners: order
                .items()
                .iter()
                .map(|item| item.owners.clone())
                .collect(),
            timed,
            whole,
            graph: None,
            n_run: 0,
            usual: Duration::ZERO,
            spans: n_instructions.map(|n| vec![Span::default(); n]).collect(),
            choices,
            other_bytes: table_bytes + staging_bytes,
            host_bytes,
            hosted,
        })
    }

    /// The ranks that are here.
    pub(in crate::executor) fn ranks(&self) -> Vec<usize> {
        let ranks = self.places.iter().enumerate();
        ranks
            .filter_map(|(rank, place)| place.map(|_| rank))
            .collect()
    }

    /// The device in words.
    pub(super) fn name(&self) -> String {
        self.gpu.name()
    }

    /// Bytes of each rank's arena.
    pub(super) fn arena_bytes(&self) -> Vec<usize> {
        let places = self.places.iter().flatten();
        places.map(|place| place.arena_bytes).collect()
    }

    /// Bytes besides arenas and channels.
    pub(super) fn other_bytes(&self) -> usize {
        self.other_bytes
    }

    /// Bytes of the host's memory, for what is offloaded.
    pub(super) fn host_bytes(&self) -> usize {
        self.host_bytes
    }

    /// Contractions by what does them.
    pub(super) fn n_contractions(&self, choice: Choice) -> usize {
        self.choices
            .values()
            .filter(|other| **other == choice)
            .count()
    }

    fn address(&self, program: &Program, rank: usize, buffer: BufferId) -> Result<Address> {
        let place = self.places[rank];
        let place = place.ok_or_else(|| Error::Internal(format!("rank {rank} is elsewhere")))?;
        address(&program.ranks[rank].buffers[buffer.index()], place)
    }

    /// Copies a buffer's words to the host.
    ///
    /// # Errors
    /// Those of the device.
    pub(super) fn read(
        &mut self,
        program: &Program,
        (rank, buffer): (usize, BufferId),
        words: &mut [u32],
    ) -> Result<()> {
        let address = self.address(program, rank, buffer)?;
        self.gpu.download(address, words)
    }

    /// Copies words from the host into a buffer.
    ///
    /// # Errors
    /// Those of the device.
    pub(super) fn write(
        &mut self,
        program: &Program,
        (rank, buffer): (usize, BufferId),
        words: &[u32],
    ) -> Result<()> {
        let address = self.address(program, rank, buffer)?;
        self.gpu.upload(address, words)
    }

    /// Runs one step; returns when it is done. With a communicator it listens to the other ranks
    /// meanwhile.
    ///
    /// # Errors
    /// Those of the device, and of [`Communicator::attend`].
    pub(super) fn step(
        &mut self,
        program: &Program,
        communicator: Option<&mut dyn Communicator>,
    ) -> Result<()> {
        if self.n_run == N_TIMED_STEPS {
            self.graph = self.gpu.record(&self.whole.commands)?;
        }
        self.n_run += 1;
        let started = Instant::now();
        match self.graph {
            Some(graph) => self.gpu.replay(graph)?,
            None => self.gpu.submit(&self.timed.commands)?,
        }
        self.finish(program, communicator)?;
        self.usual = started.elapsed();
        if self.graph.is_some() {
            return Ok(());
        }
        for (owners, (start, end)) in self.owners.iter().zip(&self.timed.times) {
            let span = Span {
                start_s: self.gpu.elapsed_s(self.timed.bounds.0, *start)?,
                duration_s: self.gpu.elapsed_s(*start, *end)?,
            };
            for (rank, instruction) in owners {
                self.spans[*rank][*instruction] = span;
            }
        }
        Ok(())
    }

    /// Waits for the step that was started.
    fn finish(
        &mut self,
        program: &Program,
        communicator: Option<&mut dyn Communicator>,
    ) -> Result<()> {
        if let Some(communicator) = communicator {
            let what = format!("step {} of this run on GPUs", self.n_run);
            let (gpu, hosted) = (&mut self.gpu, &mut self.hosted);
            let mut is_done = |communicator: &mut dyn Communicator| {
                hosted.serve(gpu.as_mut(), communicator)?;
                gpu.is_idle()
            };
            let done = communicator.attend(&what, self.n_run as u64, self.usual, &mut is_done);
            done.map_err(|error| self.placed(program, error))?;
        }
        self.gpu.synchronize()
    }

    /// A failure with the instruction that the step has come to, where that is known: where the host
    /// makes exchanges, and where instructions are timed.
    fn placed(&mut self, program: &Program, error: Error) -> Error {
        let Error::Exhausted(text) = &error else {
            return error;
        };
        let at = self.hosted.waits_at().or_else(|| self.first_unfinished());
        let Some((rank, instruction_idx)) = at else {
            return error;
        };
        let instruction = &program.ranks[rank].instructions[instruction_idx];
        Error::Exhausted(format!(
            "{text}; rank {rank} has come to instruction {instruction_idx}, `{}`",
            instruction.name
        ))
    }

    /// Rank and instruction of the first item that has not ended, while instructions are timed.
    fn first_unfinished(&mut self) -> Option<(usize, usize)> {
        if self.graph.is_some() {
            return None;
        }
        let ends = self.owners.iter().zip(&self.timed.times);
        let mut ends = ends.filter_map(|(owners, (_, end))| Some((*owners.first()?, *end)));
        let first = ends.find(|(_, end)| !self.gpu.has_passed(*end).unwrap_or(true));
        first.map(|(at, _)| at)
    }

    /// The times of the last step that was timed.
    pub(super) fn spans(&self, rank: usize) -> &[Span] {
        &self.spans[rank]
    }
}

/// Joins the groups and channels of a rank, together with all other ranks: each group's first member
/// makes the name that the others join it by. Where the host exchanges, there is nothing to join.
fn join(
    program: &Program,
    gpu: &mut dyn Gpu,
    communicator: &mut dyn Communicator,
) -> Result<Apart> {
    let rank = communicator.rank();
    let mut keys: BTreeSet<(Vec<usize>, TeamKey)> = BTreeSet::new();
    for instruction in program.ranks.iter().flat_map(|rank| &rank.instructions) {
        if let Action::Collective { op, .. } = &instruction.action
            && let Some(group) = op.group()
        {
            keys.insert((group.ranks.clone(), TeamKey::Group(group.ranks.clone())));
        }
    }
    let channels = program.channels.iter().enumerate();
    for (channel_idx, channel) in channels.filter(|(_, channel)| channel.from != channel.to) {
        let ends = vec![channel.from, channel.to];
        keys.insert((ends, TeamKey::Channel(channel_idx)));
    }
    // All exchange in one way: the host does where some rank's device has no library for it.
    let has_teams = if gpu.has_teams()? { "teams" } else { "" };
    let all_have = exchange_texts(communicator, has_teams)?;
    if all_have.iter().any(String::is_empty) {
        let (by_host, keys): (Vec<_>, Vec<_>) = keys.into_iter().unzip();
        let teams = keys.into_iter().enumerate();
        return Ok(Apart {
            rank,
            teams: teams.map(|(idx, key)| (key, TeamIdx(idx))).collect(),
            by_host: Some(by_host),
            staging: Staging::default(),
        });
    }
    let mut teams = BTreeMap::new();
    for (ranks, key) in keys {
        let Some(member) = ranks.iter().position(|other| *other == rank) else {
            continue;
        };
        let made = if member == 0 {
            gpu.team_name()?
        } else {
            Vec::new()
        };
        let mut name = vec![0; TEAM_NAME_WORDS];
        let group = communicator.join(&ranks)?;
        communicator.broadcast(group, &made, &mut name)?;
        // The library waits for all members without an end: none goes there before all are here.
        communicator.barrier(group)?;
        teams.insert(key, gpu.join(&name, ranks.len(), member)?);
    }
    Ok(Apart {
        rank,
        teams,
        by_host: None,
        staging: Staging::default(),
    })
}

/// Whether the code is for the program.
fn check(program: &Program, code: &DeviceCode) -> Result<()> {
    if code.version != DEVICE_CODE_VERSION {
        return Err(Error::Invalid(format!(
            "the code for {} is of version {}, this runtime loads version {DEVICE_CODE_VERSION}; compile \
             again",
            code.target, code.version
        )));
    }
    let counts =
        |n_kernels: usize, n_ranks: usize| format!("{n_kernels} kernels and {n_ranks} ranks");
    let n_instructions = |rank: &RankProgram| rank.instructions.len();
    let same = program.ranks.iter().map(n_instructions);
    let same = same.eq(code.ranks.iter().map(Vec::len));
    let of_program = (program.kernels.len(), program.ranks.len());
    let of_code = (code.kernels.len(), code.ranks.len());
    if of_program != of_code || !same {
        return Err(Error::Invalid(format!(
            "the code for {} is of {}, the program has {}, or they differ in instructions; compile again",
            code.target,
            counts(of_code.0, of_code.1),
            counts(of_program.0, of_program.1)
        )));
    }
    Ok(())
}
