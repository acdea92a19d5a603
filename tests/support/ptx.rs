//! An interpreter of PTX: generated kernels run without a GPU, with its threads, warps and barriers.
//!
//! It knows the instructions that generated kernels have and fails on any other. Out-of-bounds
//! accesses, barriers that not all threads reach and shuffles that not all threads of a warp take
//! fail too. The order of threads between two barriers is chosen by the caller: a race shows as
//! results that depend on it.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use meshweave_compiler::codegen::launch::{Launch, WARP};

/// Bits below a buffer's number in an address.
const OFFSET_BITS: u32 = 40;
/// Number of the block's memory among buffers.
const SHARED: u64 = 1 << 20;

/// Which thread goes first between two barriers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Ascending,
    Descending,
}

/// The entries of a module.
pub struct Module {
    entries: BTreeMap<String, Entry>,
}

struct Entry {
    params: Vec<String>,
    n_shared: usize,
    n_registers: usize,
    code: Vec<Inst>,
}

struct Inst {
    /// Register and the value that it must have.
    guard: Option<(usize, bool)>,
    op: Op,
    args: Vec<Arg>,
    text: String,
}

#[derive(Clone, Copy)]
enum Op {
    /// A function of the operands behind the first, which it sets.
    Compute(fn(&[u64]) -> u64),
    LdParam,
    Load {
        shared: bool,
    },
    Store {
        shared: bool,
    },
    Branch(usize),
    Shuffle,
    Barrier,
    WarpBarrier,
    Return,
}

#[derive(Clone)]
enum Arg {
    Register(usize),
    Value(u64),
    Special(Special),
    /// A register (or nothing) and an offset.
    Address(Option<usize>, i64),
    Param(String),
}

#[derive(Clone, Copy)]
enum Special {
    Thread,
    Block,
    NumBlocks,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Running,
    /// At an instruction that waits for the warp, or for the block.
    AtShuffle,
    AtWarpBarrier,
    AtBarrier,
    Done,
}

struct Thread {
    registers: Vec<u64>,
    at: usize,
    state: State,
}

