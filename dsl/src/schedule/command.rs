//! The second level: compute actions with communication and memory actions between them.
//!
//! Enters: text such as `1SEND_F0`, or the lowering of a [`Schedule`]. Leaves: [`Lowered`] rows.
//! Invariant: `parse(print(command)) == command`. Spelling of communication as in
//! `torch/distributed/pipelining/schedules.py`; `OFFLOAD`, `PREFETCH`, `BARRIER` and `UPDATE` are ours.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::action::number;
use super::{Action, ActionKind, Schedule};

/// What travels between stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Wire {
    /// Activations, to the stage after.
    F,
    /// Gradients of activations, to the stage before.
    B,
}

/// What a command does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Verb {
    Compute(ActionKind),
    /// Sends the stage's result for a microbatch.
    Send(Wire),
    /// Receives the stage's operand for a microbatch.
    Recv(Wire),
    /// Gathers the stage's weights (ZeRO-3), and frees them again.
    Unshard,
    Reshard,
    /// Reduces the stage's accumulated gradients over data parallelism, and over copies.
    ReduceGrad,
    /// Moves a microbatch's activations to the host, and back.
    Offload,
    Prefetch,
    /// Waits for all ranks: global gradient norm, checks for NaN.
    Barrier,
    /// Updates the stage's weights.
    Update,
}

/// Verbs by spelling; the longer of two that begin alike first.
const VERBS: [(&str, Verb); 16] = [
    ("SEND_F", Verb::Send(Wire::F)),
    ("SEND_B", Verb::Send(Wire::B)),
    ("RECV_F", Verb::Recv(Wire::F)),
    ("RECV_B", Verb::Recv(Wire::B)),
    ("UNSHARD", Verb::Unshard),
    ("RESHARD", Verb::Reshard),
    ("REDUCE_GRAD", Verb::ReduceGrad),
    ("OFFLOAD", Verb::Offload),
    ("PREFETCH", Verb::Prefetch),
    ("BARRIER", Verb::Barrier),
    ("UPDATE", Verb::Update),
    ("F", Verb::Compute(ActionKind::F)),
    ("B", Verb::Compute(ActionKind::B)),
    ("I", Verb::Compute(ActionKind::I)),
    ("W", Verb::Compute(ActionKind::W)),
    ("R", Verb::Compute(ActionKind::R)),
];

impl Verb {
    /// The spelling.
    pub fn text(self) -> &'static str {
        let entry = VERBS.iter().find(|(_, verb)| *verb == self);
        entry.map_or("", |(text, _)| text)
    }

    /// Whether it concerns one microbatch rather than the whole stage.
    pub fn is_of_microbatch(self) -> bool {
        match self {
            Self::Compute(_) | Self::Send(_) | Self::Recv(_) | Self::Offload | Self::Prefetch => {
                true
            }
            // An update is of a microbatch where updates are asynchronous, else of the stage.
            Self::Unshard | Self::Reshard | Self::ReduceGrad | Self::Barrier | Self::Update => {
                false
            }
        }
    }

    /// Whether all ranks of a group take part, so that the order must agree between them.
    pub fn is_collective(self) -> bool {
        matches!(
            self,
            Self::Unshard | Self::Reshard | Self::ReduceGrad | Self::Barrier
        )
    }
}

/// `1SEND_F0`: stage 1 sends its output for microbatch 0. `2UNSHARD`: of the whole stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Command {
    pub stage: u32,
    pub verb: Verb,
    /// Absent where the command is of the whole stage.
    pub microbatch: Option<u32>,
    pub slice: u32,
}

impl Command {
    /// A command on the whole stage.
    pub fn of_stage(stage: u32, verb: Verb) -> Self {
        Self {
            stage,
            verb,
            microbatch: None,
            slice: 0,
        }
    }

    /// A command on what `action` works on.
    pub fn beside(action: Action, verb: Verb) -> Self {
        Self {
            stage: action.stage,
            verb,
            microbatch: Some(action.microbatch),
            slice: action.slice,
        }
    }

    /// The compute action, if it is one.
    pub fn action(self) -> Option<Action> {
        match (self.verb, self.microbatch) {
            (Verb::Compute(kind), Some(microbatch)) => Some(Action {
                stage: self.stage,
                kind,
                microbatch,
                slice: self.slice,
            }),
            _ => None,
        }
    }

