//! Exchanges between devices by NCCL, loaded when a program needs them.
//!
//! In: the name of a team, made by one member and brought to the others. Out: this member's end of it.
//! Invariant: the members of a team give it the same calls in the same order, each on one stream.

use std::ffi::c_void;
use std::mem::MaybeUninit;

use cudarc::driver::sys::CUstream;
use cudarc::nccl::{result, sys};
use meshweave_dsl::dtype::DType;
use meshweave_dsl::layout::ReduceKind;

use super::nvrtc::preload;
use crate::device::gpu::{Address, Part};
use crate::error::{Error, Result};

/// A communicator of NCCL.
pub(super) struct Team {
    communicator: sys::ncclComm_t,
}

/// A name for a team.
///
/// # Errors
/// `Exhausted` when NCCL is not there or does not start.
pub(super) fn team_name() -> Result<Vec<u32>> {
    load()?;
    let id = result::get_uniqueid().map_err(|error| nccl_error("cannot name a team", &error))?;
    let bytes: Vec<u8> = id.internal.iter().map(|byte| *byte as u8).collect();
    let words = bytes.chunks_exact(4);
    Ok(words
        .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect())
}

/// Whether the library is there.
pub(super) fn is_there() -> bool {
    preload();
    // SAFETY: looks for a library and loads it.
    unsafe { sys::is_culib_present() }
}

fn load() -> Result<()> {
    if is_there() {
        return Ok(());
    }
    Err(Error::Exhausted(
        "NCCL: libnccl.so was looked for where the system's loader looks and is not there; install NCCL with \
         its development package"
            .into(),
    ))
}

impl Team {
    /// Joins a team; waits for all members. The device's context is current.
    ///
    /// # Errors
    /// `Exhausted` when NCCL is not there, or the members do not find each other.
    pub(super) fn join(name: &[u32], n_members: usize, member: usize) -> Result<Team> {
        load()?;
        let mut id = sys::ncclUniqueId { internal: [0; 128] };
        let bytes = name.iter().flat_map(|word| word.to_le_bytes());
        for (to, byte) in id.internal.iter_mut().zip(bytes) {
            *to = byte as _;
        }
        let mut communicator = MaybeUninit::uninit();
        // SAFETY: NCCL sets the communicator when it returns without an error.
        let communicator = unsafe {
            result::comm_init_rank(
                communicator.as_mut_ptr(),
                n_members as i32,
                id,
                member as i32,
            )
            .map_err(|error| nccl_error("cannot join a team", &error))?;
            communicator.assume_init()
        };
        Ok(Team { communicator })
    }

    /// What NCCL has noticed since: a peer that is gone, a network that fails.
    ///
    /// # Errors
    /// `Exhausted` with it.
    pub(super) fn check(&self) -> Result<()> {
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator is this team's; the out-parameter is a local.
        unsafe { sys::ncclCommGetAsyncError(self.communicator, &raw mut state) }
            .result()
            .map_err(|error| nccl_error("cannot ask after a team", &error))?;
        let state = state.result();
        state.map_err(|error| nccl_error("has lost an exchange between devices", &error))?;
        Ok(())
    }

    /// Ends what is under way; the team is of no use afterwards.
    pub(super) fn abort(self) {
        // SAFETY: freed once: this value's own end does not come.
        let _ = unsafe { result::comm_abort(self.communicator) };
        std::mem::forget(self);
    }

    /// Sends and receives, all at once.
    ///
    /// # Errors
    /// Those of NCCL.
    pub(super) fn exchange(&self, sends: &[Part], recvs: &[Part], stream: CUstream) -> Result<()> {
        let failed = |error| nccl_error("cannot exchange", &error);
        let bytes = sys::ncclDataType_t::ncclUint8;
        result::group_start().map_err(failed)?;
        for part in sends {
            let (from, peer) = (part.address as *const c_void, part.member as i32);
            // SAFETY: the part lies in this device's memory.
            unsafe {
                result::send(
                    from,
                    part.n_bytes,
                    bytes,
                    peer,
                    self.communicator,
                    stream.cast(),
                )
            }
            .map_err(failed)?;
        }
        for part in recvs {
            let (to, peer) = (part.address as *mut c_void, part.member as i32);
            // SAFETY: as above.
            unsafe {
                result::recv(
                    to,
                    part.n_bytes,
                    bytes,
                    peer,
                    self.communicator,
                    stream.cast(),
                )
            }
            .map_err(failed)?;
        }
        result::group_end().map_err(failed)?;
        Ok(())
    }

    /// Combines `n` elements of all members.
    ///
    /// # Errors
    /// Those of NCCL; `Internal` for a kind or a type that it lacks.
    pub(super) fn all_reduce(
        &self,
        (kind, dtype): (ReduceKind, DType),
        (src, dst, n): (Address, Address, usize),
        stream: CUstream,
    ) -> Result<()> {
        let operation = match kind {
            ReduceKind::Sum => sys::ncclRedOp_t::ncclSum,
            ReduceKind::Max => sys::ncclRedOp_t::ncclMax,
            ReduceKind::Lse => {
                return Err(Error::Internal("NCCL has no logarithm of sums".into()));
            }
        };
        let dtype = match dtype {
            DType::F32 => sys::ncclDataType_t::ncclFloat32,
            DType::Bf16 => sys::ncclDataType_t::ncclBfloat16,
            DType::F16 => sys::ncclDataType_t::ncclFloat16,
            DType::I32 => sys::ncclDataType_t::ncclInt32,
        };
        // SAFETY: both buffers lie in this device's memory and hold as many elements.
        unsafe {
            result::all_reduce(
                src as *const c_void,
                dst as *mut c_void,
                n,
                dtype,
                operation,
                self.communicator,
                stream.cast(),
            )
        }
        .map_err(|error| nccl_error("cannot reduce", &error))?;
        Ok(())
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        // SAFETY: nothing runs any more (the device has been waited for); freed once.
        let _ = unsafe { result::comm_destroy(self.communicator) };
    }
}

fn nccl_error(what: &str, error: &result::NcclError) -> Error {
    Error::Exhausted(format!(
        "NCCL {what}: {:?}; NCCL_DEBUG=INFO lets it say more",
        error.0
    ))
}