fn f(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

fn of(value: f32) -> u64 {
    u64::from(value.to_bits())
}

fn d(bits: u64) -> f64 {
    f64::from_bits(bits)
}

/// Whether one of two floats is NaN, or their order is as wanted.
fn unordered_or(a: &[u64], wanted: fn(Ordering) -> bool) -> bool {
    f(a[0]).partial_cmp(&f(a[1])).is_none_or(wanted)
}

/// The function of an instruction that computes, by its name.
fn function(op: &str) -> Option<fn(&[u64]) -> u64> {
    let function: fn(&[u64]) -> u64 = match op {
        "mov.b64" | "mov.u64" | "mov.f64" | "cvta.to.global.u64" | "cvt.u64.u32" => |a| a[0],
        "mov.b32" | "mov.u32" | "mov.f32" | "cvt.u32.u64" => |a| a[0] & 0xffff_ffff,
        "mov.pred" => |a| a[0],
        "cvt.s64.s32" => |a| a[0] as u32 as i32 as i64 as u64,
        "cvt.rn.f32.s32" => |a| of(a[0] as u32 as i32 as f32),
        "cvt.rn.f32.f64" => |a| of(d(a[0]) as f32),
        "cvt.rn.f64.s32" => |a| f64::from(a[0] as u32 as i32).to_bits(),
        "cvt.f64.f32" => |a| f64::from(f(a[0])).to_bits(),
        "cvt.rzi.s32.f32" => |a| u64::from((f(a[0]) as i32) as u32),
        "cvt.rzi.s32.f64" => |a| u64::from((d(a[0]) as i32) as u32),
        "add.s64" | "add.u64" => |a| a[0].wrapping_add(a[1]),
        "sub.s64" | "sub.u64" => |a| a[0].wrapping_sub(a[1]),
        "mul.lo.s64" | "mul.lo.u64" => |a| a[0].wrapping_mul(a[1]),
        "mad.lo.s64" => |a| a[0].wrapping_mul(a[1]).wrapping_add(a[2]),
        "div.u64" => |a| a[0] / a[1],
        "rem.u64" => |a| a[0] % a[1],
        "div.u32" => |a| u64::from(a[0] as u32 / a[1] as u32),
        "rem.u32" => |a| u64::from(a[0] as u32 % a[1] as u32),
        "mul.hi.u32" => |a| ((a[0] & 0xffff_ffff) * (a[1] & 0xffff_ffff)) >> 32,
        "mul.hi.u64" => |a| ((u128::from(a[0]) * u128::from(a[1])) >> 64) as u64,
        "add.s32" | "add.u32" => |a| u64::from((a[0] as u32).wrapping_add(a[1] as u32)),
        "sub.s32" | "sub.u32" => |a| u64::from((a[0] as u32).wrapping_sub(a[1] as u32)),
        "mul.lo.s32" => |a| u64::from((a[0] as u32).wrapping_mul(a[1] as u32)),
        "mad.lo.s32" => |a| {
            u64::from(
                (a[0] as u32)
                    .wrapping_mul(a[1] as u32)
                    .wrapping_add(a[2] as u32),
            )
        },
        "mul.wide.u32" => |a| (a[0] & 0xffff_ffff) * (a[1] & 0xffff_ffff),
        "mul.wide.s32" => {
            |a| (i64::from(a[0] as u32 as i32) * i64::from(a[1] as u32 as i32)) as u64
        }
        "mad.wide.u32" => |a| ((a[0] & 0xffff_ffff) * (a[1] & 0xffff_ffff)).wrapping_add(a[2]),
        "mad.wide.s32" => |a| {
            let product = i64::from(a[0] as u32 as i32) * i64::from(a[1] as u32 as i32);
            (product as u64).wrapping_add(a[2])
        },
        "and.b64" | "and.b32" | "and.pred" => |a| a[0] & a[1],
        "or.b64" | "or.b32" | "or.pred" => |a| a[0] | a[1],
        "xor.b64" | "xor.b32" | "xor.pred" => |a| a[0] ^ a[1],
        "not.b32" => |a| u64::from(!(a[0] as u32)),
        "not.b64" => |a| !a[0],
        "not.pred" => |a| u64::from(a[0] == 0),
        "neg.s32" => |a| u64::from((a[0] as u32).wrapping_neg()),
        "neg.s64" => |a| a[0].wrapping_neg(),
        "shl.b64" => |a| a[0].checked_shl(a[1] as u32).unwrap_or(0),
        "shr.u64" => |a| a[0].checked_shr(a[1] as u32).unwrap_or(0),
        "shr.s64" => |a| ((a[0] as i64) >> a[1].min(63)) as u64,
        "shl.b32" => |a| u64::from((a[0] as u32).checked_shl(a[1] as u32).unwrap_or(0)),
        "shr.u32" => |a| u64::from((a[0] as u32).checked_shr(a[1] as u32).unwrap_or(0)),
        "shr.s32" => |a| u64::from(((a[0] as u32 as i32) >> a[1].min(31)) as u32),
        "bfe.u32" => |a| ((a[0] & 0xffff_ffff) >> a[1]) & ((1 << a[2]) - 1),
        "bfe.u64" => |a| (a[0] >> a[1]) & ((1 << a[2]) - 1),
        "cvt.u16.u32" | "cvt.u16.u64" | "cvt.u32.u16" | "cvt.u64.u16" | "mov.b16" => {
            |a| a[0] & 0xffff
        }
        "add.s16" => |a| u64::from((a[0] as u16).wrapping_add(a[1] as u16)),
        "sub.s16" => |a| u64::from((a[0] as u16).wrapping_sub(a[1] as u16)),
        "mul.lo.s16" => |a| u64::from((a[0] as u16).wrapping_mul(a[1] as u16)),
        "mul.wide.u16" => |a| (a[0] & 0xffff) * (a[1] & 0xffff),
        "and.b16" => |a| a[0] & a[1] & 0xffff,
        "or.b16" => |a| (a[0] | a[1]) & 0xffff,
        "xor.b16" => |a| (a[0] ^ a[1]) & 0xffff,
        "not.b16" => |a| u64::from(!(a[0] as u16)),
        "neg.s16" => |a| u64::from((a[0] as u16).wrapping_neg()),
        "shl.b16" => |a| u64::from((a[0] as u16).checked_shl(a[1] as u32).unwrap_or(0)),
        "shr.s16" => |a| u64::from(((a[0] as u16 as i16) >> a[1].min(15)) as u16),
        "mul.hi.u16" => |a| ((a[0] & 0xffff) * (a[1] & 0xffff)) >> 16,
        "mad.lo.s16" => |a| {
            u64::from(
                (a[0] as u16)
                    .wrapping_mul(a[1] as u16)
                    .wrapping_add(a[2] as u16),
            )
        },
        "setp.lt.u16" => |a| u64::from((a[0] as u16) < a[1] as u16),
        "setp.gt.u16" => |a| u64::from(a[0] as u16 > a[1] as u16),
        "shr.u16" => |a| (a[0] & 0xffff).checked_shr(a[1] as u32).unwrap_or(0),
        "setp.eq.s16" | "setp.eq.b16" => |a| u64::from(a[0] as u16 == a[1] as u16),
        "setp.ne.s16" | "setp.ne.b16" => |a| u64::from(a[0] as u16 != a[1] as u16),
        "min.u32" => |a| (a[0] & 0xffff_ffff).min(a[1] & 0xffff_ffff),
        "max.u32" => |a| (a[0] & 0xffff_ffff).max(a[1] & 0xffff_ffff),
        "min.u64" => |a| a[0].min(a[1]),
        "max.u64" => |a| a[0].max(a[1]),
        "min.s32" => |a| u64::from((a[0] as u32 as i32).min(a[1] as u32 as i32) as u32),
        "max.s32" => |a| u64::from((a[0] as u32 as i32).max(a[1] as u32 as i32) as u32),
        "min.s64" => |a| (a[0] as i64).min(a[1] as i64) as u64,
        "max.s64" => |a| (a[0] as i64).max(a[1] as i64) as u64,
        "add.rn.f32" | "add.f32" => |a| of(f(a[0]) + f(a[1])),
        "sub.rn.f32" | "sub.f32" => |a| of(f(a[0]) - f(a[1])),
        "mul.rn.f32" | "mul.f32" => |a| of(f(a[0]) * f(a[1])),
        "div.rn.f32" => |a| of(f(a[0]) / f(a[1])),
        "rcp.rn.f32" => |a| of(1.0 / f(a[0])),
        "fma.rn.f32" => |a| of(f(a[0]).mul_add(f(a[1]), f(a[2]))),
        "sqrt.rn.f32" => |a| of(f(a[0]).sqrt()),
        "neg.f32" => |a| of(-f(a[0])),
        "abs.f32" => |a| of(f(a[0]).abs()),
        "max.f32" => |a| of(f(a[0]).max(f(a[1]))),
        "min.f32" => |a| of(f(a[0]).min(f(a[1]))),
        "add.rn.f64" | "add.f64" => |a| (d(a[0]) + d(a[1])).to_bits(),
        "sub.rn.f64" | "sub.f64" => |a| (d(a[0]) - d(a[1])).to_bits(),
        "mul.rn.f64" | "mul.f64" => |a| (d(a[0]) * d(a[1])).to_bits(),
        "div.rn.f64" => |a| (d(a[0]) / d(a[1])).to_bits(),
        "fma.rn.f64" => |a| d(a[0]).mul_add(d(a[1]), d(a[2])).to_bits(),
        "sqrt.rn.f64" => |a| d(a[0]).sqrt().to_bits(),
        "rcp.rn.f64" => |a| (1.0 / d(a[0])).to_bits(),
        "abs.f64" => |a| d(a[0]).abs().to_bits(),
        "neg.f64" => |a| (-d(a[0])).to_bits(),
        "setp.eq.f32" => |a| u64::from(f(a[0]) == f(a[1])),
        "setp.neu.f32" => |a| u64::from(f(a[0]) != f(a[1])),
        "setp.lt.f32" => |a| u64::from(f(a[0]) < f(a[1])),
        "setp.le.f32" => |a| u64::from(f(a[0]) <= f(a[1])),
        "setp.gt.f32" => |a| u64::from(f(a[0]) > f(a[1])),
        "setp.ge.f32" => |a| u64::from(f(a[0]) >= f(a[1])),
        "setp.ltu.f32" => |a| u64::from(unordered_or(a, Ordering::is_lt)),
        "setp.leu.f32" => |a| u64::from(unordered_or(a, Ordering::is_le)),
        "setp.gtu.f32" => |a| u64::from(unordered_or(a, Ordering::is_gt)),
        "setp.geu.f32" => |a| u64::from(unordered_or(a, Ordering::is_ge)),
        "setp.nan.f32" => |a| u64::from(f(a[0]).is_nan() || f(a[1]).is_nan()),
        "setp.num.f32" => |a| u64::from(!f(a[0]).is_nan() && !f(a[1]).is_nan()),
        "setp.eq.s64" | "setp.eq.b64" => |a| u64::from(a[0] == a[1]),
        "setp.ne.s64" | "setp.ne.b64" => |a| u64::from(a[0] != a[1]),
        "setp.lt.s64" => |a| u64::from((a[0] as i64) < a[1] as i64),
        "setp.le.s64" => |a| u64::from(a[0] as i64 <= a[1] as i64),
        "setp.gt.s64" => |a| u64::from(a[0] as i64 > a[1] as i64),
        "setp.ge.s64" => |a| u64::from(a[0] as i64 >= a[1] as i64),
        "setp.lt.u64" => |a| u64::from(a[0] < a[1]),
        "setp.gt.u64" => |a| u64::from(a[0] > a[1]),
        "setp.eq.s32" | "setp.eq.b32" => |a| u64::from(a[0] as u32 == a[1] as u32),
        "setp.ne.s32" | "setp.ne.b32" => |a| u64::from(a[0] as u32 != a[1] as u32),
        "setp.lt.s32" => |a| u64::from((a[0] as i32) < a[1] as i32),
        "setp.le.s32" => |a| u64::from(a[0] as i32 <= a[1] as i32),
        "setp.gt.s32" => |a| u64::from(a[0] as i32 > a[1] as i32),
        "setp.ge.s32" => |a| u64::from(a[0] as i32 >= a[1] as i32),
        "setp.lt.u32" => |a| u64::from((a[0] as u32) < a[1] as u32),
        "setp.gt.u32" => |a| u64::from(a[0] as u32 > a[1] as u32),
        "selp.b16" | "selp.b32" | "selp.f32" | "selp.b64" | "selp.f64" | "selp.s32" => {
            |a| if a[2] != 0 { a[0] } else { a[1] }
        }
        _ => return None,
    };
    Some(function)
}

impl Module {
    /// The entries of a module's text.
    pub fn parse(text: &str) -> Self {
        let mut entries = BTreeMap::new();
        for part in text.split(".visible .entry ").skip(1) {
            let (name, rest) = part.split_once('(').unwrap();
            let (params, rest) = rest.split_once(')').unwrap();
            let params = params
                .split(',')
                .filter_map(|param| param.split_whitespace().last())
                .map(String::from)
                .collect();
            let body = rest.split_once('{').unwrap().1;
            entries.insert(name.to_string(), Entry::parse(params, body));
        }
        Self { entries }
    }

    /// Runs an entry over its whole grid; argument `i` is buffer `args[i]`.
    pub fn run(
        &self,
        name: &str,
        launch: Launch,
        args: &[usize],
        buffers: &mut [Vec<u32>],
        order: Order,
    ) {
        let entry = &self.entries[name];
        assert_eq!(entry.params.len(), args.len(), "arguments of {name}");
        for block in 0..launch.blocks {
            let mut block = Block {
                name,
                entry,
                block,
                launch,
                args,
                buffers,
                shared: vec![0x7fc0_0000; entry.n_shared],
                threads: (0..launch.threads())
                    .map(|_| Thread {
                        registers: vec![0; entry.n_registers],
                        at: 0,
                        state: State::Running,
                    })
                    .collect(),
            };
            block.run(order);
        }
    }
}

impl Entry {
    fn parse(params: Vec<String>, body: &str) -> Self {
        let mut registers: BTreeMap<String, usize> = BTreeMap::new();
        let mut labels: BTreeMap<&str, usize> = BTreeMap::new();
        let mut shared_names = Vec::new();
        let mut n_shared = 0;
        let mut lines = Vec::new();
        for line in body.lines() {
            let line = line.split("//").next().unwrap_or("").trim();
            if line.starts_with('}') {
                break;
            }
            if let Some(label) = line.strip_suffix(':') {
                labels.insert(label, lines.len());
            } else if let Some(declaration) = line.strip_prefix(".shared") {
                let (name, size) = declaration.split_once('[').unwrap();
                shared_names.push(name.split_whitespace().last().unwrap());
                assert_eq!(shared_names.len(), 1, "one piece of shared memory");
                n_shared = size.split_once(']').unwrap().0.parse::<usize>().unwrap() / 4;
            } else if !line.is_empty() && !line.starts_with('.') {
                lines.push(line.strip_suffix(';').unwrap_or(line));
            }
        }
        let mut register = |name: &str| {
            let next = registers.len();
            *registers.entry(name.to_string()).or_insert(next)
        };
        let mut code = Vec::with_capacity(lines.len());
        for line in lines {
            let (guard, line) = match line.strip_prefix('@') {
                Some(rest) => {
                    let (name, rest) = rest.split_once(char::is_whitespace).unwrap();
                    let (name, wanted) = match name.strip_prefix('!') {
                        Some(name) => (name, false),
                        None => (name, true),
                    };
                    (Some((register(name), wanted)), rest.trim())
                }
                None => (None, line),
            };
            let (name, operands) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            let op = match name {
                "bra" | "bra.uni" => Op::Branch(labels[operands.trim()]),
                "ret" => Op::Return,
                "bar.sync" => Op::Barrier,
                "bar.warp.sync" => Op::WarpBarrier,
                "shfl.sync.bfly.b32" => Op::Shuffle,
                _ if name.starts_with("ld.param") => Op::LdParam,
                "ld.global.b32" | "ld.global.nc.b32" => Op::Load { shared: false },
                "ld.shared.b32" => Op::Load { shared: true },
                "st.global.b32" => Op::Store { shared: false },
                "st.shared.b32" => Op::Store { shared: true },
                _ => Op::Compute(function(name).unwrap_or_else(|| panic!("unknown: {line}"))),
            };
            let mut parse = |text: &str| -> Arg {
                let text = text.trim();
                if let Some(inner) = text.strip_prefix('[') {
                    let inner = inner.strip_suffix(']').unwrap();
                    let (base, offset) = match inner.split_once('+') {
                        Some((base, offset)) => (base, offset.parse().unwrap()),
                        None => (inner, 0),
                    };
                    return match base {
                        base if base.starts_with('%') => Arg::Address(Some(register(base)), offset),
                        base if shared_names.contains(&base) => Arg::Address(None, offset),
                        base => Arg::Param(base.to_string()),
                    };
                }
                match text {
                    "%tid.x" => Arg::Special(Special::Thread),
                    "%ctaid.x" => Arg::Special(Special::Block),
                    "%nctaid.x" => Arg::Special(Special::NumBlocks),
                    name if name.starts_with('%') => Arg::Register(register(name)),
                    name if shared_names.contains(&name) => Arg::Value(SHARED << OFFSET_BITS),
                    float if float.starts_with("0f") || float.starts_with("0d") => {
                        Arg::Value(u64::from_str_radix(&float[2..], 16).unwrap())
                    }
                    number => Arg::Value(number.parse::<i64>().unwrap() as u64),
                }
            };
            let args = match op {
                Op::Branch(_) | Op::Return | Op::Barrier | Op::WarpBarrier => Vec::new(),
                _ => operands.split(',').map(&mut parse).collect(),
            };
            code.push(Inst {
                guard,
                op,
                args,
                text: line.to_string(),
            });
        }
        Self {
            params,
            n_shared,
            n_registers: registers.len(),
            code,
        }
    }
}

struct Block<'a> {
    name: &'a str,
    entry: &'a Entry,
    block: usize,
    launch: Launch,
    args: &'a [usize],
    buffers: &'a mut [Vec<u32>],
    shared: Vec<u32>,
    threads: Vec<Thread>,
}

