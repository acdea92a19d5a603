//! What the executor needs of a GPU, and nothing more.
//!
//! In: memory to allocate, code to load, commands on streams. Out: their effects, and times.
//! Invariant: commands of one stream run in the order in which they were submitted; a `Wait` holds its
//! stream back until the event's last `Record` before it has run; nothing else orders two streams.
//!
//! [`super::cuda`] implements it with CUDA. Tests implement it with an interpreter of PTX that takes
//! the streams in any order that the rules allow, so that a missing wait shows as a wrong result.

use meshweave_dsl::device_code::{Grid, Module};
use meshweave_dsl::dtype::DType;
use meshweave_dsl::layout::ReduceKind;

use crate::error::Result;

/// A place in the device's memory.
pub type Address = u64;

/// Index of a module that was loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModuleIdx(pub usize);

/// Index of a function of a module, with the shape of its launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FunctionIdx(pub usize);

/// Index of a matrix product that the device's library prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProductIdx(pub usize);

/// Index of a team: devices that exchange memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TeamIdx(pub usize);

/// Words of the name that a team is joined by.
pub const TEAM_NAME_WORDS: usize = 32;

/// Index of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamIdx(pub usize);

/// Index of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventIdx(pub usize);

/// Index of a graph: commands that were recorded once and are started as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GraphIdx(pub usize);

/// Index of a call of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallIdx(pub usize);

/// An argument of a launch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    /// A pointer.
    Address(Address),
    /// A `long long`.
    Int(i64),
    /// A `float`.
    Float(f32),
}

/// What a command does.
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    Launch {
        function: FunctionIdx,
        args: Vec<Value>,
    },
    /// Copies within the device's memory, or between it and memory of [`Gpu::allocate_host`]; the ranges
    /// do not overlap.
    Copy {
        to: Address,
        from: Address,
        n_bytes: usize,
    },
    /// A product by the device's library.
    Product {
        product: ProductIdx,
        a: Address,
        b: Address,
        c: Address,
        /// Where the product has one.
        bias: Option<Address>,
    },
    /// Sends to and receives from members of a team, all at once; what one member sends to another, that
    /// one receives, in order.
    Exchange {
        team: TeamIdx,
        sends: Vec<Part>,
        recvs: Vec<Part>,
    },
    /// All members' elements, combined by sum or maximum; in place where the addresses are the same.
    AllReduce {
        team: TeamIdx,
        kind: ReduceKind,
        dtype: DType,
        src: Address,
        dst: Address,
        n_elements: usize,
    },
    /// Calls the host, and holds the stream back until it has answered.
    Call(CallIdx),
    Record(EventIdx),
    Wait(EventIdx),
}

/// Bytes to or from a member of a team.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub member: usize,
    pub address: Address,
    pub n_bytes: usize,
}

/// Work on a stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Command {
    pub stream: StreamIdx,
    pub work: Work,
}

/// A batch of matrix products with f32 sums: `c[l, i, j] = Σ a[l, i, x] b[l, x, j]`, added to
/// what is there where it accumulates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Product {
    /// Rows of `a` and `c`.
    pub m: usize,
    /// Columns of `b` and `c`.
    pub n: usize,
    /// Columns of `a`, rows of `b`.
    pub k: usize,
    pub n_batch: usize,
    pub a: Matrix,
    pub b: Matrix,
    pub c: Matrix,
    /// Of `a` and `b`.
    pub factors: DType,
    /// Of `c`.
    pub result: DType,
    pub accumulate: bool,
    /// The dim of `c` along which a vector of its type is added.
    pub bias: Option<Side>,
    /// A power of two of which the addresses of all operands and batches are multiples.
    pub alignment: usize,
}

/// A dim of a product's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// An element a row.
    Rows,
    /// An element a column.
    Columns,
}

/// Strides of an operand, in elements; one of those of rows and columns is 1 where there are several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Matrix {
    pub row: usize,
    pub column: usize,
    pub batch: usize,
}

/// One GPU.
pub trait Gpu: Send {
    /// The device in words, for people.
    fn name(&self) -> String;

    /// Its compute capability, major and minor.
    fn capability(&self) -> (u32, u32);

