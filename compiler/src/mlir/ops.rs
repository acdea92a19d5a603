//! A thin layer over melior: makes one operation of a dialect per method.
//!
//! Enters: operands as [`Value`]s. Leaves: operations appended to the current block.
//! Invariant: every operation made here is appended to a block of the module under construction,
//! and nothing is erased while the builder lives, so the values it hands out stay valid for `'c`.

mod neighbors;

use melior::Context;
use melior::dialect::llvm;
use melior::ir::attribute::{DenseElementsAttribute, FloatAttribute, IntegerAttribute};
use melior::ir::block::BlockLike;
use melior::ir::operation::OperationBuilder;
use melior::ir::r#type::IntegerType;
use melior::ir::{
    Attribute, Block, BlockRef, Identifier, Location, Region, RegionLike, Type, Value, ValueLike,
};

use super::Error;
use crate::codegen::kernel::Elem;

/// A value of the module under construction.
pub type V<'c> = Value<'c, 'c>;

/// One element or a vector of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// One element.
    Scalar,
    /// That many elements.
    Vector(usize),
}

/// Comparison, for floats and integers alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cmp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
}

/// The address space of memory that a block's threads share.
const SHARED: u32 = 3;

/// Appends operations to a block.
pub struct Ops<'c> {
    context: &'c Context,
    location: Location<'c>,
    block: BlockRef<'c, 'c>,
    /// Whether `math.fma` is one instruction of the target.
    pub has_fma: bool,
}

impl<'c> Ops<'c> {
    /// Starts at the end of `block`.
    ///
    /// # Safety
    /// `block` must be owned by a module that outlives `'c`'s uses of the values made here.
    pub unsafe fn new(context: &'c Context, block: &Block<'c>, has_fma: bool) -> Self {
        Self {
            context,
            location: Location::unknown(context),
            // SAFETY: the caller guarantees that the block outlives the builder.
            block: unsafe { BlockRef::from_raw(block.to_raw()) },
            has_fma,
        }
    }

