//! Signals that a run heeds: to save a checkpoint, and to save one and end.
//!
//! In: `SIGUSR1` (save and go on), `SIGUSR2`, `SIGTERM` and `SIGINT` (save and end). Out: what has been
//! asked for, read between steps. Invariant: a handler only sets a flag; a second `SIGINT` ends the
//! process at once.

use std::sync::atomic::{AtomicBool, Ordering};

use libc::{SIGINT, SIGTERM, SIGUSR1, SIGUSR2, c_int};

static SAVE: AtomicBool = AtomicBool::new(false);
static END: AtomicBool = AtomicBool::new(false);

/// Heeds the signals from now on, instead of ending by them.
pub fn heed() {
    for signal in [SIGUSR1, SIGUSR2, SIGTERM, SIGINT] {
        let handler: extern "C" fn(c_int) = note;
        // SAFETY: the handler touches atomics and calls `signal`, both of which handlers may do.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

/// Whether a checkpoint has been asked for since the last call.
pub fn take_save() -> bool {
    SAVE.swap(false, Ordering::Relaxed)
}

/// Whether the run has been asked to end.
pub fn ending() -> bool {
    END.load(Ordering::Relaxed)
}

/// Tells another process what this one was told: to save, or to save and end.
pub fn pass_on(process: u32) {
    let signal = if ending() { SIGUSR2 } else { SIGUSR1 };
    // SAFETY: sends a signal to a process; a process that is gone is no harm.
    unsafe { libc::kill(process as libc::pid_t, signal) };
}

extern "C" fn note(signal: c_int) {
    SAVE.store(true, Ordering::Relaxed);
    if signal != SIGUSR1 {
        END.store(true, Ordering::Relaxed);
    }
    if signal == SIGINT {
        // SAFETY: restoring the default action is what handlers may do.
        unsafe { libc::signal(SIGINT, libc::SIG_DFL) };
    }
}
