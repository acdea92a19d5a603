//! Row programs: the structured form of a generated kernel.
//!
//! Enters: a description of one fused group, built through [`KernelBuilder`].
//! Leaves: a [`Kernel`], a value that the emitters turn into code.
//!
//! A row program runs over a grid of *rows* (the outer dims) and, inside each row, over a number
//! of contiguous *lanes*. Its body is straight-line SSA with two spans of values: one value per
//! row, or one value per lane of the row. A reduction takes lanes to a row value. How often the
//! lanes are walked is not said here; [`crate::codegen::lanes`] derives it.
//!
//! Invariant: ids are in range, operands precede their uses, spans and elements agree, and an
//! argument is only written if it says so.
//!
//! The generated function is `void name(void **args, int64_t begin, int64_t end)`, where
//! `begin..end` is a range of the flattened rows (the last row dim fastest).

use std::fmt;

pub use super::kernel_builder::{KernelBuilder, KernelError};

/// Element of a value or an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Elem {
    /// 32-bit float, the element of almost everything.
    F32,
    /// 64-bit float, for scalars whose rounding shows (bias correction). Row values only.
    F64,
    /// 32-bit signed integer: token ids, positions, indices.
    I32,
    /// 16-bit float with the exponents of a 32-bit one. Arguments only: loaded, it is an `F32`.
    Bf16,
    /// Result of a comparison; has no storage.
    Bool,
}

/// Whether a value exists once per row or once per lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Span {
    /// One value for the whole row.
    Row,
    /// One value for each lane of the row.
    Lane,
}

/// Type of an SSA value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueType {
    /// Row or lane.
    pub span: Span,
    /// Element.
    pub elem: Elem,
}

/// An SSA value: the index of the instruction that makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Val(pub(super) u32);

impl Val {
    /// Position of the defining instruction in [`RowProgram::body`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// An argument: the position of its pointer in the `args` array.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ArgId(pub(super) u32);

impl ArgId {
    /// Position of the pointer in the `args` array.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What a kernel may do to an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mutability {
    /// Only loaded.
    Read,
    /// Only stored (or accumulated from zero): what was there does not matter.
    Write,
    /// Loaded and stored in place, or accumulated onto what is there.
    ReadWrite,
}

/// Declaration of an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Arg {
    /// Element in memory.
    pub elem: Elem,
    /// What the kernel does to it.
    pub mutability: Mutability,
}

/// An address that depends on a row value: `index · stride` is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowIndexed {
    /// A row value of element `I32`; the kernel trusts it to lie in `0..size`.
    pub index: Val,
    /// Elements between two index values.
    pub stride: i64,
    /// Number of index values.
    pub size: usize,
}

/// Where an instruction touches an argument. All figures are in elements:
/// `offset + Σ outer[d]·row[d] + lane·j + index·stride`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Access {
    /// The argument.
    pub arg: ArgId,
    /// Stride per row dim; 0 broadcasts.
    pub outer: Vec<i64>,
    /// Stride between lanes; 0 makes it one element per row.
    pub lane: i64,
    /// Constant offset.
    pub offset: i64,
    /// Indirect part, if any.
    pub indexed: Option<RowIndexed>,
}

impl Access {
    /// One element per lane, or one per row?
    pub fn span(&self) -> Span {
        if self.lane == 0 {
            Span::Row
        } else {
            Span::Lane
        }
    }

    /// The same access, `elements` further on.
    pub fn shifted(mut self, elements: i64) -> Self {
        self.offset += elements;
        self
    }

    /// The same access, moved by a row value: `index · stride` with `index` in `0..size`.
    pub fn at(mut self, index: Val, stride: i64, size: usize) -> Self {
        self.indexed = Some(RowIndexed {
            index,
            stride,
            size,
        });
        self
    }
}

