//! Products of warp groups (`wgmma`), as the PTX ISA 8.7 states them in section 9.7.15.
//!
//! They run beside the threads, in the async proxy: of the block's memory they see what was written before
//! a `fence.proxy.async` of the thread that wrote it (9.7.15.4), else what stood there before. Registers
//! of a product are not touched from its start until its group was waited for (9.7.15.7.3), nor from the
//! last `wgmma.fence` to its start (9.7.15.7.1); memory that it reads is not written meanwhile. A product
//! is computed when it starts, or as late as it may: when a warp waits for it.

use std::cell::Cell;
use std::collections::VecDeque;
use std::ops::Range;

/// Bytes of a chunk, which swizzling keeps together.
const CHUNK: usize = 16;
/// Threads of a warp group.
pub(super) const GROUP: usize = 128;
pub(super) const WARP: usize = 32;
/// Depth of a product of 16-bit elements, and its rows.
pub(super) const DEPTH: usize = 16;
const ROWS: usize = 64;

/// A matrix in shared memory (9.7.15.5.1.2): its descriptor, and whether its lines run along the depth
/// (K-major) or along its rows or columns (MN-major).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Matrix {
    start: u64,
    leading: u64,
    stride: u64,
    /// Chunks of a line of the repeating pattern: 1, 2, 4 or 8.
    width: u64,
    is_mn_major: bool,
}

impl Matrix {
    /// Decodes a descriptor (9.7.15.5.1.2.2): the start address in bits 0–13, the leading dimension's
    /// byte offset in 16–29, the stride dimension's in 32–45, each without its four lowest bits, a base
    /// offset in 49–51, and in 62–63 the swizzling: none, 128, 64 or 32 bytes.
    pub(super) fn of(descriptor: u64, is_mn_major: bool) -> Self {
        let field = |first: u32| (descriptor >> first & 0x3fff) << 4;
        let width = [1, 8, 4, 2][(descriptor >> 62) as usize];
        let known = 0x3fff | 0x3fff << 16 | 0x3fff << 32 | 3 << 62;
        assert!(
            descriptor & !known == 0,
            "a descriptor {descriptor:#x} with a base offset, or with bits that mean nothing"
        );
        Self {
            start: field(0),
            leading: field(16),
            stride: field(32),
            width,
            is_mn_major,
        }
    }

    /// The address of the element at `side` (row of the left, column of the right operand) and `depth`
    /// (9.7.15.5.1.2, tables of canonical layouts and of strides by major-ness).
    pub(super) fn address(&self, side: usize, depth: usize) -> u64 {
        let (side, depth) = (side as u64, depth as u64);
        let within_chunk = if self.is_mn_major {
            side % 8
        } else {
            depth % 8
        } * 2;
        let plain = match (self.is_mn_major, self.width) {
            // Eight rows of a chunk each, one after another: the core matrix.
            (false, 1) => side % 8 * 16 + side / 8 * self.stride + depth / 8 * self.leading,
            // Eight lines of so many chunks; a line holds more of the depth than a product takes.
            (false, width) => side % 8 * width * 16 + side / 8 * self.stride + depth / 8 * 16,
            (true, 1) => depth % 8 * 16 + depth / 8 * self.leading + side / 8 * self.stride,
            (true, width) => {
                side / 8 % width * 16
                    + side / (8 * width) * self.leading
                    + depth % 8 * width * 16
                    + depth / 8 * self.stride
            }
        };
        let address = self.start + plain;
        // A chunk's place in its line is combined with the line's number; lines of 128 bytes.
        let line = address >> 7 & (self.width - 1);
        (address ^ line << 4) + within_chunk
    }

    /// The chunks that hold its elements.
    fn chunks(&self, n_sides: usize) -> Vec<usize> {
        let mut chunks: Vec<usize> = (0..n_sides)
            .flat_map(|side| (0..DEPTH).map(move |depth| (side, depth)))
            .map(|(side, depth)| self.address(side, depth) as usize / CHUNK)
            .collect();
        chunks.sort_unstable();
        chunks.dedup();
        chunks
    }
}

/// Where the left operand comes from.
#[derive(Clone, Debug)]
pub(super) enum Left {
    Memory(Matrix),
    /// Four registers of each thread, by their numbers.
    Registers([usize; 4]),
}

/// A product that has started.
#[derive(Clone, Debug)]
pub(super) struct Started {
    /// The registers of the sums.
    pub(super) sums: Vec<usize>,
    pub(super) left: Left,
    pub(super) right: Matrix,
    /// Whether the sums begin with what the registers hold.
    pub(super) accumulates: bool,
    /// Chunks of memory that are read.
    reads: Vec<usize>,
    /// Warps of the group that have not waited for it.
    n_waiting: usize,
    is_done: bool,
}

