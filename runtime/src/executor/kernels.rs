//! The kernels that a program calls on the host.
//!
//! In: functions of a loaded object, or of this process. Out: the function of a kernel's id.
//! Invariant: the object stays mapped as long as its functions can be reached.

use meshweave_dsl::program::KernelId;

use crate::attention::KernelFn;

/// The functions of a program's kernels, in the order of their ids.
pub struct KernelTable {
    functions: Vec<KernelFn>,
    /// Keeps the code mapped.
    _library: Option<libloading::Library>,
}

impl KernelTable {
    /// No kernels: those of programs on GPUs are elsewhere.
    pub(super) fn none() -> KernelTable {
        KernelTable {
            functions: Vec::new(),
            _library: None,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.functions.len()
    }

    /// Kernels of this process.
    ///
    /// # Safety
    /// Each function follows the contract of the kernel symbol in its place: it touches what its
    /// arguments' types span, for rows inside of the symbol's.
    pub unsafe fn from_functions(functions: Vec<KernelFn>) -> KernelTable {
        KernelTable {
            functions,
            _library: None,
        }
    }

    /// The kernels of a loaded object.
    ///
    /// # Safety
    /// As for [`KernelTable::from_functions`]; the functions are those of `library`.
    pub(crate) unsafe fn from_library(
        functions: Vec<KernelFn>,
        library: libloading::Library,
    ) -> KernelTable {
        KernelTable {
            functions,
            _library: Some(library),
        }
    }

    pub(super) fn get(&self, kernel: KernelId) -> Option<KernelFn> {
        self.functions.get(kernel.index()).copied()
    }
}
