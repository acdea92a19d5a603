//! Figures for people: units, tables, sparklines. Every quantity says where it comes from.

use meshweave_compiler::plan::{GAP_LEFT, Solution};
use meshweave_compiler::resolve::Request;
use meshweave_dsl::plan::Certificate;

/// Seconds with a fitting unit.
pub fn seconds(value: f64) -> String {
    match value {
        v if v >= 1.0 => format!("{v:.2} s"),
        v if v >= 1e-3 => format!("{:.1} ms", v * 1e3),
        v => format!("{:.1} µs", v * 1e6),
    }
}

/// The same with six digits, for figures that are read back by [`seconds_of`].
pub fn exact_seconds(value: f64) -> String {
    let (scaled, unit) = match value {
        v if v >= 1.0 => (v, "s"),
        v if v >= 1e-3 => (v * 1e3, "ms"),
        v => (v * 1e6, "µs"),
    };
    let n_before = scaled.abs().max(1.0).log10().floor() as usize + 1;
    format!("{scaled:.*} {unit}", 6_usize.saturating_sub(n_before))
}

/// The seconds that a text begins with, as in `12.3 ms a step`.
pub fn seconds_of(text: &str) -> Option<f64> {
    let mut words = text.split([' ', ',']);
    let value: f64 = words.next()?.parse().ok()?;
    let unit = match words.next()? {
        "s" => 1.0,
        "ms" => 1e-3,
        "µs" => 1e-6,
        _ => return None,
    };
    Some(value * unit)
}

/// Bytes with a fitting binary unit.
pub fn bytes(value: f64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = value;
    let mut unit_idx = 0;
    while value >= 1024.0 && unit_idx + 1 < UNITS.len() {
        value /= 1024.0;
        unit_idx += 1;
    }
    if unit_idx == 0 {
        format!("{value:.0} B")
    } else {
        format!("{value:.1} {}", UNITS[unit_idx])
    }
}

/// Values as a line of blocks, highest full; resampled to at most `width` of them.
pub fn sparkline(values: &[f64], width: usize) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let finite: Vec<f64> = values
        .iter()
        .copied()
        .filter(|value| value.is_finite())
        .collect();
    let (low, high) = finite
        .iter()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
            (low.min(*value), high.max(*value))
        });
    let n_shown = finite.len().min(width.max(1));
    (0..n_shown)
        .map(|idx| {
            let value = finite[idx * finite.len() / n_shown];
            let height = if high > low {
                (value - low) / (high - low)
            } else {
                0.0
            };
            BLOCKS[(height * 7.0).round() as usize]
        })
        .collect()
}

/// The plan's key figures, a line each. Of a pipeline they are those of one microbatch on the devices
/// of a stage that had all stages.
pub fn plan_summary(request: &Request, solution: &Solution) -> String {
    let Certificate {
        predicted_s,
        lower_bound_s,
        gap,
        parts,
        memory,
        budget_bytes,
        ..
    } = &solution.certificate;
    let pipeline = request.pipeline.as_ref();
    let mesh = pipeline.map_or(solution.plan.mesh.clone(), |pipeline| {
        pipeline.mesh(&solution.plan.mesh)
    });
    let mut text = format!("mesh       {mesh}\n");
    let what = if pipeline.is_some() {
        "microbatch"
    } else {
        "step time "
    };
    text += &format!(
        "{what} {} (predicted): products {}, other compute {}, communication {}\n",
        seconds(*predicted_s),
        seconds(parts.matmul_s),
        seconds(parts.vector_s),
        seconds(parts.reshard_s)
    );
    text += &format!(
        "at best    {} (bound over the searched space); gap {:.2} %\n",
        seconds(*lower_bound_s),
        100.0 * gap
    );
    // Why the gap is as wide as it is stands last.
    let not_searched = &solution.certificate.not_searched;
    if let Some(why) = not_searched.iter().find(|what| what.starts_with(GAP_LEFT)) {
        text += &format!("open       {why}\n");
    }
    text += &format!(
        "memory     {} a device (predicted) of {} allowed: kept {}, activations {}, gradients {}\n",
        bytes(memory.peak_bytes()),
        bytes(*budget_bytes),
        bytes(memory.kept_bytes),
        bytes(memory.saved_bytes),
        bytes(memory.gradient_bytes)
    );
    text += &format!(
        "searched   {} in {} (measured)\n",
        solution.certificate.searched.join("; "),
        seconds(solution.solve_s)
    );
    text
}
