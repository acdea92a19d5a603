//! Types with a text form.

pub mod diagnostics;
pub mod units;
