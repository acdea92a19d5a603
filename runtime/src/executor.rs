//! Executes a program: one thread a rank, each with its arena and its list of instructions.
//!
//! In: a [`Program`] and its kernels, then values of sources by name. Out: per step the measured
//! [`Timeline`]; on demand, sources and outputs gathered from all ranks.
//! Invariant: between steps no rank runs, so arenas may be read and written; a step runs every rank's
//! instructions in order, or fails as a whole, after which the session refuses further steps.

mod prepare;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{Role, TensorType};
use meshweave_dsl::program::{GlobalTensor, KernelId, Program, TensorPart};
use meshweave_dsl::timeline::{Basis, Event, Timeline};

use crate::attention::KernelFn;
use crate::collective::threads::{ThreadCommunicator, WaitOptions, World};
use crate::collective::{CollectiveStats, Communicator};
use crate::device::host::Arena;
use crate::error::{Error, Result};
use crate::pool::WorkerPool;
use crate::tensor::{Elements, HostTensor, Part};
use crate::weights;
use prepare::{Call, Prepared, prepare};

/// The scalar input that counts steps from 1; the session gives it by itself.
const STEP_INPUT: &str = "step";

/// The functions of a program's kernels, in the order of their ids.
pub struct KernelTable {
    functions: Vec<KernelFn>,
    /// Keeps the code mapped.
    _library: Option<libloading::Library>,
}

impl KernelTable {
    /// Kernels of this process.
    ///
    /// # Safety
    /// Each function follows the contract of the kernel symbol in its place: it touches what its
    /// arguments' types span, for rows inside of the symbol's.
    pub unsafe fn from_functions(functions: Vec<KernelFn>) -> KernelTable {
        KernelTable {
            functions,
            _library: None,
        }
    }

    /// The kernels of a loaded object.
    ///
    /// # Safety
    /// As for [`KernelTable::from_functions`]; the functions are those of `library`.
    pub(crate) unsafe fn from_library(
        functions: Vec<KernelFn>,
        library: libloading::Library,
    ) -> KernelTable {
        KernelTable {
            functions,
            _library: Some(library),
        }
    }

    fn get(&self, kernel: KernelId) -> Option<KernelFn> {
        self.functions.get(kernel.index()).copied()
    }
}

/// How a session runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionOptions {
    /// Threads of each device; `None` divides the machine's cores over the ranks.
    pub threads_per_device: Option<usize>,
    /// After this long without a peer, a collective fails.
    pub timeout: Duration,
    /// 0 is the rule of the golden model; any other seed gives other initial weights.
    pub seed: u32,
}

impl Default for SessionOptions {
    fn default() -> Self {
        SessionOptions {
            threads_per_device: None,
            timeout: Duration::from_secs(600),
            seed: 0,
        }
    }
}

/// A program in execution.
pub struct Session {
    program: Program,
    world: Arc<World>,
    /// One thread a rank.
    crew: WorkerPool,
    ranks: Vec<Mutex<Rank>>,
    sources: Vec<Placed>,
    outputs: Vec<Placed>,
    /// Inputs that no one has given yet.
    missing: BTreeSet<String>,
    n_steps: usize,
    /// Holds the code that the ranks' instructions call; after them, so that it is unloaded last.
    _kernels: KernelTable,
}

/// A global tensor with the way to every rank's part.
struct Placed {
    tensor: GlobalTensor,
    parts: Vec<PlacedPart>,
}

struct PlacedPart {
    rank: usize,
    part: Part,
    address: *mut u32,
}

// SAFETY: the addresses lie in the ranks' arenas, which the session owns and which stay in place; they
// are followed only while no rank runs (`&mut self` or `&self` of the session, outside of `step`).
unsafe impl Send for Placed {}
// SAFETY: as above; through a shared reference the addresses are only read from.
unsafe impl Sync for Placed {}

