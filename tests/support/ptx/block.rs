//! One block of threads at work.

use std::collections::VecDeque;

use meshweave_compiler::codegen::launch::WARP;
use meshweave_dsl::device_code::Grid;

use super::functions::{f, of};
use super::parse::{Arg, Entry, Inst, Op, Product, SHARED, Space, Special, WarpOp};
use super::wgmma::{DEPTH, GROUP, Left, Matrix, Products, Started};
use super::{Memory, Order};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Running,
    /// At an instruction of the whole warp or of four warps, or at a barrier of the block.
    AtWarp,
    AtGroup,
    AtBarrier,
    Done,
}

/// An asynchronous copy under way: to, from, bytes, of which so many are read and the rest is zero.
#[derive(Clone, Copy)]
struct Copy {
    to: u64,
    from: u64,
    bytes: usize,
    read: usize,
}

struct Thread {
    registers: Vec<u64>,
    at: usize,
    state: State,
    copies: Vec<Copy>,
    groups: VecDeque<Vec<Copy>>,
}

pub(super) struct Block<'a, 'm> {
    name: &'a str,
    entry: &'a Entry,
    grid: &'a Grid,
    block: [u32; 3],
    params: &'a [u64],
    memory: &'a mut Memory<'m>,
    shared: Vec<u8>,
    threads: Vec<Thread>,
    /// Of entries that have products of warp groups.
    products: Option<Products>,
    is_late: bool,
}

impl<'a, 'm> Block<'a, 'm> {
    pub(super) fn new(
        name: &'a str,
        entry: &'a Entry,
        grid: &'a Grid,
        block: [u32; 3],
        params: &'a [u64],
        memory: &'a mut Memory<'m>,
    ) -> Self {
        // What was not written is no number, in f32 and in bf16.
        let n_shared = entry.n_shared + grid.shared_bytes as usize;
        let shared = [0xc0, 0x7f].repeat(n_shared.div_ceil(2));
        let n_threads = grid.n_threads();
        let products =
            (entry.has_products).then(|| Products::new(n_threads, entry.n_registers, &shared));
        let thread = || Thread {
            registers: vec![0; entry.n_registers],
            at: 0,
            state: State::Running,
            copies: Vec::new(),
            groups: VecDeque::new(),
        };
        Self {
            name,
            entry,
            grid,
            block,
            params,
            memory,
            shared,
            threads: (0..n_threads).map(|_| thread()).collect(),
            products,
            is_late: false,
        }
    }

    pub(super) fn run(&mut self, order: Order) {
        self.is_late = order == Order::Descending;
        let n = self.threads.len();
        loop {
            for idx in 0..n {
                let idx = match order {
                    Order::Ascending => idx,
                    Order::Descending => n - 1 - idx,
                };
                while self.threads[idx].state == State::Running {
                    self.step(idx);
                }
            }
            if self.threads.iter().all(|t| t.state == State::Done) {
                let is_idle = self.products.as_ref().is_none_or(Products::is_idle);
                assert!(is_idle, "{}: products that nobody waited for", self.name);
                return;
            }
            self.release(order);
        }
    }

    /// Lets those go on who all have arrived: one warp, or one group of warps, while there is any, so that
    /// it runs ahead of the others as far as it may; else the block.
    fn release(&mut self, order: Order) {
        for state in [State::AtWarp, State::AtGroup] {
            let n_together = if state == State::AtWarp { WARP } else { GROUP };
            let n_threads = self.threads.len();
            let n = n_threads.div_ceil(n_together);
            for idx in 0..n {
                let idx = match order {
                    Order::Ascending => idx,
                    Order::Descending => n - 1 - idx,
                };
                let first = idx * n_together;
                let together = first..(first + n_together).min(n_threads);
                let threads = &self.threads[together.clone()];
                let at = threads[0].at;
                if threads.iter().any(|t| t.state != state || t.at != at) {
                    continue;
                }
                let inst = &self.entry.code[at];
                match inst.op {
                    Op::Warp(op) => self.together(op, inst, together.clone()),
                    Op::Product(product) => {
                        assert_eq!(together.len(), GROUP, "{}: {}", self.name, inst.text);
                        self.product(product, inst, first);
                    }
                    _ => unreachable!(),
                }
                for thread in &mut self.threads[together] {
                    thread.state = State::Running;
                    thread.at += 1;
                }
                return;
            }
        }
        let mut progress = false;
        // Threads that have ended are not waited for.
        let mut waiting = self.threads.iter().filter(|t| t.state != State::Done);
        let at = waiting.clone().next().map(|t| t.at);
        if waiting.all(|t| t.state == State::AtBarrier && Some(t.at) == at) {
            for thread in &mut self.threads {
                if thread.state == State::AtBarrier {
                    thread.state = State::Running;
                    thread.at += 1;
                }
            }
            progress = true;
        }
        assert!(progress, "{}: threads wait for one another", self.name);
    }

