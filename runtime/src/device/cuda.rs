//! A GPU through CUDA's driver, loaded when it is first used.
//!
//! In: the index of a device. Out: the device as a [`Gpu`], or what was looked for, what was found and
//! the way out.
//! Invariant: the device's context is current in the calling thread before every call; nothing is freed
//! while work that may use it is under way. Without a driver no function of it is called.

mod blas;
mod nccl;
mod nvrtc;

use std::ffi::{CString, c_void};
use std::sync::atomic::{Ordering, fence};

use cudarc::driver::{result, sys};
use meshweave_dsl::device_code::{Grid, Module};

use super::gpu::{
    Address, CallIdx, Command, EventIdx, FunctionIdx, Gpu, GraphIdx, ModuleIdx, Product,
    ProductIdx, StreamIdx, TeamIdx, Value, Work,
};
use super::target::is_exact;
use crate::error::{Error, Result};
use blas::Blas;
use nccl::Team;
pub use nvrtc::ptx_of;

/// The oldest driver whose functions all exist, as `cuDriverGetVersion` gives it: CUDA 12.8.
const OLDEST_DRIVER: i32 = 12_080;

/// How products of f32 are made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Precision {
    /// Factors and sums of f32.
    #[default]
    F32,
    /// Factors rounded to 10 bits (TF32), sums of f32: tensor cores.
    Tf32,
}

/// A device of this machine.
pub struct Cuda {
    device: sys::CUdevice,
    context: sys::CUcontext,
    name: String,
    capability: (u32, u32),
    target: String,
    memory: Vec<sys::CUdeviceptr>,
    /// Pinned memory of the host.
    host_memory: Vec<Address>,
    modules: Vec<sys::CUmodule>,
    functions: Vec<(sys::CUfunction, Grid)>,
    streams: Vec<sys::CUstream>,
    events: Vec<sys::CUevent>,
    graphs: Vec<sys::CUgraphExec>,
    blas: Option<Blas>,
    teams: Vec<Team>,
    /// A word a call in pinned memory: [`ASKED`] by its stream, [`ANSWERED`] by the host.
    calls: Address,
    /// Calls that the host has heard of and not answered.
    is_heard: Vec<bool>,
}

/// What a stream leaves for the host.
const ASKED: u32 = 1;

/// What it then waits for.
const ANSWERED: u32 = 2;

// SAFETY: the handles may be used by any thread in whose the context is current, which every method sees
// to; methods take the device by exclusive reference.
unsafe impl Send for Cuda {}

/// How many devices this machine has.
///
/// # Errors
/// `Exhausted` when there is no driver, or none that is new enough.
pub fn n_devices() -> Result<usize> {
    // SAFETY: looks for a library and loads it; NVIDIA's driver has no other initializers than its own.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Exhausted(
            "no CUDA driver: libcuda.so.1 was looked for where the system's loader looks and is not there; \
             install NVIDIA's driver (570 or newer), or run with `--backend threads`"
                .into(),
        ));
    }
    let mut version = 0;
    // SAFETY: the driver is there; this call needs no initialization.
    unsafe { sys::cuDriverGetVersion(&mut version) }
        .result()
        .map_err(|error| driver_error("cannot ask the CUDA driver for its version", error))?;
    if version < OLDEST_DRIVER {
        return Err(Error::Exhausted(format!(
            "the CUDA driver is for CUDA {}.{}, 12.8 is needed; install NVIDIA's driver 570 or newer, or \
             run with `--backend threads`",
            version / 1000,
            version % 1000 / 10
        )));
    }
    result::init()
        .map_err(|error| driver_error("the CUDA driver is there but does not start", error))?;
    let n_devices = result::device::get_count()
        .map_err(|error| driver_error("cannot count CUDA devices", error))?;
    Ok(usize::try_from(n_devices).unwrap_or(0))
}

