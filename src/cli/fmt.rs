//! `meshweave fmt`.

use std::io::Read;
use std::path::{Path, PathBuf};

use clap::Args;
use meshweave_dsl::diagnostics::{Class, Severity, Sources};
use meshweave_dsl::weave;
use serde_json::json;

use super::{Format, write_atomically};
use crate::cli::output::{out, outln};
use crate::error::{Error, Result};

#[derive(Debug, Args)]
pub struct FmtArgs {
    /// The documents; `-` reads standard input and writes standard output.
    #[arg(required = true)]
    documents: Vec<PathBuf>,
    /// Write nothing; fail when a document is not formatted.
    #[arg(long)]
    check: bool,
}

/// Formats documents in place. A document with syntax errors is left as it is.
pub fn fmt(args: &FmtArgs, format: Format) -> Result<()> {
    let mut changed = Vec::new();
    for path in &args.documents {
        let from_stdin = path == Path::new("-");
        let text = read(path, from_stdin)?;
        let mut sources = Sources::new();
        let id = sources.add(path.display().to_string(), text.as_str());
        let parsed = weave::parse(&text, id);
        if parsed
            .diagnostics
            .iter()
            .any(|diagnostic| diagnostic.severity == Severity::Error)
        {
            return Err(Error::new(parsed.diagnostics, sources));
        }
        let formatted = weave::print(&parsed.document);
        if from_stdin && !args.check {
            out!("{formatted}");
        } else if formatted != text {
            changed.push(path.clone());
            if !args.check {
                write_atomically(path, formatted.as_bytes())?;
            }
        }
    }
    if args.check && !changed.is_empty() {
        let names: Vec<String> = changed
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        return Err(Error::plain(
            Class::Invalid,
            format!("not formatted: {}", names.join(", ")),
        )
        .help("run `meshweave fmt` on them"));
    }
    match format {
        Format::Text => changed
            .iter()
            .for_each(|path| eprintln!("formatted {}", path.display())),
        Format::Json => outln!("{}", json!({"formatted": changed})),
    }
    Ok(())
}

fn read(path: &Path, from_stdin: bool) -> Result<String> {
    let text = if from_stdin {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(path)
    };
    text.map_err(|error| {
        Error::plain(
            Class::Invalid,
            format!("cannot read {}: {error}", path.display()),
        )
    })
}
