//! From the text of a module to entries whose operands are numbered.

use std::collections::BTreeMap;

use super::functions::function;

/// Where the block's memory begins among addresses.
pub(super) const SHARED: u64 = 1 << 60;

pub(super) struct Entry {
    pub(super) params: Vec<String>,
    /// Bytes of the block's memory that the kernel declares itself.
    pub(super) n_shared: usize,
    pub(super) n_registers: usize,
    pub(super) has_products: bool,
    pub(super) code: Vec<Inst>,
}

pub(super) struct Inst {
    /// Register and the value that it must have.
    pub(super) guard: Option<(usize, bool)>,
    pub(super) op: Op,
    pub(super) args: Vec<Arg>,
    pub(super) text: String,
}

#[derive(Clone, Copy)]
pub(super) enum Op {
    /// A function of the operands behind the first, which it sets.
    Compute(fn(&[u64]) -> u64),
    /// The operands in one, the first lowest, each of so many bits.
    Pack(usize),
    /// The last operand in so many pieces of so many bits, the lowest first.
    Unpack(usize, usize),
    LdParam,
    /// So many elements of so many bytes, sign-extended or not.
    Load {
        space: Space,
        n: usize,
        bytes: usize,
        signed: bool,
    },
    Store {
        space: Space,
        n: usize,
        bytes: usize,
    },
    /// An asynchronous copy of so many bytes.
    Copy(usize),
    Commit,
    Wait,
    Branch(usize),
    Warp(WarpOp),
    /// A product of four warps.
    Product(Product),
    /// Orders the thread's writes to the block's memory before what the tensor cores read there.
    FenceAsync,
    Barrier,
    Return,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Space {
    Shared,
    Global,
    Generic,
}

/// What the threads of a warp do together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum WarpOp {
    Barrier,
    ShuffleXor,
    ShuffleUp,
    ShuffleDown,
    ShuffleIdx,
    Ballot,
    /// 8 × 8 matrices of 16-bit elements, transposed or not.
    LoadMatrices {
        n: usize,
        transposed: bool,
    },
    /// Of products of four warps: gives registers to them, ends a group of them, waits for groups.
    ProductFence,
    ProductCommit,
    ProductWait,
    /// m16n8k16 of bf16, or m16n8k8 of tf32.
    Multiply {
        bf16: bool,
    },
}

/// `wgmma.mma_async.m64nNk16.f32.bf16.bf16`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Product {
    /// Columns.
    pub(super) n: usize,
    /// Whether the left operand stands in registers.
    pub(super) from_registers: bool,
}

#[derive(Clone)]
pub(super) enum Arg {
    Register(usize),
    Value(u64),
    Special(Special),
    /// A register (or nothing) and an offset.
    Address(Option<usize>, i64),
    Param(usize),
}

#[derive(Clone, Copy)]
pub(super) enum Special {
    Thread(usize),
    NumThreads(usize),
    Block(usize),
    NumBlocks(usize),
    Lane,
}

/// The entries of a module's text.
pub(super) fn entries(text: &str) -> BTreeMap<String, Entry> {
    let mut parts = text.split(".entry ");
    let mut shared = Shared::default();
    // Dynamic memory is declared outside of entries, and shared by all of them.
    for line in parts.next().unwrap().lines() {
        shared.declare(line);
    }
    parts
        .map(|part| {
            let (name, rest) = part.split_once('(').unwrap();
            let (params, rest) = rest.split_once(')').unwrap();
            let params = params
                .split(',')
                .filter_map(|param| param.split_whitespace().last())
                .map(String::from)
                .collect();
            let body = rest.split_once('{').unwrap().1;
            let entry = Entry::parse(params, body, shared.clone());
            (name.trim().to_string(), entry)
        })
        .collect()
}

/// Names of pieces of the block's memory, and where they begin; dynamic memory lies behind the others.
#[derive(Clone, Default)]
struct Shared {
    offsets: BTreeMap<String, u64>,
    dynamic: Vec<String>,
    n_bytes: usize,
}