struct Rank {
    rank: usize,
    prepared: Vec<Prepared>,
    communicator: ThreadCommunicator,
    pool: WorkerPool,
    /// Attention scratch of the pool's threads but the first, which uses the arena's.
    scratch: Vec<Vec<f32>>,
    clocks: Vec<Clock>,
    /// After what points into it.
    arena: Arena,
}

// SAFETY: a rank's addresses lie in its own arena, and are followed by the one thread that holds the
// rank's lock (and by its pool's threads on that thread's behalf).
unsafe impl Send for Rank {}

/// When an instruction ran.
#[derive(Clone, Copy)]
struct Clock {
    start: Instant,
    duration_s: f64,
    wait_s: f64,
}

impl Session {
    /// Allocates the arenas, prepares all instructions, and gives parameters, states and constants
    /// their initial values.
    ///
    /// # Errors
    /// `Invalid` when the program is damaged or of another version; `Unsupported` when it needs what
    /// the host lacks; `Exhausted` when memory or threads do not suffice.
    pub fn new(
        program: Program,
        kernels: KernelTable,
        options: &SessionOptions,
    ) -> Result<Session> {
        check(&program, &kernels)?;
        let n_ranks = program.ranks.len();
        let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads_per_device = options
            .threads_per_device
            .unwrap_or(n_cores / n_ranks)
            .max(1);
        let wait = WaitOptions {
            timeout: options.timeout,
            ..WaitOptions::for_threads(n_ranks * threads_per_device)
        };
        let world = World::new(n_ranks, wait);
        for channel in &program.channels {
            world.open_channel(channel)?;
        }
        let mut ranks = Vec::with_capacity(n_ranks);
        for communicator in world.communicators() {
            ranks.push(Rank::new(
                &program,
                communicator,
                &kernels,
                threads_per_device,
            )?);
        }
        let sources = place(&program, &program.sources, &mut ranks)?;
        let outputs = place(&program, &program.outputs, &mut ranks)?;
        let missing = program
            .sources
            .iter()
            .filter(|source| source.role == Role::Input && !is_step(source))
            .map(|source| source.name.clone())
            .collect();
        let mut session = Session {
            world,
            crew: WorkerPool::new(n_ranks)?,
            ranks: ranks.into_iter().map(Mutex::new).collect(),
            sources,
            outputs,
            missing,
            n_steps: 0,
            program,
            _kernels: kernels,
        };
        session.initialize(options.seed)?;
        Ok(session)
    }

    /// The program.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Bytes allocated for the ranks' arenas, one figure a rank.
    pub fn arena_bytes(&self) -> Vec<usize> {
        self.ranks
            .iter()
            .map(|rank| lock(rank).arena.n_bytes())
            .collect()
    }

    /// What collectives have cost each rank so far.
    pub fn collective_stats(&self) -> Vec<CollectiveStats> {
        self.ranks
            .iter()
            .map(|rank| lock(rank).communicator.stats())
            .collect()
    }

    /// Number of steps done.
    pub fn n_steps(&self) -> usize {
        self.n_steps
    }

    /// Sets the count of steps done (when going on from a checkpoint).
    pub fn set_n_steps(&mut self, n_steps: usize) {
        self.n_steps = n_steps;
    }

    /// Gives a source its value on all ranks.
    ///
    /// # Errors
    /// `Invalid` when there is no such source, or the value is of another type.
    pub fn set(&mut self, name: &str, value: &HostTensor) -> Result<()> {
        let Some(placed) = self
            .sources
            .iter()
            .find(|placed| placed.tensor.name == name)
        else {
            let names: Vec<&str> = self
                .sources
                .iter()
                .map(|placed| placed.tensor.name.as_str())
                .collect();
            return Err(Error::Invalid(format!(
                "the program has no source `{name}`; it has {}",
                names.join(", ")
            )));
        };
        if *value.ty() != placed.tensor.ty {
            return Err(Error::Invalid(format!(
                "source `{name}` is {}, the value given is {}",
                placed.tensor.ty,
                value.ty()
            )));
        }
        for PlacedPart { part, address, .. } in &placed.parts {
            // SAFETY: `&mut self`: no rank runs; the part was checked against its buffer.
            unsafe { part.cut(value, *address) };
        }
        self.missing.remove(name);
        Ok(())
    }

