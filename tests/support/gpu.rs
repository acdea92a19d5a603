//! A GPU that is not there: PTX runs in the interpreter, streams in any order that the rules allow.
//!
//! Which stream goes on is drawn at random, from a seed. A command that may overtake another one will
//! in some order, so a missing wait shows as a wrong result, and streams that wait for one another as a
//! panic. Several such devices, each run by a thread of its own, exchange memory through a [`Hub`].

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use meshweave_dsl::device_code::{Grid, Module};
use meshweave_dsl::dtype::DType;
use meshweave_dsl::layout::ReduceKind;
use meshweave_runtime::device::cuda::ptx_of;
use meshweave_runtime::device::gpu::{
    Address, CallIdx, Command, EventIdx, FunctionIdx, Gpu, GraphIdx, ModuleIdx, Part, Product,
    ProductIdx, Side, TEAM_NAME_WORDS, TeamIdx, Value, Work,
};
use meshweave_runtime::{Error, Result};

use super::ptx::{Memory, Order};

/// Bytes between two allocations: an access past the end of one meets none.
const GAP: u64 = 1 << 20;

/// What the device does products with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Library {
    /// Nothing: the program's kernels do them.
    None,
    /// A library of its own.
    Products,
}

/// Messages between devices, by team, sender and receiver.
#[derive(Default)]
pub struct Hub {
    state: Mutex<HubState>,
    changed: Condvar,
}

#[derive(Default)]
struct HubState {
    n_names: u32,
    messages: BTreeMap<(u32, usize, usize), VecDeque<Vec<u8>>>,
}

/// A device's end of a team.
struct Team {
    name: u32,
    n_members: usize,
    member: usize,
}

pub struct Simulated {
    library: Library,
    hub: Arc<Hub>,
    teams: Vec<Team>,
    /// Whether there is a library for exchanges between devices.
    has_teams: bool,
    /// Calls of the host that it has not heard of, and those that it has answered.
    asked: Vec<CallIdx>,
    answered: Vec<CallIdx>,
    random: u64,
    memory: Vec<(Address, Vec<u8>)>,
    /// The host's, which copies reach and kernels do not.
    host_memory: Vec<(Address, Vec<u8>)>,
    next_address: Address,
    modules: Vec<super::ptx::Module>,
    functions: Vec<(ModuleIdx, String, Grid)>,
    products: Vec<Product>,
    streams: Vec<VecDeque<Queued>>,
    /// Times that each event was recorded, as submitted and as done.
    events: Vec<(usize, usize)>,
    /// Steps of the device's clock at which events were done.
    times: Vec<u64>,
    clock: u64,
    graphs: Vec<Vec<Command>>,
}

/// A command with what it waits for or brings about.
enum Queued {
    Work(Work),
    /// Until the event was recorded so often.
    Wait(EventIdx, usize),
    Record(EventIdx, usize),
    Call {
        call: CallIdx,
        is_asked: bool,
    },
    /// Sends that others wait for are made as soon as the stream has come here.
    Exchange {
        team: usize,
        sends: Vec<Part>,
        recvs: Vec<Part>,
        is_sent: bool,
    },
    AllReduce {
        team: usize,
        kind: ReduceKind,
        dtype: DType,
        src: Address,
        dst: Address,
        n_elements: usize,
        is_sent: bool,
    },
}

impl Simulated {
    pub fn new(library: Library, seed: u64) -> Self {
        Self::with_peers(library, seed, Arc::default())
    }

    /// A device that shares a hub with others.
    pub fn with_peers(library: Library, seed: u64, hub: Arc<Hub>) -> Self {
        Self {
            library,
            hub,
            teams: Vec::new(),
            has_teams: true,
            asked: Vec::new(),
            answered: Vec::new(),
            random: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            memory: Vec::new(),
            host_memory: Vec::new(),
            next_address: GAP,
            modules: Vec::new(),
            functions: Vec::new(),
            products: Vec::new(),
            streams: Vec::new(),
            events: Vec::new(),
            times: Vec::new(),
            clock: 0,
            graphs: Vec::new(),
        }
    }

