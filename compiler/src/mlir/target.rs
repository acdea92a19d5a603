//! The machines that code is generated for.
//!
//! Enters: nothing, or names. Leaves: a [`HostTarget`] or a [`GpuTarget`].
//! Invariant: the vector width is one that the target's registers have.

use std::ffi::{CStr, c_char};

use llvm_sys::core::LLVMDisposeMessage;
use llvm_sys::target_machine::{
    LLVMGetDefaultTargetTriple, LLVMGetHostCPUFeatures, LLVMGetHostCPUName,
};

/// A CPU as LLVM names it, and what generated code may use of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostTarget {
    /// LLVM's target triple.
    pub triple: String,
    /// LLVM's name of the CPU.
    pub cpu: String,
    /// LLVM's feature string (`+avx2,-avx512f,…`).
    pub features: String,
    /// Bits of a vector register.
    pub vector_bits: usize,
    /// Whether fused multiply-add is one instruction.
    pub has_fma: bool,
}

impl HostTarget {
    /// The machine this runs on.
    pub fn detect() -> Self {
        // SAFETY: each call returns an owned C string, freed by `take`.
        let (triple, cpu, features) = unsafe {
            (
                take(LLVMGetDefaultTargetTriple()),
                take(LLVMGetHostCPUName()),
                take(LLVMGetHostCPUFeatures()),
            )
        };
        let has = |feature: &str| features.split(',').any(|f| f == feature);
        let (vector_bits, has_fma) = if cfg!(target_arch = "x86_64") {
            let bits = if has("+avx512f") && has("+avx512vl") && has("+avx512dq") {
                512
            } else if has("+avx2") {
                256
            } else {
                128
            };
            (bits, has("+fma"))
        } else {
            (128, true)
        };
        Self {
            triple,
            cpu,
            features,
            vector_bits,
            has_fma,
        }
    }

    /// 32-bit lanes of a vector register.
    pub fn width(&self) -> usize {
        self.vector_bits / 32
    }
}

/// An NVIDIA GPU by its compute capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GpuTarget {
    /// A100.
    Sm80,
    /// H100, H200, and what comes after them.
    Sm90,
    /// H100 and H200 alone, with the instructions that only they have.
    Sm90a,
    /// B200.
    Sm100,
}

impl GpuTarget {
    /// LLVM's triple of PTX for CUDA.
    pub const TRIPLE: &'static str = "nvptx64-nvidia-cuda";
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Sm80, Self::Sm90, Self::Sm90a, Self::Sm100];

    /// The target of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|target| target.chip() == name)
    }

    /// As NVIDIA writes it: `sm_90`.
    pub fn chip(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm90 => "sm_90",
            Self::Sm90a => "sm_90a",
            Self::Sm100 => "sm_100",
        }
    }

    /// The first version of PTX that knows the device, so that old drivers load the code too.
    pub fn ptx_version(self) -> &'static str {
        match self {
            Self::Sm80 => "+ptx70",
            Self::Sm90 => "+ptx78",
            Self::Sm90a => "+ptx80",
            Self::Sm100 => "+ptx86",
        }
    }
}

/// # Safety
/// `text` must be null or a C string that LLVM allocated.
unsafe fn take(text: *mut c_char) -> String {
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
