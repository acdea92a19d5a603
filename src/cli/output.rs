//! What commands print.
//!
//! Enters: text. Leaves: standard output.
//! Invariant: whoever reads it may stop (`meshweave … | head`); the command goes on, and what it writes to
//! files is written.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write, stdout};

/// `print!`, for readers that may stop.
macro_rules! out {
    ($($text:tt)*) => { $crate::cli::output::write(format_args!($($text)*)) };
}

/// `println!`, for readers that may stop.
macro_rules! outln {
    () => { $crate::cli::output::write(format_args!("\n")) };
    ($($text:tt)*) => { $crate::cli::output::write(format_args!("{}\n", format_args!($($text)*))) };
}

pub(crate) use {out, outln};

/// Writes to standard output; a reader that is gone is no error, any other failure is said.
pub(crate) fn write(text: Arguments<'_>) {
    match stdout().write_fmt(text) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            eprintln!("error: standard output: {error}");
        }
        _ => {}
    }
}