    /// The device without a library for exchanges.
    pub fn without_teams(mut self) -> Self {
        self.has_teams = false;
        self
    }

    fn random(&mut self, n: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % n as u64) as usize
    }

    fn memory(&mut self) -> Memory<'_> {
        let mut memory = Memory::default();
        for (address, bytes) in &mut self.memory {
            memory.add(*address, bytes);
        }
        memory
    }

    fn bytes(&mut self, address: Address, n: usize) -> &mut [u8] {
        let all = self.memory.iter_mut().chain(&mut self.host_memory);
        let piece = { all }.find_map(|(base, bytes)| {
            let offset = usize::try_from(address.checked_sub(*base)?).ok()?;
            bytes.get_mut(offset..offset.checked_add(n)?)
        });
        piece.unwrap_or_else(|| panic!("{n} bytes at {address:x} are nowhere"))
    }

    fn read(&mut self, address: Address, dtype: DType, element: usize) -> f32 {
        let size = dtype.n_bytes();
        number(dtype, self.bytes(address + (size * element) as u64, size))
    }

    fn write(&mut self, address: Address, dtype: DType, element: usize, value: f32) {
        let size = dtype.n_bytes();
        self.bytes(address + (size * element) as u64, size)
            .copy_from_slice(&bytes_of(dtype, value));
    }

    fn execute(&mut self, work: &Work) {
        match work {
            Work::Launch { function, args } => {
                let (module, name, grid) = self.functions[function.0].clone();
                let params: Vec<u64> = args
                    .iter()
                    .map(|arg| match arg {
                        Value::Address(address) => *address,
                        Value::Int(value) => *value as u64,
                        Value::Float(value) => u64::from(value.to_bits()),
                    })
                    .collect();
                let order = [Order::Ascending, Order::Descending][self.random(2)];
                let modules = std::mem::take(&mut self.modules);
                modules[module.0].launch(&name, &grid, &params, &mut self.memory(), order);
                self.modules = modules;
            }
            Work::Copy { to, from, n_bytes } => {
                let copy = self.bytes(*from, *n_bytes).to_vec();
                self.bytes(*to, *n_bytes).copy_from_slice(&copy);
            }
            Work::Product {
                product,
                a,
                b,
                c,
                bias,
            } => {
                self.multiply(self.products[product.0], [*a, *b, *c], *bias);
            }
            Work::Call(_)
            | Work::Record(_)
            | Work::Wait(_)
            | Work::Exchange { .. }
            | Work::AllReduce { .. } => unreachable!("queued as what they wait for"),
        }
    }

    fn multiply(&mut self, p: Product, [a, b, c]: [Address; 3], bias: Option<Address>) {
        assert_eq!(p.bias.is_some(), bias.is_some());
        for address in [a, b, c].into_iter().chain(bias) {
            assert!(
                address.is_multiple_of(p.alignment as u64),
                "{p:?} at {address:x}"
            );
        }
        for l in 0..p.n_batch {
            for (i, j) in (0..p.m).flat_map(|i| (0..p.n).map(move |j| (i, j))) {
                let at = p.c.batch * l + p.c.row * i + p.c.column * j;
                let mut sum = match p.accumulate {
                    true => self.read(c, p.result, at),
                    false => 0.0,
                };
                if let (Some(side), Some(bias)) = (p.bias, bias) {
                    let element = if side == Side::Rows { i } else { j };
                    sum += self.read(bias, p.result, element);
                }
                for x in 0..p.k {
                    let left =
                        self.read(a, p.factors, p.a.batch * l + p.a.row * i + p.a.column * x);
                    let right =
                        self.read(b, p.factors, p.b.batch * l + p.b.row * x + p.b.column * j);
                    sum = left.mul_add(right, sum);
                }
                self.write(c, p.result, at, sum);
            }
        }
    }

    /// Whether a stream can go on; what others wait for is sent.
    fn is_ready(&mut self, stream: usize) -> bool {
        let Some(mut head) = self.streams[stream].pop_front() else {
            return false;
        };
        let ready = match &mut head {
            Queued::Wait(event, n) => self.events[event.0].1 >= *n,
            Queued::Call { call, is_asked } => {
                if !std::mem::replace(is_asked, true) {
                    self.asked.push(*call);
                }
                self.answered.contains(call)
            }
            Queued::Exchange {
                team,
                sends,
                recvs,
                is_sent,
            } => {
                if !std::mem::replace(is_sent, true) {
                    for part in sends.iter() {
                        let bytes = self.bytes(part.address, part.n_bytes).to_vec();
                        self.post(*team, part.member, bytes);
                    }
                }
                let wanted: Vec<usize> = recvs.iter().map(|part| part.member).collect();
                self.have_come(*team, &wanted)
            }
            Queued::AllReduce {
                team,
                dtype,
                src,
                n_elements,
                is_sent,
                ..
            } => {
                let Team { n_members, .. } = self.teams[*team];
                if !std::mem::replace(is_sent, true) {
                    let bytes = self.bytes(*src, dtype.n_bytes() * *n_elements).to_vec();
                    (0..n_members).for_each(|to| self.post(*team, to, bytes.clone()));
                }
                self.have_come(*team, &(0..n_members).collect::<Vec<_>>())
            }
            _ => true,
        };
        self.streams[stream].push_front(head);
        ready
    }

    fn post(&self, team: usize, to: usize, bytes: Vec<u8>) {
        let Team { name, member, .. } = self.teams[team];
        let mut state = self.hub.state.lock().unwrap();
        state
            .messages
            .entry((name, member, to))
            .or_default()
            .push_back(bytes);
        self.hub.changed.notify_all();
    }

    /// Whether there is a message from each of these, as often as they are named.
    fn have_come(&self, team: usize, members: &[usize]) -> bool {
        let Team { name, member, .. } = self.teams[team];
        let state = self.hub.state.lock().unwrap();
        members.iter().all(|from| {
            let n = members.iter().filter(|other| *other == from).count();
            state
                .messages
                .get(&(name, *from, member))
                .is_some_and(|queue| queue.len() >= n)
        })
    }

    fn take(&self, team: usize, from: usize) -> Vec<u8> {
        let Team { name, member, .. } = self.teams[team];
        let mut state = self.hub.state.lock().unwrap();
        state
            .messages
            .get_mut(&(name, from, member))
            .unwrap()
            .pop_front()
            .unwrap()
    }

    /// Takes what has come.
    fn arrive(&mut self, queued: Queued) {
        match queued {
            Queued::Exchange { team, recvs, .. } => {
                for part in recvs {
                    let bytes = self.take(team, part.member);
                    assert_eq!(
                        bytes.len(),
                        part.n_bytes,
                        "what one sends the other receives"
                    );
                    self.bytes(part.address, part.n_bytes)
                        .copy_from_slice(&bytes);
                }
            }
            Queued::AllReduce {
                team,
                kind,
                dtype,
                dst,
                n_elements,
                ..
            } => {
                let mut total = vec![];
                for from in 0..self.teams[team].n_members {
                    let bytes = self.take(team, from);
                    assert_eq!(bytes.len(), dtype.n_bytes() * n_elements);
                    let values = bytes.chunks_exact(dtype.n_bytes());
                    let values = values.map(|bytes| number(dtype, bytes));
                    if total.is_empty() {
                        total.extend(values);
                        continue;
                    }
                    for (total, value) in total.iter_mut().zip(values) {
                        *total = match kind {
                            ReduceKind::Sum => *total + value,
                            ReduceKind::Max => total.max(value),
                            ReduceKind::Lse => panic!("libraries have no such reduction"),
                        };
                    }
                }
                let bytes = total.iter().flat_map(|x: &f32| bytes_of(dtype, *x));
                let bytes: Vec<u8> = bytes.collect();
                self.bytes(dst, bytes.len()).copy_from_slice(&bytes);
            }
            _ => {}
        }
    }

    /// Waits for other devices, if there is something left to wait for.
    fn wait(&self) -> bool {
        let head = |stream: &VecDeque<Queued>| {
            matches!(
                stream.front(),
                Some(Queued::Exchange { .. } | Queued::AllReduce { .. })
            )
        };
        if !self.streams.iter().any(head) {
            return false;
        }
        let state = self.hub.state.lock().unwrap();
        drop(
            self.hub
                .changed
                .wait_timeout(state, Duration::from_millis(20))
                .unwrap(),
        );
        true
    }
}