    /// A source or an output, gathered from the ranks.
    ///
    /// # Errors
    /// `Invalid` when there is no tensor of this name.
    pub fn get(&self, name: &str) -> Result<HostTensor> {
        let mut all = self.outputs.iter().chain(&self.sources);
        match all.find(|placed| placed.tensor.name == name) {
            Some(placed) => placed.gather(),
            None => Err(Error::Invalid(format!(
                "the program has neither an output nor a source `{name}`; gradients are outputs only \
                 when asked for at compile time"
            ))),
        }
    }

    /// The first output's only element: the loss of the last step.
    ///
    /// # Errors
    /// `Invalid` when the program has no scalar output.
    pub fn loss(&self) -> Result<f64> {
        let first = self.outputs.first().map(Placed::gather).transpose()?;
        match first.as_ref().map(HostTensor::elements) {
            Some(Elements::F32(data)) if data.len() == 1 => Ok(f64::from(data[0])),
            _ => Err(Error::Invalid(
                "the program has no scalar loss as its first output".into(),
            )),
        }
    }

    /// Runs one step on all ranks.
    ///
    /// # Errors
    /// `Invalid` when an input has not been given; the first rank's failure when one fails.
    pub fn step(&mut self) -> Result<Timeline> {
        if let Some(failure) = self.world.failure() {
            return Err(failure);
        }
        if let Some(name) = self.missing.first() {
            return Err(Error::Invalid(format!("input `{name}` has not been given")));
        }
        if self.program.sources.iter().any(is_step) {
            self.set(STEP_INPUT, &HostTensor::scalar((self.n_steps + 1) as f32))?;
        }
        let started = Instant::now();
        let (ranks, world) = (&self.ranks, &self.world);
        self.crew.run(ranks.len(), &|rank_idx| {
            let outcome = catch_unwind(AssertUnwindSafe(|| lock(&ranks[rank_idx]).run()));
            let error = match outcome {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error,
                Err(_) => Error::Internal(format!("rank {rank_idx} panicked")),
            };
            world.fail(&error);
        })?;
        if let Some(failure) = self.world.failure() {
            return Err(failure);
        }
        self.n_steps += 1;
        Ok(self.timeline(started))
    }

    fn timeline(&self, started: Instant) -> Timeline {
        let mut events = Vec::new();
        for (rank, program) in self.ranks.iter().zip(&self.program.ranks) {
            let rank = lock(rank);
            let timed = program
                .instructions
                .iter()
                .zip(&rank.prepared)
                .zip(&rank.clocks);
            events.extend(timed.enumerate().map(
                |(instruction_idx, ((instruction, prepared), clock))| Event {
                    rank: rank.rank,
                    instruction: instruction_idx,
                    name: instruction.name.clone(),
                    category: prepared.category(),
                    start_s: clock.start.saturating_duration_since(started).as_secs_f64(),
                    duration_s: clock.duration_s,
                    wait_s: clock.wait_s,
                    n_flops: instruction.n_flops,
                    n_bytes: instruction.n_bytes,
                },
            ));
        }
        Timeline {
            basis: Basis::Measured,
            n_ranks: self.ranks.len(),
            events,
        }
    }