    /// Memory of so many zero bytes, at a multiple of 256; it stays where it is as long as the device.
    ///
    /// # Errors
    /// `Exhausted` when the device has no such memory.
    fn allocate(&mut self, n_bytes: usize) -> Result<Address>;

    /// Memory of the host, of so many zero bytes, whose pages stay where they are: copies on streams go
    /// to and from it, kernels do not reach it.
    ///
    /// # Errors
    /// `Exhausted` when the host has no such memory.
    fn allocate_host(&mut self, n_bytes: usize) -> Result<Address>;

    /// Copies from the host; waits until it is done.
    ///
    /// # Errors
    /// Those of the device.
    fn upload(&mut self, to: Address, words: &[u32]) -> Result<()>;

    /// Copies to the host, after all that was submitted; waits until it is done.
    ///
    /// # Errors
    /// Those of the device, and of what was submitted before.
    fn download(&mut self, from: Address, words: &mut [u32]) -> Result<()>;

    /// Loads a module of code for `target` (`sm_90`), compiling its source where there is no PTX.
    ///
    /// # Errors
    /// `Invalid` when the code is refused, `Exhausted` when there is no compiler for its source.
    fn load(&mut self, module: &Module, target: &str) -> Result<ModuleIdx>;

    /// A function of a module.
    ///
    /// # Errors
    /// `Invalid` when the module lacks it or the device cannot launch this shape.
    fn function(&mut self, module: ModuleIdx, name: &str, grid: Grid) -> Result<FunctionIdx>;

    /// A product by the device's library; `None` where there is none, or where it cannot express it.
    ///
    /// # Errors
    /// Those of the library.
    fn product(&mut self, product: &Product) -> Result<Option<ProductIdx>>;

    /// Whether the device has a library for teams.
    ///
    /// # Errors
    /// Those of loading it.
    fn has_teams(&mut self) -> Result<bool>;

    /// A name for a team, which all its members join it by.
    ///
    /// # Errors
    /// `Exhausted` when the device has no way to others.
    fn team_name(&mut self) -> Result<Vec<u32>>;

    /// Joins a team; waits for all its members.
    ///
    /// # Errors
    /// `Exhausted` when the device has no way to others, or they do not come.
    fn join(&mut self, name: &[u32], n_members: usize, member: usize) -> Result<TeamIdx>;

    /// Makes streams, events and calls up to these numbers.
    ///
    /// # Errors
    /// `Exhausted` when the device has no more.
    fn reserve(&mut self, n_streams: usize, n_events: usize, n_calls: usize) -> Result<()>;

    /// The calls that streams have come to since this was last asked.
    ///
    /// # Errors
    /// Those of the device.
    fn calls(&mut self) -> Result<Vec<CallIdx>>;

    /// Lets the stream of a call go on.
    ///
    /// # Errors
    /// Those of the device.
    fn answer(&mut self, call: CallIdx) -> Result<()>;

    /// Starts commands, in this order; does not wait for them.
    ///
    /// # Errors
    /// Those of the device.
    fn submit(&mut self, commands: &[Command]) -> Result<()>;

    /// Records commands that begin and end on the first stream; `None` where the device has no graphs.
    ///
    /// # Errors
    /// Those of the device.
    fn record(&mut self, commands: &[Command]) -> Result<Option<GraphIdx>>;

    /// Starts a graph; does not wait for it.
    ///
    /// # Errors
    /// Those of the device.
    fn replay(&mut self, graph: GraphIdx) -> Result<()>;

    /// Whether everything that was submitted is done; does not wait for it.
    ///
    /// # Errors
    /// What has failed since the last call, here or, as far as the device hears of it, on a peer.
    fn is_idle(&mut self) -> Result<bool>;

    /// Whether the last `Record` of an event, which no graph holds, has run.
    ///
    /// # Errors
    /// Those of the device.
    fn has_passed(&mut self, event: EventIdx) -> Result<bool>;

    /// Waits for everything that was submitted.
    ///
    /// # Errors
    /// What has failed since the last call.
    fn synchronize(&mut self) -> Result<()>;

    /// Seconds between two events that were recorded and waited for.
    ///
    /// # Errors
    /// Those of the device.
    fn elapsed_s(&mut self, from: EventIdx, to: EventIdx) -> Result<f64>;
}
