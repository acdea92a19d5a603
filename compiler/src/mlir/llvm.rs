//! One module: emission, passes, translation to LLVM IR, optimization, machine code.
//!
//! Enters: kernels with distinct names. Leaves: an object file and the texts asked for.
//! Invariant: MLIR's and LLVM's contexts live and die inside one call, so threads share nothing.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::ptr;
use std::rc::Rc;
use std::sync::Once;

use llvm_sys::core::{
    LLVMAddTargetDependentFunctionAttr, LLVMContextCreate, LLVMContextDispose,
    LLVMDisposeMemoryBuffer, LLVMDisposeMessage, LLVMDisposeModule, LLVMGetBufferSize,
    LLVMGetBufferStart, LLVMGetNamedFunction, LLVMPrintModuleToString, LLVMSetFunctionCallConv,
    LLVMSetTarget,
};
use llvm_sys::error::{LLVMDisposeErrorMessage, LLVMGetErrorMessage};
use llvm_sys::prelude::{LLVMContextRef, LLVMModuleRef};
use llvm_sys::target::{LLVMDisposeTargetData, LLVMSetModuleDataLayout};
use llvm_sys::target_machine::{
    LLVMCodeGenFileType, LLVMCodeGenOptLevel, LLVMCodeModel, LLVMCreateTargetDataLayout,
    LLVMCreateTargetMachine, LLVMDisposeTargetMachine, LLVMGetTargetFromTriple, LLVMRelocMode,
    LLVMTargetMachineEmitToMemoryBuffer, LLVMTargetMachineRef,
};
use llvm_sys::transforms::pass_builder::{
    LLVMCreatePassBuilderOptions, LLVMDisposePassBuilderOptions, LLVMRunPasses,
};
use melior::Context;
use melior::dialect::DialectRegistry;
use melior::ir::operation::OperationLike;
use melior::ir::{Location, Module};
use melior::utility::{register_all_dialects, register_all_llvm_translations};

use super::emit::{EmitOptions, emit_device_kernel, emit_kernel};
use super::passes::run_passes;
use super::target::{GpuTarget, HostTarget};
use super::{Error, Stage};
use crate::codegen::kernel::Kernel;
use crate::codegen::launch::Launch;

/// LLVM's passes. Kernels arrive vectorized, unrolled and with their loops in shape, so the
/// vectorizers, unrollers and inliners of the default pipeline (half of the compile time) would
/// find nothing: addresses are simplified, what is computed twice is computed once, and what does
/// not change leaves the loops.
const LLVM_PASSES: &str = "function(simplifycfg,early-cse<memssa>,instcombine<no-verify-fixpoint>,loop-mssa(licm),early-cse)";

/// Result for one module.
pub struct CompiledModule {
    /// The object file.
    pub object: Vec<u8>,
    /// The stages asked for.
    pub stages: Vec<(Stage, String)>,
}

/// Compiles `kernels` into one object.
///
/// # Errors
/// See [`super::compile`].
pub fn compile_module(
    kernels: &[&Kernel],
    target: &HostTarget,
    wanted: &[Stage],
) -> Result<CompiledModule, Error> {
    let options = EmitOptions {
        width: target.width(),
        has_fma: target.has_fma,
    };
    in_context(kernels, |context| {
        let module = Module::new(Location::unknown(context));
        for kernel in kernels {
            emit_kernel(context, &module, kernel.name(), kernel.program(), options)?;
        }
        let machine = Machine::new(&target.triple, &target.cpu, &target.features)?;
        let (llvm, mut stages) = lower(context, module, &machine, wanted, |_| Ok(()))?;
        if wanted.contains(&Stage::Asm) {
            let asm = machine.emit(&llvm, LLVMCodeGenFileType::LLVMAssemblyFile)?;
            stages.push((Stage::Asm, String::from_utf8_lossy(&asm).into_owned()));
        }
        let object = machine.emit(&llvm, LLVMCodeGenFileType::LLVMObjectFile)?;
        Ok(CompiledModule { object, stages })
    })
}