    /// An instruction of a whole warp.
    fn together(&mut self, op: WarpOp, inst: &Inst, lanes: std::ops::Range<usize>) {
        let value = |this: &Self, arg: usize| -> Vec<u64> {
            let lanes = lanes.clone();
            lanes.map(|idx| this.value(idx, &inst.args[arg])).collect()
        };
        match op {
            WarpOp::Barrier => {}
            WarpOp::ShuffleXor | WarpOp::ShuffleUp | WarpOp::ShuffleDown | WarpOp::ShuffleIdx => {
                let (values, by) = (value(self, 1), value(self, 2));
                for (lane, idx) in lanes.clone().enumerate() {
                    let by = by[lane] as usize;
                    let from = match op {
                        WarpOp::ShuffleXor => lane ^ by,
                        WarpOp::ShuffleUp => lane.checked_sub(by).unwrap_or(lane),
                        WarpOp::ShuffleDown if lane + by < WARP => lane + by,
                        WarpOp::ShuffleDown => lane,
                        _ => by % WARP,
                    };
                    self.set(idx, &inst.args[0], values[from]);
                }
            }
            WarpOp::Ballot => {
                let votes = value(self, 1).into_iter().enumerate();
                let all = votes.fold(0, |all, (lane, vote)| all | (u64::from(vote != 0) << lane));
                for idx in lanes.clone() {
                    self.set(idx, &inst.args[0], all);
                }
            }
            WarpOp::LoadMatrices { n, transposed } => {
                let rows = value(self, n);
                for matrix in 0..n {
                    let mut elements = [[0u64; 8]; 8];
                    for (row, elements) in elements.iter_mut().enumerate() {
                        let address = rows[8 * matrix + row];
                        assert!(address.is_multiple_of(16), "{}: {}", self.name, inst.text);
                        for (column, element) in elements.iter_mut().enumerate() {
                            let at = address + 2 * column as u64;
                            *element = self.load(at, 2, Space::Shared, &inst.text);
                        }
                    }
                    for (lane, idx) in lanes.clone().enumerate() {
                        let (row, column) = (lane / 4, lane % 4 * 2);
                        let (low, high) = if transposed {
                            (elements[column][row], elements[column + 1][row])
                        } else {
                            (elements[row][column], elements[row][column + 1])
                        };
                        self.set(idx, &inst.args[matrix], high << 16 | low);
                    }
                }
            }
            WarpOp::Multiply { bf16 } => self.multiply(bf16, inst, lanes.clone()),
            WarpOp::ProductFence => self.products().fence(lanes),
            WarpOp::ProductCommit => self.products().commit(lanes.start / WARP),
            WarpOp::ProductWait => {
                let n = self.value(lanes.start, &inst.args[0]) as usize;
                while let Some(id) = self.products().next_due(lanes.start / WARP, n) {
                    self.compute(id, lanes.start / GROUP * GROUP);
                    self.products().release(id, lanes.clone());
                }
            }
        }
    }

    fn products(&mut self) -> &mut Products {
        let name = self.name;
        (self.products.as_mut()).unwrap_or_else(|| panic!("{name}: a kernel without products"))
    }

    /// Starts a product of the group of warps that begins with thread `first`.
    fn product(&mut self, product: Product, inst: &Inst, first: usize) {
        let register = |arg: &Arg| match arg {
            Arg::Register(register) => *register,
            _ => panic!("{}: {}", self.name, inst.text),
        };
        let (sums, rest) = inst.args.split_at(product.n / 2);
        let sums = sums.iter().map(register).collect();
        let (left, rest) = rest.split_at(if product.from_registers { 4 } else { 1 });
        // The right operand, whether sums go on, signs of both, major-ness of both or of the right one.
        let operands: Vec<u64> = rest.iter().map(|arg| self.value(first, arg)).collect();
        assert_eq!(operands[2..4], [1, 1], "{}: {}", self.name, inst.text);
        let (left, majors) = if product.from_registers {
            let left = [0, 1, 2, 3].map(|idx| register(&left[idx]));
            (Left::Registers(left), &operands[4..])
        } else {
            let matrix = Matrix::of(self.value(first, &left[0]), operands[4] != 0);
            (Left::Memory(matrix), &operands[5..])
        };
        let right = Matrix::of(operands[0], majors[0] != 0);
        let started = Started::new(sums, left, right, operands[1] != 0);
        let id = self.products().start(first, started, &inst.text);
        if !self.is_late {
            self.compute(id, first);
        }
    }

