//! The check at the start of a job of several processes: that all are about to run the same.
//!
//! In: what each process holds, as named values, or why it holds nothing. Out: which host each rank is
//! on, or one error that lists who differs from rank 0, and in what.
//! Invariant: every process comes to the same verdict, since all judge the same texts.

use std::collections::BTreeMap;

use meshweave_dsl::dtype::DType;
use meshweave_dsl::graph::Role;
use meshweave_dsl::layout::Mesh;
use meshweave_dsl::program::Program;
use serde::{Deserialize, Serialize};

use crate::collective::{Communicator, exchange_texts};
use crate::error::{Error, Result};

/// What a process brings to the start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    pub host: String,
    /// Values by their names, which must be the same on all; or what went wrong here.
    pub holds: std::result::Result<Vec<(String, String)>, String>,
}

/// The ranks of a job that may start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roster {
    /// The host of each rank.
    pub hosts: Vec<String>,
}

/// What tells a program from another, besides its file.
pub fn describe(program: &Program) -> Vec<(String, String)> {
    let axes = program.mesh.axes().iter();
    let axes: Vec<String> = axes
        .map(|(axis, degree)| format!("{axis}:{degree}"))
        .collect();
    let params = program
        .sources
        .iter()
        .filter(|source| matches!(source.role, Role::Param(_)));
    let mut dtypes: Vec<DType> = params.map(|source| source.ty.dtype).collect();
    dtypes.sort_unstable_by_key(|dtype| dtype.to_string());
    dtypes.dedup();
    let dtypes: Vec<String> = dtypes.iter().map(DType::to_string).collect();
    vec![
        ("mesh".into(), axes.join(" > ")),
        ("number of ranks".into(), program.ranks.len().to_string()),
        ("dtype".into(), dtypes.join(", ")),
    ]
}

/// Compares all processes' tickets; all call this together.
///
/// # Errors
/// `Invalid` when one holds nothing or something else; those of the exchange.
pub fn meet(communicator: &mut dyn Communicator, ticket: &Ticket) -> Result<Roster> {
    let text = serde_json::to_string(ticket)
        .map_err(|error| Error::Internal(format!("a ticket cannot be written: {error}")))?;
    let texts = exchange_texts(communicator, &text)?;
    let mut tickets = Vec::with_capacity(texts.len());
    for (rank, text) in texts.iter().enumerate() {
        let ticket: Ticket = serde_json::from_str(text).map_err(|error| {
            Error::Invalid(format!(
                "rank {rank} says what this meshweave does not understand ({error}); run the same \
                 version on all hosts"
            ))
        })?;
        tickets.push(ticket);
    }
    compare(&tickets)
}

fn compare(tickets: &[Ticket]) -> Result<Roster> {
    let mut findings = Vec::new();
    let mut expected: Option<(usize, &Vec<(String, String)>)> = None;
    for (rank, ticket) in tickets.iter().enumerate() {
        let host = &ticket.host;
        match (&ticket.holds, expected) {
            (Err(error), _) => findings.push(format!("rank {rank} on {host}: {error}")),
            (Ok(values), None) => expected = Some((rank, values)),
            (Ok(values), Some((first, expected))) => {
                let known: BTreeMap<&String, &String> =
                    values.iter().map(|(name, value)| (name, value)).collect();
                for (name, value) in expected {
                    let own = known.get(name).map_or("nothing", |own| own.as_str());
                    if own != value {
                        findings.push(format!(
                            "rank {rank} on {host}: {name} is {own}, on rank {first} it is {value}"
                        ));
                    }
                }
            }
        }
    }
    if findings.is_empty() {
        let hosts = tickets.iter().map(|ticket| ticket.host.clone());
        return Ok(Roster {
            hosts: hosts.collect(),
        });
    }
    Err(Error::Invalid(format!(
        "the processes do not agree on what to run:\n  {}\ngive all hosts the same artifact and the same \
         meshweave",
        findings.join("\n  ")
    )))
}

impl Roster {
    /// The hosts with their ranks, in order of their first ranks.
    pub fn by_host(&self) -> Vec<(&str, Vec<usize>)> {
        let mut hosts: Vec<(&str, Vec<usize>)> = Vec::new();
        for (rank, host) in self.hosts.iter().enumerate() {
            match hosts.iter_mut().find(|(name, _)| name == host) {
                Some((_, ranks)) => ranks.push(rank),
                None => hosts.push((host, vec![rank])),
            }
        }
        hosts
    }

    /// The axes of a mesh along which some group has members on several hosts.
    pub fn axes_across_hosts(&self, mesh: &Mesh) -> Vec<String> {
        let across = mesh.axes().iter().filter(|(axis, _)| {
            (0..self.hosts.len()).any(|rank| {
                let group = mesh.group(rank, std::slice::from_ref(axis));
                group
                    .iter()
                    .any(|member| self.hosts.get(*member) != self.hosts.get(rank))
            })
        });
        across.map(|(axis, _)| axis.to_string()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket(host: &str, hash: &str) -> Ticket {
        let holds = vec![
            ("hash".to_string(), hash.to_string()),
            ("mesh".into(), "dp:4".into()),
        ];
        Ticket {
            host: host.into(),
            holds: Ok(holds),
        }
    }

    #[test]
    fn who_differs_is_named() {
        let mut tickets = vec![
            ticket("a", "12"),
            ticket("a", "12"),
            ticket("b", "12"),
            ticket("b", "12"),
        ];
        let roster = compare(&tickets).unwrap();
        assert_eq!(roster.by_host(), [("a", vec![0, 1]), ("b", vec![2, 3])]);
        let mesh = Mesh::new([("dp", 2), ("tp", 2)]);
        assert_eq!(roster.axes_across_hosts(&mesh), ["dp"]);

        tickets[2] = ticket("b", "34");
        tickets[3].holds = Err("there is no artifact out".into());
        insta::assert_snapshot!(compare(&tickets).unwrap_err(), @r"
        the processes do not agree on what to run:
          rank 2 on b: hash is 34, on rank 0 it is 12
          rank 3 on b: there is no artifact out
        give all hosts the same artifact and the same meshweave
        ");
    }
}