/// Compiles `kernels` to PTX.
///
/// # Errors
/// See [`super::compile_ptx`].
pub fn compile_ptx_module(
    kernels: &[(Kernel, Launch)],
    target: GpuTarget,
    wanted: &[Stage],
) -> Result<(String, Vec<(Stage, String)>), Error> {
    let all: Vec<&Kernel> = kernels.iter().map(|(kernel, _)| kernel).collect();
    in_context(&all, |context| {
        let module = Module::new(Location::unknown(context));
        for (kernel, launch) in kernels {
            emit_device_kernel(context, &module, kernel, *launch)?;
        }
        let machine = Machine::new(GpuTarget::TRIPLE, target.chip(), target.ptx_version())?;
        let (llvm, stages) = lower(context, module, &machine, wanted, |llvm| {
            for (kernel, launch) in kernels {
                llvm.make_entry(kernel.name(), *launch)?;
            }
            Ok(())
        })?;
        let ptx = machine.emit(&llvm, LLVMCodeGenFileType::LLVMAssemblyFile)?;
        Ok((String::from_utf8_lossy(&ptx).into_owned(), stages))
    })
}

/// Runs `body` in a context of its own, and adds what MLIR says to internal errors.
fn in_context<T>(
    kernels: &[&Kernel],
    body: impl FnOnce(&Context) -> Result<T, Error>,
) -> Result<T, Error> {
    let registry = DialectRegistry::new();
    register_all_dialects(&registry);
    let context = Context::new_with_registry(&registry, false);
    context.load_all_available_dialects();
    register_all_llvm_translations(&context);
    let diagnostics: Rc<RefCell<Vec<String>>> = Rc::default();
    let sink = Rc::clone(&diagnostics);
    context.attach_diagnostic_handler(move |diagnostic| {
        sink.borrow_mut().push(diagnostic.to_string());
        true
    });
    body(&context).map_err(|error| match error {
        Error::Internal { message } => {
            let said = diagnostics.borrow().join("; ");
            let names: Vec<&str> = kernels.iter().map(|kernel| kernel.name()).collect();
            Error::Internal {
                message: format!("{message}: {said} (kernels {})", names.join(", ")),
            }
        }
        other => other,
    })
}

/// From emitted MLIR to optimized LLVM IR, with the texts asked for.
fn lower(
    context: &Context,
    mut module: Module,
    machine: &Machine,
    wanted: &[Stage],
    prepare: impl FnOnce(&LlvmModule) -> Result<(), Error>,
) -> Result<(LlvmModule, Vec<(Stage, String)>), Error> {
    let mut stages = Vec::new();
    if wanted.contains(&Stage::Mlir) {
        stages.push((Stage::Mlir, module.as_operation().to_string()));
    }
    if !module.as_operation().verify() {
        return Err(Error::Internal {
            message: "the emitted module does not verify".to_string(),
        });
    }
    run_passes(context, &mut module, |stage, module| {
        if wanted.contains(&stage) {
            stages.push((stage, module.as_operation().to_string()));
        }
    })?;
    let llvm = LlvmModule::translate(&module)?;
    prepare(&llvm)?;
    machine.optimize(&llvm)?;
    if wanted.contains(&Stage::Llvm) {
        stages.push((Stage::Llvm, llvm.print()));
    }
    Ok((llvm, stages))
}

/// An LLVM module with the context it lives in.
struct LlvmModule {
    context: LLVMContextRef,
    module: LLVMModuleRef,
}

impl LlvmModule {
    fn translate(module: &Module) -> Result<Self, Error> {
        // SAFETY: the context is disposed of exactly once, in `drop`.
        let context = unsafe { LLVMContextCreate() };
        // SAFETY: the operation is a live module whose context has all translations registered;
        // the two crates name the same opaque C types.
        let raw = unsafe {
            mlir_sys::mlirTranslateModuleToLLVMIR(
                module.as_operation().to_raw(),
                context as mlir_sys::LLVMContextRef,
            )
        };
        let this = Self {
            context,
            module: raw as LLVMModuleRef,
        };
        if raw.is_null() {
            return Err(Error::Internal {
                message: "translation to LLVM IR failed".to_string(),
            });
        }
        Ok(this)
    }

