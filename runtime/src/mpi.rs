//! The machine's MPI library, loaded when first asked for.
//!
//! In: the name of a shared object, or the usual ones. Out: MPI's functions with the constants of the
//! library's binary interface. Invariant: one process holds one [`Mpi`], initialized once; what this
//! module returns follows the interface that the library was found to have.
//!
//! There are two interfaces in use. Open MPI's handles are addresses of objects that the library
//! exports; those of MPICH and its relatives (Intel MPI, MVAPICH) are numbers of 32 bits, fixed by their
//! common agreement (`mpi.h`). Both are passed as a machine word here: on the little-endian systems
//! that Rust and MPI share, a number of 32 bits travels in the low half of a register, and a handle
//! that is written through a pointer fills the low half of a zeroed word.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::error::{Error, Result};

/// Names the library to load, where it is not one of the usual ones.
pub const LIBRARY_VARIABLE: &str = "MESHWEAVE_MPI_LIBRARY";

/// `MPI_THREAD_SERIALIZED`: any thread may call, one at a time.
const THREAD_SERIALIZED: c_int = 2;

/// A handle of either interface: a communicator, a group, a type, a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Handle(usize);

impl Handle {
    /// What a call fills.
    pub(crate) const EMPTY: Handle = Handle(0);
}

/// Room for a status of either interface; read by the library's own functions alone.
#[repr(C, align(8))]
pub(crate) struct Status([u8; 64]);

impl Status {
    pub(crate) const EMPTY: Status = Status([0; 64]);
}

