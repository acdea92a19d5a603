//! Key figures that follow from the parts of a report.
//!
//! Enters: the report's input. Leaves: figures in the order of the page's head.
//! Invariant: a figure is left out when a part that it needs is absent, never guessed.

use meshweave_dsl::graph::Role;
use meshweave_dsl::timeline::{Basis, Category, Timeline};

use super::format::{bytes, digits, percent, plural, scaled, seconds};
use super::{Figure, FigureSource, FigureValue, ReportInput};

/// The derived figures, then those given; a given one takes the place of a derived one of its label.
pub(super) fn figures(input: &ReportInput) -> Vec<Figure> {
    let derived = [
        step_time(input),
        throughput(input),
        gap(input),
        rate(input),
        memory(input),
        communication(input),
        loss(input),
        parameters(input),
    ];
    let mut figures: Vec<Figure> = derived.into_iter().flatten().collect();
    for given in &input.figures {
        match figures.iter_mut().find(|known| known.label == given.label) {
            Some(known) => *known = given.clone(),
            None => figures.push(given.clone()),
        }
    }
    figures
}

/// Measured first: what happened outranks what was expected.
fn timelines(input: &ReportInput) -> impl Iterator<Item = &Timeline> {
    input.measured.iter().chain(&input.predicted)
}

fn source(timeline: &Timeline) -> FigureSource {
    match timeline.basis {
        Basis::Predicted => FigureSource::Predicted,
        Basis::Measured => FigureSource::Measured,
    }
}

fn figure(label: &str, values: Vec<FigureValue>, note: String) -> Option<Figure> {
    (!values.is_empty()).then(|| Figure {
        label: label.into(),
        values,
        note,
    })
}

fn value(text: String, source: FigureSource) -> FigureValue {
    FigureValue { text, source }
}

fn step_time(input: &ReportInput) -> Option<Figure> {
    let mut values: Vec<FigureValue> = timelines(input)
        .map(|timeline| value(seconds(timeline.step_s()), source(timeline)))
        .collect();
    if let Some(bound_s) = input.lower_bound_s {
        values.push(value(
            format!("≥ {}", seconds(bound_s)),
            FigureSource::Bound,
        ));
    }
    let note = match (&input.predicted, &input.measured) {
        (Some(predicted), Some(measured)) if measured.step_s() > 0.0 => {
            let error = predicted.step_s() / measured.step_s() - 1.0;
            let sign = if error < 0.0 { "−" } else { "+" };
            format!("forecast off by {sign}{}", percent(error.abs()))
        }
        _ => String::new(),
    };
    figure("Step time", values, note)
}

fn throughput(input: &ReportInput) -> Option<Figure> {
    let n_tokens = tokens(input)?;
    let values = timelines(input)
        .filter(|timeline| timeline.step_s() > 0.0)
        .map(|timeline| {
            let per_s = n_tokens as f64 / timeline.step_s();
            value(scaled(per_s, "tokens/s"), source(timeline))
        })
        .collect();
    figure(
        "Throughput",
        values,
        format!("{} a step", plural(n_tokens, "token")),
    )
}

/// Tokens of a step: those that the program takes, since the graph of a pipeline is one microbatch's.
fn tokens(input: &ReportInput) -> Option<usize> {
    let is_tokens = |role: &Role, name: &str| *role == Role::Input && name == "tokens";
    if let Some(program) = &input.program {
        let mut sources = program.sources.iter();
        let tokens = sources.find(|source| is_tokens(&source.role, &source.name));
        return tokens.map(|tokens| tokens.ty.n_elements());
    }
    let mut tensors = input.graph.as_ref()?.tensors.iter();
    let tokens = tensors.find(|tensor| is_tokens(&tensor.role, &tensor.name));
    tokens.map(|tokens| tokens.ty.n_elements())
}

fn gap(input: &ReportInput) -> Option<Figure> {
    let bound_s = input.lower_bound_s?;
    let predicted_s = input.predicted.as_ref()?.step_s();
    if predicted_s <= 0.0 {
        return None;
    }
    figure(
        "Gap to optimum",
        vec![value(
            format!("≤ {}", percent((1.0 - bound_s / predicted_s).max(0.0))),
            FigureSource::Bound,
        )],
        "of the predicted time".into(),
    )
}

fn rate(input: &ReportInput) -> Option<Figure> {
    let values = timelines(input)
        .filter(|timeline| timeline.step_s() > 0.0)
        .map(|timeline| {
            let n_flops: f64 = timeline.events.iter().map(|event| event.n_flops).sum();
            value(
                scaled(n_flops / timeline.step_s(), "FLOP/s"),
                source(timeline),
            )
        })
        .collect();
    figure("Compute rate", values, "all devices together".into())
}

fn memory(input: &ReportInput) -> Option<Figure> {
    let ranks = &input.program.as_ref()?.ranks;
    let peak = ranks.iter().map(|rank| rank.arena_bytes).max()?;
    let least = ranks.iter().map(|rank| rank.arena_bytes).min()?;
    let note = if least as f64 > 0.99 * peak as f64 {
        "on every device, allocated once".into()
    } else {
        format!("least loaded: {}", bytes(least))
    };
    figure(
        "Memory a device",
        vec![value(bytes(peak), FigureSource::Exact)],
        note,
    )
}

fn communication(input: &ReportInput) -> Option<Figure> {
    let values = timelines(input)
        .filter_map(|timeline| {
            let all_s: f64 = timeline.events.iter().map(|event| event.duration_s).sum();
            let moving_s = timeline.busy_s(Category::Collective);
            let waiting_s: f64 = timeline.events.iter().map(|event| event.wait_s).sum();
            (all_s > 0.0 && timeline.n_ranks > 1)
                .then(|| value(percent((moving_s + waiting_s) / all_s), source(timeline)))
        })
        .collect();
    figure(
        "Communication",
        values,
        "of the time, waiting included".into(),
    )
}

fn loss(input: &ReportInput) -> Option<Figure> {
    let last = input.losses.last()?;
    let first = input.losses.first()?;
    figure(
        "Loss",
        vec![value(format!("{last:.4}"), FigureSource::Measured)],
        format!("from {first:.4} in {}", plural(input.losses.len(), "step")),
    )
}

fn parameters(input: &ReportInput) -> Option<Figure> {
    let graph = input.graph.as_ref()?;
    let n_params = graph.n_params();
    let largest = graph
        .params()
        .map(|id| graph.ty(id).n_elements())
        .max()
        .unwrap_or(0);
    (n_params > 0)
        .then(|| {
            figure(
                "Parameters",
                vec![value(scaled(n_params as f64, ""), FigureSource::Exact)],
                format!(
                    "in {}, the largest {} %",
                    plural(graph.params().count(), "tensor"),
                    digits(100.0 * largest as f64 / n_params as f64)
                ),
            )
        })
        .flatten()
}
