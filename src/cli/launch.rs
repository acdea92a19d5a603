//! `meshweave run --backend mpi`: starts the workers with the MPI launcher of this machine.
//!
//! Enters: an artifact and the flags of the run. Leaves: the launcher's exit code; the workers print.
//! Invariant: the workers get every flag that concerns them, spelled out.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use meshweave_dsl::diagnostics::Class;
use meshweave_runtime::signals;

use super::Format;
use super::job::JobArgs;
use crate::error::{Error, Result};

/// Names the launcher, where it is not `mpirun`.
const LAUNCHER_VARIABLE: &str = "MESHWEAVE_MPIRUN";

/// Where and how many.
#[derive(Clone, Debug)]
pub(super) struct Job<'a> {
    pub(super) artifact: &'a Path,
    pub(super) n_ranks: usize,
    /// As the launcher writes them: `a:4,b:4`.
    pub(super) hosts: Option<&'a str>,
    pub(super) flags: &'a JobArgs,
    /// Further arguments of the workers.
    pub(super) more: &'a [OsString],
}

/// Runs the workers to their end; the exit code of the job when it is not 0.
///
/// # Errors
/// `Exhausted` when there is no launcher; `Invalid` when it refuses root.
pub(super) fn launch(job: &Job<'_>, format: Format) -> Result<Option<u8>> {
    let launcher = std::env::var_os(LAUNCHER_VARIABLE).unwrap_or_else(|| "mpirun".into());
    let absent = |error: std::io::Error| {
        let message = format!("cannot start {}: {error}", launcher.display());
        Error::plain(Class::Exhausted, message)
            .help("install an MPI (Debian: `apt-get install openmpi-bin`, or mpich)")
            .help(format!("or name its launcher in {LAUNCHER_VARIABLE}"))
    };
    let version = Command::new(&launcher)
        .arg("--version")
        .output()
        .map_err(absent)?;
    let is_open_mpi = String::from_utf8_lossy(&version.stdout).contains("Open MPI");
    if is_open_mpi && is_root() && !root_is_allowed() {
        return Err(Error::plain(
            Class::Invalid,
            "Open MPI does not start processes as root unless told twice that it may",
        )
        .help("run as another user")
        .help("or set OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1, as in containers"));
    }
    let program = std::env::current_exe().map_err(|error| {
        Error::plain(
            Class::Exhausted,
            format!("cannot find this program's own file: {error}"),
        )
    })?;
    let mut command = Command::new(&launcher);
    command.args(launcher_args(job, is_open_mpi));
    command.arg(program).arg("--format").arg(match format {
        Format::Text => "text",
        Format::Json => "json",
    });
    command
        .arg("worker")
        .arg(job.artifact)
        .args(job.flags.to_args())
        .args(job.more);
    signals::heed();
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(absent)?;
    let printed = child.stdout.take();
    let printer = std::thread::spawn(move || {
        let copy = |mut printed| std::io::copy(&mut printed, &mut std::io::stdout());
        printed.map_or(Ok(0), copy).unwrap_or(0)
    });
    let status = loop {
        if let Some(status) = child.try_wait().map_err(absent)? {
            break status;
        }
        // The launcher passes these on to all processes; it would kill them on others.
        if signals::take_save() {
            signals::pass_on(child.id());
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let n_printed = printer.join().unwrap_or(0);
    if format == Format::Json && n_printed == 0 && !status.success() {
        let message = format!(
            "the processes ended without a report; {} says: {status}",
            launcher.display()
        );
        return Err(Error::plain(Class::Exhausted, message)
            .help("its own messages on standard error name the process that ended first"));
    }
    Ok(match status.code() {
        Some(0) => None,
        Some(code) => Some(u8::try_from(code).unwrap_or(4)),
        None => Some(4),
    })
}

fn launcher_args(job: &Job<'_>, is_open_mpi: bool) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec!["-n".into(), job.n_ranks.to_string().into()];
    if let Some(hosts) = job.hosts {
        let flag = if is_open_mpi { "--host" } else { "-hosts" };
        args.extend([flag.into(), hosts.into()]);
    }
    if is_open_mpi {
        // Ranks fill one host after another: the mesh's innermost axes lie within a host.
        args.extend(["--map-by".into(), "slot".into()]);
        let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
        if job.hosts.is_none() && job.n_ranks > n_cores {
            args.extend(["--oversubscribe".into(), "--bind-to".into(), "none".into()]);
        }
    }
    args
}

fn root_is_allowed() -> bool {
    let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| value == "1");
    is_set("OMPI_ALLOW_RUN_AS_ROOT") && is_set("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
}

#[cfg(unix)]
fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

#[cfg(not(unix))]
fn is_root() -> bool {
    false
}