impl Block<'_> {
    fn run(&mut self, order: Order) {
        let n = self.threads.len();
        loop {
            for idx in 0..n {
                let idx = if order == Order::Ascending {
                    idx
                } else {
                    n - 1 - idx
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
        for warp in self.threads.chunks_mut(WARP) {
            let (state, at) = (warp[0].state, warp[0].at);
            if warp.iter().any(|t| t.state != state || t.at != at) {
                continue;
            }
            match state {
                State::AtShuffle => {
                    let inst = &self.entry.code[at];
                    let (Arg::Register(to), Arg::Register(from), Arg::Value(distance)) =
                        (&inst.args[0], &inst.args[1], &inst.args[2])
                    else {
                        panic!("{}", inst.text)
                    };
                    let values: Vec<u64> = warp.iter().map(|t| t.registers[*from]).collect();
                    for (lane, thread) in warp.iter_mut().enumerate() {
                        thread.registers[*to] = values[lane ^ *distance as usize];
                        thread.state = State::Running;
                        thread.at += 1;
                    }
                    progress = true;
                }
                State::AtWarpBarrier => {
                    for thread in warp {
                        thread.state = State::Running;
                        thread.at += 1;
                    }
                    progress = true;
                }
                _ => {}
            }
        }
        let at = self.threads[0].at;
        if self
            .threads
            .iter()
            .all(|t| t.state == State::AtBarrier && t.at == at)
        {
            for thread in &mut self.threads {
                thread.state = State::Running;
                thread.at += 1;
            }
            progress = true;
        }
        assert!(progress, "{}: threads wait for one another", self.name);
    }

    fn value(&self, thread: usize, arg: &Arg) -> u64 {
        match arg {
            Arg::Register(idx) => self.threads[thread].registers[*idx],
            Arg::Value(value) => *value,
            Arg::Special(Special::Thread) => thread as u64,
            Arg::Special(Special::Block) => self.block as u64,
            Arg::Special(Special::NumBlocks) => self.launch.blocks as u64,
            Arg::Address(base, offset) => {
                let base = base.map_or(SHARED << OFFSET_BITS, |idx| {
                    self.threads[thread].registers[idx]
                });
                base.wrapping_add(*offset as u64)
            }
            Arg::Param(name) => {
                let param = self.entry.params.iter().position(|p| p == name).unwrap();
                // Buffer numbers start at 1, so that no address is null.
                (self.args[param] as u64 + 1) << OFFSET_BITS
            }
        }
    }

    fn cell(&mut self, address: u64, shared: bool, text: &str) -> &mut u32 {
        let number = address >> OFFSET_BITS;
        let offset = address & ((1 << OFFSET_BITS) - 1);
        assert!(offset.is_multiple_of(4), "{}: unaligned {text}", self.name);
        assert_eq!(
            shared,
            number == SHARED,
            "{}: {text}: wrong space",
            self.name
        );
        let buffer = if shared {
            &mut self.shared
        } else {
            &mut self.buffers[number as usize - 1]
        };
        let n = buffer.len();
        buffer
            .get_mut(offset as usize / 4)
            .unwrap_or_else(|| panic!("{}: {text}: byte {offset} of {n} elements", self.name))
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
            Op::LdParam => {
                let value = self.value(idx, &inst.args[1]);
                self.set(idx, &inst.args[0], value);
            }
            Op::Load { shared } => {
                let address = self.value(idx, &inst.args[1]);
                let value = u64::from(*self.cell(address, shared, &inst.text));
                self.set(idx, &inst.args[0], value);
            }
            Op::Store { shared } => {
                let address = self.value(idx, &inst.args[0]);
                let value = self.value(idx, &inst.args[1]) as u32;
                *self.cell(address, shared, &inst.text) = value;
            }
            Op::Branch(to) => next = to,
            Op::Shuffle => return self.threads[idx].state = State::AtShuffle,
            Op::WarpBarrier => return self.threads[idx].state = State::AtWarpBarrier,
            Op::Barrier => return self.threads[idx].state = State::AtBarrier,
            Op::Return => return self.threads[idx].state = State::Done,
        }
        self.threads[idx].at = next;
    }

    fn set(&mut self, idx: usize, to: &Arg, value: u64) {
        match to {
            Arg::Register(register) => self.threads[idx].registers[*register] = value,
            _ => panic!("{}: an instruction sets no register", self.name),
        }
    }
}

/// What NVIDIA's assembler says of an entry.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Resources {
    pub entry: String,
    pub registers: usize,
    /// Bytes stored and loaded because registers ran out.
    pub spilled: usize,
    /// Bytes of a block's memory.
    pub shared: usize,
}