    /// Reads `1SEND_F0`, `2UNSHARD`, `2F0s1`; nothing may follow.
    pub fn parse(text: &str) -> Option<Self> {
        let at = text.find(|c: char| !c.is_ascii_digit())?;
        let (stage, rest) = text.split_at(at);
        let (spelling, verb) = VERBS
            .iter()
            .find(|(spelling, _)| rest.starts_with(spelling))?;
        let rest = &rest[spelling.len()..];
        let (microbatch, slice) = match rest.split_once('s') {
            Some((microbatch, slice)) => (
                Some(number(microbatch)?),
                number(slice).filter(|slice| *slice > 0)?,
            ),
            None if rest.is_empty() => (None, 0),
            None => (Some(number(rest)?), 0),
        };
        let needs = verb.is_of_microbatch();
        let fits = microbatch.is_some() == needs || *verb == Verb::Update;
        fits.then_some(Self {
            stage: number(stage)?,
            verb: *verb,
            microbatch,
            slice,
        })
    }
}

impl From<Action> for Command {
    fn from(action: Action) -> Self {
        Self::beside(action, Verb::Compute(action.kind))
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.stage, self.verb.text())?;
        if let Some(microbatch) = self.microbatch {
            write!(f, "{microbatch}")?;
        }
        match self.slice {
            0 => Ok(()),
            slice => write!(f, "s{slice}"),
        }
    }
}

impl TryFrom<String> for Command {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("`{text}` is no command such as `1SEND_F0`"))
    }
}

impl From<Command> for String {
    fn from(command: Command) -> Self {
        command.to_string()
    }
}

/// How ranks are connected: which messages wait for each other.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Channels {
    /// A rank does one thing at a time; a send returns when it is received.
    Blocking,
    /// Beside computation, one queue for both directions of every pair of ranks; its messages pass
    /// one at a time, in the order in which both ranks name them.
    PerPair,
    /// Beside computation, one queue for each direction of every pair of ranks.
    #[default]
    PerDirection,
    /// As [`Channels::PerDirection`], but up to so many messages wait in the queue: a send returns
    /// when there is room.
    Buffered(usize),
}

impl Channels {
    /// Reads `blocking`, `pair`, `direction`, or the depth of the buffers.
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "blocking" => Self::Blocking,
            "pair" => Self::PerPair,
            "direction" => Self::PerDirection,
            depth => Self::Buffered(number(depth).filter(|depth| *depth > 0)? as usize),
        })
    }
}

impl fmt::Display for Channels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blocking => f.write_str("blocking"),
            Self::PerPair => f.write_str("pair"),
            Self::PerDirection => f.write_str("direction"),
            Self::Buffered(depth) => depth.fmt(f),
        }
    }
}

/// A schedule with its communication and memory actions in place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lowered {
    pub schedule: Schedule,
    pub channels: Channels,
    /// What each rank does, in order.
    pub rows: Vec<Vec<Command>>,
}

impl Lowered {
    /// The rank on the other end of a send or receive: `None` for other commands, and where the
    /// stage has no neighbor on that side.
    pub fn peer(&self, command: Command) -> Option<usize> {
        let stage = match command.verb {
            Verb::Send(Wire::F) | Verb::Recv(Wire::B) => self.schedule.stage_after(command.stage),
            Verb::Send(Wire::B) | Verb::Recv(Wire::F) => self.schedule.stage_before(command.stage),
            _ => None,
        };
        self.schedule.stage_rank.get(stage? as usize).copied()
    }

    /// The CSV form with communication: PyTorch's `compute_comms`.
    pub fn to_csv(&self) -> String {
        let line = |row: &Vec<Command>| {
            let cells: Vec<String> = row.iter().map(Command::to_string).collect();
            cells.join(",") + "\n"
        };
        self.rows.iter().map(line).collect()
    }

    /// The step × rank grid with marked cells (rank, step).
    pub fn grid(&self, marks: &[(usize, usize)]) -> String {
        let text = |row: &Vec<Command>| row.iter().map(Command::to_string).collect();
        super::grid(&self.rows.iter().map(text).collect::<Vec<_>>(), marks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_print_and_parse() {
        for text in [
            "1SEND_F0",
            "0RECV_B12",
            "2UNSHARD",
            "2REDUCE_GRAD",
            "0UPDATE",
            "0UPDATE3",
            "4F1s2",
        ] {
            assert_eq!(Command::parse(text).unwrap().to_string(), text);
        }
        for text in [
            "1SEND_F",
            "2UNSHARD1",
            "2SEND",
            "2F0xyz",
            "SEND_F0",
            "1SEND_F0 ",
        ] {
            assert_eq!(Command::parse(text), None, "{text}");
        }
    }
}
