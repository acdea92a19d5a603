//! CUDA C++ to PTX by NVRTC, which needs no GPU, and where CUDA's libraries are.
//!
//! In: a translation unit that includes nothing. Out: PTX.
//! Invariant: libraries are looked for in `MESHWEAVE_CUDA_LIBRARIES` (folders with `:` between them)
//! first, then where the system's loader looks.

use std::sync::Once;

use cudarc::nvrtc::{CompileError, CompileOptions, compile_ptx_with_opts, sys};

use crate::error::{Error, Result};

/// Folders of CUDA's libraries.
const FOLDERS: &str = "MESHWEAVE_CUDA_LIBRARIES";
/// Where CUDA's own installer puts them.
const USUAL_FOLDER: &str = "/usr/local/cuda/lib64";

/// Compiles CUDA C++ for `target` (`sm_90`).
///
/// # Errors
/// `Exhausted` when there is no NVRTC, `Invalid` with its words when it refuses the source.
pub fn ptx_of(source: &str, target: &str) -> Result<String> {
    preload();
    // SAFETY: looks for a library and loads it.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Exhausted(format!(
            "no CUDA compiler: libnvrtc.so was looked for in {FOLDERS}, {USUAL_FOLDER} and where the \
             system's loader looks; install CUDA's NVRTC, name its folder in {FOLDERS}, or compile the \
             artifact on a machine that has it"
        )));
    }
    let architecture = target.replace("sm_", "compute_");
    let options = CompileOptions {
        options: vec![
            format!("--gpu-architecture={architecture}"),
            "--std=c++17".into(),
        ],
        ..CompileOptions::default()
    };
    match compile_ptx_with_opts(source, options) {
        Ok(ptx) => Ok(ptx.to_src()),
        Err(CompileError::CompileError { log, .. }) => Err(Error::Invalid(format!(
            "NVRTC refuses a kernel for {target}: {}",
            log.to_string_lossy()
        ))),
        Err(error) => Err(Error::Internal(format!("NVRTC fails: {error}"))),
    }
}

/// Loads CUDA's libraries from the folders where the system's loader does not look, once; they are
/// found by their names afterwards.
pub(super) fn preload() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let named = std::env::var(FOLDERS).unwrap_or_default();
        let folders = named.split(':').filter(|folder| !folder.is_empty());
        for folder in folders.chain([USUAL_FOLDER]) {
            for (name, versions) in [
                ("nvrtc-builtins", &["13.0", "12.9", "12.8"][..]),
                ("nvrtc", &["13", "12"]),
                ("cublasLt", &["13", "12"]),
                ("nccl", &["2"]),
            ] {
                for version in versions {
                    let path = format!("{folder}/lib{name}.so.{version}");
                    if !std::path::Path::new(&path).exists() {
                        continue;
                    }
                    // SAFETY: NVIDIA's libraries; their initializers are their own affair. What does not
                    // load is looked for elsewhere.
                    if let Ok(library) = unsafe { libloading::Library::new(&path) } {
                        // Stays loaded, to be found by its name.
                        std::mem::forget(library);
                        break;
                    }
                }
            }
        }
    });
}