/// Assembles `text` for `chip`; `None`, with a word about it, where there is no assembler
/// (`MESHWEAVE_PTXAS`, or the one that `make test` fetches).
pub fn assemble(text: &str, chip: &str) -> Option<Vec<Resources>> {
    let fetched = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/target/tools/nvidia/cuda_nvcc/bin/ptxas"
    );
    let ptxas = std::env::var("MESHWEAVE_PTXAS").unwrap_or(fetched.into());
    if !std::path::Path::new(&ptxas).exists() {
        eprintln!("skipped: no assembler of PTX at {ptxas}; `make test` fetches it");
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("kernels.ptx");
    std::fs::write(&source, text).unwrap();
    let output = std::process::Command::new(ptxas)
        .args(["-v", "-arch", chip, "-o"])
        .arg(directory.path().join("kernels.cubin"))
        .arg(source)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let mut all: Vec<Resources> = Vec::new();
    // The number before a word.
    let before = |line: &str, word: &str| -> usize {
        line.split(word)
            .next()
            .and_then(|start| start.split_whitespace().last())
            .and_then(|number| number.parse().ok())
            .unwrap_or(0)
    };
    for line in said.lines() {
        if line.contains("Compiling entry function") {
            let entry = line.split('\'').nth(1).unwrap().to_string();
            all.push(Resources {
                entry,
                ..Resources::default()
            });
        }
        let Some(last) = all.last_mut() else { continue };
        if line.contains("spill stores") {
            last.spilled = before(line, "bytes spill stores") + before(line, "bytes spill loads");
        }
        if line.contains("Used ") {
            last.registers = before(line, "registers");
            if line.contains("bytes smem") {
                last.shared = before(line, "bytes smem");
            }
        }
    }
    Some(all)
}
