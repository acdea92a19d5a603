//! Objects to a shared object, by the system's linker.
//!
//! Enters: object files as bytes. Leaves: one file that `dlopen` takes.
//! Invariant: nothing is left behind but the output, and on an error not even that.

use std::path::Path;
use std::process::Command;

use super::{Error, HostObject};

/// Links the objects into the shared object `output`.
///
/// # Errors
/// `Exhausted` if files cannot be written or there is no `cc`, `Internal` if it refuses.
pub fn link(object: &HostObject, output: &Path) -> Result<(), Error> {
    let io = |path: &Path, error: std::io::Error| Error::Exhausted {
        message: format!("cannot write {}: {error}", path.display()),
    };
    let mut inputs = Vec::with_capacity(object.objects.len());
    let result = (|| {
        for (idx, bytes) in object.objects.iter().enumerate() {
            let path = output.with_extension(format!("{idx}.o"));
            inputs.push(path.clone());
            std::fs::write(&path, bytes).map_err(|error| io(&path, error))?;
        }
        let run = Command::new("cc")
            .arg("-shared")
            .arg("-o")
            .arg(output)
            .args(&inputs)
            .output()
            .map_err(|error| Error::Exhausted {
                message: format!(
                    "cannot run the linker driver `cc`: {error}; install a C toolchain (Debian: gcc)"
                ),
            })?;
        if !run.status.success() {
            let _ = std::fs::remove_file(output);
            return Err(Error::Internal {
                message: format!(
                    "cc -shared failed with {}: {}",
                    run.status,
                    String::from_utf8_lossy(&run.stderr).trim()
                ),
            });
        }
        Ok(())
    })();
    for path in inputs {
        // A leftover object is harmless; the link's own result matters more.
        let _ = std::fs::remove_file(path);
    }
    result
}