    fn initialize(&mut self, seed: u32) -> Result<()> {
        let mut tables = Vec::new();
        for placed in &self.sources {
            let tensor = &placed.tensor;
            if let Some(value) = weights::constant(&tensor.name, &tensor.role, &tensor.ty)? {
                tables.push((tensor.name.clone(), value));
            }
        }
        for (name, value) in tables {
            self.set(&name, &value)?;
        }
        let sources: Vec<&Placed> = self
            .sources
            .iter()
            .filter(|placed| {
                let tensor = &placed.tensor;
                matches!(tensor.role, Role::Param(_) | Role::State { .. })
                    && tensor.ty.dtype == DType::F32
            })
            .collect();
        // The first holder of a part makes it, the others copy it: hashing is the dearer one.
        self.crew.run(self.ranks.len(), &|rank_idx| {
            for (placed, idx) in sources.iter().flat_map(|placed| placed.of_rank(rank_idx)) {
                if placed.first_holder(idx) == idx {
                    let PlacedPart { part, address, .. } = &placed.parts[idx];
                    // SAFETY: the part fills its buffer of f32, which belongs to this rank's arena;
                    // no rank runs, and each rank's task touches its own arena alone.
                    let local = unsafe {
                        std::slice::from_raw_parts_mut(address.cast::<f32>(), part.n_elements())
                    };
                    weights::initialize(&placed.tensor.role, seed, part, local);
                }
            }
        })?;
        self.crew.run(self.ranks.len(), &|rank_idx| {
            for (placed, idx) in sources.iter().flat_map(|placed| placed.of_rank(rank_idx)) {
                let holder = placed.first_holder(idx);
                if holder != idx {
                    let PlacedPart { part, address, .. } = &placed.parts[idx];
                    let from = placed.parts[holder].address;
                    // SAFETY: equal parts fill buffers of one size that do not overlap; the holder's
                    // was made above and nobody writes to it here.
                    unsafe { address.copy_from_nonoverlapping(from, part.n_elements()) };
                }
            }
        })
    }
}

impl Placed {
    /// The parts of a rank, by their index.
    fn of_rank(&self, rank: usize) -> impl Iterator<Item = (&Placed, usize)> {
        let parts = self.parts.iter().enumerate();
        parts
            .filter(move |(_, part)| part.rank == rank)
            .map(move |(idx, _)| (self, idx))
    }

    /// The first part that equals part `idx`.
    fn first_holder(&self, idx: usize) -> usize {
        let own = &self.parts[idx].part;
        self.parts
            .iter()
            .position(|other| other.part == *own)
            .unwrap_or(idx)
    }

    fn gather(&self) -> Result<HostTensor> {
        if !self.tensor.layout.partial.is_empty() {
            return Err(Error::Internal(format!(
                "`{}` is a partial value on the ranks and cannot be gathered",
                self.tensor.name
            )));
        }
        let mut whole = HostTensor::zeros(self.tensor.ty.clone())?;
        for PlacedPart { part, address, .. } in &self.parts {
            // SAFETY: called through a reference to the session, outside of `step`: no rank runs. The
            // part was checked against its buffer.
            unsafe { part.put(*address, &mut whole) };
        }
        Ok(whole)
    }
}

impl Rank {
    fn new(
        program: &Program,
        mut communicator: ThreadCommunicator,
        kernels: &KernelTable,
        n_threads: usize,
    ) -> Result<Rank> {
        let rank = communicator.rank();
        let mut arena = Arena::allocate(program.ranks[rank].arena_bytes)?;
        let prepared = prepare(program, rank, &mut arena, kernels, &mut communicator)?;
        let scratch = prepared
            .iter()
            .map(Prepared::scratch_elements)
            .max()
            .unwrap_or(0);
        let now = Clock {
            start: Instant::now(),
            duration_s: 0.0,
            wait_s: 0.0,
        };
        Ok(Rank {
            rank,
            clocks: vec![now; prepared.len()],
            prepared,
            communicator,
            pool: WorkerPool::new(n_threads)?,
            scratch: (1..n_threads).map(|_| vec![0.0; scratch]).collect(),
            arena,
        })
    }

    /// Runs all instructions once.
    fn run(&mut self) -> Result<()> {
        for instruction_idx in 0..self.prepared.len() {
            let waited_s = self.communicator.stats().wait_s;
            let start = Instant::now();
            self.execute(instruction_idx)?;
            self.clocks[instruction_idx] = Clock {
                start,
                duration_s: start.elapsed().as_secs_f64(),
                wait_s: self.communicator.stats().wait_s - waited_s,
            };
        }
        Ok(())
    }