impl Started {
    pub(super) fn new(sums: Vec<usize>, left: Left, right: Matrix, accumulates: bool) -> Self {
        let mut reads = right.chunks(2 * sums.len());
        if let Left::Memory(matrix) = &left {
            reads.extend(matrix.chunks(ROWS));
        }
        Self {
            sums,
            left,
            right,
            accumulates,
            reads,
            n_waiting: GROUP / WARP,
            is_done: false,
        }
    }

    /// Columns of the product.
    pub(super) fn n_columns(&self) -> usize {
        2 * self.sums.len()
    }

    fn left_registers(&self) -> &[usize] {
        match &self.left {
            Left::Memory(_) => &[],
            Left::Registers(registers) => registers,
        }
    }
}

/// What a register of a thread is to products.
#[derive(Clone, Copy, Default)]
struct Use {
    /// Products under way that add to it, and their columns.
    n_sums: u16,
    columns: u16,
    /// Products under way that read it.
    n_reads: u16,
}

/// A warp's products.
#[derive(Default)]
struct Warp {
    open: Vec<usize>,
    groups: VecDeque<Vec<usize>>,
}

/// The products of a block and what the rules about them need to know.
pub(super) struct Products {
    /// The block's memory as products see it.
    view: Vec<u8>,
    /// Of each thread: what it wrote since its last `fence.proxy.async`.
    unfenced: Vec<Vec<Range<usize>>>,
    /// Products that read a chunk.
    readers: Vec<u16>,
    started: Vec<Started>,
    warps: Vec<Warp>,
    n_registers: usize,
    uses: Vec<Use>,
    /// When a register of a thread was touched last, in `wgmma.fence`s of its thread.
    touched: Vec<Cell<u32>>,
    n_fences: Vec<u32>,
}

impl Products {
    pub(super) fn new(n_threads: usize, n_registers: usize, shared: &[u8]) -> Self {
        let n = n_threads * n_registers;
        Self {
            view: shared.to_vec(),
            unfenced: vec![Vec::new(); n_threads],
            readers: vec![0; shared.len().div_ceil(CHUNK)],
            started: Vec::new(),
            warps: (0..n_threads.div_ceil(WARP))
                .map(|_| Warp::default())
                .collect(),
            n_registers,
            uses: vec![Use::default(); n],
            touched: vec![Cell::new(0); n],
            n_fences: vec![0; n_threads],
        }
    }

    /// A thread reads or writes one of its registers.
    pub(super) fn touch(&self, thread: usize, register: usize, text: &str) {
        let at = thread * self.n_registers + register;
        let Use {
            n_sums, n_reads, ..
        } = self.uses[at];
        assert!(
            n_sums == 0 && n_reads == 0,
            "{text}: a register of a product that was not waited for"
        );
        self.touched[at].set(self.n_fences[thread]);
    }

    /// A thread writes the block's memory, or begins to.
    pub(super) fn check_write(&self, bytes: &Range<usize>, text: &str) {
        let chunks = bytes.start / CHUNK..bytes.end.div_ceil(CHUNK);
        let is_read = self.readers[chunks].iter().any(|n| *n > 0);
        assert!(
            !is_read,
            "{text}: memory of a product that was not waited for"
        );
    }

    /// A thread has written the block's memory.
    pub(super) fn wrote(&mut self, thread: usize, bytes: Range<usize>, text: &str) {
        self.check_write(&bytes, text);
        self.unfenced[thread].push(bytes);
    }

    /// `fence.proxy.async` of a thread.
    pub(super) fn fence_async(&mut self, thread: usize, shared: &[u8]) {
        for bytes in self.unfenced[thread].drain(..) {
            self.view[bytes.clone()].copy_from_slice(&shared[bytes]);
        }
    }

    /// `wgmma.fence` of a warp.
    pub(super) fn fence(&mut self, threads: Range<usize>) {
        for thread in threads {
            self.n_fences[thread] += 1;
        }
    }

