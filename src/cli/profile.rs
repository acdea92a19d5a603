//! `meshweave profile`.

use std::path::PathBuf;

use clap::Args;
use meshweave_dsl::diagnostics::Class;

use super::{Format, write_atomically};
use crate::cli::output::out;
use crate::error::{Error, Result};

#[derive(Debug, Args)]
pub struct ProfileArgs {
    /// Number of virtual devices, all measured at once.
    #[arg(long, short = 'n', default_value_t = 8)]
    devices: usize,
    /// Write the cluster here instead of to standard output.
    #[arg(long, short)]
    out: Option<PathBuf>,
}

/// Measures this machine as a cluster of virtual devices.
pub fn profile(args: &ProfileArgs, format: Format) -> Result<()> {
    if args.devices == 0 {
        return Err(Error::plain(
            Class::Invalid,
            "0 devices cannot be measured; give at least 1 with --devices",
        ));
    }
    let cluster =
        meshweave_runtime::profile::measure_host(args.devices).map_err(super::runtime_error)?;
    let text = match format {
        Format::Text => meshweave_compiler::resolve::print_cluster(&cluster),
        Format::Json => format!(
            "{}\n",
            serde_json::json!({"cluster": cluster, "basis": "measured"})
        ),
    };
    match &args.out {
        Some(path) => {
            write_atomically(path, text.as_bytes())?;
            eprintln!("wrote {}", path.display());
        }
        None => out!("{text}"),
    }
    Ok(())
}
