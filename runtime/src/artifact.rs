//! Artifacts: a compiled program as a folder that runs without the compiler.
//!
//! In: a program, the shared object of its kernels, and code for a GPU where there is some. Out: a folder
//! of three or four files, and back.
//! Invariant: a folder is complete or absent (it is written next to its place and renamed), and what
//! is loaded is bit for bit what was written, for this version, on a CPU that can execute it.
//!
//! | file | |
//! |---|---|
//! | `manifest.json` | format, version, target features, size and hash of the others |
//! | `program.json` | the [`Program`] |
//! | `kernels.so` | the generated kernels, one symbol a [`meshweave_dsl::program::KernelSymbol`] |
//! | `gpu.json` | code for a GPU: a [`DeviceCode`] |

#[cfg(test)]
mod tests;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use libloading::Library;
use meshweave_dsl::device_code::{DEVICE_CODE_VERSION, DeviceCode};
use meshweave_dsl::dtype::DType;
use meshweave_dsl::program::{PROGRAM_VERSION, Program};
use serde::{Deserialize, Serialize};

use crate::attention::KernelFn;
use crate::error::{Error, Result};
use crate::executor::KernelTable;

const FORMAT: &str = "meshweave-artifact";
const MANIFEST: &str = "manifest.json";
const PROGRAM: &str = "program.json";
const KERNELS: &str = "kernels.so";
const GPU: &str = "gpu.json";

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: String,
    version: u32,
    /// Features of the CPU that the kernels were generated for, as LLVM lists them (`+avx2,…`).
    target_features: String,
    program: FileMark,
    kernels: FileMark,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gpu: Option<FileMark>,
}

/// What tells a file from another or from a part of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileMark {
    pub(crate) n_bytes: u64,
    /// FNV-1a of 64 bits, in hexadecimal digits.
    pub(crate) hash: String,
}

/// What a manifest of another version may look like.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u32,
}

/// Writes an artifact to `folder`, replacing one that is there.
///
/// `target_features` lists the CPU features that the kernels use (`+avx2,-avx512f,…`); empty means
/// that they run everywhere.
///
/// # Errors
/// `Invalid` when `folder` holds something that is no artifact; `Exhausted` when it cannot be
/// written, and then nothing is left behind.
pub fn write(
    folder: &Path,
    program: &Program,
    kernels: &[u8],
    target_features: &str,
) -> Result<()> {
    write_with_gpu(folder, program, kernels, target_features, None)
}

/// Writes an artifact that may hold code for a GPU besides; see [`write`].
///
/// # Errors
/// As for [`write`].
pub fn write_with_gpu(
    folder: &Path,
    program: &Program,
    kernels: &[u8],
    target_features: &str,
    code: Option<&DeviceCode>,
) -> Result<()> {
    if folder.exists() && !folder.join(MANIFEST).is_file() && !is_empty_folder(folder) {
        return Err(Error::Invalid(format!(
            "{} exists and is no artifact; name another folder or remove it",
            folder.display()
        )));
    }
    let text = serde_json::to_vec(program).map_err(|error| {
        Error::Internal(format!("the program cannot be written as JSON: {error}"))
    })?;
    let code = code.map(serde_json::to_vec).transpose().map_err(|error| {
        Error::Internal(format!(
            "the code for the GPU cannot be written as JSON: {error}"
        ))
    })?;
    let manifest = Manifest {
        format: FORMAT.into(),
        version: PROGRAM_VERSION,
        target_features: target_features.into(),
        program: mark(&text),
        kernels: mark(kernels),
        gpu: code.as_deref().map(mark),
    };
    let manifest = serde_json::to_vec_pretty(&manifest).map_err(|error| {
        Error::Internal(format!("the manifest cannot be written as JSON: {error}"))
    })?;
    let unfinished = beside(folder);
    let write_all = || -> std::io::Result<()> {
        fs::create_dir_all(&unfinished)?;
        let gpu = code.as_deref().map(|code| (GPU, code));
        let files = [
            (PROGRAM, &text[..]),
            (KERNELS, kernels),
            (MANIFEST, &manifest),
        ];
        for (name, bytes) in files.into_iter().chain(gpu) {
            fs::write(unfinished.join(name), bytes)?;
        }
        if folder.exists() {
            fs::remove_dir_all(folder)?;
        }
        fs::rename(&unfinished, folder)
    };
    write_all().map_err(|error| {
        // Best effort: the error that matters is the first one.
        let _ = fs::remove_dir_all(&unfinished);
        Error::Exhausted(format!(
            "cannot write the artifact {}: {error}",
            folder.display()
        ))
    })
}

