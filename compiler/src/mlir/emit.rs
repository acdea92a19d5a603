//! From a row program to one function of the `func`, `scf`, `arith`, `vector` and `llvm` dialects.
//!
//! Enters: a [`RowProgram`] and the vector width. Leaves: a `func.func` appended to a module:
//! a loop over the rows, and inside it the passes of [`plan_lanes`] one after another.
//! Invariant: all loads of a chunk of lanes stand before its stores, instruction by instruction
//! across the unrolled vectors, so that neither aliasing nor latency serializes them.

mod columns;
mod lanes;
mod threads;
mod values;

use melior::Context;
use melior::ir::attribute::{StringAttribute, TypeAttribute};
use melior::ir::block::BlockLike;
use melior::ir::operation::OperationBuilder;
use melior::ir::r#type::FunctionType;
use melior::ir::{Attribute, Block, Identifier, Module, Region, RegionLike, Type, ValueLike};

use super::Error;
use super::ops::{Cmp, Form, Ops, V};
use crate::codegen::kernel::{Access, Elem, Inst, Kernel, RowProgram, Val};
use crate::codegen::lanes::{LanePlan, SCRATCH_LIMIT_BYTES, plan_lanes};
use crate::codegen::launch::{Launch, WARP, Walk};
use threads::Threads;

/// What the emitted code may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmitOptions {
    /// 32-bit lanes of a vector register; a power of two.
    pub width: usize,
    /// Whether a fused multiply-add is one instruction.
    pub has_fma: bool,
}

/// Appends the host function `name(args, begin, end)` to `module`.
///
/// # Errors
/// `Internal` if an operation does not build, which is a bug of the emitter.
pub fn emit_kernel<'c>(
    context: &'c Context,
    module: &Module<'c>,
    name: &str,
    program: &RowProgram,
    options: EmitOptions,
) -> Result<(), Error> {
    let ptr = melior::dialect::llvm::r#type::pointer(context, 0);
    let i64_ty: Type<'c> = melior::ir::r#type::IntegerType::new(context, 64).into();
    let plan = plan_lanes(program, SCRATCH_LIMIT_BYTES);
    emit_function(
        context,
        module,
        name,
        &[ptr, i64_ty, i64_ty],
        (program, plan, options),
        |function, parameters| function.emit(parameters[0], parameters[1], parameters[2]),
    )
}

/// Appends the GPU kernel `kernel(arg pointers…)` to `module`, and the memory that its blocks share.
///
/// # Errors
/// `Internal` if an operation does not build, which is a bug of the emitter.
pub fn emit_device_kernel<'c>(
    context: &'c Context,
    module: &Module<'c>,
    kernel: &Kernel,
    launch: Launch,
) -> Result<(), Error> {
    let (name, program) = (kernel.name(), kernel.program());
    let shared = format!("{name}_shared");
    let n_shared = match launch.walk {
        Walk::Rows if launch.team > WARP => WARP,
        Walk::Rows => 0,
        Walk::Columns => launch.threads(),
    };
    if n_shared > 0 {
        module
            .body()
            .append_operation(shared_memory(context, &shared, n_shared)?);
    }
    let ptr = melior::dialect::llvm::r#type::pointer(context, 0);
    let options = EmitOptions {
        width: 1,
        has_fma: true,
    };
    // A value that the next pass needs is computed again: a scratch row would be memory of a thread.
    let plan = plan_lanes(program, 0);
    emit_function(
        context,
        module,
        name,
        &vec![ptr; program.args().len()],
        (program, plan, options),
        |function, parameters| {
            function.args = parameters.to_vec();
            match launch.walk {
                Walk::Rows => function.emit_threads(launch, &shared),
                Walk::Columns => function.emit_columns(launch, &shared),
            }
        },
    )
}

