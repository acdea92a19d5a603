//! Flags that a run takes however its ranks are started.
//!
//! Enters: the command line. Leaves: the flags, and the same as arguments for another process.
//! Invariant: `JobArgs` read from [`JobArgs::to_args`] are equal.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use meshweave_compiler::resolve::Init;
use meshweave_runtime::device::cuda::Precision;

use super::train::parse_init;
use crate::error::Result;

/// Products of f32 on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum GpuPrecision {
    /// Factors and sums of f32; the default.
    F32,
    /// Factors rounded to 10 bits, sums of f32: tensor cores.
    Tf32,
}

#[derive(Clone, Debug, Default, PartialEq, Args)]
pub struct JobArgs {
    /// Steps to run; the document's number by default.
    #[arg(long)]
    pub(super) steps: Option<usize>,
    /// How parameters start: `golden`, `random:SEED`, or a folder with safetensors.
    #[arg(long)]
    pub(super) init: Option<String>,
    /// Text to train on, a token a byte; the document's by default, else the golden model's tokens.
    #[arg(long)]
    pub(super) data: Option<PathBuf>,
    /// Threads of each device; by default the cores divided by the devices.
    #[arg(long)]
    pub(super) threads: Option<usize>,
    /// Give every process a GPU of its own (ranks that are processes only); they exchange by NCCL, or by
    /// MPI where it is missing.
    #[arg(long)]
    pub(super) gpu: bool,
    /// How products of f32 are made by a GPU's library.
    #[arg(long, value_enum)]
    precision: Option<GpuPrecision>,
    /// Seconds without a rank after which a collective fails and says who did not arrive [default: 600].
    #[arg(long, value_parser = positive)]
    pub(super) timeout: Option<f64>,
    /// Write the predicted and the measured timeline here, for Perfetto.
    #[arg(long)]
    pub(super) trace: Option<PathBuf>,
    /// Save parameters and optimizer state here at the end, in one file (safetensors).
    #[arg(long)]
    pub(super) save: Option<PathBuf>,
    /// Keep checkpoints in this folder: one on SIGUSR1, one on SIGTERM, SIGINT or SIGUSR2 before the run
    /// ends, one at the end, and those of --every.
    #[arg(long)]
    pub(super) checkpoint: Option<PathBuf>,
    /// Make a checkpoint every so many steps.
    #[arg(long, requires = "checkpoint", value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) every: Option<u64>,
    /// Checkpoints to keep, the newest ones; 0 keeps all.
    #[arg(long, default_value_t = 2)]
    pub(super) keep: usize,
    /// Go on from a file of --save, a checkpoint, or the newest one in a folder of them, under any plan.
    #[arg(long)]
    pub(super) resume: Option<PathBuf>,
    /// Rehearse a failure: `RANK:STEP:INSTRUCTION:WHAT`, where WHAT is `kill`, `stop`, `slow=SECONDS` or
    /// `diverge`; steps count from 1, and step 0 is before processes join their groups. On GPUs it comes
    /// before the step's first instruction.
    #[arg(long)]
    pub(super) drill: Option<String>,
}

impl JobArgs {
    /// The flags as arguments.
    pub(super) fn to_args(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = Vec::new();
        let mut give = |flag: &str, value: Option<OsString>| {
            if let Some(value) = value {
                args.extend([OsString::from(flag), value]);
            }
        };
        let path = |path: &Option<PathBuf>| path.as_ref().map(OsString::from);
        let number = |number: Option<usize>| number.map(|number| number.to_string().into());
        give("--steps", number(self.steps));
        give("--init", self.init.as_ref().map(OsString::from));
        give("--data", path(&self.data));
        give("--threads", number(self.threads));
        let precision = self
            .precision
            .and_then(|precision| precision.to_possible_value());
        give(
            "--precision",
            precision.map(|value| value.get_name().into()),
        );
        if self.gpu {
            args.push("--gpu".into());
        }
        let mut give = |flag: &str, value: Option<OsString>| {
            if let Some(value) = value {
                args.extend([OsString::from(flag), value]);
            }
        };
        give(
            "--timeout",
            self.timeout.map(|timeout| timeout.to_string().into()),
        );
        give("--trace", path(&self.trace));
        give("--save", path(&self.save));
        give("--checkpoint", path(&self.checkpoint));
        give("--every", self.every.map(|every| every.to_string().into()));
        give("--keep", number(Some(self.keep)));
        give("--resume", path(&self.resume));
        give("--drill", self.drill.as_ref().map(OsString::from));
        args
    }

    /// How parameters start, where the command line says so.
    ///
    /// # Errors
    /// A seed that is no number.
    pub(super) fn init(&self) -> Result<Option<Init>> {
        self.init.as_deref().map(parse_init).transpose()
    }

    /// How products of f32 are made by a GPU's library: in f32 where the command line says nothing.
    pub(super) fn precision(&self) -> Precision {
        match self.precision {
            Some(GpuPrecision::Tf32) => Precision::Tf32,
            Some(GpuPrecision::F32) | None => Precision::F32,
        }
    }

    /// Seconds of patience with other ranks.
    pub(super) fn timeout_s(&self) -> f64 {
        self.timeout.unwrap_or(600.0)
    }
}

fn positive(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= 1e9 => Ok(seconds),
        _ => Err("write a number of seconds above 0".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        job: JobArgs,
    }

    #[test]
    fn flags_survive_the_way_to_another_process() {
        let line = "x --steps 3 --init random:7 --data d --threads 2 --gpu --precision tf32 --timeout 0.5 --trace t --save s \
                    --checkpoint c --every 4 --keep 1 --resume r --drill 1:2:3:kill";
        let Only { job } = Only::parse_from(line.split_whitespace());
        let again = std::iter::once(OsString::from("x")).chain(job.to_args());
        assert_eq!(Only::parse_from(again).job, job);
    }
}