    /// Computes a product of the group that begins with thread `first`, unless that was done: d[64, N] =
    /// a[64, 16] b[16, N], or onto d, elements where the PTX manual has them (9.7.15.5.1.1).
    fn compute(&mut self, id: usize, first: usize) {
        if self.products().is_done(id) {
            return;
        }
        let Some(products) = self.products.take() else {
            return;
        };
        let product = products.get(id);
        let mut a = [[0.0f64; DEPTH]; 64];
        match &product.left {
            Left::Memory(matrix) => {
                for (row, elements) in a.iter_mut().enumerate() {
                    for (depth, element) in elements.iter_mut().enumerate() {
                        *element = products.element(matrix.address(row, depth)).into();
                    }
                }
            }
            Left::Registers(registers) => {
                for (thread, state) in self.threads[first..first + GROUP].iter().enumerate() {
                    for (idx, register) in registers.iter().enumerate() {
                        let row = thread / WARP * 16 + thread % WARP / 4 + idx % 2 * 8;
                        let depth = thread % 4 * 2 + idx / 2 * 8;
                        let bits = state.registers[*register];
                        a[row][depth] = f(bits << 16).into();
                        a[row][depth + 1] = f(bits & 0xffff_0000).into();
                    }
                }
            }
        }
        let n = product.n_columns();
        let mut sums = vec![0.0f64; 64 * n];
        for depth in 0..DEPTH {
            let b: Vec<f64> = (0..n)
                .map(|column| {
                    products
                        .element(product.right.address(column, depth))
                        .into()
                })
                .collect();
            for (sums, a) in sums.chunks_exact_mut(n).zip(&a) {
                for (sum, b) in sums.iter_mut().zip(&b) {
                    *sum += a[depth] * b;
                }
            }
        }
        for (thread, state) in (self.threads[first..first + GROUP].iter_mut()).enumerate() {
            for (idx, register) in product.sums.iter().enumerate() {
                let row = thread / WARP * 16 + thread % WARP / 4 + idx / 2 % 2 * 8;
                let column = idx / 4 * 8 + thread % 4 * 2 + idx % 2;
                let sum = &mut state.registers[*register];
                let onto = if product.accumulates { f(*sum) } else { 0.0 };
                *sum = of((f64::from(onto) + sums[row * n + column]) as f32);
            }
        }
        self.products = Some(products);
    }

    /// A thread touches a register, which products may have.
    fn touch(&self, thread: usize, register: usize) {
        if let Some(products) = &self.products {
            let inst = &self.entry.code[self.threads[thread].at];
            products.touch(thread, register, &inst.text);
        }
    }

    /// d[16, 8] = a[16, k] b[k, 8] + c, the elements where the PTX manual has them (9.7.14.5).
    fn multiply(&mut self, bf16: bool, inst: &Inst, lanes: std::ops::Range<usize>) {
        let depth = if bf16 { 16 } else { 8 };
        let mut a = vec![vec![0.0f64; depth]; 16];
        let mut b = vec![[0.0f64; 8]; depth];
        for (lane, idx) in lanes.clone().enumerate() {
            let (group, t) = (lane / 4, lane % 4);
            for register in 0..6 {
                let bits = self.value(idx, &inst.args[4 + register]);
                let (is_a, register) = (register < 4, register % 4);
                let row = group + 8 * (register % 2);
                // Where this register's elements begin in depth, and what they are.
                let (first, values) = if bf16 {
                    let far = if is_a { register / 2 } else { register };
                    let halves = [bits << 16, bits & 0xffff_0000].map(|bits| f64::from(f(bits)));
                    (2 * t + 8 * far, halves.to_vec())
                } else {
                    let far = if is_a { register / 2 } else { register };
                    (t + 4 * far, vec![f64::from(f(bits & 0xffff_e000))])
                };
                for (k, value) in values.into_iter().enumerate() {
                    if is_a {
                        a[row][first + k] = value;
                    } else {
                        b[first + k][group] = value;
                    }
                }
            }
        }
        for (lane, idx) in lanes.enumerate() {
            for register in 0..4 {
                let (row, column) = (lane / 4 + 8 * (register / 2), lane % 4 * 2 + register % 2);
                let onto = f64::from(f(self.value(idx, &inst.args[10 + register])));
                let sum = (0..depth).fold(onto, |sum, k| sum + a[row][k] * b[k][column]);
                self.set(idx, &inst.args[register], of(sum as f32));
            }
        }
    }

