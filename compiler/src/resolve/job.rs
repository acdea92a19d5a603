//! What is done with the model: `train`, `infer`, `init`, `data`, `solve`.
//!
//! Enters: those statements. Leaves: plain data in base units.
//! Invariant: every number is in the range in which it means something.

use meshweave_dsl::diagnostics::{Diagnostic, Span};
use meshweave_dsl::dtype::DType;
use meshweave_dsl::units::{Quantity, UnitError};
use meshweave_dsl::weave::ast::{Goal, Job as JobStatement, Solve};

use super::settings::Settings;
use super::{Job, Latency, LatencyTarget, Objective, Serving, SolveLimits};
use crate::differentiate::Optimizer;

const TRAIN: [&str; 11] = [
    "batch",
    "seq",
    "steps",
    "optimizer",
    "lr",
    "beta1",
    "beta2",
    "betas",
    "eps",
    "decay",
    "dtype",
];
const INFER: [&str; 7] = ["batch", "seq", "dtype", "ttft", "tpot", "latency", "tokens"];

pub(super) fn resolve_train(
    statement: &JobStatement,
    span: Span,
    step: Option<(usize, usize)>,
    diagnostics: &mut Vec<Diagnostic>,
) -> (Option<Job>, OpenBatch) {
    let mut s = Settings::new("`train`".into(), span, &statement.settings, &TRAIN);
    s.diagnostics.retain(|finding| !is_twice(finding));
    let (sizes, open_batch) = sizes(&mut s, step);
    let n_steps = match s.has("steps") {
        true => s.count("steps", 1),
        false => Some(1),
    };
    let optimizer = optimizer(&mut s);
    let is_legal = s.diagnostics.is_empty();
    diagnostics.append(&mut s.diagnostics);
    let job = sizes.zip(n_steps.zip(optimizer)).filter(|_| is_legal).map(
        |((batch, seq), (n_steps, optimizer))| Job::Train {
            batch,
            seq,
            optimizer,
            n_steps,
        },
    );
    (job, open_batch)
}

/// What activations and the operands of products are stored as where the document is executed: f32
/// unless it says otherwise; what is not executed is refused elsewhere.
pub(super) fn storage(statement: &JobStatement) -> DType {
    let setting = statement.get("dtype");
    match setting.and_then(|setting| setting.value()?.as_str()) {
        Some("bf16") => DType::Bf16,
        _ => DType::F32,
    }
}

pub(super) fn resolve_infer(
    statement: &JobStatement,
    span: Span,
    step: Option<(usize, usize)>,
    diagnostics: &mut Vec<Diagnostic>,
) -> (Option<Job>, Serving, OpenBatch) {
    let mut s = Settings::new("`infer`".into(), span, &statement.settings, &INFER);
    s.diagnostics.retain(|finding| !is_twice(finding));
    let (sizes, open_batch) = sizes(&mut s, step);
    let tokens = match s.has("tokens") {
        true => s.count("tokens", 1),
        false => None,
    };
    let mut targets = Vec::new();
    for (key, latencies) in [
        ("ttft", [Some(Latency::FirstToken), None]),
        ("tpot", [None, Some(Latency::NextToken)]),
        (
            "latency",
            [Some(Latency::FirstToken), Some(Latency::NextToken)],
        ),
    ] {
        let found = s.quantity(key, "50 ms", |quantity| {
            quantity.seconds().map(|time| time.0)
        });
        let Some(most_s) = found else { continue };
        if tokens.is_none() && key == "tpot" {
            s.diagnostics.push(
                Diagnostic::invalid(
                    "`infer`: `tpot` is of tokens that are generated, and none are",
                )
                .code("W103")
                .at(s.span_of(key), "")
                .help("say how many, as in `tokens 256`, or write `ttft`"),
            );
        }
        let text = s
            .get(key)
            .map_or_else(String::new, |setting| setting.node.to_string());
        for of in latencies.into_iter().flatten() {
            targets.push(LatencyTarget {
                of,
                most_s,
                span: s.span_of(key),
                text: text.clone(),
            });
        }
    }
    let serving = Serving { tokens, targets };
    let is_legal = s.diagnostics.is_empty();
    diagnostics.append(&mut s.diagnostics);
    let job = sizes
        .filter(|_| is_legal)
        .map(|(batch, seq)| Job::Infer { batch, seq });
    (job, serving, open_batch)
}

/// What the batch may be where it is left open; anything where nothing is listed.
type OpenBatch = Option<Vec<usize>>;

/// The parser reports keys given twice on one line itself.
fn is_twice(finding: &Diagnostic) -> bool {
    finding.code.as_deref() == Some("W101")
}