    /// Type of `elem` in `form`.
    pub fn ty(&self, elem: Elem, form: Form) -> Type<'c> {
        let elem = match elem {
            Elem::F32 => Type::float32(self.context),
            Elem::F64 => Type::float64(self.context),
            Elem::I32 => IntegerType::new(self.context, 32).into(),
            // Its bits: what computes with it has widened it.
            Elem::Bf16 => IntegerType::new(self.context, 16).into(),
            Elem::Bool => IntegerType::new(self.context, 1).into(),
        };
        self.formed(elem, form)
    }

    /// `i64`, of addresses and loop counters, in `form`.
    pub fn i64_ty(&self, form: Form) -> Type<'c> {
        self.formed(IntegerType::new(self.context, 64).into(), form)
    }

    /// `!llvm.ptr`, or a vector of pointers.
    pub fn ptr_ty(&self, form: Form) -> Type<'c> {
        self.formed(llvm::r#type::pointer(self.context, 0), form)
    }

    fn formed(&self, elem: Type<'c>, form: Form) -> Type<'c> {
        match form {
            Form::Scalar => elem,
            Form::Vector(width) => Type::vector(&[width as u64], elem),
        }
    }

    /// Appends an operation without results.
    pub fn op0(
        &mut self,
        name: &str,
        operands: &[V<'c>],
        attributes: &[(&str, Attribute<'c>)],
    ) -> Result<(), Error> {
        self.append(name, operands, attributes, &[], None)?;
        Ok(())
    }

    /// Appends an operation with one result.
    pub fn op1(
        &mut self,
        name: &str,
        operands: &[V<'c>],
        attributes: &[(&str, Attribute<'c>)],
        result: Type<'c>,
    ) -> Result<V<'c>, Error> {
        let results = self.append(name, operands, attributes, &[result], None)?;
        results.first().copied().ok_or_else(|| Error::Internal {
            message: format!("{name} has no result"),
        })
    }

    fn append(
        &mut self,
        name: &str,
        operands: &[V<'c>],
        attributes: &[(&str, Attribute<'c>)],
        results: &[Type<'c>],
        region: Option<Region<'c>>,
    ) -> Result<Vec<V<'c>>, Error> {
        let attributes: Vec<(Identifier<'c>, Attribute<'c>)> = attributes
            .iter()
            .map(|(name, attribute)| (Identifier::new(self.context, name), *attribute))
            .collect();
        let mut builder = OperationBuilder::new(name, self.location)
            .add_operands(operands)
            .add_attributes(&attributes)
            .add_results(results);
        if let Some(region) = region {
            builder = builder.add_regions([region]);
        }
        let operation = builder.build().map_err(|error| Error::Internal {
            message: format!("{name}: {error}"),
        })?;
        let operation = self.block.append_operation(operation);
        let mut values = Vec::with_capacity(results.len());
        for idx in 0..results.len() {
            let value = operation.result(idx).map_err(|error| Error::Internal {
                message: format!("{name}: {error}"),
            })?;
            // SAFETY: the operation now belongs to a block of the module, see the invariant.
            values.push(unsafe { Value::from_raw(value.to_raw()) });
        }
        Ok(values)
    }

    // Constants.

    /// A float constant.
    pub fn float(&mut self, elem: Elem, form: Form, value: f64) -> Result<V<'c>, Error> {
        let scalar: Attribute<'c> =
            FloatAttribute::new(self.context, self.ty(elem, Form::Scalar), value).into();
        self.constant(scalar, self.ty(elem, form), form)
    }

    /// An `i32` constant.
    pub fn int(&mut self, form: Form, value: i32) -> Result<V<'c>, Error> {
        let scalar: Attribute<'c> =
            IntegerAttribute::new(self.ty(Elem::I32, Form::Scalar), i64::from(value)).into();
        self.constant(scalar, self.ty(Elem::I32, form), form)
    }

    /// An `i64` constant.
    pub fn i64(&mut self, value: i64) -> Result<V<'c>, Error> {
        let ty = self.i64_ty(Form::Scalar);
        self.constant(IntegerAttribute::new(ty, value).into(), ty, Form::Scalar)
    }

    /// The `i32` vector `0, 1, …, width-1`.
    pub fn iota(&mut self, width: usize) -> Result<V<'c>, Error> {
        let values: Vec<i32> = (0..width as i32).collect();
        let ty = self.ty(Elem::I32, Form::Vector(width));
        let attribute = DenseElementsAttribute::i32_values(ty, &values).into();
        self.op1("arith.constant", &[], &[("value", attribute)], ty)
    }

    /// The mask of a vector whose first `n_set` lanes are set.
    pub fn prefix_mask(&mut self, width: usize, n_set: usize) -> Result<V<'c>, Error> {
        let values: Vec<i32> = (0..width).map(|lane| i32::from(lane < n_set)).collect();
        let ty = self.ty(Elem::Bool, Form::Vector(width));
        let attribute = DenseElementsAttribute::bool_values(ty, &values).into();
        self.op1("arith.constant", &[], &[("value", attribute)], ty)
    }

    fn constant(
        &mut self,
        scalar: Attribute<'c>,
        ty: Type<'c>,
        form: Form,
    ) -> Result<V<'c>, Error> {
        let value = match form {
            Form::Scalar => scalar,
            Form::Vector(_) => DenseElementsAttribute::splat(ty, scalar).into(),
        };
        self.op1("arith.constant", &[], &[("value", value)], ty)
    }

    // Arithmetic.

    /// An operation whose result has the type of its first operand.
    pub fn same(&mut self, name: &str, operands: &[V<'c>]) -> Result<V<'c>, Error> {
        let Some(first) = operands.first() else {
            return Err(Error::Internal {
                message: format!("{name} without operands"),
            });
        };
        let ty = first.r#type();
        self.op1(name, operands, &[], ty)
    }

    /// `a + b` of floats.
    pub fn addf(&mut self, a: V<'c>, b: V<'c>) -> Result<V<'c>, Error> {
        self.same("arith.addf", &[a, b])
    }

    /// `a - b` of floats.
    pub fn subf(&mut self, a: V<'c>, b: V<'c>) -> Result<V<'c>, Error> {
        self.same("arith.subf", &[a, b])
    }

    /// `a · b` of floats.
    pub fn mulf(&mut self, a: V<'c>, b: V<'c>) -> Result<V<'c>, Error> {
        self.same("arith.mulf", &[a, b])
    }

    /// `a / b` of floats.
    pub fn divf(&mut self, a: V<'c>, b: V<'c>) -> Result<V<'c>, Error> {
        self.same("arith.divf", &[a, b])
    }

    /// `a · b + c`; two roundings on targets without the instruction, where `math.fma` would be a
    /// library call per lane.
    pub fn fma(&mut self, a: V<'c>, b: V<'c>, c: V<'c>) -> Result<V<'c>, Error> {
        if self.has_fma {
            self.same("math.fma", &[a, b, c])
        } else {
            let product = self.mulf(a, b)?;
            self.addf(product, c)
        }
    }

    /// `a + b` of integers.
    pub fn addi(&mut self, a: V<'c>, b: V<'c>) -> Result<V<'c>, Error> {
        self.same("arith.addi", &[a, b])
    }

    /// `a - b` of integers.
    pub fn subi(&mut self, a: V<'c>, b: V<'c>) -> Result<V<'c>, Error> {
        self.same("arith.subi", &[a, b])
    }

    /// `a · b` of integers.
    pub fn muli(&mut self, a: V<'c>, b: V<'c>) -> Result<V<'c>, Error> {
        self.same("arith.muli", &[a, b])
    }

    /// Ordered comparison of floats (unordered for `Ne`).
    pub fn cmpf(&mut self, cmp: Cmp, form: Form, a: V<'c>, b: V<'c>) -> Result<V<'c>, Error> {
        // Numbers of `arith::CmpFPredicate`.
        let predicate = match cmp {
            Cmp::Eq => 1,
            Cmp::Gt => 2,
            Cmp::Ge => 3,
            Cmp::Lt => 4,
            Cmp::Le => 5,
            Cmp::Ne => 13,
        };
        self.cmp("arith.cmpf", predicate, form, a, b)
    }

    /// Signed comparison of integers.
    pub fn cmpi(&mut self, cmp: Cmp, form: Form, a: V<'c>, b: V<'c>) -> Result<V<'c>, Error> {
        // Numbers of `arith::CmpIPredicate`.
        let predicate = match cmp {
            Cmp::Eq => 0,
            Cmp::Ne => 1,
            Cmp::Lt => 2,
            Cmp::Le => 3,
            Cmp::Gt => 4,
            Cmp::Ge => 5,
        };
        self.cmp("arith.cmpi", predicate, form, a, b)
    }

    fn cmp(
        &mut self,
        name: &str,
        predicate: i64,
        form: Form,
        a: V<'c>,
        b: V<'c>,
    ) -> Result<V<'c>, Error> {
        let predicate = IntegerAttribute::new(self.i64_ty(Form::Scalar), predicate).into();
        let ty = self.ty(Elem::Bool, form);
        self.op1(name, &[a, b], &[("predicate", predicate)], ty)
    }

    /// `condition ? a : b`.
    pub fn select(&mut self, condition: V<'c>, a: V<'c>, b: V<'c>) -> Result<V<'c>, Error> {
        let ty = a.r#type();
        self.op1("arith.select", &[condition, a, b], &[], ty)
    }

    /// Reads the bits as another type of the same size.
    pub fn bitcast(&mut self, v: V<'c>, ty: Type<'c>) -> Result<V<'c>, Error> {
        self.op1("arith.bitcast", &[v], &[], ty)
    }

    /// A scalar in every lane.
    pub fn broadcast(&mut self, v: V<'c>, elem: Elem, width: usize) -> Result<V<'c>, Error> {
        let ty = self.ty(elem, Form::Vector(width));
        self.op1("vector.broadcast", &[v], &[], ty)
    }

    /// Horizontal reduction of an `f32` vector; `kind` is a `vector.kind`.
    ///
    /// Reassociation is allowed: the order inside a vector is the target's.
    /// `nnan` holds for maxima because accumulators never take a NaN.
    pub fn horizontal(&mut self, kind: &str, v: V<'c>) -> Result<V<'c>, Error> {
        let flags = if kind == "add" {
            "reassoc"
        } else {
            "reassoc,nnan"
        };
        let kind = self.attribute(&format!("#vector.kind<{kind}>"))?;
        let flags = self.attribute(&format!("#arith.fastmath<{flags}>"))?;
        let ty = self.ty(Elem::F32, Form::Scalar);
        self.op1(
            "vector.reduction",
            &[v],
            &[("kind", kind), ("fastmath", flags)],
            ty,
        )
    }

    // Memory. Accesses claim the alignment of one element only; those of neighbors are in a module.

    /// `base + index · size_of(elem)`.
    pub fn element_ptr(&mut self, base: V<'c>, index: V<'c>, elem: Elem) -> Result<V<'c>, Error> {
        self.gep(base, index, self.ty(elem, Form::Scalar), Form::Scalar)
    }

    /// One pointer per lane: `base + indices[lane] · size_of(elem)`, indices of `i64`.
    pub fn element_ptrs(
        &mut self,
        base: V<'c>,
        indices: V<'c>,
        elem: Elem,
        width: usize,
    ) -> Result<V<'c>, Error> {
        let elem = self.ty(elem, Form::Scalar);
        self.gep(base, indices, elem, Form::Vector(width))
    }

    /// The pointer at position `idx` of an array of pointers.
    pub fn load_ptr(&mut self, array: V<'c>, idx: usize) -> Result<V<'c>, Error> {
        let ptr = self.ptr_ty(Form::Scalar);
        let idx = self.i64(idx as i64)?;
        let slot = self.gep(array, idx, ptr, Form::Scalar)?;
        self.op1("llvm.load", &[slot], &[], ptr)
    }

    fn gep(
        &mut self,
        base: V<'c>,
        index: V<'c>,
        elem: Type<'c>,
        form: Form,
    ) -> Result<V<'c>, Error> {
        // The number marks an index that is an operand.
        let dynamic = self.attribute("array<i32: -2147483648>")?;
        let elem = melior::ir::attribute::TypeAttribute::new(elem).into();
        // One pointer stays in the address space of its base.
        let ty = match form {
            Form::Scalar => base.r#type(),
            Form::Vector(_) => self.ptr_ty(form),
        };
        self.op1(
            "llvm.getelementptr",
            &[base, index],
            &[("rawConstantIndices", dynamic), ("elem_type", elem)],
            ty,
        )
    }

    /// Loads contiguous elements; those of bf16 widened to f32.
    pub fn load(&mut self, ptr: V<'c>, elem: Elem, form: Form) -> Result<V<'c>, Error> {
        let alignment = self.alignment(elem, 64);
        let ty = self.ty(elem, form);
        let v = self.op1("llvm.load", &[ptr], &[("alignment", alignment)], ty)?;
        if elem != Elem::Bf16 {
            return Ok(v);
        }
        // The upper half of the f32.
        let i32_ty = self.ty(Elem::I32, form);
        let wide = self.op1("arith.extui", &[v], &[], i32_ty)?;
        let half = self.int(form, 16)?;
        let bits = self.same("arith.shli", &[wide, half])?;
        self.bitcast(bits, self.ty(Elem::F32, form))
    }

    /// Stores contiguous elements; f32 to bf16 rounds to the nearest, ties to even.
    pub fn store(&mut self, ptr: V<'c>, v: V<'c>, elem: Elem) -> Result<(), Error> {
        let alignment = self.alignment(elem, 64);
        let v = match elem {
            Elem::Bf16 => {
                let bf16_ty = self.parsed("bf16")?;
                let narrow = self.op1("arith.truncf", &[v], &[], bf16_ty)?;
                self.bitcast(narrow, self.ty(Elem::Bf16, Form::Scalar))?
            }
            _ => v,
        };
        self.op0("llvm.store", &[v, ptr], &[("alignment", alignment)])
    }

    /// Loads the contiguous elements that `mask` has, and zeros elsewhere.
    pub fn masked_load(
        &mut self,
        ptr: V<'c>,
        mask: V<'c>,
        elem: Elem,
        width: usize,
    ) -> Result<V<'c>, Error> {
        self.masked(
            "llvm.intr.masked.load",
            &[ptr, mask],
            elem,
            Form::Vector(width),
        )
    }

    /// Stores the contiguous elements that `mask` has.
    pub fn masked_store(
        &mut self,
        ptr: V<'c>,
        v: V<'c>,
        mask: V<'c>,
        elem: Elem,
    ) -> Result<(), Error> {
        let alignment = self.alignment(elem, 32);
        self.op0(
            "llvm.intr.masked.store",
            &[v, ptr, mask],
            &[("alignment", alignment)],
        )
    }

    /// Loads one element per pointer where `mask` is set, and zeros elsewhere.
    pub fn gather(
        &mut self,
        ptrs: V<'c>,
        mask: V<'c>,
        elem: Elem,
        width: usize,
    ) -> Result<V<'c>, Error> {
        self.masked(
            "llvm.intr.masked.gather",
            &[ptrs, mask],
            elem,
            Form::Vector(width),
        )
    }

    /// Stores one element per pointer where `mask` is set.
    pub fn scatter(&mut self, ptrs: V<'c>, v: V<'c>, mask: V<'c>, elem: Elem) -> Result<(), Error> {
        let alignment = self.alignment(elem, 32);
        self.op0(
            "llvm.intr.masked.scatter",
            &[v, ptrs, mask],
            &[("alignment", alignment)],
        )
    }

    fn masked(
        &mut self,
        name: &str,
        operands: &[V<'c>],
        elem: Elem,
        form: Form,
    ) -> Result<V<'c>, Error> {
        let zero = match elem {
            Elem::F32 | Elem::F64 => self.float(elem, form, 0.0)?,
            Elem::I32 => self.int(form, 0)?,
            Elem::Bool | Elem::Bf16 => {
                return Err(Error::Internal {
                    message: format!("masked load of {elem:?}"),
                });
            }
        };
        let alignment = self.alignment(elem, 32);
        let ty = self.ty(elem, form);
        let operands: Vec<V<'c>> = operands.iter().copied().chain([zero]).collect();
        self.op1(name, &operands, &[("alignment", alignment)], ty)
    }

    /// Stack memory for `n` elements, aligned for vectors.
    pub fn alloca(&mut self, elem: Elem, n: usize) -> Result<V<'c>, Error> {
        let n = self.i64(n as i64)?;
        let elem = melior::ir::attribute::TypeAttribute::new(self.ty(elem, Form::Scalar)).into();
        let alignment = IntegerAttribute::new(self.i64_ty(Form::Scalar), 64).into();
        let ty = self.ptr_ty(Form::Scalar);
        self.op1(
            "llvm.alloca",
            &[n],
            &[("elem_type", elem), ("alignment", alignment)],
            ty,
        )
    }

    fn alignment(&self, elem: Elem, bits: u32) -> Attribute<'c> {
        let ty = IntegerType::new(self.context, bits).into();
        IntegerAttribute::new(ty, elem.size() as i64).into()
    }

    fn parsed(&self, text: &str) -> Result<Type<'c>, Error> {
        Type::parse(self.context, text).ok_or_else(|| Error::Internal {
            message: format!("type {text} does not parse"),
        })
    }

    fn attribute(&self, text: &str) -> Result<Attribute<'c>, Error> {
        Attribute::parse(self.context, text).ok_or_else(|| Error::Internal {
            message: format!("attribute {text} does not parse"),
        })
    }

    // Threads of a GPU.

    /// A special register (`tid.x`, `ctaid.x`, …) as `i64`.
    pub fn register(&mut self, name: &str) -> Result<V<'c>, Error> {
        let i32_ty = self.ty(Elem::I32, Form::Scalar);
        let value = self.op1(&format!("nvvm.read.ptx.sreg.{name}"), &[], &[], i32_ty)?;
        let i64_ty = self.i64_ty(Form::Scalar);
        self.op1("arith.extui", &[value], &[], i64_ty)
    }

    /// The block's memory of that name, a pointer into address space 3.
    pub fn shared(&mut self, name: &str) -> Result<V<'c>, Error> {
        let symbol = self.attribute(&format!("@{name}"))?;
        let ty = llvm::r#type::pointer(self.context, SHARED);
        self.op1("llvm.mlir.addressof", &[], &[("global_name", symbol)], ty)
    }

    /// The value of the thread whose number in the warp differs in the bit `distance`.
    pub fn shuffle(&mut self, v: V<'c>, distance: usize) -> Result<V<'c>, Error> {
        let all = self.int(Form::Scalar, -1)?;
        let distance = self.int(Form::Scalar, distance as i32)?;
        let clamp = self.int(Form::Scalar, 0x1f)?;
        let kind = self.attribute("#nvvm<shfl_kind bfly>")?;
        let ty = v.r#type();
        self.op1(
            "nvvm.shfl.sync",
            &[all, v, distance, clamp],
            &[("kind", kind)],
            ty,
        )
    }

    // Control.

    /// Opens `for counter in (lower..upper).step_by(step)` (`i64`) with values carried from turn
    /// to turn; what follows lands in its body until [`Self::close_loop`]. A loop over an empty
    /// range gives back `init`.
    pub fn open_loop(
        &mut self,
        lower: V<'c>,
        upper: V<'c>,
        step: V<'c>,
        init: &[V<'c>],
    ) -> Result<OpenLoop<'c>, Error> {
        let mut arguments = vec![(self.i64_ty(Form::Scalar), self.location)];
        arguments.extend(init.iter().map(|v| (v.r#type(), self.location)));
        let region = Region::new();
        // SAFETY: the region is kept in the `OpenLoop` and moves into the loop operation.
        let body: BlockRef<'c, 'c> =
            unsafe { BlockRef::from_raw(region.append_block(Block::new(&arguments)).to_raw()) };
        let mut values = Vec::with_capacity(arguments.len());
        for idx in 0..arguments.len() {
            let argument = body.argument(idx).map_err(|error| Error::Internal {
                message: error.to_string(),
            })?;
            // SAFETY: as above.
            values.push(unsafe { V::<'c>::from_raw(argument.to_raw()) });
        }
        let mut operands = vec![lower, upper, step];
        operands.extend_from_slice(init);
        Ok(OpenLoop {
            counter: values[0],
            carried: values[1..].to_vec(),
            operands,
            region,
            outer: std::mem::replace(&mut self.block, body),
        })
    }

    /// Ends the loop's body with the next values of what it carries, and returns what it leaves.
    pub fn close_loop(
        &mut self,
        open: OpenLoop<'c>,
        next: Result<Vec<V<'c>>, Error>,
    ) -> Result<Vec<V<'c>>, Error> {
        let yielded = next.and_then(|next| self.op0("scf.yield", &next, &[]));
        self.block = open.outer;
        yielded?;
        let types: Vec<Type<'c>> = open.carried.iter().map(|v| v.r#type()).collect();
        self.append("scf.for", &open.operands, &[], &types, Some(open.region))
    }
}

/// A loop whose body is being built.
pub struct OpenLoop<'c> {
    /// The loop's counter.
    pub counter: V<'c>,
    /// The carried values at the start of a turn.
    pub carried: Vec<V<'c>>,
    operands: Vec<V<'c>>,
    region: Region<'c>,
    outer: BlockRef<'c, 'c>,
}