    fn value(&self, thread: usize, arg: &Arg) -> u64 {
        let threads = self.grid.threads.map(|n| n as usize);
        match arg {
            Arg::Register(idx) => {
                self.touch(thread, *idx);
                self.threads[thread].registers[*idx]
            }
            Arg::Value(value) => *value,
            Arg::Special(Special::Thread(0)) => (thread % threads[0]) as u64,
            Arg::Special(Special::Thread(1)) => (thread / threads[0] % threads[1]) as u64,
            Arg::Special(Special::Thread(_)) => (thread / (threads[0] * threads[1])) as u64,
            Arg::Special(Special::NumThreads(dim)) => threads[*dim] as u64,
            Arg::Special(Special::Block(dim)) => u64::from(self.block[*dim]),
            Arg::Special(Special::NumBlocks(dim)) => u64::from(self.grid.blocks[*dim]),
            Arg::Special(Special::Lane) => (thread % WARP) as u64,
            Arg::Address(base, offset) => {
                let base = base.map_or(0, |idx| self.threads[thread].registers[idx]);
                base.wrapping_add(*offset as u64)
            }
            Arg::Param(idx) => self.params[*idx],
        }
    }

    /// The bytes of an access.
    fn bytes(&mut self, address: u64, n: usize, space: Space, text: &str) -> &mut [u8] {
        let name = self.name;
        assert!(
            address.is_multiple_of(n as u64),
            "{name}: unaligned {text} at {address:#x}"
        );
        // Addresses of the block's memory are offsets where 32 bits hold them.
        let is_shared = match space {
            Space::Shared => {
                assert!(
                    !(1 << 32..SHARED).contains(&address),
                    "{name}: {text}: wrong space"
                );
                true
            }
            Space::Global => {
                assert!(address < SHARED, "{name}: {text}: wrong space");
                false
            }
            Space::Generic => address >= SHARED,
        };
        if is_shared {
            let (offset, n_shared) = ((address & (SHARED - 1)) as usize, self.shared.len());
            return (self.shared.get_mut(offset..offset + n))
                .unwrap_or_else(|| panic!("{name}: {text}: byte {offset} of {n_shared}"));
        }
        (self.memory.at(address, n))
            .unwrap_or_else(|| panic!("{name}: {text}: {n} bytes at {address:#x} are in no buffer"))
    }

    fn load(&mut self, address: u64, n: usize, space: Space, text: &str) -> u64 {
        let bytes = self.bytes(address, n, space, text);
        let mut value = [0; 8];
        value[..n].copy_from_slice(bytes);
        u64::from_le_bytes(value)
    }

    /// Stores a value of a thread.
    fn store(&mut self, thread: usize, to: (u64, Space), n: usize, value: u64, text: &str) {
        let (address, space) = to;
        let bytes = self.bytes(address, n, space, text);
        bytes.copy_from_slice(&value.to_le_bytes()[..n]);
        let is_shared = space == Space::Shared || (space == Space::Generic && address >= SHARED);
        if let Some(products) = self.products.as_mut().filter(|_| is_shared) {
            products.wrote(thread, of_block(address, n), text);
        }
    }

    /// Carries out a copy: bytes that are not read are not touched.
    fn arrive(&mut self, thread: usize, copy: Copy, text: &str) {
        let mut data = vec![0; copy.bytes];
        if copy.read > 0 {
            assert_eq!(copy.read, copy.bytes, "{}: {text}", self.name);
            data.copy_from_slice(self.bytes(copy.from, copy.bytes, Space::Global, text));
        }
        let to = self.bytes(copy.to, copy.bytes, Space::Shared, text);
        to.copy_from_slice(&data);
        if let Some(products) = &mut self.products {
            products.wrote(thread, of_block(copy.to, copy.bytes), text);
        }
    }