    /// Makes the function `name` an entry of PTX, with the bounds of its launch.
    fn make_entry(&self, name: &str, launch: Launch) -> Result<(), Error> {
        /// LLVM's number of the calling convention `ptx_kernel`.
        const PTX_KERNEL: u32 = 71;
        let c = |text: String| {
            CString::new(text).map_err(|error| Error::Internal {
                message: error.to_string(),
            })
        };
        let name_c = c(name.to_string())?;
        let bounds = [
            ("nvvm.maxntid", launch.threads()),
            ("nvvm.minctasm", launch.blocks_at_once()),
        ];
        // SAFETY: the module is live, and the strings outlive the calls, which copy them.
        unsafe {
            let function = LLVMGetNamedFunction(self.module, name_c.as_ptr());
            if function.is_null() {
                return Err(Error::Internal {
                    message: format!("the module has no function {name}"),
                });
            }
            LLVMSetFunctionCallConv(function, PTX_KERNEL);
            for (key, value) in bounds {
                let (key, value) = (c(key.to_string())?, c(value.to_string())?);
                LLVMAddTargetDependentFunctionAttr(function, key.as_ptr(), value.as_ptr());
            }
        }
        Ok(())
    }

    fn print(&self) -> String {
        // SAFETY: the module is live; the string is owned by us and freed by `take_message`.
        unsafe { take_message(LLVMPrintModuleToString(self.module)) }
    }
}

impl Drop for LlvmModule {
    fn drop(&mut self) {
        // SAFETY: both were created by `translate` and are not used afterwards.
        unsafe {
            if !self.module.is_null() {
                LLVMDisposeModule(self.module);
            }
            LLVMContextDispose(self.context);
        }
    }
}

/// LLVM's code generator for a target.
struct Machine {
    raw: LLVMTargetMachineRef,
    triple: CString,
}

impl Machine {
    /// Of LLVM's names of a triple, a processor and its features.
    fn new(triple: &str, cpu: &str, features: &str) -> Result<Self, Error> {
        initialize_targets()?;
        let c = |text: &str| {
            CString::new(text).map_err(|_| Error::Internal {
                message: format!("a zero byte in {text:?}"),
            })
        };
        let (triple_c, cpu, features) = (c(triple)?, c(cpu)?, c(features)?);
        let mut llvm_target = ptr::null_mut();
        let mut message = ptr::null_mut();
        // SAFETY: all pointers are valid; the message is only set, and then freed, on failure.
        unsafe {
            if LLVMGetTargetFromTriple(triple_c.as_ptr(), &mut llvm_target, &mut message) != 0 {
                return Err(Error::Unsupported {
                    message: format!("target {triple}: {}", take_message(message)),
                });
            }
            let raw = LLVMCreateTargetMachine(
                llvm_target,
                triple_c.as_ptr(),
                cpu.as_ptr(),
                features.as_ptr(),
                LLVMCodeGenOptLevel::LLVMCodeGenLevelDefault,
                LLVMRelocMode::LLVMRelocPIC,
                LLVMCodeModel::LLVMCodeModelDefault,
            );
            if raw.is_null() {
                return Err(Error::Unsupported {
                    message: format!("LLVM has no code generator for {triple}"),
                });
            }
            Ok(Self {
                raw,
                triple: triple_c,
            })
        }
    }

