//! NVIDIA's compiler of CUDA C++, where `make test` has fetched it: from a source to PTX, without a GPU.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::PathBuf;
use std::ptr;
use std::sync::{Mutex, OnceLock};

use libloading::{Library, Symbol};

type Program = *mut c_void;

struct Nvrtc {
    library: Library,
    /// The library looks for its builtins when it compiles.
    _builtins: Library,
}

/// The PTX of a source for `compute_80` or the like; `None`, with a word about it, where there is no
/// compiler. The same source is compiled once.
#[track_caller]
pub fn compile(source: &str, arch: &str) -> Option<String> {
    static NVRTC: OnceLock<Option<Mutex<Nvrtc>>> = OnceLock::new();
    static KNOWN: Mutex<BTreeMap<(String, String), String>> = Mutex::new(BTreeMap::new());
    let key = (source.to_string(), arch.to_string());
    if let Some(ptx) = KNOWN.lock().unwrap().get(&key) {
        return Some(ptx.clone());
    }
    let nvrtc = NVRTC.get_or_init(Nvrtc::load).as_ref()?;
    let ptx = nvrtc.lock().unwrap().compile(source, arch);
    KNOWN.lock().unwrap().insert(key, ptx.clone());
    Some(ptx)
}

impl Nvrtc {
    fn load() -> Option<Mutex<Self>> {
        let fetched = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/target/tools/nvrtc/nvidia/cuda_nvrtc/lib"
        );
        let folder = PathBuf::from(std::env::var("MESHWEAVE_NVRTC").unwrap_or(fetched.into()));
        if !folder.join("libnvrtc.so.12").exists() {
            eprintln!("skipped: no NVRTC in {folder:?}; `make test` fetches it");
            return None;
        }
        // SAFETY: the library's initializers have no requirements.
        unsafe {
            Some(Mutex::new(Self {
                _builtins: Library::new(folder.join("libnvrtc-builtins.so.12.9")).unwrap(),
                library: Library::new(folder.join("libnvrtc.so.12")).unwrap(),
            }))
        }
    }

    fn compile(&self, source: &str, arch: &str) -> String {
        let text = CString::new(source).unwrap();
        let options = [format!("--gpu-architecture={arch}"), "--std=c++17".into()]
            .map(|option| CString::new(option).unwrap());
        let options = options.each_ref().map(|option| option.as_ptr());
        // SAFETY: the functions have these signatures, texts end in zero, and pointers outlive calls.
        unsafe {
            let create: Symbol<
                unsafe extern "C" fn(
                    *mut Program,
                    *const c_char,
                    *const c_char,
                    c_int,
                    *const *const c_char,
                    *const *const c_char,
                ) -> c_int,
            > = self.library.get(b"nvrtcCreateProgram").unwrap();
            let compile: Symbol<
                unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
            > = self.library.get(b"nvrtcCompileProgram").unwrap();
            let destroy: Symbol<unsafe extern "C" fn(*mut Program) -> c_int> =
                self.library.get(b"nvrtcDestroyProgram").unwrap();
            let mut program: Program = ptr::null_mut();
            let name = c"kernel.cu".as_ptr();
            let made = create(
                &mut program,
                text.as_ptr(),
                name,
                0,
                ptr::null(),
                ptr::null(),
            );
            assert_eq!(made, 0, "NVRTC takes no program");
            let failed = compile(program, options.len() as c_int, options.as_ptr());
            let log = self.text(program, b"nvrtcGetProgramLogSize", b"nvrtcGetProgramLog");
            assert!(failed == 0 && log.trim().is_empty(), "{log}\n{source}");
            let ptx = self.text(program, b"nvrtcGetPTXSize", b"nvrtcGetPTX");
            destroy(&mut program);
            ptx
        }
    }

    /// # Safety
    /// The functions are NVRTC's getters of a size and of a text, the program is alive.
    unsafe fn text(&self, program: Program, size: &[u8], get: &[u8]) -> String {
        // SAFETY: as for this function; the text has room for as many bytes as the size says.
        unsafe {
            let size_of: Symbol<unsafe extern "C" fn(Program, *mut usize) -> c_int> =
                self.library.get(size).unwrap();
            let get: Symbol<unsafe extern "C" fn(Program, *mut c_char) -> c_int> =
                self.library.get(get).unwrap();
            let mut n = 0;
            assert_eq!(size_of(program, &mut n), 0);
            let mut bytes = vec![0u8; n.max(1)];
            assert_eq!(get(program, bytes.as_mut_ptr().cast()), 0);
            let text = CStr::from_bytes_until_nul(&bytes).unwrap();
            text.to_string_lossy().into_owned()
        }
    }
}
