//! An interpreter of PTX: generated kernels run without a GPU, with its threads, warps and barriers.
//!
//! It knows the instructions that generated kernels have and fails on any other. Out-of-bounds and
//! unaligned accesses, barriers that not all threads reach and instructions of a warp that not all its
//! threads take fail too. The order of threads between two barriers is chosen by the caller, and with
//! it whether asynchronous copies arrive at once or as late as they may: a race shows as results that
//! depend on it.

mod block;
mod functions;
mod parse;
mod resources;
mod wgmma;

use std::collections::BTreeMap;

#[cfg(feature = "mlir")]
use meshweave_compiler::codegen::launch::Launch;
use meshweave_dsl::device_code::Grid;

pub use resources::assemble;

/// Bits below a buffer's number in an address.
pub const OFFSET_BITS: u32 = 40;

/// Which thread goes first between two barriers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// The first; copies arrive as soon as they are issued.
    Ascending,
    /// The last; copies arrive when they are waited for.
    Descending,
}

/// The entries of a module.
pub struct Module {
    entries: BTreeMap<String, parse::Entry>,
}

/// A device's memory: pieces at addresses of the caller's choice, which do not overlap.
#[derive(Default)]
pub struct Memory<'a> {
    pieces: Vec<(u64, &'a mut [u8])>,
}

impl<'a> Memory<'a> {
    /// Adds a piece.
    pub fn add(&mut self, address: u64, bytes: &'a mut [u8]) {
        self.pieces.push((address, bytes));
    }

    /// `n` bytes at an address; `None` where they are not inside of one piece.
    fn at(&mut self, address: u64, n: usize) -> Option<&mut [u8]> {
        self.pieces.iter_mut().find_map(|(base, bytes)| {
            let offset = usize::try_from(address.checked_sub(*base)?).ok()?;
            bytes.get_mut(offset..offset.checked_add(n)?)
        })
    }
}

impl Module {
    /// The entries of a module's text.
    pub fn parse(text: &str) -> Self {
        Self {
            entries: parse::entries(text),
        }
    }

    /// Runs an entry over its whole grid; argument `i` is buffer `args[i]`.
    #[cfg(feature = "mlir")]
    pub fn run(
        &self,
        name: &str,
        launch: Launch,
        args: &[usize],
        buffers: &mut [Vec<u32>],
        order: Order,
    ) {
        let grid = Grid::linear(launch.blocks as u32, launch.threads() as u32);
        let address = |buffer: usize| (buffer as u64 + 1) << OFFSET_BITS;
        let bytes = |words: &Vec<u32>| words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut copies: Vec<Vec<u8>> = buffers.iter().map(bytes).collect();
        let mut memory = Memory::default();
        for (idx, copy) in copies.iter_mut().enumerate() {
            memory.add(address(idx), copy);
        }
        let args: Vec<u64> = args.iter().map(|buffer| address(*buffer)).collect();
        self.launch(name, &grid, &args, &mut memory, order);
        for (buffer, copy) in buffers.iter_mut().zip(&copies) {
            for (word, bytes) in buffer.iter_mut().zip(copy.chunks_exact(4)) {
                *word = u32::from_le_bytes(bytes.try_into().unwrap());
            }
        }
    }

    /// Runs an entry over its whole grid, with these parameters.
    pub fn launch(
        &self,
        name: &str,
        grid: &Grid,
        params: &[u64],
        memory: &mut Memory<'_>,
        order: Order,
    ) {
        let entry = &self.entries[name];
        assert_eq!(
            entry.params.len(),
            params.len(),
            "{name} takes {:?}",
            entry.params
        );
        for z in 0..grid.blocks[2] {
            for y in 0..grid.blocks[1] {
                for x in 0..grid.blocks[0] {
                    block::Block::new(name, entry, grid, [x, y, z], params, memory).run(order);
                }
            }
        }
    }
}
