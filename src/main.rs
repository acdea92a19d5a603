//! The `meshweave` command.

use std::process::ExitCode;

use clap::Parser;
use meshweave::cli::{Cli, run};

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_env("MESHWEAVE_LOG"))
        .with_writer(std::io::stderr)
        .init();
    run(&Cli::parse())
}