/// A number of a type from its bytes.
fn number(dtype: DType, bytes: &[u8]) -> f32 {
    match dtype {
        DType::F32 => f32::from_le_bytes(bytes.try_into().unwrap()),
        DType::Bf16 => {
            let bits = u16::from_le_bytes(bytes.try_into().unwrap());
            f32::from_bits(u32::from(bits) << 16)
        }
        DType::F16 | DType::I32 => panic!("no sums of {dtype}"),
    }
}

/// Its bytes, rounded to the nearest of the type, ties to even.
fn bytes_of(dtype: DType, value: f32) -> Vec<u8> {
    match dtype {
        DType::F32 => value.to_le_bytes().to_vec(),
        DType::Bf16 => {
            let bits = value.to_bits();
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
            ((rounded >> 16) as u16).to_le_bytes().to_vec()
        }
        DType::F16 | DType::I32 => panic!("no sums of {dtype}"),
    }
}

impl Gpu for Simulated {
    fn name(&self) -> String {
        "no GPU, but an interpreter of PTX (sm_90)".into()
    }

    fn capability(&self) -> (u32, u32) {
        (9, 0)
    }

    fn allocate(&mut self, n_bytes: usize) -> Result<Address> {
        let address = self.next_address;
        self.next_address += (n_bytes as u64).next_multiple_of(GAP) + GAP;
        self.memory.push((address, vec![0; n_bytes]));
        Ok(address)
    }

