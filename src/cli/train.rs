//! The training loop, for ranks that are threads and for ranks that are processes.
//!
//! Enters: an execution, data, a number of steps. Leaves: losses, seconds, the quietest step's timeline,
//! checkpoints. Invariant: the batch of a step depends on its number alone; where ranks are processes,
//! all decide the same after each step, from what all have said.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use meshweave_compiler::resolve::Init;
use meshweave_dsl::diagnostics::Class;
use meshweave_dsl::graph::Role;
use meshweave_dsl::program::Program;
use meshweave_runtime::checkpoint::{DataOrder, Event, Keeper, Report, restore, save};
use meshweave_runtime::data::DataSource;
use meshweave_runtime::executor::{Drill, Session as Execution};
use meshweave_runtime::signals;
use serde::{Deserialize, Serialize};

use super::experts::{Experts, Settled};
use super::job::JobArgs;
use super::outcome::Outcome;
use super::runtime_error;
use crate::error::{Error, Result};

/// Whether a bar shows how far the training is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Shown,
    Hidden,
}

/// How parameters start, from the command line.
pub(super) fn parse_init(text: &str) -> Result<Init> {
    match text.split_once(':') {
        _ if text == "golden" => Ok(Init::Golden),
        _ if text == "random" => Ok(Init::Random { seed: 1 }),
        Some(("random", seed)) => seed.parse().map(|seed| Init::Random { seed }).map_err(|_| {
            Error::plain(Class::Invalid, format!("`{seed}` is no seed"))
                .help("write a whole number, as in `--init random:7`")
        }),
        _ => Ok(Init::Load(PathBuf::from(text))),
    }
}

/// The tokens to train on: those of a file, or the golden model's.
///
/// # Errors
/// The file cannot be read, or holds bytes that the vocabulary lacks.
pub(super) fn data_source(program: &Program, path: Option<&Path>) -> Result<DataSource> {
    let vocab = vocab(program);
    match path {
        None => Ok(DataSource::Golden { vocab }),
        Some(path) => {
            let data = DataSource::text_file(path).map_err(runtime_error)?;
            let greatest = greatest_byte(&data);
            if greatest >= vocab {
                return Err(Error::plain(
                    Class::Invalid,
                    format!(
                        "{} has a byte {greatest}, the model's vocabulary has {vocab} tokens",
                        path.display()
                    ),
                )
                .help(
                    "a token is a byte: give the model `vocab 256`, or a text of smaller bytes",
                ));
            }
            Ok(data)
        }
    }
}

fn greatest_byte(data: &DataSource) -> usize {
    match data {
        DataSource::Text(text) => text.iter().copied().max().map_or(0, usize::from),
        DataSource::Golden { vocab } => vocab.saturating_sub(1),
    }
}

/// Size of the vocabulary: that of the embedding table.
fn vocab(program: &Program) -> usize {
    let sizes = program
        .sources
        .iter()
        .filter_map(|source| source.ty.size_of(&"vocab".into()));
    sizes.max().unwrap_or(256)
}

/// Gives the program the batch of a step, counted from 0.
pub(super) fn give_batch(execution: &mut Execution, data: &DataSource, step: usize) -> Result<()> {
    let input = |name: &str| {
        execution
            .program()
            .sources
            .iter()
            .find(|source| source.name == name && source.role == Role::Input)
    };
    let Some(tokens) = input("tokens") else {
        return Ok(());
    };
    let size = |dim: &str| tokens.ty.size_of(&dim.into()).unwrap_or(1);
    let has_targets = input("targets").is_some();
    let batch = data
        .batch(step, size("batch"), size("seq"))
        .map_err(runtime_error)?;
    let (tokens, targets) = batch.tensors().map_err(runtime_error)?;
    execution.set("tokens", &tokens).map_err(runtime_error)?;
    if has_targets {
        execution.set("targets", &targets).map_err(runtime_error)?;
    }
    Ok(())
}

/// A run between its start and its end.
pub(super) struct Training {
    data: DataSource,
    order: DataOrder,
    keeper: Option<Keeper>,
    every: Option<u64>,
    /// The steps done when the newest checkpoint was begun.
    kept_at: Option<usize>,
    /// Whether the ranks are processes, which have to agree.
    shared: bool,
    experts: Experts,
}

/// What a process says of itself after each step.
#[derive(Default, Serialize, Deserialize)]
struct Vitals {
    /// A checkpoint was asked for.
    save: bool,
    /// The run was asked to end.
    end: bool,
    checkpoint: Report,
    /// Of tensors that several ranks hold.
    checksums: BTreeMap<String, u64>,
}