/// Operations of one operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum UnaryOp {
    Neg,
    Abs,
    Exp,
    Log,
    Sqrt,
    /// `1 / sqrt(x)`, correctly rounded in both steps.
    Rsqrt,
    Tanh,
    Erf,
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
    /// Boolean negation.
    Not,
}

impl UnaryOp {
    /// Costs a polynomial, so that a second pass reads the result back instead of recomputing it.
    pub fn is_expensive(self) -> bool {
        match self {
            Self::Exp | Self::Log | Self::Tanh | Self::Erf | Self::Sigmoid => true,
            Self::Neg | Self::Abs | Self::Sqrt | Self::Rsqrt | Self::Not => false,
        }
    }
}

/// Operations of two operands of one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BinaryOp {
    Add,
    Sub,
    Mul,
    /// Floats only.
    Div,
    /// `a > b ? a : b`: a NaN in `b` propagates, so put the data second.
    Max,
    /// `a < b ? a : b`: a NaN in `b` propagates, so put the data second.
    Min,
    /// Booleans only.
    And,
    /// Booleans only.
    Or,
}

/// Ordered comparisons (false on NaN), except `Ne`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Predicate {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
}

/// Reductions over the lanes of a row, and of column accumulators over rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ReduceKind {
    /// Sum; several partial sums per row, in an order fixed by the target's vector width.
    Sum,
    /// Maximum; NaNs are ignored.
    Max,
}

/// What a column accumulator starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StartFrom {
    /// The kernel first fills what it accumulates into with the identity.
    Identity,
    /// What the argument holds.
    Existing,
}

/// One instruction. The effects (`Store`, `Accumulate`) make no value.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Inst {
    /// A constant row value; the bits of an `f64` that represents it exactly or is rounded once.
    Const {
        elem: Elem,
        bits: u64,
    },
    /// The lane's number, a lane value of element `I32`.
    LaneIndex,
    /// The row's position along one row dim, of element `I32`.
    RowIndex(usize),
    Load(Access),
    Unary(UnaryOp, Val),
    Binary(BinaryOp, Val, Val),
    /// `a · b + c` with one rounding where the target has it.
    Fma(Val, Val, Val),
    Compare(Predicate, Val, Val),
    /// `Select(c, a, b)`: `c ? a : b`.
    Select(Val, Val, Val),
    /// Between `I32`, `F32` and `F64` (float to integer truncates).
    Convert(Elem, Val),
    /// `base ^ exponent` by repeated squaring; row values, exponent of element `I32`, at least 0.
    PowI(Val, Val),
    /// Lanes to one row value.
    Reduce(ReduceKind, Val),
    /// A row value stored to lanes fills them.
    Store(Access, Val),
    /// Combines the value into the argument, row after row in ascending order.
    Accumulate {
        access: Access,
        kind: ReduceKind,
        start: StartFrom,
        value: Val,
    },
}

impl Inst {
    /// Calls `f` with every operand, indices of accesses included.
    pub fn for_each_operand(&self, mut f: impl FnMut(Val)) {
        let access = |a: &Access, f: &mut dyn FnMut(Val)| {
            if let Some(indexed) = &a.indexed {
                f(indexed.index);
            }
        };
        match self {
            Self::Const { .. } | Self::LaneIndex | Self::RowIndex(_) => {}
            Self::Load(a) => access(a, &mut f),
            Self::Unary(_, v) | Self::Convert(_, v) | Self::Reduce(_, v) => f(*v),
            Self::Binary(_, a, b) | Self::Compare(_, a, b) | Self::PowI(a, b) => {
                f(*a);
                f(*b);
            }
            Self::Fma(a, b, c) | Self::Select(a, b, c) => {
                f(*a);
                f(*b);
                f(*c);
            }
            Self::Store(a, v) => {
                access(a, &mut f);
                f(*v);
            }
            Self::Accumulate {
                access: a, value, ..
            } => {
                access(a, &mut f);
                f(*value);
            }
        }
    }

