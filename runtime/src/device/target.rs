//! Which devices run code for a target.
//!
//! Enters: a target as NVIDIA writes it (`sm_90`, `sm_90a`) and a device's compute capability. Leaves:
//! whether they fit, or what to compile for instead.
//! Source: PTX ISA, 11.1.2 `.target`: code for `sm_XY` runs on devices of that compute capability and later
//! ones, code for `sm_XYa` on devices of exactly that one.

use crate::error::{Error, Result};

/// Whether code for the target runs on one compute capability alone.
pub fn is_exact(target: &str) -> bool {
    target.ends_with('a')
}

/// Whether code for `target` runs on the device `name`.
///
/// # Errors
/// `Invalid` when it does not; it names both and the target that does.
pub fn check_target(target: &str, name: &str, (major, minor): (u32, u32)) -> Result<()> {
    let number = target.trim_start_matches("sm_").trim_end_matches('a');
    let wanted = number.parse::<u32>().map_err(|_| {
        Error::Invalid(format!(
            "the code is for `{target}`, which is no target that this runtime knows; compile it for one of \
             `meshweave compile --help`"
        ))
    })?;
    let found = 10 * major + minor;
    let (fits, scope) = match is_exact(target) {
        true => (found == wanted, "alone"),
        false => (found >= wanted, "and later"),
    };
    if fits {
        return Ok(());
    }
    // The newest of the targets that every later device runs too.
    let way_out = match found {
        ..80 => return Err(too_old(target, name, (major, minor))),
        80..90 => "cuda:sm_80",
        90..100 => "cuda:sm_90",
        _ => "cuda:sm_100",
    };
    Err(Error::Invalid(format!(
        "the code is for {target}, which runs on compute capability {}.{} {scope}, and {name} has \
         {major}.{minor}; compile it again with `--target {way_out}`",
        wanted / 10,
        wanted % 10
    )))
}

fn too_old(target: &str, name: &str, (major, minor): (u32, u32)) -> Error {
    Error::Unsupported(format!(
        "the code is for {target}, and {name} has compute capability {major}.{minor}, 8.0 is needed; run with \
         `--backend threads`"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_runs_on_its_device_and_most_code_on_later_ones() {
        for (target, runs, does_not) in [
            (
                "sm_80",
                &[(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)][..],
                &[(7, 5)][..],
            ),
            ("sm_90", &[(9, 0), (10, 0)], &[(8, 0), (8, 9)]),
            ("sm_90a", &[(9, 0)], &[(8, 0), (8, 9), (10, 0), (12, 0)]),
        ] {
            for capability in runs {
                assert!(check_target(target, "a device", *capability).is_ok());
            }
            for capability in does_not {
                let refused = check_target(target, "a device", *capability);
                assert!(refused.is_err(), "{target} on {capability:?}");
            }
        }
    }

    #[test]
    fn refusals_name_both_and_the_way_out() {
        let said = |target, capability| {
            let refused = check_target(target, "NVIDIA B200", capability);
            refused.err().map(|error| error.to_string())
        };
        let expected = "the code is for sm_90a, which runs on compute capability 9.0 alone, and NVIDIA B200 has \
                        10.0; compile it again with `--target cuda:sm_100`";
        assert_eq!(said("sm_90a", (10, 0)).as_deref(), Some(expected));
        let said = said("sm_90a", (8, 0)).unwrap();
        assert!(said.ends_with("`--target cuda:sm_80`"), "{said}");
    }
}