    /// At its own address, since others of the host read and write it too.
    fn allocate_host(&mut self, n_bytes: usize) -> Result<Address> {
        let mut bytes = vec![0_u8; n_bytes];
        let address = bytes.as_mut_ptr() as Address;
        self.host_memory.push((address, bytes));
        Ok(address)
    }

    fn upload(&mut self, to: Address, words: &[u32]) -> Result<()> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.bytes(to, bytes.len()).copy_from_slice(&bytes);
        Ok(())
    }

    fn download(&mut self, from: Address, words: &mut [u32]) -> Result<()> {
        self.synchronize()?;
        let bytes = self.bytes(from, 4 * words.len());
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = u32::from_le_bytes(bytes.try_into().unwrap());
        }
        Ok(())
    }

    fn load(&mut self, module: &Module, target: &str) -> Result<ModuleIdx> {
        let compiled;
        let ptx = match (&module.ptx, &module.source) {
            (Some(ptx), _) => ptx,
            (None, Some(source)) => {
                compiled = ptx_of(source, target)?;
                &compiled
            }
            (None, None) => return Err(Error::Invalid("a module without code".into())),
        };
        self.modules.push(super::ptx::Module::parse(ptx));
        Ok(ModuleIdx(self.modules.len() - 1))
    }

    fn function(&mut self, module: ModuleIdx, name: &str, grid: Grid) -> Result<FunctionIdx> {
        self.functions.push((module, name.into(), grid));
        Ok(FunctionIdx(self.functions.len() - 1))
    }

    fn product(&mut self, product: &Product) -> Result<Option<ProductIdx>> {
        if self.library == Library::None {
            return Ok(None);
        }
        self.products.push(*product);
        Ok(Some(ProductIdx(self.products.len() - 1)))
    }

    fn has_teams(&mut self) -> Result<bool> {
        Ok(self.has_teams)
    }

    fn calls(&mut self) -> Result<Vec<CallIdx>> {
        Ok(std::mem::take(&mut self.asked))
    }

    fn answer(&mut self, call: CallIdx) -> Result<()> {
        self.answered.push(call);
        Ok(())
    }

    fn team_name(&mut self) -> Result<Vec<u32>> {
        let mut state = self.hub.state.lock().unwrap();
        state.n_names += 1;
        let mut name = vec![0; TEAM_NAME_WORDS];
        name[0] = state.n_names;
        Ok(name)
    }

    fn join(&mut self, name: &[u32], n_members: usize, member: usize) -> Result<TeamIdx> {
        let name = name[0];
        self.teams.push(Team {
            name,
            n_members,
            member,
        });
        Ok(TeamIdx(self.teams.len() - 1))
    }

    fn reserve(&mut self, n_streams: usize, n_events: usize, _n_calls: usize) -> Result<()> {
        self.streams.resize_with(n_streams, VecDeque::new);
        self.events.resize(n_events, (0, 0));
        self.times.resize(n_events, 0);
        Ok(())
    }

    fn submit(&mut self, commands: &[Command]) -> Result<()> {
        for command in commands {
            let queued = match &command.work {
                Work::Wait(event) => Queued::Wait(*event, self.events[event.0].0),
                Work::Record(event) => {
                    self.events[event.0].0 += 1;
                    Queued::Record(*event, self.events[event.0].0)
                }
                Work::Call(call) => Queued::Call {
                    call: *call,
                    is_asked: false,
                },
                Work::Exchange { team, sends, recvs } => Queued::Exchange {
                    team: team.0,
                    sends: sends.clone(),
                    recvs: recvs.clone(),
                    is_sent: false,
                },
                Work::AllReduce {
                    team,
                    kind,
                    dtype,
                    src,
                    dst,
                    n_elements,
                } => Queued::AllReduce {
                    team: team.0,
                    kind: *kind,
                    dtype: *dtype,
                    src: *src,
                    dst: *dst,
                    n_elements: *n_elements,
                    is_sent: false,
                },
                work => Queued::Work(work.clone()),
            };
            self.streams[command.stream.0].push_back(queued);
        }
        Ok(())
    }

    fn record(&mut self, commands: &[Command]) -> Result<Option<GraphIdx>> {
        self.graphs.push(commands.to_vec());
        Ok(Some(GraphIdx(self.graphs.len() - 1)))
    }

    fn replay(&mut self, graph: GraphIdx) -> Result<()> {
        let commands = self.graphs[graph.0].clone();
        self.submit(&commands)
    }

    fn is_idle(&mut self) -> Result<bool> {
        self.run();
        Ok(self.streams.iter().all(VecDeque::is_empty))
    }

    fn has_passed(&mut self, event: EventIdx) -> Result<bool> {
        let (n_submitted, n_done) = self.events[event.0];
        Ok(n_submitted == n_done)
    }

    fn synchronize(&mut self) -> Result<()> {
        let started = std::time::Instant::now();
        loop {
            self.run();
            assert!(
                started.elapsed() < Duration::from_secs(300),
                "devices wait for one another"
            );
            if !self.wait() {
                break;
            }
        }
        assert!(
            self.streams.iter().all(VecDeque::is_empty),
            "streams wait for one another"
        );
        Ok(())
    }

    fn elapsed_s(&mut self, from: EventIdx, to: EventIdx) -> Result<f64> {
        Ok(self.times[to.0].saturating_sub(self.times[from.0]) as f64 * 1e-6)
    }
}

impl Simulated {
    /// Runs the streams until each is at its end, or at something that has not come yet.
    fn run(&mut self) {
        loop {
            let ready: Vec<usize> = (0..self.streams.len())
                .filter(|stream| self.is_ready(*stream))
                .collect();
            if ready.is_empty() {
                return;
            }
            let stream = ready[self.random(ready.len())];
            // A stream may run far ahead of the others.
            let n_commands = 1 + self.random(64);
            for _ in 0..n_commands {
                if !self.is_ready(stream) {
                    break;
                }
                self.clock += 1;
                match self.streams[stream].pop_front() {
                    Some(Queued::Record(event, n)) => {
                        self.events[event.0].1 = n;
                        self.times[event.0] = self.clock;
                    }
                    Some(Queued::Work(work)) => self.execute(&work),
                    Some(Queued::Call { call, .. }) => self.answered.retain(|other| *other != call),
                    Some(Queued::Wait(..)) | None => {}
                    Some(exchange) => self.arrive(exchange),
                }
            }
        }
    }
}