    /// Calls `f` with every operand, indices of accesses included, for it to change.
    pub fn for_each_operand_mut(&mut self, mut f: impl FnMut(&mut Val)) {
        let access = |a: &mut Access, f: &mut dyn FnMut(&mut Val)| {
            if let Some(indexed) = &mut a.indexed {
                f(&mut indexed.index);
            }
        };
        match self {
            Self::Const { .. } | Self::LaneIndex | Self::RowIndex(_) => {}
            Self::Load(a) => access(a, &mut f),
            Self::Unary(_, v) | Self::Convert(_, v) | Self::Reduce(_, v) => f(v),
            Self::Binary(_, a, b) | Self::Compare(_, a, b) | Self::PowI(a, b) => {
                f(a);
                f(b);
            }
            Self::Fma(a, b, c) | Self::Select(a, b, c) => {
                f(a);
                f(b);
                f(c);
            }
            Self::Store(a, v) => {
                access(a, &mut f);
                f(v);
            }
            Self::Accumulate {
                access: a, value, ..
            } => {
                access(a, &mut f);
                f(value);
            }
        }
    }

    /// Stores or accumulates?
    pub fn is_effect(&self) -> bool {
        matches!(self, Self::Store(..) | Self::Accumulate { .. })
    }
}

/// Rows whose number of visible lanes depends on the row (causal attention).
///
/// Reductions see the lanes `0..visible`; lane stores write zeros to `visible..extent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LaneLimit {
    /// Row value of element `I32`, at most `lanes`.
    pub visible: Val,
    /// Row value of element `I32`, at most `lanes`.
    pub extent: Val,
}

/// The code of a kernel, without its name: equal programs are compiled once.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowProgram {
    pub(super) rows: Vec<usize>,
    pub(super) lanes: usize,
    pub(super) limit: Option<LaneLimit>,
    pub(super) args: Vec<Arg>,
    pub(super) body: Vec<Inst>,
    pub(super) types: Vec<Option<ValueType>>,
}

impl RowProgram {
    /// Sizes of the row dims, slowest first.
    pub fn rows(&self) -> &[usize] {
        &self.rows
    }

    /// Number of flattened rows.
    pub fn n_rows(&self) -> usize {
        self.rows.iter().product()
    }

    /// Number of lanes of a row (the most, where a limit is set).
    pub fn lanes(&self) -> usize {
        self.lanes
    }

    /// The limit of visible lanes, if the rows are ragged.
    pub fn limit(&self) -> Option<LaneLimit> {
        self.limit
    }

    /// Arguments in the order of the pointer array.
    pub fn args(&self) -> &[Arg] {
        &self.args
    }

    /// Instructions in order.
    pub fn body(&self) -> &[Inst] {
        &self.body
    }

    /// The instruction that makes `val`.
    pub fn inst(&self, val: Val) -> &Inst {
        &self.body[val.index()]
    }

    /// Type of a value; `None` for effects.
    pub fn value_type(&self, val: Val) -> Option<ValueType> {
        self.types[val.index()]
    }

    /// Every instruction with its id.
    pub fn insts(&self) -> impl Iterator<Item = (Val, &Inst)> {
        (0u32..).map(Val).zip(&self.body)
    }

    /// May disjoint row ranges run at the same time? Not with accumulators, which carry a value
    /// from row to row, nor with stores at computed places, which may collide.
    pub fn is_splittable(&self) -> bool {
        self.body.iter().all(|inst| match inst {
            Inst::Accumulate { .. } => false,
            Inst::Store(access, _) => access.indexed.is_none(),
            _ => true,
        })
    }