    fn step(&mut self, idx: usize) {
        let entry = self.entry;
        let inst = &entry.code[self.threads[idx].at];
        if let Some((register, wanted)) = inst.guard
            && (self.threads[idx].registers[register] != 0) != wanted
        {
            self.threads[idx].at += 1;
            return;
        }
        let mut next = self.threads[idx].at + 1;
        match inst.op {
            Op::Compute(function) => {
                let mut operands = [0; 4];
                for (slot, arg) in operands.iter_mut().zip(&inst.args[1..]) {
                    *slot = self.value(idx, arg);
                }
                self.set(idx, &inst.args[0], function(&operands));
            }
            Op::Pack(bits) => {
                let parts = inst.args[1..].iter().rev();
                let packed = parts.fold(0, |all, arg| {
                    all << bits | self.value(idx, arg) & ((1 << bits) - 1)
                });
                self.set(idx, &inst.args[0], packed);
            }
            Op::Unpack(n, bits) => {
                let all = self.value(idx, &inst.args[n]);
                for (piece, arg) in inst.args[..n].iter().enumerate() {
                    self.set(idx, arg, all >> (piece * bits) & ((1 << bits) - 1));
                }
            }
            Op::LdParam => {
                let value = self.value(idx, &inst.args[1]);
                self.set(idx, &inst.args[0], value);
            }
            Op::Load {
                space,
                n,
                bytes,
                signed,
            } => {
                let address = self.value(idx, &inst.args[n]);
                // The whole access must be aligned.
                self.aligned(address, n * bytes, &inst.text);
                for element in 0..n {
                    let at = address + (element * bytes) as u64;
                    let mut value = self.load(at, bytes, space, &inst.text);
                    if signed {
                        let shift = 64 - 8 * bytes;
                        value = ((value << shift) as i64 >> shift) as u32 as u64;
                    }
                    self.set(idx, &inst.args[element], value);
                }
            }
            Op::Store { space, n, bytes } => {
                let address = self.value(idx, &inst.args[0]);
                self.aligned(address, n * bytes, &inst.text);
                for element in 0..n {
                    let value = self.value(idx, &inst.args[1 + element]);
                    let at = address + (element * bytes) as u64;
                    self.store(idx, (at, space), bytes, value, &inst.text);
                }
            }
            Op::Copy(bytes) => {
                let copy = Copy {
                    to: self.value(idx, &inst.args[0]),
                    from: self.value(idx, &inst.args[1]),
                    bytes,
                    read: (inst.args.get(3)).map_or(bytes, |arg| self.value(idx, arg) as usize),
                };
                if let Some(products) = &self.products {
                    products.check_write(&of_block(copy.to, copy.bytes), &inst.text);
                }
                if self.is_late {
                    self.threads[idx].copies.push(copy);
                } else {
                    self.arrive(idx, copy, &inst.text);
                }
            }
            Op::Commit => {
                let thread = &mut self.threads[idx];
                let group = std::mem::take(&mut thread.copies);
                thread.groups.push_back(group);
            }
            Op::Wait => {
                let n = self.value(idx, &inst.args[0]) as usize;
                while self.threads[idx].groups.len() > n {
                    let group = self.threads[idx].groups.pop_front();
                    for copy in group.into_iter().flatten() {
                        self.arrive(idx, copy, &inst.text);
                    }
                }
            }
            Op::Branch(to) => next = to,
            Op::FenceAsync => {
                if let Some(products) = &mut self.products {
                    products.fence_async(idx, &self.shared);
                }
            }
            Op::Warp(_) => return self.threads[idx].state = State::AtWarp,
            Op::Product(_) => return self.threads[idx].state = State::AtGroup,
            Op::Barrier => return self.threads[idx].state = State::AtBarrier,
            Op::Return => return self.threads[idx].state = State::Done,
        }
        self.threads[idx].at = next;
    }

    fn aligned(&self, address: u64, n: usize, text: &str) {
        assert!(
            address.is_multiple_of(n as u64),
            "{}: unaligned {text} at {address:#x}",
            self.name
        );
    }

    fn set(&mut self, idx: usize, to: &Arg, value: u64) {
        match to {
            Arg::Register(register) => {
                self.touch(idx, *register);
                self.threads[idx].registers[*register] = value;
            }
            _ => panic!("{}: an instruction sets no register", self.name),
        }
    }
}

/// The bytes of the block's memory at an address of it.
fn of_block(address: u64, n: usize) -> std::ops::Range<usize> {
    let offset = (address & (SHARED - 1)) as usize;
    offset..offset + n
}