impl Training {
    /// Prepares a run: goes on from where the flags say, and opens the folder of checkpoints.
    ///
    /// # Errors
    /// Nothing whole to go on from, or a drill that does not fit.
    pub(super) fn new(job: &JobArgs, data: DataSource, execution: &mut Execution) -> Result<Self> {
        let tokens = execution
            .program()
            .sources
            .iter()
            .find(|source| source.name == "tokens");
        let size = |dim: &str| {
            tokens
                .and_then(|tokens| tokens.ty.size_of(&dim.into()))
                .unwrap_or(1)
        };
        let order = DataOrder {
            source: data.identity(),
            n_batch: size("batch"),
            n_seq: size("seq"),
        };
        let speaks = execution.ranks().contains(&0);
        if let Some(path) = &job.resume {
            let resumed = restore(execution, path, &order).map_err(runtime_error)?;
            if speaks {
                for reason in &resumed.passed_over {
                    eprintln!("warning: passed over: {reason}");
                }
            }
        }
        if let Some(drill) = &job.drill {
            let drill: Drill = drill.parse().map_err(runtime_error)?;
            execution.rehearse(&drill).map_err(runtime_error)?;
        }
        let folder = job.checkpoint.as_ref();
        Ok(Self {
            keeper: folder.map(|folder| Keeper::new(folder, job.keep, execution)),
            every: job.every,
            kept_at: None,
            shared: execution.ranks().len() < execution.program().ranks.len(),
            data,
            order,
            experts: Experts::default(),
        })
    }

    /// Brings the experts to where further steps have them.
    ///
    /// # Errors
    /// Those of [`Experts::begin`].
    pub(super) fn place(&mut self, experts: Experts, execution: &mut Execution) -> Result<()> {
        self.experts = experts;
        self.experts.begin(execution)
    }

    /// What follows a step that was run elsewhere.
    ///
    /// # Errors
    /// Those of [`Experts::after_step`].
    pub(super) fn after_step(&mut self, execution: &mut Execution) -> Result<()> {
        self.experts.after_step(execution)
    }

    /// Ends what was done with experts.
    ///
    /// # Errors
    /// Those of [`Experts::end`].
    pub(super) fn settle(&mut self, execution: &mut Execution) -> Result<Settled> {
        std::mem::take(&mut self.experts).end(execution)
    }

    /// The data.
    pub(super) fn data(&self) -> &DataSource {
        &self.data
    }