/// Memory of a block for `n` floats.
fn shared_memory<'c>(
    context: &'c Context,
    name: &str,
    n: usize,
) -> Result<melior::ir::Operation<'c>, Error> {
    let parse = |text: &str| {
        Attribute::parse(context, text).ok_or_else(|| Error::Internal {
            message: format!("attribute {text} does not parse"),
        })
    };
    let attributes = [
        ("sym_name", StringAttribute::new(context, name).into()),
        ("global_type", parse(&format!("!llvm.array<{n} x f32>"))?),
        ("linkage", parse("#llvm.linkage<internal>")?),
        ("addr_space", parse("3 : i32")?),
    ]
    .map(|(name, attribute)| (Identifier::new(context, name), attribute));
    OperationBuilder::new("llvm.mlir.global", melior::ir::Location::unknown(context))
        .add_attributes(&attributes)
        .add_regions([Region::new()])
        .build()
        .map_err(|error| Error::Internal {
            message: format!("llvm.mlir.global: {error}"),
        })
}

/// Appends a `func.func` whose body `emit` writes from the parameters.
fn emit_function<'c, 'p>(
    context: &'c Context,
    module: &Module<'c>,
    name: &str,
    inputs: &[Type<'c>],
    (program, plan, options): (&'p RowProgram, LanePlan, EmitOptions),
    emit: impl FnOnce(&mut Function<'p, 'c>, &[V<'c>]) -> Result<(), Error>,
) -> Result<(), Error> {
    let region = Region::new();
    let location = melior::ir::Location::unknown(context);
    let parameter_types: Vec<_> = inputs.iter().map(|&ty| (ty, location)).collect();
    let block = region.append_block(Block::new(&parameter_types));
    let mut parameters = Vec::with_capacity(inputs.len());
    for idx in 0..inputs.len() {
        let argument = block.argument(idx).map_err(|error| Error::Internal {
            message: error.to_string(),
        })?;
        // SAFETY: the block moves with its region into the function, which the module owns.
        parameters.push(unsafe { V::<'c>::from_raw(argument.to_raw()) });
    }
    {
        // SAFETY: as above; the builder ends with this scope.
        let ops = unsafe { Ops::new(context, &block, options.has_fma) };
        let mut function = Function {
            ops,
            program,
            plan,
            width: options.width,
            threads: None,
            args: Vec::new(),
            scratch: Vec::new(),
            row_values: vec![None; program.body().len()],
            row_position: Vec::new(),
        };
        emit(&mut function, &parameters)?;
    }
    let function = OperationBuilder::new("func.func", location)
        .add_attributes(&[
            (
                Identifier::new(context, "sym_name"),
                StringAttribute::new(context, name).into(),
            ),
            (
                Identifier::new(context, "function_type"),
                TypeAttribute::new(FunctionType::new(context, inputs, &[]).into()).into(),
            ),
        ])
        .add_regions([region])
        .build()
        .map_err(|error| Error::Internal {
            message: format!("func.func: {error}"),
        })?;
    module.body().append_operation(function);
    Ok(())
}

struct Function<'p, 'c> {
    ops: Ops<'c>,
    program: &'p RowProgram,
    plan: LanePlan,
    width: usize,
    /// Set in code for a GPU, where threads and not vectors walk over the lanes.
    threads: Option<Threads<'c>>,
    args: Vec<V<'c>>,
    scratch: Vec<V<'c>>,
    /// Row values made so far.
    row_values: Vec<Option<V<'c>>>,
    /// Position along each row dim (`i64`).
    row_position: Vec<V<'c>>,
}

impl<'c> Function<'_, 'c> {
    fn emit(&mut self, args: V<'c>, begin: V<'c>, end: V<'c>) -> Result<(), Error> {
        for idx in 0..self.program.args().len() {
            let arg = self.ops.load_ptr(args, idx)?;
            self.args.push(arg);
        }
        let lanes = self.program.lanes();
        // Under a limit a masked vector comes behind the whole ones, even where nothing is left for it.
        let padded = match self.program.limit() {
            Some(_) => (lanes / self.width + 1) * self.width,
            None => lanes.next_multiple_of(self.width),
        };
        for _ in 0..self.plan.n_scratch {
            let scratch = self.ops.alloca(Elem::F32, padded)?;
            self.scratch.push(scratch);
        }
        for val in self.plan.invariant.clone() {
            self.row_value(val)?;
        }
        self.fill_accumulators()?;
        let one = self.ops.i64(1)?;
        // The body is emitted through the builder inside `self`; it is moved out for the call.
        let this = self;
        this.loop_over(begin, end, one, &[], |this, row, _| {
            this.emit_row(row)?;
            Ok(Vec::new())
        })?;
        this.ops.op0("func.return", &[], &[])
    }

    /// [`Ops::for_loop`] with the whole function at hand in the body.
    fn loop_over(
        &mut self,
        lower: V<'c>,
        upper: V<'c>,
        step: V<'c>,
        init: &[V<'c>],
        body: impl FnOnce(&mut Self, V<'c>, &[V<'c>]) -> Result<Vec<V<'c>>, Error>,
    ) -> Result<Vec<V<'c>>, Error> {
        let open = self.ops.open_loop(lower, upper, step, init)?;
        let (iv, carried) = (open.counter, open.carried.clone());
        let next = body(self, iv, &carried);
        self.ops.close_loop(open, next)
    }

    fn emit_row(&mut self, row: V<'c>) -> Result<(), Error> {
        self.delinearize(row)?;
        for pass in self.plan.passes.clone() {
            for &val in &pass.row_values {
                self.row_value(val)?;
            }
            if self.threads.is_some() {
                self.emit_pass_by_threads(&pass)?;
            } else {
                self.emit_pass(&pass)?;
            }
        }
        for val in self.plan.final_row_values.clone() {
            self.row_value(val)?;
        }
        let effects = self.plan.row_effects.clone();
        let emit = |this: &mut Self| effects.iter().try_for_each(|&val| this.row_effect(val));
        if self.threads.is_none() || effects.is_empty() {
            return emit(self);
        }
        self.sync()?;
        self.first_thread(emit)
    }

    /// Position along each row dim from the flattened row.
    fn delinearize(&mut self, row: V<'c>) -> Result<(), Error> {
        let rows = self.program.rows();
        let mut position = Vec::with_capacity(rows.len());
        let mut rest = row;
        for (dim, &size) in rows.iter().enumerate().rev() {
            if dim == 0 {
                position.push(rest);
            } else if size == 1 {
                position.push(self.ops.i64(0)?);
            } else {
                let size = self.ops.i64(size as i64)?;
                position.push(self.ops.same("arith.remui", &[rest, size])?);
                rest = self.ops.same("arith.divui", &[rest, size])?;
            }
        }
        position.reverse();
        self.row_position = position;
        Ok(())
    }

    // Row values.

    fn row(&self, val: Val) -> Result<V<'c>, Error> {
        self.row_values[val.index()].ok_or_else(|| Error::Internal {
            message: format!("row value {val} is used before it is made"),
        })
    }

    fn row_value(&mut self, val: Val) -> Result<(), Error> {
        let program = self.program;
        let inst = program.inst(val);
        let value = match inst {
            Inst::RowIndex(dim) => {
                let ty = self.ops.ty(Elem::I32, Form::Scalar);
                self.ops
                    .op1("arith.trunci", &[self.row_position[*dim]], &[], ty)?
            }
            Inst::Load(access) => {
                let ptr = self.row_ptr(access)?;
                let elem = self.elem(access);
                self.ops.load(ptr, elem, Form::Scalar)?
            }
            Inst::PowI(base, exponent) => {
                let (base, exponent) = (self.row(*base)?, self.row(*exponent)?);
                self.powi(val, base, exponent)?
            }
            Inst::Const { .. }
            | Inst::Unary(..)
            | Inst::Binary(..)
            | Inst::Fma(..)
            | Inst::Compare(..)
            | Inst::Select(..)
            | Inst::Convert(..) => {
                let mut operands = Vec::new();
                let mut missing = None;
                inst.for_each_operand(|v| match self.row_values[v.index()] {
                    Some(value) => operands.push(value),
                    None => missing = Some(v),
                });
                if let Some(v) = missing {
                    self.row(v)?;
                }
                self.compute(val, Form::Scalar, &operands)?
            }
            Inst::LaneIndex | Inst::Reduce(..) | Inst::Store(..) | Inst::Accumulate { .. } => {
                return Err(Error::Internal {
                    message: format!("{val} is no row value to compute"),
                });
            }
        };
        self.row_values[val.index()] = Some(value);
        Ok(())
    }

    fn powi(&mut self, val: Val, base: V<'c>, exponent: V<'c>) -> Result<V<'c>, Error> {
        let elem = self.program.value_type(val).map_or(Elem::F32, |ty| ty.elem);
        let acc = self.ops.float(elem, Form::Scalar, 1.0)?;
        let (lower, upper, step) = (self.ops.i64(0)?, self.ops.i64(31)?, self.ops.i64(1)?);
        let i32_ty = self.ops.ty(Elem::I32, Form::Scalar);
        let results = self.loop_over(lower, upper, step, &[acc, base], |this, bit, carried| {
            let bit = this.ops.op1("arith.trunci", &[bit], &[], i32_ty)?;
            let shifted = this.ops.same("arith.shrui", &[exponent, bit])?;
            let one = this.ops.int(Form::Scalar, 1)?;
            let low = this.ops.same("arith.andi", &[shifted, one])?;
            let is_set = this.ops.cmpi(Cmp::Eq, Form::Scalar, low, one)?;
            let product = this.ops.mulf(carried[0], carried[1])?;
            let acc = this.ops.select(is_set, product, carried[0])?;
            let square = this.ops.mulf(carried[1], carried[1])?;
            Ok(vec![acc, square])
        })?;
        Ok(results[0])
    }

    fn row_effect(&mut self, val: Val) -> Result<(), Error> {
        let program = self.program;
        match program.inst(val) {
            Inst::Store(access, v) => {
                let ptr = self.row_ptr(access)?;
                let (v, elem) = (self.row(*v)?, self.elem(access));
                self.ops.store(ptr, v, elem)
            }
            Inst::Accumulate {
                access,
                kind,
                value,
                ..
            } => {
                let ptr = self.row_ptr(access)?;
                let (v, elem) = (self.row(*value)?, self.elem(access));
                let old = self.ops.load(ptr, elem, Form::Scalar)?;
                let new = self.combine(*kind, Form::Scalar, old, v)?;
                self.ops.store(ptr, new, elem)
            }
            _ => Err(Error::Internal {
                message: format!("{val} is no effect"),
            }),
        }
    }

    fn elem(&self, access: &Access) -> Elem {
        self.program.args()[access.arg.index()].elem
    }

    /// Address of lane 0 of the current row.
    fn row_ptr(&mut self, access: &Access) -> Result<V<'c>, Error> {
        let mut index = self.ops.i64(access.offset)?;
        for (dim, &stride) in access.outer.iter().enumerate() {
            if stride != 0 {
                let stride = self.ops.i64(stride)?;
                let part = self.ops.muli(self.row_position[dim], stride)?;
                index = self.ops.addi(index, part)?;
            }
        }
        if let Some(indexed) = &access.indexed {
            let value = self.row(indexed.index)?;
            let ty = self.ops.i64_ty(Form::Scalar);
            let value = self.ops.op1("arith.extsi", &[value], &[], ty)?;
            let stride = self.ops.i64(indexed.stride)?;
            let part = self.ops.muli(value, stride)?;
            index = self.ops.addi(index, part)?;
        }
        let elem = self.elem(access);
        self.ops
            .element_ptr(self.args[access.arg.index()], index, elem)
    }
}
