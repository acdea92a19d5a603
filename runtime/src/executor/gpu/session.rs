//! Sessions whose ranks are all on one GPU.
//!
//! In: a program, its code, the device. Out: the session, its steps' timelines, how the device is used.
//! Invariant: as for sessions of threads; the first values are those that threads would be given.

use std::sync::Mutex;

use meshweave_dsl::device_code::DeviceCode;
use meshweave_dsl::program::{Action, Program};
use meshweave_dsl::timeline::{Basis, Category, Event, Timeline};
use std::sync::Arc;

use super::{Choice, OnGpu};
use crate::collective::Communicator;
use crate::device::gpu::Gpu;
use crate::error::Result;
use crate::executor::place::Placed;
use crate::executor::{KernelTable, Session, SessionOptions, check, check_n_ranks, lock};
use crate::weights;

/// How a program uses a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuUse {
    /// The device in words.
    pub name: String,
    /// Contractions of all ranks that the device's library does.
    pub n_by_library: usize,
    /// Contractions that generated kernels do.
    pub n_generated: usize,
    /// Bytes besides arenas and channels: tables, and elements on their way to other devices.
    pub other_bytes: usize,
    /// Bytes of the host's memory, pinned, for what is offloaded.
    pub host_bytes: usize,
}

impl Session {
    /// Starts all ranks on one GPU, with the code that was compiled for it.
    ///
    /// # Errors
    /// As for [`Session::new`], and when the code does not fit the program or the device.
    pub fn on_gpu(
        program: Program,
        code: &DeviceCode,
        gpu: Box<dyn Gpu>,
        options: &SessionOptions,
    ) -> Result<Session> {
        check(&program)?;
        let gpu = OnGpu::new(&program, code, gpu, None)?;
        Session::assemble(
            Arc::new(program),
            KernelTable::none(),
            Vec::new(),
            Some((gpu, None)),
            options,
        )
    }

    /// Starts the rank that `communicator` is the end of, on a GPU of its own; the others run elsewhere,
    /// on theirs. The communicator brings them together, listens to the others while a step runs, and
    /// carries what is gathered; collectives go from device to device, or through it where some device
    /// has no library for that.
    ///
    /// # Errors
    /// As for [`Session::on_gpu`] and [`Session::one_of`].
    pub fn one_on_gpu(
        program: Program,
        code: &DeviceCode,
        gpu: Box<dyn Gpu>,
        options: &SessionOptions,
        mut communicator: Box<dyn Communicator>,
    ) -> Result<Session> {
        check(&program)?;
        check_n_ranks(&program, communicator.as_ref())?;
        let program = Arc::new(program);
        communicator.follow(&program)?;
        let gpu = OnGpu::new(&program, code, gpu, Some(communicator.as_mut()))?;
        Session::assemble(
            program,
            KernelTable::none(),
            Vec::new(),
            Some((gpu, Some(communicator))),
            options,
        )
    }

    /// Where all ranks are on a GPU: the device, the contractions that its library does and those that
    /// generated kernels do, and the bytes that it holds besides arenas and channels.
    pub fn gpu(&self) -> Option<GpuUse> {
        let gpu = lock(self.gpu.as_ref()?);
        Some(GpuUse {
            name: gpu.name(),
            n_by_library: gpu.n_contractions(Choice::Library),
            n_generated: gpu.n_contractions(Choice::Generated),
            other_bytes: gpu.other_bytes(),
            host_bytes: gpu.host_bytes(),
        })
    }

    /// Runs one step; the session is over when it fails.
    pub(in crate::executor) fn step_gpu(&self, gpu: &Mutex<OnGpu>) -> Result<Timeline> {
        let mut gpu = lock(gpu);
        let mut communicator = self.communicator.as_ref().map(lock);
        let communicator = communicator
            .as_mut()
            .map(|guard| &mut ***guard as &mut dyn Communicator);
        match gpu.step(&self.program, communicator) {
            Ok(()) => Ok(self.gpu_timeline(&gpu)),
            Err(error) => {
                lock(&self.failure).get_or_insert_with(|| error.clone());
                Err(error)
            }
        }
    }

    /// The times of the last step whose instructions were timed.
    fn gpu_timeline(&self, gpu: &OnGpu) -> Timeline {
        let events = gpu.ranks().into_iter().flat_map(|rank| {
            let program = &self.program.ranks[rank];
            let timed = program.instructions.iter().zip(gpu.spans(rank)).enumerate();
            timed.map(move |(instruction_idx, (instruction, span))| Event {
                rank,
                instruction: instruction_idx,
                name: instruction.name.clone(),
                category: category(&instruction.action),
                start_s: span.start_s,
                duration_s: span.duration_s,
                wait_s: 0.0,
                n_flops: instruction.n_flops,
                n_bytes: instruction.n_bytes,
                received_bytes: None,
            })
        });
        Timeline {
            basis: Basis::Measured,
            n_ranks: self.program.ranks.len(),
            events: events.collect(),
        }
    }

    pub(in crate::executor) fn initialize_gpu(&self, sources: &[&Placed], seed: u32) -> Result<()> {
        for placed in sources {
            let mut made: Vec<Option<Vec<f32>>> = vec![None; placed.parts.len()];
            for (idx, here) in placed.parts.iter().enumerate() {
                let holder = placed.first_holder(idx);
                let values = made[holder].get_or_insert_with(|| {
                    let mut values = vec![0.0; here.part.n_elements()];
                    weights::initialize(&placed.tensor.role, seed, &here.part, &mut values);
                    values
                });
                // SAFETY: equal parts have equally many words.
                self.fill(placed, here, |words| unsafe {
                    words.copy_from_nonoverlapping(values.as_ptr().cast(), values.len());
                })?;
            }
        }
        Ok(())
    }
}

/// The category of an instruction in timelines.
fn category(action: &Action) -> Category {
    match action {
        Action::Kernel { .. } => Category::Kernel,
        Action::Contract { .. } => Category::Contract,
        Action::Attention { .. } | Action::AttentionGrad { .. } => Category::Attention,
        Action::Routine { .. } => Category::Routine,
        Action::Collective { .. } => Category::Collective,
        Action::Send { .. } | Action::Recv { .. } => Category::Message,
    }
}