/// Loads an artifact: the program, and its kernels ready to call.
///
/// # Errors
/// `Invalid` when the folder is missing, incomplete, damaged, of another version, or made for another
/// CPU; each message says which and what to do.
pub fn load(folder: &Path) -> Result<(Program, KernelTable)> {
    let manifest = manifest_of(folder)?;
    check_features(folder, &manifest.target_features)?;
    let program = read_program(folder, &manifest)?;
    let object = read(folder, KERNELS, &manifest.kernels)?;
    drop(object);
    let kernels = open(&program, &folder.join(KERNELS))?;
    Ok((program, kernels))
}

/// Loads an artifact's program and its code for a GPU, which this machine's CPU does not concern.
///
/// # Errors
/// As for [`load`], and `Invalid` when it was compiled without a GPU as target.
pub fn load_gpu(folder: &Path) -> Result<(Program, DeviceCode)> {
    let manifest = manifest_of(folder)?;
    let Some(mark) = &manifest.gpu else {
        return Err(Error::Invalid(format!(
            "the artifact {} has no code for a GPU; compile it again with `--target cuda:sm_90`, or run it \
             with `--backend threads`",
            folder.display()
        )));
    };
    let program = read_program(folder, &manifest)?;
    let text = read(folder, GPU, mark)?;
    let code = serde_json::from_slice(&text).map_err(|error| {
        Error::Invalid(format!(
            "{} is no code of version {DEVICE_CODE_VERSION}: {error}; compile again",
            folder.join(GPU).display()
        ))
    })?;
    Ok((program, code))
}

fn manifest_of(folder: &Path) -> Result<Manifest> {
    if !folder.is_dir() {
        return Err(Error::Invalid(format!(
            "there is no artifact {}; make one with `meshweave compile`",
            folder.display()
        )));
    }
    read_manifest(folder)
}

fn read_program(folder: &Path, manifest: &Manifest) -> Result<Program> {
    let text = read(folder, PROGRAM, &manifest.program)?;
    serde_json::from_slice(&text).map_err(|error| {
        Error::Invalid(format!(
            "{} is no program of version {PROGRAM_VERSION}: {error}; compile again",
            folder.join(PROGRAM).display()
        ))
    })
}

/// What tells an artifact from another: format version, hashes of its files, CPU features.
///
/// # Errors
/// `Invalid` when the folder is no artifact of this version.
pub fn identity(folder: &Path) -> Result<Vec<(String, String)>> {
    let manifest = read_manifest(folder)?;
    let named = |name: &str, value: &str| (name.to_string(), value.to_string());
    let mut identity = vec![
        named("program version", &manifest.version.to_string()),
        named("hash of the program", &manifest.program.hash),
        named("hash of the kernels", &manifest.kernels.hash),
        named("CPU features", &manifest.target_features),
    ];
    if let Some(gpu) = &manifest.gpu {
        identity.push(named("hash of the code for a GPU", &gpu.hash));
    }
    Ok(identity)
}

/// The kernels of a shared object that was just made in this process, ready to call.
///
/// # Errors
/// `Exhausted` when it cannot be written to a temporary place, `Invalid` when it lacks a kernel.
pub fn load_kernels(program: &Program, object: &[u8]) -> Result<KernelTable> {
    let path = beside(&std::env::temp_dir().join("meshweave-kernels.so"));
    let exhausted = |error: std::io::Error| {
        Error::Exhausted(format!(
            "cannot write the kernels to {}: {error}",
            path.display()
        ))
    };
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    let mut file = options.open(&path).map_err(exhausted)?;
    let written = file.write_all(object).map_err(exhausted);
    drop(file);
    let kernels = written.and_then(|()| open(program, &path));
    // The loaded object stays mapped without its name.
    let _ = fs::remove_file(&path);
    kernels
}

fn open(program: &Program, path: &Path) -> Result<KernelTable> {
    let mut buffers = program.ranks.iter().flat_map(|rank| &rank.buffers);
    if let Some(narrow) = buffers.find(|buffer| buffer.ty.dtype == DType::Bf16) {
        return Err(Error::Unsupported(format!(
            "the program stores `{}` as {}, which hosts do not compute with; run it on a GPU \
             (`--backend cuda`), or compile with `dtype f32`",
            narrow.name, narrow.ty.dtype
        )));
    }
    let damaged =
        |what: String| Error::Invalid(format!("kernels {}: {what}; compile again", path.display()));
    // SAFETY: the object is the compiler's own output (its hash was checked, or it was just made); it
    // has no initializers.
    let library = unsafe { Library::new(path) }.map_err(|error| damaged(error.to_string()))?;
    let mut functions = Vec::with_capacity(program.kernels.len());
    for kernel in &program.kernels {
        // SAFETY: the compiler gives every kernel symbol this one signature.
        let function = unsafe { library.get::<KernelFn>(kernel.name.as_bytes()) }
            .map_err(|_| damaged(format!("there is no kernel `{}`", kernel.name)))?;
        functions.push(*function);
    }
    // SAFETY: the functions are the library's, found by the program's own symbols.
    Ok(unsafe { KernelTable::from_library(functions, library) })
}

