//! One cell of a schedule: what is done, in which stage, for which microbatch.
//!
//! Enters: text such as `2F0`. Leaves: [`Action`]s, ordered by stage, kind and microbatch.
//! Invariant: `parse(print(action)) == action`, and nothing but a whole action parses.

use std::fmt;

use serde::{Deserialize, Serialize};

/// `2F0`: stage 2, forward, microbatch 0. `2F0s1`: sequence slice 1 of that microbatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Action {
    pub stage: u32,
    pub kind: ActionKind,
    pub microbatch: u32,
    /// The part of the sequence, from 0; always 0 unless the schedule divides sequences.
    pub slice: u32,
}

impl Action {
    /// The action on a whole microbatch.
    pub fn new(stage: u32, kind: ActionKind, microbatch: u32) -> Self {
        Self {
            stage,
            kind,
            microbatch,
            slice: 0,
        }
    }

    /// Reads `2F0` or `2F0s1`; nothing may follow.
    pub fn parse(text: &str) -> Option<Action> {
        let at = text.find(|c: char| !c.is_ascii_digit())?;
        let (stage, rest) = text.split_at(at);
        let kind = ActionKind::parse(rest.get(..1)?)?;
        let (microbatch, slice) = match rest.get(1..)?.split_once('s') {
            Some((microbatch, slice)) => (microbatch, number(slice).filter(|slice| *slice > 0)?),
            None => (rest.get(1..)?, 0),
        };
        Some(Action {
            stage: number(stage)?,
            kind,
            microbatch: number(microbatch)?,
            slice,
        })
    }

    /// The same microbatch and slice, done otherwise.
    #[must_use]
    pub fn with_kind(self, kind: ActionKind) -> Self {
        Self { kind, ..self }
    }

    /// The same work in another stage.
    #[must_use]
    pub fn at_stage(self, stage: u32) -> Self {
        Self { stage, ..self }
    }
}

/// A number written in digits only: no sign, no blank.
pub(super) fn number(text: &str) -> Option<u32> {
    let is_digits = !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
    text.parse().ok().filter(|_| is_digits)
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}{}", self.stage, self.kind, self.microbatch)?;
        match self.slice {
            0 => Ok(()),
            slice => write!(f, "s{slice}"),
        }
    }
}

impl TryFrom<String> for Action {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("`{text}` is no action such as `2F0`"))
    }
}

impl From<Action> for String {
    fn from(action: Action) -> Self {
        action.to_string()
    }
}

/// What is done for one microbatch in one stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ActionKind {
    /// Forward.
    F,
    /// Full backward.
    B,
    /// Gradient of the input.
    I,
    /// Gradient of the weights.
    W,
    /// Recompute.
    R,
}

impl ActionKind {
    /// All kinds.
    pub const ALL: [Self; 5] = [Self::F, Self::B, Self::I, Self::W, Self::R];

    /// The letter.
    pub fn text(self) -> &'static str {
        match self {
            Self::F => "F",
            Self::B => "B",
            Self::I => "I",
            Self::W => "W",
            Self::R => "R",
        }
    }

    /// The kind of that letter.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.text() == text)
    }

    /// Whether it produces the gradient of the stage's input, which the stage before waits for.
    pub fn gives_input_gradient(self) -> bool {
        matches!(self, Self::B | Self::I)
    }

    /// Whether it produces the gradient of the stage's weights.
    pub fn gives_weight_gradient(self) -> bool {
        matches!(self, Self::B | Self::W)
    }
}

impl fmt::Display for ActionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_print_and_parse() {
        for text in ["2F0", "0B17", "13I2", "4W3s2", "0R0"] {
            assert_eq!(Action::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn nothing_but_an_action_parses() {
        for text in [
            "",
            "F",
            "2F",
            "F0",
            "2F0xyz",
            "2F0 ",
            " 2F0",
            "+2F0",
            "2F+0",
            "2F0s",
            "2F0s0",
            "2G0",
            "2f0",
            "2F4294967296",
            "2F0s1s2",
            "-1F0",
        ] {
            assert_eq!(Action::parse(text), None, "{text}");
        }
    }
}
