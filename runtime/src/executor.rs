//! Executes a program: one thread a rank, each with its arena and its list of instructions, or all ranks
//! on a GPU.
//!
//! In: a [`Program`] and its kernels, then values of sources by name. Out: per step the measured
//! [`Timeline`]; on demand, sources and outputs gathered from all ranks.
//! Invariant: between steps no rank runs, so arenas may be read and written; a step runs every rank's
//! instructions in order, or fails as a whole, after which the session refuses further steps.

mod drill;
mod gpu;
mod kernels;
mod place;
mod prepare;
mod rank;
mod rows;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::{Role, TensorType};
use meshweave_dsl::program::{BufferId, GlobalTensor, Program};
use meshweave_dsl::timeline::{Basis, Event, Timeline};

use crate::collective::threads::{WaitOptions, World};
use crate::collective::{CollectiveStats, Communicator, exchange_texts};
use crate::error::{Error, Result};
use crate::pool::WorkerPool;
use crate::tensor::{Elements, HostTensor};
use crate::weights;
pub use drill::{Drill, Mishap};
use gpu::OnGpu;
pub use gpu::{Choice, GpuUse};
pub use kernels::KernelTable;
use place::{Placed, PlacedPart, Words, place};
pub(crate) use place::{holders, is_kept};
use rank::Rank;

/// The scalar input that counts steps from 1; the session gives it by itself.
const STEP_INPUT: &str = "step";

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

/// A program in execution: all of its ranks in this process, or one of them.
pub struct Session {
    program: Arc<Program>,
    /// What stopped the session.
    failure: Mutex<Option<Error>>,
    /// One thread a rank.
    crew: WorkerPool,
    /// The ranks of this process, in order; none where they are on a GPU.
    ranks: Vec<Mutex<Rank>>,
    /// The ranks of this process, where they are on a GPU.
    gpu: Option<Mutex<OnGpu>>,
    /// Their way to other processes, where there are some.
    communicator: Option<Mutex<Box<dyn Communicator>>>,
    sources: Vec<Placed>,
    outputs: Vec<Placed>,
    /// Inputs that no one has given yet.
    missing: BTreeSet<String>,
    n_steps: usize,
    /// What is rehearsed on a GPU, and the buffer of which a bit flips when it is about divergence.
    gpu_drill: Option<(Drill, BufferId)>,
    /// Holds the code that the ranks' instructions call; after them, so that it is unloaded last.
    _kernels: KernelTable,
}

impl Session {
    /// Starts all ranks in this process, a thread each: allocates the arenas, prepares all
    /// instructions, and gives parameters, states and constants their initial values.
    ///
    /// # Errors
    /// `Invalid` when the program is damaged or of another version; `Unsupported` when it needs what
    /// the host lacks; `Exhausted` when memory or threads do not suffice.
    pub fn new(
        program: Program,
        kernels: KernelTable,
        options: &SessionOptions,
    ) -> Result<Session> {
        let n_ranks = program.ranks.len();
        let wait = WaitOptions {
            timeout: options.timeout,
            ..WaitOptions::for_threads(n_ranks * threads_per_device(options, n_ranks))
        };
        let communicators = World::new(n_ranks, wait).communicators().into_iter();
        let communicators = communicators.map(|communicator| Box::new(communicator) as _);
        Session::start(program, kernels, options, communicators.collect())
    }

    /// Starts the rank that `communicator` is the end of; the others run elsewhere.
    ///
    /// All ranks call [`Session::step`], [`Session::get`] and [`Session::loss`] together.
    ///
    /// # Errors
    /// As for [`Session::new`]; `Invalid` when the program is for another number of ranks.
    pub fn one_of(
        program: Program,
        kernels: KernelTable,
        options: &SessionOptions,
        communicator: Box<dyn Communicator>,
    ) -> Result<Session> {
        check_n_ranks(&program, communicator.as_ref())?;
        Session::start(program, kernels, options, vec![communicator])
    }

    fn start(
        program: Program,
        kernels: KernelTable,
        options: &SessionOptions,
        communicators: Vec<Box<dyn Communicator>>,
    ) -> Result<Session> {
        check(&program)?;
        check_kernels(&program, &kernels)?;
        let program = Arc::new(program);
        let n_threads = threads_per_device(options, communicators.len());
        let mut ranks = Vec::with_capacity(communicators.len());
        for mut communicator in communicators {
            communicator.follow(&program)?;
            ranks.push(Rank::new(&program, communicator, &kernels, n_threads)?);
        }
        Session::assemble(program, kernels, ranks, None, options)
    }