    /// Runs steps until `n_steps` have been run, those of `outcome` included, or a signal ends the run.
    ///
    /// # Errors
    /// A step that fails, a loss that is no number, ranks that have diverged.
    pub(super) fn steps(
        &mut self,
        execution: &mut Execution,
        n_steps: usize,
        progress: Progress,
        outcome: &mut Outcome,
    ) -> Result<()> {
        let bar = if progress == Progress::Shown {
            ProgressBar::new(n_steps as u64)
        } else {
            ProgressBar::hidden()
        };
        if let Ok(style) = ProgressStyle::with_template(
            "training   {bar:32} {pos}/{len}  {msg}  [{elapsed}, {eta} left]",
        ) {
            bar.set_style(style);
        }
        let has_loss = execution.loss().is_ok();
        bar.set_position(outcome.losses.len() as u64);
        for _ in outcome.losses.len()..n_steps {
            let step = execution.n_steps();
            give_batch(execution, &self.data, step)?;
            let start = Instant::now();
            let timeline = execution.step().map_err(runtime_error)?;
            outcome.step_s.push(start.elapsed().as_secs_f64());
            self.experts.after_step(execution)?;
            if has_loss {
                let loss = execution.loss().map_err(runtime_error)?;
                if !loss.is_finite() {
                    return Err(Error::plain(
                        Class::Invalid,
                        format!("the loss of step {step} is {loss}"),
                    )
                    .help("a smaller learning rate, or other initial weights, may help"));
                }
                bar.set_message(format!("loss {loss:.4}"));
                outcome.losses.push(loss);
            }
            // The quietest step shows the program, not the machine's other work; processes, which
            // cannot see which one that was on all of them, take the last one.
            let dispatched = timeline.dispatched_bytes(execution.program());
            outcome.dispatched_bytes.extend(dispatched);
            let context = timeline.context_bytes(execution.program());
            outcome.context_bytes.extend(context);
            let copied = timeline.copied_bytes(execution.program());
            outcome.copied_bytes.extend(copied);
            let best = outcome.timeline.as_ref();
            if self.shared || best.is_none_or(|best| timeline.step_s() < best.step_s()) {
                outcome.timeline = Some(timeline);
            }
            bar.inc(1);
            if self.tend(execution)? {
                outcome.ended_early = true;
                break;
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// After a step: what signals and `--every` ask for, and whether all ranks are still the same; true
    /// when the run is to end.
    fn tend(&mut self, execution: &Execution) -> Result<bool> {
        let due = |every: u64| (execution.n_steps() as u64).is_multiple_of(every);
        let mut save = self.every.is_some_and(due);
        let keeper = self.keeper.as_mut();
        let own = Vitals {
            save: signals::take_save(),
            end: signals::ending(),
            checkpoint: keeper.map_or_else(Report::default, |keeper| keeper.report(false)),
            checksums: self.checksums(execution, save)?,
        };
        let all = self.exchange(execution, own)?;
        save |= all.iter().any(|vitals| vitals.save);
        let reports: Vec<Report> = all.iter().map(|vitals| vitals.checkpoint.clone()).collect();
        self.conclude(execution, &reports)?;
        agree(&all, execution.n_steps())?;
        if save {
            self.checkpoint(execution)?;
        }
        Ok(all.iter().any(|vitals| vitals.end))
    }

    /// One parameter or state in turn, or all of them: divergence is found within a round, and no
    /// checkpoint is made of it.
    fn checksums(&self, execution: &Execution, all: bool) -> Result<BTreeMap<String, u64>> {
        if !self.shared {
            return Ok(BTreeMap::new());
        }
        let turn = execution.n_steps();
        let chosen = |idx, n: usize| all || idx == turn % n.max(1);
        execution.checksums(chosen).map_err(runtime_error)
    }

    fn exchange(&self, execution: &Execution, own: Vitals) -> Result<Vec<Vitals>> {
        if !self.shared {
            return Ok(vec![own]);
        }
        let broken = |error: serde_json::Error| Error::plain(Class::Internal, error);
        let text = serde_json::to_string(&own).map_err(broken)?;
        let texts = execution.exchange(&text).map_err(runtime_error)?;
        texts
            .iter()
            .map(|text| serde_json::from_str(text).map_err(broken))
            .collect()
    }

    /// Begins a checkpoint, after the one under way.
    fn checkpoint(&mut self, execution: &Execution) -> Result<()> {
        self.finish(execution)?;
        if let Some(keeper) = &mut self.keeper {
            keeper
                .begin(execution, &self.order)
                .map_err(runtime_error)?;
            self.kept_at = Some(execution.n_steps());
        }
        Ok(())
    }

    /// Waits for the checkpoint under way; the event that ended it.
    fn finish(&mut self, execution: &Execution) -> Result<Option<Event>> {
        let Some(keeper) = self.keeper.as_mut().filter(|keeper| keeper.is_busy()) else {
            return Ok(None);
        };
        let checkpoint = keeper.report(true);
        let own = Vitals {
            checkpoint,
            ..Vitals::default()
        };
        let all = self.exchange(execution, own)?;
        let reports: Vec<Report> = all.into_iter().map(|vitals| vitals.checkpoint).collect();
        self.conclude(execution, &reports)
    }

    fn conclude(&mut self, execution: &Execution, reports: &[Report]) -> Result<Option<Event>> {
        let event = self
            .keeper
            .as_mut()
            .and_then(|keeper| keeper.conclude(reports));
        if !execution.ranks().contains(&0) {
            return Ok(event);
        }
        match &event {
            Some(Event::Made(folder)) => tracing::info!("checkpoint {}", folder.display()),
            Some(Event::Failed(error)) => {
                eprintln!(
                    "warning: no checkpoint: {error}; earlier ones are as they were, training goes on"
                );
            }
            None => {}
        }
        Ok(event)
    }

    /// Ends the run: its last checkpoint, and the one file of `--save`.
    ///
    /// # Errors
    /// What was to be saved at the end cannot be.
    pub(super) fn end(&mut self, execution: &Execution, job: &JobArgs) -> Result<()> {
        if self.keeper.is_some() && self.kept_at != Some(execution.n_steps()) {
            self.checkpoint(execution)?;
        }
        let last = self.finish(execution)?;
        if let Some(path) = &job.save {
            save(execution, path).map_err(runtime_error)?;
        }
        if let Some(Event::Failed(error)) = last {
            let message = format!(
                "the last checkpoint, after step {}, could not be made: {error}",
                execution.n_steps()
            );
            return Err(Error::plain(Class::Exhausted, message)
                .help("make room or give another folder, and go on from the newest checkpoint with --resume"));
        }
        Ok(())
    }
}

/// Equal regions have equal checksums, or ranks have diverged.
fn agree(all: &[Vitals], n_steps: usize) -> Result<()> {
    let mut known: BTreeMap<&String, Vec<(u64, Vec<usize>)>> = BTreeMap::new();
    for (rank, vitals) in all.iter().enumerate() {
        for (key, sum) in &vitals.checksums {
            let sums = known.entry(key).or_default();
            match sums.iter_mut().find(|(known, _)| known == sum) {
                Some((_, ranks)) => ranks.push(rank),
                None => sums.push((*sum, vec![rank])),
            }
        }
    }
    let Some((key, sums)) = known.into_iter().find(|(_, sums)| sums.len() > 1) else {
        return Ok(());
    };
    let sides: Vec<String> = sums
        .iter()
        .map(|(sum, ranks)| format!("{ranks:?} have {sum:016x}"))
        .collect();
    let name = key.rsplit_once('@').map_or(key.as_str(), |(name, _)| name);
    let message = format!(
        "ranks have diverged: after step {n_steps} they hold different values of the same part of `{name}`: ranks {}",
        sides.join(", ranks ")
    );
    Err(Error::plain(Class::Exhausted, message)
        .help("the fewer ones are likely wrong: look at their memory and processor; go on from the newest checkpoint with --resume"))
}