fn read_manifest(folder: &Path) -> Result<Manifest> {
    let path = folder.join(MANIFEST);
    let bytes = fs::read(&path).map_err(|error| missing(folder, MANIFEST, &error))?;
    let malformed = |error: serde_json::Error| {
        Error::Invalid(format!(
            "{} is no manifest: {error}; compile again",
            path.display()
        ))
    };
    let head: Head = serde_json::from_slice(&bytes).map_err(malformed)?;
    if head.format != FORMAT {
        return Err(Error::Invalid(format!(
            "{} is a manifest of `{}`, not of an artifact",
            path.display(),
            head.format
        )));
    }
    if head.version != PROGRAM_VERSION {
        return Err(Error::Invalid(format!(
            "the artifact {} is of version {}, this meshweave runs version {PROGRAM_VERSION}; compile it \
             again",
            folder.display(),
            head.version
        )));
    }
    serde_json::from_slice(&bytes).map_err(malformed)
}

fn read(folder: &Path, name: &str, expected: &FileMark) -> Result<Vec<u8>> {
    let bytes = fs::read(folder.join(name)).map_err(|error| missing(folder, name, &error))?;
    let found = mark(&bytes);
    if found.n_bytes != expected.n_bytes {
        return Err(Error::Invalid(format!(
            "{name} of the artifact {} has {} bytes, the manifest says {}: it is truncated or of another \
             compilation; compile again",
            folder.display(),
            found.n_bytes,
            expected.n_bytes
        )));
    }
    if found != *expected {
        return Err(Error::Invalid(format!(
            "{name} of the artifact {} has hash {}, the manifest says {}: it was changed; compile again",
            folder.display(),
            found.hash,
            expected.hash
        )));
    }
    Ok(bytes)
}

fn missing(folder: &Path, name: &str, error: &std::io::Error) -> Error {
    Error::Invalid(format!(
        "the artifact {} lacks {name} ({error}); compile again",
        folder.display()
    ))
}

/// Kernels that use what this CPU lacks would end the process at their first instruction.
fn check_features(folder: &Path, target_features: &str) -> Result<()> {
    let used: Vec<&str> = target_features
        .split(',')
        .filter_map(|f| f.strip_prefix('+'))
        .collect();
    let lacking: Vec<&str> = cpu_features()
        .into_iter()
        .filter(|(name, has)| !has && used.contains(name))
        .map(|(name, _)| name)
        .collect();
    if lacking.is_empty() {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "the artifact {} uses CPU features that this machine lacks: {}; compile it again here",
        folder.display(),
        lacking.join(", ")
    )))
}

/// The features that generated code may use, as LLVM names them, and whether this CPU has them.
#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<(&'static str, bool)> {
    use std::arch::is_x86_feature_detected as has;
    vec![
        ("avx", has!("avx")),
        ("avx2", has!("avx2")),
        ("fma", has!("fma")),
        ("bmi2", has!("bmi2")),
        ("avx512f", has!("avx512f")),
        ("avx512vl", has!("avx512vl")),
        ("avx512bw", has!("avx512bw")),
        ("avx512dq", has!("avx512dq")),
        ("avx512bf16", has!("avx512bf16")),
    ]
}

/// Other processors' features are part of their baseline here.
#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> Vec<(&'static str, bool)> {
    Vec::new()
}

pub(crate) fn mark(bytes: &[u8]) -> FileMark {
    let hash = bytes.iter().fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3)
    });
    FileMark {
        n_bytes: bytes.len() as u64,
        hash: format!("{hash:016x}"),
    }
}

fn is_empty_folder(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

/// A name next to `path` that no other writer of this machine uses.
pub(crate) fn beside(path: &Path) -> PathBuf {
    static N_NAMES: AtomicU64 = AtomicU64::new(0);
    let name = path
        .file_name()
        .map_or_else(|| "artifact".into(), |name| name.to_string_lossy());
    let number = N_NAMES.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!(".{name}.{}.{number}", std::process::id()))
}
