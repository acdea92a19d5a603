//! Builds and checks row programs.
//!
//! Enters: calls, one per instruction. Leaves: a [`Kernel`], or the first mistake.
//! Invariant: a finished kernel is well typed; see the rules at each method. Mistakes are bugs of
//! the caller, so methods never fail: the first mistake is kept and comes out of
//! [`KernelBuilder::finish`].

use std::hash::{Hash, Hasher};

use super::kernel::{
    Access, Arg, ArgId, BinaryOp, Elem, Inst, Kernel, LaneLimit, Mutability, Predicate, ReduceKind,
    RowProgram, Span, StartFrom, UnaryOp, Val, ValueType,
};

/// Fowler–Noll–Vo hash, the same in every build (RFC draft-eastlake-fnv, 64 bit, variant 1a).
struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

/// A row program that breaks a rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// The program is malformed: our bug.
    #[error("kernel {kernel}: {message}")]
    Internal {
        /// Name of the kernel.
        kernel: String,
        /// What is wrong.
        message: String,
    },
}

/// Builds one kernel.
#[derive(Debug, Clone)]
pub struct KernelBuilder {
    name: String,
    program: RowProgram,
    mistake: Option<String>,
}

impl KernelBuilder {
    /// A kernel over the row dims `rows` (slowest first; none means one row) and `lanes` lanes.
    pub fn new(name: impl Into<String>, rows: &[usize], lanes: usize) -> Self {
        Self {
            name: name.into(),
            program: RowProgram {
                rows: rows.to_vec(),
                lanes,
                limit: None,
                args: Vec::new(),
                body: Vec::new(),
                types: Vec::new(),
            },
            mistake: None,
        }
    }

    /// Number of row dims.
    pub fn n_row_dims(&self) -> usize {
        self.program.rows.len()
    }

    /// Number of lanes.
    pub fn lanes(&self) -> usize {
        self.program.lanes
    }

    /// Declares the next argument.
    pub fn arg(&mut self, elem: Elem, mutability: Mutability) -> ArgId {
        if elem == Elem::Bool {
            self.mistake("an argument has no storage as Bool".to_string());
        }
        let id = ArgId(self.program.args.len() as u32);
        self.program.args.push(Arg { elem, mutability });
        id
    }

    /// Access to an argument laid out densely over all row dims and the lanes.
    pub fn dense(&self, arg: ArgId) -> Access {
        let mut stride = self.program.lanes as i64;
        let mut outer = vec![0; self.program.rows.len()];
        for (dim, &size) in self.program.rows.iter().enumerate().rev() {
            outer[dim] = stride;
            stride *= size as i64;
        }
        Access {
            arg,
            outer,
            lane: 1,
            offset: 0,
            indexed: None,
        }
    }

    /// Access to an argument with one element per row, laid out densely over the row dims.
    pub fn per_row(&self, arg: ArgId) -> Access {
        let mut access = self.dense(arg);
        let lanes = self.program.lanes.max(1) as i64;
        for stride in &mut access.outer {
            *stride /= lanes;
        }
        access.lane = 0;
        access
    }

    /// Access to an argument with one element per lane, the same for all rows.
    pub fn per_lane(&self, arg: ArgId) -> Access {
        Access {
            arg,
            outer: vec![0; self.program.rows.len()],
            lane: 1,
            offset: 0,
            indexed: None,
        }
    }

    /// Access to element `offset` of an argument, the same for all rows and lanes.
    pub fn single(&self, arg: ArgId, offset: i64) -> Access {
        Access {
            arg,
            outer: vec![0; self.program.rows.len()],
            lane: 0,
            offset,
            indexed: None,
        }
    }

    /// A constant of element `F32`.
    pub fn f32(&mut self, value: f32) -> Val {
        self.constant(Elem::F32, f64::from(value))
    }

    /// A constant of element `F64`.
    pub fn f64(&mut self, value: f64) -> Val {
        self.constant(Elem::F64, value)
    }

    /// A constant of element `I32`.
    pub fn i32(&mut self, value: i32) -> Val {
        self.constant(Elem::I32, f64::from(value))
    }