    fn optimize(&self, llvm: &LlvmModule) -> Result<(), Error> {
        let passes = CString::new(LLVM_PASSES).map_err(|error| Error::Internal {
            message: error.to_string(),
        })?;
        // SAFETY: module and machine are live; options and layout are freed here.
        unsafe {
            LLVMSetTarget(llvm.module, self.triple.as_ptr());
            let layout = LLVMCreateTargetDataLayout(self.raw);
            LLVMSetModuleDataLayout(llvm.module, layout);
            LLVMDisposeTargetData(layout);
            let options = LLVMCreatePassBuilderOptions();
            let error = LLVMRunPasses(llvm.module, passes.as_ptr(), self.raw, options);
            LLVMDisposePassBuilderOptions(options);
            if !error.is_null() {
                let text = LLVMGetErrorMessage(error);
                let message = CStr::from_ptr(text).to_string_lossy().into_owned();
                LLVMDisposeErrorMessage(text);
                return Err(Error::Internal {
                    message: format!("LLVM passes: {message}"),
                });
            }
        }
        Ok(())
    }

    fn emit(&self, llvm: &LlvmModule, kind: LLVMCodeGenFileType) -> Result<Vec<u8>, Error> {
        let mut message = ptr::null_mut();
        let mut buffer = ptr::null_mut();
        // SAFETY: module and machine are live; the buffer is set on success and freed after the
        // copy, the message is set and freed on failure.
        unsafe {
            let failed = LLVMTargetMachineEmitToMemoryBuffer(
                self.raw,
                llvm.module,
                kind,
                &mut message,
                &mut buffer,
            );
            if failed != 0 {
                return Err(Error::Internal {
                    message: format!("LLVM code generation: {}", take_message(message)),
                });
            }
            let start = LLVMGetBufferStart(buffer).cast::<u8>();
            let bytes = std::slice::from_raw_parts(start, LLVMGetBufferSize(buffer)).to_vec();
            LLVMDisposeMemoryBuffer(buffer);
            Ok(bytes)
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: created by `new`, not used afterwards.
        unsafe { LLVMDisposeTargetMachine(self.raw) };
    }
}

fn initialize_targets() -> Result<(), Error> {
    use llvm_sys::target::{
        LLVMInitializeNVPTXAsmPrinter, LLVMInitializeNVPTXTarget, LLVMInitializeNVPTXTargetInfo,
        LLVMInitializeNVPTXTargetMC,
    };
    static ONCE: Once = Once::new();
    static GPU: Once = Once::new();
    // SAFETY: registration functions without preconditions, run once.
    GPU.call_once(|| unsafe {
        LLVMInitializeNVPTXTargetInfo();
        LLVMInitializeNVPTXTarget();
        LLVMInitializeNVPTXTargetMC();
        LLVMInitializeNVPTXAsmPrinter();
    });
    #[cfg(target_arch = "x86_64")]
    {
        use llvm_sys::target::{
            LLVMInitializeX86AsmPrinter, LLVMInitializeX86Target, LLVMInitializeX86TargetInfo,
            LLVMInitializeX86TargetMC,
        };
        // SAFETY: registration functions without preconditions, run once.
        ONCE.call_once(|| unsafe {
            LLVMInitializeX86TargetInfo();
            LLVMInitializeX86Target();
            LLVMInitializeX86TargetMC();
            LLVMInitializeX86AsmPrinter();
        });
        Ok(())
    }
    #[cfg(target_arch = "aarch64")]
    {
        use llvm_sys::target::{
            LLVMInitializeAArch64AsmPrinter, LLVMInitializeAArch64Target,
            LLVMInitializeAArch64TargetInfo, LLVMInitializeAArch64TargetMC,
        };
        // SAFETY: registration functions without preconditions, run once.
        ONCE.call_once(|| unsafe {
            LLVMInitializeAArch64TargetInfo();
            LLVMInitializeAArch64Target();
            LLVMInitializeAArch64TargetMC();
            LLVMInitializeAArch64AsmPrinter();
        });
        Ok(())
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        let _ = &ONCE;
        Err(Error::Unsupported {
            message: "host code is generated for x86-64 and AArch64 only".to_string(),
        })
    }
}

/// # Safety
/// `text` must be null or a C string that LLVM allocated.
unsafe fn take_message(text: *mut c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: not null, so it is a C string by the contract above.
    let owned = unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned();
    // SAFETY: allocated by LLVM and not used afterwards.
    unsafe { LLVMDisposeMessage(text) };
    owned
}