/// Declares the functions of the table, each looked up by its name in the library.
macro_rules! functions {
    ($($(#[$doc:meta])* $field:ident = $symbol:literal : fn($($arg:ty),*);)*) => {
        pub(crate) struct Functions {
            $($(#[$doc])* pub(crate) $field: unsafe extern "C" fn($($arg),*) -> c_int,)*
        }

        impl Functions {
            fn find(library: &Library) -> std::result::Result<Functions, &'static str> {
                Ok(Functions {
                    // SAFETY: the MPI standard fixes the signature of every function; handles are
                    // words, as the module says.
                    $($field: *unsafe { library.get(concat!($symbol, "\0").as_bytes()) }.map_err(|_| $symbol)?,)*
                })
            }
        }
    };
}

functions! {
    initialized = "MPI_Initialized": fn(*mut c_int);
    init_thread = "MPI_Init_thread": fn(*mut c_int, *mut *mut *mut c_char, c_int, *mut c_int);
    finalize = "MPI_Finalize": fn();
    abort = "MPI_Abort": fn(Handle, c_int);
    get_library_version = "MPI_Get_library_version": fn(*mut c_char, *mut c_int);
    get_processor_name = "MPI_Get_processor_name": fn(*mut c_char, *mut c_int);
    error_string = "MPI_Error_string": fn(c_int, *mut c_char, *mut c_int);
    comm_rank = "MPI_Comm_rank": fn(Handle, *mut c_int);
    comm_size = "MPI_Comm_size": fn(Handle, *mut c_int);
    comm_dup = "MPI_Comm_dup": fn(Handle, *mut Handle);
    comm_group = "MPI_Comm_group": fn(Handle, *mut Handle);
    comm_create_group = "MPI_Comm_create_group": fn(Handle, Handle, c_int, *mut Handle);
    comm_set_errhandler = "MPI_Comm_set_errhandler": fn(Handle, Handle);
    group_incl = "MPI_Group_incl": fn(Handle, c_int, *const c_int, *mut Handle);
    group_free = "MPI_Group_free": fn(*mut Handle);
    test = "MPI_Test": fn(*mut Handle, *mut c_int, *mut Status);
    get_count = "MPI_Get_count": fn(*const Status, Handle, *mut c_int);
    iprobe = "MPI_Iprobe": fn(c_int, c_int, Handle, *mut c_int, *mut Status);
    recv = "MPI_Recv": fn(*mut c_void, c_int, Handle, c_int, c_int, Handle, *mut Status);
    isend = "MPI_Isend": fn(*const c_void, c_int, Handle, c_int, c_int, Handle, *mut Handle);
    irecv = "MPI_Irecv": fn(*mut c_void, c_int, Handle, c_int, c_int, Handle, *mut Handle);
    ibarrier = "MPI_Ibarrier": fn(Handle, *mut Handle);
    ibcast = "MPI_Ibcast": fn(*mut c_void, c_int, Handle, c_int, Handle, *mut Handle);
    iallgatherv = "MPI_Iallgatherv": fn(*const c_void, c_int, Handle, *mut c_void, *const c_int, *const c_int, Handle, Handle, *mut Handle);
    ialltoallv = "MPI_Ialltoallv": fn(*const c_void, *const c_int, *const c_int, Handle, *mut c_void, *const c_int, *const c_int, Handle, Handle, *mut Handle);
}

/// The library, initialized.
pub struct Mpi {
    pub(crate) functions: Functions,
    pub(crate) world: Handle,
    /// `MPI_INT`: words of 32 bits, which are moved and never computed with.
    pub(crate) word: Handle,
    pub(crate) byte: Handle,
    errors_return: Handle,
    reaches_cuda: bool,
    /// What the library says of itself.
    version: String,
    file: String,
    /// Keeps the code mapped.
    library: Library,
}

// SAFETY: handles and functions are plain numbers and addresses; the library was initialized for calls
// from any thread, one at a time, which holds as long as its one user is one communicator.
unsafe impl Send for Mpi {}
// SAFETY: as above.
unsafe impl Sync for Mpi {}

impl Mpi {
    /// Loads and initializes the library that [`LIBRARY_VARIABLE`] names, or the first of the usual
    /// ones that is there.
    ///
    /// # Errors
    /// `Exhausted` when there is none, or it cannot be initialized; `Internal` when it was already.
    pub fn load() -> Result<Mpi> {
        static LOADED: AtomicBool = AtomicBool::new(false);
        if LOADED.swap(true, Ordering::SeqCst) {
            return Err(Error::Internal("MPI is initialized twice".into()));
        }
        let named = std::env::var(LIBRARY_VARIABLE).ok();
        let candidates: Vec<&str> = match &named {
            Some(name) => vec![name],
            None => usual_names(),
        };
        let mut failures = Vec::new();
        for candidate in candidates {
            // SAFETY: an MPI library's initializers may run at any time before MPI_Init. It is opened
            // for all, since Open MPI's components look their symbols up in it.
            match unsafe { Library::open(Some(candidate), RTLD_NOW | RTLD_GLOBAL) } {
                Ok(library) => return Mpi::initialize(candidate, library),
                Err(_) => failures.push(candidate),
            }
        }
        Err(Error::Exhausted(format!(
            "no MPI library can be loaded (tried {}); install one (Debian: openmpi-bin, or mpich), or name it in \
             {LIBRARY_VARIABLE}",
            failures.join(", ")
        )))
    }

    fn initialize(file: &str, library: Library) -> Result<Mpi> {
        let unfit = |what: &str| {
            Error::Exhausted(format!(
                "{file} lacks {what}; an MPI of version 3 or later is needed"
            ))
        };
        let functions = Functions::find(&library).map_err(unfit)?;
        // SAFETY: the symbol's address alone is taken; where it exists it is a library's object.
        let exported = |name: &'static str| unsafe {
            library
                .get::<*mut c_void>(format!("{name}\0").as_bytes())
                .map(|symbol| Handle(symbol.into_raw() as usize))
                .map_err(|_| unfit(name))
        };
        // SAFETY: as above.
        let is_open_mpi = unsafe { library.get::<*mut c_void>(b"ompi_mpi_comm_world\0") }.is_ok();
        let (world, word, byte, errors_return) = if is_open_mpi {
            (
                exported("ompi_mpi_comm_world")?,
                exported("ompi_mpi_int")?,
                exported("ompi_mpi_byte")?,
                exported("ompi_mpi_errors_return")?,
            )
        } else {
            // `mpi.h` of MPICH 3 and 4.
            (
                Handle(0x4400_0000),
                Handle(0x4c00_0405),
                Handle(0x4c00_010d),
                Handle(0x5400_0001),
            )
        };
        let mut mpi = Mpi {
            functions,
            world,
            word,
            byte,
            errors_return,
            reaches_cuda: false,
            version: String::new(),
            file: file.to_string(),
            library,
        };
        let (mut initialized, mut provided) = (0, 0);
        let (no_count, no_values) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the out-parameters are locals; MPI 2 and later take null arguments.
        unsafe {
            mpi.check(
                "MPI_Initialized",
                (mpi.functions.initialized)(&raw mut initialized),
            )?;
            if initialized == 0 {
                let provided = &raw mut provided;
                let code =
                    (mpi.functions.init_thread)(no_count, no_values, THREAD_SERIALIZED, provided);
                mpi.check("MPI_Init_thread", code)?;
            }
        }
        if initialized == 0 && provided < THREAD_SERIALIZED {
            return Err(unfit("support for threads (MPI_THREAD_SERIALIZED)"));
        }
        mpi.reaches_cuda = reaches_cuda(&mpi.library);
        mpi.return_errors(mpi.world)?;
        // SAFETY: `text` gives room for the longest string.
        mpi.version =
            mpi.text(|text, len| unsafe { (mpi.functions.get_library_version)(text, len) });
        Ok(mpi)
    }

    /// What the library says of itself, in a line.
    pub fn version(&self) -> &str {
        self.version.lines().next().unwrap_or_default()
    }

    /// The name under which the library was found.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// Whether calls take addresses of CUDA's memory, as the library says of itself.
    pub fn reaches_cuda(&self) -> bool {
        self.reaches_cuda
    }

    /// The name of this host.
    pub fn host(&self) -> String {
        // SAFETY: `text` gives room for the longest string.
        self.text(|text, len| unsafe { (self.functions.get_processor_name)(text, len) })
    }

    /// Ends all processes of the job, with this exit code.
    pub fn abort(&self, code: u8) -> ! {
        // SAFETY: the world's communicator is valid from the start to the end.
        unsafe { (self.functions.abort)(self.world, c_int::from(code)) };
        std::process::exit(i32::from(code))
    }

    /// Lets calls on a communicator return their errors.
    pub(crate) fn return_errors(&self, comm: Handle) -> Result<()> {
        // SAFETY: both handles are the library's own.
        let code = unsafe { (self.functions.comm_set_errhandler)(comm, self.errors_return) };
        self.check("MPI_Comm_set_errhandler", code)
    }

    /// A communicator of these ranks of another one, in their order; all of them call this together.
    /// Members of several such at once tell them apart by the tag, at most 32767.
    ///
    /// # Errors
    /// `Exhausted` when MPI refuses.
    pub(crate) fn subset(&self, of: Handle, ranks: &[usize], tag: c_int) -> Result<Handle> {
        let members: Vec<c_int> = ranks.iter().map(|rank| *rank as c_int).collect();
        let n_members = members.len() as c_int;
        let (mut all, mut group, mut made) = (Handle::EMPTY, Handle::EMPTY, Handle::EMPTY);
        let functions = &self.functions;
        // SAFETY: the out-parameters are locals; `members` holds as many ranks as said.
        unsafe {
            self.check("MPI_Comm_group", (functions.comm_group)(of, &raw mut all))?;
            let code = (functions.group_incl)(all, n_members, members.as_ptr(), &raw mut group);
            self.check("MPI_Group_incl", code)?;
            let code = (functions.comm_create_group)(of, group, tag, &raw mut made);
            self.check("MPI_Comm_create_group", code)?;
            (functions.group_free)(&raw mut group);
            (functions.group_free)(&raw mut all);
        }
        self.return_errors(made)?;
        Ok(made)
    }

    /// The error behind a code that is not success.
    pub(crate) fn check(&self, call: &str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let text = self.text(|text: *mut c_char, len: *mut c_int| {
            // SAFETY: `text` gives room for a string of either interface.
            unsafe { (self.functions.error_string)(code, text, len) }
        });
        Err(Error::Exhausted(format!("{call} failed: {text}")))
    }

    fn text(&self, fill: impl Fn(*mut c_char, *mut c_int) -> c_int) -> String {
        // The longest string of either interface is MPICH's version, of 8192 bytes.
        let mut buffer = vec![0u8; 16384];
        let mut len = 0;
        fill(buffer.as_mut_ptr().cast(), &raw mut len);
        CStr::from_bytes_until_nul(&buffer)
            .map(|text| text.to_string_lossy().trim().to_string())
            .unwrap_or_default()
    }
}

/// What a library says of itself and CUDA's memory: Open MPI by `MPIX_Query_cuda_support`, MPICH and its
/// relatives by `MPIX_GPU_query_support` (kind 0 is CUDA). One that has neither reaches none.
fn reaches_cuda(library: &Library) -> bool {
    type Query = unsafe extern "C" fn() -> c_int;
    type QueryKind = unsafe extern "C" fn(c_int, *mut c_int) -> c_int;
    const CUDA: c_int = 0;
    let mut is_supported = 0;
    // SAFETY: both libraries' headers (`mpi-ext.h`, `mpi.h`) give these signatures.
    unsafe {
        if let Ok(query) = library.get::<Query>(b"MPIX_Query_cuda_support\0") {
            return query() == 1;
        }
        if let Ok(query) = library.get::<QueryKind>(b"MPIX_GPU_query_support\0") {
            return query(CUDA, &raw mut is_supported) == 0 && is_supported != 0;
        }
    }
    false
}

/// The usual names, those of the launcher in use first.
fn usual_names() -> Vec<&'static str> {
    const OPEN_MPI: [&str; 2] = ["libmpi.so.40", "libmpi.so.80"];
    const MPICH: [&str; 3] = ["libmpich.so.12", "libmpi.so.12", "libmpich.so"];
    let is_set = |name: &str| std::env::var_os(name).is_some();
    // Hydra and other PMI launchers set PMI_RANK; Open MPI's and PMIx's set theirs.
    let pmi = is_set("PMI_RANK") && !is_set("OMPI_COMM_WORLD_SIZE") && !is_set("PMIX_RANK");
    let mut names: Vec<&str> = Vec::new();
    if pmi {
        names.extend(MPICH);
        names.extend(OPEN_MPI);
    } else {
        names.extend(OPEN_MPI);
        names.extend(MPICH);
    }
    names.push("libmpi.so");
    names
}