    fn assemble(
        program: Arc<Program>,
        kernels: KernelTable,
        mut ranks: Vec<Rank>,
        gpu: Option<(OnGpu, Option<Box<dyn Communicator>>)>,
        options: &SessionOptions,
    ) -> Result<Session> {
        let (gpu, communicator) = gpu.unzip();
        let on_gpu = gpu.as_ref().map_or_else(Vec::new, OnGpu::ranks);
        let sources = place(&program, &program.sources, &mut ranks, &on_gpu)?;
        let outputs = place(&program, &program.outputs, &mut ranks, &on_gpu)?;
        let missing = program
            .sources
            .iter()
            .filter(|source| source.role == Role::Input && !is_step(source))
            .map(|source| source.name.clone())
            .collect();
        let mut session = Session {
            failure: Mutex::new(None),
            crew: WorkerPool::new(ranks.len().max(1))?,
            gpu: gpu.map(Mutex::new),
            communicator: communicator.flatten().map(Mutex::new),
            ranks: ranks.into_iter().map(Mutex::new).collect(),
            sources,
            outputs,
            missing,
            n_steps: 0,
            gpu_drill: None,
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
        if let Some(gpu) = &self.gpu {
            return lock(gpu).arena_bytes();
        }
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

    /// The ranks of this process.
    pub fn ranks(&self) -> Vec<usize> {
        if let Some(gpu) = &self.gpu {
            return lock(gpu).ranks();
        }
        self.ranks.iter().map(|rank| lock(rank).rank).collect()
    }

    /// Every process' text, where the ranks are processes; this one's alone otherwise.
    ///
    /// # Errors
    /// That of a rank which does not come.
    pub fn exchange(&self, text: &str) -> Result<Vec<String>> {
        let own = || Ok(vec![text.to_string()]);
        if self.ranks.len() > 1 {
            return own();
        }
        self.with_communicator(|communicator| exchange_texts(communicator, text))
            .unwrap_or_else(own)
    }

    /// After a failure: which rank's failure is the one to report, when the others have been heard out
    /// for up to `patience`.
    pub fn settle(&self, patience: Duration) -> Option<(usize, Error)> {
        self.with_communicator(|communicator| communicator.settle(patience))?
    }

    /// Tells all other processes that this one has failed.
    pub fn abort(&self, error: &Error) {
        lock(&self.failure).get_or_insert_with(|| error.clone());
        let _ = self.with_communicator(|communicator| communicator.abort(error));
    }

    /// Ends the session together with all other processes.
    ///
    /// # Errors
    /// `Exhausted` when the others do not come.
    pub fn finish(self) -> Result<()> {
        if let Some(communicator) = &self.communicator {
            return lock(communicator).finish();
        }
        let mut ranks = self.ranks.iter();
        ranks.try_for_each(|rank| lock(rank).communicator.finish())
    }

    /// Calls `f` with the first rank's way to the others; `None` where there is none.
    fn with_communicator<T>(&self, f: impl FnOnce(&mut dyn Communicator) -> T) -> Option<T> {
        match (&self.communicator, self.ranks.first()) {
            (Some(communicator), _) => Some(f(lock(communicator).as_mut())),
            (None, Some(rank)) => Some(f(lock(rank).communicator.as_mut())),
            (None, None) => None,
        }
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
        for here in &placed.parts {
            // SAFETY: the part was checked against its buffer, whose words these are.
            self.fill(placed, here, |words| unsafe { here.part.cut(value, words) })?;
        }
        self.missing.remove(name);
        Ok(())
    }

    /// A source or an output, gathered from the ranks.
    ///
    /// # Errors
    /// `Invalid` when there is no tensor of this name; that of a rank which does not come, where the
    /// ranks are processes.
    pub fn get(&self, name: &str) -> Result<HostTensor> {
        let mut all = self.outputs.iter().chain(&self.sources);
        match all.find(|placed| placed.tensor.name == name) {
            Some(placed) => self.gather(placed),
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
        let first = self
            .outputs
            .first()
            .filter(|first| first.tensor.ty.n_elements() == 1);
        let first = first.map(|first| self.gather(first)).transpose()?;
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
        if let Some(failure) = &*lock(&self.failure) {
            return Err(failure.clone());
        }
        if let Some(name) = self.missing.first() {
            return Err(Error::Invalid(format!("input `{name}` has not been given")));
        }
        if self.program.sources.iter().any(is_step) {
            self.set(STEP_INPUT, &HostTensor::scalar((self.n_steps + 1) as f32))?;
        }
        self.rehearse_on_gpu()?;
        if let Some(gpu) = &self.gpu {
            let timeline = self.step_gpu(gpu)?;
            self.n_steps += 1;
            return Ok(timeline);
        }
        let started = Instant::now();
        let (ranks, failure, n_steps) = (&self.ranks, &self.failure, self.n_steps);
        self.crew.run(ranks.len(), &|rank_idx| {
            let outcome = catch_unwind(AssertUnwindSafe(|| lock(&ranks[rank_idx]).run(n_steps)));
            let error = match outcome {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error,
                Err(_) => Error::Internal(format!("rank {} panicked", lock(&ranks[rank_idx]).rank)),
            };
            // Before the others hear of it and return the same: the first failure is the one to tell.
            lock(failure).get_or_insert_with(|| error.clone());
            lock(&ranks[rank_idx]).communicator.abort(&error);
        })?;
        if let Some(failure) = &*lock(&self.failure) {
            return Err(failure.clone());
        }
        self.n_steps += 1;
        Ok(self.timeline(started))
    }

    fn timeline(&self, started: Instant) -> Timeline {
        let mut events = Vec::new();
        for rank in &self.ranks {
            let rank = lock(rank);
            let timed = self.program.ranks[rank.rank]
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
                    received_bytes: prepared.is_exchange().then_some(clock.received_bytes),
                },
            ));
        }
        Timeline {
            basis: Basis::Measured,
            n_ranks: self.program.ranks.len(),
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
        if self.gpu.is_some() {
            return self.initialize_gpu(&sources, seed);
        }
        // The first holder of a part makes it, the others copy it: hashing is the dearer one.
        let numbers: Vec<usize> = self.ranks.iter().map(|rank| lock(rank).rank).collect();
        self.crew.run(numbers.len(), &|rank_idx| {
            let rank = numbers[rank_idx];
            for (placed, idx) in sources.iter().flat_map(|placed| placed.of_rank(rank)) {
                if placed.first_holder(idx) == idx {
                    let PlacedPart { part, words, .. } = &placed.parts[idx];
                    let Words::Here(address) = words else {
                        continue;
                    };
                    // SAFETY: the part fills its buffer of f32, which belongs to this rank's arena;
                    // no rank runs, and each rank's task touches its own arena alone.
                    let local = unsafe {
                        std::slice::from_raw_parts_mut(address.cast::<f32>(), part.n_elements())
                    };
                    weights::initialize(&placed.tensor.role, seed, part, local);
                }
            }
        })?;
        self.crew.run(numbers.len(), &|rank_idx| {
            let rank = numbers[rank_idx];
            for (placed, idx) in sources.iter().flat_map(|placed| placed.of_rank(rank)) {
                let holder = placed.first_holder(idx);
                if holder != idx {
                    let PlacedPart { part, words, .. } = &placed.parts[idx];
                    let (Words::Here(address), Words::Here(from)) =
                        (words, &placed.parts[holder].words)
                    else {
                        continue;
                    };
                    // SAFETY: equal parts fill buffers of one size that do not overlap; the holder's
                    // was made above and nobody writes to it here.
                    unsafe { address.copy_from_nonoverlapping(*from, part.n_elements()) };
                }
            }
        })
    }
}

/// Threads of each of `n_here` ranks in this process.
fn threads_per_device(options: &SessionOptions, n_here: usize) -> usize {
    let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
    let shared = n_cores / n_here.max(1);
    options.threads_per_device.unwrap_or(shared).max(1)
}

fn is_step(source: &GlobalTensor) -> bool {
    let scalar = TensorType {
        dtype: DType::F32,
        shape: Vec::new(),
    };
    source.name == STEP_INPUT && source.role == Role::Input && source.ty == scalar
}

/// What concerns the program as a whole.
fn check(program: &Program) -> Result<()> {
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
    Ok(())
}

/// Whether as many processes were started as the program has ranks.
fn check_n_ranks(program: &Program, communicator: &dyn Communicator) -> Result<()> {
    let (n_ranks, n_found) = (program.ranks.len(), communicator.n_ranks());
    if n_ranks == n_found {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "the program is for {n_ranks} ranks, {n_found} were started; start as many processes as its mesh \
         has ranks"
    )))
}

/// Whether the kernels are those of the program.
fn check_kernels(program: &Program, kernels: &KernelTable) -> Result<()> {
    if kernels.len() != program.kernels.len() {
        return Err(Error::Invalid(format!(
            "damaged program: {} kernels are listed, {} were given; compile again",
            program.kernels.len(),
            kernels.len()
        )));
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
