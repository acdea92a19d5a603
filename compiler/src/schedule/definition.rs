//! Schedules that documents define.
//!
//! Enters: `schedule NAME = …` statements, a shape, ranks of stages. Leaves: a checked schedule.
//! Invariant: the three forms give equal schedules where they say the same.

use std::path::Path;

use meshweave_dsl::schedule::Schedule;
use meshweave_dsl::weave::Document;
use meshweave_dsl::weave::ast::{ScheduleBody, ScheduleDef, Statement};

use super::PipelineError;
use super::builtin::{Placement, Shape};
use super::check::check;
use super::keys::from_keys;
use super::place::place;

/// The schedules that a document defines, in order.
pub fn definitions(document: &Document) -> impl Iterator<Item = &ScheduleDef> {
    document
        .statements()
        .filter_map(|statement| match &statement.node {
            Statement::Schedule(definition) => Some(definition),
            _ => None,
        })
}

/// The schedule of one definition, with stage `s` on rank `ranks[s]` where any are given; CSV files
/// are looked up from `folder`.
///
/// # Errors
/// [`PipelineError::Invalid`] when a file cannot be read, when the order does not pass the checks, and
/// as [`place`].
pub fn from_definition(
    definition: &ScheduleDef,
    shape: &Shape,
    ranks: &[usize],
    folder: &Path,
) -> Result<Schedule, PipelineError> {
    let name = definition.name.node.as_str();
    let schedule = match &definition.body {
        // Keys take the shape; where nothing is said, several chunks a rank lie in a loop.
        ScheduleBody::Key(keys) => {
            let placement = match ranks {
                [] => Placement::Loop,
                ranks => Placement::Explicit(ranks.to_vec()),
            };
            return from_keys(name, keys, shape, &placement);
        }
        ScheduleBody::Rows(rows) => Schedule::from_block(&definition.name.node, rows)?,
        ScheduleBody::Csv(file) => {
            let path = folder.join(&file.node);
            let text = std::fs::read_to_string(&path).map_err(|error| {
                PipelineError::Invalid(format!("cannot read {}: {error}", path.display()))
            })?;
            Schedule::from_csv(name, &text)?
        }
    };
    check(&schedule)?;
    match ranks {
        [] => Ok(schedule),
        ranks => place(&schedule, ranks),
    }
}

#[cfg(test)]
mod tests {
    use meshweave_dsl::diagnostics::SourceId;

    use super::super::builtin::{Builtin, build};
    use super::*;

    #[test]
    fn keys_rows_and_files_are_schedules() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("order.csv"), "0F0,0B0\n1F0,1B0\n").unwrap();
        let text = "schedule mine = key F:(mb,0) B:(mb+P-r,-1)\n\
                    schedule wave = key F:(0,mb,s) B:(1,mb,-s)\n\
                    schedule fixed = rows {\n  row 0F0 0F1 . 0B0 0B1\n  row . 1F0 1B0 1F1 1B1\n}\n\
                    schedule file = csv \"order.csv\"\n\
                    schedule none = csv \"nowhere.csv\"\n";
        let document = meshweave_dsl::weave::parse(text, SourceId(0)).document;
        let find = |name: &str, ranks: &[usize]| {
            let mut all = definitions(&document);
            let definition = all.find(|one| one.name.node.as_str() == name).unwrap();
            from_definition(definition, &Shape::new(2, 2), ranks, folder.path())
        };
        let built = build(Builtin::OneFOneB, &Shape::new(2, 2), None).unwrap();
        assert_eq!(find("mine", &[]).unwrap().rows, built.rows);
        assert_eq!(find("fixed", &[]).unwrap().rows, built.rows);
        assert_eq!(find("file", &[]).unwrap().n_microbatches, 1);
        let placed = find("fixed", &[1, 0]).unwrap();
        assert_eq!(placed.rows[1], built.rows[0]);
        // Keys take any ranks: three stages on two.
        assert_eq!(find("wave", &[0, 1, 0]).unwrap().n_stages, 3);
        let refuse = |name: &str, ranks: &[usize]| find(name, ranks).unwrap_err().to_string();
        assert!(refuse("none", &[]).starts_with("cannot read "));
        assert_eq!(
            refuse("mine", &[0, 0]),
            "schedule `mine` leaves rank 1 of 2 without a stage; place one there, or take fewer ranks"
        );
    }
}
