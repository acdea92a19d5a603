//! Schedules that documents define or name.
//!
//! Enters: `schedule NAME = …` statements, a name, a shape. Leaves: a checked schedule.
//! Invariant: a document's own definition goes before a built-in schedule of the same name.

use std::path::Path;

use meshweave_dsl::schedule::Schedule;
use meshweave_dsl::weave::Document;
use meshweave_dsl::weave::ast::{ScheduleBody, ScheduleDef, Statement};

use super::PipelineError;
use super::builtin::{Builtin, Placement, Shape, build};
use super::check::check;
use super::keys::from_keys;
use super::simulate::Costs;

/// The schedules that a document defines, in order.
pub fn definitions(document: &Document) -> impl Iterator<Item = &ScheduleDef> {
    document
        .statements()
        .filter_map(|statement| match &statement.node {
            Statement::Schedule(definition) => Some(definition),
            _ => None,
        })
}

/// The schedule of one definition; CSV files are looked up from `folder`.
///
/// # Errors
/// [`PipelineError::Invalid`] when a file cannot be read, when rows are not those of `shape`, or when
/// the order does not pass the checks.
pub fn from_definition(
    definition: &ScheduleDef,
    shape: &Shape,
    folder: &Path,
) -> Result<Schedule, PipelineError> {
    let name = definition.name.node.as_str();
    let schedule = match &definition.body {
        // Keys take the shape; several chunks a rank lie in a loop.
        ScheduleBody::Key(keys) => return from_keys(name, keys, shape, &Placement::Loop),
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
    Ok(schedule)
}

/// The schedule that `pipeline { schedule NAME }` means: one that the document defines, else the
/// built-in one, fitted to `costs`.
///
/// # Errors
/// [`PipelineError::Invalid`] when there is none of that name, when rows have other ranks or
/// microbatches than `shape`, and as [`from_definition`] and [`build`].
pub fn named(
    name: &str,
    document: &Document,
    shape: &Shape,
    costs: Option<&Costs>,
    folder: &Path,
) -> Result<Schedule, PipelineError> {
    let defined = definitions(document).find(|definition| definition.name.node.as_str() == name);
    let Some(definition) = defined else {
        let builtin = Builtin::find(name).ok_or_else(|| {
            let names = Builtin::ALL.map(Builtin::name).join(", ");
            PipelineError::Invalid(format!(
                "there is no schedule `{name}`; define it by `schedule {name} = …` or take one of {names}"
            ))
        })?;
        return build(builtin, &builtin.fit(*shape), costs);
    };
    let schedule = from_definition(definition, shape, folder)?;
    let counts = [
        ("ranks", schedule.n_ranks, shape.n_ranks),
        (
            "microbatches",
            schedule.n_microbatches,
            shape.n_microbatches,
        ),
    ];
    match counts.iter().find(|(_, has, wanted)| has != wanted) {
        Some((what, has, wanted)) => Err(PipelineError::Invalid(format!(
            "schedule `{name}` has {has} {what} and the pipeline has {wanted}; change one of them"
        ))),
        None => Ok(schedule),
    }
}

#[cfg(test)]
mod tests {
    use meshweave_dsl::diagnostics::SourceId;

    use super::*;

    #[test]
    fn names_are_defined_or_built_in() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("order.csv"), "0F0,0B0\n1F0,1B0\n").unwrap();
        let text = "schedule mine = key F:(mb,0) B:(mb+P-r,-1)\n\
                    schedule fixed = rows {\n  row 0F0 0F1 . 0B0 0B1\n  row . 1F0 1B0 1F1 1B1\n}\n\
                    schedule file = csv \"order.csv\"\n\
                    schedule none = csv \"nowhere.csv\"\n";
        let document = meshweave_dsl::weave::parse(text, SourceId(0)).document;
        let find = |name: &str, shape: Shape| named(name, &document, &shape, None, folder.path());
        let built = find("1f1b", Shape::new(2, 2)).unwrap();
        assert_eq!(find("mine", Shape::new(2, 2)).unwrap().rows, built.rows);
        assert_eq!(find("fixed", Shape::new(2, 2)).unwrap().rows, built.rows);
        assert_eq!(find("file", Shape::new(2, 1)).unwrap().n_microbatches, 1);
        assert_eq!(find("zb-v", Shape::new(2, 2)).unwrap().n_stages, 4);
        let refuse = |name: &str| find(name, Shape::new(2, 4)).unwrap_err().to_string();
        assert!(
            refuse("fixed")
                .starts_with("schedule `fixed` has 2 microbatches and the pipeline has 4")
        );
        assert!(refuse("2f2b").starts_with("there is no schedule `2f2b`"));
        assert!(refuse("none").starts_with("cannot read "));
    }
}
