//! Executes all ranks of a program on one GPU.
//!
//! In: a program, its code for the device, the device. Out: the ranks' memory to read and write between
//! steps, and steps, with the times of their instructions.
//! Invariant: everything that could be wrong with a program is found before anything runs; a step is
//! the same list of commands every time, put in order once ([`order`]), which is started command by
//! command while instructions are timed, and as one graph afterwards.
//!
//! Memory is what the program plans: an arena a rank and its channels. Besides them there are tables of
//! addresses for collectives, [`OnGpu::table_bytes`] in all.

mod collective;
mod issue;
mod order;
mod product;
mod session;

use std::collections::BTreeMap;

use meshweave_dsl::device_code::{DEVICE_CODE_VERSION, DeviceCode, Module};
use meshweave_dsl::program::{BufferId, Program, RankProgram};

use crate::device::gpu::{Address, Gpu, GraphIdx, Value, Work};
use crate::error::{Error, Result};
use collective::Functions;
use issue::{Place, Site, address};
use order::{Order, Step, Timing};
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

    fn place(args: &mut [Value], table: Address) {
        for arg in args {
            if let Value::Address(address) = arg
                && *address & IN_TABLE != 0
            {
                *address = table + (*address & !IN_TABLE);
            }
        }
    }
}

/// The ranks of a program on a GPU.
pub(in crate::executor) struct OnGpu {
    gpu: Box<dyn Gpu>,
    places: Vec<Place>,
    /// For each item its rank and instruction, several for collectives.
    owners: Vec<Vec<(usize, usize)>>,
    timed: Step,
    whole: Step,
    graph: Option<GraphIdx>,
    n_run: usize,
    /// Of the last timed step, one a rank and instruction.
    spans: Vec<Vec<Span>>,
    choices: BTreeMap<(usize, usize), Choice>,
    table_bytes: usize,
}

impl OnGpu {
    /// Allocates the ranks' memory, loads the code, and puts the step's commands in order.
    ///
    /// # Errors
    /// `Invalid` when program and code do not fit each other or are damaged; `Exhausted` when the
    /// device's memory does not suffice; `Unsupported` when the program needs what is not written for
    /// GPUs.
    pub(super) fn new(program: &Program, code: &DeviceCode, mut gpu: Box<dyn Gpu>) -> Result<Self> {
        check(program, code)?;
        let mut places = Vec::with_capacity(program.ranks.len());
        for rank in &program.ranks {
            let arena_bytes = rank.arena_bytes;
            let arena = gpu.allocate(arena_bytes)?;
            places.push(Place { arena, arena_bytes });
        }
        let channels = program.channels.iter();
        let channels = channels.map(|channel| gpu.allocate(channel.depth * channel.n_bytes));
        let channels = channels.collect::<Result<Vec<_>>>()?;
        let modules = code.modules.iter().map(|module| gpu.load(module));
        let modules = modules.collect::<Result<Vec<_>>>()?;
        let own = gpu.load(&Module {
            source: None,
            ptx: Some(collective::CODE.into()),
        })?;
        let collectives = Functions::of(gpu.as_mut(), own)?;
        let mut site = Site {
            program,
            code,
            gpu: gpu.as_mut(),
            modules,
            collectives,
            places,
            channels,
            tables: Tables::default(),
            choices: BTreeMap::new(),
            functions: BTreeMap::new(),
        };
        let mut items = site.items()?;
        let (places, choices) = (site.places, site.choices);
        let addresses = site.tables.addresses;
        let table_bytes = 8 * addresses.len();
        if !addresses.is_empty() {
            let table = gpu.allocate(table_bytes)?;
            let halves = |address: &u64| [*address as u32, (*address >> 32) as u32];
            let words: Vec<u32> = addresses.iter().flat_map(halves).collect();
            gpu.upload(table, &words)?;
            for work in items.iter_mut().flat_map(|item| &mut item.work) {
                if let Work::Launch { args, .. } = work {
                    Tables::place(args, table);
                }
            }
        }
        let order = Order::new(items, 2 * program.ranks.len());
        let (timed, whole) = (order.step(Timing::EveryItem), order.step(Timing::StepOnly));
        gpu.reserve(2 * program.ranks.len(), timed.n_events.max(whole.n_events))?;
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
            spans: n_instructions.map(|n| vec![Span::default(); n]).collect(),
            choices,
            table_bytes,
        })
    }

    /// The device in words.
    pub(super) fn name(&self) -> String {
        self.gpu.name()
    }

    /// Bytes of each rank's arena.
    pub(super) fn arena_bytes(&self) -> Vec<usize> {
        self.places.iter().map(|place| place.arena_bytes).collect()
    }

    /// Bytes of the tables of addresses.
    pub(super) fn table_bytes(&self) -> usize {
        self.table_bytes
    }

    /// Contractions by what does them.
    pub(super) fn n_contractions(&self, choice: Choice) -> usize {
        self.choices
            .values()
            .filter(|other| **other == choice)
            .count()
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
        let address = address(
            &program.ranks[rank].buffers[buffer.index()],
            self.places[rank],
        )?;
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
        let address = address(
            &program.ranks[rank].buffers[buffer.index()],
            self.places[rank],
        )?;
        self.gpu.upload(address, words)
    }

    /// Runs one step; returns when it is done.
    ///
    /// # Errors
    /// Those of the device.
    pub(super) fn step(&mut self) -> Result<()> {
        if self.n_run == N_TIMED_STEPS {
            self.graph = self.gpu.record(&self.whole.commands)?;
        }
        self.n_run += 1;
        if let Some(graph) = self.graph {
            self.gpu.replay(graph)?;
            return self.gpu.synchronize();
        }
        self.gpu.submit(&self.timed.commands)?;
        self.gpu.synchronize()?;
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

    /// The times of the last step that was timed.
    pub(super) fn spans(&self, rank: usize) -> &[Span] {
        &self.spans[rank]
    }
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