    fn constant(&mut self, elem: Elem, value: f64) -> Val {
        let bits = value.to_bits();
        let inst = Inst::Const { elem, bits };
        if let Some(idx) = self.program.body.iter().position(|other| *other == inst) {
            return Val(idx as u32);
        }
        self.push(inst, Some((Span::Row, elem)))
    }

    /// The lane's number.
    pub fn lane_index(&mut self) -> Val {
        self.push(Inst::LaneIndex, Some((Span::Lane, Elem::I32)))
    }

    /// The row's position along row dim `dim`.
    pub fn row_index(&mut self, dim: usize) -> Val {
        if dim >= self.program.rows.len() {
            self.mistake(format!(
                "row dim {dim} of {} row dims",
                self.program.rows.len()
            ));
        }
        self.push(Inst::RowIndex(dim), Some((Span::Row, Elem::I32)))
    }

    /// Loads; a lane value if the access has a lane stride. `F64` loads are row values.
    pub fn load(&mut self, access: Access) -> Val {
        let elem = self.check_access(&access);
        let span = access.span();
        if elem == Elem::F64 && span == Span::Lane {
            self.mistake("an F64 load must be a row value".to_string());
        }
        if let Some(arg) = self.program.args.get(access.arg.index())
            && arg.mutability == Mutability::Write
        {
            self.mistake(format!("arg{} is loaded but only Write", access.arg.0));
        }
        let inst = Inst::Load(access);
        if let Some(idx) = self.program.body.iter().position(|other| *other == inst) {
            return Val(idx as u32);
        }
        self.push(inst, Some((span, elem.as_value())))
    }

    /// Applies `op`; floats, except `Not` on booleans and `Neg` on anything but booleans.
    pub fn unary(&mut self, op: UnaryOp, v: Val) -> Val {
        let ty = self.ty(v);
        let legal = match op {
            UnaryOp::Not => ty.elem == Elem::Bool,
            UnaryOp::Neg => ty.elem != Elem::Bool,
            UnaryOp::Abs | UnaryOp::Sqrt | UnaryOp::Rsqrt => ty.elem.is_float(),
            UnaryOp::Exp | UnaryOp::Log | UnaryOp::Tanh | UnaryOp::Erf | UnaryOp::Sigmoid => {
                ty.elem == Elem::F32
            }
        };
        if !legal {
            self.mistake(format!("{op:?} of {:?}", ty.elem));
        }
        self.push(Inst::Unary(op, v), Some((ty.span, ty.elem)))
    }

    /// Applies `op` to operands of one element; a row operand is broadcast to the lanes.
    pub fn binary(&mut self, op: BinaryOp, a: Val, b: Val) -> Val {
        let (span, elem) = self.join(a, b);
        let legal = match op {
            BinaryOp::Add | BinaryOp::Sub | BinaryOp::Mul | BinaryOp::Max | BinaryOp::Min => {
                elem != Elem::Bool
            }
            BinaryOp::Div => elem.is_float(),
            BinaryOp::And | BinaryOp::Or => elem == Elem::Bool,
        };
        if !legal {
            self.mistake(format!("{op:?} of {elem:?}"));
        }
        self.push(Inst::Binary(op, a, b), Some((span, elem)))
    }

    /// `a · b + c`, floats.
    pub fn fma(&mut self, a: Val, b: Val, c: Val) -> Val {
        let (span, elem) = self.join(a, b);
        let (other, _) = self.join(a, c);
        if !elem.is_float() {
            self.mistake(format!("fma of {elem:?}"));
        }
        self.push(Inst::Fma(a, b, c), Some((span.max(other), elem)))
    }

    /// Compares two numbers of one element.
    pub fn compare(&mut self, predicate: Predicate, a: Val, b: Val) -> Val {
        let (span, elem) = self.join(a, b);
        if elem == Elem::Bool {
            self.mistake("comparison of booleans".to_string());
        }
        self.push(Inst::Compare(predicate, a, b), Some((span, Elem::Bool)))
    }