/// (sequences, tokens per sequence), and the choices of the former where it is open.
fn sizes(
    s: &mut Settings<'_>,
    step: Option<(usize, usize)>,
) -> (Option<(usize, usize)>, OpenBatch) {
    let open = s.open_count("batch", 1);
    let has_witness = s.get("batch").is_some_and(|setting| {
        let mut values = setting.node.values.iter();
        values.any(|value| value.known().is_some())
    });
    let mut size = |key: &str, own: Option<usize>| match own {
        Some(own) if !s.has(key) => Some(own),
        _ => s.required_count(key, 1),
    };
    let batch = match &open {
        Some(choices) if !has_witness => Some(choices.iter().copied().min().unwrap_or(1)),
        _ => size("batch", step.map(|(batch, _)| batch)),
    };
    let seq = size("seq", step.map(|(_, seq)| seq));
    (batch.zip(seq), open)
}

/// AdamW with the golden model's numbers unless told otherwise.
fn optimizer(s: &mut Settings<'_>) -> Option<Optimizer> {
    let name = match s.has("optimizer") {
        true => s.word("optimizer", &["adamw", "sgd", "none"])?,
        false => "adamw",
    };
    let taken: &[&str] = match name {
        "adamw" => &["lr", "beta1", "beta2", "betas", "eps", "decay"],
        "sgd" => &["lr"],
        _ => &[],
    };
    for key in ["lr", "beta1", "beta2", "betas", "eps", "decay"] {
        if s.has(key) && !taken.contains(&key) {
            let span = s.span_of(key);
            s.diagnostics.push(
                Diagnostic::invalid(format!("`train`: optimizer `{name}` has no `{key}`"))
                    .code("W102")
                    .at(span, "")
                    .help(match taken {
                        [] => "remove it".to_owned(),
                        taken => format!("`{name}` takes {}", taken.join(", ")),
                    }),
            );
        }
    }
    let is_rate = |lr: f64| lr > 0.0 && lr.is_finite();
    let is_beta = |beta: f64| (0.0..1.0).contains(&beta);
    let lr = s.number("lr", "above 0", is_rate);
    let betas = s.pair("betas", "from 0 to below 1", is_beta);
    let beta1 = s.number("beta1", "from 0 to below 1", is_beta);
    let beta2 = s.number("beta2", "from 0 to below 1", is_beta);
    let eps = s.number("eps", "above 0", |eps| eps > 0.0);
    let decay = s.number("decay", "from 0 on", |decay| decay >= 0.0);
    for key in ["beta1", "beta2"] {
        if s.has(key) && s.has("betas") {
            let (span, other) = (s.span_of(key), s.span_of("betas"));
            s.diagnostics.push(
                Diagnostic::invalid(format!("`train`: `betas` gives `{key}` already"))
                    .code("W101")
                    .at(span, "again here")
                    .also(other, "first here"),
            );
        }
    }
    let (first, second) = betas.unzip();
    Some(match name {
        "adamw" => Optimizer::Adamw {
            lr: lr.unwrap_or(1e-3),
            beta1: beta1.or(first).unwrap_or(0.9),
            beta2: beta2.or(second).unwrap_or(0.95),
            eps: eps.unwrap_or(1e-8),
            decay: decay.unwrap_or(0.1),
        },
        "sgd" => Optimizer::Sgd {
            lr: lr.unwrap_or(0.1),
        },
        _ => Optimizer::None,
    })
}

pub(super) fn resolve_solve(
    solve: &Solve,
    span: Span,
    diagnostics: &mut Vec<Diagnostic>,
) -> SolveLimits {
    let objective = match (solve.goal, solve.objective.node.as_str()) {
        (Goal::Minimize, "step_time") => Some(Objective::StepTime),
        (Goal::Maximize, "throughput") => Some(Objective::Throughput),
        _ => {
            diagnostics.push(
                Diagnostic::unsupported(format!(
                    "`{} {}` is no objective that is implemented",
                    solve.goal, solve.objective
                ))
                .code("W120")
                .at(solve.objective.span, "")
                .help("write `solve minimize step_time` or `solve maximize throughput`"),
            );
            None
        }
    };
    let mut limits = SolveLimits {
        objective,
        ..SolveLimits::default()
    };
    let mut read = |quantity: Option<Quantity>,
                    convert: fn(Quantity) -> Result<f64, UnitError>,
                    slot: &mut f64,
                    lowest: &str,
                    is_legal: fn(f64) -> bool| {
        let Some(quantity) = quantity else { return };
        match convert(quantity) {
            Ok(value) if is_legal(value) => *slot = value,
            Ok(_) => diagnostics.push(
                Diagnostic::invalid(format!("`solve`: `{quantity}` is out of range: {lowest}"))
                    .code("W103")
                    .at(span, ""),
            ),
            Err(error) => diagnostics.push(
                Diagnostic::invalid(format!("`solve`: {error}"))
                    .code("W103")
                    .at(span, ""),
            ),
        }
    };
    read(
        solve.within,
        |quantity| quantity.seconds().map(|time| time.0),
        &mut limits.time_s,
        "the time is above 0 s",
        |time| time > 0.0,
    );
    read(
        solve.gap,
        |quantity| quantity.ratio().map(|ratio| ratio.0),
        &mut limits.gap,
        "the gap lies between 0 % and 100 %",
        |gap| (0.0..=1.0).contains(&gap),
    );
    limits
}
