//! Plans models whose mappings were published, and sets the plans beside them.
//!
//! `cargo run --no-default-features --example rediscover` prints the table of `docs/plans.md`; with
//! `--write` it puts it there.

use std::path::Path;
use std::process::ExitCode;

use meshweave::compiler::plan::estimate::{Estimate, estimate};
use meshweave::compiler::plan::outer::{Options, Space, compare::differences, search};
use meshweave::compiler::validate::{Case, Row, Table};
use meshweave::dsl::mapping::Mapping;
use meshweave::mapping::parts;

/// Between these lines of the page the table stands.
const BEGIN: &str = "<!-- rediscovered: begin -->";
const END: &str = "<!-- rediscovered: end -->";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("examples/data/published-mappings.csv");
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let table = Table::parse(&text);
    let mut lines = vec![
        "| model | devices | published mapping | measured s | predicted s | plan | predicted s | bound s | why it differs |".to_owned(),
        "|---|---|---|---|---|---|---|---|---|".to_owned(),
    ];
    for row in table.rows() {
        let line = line(row)?;
        eprintln!("{line}");
        lines.push(line);
    }
    let table = lines.join("\n");
    if std::env::args().any(|arg| arg == "--write") {
        let page = root.join("docs/plans.md");
        let old = std::fs::read_to_string(&page).map_err(|e| e.to_string())?;
        let (Some(begin), Some(end)) = (old.find(BEGIN), old.find(END)) else {
            return Err(format!("{} has no place for the table", page.display()));
        };
        let new = format!("{}{BEGIN}\n{table}\n{}", &old[..begin], &old[end..]);
        std::fs::write(&page, new).map_err(|e| e.to_string())?;
    } else {
        println!("{table}");
    }
    Ok(())
}

/// One model: its published mapping and ours.
fn line(row: Row<'_>) -> Result<String, String> {
    let name = row.text_or_blank("model");
    let case = Case::read(row).map_err(|error| format!("{name}: {error}"))?;
    let measured = row.number("step_time_s");
    let published = case.estimate(1.0);
    // The same model, batch, devices, software and number format; everything else is open.
    let precision = case.mappings.first().map(|mapping| mapping.precision);
    let mut space = Space::everything(&case.workload, &case.cluster);
    space.precisions = precision.into_iter().collect();
    let options = Options {
        gap: 0.01,
        ..Options::default()
    };
    let found = search(&case.workload, &case.cluster, &space, &options)
        .map_err(|error| format!("{name}: {error}"))?;
    let (theirs, theirs_s, why) = match &published {
        Ok((mapping, priced)) => (
            mapping.to_string(),
            format!("{:.2}", priced.step_s),
            why(
                &case,
                (mapping, priced),
                (&found.best.mapping, &found.best.estimate),
            ),
        ),
        Err(reason) => (String::new(), format!("({reason})"), String::new()),
    };
    Ok(format!(
        "| {name} | {} | {theirs} | {} | {theirs_s} | {} | {:.2} | {:.2} | {why} |",
        case.cluster.n_devices(),
        measured.map_or_else(String::new, |seconds| format!("{seconds:.2}")),
        found.best.mapping,
        found.certificate.predicted_s,
        found.certificate.lower_bound_s,
    ))
}

/// The parts of the step that the plan saves, and the choices that save them.
fn why(case: &Case, published: (&Mapping, &Estimate), ours: (&Mapping, &Estimate)) -> String {
    let different = differences(published.0, ours.0);
    if different.is_empty() {
        return "the same".into();
    }
    let mut saved: Vec<(&str, f64)> = parts(published.1)
        .into_iter()
        .zip(parts(ours.1))
        .map(|((name, theirs), (_, own))| (name, theirs - own))
        .collect();
    saved.sort_by(|a, b| b.1.abs().total_cmp(&a.1.abs()));
    let total = published.1.step_s;
    let texts: Vec<String> = saved
        .iter()
        .take(4)
        .filter(|(_, seconds)| seconds.abs() > 0.005 * total)
        .map(|(name, seconds)| format!("{name} {:+.1} %", -100.0 * seconds / total))
        .collect();
    let limit = case.cluster.device.memory_bytes as f64;
    let theirs = published.1.memory.total().0 as f64 / limit;
    let own = estimate(&case.workload, ours.0, &case.cluster)
        .map_or(0.0, |found| found.memory.total().0 as f64 / limit);
    format!(
        "{}; memory {:.0} % → {:.0} %",
        texts.join(", "),
        100.0 * theirs,
        100.0 * own
    )
}