    /// `condition ? a : b`.
    pub fn select(&mut self, condition: Val, a: Val, b: Val) -> Val {
        let (span, elem) = self.join(a, b);
        let ty = self.ty(condition);
        if ty.elem != Elem::Bool {
            self.mistake(format!("condition of element {:?}", ty.elem));
        }
        self.push(
            Inst::Select(condition, a, b),
            Some((span.max(ty.span), elem)),
        )
    }

    /// Converts between numbers.
    pub fn convert(&mut self, elem: Elem, v: Val) -> Val {
        let ty = self.ty(v);
        if ty.elem == Elem::Bool || elem == Elem::Bool {
            self.mistake("conversion from or to Bool".to_string());
        }
        if elem == Elem::F64 && ty.span == Span::Lane {
            self.mistake("F64 lane value".to_string());
        }
        if ty.elem == elem {
            return v;
        }
        self.push(Inst::Convert(elem, v), Some((ty.span, elem)))
    }

    /// `base ^ exponent` of row values, the exponent of element `I32` and at least 0.
    pub fn powi(&mut self, base: Val, exponent: Val) -> Val {
        let (b, e) = (self.ty(base), self.ty(exponent));
        if b.span != Span::Row || e.span != Span::Row || !b.elem.is_float() || e.elem != Elem::I32 {
            self.mistake("powi wants a float row value and an I32 row value".to_string());
        }
        self.push(Inst::PowI(base, exponent), Some((Span::Row, b.elem)))
    }

    /// Reduces an `F32` lane value to a row value.
    pub fn reduce(&mut self, kind: ReduceKind, v: Val) -> Val {
        let ty = self.ty(v);
        if ty.span != Span::Lane || ty.elem != Elem::F32 {
            self.mistake(format!(
                "reduction of a {:?} value of {:?}",
                ty.span, ty.elem
            ));
        }
        self.push(Inst::Reduce(kind, v), Some((Span::Row, Elem::F32)))
    }

    /// Stores; a row value stored with a lane stride fills the lanes.
    pub fn store(&mut self, access: Access, v: Val) {
        self.check_store(&access, v);
        self.push(Inst::Store(access, v), None);
    }

    /// Combines `v` into an `F32` argument, row after row.
    pub fn accumulate(&mut self, access: Access, kind: ReduceKind, start: StartFrom, v: Val) {
        self.check_store(&access, v);
        let arg = self.program.args.get(access.arg.index());
        if self.ty(v).elem != Elem::F32 || arg.is_some_and(|arg| arg.elem != Elem::F32) {
            self.mistake("accumulator that is not F32".to_string());
        }
        if start == StartFrom::Existing
            && let Some(arg) = self.program.args.get(access.arg.index())
            && arg.mutability != Mutability::ReadWrite
        {
            self.mistake(format!(
                "arg{} is accumulated onto but not ReadWrite",
                access.arg.0
            ));
        }
        let inst = Inst::Accumulate {
            access,
            kind,
            start,
            value: v,
        };
        self.push(inst, None);
    }

    /// Limits the visible lanes per row; both are `I32` row values that need no reduction.
    pub fn set_limit(&mut self, visible: Val, extent: Val) {
        for v in [visible, extent] {
            let ty = self.ty(v);
            if ty.span != Span::Row || ty.elem != Elem::I32 {
                self.mistake(format!("lane limit of {:?} {:?}", ty.span, ty.elem));
            }
        }
        self.program.limit = Some(LaneLimit { visible, extent });
    }

    /// Type of a value made so far.
    pub fn ty(&self, v: Val) -> ValueType {
        match self.program.types.get(v.index()) {
            Some(Some(ty)) => *ty,
            // An effect's id is never handed out, so this is unreachable through the builder.
            _ => ValueType {
                span: Span::Row,
                elem: Elem::F32,
            },
        }
    }

    /// The kernel, its name followed by a hash of the code, so that different programs with the
    /// same wished name get different symbols.
    ///
    /// # Errors
    /// As [`Self::finish`].
    pub fn finish_hashed(mut self) -> Result<Kernel, KernelError> {
        let mut hasher = Fnv(0xcbf2_9ce4_8422_2325);
        self.program.hash(&mut hasher);
        self.name = format!("{}_{:016x}", self.name, hasher.0);
        self.finish()
    }

