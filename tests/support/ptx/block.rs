//! One block of threads at work.

use std::collections::VecDeque;

use meshweave_compiler::codegen::launch::WARP;
use meshweave_dsl::device_code::Grid;

use super::functions::{f, of};
use super::parse::{Arg, Entry, Inst, Op, SHARED, Space, Special, WarpOp};
use super::{Memory, Order};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Running,
    /// At an instruction of the whole warp, or at a barrier of the block.
    AtWarp,
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
            threads: (0..grid.n_threads()).map(|_| thread()).collect(),
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
                return;
            }
            self.release();
        }
    }

    /// Lets those go on who all have arrived.
    fn release(&mut self) {
        let mut progress = false;
        for first in (0..self.threads.len()).step_by(WARP) {
            let last = (first + WARP).min(self.threads.len());
            let warp = &self.threads[first..last];
            let at = warp[0].at;
            if warp.iter().any(|t| t.state != State::AtWarp || t.at != at) {
                continue;
            }
            let inst = &self.entry.code[at];
            let Op::Warp(op) = inst.op else {
                unreachable!()
            };
            self.together(op, inst, first..last);
            for thread in &mut self.threads[first..last] {
                thread.state = State::Running;
                thread.at += 1;
            }
            progress = true;
        }
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
            Arg::Register(idx) => self.threads[thread].registers[*idx],
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

    fn store(&mut self, address: u64, n: usize, space: Space, value: u64, text: &str) {
        let bytes = self.bytes(address, n, space, text);
        bytes.copy_from_slice(&value.to_le_bytes()[..n]);
    }

    /// Carries out a copy: bytes that are not read are not touched.
    fn arrive(&mut self, copy: Copy, text: &str) {
        let mut data = vec![0; copy.bytes];
        if copy.read > 0 {
            assert_eq!(copy.read, copy.bytes, "{}: {text}", self.name);
            data.copy_from_slice(self.bytes(copy.from, copy.bytes, Space::Global, text));
        }
        let to = self.bytes(copy.to, copy.bytes, Space::Shared, text);
        to.copy_from_slice(&data);
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
                    self.store(at, bytes, space, value, &inst.text);
                }
            }
            Op::Copy(bytes) => {
                let copy = Copy {
                    to: self.value(idx, &inst.args[0]),
                    from: self.value(idx, &inst.args[1]),
                    bytes,
                    read: (inst.args.get(3)).map_or(bytes, |arg| self.value(idx, arg) as usize),
                };
                if self.is_late {
                    self.threads[idx].copies.push(copy);
                } else {
                    self.arrive(copy, &inst.text);
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
                        self.arrive(copy, &inst.text);
                    }
                }
            }
            Op::Branch(to) => next = to,
            Op::Warp(_) => return self.threads[idx].state = State::AtWarp,
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
            Arg::Register(register) => self.threads[idx].registers[*register] = value,
            _ => panic!("{}: an instruction sets no register", self.name),
        }
    }
}