impl Cuda {
    /// Opens a device.
    ///
    /// # Errors
    /// `Exhausted` when there is no driver, none that is new enough, or no such device; each says what
    /// was found and how to go on without.
    pub fn open(ordinal: usize, precision: Precision) -> Result<Cuda> {
        let n_devices = n_devices()?;
        if ordinal >= n_devices {
            return Err(Error::Exhausted(format!(
                "device {ordinal} was asked for, the CUDA driver shows {n_devices}; give another one with \
                 --device, look at CUDA_VISIBLE_DEVICES, or run with `--backend threads`"
            )));
        }
        let failed = |error| driver_error(&format!("cannot open CUDA device {ordinal}"), error);
        let device = result::device::get(ordinal as i32).map_err(failed)?;
        let attribute = |attribute| {
            // SAFETY: the driver gave this device.
            unsafe { result::device::get_attribute(device, attribute) }.map_err(failed)
        };
        let major =
            attribute(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor =
            attribute(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let name = result::device::get_name(device).map_err(failed)?;
        if major < 8 {
            return Err(Error::Unsupported(format!(
                "{name} (device {ordinal}) has compute capability {major}.{minor}, 8.0 is needed; give \
                 another one with --device, or run with `--backend threads`"
            )));
        }
        // SAFETY: the device exists; the context is released when this value is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed)?;
        let mut cuda = Cuda {
            device,
            context,
            name,
            capability: (major as u32, minor as u32),
            target: format!("sm_{major}{minor}"),
            memory: Vec::new(),
            host_memory: Vec::new(),
            modules: Vec::new(),
            functions: Vec::new(),
            streams: Vec::new(),
            events: Vec::new(),
            graphs: Vec::new(),
            blas: None,
            teams: Vec::new(),
            calls: 0,
            is_heard: Vec::new(),
        };
        cuda.enter()?;
        cuda.blas = Blas::load(precision)?;
        Ok(cuda)
    }

    /// The same device, on which generated kernels make all products.
    pub fn without_library(mut self) -> Self {
        self.blas = None;
        self
    }

    /// What code has to be compiled for: `sm_90`.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// Makes the device's context the calling thread's.
    fn enter(&self) -> Result<()> {
        // SAFETY: the context is retained as long as this value lives.
        unsafe { result::ctx::set_current(self.context) }
            .map_err(|error| self.error("cannot use the device", error))
    }

    fn error(&self, what: &str, error: result::DriverError) -> Error {
        driver_error(&format!("{what} on {}", self.name), error)
    }

    /// Whether what was asked about is done.
    fn is_over(&self, state: sys::CUresult, what: &str) -> Result<bool> {
        match state {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            state => state
                .result()
                .map(|()| true)
                .map_err(|error| self.error(what, error)),
        }
    }

    fn start(&mut self, command: &Command) -> Result<()> {
        let stream = self.streams[command.stream.0];
        let failed = |what: &str, error| driver_error(&format!("{what} on {}", self.name), error);
        match &command.work {
            Work::Launch { function, args } => {
                let (function, grid) = self.functions[function.0];
                let mut values: Vec<[u8; 8]> = args.iter().map(bytes_of).collect();
                let mut pointers: Vec<*mut c_void> = values
                    .iter_mut()
                    .map(|value| value.as_mut_ptr().cast())
                    .collect();
                let ([bx, by, bz], [tx, ty, tz]) = (grid.blocks, grid.threads);
                // SAFETY: the function is of a loaded module; the driver copies the arguments, which
                // stand in the order of its parameters (the code's invariant), before it returns.
                unsafe {
                    result::launch_kernel(
                        function,
                        (bx, by, bz),
                        (tx, ty, tz),
                        grid.shared_bytes,
                        stream,
                        &mut pointers,
                    )
                }
                .map_err(|error| failed("cannot launch a kernel", error))
            }
            Work::Copy { to, from, n_bytes } => {
                if *n_bytes == 0 {
                    return Ok(());
                }
                // SAFETY: both ranges lie in memory of this device, or in pinned memory of the host, of
                // which the driver knows by their addresses which is which.
                unsafe { sys::cuMemcpyAsync(*to, *from, *n_bytes, stream) }
                    .result()
                    .map_err(|error| failed("cannot copy", error))
            }
            Work::Product {
                product,
                a,
                b,
                c,
                bias,
            } => match &mut self.blas {
                Some(blas) => {
                    let operands = [*a, *b, *c];
                    blas.run(*product, (operands, *bias), (command.stream, stream))
                }
                None => Err(Error::Internal("a product without its library".into())),
            },
            Work::Exchange { team, sends, recvs } => {
                self.teams[team.0].exchange(sends, recvs, stream)
            }
            Work::AllReduce {
                team,
                kind,
                dtype,
                src,
                dst,
                n_elements,
            } => self.teams[team.0].all_reduce((*kind, *dtype), (*src, *dst, *n_elements), stream),
            Work::Call(CallIdx(call)) => {
                let word = self.calls + 4 * *call as u64;
                let until = sys::CUstreamWaitValue_flags_enum::CU_STREAM_WAIT_VALUE_EQ as u32;
                // SAFETY: the word is one of pinned memory, which has the same address on the device.
                unsafe {
                    sys::cuStreamWriteValue32_v2(stream, word, ASKED, 0)
                        .result()
                        .and_then(|()| {
                            sys::cuStreamWaitValue32_v2(stream, word, ANSWERED, until).result()
                        })
                }
                .map_err(|error| failed("cannot call the host", error))
            }
            Work::Record(EventIdx(event)) => {
                // SAFETY: both handles are this device's.
                unsafe { result::event::record(self.events[*event], stream) }
                    .map_err(|error| failed("cannot record an event", error))
            }
            Work::Wait(EventIdx(event)) => {
                let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
                // SAFETY: as above.
                unsafe { result::stream::wait_event(stream, self.events[*event], flags) }
                    .map_err(|error| failed("cannot wait for an event", error))
            }
        }
    }
}

impl Gpu for Cuda {
    fn name(&self) -> String {
        format!("{} ({})", self.name, self.target)
    }

    fn capability(&self) -> (u32, u32) {
        self.capability
    }

    fn allocate(&mut self, n_bytes: usize) -> Result<Address> {
        self.enter()?;
        // SAFETY: the memory is freed with this value; it is given out zeroed.
        let address = unsafe { result::malloc_sync(n_bytes.max(256)) }.map_err(|error| {
            let (free, total) = result::mem_get_info().unwrap_or((0, 0));
            Error::Exhausted(format!(
                "{} cannot allocate {n_bytes} bytes ({error:?}): {free} of its {total} are free; shard over \
                 more devices or add a memory budget to the plan",
                self.name
            ))
        })?;
        self.memory.push(address);
        // SAFETY: the memory was just allocated.
        unsafe { result::memset_d8_sync(address, 0, n_bytes.max(256)) }
            .map_err(|error| self.error("cannot clear memory", error))?;
        // Streams do not wait for what the device clears.
        self.synchronize()?;
        Ok(address)
    }

    fn allocate_host(&mut self, n_bytes: usize) -> Result<Address> {
        self.enter()?;
        let n_bytes = n_bytes.max(256);
        // SAFETY: the memory is freed with this value; it is given out zeroed.
        let memory = unsafe { result::malloc_host(n_bytes, 0) }.map_err(|error| {
            Error::Exhausted(format!(
                "the host cannot pin {n_bytes} bytes for what is offloaded ({error:?}); offload less, or \
                 raise the limit of locked memory"
            ))
        })?;
        self.host_memory.push(memory as u64);
        // SAFETY: the memory was just allocated, of this size.
        unsafe { memory.cast::<u8>().write_bytes(0, n_bytes) };
        // Host and device share one space of addresses on every 64-bit system.
        Ok(memory as u64)
    }

    fn upload(&mut self, to: Address, words: &[u32]) -> Result<()> {
        self.enter()?;
        if words.is_empty() {
            return Ok(());
        }
        // SAFETY: the address lies in this device's memory, and the words are read before the call returns.
        unsafe { result::memcpy_htod_sync(to, words) }
            .map_err(|error| self.error("cannot copy to the device", error))?;
        // The last bytes may still be on their way, and streams do not wait for them.
        self.synchronize()
    }

    fn download(&mut self, from: Address, words: &mut [u32]) -> Result<()> {
        self.enter()?;
        self.synchronize()?;
        if words.is_empty() {
            return Ok(());
        }
        // SAFETY: as above.
        unsafe { result::memcpy_dtoh_sync(words, from) }
            .map_err(|error| self.error("cannot copy from the device", error))
    }

    fn load(&mut self, module: &Module, target: &str) -> Result<ModuleIdx> {
        self.enter()?;
        let compiled;
        let ptx = match (&module.ptx, &module.source) {
            (Some(ptx), _) => ptx,
            (None, Some(source)) => {
                // Code that is not for this device alone is compiled for it all the same.
                let own = if is_exact(target) {
                    target
                } else {
                    &self.target
                };
                compiled = ptx_of(source, own)?;
                &compiled
            }
            (None, None) => {
                return Err(Error::Invalid(
                    "a module without code; compile again".into(),
                ));
            }
        };
        let image = CString::new(ptx.as_str())
            .map_err(|_| Error::Invalid("PTX with a null byte; compile again".into()))?;
        // SAFETY: the image is a null-terminated string of PTX.
        let module =
            unsafe { result::module::load_data(image.as_ptr().cast()) }.map_err(|error| {
                let refused = self.error("the driver refuses code", error);
                Error::Invalid(format!("{refused}; compile it for {}", self.target))
            })?;
        self.modules.push(module);
        Ok(ModuleIdx(self.modules.len() - 1))
    }

    fn function(&mut self, module: ModuleIdx, name: &str, grid: Grid) -> Result<FunctionIdx> {
        self.enter()?;
        let missing = || Error::Invalid(format!("the code has no kernel `{name}`; compile again"));
        let symbol = CString::new(name).map_err(|_| missing())?;
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(self.modules[module.0], symbol) }
            .map_err(|_| missing())?;
        if grid.shared_bytes > 48 * 1024 {
            let attribute =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function exists.
            unsafe {
                result::function::set_function_attribute(
                    function,
                    attribute,
                    grid.shared_bytes as i32,
                )
            }
            .map_err(|error| {
                let what = format!(
                    "`{name}` cannot have {} bytes of a block's memory",
                    grid.shared_bytes
                );
                self.error(&what, error)
            })?;
        }
        self.functions.push((function, grid));
        Ok(FunctionIdx(self.functions.len() - 1))
    }

    fn product(&mut self, product: &Product) -> Result<Option<ProductIdx>> {
        self.enter()?;
        match &mut self.blas {
            Some(blas) => blas.prepare(product),
            None => Ok(None),
        }
    }

    fn has_teams(&mut self) -> Result<bool> {
        self.enter()?;
        Ok(nccl::is_there())
    }

    fn team_name(&mut self) -> Result<Vec<u32>> {
        self.enter()?;
        nccl::team_name()
    }

    fn join(&mut self, name: &[u32], n_members: usize, member: usize) -> Result<TeamIdx> {
        self.enter()?;
        self.teams.push(Team::join(name, n_members, member)?);
        Ok(TeamIdx(self.teams.len() - 1))
    }

    fn reserve(&mut self, n_streams: usize, n_events: usize, n_calls: usize) -> Result<()> {
        self.enter()?;
        if n_calls > self.is_heard.len() {
            self.calls = self.allocate_host(4 * n_calls)?;
            self.is_heard = vec![false; n_calls];
        }
        while self.streams.len() < n_streams {
            let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
                .map_err(|error| self.error("cannot make a stream", error))?;
            self.streams.push(stream);
        }
        while self.events.len() < n_events {
            let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
                .map_err(|error| self.error("cannot make an event", error))?;
            self.events.push(event);
        }
        Ok(())
    }

    fn calls(&mut self) -> Result<Vec<CallIdx>> {
        self.enter()?;
        let mut found = Vec::new();
        for (idx, is_heard) in self.is_heard.iter_mut().enumerate() {
            // SAFETY: a word of pinned memory, which the device may write at any time.
            let word = unsafe { (self.calls as *const u32).add(idx).read_volatile() };
            if word == ASKED && !*is_heard {
                *is_heard = true;
                found.push(CallIdx(idx));
            }
        }
        // What the device wrote before it asked is read after this.
        fence(Ordering::Acquire);
        Ok(found)
    }

    fn answer(&mut self, CallIdx(idx): CallIdx) -> Result<()> {
        self.is_heard[idx] = false;
        // What was received is written before this.
        fence(Ordering::Release);
        // SAFETY: as above; the device reads it until it is this.
        unsafe { (self.calls as *mut u32).add(idx).write_volatile(ANSWERED) };
        Ok(())
    }

    fn submit(&mut self, commands: &[Command]) -> Result<()> {
        self.enter()?;
        commands.iter().try_for_each(|command| self.start(command))
    }

    fn record(&mut self, commands: &[Command]) -> Result<Option<GraphIdx>> {
        self.enter()?;
        let Some(first) = self.streams.first().copied() else {
            return Ok(None);
        };
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is this device's; the capture ends below, also after a failure.
        unsafe { result::stream::begin_capture(first, mode) }
            .map_err(|error| self.error("cannot begin a graph", error))?;
        let started = self.submit(commands);
        // SAFETY: as above.
        let graph = unsafe { result::stream::end_capture(first) };
        started?;
        let graph = graph.map_err(|error| self.error("cannot end a graph", error))?;
        // SAFETY: the graph was just captured; it is not needed once it is instantiated.
        let exec = unsafe {
            let exec = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            exec
        };
        self.graphs
            .push(exec.map_err(|error| self.error("cannot make a graph", error))?);
        Ok(Some(GraphIdx(self.graphs.len() - 1)))
    }

    fn replay(&mut self, graph: GraphIdx) -> Result<()> {
        self.enter()?;
        // SAFETY: graph and stream are this device's, and all that the graph uses is still there.
        unsafe { result::graph::launch(self.graphs[graph.0], self.streams[0]) }
            .map_err(|error| self.error("cannot start a graph", error))
    }

    fn is_idle(&mut self) -> Result<bool> {
        self.enter()?;
        for team in &self.teams {
            team.check()?;
        }
        for stream in &self.streams {
            // SAFETY: the stream is this device's.
            let state = unsafe { sys::cuStreamQuery(*stream) };
            if !self.is_over(state, "a kernel has failed")? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn has_passed(&mut self, event: EventIdx) -> Result<bool> {
        self.enter()?;
        // SAFETY: the event is this device's.
        let state = unsafe { sys::cuEventQuery(self.events[event.0]) };
        self.is_over(state, "a kernel has failed")
    }

    fn synchronize(&mut self) -> Result<()> {
        self.enter()?;
        result::ctx::synchronize().map_err(|error| self.error("a kernel has failed", error))
    }

    fn elapsed_s(&mut self, from: EventIdx, to: EventIdx) -> Result<f64> {
        self.enter()?;
        // SAFETY: both events were recorded and waited for.
        let ms = unsafe { result::event::elapsed(self.events[from.0], self.events[to.0]) }
            .map_err(|error| self.error("cannot read events", error))?;
        Ok(f64::from(ms) * 1e-3)
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        // Best effort: there is no one to tell of a failure.
        if !matches!(self.is_idle(), Ok(true)) {
            // An exchange whose peers are gone would never end.
            self.teams.drain(..).for_each(Team::abort);
        }
        let _ = result::ctx::synchronize();
        self.blas = None;
        self.teams.clear();
        // SAFETY: nothing runs any more, and each handle was made by this value and is freed once.
        unsafe {
            for graph in &self.graphs {
                let _ = result::graph::exec_destroy(*graph);
            }
            for event in &self.events {
                let _ = result::event::destroy(*event);
            }
            for stream in &self.streams {
                let _ = result::stream::destroy(*stream);
            }
            for module in &self.modules {
                let _ = result::module::unload(*module);
            }
            for memory in &self.host_memory {
                let _ = result::free_host(*memory as *mut c_void);
            }
            for memory in &self.memory {
                let _ = result::free_sync(*memory);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// An argument's bytes, at the beginning of the eight.
fn bytes_of(value: &Value) -> [u8; 8] {
    match value {
        Value::Address(address) => address.to_ne_bytes(),
        Value::Int(value) => value.to_ne_bytes(),
        Value::Float(value) => {
            let mut bytes = [0; 8];
            bytes[..4].copy_from_slice(&value.to_ne_bytes());
            bytes
        }
    }
}

fn driver_error(what: &str, error: result::DriverError) -> Error {
    Error::Exhausted(format!(
        "{what}: {error}; see `nvidia-smi`, or run with `--backend threads`"
    ))
}