impl Shared {
    /// Whether the line declares one.
    fn declare(&mut self, line: &str) -> bool {
        let Some((_, declaration)) = line.split_once(".shared ") else {
            return false;
        };
        if !line.trim_start().starts_with('.') {
            return false;
        }
        let (name, size) = declaration.split_once('[').unwrap();
        let mut words = name.split_whitespace();
        let name = words.next_back().unwrap().to_string();
        let mut align = 4;
        let mut element = 1;
        while let Some(word) = words.next() {
            match word {
                ".align" => align = words.next().unwrap().parse().unwrap(),
                ".b32" | ".f32" => element = 4,
                ".b64" => element = 8,
                ".b8" => {}
                other => panic!("shared memory of type {other}"),
            }
        }
        let size = size.split_once(']').unwrap().0;
        if size.is_empty() {
            self.dynamic.push(name);
        } else {
            let offset = self.n_bytes.next_multiple_of(align);
            self.offsets.insert(name, offset as u64);
            self.n_bytes = offset + element * size.parse::<usize>().unwrap();
        }
        true
    }

    fn find(&self, name: &str) -> Option<u64> {
        if self.dynamic.iter().any(|other| other == name) {
            return Some(SHARED + self.n_bytes.next_multiple_of(16) as u64);
        }
        self.offsets.get(name).map(|offset| SHARED + offset)
    }
}