    /// The program with those of its effects alone that `keep` names.
    pub fn with_effects(&self, keep: impl Fn(Val) -> bool) -> RowProgram {
        let mut place = Vec::with_capacity(self.body.len());
        let (mut body, mut types) = (Vec::new(), Vec::new());
        for (val, inst) in self.insts() {
            place.push(Val(body.len() as u32));
            if inst.is_effect() && !keep(val) {
                continue;
            }
            let mut inst = inst.clone();
            inst.for_each_operand_mut(|operand| *operand = place[operand.index()]);
            body.push(inst);
            types.push(self.types[val.index()]);
        }
        let limit = self.limit.map(|limit| LaneLimit {
            visible: place[limit.visible.index()],
            extent: place[limit.extent.index()],
        });
        RowProgram {
            limit,
            body,
            types,
            ..self.clone()
        }
    }

    /// Whether the memory of `read` may be given to `written`: the program touches both at the
    /// same addresses only, and each address is loaded before it is stored.
    ///
    /// Stores come in the last pass over a row and after the loads of their lanes, so this holds
    /// when all accesses walk alike and start at the same offsets, at least a row apart.
    pub fn in_place(&self, read: ArgId, written: ArgId) -> bool {
        if self.args[read.index()].elem.size() != self.args[written.index()].elem.size() {
            return false;
        }
        let mut reads = Vec::new();
        let mut writes = Vec::new();
        for inst in &self.body {
            match inst {
                Inst::Load(access) if access.arg == read => reads.push(access),
                Inst::Store(access, _) if access.arg == written => writes.push(access),
                Inst::Accumulate { access, .. } if access.arg == read || access.arg == written => {
                    return false;
                }
                _ => {}
            }
        }
        let [first, ..] = reads.as_slice() else {
            return false;
        };
        // A broadcast address would be read again by a later row.
        let moves = first
            .outer
            .iter()
            .zip(&self.rows)
            .all(|(&stride, &size)| stride != 0 || size == 1);
        let alike = reads.iter().chain(&writes).all(|access| {
            access.indexed.is_none() && access.outer == first.outer && access.lane == first.lane
        });
        let offsets = |accesses: &[&Access]| {
            let mut offsets: Vec<i64> = accesses.iter().map(|access| access.offset).collect();
            offsets.sort_unstable();
            offsets.dedup();
            offsets
        };
        let (read_at, written_at) = (offsets(&reads), offsets(&writes));
        let row_span = match first.span() {
            Span::Row => 1,
            Span::Lane => first.lane.abs() * self.lanes as i64,
        };
        let apart = read_at.windows(2).all(|pair| pair[1] - pair[0] >= row_span);
        moves && alike && apart && read_at == written_at
    }

    /// Does it store every element in the order of memory, row after row?
    pub fn stores_in_order(&self) -> bool {
        let mut stride = self.lanes as i64;
        let mut outer: Vec<i64> = Vec::with_capacity(self.rows.len());
        for &size in self.rows.iter().rev() {
            outer.push(stride);
            stride *= size as i64;
        }
        outer.reverse();
        self.body.iter().all(|inst| match inst {
            Inst::Store(access, _) => {
                access.indexed.is_none()
                    && access.offset == 0
                    && (access.lane == 1 || self.lanes == 1)
                    && (access.outer.iter().zip(&outer).zip(&self.rows))
                        .all(|((have, want), &size)| have == want || size == 1)
            }
            Inst::Accumulate { .. } => false,
            _ => true,
        })
    }

    /// Bytes that one call over all rows moves from and to memory, each access counted once.
    pub fn bytes(&self) -> usize {
        let mut seen: Vec<&Access> = Vec::new();
        let mut total = 0;
        for inst in &self.body {
            let access = match inst {
                Inst::Load(access) | Inst::Store(access, _) => access,
                Inst::Accumulate { access, .. } => access,
                _ => continue,
            };
            if !matches!(inst, Inst::Store(..)) && seen.contains(&access) {
                continue;
            }
            seen.push(access);
            let rows: usize = access
                .outer
                .iter()
                .zip(&self.rows)
                .map(|(&stride, &size)| if stride == 0 { 1 } else { size })
                .product();
            let rows = if access.indexed.is_some() {
                self.n_rows()
            } else {
                rows
            };
            let lanes = match access.span() {
                Span::Row => 1,
                Span::Lane => self.lanes,
            };
            total += rows * lanes * self.args[access.arg.index()].elem.size();
        }
        total
    }
}