    /// The kernel.
    ///
    /// # Errors
    /// `Internal` with the first mistake; a kernel without lanes, rows or effects is one.
    pub fn finish(mut self) -> Result<Kernel, KernelError> {
        if self.program.lanes == 0 || self.program.n_rows() == 0 {
            let (rows, lanes) = (self.program.rows.clone(), self.program.lanes);
            self.mistake(format!("empty space: rows {rows:?}, lanes {lanes}"));
        }
        if i32::try_from(self.program.lanes).is_err() {
            let lanes = self.program.lanes;
            self.mistake(format!("{lanes} lanes exceed a 32-bit lane number"));
        }
        if !self.program.body.iter().any(Inst::is_effect) {
            self.mistake("no store and no accumulator".to_string());
        }
        let legal_symbol = self
            .name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_')
            && !self.name.is_empty();
        if !legal_symbol {
            let name = self.name.clone();
            self.mistake(format!(
                "{name:?} is no symbol: use letters, digits and underscores"
            ));
        }
        match self.mistake {
            Some(message) => Err(KernelError::Internal {
                kernel: self.name,
                message,
            }),
            None => Ok(Kernel {
                name: self.name,
                program: self.program,
            }),
        }
    }

    fn push(&mut self, inst: Inst, ty: Option<(Span, Elem)>) -> Val {
        let n_values = self.program.body.len();
        let mut dangling = None;
        inst.for_each_operand(|v| {
            if v.index() >= n_values {
                dangling = Some(v);
            }
        });
        if let Some(v) = dangling {
            self.mistake(format!("{v} is used before it is made"));
        }
        self.program.body.push(inst);
        self.program
            .types
            .push(ty.map(|(span, elem)| ValueType { span, elem }));
        Val(n_values as u32)
    }

    fn join(&mut self, a: Val, b: Val) -> (Span, Elem) {
        let (a, b) = (self.ty(a), self.ty(b));
        if a.elem != b.elem {
            self.mistake(format!("operands of {:?} and {:?}", a.elem, b.elem));
        }
        (a.span.max(b.span), a.elem)
    }

    fn check_access(&mut self, access: &Access) -> Elem {
        if access.outer.len() != self.program.rows.len() {
            self.mistake(format!(
                "access with {} row strides to a space of {} row dims",
                access.outer.len(),
                self.program.rows.len()
            ));
        }
        if let Some(indexed) = &access.indexed {
            let ty = self.ty(indexed.index);
            if ty.span != Span::Row || ty.elem != Elem::I32 || indexed.size == 0 {
                self.mistake(format!(
                    "index of {:?} {:?} below {}",
                    ty.span, ty.elem, indexed.size
                ));
            }
        }
        match self.program.args.get(access.arg.index()) {
            Some(arg) => arg.elem,
            None => {
                self.mistake(format!("arg{} is not declared", access.arg.0));
                Elem::F32
            }
        }
    }

    fn check_store(&mut self, access: &Access, v: Val) {
        let elem = self.check_access(access);
        let ty = self.ty(v);
        if ty.elem != elem.as_value() {
            self.mistake(format!(
                "arg{} holds {elem:?}, stored is {:?}",
                access.arg.0, ty.elem
            ));
        }
        if ty.span == Span::Lane && access.span() == Span::Row {
            self.mistake(format!(
                "lane value {v} stored to one element of arg{}",
                access.arg.0
            ));
        }
        if elem == Elem::F64 && access.span() == Span::Lane {
            self.mistake("F64 lane store".to_string());
        }
        if let Some(arg) = self.program.args.get(access.arg.index())
            && arg.mutability == Mutability::Read
        {
            self.mistake(format!("arg{} is stored to but only Read", access.arg.0));
        }
    }

    fn mistake(&mut self, message: String) {
        self.mistake.get_or_insert(message);
    }
}
