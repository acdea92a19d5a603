//! Schedules that documents define.
//!
//! Enters: `schedule NAME = …` statements, a shape, ranks of stages. Leaves: a checked schedule, with
//! its communication and memory actions and its queues where they are written.
//! Invariant: the forms give equal schedules where they say the same.

use std::path::Path;

use meshweave_dsl::schedule::{Channels, DeviceStreams, Lowered, Schedule};
use meshweave_dsl::weave::Document;
use meshweave_dsl::weave::ast::{ScheduleBody, ScheduleDef, Statement};

use super::PipelineError;
use super::builtin::{Placement, Shape};
use super::check::check;
use super::deadlock::check_lowered;
use super::keys::from_keys;
use super::place::place;
use super::streams::{check_streams, streams};

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
        ScheduleBody::Rows { rows, .. } => match lowered_definition(definition, folder)? {
            Some((lowered, _)) => lowered.schedule,
            None => Schedule::from_block(&definition.name.node, rows)?,
        },
        ScheduleBody::Streams { .. } => match lowered_definition(definition, folder)? {
            Some((lowered, _)) => lowered.schedule,
            None => return Err(PipelineError::Internal(format!("`{name}` has no queues"))),
        },
        ScheduleBody::Csv(file) => match lowered_definition(definition, folder)? {
            Some((lowered, _)) => lowered.schedule,
            None => Schedule::from_csv(name, &text_of(folder, file)?)?,
        },
    };
    check(&schedule)?;
    match ranks {
        [] => Ok(schedule),
        ranks => place(&schedule, ranks),
    }
}

/// The schedule of a definition that holds communication and memory actions, as it stands, and the
/// queues of its devices: those that it gives, or those that follow. None for a definition of compute
/// actions only.
///
/// # Errors
/// [`PipelineError::Invalid`] when a file cannot be read, and when the order, the commands or the
/// queues do not pass the checks.
pub fn lowered_definition(
    definition: &ScheduleDef,
    folder: &Path,
) -> Result<Option<(Lowered, Vec<DeviceStreams>)>, PipelineError> {
    let name = &definition.name.node;
    let (lowered, devices) = match &definition.body {
        ScheduleBody::Key(_) => return Ok(None),
        ScheduleBody::Rows { channels, rows } => {
            let channels = channels.unwrap_or_default();
            let Some(lowered) = Lowered::from_block(name, rows, channels)? else {
                return Ok(None);
            };
            (lowered, None)
        }
        ScheduleBody::Streams { channels, streams } => {
            let channels = channels.unwrap_or_default();
            let (lowered, devices) = Lowered::from_streams(name, streams, channels)?;
            (lowered, Some(devices))
        }
        ScheduleBody::Csv(file) => {
            let text = text_of(folder, file)?;
            if !Lowered::is_csv(&text) {
                return Ok(None);
            }
            (
                Lowered::from_csv(name.as_str(), &text, Channels::default())?,
                None,
            )
        }
    };
    check(&lowered.schedule)?;
    check_lowered(&lowered)?;
    if let Some(devices) = &devices {
        check_streams(&lowered, devices)?;
    }
    let devices = devices.unwrap_or_else(|| streams(&lowered));
    Ok(Some((lowered, devices)))
}

fn text_of(folder: &Path, file: &str) -> Result<String, PipelineError> {
    let path = folder.join(file);
    std::fs::read_to_string(&path)
        .map_err(|error| PipelineError::Invalid(format!("cannot read {}: {error}", path.display())))
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