    /// Starts a product of the group of threads that begins with `first`.
    pub(super) fn start(&mut self, first: usize, product: Started, text: &str) -> usize {
        let columns = product.n_columns() as u16;
        for thread in first..first + GROUP {
            let n_fences = self.n_fences[thread];
            assert!(n_fences > 0, "{text}: no wgmma.fence before it");
            let at = |register: &usize| thread * self.n_registers + register;
            let touched = |register: &usize| self.touched[at(register)].get() == n_fences;
            let registers = || product.sums.iter().chain(product.left_registers());
            assert!(
                !registers().any(touched),
                "{text}: no wgmma.fence since a register of it was touched"
            );
            for at in product.sums.iter().map(at) {
                let used = &mut self.uses[at];
                assert!(
                    used.n_reads == 0 && (used.n_sums == 0 || used.columns == columns),
                    "{text}: sums of another product that was not waited for"
                );
                used.n_sums += 1;
                used.columns = columns;
            }
            for at in product.left_registers().iter().map(at) {
                let used = &mut self.uses[at];
                assert!(
                    used.n_sums == 0,
                    "{text}: reads sums that were not waited for"
                );
                used.n_reads += 1;
            }
        }
        for chunk in &product.reads {
            self.readers[*chunk] += 1;
        }
        let id = self.started.len();
        self.started.push(product);
        for warp in &mut self.warps[first / WARP..(first + GROUP) / WARP] {
            warp.open.push(id);
        }
        id
    }

    /// `wgmma.commit_group` of a warp.
    pub(super) fn commit(&mut self, warp: usize) {
        let warp = &mut self.warps[warp];
        warp.groups.push_back(std::mem::take(&mut warp.open));
    }

    /// The next product that a warp has to be done with so that at most `n` groups are under way.
    pub(super) fn next_due(&mut self, warp: usize, n: usize) -> Option<usize> {
        let warp = &mut self.warps[warp];
        while warp.groups.len() > n {
            let group = warp.groups.front_mut()?;
            if group.is_empty() {
                warp.groups.pop_front();
            } else {
                return Some(group.remove(0));
            }
        }
        None
    }

    pub(super) fn get(&self, id: usize) -> &Started {
        &self.started[id]
    }

    /// Whether a product was computed for all its threads, which it is from now on.
    pub(super) fn is_done(&mut self, id: usize) -> bool {
        std::mem::replace(&mut self.started[id].is_done, true)
    }

    /// A warp has waited for a product: its registers are the threads' again, and with the last warp the
    /// memory that was read.
    pub(super) fn release(&mut self, id: usize, threads: Range<usize>) {
        let product = &mut self.started[id];
        for thread in threads {
            let at = |register: &usize| thread * self.n_registers + register;
            for at in product.sums.iter().map(at) {
                self.uses[at].n_sums -= 1;
            }
            for at in product.left_registers().iter().map(at) {
                self.uses[at].n_reads -= 1;
            }
        }
        product.n_waiting -= 1;
        if product.n_waiting == 0 {
            for chunk in std::mem::take(&mut product.reads) {
                self.readers[chunk] -= 1;
            }
        }
    }

    /// Whether all products were waited for.
    pub(super) fn is_idle(&self) -> bool {
        self.started.iter().all(|product| product.n_waiting == 0)
    }

    /// The bf16 at an address, as products see it.
    pub(super) fn element(&self, address: u64) -> f32 {
        let at = address as usize;
        let bytes = self.view.get(at..at + 2);
        let bytes = bytes.unwrap_or_else(|| panic!("byte {at} of {}", self.view.len()));
        let bits = u16::from_le_bytes([bytes[0], bytes[1]]);
        f32::from_bits(u32::from(bits) << 16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Layouts that the manual draws, at places that can be counted by hand.
    #[test]
    fn descriptors_name_places() {
        let descriptor = |swizzling: u64, leading: u64, stride: u64| {
            swizzling << 62 | stride >> 4 << 32 | leading >> 4 << 16 | 0x400 >> 4
        };
        // 128-byte swizzling, lines along the depth: row 3 is the fourth line, whose chunks 0 and 1 change
        // places with 3 and 2; eight rows on, a stride.
        let matrix = Matrix::of(descriptor(1, 16, 1024), false);
        assert_eq!(matrix.address(3, 0), 0x400 + 3 * 128 + 3 * 16);
        assert_eq!(matrix.address(3, 9), 0x400 + 3 * 128 + 2 * 16 + 2);
        assert_eq!(matrix.address(8, 0), 0x800);
        // Along the sides: 64 in a line, the next 64 a leading offset on.
        let matrix = Matrix::of(descriptor(1, 8192, 1024), true);
        assert_eq!(matrix.address(17, 5), 0x400 + 5 * 128 + (2 ^ 5) * 16 + 2);
        assert_eq!(matrix.address(64, 8), 0x400 + 8192 + 1024);
        // No swizzling: core matrices of eight lines of 16 bytes.
        let matrix = Matrix::of(descriptor(0, 128, 256), false);
        assert_eq!(matrix.address(9, 8), 0x400 + 256 + 128 + 16);
        // 32 bytes: chunks change places in every other four lines.
        let matrix = Matrix::of(descriptor(3, 16, 256), false);
        assert_eq!(matrix.address(1, 8), 0x400 + 32 + 16);
        assert_eq!(matrix.address(5, 8), 0x400 + 5 * 32);
    }
}