    fn execute(&mut self, instruction_idx: usize) -> Result<()> {
        match &self.prepared[instruction_idx] {
            Prepared::Kernel {
                function,
                args,
                n_rows,
                divisible,
            } => run_kernel(&self.pool, *function, args, *n_rows, *divisible),
            Prepared::Contract { plan, a, b, c } => {
                // SAFETY: `prepare` checked the spans against the buffers and c against a and b.
                unsafe { plan.run_raw_on(&self.pool, *a, *b, *c) }
            }
            Prepared::Attention {
                plan,
                kernel,
                args,
                scratch,
            } => {
                let scratch = per_thread(*scratch, &mut self.scratch);
                // SAFETY: `prepare` made the plan from the buffers' types and checked that results
                // and scratch are disjoint from the rest.
                unsafe { plan.forward(&self.pool, *kernel, *args, &scratch) }
            }
            Prepared::AttentionGrad {
                plan,
                kernel,
                args,
                scratch,
            } => {
                let scratch = per_thread(*scratch, &mut self.scratch);
                // SAFETY: as above.
                unsafe { plan.backward(&self.pool, *kernel, *args, &scratch) }
            }
            Prepared::Routine {
                routine,
                inputs,
                results,
            } => {
                // SAFETY: `prepare` made the routine from the buffers' types and checked that results
                // are disjoint from the rest.
                unsafe { routine.run(inputs, results) };
                Ok(())
            }
            Prepared::Collective {
                call,
                group,
                src,
                n_src,
                dst,
                n_dst,
            } => {
                let in_place = *src == dst.cast_const();
                // SAFETY: both buffers lie in this rank's arena and hold as many 32-bit elements;
                // they are disjoint (`prepare`) unless in place, when `src` is not used.
                let (src, dst) = unsafe {
                    let n_src = if in_place { 0 } else { *n_src };
                    (
                        std::slice::from_raw_parts(*src, n_src),
                        std::slice::from_raw_parts_mut(*dst, *n_dst),
                    )
                };
                let communicator = &mut self.communicator;
                match call {
                    Call::AllGather(division) => {
                        communicator.all_gather(*group, src, dst, division)
                    }
                    Call::AllReduce(kind) => {
                        let src = (!in_place).then(|| as_f32(src));
                        communicator.all_reduce(*group, *kind, src, as_f32_mut(dst))
                    }
                    Call::ReduceScatter(kind, division) => communicator.reduce_scatter(
                        *group,
                        *kind,
                        as_f32(src),
                        as_f32_mut(dst),
                        division,
                    ),
                    Call::AllToAll(crossing) => communicator.all_to_all(*group, src, dst, crossing),
                    Call::CollectivePermute { from } => {
                        communicator.collective_permute(*group, *from, src, dst)
                    }
                    Call::Broadcast => communicator.broadcast(*group, src, dst),
                }
            }
            Prepared::Send { to, src, n_words } => {
                // SAFETY: the buffer lies in this rank's arena and holds as many 32-bit elements.
                let src = unsafe { std::slice::from_raw_parts(*src, *n_words) };
                self.communicator.send(*to, src)
            }
            Prepared::Recv { from, dst, n_words } => {
                // SAFETY: as above; nobody else uses this rank's arena while it runs.
                let dst = unsafe { std::slice::from_raw_parts_mut(*dst, *n_words) };
                self.communicator.recv(*from, dst)
            }
        }
    }
}

