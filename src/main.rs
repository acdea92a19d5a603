//! The `meshweave` command.

use std::process::ExitCode;

use clap::Parser;
use meshweave::cli::{Cli, run};

/// Planning allocates much and little at a time on all cores, for which the system's allocator keeps giving
/// memory back to the kernel.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_env("MESHWEAVE_LOG"))
        .with_writer(std::io::stderr)
        .init();
    run(&Cli::parse())
}