impl Entry {
    fn parse(params: Vec<String>, body: &str, mut shared: Shared) -> Self {
        let mut registers: BTreeMap<String, usize> = BTreeMap::new();
        let mut labels: BTreeMap<&str, usize> = BTreeMap::new();
        let mut lines = Vec::new();
        for line in body.lines() {
            let line = line.split("//").next().unwrap_or("").trim();
            if line.starts_with('}') {
                break;
            }
            if let Some(label) = line.strip_suffix(':') {
                labels.insert(label, lines.len());
            } else if !shared.declare(line) && !line.is_empty() && !line.starts_with('.') {
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
                _ => Op::of(name, operands)
                    .or_else(|| function(name).map(Op::Compute))
                    .unwrap_or_else(|| panic!("unknown: {line}")),
            };
            let mut parse = |text: &str| -> Arg {
                let text = text.trim();
                if let Some(inner) = text.strip_prefix('[') {
                    let inner = inner.strip_suffix(']').unwrap();
                    let (base, offset) = match inner.split_once('+') {
                        Some((base, offset)) => (base, offset.parse().unwrap()),
                        None => (inner, 0),
                    };
                    if base.starts_with('%') {
                        return Arg::Address(Some(register(base)), offset);
                    }
                    return match shared.find(base) {
                        Some(at) => Arg::Address(None, at as i64 + offset),
                        None => Arg::Param(params.iter().position(|p| p == base).unwrap()),
                    };
                }
                if let Some(special) = special(text) {
                    return Arg::Special(special);
                }
                // What is unpacked and not wanted.
                if text.starts_with('%') || text == "_" {
                    return Arg::Register(register(text));
                }
                if let Some(at) = shared.find(text) {
                    return Arg::Value(at);
                }
                match text.get(..2) {
                    Some("0f" | "0d") => Arg::Value(u64::from_str_radix(&text[2..], 16).unwrap()),
                    _ => {
                        Arg::Value(text.parse::<i64>().unwrap_or_else(|_| panic!("{line}")) as u64)
                    }
                }
            };
            let args = match op {
                Op::Branch(_) | Op::Return | Op::Barrier | Op::Commit | Op::FenceAsync => {
                    Vec::new()
                }
                // Operands in braces follow one another like others; a shuffle's second result, which
                // says whether the source was in range, is not kept.
                _ => operands
                    .split([',', '{', '}'])
                    .map(|text| text.split('|').next().unwrap_or(""))
                    .filter(|text| !text.trim().is_empty())
                    .map(&mut parse)
                    .collect(),
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
            n_shared: shared.n_bytes.next_multiple_of(16),
            n_registers: registers.len(),
            has_products: code.iter().any(|inst| matches!(inst.op, Op::Product(_))),
            code,
        }
    }
}

impl Op {
    /// The instruction of this name, if it does more than compute.
    fn of(name: &str, operands: &str) -> Option<Self> {
        Some(match name {
            "ret" | "exit" => Self::Return,
            "mov.b32" | "mov.b64" if operands.contains('{') => {
                let n = operands.split(['{', '}']).nth(1)?.split(',').count();
                let bits = name[5..].parse::<usize>().ok()? / n;
                match operands.trim().starts_with('{') {
                    true => Self::Unpack(n, bits),
                    false => Self::Pack(bits),
                }
            }
            "bar.sync" | "barrier.sync" => {
                assert!(operands.trim() == "0", "barrier {operands}");
                Self::Barrier
            }
            "fence.proxy.async" | "fence.proxy.async.shared::cta" => Self::FenceAsync,
            "wgmma.fence.sync.aligned" => Self::Warp(WarpOp::ProductFence),
            "wgmma.commit_group.sync.aligned" => Self::Warp(WarpOp::ProductCommit),
            "wgmma.wait_group.sync.aligned" => Self::Warp(WarpOp::ProductWait),
            _ if name.starts_with("wgmma.mma_async.sync.aligned.m64n") => {
                let shape = name.strip_prefix("wgmma.mma_async.sync.aligned.m64n")?;
                let n = shape.strip_suffix("k16.f32.bf16.bf16")?.parse().ok()?;
                assert!(n % 8 == 0 && (8..=256).contains(&n), "{name}");
                Self::Product(Product {
                    n,
                    from_registers: operands.matches('{').count() == 2,
                })
            }
            "bar.warp.sync" => Self::Warp(WarpOp::Barrier),
            "shfl.sync.bfly.b32" => Self::Warp(WarpOp::ShuffleXor),
            "shfl.sync.up.b32" => Self::Warp(WarpOp::ShuffleUp),
            "shfl.sync.down.b32" => Self::Warp(WarpOp::ShuffleDown),
            "shfl.sync.idx.b32" => Self::Warp(WarpOp::ShuffleIdx),
            "vote.sync.ballot.b32" => Self::Warp(WarpOp::Ballot),
            "cp.async.commit_group" => Self::Commit,
            "cp.async.wait_group" => Self::Wait,
            "cp.async.cg.shared.global" | "cp.async.ca.shared.global" => {
                Self::Copy(operands.split(',').nth(2)?.trim().parse().ok()?)
            }
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" => {
                Self::Warp(WarpOp::Multiply { bf16: true })
            }
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32" => {
                Self::Warp(WarpOp::Multiply { bf16: false })
            }
            _ if name.starts_with("ldmatrix.sync.aligned.m8n8.") => {
                Self::Warp(WarpOp::LoadMatrices {
                    n: name.split(".x").nth(1)?.get(..1)?.parse().ok()?,
                    transposed: name.contains(".trans."),
                })
            }
            _ if name.starts_with("ld.param") => Self::LdParam,
            _ if name.starts_with("ld.") || name.starts_with("st.") => {
                let space = if name.contains(".shared") {
                    Space::Shared
                } else if name.contains(".global") {
                    Space::Global
                } else {
                    assert!(!name.contains(".local"), "{name}: registers ran out");
                    Space::Generic
                };
                let n = if name.contains(".v4.") {
                    4
                } else if name.contains(".v2.") {
                    2
                } else {
                    1
                };
                let ty = name.rsplit('.').next()?;
                let bytes = ty[1..].parse::<usize>().ok()? / 8;
                if name.starts_with("ld.") {
                    Self::Load {
                        space,
                        n,
                        bytes,
                        signed: ty.starts_with('s') && bytes < 4,
                    }
                } else {
                    Self::Store { space, n, bytes }
                }
            }
            _ => return None,
        })
    }
}

fn special(text: &str) -> Option<Special> {
    let (name, dim) = text.split_once('.').unwrap_or((text, "x"));
    let dim = ["x", "y", "z"].iter().position(|other| *other == dim)?;
    Some(match name {
        "%tid" => Special::Thread(dim),
        "%ntid" => Special::NumThreads(dim),
        "%ctaid" => Special::Block(dim),
        "%nctaid" => Special::NumBlocks(dim),
        "%laneid" => Special::Lane,
        _ => return None,
    })
}
