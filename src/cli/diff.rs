//! `meshweave diff`.

use std::path::PathBuf;

use clap::Args;
use meshweave_compiler::plan::outer::compare::differences;
use serde_json::json;

use super::Format;
use super::render::{bytes, seconds};
use crate::cli::output::outln;
use crate::error::Result;
use crate::mapping::Mapped;
use crate::session::Session;

#[derive(Debug, Args)]
pub struct DiffArgs {
    /// A plan, or a document that is planned first.
    first: PathBuf,
    /// Another one.
    second: PathBuf,
}

/// Says in which choices two plans differ, and what each is predicted to take.
///
/// # Errors
/// Documents that have no mapping.
pub fn diff(args: &DiffArgs, format: Format) -> Result<()> {
    let open = |path: &PathBuf| -> Result<Mapped> { Session::open(path, None)?.mapping() };
    let (first, second) = (open(&args.first)?, open(&args.second)?);
    let differences = differences(&first.mapping, &second.mapping);
    match format {
        Format::Text => {
            let row = |name: &str, one: &str, other: &str| outln!("{name:<20} {one:<24} {other}");
            row(
                "",
                &args.first.display().to_string(),
                &args.second.display().to_string(),
            );
            row(
                "step (predicted)",
                &seconds(first.estimate.step_s),
                &format!(
                    "{} ({:+.1} %)",
                    seconds(second.estimate.step_s),
                    100.0 * (second.estimate.step_s / first.estimate.step_s - 1.0)
                ),
            );
            let memory = |mapped: &Mapped| bytes(mapped.estimate.memory.total().0 as f64);
            row("memory (predicted)", &memory(&first), &memory(&second));
            for (name, one, other) in first.parts_beside(&second) {
                row(&format!("  {name}"), &seconds(one), &seconds(other));
            }
            for item in &differences {
                row(&item.choice, &item.first, &item.second);
            }
            if differences.is_empty() {
                outln!("both make the same choices");
            }
        }
        Format::Json => outln!(
            "{}",
            json!({
                "first": {"mapping": first.mapping, "predicted_s": first.estimate.step_s},
                "second": {"mapping": second.mapping, "predicted_s": second.estimate.step_s},
                "differences": differences,
            })
        ),
    }
    Ok(())
}