impl Elem {
    /// Bytes in memory.
    pub fn size(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::F64 => 8,
            Self::Bf16 => 2,
            Self::Bool => 1,
        }
    }

    /// Is it a float?
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F64 | Self::Bf16)
    }

    /// Element of a value that is loaded or stored as this.
    #[must_use]
    pub fn as_value(self) -> Self {
        match self {
            Self::Bf16 => Self::F32,
            other => other,
        }
    }
}

/// A named row program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    pub(super) name: String,
    pub(super) program: RowProgram,
}

impl Kernel {
    /// The wished symbol; [`crate::mlir`] may give equal programs one symbol.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The code.
    pub fn program(&self) -> &RowProgram {
        &self.program
    }

    /// The same code under another symbol.
    pub fn renamed(self, name: String) -> Self {
        Self { name, ..self }
    }

    /// A part of the code, under a symbol of its own.
    pub(crate) fn part(&self, suffix: &str, program: RowProgram) -> Self {
        let name = format!("{}{suffix}", self.name);
        Self { name, program }
    }
}

impl fmt::Display for Val {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.0)
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "arg{}[", self.arg.0)?;
        for (dim, stride) in self.outer.iter().enumerate() {
            if *stride != 0 {
                write!(f, "{stride}*r{dim} + ")?;
            }
        }
        if self.lane != 0 {
            write!(f, "{}*j + ", self.lane)?;
        }
        if let Some(indexed) = &self.indexed {
            write!(
                f,
                "{}*{}<{} + ",
                indexed.stride, indexed.index, indexed.size
            )?;
        }
        write!(f, "{}]", self.offset)
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let program = &self.program;
        writeln!(
            f,
            "kernel {} rows {:?} lanes {} {{",
            self.name, program.rows, program.lanes
        )?;
        for (idx, arg) in program.args.iter().enumerate() {
            writeln!(f, "  arg{idx}: {:?} {:?}", arg.elem, arg.mutability)?;
        }
        if let Some(limit) = program.limit {
            writeln!(f, "  limit {} extent {}", limit.visible, limit.extent)?;
        }
        for (val, inst) in program.insts() {
            write!(f, "  ")?;
            if let Some(ty) = program.value_type(val) {
                write!(f, "{val}: {:?} {:?} = ", ty.span, ty.elem)?;
            }
            match inst {
                Inst::Const { bits, .. } => writeln!(f, "const {:?}", f64::from_bits(*bits))?,
                Inst::LaneIndex => writeln!(f, "lane")?,
                Inst::RowIndex(dim) => writeln!(f, "row {dim}")?,
                Inst::Load(access) => writeln!(f, "load {access}")?,
                Inst::Unary(op, v) => writeln!(f, "{op:?} {v}")?,
                Inst::Binary(op, a, b) => writeln!(f, "{op:?} {a} {b}")?,
                Inst::Fma(a, b, c) => writeln!(f, "Fma {a} {b} {c}")?,
                Inst::Compare(p, a, b) => writeln!(f, "{p:?} {a} {b}")?,
                Inst::Select(c, a, b) => writeln!(f, "Select {c} {a} {b}")?,
                Inst::Convert(elem, v) => writeln!(f, "{elem:?} {v}")?,
                Inst::PowI(a, b) => writeln!(f, "PowI {a} {b}")?,
                Inst::Reduce(kind, v) => writeln!(f, "reduce {kind:?} {v}")?,
                Inst::Store(access, v) => writeln!(f, "store {access} {v}")?,
                Inst::Accumulate {
                    access,
                    kind,
                    start,
                    value,
                } => writeln!(f, "accumulate {kind:?} {start:?} {access} {value}")?,
            }
        }
        write!(f, "}}")
    }
}