fn run_kernel(
    pool: &WorkerPool,
    function: KernelFn,
    args: &[*mut std::ffi::c_void],
    n_rows: usize,
    divisible: bool,
) -> Result<()> {
    let n_parts = if divisible {
        pool.n_threads().min(n_rows)
    } else {
        1
    };
    if n_parts <= 1 {
        // SAFETY: the table's functions follow the contract of their symbols, and `prepare` took the
        // arguments from the instruction that the compiler wrote for this symbol.
        unsafe { function(args.as_ptr(), 0, n_rows as i64) };
        return Ok(());
    }
    struct Args<'a>(&'a [*mut std::ffi::c_void]);
    // SAFETY: the kernel is splittable: disjoint row ranges may run at the same time.
    unsafe impl Sync for Args<'_> {}
    let args = Args(args);
    pool.run(n_parts, &|part| {
        let Args(args) = &args;
        let (begin, end) = (n_rows * part / n_parts, n_rows * (part + 1) / n_parts);
        // SAFETY: as above, for a part of the rows.
        unsafe { function(args.as_ptr(), begin as i64, end as i64) };
    })
}

/// The scratch of every thread: the arena's for the first.
fn per_thread(first: *mut f32, others: &mut [Vec<f32>]) -> Vec<*mut f32> {
    std::iter::once(first)
        .chain(others.iter_mut().map(|s| s.as_mut_ptr()))
        .collect()
}

fn as_f32(words: &[u32]) -> &[f32] {
    // SAFETY: f32 and u32 have one size and alignment, and all bits are legal in both.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len()) }
}

fn as_f32_mut(words: &mut [u32]) -> &mut [f32] {
    // SAFETY: as in `as_f32`.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len()) }
}

fn is_step(source: &GlobalTensor) -> bool {
    let scalar = TensorType {
        dtype: DType::F32,
        shape: Vec::new(),
    };
    source.name == STEP_INPUT && source.role == Role::Input && source.ty == scalar
}

/// What concerns the program as a whole.
fn check(program: &Program, kernels: &KernelTable) -> Result<()> {
    let n_ranks = program.ranks.len();
    if program.version != meshweave_dsl::program::PROGRAM_VERSION {
        return Err(Error::Invalid(format!(
            "the program is of version {}, this runtime executes version {}; compile again",
            program.version,
            meshweave_dsl::program::PROGRAM_VERSION
        )));
    }
    if n_ranks == 0 || n_ranks != program.mesh.n_ranks() {
        return Err(Error::Invalid(format!(
            "damaged program: {n_ranks} ranks on a mesh of {}; compile again",
            program.mesh.n_ranks()
        )));
    }
    if kernels.functions.len() != program.kernels.len() {
        return Err(Error::Invalid(format!(
            "damaged program: {} kernels are listed, {} were given; compile again",
            program.kernels.len(),
            kernels.functions.len()
        )));
    }
    Ok(())
}

fn place(program: &Program, tensors: &[GlobalTensor], ranks: &mut [Rank]) -> Result<Vec<Placed>> {
    let damaged = |name: &str, what: String| {
        Error::Invalid(format!(
            "damaged program: `{name}` lies {what}; compile again"
        ))
    };
    let place_part = |ranks: &mut [Rank], tensor: &GlobalTensor, part: &TensorPart| {
        let (name, rank_idx, id) = (&tensor.name, part.rank, part.buffer.index());
        let n_ranks = ranks.len();
        let rank = ranks
            .get_mut(rank_idx)
            .ok_or_else(|| damaged(name, format!("on rank {rank_idx} of {n_ranks}")))?;
        let buffer = program.ranks[rank_idx].buffers.get(id).ok_or_else(|| {
            damaged(
                name,
                format!("in buffer {id} on rank {rank_idx}, which does not exist"),
            )
        })?;
        Ok(PlacedPart {
            rank: rank_idx,
            part: Part::new(name, &tensor.ty, &part.region, &buffer.ty)?,
            address: rank.arena.address(buffer)?.cast(),
        })
    };
    tensors
        .iter()
        .map(|tensor| {
            if tensor.parts.is_empty() {
                return Err(damaged(&tensor.name, "nowhere".into()));
            }
            let parts = tensor.parts.iter();
            let parts = parts.map(|part| place_part(ranks, tensor, part));
            Ok(Placed {
                tensor: tensor.clone(),
                parts: parts.collect::<Result<_>>()?,
            })
        })
        .collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
